//! `GET /openapi.json`: the API described from the wire types themselves.
//!
//! Field names, types and limits come from the structs that requests are read into, so the
//! description can not drift from what is served.

use axum::Json;
use schemars::generate::SchemaSettings;
use schemars::{JsonSchema, SchemaGenerator};
use serde_json::{Map, Value, json};

use super::error::ErrorBody;
use super::openai::{
    ChatCompletion, ChatFields, Completion, CompletionFields, DetokenizeRequest, SamplingFields,
    TemplateFields, TokenizeRequest,
};
use super::ops::{DetokenizeResponse, ModelCard, ModelList, TokenizeResponse};

/// Returns the OpenAPI 3.1 document.
pub(super) async fn document() -> Json<Value> {
    Json(describe())
}

fn describe() -> Value {
    let settings = SchemaSettings::draft2020_12()
        .with(|settings| settings.definitions_path = "/components/schemas".into());
    let mut types = settings.into_generator();
    let paths = paths(&mut types);
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "infold",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "OpenAI-compatible server of language models.",
        },
        "paths": paths,
        "components": {
            "schemas": types.take_definitions(true),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    })
}

fn paths(types: &mut SchemaGenerator) -> Value {
    let chat = [
        schema::<SamplingFields>(types),
        schema::<ChatFields>(types),
        schema::<TemplateFields>(types),
    ];
    let completion = [
        schema::<SamplingFields>(types),
        schema::<CompletionFields>(types),
    ];
    let tokenize = [
        schema::<TokenizeRequest>(types),
        schema::<TemplateFields>(types),
    ];
    let detokenize = [schema::<DetokenizeRequest>(types)];
    let chat_answer = schema::<ChatCompletion>(types);
    let completion_answer = schema::<Completion<'static>>(types);
    let tokenize_answer = schema::<TokenizeResponse>(types);
    let detokenize_answer = schema::<DetokenizeResponse>(types);
    let models = schema::<ModelList>(types);
    let model = schema::<ModelCard>(types);
    let error = schema::<ErrorBody>(types);
    let id = json!([{"name": "id", "in": "path", "required": true, "schema": {"type": "string"}}]);
    json!({
        "/v1/chat/completions": {"post": posts("Answer a chat", &chat, &chat_answer, &error)},
        "/v1/completions": {"post": posts("Continue a prompt", &completion, &completion_answer, &error)},
        "/tokenize": {"post": posts("Encode a text or a chat", &tokenize, &tokenize_answer, &error)},
        "/detokenize": {"post": posts("Decode token ids", &detokenize, &detokenize_answer, &error)},
        "/v1/models": {"get": gets("List the served model", &models, &error)},
        "/v1/models/{id}": {"get": with("parameters", id, gets("Describe a model", &model, &error))},
        "/health": {"get": plain("Tell whether requests are served")},
        "/ping": {"get": plain("Tell whether requests are served"),
                  "post": plain("Tell whether requests are served")},
        "/version": {"get": plain("Return the version")},
        "/load": {"get": plain("Return the number of requests in work")},
        "/metrics": {"get": plain("Return Prometheus metrics")},
        "/openapi.json": {"get": plain("Return this document")},
    })
}

fn schema<T: JsonSchema>(types: &mut SchemaGenerator) -> Value {
    types.subschema_for::<T>().to_value()
}

fn posts(summary: &str, request: &[Value], answer: &Value, error: &Value) -> Value {
    let body = json!({
        "required": true,
        "content": {"application/json": {"schema": {"type": "object", "allOf": request}}},
    });
    with("requestBody", body, gets(summary, answer, error))
}

fn gets(summary: &str, answer: &Value, error: &Value) -> Value {
    let mut responses = Map::new();
    responses.insert("200".to_owned(), content("The answer", answer));
    for (status, description) in [
        ("400", "A field is wrong or not supported"),
        ("401", "The key is missing or wrong"),
        ("404", "The model is not served"),
        ("408", "The body stopped coming"),
        ("413", "The body is too large"),
        ("429", "The queue is full"),
        ("500", "The engine failed"),
        ("503", "The server is ending"),
    ] {
        let description = match status {
            // Its body is a string, as vLLM's.
            "401" => json!({"description": description}),
            _ => content(description, error),
        };
        responses.insert(status.to_owned(), description);
    }
    json!({"summary": summary, "security": [{}, {"key": []}], "responses": responses})
}

fn content(description: &str, schema: &Value) -> Value {
    json!({"description": description, "content": {"application/json": {"schema": schema}}})
}

fn plain(summary: &str) -> Value {
    let responses = json!({"200": {"description": "OK"}, "503": {"description": "Not ready"}});
    json!({"summary": summary, "responses": responses})
}

fn with(key: &str, value: Value, mut operation: Value) -> Value {
    operation[key] = value;
    operation
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reference_in_the_document_resolves() {
        let document = describe();
        let text = document.to_string();
        for reference in text.split("\"$ref\":\"#").skip(1) {
            let pointer = reference.split('"').next().unwrap();
            assert!(document.pointer(pointer).is_some(), "{pointer}");
        }
        assert!(text.contains("/components/schemas/SamplingFields"));
    }
}
