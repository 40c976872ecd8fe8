//! The engine on a GPU against the engine on the CPU, and against itself under other batchings.
//!
//! Checkpoints are random, of the head sizes that the CUDA kernels have, written to a temporary
//! folder. Without a GPU nothing can be shown, so the tests say so and end. On emulated ones
//! (`scripts/check_cuda_emulated.sh`), where a step takes a tenth of a second, they take fewer and
//! shorter prompts.

use infold::engine::{
    AsyncScheduling, DeviceChoice, Dtype, EngineHandle, EngineOptions, FinishReason, Graphs,
    KvCacheDtype, SamplingParams,
};
use infold::kernels::Kernels;

use crate::random_models::{SHAPES, Shape, VOCAB_SIZE};
use crate::tiny_engine::{Answer, collect, greedy, options, run, run_together, start, submit};

/// How far logprobs may be from what is wanted.
#[derive(Clone, Copy)]
pub(crate) struct Tolerance {
    /// Of one, and a tenth of its size more.
    pub(crate) logprob: f32,
    /// Of all prompt logprobs together, relative to their norm.
    pub(crate) relative: f32,
}

/// Between float16 arithmetic and float32's.
pub(crate) const F16_TOLERANCE: Tolerance = Tolerance {
    logprob: 0.05,
    relative: 2e-2,
};
/// The same of bfloat16, which has three bits less.
const BF16_TOLERANCE: Tolerance = Tolerance {
    logprob: 0.2,
    relative: 2e-2,
};
/// Between two batchings of float16 on the GPU, which choose other kernels.
pub(crate) const BATCH_TOLERANCE: Tolerance = F16_TOLERANCE;

/// Returns whether the GPUs are emulated on this machine's CPU.
pub(crate) fn is_emulated() -> bool {
    std::env::var_os("EMULATED_CAPABILITY").is_some()
}

/// Returns how many of something there are: `many`, on an emulated GPU `few`.
pub(crate) fn many_or_few<T>(many: T, few: T) -> T {
    if is_emulated() { few } else { many }
}

/// Returns the tokens that a request asks for, of which `many` are the wish.
pub(crate) fn some_tokens(many: usize) -> usize {
    many_or_few(many, many.div_ceil(5))
}

pub(crate) fn on_gpu(dtype: Dtype) -> EngineOptions {
    EngineOptions {
        max_num_batched_tokens: many_or_few(options().max_num_batched_tokens, 256),
        device: DeviceChoice::Cuda(0),
        dtype,
        kv_cache_dtype: KvCacheDtype::Auto,
        prefix_caching: false,
        max_num_seqs: 64,
        ..options()
    }
}

pub(crate) fn has_gpu() -> bool {
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
    let lens: &[usize] = many_or_few(
        &[1, 3, 16, 17, 33, 40, 100, 5, 300, 64, 2],
        &[1, 17, 40, 300, 3],
    );
    lens.iter()
        .enumerate()
        .map(|(salt, &len)| prompt(len, salt))
        .collect()
}

pub(crate) fn params(max_tokens: usize) -> SamplingParams {
    SamplingParams {
        prompt_logprobs: Some(0),
        ..greedy(some_tokens(max_tokens))
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
pub(crate) fn assert_near(what: &str, got: &Answer, want: &Answer, tolerance: Tolerance) {
    let flat = |answer: &Answer| -> Vec<f32> {
        let prompt = answer.prompt.iter().flatten().flatten();
        prompt.map(|entry| entry.logprob).collect()
    };
    let (got_prompt, want_prompt) = (flat(got), flat(want));
    assert_eq!(got_prompt.len(), want_prompt.len(), "{what}: prompt");
    for (i, (got, want)) in got_prompt.iter().zip(&want_prompt).enumerate() {
        assert!(
            (got - want).abs() <= tolerance.logprob * (1.0 - want / 10.0),
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
        error <= tolerance.relative * size,
        "{what}: {error} of {size}"
    );
    for (i, (got_token, want_token)) in got.token_ids.iter().zip(&want.token_ids).enumerate() {
        let (got, want) = (&got.logprobs[i], &want.logprobs[i]);
        let gap = (got.logprob - want.logprob).abs();
        assert!(
            gap <= tolerance.logprob * (1.0 - want.logprob / 10.0),
            "{what}: token {i}: logprob {} for {}",
            got.logprob,
            want.logprob
        );
        if got_token != want_token {
            let rival = want.top.iter().find(|(token, _)| token == got_token);
            let (_, logprob) = rival.unwrap_or_else(|| panic!("{what}: token {i}: {got_token}"));
            // Each of the two may be as far off as any logprob.
            assert!(
                want.logprob - logprob <= 2.0 * tolerance.logprob * (1.0 - logprob / 10.0),
                "{what}: token {i} is no near tie: {logprob} for {}",
                want.logprob
            );
            return;
        }
    }
}

pub(crate) fn assert_all_near(what: &str, got: &[Answer], want: &[Answer], tolerance: Tolerance) {
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

/// Qwen2.5's residual stream has elements of some ten thousands, near float16's end at 65,504.
#[test]
fn large_activations_stay_right_in_float16() {
    if !has_gpu() {
        return;
    }
    let shape = Shape {
        outliers: 6000.0,
        ..SHAPES[0]
    };
    let folder = shape.write();
    let want = run_alone(&start(folder.path(), &options()), &params(24));
    let got = run_alone(&start(folder.path(), &on_gpu(Dtype::Float16)), &params(24));
    // Whatever overflowed would be infinite or no number, and spoil all that comes after. What is
    // left beside elements of some thousands is coarse: single logprobs differ by some tenths.
    let logprobs = |answers: &[Answer]| -> Vec<f32> {
        let prompts = answers.iter().flat_map(|answer| answer.prompt.iter());
        let entries = prompts.flatten().flatten();
        entries.map(|entry| entry.logprob).collect()
    };
    let (got, want) = (logprobs(&got), logprobs(&want));
    assert_eq!(got.len(), want.len());
    let mut errors: Vec<f32> = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).collect();
    assert!(errors.iter().all(|error| error.is_finite()));
    errors.sort_by(f32::total_cmp);
    let (middle, most) = (errors[errors.len() / 2], errors[errors.len() * 9 / 10]);
    assert!(middle < 0.1 && most < 0.4, "{middle} {most}");
}

/// Asserts that graphs, chunks of prompts and sequences together answer as one sequence alone.
#[track_caller]
pub(crate) fn assert_batchings_agree(shape: &Shape, graphed: &EngineOptions, tolerance: Tolerance) {
    let folder = shape.write();
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
    for (what, options) in [("graphs", graphed), ("eager", &eager), ("chunks", &chunked)] {
        let what = format!("{} {what}", shape.model_type);
        let engine = start(folder.path(), options);
        assert_all_near(&what, &run_alone(&engine, &params(40)), &want, tolerance);
        let got = run_together(&engine, &prompts(), &params(40));
        assert_all_near(&format!("{what} together"), &got, &want, tolerance);
        // Once more: now every bucket is replayed.
        let again = run_together(&engine, &prompts(), &params(40));
        assert_all_near(&format!("{what} again"), &again, &want, tolerance);
    }
}

#[test]
fn batching_chunks_and_graphs_change_nothing() {
    if !has_gpu() {
        return;
    }
    for shape in SHAPES {
        assert_batchings_agree(&shape, &on_gpu(Dtype::Float16), BATCH_TOLERANCE);
    }
}

#[test]
fn cached_and_preempted_sequences_answer_as_undisturbed_ones() {
    if !has_gpu() {
        return;
    }
    let folder = SHAPES[0].write();
    let params = greedy(some_tokens(60));
    let want = run_alone(&start(folder.path(), &on_gpu(Dtype::Float16)), &params);
    // 3 layers, 2 kv heads of 64: 24 KiB a block, so 40 blocks, of which 300 + 60 tokens take 23.
    // Emulated: 26 blocks, of which 300 + 12 tokens take 20.
    let num_blocks = many_or_few(40, 26);
    let tight = EngineOptions {
        kv_cache_memory_bytes: Some((num_blocks * 24) << 10),
        max_model_len: infold::engine::MaxModelLen::Tokens(400),
        ..on_gpu(Dtype::Float16)
    };
    let engine = start(folder.path(), &tight);
    let got = run_together(&engine, &prompts(), &params);
    assert!(engine.stats().num_preemptions > 0, "nothing was preempted");
    assert_all_near("preempted", &got, &want, BATCH_TOLERANCE);

    let caching = EngineOptions {
        prefix_caching: true,
        ..on_gpu(Dtype::Float16)
    };
    let engine = start(folder.path(), &caching);
    let cold = run_alone(&engine, &params);
    let warm = run_alone(&engine, &params);
    let num_cached = warm.iter().map(|answer| answer.num_cached_tokens).max();
    assert!(num_cached >= Some(288), "{num_cached:?}");
    assert_all_near("cold", &cold, &want, BATCH_TOLERANCE);
    assert_all_near("warm", &warm, &want, BATCH_TOLERANCE);
}

/// Ways to draw that a step launched ahead must not disturb: on the device, with its counts, with
/// ends that nobody foresees, and partly or wholly by the engine.
fn ways_to_draw() -> Vec<SamplingParams> {
    vec![
        greedy(some_tokens(40)),
        SamplingParams {
            temperature: 0.9,
            top_p: 0.95,
            seed: Some(7),
            ..greedy(some_tokens(40))
        },
        SamplingParams {
            repetition_penalty: 1.2,
            frequency_penalty: 0.4,
            presence_penalty: 0.3,
            ..greedy(some_tokens(40))
        },
        SamplingParams {
            min_tokens: 6,
            stop_token_ids: (0..300).collect(),
            ..greedy(some_tokens(40))
        },
        SamplingParams {
            logprobs: Some(40),
            ..greedy(some_tokens(12))
        },
        params(20),
    ]
}

/// Two engines may choose other algorithms, so their answers are near; one engine's answers to
/// requests that run alone must have the same bits each time.
fn assert_same_in_both_orders(what: &str, model: &std::path::Path, options: &EngineOptions) {
    let in_turn = EngineOptions {
        async_scheduling: AsyncScheduling::Off,
        ..options.clone()
    };
    let (ahead, in_turn) = (start(model, options), start(model, &in_turn));
    for (i, case) in ways_to_draw().iter().enumerate() {
        let (got, want) = (run_alone(&ahead, case), run_alone(&in_turn, case));
        if case.temperature > 0.0 {
            // A bit of a logit seldom tips a random draw.
            let num_equal = got
                .iter()
                .zip(&want)
                .filter(|(got, want)| got.token_ids == want.token_ids);
            assert!(num_equal.count() > want.len() / 2, "{what}, case {i}");
        } else {
            assert_all_near(&format!("{what}, case {i}"), &got, &want, BATCH_TOLERANCE);
        }
        for round in 0..many_or_few(3, 1) {
            assert_eq!(
                run_alone(&ahead, case),
                got,
                "{what}, case {i}, round {round}"
            );
        }
    }
    // What the rows of ended and abandoned neighbours leave must not show.
    let params = greedy(some_tokens(40));
    let want = run_alone(&ahead, &params);
    let stopping = SamplingParams {
        stop_token_ids: (0..200).collect(),
        ..greedy(some_tokens(200))
    };
    for round in 0..many_or_few(3, 1) {
        let stopped: Vec<_> = (0..20)
            .map(|salt| submit(&ahead, &prompt(20 + salt, salt), stopping.clone()))
            .collect();
        for salt in 0..10 {
            drop(submit(&ahead, &prompt(30, salt), greedy(500)));
        }
        let got = run_together(&ahead, &prompts(), &params);
        assert_all_near(&format!("{what} together"), &got, &want, BATCH_TOLERANCE);
        for stream in stopped {
            let answer = collect(stream);
            let last = answer.token_ids.last().copied();
            let is_end = |token: &u32| *token < 200;
            let num_ends = answer
                .token_ids
                .iter()
                .filter(|token| is_end(token))
                .count();
            match answer.finish {
                FinishReason::StopToken(token) => assert_eq!((last, num_ends), (Some(token), 1)),
                other => assert_eq!((other, num_ends), (FinishReason::Length, 0)),
            }
        }
        let again = run_alone(&ahead, &params);
        assert_eq!(again, want, "{what}, after round {round}");
    }
}

#[test]
fn steps_launched_ahead_answer_as_in_turn() {
    if !has_gpu() {
        return;
    }
    for shape in &SHAPES[..many_or_few(SHAPES.len(), 1)] {
        let folder = shape.write();
        for graphs in [Graphs::Decode, Graphs::Off] {
            let options = EngineOptions {
                graphs,
                ..on_gpu(Dtype::Float16)
            };
            let what = format!("{} {graphs:?}", shape.model_type);
            assert_same_in_both_orders(&what, folder.path(), &options);
        }
    }
}

#[test]
fn fewer_tokens_than_a_step_may_have_are_measured() {
    if !has_gpu() {
        return;
    }
    let folder = SHAPES[0].write();
    let short = EngineOptions {
        max_num_seqs: 1,
        max_model_len: infold::engine::MaxModelLen::Tokens(16),
        max_num_batched_tokens: 512,
        ..on_gpu(Dtype::Float16)
    };
    let prompts = [prompt(9, 1)];
    let got = run_together(&start(folder.path(), &short), &prompts, &params(7));
    let want = run_together(
        &start(folder.path(), &on_gpu(Dtype::Float16)),
        &prompts,
        &params(7),
    );
    assert_all_near("a short sequence", &got, &want, BATCH_TOLERANCE);
}

#[test]
fn two_gpus_answer_in_both_orders_as_one() {
    if Kernels::num_gpus() < 2 {
        eprintln!("skipped: this machine has fewer than two GPUs");
        return;
    }
    let folder = SHAPES[0].write();
    let all = [Graphs::Decode, Graphs::Off];
    for &graphs in &all[..many_or_few(all.len(), 1)] {
        let two = EngineOptions {
            tensor_parallel_size: 2,
            graphs,
            ..on_gpu(Dtype::Float16)
        };
        let what = format!("two GPUs, {graphs:?}");
        assert_same_in_both_orders(&what, folder.path(), &two);
    }
}
