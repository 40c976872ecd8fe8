//! Floats of 8 bits: sign, 4 bits of exponent with bias 7, 3 bits of mantissa; no infinities, NaN is 0x7f.

/// The largest number.
const MAX: f32 = 448.0;
/// NaN.
const NAN: u8 = 0x7f;

/// Rounds to nearest even; what is too large becomes the largest number: `.rn.satfinite`.
#[inline(always)]
pub(super) fn from_f32(value: f32) -> u8 {
    let bits = value.to_bits();
    let sign = (bits >> 24 & 0x80) as u8;
    let magnitude = value.abs();
    if magnitude.is_nan() {
        return NAN;
    }
    if magnitude >= MAX {
        return sign | 0x7e;
    }
    let bits = magnitude.to_bits();
    // Normal: 20 bits dropped, bias from 127 to 7.
    let rounded = (bits + 0x7_ffff + (bits >> 20 & 1)).wrapping_sub(120 << 23) >> 20;
    // Denormal, below 2^-6: units of 2^-9; the sum with 2^14 has that unit in its last bit.
    let denormal = (magnitude + 16_384.0).to_bits() - 16_384_f32.to_bits();
    sign | (if magnitude < 0.015_625 {
        denormal
    } else {
        rounded
    }) as u8
}

/// Returns the value.
#[inline(always)]
pub(super) fn to_f32(bits: u8) -> f32 {
    let magnitude = u32::from(bits & 0x7f);
    let value = f32::from_bits(magnitude << 20) * f32::from_bits((127 + 120) << 23);
    let signed = value.to_bits() | u32::from(bits & 0x80) << 24;
    if magnitude == 0x7f {
        f32::NAN
    } else {
        f32::from_bits(signed)
    }
}

#[cfg(test)]
mod tests {
    use super::{from_f32, to_f32};

    #[test]
    fn all_values_come_back() {
        for bits in 0..=u8::MAX {
            let value = to_f32(bits);
            if bits & 0x7f == 0x7f {
                assert!(value.is_nan());
                assert_eq!(from_f32(value), 0x7f);
            } else {
                assert_eq!(from_f32(value), bits, "{value}");
            }
        }
        assert_eq!(to_f32(0x7e), 448.0);
        assert_eq!(to_f32(0x01), 0.001_953_125);
        assert_eq!(to_f32(0xb8), -1.0);
    }

    #[test]
    fn values_between_go_to_the_nearest_even() {
        for bits in 0..0x7e_u8 {
            let (low, high) = (to_f32(bits), to_f32(bits + 1));
            let middle = (low + high) / 2.0;
            assert_eq!(
                from_f32(middle),
                if bits % 2 == 0 { bits } else { bits + 1 },
                "{middle}"
            );
            assert_eq!(from_f32(middle * 0.999_99), bits);
            assert_eq!(from_f32(middle * 1.000_01), bits + 1);
        }
        assert_eq!(from_f32(1e9), 0x7e);
        assert_eq!(from_f32(f32::NEG_INFINITY), 0xfe);
        assert_eq!(from_f32(-1e-9), 0x80);
    }
}
