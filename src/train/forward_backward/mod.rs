//! The numeric core: one packed micro-batch to its loss and the gradients of all that is trained.
//!
//! Written by hand, layer by layer: frozen weights get no gradients, and activations are freed as
//! the backward pass goes down. It knows tensors and tokens, not files, optimizers or ranks.

mod adapted;
mod batch;
mod dora;
mod head;
mod layer;
mod noise;
#[cfg(test)]
pub(in crate::train) mod tests;
mod trained;

pub use batch::TrainBatch;
pub use layer::Recompute;
pub use trained::LoraTensors;

use candle_core::Tensor;

use crate::kernels::Kernels;

use super::TrainError;
use super::model::{FrozenLayer, FrozenLinear, FrozenModel};
use super::modules::{LayerNorm, Linear, Module};
use adapted::{AdaptedLinear, AdaptedLinears, Adapter, InputGradient, add_values};
use head::Head;
use layer::{LayerContext, LayerNorms};
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
        let (rows, targets) = batch.targets();
        if rows.is_empty() {
            model.follow(None)?;
            return Ok(0.0);
        }
        let (hidden, _) = pass.forward()?;
        let hidden = kernels.gather_rows(&hidden, &rows)?;
        Ok(sum(&pass.head()?.losses(&hidden, &targets)?))
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
        let lowest = self.lora.layout.lowest_layer(model.config.num_layers);
        if rows.is_empty() {
            model.follow(Some(lowest))?;
            return Ok(0.0);
        }
        let (stream, mut saved) = self.forward()?;
        // Rows without a target have no loss: the head and its norm see the others only.
        let hidden = kernels.gather_rows(&stream, &rows)?;
        drop(stream);
        let (losses, d_hidden) = self
            .head()?
            .backward(&hidden, &targets, loss_scale, gradients)?;
        let mut d_stream = kernels.scatter_rows(&d_hidden, &rows, batch.num_tokens())?;
        while let Some((index, saved)) = saved.pop() {
            let wanted = match index == lowest && !self.trains_below(lowest) {
                true => InputGradient::Skipped,
                false => InputGradient::Wanted,
            };
            let layer = model.layer(index, (index > lowest).then(|| index - 1))?;
            let context = self.layer(index, &layer)?;
            match context.backward(saved, &d_stream, wanted, gradients)? {
                Some(below) => d_stream = below,
                None => break,
            }
        }
        self.embedding_gradient(&d_stream, gradients)?;
        Ok(sum(&losses))
    }

    /// Says whether something below the linears of a layer is trained, so that they must pass
    /// their gradient on.
    fn trains_below(&self, layer: usize) -> bool {
        let below = [
            Module::Embedding,
            Module::LayerNorm(layer, LayerNorm::Input),
        ];
        let mut below = below.into_iter();
        below.any(|module| self.lora.layout.whole_entry(module).is_some())
    }

    /// Adds each token's gradient to its row of the embedding, if that is trained.
    fn embedding_gradient(
        &self,
        d_stream: &Tensor,
        gradients: &mut [f32],
    ) -> candle_core::Result<()> {
        let Some(entry) = self.lora.layout.whole_entry(Module::Embedding) else {
            return Ok(());
        };
        let width = self.model.config.hidden_size;
        let rows: Vec<f32> = d_stream.flatten_all()?.to_vec1()?;
        for (row, &id) in rows.chunks_exact(width).zip(&self.batch.input_ids) {
            add_values(gradients, entry.offset + id as usize * width, row);
        }
        Ok(())
    }

    fn forward(&self) -> candle_core::Result<(Tensor, Vec<(usize, layer::Saved)>)> {
        let ids = &self.batch.input_ids;
        let (table, _) = self.lora.whole(Module::Embedding, &self.model.embedding);
        let embedded = self.kernels.embedding(ids, &table.weight, 0)?;
        let mut stream = match self.options.neftune_noise_alpha {
            0.0 => embedded,
            alpha => noise::add(&embedded, self.batch, alpha, self.options.noise_key)?,
        };
        let num_layers = self.model.config.num_layers;
        let lowest = self.lora.layout.lowest_layer(num_layers);
        let mut saved = Vec::with_capacity(num_layers - lowest);
        for index in 0..num_layers {
            let next = (index + 1 < num_layers).then_some(index + 1);
            let layer = self.model.layer(index, next)?;
            let context = self.layer(index, &layer)?;
            let (output, kept) = context.forward(stream, self.options.recompute)?;
            stream = output;
            if index >= lowest {
                saved.push((index, kept));
            }
        }
        Ok((stream, saved))
    }

    /// Returns what follows the last layer.
    fn head(&self) -> candle_core::Result<Head<'_>> {
        let site = self.model.config.num_layers * Linear::ALL.len();
        Ok(Head {
            kernels: self.kernels,
            norm: self.lora.norm(Module::Norm, &self.model.norm),
            eps: self.model.config.rms_norm_eps,
            linear: AdaptedLinear {
                adapter: self.adapter(Module::LmHead, site)?,
                ..self.whole(Module::LmHead, self.model.lm_head())
            },
        })
    }

    fn layer<'l>(
        &'l self,
        index: usize,
        layer: &'l FrozenLayer,
    ) -> candle_core::Result<LayerContext<'l>> {
        let group = |linears: &[Linear]| -> candle_core::Result<AdaptedLinears<'l>> {
            let parts = linears.iter().map(|&linear| {
                let module = Module::Linear(index, linear);
                let site = index * Linear::ALL.len() + linear as usize;
                Ok(AdaptedLinear {
                    adapter: self.adapter(module, site)?,
                    ..self.whole(module, layer.linear(linear))
                })
            });
            let parts = parts.collect::<candle_core::Result<_>>()?;
            Ok(AdaptedLinears { parts })
        };
        let norm = |norm, weight| self.lora.norm(Module::LayerNorm(index, norm), weight);
        let qk = layer.qk_norm.as_ref();
        Ok(LayerContext {
            kernels: self.kernels,
            model: self.model,
            batch: self.batch,
            norms: LayerNorms {
                input: norm(LayerNorm::Input, &layer.input_norm),
                post_attention: norm(LayerNorm::PostAttention, &layer.post_attention_norm),
                qk: qk.map(|(q, k)| (norm(LayerNorm::Q, q), norm(LayerNorm::K, k))),
            },
            qkv: group(&[Linear::Q, Linear::K, Linear::V])?,
            output: group(&[Linear::O])?,
            gate_up: group(&[Linear::Gate, Linear::Up])?,
            down: group(&[Linear::Down])?,
        })
    }

    /// Returns a linear without its adapter.
    fn whole<'l>(&'l self, module: Module, base: &'l FrozenLinear) -> AdaptedLinear<'l> {
        let (linear, whole) = self.lora.whole(module, base);
        AdaptedLinear {
            linear,
            adapter: None,
            whole,
        }
    }

    fn adapter(&self, module: Module, site: usize) -> candle_core::Result<Option<Adapter>> {
        self.lora.adapter(module, site, self.dropout, &self.options)
    }
}
