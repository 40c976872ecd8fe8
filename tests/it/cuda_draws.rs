//! Tokens that a GPU draws, or leaves to the engine, against those that the CPU draws.

use infold::engine::{Dtype, EngineOptions, SamplingParams};
use infold::kernels::MAX_STEP_BIASES;

use crate::cuda::{
    BATCH_TOLERANCE, F16_TOLERANCE, assert_all_near, assert_near, has_gpu, on_gpu, prompt, prompts,
    run_alone, some_tokens,
};
use crate::random_models::{SHAPES, Shape, VOCAB_SIZE};
use crate::tiny_engine::{collect, greedy, options, run, run_together, start, submit};

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
            ..greedy(some_tokens(40))
        },
        SamplingParams {
            frequency_penalty: 0.7,
            presence_penalty: 0.4,
            ..greedy(some_tokens(40))
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

/// Tokens enough that every warp of a row's blocks has its part. Logits differ a little from the
/// CPU's, so that a draw in fifty may fall on the other side of a token's end.
#[test]
fn a_seed_draws_the_tokens_that_it_draws_on_the_cpu() {
    if !has_gpu() {
        return;
    }
    let folder = Shape {
        vocab_size: 40_003,
        ..SHAPES[0]
    }
    .write();
    let (cpu, gpu) = (
        start(folder.path(), &options()),
        start(folder.path(), &on_gpu(Dtype::Float16)),
    );
    let plain = SamplingParams {
        temperature: 0.6,
        ..greedy(4)
    };
    let ways = [
        plain.clone(),
        SamplingParams {
            top_k: 20,
            top_p: 0.8,
            ..plain.clone()
        },
        SamplingParams {
            min_p: 0.05,
            logprobs: Some(2),
            ..plain.clone()
        },
        SamplingParams {
            top_k: u32::MAX,
            ..plain.clone()
        },
        SamplingParams {
            frequency_penalty: 0.5,
            typical_p: 0.9,
            ..plain
        },
    ];
    let mut num_equal = 0;
    for way in &ways {
        for seed in 0..6 {
            let params = SamplingParams {
                seed: Some(seed),
                ..way.clone()
            };
            let [want, got] =
                [&cpu, &gpu].map(|engine| run(engine, &prompt(20, 1), params.clone()).token_ids);
            // What follows another token is another text.
            let same = want.iter().zip(&got).take_while(|(want, got)| want == got);
            num_equal += same.count();
        }
    }
    let num_wanted = 6 * 4 * ways.len();
    assert!(
        num_equal * 10 >= num_wanted * 9,
        "{num_equal} of {num_wanted}"
    );
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
fn more_penalties_than_slots_are_drawn_by_the_engine() {
    if !has_gpu() {
        return;
    }
    let folder = SHAPES[2].write();
    let narrow = EngineOptions {
        max_num_seqs: 4,
        ..on_gpu(Dtype::Float16)
    };
    let engine = start(folder.path(), &narrow);
    let penalized = SamplingParams {
        repetition_penalty: 1.3,
        ..greedy(some_tokens(30))
    };
    let want = run_alone(&engine, &penalized);
    let got = run_together(&engine, &prompts(), &penalized);
    assert_all_near("penalties", &got, &want, BATCH_TOLERANCE);
}

#[test]
fn more_biases_than_a_step_takes_are_drawn_by_the_engine() {
    if !has_gpu() {
        return;
    }
    let folder = SHAPES[0].write();
    let engine = start(folder.path(), &on_gpu(Dtype::Float16));
    let biased = SamplingParams {
        logit_bias: (0..VOCAB_SIZE as u32)
            .map(|id| (id, (id % 7) as f32 / 4.0))
            .collect(),
        repetition_penalty: 1.3,
        ..greedy(4)
    };
    let num_sequences = MAX_STEP_BIASES / VOCAB_SIZE + 2;
    let prompts: Vec<_> = (0..num_sequences).map(|salt| prompt(3, salt)).collect();
    let got = run_together(&engine, &prompts, &biased);
    for index in [0, num_sequences - 1] {
        let want = run(&engine, &prompts[index], biased.clone());
        assert_all_near("biases", &got[index..=index], &[want], BATCH_TOLERANCE);
    }
}
