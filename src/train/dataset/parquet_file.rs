//! Rows out of a Parquet file, by its record interface.

use std::fs::File;
use std::path::Path;

use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use serde_json::{Map, Value};

use super::DataError;
use super::file::Numbered;

/// Reads all rows of a Parquet file.
///
/// # Errors
/// [`DataError`] when the file can not be opened or decoded.
pub(super) fn read_parquet(path: &Path) -> Result<Numbered, DataError> {
    let file = File::open(path).map_err(|source| DataError::Read {
        path: path.to_owned(),
        source,
    })?;
    let rows = read_all(file).map_err(|source| DataError::Parquet {
        path: path.to_owned(),
        source,
    })?;
    let numbered = rows.into_iter().enumerate();
    Ok(numbered.map(|(index, row)| (index + 1, Ok(row))).collect())
}

fn read_all(file: File) -> Result<Vec<Map<String, Value>>, ParquetError> {
    let reader = SerializedFileReader::new(file)?;
    let mut rows = Vec::new();
    for row in reader.get_row_iter(None)? {
        let columns = row?.into_columns();
        let values = columns.into_iter().map(|(name, field)| (name, field.to_json_value()));
        rows.push(values.collect());
    }
    Ok(rows)
}
