//! Counters and gauges of the engine, read by `serve` for its metrics.

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
}

impl SharedStats {
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
        }
    }
}
