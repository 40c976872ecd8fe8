//! Data sets: from `dataset_info.json` and files of rows to conversations, with a report of what
//! became of every row.
//!
//! Knows no tokens. The formats, their defaults and the random draws are LLaMA-Factory's, so that
//! the same files give the same conversations in the same order.

mod convert;
mod detect;
mod encoding;
mod error;
mod file;
mod info;
mod numpy;
mod parquet_file;
mod report;
#[cfg(test)]
mod tests;

use std::path::PathBuf;

use crate::text::Conversation;

use file::Row;
use info::DatasetSpec;
use numpy::{RandomState, default_rng_permutation};

pub use convert::DropReason;
pub(super) use encoding::decode_utf8;
pub use error::DataError;
pub use file::RowId;
pub use report::{DatasetReport, Dropped};

/// Which data sets to read, and how much of them.
#[derive(Debug, Clone, PartialEq)]
pub struct DataRequest {
    /// The folder of `dataset_info.json`.
    pub dataset_dir: PathBuf,
    /// Data sets to train on, by name or path, concatenated in order.
    pub dataset: Vec<String>,
    /// Data sets to evaluate on.
    pub eval_dataset: Vec<String>,
    /// Rows of each data set to take, from its start.
    pub max_samples: Option<usize>,
    /// Rows split off for evaluation: a count above 1, else a fraction; 0 for none.
    pub val_size: f64,
    /// The largest share of rows of a data set that may be unusable, 0 to 1.
    pub max_dropped_ratio: f64,
    /// The seed of `num_samples` and `val_size`.
    pub seed: u64,
}

/// Conversations, and what became of the rows.
#[derive(Debug, Clone, PartialEq)]
pub struct LoadedData {
    /// To train on.
    pub train: Vec<Conversation>,
    /// To evaluate on; empty when none were asked for.
    pub eval: Vec<Conversation>,
    /// One for each data set, those of evaluation last.
    pub reports: Vec<DatasetReport>,
}

/// Reads all data sets of a request.
///
/// # Errors
/// [`DataError`] when a data set is unknown, unreadable, empty, or mostly unusable.
pub fn load_data(request: &DataRequest) -> Result<LoadedData, DataError> {
    if !request.eval_dataset.is_empty() && request.val_size > 0.0 {
        return Err(DataError::TwoEvaluationSets);
    }
    // One generator for all draws, in order, as numpy's global one in LLaMA-Factory.
    let mut random = RandomState::new(request.seed);
    let mut reports = Vec::new();
    let mut load = |names: &[String]| {
        let mut conversations = Vec::new();
        for spec in info::find_datasets(names, &request.dataset_dir)? {
            let (more, report) = load_dataset(spec, request, &mut random)?;
            conversations.extend(more);
            reports.push(report);
        }
        Ok::<_, DataError>(conversations)
    };
    let train = load(&request.dataset)?;
    let eval = load(&request.eval_dataset)?;
    let (train, eval) = if request.val_size > 0.0 {
        split(train, request.val_size, request.seed)?
    } else {
        (train, eval)
    };
    Ok(LoadedData {
        train,
        eval,
        reports,
    })
}

fn load_dataset(
    mut spec: DatasetSpec,
    request: &DataRequest,
    random: &mut RandomState,
) -> Result<(Vec<Conversation>, DatasetReport), DataError> {
    let rows = file::read_rows(&spec.name, &spec.path)?;
    if rows.rows.is_empty() {
        return Err(DataError::Empty {
            name: spec.name,
            path: spec.path,
        });
    }
    if spec.guessed {
        detect::guess_format(&mut spec, &rows.rows);
    }
    let selected = select(
        rows.rows.len(),
        spec.num_samples,
        request.max_samples,
        random,
    );
    let mut report = DatasetReport {
        name: spec.name.clone(),
        formatting: spec.formatting.name(),
        files: rows.files,
        num_rows: rows.rows.len(),
        num_selected: selected.len(),
        warnings: detect::ignored_columns(&spec, &rows.rows),
        ..DatasetReport::default()
    };
    let mut conversations = Vec::with_capacity(selected.len());
    let mut empty = Vec::new();
    for index in selected {
        let row = &rows.rows[index];
        match convert_row(row, &spec) {
            Ok(conversation) => {
                if conversation
                    .messages
                    .iter()
                    .any(|turn| turn.content.is_empty())
                {
                    empty.push(row.id);
                }
                conversations.push(conversation);
            }
            Err(reason) => report.drop_row(reason.to_string(), row.id),
        }
    }
    report.num_kept = conversations.len();
    report.warnings.extend(empty_turns(&empty));
    check_dropped(&report, &spec, &rows.rows, request.max_dropped_ratio)?;
    Ok((conversations, report))
}

fn convert_row(row: &Row, spec: &DatasetSpec) -> Result<Conversation, DropReason> {
    match &row.content {
        Ok(content) => convert::convert(content, spec),
        Err(reason) => Err(DropReason::Malformed(reason.clone())),
    }
}

/// Returns the rows that `num_samples` draws and `max_samples` leaves.
fn select(
    num_rows: usize,
    num_samples: Option<usize>,
    max_samples: Option<usize>,
    random: &mut RandomState,
) -> Vec<usize> {
    let mut selected: Vec<usize> = match num_samples {
        None => (0..num_rows).collect(),
        Some(wanted) => {
            let mut drawn = random.permutation(num_rows);
            drawn.truncate(wanted);
            let missing = wanted - drawn.len();
            drawn.extend(random.choice(num_rows, missing));
            drawn
        }
    };
    selected.truncate(max_samples.unwrap_or(usize::MAX));
    selected
}

fn empty_turns(rows: &[RowId]) -> Option<String> {
    let first = rows.first()?;
    Some(format!(
        "{} rows have a turn without text, the first is row {}",
        rows.len(),
        first.row
    ))
}

fn check_dropped(
    report: &DatasetReport,
    spec: &DatasetSpec,
    rows: &[Row],
    limit: f64,
) -> Result<(), DataError> {
    let dropped = report.num_dropped();
    let reasons = || {
        let lines = report.reasons();
        lines
            .iter()
            .map(|line| format!("  {line}"))
            .collect::<Vec<_>>()
            .join("\n")
    };
    if report.num_kept == 0 {
        return Err(DataError::NoValidRows {
            name: report.name.clone(),
            num_rows: report.num_selected,
            reasons: reasons(),
            found: detect::columns_of(rows),
            wanted: detect::wanted_columns(spec),
        });
    }
    if dropped as f64 > limit * report.num_selected as f64 {
        return Err(DataError::TooManyDropped {
            name: report.name.clone(),
            dropped,
            num_rows: report.num_selected,
            limit,
            reasons: reasons(),
        });
    }
    Ok(())
}

/// Splits as `datasets.train_test_split(test_size=val_size, seed=seed)`: training part, then
/// evaluation part.
fn split(
    rows: Vec<Conversation>,
    val_size: f64,
    seed: u64,
) -> Result<(Vec<Conversation>, Vec<Conversation>), DataError> {
    let num_rows = rows.len();
    let num_eval = if val_size > 1.0 {
        val_size as usize
    } else {
        (val_size * num_rows as f64).ceil() as usize
    };
    if num_eval == 0 || num_eval >= num_rows {
        return Err(DataError::ValSize { val_size, num_rows });
    }
    let permutation = default_rng_permutation(seed, num_rows);
    let take = |indices: &[usize]| indices.iter().map(|&index| rows[index].clone()).collect();
    let (eval, train) = permutation.split_at(num_eval);
    Ok((take(train), take(eval)))
}
