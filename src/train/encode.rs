//! Conversations to token ids and labels, by the template that the run names.
//!
//! The rules of templates, truncation and labels are in [`crate::text`]; this applies them to a
//! data set on all cores and counts what came out. The order of examples is that of the
//! conversations.

use rayon::prelude::*;

use crate::text::{
    Conversation, LearnedTurns, PromptLabels, SkipSpecialTokens, SupervisedExample,
    SupervisedOptions, TextError, Thinking, ThoughtHistory, Tokenizer, TrainingTemplate,
    encode_supervised,
};

use super::DataConfig;

/// What encodes conversations.
#[derive(Debug, Clone)]
pub struct Encoder {
    template: TrainingTemplate,
    options: SupervisedOptions,
}

/// A conversation that the template refuses.
#[derive(Debug, thiserror::Error)]
#[error("conversation {number}, which begins \"{beginning}\": {source}")]
pub struct EncodeError {
    /// Its number among those kept, from 1.
    pub number: usize,
    /// Its first words.
    pub beginning: String,
    /// Why.
    pub source: TextError,
}

/// What came out of a data set.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EncodeSummary {
    /// Examples with something to learn.
    pub num_examples: usize,
    /// Their tokens.
    pub num_tokens: usize,
    /// Their tokens that are learned.
    pub num_target_tokens: usize,
    /// Tokens of the longest.
    pub longest: usize,
    /// Examples cut to `cutoff_len`.
    pub num_truncated: usize,
    /// Conversations without anything to learn, left out.
    pub num_empty: usize,
}

impl Encoder {
    /// Returns the encoder of a configuration; `fallback` is the template when none is named.
    ///
    /// # Errors
    /// [`TextError::UnknownTrainingTemplate`] with the nearest name.
    pub fn new(
        config: &DataConfig,
        fallback: &str,
        tokenizer: &Tokenizer,
    ) -> Result<Self, TextError> {
        let name = config.template.as_deref().unwrap_or(fallback);
        let thinking = match config.enable_thinking {
            Some(true) => Thinking::Enabled,
            Some(false) => Thinking::Disabled,
            None => Thinking::Unset,
        };
        let history = if config.preserve_thinking {
            ThoughtHistory::Kept
        } else {
            ThoughtHistory::Dropped
        };
        let mut template = TrainingTemplate::named(name)?.with_thinking(thinking, history);
        if let Some(system) = &config.default_system {
            template = template.with_default_system(system);
        }
        let eos = || tokenizer.token_id(&template.eos_token(tokenizer));
        let options = SupervisedOptions {
            cutoff_len: config.cutoff_len,
            learned_turns: if config.mask_history {
                LearnedTurns::Last
            } else {
                LearnedTurns::All
            },
            prompt_labels: if config.train_on_prompt {
                PromptLabels::Learned
            } else {
                PromptLabels::Masked
            },
            efficient_eos: template.efficient_eos().then(eos).flatten(),
        };
        Ok(Self { template, options })
    }

    /// Returns the template with its system prompt as used.
    pub fn template(&self) -> &TrainingTemplate {
        &self.template
    }

    /// Encodes all conversations; those with nothing to learn are left out and counted.
    ///
    /// # Errors
    /// [`EncodeError`] naming a conversation that the template refuses.
    pub fn encode(
        &self,
        tokenizer: &Tokenizer,
        conversations: &[Conversation],
    ) -> Result<(Vec<SupervisedExample>, EncodeSummary), EncodeError> {
        let encoded = conversations
            .par_iter()
            .enumerate()
            .map(|(index, conversation)| {
                self.encode_one(tokenizer, conversation)
                    .map_err(|source| EncodeError {
                        number: index + 1,
                        beginning: beginning(conversation),
                        source,
                    })
            })
            .collect::<Result<Vec<_>, _>>()?;
        let mut summary = EncodeSummary::default();
        let mut examples = Vec::with_capacity(encoded.len());
        for (example, full_length) in encoded {
            let Some(example) = example else {
                summary.num_empty += 1;
                continue;
            };
            let length = example.input_ids.len();
            summary.num_examples += 1;
            summary.num_tokens += length;
            summary.num_target_tokens += example.num_learned();
            summary.longest = summary.longest.max(length);
            summary.num_truncated += usize::from(length < full_length);
            examples.push(example);
        }
        Ok((examples, summary))
    }

    /// Returns an example, if there is something to learn, and its length before it was cut.
    fn encode_one(
        &self,
        tokenizer: &Tokenizer,
        conversation: &Conversation,
    ) -> Result<(Option<SupervisedExample>, usize), TextError> {
        let turns =
            self.template
                .encode_multiturn(tokenizer, conversation, self.options.learned_turns)?;
        let lengths = turns
            .iter()
            .map(|turn| turn.prompt_ids.len() + turn.response_ids.len());
        let full = lengths.sum::<usize>() + usize::from(self.options.efficient_eos.is_some());
        Ok((encode_supervised(&turns, &self.options), full))
    }
}

fn beginning(conversation: &Conversation) -> String {
    let first = conversation.messages.first();
    first.map_or_else(String::new, |turn| turn.content.chars().take(40).collect())
}

/// Returns the template that a tokenizer's special tokens speak of, for a run that names none.
///
/// SmolLM2 has no tokens of its own; its chat template names it.
pub fn template_of_tokenizer(tokenizer: &Tokenizer) -> &'static str {
    let has = |token: &str| tokenizer.token_id(token).is_some();
    if has("<|start_header_id|>") {
        "llama3"
    } else if has("<think>") && has("<|im_start|>") {
        "qwen3"
    } else if has("<|endoftext|>") && has("<|im_start|>") && has("<tool_call>") {
        "qwen"
    } else if is_smollm2(tokenizer) {
        "smollm2"
    } else {
        "chatml"
    }
}

fn is_smollm2(tokenizer: &Tokenizer) -> bool {
    let chat_template = tokenizer.chat_templates().select(None);
    let default = TrainingTemplate::named("smollm2").map_or("", TrainingTemplate::default_system);
    // The model's own template says the same without the full stop.
    let default = default.trim_end_matches('.');
    !default.is_empty() && chat_template.is_some_and(|template| template.contains(default))
}

/// Returns an example as LLaMA-Factory prints its first: ids and text, of all and of what is
/// learned.
pub fn describe_example(tokenizer: &Tokenizer, example: &SupervisedExample) -> String {
    let learned: Vec<u32> = example
        .labels
        .iter()
        .filter_map(|&label| u32::try_from(label).ok())
        .collect();
    format!(
        "input_ids:\n{:?}\ninputs:\n{}\nlabel_ids:\n{:?}\nlabels:\n{}",
        example.input_ids,
        tokenizer.decode(&example.input_ids, SkipSpecialTokens::No),
        example.labels,
        tokenizer.decode(&learned, SkipSpecialTokens::No)
    )
}
