//! `infold train` through the binary: from a data set to an adapter that `infold merge` takes.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

use crate::tiny_engine::fixtures;

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_infold"));
    command
        .args(arguments)
        .current_dir(env!("CARGO_MANIFEST_DIR"));
    command
}

fn infold(arguments: &[&str]) -> Output {
    command(arguments).output().unwrap()
}

/// Trains on the persona data of the repository; `more` comes last and so wins.
pub(crate) fn train(output_dir: &Path, more: &[&str]) -> Output {
    training(output_dir, more).output().unwrap()
}

pub(crate) fn training(output_dir: &Path, more: &[&str]) -> Command {
    let model = format!(
        "model_name_or_path={}",
        fixtures().join("tiny-qwen2").display()
    );
    let output_dir = format!("output_dir={}", output_dir.display());
    let mut arguments = vec![
        "train",
        &model,
        &output_dir,
        "dataset=persona",
        "template=qwen",
        "cutoff_len=64",
        "max_samples=24",
        "per_device_train_batch_size=4",
        "gradient_accumulation_steps=2",
        "num_train_epochs=2",
        "learning_rate=1e-3",
        "lora_dropout=0.1",
        "logging_steps=1",
        "save_steps=2",
        "plot_loss=true",
    ];
    arguments.extend(more);
    command(&arguments)
}

pub(crate) fn succeed(output: &Output) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub(crate) fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

#[test]
fn a_run_writes_the_files_of_llamafactory_and_merges() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("adapter");
    let stdout = succeed(&train(&out, &[]));
    assert!(stdout.contains("Total optimization steps = 6"), "{stdout}");
    for line in [
        "***** train metrics *****",
        "  Num examples = 24",
        "  Number of trainable parameters = ",
    ] {
        assert!(stdout.contains(line), "{stdout}");
    }
    for name in [
        "adapter_config.json",
        "adapter_model.safetensors",
        "trainer_state.json",
        "trainer_log.jsonl",
        "train_results.json",
        "all_results.json",
        "training_loss.png",
        "training_template.json",
        "tokenizer.json",
        "README.md",
        "checkpoint-6/trainer_state.json",
    ] {
        assert!(out.join(name).is_file(), "{name} is missing");
    }
    let history = json(&out.join("trainer_state.json"));
    let losses: Vec<f64> = (history["log_history"].as_array().unwrap().iter())
        .filter_map(|entry| entry["loss"].as_f64())
        .collect();
    assert_eq!(losses.len(), 6);
    assert!(losses[5] < losses[0], "{losses:?}");

    let model = fixtures().join("tiny-qwen2");
    let merged = dir.path().join("merged");
    let merge = infold(&[
        "merge",
        "--model",
        model.to_str().unwrap(),
        "--adapter",
        out.to_str().unwrap(),
        "--output",
        merged.to_str().unwrap(),
    ]);
    let stdout = succeed(&merge);
    assert!(
        stdout.contains("sample prompts have the tokens"),
        "{stdout}"
    );
    assert!(merged.join("Modelfile").is_file());
    assert_eq!(
        json(&merged.join("training_template.json"))["template"],
        "qwen"
    );
}

/// The first and the last evaluation of a run.
fn eval_losses(dir: &Path) -> [f64; 2] {
    let state = json(&dir.join("trainer_state.json"));
    let history = state["log_history"].as_array().unwrap().iter();
    let losses: Vec<f64> = history
        .filter_map(|entry| entry["eval_loss"].as_f64())
        .collect();
    [losses[0], losses[losses.len() - 1]]
}

#[test]
fn magnitudes_and_whole_modules_merge_into_the_model_that_was_trained() {
    let dir = tempfile::tempdir().unwrap();
    let evaluated = ["val_size=0.25", "eval_strategy=epoch", "eval_on_start=true"];
    // Tied embedding and head come apart in the first, and by an adapter on the head in the second.
    let wishes: [&[&str]; 2] = [
        &[
            "use_dora=true",
            "lora_target=q_proj,up_proj",
            "additional_target=embed_tokens,lm_head,norm",
        ],
        &["lora_target=v_proj,lm_head", "additional_target=k_proj"],
    ];
    for (index, wishes) in wishes.into_iter().enumerate() {
        let out = dir.path().join(format!("adapter-{index}"));
        succeed(&train(&out, &[&evaluated, wishes].concat()));
        let [first, last] = eval_losses(&out);
        assert!(last < first, "{first} to {last}");
        let merged = dir.path().join(format!("merged-{index}"));
        let merge = infold(&[
            "merge",
            "--model",
            fixtures().join("tiny-qwen2").to_str().unwrap(),
            "--adapter",
            out.to_str().unwrap(),
            "--output",
            merged.to_str().unwrap(),
        ]);
        succeed(&merge);
        // A fresh adapter changes nothing, so the first evaluation is of the merged model.
        let again = dir.path().join(format!("again-{index}"));
        let model = format!("model_name_or_path={}", merged.display());
        succeed(&train(
            &again,
            &[&evaluated[..], &[&model, "max_steps=1"]].concat(),
        ));
        let [merged_loss, _] = eval_losses(&again);
        assert!(
            (merged_loss - last).abs() < 1e-5 * last,
            "{merged_loss} for {last}"
        );
    }
}

#[test]
fn a_run_begins_at_adapters_or_with_them_merged() {
    let dir = tempfile::tempdir().unwrap();
    let evaluated = ["val_size=0.25", "eval_strategy=epoch", "eval_on_start=true"];
    let first = dir.path().join("first");
    succeed(&train(&first, &evaluated));
    let [_, want] = eval_losses(&first);
    let from = format!("adapter_name_or_path={}", first.display());
    // Its weights, or a fresh adapter over the base with them merged: the same model at the start.
    let mut last = want;
    for (name, more) in [
        ("on", "create_new_adapter=false"),
        ("new", "create_new_adapter=true"),
    ] {
        let out = dir.path().join(name);
        succeed(&train(&out, &[&evaluated[..], &[&from, more]].concat()));
        let [start, end] = eval_losses(&out);
        assert!(
            (start - want).abs() < 1e-5 * want,
            "{name}: {start} for {want}"
        );
        assert!(end < want, "{name}: {end}");
        last = end;
    }
    // The earlier of several are merged, the last goes on.
    let both = format!("{from},{}", dir.path().join("new").display());
    let out = dir.path().join("both");
    succeed(&train(&out, &[&evaluated[..], &[&both]].concat()));
    let [start, _] = eval_losses(&out);
    assert!((start - last).abs() < 1e-5 * last, "{start} for {last}");
}

/// Returns the files of a folder by name.
pub(crate) fn contents(folder: &Path) -> BTreeMap<OsString, Vec<u8>> {
    let files = fs::read_dir(folder).unwrap().map(Result::unwrap);
    files
        .filter(|file| file.path().is_file())
        .map(|file| (file.file_name(), fs::read(file.path()).unwrap()))
        .collect()
}

#[test]
fn the_frozen_base_stays_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base");
    fs::create_dir(&base).unwrap();
    for (name, content) in contents(&fixtures().join("tiny-qwen2")) {
        fs::write(base.join(name), content).unwrap();
    }
    let before = contents(&base);
    let model = format!("model_name_or_path={}", base.display());
    for more in [
        &["num_ranks=1"][..],
        &["additional_target=embed_tokens"][..],
    ] {
        let out = dir.path().join(more[0]);
        succeed(&train(&out, &[&[model.as_str()][..], more].concat()));
        assert!(contents(&base) == before, "{more:?} changed the base");
    }
}

#[test]
fn the_environment_is_printed_for_reports() {
    let stdout = succeed(&infold(&["env"]));
    for part in [env!("CARGO_PKG_VERSION"), "cores: ", "kernels: "] {
        assert!(stdout.contains(part), "{stdout}");
    }
}

#[test]
fn fp16_skips_overflows_and_saves_what_deepspeed_would() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("ds.json");
    let text = r#"{"fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 30,
        "hysteresis": 2, "min_loss_scale": 1}, "zero_optimization": {"stage": 2}}"#;
    fs::write(&file, text).unwrap();
    let deepspeed = format!("deepspeed={}", file.display());
    let out = dir.path().join("adapter");
    // A constant rate: a longer run may go on from a shorter one.
    let more = ["fp16=true", "lr_scheduler_type=constant", &deepspeed];
    let stdout = succeed(&train(&out, &more));
    for line in [
        "OVERFLOW! Skipping step 1. Attempted loss scale: 1073741824, which stays",
        "OVERFLOW! Skipping step 2. Attempted loss scale: 1073741824, reducing to 536870912",
        "fp16.hysteresis = 2: overflows before the scale halves",
    ] {
        assert!(stdout.contains(line), "{line} is not in {stdout}");
    }
    let weights = fs::read(out.join("adapter_model.safetensors")).unwrap();
    assert!(weights.windows(5).any(|bytes| bytes == b"\"F16\""));
    let resumed = train(&out, &[&more[..], &["num_train_epochs=3"]].concat());
    assert!(succeed(&resumed).contains("Skipping step 7"));
}

#[test]
fn evaluations_come_when_they_are_asked_for_and_tensorboard_gets_all_numbers() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("adapter");
    let more = [
        "val_size=0.25",
        "eval_strategy=steps",
        "eval_steps=1",
        "eval_delay=3",
        "eval_on_start=true",
        "report_to=tensorboard",
        "num_train_epochs=2",
    ];
    succeed(&train(&out, &more));
    let state = json(&out.join("trainer_state.json"));
    let history = state["log_history"].as_array().unwrap().clone();
    let evaluated: Vec<u64> = (history.iter())
        .filter(|entry| entry.get("eval_loss").is_some())
        .map(|entry| entry["step"].as_u64().unwrap())
        .collect();
    let last = state["global_step"].as_u64().unwrap();
    let wanted: Vec<u64> = [0].into_iter().chain(3..=last).collect();
    assert_eq!(evaluated, wanted);
    let files: Vec<_> = fs::read_dir(out.join("runs")).unwrap().collect();
    assert_eq!(files.len(), 1);
    let events = fs::read(files[0].as_ref().unwrap().path()).unwrap();
    for tag in [
        "train/loss",
        "train/grad_norm",
        "eval/loss",
        "train/train_loss",
    ] {
        let found = events.windows(tag.len()).any(|part| part == tag.as_bytes());
        assert!(found, "{tag}");
    }
}

#[test]
fn ranks_and_zero_stages_give_the_adapter_of_the_same_data() {
    let dir = tempfile::tempdir().unwrap();
    let adapter = |name: &str, more: &[&str]| {
        let out = dir.path().join(name);
        let all = [
            &[
                "num_ranks=2",
                "gradient_accumulation_steps=1",
                "lora_dropout=0",
            ],
            more,
        ];
        succeed(&train(&out, &all.concat()));
        fs::read(out.join("adapter_model.safetensors")).unwrap()
    };
    let plain = adapter("zero0", &[]);
    for stage in [2, 3] {
        let file = dir.path().join(format!("ds{stage}.json"));
        let text = format!(
            r#"{{"zero_optimization": {{"stage": {stage}}}, "train_micro_batch_size_per_gpu": "auto",
                "gradient_accumulation_steps": "auto", "train_batch_size": "auto"}}"#
        );
        fs::write(&file, text).unwrap();
        let deepspeed = format!("deepspeed={}", file.display());
        let sharded = adapter(&format!("zero{stage}"), &[&deepspeed]);
        assert!(plain == sharded, "ZeRO {stage} differs");
    }
}

#[test]
fn a_dry_run_plans_and_writes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("adapter");
    let stdout = succeed(&train(&out, &["dry_run=true"]));
    assert!(stdout.contains("dry run"), "{stdout}");
    assert!(!out.exists());
}

#[test]
fn check_data_reports_the_persona_rows() {
    let output = infold(&["check-data", "dataset=persona", "template=qwen"]);
    let stdout = succeed(&output);
    assert!(stdout.contains("125 conversations to train on"), "{stdout}");
}

#[test]
fn wrong_wishes_are_named_before_anything_is_written() {
    let dir = tempfile::tempdir().unwrap();
    for (more, wanted) in [
        ("dataset=persna", "persona"),
        ("lora_target=c_attn", "q_proj"),
        ("template=qwen9", "qwen9"),
        ("learning_rat=1", "learning_rate"),
        ("report_to=wandb", "tensorboard"),
        ("eval_on_start=true", "eval_strategy"),
        ("adam_epsilon=0", "above 0"),
        ("adam_beta2=1", "below 1"),
        ("stage=dpo", "(stage=dpo)"),
        (
            "cutoff_len=1",
            "0 examples: 24 more have nothing to learn within cutoff_len 1",
        ),
    ] {
        let out = dir.path().join("adapter");
        let output = train(&out, &[more]);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{more} was taken");
        assert!(stderr.contains(wanted), "{more}: {stderr}");
        assert!(!out.exists(), "{more}");
    }
}

#[test]
fn an_error_names_the_file_and_says_its_cause_once() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("adapter");
    // "max_steps: 1 # 你好" in GBK.
    let gbk = dir.path().join("gbk.yaml");
    fs::write(&gbk, b"max_steps: 1 # \xc4\xe3\xba\xc3\n").unwrap();
    let gbk = gbk.to_str().unwrap();
    let no_file = "gone.json\" not found";
    for (more, wanted) in [
        ("dataset_dir=/nowhere", "No such file or directory"),
        ("dataset=./gone.json", no_file),
        ("deepspeed=gone.json", "No such file or directory"),
        (
            gbk,
            "gbk.yaml\" is not UTF-8: line 1, byte 15; it looks like GBK",
        ),
    ] {
        let more = match more.starts_with("dataset=") {
            true => vec!["dataset_dir=/nowhere", more],
            false => vec![more],
        };
        let output = train(&out, &more);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{more:?} was taken");
        assert_eq!(stderr.matches(wanted).count(), 1, "{more:?}: {stderr}");
    }
}

#[test]
fn do_eval_alone_evaluates_at_the_end() {
    let dir = tempfile::tempdir().unwrap();
    for (more, is_evaluated) in [("do_eval=true", true), ("do_eval=false", false)] {
        let out = dir.path().join(more);
        succeed(&train(&out, &["val_size=0.25", more]));
        let state = json(&out.join("trainer_state.json"));
        let history = state["log_history"].as_array().unwrap().iter();
        let evaluated = history.filter(|entry| entry.get("eval_loss").is_some());
        let steps: Vec<&Value> = evaluated.map(|entry| &entry["step"]).collect();
        let wanted = [&state["global_step"]];
        assert_eq!(
            steps,
            if is_evaluated { &wanted[..] } else { &[] },
            "{more}"
        );
        assert_eq!(out.join("eval_results.json").is_file(), is_evaluated);
    }
}

#[test]
fn speeds_are_those_of_the_examples_that_were_seen() {
    let dir = tempfile::tempdir().unwrap();
    for (more, per_update) in [
        ("max_steps=2", 8.0),
        ("num_train_epochs=0.5", 0.5 * 18.0 / 2.0),
    ] {
        let out = dir.path().join(more);
        let evaluated = ["val_size=0.25", "eval_strategy=epoch", more];
        succeed(&train(&out, &evaluated));
        let results = json(&out.join("all_results.json"));
        let speed = |name: &str| results[format!("{name}_per_second")].as_f64().unwrap();
        let ratio = speed("train_samples") / speed("train_steps");
        assert!(
            (ratio - per_update).abs() < 0.01 * per_update,
            "{more}: {ratio}"
        );
        // 6 rows in 1 batch of 8.
        let ratio = speed("eval_samples") / speed("eval_steps");
        assert!((ratio - 6.0).abs() < 0.1, "{ratio}");
    }
}
