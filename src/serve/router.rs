//! Every route and every middleware on one screen.

use std::sync::Arc;

use anyhow::Context;
use axum::Router;
use axum::http::{HeaderName, HeaderValue, Method};
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::cors::{AllowHeaders, AllowMethods, AllowOrigin, CorsLayer};

use super::args::{ListenArgs, StringList};
use super::error::ApiError;
use super::state::AppState;
use super::{auth, observe, openai, openapi, ops};

/// Builds the server's routes.
pub(super) fn router(state: Arc<AppState>, cors: CorsLayer) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(openai::chat_completions))
        .route("/v1/completions", post(openai::completions))
        .route("/v1/models", get(ops::models))
        // A wildcard, because hub ids contain a slash.
        .route("/v1/models/{*id}", get(ops::model))
        .route("/tokenize", post(ops::tokenize))
        .route("/detokenize", post(ops::detokenize))
        .route("/health", get(ops::health))
        .route("/ping", get(ops::health).post(ops::health))
        .route("/version", get(ops::version))
        .route("/load", get(ops::load))
        .route("/metrics", get(ops::metrics))
        .route("/openapi.json", get(openapi::document))
        .fallback(async || ApiError::unknown_route())
        .method_not_allowed_fallback(async || ApiError::method_not_allowed())
        // Later layers wrap earlier ones. Panics are caught innermost, so that their answers get
        // logged and CORS headers; keys are checked inside CORS, so that browsers can read a 401.
        .layer(CatchPanicLayer::custom(|_| panicked()))
        .layer(from_fn_with_state(Arc::clone(&state), auth::require_key))
        .layer(cors)
        .layer(from_fn_with_state(Arc::clone(&state), observe::observe))
        .with_state(state)
}

/// Builds the CORS answers from the flags.
///
/// # Errors
/// A value that can not stand in a header.
pub(super) fn cors(args: &ListenArgs) -> anyhow::Result<CorsLayer> {
    // Browsers refuse `*` together with credentials; the origin is mirrored then.
    let origins = match any(&args.allowed_origins) {
        true if args.allow_credentials => AllowOrigin::mirror_request(),
        true => AllowOrigin::any(),
        false => AllowOrigin::list(parse_all::<HeaderValue>(&args.allowed_origins)?),
    };
    // Methods and headers are always mirrored: `*` would leave out Authorization.
    let methods = match any(&args.allowed_methods) {
        true => AllowMethods::mirror_request(),
        false => AllowMethods::list(parse_all::<Method>(&args.allowed_methods)?),
    };
    let headers = match any(&args.allowed_headers) {
        true => AllowHeaders::mirror_request(),
        false => AllowHeaders::list(parse_all::<HeaderName>(&args.allowed_headers)?),
    };
    Ok(CorsLayer::new()
        .allow_origin(origins)
        .allow_methods(methods)
        .allow_headers(headers)
        .allow_credentials(args.allow_credentials))
}

fn any(list: &StringList) -> bool {
    list.0.iter().any(|entry| entry == "*")
}

fn parse_all<T: std::str::FromStr>(list: &StringList) -> anyhow::Result<Vec<T>>
where
    T::Err: std::error::Error + Send + Sync + 'static,
{
    let parse = |entry: &String| {
        entry
            .parse()
            .with_context(|| format!("`{entry}` can not stand in a CORS header"))
    };
    list.0.iter().map(parse).collect()
}

fn panicked() -> Response {
    ApiError::internal("The server failed on this request; its log says why.").into_response()
}
