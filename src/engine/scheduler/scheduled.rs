//! What the scheduler hands out, a step's part of each sequence, and what it reports of one.

use super::super::request::FinishReason;
use super::super::sequence::{Sequence, SequenceId};

/// A sequence's part of a step: the tokens from `num_computed_tokens` on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) struct ScheduledSequence {
    pub(in super::super) id: SequenceId,
    /// Tokens to compute, at least 1.
    pub(in super::super) num_tokens: usize,
    /// Whether these are the last ones that there are: then the step draws the next token, or
    /// the sequence ends where none is wanted.
    pub(in super::super) is_last: bool,
}

/// What one step computes. Running sequences come first, in the order of their admission.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(in super::super) struct ScheduledBatch {
    pub(in super::super) sequences: Vec<ScheduledSequence>,
    /// Sum over `sequences`.
    pub(in super::super) num_tokens: usize,
    /// To be done in this order before anything is computed.
    pub(in super::super) copies: Vec<BlockCopy>,
}

impl ScheduledBatch {
    pub(super) fn push(&mut self, sequence: &Sequence, num_tokens: usize) {
        self.num_tokens += num_tokens;
        self.sequences.push(ScheduledSequence {
            id: sequence.id,
            num_tokens,
            is_last: num_tokens == sequence.num_uncomputed_tokens(),
        });
    }

    pub(super) fn remove(&mut self, id: SequenceId) {
        if let Some(index) = self.sequences.iter().position(|entry| entry.id == id) {
            self.num_tokens -= self.sequences.remove(index).num_tokens;
        }
    }
}

/// One block's keys and values to be copied into another, on every layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) struct BlockCopy {
    pub(in super::super) source: u32,
    pub(in super::super) target: u32,
}

/// What a step meant for one sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) struct Update {
    pub(in super::super) id: SequenceId,
    /// The token drawn; `None` when the request asked for no token.
    pub(in super::super) token_id: Option<u32>,
    /// Whether the prompt is computed now and was not before; true once a sequence.
    pub(in super::super) prompt_done: bool,
    /// Prompt tokens that the prefix cache gave.
    pub(in super::super) num_cached_tokens: usize,
    /// Set when the sequence has ended; the scheduler does not know it any more.
    pub(in super::super) finish: Option<FinishReason>,
}

/// Counters since the start, and gauges.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(in super::super) struct SchedulerCounters {
    /// Prompt tokens looked up in the prefix cache, each sequence once.
    pub(in super::super) prefix_cache_queries: u64,
    /// Prompt tokens found there.
    pub(in super::super) prefix_cache_hits: u64,
    /// Prompt tokens of admitted sequences, each sequence once.
    pub(in super::super) prompt_tokens: u64,
    pub(in super::super) num_preemptions: u64,
    pub(in super::super) num_blocks_total: usize,
    pub(in super::super) num_blocks_used: usize,
}
