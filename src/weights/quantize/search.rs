//! The searches for the scale (and offset) of a group of weights that lose least.
//!
//! What llama.cpp's `make_qkx2_quants` and `make_qx_quants` (`ggml-quants.c`) look for, without an
//! importance matrix: rounding to a grid, then the least-squares scale for what was rounded to,
//! for several grids; the best by weighted squared error stays. Groups lie in lanes, so that all
//! groups of a block are searched at once.

use super::lanes::Lanes;

/// Codes without an offset go from `-HALF` to `HALF - 1`.
const HALF: f32 = 32.0;

/// Below this a group counts as zeros.
const SMALLEST: f32 = 1e-15;

/// The grids that a search for scale and offset tries: `(codes + first + i * step) / range`.
#[derive(Clone, Copy)]
pub(super) struct Grids {
    /// Largest code.
    pub(super) max_code: f32,
    pub(super) first: f32,
    pub(super) step: f32,
    /// How many, besides the plain one.
    pub(super) count: u32,
}

/// `weight ≈ scale * code - offset`, with `offset >= 0`.
#[derive(Clone, Copy)]
pub(super) struct ScaleAndOffset<const N: usize> {
    pub(super) scale: Lanes<N>,
    pub(super) offset: Lanes<N>,
}

/// Finds scale and offset of `N` groups of 32 weights, `weights[i]` being the `i`th of each.
///
/// An error counts by `rms + |weight|`: large weights matter more.
#[inline(always)]
pub(super) fn scale_and_offset<const N: usize>(
    weights: &[Lanes<N>; 32],
    grids: Grids,
) -> ScaleAndOffset<N> {
    let Grids {
        max_code,
        first,
        step,
        count,
    } = grids;
    let importance = importance(weights);
    let (mut low, mut high) = (weights[0], weights[0]);
    let (mut sum_w, mut sum_x) = (Lanes::ZERO, Lanes::ZERO);
    for (&x, &w) in weights.iter().zip(&importance) {
        (low, high) = (low.min(x), high.max(x));
        sum_w = sum_w + w;
        sum_x = sum_x + w * x;
    }
    low = low.min(Lanes::ZERO);
    let flat = low;
    let range = high - low;

    let mut scale = range.map(|range| 1.0 / (max_code / range));
    let plain = range.map(|range| max_code / range);
    let mut best = Lanes::ZERO;
    for (&x, &w) in weights.iter().zip(&importance) {
        let code = (plain * (x - low)).round_within(0.0, max_code);
        let off = scale * code + low - x;
        best = best + w * (off * off);
    }
    for index in 0..=count {
        let grid = first + step * index as f32 + max_code;
        let inverse = (high - low).map(|range| grid / range);
        let mut codes = [Lanes::ZERO; 32];
        let (mut sum_l, mut sum_l2, mut sum_xl) = (Lanes::ZERO, Lanes::ZERO, Lanes::ZERO);
        for ((code, &x), &w) in codes.iter_mut().zip(weights).zip(&importance) {
            let l = (inverse * (x - low)).round_within(0.0, max_code);
            *code = l;
            let wl = w * l;
            sum_l = sum_l + wl;
            sum_l2 = sum_l2 + wl * l;
            sum_xl = sum_xl + wl * x;
        }
        // Least squares of `w (scale l + min - x)²` in scale and min; a min above zero is not
        // representable, then scale alone.
        let determinant = sum_w * sum_l2 - sum_l * sum_l;
        let free_min = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
        let free_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant;
        let new_scale = free_min.where_above(Lanes::ZERO, sum_xl / sum_l2, free_scale);
        let new_min = free_min.where_above(Lanes::ZERO, Lanes::ZERO, free_min);
        let mut error = Lanes::ZERO;
        for ((&l, &x), &w) in codes.iter().zip(weights).zip(&importance) {
            let off = new_scale * l + new_min - x;
            error = error + w * (off * off);
        }
        // Of a determinant of zero comes no solution.
        let error = determinant.where_above(Lanes::ZERO, error, Lanes::splat(f32::INFINITY));
        scale = best.where_above(error, new_scale, scale);
        low = best.where_above(error, new_min, low);
        best = best.where_above(error, error, best);
    }
    // Groups of one value: all codes 0, the offset says everything.
    let zero = Lanes::ZERO;
    ScaleAndOffset {
        scale: range.where_above(zero, scale, zero),
        offset: zero - range.where_above(zero, low, flat),
    }
}

/// Returns how much the errors of the weights count.
#[inline(always)]
fn importance<const N: usize>(weights: &[Lanes<N>; 32]) -> [Lanes<N>; 32] {
    let mut squares = Lanes::ZERO;
    for &x in weights {
        squares = squares + x * x;
    }
    let rms = squares.map(|sum| (sum / 32.0).sqrt());
    let mut importance = *weights;
    for value in &mut importance {
        *value = rms + value.abs();
    }
    importance
}

/// Finds the scale of `N` groups of 16 weights, `weight ≈ scale * code` with codes in
/// `-32..=31`; an error counts by the square of its weight.
#[inline(always)]
pub(super) fn scale<const N: usize>(weights: &[Lanes<N>; 16]) -> Lanes<N> {
    let (mut largest, mut size) = (Lanes::ZERO, Lanes::ZERO);
    for &x in weights {
        let found = x.abs();
        largest = found.where_above(size, x, largest);
        size = found.where_above(size, found, size);
    }
    let (sum_xl, sum_l2) = fit(weights, largest, HALF);
    let mut scale = sum_l2.where_above(Lanes::ZERO, sum_xl / sum_l2, Lanes::ZERO);
    let mut best = scale * sum_xl;
    for index in (-9_i32..=9).filter(|index| *index != 0) {
        let (sum_xl, sum_l2) = fit(weights, largest, HALF + 0.1 * index as f32);
        // The squared error falls by `sum_xl² / sum_l2`; compared without the division.
        let better = (sum_xl * sum_xl).where_above(best * sum_l2, sum_l2, Lanes::ZERO);
        let new = sum_xl / sum_l2;
        scale = better.where_above(Lanes::ZERO, new, scale);
        best = better.where_above(Lanes::ZERO, new * sum_xl, best);
    }
    let smallest = Lanes::splat(SMALLEST);
    // Not `size > smallest`: a group of exactly that size is kept.
    smallest.where_above(size, Lanes::ZERO, scale)
}

/// Rounds weights to a grid that puts the largest at `-grid`; returns the sums whose quotient is
/// the least-squares scale.
#[inline(always)]
fn fit<const N: usize>(
    weights: &[Lanes<N>; 16],
    largest: Lanes<N>,
    grid: f32,
) -> (Lanes<N>, Lanes<N>) {
    let inverse = Lanes::splat(-grid) / largest;
    let (mut sum_xl, mut sum_l2) = (Lanes::ZERO, Lanes::ZERO);
    for &x in weights {
        let l = (inverse * x).round_within(-HALF, HALF - 1.0);
        let w = x * x;
        sum_xl = sum_xl + w * x * l;
        sum_l2 = sum_l2 + w * l * l;
    }
    (sum_xl, sum_l2)
}
