//! LoRA fine-tuning: the verb `train`, and `check-data`.
//!
//! From the command line to batches: `config` is everything asked for, `deepspeed` the JSON in it,
//! `dataset` turns files into conversations, `encode` those into tokens, `sampler` orders them,
//! `collate` lays out micro-batches, `steps` counts updates, `plan` says all that before anything
//! is loaded, and `prepare` does it all in order.
//!
//! `forward_backward` is the numeric core over packed micro-batches, `model` the frozen base,
//! `modules` its parts by name, `lora` all that is trained in one flat buffer, `optimizer`, `lr_schedule` and `zero` make updates of
//! gradients, `sharded` divides the base among ranks, `trainer` is the loop, `checkpoint`,
//! `adapter_out`, `report`, `plot` and `tensorboard` write files, `manifest` says what a checkpoint
//! belongs to, `adapter_in` takes over the options of an adapter to go on from. `run` joins both
//! halves.

mod adapter_in;
mod adapter_out;
mod args;
mod check_data;
mod checkpoint;
mod collate;
mod config;
mod console;
mod dataset;
mod deepspeed;
mod encode;
mod error;
mod files;
mod forward_backward;
mod lora;
mod lr_schedule;
mod manifest;
mod model;
mod modules;
mod mt19937;
mod optimizer;
mod plan;
mod plot;
mod prepare;
mod report;
mod run;
mod sampler;
mod sharded;
mod steps;
mod tensorboard;
mod trainer;
mod zero;

pub use adapter_out::{AdapterFiles, read_adapter, write_adapter};
pub use args::TrainArgs;
pub use check_data::{CheckDataArgs, check_data};
pub use checkpoint::{checkpoint_dir, list_checkpoints};
pub use collate::{Layout, collate};
pub use config::{
    BatchConfig, Cadence, ConfigError, DataConfig, LoraConfig, LrSchedulerType, ModelSource,
    OptimizerConfig, OutputConfig, Packing, Precision, Resume, ScheduleConfig, TrainConfig,
};
pub use dataset::{
    DataError, DataRequest, DatasetReport, DropReason, Dropped, LoadedData, RowId, load_data,
};
pub use deepspeed::{DeepSpeedConfig, DeepSpeedError, DeepSpeedSchedule, KeyEffect, RunValues};
pub use encode::{EncodeError, EncodeSummary, Encoder, describe_example, template_of_tokenizer};
pub use error::TrainError;
pub use forward_backward::{
    LoraTensors, Recompute, StepOptions, TrainBatch, evaluate, forward_backward,
};
pub use lora::{LoraEntry, LoraLayout, LoraOptions, LoraTarget, WholeEntry};
pub use lr_schedule::{DeepSpeedWarmup, LrCurve, LrSchedule, WarmupType};
pub use manifest::Manifest;
pub use model::FrozenModel;
pub use modules::{LayerNorm, Linear, Module};
pub use optimizer::{AdamW, AdamWOptions, LossScaleOptions, LossScaler, clip_coefficient};
pub use plan::{LearningRates, MemoryPlan, Plan, PlanInputs};
pub use prepare::{Prepared, prepare};
pub use report::{RunFacts, TrainerState, clock};
pub use run::run;
pub use sampler::{Order, Remainder, Sampler};
pub use steps::{Duration, StepCounts};
pub use trainer::{
    BatchPlace, BatchProvider, Evaluation, OutputPlan, Progress, Ranks, RunLength, Start,
    TrainEvent, TrainSetup, TrainSummary, train,
};
pub use zero::ZeroStage;
