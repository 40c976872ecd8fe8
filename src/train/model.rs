//! The frozen base: every weight as it is stored, none of them ever written.
//!
//! Dense weights stay in the checkpoint's precision, mapped from its files where the source maps
//! them; block formats (GGUF) are widened to f32 at load. Names and shapes are Hugging Face's.

use std::sync::Arc;

use candle_core::{Result as TensorResult, Tensor};

use crate::distributed::Comm;
use crate::kernels::{Kernels, Matrix};
use crate::layers::RotaryEmbedding;
use crate::models::ModelConfig;
use crate::weights::TensorSource;

use super::TrainError;
use super::modules::Linear;
use super::sharded::ShardedLayers;

/// One linear of the base, its embedding or its output head.
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

/// Where the layers are.
enum Layers {
    /// All on this rank.
    Resident(Vec<Arc<FrozenLayer>>),
    /// In pieces on all ranks.
    Sharded(Box<ShardedLayers>),
}

/// The base of one rank.
pub struct FrozenModel {
    pub(super) config: ModelConfig,
    pub(super) embedding: FrozenLinear,
    layers: Layers,
    pub(super) norm: Tensor,
    lm_head: Option<FrozenLinear>,
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
        let layers = (0..config.num_layers)
            .map(|index| loader.layer(index).map(Arc::new))
            .collect::<Result<_, _>>()?;
        Self::with_layers(&loader, Layers::Resident(layers), max_positions)
    }

    /// Loads this rank's piece of every layer; `comm` is a group for gathering them alone. Every
    /// rank must then make the same passes in the same order.
    ///
    /// # Errors
    /// As [`FrozenModel::load`].
    pub fn load_sharded(
        source: &dyn TensorSource,
        config: &ModelConfig,
        kernels: &Kernels,
        max_positions: usize,
        comm: Comm,
    ) -> Result<Self, TrainError> {
        let loader = BaseLoader {
            source,
            kernels,
            config,
        };
        let layers = ShardedLayers::load(source, config, kernels, comm)?;
        Self::with_layers(&loader, Layers::Sharded(Box::new(layers)), max_positions)
    }

    fn with_layers(
        loader: &BaseLoader<'_>,
        layers: Layers,
        max_positions: usize,
    ) -> Result<Self, TrainError> {
        let (config, device) = (loader.config, loader.kernels.device());
        let table = [config.vocab_size, config.hidden_size];
        let rotary = RotaryEmbedding::new(&config.rope, config.head_dim, max_positions, device)
            .map_err(TrainError::kernel("rotary embedding"))?;
        let lm_head = match config.tie_word_embeddings {
            true => None,
            false => Some(loader.table("lm_head.weight", table)?),
        };
        Ok(Self {
            config: config.clone(),
            embedding: loader.table("model.embed_tokens.weight", table)?,
            layers,
            norm: loader.vector("model.norm.weight", config.hidden_size)?,
            lm_head,
            rotary,
        })
    }

    /// Returns a layer; `next` is the one that will be asked for after it.
    pub(super) fn layer(
        &self,
        index: usize,
        next: Option<usize>,
    ) -> TensorResult<Arc<FrozenLayer>> {
        match &self.layers {
            Layers::Resident(layers) => Ok(Arc::clone(&layers[index])),
            Layers::Sharded(layers) => layers.layer(index, next),
        }
    }

    /// Takes part in gathering for a pass in which this rank has nothing to compute: up all
    /// layers, and down again to `lowest` where there is one.
    pub(super) fn follow(&self, lowest: Option<usize>) -> TensorResult<()> {
        let Layers::Sharded(layers) = &self.layers else {
            return Ok(());
        };
        let last = self.config.num_layers - 1;
        for index in 0..=last {
            layers.layer(index, (index < last).then_some(index + 1))?;
        }
        for index in (lowest.unwrap_or(last + 1)..=last).rev() {
            layers.layer(index, (Some(index) > lowest).then(|| index - 1))?;
        }
        Ok(())
    }

    /// Returns the shape of the model.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Returns the output head, which may be the embedding.
    pub(super) fn lm_head(&self) -> &FrozenLinear {
        self.lm_head.as_ref().unwrap_or(&self.embedding)
    }
}

/// Takes tensors out of a source by name and shape.
pub(super) struct BaseLoader<'a> {
    pub(super) source: &'a dyn TensorSource,
    pub(super) kernels: &'a Kernels,
    pub(super) config: &'a ModelConfig,
}

impl BaseLoader<'_> {
    pub(super) fn layer(&self, index: usize) -> Result<FrozenLayer, TrainError> {
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
        let bias = match linear.has_bias(self.config) {
            false => None,
            true => Some(self.vector(&format!("{path}.bias"), shape[0])?),
        };
        Ok(FrozenLinear {
            weight: self.matrix(&format!("{path}.weight"), shape)?,
            bias,
        })
    }

    fn table(&self, name: &str, shape: [usize; 2]) -> Result<FrozenLinear, TrainError> {
        Ok(FrozenLinear {
            weight: self.matrix(name, shape)?,
            bias: None,
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
