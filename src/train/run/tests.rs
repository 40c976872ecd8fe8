//! Where runs begin, and what they find and leave in their output directory.

use std::fs;

use super::*;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// The arguments of a short run of a tiny model into `output_dir`.
fn arguments(output_dir: &Path, more: &[&str]) -> TrainArgs {
    let mut arguments = vec![
        format!("model_name_or_path={ROOT}/tests/fixtures/tiny-qwen2"),
        format!("dataset_dir={ROOT}/data"),
        format!("output_dir={}", output_dir.display()),
    ];
    let words = "dataset=persona template=qwen max_samples=4 per_device_train_batch_size=2 \
        cutoff_len=64 lora_rank=2 max_steps=2 save_steps=1";
    arguments.extend(words.split_whitespace().map(str::to_owned));
    arguments.extend(more.iter().map(|&word| word.to_owned()));
    TrainArgs { arguments }
}

fn config(output_dir: &Path, more: &[&str]) -> TrainConfig {
    arguments(output_dir, more).config(1).unwrap()
}

/// Makes empty checkpoints of these updates.
fn make_checkpoints(output_dir: &Path, steps: &[u64]) {
    for step in steps {
        fs::create_dir_all(output_dir.join(format!("checkpoint-{step}"))).unwrap();
    }
}

/// Returns where a run begins, and the names of the checkpoints that it removes.
fn start(output_dir: &Path, more: &[&str]) -> anyhow::Result<(Start, Vec<String>)> {
    let config = config(output_dir, more);
    let start = choose_start(&config, None, 9)?;
    let removed = replaced(&config.output, &start);
    let name = |dir: &PathBuf| dir.file_name().unwrap().to_string_lossy().into_owned();
    Ok((start, removed.iter().map(name).collect()))
}

fn error(output_dir: &Path, more: &[&str]) -> String {
    format!("{:#}", start(output_dir, more).unwrap_err())
}

#[test]
fn resume_true_goes_on_from_the_newest_checkpoint_whatever_overwrite_says() {
    let dir = tempfile::tempdir().unwrap();
    make_checkpoints(dir.path(), &[9, 10]);
    let newest = Start::Checkpoint(dir.path().join("checkpoint-10"));
    for word in ["true", "True", "yes"] {
        for overwrite in ["true", "false"] {
            let more = [
                &*format!("resume_from_checkpoint={word}"),
                &*format!("overwrite_output_dir={overwrite}"),
            ];
            let found = start(dir.path(), &more).unwrap();
            assert_eq!(found, (newest.clone(), Vec::new()), "{more:?}");
        }
    }
}

#[test]
fn resume_true_without_a_checkpoint_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    for more in [&[][..], &["overwrite_output_dir=true"]] {
        let more = [&["resume_from_checkpoint=true"], more].concat();
        let text = error(dir.path(), &more);
        assert!(
            text.contains("resume_from_checkpoint is true, but output_dir"),
            "{text}"
        );
        assert!(text.contains(&dir.path().display().to_string()), "{text}");
    }
}

#[test]
fn resume_false_starts_anew_and_removes_checkpoints_only_with_overwrite() {
    let dir = tempfile::tempdir().unwrap();
    let empty = start(dir.path(), &["resume_from_checkpoint=false"]).unwrap();
    assert_eq!(empty, (Start::Fresh, Vec::new()));
    make_checkpoints(dir.path(), &[1, 2]);
    let text = error(dir.path(), &["resume_from_checkpoint=false"]);
    assert!(
        text.contains("already exists and is not empty") && text.contains("checkpoint-2 is there"),
        "{text}"
    );
    let more = ["resume_from_checkpoint=false", "overwrite_output_dir=true"];
    let removed = ["checkpoint-1", "checkpoint-2"].map(str::to_owned).to_vec();
    assert_eq!(start(dir.path(), &more).unwrap(), (Start::Fresh, removed));
}

#[test]
fn without_the_key_a_run_goes_on_unless_it_overwrites() {
    let dir = tempfile::tempdir().unwrap();
    make_checkpoints(dir.path(), &[3]);
    let checkpoint = Start::Checkpoint(dir.path().join("checkpoint-3"));
    assert_eq!(start(dir.path(), &[]).unwrap(), (checkpoint, Vec::new()));
    let removed = vec!["checkpoint-3".to_owned()];
    assert_eq!(
        start(dir.path(), &["overwrite_output_dir=true"]).unwrap(),
        (Start::Fresh, removed)
    );
    // A path wins, and what it names may lie in the directory that is overwritten.
    let more = [
        "overwrite_output_dir=true",
        "resume_from_checkpoint=some/where",
    ];
    assert_eq!(
        start(dir.path(), &more).unwrap(),
        (Start::Checkpoint("some/where".into()), Vec::new())
    );
}

#[test]
fn resuming_with_overwrite_keeps_the_checkpoints() {
    let dir = tempfile::tempdir().unwrap();
    run(&arguments(dir.path(), &[])).unwrap();
    fs::remove_dir_all(dir.path().join("checkpoint-2")).unwrap();
    let marker = dir.path().join("checkpoint-1/marker");
    fs::write(&marker, "").unwrap();
    let more = ["resume_from_checkpoint=true", "overwrite_output_dir=true"];
    run(&arguments(dir.path(), &more)).unwrap();
    assert!(marker.is_file(), "checkpoint-1 was replaced");
    assert!(dir.path().join("checkpoint-2").is_dir());
    // The same without the key removes what was there.
    run(&arguments(dir.path(), &["overwrite_output_dir=true"])).unwrap();
    assert!(!marker.exists());
}

/// Settings that use nothing but the cache in `dir`.
fn offline_hub(dir: &Path) -> HubOptions {
    HubOptions::from_vars(|name| match name {
        "HF_HUB_CACHE" => Some(dir.to_string_lossy().into_owned()),
        "HF_HUB_OFFLINE" => Some("1".to_owned()),
        _ => None,
    })
}

#[test]
fn the_adapter_to_go_on_from_may_be_a_hub_id_or_a_path() {
    let dir = tempfile::tempdir().unwrap();
    let trained = dir.path().join("trained");
    run(&arguments(&trained, &["max_steps=1"])).unwrap();
    let cache = dir.path().join("cache");
    let repo = cache.join("models--me--adapter");
    let snapshot = repo.join("snapshots/0123");
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir_all(repo.join("refs")).unwrap();
    fs::write(repo.join("refs/main"), "0123").unwrap();
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        fs::copy(trained.join(name), snapshot.join(name)).unwrap();
    }
    let path = trained.to_string_lossy().into_owned();
    for (specs, place) in [
        ("me/adapter".to_owned(), &snapshot),
        (format!("{path},me/adapter"), &snapshot),
        (format!("me/adapter,{path}"), &trained),
    ] {
        let config = config(
            &dir.path().join("next"),
            &[&format!("adapter_name_or_path={specs}")],
        );
        let adapter = open(&config, offline_hub(&cache)).unwrap().adapter;
        let found = adapter.unwrap().dir().to_owned();
        assert_eq!(&found, place, "{specs}");
        let start = choose_start(&config, Some(found), 9).unwrap();
        assert_eq!(start, Start::Adapter(place.clone()));
    }
    // A path is opened without a cache; an id that is in none is named.
    let opened = |spec: &str| {
        let more = [&*format!("adapter_name_or_path={spec}")];
        let config = config(&dir.path().join("next"), &more);
        open(&config, offline_hub(&dir.path().join("empty")))
    };
    assert!(opened(&path).unwrap().adapter.is_some());
    let error = opened("me/adapter").err().unwrap();
    assert!(format!("{error:#}").contains("open adapter_name_or_path me/adapter"));
    // With a new adapter there is none to go on from.
    let more = [
        &*format!("adapter_name_or_path={path}"),
        "create_new_adapter=1",
    ];
    let merged = config(&dir.path().join("next"), &more);
    assert!(
        open(&merged, offline_hub(&cache))
            .unwrap()
            .adapter
            .is_none()
    );
}

#[test]
fn a_run_that_goes_on_from_an_adapter_trains_that_adapter() {
    let dir = tempfile::tempdir().unwrap();
    let (first, second) = (dir.path().join("first"), dir.path().join("second"));
    let options = [
        "max_steps=1",
        "lora_rank=3",
        "lora_alpha=12",
        "lora_dropout=0.1",
        "lora_target=q_proj,v_proj",
        "additional_target=norm",
        "use_rslora=true",
        "use_dora=true",
    ];
    run(&arguments(&first, &options)).unwrap();
    // Without a learning rate the result is what the run began with.
    let from = format!("adapter_name_or_path={}", first.display());
    let more = ["max_steps=1", "learning_rate=0", &from];
    run(&arguments(&second, &more)).unwrap();
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        let content = |dir: &Path| fs::read(dir.join(name)).unwrap();
        assert!(content(&first) == content(&second), "{name} differs");
    }
}
