//! Chat messages to the text of a prompt.
//!
//! Wire messages become the plain JSON that templates read; the text folder renders it.

use serde_json::{Map, Value, json};

use crate::text::{ChatTemplate, RenderInput};

use super::super::args::ContentFormat;
use super::super::error::ApiError;
use super::super::state::AppState;
use super::convert::text_error;
use super::types::{ChatMessage, TemplateFields};
use super::unions::{ContentPart, MessageContent};

/// Renders a chat to the prompt's text.
///
/// # Errors
/// No template, a template of the request without permission, parts that are not text, and all
/// that the template itself raises.
pub(in crate::serve) fn render_chat(
    state: &AppState,
    messages: &[ChatMessage],
    fields: &TemplateFields,
) -> Result<String, ApiError> {
    if messages.is_empty() {
        return Err(ApiError::invalid("messages", "messages must not be empty."));
    }
    let of_request = request_template(state, fields)?;
    let Some(template) = of_request.as_ref().or(state.chat_template.as_ref()) else {
        let message = "The model has no chat template; start the server with --chat-template, or \
                       use /v1/completions.";
        return Err(ApiError::invalid("messages", message));
    };
    let continue_final_message = fields.continue_final_message.unwrap_or(false);
    let add_generation_prompt = fields.add_generation_prompt.unwrap_or(true);
    if continue_final_message && add_generation_prompt {
        let message =
            "Cannot set both `continue_final_message` and `add_generation_prompt` to True.";
        return Err(ApiError::invalid("continue_final_message", message));
    }
    let messages = template_messages(state, messages)?;
    let kwargs = template_kwargs(state, fields);
    let input = RenderInput {
        messages: &messages,
        add_generation_prompt,
        continue_final_message,
        kwargs: Some(&kwargs),
        ..RenderInput::default()
    };
    template
        .render(&input)
        .map_err(|error| text_error("messages", &error))
}

fn request_template(
    state: &AppState,
    fields: &TemplateFields,
) -> Result<Option<ChatTemplate>, ApiError> {
    let Some(source) = &fields.chat_template else {
        return Ok(None);
    };
    if !state.options.trust_request_chat_template {
        let message = "Chat template is passed with request, but --trust-request-chat-template is \
                       not set. Refused request with untrusted chat template.";
        return Err(ApiError::invalid("chat_template", message));
    }
    ChatTemplate::compile(source, state.tokenizer.named_tokens())
        .map(Some)
        .map_err(|error| text_error("chat_template", &error))
}

fn template_kwargs(state: &AppState, fields: &TemplateFields) -> Map<String, Value> {
    let mut kwargs = state.options.chat_template_kwargs.clone();
    kwargs.extend(fields.chat_template_kwargs.clone().unwrap_or_default());
    kwargs
}

fn template_messages(state: &AppState, messages: &[ChatMessage]) -> Result<Vec<Value>, ApiError> {
    let convert = |(index, message)| template_message(state, index, message);
    messages.iter().enumerate().map(convert).collect()
}

/// Writes a message as templates expect it: absent fields are absent, not null.
fn template_message(
    state: &AppState,
    index: usize,
    message: &ChatMessage,
) -> Result<Value, ApiError> {
    let ChatMessage {
        role,
        content,
        name,
        tool_calls,
        tool_call_id,
        reasoning,
        reasoning_content,
    } = message;
    // Templates read one name or the other, as vLLM's answers did over time.
    let reasoning = reasoning.as_ref().or(reasoning_content.as_ref());
    if let Some(MessageContent::Parts(parts)) = content {
        check_parts(index, parts)?;
    }
    let mut object = Map::new();
    object.insert("role".to_owned(), json!(role));
    let content = match (content, state.options.content_format) {
        (None, _) => json!(""),
        (Some(content), ContentFormat::Openai) => content.parts(),
        (Some(content), ContentFormat::Auto | ContentFormat::String) => json!(content.text()),
    };
    object.insert("content".to_owned(), content);
    let texts = [
        ("name", name.as_ref()),
        ("tool_call_id", tool_call_id.as_ref()),
        ("reasoning", reasoning),
        ("reasoning_content", reasoning),
    ];
    for (key, value) in texts {
        if let Some(value) = value {
            object.insert(key.to_owned(), json!(value));
        }
    }
    if let Some(calls) = tool_calls.as_ref().filter(|calls| !calls.is_empty()) {
        object.insert(
            "tool_calls".to_owned(),
            calls.iter().map(with_parsed_arguments).collect(),
        );
    }
    Ok(Value::Object(object))
}

/// Turns a call's arguments from JSON text into JSON, the form that templates iterate over: none
/// where they are missing or no JSON, so that a chat can go on after such a call, as in vLLM.
fn with_parsed_arguments(call: &Value) -> Value {
    let mut call = call.clone();
    if let Some(Value::Object(function)) = call.get_mut("function") {
        let given = function.remove("arguments").unwrap_or_default();
        let parsed = match given {
            Value::String(text) => serde_json::from_str(&text).unwrap_or_default(),
            given => given,
        };
        let arguments = match parsed {
            Value::Object(_) | Value::Array(_) => parsed,
            _ => json!({}),
        };
        function.insert("arguments".to_owned(), arguments);
    }
    call
}

fn check_parts(index: usize, parts: &[ContentPart]) -> Result<(), ApiError> {
    let param = format!("messages.{index}.content");
    for part in parts {
        if !part.is_text() {
            let message = format!(
                "content parts of type `{}` are not supported by this server, only `text`.",
                part.kind.escape_debug()
            );
            return Err(ApiError::invalid(&param, message));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_that_are_no_json_are_none() {
        let arguments_of = |function: Value| {
            let call = with_parsed_arguments(&json!({"id": "1", "function": function}));
            assert_eq!(call["id"], "1");
            call["function"]["arguments"].clone()
        };
        let given = |arguments: Value| arguments_of(json!({"name": "f", "arguments": arguments}));
        assert_eq!(given(json!("{\"a\": 1}")), json!({"a": 1}));
        assert_eq!(given(json!({"a": 1})), json!({"a": 1}));
        for bad in [json!(""), json!("{bad"), json!("3"), Value::Null] {
            assert_eq!(given(bad), json!({}));
        }
        assert_eq!(arguments_of(json!({"name": "f"})), json!({}));
    }
}
