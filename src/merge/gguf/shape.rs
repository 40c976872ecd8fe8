//! The numbers of `config.json` that a GGUF file repeats, and the tensor shapes that follow.

use anyhow::{Context, bail, ensure};
use serde_json::Value;

use crate::weights::HeadCounts;

/// A decoder's shape.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct ModelShape {
    /// `model_type`, which is llama.cpp's architecture too: `qwen2`, `qwen3` or `llama`.
    pub(super) architecture: String,
    pub(super) hidden_size: usize,
    pub(super) intermediate_size: usize,
    pub(super) num_layers: usize,
    pub(super) heads: HeadCounts,
    pub(super) head_dim: usize,
    /// Whether `head_dim` does not just follow from the others; only then is it metadata.
    pub(super) explicit_head_dim: bool,
    pub(super) vocab_size: usize,
    pub(super) max_position_embeddings: usize,
    pub(super) rms_norm_eps: f32,
    pub(super) rope_theta: f64,
    pub(super) rope_scaling: RopeScaling,
    /// Divisors of the rotary frequencies that a GGUF file held.
    pub(super) rope_freq_factors: Option<Vec<f32>>,
    pub(super) tie_word_embeddings: bool,
}

/// How positions beyond the trained length are squeezed in.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum RopeScaling {
    None,
    Linear {
        factor: f64,
    },
    Yarn {
        factor: f64,
        original_context_length: usize,
        beta_fast: Option<f64>,
        beta_slow: Option<f64>,
    },
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_context_length: usize,
    },
}

impl ModelShape {
    /// Reads a parsed `config.json`.
    ///
    /// # Errors
    /// A key that is missing or of another type, or what llama.cpp has no words for.
    pub(super) fn from_config(config: &Value) -> anyhow::Result<Self> {
        let architecture = text(config, "model_type").context("config.json has no model_type")?;
        ensure!(
            matches!(architecture, "qwen2" | "qwen3" | "llama"),
            "model_type {architecture:?} cannot be written as GGUF here, only qwen2, qwen3 and \
             llama can"
        );
        ensure!(
            present(config, "quantization_config").is_none(),
            "config.json has a quantization_config: give the unquantised model"
        );
        let query = size(config, "num_attention_heads")?;
        let hidden_size = size(config, "hidden_size")?;
        let head_dim = match optional_size(config, "head_dim")? {
            // transformers' default, whatever the hidden size.
            None if architecture == "qwen3" => Some(128),
            head_dim => head_dim,
        };
        ensure!(
            head_dim.is_some() || hidden_size.is_multiple_of(query),
            "hidden_size {hidden_size} of config.json is not a multiple of num_attention_heads \
             {query}, and there is no head_dim"
        );
        // transformers 5 holds all about rotary embeddings in `rope_parameters`.
        let rope = present(config, "rope_parameters").or_else(|| present(config, "rope_scaling"));
        let theta = number(config, "rope_theta").or_else(|| number(rope?, "rope_theta"));
        Ok(Self {
            architecture: architecture.to_owned(),
            hidden_size,
            intermediate_size: size(config, "intermediate_size")?,
            num_layers: size(config, "num_hidden_layers")?,
            heads: HeadCounts {
                query,
                key_value: optional_size(config, "num_key_value_heads")?.unwrap_or(query),
            },
            head_dim: head_dim.unwrap_or(hidden_size / query),
            explicit_head_dim: head_dim.is_some(),
            vocab_size: size(config, "vocab_size")?,
            max_position_embeddings: size(config, "max_position_embeddings")?,
            rms_norm_eps: number(config, "rms_norm_eps").unwrap_or(1e-6) as f32,
            rope_theta: theta.unwrap_or(10_000.0),
            rope_scaling: match rope {
                Some(rope) => rope_scaling(rope, config)?,
                None => RopeScaling::None,
            },
            rope_freq_factors: present(config, "rope_freq_factors").and_then(numbers),
            tie_word_embeddings: present(config, "tie_word_embeddings")
                .and_then(Value::as_bool)
                .unwrap_or(false),
        })
    }

    /// Returns the shape of a tensor by its GGUF name; `None` for a part that no supported
    /// architecture has.
    pub(super) fn tensor_shape(&self, gguf_name: &str) -> Option<Vec<usize>> {
        let (stem, kind) = gguf_name.rsplit_once('.')?;
        let part = match stem.strip_prefix("blk.") {
            Some(rest) => rest.split_once('.')?.1,
            None => stem,
        };
        let query = self.heads.query * self.head_dim;
        let key_value = self.heads.key_value * self.head_dim;
        let shape = match part {
            "token_embd" | "output" => vec![self.vocab_size, self.hidden_size],
            "output_norm" | "attn_norm" | "ffn_norm" => vec![self.hidden_size],
            "attn_q" => vec![query, self.hidden_size],
            "attn_k" | "attn_v" => vec![key_value, self.hidden_size],
            "attn_output" => vec![self.hidden_size, query],
            "attn_q_norm" | "attn_k_norm" => vec![self.head_dim],
            "ffn_gate" | "ffn_up" => vec![self.intermediate_size, self.hidden_size],
            "ffn_down" => vec![self.hidden_size, self.intermediate_size],
            _ => return None,
        };
        Some(match kind {
            "bias" => shape[..1].to_vec(),
            _ => shape,
        })
    }

    /// Returns the divisors of the rotary frequencies, `[head_dim / 2]`, that a file holds as a
    /// tensor: Llama 3's scaling has no metadata.
    pub(super) fn rope_factors(&self) -> Option<Vec<f32>> {
        let RopeScaling::Llama3 {
            factor,
            low_freq_factor: low,
            high_freq_factor: high,
            original_context_length,
        } = self.rope_scaling
        else {
            return self.rope_freq_factors.clone();
        };
        let factors = (0..self.head_dim / 2).map(|pair| {
            let exponent = 2.0 * pair as f64 / self.head_dim as f64;
            let wavelength = 2.0 * std::f64::consts::PI * self.rope_theta.powf(exponent);
            let turns = original_context_length as f64 / wavelength;
            // 1 / factor of a frequency is kept below `low` turns, all of it above `high`.
            let kept = ((turns - low) / (high - low)).clamp(0.0, 1.0);
            (1.0 / ((1.0 - kept) / factor + kept)) as f32
        });
        Some(factors.collect())
    }
}

fn rope_scaling(rope: &Value, config: &Value) -> anyhow::Result<RopeScaling> {
    let kind = text(rope, "rope_type").or_else(|| text(rope, "type"));
    let needed = |key: &str| {
        number(rope, key)
            .with_context(|| format!("rope scaling {kind:?} of config.json has no {key}"))
    };
    let original_context_length = || match optional_size(rope, "original_max_position_embeddings")?
    {
        Some(length) => Ok(length),
        None => size(config, "max_position_embeddings"),
    };
    Ok(match kind {
        None | Some("default") => RopeScaling::None,
        Some("linear") => RopeScaling::Linear {
            factor: needed("factor")?,
        },
        Some("llama3") => RopeScaling::Llama3 {
            factor: needed("factor")?,
            low_freq_factor: needed("low_freq_factor")?,
            high_freq_factor: needed("high_freq_factor")?,
            original_context_length: original_context_length()?,
        },
        Some("yarn") => {
            for key in ["attention_factor", "mscale", "mscale_all_dim"] {
                ensure!(
                    present(rope, key).is_none(),
                    "{key} of the yarn scaling in config.json has no counterpart in GGUF"
                );
            }
            RopeScaling::Yarn {
                factor: needed("factor")?,
                original_context_length: original_context_length()?,
                beta_fast: number(rope, "beta_fast"),
                beta_slow: number(rope, "beta_slow"),
            }
        }
        Some(other) => bail!("rope scaling {other:?} cannot be written as GGUF"),
    })
}

fn present<'a>(object: &'a Value, key: &str) -> Option<&'a Value> {
    object.get(key).filter(|value| !value.is_null())
}

fn text<'a>(object: &'a Value, key: &str) -> Option<&'a str> {
    present(object, key)?.as_str()
}

fn number(object: &Value, key: &str) -> Option<f64> {
    present(object, key)?.as_f64()
}

fn numbers(list: &Value) -> Option<Vec<f32>> {
    let numbers = list.as_array()?.iter();
    numbers.map(|item| Some(item.as_f64()? as f32)).collect()
}

fn optional_size(object: &Value, key: &str) -> anyhow::Result<Option<usize>> {
    let Some(value) = present(object, key) else {
        return Ok(None);
    };
    let size = value.as_u64().filter(|&size| size > 0 && size < 1 << 32);
    let size = size.with_context(|| {
        format!("{key} of config.json is {value}, a positive whole number is wanted")
    })?;
    Ok(Some(usize::try_from(size)?))
}

fn size(object: &Value, key: &str) -> anyhow::Result<usize> {
    optional_size(object, key)?.with_context(|| format!("config.json has no {key}"))
}
