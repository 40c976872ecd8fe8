//! Rows out of files: JSON, JSON lines, CSV, Parquet, text.
//!
//! A row is a JSON object with the number that a person finds it by: its position in a JSON list
//! or Parquet file, its line in JSON lines and text, its record in CSV (the header is none). Knows
//! nothing of conversations.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::DataError;
use super::encoding::decode_utf8;

/// A format of files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FileType {
    Json,
    Csv,
    Parquet,
    Text,
}

/// Where a row comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct RowId {
    /// Index into the files of the data set.
    pub file: usize,
    /// The row of the file, from 1.
    pub row: usize,
}

/// One row, or why the file's own format makes none of it.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) id: RowId,
    pub(super) content: Result<Map<String, Value>, String>,
}

/// The files of a data set and all their rows, in order.
#[derive(Debug)]
pub(super) struct Rows {
    pub(super) files: Vec<PathBuf>,
    pub(super) rows: Vec<Row>,
}

/// Reads the rows of `path`: one file, or all files of a directory in order of their names.
///
/// # Errors
/// [`DataError`] when there is no such file, its type is not read, its bytes are not UTF-8, or the
/// whole file is not of its format.
pub(super) fn read_rows(name: &str, path: &Path) -> Result<Rows, DataError> {
    let files = files_of(name, path)?;
    let file_type = common_type(path, &files)?;
    let mut rows = Vec::new();
    for (file, path) in files.iter().enumerate() {
        let contents = match file_type {
            FileType::Json => read_json(path)?,
            FileType::Csv => read_csv(path)?,
            FileType::Parquet => super::parquet_file::read_parquet(path)?,
            FileType::Text => read_text(path)?,
        };
        rows.extend(contents.into_iter().map(|(row, content)| Row {
            id: RowId { file, row },
            content,
        }));
    }
    Ok(Rows { files, rows })
}

/// Rows with their numbers.
pub(super) type Numbered = Vec<(usize, Result<Map<String, Value>, String>)>;

fn files_of(name: &str, path: &Path) -> Result<Vec<PathBuf>, DataError> {
    if path.is_file() {
        return Ok(vec![path.to_owned()]);
    }
    if !path.is_dir() {
        return Err(DataError::FileNotFound {
            name: name.to_owned(),
            path: super::info::absolute(path),
        });
    }
    let read_error = |source| DataError::Read {
        path: path.to_owned(),
        source,
    };
    let mut files = Vec::new();
    for entry in fs::read_dir(path).map_err(read_error)? {
        let entry = entry.map_err(read_error)?;
        let hidden = entry.file_name().to_string_lossy().starts_with('.');
        if !hidden && entry.path().is_file() {
            files.push(entry.path());
        }
    }
    // LLaMA-Factory takes the order of the file system, which differs between machines.
    files.sort();
    Ok(files)
}

fn common_type(path: &Path, files: &[PathBuf]) -> Result<FileType, DataError> {
    let mut common = None;
    for file in files {
        let file_type = file_type(file)?;
        if common.is_some_and(|common| common != file_type) {
            return Err(mixed(path, files));
        }
        common = Some(file_type);
    }
    common.ok_or_else(|| mixed(path, files))
}

fn mixed(path: &Path, files: &[PathBuf]) -> DataError {
    let mut names: Vec<String> = files.iter().map(|file| extension(file)).collect();
    names.sort();
    names.dedup();
    DataError::MixedFileTypes {
        path: path.to_owned(),
        found: if names.is_empty() {
            "no file".to_owned()
        } else {
            names.join(", ")
        },
    }
}

fn extension(path: &Path) -> String {
    let extension = path.extension().unwrap_or_default();
    extension.to_string_lossy().to_ascii_lowercase()
}

fn file_type(path: &Path) -> Result<FileType, DataError> {
    let advice = match extension(path).as_str() {
        "json" | "jsonl" => return Ok(FileType::Json),
        "csv" => return Ok(FileType::Csv),
        "parquet" => return Ok(FileType::Parquet),
        "txt" => return Ok(FileType::Text),
        "arrow" => "; save the data set as Parquet (`Dataset.to_parquet`)",
        "xlsx" | "xls" => "; save the sheet as CSV in UTF-8",
        _ => "",
    };
    Err(DataError::FileType {
        path: path.to_owned(),
        advice: advice.to_owned(),
    })
}

fn read_utf8(path: &Path) -> Result<String, DataError> {
    let bytes = fs::read(path).map_err(|source| DataError::Read {
        path: path.to_owned(),
        source,
    })?;
    decode_utf8(path, bytes)
}

/// Reads a list of rows, or one row a line, whatever the extension says.
fn read_json(path: &Path) -> Result<Numbered, DataError> {
    let text = read_utf8(path)?;
    match text.trim_start().as_bytes().first() {
        None => Ok(Vec::new()),
        Some(b'[') => read_json_list(path, &text),
        Some(_) => match read_json_lines(&text) {
            Some(rows) => Ok(rows),
            None => whole_value(path, &text),
        },
    }
}

fn read_json_list(path: &Path, text: &str) -> Result<Numbered, DataError> {
    let values: Vec<Value> = serde_json::from_str(text).map_err(|source| DataError::Json {
        path: path.to_owned(),
        advice: if source.is_eof() {
            "; the file ends early: is it complete?"
        } else {
            "; common causes are a comma too many or too few, and quotes inside a text without \\"
        },
        source,
    })?;
    Ok(values
        .into_iter()
        .enumerate()
        .map(|(index, value)| (index + 1, as_row(value)))
        .collect())
}

/// Returns the rows of JSON lines, or nothing when not a single line is JSON.
fn read_json_lines(text: &str) -> Option<Numbered> {
    let rows: Numbered = text
        .lines()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty())
        .map(|(index, line)| {
            let row = match serde_json::from_str(line) {
                Ok(value) => as_row(value),
                Err(error) => Err(format!("the line is not valid JSON ({error})")),
            };
            (index + 1, row)
        })
        .collect();
    rows.iter().any(|(_, row)| row.is_ok()).then_some(rows)
}

/// A file that is neither a list nor lines: one object over several lines, or an error.
fn whole_value(path: &Path, text: &str) -> Result<Numbered, DataError> {
    match serde_json::from_str::<Value>(text) {
        Ok(value) => Err(DataError::NotRows {
            path: path.to_owned(),
            found: kind(&value),
        }),
        Err(source) => Err(DataError::Json {
            path: path.to_owned(),
            source,
            advice: "; a JSON file holds a list of rows, or one row a line",
        }),
    }
}

fn as_row(value: Value) -> Result<Map<String, Value>, String> {
    match value {
        Value::Object(row) => Ok(row),
        other => Err(format!("the row is {} instead of an object", kind(&other))),
    }
}

/// Returns what a value is, with its article.
pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// Reads CSV with a header; an empty field is absent, as pandas reads it.
fn read_csv(path: &Path) -> Result<Numbered, DataError> {
    let text = read_utf8(path)?;
    let mut reader = csv::Reader::from_reader(text.as_bytes());
    let header = reader
        .headers()
        .map_err(|source| DataError::CsvHeader {
            path: path.to_owned(),
            source,
        })?
        .clone();
    let rows = reader.into_records().enumerate().map(|(index, record)| {
        let row = record.map_err(|error| csv_reason(&error)).map(|record| {
            header
                .iter()
                .zip(&record)
                .map(|(name, field)| (name.trim().to_owned(), csv_value(field)))
                .collect()
        });
        (index + 1, row)
    });
    Ok(rows.collect())
}

fn csv_value(field: &str) -> Value {
    if field.is_empty() {
        Value::Null
    } else {
        Value::String(field.to_owned())
    }
}

fn csv_reason(error: &csv::Error) -> String {
    match error.kind() {
        csv::ErrorKind::UnequalLengths {
            expected_len, len, ..
        } => format!(
            "the record has {len} fields and the header {expected_len}; a text that holds commas \
             needs quotes"
        ),
        _ => format!("the record is not CSV ({error})"),
    }
}

/// Reads each line as the column `text`.
fn read_text(path: &Path) -> Result<Numbered, DataError> {
    let text = read_utf8(path)?;
    let row = |line: &str| Map::from_iter([("text".to_owned(), Value::String(line.to_owned()))]);
    Ok(text
        .lines()
        .enumerate()
        .map(|(index, line)| (index + 1, Ok(row(line))))
        .collect())
}
