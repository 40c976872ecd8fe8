//! What can be wrong with data sets and their description.

use std::path::PathBuf;

/// Everything that stops a data set from being read; a row that is merely unusable is a
/// [`DropReason`](super::DropReason).
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// `dataset_info.json` can not be read.
    #[error(
        "Cannot open {path:?} due to {source}; set --dataset_dir to the folder that holds it, \
         or name a file directly: --dataset ./rows.json"
    )]
    OpenInfo {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// `dataset_info.json` is not JSON.
    #[error("{path:?} is not valid JSON: {source}")]
    InfoJson {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// An entry of `dataset_info.json` is not what it should be.
    #[error("{path:?}: data set \"{name}\": {what}")]
    InfoEntry {
        /// The file.
        path: PathBuf,
        /// The data set.
        name: String,
        /// What is wrong and what to do.
        what: String,
    },
    /// No such data set.
    #[error(
        "Undefined dataset {name} in dataset_info.json: {path:?} has {keys}; {suggestion}\
         to use a file directly: --dataset ./{name}.json"
    )]
    Undefined {
        /// The name asked for.
        name: String,
        /// The absolute path of `dataset_info.json`.
        path: PathBuf,
        /// The names it has.
        keys: String,
        /// "did you mean …? Or ", or nothing.
        suggestion: String,
    },
    /// The file of a data set does not exist.
    #[error("File {path:?} not found (data set \"{name}\")")]
    FileNotFound {
        /// The data set.
        name: String,
        /// The absolute path looked for.
        path: PathBuf,
    },
    /// The extension stands for no format that is read.
    #[error("Allowed file types: csv,json,jsonl,parquet,txt; found {path:?}{advice}")]
    FileType {
        /// The file.
        path: PathBuf,
        /// What to do, or nothing.
        advice: String,
    },
    /// A directory mixes formats, or holds nothing.
    #[error("File types should be identical: {path:?} holds {found}")]
    MixedFileTypes {
        /// The directory.
        path: PathBuf,
        /// The extensions found.
        found: String,
    },
    /// A file can not be read.
    #[error("cannot read {path:?}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A text file is not UTF-8.
    #[error("{path:?} is not UTF-8: line {line}, byte {offset}{guess}")]
    Encoding {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// The offset of the first wrong byte in the file, from 0.
        offset: usize,
        /// The likely encoding and how to convert it, or nothing.
        guess: String,
    },
    /// A JSON file is not JSON.
    #[error("{path:?} is not valid JSON: {source}{advice}")]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
        /// What to do, or nothing.
        advice: &'static str,
    },
    /// A JSON file holds something else than rows.
    #[error("{path:?} holds {found} where a list of rows ([{{…}}, {{…}}]) is wanted")]
    NotRows {
        /// The file.
        path: PathBuf,
        /// What it holds.
        found: &'static str,
    },
    /// A CSV file has no usable header.
    #[error("cannot read the header of {path:?}: {source}")]
    CsvHeader {
        /// The file.
        path: PathBuf,
        /// Why.
        source: csv::Error,
    },
    /// A Parquet file can not be read.
    #[error(
        "cannot read {path:?} as Parquet: {source}; it may be compressed with something other \
         than snappy or zstd: save it again, or as JSON lines"
    )]
    Parquet {
        /// The file.
        path: PathBuf,
        /// Why.
        source: parquet::errors::ParquetError,
    },
    /// A data set for preferences or rewards in supervised fine-tuning.
    #[error(
        "The dataset is not applicable in the current training stage: \"{name}\" is a \
         {kind} data set, and `stage: sft` learns from plain conversations"
    )]
    WrongStage {
        /// The data set.
        name: String,
        /// What it is.
        kind: &'static str,
    },
    /// A data set has no row at all.
    #[error("data set \"{name}\" is empty: {path:?} holds no rows")]
    Empty {
        /// The data set.
        name: String,
        /// The file or directory.
        path: PathBuf,
    },
    /// Every row was dropped.
    #[error(
        "Cannot find valid samples in data set \"{name}\": all {num_rows} rows were dropped.\n\
         {reasons}\nthe rows have: {found}; looked for: {wanted}"
    )]
    NoValidRows {
        /// The data set.
        name: String,
        /// Rows read.
        num_rows: usize,
        /// The reasons with their rows, one a line.
        reasons: String,
        /// The columns of the first row.
        found: String,
        /// The columns looked for.
        wanted: String,
    },
    /// So many rows were dropped that something must be wrong.
    #[error(
        "data set \"{name}\": {dropped} of {num_rows} rows were dropped, more than \
         max_dropped_ratio {limit} allows.\n{reasons}\n\
         mend the rows, or set --max_dropped_ratio 1 to train on the others"
    )]
    TooManyDropped {
        /// The data set.
        name: String,
        /// Rows dropped.
        dropped: usize,
        /// Rows read.
        num_rows: usize,
        /// The largest share allowed.
        limit: f64,
        /// The reasons with their rows, one a line.
        reasons: String,
    },
    /// Evaluation data named twice.
    #[error(
        "Cannot specify `val_size` if `eval_dataset` is not None: one of them names the \
         evaluation data"
    )]
    TwoEvaluationSets,
    /// The evaluation part leaves nothing to train on, or the other way around.
    #[error(
        "val_size {val_size} does not divide {num_rows} rows in two; \
         give a fraction below 1 or a number of rows below {num_rows}"
    )]
    ValSize {
        /// What was asked for.
        val_size: f64,
        /// Rows there are.
        num_rows: usize,
    },
}
