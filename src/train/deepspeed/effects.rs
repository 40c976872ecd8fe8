//! What each key of a DeepSpeed configuration does here, one line each, for the plan.

use serde_json::Value;

use super::read::{Config, python};
use super::{DeepSpeedSchedule, RunValues};
use crate::train::{LrCurve, ZeroStage};

/// What becomes of one key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyEffect {
    /// The key, with dots.
    pub key: String,
    /// Its value as given.
    pub value: String,
    /// What it does.
    pub effect: String,
}

/// Returns the effect of every key of the file, in its order.
pub(super) fn effects(
    config: &Config<'_>,
    run: &RunValues,
    schedule: Option<&DeepSpeedSchedule>,
) -> Vec<KeyEffect> {
    let stage = config.stage().unwrap_or(ZeroStage::Zero);
    config
        .leaves()
        .into_iter()
        .map(|(key, value)| KeyEffect {
            effect: effect(&key, value, run, stage, schedule),
            value: python(value),
            key,
        })
        .collect()
}

fn effect(
    key: &str,
    value: &Value,
    run: &RunValues,
    stage: ZeroStage,
    schedule: Option<&DeepSpeedSchedule>,
) -> String {
    let is_auto = value == "auto";
    let auto = |resolved: String| {
        if is_auto {
            format!("{resolved}, from the run")
        } else {
            "equals the run's".to_owned()
        }
    };
    let batch = run.per_device_train_batch_size;
    let accumulation = run.gradient_accumulation_steps;
    match key {
        "zero_optimization.stage" => stage_effect(stage, run.world_size),
        "train_micro_batch_size_per_gpu" => auto(batch.to_string()),
        "gradient_accumulation_steps" => auto(accumulation.to_string()),
        "train_batch_size" => auto((batch * accumulation * run.world_size).to_string()),
        "gradient_clipping" => auto(python(&run.max_grad_norm.into())),
        "fp16.enabled" => auto(run.fp16.to_string()),
        "bf16.enabled" => auto(run.bf16.to_string()),
        "fp16.loss_scale"
        | "fp16.loss_scale_window"
        | "fp16.initial_scale_power"
        | "fp16.hysteresis"
        | "fp16.consecutive_hysteresis"
        | "fp16.min_loss_scale" => loss_scale_effect(key, value, run.fp16),
        "optimizer.type" => "AdamW of infold".to_owned(),
        "optimizer.params.lr" => auto(python(&run.learning_rate.into())),
        "optimizer.params.betas" => auto(python(&run.adam_betas.to_vec().into())),
        "optimizer.params.eps" => auto(python(&run.adam_epsilon.into())),
        "optimizer.params.weight_decay" => auto(python(&run.weight_decay.into())),
        key if key.starts_with("scheduler.") => {
            schedule.map_or_else(String::new, |schedule| scheduler(key, is_auto, schedule))
        }
        key if key.starts_with("zero_optimization.") => zero(key, value, stage).to_owned(),
        "steps_per_print" | "wall_clock_breakdown" => {
            "no effect: logging_steps decides what is printed".to_owned()
        }
        _ => "no effect here".to_owned(),
    }
}

fn loss_scale_effect(key: &str, value: &Value, is_fp16: bool) -> String {
    match (is_fp16, key) {
        (false, _) => "no effect: fp16 is off",
        (true, "fp16.loss_scale") if value.as_f64() == Some(0.0) => "the scale adapts",
        (true, "fp16.loss_scale") => "the scale stays",
        (true, "fp16.loss_scale_window") => "updates without overflow before the scale doubles",
        (true, "fp16.initial_scale_power") => "the scale begins at 2 to this power",
        (true, "fp16.hysteresis") => "overflows before the scale halves; each skips its update",
        (true, "fp16.min_loss_scale") => "an overflow at this scale ends the run",
        (true, _) => "honoured: fp16 is on",
    }
    .to_owned()
}

fn stage_effect(stage: ZeroStage, world_size: u64) -> String {
    if world_size == 1 {
        return "nothing to divide on one rank".to_owned();
    }
    match stage {
        ZeroStage::Zero => "data parallel, nothing divided",
        ZeroStage::One => {
            "optimiser states of A and B divided; with LoRA that saves little, the base is whole \
             on each rank"
        }
        ZeroStage::Two => {
            "optimiser states and gradients of A and B divided; with LoRA that saves little, the \
             base is whole on each rank"
        }
        ZeroStage::Three => {
            "the frozen base is divided too and gathered layer by layer in every micro-batch; \
             needed only when the base does not fit on one device, stage 2 is faster otherwise"
        }
    }
    .to_owned()
}

fn scheduler(key: &str, is_auto: bool, schedule: &DeepSpeedSchedule) -> String {
    match key {
        "scheduler.type" => match schedule.curve {
            LrCurve::WarmupDecayLr(_) => {
                "overrides lr_scheduler_type: warm-up, then linear to 0".to_owned()
            }
            LrCurve::WarmupCosineLr { .. } => {
                "overrides lr_scheduler_type: warm-up, then cosine".to_owned()
            }
            _ => format!(
                "overrides lr_scheduler_type: the rate rises to {} and stays there; \
                 --prefer_hf_scheduler true keeps lr_scheduler_type",
                max_lr(schedule)
            ),
        },
        "scheduler.params.warmup_max_lr" => max_lr(schedule),
        _ if is_auto => "from the run".to_owned(),
        _ => "honoured".to_owned(),
    }
}

/// Returns the rate after the warm-up.
fn max_lr(schedule: &DeepSpeedSchedule) -> String {
    match schedule.curve {
        LrCurve::WarmupLr(warmup) | LrCurve::WarmupDecayLr(warmup) => python(&warmup.max_lr.into()),
        _ => "learning_rate".to_owned(),
    }
}

fn zero(key: &str, value: &Value, stage: ZeroStage) -> &'static str {
    let name = key.trim_start_matches("zero_optimization.");
    match name {
        "offload_optimizer.device" if value == "none" => "nothing to offload",
        "offload_optimizer.device" => {
            "no effect: the states of A and B are a few megabytes and stay with them"
        }
        "offload_param.device" if value == "none" => "nothing to offload",
        "offload_param.device" => "no effect: the base stays on the device",
        "overlap_comm" => "no effect: communication is always overlapped where it can be",
        "stage3_gather_16bit_weights_on_model_save" => "no effect: adapters are always saved whole",
        "stage3_prefetch_bucket_size"
        | "stage3_param_persistence_threshold"
        | "stage3_max_live_parameters"
        | "stage3_max_reuse_distance"
            if stage == ZeroStage::Three =>
        {
            "no effect: one layer is computed while the next is gathered"
        }
        _ => "no effect: buffers are sized by the adapter",
    }
}
