//! Qwen3 (dense): what differs from the shared decoder.
//!
//! An RMS norm on every head of q and k; a head's width is not tied to the hidden size.

use super::ModelError;
use super::config::{Keys, ModelConfig};
use super::qwen2::refuse_sliding_window;

/// The head width where `config.json` has none.
pub(super) const DEFAULT_HEAD_DIM: usize = 128;

/// Completes the shared part of the configuration.
pub(super) fn complete(shared: ModelConfig, keys: &Keys<'_>) -> Result<ModelConfig, ModelError> {
    refuse_sliding_window(&shared, keys)?;
    let bias = keys.opt_bool("attention_bias")?.unwrap_or(false);
    Ok(ModelConfig {
        qk_norm: true,
        qkv_bias: bias,
        o_bias: bias,
        ..shared
    })
}
