//! Repacks GGML blocks into tiles of 16 rows, without loss.
//!
//! A tile holds 16 rows of a matrix for all columns, in the order in which the dot-product kernel
//! reads it: lanes are rows, and four neighbouring columns of 16 rows make one 64-byte vector.
//! Codes become unsigned integers, so that `vpdpbusd` (unsigned times signed) applies; what the
//! format subtracts is put back through the scales. A tile is four regions, each by block of 32
//! columns (`supers`: of 256):
//!
//! - `codes`: 4 bits: four vectors, low nibbles are vector 2i, high nibbles vector 2i + 1;
//!   8 bits: eight vectors.
//! - `planes`: bit 4 (and then bit 5) of the codes of each vector, as one bit a byte.
//! - `scales`: [`Scales`] says what.
//! - `supers`: 16 `f16` d, and for [`Scales::K`] 16 `f16` dmin.
//!
//! The block formats are those of llama.cpp's `ggml-common.h`.

use candle_core::quantized::GgmlDType;
use candle_core::{Result, bail};
use half::f16;

/// Rows of a tile.
pub(super) const TILE_ROWS: usize = 16;
/// Columns of a block, which share a scale of the activations.
pub(super) const BLOCK: usize = 32;
/// Columns of a super-block of the K formats.
const SUPER: usize = 256;

/// How codes become weights; u is the unsigned code of `bits` bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scales {
    /// w = d (u - 2^(bits - 1)); a block has 16 `f16` d.
    Symmetric,
    /// w = d u + m; a block has 16 `f16` d, then 16 `f16` m.
    Affine,
    /// w = d s u - dmin t; a block has 16 `u8` s, then 16 `u8` t.
    K,
    /// w = d s (u - 32) with s for each 16 columns; a block has 16 `i8` s of its first half, then
    /// of its second.
    K6,
}

/// Where things are in the tiles of one format and width.
#[derive(Debug, Clone, Copy)]
pub(super) struct TileLayout {
    pub(super) bits: u32,
    pub(super) scales: Scales,
    pub(super) num_blocks: usize,
    pub(super) planes_at: usize,
    pub(super) scales_at: usize,
    pub(super) supers_at: usize,
    /// Bytes of a tile, a multiple of 64.
    pub(super) tile_bytes: usize,
}

impl TileLayout {
    /// Returns the layout for a block format.
    ///
    /// # Errors
    ///
    /// When the format is not a block format that the kernels have, or `cols` is not a multiple
    /// of its block.
    pub(super) fn new(dtype: GgmlDType, cols: usize) -> Result<Self> {
        let (bits, scales) = match dtype {
            GgmlDType::Q4_0 => (4, Scales::Symmetric),
            GgmlDType::Q5_0 => (5, Scales::Symmetric),
            GgmlDType::Q8_0 => (8, Scales::Symmetric),
            GgmlDType::Q4_1 => (4, Scales::Affine),
            GgmlDType::Q5_1 => (5, Scales::Affine),
            GgmlDType::Q4K => (4, Scales::K),
            GgmlDType::Q5K => (5, Scales::K),
            GgmlDType::Q6K => (6, Scales::K6),
            other => bail!("no kernel for weights of type {other:?}"),
        };
        let block = dtype.block_size();
        if cols == 0 || !cols.is_multiple_of(block) {
            bail!("{dtype:?} weights need a multiple of {block} columns, got {cols}");
        }
        let num_blocks = cols / BLOCK;
        let num_supers = cols / SUPER;
        let codes_bytes = num_blocks * if bits == 8 { 512 } else { 256 };
        let planes_bytes = match bits {
            5 => num_blocks * 64,
            6 => num_blocks * 128,
            _ => 0,
        };
        let (scales_bytes, supers_bytes) = match scales {
            Scales::Symmetric => (num_blocks * 32, 0),
            Scales::Affine => (num_blocks * 64, 0),
            Scales::K => (num_blocks * 32, num_supers * 64),
            Scales::K6 => (num_blocks * 32, num_supers * 32),
        };
        let planes_at = codes_bytes;
        let scales_at = planes_at + planes_bytes;
        let supers_at = scales_at + scales_bytes;
        Ok(Self {
            bits,
            scales,
            num_blocks,
            planes_at,
            scales_at,
            supers_at,
            tile_bytes: (supers_at + supers_bytes).next_multiple_of(64),
        })
    }

    /// Fills a zeroed tile from up to 16 rows of GGML blocks; missing rows stay zero.
    pub(super) fn pack(&self, dtype: GgmlDType, rows: &[&[u8]], tile: &mut [u8]) {
        for (row, data) in rows.iter().enumerate() {
            for block in 0..self.num_blocks {
                self.put_codes(tile, block, row, &decode_codes(dtype, data, block));
            }
            self.put_scales(dtype, data, row, tile);
        }
    }

    fn put_codes(&self, tile: &mut [u8], block: usize, row: usize, codes: &[u8; BLOCK]) {
        for (column, &code) in codes.iter().enumerate() {
            let (vector, byte) = (column / 4, 4 * row + column % 4);
            if self.bits == 8 {
                tile[block * 512 + vector * 64 + byte] = code;
                continue;
            }
            let nibble = (code & 15) << (4 * (vector % 2));
            tile[block * 256 + vector / 2 * 64 + byte] |= nibble;
            for plane in 4..self.bits as usize {
                let planes = self.bits as usize - 4;
                let at = self.planes_at + (block * planes + plane - 4) * 64 + vector * 8;
                tile[at + byte / 8] |= (code >> plane & 1) << (byte % 8);
            }
        }
    }

    fn put_scales(&self, dtype: GgmlDType, data: &[u8], row: usize, tile: &mut [u8]) {
        let block_bytes = dtype.type_size();
        let mut put = |at: usize, bytes: &[u8]| tile[at..at + bytes.len()].copy_from_slice(bytes);
        match self.scales {
            Scales::Symmetric => {
                for (block, bytes) in data.chunks_exact(block_bytes).enumerate() {
                    put(self.scales_at + block * 32 + 2 * row, &bytes[..2]);
                }
            }
            Scales::Affine => {
                for (block, bytes) in data.chunks_exact(block_bytes).enumerate() {
                    let at = self.scales_at + block * 64 + 2 * row;
                    put(at, &bytes[..2]);
                    put(at + 32, &bytes[2..4]);
                }
            }
            Scales::K => {
                for (index, bytes) in data.chunks_exact(block_bytes).enumerate() {
                    let at = self.supers_at + index * 64 + 2 * row;
                    put(at, &bytes[..2]);
                    put(at + 32, &bytes[2..4]);
                    for sub in 0..8 {
                        let (scale, min) = k_scale_and_min(sub, &bytes[4..16]);
                        let at = self.scales_at + (index * 8 + sub) * 32 + row;
                        put(at, &[scale]);
                        put(at + 16, &[min]);
                    }
                }
            }
            Scales::K6 => {
                for (index, bytes) in data.chunks_exact(block_bytes).enumerate() {
                    let at = self.supers_at + index * 32 + 2 * row;
                    put(at, &bytes[208..210]);
                    for (half, &scale) in bytes[192..208].iter().enumerate() {
                        put(self.scales_at + (index * 16 + half) * 16 + row, &[scale]);
                    }
                }
            }
        }
    }

    /// Writes the weights of one row of a tile.
    pub(super) fn dequantize_row(&self, tile: &[u8], row: usize, out: &mut [f32]) {
        let half_at = |at: usize| f16::from_le_bytes([tile[at], tile[at + 1]]).to_f32();
        for (block, out) in out.chunks_exact_mut(BLOCK).enumerate() {
            let (d, offset, min) = match self.scales {
                Scales::Symmetric => {
                    let d = half_at(self.scales_at + block * 32 + 2 * row);
                    ([d; 2], 1i32 << (self.bits - 1), 0.0)
                }
                Scales::Affine => {
                    let at = self.scales_at + block * 64 + 2 * row;
                    ([half_at(at); 2], 0, half_at(at + 32))
                }
                Scales::K => {
                    let super_at = self.supers_at + block / 8 * 64 + 2 * row;
                    let at = self.scales_at + block * 32 + row;
                    let d = half_at(super_at) * f32::from(tile[at]);
                    (
                        [d; 2],
                        0,
                        -(half_at(super_at + 32) * f32::from(tile[at + 16])),
                    )
                }
                Scales::K6 => {
                    let d = half_at(self.supers_at + block / 8 * 32 + 2 * row);
                    let at = self.scales_at + block * 32 + row;
                    let scale = |at: usize| d * f32::from(tile[at].cast_signed());
                    ([scale(at), scale(at + 16)], 32, 0.0)
                }
            };
            for (column, out) in out.iter_mut().enumerate() {
                let code = i32::from(self.code(tile, block, row, column));
                *out = d[column / 16] * (code - offset) as f32 + min;
            }
        }
    }

    fn code(&self, tile: &[u8], block: usize, row: usize, column: usize) -> u8 {
        let (vector, byte) = (column / 4, 4 * row + column % 4);
        if self.bits == 8 {
            return tile[block * 512 + vector * 64 + byte];
        }
        let mut code = tile[block * 256 + vector / 2 * 64 + byte] >> (4 * (vector % 2)) & 15;
        let planes = self.bits as usize - 4;
        for plane in 0..planes {
            let at = self.planes_at + (block * planes + plane) * 64 + vector * 8 + byte / 8;
            code |= (tile[at] >> (byte % 8) & 1) << (4 + plane);
        }
        code
    }
}

/// Returns the unsigned codes of one block of 32 columns of a row.
fn decode_codes(dtype: GgmlDType, row: &[u8], block: usize) -> [u8; BLOCK] {
    let per_bytes = dtype.block_size() / BLOCK;
    let bytes = &row[block / per_bytes * dtype.type_size()..][..dtype.type_size()];
    let sub = block % per_bytes;
    // The formats of 32 columns keep columns 0..16 in low nibbles and 16..32 in high ones.
    let nibble = |qs: &[u8], i: usize| qs[i % 16] >> (4 * (i / 16)) & 15;
    let bit = |qh: &[u8], i: usize| (qh[i / 8] >> (i % 8) & 1) << 4;
    std::array::from_fn(|i| match dtype {
        GgmlDType::Q4_0 => nibble(&bytes[2..], i),
        GgmlDType::Q4_1 => nibble(&bytes[4..], i),
        GgmlDType::Q5_0 => nibble(&bytes[6..], i) | bit(&bytes[2..], i),
        GgmlDType::Q5_1 => nibble(&bytes[8..], i) | bit(&bytes[4..], i),
        GgmlDType::Q4K => bytes[16 + sub / 2 * 32 + i] >> (4 * (sub % 2)) & 15,
        GgmlDType::Q5K => {
            let low = bytes[48 + sub / 2 * 32 + i] >> (4 * (sub % 2)) & 15;
            low | (bytes[16 + i] >> sub & 1) << 4
        }
        GgmlDType::Q6K => {
            let (half, quarter) = (sub / 4, sub % 4);
            let low = bytes[half * 64 + quarter % 2 * 32 + i] >> (4 * (quarter / 2)) & 15;
            low | (bytes[128 + half * 32 + i] >> (2 * quarter) & 3) << 4
        }
        // Two's complement plus 128 is the sign bit inverted.
        _ => bytes[2 + i] ^ 0x80,
    })
}

/// Returns the 6-bit scale and minimum of a sub-block from the 12 packed bytes of Q4_K and Q5_K.
fn k_scale_and_min(sub: usize, packed: &[u8]) -> (u8, u8) {
    if sub < 4 {
        return (packed[sub] & 63, packed[sub + 4] & 63);
    }
    let (both, scale_top, min_top) = (packed[sub + 4], packed[sub - 4], packed[sub]);
    (
        (both & 15) | (scale_top >> 6 << 4),
        (both >> 4) | (min_top >> 6 << 4),
    )
}
