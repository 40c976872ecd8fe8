//! Checkpoints: where they are found, what they hold, and their bytes. No tensor operation.
//!
//! [`Checkpoint`] opens a Hugging Face directory or a GGUF file and hands out [`StoredTensor`]s
//! by Hugging Face name; a rank of a tensor-parallel group takes its [`Shard`] of each.
//! [`resolve_model`] finds the path of a model that is named by its hub id, and downloads it.

mod adapter;
mod checkpoint;
mod convert;
mod dequantized;
mod direct_file;
mod directory;
mod disk;
mod download;
mod dummy;
mod error;
mod gguf;
mod gguf_file;
mod gguf_model;
mod gguf_names;
mod gguf_writer;
mod hub;
mod hub_adapter;
mod index;
mod named;
mod quantize;
mod safetensors;
mod safetensors_writer;
mod shard_plan;
mod source;
mod state_dict_order;
mod tensor;

pub use adapter::{
    Accumulate, Adapter, AdapterConfig, AdapterFaults, DeltaStats, Fault, LoraModule, LoraTarget,
    MergeOptions, MergedCheckpoint, MergedTensor,
};
pub use checkpoint::{Checkpoint, Format, TokenizerSource};
pub use convert::{torch_dtype, transpose};
pub use dequantized::DequantizedCheckpoint;
pub use disk::{exchange, free_bytes};
pub use dummy::DummyCheckpoint;
pub use error::WeightsError;
pub use gguf_names::{HeadCounts, RowOrder, gguf_name};
pub use gguf_writer::{GgufLayout, GgufTensor, GgufValue, GgufWriter};
pub use hub::{HubOptions, Network, resolve_model};
pub use hub_adapter::resolve_adapter;
pub use named::{open_adapter, open_model, open_with_adapters};
pub use quantize::{RowEncoder, encoded_bytes};
pub use safetensors_writer::{WrittenFile, hex, write_shards};
pub use shard_plan::{PlannedShard, ShardPlan};
pub use source::{ModelSource, TensorInfo, TensorSource};
pub use tensor::{Shard, StoredTensor};
