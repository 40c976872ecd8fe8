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

use super::buffer::Output;
use super::dense::{Element, F16, F32};
use super::kv::{CpuKv, KvData};
use super::matmul::Cpu;
use super::simd::{Simd, Task, exp};
use std::ops::Range;

/// Keys of a chunk: four vectors of scores a query.
const CHUNK: usize = 64;
/// Keys of a split.
const SPLIT: usize = 256;
/// Queries (tokens times heads of the group) that a tile aims at.
const TILE_ROWS: usize = 32;
/// The most rows of a register tile.
const MAX_ROWS: usize = 8;

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
struct Item {
    sequence: usize,
    kv_head: usize,
    tokens: Range<usize>,
    splits: Range<usize>,
}

/// The state of one query over some keys, in floats: `[m, ...][l: 16 lanes][acc]`, with m the
/// maximum of the scores, l the sums of exp(score - m) by lane and acc the sum of
/// exp(score - m) times the values, padded to whole vectors.
const SUM_AT: usize = 16;
const ACC_AT: usize = 32;

fn state_len(head_dim: usize) -> usize {
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

#[derive(Clone, Copy)]
struct Shape {
    group: usize,
    head_dim: usize,
    block_size: usize,
    num_kv_heads: usize,
}

impl Shape {
    fn states_len(self, num_tokens: usize) -> usize {
        num_tokens * self.group * state_len(self.head_dim)
    }

    /// States of queries that have seen no key.
    fn new_states(self, num_tokens: usize) -> Vec<f32> {
        let mut states = vec![0.0; self.states_len(num_tokens)];
        self.reset(&mut states);
        states
    }

    #[inline(always)]
    fn reset(self, states: &mut [f32]) {
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
    // SAFETY: the level is supported, and the table names blocks of `kv` for all positions.
    unsafe {
        match &kv.data {
            KvData::F32 { keys, values } => cpu.level.run(Scan {
                inputs,
                shape,
                item,
                table,
                states,
                keys: keys.as_ptr().cast(),
                values: values.as_ptr().cast(),
                element: F32,
            }),
            KvData::F16 { keys, values } => cpu.level.run(Scan {
                inputs,
                shape,
                item,
                table,
                states,
                keys: keys.as_ptr().cast(),
                values: values.as_ptr().cast(),
                element: F16,
            }),
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
fn fold<S: Simd>(simd: S, part: &[f32], total: &mut [f32]) {
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

/// Runs an item's queries over its splits into `states`.
struct Scan<'a, E> {
    inputs: &'a AttentionInputs<'a>,
    shape: Shape,
    item: &'a Item,
    /// Blocks of the sequence (and of later sequences, unused).
    table: &'a [u32],
    /// Fresh states of the item's queries, token by token, head by head.
    states: &'a mut [f32],
    keys: *const u8,
    values: *const u8,
    element: E,
}

impl<E: Element> Task for Scan<'_, E> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self {
            inputs,
            shape,
            item,
            states,
            ..
        } = &self;
        let Shape {
            group, head_dim, ..
        } = *shape;
        let num_rows = item.tokens.len() * group;
        // Scaled queries, row by row, and how many keys each sees.
        let mut q = Vec::with_capacity(num_rows * head_dim);
        let mut num_keys = Vec::with_capacity(num_rows);
        for token in item.tokens.clone() {
            let start = (token * inputs.num_heads + item.kv_head * group) * head_dim;
            let heads = &inputs.q[start..start + group * head_dim];
            q.extend(heads.iter().map(|q| q * inputs.scale));
            num_keys.resize(num_keys.len() + group, inputs.positions[token] as usize + 1);
        }
        let state_len = state_len(head_dim);
        let mut part = vec![0.0; states.len()];
        let is_one = item.splits.len() == 1;
        let Self {
            shape,
            item,
            table,
            states,
            keys,
            values,
            element,
            ..
        } = self;
        let cache = Cache {
            shape,
            kv_head: item.kv_head,
            table,
            keys,
            values,
            element,
        };
        for split in item.splits.clone() {
            let target = if is_one { &mut *states } else { &mut part };
            shape.reset(target);
            for start in (split * SPLIT..(split + 1) * SPLIT).step_by(CHUNK) {
                let mut row = 0;
                while row < num_rows {
                    let size = register_rows(num_rows - row);
                    let rows = Rows {
                        q: &q[row * head_dim..(row + size) * head_dim],
                        num_keys: &num_keys[row..row + size],
                        states: &mut target[row * state_len..(row + size) * state_len],
                    };
                    match size {
                        8 => chunk::<S, E, 8, 2, 2>(simd, &cache, start, rows),
                        4 => chunk::<S, E, 4, 4, 4>(simd, &cache, start, rows),
                        3 => chunk::<S, E, 3, 4, 4>(simd, &cache, start, rows),
                        2 => chunk::<S, E, 2, 4, 4>(simd, &cache, start, rows),
                        _ => chunk::<S, E, 1, 4, 4>(simd, &cache, start, rows),
                    }
                    row += size;
                }
            }
            if !is_one {
                let totals = states.chunks_exact_mut(state_len);
                for (part, total) in part.chunks_exact(state_len).zip(totals) {
                    fold(simd, part, total);
                }
            }
        }
    }
}

fn register_rows(left: usize) -> usize {
    match left {
        MAX_ROWS.. => MAX_ROWS,
        4.. => 4,
        left => left,
    }
}

/// The keys and values of one sequence for one kv head.
struct Cache<'a, E> {
    shape: Shape,
    kv_head: usize,
    table: &'a [u32],
    keys: *const u8,
    values: *const u8,
    element: E,
}

impl<E: Element> Cache<'_, E> {
    /// Returns where dimension 0 of 16 keys and where the values of 16 tokens begin, from
    /// position `start` on, a multiple of 16.
    #[inline(always)]
    fn at(&self, start: usize) -> (*const u8, *const u8) {
        let Shape {
            head_dim,
            block_size,
            num_kv_heads,
            ..
        } = self.shape;
        let block = self.table[start / block_size] as usize;
        let base = (block * num_kv_heads + self.kv_head) * head_dim * block_size;
        let offset = start % block_size;
        (
            self.keys.wrapping_add((base + offset) * E::SIZE),
            self.values
                .wrapping_add((base + offset * head_dim) * E::SIZE),
        )
    }
}

/// Some queries of an item, as many as a register tile holds.
struct Rows<'a> {
    q: &'a [f32],
    num_keys: &'a [usize],
    states: &'a mut [f32],
}

/// Adds the keys of one chunk to the states of `ROWS` queries. `KEYS` vectors of keys and `DIMS`
/// vectors of values are held in registers at a time; neither changes a result.
#[inline(always)]
fn chunk<S: Simd, E: Element, const ROWS: usize, const KEYS: usize, const DIMS: usize>(
    simd: S,
    cache: &Cache<'_, E>,
    start: usize,
    rows: Rows<'_>,
) {
    let Rows {
        q,
        num_keys,
        states,
    } = rows;
    let most_keys = num_keys.iter().copied().max().unwrap_or(0);
    if most_keys <= start {
        return;
    }
    let num_keys_here = (most_keys - start).min(CHUNK);
    let num_vectors = num_keys_here.div_ceil(16);
    let mut scores = [[0.0f32; CHUNK]; ROWS];
    let mut vector = 0;
    // SAFETY: `q` has `ROWS` rows; the blocks of all positions below `most_keys` are in the
    // table and exist in the cache, whole.
    unsafe {
        while vector + KEYS <= num_vectors {
            dot_keys::<S, E, ROWS, KEYS>(simd, cache, start, vector, q, &mut scores);
            vector += KEYS;
        }
        while vector < num_vectors {
            dot_keys::<S, E, ROWS, 1>(simd, cache, start, vector, q, &mut scores);
            vector += 1;
        }
    }
    let state_len = state_len(cache.shape.head_dim);
    let mut decay = [1.0f32; ROWS];
    for row in 0..ROWS {
        let state = &mut states[row * state_len..(row + 1) * state_len];
        let num_keys = num_keys[row].saturating_sub(start);
        decay[row] = softmax(simd, &mut scores[row], num_vectors, num_keys, state);
    }
    let head_dim = cache.shape.head_dim;
    let weights = Weights {
        start,
        num_keys: num_keys_here,
        scores: &scores,
        decay: &decay,
    };
    let mut dim = 0;
    // SAFETY: the values of all positions below `most_keys` exist, `head_dim` each.
    unsafe {
        while dim + 16 * DIMS <= head_dim {
            add_values::<S, E, ROWS, DIMS>(simd, cache, &weights, dim, 16, states);
            dim += 16 * DIMS;
        }
        while dim < head_dim {
            let len = (head_dim - dim).min(16);
            add_values::<S, E, ROWS, 1>(simd, cache, &weights, dim, len, states);
            dim += 16;
        }
    }
}

/// Makes the scores of `KEYS` vectors of keys.
///
/// # Safety
///
/// `q` must have `ROWS` rows, and the keys exist.
#[inline(always)]
unsafe fn dot_keys<S: Simd, E: Element, const ROWS: usize, const KEYS: usize>(
    simd: S,
    cache: &Cache<'_, E>,
    start: usize,
    vector: usize,
    q: &[f32],
    scores: &mut [[f32; CHUNK]; ROWS],
) {
    let Shape {
        head_dim,
        block_size,
        ..
    } = cache.shape;
    let mut keys = [std::ptr::null(); KEYS];
    for (i, keys) in keys.iter_mut().enumerate() {
        *keys = cache.at(start + (vector + i) * 16).0;
    }
    let mut acc = [[simd.splat(0.0); KEYS]; ROWS];
    // SAFETY: dimension `dim` of 16 keys lies within a block; `q` has `head_dim` a row; a row
    // of scores has `CHUNK` elements.
    unsafe {
        for dim in 0..head_dim {
            let mut k = [simd.splat(0.0); KEYS];
            for i in 0..KEYS {
                k[i] = cache
                    .element
                    .load(simd, keys[i].add(dim * block_size * E::SIZE));
            }
            for row in 0..ROWS {
                let q = simd.splat(*q.as_ptr().add(row * head_dim + dim));
                for i in 0..KEYS {
                    acc[row][i] = simd.fma(q, k[i], acc[row][i]);
                }
            }
        }
        for row in 0..ROWS {
            for i in 0..KEYS {
                simd.store(scores[row].as_mut_ptr().add((vector + i) * 16), acc[row][i]);
            }
        }
    }
}

/// Turns scores into exp(score - m), zero from `num_keys` on, updates m and l of the state, and
/// returns by what the accumulated values shrink.
#[inline(always)]
fn softmax<S: Simd>(
    simd: S,
    scores: &mut [f32; CHUNK],
    num_vectors: usize,
    num_keys: usize,
    state: &mut [f32],
) -> f32 {
    if num_keys == 0 {
        scores.fill(0.0);
        return 1.0;
    }
    let scores = scores.as_mut_ptr();
    let nothing = simd.splat(f32::NEG_INFINITY);
    // SAFETY: a row has `CHUNK` scores and a state its 16 sums.
    unsafe {
        let mut max = nothing;
        for vector in 0..num_vectors {
            let score = simd.load(scores.add(vector * 16));
            let left = num_keys.saturating_sub(vector * 16);
            let score = simd.keep_first(score, left, nothing);
            simd.store(scores.add(vector * 16), score);
            max = simd.max(max, score);
        }
        let old_max = state[0];
        let max = simd.reduce_max(max);
        let max = if max > old_max { max } else { old_max };
        state[0] = max;
        let decay = exp(simd, simd.splat(old_max - max));
        let max = simd.splat(max);
        let sum_at = state.as_mut_ptr().add(SUM_AT);
        let mut sum = simd.mul(simd.load(sum_at), decay);
        for vector in 0..num_vectors {
            let at = scores.add(vector * 16);
            let weight = exp(simd, simd.sub(simd.load(at), max));
            simd.store(at, weight);
            sum = simd.add(sum, weight);
        }
        simd.store(sum_at, sum);
        simd.first(decay)
    }
}

/// What the values of a chunk are summed with.
struct Weights<'a, const ROWS: usize> {
    start: usize,
    num_keys: usize,
    scores: &'a [[f32; CHUNK]; ROWS],
    decay: &'a [f32; ROWS],
}

/// Adds `DIMS` vectors of dimensions, from `dim` on, of a chunk's values to the states; the last
/// vector has `len` dimensions.
///
/// # Safety
///
/// The values and the states must exist.
#[inline(always)]
unsafe fn add_values<S: Simd, E: Element, const ROWS: usize, const DIMS: usize>(
    simd: S,
    cache: &Cache<'_, E>,
    weights: &Weights<'_, ROWS>,
    dim: usize,
    len: usize,
    states: &mut [f32],
) {
    let head_dim = cache.shape.head_dim;
    let state_len = state_len(head_dim);
    let mut acc = [[simd.splat(0.0); DIMS]; ROWS];
    // SAFETY: states are padded to whole vectors; tokens below `num_keys` have `head_dim` values.
    unsafe {
        let accs = states.as_mut_ptr().add(ACC_AT + dim);
        for row in 0..ROWS {
            let decay = simd.splat(weights.decay[row]);
            for i in 0..DIMS {
                acc[row][i] = simd.mul(simd.load(accs.add(row * state_len + i * 16)), decay);
            }
        }
        for first in (0..weights.num_keys).step_by(16) {
            let values = cache.at(weights.start + first).1;
            for token in 0..(weights.num_keys - first).min(16) {
                let mut v = [simd.splat(0.0); DIMS];
                for i in 0..DIMS {
                    let at = values.add((token * head_dim + dim + i * 16) * E::SIZE);
                    v[i] = if DIMS == 1 {
                        cache.element.load_part(simd, at, len)
                    } else {
                        cache.element.load(simd, at)
                    };
                }
                for row in 0..ROWS {
                    let weight = *weights.scores[row].as_ptr().add(first + token);
                    let weight = simd.splat(weight);
                    for i in 0..DIMS {
                        acc[row][i] = simd.fma(weight, v[i], acc[row][i]);
                    }
                }
            }
        }
        for row in 0..ROWS {
            for i in 0..DIMS {
                simd.store(accs.add(row * state_len + i * 16), acc[row][i]);
            }
        }
    }
}
