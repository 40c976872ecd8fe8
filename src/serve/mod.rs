//! `infold serve`: strings and JSON in, server-sent events out.
//!
//! An OpenAI-compatible HTTP server with vLLM's flags, API and error texts over the
//! [`engine`](crate::engine). [`run`] is the whole command: bind, start the engine, serve, drain.
//! This folder is the only one that knows HTTP; all model work happens behind
//! [`EngineHandle`](crate::engine::EngineHandle).

mod args;
mod auth;
mod body;
mod defaults;
mod error;
mod flags;
mod foreign_flags;
mod listen;
mod load;
mod local;
mod metrics;
mod observe;
mod openai;
mod openapi;
mod ops;
mod router;
mod state;

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

pub use args::{ApiArgs, ContentFormat, JsonObject, ListenArgs, LogFormat, ServeArgs, StringList};
pub use flags::{PreparedArguments, prepare_arguments};
pub use listen::{BoundSocket, Listener, StopSignal};
pub use load::LoadedModel;
pub use local::{LocalServer, start_local};
pub use state::AppState;

/// Threads that serve HTTP; the cores belong to the engine.
const MAX_HTTP_THREADS: usize = 4;
/// Threads that tokenize large bodies.
const MAX_BLOCKING_THREADS: usize = 8;
/// Most time that the process takes to end once the server has in good order.
const EXIT_TIMEOUT: Duration = Duration::from_secs(10);
/// How often throughput is logged.
const STATS_INTERVAL: Duration = Duration::from_secs(10);

/// Serves a model until a signal comes or the engine dies.
///
/// # Errors
/// An address in use, a model that can not be loaded, the death of the engine.
pub fn run(args: &ServeArgs) -> anyhow::Result<()> {
    let runtime = http_runtime()?;
    let result = run_on(&runtime, args);
    // Work that is still in a thread must not hold up the end of the process.
    runtime.shutdown_background();
    if result.is_ok() {
        limit_exit();
    }
    result
}

/// Sees to it that the process ends soon: at its exit a GPU's driver may wait for kernels that
/// never end.
fn limit_exit() {
    // Without a thread the exit takes as long as it takes.
    let _ = std::thread::Builder::new()
        .name("exit".to_owned())
        .spawn(abort_late);
}

fn abort_late() {
    std::thread::sleep(EXIT_TIMEOUT);
    tracing::error!("the process does not end by itself, so it is aborted");
    std::process::abort();
}

fn http_runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    let num_cores = std::thread::available_parallelism().map_or(1, usize::from);
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(num_cores.clamp(2, MAX_HTTP_THREADS))
        .max_blocking_threads(MAX_BLOCKING_THREADS)
        .thread_name("http")
        .enable_all()
        .build()
        .context("start the HTTP threads")
}

fn run_on(runtime: &tokio::runtime::Runtime, args: &ServeArgs) -> anyhow::Result<()> {
    let socket = {
        let _in_runtime = runtime.enter();
        BoundSocket::bind(&args.listen)?
    };
    let loaded = load::start_engine(args)?;
    let state = Arc::new(AppState::new(args, loaded, api_keys(args))?);
    runtime.block_on(async {
        let listener = socket.listen()?;
        tracing::info!(
            model = state.model.name(),
            max_model_len = state.engine.info().max_model_len,
            "listening on {}",
            listener.describe()
        );
        if !args.listen.disable_log_stats {
            tokio::spawn(log_stats(Arc::clone(&state)));
        }
        serve_app(state, listener, stop_signals()?, &args.listen).await
    })
}

/// Serves the API on a listener until a stop signal comes or the engine dies.
///
/// # Errors
/// The death of the engine, or a CORS flag that can not stand in a header.
pub async fn serve_app(
    state: Arc<AppState>,
    listener: Listener,
    signals: mpsc::UnboundedReceiver<StopSignal>,
    args: &ListenArgs,
) -> anyhow::Result<()> {
    let router = router::router(Arc::clone(&state), router::cors(args)?);
    let shutdown_timeout = Duration::from_secs(args.shutdown_timeout);
    listen::serve_until_stopped(state, router, listener, signals, shutdown_timeout).await
}

/// Returns the keys of the flags, else those of the environment.
fn api_keys(args: &ServeArgs) -> Vec<String> {
    if !args.listen.api_key.is_empty() {
        return args.listen.api_key.clone();
    }
    let from_environment = ["INFOLD_API_KEY", "VLLM_API_KEY"].map(std::env::var);
    let mut keys = from_environment
        .into_iter()
        .flatten()
        .filter(|key| !key.is_empty());
    keys.next().into_iter().collect()
}

fn stop_signals() -> anyhow::Result<mpsc::UnboundedReceiver<StopSignal>> {
    let (sender, receiver) = mpsc::unbounded_channel();
    for (kind, stop) in [
        (SignalKind::terminate(), StopSignal::Terminate),
        (SignalKind::interrupt(), StopSignal::Interrupt),
    ] {
        let mut signals = signal(kind).context("listen to signals")?;
        let sender = sender.clone();
        tokio::spawn(async move {
            while signals.recv().await.is_some() && sender.send(stop).is_ok() {}
        });
    }
    Ok(receiver)
}

/// Logs throughput and queue length while there is something to tell.
async fn log_stats(state: Arc<AppState>) {
    let mut before = state.engine.stats();
    let mut ticks = tokio::time::interval(STATS_INTERVAL);
    ticks.tick().await;
    loop {
        ticks.tick().await;
        let now = state.engine.stats();
        if now != before {
            let secs = STATS_INTERVAL.as_secs_f64();
            let rate =
                |after: u64, before: u64| (after.saturating_sub(before) as f64 / secs).round();
            tracing::info!(
                prompt_tokens_per_s = rate(now.prompt_tokens, before.prompt_tokens),
                generation_tokens_per_s = rate(now.generation_tokens, before.generation_tokens),
                running = now.num_requests_running,
                waiting = now.num_requests_waiting,
                kv_blocks_used = now.num_blocks_used,
                kv_blocks_total = now.num_blocks_total,
                prefix_cache_hits = now.prefix_cache_hits,
                preemptions = now.num_preemptions,
                "engine"
            );
        }
        before = now;
    }
}

#[cfg(test)]
mod tests;
