//! Bytes to text: UTF-8 with or without a byte order mark, and a name for what else it may be.

use std::path::Path;

use super::DataError;

/// Returns the text of a file, without its byte order mark.
///
/// # Errors
/// [`DataError::Encoding`] with the place of the first byte that is not UTF-8, the likely encoding
/// and the command that converts it.
pub(in crate::train) fn decode_utf8(path: &Path, bytes: Vec<u8>) -> Result<String, DataError> {
    let error = match String::from_utf8(bytes) {
        Ok(mut text) => {
            if text.starts_with('\u{feff}') {
                text.drain(..'\u{feff}'.len_utf8());
            }
            // Zero bytes are UTF-8, and the sign of UTF-16 without a mark.
            if !text.contains('\0') {
                return Ok(text);
            }
            return Err(wrong(path, text.as_bytes(), text.find('\0').unwrap_or(0)));
        }
        Err(error) => error,
    };
    let offset = error.utf8_error().valid_up_to();
    Err(wrong(path, error.as_bytes(), offset))
}

fn wrong(path: &Path, bytes: &[u8], offset: usize) -> DataError {
    let before = &bytes[..offset];
    let line = before.iter().filter(|&&byte| byte == b'\n').count() + 1;
    let guess = guess(bytes).map_or_else(String::new, |(name, iconv)| {
        format!(
            "; it looks like {name}, convert it: iconv -f {iconv} -t UTF-8 {path:?} > converted"
        )
    });
    DataError::Encoding {
        path: path.to_owned(),
        line,
        offset,
        guess,
    }
}

/// Returns the likely encoding and what iconv calls it.
fn guess(bytes: &[u8]) -> Option<(&'static str, &'static str)> {
    let zeros = bytes.iter().filter(|&&byte| byte == 0).count();
    if bytes.starts_with(&[0xff, 0xfe])
        || bytes.starts_with(&[0xfe, 0xff])
        || zeros > bytes.len() / 8
    {
        return Some(("UTF-16", "UTF-16"));
    }
    is_gb18030(bytes).then_some(("GBK (GB18030)", "GB18030"))
}

/// Returns whether all bytes are ASCII or characters of GB18030 of two or four bytes.
fn is_gb18030(bytes: &[u8]) -> bool {
    let mut rest = bytes;
    while let Some(&first) = rest.first() {
        rest = match (first, rest.get(1), rest.get(2), rest.get(3)) {
            (0..=0x7f, ..) => &rest[1..],
            (0x81..=0xfe, Some(0x40..=0x7e | 0x80..=0xfe), ..) => &rest[2..],
            (0x81..=0xfe, Some(b'0'..=b'9'), Some(0x81..=0xfe), Some(b'0'..=b'9')) => &rest[4..],
            _ => return false,
        };
    }
    true
}
