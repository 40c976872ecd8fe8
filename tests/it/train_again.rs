//! Training runs that are started again: resumed, finished, changed, killed.

use std::ffi::OsString;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Stdio;

use serde_json::Value;

use crate::train::{contents, json, succeed, train, training};

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

    // The same micro-batches an update, by two ranks.
    fs::remove_dir_all(resumed.join("checkpoint-6")).unwrap();
    let more = ["num_ranks=2", "gradient_accumulation_steps=1"];
    let again = train(&resumed, &more);
    assert!(succeed(&again).contains("Total optimization steps = 6"));
}

#[test]
fn a_run_that_is_not_the_same_is_refused_with_what_differs() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("adapter");
    succeed(&train(&out, &["max_steps=2"]));
    let rows: Vec<Value> = (0..24)
        .map(|row| serde_json::json!({"instruction": "Count.", "output": row.to_string()}))
        .collect();
    let other_data = dir.path().join("rows.json");
    fs::write(&other_data, serde_json::to_string(&rows).unwrap()).unwrap();
    let dataset = format!("dataset={}", other_data.display());
    let warmup_lr = dir.path().join("ds.json");
    let text = r#"{"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}}"#;
    fs::write(&warmup_lr, text).unwrap();
    let deepspeed = format!("deepspeed={}", warmup_lr.display());
    for (more, wanted) in [
        ("lora_rank=4", "lora_rank was 8, is 4"),
        // Both change the curve of the learning rate.
        ("max_steps=3", "max_steps was 2, is 3"),
        ("warmup_ratio=0.5", "warmup_ratio was null, is 0.5"),
        (
            &deepspeed,
            "lr_scheduler_type was \"linear\", is \"WarmupLR\"",
        ),
        (
            &dataset,
            "another configuration: the training examples are others",
        ),
        (
            "dataloader_drop_last=true",
            "dataloader_drop_last was null, is true",
        ),
        (
            "gradient_accumulation_steps=4",
            "gradient_accumulation_steps was 2, is 4",
        ),
    ] {
        let changed = train(&out, &["max_steps=2", more]);
        let stderr = String::from_utf8_lossy(&changed.stderr);
        assert!(!changed.status.success(), "{more} was taken");
        assert!(stderr.contains(wanted), "{more}: {stderr}");
    }
}

#[test]
fn a_finished_run_that_is_started_again_keeps_its_results() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("adapter");
    succeed(&train(&out, &[]));
    let log = fs::read_to_string(out.join("trainer_log.jsonl")).unwrap();
    let last: Value = serde_json::from_str(log.lines().last().unwrap()).unwrap();
    // As LLaMA-Factory, which notes the end too.
    assert_eq!((log.lines().count(), &last["loss"]), (7, &Value::Null));
    assert_eq!(last["current_steps"], 6);
    let results = contents(&out);
    let stdout = succeed(&train(&out, &[]));
    assert!(
        stdout.contains("nothing was left to do: step 6"),
        "{stdout}"
    );
    assert!(contents(&out) == results, "a file has changed");
    // What is missing of them is written.
    fs::remove_file(out.join("adapter_model.safetensors")).unwrap();
    succeed(&train(&out, &[]));
    let name = "adapter_model.safetensors";
    assert!(contents(&out)[&OsString::from(name)] == results[&OsString::from(name)]);
}

#[test]
fn a_kill_loses_the_updates_since_the_last_checkpoint_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, killed) = (dir.path().join("whole"), dir.path().join("killed"));
    let more = ["num_train_epochs=4", "save_steps=1"];
    succeed(&train(&whole, &more));
    // Killed again and again, always after the second checkpoint of a process, until one ends.
    let mut num_kills = 0;
    loop {
        let mut command = training(&killed, &more);
        let mut process = command
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let lines = BufReader::new(process.stdout.take().unwrap()).lines();
        let saved = lines
            .map_while(Result::ok)
            .filter(|line| line.starts_with("Saving model checkpoint"));
        if saved.take(2).count() < 2 {
            assert!(process.wait().unwrap().success());
            break;
        }
        process.kill().unwrap();
        num_kills += usize::from(!process.wait().unwrap().success());
    }
    assert!(num_kills >= 2, "{num_kills} processes were killed");
    let weights = |dir: &Path| fs::read(dir.join("adapter_model.safetensors")).unwrap();
    assert!(weights(&whole) == weights(&killed), "the weights differ");
    let history = |dir: &Path| json(&dir.join("trainer_state.json"))["log_history"].clone();
    let losses = |dir: &Path| -> Vec<Value> {
        let entries = history(dir).as_array().unwrap().clone();
        entries.iter().map(|entry| entry["loss"].clone()).collect()
    };
    assert_eq!(losses(&whole), losses(&killed));
}

#[test]
fn what_an_earlier_run_left_goes_only_when_the_next_one_begins() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("adapter");
    succeed(&train(&out, &[]));
    let names = || -> Vec<String> {
        let entries = fs::read_dir(&out).unwrap().map(Result::unwrap);
        let names = entries.map(|entry| entry.file_name().into_string().unwrap());
        let mut names: Vec<String> = names
            .filter(|name| name.starts_with("checkpoint-"))
            .collect();
        names.sort();
        names
    };
    let from = format!(
        "adapter_name_or_path={}",
        out.join("checkpoint-4").display()
    );
    let more = ["overwrite_output_dir=true", "max_steps=1", &from];
    // The tensors of its adapter do not fit its configuration, so nothing begins.
    let adapter_config = out.join("checkpoint-4/adapter_config.json");
    let text = fs::read_to_string(&adapter_config).unwrap();
    fs::write(&adapter_config, text.replace("\"r\": 8", "\"r\": 4")).unwrap();
    let output = train(&out, &more);
    assert!(!output.status.success());
    assert_eq!(names(), ["checkpoint-2", "checkpoint-4", "checkpoint-6"]);
    fs::write(&adapter_config, text).unwrap();
    // Two ranks start from a checkpoint that is then removed.
    let more = [&more[..], &["num_ranks=2"]].concat();
    succeed(&train(&out, &more));
    assert_eq!(names(), ["checkpoint-1"]);
    // Without a checkpoint an adapter is not overwritten unasked.
    fs::remove_dir_all(out.join("checkpoint-1")).unwrap();
    let before = contents(&out);
    let output = train(&out, &[]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    assert!(
        stderr.contains("Output directory already exists and is not empty"),
        "{stderr}"
    );
    assert!(contents(&out) == before, "a file has changed");
}

#[test]
fn checkpoints_that_cannot_be_resumed_say_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("adapter");
    succeed(&train(&out, &["max_steps=2"]));
    let moments = out.join("checkpoint-2/optimizer.safetensors");
    let content = fs::read(&moments).unwrap();
    fs::write(&moments, &content[..1000]).unwrap();
    // As of Hugging Face's trainer.
    let foreign = out.join("checkpoint-9");
    fs::create_dir(&foreign).unwrap();
    fs::write(foreign.join("optimizer.pt"), "").unwrap();
    for (checkpoint, wanted) in [
        (
            "checkpoint-2",
            "checkpoint-2: the run goes on at the checkpoint before it",
        ),
        (
            "checkpoint-9",
            "manifest.json is missing, so that this is no checkpoint of infold",
        ),
        ("", "manifest.json is missing"),
    ] {
        let from = out.join(checkpoint);
        let from = format!("resume_from_checkpoint={}", from.display());
        let output = train(&out, &["max_steps=2", &from]);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{checkpoint} was taken");
        assert!(stderr.contains(wanted), "{checkpoint}: {stderr}");
    }
}
