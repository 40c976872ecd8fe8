//! Counting tokens for `usage`, and choosing the best of several answers.

use super::super::state::AppState;
use super::choice::FinishedChoice;
use super::convert::Generation;
use super::responses::{PromptTokensDetails, Usage};

/// Returns the usage of a finished request; each prompt counts once, whatever its choices.
pub(super) fn usage_of(
    state: &AppState,
    generation: &Generation,
    finished: &[FinishedChoice],
) -> Usage {
    let mut counter = UsageCounter::new(generation);
    for choice in finished {
        counter.add_tokens(choice.index, choice.tokens.len());
        counter.add_cached(choice.index, choice.prompt.num_cached_tokens);
    }
    counter.total(state)
}

/// Keeps the `n` most likely of the answers drawn for each prompt and counts them anew.
pub(super) fn keep_best(finished: &mut Vec<FinishedChoice>, generation: &Generation) {
    let (n, best_of) = (generation.checked.n, generation.checked.best_of);
    finished.sort_by_key(|choice| choice.index);
    if best_of > n {
        for of_prompt in finished.chunks_mut(best_of) {
            of_prompt.sort_by(|a, b| b.mean_logprob().total_cmp(&a.mean_logprob()));
        }
        let mut position = 0;
        finished.retain(|_| {
            position += 1;
            (position - 1) % best_of < n
        });
    }
    for (index, choice) in finished.iter_mut().enumerate() {
        choice.index = index;
    }
}

/// Counts the tokens of a request as they come.
#[derive(Debug)]
pub(super) struct UsageCounter {
    /// Prompt tokens, by prompt.
    num_prompt_tokens: Vec<usize>,
    /// Cached prompt tokens, by prompt.
    num_cached_tokens: Vec<usize>,
    /// Generated tokens, by choice.
    num_tokens: Vec<usize>,
    /// Choices of one prompt.
    best_of: usize,
    wants_last: bool,
    wants_every: bool,
}

impl UsageCounter {
    /// Starts at the prompts.
    pub(super) fn new(generation: &Generation) -> Self {
        let stream = generation.checked.stream.unwrap_or_default();
        let wants_last = stream.include_usage.unwrap_or(false);
        let prompts = generation.prompts.iter();
        Self {
            num_prompt_tokens: prompts.map(|prompt| prompt.token_ids.len()).collect(),
            num_cached_tokens: vec![0; generation.prompts.len()],
            num_tokens: vec![0; generation.prompts.len() * generation.checked.best_of],
            best_of: generation.checked.best_of,
            wants_last,
            wants_every: wants_last && stream.continuous_usage_stats.unwrap_or(false),
        }
    }

    /// Notes tokens of a choice.
    pub(super) fn add_tokens(&mut self, index: usize, num_tokens: usize) {
        if let Some(sum) = self.num_tokens.get_mut(index) {
            *sum += num_tokens;
        }
    }

    /// Notes where a choice's prompt came from; the choices of a prompt share it.
    pub(super) fn add_cached(&mut self, index: usize, num_cached_tokens: usize) {
        if let Some(cached) = self.num_cached_tokens.get_mut(index / self.best_of.max(1)) {
            *cached = (*cached).max(num_cached_tokens);
        }
    }

    /// Returns the usage of one choice so far, if every chunk carries it.
    pub(super) fn so_far(&self, index: usize) -> Option<Usage> {
        let prompt = index / self.best_of.max(1);
        let num_prompt_tokens = self.num_prompt_tokens.get(prompt).copied().unwrap_or(0);
        let num_tokens = self.num_tokens.get(index).copied().unwrap_or(0);
        self.wants_every
            .then(|| Usage::new(num_prompt_tokens, num_tokens))
    }

    /// Returns the usage of the request, if the stream ends with it.
    pub(super) fn last(&self, state: &AppState) -> Option<Usage> {
        self.wants_last.then(|| self.total(state))
    }

    fn total(&self, state: &AppState) -> Usage {
        let mut usage = Usage::new(
            self.num_prompt_tokens.iter().sum(),
            self.num_tokens.iter().sum(),
        );
        if state.options.prompt_tokens_details {
            let cached_tokens = self.num_cached_tokens.iter().sum();
            usage.prompt_tokens_details = Some(PromptTokensDetails { cached_tokens });
        }
        usage
    }
}
