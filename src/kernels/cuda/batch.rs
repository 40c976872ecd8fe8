//! A step's integers on the GPU: one upload from pinned memory into one buffer.
//!
//! The places depend on the padded numbers of tokens and sequences alone, so that a graph
//! recorded for a bucket finds its inputs where it found them when it was recorded. An upload comes
//! in the stream after the step that still reads what it overwrites.

use std::sync::{Mutex, PoisonError};

use candle_core::{Result, bail};

use super::super::{AttentionBatch, check};
use super::driver::{Address, Driver};
use super::memory::Buffer;
use super::turns::Turns;

/// Tokens that `attention_decode`'s split takes at least.
const MIN_SPLIT_TOKENS: usize = 64;
/// Blocks of `attention_decode` on a multiprocessor, at most, where contexts are split.
pub(super) const SPLIT_BLOCKS_PER_MULTIPROCESSOR: usize = 2;
/// What it costs to add splits up, in tokens that a block could have read meanwhile: 2.6 µs
/// (32 sequences of 384 tokens on an H100, docs/gpu_log.md).
const SPLIT_COST_TOKENS: usize = 100;

/// Returns how many splits `attention_decode` is launched with for so many sequences times kv
/// heads. It must not depend on contexts: launches are recorded.
fn max_splits(num_pairs: usize, num_multiprocessors: usize) -> usize {
    (SPLIT_BLOCKS_PER_MULTIPROCESSOR * num_multiprocessors / num_pairs.max(1)).clamp(1, 64)
}

/// Returns how many tokens each split takes: what ends soonest, if every multiprocessor takes a
/// block at a time and a token costs the same everywhere. Splits without tokens end at once.
fn tokens_of_a_split(
    num_pairs: usize,
    longest_context: usize,
    max_splits: usize,
    num_multiprocessors: usize,
) -> usize {
    let tokens_with = |splits: usize| {
        let tokens = longest_context.div_ceil(splits);
        tokens.next_multiple_of(MIN_SPLIT_TOKENS)
    };
    let cost = |&tokens: &usize| {
        let splits = longest_context.div_ceil(tokens);
        let rounds = (num_pairs * splits).div_ceil(num_multiprocessors);
        rounds * tokens + if splits > 1 { SPLIT_COST_TOKENS } else { 0 }
    };
    let fewest_first = (1..=max_splits).map(tokens_with);
    fewest_first.min_by_key(cost).unwrap_or(MIN_SPLIT_TOKENS)
}

/// The largest step.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub(super) num_tokens: usize,
    pub(super) num_sequences: usize,
    /// Blocks of the longest sequence.
    pub(super) num_sequence_blocks: usize,
    /// Of this rank.
    pub(super) num_kv_heads: usize,
}

/// Where a staged step lies, and its sizes, padding included.
#[derive(Debug, Clone, Copy)]
pub(in crate::kernels) struct Staged {
    pub(super) num_tokens: usize,
    pub(super) num_sequences: usize,
    pub(super) num_logits_rows: usize,
    /// Sequences with one token.
    pub(super) num_decodes: usize,
    /// Query tokens of all others.
    pub(super) num_prefill_tokens: usize,
    /// Sequences of more than one token, all from `prefills_begin` to before `prefills_end`.
    pub(super) num_prefills: usize,
    pub(super) prefills_begin: usize,
    pub(super) prefills_end: usize,
    pub(super) num_splits: usize,
    pub(super) max_position: usize,
    pub(super) ids: Address,
    pub(super) positions: Address,
    pub(super) slots: Address,
    pub(super) cu_seqlens_q: Address,
    pub(super) context_lens: Address,
    pub(super) cu_blocks: Address,
    pub(super) split_tokens: Address,
    pub(super) logits_rows: Address,
    pub(super) block_tables: Address,
}

/// The buffers that steps are staged in.
pub(super) struct Stage {
    device: Buffer,
    host: Mutex<Turns<i32>>,
    limits: Limits,
}

/// What a step consists of.
pub(in crate::kernels) struct StepArrays<'a> {
    pub(in crate::kernels) input_ids: &'a [u32],
    pub(in crate::kernels) attention: &'a AttentionBatch,
    pub(in crate::kernels) logits_rows: &'a [u32],
    /// Pads to this many sequences of one token.
    pub(in crate::kernels) bucket: Option<usize>,
}

impl Stage {
    pub(super) fn new(driver: &Driver, limits: Limits) -> Result<Self> {
        let len = 4 * limits.num_tokens
            + 3 * limits.num_sequences
            + 16
            + limits.num_sequences * limits.num_sequence_blocks;
        Ok(Self {
            device: driver.allocate(4 * len)?,
            host: Mutex::new(Turns::new(driver, len)?),
            limits,
        })
    }

    /// Uploads a step, after the upload of the one before the last has run.
    ///
    /// # Errors
    /// When the step is larger than the limits, or an input id stands for a row that no step has.
    pub(super) fn stage(&self, driver: &Driver, step: &StepArrays<'_>) -> Result<Staged> {
        let batch = step.attention;
        let num_tokens = step.bucket.unwrap_or(step.input_ids.len());
        let num_sequences = step.bucket.unwrap_or(batch.context_lens.len());
        let num_logits_rows = step.bucket.unwrap_or(step.logits_rows.len());
        if num_tokens > self.limits.num_tokens || num_sequences > self.limits.num_sequences {
            bail!(
                "a step of {num_tokens} tokens of {num_sequences} sequences; the limits are {:?}",
                self.limits
            );
        }
        let is_drawn = |id: i32| id < 0;
        let mut rows = step.input_ids.iter().map(|&id| id as i32);
        if let Some(id) = rows.find(|&id| is_drawn(id) && !id as usize >= self.limits.num_sequences)
        {
            bail!(
                "an input id stands for row {} of the step before; a step has at most {} rows",
                !id,
                self.limits.num_sequences
            );
        }
        let mut host = self.host.lock().unwrap_or_else(PoisonError::into_inner);
        let (host, uploaded) = host.take(driver)?;
        let mut writer = Writer {
            values: host.get_mut(),
            len: 0,
            base: self.device.address(),
        };
        let mut lens = batch
            .cu_seqlens_q
            .windows(2)
            .map(|pair| (pair[1] - pair[0]) as usize);
        let num_decodes = lens.clone().filter(|&len| len == 1).count();
        let longest = batch.context_lens.iter().copied().max().unwrap_or(1) as usize;
        let num_pairs = num_sequences * self.limits.num_kv_heads;
        let num_splits = max_splits(num_pairs, driver.num_multiprocessors);
        let split_tokens =
            tokens_of_a_split(num_pairs, longest, num_splits, driver.num_multiprocessors);
        let last = |values: &[u32]| values.last().copied().unwrap_or(0) as i32;
        let staged = Staged {
            num_tokens,
            num_sequences,
            num_logits_rows,
            num_decodes,
            num_prefill_tokens: lens.clone().filter(|&len| len > 1).sum(),
            num_prefills: lens.clone().filter(|&len| len > 1).count(),
            prefills_begin: lens.clone().position(|len| len > 1).unwrap_or(0),
            prefills_end: lens.rposition(|len| len > 1).map_or(0, |last| last + 1),
            num_splits,
            max_position: batch.positions.iter().copied().max().unwrap_or(0) as usize,
            ids: writer.put(step.input_ids, num_tokens, 0)?,
            positions: writer.put(&batch.positions, num_tokens, 0)?,
            slots: writer.put(&batch.slot_mapping, num_tokens, -1)?,
            cu_seqlens_q: writer.put(
                &batch.cu_seqlens_q,
                num_sequences + 1,
                last(&batch.cu_seqlens_q),
            )?,
            context_lens: writer.put(&batch.context_lens, num_sequences, 0)?,
            cu_blocks: writer.put(&batch.cu_blocks, num_sequences + 1, last(&batch.cu_blocks))?,
            split_tokens: writer.put(&[split_tokens as u32], 1, 0)?,
            logits_rows: writer.put(step.logits_rows, num_logits_rows, -1)?,
            block_tables: writer.put(&batch.block_tables, batch.block_tables.len(), 0)?,
        };
        let len = writer.len;
        // SAFETY: `Writer` keeps inside the buffers, which are of one length.
        unsafe { driver.upload(self.device.address(), &host.get()[..len])? };
        uploaded.record(driver)?;
        Ok(staged)
    }
}

struct Writer<'a> {
    values: &'a mut [i32],
    len: usize,
    base: Address,
}

impl Writer<'_> {
    /// Appends `values`, padded to `len`, and returns their address.
    fn put(&mut self, values: &[u32], len: usize, padding: i32) -> Result<Address> {
        let Some(target) = self.values.get_mut(self.len..self.len + len) else {
            bail!("a step's integers are more than {}", self.values.len());
        };
        check::has_len("a padded list", values.len().min(len), values.len())?;
        for (target, &value) in target.iter_mut().zip(values) {
            *target = value as i32;
        }
        target[values.len()..].fill(padding);
        let address = self.base + (4 * self.len) as Address;
        self.len += len;
        Ok(address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of 132 multiprocessors: [sequences times kv heads, longest context] → tokens of a split.
    fn split([num_pairs, longest]: [usize; 2]) -> usize {
        tokens_of_a_split(num_pairs, longest, max_splits(num_pairs, 132), 132)
    }

    #[test]
    fn contexts_are_split_as_measured() {
        // The fastest of what docs/gpu_log.md has, Qwen2.5-7B's 4 kv heads.
        assert_eq!(split([4, 512]), 64);
        assert_eq!(split([4, 2048]), 64);
        assert_eq!(split([4, 16384]), 512);
        assert_eq!(split([8 * 4, 384]), 128);
        assert_eq!(split([32 * 4, 384]), 384);
        assert_eq!(split([32 * 4, 2048]), 2048);
        assert_eq!(split([256 * 4, 640]), 640);
    }

    #[test]
    fn splits_share_out_what_leaves_multiprocessors_idle() {
        // 80 blocks would use 80 of 132; 240 use all nearly twice.
        assert_eq!(split([80, 4096]), 1408);
        assert_eq!(split([80, 64]), 64);
        assert_eq!(max_splits(80, 132), 3);
        assert_eq!(
            [1, 4, 132, 265].map(|pairs| max_splits(pairs, 132)),
            [64, 64, 2, 1]
        );
    }
}
