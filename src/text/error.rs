//! What can go wrong between strings and token ids.

use std::path::PathBuf;

/// The error type that `tokenizers` returns.
type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Everything this folder refuses, with the file, name or number that is at fault.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// A model directory has no `tokenizer.json`.
    #[error(
        "no tokenizer at {path:?}: the model directory needs a tokenizer.json; \
         save the model's tokenizer with transformers (`save_pretrained`) (`infold serve` takes --tokenizer too)"
    )]
    MissingTokenizer {
        /// The file looked for.
        path: PathBuf,
    },
    /// A file can not be read.
    #[error("cannot read {path:?}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A side file of the tokenizer is not the JSON it should be.
    #[error("{path:?} is not a valid tokenizer file: {source}; download it again")]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// `tokenizer.json` or a vocabulary does not describe a tokenizer.
    #[error("{origin} does not describe a usable tokenizer: {source}")]
    InvalidTokenizer {
        /// File or vocabulary.
        origin: String,
        /// Why.
        source: BoxError,
    },
    /// A merge makes a token that the vocabulary can not have.
    #[error("{origin}: merge {index} ({left:?} + {right:?}) makes no token of the vocabulary")]
    InvalidMerge {
        /// File or vocabulary.
        origin: String,
        /// Position in the list of merges.
        index: usize,
        /// Left part.
        left: String,
        /// Right part.
        right: String,
    },
    /// A GGUF vocabulary of a kind that is not built here.
    #[error("tokenizer model {model:?} of the GGUF file is not supported (supported: gpt2, llama)")]
    UnsupportedVocabulary {
        /// `tokenizer.ggml.model`.
        model: String,
    },
    /// A GGUF vocabulary that splits words in a way not known here.
    #[error(
        "pre-tokenizer {pre:?} of the GGUF file is not supported; \
         name a directory with the model's tokenizer.json with --tokenizer"
    )]
    UnsupportedPreTokenizer {
        /// `tokenizer.ggml.pre`.
        pre: String,
    },
    /// Lists of a GGUF vocabulary that belong together differ in length.
    #[error("the GGUF vocabulary has {num_tokens} tokens but {found} {list}")]
    VocabularyLength {
        /// Number of tokens.
        num_tokens: usize,
        /// The list at fault.
        list: &'static str,
        /// Its length.
        found: usize,
    },
    /// A tokenizer that a GGUF file cannot hold.
    #[error("the tokenizer {path:?} cannot be written into a GGUF file: {reason}")]
    NotExportable {
        /// Its `tokenizer.json`.
        path: PathBuf,
        /// What GGUF or llama.cpp does not have.
        reason: String,
    },
    /// A token id outside the vocabulary.
    #[error("token id {id} is outside the vocabulary of {vocab_size} tokens")]
    UnknownTokenId {
        /// The id.
        id: u32,
        /// Number of tokens.
        vocab_size: usize,
    },
    /// A text that the tokenizer can not encode.
    #[error("the text cannot be tokenized: {source}")]
    Encode {
        /// Why.
        source: BoxError,
    },
    /// An empty stop string, which would match at once.
    #[error("stop cannot contain an empty string (entry {index})")]
    EmptyStopString {
        /// Position in the list.
        index: usize,
    },
    /// More stop strings than an automaton can hold.
    #[error("the stop strings are too many or too long: {source}")]
    StopStrings {
        /// Why.
        source: aho_corasick::BuildError,
    },
    /// A chat template that does not parse.
    #[error("chat template, line {line}: {message}")]
    TemplateSyntax {
        /// Line, from 1; 0 when unknown.
        line: usize,
        /// What the parser said.
        message: String,
    },
    /// A chat template called `raise_exception`.
    #[error("{message}")]
    TemplateRaised {
        /// The template's own words.
        message: String,
    },
    /// A chat template failed while it rendered.
    #[error("chat template, line {line}: {message}")]
    TemplateRender {
        /// Line, from 1; 0 when unknown.
        line: usize,
        /// What failed.
        message: String,
    },
    /// A chat template ran into the limit of work, output or nesting.
    #[error("chat template, line {line}: it needs more work than the limit allows ({limit})")]
    TemplateTooExpensive {
        /// Line, from 1; 0 when unknown.
        line: usize,
        /// Which limit.
        limit: &'static str,
    },
    /// Messages that can not be rendered as asked.
    #[error("{message}")]
    InvalidMessages {
        /// What is wrong with them.
        message: String,
    },
    /// A chat template name that is neither built in, nor a file, nor a template.
    #[error("no chat template {name:?}: not a file, and the built-in ones are {known}")]
    UnknownTemplate {
        /// What was asked for.
        name: String,
        /// Names of the built-in templates.
        known: String,
    },
    /// A name that no training template has.
    #[error("no training template {name:?}: did you mean {nearest:?}? The templates are {known}")]
    UnknownTrainingTemplate {
        /// What was asked for.
        name: String,
        /// The name most like it.
        nearest: &'static str,
        /// All names.
        known: String,
    },
}

impl TextError {
    /// Returns whether the request, not the model or the program, is at fault.
    pub fn is_user_error(&self) -> bool {
        match self {
            Self::UnknownTokenId { .. }
            | Self::Encode { .. }
            | Self::EmptyStopString { .. }
            | Self::StopStrings { .. }
            | Self::TemplateSyntax { .. }
            | Self::TemplateRaised { .. }
            | Self::TemplateRender { .. }
            | Self::TemplateTooExpensive { .. }
            | Self::InvalidMessages { .. } => true,
            Self::MissingTokenizer { .. }
            | Self::Read { .. }
            | Self::Json { .. }
            | Self::InvalidTokenizer { .. }
            | Self::InvalidMerge { .. }
            | Self::UnsupportedVocabulary { .. }
            | Self::UnsupportedPreTokenizer { .. }
            | Self::VocabularyLength { .. }
            | Self::NotExportable { .. }
            | Self::UnknownTemplate { .. }
            | Self::UnknownTrainingTemplate { .. } => false,
        }
    }
}
