//! Chooses how wide the registers of the folding loops are. The loops are written once and the
//! compiler makes SIMD of them. A product is fused with an addition only where a loop says so, so
//! all give the same bits.

use super::{
    fold::{Block, Buffers, NotFinite},
    norm,
    stats::DeltaStats,
};

/// The widest registers that the processor has.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy, PartialEq, Eq)]
enum Registers {
    Avx512,
    Avx2,
    Baseline,
}

#[cfg(target_arch = "x86_64")]
fn registers() -> Registers {
    if !is_x86_feature_detected!("avx2") || !is_x86_feature_detected!("fma") {
        Registers::Baseline
    } else if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") {
        Registers::Avx512
    } else {
        Registers::Avx2
    }
}

/// Folds one group of rows with the widest registers that the processor has.
pub(super) fn fold_group(
    block: &Block,
    first_row: usize,
    bytes: &mut [u8],
    buffers: &mut Buffers,
) -> Result<DeltaStats, NotFinite> {
    #[cfg(target_arch = "x86_64")]
    match registers() {
        // SAFETY: the processor has the features.
        Registers::Avx512 => unsafe {
            return fold_group_avx512(block, first_row, bytes, buffers);
        },
        // SAFETY: the processor has the features.
        Registers::Avx2 => unsafe {
            return fold_group_avx2(block, first_row, bytes, buffers);
        },
        Registers::Baseline => {}
    }
    block.fold_group(first_row, bytes, buffers)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw")]
fn fold_group_avx512(
    block: &Block,
    first_row: usize,
    bytes: &mut [u8],
    buffers: &mut Buffers,
) -> Result<DeltaStats, NotFinite> {
    block.fold_group(first_row, bytes, buffers)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn fold_group_avx2(
    block: &Block,
    first_row: usize,
    bytes: &mut [u8],
    buffers: &mut Buffers,
) -> Result<DeltaStats, NotFinite> {
    block.fold_group(first_row, bytes, buffers)
}

/// Adds the squares of a row to the sums of its columns.
pub(super) fn add_squares(sums: &mut [f32], row: &[f32]) {
    #[cfg(target_arch = "x86_64")]
    if registers() != Registers::Baseline {
        // SAFETY: the processor has the features.
        return unsafe { add_squares_avx2(sums, row) };
    }
    norm::add_squares(sums, row);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn add_squares_avx2(sums: &mut [f32], row: &[f32]) {
    norm::add_squares(sums, row);
}
