//! The arithmetic of a merge: `round(f32(W) + s·(f32(B)·f32(A)))`, for a block of rows.
//!
//! Every element is a sum over the rank in order, then one product with `s`, one addition and
//! one rounding, whatever the number of threads and the width of the SIMD registers: the same
//! inputs give the same bits on every machine. This is the arithmetic of PEFT on a CPU.

use candle_core::quantized::GgmlDType;
use rayon::prelude::*;

use super::{merged::Accumulate, simd};
use crate::weights::convert;

/// Values that a thread folds at a time: three f32 buffers of these stay in its L2 cache.
const GROUP_VALUES: usize = 48 * 1024;

/// Columns of the product made at a time, so that their part of `A` stays in the L1 cache.
const TILE_COLS: usize = 1024;

/// How much folding changed a tensor, over the values looked at so far.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct DeltaStats {
    /// Number of weights.
    pub num_values: u64,
    /// Number of weights whose stored bits differ from the base's.
    pub num_changed: u64,
    /// Largest absolute change before rounding.
    pub max_abs_delta: f32,
    /// Sum of squares of the changes before rounding.
    pub delta_squares: f64,
    /// Sum of squares of the base's weights.
    pub weight_squares: f64,
    /// Sum of squares of what rounding to the output's dtype took away.
    pub lost_squares: f64,
}

impl DeltaStats {
    /// Adds those of other values.
    pub fn add(&mut self, other: &Self) {
        self.num_values += other.num_values;
        self.num_changed += other.num_changed;
        self.max_abs_delta = self.max_abs_delta.max(other.max_abs_delta);
        self.delta_squares += other.delta_squares;
        self.weight_squares += other.weight_squares;
        self.lost_squares += other.lost_squares;
    }

    /// Returns `‖Δ‖ / ‖W‖`, 0 where nothing changed.
    pub fn relative_norm(&self) -> f64 {
        ratio_of_norms(self.delta_squares, self.weight_squares)
    }

    /// Returns the part of the change that rounding took away, `‖Δ_lost‖ / ‖Δ‖`.
    pub fn relative_loss(&self) -> f64 {
        ratio_of_norms(self.lost_squares, self.delta_squares)
    }
}

fn ratio_of_norms(part: f64, whole: f64) -> f64 {
    if part == 0.0 {
        0.0
    } else {
        (part / whole).sqrt()
    }
}

/// One `s·L·R` to add to a block of rows: `L` is `[rows, rank]`, `R` is `[rank, cols]`.
pub(super) struct LowRank {
    pub(super) left: Vec<f32>,
    pub(super) right: Vec<f32>,
    pub(super) rank: usize,
    pub(super) scale: f32,
    /// DoRA: the length that each row gets.
    pub(super) magnitude: Option<Vec<f32>>,
    /// DoRA on an embedding: what each column is multiplied by.
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
    /// [`NotFinite`] for a NaN, or a value too large for the output's dtype.
    pub(super) fn fold(&self) -> Result<(Vec<u8>, DeltaStats), NotFinite> {
        let group_rows = (GROUP_VALUES / self.cols).max(1);
        let rows = self.weight.len() / self.from.type_size() / self.cols;
        let row_bytes = self.cols * self.to.type_size();
        let mut bytes = vec![0; rows * row_bytes];
        let groups: Vec<Result<DeltaStats, NotFinite>> = bytes
            .par_chunks_mut(group_rows * row_bytes)
            .enumerate()
            .map(|(group, bytes)| simd::fold_group(self, group * group_rows, bytes))
            .collect();
        let mut stats = DeltaStats::default();
        for group in groups {
            stats.add(&group?);
        }
        Ok((bytes, stats))
    }

    /// Folds the rows from `first_row` on into `bytes`, which says how many.
    #[inline(always)]
    pub(super) fn fold_group(
        &self,
        first_row: usize,
        bytes: &mut [u8],
    ) -> Result<DeltaStats, NotFinite> {
        let num_values = bytes.len() / self.to.type_size();
        let start = first_row * self.cols * self.from.type_size();
        let base = &self.weight[start..start + num_values * self.from.type_size()];
        let mut weight = vec![0.0; num_values];
        convert::to_f32(self.from, base, &mut weight);
        let mut sum = weight.clone();
        let mut product = vec![0.0; num_values];
        match (self.accumulate, &self.deltas[..]) {
            (Accumulate::LlamaFactory, deltas) => {
                convert::round(self.to, &mut sum);
                for delta in deltas {
                    delta.product(first_row, self.cols, &mut product);
                    delta.apply(first_row, self.cols, &product, &mut sum);
                    convert::round(self.to, &mut sum);
                }
            }
            (Accumulate::Fp32, [delta]) => {
                delta.product(first_row, self.cols, &mut product);
                delta.apply(first_row, self.cols, &product, &mut sum);
            }
            (Accumulate::Fp32, deltas) => {
                let mut total = vec![0.0; num_values];
                for delta in deltas {
                    delta.product(first_row, self.cols, &mut product);
                    delta.apply(first_row, self.cols, &product, &mut total);
                }
                for (sum, total) in sum.iter_mut().zip(&total) {
                    *sum += total;
                }
            }
        }
        convert::from_f32(self.to, &sum, bytes);
        let mut rounded = product;
        convert::to_f32(self.to, bytes, &mut rounded);
        compare(&weight, &sum, &rounded)
    }
}

impl LowRank {
    /// Computes `L·R` of the rows from `first_row` on.
    #[inline(always)]
    fn product(&self, first_row: usize, cols: usize, product: &mut [f32]) {
        for start in (0..cols).step_by(TILE_COLS) {
            let end = (start + TILE_COLS).min(cols);
            for (i, row) in product.chunks_exact_mut(cols).enumerate() {
                let left = &self.left[(first_row + i) * self.rank..][..self.rank];
                let row = &mut row[start..end];
                row.fill(0.0);
                let (fours, rest) = left.as_chunks::<4>();
                for (k, factors) in fours.iter().enumerate() {
                    let right = |l: usize| &self.right[(4 * k + l) * cols..][start..end];
                    add_four(row, factors, [right(0), right(1), right(2), right(3)]);
                }
                for (l, factor) in rest.iter().enumerate() {
                    let right = &self.right[(4 * fours.len() + l) * cols..][start..end];
                    for (value, right) in row.iter_mut().zip(right) {
                        *value += factor * right;
                    }
                }
            }
        }
    }

    /// Adds the scaled product; with magnitudes, gives each row its length then.
    #[inline(always)]
    fn apply(&self, first_row: usize, cols: usize, product: &[f32], sum: &mut [f32]) {
        for (sum, product) in sum.iter_mut().zip(product) {
            *sum += self.scale * product;
        }
        if let Some(factors) = &self.column_factors {
            for row in sum.chunks_exact_mut(cols) {
                for (value, factor) in row.iter_mut().zip(factors) {
                    *value *= factor;
                }
            }
        }
        let Some(magnitude) = &self.magnitude else {
            return;
        };
        for (row, magnitude) in sum.chunks_exact_mut(cols).zip(&magnitude[first_row..]) {
            let squares: f64 = row.iter().map(|v| f64::from(*v) * f64::from(*v)).sum();
            let factor = magnitude / squares.sqrt() as f32;
            for value in row {
                *value *= factor;
            }
        }
    }
}

/// Adds four rows of `R`, in order, with one pass over the sums.
#[inline(always)]
fn add_four(row: &mut [f32], factors: &[f32; 4], right: [&[f32]; 4]) {
    let [r0, r1, r2, r3] = right.map(|right| &right[..row.len()]);
    for (j, value) in row.iter_mut().enumerate() {
        let mut sum = *value;
        sum += factors[0] * r0[j];
        sum += factors[1] * r1[j];
        sum += factors[2] * r2[j];
        sum += factors[3] * r3[j];
        *value = sum;
    }
}

/// Values whose sums are kept apart, so that the compiler can use SIMD for them.
const LANES: usize = 16;

/// Compares the base's values with those before and after rounding.
#[inline(always)]
fn compare(weight: &[f32], sum: &[f32], rounded: &[f32]) -> Result<DeltaStats, NotFinite> {
    let mut stats = DeltaStats {
        num_values: weight.len() as u64,
        ..DeltaStats::default()
    };
    let mut finite = true;
    // Sums of 1024 squares in f32 are exact enough for a report, and whole tensors are summed
    // in f64.
    for ((weight, sum), rounded) in (weight.chunks(1024))
        .zip(sum.chunks(1024))
        .zip(rounded.chunks(1024))
    {
        let mut lanes = Lanes::default();
        let (weights, weight) = weight.as_chunks::<LANES>();
        let (sums, sum) = sum.as_chunks::<LANES>();
        let (roundeds, rounded) = rounded.as_chunks::<LANES>();
        for ((weight, sum), rounded) in weights.iter().zip(sums).zip(roundeds) {
            lanes.add(weight, sum, rounded);
        }
        // The rest, filled up with zeros, which change nothing.
        let fill = |values: &[f32]| {
            let mut filled = [0.0; LANES];
            filled[..values.len()].copy_from_slice(values);
            filled
        };
        lanes.add(&fill(weight), &fill(sum), &fill(rounded));
        finite &= lanes.finish(&mut stats);
    }
    if finite { Ok(stats) } else { Err(NotFinite) }
}

#[derive(Default)]
struct Lanes {
    max: [f32; LANES],
    delta: [f32; LANES],
    weight: [f32; LANES],
    lost: [f32; LANES],
    changed: [u32; LANES],
    /// Bits of the exponents, `0x7f80_0000` as soon as a value was not finite.
    bad: [u32; LANES],
}

impl Lanes {
    #[inline(always)]
    fn add(&mut self, weight: &[f32; LANES], sum: &[f32; LANES], rounded: &[f32; LANES]) {
        for l in 0..LANES {
            let delta = sum[l] - weight[l];
            let lost = sum[l] - rounded[l];
            self.max[l] = if delta.abs() > self.max[l] {
                delta.abs()
            } else {
                self.max[l]
            };
            self.delta[l] += delta * delta;
            self.weight[l] += weight[l] * weight[l];
            self.lost[l] += lost * lost;
            self.changed[l] += u32::from(rounded[l].to_bits() != weight[l].to_bits());
            self.bad[l] |= u32::from(!sum[l].is_finite()) | u32::from(!rounded[l].is_finite());
        }
    }

    /// Adds up the lanes; returns whether all values were finite.
    #[inline(always)]
    fn finish(&self, stats: &mut DeltaStats) -> bool {
        for l in 0..LANES {
            stats.max_abs_delta = stats.max_abs_delta.max(self.max[l]);
            stats.delta_squares += f64::from(self.delta[l]);
            stats.weight_squares += f64::from(self.weight[l]);
            stats.lost_squares += f64::from(self.lost[l]);
            stats.num_changed += u64::from(self.changed[l]);
        }
        self.bad.iter().all(|bad| *bad == 0)
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
            right: values(rank * cols, 2),
            rank,
            scale,
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
    fn one_rounding_differs_from_one_after_each_adapter() {
        // 1 + 3/8 ulp, twice: rounded once it goes up, rounded twice it never leaves 1.
        let ulp = 2.0_f32.powi(-7);
        let delta = || LowRank {
            left: vec![1.0],
            right: vec![0.375 * ulp],
            rank: 1,
            scale: 1.0,
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
        block.fold_group(0, &mut plain).unwrap();
        simd::fold_group(&block, 0, &mut wide).unwrap();
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
