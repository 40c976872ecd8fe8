//! What a run is asked to do, and what it tells while it does.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Map, Value};

use crate::models::ModelConfig;
use crate::weights::TensorSource;

use super::super::adapter_out::AdapterFiles;
use super::super::forward_backward::{Recompute, TrainBatch};
use super::super::lora::LoraOptions;
use super::super::lr_schedule::LrSchedule;
use super::super::manifest::Manifest;
use super::super::optimizer::{AdamWOptions, LossScaleOptions};
use super::super::zero::ZeroStage;

/// A micro-batch in a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchPlace {
    /// Epoch, from 0.
    pub epoch: u64,
    /// Micro-batch of the epoch, from 0.
    pub index: u64,
    /// Rank, from 0.
    pub rank: usize,
}

/// Makes the micro-batch of a place: the same for the same place, in any order, on any thread.
pub type BatchProvider<'a> =
    dyn Fn(BatchPlace) -> Result<TrainBatch, Box<dyn Error + Send + Sync>> + Sync + 'a;

/// How long a run is. `total_updates` decides; the rest says where an update's data lies.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RunLength {
    /// Micro-batches of one rank in one epoch; at least 1.
    pub micro_batches_per_epoch: u64,
    /// Micro-batches of an update; the last update of an epoch may have fewer.
    pub accumulation: u64,
    /// Updates of the run.
    pub total_updates: u64,
    /// Epochs asked for, for the logs.
    pub num_train_epochs: f64,
}

impl RunLength {
    /// Returns the updates of an epoch.
    pub fn updates_per_epoch(&self) -> u64 {
        self.micro_batches_per_epoch
            .div_ceil(self.accumulation.max(1))
            .max(1)
    }
}

/// Evaluation during a run.
pub struct Evaluation<'a> {
    /// Makes evaluation batches; `epoch` and `rank` are 0.
    pub batches: &'a BatchProvider<'a>,
    /// How many there are.
    pub num_batches: u64,
    /// Examples in all of them.
    pub num_examples: u64,
    /// Updates between two evaluations.
    pub every: u64,
    /// Updates before the first of them.
    pub delay: u64,
    /// Whether to evaluate before the first update too.
    pub on_start: bool,
    /// Evaluations without a better loss after which the run stops.
    pub early_stopping: Option<u64>,
    /// Whether the checkpoint with the lowest loss becomes the result; one is then written at
    /// every evaluation that is the best so far.
    pub load_best_model_at_end: bool,
}

/// Where a run begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Start {
    /// With fresh adapters.
    Fresh,
    /// With the weights of an adapter of the same layout.
    Adapter(PathBuf),
    /// Where a checkpoint of the same configuration stands.
    Checkpoint(PathBuf),
}

/// How the ranks of a run work.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ranks {
    /// Data-parallel ranks, one thread each; at least 1.
    pub num_ranks: usize,
    /// Threads of each rank's kernels, its own included.
    pub threads_per_rank: usize,
    /// What they divide.
    pub zero_stage: ZeroStage,
}

/// When a run logs and saves.
#[derive(Debug, Clone, PartialEq)]
pub struct OutputPlan {
    /// Directory of everything; made if it is not there.
    pub output_dir: PathBuf,
    /// Checkpoints of an earlier run, which are removed when this one begins: it may start from
    /// the weights of one of them.
    pub replaced: Vec<PathBuf>,
    /// Updates between two log entries; at least 1.
    pub logging_steps: u64,
    /// Whether the first update is logged too.
    pub logging_first_step: bool,
    /// Updates between two checkpoints; none for no checkpoints.
    pub save_steps: Option<u64>,
    /// Checkpoints that are kept.
    pub save_total_limit: Option<usize>,
    /// Whether checkpoints hold the adapter alone, so that no run can go on from them.
    pub save_only_model: bool,
    /// Whether the loss is drawn at the end.
    pub plot_loss: bool,
    /// Where TensorBoard's event files go; none for no such files.
    pub tensorboard_dir: Option<PathBuf>,
    /// Sequences of a micro-batch, for the logs.
    pub train_batch_size: u64,
    /// Examples that all updates of the run go through, for the logs.
    pub num_samples: f64,
}

/// Everything that a run needs.
pub struct TrainSetup<'a> {
    /// The frozen base.
    pub source: &'a dyn TensorSource,
    /// Its shape.
    pub config: &'a ModelConfig,
    /// The adapters.
    pub lora: LoraOptions,
    /// The optimizer.
    pub optimizer: AdamWOptions,
    /// The learning rate.
    pub schedule: LrSchedule,
    /// fp16's loss scale.
    pub loss_scale: Option<LossScaleOptions>,
    /// What the backward pass computes again.
    pub recompute: Recompute,
    /// NEFTune; 0 for none.
    pub neftune_noise_alpha: f64,
    /// Seed of initial values, dropout and noise.
    pub seed: u64,
    /// How long.
    pub length: RunLength,
    /// Longest sequence.
    pub max_positions: usize,
    /// Micro-batches of an update are computed together up to so many tokens.
    pub max_tokens_per_pass: usize,
    /// The data.
    pub batches: &'a BatchProvider<'a>,
    /// Evaluation.
    pub evaluation: Option<Evaluation<'a>>,
    /// Logging and saving.
    pub output: OutputPlan,
    /// Ranks.
    pub ranks: Ranks,
    /// What goes beside the adapter's weights.
    pub files: AdapterFiles,
    /// What a checkpoint must share with the run that resumes it.
    pub manifest: Manifest,
    /// Where to begin.
    pub start: Start,
}

/// What happens in a run, told by rank 0 as it happens.
#[derive(Debug)]
pub enum TrainEvent<'a> {
    /// The base is loaded and training begins, after `global_step` updates of earlier processes.
    Begin {
        /// Updates already made.
        global_step: u64,
        /// Updates of the run.
        total_updates: u64,
        /// Trainable parameters.
        num_trainable: u64,
        /// All parameters, trainable ones included.
        num_params: u64,
    },
    /// An update was made.
    Update {
        /// Updates made.
        global_step: u64,
        /// Mean loss over its target tokens.
        loss: f64,
        /// Norm of the gradients before clipping.
        grad_norm: f64,
        /// Learning rate that was used.
        learning_rate: f64,
        /// Tokens of the inputs, of all ranks.
        num_tokens: u64,
        /// Time that it took.
        elapsed: Duration,
    },
    /// An entry was added to the history.
    Log(&'a Map<String, Value>),
    /// A checkpoint was written.
    Saved(&'a Path),
    /// fp16 gradients overflowed and the update was skipped.
    Skipped {
        /// Updates made, this one included.
        global_step: u64,
        /// The loss scale of this update.
        attempted: f64,
        /// The loss scale from now on.
        loss_scale: f64,
        /// Overflows from now on before the scale halves.
        hysteresis_left: u64,
    },
    /// The run stops early: that many evaluations were not better.
    EarlyStop {
        /// Updates made.
        global_step: u64,
        /// Evaluations without improvement.
        num_worse: u64,
    },
}

/// Takes the events.
pub type Progress<'a> = dyn Fn(&TrainEvent<'_>) + Sync + 'a;

/// What a run came to.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainSummary {
    /// Updates made, those of earlier processes included.
    pub global_step: u64,
    /// Whether nothing was left to do.
    pub was_complete: bool,
    /// Mean loss over all updates.
    pub train_loss: f64,
    /// Metrics of `train_results.json`.
    pub metrics: Map<String, Value>,
    /// The trained parameters, in the layout's order.
    pub params: Vec<f32>,
}
