//! The vocabulary of a GGUF file as plain data, so that [`weights`](crate::weights), which reads the
//! file, and [`text`](crate::text), which makes a tokenizer of it or the reverse, need not know each
//! other. No file, no tokenizer.

/// The `tokenizer.*` metadata of a GGUF file.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GgufVocabulary {
    /// `tokenizer.ggml.model`: `gpt2` (byte-level BPE) or `llama` (SentencePiece BPE).
    pub model: String,
    /// `tokenizer.ggml.pre`: how a text is cut into words.
    pub pre: Option<String>,
    /// `tokenizer.ggml.tokens`, by id.
    pub tokens: Vec<String>,
    /// `tokenizer.ggml.token_type`, by id: 1 normal, 2 unknown, 3 control, 4 user defined, 5 unused,
    /// 6 byte; may be empty (all normal).
    pub token_types: Vec<i32>,
    /// `tokenizer.ggml.merges`, each `left right`, best first.
    pub merges: Vec<String>,
    /// `tokenizer.ggml.scores`, by id; used by `llama` vocabularies without merges.
    pub scores: Vec<f32>,
    /// `tokenizer.ggml.bos_token_id`.
    pub bos: Option<u32>,
    /// `tokenizer.ggml.eos_token_id`.
    pub eos: Option<u32>,
    /// `tokenizer.ggml.unknown_token_id`.
    pub unknown: Option<u32>,
    /// `tokenizer.ggml.padding_token_id`.
    pub padding: Option<u32>,
    /// `tokenizer.ggml.eot_token_id`: end of a turn, where it differs from `eos`.
    pub eot: Option<u32>,
    /// `tokenizer.ggml.add_bos_token`.
    pub add_bos: Option<bool>,
    /// `tokenizer.ggml.add_eos_token`.
    pub add_eos: Option<bool>,
    /// `tokenizer.ggml.add_space_prefix`, of `llama` vocabularies.
    pub add_space_prefix: Option<bool>,
    /// `tokenizer.chat_template`.
    pub chat_template: Option<String>,
    /// `tokenizer.chat_template.NAME`: (name, template).
    pub named_chat_templates: Vec<(String, String)>,
}
