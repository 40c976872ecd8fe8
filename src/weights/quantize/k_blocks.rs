//! Blocks of 256 weights with two levels of scales: Q4_K, Q5_K and Q6_K.
//!
//! Layouts of `ggml-common.h`; scales by the searches of `search`, then rounded to the block's own
//! scale as llama.cpp's `quantize_row_q?_K_ref` does.

use half::f16;

use super::lanes::{Lanes, round};
use super::search::{Grids, ScaleAndOffset, scale, scale_and_offset};

/// Weights of a block.
pub(super) const BLOCK: usize = 256;

/// The block's codes and the packed head that explains them: `d`, `dmin` and twelve bytes of
/// 6-bit scales and offsets.
struct OffsetCodes {
    head: [u8; 16],
    codes: [u8; BLOCK],
}

/// Encodes a block: 16 bytes of head, 128 of codes.
#[inline(always)]
pub(super) fn q4_k(weights: &[f32; BLOCK], block: &mut [u8; 144]) {
    let grids = Grids {
        max_code: 15.0,
        first: -1.0,
        step: 0.1,
        count: 20,
    };
    let OffsetCodes { head, codes } = offset_codes(weights, grids);
    block[..16].copy_from_slice(&head);
    pack_nibbles(&codes, &mut block[16..]);
}

/// Encodes a block: 16 bytes of head, 32 of fifth bits, 128 of low nibbles.
#[inline(always)]
pub(super) fn q5_k(weights: &[f32; BLOCK], block: &mut [u8; 176]) {
    let grids = Grids {
        max_code: 31.0,
        first: -0.5,
        step: 0.1,
        count: 15,
    };
    let OffsetCodes { head, codes } = offset_codes(weights, grids);
    block[..16].copy_from_slice(&head);
    // Bit `group` of byte `i` is the fifth bit of the group's weight `i`.
    let (high, low) = block[16..].split_at_mut(32);
    high.fill(0);
    for (group, codes) in codes.chunks_exact(32).enumerate() {
        for (byte, code) in high.iter_mut().zip(codes) {
            *byte |= (code >> 4) << group;
        }
    }
    pack_nibbles(&codes, low);
}

/// Encodes a block: 128 bytes of low nibbles, 64 of high bits, 16 scales, `d`.
#[inline(always)]
pub(super) fn q6_k(weights: &[f32; BLOCK], block: &mut [u8; 210]) {
    block.fill(0);
    let scales = scale(&by_lanes::<16, 16>(weights)).0;
    let mut largest = 0.0_f32;
    for &scale in &scales {
        largest = if scale.abs() > largest.abs() {
            scale
        } else {
            largest
        };
    }
    if largest.abs() < 1e-15 {
        return;
    }
    let inverse = -128.0 / largest;
    let d = f16::from_f32(1.0 / inverse);
    let steps = scales.map(|scale| {
        let step = round(inverse * scale);
        if step < 127.0 { step } else { 127.0 }
    });
    let mut codes = [0_u8; BLOCK];
    for ((codes, weights), step) in codes
        .chunks_exact_mut(16)
        .zip(weights.chunks_exact(16))
        .zip(steps)
    {
        let scale = d.to_f32() * step;
        if scale != 0.0 {
            for (code, &weight) in codes.iter_mut().zip(weights) {
                let nearest = Lanes([weight / scale]).round_within(-32.0, 31.0).0[0];
                *code = (nearest as i8 + 32) as u8;
            }
        } else {
            codes.fill(32);
        }
    }
    let (low, rest) = block.split_at_mut(128);
    let (high, rest) = rest.split_at_mut(64);
    pack_six_bits(&codes, low, high);
    for (byte, step) in rest.iter_mut().zip(steps) {
        *byte = (step as i8).to_le_bytes()[0];
    }
    rest[16..].copy_from_slice(&d.to_le_bytes());
}

/// Quantises eight groups of 32 to `d * scale * code - dmin * offset`.
#[inline(always)]
fn offset_codes(weights: &[f32; BLOCK], grids: Grids) -> OffsetCodes {
    let found = scale_and_offset(&by_lanes::<8, 32>(weights), grids);
    let ScaleAndOffset { scale, offset } = found;
    let max_scale = scale
        .0
        .iter()
        .fold(0.0, |max, &it| if it > max { it } else { max });
    let max_offset = offset
        .0
        .iter()
        .fold(0.0, |max, &it| if it > max { it } else { max });
    let inverse = |max: f32| if max > 0.0 { 63.0 / max } else { 0.0 };
    let steps =
        |values: Lanes<8>, inverse: f32| (values * Lanes::splat(inverse)).round_within(0.0, 63.0).0;
    let scales = steps(scale, inverse(max_scale));
    let offsets = steps(offset, inverse(max_offset));
    let d = f16::from_f32(max_scale / 63.0);
    let dmin = f16::from_f32(max_offset / 63.0);

    let mut codes = [0_u8; BLOCK];
    for (group, (codes, weights)) in codes
        .chunks_exact_mut(32)
        .zip(weights.chunks_exact(32))
        .enumerate()
    {
        let scale = d.to_f32() * scales[group];
        let offset = dmin.to_f32() * offsets[group];
        if scale == 0.0 {
            continue;
        }
        for (code, &weight) in codes.iter_mut().zip(weights) {
            let nearest = Lanes([(weight + offset) / scale]).round_within(0.0, grids.max_code);
            *code = nearest.0[0] as i8 as u8;
        }
    }
    let mut head = [0; 16];
    head[..2].copy_from_slice(&d.to_le_bytes());
    head[2..4].copy_from_slice(&dmin.to_le_bytes());
    pack_scales(&scales, &offsets, &mut head[4..]);
    OffsetCodes { head, codes }
}

/// Packs eight scales and eight offsets of six bits: those of groups 0 to 3 in bytes 0 to 7, of
/// groups 4 to 7 the low nibbles in bytes 8 to 11 and the high bits on top of bytes 0 to 7.
#[inline(always)]
fn pack_scales(scales: &[f32; 8], offsets: &[f32; 8], packed: &mut [u8]) {
    for group in 0..4 {
        let (scale, offset) = (scales[group] as u8, offsets[group] as u8);
        let (scale_4, offset_4) = (scales[group + 4] as u8, offsets[group + 4] as u8);
        packed[group] = scale | (scale_4 >> 4 << 6);
        packed[group + 4] = offset | (offset_4 >> 4 << 6);
        packed[group + 8] = (scale_4 & 15) | ((offset_4 & 15) << 4);
    }
}

/// Packs four bits of each code: groups `2 i` and `2 i + 1` share 32 bytes.
#[inline(always)]
fn pack_nibbles(codes: &[u8; BLOCK], packed: &mut [u8]) {
    for (packed, codes) in packed.chunks_exact_mut(32).zip(codes.chunks_exact(64)) {
        let (first, second) = codes.split_at(32);
        for ((byte, first), second) in packed.iter_mut().zip(first).zip(second) {
            *byte = (first & 15) | (second << 4);
        }
    }
}

/// Packs codes of six bits: in each half of the block, four runs of 32 weights share 64 bytes of
/// low nibbles and 32 of high bits.
#[inline(always)]
fn pack_six_bits(codes: &[u8; BLOCK], low: &mut [u8], high: &mut [u8]) {
    for half in 0..2 {
        let codes = &codes[half * 128..half * 128 + 128];
        for i in 0..32 {
            let [a, b, c, d] = [codes[i], codes[i + 32], codes[i + 64], codes[i + 96]];
            low[half * 64 + i] = (a & 15) | (c << 4);
            low[half * 64 + 32 + i] = (b & 15) | (d << 4);
            high[half * 32 + i] = (a >> 4) | (b >> 4 << 2) | (c >> 4 << 4) | (d >> 4 << 6);
        }
    }
}

/// Puts `GROUPS` groups of `SIZE` weights into lanes: the `i`th of each side by side.
#[inline(always)]
fn by_lanes<const GROUPS: usize, const SIZE: usize>(
    weights: &[f32; BLOCK],
) -> [Lanes<GROUPS>; SIZE] {
    let mut lanes = [Lanes::ZERO; SIZE];
    for (group, weights) in weights.chunks_exact(SIZE).enumerate() {
        for (lane, &weight) in lanes.iter_mut().zip(weights) {
            lane.0[group] = weight;
        }
    }
    lanes
}
