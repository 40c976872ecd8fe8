//! The memory of one rank, estimated before anything is allocated.
//!
//! Base: the bytes of the checkpoint, divided among the ranks by ZeRO-3. Adapter: parameters,
//! gradients and both moments in f32, of which ZeRO-1 divides the moments, ZeRO-2 the gradients
//! too. Activations: what a layer keeps for its backward pass, times layers and tokens of the
//! largest micro-batch. Of each token a layer keeps its input and the residual (`hidden` each), q
//! and the attention's output (`heads` each), k and v (`kv` each), gate and up (`intermediate`
//! each): 2 (hidden + heads + kv + intermediate) numbers; its input alone when all is recomputed.

use std::fmt;

use super::{LoraLayout, PlanInputs, bytes};
use crate::train::{Recompute, ZeroStage};

/// Bytes of one rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryPlan {
    /// The frozen base.
    pub base: u64,
    /// Adapter, gradients and moments.
    pub adapter: u64,
    /// What layers keep, at most, with the policy asked for (nothing recomputed if none was).
    pub activations: u64,
    /// What layers keep, at most, when all is recomputed.
    pub activations_recomputed: u64,
}

impl MemoryPlan {
    pub(super) fn new(inputs: &PlanInputs<'_>, lora: &LoraLayout) -> Self {
        let config = inputs.config;
        let world_size = inputs.world_size as u64;
        let stage = config.zero_stage();
        let share = |from: ZeroStage| if stage >= from { world_size } else { 1 };
        let parameters = 4 * lora.num_params() as u64;
        let adapter = parameters
            + parameters / share(ZeroStage::Two)
            + 2 * parameters / share(ZeroStage::One);
        let longest = inputs.train.longest.next_multiple_of(8);
        let tokens = longest * config.batch.per_device_train_batch_size;
        let layers = inputs.model.num_layers;
        // Activations are f32 on a CPU, whatever the configuration says.
        let total = |per_token: usize| (4 * tokens * layers * per_token) as u64;
        let kept = kept_per_token(inputs, config.recompute.unwrap_or(Recompute::None));
        Self {
            base: inputs.model_bytes / share(ZeroStage::Three),
            adapter,
            activations: total(kept),
            activations_recomputed: total(kept_per_token(inputs, Recompute::Full)),
        }
    }

    /// Returns the sum.
    pub fn total(&self) -> u64 {
        self.base + self.adapter + self.activations
    }
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
        write!(
            f,
            "about {} on each rank: base {}, adapter with gradients and moments {}, activations \
             {} ({} if all is recomputed)",
            bytes(self.total()),
            bytes(self.base),
            bytes(self.adapter),
            bytes(self.activations),
            bytes(self.activations_recomputed)
        )
    }
}
