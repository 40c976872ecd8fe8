//! One [`TrainConfig`], checked once, from YAML or JSON files, `key=value` and flags.
//!
//! Keys, defaults and their traps are LLaMA-Factory's; `keys.rs` says what becomes of each key.
//! Knows neither data nor model: what depends on them is checked by the plan.

mod data;
mod error;
mod key_table;
mod keys;
mod optimization;
mod output;
mod run;
mod schedule;
mod settings;
mod sources;
#[cfg(test)]
mod tests;

use std::fs;
use std::path::Path;

use serde_json::Value;

use super::dataset::decode_utf8;
use super::deepspeed::{DeepSpeedConfig, DeepSpeedError, RunValues};
use super::{Recompute, ZeroStage};

pub use data::{DataConfig, Packing};
pub use error::ConfigError;
#[cfg(test)]
pub(super) use keys::is_known;
pub use optimization::{BatchConfig, OptimizerConfig, Precision};
pub use output::{Cadence, OutputConfig, Resume};
pub use schedule::{LrSchedulerType, ScheduleConfig};
pub(super) use settings::Settings;

/// The model and the adapters that are there already.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelSource {
    /// A directory, a GGUF file or a hub id.
    pub model_name_or_path: String,
    /// The hub's revision.
    pub model_revision: Option<String>,
    /// Adapters: the last is trained on, the others are merged first.
    pub adapter_name_or_path: Vec<String>,
    /// Whether all of them are merged and a fresh adapter is trained.
    pub create_new_adapter: bool,
}

/// The adapter to train.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraConfig {
    /// `r`.
    pub lora_rank: usize,
    /// Twice the rank unless given.
    pub lora_alpha: f64,
    /// Probability, 0 to 1.
    pub lora_dropout: f64,
    /// Names of linears, or `all`.
    pub lora_target: Vec<String>,
    /// Modules trained and saved whole.
    pub additional_target: Vec<String>,
    /// Whether the scale is alpha over the root of the rank.
    pub use_rslora: bool,
    /// Whether magnitudes are trained apart.
    pub use_dora: bool,
    /// B learns this many times faster than A.
    pub loraplus_lr_ratio: Option<f64>,
}

/// Everything that a run was asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainConfig {
    /// The base.
    pub model: ModelSource,
    /// Data sets, template and tokens.
    pub data: DataConfig,
    /// The adapter.
    pub lora: LoraConfig,
    /// Batches, epochs and ranks.
    pub batch: BatchConfig,
    /// AdamW and what is done to gradients.
    pub optimizer: OptimizerConfig,
    /// The learning rate over time; a schedule in `deepspeed` overrides it.
    pub schedule: ScheduleConfig,
    /// The type of computation.
    pub precision: Precision,
    /// What is computed again in the backward pass; absent means as much as memory needs.
    pub recompute: Option<Recompute>,
    /// Logging, saving, evaluation.
    pub output: OutputConfig,
    /// Whether training was asked for (`do_train`); LLaMA-Factory does nothing without it.
    pub do_train: bool,
    /// The DeepSpeed configuration, checked against this one.
    pub deepspeed: Option<DeepSpeedConfig>,
    /// The seed of everything that is drawn.
    pub seed: u64,
    /// Whether to stop after the plan.
    pub dry_run: bool,
    /// What was accepted without effect, for the plan.
    pub notes: Vec<String>,
}

impl TrainConfig {
    /// Reads and checks the arguments of `infold train` on a machine with `num_devices` devices.
    ///
    /// # Errors
    /// [`ConfigError`] naming the key, what was found, and what to do.
    pub fn from_arguments(arguments: &[String], num_devices: usize) -> Result<Self, ConfigError> {
        let mut settings = sources::parse_arguments(arguments)?;
        let mut notes = keys::check_keys(&mut settings)?;
        let config = Self::from_settings(&settings, num_devices)?;
        notes.extend(config.remarks(&settings));
        Ok(Self { notes, ..config })
    }

    fn from_settings(settings: &Settings, num_devices: usize) -> Result<Self, ConfigError> {
        check_stage(settings)?;
        let precision = optimization::precision(settings)?;
        let batch = BatchConfig::from_settings(settings, num_devices)?;
        let optimizer = OptimizerConfig::from_settings(settings)?;
        let schedule = ScheduleConfig::from_settings(settings)?;
        let run = run_values(&batch, &optimizer, schedule.learning_rate, precision);
        let mut deepspeed = deepspeed(settings, &run)?;
        let is_stage_3 = |config: &DeepSpeedConfig| config.stage == ZeroStage::Three;
        if settings.bool("pure_bf16", false)? && deepspeed.as_ref().is_some_and(is_stage_3) {
            return Err(ConfigError::Conflict {
                what:
                    "`pure_bf16` is incompatible with DeepSpeed ZeRO-3: set bf16: true in its place"
                        .to_owned(),
            });
        }
        if settings.bool("prefer_hf_scheduler", false)?
            && let Some(deepspeed) = &mut deepspeed
        {
            deepspeed.schedule = None;
        }
        Ok(Self {
            model: model_source(settings)?,
            data: DataConfig::from_settings(settings)?,
            lora: LoraConfig::from_settings(settings)?,
            batch,
            optimizer,
            schedule,
            precision,
            recompute: optimization::recompute(settings)?,
            output: OutputConfig::from_settings(settings)?,
            do_train: settings.bool("do_train", true)?,
            deepspeed,
            seed: settings.whole("seed", 42, 0)?,
            dry_run: settings.bool("dry_run", false)?,
            notes: Vec::new(),
        })
    }

    /// Returns what is worth saying about the values themselves.
    fn remarks(&self, settings: &Settings) -> Vec<String> {
        let mut remarks = Vec::new();
        if !settings.has("do_train") {
            remarks.push("`do_train` is not set and taken as true".to_owned());
        }
        if self.precision == Precision::F32 {
            remarks.push(
                "We recommend enable mixed precision training: bf16 is off, all is f32".to_owned(),
            );
        }
        if settings.raw("packing").is_some() && self.data.packing == Packing::Packed {
            remarks.push(
                "`packing`: examples of a micro-batch are laid side by side without padding and \
                 do not see each other; the number of updates stays that of the unpacked run"
                    .to_owned(),
            );
        }
        if settings.opt_bool("gradient_checkpointing").ok().flatten() == Some(false) {
            remarks.push(
                "`gradient_checkpointing: false` has no effect in LLaMA-Factory; \
                 disable_gradient_checkpointing: true turns it off"
                    .to_owned(),
            );
        }
        remarks
    }
}

/// Reads and checks the arguments of `infold check-data`, which needs no model and no output.
///
/// # Errors
/// [`ConfigError`] naming the key, what was found, and what to do.
pub(super) fn check_data_config(
    arguments: &[String],
) -> Result<(DataConfig, Option<String>), ConfigError> {
    let mut settings = sources::parse_arguments(arguments)?;
    keys::check_keys(&mut settings)?;
    let data = DataConfig::from_settings(&settings)?;
    Ok((data, settings.opt_text("model_name_or_path")?))
}

fn check_stage(settings: &Settings) -> Result<(), ConfigError> {
    match settings.opt_text("stage")?.as_deref() {
        None | Some("sft") => Ok(()),
        Some("pt" | "rm" | "ppo" | "dpo" | "kto") => Err(ConfigError::NotBuilt {
            key: "stage".to_owned(),
            value: settings.opt_text("stage")?.unwrap_or_default(),
            advice: "infold trains by supervised fine-tuning; set stage: sft",
            origin: settings.origin("stage"),
        }),
        Some(_) => Err(settings.invalid("stage", "sft")),
    }
}

fn model_source(settings: &Settings) -> Result<ModelSource, ConfigError> {
    Ok(ModelSource {
        model_name_or_path: settings.opt_text("model_name_or_path")?.ok_or(
            ConfigError::Missing {
                key: "model_name_or_path",
                advice: "the folder of the base model, or its name on the hub",
            },
        )?,
        model_revision: settings.opt_text("model_revision")?,
        adapter_name_or_path: settings.list("adapter_name_or_path")?,
        create_new_adapter: settings.bool("create_new_adapter", false)?,
    })
}

impl LoraConfig {
    fn from_settings(settings: &Settings) -> Result<Self, ConfigError> {
        let lora_rank = settings.whole("lora_rank", 8, 1)?;
        let mut lora_target = settings.list("lora_target")?;
        if lora_target.is_empty() {
            lora_target = vec!["all".to_owned()];
        }
        let dropout = settings.f64_in("lora_dropout", 0.0, 0.0..=1.0)?;
        if dropout >= 1.0 {
            return Err(settings.invalid("lora_dropout", "a number from 0 to below 1"));
        }
        let alpha = settings.f64_in("lora_alpha", 2.0 * lora_rank as f64, 0.0..=f64::INFINITY)?;
        Ok(Self {
            lora_rank: lora_rank as usize,
            lora_alpha: alpha,
            lora_dropout: dropout,
            lora_target,
            additional_target: settings.list("additional_target")?,
            use_rslora: settings.bool("use_rslora", false)?,
            use_dora: settings.bool("use_dora", false)?,
            loraplus_lr_ratio: settings.opt_f64("loraplus_lr_ratio")?,
        })
    }
}

fn run_values(
    batch: &BatchConfig,
    optimizer: &OptimizerConfig,
    learning_rate: f64,
    precision: Precision,
) -> RunValues {
    RunValues {
        world_size: batch.num_ranks as u64,
        per_device_train_batch_size: batch.per_device_train_batch_size as u64,
        gradient_accumulation_steps: batch.gradient_accumulation_steps as u64,
        max_grad_norm: optimizer.max_grad_norm,
        learning_rate,
        adam_betas: [optimizer.adam_beta1, optimizer.adam_beta2],
        adam_epsilon: optimizer.adam_epsilon,
        weight_decay: optimizer.weight_decay,
        bf16: precision == Precision::Bf16,
        fp16: precision == Precision::Fp16,
    }
}

fn deepspeed(settings: &Settings, run: &RunValues) -> Result<Option<DeepSpeedConfig>, ConfigError> {
    let json = match settings.raw("deepspeed") {
        None => return Ok(None),
        Some(json @ Value::Object(_)) => json.clone(),
        Some(_) => match settings.opt_text("deepspeed")? {
            None => return Ok(None),
            Some(path) => read_deepspeed(Path::new(&path))?,
        },
    };
    Ok(Some(DeepSpeedConfig::resolve(&json, run)?))
}

fn read_deepspeed(path: &Path) -> Result<Value, ConfigError> {
    let bytes = fs::read(path).map_err(|source| DeepSpeedError::Read {
        path: path.to_owned(),
        source,
    })?;
    let json = serde_json::from_str(&decode_utf8(path, bytes)?);
    Ok(json.map_err(|source| DeepSpeedError::Json {
        path: path.to_owned(),
        source,
    })?)
}
