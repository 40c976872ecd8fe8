//! The prompts that a model is trained on: LLaMA-Factory's slot templates as data.
//!
//! A template turns a conversation into elements, and each element is tokenised by itself, so that
//! the border between what is given and what is learned is a token border. The chat template of a
//! served model ([`crate::text::ChatTemplate`]) renders one text instead; `merge` compares the two.
//! Behaviour: LLaMA-Factory 0.9.5, `data/template.py` and `data/formatter.py`; `qwen@0.9.2` is what
//! 0.9.2 called `qwen`, but for thoughts and texts around calls of tools, which it treated otherwise.
//! One habit is left out: it replaces the text `{{idx}}` that a user writes by the turn's number.

mod conversation;
mod encode;
mod record;
mod registry;
#[cfg(test)]
mod tests;
mod thought;
mod tools;

use std::borrow::Cow;

pub use self::conversation::{Conversation, Message, Role};
pub use self::encode::EncodedTurn;
pub use self::record::{TEMPLATE_RECORD_FILE, TemplateRecord};
use self::tools::ToolFormat;
pub use self::tools::python_json;
use super::{TextError, Tokenizer};

/// Marks where the content goes in a [`Slot::Text`].
const CONTENT: &str = "{{content}}";

/// A piece of a template: what is put before, around or behind a content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Slot {
    /// Text, the first `{{content}}` in it replaced. It is tokenised in one go.
    Text(&'static str),
    /// The begin-of-sequence token, nothing if the tokenizer has none.
    Bos,
    /// The end-of-sequence token.
    Eos,
}

/// What a reasoning template does with an answer that has no thought: LLaMA-Factory's
/// `enable_thinking`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Thinking {
    /// `true`, the default: an empty thought is put before it and learned.
    Enabled,
    /// `null`: thoughts stay, and an empty one belongs to the prompt.
    Unset,
    /// `false`: thoughts are removed, and an empty one belongs to the prompt.
    Disabled,
}

/// Whether thoughts of earlier answers are kept: LLaMA-Factory's `preserve_thinking`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ThoughtHistory {
    /// As the chat templates of reasoning models do.
    Dropped,
    /// For models that were trained with them.
    Kept,
}

/// A training template. [`TrainingTemplate::named`] finds one; the `with_` functions change a copy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrainingTemplate {
    name: &'static str,
    prefix: &'static [Slot],
    system: &'static [Slot],
    user: &'static [Slot],
    assistant: &'static [Slot],
    observation: &'static [Slot],
    function: &'static [Slot],
    tool_format: ToolFormat,
    default_system: Cow<'static, str>,
    stop_words: &'static [&'static str],
    replaces_eos: bool,
    efficient_eos: bool,
    thinking: Option<Thinking>,
    thought_history: ThoughtHistory,
}

impl TrainingTemplate {
    /// Returns the template of this name.
    ///
    /// # Errors
    /// [`TextError::UnknownTrainingTemplate`] with the nearest name and all that there are.
    pub fn named(name: &str) -> Result<&'static Self, TextError> {
        registry::find(name)
    }

    /// Returns the names of all templates.
    pub fn names() -> impl Iterator<Item = &'static str> {
        registry::TEMPLATES.iter().map(|template| template.name)
    }

    /// Returns a copy that uses this system prompt where a conversation has none.
    #[must_use]
    pub fn with_default_system(&self, default_system: &str) -> Self {
        Self {
            default_system: Cow::Owned(default_system.to_owned()),
            ..self.clone()
        }
    }

    /// Returns a copy that treats thoughts so; a template without reasoning stays as it is.
    #[must_use]
    pub fn with_thinking(&self, thinking: Thinking, history: ThoughtHistory) -> Self {
        Self {
            thinking: self.thinking.map(|_| thinking),
            thought_history: history,
            ..self.clone()
        }
    }

    /// Returns the name.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Returns the system prompt of a conversation without one; empty for none.
    pub fn default_system(&self) -> &str {
        &self.default_system
    }

    /// Returns the words that end an answer.
    pub fn stop_words(&self) -> &'static [&'static str] {
        self.stop_words
    }

    /// Returns whether the template writes tools as the models' own chat templates do.
    pub fn has_native_tools(&self) -> bool {
        self.tool_format != ToolFormat::React
    }

    /// Returns what is done with thoughts; nothing for a template without reasoning.
    pub fn thinking(&self) -> Option<Thinking> {
        self.thinking
    }

    /// Returns whether thoughts of earlier answers are kept.
    pub fn thought_history(&self) -> ThoughtHistory {
        self.thought_history
    }

    /// Returns whether one end-of-sequence token is put behind the whole conversation instead of
    /// one behind each answer.
    pub fn efficient_eos(&self) -> bool {
        self.efficient_eos
    }

    /// Returns the stop words that are no tokens of a tokenizer, such as those of another family of
    /// models. An answer would end with pieces of text that no engine stops at.
    pub fn missing_stop_words(&self, tokenizer: &Tokenizer) -> Vec<&'static str> {
        let words = self.stop_words.iter().copied();
        words
            .filter(|word| tokenizer.token_id(word).is_none())
            .collect()
    }

    /// Returns the text of the end-of-sequence token that training uses: the first stop word where
    /// the template replaces the tokenizer's own, else that one, else `<|endoftext|>`.
    pub fn eos_token<'a>(&self, tokenizer: &'a Tokenizer) -> Cow<'a, str> {
        match (self.replaced_eos(), tokenizer.eos_token()) {
            (Some(word), _) => Cow::Borrowed(word),
            (None, Some(token)) => Cow::Borrowed(&token.content),
            (None, None) => Cow::Borrowed("<|endoftext|>"),
        }
    }

    /// Returns the word that the template puts in the place of the tokenizer's end-of-sequence
    /// token; nothing for a template that uses the tokenizer's own.
    pub fn replaced_eos(&self) -> Option<&'static str> {
        let word = self.stop_words.first().copied();
        word.filter(|_| self.replaces_eos)
    }

    /// Returns the slots around a part of a conversation, for a program that writes templates of
    /// its own from them.
    pub fn slots(&self, part: TemplatePart) -> &'static [Slot] {
        match part {
            TemplatePart::Prefix => self.prefix,
            TemplatePart::System => self.system,
            TemplatePart::User => self.user,
            TemplatePart::Assistant => self.assistant,
            TemplatePart::Observation => self.observation,
        }
    }
}

/// A part of a conversation that has slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TemplatePart {
    /// Before everything.
    Prefix,
    /// The system prompt and descriptions of tools.
    System,
    /// A question and the header of its answer.
    User,
    /// An answer.
    Assistant,
    /// The result of a tool and the header of the answer.
    Observation,
}
