//! What `bf16`, `fp16` and DeepSpeed's blocks of these names do to the numbers of a run.

use candle_core::DType;

use crate::train::{LoraLayout, LossScaleOptions, Precision, TrainConfig};

/// Returns the line of the plan.
pub(super) fn numbers(config: &TrainConfig, layout: &LoraLayout) -> String {
    let asked = match config.precision {
        Precision::F32 => "",
        Precision::Bf16 => "bf16: ",
        Precision::Fp16 => "fp16: ",
    };
    let trained = match layout.options().dtype {
        DType::BF16 => rounded("bf16"),
        DType::F16 => rounded("f16"),
        _ => "what is trained is f32 and saved as f32".to_owned(),
    };
    let scale = config.loss_scale();
    let scale = scale.map_or_else(String::new, |scale| format!("; {}", loss_scale(&scale)));
    format!("{asked}the base stays as stored, products and gradients are f32; {trained}{scale}")
}

fn rounded(name: &str) -> String {
    format!(
        "what is trained is rounded to {name} in every pass and saved as {name}, as DeepSpeed \
         does; the optimizer keeps it in f32"
    )
}

fn loss_scale(options: &LossScaleOptions) -> String {
    let LossScaleOptions {
        initial_scale,
        is_dynamic,
        loss_scale_window,
        hysteresis,
        min_loss_scale,
        ..
    } = options;
    let skips = "an update whose scaled gradients leave the range of f16 is skipped";
    if !is_dynamic {
        return format!("loss scale {initial_scale}; {skips}");
    }
    let overflows = match hysteresis {
        1 => "at every overflow".to_owned(),
        more => format!("after {more} overflows"),
    };
    format!(
        "loss scale {initial_scale} at first, halved {overflows} down to {min_loss_scale}, doubled \
         after {loss_scale_window} updates without one; {skips}"
    )
}
