//! The outermost middleware: request ids, the access log, HTTP counters, draining.
//!
//! A request counts as in flight until its response body is dropped, so a stream is logged with
//! its whole duration and all its tokens, and a shutdown waits for it.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use axum::body::{Body, HttpBody};
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderValue, Method};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http_body_util::BodyExt;

use super::error::ApiError;
use super::state::AppState;

/// Header that carries a request id in both directions.
const REQUEST_ID: &str = "x-request-id";
/// Longest request id that is taken from a client.
pub(super) const MAX_REQUEST_ID_LEN: usize = 256;

/// What handlers tell the access log.
#[derive(Debug, Default)]
pub(super) struct RequestRecord {
    /// The id from the header, if one was sent or will be returned.
    pub(super) request_id: Option<String>,
    /// The id that the answer carries.
    response_id: OnceLock<String>,
    num_prompt_tokens: AtomicUsize,
    num_completion_tokens: AtomicUsize,
}

impl RequestRecord {
    /// Notes the id of the answer.
    pub(super) fn set_response_id(&self, id: &str) {
        self.response_id.get_or_init(|| id.to_owned());
    }

    /// Notes the length of all prompts.
    pub(super) fn set_prompt_tokens(&self, num_tokens: usize) {
        self.num_prompt_tokens.store(num_tokens, Ordering::Relaxed);
    }

    /// Notes a generated token.
    pub(super) fn add_completion_token(&self) {
        self.num_completion_tokens.fetch_add(1, Ordering::Relaxed);
    }
}

/// Runs a request under observation.
pub(super) async fn observe(
    State(state): State<Arc<AppState>>,
    mut request: Request,
    next: Next,
) -> Response {
    let request_id = request_id(&state, request.headers());
    let record = Arc::new(RequestRecord {
        request_id,
        ..RequestRecord::default()
    });
    request.extensions_mut().insert(Arc::clone(&record));
    let mut observation = Observation::start(&state, &record, &request);
    let mut response = if state.lifecycle.is_draining() && request.method() == Method::POST {
        ApiError::unavailable("the server is shutting down").into_response()
    } else {
        next.run(request).await
    };
    observation.status = Some(response.status().as_u16());
    if state.options.request_id_headers
        && let Some(value) = record
            .request_id
            .as_ref()
            .and_then(|id| HeaderValue::from_str(id).ok())
    {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    response.map(|body| hold_until_dropped(body, observation))
}

/// Ties the observation to the body without touching its frames or its length.
fn hold_until_dropped(body: Body, observation: Observation) -> Body {
    if body.is_end_stream() {
        return body;
    }
    Body::new(body.map_err(move |error| {
        let _held = &observation;
        error
    }))
}

fn request_id(state: &AppState, headers: &HeaderMap) -> Option<String> {
    let sent = headers
        .get(REQUEST_ID)
        .and_then(|value| value.to_str().ok());
    let sent = sent.filter(|id| !id.is_empty() && id.len() <= MAX_REQUEST_ID_LEN);
    let made = || uuid::Uuid::new_v4().simple().to_string();
    sent.map(str::to_owned)
        .or_else(|| state.options.request_id_headers.then(made))
}

/// One request from its headers to the last byte of its answer.
struct Observation {
    state: Arc<AppState>,
    record: Arc<RequestRecord>,
    method: Method,
    path: String,
    /// The route, or nothing for unknown paths: metrics must not grow with what clients make up.
    handler: Option<MatchedPath>,
    start: Instant,
    /// Absent while no handler has answered.
    status: Option<u16>,
}

impl Observation {
    fn start(state: &Arc<AppState>, record: &Arc<RequestRecord>, request: &Request) -> Self {
        if request.method() == Method::POST {
            state.lifecycle.enter();
        }
        Self {
            state: Arc::clone(state),
            record: Arc::clone(record),
            method: request.method().clone(),
            path: request.uri().path().to_owned(),
            handler: request.extensions().get().cloned(),
            start: Instant::now(),
            status: None,
        }
    }

    /// Returns a method name of bounded variety.
    fn method_label(&self) -> &'static str {
        match self.method {
            Method::GET => "GET",
            Method::POST => "POST",
            Method::OPTIONS => "OPTIONS",
            Method::HEAD => "HEAD",
            _ => "other",
        }
    }
}

impl Drop for Observation {
    fn drop(&mut self) {
        if self.method == Method::POST {
            self.state.lifecycle.leave();
        }
        // nginx's number for a client that left before the answer.
        let status = self.status.unwrap_or(499);
        let handler = self.handler.as_ref().map_or("none", MatchedPath::as_str);
        self.state
            .metrics
            .count_http(self.method_label(), handler, &status.to_string());
        if self.state.options.access_log {
            let request_id = self
                .record
                .response_id
                .get()
                .or(self.record.request_id.as_ref());
            let request_id = request_id.map_or("", String::as_str);
            tracing::info!(
                method = self.method.as_str(),
                path = self.path,
                status,
                ms = self.start.elapsed().as_millis() as u64,
                prompt_tokens = self.record.num_prompt_tokens.load(Ordering::Relaxed),
                completion_tokens = self.record.num_completion_tokens.load(Ordering::Relaxed),
                request_id,
                "answered"
            );
        }
    }
}
