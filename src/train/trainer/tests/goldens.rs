//! Losses, gradients, updates and initial values against transformers, PEFT and torch.

use std::sync::Arc;

use sha2::Digest;

use super::*;
use crate::kernels::Kernels;
use crate::train::adapter_out::named_tensors;
use crate::train::files::read_tensors;
use crate::train::forward_backward::StepOptions;
use crate::train::lr_schedule::{DeepSpeedWarmup, WarmupType};
use crate::train::model::FrozenModel;
use crate::train::{LoraTensors, forward_backward};

fn options_of(adapter: &Path) -> LoraOptions {
    let config = read_json(&adapter.join("adapter_config.json"));
    let names = |key: &str| {
        let names = config[key].as_array().into_iter().flatten();
        names
            .map(|name| name.as_str().unwrap().to_owned())
            .collect()
    };
    LoraOptions {
        rank: config["r"].as_u64().unwrap() as usize,
        alpha: config["lora_alpha"].as_f64().unwrap(),
        use_rslora: config["use_rslora"].as_bool().unwrap(),
        use_dora: config["use_dora"].as_bool().unwrap(),
        target: LoraTarget::Modules(names("target_modules")),
        modules_to_save: names("modules_to_save"),
        ..lora_options()
    }
}

/// Packs sequences of a golden file by their numbers.
fn pack(sequences: &Value, numbers: &Value) -> TrainBatch {
    let mut batch = TrainBatch::default();
    for number in numbers.as_array().unwrap() {
        let sequence = &sequences[number.as_u64().unwrap() as usize];
        let ints = |key: &str| {
            sequence[key]
                .as_array()
                .unwrap()
                .iter()
                .map(|x| x.as_i64().unwrap())
        };
        let input_ids: Vec<u32> = ints("input_ids").map(|id| id as u32).collect();
        batch.append(&TrainBatch {
            labels: ints("labels").map(|label| label as i32).collect(),
            position_ids: (0..input_ids.len() as u32).collect(),
            cu_seqlens: vec![0, input_ids.len() as u32],
            rows: vec![number.as_u64().unwrap()],
            input_ids,
        });
    }
    batch
}

#[test]
fn gradients_equal_pefts() {
    let folder = fixtures().join("training/gradients");
    let goldens = read_json(&folder.join("cases.json"));
    let mut num_checked = 0;
    for case in goldens["cases"].as_array().unwrap() {
        let name = case["case"].as_str().unwrap();
        let (base, adapter) = (Base::new(case["base"].as_str().unwrap()), folder.join(name));
        let layout = LoraLayout::new(&base.config, options_of(&adapter)).unwrap();
        let kernels = Kernels::cpu(2).unwrap();
        let model = FrozenModel::load(&base.checkpoint, &base.config, &kernels, 64).unwrap();
        let params = read_adapter(&adapter, &layout).unwrap();
        let lora = LoraTensors::new(&kernels, &layout, &Arc::new(params)).unwrap();
        let batch = pack(&goldens["sequences"], &case["sequences"]);
        let num_targets = case["num_target_tokens"].as_f64().unwrap();
        assert_eq!(batch.num_targets() as f64, num_targets);
        let options = StepOptions {
            recompute: Recompute::None,
            neftune_noise_alpha: 0.0,
            noise_key: 0,
        };
        let mut gradients = vec![0.0; layout.num_params()];
        let weight = (options, (1.0 / num_targets) as f32);
        let loss = forward_backward(&kernels, &model, &lora, &batch, weight, &mut gradients);
        let (loss, want) = (loss.unwrap() / num_targets, case["loss"].as_f64().unwrap());
        assert!(
            (loss - want).abs() < 1e-6 * want,
            "{name}: loss {loss} for {want}"
        );
        let want = read_tensors(&adapter.join("gradients.safetensors")).unwrap();
        for (tensor, shape, got) in named_tensors(&layout, &gradients) {
            let (want_shape, want) = &want[&tensor];
            assert_eq!(&shape, want_shape);
            let largest = want.iter().fold(0f32, |max, x| max.max(x.abs()));
            for (got, want) in got.iter().zip(want) {
                let error = (got - want).abs();
                assert!(
                    error <= 1e-4 * largest,
                    "{name} {tensor}: {got} for {want}, largest {largest}"
                );
            }
            num_checked += 1;
        }
    }
    assert!(num_checked > 150, "{num_checked} tensors");
}

fn schedule_of(options: &Value, total_steps: u64) -> LrSchedule {
    let learning_rate = options["learning_rate"].as_f64().unwrap();
    let ratio = options["warmup_ratio"].as_f64().unwrap_or(0.0);
    let mut warmup_steps = (total_steps as f64 * ratio).ceil() as u64;
    if let Some(steps) = options["warmup_steps"].as_u64().filter(|&steps| steps > 0) {
        warmup_steps = steps;
    }
    let curve = match options["lr_scheduler_type"].as_str() {
        Some("cosine") => LrCurve::Cosine { num_cycles: 0.5 },
        Some("linear") => LrCurve::Linear,
        Some("constant") => LrCurve::Constant,
        _ => {
            warmup_steps = options["deepspeed_scheduler"]["warmup_num_steps"]
                .as_u64()
                .unwrap();
            LrCurve::WarmupLr(DeepSpeedWarmup {
                min_lr: 0.0,
                max_lr: learning_rate,
                warmup_type: WarmupType::Log,
            })
        }
    };
    LrSchedule {
        curve,
        learning_rate,
        warmup_steps,
        total_steps,
    }
}

#[test]
fn twenty_updates_follow_torch_and_peft() {
    let folder = fixtures().join("training/trajectories");
    let goldens = read_json(&folder.join("cases.json"));
    for case in goldens["cases"].as_array().unwrap() {
        let name = case["case"].as_str().unwrap();
        let (options, steps) = (&case["options"], case["steps"].as_array().unwrap());
        let number = |key: &str| options[key].as_f64();
        let initial = folder.join(case["adapter"].as_str().unwrap());
        let accumulation = options["accumulation"].as_u64().unwrap();
        let mut run = Run::new(case["base"].as_str().unwrap(), steps.len() as u64);
        run.lora = options_of(&initial);
        run.optimizer = AdamWOptions {
            beta1: number("adam_beta1").unwrap(),
            beta2: number("adam_beta2").unwrap(),
            epsilon: number("adam_epsilon").unwrap(),
            weight_decay: number("weight_decay").unwrap(),
            max_grad_norm: number("max_grad_norm").unwrap(),
            loraplus_lr_ratio: number("loraplus_lr_ratio").unwrap_or(1.0),
        };
        run.schedule = schedule_of(options, steps.len() as u64);
        run.length = RunLength {
            micro_batches_per_epoch: steps.len() as u64 * accumulation,
            accumulation,
            total_updates: steps.len() as u64,
            num_train_epochs: 1.0,
        };
        run.start = Start::Adapter(initial);
        let provider = |place: BatchPlace| {
            let step = &steps[(place.index / accumulation) as usize];
            let micro = (place.index % accumulation) as usize;
            Ok(pack(&goldens["sequences"], &step["micro_batches"][micro]))
        };
        let dir = tempfile::tempdir().unwrap();
        let (summary, updates) = run.run(dir.path(), &provider).unwrap();
        assert_eq!(updates.len(), steps.len());
        for (index, ([loss, norm, rate], step)) in updates.iter().zip(steps).enumerate() {
            let close = |got: f64, want: &Value, tolerance: f64| {
                let want = want.as_f64().unwrap();
                assert!(
                    (got - want).abs() <= tolerance * want.abs(),
                    "{name} {index}: {got} for {want}"
                );
            };
            close(*loss, &step["loss"], 1e-5);
            close(*norm, &step["grad_norm"], 1e-4);
            close(*rate, &step["learning_rates"][0], 1e-12);
        }
        let layout = LoraLayout::new(&run.base.config, run.lora.clone()).unwrap();
        let want = read_tensors(&folder.join(case["final"].as_str().unwrap())).unwrap();
        for (tensor, _, got) in named_tensors(&layout, &summary.params) {
            for (got, want) in got.iter().zip(&want[&tensor].1) {
                assert!(
                    (got - want).abs() <= 2e-5,
                    "{name} {tensor}: {got} for {want}"
                );
            }
        }
    }
}

#[test]
fn initial_values_are_pefts() {
    let goldens = read_json(&fixtures().join("training/init/lora_init.json"));
    for case in goldens["cases"].as_array().unwrap() {
        let base = Base::new(case["base"].as_str().unwrap());
        let targets = case["target_modules"].as_array().unwrap().iter();
        let options = LoraOptions {
            rank: case["r"].as_u64().unwrap() as usize,
            alpha: 8.0,
            target: LoraTarget::Modules(targets.map(|t| t.as_str().unwrap().to_owned()).collect()),
            ..lora_options()
        };
        let layout = LoraLayout::new(&base.config, options).unwrap();
        let params = layout.init(case["seed"].as_u64().unwrap());
        let want = case["lora_A"].as_array().unwrap();
        assert_eq!(layout.entries().len(), want.len());
        for (entry, want) in layout.entries().iter().zip(want) {
            assert_eq!(entry.module.path(), want["module"].as_str().unwrap());
            let first: Vec<f32> = (want["first"].as_array().unwrap().iter())
                .map(|value| value.as_f64().unwrap() as f32)
                .collect();
            assert_eq!(&params[entry.a_offset..entry.a_offset + 4], first);
            let bytes: Vec<u8> = (params[entry.a_offset..entry.b_offset].iter())
                .flat_map(|value| value.to_le_bytes())
                .collect();
            let hash: String = (sha2::Sha256::digest(&bytes).iter())
                .map(|byte| format!("{byte:02x}"))
                .collect();
            assert_eq!(hash, want["sha256"].as_str().unwrap());
        }
    }
}
