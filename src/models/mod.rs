//! Qwen2, Qwen3 and Llama as one decoder: what the families share is `decoder.rs`, what differs
//! is one short file each.
//!
//! Knows shapes and tensor names; not where bytes come from (`weights`), nor batches (`engine`).

mod config;
mod decoder;
mod llama;
mod qwen2;
mod qwen3;
mod tensors;

pub use config::{Architecture, ModelConfig};
pub use decoder::Decoder;

/// What is wrong with a model's description.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ModelError {
    /// A key that every model has is absent.
    #[error("config.json has no \"{key}\"")]
    MissingKey {
        /// The key.
        key: String,
    },
    /// A key's value is of another type or out of range.
    #[error("config.json: \"{key}\" must be {wanted}, found {found}")]
    InvalidKey {
        /// The key.
        key: String,
        /// What it may be.
        wanted: String,
        /// What it is.
        found: String,
    },
    /// The model asks for something that infold does not compute.
    #[error("{what} is not supported; {advice}")]
    Unsupported {
        /// What was asked for.
        what: String,
        /// What to do.
        advice: String,
    },
    /// The model can not be divided among that many ranks.
    #[error(
        "tensor parallel size {tensor_parallel_size} does not divide this model \
         ({num_heads} heads, {num_kv_heads} key-value heads, intermediate size {intermediate_size}); \
         sizes that do: {sizes}"
    )]
    TensorParallel {
        /// The size asked for.
        tensor_parallel_size: usize,
        /// Query heads.
        num_heads: usize,
        /// Key and value heads.
        num_kv_heads: usize,
        /// Width inside the MLP.
        intermediate_size: usize,
        /// The sizes that work, as text.
        sizes: String,
    },
}
