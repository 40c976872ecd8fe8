//! `POST /v1/completions`.

use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Extension, Request, State};
use axum::response::{IntoResponse, Response};

use crate::engine::TokenLogprobs;
use crate::text::AddSpecialTokens;

use super::super::body::{off_workers, parse, read_json_body};
use super::super::error::ApiError;
use super::super::observe::RequestRecord;
use super::super::state::AppState;
use super::choice::{ChoiceUpdate, Delta, DrawnToken, FinishedChoice, PromptInfo, collect, merge};
use super::convert::{
    Generation, PreparedPrompt, check_model, check_token_ids, encode_prompt, fit_context,
};
use super::responses::{Completion, CompletionChoice, CompletionLogprobs, Usage};
use super::stream::{event_stream, push_event};
use super::types::{CompletionFields, SamplingFields};
use super::unions::{OnePrompt, RefusedFields};
use super::usage::{UsageCounter, keep_best, usage_of};
use super::validate::{Checked, EndpointFields, check_refused, check_sampling};

/// Tokens generated when a request names no number, as in OpenAI's API.
const DEFAULT_MAX_TOKENS: usize = 16;

/// Continues prompts.
pub(in crate::serve) async fn completions(
    State(state): State<Arc<AppState>>,
    Extension(record): Extension<Arc<RequestRecord>>,
    request: Request,
) -> Result<Response, ApiError> {
    let body = read_json_body(request, state.options.max_body_size).await?;
    let num_bytes = body.len();
    let (shared_state, shared_record) = (Arc::clone(&state), Arc::clone(&record));
    let prepare = move || Prepared::new(&shared_state, &shared_record, &body);
    let prepared = off_workers(num_bytes, prepare).await?;
    prepared.generation.log(&state);
    let choices = prepared.generation.submit(&state, &record)?;
    if prepared.generation.checked.stream.is_some() {
        let mut chunks = CompletionChunks::new(state, prepared);
        return Ok(event_stream(merge(choices), move |update| {
            chunks.write(update)
        }));
    }
    let finished = collect(choices).await?;
    Ok(Json(prepared.answer(&state, finished)).into_response())
}

/// Whether an answer begins with its prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Echo {
    Prompt,
    Nothing,
}

/// A completion request ready for the engine.
struct Prepared {
    generation: Generation,
    echo: Echo,
    /// Whether logprobs were asked for; `best_of` computes them anyway.
    wants_logprobs: bool,
    /// Whether `prompt_logprobs` was asked for; `echo` computes them anyway.
    wants_prompt_logprobs: bool,
}

impl Prepared {
    fn new(state: &AppState, record: &RequestRecord, body: &Bytes) -> Result<Self, ApiError> {
        let fields: SamplingFields = parse(body)?;
        check_model(state, fields.model.as_deref())?;
        check_refused(&parse::<RefusedFields>(body)?)?;
        let completion: CompletionFields = parse(body)?;
        let echo = match fields.echo {
            Some(true) => Echo::Prompt,
            _ => Echo::Nothing,
        };
        let of_echo = completion.logprobs.filter(|_| echo == Echo::Prompt);
        let endpoint = EndpointFields {
            max_tokens: fields.max_tokens,
            max_tokens_field: "max_tokens",
            least_max_tokens: match echo {
                Echo::Prompt => 0,
                Echo::Nothing => 1,
            },
            logprobs: completion.logprobs,
            prompt_logprobs: fields.prompt_logprobs.or(of_echo),
        };
        let checked = check_sampling(&fields, endpoint, state)?;
        let prompts = prepare_prompts(state, &fields, completion.prompt, &checked)?;
        Ok(Self {
            generation: Generation::new("cmpl", &fields, checked, prompts, state, record)?,
            echo,
            wants_logprobs: completion.logprobs.is_some(),
            wants_prompt_logprobs: fields.prompt_logprobs.is_some(),
        })
    }

    fn prompt(&self, index: usize) -> Option<&PreparedPrompt> {
        let num_choices = self.generation.prompts.len().max(1);
        // After `keep_best` a prompt has n choices, in a stream best_of equals n.
        let prompt = index / self.generation.checked.n.max(1);
        self.generation.prompts.get(prompt.min(num_choices - 1))
    }

    fn answer(&self, state: &AppState, mut finished: Vec<FinishedChoice>) -> Completion<'_> {
        let usage = usage_of(state, &self.generation, &finished);
        keep_best(&mut finished, &self.generation);
        let choices = finished
            .into_iter()
            .map(|choice| self.choice(state, choice))
            .collect();
        self.completion(choices, Some(usage))
    }

    fn completion(&self, choices: Vec<CompletionChoice>, usage: Option<Usage>) -> Completion<'_> {
        Completion {
            id: &self.generation.id,
            object: "text_completion",
            created: self.generation.created,
            model: &self.generation.model,
            choices,
            usage,
        }
    }

    fn choice(&self, state: &AppState, choice: FinishedChoice) -> CompletionChoice {
        let writer = self.generation.logprob_writer(&state.tokenizer);
        let mut part = AnswerPart::default();
        self.begin(state, choice.index, &choice.prompt, &mut part);
        self.extend(state, &choice.text, &choice.tokens, &mut part);
        let prompt_logprobs = choice
            .prompt
            .logprobs
            .filter(|_| self.wants_prompt_logprobs);
        CompletionChoice {
            finish_reason: Some(choice.finish.reason),
            stop_reason: choice.finish.stop_reason,
            prompt_logprobs: prompt_logprobs.map(|logprobs| writer.prompt(&logprobs)),
            token_ids: self.token_ids(&choice.tokens),
            prompt_token_ids: self.prompt_token_ids(choice.index),
            ..self.open_choice(choice.index, part)
        }
    }

    /// Puts the prompt first, if the request wants it back.
    fn begin(&self, state: &AppState, index: usize, prompt: &PromptInfo, part: &mut AnswerPart) {
        let Some(prepared) = self.prompt(index).filter(|_| self.echo == Echo::Prompt) else {
            return;
        };
        part.text.push_str(&prepared.text);
        if let Some(logprobs) = prompt.logprobs.as_ref().filter(|_| self.wants_logprobs) {
            let tokens = prepared.token_ids.iter().zip(logprobs);
            let tokens = tokens.map(|(&id, logprobs)| (id, logprobs.as_ref()));
            self.push_logprobs(state, tokens, part);
        }
    }

    /// Appends generated text and tokens.
    fn extend(&self, state: &AppState, text: &str, tokens: &[DrawnToken], part: &mut AnswerPart) {
        part.text.push_str(text);
        if self.wants_logprobs {
            let tokens = tokens
                .iter()
                .map(|token| (token.token_id, token.logprobs.as_ref()));
            self.push_logprobs(state, tokens, part);
        }
    }

    fn push_logprobs<'a>(
        &self,
        state: &AppState,
        tokens: impl Iterator<Item = (u32, Option<&'a TokenLogprobs>)>,
        part: &mut AnswerPart,
    ) {
        let writer = self.generation.logprob_writer(&state.tokenizer);
        for (id, logprobs) in tokens {
            part.offset = writer.completion(&mut part.logprobs, id, logprobs, part.offset);
        }
    }

    fn open_choice(&self, index: usize, part: AnswerPart) -> CompletionChoice {
        CompletionChoice {
            index,
            text: part.text,
            logprobs: self.wants_logprobs.then_some(part.logprobs),
            finish_reason: None,
            stop_reason: None,
            prompt_logprobs: None,
            token_ids: None,
            prompt_token_ids: None,
        }
    }

    fn token_ids(&self, tokens: &[DrawnToken]) -> Option<Vec<u32>> {
        let ids = || tokens.iter().map(|token| token.token_id).collect();
        self.generation.output.token_ids.then(ids)
    }

    fn prompt_token_ids(&self, index: usize) -> Option<Vec<u32>> {
        let prompt = self
            .prompt(index)
            .filter(|_| self.generation.output.token_ids);
        prompt.map(|prompt| prompt.token_ids.clone())
    }
}

/// A part of an answer: all of it, or what one chunk adds.
#[derive(Debug, Default)]
struct AnswerPart {
    text: String,
    logprobs: CompletionLogprobs,
    /// Characters before the next token.
    offset: usize,
}

fn prepare_prompts(
    state: &AppState,
    fields: &SamplingFields,
    prompt: Option<super::unions::Prompt>,
    checked: &Checked,
) -> Result<Vec<PreparedPrompt>, ApiError> {
    let prompts = prompt
        .map(|prompt| prompt.into_prompts())
        .unwrap_or_default();
    if prompts.is_empty() {
        let message = "Either prompt or prompt_embeds must be provided and non-empty.";
        return Err(ApiError::invalid("prompt", message));
    }
    let add = match fields.add_special_tokens {
        Some(false) => AddSpecialTokens::No,
        _ => AddSpecialTokens::Yes,
    };
    // An explicit null asks for the rest of the context, which serde can not tell from absence.
    let fallback = Some(DEFAULT_MAX_TOKENS);
    let prepare = |prompt: OnePrompt| match prompt {
        OnePrompt::Text(text) => {
            let token_ids = encode_prompt(state, checked, &text, add)?;
            fit_context(state, checked, token_ids, Some(text), fallback)
        }
        OnePrompt::TokenIds(ids) => {
            let token_ids = check_token_ids(state, "prompt", &ids)?;
            fit_context(state, checked, token_ids, None, fallback)
        }
    };
    prompts.into_iter().map(prepare).collect()
}

/// Writes the chunks of a streamed completion.
struct CompletionChunks {
    state: Arc<AppState>,
    prepared: Prepared,
    usage: UsageCounter,
    /// Of each choice: its prompt until its first chunk, and the characters sent.
    progress: Vec<Progress>,
}

#[derive(Debug, Clone, Default)]
struct Progress {
    prompt: Option<PromptInfo>,
    offset: usize,
}

impl CompletionChunks {
    fn new(state: Arc<AppState>, prepared: Prepared) -> Self {
        let usage = UsageCounter::new(&prepared.generation);
        let generation = &prepared.generation;
        let num_choices = generation.prompts.len() * generation.checked.best_of;
        Self {
            usage,
            progress: vec![Progress::default(); num_choices],
            state,
            prepared,
        }
    }

    /// Returns the events for one update, or for the end of the stream.
    fn write(&mut self, update: Option<(usize, ChoiceUpdate)>) -> String {
        let mut events = String::new();
        match update {
            Some((index, ChoiceUpdate::Prompt(prompt))) => {
                self.usage.add_cached(index, prompt.num_cached_tokens);
                self.progress[index].prompt = Some(prompt);
            }
            Some((index, ChoiceUpdate::Delta(delta))) => {
                self.write_delta(&mut events, index, delta);
            }
            // The driver writes errors itself.
            Some((_, ChoiceUpdate::Failed(_))) => {}
            None => {
                if let Some(usage) = self.usage.last(&self.state) {
                    push_event(
                        &mut events,
                        &self.prepared.completion(Vec::new(), Some(usage)),
                    );
                }
            }
        }
        events
    }

    fn write_delta(&mut self, events: &mut String, index: usize, delta: Delta) {
        self.usage.add_tokens(index, delta.tokens.len());
        let prepared = &self.prepared;
        let progress = &mut self.progress[index];
        let mut part = AnswerPart {
            offset: progress.offset,
            ..AnswerPart::default()
        };
        let is_first = progress.prompt.is_some();
        if let Some(prompt) = progress.prompt.take() {
            prepared.begin(&self.state, index, &prompt, &mut part);
        }
        prepared.extend(&self.state, &delta.text, &delta.tokens, &mut part);
        progress.offset = part.offset;
        let mut choice = prepared.open_choice(index, part);
        choice.token_ids = prepared.token_ids(&delta.tokens);
        choice.prompt_token_ids = prepared.prompt_token_ids(index).filter(|_| is_first);
        if let Some(finish) = delta.finish {
            choice.finish_reason = Some(finish.reason);
            choice.stop_reason = finish.stop_reason;
        }
        push_event(
            events,
            &prepared.completion(vec![choice], self.usage.so_far(index)),
        );
    }
}
