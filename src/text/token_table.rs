//! What every token id stands for, laid out flat so that detokenising is two index reads.

use tokenizers::DecoderWrapper;

/// Marks the space of a SentencePiece token.
const SENTENCEPIECE_SPACE: char = '\u{2581}';

/// How a vocabulary string turns into bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TokenEncoding {
    /// GPT-2's printable stand-ins, one character a byte. Tokens decode independently.
    ByteLevel,
    /// `▁` for a space, `<0xNN>` for a byte; the decoder looks at neighbouring tokens.
    SentencePiece,
}

impl TokenEncoding {
    /// Returns the encoding that a decoder undoes.
    pub(super) fn of(decoder: Option<&DecoderWrapper>) -> Self {
        match decoder {
            Some(DecoderWrapper::ByteLevel(_)) => Self::ByteLevel,
            _ => Self::SentencePiece,
        }
    }
}

/// Bytes and kind of every token id.
#[derive(Debug)]
pub(super) struct TokenTable {
    bytes: Vec<u8>,
    /// Token `id` is `bytes[ends[id - 1]..ends[id]]`.
    ends: Vec<u32>,
    special: Vec<bool>,
    /// Bytes of the longest token.
    longest: usize,
}

impl TokenTable {
    /// Builds the table for ids from 0 on; `None` is an id that the vocabulary leaves out.
    pub(super) fn new(
        tokens: impl Iterator<Item = Option<String>>,
        encoding: TokenEncoding,
        is_special: impl Fn(&str) -> bool,
    ) -> Self {
        let mut table = Self {
            bytes: Vec::new(),
            ends: Vec::new(),
            special: Vec::new(),
            longest: 0,
        };
        for token in tokens {
            let token = token.as_deref().unwrap_or("");
            let start = table.bytes.len();
            match encoding {
                TokenEncoding::ByteLevel => push_byte_level(&mut table.bytes, token),
                TokenEncoding::SentencePiece => push_sentencepiece(&mut table.bytes, token),
            }
            table.ends.push(table.bytes.len() as u32);
            table.longest = table.longest.max(table.bytes.len() - start);
            table.special.push(!token.is_empty() && is_special(token));
        }
        table
    }

    /// Returns the bytes of the longest token.
    pub(super) fn longest(&self) -> usize {
        self.longest
    }

    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    pub(super) fn bytes(&self, id: u32) -> Option<&[u8]> {
        let id = id as usize;
        let end = *self.ends.get(id)? as usize;
        let start = match id {
            0 => 0,
            _ => self.ends[id - 1] as usize,
        };
        Some(&self.bytes[start..end])
    }

    pub(super) fn is_special(&self, id: u32) -> bool {
        self.special.get(id as usize).copied().unwrap_or(false)
    }
}

/// Appends the bytes of a byte-level token; one with a foreign character stands for itself, as in
/// `tokenizers`.
fn push_byte_level(bytes: &mut Vec<u8>, token: &str) {
    let start = bytes.len();
    for character in token.chars() {
        let Some(byte) = byte_of(character) else {
            bytes.truncate(start);
            bytes.extend_from_slice(token.as_bytes());
            return;
        };
        bytes.push(byte);
    }
}

/// Undoes GPT-2's byte alphabet: printable Latin-1 stands for itself, the 68 other bytes are
/// counted from U+0100 on.
fn byte_of(character: char) -> Option<u8> {
    let code = u32::from(character);
    match code {
        0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => u8::try_from(code).ok(),
        0x100..=0x120 => u8::try_from(code - 0x100).ok(),
        0x121..=0x142 => u8::try_from(code - 0x121 + 0x7F).ok(),
        0x143 => Some(0xAD),
        _ => None,
    }
}

fn push_sentencepiece(bytes: &mut Vec<u8>, token: &str) {
    let hex = token
        .strip_prefix("<0x")
        .and_then(|rest| rest.strip_suffix('>'));
    if let Some(byte) = hex
        .filter(|digits| digits.len() == 2)
        .and_then(|digits| u8::from_str_radix(digits, 16).ok())
    {
        bytes.push(byte);
        return;
    }
    let mut buffer = [0; 4];
    for character in token.chars() {
        match character {
            SENTENCEPIECE_SPACE => bytes.push(b' '),
            _ => bytes.extend_from_slice(character.encode_utf8(&mut buffer).as_bytes()),
        }
    }
}

#[cfg(test)]
mod tests {
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

    use super::*;

    #[test]
    fn byte_alphabet_is_that_of_tokenizers() {
        let alphabet = ByteLevel::alphabet();
        assert_eq!(alphabet.len(), 256);
        let mut seen = [false; 256];
        for character in alphabet {
            seen[usize::from(byte_of(character).unwrap())] = true;
        }
        assert!(seen.iter().all(|&seen| seen));
        let text = "a \t\n\u{7f}é好😀\u{ad}";
        let mut split = PreTokenizedString::from(text);
        ByteLevel::new(false, false, false)
            .pre_tokenize(&mut split)
            .unwrap();
        let mut bytes = Vec::new();
        for (piece, _, _) in split.get_splits(OffsetReferential::Normalized, OffsetType::Byte) {
            push_byte_level(&mut bytes, piece);
        }
        assert_eq!(bytes, text.as_bytes());
    }

    #[test]
    fn token_with_a_foreign_character_stands_for_itself() {
        let mut bytes = Vec::new();
        push_byte_level(&mut bytes, "<\u{ff5c}begin of\u{ff5c}>");
        assert_eq!(bytes, "<\u{ff5c}begin of\u{ff5c}>".as_bytes());
    }

    #[test]
    fn sentencepiece_bytes_and_spaces_are_undone() {
        let tokens = ["\u{2581}a", "<0xE5>", "<0xZZ>", ""];
        let table = TokenTable::new(
            tokens.iter().map(|token| Some((*token).to_owned())),
            TokenEncoding::SentencePiece,
            |token| token == "<0xZZ>",
        );
        assert_eq!(table.bytes(0), Some(&b" a"[..]));
        assert_eq!(table.bytes(1), Some(&[0xE5][..]));
        assert_eq!(table.bytes(2), Some(&b"<0xZZ>"[..]));
        assert_eq!(table.bytes(3), Some(&b""[..]));
        assert_eq!(table.bytes(4), None);
        assert!(table.is_special(2) && !table.is_special(0) && !table.is_special(9));
    }
}
