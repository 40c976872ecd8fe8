//! The metadata of a GGUF file: what `convert_hf_to_gguf.py` writes, in its words.

use crate::text::GgufVocabulary;
use crate::weights::GgufValue;

use super::GgufOptions;
use super::shape::{ModelShape, RopeScaling};

/// The version of the block layouts (`GGML_QNT_VERSION`).
const QUANTIZATION_VERSION: u32 = 2;

/// Metadata in the order in which it is written.
pub(super) type Metadata = Vec<(String, GgufValue)>;

/// Returns all metadata of a model.
pub(super) fn of_model(
    shape: &ModelShape,
    vocabulary: &GgufVocabulary,
    options: &GgufOptions,
) -> Metadata {
    let mut metadata = general(&shape.architecture, "model", options.name.as_deref());
    hyperparameters(&mut metadata, shape);
    put_u32(
        &mut metadata,
        "general.file_type",
        options.file_type.number(),
    );
    put_u32(
        &mut metadata,
        "general.quantization_version",
        QUANTIZATION_VERSION,
    );
    tokenizer(&mut metadata, vocabulary);
    metadata
}

/// Returns what every file begins with.
pub(super) fn general(architecture: &str, kind: &str, name: Option<&str>) -> Metadata {
    let mut metadata = Metadata::new();
    put_text(&mut metadata, "general.architecture", architecture);
    put_text(&mut metadata, "general.type", kind);
    if let Some(name) = name {
        put_text(&mut metadata, "general.name", name);
    }
    metadata
}

fn hyperparameters(metadata: &mut Metadata, shape: &ModelShape) {
    let key = |name: &str| format!("{}.{name}", shape.architecture);
    let mut sizes = vec![
        ("block_count", shape.num_layers),
        ("context_length", shape.max_position_embeddings),
        ("embedding_length", shape.hidden_size),
        ("feed_forward_length", shape.intermediate_size),
        ("attention.head_count", shape.heads.query),
        ("attention.head_count_kv", shape.heads.key_value),
        ("vocab_size", shape.vocab_size),
    ];
    if shape.explicit_head_dim {
        sizes.push(("attention.key_length", shape.head_dim));
        sizes.push(("attention.value_length", shape.head_dim));
    }
    if shape.architecture == "llama" {
        sizes.push(("rope.dimension_count", shape.head_dim));
    }
    for (name, size) in sizes {
        // Sizes of a configuration are below 2³².
        put_u32(metadata, &key(name), size as u32);
    }
    put_f32(metadata, &key("rope.freq_base"), shape.rope_theta);
    let epsilon = GgufValue::F32(shape.rms_norm_eps);
    metadata.push((key("attention.layer_norm_rms_epsilon"), epsilon));
    match &shape.rope_scaling {
        // Llama 3's is a tensor.
        RopeScaling::None | RopeScaling::Llama3 { .. } => {}
        RopeScaling::Linear { factor } => {
            put_text(metadata, &key("rope.scaling.type"), "linear");
            put_f32(metadata, &key("rope.scaling.factor"), *factor);
        }
        RopeScaling::Yarn {
            factor,
            original_context_length,
            beta_fast,
            beta_slow,
        } => {
            put_text(metadata, &key("rope.scaling.type"), "yarn");
            put_f32(metadata, &key("rope.scaling.factor"), *factor);
            let length = *original_context_length as u32;
            put_u32(
                metadata,
                &key("rope.scaling.original_context_length"),
                length,
            );
            for (name, beta) in [("fast", beta_fast), ("slow", beta_slow)] {
                if let Some(beta) = beta {
                    put_f32(
                        metadata,
                        &key(&format!("rope.scaling.yarn_beta_{name}")),
                        *beta,
                    );
                }
            }
        }
    }
}

fn tokenizer(metadata: &mut Metadata, vocabulary: &GgufVocabulary) {
    let GgufVocabulary {
        model,
        pre,
        tokens,
        token_types,
        merges,
        scores,
        bos,
        eos,
        unknown,
        padding,
        eot,
        add_bos,
        add_eos,
        add_space_prefix,
        chat_template,
        named_chat_templates,
    } = vocabulary;
    put_text(metadata, "tokenizer.ggml.model", model);
    if let Some(pre) = pre {
        put_text(metadata, "tokenizer.ggml.pre", pre);
    }
    let mut put = |key: &str, value| metadata.push((format!("tokenizer.{key}"), value));
    put("ggml.tokens", GgufValue::Strings(tokens.clone()));
    if !scores.is_empty() {
        put("ggml.scores", GgufValue::F32s(scores.clone()));
    }
    put("ggml.token_type", GgufValue::I32s(token_types.clone()));
    if !merges.is_empty() {
        put("ggml.merges", GgufValue::Strings(merges.clone()));
    }
    for (name, id) in [
        ("bos", bos),
        ("eos", eos),
        ("unknown", unknown),
        ("padding", padding),
        ("eot", eot),
    ] {
        if let Some(id) = id {
            put(&format!("ggml.{name}_token_id"), GgufValue::U32(*id));
        }
    }
    for (name, flag) in [
        ("add_bos_token", add_bos),
        ("add_eos_token", add_eos),
        ("add_space_prefix", add_space_prefix),
    ] {
        if let Some(flag) = flag {
            put(&format!("ggml.{name}"), GgufValue::Bool(*flag));
        }
    }
    if let Some(template) = chat_template {
        put("chat_template", GgufValue::String(template.clone()));
    }
    if !named_chat_templates.is_empty() {
        let names = named_chat_templates.iter().map(|(name, _)| name.clone());
        put("chat_templates", GgufValue::Strings(names.collect()));
    }
    for (name, template) in named_chat_templates {
        put(
            &format!("chat_template.{name}"),
            GgufValue::String(template.clone()),
        );
    }
}

fn put_text(metadata: &mut Metadata, key: &str, value: &str) {
    metadata.push((key.to_owned(), GgufValue::String(value.to_owned())));
}

fn put_u32(metadata: &mut Metadata, key: &str, value: u32) {
    metadata.push((key.to_owned(), GgufValue::U32(value)));
}

/// Puts a number that the file holds in single precision.
pub(super) fn put_f32(metadata: &mut Metadata, key: &str, value: f64) {
    metadata.push((key.to_owned(), GgufValue::F32(value as f32)));
}
