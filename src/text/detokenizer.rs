//! Token ids of one sequence to text, a token at a time.
//!
//! Nothing that is not valid UTF-8 leaves: the start of a character waits for its remaining bytes.
//! The pieces joined are what [`Tokenizer::decode`] gives for all ids. No clean-up of spaces before
//! punctuation is done anywhere, whatever `clean_up_tokenization_spaces` says, as in vLLM's stream:
//! it would change program text and could not be done without looking ahead.

use super::{SkipSpecialTokens, Tokenizer};

/// Prompt tokens that are enough to know how the text before the first generated token ends.
const CONTEXT_TOKENS: usize = 8;

/// The state of one sequence between two tokens.
#[derive(Debug, Clone)]
pub struct Detokenizer {
    skip: SkipSpecialTokens,
    /// Bytes of a character whose end has not come.
    pending: Vec<u8>,
    window: Window,
}

/// The newest ids of a sequence whose tokens decode differently next to each other.
#[derive(Debug, Clone, Default)]
struct Window {
    ids: Vec<u32>,
    /// The ids up to here were sent; they stay so that what follows decodes as it does behind them.
    num_sent: usize,
    /// Bytes of the text of `ids` that were sent.
    sent_bytes: usize,
}

impl Detokenizer {
    /// Starts at the beginning of a text.
    pub fn new(skip: SkipSpecialTokens) -> Self {
        Self {
            skip,
            pending: Vec::new(),
            window: Window::default(),
        }
    }

    /// Starts behind a prompt, whose text is not returned: a SentencePiece token keeps its leading
    /// space, and a character that the prompt's last token cut is completed.
    pub fn after_prompt(tokenizer: &Tokenizer, prompt: &[u32], skip: SkipSpecialTokens) -> Self {
        let mut detokenizer = Self::new(skip);
        for &id in &prompt[prompt.len().saturating_sub(CONTEXT_TOKENS)..] {
            detokenizer.push(tokenizer, id);
        }
        detokenizer
    }

    /// Takes the next token and returns the text that is certain now, often empty.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> String {
        if !tokenizer.decodes_by_bytes() {
            return self.window.push(tokenizer, id, self.skip);
        }
        let bytes = tokenizer.visible_bytes(id, self.skip);
        if self.pending.is_empty()
            && let Ok(text) = std::str::from_utf8(bytes)
        {
            return text.to_owned();
        }
        self.pending.extend_from_slice(bytes);
        take_complete(&mut self.pending)
    }

    /// Returns what was held back, broken characters as U+FFFD.
    pub fn finish(&mut self, tokenizer: &Tokenizer) -> String {
        if !tokenizer.decodes_by_bytes() {
            return std::mem::take(&mut self.window).rest(tokenizer, self.skip);
        }
        let rest = std::mem::take(&mut self.pending);
        String::from_utf8_lossy(&rest).into_owned()
    }
}

impl Window {
    fn push(&mut self, tokenizer: &Tokenizer, id: u32, skip: SkipSpecialTokens) -> String {
        self.ids.push(id);
        let text = tokenizer.decode(&self.ids, skip);
        // A text that ends in U+FFFD may be a character whose bytes are still coming.
        if text.ends_with(char::REPLACEMENT_CHARACTER) {
            return String::new();
        }
        let new = text.get(self.sent_bytes..).unwrap_or("").to_owned();
        if new.is_empty() {
            return new;
        }
        // Keep only the ids of this piece: the next one is read as the difference behind them.
        self.ids.drain(..self.num_sent);
        self.num_sent = self.ids.len();
        self.sent_bytes = tokenizer.decode(&self.ids, skip).len();
        new
    }

    fn rest(self, tokenizer: &Tokenizer, skip: SkipSpecialTokens) -> String {
        let mut text = tokenizer.decode(&self.ids, skip);
        if text.is_char_boundary(self.sent_bytes.min(text.len())) {
            return text.split_off(self.sent_bytes.min(text.len()));
        }
        String::new()
    }
}

/// Takes the longest part that later bytes can not change, invalid bytes replaced as
/// [`String::from_utf8_lossy`] does.
fn take_complete(pending: &mut Vec<u8>) -> String {
    let mut text = String::with_capacity(pending.len());
    let mut start = 0;
    loop {
        match std::str::from_utf8(&pending[start..]) {
            Ok(valid) => {
                text.push_str(valid);
                pending.clear();
                return text;
            }
            Err(error) => {
                let end = start + error.valid_up_to();
                text.push_str(&String::from_utf8_lossy(&pending[start..end]));
                let Some(invalid) = error.error_len() else {
                    pending.drain(..end);
                    return text;
                };
                text.push(char::REPLACEMENT_CHARACTER);
                start = end + invalid;
            }
        }
    }
}
