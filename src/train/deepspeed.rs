//! DeepSpeed's JSON: what it asks for, resolved against the run, and what each key will do here.
//!
//! `"auto"` takes the run's own value; any other value must equal it, as in Hugging Face's
//! integration, whose error text is kept. A scheduler in the file overrides `lr_scheduler_type`,
//! as it does there, unless the run prefers its own.

mod effects;
mod read;
#[cfg(test)]
mod tests;

use std::path::PathBuf;

use serde_json::Value;

pub use effects::KeyEffect;
use read::{Comparison, Config};

/// What is wrong with a DeepSpeed configuration.
#[derive(Debug, thiserror::Error)]
pub enum DeepSpeedError {
    /// The file can not be read.
    #[error("cannot read the DeepSpeed configuration {path:?}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not JSON.
    #[error("the DeepSpeed configuration {path:?} is not valid JSON: {source}")]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// Values that differ from the run's.
    #[error(
        "Please correct the following DeepSpeed config values that mismatch TrainingArguments \
         values:\n{}\nThe easiest method is to set these DeepSpeed config values to 'auto'.",
        .mismatches.join("\n")
    )]
    Mismatch {
        /// `- ds key=value vs hf key=value`, one for each.
        mismatches: Vec<String>,
    },
    /// A value of another type or out of range.
    #[error("DeepSpeed configuration: `{key}` must be {wanted}, found {found}")]
    InvalidValue {
        /// The key, with dots.
        key: String,
        /// What it may be.
        wanted: &'static str,
        /// What it is.
        found: String,
    },
    /// A feature that is not built.
    #[error("DeepSpeed configuration: `{key}` = {value} is not built; {advice}")]
    NotBuilt {
        /// The key, with dots.
        key: String,
        /// Its value.
        value: String,
        /// What to do.
        advice: &'static str,
    },
}

/// The run's own values, which `"auto"` takes and others must equal.
#[derive(Debug, Clone, PartialEq)]
pub struct RunValues {
    /// Data-parallel ranks.
    pub world_size: u64,
    /// `per_device_train_batch_size`.
    pub per_device_train_batch_size: u64,
    /// `gradient_accumulation_steps`.
    pub gradient_accumulation_steps: u64,
    /// `max_grad_norm`.
    pub max_grad_norm: f64,
    /// `learning_rate`.
    pub learning_rate: f64,
    /// `adam_beta1` and `adam_beta2`.
    pub adam_betas: [f64; 2],
    /// `adam_epsilon`.
    pub adam_epsilon: f64,
    /// `weight_decay`.
    pub weight_decay: f64,
    /// `bf16`.
    pub bf16: bool,
    /// `fp16`.
    pub fp16: bool,
}

/// What the ranks divide among them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ZeroStage {
    /// Nothing: data parallel.
    Zero,
    /// The optimiser's states.
    One,
    /// And the gradients.
    Two,
    /// And the parameters, the frozen base with them.
    Three,
}

/// A learning-rate schedule of DeepSpeed. Numbers that the file leaves to the run are absent.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DeepSpeedSchedule {
    /// Which one.
    pub kind: DeepSpeedScheduleKind,
    /// The rate at the start; for the cosine, its share of the peak.
    pub warmup_min_lr: f64,
    /// The rate after the warm-up.
    pub warmup_max_lr: f64,
    /// Updates of the warm-up; absent means the run's `warmup_steps` or `warmup_ratio`.
    pub warmup_num_steps: Option<u64>,
    /// How the rate rises.
    pub warmup_type: WarmupType,
    /// Updates until the end of the decay; absent means all of the run.
    pub total_num_steps: Option<u64>,
    /// For the cosine, the rate at the end as a share of the peak.
    pub cos_min_ratio: f64,
}

/// Which schedule of DeepSpeed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeepSpeedScheduleKind {
    /// Rises and stays.
    WarmupLr,
    /// Rises and falls linearly to zero.
    WarmupDecayLr,
    /// Rises linearly and falls as a cosine.
    WarmupCosineLr,
}

/// How a warm-up of DeepSpeed rises.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WarmupType {
    /// With the logarithm of the update, the default.
    Log,
    /// In proportion to the update.
    Linear,
}

/// The loss scale of fp16.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LossScale {
    /// A fixed scale; absent means one that adapts.
    pub fixed: Option<f64>,
    /// The first scale is two to this power.
    pub initial_scale_power: u64,
    /// Updates without overflow before the scale doubles.
    pub loss_scale_window: u64,
    /// Overflows before the scale halves.
    pub hysteresis: u64,
    /// The smallest scale.
    pub min_loss_scale: f64,
}

impl Default for LossScale {
    /// Returns DeepSpeed's defaults, which are the reference's values too.
    fn default() -> Self {
        Self {
            fixed: None,
            initial_scale_power: 16,
            loss_scale_window: 1000,
            hysteresis: 2,
            min_loss_scale: 1.0,
        }
    }
}

/// A DeepSpeed configuration that fits its run.
#[derive(Debug, Clone, PartialEq)]
pub struct DeepSpeedConfig {
    /// What the ranks divide among them.
    pub stage: ZeroStage,
    /// The schedule that overrides the run's, if the file has one.
    pub schedule: Option<DeepSpeedSchedule>,
    /// The loss scale of fp16.
    pub loss_scale: LossScale,
    /// The largest global norm of a gradient; 0 for no limit.
    pub gradient_clipping: f64,
    /// What each key of the file does, for the plan.
    pub effects: Vec<KeyEffect>,
    warmup_steps: Comparison<u64>,
    total_steps: Comparison<u64>,
}

impl DeepSpeedConfig {
    /// Reads a configuration and checks it against the run.
    ///
    /// # Errors
    /// [`DeepSpeedError`]: mismatches all at once, in Hugging Face's words.
    pub fn resolve(json: &Value, run: &RunValues) -> Result<Self, DeepSpeedError> {
        let config = Config::new(json)?;
        config.check_built()?;
        let mismatches = config.mismatches(run);
        if !mismatches.is_empty() {
            return Err(DeepSpeedError::Mismatch { mismatches });
        }
        let schedule = config.schedule(run.learning_rate)?;
        Ok(Self {
            stage: config.stage()?,
            warmup_steps: config.comparison("scheduler.params.warmup_num_steps"),
            total_steps: config.comparison("scheduler.params.total_num_steps"),
            loss_scale: config.loss_scale()?,
            gradient_clipping: config
                .number("gradient_clipping")?
                .unwrap_or(run.max_grad_norm),
            effects: effects::effects(&config, run, schedule.as_ref()),
            schedule,
        })
    }

    /// Checks what is known only once the data are counted: the updates of warm-up and run.
    ///
    /// # Errors
    /// [`DeepSpeedError::Mismatch`], in Hugging Face's words.
    pub fn check_steps(&self, warmup: u64, total: u64) -> Result<(), DeepSpeedError> {
        let mismatches: Vec<String> = [
            self.total_steps
                .mismatch(total, "num_training_steps (calculated)"),
            self.warmup_steps.mismatch(warmup, "warmup_steps"),
        ]
        .into_iter()
        .flatten()
        .collect();
        if mismatches.is_empty() {
            Ok(())
        } else {
            Err(DeepSpeedError::Mismatch { mismatches })
        }
    }
}
