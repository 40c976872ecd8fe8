//! Keys with values as they were given, and typed access to them.
//!
//! A value keeps the type of its file or is a string of the command line; both are read alike, so
//! `1e-4` may be either, and `True`, `yes` and `1` are the same. `null` counts as not given.

use std::collections::BTreeMap;

use serde_json::Value;

use super::ConfigError;

/// One value and where it was given.
#[derive(Debug, Clone)]
pub(super) struct Setting {
    pub(super) value: Value,
    pub(super) origin: String,
}

/// All that was given, the last of duplicates.
#[derive(Debug, Clone, Default)]
pub(in crate::train) struct Settings {
    entries: BTreeMap<String, Setting>,
}

impl Settings {
    /// Sets a key, over what it was.
    pub(super) fn set(&mut self, key: String, setting: Setting) {
        self.entries.insert(key, setting);
    }

    /// Removes a key.
    pub(super) fn remove(&mut self, key: &str) -> Option<Setting> {
        self.entries.remove(key)
    }

    /// Returns all keys with their values.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&String, &Setting)> {
        self.entries.iter()
    }

    fn get(&self, key: &str) -> Option<&Setting> {
        self.entries
            .get(key)
            .filter(|setting| !is_null(&setting.value))
    }

    /// Returns whether a key was given.
    pub(super) fn has(&self, key: &str) -> bool {
        self.get(key).is_some()
    }

    /// Returns whether a key was given, be it as null.
    pub(super) fn is_given(&self, key: &str) -> bool {
        self.entries.contains_key(key)
    }

    /// Returns the value of a key as it was given.
    pub(super) fn raw(&self, key: &str) -> Option<&Value> {
        self.get(key).map(|setting| &setting.value)
    }

    /// Returns where a key was given: a file or a flag.
    pub(super) fn origin(&self, key: &str) -> String {
        let setting = self.entries.get(key);
        setting.map_or_else(String::new, |setting| setting.origin.clone())
    }

    /// Returns the error of a key whose value is not `wanted`.
    pub(super) fn invalid(&self, key: &str, wanted: impl Into<String>) -> ConfigError {
        let setting = self.entries.get(key);
        let text = |setting: &Setting| setting.value.to_string();
        ConfigError::InvalidValue {
            key: key.to_owned(),
            wanted: wanted.into(),
            found: setting.map_or_else(|| "nothing".to_owned(), text),
            origin: self.origin(key),
        }
    }

    fn typed<T>(
        &self,
        key: &str,
        wanted: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<T>, ConfigError> {
        match self.get(key) {
            None => Ok(None),
            Some(setting) => match read(&setting.value) {
                Some(value) => Ok(Some(value)),
                None => Err(self.invalid(key, wanted)),
            },
        }
    }

    /// Returns a truth value.
    pub(super) fn bool(&self, key: &str, default: bool) -> Result<bool, ConfigError> {
        Ok(self.opt_bool(key)?.unwrap_or(default))
    }

    /// Returns a truth value, if given.
    pub(super) fn opt_bool(&self, key: &str) -> Result<Option<bool>, ConfigError> {
        self.typed(key, "true or false", as_bool)
    }

    /// Returns a number, if given.
    pub(super) fn opt_f64(&self, key: &str) -> Result<Option<f64>, ConfigError> {
        self.typed(key, "a number", as_f64)
    }

    /// Returns a number within `range`.
    pub(super) fn f64_in(
        &self,
        key: &str,
        default: f64,
        range: std::ops::RangeInclusive<f64>,
    ) -> Result<f64, ConfigError> {
        match self.opt_f64(key)? {
            None => Ok(default),
            Some(value) if range.contains(&value) => Ok(value),
            Some(_) => {
                let (low, high) = (range.start(), range.end());
                Err(self.invalid(
                    key,
                    if high.is_finite() {
                        format!("a number from {low} to {high}")
                    } else {
                        format!("a number of at least {low}")
                    },
                ))
            }
        }
    }

    /// Returns a whole number of at least `min`, if given.
    pub(super) fn opt_whole(&self, key: &str, min: u64) -> Result<Option<u64>, ConfigError> {
        let wanted = format!("a whole number of at least {min}");
        let read = |value: &Value| {
            as_f64(value)
                .filter(|n| n.fract() == 0.0 && *n >= min as f64 && *n < 9e15)
                .map(|n| n as u64)
        };
        self.typed(key, &wanted, read)
    }

    /// Returns a whole number of at least `min`.
    pub(super) fn whole(&self, key: &str, default: u64, min: u64) -> Result<u64, ConfigError> {
        Ok(self.opt_whole(key, min)?.unwrap_or(default))
    }

    /// Returns a text, if given and not empty.
    pub(super) fn opt_text(&self, key: &str) -> Result<Option<String>, ConfigError> {
        let text = self.typed(key, "one text", as_text)?;
        Ok(text.filter(|text| !text.is_empty()))
    }

    /// Returns a text as it is, if given: it may be empty, and spaces around it stay.
    pub(super) fn opt_whole_text(&self, key: &str) -> Result<Option<String>, ConfigError> {
        self.typed(key, "one text", |value| match value {
            Value::String(text) => Some(text.clone()),
            other => as_text(other),
        })
    }

    /// Returns the items of a list: one text with commas, or several; empty when not given.
    pub(super) fn list(&self, key: &str) -> Result<Vec<String>, ConfigError> {
        let items = self.typed(key, "a list with commas and no spaces: a,b", |value| {
            let texts = match value {
                Value::Array(items) => items.iter().map(as_text).collect::<Option<Vec<_>>>()?,
                other => vec![as_text(other)?],
            };
            let parts = texts.iter().flat_map(|text| text.split(','));
            let items = parts.map(|item| item.trim().to_owned());
            Some(items.filter(|item| !item.is_empty()).collect())
        })?;
        Ok(items.unwrap_or_default())
    }

    /// Returns the choice whose name was given.
    pub(super) fn choice<T: Copy>(
        &self,
        key: &str,
        default: T,
        choices: &[(&str, T)],
    ) -> Result<T, ConfigError> {
        let Some(text) = self.opt_text(key)? else {
            return Ok(default);
        };
        let lower = text.to_ascii_lowercase();
        match choices.iter().find(|(name, _)| *name == lower) {
            Some((_, choice)) => Ok(*choice),
            None => {
                let mut names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
                names.dedup();
                Err(self.invalid(key, format!("one of {}", names.join(", "))))
            }
        }
    }
}

/// Returns whether a value stands for nothing given.
fn is_null(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => matches!(text.trim(), "null" | "None" | "~"),
        _ => false,
    }
}

pub(super) fn as_bool(value: &Value) -> Option<bool> {
    match value {
        Value::Bool(value) => Some(*value),
        Value::Number(number) => match number.as_u64() {
            Some(0) => Some(false),
            Some(1) => Some(true),
            _ => None,
        },
        Value::String(text) => match text.trim().to_ascii_lowercase().as_str() {
            "true" | "t" | "yes" | "y" | "on" | "1" => Some(true),
            "false" | "f" | "no" | "n" | "off" | "0" => Some(false),
            _ => None,
        },
        _ => None,
    }
}

pub(super) fn as_f64(value: &Value) -> Option<f64> {
    match value {
        Value::Number(number) => number.as_f64(),
        Value::String(text) => text.trim().replace('_', "").parse().ok(),
        _ => None,
    }
    .filter(|number: &f64| number.is_finite())
}

fn as_text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.trim().to_owned()),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(value) => Some(value.to_string()),
        _ => None,
    }
}
