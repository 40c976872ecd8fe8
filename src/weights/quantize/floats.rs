//! Between f32 and the float types of files.

use candle_core::quantized::GgmlDType;
use half::{bf16, f16, slice::HalfFloatSliceExt};

/// Numbers that are converted at a time, so that the conversion uses SIMD.
const RUN: usize = 64;

/// Fills `values` from the little-endian floats in `bytes`; `dtype` is F32, F16 or BF16.
pub(super) fn decode(dtype: GgmlDType, bytes: &[u8], values: &mut [f32]) {
    match dtype {
        GgmlDType::F32 => {
            let (words, _) = bytes.as_chunks::<4>();
            for (value, &word) in values.iter_mut().zip(words) {
                *value = f32::from_le_bytes(word);
            }
        }
        GgmlDType::F16 => {
            for (values, bytes) in values.chunks_mut(RUN).zip(bytes.chunks(2 * RUN)) {
                let mut halves = [f16::ZERO; RUN];
                for (half, &word) in halves.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *half = f16::from_le_bytes(word);
                }
                halves[..values.len()].convert_to_f32_slice(values);
            }
        }
        _ => {
            let (words, _) = bytes.as_chunks::<2>();
            for (value, &word) in values.iter_mut().zip(words) {
                *value = f32::from_bits(u32::from(u16::from_le_bytes(word)) << 16);
            }
        }
    }
}

/// Fills `bytes` with `values` rounded to `dtype` (F32, F16 or BF16), to the nearest, halves to
/// the even one.
pub(super) fn encode(dtype: GgmlDType, values: &[f32], bytes: &mut [u8]) {
    match dtype {
        GgmlDType::F32 => {
            for (word, value) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(values) {
                *word = value.to_le_bytes();
            }
        }
        GgmlDType::F16 => {
            for (values, bytes) in values.chunks(RUN).zip(bytes.chunks_mut(2 * RUN)) {
                let mut halves = [f16::ZERO; RUN];
                halves[..values.len()].convert_from_f32_slice(values);
                for (word, half) in bytes.as_chunks_mut::<2>().0.iter_mut().zip(halves) {
                    *word = half.to_le_bytes();
                }
            }
        }
        _ => {
            for (word, &value) in bytes.as_chunks_mut::<2>().0.iter_mut().zip(values) {
                *word = bf16::from_f32(value).to_le_bytes();
            }
        }
    }
}
