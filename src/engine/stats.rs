//! Counters and gauges of the engine, read by `serve` for its metrics.

use std::iter::Sum;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// A snapshot of the engine's counters.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Sequences in the running batch.
    pub num_requests_running: usize,
    /// Sequences not yet admitted, those still in the channel included.
    pub num_requests_waiting: usize,
    /// KV blocks in all.
    pub num_blocks_total: usize,
    /// KV blocks held by sequences.
    pub num_blocks_used: usize,
    /// Prompt tokens looked up in the prefix cache.
    pub prefix_cache_queries: u64,
    /// Prompt tokens found there.
    pub prefix_cache_hits: u64,
    /// Prompt tokens of admitted requests.
    pub prompt_tokens: u64,
    /// Tokens drawn.
    pub generation_tokens: u64,
    /// Sequences put back to waiting because blocks ran out.
    pub num_preemptions: u64,
    /// Engine steps run.
    pub num_steps: u64,
    /// Steps by the tokens they brought.
    pub step_tokens: StepTokens,
}

impl Sum for Stats {
    fn sum<I: Iterator<Item = Self>>(replicas: I) -> Self {
        replicas.fold(Self::default(), |sum, stats| Self {
            num_requests_running: sum.num_requests_running + stats.num_requests_running,
            num_requests_waiting: sum.num_requests_waiting + stats.num_requests_waiting,
            num_blocks_total: sum.num_blocks_total + stats.num_blocks_total,
            num_blocks_used: sum.num_blocks_used + stats.num_blocks_used,
            prefix_cache_queries: sum.prefix_cache_queries + stats.prefix_cache_queries,
            prefix_cache_hits: sum.prefix_cache_hits + stats.prefix_cache_hits,
            prompt_tokens: sum.prompt_tokens + stats.prompt_tokens,
            generation_tokens: sum.generation_tokens + stats.generation_tokens,
            num_preemptions: sum.num_preemptions + stats.num_preemptions,
            num_steps: sum.num_steps + stats.num_steps,
            step_tokens: StepTokens {
                num_steps: std::array::from_fn(|bucket| {
                    sum.step_tokens.num_steps[bucket] + stats.step_tokens.num_steps[bucket]
                }),
                num_tokens: sum.step_tokens.num_tokens + stats.step_tokens.num_tokens,
            },
        })
    }
}

/// A histogram of the tokens that a step brings, counted as vLLM does: the prompts whose last
/// token it computed, and the tokens drawn.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StepTokens {
    /// Steps of at most [`Self::BOUNDS`]`[i]` tokens and more than the bound before it; the
    /// last entry counts those above all bounds.
    pub num_steps: [u64; Self::BOUNDS.len() + 1],
    /// Tokens of all steps.
    pub num_tokens: u64,
}

impl StepTokens {
    /// vLLM's bounds for `iteration_tokens_total`.
    pub const BOUNDS: [u64; 13] = [
        1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384,
    ];
}

/// The live form of [`Stats`], shared by the engine thread (writer) and the handles (readers).
#[derive(Debug, Default)]
pub(super) struct SharedStats {
    pub(super) num_requests_running: AtomicUsize,
    /// Raised by `submit`, lowered by the engine thread at admission or end.
    pub(super) num_requests_waiting: AtomicUsize,
    pub(super) num_blocks_total: AtomicUsize,
    pub(super) num_blocks_used: AtomicUsize,
    pub(super) prefix_cache_queries: AtomicU64,
    pub(super) prefix_cache_hits: AtomicU64,
    pub(super) prompt_tokens: AtomicU64,
    pub(super) generation_tokens: AtomicU64,
    pub(super) num_preemptions: AtomicU64,
    pub(super) num_steps: AtomicU64,
    steps_by_tokens: [AtomicU64; StepTokens::BOUNDS.len() + 1],
    num_step_tokens: AtomicU64,
}

impl SharedStats {
    /// Counts a step that brought `num_tokens`.
    pub(super) fn count_step(&self, num_tokens: usize) {
        let num_tokens = num_tokens as u64;
        let bucket = StepTokens::BOUNDS.partition_point(|&bound| bound < num_tokens);
        self.steps_by_tokens[bucket].fetch_add(1, Ordering::Relaxed);
        self.num_step_tokens
            .fetch_add(num_tokens, Ordering::Relaxed);
        self.num_steps.fetch_add(1, Ordering::Relaxed);
    }

    /// Returns the present values; each is exact, the set is not one instant.
    pub(super) fn snapshot(&self) -> Stats {
        let order = Ordering::Relaxed;
        Stats {
            num_requests_running: self.num_requests_running.load(order),
            num_requests_waiting: self.num_requests_waiting.load(order),
            num_blocks_total: self.num_blocks_total.load(order),
            num_blocks_used: self.num_blocks_used.load(order),
            prefix_cache_queries: self.prefix_cache_queries.load(order),
            prefix_cache_hits: self.prefix_cache_hits.load(order),
            prompt_tokens: self.prompt_tokens.load(order),
            generation_tokens: self.generation_tokens.load(order),
            num_preemptions: self.num_preemptions.load(order),
            num_steps: self.num_steps.load(order),
            step_tokens: StepTokens {
                num_steps: self.steps_by_tokens.each_ref().map(|n| n.load(order)),
                num_tokens: self.num_step_tokens.load(order),
            },
        }
    }
}
