//! A few f32 side by side, one a group of weights, for loops that a compiler turns into SIMD.
//!
//! Every operation is element-wise and none is fused, so results do not depend on the instruction
//! set, and a group's sums are taken in the order of its weights.

use std::ops::{Add, Div, Mul, Sub};

/// `N` numbers that go through the same steps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Lanes<const N: usize>(pub(super) [f32; N]);

impl<const N: usize> Lanes<N> {
    pub(super) const ZERO: Self = Self([0.0; N]);

    #[inline(always)]
    pub(super) fn splat(value: f32) -> Self {
        Self([value; N])
    }

    #[inline(always)]
    pub(super) fn map(self, step: impl Fn(f32) -> f32) -> Self {
        let mut result = self.0;
        for value in &mut result {
            *value = step(*value);
        }
        Self(result)
    }

    #[inline(always)]
    pub(super) fn zip(self, other: Self, step: impl Fn(f32, f32) -> f32) -> Self {
        let mut result = self.0;
        for (value, &other) in result.iter_mut().zip(&other.0) {
            *value = step(*value, other);
        }
        Self(result)
    }

    #[inline(always)]
    pub(super) fn abs(self) -> Self {
        self.map(f32::abs)
    }

    #[inline(always)]
    pub(super) fn min(self, other: Self) -> Self {
        self.zip(other, |a, b| if b < a { b } else { a })
    }

    #[inline(always)]
    pub(super) fn max(self, other: Self) -> Self {
        self.zip(other, |a, b| if b > a { b } else { a })
    }

    /// Rounds to the nearest whole number within `low..=high`, halves to the even one; what is not
    /// a number becomes `low`.
    #[inline(always)]
    pub(super) fn round_within(self, low: f32, high: f32) -> Self {
        self.map(|value| {
            let value = if value > low { value } else { low };
            round(if value < high { value } else { high })
        })
    }

    /// Returns `yes` where `other < self`, `no` elsewhere.
    #[inline(always)]
    pub(super) fn where_above(self, other: Self, yes: Self, no: Self) -> Self {
        let mut result = no.0;
        let lanes = result
            .iter_mut()
            .zip(&yes.0)
            .zip(self.0.iter().zip(&other.0));
        for ((result, &yes), (one, other)) in lanes {
            *result = if one > other { yes } else { *result };
        }
        Self(result)
    }
}

impl<const N: usize> Add for Lanes<N> {
    type Output = Self;
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        self.zip(other, |a, b| a + b)
    }
}

impl<const N: usize> Sub for Lanes<N> {
    type Output = Self;
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        self.zip(other, |a, b| a - b)
    }
}

impl<const N: usize> Mul for Lanes<N> {
    type Output = Self;
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        self.zip(other, |a, b| a * b)
    }
}

impl<const N: usize> Div for Lanes<N> {
    type Output = Self;
    #[inline(always)]
    fn div(self, other: Self) -> Self {
        self.zip(other, |a, b| a / b)
    }
}

/// Rounds a number below 2²² in size to the nearest whole one, halves to the even one: added to
/// 1.5 · 2²³, an f32 has no room for a fraction.
#[inline(always)]
pub(super) fn round(value: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0;
    (value + SHIFT) - SHIFT
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_goes_to_the_even_neighbour_and_stays_in_range() {
        let values = Lanes([-0.5, 0.5, 1.5, 2.5, 15.6, -3.0, f32::NAN, 1e30]);
        let rounded = values.round_within(0.0, 15.0);
        assert_eq!(rounded.0, [0.0, 0.0, 2.0, 2.0, 15.0, 0.0, 0.0, 15.0]);
        let signed = Lanes([-0.5, -1.5, -40.0, 31.4]).round_within(-32.0, 31.0);
        assert_eq!(signed.0, [0.0, -2.0, -32.0, 31.0]);
    }
}
