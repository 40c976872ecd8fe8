//! Sets top-level keys of a JSON file and leaves every other byte as it is.
//!
//! A configuration that is parsed and written anew comes out with other spellings of numbers
//! (`1e-06`), escapes and spaces; programs that hash or compare files then see a change that
//! nobody made.

use std::ops::Range;

use anyhow::{Context, bail};
use serde_json::Value;

/// A member of the top-level object.
struct Member {
    key: String,
    key_start: usize,
    value: Range<usize>,
}

/// Returns `text` with the top-level `key` set to `value`, whether it was there or not.
///
/// A new key goes where the alphabet puts it if the others are in order, else to the end.
///
/// # Errors
/// A text that is no JSON object.
pub(super) fn set(text: &str, key: &str, value: &Value) -> anyhow::Result<String> {
    let (open, members) = members(text).context("expected a JSON object")?;
    let value = render(value, text)?;
    if let Some(member) = members.iter().find(|member| member.key == key) {
        return Ok(replace(text, member.value.clone(), &value));
    }
    let name = serde_json::to_string(key)?;
    let Some(last) = members.last() else {
        return Ok(replace(
            text,
            open + 1..open + 1,
            &format!("{name}: {value}"),
        ));
    };
    let space = &text[open + 1..members[0].key_start];
    let sorted = members.is_sorted_by(|a, b| a.key <= b.key);
    let next = (members.iter()).find(|member| sorted && member.key.as_str() > key);
    Ok(match next {
        Some(next) => {
            let at = next.key_start;
            replace(text, at..at, &format!("{name}: {value},{space}"))
        }
        None => {
            let at = last.value.end;
            replace(text, at..at, &format!(",{space}{name}: {value}"))
        }
    })
}

/// Writes a value as the file writes its own: on several lines if it has several.
fn render(value: &Value, text: &str) -> anyhow::Result<String> {
    let is_nested = value.is_object() || value.is_array();
    if is_nested && text.contains('\n') {
        // One level further in than at the top.
        return Ok(serde_json::to_string_pretty(value)?.replace('\n', "\n  "));
    }
    Ok(serde_json::to_string(value)?)
}

fn replace(text: &str, range: Range<usize>, with: &str) -> String {
    let mut replaced = text.to_owned();
    replaced.replace_range(range, with);
    replaced
}

/// Returns where the object opens, and its members in order.
fn members(text: &str) -> anyhow::Result<(usize, Vec<Member>)> {
    // A text that parses needs no further checks of its grammar below.
    let parsed: Value = serde_json::from_str(text.trim_start_matches('\u{feff}'))?;
    if !parsed.is_object() {
        bail!("found {parsed}");
    }
    let bytes = text.as_bytes();
    let open = text.find('{').context("there is no brace")?;
    let mut at = open + 1;
    let mut members = Vec::new();
    loop {
        while bytes
            .get(at)
            .is_some_and(|b| b.is_ascii_whitespace() || *b == b',')
        {
            at += 1;
        }
        if bytes.get(at) != Some(&b'"') {
            return Ok((open, members));
        }
        let key_start = at;
        at = end_of_value(bytes, at);
        let key = serde_json::from_str(&text[key_start..at])?;
        while bytes
            .get(at)
            .is_some_and(|b| b.is_ascii_whitespace() || *b == b':')
        {
            at += 1;
        }
        let start = at;
        at = end_of_value(bytes, at);
        members.push(Member {
            key,
            key_start,
            value: start..at,
        });
    }
}

/// Returns where the value ends that begins at `at`.
fn end_of_value(bytes: &[u8], mut at: usize) -> usize {
    let mut depth = 0;
    let mut in_string = false;
    while let Some(byte) = bytes.get(at) {
        match byte {
            b'\\' if in_string => at += 1,
            b'"' => {
                in_string = !in_string;
                if !in_string && depth == 0 {
                    return at + 1;
                }
            }
            _ if in_string => {}
            b'{' | b'[' => depth += 1,
            b'}' | b']' if depth == 0 => return at,
            b'}' | b']' => {
                depth -= 1;
                if depth == 0 {
                    return at + 1;
                }
            }
            b',' if depth == 0 => return at,
            byte if depth == 0 && byte.is_ascii_whitespace() => return at,
            _ => {}
        }
        at += 1;
    }
    at
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const CONFIG: &str = "{\n  \"a\": [1, {\"x\": \"]}\\\"\"}],\n  \"eps\": 1e-06,\n  \"tie\": true,\n  \"z\": null\n}\n";

    #[test]
    fn only_the_value_changes() {
        let edited = set(CONFIG, "tie", &json!(false)).unwrap();
        assert_eq!(edited, CONFIG.replace("true", "false"));
        let edited = set(CONFIG, "z", &json!(5)).unwrap();
        assert_eq!(edited, CONFIG.replace("null", "5"));
        let edited = set(CONFIG, "a", &json!("x")).unwrap();
        assert!(edited.starts_with("{\n  \"a\": \"x\",\n  \"eps\": 1e-06,"));
    }

    #[test]
    fn a_new_key_takes_its_alphabetical_place() {
        let edited = set(CONFIG, "rope_theta", &json!(1e6)).unwrap();
        assert!(
            edited.contains("1e-06,\n  \"rope_theta\": 1000000.0,\n  \"tie\""),
            "{edited}"
        );
        let edited = set(CONFIG, "zz", &json!({"k": 1})).unwrap();
        assert!(
            edited.ends_with("null,\n  \"zz\": {\n    \"k\": 1\n  }\n}\n"),
            "{edited}"
        );
        let edited = set(CONFIG, "A", &json!(1)).unwrap();
        assert!(edited.starts_with("{\n  \"A\": 1,\n  \"a\""), "{edited}");
    }

    #[test]
    fn unsorted_and_one_line_objects_get_it_at_the_end() {
        assert_eq!(
            set(r#"{"b":1,"a":2}"#, "aa", &json!(3)).unwrap(),
            r#"{"b":1,"a":2,"aa": 3}"#
        );
        assert_eq!(
            set("{ }", "k", &json!("ü\n")).unwrap(),
            "{\"k\": \"ü\\n\" }"
        );
        assert!(set("[1]", "k", &json!(1)).is_err());
        assert!(set("{", "k", &json!(1)).is_err());
    }
}
