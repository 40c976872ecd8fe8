//! Floating point as PTX has it where Rust's differs.

/// The NaN that instructions return.
pub(super) const NAN: f32 = f32::from_bits(0x7fff_ffff);
/// The same in `f64`.
const NAN64: f64 = f64::from_bits(0x7fff_ffff_ffff_ffff);

/// Returns zero with the sign of a denormal, else the value: `.ftz`.
#[inline(always)]
pub(super) fn flush(value: f32) -> f32 {
    let bits = value.to_bits();
    f32::from_bits(if bits & 0x7f80_0000 == 0 {
        bits & 0x8000_0000
    } else {
        bits
    })
}

/// The same for `f64`.
#[inline(always)]
pub(super) fn flush64(value: f64) -> f64 {
    let bits = value.to_bits();
    f64::from_bits(if bits & 0x7ff0_0000_0000_0000 == 0 {
        bits & 1 << 63
    } else {
        bits
    })
}

/// Clamps to 0 to 1; NaN becomes 0: `.sat`.
#[inline(always)]
pub(super) fn saturate(value: f32) -> f32 {
    if value > 0.0 {
        if value < 1.0 { value } else { 1.0 }
    } else {
        0.0
    }
}

macro_rules! extremes {
    ($type:ty, $min:ident, $max:ident, $nan:expr) => {
        /// Returns the smaller number; -0 is below +0.
        #[inline(always)]
        pub(super) fn $min(x: $type, y: $type) -> $type {
            let smaller = if x < y || (x == y && x.is_sign_negative()) {
                x
            } else {
                y
            };
            if x.is_nan() {
                if y.is_nan() { $nan } else { y }
            } else if y.is_nan() {
                x
            } else {
                smaller
            }
        }
        /// Returns the larger number; +0 is above -0.
        #[inline(always)]
        pub(super) fn $max(x: $type, y: $type) -> $type {
            let larger = if x > y || (x == y && x.is_sign_positive()) {
                x
            } else {
                y
            };
            if x.is_nan() {
                if y.is_nan() { $nan } else { y }
            } else if y.is_nan() {
                x
            } else {
                larger
            }
        }
    };
}
extremes!(f32, min, max, NAN);
extremes!(f64, min64, max64, NAN64);

/// Returns 1 / √x.
#[inline(always)]
pub(super) fn reciprocal_root(x: f32) -> f32 {
    (1.0 / f64::from(x).sqrt()) as f32
}

/// Returns 2^x, rounded from a polynomial in `f64` whose relative error is below 2^-34.
///
/// 2^x = 2^n e^(f ln 2) where n is the integer nearest to x and |f| <= 1/2; the exponential's series ends after
/// the 9th power: (ln 2 / 2)^10 / 10! = 7e-12.
#[inline(always)]
pub(super) fn exp2(x: f32) -> f32 {
    // Beyond these the result is infinite or zero.
    let clamped = x.clamp(-200.0, 200.0);
    let integer = (clamped + 0.5).floor();
    let t = f64::from(clamped - integer) * std::f64::consts::LN_2;
    let mut sum = 1.0 / 362_880.0;
    for factorial in [40_320.0, 5_040.0, 720.0, 120.0, 24.0, 6.0, 2.0, 1.0, 1.0] {
        sum = f64::mul_add(sum, t, 1.0 / factorial);
    }
    // SAFETY: between -200 and 200 except for NaN, which is replaced below.
    let exponent = unsafe { if x.is_nan() { 0.0_f32 } else { integer }.to_int_unchecked::<i32>() };
    let scale = f64::from_bits(((exponent + 1023) as u64) << 52);
    let result = (sum * scale) as f32;
    if x.is_nan() { NAN } else { result }
}

#[cfg(test)]
mod tests {
    use super::{exp2, flush, max, min, saturate};

    #[test]
    fn exp2_is_within_one_ulp_of_the_exact_value() {
        for index in -60_000..60_000 {
            let x = index as f32 * 0.0031;
            let exact = f64::from(x).exp2() as f32;
            let distance = i64::from(exp2(x).to_bits()) - i64::from(exact.to_bits());
            assert!(distance.abs() <= 1, "2^{x} is {}, wanted {exact}", exp2(x));
        }
        assert_eq!(exp2(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp2(f32::NEG_INFINITY), 0.0);
        assert!(exp2(f32::NAN).is_nan());
        assert_eq!(exp2(-3.0), 0.125);
    }

    #[test]
    fn extremes_prefer_numbers_and_order_zeros() {
        assert_eq!(max(f32::NAN, 1.0), 1.0);
        assert_eq!(min(1.0, f32::NAN), 1.0);
        assert_eq!(max(f32::NAN, f32::NAN).to_bits(), 0x7fff_ffff);
        assert_eq!(max(-0.0, 0.0).to_bits(), 0);
        assert_eq!(min(0.0, -0.0).to_bits(), 0x8000_0000);
    }

    #[test]
    fn denormals_are_flushed_and_values_saturated() {
        assert_eq!(flush(-1e-40).to_bits(), 0x8000_0000);
        assert_eq!(flush(f32::MIN_POSITIVE), f32::MIN_POSITIVE);
        assert_eq!(saturate(f32::NAN), 0.0);
        assert_eq!(saturate(2.0), 1.0);
        assert_eq!(saturate(0.25), 0.25);
    }
}
