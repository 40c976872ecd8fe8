//! `infold merge` through the binary: what it writes, what it refuses, what a kill leaves behind.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

use infold::engine::Engine;
use infold::text::{AddSpecialTokens, Tokenizer};
use infold::weights::{Adapter, Checkpoint, MergeOptions, MergedCheckpoint};
use serde_json::Value;

use crate::tiny_engine::{self, fixtures};

fn infold(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_infold"))
        .args(arguments)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap()
}

fn succeed(arguments: &[&str]) -> String {
    let output = infold(arguments);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {stderr}");
    String::from_utf8(output.stdout).unwrap()
}

fn fail(arguments: &[&str]) -> String {
    let output = infold(arguments);
    assert!(!output.status.success(), "{arguments:?} succeeded");
    String::from_utf8(output.stderr).unwrap()
}

fn base(name: &str) -> PathBuf {
    fixtures().join(name)
}

fn adapter(case: &str) -> PathBuf {
    fixtures().join("adapters").join(case).join("adapter")
}

/// Every file below a directory, also hidden ones.
fn snapshot(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(snapshot(&path));
        } else {
            files.insert(
                path.strip_prefix(dir).unwrap().to_owned(),
                fs::read(&path).unwrap(),
            );
        }
    }
    files
}

fn cases() -> Vec<Value> {
    let text = fs::read(fixtures().join("adapters/cases.json")).unwrap();
    let json: Value = serde_json::from_slice(&text).unwrap();
    json["cases"].as_array().unwrap().clone()
}

fn golden_sha256(case: &str) -> String {
    let case = cases()
        .into_iter()
        .find(|found| found["case"] == case)
        .unwrap();
    case["model_safetensors_sha256"]
        .as_str()
        .unwrap()
        .to_owned()
}

fn report(dir: &Path) -> Value {
    serde_json::from_slice(&fs::read(dir.join("merge_report.json")).unwrap()).unwrap()
}

#[test]
fn the_example_of_the_readme_merges_what_peft_merges() {
    let readme =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap();
    let line = readme
        .lines()
        .find(|line| line.starts_with("target/release/infold merge --model tests/fixtures"))
        .unwrap();
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("merged");
    let mut arguments: Vec<&str> = line.split_whitespace().skip(1).collect();
    *arguments.last_mut().unwrap() = output.to_str().unwrap();
    let table = succeed(&arguments);
    assert!(
        table.contains("q_proj") && table.contains("tensors merged"),
        "{table}"
    );
    let report = report(&output);
    let weights = &report["files"][0];
    assert_eq!(weights["name"], "model.safetensors");
    assert_eq!(weights["sha256"], golden_sha256("all_linear_bf16"));
    assert_eq!(
        fs::read(output.join("config.json")).unwrap(),
        fs::read(base("tiny-qwen2-bf16").join("config.json")).unwrap()
    );
}

#[test]
fn a_gguf_file_becomes_a_directory_with_the_weights_and_tokens_of_its_origin() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    for name in ["tiny-qwen2", "tiny-llama"] {
        let origin = base(name);
        let (gguf, again) = (
            path(&format!("{name}.gguf")),
            path(&format!("{name}-again")),
        );
        succeed(&[
            "merge",
            "--model",
            origin.to_str().unwrap(),
            "--output",
            &gguf,
            "--gguf",
            "f32",
            "--gguf-only",
        ]);
        let file = fs::read_dir(&gguf)
            .unwrap()
            .map(|entry| entry.unwrap().path());
        let file = file
            .into_iter()
            .find(|path| path.extension().is_some_and(|end| end == "gguf"));
        let file = file.unwrap().to_str().unwrap().to_owned();
        let refused = fail(&[
            "merge", "--model", &file, "--output", &again, "--gguf", "f16",
        ]);
        assert!(
            refused.contains("write it as a directory first"),
            "{refused}"
        );
        let written = succeed(&[
            "merge", "--model", &file, "--output", &again, "--dtype", "float32",
        ]);
        assert!(written.contains("F32"), "{written}");

        let (before, after) = (
            Checkpoint::open(&origin).unwrap(),
            Checkpoint::open(Path::new(&again)).unwrap(),
        );
        assert!(before.names().eq(after.names()));
        for tensor in before.names() {
            let values =
                |checkpoint: &Checkpoint| checkpoint.tensor(tensor).unwrap().to_f32().unwrap();
            assert!(values(&before) == values(&after), "{name}: {tensor}");
        }
        let tokens = |dir: &Path| {
            let tokenizer = Tokenizer::from_dir(dir).unwrap();
            let text = "<|im_start|>user\nthe 12 北京<|im_end|>\n";
            tokenizer.encode(text, AddSpecialTokens::Yes).unwrap()
        };
        assert_eq!(tokens(&origin), tokens(Path::new(&again)));
    }
}

#[test]
fn a_llamafactory_file_is_read_and_the_result_checks() {
    let dir = tempfile::tempdir().unwrap();
    let yaml = dir.path().join("merge.yaml");
    let text = format!(
        "model_name_or_path: {}\nadapter_name_or_path: {}\ntemplate: qwen\ntrust_remote_code: true\n\
         export_dir: {}\nexport_size: 5\nexport_device: gpu\nexport_legacy_format: false\n",
        base("tiny-qwen2").display(),
        adapter("lm_head_lora_tied").display(),
        dir.path().join("out").display()
    );
    fs::write(&yaml, text).unwrap();
    let yaml = yaml.to_str().unwrap();
    let plan = succeed(&["export", yaml, "max_shard_size=150KB", "dry_run=true"]);
    assert!(plan.contains("model-00001-of-000"), "{plan}");
    assert!(!dir.path().join("out").exists());

    succeed(&["export", yaml, "max_shard_size=150KB"]);
    let out = dir.path().join("out");
    let config: Value =
        serde_json::from_slice(&fs::read(out.join("config.json")).unwrap()).unwrap();
    assert_eq!(config["tie_word_embeddings"], false);
    assert!(out.join("model.safetensors.index.json").exists());
    assert!(out.join("chat_template.jinja").exists());
    let agrees = succeed(&["merge", yaml, "max_shard_size=150KB", "--check"]);
    assert!(agrees.contains("is what this merge writes"), "{agrees}");

    // One bit in the middle of a tensor.
    let shard = out.join("model-00002-of-00005.safetensors");
    let mut bytes = fs::read(&shard).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&shard, bytes).unwrap();
    let error = fail(&["merge", yaml, "max_shard_size=150KB", "--check"]);
    assert!(error.contains("differs first in row"), "{error}");
}

#[test]
fn the_same_inputs_give_the_same_bytes_with_any_number_of_threads() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, threads: &str| {
        let output = dir.path().join(name);
        let status = Command::new(env!("CARGO_BIN_EXE_infold"))
            .args(["merge", "--model"])
            .arg(base("tiny-qwen2-bf16"))
            .arg("--adapter")
            .arg(adapter("dora_bf16"))
            .arg("--output")
            .arg(&output)
            .env("RAYON_NUM_THREADS", threads)
            .stdout(Stdio::null())
            .status()
            .unwrap();
        assert!(status.success());
        snapshot(&output)
    };
    assert!(write("one", "1") == write("four", "4"));
}

#[test]
fn nothing_is_written_when_something_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("out");
    let output = output.to_str().unwrap();
    let model = base("tiny-qwen2-bf16");
    let model = model.to_str().unwrap();
    let good = adapter("all_linear_bf16");
    let good = good.to_str().unwrap();
    let overflow = adapter("refused_f16_overflow");
    let f16 = base("tiny-qwen2-f16");
    let (overflow, f16) = (overflow.to_str().unwrap(), f16.to_str().unwrap());
    for ([model, adapter, output], more, wanted) in [
        ([model, good, good], &[][..], "choose another --output"),
        ([model, good, model], &[], "choose another --output"),
        ([model, "/no/adapter", output], &[], "/no/adapter"),
        (["/no/model", good, output], &[], "/no/model"),
        (
            [model, good, output],
            &["export_dri=x"],
            "did you mean \"export_dir\"",
        ),
        ([model, good, output], &["--template", "qwem"], "qwem"),
        ([f16, overflow, output], &[], "too large for F16"),
    ] {
        let mut line = vec!["merge", "--model", model, "--adapter", adapter];
        line.extend(["--output", output]);
        line.extend(more);
        let error = fail(&line);
        assert!(error.contains(wanted), "{error}");
        assert!(snapshot(dir.path()).is_empty(), "{line:?}");
    }
}

#[test]
fn damaged_files_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("out");
    let copy = |from: &Path, name: &str| {
        let to = dir.path().join(name);
        fs::create_dir(&to).unwrap();
        for (file, content) in snapshot(from) {
            fs::write(to.join(file), content).unwrap();
        }
        to
    };
    let model = copy(&base("tiny-qwen2-bf16"), "base");
    let lora = copy(&adapter("all_linear_bf16"), "lora");
    let merge = || {
        let output = output.to_str().unwrap();
        let (model, lora) = (model.to_str().unwrap(), lora.to_str().unwrap());
        fail(&[
            "merge",
            "--model",
            model,
            "--adapter",
            lora,
            "--output",
            output,
        ])
    };
    for file in [
        model.join("model.safetensors"),
        lora.join("adapter_model.safetensors"),
        lora.join("adapter_config.json"),
        model.join("config.json"),
    ] {
        let whole = fs::read(&file).unwrap();
        for damaged in [&whole[..whole.len() * 2 / 3], &whole[..5], b""] {
            fs::write(&file, damaged).unwrap();
            let error = merge();
            assert!(error.contains(file.to_str().unwrap()), "{error}");
            assert!(!output.exists());
        }
        fs::write(&file, whole).unwrap();
    }
}

#[test]
fn a_full_disk_is_told_and_leaves_nothing() {
    // A limit on the size of files stands for the disk: the write fails in the same place.
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("out");
    let line = format!(
        "trap '' XFSZ; ulimit -f 100; exec {} merge --model {} --adapter {} --output {}",
        env!("CARGO_BIN_EXE_infold"),
        base("tiny-qwen2-untied").display(),
        adapter("all_linear_f32").display(),
        output.display()
    );
    let result = Command::new("bash").args(["-c", &line]).output().unwrap();
    let error = String::from_utf8_lossy(&result.stderr);
    assert!(!result.status.success());
    assert!(
        error.contains("cannot write") && error.contains("model.safetensors"),
        "{error}"
    );
    assert!(error.contains("is as it was before"), "{error}");
    assert!(snapshot(dir.path()).is_empty());
}

/// Merges into a tmpfs of the given mount options, where this user may mount one.
#[cfg(target_os = "linux")]
fn merge_into_tmpfs(options: &str) -> Option<String> {
    let dir = tempfile::tempdir().unwrap();
    let mount = format!("mount -t tmpfs -o {options} tmpfs {}", dir.path().display());
    let run = |script: &str| {
        let mut shell = Command::new("unshare");
        let shell = shell.args(["--map-root-user", "--mount", "sh", "-c", script]);
        // No such program, or no such right.
        shell.output().ok()
    };
    if !run(&mount)?.status.success() {
        return None;
    }
    let script = format!(
        "{mount} && ! {} merge --model {} --adapter {} --output {output}/out && ls -A {output} >&2",
        env!("CARGO_BIN_EXE_infold"),
        base("tiny-qwen2-untied").display(),
        adapter("all_linear_f32").display(),
        output = dir.path().display(),
    );
    let result = run(&script)?;
    let error = String::from_utf8(result.stderr).unwrap();
    assert!(result.status.success(), "the merge succeeded: {error}");
    Some(error)
}

#[cfg(target_os = "linux")]
#[test]
fn a_tmpfs_that_is_too_small_is_told_how_much_is_needed() {
    let Some(error) = merge_into_tmpfs("size=1m") else {
        return;
    };
    let error = error.trim();
    assert!(error.contains("/out needs 17."), "{error}");
    assert!(error.ends_with("its disk has 1.0 MB free"), "{error}");
}

#[cfg(target_os = "linux")]
#[test]
fn a_tmpfs_that_fills_up_on_the_way_is_left_empty() {
    // Room for the root, the directory aside, its lock and the weights, not for the next file.
    let Some(error) = merge_into_tmpfs("size=64m,nr_inodes=4") else {
        return;
    };
    let error = error.trim();
    assert!(
        error.contains("is as it was before; it needs 17."),
        "{error}"
    );
    assert!(error.contains("Modelfile"), "{error}");
    assert!(
        error.ends_with("No space left on device (os error 28)"),
        "{error}"
    );
}

#[test]
fn a_kill_at_any_moment_leaves_the_old_output_or_the_new_one() {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("out");
    let start = |max_shard_size: &str| {
        Command::new(env!("CARGO_BIN_EXE_infold"))
            .args([
                "merge",
                "--overwrite",
                "--max-shard-size",
                max_shard_size,
                "--model",
            ])
            .arg(base("tiny-qwen2-untied"))
            .arg("--adapter")
            .arg(adapter("all_linear_f32"))
            .arg("--output")
            .arg(&output)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap()
    };
    let time = std::time::Instant::now();
    assert!(start("5GB").wait().unwrap().success());
    let whole_run = time.elapsed();
    let one_file = snapshot(&output);
    assert!(start("20KB").wait().unwrap().success());
    let many_files = snapshot(&output);
    assert_ne!(one_file.len(), many_files.len());

    let inputs = snapshot(&base("tiny-qwen2-untied"));
    let (mut killed, mut finished) = (0, 0);
    for step in 0..24 {
        let mut process = start(if step % 2 == 0 { "5GB" } else { "20KB" });
        // Each time another part of a whole run, which no signal of the program could name.
        let deadline = std::time::Instant::now() + whole_run * (step + 1) / 20;
        while std::time::Instant::now() < deadline && process.try_wait().unwrap().is_none() {
            std::hint::spin_loop();
        }
        process.kill().unwrap();
        if process.wait().unwrap().success() {
            finished += 1;
        } else {
            killed += 1;
        }
        let found = snapshot(&output);
        assert!(
            found == one_file || found == many_files,
            "half a model after step {step}"
        );
    }
    assert!(killed > 0, "{finished} runs finished, none was killed");
    assert!(snapshot(&base("tiny-qwen2-untied")) == inputs);
    // The next whole run tidies up.
    assert!(start("5GB").wait().unwrap().success());
    let left: Vec<_> = fs::read_dir(dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(left, ["out"]);
}

#[cfg(unix)]
#[test]
fn a_read_only_base_behind_links_is_copied_not_linked() {
    use std::os::unix::fs::{PermissionsExt, symlink};

    let dir = tempfile::tempdir().unwrap();
    let blobs = dir.path().join("blobs");
    let snapshot_dir = dir.path().join("models--org--tiny/snapshots/abc");
    fs::create_dir_all(&blobs).unwrap();
    fs::create_dir_all(&snapshot_dir).unwrap();
    for (i, (file, content)) in snapshot(&base("tiny-qwen2-untied")).into_iter().enumerate() {
        let blob = blobs.join(i.to_string());
        fs::write(&blob, content).unwrap();
        fs::set_permissions(&blob, fs::Permissions::from_mode(0o444)).unwrap();
        symlink(&blob, snapshot_dir.join(file)).unwrap();
    }
    let output = dir.path().join("out");
    succeed(&[
        "merge",
        "--model",
        snapshot_dir.to_str().unwrap(),
        "--adapter",
        adapter("all_linear_f32").to_str().unwrap(),
        "--output",
        output.to_str().unwrap(),
    ]);
    for entry in fs::read_dir(&output).unwrap() {
        assert!(entry.unwrap().file_type().unwrap().is_file());
    }
    assert_eq!(
        report(&output)["files"][0]["sha256"],
        golden_sha256("all_linear_f32")
    );
}

#[test]
fn a_server_of_base_and_adapter_answers_as_the_merged_directory() {
    for (case, model) in [
        ("lm_head_lora_tied", "tiny-qwen2"),
        ("all_linear_bf16", "tiny-qwen2-bf16"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let output = dir.path().join("out");
        succeed(&[
            "merge",
            "--model",
            base(model).to_str().unwrap(),
            "--adapter",
            adapter(case).to_str().unwrap(),
            "--output",
            output.to_str().unwrap(),
        ]);
        let options = tiny_engine::options();
        let from_directory = tiny_engine::start(&output, &options);
        let live = MergedCheckpoint::plan(
            Arc::new(Checkpoint::open(&base(model)).unwrap()),
            vec![(Adapter::open(&adapter(case), None).unwrap(), 1.0)],
            MergeOptions::default(),
        )
        .unwrap();
        let live = Engine::start(Arc::new(live), &options).unwrap();
        let plain = tiny_engine::start(&base(model), &options);
        let prompt = [5, 17, 301, 44, 260, 9, 128];
        let answers = [&from_directory, &live, &plain]
            .map(|engine| tiny_engine::run(engine, &prompt, tiny_engine::greedy(8)));
        assert_eq!(answers[0], answers[1], "{case}");
        assert_ne!(answers[0], answers[2], "{case}");
    }
}

/// The logits after the prompt that base and live adapter gave in PyTorch.
fn live_logits(case: &str) -> Option<Vec<f32>> {
    let path = fixtures()
        .join("adapters")
        .join(case)
        .join("live_logits.safetensors");
    let bytes = fs::read(path).ok()?;
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let name = *file.names().first().unwrap();
    let tensor = file.tensor(name).unwrap();
    let values = tensor
        .data()
        .as_chunks()
        .0
        .iter()
        .map(|b| f32::from_le_bytes(*b));
    let vocab_size = tensor.shape()[1];
    Some(values.skip(vocab_size).collect())
}

#[test]
fn the_merged_model_answers_as_the_live_adapter_in_pytorch() {
    let prompt = [5, 17, 301, 44, 260, 9, 128];
    let mut compared = 0;
    for case in cases() {
        let name = case["case"].as_str().unwrap();
        // There is no engine for GPT-2 here.
        let Some(logits) = live_logits(name).filter(|_| case["base"] != "tiny-gpt2") else {
            continue;
        };
        let lora = fixtures()
            .join("adapters")
            .join(case["adapters"][0]["dir"].as_str().unwrap());
        let merged = MergedCheckpoint::plan(
            Arc::new(Checkpoint::open(&base(case["base"].as_str().unwrap())).unwrap()),
            vec![(Adapter::open(&lora, None).unwrap(), 1.0)],
            MergeOptions::default(),
        )
        .unwrap();
        let engine = Engine::start(Arc::new(merged), &tiny_engine::options()).unwrap();
        let answer = tiny_engine::run(&engine, &prompt, tiny_engine::greedy(1));
        let sum: f64 = logits.iter().map(|logit| f64::from(*logit).exp()).sum();
        let (found, wanted): (Vec<f32>, Vec<f32>) = (answer.logprobs[0].top.iter())
            .map(|(token, logprob)| (*logprob, logits[*token as usize] - sum.ln() as f32))
            .unzip();
        tiny_engine::assert_close(name, &found, &wanted, 1e-4);
        compared += 1;
    }
    assert!(compared > 15, "{compared}");
}
