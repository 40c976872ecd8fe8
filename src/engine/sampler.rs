//! Draws the next token of a sequence from its logits, on the CPU.
//!
//! The steps and their order are those of vLLM V1's sampler (`vllm/v1/sample/sampler.py`): raw
//! logprobs, logit bias, `min_tokens`, penalties, temperature, `min_p`, `top_k`, `top_p`; then
//! locally typical sampling as transformers' `TypicalLogitsWarper`. All filters are thresholds,
//! so tokens of equal logit are kept or dropped together and the result does not depend on a
//! sort.
//!
//! # Which token a seed gives
//!
//! The draw of output token `i` (from 0) depends on the seed, `i` and the logits alone: not on
//! the batch, on preemption, or on the draws before. An implementation on another device must
//! do the same:
//! 1. `(a, b, _, _) = Philox4x32-10(counter = [i mod 2³², i div 2³², 0, 0],
//!    key = [seed mod 2³², seed div 2³²])`.
//! 2. `u = ((b · 2³² + a) div 2¹¹) · 2⁻⁵³`, a double in `[0, 1)`.
//! 3. The weight of each kept token is `exp((logit − max) / temperature)` in single precision,
//!    where `max` is the largest logit, and 0 where the exponent is below -87; `total` is the sum
//!    of the weights in double precision.
//! 4. The token is the first in ascending id whose running sum of weights, its own included,
//!    exceeds `u · total`.
//!
//! On a GPU the kernels draw by the same rules ([`SequenceSampler::device_draw`]); this file stays
//! the reference and draws what they cannot.
//!
//! Knows no tensor and no sequence; the run loop owns one [`SequenceSampler`] a sequence.

use std::collections::HashMap;

use crate::kernels::{Draw, DrawOutcome, Drawn, MAX_TOP_LOGPROBS};

use super::request::{SamplingParams, TokenLogprobs};

mod philox;
mod select;
#[cfg(test)]
mod tests;

/// Temperatures below are greedy.
const GREEDY_TEMPERATURE: f32 = 1e-5;
/// Smallest temperature that divides logits; vLLM's `_MAX_TEMP`, which guards against overflow.
const MIN_TEMPERATURE: f32 = 1e-2;

/// Why no token can be drawn.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
pub(super) enum SampleError {
    /// The model's arithmetic overflowed, as float16 does on weights made for bfloat16.
    #[error(
        "the model's output is not finite (the logit of token {token_id} is {logit}): its \
         numbers overflow; try --dtype bfloat16"
    )]
    NotFinite { token_id: u32, logit: f32 },
    /// `min_tokens` forbids the ending tokens, and the request named all tokens as such; or all
    /// logits are `-inf`.
    #[error("no token is left to draw: each one is forbidden or has probability 0")]
    NothingLeft,
    /// The tokenizer knows a token that the model's head has no row for.
    #[error(
        "token {token_id} of the prompt has no logprob: the model has logits of {vocab_size} tokens"
    )]
    UnknownToken { token_id: u32, vocab_size: usize },
}

/// A drawn token.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Sampled {
    pub(super) token_id: u32,
    /// Under the raw logits, when the request asked for them.
    pub(super) logprobs: Option<TokenLogprobs>,
}

/// How one sequence draws, and what its penalties must remember.
#[derive(Debug, Clone)]
pub(super) struct SequenceSampler {
    params: SamplingParams,
    seed: u64,
    vocab_size: usize,
    /// Tokens that end the sequence and that `min_tokens` holds back.
    ending_token_ids: Vec<u32>,
    /// Tokens that a penalty may change, with the times each was drawn; for the repetition
    /// penalty also those of the prompt, with 0. Empty while no penalty is on.
    num_drawn: HashMap<u32, u32>,
}

impl SequenceSampler {
    /// Prepares the draws of a sequence. Ids outside the vocabulary are left out.
    pub(super) fn new(
        params: &SamplingParams,
        seed: u64,
        prompt: &[u32],
        vocab_size: usize,
    ) -> Self {
        let is_known = |token_id: &u32| (*token_id as usize) < vocab_size;
        let mut params = params.clone();
        params.logit_bias.retain(|(token_id, _)| is_known(token_id));
        let mut ending_token_ids = params.stop_token_ids.clone();
        if !params.ignore_eos {
            ending_token_ids.extend(&params.eos_token_ids);
        }
        ending_token_ids.retain(is_known);
        let num_drawn = if params.repetition_penalty == 1.0 {
            HashMap::new()
        } else {
            let known = prompt.iter().copied().filter(is_known);
            known.map(|token_id| (token_id, 0)).collect()
        };
        Self {
            params,
            seed,
            vocab_size,
            ending_token_ids,
            num_drawn,
        }
    }

    /// Draws the output token number `output_index`, counted from 0.
    ///
    /// `logits` is one row, `[vocab_size]` or longer (padding is not drawn); its contents are
    /// lost.
    ///
    /// # Errors
    /// [`SampleError`] when the row has a NaN or `+inf`, or when no token may be drawn.
    ///
    /// # Panics
    /// If the row is shorter than the vocabulary.
    pub(super) fn sample(
        &mut self,
        logits: &mut [f32],
        output_index: usize,
    ) -> Result<Sampled, SampleError> {
        let logits = &mut logits[..self.vocab_size];
        let mut max = largest_logit(logits)?;
        // The processors write into the row, and the logprobs are those before them.
        let raw = self
            .params
            .logprobs
            .map(|num_top| (logits.to_vec(), num_top));
        if self.process(logits, output_index) {
            max = largest_logit(logits)?;
        }
        let token_id = if self.params.temperature < GREEDY_TEMPERATURE {
            select::first_of(logits, max)
        } else {
            self.draw(logits, max, output_index)
        };
        if self.has_penalty() {
            *self.num_drawn.entry(token_id).or_default() += 1;
        }
        let logprobs = raw.map(|(raw, num_top)| finite_logprobs(&raw, token_id, num_top));
        Ok(Sampled { token_id, logprobs })
    }

    /// Returns how the device draws output token number `output_index`, without the penalty slot
    /// that it needs if [`Self::has_penalty`]; none where it cannot, so that [`Self::sample`] must.
    pub(super) fn device_draw(&self, output_index: usize) -> Option<Draw> {
        let params = &self.params;
        let too_many_logprobs = params.logprobs.is_some_and(|num| num > MAX_TOP_LOGPROBS);
        if too_many_logprobs {
            return None;
        }
        let holds_back = output_index < params.min_tokens;
        let held_back: &[u32] = if holds_back {
            &self.ending_token_ids
        } else {
            &[]
        };
        let mut biases: Vec<(u32, f32)> = held_back
            .iter()
            .map(|&token_id| (token_id, select::DROPPED))
            .collect();
        biases.extend(&params.logit_bias);
        // Of equals the first stays, which holds back.
        biases.sort_by_key(|&(token_id, _)| token_id);
        biases.dedup_by_key(|&mut (token_id, _)| token_id);
        Some(Draw {
            temperature: params.temperature,
            top_k: params.top_k,
            top_p: params.top_p,
            min_p: params.min_p,
            typical_p: params.typical_p,
            repetition_penalty: params.repetition_penalty,
            frequency_penalty: params.frequency_penalty,
            presence_penalty: params.presence_penalty,
            seed: self.seed,
            output_index: output_index as u64,
            penalty_slot: None,
            num_logprobs: params.logprobs,
            biases,
        })
    }

    /// Notes and checks what the device drew.
    ///
    /// # Errors
    /// As [`Self::sample`].
    pub(super) fn note_drawn(&mut self, drawn: Drawn) -> Result<Sampled, SampleError> {
        let Drawn { token_id, .. } = drawn;
        match drawn.outcome {
            DrawOutcome::Drawn => {}
            DrawOutcome::NotFinite => {
                let logit = drawn.logprob;
                return Err(SampleError::NotFinite { token_id, logit });
            }
            DrawOutcome::NothingLeft => return Err(SampleError::NothingLeft),
        }
        if self.has_penalty() {
            *self.num_drawn.entry(token_id).or_default() += 1;
        }
        let logprobs = self.params.logprobs.map(|_| TokenLogprobs {
            token_id,
            logprob: drawn.logprob,
            rank: drawn.rank,
            top: drawn.top,
        });
        Ok(Sampled { token_id, logprobs })
    }

    /// Returns what penalties have seen: tokens of the prompt, and drawn ones as often as drawn.
    pub(super) fn seen_tokens(&self) -> (Vec<u32>, Vec<u32>) {
        let prompt = self.num_drawn.keys().copied().collect();
        let repeated = |(&token_id, &num)| std::iter::repeat_n(token_id, num as usize);
        (prompt, self.num_drawn.iter().flat_map(repeated).collect())
    }

    /// Returns whether a token's past changes its logit.
    pub(super) fn has_penalty(&self) -> bool {
        let params = &self.params;
        params.repetition_penalty != 1.0
            || params.frequency_penalty != 0.0
            || params.presence_penalty != 0.0
    }

    /// Applies all that can change which token is the most likely one; returns whether it did.
    fn process(&self, logits: &mut [f32], output_index: usize) -> bool {
        for &(token_id, bias) in &self.params.logit_bias {
            logits[token_id as usize] += bias;
        }
        let holds_back = output_index < self.params.min_tokens;
        if holds_back {
            for &token_id in &self.ending_token_ids {
                logits[token_id as usize] = select::DROPPED;
            }
        }
        for (&token_id, &num_drawn) in &self.num_drawn {
            let logit = &mut logits[token_id as usize];
            *logit = self.penalized(*logit, num_drawn);
        }
        holds_back || !self.params.logit_bias.is_empty() || !self.num_drawn.is_empty()
    }

    fn penalized(&self, logit: f32, num_drawn: u32) -> f32 {
        let params = &self.params;
        // Without the limit a penalty near 0 would make an infinite logit of a large one.
        let logit = if logit > 0.0 {
            (logit / params.repetition_penalty).min(f32::MAX)
        } else {
            logit * params.repetition_penalty
        };
        if num_drawn == 0 {
            return logit;
        }
        logit - params.frequency_penalty * num_drawn as f32 - params.presence_penalty
    }

    /// Draws at random. Overwrites the logits.
    fn draw(&self, logits: &mut [f32], max: f32, output_index: usize) -> u32 {
        let temperature = self.params.temperature.max(MIN_TEMPERATURE);
        for logit in logits.iter_mut() {
            *logit = (*logit - max) / temperature;
        }
        self.filter(logits);
        let uniform = philox::uniform(self.seed, output_index as u64);
        select::pick(logits, uniform)
    }

    /// Drops tokens; the logits are those after temperature, relative to the largest one.
    fn filter(&self, logits: &mut [f32]) {
        let params = &self.params;
        let top_k = params.top_k as usize;
        let mut threshold = params.min_p.ln();
        if top_k > 0 && top_k < logits.len() {
            threshold = threshold.max(select::nth_largest(logits, top_k));
        }
        if threshold > select::DROPPED {
            select::keep_at_least(logits, threshold);
        }
        if params.top_p < 1.0 {
            select::keep_nucleus(logits, params.top_p);
        }
        if params.typical_p < 1.0 {
            select::keep_typical(logits, params.typical_p);
        }
    }
}

/// Returns the logprobs of `token_id` and of the `num_top` most likely tokens under a row of raw
/// logits `[vocab_size]`. Of equal tokens the lower id comes first.
///
/// # Errors
/// [`SampleError`] when the row has a NaN or `+inf`, or nothing but `-inf`, or does not reach to
/// `token_id`.
pub(super) fn token_logprobs(
    logits: &[f32],
    token_id: u32,
    num_top: usize,
) -> Result<TokenLogprobs, SampleError> {
    if token_id as usize >= logits.len() {
        return Err(SampleError::UnknownToken {
            token_id,
            vocab_size: logits.len(),
        });
    }
    largest_logit(logits)?;
    Ok(finite_logprobs(logits, token_id, num_top))
}

fn finite_logprobs(logits: &[f32], token_id: u32, num_top: usize) -> TokenLogprobs {
    let log_sum_exp = select::log_sum_exp(logits);
    let logit = logits[token_id as usize];
    let top = select::largest(logits, num_top).into_iter();
    TokenLogprobs {
        token_id,
        logprob: logit - log_sum_exp,
        rank: select::num_at_least(logits, logit),
        top: top
            .map(|(token_id, logit)| (token_id, logit - log_sum_exp))
            .collect(),
    }
}

/// Returns the largest logit of a row that one can draw from.
fn largest_logit(logits: &[f32]) -> Result<f32, SampleError> {
    let max = select::max(logits);
    if max == f32::INFINITY || select::has_nan(logits) {
        let is_bad = |logit: &f32| logit.is_nan() || *logit == f32::INFINITY;
        let token_id = logits.iter().position(is_bad).unwrap_or_default();
        return Err(SampleError::NotFinite {
            token_id: token_id as u32,
            logit: logits[token_id],
        });
    }
    if max == select::DROPPED {
        return Err(SampleError::NothingLeft);
    }
    Ok(max)
}
