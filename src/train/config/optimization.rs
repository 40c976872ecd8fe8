//! The keys of batches, optimiser and number types.

use super::super::Recompute;
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

/// The numbers asked for. On a CPU products are f32 whatever is asked; the types decide how the
/// adapter is rounded and saved, and whether there is a loss scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// None of the others.
    F32,
    /// `bf16` or `pure_bf16`.
    Bf16,
    /// `fp16`: with a loss scale.
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
                origin: settings.origin("optim"),
            });
        }
        // At 1 the correction of the bias divides by zero, and so does an epsilon of zero where a
        // gradient is zero, as that of A is at the first update.
        let beta = |key, default| match settings.f64_in(key, default, 0.0..=1.0)? {
            beta if beta < 1.0 => Ok(beta),
            _ => Err(settings.invalid(key, "a number from 0 to below 1")),
        };
        let positive = |key, default| settings.f64_in(key, default, 0.0..=f64::INFINITY);
        Ok(Self {
            adam_beta1: beta("adam_beta1", 0.9)?,
            adam_beta2: beta("adam_beta2", 0.999)?,
            adam_epsilon: match positive("adam_epsilon", 1e-8)? {
                epsilon if epsilon > 0.0 => epsilon,
                _ => return Err(settings.invalid("adam_epsilon", "a number above 0")),
            },
            weight_decay: positive("weight_decay", 0.0)?,
            max_grad_norm: positive("max_grad_norm", 1.0)?,
            neftune_noise_alpha: settings
                .opt_f64("neftune_noise_alpha")?
                .filter(|alpha| *alpha > 0.0),
        })
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
