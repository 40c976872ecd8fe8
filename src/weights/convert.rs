//! Float bytes to f32 and back. Only the last step of a merge rounds, to nearest, ties to even.

use candle_core::quantized::GgmlDType;
use half::f16;
use half::slice::HalfFloatSliceExt;

/// Returns how `torch_dtype` of `config.json` names a dtype; what it has no name for, such as a
/// block format, was float16, as llama.cpp assumes.
pub fn torch_dtype(dtype: GgmlDType) -> &'static str {
    match dtype {
        GgmlDType::F32 => "float32",
        GgmlDType::BF16 => "bfloat16",
        _ => "float16",
    }
}

/// Reads `values.len()` little-endian floats of `dtype` (F32, F16, BF16).
#[inline(always)]
pub(super) fn to_f32(dtype: GgmlDType, bytes: &[u8], values: &mut [f32]) {
    match dtype {
        GgmlDType::F32 => {
            for (value, bytes) in values.iter_mut().zip(bytes.as_chunks().0) {
                *value = f32::from_le_bytes(*bytes);
            }
        }
        GgmlDType::BF16 => {
            for (value, bytes) in values.iter_mut().zip(bytes.as_chunks().0) {
                *value = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
            }
        }
        _ => {
            let mut block = [f16::ZERO; 64];
            for (values, bytes) in values.chunks_mut(64).zip(bytes.chunks(128)) {
                let block = &mut block[..values.len()];
                for (half, bytes) in block.iter_mut().zip(bytes.as_chunks().0) {
                    *half = f16::from_le_bytes(*bytes);
                }
                block.convert_to_f32_slice(values);
            }
        }
    }
}

/// Returns the values of a whole tensor.
pub(super) fn values(dtype: GgmlDType, bytes: &[u8]) -> Vec<f32> {
    let mut values = vec![0.0; bytes.len() / dtype.type_size()];
    to_f32(dtype, bytes, &mut values);
    values
}

/// Rounds to `dtype` and writes little-endian.
#[inline(always)]
pub(super) fn from_f32(dtype: GgmlDType, values: &[f32], bytes: &mut [u8]) {
    match dtype {
        GgmlDType::F32 => {
            for (value, bytes) in values.iter().zip(bytes.as_chunks_mut().0) {
                *bytes = value.to_le_bytes();
            }
        }
        GgmlDType::BF16 => {
            for (value, bytes) in values.iter().zip(bytes.as_chunks_mut().0) {
                *bytes = bf16_bits(*value).to_le_bytes();
            }
        }
        _ => {
            let mut block = [f16::ZERO; 64];
            for (values, bytes) in values.chunks(64).zip(bytes.chunks_mut(128)) {
                let block = &mut block[..values.len()];
                block.convert_from_f32_slice(values);
                for (half, bytes) in block.iter().zip(bytes.as_chunks_mut().0) {
                    *bytes = half.to_le_bytes();
                }
            }
        }
    }
}

/// Rounds values to `dtype` and back.
#[inline(always)]
pub(super) fn round(dtype: GgmlDType, values: &mut [f32]) {
    match dtype {
        GgmlDType::F32 => {}
        GgmlDType::BF16 => {
            for value in values {
                *value = f32::from_bits(u32::from(bf16_bits(*value)) << 16);
            }
        }
        _ => {
            let mut block = [f16::ZERO; 64];
            for values in values.chunks_mut(64) {
                let block = &mut block[..values.len()];
                block.convert_from_f32_slice(values);
                block.convert_to_f32_slice(values);
            }
        }
    }
}

/// Rounds to the nearest bf16, ties to even.
///
/// The upper half of an f32 is a bf16. Adding 0x7fff, and 1 more when the upper half is odd,
/// carries into it exactly when the lower half is above one half, or is one half and the upper
/// is odd. Of a NaN anything may become here: the caller looks for those before.
#[inline(always)]
fn bf16_bits(value: f32) -> u16 {
    let bits = value.to_bits();
    ((bits.wrapping_add(0x7fff + ((bits >> 16) & 1))) >> 16) as u16
}

/// Returns a row-major `[rows, cols]` matrix as `[cols, rows]`.
pub fn transpose(values: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    let mut transposed = Vec::with_capacity(values.len());
    for col in 0..cols {
        transposed.extend((0..rows).map(|row| values[row * cols + col]));
    }
    transposed
}

/// Returns the bits of the smallest positive f32 that rounding to `dtype` makes infinite; the
/// bits of all larger numbers, of infinity and of NaN are above them.
pub(super) fn overflow_bits(dtype: GgmlDType) -> u32 {
    match dtype {
        GgmlDType::F32 => 0x7f80_0000,
        // Half a step above the largest number: the tie goes to infinity, which is even.
        GgmlDType::BF16 => 0x7f7f_8000,
        _ => 65_520_f32.to_bits(),
    }
}

/// What a tensor holds, at a glance.
pub(super) struct Content {
    /// There is no NaN and no infinity.
    pub(super) all_finite: bool,
    /// There is nothing but zeros of either sign.
    pub(super) all_zero: bool,
}

/// Looks through the bits of a float tensor.
pub(super) fn content(dtype: GgmlDType, bytes: &[u8]) -> Content {
    if dtype == GgmlDType::F32 {
        let bits = bytes.as_chunks().0.iter();
        return content_of(
            0x7f80_0000,
            bits.map(|b| u32::from_le_bytes(*b) & !(1 << 31)),
        );
    }
    let exponent = if dtype == GgmlDType::BF16 {
        0x7f80
    } else {
        0x7c00
    };
    let bits = bytes.as_chunks().0.iter();
    content_of(
        exponent,
        bits.map(|b| u32::from(u16::from_le_bytes(*b) & 0x7fff)),
    )
}

/// Folds bits without sign; a float whose exponent bits are all set is an infinity or a NaN.
fn content_of(exponent: u32, bits: impl Iterator<Item = u32>) -> Content {
    let (mut all_finite, mut any) = (true, 0);
    for bits in bits {
        all_finite &= bits & exponent != exponent;
        any |= bits;
    }
    Content {
        all_finite,
        all_zero: any == 0,
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    #[test]
    fn bf16_rounds_as_the_half_crate_does() {
        // Every exponent, with mantissas around the ties.
        for upper in 0..=0xff7f_u32 {
            if upper & 0x7f80 == 0x7f80 {
                continue;
            }
            for lower in [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
                let value = f32::from_bits(upper << 16 | lower);
                assert_eq!(
                    bf16_bits(value),
                    bf16::from_f32(value).to_bits(),
                    "{value:e}"
                );
            }
        }
    }

    #[test]
    fn every_half_survives_the_way_to_f32_and_back() {
        for dtype in [GgmlDType::F16, GgmlDType::BF16] {
            let bytes: Vec<u8> = (0..=u16::MAX)
                .filter(|bits| bits & 0x7c00 != 0x7c00 && bits & 0x7f80 != 0x7f80)
                .flat_map(u16::to_le_bytes)
                .collect();
            let values = values(dtype, &bytes);
            let mut back = vec![0; bytes.len()];
            from_f32(dtype, &values, &mut back);
            assert_eq!(back, bytes);
            let mut rounded = values.clone();
            round(dtype, &mut rounded);
            assert_eq!(rounded, values);
        }
    }

    #[test]
    fn infinity_begins_where_rounding_makes_it() {
        for dtype in [GgmlDType::F32, GgmlDType::F16, GgmlDType::BF16] {
            let bits = overflow_bits(dtype);
            let mut around = [f32::from_bits(bits - 1), f32::from_bits(bits)];
            round(dtype, &mut around);
            assert!(
                around[0].is_finite() && around[1].is_infinite(),
                "{dtype:?}"
            );
        }
    }

    #[test]
    fn content_sees_zeros_and_what_is_not_finite() {
        let look = |value: f32| {
            let bytes: Vec<u8> = [0.0, -0.0, value]
                .iter()
                .flat_map(|v| v.to_le_bytes())
                .collect();
            let content = content(GgmlDType::F32, &bytes);
            (content.all_finite, content.all_zero)
        };
        assert_eq!(look(0.0), (true, true));
        assert_eq!(look(1e-40), (true, false));
        assert_eq!(look(f32::NAN), (false, false));
        let half = |bits: u16| content(GgmlDType::F16, &bits.to_le_bytes());
        assert!(half(0x8000).all_zero);
        assert!(!half(0x7c00).all_finite);
        assert!(half(0x7bff).all_finite);
    }
}
