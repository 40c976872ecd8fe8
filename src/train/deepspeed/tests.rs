//! The two configurations of the reference workflow, unmodified, and what does not fit.

use serde_json::{Value, json};

use super::*;
use crate::train::{DeepSpeedWarmup, WarmupType};

const ZERO2: &str = include_str!("../../../tests/fixtures/training_configs/ds_config_zero2.json");
const ZERO3: &str = include_str!("../../../tests/fixtures/training_configs/ds_config_zero3.json");

fn reference_run() -> RunValues {
    RunValues {
        world_size: 8,
        per_device_train_batch_size: 4,
        gradient_accumulation_steps: 4,
        max_grad_norm: 1.0,
        learning_rate: 5e-4,
        adam_betas: [0.9, 0.999],
        adam_epsilon: 1e-8,
        weight_decay: 0.0,
        bf16: true,
        fp16: false,
    }
}

fn parse(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

fn effect<'a>(config: &'a DeepSpeedConfig, key: &str) -> &'a str {
    let found = config.effects.iter().find(|effect| effect.key == key);
    &found.unwrap().effect
}

#[test]
fn both_configurations_of_the_reference_fit_its_run() {
    let zero2 = DeepSpeedConfig::resolve(&parse(ZERO2), &reference_run()).unwrap();
    assert_eq!(zero2.stage, ZeroStage::Two);
    assert_eq!(zero2.schedule, None);
    assert_eq!(zero2.gradient_clipping, 1.0);
    assert_eq!(zero2.loss_scale, LossScaleOptions::default());

    let zero3 = DeepSpeedConfig::resolve(&parse(ZERO3), &reference_run()).unwrap();
    assert_eq!(zero3.stage, ZeroStage::Three);
    let schedule = zero3.schedule.unwrap();
    let warmup = DeepSpeedWarmup {
        min_lr: 0.0,
        max_lr: 5e-4,
        warmup_type: WarmupType::Log,
    };
    assert_eq!(schedule.curve, LrCurve::WarmupLr(warmup));
    assert_eq!(schedule.warmup_num_steps, None);
}

#[test]
fn every_key_of_the_file_has_an_effect() {
    let zero3 = DeepSpeedConfig::resolve(&parse(ZERO3), &reference_run()).unwrap();
    assert_eq!(zero3.effects.len(), 36);
    assert!(zero3.effects.iter().all(|effect| !effect.effect.is_empty()));
    assert_eq!(effect(&zero3, "train_batch_size"), "128, from the run");
    assert!(effect(&zero3, "scheduler.type").contains("overrides lr_scheduler_type"));
    assert!(effect(&zero3, "scheduler.type").contains("0.0005"));
    assert!(effect(&zero3, "zero_optimization.stage").contains("stage 2 is faster"));
    assert_eq!(effect(&zero3, "fp16.hysteresis"), "no effect: fp16 is off");
}

#[test]
fn mismatches_are_listed_in_hugging_faces_words() {
    let mut run = reference_run();
    run.gradient_accumulation_steps = 8;
    let error = DeepSpeedConfig::resolve(&parse(ZERO2), &run).unwrap_err();
    assert_eq!(
        error.to_string(),
        "Please correct the following DeepSpeed config values that mismatch TrainingArguments \
         values:\n- ds gradient_accumulation_steps=4 vs hf gradient_accumulation_steps=8\n\
         The easiest method is to set these DeepSpeed config values to 'auto'."
    );
    let config = json!({"optimizer": {"type": "AdamW", "params": {
        "lr": 3e-5, "betas": [0.9, 0.95], "eps": 1e-8}}, "bf16": {"enabled": false},
        "gradient_clipping": 1});
    let text = DeepSpeedConfig::resolve(&config, &reference_run())
        .unwrap_err()
        .to_string();
    let lines: Vec<&str> = text.lines().filter(|line| line.starts_with('-')).collect();
    assert_eq!(
        lines,
        [
            "- ds optimizer.params.lr=3e-05 vs hf learning_rate=0.0005",
            "- ds optimizer.params.betas=[0.9, 0.95] vs hf adam_beta1+adam_beta2=[0.9, 0.999]",
            "- ds bf16.enabled=False vs hf bf16|bf16_full_eval=True",
        ]
    );
}

#[test]
fn steps_are_compared_once_they_are_known() {
    let config = json!({"scheduler": {"type": "WarmupDecayLR",
        "params": {"warmup_num_steps": 10, "total_num_steps": "auto"}}});
    let config = DeepSpeedConfig::resolve(&config, &reference_run()).unwrap();
    assert!(config.check_steps(10, 480).is_ok());
    let text = config.check_steps(48, 480).unwrap_err().to_string();
    assert!(
        text.contains("- ds scheduler.params.warmup_num_steps=10 vs hf warmup_steps=48"),
        "{text}"
    );
}

#[test]
fn the_loss_scale_is_read() {
    let mut run = reference_run();
    (run.fp16, run.bf16) = (true, false);
    let config = json!({"fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 10}});
    let config = DeepSpeedConfig::resolve(&config, &run).unwrap();
    assert_eq!(config.loss_scale.initial_scale, 1024.0);
    assert_eq!(config.loss_scale.loss_scale_window, 1000);
    assert!(config.loss_scale.is_dynamic && !config.loss_scale.consecutive_hysteresis);
    let config = json!({"fp16": {"loss_scale": 128, "consecutive_hysteresis": true}});
    let scale = DeepSpeedConfig::resolve(&config, &run).unwrap().loss_scale;
    assert_eq!((scale.initial_scale, scale.is_dynamic), (128.0, false));
    assert!(scale.consecutive_hysteresis);
}

#[test]
fn what_is_not_built_is_refused_by_name() {
    let text = |config: Value| {
        let error = DeepSpeedConfig::resolve(&config, &reference_run());
        error.unwrap_err().to_string()
    };
    assert!(text(json!({"optimizer": {"type": "OneBitAdam"}})).contains("\"OneBitAdam\""));
    assert!(text(json!({"scheduler": {"type": "OneCycle"}})).contains("use WarmupLR"));
    assert!(text(json!({"zero_optimization": {"stage": 4}})).contains("must be 0, 1, 2 or 3"));
    assert!(text(json!({"pipeline": {"stages": 2}})).contains("is not built"));
    assert!(text(json!([])).contains("a JSON object"));
    assert!(text(json!({"fp16": {"hysteresis": "high"}})).contains("fp16.hysteresis"),);
}
