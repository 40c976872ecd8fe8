//! Learning rates over a run: Hugging Face's schedules and DeepSpeed's.
//!
//! Formulas of transformers' `optimization.py` (4.46) and DeepSpeed's `lr_schedules.py` (0.16),
//! in f64 and in the same order of operations.

use std::f64::consts::PI;

/// A curve after a linear warm-up, as a factor of the peak, or one of DeepSpeed's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum LrCurve {
    /// Linear to zero.
    Linear,
    /// A cosine: 0.5 cycles end at zero.
    Cosine {
        /// Waves.
        num_cycles: f64,
    },
    /// Half cosines one after another.
    CosineWithRestarts {
        /// How many.
        num_cycles: f64,
    },
    /// A cosine that ends at `min_lr_rate` of the peak.
    CosineWithMinLr {
        /// Waves.
        num_cycles: f64,
        /// The end as a share of the peak.
        min_lr_rate: f64,
    },
    /// Constant without warm-up.
    Constant,
    /// Constant after the warm-up.
    ConstantWithWarmup,
    /// To `lr_end` with `power`.
    Polynomial {
        /// The rate at the end.
        lr_end: f64,
        /// Exponent of what is left.
        power: f64,
    },
    /// One over the root of the update. The timescale is the warm-up, or 10,000 without one:
    /// transformers does not pass a `timescale` on.
    InverseSqrt,
    /// Constant, then a cosine to `min_lr_ratio`.
    WarmupStableDecay {
        /// Updates of the constant part.
        num_stable_steps: u64,
        /// Updates of the decay.
        num_decay_steps: u64,
        /// Waves of the decay; 0.5 falls once.
        num_cycles: f64,
        /// The end as a share of the peak.
        min_lr_ratio: f64,
    },
    /// DeepSpeed's `WarmupLR`: from `min` to `max`, then constant.
    WarmupLr(DeepSpeedWarmup),
    /// DeepSpeed's `WarmupDecayLR`: from `min` to `max`, then linear to zero.
    WarmupDecayLr(DeepSpeedWarmup),
    /// DeepSpeed's `WarmupCosineLR`: shares of the peak.
    WarmupCosineLr {
        /// Share at the first update.
        warmup_min_ratio: f64,
        /// Share at the end.
        cos_min_ratio: f64,
        /// How the rate rises.
        warmup_type: WarmupType,
    },
}

/// The rates of DeepSpeed's warm-up.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DeepSpeedWarmup {
    /// `warmup_min_lr`.
    pub min_lr: f64,
    /// `warmup_max_lr`, in place of the run's peak.
    pub max_lr: f64,
    /// How the rate rises.
    pub warmup_type: WarmupType,
}

/// How DeepSpeed's warm-up rises.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WarmupType {
    /// With the logarithm of the update.
    Log,
    /// Linear.
    Linear,
}

/// The learning rate of every update of a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LrSchedule {
    /// The curve.
    pub curve: LrCurve,
    /// The peak, `learning_rate`.
    pub learning_rate: f64,
    /// Updates of the warm-up.
    pub warmup_steps: u64,
    /// Updates of the run.
    pub total_steps: u64,
}

impl LrSchedule {
    /// Returns the rate of an update, counted from 0.
    pub fn at(&self, update: u64) -> f64 {
        match self.curve {
            LrCurve::WarmupLr(warmup) => {
                let gamma = self.deepspeed_gamma(update, warmup.warmup_type, 0.0);
                warmup.min_lr + (warmup.max_lr - warmup.min_lr) * gamma.unwrap_or(1.0)
            }
            LrCurve::WarmupDecayLr(warmup) => {
                let gamma = self.deepspeed_gamma(update, warmup.warmup_type, 0.0);
                let left = || self.share_left(update.saturating_sub(1), self.deepspeed_warmup());
                warmup.min_lr + (warmup.max_lr - warmup.min_lr) * gamma.unwrap_or_else(left)
            }
            LrCurve::WarmupCosineLr {
                warmup_min_ratio,
                cos_min_ratio,
                warmup_type,
            } => {
                if update == 0 {
                    return 0.0;
                }
                let ratio = match self.deepspeed_gamma(update, warmup_type, warmup_min_ratio) {
                    Some(ratio) => ratio,
                    None => self.deepspeed_cosine(update, cos_min_ratio),
                };
                self.learning_rate * ratio
            }
            curve => self.learning_rate * self.factor(curve, update),
        }
    }

    /// Returns Hugging Face's factor of the peak.
    fn factor(&self, curve: LrCurve, update: u64) -> f64 {
        let warmup = self.warmup_steps;
        if curve == LrCurve::Constant {
            return 1.0;
        }
        if update < warmup {
            return update as f64 / warmup.max(1) as f64;
        }
        let after = update - warmup;
        let span = self.total_steps.saturating_sub(warmup).max(1);
        let progress = after as f64 / span as f64;
        let wave = |cycles: f64, progress: f64| 0.5 * (1.0 + (PI * cycles * 2.0 * progress).cos());
        match curve {
            LrCurve::Linear => self.share_left(update, warmup),
            LrCurve::Cosine { num_cycles } => wave(num_cycles, progress).max(0.0),
            LrCurve::CosineWithRestarts { .. } if progress >= 1.0 => 0.0,
            LrCurve::CosineWithRestarts { num_cycles } => {
                (0.5 * (1.0 + (PI * ((num_cycles * progress) % 1.0)).cos())).max(0.0)
            }
            LrCurve::CosineWithMinLr {
                num_cycles,
                min_lr_rate,
            } => (wave(num_cycles, progress) * (1.0 - min_lr_rate) + min_lr_rate).max(0.0),
            LrCurve::Polynomial { lr_end, .. } if update > self.total_steps => {
                lr_end / self.learning_rate
            }
            LrCurve::Polynomial { lr_end, power } => {
                let left = 1.0 - progress;
                ((self.learning_rate - lr_end) * left.powf(power) + lr_end) / self.learning_rate
            }
            LrCurve::InverseSqrt => {
                let timescale = if warmup == 0 { 10_000 } else { warmup };
                let shifted = (update + timescale).saturating_sub(warmup);
                1.0 / (shifted as f64 / timescale as f64).sqrt()
            }
            LrCurve::WarmupStableDecay {
                num_stable_steps,
                num_decay_steps,
                num_cycles,
                min_lr_ratio,
            } => {
                if after < num_stable_steps {
                    return 1.0;
                }
                let into = after - num_stable_steps;
                if into >= num_decay_steps {
                    return min_lr_ratio;
                }
                let wave = wave(num_cycles, into as f64 / num_decay_steps.max(1) as f64).max(0.0);
                (1.0 - min_lr_ratio) * wave + min_lr_ratio
            }
            LrCurve::Constant
            | LrCurve::ConstantWithWarmup
            | LrCurve::WarmupLr(_)
            | LrCurve::WarmupDecayLr(_)
            | LrCurve::WarmupCosineLr { .. } => 1.0,
        }
    }

    /// Returns what is left of the run after the warm-up, 1 to 0.
    fn share_left(&self, update: u64, warmup: u64) -> f64 {
        let span = self.total_steps.saturating_sub(warmup).max(1);
        self.total_steps.saturating_sub(update) as f64 / span as f64
    }

    fn deepspeed_warmup(&self) -> u64 {
        self.warmup_steps.max(2)
    }

    /// Returns how far the warm-up is, from `start` to 1; nothing when it is over.
    ///
    /// DeepSpeed steps its schedule after an update, so the first two have batch iteration 0.
    fn deepspeed_gamma(&self, update: u64, warmup_type: WarmupType, start: f64) -> Option<f64> {
        let (iteration, warmup) = (update.saturating_sub(1), self.deepspeed_warmup());
        if iteration >= warmup {
            return None;
        }
        let gamma = match warmup_type {
            WarmupType::Log => 1.0 / (warmup as f64).ln() * ((iteration + 1) as f64).ln(),
            WarmupType::Linear => iteration as f64 / warmup as f64,
        };
        Some(start + (1.0 - start) * gamma)
    }

    fn deepspeed_cosine(&self, update: u64, cos_min_ratio: f64) -> f64 {
        let warmup = self.deepspeed_warmup();
        let step = (update - warmup) as f64;
        let total = self.total_steps as f64 - warmup as f64;
        let ratio = (1.0 + (PI * step / total).cos()) / 2.0;
        (cos_min_ratio + (1.0 - cos_min_ratio) * ratio).max(0.0)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::Value;

    use super::*;

    fn goldens() -> Value {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let path = root.join("tests/fixtures/training/schedules/schedules.json");
        serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
    }

    fn assert_rates(schedule: &LrSchedule, case: &Value) {
        for (update, want) in (0..).zip(case["rates"].as_array().unwrap()) {
            let (got, want) = (schedule.at(update), want.as_f64().unwrap());
            assert!(
                (got - want).abs() <= 1e-12 * schedule.learning_rate + 1e-9 * want,
                "{} {:?} update {update}: {got} for {want}",
                case["name"],
                case["kwargs"]
            );
        }
    }

    #[test]
    fn rates_equal_transformers() {
        let goldens = goldens();
        let peak = goldens["peak"].as_f64().unwrap();
        for case in goldens["transformers"].as_array().unwrap() {
            let kwargs = &case["kwargs"];
            let number = |key: &str, default: f64| kwargs[key].as_f64().unwrap_or(default);
            let num_cycles = number("num_cycles", 0.5);
            let curve = match case["name"].as_str().unwrap() {
                "linear" => LrCurve::Linear,
                "cosine" => LrCurve::Cosine { num_cycles },
                "cosine_with_restarts" => LrCurve::CosineWithRestarts {
                    num_cycles: number("num_cycles", 1.0),
                },
                "cosine_with_min_lr" => LrCurve::CosineWithMinLr {
                    num_cycles,
                    min_lr_rate: number("min_lr_rate", number("min_lr", 0.0) / peak),
                },
                "constant" => LrCurve::Constant,
                "constant_with_warmup" => LrCurve::ConstantWithWarmup,
                "polynomial" => LrCurve::Polynomial {
                    lr_end: number("lr_end", 1e-7),
                    power: number("power", 1.0),
                },
                "inverse_sqrt" => LrCurve::InverseSqrt,
                "warmup_stable_decay" => LrCurve::WarmupStableDecay {
                    num_stable_steps: kwargs["num_stable_steps"].as_u64().unwrap(),
                    num_decay_steps: kwargs["num_decay_steps"].as_u64().unwrap(),
                    num_cycles,
                    min_lr_ratio: number("min_lr_ratio", 0.0),
                },
                other => panic!("{other}"),
            };
            let schedule = LrSchedule {
                curve,
                learning_rate: peak,
                warmup_steps: case["num_warmup_steps"].as_u64().unwrap(),
                total_steps: case["num_training_steps"].as_u64().unwrap(),
            };
            assert_rates(&schedule, case);
        }
    }

    #[test]
    fn rates_equal_deepspeed() {
        let goldens = goldens();
        let peak = goldens["peak"].as_f64().unwrap();
        for case in goldens["deepspeed"].as_array().unwrap() {
            let kwargs = &case["kwargs"];
            let number = |key: &str, default: f64| kwargs[key].as_f64().unwrap_or(default);
            let warmup_type = match kwargs["warmup_type"].as_str() {
                Some("linear") => WarmupType::Linear,
                _ => WarmupType::Log,
            };
            let warmup = DeepSpeedWarmup {
                min_lr: number("warmup_min_lr", 0.0),
                max_lr: number("warmup_max_lr", 0.001),
                warmup_type,
            };
            let curve = match case["name"].as_str().unwrap() {
                "WarmupLR" => LrCurve::WarmupLr(warmup),
                "WarmupDecayLR" => LrCurve::WarmupDecayLr(warmup),
                "WarmupCosineLR" => LrCurve::WarmupCosineLr {
                    warmup_min_ratio: number("warmup_min_ratio", 0.0),
                    cos_min_ratio: number("cos_min_ratio", 0.0001),
                    warmup_type,
                },
                other => panic!("{other}"),
            };
            let schedule = LrSchedule {
                curve,
                learning_rate: peak,
                warmup_steps: kwargs["warmup_num_steps"].as_u64().unwrap(),
                total_steps: kwargs["total_num_steps"].as_u64().unwrap_or(0),
            };
            assert_rates(&schedule, case);
        }
    }
}
