//! Logprobs in the forms of chats, completions and prompts.
//!
//! The engine reports natural logarithms by token id; here they get the tokens' texts. Values
//! are floored at -9999, because JSON has no negative infinity.

use std::collections::BTreeMap;

use crate::engine::TokenLogprobs;
use crate::text::Tokenizer;

use super::responses::{
    ChatTokenLogprob, ChatTopLogprob, CompletionLogprobs, PromptLogprob, PromptLogprobs,
};

/// The least logprob that is reported.
const FLOOR: f32 = -9999.0;

/// How a token is written in logprobs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TokenSpelling {
    /// Its text.
    Text,
    /// `token_id:N`.
    Id,
}

/// Writes tokens for logprobs.
#[derive(Clone, Copy)]
pub(super) struct LogprobWriter<'a> {
    pub(super) tokenizer: &'a Tokenizer,
    pub(super) spelling: TokenSpelling,
}

impl LogprobWriter<'_> {
    fn token(&self, id: u32) -> String {
        match self.spelling {
            TokenSpelling::Id => format!("token_id:{id}"),
            TokenSpelling::Text => self.text(id),
        }
    }

    fn text(&self, id: u32) -> String {
        match self.tokenizer.token_bytes(id) {
            Some(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
            None => String::new(),
        }
    }

    fn bytes(&self, id: u32) -> Vec<u8> {
        self.tokenizer
            .token_bytes(id)
            .map_or_else(Vec::new, |bytes| bytes.into_owned())
    }

    /// Returns a token's entry in a chat answer, with the `num_top` most likely ones.
    pub(super) fn chat(&self, logprobs: &TokenLogprobs, num_top: usize) -> ChatTokenLogprob {
        let top = logprobs.top.iter().take(num_top);
        ChatTokenLogprob {
            token: self.token(logprobs.token_id),
            logprob: logprobs.logprob.max(FLOOR),
            bytes: self.bytes(logprobs.token_id),
            top_logprobs: top
                .map(|&(id, logprob)| ChatTopLogprob {
                    token: self.token(id),
                    logprob: logprob.max(FLOOR),
                    bytes: self.bytes(id),
                })
                .collect(),
        }
    }

    /// Appends a token to a completion's lists and returns the offset behind it, in characters.
    ///
    /// `logprobs` is `None` for the first prompt token, about which nothing is known.
    pub(super) fn completion(
        &self,
        lists: &mut CompletionLogprobs,
        token_id: u32,
        logprobs: Option<&TokenLogprobs>,
        offset: usize,
    ) -> usize {
        lists.text_offset.push(offset);
        lists.tokens.push(self.token(token_id));
        lists
            .token_logprobs
            .push(logprobs.map(|logprobs| logprobs.logprob.max(FLOOR)));
        lists
            .top_logprobs
            .push(logprobs.map(|logprobs| self.top_map(logprobs)));
        offset + self.text(token_id).chars().count()
    }

    /// Returns the most likely tokens, the one that was drawn among them in any case.
    fn top_map(&self, logprobs: &TokenLogprobs) -> BTreeMap<String, f32> {
        let drawn = (logprobs.token_id, logprobs.logprob);
        let all = logprobs.top.iter().copied().chain([drawn]);
        all.map(|(id, logprob)| (self.token(id), logprob.max(FLOOR)))
            .collect()
    }

    /// Returns the logprobs of a prompt by token id.
    pub(super) fn prompt(&self, prompt: &[Option<TokenLogprobs>]) -> PromptLogprobs {
        prompt
            .iter()
            .map(|entry| entry.as_ref().map(|entry| self.prompt_entry(entry)))
            .collect()
    }

    fn prompt_entry(&self, logprobs: &TokenLogprobs) -> BTreeMap<u32, PromptLogprob> {
        let entry = |id: u32, logprob: f32, rank: usize| {
            let decoded_token = self.text(id);
            (
                id,
                PromptLogprob {
                    logprob: logprob.max(FLOOR),
                    rank,
                    decoded_token,
                },
            )
        };
        let top = logprobs.top.iter().enumerate();
        let mut entries: BTreeMap<_, _> = top
            .map(|(index, &(id, logprob))| entry(id, logprob, index + 1))
            .collect();
        entries.extend([entry(logprobs.token_id, logprobs.logprob, logprobs.rank)]);
        entries
    }
}
