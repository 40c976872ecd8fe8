//! The parts of a decoder, tensor-parallel from the start.
//!
//! A layer owns its slice of the weights and knows how to cut it from the checkpoint; the rank
//! and the group come in a [`Loader`] at load and a [`ForwardContext`] at run. Knows no model and
//! no batch policy.

mod attention;
mod embedding;
mod linear;
mod loader;
mod mlp;
mod norm;
mod rotary;

pub use attention::{Attention, AttentionShape};
pub use embedding::{LmHead, VocabParallelEmbedding};
pub use linear::{Bias, ColumnParallel, OutputSlice, RowParallel};
pub use loader::Loader;
pub use mlp::Mlp;
pub use norm::RmsNorm;
pub use rotary::{RopeConfig, RopeScaling, RotaryEmbedding};

use candle_core::{Result, Tensor};

use crate::distributed::Comm;
use crate::kernels::{AttentionBatch, Kernels};

/// What every layer needs during one forward pass.
#[derive(Clone, Copy)]
pub struct ForwardContext<'a> {
    /// This rank's kernels.
    pub kernels: &'a Kernels,
    /// This rank's collectives.
    pub comm: &'a Comm,
    /// Which tokens belong to which sequence and where their keys and values lie.
    pub batch: &'a AttentionBatch,
}

impl ForwardContext<'_> {
    /// Returns the sum over ranks of `tensor`.
    fn all_reduce(&self, tensor: &Tensor) -> Result<Tensor> {
        match self.kernels.has_group() {
            true => self.kernels.all_reduce(tensor),
            false => self.comm.all_reduce(tensor),
        }
    }

    /// Joins the ranks' columns: on all CPU ranks, on the first GPU.
    fn all_gather_columns(&self, tensor: &Tensor) -> Result<Tensor> {
        match self.kernels.has_group() {
            true => self.kernels.all_gather_columns(tensor),
            false => self.comm.all_gather_columns(tensor),
        }
    }
}

/// What goes wrong while layers take their weights.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// A tensor is missing, of another shape, or can not be cut.
    #[error(transparent)]
    Weights(#[from] crate::weights::WeightsError),
    /// A kernel refused a weight.
    #[error("tensor \"{tensor}\": {source}")]
    Kernel {
        /// The tensor's name in the checkpoint.
        tensor: String,
        /// What the kernel said.
        source: candle_core::Error,
    },
}
