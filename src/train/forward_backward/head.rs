//! The final norm, the output head and the loss, forward and backward.

use candle_core::{Result, Tensor};

use crate::kernels::{HeadGradient, Kernels, LinearPart, LowRank};

use super::adapted::{AdaptedLinear, accumulate};
use super::layer::norm_gradient;
use super::trained::Norm;

/// What follows the last layer, in one micro-batch.
pub(super) struct Head<'a> {
    pub(super) kernels: &'a Kernels,
    pub(super) norm: Norm,
    pub(super) eps: f32,
    /// Without bias and without magnitudes.
    pub(super) linear: AdaptedLinear<'a>,
}

impl Head<'_> {
    /// Returns the loss of each row of `hidden: [rows, hidden_size]`.
    pub(super) fn losses(&self, hidden: &Tensor, targets: &[u32]) -> Result<Vec<f32>> {
        let normed = self.normed(hidden)?;
        let (u, b) = self.low_rank(&normed)?.unzip();
        let part = self.part(u.as_ref(), b.as_ref());
        let output = self.kernels.cross_entropy(&normed, &part, targets, None)?;
        Ok(output.losses)
    }

    /// Returns the loss of each row and the gradient of `scale` times their sum by `hidden`; adds
    /// the gradients of what is trained here to the flat buffer.
    pub(super) fn backward(
        &self,
        hidden: &Tensor,
        targets: &[u32],
        scale: f32,
        gradients: &mut [f32],
    ) -> Result<(Vec<f32>, Tensor)> {
        let (kernels, weight) = (self.kernels, &self.linear.linear.weight);
        let normed = self.normed(hidden)?;
        let (u, b) = self.low_rank(&normed)?.unzip();
        let size = weight.rows() * weight.cols();
        let wanted = HeadGradient {
            scale,
            weight: self
                .linear
                .whole
                .map(|offsets| &mut gradients[offsets.weight..offsets.weight + size]),
        };
        let part = self.part(u.as_ref(), b.as_ref());
        let output = kernels.cross_entropy(&normed, &part, targets, Some(wanted))?;
        let Some(mut d_normed) = output.d_hidden else {
            candle_core::bail!("the loss has no gradient");
        };
        if let (Some(adapter), Some((d_u, db))) = (&self.linear.adapter, output.d_low_rank) {
            let du = (d_u * f64::from(adapter.scale))?;
            let da = kernels.product(&adapter.input(kernels, &normed)?.t()?, &du, 1.0)?;
            accumulate(gradients, adapter.offsets.a, &da.t()?)?;
            accumulate(gradients, adapter.offsets.b, &db)?;
            let term = kernels.product(&du, &adapter.a, 1.0)?;
            d_normed = match adapter.dropout {
                Some(dropout) => kernels.add_dropout(&d_normed, &term, dropout)?,
                None => kernels.add(&d_normed, &term)?,
            };
        }
        norm_gradient(
            kernels,
            &self.norm,
            self.eps,
            (hidden, &d_normed),
            gradients,
        )?;
        let weight = &self.norm.weight;
        let d_hidden = kernels.rms_norm_backward(hidden, weight, self.eps, &d_normed, None)?;
        Ok((output.losses, d_hidden))
    }

    fn normed(&self, hidden: &Tensor) -> Result<Tensor> {
        self.kernels.rms_norm(hidden, &self.norm.weight, self.eps)
    }

    /// Returns `s dropout(x) Aᵀ` and Bᵀ, if the head has an adapter.
    fn low_rank(&self, normed: &Tensor) -> Result<Option<(Tensor, Tensor)>> {
        let Some(adapter) = &self.linear.adapter else {
            return Ok(None);
        };
        let u = adapter.low_rank_input(self.kernels, normed)?;
        Ok(Some((u, adapter.b.t()?)))
    }

    fn part<'p>(&'p self, u: Option<&'p Tensor>, b: Option<&'p Tensor>) -> LinearPart<'p> {
        LinearPart {
            weight: &self.linear.linear.weight,
            bias: None,
            low_rank: match (u, b) {
                (Some(x), Some(w)) => Some(LowRank { x, w }),
                _ => None,
            },
        }
    }
}
