//! Block-format weights times quantised activations.
//!
//! One call makes the 16 outputs of a tile for a group of up to 8 rows: integer dot products of
//! each block of 32 columns, scaled into `f32` sums in the order of the blocks. The order does
//! not depend on the group, so a row gives the same bits alone and in any batch.
//!
//! With activations x = a q, a block's part of the sum is, per [`Scales`]:
//! symmetric: Σ d (u - o) a q = d a (Σ u q - o Σ q); the bracket is one integer, begun at -o Σ q.
//! Affine: Σ (d u + m) a q = d a Σ u q + m a Σ q. K is affine with d s and -dmin t; K6 is
//! symmetric with d s, for each half.

use super::activation::{Activations, BLOCK_WORDS, groups};
use super::quant_pack::{Scales, TILE_ROWS, TileLayout};
use super::simd::{Simd, SimdLevel, Task};
use std::ops::Range;

/// The output columns of some tiles for some rows.
pub(super) struct QuantDot<'a> {
    pub(super) layout: &'a TileLayout,
    /// The tiles, back to back.
    pub(super) tiles: &'a [u8],
    /// Rows of weights in the tiles, at most 16 a tile; only the last tile has fewer.
    pub(super) num_weight_rows: usize,
    pub(super) activations: &'a Activations,
    /// Rows of activations; `start` is a multiple of 8.
    pub(super) rows: Range<usize>,
    /// One value for each weight row.
    pub(super) bias: Option<&'a [f32]>,
    /// Where the first tile's first output for row 0 goes.
    pub(super) out: *mut f32,
    /// Elements between the outputs of two rows.
    pub(super) out_stride: usize,
}

impl QuantDot<'_> {
    /// Runs the kernel of the layout's format.
    ///
    /// # Safety
    ///
    /// The machine must support `level`, and `out` be writable for `num_weight_rows` elements at
    /// each row of `rows`, by nobody else.
    pub(super) unsafe fn run(self, level: SimdLevel) {
        // SAFETY: the caller's promise.
        unsafe {
            match (self.layout.bits, self.layout.scales) {
                (4, Scales::Symmetric) => level.run(Format::<4, SYMMETRIC>(self)),
                (5, Scales::Symmetric) => level.run(Format::<5, SYMMETRIC>(self)),
                (_, Scales::Symmetric) => level.run(Format::<8, SYMMETRIC>(self)),
                (4, Scales::Affine) => level.run(Format::<4, AFFINE>(self)),
                (_, Scales::Affine) => level.run(Format::<5, AFFINE>(self)),
                (4, Scales::K) => level.run(Format::<4, K>(self)),
                (_, Scales::K) => level.run(Format::<5, K>(self)),
                (_, Scales::K6) => level.run(Format::<6, K6>(self)),
            }
        }
    }
}

const SYMMETRIC: u8 = 0;
const AFFINE: u8 = 1;
const K: u8 = 2;
const K6: u8 = 3;

struct Format<'a, const BITS: u32, const SCALES: u8>(QuantDot<'a>);

impl<const BITS: u32, const SCALES: u8> Task for Format<'_, BITS, SCALES> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let job = self.0;
        let tile_bytes = job.layout.tile_bytes;
        for (index, tile) in job.tiles.chunks_exact(tile_bytes).enumerate() {
            let first = index * TILE_ROWS;
            let len = TILE_ROWS.min(job.num_weight_rows - first);
            let bias = job.bias.map(|bias| &bias[first..first + len]);
            for (row, size) in groups(job.rows.start, job.rows.end) {
                let group = job.activations.group(row, size);
                let out = job.out.wrapping_add(row * job.out_stride + first);
                let outputs = Outputs {
                    out,
                    stride: job.out_stride,
                    len,
                    bias,
                };
                // SAFETY: the tile and the group have the layout's number of blocks; the
                // outputs are writable by the promise to `QuantDot::run`.
                unsafe {
                    match size {
                        8 => dot::<S, BITS, SCALES, 8>(simd, job.layout, tile, group, outputs),
                        4 => dot::<S, BITS, SCALES, 4>(simd, job.layout, tile, group, outputs),
                        2 => dot::<S, BITS, SCALES, 2>(simd, job.layout, tile, group, outputs),
                        _ => dot::<S, BITS, SCALES, 1>(simd, job.layout, tile, group, outputs),
                    }
                }
            }
        }
    }
}

struct Outputs<'a> {
    out: *mut f32,
    stride: usize,
    len: usize,
    bias: Option<&'a [f32]>,
}

/// Scales of a block: of its first and last 16 columns, and what is added per Σ a q.
struct BlockScales<S: Simd> {
    low: S::F,
    high: S::F,
    min: S::F,
}

/// # Safety
///
/// `tile` must be of the layout and `block` within it.
#[inline(always)]
unsafe fn block_scales<S: Simd, const SCALES: u8>(
    simd: S,
    layout: &TileLayout,
    tile: *const u8,
    block: usize,
) -> BlockScales<S> {
    // SAFETY: the offsets are those of the layout's regions.
    unsafe {
        let scales = tile.add(layout.scales_at);
        let supers = tile.add(layout.supers_at);
        match SCALES {
            SYMMETRIC => {
                let low = simd.load_f16(scales.add(block * 32).cast());
                let (high, min) = (low, low);
                BlockScales { low, high, min }
            }
            AFFINE => {
                let at = scales.add(block * 64);
                let low = simd.load_f16(at.cast());
                let min = simd.load_f16(at.add(32).cast());
                let high = low;
                BlockScales { low, high, min }
            }
            K => {
                let (at, super_at) = (scales.add(block * 32), supers.add(block / 8 * 64));
                let d = simd.load_f16(super_at.cast());
                let minus_dmin = simd.sub(simd.splat(0.0), simd.load_f16(super_at.add(32).cast()));
                let low = simd.mul(d, simd.load_u8(at));
                let min = simd.mul(minus_dmin, simd.load_u8(at.add(16)));
                let high = low;
                BlockScales { low, high, min }
            }
            _ => {
                let at = scales.add(block * 32);
                let d = simd.load_f16(supers.add(block / 8 * 32).cast());
                let low = simd.mul(d, simd.load_i8(at.cast()));
                let high = simd.mul(d, simd.load_i8(at.add(16).cast()));
                let min = low;
                BlockScales { low, high, min }
            }
        }
    }
}

/// Returns code vectors `2 * pair` and `2 * pair + 1` of a block.
///
/// # Safety
///
/// `tile` must be of the layout, `block` within it and `pair < 4`.
#[inline(always)]
unsafe fn codes<S: Simd, const BITS: u32>(
    simd: S,
    layout: &TileLayout,
    tile: *const u8,
    block: usize,
    pair: usize,
) -> (S::B, S::B) {
    // SAFETY: the offsets are those of the layout's regions.
    unsafe {
        if BITS == 8 {
            let at = tile.add(block * 512 + pair * 128);
            return (simd.load_bytes(at), simd.load_bytes(at.add(64)));
        }
        let packed = simd.load_bytes(tile.add(block * 256 + pair * 64));
        let mut even = simd.low_nibbles(packed);
        let mut odd = simd.high_nibbles(packed);
        let num_planes = BITS as usize - 4;
        for plane in 0..num_planes {
            let at = layout.planes_at + (block * num_planes + plane) * 64 + pair * 16;
            even = simd.add_where(even, tile.add(at), 16 << plane);
            odd = simd.add_where(odd, tile.add(at + 8), 16 << plane);
        }
        (even, odd)
    }
}

/// Makes 16 outputs for each of `ROWS` rows.
///
/// # Safety
///
/// `tile` and `group` must have the layout's number of blocks, `group` of `ROWS` rows, and the
/// outputs be writable.
#[inline(always)]
#[expect(
    clippy::needless_range_loop,
    reason = "plain counted loops over constant sizes stay in registers"
)]
unsafe fn dot<S: Simd, const BITS: u32, const SCALES: u8, const ROWS: usize>(
    simd: S,
    layout: &TileLayout,
    tile: &[u8],
    group: &[u32],
    outputs: Outputs<'_>,
) {
    let tile = tile.as_ptr();
    let mut acc = [simd.splat(0.0); ROWS];
    for block in 0..layout.num_blocks {
        // SAFETY: `block` lies within the tile and the group; the layout of a group's block is
        // that of `activation`.
        unsafe {
            let q: *const i8 = group.as_ptr().add(block * ROWS * BLOCK_WORDS).cast();
            let sums = group.as_ptr().add(block * ROWS * BLOCK_WORDS + 8 * ROWS);
            let scales = block_scales::<S, SCALES>(simd, layout, tile, block);
            let is_halved = SCALES == K6;
            let mut dots = [simd.splat_i32(0); ROWS];
            for row in 0..ROWS {
                let minus_sum = sums.add((2 + usize::from(is_halved)) * ROWS + row);
                dots[row] = begin::<S, BITS, SCALES>(simd, minus_sum);
            }
            for pair in 0..4 {
                let (even, odd) = codes::<S, BITS>(simd, layout, tile, block, pair);
                for row in 0..ROWS {
                    let q = q.add(row * 32 + pair * 8);
                    // Codes of 8 bits overflow the 16-bit pair sums of AVX2.
                    if BITS == 8 {
                        dots[row] = simd.dot::<true>(dots[row], even, q);
                        dots[row] = simd.dot::<true>(dots[row], odd, q.add(4));
                    } else {
                        dots[row] = simd.dot::<false>(dots[row], even, q);
                        dots[row] = simd.dot::<false>(dots[row], odd, q.add(4));
                    }
                }
                if is_halved && pair == 1 {
                    for row in 0..ROWS {
                        let scaled = scale(simd, dots[row], sums.add(row));
                        acc[row] = simd.fma(scaled, scales.low, acc[row]);
                        dots[row] = begin::<S, BITS, SCALES>(simd, sums.add(4 * ROWS + row));
                    }
                }
            }
            for row in 0..ROWS {
                let scaled = scale(simd, dots[row], sums.add(row));
                acc[row] = simd.fma(scaled, scales.high, acc[row]);
                if SCALES == AFFINE || SCALES == K {
                    let sum = simd.splat(f32::from_bits(*sums.add(ROWS + row)));
                    acc[row] = simd.fma(sum, scales.min, acc[row]);
                }
            }
        }
    }
    let Outputs {
        out,
        stride,
        len,
        bias,
    } = outputs;
    for (row, &acc) in acc.iter().enumerate() {
        // SAFETY: `len` outputs are writable at each row, and `bias` has `len` values.
        unsafe {
            let sum = match bias {
                Some(bias) => simd.add(acc, simd.load_part(bias.as_ptr(), len)),
                None => acc,
            };
            simd.store_part(out.add(row * stride), len, sum);
        }
    }
}

/// What the integer sums begin at: minus the codes' offset times Σ q, given -Σ q.
///
/// # Safety
///
/// `minus_sum` must be readable.
#[inline(always)]
unsafe fn begin<S: Simd, const BITS: u32, const SCALES: u8>(
    simd: S,
    minus_sum: *const u32,
) -> S::I {
    if SCALES == AFFINE || SCALES == K {
        return simd.splat_i32(0);
    }
    // SAFETY: the caller's promise.
    let minus_sum = simd.splat_i32(unsafe { *minus_sum }.cast_signed());
    match BITS {
        4 => simd.shift_left::<3>(minus_sum),
        5 => simd.shift_left::<4>(minus_sum),
        6 => simd.shift_left::<5>(minus_sum),
        _ => simd.shift_left::<7>(minus_sum),
    }
}

/// Integer sums times the activations' scale.
///
/// # Safety
///
/// `by` must be readable.
#[inline(always)]
unsafe fn scale<S: Simd>(simd: S, dots: S::I, by: *const u32) -> S::F {
    // SAFETY: the caller's promise.
    let by = f32::from_bits(unsafe { *by });
    simd.mul(simd.to_f32(dots), simd.splat(by))
}
