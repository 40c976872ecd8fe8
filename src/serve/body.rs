//! Request bodies: bytes off the wire, then JSON, then typed fields.
//!
//! Written by hand instead of with axum's extractors for three reasons: every failure has to
//! come back in vLLM's error body, a client that sends slowly or too much must not tie up the
//! server, and one body is read by several field structs.

use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::Request;
use axum::http::{HeaderMap, header};
use futures::StreamExt;
use serde::de::{DeserializeOwned, IgnoredAny};

use super::error::ApiError;

/// Longest pause between two pieces of a body.
const PIECE_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest time for a whole body.
const BODY_TIMEOUT: Duration = Duration::from_secs(300);
/// Bodies above this size are worked on outside the async workers.
const LARGE_BODY: usize = 16 * 1024;
/// How much of a body that is too large is read and thrown away, so that a client which only
/// reads after it has sent everything still gets the answer.
const DISCARD_FACTOR: usize = 8;
/// Longest part of an error text that repeats what the client sent.
const MAX_ERROR_CHARS: usize = 500;

/// Reads the body of a JSON request.
///
/// # Errors
/// Another content type, a compressed body, one above `max_body_size` bytes, or one that stops
/// coming.
pub(super) async fn read_json_body(
    request: Request,
    max_body_size: usize,
) -> Result<Bytes, ApiError> {
    if !is_json(request.headers()) {
        return Err(ApiError::wrong_content_type());
    }
    if let Some(encoding) = content_encoding(request.headers()) {
        return Err(ApiError::unsupported_encoding(&encoding));
    }
    let declared = declared_length(request.headers());
    let waits_for_consent = request.headers().contains_key(header::EXPECT);
    let too_large = declared.is_some_and(|length| length > max_body_size as u64);
    if too_large && waits_for_consent {
        return Err(ApiError::body_too_large(max_body_size));
    }
    let read = read_limited(request.into_body(), max_body_size);
    match tokio::time::timeout(BODY_TIMEOUT, read).await {
        Ok(result) => result,
        Err(_) => Err(ApiError::body_incomplete("The request body took too long.")),
    }
}

async fn read_limited(body: Body, max_body_size: usize) -> Result<Bytes, ApiError> {
    let mut pieces = body.into_data_stream();
    let mut bytes = Vec::new();
    let mut num_read = 0usize;
    loop {
        let piece = match tokio::time::timeout(PIECE_TIMEOUT, pieces.next()).await {
            Ok(Some(Ok(piece))) => piece,
            Ok(Some(Err(_))) => {
                return Err(ApiError::body_incomplete("The request body broke off."));
            }
            Ok(None) => break,
            Err(_) => {
                return Err(ApiError::body_incomplete(
                    "The request body stopped coming.",
                ));
            }
        };
        num_read = num_read.saturating_add(piece.len());
        if num_read <= max_body_size {
            bytes.extend_from_slice(&piece);
        } else {
            bytes = Vec::new();
        }
        if num_read > max_body_size.saturating_mul(DISCARD_FACTOR) {
            break;
        }
    }
    if num_read > max_body_size {
        return Err(ApiError::body_too_large(max_body_size));
    }
    Ok(Bytes::from(bytes))
}

/// Runs work on a body; large bodies do not hold up the async workers.
///
/// # Errors
/// What `work` returns, or an internal error when it panics.
pub(super) async fn off_workers<T: Send + 'static>(
    num_bytes: usize,
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    if num_bytes <= LARGE_BODY {
        return work();
    }
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(_) => Err(ApiError::internal("The request could not be prepared.")),
    }
}

/// Reads the fields of one struct from a body; other fields are skipped.
///
/// # Errors
/// Malformed JSON, or a value of the wrong type with its place and both types.
pub(super) fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    // Some editors on Windows save a byte order mark, and `curl -d @file` sends it.
    let body = body.strip_prefix(b"\xef\xbb\xbf").unwrap_or(body);
    // Serde would read a struct from a list too, field by field.
    let is_object = body.trim_ascii_start().first() == Some(&b'{');
    if !is_object {
        return Err(match serde_json::from_slice::<IgnoredAny>(body) {
            Ok(_) => ApiError::malformed("type_error", &[], "expected a JSON object"),
            Err(error) => json_invalid(&error),
        });
    }
    let mut deserializer = serde_json::Deserializer::from_slice(body);
    let value = serde_path_to_error::deserialize(&mut deserializer).map_err(describe)?;
    match deserializer.end() {
        Ok(()) => Ok(value),
        Err(error) => Err(json_invalid(&error)),
    }
}

fn describe(error: serde_path_to_error::Error<serde_json::Error>) -> ApiError {
    let path: Vec<String> = error.path().iter().map(segment_text).collect();
    let mut location: Vec<&str> = path.iter().map(String::as_str).collect();
    let inner = error.inner();
    if !inner.is_data() {
        return json_invalid(inner);
    }
    let text = shortened(&inner.to_string());
    if let Some((kind, message)) = out_of_range(&text) {
        return ApiError::malformed(kind, &location, &message);
    }
    let text = in_words_of_json(&text);
    if let Some(field) = text.strip_prefix("missing field `")
        && let Some((field, _)) = field.split_once('`')
    {
        location.push(field);
        return ApiError::malformed("missing", &location, "Field required");
    }
    ApiError::malformed("type_error", &location, &text)
}

/// Returns pydantic's kind and words for a whole number that 64 bits do not hold. Such a number
/// reaches serde as a `u64`, or as a float when it is further out.
fn out_of_range(text: &str) -> Option<(&'static str, String)> {
    let found = text
        .strip_prefix("invalid value: integer `")
        .or_else(|| text.strip_prefix("invalid type: floating point `"))?;
    let (found, rest) = found.split_once('`')?;
    let found: f64 = found.parse().ok()?;
    if !rest.starts_with(", expected i64") || found.abs() < i64::MAX as f64 {
        return None;
    }
    Some(if found > 0.0 {
        let limit = i64::MAX;
        (
            "less_than_equal",
            format!("Input should be less than or equal to {limit}"),
        )
    } else {
        let limit = i64::MIN;
        (
            "greater_than_equal",
            format!("Input should be greater than or equal to {limit}"),
        )
    })
}

/// Names the expected type as JSON does, not as Rust does.
fn in_words_of_json(text: &str) -> String {
    [
        ("expected f64", "expected a number"),
        ("expected i64", "expected a whole number"),
        ("expected a sequence", "expected a list"),
        ("expected a map", "expected an object"),
        ("invalid type: sequence", "invalid type: list"),
        ("invalid type: map", "invalid type: object"),
    ]
    .iter()
    .fold(text.to_owned(), |text, (rust, json)| {
        text.replace(rust, json)
    })
}

fn segment_text(segment: &serde_path_to_error::Segment) -> String {
    use serde_path_to_error::Segment;
    match segment {
        Segment::Seq { index } => index.to_string(),
        Segment::Map { key } => key.clone(),
        Segment::Enum { variant } => variant.clone(),
        Segment::Unknown => "?".to_owned(),
    }
}

fn json_invalid(error: &serde_json::Error) -> ApiError {
    let text = format!("JSON decode error: {}", shortened(&error.to_string()));
    ApiError::malformed("json_invalid", &[], &text)
}

/// Keeps an error text short that may repeat a whole value of the body.
fn shortened(text: &str) -> String {
    if text.chars().count() <= MAX_ERROR_CHARS {
        return text.to_owned();
    }
    // The end names the expected type and the place.
    let half = MAX_ERROR_CHARS / 2;
    let start: String = text.chars().take(half).collect();
    let mut end: Vec<char> = text.chars().rev().take(half).collect();
    end.reverse();
    format!("{start} … {}", end.into_iter().collect::<String>())
}

fn is_json(headers: &HeaderMap) -> bool {
    let value = headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok());
    let media_type = value.and_then(|value| value.split(';').next());
    media_type.is_some_and(|media| media.trim().eq_ignore_ascii_case("application/json"))
}

/// Returns how a body is compressed, if it is.
fn content_encoding(headers: &HeaderMap) -> Option<String> {
    let value = headers.get(header::CONTENT_ENCODING)?;
    let encoding = String::from_utf8_lossy(value.as_bytes()).trim().to_owned();
    (!encoding.is_empty() && !encoding.eq_ignore_ascii_case("identity")).then_some(encoding)
}

fn declared_length(headers: &HeaderMap) -> Option<u64> {
    headers
        .get(header::CONTENT_LENGTH)?
        .to_str()
        .ok()?
        .parse()
        .ok()
}
