//! E4M3 on the host: the 8-bit floats of an FP8 cache.
//!
//! A sign, 4 bits of exponent (bias 7), 3 of mantissa; the greatest finite value is 448, there is no
//! infinity, and all bits but the sign set are not a number (OCP 8-bit Floating Point Specification,
//! revision 1.0). Rounds as the GPU's `cvt.rn.satfinite.e4m3x2.f32` does. `simd` reads 16 at a time.

/// The greatest finite value.
const MAX: f32 = 448.0;
/// The smallest value with a leading one.
const MIN_NORMAL: f32 = 0.015_625;
/// 2^14, where neighbouring `f32` are 2^-9 apart, as the smallest E4M3 are.
const SUBNORMAL_SHIFTER: f32 = 16384.0;
/// All bits but the sign: not a number.
const NAN: u32 = 0x7f;
/// What the exponents' biases, 127 and 7, differ by, as it is seen beside 3 bits of mantissa.
const REBIAS: u32 = (127 - 7) << 3;
/// 2^120: what an E4M3 whose bits are read as the upper ones of an `f32` lacks.
const UNBIAS: f32 = f32::from_bits((127 + 120) << 23);

/// Returns the nearest E4M3, of two as near the even one; ±448 for all that is larger, and not a
/// number for not a number.
#[inline(always)]
pub(super) fn from_f32(value: f32) -> u8 {
    let bits = value.to_bits();
    let magnitude = bits & 0x7fff_ffff;
    // Not a number becomes the greatest here and is put right at the end.
    let clamped = f32::from_bits(magnitude).min(MAX);
    // Of 23 bits of mantissa 20 go: half of the last kept bit is added, less one where that bit is 0,
    // and a carry moves the exponent as it should.
    let clamped_bits = clamped.to_bits();
    let rounded = clamped_bits + 0x7_ffff + (clamped_bits >> 20 & 1);
    let normal = (rounded >> 20).wrapping_sub(REBIAS);
    let subnormal = (clamped + SUBNORMAL_SHIFTER).to_bits() - SUBNORMAL_SHIFTER.to_bits();
    let code = if clamped < MIN_NORMAL {
        subnormal
    } else {
        normal
    };
    let is_nan = magnitude > f32::INFINITY.to_bits();
    let code = if is_nan { NAN } else { code };
    (bits >> 24 & 0x80 | code) as u8
}

/// Returns the value of a code, exactly.
#[inline(always)]
pub(super) fn to_f32(code: u8) -> f32 {
    let (sign, magnitude) = (u32::from(code & 0x80) << 24, u32::from(code & 0x7f));
    if magnitude == NAN {
        return f32::NAN;
    }
    // Subnormal codes are subnormal `f32`, which the product makes normal.
    f32::from_bits(sign | magnitude << 20) * UNBIAS
}

#[cfg(test)]
mod tests {
    use super::super::simd::{Simd, SimdLevel, Task};
    use super::*;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    /// What the specification says of a code.
    fn value(code: u8) -> f64 {
        let (exponent, mantissa) = (i32::from(code >> 3 & 15), f64::from(code & 7));
        let sign = if code & 0x80 == 0 { 1.0 } else { -1.0 };
        match (exponent, code & 7) {
            (15, 7) => f64::NAN,
            (0, _) => sign * mantissa / 8.0 * 2f64.powi(-6),
            _ => sign * (1.0 + mantissa / 8.0) * 2f64.powi(exponent - 7),
        }
    }

    /// The nearest of all positive finite codes by their distance in `f64`, of two as near the even
    /// one, with the sign of `x`.
    fn nearest(x: f32) -> u8 {
        // Beyond a million, differences are too coarse to tell codes apart.
        let magnitude = f64::from(x.abs().min(1e6));
        let distance = |code: &u8| (magnitude - value(*code)).abs();
        let order = |a: &u8, b: &u8| {
            let by_distance = distance(a).total_cmp(&distance(b));
            by_distance.then((a % 2).cmp(&(b % 2)))
        };
        let code = (0..0x7f).min_by(order).unwrap();
        code | if x.is_sign_negative() { 0x80 } else { 0 }
    }

    #[test]
    fn every_code_has_the_value_that_the_specification_says_and_comes_back() {
        for code in 0..=u8::MAX {
            let (got, want) = (to_f32(code), value(code));
            if want.is_nan() {
                assert!(got.is_nan(), "{code:#x}: {got}");
                assert_eq!(from_f32(got) & 0x7f, 0x7f);
                continue;
            }
            assert_eq!(f64::from(got), want, "{code:#x}");
            assert_eq!(got.is_sign_negative(), code & 0x80 != 0, "{code:#x}");
            assert_eq!(from_f32(got), code);
        }
    }

    /// Loads the first `len` of 16 codes.
    struct Load<'a> {
        codes: &'a [u8; 16],
        len: usize,
        out: &'a mut [f32; 16],
    }

    impl Task for Load<'_> {
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) {
            let codes = self.codes.as_ptr();
            // SAFETY: there are 16 codes and 16 places, and `len` is at most that.
            unsafe {
                let values = match self.len {
                    16 => simd.load_e4m3(codes),
                    len => simd.load_e4m3_part(codes, len),
                };
                simd.store(self.out.as_mut_ptr(), values);
            }
        }
    }

    #[test]
    fn every_level_reads_every_code_alike() {
        let all: Vec<u8> = (0..=u8::MAX).collect();
        let levels = [SimdLevel::Scalar, SimdLevel::Avx2, SimdLevel::Avx512];
        for level in levels.into_iter().filter(|level| level.is_supported()) {
            for codes in all.as_chunks::<16>().0 {
                for len in [16, 11, 1] {
                    let mut out = [f32::NAN; 16];
                    let load = Load {
                        codes,
                        len,
                        out: &mut out,
                    };
                    // SAFETY: the level is supported.
                    unsafe { level.run(load) };
                    for (lane, got) in out.into_iter().enumerate() {
                        let want = if lane < len { to_f32(codes[lane]) } else { 0.0 };
                        let is_same = got.to_bits() == want.to_bits();
                        assert!(
                            is_same || got.is_nan() && want.is_nan(),
                            "{level:?}: {:#x} is {got}, not {want}",
                            codes[lane]
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn values_between_codes_go_to_the_nearest_and_ties_to_the_even_one() {
        for code in 0..0x7eu8 {
            let (low, high) = (to_f32(code), to_f32(code + 1));
            let middle = (low + high) / 2.0;
            let even = code + code % 2;
            for (x, want) in [
                (middle, even),
                (middle.next_down(), code),
                (middle.next_up(), code + 1),
                (high.next_down(), code + 1),
                (low.next_up(), code),
            ] {
                assert_eq!(from_f32(x), want, "{x} above code {code:#x}");
                assert_eq!(from_f32(-x), want | 0x80, "-{x}");
            }
        }
    }

    #[test]
    fn what_is_too_large_becomes_448_and_what_is_no_number_stays_none() {
        for x in [
            448.0,
            448.1,
            464.0,
            465.0,
            480.0,
            1e4,
            f32::MAX,
            f32::INFINITY,
        ] {
            assert_eq!([from_f32(x), from_f32(-x)], [0x7e, 0xfe], "{x}");
        }
        let smallest = f32::from_bits(1);
        for x in [0.0, smallest, f32::MIN_POSITIVE, 2f32.powi(-10)] {
            assert_eq!([from_f32(x), from_f32(-x)], [0, 0x80], "{x}");
        }
        assert_eq!(from_f32(2f32.powi(-10).next_up()), 1);
        for nan in [f32::NAN, -f32::NAN, f32::from_bits(0x7f80_0001)] {
            assert_eq!(from_f32(nan) & 0x7f, 0x7f);
        }
    }

    #[test]
    fn random_values_go_to_the_nearest_code() {
        let mut rng = StdRng::seed_from_u64(8);
        for _ in 0..50_000 {
            // Of all exponents, but mostly of those that E4M3 has.
            let any = f32::from_bits(rng.random());
            let near = rng.random_range(-1f32..1.0) * 2f32.powi(rng.random_range(-12..10));
            for x in [any, near] {
                if !x.is_nan() {
                    assert_eq!(from_f32(x), nearest(x), "{x:e}");
                }
            }
        }
    }
}
