//! Conversions between types.

use half::{bf16, f16};

use super::e4m3;
use super::elementwise::{Entry, operation};
use super::float::{self, flush};

/// The NaN of f16 conversions.
const NAN_F16: u16 = 0x7fff;

/// Rounds to f16, to nearest even; NaN becomes the canonical one.
#[inline(always)]
pub(super) fn to_f16(value: f32) -> f16 {
    if value.is_nan() {
        f16::from_bits(NAN_F16)
    } else {
        round_to_f16(value)
    }
}

/// Rounds a number to f16 with integer and float operations alone, so that lanes are computed together.
#[inline(always)]
fn round_to_f16(value: f32) -> f16 {
    let bits = value.to_bits();
    let (sign, magnitude) = (bits >> 16 & 0x8000, bits & 0x7fff_ffff);
    // Normal: drop 13 bits, rounding to even, and change the exponent's bias from 127 to 15. A carry goes into
    // the exponent, and past the largest number to infinity.
    let rounded = magnitude
        .wrapping_add(0x0fff + (magnitude >> 13 & 1))
        .wrapping_sub(112 << 23)
        >> 13;
    // Denormal: adding 2^-1 to a magnitude below 2^-14 leaves units of 2^-24 in the sum's last bits.
    let denormal = (f32::from_bits(magnitude) + 0.5)
        .to_bits()
        .wrapping_sub(0.5_f32.to_bits());
    let result = if magnitude >= 0x4780_0000 {
        0x7c00
    } else if magnitude < 0x3880_0000 {
        denormal
    } else {
        rounded
    };
    f16::from_bits((sign | result) as u16)
}

/// Returns the value of f16 bits, in the same manner.
#[inline(always)]
pub(super) fn from_f16(value: f16) -> f32 {
    let bits = u32::from(value.to_bits());
    let (sign, magnitude) = ((bits & 0x8000) << 16, bits & 0x7fff);
    // Shifted into place the exponent is 112 too small, for denormals as well: a product with 2^112 corrects it.
    let scaled = f32::from_bits(magnitude << 13) * f32::from_bits((127 + 112) << 23);
    let special = 0x7f80_0000 | (magnitude & 0x3ff) << 13;
    f32::from_bits(
        sign | if magnitude >= 0x7c00 {
            special
        } else {
            scaled.to_bits()
        },
    )
}

/// Rounds to bf16, to nearest even; NaN becomes the canonical one.
#[inline(always)]
pub(super) fn to_bf16(value: f32) -> bf16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    bf16::from_bits(if value.is_nan() {
        NAN_F16
    } else {
        rounded as u16
    })
}

/// Returns the value of bf16 bits.
#[inline(always)]
pub(super) fn from_bf16(value: bf16) -> f32 {
    f32::from_bits(u32::from(value.to_bits()) << 16)
}

/// Matches pairs of integer types.
macro_rules! integers {
    ($target:expr, $source:expr, [$($name:literal: $type:ty),+], $all:tt) => {
        match $target {
            $($name => integers!(@ $type, $source, $all),)+
            _ => None,
        }
    };
    (@ $target:ty, $source:expr, [$($name:literal: $type:ty),+]) => {
        match $source {
            $($name => Some(operation!($type => $target, |x| x as $target)),)+
            _ => None,
        }
    };
}

/// Matches conversions of floats to integers by a rounding of the value.
macro_rules! rounded {
    ($source:ty, $target:expr, |$x:ident| $value:expr) => {
        Some(match $target {
            "s8" => operation!($source => i8, |$x| $value as i8),
            "u8" => operation!($source => u8, |$x| $value as u8),
            "s16" => operation!($source => i16, |$x| $value as i16),
            "u16" => operation!($source => u16, |$x| $value as u16),
            "s32" => operation!($source => i32, |$x| $value as i32),
            "u32" => operation!($source => u32, |$x| $value as u32),
            "s64" => operation!($source => i64, |$x| $value as i64),
            "u64" => operation!($source => u64, |$x| $value as u64),
            _ => return None,
        })
    };
}

/// Matches conversions of integers to floats, to nearest even.
macro_rules! to_float {
    ($source:expr, $target:ty, |$x:ident| $value:expr) => {
        Some(match $source {
            "s8" => operation!(i8 => $target, |$x| $value),
            "u8" => operation!(u8 => $target, |$x| $value),
            "s16" => operation!(i16 => $target, |$x| $value),
            "u16" => operation!(u16 => $target, |$x| $value),
            "s32" => operation!(i32 => $target, |$x| $value),
            "u32" => operation!(u32 => $target, |$x| $value),
            "s64" => operation!(i64 => $target, |$x| $value),
            "u64" => operation!(u64 => $target, |$x| $value),
            _ => return None,
        })
    };
}

/// Returns the handler of `cvt` with these modifiers and types.
pub(super) fn find(modifiers: &str, target: &str, source: &str) -> Option<Entry> {
    let is_float = |name: &str| matches!(name, "f16" | "bf16" | "f32" | "f64");
    match (is_float(target), is_float(source)) {
        (false, false) if modifiers.is_empty() => integers!(
            target,
            source,
            ["s8": i8, "u8": u8, "s16": i16, "u16": u16, "s32": i32, "u32": u32, "s64": i64, "u64": u64],
            ["s8": i8, "u8": u8, "s16": i16, "u16": u16, "s32": i32, "u32": u32, "s64": i64, "u64": u64]
        ),
        (false, true) => to_integer(modifiers, target, source),
        (true, false) if modifiers == "rn" => match target {
            "f32" => to_float!(source, f32, |x| x as f32),
            "f64" => to_float!(source, f64, |x| x as f64),
            "f16" => to_float!(source, f16, |x| f16::from_f64(x as f64)),
            _ => None,
        },
        (true, true) => between_floats(modifiers, target, source),
        _ => None,
    }
}

/// Returns the handler of `cvt` from the low bits of a 64-bit register.
pub(super) fn find_truncating(target: &str, source: &str) -> Option<Entry> {
    macro_rules! truncating {
        ($($name:literal: $type:ty),+) => {
            match (target, source) {
                $(
                    ("s64" | "u64", $name) => operation!(u64 => u64, |x| x as $type as u64),
                    ("s32" | "u32", $name) => operation!(u64 => u32, |x| x as $type as u32),
                )+
                _ => return None,
            }
        };
    }
    Some(truncating!("s8": i8, "u8": u8, "s16": i16, "u16": u16, "s32": i32, "u32": u32))
}

/// Floats to integers: the nearest in range, 0 for NaN.
fn to_integer(modifiers: &str, target: &str, source: &str) -> Option<Entry> {
    match (modifiers, source) {
        ("rni", "f32") => rounded!(f32, target, |x| x.round_ties_even()),
        ("rzi", "f32") => rounded!(f32, target, |x| x),
        ("rmi", "f32") => rounded!(f32, target, |x| x.floor()),
        ("rpi", "f32") => rounded!(f32, target, |x| x.ceil()),
        ("rni.ftz", "f32") => rounded!(f32, target, |x| flush(x).round_ties_even()),
        ("rzi.ftz", "f32") => rounded!(f32, target, |x| x),
        ("rni", "f64") => rounded!(f64, target, |x| x.round_ties_even()),
        ("rzi", "f64") => rounded!(f64, target, |x| x),
        ("rmi", "f64") => rounded!(f64, target, |x| x.floor()),
        ("rpi", "f64") => rounded!(f64, target, |x| x.ceil()),
        ("rni", "f16") => rounded!(f16, target, |x| from_f16(x).round_ties_even()),
        ("rzi", "f16") => rounded!(f16, target, |x| from_f16(x)),
        _ => None,
    }
}

/// Floats to floats.
fn between_floats(modifiers: &str, target: &str, source: &str) -> Option<Entry> {
    Some(match (modifiers, target, source) {
        ("", "f32", "f16") => operation!(f16 => f32, |x| from_f16(x)),
        ("", "f32", "bf16") => operation!(bf16 => f32, |x| from_bf16(x)),
        ("", "f64", "f32") => operation!(f32 => f64, |x| f64::from(x)),
        ("", "f64", "f16") => operation!(f16 => f64, |x| f64::from(from_f16(x))),
        ("rn", "f16", "f32") => operation!(f32 => f16, |x| to_f16(x)),
        ("rn.relu", "f16", "f32") => operation!(f32 => f16, |x| {
            if x.is_nan() { to_f16(x) } else { to_f16(float::max(x, 0.0)) }
        }),
        ("rn", "bf16", "f32") => operation!(f32 => bf16, |x| to_bf16(x)),
        ("rn", "f32", "f64") => operation!(f64 => f32, |x| x as f32),
        ("rn", "f16", "f64") => operation!(f64 => f16, |x| f16::from_f64(x)),
        ("rni", "f32", "f32") => operation!(f32 => f32, |x| x.round_ties_even()),
        ("rzi", "f32", "f32") => operation!(f32 => f32, |x| x.trunc()),
        ("rmi", "f32", "f32") => operation!(f32 => f32, |x| x.floor()),
        ("rpi", "f32", "f32") => operation!(f32 => f32, |x| x.ceil()),
        ("sat", "f32", "f32") => operation!(f32 => f32, |x| float::saturate(x)),
        ("ftz", "f32", "f32") => operation!(f32 => f32, |x| flush(x)),
        ("rni", "f64", "f64") => operation!(f64 => f64, |x| x.round_ties_even()),
        ("rzi", "f64", "f64") => operation!(f64 => f64, |x| x.trunc()),
        ("rmi", "f64", "f64") => operation!(f64 => f64, |x| x.floor()),
        ("rpi", "f64", "f64") => operation!(f64 => f64, |x| x.ceil()),
        _ => return None,
    })
}

/// Returns the handler of `cvt` between two floats and a pair; of two floats the first is the high half.
pub(super) fn find_pair(modifiers: &str, target: &str, source: &str) -> Option<Entry> {
    Some(match (modifiers, target, source) {
        ("rn", "f16x2", "f32") => operation!(f32, f32 => u32, |x, y| {
            u32::from(to_f16(x).to_bits()) << 16 | u32::from(to_f16(y).to_bits())
        }),
        ("rn", "bf16x2", "f32") => operation!(f32, f32 => u32, |x, y| {
            u32::from(to_bf16(x).to_bits()) << 16 | u32::from(to_bf16(y).to_bits())
        }),
        ("rn.satfinite", "e4m3x2", "f32") => operation!(f32, f32 => u16, |x, y| {
            u16::from(e4m3::from_f32(x)) << 8 | u16::from(e4m3::from_f32(y))
        }),
        ("rn.satfinite", "e4m3x2", "f16x2") => operation!(u32 => u16, |x| {
            let half = |bits: u32| e4m3::from_f32(from_f16(f16::from_bits(bits as u16)));
            u16::from(half(x >> 16)) << 8 | u16::from(half(x))
        }),
        ("rn", "f16x2", "e4m3x2") => operation!(u16 => u32, |x| {
            let half = |bits: u16| u32::from(to_f16(e4m3::to_f32(bits as u8)).to_bits());
            half(x >> 8) << 16 | half(x)
        }),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::{from_bf16, from_f16, to_bf16, to_f16};
    use half::{bf16, f16};

    #[test]
    fn all_f16_go_to_f32_and_back() {
        for bits in 0..=u16::MAX {
            let value = f16::from_bits(bits);
            let wide = from_f16(value);
            if value.is_nan() {
                assert!(wide.is_nan());
                assert_eq!(to_f16(wide).to_bits(), 0x7fff);
            } else {
                assert_eq!(wide, f32::from(value));
                assert_eq!(to_f16(wide).to_bits(), bits);
            }
        }
    }

    #[test]
    fn roundings_are_those_of_the_crate_half() {
        for index in 0..2_000_000_u32 {
            let value = f32::from_bits(index.wrapping_mul(2_654_435_761));
            if value.is_nan() {
                continue;
            }
            assert_eq!(
                to_f16(value).to_bits(),
                f16::from_f32(value).to_bits(),
                "{value:e} to f16"
            );
            assert_eq!(
                to_bf16(value).to_bits(),
                bf16::from_f32(value).to_bits(),
                "{value:e} to bf16"
            );
            assert_eq!(from_bf16(to_bf16(value)), f32::from(bf16::from_f32(value)));
        }
        // Halfway between infinity and the largest number, and just below.
        assert_eq!(to_f16(65_520.0), f16::INFINITY);
        assert_eq!(to_f16(65_519.99), f16::MAX);
    }
}
