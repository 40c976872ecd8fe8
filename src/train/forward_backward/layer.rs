//! One decoder layer, forward and backward, with what is kept in between.
//!
//! Norms and the gated product are always computed again in the backward pass: they cost a pass
//! over memory and would be a third of what is kept. [`Recompute`] says what else is.

use candle_core::{Result, Tensor};

use crate::kernels::{Kernels, RopeArgs, VarlenArgs};

use super::super::model::FrozenModel;
use super::TrainBatch;
use super::adapted::{AdaptedLinears, InputGradient, LinearsSaved, add_values};
use super::trained::Norm;

/// What the backward pass computes again instead of keeping it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recompute {
    /// Norms and gated products only.
    None,
    /// The MLP's gates and ups too: two fifths of the memory less for a sixth more time.
    Mlp,
    /// The whole layer: only its input is kept.
    Full,
}

/// What a layer computes with, in one micro-batch.
pub(super) struct LayerContext<'a> {
    pub(super) kernels: &'a Kernels,
    pub(super) model: &'a FrozenModel,
    pub(super) batch: &'a TrainBatch,
    pub(super) norms: LayerNorms,
    pub(super) qkv: AdaptedLinears<'a>,
    pub(super) output: AdaptedLinears<'a>,
    pub(super) gate_up: AdaptedLinears<'a>,
    pub(super) down: AdaptedLinears<'a>,
}

/// The norms of a layer.
pub(super) struct LayerNorms {
    pub(super) input: Norm,
    pub(super) post_attention: Norm,
    /// On the heads of q and k.
    pub(super) qk: Option<(Norm, Norm)>,
}

/// What a layer keeps for its backward pass.
pub(super) struct Saved {
    /// The layer's input `[tokens, hidden_size]`.
    input: Tensor,
    attention: Option<AttentionSaved>,
    mlp: Option<MlpSaved>,
}

struct AttentionSaved {
    /// Before norms and rotation; kept where the heads are normed.
    raw_qkv: Option<Tensor>,
    qkv: Tensor,
    saved_qkv: LinearsSaved,
    out: Tensor,
    lse: Tensor,
    saved_output: LinearsSaved,
    /// The residual stream after the attention.
    stream: Tensor,
}

struct MlpSaved {
    gate_up: Tensor,
    saved_gate_up: LinearsSaved,
    saved_down: LinearsSaved,
}

impl LayerContext<'_> {
    fn eps(&self) -> f32 {
        self.model.config.rms_norm_eps
    }

    fn rope_args(&self) -> RopeArgs<'_> {
        let config = &self.model.config;
        let norms = self.norms.qk.as_ref();
        RopeArgs {
            num_heads: config.num_heads,
            num_kv_heads: config.num_kv_heads,
            head_dim: config.head_dim,
            qk_norm: norms.map(|(q, k)| (&q.weight, &k.weight)),
            eps: config.rms_norm_eps,
            cos: self.model.rotary.cos(),
            sin: self.model.rotary.sin(),
            positions: &self.batch.position_ids,
        }
    }

    fn attention_args(&self) -> VarlenArgs<'_> {
        let config = &self.model.config;
        VarlenArgs {
            num_heads: config.num_heads,
            num_kv_heads: config.num_kv_heads,
            head_dim: config.head_dim,
            scale: 1.0 / (config.head_dim as f32).sqrt(),
            cu_seqlens: &self.batch.cu_seqlens,
        }
    }

    fn input_norm(&self, input: &Tensor) -> Result<Tensor> {
        self.kernels
            .rms_norm(input, &self.norms.input.weight, self.eps())
    }

    fn post_attention_norm(&self, stream: &Tensor) -> Result<Tensor> {
        let weight = &self.norms.post_attention.weight;
        self.kernels.rms_norm(stream, weight, self.eps())
    }

    fn attention(&self, input: &Tensor) -> Result<AttentionSaved> {
        let (raw_qkv, saved_qkv) = self.qkv.forward(self.kernels, &self.input_norm(input)?)?;
        let qkv = self.kernels.rope(&raw_qkv, &self.rope_args())?;
        let (out, lse) = self
            .kernels
            .varlen_attention(&qkv, &self.attention_args())?;
        let (projected, saved_output) = self.output.forward(self.kernels, &out)?;
        Ok(AttentionSaved {
            raw_qkv: self.norms.qk.is_some().then_some(raw_qkv),
            qkv,
            saved_qkv,
            out,
            lse,
            saved_output,
            stream: self.kernels.add(&projected, input)?,
        })
    }

    /// Computes what the MLP's backward pass needs, without its output.
    fn mlp(&self, stream: &Tensor) -> Result<MlpSaved> {
        let x = self.post_attention_norm(stream)?;
        let (gate_up, saved_gate_up) = self.gate_up.forward(self.kernels, &x)?;
        let hidden = self.kernels.silu_and_mul(&gate_up)?;
        let saved_down = self.down.save(self.kernels, &hidden)?;
        Ok(MlpSaved {
            gate_up,
            saved_gate_up,
            saved_down,
        })
    }

    /// Returns the layer's output and what is kept.
    pub(super) fn forward(&self, input: Tensor, recompute: Recompute) -> Result<(Tensor, Saved)> {
        let attention = self.attention(&input)?;
        let x = self.post_attention_norm(&attention.stream)?;
        let (gate_up, saved_gate_up) = self.gate_up.forward(self.kernels, &x)?;
        drop(x);
        let hidden = self.kernels.silu_and_mul(&gate_up)?;
        let (projected, saved_down) = self.down.forward(self.kernels, &hidden)?;
        let output = self.kernels.add(&projected, &attention.stream)?;
        let mlp = MlpSaved {
            gate_up,
            saved_gate_up,
            saved_down,
        };
        let (attention, mlp) = match recompute {
            Recompute::None => (Some(attention), Some(mlp)),
            Recompute::Mlp => (Some(attention), None),
            Recompute::Full => (None, None),
        };
        let saved = Saved {
            input,
            attention,
            mlp,
        };
        Ok((output, saved))
    }

    /// Takes the gradient of the layer's output, adds those of its adapters to `gradients` and
    /// returns that of its input, if wanted.
    pub(super) fn backward(
        &self,
        saved: Saved,
        d_output: &Tensor,
        wanted: InputGradient,
        gradients: &mut [f32],
    ) -> Result<Option<Tensor>> {
        let Saved {
            input,
            attention,
            mlp,
        } = saved;
        let attention = match attention {
            Some(attention) => attention,
            None => self.attention(&input)?,
        };
        let mlp = match mlp {
            Some(mlp) => mlp,
            None => self.mlp(&attention.stream)?,
        };
        let d_stream = self.mlp_backward(&attention.stream, mlp, d_output, gradients)?;
        self.attention_backward(&input, attention, &d_stream, wanted, gradients)
    }

    /// Returns the gradient of the stream between the blocks.
    fn mlp_backward(
        &self,
        stream: &Tensor,
        saved: MlpSaved,
        d_output: &Tensor,
        gradients: &mut [f32],
    ) -> Result<Tensor> {
        let kernels = self.kernels;
        let hidden = kernels.silu_and_mul(&saved.gate_up)?;
        let inputs = (&hidden, &saved.saved_down);
        let d_hidden = wanted(self.down.backward(
            kernels,
            inputs,
            d_output,
            InputGradient::Wanted,
            gradients,
        )?)?;
        drop(hidden);
        let d_gate_up = kernels.silu_and_mul_backward(&saved.gate_up, &d_hidden)?;
        let x = self.post_attention_norm(stream)?;
        let inputs = (&x, &saved.saved_gate_up);
        let dx = wanted(self.gate_up.backward(
            kernels,
            inputs,
            &d_gate_up,
            InputGradient::Wanted,
            gradients,
        )?)?;
        let norm = &self.norms.post_attention;
        norm_gradient(kernels, norm, self.eps(), (stream, &dx), gradients)?;
        kernels.rms_norm_backward(stream, &norm.weight, self.eps(), &dx, Some(d_output))
    }

    fn attention_backward(
        &self,
        input: &Tensor,
        saved: AttentionSaved,
        d_stream: &Tensor,
        input_gradient: InputGradient,
        gradients: &mut [f32],
    ) -> Result<Option<Tensor>> {
        let kernels = self.kernels;
        let inputs = (&saved.out, &saved.saved_output);
        let d_out = wanted(self.output.backward(
            kernels,
            inputs,
            d_stream,
            InputGradient::Wanted,
            gradients,
        )?)?;
        let d_qkv = kernels.varlen_attention_backward(
            &saved.qkv,
            &self.attention_args(),
            (&saved.out, &saved.lse),
            &d_out,
        )?;
        if let Some(raw_qkv) = &saved.raw_qkv {
            self.head_norm_gradients(raw_qkv, &d_qkv, gradients)?;
        }
        let d_qkv = kernels.rope_backward(saved.raw_qkv.as_ref(), &d_qkv, &self.rope_args())?;
        let x = self.input_norm(input)?;
        let inputs = (&x, &saved.saved_qkv);
        let dx = self
            .qkv
            .backward(kernels, inputs, &d_qkv, input_gradient, gradients)?;
        let Some(dx) = dx else { return Ok(None) };
        let norm = &self.norms.input;
        norm_gradient(kernels, norm, self.eps(), (input, &dx), gradients)?;
        kernels
            .rms_norm_backward(input, &norm.weight, self.eps(), &dx, Some(d_stream))
            .map(Some)
    }

    /// Adds the gradients of trained norms on heads, from the gradient of the rotated heads.
    fn head_norm_gradients(
        &self,
        raw_qkv: &Tensor,
        d_rotated: &Tensor,
        gradients: &mut [f32],
    ) -> Result<()> {
        let Some((q, k)) = &self.norms.qk else {
            return Ok(());
        };
        if q.offset.is_none() && k.offset.is_none() {
            return Ok(());
        }
        let kernels = self.kernels;
        let rotation = RopeArgs {
            qk_norm: None,
            ..self.rope_args()
        };
        let d_normed = kernels.rope_backward(None, d_rotated, &rotation)?;
        let (num_tokens, head_dim) = (raw_qkv.dims()[0], rotation.head_dim);
        let mut head = 0;
        for (norm, num_heads) in [(q, rotation.num_heads), (k, rotation.num_kv_heads)] {
            let heads = |x: &Tensor| {
                let columns = x.narrow(1, head * head_dim, num_heads * head_dim)?;
                columns.reshape((num_tokens * num_heads, head_dim))
            };
            let pair = (&heads(raw_qkv)?, &heads(&d_normed)?);
            norm_gradient(kernels, norm, self.eps(), pair, gradients)?;
            head += num_heads;
        }
        Ok(())
    }
}

/// Adds the gradient of a norm's weight, if it is trained, from the norm's input and the gradient
/// of its output: y = x ρ w, so dw = Σ dy x ρ over rows, and x ρ is the norm with ones for w.
pub(super) fn norm_gradient(
    kernels: &Kernels,
    norm: &Norm,
    eps: f32,
    (x, dy): (&Tensor, &Tensor),
    gradients: &mut [f32],
) -> Result<()> {
    let Some(offset) = norm.offset else {
        return Ok(());
    };
    let normed = kernels.rms_norm(x, &norm.weight.ones_like()?, eps)?;
    let gradient = kernels.column_dots(dy, Some(&normed))?;
    add_values(gradients, offset, &gradient);
    Ok(())
}

/// Unpacks a gradient that was asked for.
fn wanted(gradient: Option<Tensor>) -> Result<Tensor> {
    gradient.ok_or_else(|| candle_core::Error::Msg("a gradient was not computed".to_owned()))
}
