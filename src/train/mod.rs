//! LoRA fine-tuning: the verb `train`.
//!
//! `forward_backward` is the numeric core over packed micro-batches, `model` the frozen base,
//! `lora` the adapters in one flat buffer.

mod error;
mod forward_backward;
mod lora;
mod model;

pub use error::TrainError;
pub use forward_backward::{
    LoraTensors, Recompute, StepOptions, TrainBatch, evaluate, forward_backward,
};
pub use lora::{Linear, LoraEntry, LoraLayout, LoraOptions, LoraTarget};
pub use model::FrozenModel;
