//! Values written as Python writes them: `str()`, `repr()` and `json.dumps()`.
//!
//! A template can build a value that is small in memory and endless on paper (a list that holds
//! itself twice, thirty times over), so both the text and the nesting are limited.

use std::fmt::Write;

use minijinja::value::{Tuple, ValueKind};
use minijinja::{Error, ErrorKind, Value};

/// Most bytes one value may become.
pub(super) const MAX_TEXT_BYTES: usize = 32 << 20;
/// Deepest nesting of lists and maps that is written.
const MAX_DEPTH: usize = 100;

/// Options of `json.dumps`.
#[derive(Debug, Clone)]
pub(in crate::text) struct JsonStyle {
    /// Text put before each level, or everything on one line.
    pub(in crate::text) indent: Option<String>,
    /// Between items.
    pub(in crate::text) item_separator: String,
    /// Between key and value.
    pub(in crate::text) key_separator: String,
    /// Keys in code point order.
    pub(in crate::text) sort_keys: bool,
    /// Non-ASCII characters as `\uXXXX`.
    pub(in crate::text) ensure_ascii: bool,
}

/// Returns `str(value)`.
pub(in crate::text) fn to_str(value: &Value) -> Result<String, Error> {
    if let Some(text) = value.as_str() {
        return Ok(text.to_owned());
    }
    if value.is_undefined() {
        return Ok(String::new());
    }
    let mut out = String::new();
    write_repr(&mut out, value, 0)?;
    Ok(out)
}

/// Returns `json.dumps(value, …)`.
pub(in crate::text) fn to_json(value: &Value, style: &JsonStyle) -> Result<String, Error> {
    let mut out = String::new();
    JsonWriter {
        out: &mut out,
        style,
    }
    .value(value, 0)?;
    Ok(out)
}

fn check_limits(out: &str, depth: usize) -> Result<(), Error> {
    if out.len() > MAX_TEXT_BYTES || depth > MAX_DEPTH {
        return Err(Error::new(
            ErrorKind::OutOfFuel,
            format!("a value has more than {MAX_DEPTH} levels or {MAX_TEXT_BYTES} bytes of text"),
        ));
    }
    Ok(())
}

fn write_repr(out: &mut String, value: &Value, depth: usize) -> Result<(), Error> {
    check_limits(out, depth)?;
    match value.kind() {
        ValueKind::Undefined => out.push_str("Undefined"),
        ValueKind::None => out.push_str("None"),
        ValueKind::String => write_str_repr(out, value.as_str().unwrap_or("")),
        ValueKind::Number => out.push_str(&number(value, ["nan", "inf", "-inf"])),
        ValueKind::Seq | ValueKind::Iterable => {
            let tuple = value.downcast_object_ref::<Tuple>();
            out.push(if tuple.is_some() { '(' } else { '[' });
            for (index, item) in value.try_iter()?.checked().enumerate() {
                if index > 0 {
                    out.push_str(", ");
                }
                write_repr(out, &item?, depth + 1)?;
            }
            if tuple.is_some_and(|tuple| tuple.len() == 1) {
                out.push(',');
            }
            out.push(if tuple.is_some() { ')' } else { ']' });
        }
        ValueKind::Map => {
            out.push('{');
            for (index, key) in value.try_iter()?.checked().enumerate() {
                let key = key?;
                if index > 0 {
                    out.push_str(", ");
                }
                write_repr(out, &key, depth + 1)?;
                out.push_str(": ");
                write_repr(out, &value.get_item(&key)?, depth + 1)?;
            }
            out.push('}');
        }
        // Booleans print as Python's; objects of the engine have no counterpart to imitate.
        _ => out.push_str(&value.to_string()),
    }
    Ok(())
}

/// Writes a string literal as Python would: in double quotes only if it has single ones alone.
fn write_str_repr(out: &mut String, text: &str) {
    let quote = if text.contains('\'') && !text.contains('"') {
        '"'
    } else {
        '\''
    };
    out.push(quote);
    for character in text.chars() {
        match character {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            _ if character == quote => {
                out.push('\\');
                out.push(character);
            }
            _ if is_printable(character) => out.push(character),
            _ => push_escaped(out, character),
        }
    }
    out.push(quote);
}

/// Returns whether Python's `repr` keeps the character.
fn is_printable(character: char) -> bool {
    if character.is_ascii() {
        return !character.is_ascii_control();
    }
    // Behind another character only what is unprintable is escaped, not combining marks.
    let text = ['a', character].iter().collect::<String>();
    text.escape_debug().nth(1) != Some('\\')
}

fn push_escaped(out: &mut String, character: char) {
    let code = u32::from(character);
    let written = match code {
        0..=0xFF => write!(out, "\\x{code:02x}"),
        0x100..=0xFFFF => write!(out, "\\u{code:04x}"),
        _ => write!(out, "\\U{code:08x}"),
    };
    debug_assert!(written.is_ok(), "writing to a String cannot fail");
}

/// Writes a number as Python does; `names` are those of not-a-number and the infinities.
fn number(value: &Value, names: [&str; 3]) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    let Ok(float) = f64::try_from(value.clone()) else {
        return value.to_string();
    };
    if float.is_nan() {
        return names[0].to_owned();
    }
    if float.is_infinite() {
        return names[if float > 0.0 { 1 } else { 2 }].to_owned();
    }
    float_repr(float)
}

/// Returns `repr(float)` of a finite number: the shortest digits that read back the same, with an
/// exponent below 1e-4 and from 1e16 on.
pub(super) fn float_repr(float: f64) -> String {
    let scientific = format!("{float:e}");
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        let mut fixed = float.to_string();
        if !fixed.contains('.') {
            fixed.push_str(".0");
        }
        return fixed;
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{mantissa}e{sign}{:02}", exponent.abs())
}

struct JsonWriter<'a> {
    out: &'a mut String,
    style: &'a JsonStyle,
}

impl JsonWriter<'_> {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        check_limits(self.out, depth)?;
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self
                .out
                .push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => {
                let text = number(value, ["NaN", "Infinity", "-Infinity"]);
                self.out.push_str(&text);
            }
            ValueKind::String => self.string(value.as_str().unwrap_or("")),
            ValueKind::Seq => self.items(value, depth)?,
            ValueKind::Map => self.map(value, depth)?,
            kind => {
                return Err(Error::new(
                    ErrorKind::InvalidOperation,
                    format!("value of type {kind} is not JSON serializable"),
                ));
            }
        }
        Ok(())
    }

    fn items(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        self.out.push('[');
        let mut empty = true;
        for item in value.try_iter()?.checked() {
            self.separate(empty, depth + 1);
            self.value(&item?, depth + 1)?;
            empty = false;
        }
        self.close(']', empty, depth);
        Ok(())
    }

    fn map(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        self.out.push('{');
        let mut keys = value.try_iter()?.checked().collect::<Result<Vec<_>, _>>()?;
        if self.style.sort_keys {
            keys.sort();
        }
        let mut empty = true;
        for key in keys {
            self.separate(empty, depth + 1);
            self.key(&key)?;
            self.out.push_str(&self.style.key_separator);
            self.value(&value.get_item(&key)?, depth + 1)?;
            empty = false;
        }
        self.close('}', empty, depth);
        Ok(())
    }

    fn key(&mut self, key: &Value) -> Result<(), Error> {
        let text = match key.kind() {
            ValueKind::String => key.as_str().unwrap_or("").to_owned(),
            ValueKind::None => "null".to_owned(),
            ValueKind::Bool => key.is_true().to_string(),
            ValueKind::Number => number(key, ["NaN", "Infinity", "-Infinity"]),
            kind => {
                return Err(Error::new(
                    ErrorKind::InvalidOperation,
                    format!("keys must be str, int, float, bool or None, not {kind}"),
                ));
            }
        };
        self.string(&text);
        Ok(())
    }

    fn separate(&mut self, first: bool, depth: usize) {
        if !first {
            self.out.push_str(&self.style.item_separator);
        }
        self.line(depth);
    }

    fn close(&mut self, bracket: char, empty: bool, depth: usize) {
        if !empty {
            self.line(depth);
        }
        self.out.push(bracket);
    }

    /// Begins a line at this depth, where the style has lines.
    fn line(&mut self, depth: usize) {
        if let Some(indent) = &self.style.indent {
            self.out.push('\n');
            for _ in 0..depth {
                self.out.push_str(indent);
            }
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for character in text.chars() {
            match character {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                '\0'..='\u{1f}' => self.unicode_escape(character),
                '\u{7f}'.. if self.style.ensure_ascii => {
                    self.unicode_escape(character);
                }
                _ => self.out.push(character),
            }
        }
        self.out.push('"');
    }

    fn unicode_escape(&mut self, character: char) {
        let mut units = [0; 2];
        for unit in character.encode_utf16(&mut units) {
            let written = write!(self.out, "\\u{unit:04x}");
            debug_assert!(written.is_ok(), "writing to a String cannot fail");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_print_as_python_prints_them() {
        let cases = [
            (1.0, "1.0"),
            (-0.0, "-0.0"),
            (0.1, "0.1"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e300, "1.5e+300"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (1.25e-7, "1.25e-07"),
            (123_456.789, "123456.789"),
        ];
        for (float, want) in cases {
            assert_eq!(float_repr(float), want);
        }
    }

    #[test]
    fn strings_in_containers_are_quoted_as_python_quotes_them() {
        let value = Value::from(vec![
            "it's",
            "\"both' \\",
            "a\n\u{a0}\u{e9}\u{301}\u{1f600}\u{7f}",
        ]);
        assert_eq!(
            to_str(&value).unwrap(),
            "[\"it's\", '\"both\\' \\\\', 'a\\n\\xa0\u{e9}\u{301}\u{1f600}\\x7f']"
        );
    }

    #[test]
    fn endless_text_and_nesting_are_refused() {
        let mut doubled = Value::from("x");
        for _ in 0..60 {
            doubled = Value::from(vec![doubled.clone(), doubled]);
        }
        assert_eq!(to_str(&doubled).unwrap_err().kind(), ErrorKind::OutOfFuel);
        let mut nested = Value::from("x");
        for _ in 0..200 {
            nested = Value::from(vec![nested]);
        }
        assert_eq!(to_str(&nested).unwrap_err().kind(), ErrorKind::OutOfFuel);
    }
}
