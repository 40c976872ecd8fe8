//! Rows to conversations: alpaca, ShareGPT and OpenAI messages, as LLaMA-Factory reads them.
//!
//! A row that LLaMA-Factory would drop, or stumble over, becomes a [`DropReason`] that names the
//! field. Two of its warts are left out: call arguments that are JSON inside a string are
//! unwrapped, since a template would quote them twice, and an OpenAI system prompt gets no
//! "detailed thinking off" appended, which only one model family knows.

use serde_json::{Map, Value};

use crate::text::{Conversation, Message, Role, python_json};

use super::file::kind;
use super::info::{DatasetSpec, Formatting};

/// Why a row is not learned from.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DropReason {
    /// The file's format makes no row of it.
    #[error("{0}")]
    Malformed(String),
    /// A field is absent or null.
    #[error("`{field}` is missing")]
    MissingField {
        /// The column or key.
        field: String,
    },
    /// A field is of another type.
    #[error("`{field}` is {found} instead of {wanted}")]
    WrongType {
        /// The column or key.
        field: String,
        /// What it should be.
        wanted: &'static str,
        /// What it is.
        found: &'static str,
    },
    /// A role stands where another must.
    #[error("Invalid role tag \"{found}\" where {wanted} must speak")]
    InvalidRole {
        /// The role found.
        found: String,
        /// The roles that may stand there.
        wanted: String,
    },
    /// The turns do not come in pairs.
    #[error("Invalid message count: the last turn is not the model's")]
    MessageCount,
    /// There is no turn.
    #[error("`{field}` is an empty list")]
    NoMessages {
        /// The column.
        field: String,
    },
    /// An image, video or sound belongs to the row.
    #[error("`{field}` holds media; text alone is learned from")]
    Media {
        /// The column.
        field: String,
    },
}

type Row = Map<String, Value>;

/// Returns the conversation of a row.
///
/// # Errors
/// [`DropReason`] when the row is not one.
pub(super) fn convert(row: &Row, spec: &DatasetSpec) -> Result<Conversation, DropReason> {
    for field in &spec.columns.media {
        let empty = match row.get(field) {
            None | Some(Value::Null) => true,
            Some(Value::Array(items)) => items.is_empty(),
            Some(_) => false,
        };
        if !empty {
            return Err(DropReason::Media {
                field: field.clone(),
            });
        }
    }
    let (system, messages) = match spec.formatting {
        Formatting::Alpaca => (None, alpaca(row, spec)?),
        Formatting::Sharegpt | Formatting::Openai => turns(row, spec)?,
    };
    let system = match system {
        Some(system) => Some(system),
        None => optional_text(row, spec.columns.system.as_deref())?,
    };
    Ok(Conversation {
        // An empty system prompt means the template's default, as in LLaMA-Factory.
        system: system.filter(|system| !system.is_empty()),
        tools: tools(row, spec)?.filter(|tools| !tools.is_empty()),
        messages,
    })
}

fn alpaca(row: &Row, spec: &DatasetSpec) -> Result<Vec<Message>, DropReason> {
    let columns = &spec.columns;
    let mut messages = history(row, columns.history.as_deref())?;
    let prompt = optional_text(row, columns.prompt.as_deref())?;
    let query = optional_text(row, columns.query.as_deref())?;
    if let (Some(field), None, None) = (&columns.prompt, &prompt, &query) {
        return Err(missing(field));
    }
    let parts: Vec<String> = [prompt, query]
        .into_iter()
        .flatten()
        .filter(|part| !part.is_empty())
        .collect();
    messages.push(Message::new(Role::User, parts.join("\n")));
    let response = columns.response.as_deref();
    let field = response.unwrap_or("response");
    let answer = optional_text(row, response)?.ok_or_else(|| missing(field))?;
    messages.push(Message::new(Role::Assistant, answer));
    Ok(messages)
}

/// Reads earlier turns; anything but a list means none, as in LLaMA-Factory.
fn history(row: &Row, field: Option<&str>) -> Result<Vec<Message>, DropReason> {
    let Some((field, Value::Array(pairs))) = field.and_then(|field| Some((field, row.get(field)?)))
    else {
        return Ok(Vec::new());
    };
    let mut messages = Vec::new();
    for pair in pairs {
        let Some([Value::String(prompt), Value::String(response)]) =
            pair.as_array().map(Vec::as_slice)
        else {
            return Err(DropReason::WrongType {
                field: field.to_owned(),
                wanted: "a list of pairs of strings",
                found: "a list of something else",
            });
        };
        messages.push(Message::new(Role::User, prompt.clone()));
        messages.push(Message::new(Role::Assistant, response.clone()));
    }
    Ok(messages)
}

/// Reads a list of turns with its leading system prompt.
fn turns(row: &Row, spec: &DatasetSpec) -> Result<(Option<String>, Vec<Message>), DropReason> {
    let field = spec.columns.messages.as_deref().unwrap_or("messages");
    let parsed;
    let list = match row.get(field) {
        None | Some(Value::Null) => return Err(missing(field)),
        Some(Value::Array(list)) => list,
        // CSV has no lists, so a column of them holds JSON.
        Some(Value::String(text)) => {
            parsed = serde_json::from_str::<Vec<Value>>(text)
                .map_err(|_| wrong_type(field, "a list of turns", &Value::String(String::new())))?;
            &parsed
        }
        Some(other) => return Err(wrong_type(field, "a list of turns", other)),
    };
    let mut list = list.as_slice();
    let mut system = None;
    if let (Some(tag), Some(first)) = (&spec.tags.system, list.first())
        && role(first, spec)? == tag
    {
        system = Some(content(first, spec)?);
        list = &list[1..];
    }
    if list.is_empty() {
        return Err(DropReason::NoMessages {
            field: field.to_owned(),
        });
    }
    let messages = match spec.formatting {
        Formatting::Openai => openai_messages(list, spec)?,
        Formatting::Sharegpt | Formatting::Alpaca => sharegpt_messages(list, spec)?,
    };
    check_order(&messages, spec)?;
    Ok((system, messages))
}

fn sharegpt_messages(list: &[Value], spec: &DatasetSpec) -> Result<Vec<Message>, DropReason> {
    let mut messages = Vec::with_capacity(list.len());
    for (index, turn) in list.iter().enumerate() {
        let role = role_of(role(turn, spec)?, index, spec)?;
        messages.push(Message::new(role, content(turn, spec)?));
    }
    Ok(messages)
}

/// Reads OpenAI messages: calls become one function turn, results in a row become one observation.
fn openai_messages(list: &[Value], spec: &DatasetSpec) -> Result<Vec<Message>, DropReason> {
    let mut messages: Vec<Message> = Vec::with_capacity(list.len());
    let mut results_in_a_row = false;
    for turn in list {
        let role = role_of(role(turn, spec)?, messages.len(), spec)?;
        let calls = turn.get("tool_calls").filter(|calls| match calls {
            Value::Array(calls) => !calls.is_empty(),
            _ => false,
        });
        let message = match (role, calls) {
            (Role::Assistant | Role::Function, Some(calls)) => {
                Message::new(Role::Function, call_list(calls)?)
            }
            _ => Message::new(role, content(turn, spec)?),
        };
        match messages.last_mut() {
            Some(last) if results_in_a_row && role == Role::Observation => {
                last.content
                    .push_str("\n</tool_response>\n<tool_response>\n");
                last.content.push_str(&message.content);
            }
            _ => messages.push(message),
        }
        results_in_a_row = role == Role::Observation;
    }
    Ok(messages)
}

/// Returns the calls as the JSON list that templates expect: `[{"name": …, "arguments": {…}}]`.
fn call_list(calls: &Value) -> Result<String, DropReason> {
    let mut list = Vec::new();
    for call in calls.as_array().into_iter().flatten() {
        let mut function = call
            .get("function")
            .ok_or_else(|| missing("tool_calls.function"))?
            .clone();
        if let Some(Value::String(text)) = function.get("arguments")
            && let Ok(arguments @ Value::Object(_)) = serde_json::from_str(text)
        {
            function["arguments"] = arguments;
        }
        list.push(function);
    }
    json_text(&Value::Array(list))
}

/// Checks that the person or a tool speaks at even positions and the model at odd ones.
fn check_order(messages: &[Message], spec: &DatasetSpec) -> Result<(), DropReason> {
    for (index, message) in messages.iter().enumerate() {
        let models = matches!(message.role, Role::Assistant | Role::Function);
        if models != (index % 2 == 1) {
            return Err(DropReason::InvalidRole {
                found: tag_of(message.role, spec).to_owned(),
                wanted: wanted_at(index, spec),
            });
        }
    }
    if messages.len() % 2 == 1 {
        return Err(DropReason::MessageCount);
    }
    Ok(())
}

fn role_of(tag: &str, index: usize, spec: &DatasetSpec) -> Result<Role, DropReason> {
    [
        Role::User,
        Role::Assistant,
        Role::Observation,
        Role::Function,
    ]
    .into_iter()
    .find(|role| tag_of(*role, spec) == tag)
    .ok_or_else(|| DropReason::InvalidRole {
        found: tag.to_owned(),
        wanted: wanted_at(index, spec),
    })
}

fn tag_of(role: Role, spec: &DatasetSpec) -> &str {
    match role {
        Role::User => &spec.tags.user,
        Role::Assistant => &spec.tags.assistant,
        Role::Observation => &spec.tags.observation,
        Role::Function => &spec.tags.function,
    }
}

fn wanted_at(index: usize, spec: &DatasetSpec) -> String {
    let tags = &spec.tags;
    if index.is_multiple_of(2) {
        format!("\"{}\" or \"{}\"", tags.user, tags.observation)
    } else {
        format!("\"{}\" or \"{}\"", tags.assistant, tags.function)
    }
}

fn role<'a>(turn: &'a Value, spec: &DatasetSpec) -> Result<&'a str, DropReason> {
    match turn.get(&spec.tags.role) {
        Some(Value::String(role)) => Ok(role),
        None | Some(Value::Null) => Err(missing(&spec.tags.role)),
        Some(other) => Err(wrong_type(&spec.tags.role, "a string", other)),
    }
}

fn content(turn: &Value, spec: &DatasetSpec) -> Result<String, DropReason> {
    let field = &spec.tags.content;
    match turn.get(field) {
        Some(Value::String(content)) => Ok(content.clone()),
        None | Some(Value::Null) => Err(missing(field)),
        Some(Value::Array(parts)) if spec.formatting == Formatting::Openai => parts
            .iter()
            .map(|part| match part.get("text") {
                Some(Value::String(text)) => Ok(text.as_str()),
                _ => Err(DropReason::Media {
                    field: field.clone(),
                }),
            })
            .collect(),
        Some(other) => Err(wrong_type(field, "a string", other)),
    }
}

/// Returns the descriptions of tools as JSON text.
fn tools(row: &Row, spec: &DatasetSpec) -> Result<Option<String>, DropReason> {
    let Some(field) = spec.columns.tools.as_deref() else {
        return Ok(None);
    };
    match row.get(field) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(list @ (Value::Array(_) | Value::Object(_))) => json_text(list).map(Some),
        Some(other) => Err(wrong_type(field, "JSON text", other)),
    }
}

fn optional_text(row: &Row, field: Option<&str>) -> Result<Option<String>, DropReason> {
    match field.and_then(|field| Some((field, row.get(field)?))) {
        None | Some((_, Value::Null)) => Ok(None),
        Some((_, Value::String(text))) => Ok(Some(text.clone())),
        Some((field, other)) => Err(wrong_type(field, "a string", other)),
    }
}

fn missing(field: &str) -> DropReason {
    DropReason::MissingField {
        field: field.to_owned(),
    }
}

fn wrong_type(field: &str, wanted: &'static str, found: &Value) -> DropReason {
    DropReason::WrongType {
        field: field.to_owned(),
        wanted,
        found: kind(found),
    }
}

/// Returns JSON as Python spaces it, which templates have seen.
fn json_text(value: &Value) -> Result<String, DropReason> {
    python_json(value).map_err(|error| DropReason::Malformed(error.to_string()))
}
