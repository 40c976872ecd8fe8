//! The border between tensors and those who write or load them.
//!
//! A [`Checkpoint`](super::Checkpoint) hands out what it stores; a base with adapters folded in
//! makes a tensor when it is asked for. Writers and loaders see only this trait, so that merging
//! into a directory, into a GGUF file and at the start of a server is one code path.

use std::{ops::Range, path::Path};

use candle_core::quantized::GgmlDType;
use serde_json::Value;

use super::{Checkpoint, StoredTensor, WeightsError};

/// What a tensor is, before its bytes are made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Name in the Hugging Face checkpoint.
    pub name: String,
    /// Type of the stored elements.
    pub dtype: GgmlDType,
    /// Shape, outermost dimension first.
    pub shape: Vec<usize>,
}

impl TensorInfo {
    /// Returns the number of weights.
    pub fn num_elements(&self) -> u64 {
        self.shape.iter().map(|size| *size as u64).product()
    }

    /// Returns the bytes of all elements.
    pub fn size_bytes(&self) -> u64 {
        self.num_elements() / self.dtype.block_size() as u64 * self.dtype.type_size() as u64
    }
}

/// Tensors by Hugging Face name, made when they are asked for.
pub trait TensorSource: Send + Sync {
    /// Returns every tensor in the order of the checkpoint.
    ///
    /// # Errors
    /// A header that cannot be read.
    fn tensors(&self) -> Result<Vec<TensorInfo>, WeightsError>;

    /// Returns the tensor of a name.
    ///
    /// # Errors
    /// No tensor of that name, or bytes that cannot be read.
    fn tensor(&self, name: &str) -> Result<StoredTensor, WeightsError>;

    /// Returns rows of a tensor (of a vector, elements), for one pass over it in little memory:
    /// what the rows hold is given back when they are dropped.
    ///
    /// # Errors
    /// As [`tensor`](Self::tensor), and rows that the tensor does not have.
    fn rows(&self, name: &str, rows: Range<usize>) -> Result<StoredTensor, WeightsError> {
        self.tensor(name)?.narrow(0, rows)
    }

    /// Puts rows of a tensor into `bytes`, for a writer that uses its buffers again.
    ///
    /// # Errors
    /// As [`rows`](Self::rows).
    ///
    /// # Panics
    /// When `bytes` has not the size of the rows.
    fn read_rows(
        &self,
        name: &str,
        rows: Range<usize>,
        bytes: &mut [u8],
    ) -> Result<(), WeightsError> {
        bytes.copy_from_slice(&self.rows(name, rows)?.data);
        Ok(())
    }
}

/// A model that can be run: its tensors and its configuration.
pub trait ModelSource: TensorSource {
    /// Returns the content of `config.json`.
    fn config(&self) -> &Value;

    /// Returns where the (base) model lies.
    fn path(&self) -> &Path;

    /// Returns the number of weights.
    fn num_parameters(&self) -> u64;

    /// Returns the bytes of all tensors.
    fn size_bytes(&self) -> u64;
}

impl ModelSource for Checkpoint {
    fn config(&self) -> &Value {
        Self::config(self)
    }

    fn path(&self) -> &Path {
        Self::path(self)
    }

    fn num_parameters(&self) -> u64 {
        Self::num_parameters(self)
    }

    fn size_bytes(&self) -> u64 {
        Self::size_bytes(self)
    }
}

impl TensorSource for Checkpoint {
    fn tensors(&self) -> Result<Vec<TensorInfo>, WeightsError> {
        self.names().map(|name| self.info(name)).collect()
    }

    fn tensor(&self, name: &str) -> Result<StoredTensor, WeightsError> {
        Self::tensor(self, name)
    }

    fn rows(&self, name: &str, rows: Range<usize>) -> Result<StoredTensor, WeightsError> {
        self.passing_rows(name, rows)
    }
}
