//! Whole runs of tiny models: against the Python stack, against themselves, and interrupted.

mod goldens;
mod precision;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use candle_core::DType;
use serde_json::{Value, json};

use super::super::adapter_out::{AdapterFiles, read_adapter};
use super::super::forward_backward::tests::lora_options;
use super::super::forward_backward::{Recompute, TrainBatch};
use super::super::list_checkpoints;
use super::super::lora::{LoraOptions, LoraTarget};
use super::super::lr_schedule::{LrCurve, LrSchedule};
use super::super::optimizer::{AdamWOptions, LossScaleOptions};
use super::super::zero::ZeroStage;
use super::*;
use crate::models::ModelConfig;
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
    save_only_model: bool,
    manifest: BTreeMap<String, Value>,
    start: Start,
    evaluation: Option<(u64, Option<u64>)>,
    loss_scale: Option<LossScaleOptions>,
    /// Skipped updates: step, loss scale before and after.
    skips: Mutex<Vec<(u64, f64, f64)>>,
}

impl Run {
    fn new(base: &str, total_updates: u64) -> Self {
        Self {
            base: Base::new(base),
            lora: LoraOptions {
                rank: 2,
                alpha: 8.0,
                ..lora_options()
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
            save_only_model: false,
            manifest: BTreeMap::from([("lora_rank".to_owned(), json!(2))]),
            start: Start::Fresh,
            evaluation: None,
            loss_scale: None,
            skips: Mutex::default(),
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
            if let TrainEvent::Skipped {
                global_step,
                attempted,
                loss_scale,
                ..
            } = event
            {
                let skip = (*global_step, *attempted, *loss_scale);
                self.skips.lock().unwrap().push(skip);
            }
        };
        let setup = TrainSetup {
            source: &self.base.checkpoint,
            config: &self.base.config,
            lora: self.lora.clone(),
            optimizer: self.optimizer,
            schedule: self.schedule,
            loss_scale: self.loss_scale,
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
                num_examples: 6,
                every,
                delay: 0,
                on_start: false,
                early_stopping,
                load_best_model_at_end: true,
            }),
            output: OutputPlan {
                output_dir: dir.to_owned(),
                logging_steps: 3,
                logging_first_step: false,
                save_steps: self.save_steps,
                save_total_limit: self.save_total_limit,
                save_only_model: self.save_only_model,
                plot_loss: true,
                tensorboard_dir: None,
                train_batch_size: 2,
                num_samples: 14.0,
                replaced: Vec::new(),
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

/// Magnitudes, whole modules of all kinds, and adapters of some linears.
fn everything(options: &LoraOptions) -> LoraOptions {
    let texts = |texts: &[&str]| texts.iter().map(|&text| text.to_owned()).collect();
    LoraOptions {
        target: LoraTarget::Modules(texts(&["q_proj", "v_proj", "down_proj"])),
        use_dora: true,
        modules_to_save: texts(&["embed_tokens", "lm_head", "norm", "k_proj"]),
        ..options.clone()
    }
}

#[test]
fn every_zero_stage_gives_the_bits_of_stage_zero_and_about_those_of_one_rank() {
    check_zero_stages(&Run::new("tiny-qwen2", 6).lora, 1e-5);
}

#[test]
fn every_zero_stage_trains_magnitudes_and_whole_modules_alike() {
    // Adam's first steps magnify rounding where gradients are near zero.
    check_zero_stages(&everything(&Run::new("tiny-qwen2", 6).lora), 1e-3);
}

fn check_zero_stages(lora: &LoraOptions, tolerance: f32) {
    let run = |num_ranks: usize, zero_stage, provider: &BatchProvider<'_>| {
        let mut run = Run::new("tiny-qwen2", 6);
        run.lora = lora.clone();
        run.ranks.num_ranks = num_ranks;
        run.ranks.zero_stage = zero_stage;
        // Some ranks then make one pass of their two micro-batches, others two.
        run.max_tokens_per_pass = 36;
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
        assert!((one - three).abs() < tolerance, "{one} and {three}");
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
    check_resumed(&|lora| lora);
}

#[test]
fn magnitudes_and_whole_modules_rounded_to_bf16_go_on_bit_for_bit() {
    check_resumed(&|lora| LoraOptions {
        dtype: DType::BF16,
        ..everything(&lora)
    });
}

fn check_resumed(change: &dyn Fn(LoraOptions) -> LoraOptions) {
    let (whole_dir, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let run = || {
        let mut run = Run::new("tiny-qwen3", 10);
        run.save_steps = Some(4);
        run.lora.dropout = 0.1;
        run.ranks.num_ranks = 2;
        run.ranks.zero_stage = ZeroStage::Two;
        run.evaluation = Some((4, None));
        run.lora = change(run.lora);
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

fn names_in(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn checkpoints_of_the_model_alone_are_small_and_end_a_run_that_would_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let mut run = Run::new("tiny-llama", 5);
    (run.save_steps, run.save_only_model) = (Some(5), true);
    run.run(dir.path(), &batches).unwrap();
    let checkpoint = dir.path().join("checkpoint-5");
    assert_eq!(
        names_in(&checkpoint),
        [
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
            "manifest.json",
            "tokenizer.json",
            "trainer_state.json",
        ]
    );
    run.start = Start::Checkpoint(checkpoint.clone());
    let error = run.run(dir.path(), &batches).unwrap_err().to_string();
    assert!(error.contains("save_only_model: true"), "{error}");
    assert!(error.contains("overwrite_output_dir: true"), "{error}");
    run.start = Start::Adapter(checkpoint);
    run.run(dir.path(), &batches).unwrap();
}

#[test]
fn old_checkpoints_go_and_half_written_ones_with_them() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(dir.path().join("tmp-checkpoint-1/rest")).unwrap();
    let mut run = Run::new("tiny-llama", 5);
    (run.save_steps, run.save_total_limit) = (Some(1), Some(2));
    run.run(dir.path(), &batches).unwrap();
    assert_eq!(
        names_in(dir.path()),
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
fn parameters_that_an_update_made_infinite_are_not_written() {
    let dir = tempfile::tempdir().unwrap();
    let mut run = Run::new("tiny-llama", 3);
    run.save_steps = Some(1);
    run.schedule.learning_rate = 1e39;
    run.schedule.curve = LrCurve::Constant;
    let error = run.run(dir.path(), &batches).unwrap_err().to_string();
    assert!(error.contains("infinite after step 1"), "{error}");
    assert_eq!(list_checkpoints(dir.path()), []);
    assert!(!dir.path().join("adapter_model.safetensors").exists());
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
