//! The engine on a GPU against the engine on the CPU, and against itself under other batchings.
//!
//! Checkpoints are random, of the head sizes that the CUDA kernels have, written to a temporary
//! folder. Without a GPU nothing can be shown, so the tests say so and end.

use std::collections::HashMap;

use infold::engine::{
    DeviceChoice, Dtype, EngineHandle, EngineOptions, Graphs, KvCacheDtype, SamplingParams,
};
use infold::kernels::Kernels;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

use crate::tiny_engine::{Answer, collect, greedy, options, run, run_together, start, submit};

/// How far a logprob of float16 arithmetic may be from float32's, and a tenth of its size more.
pub(crate) const F16_TOLERANCE: f32 = 0.05;
/// The same of bfloat16, which has three bits less.
const BF16_TOLERANCE: f32 = 0.2;
/// The same of all prompt logprobs together, relative to their norm.
const RELATIVE_TOLERANCE: f32 = 2e-2;
/// Between two batchings of float16 on the GPU, which choose other kernels.
const BATCH_TOLERANCE: f32 = 0.05;
/// No multiple of 8, as after resizing.
const VOCAB_SIZE: usize = 1003;

/// A random checkpoint's shape.
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    model_type: &'static str,
    hidden: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    tied: bool,
}

pub(crate) const SHAPES: [Shape; 3] = [
    Shape {
        model_type: "qwen2",
        hidden: 256,
        heads: 4,
        kv_heads: 2,
        head_dim: 64,
        tied: true,
    },
    Shape {
        model_type: "qwen3",
        hidden: 192,
        heads: 7,
        kv_heads: 1,
        head_dim: 128,
        tied: false,
    },
    Shape {
        model_type: "llama",
        hidden: 576,
        heads: 9,
        kv_heads: 3,
        head_dim: 64,
        tied: true,
    },
];

const LAYERS: usize = 3;

impl Shape {
    /// The MLP's width; of nine heads SmolLM2's, which three ranks divide.
    fn intermediate(&self) -> usize {
        match self.heads {
            9 => 1536,
            _ => 640,
        }
    }

    fn config(&self) -> Value {
        json!({
            "model_type": self.model_type, "hidden_size": self.hidden,
            "intermediate_size": self.intermediate(), "num_hidden_layers": LAYERS,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim, "vocab_size": VOCAB_SIZE, "rms_norm_eps": 1e-6,
            "max_position_embeddings": 4096, "rope_theta": 10000.0,
            "tie_word_embeddings": self.tied, "torch_dtype": "bfloat16",
        })
    }

    /// Writes the checkpoint and returns its folder.
    pub(crate) fn write(&self) -> tempfile::TempDir {
        let mut random = StdRng::seed_from_u64(self.hidden as u64);
        let mut tensors = HashMap::new();
        let mut add = |name: String, dims: &[usize], mean: f32, spread: f32| {
            let values = (0..dims.iter().product::<usize>())
                .map(|_| half::bf16::from_f32(mean + spread * random.random_range(-1.0..1.0f32)));
            let bytes: Vec<u8> = values.flat_map(half::bf16::to_le_bytes).collect();
            tensors.insert(name, (dims.to_vec(), bytes));
        };
        let intermediate = self.intermediate();
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        add(
            "model.embed_tokens.weight".into(),
            &[VOCAB_SIZE, self.hidden],
            0.0,
            0.5,
        );
        add("model.norm.weight".into(), &[self.hidden], 1.0, 0.1);
        if !self.tied {
            add(
                "lm_head.weight".into(),
                &[VOCAB_SIZE, self.hidden],
                0.0,
                0.3,
            );
        }
        for layer in 0..LAYERS {
            let name = |part: &str| format!("model.layers.{layer}.{part}");
            let linears = [
                ("self_attn.q_proj", q, self.hidden),
                ("self_attn.k_proj", kv, self.hidden),
                ("self_attn.v_proj", kv, self.hidden),
                ("self_attn.o_proj", self.hidden, q),
                ("mlp.gate_proj", intermediate, self.hidden),
                ("mlp.up_proj", intermediate, self.hidden),
                ("mlp.down_proj", self.hidden, intermediate),
            ];
            for (part, rows, cols) in linears {
                let spread = 2.0 / (cols as f32).sqrt();
                add(name(&format!("{part}.weight")), &[rows, cols], 0.0, spread);
                let is_qkv = !part.ends_with("o_proj") && part.starts_with("self_attn");
                if self.model_type == "qwen2" && is_qkv {
                    add(name(&format!("{part}.bias")), &[rows], 0.0, 0.5);
                }
            }
            for norm in ["input_layernorm", "post_attention_layernorm"] {
                add(name(&format!("{norm}.weight")), &[self.hidden], 1.0, 0.1);
            }
            if self.model_type == "qwen3" {
                for norm in ["q_norm", "k_norm"] {
                    add(
                        name(&format!("self_attn.{norm}.weight")),
                        &[self.head_dim],
                        1.0,
                        0.2,
                    );
                }
            }
        }
        let views = tensors.iter().map(|(name, (dims, bytes))| {
            let dtype = safetensors::Dtype::BF16;
            (name, TensorView::new(dtype, dims.clone(), bytes).unwrap())
        });
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("model.safetensors");
        safetensors::serialize_to_file(views, None, &file).unwrap();
        let config = serde_json::to_vec(&self.config()).unwrap();
        std::fs::write(folder.path().join("config.json"), config).unwrap();
        folder
    }
}

pub(crate) fn on_gpu(dtype: Dtype) -> EngineOptions {
    EngineOptions {
        device: DeviceChoice::Cuda(0),
        dtype,
        kv_cache_dtype: KvCacheDtype::Auto,
        prefix_caching: false,
        max_num_seqs: 64,
        ..options()
    }
}

fn has_gpu() -> bool {
    let has_gpu = Kernels::num_gpus() > 0;
    if !has_gpu {
        eprintln!("skipped: this machine has no GPU");
    }
    has_gpu
}

pub(crate) fn prompt(len: usize, salt: usize) -> Vec<u32> {
    (0..len)
        .map(|i| ((i * i * 31 + i * 17 + salt * 101 + 7) % VOCAB_SIZE) as u32)
        .collect()
}

pub(crate) fn prompts() -> Vec<Vec<u32>> {
    [1, 3, 16, 17, 33, 40, 100, 5, 300, 64, 2]
        .iter()
        .enumerate()
        .map(|(salt, &len)| prompt(len, salt))
        .collect()
}

pub(crate) fn params(max_tokens: usize) -> SamplingParams {
    SamplingParams {
        prompt_logprobs: Some(0),
        ..greedy(max_tokens)
    }
}

pub(crate) fn run_alone(engine: &EngineHandle, params: &SamplingParams) -> Vec<Answer> {
    prompts()
        .iter()
        .map(|prompt| run(engine, prompt, params.clone()))
        .collect()
}

/// Asserts that logprobs agree, and tokens up to where two of them are as likely.
#[track_caller]
fn assert_near(what: &str, got: &Answer, want: &Answer, tolerance: f32) {
    let flat = |answer: &Answer| -> Vec<f32> {
        let prompt = answer.prompt.iter().flatten().flatten();
        prompt.map(|entry| entry.logprob).collect()
    };
    let (got_prompt, want_prompt) = (flat(got), flat(want));
    assert_eq!(got_prompt.len(), want_prompt.len(), "{what}: prompt");
    for (i, (got, want)) in got_prompt.iter().zip(&want_prompt).enumerate() {
        assert!(
            (got - want).abs() <= tolerance * (1.0 - want / 10.0),
            "{what}: prompt logprob {i}: {got} for {want}"
        );
    }
    let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|x| x * x).sum::<f32>().sqrt();
    let error = norm(
        &mut got_prompt
            .iter()
            .zip(&want_prompt)
            .map(|(got, want)| got - want),
    );
    let size = norm(&mut want_prompt.iter().copied());
    assert!(
        error <= RELATIVE_TOLERANCE * size,
        "{what}: {error} of {size}"
    );
    for (i, (got_token, want_token)) in got.token_ids.iter().zip(&want.token_ids).enumerate() {
        let (got, want) = (&got.logprobs[i], &want.logprobs[i]);
        let gap = (got.logprob - want.logprob).abs();
        assert!(
            gap <= tolerance * (1.0 - want.logprob / 10.0),
            "{what}: token {i}: logprob {} for {}",
            got.logprob,
            want.logprob
        );
        if got_token != want_token {
            let rival = want.top.iter().find(|(token, _)| token == got_token);
            let (_, logprob) = rival.unwrap_or_else(|| panic!("{what}: token {i}: {got_token}"));
            assert!(
                want.logprob - logprob <= tolerance,
                "{what}: token {i} is no near tie"
            );
            return;
        }
    }
}

pub(crate) fn assert_all_near(what: &str, got: &[Answer], want: &[Answer], tolerance: f32) {
    for (got, want) in got.iter().zip(want) {
        assert_near(
            &format!("{what}, {} tokens", got.prompt_len()),
            got,
            want,
            tolerance,
        );
    }
}

#[test]
fn a_gpu_answers_as_the_cpu() {
    if !has_gpu() {
        return;
    }
    for shape in SHAPES {
        let folder = shape.write();
        let want = run_alone(&start(folder.path(), &options()), &params(24));
        let types = [
            (Dtype::Bfloat16, BF16_TOLERANCE),
            (Dtype::Float16, F16_TOLERANCE),
        ];
        for (dtype, tolerance) in types {
            let got = run_alone(&start(folder.path(), &on_gpu(dtype)), &params(24));
            let what = format!("{} {dtype:?}", shape.model_type);
            assert_all_near(&what, &got, &want, tolerance);
        }
    }
}

#[test]
fn batching_chunks_and_graphs_change_nothing() {
    if !has_gpu() {
        return;
    }
    for shape in SHAPES {
        let folder = shape.write();
        let graphed = on_gpu(Dtype::Float16);
        let eager = EngineOptions {
            graphs: Graphs::Off,
            ..graphed.clone()
        };
        let chunked = EngineOptions {
            max_num_seqs: 4,
            max_num_batched_tokens: 23,
            ..graphed.clone()
        };
        let want = run_alone(&start(folder.path(), &eager), &params(40));
        for (what, options) in [
            ("graphs", &graphed),
            ("eager", &eager),
            ("chunks", &chunked),
        ] {
            let what = format!("{} {what}", shape.model_type);
            let engine = start(folder.path(), options);
            assert_all_near(
                &what,
                &run_alone(&engine, &params(40)),
                &want,
                BATCH_TOLERANCE,
            );
            let got = run_together(&engine, &prompts(), &params(40));
            assert_all_near(&format!("{what} together"), &got, &want, BATCH_TOLERANCE);
            // Once more: now every bucket is replayed.
            let again = run_together(&engine, &prompts(), &params(40));
            assert_all_near(&format!("{what} again"), &again, &want, BATCH_TOLERANCE);
        }
    }
}

#[test]
fn cached_and_preempted_sequences_answer_as_undisturbed_ones() {
    if !has_gpu() {
        return;
    }
    let folder = SHAPES[0].write();
    let want = run_alone(&start(folder.path(), &on_gpu(Dtype::Float16)), &greedy(60));
    // 3 layers, 2 kv heads of 64: 24 KiB a block, so 40 blocks, of which 300 + 60 tokens take 23.
    let tight = EngineOptions {
        kv_cache_memory_bytes: Some((40 * 24) << 10),
        max_model_len: infold::engine::MaxModelLen::Tokens(400),
        ..on_gpu(Dtype::Float16)
    };
    let engine = start(folder.path(), &tight);
    let got = run_together(&engine, &prompts(), &greedy(60));
    assert!(engine.stats().num_preemptions > 0, "nothing was preempted");
    assert_all_near("preempted", &got, &want, BATCH_TOLERANCE);

    let caching = EngineOptions {
        prefix_caching: true,
        ..on_gpu(Dtype::Float16)
    };
    let engine = start(folder.path(), &caching);
    let cold = run_alone(&engine, &greedy(60));
    let warm = run_alone(&engine, &greedy(60));
    assert!(
        warm[8].num_cached_tokens >= 288,
        "{}",
        warm[8].num_cached_tokens
    );
    assert_all_near("cold", &cold, &want, BATCH_TOLERANCE);
    assert_all_near("warm", &warm, &want, BATCH_TOLERANCE);
}

#[test]
fn penalties_biases_and_logprobs_are_the_cpus() {
    if !has_gpu() {
        return;
    }
    let folder = SHAPES[2].write();
    let (cpu, gpu) = (
        start(folder.path(), &options()),
        start(folder.path(), &on_gpu(Dtype::Float16)),
    );
    let cases = [
        SamplingParams {
            repetition_penalty: 1.3,
            ..greedy(40)
        },
        SamplingParams {
            frequency_penalty: 0.7,
            presence_penalty: 0.4,
            ..greedy(40)
        },
        SamplingParams {
            logit_bias: vec![(17, 30.0), (4, -5.0)],
            ..greedy(8)
        },
        SamplingParams {
            logprobs: Some(40),
            ..greedy(8)
        },
        SamplingParams {
            min_tokens: 5,
            stop_token_ids: (0..500).collect(),
            ..greedy(12)
        },
    ];
    for (i, case) in cases.iter().enumerate() {
        let (want, got) = (
            run(&cpu, &prompt(50, i), case.clone()),
            run(&gpu, &prompt(50, i), case.clone()),
        );
        assert_near(&format!("case {i}"), &got, &want, F16_TOLERANCE);
        assert_eq!(got.finish, want.finish, "case {i}");
    }
}

#[test]
fn a_seed_draws_the_same_in_any_company() {
    if !has_gpu() {
        return;
    }
    let folder = SHAPES[1].write();
    let engine = start(folder.path(), &on_gpu(Dtype::Float16));
    let seeded = SamplingParams {
        temperature: 0.9,
        top_p: 0.95,
        seed: Some(11),
        ..greedy(30)
    };
    let first = run(&engine, &prompt(40, 1), seeded.clone());
    let again = run(&engine, &prompt(40, 1), seeded.clone());
    assert_eq!(first.token_ids, again.token_ids);
    // Abandoned neighbours come and go meanwhile.
    for salt in 0..5 {
        drop(submit(&engine, &prompt(30, salt), greedy(500)));
    }
    assert_eq!(
        collect(submit(&engine, &prompt(40, 1), seeded))
            .token_ids
            .len(),
        30
    );
}

#[test]
fn two_gpus_answer_as_one() {
    if Kernels::num_gpus() < 2 {
        eprintln!("skipped: this machine has fewer than two GPUs");
        return;
    }
    let folder = SHAPES[0].write();
    let one = on_gpu(Dtype::Float16);
    let want = run_alone(&start(folder.path(), &one), &params(40));
    for graphs in [Graphs::Off, Graphs::Decode] {
        let two = EngineOptions {
            tensor_parallel_size: 2,
            graphs,
            ..one.clone()
        };
        let engine = start(folder.path(), &two);
        let what = format!("two GPUs, {graphs:?}");
        assert_all_near(
            &what,
            &run_alone(&engine, &params(40)),
            &want,
            F16_TOLERANCE,
        );
        for _ in 0..2 {
            let got = run_together(&engine, &prompts(), &params(40));
            assert_all_near(&format!("{what} together"), &got, &want, F16_TOLERANCE);
        }
        let seeded = SamplingParams {
            temperature: 0.8,
            seed: Some(5),
            ..greedy(30)
        };
        let first = run(&engine, &prompt(40, 1), seeded.clone());
        assert_eq!(
            first.token_ids,
            run(&engine, &prompt(40, 1), seeded).token_ids
        );
    }
}
