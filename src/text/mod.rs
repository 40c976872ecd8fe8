//! Strings to token ids and back: tokenizer, chat template, incremental detokenisation, stop
//! strings. No tensor, no HTTP.

mod chat_template;
mod detokenizer;
mod error;
mod gguf_vocabulary;
mod pre_tokenizer;
mod stop_strings;
#[cfg(test)]
mod tests;
mod token_table;
mod tokenizer;
mod tokenizer_files;
mod tokenizer_json;
mod vocabulary;

pub use chat_template::{
    ChatTemplate, ChatTemplateSources, RenderInput, fallback_template,
    fallback_template_for_architecture, fallback_template_names, resolve_chat_template,
};
pub use detokenizer::Detokenizer;
pub use error::TextError;
pub use stop_strings::{IncludeStopString, StopOutcome, StopStrings};
pub use tokenizer::{AddSpecialTokens, NamedToken, SkipSpecialTokens, Tokenizer};
pub use vocabulary::GgufVocabulary;
