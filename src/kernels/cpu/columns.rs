//! Factors and sums of columns, and the norms of a weight's rows: what DoRA and the gradients of
//! norms and biases are made of.
//!
//! Sums over rows run from the first row to the last, whatever the number of threads.

use super::buffer::{Output, for_each_piece};
use super::matmul::{Cpu, CpuMatrix};
use super::simd::{Simd, Task};

/// Elements below which a second thread costs more than it saves.
const MIN_TASK_ELEMENTS: usize = 16 * 1024;
/// Columns of a task that sums over rows.
const TASK_COLUMNS: usize = 64;
/// Rows of a weight that a task takes the norms of.
const TASK_ROWS: usize = 16;

/// Rows of `width` elements, what each column is multiplied by, and what is added.
pub(in crate::kernels) struct ScaledColumns<'a> {
    /// `[_, factors.len()]`.
    pub(in crate::kernels) x: &'a [f32],
    pub(in crate::kernels) factors: &'a [f32],
    /// One value for each column.
    pub(in crate::kernels) bias: Option<&'a [f32]>,
    /// As many elements as `x`.
    pub(in crate::kernels) sum: Option<&'a [f32]>,
}

struct ScaledRows<'a> {
    columns: ScaledColumns<'a>,
    out: *mut f32,
}

impl Task for ScaledRows<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let ScaledColumns {
            x,
            factors,
            bias,
            sum,
        } = self.columns;
        let width = factors.len();
        for start in (0..x.len()).step_by(width) {
            for at in (0..width).step_by(16) {
                let len = (width - at).min(16);
                // SAFETY: `x`, `sum` and `out` have `width` elements from `start` on, `factors`
                // and `bias` have `width`.
                unsafe {
                    let x = simd.load_part(x.as_ptr().add(start + at), len);
                    let factor = simd.load_part(factors.as_ptr().add(at), len);
                    let mut y = simd.mul(x, factor);
                    if let Some(bias) = bias {
                        y = simd.add(y, simd.load_part(bias.as_ptr().add(at), len));
                    }
                    if let Some(sum) = sum {
                        y = simd.add(y, simd.load_part(sum.as_ptr().add(start + at), len));
                    }
                    simd.store_part(self.out.add(start + at), len, y);
                }
            }
        }
    }
}

/// Returns each column times its factor, plus its bias, plus `sum`.
pub(in crate::kernels) fn scale_columns(cpu: Cpu<'_>, columns: &ScaledColumns<'_>) -> Vec<f32> {
    let width = columns.factors.len();
    let num_rows = columns.x.len() / width;
    let out = Output::new(columns.x.len());
    let task_rows = MIN_TASK_ELEMENTS.div_ceil(width);
    cpu.pool.run(num_rows.div_ceil(task_rows), |task| {
        let start = task * task_rows * width;
        let end = ((task + 1) * task_rows).min(num_rows) * width;
        let rows = ScaledRows {
            columns: ScaledColumns {
                x: &columns.x[start..end],
                sum: columns.sum.map(|sum| &sum[start..end]),
                ..*columns
            },
            out: out.at(start),
        };
        // SAFETY: the level is supported.
        unsafe { cpu.level.run(rows) };
    });
    // SAFETY: the tasks cover all rows.
    unsafe { out.finish() }
}

struct ColumnDots<'a> {
    a: &'a [f32],
    b: Option<&'a [f32]>,
    width: usize,
    first: usize,
    out: &'a mut [f32],
}

impl Task for ColumnDots<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let one = simd.splat(1.0);
        for at in (0..self.out.len()).step_by(16) {
            let len = (self.out.len() - at).min(16);
            let mut sum = simd.splat(0.0);
            for start in (0..self.a.len()).step_by(self.width) {
                let from = start + self.first + at;
                // SAFETY: the columns lie in a row of `width` elements, and `b` is as long as `a`.
                unsafe {
                    let a = simd.load_part(self.a.as_ptr().add(from), len);
                    let b = match self.b {
                        Some(b) => simd.load_part(b.as_ptr().add(from), len),
                        None => one,
                    };
                    sum = simd.fma(a, b, sum);
                }
            }
            // SAFETY: `out` has `len` elements from `at` on.
            unsafe { simd.store_part(self.out.as_mut_ptr().add(at), len, sum) };
        }
    }
}

/// Returns for each of `width` columns the sum over rows of `a * b`, or of `a` alone.
pub(in crate::kernels) fn column_dots(
    cpu: Cpu<'_>,
    a: &[f32],
    b: Option<&[f32]>,
    width: usize,
) -> Vec<f32> {
    let mut out = vec![0f32; width];
    for_each_piece(cpu.pool, &mut out, TASK_COLUMNS, |piece, out| {
        let dots = ColumnDots {
            a,
            b,
            width,
            first: piece * TASK_COLUMNS,
            out,
        };
        // SAFETY: the level is supported.
        unsafe { cpu.level.run(dots) };
    });
    out
}

struct RowNorm<'a> {
    /// A row of the weight, which becomes that of the sum.
    row: &'a mut [f32],
    /// `[rank, row.len()]`.
    a: &'a [f32],
    /// `[rank]`, the scale included.
    b: &'a [f32],
    norm: &'a mut f32,
}

impl Task for RowNorm<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let width = self.row.len();
        let mut squares = simd.splat(0.0);
        for at in (0..width).step_by(16) {
            let len = (width - at).min(16);
            // SAFETY: every row of `a` has `width` elements.
            unsafe {
                let mut w = simd.load_part(self.row.as_ptr().add(at), len);
                for (index, b) in self.b.iter().enumerate() {
                    let a = simd.load_part(self.a.as_ptr().add(index * width + at), len);
                    w = simd.fma(simd.splat(*b), a, w);
                }
                squares = simd.fma(w, w, squares);
            }
        }
        *self.norm = simd.reduce_add(squares).sqrt();
    }
}

/// Returns the norm of each row of `weight + scale * b * a`, for `a: [rank, in]` and
/// `b: [out, rank]`.
pub(in crate::kernels) fn row_norms(
    cpu: Cpu<'_>,
    weight: &CpuMatrix,
    (a, b): (&[f32], &[f32]),
    scale: f32,
) -> Vec<f32> {
    let rank = b.len() / weight.rows.max(1);
    let mut norms = vec![0f32; weight.rows];
    for_each_piece(cpu.pool, &mut norms, TASK_ROWS, |piece, norms| {
        let (mut row, mut factors) = (vec![0f32; weight.cols], vec![0f32; rank]);
        for (index, norm) in norms.iter_mut().enumerate() {
            let index = piece * TASK_ROWS + index;
            weight.row_to_f32(index, &mut row);
            for (factor, b) in factors.iter_mut().zip(&b[index * rank..]) {
                *factor = scale * b;
            }
            let task = RowNorm {
                row: &mut row,
                a,
                b: &factors,
                norm,
            };
            // SAFETY: the level is supported.
            unsafe { cpu.level.run(task) };
        }
    });
    norms
}
