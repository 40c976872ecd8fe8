//! Real sockets: a stream over TCP, a client that leaves, signals, a port in use.

use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;

use super::super::listen::{BoundSocket, StopSignal};
use super::super::serve_app;
use super::*;

/// A server on a free port of the loopback.
struct Running {
    state: Arc<AppState>,
    address: String,
    signals: mpsc::UnboundedSender<StopSignal>,
    ended: tokio::task::JoinHandle<anyhow::Result<()>>,
}

fn run(server: &TestServer, flags: &str) -> Running {
    let args = parse_args(&format!("--host 127.0.0.1 --port 0 {flags}"));
    let listener = BoundSocket::bind(&args.listen).unwrap().listen().unwrap();
    let address = listener.describe().trim_start_matches("http://").to_owned();
    let (signals, receiver) = mpsc::unbounded_channel();
    let state = Arc::clone(&server.state);
    let serving = Arc::clone(&state);
    let ended =
        tokio::spawn(async move { serve_app(serving, listener, receiver, &args.listen).await });
    Running {
        state,
        address,
        signals,
        ended,
    }
}

impl Running {
    async fn send(&self, body: &Value) -> TcpStream {
        let body = body.to_string();
        let mut stream = TcpStream::connect(&self.address).await.unwrap();
        let head = format!(
            "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
             connection: close\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        stream
    }

    async fn wait_for_in_flight(&self, num: usize) {
        while self.state.lifecycle.num_in_flight() != num {
            tokio::task::yield_now().await;
        }
    }
}

/// An engine that draws one token and then holds the sequence.
fn holding_server() -> TestServer {
    TestServer::with_flags("", |_| {
        vec![TokenEvent::Token {
            token_id: 65,
            logprobs: None,
            finish: None,
        }]
    })
}

#[tokio::test]
async fn a_stream_goes_over_tcp() {
    let running = run(&TestServer::answering("cd"), "");
    let mut text = String::new();
    let mut stream = running.send(&json!({"prompt": "ab", "stream": true})).await;
    stream.read_to_string(&mut text).await.unwrap();
    assert!(text.starts_with("HTTP/1.1 200 OK\r\n"), "{text}");
    assert!(
        text.contains("\"text\":\"c\"") && text.contains("data: [DONE]"),
        "{text}"
    );
}

#[tokio::test]
async fn a_connection_that_breaks_aborts_its_request() {
    let server = holding_server();
    let running = run(&server, "");
    for stream in [true, false] {
        let connection = running
            .send(&json!({"prompt": "ab", "stream": stream}))
            .await;
        running.wait_for_in_flight(1).await;
        drop(connection);
        running.wait_for_in_flight(0).await;
    }
}

#[tokio::test]
async fn a_signal_ends_an_idle_server_at_once() {
    for signal in [StopSignal::Terminate, StopSignal::Interrupt] {
        let running = run(&TestServer::answering("cd"), "--shutdown-timeout 100");
        running.signals.send(signal).unwrap();
        running.ended.await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn without_a_timeout_running_requests_are_aborted_with_a_proper_end() {
    let running = run(&holding_server(), "");
    let mut connection = running.send(&json!({"prompt": "ab", "stream": true})).await;
    running.wait_for_in_flight(1).await;
    running.signals.send(StopSignal::Terminate).unwrap();
    let mut text = String::new();
    connection.read_to_string(&mut text).await.unwrap();
    assert!(text.contains("data: [DONE]"), "{text}");
    running.ended.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_second_signal_ends_the_wait() {
    let running = run(&holding_server(), "--shutdown-timeout 1000");
    let _connection = running.send(&json!({"prompt": "ab", "stream": true})).await;
    running.wait_for_in_flight(1).await;
    running.signals.send(StopSignal::Terminate).unwrap();
    while !running.state.lifecycle.is_draining() {
        tokio::task::yield_now().await;
    }
    running.signals.send(StopSignal::Terminate).unwrap();
    let ended = tokio::time::timeout(Duration::from_secs(10), running.ended).await;
    ended.unwrap().unwrap().unwrap();
}

#[tokio::test]
async fn the_death_of_the_engine_ends_the_server_with_its_reason() {
    let running = run(&TestServer::answering("cd"), "");
    running.state.engine.stop();
    let error = running.ended.await.unwrap().unwrap_err();
    assert_eq!(
        error.to_string(),
        "the engine has stopped: the mock engine was stopped"
    );
}

#[tokio::test]
async fn a_port_in_use_is_named() {
    let running = run(&TestServer::answering("cd"), "");
    let port = running.address.rsplit(':').next().unwrap();
    let args = parse_args(&format!("--host 127.0.0.1 --port {port}"));
    let error = BoundSocket::bind(&args.listen).unwrap_err();
    let error = format!("{error:#}");
    assert!(error.contains(port) && error.contains("in use"), "{error}");
}

#[tokio::test]
async fn a_unix_socket_replaces_a_stale_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let args = parse_args(&format!("--uds {}", path.display()));
    let listener = BoundSocket::bind(&args.listen).unwrap().listen().unwrap();
    let error = BoundSocket::bind(&args.listen).unwrap_err();
    assert!(error.to_string().contains("another server listens"));
    drop(listener);
    BoundSocket::bind(&args.listen).unwrap().listen().unwrap();
}
