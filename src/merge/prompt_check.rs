//! Whether an exported model will be asked as it was taught.
//!
//! Sample conversations go through the training template, the exported chat template (vLLM,
//! transformers, `infold serve`) and the Modelfile (Ollama), and the token ids are compared. The
//! well-known case: trained with "You are a helpful assistant.", served with "You are Qwen, …".

mod samples;
#[cfg(test)]
mod tests;

use std::fmt;

use serde_json::{Map, Value};

use self::samples::{Sample, samples};
use super::default_system::default_system_of;
use super::go_template::{GoTemplate, GoTemplateError};
use super::modelfile::{Instruction, ModelfileError, parse_modelfile};
use crate::text::{
    AddSpecialTokens, ChatTemplate, RenderInput, TemplatePart, TextError, Thinking, Tokenizer,
    TrainingTemplate,
};

/// Characters shown on either side of a difference.
const CONTEXT_CHARS: usize = 40;

/// What is compared.
#[derive(Debug, Clone, Copy)]
pub struct PromptCheckInput<'a> {
    /// What the model was trained with.
    pub template: &'a TrainingTemplate,
    /// The exported tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// The exported chat template.
    pub chat_template: Option<&'a ChatTemplate>,
    /// Text of the exported Modelfile.
    pub modelfile: Option<&'a str>,
}

/// Who renders the prompt of a served model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PromptSource {
    /// The chat template.
    ChatTemplate,
    /// The Modelfile's `TEMPLATE` and `SYSTEM`.
    Modelfile,
}

impl fmt::Display for PromptSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ChatTemplate => "the chat template",
            Self::Modelfile => "the Modelfile",
        })
    }
}

/// A prompt that is not the one trained with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PromptDifference {
    /// The sample conversation.
    pub sample: &'static str,
    /// Who renders it otherwise.
    pub source: PromptSource,
    /// Index of the first token that differs.
    pub first_token: usize,
    /// The prompt trained with.
    pub trained: String,
    /// The prompt served with, or why there is none.
    pub served: Result<String, String>,
}

impl fmt::Display for PromptDifference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            sample,
            source,
            first_token,
            trained,
            served,
        } = self;
        match served {
            Err(why) => write!(f, "{sample}: {source} renders nothing: {why}"),
            Ok(served) if served == trained => write!(
                f,
                "{sample}: {source} renders the same text, cut into other tokens from token \
                 {first_token} on"
            ),
            Ok(served) => {
                let at = first_difference(trained, served);
                write!(
                    f,
                    "{sample}: {source} differs from token {first_token} on: trained with {:?}, \
                     served with {:?}",
                    excerpt(trained, at),
                    excerpt(served, at)
                )
            }
        }
    }
}

/// What a check found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PromptReport {
    /// Prompts compared.
    pub num_compared: usize,
    /// Those that differ.
    pub differences: Vec<PromptDifference>,
    /// What to do, if that is known.
    pub advice: Option<String>,
}

/// Errors of a check, other than differences.
#[derive(Debug, thiserror::Error)]
pub enum PromptCheckError {
    /// The training template or the tokenizer.
    #[error(transparent)]
    Text(#[from] TextError),
    /// The Modelfile.
    #[error(transparent)]
    Modelfile(#[from] ModelfileError),
    /// Its `TEMPLATE`.
    #[error(transparent)]
    GoTemplate(#[from] GoTemplateError),
}

/// Compares the prompts of sample conversations. Tools are among them if the training template
/// writes them as chat templates do.
///
/// Ollama itself writes the JSON of tools without blanks, which no `TEMPLATE` can change; it is
/// compared as if with blanks. The date that Llama 3 is told is left out of the comparison.
///
/// # Errors
/// A Modelfile that does not parse, or a training template that fails. A chat template or
/// `TEMPLATE` that fails on a sample is a difference.
pub fn check_prompts(input: &PromptCheckInput<'_>) -> Result<PromptReport, PromptCheckError> {
    let ollama = input.modelfile.map(OllamaPrompt::read).transpose()?;
    let mut report = PromptReport::default();
    for sample in samples(input.template.has_native_tools()) {
        let conversation = sample.conversation()?;
        let trained = input
            .template
            .render_prompt(input.tokenizer, &conversation)?;
        let trained_ids = input
            .template
            .encode_prompt(input.tokenizer, &conversation)?;
        let chat = input.chat_template.map(|template| {
            let rendered = render_chat(template, input.template, &sample);
            (PromptSource::ChatTemplate, rendered)
        });
        let modelfile = ollama.as_ref().map(|ollama| {
            let rendered = ollama.render(input, &sample);
            (PromptSource::Modelfile, rendered)
        });
        for (source, rendered) in chat.into_iter().chain(modelfile) {
            report.num_compared += 1;
            let first_token = match &rendered {
                Err(_) => 0,
                Ok(text) => {
                    let ids = input.tokenizer.encode(text, AddSpecialTokens::No)?;
                    match first_difference_of(&trained_ids, &ids) {
                        None => continue,
                        Some(first) => first,
                    }
                }
            };
            report.differences.push(PromptDifference {
                sample: sample.name,
                source,
                first_token,
                trained: trained.clone(),
                served: rendered,
            });
        }
    }
    report.advice = advice(input, &report)?;
    Ok(report)
}

/// Says what to do when the default system prompts differ.
fn advice(
    input: &PromptCheckInput<'_>,
    report: &PromptReport,
) -> Result<Option<String>, PromptCheckError> {
    let trained = input.template.default_system();
    let Some(chat_template) = input
        .chat_template
        .filter(|_| !report.differences.is_empty())
    else {
        return Ok(None);
    };
    let served = default_system_of(chat_template)?.unwrap_or_default();
    if served == trained {
        return Ok(None);
    }
    Ok(Some(if trained.is_empty() {
        format!(
            "the model was trained without a system prompt, and the chat template adds {served:?}: \
             send a system message, or train with default_system"
        )
    } else {
        format!(
            "--default-system {trained:?} writes the system prompt of the training into the chat \
             template and the Modelfile"
        )
    }))
}

fn render_chat(
    chat_template: &ChatTemplate,
    template: &TrainingTemplate,
    sample: &Sample,
) -> Result<String, String> {
    let mut kwargs = Map::new();
    if matches!(
        template.thinking(),
        Some(Thinking::Unset | Thinking::Disabled)
    ) {
        kwargs.insert("enable_thinking".to_owned(), Value::Bool(false));
    }
    let rendered = chat_template.render(&RenderInput {
        messages: &sample.chat_messages(),
        tools: sample.tools(),
        add_generation_prompt: true,
        kwargs: Some(&kwargs),
        ..RenderInput::default()
    });
    rendered.map_err(|error| error.to_string())
}

/// What Ollama takes from a Modelfile for a prompt.
struct OllamaPrompt {
    template: GoTemplate,
    system: String,
}

impl OllamaPrompt {
    fn read(modelfile: &str) -> Result<Self, PromptCheckError> {
        let instructions = parse_modelfile(modelfile)?;
        let last = |wanted: &str| {
            instructions
                .iter()
                .rev()
                .find_map(|instruction| match instruction {
                    Instruction::Other { name, value } if *name == wanted => Some(value.as_str()),
                    _ => None,
                })
        };
        Ok(Self {
            template: GoTemplate::parse(last("TEMPLATE").unwrap_or("{{ .Prompt }}"))?,
            system: last("SYSTEM").unwrap_or_default().to_owned(),
        })
    }

    fn render(&self, input: &PromptCheckInput<'_>, sample: &Sample) -> Result<String, String> {
        let is_off = matches!(
            input.template.thinking(),
            Some(Thinking::Unset | Thinking::Disabled)
        );
        let mut data = sample.ollama_data(&self.system);
        if is_off {
            data["IsThinkSet"] = Value::Bool(true);
        }
        let text = self
            .template
            .render(&data)
            .map_err(|error| error.to_string())?;
        // The engine puts the begin-of-sequence token before what a TEMPLATE renders.
        let has_bos = !input.template.slots(TemplatePart::Prefix).is_empty();
        let bos = input.tokenizer.bos_token().filter(|_| has_bos);
        let bos = bos.map_or("", |token| token.content.as_str());
        Ok(if text.starts_with(bos) {
            text
        } else {
            format!("{bos}{text}")
        })
    }
}

/// Returns the index of the first item that differs, or that only one list has.
fn first_difference_of(left: &[u32], right: &[u32]) -> Option<usize> {
    if left == right {
        return None;
    }
    let same = left.iter().zip(right).take_while(|(l, r)| l == r).count();
    Some(same)
}

/// Returns how many characters two texts begin with alike.
fn first_difference(left: &str, right: &str) -> usize {
    left.chars()
        .zip(right.chars())
        .take_while(|(l, r)| l == r)
        .count()
}

/// Returns the characters around a place.
fn excerpt(text: &str, at: usize) -> String {
    let start = at.saturating_sub(CONTEXT_CHARS / 2);
    text.chars().skip(start).take(CONTEXT_CHARS * 2).collect()
}
