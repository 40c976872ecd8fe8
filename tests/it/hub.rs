//! `resolve_model` and `resolve_adapter` against the hub of [`super::fake_hub`].

use std::net::TcpListener;
use std::path::Path;
use std::sync::Arc;

use infold::weights::{
    Adapter, Checkpoint, HubOptions, Network, WeightsError, open_with_adapters, resolve_adapter,
    resolve_model,
};
use serde_json::json;

use crate::fake_hub::{FakeHub, Fault};

/// A safetensors file with one f32 vector of `elements` ones.
fn weights(name: &str, elements: usize) -> Vec<u8> {
    let data: Vec<u8> = std::iter::repeat_n(1_f32.to_le_bytes(), elements)
        .flatten()
        .collect();
    let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![elements], &data)
        .expect("size and shape agree");
    safetensors::serialize([(name, view)], None).expect("it serialises")
}

fn small_model() -> Vec<(&'static str, Vec<u8>)> {
    vec![
        ("config.json", br#"{"model_type": "qwen2"}"#.to_vec()),
        ("generation_config.json", b"{}".to_vec()),
        ("tokenizer.json", b"{}".to_vec()),
        ("README.md", b"not needed".to_vec()),
        ("pytorch_model.bin", vec![0; 64]),
        ("model.safetensors", weights("w", 1000)),
    ]
}

fn read(path: &Path) -> Vec<u8> {
    std::fs::read(path).expect("it was downloaded")
}

#[test]
fn a_model_is_downloaded_once_and_then_found_in_the_cache() {
    let hub = FakeHub::new(&small_model());
    let path = resolve_model("owner/model", &hub.options()).unwrap();
    assert_eq!(Checkpoint::open(&path).unwrap().num_parameters(), 1000);
    assert!(path.join("tokenizer.json").exists());
    for unneeded in ["README.md", "pytorch_model.bin"] {
        assert!(!path.join(unneeded).exists(), "{unneeded}");
    }

    let before = hub.requests().len();
    let offline = HubOptions {
        network: Network::Offline,
        ..hub.options()
    };
    assert_eq!(resolve_model("owner/model", &offline).unwrap(), path);
    assert_eq!(resolve_model("owner/model", &hub.options()).unwrap(), path);
    assert_eq!(hub.requests().len(), before);
}

#[test]
fn a_local_path_wins_over_a_hub_id() {
    let hub = FakeHub::new(&[]);
    let path = hub.cache.path().to_str().unwrap();
    assert_eq!(
        resolve_model(path, &hub.options()).unwrap(),
        hub.cache.path()
    );
    assert!(hub.requests().is_empty());
}

#[test]
fn broken_connections_resume_where_they_broke_off() {
    let model = small_model();
    let hub = FakeHub::new(&model);
    // More failures than retries, but each after some progress.
    hub.fail("model.safetensors", &[Fault::BreakAfter(500); 6]);
    let path = resolve_model("owner/model", &hub.options()).unwrap();
    assert_eq!(read(&path.join("model.safetensors")), model[5].1);
    let starts: Vec<_> = (0..=6)
        .map(|part| format!("bytes={}-", part * 500))
        .collect();
    assert_eq!(hub.ranges_of("model.safetensors"), starts);
}

#[test]
fn a_failure_right_after_resuming_does_not_start_over() {
    let model = small_model();
    let hub = FakeHub::new(&model);
    hub.fail(
        "model.safetensors",
        &[
            Fault::BreakAfter(1500),
            Fault::Status(503),
            Fault::BreakAfter(0),
        ],
    );
    let path = resolve_model("owner/model", &hub.options()).unwrap();
    assert_eq!(read(&path.join("model.safetensors")), model[5].1);
    assert_eq!(
        hub.ranges_of("model.safetensors"),
        ["bytes=0-", "bytes=1500-", "bytes=1500-", "bytes=1500-"]
    );
}

#[test]
fn an_interrupted_program_resumes_in_the_next_run() {
    let model = small_model();
    let hub = FakeHub::new(&model);
    hub.fail("model.safetensors", &[Fault::BreakAfter(700)]);
    let impatient = HubOptions {
        max_retries: 0,
        ..hub.options()
    };
    let error = resolve_model("owner/model", &impatient).unwrap_err();
    assert!(
        matches!(error, WeightsError::HubUnreachable { ref what, .. } if what == "model.safetensors")
    );
    let offline = HubOptions {
        network: Network::Offline,
        ..hub.options()
    };
    let error = resolve_model("owner/model", &offline).unwrap_err();
    assert!(matches!(error, WeightsError::NotCached { .. }), "{error}");

    let path = resolve_model("owner/model", &impatient).unwrap();
    assert_eq!(read(&path.join("model.safetensors")), model[5].1);
    assert_eq!(
        hub.ranges_of("model.safetensors"),
        ["bytes=0-", "bytes=700-"]
    );
}

#[test]
fn a_useless_part_on_disk_is_thrown_away() {
    let model = small_model();
    for length in [model[5].1.len(), model[5].1.len() + 10] {
        let hub = FakeHub::new(&model);
        let blobs = hub.cache.path().join("models--owner--model/blobs");
        std::fs::create_dir_all(&blobs).unwrap();
        std::fs::write(blobs.join("model.part"), vec![7; length]).unwrap();
        // hf-hub names the part after the ETag up to its last dot.
        let path = resolve_model("owner/model", &hub.options()).unwrap();
        assert_eq!(read(&path.join("model.safetensors")), model[5].1);
    }
}

#[test]
fn a_busy_hub_is_asked_again_and_not_forever() {
    let hub = FakeHub::new(&small_model());
    hub.fail("config.json", &[Fault::Status(503), Fault::Status(429)]);
    resolve_model("owner/model", &hub.options()).unwrap();

    let hub = FakeHub::new(&small_model());
    hub.fail("config.json", &[Fault::Status(503); 9]);
    let error = resolve_model("owner/model", &hub.options()).unwrap_err();
    assert!(matches!(error, WeightsError::HubStatus { status: 503, .. }));
    assert!(!error.is_user_error());
    assert_eq!(hub.ranges_of("config.json").len(), 4);
}

#[test]
fn shards_come_from_the_index() {
    let index = json!({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}});
    let mut model = small_model();
    model.pop();
    model.extend([
        (
            "model.safetensors.index.json",
            index.to_string().into_bytes(),
        ),
        ("model-00001-of-00002.safetensors", weights("a", 10)),
        ("model-00002-of-00002.safetensors", weights("b", 20)),
        ("consolidated.safetensors", weights("c", 30)),
    ]);
    let hub = FakeHub::new(&model);
    let path = resolve_model("owner/model@v1.0", &hub.options()).unwrap();
    assert_eq!(Checkpoint::open(&path).unwrap().num_parameters(), 30);
    assert!(!path.join("consolidated.safetensors").exists());
    assert!(hub.requests()[0].contains("/revision/v1.0"));

    std::fs::remove_file(path.join("model-00002-of-00002.safetensors")).unwrap();
    assert_eq!(
        resolve_model("owner/model@v1.0", &hub.options()).unwrap(),
        path
    );
    assert_eq!(Checkpoint::open(&path).unwrap().num_parameters(), 30);
}

#[test]
fn one_of_several_gguf_files_is_named_by_file_or_quantisation() {
    let files = [
        ("sub/big-Q8_0-00001-of-00002.gguf", vec![1; 10]),
        ("sub/big-Q8_0-00002-of-00002.gguf", vec![2; 10]),
        ("small-Q4_K_M.gguf", vec![3; 10]),
    ];
    let hub = FakeHub::new(&files);
    let error = resolve_model("owner/model", &hub.options()).unwrap_err();
    assert!(matches!(error, WeightsError::WhichGguf { ref files, .. } if files.len() == 3));
    let path = resolve_model("owner/model:q4_k_m", &hub.options()).unwrap();
    assert_eq!(read(&path), vec![3; 10]);
    let part = "sub/big-Q8_0-00001-of-00002.gguf";
    let path = resolve_model(&format!("owner/model:{part}"), &hub.options()).unwrap();
    assert!(path.ends_with(part));
    assert_eq!(
        read(&path.with_file_name("big-Q8_0-00002-of-00002.gguf")),
        vec![2; 10]
    );

    let before = hub.requests().len();
    for spec in [
        "owner/model:Q4_K_M",
        "owner/model:sub/big-Q8_0-00001-of-00002.gguf",
    ] {
        resolve_model(spec, &hub.options()).unwrap();
    }
    assert_eq!(hub.requests().len(), before);
}

#[test]
fn closed_models_say_what_a_token_would_do() {
    for status in [401, 403] {
        let hub = FakeHub::new(&small_model());
        hub.state.lock().unwrap().token = Some(("secret".to_owned(), status));
        let error = resolve_model("owner/model", &hub.options()).unwrap_err();
        assert!(error.is_user_error());
        assert!(error.to_string().contains("set HF_TOKEN"), "{error}");
        let with_token = |token: &str| HubOptions {
            token: Some(token.to_owned()),
            ..hub.options()
        };
        let error = resolve_model("owner/model", &with_token("wrong")).unwrap_err();
        assert!(
            error.to_string().contains("accept the model's terms"),
            "{error}"
        );
        resolve_model("owner/model", &with_token("secret")).unwrap();
    }
}

#[test]
fn what_is_not_there_is_named() {
    let hub = FakeHub::new(&[
        ("pytorch_model.bin", vec![0; 8]),
        ("config.json", vec![b'{']),
    ]);
    let error = resolve_model("owner/other", &hub.options()).unwrap_err();
    assert!(matches!(error, WeightsError::HubNotFound { ref repo, .. } if repo == "owner/other"));
    let error = resolve_model("owner/model", &hub.options()).unwrap_err();
    assert!(error.to_string().contains("pickled"), "{error}");
    for spec in [
        "./no/such",
        "model",
        "owner/../model",
        "owner/model@../x",
        "a/b/c",
        "",
    ] {
        let error = resolve_model(spec, &hub.options()).unwrap_err();
        assert!(
            matches!(error, WeightsError::UnknownModel { .. }),
            "{spec}: {error}"
        );
    }

    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let closed = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let options = HubOptions {
        endpoint: closed,
        ..hub.options()
    };
    let error = resolve_model("owner/model", &options).unwrap_err();
    assert!(
        matches!(error, WeightsError::HubUnreachable { .. }),
        "{error}"
    );
}

#[test]
fn a_hub_cannot_write_outside_its_cache() {
    let index = json!({"weight_map": {"a": "../../../../escaped.safetensors"}});
    let mut model = small_model();
    model.pop();
    model.push((
        "model.safetensors.index.json",
        index.to_string().into_bytes(),
    ));
    model.push(("../../../../escaped.safetensors", weights("a", 10)));
    let hub = FakeHub::new(&model);
    assert!(resolve_model("owner/model", &hub.options()).is_err());
    assert!(hub.requests().iter().all(|line| !line.contains("escaped")));
}

#[test]
fn settings_follow_the_environment_of_huggingface_hub() {
    let home = tempfile::tempdir().unwrap();
    std::fs::write(home.path().join("token"), "from-file\n").unwrap();
    let home_text = home.path().to_str().unwrap().to_owned();
    let options = HubOptions::from_vars(|name| match name {
        "HF_HOME" => Some(home_text.clone()),
        "HF_ENDPOINT" => Some("http://mirror/".to_owned()),
        "HF_HUB_OFFLINE" => Some("true".to_owned()),
        "HF_TOKEN" => Some(String::new()),
        _ => None,
    });
    assert_eq!(options.endpoint, "http://mirror");
    assert_eq!(options.cache_dir, home.path().join("hub"));
    assert_eq!(options.token.as_deref(), Some("from-file"));
    assert_eq!(options.network, Network::Offline);

    let options = HubOptions::from_vars(|name| match name {
        "HOME" => Some("/home/u".to_owned()),
        "HF_TOKEN" => Some(" secret ".to_owned()),
        _ => None,
    });
    assert_eq!(
        options.cache_dir,
        Path::new("/home/u/.cache/huggingface/hub")
    );
    assert_eq!(options.token.as_deref(), Some("secret"));
    assert_eq!(options.network, Network::Online);
}

/// The files of a small adapter, under `folder` of a repository that holds more.
fn adapter_files(folder: &str) -> Vec<(String, Vec<u8>)> {
    let dir = crate::tiny_engine::fixtures().join("adapters/all_linear_bf16/adapter");
    let mut files: Vec<_> = ["adapter_config.json", "adapter_model.safetensors"]
        .map(|name| (format!("{folder}{name}"), read(&dir.join(name))))
        .into();
    for name in ["tokenizer.json", "README.md", "optimizer.pt"] {
        files.push((format!("{folder}{name}"), b"{}".to_vec()));
    }
    files
}

#[test]
fn an_adapter_is_downloaded_once_with_its_tokenizer() {
    for folder in [None, Some("checkpoint-10")] {
        let files = adapter_files(&folder.map_or(String::new(), |name| format!("{name}/")));
        let files: Vec<(&str, Vec<u8>)> = (files.iter())
            .map(|(name, content)| (&name[..], content.clone()))
            .collect();
        let hub = FakeHub::new(&files);
        let path = resolve_adapter("owner/model", folder, &hub.options()).unwrap();
        Adapter::open(&path, folder).unwrap();
        let inside = path.join(folder.unwrap_or_default());
        assert!(inside.join("tokenizer.json").exists());
        for unneeded in ["README.md", "optimizer.pt"] {
            assert!(!inside.join(unneeded).exists(), "{unneeded}");
        }

        let before = hub.requests().len();
        let offline = HubOptions {
            network: Network::Offline,
            ..hub.options()
        };
        assert_eq!(
            resolve_adapter("owner/model", folder, &offline).unwrap(),
            path
        );
        assert_eq!(hub.requests().len(), before);
    }
}

#[test]
fn a_repository_without_an_adapter_says_what_is_missing() {
    let pickled = [
        ("adapter_config.json", b"{}".to_vec()),
        ("adapter_model.bin", vec![0; 8]),
    ];
    for (files, folder, wanted) in [
        (&small_model()[..], None, "no adapter_config.json"),
        (&pickled[..], Some("nowhere"), "in which folder"),
        (&pickled[..], None, "pickled"),
    ] {
        let hub = FakeHub::new(files);
        let error = resolve_adapter("owner/model", folder, &hub.options()).unwrap_err();
        assert!(matches!(error, WeightsError::NothingToLoad { .. }));
        assert!(error.to_string().contains(wanted), "{error}");
    }
}

#[test]
fn an_adapter_is_folded_in_by_its_hub_id_whatever_revision_the_model_has() {
    let files = adapter_files("");
    let files: Vec<(&str, Vec<u8>)> = (files.iter())
        .map(|(name, content)| (&name[..], content.clone()))
        .collect();
    let hub = FakeHub::new(&files);
    let options = HubOptions {
        revision: Some("of-the-model".to_owned()),
        ..hub.options()
    };
    let fixtures = crate::tiny_engine::fixtures();
    let base = Arc::new(Checkpoint::open(&fixtures.join("tiny-qwen2-bf16")).unwrap());
    let tensor = |adapters: &[&str]| {
        let adapters: Vec<String> = adapters.iter().map(|&spec| spec.to_owned()).collect();
        let model = open_with_adapters(Arc::clone(&base), &adapters, &options).unwrap();
        let tensor = model.tensor("model.layers.0.self_attn.q_proj.weight");
        tensor.unwrap().data
    };
    let on_disk = fixtures.join("adapters/all_linear_bf16/adapter");
    let from_hub = tensor(&["owner/model"]);
    assert!(from_hub == tensor(&[on_disk.to_str().unwrap()]));
    assert!(from_hub != tensor(&[]));
}

#[test]
fn merge_takes_an_adapter_by_its_hub_id() {
    let files = adapter_files("");
    let files: Vec<(&str, Vec<u8>)> = (files.iter())
        .map(|(name, content)| (&name[..], content.clone()))
        .collect();
    let hub = FakeHub::new(&files);
    let model = crate::tiny_engine::fixtures().join("tiny-qwen2-bf16");
    let output = hub.cache.path().join("out");
    let result = std::process::Command::new(env!("CARGO_BIN_EXE_infold"))
        .args(["merge", "--adapter", "owner/model@main", "--model"])
        .arg(model)
        .arg("--output")
        .arg(&output)
        .env("HF_ENDPOINT", &hub.endpoint)
        .env("HF_HUB_CACHE", hub.cache.path())
        .env_remove("HF_HUB_OFFLINE")
        .env_remove("TRANSFORMERS_OFFLINE")
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&result.stderr);
    assert!(result.status.success(), "{error}");
    assert!(output.join("model.safetensors").exists());
}
