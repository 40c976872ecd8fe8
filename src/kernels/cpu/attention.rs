//! Causal attention over the paged cache, for prefill chunks and decodes alike.
//!
//! Online softmax (Milakov and Gimelshein, arXiv:1805.02867) over the keys in fixed pieces:
//! chunks of 64 positions, folded within splits of 256 positions, splits folded in order. The
//! pieces depend on positions only, so a query has the same bits whatever the batch, the chunk
//! of prefill it arrives in and the threads: a key that a query does not see adds exactly 0.
//!
//! A work item is a tile of queries of one sequence that share a kv head. When a batch has few
//! items (one decode), the splits of an item become items themselves, and their states are
//! folded afterwards by the same arithmetic.

use super::attention_scan::{Scan, ScanOf};
use super::buffer::Output;
use super::dense::{E4m3, F16, F32};
use super::kv::{CpuKv, KvData};
use super::matmul::Cpu;
use super::simd::{Simd, Task, exp};
use std::ops::Range;

/// Keys of a split.
pub(super) const SPLIT: usize = 256;
/// Queries (tokens times heads of the group) that a tile aims at.
const TILE_ROWS: usize = 32;

/// A batch as `kernels::AttentionBatch`, checked.
pub(in crate::kernels) struct AttentionInputs<'a> {
    pub(in crate::kernels) q: &'a [f32],
    pub(in crate::kernels) num_heads: usize,
    pub(in crate::kernels) scale: f32,
    pub(in crate::kernels) cu_seqlens_q: &'a [u32],
    pub(in crate::kernels) block_tables: &'a [u32],
    pub(in crate::kernels) cu_blocks: &'a [u32],
    pub(in crate::kernels) positions: &'a [u32],
}

/// Queries of one sequence for one kv head, over some splits.
pub(super) struct Item {
    pub(super) sequence: usize,
    pub(super) kv_head: usize,
    pub(super) tokens: Range<usize>,
    pub(super) splits: Range<usize>,
}

/// The state of one query over some keys, in floats: `[m, ...][l: 16 lanes][acc]`, with m the
/// maximum of the scores, l the sums of exp(score - m) by lane and acc the sum of
/// exp(score - m) times the values, padded to whole vectors.
pub(super) const SUM_AT: usize = 16;
/// Where acc begins; see [`SUM_AT`].
pub(super) const ACC_AT: usize = 32;

/// Returns the floats of a state.
pub(super) fn state_len(head_dim: usize) -> usize {
    ACC_AT + head_dim.next_multiple_of(16)
}

/// Returns the attention output for each query, `[tokens, num_heads * head_dim]`.
pub(in crate::kernels) fn paged_attention(
    cpu: Cpu<'_>,
    inputs: &AttentionInputs<'_>,
    kv: &CpuKv,
) -> Vec<f32> {
    let (head_dim, num_kv_heads) = (kv.head_dim, kv.num_kv_heads);
    let group = inputs.num_heads / num_kv_heads;
    let mut items = Vec::new();
    for (sequence, bounds) in inputs.cu_seqlens_q.windows(2).enumerate() {
        let (start, end) = (bounds[0] as usize, bounds[1] as usize);
        let tile_tokens = (TILE_ROWS / group).max(1);
        // The last tiles see the most keys: they go first, to end together.
        for tile in (0..(end - start).div_ceil(tile_tokens)).rev() {
            let first = start + tile * tile_tokens;
            let tokens = first..(first + tile_tokens).min(end);
            let last = inputs.positions[tokens.clone()].iter().max().copied();
            let splits = 0..last.map_or(0, |last| last as usize / SPLIT + 1);
            items.extend((0..num_kv_heads).map(|kv_head| Item {
                sequence,
                kv_head,
                tokens: tokens.clone(),
                splits: splits.clone(),
            }));
        }
    }
    let out = Output::new(inputs.q.len());
    let is_split = items.len() < 4 * cpu.pool.num_threads()
        && cpu.pool.num_threads() > 1
        && items.iter().any(|item| item.splits.len() > 1);
    let shape = Shape {
        group,
        head_dim,
        block_size: kv.block_size,
        num_kv_heads,
    };
    if is_split {
        run_split(cpu, inputs, kv, shape, &items, &out);
    } else {
        // A batch whose scores are few is done before another thread has begun.
        cpu.pool.run(items.len(), |index| {
            let item = &items[index];
            let mut states = shape.new_states(item.tokens.len());
            run_item(cpu, inputs, kv, shape, item, &mut states);
            write_output(cpu, inputs, shape, item, &states, &out);
        });
    }
    // SAFETY: the items cover all tokens for all kv heads, and so all heads.
    unsafe { out.finish() }
}

/// Runs each split of each item as a task, then folds.
fn run_split(
    cpu: Cpu<'_>,
    inputs: &AttentionInputs<'_>,
    kv: &CpuKv,
    shape: Shape,
    items: &[Item],
    out: &Output<f32>,
) {
    let mut parts = Vec::new();
    let mut len = 0;
    for item in items {
        for split in item.splits.clone() {
            let part = Item {
                sequence: item.sequence,
                kv_head: item.kv_head,
                tokens: item.tokens.clone(),
                splits: split..split + 1,
            };
            parts.push((len, part));
            len += shape.states_len(item.tokens.len());
        }
    }
    let states = Output::<f32>::new(len);
    cpu.pool.run(parts.len(), |index| {
        let (at, part) = &parts[index];
        let len = shape.states_len(part.tokens.len());
        // SAFETY: the parts have disjoint ranges of the states, which `reset` writes.
        let part_states = unsafe {
            states.at(*at).write_bytes(0, len);
            std::slice::from_raw_parts_mut(states.at(*at), len)
        };
        shape.reset(part_states);
        run_item(cpu, inputs, kv, shape, part, part_states);
    });
    // SAFETY: the tasks have written the states of all parts.
    let states = unsafe { states.finish() };
    let mut rest = states.as_slice();
    for item in items {
        let len = shape.states_len(item.tokens.len());
        let mut total = shape.new_states(item.tokens.len());
        for _ in item.splits.clone() {
            let (part, after) = rest.split_at(len);
            let fold = Fold {
                shape,
                part,
                total: &mut total,
            };
            // SAFETY: the level is supported.
            unsafe { cpu.level.run(fold) };
            rest = after;
        }
        write_output(cpu, inputs, shape, item, &total, out);
    }
}

/// The sizes of a cache and its heads.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    /// Query heads of a kv head.
    pub(super) group: usize,
    pub(super) head_dim: usize,
    pub(super) block_size: usize,
    pub(super) num_kv_heads: usize,
}

impl Shape {
    fn states_len(self, num_tokens: usize) -> usize {
        num_tokens * self.group * state_len(self.head_dim)
    }

    /// Returns states of queries that have seen no key.
    fn new_states(self, num_tokens: usize) -> Vec<f32> {
        let mut states = vec![0.0; self.states_len(num_tokens)];
        self.reset(&mut states);
        states
    }

    /// Makes states those of queries that have seen no key.
    #[inline(always)]
    pub(super) fn reset(self, states: &mut [f32]) {
        for state in states.chunks_exact_mut(state_len(self.head_dim)) {
            state.fill(0.0);
            state[0] = f32::NEG_INFINITY;
        }
    }
}

fn run_item(
    cpu: Cpu<'_>,
    inputs: &AttentionInputs<'_>,
    kv: &CpuKv,
    shape: Shape,
    item: &Item,
    states: &mut [f32],
) {
    let blocks = inputs.cu_blocks[item.sequence] as usize..;
    let table = &inputs.block_tables[blocks];
    let (keys, values) = kv.data.starts();
    let scan = Scan {
        inputs,
        shape,
        item,
        table,
        states,
        keys,
        values,
    };
    // SAFETY: the level is supported, and the table names blocks of `kv` for all positions.
    unsafe {
        match &kv.data {
            KvData::F32 { .. } => cpu.level.run(ScanOf(scan, F32)),
            KvData::F16 { .. } => cpu.level.run(ScanOf(scan, F16)),
            KvData::E4m3 { .. } => cpu.level.run(ScanOf(scan, E4m3)),
        }
    }
}

fn write_output(
    cpu: Cpu<'_>,
    inputs: &AttentionInputs<'_>,
    shape: Shape,
    item: &Item,
    states: &[f32],
    out: &Output<f32>,
) {
    let Shape {
        group, head_dim, ..
    } = shape;
    let per_token = states.chunks_exact(group * state_len(head_dim));
    for (token, states) in item.tokens.clone().zip(per_token) {
        let first_head = token * inputs.num_heads + item.kv_head * group;
        let finish = Finish {
            shape,
            states,
            out: out.at(first_head * head_dim),
        };
        // SAFETY: the level is supported.
        unsafe { cpu.level.run(finish) };
    }
}

/// Divides the accumulated values of one token's heads by the sums.
struct Finish<'a> {
    shape: Shape,
    states: &'a [f32],
    out: *mut f32,
}

impl Task for Finish<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let head_dim = self.shape.head_dim;
        for (head, state) in self.states.chunks_exact(state_len(head_dim)).enumerate() {
            let state = state.as_ptr();
            // SAFETY: a state has its sums and padded values; the output has `head_dim` elements
            // a head.
            unsafe {
                let sum = simd.reduce_add(simd.load(state.add(SUM_AT)));
                let inverse = simd.splat(1.0 / sum);
                let mut dim = 0;
                while dim < head_dim {
                    let len = (head_dim - dim).min(16);
                    let value = simd.mul(simd.load(state.add(ACC_AT + dim)), inverse);
                    simd.store_part(self.out.add(head * head_dim + dim), len, value);
                    dim += 16;
                }
            }
        }
    }
}

/// Adds the states of later keys to the states of earlier ones.
struct Fold<'a> {
    shape: Shape,
    part: &'a [f32],
    total: &'a mut [f32],
}

impl Task for Fold<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let len = state_len(self.shape.head_dim);
        let totals = self.total.chunks_exact_mut(len);
        for (part, total) in self.part.chunks_exact(len).zip(totals) {
            fold(simd, part, total);
        }
    }
}

/// With M = max(m1, m2): l = l1 exp(m1 - M) + l2 exp(m2 - M), and acc alike.
#[inline(always)]
pub(super) fn fold<S: Simd>(simd: S, part: &[f32], total: &mut [f32]) {
    if part[0] == f32::NEG_INFINITY {
        return;
    }
    let max = if part[0] > total[0] {
        part[0]
    } else {
        total[0]
    };
    let scale_total = exp(simd, simd.splat(total[0] - max));
    let scale_part = exp(simd, simd.splat(part[0] - max));
    total[0] = max;
    for at in (SUM_AT..total.len()).step_by(16) {
        // SAFETY: states are whole vectors of equal number.
        unsafe {
            let kept = simd.mul(simd.load(total.as_ptr().add(at)), scale_total);
            let sum = simd.fma(simd.load(part.as_ptr().add(at)), scale_part, kept);
            simd.store(total.as_mut_ptr().add(at), sum);
        }
    }
}
