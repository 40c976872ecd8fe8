//! The core against candle's autograd, and against itself where nothing may change.

mod reference;

use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};

use super::*;
use crate::models::ModelConfig;
use crate::train::lora::{LoraLayout, LoraOptions, LoraTarget};
use crate::weights::Checkpoint;
use reference::Reference;

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
        Self::with(
            name,
            LoraOptions {
                target,
                dropout,
                ..lora_options()
            },
        )
    }

    fn with(name: &str, options: LoraOptions) -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
        let checkpoint = Checkpoint::open(&root.join(name)).unwrap();
        let config = ModelConfig::from_json(checkpoint.config()).unwrap();
        let kernels = Kernels::cpu(2).unwrap();
        let model = FrozenModel::load(&checkpoint, &config, &kernels, 64).unwrap();
        let layout = LoraLayout::new(&config, options).unwrap();
        let mut params = layout.init(7);
        layout
            .copy_base(&mut params, &checkpoint, &config, &kernels)
            .unwrap();
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

    fn trained(&self) -> LoraTensors<'_> {
        let params = Arc::new(self.params.clone());
        LoraTensors::new(&self.kernels, &self.layout, &params).unwrap()
    }

    fn run(&self, batch: &TrainBatch, options: StepOptions, scale: f32) -> (f64, Vec<f32>) {
        let lora = self.trained();
        let mut gradients = vec![0.0; self.params.len()];
        let (kernels, model) = (&self.kernels, &self.model);
        let options = (options, scale);
        let loss = forward_backward(kernels, model, &lora, batch, options, &mut gradients).unwrap();
        (loss, gradients)
    }
}

/// Rank 3 on all linears.
pub(in crate::train) fn lora_options() -> LoraOptions {
    LoraOptions {
        rank: 3,
        alpha: 6.0,
        dropout: 0.0,
        use_rslora: false,
        use_dora: false,
        target: LoraTarget::All,
        modules_to_save: Vec::new(),
        dtype: DType::F32,
    }
}

fn texts(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|&text| text.to_owned()).collect()
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

/// Compares each tensor's gradient by the norm of the difference.
fn assert_same_gradients(tiny: &Tiny, got: &[f32], want: &[f32], tolerance: f64) {
    let mut end = 0;
    for tensor in tiny.layout.tensors() {
        let range = end..end + tensor.len();
        end = range.end;
        let squares = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>();
        let pairs = got[range.clone()].iter().zip(&want[range.clone()]);
        let error = squares(&mut pairs.map(|(g, w)| f64::from(g - w))).sqrt();
        let norm = squares(&mut want[range].iter().map(|w| f64::from(*w))).sqrt();
        let name = tensor.name;
        // The scores of a query are shifted alike by a bias of the keys, and softmax takes that
        // away: what is left of the gradient is rounding.
        if name.ends_with("k_proj.bias") {
            continue;
        }
        assert!(norm > 0.0, "{name} has no gradient");
        assert!(error <= tolerance * norm, "{name}: {error} of {norm}");
    }
    assert_eq!(end, got.len());
}

fn check_against_autograd(name: &str, target: LoraTarget, dropout: f32) {
    check(&Tiny::new(name, target, dropout));
}

fn check(tiny: &Tiny) {
    let batch = batch(&[9, 1, 13], 3);
    let flat = Tensor::from_slice(&tiny.params, tiny.params.len(), &Device::Cpu).unwrap();
    let reference = Reference {
        tiny,
        flat: Var::from_tensor(&flat).unwrap(),
    };
    let (want_loss, want) = reference.run(&batch).unwrap();
    let (loss, got) = tiny.run(&batch, options(), 1.0);
    assert!(
        (loss - want_loss).abs() < 1e-5 * want_loss,
        "{loss} for {want_loss}"
    );
    assert_same_gradients(tiny, &got, &want, 2e-5);
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
fn magnitudes_agree_with_autograd_with_and_without_dropout() {
    let target = LoraTarget::Modules(texts(&["q_proj", "o_proj", "gate_proj", "down_proj"]));
    for (name, dropout) in [("tiny-qwen2", 0.0), ("tiny-llama", 0.3)] {
        check(&Tiny::with(
            name,
            LoraOptions {
                target: target.clone(),
                dropout,
                use_dora: true,
                ..lora_options()
            },
        ));
    }
}

#[test]
fn modules_trained_whole_agree_with_autograd() {
    // "norm" is every norm, those on the heads too; qwen2 ties its head.
    let names = ["embed_tokens", "lm_head", "norm", "k_proj", "down_proj"];
    for name in ["tiny-qwen3", "tiny-qwen2"] {
        let target = LoraTarget::Modules(texts(&["q_proj", "up_proj"]));
        check(&Tiny::with(
            name,
            LoraOptions {
                target,
                dropout: 0.3,
                modules_to_save: texts(&names),
                ..lora_options()
            },
        ));
    }
}

#[test]
fn a_tied_embedding_trained_alone_leaves_the_head_as_it_was() {
    check(&Tiny::with(
        "tiny-qwen2",
        LoraOptions {
            target: LoraTarget::Modules(texts(&["2.mlp.up_proj"])),
            modules_to_save: texts(&["embed_tokens"]),
            ..lora_options()
        },
    ));
}

#[test]
fn adapters_on_the_head_agree_with_autograd() {
    for (targets, dropout) in [
        (&["lm_head"][..], 0.0),
        (&["lm_head", "2.mlp.up_proj"], 0.3),
    ] {
        let target = LoraTarget::Modules(texts(targets));
        check_against_autograd("tiny-llama", target.clone(), dropout);
        check_against_autograd("tiny-qwen2", target, dropout);
    }
}

/// Everything at once that can be: magnitudes, whole modules, dropout.
fn everything(dropout: f32) -> Tiny {
    Tiny::with(
        "tiny-qwen3",
        LoraOptions {
            target: LoraTarget::Modules(texts(&["q_proj", "v_proj", "up_proj", "down_proj"])),
            dropout,
            use_dora: true,
            modules_to_save: texts(&["embed_tokens", "lm_head", "norm", "k_proj"]),
            ..lora_options()
        },
    )
}

#[test]
fn magnitudes_and_whole_modules_stay_the_same_recomputed_and_unpacked() {
    let (tiny, batch) = (everything(0.2), batch(&[11, 6], 4));
    let run = |recompute| {
        tiny.run(
            &batch,
            StepOptions {
                recompute,
                ..options()
            },
            0.5,
        )
    };
    let kept = run(Recompute::None);
    assert_eq!(kept, run(Recompute::Mlp));
    assert_eq!(kept, run(Recompute::Full));
    check_packed_is_the_sum(&everything(0.0));
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
    check_packed_is_the_sum(&Tiny::new("tiny-qwen2", LoraTarget::All, 0.0));
}

fn check_packed_is_the_sum(tiny: &Tiny) {
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
    assert_same_gradients(tiny, &gradients, &sum, 1e-6);
}

#[test]
fn evaluation_gives_the_training_loss_without_dropout() {
    let (plain, dropped) = (
        Tiny::new("tiny-llama", LoraTarget::All, 0.0),
        Tiny::new("tiny-llama", LoraTarget::All, 0.5),
    );
    let batch = batch(&[12, 5], 2);
    let lora = dropped.trained();
    let loss = evaluate(&dropped.kernels, &dropped.model, &lora, &batch).unwrap();
    assert_eq!(loss, plain.run(&batch, options(), 1.0).0);
    assert!(loss != dropped.run(&batch, options(), 1.0).0);
}

#[test]
fn batches_that_do_not_fit_are_refused_with_their_numbers() {
    let tiny = Tiny::new("tiny-llama", LoraTarget::All, 0.0);
    let lora = tiny.trained();
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
