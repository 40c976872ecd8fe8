//! LoRA fine-tuning: the verb `train`.
//!
//! `forward_backward` is the numeric core over packed micro-batches, `model` the frozen base,
//! `lora` the adapters in one flat buffer, `optimizer`, `lr_schedule` and `zero` make updates of
//! gradients, `sharded` divides the base among ranks, `trainer` is the loop, `checkpoint`, `adapter_out`, `report` and `plot` write files.

mod adapter_out;
mod checkpoint;
mod error;
mod files;
mod forward_backward;
mod lora;
mod lr_schedule;
mod model;
mod mt19937;
mod optimizer;
mod plot;
mod report;
mod sharded;
mod trainer;
mod zero;

pub use adapter_out::{AdapterFiles, read_adapter, write_adapter};
pub use checkpoint::{Manifest, checkpoint_dir, list_checkpoints};
pub use error::TrainError;
pub use forward_backward::{
    LoraTensors, Recompute, StepOptions, TrainBatch, evaluate, forward_backward,
};
pub use lora::{Linear, LoraEntry, LoraLayout, LoraOptions, LoraTarget};
pub use lr_schedule::{DeepSpeedWarmup, LrCurve, LrSchedule, WarmupType};
pub use model::FrozenModel;
pub use optimizer::{AdamW, AdamWOptions, LossScaleOptions, LossScaler, clip_coefficient};
pub use report::{RunFacts, TrainerState, clock};
pub use trainer::{
    BatchPlace, BatchProvider, Evaluation, OutputPlan, Progress, Ranks, RunLength, Start,
    TrainEvent, TrainSetup, TrainSummary, train,
};
pub use zero::ZeroStage;
