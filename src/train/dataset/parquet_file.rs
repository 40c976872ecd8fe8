//! Rows out of a Parquet file, by its record interface.

use std::fs::File;
use std::path::Path;

use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;
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
        rows.push(object(row?.into_columns()));
    }
    Ok(rows)
}

/// Returns a field as JSON; dates and decimals become text.
fn json_value(field: Field) -> Value {
    match field {
        Field::Null => Value::Null,
        Field::Bool(value) => Value::from(value),
        Field::Byte(value) => Value::from(value),
        Field::Short(value) => Value::from(value),
        Field::Int(value) => Value::from(value),
        Field::Long(value) => Value::from(value),
        Field::UByte(value) => Value::from(value),
        Field::UShort(value) => Value::from(value),
        Field::UInt(value) => Value::from(value),
        Field::ULong(value) => Value::from(value),
        Field::Float(value) => Value::from(value),
        Field::Double(value) => Value::from(value),
        Field::Str(value) => Value::from(value),
        Field::Bytes(value) => Value::from(String::from_utf8_lossy(value.data())),
        Field::Group(row) => Value::Object(object(row.into_columns())),
        Field::ListInternal(list) => list.elements().iter().cloned().map(json_value).collect(),
        Field::MapInternal(map) => {
            let entry = |(key, value): &(Field, Field)| {
                let key = match json_value(key.clone()) {
                    Value::String(key) => key,
                    other => other.to_string(),
                };
                (key, json_value(value.clone()))
            };
            map.entries().iter().map(entry).collect()
        }
        other => Value::from(other.to_string()),
    }
}

fn object(columns: Vec<(String, Field)>) -> Map<String, Value> {
    let entry = |(name, field)| (name, json_value(field));
    columns.into_iter().map(entry).collect()
}
