//! The keys of batches, optimiser, learning rate and number types.

use serde_json::{Map, Value};

use super::super::Recompute;
use super::super::deepspeed::DeepSpeedSchedule;
use super::super::steps::Duration;
use super::{ConfigError, Settings};

/// Batches, epochs and ranks.
#[derive(Debug, Clone, PartialEq)]
pub struct BatchConfig {
    /// Examples of one micro-batch on one rank.
    pub per_device_train_batch_size: usize,
    /// The same in evaluation.
    pub per_device_eval_batch_size: usize,
    /// Micro-batches of one update on one rank.
    pub gradient_accumulation_steps: usize,
    /// The length of the run.
    pub duration: Duration,
    /// Whether examples that do not fill a batch are left out.
    pub dataloader_drop_last: bool,
    /// Ranks; one for each device unless given.
    pub num_ranks: usize,
}

/// AdamW and what is done to gradients.
#[derive(Debug, Clone, PartialEq)]
pub struct OptimizerConfig {
    /// Decay of the first moment.
    pub adam_beta1: f64,
    /// Decay of the second moment.
    pub adam_beta2: f64,
    /// Added to the root of the second moment.
    pub adam_epsilon: f64,
    /// Decoupled decay.
    pub weight_decay: f64,
    /// The largest global norm of a gradient; 0 for no limit.
    pub max_grad_norm: f64,
    /// NEFTune's alpha; absent for none.
    pub neftune_noise_alpha: Option<f64>,
}

/// Hugging Face's schedules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LrSchedulerType {
    /// Linear to zero.
    Linear,
    /// Half a cosine to zero.
    Cosine,
    /// Several half cosines (`num_cycles`).
    CosineWithRestarts,
    /// Half a cosine to `min_lr` or `min_lr_rate`.
    CosineWithMinLr,
    /// To `lr_end` with `power`.
    Polynomial,
    /// Constant, without warm-up.
    Constant,
    /// Constant after the warm-up.
    ConstantWithWarmup,
    /// One over the root of the update.
    InverseSqrt,
    /// Constant, then a decay (`num_decay_steps`).
    WarmupStableDecay,
}

/// The learning rate over time.
#[derive(Debug, Clone, PartialEq)]
pub struct ScheduleConfig {
    /// The peak.
    pub learning_rate: f64,
    /// Which curve.
    pub lr_scheduler_type: LrSchedulerType,
    /// Its own parameters.
    pub lr_scheduler_kwargs: Map<String, Value>,
    /// Updates of the warm-up; wins over the ratio if positive.
    pub warmup_steps: u64,
    /// The warm-up as a share of all updates.
    pub warmup_ratio: f64,
    /// DeepSpeed's schedule, which overrides the curve above.
    pub deepspeed: Option<DeepSpeedSchedule>,
}

/// The type of computation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// Everything in f32.
    F32,
    /// Products in bf16; adapters and optimiser in f32 (`bf16`, `pure_bf16`).
    Bf16,
    /// Products in fp16 with a loss scale.
    Fp16,
}

impl BatchConfig {
    pub(super) fn from_settings(
        settings: &Settings,
        num_devices: usize,
    ) -> Result<Self, ConfigError> {
        let count = |key, default| Ok::<_, ConfigError>(settings.whole(key, default, 1)? as usize);
        let max_steps = settings.opt_f64("max_steps")?.unwrap_or(-1.0);
        let duration = if max_steps > 0.0 {
            Duration::Updates(settings.whole("max_steps", 0, 1)?)
        } else {
            let epochs = settings.f64_in("num_train_epochs", 3.0, 0.0..=1e9)?;
            if epochs <= 0.0 {
                return Err(settings.invalid("num_train_epochs", "a number above 0"));
            }
            Duration::Epochs(epochs)
        };
        Ok(Self {
            per_device_train_batch_size: count("per_device_train_batch_size", 8)?,
            per_device_eval_batch_size: count("per_device_eval_batch_size", 8)?,
            gradient_accumulation_steps: count("gradient_accumulation_steps", 1)?,
            duration,
            dataloader_drop_last: settings.bool("dataloader_drop_last", false)?,
            num_ranks: count("num_ranks", num_devices as u64)?,
        })
    }
}

impl OptimizerConfig {
    pub(super) fn from_settings(settings: &Settings) -> Result<Self, ConfigError> {
        let adamw = settings.opt_text("optim")?.unwrap_or_default();
        if !adamw.is_empty() && !adamw.starts_with("adamw") {
            return Err(ConfigError::NotBuilt {
                key: "optim".to_owned(),
                value: adamw,
                advice: "the optimiser is AdamW; set adamw_torch or leave the key out",
                origin: "the optimiser".to_owned(),
            });
        }
        let share = |key, default| settings.f64_in(key, default, 0.0..=1.0);
        let positive = |key, default| settings.f64_in(key, default, 0.0..=f64::INFINITY);
        Ok(Self {
            adam_beta1: share("adam_beta1", 0.9)?,
            adam_beta2: share("adam_beta2", 0.999)?,
            adam_epsilon: positive("adam_epsilon", 1e-8)?,
            weight_decay: positive("weight_decay", 0.0)?,
            max_grad_norm: positive("max_grad_norm", 1.0)?,
            neftune_noise_alpha: settings
                .opt_f64("neftune_noise_alpha")?
                .filter(|alpha| *alpha > 0.0),
        })
    }
}

impl ScheduleConfig {
    pub(super) fn from_settings(settings: &Settings) -> Result<Self, ConfigError> {
        use LrSchedulerType as Type;
        let types = [
            ("linear", Type::Linear),
            ("cosine", Type::Cosine),
            ("cosine_with_restarts", Type::CosineWithRestarts),
            ("cosine_with_min_lr", Type::CosineWithMinLr),
            ("polynomial", Type::Polynomial),
            ("constant", Type::Constant),
            ("constant_with_warmup", Type::ConstantWithWarmup),
            ("inverse_sqrt", Type::InverseSqrt),
            ("warmup_stable_decay", Type::WarmupStableDecay),
        ];
        let lr_scheduler_type = settings.choice("lr_scheduler_type", Type::Linear, &types)?;
        Ok(Self {
            learning_rate: settings.f64_in("learning_rate", 5e-5, 0.0..=f64::INFINITY)?,
            lr_scheduler_type,
            lr_scheduler_kwargs: kwargs(settings)?,
            warmup_steps: settings.whole("warmup_steps", 0, 0)?,
            warmup_ratio: settings.f64_in("warmup_ratio", 0.0, 0.0..=1.0)?,
            deepspeed: None,
        })
    }
}

fn kwargs(settings: &Settings) -> Result<Map<String, Value>, ConfigError> {
    let key = "lr_scheduler_kwargs";
    let wanted = "an object such as {\"num_cycles\": 2}";
    match settings.raw(key) {
        None => Ok(Map::new()),
        Some(Value::Object(kwargs)) => Ok(kwargs.clone()),
        Some(Value::String(text)) => {
            serde_json::from_str(text).map_err(|_| settings.invalid(key, wanted))
        }
        Some(_) => Err(settings.invalid(key, wanted)),
    }
}

pub(super) fn precision(settings: &Settings) -> Result<Precision, ConfigError> {
    let bf16 = settings.bool("bf16", false)? || settings.bool("pure_bf16", false)?;
    match (bf16, settings.bool("fp16", false)?) {
        (true, true) => Err(ConfigError::Conflict {
            what: "At most one of fp16 and bf16 can be True, but not both".to_owned(),
        }),
        (true, false) => Ok(Precision::Bf16),
        (false, true) => Ok(Precision::Fp16),
        (false, false) => Ok(Precision::F32),
    }
}

/// Returns what is computed again in the backward pass; nothing for as much as memory needs, which
/// is what gradient checkpointing, on by default as in LLaMA-Factory, means here.
pub(super) fn recompute(settings: &Settings) -> Result<Option<Recompute>, ConfigError> {
    let default = if settings.bool("disable_gradient_checkpointing", false)? {
        Some(Recompute::None)
    } else {
        None
    };
    let policies = [
        ("auto", None),
        ("none", Some(Recompute::None)),
        ("mlp", Some(Recompute::Mlp)),
        ("full", Some(Recompute::Full)),
    ];
    settings.choice("recompute", default, &policies)
}
