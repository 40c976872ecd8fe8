//! `{% generation %}` blocks, which transformers adds to Jinja to mark what an assistant wrote.
//!
//! Serving only needs their content, so they become `{% with %}` blocks, which scope variables the
//! same way. Only the tag names change: whitespace control and line numbers stay.

/// Returns the template with generation tags renamed.
pub(super) fn rename_generation_blocks(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    let mut in_raw = false;
    while let Some(start) = rest.find('{') {
        let (before, tag) = rest.split_at(start);
        out.push_str(before);
        let len = if in_raw && !tag.starts_with("{%") {
            1
        } else {
            tag_len(tag)
        };
        let (tag, after) = tag.split_at(len);
        match block_name(tag) {
            Some("raw") => in_raw = true,
            Some("endraw") => in_raw = false,
            _ => {}
        }
        match block_name(tag).filter(|_| !in_raw) {
            Some("generation") => out.push_str(&tag.replacen("generation", "with", 1)),
            Some("endgeneration") => out.push_str(&tag.replacen("endgeneration", "endwith", 1)),
            _ => out.push_str(tag),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

/// Returns the first word of a `{% … %}` tag.
fn block_name(tag: &str) -> Option<&str> {
    let inside = tag.strip_prefix("{%")?;
    let inside = inside
        .strip_prefix(['-', '+'])
        .unwrap_or(inside)
        .trim_start();
    let end = inside
        .find(|character: char| !character.is_alphanumeric() && character != '_')
        .unwrap_or(inside.len());
    Some(&inside[..end])
}

/// Returns the bytes of the tag, comment or expression that `text` begins with, or 1.
fn tag_len(text: &str) -> usize {
    let close = match text.as_bytes().get(1) {
        Some(b'#') => return text.find("#}").map_or(1, |end| end + 2),
        Some(b'%') => "%}",
        Some(b'{') => "}}",
        _ => return 1,
    };
    let bytes = text.as_bytes();
    let mut position = 2;
    let mut quote = None;
    while position < bytes.len() {
        match (quote, bytes[position]) {
            (Some(_), b'\\') => position += 1,
            (Some(open), byte) if byte == open => quote = None,
            (None, byte @ (b'"' | b'\'')) => quote = Some(byte),
            (None, _) if bytes[position..].starts_with(close.as_bytes()) => {
                return position + close.len();
            }
            _ => {}
        }
        position += 1;
    }
    1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_renamed_and_all_else_is_kept() {
        let renamed = rename_generation_blocks(
            "{%- generation -%}\n{{ '{% generation %}' }}{# {% generation %} #}{% endgeneration%}\
             { {% raw %}{% generation %}{{{% endraw %}{%+ generation %}",
        );
        assert_eq!(
            renamed,
            "{%- with -%}\n{{ '{% generation %}' }}{# {% generation %} #}{% endwith%}\
             { {% raw %}{% generation %}{{{% endraw %}{%+ with %}",
        );
    }

    #[test]
    fn unclosed_tags_are_left_for_the_parser() {
        for source in ["{%", "{{ 'a", "{#", "a {", "{% set generation = 1 %}", "{"] {
            assert_eq!(rename_generation_blocks(source), source);
        }
    }
}
