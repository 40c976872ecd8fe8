//! Token ids in, token events out: the continuous-batching engine.
//!
//! One thread owns all state (scheduler, KV blocks, model ranks); the rest of the program holds
//! an [`EngineHandle`], which is a sender plus shared counters. Knows no HTTP and no text.

mod block_manager;
mod handle;
mod request;
mod sampler;
mod scheduler;
mod sequence;
mod stats;

pub use handle::{EngineHandle, EngineInfo, SubmitError, TokenStream};
pub use request::{FinishReason, GenerateRequest, SamplingParams, TokenEvent, TokenLogprobs};
pub use scheduler::SchedulingPolicy;
pub use stats::Stats;

#[cfg(test)]
pub(crate) use handle::mock_engine;
