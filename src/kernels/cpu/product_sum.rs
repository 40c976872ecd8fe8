//! Sums of products over tensors, and dropout: what a linear layer with adapters is made of.

use super::buffer::for_each_piece;
use super::gemm::{self, Elements, Mode, Operand, Product, Target};
use super::matmul::{Cpu, CpuMatrix};
use crate::kernels::check::F32Matrix;
use crate::kernels::training::Dropout;

fn operand<'a>(matrix: &'a F32Matrix<'_>) -> Operand<'a> {
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
        scale,
        bias: None,
        mode: Mode::Overwrite,
    };
    gemm::product(cpu, &product)
}

/// An output `[rows, width]` that products are written and added to.
pub(in crate::kernels) struct ProductSum {
    out: Vec<f32>,
    width: usize,
}

impl ProductSum {
    /// Returns zeros, which the system provides when they are first touched.
    pub(in crate::kernels) fn new([rows, width]: [usize; 2]) -> Self {
        Self {
            out: vec![0.0; rows * width],
            width,
        }
    }

    /// Writes `x Wᵀ + bias` from column `col` on.
    pub(in crate::kernels) fn write_linear(
        &mut self,
        cpu: Cpu<'_>,
        x: &F32Matrix<'_>,
        weight: &CpuMatrix,
        bias: Option<&[f32]>,
        col: usize,
    ) {
        let product = Product {
            a: operand(x),
            b: weight.operand().transposed(),
            scale: 1.0,
            bias,
            mode: Mode::Overwrite,
        };
        self.run(cpu, &product, [x.dims()[0], weight.rows], col);
    }

    /// Adds `dy W`.
    pub(in crate::kernels) fn add_weight(
        &mut self,
        cpu: Cpu<'_>,
        dy: &F32Matrix<'_>,
        weight: &CpuMatrix,
    ) {
        let product = Product {
            a: operand(dy),
            b: weight.operand(),
            scale: 1.0,
            bias: None,
            mode: Mode::Add,
        };
        self.run(cpu, &product, [dy.dims()[0], weight.cols], 0);
    }

    /// Adds `scale * x * w` from column `col` on.
    pub(in crate::kernels) fn add(
        &mut self,
        cpu: Cpu<'_>,
        x: &F32Matrix<'_>,
        w: &F32Matrix<'_>,
        scale: f32,
        col: usize,
    ) {
        let product = Product {
            a: operand(x),
            b: operand(w),
            scale,
            bias: None,
            mode: Mode::Add,
        };
        self.run(cpu, &product, [x.dims()[0], w.dims()[1]], col);
    }

    fn run(&mut self, cpu: Cpu<'_>, product: &Product<'_>, [rows, cols]: [usize; 2], col: usize) {
        assert!(
            rows * self.width == self.out.len() && col + cols <= self.width,
            "{rows} x {cols} results at column {col} of {}",
            self.width
        );
        let target = Target {
            base: self.out[col..].as_mut_ptr(),
            stride: self.width,
        };
        // SAFETY: rows and columns lie in the output, as checked above.
        unsafe { gemm::gemm(cpu, product, target) };
    }

    /// Returns the numbers.
    pub(in crate::kernels) fn finish(self) -> Vec<f32> {
        self.out
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
