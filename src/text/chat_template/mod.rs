//! Messages to one prompt, as transformers' `apply_chat_template` renders them.
//!
//! The template is compiled once; a rendering takes plain JSON. It knows neither tokens nor
//! requests. Source of the behaviour: transformers' `chat_template_utils.py` (`render_jinja_template`).

mod environment;
mod fallback;
mod generation;
mod methods;
pub(super) mod python;
mod sources;
pub(super) mod strftime;
#[cfg(test)]
mod tests;

use std::error::Error as _;

use minijinja::{Environment, ErrorKind};
use serde_json::{Map, Value};

use self::environment::Raised;
pub use self::fallback::{
    fallback_template, fallback_template_for_architecture, fallback_template_names,
    resolve_chat_template,
};
pub use self::sources::ChatTemplateSources;
use super::{NamedToken, TextError};

/// Name of the one template in its environment.
const NAME: &str = "chat template";
/// Put behind the text to continue, to find its end in the rendered prompt.
const CONTINUE_TAG: &str = "CONTINUE_FINAL_MESSAGE_TAG ";
/// Names under which clients and templates keep a message's reasoning; the first is the standard.
const REASONING_FIELDS: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// What one rendering gets.
#[derive(Debug, Clone, Copy, Default)]
pub struct RenderInput<'a> {
    /// The conversation: objects with `role` and `content`.
    pub messages: &'a [Value],
    /// Function schemas the model may call.
    pub tools: Option<&'a [Value]>,
    /// Documents for retrieval.
    pub documents: Option<&'a [Value]>,
    /// Whether the prompt ends with the header of an answer.
    pub add_generation_prompt: bool,
    /// Whether the prompt ends inside the last message, for the model to go on with.
    pub continue_final_message: bool,
    /// Further variables (`enable_thinking`, …); they win over special tokens of the same name.
    pub kwargs: Option<&'a Map<String, Value>>,
}

/// A compiled chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    special_tokens: Vec<(String, String)>,
}

impl ChatTemplate {
    /// Compiles a template; `special_tokens` are its variables `bos_token`, `eos_token`, ….
    ///
    /// # Errors
    /// [`TextError::TemplateSyntax`] with the line.
    pub fn compile(source: &str, special_tokens: &[NamedToken]) -> Result<Self, TextError> {
        let mut environment = environment::environment().map_err(|error| syntax_error(&error))?;
        let renamed = generation::rename_generation_blocks(source);
        environment
            .add_template_owned(NAME, renamed)
            .map_err(|error| syntax_error(&error))?;
        Ok(Self {
            environment,
            source: source.to_owned(),
            special_tokens: special_tokens
                .iter()
                .map(|token| (token.name.clone(), token.content.clone()))
                .collect(),
        })
    }

    /// Returns the source that was compiled.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Renders a conversation.
    ///
    /// # Errors
    /// What the template raises, what fails in it (with the line), messages that are not objects or
    /// have no text to continue, more work than the limits allow.
    pub fn render(&self, input: &RenderInput<'_>) -> Result<String, TextError> {
        let mut messages = plain_messages(input.messages)?;
        let continued = if input.continue_final_message {
            Some(self.tag_final_message(&mut messages, input)?)
        } else {
            None
        };
        let prompt = self.render_messages(messages, input)?;
        match continued {
            Some(text) => cut_at_tag(&prompt, &text),
            None => Ok(prompt),
        }
    }

    fn render_messages(
        &self,
        messages: Vec<Value>,
        input: &RenderInput<'_>,
    ) -> Result<String, TextError> {
        let mut variables = Map::new();
        for (name, content) in &self.special_tokens {
            variables.insert(name.clone(), Value::from(content.as_str()));
        }
        for (name, value) in input.kwargs.into_iter().flatten() {
            variables.insert(name.clone(), value.clone());
        }
        // Templates test `tools is none`, so what is absent is none rather than undefined.
        let list =
            |values: Option<&[Value]>| values.map_or(Value::Null, |list| list.to_vec().into());
        variables.insert("messages".to_owned(), Value::from(messages));
        variables.insert("tools".to_owned(), list(input.tools));
        variables.insert("documents".to_owned(), list(input.documents));
        variables.insert(
            "add_generation_prompt".to_owned(),
            Value::from(input.add_generation_prompt),
        );
        environment::render(&self.environment, NAME, variables)
            .map_err(|error| render_error(&error))
    }

    /// Puts the tag behind the text to continue and returns that text.
    fn tag_final_message(
        &self,
        messages: &mut [Value],
        input: &RenderInput<'_>,
    ) -> Result<String, TextError> {
        if input.add_generation_prompt {
            return Err(invalid(
                "cannot set both continue_final_message and add_generation_prompt to true",
            ));
        }
        if !self.source.contains("content") {
            return Err(invalid(
                "continue_final_message is set but the chat template does not use \"content\"",
            ));
        }
        let last = messages.last_mut().ok_or_else(|| {
            invalid("continue_final_message is set but the conversation is empty")
        })?;
        let text = match &mut last["content"] {
            Value::String(text) => text,
            Value::Array(blocks) => blocks
                .iter_mut()
                .rev()
                .find_map(|block| match block.get_mut("text") {
                    Some(Value::String(text)) => Some(text),
                    _ => None,
                })
                .ok_or_else(no_text)?,
            _ => return Err(no_text()),
        };
        let original = text.clone();
        text.push_str(CONTINUE_TAG);
        Ok(original)
    }
}

fn invalid(message: &str) -> TextError {
    TextError::InvalidMessages {
        message: message.to_owned(),
    }
}

fn no_text() -> TextError {
    invalid("continue_final_message is set but the final message has no text content to continue")
}

/// Copies the messages, each an object, with its reasoning under every name templates read.
fn plain_messages(messages: &[Value]) -> Result<Vec<Value>, TextError> {
    let mut plain = Vec::with_capacity(messages.len());
    for (index, message) in messages.iter().enumerate() {
        let Value::Object(message) = message else {
            return Err(TextError::InvalidMessages {
                message: format!("messages[{index}] must be an object"),
            });
        };
        let reasoning = REASONING_FIELDS
            .iter()
            .find_map(|field| message.get(*field).filter(|value| !value.is_null()));
        let mut message = message.clone();
        if let Some(reasoning) = reasoning.cloned() {
            message
                .entry("thinking")
                .or_insert_with(|| reasoning.clone());
            message.insert("reasoning_content".to_owned(), reasoning);
        }
        plain.push(Value::Object(message));
    }
    Ok(plain)
}

/// Cuts the prompt behind the text to continue, without the whitespace that the template trimmed.
fn cut_at_tag(prompt: &str, text: &str) -> Result<String, TextError> {
    let text = methods::strip(text, None, methods::Ends::Both);
    let found = prompt.rfind(CONTINUE_TAG.trim_end());
    let Some(end) = found.filter(|_| prompt.contains(text)) else {
        return Err(invalid(
            "continue_final_message is set but the final message does not appear in the prompt: \
             the chat template leaves out a part of it",
        ));
    };
    if prompt[end..].starts_with(CONTINUE_TAG) {
        return Ok(prompt[..end].to_owned());
    }
    Ok(methods::strip(&prompt[..end], None, methods::Ends::Right).to_owned())
}

fn syntax_error(error: &minijinja::Error) -> TextError {
    TextError::TemplateSyntax {
        line: error.line().unwrap_or(0),
        message: describe(error),
    }
}

fn render_error(error: &minijinja::Error) -> TextError {
    let mut source = error.source();
    while let Some(inner) = source {
        if let Some(Raised(message)) = inner.downcast_ref::<Raised>() {
            return TextError::TemplateRaised {
                message: message.clone(),
            };
        }
        source = inner.source();
    }
    let line = error.line().unwrap_or(0);
    if error.kind() == ErrorKind::OutOfFuel {
        return TextError::TemplateTooExpensive {
            line,
            limit: "1,000,000 steps and 300 a message, 32 MiB a value, 100 levels",
        };
    }
    TextError::TemplateRender {
        line,
        message: describe(error),
    }
}

/// Says what an error is and about what, without the engine's dump of all variables.
fn describe(error: &minijinja::Error) -> String {
    match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    }
}
