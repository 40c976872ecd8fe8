//! Causal grouped-query attention over the paged KV cache.

use std::sync::Arc;

use candle_core::{Result, Tensor};

use crate::kernels::{KvBlocks, RopeAndCache};

use super::linear::{Bias, OutputSlice, even_part};
use super::{
    ColumnParallel, ForwardContext, LayerError, Loader, RmsNorm, RotaryEmbedding, RowParallel,
};

/// The numbers of a model's attention, whole model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads.
    pub num_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Bias of q, k and v.
    pub qkv_bias: Bias,
    /// Bias of the output projection.
    pub o_bias: Bias,
    /// Epsilon of the norms on the heads of q and k, where the model has them.
    pub qk_norm_eps: Option<f32>,
}

/// One rank's heads of an attention layer.
pub struct Attention {
    qkv: ColumnParallel,
    output: RowParallel,
    /// The norms on each head of q and of k, with their epsilon.
    qk_norm: Option<(RmsNorm, RmsNorm, f32)>,
    rotary: Arc<RotaryEmbedding>,
    num_heads: usize,
    num_kv_heads: usize,
    head_dim: usize,
}

impl Attention {
    /// Loads this rank's heads under `loader`. With more ranks than KV heads, neighbouring ranks
    /// hold the same KV head.
    ///
    /// # Errors
    /// [`LayerError`] naming the tensor.
    pub fn load(
        loader: &Loader<'_>,
        shape: &AttentionShape,
        rotary: Arc<RotaryEmbedding>,
    ) -> std::result::Result<Self, LayerError> {
        let AttentionShape {
            hidden_size,
            num_heads,
            num_kv_heads,
            head_dim,
            ..
        } = *shape;
        let (rank, world_size) = (loader.rank(), loader.world_size());
        let heads = even_part(num_heads, rank, world_size);
        let kv_heads = if num_kv_heads >= world_size {
            even_part(num_kv_heads, rank, world_size)
        } else {
            let head = rank * num_kv_heads / world_size;
            head..head + 1
        };
        let q_rows = heads.start * head_dim..heads.end * head_dim;
        let kv_rows = kv_heads.start * head_dim..kv_heads.end * head_dim;
        let kv = |name| OutputSlice {
            name,
            out_features: num_kv_heads * head_dim,
            rows: kv_rows.clone(),
        };
        let q = OutputSlice {
            name: "q_proj",
            out_features: num_heads * head_dim,
            rows: q_rows.clone(),
        };
        let qk_norm = match shape.qk_norm_eps {
            None => None,
            Some(eps) => Some((
                RmsNorm::load(&loader.at("q_norm"), head_dim, eps)?,
                RmsNorm::load(&loader.at("k_norm"), head_dim, eps)?,
                eps,
            )),
        };
        let o_shape = [hidden_size, num_heads * head_dim];
        Ok(Self {
            qkv: ColumnParallel::load(
                loader,
                hidden_size,
                &[q, kv("k_proj"), kv("v_proj")],
                shape.qkv_bias,
            )?,
            output: RowParallel::load(&loader.at("o_proj"), o_shape, q_rows, shape.o_bias)?,
            qk_norm,
            rotary,
            num_heads: heads.len(),
            num_kv_heads: kv_heads.len(),
            head_dim,
        })
    }

    /// Returns the number of KV heads that this rank's cache holds.
    pub fn num_kv_heads(&self) -> usize {
        self.num_kv_heads
    }

    /// Writes the batch's keys and values into `kv_blocks` and attends.
    ///
    /// `x` `[tokens, hidden_size]`; returns what this rank's heads read,
    /// `[tokens, num_heads * head_dim]`.
    ///
    /// # Errors
    /// When a kernel fails.
    pub fn attend(
        &self,
        x: &Tensor,
        context: &ForwardContext<'_>,
        kv_blocks: &mut KvBlocks,
    ) -> Result<Tensor> {
        let qkv = self.qkv.forward(x, context)?;
        let norms = self.qk_norm.as_ref();
        let args = RopeAndCache {
            num_heads: self.num_heads,
            num_kv_heads: self.num_kv_heads,
            head_dim: self.head_dim,
            q_norm: norms.map(|(q_norm, _, _)| q_norm.weight()),
            k_norm: norms.map(|(_, k_norm, _)| k_norm.weight()),
            eps: norms.map_or(0.0, |(_, _, eps)| *eps),
            cos: self.rotary.cos(),
            sin: self.rotary.sin(),
            batch: context.batch,
        };
        let scale = 1.0 / (self.head_dim as f32).sqrt();
        context
            .kernels
            .rope_and_attention(&qkv, &args, kv_blocks, scale)
    }

    /// Projects what [`Self::attend`] returned, or rows of it, beside the stream `residual`
    /// `[rows, hidden_size]`, and returns both as [`RowParallel::forward`] does.
    ///
    /// # Errors
    /// When a kernel fails.
    pub fn project(
        &self,
        attended: &Tensor,
        residual: Tensor,
        context: &ForwardContext<'_>,
    ) -> Result<(Option<Tensor>, Tensor)> {
        self.output.forward(attended, residual, context)
    }
}
