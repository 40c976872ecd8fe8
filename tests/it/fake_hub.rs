//! A small hub on loopback that answers as the real one does: listing, redirects to a file store,
//! ranges, ETags, and, on demand, failures.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex},
    time::Duration,
};

use infold::weights::{HubOptions, Network};
use serde_json::json;

pub(crate) const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What the hub does instead of answering, once each, to the next request for a file's bytes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Fault {
    /// Sends so many bytes of the body, then closes the connection.
    BreakAfter(usize),
    /// Answers with this status.
    Status(u16),
}

#[derive(Default)]
pub(crate) struct HubState {
    pub(crate) files: BTreeMap<String, Vec<u8>>,
    /// By file name, used up from the front.
    pub(crate) faults: BTreeMap<String, Vec<Fault>>,
    /// Status for every request without this token.
    pub(crate) token: Option<(String, u16)>,
    /// `METHOD path range`, in order.
    pub(crate) requests: Vec<String>,
}

pub(crate) struct FakeHub {
    pub(crate) endpoint: String,
    pub(crate) state: Arc<Mutex<HubState>>,
    pub(crate) cache: tempfile::TempDir,
}

impl FakeHub {
    pub(crate) fn new(files: &[(&str, Vec<u8>)]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has free ports");
        let endpoint = format!("http://{}", listener.local_addr().expect("it is bound"));
        let state = Arc::new(Mutex::new(HubState {
            files: (files.iter().cloned())
                .map(|(name, content)| (name.to_owned(), content))
                .collect(),
            ..HubState::default()
        }));
        let served = Arc::clone(&state);
        let address = endpoint.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (state, address) = (Arc::clone(&served), address.clone());
                // A client that goes away in mid-answer is part of the tests.
                std::thread::spawn(move || drop(answer(stream, &state, &address)));
            }
        });
        Self {
            endpoint,
            state,
            cache: tempfile::tempdir().expect("the system has a temporary directory"),
        }
    }

    pub(crate) fn options(&self) -> HubOptions {
        HubOptions {
            endpoint: self.endpoint.clone(),
            cache_dir: self.cache.path().to_owned(),
            token: None,
            revision: None,
            network: Network::Online,
            max_retries: 3,
            retry_delay: Duration::ZERO,
        }
    }

    pub(crate) fn fail(&self, file: &str, faults: &[Fault]) {
        let mut state = self.state.lock().expect("no thread panicked");
        state.faults.insert(file.to_owned(), faults.to_vec());
    }

    pub(crate) fn requests(&self) -> Vec<String> {
        let state = self.state.lock().expect("no thread panicked");
        state.requests.clone()
    }

    /// Returns the ranges asked of the file store for one file, without the size queries.
    pub(crate) fn ranges_of(&self, file: &str) -> Vec<String> {
        let prefix = format!("GET /store/{file} ");
        let ranges = self.requests().into_iter();
        let ranges = ranges.filter_map(|line| Some(line.strip_prefix(&prefix)?.to_owned()));
        ranges.filter(|range| range != "bytes=0-0").collect()
    }
}

/// Answers one request; connections are not kept.
fn answer(stream: TcpStream, state: &Mutex<HubState>, endpoint: &str) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut first = String::new();
    reader.read_line(&mut first)?;
    let (mut range, mut token) = (None, None);
    for line in reader.lines() {
        let line = line?;
        let Some((name, value)) = line.split_once(": ") else {
            break;
        };
        match name.to_ascii_lowercase().as_str() {
            "range" => range = Some(value.to_owned()),
            "authorization" => token = value.strip_prefix("Bearer ").map(str::to_owned),
            _ => {}
        }
    }
    let target = first.split(' ').nth(1).unwrap_or_default().to_owned();
    let path = target.split('?').next().unwrap_or_default().to_owned();
    let mut state = state.lock().expect("no thread panicked");
    let range = range.unwrap_or_default();
    state.requests.push(format!("GET {path} {range}"));
    if let Some((wanted, status)) = &state.token
        && token.as_ref() != Some(wanted)
    {
        return respond(stream, *status, &[], b"no");
    }
    if path.starts_with("/api/models/owner/model/revision/") {
        let siblings = state.files.iter().map(
            |(name, content)| json!({"rfilename": name, "size": content.len(), "blobId": "0"}),
        );
        let listing = json!({"sha": COMMIT, "siblings": siblings.collect::<Vec<_>>()});
        return respond(stream, 200, &[], listing.to_string().as_bytes());
    }
    let resolve = format!("/owner/model/resolve/{COMMIT}/");
    if let Some(name) = path.strip_prefix(&resolve) {
        // Large files are in a store elsewhere, small ones behind a redirect on the same host.
        let Some(content) = state.files.get(name) else {
            return respond(stream, 404, &[], b"Entry not found");
        };
        let is_large = !name.ends_with(".json");
        let host = if is_large { endpoint } else { "" };
        let headers = [
            ("Location", format!("{host}/store/{name}")),
            ("X-Repo-Commit", COMMIT.to_owned()),
            (
                "X-Linked-Etag",
                format!("\"{name}-etag\"").replace('/', "-"),
            ),
            ("X-Linked-Size", content.len().to_string()),
        ];
        return respond(stream, if is_large { 302 } else { 307 }, &headers, b"");
    }
    match path.strip_prefix("/store/") {
        Some(name) => send_file(stream, &mut state, name, &range),
        None => respond(stream, 404, &[], b"Repository not found"),
    }
}

fn send_file(
    mut stream: TcpStream,
    state: &mut HubState,
    name: &str,
    range: &str,
) -> std::io::Result<()> {
    let fault = match state.faults.get_mut(name) {
        Some(faults) if !faults.is_empty() && range != "bytes=0-0" => Some(faults.remove(0)),
        _ => None,
    };
    if let Some(Fault::Status(status)) = fault {
        return respond(stream, status, &[], b"busy");
    }
    let content = &state.files[name];
    let bounds = range
        .strip_prefix("bytes=")
        .and_then(|range| range.split_once('-'));
    let (start, end) = bounds.unwrap_or(("0", ""));
    let start: usize = start.parse().expect("clients send numbers");
    let end = end.parse().map_or(content.len(), |end: usize| end + 1);
    if start >= content.len() {
        return respond(stream, 416, &[], b"");
    }
    let headers = [
        (
            "Content-Range",
            format!("bytes {start}-{}/{}", end - 1, content.len()),
        ),
        ("ETag", format!("\"{name}-etag\"").replace('/', "-")),
        ("X-Repo-Commit", COMMIT.to_owned()),
    ];
    let body = &content[start..end];
    if let Some(Fault::BreakAfter(bytes)) = fault {
        write_head(&mut stream, 206, &headers, body.len())?;
        return stream.write_all(&body[..bytes]);
    }
    respond(stream, 206, &headers, body)
}

fn respond(
    mut stream: TcpStream,
    status: u16,
    headers: &[(&str, String)],
    body: &[u8],
) -> std::io::Result<()> {
    write_head(&mut stream, status, headers, body.len())?;
    stream.write_all(body)
}

fn write_head(
    stream: &mut TcpStream,
    status: u16,
    headers: &[(&str, String)],
    length: usize,
) -> std::io::Result<()> {
    let mut head =
        format!("HTTP/1.1 {status} .\r\nConnection: close\r\nContent-Length: {length}\r\n");
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    stream.write_all(format!("{head}\r\n").as_bytes())
}
