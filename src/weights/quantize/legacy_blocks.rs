//! Blocks of 32 weights with one scale: Q4_0, Q5_0, Q5_1 and Q8_0.
//!
//! The arithmetic is that of ggml's reference quantisers as the `gguf` Python package has it in
//! numpy (f32, not fused), so that the bytes are equal to that package's.

use half::f16;

/// Weights of a block.
pub(super) const BLOCK: usize = 32;

/// Encodes `d` and 32 signed bytes: `weight ≈ d * code`.
#[inline(always)]
pub(super) fn q8_0(weights: &[f32; BLOCK], block: &mut [u8; 34]) {
    let mut largest = 0.0_f32;
    for weight in weights {
        largest = if weight.abs() > largest {
            weight.abs()
        } else {
            largest
        };
    }
    let d = largest / 127.0;
    let inverse = inverse(d);
    let (head, codes) = block.split_at_mut(2);
    head.copy_from_slice(&f16::from_f32(d).to_le_bytes());
    for (code, weight) in codes.iter_mut().zip(weights) {
        // Halves away from zero; `as` cuts the fraction off.
        let value = weight * inverse;
        let whole = value.abs() as i32;
        let up = i32::from(value.abs() - whole as f32 >= 0.5);
        let size = whole + up;
        *code = (if value < 0.0 { -size } else { size }) as u8;
    }
}

/// Encodes `d` and 32 codes of four bits: `weight ≈ d * (code - 8)`.
#[inline(always)]
pub(super) fn q4_0(weights: &[f32; BLOCK], block: &mut [u8; 18]) {
    let d = furthest_from_zero(weights) / -8.0;
    let codes = codes(weights, 0.0, inverse(d), 8.5, 15);
    block[..2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
    pack_nibbles(&codes, &mut block[2..]);
}

/// Encodes `d`, 32 fifth bits and 32 low nibbles: `weight ≈ d * (code - 16)`.
#[inline(always)]
pub(super) fn q5_0(weights: &[f32; BLOCK], block: &mut [u8; 22]) {
    let d = furthest_from_zero(weights) / -16.0;
    let codes = codes(weights, 0.0, inverse(d), 16.5, 31);
    block[..2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
    block[2..6].copy_from_slice(&fifth_bits(&codes));
    pack_nibbles(&codes, &mut block[6..]);
}

/// Encodes `d`, the least weight, 32 fifth bits and 32 low nibbles: `weight ≈ d * code + least`.
#[inline(always)]
pub(super) fn q5_1(weights: &[f32; BLOCK], block: &mut [u8; 24]) {
    let (mut least, mut most) = (weights[0], weights[0]);
    for &weight in weights {
        least = if weight < least { weight } else { least };
        most = if weight > most { weight } else { most };
    }
    let d = (most - least) / 31.0;
    let codes = codes(weights, least, inverse(d), 0.5, 31);
    block[..2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
    block[2..4].copy_from_slice(&f16::from_f32(least).to_le_bytes());
    block[4..8].copy_from_slice(&fifth_bits(&codes));
    pack_nibbles(&codes, &mut block[8..]);
}

#[inline(always)]
fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

/// Returns the first of the weights of greatest size, with its sign.
#[inline(always)]
fn furthest_from_zero(weights: &[f32; BLOCK]) -> f32 {
    let mut found = weights[0];
    for &weight in weights {
        found = if weight.abs() > found.abs() {
            weight
        } else {
            found
        };
    }
    found
}

#[inline(always)]
fn codes(
    weights: &[f32; BLOCK],
    least: f32,
    inverse: f32,
    shift: f32,
    max_code: u8,
) -> [u8; BLOCK] {
    // `as` cuts the fraction off and keeps to the range of u8.
    weights.map(|weight| (((weight - least) * inverse + shift) as u8).min(max_code))
}

/// Packs four bits of each code: the first half of the block in the low nibbles.
#[inline(always)]
fn pack_nibbles(codes: &[u8; BLOCK], packed: &mut [u8]) {
    let (first, second) = codes.split_at(BLOCK / 2);
    for ((byte, first), second) in packed.iter_mut().zip(first).zip(second) {
        *byte = (first & 15) | (second << 4);
    }
}

#[inline(always)]
fn fifth_bits(codes: &[u8; BLOCK]) -> [u8; 4] {
    let mut bits = 0_u32;
    for (i, code) in codes.iter().enumerate() {
        bits |= u32::from(code >> 4) << i;
    }
    bits.to_le_bytes()
}
