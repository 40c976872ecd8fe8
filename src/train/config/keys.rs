//! Every key of LLaMA-Factory (0.9.2 to 0.9.5) and of Hugging Face's `TrainingArguments`, and what
//! becomes of it here.
//!
//! A key that changes what is learned is either read or refused; one that only steers Python,
//! another stage or another program is accepted with a note.

use crate::text::likely;

use super::settings::{Setting, Settings, as_bool, as_f64};
use super::{ConfigError, key_table};

/// Returns whether a key takes several values on the command line.
pub(super) fn is_list(key: &str) -> bool {
    key_table::LISTS.contains(&key)
}

/// Returns whether a key is in any of the tables.
pub(in crate::train) fn is_known(key: &str) -> bool {
    known_keys().any(|known| known == key)
}

fn known_keys() -> impl Iterator<Item = &'static str> {
    let noted = key_table::NOTED.iter().flat_map(|(_, keys)| *keys);
    let not_built = key_table::NOT_BUILT.iter().map(|(key, ..)| key);
    let renamed = key_table::RENAMED.iter().map(|(old, _)| old);
    key_table::READ
        .iter()
        .chain(noted)
        .chain(not_built)
        .chain(renamed)
        .copied()
}

/// Checks all keys, moves renamed ones, and returns the notes on those that have no effect.
///
/// # Errors
/// [`ConfigError::UnknownKeys`], or [`ConfigError::NotBuilt`] for a value that asks for something
/// that infold does not do.
pub(super) fn check_keys(settings: &mut Settings) -> Result<Vec<String>, ConfigError> {
    for (old, new) in key_table::RENAMED {
        if let Some(setting) = settings.remove(old)
            && !settings.has(new)
        {
            settings.set((*new).to_owned(), setting);
        }
    }
    let unknown: Vec<String> = settings
        .iter()
        .filter(|(key, _)| !is_known(key))
        .map(|(key, setting)| unknown(key, setting))
        .collect();
    if !unknown.is_empty() {
        return Err(ConfigError::UnknownKeys { keys: unknown });
    }
    for (key, off, advice) in key_table::NOT_BUILT {
        if let Some((_, setting)) = settings.iter().find(|(name, _)| name == key)
            && settings.has(key)
            && !is_off(setting, off)
        {
            return Err(ConfigError::NotBuilt {
                key: (*key).to_owned(),
                value: plain(setting),
                advice,
                origin: setting.origin.clone(),
            });
        }
    }
    Ok(notes(settings))
}

fn unknown(key: &str, setting: &Setting) -> String {
    let origin = &setting.origin;
    match likely(key, known_keys()) {
        Some(near) => format!("`{key}` ({origin}); did you mean `{near}`?"),
        None => format!("`{key}` ({origin})"),
    }
}

fn plain(setting: &Setting) -> String {
    match &setting.value {
        serde_json::Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// Returns whether a value asks for nothing: it is one of `off`, or false or zero where `off` says
/// "false" or "0".
fn is_off(setting: &Setting, off: &[&str]) -> bool {
    let text = plain(setting).trim().to_ascii_lowercase();
    let spelled = |word: &&str| match *word {
        "false" => as_bool(&setting.value) == Some(false),
        "true" => as_bool(&setting.value) == Some(true),
        "0" => as_f64(&setting.value) == Some(0.0),
        word => word == text,
    };
    text.is_empty() || off.iter().any(spelled)
}

fn notes(settings: &Settings) -> Vec<String> {
    let mut notes = Vec::new();
    for (reason, keys) in key_table::NOTED {
        let given: Vec<String> = keys
            .iter()
            .filter(|key| settings.has(key))
            .map(|key| format!("`{key}`"))
            .collect();
        if !given.is_empty() {
            notes.push(format!("{}: {reason}", given.join(", ")));
        }
    }
    notes
}
