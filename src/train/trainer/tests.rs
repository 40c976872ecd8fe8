//! Whole runs of tiny models: against the Python stack, against themselves, and interrupted.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use serde_json::{Value, json};

use super::super::adapter_out::{AdapterFiles, named_factors, read_adapter};
use super::super::files::read_tensors;
use super::super::forward_backward::{Recompute, StepOptions, TrainBatch};
use super::super::lora::{LoraOptions, LoraTarget};
use super::super::lr_schedule::{DeepSpeedWarmup, LrCurve, LrSchedule, WarmupType};
use super::super::optimizer::AdamWOptions;
use super::super::zero::ZeroStage;
use super::super::{LoraTensors, forward_backward, list_checkpoints};
use super::*;
use crate::kernels::Kernels;
use crate::models::ModelConfig;
use crate::train::model::FrozenModel;
use crate::weights::Checkpoint;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

struct Base {
    checkpoint: Checkpoint,
    config: ModelConfig,
}

impl Base {
    fn new(name: &str) -> Self {
        let checkpoint = Checkpoint::open(&fixtures().join(name)).unwrap();
        let config = ModelConfig::from_json(checkpoint.config()).unwrap();
        Self { checkpoint, config }
    }
}

fn read_json(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn lora_options(adapter: &Path) -> LoraOptions {
    let config = read_json(&adapter.join("adapter_config.json"));
    let targets = config["target_modules"].as_array().unwrap().iter();
    LoraOptions {
        rank: config["r"].as_u64().unwrap() as usize,
        alpha: config["lora_alpha"].as_f64().unwrap(),
        dropout: 0.0,
        use_rslora: config["use_rslora"].as_bool().unwrap(),
        target: LoraTarget::Modules(targets.map(|t| t.as_str().unwrap().to_owned()).collect()),
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
        if name.ends_with("dora") || name.ends_with("modules_to_save") {
            continue;
        }
        let (base, adapter) = (Base::new(case["base"].as_str().unwrap()), folder.join(name));
        let layout = LoraLayout::new(&base.config, lora_options(&adapter)).unwrap();
        let kernels = Kernels::cpu(2).unwrap();
        let model = FrozenModel::load(&base.checkpoint, &base.config, &kernels, 64).unwrap();
        let params = read_adapter(&adapter, &layout).unwrap();
        let lora = LoraTensors::new(&layout, params).unwrap();
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
        for (tensor, shape, got) in named_factors(&layout, &gradients) {
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

/// A run that a test changes.
struct Run {
    base: Base,
    lora: LoraOptions,
    optimizer: AdamWOptions,
    schedule: LrSchedule,
    length: RunLength,
    ranks: Ranks,
    max_tokens_per_pass: usize,
    recompute: Recompute,
    save_steps: Option<u64>,
    save_total_limit: Option<usize>,
    manifest: BTreeMap<String, Value>,
    start: Start,
    evaluation: Option<(u64, Option<u64>)>,
}

impl Run {
    fn new(base: &str, total_updates: u64) -> Self {
        Self {
            base: Base::new(base),
            lora: LoraOptions {
                rank: 2,
                alpha: 8.0,
                dropout: 0.0,
                use_rslora: false,
                target: LoraTarget::All,
            },
            optimizer: AdamWOptions::default(),
            schedule: LrSchedule {
                curve: LrCurve::Cosine { num_cycles: 0.5 },
                learning_rate: 2e-3,
                warmup_steps: 2,
                total_steps: total_updates,
            },
            length: RunLength {
                micro_batches_per_epoch: 7,
                accumulation: 2,
                total_updates,
                num_train_epochs: 3.0,
            },
            ranks: Ranks {
                num_ranks: 1,
                threads_per_rank: 1,
                zero_stage: ZeroStage::Zero,
            },
            max_tokens_per_pass: 1,
            recompute: Recompute::None,
            save_steps: None,
            save_total_limit: None,
            manifest: BTreeMap::from([("lora_rank".to_owned(), json!(2))]),
            start: Start::Fresh,
            evaluation: None,
        }
    }

    fn run(
        &self,
        dir: &Path,
        batches: &BatchProvider<'_>,
    ) -> Result<(TrainSummary, Vec<[f64; 3]>), TrainError> {
        let updates = Mutex::new(Vec::new());
        let progress = |event: &TrainEvent<'_>| {
            if let TrainEvent::Update {
                loss,
                grad_norm,
                learning_rate,
                ..
            } = event
            {
                updates
                    .lock()
                    .unwrap()
                    .push([*loss, *grad_norm, *learning_rate]);
            }
        };
        let setup = TrainSetup {
            source: &self.base.checkpoint,
            config: &self.base.config,
            lora: self.lora.clone(),
            optimizer: self.optimizer,
            schedule: self.schedule,
            loss_scale: None,
            recompute: self.recompute,
            neftune_noise_alpha: 0.0,
            seed: 42,
            length: self.length,
            max_positions: 64,
            max_tokens_per_pass: self.max_tokens_per_pass,
            batches,
            evaluation: self.evaluation.map(|(every, early_stopping)| Evaluation {
                batches,
                num_batches: 3,
                every,
                early_stopping,
                load_best_model_at_end: true,
            }),
            output: OutputPlan {
                output_dir: dir.to_owned(),
                logging_steps: 3,
                logging_first_step: false,
                save_steps: self.save_steps,
                save_total_limit: self.save_total_limit,
                plot_loss: true,
                train_batch_size: 2,
                num_examples: 14,
            },
            ranks: self.ranks,
            files: AdapterFiles {
                base_model_name_or_path: "tiny".to_owned(),
                companions: vec![("tokenizer.json".to_owned(), b"{}".to_vec())],
            },
            manifest: self.manifest.clone(),
            start: self.start.clone(),
        };
        let summary = train(&setup, &progress)?;
        Ok((summary, updates.into_inner().unwrap()))
    }
}

/// Two sequences a micro-batch, made of the epoch's and the micro-batch's numbers.
fn batches(place: BatchPlace) -> Result<TrainBatch, Box<dyn std::error::Error + Send + Sync>> {
    let seed = place.epoch * 1000 + place.index * 10 + place.rank as u64;
    let lengths = [5 + seed as usize % 7, 9 + seed as usize % 4];
    Ok(crate::train::forward_backward::tests::batch(&lengths, seed))
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
        run.lora = lora_options(&initial);
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
        for (tensor, _, got) in named_factors(&layout, &summary.params) {
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
            dropout: 0.0,
            use_rslora: false,
            target: LoraTarget::Modules(targets.map(|t| t.as_str().unwrap().to_owned()).collect()),
        };
        let layout = LoraLayout::new(&base.config, options).unwrap();
        let params = layout.init(case["seed"].as_u64().unwrap());
        let want = case["lora_A"].as_array().unwrap();
        assert_eq!(layout.entries().len(), want.len());
        for (entry, want) in layout.entries().iter().zip(want) {
            assert_eq!(
                entry.linear.path(entry.layer),
                want["module"].as_str().unwrap()
            );
            let first: Vec<f32> = (want["first"].as_array().unwrap().iter())
                .map(|value| value.as_f64().unwrap() as f32)
                .collect();
            assert_eq!(&params[entry.a_offset..entry.a_offset + 4], first);
            let bytes: Vec<u8> = (params[entry.a_offset..entry.b_offset].iter())
                .flat_map(|value| value.to_le_bytes())
                .collect();
            use sha2::Digest;
            let hash: String = (sha2::Sha256::digest(&bytes).iter())
                .map(|byte| format!("{byte:02x}"))
                .collect();
            assert_eq!(hash, want["sha256"].as_str().unwrap());
        }
    }
}

#[test]
fn every_zero_stage_gives_the_bits_of_stage_zero_and_about_those_of_one_rank() {
    let run = |num_ranks: usize, zero_stage, provider: &BatchProvider<'_>| {
        let mut run = Run::new("tiny-qwen2", 6);
        run.ranks.num_ranks = num_ranks;
        run.ranks.zero_stage = zero_stage;
        if num_ranks == 1 {
            // One rank sees the micro-batches of three in turn.
            run.length.accumulation *= 3;
            run.length.micro_batches_per_epoch *= 3;
        }
        let dir = tempfile::tempdir().unwrap();
        run.run(dir.path(), provider).unwrap()
    };
    let whole = run(3, ZeroStage::Zero, &batches);
    for stage in [ZeroStage::One, ZeroStage::Two, ZeroStage::Three] {
        let other = run(3, stage, &batches);
        assert_eq!(other.0.params, whole.0.params, "{stage:?}");
        assert_eq!(other.1, whole.1, "{stage:?}");
    }
    let in_turn = |place: BatchPlace| {
        batches(BatchPlace {
            index: place.index / 3,
            rank: (place.index % 3) as usize,
            ..place
        })
    };
    let (one, updates) = run(1, ZeroStage::Zero, &in_turn);
    for ([loss, ..], [want, ..]) in updates.iter().zip(&whole.1) {
        assert!((loss - want).abs() < 1e-5 * want, "{loss} for {want}");
    }
    for (one, three) in one.params.iter().zip(&whole.0.params) {
        assert!((one - three).abs() < 1e-5, "{one} and {three}");
    }
}

#[test]
fn small_micro_batches_computed_together_give_the_same_losses() {
    let losses = |max_tokens_per_pass| {
        let mut run = Run::new("tiny-llama", 5);
        run.max_tokens_per_pass = max_tokens_per_pass;
        let dir = tempfile::tempdir().unwrap();
        run.run(dir.path(), &batches).unwrap().1
    };
    for (apart, together) in losses(1).iter().zip(&losses(1000)) {
        assert!(
            (apart[0] - together[0]).abs() < 1e-5 * apart[0],
            "{apart:?} {together:?}"
        );
    }
}

/// The content of a file without what depends on the clock.
fn stable_state(dir: &Path) -> Value {
    let mut state = read_json(&dir.join("trainer_state.json"));
    for entry in state["log_history"].as_array_mut().unwrap() {
        let entry = entry.as_object_mut().unwrap();
        entry.retain(|key, _| !key.contains("runtime") && !key.contains("per_second"));
    }
    state["best_model_checkpoint"] = Value::Null;
    state
}

#[test]
fn a_resumed_run_gives_the_bits_of_an_uninterrupted_one() {
    let (whole_dir, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let run = || {
        let mut run = Run::new("tiny-qwen3", 10);
        run.save_steps = Some(4);
        run.lora.dropout = 0.1;
        run.ranks.num_ranks = 2;
        run.ranks.zero_stage = ZeroStage::Two;
        run.evaluation = Some((4, None));
        run
    };
    let (whole, updates) = run().run(whole_dir.path(), &batches).unwrap();
    // The data fails in update 7, after the checkpoint of update 4.
    let failing = |place: BatchPlace| match (place.epoch, place.index) {
        (1, 4..) => Err("the disk is gone".into()),
        _ => batches(place),
    };
    let error = run().run(dir.path(), &failing).unwrap_err().to_string();
    assert!(error.contains("the disk is gone"), "{error}");
    let checkpoints = list_checkpoints(dir.path());
    assert_eq!(
        checkpoints
            .iter()
            .map(|(step, _)| *step)
            .collect::<Vec<_>>(),
        [4]
    );
    let mut resumed = run();
    resumed.start = Start::Checkpoint(checkpoints[0].1.clone());
    let (rest, rest_updates) = resumed.run(dir.path(), &batches).unwrap();
    assert_eq!(rest.params, whole.params);
    assert_eq!(rest_updates, updates[4..]);
    assert_eq!(stable_state(dir.path()), stable_state(whole_dir.path()));
    let moments =
        |dir: &Path| std::fs::read(dir.join("checkpoint-10/optimizer.safetensors")).unwrap();
    assert_eq!(moments(dir.path()), moments(whole_dir.path()));
    assert_eq!(rest.train_loss, whole.train_loss);
    // One rank may go on where two stopped.
    resumed.ranks.num_ranks = 1;
    resumed.run(dir.path(), &batches).unwrap();
    // A finished run has nothing left to do.
    resumed.start = Start::Checkpoint(dir.path().join("checkpoint-10"));
    let (again, none) = resumed.run(dir.path(), &batches).unwrap();
    assert!(again.was_complete && none.is_empty());
}

#[test]
fn a_checkpoint_of_another_configuration_is_refused_with_all_differences() {
    let dir = tempfile::tempdir().unwrap();
    let mut run = Run::new("tiny-llama", 2);
    run.save_steps = Some(2);
    run.run(dir.path(), &batches).unwrap();
    run.start = Start::Checkpoint(dir.path().join("checkpoint-2"));
    run.manifest.insert("lora_rank".to_owned(), json!(4));
    run.manifest.insert("template".to_owned(), json!("qwen"));
    let error = run.run(dir.path(), &batches).unwrap_err().to_string();
    for part in [
        "lora_rank was 2, is 4",
        "template was null, is \"qwen\"",
        "overwrite_output_dir",
    ] {
        assert!(error.contains(part), "{error}");
    }
    // The same manifest with other adapters: the file names the tensor.
    run.manifest = Run::new("tiny-llama", 2).manifest;
    run.lora.rank = 3;
    let error = run.run(dir.path(), &batches).unwrap_err().to_string();
    assert!(
        error.contains("q_proj.lora_A.weight") && error.contains("[2, 64]"),
        "{error}"
    );
}

#[test]
fn old_checkpoints_go_and_half_written_ones_with_them() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(dir.path().join("tmp-checkpoint-1/rest")).unwrap();
    let mut run = Run::new("tiny-llama", 5);
    (run.save_steps, run.save_total_limit) = (Some(1), Some(2));
    run.run(dir.path(), &batches).unwrap();
    let mut names: Vec<String> = std::fs::read_dir(dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(
        names,
        [
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
            "all_results.json",
            "checkpoint-4",
            "checkpoint-5",
            "tokenizer.json",
            "train_results.json",
            "trainer_log.jsonl",
            "trainer_state.json",
            "training_loss.png",
        ]
    );
}

#[test]
fn a_loss_that_is_no_number_stops_with_step_and_rows_and_keeps_checkpoints() {
    let dir = tempfile::tempdir().unwrap();
    let mut run = Run::new("tiny-llama", 4);
    run.save_steps = Some(2);
    run.ranks.num_ranks = 2;
    run.run(dir.path(), &batches).unwrap();
    // An adapter with infinities stands for a run that has diverged.
    let layout = LoraLayout::new(&run.base.config, run.lora.clone()).unwrap();
    let mut params = read_adapter(dir.path(), &layout).unwrap();
    params.fill(f32::INFINITY);
    let adapter = dir.path().join("diverged");
    super::super::write_adapter(&adapter, &layout, &params, &AdapterFiles::default()).unwrap();
    run.start = Start::Adapter(adapter);
    let error = run.run(dir.path(), &batches).unwrap_err().to_string();
    assert!(
        error.contains("the loss is NaN at step 1, in rows [0, 1]"),
        "{error}"
    );
    assert_eq!(list_checkpoints(dir.path()).len(), 2);
}

#[test]
fn a_run_whose_evaluations_get_worse_stops_early_with_its_best_weights() {
    let dir = tempfile::tempdir().unwrap();
    let mut run = Run::new("tiny-qwen2", 30);
    run.schedule.learning_rate = 0.05;
    run.schedule.curve = LrCurve::Constant;
    run.evaluation = Some((1, Some(3)));
    let (summary, updates) = run.run(dir.path(), &batches).unwrap();
    assert!(updates.len() < 30, "the run did not stop");
    let state = read_json(&dir.path().join("trainer_state.json"));
    let losses: Vec<f64> = (state["log_history"].as_array().unwrap().iter())
        .filter_map(|entry| entry["eval_loss"].as_f64())
        .collect();
    let best = losses.iter().copied().fold(f64::INFINITY, f64::min);
    assert_eq!(losses.len(), updates.len());
    assert_eq!(losses[losses.len() - 4], best, "{losses:?}");
    let checkpoint = dir.path().join(format!("checkpoint-{}", losses.len() - 3));
    let layout = LoraLayout::new(&run.base.config, run.lora.clone()).unwrap();
    assert_eq!(read_adapter(&checkpoint, &layout).unwrap(), summary.params);
    assert_eq!(read_adapter(dir.path(), &layout).unwrap(), summary.params);
}

#[test]
fn an_output_that_is_a_file_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().join("file");
    std::fs::write(&place, "").unwrap();
    let error = Run::new("tiny-llama", 1)
        .run(&place, &batches)
        .unwrap_err()
        .to_string();
    assert!(error.contains(&place.display().to_string()), "{error}");
}

#[test]
fn a_zero_among_the_counts_is_refused_by_name() {
    let mut run = Run::new("tiny-llama", 1);
    run.length.accumulation = 0;
    let dir = tempfile::tempdir().unwrap();
    let error = run.run(dir.path(), &batches).unwrap_err().to_string();
    assert!(
        error.contains("gradient_accumulation_steps must be at least 1"),
        "{error}"
    );
}

#[test]
#[ignore]
fn speed() {
    let dir = PathBuf::from("/tmp/smol-f32");
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let config = ModelConfig::from_json(checkpoint.config()).unwrap();
    let kernels = Kernels::cpu(2).unwrap();
    let model = FrozenModel::load(&checkpoint, &config, &kernels, 2048).unwrap();
    for dropout in [0.0, 0.1] {
        let layout = LoraLayout::new(
            &config,
            LoraOptions {
                rank: 8,
                alpha: 16.0,
                dropout,
                use_rslora: false,
                target: LoraTarget::All,
            },
        )
        .unwrap();
        let lora = LoraTensors::new(&layout, layout.init(1)).unwrap();
        for (lens, recompute) in [
            (vec![96; 4], Recompute::None),
            (vec![96; 16], Recompute::None),
            (vec![1024; 1], Recompute::None),
            (vec![96; 16], Recompute::Mlp),
            (vec![96; 16], Recompute::Full),
        ] {
            let batch = crate::train::forward_backward::tests::batch(&lens, 3);
            let mut gradients = vec![0.0; layout.num_params()];
            let options = StepOptions {
                recompute,
                neftune_noise_alpha: 0.0,
                noise_key: 0,
            };
            let mut best = f64::MAX;
            for _ in 0..4 {
                let start = std::time::Instant::now();
                forward_backward(
                    &kernels,
                    &model,
                    &lora,
                    &batch,
                    (options, 1.0),
                    &mut gradients,
                )
                .unwrap();
                best = best.min(start.elapsed().as_secs_f64());
            }
            let tokens = batch.num_tokens();
            let linear: f64 = (0..config.num_layers)
                .flat_map(|_| crate::train::Linear::ALL)
                .map(|l| {
                    let [a, b] = l.shape(&config);
                    (a * b) as f64
                })
                .sum();
            let flops = 4.0 * linear * tokens as f64
                + 4.0
                    * (config.vocab_size * config.hidden_size) as f64
                    * batch.num_targets() as f64;
            eprintln!(
                "dropout {dropout} {lens:?} {recompute:?}: {:.0} ms, {:.0} tokens/s, {:.1} GFLOP/s",
                best * 1e3,
                tokens as f64 / best,
                flops / best * 1e-9
            );
        }
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    eprintln!(
        "{}",
        status
            .lines()
            .filter(|l| l.starts_with("VmHWM"))
            .collect::<String>()
    );
}
