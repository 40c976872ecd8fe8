//! Chooses how wide the registers of the folding loops are. The loops are written once and the
//! compiler makes SIMD of them; no product is fused with an addition, so all give the same bits.

use super::{
    fold::{Block, Buffers, NotFinite},
    stats::DeltaStats,
};

/// Folds one group of rows with the widest registers that the processor has.
pub(super) fn fold_group(
    block: &Block,
    first_row: usize,
    bytes: &mut [u8],
    buffers: &mut Buffers,
) -> Result<DeltaStats, NotFinite> {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") {
            // SAFETY: the processor has the features.
            return unsafe { fold_group_avx512(block, first_row, bytes, buffers) };
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has the feature.
            return unsafe { fold_group_avx2(block, first_row, bytes, buffers) };
        }
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
#[target_feature(enable = "avx2")]
fn fold_group_avx2(
    block: &Block,
    first_row: usize,
    bytes: &mut [u8],
    buffers: &mut Buffers,
) -> Result<DeltaStats, NotFinite> {
    block.fold_group(first_row, bytes, buffers)
}
