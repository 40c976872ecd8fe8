//! Strings to token ids and back: tokenizer, chat template, incremental detokenisation, stop
//! strings. No tensor, no HTTP.

mod chat_template;
mod detokenizer;
mod error;
mod gguf_vocabulary;
mod nearest;
mod pre_tokenizer;
mod stop_strings;
mod supervised;
#[cfg(test)]
mod tests;
mod token_table;
mod tokenizer;
mod tokenizer_export;
mod tokenizer_files;
mod tokenizer_json;
mod training_template;
mod vocabulary;

pub use crate::vocabulary::GgufVocabulary;
pub use chat_template::{
    ChatTemplate, ChatTemplateSources, RenderInput, fallback_template,
    fallback_template_for_architecture, fallback_template_names, resolve_chat_template,
};
pub use detokenizer::Detokenizer;
pub use error::TextError;
pub use nearest::{likely, nearest};
pub use stop_strings::{IncludeStopString, StopOutcome, StopStrings};
pub use supervised::{
    IGNORE_INDEX, LearnedTurns, PromptLabels, SupervisedExample, SupervisedOptions,
    encode_supervised, truncated_lengths,
};
pub use tokenizer::{AddSpecialTokens, NamedToken, SkipSpecialTokens, Tokenizer};
pub use training_template::{
    Conversation, EncodedTurn, Message, Role, Slot, TEMPLATE_RECORD_FILE, TemplatePart,
    TemplateRecord, Thinking, ThoughtHistory, TrainingTemplate, python_json,
};
