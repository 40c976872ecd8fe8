//! Linear layers, divided among ranks as in Megatron-LM: a column-parallel layer gives each rank
//! some outputs, a row-parallel one takes each rank's inputs and sums.

use std::ops::Range;

use candle_core::{Result, Tensor};

use crate::kernels::Matrix;

use super::{ForwardContext, LayerError, Loader};

/// One named linear of the checkpoint and the output rows that this rank takes of it.
pub struct OutputSlice<'a> {
    /// Name under the loader, as `q_proj`.
    pub name: &'a str,
    /// Outputs of the whole layer.
    pub out_features: usize,
    /// Outputs of this rank.
    pub rows: Range<usize>,
}

/// Linears that read the same input, outputs side by side: qkv, or gate and up.
pub struct ColumnParallel {
    parts: Vec<Matrix>,
    bias: Option<Tensor>,
}

impl ColumnParallel {
    /// Loads `slices` one after another.
    ///
    /// # Errors
    /// [`LayerError`] naming the tensor.
    pub fn load(
        loader: &Loader<'_>,
        in_features: usize,
        slices: &[OutputSlice<'_>],
        bias: Bias,
    ) -> std::result::Result<Self, LayerError> {
        let mut parts = Vec::with_capacity(slices.len());
        let mut biases = Vec::new();
        for slice in slices {
            let layer = loader.at(slice.name);
            let shape = [slice.out_features, in_features];
            parts.push(layer.linear("weight", shape, slice.rows.clone(), 0..in_features)?);
            if bias == Bias::Present {
                biases.push(layer.vector("bias", slice.out_features, slice.rows.clone())?);
            }
        }
        let refused = |source| LayerError::Kernel {
            tensor: loader.name().to_owned(),
            source,
        };
        let bias = match bias {
            Bias::Absent => None,
            Bias::Present => Some(loader.kernels().join_vectors(&biases).map_err(refused)?),
        };
        let parts = loader.kernels().join(parts).map_err(refused)?;
        Ok(Self { parts, bias })
    }

    /// Returns `x · Wᵀ + b`: `[tokens, in_features]` to `[tokens, Σ rows]`.
    ///
    /// # Errors
    /// When `x` has another shape.
    pub fn forward(&self, x: &Tensor, context: &ForwardContext<'_>) -> Result<Tensor> {
        let parts: Vec<&Matrix> = self.parts.iter().collect();
        context.kernels.matmul(x, &parts, self.bias.as_ref())
    }

    /// Returns silu(first half) · second half of what [`Self::forward`] would return.
    ///
    /// # Errors
    /// When `x` has another shape.
    pub fn forward_silu(&self, x: &Tensor, context: &ForwardContext<'_>) -> Result<Tensor> {
        let parts: Vec<&Matrix> = self.parts.iter().collect();
        context.kernels.matmul_silu(x, &parts, self.bias.as_ref())
    }
}

/// A linear whose inputs are divided; the ranks' partial sums are added.
pub struct RowParallel {
    weight: Matrix,
    /// Added on rank 0 only, so that the sum holds it once.
    bias: Option<Tensor>,
}

impl RowParallel {
    /// Loads input columns `cols` of the linear at `loader`.
    ///
    /// # Errors
    /// [`LayerError`] naming the tensor.
    pub fn load(
        loader: &Loader<'_>,
        shape: [usize; 2],
        cols: Range<usize>,
        bias: Bias,
    ) -> std::result::Result<Self, LayerError> {
        let weight = loader.linear("weight", shape, 0..shape[0], cols)?;
        let bias = match bias {
            Bias::Present if loader.rank() == 0 => {
                Some(loader.vector("bias", shape[0], 0..shape[0])?)
            }
            Bias::Present | Bias::Absent => None,
        };
        Ok(Self { weight, bias })
    }

    /// Returns this rank's part of `x · Wᵀ + b`, and `residual`; the sum over ranks and of both is
    /// the stream behind the layer, which
    /// [`RmsNorm::forward_reduced`](super::RmsNorm::forward_reduced) makes in one with the norm
    /// that follows. Or none and the stream, where it is made already.
    ///
    /// # Errors
    /// When `x` or `residual` has another shape.
    pub fn forward(
        &self,
        x: &Tensor,
        residual: Tensor,
        context: &ForwardContext<'_>,
    ) -> Result<(Option<Tensor>, Tensor)> {
        context
            .kernels
            .matmul_onto(x, &self.weight, self.bias.as_ref(), residual)
    }
}

/// Whether a linear has a bias in the checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bias {
    /// `bias` is read and must be there.
    Present,
    /// No bias is looked for.
    Absent,
}

impl From<bool> for Bias {
    fn from(present: bool) -> Self {
        if present { Self::Present } else { Self::Absent }
    }
}

/// Returns the part of `0..size` that belongs to `rank` when `world_size` divides `size`.
pub(super) fn even_part(size: usize, rank: usize, world_size: usize) -> Range<usize> {
    let len = size / world_size;
    rank * len..(rank + 1) * len
}
