//! Noise that is a function of its place: keys of dropout masks, and NEFTune.

use candle_core::{Result, Tensor};

use super::TrainBatch;

/// Mixes a key with a number into another key (the finaliser of Steele's SplitMix64).
pub(in crate::train) fn mix(key: u64, number: u64) -> u64 {
    let mut bits = key ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

/// Adds uniform noise in ±alpha / sqrt(L d) to embeddings `[tokens, d]`, with L the length of a
/// token's sequence (NEFTune, arXiv:2310.05914).
pub(super) fn add(embedded: &Tensor, batch: &TrainBatch, alpha: f64, key: u64) -> Result<Tensor> {
    let (num_tokens, width) = embedded.dims2()?;
    let mut noise = Vec::with_capacity(num_tokens * width);
    for bounds in batch.cu_seqlens.windows(2) {
        let len = (bounds[1] - bounds[0]) as usize;
        let bound = alpha / ((len * width) as f64).sqrt();
        for index in bounds[0] as usize * width..bounds[1] as usize * width {
            // 53 random bits as a number in 0..1.
            let uniform = (mix(key, index as u64) >> 11) as f64 / (1u64 << 53) as f64;
            noise.push(((2.0 * uniform - 1.0) * bound) as f32);
        }
    }
    embedded + Tensor::from_vec(noise, (num_tokens, width), embedded.device())?
}
