//! What goes into the engine and what comes out: token ids in, token events out.
//!
//! Knows no text, no HTTP and no tensor. `serve` fills a [`GenerateRequest`] and reads
//! [`TokenEvent`]s; the scheduler and the sampler read [`SamplingParams`].
//! Field names and meanings follow vLLM's `SamplingParams`.

use std::time::Duration;

/// How the tokens of one sequence are drawn and when the sequence ends.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy. Range `[0, 2]`.
    pub temperature: f32,
    /// Nucleus mass kept, `(0, 1]`; 1 is off.
    pub top_p: f32,
    /// Number of most likely tokens kept; 0 is off.
    pub top_k: u32,
    /// Least probability relative to the most likely token, `[0, 1]`; 0 is off.
    pub min_p: f32,
    /// Locally typical mass kept, `(0, 1]`; 1 is off.
    pub typical_p: f32,
    /// Subtracted once from the logit of every token already generated, `[-2, 2]`.
    pub presence_penalty: f32,
    /// Subtracted from a token's logit per generated occurrence, `[-2, 2]`.
    pub frequency_penalty: f32,
    /// Divides positive and multiplies negative logits of prompt and generated tokens, `> 0`; 1 is off.
    pub repetition_penalty: f32,
    /// `(token id, bias)` pairs added to the logits.
    pub logit_bias: Vec<(u32, f32)>,
    /// Seed of this sequence's own random stream; the engine draws one when absent.
    pub seed: Option<u64>,
    /// Ending tokens are not drawn before this many tokens were generated.
    pub min_tokens: usize,
    /// Largest number of generated tokens; 0 computes the prompt only.
    pub max_tokens: usize,
    /// End-of-sequence ids of the model; skipped when `ignore_eos`.
    pub eos_token_ids: Vec<u32>,
    /// Ids the request itself named as ends.
    pub stop_token_ids: Vec<u32>,
    /// Whether generation goes on after an end-of-sequence token.
    pub ignore_eos: bool,
    /// Report the sampled token's logprob and this many most likely alternatives.
    pub logprobs: Option<usize>,
    /// The same for every prompt token.
    pub prompt_logprobs: Option<usize>,
}

impl Default for SamplingParams {
    /// vLLM's defaults, except that the number of tokens is 16 and no end-of-sequence id is known.
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            typical_p: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            logit_bias: Vec::new(),
            seed: None,
            min_tokens: 0,
            max_tokens: 16,
            eos_token_ids: Vec::new(),
            stop_token_ids: Vec::new(),
            ignore_eos: false,
            logprobs: None,
            prompt_logprobs: None,
        }
    }
}

/// One sequence to generate. A request for `n` choices is `n` of these with the same prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerateRequest {
    /// Name used in logs.
    pub request_id: String,
    /// Prompt, not empty, shorter than `max_model_len`.
    pub prompt_token_ids: Vec<u32>,
    /// How to sample and stop.
    pub sampling_params: SamplingParams,
    /// Lower runs first under the priority policy; ignored under first-come-first-served.
    pub priority: i64,
}

/// Why a sequence ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// A model end-of-sequence id was drawn.
    EndOfSequence,
    /// An id of `stop_token_ids` was drawn.
    StopToken(u32),
    /// `max_tokens` or the model's length was reached.
    Length,
    /// The engine is shutting down.
    Aborted,
}

/// Logprob of one token and of the most likely tokens at its position.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    /// The sampled (or prompt) token.
    pub token_id: u32,
    /// Natural logarithm of its probability under the raw logits.
    pub logprob: f32,
    /// Its place among all tokens by probability, from 1.
    pub rank: usize,
    /// The most likely `(token id, logprob)`, best first.
    pub top: Vec<(u32, f32)>,
}

/// What the engine reports about one sequence, in order.
#[derive(Debug, Clone, PartialEq)]
pub enum TokenEvent {
    /// The prompt was computed. Sent once, before the first token.
    Prompt {
        /// Prompt tokens whose keys and values came from the prefix cache.
        num_cached_tokens: usize,
        /// From `submit` to the first step that worked on the sequence.
        queue_time: Duration,
        /// One entry a prompt token (the first is `None`), when asked for.
        logprobs: Option<Vec<Option<TokenLogprobs>>>,
        /// Set when no token was asked for (`max_tokens == 0`): the stream then ends here.
        finish: Option<FinishReason>,
    },
    /// One token was drawn. The ending token itself is sent too.
    Token {
        /// The token.
        token_id: u32,
        /// Its logprobs, when asked for.
        logprobs: Option<TokenLogprobs>,
        /// Set on the last token of the sequence.
        finish: Option<FinishReason>,
    },
    /// The sequence can not go on; nothing follows.
    Failed {
        /// What happened, for the client.
        message: String,
    },
}

impl TokenEvent {
    /// Returns whether nothing follows this event.
    pub fn is_last(&self) -> bool {
        match self {
            Self::Prompt { finish, .. } | Self::Token { finish, .. } => finish.is_some(),
            Self::Failed { .. } => true,
        }
    }
}
