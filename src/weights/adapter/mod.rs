//! PEFT LoRA adapters, and a base model with adapters folded in.
//!
//! [`Adapter::open`] reads a directory; [`MergedCheckpoint::plan`] finds by headers alone which
//! tensor takes which deltas and every reason why it cannot be done; then each tensor is made
//! when it is asked for. Semantics: PEFT's `merge_and_unload`, with one rounding.

mod adapter_dir;
mod config;
mod deltas;
mod factors;
mod faults;
mod fold;
mod hints;
mod keys;
mod merged;
mod norm;
mod plan;
mod replacements;
mod simd;
mod stats;
mod tied;

#[cfg(test)]
mod tests;

pub use adapter_dir::{Adapter, LoraModule, LoraTarget};
pub(super) use adapter_dir::{CONFIG_FILE, TENSORS_FILE};
pub use config::AdapterConfig;
pub use faults::{AdapterFaults, Fault};
pub use merged::{Accumulate, MergeOptions, MergedCheckpoint, MergedTensor};
pub use stats::DeltaStats;
