//! The engine on a CPU with `--kv-cache-dtype fp8`: near the answers of a cache of f32, and the same
//! however a request is batched, chunked, cached, preempted or split over ranks.
//!
//! Keys and values are rounded before anything reads them, those of the step itself too, so that it
//! makes no difference where they come from.

use infold::engine::{
    AsyncScheduling, EngineOptions, KvCacheDtype, MaxModelLen, SamplingParams, TokenLogprobs,
};

use crate::engine_invariance::{MODELS, prompt, prompts, run_alone, with_prompt_logprobs};
use crate::tiny_engine::{Answer, assert_same, greedy, options, run, run_together, start_fixture};

fn fp8() -> EngineOptions {
    EngineOptions {
        kv_cache_dtype: KvCacheDtype::Fp8,
        prefix_caching: false,
        ..options()
    }
}

fn prompt_logprobs(answers: &[Answer]) -> Vec<f32> {
    let prompts = answers.iter().filter_map(|answer| answer.prompt.as_ref());
    let entries = prompts.flatten().flatten();
    entries.map(|entry: &TokenLogprobs| entry.logprob).collect()
}

/// Returns the norm of the difference by the norm of what is wanted.
fn relative_error(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|x| x * x).sum::<f32>().sqrt();
    let error = norm(&mut got.iter().zip(want).map(|(got, want)| got - want));
    error / norm(&mut want.iter().copied())
}

#[test]
fn rounded_keys_and_values_move_logprobs_a_little() {
    for model in MODELS {
        let params = with_prompt_logprobs(1);
        let of = |options: &EngineOptions| {
            prompt_logprobs(&run_alone(
                &start_fixture(model, options),
                &prompts(),
                &params,
            ))
        };
        let (got, want) = (of(&fp8()), of(&options()));
        let error = relative_error(&got, &want);
        assert!(error > 1e-3 && error < 0.1, "{model}: {error}");
    }
}

#[test]
fn batches_chunks_and_steps_ahead_change_nothing() {
    for model in MODELS {
        let params = with_prompt_logprobs(24);
        let engine = start_fixture(model, &fp8());
        let alone = run_alone(&engine, &prompts(), &params);
        let ahead = EngineOptions {
            async_scheduling: AsyncScheduling::On,
            ..fp8()
        };
        let chunked = EngineOptions {
            max_num_seqs: 4,
            max_num_batched_tokens: 7,
            ..fp8()
        };
        let others = [&ahead, &chunked].map(|options| start_fixture(model, options));
        for (what, engine) in [
            ("together", &engine),
            ("ahead", &others[0]),
            ("chunked", &others[1]),
        ] {
            let answers = run_together(engine, &prompts(), &params);
            for (got, want) in answers.iter().zip(&alone) {
                let what = format!("{model} {what}, {} tokens", got.prompt_len());
                assert_same(&what, got, want, 0.0);
            }
        }
    }
}

#[test]
fn a_cached_prefix_answers_as_a_cold_one() {
    for model in MODELS {
        let caching = EngineOptions {
            prefix_caching: true,
            ..fp8()
        };
        let engine = start_fixture(model, &caching);
        let cold = run(&engine, &prompt(100, 0), greedy(16));
        let warm = run(&engine, &prompt(100, 0), greedy(16));
        // The last token's block is copied before it is computed again.
        assert_eq!((cold.num_cached_tokens, warm.num_cached_tokens), (0, 99));
        assert_same(model, &warm, &cold, 0.0);
    }
}

#[test]
fn preempted_sequences_answer_as_undisturbed_ones_in_a_quarter_of_the_memory() {
    // A token of tiny-qwen2 takes 3 layers · 2 · 4 heads · 8 bytes = 192; 20 blocks hold 320 tokens.
    let tight = EngineOptions {
        kv_cache_memory_bytes: Some(20 * 16 * 192),
        max_model_len: MaxModelLen::Tokens(256),
        ..fp8()
    };
    let prompts: Vec<_> = (0..8).map(|salt| prompt(30 + salt, salt)).collect();
    let engine = start_fixture("tiny-qwen2", &tight);
    let crowded = run_together(&engine, &prompts, &greedy(64));
    assert_eq!(engine.stats().num_blocks_total, 20);
    assert!(engine.stats().num_preemptions > 0, "nothing was preempted");
    let undisturbed = run_alone(&start_fixture("tiny-qwen2", &fp8()), &prompts, &greedy(64));
    for (got, want) in crowded.iter().zip(&undisturbed) {
        assert_same("preempted", got, want, 0.0);
    }
}

#[test]
fn two_ranks_answer_as_one() {
    for model in MODELS {
        let params: SamplingParams = with_prompt_logprobs(1);
        let one = run_together(&start_fixture(model, &fp8()), &prompts(), &params);
        let split = EngineOptions {
            tensor_parallel_size: 2,
            num_threads: Some(2),
            ..fp8()
        };
        let two = run_together(&start_fixture(model, &split), &prompts(), &params);
        // A sum in another order may fall on the other side of the middle between two codes.
        let error = relative_error(&prompt_logprobs(&two), &prompt_logprobs(&one));
        assert!(error < 1e-2, "{model}: {error}");
    }
}
