//! The arithmetic of a merge: `round(f32(W) + s·(f32(B)·f32(A)))`, for a block of rows.
//!
//! Every element is a sum over the rank in order, then one product with `s` (and one with the
//! adapter's weight, if it has one), one addition and one rounding, whatever the number of threads
//! and the width of the SIMD registers: the same inputs give the same bits on every machine. This
//! is the arithmetic of PEFT on a CPU.

use std::{ops::Range, sync::Arc};

use candle_core::quantized::GgmlDType;
use rayon::prelude::*;

use super::{
    merged::Accumulate,
    norm::row_norm,
    simd,
    stats::{DeltaStats, Lanes},
};
use crate::weights::convert;

/// Values that a thread folds at a time, about.
const GROUP_VALUES: usize = 128 * 1024;

/// Rows whose products are made together.
const STRIP_ROWS: usize = 4;

/// Columns of a strip: its buffers and its part of `A` stay in the L2 cache, and its rows are
/// long enough for the processor to read ahead.
const STRIP_COLS: usize = 2048;

/// Columns whose sums are held in registers.
const STEP: usize = 32;

/// One `w·(s·L·R)` to add to a block of rows: `L` is `[rows, rank]`, `R` is `[rank, cols]`.
pub(super) struct LowRank {
    pub(super) left: Vec<f32>,
    /// The same for all blocks of a tensor.
    pub(super) right: Arc<Vec<f32>>,
    pub(super) rank: usize,
    pub(super) scale: f32,
    /// What the scaled product is multiplied by: the weight of PEFT's delta in a sum of several.
    pub(super) weight: f32,
    /// DoRA: the length that each row gets.
    pub(super) magnitude: Option<Vec<f32>>,
    /// DoRA by columns: what each is multiplied by.
    pub(super) column_factors: Option<Vec<f32>>,
}

/// A block of whole rows and what is added to it.
pub(super) struct Block<'a> {
    /// The rows in the base, little endian.
    pub(super) weight: &'a [u8],
    pub(super) from: GgmlDType,
    pub(super) to: GgmlDType,
    pub(super) cols: usize,
    /// In the order of the adapters.
    pub(super) deltas: Vec<LowRank>,
    pub(super) accumulate: Accumulate,
}

/// A value that is not finite came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct NotFinite;

impl Block<'_> {
    /// Returns the folded rows in the output's dtype, and how much they changed.
    ///
    /// # Errors
    /// As [`fold_into`](Self::fold_into).
    pub(super) fn fold(&self) -> Result<(Vec<u8>, DeltaStats), NotFinite> {
        let values = self.weight.len() / self.from.type_size();
        let mut bytes = vec![0; values * self.to.type_size()];
        let stats = self.fold_into(&mut bytes)?;
        Ok((bytes, stats))
    }

    /// Writes the folded rows into `bytes`, in the output's dtype, on all cores.
    ///
    /// # Errors
    /// [`NotFinite`] for a NaN, or a value too large for the output's dtype.
    pub(super) fn fold_into(&self, bytes: &mut [u8]) -> Result<DeltaStats, NotFinite> {
        // Whole strips, so that only the last group has rows left over.
        let group_rows = (GROUP_VALUES / self.cols)
            .max(1)
            .next_multiple_of(STRIP_ROWS);
        let group_bytes = group_rows * self.cols * self.to.type_size();
        let groups: Vec<Result<DeltaStats, NotFinite>> = bytes
            .par_chunks_mut(group_bytes)
            .enumerate()
            .map_init(
                || Buffers::new(self.strip_cols(), self.deltas.len()),
                |buffers, (group, bytes)| {
                    simd::fold_group(self, group * group_rows, bytes, buffers)
                },
            )
            .collect();
        let mut stats = DeltaStats::default();
        for group in groups {
            stats.add(&group?);
        }
        Ok(stats)
    }

    fn strip_cols(&self) -> usize {
        // A row that gets a length is needed as a whole.
        match self.deltas.iter().any(|delta| delta.magnitude.is_some()) {
            true => self.cols,
            false => self.cols.min(STRIP_COLS),
        }
    }

    /// Folds the rows from `first_row` on into `bytes`, which says how many.
    #[inline(always)]
    pub(super) fn fold_group(
        &self,
        first_row: usize,
        bytes: &mut [u8],
        buffers: &mut Buffers,
    ) -> Result<DeltaStats, NotFinite> {
        let width = self.strip_cols();
        let row_bytes = self.cols * self.to.type_size();
        let mut stats = DeltaStats {
            num_values: (bytes.len() / self.to.type_size()) as u64,
            ..DeltaStats::default()
        };
        let mut finite = true;
        for start in (0..self.cols).step_by(width) {
            for (i, bytes) in bytes.chunks_mut(STRIP_ROWS * row_bytes).enumerate() {
                let strip = Strip {
                    row: first_row + STRIP_ROWS * i,
                    num_rows: bytes.len() / row_bytes,
                    cols: start..(start + width).min(self.cols),
                };
                self.sum_strip(&strip, buffers);
                let lanes = self.round_strip(&strip, buffers, bytes);
                finite &= lanes.finish(self.to, &mut stats);
            }
        }
        if finite { Ok(stats) } else { Err(NotFinite) }
    }

    /// Returns the base's values of one row of a strip, little endian.
    #[inline(always)]
    fn base_row(&self, strip: &Strip, row: usize) -> &[u8] {
        let size = self.from.type_size();
        let start = ((strip.row + row) * self.cols + strip.cols.start) * size;
        &self.weight[start..start + strip.cols.len() * size]
    }

    /// Adds all deltas to the weights of a strip.
    #[inline(always)]
    fn sum_strip(&self, strip: &Strip, buffers: &mut Buffers) {
        let num_values = strip.num_rows * strip.cols.len();
        let sum = &mut buffers.sum[..num_values];
        let product = &mut buffers.product[..num_values];
        for (row, sum) in sum.chunks_exact_mut(strip.cols.len()).enumerate() {
            convert::to_f32(self.from, self.base_row(strip, row), sum);
        }
        match (self.accumulate, &self.deltas[..]) {
            (Accumulate::LlamaFactory, deltas) => {
                convert::round(self.to, sum);
                for delta in deltas {
                    delta.product(self.cols, strip, product);
                    delta.apply(strip, product, sum);
                    convert::round(self.to, sum);
                }
            }
            (Accumulate::Fp32, []) => {}
            (Accumulate::Fp32, [delta]) => {
                delta.product(self.cols, strip, product);
                delta.apply(strip, product, sum);
            }
            (Accumulate::Fp32, deltas) => {
                let total = &mut buffers.total[..num_values];
                total.fill(0.0);
                for delta in deltas {
                    delta.product(self.cols, strip, product);
                    delta.apply(strip, product, total);
                }
                for (sum, total) in sum.iter_mut().zip(&*total) {
                    *sum += total;
                }
            }
        }
    }

    /// Rounds the sums of a strip into the rows of `bytes`, and compares them with the base's.
    #[inline(always)]
    fn round_strip(&self, strip: &Strip, buffers: &mut Buffers, bytes: &mut [u8]) -> Lanes {
        let width = strip.cols.len();
        let size = self.to.type_size();
        let weight = &mut buffers.weight[..width];
        let rounded = &mut buffers.rounded[..width];
        let mut lanes = Lanes::default();
        let rows = bytes.chunks_exact_mut(self.cols * size);
        for (row, (sum, bytes)) in buffers.sum.chunks_exact(width).zip(rows).enumerate() {
            let bytes = &mut bytes[strip.cols.start * size..strip.cols.end * size];
            convert::from_f32(self.to, sum, bytes);
            convert::to_f32(self.to, bytes, rounded);
            convert::to_f32(self.from, self.base_row(strip, row), weight);
            lanes.compare(weight, sum, rounded);
        }
        lanes
    }
}

/// A few rows of a block, of which some columns are folded at a time.
struct Strip {
    /// The first row, counted in the block.
    row: usize,
    num_rows: usize,
    cols: Range<usize>,
}

/// The values of a strip on their way; of `weight` and `rounded`, one row at a time.
pub(super) struct Buffers {
    sum: Vec<f32>,
    product: Vec<f32>,
    /// Used with several deltas only.
    total: Vec<f32>,
    weight: Vec<f32>,
    rounded: Vec<f32>,
}

impl Buffers {
    fn new(width: usize, num_deltas: usize) -> Self {
        let strip = || vec![0.0; STRIP_ROWS * width];
        Self {
            sum: strip(),
            product: strip(),
            total: if num_deltas > 1 { strip() } else { Vec::new() },
            weight: vec![0.0; width],
            rounded: vec![0.0; width],
        }
    }
}

impl LowRank {
    /// Computes `L·R` of a strip. `num_cols` is the width of the whole block.
    #[inline(always)]
    fn product(&self, num_cols: usize, strip: &Strip, product: &mut [f32]) {
        let width = strip.cols.len();
        let left = |row: usize| &self.left[(strip.row + row) * self.rank..][..self.rank];
        let right = |k: usize, start: usize| &self.right[k * num_cols + strip.cols.start + start..];
        let mut done = 0;
        if strip.num_rows == STRIP_ROWS {
            let left: [&[f32]; STRIP_ROWS] = std::array::from_fn(left);
            while done + STEP <= width {
                // Four rows share what is loaded of `R`; their sums stay in registers, which
                // the compiler does only for arrays with names of their own.
                let [mut s0, mut s1, mut s2, mut s3] = [[0.0; STEP]; STRIP_ROWS];
                for k in 0..self.rank {
                    let Some(right) = right(k, done).first_chunk() else {
                        break;
                    };
                    let [f0, f1, f2, f3] = left.map(|row| row[k]);
                    add_scaled(&mut s0, f0, right);
                    add_scaled(&mut s1, f1, right);
                    add_scaled(&mut s2, f2, right);
                    add_scaled(&mut s3, f3, right);
                }
                for (row, sums) in [s0, s1, s2, s3].iter().enumerate() {
                    product[row * width + done..][..STEP].copy_from_slice(sums);
                }
                done += STEP;
            }
        }
        for (row, product) in product.chunks_exact_mut(width).enumerate() {
            let product = &mut product[done..];
            product.fill(0.0);
            for (k, factor) in left(row).iter().enumerate() {
                for (value, right) in product.iter_mut().zip(right(k, done)) {
                    *value += factor * right;
                }
            }
        }
    }

    /// Adds the scaled product; with magnitudes, gives each row its length then.
    #[inline(always)]
    fn apply(&self, strip: &Strip, product: &[f32], sum: &mut [f32]) {
        if self.weight == 1.0 {
            for (sum, product) in sum.iter_mut().zip(product) {
                *sum += self.scale * product;
            }
        } else {
            for (sum, product) in sum.iter_mut().zip(product) {
                *sum += self.weight * (self.scale * product);
            }
        }
        if let Some(factors) = &self.column_factors {
            for row in sum.chunks_exact_mut(strip.cols.len()) {
                for (value, factor) in row.iter_mut().zip(&factors[strip.cols.clone()]) {
                    *value *= factor;
                }
            }
        }
        let Some(magnitude) = &self.magnitude else {
            return;
        };
        let rows = sum.chunks_exact_mut(strip.cols.len());
        for (row, magnitude) in rows.zip(&magnitude[strip.row..]) {
            let factor = magnitude / row_norm(row);
            for value in row {
                *value *= factor;
            }
        }
    }
}

/// Adds a multiple of some columns of a row of `R`.
#[inline(always)]
fn add_scaled(sums: &mut [f32; STEP], factor: f32, right: &[f32; STEP]) {
    for (sum, right) in sums.iter_mut().zip(right) {
        *sum += factor * right;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn f32_bytes(values: &[f32]) -> Vec<u8> {
        values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect()
    }

    fn values(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        (0..count)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect()
    }

    fn low_rank(rows: usize, cols: usize, rank: usize, scale: f32) -> LowRank {
        LowRank {
            left: values(rows * rank, 1),
            right: Arc::new(values(rank * cols, 2)),
            rank,
            scale,
            weight: 1.0,
            magnitude: None,
            column_factors: None,
        }
    }

    #[test]
    fn folding_agrees_with_f64_to_the_last_bits() {
        for (rows, cols, rank) in [(3, 5, 1), (70, 1500, 7), (1, 2049, 8), (300, 1, 1)] {
            let weight = values(rows * cols, 3);
            let delta = low_rank(rows, cols, rank, 0.5);
            let exact: Vec<f64> = (0..rows * cols)
                .map(|i| {
                    let (row, col) = (i / cols, i % cols);
                    let product: f64 = (0..rank)
                        .map(|k| {
                            f64::from(delta.left[row * rank + k])
                                * f64::from(delta.right[k * cols + col])
                        })
                        .sum();
                    f64::from(weight[i]) + 0.5 * product
                })
                .collect();
            let bytes = f32_bytes(&weight);
            let block = Block {
                weight: &bytes,
                from: GgmlDType::F32,
                to: GgmlDType::F32,
                cols,
                deltas: vec![delta],
                accumulate: Accumulate::Fp32,
            };
            let (folded, stats) = block.fold().unwrap();
            for (got, want) in convert::values(GgmlDType::F32, &folded).iter().zip(&exact) {
                assert!((f64::from(*got) - want).abs() < 1e-6, "{got} {want}");
            }
            let squares: f64 = (exact.iter().zip(&weight))
                .map(|(sum, weight)| (sum - f64::from(*weight)).powi(2))
                .sum();
            assert!((stats.delta_squares / squares - 1.0).abs() < 1e-4);
            assert_eq!(stats.num_values, (rows * cols) as u64);
            assert_eq!(stats.lost_squares, 0.0);
        }
    }

    #[test]
    fn a_weight_is_a_product_of_its_own_as_it_is_of_a_delta_of_peft() {
        let cols = 200;
        let weight = f32_bytes(&vec![0.0; cols]);
        let (scale, adapter_weight) = (0.7, 0.3);
        let delta = LowRank {
            weight: adapter_weight,
            left: vec![1.0],
            ..low_rank(1, cols, 1, scale)
        };
        let products = values(cols, 2);
        let block = Block {
            weight: &weight,
            from: GgmlDType::F32,
            to: GgmlDType::F32,
            cols,
            deltas: vec![delta],
            accumulate: Accumulate::Fp32,
        };
        let (folded, _) = block.fold().unwrap();
        let folded = convert::values(GgmlDType::F32, &folded);
        let separately = products.iter().map(|it| adapter_weight * (scale * it));
        assert!(folded.iter().copied().eq(separately));
        let together = products.iter().map(|it| adapter_weight * scale * it);
        assert!(!folded.iter().copied().eq(together));
    }

    #[test]
    fn one_rounding_differs_from_one_after_each_adapter() {
        // 1 + 3/8 ulp, twice: rounded once it goes up, rounded twice it never leaves 1.
        let ulp = 2.0_f32.powi(-7);
        let delta = || LowRank {
            left: vec![1.0],
            right: Arc::new(vec![0.375 * ulp]),
            rank: 1,
            scale: 1.0,
            weight: 1.0,
            magnitude: None,
            column_factors: None,
        };
        let one = half::bf16::ONE.to_le_bytes();
        let fold = |accumulate| {
            let block = Block {
                weight: &one,
                from: GgmlDType::BF16,
                to: GgmlDType::BF16,
                cols: 1,
                deltas: vec![delta(), delta()],
                accumulate,
            };
            convert::values(GgmlDType::BF16, &block.fold().unwrap().0)[0]
        };
        assert_eq!(fold(Accumulate::Fp32), 1.0 + ulp);
        assert_eq!(fold(Accumulate::LlamaFactory), 1.0);
    }

    #[test]
    fn every_simd_level_gives_the_same_bits() {
        let (rows, cols) = (9, 333);
        let weight = f32_bytes(&values(rows * cols, 3));
        let mut delta = low_rank(rows, cols, 6, 0.7);
        delta.magnitude = Some(values(rows, 4));
        let block = Block {
            weight: &weight,
            from: GgmlDType::F32,
            to: GgmlDType::BF16,
            cols,
            deltas: vec![delta],
            accumulate: Accumulate::Fp32,
        };
        let mut plain = vec![0; rows * cols * 2];
        let mut wide = plain.clone();
        let mut buffers = Buffers::new(block.strip_cols(), 1);
        block.fold_group(0, &mut plain, &mut buffers).unwrap();
        simd::fold_group(&block, 0, &mut wide, &mut buffers).unwrap();
        assert_eq!(plain, wide);
    }

    #[test]
    fn overflow_and_nan_are_found() {
        for (value, to) in [(70_000.0, GgmlDType::F16), (f32::NAN, GgmlDType::BF16)] {
            let weight = f32_bytes(&[1.0, value]);
            let block = Block {
                weight: &weight,
                from: GgmlDType::F32,
                to,
                cols: 2,
                deltas: Vec::new(),
                accumulate: Accumulate::Fp32,
            };
            assert_eq!(block.fold().unwrap_err(), NotFinite);
        }
    }
}
