//! Hugging Face directories: what is opened, what is refused and in which words.

use std::path::Path;

use candle_core::quantized::GgmlDType;
use infold::weights::{Checkpoint, Format, TokenizerSource, WeightsError};
use serde_json::json;

use super::{CONFIG, Directory, model_with, raw_safetensors, shard};

#[test]
fn a_directory_gives_its_tensors_as_stored() {
    let file = shard(&[("w", &[3, 4]), ("b", &[5])]);
    let directory = Directory::new(&[
        CONFIG,
        ("generation_config.json", br#"{"top_k": 20}"#),
        ("model.safetensors", &file),
    ]);
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    assert_eq!(checkpoint.format(), Format::Safetensors);
    assert_eq!(checkpoint.config()["model_type"], "qwen2");
    assert_eq!(checkpoint.generation_config().unwrap()["top_k"], 20);
    assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["b", "w"]);
    assert_eq!(
        (checkpoint.num_parameters(), checkpoint.size_bytes()),
        (17, 34)
    );
    let tokenizer = TokenizerSource::Directory(directory.path().to_owned());
    assert_eq!(checkpoint.tokenizer(), tokenizer);
    let tensor = checkpoint.tensor("w").unwrap();
    assert_eq!(
        (tensor.dtype, &tensor.shape[..]),
        (GgmlDType::BF16, &[3, 4][..])
    );
    assert_eq!(tensor.data[22..], half::bf16::from_f64(11.0).to_le_bytes());
    let error = checkpoint.tensor("v").unwrap_err();
    assert!(matches!(error, WeightsError::MissingTensor { tensor, .. } if tensor == "v"));
}

#[test]
fn tensors_outlive_their_checkpoint() {
    let directory = model_with(&shard(&[("w", &[2])]));
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let tensor = checkpoint.tensor("w").unwrap();
    drop((checkpoint, directory));
    assert_eq!(tensor.data[2..], half::bf16::ONE.to_le_bytes());
}

#[test]
fn shards_are_found_by_index_and_without_one() {
    let (first, second) = (shard(&[("a", &[2])]), shard(&[("a", &[3]), ("b", &[4])]));
    let index = json!({"weight_map": {"a": "x-1.safetensors", "b": "x-2.safetensors"}}).to_string();
    let files = [
        CONFIG,
        ("x-1.safetensors", &first[..]),
        ("x-2.safetensors", &second[..]),
    ];
    let error = Directory::new(&files).error();
    assert!(matches!(error, WeightsError::DuplicateTensor { ref tensor, .. } if tensor == "a"));

    let index = ("model.safetensors.index.json", index.as_bytes());
    let with_index = Directory::new(&[&files[..], &[index]].concat());
    let checkpoint = Checkpoint::open(with_index.path()).unwrap();
    assert_eq!(checkpoint.tensor("a").unwrap().shape, [2]);
    assert_eq!(checkpoint.num_parameters(), 6);

    let without_second = Directory::new(&[files[0], files[1], index]);
    let error = without_second.error().to_string();
    assert!(
        error.contains("b") && error.contains("x-2.safetensors"),
        "{error}"
    );
    let wrong_second = Directory::new(&[files[0], files[1], ("x-2.safetensors", &first), index]);
    let error = wrong_second.error();
    assert!(matches!(error, WeightsError::NotInShard { ref tensor, .. } if tensor == "b"));

    let outside = json!({"weight_map": {"a": "../x-1.safetensors"}}).to_string();
    let outside = ("model.safetensors.index.json", outside.as_bytes());
    let error = Directory::new(&[files[0], files[1], outside]).error();
    assert!(
        matches!(error, WeightsError::MissingShard { .. }),
        "{error}"
    );
}

#[test]
fn directories_without_a_model_are_told_apart() {
    let adapter = br#"{"base_model_name_or_path": "Qwen/Qwen2.5-7B"}"#;
    let file = shard(&[("a", &[2])]);
    for (files, hint) in [
        (vec![], "neither safetensors nor GGUF"),
        (
            vec![CONFIG, ("pytorch_model.bin", b"".as_slice())],
            "safe_serialization",
        ),
        (
            vec![("model.safetensors", file.as_slice())],
            "config.json is missing",
        ),
        (
            vec![
                ("adapter_config.json", adapter.as_slice()),
                ("adapter_model.safetensors", &file),
            ],
            "LoRA adapter for Qwen/Qwen2.5-7B",
        ),
        (
            vec![("a.gguf", b"".as_slice()), ("b.gguf", b"".as_slice())],
            "a.gguf, b.gguf",
        ),
    ] {
        let error = Directory::new(&files).error();
        assert!(error.is_user_error());
        assert!(error.to_string().contains(hint), "{error}");
    }
    let error = Checkpoint::open(Path::new("no/such")).unwrap_err();
    assert!(matches!(error, WeightsError::Io { .. }) && error.is_user_error());
    let broken = Directory::new(&[("config.json", b"{"), ("model.safetensors", &file)]);
    assert!(matches!(broken.error(), WeightsError::Json { .. }));
    assert!(Checkpoint::open(&broken.file("model.safetensors")).is_err());
}

#[test]
fn a_truncated_file_names_the_tensor_and_both_sizes() {
    let mut file = shard(&[("w", &[100])]);
    let whole = file.len() as u64;
    file.truncate(file.len() - 30);
    let error = model_with(&file).error();
    let WeightsError::Truncated {
        path,
        tensor,
        expected_bytes,
        found_bytes,
    } = error
    else {
        panic!("{error}");
    };
    assert!(path.ends_with("model.safetensors"));
    assert_eq!(
        (tensor.as_str(), expected_bytes, found_bytes),
        ("w", whole, whole - 30)
    );

    file.truncate(20);
    assert!(matches!(
        model_with(&file).error(),
        WeightsError::HeaderTooLong { file_bytes: 20, .. }
    ));
    file.truncate(0);
    assert!(matches!(
        model_with(&file).error(),
        WeightsError::HeaderTooLong { .. }
    ));
}

#[test]
fn headers_that_contradict_themselves_are_refused() {
    let tensor = |name: &str, shape: &str, begin: u64, end: u64| {
        format!(r#""{name}":{{"dtype":"F32","shape":{shape},"data_offsets":[{begin},{end}]}}"#)
    };
    let refused = |tensors: &[String], data_bytes| {
        let header = format!("{{{}}}", tensors.join(","));
        model_with(&raw_safetensors(&header, data_bytes)).error()
    };
    let error = refused(&[tensor("w", "[2,3]", 0, 20)], 20);
    assert!(
        matches!(
            error,
            WeightsError::TensorSize {
                expected_bytes: 24,
                found_bytes: 20,
                ..
            }
        ),
        "{error}"
    );
    let error = refused(&[tensor("w", "[9223372036854775807,9]", 0, 4)], 4);
    assert!(matches!(error, WeightsError::TensorSize { .. }), "{error}");
    let error = refused(&[tensor("w", "[1]", 4, 0)], 4);
    assert!(
        matches!(error, WeightsError::TensorOffset { .. }),
        "{error}"
    );
    let error = refused(&[tensor("v", "[2]", 0, 8), tensor("w", "[2]", 4, 12)], 12);
    assert!(
        matches!(
            error,
            WeightsError::TensorOffset {
                expected: 8,
                found: 4,
                ..
            }
        ),
        "{error}"
    );
    let error = refused(&[tensor("v", "[2]", 0, 8), tensor("w", "[2]", 12, 20)], 20);
    assert!(
        matches!(
            error,
            WeightsError::TensorOffset {
                expected: 8,
                found: 12,
                ..
            }
        ),
        "{error}"
    );
    let error = refused(&[tensor("w", "[2]", 0, 8)], 9);
    assert!(
        matches!(error, WeightsError::TrailingBytes { .. }),
        "{error}"
    );
    let error = refused(&[tensor("w", "[2]", 0, 8), tensor("w", "[2]", 8, 16)], 16);
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert!(source.contains("tensor w is listed twice"), "{source}");
    let error = refused(&[tensor("w", "[-2]", 0, 8)], 8);
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert!(source.contains("tensor w"), "{source}");
    let depth = 100_000;
    let nested = format!(r#"{{"w":{}{}}}"#, "[".repeat(depth), "]".repeat(depth));
    assert!(matches!(
        model_with(&raw_safetensors(&nested, 0)).error(),
        WeightsError::Json { .. }
    ));
}

#[test]
fn other_dtypes_are_refused_only_when_asked_for() {
    let header = r#"{"q":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]},
        "new":{"dtype":"F3","shape":[9],"data_offsets":[4,8]},
        "w":{"dtype":"F32","shape":[1],"data_offsets":[8,12]},"__metadata__":{"format":"pt"}}"#;
    let directory = model_with(&raw_safetensors(header, 12));
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    assert!(checkpoint.tensor("w").is_ok());
    for (name, dtype) in [("q", "F8_E4M3"), ("new", "F3")] {
        let error = checkpoint.tensor(name).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains(dtype), "{error}");
    }
}
