//! Prometheus metrics under vLLM's names, with the prefix `infold:`.
//!
//! Counters and gauges of the engine are copied from [`Stats`] when somebody asks; times are
//! observed as the events of a request arrive ([`RequestTimer`]).

use std::sync::Mutex;
use std::time::Instant;

use prometheus::{
    Encoder, Gauge, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    Opts, Registry, TextEncoder,
};

use crate::engine::Stats;

/// All metrics of one server.
pub(super) struct Metrics {
    registry: Registry,
    engine: EngineMetrics,
    requests: RequestMetrics,
    http_requests: IntCounterVec,
    /// Copying [`Stats`] is reset-then-add, which two scrapes at once must not interleave.
    scrape: Mutex<()>,
}

struct EngineMetrics {
    num_requests_running: IntGauge,
    num_requests_waiting: IntGauge,
    kv_cache_usage_perc: Gauge,
    prefix_cache_queries: IntCounter,
    prefix_cache_hits: IntCounter,
    prompt_tokens: IntCounter,
    generation_tokens: IntCounter,
    num_preemptions: IntCounter,
    num_steps: IntCounter,
}

struct RequestMetrics {
    success: IntCounterVec,
    time_to_first_token: Histogram,
    inter_token_latency: Histogram,
    time_per_output_token: Histogram,
    e2e_latency: Histogram,
    prefill_time: Histogram,
    decode_time: Histogram,
    prompt_tokens: Histogram,
    generation_tokens: Histogram,
    params_n: Histogram,
    params_max_tokens: Histogram,
    prompt_tokens_cached: IntCounter,
}

const TTFT_BUCKETS: [f64; 22] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
];
const TOKEN_TIME_BUCKETS: [f64; 18] = [
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0,
];
const REQUEST_TIME_BUCKETS: [f64; 21] = [
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
];
const TOKEN_COUNT_BUCKETS: [f64; 17] = [
    1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5,
];
const CHOICE_BUCKETS: [f64; 5] = [1.0, 2.0, 5.0, 10.0, 20.0];

/// Makes metrics that carry the model's name and register themselves.
struct Maker<'a> {
    registry: &'a Registry,
    model_name: &'a str,
}

impl Maker<'_> {
    fn opts(&self, name: &str, help: &str) -> Opts {
        Opts::new(format!("infold:{name}"), help)
            .const_label("model_name", self.model_name)
            .const_label("engine", "0")
    }

    fn gauge(&self, name: &str, help: &str) -> prometheus::Result<IntGauge> {
        let gauge = IntGauge::with_opts(self.opts(name, help))?;
        self.registry.register(Box::new(gauge.clone()))?;
        Ok(gauge)
    }

    fn ratio(&self, name: &str, help: &str) -> prometheus::Result<Gauge> {
        let gauge = Gauge::with_opts(self.opts(name, help))?;
        self.registry.register(Box::new(gauge.clone()))?;
        Ok(gauge)
    }

    fn counter(&self, name: &str, help: &str) -> prometheus::Result<IntCounter> {
        let counter = IntCounter::with_opts(self.opts(name, help))?;
        self.registry.register(Box::new(counter.clone()))?;
        Ok(counter)
    }

    fn counters(&self, name: &str, help: &str, by: &[&str]) -> prometheus::Result<IntCounterVec> {
        let counters = IntCounterVec::new(self.opts(name, help), by)?;
        self.registry.register(Box::new(counters.clone()))?;
        Ok(counters)
    }

    fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> prometheus::Result<Histogram> {
        let opts = HistogramOpts::from(self.opts(name, help)).buckets(buckets.to_vec());
        let histogram = HistogramVec::new(opts, &[])?;
        self.registry.register(Box::new(histogram.clone()))?;
        Ok(histogram.with_label_values::<&str>(&[]))
    }
}

impl EngineMetrics {
    fn new(make: &Maker<'_>) -> prometheus::Result<Self> {
        Ok(Self {
            num_requests_running: make
                .gauge("num_requests_running", "Sequences in the running batch.")?,
            num_requests_waiting: make
                .gauge("num_requests_waiting", "Sequences waiting to run.")?,
            kv_cache_usage_perc: make.ratio(
                "kv_cache_usage_perc",
                "Share of KV blocks in use, 1 is all.",
            )?,
            prefix_cache_queries: make.counter(
                "prefix_cache_queries_total",
                "Prompt tokens looked up in the prefix cache.",
            )?,
            prefix_cache_hits: make.counter(
                "prefix_cache_hits_total",
                "Prompt tokens found in the prefix cache.",
            )?,
            prompt_tokens: make
                .counter("prompt_tokens_total", "Prompt tokens of admitted requests.")?,
            generation_tokens: make.counter("generation_tokens_total", "Tokens generated.")?,
            num_preemptions: make.counter(
                "num_preemptions_total",
                "Sequences put back because KV blocks ran out.",
            )?,
            num_steps: make.counter("num_engine_steps_total", "Engine steps run.")?,
        })
    }

    fn copy(&self, stats: Stats) {
        let set = |counter: &IntCounter, value: u64| {
            counter.reset();
            counter.inc_by(value);
        };
        self.num_requests_running
            .set(stats.num_requests_running as i64);
        self.num_requests_waiting
            .set(stats.num_requests_waiting as i64);
        let num_blocks = stats.num_blocks_total.max(1);
        self.kv_cache_usage_perc
            .set(stats.num_blocks_used as f64 / num_blocks as f64);
        set(&self.prefix_cache_queries, stats.prefix_cache_queries);
        set(&self.prefix_cache_hits, stats.prefix_cache_hits);
        set(&self.prompt_tokens, stats.prompt_tokens);
        set(&self.generation_tokens, stats.generation_tokens);
        set(&self.num_preemptions, stats.num_preemptions);
        set(&self.num_steps, stats.num_steps);
    }
}

impl RequestMetrics {
    fn new(make: &Maker<'_>) -> prometheus::Result<Self> {
        let time = |name: &str, help: &str| make.histogram(name, help, &REQUEST_TIME_BUCKETS);
        let tokens = |name: &str, help: &str| make.histogram(name, help, &TOKEN_COUNT_BUCKETS);
        Ok(Self {
            success: make.counters(
                "request_success_total",
                "Sequences finished, by reason.",
                &["finished_reason"],
            )?,
            time_to_first_token: make.histogram(
                "time_to_first_token_seconds",
                "Arrival to first token.",
                &TTFT_BUCKETS,
            )?,
            inter_token_latency: make.histogram(
                "inter_token_latency_seconds",
                "One token to the next.",
                &TOKEN_TIME_BUCKETS,
            )?,
            time_per_output_token: make.histogram(
                "request_time_per_output_token_seconds",
                "Mean time of a token after the first.",
                &TOKEN_TIME_BUCKETS,
            )?,
            e2e_latency: time("e2e_request_latency_seconds", "Arrival to last token.")?,
            prefill_time: time(
                "request_queue_and_prefill_time_seconds",
                "Arrival to computed prompt.",
            )?,
            decode_time: time("request_decode_time_seconds", "First to last token.")?,
            prompt_tokens: tokens("request_prompt_tokens", "Prompt tokens of a request.")?,
            generation_tokens: tokens(
                "request_generation_tokens",
                "Tokens generated for a sequence.",
            )?,
            params_n: make.histogram("request_params_n", "Answers asked for.", &CHOICE_BUCKETS)?,
            params_max_tokens: tokens(
                "request_params_max_tokens",
                "Most tokens a sequence may generate.",
            )?,
            prompt_tokens_cached: make.counter(
                "prompt_tokens_cached_total",
                "Prompt tokens taken from the prefix cache.",
            )?,
        })
    }
}

impl Metrics {
    /// Registers all metrics for one model.
    ///
    /// # Errors
    /// Never for the names in this file; the library checks them at run time.
    pub(super) fn new(model_name: &str) -> prometheus::Result<Self> {
        let registry = Registry::new();
        let make = Maker {
            registry: &registry,
            model_name,
        };
        let engine = EngineMetrics::new(&make)?;
        let requests = RequestMetrics::new(&make)?;
        let http_requests = make.counters(
            "http_requests_total",
            "HTTP requests answered.",
            &["method", "handler", "status"],
        )?;
        Ok(Self {
            registry,
            engine,
            requests,
            http_requests,
            scrape: Mutex::new(()),
        })
    }

    /// Returns the metrics in Prometheus' text format, with the engine's present counters.
    ///
    /// # Errors
    /// Never for valid metrics; the library's signature allows for it.
    pub(super) fn encode(&self, stats: Stats) -> prometheus::Result<String> {
        let guard = self.scrape.lock();
        self.engine.copy(stats);
        let families = self.registry.gather();
        drop(guard);
        let mut text = Vec::new();
        TextEncoder::new().encode(&families, &mut text)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }

    /// Counts an answered HTTP request; `handler` is a route, never a raw path.
    pub(super) fn count_http(&self, method: &str, handler: &str, status: &str) {
        self.http_requests
            .with_label_values(&[method, handler, status])
            .inc();
    }

    /// Observes what a request asks for.
    pub(super) fn observe_request(&self, num_prompt_tokens: usize, n: usize, max_tokens: usize) {
        self.requests
            .prompt_tokens
            .observe(num_prompt_tokens as f64);
        self.requests.params_n.observe(n as f64);
        self.requests.params_max_tokens.observe(max_tokens as f64);
    }
}

/// The times of one sequence.
#[derive(Debug)]
pub(super) struct RequestTimer {
    arrival: Instant,
    first_token: Option<Instant>,
    last_token: Instant,
    num_tokens: usize,
}

impl RequestTimer {
    /// Starts at the arrival of the request.
    pub(super) fn start() -> Self {
        let arrival = Instant::now();
        Self {
            arrival,
            first_token: None,
            last_token: arrival,
            num_tokens: 0,
        }
    }

    /// Notes that the prompt was computed.
    pub(super) fn prompt_done(&self, metrics: &Metrics, num_cached_tokens: usize) {
        let requests = &metrics.requests;
        requests
            .prefill_time
            .observe(self.arrival.elapsed().as_secs_f64());
        requests
            .prompt_tokens_cached
            .inc_by(num_cached_tokens as u64);
    }

    /// Notes a token.
    pub(super) fn token(&mut self, metrics: &Metrics) {
        let now = Instant::now();
        self.num_tokens += 1;
        if self.first_token.is_none() {
            self.first_token = Some(now);
            let elapsed = now - self.arrival;
            metrics
                .requests
                .time_to_first_token
                .observe(elapsed.as_secs_f64());
        } else {
            let elapsed = now - self.last_token;
            metrics
                .requests
                .inter_token_latency
                .observe(elapsed.as_secs_f64());
        }
        self.last_token = now;
    }

    /// Notes the end of the sequence, by its finish reason.
    pub(super) fn finish(&self, metrics: &Metrics, reason: &str) {
        let requests = &metrics.requests;
        requests.success.with_label_values(&[reason]).inc();
        requests.generation_tokens.observe(self.num_tokens as f64);
        requests
            .e2e_latency
            .observe(self.arrival.elapsed().as_secs_f64());
        if let Some(first_token) = self.first_token {
            let decode_secs = (self.last_token - first_token).as_secs_f64();
            requests.decode_time.observe(decode_secs);
            if self.num_tokens > 1 {
                let per_token = decode_secs / (self.num_tokens - 1) as f64;
                requests.time_per_output_token.observe(per_token);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_labels_are_those_of_vllm_under_our_prefix() {
        let metrics = Metrics::new("tiny").unwrap();
        let mut timer = RequestTimer::start();
        timer.prompt_done(&metrics, 16);
        timer.token(&metrics);
        timer.token(&metrics);
        timer.finish(&metrics, "stop");
        let stats = Stats {
            generation_tokens: 2,
            num_blocks_total: 4,
            num_blocks_used: 1,
            ..Stats::default()
        };
        let text = metrics.encode(stats).unwrap();
        for line in [
            "# TYPE infold:generation_tokens_total counter",
            "infold:generation_tokens_total{engine=\"0\",model_name=\"tiny\"} 2",
            "infold:kv_cache_usage_perc{engine=\"0\",model_name=\"tiny\"} 0.25",
            "infold:request_success_total{engine=\"0\",finished_reason=\"stop\",model_name=\"tiny\"} 1",
            "infold:time_to_first_token_seconds_count{engine=\"0\",model_name=\"tiny\"} 1",
            "infold:inter_token_latency_seconds_count{engine=\"0\",model_name=\"tiny\"} 1",
            "infold:prompt_tokens_cached_total{engine=\"0\",model_name=\"tiny\"} 16",
        ] {
            assert!(text.contains(line), "{line}\nis not in\n{text}");
        }
    }

    #[test]
    fn scraping_twice_does_not_add_up() {
        let metrics = Metrics::new("tiny").unwrap();
        let stats = Stats {
            prompt_tokens: 7,
            ..Stats::default()
        };
        metrics.encode(stats).unwrap();
        let text = metrics.encode(stats).unwrap();
        assert!(text.contains("infold:prompt_tokens_total{engine=\"0\",model_name=\"tiny\"} 7"));
    }
}
