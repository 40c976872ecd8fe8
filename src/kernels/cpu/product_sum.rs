//! Sums of products over tensors, and dropout: what a linear layer with adapters is made of.

use super::buffer::{Output, for_each_piece};
use super::gemm::{self, Elements, Mode, Operand, Product, Target};
use super::matmul::{Cpu, CpuMatrix};
use crate::kernels::check::F32Matrix;
use crate::kernels::training::Dropout;

pub(super) fn operand<'a>(matrix: &'a F32Matrix<'_>) -> Operand<'a> {
    let [rows, cols] = matrix.dims();
    let elements = Elements::F32(matrix.get());
    if matrix.is_transposed() {
        Operand::new(elements, [cols, rows], matrix.stride()).transposed()
    } else {
        Operand::new(elements, [rows, cols], matrix.stride())
    }
}

/// Returns `scale * a * b`, whose inner sizes agree.
pub(in crate::kernels) fn product_of(
    cpu: Cpu<'_>,
    a: &F32Matrix<'_>,
    b: &F32Matrix<'_>,
    scale: f32,
) -> Vec<f32> {
    let product = Product {
        a: operand(a),
        b: operand(b),
        low_rank: None,
        scale,
        bias: None,
        mode: Mode::Overwrite,
    };
    gemm::product(cpu, &product)
}

/// The factors of a low-rank term.
pub(in crate::kernels) type LowRankFactors<'a> = (&'a F32Matrix<'a>, &'a F32Matrix<'a>);

/// An output `[rows, width]` that products are written and added to.
pub(in crate::kernels) struct ProductSum {
    out: Output<f32>,
    rows: usize,
    width: usize,
    /// Columns that hold numbers, from the first on.
    num_written: usize,
}

impl ProductSum {
    /// Returns an output without numbers.
    pub(in crate::kernels) fn new([rows, width]: [usize; 2]) -> Self {
        Self {
            out: Output::new(rows * width),
            rows,
            width,
            num_written: 0,
        }
    }

    /// Writes `x Wᵀ + bias`, with a low-rank term, behind the columns that are written.
    pub(in crate::kernels) fn write_linear(
        &mut self,
        cpu: Cpu<'_>,
        x: &F32Matrix<'_>,
        weight: &CpuMatrix,
        bias: Option<&[f32]>,
        low_rank: Option<LowRankFactors<'_>>,
    ) {
        let product = Product {
            a: operand(x),
            b: weight.operand().transposed(),
            low_rank: low_rank.map(|(x, w)| (operand(x), operand(w))),
            scale: 1.0,
            bias,
            mode: Mode::Overwrite,
        };
        let col = self.num_written;
        self.run(cpu, &product, [x.dims()[0], weight.rows], col);
        self.num_written += weight.rows;
    }

    /// Adds `dy W`, with a low-rank term; the first one is written.
    pub(in crate::kernels) fn add_weight(
        &mut self,
        cpu: Cpu<'_>,
        dy: &F32Matrix<'_>,
        weight: &CpuMatrix,
        low_rank: Option<LowRankFactors<'_>>,
    ) {
        let product = Product {
            a: operand(dy),
            b: weight.operand(),
            low_rank: low_rank.map(|(x, w)| (operand(x), operand(w))),
            scale: 1.0,
            bias: None,
            mode: match self.num_written {
                0 => Mode::Overwrite,
                _ => Mode::Add,
            },
        };
        self.run(cpu, &product, [dy.dims()[0], weight.cols], 0);
        self.num_written = weight.cols;
    }

    fn run(&self, cpu: Cpu<'_>, product: &Product<'_>, [rows, cols]: [usize; 2], col: usize) {
        assert!(
            rows == self.rows && col + cols <= self.width,
            "{rows} x {cols} results at column {col} of {} x {}",
            self.rows,
            self.width
        );
        let target = Target {
            base: self.out.at(col),
            stride: self.width,
        };
        // SAFETY: rows and columns lie in the output, as checked above, and what is added to was
        // written before.
        unsafe { gemm::gemm(cpu, product, target) };
    }

    /// Returns the numbers.
    pub(in crate::kernels) fn finish(self) -> Vec<f32> {
        assert_eq!(self.num_written, self.width, "columns that were written");
        // SAFETY: every column was written.
        unsafe { self.out.finish() }
    }
}

/// Elements below which a second thread costs more than it saves.
const MIN_TASK_ELEMENTS: usize = 16 * 1024;

/// Mixes 32 bits so that each depends on all (C. Wellons' `lowbias32`, found by search).
fn mix(mut bits: u32) -> u32 {
    bits = (bits ^ (bits >> 16)).wrapping_mul(0x7feb_352d);
    bits = (bits ^ (bits >> 15)).wrapping_mul(0x846c_a68b);
    bits ^ (bits >> 16)
}

/// Returns `x` with elements dropped, plus `sum` where given.
pub(in crate::kernels) fn dropout(
    cpu: Cpu<'_>,
    x: &[f32],
    sum: Option<&[f32]>,
    dropout: Dropout,
) -> Vec<f32> {
    let (low, high) = (dropout.key as u32, (dropout.key >> 32) as u32);
    // An element stays when its 32 bits are at or above probability * 2^32.
    let threshold = (f64::from(dropout.probability) * 4_294_967_296.0) as u32;
    let scale = 1.0 / (1.0 - dropout.probability);
    let mut out = match sum {
        Some(sum) => sum.to_vec(),
        None => vec![0.0; x.len()],
    };
    for_each_piece(cpu.pool, &mut out, MIN_TASK_ELEMENTS, |piece, out| {
        let start = piece * MIN_TASK_ELEMENTS;
        let (index, x) = (start as u32, &x[start..]);
        for (i, (out, x)) in out.iter_mut().zip(x).enumerate() {
            let bits = mix(mix(index.wrapping_add(i as u32) ^ low).wrapping_add(high));
            let factor = if bits >= threshold { scale } else { 0.0 };
            *out += x * factor;
        }
    });
    out
}
