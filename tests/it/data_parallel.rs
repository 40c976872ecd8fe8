//! Data-parallel replicas: the answers of one engine, from several that share the requests.

use std::process::Command;
use std::time::{Duration, Instant};

use infold::engine::{EngineHandle, EngineOptions, GenerateRequest, SamplingParams, TokenEvent};

use crate::tiny_engine::{collect, fixtures, greedy, options, run_together, start_fixture, submit};

/// Options of `replicas` with `ranks` each.
fn split(replicas: usize, ranks: usize) -> EngineOptions {
    EngineOptions {
        data_parallel_size: replicas,
        tensor_parallel_size: ranks,
        ..options()
    }
}

/// `num` prompts of unequal lengths.
fn prompts(num: u32) -> Vec<Vec<u32>> {
    let prompt = |index| (0..5 + 3 * index).map(|i| 3 + 7 * index + i).collect();
    (0..num).map(prompt).collect()
}

fn wait_until(what: &str, engine: &EngineHandle, is_so: impl Fn(&EngineHandle) -> bool) {
    let since = Instant::now();
    while !is_so(engine) {
        let stats = engine.replica_stats();
        assert!(
            since.elapsed() < Duration::from_secs(60),
            "not {what}: {stats:?}"
        );
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn replicas_answer_what_one_engine_answers_and_share_the_work() {
    let prompts = prompts(6);
    let seeded = SamplingParams {
        temperature: 1.0,
        seed: Some(11),
        ..greedy(12)
    };
    // The engine draws the seeds of these: as many as with one replica, in the same order.
    let unseeded = SamplingParams {
        seed: None,
        ..seeded.clone()
    };
    let one = start_fixture("tiny-qwen2", &options());
    let all_params = [greedy(12), seeded, unseeded];
    let want = all_params
        .each_ref()
        .map(|params| run_together(&one, &prompts, params));
    assert_ne!(want[1][0].token_ids, want[2][0].token_ids, "seeds matter");
    for (replicas, ranks) in [(2, 1), (3, 1), (2, 2)] {
        let engine = start_fixture("tiny-qwen2", &split(replicas, ranks));
        for (params, want) in all_params.iter().zip(&want) {
            let got = run_together(&engine, &prompts, params);
            for (index, (got, want)) in got.iter().zip(want).enumerate() {
                let what = format!("{replicas} replicas of {ranks} ranks, prompt {index}");
                assert_eq!(got.token_ids, want.token_ids, "{what}, {params:?}");
            }
        }
        let by_replica = engine.replica_stats();
        let all = |stats: &infold::engine::Stats| stats.generation_tokens;
        assert_eq!(by_replica.len(), replicas);
        assert!(by_replica.iter().all(|stats| all(stats) > 0));
        assert_eq!(by_replica.iter().map(all).sum::<u64>(), 3 * 6 * 12);
        assert_eq!(engine.stats().generation_tokens, 3 * 6 * 12);
    }
}

#[test]
fn the_choices_of_a_prompt_go_to_one_replica() {
    let engine = start_fixture("tiny-qwen2", &split(2, 1));
    let prompt: Vec<u32> = (3..43).collect();
    let request = GenerateRequest {
        request_id: "choice".to_owned(),
        prompt_token_ids: prompt.clone(),
        sampling_params: greedy(4),
        priority: 0,
    };
    let choices = engine.submit_choices(vec![request; 3]).unwrap();
    let other = submit(&engine, &prompt, greedy(4));
    let replicas: Vec<usize> = choices.iter().map(|stream| stream.replica()).collect();
    assert_eq!(replicas, [0; 3]);
    assert_eq!(other.replica(), 1, "the other one has nothing to do");
    let cached: Vec<usize> = (choices.into_iter())
        .map(|stream| collect(stream).num_cached_tokens)
        .collect();
    assert_eq!(cached[0], 0);
    assert!(cached[1] >= 32 && cached[2] >= 32, "{cached:?}");
    assert_eq!(collect(other).num_cached_tokens, 0);
}

#[test]
fn an_abort_ends_the_sequence_of_its_replica_only() {
    let engine = start_fixture("tiny-qwen2", &split(2, 1));
    let mut streams = [0, 1].map(|_| submit(&engine, &[3, 4, 5], greedy(400)));
    assert_eq!(streams.each_ref().map(|stream| stream.replica()), [0, 1]);
    for stream in &mut streams {
        assert!(matches!(
            stream.next_blocking(),
            Some(TokenEvent::Prompt { .. })
        ));
    }
    let [going_on, aborted] = streams;
    drop(aborted);
    wait_until("idle", &engine, |engine| {
        let stats = engine.replica_stats()[1];
        stats.num_requests_running == 0 && stats.num_blocks_used == 0
    });
    let mut num_tokens = 0;
    let mut stream = going_on;
    while let Some(event) = stream.next_blocking() {
        num_tokens += usize::from(matches!(event, TokenEvent::Token { .. }));
        if event.is_last() {
            break;
        }
    }
    assert_eq!(num_tokens, 400);
    let tokens = engine
        .replica_stats()
        .into_iter()
        .map(|s| s.generation_tokens);
    let tokens: Vec<u64> = tokens.collect();
    assert!(tokens[0] == 400 && tokens[1] < 400, "{tokens:?}");
}

#[test]
fn a_stop_ends_all_replicas() {
    let engine = start_fixture("tiny-qwen2", &split(3, 1));
    assert_eq!(engine.death(), None);
    engine.stop();
    wait_until("stopped", &engine, |engine| engine.death().is_some());
    assert_eq!(engine.death().unwrap(), "it was stopped");
}

#[test]
fn numbers_of_replicas_that_cannot_be_are_refused() {
    for (verb, number, why) in [
        ("serve", "0", "expected at least 1, got 0"),
        ("bench", "two", "expected a whole number, got `two`"),
        ("bench", "1.5", "expected a whole number, got `1.5`"),
        (
            "serve",
            "2000",
            "--data-parallel-size must be 1 to 1024, found 2000",
        ),
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_infold"))
            .arg(verb)
            .arg(fixtures().join("tiny-qwen2"))
            .args(["--device", "cpu", "-dp", number])
            .args((verb == "serve").then_some("--port=0"))
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{verb} {number}");
        assert!(text.contains(why), "{verb} {number}: {text}");
    }
}
