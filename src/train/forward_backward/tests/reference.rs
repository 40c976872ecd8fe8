//! The model in candle's operations with its autograd, to compare with.

use candle_core::{D, DType, Device, Result, Tensor, Var};

use super::super::TrainBatch;
use super::Tiny;
use crate::kernels::Dropout;
use crate::train::forward_backward::mix;
use crate::train::modules::{Linear, Module};

/// The same model in candle's operations, one sequence at a time, with autograd.
pub(super) struct Reference<'a> {
    pub(super) tiny: &'a Tiny,
    pub(super) flat: Var,
}

impl Reference<'_> {
    /// A tensor of the base, or the trained one in its place.
    fn weight(&self, name: &str) -> Result<Tensor> {
        for entry in self.tiny.layout.whole() {
            let path = entry.module.path();
            let trained = |offset: usize, shape: &[usize]| {
                let len = shape.iter().product();
                self.flat.narrow(0, offset, len)?.reshape(shape)
            };
            if name == format!("{path}.weight") {
                return trained(entry.offset, &entry.shape);
            }
            if let Some(offset) = entry.bias_offset
                && name == format!("{path}.bias")
            {
                return trained(offset, &entry.shape[..1]);
            }
        }
        self.stored(name)
    }

    fn stored(&self, name: &str) -> Result<Tensor> {
        let stored = self.tiny.checkpoint.tensor(name).unwrap();
        let values: Vec<f32> = (stored.data.as_chunks().0.iter())
            .map(|bytes| f32::from_le_bytes(*bytes))
            .collect();
        Tensor::from_vec(values, stored.shape, &Device::Cpu)
    }

    fn norm(&self, x: &Tensor, name: &str) -> Result<Tensor> {
        let squares = x.sqr()?.mean_keepdim(D::Minus1)?;
        let rms = (squares + f64::from(self.tiny.config.rms_norm_eps))?.sqrt()?;
        x.broadcast_div(&rms)?.broadcast_mul(&self.weight(name)?)
    }

    /// `rows` are the places of `x`'s rows in the packed batch, for the dropout mask.
    fn linear(
        &self,
        x: &Tensor,
        layer: usize,
        linear: Linear,
        pass: &SequencePass,
    ) -> Result<Tensor> {
        let path = linear.path(layer);
        let weight = self.weight(&format!("{path}.weight"))?;
        let bias = format!("{path}.bias");
        let bias = match self.tiny.checkpoint.contains(&bias) {
            true => Some(self.weight(&bias)?),
            false => None,
        };
        let site = (layer * 7 + linear as usize) as u64;
        let module = Module::Linear(layer, linear);
        self.adapted(x, (module, site), (&weight, bias.as_ref()), pass)
    }

    /// `y = x Wᵀ + b` with what the module's adapter adds.
    fn adapted(
        &self,
        x: &Tensor,
        (module, site): (Module, u64),
        (weight, bias): (&Tensor, Option<&Tensor>),
        pass: &SequencePass,
    ) -> Result<Tensor> {
        let layout = &self.tiny.layout;
        let mut y = x.matmul(&weight.t()?)?;
        if let Some(bias) = bias {
            y = y.broadcast_add(bias)?;
        }
        let Some(entry) = layout.entry(module) else {
            return Ok(y);
        };
        let (a, b) = layout.factors(&self.flat, entry)?;
        let mut x = x.clone();
        if layout.options().dropout > 0.0 {
            let ones = Tensor::ones((pass.num_tokens, x.dims()[1]), DType::F32, &Device::Cpu)?;
            let dropout = Dropout {
                probability: layout.options().dropout,
                key: mix(5, site + 1),
            };
            let mask = self.tiny.kernels.dropout(&ones, dropout)?;
            x = (x * mask.narrow(0, pass.start, pass.len)?)?;
        }
        let scaling = layout.options().scaling();
        let delta = (x.matmul(&a.t()?)?.matmul(&b.t()?)? * scaling)?;
        let Some(offset) = entry.magnitude_offset else {
            return y + delta;
        };
        let sum = (weight + (b.matmul(&a)? * scaling)?)?;
        let norms = sum.sqr()?.sum(1)?.sqrt()?.detach();
        let factors = (self.flat.narrow(0, offset, entry.out_features)? / norms)?;
        let excess = x.matmul(&weight.t()?)?.broadcast_mul(&(&factors - 1.0)?)?;
        (y + excess)? + delta.broadcast_mul(&factors)?
    }

    fn heads(
        &self,
        x: &Tensor,
        layer: usize,
        linear: Linear,
        pass: &SequencePass,
    ) -> Result<Tensor> {
        let config = &self.tiny.config;
        let y = self.linear(x, layer, linear, pass)?;
        let num_heads = y.dims()[1] / config.head_dim;
        let mut y = y.reshape((pass.len, num_heads, config.head_dim))?;
        if linear == Linear::V {
            return y.transpose(0, 1);
        }
        if config.qk_norm {
            let name = if linear == Linear::Q {
                "q_norm"
            } else {
                "k_norm"
            };
            y = self.norm(&y, &format!("model.layers.{layer}.self_attn.{name}.weight"))?;
        }
        let y = y.transpose(0, 1)?;
        let half = config.head_dim / 2;
        let (low, high) = (y.narrow(2, 0, half)?, y.narrow(2, half, half)?);
        let rotary = &self.tiny.model.rotary;
        let (cos, sin) = (
            rotary.cos().narrow(0, 0, pass.len)?,
            rotary.sin().narrow(0, 0, pass.len)?,
        );
        let first = (low.broadcast_mul(&cos)? - high.broadcast_mul(&sin)?)?;
        let second = (high.broadcast_mul(&cos)? + low.broadcast_mul(&sin)?)?;
        Tensor::cat(&[first, second], 2)
    }

    fn attention(&self, x: &Tensor, layer: usize, pass: &SequencePass) -> Result<Tensor> {
        let config = &self.tiny.config;
        let q = self.heads(x, layer, Linear::Q, pass)?;
        let (k, v) = (
            self.heads(x, layer, Linear::K, pass)?,
            self.heads(x, layer, Linear::V, pass)?,
        );
        let group = config.num_heads / config.num_kv_heads;
        let mut outputs = Vec::new();
        for head in 0..config.num_heads {
            let part = |x: &Tensor, head: usize| x.narrow(0, head, 1)?.squeeze(0);
            let (q, k) = (part(&q, head)?, part(&k, head / group)?);
            let scores = (q.matmul(&k.t()?)? / (config.head_dim as f64).sqrt())?;
            let mask: Vec<f32> = (0..pass.len * pass.len)
                .map(|i| {
                    if i % pass.len > i / pass.len {
                        -1e9
                    } else {
                        0.0
                    }
                })
                .collect();
            let mask = Tensor::from_vec(mask, (pass.len, pass.len), &Device::Cpu)?;
            let scores = (scores + mask)?.exp()?;
            let p = scores.broadcast_div(&scores.sum_keepdim(1)?)?;
            outputs.push(p.matmul(&part(&v, head / group)?)?);
        }
        self.linear(&Tensor::cat(&outputs, 1)?, layer, Linear::O, pass)
    }

    fn loss(&self, batch: &TrainBatch, index: usize) -> Result<Tensor> {
        let (start, end) = (
            batch.cu_seqlens[index] as usize,
            batch.cu_seqlens[index + 1] as usize,
        );
        let pass = SequencePass {
            start,
            len: end - start,
            num_tokens: batch.num_tokens(),
        };
        let ids = Tensor::from_slice(&batch.input_ids[start..end], pass.len, &Device::Cpu)?;
        let embedding = self.weight("model.embed_tokens.weight")?;
        let mut stream = embedding.index_select(&ids, 0)?;
        for layer in 0..self.tiny.config.num_layers {
            let name = |norm: &str| format!("model.layers.{layer}.{norm}.weight");
            let x = self.norm(&stream, &name("input_layernorm"))?;
            stream = (stream + self.attention(&x, layer, &pass)?)?;
            let x = self.norm(&stream, &name("post_attention_layernorm"))?;
            let gate = self.linear(&x, layer, Linear::Gate, &pass)?;
            let up = self.linear(&x, layer, Linear::Up, &pass)?;
            let silu = (&gate / (gate.neg()?.exp()? + 1.0)?)?;
            stream = (stream + self.linear(&(silu * up)?, layer, Linear::Down, &pass)?)?;
        }
        // The head sees the rows that predict something, those of all sequences together.
        let (rows, targets) = batch.targets();
        let own = |row: &&u32| (start..end).contains(&(**row as usize));
        let pass = SequencePass {
            start: rows.iter().filter(|row| (**row as usize) < start).count(),
            len: rows.iter().filter(own).count(),
            num_tokens: rows.len(),
        };
        let mut loss = Tensor::zeros((), DType::F32, &Device::Cpu)?;
        if pass.len == 0 {
            return Ok(loss);
        }
        let places: Vec<u32> = rows
            .iter()
            .filter(own)
            .map(|row| row - start as u32)
            .collect();
        let places = Tensor::from_vec(places, pass.len, &Device::Cpu)?;
        let x = self.norm(&stream.index_select(&places, 0)?, "model.norm.weight")?;
        let is_whole = self.tiny.layout.whole_entry(Module::LmHead).is_some();
        let head = match self.tiny.config.tie_word_embeddings && !is_whole {
            true => self.stored("model.embed_tokens.weight")?,
            false => self.weight("lm_head.weight")?,
        };
        let site = (self.tiny.config.num_layers * 7) as u64;
        let logits = self.adapted(&x, (Module::LmHead, site), (&head, None), &pass)?;
        let log_sum = logits.exp()?.sum_keepdim(1)?.log()?;
        for (row, target) in targets[pass.start..][..pass.len].iter().enumerate() {
            let logit = logits.narrow(0, row, 1)?.narrow(1, *target as usize, 1)?;
            loss = (loss + (log_sum.narrow(0, row, 1)? - logit)?.sum_all()?)?;
        }
        Ok(loss)
    }

    /// Returns the loss and the gradient of the flat parameters.
    pub(super) fn run(&self, batch: &TrainBatch) -> Result<(f64, Vec<f32>)> {
        let mut loss = Tensor::zeros((), DType::F32, &Device::Cpu)?;
        for index in 0..batch.cu_seqlens.len() - 1 {
            loss = (loss + self.loss(batch, index)?)?;
        }
        let gradients = loss.backward()?;
        let gradient = gradients.get(&self.flat).unwrap().to_vec1()?;
        Ok((f64::from(loss.to_scalar::<f32>()?), gradient))
    }
}

/// Where a sequence lies in its batch.
struct SequencePass {
    start: usize,
    len: usize,
    num_tokens: usize,
}
