//! Descriptions of tools and calls of tools as the models' formats write them.
//!
//! Values are written as Python's `json.dumps(…, ensure_ascii=False)` writes them, since that is
//! what the models saw. Texts: LLaMA-Factory's `data/tool_utils.py`.

use minijinja::Value as JinjaValue;
use minijinja::value::Serde;
use serde_json::Value;

use super::thought;
use crate::text::TextError;
use crate::text::chat_template::python::{JsonStyle, to_json, to_str};

const CALL_OPEN: &str = "<tool_call>";
const CALL_CLOSE: &str = "</tool_call>";

/// A way to write tools.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ToolFormat {
    /// `Action: …`, `Action Input: …`: LLaMA-Factory's `default`.
    React,
    /// Hermes' `<tools>` and `<tool_call>`.
    Qwen,
    /// The same; a description that is wrapped as a function already is wrapped again.
    Qwen092,
    /// Llama 3.1's JSON in the system prompt.
    Llama3,
}

impl ToolFormat {
    /// Returns the text that describes tools, for behind the system prompt; `tools` is the text of
    /// a JSON list, `date` today's date in the words of `%d %b %Y`.
    ///
    /// # Errors
    /// Text that is not a JSON list of objects, or tools without what the format has to tell.
    pub(super) fn describe_tools(self, tools: &str, date: &str) -> Result<String, TextError> {
        let parsed: Value = serde_json::from_str(tools)
            .map_err(|error| invalid_tools(&format!("is not JSON ({error})")))?;
        let list = parsed
            .as_array()
            .ok_or_else(|| invalid_tools("is not a JSON list"))?;
        if let Some(index) = list.iter().position(|tool| !tool.is_object()) {
            return Err(invalid_tools(&format!(
                "has an entry {index} that is not an object"
            )));
        }
        if list.is_empty() {
            return Ok(String::new());
        }
        match self {
            Self::React => react_tools(list),
            Self::Qwen | Self::Qwen092 => {
                let mut text = String::from(QWEN_TOOLS_BEFORE);
                for tool in list {
                    text.push('\n');
                    text.push_str(&json(&self.wrap(tool), None)?);
                }
                text.push_str(QWEN_TOOLS_AFTER);
                Ok(text)
            }
            Self::Llama3 => {
                let mut text =
                    format!("Cutting Knowledge Date: December 2023\nToday Date: {date}\n\n");
                text.push_str(LLAMA3_TOOLS);
                for tool in list {
                    text.push_str(&json(&self.wrap(tool), Some("    "))?);
                    text.push_str("\n\n");
                }
                Ok(text)
            }
        }
    }

    /// Returns the answer that makes the calls of a function message; a thought or a text around
    /// the calls is put before them.
    ///
    /// # Errors
    /// Calls that are not JSON, or not objects with `name` and `arguments`.
    pub(super) fn write_calls(self, content: &str) -> Result<String, TextError> {
        let (before, calls) =
            if let Some((start, end)) = thought::find_between(content, CALL_OPEN, CALL_CLOSE) {
                let inside = &content[start + CALL_OPEN.len()..end - CALL_CLOSE.len()];
                (
                    content.replace(&content[start..end], ""),
                    parse_calls(inside)?,
                )
            } else if let Some((start, end)) = thought::find(content) {
                let thought = &content[start..end];
                (
                    thought.to_owned(),
                    parse_calls(&content.replace(thought, ""))?,
                )
            } else {
                (String::new(), parse_calls(content)?)
            };
        Ok(before + &self.join_calls(&calls)?)
    }

    fn join_calls(self, calls: &[(String, Value)]) -> Result<String, TextError> {
        let object = |arguments_key: &str, (name, arguments): &(String, Value)| serde_json::json!({ "name": name, arguments_key: arguments });
        match self {
            Self::React => {
                let lines = calls.iter().map(|(name, arguments)| {
                    let arguments = json(arguments, None)?;
                    Ok(format!("Action: {name}\nAction Input: {arguments}"))
                });
                Ok(lines.collect::<Result<Vec<_>, TextError>>()?.join("\n"))
            }
            Self::Qwen | Self::Qwen092 => {
                let lines = calls.iter().map(|call| {
                    let call = json(&object("arguments", call), None)?;
                    Ok(format!("{CALL_OPEN}\n{call}\n{CALL_CLOSE}"))
                });
                Ok(lines.collect::<Result<Vec<_>, TextError>>()?.join("\n"))
            }
            Self::Llama3 => {
                let mut objects: Vec<Value> = calls
                    .iter()
                    .map(|call| object("parameters", call))
                    .collect();
                match objects.len() {
                    1 => json(&objects.remove(0), None),
                    _ => json(&Value::Array(objects), None),
                }
            }
        }
    }

    /// Returns `{"type": "function", "function": tool}`, unless the tool is that already.
    fn wrap(self, tool: &Value) -> Value {
        if self != Self::Qwen092 && is_wrapped(tool) {
            return tool.clone();
        }
        serde_json::json!({ "type": "function", "function": tool })
    }
}

fn is_wrapped(tool: &Value) -> bool {
    tool.get("type").and_then(Value::as_str) == Some("function")
}

/// Returns `json.dumps(value, ensure_ascii=False)` of Python.
///
/// # Errors
/// [`TextError::InvalidMessages`]: more than 100 levels or 32 MiB of text.
pub fn python_json(value: &Value) -> Result<String, TextError> {
    json(value, None)
}

/// Returns the JSON of a value as Python writes it, with line breaks if there is an indent.
fn json(value: &Value, indent: Option<&str>) -> Result<String, TextError> {
    let style = JsonStyle {
        indent: indent.map(str::to_owned),
        item_separator: if indent.is_some() { "," } else { ", " }.to_owned(),
        key_separator: ": ".to_owned(),
        sort_keys: false,
        ensure_ascii: false,
    };
    to_json(&JinjaValue::from(Serde(value)), &style)
        .map_err(|error| invalid_tools(&error.to_string()))
}

fn invalid_tools(why: &str) -> TextError {
    TextError::InvalidMessages {
        message: format!(
            "the description of tools {why}; wanted a JSON list of functions, each with name, \
             description and parameters"
        ),
    }
}

fn parse_calls(text: &str) -> Result<Vec<(String, Value)>, TextError> {
    let invalid = |why: String| TextError::InvalidMessages {
        message: format!(
            "the function message {text:?} {why}; wanted {{\"name\": …, \"arguments\": …}} or a \
             list of such"
        ),
    };
    let parsed: Value =
        serde_json::from_str(text).map_err(|error| invalid(format!("is not JSON ({error})")))?;
    let calls = match parsed {
        Value::Array(calls) => calls,
        call => vec![call],
    };
    calls
        .into_iter()
        .map(|mut call| {
            let name = call.get("name").and_then(Value::as_str).map(str::to_owned);
            let arguments = call.get_mut("arguments").map(Value::take);
            name.zip(arguments)
                .ok_or_else(|| invalid("has a call without name or arguments".to_owned()))
        })
        .collect()
}

fn react_tools(tools: &[Value]) -> Result<String, TextError> {
    let mut text = String::from("You have access to the following tools:\n");
    let mut names = Vec::new();
    for tool in tools {
        let tool = if is_wrapped(tool) {
            &tool["function"]
        } else {
            tool
        };
        let name = tool["name"]
            .as_str()
            .ok_or_else(|| invalid_tools("has a tool without a name"))?;
        let properties = tool["parameters"]["properties"]
            .as_object()
            .ok_or_else(|| invalid_tools("has a tool without parameters.properties"))?;
        text.push_str(&format!(
            "> Tool Name: {name}\nTool Description: {}\nTool Args:\n",
            plain(tool.get("description"))?
        ));
        let required = tool["parameters"]["required"].as_array();
        for (name, parameter) in properties {
            let is_required = required.is_some_and(|list| list.iter().any(|item| item == name));
            text.push_str(&react_parameter(name, parameter, is_required)?);
        }
        text.push('\n');
        names.push(name);
    }
    text.push_str("Use the following format if using a tool:\n```\nAction: tool name (one of [");
    text.push_str(&names.join(", "));
    text.push_str(REACT_AFTER_NAMES);
    Ok(text)
}

fn react_parameter(name: &str, parameter: &Value, required: bool) -> Result<String, TextError> {
    let choices = parameter["enum"].as_array().filter(|list| !list.is_empty());
    let choices = choices.map_or(Ok(String::new()), |choices| {
        let choices = choices.iter().map(|choice| plain(Some(choice)));
        let choices = choices.collect::<Result<Vec<_>, _>>()?.join(", ");
        Ok::<_, TextError>(format!(", should be one of [{choices}]"))
    })?;
    let items = parameter["items"].as_object().filter(|map| !map.is_empty());
    let items = items.map_or(Ok(String::new()), |items| {
        let kind = plain(items.get("type"))?;
        Ok::<_, TextError>(format!(", where each item should be {kind}"))
    })?;
    Ok(format!(
        "  - {name} ({}{}): {}{choices}{items}\n",
        plain(parameter.get("type"))?,
        if required { ", required" } else { "" },
        plain(parameter.get("description"))?,
    ))
}

/// Returns Python's `str(value)`, nothing for an absent one.
fn plain(value: Option<&Value>) -> Result<String, TextError> {
    let Some(value) = value else {
        return Ok(String::new());
    };
    to_str(&JinjaValue::from(Serde(value))).map_err(|error| invalid_tools(&error.to_string()))
}

/// What stands before the descriptions in Hermes' format.
const QWEN_TOOLS_BEFORE: &str = "\n\n# Tools\n\n\
    You may call one or more functions to assist with the user query.\n\n\
    You are provided with function signatures within <tools></tools> XML tags:\n<tools>";

/// What stands behind the descriptions in Hermes' format.
const QWEN_TOOLS_AFTER: &str = "\n</tools>\n\n\
    For each function call, return a json object with function name and arguments within \
    <tool_call></tool_call> XML tags:\n<tool_call>\n\
    {\"name\": <function-name>, \"arguments\": <args-json-object>}\n</tool_call>";

/// What stands before the descriptions in Llama 3's format.
const LLAMA3_TOOLS: &str = "You have access to the following functions. \
    To call a function, please respond with JSON for a function call. \
    Respond in the format {\"name\": function name, \"parameters\": dictionary of argument name \
    and its value}. Do not use variables.\n\n";

/// What stands behind the names of the tools in the `Action:` format.
const REACT_AFTER_NAMES: &str = "])\n\
    Action Input: the input to the tool, in a JSON format representing the kwargs \
    (e.g. ```{\"input\": \"hello world\", \"num_beams\": 5}```)\n```\n";
