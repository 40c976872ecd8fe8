//! Dense weights (`f32`, `f16`, `bf16`) times `f32` activations, in place from mapped memory.
//!
//! Lanes run along the columns. A register tile is 4 weight rows by up to 4 activation rows;
//! each output has one 16-lane sum, walked in column order and folded by a fixed tree, so a row
//! gives the same bits alone and in any batch. Weights need no alignment.

use super::simd::{Simd, SimdLevel, Task};
use half::{bf16, f16};
use std::ops::Range;

/// The dense element types.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum DenseType {
    F32,
    F16,
    BF16,
}

impl DenseType {
    /// Returns the bytes of an element.
    pub(super) fn size_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }

    /// Converts little-endian elements; `bytes` may have any alignment.
    pub(super) fn to_f32(self, bytes: &[u8], out: &mut [f32]) {
        match self {
            Self::F32 => {
                for (bytes, out) in bytes.as_chunks().0.iter().zip(out) {
                    *out = f32::from_le_bytes(*bytes);
                }
            }
            Self::F16 => {
                for (bytes, out) in bytes.as_chunks().0.iter().zip(out) {
                    *out = f16::from_le_bytes(*bytes).to_f32();
                }
            }
            Self::BF16 => {
                for (bytes, out) in bytes.as_chunks().0.iter().zip(out) {
                    *out = bf16::from_le_bytes(*bytes).to_f32();
                }
            }
        }
    }
}

/// The output columns of some weight rows for some activation rows.
pub(super) struct DenseDot<'a> {
    pub(super) dtype: DenseType,
    /// `[num_weight_rows, cols]`, row-major, little-endian, at any alignment.
    pub(super) weights: &'a [u8],
    pub(super) cols: usize,
    /// `[_, cols]`.
    pub(super) x: &'a [f32],
    /// Rows of `x` to use.
    pub(super) rows: Range<usize>,
    /// One value for each weight row.
    pub(super) bias: Option<&'a [f32]>,
    /// Where the first weight row's output for row 0 goes.
    pub(super) out: *mut f32,
    /// Elements between the outputs of two rows.
    pub(super) out_stride: usize,
}

impl DenseDot<'_> {
    /// Runs the kernel of the element type.
    ///
    /// # Safety
    ///
    /// The machine must support `level`, and `out` be writable for one element a weight row at
    /// each row of `rows`, by nobody else.
    pub(super) unsafe fn run(self, level: SimdLevel) {
        // SAFETY: the caller's promise.
        unsafe {
            match self.dtype {
                DenseType::F32 => level.run(Typed::<F32>(self, F32)),
                DenseType::F16 => level.run(Typed::<F16>(self, F16)),
                DenseType::BF16 => level.run(Typed::<BF16>(self, BF16)),
            }
        }
    }
}

/// Loads of one element type.
pub(super) trait Element: Copy {
    const SIZE: usize;
    /// # Safety
    ///
    /// `from` must be readable for 16 elements.
    unsafe fn load<S: Simd>(self, simd: S, from: *const u8) -> S::F;
    /// # Safety
    ///
    /// `from` must be readable for `len` elements.
    unsafe fn load_part<S: Simd>(self, simd: S, from: *const u8, len: usize) -> S::F;
}

/// Defines an element type by its size and its loads.
macro_rules! element {
    ($name:ident, $size:literal, $load:ident, $load_part:ident) => {
        #[derive(Clone, Copy)]
        pub(super) struct $name;

        impl Element for $name {
            const SIZE: usize = $size;
            #[inline(always)]
            unsafe fn load<S: Simd>(self, simd: S, from: *const u8) -> S::F {
                // SAFETY: the caller's promise.
                unsafe { simd.$load(from.cast()) }
            }
            #[inline(always)]
            unsafe fn load_part<S: Simd>(self, simd: S, from: *const u8, len: usize) -> S::F {
                // SAFETY: the caller's promise.
                unsafe { simd.$load_part(from.cast(), len) }
            }
        }
    };
}

element!(F32, 4, load, load_part);
element!(F16, 2, load_f16, load_f16_part);
element!(BF16, 2, load_bf16, load_bf16_part);
element!(E4m3, 1, load_e4m3, load_e4m3_part);

struct Typed<'a, E>(DenseDot<'a>, E);

impl<E: Element> Task for Typed<'_, E> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self(job, element) = self;
        let num_weight_rows = job.weights.len() / (job.cols * E::SIZE);
        let mut first = 0;
        while first + 4 <= num_weight_rows {
            all_rows::<S, E, 4>(simd, element, &job, first);
            first += 4;
        }
        for first in first..num_weight_rows {
            all_rows::<S, E, 1>(simd, element, &job, first);
        }
    }
}

#[inline(always)]
fn all_rows<S: Simd, E: Element, const WEIGHTS: usize>(
    simd: S,
    element: E,
    job: &DenseDot<'_>,
    first: usize,
) {
    let mut row = job.rows.start;
    while row + 4 <= job.rows.end {
        // SAFETY: weight rows `first..first + WEIGHTS` and rows `row..row + 4` exist.
        unsafe { dot::<S, E, WEIGHTS, 4>(simd, element, job, first, row) };
        row += 4;
    }
    while row + 2 <= job.rows.end {
        // SAFETY: weight rows `first..first + WEIGHTS` and rows `row..row + 2` exist.
        unsafe { dot::<S, E, WEIGHTS, 2>(simd, element, job, first, row) };
        row += 2;
    }
    if row < job.rows.end {
        // SAFETY: weight rows `first..first + WEIGHTS` and row `row` exist.
        unsafe { dot::<S, E, WEIGHTS, 1>(simd, element, job, first, row) };
    }
}

/// Makes `WEIGHTS` outputs for each of `ROWS` rows.
///
/// # Safety
///
/// The weight rows from `first` and the activation rows from `row` must exist, and the outputs
/// be writable.
#[inline(always)]
unsafe fn dot<S: Simd, E: Element, const WEIGHTS: usize, const ROWS: usize>(
    simd: S,
    element: E,
    job: &DenseDot<'_>,
    first: usize,
    row: usize,
) {
    let cols = job.cols;
    let mut acc = [[simd.splat(0.0); ROWS]; WEIGHTS];
    // SAFETY: columns below `cols` of the rows that the caller promises.
    unsafe {
        let weights = job.weights.as_ptr().add(first * cols * E::SIZE);
        let x = job.x.as_ptr().add(row * cols);
        let mut col = 0;
        while col + 16 <= cols {
            let mut xs = [simd.splat(0.0); ROWS];
            for (i, xs) in xs.iter_mut().enumerate() {
                *xs = simd.load(x.add(i * cols + col));
            }
            for (i, acc) in acc.iter_mut().enumerate() {
                let w = element.load(simd, weights.add((i * cols + col) * E::SIZE));
                for j in 0..ROWS {
                    acc[j] = simd.fma(w, xs[j], acc[j]);
                }
            }
            col += 16;
        }
        let left = cols - col;
        if left > 0 {
            for (i, acc) in acc.iter_mut().enumerate() {
                let w = element.load_part(simd, weights.add((i * cols + col) * E::SIZE), left);
                for (j, acc) in acc.iter_mut().enumerate() {
                    *acc = simd.fma(w, simd.load_part(x.add(j * cols + col), left), *acc);
                }
            }
        }
        for (i, acc) in acc.iter().enumerate() {
            let bias = job.bias.map_or(0.0, |bias| bias[first + i]);
            for (j, &acc) in acc.iter().enumerate() {
                let out = job.out.add((row + j) * job.out_stride + first + i);
                out.write(simd.reduce_add(acc) + bias);
            }
        }
    }
}
