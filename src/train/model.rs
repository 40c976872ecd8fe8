//! The frozen base: every weight as it is stored, none of them ever written.
//!
//! Dense weights stay in the checkpoint's precision, mapped from its files where the source maps
//! them; block formats (GGUF) are widened to f32 at load. Names and shapes are Hugging Face's.

use candle_core::{Result as TensorResult, Tensor};

use crate::kernels::{Kernels, Matrix};
use crate::layers::RotaryEmbedding;
use crate::models::ModelConfig;
use crate::weights::TensorSource;

use super::TrainError;
use super::lora::Linear;

/// One linear of the base.
pub(super) struct FrozenLinear {
    pub(super) weight: Matrix,
    pub(super) bias: Option<Tensor>,
}

/// One decoder layer of the base.
pub(super) struct FrozenLayer {
    pub(super) input_norm: Tensor,
    pub(super) post_attention_norm: Tensor,
    /// Norms on the heads of q and k.
    pub(super) qk_norm: Option<(Tensor, Tensor)>,
    /// In the order of [`Linear::ALL`].
    linears: Vec<FrozenLinear>,
}

impl FrozenLayer {
    /// Returns one linear.
    pub(super) fn linear(&self, linear: Linear) -> &FrozenLinear {
        &self.linears[linear as usize]
    }
}

/// The base of one rank.
pub struct FrozenModel {
    pub(super) config: ModelConfig,
    pub(super) embedding: Matrix,
    pub(super) layers: Vec<FrozenLayer>,
    pub(super) norm: Tensor,
    lm_head: Option<Matrix>,
    pub(super) rotary: RotaryEmbedding,
}

impl FrozenModel {
    /// Loads the base; rotary tables reach `max_positions`.
    ///
    /// # Errors
    /// [`TrainError::Weights`] naming the tensor that is missing or of another shape.
    pub fn load(
        source: &dyn TensorSource,
        config: &ModelConfig,
        kernels: &Kernels,
        max_positions: usize,
    ) -> Result<Self, TrainError> {
        let loader = BaseLoader {
            source,
            kernels,
            config,
        };
        let ModelConfig {
            vocab_size,
            hidden_size,
            head_dim,
            ..
        } = *config;
        let table = [vocab_size, hidden_size];
        let rotary = RotaryEmbedding::new(&config.rope, head_dim, max_positions, kernels.device())
            .map_err(TrainError::kernel("rotary embedding"))?;
        let layers = (0..config.num_layers)
            .map(|index| loader.layer(index))
            .collect::<Result<_, _>>()?;
        let lm_head = match config.tie_word_embeddings {
            true => None,
            false => Some(loader.matrix("lm_head.weight", table)?),
        };
        Ok(Self {
            config: config.clone(),
            embedding: loader.matrix("model.embed_tokens.weight", table)?,
            layers,
            norm: loader.vector("model.norm.weight", hidden_size)?,
            lm_head,
            rotary,
        })
    }

    /// Returns the shape of the model.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Returns the output head, which may be the embedding.
    pub(super) fn lm_head(&self) -> &Matrix {
        self.lm_head.as_ref().unwrap_or(&self.embedding)
    }
}

/// Takes tensors out of a source by name and shape.
struct BaseLoader<'a> {
    source: &'a dyn TensorSource,
    kernels: &'a Kernels,
    config: &'a ModelConfig,
}

impl BaseLoader<'_> {
    fn layer(&self, index: usize) -> Result<FrozenLayer, TrainError> {
        let prefix = format!("model.layers.{index}");
        let norm = |name: &str, len| self.vector(&format!("{prefix}.{name}.weight"), len);
        let ModelConfig {
            hidden_size,
            head_dim,
            qk_norm,
            ..
        } = *self.config;
        let qk_norm = match qk_norm {
            false => None,
            true => Some((
                norm("self_attn.q_norm", head_dim)?,
                norm("self_attn.k_norm", head_dim)?,
            )),
        };
        Ok(FrozenLayer {
            input_norm: norm("input_layernorm", hidden_size)?,
            post_attention_norm: norm("post_attention_layernorm", hidden_size)?,
            qk_norm,
            linears: Linear::ALL
                .into_iter()
                .map(|linear| self.linear(linear, index))
                .collect::<Result<_, _>>()?,
        })
    }

    fn linear(&self, linear: Linear, layer: usize) -> Result<FrozenLinear, TrainError> {
        let shape = linear.shape(self.config);
        let path = linear.path(layer);
        let has_bias = match linear {
            Linear::Q | Linear::K | Linear::V => self.config.qkv_bias,
            Linear::O => self.config.o_bias,
            Linear::Gate | Linear::Up | Linear::Down => self.config.mlp_bias,
        };
        let bias = match has_bias {
            false => None,
            true => Some(self.vector(&format!("{path}.bias"), shape[0])?),
        };
        Ok(FrozenLinear {
            weight: self.matrix(&format!("{path}.weight"), shape)?,
            bias,
        })
    }

    fn matrix(&self, name: &str, shape: [usize; 2]) -> Result<Matrix, TrainError> {
        let tensor = self.source.tensor(name)?;
        tensor.expect_shape(&shape)?;
        let matrix = self
            .kernels
            .load_matrix(tensor.dtype, shape[0], shape[1], tensor.data)
            .map_err(TrainError::kernel(format!("tensor \"{name}\"")))?;
        Ok(self.kernels.widen(matrix))
    }

    fn vector(&self, name: &str, len: usize) -> Result<Tensor, TrainError> {
        let tensor = self.source.tensor(name)?;
        tensor.expect_shape(&[len])?;
        let vector: TensorResult<Tensor> =
            self.kernels.load_vector(tensor.dtype, len, &tensor.data);
        vector.map_err(TrainError::kernel(format!("tensor \"{name}\"")))
    }
}
