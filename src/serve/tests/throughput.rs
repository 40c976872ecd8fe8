//! What a streamed token costs, over real sockets.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc as blocking;
use std::time::{Duration, Instant};

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::engine::stepping_engine;

use super::super::listen::BoundSocket;
use super::super::{http_runtime, serve_app};
use super::*;

const NUM_STREAMS: usize = 256;
const NUM_TOKENS: usize = 200;

/// Seconds on a processor of the threads of this process whose name begins so.
fn cpu_secs(name: &str) -> f64 {
    let mut nanos = 0;
    for task in std::fs::read_dir("/proc/self/task").unwrap().flatten() {
        let comm = std::fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        if comm.starts_with(name) {
            let stat = std::fs::read_to_string(task.path().join("schedstat")).unwrap();
            nanos += stat.split(' ').next().unwrap().parse::<u64>().unwrap();
        }
    }
    nanos as f64 / 1e9
}

fn body(path: &str) -> Value {
    let mut body = json!({"stream": true, "max_tokens": NUM_TOKENS, "ignore_eos": true});
    match path {
        "/v1/completions" => body["prompt"] = json!([1, 2, 3]),
        _ => body["messages"] = json!([{"role": "user", "content": "Hi"}]),
    }
    body
}

async fn read_stream(address: String, path: &'static str) -> usize {
    let body = body(path).to_string();
    let mut stream = tokio::net::TcpStream::connect(&address).await.unwrap();
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
         connection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    let (mut num_bytes, mut buffer) = (0, vec![0; 1 << 16]);
    loop {
        match stream.read(&mut buffer).await.unwrap() {
            0 => return num_bytes,
            read => num_bytes += read,
        }
    }
}

#[test]
#[ignore = "a measurement: cargo test --lib cost_of_a_streamed_token -- --ignored --nocapture"]
fn cost_of_a_streamed_token() {
    for path in ["/v1/completions", "/v1/chat/completions"] {
        let engine_nanos = Arc::new(AtomicU64::new(0));
        let nanos = Arc::clone(&engine_nanos);
        let server = TestServer::with_engine("", |info| {
            stepping_engine(info, NUM_STREAMS, Duration::from_millis(40), nanos)
        });
        let runtime = http_runtime().unwrap();
        let args = parse_args("--host 127.0.0.1 --port 0");
        let guard = runtime.enter();
        let listener = BoundSocket::bind(&args.listen).unwrap().listen().unwrap();
        drop(guard);
        let address = listener.describe().trim_start_matches("http://").to_owned();
        let (_signals, receiver) = tokio::sync::mpsc::unbounded_channel();
        let state = Arc::clone(&server.state);
        runtime.spawn(async move { serve_app(state, listener, receiver, &args.listen).await });
        let (done, ended) = blocking::channel();
        let before = cpu_secs("http");
        let started = Instant::now();
        std::thread::spawn(move || {
            let client = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            let streams: Vec<_> = (0..NUM_STREAMS)
                .map(|_| client.spawn(read_stream(address.clone(), path)))
                .collect();
            done.send(client.block_on(futures::future::join_all(streams)))
                .unwrap();
        });
        let sizes = ended.recv().unwrap();
        let num_tokens = (NUM_STREAMS * NUM_TOKENS) as f64;
        assert!(
            sizes
                .iter()
                .all(|size| *size.as_ref().unwrap() > 100 * NUM_TOKENS)
        );
        eprintln!(
            "{path}: {:.2} µs a token on the HTTP threads, {:.3} µs on the engine's to send it, \
             {:.0} tok/s",
            (cpu_secs("http") - before) / num_tokens * 1e6,
            engine_nanos.load(Ordering::Relaxed) as f64 / 1e3 / num_tokens,
            num_tokens / started.elapsed().as_secs_f64(),
        );
    }
}
