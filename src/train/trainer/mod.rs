//! The training loop: data to updates to files, on one thread a rank.
//!
//! [`train`] is the entry; `rank` is the loop that every rank runs, `recorder` what rank 0 does
//! besides: logs, checkpoints, results. The loss of an update is the mean over all target tokens
//! of its micro-batches on all ranks, whatever their sizes.

mod rank;
mod recorder;
mod setup;
#[cfg(test)]
mod tests;

pub use setup::{
    BatchPlace, BatchProvider, Evaluation, OutputPlan, Progress, Ranks, RunLength, Start,
    TrainEvent, TrainSetup, TrainSummary,
};

use std::panic::resume_unwind;

use crate::distributed::Comm;

use super::TrainError;
use super::lora::LoraLayout;

/// Runs a training from its start to its files.
///
/// # Errors
/// [`TrainError`]; on an error the checkpoints written so far are whole, and the error is that
/// of the rank which failed first.
pub fn train(setup: &TrainSetup<'_>, progress: &Progress<'_>) -> Result<TrainSummary, TrainError> {
    check(setup)?;
    let layout = LoraLayout::new(setup.config, setup.lora.clone())?;
    let output_dir = &setup.output.output_dir;
    std::fs::create_dir_all(output_dir).map_err(|source| TrainError::OutputDir {
        path: output_dir.clone(),
        source,
    })?;
    let results: Vec<Result<TrainSummary, TrainError>> = std::thread::scope(|scope| {
        let group = || Comm::local_group(setup.ranks.num_ranks);
        let threads: Vec<_> = (group().into_iter().zip(group()))
            .map(|comms| scope.spawn(|| rank::run(setup, &layout, comms, progress)))
            .collect();
        // A rank that panicked has a bug: its message goes on.
        let join = |thread: std::thread::ScopedJoinHandle<'_, _>| {
            thread.join().unwrap_or_else(|panic| resume_unwind(panic))
        };
        threads.into_iter().map(join).collect()
    });
    first_result(results)
}

fn check(setup: &TrainSetup<'_>) -> Result<(), TrainError> {
    let at_least_one = [
        ("num_ranks", setup.ranks.num_ranks as u64),
        ("threads_per_rank", setup.ranks.threads_per_rank as u64),
        ("logging_steps", setup.output.logging_steps),
        ("save_steps", setup.output.save_steps.unwrap_or(1)),
        ("gradient_accumulation_steps", setup.length.accumulation),
        (
            "micro_batches_per_epoch",
            setup.length.micro_batches_per_epoch,
        ),
        (
            "eval_steps",
            setup
                .evaluation
                .as_ref()
                .map_or(1, |evaluation| evaluation.every),
        ),
    ];
    match at_least_one.into_iter().find(|(_, value)| *value == 0) {
        Some((key, _)) => Err(TrainError::InvalidOption {
            key,
            wanted: "at least 1".to_owned(),
            found: "0".to_owned(),
        }),
        None => Ok(()),
    }
}

/// Returns rank 0's summary, or the error that began it all: the others only saw a rank end.
fn first_result(
    results: Vec<Result<TrainSummary, TrainError>>,
) -> Result<TrainSummary, TrainError> {
    let mut summary = None;
    let mut error: Option<TrainError> = None;
    for result in results {
        match result {
            Ok(rank_summary) => {
                summary.get_or_insert(rank_summary);
            }
            Err(rank_error) => {
                let is_echo = error.as_ref().is_some_and(is_echo);
                if error.is_none() || is_echo {
                    error = Some(rank_error);
                }
            }
        }
    }
    match (error, summary) {
        (Some(error), _) => Err(error),
        (None, Some(summary)) => Ok(summary),
        (None, None) => Err(TrainError::InvalidOption {
            key: "num_ranks",
            wanted: "at least 1".to_owned(),
            found: "0".to_owned(),
        }),
    }
}

/// Says whether an error only tells that another rank has ended.
fn is_echo(error: &TrainError) -> bool {
    let TrainError::Kernel { source, .. } = error else {
        return false;
    };
    let text = source.to_string();
    text.contains("has ended")
}
