//! Plans against llama.cpp's sizes, and files that the program's own reader opens again.

use std::path::{Path, PathBuf};

use candle_core::quantized::GgmlDType;
use serde_json::{Value, json};

use crate::text::GgufVocabulary;
use crate::weights::{
    Checkpoint, StoredTensor, TensorInfo, TensorSource, TokenizerSource, WeightsError,
};

use super::*;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(name)
}

fn options(file_type: GgufFileType) -> GgufOptions {
    GgufOptions {
        file_type,
        name: Some("tiny".to_owned()),
    }
}

/// A checkpoint of which only the headers exist.
struct Headers(Vec<TensorInfo>);

impl TensorSource for Headers {
    fn tensors(&self) -> Result<Vec<TensorInfo>, WeightsError> {
        Ok(self.0.clone())
    }

    fn tensor(&self, name: &str) -> Result<StoredTensor, WeightsError> {
        Err(WeightsError::MissingTensor {
            path: PathBuf::from("headers"),
            tensor: name.to_owned(),
        })
    }
}

/// A configuration of the Qwen2.5 family and its tensors.
fn qwen2(
    [hidden, intermediate, layers, heads, kv_heads]: [usize; 5],
    vocab_size: usize,
    tied: bool,
) -> (Value, Headers) {
    let config = json!({
        "model_type": "qwen2", "hidden_size": hidden, "intermediate_size": intermediate,
        "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": vocab_size, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768, "rope_theta": 1e6, "tie_word_embeddings": tied,
    });
    let kv = hidden / heads * kv_heads;
    let mut tensors = Vec::new();
    let mut add = |name: String, shape: &[usize]| {
        tensors.push(TensorInfo {
            name,
            dtype: GgmlDType::BF16,
            shape: shape.to_vec(),
        });
    };
    add("model.embed_tokens.weight".into(), &[vocab_size, hidden]);
    add("model.norm.weight".into(), &[hidden]);
    if !tied {
        add("lm_head.weight".into(), &[vocab_size, hidden]);
    }
    for layer in 0..layers {
        for (part, shape) in [
            ("input_layernorm.weight", vec![hidden]),
            ("post_attention_layernorm.weight", vec![hidden]),
            ("self_attn.q_proj.weight", vec![hidden, hidden]),
            ("self_attn.q_proj.bias", vec![hidden]),
            ("self_attn.k_proj.weight", vec![kv, hidden]),
            ("self_attn.k_proj.bias", vec![kv]),
            ("self_attn.v_proj.weight", vec![kv, hidden]),
            ("self_attn.v_proj.bias", vec![kv]),
            ("self_attn.o_proj.weight", vec![hidden, hidden]),
            ("mlp.gate_proj.weight", vec![intermediate, hidden]),
            ("mlp.up_proj.weight", vec![intermediate, hidden]),
            ("mlp.down_proj.weight", vec![hidden, intermediate]),
        ] {
            add(format!("model.layers.{layer}.{part}"), &shape);
        }
    }
    (config, Headers(tensors))
}

fn blank_vocabulary(num_tokens: usize) -> GgufVocabulary {
    GgufVocabulary {
        model: "gpt2".to_owned(),
        tokens: vec![String::new(); num_tokens],
        token_types: vec![1; num_tokens],
        ..GgufVocabulary::default()
    }
}

#[test]
fn tensor_data_has_llama_cpps_sizes_for_the_whole_family() {
    use GgufFileType::{F16, Q4KM, Q8_0};
    // Shape, vocabulary, tied; bytes of the tensors in f16, q8_0 and q4_k_m.
    let family = [
        (
            [896, 4864, 24, 14, 2],
            151_936,
            true,
            [988_208_640, 525_120_000, 391_859_712],
        ),
        (
            [1536, 8960, 28, 12, 2],
            151_936,
            true,
            [3_087_718_400, 1_640_622_080, 980_097_536],
        ),
        (
            [2048, 11008, 36, 16, 2],
            151_936,
            true,
            [6_172_360_704, 3_279_519_744, 1_923_946_496],
        ),
        (
            [3584, 18944, 28, 28, 4],
            152_064,
            false,
            [15_231_899_648, 8_092_571_648, 4_677_120_000],
        ),
        (
            [5120, 13824, 48, 40, 8],
            152_064,
            false,
            [29_541_748_736, 15_695_630_336, 8_982_142_976],
        ),
        (
            [5120, 27648, 64, 40, 8],
            152_064,
            false,
            [65_529_991_168, 34_814_906_368, 19_845_357_568],
        ),
    ];
    for (shape, vocab_size, tied, expected) in family {
        let (config, headers) = qwen2(shape, vocab_size, tied);
        let vocabulary = blank_vocabulary(vocab_size);
        let found = [F16, Q8_0, Q4KM].map(|file_type| {
            let plan = GgufPlan::new(&headers, &config, &vocabulary, &options(file_type)).unwrap();
            plan.summary().tensor_bytes
        });
        assert_eq!(found, expected, "{shape:?}");
    }
}

#[test]
fn tensor_types_are_those_of_llama_cpps_recipes() {
    let types = |shape, vocab_size, tied, file_type| {
        let (config, headers) = qwen2(shape, vocab_size, tied);
        let vocabulary = blank_vocabulary(vocab_size);
        let plan = GgufPlan::new(&headers, &config, &vocabulary, &options(file_type)).unwrap();
        let summary = plan.summary();
        let types = (summary.types.into_iter())
            .map(|(name, count)| format!("{name} {count}"))
            .collect::<Vec<_>>()
            .join(", ");
        (types, summary.fallbacks.len())
    };
    let small = [896, 4864, 24, 14, 2];
    let large = [3584, 18944, 28, 28, 4];
    assert_eq!(
        types(small, 151_936, true, GgufFileType::Q4KM),
        (
            "F32 121, Q4_K 12, Q5_0 132, Q6_K 12, Q8_0 13".to_owned(),
            144
        )
    );
    assert_eq!(
        types(large, 152_064, false, GgufFileType::Q4KM),
        ("F32 141, Q4_K 169, Q6_K 29".to_owned(), 0)
    );
    // Four v and three down in Q5_K, the head in Q6_K.
    assert_eq!(
        types(large, 152_064, false, GgufFileType::Q4KS),
        ("F32 141, Q4_K 190, Q5_K 7, Q6_K 1".to_owned(), 0)
    );
    assert_eq!(
        types(large, 152_064, false, GgufFileType::Q6K),
        ("F32 141, Q6_K 198".to_owned(), 0)
    );
    // v of the 72B class gets a bit more; rows of 29568 do not divide by 256.
    assert_eq!(
        types([8192, 29568, 80, 64, 8], 152_064, false, GgufFileType::Q4KM),
        (
            "F32 401, Q4_K 401, Q5_0 40, Q5_K 40, Q6_K 41, Q8_0 40".to_owned(),
            80
        )
    );
}

#[test]
fn files_read_back_as_the_checkpoint_that_they_were_made_of() {
    let dir = tempfile::tempdir().unwrap();
    for name in [
        "tiny-qwen2",
        "tiny-qwen2-untied",
        "tiny-qwen3",
        "tiny-llama",
    ] {
        let original = Checkpoint::open(&fixture(name)).unwrap();
        let config = original.config();
        let mut vocabulary = GgufVocabulary::from_dir(&fixture(name), config).unwrap();
        vocabulary.named_chat_templates = vec![("tool_use".to_owned(), "{{ 1 }}".to_owned())];
        let path = dir.path().join(format!("{name}.gguf"));
        let options = options(GgufFileType::F32);
        let plan = GgufPlan::new(&original, config, &vocabulary, &options).unwrap();
        let predicted = plan.size_bytes();
        let mut told = 0;
        let summary = plan
            .write(&original, &path, &mut |bytes| told += bytes)
            .unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().len(), predicted);
        assert_eq!(
            (summary.file_bytes, summary.tensor_bytes),
            (predicted, told)
        );

        let written = Checkpoint::open(&path).unwrap();
        assert!(written.names().eq(original.names()), "{name}");
        for tensor in original.names() {
            let (before, after) = (
                original.tensor(tensor).unwrap(),
                written.tensor(tensor).unwrap(),
            );
            assert_eq!(before.shape, after.shape, "{name} {tensor}");
            assert!(before.data == after.data, "{name} {tensor}");
        }
        for key in [
            "model_type",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "vocab_size",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
            "tie_word_embeddings",
        ] {
            assert_eq!(written.config()[key], config[key], "{name} {key}");
        }
        for key in ["rope_theta", "rms_norm_eps"] {
            let number = |config: &Value| config[key].as_f64().unwrap() as f32;
            assert_eq!(number(written.config()), number(config), "{name} {key}");
        }
        assert_vocabulary(&written, &vocabulary);
    }
}

fn assert_vocabulary(written: &Checkpoint, expected: &GgufVocabulary) {
    let TokenizerSource::Gguf(found) = written.tokenizer() else {
        panic!("a GGUF file brings its tokenizer");
    };
    assert_eq!(found.model, expected.model);
    assert_eq!(found.pre, expected.pre);
    assert_eq!(found.tokens, expected.tokens);
    assert_eq!(found.token_types, expected.token_types);
    assert_eq!(found.merges, expected.merges);
    assert_eq!((found.bos, found.eos), (expected.bos, expected.eos));
    assert_eq!(found.padding, expected.padding);
    assert_eq!(found.add_bos, expected.add_bos);
    assert_eq!(found.chat_template, expected.chat_template);
    assert_eq!(found.named_chat_templates, expected.named_chat_templates);
}

#[test]
fn llama_3s_frequencies_are_written_as_divisors() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("llama.gguf");
    let model = fixture("tiny-llama");
    let original = Checkpoint::open(&model).unwrap();
    let vocabulary = GgufVocabulary::from_dir(&model, original.config()).unwrap();
    let options = options(GgufFileType::F16);
    let config = original.config();
    let plan = GgufPlan::new(&original, config, &vocabulary, &options).unwrap();
    plan.write(&original, &path, &mut |_| {}).unwrap();
    let written = Checkpoint::open(&path).unwrap();
    let factors = written.config()["rope_freq_factors"].as_array().unwrap();
    let factors: Vec<f64> = factors.iter().map(|it| it.as_f64().unwrap()).collect();
    // Wavelengths 2π · 10^i make 20, 2, 0.2 and 0.02 turns in the trained length of 128.
    assert_eq!(factors.len(), 4);
    assert_eq!((factors[0], factors[2], factors[3]), (1.0, 8.0, 8.0));
    let turns = 128.0 / (2.0 * std::f64::consts::PI * 10.0);
    let kept = (turns - 1.0) / 3.0;
    let expected = 1.0 / ((1.0 - kept) / 8.0 + kept);
    assert!((factors[1] - expected).abs() < 1e-6, "{factors:?}");
}

#[test]
fn a_checkpoint_that_does_not_fit_is_refused_before_a_byte_is_written() {
    let plan = |config: &Value, headers: &Headers, num_tokens| {
        let vocabulary = blank_vocabulary(num_tokens);
        let error = GgufPlan::new(headers, config, &vocabulary, &options(GgufFileType::F16));
        error.unwrap_err().to_string()
    };
    let (config, mut headers) = qwen2([64, 96, 2, 4, 2], 100, true);
    assert!(plan(&config, &headers, 99).contains("has 99 tokens, config.json says vocab_size 100"));

    headers
        .0
        .retain(|info| info.name != "model.layers.1.self_attn.k_proj.bias");
    assert!(plan(&config, &headers, 100).contains("no tensor for blk.1.attn_k.bias"));

    let (config, mut headers) = qwen2([64, 96, 2, 4, 2], 100, true);
    headers.0[0].shape = vec![101, 64];
    assert!(plan(&config, &headers, 100).contains("[101, 64], config.json asks for [100, 64]"));

    let (mut config, mut headers) = qwen2([64, 96, 2, 4, 2], 100, true);
    headers.0[0].name = "visual.embed.weight".into();
    assert!(
        plan(&config, &headers, 100).contains("no name for these tensors of a qwen2 model: visual")
    );

    config["model_type"] = "gemma3".into();
    assert!(plan(&config, &headers, 100).contains("model_type \"gemma3\""));
}

#[test]
fn a_head_beside_tied_embeddings_and_stored_frequencies_are_left_out() {
    let (config, mut headers) = qwen2([64, 96, 2, 4, 2], 100, true);
    for (name, shape) in [
        ("lm_head.weight", vec![100, 64]),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", vec![8]),
    ] {
        headers.0.push(TensorInfo {
            name: name.to_owned(),
            dtype: GgmlDType::F32,
            shape,
        });
    }
    let vocabulary = blank_vocabulary(100);
    let plan = GgufPlan::new(&headers, &config, &vocabulary, &options(GgufFileType::F16)).unwrap();
    let count: usize = plan.summary().types.iter().map(|(_, count)| count).sum();
    assert_eq!(count, 2 + 2 * 12);
}
