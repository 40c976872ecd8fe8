//! A server inside this process, for a client that brings only a model.

use std::sync::Arc;

use clap::Parser;
use tokio::runtime::Runtime;
use tokio::sync::mpsc;

use super::args::ServeArgs;
use super::listen::{BoundSocket, StopSignal};
use super::load;
use super::state::AppState;

/// A running server on the loopback interface; dropping it ends it.
pub struct LocalServer {
    base_url: String,
    _signals: mpsc::UnboundedSender<StopSignal>,
    _runtime: Runtime,
}

impl LocalServer {
    /// Returns where it listens, as `http://127.0.0.1:PORT`.
    pub fn base_url(&self) -> &str {
        &self.base_url
    }
}

/// Only there to get every flag's default from clap.
#[derive(Parser)]
struct Flags {
    #[command(flatten)]
    serve: ServeArgs,
}

/// Serves `model` with default flags on a free loopback port.
///
/// # Errors
/// A model that can not be found, read or run.
pub fn start_local(model: &str) -> anyhow::Result<LocalServer> {
    let flags = [
        "infold",
        model,
        "--host",
        "127.0.0.1",
        "--port",
        "0",
        "--disable-access-log",
    ];
    let args = Flags::try_parse_from(flags)?.serve;
    let runtime = super::http_runtime()?;
    let in_runtime = runtime.enter();
    let socket = BoundSocket::bind(&args.listen)?;
    let loaded = load::start_engine(&args)?;
    let state = Arc::new(AppState::new(&args, loaded, Vec::new())?);
    let listener = socket.listen()?;
    let base_url = listener.describe();
    let (signals, receiver) = mpsc::unbounded_channel();
    runtime.spawn(async move { super::serve_app(state, listener, receiver, &args.listen).await });
    drop(in_runtime);
    Ok(LocalServer {
        base_url,
        _signals: signals,
        _runtime: runtime,
    })
}
