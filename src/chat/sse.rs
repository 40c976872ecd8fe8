//! Lines of a streamed chat completion.

use anyhow::{Context, bail};
use serde_json::Value;

/// What a line of the stream says.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// More of the answer.
    Text(String),
    /// Nothing to print: a comment, an empty line, a role or usage chunk.
    Other,
    /// The end.
    Done,
}

/// Reads one line of the stream.
///
/// # Errors
/// When the line is an error event or not JSON.
pub(super) fn parse(line: &str) -> anyhow::Result<Event> {
    let Some(data) = line.strip_prefix("data:").map(str::trim) else {
        return Ok(Event::Other);
    };
    if data == "[DONE]" {
        return Ok(Event::Done);
    }
    let chunk: Value =
        serde_json::from_str(data).context("the server sent an event that is not JSON")?;
    if chunk.get("error").is_some() {
        bail!("{}", error_message(data));
    }
    match chunk["choices"][0]["delta"]["content"].as_str() {
        Some(text) if !text.is_empty() => Ok(Event::Text(text.to_owned())),
        _ => Ok(Event::Other),
    }
}

/// Returns the message of an OpenAI error body, or the body as it is.
pub(super) fn error_message(body: &str) -> String {
    let message = serde_json::from_str::<Value>(body).ok().and_then(|json| {
        let error = &json["error"];
        error["message"]
            .as_str()
            .or_else(|| error.as_str())
            .map(str::to_owned)
    });
    message.unwrap_or_else(|| body.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_comes_from_the_delta_and_all_else_is_passed_over() {
        let chunk = r#"data: {"choices":[{"delta":{"content":"Hé"}}]}"#;
        assert_eq!(parse(chunk).unwrap(), Event::Text("Hé".to_owned()));
        for other in [
            "",
            ": ping",
            r#"data: {"choices":[]}"#,
            r#"data: {"choices":[{"delta":{"role":"assistant"}}]}"#,
        ] {
            assert_eq!(parse(other).unwrap(), Event::Other, "{other}");
        }
        assert_eq!(parse("data: [DONE]").unwrap(), Event::Done);
    }

    #[test]
    fn an_error_event_ends_the_answer_with_its_message() {
        let error = parse(r#"data: {"error":{"message":"out of tokens"}}"#).unwrap_err();
        assert_eq!(error.to_string(), "out of tokens");
    }

    #[test]
    fn the_message_is_found_in_both_forms_of_error_bodies() {
        assert_eq!(error_message(r#"{"error":"Unauthorized"}"#), "Unauthorized");
        assert_eq!(error_message("plain"), "plain");
    }
}
