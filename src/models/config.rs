//! A model's shape, read from Hugging Face's `config.json`.
//!
//! What the architectures share is read here; what differs is in `qwen2.rs`, `qwen3.rs` and
//! `llama.rs`, one function each. Everything is checked here, once.

use serde_json::Value;

use crate::layers::{RopeConfig, RopeScaling};

use super::{ModelError, llama, qwen2, qwen3};

/// The decoder families infold runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// Qwen2 and Qwen2.5: biases on q, k and v.
    Qwen2,
    /// Qwen3 (dense): an RMS norm on each head of q and k.
    Qwen3,
    /// Llama 2, 3.x and models of that shape, SmolLM2 included.
    Llama,
}

impl Architecture {
    /// Returns the `model_type` of `config.json`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Llama => "llama",
        }
    }
}

/// The shape of a decoder and the numbers its forward pass needs.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// The family.
    pub architecture: Architecture,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside the MLP.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_layers: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads.
    pub num_kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Rows of the embedding, the number of logits.
    pub vocab_size: usize,
    /// Added to the mean square in every RMS norm.
    pub rms_norm_eps: f32,
    /// Longest sequence the model was made for.
    pub max_position_embeddings: usize,
    /// Rotary embedding.
    pub rope: RopeConfig,
    /// Whether the output head is the embedding.
    pub tie_word_embeddings: bool,
    /// Whether q, k and v have a bias.
    pub qkv_bias: bool,
    /// Whether the attention's output projection has a bias.
    pub o_bias: bool,
    /// Whether the MLP's linears have biases.
    pub mlp_bias: bool,
    /// Whether each head of q and k passes an RMS norm.
    pub qk_norm: bool,
}

impl ModelConfig {
    /// Reads a parsed `config.json`.
    ///
    /// # Errors
    /// [`ModelError`] naming the key that is missing, of another type, contradictory, or asks for
    /// something that infold does not run.
    pub fn from_json(json: &Value) -> Result<Self, ModelError> {
        let keys = Keys(json);
        let architecture = architecture(&keys)?;
        let num_heads = keys.usize("num_attention_heads")?;
        let hidden_size = keys.usize("hidden_size")?;
        let head_dim = match keys.opt_usize("head_dim")? {
            Some(head_dim) => head_dim,
            None if architecture == Architecture::Qwen3 => qwen3::DEFAULT_HEAD_DIM,
            None if hidden_size.is_multiple_of(num_heads) => hidden_size / num_heads,
            None => {
                return Err(keys.invalid(
                    "hidden_size",
                    format!("a multiple of num_attention_heads ({num_heads})"),
                ));
            }
        };
        let shared = Self {
            architecture,
            hidden_size,
            intermediate_size: keys.usize("intermediate_size")?,
            num_layers: keys.usize("num_hidden_layers")?,
            num_heads,
            num_kv_heads: keys.opt_usize("num_key_value_heads")?.unwrap_or(num_heads),
            head_dim,
            vocab_size: keys.usize("vocab_size")?,
            rms_norm_eps: keys.opt_f64("rms_norm_eps")?.unwrap_or(1e-6) as f32,
            max_position_embeddings: keys.opt_usize("max_position_embeddings")?.unwrap_or(2048),
            rope: rope(&keys)?,
            tie_word_embeddings: keys.opt_bool("tie_word_embeddings")?.unwrap_or(false),
            qkv_bias: false,
            o_bias: false,
            mlp_bias: false,
            qk_norm: false,
        };
        shared.check(&keys)?;
        match architecture {
            Architecture::Qwen2 => qwen2::complete(shared, &keys),
            Architecture::Qwen3 => qwen3::complete(shared, &keys),
            Architecture::Llama => llama::complete(shared, &keys),
        }
    }

    /// Returns the most tokens that the rotary embedding was made or scaled for.
    ///
    /// Linear scaling and YaRN stretch a length that `config.json` gives unscaled; Llama 3's files
    /// give the stretched one. As vLLM derives it.
    pub fn longest_sequence(&self) -> usize {
        let stretched = match &self.rope.scaling {
            RopeScaling::Default | RopeScaling::Llama3 { .. } => 0.0,
            RopeScaling::Linear { factor } => self.max_position_embeddings as f64 * factor,
            RopeScaling::Yarn {
                factor,
                original_max_position_embeddings: original,
                ..
            } => *original as f64 * factor,
        };
        self.max_position_embeddings.max(stretched as usize)
    }

    fn check(&self, keys: &Keys<'_>) -> Result<(), ModelError> {
        if !self.num_heads.is_multiple_of(self.num_kv_heads) {
            let wanted = format!("a divisor of num_attention_heads ({})", self.num_heads);
            return Err(keys.invalid("num_key_value_heads", wanted));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(keys.invalid("head_dim", "an even number".to_owned()));
        }
        if let Some(act) = keys.opt_str("hidden_act")?
            && act != "silu"
        {
            return Err(keys.invalid("hidden_act", "\"silu\"".to_owned()));
        }
        if keys.get("quantization_config").is_some() {
            return Err(ModelError::Unsupported {
                what: "quantization_config (GPTQ, AWQ, bitsandbytes, FP8)".to_owned(),
                advice: "use the unquantised checkpoint or a GGUF file".to_owned(),
            });
        }
        Ok(())
    }

    /// Checks that `tensor_parallel_size` ranks can share this model.
    ///
    /// # Errors
    /// [`ModelError::TensorParallel`] with the sizes that work.
    pub fn check_tensor_parallel(&self, tensor_parallel_size: usize) -> Result<(), ModelError> {
        let fits = |size: usize| {
            size > 0
                && self.num_heads.is_multiple_of(size)
                && self.intermediate_size.is_multiple_of(size)
                && (self.num_kv_heads.is_multiple_of(size)
                    || size.is_multiple_of(self.num_kv_heads))
        };
        if fits(tensor_parallel_size) {
            return Ok(());
        }
        let sizes: Vec<String> = (1..=self.num_heads)
            .filter(|&size| fits(size))
            .map(|size| size.to_string())
            .collect();
        Err(ModelError::TensorParallel {
            tensor_parallel_size,
            num_heads: self.num_heads,
            num_kv_heads: self.num_kv_heads,
            intermediate_size: self.intermediate_size,
            sizes: sizes.join(", "),
        })
    }
}

fn architecture(keys: &Keys<'_>) -> Result<Architecture, ModelError> {
    match keys.opt_str("model_type")? {
        Some("qwen2") => Ok(Architecture::Qwen2),
        Some("qwen3") => Ok(Architecture::Qwen3),
        Some("llama") => Ok(Architecture::Llama),
        Some(other) => Err(ModelError::Unsupported {
            what: format!("model_type \"{other}\""),
            advice: "infold runs qwen2 (Qwen2.5 too), qwen3 (dense) and llama (SmolLM2 too)"
                .to_owned(),
        }),
        None => Err(ModelError::MissingKey {
            key: "model_type".to_owned(),
        }),
    }
}

/// Reads `rope_theta` and `rope_scaling`, or transformers 5's `rope_parameters` that holds both.
fn rope(keys: &Keys<'_>) -> Result<RopeConfig, ModelError> {
    let parameters = keys.get("rope_parameters");
    let scaling = parameters.or_else(|| keys.get("rope_scaling"));
    let nested = scaling.map(Keys);
    let theta = match keys.opt_f64("rope_theta")? {
        Some(theta) => Some(theta),
        None => nested
            .as_ref()
            .map(|keys| keys.opt_f64("rope_theta"))
            .transpose()?
            .flatten(),
    };
    let factors = keys.opt_f32_list("rope_freq_factors")?;
    let scaling = match &nested {
        Some(nested) => rope_scaling(nested, keys)?,
        None => RopeScaling::Default,
    };
    Ok(RopeConfig {
        theta: theta.unwrap_or(10_000.0),
        scaling,
        freq_factors: factors,
    })
}

fn rope_scaling(scaling: &Keys<'_>, config: &Keys<'_>) -> Result<RopeScaling, ModelError> {
    let kind = match scaling.opt_str("rope_type")? {
        Some(kind) => Some(kind),
        None => scaling.opt_str("type")?,
    };
    let original = match scaling.opt_usize("original_max_position_embeddings")? {
        Some(original) => Some(original),
        None => config.opt_usize("max_position_embeddings")?,
    };
    let original = || original.ok_or_else(|| scaling.missing("original_max_position_embeddings"));
    match kind {
        None | Some("default") => Ok(RopeScaling::Default),
        Some("linear") => Ok(RopeScaling::Linear {
            factor: scaling.f64("factor")?,
        }),
        Some("llama3") => Ok(RopeScaling::Llama3 {
            factor: scaling.f64("factor")?,
            low_freq_factor: scaling.f64("low_freq_factor")?,
            high_freq_factor: scaling.f64("high_freq_factor")?,
            original_max_position_embeddings: original()?,
        }),
        Some("yarn") => Ok(RopeScaling::Yarn {
            factor: scaling.f64("factor")?,
            beta_fast: scaling.opt_f64("beta_fast")?.unwrap_or(32.0),
            beta_slow: scaling.opt_f64("beta_slow")?.unwrap_or(1.0),
            attention_factor: scaling.opt_f64("attention_factor")?,
            mscale: scaling.opt_f64("mscale")?,
            mscale_all_dim: scaling.opt_f64("mscale_all_dim")?,
            truncate: scaling.opt_bool("truncate")?.unwrap_or(true),
            original_max_position_embeddings: original()?,
        }),
        Some(other) => Err(ModelError::Unsupported {
            what: format!("rope scaling \"{other}\""),
            advice: "infold computes default, linear, llama3 and yarn".to_owned(),
        }),
    }
}

/// Typed access to a JSON object; `null` counts as absent.
pub(super) struct Keys<'a>(&'a Value);

impl Keys<'_> {
    fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    fn missing(&self, key: &str) -> ModelError {
        ModelError::MissingKey {
            key: key.to_owned(),
        }
    }

    /// Returns the error of a key whose value is not `wanted`.
    pub(super) fn invalid(&self, key: &str, wanted: String) -> ModelError {
        let found = self
            .get(key)
            .map_or_else(|| "nothing".to_owned(), Value::to_string);
        ModelError::InvalidKey {
            key: key.to_owned(),
            wanted,
            found,
        }
    }

    fn typed<'v, T>(
        &'v self,
        key: &str,
        wanted: &str,
        read: impl Fn(&'v Value) -> Option<T>,
    ) -> Result<Option<T>, ModelError> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => match read(value) {
                Some(read) => Ok(Some(read)),
                None => Err(self.invalid(key, wanted.to_owned())),
            },
        }
    }

    /// Returns a positive whole number, if there.
    pub(super) fn opt_usize(&self, key: &str) -> Result<Option<usize>, ModelError> {
        self.typed(key, "a positive whole number", |value| {
            value
                .as_u64()
                .filter(|&n| n > 0 && n < 1 << 40)
                .map(|n| n as usize)
        })
    }

    fn usize(&self, key: &str) -> Result<usize, ModelError> {
        self.opt_usize(key)?.ok_or_else(|| self.missing(key))
    }

    fn opt_f64(&self, key: &str) -> Result<Option<f64>, ModelError> {
        self.typed(key, "a number", Value::as_f64)
    }

    fn f64(&self, key: &str) -> Result<f64, ModelError> {
        self.opt_f64(key)?.ok_or_else(|| self.missing(key))
    }

    fn opt_f32_list(&self, key: &str) -> Result<Option<Vec<f32>>, ModelError> {
        self.typed(key, "a list of numbers", |value| {
            value
                .as_array()?
                .iter()
                .map(|item| item.as_f64().map(|n| n as f32))
                .collect()
        })
    }

    /// Returns a truth value, if there.
    pub(super) fn opt_bool(&self, key: &str) -> Result<Option<bool>, ModelError> {
        self.typed(key, "true or false", Value::as_bool)
    }

    fn opt_str(&self, key: &str) -> Result<Option<&str>, ModelError> {
        self.typed(key, "a string", Value::as_str)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn longest_sequence(scaling: Value) -> usize {
        let config = json!({
            "model_type": "qwen2", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "vocab_size": 100, "max_position_embeddings": 1000,
            "rope_scaling": scaling,
        });
        ModelConfig::from_json(&config).unwrap().longest_sequence()
    }

    #[test]
    fn rope_scaling_stretches_the_longest_sequence() {
        assert_eq!(longest_sequence(json!(null)), 1000);
        let linear = json!({"rope_type": "linear", "factor": 2.5});
        assert_eq!(longest_sequence(linear), 2500);
        let yarn = json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1000});
        assert_eq!(longest_sequence(yarn), 4000);
        // Some files give the stretched length in both places.
        let yarn = json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 250});
        assert_eq!(longest_sequence(yarn), 1000);
        let llama3 = json!({
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 500,
        });
        assert_eq!(longest_sequence(llama3), 1000);
    }
}
