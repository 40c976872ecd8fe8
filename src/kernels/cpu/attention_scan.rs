//! The inner loops of attention: queries of one item over the keys and values of its splits.
//!
//! A register tile is up to 8 queries. For each chunk of 64 keys it makes the scores (lanes are
//! keys), turns them into weights against the running maximum, and adds the weighted values
//! (lanes are dimensions). `attention` cuts a batch into items and folds the states.

use super::attention::{ACC_AT, AttentionInputs, Item, SPLIT, SUM_AT, Shape, fold, state_len};
use super::dense::Element;
use super::simd::{Simd, Task, exp};

/// Keys of a chunk: four vectors of scores a query.
const CHUNK: usize = 64;
/// The most rows of a register tile.
const MAX_ROWS: usize = 8;

/// An item's queries, to be run over its splits into `states`.
pub(super) struct Scan<'a> {
    pub(super) inputs: &'a AttentionInputs<'a>,
    pub(super) shape: Shape,
    pub(super) item: &'a Item,
    /// Blocks of the sequence (and of later sequences, unused).
    pub(super) table: &'a [u32],
    /// Fresh states of the item's queries, token by token, head by head.
    pub(super) states: &'a mut [f32],
    pub(super) keys: *const u8,
    pub(super) values: *const u8,
}

/// A scan of a cache of such elements.
pub(super) struct ScanOf<'a, E>(pub(super) Scan<'a>, pub(super) E);

impl<E: Element> Task for ScanOf<'_, E> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self(scan, element) = self;
        let Scan {
            inputs,
            shape,
            item,
            states,
            ..
        } = &scan;
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
        let Scan {
            shape,
            item,
            table,
            states,
            keys,
            values,
            ..
        } = scan;
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
#[expect(
    clippy::needless_range_loop,
    reason = "plain counted loops over constant sizes stay in registers"
)]
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
#[expect(
    clippy::needless_range_loop,
    reason = "plain counted loops over constant sizes stay in registers"
)]
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
