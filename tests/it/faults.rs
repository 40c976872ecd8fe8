//! What becomes of a server under load when one of its ranks fails, and when it is told to stop.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::server::{MODEL, Server};

/// Time from the failure to the end of the process.
const MOST_TIME_TO_END: Duration = Duration::from_secs(5);

/// Asks and returns status and body; an error of the connection is status 0.
fn ask(url: &str, body: Option<&Value>) -> (u16, String) {
    let config = ureq::Agent::config_builder()
        .http_status_as_error(false)
        .timeout_global(Some(Duration::from_secs(60)))
        .build();
    let agent = ureq::Agent::new_with_config(config);
    let reply = match body {
        Some(body) => agent.post(url).send_json(body),
        None => agent.get(url).call(),
    };
    match reply {
        Ok(mut reply) => {
            let text = reply.body_mut().read_to_string();
            (
                reply.status().as_u16(),
                text.unwrap_or_else(|error| error.to_string()),
            )
        }
        Err(error) => (0, error.to_string()),
    }
}

/// A request whose answer takes hundreds of steps.
fn long_request(index: usize) -> Value {
    json!({
        "model": MODEL, "prompt": format!("The river {index}"), "max_tokens": 480,
        "temperature": 0.0, "ignore_eos": true, "stream": index.is_multiple_of(2),
    })
}

/// Loads a server of two ranks a replica until rank 1 of the last replica fails in step 20, and
/// checks all that must follow.
#[track_caller]
fn check_failure(replicas: usize, kind: &str, cause: &str) {
    let mut fault = format!("rank=1,step=20,kind={kind}");
    if replicas > 1 {
        fault += &format!(",replica={}", replicas - 1);
    }
    // A panic that is being printed must not count as a rank that does not come.
    let timeout = if kind == "stall" { "1" } else { "20" };
    let arguments = [
        "--device",
        "cpu",
        "--tensor-parallel-size",
        "2",
        "--data-parallel-size",
        &replicas.to_string(),
        "--distributed-timeout-seconds",
        timeout,
    ];
    let mut server = Server::start(&arguments, &[("INFOLD_FAULT", &fault)]);
    assert_eq!(ask(&server.url("/health"), None).0, 200, "{kind}: before");
    let (health, completions) = (server.url("/health"), server.url("/v1/completions"));
    let (answers, (sick, since)) = std::thread::scope(|scope| {
        let completions = &completions;
        let requests: Vec<_> = (0..4)
            .map(|i| scope.spawn(move || ask(completions, Some(&long_request(i)))))
            .collect();
        let sick = loop {
            match ask(&health, None) {
                (200, _) => std::thread::sleep(Duration::from_millis(5)),
                other => break other,
            }
        };
        let since = Instant::now();
        let answers: Vec<_> = requests.into_iter().map(|r| r.join().unwrap()).collect();
        (answers, (sick, since))
    });
    assert_eq!(sick.0, 503, "{kind}: {}", sick.1);
    assert!(sick.1.contains(cause), "{kind}: {}", sick.1);
    let mut num_told = 0;
    for (i, (status, body)) in answers.iter().enumerate() {
        // Another replica may have answered before this one failed.
        if replicas > 1 && *status == 200 && body.contains("\"length\"") {
            continue;
        }
        num_told += 1;
        // The error of a stream that had begun is an event.
        let is_expected = *status == 500 || i.is_multiple_of(2) && *status == 200;
        assert!(is_expected, "{kind}: request {i}: {status} {body}");
        assert!(body.contains(cause), "{kind}: request {i}: {body}");
    }
    assert!(num_told > 0, "{kind}: the failing replica had no request");
    let (status, log) = server.wait(MOST_TIME_TO_END.saturating_sub(since.elapsed()));
    assert_eq!(status.code(), Some(1), "{kind}: {log}");
    let last = log.lines().last().unwrap_or_default();
    assert_eq!(last, format!("infold: the engine has stopped: {cause}"));
}

#[test]
fn a_rank_that_panics_ends_the_process() {
    check_failure(
        1,
        "panic",
        "rank 1 panicked in step 20: INFOLD_FAULT asked for it",
    );
}

#[test]
fn a_rank_whose_step_fails_ends_the_process() {
    check_failure(
        1,
        "error",
        "rank 1 failed in step 20: INFOLD_FAULT asked for it",
    );
}

#[test]
fn a_rank_that_stops_answering_ends_the_process() {
    check_failure(
        1,
        "stall",
        "rank 0 failed in step 20: all_reduce on rank 0: rank 1 did not come within 1s",
    );
}

#[test]
fn a_rank_of_one_replica_ends_the_process() {
    check_failure(
        2,
        "panic",
        "replica 1: rank 1 panicked in step 20: INFOLD_FAULT asked for it",
    );
    check_failure(
        2,
        "stall",
        "replica 1: rank 0 failed in step 20: all_reduce on rank 0: rank 1 did not come within 1s",
    );
}

#[test]
fn a_signal_under_load_lets_requests_finish() {
    check_drain("--tensor-parallel-size");
}

#[test]
fn a_signal_under_load_lets_the_requests_of_all_replicas_finish() {
    check_drain("--data-parallel-size");
}

#[track_caller]
fn check_drain(split_in_two: &str) {
    let arguments = [split_in_two, "2", "--shutdown-timeout", "60"];
    let mut server = Server::start(&arguments, &[]);
    let (completions, load) = (server.url("/v1/completions"), server.url("/load"));
    let answers = std::thread::scope(|scope| {
        let completions = &completions;
        let requests: Vec<_> = (0..4)
            .map(|i| scope.spawn(move || ask(completions, Some(&long_request(i)))))
            .collect();
        // All four are in work, unless the machine is so slow that one was answered before.
        let since = Instant::now();
        while !ask(&load, None).1.contains('4') && since.elapsed() < MOST_TIME_TO_END {}
        server.signal("TERM");
        let answers: Vec<_> = requests.into_iter().map(|r| r.join().unwrap()).collect();
        answers
    });
    for (i, (status, body)) in answers.iter().enumerate() {
        assert!(*status == 200 && body.contains("length"), "{i}: {body}");
    }
    let (status, log) = server.wait(MOST_TIME_TO_END);
    assert_eq!(status.code(), Some(0), "{log}");
}

#[test]
fn a_fault_of_a_rank_that_is_not_there_is_refused() {
    let rank = "INFOLD_FAULT names rank 1 of 1 ranks";
    check_refused("rank=1,step=20,kind=panic", rank);
    let replica = "INFOLD_FAULT names replica 1 of 1 replicas";
    check_refused("rank=0,replica=1,step=20,kind=panic", replica);
}

#[track_caller]
fn check_refused(fault: &str, why: &str) {
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_infold"))
        .arg("serve")
        .arg(crate::tiny_engine::fixtures().join("tiny-qwen2"))
        .args(["--device", "cpu", "--port", "0"])
        .env("INFOLD_FAULT", fault)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains(why), "{text}");
    assert_eq!(output.status.code(), Some(1));
}
