//! Methods of Python's `str` and `dict` that chat templates call.
//!
//! Where `minijinja-contrib` has a method with Python's results it is used; here are those that it
//! lacks, those where Python differs (what counts as whitespace, optional bounds), and those whose
//! result can be far larger than their input and is therefore bounded.

use minijinja::value::{Kwargs, Rest, Tuple, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat;

use super::python::MAX_TEXT_BYTES;

/// Looks a method up for a value; the callback of the engine for methods that it does not know.
pub(super) fn call(
    state: &mut State,
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value, Error> {
    let found = match value.kind() {
        ValueKind::String => string_method(state, value.as_str().unwrap_or(""), method, args)?,
        ValueKind::Map => map_method(value, method, args)?,
        _ => None,
    };
    match found {
        Some(result) => Ok(result),
        None => pycompat::unknown_method_callback(state, value, method, args),
    }
}

/// Returns whether Python's `str.isspace` holds.
pub(super) fn is_space(character: char) -> bool {
    character.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&character)
}

/// Which ends `strip` cleans.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Ends {
    Left,
    Right,
    Both,
}

/// Removes `characters`, or whitespace, from the ends of a text.
pub(super) fn strip<'a>(text: &'a str, characters: Option<&str>, ends: Ends) -> &'a str {
    let matches = |character: char| match characters {
        Some(characters) => characters.contains(character),
        None => is_space(character),
    };
    let text = match ends {
        Ends::Right => text,
        Ends::Left | Ends::Both => text.trim_start_matches(matches),
    };
    match ends {
        Ends::Left => text,
        Ends::Right | Ends::Both => text.trim_end_matches(matches),
    }
}

fn string_method(
    state: &State,
    text: &str,
    method: &str,
    args: &[Value],
) -> Result<Option<Value>, Error> {
    // The work of a method grows with the text, which the engine does not know.
    state.consume_fuel(text.len() as u64 / 64)?;
    let result = match method {
        "strip" => stripped(text, args, Ends::Both)?,
        "lstrip" => stripped(text, args, Ends::Left)?,
        "rstrip" => stripped(text, args, Ends::Right)?,
        "split" => split(text, args, Direction::Forward)?,
        "rsplit" => split(text, args, Direction::Backward)?,
        "splitlines" => split_lines(text, args)?,
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            partition(text, separator, method)?
        }
        "replace" => replace(text, args)?,
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Value::from(text.strip_prefix(prefix).unwrap_or(text))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Value::from(text.strip_suffix(suffix).unwrap_or(text))
        }
        "find" | "rfind" | "index" | "rindex" => find(text, method, args)?,
        "count" => {
            let (needle, start, end) = from_args::<(&str, Option<i64>, Option<i64>)>(args)?;
            let part = char_range(text, start, end).unwrap_or("");
            let count = match needle {
                "" => part.chars().count() + 1,
                _ => part.matches(needle).count(),
            };
            Value::from(count)
        }
        "join" => join(text, args)?,
        "title" => Value::from(title(text)),
        "capitalize" => Value::from(capitalize(text)),
        "swapcase" => Value::from(swap_case(text)),
        "casefold" => Value::from(text.to_lowercase()),
        "isspace" => Value::from(!text.is_empty() && text.chars().all(is_space)),
        "isdecimal" => Value::from(!text.is_empty() && text.chars().all(|c| c.is_ascii_digit())),
        "ljust" | "rjust" | "center" => {
            let (width, fill): (usize, Option<char>) = from_args(args)?;
            Value::from(justify(text, method, width, fill.unwrap_or(' '))?)
        }
        "zfill" => {
            let (width,): (usize,) = from_args(args)?;
            let digits = text.trim_start_matches(['+', '-']);
            let sign = &text[..text.len() - digits.len()];
            let padded = justify(digits, "rjust", width.saturating_sub(sign.len()), '0')?;
            Value::from(format!("{sign}{padded}"))
        }
        "format" if has_huge_width(text) => return Err(too_large()),
        _ => return Ok(None),
    };
    Ok(Some(result))
}

/// Returns whether a `str.format` pattern asks for a width or precision of a million or more.
fn has_huge_width(pattern: &str) -> bool {
    pattern
        .split(|character: char| !character.is_ascii_digit())
        .any(|number| number.trim_start_matches('0').len() > 6)
}

fn map_method(value: &Value, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    if !matches!(method, "keys" | "values" | "items") {
        return Ok(None);
    }
    let () = from_args(args)?;
    // Lists rather than iterators, so that they have a length and can be walked twice.
    let mut list = Vec::with_capacity(value.len().unwrap_or(0));
    for key in value.try_iter()?.checked() {
        let key = key?;
        list.push(match method {
            "keys" => key,
            "values" => value.get_item(&key)?,
            _ => {
                let item = value.get_item(&key)?;
                Value::from(Tuple::from([key, item]))
            }
        });
    }
    Ok(Some(Value::from(list)))
}

fn too_large() -> Error {
    Error::new(
        ErrorKind::OutOfFuel,
        format!("a text would have more than {MAX_TEXT_BYTES} bytes"),
    )
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.into())
}

fn stripped(text: &str, args: &[Value], ends: Ends) -> Result<Value, Error> {
    let (characters,): (Option<&str>,) = from_args(args)?;
    Ok(Value::from(strip(text, characters, ends)))
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Forward,
    Backward,
}

fn split(text: &str, args: &[Value], direction: Direction) -> Result<Value, Error> {
    let (positional, kwargs): (Rest<Value>, Kwargs) = from_args(args)?;
    let separator = match positional.first() {
        Some(value) => Some(value.clone()),
        None => kwargs.get("sep")?,
    };
    let limit = match positional.get(1) {
        Some(value) => i64::try_from(value.clone())?,
        None => kwargs.get::<Option<i64>>("maxsplit")?.unwrap_or(-1),
    };
    kwargs.assert_all_used()?;
    // Python counts cuts, not pieces, and takes every negative number as no limit.
    let limit = usize::try_from(limit).map_or(usize::MAX, |cuts| cuts.saturating_add(1));
    let separator = separator.filter(|value| !value.is_none());
    let Some(separator) = separator else {
        return Ok(split_whitespace(text, limit, direction));
    };
    let separator = separator
        .as_str()
        .ok_or_else(|| invalid("must be str or None"))?;
    if separator.is_empty() {
        return Err(invalid("empty separator"));
    }
    if direction == Direction::Forward {
        return Ok(text.splitn(limit, separator).map(Value::from).collect());
    }
    let mut pieces: Vec<&str> = text.rsplitn(limit, separator).collect();
    pieces.reverse();
    Ok(Value::from_iter(pieces))
}

fn split_whitespace(text: &str, limit: usize, direction: Direction) -> Value {
    let mut pieces = Vec::new();
    let mut rest = strip(text, None, Ends::Both);
    while !rest.is_empty() {
        let cut = match direction {
            Direction::Forward => rest.find(is_space),
            Direction::Backward => rest.rfind(is_space),
        };
        let Some(cut) = cut.filter(|_| pieces.len() + 1 < limit) else {
            // The last piece keeps the whitespace at the end that no cut has touched.
            let whole = match direction {
                Direction::Forward => strip(&text[offset(text, rest)..], None, Ends::Left),
                Direction::Backward => {
                    strip(&text[..offset(text, rest) + rest.len()], None, Ends::Right)
                }
            };
            pieces.push(if limit == usize::MAX { rest } else { whole });
            break;
        };
        let (left, right) = rest.split_at(cut);
        match direction {
            Direction::Forward => {
                pieces.push(left);
                rest = strip(right, None, Ends::Left);
            }
            Direction::Backward => {
                pieces.push(strip(right, None, Ends::Left));
                rest = strip(left, None, Ends::Right);
            }
        }
    }
    if direction == Direction::Backward {
        pieces.reverse();
    }
    Value::from_iter(pieces)
}

/// Returns where `part`, a slice of `text`, begins.
fn offset(text: &str, part: &str) -> usize {
    part.as_ptr() as usize - text.as_ptr() as usize
}

fn split_lines(text: &str, args: &[Value]) -> Result<Value, Error> {
    let (keep_ends,): (Option<bool>,) = from_args(args)?;
    let keep_ends = keep_ends.unwrap_or(false);
    let is_break = |character: char| matches!(character, '\n'..='\r' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}');
    let mut lines = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let end = rest.find(is_break).unwrap_or(rest.len());
        let tail = &rest[end..];
        let break_len = if tail.starts_with("\r\n") {
            2
        } else {
            tail.chars().next().map_or(0, char::len_utf8)
        };
        let line_end = if keep_ends { end + break_len } else { end };
        lines.push(&rest[..line_end]);
        rest = &rest[end + break_len..];
    }
    Ok(Value::from_iter(lines))
}

fn partition(text: &str, separator: &str, method: &str) -> Result<Value, Error> {
    if separator.is_empty() {
        return Err(invalid("empty separator"));
    }
    let parts = match method {
        "partition" => match text.split_once(separator) {
            Some((left, right)) => [left, separator, right],
            None => [text, "", ""],
        },
        _ => match text.rsplit_once(separator) {
            Some((left, right)) => [left, separator, right],
            None => ["", "", text],
        },
    };
    Ok(Value::from(Tuple::new(parts.map(Value::from).to_vec())))
}

fn replace(text: &str, args: &[Value]) -> Result<Value, Error> {
    let (old, new, positional, kwargs): (&str, &str, Option<i64>, Kwargs) = from_args(args)?;
    let count = match positional {
        Some(count) => count,
        None => kwargs.get::<Option<i64>>("count")?.unwrap_or(-1),
    };
    kwargs.assert_all_used()?;
    let limit = usize::try_from(count).unwrap_or(usize::MAX);
    let hits = text.matches(old).count().min(limit);
    let size = hits.saturating_mul(new.len()).saturating_add(text.len());
    if size > MAX_TEXT_BYTES {
        return Err(too_large());
    }
    Ok(Value::from(text.replacen(old, new, limit)))
}

fn find(text: &str, method: &str, args: &[Value]) -> Result<Value, Error> {
    let (needle, start, end) = from_args::<(&str, Option<i64>, Option<i64>)>(args)?;
    let found = char_range(text, start, end).and_then(|part| {
        let at = match method {
            "find" | "index" => part.find(needle),
            _ => part.rfind(needle),
        }?;
        Some(text[..offset(text, part) + at].chars().count() as i64)
    });
    match found {
        Some(position) => Ok(Value::from(position)),
        None if method.ends_with("index") => Err(invalid("substring not found")),
        None => Ok(Value::from(-1)),
    }
}

/// Returns `text[start:end]` counted in characters, or nothing when it starts behind the end.
fn char_range(text: &str, start: Option<i64>, end: Option<i64>) -> Option<&str> {
    if start.is_none() && end.is_none() {
        return Some(text);
    }
    let len = text.chars().count() as i64;
    let clamp = |index: i64| {
        if index < 0 {
            (index + len).max(0)
        } else {
            index
        }
    };
    let start = clamp(start.unwrap_or(0));
    let end = clamp(end.unwrap_or(len)).min(len);
    if start > len || start > end {
        return None;
    }
    let byte = |index: i64| {
        text.char_indices()
            .nth(index as usize)
            .map_or(text.len(), |(byte, _)| byte)
    };
    Some(&text[byte(start)..byte(end)])
}

fn join(separator: &str, args: &[Value]) -> Result<Value, Error> {
    let (items,): (&Value,) = from_args(args)?;
    let mut out = String::new();
    for (index, item) in items.try_iter()?.checked().enumerate() {
        let item = item?;
        if index > 0 {
            out.push_str(separator);
        }
        let Some(text) = item.as_str() else {
            let kind = item.kind();
            return Err(invalid(format!(
                "sequence item {index}: expected str instance, {kind} found"
            )));
        };
        out.push_str(text);
        if out.len() > MAX_TEXT_BYTES {
            return Err(too_large());
        }
    }
    Ok(Value::from(out))
}

fn title(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut in_word = false;
    for character in text.chars() {
        if in_word {
            out.extend(character.to_lowercase());
        } else {
            out.extend(character.to_uppercase());
        }
        in_word = character.is_lowercase() || character.is_uppercase();
    }
    out
}

fn capitalize(text: &str) -> String {
    let mut characters = text.chars();
    let first = characters.next();
    first
        .into_iter()
        .flat_map(char::to_uppercase)
        .chain(characters.as_str().to_lowercase().chars())
        .collect()
}

fn swap_case(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        if character.is_uppercase() {
            out.extend(character.to_lowercase());
        } else {
            out.extend(character.to_uppercase());
        }
    }
    out
}

fn justify(text: &str, method: &str, width: usize, fill: char) -> Result<String, Error> {
    let len = text.chars().count();
    let missing = width.saturating_sub(len);
    if missing > MAX_TEXT_BYTES / fill.len_utf8() {
        return Err(too_large());
    }
    let left = match method {
        "ljust" => 0,
        "rjust" => missing,
        // Python puts the odd character to the left when the width is odd.
        _ => missing / 2 + (missing & width & 1),
    };
    let fill = |count: usize| std::iter::repeat_n(fill, count);
    Ok(fill(left)
        .chain(text.chars())
        .chain(fill(missing - left))
        .collect())
}
