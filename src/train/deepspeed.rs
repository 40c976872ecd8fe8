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

use super::{LossScaleOptions, LrCurve, ZeroStage};

pub use effects::KeyEffect;
pub(super) use read::python;
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

/// A learning-rate schedule of DeepSpeed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DeepSpeedSchedule {
    /// The curve.
    pub curve: LrCurve,
    /// Updates of the warm-up; absent means the run's `warmup_steps` or `warmup_ratio`.
    pub warmup_num_steps: Option<u64>,
}

impl DeepSpeedSchedule {
    /// Returns its name in the file.
    pub fn name(&self) -> &'static str {
        match self.curve {
            LrCurve::WarmupDecayLr(_) => "WarmupDecayLR",
            LrCurve::WarmupCosineLr { .. } => "WarmupCosineLR",
            _ => "WarmupLR",
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
    pub loss_scale: LossScaleOptions,
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
