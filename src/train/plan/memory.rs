//! The memory of one rank, estimated before anything is allocated, and what is recomputed so that
//! the run fits.
//!
//! Base: the bytes of the checkpoint, divided among the ranks by ZeRO-3. Adapter: parameters,
//! gradients and both moments in f32, of which ZeRO-1 divides the moments, ZeRO-2 the gradients
//! too. Activations: what a layer keeps for its backward pass, times layers and tokens of the
//! largest pass. Of each token a layer keeps its input and the residual (`hidden` each), q
//! and the attention's output (`heads` each), k and v (`kv` each), gate and up (`intermediate`
//! each): 2 (hidden + heads + kv + intermediate) numbers; its input alone when all is recomputed.
//! Logits: those that exist at once.

use std::fmt;

use super::{LoraLayout, PlanInputs, bytes};
use crate::train::{Recompute, ZeroStage};

/// Logits that exist at once, at most: those of `kernels`, in numbers.
const MAX_LOGITS: usize = 32 * 1024 * 1024;

/// Bytes of one rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryPlan {
    /// The frozen base.
    pub base: u64,
    /// Adapter, gradients and moments.
    pub adapter: u64,
    /// What layers keep, at most, under `recompute`.
    pub activations: u64,
    /// Logits.
    pub logits: u64,
    /// What is computed again: as asked for, or as little as fits.
    pub recompute: Recompute,
    /// What is left of the machine's memory, where it says so.
    pub available: Option<u64>,
    /// Ranks that share it; the base is in memory once.
    num_ranks: u64,
}

impl MemoryPlan {
    pub(super) fn new(inputs: &PlanInputs<'_>, lora: &LoraLayout) -> Self {
        let config = inputs.config;
        let num_ranks = inputs.world_size as u64;
        let stage = config.zero_stage();
        let share = |from: ZeroStage| if stage >= from { num_ranks } else { 1 };
        let parameters = 4 * lora.num_params() as u64;
        let adapter = parameters
            + parameters / share(ZeroStage::Two)
            + 2 * parameters / share(ZeroStage::One);
        let tokens = tokens_of_pass(inputs);
        let logits =
            (tokens * inputs.model.vocab_size).min(MAX_LOGITS.max(inputs.model.vocab_size));
        let plan = |recompute| {
            let kept = tokens * inputs.model.num_layers * kept_per_token(inputs, recompute);
            Self {
                base: inputs.model_bytes / share(ZeroStage::Three),
                adapter,
                // Activations are f32 on a CPU, whatever the configuration says.
                activations: 4 * kept as u64,
                logits: 4 * logits as u64,
                recompute,
                available: inputs.available_memory,
                num_ranks,
            }
        };
        match config.recompute {
            Some(recompute) => plan(recompute),
            None => [Recompute::None, Recompute::Mlp]
                .map(plan)
                .into_iter()
                .find(Self::fits)
                .unwrap_or_else(|| plan(Recompute::Full)),
        }
    }

    /// Returns the sum of one rank.
    pub fn total(&self) -> u64 {
        self.base + self.adapter + self.activations + self.logits
    }

    /// Says whether all ranks fit into what is available, as far as that is known.
    pub fn fits(&self) -> bool {
        let others = (self.num_ranks - 1) * (self.total() - self.base);
        let available = self.available.unwrap_or(u64::MAX);
        self.total() + others <= available
    }
}

/// Returns the tokens of the largest pass: of a micro-batch, or of several that are computed
/// together.
fn tokens_of_pass(inputs: &PlanInputs<'_>) -> usize {
    let batch = &inputs.config.batch;
    let longest = inputs.train.longest.next_multiple_of(8);
    let micro_batch = longest * batch.per_device_train_batch_size;
    let update = micro_batch * batch.gradient_accumulation_steps;
    micro_batch.max(update.min(inputs.config.max_tokens_per_pass()))
}

/// Returns the passes of an update on one rank.
pub(super) fn passes_per_update(inputs: &PlanInputs<'_>) -> usize {
    let batch = &inputs.config.batch;
    let longest = inputs.train.longest.next_multiple_of(8);
    let micro_batch = (longest * batch.per_device_train_batch_size).max(1);
    let together = (inputs.config.max_tokens_per_pass() / micro_batch).max(1);
    batch.gradient_accumulation_steps.div_ceil(together)
}

/// Returns the numbers that a layer keeps of a token.
fn kept_per_token(inputs: &PlanInputs<'_>, recompute: Recompute) -> usize {
    let model = inputs.model;
    let heads = model.num_heads * model.head_dim;
    let kv_heads = model.num_kv_heads * model.head_dim;
    let attention = 2 * (model.hidden_size + heads + kv_heads);
    match recompute {
        Recompute::None => attention + 2 * model.intermediate_size,
        Recompute::Mlp => attention,
        Recompute::Full => model.hidden_size,
    }
}

impl fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let recompute = match self.recompute {
            Recompute::None => "nothing",
            Recompute::Mlp => "gates and ups of the MLPs",
            Recompute::Full => "every layer",
        };
        write!(
            f,
            "about {} on each rank: base {}, adapter with gradients and moments {}, activations \
             {}, logits {}; the backward pass computes {recompute} again",
            bytes(self.total()),
            bytes(self.base),
            bytes(self.adapter),
            bytes(self.activations),
            bytes(self.logits),
        )?;
        match self.available {
            Some(available) if !self.fits() => write!(
                f,
                "\nmore than the {} available: lower per_device_train_batch_size, cutoff_len or \
                 num_ranks",
                bytes(available)
            ),
            _ => Ok(()),
        }
    }
}
