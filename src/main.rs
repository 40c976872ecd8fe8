//! The program `infold`: one command line for all verbs.

use std::ffi::OsString;
use std::io::{IsTerminal, Write as _};
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};
use infold::kernels::Kernels;
use infold::{bench, chat, merge, serve, train};
use tracing_subscriber::EnvFilter;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Train LoRA adapters, merge them and serve the model over an OpenAI-compatible API, without Python
#[derive(Parser)]
#[command(name = "infold", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Serve(Box<serve::ServeArgs>),
    #[command(alias = "export")]
    Merge(Box<merge::MergeArgs>),
    Train(train::TrainArgs),
    CheckData(train::CheckDataArgs),
    Bench(Box<bench::BenchArgs>),
    Chat(chat::ChatArgs),
    /// Print what a bug report needs: version, system, processor
    Env,
}

/// The exit code of a verb that failed.
const EXIT_FAILURE: u8 = 1;
/// The exit code for a wrong command line, as clap's own.
const EXIT_USAGE: u8 = 2;

fn main() -> ExitCode {
    let (arguments, warnings) = match prepare(std::env::args_os().collect()) {
        Ok(prepared) => prepared,
        Err(error) => return fail(&error, EXIT_USAGE),
    };
    let cli = Cli::parse_from(arguments);
    start_log(&cli.command);
    for warning in warnings {
        tracing::warn!("{warning}");
    }
    let result = match &cli.command {
        Command::Serve(args) => serve::run(args),
        Command::Merge(args) => merge::run(args),
        Command::Train(args) => train::run(args),
        Command::CheckData(args) => train::check_data(args),
        Command::Bench(args) => bench::run(args),
        Command::Chat(args) => run_chat(args),
        Command::Env => print_environment(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            fail(&error, EXIT_FAILURE);
            let _ = std::io::stdout().flush();
            Kernels::end_process(EXIT_FAILURE)
        }
    }
}

/// Rewrites the flags of the verbs that take vLLM's or LLaMA-Factory's into clap's spelling, with
/// warnings.
fn prepare(mut arguments: Vec<OsString>) -> anyhow::Result<(Vec<OsString>, Vec<String>)> {
    match arguments.get(1).and_then(|verb| verb.to_str()) {
        Some("serve" | "bench") => {
            let prepared = serve::prepare_arguments(arguments.split_off(2))?;
            arguments.extend(prepared.arguments);
            Ok((arguments, prepared.warnings))
        }
        Some("merge" | "export") => {
            let prepared = merge::prepare_arguments(arguments.split_off(2));
            arguments.extend(prepared);
            Ok((arguments, Vec::new()))
        }
        _ => Ok((arguments, Vec::new())),
    }
}

fn start_log(command: &Command) {
    let (format, default_level) = match command {
        Command::Serve(args) => (args.listen.log_format, "info"),
        Command::Merge(_) | Command::Train(_) | Command::CheckData(_) => {
            (serve::LogFormat::Text, "info")
        }
        Command::Bench(_) | Command::Chat(_) | Command::Env => (serve::LogFormat::Text, "warn"),
    };
    let filter =
        EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default_level));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false);
    match format {
        serve::LogFormat::Json => log.json().init(),
        serve::LogFormat::Text => log.with_ansi(std::io::stderr().is_terminal()).init(),
    }
}

/// Talks to the named server, or serves the named model on a free port and talks to that.
fn run_chat(args: &chat::ChatArgs) -> anyhow::Result<()> {
    if let Some(url) = args.server_url() {
        return chat::run(args, &url);
    }
    let server = serve::start_local(&args.target).context("starting the model")?;
    chat::run(args, server.base_url())
}

fn print_environment() -> anyhow::Result<()> {
    let num_cores = std::thread::available_parallelism().map_or(1, usize::from);
    let (os, architecture) = (std::env::consts::OS, std::env::consts::ARCH);
    let mut out = std::io::stdout().lock();
    writeln!(
        out,
        "infold {}\nsystem: {os} {architecture}\ncores: {num_cores}\nkernels: {:?}",
        env!("CARGO_PKG_VERSION"),
        infold::kernels::SimdLevel::detect()
    )?;
    for name in ["HF_HOME", "HF_ENDPOINT", "HF_HUB_OFFLINE", "RUST_LOG"] {
        if let Ok(value) = std::env::var(name) {
            writeln!(out, "{name}: {value}")?;
        }
    }
    Ok(())
}

fn fail(error: &anyhow::Error, code: u8) -> ExitCode {
    // The log may not have started yet, so the reason goes to stderr as it is.
    eprintln!("infold: {}", causes(error));
    ExitCode::from(code)
}

/// Returns an error with its causes, each once: many errors already say what caused them, in the
/// words of LLaMA-Factory.
fn causes(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
    }
    text
}
