//! Engines over several GPUs against the engine on one, through own collectives and through NCCL.
//!
//! Where there are fewer GPUs, or no NCCL, nothing can be shown, so the tests say so and end.

use std::sync::Arc;
use std::time::{Duration, Instant};

use infold::engine::{
    CollectiveChoice, Dtype, Engine, EngineError, EngineHandle, EngineOptions, Fault, FaultKind,
    Graphs, SamplingParams, TokenEvent,
};
use infold::kernels::Kernels;
use infold::weights::Checkpoint;

use crate::cuda::{
    F16_TOLERANCE, assert_all_near, many_or_few, on_gpu, params, prompt, prompts, run_alone,
    some_tokens,
};
use crate::random_models::{SHAPES, Shape};
use crate::tiny_engine::{greedy, run, run_together, start, submit};

/// Both ways to meet.
const CHOICES: [CollectiveChoice; 2] = [CollectiveChoice::Fastest, CollectiveChoice::Nccl];

/// Whether a test of so many GPUs can run.
fn has_gpus(num: usize) -> bool {
    let found = Kernels::num_gpus();
    if found < num {
        eprintln!("skipped: this test needs {num} GPUs, CUDA sees {found}");
    }
    found >= num
}

fn split(world_size: usize, collectives: CollectiveChoice) -> EngineOptions {
    EngineOptions {
        tensor_parallel_size: world_size,
        collectives,
        ..on_gpu(Dtype::Float16)
    }
}

/// Starts ranks, or says why NCCL is not there.
fn start_or_skip(model: &std::path::Path, options: &EngineOptions) -> Option<EngineHandle> {
    match Engine::start(Arc::new(Checkpoint::open(model).unwrap()), options) {
        Ok(engine) => Some(engine),
        Err(error) if error.to_string().contains("NCCL was not found") => {
            // The message is the one that a user sees.
            assert!(error.to_string().contains("libnccl.so.2"), "{error}");
            eprintln!("skipped: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// Ends an engine and waits for it: ranks of two engines in one process may not come and go at once.
fn end(engine: &EngineHandle) {
    engine.stop();
    let started = Instant::now();
    while engine.death().is_none() {
        assert!(started.elapsed().as_secs() < 20, "the engine does not end");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Compares `world_size` GPUs with one: alone, batched, replayed, sampled, both ways to meet.
fn assert_ranks_answer_as_one(shape: Shape, world_size: usize) {
    if !has_gpus(world_size) {
        return;
    }
    let folder = shape.write();
    let want = run_alone(&start(folder.path(), &on_gpu(Dtype::Float16)), &params(40));
    for collectives in CHOICES {
        for graphs in [Graphs::Off, Graphs::Decode] {
            let options = EngineOptions {
                graphs,
                ..split(world_size, collectives)
            };
            let Some(engine) = start_or_skip(folder.path(), &options) else {
                continue;
            };
            let what = format!("{world_size} GPUs, {collectives:?}, {graphs:?}");
            let alone = run_alone(&engine, &params(40));
            assert_all_near(&what, &alone, &want, F16_TOLERANCE);
            for _ in 0..many_or_few(2, 1) {
                let got = run_together(&engine, &prompts(), &params(40));
                assert_all_near(&format!("{what} together"), &got, &want, F16_TOLERANCE);
            }
            let seeded = SamplingParams {
                temperature: 0.8,
                seed: Some(5),
                ..greedy(some_tokens(30))
            };
            let first = run(&engine, &prompt(40, 1), seeded.clone());
            let again = run(&engine, &prompt(40, 1), seeded);
            assert_eq!(first.token_ids, again.token_ids, "{what}");
            end(&engine);
        }
    }
}

#[test]
fn two_ranks_answer_as_one_either_way() {
    assert_ranks_answer_as_one(SHAPES[0], 2);
}

#[test]
fn four_ranks_of_two_kv_heads_answer_as_one() {
    assert_ranks_answer_as_one(SHAPES[0], 4);
}

#[test]
fn three_ranks_share_nine_heads() {
    assert_ranks_answer_as_one(SHAPES[2], 3);
}

/// Rows of more elements than eight a thread, as Qwen2.5-14B's.
#[test]
fn two_ranks_sum_wide_rows() {
    if !has_gpus(2) {
        return;
    }
    let shape = Shape {
        hidden: 4608,
        ..SHAPES[0]
    };
    let folder = shape.write();
    let ask = |engine: &EngineHandle| run(engine, &prompt(20, 1), greedy(4));
    let want = ask(&start(folder.path(), &on_gpu(Dtype::Float16)));
    let engine = start(folder.path(), &split(2, CollectiveChoice::Fastest));
    assert_all_near("two ranks", &[ask(&engine)], &[want], F16_TOLERANCE);
    end(&engine);
}

/// Set in the process that [`in_own_process`] starts, and how that one ends when all is well: not
/// as one that found no test of the name.
const OWN_PROCESS: &str = "INFOLD_TEST_OWN_PROCESS";
const PASSED: u8 = 77;

/// Runs a test in a process that ends without exit handlers: a rank that hangs in NCCL would make
/// them crash.
fn in_own_process(name: &str, test: impl FnOnce()) {
    if std::env::var_os(OWN_PROCESS).is_some() {
        test();
        Kernels::end_process(PASSED);
    }
    let status = std::process::Command::new(std::env::current_exe().unwrap())
        .args([name, "--exact", "--nocapture"])
        .env(OWN_PROCESS, "1")
        .status()
        .unwrap();
    assert_eq!(status.code(), Some(PASSED.into()), "{name}: {status}");
}

#[test]
fn a_failing_rank_of_gpus_is_named_and_ends_the_engine() {
    if has_gpus(2) {
        in_own_process(
            "cuda_ranks::a_failing_rank_of_gpus_is_named_and_ends_the_engine",
            fail_each_way,
        );
    }
}

fn fail_each_way() {
    let folder = SHAPES[0].write();
    let timeout_secs = many_or_few(5, 20);
    let stalled =
        format!("step 20 has not ended on rank 0 within {timeout_secs}s; rank 1 did not begin it");
    // Without NCCL a rank that does not come is named by the kernels after 4 s.
    let cases = [
        (
            CollectiveChoice::Fastest,
            FaultKind::Panic,
            "rank 1 panicked in step 20",
        ),
        (
            CollectiveChoice::Fastest,
            FaultKind::Error,
            "rank 1 failed in step 20",
        ),
        (
            CollectiveChoice::Fastest,
            FaultKind::Stall,
            "rank 1 did not come to a collective within 4s",
        ),
        (
            CollectiveChoice::Nccl,
            FaultKind::Error,
            "rank 1 failed in step 20",
        ),
        (CollectiveChoice::Nccl, FaultKind::Stall, stalled.as_str()),
    ];
    for (collectives, kind, cause) in cases {
        let options = EngineOptions {
            fault: Some(Fault {
                replica: 0,
                rank: 1,
                step: 20,
                kind,
            }),
            distributed_timeout: Duration::from_secs(timeout_secs),
            ..split(2, collectives)
        };
        let Some(engine) = start_or_skip(folder.path(), &options) else {
            continue;
        };
        let mut stream = submit(&engine, &prompt(9, 0), greedy(200));
        let mut failure = None;
        while let Some(event) = stream.next_blocking() {
            if let TokenEvent::Failed { message } = event {
                failure = Some(message);
            }
        }
        let what = format!("{collectives:?} {kind:?}");
        let reason = engine.death().unwrap_or_else(|| panic!("{what}: lives on"));
        assert!(reason.contains(cause), "{what}: {reason}");
        let failure = failure.unwrap_or_else(|| panic!("{what}: the request was told nothing"));
        assert!(failure.contains(cause), "{what}: {failure}");
    }
}

#[test]
fn nine_heads_are_refused_on_two_and_four_gpus_before_any_is_opened() {
    let folder = SHAPES[2].write();
    for world_size in [2, 4] {
        let checkpoint = Arc::new(Checkpoint::open(folder.path()).unwrap());
        let refused = Engine::start(checkpoint, &split(world_size, CollectiveChoice::Fastest));
        let error = refused.err().unwrap();
        assert!(matches!(error, EngineError::Model(_)), "{error}");
        let text = error.to_string();
        assert!(text.ends_with("1, 3"), "{text}");
    }
}
