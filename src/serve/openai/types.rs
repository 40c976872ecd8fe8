//! The JSON that requests are made of, field by field as vLLM and OpenAI name them.
//!
//! A body is read by two of these structs, [`SamplingFields`] and the endpoint's own, so that
//! the thirty fields which chats and completions share are written once. Every field may be
//! absent or null; unknown fields are skipped; numbers and switches may be written as in [`super::lax`].
//! Values are checked in [`super::validate`].

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::lax;
use super::unions::{MessageContent, Prompt, StringOrList};

/// What `/v1/chat/completions` and `/v1/completions` have in common.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
pub(in crate::serve) struct SamplingFields {
    /// Model name; the served model when absent.
    pub(in crate::serve) model: Option<String>,
    /// Number of answers.
    #[schemars(range(min = 1, max = 16384))]
    #[serde(default, deserialize_with = "lax::integer")]
    pub(in crate::serve) n: Option<i64>,
    /// Number of answers drawn, of which the `n` most likely are returned.
    #[serde(default, deserialize_with = "lax::integer")]
    pub(in crate::serve) best_of: Option<i64>,
    /// Randomness; 0 takes the most likely token.
    #[schemars(range(min = 0.0, max = 2.0))]
    #[serde(default, deserialize_with = "lax::number")]
    pub(in crate::serve) temperature: Option<f64>,
    /// Probability mass to draw from.
    #[schemars(range(max = 1.0))]
    #[serde(default, deserialize_with = "lax::number")]
    pub(in crate::serve) top_p: Option<f64>,
    /// Number of most likely tokens to draw from; 0 or -1 for all.
    #[schemars(range(min = -1))]
    #[serde(default, deserialize_with = "lax::integer")]
    pub(in crate::serve) top_k: Option<i64>,
    /// Least probability relative to the most likely token.
    #[schemars(range(min = 0.0, max = 1.0))]
    #[serde(default, deserialize_with = "lax::number")]
    pub(in crate::serve) min_p: Option<f64>,
    /// Locally typical mass to draw from.
    #[schemars(range(max = 1.0))]
    #[serde(default, deserialize_with = "lax::number")]
    pub(in crate::serve) typical_p: Option<f64>,
    /// Penalty on tokens that were generated already.
    #[schemars(range(min = -2.0, max = 2.0))]
    #[serde(default, deserialize_with = "lax::number")]
    pub(in crate::serve) presence_penalty: Option<f64>,
    /// Penalty on tokens by how often they were generated.
    #[schemars(range(min = -2.0, max = 2.0))]
    #[serde(default, deserialize_with = "lax::number")]
    pub(in crate::serve) frequency_penalty: Option<f64>,
    /// Factor against tokens of prompt and answer; 1 is off.
    #[serde(default, deserialize_with = "lax::number")]
    pub(in crate::serve) repetition_penalty: Option<f64>,
    /// Token ids (as strings) and what is added to their logits, clamped to ±100.
    pub(in crate::serve) logit_bias: Option<BTreeMap<String, f64>>,
    /// Seed of the request's own random stream.
    #[serde(default, deserialize_with = "lax::integer")]
    pub(in crate::serve) seed: Option<i64>,
    /// Strings that end the answer.
    pub(in crate::serve) stop: Option<StringOrList>,
    /// Token ids that end the answer.
    pub(in crate::serve) stop_token_ids: Option<Vec<i64>>,
    /// Keep the stop string in the answer.
    #[serde(default, deserialize_with = "lax::switch")]
    pub(in crate::serve) include_stop_str_in_output: Option<bool>,
    /// Go on after the end-of-sequence token.
    #[serde(default, deserialize_with = "lax::switch")]
    pub(in crate::serve) ignore_eos: Option<bool>,
    /// Do not end before this many tokens.
    #[schemars(range(min = 0))]
    #[serde(default, deserialize_with = "lax::integer")]
    pub(in crate::serve) min_tokens: Option<i64>,
    /// Most tokens to generate.
    #[serde(default, deserialize_with = "lax::integer")]
    pub(in crate::serve) max_tokens: Option<i64>,
    /// Leave special tokens out of the text.
    #[serde(default, deserialize_with = "lax::switch")]
    pub(in crate::serve) skip_special_tokens: Option<bool>,
    /// Report this many most likely tokens for each prompt token.
    #[serde(default, deserialize_with = "lax::integer")]
    pub(in crate::serve) prompt_logprobs: Option<i64>,
    /// Keep only this many prompt tokens; -1 for as many as fit.
    #[serde(default, deserialize_with = "lax::integer")]
    pub(in crate::serve) truncate_prompt_tokens: Option<i64>,
    /// Which end `truncate_prompt_tokens` keeps: the last tokens (`left`, the default) or the first.
    pub(in crate::serve) truncation_side: Option<TruncationSide>,
    /// Repeat the prompt (completions) or the last message (chats) before the answer.
    #[serde(default, deserialize_with = "lax::switch")]
    pub(in crate::serve) echo: Option<bool>,
    /// Put the tokenizer's own special tokens around the prompt.
    #[serde(default, deserialize_with = "lax::switch")]
    pub(in crate::serve) add_special_tokens: Option<bool>,
    /// Lower runs first under `--scheduling-policy priority`.
    #[serde(default, deserialize_with = "lax::integer")]
    pub(in crate::serve) priority: Option<i64>,
    /// Id of the request, used when no X-Request-Id header is sent.
    pub(in crate::serve) request_id: Option<String>,
    /// Return the token ids of prompt and answer.
    #[serde(default, deserialize_with = "lax::switch")]
    pub(in crate::serve) return_token_ids: Option<bool>,
    /// Write `token_id:N` for tokens in logprobs.
    #[serde(default, deserialize_with = "lax::switch")]
    pub(in crate::serve) return_tokens_as_token_ids: Option<bool>,
    /// Send the answer as server-sent events.
    #[serde(default, deserialize_with = "lax::switch")]
    pub(in crate::serve) stream: Option<bool>,
    /// What a stream contains besides text.
    pub(in crate::serve) stream_options: Option<StreamOptions>,
}

/// The side of a prompt from which tokens are cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(in crate::serve) enum TruncationSide {
    /// The last tokens stay.
    Left,
    /// The first tokens stay.
    Right,
}

/// What a stream contains besides text.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
pub(in crate::serve) struct StreamOptions {
    /// End with a chunk that carries the usage.
    #[serde(default, deserialize_with = "lax::switch")]
    pub(in crate::serve) include_usage: Option<bool>,
    /// Put the usage so far into every chunk.
    #[serde(default, deserialize_with = "lax::switch")]
    pub(in crate::serve) continuous_usage_stats: Option<bool>,
}

/// What only `/v1/chat/completions` has.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
pub(in crate::serve) struct ChatFields {
    /// The conversation.
    #[schemars(length(min = 1))]
    pub(in crate::serve) messages: Vec<ChatMessage>,
    /// Most tokens to generate; wins over `max_tokens`.
    #[serde(default, deserialize_with = "lax::integer")]
    pub(in crate::serve) max_completion_tokens: Option<i64>,
    /// Return the logprob of each token.
    #[serde(default, deserialize_with = "lax::switch")]
    pub(in crate::serve) logprobs: Option<bool>,
    /// With `logprobs`: also of this many most likely tokens.
    #[serde(default, deserialize_with = "lax::integer")]
    pub(in crate::serve) top_logprobs: Option<i64>,
}

/// How messages become a prompt.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
pub(in crate::serve) struct TemplateFields {
    /// Begin the answer's turn (the default).
    #[serde(default, deserialize_with = "lax::switch")]
    pub(in crate::serve) add_generation_prompt: Option<bool>,
    /// Continue the last message instead of beginning a turn.
    #[serde(default, deserialize_with = "lax::switch")]
    pub(in crate::serve) continue_final_message: Option<bool>,
    /// Template for this request; needs `--trust-request-chat-template`.
    pub(in crate::serve) chat_template: Option<String>,
    /// Further variables of the template.
    pub(in crate::serve) chat_template_kwargs: Option<Map<String, Value>>,
}

/// One message of a chat.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
pub(in crate::serve) struct ChatMessage {
    /// Who speaks: system, user, assistant, tool or whatever the template knows.
    pub(in crate::serve) role: String,
    /// What is said.
    pub(in crate::serve) content: Option<MessageContent>,
    /// Name of the speaker.
    pub(in crate::serve) name: Option<String>,
    /// Tools the assistant called in an earlier turn, for the template.
    pub(in crate::serve) tool_calls: Option<Vec<Value>>,
    /// The call that a tool message answers.
    pub(in crate::serve) tool_call_id: Option<String>,
    /// Reasoning of an earlier turn, for the template.
    pub(in crate::serve) reasoning: Option<String>,
    /// The same under its older name.
    pub(in crate::serve) reasoning_content: Option<String>,
}

/// What only `/v1/completions` has.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
pub(in crate::serve) struct CompletionFields {
    /// Text, token ids, or a list of either.
    pub(in crate::serve) prompt: Option<Prompt>,
    /// Return the logprobs of each token and of this many most likely tokens.
    #[serde(default, deserialize_with = "lax::integer")]
    pub(in crate::serve) logprobs: Option<i64>,
}

/// Body of `/tokenize`: a prompt or messages.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
pub(in crate::serve) struct TokenizeRequest {
    /// Model name; the served model when absent.
    pub(in crate::serve) model: Option<String>,
    /// Text to encode.
    pub(in crate::serve) prompt: Option<String>,
    /// Chat to render and encode.
    pub(in crate::serve) messages: Option<Vec<ChatMessage>>,
    /// Put the tokenizer's own special tokens around it: true for a prompt, false for a chat.
    #[serde(default, deserialize_with = "lax::switch")]
    pub(in crate::serve) add_special_tokens: Option<bool>,
    /// Return the tokens' own spelling too.
    #[serde(default, deserialize_with = "lax::switch")]
    pub(in crate::serve) return_token_strs: Option<bool>,
}

/// Body of `/detokenize`.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
pub(in crate::serve) struct DetokenizeRequest {
    /// Model name; the served model when absent.
    pub(in crate::serve) model: Option<String>,
    /// Token ids.
    pub(in crate::serve) tokens: Vec<i64>,
}
