//! Server-sent events: the frame around the chunks of both endpoints.
//!
//! Order, as in vLLM: chunks as tokens come, the usage chunk if asked for, `[DONE]`. After the
//! first byte the status is sent, so a failure becomes an event with an error body. A client
//! that goes away makes hyper drop the body, and with it the choices and their sequences.

use std::convert::Infallible;

use axum::body::{Body, Bytes};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use futures::StreamExt;
use serde::Serialize;

use super::super::error::ApiError;
use super::choice::{ChoiceUpdate, Updates};

/// The last event of every stream.
const DONE: &str = "data: [DONE]\n\n";

/// Sends updates as server-sent events; `write` turns each, and at last `None`, into events.
pub(super) fn event_stream(
    mut updates: Updates,
    mut write: impl FnMut(Option<(usize, ChoiceUpdate)>) -> String + Send + 'static,
) -> Response {
    let events = async_stream::stream! {
        while let Some((index, update)) = updates.next().await {
            if let ChoiceUpdate::Failed(message) = update {
                let mut events = String::new();
                push_event(&mut events, &ApiError::internal(message).body());
                events.push_str(DONE);
                yield Ok::<_, Infallible>(Bytes::from(events));
                return;
            }
            let events = write(Some((index, update)));
            if !events.is_empty() {
                yield Ok(Bytes::from(events));
            }
        }
        let mut events = write(None);
        events.push_str(DONE);
        yield Ok(Bytes::from(events));
    };
    let headers = [
        (
            header::CONTENT_TYPE.as_str(),
            "text/event-stream; charset=utf-8",
        ),
        (header::CACHE_CONTROL.as_str(), "no-cache"),
        // Tells nginx not to collect the events.
        ("x-accel-buffering", "no"),
    ];
    (headers, Body::from_stream(events)).into_response()
}

/// Appends one event.
pub(super) fn push_event(events: &mut String, data: &impl Serialize) {
    // Serialising the answer types can not fail: no map has keys that are not strings.
    if let Ok(json) = serde_json::to_string(data) {
        events.push_str("data: ");
        events.push_str(&json);
        events.push_str("\n\n");
    }
}
