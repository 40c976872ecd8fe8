//! The keys of the learning rate over time.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::super::{LrCurve, LrSchedule, StepCounts};
use super::settings::as_f64;
use super::{ConfigError, Settings};

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
    /// Constant over `num_stable_steps`, then a decay over `num_decay_steps`.
    WarmupStableDecay,
}

/// The learning rate over time.
#[derive(Debug, Clone, PartialEq)]
pub struct ScheduleConfig {
    /// The peak.
    pub learning_rate: f64,
    /// Which curve.
    pub lr_scheduler_type: LrSchedulerType,
    /// The curve's own parameters.
    pub lr_scheduler_kwargs: BTreeMap<String, f64>,
    /// Updates of the warm-up; wins over the ratio if positive.
    pub warmup_steps: u64,
    /// The warm-up as a share of all updates.
    pub warmup_ratio: f64,
}

use LrSchedulerType as Type;

/// Names of the curves with the parameters that each takes.
const TYPES: [(&str, Type, &[&str]); 9] = [
    ("linear", Type::Linear, &[]),
    ("cosine", Type::Cosine, &["num_cycles"]),
    (
        "cosine_with_restarts",
        Type::CosineWithRestarts,
        &["num_cycles"],
    ),
    (
        "cosine_with_min_lr",
        Type::CosineWithMinLr,
        &["num_cycles", "min_lr", "min_lr_rate"],
    ),
    ("polynomial", Type::Polynomial, &["lr_end", "power"]),
    ("constant", Type::Constant, &[]),
    ("constant_with_warmup", Type::ConstantWithWarmup, &[]),
    ("inverse_sqrt", Type::InverseSqrt, &[]),
    (
        "warmup_stable_decay",
        Type::WarmupStableDecay,
        &[
            "num_stable_steps",
            "num_decay_steps",
            "num_cycles",
            "min_lr_ratio",
        ],
    ),
];

impl LrSchedulerType {
    /// Returns its name in configurations.
    pub fn name(self) -> &'static str {
        let mut types = TYPES.iter();
        types
            .find(|(_, known, _)| *known == self)
            .map_or("linear", |(name, ..)| name)
    }
}

impl ScheduleConfig {
    pub(super) fn from_settings(settings: &Settings) -> Result<Self, ConfigError> {
        let choices = TYPES.map(|(name, known, _)| (name, known));
        let lr_scheduler_type = settings.choice("lr_scheduler_type", Type::Linear, &choices)?;
        let config = Self {
            learning_rate: settings.f64_in("learning_rate", 5e-5, 0.0..=f64::INFINITY)?,
            lr_scheduler_type,
            lr_scheduler_kwargs: kwargs(settings, lr_scheduler_type)?,
            warmup_steps: settings.whole("warmup_steps", 0, 0)?,
            warmup_ratio: settings.f64_in("warmup_ratio", 0.0, 0.0..=1.0)?,
        };
        config.check_required()?;
        Ok(config)
    }

    fn check_required(&self) -> Result<(), ConfigError> {
        let has = |key: &str| self.lr_scheduler_kwargs.contains_key(key);
        if self.lr_scheduler_type == Type::CosineWithMinLr && !has("min_lr") && !has("min_lr_rate")
        {
            return Err(ConfigError::Conflict {
                what: "`lr_scheduler_type: cosine_with_min_lr` needs min_lr or min_lr_rate in \
                       `lr_scheduler_kwargs`, such as {\"min_lr\": 1e-6}"
                    .to_owned(),
            });
        }
        Ok(())
    }

    fn kwarg(&self, key: &str, default: f64) -> f64 {
        let given = self.lr_scheduler_kwargs.get(key);
        given.copied().unwrap_or(default)
    }

    /// Returns the schedule of a run with this curve.
    pub(super) fn schedule(&self, counts: &StepCounts, warmup: u64) -> LrSchedule {
        let curve = match self.lr_scheduler_type {
            Type::Linear => LrCurve::Linear,
            Type::Cosine => LrCurve::Cosine {
                num_cycles: self.kwarg("num_cycles", 0.5),
            },
            Type::CosineWithRestarts => LrCurve::CosineWithRestarts {
                num_cycles: self.kwarg("num_cycles", 1.0),
            },
            Type::CosineWithMinLr => LrCurve::CosineWithMinLr {
                num_cycles: self.kwarg("num_cycles", 0.5),
                min_lr_rate: match self.lr_scheduler_kwargs.get("min_lr") {
                    Some(min_lr) => min_lr / self.learning_rate,
                    None => self.kwarg("min_lr_rate", 0.0),
                },
            },
            Type::Polynomial => LrCurve::Polynomial {
                lr_end: self.kwarg("lr_end", 1e-7),
                power: self.kwarg("power", 1.0),
            },
            Type::Constant => LrCurve::Constant,
            Type::ConstantWithWarmup => LrCurve::ConstantWithWarmup,
            Type::InverseSqrt => LrCurve::InverseSqrt,
            Type::WarmupStableDecay => {
                // LLaMA-Factory's defaults (`create_custom_scheduler`): a third of what is left
                // after the warm-up is stable, the rest decays; neither follows the other's value.
                let left = counts.total_updates.saturating_sub(warmup);
                let (stable, decay) = (left / 3, left - left / 3);
                LrCurve::WarmupStableDecay {
                    num_stable_steps: self.kwarg("num_stable_steps", stable as f64) as u64,
                    num_decay_steps: self.kwarg("num_decay_steps", decay as f64) as u64,
                    num_cycles: self.kwarg("num_cycles", 0.5),
                    min_lr_ratio: self.kwarg("min_lr_ratio", 0.0),
                }
            }
        };
        LrSchedule {
            curve,
            learning_rate: self.learning_rate,
            warmup_steps: warmup,
            total_steps: counts.total_updates,
        }
    }
}

fn kwargs(settings: &Settings, curve: Type) -> Result<BTreeMap<String, f64>, ConfigError> {
    let key = "lr_scheduler_kwargs";
    let wanted = "an object such as {\"num_cycles\": 2}";
    let object: Map<String, Value> = match settings.raw(key) {
        None => return Ok(BTreeMap::new()),
        Some(Value::Object(kwargs)) => kwargs.clone(),
        Some(Value::String(text)) => {
            serde_json::from_str(text).map_err(|_| settings.invalid(key, wanted))?
        }
        Some(_) => return Err(settings.invalid(key, wanted)),
    };
    let known = TYPES.iter().find(|(_, known, _)| *known == curve);
    let known = known.map_or(&[][..], |(.., known)| known);
    let mut kwargs = BTreeMap::new();
    for (name, value) in object {
        match as_f64(&value) {
            Some(number) if number >= 0.0 && known.contains(&name.as_str()) => {
                kwargs.insert(name, number);
            }
            _ if value.is_null() => {}
            _ => {
                let names = if known.is_empty() {
                    "none".to_owned()
                } else {
                    known.join(", ")
                };
                let wanted = format!("numbers of at least 0 under: {names} ({})", curve.name());
                return Err(settings.invalid(key, wanted));
            }
        }
    }
    Ok(kwargs)
}
