//! The conversations that are compared, in the three forms that the renderers take.

use serde_json::{Value, json};

use crate::text::{Conversation, Message, Role, TextError, python_json};

/// A turn of a sample.
#[derive(Debug, Clone)]
enum Turn {
    User(&'static str),
    Assistant(&'static str),
    /// Calls of tools: (name, arguments).
    Calls(Vec<(&'static str, Value)>),
    /// Results of those calls.
    Results(Vec<&'static str>),
}

/// A conversation that ends with a question or with results of tools.
#[derive(Debug, Clone)]
pub(super) struct Sample {
    pub(super) name: &'static str,
    system: Option<&'static str>,
    tools: Option<Vec<Value>>,
    turns: Vec<Turn>,
}

/// Returns the samples; those with tools only where tools are compared.
pub(super) fn samples(with_tools: bool) -> Vec<Sample> {
    let sample = |name, system, turns: &[Turn]| Sample {
        name,
        system,
        tools: None,
        turns: turns.to_vec(),
    };
    let question = Turn::User("Who are you?");
    let several = [
        question.clone(),
        Turn::Assistant("I am a model.\n\nAsk me."),
        Turn::User("  你好, what's 2 + 2?\n"),
    ];
    let system = Some("Answer in one sentence.");
    let mut all = vec![
        sample("a question", None, &several[..1]),
        sample("a question under a system prompt", system, &several[..1]),
        sample("several turns", None, &several),
        sample("several turns under a system prompt", system, &several),
    ];
    if !with_tools {
        return all;
    }
    let tools = Some(vec![tool("get_weather", "city"), tool("get_time", "zone")]);
    let one = vec![("get_weather", json!({"city": "Paris", "days": 2}))];
    let two = vec![
        ("get_weather", json!({"city": "北京"})),
        ("get_time", json!({"zone": "UTC+8"})),
    ];
    let with_tools = |name, system, turns: &[Turn]| Sample {
        tools: tools.clone(),
        ..sample(name, system, turns)
    };
    let called = [
        question.clone(),
        Turn::Calls(one),
        Turn::Results(vec!["{\"sky\": \"blue\"}"]),
    ];
    all.push(with_tools("tools", None, &[question.clone()]));
    all.push(with_tools(
        "tools under a system prompt",
        system,
        &[question.clone()],
    ));
    all.push(with_tools("a call of a tool", None, &called));
    all.push(with_tools(
        "two calls at once",
        system,
        &[
            question,
            Turn::Calls(two),
            Turn::Results(vec!["sunny", "12:00"]),
        ],
    ));
    all
}

fn tool(name: &str, parameter: &str) -> Value {
    json!({
        "type": "function",
        "function": {
            "name": name,
            "description": format!("Tells it for a {parameter}."),
            "parameters": {
                "type": "object",
                "properties": { parameter: {"type": "string"} },
                "required": [parameter]
            }
        }
    })
}

impl Sample {
    pub(super) fn tools(&self) -> Option<&[Value]> {
        self.tools.as_deref()
    }

    /// Returns the sample as a conversation of a data set.
    pub(super) fn conversation(&self) -> Result<Conversation, TextError> {
        let mut messages = Vec::new();
        for turn in &self.turns {
            messages.push(match turn {
                Turn::User(text) => Message::new(Role::User, *text),
                Turn::Assistant(text) => Message::new(Role::Assistant, *text),
                Turn::Calls(calls) => {
                    let calls: Vec<Value> = calls
                        .iter()
                        .map(|(name, arguments)| json!({"name": name, "arguments": arguments}))
                        .collect();
                    Message::new(Role::Function, python_json(&Value::Array(calls))?)
                }
                // Data sets join the results of one round so.
                Turn::Results(results) => Message::new(
                    Role::Observation,
                    results.join("\n</tool_response>\n<tool_response>\n"),
                ),
            });
        }
        let tools = self.tools.as_ref().map(|tools| Value::Array(tools.clone()));
        Ok(Conversation {
            system: self.system.map(str::to_owned),
            tools: tools.as_ref().map(python_json).transpose()?,
            messages,
        })
    }

    /// Returns the messages of a chat request.
    pub(super) fn chat_messages(&self) -> Vec<Value> {
        let mut messages = Vec::new();
        if let Some(system) = self.system {
            messages.push(json!({"role": "system", "content": system}));
        }
        for turn in &self.turns {
            match turn {
                Turn::User(text) => messages.push(json!({"role": "user", "content": text})),
                Turn::Assistant(text) => {
                    messages.push(json!({"role": "assistant", "content": text}));
                }
                Turn::Calls(calls) => {
                    let call = |(name, arguments): &(&str, Value)| {
                        let function = json!({"name": name, "arguments": arguments});
                        json!({"type": "function", "function": function})
                    };
                    let calls: Vec<Value> = calls.iter().map(call).collect();
                    messages.push(json!({"role": "assistant", "content": "", "tool_calls": calls}));
                }
                Turn::Results(results) => messages.extend(
                    results
                        .iter()
                        .map(|text| json!({"role": "tool", "content": text})),
                ),
            }
        }
        messages
    }

    /// Returns the variables that Ollama gives a `TEMPLATE`; `system` is the Modelfile's.
    pub(super) fn ollama_data(&self, system: &str) -> Value {
        let messages = self.chat_messages().into_iter().map(|mut message| {
            let mut ollama = json!({
                "Role": message["role"].take(),
                "Content": message["content"].take(),
                "Thinking": "",
                "ToolCalls": [],
            });
            for call in message["tool_calls"].as_array().into_iter().flatten() {
                let function = &call["function"];
                let function =
                    json!({"Name": function["name"], "Arguments": function["arguments"]});
                if let Some(calls) = ollama["ToolCalls"].as_array_mut() {
                    calls.push(json!({ "Function": function }));
                }
            }
            ollama
        });
        let tools = self.tools.iter().flatten();
        let tools = tools.map(|tool| json!({"Type": "function", "Function": tool["function"]}));
        json!({
            "System": self.system.unwrap_or(system),
            "Messages": messages.collect::<Vec<_>>(),
            "Tools": tools.collect::<Vec<_>>(),
            "IsThinkSet": false,
            "Think": false,
        })
    }
}
