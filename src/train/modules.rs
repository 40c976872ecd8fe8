//! The modules of a decoder that can be trained: their names in the checkpoint and their shapes.

use crate::models::ModelConfig;

/// A linear of a decoder layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Linear {
    /// Queries.
    Q,
    /// Keys.
    K,
    /// Values.
    V,
    /// Output of the attention.
    O,
    /// Gates of the MLP.
    Gate,
    /// Inputs of the MLP.
    Up,
    /// Output of the MLP.
    Down,
}

impl Linear {
    /// All linears in the order of the decoder.
    pub const ALL: [Self; 7] = [
        Self::Q,
        Self::K,
        Self::V,
        Self::O,
        Self::Gate,
        Self::Up,
        Self::Down,
    ];

    /// Returns the module's name in the checkpoint.
    pub fn name(self) -> &'static str {
        match self {
            Self::Q => "q_proj",
            Self::K => "k_proj",
            Self::V => "v_proj",
            Self::O => "o_proj",
            Self::Gate => "gate_proj",
            Self::Up => "up_proj",
            Self::Down => "down_proj",
        }
    }

    /// Returns the module's full name, as `model.layers.3.self_attn.q_proj`.
    pub fn path(self, layer: usize) -> String {
        let block = match self {
            Self::Q | Self::K | Self::V | Self::O => "self_attn",
            Self::Gate | Self::Up | Self::Down => "mlp",
        };
        format!("model.layers.{layer}.{block}.{}", self.name())
    }

    /// Returns `[out_features, in_features]`.
    pub fn shape(self, config: &ModelConfig) -> [usize; 2] {
        let hidden = config.hidden_size;
        let heads = config.num_heads * config.head_dim;
        let kv_heads = config.num_kv_heads * config.head_dim;
        match self {
            Self::Q => [heads, hidden],
            Self::K | Self::V => [kv_heads, hidden],
            Self::O => [hidden, heads],
            Self::Gate | Self::Up => [config.intermediate_size, hidden],
            Self::Down => [hidden, config.intermediate_size],
        }
    }

    /// Says whether the linear has a bias `[out_features]`.
    pub fn has_bias(self, config: &ModelConfig) -> bool {
        match self {
            Self::Q | Self::K | Self::V => config.qkv_bias,
            Self::O => config.o_bias,
            Self::Gate | Self::Up | Self::Down => config.mlp_bias,
        }
    }
}

/// A norm of a decoder layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum LayerNorm {
    /// Before the attention.
    Input,
    /// Before the MLP.
    PostAttention,
    /// On the heads of the queries.
    Q,
    /// On the heads of the keys.
    K,
}

/// A module with weights of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Module {
    /// The table of token embeddings.
    Embedding,
    /// A linear of a layer.
    Linear(usize, Linear),
    /// A norm of a layer.
    LayerNorm(usize, LayerNorm),
    /// The norm after the last layer.
    Norm,
    /// The output head, which may share the embedding's weight.
    LmHead,
}

impl Module {
    /// Returns all modules of a model in the order of the decoder.
    pub fn all(config: &ModelConfig) -> Vec<Self> {
        let mut modules = vec![Self::Embedding];
        for layer in 0..config.num_layers {
            modules.extend(Linear::ALL.map(|linear| Self::Linear(layer, linear)));
            if config.qk_norm {
                modules.extend([LayerNorm::Q, LayerNorm::K].map(|n| Self::LayerNorm(layer, n)));
            }
            let norms = [LayerNorm::Input, LayerNorm::PostAttention];
            modules.extend(norms.map(|norm| Self::LayerNorm(layer, norm)));
        }
        modules.extend([Self::Norm, Self::LmHead]);
        modules
    }

    /// Returns the module's full name, as `model.embed_tokens`.
    pub fn path(self) -> String {
        let norm = |layer, name| format!("model.layers.{layer}.{name}");
        match self {
            Self::Embedding => "model.embed_tokens".to_owned(),
            Self::Linear(layer, linear) => linear.path(layer),
            Self::LayerNorm(layer, LayerNorm::Input) => norm(layer, "input_layernorm"),
            Self::LayerNorm(layer, LayerNorm::PostAttention) => {
                norm(layer, "post_attention_layernorm")
            }
            Self::LayerNorm(layer, LayerNorm::Q) => norm(layer, "self_attn.q_norm"),
            Self::LayerNorm(layer, LayerNorm::K) => norm(layer, "self_attn.k_norm"),
            Self::Norm => "model.norm".to_owned(),
            Self::LmHead => "lm_head".to_owned(),
        }
    }

    /// Returns the last part of the name.
    pub fn name(self) -> String {
        let path = self.path();
        path.rsplit('.').next().unwrap_or_default().to_owned()
    }

    /// Returns the shape of the weight: `[out, in]`, `[vocab_size, hidden_size]`, or `[len]` of a
    /// norm.
    pub fn shape(self, config: &ModelConfig) -> Vec<usize> {
        match self {
            Self::Embedding | Self::LmHead => vec![config.vocab_size, config.hidden_size],
            Self::Linear(_, linear) => linear.shape(config).to_vec(),
            Self::LayerNorm(_, LayerNorm::Q | LayerNorm::K) => vec![config.head_dim],
            Self::LayerNorm(..) | Self::Norm => vec![config.hidden_size],
        }
    }

    /// Says whether the module has a bias `[out]`.
    pub fn has_bias(self, config: &ModelConfig) -> bool {
        match self {
            Self::Linear(_, linear) => linear.has_bias(config),
            _ => false,
        }
    }

    /// Returns the name of the checkpoint's tensor with the weight: a tied head has none of its
    /// own.
    pub fn weight_name(self, config: &ModelConfig) -> String {
        let module = match self {
            Self::LmHead if config.tie_word_embeddings => Self::Embedding,
            other => other,
        };
        format!("{}.weight", module.path())
    }

    /// Returns the layer that the module lies in.
    pub fn layer(self) -> Option<usize> {
        match self {
            Self::Linear(layer, _) | Self::LayerNorm(layer, _) => Some(layer),
            Self::Embedding | Self::Norm | Self::LmHead => None,
        }
    }
}

/// Returns the last parts of the names of modules, each once.
pub(super) fn names(modules: impl IntoIterator<Item = Module>) -> Vec<String> {
    let mut names = Vec::new();
    for module in modules {
        let name = module.name();
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
}
