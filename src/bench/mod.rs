//! `infold bench`: what the engine does without HTTP, measured.
//!
//! Each case runs a batch of random prompts of one length to one output length, without stops,
//! and reports medians: time to the first token, time per output token, tokens per second.

use std::io::Write;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, bail};
use clap::Args;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::Serialize;

use crate::engine::{
    EngineArgs, EngineHandle, GenerateRequest, LoadFormat, SamplingParams, TokenEvent,
};
use crate::weights::ModelSource;

/// Measure the engine offline: first token, time per token, throughput
#[derive(Debug, Clone, Args)]
pub struct BenchArgs {
    /// Model to measure: a directory, a GGUF file or a hub id
    #[arg(value_name = "MODEL", required_unless_present = "model_flag")]
    model_positional: Option<String>,

    /// Name the model by flag instead of by position [default: none]
    #[arg(
        long = "model",
        id = "model_flag",
        value_name = "MODEL",
        conflicts_with = "model_positional"
    )]
    model_flag: Option<String>,

    /// Measure with each of these numbers of sequences at once
    #[arg(long, num_args = 1.., value_delimiter = ',', default_values_t = [1, 8, 32])]
    batch_size: Vec<usize>,

    /// Give each sequence a prompt of this many tokens
    #[arg(long, value_name = "TOKENS", default_value_t = 128)]
    input_len: usize,

    /// Draw this many tokens for each sequence
    #[arg(long, value_name = "TOKENS", default_value_t = 128)]
    output_len: usize,

    /// Measure these cases instead, e.g. 256x512/256: sequences, prompt tokens, drawn tokens
    #[arg(long = "case", value_name = "CASE", num_args = 1.., value_delimiter = ',', value_parser = parse_size)]
    cases: Vec<Size>,

    /// Draw with this temperature; 0 is greedy
    #[arg(long, default_value_t = 0.0)]
    temperature: f32,

    /// The same as --load-format dummy [default: off]
    #[arg(long)]
    dummy_weights: bool,

    /// Repeat each case this often and take medians
    #[arg(long, default_value_t = 3)]
    repetitions: usize,

    /// Print JSON instead of a table [default: off]
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    #[expect(missing_docs, reason = "a doc comment here would become help text")]
    pub engine: EngineArgs,
}

/// How much one case asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Size {
    batch_size: usize,
    input_len: usize,
    output_len: usize,
}

/// Reads `256x512/256`.
fn parse_size(text: &str) -> Result<Size, String> {
    let numbers = text.split_once('x').and_then(|(batch_size, lens)| {
        let (input_len, output_len) = lens.split_once('/')?;
        let size = Size {
            batch_size: batch_size.parse().ok()?,
            input_len: input_len.parse().ok()?,
            output_len: output_len.parse().ok()?,
        };
        (size.batch_size > 0 && size.input_len > 0 && size.output_len > 0).then_some(size)
    });
    numbers.ok_or_else(|| {
        format!("expected SEQUENCESxPROMPT/DRAWN such as 256x512/256, all positive, got `{text}`")
    })
}

/// One measured case; times are medians over the repetitions.
#[derive(Debug, Clone, Serialize)]
struct Case {
    batch_size: usize,
    input_len: usize,
    output_len: usize,
    /// From submission to the first token of every sequence.
    first_token_ms: f64,
    /// Between tokens after the first; none where there are none.
    token_ms: Option<f64>,
    /// Prompt tokens a second until the first tokens.
    prompt_tok_s: f64,
    /// Tokens drawn a second over the whole run.
    output_tok_s: f64,
}

impl BenchArgs {
    fn sizes(&self) -> Vec<Size> {
        if !self.cases.is_empty() {
            return self.cases.clone();
        }
        let size = |&batch_size| Size {
            batch_size,
            input_len: self.input_len.max(1),
            output_len: self.output_len.max(1),
        };
        self.batch_size.iter().map(size).collect()
    }
}

/// Runs the cases and prints them.
///
/// # Errors
/// When the model does not load or a case does not fit it.
pub fn run(args: &BenchArgs) -> anyhow::Result<()> {
    let model = args
        .model_positional
        .as_deref()
        .or(args.model_flag.as_deref())
        .unwrap_or_default();
    let start = Instant::now();
    let checkpoint: Arc<dyn ModelSource> = match args.engine.load_format {
        LoadFormat::Auto if !args.dummy_weights => args.engine.open(model)?,
        _ => args.engine.open_dummy(model)?,
    };
    let handle = args.engine.start(checkpoint)?;
    let load_seconds = start.elapsed().as_secs_f64();
    let max_model_len = handle.info().max_model_len;
    let mut random = StdRng::seed_from_u64(args.engine.seed);
    let mut cases = Vec::new();
    for size in args.sizes() {
        if size.input_len + size.output_len > max_model_len {
            bail!("{size:?} does not fit in the model's {max_model_len} tokens");
        }
        cases.push(measure(args, size, &handle, &mut random).with_context(|| format!("{size:?}"))?);
    }
    handle.stop();
    print(args, model, load_seconds, &cases)
}

fn measure(
    args: &BenchArgs,
    size: Size,
    handle: &EngineHandle,
    random: &mut StdRng,
) -> anyhow::Result<Case> {
    let Size {
        batch_size,
        input_len,
        output_len,
    } = size;
    let one = Size {
        output_len: 1,
        ..size
    };
    let (mut first, mut total) = (Vec::new(), Vec::new());
    // One run more than asked for: the first warms caches and is not counted.
    for repetition in 0..=args.repetitions {
        let first_seconds = generate(args, one, handle, random)?;
        let total_seconds = generate(args, size, handle, random)?;
        if repetition > 0 {
            first.push(first_seconds);
            total.push(total_seconds);
        }
    }
    let (first, total) = (median(first), median(total));
    Ok(Case {
        batch_size,
        input_len,
        output_len,
        first_token_ms: first * 1e3,
        token_ms: (output_len > 1).then(|| (total - first) * 1e3 / (output_len - 1) as f64),
        prompt_tok_s: (batch_size * input_len) as f64 / first,
        output_tok_s: (batch_size * output_len) as f64 / total,
    })
}

/// Runs one batch to its end and returns the seconds it took.
fn generate(
    args: &BenchArgs,
    size: Size,
    handle: &EngineHandle,
    random: &mut StdRng,
) -> anyhow::Result<f64> {
    let Size {
        batch_size,
        input_len,
        output_len,
    } = size;
    let vocab_size = handle.info().vocab_size as u32;
    let prompts: Vec<Vec<u32>> = (0..batch_size)
        .map(|_| {
            (0..input_len)
                .map(|_| random.random_range(0..vocab_size))
                .collect()
        })
        .collect();
    let start = Instant::now();
    let mut streams = Vec::with_capacity(batch_size);
    for (index, prompt_token_ids) in prompts.into_iter().enumerate() {
        streams.push(handle.submit(GenerateRequest {
            request_id: format!("bench-{index}"),
            prompt_token_ids,
            sampling_params: SamplingParams {
                temperature: args.temperature,
                ignore_eos: true,
                max_tokens: output_len,
                ..SamplingParams::default()
            },
            priority: 0,
        })?);
    }
    for stream in &mut streams {
        let mut finished = false;
        while let Some(event) = stream.next_blocking() {
            finished |= event.is_last();
            if let TokenEvent::Failed { message } = event {
                bail!(message);
            }
        }
        if !finished {
            bail!("the engine ended: {}", handle.death().unwrap_or_default());
        }
    }
    Ok(start.elapsed().as_secs_f64())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn print(args: &BenchArgs, model: &str, load_seconds: f64, cases: &[Case]) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    if args.json {
        let report =
            serde_json::json!({ "model": model, "load_seconds": load_seconds, "cases": cases });
        writeln!(out, "{}", serde_json::to_string_pretty(&report)?)?;
        return Ok(());
    }
    writeln!(
        out,
        "{model}, loaded in {load_seconds:.2} s; medians of {}",
        args.repetitions
    )?;
    writeln!(
        out,
        "| batch | prompt/output | first token ms | ms per token | prompt tok/s | output tok/s |"
    )?;
    writeln!(out, "|---|---|---|---|---|---|")?;
    for case in cases {
        let token_ms = case.token_ms.map(|ms| format!("{ms:.2}"));
        writeln!(
            out,
            "| {} | {}/{} | {:.1} | {} | {:.0} | {:.1} |",
            case.batch_size,
            case.input_len,
            case.output_len,
            case.first_token_ms,
            token_ms.as_deref().unwrap_or("–"),
            case.prompt_tok_s,
            case.output_tok_s
        )?;
    }
    Ok(())
}
