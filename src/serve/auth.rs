//! API keys.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, Method, header};
use axum::middleware::Next;
use axum::response::Response;
use sha2::{Digest, Sha256};

use super::error::unauthorized;
use super::state::AppState;

/// Lets requests to /v1 pass only with one of the server's keys.
///
/// Preflights carry no credentials and pass. Without keys everything passes.
pub(super) async fn require_key(
    State(state): State<Arc<AppState>>,
    request: Request,
    next: Next,
) -> Response {
    let path = request.uri().path();
    let is_guarded = path == "/v1" || path.starts_with("/v1/");
    let is_open = state.options.api_keys.is_empty()
        || !is_guarded
        || request.method() == Method::OPTIONS
        || has_key(request.headers(), &state.options.api_keys);
    if is_open {
        next.run(request).await
    } else {
        unauthorized()
    }
}

fn has_key(headers: &HeaderMap, api_keys: &[String]) -> bool {
    let Some(value) = headers.get(header::AUTHORIZATION) else {
        return false;
    };
    let Some((scheme, key)) = value.as_bytes().split_at_checked("Bearer ".len()) else {
        return false;
    };
    if !scheme.eq_ignore_ascii_case(b"Bearer ") {
        return false;
    }
    // The time of comparing digests says nothing about the keys, and every key is compared.
    let sent = Sha256::digest(key);
    let matches = |api_key: &String| Sha256::digest(api_key.as_bytes()) == sent;
    api_keys
        .iter()
        .fold(false, |found, api_key| found | matches(api_key))
}
