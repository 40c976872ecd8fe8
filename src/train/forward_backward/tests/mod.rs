//! The core against candle's autograd, and against itself where nothing may change.

use std::path::Path;

use candle_core::{D, DType, Device, Result, Tensor, Var};

use super::*;
use crate::models::ModelConfig;
use crate::train::lora::{LoraOptions, LoraTarget};
use crate::weights::Checkpoint;

/// A tiny model, its checkpoint and adapters whose B is not zero.
pub(in crate::train) struct Tiny {
    pub(in crate::train) checkpoint: Checkpoint,
    pub(in crate::train) config: ModelConfig,
    pub(in crate::train) model: FrozenModel,
    pub(in crate::train) kernels: Kernels,
    pub(in crate::train) layout: LoraLayout,
    pub(in crate::train) params: Vec<f32>,
}

impl Tiny {
    pub(in crate::train) fn new(name: &str, target: LoraTarget, dropout: f32) -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
        let checkpoint = Checkpoint::open(&root.join(name)).unwrap();
        let config = ModelConfig::from_json(checkpoint.config()).unwrap();
        let kernels = Kernels::cpu(2).unwrap();
        let model = FrozenModel::load(&checkpoint, &config, &kernels, 64).unwrap();
        let options = LoraOptions {
            rank: 3,
            alpha: 6.0,
            dropout,
            use_rslora: false,
            target,
        };
        let layout = LoraLayout::new(&config, options).unwrap();
        let mut params = layout.init(7);
        let noise = random(params.len(), 8);
        for (value, noise) in params.iter_mut().zip(noise) {
            *value += 0.05 * noise;
        }
        Self {
            checkpoint,
            config,
            model,
            kernels,
            layout,
            params,
        }
    }

    fn run(&self, batch: &TrainBatch, options: StepOptions, scale: f32) -> (f64, Vec<f32>) {
        let lora = LoraTensors::new(&self.layout, self.params.clone()).unwrap();
        let mut gradients = vec![0.0; self.params.len()];
        let (kernels, model) = (&self.kernels, &self.model);
        let options = (options, scale);
        let loss = forward_backward(kernels, model, &lora, batch, options, &mut gradients).unwrap();
        (loss, gradients)
    }
}

fn random(len: usize, seed: u64) -> Vec<f32> {
    (0..len as u64)
        .map(|i| (mix(seed, i) >> 40) as f32 / (1u64 << 23) as f32 - 1.0)
        .collect()
}

pub(in crate::train) fn options() -> StepOptions {
    StepOptions {
        recompute: Recompute::None,
        neftune_noise_alpha: 0.0,
        noise_key: 5,
    }
}

/// Sequences of the given lengths with random tokens, the first third of each not learned.
pub(in crate::train) fn batch(lengths: &[usize], seed: u64) -> TrainBatch {
    let mut batch = TrainBatch::default();
    for (row, &len) in lengths.iter().enumerate() {
        let ids: Vec<u32> = (0..len as u64)
            .map(|i| (mix(seed + row as u64, i) % 500) as u32)
            .collect();
        batch.append(&TrainBatch {
            labels: (0..len)
                .map(|i| if i < len / 3 { -100 } else { ids[i] as i32 })
                .collect(),
            input_ids: ids,
            position_ids: (0..len as u32).collect(),
            cu_seqlens: vec![0, len as u32],
            rows: vec![row as u64],
        });
    }
    batch
}

/// The same model in candle's operations, one sequence at a time, with autograd.
struct Reference<'a> {
    tiny: &'a Tiny,
    flat: Var,
}

impl Reference<'_> {
    fn weight(&self, name: &str) -> Result<Tensor> {
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
        let (path, layout) = (linear.path(layer), &self.tiny.layout);
        let mut y = x.matmul(&self.weight(&format!("{path}.weight"))?.t()?)?;
        let bias = format!("{path}.bias");
        if self.tiny.checkpoint.contains(&bias) {
            y = y.broadcast_add(&self.weight(&bias)?)?;
        }
        let Some(entry) = layout.entry(layer, linear) else {
            return Ok(y);
        };
        let (a, b) = layout.factors(&self.flat, entry)?;
        let mut x = x.clone();
        if layout.options().dropout > 0.0 {
            let site = (layer * 7 + linear as usize) as u64;
            let ones = Tensor::ones((pass.num_tokens, x.dims()[1]), DType::F32, &Device::Cpu)?;
            let dropout = Dropout {
                probability: layout.options().dropout,
                key: mix(5, site + 1),
            };
            let mask = self.tiny.kernels.dropout(&ones, dropout)?;
            x = (x * mask.narrow(0, pass.start, pass.len)?)?;
        }
        let delta = x.matmul(&a.t()?)?.matmul(&b.t()?)?;
        y + (delta * layout.options().scaling())?
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
        let x = self.norm(&stream, "model.norm.weight")?;
        let head = match self.tiny.config.tie_word_embeddings {
            true => embedding,
            false => self.weight("lm_head.weight")?,
        };
        let logits = x.matmul(&head.t()?)?;
        let log_sum = logits.exp()?.sum_keepdim(1)?.log()?;
        let mut loss = Tensor::zeros((), DType::F32, &Device::Cpu)?;
        for token in 1..pass.len {
            let label = batch.labels[start + token];
            if label >= 0 {
                let logit = logits
                    .narrow(0, token - 1, 1)?
                    .narrow(1, label as usize, 1)?;
                let row = (log_sum.narrow(0, token - 1, 1)? - logit)?;
                loss = (loss + row.sum_all()?)?;
            }
        }
        Ok(loss)
    }

    fn run(&self, batch: &TrainBatch) -> Result<(f64, Vec<f32>)> {
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

/// Compares each factor's gradient by the norm of the difference.
fn assert_same_gradients(tiny: &Tiny, got: &[f32], want: &[f32], tolerance: f64) {
    for entry in tiny.layout.entries() {
        let end = entry.b_offset + 3 * entry.out_features;
        for range in [entry.a_offset..entry.b_offset, entry.b_offset..end] {
            let squares =
                |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>();
            let pairs = got[range.clone()].iter().zip(&want[range.clone()]);
            let error = squares(&mut pairs.map(|(g, w)| f64::from(g - w))).sqrt();
            let norm = squares(&mut want[range].iter().map(|w| f64::from(*w))).sqrt();
            assert!(
                norm > 0.0,
                "layer {} {:?} has no gradient",
                entry.layer,
                entry.linear
            );
            assert!(
                error <= tolerance * norm,
                "layer {} {:?}: {error} of {norm}",
                entry.layer,
                entry.linear
            );
        }
    }
}

fn check_against_autograd(name: &str, target: LoraTarget, dropout: f32) {
    let tiny = Tiny::new(name, target, dropout);
    let batch = batch(&[9, 1, 13], 3);
    let flat = Tensor::from_slice(&tiny.params, tiny.params.len(), &Device::Cpu).unwrap();
    let reference = Reference {
        tiny: &tiny,
        flat: Var::from_tensor(&flat).unwrap(),
    };
    let (want_loss, want) = reference.run(&batch).unwrap();
    let (loss, got) = tiny.run(&batch, options(), 1.0);
    assert!(
        (loss - want_loss).abs() < 1e-5 * want_loss,
        "{loss} for {want_loss}"
    );
    assert_same_gradients(&tiny, &got, &want, 2e-5);
}

#[test]
fn qwen2_gradients_agree_with_autograd() {
    check_against_autograd("tiny-qwen2", LoraTarget::All, 0.0);
}

#[test]
fn qwen3_gradients_agree_with_autograd() {
    check_against_autograd("tiny-qwen3", LoraTarget::All, 0.0);
}

#[test]
fn llama_gradients_agree_with_autograd() {
    check_against_autograd("tiny-llama", LoraTarget::All, 0.0);
}

#[test]
fn gradients_with_dropout_agree_with_autograd_under_the_same_masks() {
    check_against_autograd("tiny-llama", LoraTarget::All, 0.3);
}

#[test]
fn adapters_on_some_linears_of_upper_layers_agree_with_autograd() {
    let targets = [
        "model.layers.1.self_attn.v_proj",
        "2.mlp.down_proj",
        "2.self_attn.o_proj",
    ];
    let target = LoraTarget::Modules(targets.map(str::to_owned).to_vec());
    check_against_autograd("tiny-qwen2", target, 0.0);
}

#[test]
fn recomputation_changes_no_bit_with_dropout_and_noise() {
    let tiny = Tiny::new("tiny-qwen3", LoraTarget::All, 0.2);
    let batch = batch(&[11, 6], 4);
    let run = |recompute| {
        let options = StepOptions {
            recompute,
            neftune_noise_alpha: 5.0,
            ..options()
        };
        tiny.run(&batch, options, 0.5)
    };
    let kept = run(Recompute::None);
    assert_eq!(kept, run(Recompute::Mlp));
    assert_eq!(kept, run(Recompute::Full));
    let (loss, _) = tiny.run(&batch, options(), 0.5);
    assert!(loss != kept.0, "the noise changed nothing");
}

#[test]
fn a_packed_batch_is_the_sum_of_its_sequences() {
    let tiny = Tiny::new("tiny-qwen2", LoraTarget::All, 0.0);
    let whole = batch(&[70 - 10, 7, 20], 9);
    let (loss, gradients) = tiny.run(&whole, options(), 1.0);
    let (mut sum_loss, mut sum) = (0.0, vec![0.0; gradients.len()]);
    for index in 0..3 {
        let range = whole.cu_seqlens[index] as usize..whole.cu_seqlens[index + 1] as usize;
        let one = TrainBatch {
            input_ids: whole.input_ids[range.clone()].to_vec(),
            labels: whole.labels[range.clone()].to_vec(),
            position_ids: whole.position_ids[range.clone()].to_vec(),
            cu_seqlens: vec![0, range.len() as u32],
            rows: Vec::new(),
        };
        let (loss, gradients) = tiny.run(&one, options(), 1.0);
        sum_loss += loss;
        for (sum, gradient) in sum.iter_mut().zip(gradients) {
            *sum += gradient;
        }
    }
    assert!(
        (loss - sum_loss).abs() < 1e-9 * loss,
        "{loss} and {sum_loss}"
    );
    assert_same_gradients(&tiny, &gradients, &sum, 1e-6);
}

#[test]
fn evaluation_gives_the_training_loss_without_dropout() {
    let (plain, dropped) = (
        Tiny::new("tiny-llama", LoraTarget::All, 0.0),
        Tiny::new("tiny-llama", LoraTarget::All, 0.5),
    );
    let batch = batch(&[12, 5], 2);
    let lora = LoraTensors::new(&dropped.layout, dropped.params.clone()).unwrap();
    let loss = evaluate(&dropped.kernels, &dropped.model, &lora, &batch).unwrap();
    assert_eq!(loss, plain.run(&batch, options(), 1.0).0);
    assert!(loss != dropped.run(&batch, options(), 1.0).0);
}

#[test]
fn batches_that_do_not_fit_are_refused_with_their_numbers() {
    let tiny = Tiny::new("tiny-llama", LoraTarget::All, 0.0);
    let lora = LoraTensors::new(&tiny.layout, tiny.params.clone()).unwrap();
    let refused = |change: &dyn Fn(&mut TrainBatch), part: &str| {
        let mut batch = batch(&[6], 2);
        change(&mut batch);
        let error = evaluate(&tiny.kernels, &tiny.model, &lora, &batch).unwrap_err();
        assert!(error.to_string().contains(part), "{error}");
    };
    refused(
        &|batch| batch.input_ids[2] = 512,
        "token 512 is outside the vocabulary of 512",
    );
    refused(&|batch| batch.labels[2] = -1, "label -1 is neither -100");
    refused(&|batch| batch.position_ids[2] = 64, "position 64 is beyond");
    refused(&|batch| batch.cu_seqlens[1] = 5, "rise from 0 to 6");
    refused(&|batch| batch.labels.truncate(3), "6 tokens with 3 labels");
}
