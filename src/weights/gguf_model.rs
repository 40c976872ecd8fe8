//! Translates what a GGUF file says about its model into Hugging Face's words: tensor names,
//! `config.json`, `generation_config.json` and the vocabulary.
//!
//! Metadata keys follow llama.cpp's `gguf-py/gguf/constants.py`; tensor names are in `gguf_names`.

use std::{collections::BTreeMap, path::Path};

use serde_json::{Map, json};

use super::{
    WeightsError,
    gguf::Value,
    gguf_names::{HeadCounts, RowOrder, hf_name, part_of},
    index::TensorEntry,
};
use crate::vocabulary::GgufVocabulary;

/// The type of tokens that are never text.
const CONTROL_TOKEN: u64 = 3;
/// How the supported model families spell the end of a turn, message or text.
const END_TOKENS: [&str; 5] = [
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
];

/// The metadata of a GGUF file, with the file's path for errors.
pub(super) struct Metadata<'a> {
    path: &'a Path,
    values: &'a BTreeMap<String, Value>,
    architecture: String,
}

/// The facts that come from tensors rather than from metadata.
pub(super) struct TensorFacts {
    /// Rows of the token embedding.
    pub(super) vocab_size: usize,
    /// Whether there is no `lm_head.weight`.
    pub(super) tie_word_embeddings: bool,
    /// dtype of the activations that suits the stored weights, as PyTorch spells it.
    pub(super) torch_dtype: &'static str,
    /// `rope_freqs.weight`: divisors of the rotary frequencies (Llama 3), `[head_dim / 2]`.
    pub(super) rope_freq_factors: Option<Vec<f32>>,
}

impl<'a> Metadata<'a> {
    /// Wraps the metadata of a supported architecture.
    pub(super) fn new(
        path: &'a Path,
        values: &'a BTreeMap<String, Value>,
    ) -> Result<Self, WeightsError> {
        let mut metadata = Self {
            path,
            values,
            architecture: String::new(),
        };
        let architecture = metadata.required("general.architecture", Value::as_str)?;
        if !matches!(architecture, "llama" | "qwen2" | "qwen3") {
            return Err(WeightsError::Architecture {
                path: path.to_owned(),
                architecture: architecture.to_owned(),
            });
        }
        metadata.architecture = architecture.to_owned();
        Ok(metadata)
    }

    fn optional<T>(&self, key: &str, read: impl FnOnce(&'a Value) -> Option<T>) -> Option<T> {
        self.values.get(key).and_then(read)
    }

    fn required<T>(
        &self,
        key: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<T, WeightsError> {
        let fault = |reason| WeightsError::GgufMetadata {
            path: self.path.to_owned(),
            key: key.to_owned(),
            reason,
        };
        let value = self.values.get(key).ok_or_else(|| fault("is missing"))?;
        read(value).ok_or_else(|| fault("has a value of the wrong type"))
    }

    /// Returns the key below the architecture's name.
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.architecture)
    }

    fn size(&self, name: &str) -> Result<u64, WeightsError> {
        // Some converters write one number a layer; models of one decoder have them all equal.
        self.required(&self.key(name), |value| {
            let value = value.as_array().map_or(Some(value), |layers| {
                layers
                    .first()
                    .filter(|first| layers.iter().all(|layer| layer == *first))
            })?;
            value.as_u64()
        })
    }

    fn num_heads(&self) -> Result<u64, WeightsError> {
        self.size("attention.head_count")
    }

    fn num_kv_heads(&self) -> Result<u64, WeightsError> {
        match self.size("attention.head_count_kv") {
            Ok(count) => Ok(count),
            Err(_) => self.num_heads(),
        }
    }

    /// Returns the model's configuration under the keys of a Hugging Face `config.json`.
    ///
    /// `rope_freq_factors` is infold's own key: explicit divisors of the rotary frequencies.
    ///
    /// # Errors
    /// [`WeightsError::GgufMetadata`] for a key that is missing or of another type.
    pub(super) fn config(&self, facts: &TensorFacts) -> Result<serde_json::Value, WeightsError> {
        let hidden_size = self.size("embedding_length")?;
        let num_heads = self.num_heads()?;
        let head_dim = match self.size("attention.key_length") {
            Ok(length) => length,
            Err(_) => hidden_size / num_heads.max(1),
        };
        let mut config = json!({
            "architectures": [match self.architecture.as_str() {
                "qwen2" => "Qwen2ForCausalLM",
                "qwen3" => "Qwen3ForCausalLM",
                _ => "LlamaForCausalLM",
            }],
            "model_type": self.architecture,
            "hidden_size": hidden_size,
            "intermediate_size": self.size("feed_forward_length")?,
            "num_hidden_layers": self.size("block_count")?,
            "num_attention_heads": num_heads,
            "num_key_value_heads": self.num_kv_heads()?,
            "head_dim": head_dim,
            "hidden_act": "silu",
            "vocab_size": facts.vocab_size,
            "rms_norm_eps": self.required(
                &self.key("attention.layer_norm_rms_epsilon"), Value::as_f64)?,
            "rope_theta": self.optional(&self.key("rope.freq_base"), Value::as_f64)
                .unwrap_or(10_000.0),
            "max_position_embeddings": self.size("context_length")?,
            "tie_word_embeddings": facts.tie_word_embeddings,
            "torch_dtype": facts.torch_dtype,
        });
        if let Some(fields) = config.as_object_mut() {
            self.add_optional_fields(fields, facts);
        }
        Ok(config)
    }

    fn add_optional_fields(
        &self,
        fields: &mut Map<String, serde_json::Value>,
        facts: &TensorFacts,
    ) {
        for (field, key) in [
            ("bos_token_id", "tokenizer.ggml.bos_token_id"),
            ("eos_token_id", "tokenizer.ggml.eos_token_id"),
            ("pad_token_id", "tokenizer.ggml.padding_token_id"),
        ] {
            if let Some(id) = self.optional(key, Value::as_u64) {
                fields.insert(field.to_owned(), id.into());
            }
        }
        if let Some(name) = self.optional("general.name", Value::as_str) {
            fields.insert("_name_or_path".to_owned(), name.into());
        }
        if let Some(factors) = &facts.rope_freq_factors {
            fields.insert("rope_freq_factors".to_owned(), json!(factors));
        }
        if let Some(scaling) = self.rope_scaling() {
            fields.insert("rope_scaling".to_owned(), scaling);
        }
    }

    fn rope_scaling(&self) -> Option<serde_json::Value> {
        let number = |name| self.optional(&self.key(name), Value::as_f64);
        let kind = self.optional(&self.key("rope.scaling.type"), Value::as_str)?;
        if kind == "none" {
            return None;
        }
        let mut scaling = json!({
            "rope_type": kind,
            "factor": number("rope.scaling.factor").unwrap_or(1.0),
        });
        let length = self.optional(
            &self.key("rope.scaling.original_context_length"),
            Value::as_u64,
        );
        if let Some(length) = length {
            scaling["original_max_position_embeddings"] = length.into();
        }
        for (field, name) in [
            ("beta_fast", "rope.scaling.yarn_beta_fast"),
            ("beta_slow", "rope.scaling.yarn_beta_slow"),
        ] {
            if let Some(value) = number(name) {
                scaling[field] = value.into();
            }
        }
        Some(scaling)
    }

    /// Returns what a `generation_config.json` would say: the tokens that end a generation, and
    /// sampling values if the file recommends some.
    pub(super) fn generation_config(&self) -> serde_json::Value {
        let mut config = Map::new();
        let id = |key| self.optional(key, Value::as_u64);
        if let Some(bos) = id("tokenizer.ggml.bos_token_id") {
            config.insert("bos_token_id".to_owned(), bos.into());
        }
        let ends = self.end_token_ids();
        if !ends.is_empty() {
            config.insert("eos_token_id".to_owned(), json!(ends));
        }
        for (field, key) in [
            ("temperature", "general.sampling.temp"),
            ("top_p", "general.sampling.top_p"),
            ("min_p", "general.sampling.min_p"),
            ("repetition_penalty", "general.sampling.penalty_repeat"),
        ] {
            if let Some(value) = self.optional(key, Value::as_f64) {
                config.insert(field.to_owned(), value.into());
            }
        }
        if let Some(top_k) = id("general.sampling.top_k") {
            config.insert("top_k".to_owned(), top_k.into());
        }
        config.into()
    }

    /// Returns the tokens that end a generation, the declared ones first.
    ///
    /// Converters declare one or two; the others that the model was trained to end with are
    /// found by their spelling, as llama.cpp does.
    fn end_token_ids(&self) -> Vec<u64> {
        let mut ends: Vec<u64> = Vec::new();
        let mut add = |id| {
            if !ends.contains(&id) {
                ends.push(id);
            }
        };
        for name in ["eos", "eot", "eom"] {
            let key = format!("tokenizer.ggml.{name}_token_id");
            self.optional(&key, Value::as_u64).map(&mut add);
        }
        let tokens = self.optional("tokenizer.ggml.tokens", Value::as_array);
        let types = self.optional("tokenizer.ggml.token_type", Value::as_array);
        let tokens = tokens.unwrap_or_default().iter();
        for (id, (token, kind)) in tokens.zip(types.unwrap_or_default()).enumerate() {
            let ends_text = |text| END_TOKENS.contains(&text);
            if kind.as_u64() == Some(CONTROL_TOKEN) && token.as_str().is_some_and(ends_text) {
                add(id as u64);
            }
        }
        ends
    }

    /// Returns the vocabulary.
    ///
    /// # Errors
    /// [`WeightsError::GgufMetadata`] when there is none or an entry has another type.
    pub(super) fn vocabulary(&self) -> Result<GgufVocabulary, WeightsError> {
        let id = |name: &str| {
            let id = self.optional(&format!("tokenizer.ggml.{name}_token_id"), Value::as_u64);
            id.and_then(|id| u32::try_from(id).ok())
        };
        let flag = |key| self.optional(key, Value::as_bool);
        Ok(GgufVocabulary {
            model: self.required("tokenizer.ggml.model", owned_text)?,
            pre: self.optional("tokenizer.ggml.pre", owned_text),
            tokens: self.required("tokenizer.ggml.tokens", |value| list(value, owned_text))?,
            token_types: self.list_or_empty("tokenizer.ggml.token_type", |value| match value {
                Value::Signed(kind) => i32::try_from(*kind).ok(),
                value => value.as_u64().and_then(|kind| i32::try_from(kind).ok()),
            })?,
            merges: self.list_or_empty("tokenizer.ggml.merges", owned_text)?,
            scores: self.list_or_empty("tokenizer.ggml.scores", |value| {
                value.as_f64().map(|score| score as f32)
            })?,
            bos: id("bos"),
            eos: id("eos"),
            eot: id("eot"),
            unknown: id("unknown"),
            padding: id("padding"),
            add_bos: flag("tokenizer.ggml.add_bos_token"),
            add_eos: flag("tokenizer.ggml.add_eos_token"),
            add_space_prefix: flag("tokenizer.ggml.add_space_prefix"),
            chat_template: self.optional("tokenizer.chat_template", owned_text),
            named_chat_templates: self.named_chat_templates(),
        })
    }

    fn named_chat_templates(&self) -> Vec<(String, String)> {
        let named = self.values.iter().filter_map(|(key, template)| {
            let name = key.strip_prefix("tokenizer.chat_template.")?;
            Some((name.to_owned(), owned_text(template)?))
        });
        named.collect()
    }

    fn list_or_empty<T>(
        &self,
        key: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<Vec<T>, WeightsError> {
        if !self.values.contains_key(key) {
            return Ok(Vec::new());
        }
        self.required(key, |value| list(value, read))
    }

    /// Gives a tensor its Hugging Face name, and notes the row order that goes with it.
    ///
    /// A name that no rule covers stays as it is.
    ///
    /// # Errors
    /// [`WeightsError::GgufMetadata`] when the number of heads is missing, and
    /// [`WeightsError::UnevenShard`] when it does not fit the rows of q or k.
    pub(super) fn to_hf(
        &self,
        name: &str,
        entry: &mut TensorEntry,
    ) -> Result<String, WeightsError> {
        let hf_name = hf_name(name).unwrap_or_else(|| name.to_owned());
        if self.architecture == "llama" && matches!(part_of(name), Some("attn_q" | "attn_k")) {
            let count = |heads: u64| usize::try_from(heads).unwrap_or(usize::MAX);
            let heads = HeadCounts {
                query: count(self.num_heads()?),
                key_value: count(self.num_kv_heads()?),
            };
            let num_rows = entry.shape.first().copied().unwrap_or(0);
            entry.row_order = RowOrder::of(&self.architecture, name, num_rows, heads)?;
        }
        Ok(hf_name)
    }
}

fn owned_text(value: &Value) -> Option<String> {
    value.as_str().map(str::to_owned)
}

fn list<T>(value: &Value, read: impl Fn(&Value) -> Option<T>) -> Option<Vec<T>> {
    value.as_array()?.iter().map(read).collect()
}
