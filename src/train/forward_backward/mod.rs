//! The numeric core: one packed micro-batch to its loss and the gradients of all adapters.
//!
//! Written by hand, layer by layer: frozen weights get no gradients, and activations are freed as
//! the backward pass goes down. It knows tensors and tokens, not files, optimizers or ranks.

mod adapted;
mod batch;
mod layer;
mod noise;
#[cfg(test)]
pub(in crate::train) mod tests;

pub use batch::TrainBatch;
pub use layer::Recompute;

use candle_core::Tensor;

use crate::kernels::{Dropout, Kernels};

use super::TrainError;
use super::lora::{Linear, LoraLayout};
use super::model::FrozenModel;
use adapted::{AdaptedLinears, Adapter, InputGradient};
use layer::LayerContext;
pub(in crate::train) use noise::mix;

/// How micro-batches are computed, the same in a whole run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepOptions {
    /// What the backward pass computes again.
    pub recompute: Recompute,
    /// Strength of the noise on embeddings (NEFTune); 0 for none.
    pub neftune_noise_alpha: f64,
    /// Names the dropout masks and the noise of this micro-batch.
    pub noise_key: u64,
}

/// Adapters ready to multiply with: the values of one step.
pub struct LoraTensors<'a> {
    layout: &'a LoraLayout,
    flat: Tensor,
}

impl<'a> LoraTensors<'a> {
    /// Takes the flat parameters.
    ///
    /// # Errors
    /// When their number is not the layout's.
    pub fn new(layout: &'a LoraLayout, params: Vec<f32>) -> Result<Self, TrainError> {
        let flat = layout
            .tensor(params)
            .map_err(TrainError::kernel("adapter parameters"))?;
        Ok(Self { layout, flat })
    }
}

/// Runs one micro-batch forward and returns the sum of its target tokens' losses.
///
/// # Errors
/// [`TrainError::Batch`] when the batch does not fit the model.
pub fn evaluate(
    kernels: &Kernels,
    model: &FrozenModel,
    lora: &LoraTensors<'_>,
    batch: &TrainBatch,
) -> Result<f64, TrainError> {
    batch.check(model.config(), model.rotary.cos().dims()[0])?;
    let options = StepOptions {
        recompute: Recompute::Full,
        neftune_noise_alpha: 0.0,
        noise_key: 0,
    };
    let pass = Pass {
        kernels,
        model,
        lora,
        batch,
        options,
        dropout: 0.0,
    };
    let run = || {
        let (hidden, _) = pass.forward()?;
        let (rows, targets) = batch.targets();
        let hidden = kernels.gather_rows(&hidden, &rows)?;
        let normed = pass.final_norm(&hidden)?;
        let (losses, _) = kernels.cross_entropy(&normed, model.lm_head(), &targets, None)?;
        Ok(sum(&losses))
    };
    run().map_err(TrainError::kernel("evaluation"))
}

/// Runs one micro-batch forward and backward: adds the gradients of `loss_scale` times the sum of
/// its target tokens' losses to `gradients` and returns that sum, unscaled.
///
/// # Errors
/// [`TrainError::Batch`] when the batch does not fit the model.
pub fn forward_backward(
    kernels: &Kernels,
    model: &FrozenModel,
    lora: &LoraTensors<'_>,
    batch: &TrainBatch,
    (options, loss_scale): (StepOptions, f32),
    gradients: &mut [f32],
) -> Result<f64, TrainError> {
    batch.check(model.config(), model.rotary.cos().dims()[0])?;
    let pass = Pass {
        kernels,
        model,
        lora,
        batch,
        options,
        dropout: lora.layout.options().dropout,
    };
    pass.run(loss_scale, gradients)
        .map_err(TrainError::kernel("forward and backward pass"))
}

fn sum(losses: &[f32]) -> f64 {
    losses.iter().map(|&loss| f64::from(loss)).sum()
}

/// One micro-batch on its way.
struct Pass<'a> {
    kernels: &'a Kernels,
    model: &'a FrozenModel,
    lora: &'a LoraTensors<'a>,
    batch: &'a TrainBatch,
    options: StepOptions,
    dropout: f32,
}

impl Pass<'_> {
    fn run(&self, loss_scale: f32, gradients: &mut [f32]) -> candle_core::Result<f64> {
        let Self {
            kernels,
            model,
            batch,
            ..
        } = *self;
        let (rows, targets) = batch.targets();
        if rows.is_empty() {
            return Ok(0.0);
        }
        let (stream, mut saved) = self.forward()?;
        // Rows without a target have no loss: the head and its norm see the others only.
        let hidden = kernels.gather_rows(&stream, &rows)?;
        drop(stream);
        let normed = self.final_norm(&hidden)?;
        let (losses, d_normed) =
            kernels.cross_entropy(&normed, model.lm_head(), &targets, Some(loss_scale))?;
        let Some(d_normed) = d_normed else {
            candle_core::bail!("the loss has no gradient");
        };
        let eps = model.config.rms_norm_eps;
        let d_hidden = kernels.rms_norm_backward(&hidden, &model.norm, eps, &d_normed, None)?;
        let mut d_stream = kernels.scatter_rows(&d_hidden, &rows, batch.num_tokens())?;
        let lowest = self
            .lora
            .layout
            .entries()
            .first()
            .map_or(0, |entry| entry.layer);
        while let Some((index, saved)) = saved.pop() {
            let wanted = match index == lowest {
                true => InputGradient::Skipped,
                false => InputGradient::Wanted,
            };
            let context = self.layer(index)?;
            match context.backward(saved, &d_stream, wanted, gradients)? {
                Some(below) => d_stream = below,
                None => break,
            }
        }
        Ok(sum(&losses))
    }

    fn forward(&self) -> candle_core::Result<(Tensor, Vec<(usize, layer::Saved)>)> {
        let ids = &self.batch.input_ids;
        let embedded = self.kernels.embedding(ids, &self.model.embedding, 0)?;
        let mut stream = match self.options.neftune_noise_alpha {
            0.0 => embedded,
            alpha => noise::add(&embedded, self.batch, alpha, self.options.noise_key)?,
        };
        let mut saved = Vec::with_capacity(self.model.layers.len());
        for index in 0..self.model.layers.len() {
            let context = self.layer(index)?;
            let (output, kept) = context.forward(stream, self.options.recompute)?;
            stream = output;
            saved.push((index, kept));
        }
        Ok((stream, saved))
    }

    fn final_norm(&self, hidden: &Tensor) -> candle_core::Result<Tensor> {
        let eps = self.model.config.rms_norm_eps;
        self.kernels.rms_norm(hidden, &self.model.norm, eps)
    }

    fn layer(&self, index: usize) -> candle_core::Result<LayerContext<'_>> {
        let layer = &self.model.layers[index];
        let group = |linears: &[Linear]| -> candle_core::Result<AdaptedLinears<'_>> {
            let parts = linears.iter().map(|&linear| {
                let adapter = self.adapter(index, linear)?;
                Ok((layer.linear(linear), adapter))
            });
            let parts = parts.collect::<candle_core::Result<_>>()?;
            Ok(AdaptedLinears { parts })
        };
        Ok(LayerContext {
            kernels: self.kernels,
            model: self.model,
            layer,
            batch: self.batch,
            qkv: group(&[Linear::Q, Linear::K, Linear::V])?,
            output: group(&[Linear::O])?,
            gate_up: group(&[Linear::Gate, Linear::Up])?,
            down: group(&[Linear::Down])?,
        })
    }

    fn adapter(&self, layer: usize, linear: Linear) -> candle_core::Result<Option<Adapter>> {
        let layout = self.lora.layout;
        let Some(entry) = layout.entry(layer, linear) else {
            return Ok(None);
        };
        let (a, b) = layout.factors(&self.lora.flat, entry)?;
        let site = (layer * Linear::ALL.len() + linear as usize) as u64;
        let dropout = (self.dropout > 0.0).then(|| Dropout {
            probability: self.dropout,
            key: mix(self.options.noise_key, site + 1),
        });
        Ok(Some(Adapter {
            a,
            b,
            scale: layout.options().scaling() as f32,
            dropout,
            a_offset: entry.a_offset,
            b_offset: entry.b_offset,
        }))
    }
}
