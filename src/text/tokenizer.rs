//! Strings to token ids and back.
//!
//! A thin shell over `tokenizers`: it adds the special tokens that side files or a GGUF file name,
//! and a flat table of what each id stands for. Built by `tokenizer_files` from a model directory
//! and by `vocabulary` from the plain data of a GGUF file; knows neither models nor requests.

use std::borrow::Cow;

use tokenizers::{AddedToken, Tokenizer as HfTokenizer};

use super::token_table::{TokenEncoding, TokenTable};
use super::{ChatTemplateSources, TextError};

/// Whether `encode` adds what the tokenizer puts around a text, such as a begin-of-sequence token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AddSpecialTokens {
    /// As for a raw prompt.
    Yes,
    /// As for a rendered chat, whose template writes them itself.
    No,
}

/// Whether special tokens are left out of decoded text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SkipSpecialTokens {
    /// They are left out.
    Yes,
    /// Their text is kept.
    No,
}

/// A token that a model gives a meaning, such as its end of sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedToken {
    /// Its name in chat templates, such as `bos_token`.
    pub name: String,
    /// Its text.
    pub content: String,
    /// Its id; absent when the vocabulary does not have it.
    pub id: Option<u32>,
}

/// What a builder knows about a tokenizer before it is put together.
#[derive(Debug, Default)]
pub(super) struct TokenizerParts {
    /// Named tokens: (name, text).
    pub(super) named: Vec<(String, String)>,
    /// Put before every text encoded with special tokens.
    pub(super) add_bos: bool,
    /// Put behind every text encoded with special tokens.
    pub(super) add_eos: bool,
    /// Chat templates that came with the tokenizer.
    pub(super) chat_templates: ChatTemplateSources,
}

/// A tokenizer. Immutable; share it by `Arc`.
pub struct Tokenizer {
    inner: HfTokenizer,
    table: TokenTable,
    encoding: TokenEncoding,
    named: Vec<NamedToken>,
    prefix: Option<u32>,
    suffix: Option<u32>,
    chat_templates: ChatTemplateSources,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size())
            .field("named", &self.named)
            .finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Puts a tokenizer together. `raw_tokens` overrides the vocabulary strings by id where a
    /// source has several ids of one string.
    pub(super) fn assemble(
        mut inner: HfTokenizer,
        parts: TokenizerParts,
        raw_tokens: Option<Vec<String>>,
        origin: &str,
    ) -> Result<Self, TextError> {
        // A server never wants a prompt cut or filled up behind its back.
        inner.with_padding(None);
        let invalid = |source| TextError::InvalidTokenizer {
            origin: origin.to_owned(),
            source,
        };
        inner.with_truncation(None).map_err(invalid)?;
        mark_special(&mut inner, &parts.named).map_err(invalid)?;
        let named: Vec<NamedToken> = parts
            .named
            .into_iter()
            .map(|(name, content)| NamedToken {
                id: inner.token_to_id(&content),
                name,
                content,
            })
            .collect();
        let find = |name: &str| named.iter().find(|token| token.name == name)?.id;
        // What the post-processor of `tokenizer.json` adds already is not added twice.
        let around = inner.encode_fast("", true).map_err(invalid)?;
        let missing = |id: &u32| !around.get_ids().contains(id);
        let prefix = find("bos_token").filter(|id| parts.add_bos && missing(id));
        let suffix = find("eos_token").filter(|id| parts.add_eos && missing(id));
        let encoding = TokenEncoding::of(inner.get_decoder());
        let table = build_table(&inner, raw_tokens, encoding);
        if table.len() == 0 {
            return Err(invalid("the vocabulary is empty".into()));
        }
        Ok(Self {
            inner,
            table,
            encoding,
            named,
            prefix,
            suffix,
            chat_templates: parts.chat_templates,
        })
    }

    /// Returns the token ids of `text`. Special tokens written out in the text are recognised.
    ///
    /// # Errors
    /// The vocabulary has no token for a part of the text.
    pub fn encode(&self, text: &str, add: AddSpecialTokens) -> Result<Vec<u32>, TextError> {
        let with_special = add == AddSpecialTokens::Yes;
        let encoding = self
            .inner
            .encode_fast(text, with_special)
            .map_err(|source| TextError::Encode { source })?;
        let ids = encoding.get_ids();
        let prefix = self.prefix.filter(|_| with_special);
        let suffix = self.suffix.filter(|_| with_special);
        if prefix.is_none() && suffix.is_none() {
            return Ok(ids.to_vec());
        }
        Ok(prefix
            .into_iter()
            .chain(ids.iter().copied())
            .chain(suffix)
            .collect())
    }

    /// Returns the text of `ids`; ids outside the vocabulary stand for nothing, bytes that are not
    /// UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32], skip: SkipSpecialTokens) -> String {
        if self.encoding == TokenEncoding::ByteLevel {
            let mut bytes = Vec::with_capacity(ids.len() * 4);
            for &id in ids {
                bytes.extend_from_slice(self.visible_bytes(id, skip));
            }
            return String::from_utf8(bytes)
                .unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned());
        }
        // No decoder that reads plain tokens fails; an empty text is the honest answer if one did.
        self.inner
            .decode(ids, skip == SkipSpecialTokens::Yes)
            .unwrap_or_default()
    }

    /// Returns the vocabulary string of a token, in the vocabulary's own spelling (`Ġthe`, `▁the`).
    pub fn token_string(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Returns the bytes that a token stands for inside a text (`b" the"`).
    pub fn token_bytes(&self, id: u32) -> Option<Cow<'_, [u8]>> {
        self.table.bytes(id).map(Cow::Borrowed)
    }

    /// Returns the id of a vocabulary string.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Returns the bytes of the longest token.
    pub fn longest_token(&self) -> usize {
        self.table.longest()
    }

    /// Returns the number of ids: the largest plus one.
    pub fn vocab_size(&self) -> usize {
        self.table.len()
    }

    /// Returns whether an id is a special token, left out of decoded text by
    /// [`SkipSpecialTokens::Yes`].
    pub fn is_special(&self, id: u32) -> bool {
        self.table.is_special(id)
    }

    /// Refuses ids that the vocabulary does not have.
    ///
    /// # Errors
    /// [`TextError::UnknownTokenId`] with the first such id.
    pub fn check_ids(&self, ids: &[u32]) -> Result<(), TextError> {
        let vocab_size = self.vocab_size();
        match ids.iter().find(|&&id| id as usize >= vocab_size) {
            Some(&id) => Err(TextError::UnknownTokenId { id, vocab_size }),
            None => Ok(()),
        }
    }

    /// Returns the tokens that chat templates know by name (`bos_token`, `eos_token`, …).
    pub fn named_tokens(&self) -> &[NamedToken] {
        &self.named
    }

    /// Returns the begin-of-sequence token.
    pub fn bos_token(&self) -> Option<&NamedToken> {
        self.named.iter().find(|token| token.name == "bos_token")
    }

    /// Returns the end-of-sequence token.
    pub fn eos_token(&self) -> Option<&NamedToken> {
        self.named.iter().find(|token| token.name == "eos_token")
    }

    /// Returns the chat templates that came with the tokenizer.
    pub fn chat_templates(&self) -> &ChatTemplateSources {
        &self.chat_templates
    }

    /// Returns the library's tokenizer, without the tokens that this shell puts around a text.
    pub(super) fn inner(&self) -> &HfTokenizer {
        &self.inner
    }

    /// Returns the tokens put before and behind a text beyond those of the library's tokenizer.
    pub(super) fn around(&self) -> (Option<u32>, Option<u32>) {
        (self.prefix, self.suffix)
    }

    /// Returns whether tokens decode independently of their neighbours.
    pub(super) fn decodes_by_bytes(&self) -> bool {
        self.encoding == TokenEncoding::ByteLevel
    }

    /// Returns a token's bytes, or nothing when it is skipped or unknown.
    pub(super) fn visible_bytes(&self, id: u32, skip: SkipSpecialTokens) -> &[u8] {
        if skip == SkipSpecialTokens::Yes && self.table.is_special(id) {
            return &[];
        }
        self.table.bytes(id).unwrap_or(&[])
    }
}

/// Marks the named tokens of the vocabulary as special, as transformers does on loading.
fn mark_special(inner: &mut HfTokenizer, named: &[(String, String)]) -> tokenizers::Result<()> {
    let added = inner.get_added_vocabulary();
    let missing: Vec<AddedToken> = named
        .iter()
        .filter(|(_, content)| !added.is_special_token(content))
        .filter(|(_, content)| inner.token_to_id(content).is_some())
        .map(|(_, content)| AddedToken::from(content.clone(), true))
        .collect();
    if !missing.is_empty() {
        inner.add_special_tokens(missing)?;
    }
    Ok(())
}

fn build_table(
    inner: &HfTokenizer,
    raw_tokens: Option<Vec<String>>,
    encoding: TokenEncoding,
) -> TokenTable {
    let added = inner.get_added_vocabulary();
    let is_special = |token: &str| added.is_special_token(token);
    if let Some(tokens) = raw_tokens {
        return TokenTable::new(tokens.into_iter().map(Some), encoding, is_special);
    }
    let largest_added = added.get_added_tokens_decoder().keys().max().copied();
    let from_added = largest_added.map_or(0, |id| id as usize + 1);
    let num_tokens = inner.get_vocab_size(true).max(from_added);
    let tokens = (0..num_tokens).map(|id| inner.id_to_token(id as u32));
    TokenTable::new(tokens, encoding, is_special)
}
