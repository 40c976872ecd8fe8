//! What can be wrong with a training configuration.

use std::path::PathBuf;

use super::super::{DataError, DeepSpeedError};

/// Everything refused before a run, naming the key and what to do.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A configuration file can not be read.
    #[error("cannot read {path:?}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A YAML file is not a list of `key: value`.
    #[error("{path:?} is not valid YAML: {source}")]
    Yaml {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_norway::Error,
    },
    /// A file is not UTF-8.
    #[error(transparent)]
    Encoding(#[from] DataError),
    /// A JSON file is not an object.
    #[error("{path:?} is not valid JSON: {source}")]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// An argument is neither a file, nor `key=value`, nor a flag.
    #[error(
        "unexpected argument \"{argument}\": give a YAML or JSON file, key=value, or --key value \
         (lists are written with commas and no spaces: a,b)"
    )]
    UnexpectedArgument {
        /// The argument.
        argument: String,
    },
    /// Keys that neither LLaMA-Factory nor infold knows.
    #[error("Some keys are not used by the HfArgumentParser: {}", .keys.join("; "))]
    UnknownKeys {
        /// Each with where it stands and the nearest known key.
        keys: Vec<String>,
    },
    /// A value is of another type or out of range.
    #[error("`{key}` must be {wanted}, found {found} ({origin})")]
    InvalidValue {
        /// The key.
        key: String,
        /// What it may be.
        wanted: String,
        /// What it is.
        found: String,
        /// The file, or the command line.
        origin: String,
    },
    /// A key asks for something that is not built.
    #[error("`{key}: {value}` is not built; {advice} ({origin})")]
    NotBuilt {
        /// The key.
        key: String,
        /// Its value.
        value: String,
        /// What to do.
        advice: &'static str,
        /// The file, or the command line.
        origin: String,
    },
    /// A key without which there is nothing to do.
    #[error("Please provide `{key}`: {advice}")]
    Missing {
        /// The key.
        key: &'static str,
        /// What it is.
        advice: &'static str,
    },
    /// Keys that exclude each other.
    #[error("{what}")]
    Conflict {
        /// Which, and what to do.
        what: String,
    },
    /// The DeepSpeed configuration is wrong or does not fit.
    #[error(transparent)]
    DeepSpeed(#[from] DeepSpeedError),
}
