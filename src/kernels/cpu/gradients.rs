//! Backward passes of the operations that work on a row at a time, and the rotation of training.
//!
//! Formulas are derived where they stand. As in `elementwise`, a row's result depends on that
//! row alone.

use super::buffer::{Output, for_each_piece};
use super::matmul::Cpu;
use super::simd::{Simd, Task, exp};

/// Elements below which a second thread costs more than it saves.
const MIN_TASK_ELEMENTS: usize = 16 * 1024;

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

fn for_rows(cpu: Cpu<'_>, num_rows: usize, width: usize, f: impl Fn(usize, usize) + Sync) {
    let task_rows = MIN_TASK_ELEMENTS.div_ceil(width.max(1));
    cpu.pool.run(num_rows.div_ceil(task_rows), |task| {
        let start = task * task_rows;
        f(start, (start + task_rows).min(num_rows));
    });
}

/// What the backward pass of a norm reads.
pub(in crate::kernels) struct NormGradient<'a> {
    /// The norm's input, `[_, weight.len()]`.
    pub(in crate::kernels) x: &'a [f32],
    pub(in crate::kernels) weight: &'a [f32],
    pub(in crate::kernels) eps: f32,
    /// Gradient of the norm's output.
    pub(in crate::kernels) dy: &'a [f32],
    /// Gradient that reaches the input past the norm; added.
    pub(in crate::kernels) residual: Option<&'a [f32]>,
}

struct NormGradientRows<'a> {
    norm: NormGradient<'a>,
    out: *mut f32,
}

impl Task for NormGradientRows<'_> {
    /// y_i = x_i ρ w_i with ρ = (Σ x² / n + ε)^(-1/2), so ∂ρ/∂x_j = -ρ³ x_j / n and
    /// dx_j = ρ w_j dy_j - x_j ρ³ / n Σ_i x_i w_i dy_i.
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let NormGradient {
            x,
            weight,
            eps,
            dy,
            residual,
        } = self.norm;
        let width = weight.len();
        for row in 0..x.len() / width {
            let start = row * width;
            // SAFETY: all slices have as many elements as `x`, and `out` is writable for them.
            unsafe {
                let (x, dy) = (x.as_ptr().add(start), dy.as_ptr().add(start));
                let (mut squares, mut dot) = (simd.splat(0.0), simd.splat(0.0));
                for_lanes!(width, |at, len| {
                    let x = simd.load_part(x.add(at), len);
                    let w = simd.load_part(weight.as_ptr().add(at), len);
                    let dy = simd.load_part(dy.add(at), len);
                    squares = simd.fma(x, x, squares);
                    dot = simd.fma(simd.mul(x, w), dy, dot);
                });
                let n = width as f32;
                let rho = 1.0 / (simd.reduce_add(squares) / n + eps).sqrt();
                let back = simd.splat(-simd.reduce_add(dot) * rho * rho * rho / n);
                let rho = simd.splat(rho);
                for_lanes!(width, |at, len| {
                    let x = simd.load_part(x.add(at), len);
                    let w = simd.load_part(weight.as_ptr().add(at), len);
                    let dy = simd.load_part(dy.add(at), len);
                    let mut dx = simd.fma(simd.mul(w, dy), rho, simd.mul(x, back));
                    if let Some(residual) = residual {
                        dx = simd.add(dx, simd.load_part(residual.as_ptr().add(start + at), len));
                    }
                    simd.store_part(self.out.add(start + at), len, dx);
                });
            }
        }
    }
}

/// Returns the gradient of a norm's input.
pub(in crate::kernels) fn rms_norm_backward(cpu: Cpu<'_>, norm: &NormGradient<'_>) -> Vec<f32> {
    let width = norm.weight.len();
    let out = Output::new(norm.x.len());
    for_rows(cpu, norm.x.len() / width, width, |start, end| {
        let range = start * width..end * width;
        let rows = NormGradientRows {
            norm: NormGradient {
                x: &norm.x[range.clone()],
                dy: &norm.dy[range.clone()],
                residual: norm.residual.map(|residual| &residual[range.clone()]),
                ..*norm
            },
            out: out.at(start * width),
        };
        // SAFETY: the level is supported.
        unsafe { cpu.level.run(rows) };
    });
    // SAFETY: the tasks cover all rows.
    unsafe { out.finish() }
}

struct SiluGradientRows<'a> {
    gate_up: &'a [f32],
    dh: &'a [f32],
    width: usize,
    out: *mut f32,
}

impl Task for SiluGradientRows<'_> {
    /// h = g σ(g) u, σ' = σ (1 - σ): du = dh g σ, dg = dh u σ (1 + g (1 - σ)).
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (width, zero, one) = (self.width, simd.splat(0.0), simd.splat(1.0));
        for (row, dh) in self.dh.chunks_exact(width).enumerate() {
            // SAFETY: `gate_up` and `out` have `2 * width` elements a row.
            unsafe {
                let gate = self.gate_up.as_ptr().add(row * 2 * width);
                let out = self.out.add(row * 2 * width);
                for_lanes!(width, |at, len| {
                    let g = simd.load_part(gate.add(at), len);
                    let u = simd.load_part(gate.add(width + at), len);
                    let dh = simd.load_part(dh.as_ptr().add(at), len);
                    let sigmoid = simd.div(one, simd.add(one, exp(simd, simd.sub(zero, g))));
                    let slope = simd.fma(g, simd.sub(one, sigmoid), one);
                    let dg = simd.mul(simd.mul(dh, u), simd.mul(sigmoid, slope));
                    let du = simd.mul(dh, simd.mul(g, sigmoid));
                    simd.store_part(out.add(at), len, dg);
                    simd.store_part(out.add(width + at), len, du);
                });
            }
        }
    }
}

/// Returns the gradient of `gate_up` for rows of `width` gates and `width` ups.
pub(in crate::kernels) fn silu_and_mul_backward(
    cpu: Cpu<'_>,
    gate_up: &[f32],
    dh: &[f32],
    width: usize,
) -> Vec<f32> {
    let out = Output::new(gate_up.len());
    for_rows(cpu, dh.len() / width, 2 * width, |start, end| {
        let rows = SiluGradientRows {
            gate_up: &gate_up[start * 2 * width..end * 2 * width],
            dh: &dh[start * width..end * width],
            width,
            out: out.at(start * 2 * width),
        };
        // SAFETY: the level is supported.
        unsafe { cpu.level.run(rows) };
    });
    // SAFETY: the tasks cover all rows.
    unsafe { out.finish() }
}

/// How the heads of `qkv: [_, (num_heads + 2 num_kv_heads) head_dim]` are normed and rotated.
pub(in crate::kernels) struct Rotation<'a> {
    pub(in crate::kernels) num_heads: usize,
    pub(in crate::kernels) num_kv_heads: usize,
    pub(in crate::kernels) head_dim: usize,
    /// Norm weights `[head_dim]` of queries and keys.
    pub(in crate::kernels) qk_norm: Option<(&'a [f32], &'a [f32])>,
    pub(in crate::kernels) eps: f32,
    /// `[max_positions, head_dim / 2]`.
    pub(in crate::kernels) cos: &'a [f32],
    pub(in crate::kernels) sin: &'a [f32],
    pub(in crate::kernels) positions: &'a [u32],
}

impl Rotation<'_> {
    fn width(&self) -> usize {
        (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
    }

    fn norm_of(&self, head: usize) -> Option<&[f32]> {
        let (q_norm, k_norm) = self.qk_norm?;
        Some(if head < self.num_heads {
            q_norm
        } else {
            k_norm
        })
    }

    fn tables(&self, row: usize) -> (&[f32], &[f32]) {
        let half = self.head_dim / 2;
        let start = self.positions[row] as usize * half;
        (
            &self.cos[start..start + half],
            &self.sin[start..start + half],
        )
    }

    /// Calls `f(row, head, values)` for each query and key head of `out`.
    fn for_each_head(
        &self,
        cpu: Cpu<'_>,
        out: &mut [f32],
        f: impl Fn(usize, usize, &mut [f32]) + Sync,
    ) {
        let (width, rotated) = (self.width(), self.num_heads + self.num_kv_heads);
        let rows_per_task = MIN_TASK_ELEMENTS.div_ceil(width);
        for_each_piece(cpu.pool, out, rows_per_task * width, |task, rows| {
            for (row, values) in rows.chunks_exact_mut(width).enumerate() {
                let heads = values.chunks_exact_mut(self.head_dim).take(rotated);
                for (head, values) in heads.enumerate() {
                    f(task * rows_per_task + row, head, values);
                }
            }
        });
    }
}

/// Turns each pair `(x_i, x_(i + half))` by the angle of its frequency, or back with `sign` -1.
///
/// The tables may carry a factor (YaRN); the backward pass is the transposed matrix, which keeps
/// the factor and negates the sines.
fn rotate(values: &mut [f32], (cos, sin): (&[f32], &[f32]), sign: f32) {
    let (low, high) = values.split_at_mut(cos.len());
    for ((low, high), (cos, sin)) in low.iter_mut().zip(high).zip(cos.iter().zip(sin)) {
        let (x, y, sin) = (*low, *high, sign * sin);
        *low = x * cos - y * sin;
        *high = y * cos + x * sin;
    }
}

fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    let squares: f32 = x.iter().map(|x| x * x).sum();
    1.0 / (squares / x.len() as f32 + eps).sqrt()
}

/// Returns `qkv` with queries and keys normed, where norms are given, and rotated.
pub(in crate::kernels) fn rotate_heads(
    cpu: Cpu<'_>,
    qkv: &[f32],
    rotation: &Rotation<'_>,
) -> Vec<f32> {
    let mut out = qkv.to_vec();
    rotation.for_each_head(cpu, &mut out, |row, head, values| {
        if let Some(weight) = rotation.norm_of(head) {
            let scale = inverse_rms(values, rotation.eps);
            for (value, weight) in values.iter_mut().zip(weight) {
                *value *= scale * weight;
            }
        }
        rotate(values, rotation.tables(row), 1.0);
    });
    out
}

/// Returns the gradient of [`rotate_heads`]' input `qkv` from that of its output; without norms
/// `qkv` is not read.
pub(in crate::kernels) fn rotate_heads_backward(
    cpu: Cpu<'_>,
    qkv: Option<&[f32]>,
    d_rotated: &[f32],
    rotation: &Rotation<'_>,
) -> Vec<f32> {
    let (width, head_dim) = (rotation.width(), rotation.head_dim);
    let mut out = d_rotated.to_vec();
    rotation.for_each_head(cpu, &mut out, |row, head, values| {
        rotate(values, rotation.tables(row), -1.0);
        if let (Some(weight), Some(qkv)) = (rotation.norm_of(head), qkv) {
            let x = &qkv[row * width + head * head_dim..][..head_dim];
            let rho = inverse_rms(x, rotation.eps);
            let dot: f32 = (x.iter().zip(weight).zip(&*values))
                .map(|((x, w), dy)| x * w * dy)
                .sum();
            let back = -dot * rho * rho * rho / head_dim as f32;
            for ((dy, x), w) in values.iter_mut().zip(x).zip(weight) {
                *dy = *dy * w * rho + x * back;
            }
        }
    });
    out
}
