//! The JSON that answers are made of, in vLLM's field order.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::Serialize;

/// Answer of `/v1/chat/completions`.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub(in crate::serve) struct ChatCompletion {
    pub(super) id: String,
    pub(super) object: &'static str,
    pub(super) created: u64,
    pub(super) model: String,
    pub(super) choices: Vec<ChatChoice>,
    pub(super) service_tier: Option<String>,
    pub(super) system_fingerprint: Option<String>,
    pub(super) usage: Usage,
    pub(super) prompt_logprobs: Option<PromptLogprobs>,
    pub(super) prompt_token_ids: Option<Vec<u32>>,
}

/// One answer of a chat.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub(in crate::serve) struct ChatChoice {
    pub(super) index: usize,
    pub(super) message: AnswerMessage,
    pub(super) logprobs: Option<ChatLogprobs>,
    pub(super) finish_reason: &'static str,
    pub(super) stop_reason: Option<StopReason>,
    pub(super) token_ids: Option<Vec<u32>>,
}

/// The message of an answer; the null fields are those that the `openai` SDK knows.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub(in crate::serve) struct AnswerMessage {
    pub(super) role: String,
    pub(super) content: String,
    pub(super) refusal: Option<String>,
    pub(super) annotations: Option<Vec<String>>,
    pub(super) audio: Option<String>,
    pub(super) function_call: Option<String>,
    pub(super) reasoning: Option<String>,
}

/// One server-sent chunk of a chat.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub(in crate::serve) struct ChatChunk<'a> {
    pub(super) id: &'a str,
    pub(super) object: &'static str,
    pub(super) created: u64,
    pub(super) model: &'a str,
    pub(super) choices: Vec<ChatChunkChoice>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) prompt_token_ids: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) usage: Option<Usage>,
}

/// What one choice gains by a chunk.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub(in crate::serve) struct ChatChunkChoice {
    pub(super) index: usize,
    pub(super) delta: ChatDelta,
    pub(super) logprobs: Option<ChatLogprobs>,
    pub(super) finish_reason: Option<&'static str>,
    /// Outer `None`: not sent; set on the last chunk only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) stop_reason: Option<Option<StopReason>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) token_ids: Option<Vec<u32>>,
}

/// New parts of a message.
#[derive(Debug, Clone, Default, Serialize, JsonSchema)]
pub(in crate::serve) struct ChatDelta {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) role: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) content: Option<String>,
}

/// Logprobs of a chat answer.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
pub(in crate::serve) struct ChatLogprobs {
    pub(super) content: Vec<ChatTokenLogprob>,
}

/// Logprob of a token of a chat answer and of its alternatives.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
pub(in crate::serve) struct ChatTokenLogprob {
    pub(super) token: String,
    pub(super) logprob: f32,
    pub(super) bytes: Vec<u8>,
    pub(super) top_logprobs: Vec<ChatTopLogprob>,
}

/// Logprob of an alternative.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
pub(in crate::serve) struct ChatTopLogprob {
    pub(super) token: String,
    pub(super) logprob: f32,
    pub(super) bytes: Vec<u8>,
}

/// Answer and chunk of `/v1/completions`.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub(in crate::serve) struct Completion<'a> {
    pub(super) id: &'a str,
    pub(super) object: &'static str,
    pub(super) created: u64,
    pub(super) model: &'a str,
    pub(super) choices: Vec<CompletionChoice>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) usage: Option<Usage>,
}

/// One answer of a completion, or what it gains by a chunk.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub(in crate::serve) struct CompletionChoice {
    pub(super) index: usize,
    pub(super) text: String,
    pub(super) logprobs: Option<CompletionLogprobs>,
    pub(super) finish_reason: Option<&'static str>,
    pub(super) stop_reason: Option<StopReason>,
    pub(super) prompt_logprobs: Option<PromptLogprobs>,
    pub(super) token_ids: Option<Vec<u32>>,
    pub(super) prompt_token_ids: Option<Vec<u32>>,
}

/// Logprobs of a completion: one entry a token in each list.
#[derive(Debug, Clone, Default, PartialEq, Serialize, JsonSchema)]
pub(in crate::serve) struct CompletionLogprobs {
    pub(super) text_offset: Vec<usize>,
    pub(super) token_logprobs: Vec<Option<f32>>,
    pub(super) tokens: Vec<String>,
    pub(super) top_logprobs: Vec<Option<BTreeMap<String, f32>>>,
}

/// For each prompt token (null for the first) the logprobs by token id.
pub(super) type PromptLogprobs = Vec<Option<BTreeMap<u32, PromptLogprob>>>;

/// Logprob of one candidate for a prompt token.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
pub(in crate::serve) struct PromptLogprob {
    pub(super) logprob: f32,
    pub(super) rank: usize,
    pub(super) decoded_token: String,
}

/// What ended an answer besides its end-of-sequence token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(untagged)]
pub(in crate::serve) enum StopReason {
    /// A stop string.
    Text(String),
    /// A stop token.
    TokenId(u32),
}

/// Tokens that a request used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub(in crate::serve) struct Usage {
    pub(super) prompt_tokens: usize,
    pub(super) total_tokens: usize,
    pub(super) completion_tokens: usize,
    pub(super) prompt_tokens_details: Option<PromptTokensDetails>,
}

/// Where the prompt's keys and values came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
pub(in crate::serve) struct PromptTokensDetails {
    pub(super) cached_tokens: usize,
}

impl Usage {
    /// Adds up prompt and generated tokens.
    pub(super) fn new(prompt_tokens: usize, completion_tokens: usize) -> Self {
        Self {
            prompt_tokens,
            total_tokens: prompt_tokens + completion_tokens,
            completion_tokens,
            prompt_tokens_details: None,
        }
    }
}
