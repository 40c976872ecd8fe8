//! `infold serve` as a process of its own, on a tiny checkpoint.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::tiny_engine::fixtures;

/// The name that the model is served under.
pub(crate) const MODEL: &str = "tiny-sft";

/// A running server; ends with the test.
pub(crate) struct Server {
    process: Child,
    pub(crate) port: u16,
    log: Option<JoinHandle<Vec<String>>>,
}

impl Server {
    /// Starts a server with `arguments` and `variables` beside those that every test has.
    pub(crate) fn start(arguments: &[&str], variables: &[(&str, &str)]) -> Self {
        let mut process = Command::new(env!("CARGO_BIN_EXE_infold"))
            .arg("serve")
            .arg(fixtures().join("tiny-qwen2"))
            .args([
                "--host",
                "127.0.0.1",
                "--port",
                "0",
                "--served-model-name",
                MODEL,
            ])
            .args([
                "--max-model-len",
                "512",
                "--kv-cache-memory-bytes",
                "32MiB",
                "--generation-config",
                "vllm",
            ])
            .args(arguments)
            .env("RUST_LOG", "info")
            .envs(variables.iter().copied())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(process.stderr.take().unwrap()).lines();
        let mut log = Vec::new();
        // The line that says where it listens is the last before requests are answered.
        let port = lines.by_ref().map(Result::unwrap).find_map(|line| {
            let port = line.split_once("127.0.0.1:").and_then(|(_, rest)| {
                rest.split(|c: char| !c.is_ascii_digit())
                    .next()?
                    .parse()
                    .ok()
            });
            log.push(line);
            port
        });
        let port = port.unwrap_or_else(|| {
            panic!(
                "the server did not say where it listens:\n{}",
                log.join("\n")
            )
        });
        // Read to its end, or the server would stop at a full pipe.
        let log = std::thread::spawn(move || lines.map_while(Result::ok).collect());
        Self {
            process,
            port,
            log: Some(log),
        }
    }

    /// Returns the address of `path`.
    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }

    /// Sends the process a signal.
    pub(crate) fn signal(&self, name: &str) {
        let pid = self.process.id().to_string();
        let sent = Command::new("kill").args(["-s", name, &pid]).status();
        assert!(sent.unwrap().success());
    }

    /// Waits for the process to end by itself and returns how, with what it wrote since it
    /// listened.
    #[track_caller]
    pub(crate) fn wait(&mut self, at_most: Duration) -> (ExitStatus, String) {
        let since = Instant::now();
        loop {
            if let Some(status) = self.process.try_wait().unwrap() {
                let log = self.log.take().expect("waited for once");
                return (status, log.join().unwrap().join("\n"));
            }
            assert!(since.elapsed() < at_most, "runs on after {at_most:?}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // A process that has ended already needs neither.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
