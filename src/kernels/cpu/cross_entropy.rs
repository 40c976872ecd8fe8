//! The output head with its loss: logits exist for some rows at a time, forward and backward.
//!
//! For one row with logits z and target t: loss = ln Σ exp z - z_t, and its gradient by z is
//! softmax(z) - onehot(t).

use super::buffer::for_each_piece;
use super::gemm::{Mode, Operand, Product, Target, gemm, product};
use super::matmul::{Cpu, CpuMatrix};
use super::product_sum::{LowRankFactors, operand};
use super::simd::{Simd, Task, exp};

/// Floats of the logits that exist at once: 128 MiB.
const MAX_LOGITS: usize = 32 * 1024 * 1024;

/// Rows of hidden states with what each should predict.
pub(in crate::kernels) struct CrossEntropy<'a> {
    /// `[rows, hidden_size]`.
    pub(in crate::kernels) hidden: &'a [f32],
    /// `[vocab_size, hidden_size]`.
    pub(in crate::kernels) head: &'a CpuMatrix,
    /// `[rows, rank]` and `[rank, vocab_size]`, whose product is added to the logits.
    pub(in crate::kernels) low_rank: Option<LowRankFactors<'a>>,
    /// A row of the vocabulary for each row of `hidden`.
    pub(in crate::kernels) targets: &'a [u32],
}

/// One row of logits on its way to its loss and gradient.
struct LogitRow<'a> {
    logits: &'a mut [f32],
    target: usize,
    /// Factor of the gradient that takes the logits' place; none leaves them.
    scale: Option<f32>,
    loss: &'a mut f32,
}

impl Task for LogitRow<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let len = self.logits.len();
        let row = self.logits.as_mut_ptr();
        let lanes = |at: usize| (len - at).min(16);
        let (low, zero) = (simd.splat(f32::NEG_INFINITY), simd.splat(0.0));
        let (mut max, mut sum) = (low, zero);
        // SAFETY: all accesses are below `len`.
        unsafe {
            for at in (0..len).step_by(16) {
                let z = simd.load_part(row.add(at), lanes(at));
                max = simd.max(max, simd.keep_first(z, lanes(at), low));
            }
            let max = simd.reduce_max(max);
            let shift = simd.splat(max);
            let target = self.logits[self.target];
            for at in (0..len).step_by(16) {
                let z = simd.load_part(row.add(at), lanes(at));
                let e = exp(simd, simd.sub(z, shift));
                sum = simd.add(sum, simd.keep_first(e, lanes(at), zero));
                simd.store_part(row.add(at), lanes(at), e);
            }
            let sum = simd.reduce_add(sum);
            *self.loss = max + sum.ln() - target;
            let Some(scale) = self.scale else { return };
            let factor = simd.splat(scale / sum);
            for at in (0..len).step_by(16) {
                let e = simd.load_part(row.add(at), lanes(at));
                simd.store_part(row.add(at), lanes(at), simd.mul(e, factor));
            }
            self.logits[self.target] -= scale;
        }
    }
}

/// Where gradients go, and the factor of the sum of the losses.
pub(in crate::kernels) struct HeadSinks<'a> {
    pub(in crate::kernels) scale: f32,
    /// `[vocab_size, hidden_size]`, added to.
    pub(in crate::kernels) weight: Option<&'a mut [f32]>,
}

/// The loss of each row and, with sinks, the gradients of the scaled sum of all.
pub(in crate::kernels) struct HeadResult {
    pub(in crate::kernels) losses: Vec<f32>,
    /// By `hidden`, through the weight alone.
    pub(in crate::kernels) d_hidden: Vec<f32>,
    /// By the low-rank term's left factor, and by the transpose of its right one.
    pub(in crate::kernels) d_x: Vec<f32>,
    pub(in crate::kernels) d_w: Vec<f32>,
}

/// Computes losses and gradients.
///
/// With dz the gradient by the logits z = h Wᵀ + x w: dh = dz W, dW = dzᵀ h, dx = dz wᵀ and
/// dwᵀ = dzᵀ x.
pub(in crate::kernels) fn cross_entropy(
    cpu: Cpu<'_>,
    args: &CrossEntropy<'_>,
    mut sinks: Option<HeadSinks<'_>>,
) -> HeadResult {
    let (vocab_size, hidden_size) = (args.head.rows, args.head.cols);
    let chunk_rows = (MAX_LOGITS / vocab_size).max(1);
    let low_rank = args.low_rank.map(|(x, w)| (operand(x), operand(w)));
    let rank = args.low_rank.map_or(0, |(x, _)| x.dims()[1]);
    let mut result = HeadResult {
        losses: vec![0f32; args.targets.len()],
        d_hidden: Vec::new(),
        d_x: Vec::new(),
        d_w: vec![
            0f32;
            if sinks.is_some() {
                vocab_size * rank
            } else {
                0
            }
        ],
    };
    for first in (0..args.targets.len()).step_by(chunk_rows) {
        let rows = first..args.targets.len().min(first + chunk_rows);
        let (targets, num_rows) = (&args.targets[rows.clone()], rows.len());
        let hidden = Operand::dense(
            &args.hidden[rows.start * hidden_size..rows.end * hidden_size],
            [num_rows, hidden_size],
        );
        let term = low_rank.map(|(x, w)| (x.rows(rows.clone()), w));
        let forward = Product {
            low_rank: term,
            ..plain(hidden, args.head.operand().transposed())
        };
        let mut logits = product(cpu, &forward);
        let losses = &mut result.losses[rows];
        let scale = sinks.as_ref().map(|sinks| sinks.scale);
        run_rows(cpu, &mut logits, targets, losses, scale);
        let Some(sinks) = &mut sinks else { continue };
        let d_logits = Operand::dense(&logits, [num_rows, vocab_size]);
        append(
            &mut result.d_hidden,
            product(cpu, &plain(d_logits, args.head.operand())),
        );
        if let Some(weight) = &mut sinks.weight {
            add_to(
                cpu,
                weight,
                &plain(d_logits.transposed(), hidden),
                hidden_size,
            );
        }
        if let Some((x, w)) = term {
            append(
                &mut result.d_x,
                product(cpu, &plain(d_logits, w.transposed())),
            );
            add_to(cpu, &mut result.d_w, &plain(d_logits.transposed(), x), rank);
        }
    }
    result
}

fn plain<'a>(a: Operand<'a>, b: Operand<'a>) -> Product<'a> {
    Product {
        a,
        b,
        low_rank: None,
        scale: 1.0,
        bias: None,
        mode: Mode::Overwrite,
    }
}

/// Puts the rows of a chunk behind those before it.
fn append(all: &mut Vec<f32>, rows: Vec<f32>) {
    if all.is_empty() {
        *all = rows;
    } else {
        all.extend_from_slice(&rows);
    }
}

/// Adds a product of `width` columns to `sum`, which has room for it.
fn add_to(cpu: Cpu<'_>, sum: &mut [f32], product: &Product<'_>, width: usize) {
    let product = Product {
        mode: Mode::Add,
        ..*product
    };
    let [rows, cols] = product.output();
    assert!(
        cols == width && rows * cols == sum.len(),
        "{rows} x {cols} sums"
    );
    let target = Target {
        base: sum.as_mut_ptr(),
        stride: width,
    };
    // SAFETY: the slice holds numbers for all rows and columns, as checked above, and is borrowed
    // until the product is added.
    unsafe { gemm(cpu, &product, target) };
}

fn run_rows(
    cpu: Cpu<'_>,
    logits: &mut [f32],
    targets: &[u32],
    losses: &mut [f32],
    scale: Option<f32>,
) {
    let vocab_size = logits.len() / targets.len();
    // A task keeps its row's loss in the pair, so that no two tasks share a slice.
    let mut rows: Vec<_> = logits.chunks_exact_mut(vocab_size).zip(losses).collect();
    for_each_piece(cpu.pool, &mut rows, 1, |row, piece| {
        for (logits, loss) in piece {
            let row = LogitRow {
                logits,
                target: targets[row] as usize,
                scale,
                loss,
            };
            // SAFETY: the level is supported.
            unsafe { cpu.level.run(row) };
        }
    });
}
