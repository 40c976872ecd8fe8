//! Opens what a user names: a model, an adapter, or a model with adapters folded in, each a path or
//! a hub id. One home for what `merge`, `serve` and `train` begin with.

use std::sync::Arc;

use super::{
    Adapter, Checkpoint, HubOptions, MergeOptions, MergedCheckpoint, ModelSource, WeightsError,
    resolve_adapter, resolve_model,
};

/// Opens a model: a directory, a GGUF file or a hub id, downloaded if need be.
///
/// # Errors
/// As [`resolve_model`] and [`Checkpoint::open`].
pub fn open_model(spec: &str, hub: &HubOptions) -> Result<Checkpoint, WeightsError> {
    Checkpoint::open(&resolve_model(spec, hub)?)
}

/// Opens an adapter: a directory or a hub id, downloaded if need be, or `subfolder` in it.
///
/// `hub.revision` is the model's; an adapter's follows its id after an `@`.
///
/// # Errors
/// As [`resolve_adapter`] and [`Adapter::open`].
pub fn open_adapter(
    spec: &str,
    subfolder: Option<&str>,
    hub: &HubOptions,
) -> Result<Adapter, WeightsError> {
    let hub = HubOptions {
        revision: None,
        ..hub.clone()
    };
    Adapter::open(&resolve_adapter(spec, subfolder, &hub)?, subfolder)
}

/// Returns `base` with the named adapters folded in, each with weight 1, when its tensors are read;
/// without adapters the base itself. What is worth a look is logged.
///
/// # Errors
/// As [`open_adapter`] and [`MergedCheckpoint::plan`].
pub fn open_with_adapters(
    base: Arc<Checkpoint>,
    adapters: &[String],
    hub: &HubOptions,
) -> Result<Arc<dyn ModelSource>, WeightsError> {
    if adapters.is_empty() {
        return Ok(base);
    }
    let adapters = (adapters.iter())
        .map(|spec| Ok((open_adapter(spec, None, hub)?, 1.0)))
        .collect::<Result<_, WeightsError>>()?;
    let merged = MergedCheckpoint::plan(base, adapters, MergeOptions::default())?;
    for warning in merged.warnings() {
        tracing::warn!("{warning}");
    }
    Ok(Arc::new(merged))
}
