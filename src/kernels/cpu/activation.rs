//! Quantises activations to signed bytes for the block-format kernels.
//!
//! Each block of 32 columns of a row gets an `f32` scale a = max |x| / 127 and codes
//! q = round(x / a). Rows are laid out in groups of 8, 4, 2 or 1, block by block, so that the
//! kernel reads a group's block at constant offsets from one pointer:
//! `[rows * 8 words of codes][a][a Σq][-Σq][-Σ first 16][-Σ last 16]`, each of `rows` words.

use super::buffer::Output;
use super::pool::Pool;
use super::quant_pack::BLOCK;
use super::simd::{Simd, SimdLevel, Task};

/// Words of one block of one row: 8 of codes and 5 of scale and sums.
pub(super) const BLOCK_WORDS: usize = 13;
/// The most rows of a group.
pub(super) const MAX_GROUP: usize = 8;

/// The quantised rows of one matmul.
pub(super) struct Activations {
    words: Vec<u32>,
    num_blocks: usize,
}

/// Returns the groups that rows `start..end` fall into, as (first row, number of rows); `start`
/// must be a multiple of 8.
#[inline(always)]
pub(super) fn groups(start: usize, end: usize) -> impl Iterator<Item = (usize, usize)> {
    let mut row = start;
    std::iter::from_fn(move || {
        let left = end - row;
        let size = if left >= MAX_GROUP {
            MAX_GROUP
        } else {
            // The highest power of two in what is left; 0 ends.
            left.checked_ilog2().map(|log| 1 << log)?
        };
        row += size;
        Some((row - size, size))
    })
}

impl Activations {
    /// Quantises `x: [num_rows, cols]`; `cols` must be a multiple of 32.
    pub(super) fn quantize(level: SimdLevel, pool: &Pool, x: &[f32], cols: usize) -> Self {
        let (num_rows, num_blocks) = (x.len() / cols, cols / BLOCK);
        let words = Output::new(num_rows * num_blocks * BLOCK_WORDS);
        // Small inputs are quantised faster than another thread is called.
        let rows_per_task = (16 * 1024usize).div_ceil(cols).next_multiple_of(MAX_GROUP);
        pool.run(num_rows.div_ceil(rows_per_task), |task| {
            let start = task * rows_per_task;
            let end = (start + rows_per_task).min(num_rows);
            for (row, size) in groups(start, end) {
                let group = QuantizeGroup {
                    x: &x[row * cols..(row + size) * cols],
                    size,
                    cols,
                    words: words.at(row * num_blocks * BLOCK_WORDS),
                };
                // SAFETY: `level` is supported, as `Kernels` checks at its creation.
                unsafe { level.run(group) };
            }
        });
        // SAFETY: the groups cover all rows, and a group writes all its words.
        let words = unsafe { words.finish() };
        Self { words, num_blocks }
    }

    /// Returns the words of the group that begins at `row`.
    #[inline(always)]
    pub(super) fn group(&self, row: usize, size: usize) -> &[u32] {
        let row_words = self.num_blocks * BLOCK_WORDS;
        &self.words[row * row_words..(row + size) * row_words]
    }
}

struct QuantizeGroup<'a> {
    x: &'a [f32],
    size: usize,
    cols: usize,
    words: *mut u32,
}

impl Task for QuantizeGroup<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self {
            x,
            size,
            cols,
            words,
        } = self;
        for (row, x) in x.chunks_exact(cols).enumerate() {
            for (block, x) in x.chunks_exact(BLOCK).enumerate() {
                // SAFETY: the group has `size * cols / 32 * 13` words from `words` on, and
                // block `block` of row `row` lies within them.
                unsafe {
                    let base = words.add(block * size * BLOCK_WORDS);
                    let sums = quantize_block(simd, x.as_ptr(), base.add(row * 8).cast());
                    for (i, word) in sums.into_iter().enumerate() {
                        base.add(size * (8 + i) + row).write(word);
                    }
                }
            }
        }
    }
}

/// Writes the 32 codes of a block and returns its scale and sums.
///
/// # Safety
///
/// `x` must be readable for 32 floats and `codes` writable for 32 bytes.
#[inline(always)]
unsafe fn quantize_block<S: Simd>(simd: S, x: *const f32, codes: *mut i8) -> [u32; 5] {
    // SAFETY: the caller's promise.
    let (low, high) = unsafe { (simd.load(x), simd.load(x.add(16))) };
    let max = simd.reduce_max(simd.max(simd.abs(low), simd.abs(high)));
    let scale = max / 127.0;
    let inverse = simd.splat(if max > 0.0 { 127.0 / max } else { 0.0 });
    let low = simd.to_i32(simd.mul(low, inverse));
    let high = simd.to_i32(simd.mul(high, inverse));
    // SAFETY: the caller's promise.
    unsafe {
        simd.store_i8(codes, low);
        simd.store_i8(codes.add(16), high);
    }
    let (low, high) = (simd.reduce_add_i32(low), simd.reduce_add_i32(high));
    let sum = low + high;
    [
        scale.to_bits(),
        (scale * sum as f32).to_bits(),
        (-sum).cast_unsigned(),
        (-low).cast_unsigned(),
        (-high).cast_unsigned(),
    ]
}
