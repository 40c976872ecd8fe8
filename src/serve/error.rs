//! What goes wrong in a request, as a status and an OpenAI error body.
//!
//! The only file of the program that knows HTTP statuses. Types and texts are those of vLLM's
//! Python frontend, because its clients and tests match on them.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::json;

use crate::engine::SubmitError;

/// The body of every error answer but 401.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, schemars::JsonSchema)]
pub(super) struct ErrorBody {
    error: ErrorInfo,
}

/// What happened, for people and programs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, schemars::JsonSchema)]
pub(super) struct ErrorInfo {
    message: String,
    #[serde(rename = "type")]
    kind: &'static str,
    param: Option<String>,
    code: u16,
}

/// An error answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ApiError {
    status: StatusCode,
    kind: &'static str,
    message: String,
    param: Option<String>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        let message = message.into();
        Self {
            status,
            kind,
            message,
            param: None,
        }
    }

    fn with_param(mut self, param: impl Into<String>) -> Self {
        self.param = Some(param.into());
        self
    }

    /// A field whose value makes no sense.
    pub(super) fn invalid(param: &str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "BadRequestError", message).with_param(param)
    }

    /// A field that this server does not serve yet.
    pub(super) fn unsupported(param: &str) -> Self {
        let message = format!("`{param}` is not supported by this server; leave the field out.");
        Self::invalid(param, message)
    }

    /// A body that does not have the form of a request, in vLLM's words for it.
    pub(super) fn malformed(fault: &str, location: &[&str], message: &str) -> Self {
        let mut place = String::from("'body'");
        for part in location {
            place.push_str(", ");
            match part.parse::<usize>() {
                Ok(index) => place.push_str(&index.to_string()),
                Err(_) => place.push_str(&format!("'{part}'")),
            }
        }
        let comma = if location.is_empty() { "," } else { "" };
        let message = message.replace('\'', "\\'");
        let text = format!(
            "1 validation error:\n  {{'type': '{fault}', 'loc': ({place}{comma}), 'msg': '{message}'}}"
        );
        let param = std::iter::once("body").chain(location.iter().copied());
        Self::new(StatusCode::BAD_REQUEST, "Bad Request", text)
            .with_param(param.collect::<Vec<_>>().join("."))
    }

    /// A body that is not declared as JSON.
    pub(super) fn wrong_content_type() -> Self {
        let message = "Unsupported Media Type: Only 'application/json' is allowed";
        Self::new(StatusCode::BAD_REQUEST, "Bad Request", message)
    }

    /// A body that is compressed.
    pub(super) fn unsupported_encoding(encoding: &str) -> Self {
        let message = format!(
            "Content-Encoding `{}` is not supported by this server; send the body as it is.",
            encoding.escape_debug()
        );
        let status = StatusCode::UNSUPPORTED_MEDIA_TYPE;
        Self::new(status, "BadRequestError", message)
    }

    /// A body above the limit.
    pub(super) fn body_too_large(max_body_size: usize) -> Self {
        let message = format!(
            "The request body is larger than {max_body_size} bytes, the limit of this server."
        );
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "BadRequestError", message)
    }

    /// A body that stopped coming, or that broke off.
    pub(super) fn body_incomplete(message: &str) -> Self {
        Self::new(StatusCode::REQUEST_TIMEOUT, "BadRequestError", message)
    }

    /// A prompt that leaves no room in the context.
    pub(super) fn context_overflow(
        max_model_len: usize,
        num_requested: usize,
        num_prompt: usize,
    ) -> Self {
        let message = format!(
            "This model's maximum context length is {max_model_len} tokens. However, you \
             requested {num_requested} output tokens and your prompt contains {num_prompt} input \
             tokens, for a total of {} tokens. Please reduce the length of the input prompt or \
             the number of requested output tokens.",
            num_requested.saturating_add(num_prompt)
        );
        Self::invalid("input_tokens", message)
    }

    /// A model name that is not served.
    pub(super) fn model_not_found(model: &str) -> Self {
        let message = format!("The model `{model}` does not exist.");
        Self::new(StatusCode::NOT_FOUND, "NotFoundError", message).with_param("model")
    }

    /// A path that is not served.
    pub(super) fn unknown_route() -> Self {
        Self::new(StatusCode::NOT_FOUND, "Not Found", "Not Found")
    }

    /// A path that is served for other methods.
    pub(super) fn method_not_allowed() -> Self {
        let kind = "Method Not Allowed";
        Self::new(StatusCode::METHOD_NOT_ALLOWED, kind, kind)
    }

    /// The engine can not take or finish a request.
    pub(super) fn internal(message: impl Into<String>) -> Self {
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "InternalServerError",
            message,
        )
    }

    /// The server takes no requests now.
    pub(super) fn unavailable(message: impl Into<String>) -> Self {
        Self::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "ServiceUnavailableError",
            message,
        )
    }

    /// Returns the body, as it is also sent inside a stream.
    pub(super) fn body(&self) -> ErrorBody {
        ErrorBody {
            error: ErrorInfo {
                message: self.message.clone(),
                kind: self.kind,
                param: self.param.clone(),
                code: self.status.as_u16(),
            },
        }
    }
}

impl From<SubmitError> for ApiError {
    fn from(error: SubmitError) -> Self {
        match error {
            SubmitError::QueueFull { .. } => Self::new(
                StatusCode::TOO_MANY_REQUESTS,
                "TooManyRequestsError",
                format!("The server is busy: {error}. Try again later."),
            ),
            SubmitError::EngineDead { .. } => Self::new(
                StatusCode::INTERNAL_SERVER_ERROR,
                "EngineDeadError",
                error.to_string(),
            ),
            SubmitError::ShuttingDown => Self::unavailable(error.to_string()),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        if matches!(
            self.status,
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE
        ) {
            // One second is about the time in which a queue place comes free.
            let seconds = HeaderValue::from_static("1");
            response.headers_mut().insert(header::RETRY_AFTER, seconds);
        }
        response
    }
}

/// Answers a request without a valid key; vLLM's body is a string here, not an object.
pub(super) fn unauthorized() -> Response {
    (
        StatusCode::UNAUTHORIZED,
        Json(json!({"error": "Unauthorized"})),
    )
        .into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status_of(error: SubmitError) -> u16 {
        ApiError::from(error).status.as_u16()
    }

    #[test]
    fn each_submit_error_has_its_status() {
        let full = SubmitError::QueueFull {
            num_waiting: 8,
            max_num_waiting: 8,
        };
        assert_eq!(status_of(full), 429);
        let dead = SubmitError::EngineDead {
            reason: "out of memory".to_owned(),
        };
        assert_eq!(status_of(dead), 500);
        assert_eq!(status_of(SubmitError::ShuttingDown), 503);
    }

    #[test]
    fn a_full_queue_says_when_to_come_back() {
        let full = SubmitError::QueueFull {
            num_waiting: 8,
            max_num_waiting: 8,
        };
        let response = ApiError::from(full).into_response();
        assert_eq!(response.headers()[header::RETRY_AFTER], "1");
    }

    #[test]
    fn malformed_bodies_are_described_as_by_vllm() {
        let error = ApiError::malformed("missing", &["messages", "0", "role"], "Field required");
        insta::assert_snapshot!(error.message, @r"
        1 validation error:
          {'type': 'missing', 'loc': ('body', 'messages', 0, 'role'), 'msg': 'Field required'}
        ");
        assert_eq!(error.param.as_deref(), Some("body.messages.0.role"));
    }
}
