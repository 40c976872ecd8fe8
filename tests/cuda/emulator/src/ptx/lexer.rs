//! Splits PTX text into words and signs.

/// A word (directive, instruction, name or number) or a sign of one character.
#[derive(Debug, Clone, Copy)]
pub(super) struct Token<'a> {
    /// Its characters.
    pub text: &'a str,
    /// Its line, from 1.
    pub line: u32,
}

/// Returns whether `byte` may be part of a word.
fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'$' | b'%' | b'.')
}

/// Returns where the word that begins at `start` ends; `::` is part of words, `:` is not.
fn word_end(bytes: &[u8], start: usize) -> usize {
    let mut end = start;
    while end < bytes.len() {
        if is_word(bytes[end]) {
            end += 1;
        } else if bytes[end..].starts_with(b"::") {
            end += 2;
        } else {
            break;
        }
    }
    end
}

/// Returns all tokens of `text` without comments.
///
/// # Errors
/// A comment or string without end.
pub(super) fn tokenize(text: &str) -> Result<Vec<Token<'_>>, String> {
    let bytes = text.as_bytes();
    let mut tokens = Vec::with_capacity(bytes.len() / 5);
    let (mut at, mut line) = (0, 1);
    while at < bytes.len() {
        let start = at;
        match bytes[at] {
            b'\n' => {
                line += 1;
                at += 1;
                continue;
            }
            byte if byte.is_ascii_whitespace() || byte == 0 => {
                at += 1;
                continue;
            }
            b'/' if bytes[at..].starts_with(b"//") => {
                while at < bytes.len() && bytes[at] != b'\n' {
                    at += 1;
                }
                continue;
            }
            b'/' if bytes[at..].starts_with(b"/*") => {
                let length = text[at..]
                    .find("*/")
                    .ok_or_else(|| format!("line {line}: comment without end"))?;
                line += bytes[at..at + length]
                    .iter()
                    .filter(|&&byte| byte == b'\n')
                    .count() as u32;
                at += length + 2;
                continue;
            }
            b'"' => {
                let length = text[at + 1..]
                    .find('"')
                    .ok_or_else(|| format!("line {line}: string without end"))?;
                at += length + 2;
            }
            byte if is_word(byte) => at = word_end(bytes, at),
            byte if byte.is_ascii() => at += 1,
            _ => return Err(format!("line {line}: a character that PTX does not have")),
        }
        tokens.push(Token {
            text: &text[start..at],
            line,
        });
    }
    Ok(tokens)
}

#[cfg(test)]
mod tests {
    use super::tokenize;

    #[test]
    fn words_keep_double_colons_and_labels_lose_theirs() {
        let texts: Vec<&str> =
            tokenize("$L: /* a\n */ fence.proxy.async.shared::cta; // b\n@!%p1 bra $L;")
                .expect("valid")
                .iter()
                .map(|token| token.text)
                .collect();
        assert_eq!(
            texts,
            [
                "$L",
                ":",
                "fence.proxy.async.shared::cta",
                ";",
                "@",
                "!",
                "%p1",
                "bra",
                "$L",
                ";"
            ]
        );
    }

    #[test]
    fn lines_are_counted_over_comments() {
        let tokens = tokenize("a\n/* b\n\n*/ c // d\ne").expect("valid");
        assert_eq!(
            tokens.iter().map(|token| token.line).collect::<Vec<_>>(),
            [1, 4, 5]
        );
    }
}
