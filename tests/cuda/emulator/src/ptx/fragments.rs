//! How matrices lie in a warp's registers: blocks of 8 × 8 elements, of which lanes `4 row ..` hold a row.

use half::{bf16, f16};

use super::convert::{from_bf16, from_f16};
use super::row::Row;

/// Rows and columns of a block.
pub(super) type Block = [[f32; 8]; 8];

/// An element of 16 bits.
pub(super) trait Half {
    /// Returns its value.
    fn value(bits: u16) -> f32;
}
impl Half for f16 {
    #[inline(always)]
    fn value(bits: u16) -> f32 {
        from_f16(f16::from_bits(bits))
    }
}
impl Half for bf16 {
    #[inline(always)]
    fn value(bits: u16) -> f32 {
        from_bf16(bf16::from_bits(bits))
    }
}

/// Returns the values of a register whose lanes have two neighbours of a row each.
#[inline(always)]
pub(super) fn read_halves<T: Half>(register: &Row) -> Block {
    let mut block = [[0.0; 8]; 8];
    for (row, words) in register.0.chunks_exact(4).enumerate() {
        let mut halves = [0_u16; 8];
        for (index, &word) in words.iter().enumerate() {
            halves[2 * index] = word as u16;
            halves[2 * index + 1] = (word >> 16) as u16;
        }
        for (value, &half) in block[row].iter_mut().zip(&halves) {
            *value = T::value(half);
        }
    }
    block
}

/// Returns the values of two registers, the first with columns 0, 2, 4, 6 and the second with the others.
#[inline(always)]
pub(super) fn read_floats(even: &Row, odd: &Row) -> Block {
    let mut block = [[0.0; 8]; 8];
    for (row, values) in block.iter_mut().enumerate() {
        for pair in 0..4 {
            values[2 * pair] = f32::from_bits(even.0[4 * row + pair]);
            values[2 * pair + 1] = f32::from_bits(odd.0[4 * row + pair]);
        }
    }
    block
}

/// Writes them back; `row(index)` gives the block's rows.
#[inline(always)]
pub(super) fn write_floats(block: &Block, even: &mut Row, odd: &mut Row) {
    for (row, values) in block.iter().enumerate() {
        for pair in 0..4 {
            even.0[4 * row + pair] = values[2 * pair].to_bits();
            odd.0[4 * row + pair] = values[2 * pair + 1].to_bits();
        }
    }
}

/// Returns the transposed block.
#[inline(always)]
pub(super) fn transpose(block: &Block) -> Block {
    let mut result = [[0.0; 8]; 8];
    for row in 0..8 {
        for column in 0..8 {
            result[column][row] = block[row][column];
        }
    }
    result
}

/// Reads A's four registers: the upper and lower half of the left 8 columns, then of the right ones.
#[inline(always)]
pub(super) fn read_a<T: Half>(registers: &[Row; 4]) -> [[f32; 16]; 16] {
    let mut a = [[0.0; 16]; 16];
    for (index, register) in registers.iter().enumerate() {
        let (top, left) = (8 * (index % 2), 8 * (index / 2));
        for (row, values) in read_halves::<T>(register).iter().enumerate() {
            a[top + row][left..left + 8].copy_from_slice(values);
        }
    }
    a
}
