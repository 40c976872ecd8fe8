//! Sockets and connections: bind, accept, serve HTTP/1.1, end in good order.
//!
//! Uses hyper directly, because slow clients need limits that axum's `serve` does not offer: a
//! time for the headers (also of an idle connection) and a time for each write.

use std::net::{SocketAddr, ToSocketAddrs};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpSocket, UnixListener};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, timeout};
use tokio_io_timeout::TimeoutStream;

use super::args::ListenArgs;
use super::state::AppState;

/// Time for the headers of a request, counted from the end of the previous one.
const HEADER_TIMEOUT: Duration = Duration::from_secs(60);
/// Time for one write; a client that reads nothing for so long is gone.
const WRITE_TIMEOUT: Duration = Duration::from_secs(60);
/// Most headers of a request.
const MAX_HEADERS: usize = 256;
/// Connections that wait to be accepted.
const BACKLOG: u32 = 2048;
/// How often slow conditions (engine death, an empty server) are looked at.
const POLL_INTERVAL: Duration = Duration::from_millis(50);
/// Most time after Ctrl-C for requests to finish.
const INTERRUPT_GRACE: Duration = Duration::from_secs(1);
/// How long a server whose engine has died still answers, so that whoever asks for its health is
/// told why.
const DEATH_GRACE: Duration = Duration::from_secs(1);
/// Most time for a stopped engine to give its memory back.
const STOP_GRACE: Duration = Duration::from_secs(3);
/// Time for aborted requests to send their last chunk, and for connections to close.
const ABORT_GRACE: Duration = Duration::from_millis(300);

/// A request to end the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopSignal {
    /// SIGTERM: finish what runs, within `--shutdown-timeout`.
    Terminate,
    /// SIGINT: a person waits.
    Interrupt,
}

/// A bound address that does not take connections yet.
///
/// Binding comes before loading the model, so that a port in use is found at once; listening
/// comes after it, so that clients see a refused connection until answers are possible.
#[derive(Debug)]
pub struct BoundSocket(Bound);

#[derive(Debug)]
enum Bound {
    Tcp(TcpSocket, SocketAddr),
    Unix(std::path::PathBuf),
}

/// A socket that takes connections.
#[derive(Debug)]
pub struct Listener(Listening);

#[derive(Debug)]
enum Listening {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl BoundSocket {
    /// Reserves the address of the flags.
    ///
    /// # Errors
    /// An address that is in use or not this machine's.
    pub fn bind(args: &ListenArgs) -> anyhow::Result<Self> {
        if let Some(path) = &args.uds {
            check_directory(path)?;
            remove_stale_socket(path)?;
            return Ok(Self(Bound::Unix(path.clone())));
        }
        let host = args.host.as_deref().unwrap_or("0.0.0.0");
        let address = (host.trim_matches(['[', ']']), args.port)
            .to_socket_addrs()
            .with_context(|| format!("resolve --host {host}"))?
            .next()
            .with_context(|| format!("--host {host} has no address"))?;
        let socket = match address {
            SocketAddr::V4(_) => TcpSocket::new_v4(),
            SocketAddr::V6(_) => TcpSocket::new_v6(),
        };
        let socket = socket.context("open a socket")?;
        // A restarted server may take its port while old connections linger.
        socket.set_reuseaddr(true).context("set SO_REUSEADDR")?;
        socket.bind(address).with_context(|| match args.port {
            0 => format!("bind {address}"),
            port => format!(
                "bind {address}; if the port is in use, choose another: --port {}",
                port.wrapping_add(1)
            ),
        })?;
        Ok(Self(Bound::Tcp(socket, address)))
    }

    /// Starts to take connections. Needs a tokio runtime.
    ///
    /// # Errors
    /// A socket file that can not be made, or a port that another server took meanwhile.
    pub fn listen(self) -> anyhow::Result<Listener> {
        Ok(Listener(match self.0 {
            Bound::Tcp(socket, address) => {
                let listener = socket.listen(BACKLOG);
                Listening::Tcp(listener.with_context(|| format!("listen on {address}"))?)
            }
            Bound::Unix(path) => {
                let listener = UnixListener::bind(&path);
                Listening::Unix(listener.with_context(|| format!("listen on {}", path.display()))?)
            }
        }))
    }
}

impl Listener {
    /// Returns where the server can be reached, for people.
    pub fn describe(&self) -> String {
        match &self.0 {
            Listening::Tcp(listener) => match listener.local_addr() {
                Ok(address) => format!("http://{address}"),
                Err(_) => "an unknown address".to_owned(),
            },
            Listening::Unix(listener) => match listener.local_addr() {
                Ok(address) => format!("{address:?}"),
                Err(_) => "an unknown socket".to_owned(),
            },
        }
    }
}

/// Refuses a socket without a directory to lie in, before a model is loaded for it.
fn check_directory(socket: &Path) -> anyhow::Result<()> {
    let parent = socket.parent().filter(|path| !path.as_os_str().is_empty());
    match parent {
        Some(directory) if !directory.is_dir() => bail!(
            "--uds {}: there is no directory {}",
            socket.display(),
            directory.display()
        ),
        _ => Ok(()),
    }
}

/// Removes a socket file that no server listens on any more.
fn remove_stale_socket(path: &Path) -> anyhow::Result<()> {
    if !path.exists() {
        return Ok(());
    }
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        bail!("another server listens on {}", path.display());
    }
    std::fs::remove_file(path).with_context(|| format!("remove the old socket {}", path.display()))
}

/// Serves until a signal or the death of the engine.
///
/// # Errors
/// The engine died; the error says why.
pub(super) async fn serve_until_stopped(
    state: Arc<AppState>,
    router: Router,
    listener: Listener,
    mut signals: mpsc::UnboundedReceiver<StopSignal>,
    shutdown_timeout: Duration,
) -> anyhow::Result<()> {
    let (close, closing) = watch::channel(());
    let accepting = tokio::spawn(accept(listener, router, closing));
    let result = tokio::select! {
        reason = engine_death(&state) => {
            tracing::error!("the engine has stopped, the server ends: {reason}");
            tokio::select! {
                () = sleep(DEATH_GRACE) => {}
                _ = signals.recv() => {}
            }
            Err(anyhow::anyhow!("the engine has stopped: {reason}"))
        }
        signal = signals.recv() => {
            drain(&state, signal, &mut signals, shutdown_timeout).await;
            Ok(())
        }
    };
    accepting.abort();
    // Connections see the closed channel, finish their response and end.
    let _ = close.send(());
    let _ = timeout(ABORT_GRACE, close.closed()).await;
    result
}

/// Lets requests finish in the time there is, then aborts the rest.
async fn drain(
    state: &AppState,
    signal: Option<StopSignal>,
    signals: &mut mpsc::UnboundedReceiver<StopSignal>,
    shutdown_timeout: Duration,
) {
    let grace = match signal {
        Some(StopSignal::Terminate) => shutdown_timeout,
        Some(StopSignal::Interrupt) | None => shutdown_timeout.min(INTERRUPT_GRACE),
    };
    state.lifecycle.start_draining();
    let num_in_flight = state.lifecycle.num_in_flight();
    tracing::info!(
        num_in_flight,
        grace_secs = grace.as_secs(),
        "stopping; again to stop at once"
    );
    tokio::select! {
        () = until_idle(state, grace) => {}
        _ = signals.recv() => return,
    }
    state.engine.stop();
    tokio::select! {
        () = until_idle(state, ABORT_GRACE) => {}
        _ = signals.recv() => return,
    }
    // A process that ends while a GPU's memory is given back may fail in the driver.
    tokio::select! {
        _ = timeout(STOP_GRACE, engine_death(state)) => {}
        _ = signals.recv() => {}
    }
}

async fn until_idle(state: &AppState, at_most: Duration) {
    let deadline = Instant::now() + at_most;
    while state.lifecycle.num_in_flight() > 0 && Instant::now() < deadline {
        sleep(POLL_INTERVAL.min(at_most)).await;
    }
}

async fn engine_death(state: &AppState) -> String {
    loop {
        if let Some(reason) = state.engine.death() {
            return reason;
        }
        sleep(POLL_INTERVAL).await;
    }
}

async fn accept(listener: Listener, router: Router, closing: watch::Receiver<()>) {
    loop {
        let accepted = match &listener.0 {
            Listening::Tcp(listener) => listener.accept().await.map(|(stream, _)| {
                // Tokens are small; Nagle's algorithm would hold them back.
                let _ = stream.set_nodelay(true);
                spawn_connection(stream, &router, &closing);
            }),
            Listening::Unix(listener) => listener
                .accept()
                .await
                .map(|(stream, _)| spawn_connection(stream, &router, &closing)),
        };
        if let Err(error) = accepted {
            // Out of file descriptors, or a client that left: neither is a reason to end.
            tracing::warn!(%error, "a connection could not be accepted");
            sleep(POLL_INTERVAL).await;
        }
    }
}

fn spawn_connection(
    stream: impl AsyncRead + AsyncWrite + Send + 'static,
    router: &Router,
    closing: &watch::Receiver<()>,
) {
    let service = TowerToHyperService::new(router.clone());
    let mut closing = closing.clone();
    tokio::spawn(async move {
        let mut stream = TimeoutStream::new(stream);
        stream.set_write_timeout(Some(WRITE_TIMEOUT));
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEADER_TIMEOUT)
            .max_headers(MAX_HEADERS)
            .serve_connection(TokioIo::new(Box::pin(stream)), service);
        let mut connection = std::pin::pin!(connection);
        let ended = tokio::select! {
            ended = connection.as_mut() => ended,
            _ = closing.changed() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = ended {
            tracing::debug!(%error, "a connection broke off");
        }
    });
}
