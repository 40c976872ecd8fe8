//! LoRA fine-tuning: the verb `train`, and `check-data`.
//!
//! From the command line to batches: `config` is everything asked for, `deepspeed` the JSON in it,
//! `dataset` turns files into conversations, `encode` those into tokens, `sampler` orders them,
//! `collate` lays out micro-batches, `steps` counts updates, `plan` says all that before anything
//! is loaded. `forward_backward` is the numeric core over packed micro-batches, `model` the frozen
//! base, `lora` the adapters in one flat buffer.

mod args;
mod check_data;
mod collate;
mod config;
mod dataset;
mod deepspeed;
mod encode;
mod error;
mod forward_backward;
mod lora;
mod model;
mod mt19937;
mod plan;
mod sampler;
mod steps;

pub use args::TrainArgs;
pub use check_data::{CheckDataArgs, check_data};
pub use collate::{Layout, collate};
pub use config::{
    BatchConfig, Cadence, ConfigError, DataConfig, LoraConfig, LrSchedulerType, ModelSource,
    OptimizerConfig, OutputConfig, Packing, Precision, ScheduleConfig, TrainConfig,
};
pub use dataset::{
    DataError, DataRequest, DatasetReport, DropReason, Dropped, LoadedData, RowId, load_data,
};
pub use deepspeed::{
    DeepSpeedConfig, DeepSpeedError, DeepSpeedSchedule, DeepSpeedScheduleKind, KeyEffect,
    LossScale, RunValues, WarmupType, ZeroStage,
};
pub use encode::{EncodeSummary, Encoder};
pub use error::TrainError;
pub use forward_backward::{
    LoraTensors, Recompute, StepOptions, TrainBatch, evaluate, forward_backward,
};
pub use lora::{Linear, LoraEntry, LoraLayout, LoraOptions, LoraTarget};
pub use model::FrozenModel;
pub use plan::{LearningRates, Plan, PlanInputs};
pub use sampler::{Order, Remainder, Sampler};
pub use steps::{Duration, StepCounts};
