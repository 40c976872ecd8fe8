//! Typed access to a DeepSpeed configuration by dotted keys.

use serde_json::Value;

use super::{DeepSpeedError, DeepSpeedSchedule, RunValues};
use crate::train::{DeepSpeedWarmup, LossScaleOptions, LrCurve, WarmupType, ZeroStage};

/// What a file says about a number that the run has too.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Comparison<T> {
    key: &'static str,
    given: Option<T>,
}

impl Comparison<u64> {
    /// Returns the line of an error text when the file gives another number than the run.
    pub(super) fn mismatch(&self, actual: u64, hf_key: &str) -> Option<String> {
        let given = self.given.filter(|given| *given != actual)?;
        Some(format!("- ds {}={given} vs hf {hf_key}={actual}", self.key))
    }
}

/// A parsed file.
pub(super) struct Config<'a> {
    root: &'a Value,
}

/// Blocks that change what is computed and are not built: `(key, advice)`.
const NOT_BUILT: &[(&str, &str)] = &[
    ("pipeline", "use ZeRO stage 3 to shard the model"),
    (
        "tensor_parallel.autotp_size",
        "use ZeRO stage 3 to shard the model",
    ),
    (
        "sparse_attention",
        "attention is always exact; leave the block out",
    ),
    (
        "compression_training",
        "train on the unquantised checkpoint",
    ),
    (
        "data_efficiency.enabled",
        "data follow the sampler; leave the block out",
    ),
    (
        "curriculum_learning.enabled",
        "data follow the sampler; leave the block out",
    ),
    ("amp.enabled", "use bf16 or fp16"),
    (
        "progressive_layer_drop.enabled",
        "all layers are trained; leave the block out",
    ),
    (
        "zero_optimization.zero_quantized_weights",
        "weights are gathered as stored; leave the key out",
    ),
    (
        "zero_optimization.zero_quantized_gradients",
        "gradients are reduced in f32; leave the key out",
    ),
];

impl<'a> Config<'a> {
    pub(super) fn new(root: &'a Value) -> Result<Self, DeepSpeedError> {
        if root.is_object() {
            return Ok(Self { root });
        }
        Err(DeepSpeedError::InvalidValue {
            key: "the file".to_owned(),
            wanted: "a JSON object",
            found: root.to_string(),
        })
    }

    /// Returns the value of a dotted key; null counts as absent.
    pub(super) fn get(&self, key: &str) -> Option<&'a Value> {
        let step = |node: &'a Value, part| node.get(part);
        let value = key.split('.').try_fold(self.root, step)?;
        (!value.is_null()).then_some(value)
    }

    fn given(&self, key: &str) -> Option<&'a Value> {
        self.get(key).filter(|value| *value != "auto")
    }

    /// Returns all keys that hold no object, with dots, and their values.
    pub(super) fn leaves(&self) -> Vec<(String, &'a Value)> {
        let mut leaves = Vec::new();
        collect_leaves("", self.root, &mut leaves);
        leaves
    }

    fn invalid(key: &str, wanted: &'static str, found: &Value) -> DeepSpeedError {
        DeepSpeedError::InvalidValue {
            key: key.to_owned(),
            wanted,
            found: found.to_string(),
        }
    }

    /// Returns a number, unless it is absent or `auto`.
    pub(super) fn number(&self, key: &str) -> Result<Option<f64>, DeepSpeedError> {
        match self.given(key) {
            None => Ok(None),
            Some(value) => match value.as_f64().filter(|number| *number >= 0.0) {
                Some(number) => Ok(Some(number)),
                None => Err(Self::invalid(
                    key,
                    "\"auto\" or a number of at least 0",
                    value,
                )),
            },
        }
    }

    fn whole(&self, key: &str) -> Result<Option<u64>, DeepSpeedError> {
        Ok(self.number(key)?.map(|number| number as u64))
    }

    pub(super) fn comparison(&self, key: &'static str) -> Comparison<u64> {
        let given = self.given(key).and_then(Value::as_f64);
        Comparison {
            key,
            given: given.map(|number| number as u64),
        }
    }

    pub(super) fn stage(&self) -> Result<ZeroStage, DeepSpeedError> {
        let key = "zero_optimization.stage";
        match self.get(key) {
            None => Ok(ZeroStage::Zero),
            Some(value) => match value.as_u64() {
                Some(0) => Ok(ZeroStage::Zero),
                Some(1) => Ok(ZeroStage::One),
                Some(2) => Ok(ZeroStage::Two),
                Some(3) => Ok(ZeroStage::Three),
                _ => Err(Self::invalid(key, "0, 1, 2 or 3", value)),
            },
        }
    }

    /// Refuses what would change the result and is not built.
    pub(super) fn check_built(&self) -> Result<(), DeepSpeedError> {
        for (key, advice) in NOT_BUILT {
            if let Some(value) = self.get(key)
                && *value != Value::Bool(false)
                && value.as_f64() != Some(0.0)
            {
                return Err(DeepSpeedError::NotBuilt {
                    key: (*key).to_owned(),
                    value: value.to_string(),
                    advice,
                });
            }
        }
        let one_of = |key: &str, names: &[&str], advice| match self.get(key) {
            Some(value) if !value.as_str().is_some_and(|name| names.contains(&name)) => {
                Err(DeepSpeedError::NotBuilt {
                    key: key.to_owned(),
                    value: value.to_string(),
                    advice,
                })
            }
            _ => Ok(()),
        };
        one_of(
            "optimizer.type",
            &["AdamW", "Adam"],
            "the optimiser is AdamW; set AdamW or leave the block out",
        )?;
        one_of(
            "scheduler.type",
            &["WarmupLR", "WarmupDecayLR", "WarmupCosineLR"],
            "use WarmupLR, WarmupDecayLR or WarmupCosineLR, or leave the block out",
        )
    }

    /// Returns the lines of Hugging Face's error text.
    pub(super) fn mismatches(&self, run: &RunValues) -> Vec<String> {
        let batch = run.per_device_train_batch_size;
        let accumulation = run.gradient_accumulation_steps;
        let lines = [
            self.compare(
                "train_micro_batch_size_per_gpu",
                batch.into(),
                "per_device_train_batch_size",
            ),
            self.compare(
                "gradient_accumulation_steps",
                accumulation.into(),
                "gradient_accumulation_steps",
            ),
            self.compare(
                "train_batch_size",
                (run.world_size * batch * accumulation).into(),
                "train_batch_size (calculated)",
            ),
            self.compare(
                "gradient_clipping",
                run.max_grad_norm.into(),
                "max_grad_norm",
            ),
            self.compare(
                "optimizer.params.lr",
                run.learning_rate.into(),
                "learning_rate",
            ),
            self.compare(
                "optimizer.params.betas",
                run.adam_betas.to_vec().into(),
                "adam_beta1+adam_beta2",
            ),
            self.compare(
                "optimizer.params.eps",
                run.adam_epsilon.into(),
                "adam_epsilon",
            ),
            self.compare(
                "optimizer.params.weight_decay",
                run.weight_decay.into(),
                "weight_decay",
            ),
            self.compare(
                "scheduler.params.warmup_max_lr",
                run.learning_rate.into(),
                "learning_rate",
            ),
            self.compare(
                "fp16.enabled",
                run.fp16.into(),
                "fp16|fp16_full_eval+fp16_backend(amp)",
            ),
            self.compare("bf16.enabled", run.bf16.into(), "bf16|bf16_full_eval"),
        ];
        lines.into_iter().flatten().collect()
    }

    fn compare(&self, key: &str, actual: Value, hf_key: &str) -> Option<String> {
        let given = self.given(key).filter(|given| !equal(given, &actual))?;
        Some(format!(
            "- ds {key}={} vs hf {hf_key}={}",
            python(given),
            python(&actual)
        ))
    }

    pub(super) fn schedule(
        &self,
        learning_rate: f64,
    ) -> Result<Option<DeepSpeedSchedule>, DeepSpeedError> {
        let Some(name) = self.get("scheduler.type").and_then(Value::as_str) else {
            return Ok(None);
        };
        let warmup_type = match self.get("scheduler.params.warmup_type") {
            None => WarmupType::Log,
            Some(value) => match value.as_str() {
                Some("log") => WarmupType::Log,
                Some("linear") => WarmupType::Linear,
                _ => {
                    let key = "scheduler.params.warmup_type";
                    return Err(Self::invalid(key, "log or linear", value));
                }
            },
        };
        let parameter = |name: &str, default: f64| {
            let given = self.number(&format!("scheduler.params.{name}"))?;
            Ok::<_, DeepSpeedError>(given.unwrap_or(default))
        };
        let warmup = DeepSpeedWarmup {
            min_lr: parameter("warmup_min_lr", 0.0)?,
            max_lr: parameter("warmup_max_lr", learning_rate)?,
            warmup_type,
        };
        let curve = match name {
            "WarmupDecayLR" => LrCurve::WarmupDecayLr(warmup),
            "WarmupCosineLR" => LrCurve::WarmupCosineLr {
                warmup_min_ratio: parameter("warmup_min_ratio", 0.0)?,
                cos_min_ratio: parameter("cos_min_ratio", 0.0001)?,
                warmup_type,
            },
            _ => LrCurve::WarmupLr(warmup),
        };
        Ok(Some(DeepSpeedSchedule {
            curve,
            warmup_num_steps: self.whole("scheduler.params.warmup_num_steps")?,
        }))
    }

    pub(super) fn loss_scale(&self) -> Result<LossScaleOptions, DeepSpeedError> {
        let defaults = LossScaleOptions::default();
        let whole = |key: &str, default| Ok(self.whole(key)?.unwrap_or(default));
        let power = self.number("fp16.initial_scale_power")?;
        let fixed = self.number("fp16.loss_scale")?.filter(|scale| *scale > 0.0);
        let consecutive = self.given("fp16.consecutive_hysteresis");
        let initial = power.map_or(defaults.initial_scale, f64::exp2);
        Ok(LossScaleOptions {
            initial_scale: fixed.unwrap_or(initial),
            is_dynamic: fixed.is_none(),
            consecutive_hysteresis: consecutive == Some(&Value::Bool(true)),
            loss_scale_window: whole("fp16.loss_scale_window", defaults.loss_scale_window)?,
            hysteresis: whole("fp16.hysteresis", defaults.hysteresis)?,
            min_loss_scale: self
                .number("fp16.min_loss_scale")?
                .unwrap_or(defaults.min_loss_scale),
        })
    }
}

fn collect_leaves<'a>(prefix: &str, node: &'a Value, leaves: &mut Vec<(String, &'a Value)>) {
    for (key, value) in node.as_object().into_iter().flatten() {
        let key = format!("{prefix}{key}");
        if value.is_object() {
            collect_leaves(&format!("{key}."), value, leaves);
        } else {
            leaves.push((key, value));
        }
    }
}

/// Compares as Python does: 1 equals 1.0.
fn equal(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(a), Value::Number(b)) => a.as_f64() == b.as_f64(),
        (Value::Array(a), Value::Array(b)) => {
            a.len() == b.len() && a.iter().zip(b).all(|(a, b)| equal(a, b))
        }
        _ => a == b,
    }
}

/// Writes a value as Python's `str` does, as far as these values go.
pub(in crate::train) fn python(value: &Value) -> String {
    match value {
        Value::Bool(true) => "True".to_owned(),
        Value::Bool(false) => "False".to_owned(),
        Value::Null => "None".to_owned(),
        Value::String(text) => text.clone(),
        Value::Array(items) => {
            let items: Vec<String> = items.iter().map(python).collect();
            format!("[{}]", items.join(", "))
        }
        Value::Number(number) => match number.as_f64() {
            // Python switches to exponents below 1e-4, and writes two digits of them.
            Some(float) if number.is_f64() && float != 0.0 && float.abs() < 1e-4 => {
                let text = format!("{float:e}");
                let (digits, exponent) = text.split_once("e-").unwrap_or((text.as_str(), "0"));
                format!("{digits}e-{exponent:0>2}")
            }
            _ => number.to_string(),
        },
        Value::Object(_) => value.to_string(),
    }
}
