//! Causal attention over packed sequences and its backward pass, without a cache.
//!
//! Tiles of queries meet all keys that they may see, so scores exist for one tile of one head at
//! a time. The backward pass computes the probabilities again from the saved log-sum-exp, as
//! FlashAttention-2 does (Dao, arXiv:2307.08691, algorithm 2). A task of the backward pass owns
//! one kv head of one sequence with all query heads that share it, so that sums over the group
//! need no second pass and always run in one order.

use super::buffer::Output;
use super::gemm::{Elements, Mode, Operand, Product, Target, gemm};
use super::matmul::Cpu;
use super::simd::{Simd, Task, exp};
use std::ops::Range;

/// Queries of a tile: half of the scores of a short sequence are then never computed.
const TILE_QUERIES: usize = 64;

/// Packed sequences with queries, keys and values side by side.
#[derive(Clone, Copy)]
pub(in crate::kernels) struct Varlen<'a> {
    /// `[tokens, (num_heads + 2 num_kv_heads) head_dim]`.
    pub(in crate::kernels) qkv: &'a [f32],
    pub(in crate::kernels) num_heads: usize,
    pub(in crate::kernels) num_kv_heads: usize,
    pub(in crate::kernels) head_dim: usize,
    pub(in crate::kernels) scale: f32,
    /// Where each sequence begins, and the number of tokens.
    pub(in crate::kernels) cu_seqlens: &'a [u32],
}

/// What the backward pass reads besides the inputs.
pub(in crate::kernels) struct VarlenSaved<'a> {
    /// Outputs `[tokens, num_heads * head_dim]`.
    pub(in crate::kernels) out: &'a [f32],
    /// Log-sum-exp of each query's scaled scores, `[tokens, num_heads]`.
    pub(in crate::kernels) lse: &'a [f32],
}

impl Varlen<'_> {
    fn width(&self) -> usize {
        (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
    }

    fn num_tokens(&self) -> usize {
        self.qkv.len() / self.width()
    }

    fn sequence(&self, index: usize) -> Range<usize> {
        self.cu_seqlens[index] as usize..self.cu_seqlens[index + 1] as usize
    }

    /// Column of the keys of the kv head; its values follow all keys.
    fn key_col(&self, kv_head: usize) -> usize {
        (self.num_heads + kv_head) * self.head_dim
    }

    fn value_col(&self, kv_head: usize) -> usize {
        self.key_col(self.num_kv_heads + kv_head)
    }

    /// Returns the rows of one head, `[rows, head_dim]`, that begins at column `col` of `data`.
    fn head<'d>(
        &self,
        data: &'d [f32],
        width: usize,
        rows: &Range<usize>,
        col: usize,
    ) -> Operand<'d> {
        let data = &data[rows.start * width + col..];
        Operand::new(Elements::F32(data), [rows.len(), self.head_dim], width)
    }

    fn qkv_head(&self, rows: &Range<usize>, col: usize) -> Operand<'_> {
        self.head(self.qkv, self.width(), rows, col)
    }
}

fn tiles(sequence: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    sequence
        .clone()
        .step_by(TILE_QUERIES)
        .map(move |start| start..sequence.end.min(start + TILE_QUERIES))
}

/// What becomes of a row of scores.
enum RowStep<'a> {
    /// Probabilities, and their log-sum-exp.
    Softmax { lse: *mut f32 },
    /// Probabilities again, from the log-sum-exp.
    Probabilities { lse: f32 },
    /// `p (d - delta)` in place of d.
    Gradient {
        probabilities: &'a [f32],
        delta: f32,
    },
}

/// One row of scores, of which the first `num_seen` count.
struct ScoreRow<'a> {
    row: &'a mut [f32],
    num_seen: usize,
    step: RowStep<'a>,
}

impl Task for ScoreRow<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (row, num_seen) = (self.row.as_mut_ptr(), self.num_seen);
        let lanes = |at: usize| (num_seen - at).min(16);
        // SAFETY: `row` has at least `num_seen` elements, `probabilities` as many, and `lse` is
        // this row's.
        unsafe {
            match self.step {
                RowStep::Softmax { lse } => {
                    let low = simd.splat(f32::NEG_INFINITY);
                    let mut max = low;
                    for at in (0..num_seen).step_by(16) {
                        let scores = simd.load_part(row.add(at), lanes(at));
                        // A score that is no number must reach the sum: max takes its second.
                        max = simd.max(max, simd.keep_first(scores, lanes(at), low));
                    }
                    let max = simd.reduce_max(max);
                    let sum = exp_row(simd, row, num_seen, max);
                    lse.write(max + sum.ln());
                    let scale = simd.splat(1.0 / sum);
                    for at in (0..num_seen).step_by(16) {
                        let p = simd.mul(simd.load_part(row.add(at), lanes(at)), scale);
                        simd.store_part(row.add(at), lanes(at), p);
                    }
                }
                RowStep::Probabilities { lse } => {
                    exp_row(simd, row, num_seen, lse);
                }
                RowStep::Gradient {
                    probabilities,
                    delta,
                } => {
                    let delta = simd.splat(delta);
                    for at in (0..num_seen).step_by(16) {
                        let p = simd.load_part(probabilities.as_ptr().add(at), lanes(at));
                        let d = simd.load_part(row.add(at), lanes(at));
                        let d = simd.mul(p, simd.sub(d, delta));
                        simd.store_part(row.add(at), lanes(at), d);
                    }
                }
            }
        }
        self.row[num_seen..].fill(0.0);
    }
}

/// Replaces each score by exp(score - shift) and returns their sum.
///
/// # Safety
///
/// `row` must be valid for `len` elements.
#[inline(always)]
unsafe fn exp_row<S: Simd>(simd: S, row: *mut f32, len: usize, shift: f32) -> f32 {
    let (shift, zero) = (simd.splat(shift), simd.splat(0.0));
    let mut sum = zero;
    for at in (0..len).step_by(16) {
        let lanes = (len - at).min(16);
        // SAFETY: the caller's promise.
        unsafe {
            let p = exp(simd, simd.sub(simd.load_part(row.add(at), lanes), shift));
            sum = simd.add(sum, simd.keep_first(p, lanes, zero));
            simd.store_part(row.add(at), lanes, p);
        }
    }
    simd.reduce_add(sum)
}

/// A tile of queries of one head with its scores.
struct ScoreTile<'a> {
    cpu: Cpu<'a>,
    /// `[queries, keys]`.
    scores: Vec<f32>,
    queries: Range<usize>,
    keys: Range<usize>,
}

impl<'a> ScoreTile<'a> {
    /// Computes `scale q kᵀ` of a tile of queries with the keys up to its last.
    fn new(
        cpu: Cpu<'a>,
        q: Operand<'_>,
        k: Operand<'_>,
        scale: f32,
        place: (Range<usize>, Range<usize>),
    ) -> Self {
        let product = Product {
            a: q,
            b: k.transposed(),
            low_rank: None,
            scale,
            bias: None,
            mode: Mode::Overwrite,
        };
        Self {
            cpu,
            scores: super::gemm::product(cpu, &product),
            queries: place.0,
            keys: place.1,
        }
    }

    /// Gives each row its step: `step(query)`.
    fn for_rows<'s>(&mut self, step: impl Fn(usize) -> RowStep<'s>) {
        let num_keys = self.keys.len();
        let rows = self.scores.chunks_exact_mut(num_keys);
        for (query, row) in self.queries.clone().zip(rows) {
            let row = ScoreRow {
                row,
                num_seen: query + 1 - self.keys.start,
                step: step(query),
            };
            // SAFETY: the level is supported.
            unsafe { self.cpu.level.run(row) };
        }
    }

    fn operand(&self) -> Operand<'_> {
        Operand::dense(&self.scores, [self.queries.len(), self.keys.len()])
    }
}

/// Returns the outputs `[tokens, num_heads * head_dim]` and log-sum-exps `[tokens, num_heads]`.
pub(in crate::kernels) fn varlen_attention(
    cpu: Cpu<'_>,
    args: &Varlen<'_>,
) -> (Vec<f32>, Vec<f32>) {
    let (num_tokens, head_dim, num_heads) = (args.num_tokens(), args.head_dim, args.num_heads);
    let out_width = num_heads * head_dim;
    let out = Output::new(num_tokens * out_width);
    let lse = Output::new(num_tokens * num_heads);
    let tasks: Vec<(usize, Range<usize>)> = (0..args.cu_seqlens.len() - 1)
        .flat_map(|index| tiles(args.sequence(index)).map(move |tile| (index, tile)))
        .collect();
    cpu.pool.run(tasks.len() * num_heads, |task| {
        let (index, queries) = &tasks[task / num_heads];
        let head = task % num_heads;
        let kv_head = head / (num_heads / args.num_kv_heads);
        let keys = args.sequence(*index).start..queries.end;
        let q = args.qkv_head(queries, head * head_dim);
        let k = args.qkv_head(&keys, args.key_col(kv_head));
        let place = (queries.clone(), keys.clone());
        let mut tile = ScoreTile::new(cpu, q, k, args.scale, place);
        tile.for_rows(|query| RowStep::Softmax {
            lse: lse.at(query * num_heads + head),
        });
        let values = Product {
            a: tile.operand(),
            b: args.qkv_head(&keys, args.value_col(kv_head)),
            low_rank: None,
            scale: 1.0,
            bias: None,
            mode: Mode::Overwrite,
        };
        let target = Target {
            base: out.at(queries.start * out_width + head * head_dim),
            stride: out_width,
        };
        // SAFETY: each task writes its own queries and head.
        unsafe { gemm(cpu, &values, target) };
    });
    // SAFETY: the tasks cover all tokens and heads of both.
    unsafe { (out.finish(), lse.finish()) }
}

/// Returns the gradient of `qkv` from that of the outputs, `[tokens, num_heads * head_dim]`.
///
/// With P = softmax(s Q Kᵀ), O = P V and δ_i = dO_i · O_i: dV = Pᵀ dO, dP = dO Vᵀ,
/// dS = P ⊙ (dP - δ), dQ = s dS K, dK = s dSᵀ Q.
pub(in crate::kernels) fn varlen_attention_backward(
    cpu: Cpu<'_>,
    args: &Varlen<'_>,
    saved: &VarlenSaved<'_>,
    d_out: &[f32],
) -> Vec<f32> {
    let mut d_qkv = vec![0f32; args.qkv.len()];
    let target = Target {
        base: d_qkv.as_mut_ptr(),
        stride: args.width(),
    };
    let num_sequences = args.cu_seqlens.len() - 1;
    cpu.pool.run(num_sequences * args.num_kv_heads, |task| {
        let group = Group {
            cpu,
            args,
            saved,
            d_out,
            sequence: args.sequence(task / args.num_kv_heads),
            kv_head: task % args.num_kv_heads,
            target,
        };
        group.run();
    });
    d_qkv
}

/// One kv head of one sequence, with the query heads that share it.
struct Group<'a> {
    cpu: Cpu<'a>,
    args: &'a Varlen<'a>,
    saved: &'a VarlenSaved<'a>,
    d_out: &'a [f32],
    sequence: Range<usize>,
    kv_head: usize,
    /// The gradient of qkv, zeroed.
    target: Target,
}

impl Group<'_> {
    fn run(&self) {
        let group_size = self.args.num_heads / self.args.num_kv_heads;
        for head in self.kv_head * group_size..(self.kv_head + 1) * group_size {
            for queries in tiles(self.sequence.clone()) {
                self.tile(head, &queries);
            }
        }
    }

    fn tile(&self, head: usize, queries: &Range<usize>) {
        let Self { args, saved, .. } = *self;
        let (head_dim, num_heads) = (args.head_dim, args.num_heads);
        let (out_width, out_col) = (num_heads * head_dim, head * head_dim);
        let keys = self.sequence.start..queries.end;
        let (k_col, v_col) = (args.key_col(self.kv_head), args.value_col(self.kv_head));
        let q = args.qkv_head(queries, out_col);
        let k = args.qkv_head(&keys, k_col);
        let place = || (queries.clone(), keys.clone());

        let mut p = ScoreTile::new(self.cpu, q, k, args.scale, place());
        p.for_rows(|query| RowStep::Probabilities {
            lse: saved.lse[query * num_heads + head],
        });
        let d_out = args.head(self.d_out, out_width, queries, out_col);
        self.add(p.operand().transposed(), d_out, 1.0, (keys.start, v_col));

        let v = args.qkv_head(&keys, v_col);
        let mut d_scores = ScoreTile::new(self.cpu, d_out, v, 1.0, place());
        d_scores.for_rows(|query| {
            let row = query * out_width + out_col..query * out_width + out_col + head_dim;
            let terms = self.d_out[row.clone()].iter().zip(&saved.out[row]);
            let start = (query - queries.start) * keys.len();
            RowStep::Gradient {
                probabilities: &p.scores[start..start + keys.len()],
                delta: terms.map(|(d, o)| d * o).sum(),
            }
        });
        self.add(d_scores.operand(), k, args.scale, (queries.start, out_col));
        self.add(
            d_scores.operand().transposed(),
            q,
            args.scale,
            (keys.start, k_col),
        );
    }

    /// Adds `scale a b` to the gradient at a row and a column.
    fn add(&self, a: Operand<'_>, b: Operand<'_>, scale: f32, (row, col): (usize, usize)) {
        let product = Product {
            a,
            b,
            low_rank: None,
            scale,
            bias: None,
            mode: Mode::Add,
        };
        let Target { base, stride } = self.target;
        let base = base.wrapping_add(row * stride + col);
        // SAFETY: the group owns its query heads and its kv head in the rows of its sequence.
        unsafe { gemm(self.cpu, &product, Target { base, stride }) };
    }
}
