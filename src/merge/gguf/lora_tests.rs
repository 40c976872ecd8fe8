//! Adapters as GGUF files: scales, layouts, refusals.

use std::path::Path;

use serde_json::{Value, json};

use super::{LoraModule, export_gguf_lora};

fn config(model_type: &str) -> Value {
    json!({
        "model_type": model_type, "hidden_size": 8, "intermediate_size": 12,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "vocab_size": 5, "max_position_embeddings": 32, "tie_word_embeddings": true,
    })
}

fn module(name: &str, [out_features, in_features, rank]: [usize; 3], scale: f32) -> LoraModule {
    LoraModule {
        name: name.to_owned(),
        rank,
        in_features,
        out_features,
        a: (0..rank * in_features).map(|i| i as f32).collect(),
        b: (0..out_features * rank).map(|i| i as f32).collect(),
        scale,
    }
}

/// Name, row-major shape and values of a tensor.
type Values = (String, Vec<usize>, Vec<f32>);

/// Returns alpha and the tensors of a file.
fn read(path: &Path) -> (f64, Vec<Values>) {
    let mut file = std::fs::File::open(path).unwrap();
    let content = candle_core::quantized::gguf_file::Content::read(&mut file).unwrap();
    let alpha = content.metadata["adapter.lora.alpha"].to_f32().unwrap();
    let text = |key: &str| content.metadata[key].to_string().unwrap().clone();
    assert_eq!(text("general.type"), "adapter");
    assert_eq!(text("adapter.type"), "lora");
    let mut names: Vec<_> = content.tensor_infos.keys().cloned().collect();
    names.sort();
    let tensors = names.into_iter().map(|name| {
        let cpu = candle_core::Device::Cpu;
        let tensor = content.tensor(&mut file, &name, &cpu).unwrap();
        let values = tensor.dequantize(&cpu).unwrap().flatten_all().unwrap();
        (
            name,
            tensor.shape().dims().to_vec(),
            values.to_vec1().unwrap(),
        )
    });
    (f64::from(alpha), tensors.collect())
}

fn write(modules: &[LoraModule], config: &Value) -> (f64, Vec<Values>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("lora.gguf");
    export_gguf_lora(modules, config, Some("mine"), &path).unwrap();
    read(&path)
}

#[test]
fn modules_that_are_alike_keep_their_b_and_others_get_their_scale_folded_in() {
    let modules = [
        module("model.layers.0.mlp.up_proj", [12, 8, 2], 8.0),
        module("model.layers.0.mlp.down_proj", [8, 12, 4], 1.0),
    ];
    let (alpha, tensors) = write(&modules, &config("qwen2"));
    assert_eq!(alpha, 16.0);
    let names: Vec<&str> = tensors.iter().map(|(name, ..)| name.as_str()).collect();
    assert_eq!(
        names,
        [
            "blk.0.ffn_down.weight.lora_a",
            "blk.0.ffn_down.weight.lora_b",
            "blk.0.ffn_up.weight.lora_a",
            "blk.0.ffn_up.weight.lora_b",
        ]
    );
    assert_eq!((&tensors[2].1, &tensors[2].2), (&vec![2, 8], &modules[0].a));
    assert_eq!(
        (&tensors[3].1, &tensors[3].2),
        (&vec![12, 2], &modules[0].b)
    );
    // llama.cpp will multiply by 16 / 4, wanted is 1.
    let quarter: Vec<f32> = modules[1].b.iter().map(|value| value / 4.0).collect();
    assert_eq!(tensors[1].2, quarter);
}

#[test]
fn rows_of_b_follow_the_heads_of_llama_only() {
    let modules = [module("model.layers.0.self_attn.q_proj", [8, 8, 1], 1.0)];
    let (_, qwen) = write(&modules, &config("qwen2"));
    assert_eq!(qwen[1].2, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]);
    let (_, llama) = write(&modules, &config("llama"));
    assert_eq!(llama[1].2, [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]);
    assert_eq!(llama[0].2, qwen[0].2);
}

#[test]
fn the_a_of_an_embedding_is_transposed() {
    // PEFT: A [rank, vocabulary], B [hidden, rank].
    let modules = [module("model.embed_tokens", [8, 5, 2], 1.0)];
    let (_, tensors) = write(&modules, &config("qwen2"));
    assert_eq!(tensors[0].0, "token_embd.weight.lora_a");
    assert_eq!(tensors[0].1, [5, 2]);
    assert_eq!(
        tensors[0].2,
        [0.0, 5.0, 1.0, 6.0, 2.0, 7.0, 3.0, 8.0, 4.0, 9.0]
    );
    assert_eq!(tensors[1].1, [8, 2]);
}

#[test]
fn modules_that_the_base_does_not_have_are_refused() {
    let refused = |module: LoraModule| {
        let path = Path::new("/nonexistent/lora.gguf");
        let error = export_gguf_lora(&[module], &config("qwen2"), None, path);
        error.unwrap_err().to_string()
    };
    let error = refused(module("model.layers.0.mlp.up_proj", [12, 9, 2], 1.0));
    assert!(error.contains("[12, 9], the base has [12, 8]"), "{error}");
    let error = refused(module("model.layers.0.input_layernorm", [8, 8, 2], 1.0));
    assert!(
        error.contains("cannot adapt model.layers.0.input_layernorm"),
        "{error}"
    );
    let error = refused(module("lm_head", [5, 8, 2], 1.0));
    assert!(error.contains("tied to the embedding"), "{error}");
    let mut short = module("model.layers.0.mlp.up_proj", [12, 8, 2], 1.0);
    short.b.pop();
    assert!(refused(short).contains("B of 23 numbers"));
    let error = export_gguf_lora(&[], &config("qwen2"), None, Path::new("x")).unwrap_err();
    assert!(error.to_string().contains("no LoRA modules"));
}
