//! Prometheus metrics under vLLM's names, with the prefix `infold:`.
//!
//! Counters and gauges of the engine are copied from [`Stats`] when somebody asks; times are
//! observed as the events of a request arrive ([`RequestTimer`]). As in vLLM each data-parallel
//! replica has its own series, which the label `engine` numbers.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use prometheus::{
    Encoder, Gauge, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    Opts, Registry, TextEncoder,
};

use crate::engine::{EngineInfo, Stats};

mod engine;

use engine::EngineMetrics;

/// All metrics of one server.
pub(super) struct Metrics {
    registry: Registry,
    /// By replica.
    engines: Vec<EngineMetrics>,
    /// By replica.
    requests: Vec<RequestMetrics>,
    http_requests: IntCounterVec,
    /// Copying [`Stats`] is reset-then-add, which two scrapes at once must not interleave.
    scrape: Mutex<()>,
}

struct RequestMetrics {
    success: IntCounterVec,
    time_to_first_token: Histogram,
    inter_token_latency: Histogram,
    time_per_output_token: Histogram,
    e2e_latency: Histogram,
    queue_time: Histogram,
    prefill_time: Histogram,
    inference_time: Histogram,
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
    /// The replica, for metrics that are one's.
    engine: Option<usize>,
}

impl Maker<'_> {
    fn opts(&self, name: &str, help: &str) -> Opts {
        let opts = Opts::new(format!("infold:{name}"), help);
        let opts = opts.const_label("model_name", self.model_name);
        match self.engine {
            Some(engine) => opts.const_label("engine", engine.to_string()),
            None => opts,
        }
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
            queue_time: time("request_queue_time_seconds", "Waiting for the first step.")?,
            prefill_time: time(
                "request_prefill_time_seconds",
                "First step to computed prompt.",
            )?,
            inference_time: time(
                "request_inference_time_seconds",
                "First step to last token.",
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
    pub(super) fn new(model_name: &str, info: &EngineInfo) -> prometheus::Result<Self> {
        let registry = Registry::new();
        let make = |engine| Maker {
            registry: &registry,
            model_name,
            engine,
        };
        let (mut engines, mut requests) = (Vec::new(), Vec::new());
        for engine in 0..info.num_replicas {
            engines.push(EngineMetrics::new(&make(Some(engine)), info)?);
            requests.push(RequestMetrics::new(&make(Some(engine)))?);
        }
        let http_requests = make(None).counters(
            "http_requests_total",
            "HTTP requests answered.",
            &["method", "handler", "status"],
        )?;
        Ok(Self {
            registry,
            engines,
            requests,
            http_requests,
            scrape: Mutex::new(()),
        })
    }

    /// Returns the metrics in Prometheus' text format, with each replica's present counters.
    ///
    /// # Errors
    /// Never for valid metrics; the library's signature allows for it.
    pub(super) fn encode(&self, stats: &[Stats]) -> prometheus::Result<String> {
        let guard = self.scrape.lock();
        for (engine, stats) in self.engines.iter().zip(stats) {
            engine.copy(*stats);
        }
        let families = self.registry.gather();
        drop(guard);
        let mut text = Vec::new();
        TextEncoder::new().encode(&families, &mut text)?;
        let mut text = String::from_utf8_lossy(&text).into_owned();
        engine::write_snapshots(&mut text, &self.engines, stats);
        Ok(text)
    }

    /// Counts an answered HTTP request; `handler` is a route, never a raw path.
    pub(super) fn count_http(&self, method: &str, handler: &str, status: &str) {
        self.http_requests
            .with_label_values(&[method, handler, status])
            .inc();
    }

    /// Observes what a request asks of replica `engine`.
    pub(super) fn observe_request(
        &self,
        engine: usize,
        num_prompt_tokens: usize,
        n: usize,
        max_tokens: usize,
    ) {
        let requests = &self.requests[engine];
        requests.prompt_tokens.observe(num_prompt_tokens as f64);
        requests.params_n.observe(n as f64);
        requests.params_max_tokens.observe(max_tokens as f64);
    }
}

/// The times of one sequence.
#[derive(Debug)]
pub(super) struct RequestTimer {
    /// The replica that generates it.
    engine: usize,
    arrival: Instant,
    first_token: Option<Instant>,
    last_token: Instant,
    queue_time: Duration,
    num_tokens: usize,
}

impl RequestTimer {
    /// Starts at the arrival of the request, which went to replica `engine`.
    pub(super) fn start(engine: usize) -> Self {
        let arrival = Instant::now();
        Self {
            engine,
            arrival,
            first_token: None,
            last_token: arrival,
            queue_time: Duration::ZERO,
            num_tokens: 0,
        }
    }

    /// Notes that the prompt was computed, after waiting `queue_time` for its first step.
    pub(super) fn prompt_done(
        &mut self,
        metrics: &Metrics,
        num_cached_tokens: usize,
        queue_time: Duration,
    ) {
        self.queue_time = queue_time;
        let requests = &metrics.requests[self.engine];
        requests.queue_time.observe(queue_time.as_secs_f64());
        let prefill_time = self.arrival.elapsed().saturating_sub(queue_time);
        requests.prefill_time.observe(prefill_time.as_secs_f64());
        requests
            .prompt_tokens_cached
            .inc_by(num_cached_tokens as u64);
    }

    /// Notes a token.
    pub(super) fn token(&mut self, metrics: &Metrics) {
        let (now, requests) = (Instant::now(), &metrics.requests[self.engine]);
        self.num_tokens += 1;
        if self.first_token.is_none() {
            self.first_token = Some(now);
            let elapsed = (now - self.arrival).as_secs_f64();
            requests.time_to_first_token.observe(elapsed);
        } else {
            let elapsed = (now - self.last_token).as_secs_f64();
            requests.inter_token_latency.observe(elapsed);
        }
        self.last_token = now;
    }

    /// Notes the end of the sequence, by its finish reason.
    pub(super) fn finish(&self, metrics: &Metrics, reason: &str) {
        let requests = &metrics.requests[self.engine];
        requests.success.with_label_values(&[reason]).inc();
        requests.generation_tokens.observe(self.num_tokens as f64);
        let e2e = self.arrival.elapsed();
        requests.e2e_latency.observe(e2e.as_secs_f64());
        let inference_time = e2e.saturating_sub(self.queue_time);
        requests
            .inference_time
            .observe(inference_time.as_secs_f64());
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
    use crate::engine::StepTokens;

    fn info(num_replicas: usize) -> EngineInfo {
        EngineInfo {
            num_replicas,
            max_model_len: 8,
            vocab_size: 64,
            max_num_seqs: 4,
            max_num_batched_tokens: 32,
            block_size: 16,
            max_num_waiting: 4,
        }
    }

    #[test]
    fn names_and_labels_are_those_of_vllm_under_our_prefix() {
        let metrics = Metrics::new("tiny", &info(1)).unwrap();
        let mut timer = RequestTimer::start(0);
        timer.prompt_done(&metrics, 16, Duration::from_secs(3));
        timer.token(&metrics);
        timer.token(&metrics);
        timer.finish(&metrics, "stop");
        let stats = Stats {
            generation_tokens: 2,
            num_blocks_total: 4,
            num_blocks_used: 1,
            num_requests_waiting: 3,
            step_tokens: StepTokens {
                num_steps: [1, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4],
                num_tokens: 80_000,
            },
            ..Stats::default()
        };
        let text = metrics.encode(&[stats]).unwrap();
        for line in [
            "# TYPE infold:generation_tokens_total counter",
            "infold:generation_tokens_total{engine=\"0\",model_name=\"tiny\"} 2",
            "infold:kv_cache_usage_perc{engine=\"0\",model_name=\"tiny\"} 0.25",
            "infold:request_success_total{engine=\"0\",finished_reason=\"stop\",model_name=\"tiny\"} 1",
            "infold:time_to_first_token_seconds_count{engine=\"0\",model_name=\"tiny\"} 1",
            "infold:inter_token_latency_seconds_count{engine=\"0\",model_name=\"tiny\"} 1",
            "infold:request_queue_time_seconds_sum{engine=\"0\",model_name=\"tiny\"} 3",
            "infold:request_prefill_time_seconds_sum{engine=\"0\",model_name=\"tiny\"} 0",
            "infold:num_requests_waiting_by_reason{engine=\"0\",model_name=\"tiny\",reason=\"capacity\"} 3",
            "infold:iteration_tokens_total_bucket{engine=\"0\",model_name=\"tiny\",le=\"16384\"} 3",
            "infold:iteration_tokens_total_bucket{engine=\"0\",model_name=\"tiny\",le=\"+Inf\"} 7",
            "infold:iteration_tokens_total_sum{engine=\"0\",model_name=\"tiny\"} 80000",
            "infold:iteration_tokens_total_count{engine=\"0\",model_name=\"tiny\"} 7",
            "num_gpu_blocks=\"4\",kv_cache_size_tokens=\"64\",kv_cache_max_concurrency=\"8.00\"} 1",
            "infold:prompt_tokens_cached_total{engine=\"0\",model_name=\"tiny\"} 16",
        ] {
            assert!(text.contains(line), "{line}\nis not in\n{text}");
        }
    }

    #[test]
    fn scraping_twice_does_not_add_up() {
        let metrics = Metrics::new("tiny", &info(1)).unwrap();
        let stats = Stats {
            prompt_tokens: 7,
            ..Stats::default()
        };
        metrics.encode(&[stats]).unwrap();
        let text = metrics.encode(&[stats]).unwrap();
        assert!(text.contains("infold:prompt_tokens_total{engine=\"0\",model_name=\"tiny\"} 7"));
    }

    #[test]
    fn each_replica_has_its_own_series() {
        let metrics = Metrics::new("tiny", &info(2)).unwrap();
        RequestTimer::start(1).finish(&metrics, "stop");
        metrics.observe_request(1, 5, 1, 7);
        metrics.count_http("GET", "/health", "200");
        let stats = [3, 4].map(|num_blocks_total| Stats {
            num_blocks_total,
            num_blocks_used: 3,
            num_requests_waiting: num_blocks_total,
            ..Stats::default()
        });
        let text = metrics.encode(&stats).unwrap();
        for line in [
            "infold:kv_cache_usage_perc{engine=\"0\",model_name=\"tiny\"} 1",
            "infold:kv_cache_usage_perc{engine=\"1\",model_name=\"tiny\"} 0.75",
            "infold:num_requests_waiting_by_reason{engine=\"1\",model_name=\"tiny\",reason=\"capacity\"} 4",
            "infold:iteration_tokens_total_count{engine=\"1\",model_name=\"tiny\"} 0",
            "infold:cache_config_info{engine=\"1\",model_name=\"tiny\",block_size=\"16\",num_gpu_blocks=\"4\"",
            "infold:request_success_total{engine=\"1\",finished_reason=\"stop\",model_name=\"tiny\"} 1",
            "infold:request_params_max_tokens_sum{engine=\"0\",model_name=\"tiny\"} 0",
            "infold:request_params_max_tokens_sum{engine=\"1\",model_name=\"tiny\"} 7",
            "infold:http_requests_total{handler=\"/health\",method=\"GET\",model_name=\"tiny\",status=\"200\"} 1",
        ] {
            assert!(text.contains(line), "{line}\nis not in\n{text}");
        }
        let types = text.lines().filter_map(|line| line.strip_prefix("# TYPE "));
        let mut names: Vec<&str> = types.filter_map(|line| line.split(' ').next()).collect();
        let num_families = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), num_families, "a family appears twice:\n{text}");
    }
}
