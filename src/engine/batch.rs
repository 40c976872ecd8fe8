//! A scheduled batch laid out as the integers that the model reads: plain vectors, no tensor.

use std::collections::HashMap;

use crate::kernels::{AttentionBatch, Draw, NO_SLOT};

use super::scheduler::{ScheduledBatch, Scheduler};
use super::sequence::{Sequence, SequenceId};

/// One step's input, the same on every rank.
pub(super) struct StepInput {
    /// Blocks `(source, target)` to copy before anything is computed, in this order.
    pub(super) block_copies: Vec<(u32, u32)>,
    /// Token ids `[tokens]`; on a GPU one may be a [`crate::kernels::drawn_id`].
    pub(super) input_ids: Vec<u32>,
    /// Positions, slots and block tables.
    pub(super) attention: AttentionBatch,
    /// Rows of the hidden states that logits are needed of, ascending.
    pub(super) logits_rows: Vec<u32>,
    /// What each of these logits is for.
    pub(super) logits_uses: Vec<LogitsUse>,
    /// How the device draws from each of them; none where the engine reads the logits itself.
    pub(super) draws: Vec<Option<Draw>>,
}

/// What a row of logits is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LogitsUse {
    /// Draw the sequence's next token.
    Sample {
        /// The sequence.
        id: SequenceId,
        /// Which of its tokens this is, from 0.
        output_index: usize,
    },
    /// Report the logprob of the prompt token that follows.
    PromptLogprob {
        /// The sequence.
        id: SequenceId,
        /// Place of the prompt token.
        position: usize,
        /// The prompt token.
        token_id: u32,
    },
}

impl LogitsUse {
    /// Returns whose logits these are.
    pub(super) fn id(&self) -> SequenceId {
        match *self {
            Self::Sample { id, .. } | Self::PromptLogprob { id, .. } => id,
        }
    }

    /// Returns whether a token is drawn.
    pub(super) fn is_sample(&self) -> bool {
        matches!(self, Self::Sample { .. })
    }
}

impl StepInput {
    /// Lays out `batch`, which is not launched yet; blocks for its tokens are already in the
    /// sequences' tables. `pending_ids` are the input ids of tokens that are not known yet.
    pub(super) fn new(
        batch: &ScheduledBatch,
        scheduler: &Scheduler,
        block_size: usize,
        pending_ids: &HashMap<SequenceId, u32>,
    ) -> Self {
        let mut input = Self {
            block_copies: batch
                .copies
                .iter()
                .map(|copy| (copy.source, copy.target))
                .collect(),
            input_ids: Vec::with_capacity(batch.num_tokens),
            attention: AttentionBatch {
                cu_seqlens_q: vec![0],
                context_lens: Vec::with_capacity(batch.sequences.len()),
                block_tables: Vec::new(),
                cu_blocks: vec![0],
                positions: Vec::with_capacity(batch.num_tokens),
                slot_mapping: Vec::with_capacity(batch.num_tokens),
                staged: None,
            },
            logits_rows: Vec::new(),
            logits_uses: Vec::new(),
            draws: Vec::new(),
        };
        for scheduled in &batch.sequences {
            let sequence = scheduler.sequence(scheduled.id);
            // Without one the draw has failed, and so will the sequence: any id will do.
            let pending_id = pending_ids.get(&scheduled.id).copied().unwrap_or(0);
            input.push(sequence, scheduled.num_tokens, block_size, pending_id);
        }
        input.draws = vec![None; input.logits_rows.len()];
        input
    }

    /// Returns the step of `num_tokens` tokens in `num_sequences` sequences that takes the most
    /// memory: all rows but one are kept to the end, and as many as there are sequences are drawn
    /// from. It touches no block but the first and writes nothing to the cache that is kept.
    pub(super) fn largest(num_tokens: usize, num_sequences: usize, block_size: usize) -> Self {
        let len = num_tokens.div_ceil(num_sequences);
        let mut input = Self {
            block_copies: Vec::new(),
            input_ids: vec![0; num_tokens],
            attention: AttentionBatch {
                cu_seqlens_q: vec![0],
                cu_blocks: vec![0],
                ..AttentionBatch::default()
            },
            logits_rows: (0..num_tokens.saturating_sub(1).max(1) as u32).collect(),
            logits_uses: Vec::new(),
            draws: Vec::new(),
        };
        input.draws = vec![Some(Draw::greedy()); num_sequences.min(input.logits_rows.len())];
        let attention = &mut input.attention;
        for start in (0..num_tokens).step_by(len).take(num_sequences) {
            let end = (start + len).min(num_tokens);
            attention.cu_seqlens_q.push(end as u32);
            attention.context_lens.push((end - start) as u32);
            let num_blocks = (end - start).div_ceil(block_size);
            attention
                .block_tables
                .resize(attention.block_tables.len() + num_blocks, 0);
            attention
                .cu_blocks
                .push(attention.block_tables.len() as u32);
            for position in 0..end - start {
                // The first: a short --max-model-len has no other in its rotary tables.
                attention.positions.push(0);
                attention.slot_mapping.push((position % block_size) as u32);
            }
        }
        input
    }

    /// Returns a step of one token for each of `num_sequences`, which writes nothing to the cache.
    pub(super) fn decodes(num_sequences: usize) -> Self {
        let counts: Vec<u32> = (0..=num_sequences as u32).collect();
        Self {
            block_copies: Vec::new(),
            input_ids: vec![0; num_sequences],
            attention: AttentionBatch {
                cu_seqlens_q: counts.clone(),
                context_lens: vec![1; num_sequences],
                block_tables: vec![0; num_sequences],
                cu_blocks: counts.clone(),
                positions: vec![0; num_sequences],
                slot_mapping: vec![NO_SLOT; num_sequences],
                staged: None,
            },
            logits_rows: counts[..num_sequences].to_vec(),
            logits_uses: Vec::new(),
            draws: vec![Some(Draw::greedy()); num_sequences],
        }
    }

    /// Returns the number of sequences when each has one token and wants its logits.
    pub(super) fn num_decodes(&self) -> Option<usize> {
        let num = self.attention.context_lens.len();
        (self.input_ids.len() == num && self.logits_rows.len() == num).then_some(num)
    }

    /// Returns whether the device draws all that is to be drawn and no logits are read besides.
    pub(super) fn is_drawn_on_device(&self) -> bool {
        self.draws.iter().all(Option::is_some)
    }

    fn push(&mut self, sequence: &Sequence, num_tokens: usize, block_size: usize, pending_id: u32) {
        let start = sequence.num_computed_tokens;
        let end = start + num_tokens;
        let first_row = self.input_ids.len();
        let num_known = sequence.token_ids.len();
        self.input_ids
            .extend_from_slice(&sequence.token_ids[start..end.min(num_known)]);
        if end > num_known {
            self.input_ids.push(pending_id);
        }
        let attention = &mut self.attention;
        for position in start..end {
            let block = sequence.block_table[position / block_size] as usize;
            attention.positions.push(position as u32);
            attention
                .slot_mapping
                .push((block * block_size + position % block_size) as u32);
        }
        attention.cu_seqlens_q.push(self.input_ids.len() as u32);
        attention.context_lens.push(end as u32);
        let num_blocks = end.div_ceil(block_size);
        attention
            .block_tables
            .extend_from_slice(&sequence.block_table[..num_blocks]);
        attention
            .cu_blocks
            .push(attention.block_tables.len() as u32);

        // A preempted sequence that has drawn tokens already reported its prompt.
        if sequence.sampling_params.prompt_logprobs.is_some() && sequence.num_drawn_tokens() == 0 {
            // The logits at a position speak of the token after it.
            for position in start..end.min(sequence.num_prompt_tokens - 1) {
                self.logits_rows.push((first_row + position - start) as u32);
                self.logits_uses.push(LogitsUse::PromptLogprob {
                    id: sequence.id,
                    position: position + 1,
                    token_id: sequence.token_ids[position + 1],
                });
            }
        }
        if sequence.samples_after(num_tokens) {
            self.logits_rows.push((first_row + num_tokens - 1) as u32);
            self.logits_uses.push(LogitsUse::Sample {
                id: sequence.id,
                output_index: sequence.num_drawn_tokens(),
            });
        }
    }
}
