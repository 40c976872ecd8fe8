//! Metrics of the engine: copied from the [`Stats`] of each replica when somebody asks.

use std::fmt::{Display, Write};

use prometheus::{Gauge, IntCounter, IntGauge};

use super::Maker;
use crate::engine::{EngineInfo, Stats, StepTokens};

/// One replica's counters and gauges that are copied, and what the text of the others needs.
pub(super) struct EngineMetrics {
    num_requests_running: IntGauge,
    num_requests_waiting: IntGauge,
    kv_cache_usage_perc: Gauge,
    prefix_cache_queries: IntCounter,
    prefix_cache_hits: IntCounter,
    prompt_tokens: IntCounter,
    generation_tokens: IntCounter,
    num_preemptions: IntCounter,
    num_steps: IntCounter,
    /// The labels of every series, in the text format.
    labels: String,
    block_size: usize,
    max_model_len: usize,
}

impl EngineMetrics {
    /// Registers the metrics that the library can hold.
    pub(super) fn new(make: &Maker<'_>, info: &EngineInfo) -> prometheus::Result<Self> {
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
            labels: format!(
                "engine=\"{}\",model_name=\"{}\"",
                make.engine.unwrap_or_default(),
                escaped(make.model_name)
            ),
            block_size: info.block_size,
            max_model_len: info.max_model_len,
        })
    }

    /// Sets every registered metric to what `stats` says.
    pub(super) fn copy(&self, stats: Stats) {
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

    fn write_waiting(&self, text: &mut String, stats: &Stats) {
        // Nothing here ever defers a sequence; vLLM's second reason is kept for its dashboards.
        let waiting = stats.num_requests_waiting;
        for (reason, count) in [("capacity", waiting), ("deferred", 0)] {
            let labels = format!("{},reason=\"{reason}\"", self.labels);
            push_line(
                text,
                "infold:num_requests_waiting_by_reason",
                &labels,
                count,
            );
        }
    }

    fn write_step_tokens(&self, text: &mut String, stats: &Stats) {
        let (labels, steps) = (&self.labels, &stats.step_tokens);
        let name = "infold:iteration_tokens_total";
        let bucket = format!("{name}_bucket");
        let mut num_steps = 0;
        for (count, bound) in steps.num_steps.iter().zip(StepTokens::BOUNDS) {
            num_steps += count;
            push_line(
                text,
                &bucket,
                &format!("{labels},le=\"{bound}\""),
                num_steps,
            );
        }
        num_steps += steps.num_steps[StepTokens::BOUNDS.len()];
        push_line(text, &bucket, &format!("{labels},le=\"+Inf\""), num_steps);
        push_line(text, &format!("{name}_sum"), labels, steps.num_tokens);
        push_line(text, &format!("{name}_count"), labels, num_steps);
    }

    fn write_cache_config(&self, text: &mut String, stats: &Stats) {
        let num_tokens = stats.num_blocks_total * self.block_size;
        let labels = format!(
            "{},block_size=\"{}\",num_gpu_blocks=\"{}\",kv_cache_size_tokens=\"{num_tokens}\",\
             kv_cache_max_concurrency=\"{:.2}\"",
            self.labels,
            self.block_size,
            stats.num_blocks_total,
            num_tokens as f64 / self.max_model_len.max(1) as f64,
        );
        push_line(text, "infold:cache_config_info", &labels, 1);
    }
}

/// Name, explanation and type of a family, and what writes one replica's series.
type Family = (
    &'static str,
    &'static str,
    &'static str,
    fn(&EngineMetrics, &mut String, &Stats),
);

const SNAPSHOT_FAMILIES: [Family; 3] = [
    (
        "num_requests_waiting_by_reason",
        "Sequences waiting to run, by reason.",
        "gauge",
        EngineMetrics::write_waiting,
    ),
    (
        "iteration_tokens_total",
        "Tokens that a step brought.",
        "histogram",
        EngineMetrics::write_step_tokens,
    ),
    (
        "cache_config_info",
        "Sizes of the KV cache.",
        "gauge",
        EngineMetrics::write_cache_config,
    ),
];

/// Appends, in Prometheus' text format, what the library can not copy from a snapshot: the
/// histogram of step sizes, waiting sequences by reason, and the KV cache's sizes.
pub(super) fn write_snapshots(text: &mut String, engines: &[EngineMetrics], stats: &[Stats]) {
    for (name, help, kind, write) in SNAPSHOT_FAMILIES {
        // Writing into a string can not fail.
        let _ = writeln!(
            text,
            "# HELP infold:{name} {help}\n# TYPE infold:{name} {kind}"
        );
        for (engine, stats) in engines.iter().zip(stats) {
            write(engine, text, stats);
        }
    }
}

fn push_line(text: &mut String, name: &str, labels: &str, value: impl Display) {
    // Writing into a string can not fail.
    let _ = writeln!(text, "{name}{{{labels}}} {value}");
}

/// Escapes a label's value as the text format asks.
fn escaped(value: &str) -> String {
    value
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}
