//! How much a merge changes weights, counted beside the arithmetic in SIMD lanes.

use candle_core::quantized::GgmlDType;

use crate::weights::convert;

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

/// Values whose sums are kept apart, so that the compiler can use SIMD for them.
const LANES: usize = 16;

/// Counts over a few thousand values: their squares are summed in f32, whose error is far below
/// what a report shows, whole tensors in f64.
#[derive(Default)]
pub(super) struct Lanes {
    /// Bits without sign, which order as the numbers do, here and in `largest`.
    max_delta: [u32; LANES],
    delta: [f32; LANES],
    weight: [f32; LANES],
    lost: [f32; LANES],
    changed: [u32; LANES],
    largest: [u32; LANES],
}

impl Lanes {
    /// Compares the base's values with those before and after rounding.
    #[inline(always)]
    pub(super) fn compare(&mut self, weight: &[f32], sum: &[f32], rounded: &[f32]) {
        let (weights, weight) = weight.as_chunks::<LANES>();
        let (sums, sum) = sum.as_chunks::<LANES>();
        let (roundeds, rounded) = rounded.as_chunks::<LANES>();
        for ((weight, sum), rounded) in weights.iter().zip(sums).zip(roundeds) {
            self.add(weight, sum, rounded);
        }
        if weight.is_empty() {
            return;
        }
        // The rest, filled up with zeros, which change nothing.
        let fill = |values: &[f32]| {
            let mut filled = [0.0; LANES];
            filled[..values.len()].copy_from_slice(values);
            filled
        };
        self.add(&fill(weight), &fill(sum), &fill(rounded));
    }

    #[inline(always)]
    fn add(&mut self, weight: &[f32; LANES], sum: &[f32; LANES], rounded: &[f32; LANES]) {
        for l in 0..LANES {
            let delta = sum[l] - weight[l];
            let lost = sum[l] - rounded[l];
            self.max_delta[l] = self.max_delta[l].max(delta.abs().to_bits());
            self.largest[l] = self.largest[l].max(sum[l].abs().to_bits());
            self.delta[l] += delta * delta;
            self.weight[l] += weight[l] * weight[l];
            self.lost[l] += lost * lost;
            self.changed[l] += u32::from(rounded[l].to_bits() != weight[l].to_bits());
        }
    }

    /// Adds up the lanes; returns whether all sums are finite numbers of `dtype`.
    #[inline(always)]
    pub(super) fn finish(&self, dtype: GgmlDType, stats: &mut DeltaStats) -> bool {
        for l in 0..LANES {
            let max_delta = f32::from_bits(self.max_delta[l]);
            stats.max_abs_delta = stats.max_abs_delta.max(max_delta);
            stats.delta_squares += f64::from(self.delta[l]);
            stats.weight_squares += f64::from(self.weight[l]);
            stats.lost_squares += f64::from(self.lost[l]);
            stats.num_changed += u64::from(self.changed[l]);
        }
        let overflow = convert::overflow_bits(dtype);
        self.largest.iter().all(|bits| *bits < overflow)
    }
}
