//! What the columns of a file say about its format, and about mistakes in its description.

use serde_json::{Map, Value};

use super::file::Row;
use super::info::{DatasetSpec, Formatting};

/// Rows looked at.
const SAMPLE: usize = 100;

/// Tells the format of a file that was named without `dataset_info.json` from its first rows.
pub(super) fn guess_format(spec: &mut DatasetSpec, rows: &[Row]) {
    let Some(row) = first_row(rows) else {
        return;
    };
    let turns = ["messages", "conversations", "conversation"]
        .into_iter()
        .find(|key| row.contains_key(*key));
    if let Some(key) = turns {
        let first = row.get(key).and_then(|turns| turns.get(0));
        let has_role = first.is_some_and(|turn| turn.get("role").is_some());
        spec.formatting = if has_role || key == "messages" {
            Formatting::Openai
        } else {
            Formatting::Sharegpt
        };
        spec.columns = spec.formatting.default_columns();
        spec.columns.messages = Some(key.to_owned());
        spec.tags = spec.formatting.default_tags();
    }
    let has = |key: &str| {
        sample(rows)
            .any(|row| row.contains_key(key))
            .then(|| key.to_owned())
    };
    spec.columns.system = has("system");
    spec.columns.tools = has("tools");
    spec.columns.history = has("history");
}

/// Warns of columns with content that the description does not mention.
pub(super) fn ignored_columns(spec: &DatasetSpec, rows: &[Row]) -> Vec<String> {
    let columns = &spec.columns;
    let unread = |part: &str, column: &Option<String>| {
        let filled = |row: &Map<String, Value>| match row.get(part) {
            None | Some(Value::Null) => false,
            Some(Value::String(text)) => !text.is_empty(),
            Some(Value::Array(items)) => !items.is_empty(),
            Some(_) => true,
        };
        (column.is_none() && sample(rows).any(filled)).then(|| {
            format!(
                "the rows have a `{part}` that is not read; to read it, name all columns in \
                 dataset_info.json, with \"{part}\": \"{part}\""
            )
        })
    };
    [
        unread("system", &columns.system),
        unread("tools", &columns.tools),
        match spec.formatting {
            Formatting::Alpaca => unread("history", &columns.history),
            Formatting::Sharegpt | Formatting::Openai => None,
        },
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Returns the columns of the first row, for an error text.
pub(super) fn columns_of(rows: &[Row]) -> String {
    match first_row(rows) {
        Some(row) => row.keys().cloned().collect::<Vec<_>>().join(", "),
        None => "no columns".to_owned(),
    }
}

/// Returns the columns that the description reads, for an error text.
pub(super) fn wanted_columns(spec: &DatasetSpec) -> String {
    let columns = &spec.columns;
    let named: Vec<&str> = match spec.formatting {
        Formatting::Alpaca => [&columns.prompt, &columns.query, &columns.response]
            .into_iter()
            .filter_map(Option::as_deref)
            .collect(),
        Formatting::Sharegpt | Formatting::Openai => {
            let tags = [spec.tags.role.as_str(), spec.tags.content.as_str()];
            columns
                .messages
                .as_deref()
                .into_iter()
                .chain(tags)
                .collect()
        }
    };
    format!("{} ({})", named.join(", "), spec.formatting.name())
}

fn sample(rows: &[Row]) -> impl Iterator<Item = &Map<String, Value>> {
    rows.iter()
        .take(SAMPLE)
        .filter_map(|row| row.content.as_ref().ok())
}

fn first_row(rows: &[Row]) -> Option<&Map<String, Value>> {
    rows.iter().find_map(|row| row.content.as_ref().ok())
}
