//! Root-mean-square normalisation, whole on every rank.

use candle_core::{Result, Tensor};

use crate::kernels::Kernels;

use super::{ForwardContext, LayerError, Loader};

/// `x / sqrt(mean(x²) + eps) · weight` over the last dimension.
pub struct RmsNorm {
    weight: Tensor,
    eps: f32,
}

impl RmsNorm {
    /// Loads `weight` of `size` values.
    ///
    /// # Errors
    /// [`LayerError`] naming the tensor.
    pub fn load(
        loader: &Loader<'_>,
        size: usize,
        eps: f32,
    ) -> std::result::Result<Self, LayerError> {
        Ok(Self {
            weight: loader.vector("weight", size, 0..size)?,
            eps,
        })
    }

    /// Returns the scale, f32 `[size]`.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// Normalises `x` f32 `[tokens, size]`.
    ///
    /// # Errors
    /// When `x` has another shape.
    pub fn forward(&self, kernels: &Kernels, x: &Tensor) -> Result<Tensor> {
        kernels.rms_norm(x, &self.weight, self.eps)
    }

    /// Returns `(norm(Σ + residual), Σ + residual)`, Σ being the sum over ranks of `partial`: what
    /// follows a row-parallel layer.
    ///
    /// # Errors
    /// When the shapes differ or a rank has ended.
    pub fn forward_reduced(
        &self,
        context: &ForwardContext<'_>,
        partial: &Tensor,
        residual: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        let (kernels, weight) = (context.kernels, &self.weight);
        if kernels.has_group() {
            return kernels.all_reduce_add_rms_norm(partial, residual, weight, self.eps);
        }
        let sum = context.comm.all_reduce(partial)?;
        kernels.add_rms_norm(&sum, residual, weight, self.eps)
    }
}
