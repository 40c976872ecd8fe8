//! From arguments to [`Settings`]: YAML and JSON files, `key=value`, `--key value`.
//!
//! As in LLaMA-Factory and Hugging Face's argument parser: underscores or dashes, the last of
//! duplicates wins, a flag without a value is true, `--no_key` is false, and what stands on the
//! command line goes over files wherever it stands.

use std::fs;
use std::path::Path;

use serde_json::{Map, Value};

use super::super::dataset::decode_utf8;
use super::settings::{Setting, Settings};
use super::{ConfigError, keys};

/// Reads all arguments of a verb.
///
/// # Errors
/// [`ConfigError`] when a file can not be read or an argument is of no known form.
pub(in crate::train) fn parse_arguments(arguments: &[String]) -> Result<Settings, ConfigError> {
    let mut files = Settings::default();
    let mut direct = Vec::new();
    let mut rest = arguments;
    while let Some((argument, after)) = rest.split_first() {
        rest = after;
        if let Some(flag) = argument.strip_prefix("--") {
            let values;
            (values, rest) = split_values(flag, rest);
            direct.push(flag_setting(flag, values));
        } else if let Some((key, value)) = key_value(argument) {
            direct.push((key, Value::String(value.to_owned()), argument.clone()));
        } else if is_config_file(argument) {
            read_file(Path::new(argument), &mut files)?;
        } else {
            return Err(ConfigError::UnexpectedArgument {
                argument: argument.clone(),
            });
        }
    }
    for (key, value, origin) in direct {
        files.set(key, Setting { value, origin });
    }
    Ok(files)
}

/// Returns the values that follow a flag: those up to the next flag, one unless it is a list.
fn split_values<'a>(flag: &str, rest: &'a [String]) -> (&'a [String], &'a [String]) {
    if flag.contains('=') {
        return (&[], rest);
    }
    let count = rest
        .iter()
        .take_while(|argument| !argument.starts_with("--"))
        .count();
    let most = if keys::is_list(&canonical(flag)) {
        count
    } else {
        count.min(1)
    };
    rest.split_at(most)
}

fn flag_setting(flag: &str, values: &[String]) -> (String, Value, String) {
    let origin = format!("--{flag}");
    if let Some((key, value)) = flag.split_once('=') {
        return (canonical(key), Value::String(value.to_owned()), origin);
    }
    let key = canonical(flag);
    match values {
        [] => match key.strip_prefix("no_") {
            Some(positive) if !keys::is_known(&key) && keys::is_known(positive) => {
                (positive.to_owned(), Value::Bool(false), origin)
            }
            _ => (key, Value::Bool(true), origin),
        },
        [value] => (key, Value::String(value.clone()), origin),
        several => (
            key,
            several.iter().cloned().map(Value::String).collect(),
            origin,
        ),
    }
}

fn canonical(key: &str) -> String {
    key.trim().replace('-', "_")
}

/// Splits `key=value`, whose key is a plain name: a path may hold `=` too.
fn key_value(argument: &str) -> Option<(String, &str)> {
    let (key, value) = argument.split_once('=')?;
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    let is_key = !key.is_empty() && key.chars().all(plain);
    is_key.then(|| (canonical(key), value))
}

fn is_config_file(argument: &str) -> bool {
    let extension = Path::new(argument).extension();
    extension.is_some_and(|extension| {
        ["yaml", "yml", "json"]
            .iter()
            .any(|known| extension.eq_ignore_ascii_case(known))
    })
}

fn read_file(path: &Path, settings: &mut Settings) -> Result<(), ConfigError> {
    let bytes = fs::read(path).map_err(|source| ConfigError::Read {
        path: path.to_owned(),
        source,
    })?;
    let text = decode_utf8(path, bytes)?;
    let is_json = path
        .extension()
        .is_some_and(|extension| extension.eq_ignore_ascii_case("json"));
    let entries: Map<String, Value> = if is_json {
        serde_json::from_str(&text).map_err(|source| ConfigError::Json {
            path: path.to_owned(),
            source,
        })?
    } else {
        serde_norway::from_str(&text).map_err(|source| ConfigError::Yaml {
            path: path.to_owned(),
            source,
        })?
    };
    for (key, value) in entries {
        let origin = path.display().to_string();
        settings.set(canonical(&key), Setting { value, origin });
    }
    Ok(())
}
