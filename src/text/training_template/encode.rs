//! From a conversation to elements, and from elements to token ids or text.

use std::borrow::Cow;

use super::{
    CONTENT, Conversation, Message, Role, Slot, Thinking, ThoughtHistory, TrainingTemplate, thought,
};
use crate::text::chat_template::strftime;
use crate::text::{AddSpecialTokens, LearnedTurns, TextError, Tokenizer};

/// What is given and what is learned of one turn.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EncodedTurn {
    /// The question with all that stands before it since the last answer.
    pub prompt_ids: Vec<u32>,
    /// The answer with what ends it.
    pub response_ids: Vec<u32>,
}

/// What is tokenised in one go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Element {
    /// Text.
    Text(String),
    /// The begin-of-sequence token.
    Bos,
    /// The end-of-sequence token.
    Eos,
}

impl TrainingTemplate {
    /// Returns the token ids of each turn.
    ///
    /// # Errors
    /// [`TextError::InvalidMessages`]: turns that do not come in pairs of question and answer,
    /// tools or calls that are not the JSON they should be. [`TextError::Encode`].
    pub fn encode_multiturn(
        &self,
        tokenizer: &Tokenizer,
        conversation: &Conversation,
        learned: LearnedTurns,
    ) -> Result<Vec<EncodedTurn>, TextError> {
        let messages = self.elements(conversation, learned, &today())?;
        messages
            .chunks_exact(2)
            .map(|pair| {
                Ok(EncodedTurn {
                    prompt_ids: self.tokenize(tokenizer, &pair[0])?,
                    response_ids: self.tokenize(tokenizer, &pair[1])?,
                })
            })
            .collect()
    }

    /// Returns the token ids of all but the last answer as prompt, and those of that answer.
    ///
    /// # Errors
    /// As [`Self::encode_multiturn`].
    pub fn encode_oneturn(
        &self,
        tokenizer: &Tokenizer,
        conversation: &Conversation,
    ) -> Result<EncodedTurn, TextError> {
        let mut messages = self.oneturn_elements(conversation, &today())?;
        let response = messages.pop().unwrap_or_default();
        Ok(EncodedTurn {
            prompt_ids: self.tokenize(tokenizer, &messages.concat())?,
            response_ids: self.tokenize(tokenizer, &response)?,
        })
    }

    /// Returns the token ids that a model trained on whole conversations saw before the answer to
    /// the last message, which is a question or the result of a tool.
    ///
    /// # Errors
    /// As [`Self::encode_multiturn`].
    pub fn encode_prompt(
        &self,
        tokenizer: &Tokenizer,
        conversation: &Conversation,
    ) -> Result<Vec<u32>, TextError> {
        self.tokenize(tokenizer, &self.prompt_elements(conversation)?)
    }

    /// Returns the text of [`Self::encode_prompt`].
    ///
    /// # Errors
    /// As [`Self::encode_multiturn`].
    pub fn render_prompt(
        &self,
        tokenizer: &Tokenizer,
        conversation: &Conversation,
    ) -> Result<String, TextError> {
        let elements = self.prompt_elements(conversation)?;
        let text = elements.iter().map(|element| match element {
            Element::Text(text) => Cow::Borrowed(text.as_str()),
            Element::Bos => tokenizer
                .bos_token()
                .map_or(Cow::Borrowed(""), |token| token.content.as_str().into()),
            Element::Eos => self.eos_token(tokenizer),
        });
        Ok(text.collect())
    }

    fn prompt_elements(&self, conversation: &Conversation) -> Result<Vec<Element>, TextError> {
        let mut conversation = conversation.clone();
        conversation
            .messages
            .push(Message::new(Role::Assistant, ""));
        let mut messages = self.elements(&conversation, LearnedTurns::All, &today())?;
        messages.pop();
        Ok(messages.concat())
    }

    /// Returns the elements of each message, thoughts treated as for training on every turn or on
    /// the last one.
    pub(super) fn elements(
        &self,
        conversation: &Conversation,
        learned: LearnedTurns,
        date: &str,
    ) -> Result<Vec<Vec<Element>>, TextError> {
        let Some(thinking) = self.thinking else {
            return self.plain_elements(conversation, date);
        };
        let num_messages = conversation.messages.len();
        let drop_history =
            learned == LearnedTurns::Last && self.thought_history == ThoughtHistory::Dropped;
        let conversation = without_thoughts(conversation, |index| {
            thinking == Thinking::Disabled || (drop_history && index + 2 < num_messages)
        });
        let mut messages = self.plain_elements(&conversation, date)?;
        let first = if drop_history { num_messages - 2 } else { 0 };
        for index in (first..num_messages).step_by(2) {
            add_empty_thought(&mut messages, &conversation, index + 1, thinking);
        }
        Ok(messages)
    }

    /// As [`Self::elements`], for a conversation of which the last answer alone counts.
    pub(super) fn oneturn_elements(
        &self,
        conversation: &Conversation,
        date: &str,
    ) -> Result<Vec<Vec<Element>>, TextError> {
        let Some(thinking) = self.thinking else {
            return self.plain_elements(conversation, date);
        };
        let num_messages = conversation.messages.len();
        let drop_history = self.thought_history == ThoughtHistory::Dropped;
        let conversation = without_thoughts(conversation, |index| {
            if index + 2 < num_messages {
                drop_history
            } else {
                thinking == Thinking::Disabled
            }
        });
        let mut messages = self.plain_elements(&conversation, date)?;
        add_empty_thought(&mut messages, &conversation, num_messages - 1, thinking);
        Ok(messages)
    }

    /// Returns the elements of each message, of which there is an even number and at least two.
    fn plain_elements(
        &self,
        conversation: &Conversation,
        date: &str,
    ) -> Result<Vec<Vec<Element>>, TextError> {
        let num_messages = conversation.messages.len();
        if num_messages == 0 || num_messages % 2 == 1 {
            return Err(TextError::InvalidMessages {
                message: format!(
                    "the conversation has {num_messages} messages; wanted pairs of a question \
                     (or a tool's result) and an answer"
                ),
            });
        }
        let mut all = Vec::with_capacity(num_messages);
        for (index, message) in conversation.messages.iter().enumerate() {
            let mut elements = Vec::new();
            if index == 0 {
                apply(self.prefix, "", &mut elements);
                self.apply_system(conversation, date, &mut elements)?;
            }
            let content = Cow::Borrowed(message.content.as_str());
            let (slots, content) = match message.role {
                Role::User => (self.user, content),
                Role::Assistant => (self.assistant, content),
                Role::Observation => (self.observation, content),
                Role::Function => (
                    self.function,
                    Cow::Owned(self.tool_format.write_calls(&content)?),
                ),
            };
            apply(slots, &content, &mut elements);
            all.push(elements);
        }
        Ok(all)
    }

    fn apply_system(
        &self,
        conversation: &Conversation,
        date: &str,
        elements: &mut Vec<Element>,
    ) -> Result<(), TextError> {
        let given = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
        let tools = given(&conversation.tools);
        let mut system =
            given(&conversation.system).unwrap_or_else(|| self.default_system.to_string());
        if system.is_empty() && tools.is_none() {
            return Ok(());
        }
        if let Some(tools) = tools {
            system.push_str(&self.tool_format.describe_tools(&tools, date)?);
        }
        apply(self.system, &system, elements);
        Ok(())
    }

    pub(super) fn tokenize(
        &self,
        tokenizer: &Tokenizer,
        elements: &[Element],
    ) -> Result<Vec<u32>, TextError> {
        let mut ids = Vec::new();
        for element in elements {
            match element {
                Element::Text(text) => ids.extend(tokenizer.encode(text, AddSpecialTokens::No)?),
                Element::Bos => ids.extend(tokenizer.bos_token().and_then(|token| token.id)),
                Element::Eos => ids.extend(tokenizer.token_id(&self.eos_token(tokenizer))),
            }
        }
        Ok(ids)
    }
}

/// Returns today's date as Llama 3 is told it.
fn today() -> String {
    strftime::strftime("%d %b %Y", strftime::now())
}

/// Puts the content into the slots; empty text makes no element.
fn apply(slots: &[Slot], content: &str, elements: &mut Vec<Element>) {
    for slot in slots {
        let element = match slot {
            Slot::Text(text) => Element::Text(text.replacen(CONTENT, content, 1)),
            Slot::Bos => Element::Bos,
            Slot::Eos => Element::Eos,
        };
        if element != Element::Text(String::new()) {
            elements.push(element);
        }
    }
}

/// Returns the conversation without the thoughts of those answers whose index the test accepts.
fn without_thoughts(
    conversation: &Conversation,
    removes: impl Fn(usize) -> bool,
) -> Cow<'_, Conversation> {
    let mut conversation = Cow::Borrowed(conversation);
    for index in (1..conversation.messages.len()).step_by(2) {
        if removes(index) {
            let content = thought::remove(&conversation.messages[index].content);
            conversation.to_mut().messages[index].content = content;
        }
    }
    conversation
}

/// Puts an empty thought before the answer at `index` if it has none: into the prompt, or into the
/// answer to be learned.
fn add_empty_thought(
    messages: &mut [Vec<Element>],
    conversation: &Conversation,
    index: usize,
    thinking: Thinking,
) {
    if thought::has_thought(&conversation.messages[index].content) {
        return;
    }
    let empty = Element::Text(thought::EMPTY.to_owned());
    match thinking {
        Thinking::Enabled => messages[index].insert(0, empty),
        Thinking::Unset | Thinking::Disabled => messages[index - 1].push(empty),
    }
}
