//! GGUF files: names, configuration, block types, row order, parts, and refusals.

use std::io::Cursor;

use candle_core::{
    Device, Tensor,
    quantized::{GgmlDType, QTensor, gguf_file},
};
use gguf_file::Value;
use infold::weights::{Checkpoint, Format, TokenizerSource, WeightsError};
use serde_json::json;

use super::Directory;

/// Metadata and tensors of a GGUF file to be.
pub(super) struct Gguf {
    metadata: Vec<(String, Value)>,
    tensors: Vec<(String, QTensor)>,
}

impl Gguf {
    /// A model of one layer with hidden size 32, 4 heads and 2 kv heads of 8, vocabulary of 3.
    pub(super) fn new(architecture: &str, dtype: GgmlDType) -> Self {
        let key = |name: &str| format!("{architecture}.{name}");
        let strings = |texts: &[&str]| {
            Value::Array(
                texts
                    .iter()
                    .map(|&text| Value::String(text.to_owned()))
                    .collect(),
            )
        };
        let types = [1, 3, 3].into_iter().map(Value::I32).collect();
        let metadata = vec![
            (
                "general.architecture".to_owned(),
                Value::String(architecture.to_owned()),
            ),
            (key("embedding_length"), Value::U32(32)),
            (key("feed_forward_length"), Value::U32(64)),
            (key("block_count"), Value::U32(1)),
            (key("attention.head_count"), Value::U32(4)),
            (key("attention.head_count_kv"), Value::U32(2)),
            (key("attention.layer_norm_rms_epsilon"), Value::F32(1e-6)),
            (key("context_length"), Value::U32(128)),
            (key("rope.freq_base"), Value::F32(1e6)),
            (
                "tokenizer.ggml.model".to_owned(),
                Value::String("gpt2".to_owned()),
            ),
            (
                "tokenizer.ggml.pre".to_owned(),
                Value::String("qwen2".to_owned()),
            ),
            (
                "tokenizer.ggml.tokens".to_owned(),
                strings(&["a", "<|im_end|>", "<|endoftext|>"]),
            ),
            ("tokenizer.ggml.token_type".to_owned(), Value::Array(types)),
            ("tokenizer.ggml.merges".to_owned(), strings(&["a b"])),
            ("tokenizer.ggml.eos_token_id".to_owned(), Value::U32(2)),
            (
                "tokenizer.ggml.add_bos_token".to_owned(),
                Value::Bool(false),
            ),
        ];
        let mut gguf = Self {
            metadata,
            tensors: Vec::new(),
        };
        gguf.add("token_embd.weight", &[3, 32], dtype);
        gguf.add("output_norm.weight", &[32], GgmlDType::F32);
        for (name, rows) in [("q", 32), ("k", 16), ("v", 16), ("output", 32)] {
            gguf.add(&format!("blk.0.attn_{name}.weight"), &[rows, 32], dtype);
        }
        gguf.add("blk.0.attn_q.bias", &[32], GgmlDType::F32);
        gguf.add("blk.0.ffn_down.weight", &[32, 64], dtype);
        gguf
    }

    /// Adds a tensor that counts up from 0.
    fn add(&mut self, name: &str, shape: &[usize], dtype: GgmlDType) {
        let elements = shape.iter().product::<usize>() as f32;
        let tensor = Tensor::arange(0_f32, elements, &Device::Cpu)
            .and_then(|tensor| QTensor::quantize(&tensor.reshape(shape)?, dtype))
            .expect("the shape divides into blocks");
        self.tensors.push((name.to_owned(), tensor));
    }

    fn set(&mut self, key: &str, value: Value) {
        self.metadata.retain(|(found, _)| found != key);
        self.metadata.push((key.to_owned(), value));
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        let mut file = Cursor::new(Vec::new());
        let metadata: Vec<_> = self
            .metadata
            .iter()
            .map(|(key, value)| (&key[..], value))
            .collect();
        let tensors: Vec<_> = self
            .tensors
            .iter()
            .map(|(name, tensor)| (&name[..], tensor))
            .collect();
        gguf_file::write(&mut file, &metadata, &tensors).expect("memory is writable");
        file.into_inner()
    }

    fn tensor(&self, name: &str) -> &QTensor {
        let found = self.tensors.iter().find(|(found, _)| found == name);
        &found.expect("it was added").1
    }

    fn open(&self) -> (Directory, Result<Checkpoint, WeightsError>) {
        let directory = Directory::new(&[("model.gguf", &self.bytes())]);
        let checkpoint = Checkpoint::open(&directory.file("model.gguf"));
        (directory, checkpoint)
    }

    fn error(&self) -> WeightsError {
        self.open().1.expect_err("it must be refused")
    }
}

#[test]
fn gguf_speaks_hugging_face() {
    let mut gguf = Gguf::new("qwen2", GgmlDType::Q8_0);
    gguf.set("qwen2.rope.scaling.type", Value::String("yarn".to_owned()));
    gguf.set("qwen2.rope.scaling.factor", Value::F32(4.0));
    gguf.set("qwen2.rope.scaling.original_context_length", Value::U32(32));
    let directory = Directory::new(&[("model.gguf", &gguf.bytes())]);
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    assert_eq!(checkpoint.format(), Format::Gguf);
    assert_eq!(checkpoint.path(), directory.file("model.gguf"));
    let config = checkpoint.config();
    for (key, value) in [
        ("model_type", json!("qwen2")),
        ("hidden_size", json!(32)),
        ("intermediate_size", json!(64)),
        ("num_hidden_layers", json!(1)),
        ("num_attention_heads", json!(4)),
        ("num_key_value_heads", json!(2)),
        ("head_dim", json!(8)),
        ("vocab_size", json!(3)),
        ("rope_theta", json!(1e6)),
        ("max_position_embeddings", json!(128)),
        ("tie_word_embeddings", json!(true)),
        ("eos_token_id", json!(2)),
        (
            "rope_scaling",
            json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}),
        ),
    ] {
        assert_eq!(config[key], value, "{key}");
    }
    assert_eq!(config["rms_norm_eps"].as_f64().unwrap() as f32, 1e-6);
    assert_eq!(
        checkpoint.generation_config().unwrap()["eos_token_id"],
        json!([2, 1])
    );
    let TokenizerSource::Gguf(vocabulary) = checkpoint.tokenizer() else {
        panic!("a GGUF file carries its vocabulary");
    };
    assert_eq!(vocabulary.tokens, ["a", "<|im_end|>", "<|endoftext|>"]);
    assert_eq!(vocabulary.token_types, [1, 3, 3]);
    assert_eq!(
        (vocabulary.eos, vocabulary.bos, vocabulary.add_bos),
        (Some(2), None, Some(false))
    );
    assert_eq!(
        (vocabulary.merges, vocabulary.pre.as_deref()),
        (vec!["a b".to_owned()], Some("qwen2"))
    );
}

#[test]
fn every_block_type_comes_back_byte_for_byte() {
    use GgmlDType::{BF16, F16, F32, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0};
    let mut gguf = Gguf::new("qwen3", F32);
    let dtypes = [F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4K, Q5K, Q6K];
    for (layer, dtype) in dtypes.into_iter().enumerate() {
        gguf.add(&format!("blk.{layer}.ffn_up.weight"), &[3, 256], dtype);
    }
    let (_directory, checkpoint) = gguf.open();
    let checkpoint = checkpoint.unwrap();
    for (layer, dtype) in dtypes.into_iter().enumerate() {
        let tensor = checkpoint
            .tensor(&format!("model.layers.{layer}.mlp.up_proj.weight"))
            .unwrap();
        let written = gguf.tensor(&format!("blk.{layer}.ffn_up.weight"));
        assert_eq!((tensor.dtype, &tensor.shape[..]), (dtype, &[3, 256][..]));
        assert_eq!(tensor.data[..], written.data().unwrap()[..], "{dtype:?}");
    }
}

#[test]
fn other_block_types_are_refused_by_name_when_asked_for() {
    let mut gguf = Gguf::new("qwen2", GgmlDType::F32);
    gguf.add("blk.0.ffn_up.weight", &[1, 256], GgmlDType::Q2K);
    let (_directory, checkpoint) = gguf.open();
    let error = checkpoint
        .unwrap()
        .tensor("model.layers.0.mlp.up_proj.weight");
    let error = error.unwrap_err().to_string();
    assert!(
        error.contains("mlp.up_proj") && error.contains("Q2_K"),
        "{error}"
    );
}

/// llama.cpp's converter: `reshape(heads, 2, head_dim / 2, …).swapaxes(1, 2)`.
fn interleave(rows: &[Vec<u8>], head_dim: usize) -> Vec<Vec<u8>> {
    let mut stored = Vec::new();
    for head in rows.chunks(head_dim) {
        for pair in 0..head_dim / 2 {
            stored.push(head[pair].clone());
            stored.push(head[head_dim / 2 + pair].clone());
        }
    }
    stored
}

#[test]
fn llama_rows_are_put_back_and_only_llama_rows() {
    for architecture in ["llama", "qwen2"] {
        let gguf = Gguf::new(architecture, GgmlDType::Q4_0);
        let (_directory, checkpoint) = gguf.open();
        let checkpoint = checkpoint.unwrap();
        for (gguf_name, hf_name) in [
            ("attn_q.weight", "q_proj.weight"),
            ("attn_q.bias", "q_proj.bias"),
            ("attn_k.weight", "k_proj.weight"),
            ("attn_v.weight", "v_proj.weight"),
        ] {
            let hf_name = format!("model.layers.0.self_attn.{hf_name}");
            let tensor = checkpoint.tensor(&hf_name).unwrap();
            let row_bytes = tensor.data.len() / tensor.shape[0];
            let mut rows: Vec<_> = tensor.data.chunks(row_bytes).map(<[u8]>::to_vec).collect();
            if architecture == "llama" && !gguf_name.contains("attn_v") {
                rows = interleave(&rows, 8);
            }
            let written = gguf.tensor(&format!("blk.0.{gguf_name}"));
            assert_eq!(
                rows.concat(),
                written.data().unwrap()[..],
                "{architecture} {hf_name}"
            );
        }
    }
}

#[test]
fn rotary_factors_become_configuration() {
    let mut gguf = Gguf::new("llama", GgmlDType::F32);
    gguf.add("rope_freqs.weight", &[4], GgmlDType::F32);
    gguf.add("output.weight", &[3, 32], GgmlDType::F16);
    let (_directory, checkpoint) = gguf.open();
    let checkpoint = checkpoint.unwrap();
    assert_eq!(
        checkpoint.config()["rope_freq_factors"],
        json!([0.0, 1.0, 2.0, 3.0])
    );
    assert_eq!(checkpoint.config()["tie_word_embeddings"], json!(false));
    assert!(checkpoint.names().all(|name| !name.contains("rope")));
    assert!(checkpoint.contains("lm_head.weight"));
}

#[test]
fn a_split_file_is_opened_by_any_of_its_parts() {
    let mut first = Gguf::new("qwen2", GgmlDType::F32);
    first.set("split.count", Value::U16(2));
    let mut second = Gguf {
        metadata: Vec::new(),
        tensors: Vec::new(),
    };
    second.add("blk.0.ffn_up.weight", &[64, 32], GgmlDType::F32);
    let names = ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"];
    let (first, second) = (first.bytes(), second.bytes());
    let directory = Directory::new(&[(names[0], &first), (names[1], &second)]);
    for path in [
        directory.path().to_owned(),
        directory.file(names[0]),
        directory.file(names[1]),
    ] {
        let checkpoint = Checkpoint::open(&path).unwrap();
        assert_eq!(
            checkpoint
                .tensor("model.layers.0.mlp.up_proj.weight")
                .unwrap()
                .shape,
            [64, 32]
        );
        assert!(checkpoint.contains("model.norm.weight"));
    }
    let alone = Directory::new(&[(names[0], &first)]);
    assert!(alone.error().to_string().contains(names[1]));
    let renamed = Directory::new(&[("m.gguf", &first)]);
    assert!(renamed.error().to_string().contains("split.count"));
}

#[test]
fn gguf_files_that_cannot_be_served_say_why() {
    let mut gguf = Gguf::new("qwen2", GgmlDType::F32);
    gguf.set("general.architecture", Value::String("gemma3".to_owned()));
    assert!(gguf.error().to_string().contains("gemma3"));
    let mut gguf = Gguf::new("qwen2", GgmlDType::F32);
    gguf.set("qwen2.block_count", Value::String("one".to_owned()));
    let error = gguf.error().to_string();
    assert!(
        error.contains("qwen2.block_count has a value of the wrong type"),
        "{error}"
    );
    let mut gguf = Gguf::new("qwen2", GgmlDType::F32);
    gguf.tensors.remove(0);
    assert!(
        gguf.error()
            .to_string()
            .contains("model.embed_tokens.weight")
    );
    let mut gguf = Gguf::new("qwen2", GgmlDType::F32);
    gguf.add("output_norm.weight", &[32], GgmlDType::F32);
    assert!(matches!(gguf.error(), WeightsError::DuplicateTensor { .. }));
    let mut gguf = Gguf::new("llama", GgmlDType::F32);
    gguf.set("llama.attention.head_count", Value::U32(5));
    assert!(matches!(
        gguf.error(),
        WeightsError::UnevenShard { size: 32, .. }
    ));

    let whole = Gguf::new("qwen2", GgmlDType::F32).bytes();
    let refused = |bytes: &[u8]| Directory::new(&[("model.gguf", bytes)]).error();
    let error = refused(&whole[..whole.len() - 4000]);
    assert!(matches!(error, WeightsError::Truncated { .. }), "{error}");
    for length in [0, 3, 10, 100, 1000] {
        let error = refused(&whole[..length]);
        assert!(
            matches!(error, WeightsError::Gguf { .. }),
            "{length}: {error}"
        );
    }
    let mut big_endian = whole.clone();
    big_endian[4..8].reverse();
    assert!(refused(&big_endian).to_string().contains("big endian"));
}
