//! Operands of a product, and their copies in panels that a register tile walks through.

use super::dense::{BF16, DenseType, Element, F16, F32};
use super::simd::{Simd, Task};
use std::ops::Range;

/// Elements of a matrix where they lie.
#[derive(Clone, Copy)]
pub(super) enum Elements<'a> {
    /// Numbers of the program.
    F32(&'a [f32]),
    /// Little-endian bytes of a file.
    Stored(DenseType, &'a [u8]),
}

/// A matrix as a product reads it: element `(i, j)` lies at `i * row_stride + j * col_stride`.
#[derive(Clone, Copy)]
pub(super) struct Operand<'a> {
    elements: Elements<'a>,
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Operand<'a> {
    /// Returns a row-major matrix whose rows lie `row_stride` elements apart.
    ///
    /// # Panics
    ///
    /// When the elements end before the matrix does.
    pub(super) fn new(elements: Elements<'a>, [rows, cols]: [usize; 2], row_stride: usize) -> Self {
        let len = match elements {
            Elements::F32(data) => data.len(),
            Elements::Stored(dtype, data) => data.len() / dtype.size_bytes(),
        };
        let last = (rows.max(1) - 1) * row_stride + cols;
        assert!(
            rows == 0 || (cols <= row_stride.max(cols) && last <= len),
            "{rows} x {cols} elements, {row_stride} apart, of {len}"
        );
        Self {
            elements,
            rows,
            cols,
            row_stride,
            col_stride: 1,
        }
    }

    /// Returns a row-major matrix without gaps.
    pub(super) fn dense(data: &'a [f32], [rows, cols]: [usize; 2]) -> Self {
        Self::new(Elements::F32(data), [rows, cols], cols)
    }

    /// Returns some rows of a row-major matrix.
    ///
    /// # Panics
    ///
    /// When they are not rows of it, or its columns are contiguous.
    pub(super) fn rows(self, rows: Range<usize>) -> Self {
        assert!(
            self.col_stride == 1 && rows.end <= self.rows,
            "{rows:?} of {}",
            self.rows
        );
        let elements = match self.elements {
            Elements::F32(data) => Elements::F32(&data[rows.start * self.row_stride..]),
            Elements::Stored(dtype, data) => {
                let first = rows.start * self.row_stride * dtype.size_bytes();
                Elements::Stored(dtype, &data[first..])
            }
        };
        Self {
            elements,
            rows: rows.len(),
            ..self
        }
    }

    /// Returns the transpose.
    pub(super) fn transposed(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }
}

/// A matrix with columns of another one behind its own, as if they were one: what low-rank terms
/// become, so that they cost a few steps more instead of another pass over the output.
#[derive(Clone, Copy)]
pub(super) struct Joined<'a> {
    pub(super) main: Operand<'a>,
    /// As many rows as `main`.
    pub(super) tail: Option<Operand<'a>>,
}

impl Joined<'_> {
    /// Returns the number of rows.
    pub(super) fn num_rows(&self) -> usize {
        if let Some(tail) = self.tail {
            assert_eq!(self.main.rows, tail.rows, "rows of a low-rank term");
        }
        self.main.rows
    }

    /// Returns the number of columns, those of the tail included.
    pub(super) fn num_cols(&self) -> usize {
        self.main.cols + self.tail.map_or(0, |tail| tail.cols)
    }
}

/// Copies rows of a matrix side by side: `to[step][lane] = from[rows.start + lane][step]`, zero
/// in lanes beyond the last row.
pub(super) struct Pack<'a> {
    pub(super) from: Joined<'a>,
    pub(super) rows: Range<usize>,
    pub(super) steps: Range<usize>,
    pub(super) width: usize,
    /// Writable for `steps * width` elements.
    pub(super) to: *mut f32,
}

impl Task for Pack<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let cols = self.from.main.cols;
        let in_main = self.steps.start.min(cols)..self.steps.end.min(cols);
        let num_in_main = in_main.len();
        self.pack_operand(simd, &self.from.main, in_main, self.to);
        if let Some(tail) = &self.from.tail
            && self.steps.end > cols
        {
            let in_tail = self.steps.start.max(cols) - cols..self.steps.end - cols;
            let to = self.to.wrapping_add(num_in_main * self.width);
            self.pack_operand(simd, tail, in_tail, to);
        }
    }
}

impl Pack<'_> {
    #[inline(always)]
    fn pack_operand<S: Simd>(
        &self,
        simd: S,
        from: &Operand<'_>,
        steps: Range<usize>,
        to: *mut f32,
    ) {
        match from.elements {
            Elements::F32(data) => {
                self.pack_elements(simd, (F32, data.as_ptr().cast()), from, steps, to);
            }
            Elements::Stored(DenseType::F32, data) => {
                self.pack_elements(simd, (F32, data.as_ptr()), from, steps, to);
            }
            Elements::Stored(DenseType::F16, data) => {
                self.pack_elements(simd, (F16, data.as_ptr()), from, steps, to);
            }
            Elements::Stored(DenseType::BF16, data) => {
                self.pack_elements(simd, (BF16, data.as_ptr()), from, steps, to);
            }
        }
    }

    #[inline(always)]
    fn pack_elements<S: Simd, E: Element>(
        &self,
        simd: S,
        (element, data): (E, *const u8),
        from: &Operand<'_>,
        steps: Range<usize>,
        to: *mut f32,
    ) {
        let at = |row: usize, step: usize| {
            let index =
                (self.rows.start + row) * from.row_stride + (steps.start + step) * from.col_stride;
            data.wrapping_add(index * E::SIZE)
        };
        let (num_rows, num_steps, width) = (self.rows.len(), steps.len(), self.width);
        // SAFETY: the operand holds all of its rows and columns, and `to` has the room.
        unsafe {
            if from.row_stride == 1 {
                for step in 0..num_steps {
                    let to = to.add(step * width);
                    for lane in (0..width).step_by(16) {
                        let have = num_rows.saturating_sub(lane).min(16);
                        let lanes = match have {
                            0 => simd.splat(0.0),
                            16 => element.load(simd, at(lane, step)),
                            _ => element.load_part(simd, at(lane, step), have),
                        };
                        simd.store_part(to.add(lane), (width - lane).min(16), lanes);
                    }
                }
                return;
            }
            for lane in (0..width).step_by(16) {
                let have = num_rows.saturating_sub(lane).min(16);
                let len = (width - lane).min(16);
                for step in (0..num_steps).step_by(16) {
                    let num_cols = (num_steps - step).min(16);
                    let mut square = [simd.splat(0.0); 16];
                    for (row, values) in square.iter_mut().enumerate().take(have) {
                        let from = at(lane + row, step);
                        *values = match num_cols {
                            16 => element.load(simd, from),
                            _ => element.load_part(simd, from, num_cols),
                        };
                    }
                    let square = simd.transpose(square);
                    for (col, values) in square.into_iter().enumerate().take(num_cols) {
                        simd.store_part(to.add((step + col) * width + lane), len, values);
                    }
                }
            }
        }
    }
}
