//! Checked fields to engine requests: tokens, context length, choices.
//!
//! The last place that sees the wire's fields; behind [`Generation::submit`] there are only
//! token ids and events.

use std::sync::Arc;

use crate::engine::{GenerateRequest, SamplingParams};
use crate::text::{
    AddSpecialTokens, Detokenizer, IncludeStopString, SkipSpecialTokens, StopStrings, TextError,
    Tokenizer,
};

use super::super::error::ApiError;
use super::super::metrics::RequestTimer;
use super::super::observe::RequestRecord;
use super::super::state::{AppState, unix_seconds};
use super::choice::{Choice, ChoiceText, EndingToken};
use super::logprobs::{LogprobWriter, TokenSpelling};
use super::types::{SamplingFields, TruncationSide};
use super::validate::{Checked, Truncation, check_room};

/// A request ready for the engine.
pub(super) struct Generation {
    /// `chatcmpl-…` or `cmpl-…`.
    pub(super) id: String,
    /// Model name for the answer.
    pub(super) model: String,
    /// Seconds of the unix epoch.
    pub(super) created: u64,
    /// One or more prompts.
    pub(super) prompts: Vec<PreparedPrompt>,
    /// Checked values.
    pub(super) checked: Checked,
    /// What the answer contains.
    pub(super) output: OutputOptions,
    /// For the scheduler.
    pub(super) priority: i64,
}

/// A prompt that fits the context.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PreparedPrompt {
    /// Its tokens, not empty.
    pub(super) token_ids: Vec<u32>,
    /// Its text, for `echo`.
    pub(super) text: String,
    /// Most tokens to generate after it.
    pub(super) max_tokens: usize,
}

/// What the answer contains.
#[derive(Debug, Clone, Copy)]
pub(super) struct OutputOptions {
    pub(super) skip_special_tokens: SkipSpecialTokens,
    pub(super) include_stop: IncludeStopString,
    pub(super) token_spelling: TokenSpelling,
    /// Whether token ids are returned.
    pub(super) token_ids: bool,
}

impl OutputOptions {
    fn new(fields: &SamplingFields, state: &AppState) -> Self {
        let as_ids = fields.return_tokens_as_token_ids;
        Self {
            skip_special_tokens: match fields.skip_special_tokens {
                Some(false) => SkipSpecialTokens::No,
                _ => SkipSpecialTokens::Yes,
            },
            include_stop: match fields.include_stop_str_in_output {
                Some(true) => IncludeStopString::Yes,
                _ => IncludeStopString::No,
            },
            token_spelling: match as_ids.unwrap_or(state.options.tokens_as_token_ids) {
                true => TokenSpelling::Id,
                false => TokenSpelling::Text,
            },
            token_ids: fields.return_token_ids.unwrap_or(false),
        }
    }
}

impl Generation {
    /// Puts a request together; `kind` is the prefix of its id.
    pub(super) fn new(
        kind: &str,
        fields: &SamplingFields,
        checked: Checked,
        prompts: Vec<PreparedPrompt>,
        state: &AppState,
        record: &RequestRecord,
    ) -> Result<Self, ApiError> {
        let num_sequences = prompts.len().saturating_mul(checked.best_of);
        let max_num_waiting = state.engine.info().max_num_waiting;
        if num_sequences > max_num_waiting {
            let message = format!(
                "The request asks for {num_sequences} sequences, but this server takes at most \
                 {max_num_waiting} at a time (--max-queued-requests)."
            );
            return Err(ApiError::invalid("n", message));
        }
        let id = record
            .request_id
            .clone()
            .or_else(|| fields.request_id.clone());
        let id = id.unwrap_or_else(|| uuid::Uuid::new_v4().simple().to_string());
        let num_prompt_tokens = prompts.iter().map(|prompt| prompt.token_ids.len()).sum();
        record.set_prompt_tokens(num_prompt_tokens);
        let id = format!("{kind}-{id}");
        record.set_response_id(&id);
        Ok(Self {
            id,
            // The first served name, whichever of them the request used.
            model: state.model.name().to_owned(),
            created: unix_seconds(),
            prompts,
            checked,
            output: OutputOptions::new(fields, state),
            priority: fields.priority.unwrap_or(0),
        })
    }

    /// Queues all choices; choice `j` of prompt `i` has index `i * best_of + j`. Those of one prompt
    /// go to one replica of the engine.
    ///
    /// # Errors
    /// A full queue or a dead engine; choices queued before are dropped.
    pub(super) fn submit(
        &self,
        state: &Arc<AppState>,
        record: &Arc<RequestRecord>,
    ) -> Result<Vec<Choice>, ApiError> {
        let mut choices = Vec::new();
        let stop: Arc<[String]> = self.checked.stop.clone().into();
        let stop_strings = StopStrings::new(stop.to_vec(), self.output.include_stop)
            .map_err(|error| text_error("stop", &error))?;
        for prompt in &self.prompts {
            let first = choices.len();
            let requests = (0..self.checked.best_of)
                .map(|nth| self.request(prompt, nth, first + nth))
                .collect();
            for tokens in state.engine.submit_choices(requests)? {
                let (index, engine) = (choices.len(), tokens.replica());
                if index == first {
                    let (num_tokens, n) = (prompt.token_ids.len(), self.checked.n);
                    let metrics = &state.metrics;
                    metrics.observe_request(engine, num_tokens, n, prompt.max_tokens);
                }
                choices.push(Choice {
                    index,
                    state: Arc::clone(state),
                    tokens: Some(tokens),
                    text: self.choice_text(state, prompt, &stop, stop_strings.clone()),
                    timer: RequestTimer::start(engine),
                    record: Arc::clone(record),
                    finish_after_prompt: None,
                    has_started: false,
                });
            }
        }
        Ok(choices)
    }

    fn request(&self, prompt: &PreparedPrompt, nth: usize, index: usize) -> GenerateRequest {
        let params = &self.checked.params;
        GenerateRequest {
            request_id: match self.checked.best_of * self.prompts.len() {
                1 => self.id.clone(),
                _ => format!("{}-{index}", self.id),
            },
            prompt_token_ids: prompt.token_ids.clone(),
            sampling_params: SamplingParams {
                // The choices of one prompt must differ, and still be the same at every run.
                seed: params.seed.map(|seed| seed.wrapping_add(nth as u64)),
                max_tokens: prompt.max_tokens,
                ..params.clone()
            },
            priority: self.priority,
        }
    }

    fn choice_text(
        &self,
        state: &AppState,
        prompt: &PreparedPrompt,
        stop: &Arc<[String]>,
        stop_strings: StopStrings,
    ) -> ChoiceText {
        let OutputOptions {
            skip_special_tokens,
            include_stop,
            ..
        } = self.output;
        let tokenizer = &state.tokenizer;
        ChoiceText {
            detokenizer: Detokenizer::after_prompt(
                tokenizer,
                &prompt.token_ids,
                skip_special_tokens,
            ),
            stop_strings,
            stop: Arc::clone(stop),
            num_unchecked_tokens: self.checked.params.min_tokens,
            ending_token: match include_stop {
                IncludeStopString::Yes => EndingToken::Kept,
                IncludeStopString::No => EndingToken::LeftOut,
            },
        }
    }

    /// Returns what writes this request's logprobs.
    pub(super) fn logprob_writer<'a>(&self, tokenizer: &'a Tokenizer) -> LogprobWriter<'a> {
        LogprobWriter {
            tokenizer,
            spelling: self.output.token_spelling,
        }
    }

    /// Logs what will be generated, if the operator asked for it.
    pub(super) fn log(&self, state: &AppState) {
        if !state.options.log_requests {
            return;
        }
        for prompt in &self.prompts {
            let text: String = prompt
                .text
                .chars()
                .take(state.options.max_log_len)
                .collect();
            tracing::info!(
                request_id = self.id,
                prompt = text,
                num_prompt_tokens = prompt.token_ids.len(),
                max_tokens = prompt.max_tokens,
                params = ?self.checked.params,
                "request"
            );
        }
    }
}

/// Refuses a model that is not served; an absent or empty name means the served one.
///
/// # Errors
/// 404 with the name.
pub(in crate::serve) fn check_model(state: &AppState, model: Option<&str>) -> Result<(), ApiError> {
    match model {
        Some(name) if !name.is_empty() && !state.model.names.iter().any(|known| known == name) => {
            Err(ApiError::model_not_found(name))
        }
        _ => Ok(()),
    }
}

/// Checks token ids that a client sent.
///
/// # Errors
/// The first id outside the vocabulary.
pub(in crate::serve) fn check_token_ids(
    state: &AppState,
    param: &str,
    token_ids: &[i64],
) -> Result<Vec<u32>, ApiError> {
    // The model may have more rows than the tokenizer has tokens; such ids have no text.
    let vocab_size = state
        .engine
        .info()
        .vocab_size
        .max(state.tokenizer.vocab_size());
    let known = |id: &i64| {
        u32::try_from(*id)
            .ok()
            .filter(|id| (*id as usize) < vocab_size)
    };
    let check = |id: &i64| {
        known(id).ok_or_else(|| {
            let message =
                format!("Token id {id} is out of vocabulary. Vocabulary size: {vocab_size}");
            ApiError::invalid(param, message)
        })
    };
    token_ids.iter().map(check).collect()
}

/// Encodes a text.
///
/// # Errors
/// A text that the vocabulary can not express.
pub(in crate::serve) fn encode(
    state: &AppState,
    text: &str,
    add: AddSpecialTokens,
) -> Result<Vec<u32>, ApiError> {
    state
        .tokenizer
        .encode(text, add)
        .map_err(|error| text_error("prompt", &error))
}

/// Encodes the text of a prompt, unless it is too long whatever its tokens are.
///
/// # Errors
/// Such a text, if it is not to be cut, and those of [`encode`].
pub(super) fn encode_prompt(
    state: &AppState,
    checked: &Checked,
    text: &str,
    add: AddSpecialTokens,
) -> Result<Vec<u32>, ApiError> {
    let max_model_len = state.engine.info().max_model_len;
    let most = max_model_len.saturating_mul(state.tokenizer.longest_token());
    if checked.truncation.is_none() && text.len() > most {
        let message = format!(
            "This model's maximum context length is {max_model_len} tokens. However, your prompt \
             has {} bytes, and so many tokens have at most {most}. Please reduce the length of the \
             input prompt.",
            text.len()
        );
        return Err(ApiError::invalid("input_text", message));
    }
    encode(state, text, add)
}

/// Cuts a prompt if asked to and bounds its output by the context.
///
/// `asked` is the number of output tokens the request names, `fallback` the endpoint's default;
/// without either the rest of the context is used.
///
/// # Errors
/// An empty prompt, or one that leaves no room, or not for `min_tokens`.
pub(super) fn fit_context(
    state: &AppState,
    checked: &Checked,
    mut token_ids: Vec<u32>,
    text: Option<String>,
    fallback: Option<usize>,
) -> Result<PreparedPrompt, ApiError> {
    let max_model_len = state.engine.info().max_model_len;
    let asked = checked.max_tokens.or(fallback);
    let mut text = text;
    if let Some(Truncation { keep, side }) = checked.truncation {
        let room = max_model_len.saturating_sub(asked.unwrap_or(1).max(1));
        let keep = keep.unwrap_or(room);
        if token_ids.len() > keep {
            match side {
                TruncationSide::Left => drop(token_ids.drain(..token_ids.len() - keep)),
                TruncationSide::Right => token_ids.truncate(keep),
            }
            text = None;
        }
    }
    if token_ids.is_empty() {
        return Err(ApiError::invalid(
            "prompt",
            "The decoder prompt cannot be empty",
        ));
    }
    let num_prompt_tokens = token_ids.len();
    let requested = asked.unwrap_or(1);
    if num_prompt_tokens.saturating_add(requested) > max_model_len {
        return Err(ApiError::context_overflow(
            max_model_len,
            requested,
            num_prompt_tokens,
        ));
    }
    let defaults = &state.sampling_defaults;
    let room = max_model_len - num_prompt_tokens;
    let wanted = asked.or(defaults.max_tokens).unwrap_or(room);
    let cap = defaults.max_tokens_cap.unwrap_or(room);
    let max_tokens = wanted.min(cap).min(room);
    check_room(checked.params.min_tokens, max_tokens)?;
    let text = text.unwrap_or_else(|| state.tokenizer.decode(&token_ids, SkipSpecialTokens::No));
    Ok(PreparedPrompt {
        token_ids,
        text,
        max_tokens,
    })
}

/// Turns a failure of the text folder into an answer; `param` is the field at fault.
pub(super) fn text_error(param: &str, error: &TextError) -> ApiError {
    if error.is_user_error() {
        ApiError::invalid(param, error.to_string())
    } else {
        ApiError::internal(error.to_string())
    }
}
