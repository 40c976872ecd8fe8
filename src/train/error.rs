//! What goes wrong in training, with the numbers.

use std::path::PathBuf;

use crate::weights::WeightsError;

use super::DeepSpeedError;

/// Errors of the training core.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// The base model lacks a tensor or it has another shape.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// A kernel or a collective refused its inputs.
    #[error("{during}: {source}")]
    Kernel {
        /// What was being computed.
        during: String,
        /// What the kernel said.
        source: candle_core::Error,
    },
    /// Entries of `lora_target` that name no linear of the model.
    #[error(
        "lora_target {missing:?} matches no linear of this model; its linears are {available}, \
         or use \"all\" for those of the layers; other modules can be trained whole with \
         additional_target"
    )]
    UnknownTarget {
        /// The entries.
        missing: Vec<String>,
        /// The names that exist.
        available: String,
    },
    /// Entries of `additional_target` that name no module of the model.
    #[error("additional_target {missing:?} matches no module of this model; it has {available}")]
    UnknownModule {
        /// The entries.
        missing: Vec<String>,
        /// The names that exist.
        available: String,
    },
    /// A number of the configuration is out of its range.
    #[error("{key} must be {wanted}, got {found}")]
    InvalidOption {
        /// The key as users write it.
        key: &'static str,
        /// What it may be.
        wanted: String,
        /// What it is.
        found: String,
    },
    /// Something that infold does not train.
    #[error("{what} is not supported in training; {advice}")]
    Unsupported {
        /// What was asked for.
        what: String,
        /// What to do.
        advice: String,
    },
    /// A DeepSpeed configuration does not fit the steps of the run.
    #[error(transparent)]
    DeepSpeed(#[from] DeepSpeedError),
    /// A batch contradicts itself or the model.
    #[error("training batch: {what}")]
    Batch {
        /// What is wrong, with numbers.
        what: String,
    },
    /// Numbers left the range of floats.
    #[error(
        "{quantity} is {value} at step {step}, in rows {rows:?}; nothing of this step was applied \
         and the last checkpoint is good. Lower learning_rate, set max_grad_norm, or look at these \
         rows"
    )]
    NonFinite {
        /// The loss or the gradient's norm.
        quantity: &'static str,
        /// What it is.
        value: f64,
        /// The optimizer step, from 1.
        step: u64,
        /// Rows of the data set in the micro-batches that are not finite.
        rows: Vec<u64>,
    },
    /// Trained parameters left the range of floats.
    #[error(
        "trained parameters are NaN or infinite after step {step} and were not written; the last \
         checkpoint is good. Lower learning_rate"
    )]
    Diverged {
        /// The optimizer step, from 1.
        step: u64,
    },
    /// Sixteen-bit loss scaling can not go lower.
    #[error(
        "the loss scale is at its minimum {min_loss_scale} and gradients still overflow at step \
         {step}; use bf16 or f32, or lower learning_rate"
    )]
    LossScale {
        /// The smallest scale allowed.
        min_loss_scale: f64,
        /// The optimizer step, from 1.
        step: u64,
    },
    /// A file can not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The output directory can not be made.
    #[error("output_dir {path:?} cannot be made: {source}; choose another")]
    OutputDir {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A checkpoint file has another content than expected.
    #[error("{path}: {what}")]
    Checkpoint {
        /// The file or directory.
        path: PathBuf,
        /// What is wrong and what to do.
        what: String,
    },
    /// A checkpoint of another configuration.
    #[error(
        "{path} was made with another configuration: {differences}. Use overwrite_output_dir: \
         true without resume_from_checkpoint to start over, or another output_dir; with {path} as \
         the last of adapter_name_or_path there, and without create_new_adapter, training goes on \
         from its weights with its own rank, alpha and targets and a new learning rate"
    )]
    ManifestMismatch {
        /// The checkpoint.
        path: PathBuf,
        /// `key was …, is …`, all of them.
        differences: String,
    },
    /// The data ended or failed.
    #[error("training data: {0}")]
    Data(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The curve of the loss could not be drawn.
    #[error("{path}: {what}")]
    Plot {
        /// The image.
        path: PathBuf,
        /// What failed.
        what: String,
    },
}

impl TrainError {
    /// Returns an adapter for `map_err` that says what was being computed.
    pub(super) fn kernel(during: impl Into<String>) -> impl FnOnce(candle_core::Error) -> Self {
        let during = during.into();
        move |source| Self::Kernel { during, source }
    }

    /// Returns an adapter for `map_err` that names the file.
    pub(super) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }
}
