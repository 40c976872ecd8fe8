//! One choice of a request: token events in, text out.
//!
//! Detokenises as tokens arrive, looks for stop strings across token borders, and drops the
//! engine's stream as soon as the answer is complete, which frees the sequence. Handlers read
//! [`ChoiceUpdate`]s and turn them into their endpoint's JSON.

use std::pin::Pin;
use std::sync::Arc;

use futures::stream::{self, Stream};

use crate::engine::{FinishReason, TokenEvent, TokenLogprobs, TokenStream};
use crate::text::{Detokenizer, StopStrings};

use super::super::error::ApiError;
use super::super::metrics::RequestTimer;
use super::super::observe::RequestRecord;
use super::super::state::AppState;
use super::responses::StopReason;

/// What a choice gained.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum ChoiceUpdate {
    /// The prompt was computed. Comes once, first.
    Prompt(PromptInfo),
    /// Tokens were drawn.
    Delta(Delta),
    /// The choice can not be finished; nothing follows.
    Failed(String),
}

/// What is known once the prompt is computed.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct PromptInfo {
    /// Prompt tokens found in the prefix cache.
    pub(super) num_cached_tokens: usize,
    /// One entry a prompt token, when asked for.
    pub(super) logprobs: Option<Vec<Option<TokenLogprobs>>>,
}

/// New tokens and the text that has become certain.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Delta {
    /// Text to send, free of stop strings and broken characters.
    pub(super) text: String,
    /// The tokens, the ending one included.
    pub(super) tokens: Vec<DrawnToken>,
    /// Set on the last delta.
    pub(super) finish: Option<Finish>,
}

/// A generated token.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct DrawnToken {
    /// Its id.
    pub(super) token_id: u32,
    /// Its logprobs, when asked for.
    pub(super) logprobs: Option<TokenLogprobs>,
}

/// Why a choice ended, in the API's words.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Finish {
    /// `stop`, `length` or `abort`.
    pub(super) reason: &'static str,
    /// The stop string or token.
    pub(super) stop_reason: Option<StopReason>,
}

impl Finish {
    fn new(reason: FinishReason) -> Self {
        let (reason, stop_reason) = match reason {
            FinishReason::EndOfSequence => ("stop", None),
            FinishReason::StopToken(id) => ("stop", Some(StopReason::TokenId(id))),
            FinishReason::Length => ("length", None),
            FinishReason::Aborted => ("abort", None),
        };
        Self {
            reason,
            stop_reason,
        }
    }
}

/// A choice in generation.
pub(super) struct Choice {
    pub(super) index: usize,
    pub(super) state: Arc<AppState>,
    /// Dropped when the choice is complete: that aborts the sequence.
    pub(super) tokens: Option<TokenStream>,
    pub(super) text: ChoiceText,
    pub(super) timer: RequestTimer,
    pub(super) record: Arc<RequestRecord>,
    /// The end of a choice without tokens, reported after its prompt.
    pub(super) finish_after_prompt: Option<FinishReason>,
    /// Whether a delta was returned: the first one is never held back.
    pub(super) has_started: bool,
}

impl Choice {
    /// Returns the next update; `None` after the last one.
    pub(super) async fn next(&mut self) -> Option<ChoiceUpdate> {
        if let Some(reason) = self.finish_after_prompt.take() {
            let delta = Delta {
                finish: Some(Finish::new(reason)),
                ..Delta::default()
            };
            return Some(self.complete(delta));
        }
        let interval = if self.has_started {
            self.state.options.stream_interval
        } else {
            1
        };
        let mut delta = Delta::default();
        while delta.tokens.len() < interval {
            let Some(event) = self.tokens.as_mut()?.next().await else {
                return Some(self.fail(self.reason_of_silence()));
            };
            match event {
                TokenEvent::Prompt {
                    num_cached_tokens,
                    queue_time,
                    logprobs,
                    finish,
                } => {
                    let metrics = &self.state.metrics;
                    self.timer
                        .prompt_done(metrics, num_cached_tokens, queue_time);
                    self.finish_after_prompt = finish;
                    return Some(ChoiceUpdate::Prompt(PromptInfo {
                        num_cached_tokens,
                        logprobs,
                    }));
                }
                TokenEvent::Token {
                    token_id,
                    logprobs,
                    finish,
                } => {
                    self.has_started = true;
                    self.timer.token(&self.state.metrics);
                    self.record.add_completion_token();
                    delta.tokens.push(DrawnToken { token_id, logprobs });
                    let (text, end) = self.text.push(&self.state, token_id, finish);
                    delta.text.push_str(&text);
                    if end.is_some() {
                        delta.finish = end;
                        return Some(self.complete(delta));
                    }
                }
                TokenEvent::Failed { message } => return Some(self.fail(message)),
            }
        }
        Some(ChoiceUpdate::Delta(delta))
    }

    fn complete(&mut self, delta: Delta) -> ChoiceUpdate {
        self.tokens = None;
        if let Some(finish) = &delta.finish {
            self.timer.finish(&self.state.metrics, finish.reason);
        }
        ChoiceUpdate::Delta(delta)
    }

    fn fail(&mut self, message: String) -> ChoiceUpdate {
        self.tokens = None;
        self.timer.finish(&self.state.metrics, "error");
        ChoiceUpdate::Failed(message)
    }

    /// Explains a stream that ended without a last event.
    fn reason_of_silence(&self) -> String {
        match self.state.engine.death() {
            Some(reason) => format!("the engine has stopped: {reason}"),
            None => "the engine dropped the request".to_owned(),
        }
    }
}

impl Drop for Choice {
    /// Counts a choice whose client went away.
    fn drop(&mut self) {
        if self.tokens.is_some() {
            self.timer.finish(&self.state.metrics, "abort");
        }
    }
}

/// The text of a choice as it grows.
pub(super) struct ChoiceText {
    pub(super) detokenizer: Detokenizer,
    pub(super) stop_strings: StopStrings,
    /// The strings that `stop_strings` counts, for the answer's `stop_reason`.
    pub(super) stop: Arc<[String]>,
    /// Tokens in which no stop string counts yet.
    pub(super) num_unchecked_tokens: usize,
    /// Whether an ending token is part of the text.
    pub(super) ending_token: EndingToken,
}

/// Whether the token that ends a choice belongs to its text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum EndingToken {
    /// It does (`include_stop_str_in_output`).
    Kept,
    /// It does not.
    LeftOut,
}

impl ChoiceText {
    /// Takes a token; returns new text and, at the end, why the choice ended.
    fn push(
        &mut self,
        state: &AppState,
        token_id: u32,
        finish: Option<FinishReason>,
    ) -> (String, Option<Finish>) {
        let ends_by_token = matches!(
            finish,
            Some(FinishReason::EndOfSequence | FinishReason::StopToken(_))
        );
        let mut new_text = String::new();
        if !ends_by_token || self.ending_token == EndingToken::Kept {
            new_text = self.detokenizer.push(&state.tokenizer, token_id);
        }
        if finish.is_some() {
            new_text.push_str(&self.detokenizer.finish(&state.tokenizer));
        }
        if self.num_unchecked_tokens > 0 {
            self.num_unchecked_tokens -= 1;
            return (new_text, finish.map(Finish::new));
        }
        let outcome = self.stop_strings.push(&new_text);
        if let Some(index) = outcome.stopped {
            let stop_reason = self.stop.get(index).cloned().map(StopReason::Text);
            return (
                outcome.emit,
                Some(Finish {
                    reason: "stop",
                    stop_reason,
                }),
            );
        }
        let mut text = outcome.emit;
        if finish.is_some() {
            text.push_str(&self.stop_strings.finish());
        }
        (text, finish.map(Finish::new))
    }
}

/// The updates of several choices as they come, each with its choice's index.
pub(super) type Updates = Pin<Box<dyn Stream<Item = (usize, ChoiceUpdate)> + Send>>;

/// Merges choices into one stream.
pub(super) fn merge(mut choices: Vec<Choice>) -> Updates {
    // `select_all` allocates and takes locks for every item, and most requests have one choice.
    match choices.pop() {
        Some(choice) if choices.is_empty() => updates_of(choice),
        last => Box::pin(stream::select_all(
            choices.into_iter().chain(last).map(updates_of),
        )),
    }
}

fn updates_of(choice: Choice) -> Updates {
    Box::pin(stream::unfold(choice, |mut choice| async move {
        let update = choice.next().await?;
        Some(((choice.index, update), choice))
    }))
}

/// A choice that has ended.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct FinishedChoice {
    pub(super) index: usize,
    pub(super) prompt: PromptInfo,
    pub(super) text: String,
    pub(super) tokens: Vec<DrawnToken>,
    pub(super) finish: Finish,
}

impl FinishedChoice {
    /// Returns the mean logprob of the tokens, by which `best_of` ranks.
    pub(super) fn mean_logprob(&self) -> f32 {
        let logprobs = self
            .tokens
            .iter()
            .filter_map(|token| token.logprobs.as_ref());
        let sum: f32 = logprobs.map(|logprobs| logprobs.logprob).sum();
        sum / self.tokens.len().max(1) as f32
    }
}

/// Waits for all choices.
///
/// # Errors
/// The first choice that can not be finished; the others are dropped.
pub(super) async fn collect(choices: Vec<Choice>) -> Result<Vec<FinishedChoice>, ApiError> {
    futures::future::try_join_all(choices.into_iter().map(collect_one)).await
}

async fn collect_one(mut choice: Choice) -> Result<FinishedChoice, ApiError> {
    let (mut prompt, mut text, mut tokens) = (PromptInfo::default(), String::new(), Vec::new());
    while let Some(update) = choice.next().await {
        match update {
            ChoiceUpdate::Prompt(info) => prompt = info,
            ChoiceUpdate::Failed(message) => return Err(ApiError::internal(message)),
            ChoiceUpdate::Delta(delta) => {
                text.push_str(&delta.text);
                tokens.extend(delta.tokens);
                if let Some(finish) = delta.finish {
                    return Ok(FinishedChoice {
                        index: choice.index,
                        prompt,
                        text,
                        tokens,
                        finish,
                    });
                }
            }
        }
    }
    Err(ApiError::internal("the engine ended the request early"))
}
