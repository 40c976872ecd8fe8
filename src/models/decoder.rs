//! The decoder that Qwen2, Qwen3 and Llama share: pre-norm attention and gated MLP.

use std::sync::Arc;

use candle_core::{Result, Tensor};

use crate::kernels::KvBlocks;
use crate::layers::{
    Attention, AttentionShape, Bias, ForwardContext, LayerError, LmHead, Loader, Mlp, RmsNorm,
    RotaryEmbedding, VocabParallelEmbedding,
};

use super::ModelConfig;

/// One rank's part of a model.
pub struct Decoder {
    embedding: VocabParallelEmbedding,
    layers: Vec<DecoderLayer>,
    norm: RmsNorm,
    lm_head: LmHead,
}

struct DecoderLayer {
    input_norm: RmsNorm,
    attention: Attention,
    post_attention_norm: RmsNorm,
    mlp: Mlp,
}

impl Decoder {
    /// Loads this rank's part; rotary tables reach `max_model_len` positions.
    ///
    /// # Errors
    /// [`LayerError`] naming the tensor that is missing or does not fit.
    pub fn load(
        loader: &Loader<'_>,
        config: &ModelConfig,
        max_model_len: usize,
    ) -> std::result::Result<Self, LayerError> {
        let ModelConfig {
            vocab_size,
            hidden_size,
            rms_norm_eps,
            ..
        } = *config;
        let device = loader.kernels().device();
        let rotary = RotaryEmbedding::new(&config.rope, config.head_dim, max_model_len, device)
            .map_err(|source| LayerError::Kernel {
                tensor: "rotary embedding".to_owned(),
                source,
            })?;
        let rotary = Arc::new(rotary);
        let model = loader.at("model");
        let layers = (0..config.num_layers)
            .map(|index| {
                DecoderLayer::load(&model.at("layers").at(index), config, Arc::clone(&rotary))
            })
            .collect::<std::result::Result<_, _>>()?;
        let lm_head = if config.tie_word_embeddings {
            LmHead::tied(vocab_size)
        } else {
            LmHead::load(&loader.at("lm_head"), vocab_size, hidden_size)?
        };
        Ok(Self {
            embedding: VocabParallelEmbedding::load(
                &model.at("embed_tokens"),
                vocab_size,
                hidden_size,
            )?,
            layers,
            norm: RmsNorm::load(&model.at("norm"), hidden_size, rms_norm_eps)?,
            lm_head,
        })
    }

    /// Runs a batch: writes its keys and values into `kv_cache` (one entry a layer) and returns
    /// the final hidden states of `rows` (ascending; on a GPU those that are staged), f32
    /// `[rows, hidden_size]`; none when there are no rows.
    ///
    /// A token whose row is not wanted is of no more use once the last layer has its key and
    /// value. Where that holds for half of them or more they end there, which saves a prompt the
    /// better part of a layer.
    ///
    /// # Errors
    /// When a kernel or collective fails.
    pub fn forward(
        &self,
        input_ids: &[u32],
        rows: &[u32],
        context: &ForwardContext<'_>,
        kv_cache: &mut [KvBlocks],
    ) -> Result<Option<Tensor>> {
        let rows_of = |x: &Tensor| context.kernels.gather_batch_rows(x, rows, context.batch);
        let ends_early = 2 * rows.len() <= input_ids.len();
        context.kernels.next_layer();
        let mut residual = self.embedding.forward(input_ids, context)?;
        let mut delta: Option<Tensor> = None;
        for (index, (layer, kv_blocks)) in self.layers.iter().zip(kv_cache).enumerate() {
            context.kernels.next_layer();
            let (mut attended, stream) = layer.attend(delta, residual, context, kv_blocks)?;
            residual = stream;
            if ends_early && index + 1 == self.layers.len() {
                if rows.is_empty() {
                    return Ok(None);
                }
                (attended, residual) = (rows_of(&attended)?, rows_of(&residual)?);
            }
            (delta, residual) = layer.finish(&attended, residual, context)?;
        }
        let (hidden, _) = layer_input(&self.norm, delta, residual, context)?;
        let is_selected = ends_early || rows.len() == input_ids.len();
        Ok(Some(if is_selected {
            hidden
        } else {
            rows_of(&hidden)?
        }))
    }

    /// Returns the logits of hidden states f32 `[rows, hidden_size]`: `[rows, vocab_size]`.
    ///
    /// # Errors
    /// When a collective fails.
    pub fn logits(&self, hidden: &Tensor, context: &ForwardContext<'_>) -> Result<Tensor> {
        self.lm_head.forward(hidden, &self.embedding, context)
    }

    /// Returns the KV heads that each layer's cache holds on this rank.
    pub fn num_kv_heads(&self) -> usize {
        self.layers
            .first()
            .map_or(0, |layer| layer.attention.num_kv_heads())
    }
}

/// Normalises the residual stream after adding what the last block put out, in one kernel.
fn layer_input(
    norm: &RmsNorm,
    delta: Option<Tensor>,
    residual: Tensor,
    context: &ForwardContext<'_>,
) -> Result<(Tensor, Tensor)> {
    match delta {
        None => Ok((norm.forward(context.kernels, &residual)?, residual)),
        Some(delta) => norm.forward_reduced(context, &delta, &residual),
    }
}

impl DecoderLayer {
    fn load(
        loader: &Loader<'_>,
        config: &ModelConfig,
        rotary: Arc<RotaryEmbedding>,
    ) -> std::result::Result<Self, LayerError> {
        let ModelConfig {
            hidden_size,
            rms_norm_eps,
            ..
        } = *config;
        let norm = |name| RmsNorm::load(&loader.at(name), hidden_size, rms_norm_eps);
        let shape = AttentionShape {
            hidden_size,
            num_heads: config.num_heads,
            num_kv_heads: config.num_kv_heads,
            head_dim: config.head_dim,
            qkv_bias: Bias::from(config.qkv_bias),
            o_bias: Bias::from(config.o_bias),
            qk_norm_eps: config.qk_norm.then_some(rms_norm_eps),
        };
        let mlp_bias = Bias::from(config.mlp_bias);
        Ok(Self {
            input_norm: norm("input_layernorm")?,
            attention: Attention::load(&loader.at("self_attn"), &shape, rotary)?,
            post_attention_norm: norm("post_attention_layernorm")?,
            mlp: Mlp::load(
                &loader.at("mlp"),
                hidden_size,
                config.intermediate_size,
                mlp_bias,
            )?,
        })
    }

    /// Takes the stream as `residual + delta`, and returns what the heads read and the stream.
    fn attend(
        &self,
        delta: Option<Tensor>,
        residual: Tensor,
        context: &ForwardContext<'_>,
        kv_blocks: &mut KvBlocks,
    ) -> Result<(Tensor, Tensor)> {
        let (x, residual) = layer_input(&self.input_norm, delta, residual, context)?;
        let attended = self.attention.attend(&x, context, kv_blocks)?;
        Ok((attended, residual))
    }

    /// Takes what [`Self::attend`] returned, or rows of it, and returns the stream as `delta` and
    /// `residual`, so that each addition runs inside the norm that follows it, or as the sum alone
    /// where the product has added it.
    fn finish(
        &self,
        attended: &Tensor,
        residual: Tensor,
        context: &ForwardContext<'_>,
    ) -> Result<(Option<Tensor>, Tensor)> {
        let (delta, residual) = self.attention.project(attended, residual, context)?;
        let (x, residual) = layer_input(&self.post_attention_norm, delta, residual, context)?;
        self.mlp.forward(&x, residual, context)
    }
}
