//! Norms, activation functions, sums and gathers, a row at a time.
//!
//! Each output row depends on its own input rows only and is computed in one order, so that it
//! has the same bits alone and in any batch.

use super::buffer::Output;
use super::matmul::Cpu;
use super::simd::{Simd, Task, exp};

/// Elements below which a second thread costs more than it saves.
const MIN_TASK_ELEMENTS: usize = 16 * 1024;

/// Cuts `num_rows` rows of `width` elements into tasks and gives each its rows.
fn for_rows(cpu: Cpu<'_>, num_rows: usize, width: usize, f: impl Fn(usize, usize) + Sync) {
    let task_rows = MIN_TASK_ELEMENTS.div_ceil(width.max(1));
    cpu.pool.run(num_rows.div_ceil(task_rows), |task| {
        let start = task * task_rows;
        f(start, (start + task_rows).min(num_rows));
    });
}

/// Calls `f(offset, len)` for each 16 elements of `len`, the last with fewer.
macro_rules! for_lanes {
    ($total:expr, |$at:ident, $len:ident| $body:block) => {
        let mut $at = 0;
        while $at < $total {
            let $len = ($total - $at).min(16);
            $body
            $at += 16;
        }
    };
}

struct RmsNormRows<'a> {
    x: &'a [f32],
    residual: Option<&'a [f32]>,
    weight: &'a [f32],
    eps: f32,
    out: *mut f32,
    /// Where `x + residual` goes, when there is a residual.
    sum: *mut f32,
}

impl Task for RmsNormRows<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let width = self.weight.len();
        for (row, x) in self.x.chunks_exact(width).enumerate() {
            // SAFETY: `out`, and `sum` with a residual, are writable for the rows of `x`, and
            // the residual has as many elements as `x`.
            unsafe {
                let out = self.out.add(row * width);
                let mut x = x.as_ptr();
                if let Some(residual) = self.residual {
                    let residual = residual.as_ptr().add(row * width);
                    let sum = self.sum.add(row * width);
                    for_lanes!(width, |at, len| {
                        let x = simd.load_part(x.add(at), len);
                        let residual = simd.load_part(residual.add(at), len);
                        simd.store_part(sum.add(at), len, simd.add(x, residual));
                    });
                    x = sum.cast_const();
                }
                rms_norm_row(simd, x, self.weight, self.eps, out);
            }
        }
    }
}

/// Writes x / sqrt(mean(x²) + eps) * weight.
///
/// # Safety
///
/// `x` must be readable and `out` writable for as many elements as `weight` has.
#[inline(always)]
pub(super) unsafe fn rms_norm_row<S: Simd>(
    simd: S,
    x: *const f32,
    weight: &[f32],
    eps: f32,
    out: *mut f32,
) {
    let width = weight.len();
    let mut squares = simd.splat(0.0);
    // SAFETY: the caller's promise.
    unsafe {
        for_lanes!(width, |at, len| {
            let x = simd.load_part(x.add(at), len);
            squares = simd.fma(x, x, squares);
        });
        let mean = simd.reduce_add(squares) / width as f32;
        let scale = simd.splat(1.0 / (mean + eps).sqrt());
        for_lanes!(width, |at, len| {
            let x = simd.mul(simd.load_part(x.add(at), len), scale);
            let weight = simd.load_part(weight.as_ptr().add(at), len);
            simd.store_part(out.add(at), len, simd.mul(x, weight));
        });
    }
}

/// Returns the root-mean-square norm of each row of `x: [_, weight.len()]`.
pub(in crate::kernels) fn rms_norm(cpu: Cpu<'_>, x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let width = weight.len();
    let out = Output::new(x.len());
    for_rows(cpu, x.len() / width, width, |start, end| {
        let rows = RmsNormRows {
            x: &x[start * width..end * width],
            residual: None,
            weight,
            eps,
            out: out.at(start * width),
            sum: std::ptr::null_mut(),
        };
        // SAFETY: the level is supported.
        unsafe { cpu.level.run(rows) };
    });
    // SAFETY: the tasks cover all rows.
    unsafe { out.finish() }
}

/// Returns the norm of `x + residual`, and `x + residual`.
pub(in crate::kernels) fn add_rms_norm(
    cpu: Cpu<'_>,
    x: &[f32],
    residual: &[f32],
    weight: &[f32],
    eps: f32,
) -> (Vec<f32>, Vec<f32>) {
    let width = weight.len();
    let (out, sum) = (Output::new(x.len()), Output::new(x.len()));
    for_rows(cpu, x.len() / width, width, |start, end| {
        let rows = RmsNormRows {
            x: &x[start * width..end * width],
            residual: Some(&residual[start * width..end * width]),
            weight,
            eps,
            out: out.at(start * width),
            sum: sum.at(start * width),
        };
        // SAFETY: the level is supported.
        unsafe { cpu.level.run(rows) };
    });
    // SAFETY: the tasks cover all rows of both.
    unsafe { (out.finish(), sum.finish()) }
}

struct SiluRows<'a> {
    gate_up: &'a [f32],
    width: usize,
    out: *mut f32,
}

impl Task for SiluRows<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (width, zero, one) = (self.width, simd.splat(0.0), simd.splat(1.0));
        for (row, gate_up) in self.gate_up.chunks_exact(2 * width).enumerate() {
            // SAFETY: `gate_up` has `2 * width` elements and `out` `width` a row.
            unsafe {
                let (gate, up) = (gate_up.as_ptr(), gate_up.as_ptr().add(width));
                let out = self.out.add(row * width);
                for_lanes!(width, |at, len| {
                    let gate = simd.load_part(gate.add(at), len);
                    let up = simd.load_part(up.add(at), len);
                    let denominator = simd.add(one, exp(simd, simd.sub(zero, gate)));
                    let silu = simd.div(gate, denominator);
                    simd.store_part(out.add(at), len, simd.mul(silu, up));
                });
            }
        }
    }
}

/// Returns silu(gate) * up for rows of `width` gates and `width` ups.
pub(in crate::kernels) fn silu_and_mul(cpu: Cpu<'_>, gate_up: &[f32], width: usize) -> Vec<f32> {
    let out = Output::new(gate_up.len() / 2);
    for_rows(cpu, gate_up.len() / (2 * width), 2 * width, |start, end| {
        let rows = SiluRows {
            gate_up: &gate_up[start * 2 * width..end * 2 * width],
            width,
            out: out.at(start * width),
        };
        // SAFETY: the level is supported.
        unsafe { cpu.level.run(rows) };
    });
    // SAFETY: the tasks cover all rows.
    unsafe { out.finish() }
}

struct AddElements<'a> {
    a: &'a [f32],
    b: &'a [f32],
    out: *mut f32,
}

impl Task for AddElements<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (a, b, out) = (self.a.as_ptr(), self.b.as_ptr(), self.out);
        // SAFETY: the three have as many elements as `a`.
        unsafe {
            for_lanes!(self.a.len(), |at, len| {
                let sum = simd.add(
                    simd.load_part(a.add(at), len),
                    simd.load_part(b.add(at), len),
                );
                simd.store_part(out.add(at), len, sum);
            });
        }
    }
}

/// Returns `a + b`.
pub(in crate::kernels) fn add(cpu: Cpu<'_>, a: &[f32], b: &[f32]) -> Vec<f32> {
    let out = Output::new(a.len());
    for_rows(cpu, a.len(), 1, |start, end| {
        let elements = AddElements {
            a: &a[start..end],
            b: &b[start..end],
            out: out.at(start),
        };
        // SAFETY: the level is supported.
        unsafe { cpu.level.run(elements) };
    });
    // SAFETY: the tasks cover all elements.
    unsafe { out.finish() }
}

/// Returns the given rows of `x: [_, width]`, all of which exist.
pub(in crate::kernels) fn gather_rows(x: &[f32], width: usize, rows: &[u32]) -> Vec<f32> {
    let mut out = Vec::with_capacity(rows.len() * width);
    for &row in rows {
        let start = row as usize * width;
        out.extend_from_slice(&x[start..start + width]);
    }
    out
}
