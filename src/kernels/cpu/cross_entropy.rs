//! The output head with its loss: logits exist for some rows at a time, forward and backward.
//!
//! For one row with logits z and target t: loss = ln Σ exp z - z_t, and its gradient by z is
//! softmax(z) - onehot(t).

use super::buffer::for_each_piece;
use super::gemm::{Mode, Operand, Product, product};
use super::matmul::{Cpu, CpuMatrix};
use super::simd::{Simd, Task, exp};

/// Floats of the logits that exist at once: 128 MiB.
const MAX_LOGITS: usize = 32 * 1024 * 1024;

/// Rows of hidden states with what each should predict.
pub(in crate::kernels) struct CrossEntropy<'a> {
    /// `[rows, hidden_size]`.
    pub(in crate::kernels) hidden: &'a [f32],
    /// `[vocab_size, hidden_size]`.
    pub(in crate::kernels) head: &'a CpuMatrix,
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

/// Returns the loss of each row, and the gradient of `scale` times their sum by `hidden` where
/// `scale` is given.
pub(in crate::kernels) fn cross_entropy(
    cpu: Cpu<'_>,
    args: &CrossEntropy<'_>,
    scale: Option<f32>,
) -> (Vec<f32>, Vec<f32>) {
    let (vocab_size, hidden_size) = (args.head.rows, args.head.cols);
    let chunk_rows = (MAX_LOGITS / vocab_size).max(1);
    let mut losses = vec![0f32; args.targets.len()];
    let mut d_hidden = Vec::new();
    let chunks = args.hidden.chunks(chunk_rows * hidden_size);
    let targets = args.targets.chunks(chunk_rows);
    for ((hidden, targets), losses) in chunks.zip(targets).zip(losses.chunks_mut(chunk_rows)) {
        let forward = Product {
            a: Operand::dense(hidden, [targets.len(), hidden_size]),
            b: args.head.operand().transposed(),
            low_rank: None,
            scale: 1.0,
            bias: None,
            mode: Mode::Overwrite,
        };
        let mut logits = product(cpu, &forward);
        run_rows(cpu, &mut logits, targets, losses, scale);
        if scale.is_some() {
            let backward = Product {
                a: Operand::dense(&logits, [targets.len(), vocab_size]),
                b: args.head.operand(),
                ..forward
            };
            let gradient = product(cpu, &backward);
            if d_hidden.is_empty() {
                d_hidden = gradient;
            } else {
                d_hidden.extend_from_slice(&gradient);
            }
        }
    }
    (losses, d_hidden)
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
