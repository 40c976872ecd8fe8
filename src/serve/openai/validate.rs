//! Every value of a request checked once; what comes out can be trusted.
//!
//! Limits and texts are vLLM's. The limits on counts (prompts, stop strings, answers) keep one
//! request from filling memory or the queue; each refusal names its limit.

use crate::engine::SamplingParams;

use super::super::error::ApiError;
use super::super::observe::MAX_REQUEST_ID_LEN;
use super::super::state::AppState;
use super::types::{SamplingFields, StreamOptions, TruncationSide};
use super::unions::RefusedFields;

/// Most prompts of one completion request.
pub(super) const MAX_PROMPTS: usize = 1024;
/// Most answers to one prompt.
const MAX_CHOICES: i64 = 16_384;
/// Most stop strings.
const MAX_STOP_STRINGS: usize = 256;
/// Most bytes of all stop strings together.
const MAX_STOP_BYTES: usize = 64 * 1024;
/// Most stop token ids, and most entries of `logit_bias`.
const MAX_TOKEN_LIST: usize = 4096;
/// Lowest temperature above greedy, as in vLLM: below it the division overflows.
const MIN_TEMPERATURE: f64 = 0.01;

/// The checked values of [`SamplingFields`] that do not go to the engine.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Checked {
    /// For the engine; `max_tokens` still has to be bounded by the context.
    pub(super) params: SamplingParams,
    /// Tokens the request asked for; `None` leaves it to the server.
    pub(super) max_tokens: Option<usize>,
    /// Answers to return.
    pub(super) n: usize,
    /// Answers to draw.
    pub(super) best_of: usize,
    /// Strings that end an answer.
    pub(super) stop: Vec<String>,
    /// What a stream carries; `None` for one JSON answer.
    pub(super) stream: Option<StreamOptions>,
    /// How a long prompt is cut; `None` refuses it.
    pub(super) truncation: Option<Truncation>,
}

/// How a prompt is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Truncation {
    /// Tokens to keep; `None` for as many as fit.
    pub(super) keep: Option<usize>,
    /// Where the others are taken away.
    pub(super) side: TruncationSide,
}

/// What the endpoint itself knows about tokens and logprobs.
#[derive(Debug, Clone, Copy)]
pub(super) struct EndpointFields {
    /// The number of tokens asked for, under the endpoint's own rules.
    pub(super) max_tokens: Option<i64>,
    /// Name of the field it came from.
    pub(super) max_tokens_field: &'static str,
    /// The smallest number of tokens that makes sense: 0 if the prompt alone may be computed.
    pub(super) least_max_tokens: i64,
    /// Number of alternatives whose logprobs are asked for.
    pub(super) logprobs: Option<i64>,
    /// The same for the prompt.
    pub(super) prompt_logprobs: Option<i64>,
}

/// Checks the least number of tokens to generate against the most.
///
/// # Errors
/// It is larger.
pub(super) fn check_room(min_tokens: usize, max_tokens: usize) -> Result<(), ApiError> {
    if min_tokens <= max_tokens {
        return Ok(());
    }
    let message = format!(
        "min_tokens must be less than or equal to max_tokens={max_tokens}, got {min_tokens}."
    );
    Err(ApiError::invalid("min_tokens", message))
}

/// Refuses the first field that this server does not serve.
///
/// # Errors
/// The field, by name.
pub(in crate::serve) fn check_refused(refused: &RefusedFields) -> Result<(), ApiError> {
    match refused.0.first().map(String::as_str) {
        None => Ok(()),
        Some("suffix") => Err(ApiError::invalid(
            "suffix",
            "suffix is not currently supported",
        )),
        Some(field) => Err(ApiError::unsupported(field)),
    }
}

/// Checks the shared fields against the model's limits and fills in its defaults.
///
/// # Errors
/// The first value out of range, in vLLM's words.
pub(super) fn check_sampling(
    fields: &SamplingFields,
    endpoint: EndpointFields,
    state: &AppState,
) -> Result<Checked, ApiError> {
    let stream = check_stream(fields, endpoint, state)?;
    let max_tokens = check_max_tokens(endpoint)?;
    let mut params = sampling_params(fields, endpoint, state)?;
    if let Some(max_tokens) = max_tokens {
        check_room(params.min_tokens, max_tokens)?;
    }
    if let Some(id) = &fields.request_id
        && id.len() > MAX_REQUEST_ID_LEN
    {
        let message = format!(
            "request_id must have at most {MAX_REQUEST_ID_LEN} bytes, got {}.",
            id.len()
        );
        return Err(ApiError::invalid("request_id", message));
    }
    let (n, best_of) = check_choices(fields, &params, stream)?;
    if best_of > n {
        // Answers are ranked by the logprobs of their tokens.
        params.logprobs = params.logprobs.or(Some(0));
    }
    Ok(Checked {
        params,
        max_tokens,
        n,
        best_of,
        stop: check_stop(fields)?,
        stream,
        truncation: check_truncation(fields, state)?,
    })
}

fn check_stream(
    fields: &SamplingFields,
    endpoint: EndpointFields,
    state: &AppState,
) -> Result<Option<StreamOptions>, ApiError> {
    let stream = fields.stream.unwrap_or(false);
    if fields.stream_options.is_some() && !stream {
        let message = "Stream options can only be defined when `stream=True`.";
        return Err(ApiError::invalid("stream_options", message));
    }
    if stream && fields.prompt_logprobs.is_some() && endpoint.prompt_logprobs.is_some() {
        let message = "`prompt_logprobs` are not available when `stream=True`.";
        return Err(ApiError::invalid("prompt_logprobs", message));
    }
    let mut options = fields.stream_options.unwrap_or_default();
    if state.options.force_include_usage {
        options.include_usage = Some(true);
        options.continuous_usage_stats = Some(true);
    }
    Ok(stream.then_some(options))
}

fn check_max_tokens(endpoint: EndpointFields) -> Result<Option<usize>, ApiError> {
    let least = endpoint.least_max_tokens;
    match endpoint.max_tokens {
        None => Ok(None),
        Some(value) if value < least => {
            let field = endpoint.max_tokens_field;
            let message = format!("{field} must be at least {}, got {value}.", least.max(1));
            Err(ApiError::invalid(field, message))
        }
        Some(value) => Ok(Some(usize::try_from(value).unwrap_or(usize::MAX))),
    }
}

fn sampling_params(
    fields: &SamplingFields,
    endpoint: EndpointFields,
    state: &AppState,
) -> Result<SamplingParams, ApiError> {
    let defaults = &state.sampling_defaults;
    let temperature = match fields.temperature.unwrap_or(defaults.temperature) {
        value if value > 0.0 && value < MIN_TEMPERATURE => MIN_TEMPERATURE,
        value => value,
    };
    let top_k = fields.top_k.unwrap_or(defaults.top_k);
    if top_k < -1 {
        let message = format!("top_k must be 0 (disable), or at least 1, got {top_k}.");
        return Err(ApiError::invalid("top_k", message));
    }
    let repetition_penalty = fields
        .repetition_penalty
        .unwrap_or(defaults.repetition_penalty);
    if !(repetition_penalty > 0.0 && (repetition_penalty as f32).is_normal()) {
        let message =
            format!("repetition_penalty must be greater than zero, got {repetition_penalty:?}.");
        return Err(ApiError::invalid("repetition_penalty", message));
    }
    let top_p = fields.top_p.unwrap_or(defaults.top_p);
    let min_p = fields.min_p.unwrap_or(defaults.min_p);
    let presence = fields.presence_penalty.unwrap_or(0.0);
    let frequency = fields.frequency_penalty.unwrap_or(0.0);
    Ok(SamplingParams {
        temperature: closed("temperature", temperature, 0.0, 2.0)?,
        top_p: half_open("top_p", top_p)?,
        top_k: u32::try_from(top_k.max(0)).unwrap_or(u32::MAX),
        min_p: closed("min_p", min_p, 0.0, 1.0)?,
        typical_p: half_open("typical_p", fields.typical_p.unwrap_or(1.0))?,
        presence_penalty: closed("presence_penalty", presence, -2.0, 2.0)?,
        frequency_penalty: closed("frequency_penalty", frequency, -2.0, 2.0)?,
        repetition_penalty: repetition_penalty as f32,
        logit_bias: check_logit_bias(fields, state)?,
        // A negative seed is as good as any; its bits are kept.
        seed: fields.seed.map(i64::cast_unsigned),
        min_tokens: check_min_tokens(fields)?,
        max_tokens: 0,
        eos_token_ids: state.eos_token_ids.clone(),
        stop_token_ids: check_stop_token_ids(fields, state)?,
        ignore_eos: fields.ignore_eos.unwrap_or(false),
        logprobs: check_logprobs("logprobs", endpoint.logprobs, state)?,
        prompt_logprobs: check_logprobs("prompt_logprobs", endpoint.prompt_logprobs, state)?,
    })
}

fn closed(field: &str, value: f64, least: f64, most: f64) -> Result<f32, ApiError> {
    if (least..=most).contains(&value) {
        return Ok(value as f32);
    }
    let message = format!("{field} must be in [{least}, {most}], got {value:?}.");
    Err(ApiError::invalid(field, message))
}

fn half_open(field: &str, value: f64) -> Result<f32, ApiError> {
    // The check is on the f32: a tiny f64 would become 0.
    if (value as f32) > 0.0 && value <= 1.0 {
        return Ok(value as f32);
    }
    let message = format!("{field} must be in (0, 1], got {value:?}.");
    Err(ApiError::invalid(field, message))
}

fn check_min_tokens(fields: &SamplingFields) -> Result<usize, ApiError> {
    let value = fields.min_tokens.unwrap_or(0);
    usize::try_from(value).map_err(|_| {
        let message = format!("min_tokens must be greater than or equal to 0, got {value}.");
        ApiError::invalid("min_tokens", message)
    })
}

fn check_choices(
    fields: &SamplingFields,
    params: &SamplingParams,
    stream: Option<StreamOptions>,
) -> Result<(usize, usize), ApiError> {
    let n = fields.n.unwrap_or(1);
    if n < 1 {
        return Err(ApiError::invalid(
            "n",
            format!("n must be at least 1, got {n}."),
        ));
    }
    if n > MAX_CHOICES {
        return Err(ApiError::invalid(
            "n",
            format!("n must be at most {MAX_CHOICES}, got {n}."),
        ));
    }
    let best_of = fields.best_of.unwrap_or(n);
    if best_of < n || best_of > MAX_CHOICES {
        let message = format!("best_of must be in [n, {MAX_CHOICES}] with n={n}, got {best_of}.");
        return Err(ApiError::invalid("best_of", message));
    }
    if params.temperature == 0.0 && best_of > 1 {
        let (field, value) = if n > 1 {
            ("n", n)
        } else {
            ("best_of", best_of)
        };
        let message = format!("{field} must be 1 when using greedy sampling, got {value}.");
        return Err(ApiError::invalid(field, message));
    }
    if stream.is_some() && best_of > n {
        let message = "best_of above n is not available when `stream=True`.";
        return Err(ApiError::invalid("best_of", message));
    }
    Ok((n as usize, best_of as usize))
}

fn check_stop(fields: &SamplingFields) -> Result<Vec<String>, ApiError> {
    let stop = fields
        .stop
        .clone()
        .map_or_else(Vec::new, |stop| stop.into_vec());
    let invalid = |message: String| Err(ApiError::invalid("stop", message));
    if stop.iter().any(String::is_empty) {
        return invalid("stop cannot contain an empty string.".to_owned());
    }
    if stop.len() > MAX_STOP_STRINGS {
        let num_strings = stop.len();
        return invalid(format!(
            "stop must have at most {MAX_STOP_STRINGS} strings, got {num_strings}."
        ));
    }
    let num_bytes: usize = stop.iter().map(String::len).sum();
    if num_bytes > MAX_STOP_BYTES {
        return invalid(format!(
            "stop must have at most {MAX_STOP_BYTES} bytes, got {num_bytes}."
        ));
    }
    Ok(stop)
}

fn check_stop_token_ids(fields: &SamplingFields, state: &AppState) -> Result<Vec<u32>, ApiError> {
    let ids = fields.stop_token_ids.as_deref().unwrap_or_default();
    check_list_length("stop_token_ids", ids.len())?;
    let vocab_size = state.engine.info().vocab_size;
    let known = |id: &i64| {
        u32::try_from(*id)
            .ok()
            .filter(|id| (*id as usize) < vocab_size)
    };
    ids.iter()
        .map(|id| {
            known(id).ok_or_else(|| {
                let message = format!(
                    "token_id {id} in stop_token_ids is out of vocabulary. Vocabulary size: {vocab_size}"
                );
                ApiError::invalid("stop_token_ids", message)
            })
        })
        .collect()
}

fn check_logit_bias(
    fields: &SamplingFields,
    state: &AppState,
) -> Result<Vec<(u32, f32)>, ApiError> {
    let Some(entries) = &fields.logit_bias else {
        return Ok(Vec::new());
    };
    check_list_length("logit_bias", entries.len())?;
    let vocab_size = state.engine.info().vocab_size;
    let mut biases = Vec::with_capacity(entries.len());
    for (key, bias) in entries {
        let Ok(id) = key.parse::<i64>() else {
            let message = format!(
                "logit_bias keys must be token ids, got `{}`.",
                key.escape_debug()
            );
            return Err(ApiError::invalid("logit_bias", message));
        };
        let in_vocabulary = u32::try_from(id)
            .ok()
            .filter(|id| (*id as usize) < vocab_size);
        let Some(id) = in_vocabulary else {
            let message = format!(
                "token_id(s) [{id}] in logit_bias contain out-of-vocab token ids. Vocabulary size: {vocab_size}"
            );
            return Err(ApiError::invalid("logit_bias", message));
        };
        biases.push((id, bias.clamp(-100.0, 100.0) as f32));
    }
    Ok(biases)
}

fn check_list_length(field: &str, length: usize) -> Result<(), ApiError> {
    if length <= MAX_TOKEN_LIST {
        return Ok(());
    }
    let message = format!("{field} must have at most {MAX_TOKEN_LIST} entries, got {length}.");
    Err(ApiError::invalid(field, message))
}

/// Reads a number of alternatives; -1 asks for the whole vocabulary.
fn check_logprobs(
    field: &str,
    value: Option<i64>,
    state: &AppState,
) -> Result<Option<usize>, ApiError> {
    let Some(value) = value else {
        return Ok(None);
    };
    let vocab_size = state.engine.info().vocab_size;
    let max_logprobs = usize::try_from(state.options.max_logprobs).unwrap_or(vocab_size);
    let wanted = match value {
        -1 => vocab_size,
        value => usize::try_from(value).map_err(|_| {
            let message = format!("{field} must be non-negative or -1, got {value}.");
            ApiError::invalid(field, message)
        })?,
    };
    if wanted > max_logprobs {
        let kind = if field == "logprobs" {
            "sample"
        } else {
            "prompt"
        };
        let message = format!(
            "Requested {kind} logprobs of {wanted}, which is greater than max allowed: {max_logprobs}"
        );
        return Err(ApiError::invalid(field, message));
    }
    Ok(Some(wanted.min(vocab_size)))
}

fn check_truncation(
    fields: &SamplingFields,
    state: &AppState,
) -> Result<Option<Truncation>, ApiError> {
    let max_model_len = state.engine.info().max_model_len;
    let side = fields.truncation_side.unwrap_or(TruncationSide::Left);
    let truncation = |keep| Ok(Some(Truncation { keep, side }));
    match fields.truncate_prompt_tokens {
        None => Ok(None),
        Some(-1) => truncation(None),
        Some(value) => match usize::try_from(value) {
            Ok(keep) if keep >= 1 && keep <= max_model_len => truncation(Some(keep)),
            _ => {
                let message = format!(
                    "truncate_prompt_tokens must be -1 or in [1, {max_model_len}], got {value}."
                );
                Err(ApiError::invalid("truncate_prompt_tokens", message))
            }
        },
    }
}
