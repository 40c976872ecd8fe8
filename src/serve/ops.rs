//! The endpoints around generation: models, health, metrics, tokenizer.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, Request, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::json;

use crate::text::{AddSpecialTokens, SkipSpecialTokens};

use super::body::{off_workers, parse, read_json_body};
use super::error::ApiError;
use super::openai::{
    DetokenizeRequest, RefusedFields, TemplateFields, TokenizeRequest, check_model, check_refused,
    check_token_ids, encode, render_chat,
};
use super::state::AppState;

/// `GET /v1/models`.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct ModelList {
    object: &'static str,
    data: Vec<ModelCard>,
}

/// One served model.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct ModelCard {
    id: String,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    root: String,
    parent: Option<String>,
    max_model_len: usize,
    permission: Vec<ModelPermission>,
}

/// What may be done with a model; OpenAI's old form, which some clients still read.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct ModelPermission {
    id: String,
    object: &'static str,
    created: u64,
    allow_create_engine: bool,
    allow_sampling: bool,
    allow_logprobs: bool,
    allow_search_indices: bool,
    allow_view: bool,
    allow_fine_tuning: bool,
    organization: &'static str,
    group: Option<String>,
    is_blocking: bool,
}

/// Answer of `/tokenize`.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct TokenizeResponse {
    count: usize,
    max_model_len: usize,
    tokens: Vec<u32>,
    token_strs: Option<Vec<String>>,
}

/// Answer of `/detokenize`.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct DetokenizeResponse {
    prompt: String,
}

/// Lists the served model under each of its names.
pub(super) async fn models(State(state): State<Arc<AppState>>) -> Json<ModelList> {
    let data = state
        .model
        .names
        .iter()
        .map(|name| ModelCard::new(&state, name))
        .collect();
    Json(ModelList {
        object: "list",
        data,
    })
}

/// Describes one model.
pub(super) async fn model(
    State(state): State<Arc<AppState>>,
    Path(id): Path<String>,
) -> Result<Json<ModelCard>, ApiError> {
    if state.model.names.contains(&id) {
        Ok(Json(ModelCard::new(&state, &id)))
    } else {
        Err(ApiError::model_not_found(&id))
    }
}

impl ModelCard {
    fn new(state: &AppState, name: &str) -> Self {
        let created = state.model.created;
        Self {
            id: name.to_owned(),
            object: "model",
            created,
            owned_by: "infold",
            root: state.model.root.clone(),
            parent: None,
            max_model_len: state.engine.info().max_model_len,
            permission: vec![ModelPermission {
                id: format!("modelperm-{}", uuid::Uuid::new_v4().simple()),
                object: "model_permission",
                created,
                allow_create_engine: false,
                allow_sampling: true,
                allow_logprobs: true,
                allow_search_indices: false,
                allow_view: true,
                allow_fine_tuning: false,
                organization: "*",
                group: None,
                is_blocking: false,
            }],
        }
    }
}

/// Answers 200 while requests can be served, else 503 with the reason.
pub(super) async fn health(State(state): State<Arc<AppState>>) -> Result<(), ApiError> {
    if let Some(reason) = state.engine.death() {
        return Err(ApiError::unavailable(format!(
            "the engine has stopped: {reason}"
        )));
    }
    if state.lifecycle.is_draining() {
        return Err(ApiError::unavailable("the server is shutting down"));
    }
    Ok(())
}

/// Returns the version of this program.
pub(super) async fn version() -> Response {
    Json(json!({"version": env!("CARGO_PKG_VERSION")})).into_response()
}

/// Returns the number of generation requests in work.
pub(super) async fn load(State(state): State<Arc<AppState>>) -> Response {
    Json(json!({"server_load": state.lifecycle.num_in_flight()})).into_response()
}

/// Returns the metrics in Prometheus' text format.
pub(super) async fn metrics(State(state): State<Arc<AppState>>) -> Result<Response, ApiError> {
    let text = state.metrics.encode(&state.engine.replica_stats());
    let text = text.map_err(|error| ApiError::internal(error.to_string()))?;
    let content_type = [(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)];
    Ok((content_type, text).into_response())
}

/// Encodes a text or a chat.
pub(super) async fn tokenize(
    State(state): State<Arc<AppState>>,
    request: Request,
) -> Result<Json<TokenizeResponse>, ApiError> {
    let body = read_json_body(request, state.options.max_body_size).await?;
    off_workers(body.len(), move || {
        let request: TokenizeRequest = parse(&body)?;
        check_model(&state, request.model.as_deref())?;
        let (text, add_by_default) = match (&request.prompt, &request.messages) {
            (Some(prompt), None) => (prompt.clone(), true),
            (None, Some(messages)) => {
                check_refused(&parse::<RefusedFields>(&body)?)?;
                let template: TemplateFields = parse(&body)?;
                (render_chat(&state, messages, &template)?, false)
            }
            (None, None) => {
                return Err(ApiError::malformed(
                    "missing",
                    &["prompt"],
                    "Field required",
                ));
            }
            (Some(_), Some(_)) => {
                let message = "give either `prompt` or `messages`, not both.";
                return Err(ApiError::invalid("prompt", message));
            }
        };
        let add = match request.add_special_tokens.unwrap_or(add_by_default) {
            true => AddSpecialTokens::Yes,
            false => AddSpecialTokens::No,
        };
        let tokens = encode(&state, &text, add)?;
        let spelling = |&id: &u32| state.tokenizer.token_string(id).unwrap_or_default();
        let wants_spelling = request.return_token_strs.unwrap_or(false);
        Ok(Json(TokenizeResponse {
            count: tokens.len(),
            max_model_len: state.engine.info().max_model_len,
            token_strs: wants_spelling.then(|| tokens.iter().map(spelling).collect()),
            tokens,
        }))
    })
    .await
}

/// Decodes token ids, special tokens included.
pub(super) async fn detokenize(
    State(state): State<Arc<AppState>>,
    request: Request,
) -> Result<Json<DetokenizeResponse>, ApiError> {
    let body = read_json_body(request, state.options.max_body_size).await?;
    off_workers(body.len(), move || {
        let request: DetokenizeRequest = parse(&body)?;
        check_model(&state, request.model.as_deref())?;
        let token_ids = check_token_ids(&state, "tokens", &request.tokens)?;
        let prompt = state.tokenizer.decode(&token_ids, SkipSpecialTokens::No);
        Ok(Json(DetokenizeResponse { prompt }))
    })
    .await
}
