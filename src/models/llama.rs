//! Llama 2, 3.x and models of that shape (SmolLM2): what differs from the shared decoder.
//!
//! Biases on all four attention linears or on the MLP's are switches of `config.json`.

use super::ModelError;
use super::config::{Keys, ModelConfig};

/// Completes the shared part of the configuration.
pub(super) fn complete(shared: ModelConfig, keys: &Keys<'_>) -> Result<ModelConfig, ModelError> {
    let attention_bias = keys.opt_bool("attention_bias")?.unwrap_or(false);
    let mlp_bias = keys.opt_bool("mlp_bias")?.unwrap_or(false);
    Ok(ModelConfig {
        qkv_bias: attention_bias,
        o_bias: attention_bias,
        mlp_bias,
        ..shared
    })
}
