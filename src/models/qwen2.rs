//! Qwen2 and Qwen2.5: what differs from the shared decoder.
//!
//! q, k and v have biases whatever `config.json` says; the sliding window is a switch there.

use super::ModelError;
use super::config::{Keys, ModelConfig};

/// Completes the shared part of the configuration.
pub(super) fn complete(shared: ModelConfig, keys: &Keys<'_>) -> Result<ModelConfig, ModelError> {
    refuse_sliding_window(&shared, keys)?;
    Ok(ModelConfig {
        qkv_bias: true,
        ..shared
    })
}

/// Refuses a sliding window that some layer would use: `use_sliding_window` with fewer full
/// layers (`max_window_layers`) than layers and a window below the model's length.
pub(super) fn refuse_sliding_window(
    shared: &ModelConfig,
    keys: &Keys<'_>,
) -> Result<(), ModelError> {
    let in_use = keys.opt_bool("use_sliding_window")?.unwrap_or(false);
    let Some(window) = keys.opt_usize("sliding_window")?.filter(|_| in_use) else {
        return Ok(());
    };
    let num_full_layers = keys.opt_usize("max_window_layers")?.unwrap_or(0);
    if num_full_layers >= shared.num_layers || window >= shared.max_position_embeddings {
        return Ok(());
    }
    Err(ModelError::Unsupported {
        what: format!("an active sliding window of {window} tokens"),
        advice: "set \"use_sliding_window\": false in config.json to attend to everything"
            .to_owned(),
    })
}
