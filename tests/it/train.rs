//! `infold train` through the binary: from a data set to an adapter that `infold merge` takes.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

use crate::tiny_engine::fixtures;

fn infold(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_infold"))
        .args(arguments)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap()
}

/// Trains on the persona data of the repository; `more` comes last and so wins.
fn train(output_dir: &Path, more: &[&str]) -> Output {
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
    infold(&arguments)
}

fn succeed(output: &Output) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

#[test]
fn a_run_writes_the_files_of_llamafactory_and_merges() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("adapter");
    let stdout = succeed(&train(&out, &[]));
    assert!(stdout.contains("Total optimization steps = 6"), "{stdout}");
    assert!(stdout.contains("***** train metrics *****"), "{stdout}");
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

#[test]
fn a_resumed_run_ends_as_one_that_was_not_interrupted() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, resumed) = (dir.path().join("whole"), dir.path().join("resumed"));
    succeed(&train(&whole, &[]));
    succeed(&train(&resumed, &[]));
    // As if it had been killed after the second checkpoint.
    fs::remove_dir_all(resumed.join("checkpoint-6")).unwrap();
    let again = train(&resumed, &[]);
    assert!(succeed(&again).contains("Total optimization steps = 6"));
    assert!(String::from_utf8_lossy(&again.stderr).contains("resuming at step 4"));
    let weights = |dir: &Path| fs::read(dir.join("adapter_model.safetensors")).unwrap();
    assert!(weights(&whole) == weights(&resumed), "the weights differ");

    let changed = train(&resumed, &["lora_rank=4"]);
    let stderr = String::from_utf8_lossy(&changed.stderr);
    assert!(!changed.status.success());
    assert!(stderr.contains("lora_rank"), "{stderr}");
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
        ("report_to=tensorboard", "tensorboard"),
    ] {
        let out = dir.path().join("adapter");
        let output = train(&out, &[more]);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{more} was taken");
        assert!(stderr.contains(wanted), "{more}: {stderr}");
        assert!(!out.exists(), "{more}");
    }
}
