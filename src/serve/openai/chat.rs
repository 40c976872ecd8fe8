//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::extract::{Extension, Request, State};
use axum::response::{IntoResponse, Response};
use axum::{Json, body::Bytes};

use crate::text::AddSpecialTokens;

use super::super::body::{off_workers, parse, read_json_body};
use super::super::error::ApiError;
use super::super::observe::RequestRecord;
use super::super::state::AppState;
use super::choice::{ChoiceUpdate, Delta, DrawnToken, FinishedChoice, collect, merge};
use super::convert::{Generation, check_model, encode_prompt, fit_context};
use super::responses::{
    AnswerMessage, ChatChoice, ChatChunk, ChatChunkChoice, ChatCompletion, ChatDelta, ChatLogprobs,
    Usage,
};
use super::stream::{event_stream, push_event};
use super::template::render_chat;
use super::types::{ChatFields, SamplingFields, TemplateFields};
use super::unions::RefusedFields;
use super::usage::{UsageCounter, keep_best, usage_of};
use super::validate::{EndpointFields, check_refused, check_sampling};

/// Answers a chat.
pub(in crate::serve) async fn chat_completions(
    State(state): State<Arc<AppState>>,
    Extension(record): Extension<Arc<RequestRecord>>,
    request: Request,
) -> Result<Response, ApiError> {
    let body = read_json_body(request, state.options.max_body_size).await?;
    let num_bytes = body.len();
    let (shared_state, shared_record) = (Arc::clone(&state), Arc::clone(&record));
    let prepare = move || Chat::prepare(&shared_state, &shared_record, &body);
    let chat = off_workers(num_bytes, prepare).await?;
    chat.generation.log(&state);
    let choices = chat.generation.submit(&state, &record)?;
    if chat.generation.checked.stream.is_some() {
        let mut chunks = ChatChunks::new(state, chat);
        return Ok(event_stream(merge(choices), move |update| {
            chunks.write(update)
        }));
    }
    let finished = collect(choices).await?;
    Ok(Json(chat.answer(&state, finished)).into_response())
}

/// A chat ready for the engine.
struct Chat {
    generation: Generation,
    /// Role of the answer.
    role: String,
    /// Put before the answer (`echo`).
    echo: String,
    /// Alternatives in the logprobs; `None` without logprobs.
    num_top_logprobs: Option<usize>,
}

impl Chat {
    fn prepare(state: &AppState, record: &RequestRecord, body: &Bytes) -> Result<Self, ApiError> {
        let fields: SamplingFields = parse(body)?;
        check_model(state, fields.model.as_deref())?;
        check_refused(&parse::<RefusedFields>(body)?)?;
        let chat: ChatFields = parse(body)?;
        let template: TemplateFields = parse(body)?;
        let logprobs = check_logprobs(&chat)?;
        let endpoint = EndpointFields {
            max_tokens: chat.max_completion_tokens.or(fields.max_tokens),
            max_tokens_field: match chat.max_completion_tokens {
                Some(_) => "max_completion_tokens",
                None => "max_tokens",
            },
            least_max_tokens: 1,
            logprobs,
            prompt_logprobs: fields.prompt_logprobs,
        };
        let checked = check_sampling(&fields, endpoint, state)?;
        let text = render_chat(state, &chat.messages, &template)?;
        let add = match fields.add_special_tokens {
            Some(true) => AddSpecialTokens::Yes,
            _ => AddSpecialTokens::No,
        };
        let token_ids = encode_prompt(state, &checked, &text, add)?;
        let prompt = fit_context(state, &checked, token_ids, Some(text), None)?;
        let begins_turn = template.add_generation_prompt.unwrap_or(true);
        let last = chat.messages.last();
        let role = match last.filter(|_| !begins_turn) {
            Some(last) => last.role.clone(),
            None => state.options.response_role.clone(),
        };
        let echo = last.filter(|last| fields.echo == Some(true) && last.role == role);
        let echo = echo
            .and_then(|last| last.content.as_ref())
            .map(|content| content.text());
        Ok(Self {
            generation: Generation::new("chatcmpl", &fields, checked, vec![prompt], state, record)?,
            role,
            echo: echo.unwrap_or_default(),
            num_top_logprobs: logprobs
                .map(|num_top| usize::try_from(num_top).unwrap_or(usize::MAX)),
        })
    }

    fn answer(&self, state: &AppState, mut finished: Vec<FinishedChoice>) -> ChatCompletion {
        let generation = &self.generation;
        let usage = usage_of(state, generation, &finished);
        keep_best(&mut finished, generation);
        let writer = generation.logprob_writer(&state.tokenizer);
        let prompt_logprobs = finished
            .first()
            .and_then(|choice| choice.prompt.logprobs.as_ref());
        ChatCompletion {
            id: generation.id.clone(),
            object: "chat.completion",
            created: generation.created,
            model: generation.model.clone(),
            prompt_logprobs: prompt_logprobs.map(|logprobs| writer.prompt(logprobs)),
            prompt_token_ids: self.prompt_token_ids(),
            choices: finished
                .into_iter()
                .map(|choice| self.choice(state, choice))
                .collect(),
            service_tier: None,
            system_fingerprint: None,
            usage,
        }
    }

    fn choice(&self, state: &AppState, choice: FinishedChoice) -> ChatChoice {
        ChatChoice {
            index: choice.index,
            logprobs: self.logprobs(state, &choice.tokens),
            token_ids: self.token_ids(&choice.tokens),
            message: AnswerMessage {
                role: self.role.clone(),
                content: format!("{}{}", self.echo, choice.text),
                refusal: None,
                annotations: None,
                audio: None,
                function_call: None,
                reasoning: None,
            },
            finish_reason: choice.finish.reason,
            stop_reason: choice.finish.stop_reason,
        }
    }

    fn logprobs(&self, state: &AppState, tokens: &[DrawnToken]) -> Option<ChatLogprobs> {
        let num_top = self.num_top_logprobs?;
        let writer = self.generation.logprob_writer(&state.tokenizer);
        let logprobs = tokens.iter().filter_map(|token| token.logprobs.as_ref());
        Some(ChatLogprobs {
            content: logprobs.map(|entry| writer.chat(entry, num_top)).collect(),
        })
    }

    fn token_ids(&self, tokens: &[DrawnToken]) -> Option<Vec<u32>> {
        let ids = || tokens.iter().map(|token| token.token_id).collect();
        self.generation.output.token_ids.then(ids)
    }

    fn prompt_token_ids(&self) -> Option<Vec<u32>> {
        let prompt = self
            .generation
            .prompts
            .first()
            .filter(|_| self.generation.output.token_ids);
        prompt.map(|prompt| prompt.token_ids.clone())
    }
}

/// Reads `logprobs` and `top_logprobs` as one number of alternatives.
fn check_logprobs(chat: &ChatFields) -> Result<Option<i64>, ApiError> {
    let wanted = chat.logprobs.unwrap_or(false);
    match chat.top_logprobs {
        Some(top) if top < -1 => {
            let message = format!("top_logprobs must be a positive value or -1, got {top}.");
            Err(ApiError::invalid("top_logprobs", message))
        }
        Some(top) if top != 0 && !wanted => {
            let message = "when using `top_logprobs`, `logprobs` must be set to true.";
            Err(ApiError::invalid("top_logprobs", message))
        }
        top => Ok(wanted.then_some(top.unwrap_or(0))),
    }
}

/// Writes the chunks of a streamed chat.
struct ChatChunks {
    state: Arc<AppState>,
    chat: Chat,
    usage: UsageCounter,
    has_started: bool,
}

impl ChatChunks {
    fn new(state: Arc<AppState>, chat: Chat) -> Self {
        let usage = UsageCounter::new(&chat.generation);
        Self {
            state,
            chat,
            usage,
            has_started: false,
        }
    }

    /// Returns the events for one update, or for the end of the stream.
    fn write(&mut self, update: Option<(usize, ChoiceUpdate)>) -> String {
        let mut events = String::new();
        match update {
            Some((index, ChoiceUpdate::Prompt(prompt))) => {
                self.usage.add_cached(index, prompt.num_cached_tokens);
            }
            Some((index, ChoiceUpdate::Delta(delta))) => {
                if !self.has_started {
                    self.has_started = true;
                    self.write_roles(&mut events);
                }
                self.write_delta(&mut events, index, &delta);
            }
            // The driver writes errors itself.
            Some((_, ChoiceUpdate::Failed(_))) => {}
            None => {
                if let Some(usage) = self.usage.last(&self.state) {
                    push_event(&mut events, &self.chunk(Vec::new(), Some(usage)));
                }
            }
        }
        events
    }

    /// Opens all choices: comes with the first token, because clients time the first token by it.
    fn write_roles(&self, events: &mut String) {
        for index in 0..self.chat.generation.checked.n {
            let role = Some(self.chat.role.clone());
            let delta = ChatDelta {
                role,
                content: Some(String::new()),
            };
            let mut chunk = self.chunk(vec![open_choice(index, delta)], self.usage.so_far(index));
            chunk.prompt_token_ids = self.chat.prompt_token_ids();
            push_event(events, &chunk);
            if !self.chat.echo.is_empty() {
                let delta = ChatDelta {
                    role: None,
                    content: Some(self.chat.echo.clone()),
                };
                push_event(
                    events,
                    &self.chunk(vec![open_choice(index, delta)], self.usage.so_far(index)),
                );
            }
        }
    }

    fn write_delta(&mut self, events: &mut String, index: usize, delta: &Delta) {
        self.usage.add_tokens(index, delta.tokens.len());
        let content = ChatDelta {
            role: None,
            content: Some(delta.text.clone()),
        };
        let mut choice = open_choice(index, content);
        choice.logprobs = self.chat.logprobs(&self.state, &delta.tokens);
        choice.token_ids = self.chat.token_ids(&delta.tokens);
        if let Some(finish) = &delta.finish {
            choice.finish_reason = Some(finish.reason);
            choice.stop_reason = Some(finish.stop_reason.clone());
        }
        push_event(events, &self.chunk(vec![choice], self.usage.so_far(index)));
    }

    fn chunk(&self, choices: Vec<ChatChunkChoice>, usage: Option<Usage>) -> ChatChunk<'_> {
        ChatChunk {
            id: &self.chat.generation.id,
            object: "chat.completion.chunk",
            created: self.chat.generation.created,
            model: &self.chat.generation.model,
            choices,
            prompt_token_ids: None,
            usage,
        }
    }
}

fn open_choice(index: usize, delta: ChatDelta) -> ChatChunkChoice {
    ChatChunkChoice {
        index,
        delta,
        logprobs: None,
        finish_reason: None,
        stop_reason: None,
        token_ids: None,
    }
}
