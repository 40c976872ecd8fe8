//! Exports a checkpoint, or an adapter alone, as a GGUF file for llama.cpp and Ollama.
//!
//! [`GgufPlan`] decides names, types and sizes from headers alone; writing it streams one tensor
//! at a time from a [`TensorSource`](crate::weights::TensorSource), so a base with adapters folded in needs no directory of its
//! own. Types, names and metadata are those of llama.cpp's `convert_hf_to_gguf.py`,
//! `convert_lora_to_gguf.py` and `llama_tensor_get_type`.

mod lora;
#[cfg(test)]
mod lora_tests;
mod metadata;
mod plan;
mod recipe;
mod shape;
#[cfg(test)]
mod tests;

use std::fmt;

pub use lora::{LoraModule, export_gguf_lora};
pub use plan::GgufPlan;
pub use recipe::GgufFileType;

/// What a GGUF file is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GgufOptions {
    /// Type of the weights.
    pub file_type: GgufFileType,
    /// `general.name`, which programs show; none is fine.
    pub name: Option<String>,
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GgufSummary {
    /// Size of the file.
    pub file_bytes: u64,
    /// Bytes of its tensors, padding not counted.
    pub tensor_bytes: u64,
    /// Number of tensors in each type, by ggml's name (`Q4_K`), sorted by it.
    pub types: Vec<(String, usize)>,
    /// Tensors whose rows do not divide into the blocks that the file type asks for, so that they
    /// are stored in a larger type.
    pub fallbacks: Vec<String>,
}

impl fmt::Display for GgufSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let types: Vec<String> = (self.types.iter())
            .map(|(dtype, count)| format!("{count} {dtype}"))
            .collect();
        write!(
            f,
            "{} bytes of tensors: {}",
            self.tensor_bytes,
            types.join(", ")
        )?;
        if !self.fallbacks.is_empty() {
            let count = self.fallbacks.len();
            write!(
                f,
                "; {count} in a larger type, their rows do not divide into its blocks"
            )?;
        }
        Ok(())
    }
}
