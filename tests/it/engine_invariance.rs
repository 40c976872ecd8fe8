//! What must not change an answer: how a request is batched, chunked, cached, preempted, split over
//! ranks, or scheduled before the token before is known. Runs the engine on tiny checkpoints;
//! [`super::models_golden`] says that the answers are right.
//!
//! Each case runs with each step finished before the next, and with steps launched ahead as on GPUs.

use infold::engine::{
    AsyncScheduling, DeviceChoice, EngineError, EngineHandle, EngineOptions, FinishReason,
    KvCacheDtype, Quantization, SamplingParams, TokenEvent,
};

use crate::tiny_engine::{
    Answer, assert_same, collect, greedy, options, run, run_together, start_fixture, submit,
    try_start_fixture,
};

/// How far logprobs may be apart when only the order of summation differs.
pub(crate) const SUMMATION_TOLERANCE: f32 = 1e-4;

pub(crate) const MODELS: [&str; 4] = [
    "tiny-qwen2",
    "tiny-qwen2-untied",
    "tiny-qwen3",
    "tiny-llama",
];

/// Makes two tests of each case.
macro_rules! in_both_orders {
    ($($case:ident),* $(,)?) => {
        mod in_turn {
            $(#[test]
            fn $case() {
                super::$case(super::AsyncScheduling::Off);
            })*
        }

        mod launched_ahead {
            $(#[test]
            fn $case() {
                super::$case(super::AsyncScheduling::On);
            })*
        }
    };
}

in_both_orders! {
    batched_requests_answer_as_alone,
    chunked_prompts_answer_as_whole_ones,
    a_cached_prefix_answers_as_a_cold_one,
    a_prompt_of_whole_blocks_keeps_its_last_token_to_compute,
    prompt_logprobs_are_whole_in_spite_of_the_cache,
    preempted_sequences_answer_as_undisturbed_ones,
    tensor_parallel_ranks_answer_as_one,
    ranks_that_do_not_divide_the_heads_are_refused,
    threads_do_not_change_the_answer,
    a_seed_draws_the_same_text_alone_and_among_thirty_two,
    a_dropped_stream_frees_its_blocks,
    a_request_for_no_token_computes_the_prompt_only,
    a_sequence_ends_at_the_longest_length,
    launching_ahead_answers_bit_for_bit_as_in_turn,
    a_sequence_that_ends_unforeseen_ends_there,
    a_failing_draw_ends_its_sequence_alone,
    more_requests_than_places_all_answer,
}

/// Returns token ids that look random but are always the same: `salt` makes another prompt.
pub(crate) fn prompt(len: usize, salt: usize) -> Vec<u32> {
    (0..len)
        .map(|i| ((i * i * 31 + i * 17 + salt * 101 + 7) % 509) as u32)
        .collect()
}

pub(crate) fn prompts() -> Vec<Vec<u32>> {
    [1, 3, 16, 17, 33, 40, 100, 5]
        .iter()
        .enumerate()
        .map(|(salt, &len)| prompt(len, salt))
        .collect()
}

pub(crate) fn with_prompt_logprobs(max_tokens: usize) -> SamplingParams {
    SamplingParams {
        prompt_logprobs: Some(0),
        ..greedy(max_tokens)
    }
}

pub(crate) fn run_alone(
    engine: &EngineHandle,
    prompts: &[Vec<u32>],
    params: &SamplingParams,
) -> Vec<Answer> {
    prompts
        .iter()
        .map(|prompt| run(engine, prompt, params.clone()))
        .collect()
}

fn cache(order: AsyncScheduling) -> EngineOptions {
    EngineOptions {
        async_scheduling: order,
        ..options()
    }
}

fn no_cache(order: AsyncScheduling) -> EngineOptions {
    EngineOptions {
        prefix_caching: false,
        ..cache(order)
    }
}

fn batched_requests_answer_as_alone(order: AsyncScheduling) {
    for model in MODELS {
        let engine = start_fixture(model, &no_cache(order));
        let params = with_prompt_logprobs(24);
        let alone = run_alone(&engine, &prompts(), &params);
        let together = run_together(&engine, &prompts(), &params);
        for (got, want) in together.iter().zip(&alone) {
            assert_same(
                &format!("{model}, {} tokens", got.prompt_len()),
                got,
                want,
                0.0,
            );
        }
    }
}

fn chunked_prompts_answer_as_whole_ones(order: AsyncScheduling) {
    let small = EngineOptions {
        max_num_seqs: 4,
        max_num_batched_tokens: 7,
        ..no_cache(order)
    };
    for model in MODELS {
        let params = with_prompt_logprobs(12);
        let whole = run_alone(&start_fixture(model, &no_cache(order)), &prompts(), &params);
        let chunked = run_together(&start_fixture(model, &small), &prompts(), &params);
        for (got, want) in chunked.iter().zip(&whole) {
            assert_same(
                &format!("{model}, {} tokens", got.prompt_len()),
                got,
                want,
                SUMMATION_TOLERANCE,
            );
        }
    }
}

fn a_cached_prefix_answers_as_a_cold_one(order: AsyncScheduling) {
    for model in MODELS {
        let engine = start_fixture(model, &cache(order));
        let cold = run(&engine, &prompt(100, 0), greedy(16));
        let warm = run(&engine, &prompt(100, 0), greedy(16));
        assert_eq!(cold.num_cached_tokens, 0);
        // Six full blocks of sixteen and the beginning of the seventh, which the answer filled; the
        // last token is computed again.
        assert_eq!(warm.num_cached_tokens, 99, "{model}");
        assert_same(model, &warm, &cold, SUMMATION_TOLERANCE);

        let mut longer = prompt(64, 0);
        longer.extend(prompt(30, 9));
        let reused = run(&engine, &longer, greedy(16));
        let cold = run(&start_fixture(model, &no_cache(order)), &longer, greedy(16));
        assert_eq!(reused.num_cached_tokens, 64, "{model}");
        assert_same(model, &reused, &cold, SUMMATION_TOLERANCE);
    }
}

fn a_prompt_of_whole_blocks_keeps_its_last_token_to_compute(order: AsyncScheduling) {
    let engine = start_fixture("tiny-llama", &cache(order));
    let cold = run(&engine, &prompt(48, 3), greedy(4));
    let warm = run(&engine, &prompt(48, 3), greedy(4));
    assert_eq!(warm.num_cached_tokens, 47);
    assert_same("48 tokens", &warm, &cold, SUMMATION_TOLERANCE);
}

fn prompt_logprobs_are_whole_in_spite_of_the_cache(order: AsyncScheduling) {
    let engine = start_fixture("tiny-qwen2", &cache(order));
    let cold = run(&engine, &prompt(100, 0), with_prompt_logprobs(2));
    let warm = run(&engine, &prompt(100, 0), with_prompt_logprobs(2));
    assert_same("100 tokens", &warm, &cold, SUMMATION_TOLERANCE);
}

fn preempted_sequences_answer_as_undisturbed_ones(order: AsyncScheduling) {
    // A token of tiny-qwen2 takes 3 layers · 2 · 4 heads · 8 · 4 bytes = 768; 20 blocks hold 320 tokens.
    let tight = EngineOptions {
        kv_cache_memory_bytes: Some(20 * 16 * 768),
        max_model_len: infold::engine::MaxModelLen::Tokens(256),
        ..no_cache(order)
    };
    let prompts: Vec<_> = (0..8).map(|salt| prompt(30 + salt, salt)).collect();
    let engine = start_fixture("tiny-qwen2", &tight);
    let crowded = run_together(&engine, &prompts, &greedy(64));
    assert!(
        engine.stats().num_preemptions > 0,
        "nothing was preempted: {:?}",
        engine.stats()
    );
    let undisturbed = run_alone(
        &start_fixture("tiny-qwen2", &no_cache(order)),
        &prompts,
        &greedy(64),
    );
    for (got, want) in crowded.iter().zip(&undisturbed) {
        assert_same("preempted", got, want, SUMMATION_TOLERANCE);
    }
}

fn tensor_parallel_ranks_answer_as_one(order: AsyncScheduling) {
    for model in MODELS {
        let params = with_prompt_logprobs(24);
        let one = run_together(&start_fixture(model, &cache(order)), &prompts(), &params);
        for tensor_parallel_size in [2, 4] {
            let split = EngineOptions {
                tensor_parallel_size,
                num_threads: Some(tensor_parallel_size),
                ..cache(order)
            };
            let answers = run_together(&start_fixture(model, &split), &prompts(), &params);
            for (got, want) in answers.iter().zip(&one) {
                let what = format!(
                    "{model} over {tensor_parallel_size} ranks, {} tokens",
                    got.prompt_len()
                );
                assert_same(&what, got, want, SUMMATION_TOLERANCE);
            }
        }
    }
}

fn ranks_that_do_not_divide_the_heads_are_refused(order: AsyncScheduling) {
    let split = EngineOptions {
        tensor_parallel_size: 3,
        ..cache(order)
    };
    let error = try_start_fixture("tiny-qwen3", &split)
        .err()
        .expect("8 heads can not be split in 3");
    assert!(
        matches!(error, EngineError::Model(_)) && error.is_user_error(),
        "{error}"
    );
    assert!(
        error.to_string().contains('8') && error.to_string().contains('3'),
        "{error}"
    );
}

#[test]
fn fp8_is_refused_on_a_cpu_and_of_blocks() {
    let on = |device| EngineOptions {
        device,
        quantization: Quantization::Fp8,
        kv_cache_dtype: KvCacheDtype::Auto,
        ..options()
    };
    let refused = |model: &str, device| {
        let error = try_start_fixture(model, &on(device)).err();
        let error = error.expect("fp8 can not be computed");
        assert!(error.is_user_error(), "{error}");
        error.to_string()
    };
    let on_cpu = refused("tiny-llama", DeviceChoice::Cpu);
    assert!(on_cpu.contains("compute capability 9.0"), "{on_cpu}");
    assert!(on_cpu.contains("leave the flag out"), "{on_cpu}");
    // Found before the GPU is opened, so also where there is none.
    let of_blocks = refused("gguf/tiny-llama-Q8_0.gguf", DeviceChoice::Cuda(0));
    assert!(of_blocks.contains("stored as Q8_0"), "{of_blocks}");
}

fn threads_do_not_change_the_answer(order: AsyncScheduling) {
    let params = with_prompt_logprobs(16);
    let one = run_alone(
        &start_fixture("tiny-llama", &no_cache(order)),
        &prompts(),
        &params,
    );
    let two = EngineOptions {
        num_threads: Some(2),
        ..no_cache(order)
    };
    let two = run_alone(&start_fixture("tiny-llama", &two), &prompts(), &params);
    for (got, want) in two.iter().zip(&one) {
        assert_same("two threads", got, want, SUMMATION_TOLERANCE);
    }
}

fn a_seed_draws_the_same_text_alone_and_among_thirty_two(order: AsyncScheduling) {
    let engine = start_fixture("tiny-qwen2", &cache(order));
    let params = |seed| SamplingParams {
        temperature: 1.0,
        top_p: 0.95,
        top_k: 50,
        min_p: 0.01,
        presence_penalty: 0.3,
        frequency_penalty: 0.2,
        repetition_penalty: 1.1,
        seed: Some(seed),
        ..greedy(24)
    };
    let alone: Vec<_> = (0..4)
        .map(|seed| run(&engine, &prompt(20, 1), params(seed)))
        .collect();
    assert_ne!(
        alone[0].token_ids, alone[1].token_ids,
        "two seeds draw different texts"
    );
    let streams: Vec<_> = (0..32)
        .map(|i| {
            submit(
                &engine,
                &prompt(20, if i % 8 < 4 { 1 } else { i as usize }),
                params(i % 8),
            )
        })
        .collect();
    for (i, stream) in streams.into_iter().enumerate() {
        let answer = collect(stream);
        if i % 8 < 4 {
            assert_eq!(
                answer.token_ids,
                alone[i % 8].token_ids,
                "seed {} in a batch of 32",
                i % 8
            );
        }
    }
}

fn a_dropped_stream_frees_its_blocks(order: AsyncScheduling) {
    let engine = start_fixture("tiny-qwen2", &no_cache(order));
    let streams: Vec<_> = (0..8)
        .map(|salt| submit(&engine, &prompt(50, salt), greedy(900)))
        .collect();
    run(&engine, &prompt(5, 1), greedy(4));
    assert!(engine.stats().num_blocks_used > 0);
    drop(streams);
    assert_becomes_idle(&engine);
}

/// Asserts that no sequence holds anything in the end.
#[track_caller]
fn assert_becomes_idle(engine: &EngineHandle) {
    // Each short request makes the engine step, and a step is where it sees that nobody listens.
    for _ in 0..100 {
        run(engine, &prompt(5, 1), greedy(1));
        let stats = engine.stats();
        if (
            stats.num_blocks_used,
            stats.num_requests_running,
            stats.num_requests_waiting,
        ) == (0, 0, 0)
        {
            return;
        }
    }
    panic!("blocks are still held: {:?}", engine.stats());
}

fn a_request_for_no_token_computes_the_prompt_only(order: AsyncScheduling) {
    let engine = start_fixture("tiny-qwen2", &cache(order));
    let answer = run(&engine, &prompt(20, 0), with_prompt_logprobs(0));
    assert_eq!(answer.token_ids, Vec::<u32>::new());
    assert_eq!(answer.prompt_len(), 20);
}

fn a_sequence_ends_at_the_longest_length(order: AsyncScheduling) {
    let short = EngineOptions {
        max_model_len: infold::engine::MaxModelLen::Tokens(32),
        ..cache(order)
    };
    let answer = run(
        &start_fixture("tiny-qwen2", &short),
        &prompt(20, 0),
        greedy(1000),
    );
    assert_eq!(answer.token_ids.len(), 12);
}

fn launching_ahead_answers_bit_for_bit_as_in_turn(order: AsyncScheduling) {
    let cases = [
        SamplingParams {
            temperature: 1.0,
            top_p: 0.9,
            seed: Some(3),
            ..greedy(40)
        },
        SamplingParams {
            repetition_penalty: 1.3,
            frequency_penalty: 0.5,
            ..greedy(40)
        },
        SamplingParams {
            min_tokens: 7,
            stop_token_ids: (0..256).collect(),
            ..greedy(40)
        },
        with_prompt_logprobs(20),
    ];
    for model in MODELS {
        // Without a cache, so that nothing is summed in another order.
        let in_turn = start_fixture(model, &no_cache(AsyncScheduling::Off));
        let engine = start_fixture(model, &no_cache(order));
        for case in &cases {
            let want = run_together(&in_turn, &prompts(), case);
            assert_eq!(run_together(&engine, &prompts(), case), want, "{model}");
        }
    }
}

fn a_sequence_that_ends_unforeseen_ends_there(order: AsyncScheduling) {
    let engine = start_fixture("tiny-qwen2", &cache(order));
    for salt in 0..8 {
        let whole = run(&engine, &prompt(20, salt), greedy(30));
        let stopping = SamplingParams {
            stop_token_ids: vec![whole.token_ids[11]],
            ..greedy(30)
        };
        let first = whole
            .token_ids
            .iter()
            .position(|&id| id == whole.token_ids[11]);
        let want = first.expect("it is one of them") + 1;
        // Neighbours go on meanwhile.
        let neighbour = submit(&engine, &prompt(33, salt), greedy(60));
        let answer = run(&engine, &prompt(20, salt), stopping);
        assert_eq!(answer.token_ids, whole.token_ids[..want]);
        assert_eq!(answer.finish, FinishReason::StopToken(whole.token_ids[11]));
        assert_eq!(collect(neighbour).token_ids.len(), 60);
    }
}

fn a_failing_draw_ends_its_sequence_alone(order: AsyncScheduling) {
    let engine = start_fixture("tiny-qwen2", &no_cache(order));
    // Every token is an end, and none may be drawn yet.
    let impossible = SamplingParams {
        min_tokens: 4,
        stop_token_ids: (0..engine.info().vocab_size as u32).collect(),
        ..greedy(20)
    };
    let undisturbed = run(&engine, &prompt(20, 1), greedy(40));
    let neighbour = submit(&engine, &prompt(20, 1), greedy(40));
    let mut failing = submit(&engine, &prompt(20, 2), impossible);
    match failing.next_blocking() {
        Some(TokenEvent::Failed { message }) => assert!(message.contains("no token"), "{message}"),
        other => panic!("expected a failure, got {other:?}"),
    }
    assert_eq!(collect(neighbour).token_ids, undisturbed.token_ids);
    assert_becomes_idle(&engine);
}

fn more_requests_than_places_all_answer(order: AsyncScheduling) {
    let narrow = EngineOptions {
        max_num_seqs: 3,
        ..no_cache(order)
    };
    let engine = start_fixture("tiny-llama", &narrow);
    let prompts: Vec<_> = (0..20).map(|salt| prompt(3 + salt, salt)).collect();
    let alone = run_alone(&engine, &prompts, &greedy(9));
    let together = run_together(&engine, &prompts, &greedy(9));
    assert_eq!(together, alone);
}
