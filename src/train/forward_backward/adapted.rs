//! Linears that read the same input, with their adapters: forward and backward.
//!
//! With u = s dropout(x) Aᵀ: y = x Wᵀ + b + u Bᵀ. From dy follow dB = dyᵀ u, du = s dy B,
//! dA = duᵀ dropout(x) and dx = dy W + dropout(du A), the mask being that of the forward pass.
//! Weights and biases are frozen, so their gradients are never computed.

use candle_core::{Result, Tensor};

use crate::kernels::{Dropout, Kernels, LinearPart, LowRank};

use super::super::model::FrozenLinear;

/// The adapter of one linear in one micro-batch.
pub(super) struct Adapter {
    /// `[rank, in]`.
    pub(super) a: Tensor,
    /// `[out, rank]`.
    pub(super) b: Tensor,
    pub(super) scale: f32,
    pub(super) dropout: Option<Dropout>,
    /// Where A and B lie in the flat buffers.
    pub(super) a_offset: usize,
    pub(super) b_offset: usize,
}

/// Linears side by side.
pub(super) struct AdaptedLinears<'a> {
    pub(super) parts: Vec<(&'a FrozenLinear, Option<Adapter>)>,
}

/// `s dropout(x) Aᵀ` of each part with an adapter, `[tokens, rank]`.
pub(super) type LowRankInputs = Vec<Option<Tensor>>;

/// Whether the gradient of the input is needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum InputGradient {
    /// Something below is trained.
    Wanted,
    /// Everything below is frozen.
    Skipped,
}

impl Adapter {
    fn input(&self, kernels: &Kernels, x: &Tensor) -> Result<Tensor> {
        match self.dropout {
            Some(dropout) => kernels.dropout(x, dropout),
            None => Ok(x.clone()),
        }
    }
}

impl AdaptedLinears<'_> {
    /// Returns the outputs side by side and what the backward pass needs besides `x`.
    pub(super) fn forward(&self, kernels: &Kernels, x: &Tensor) -> Result<(Tensor, LowRankInputs)> {
        let us = self.low_rank_inputs(kernels, x)?;
        let transposed = self.transposed_bs()?;
        let parts = self.parts.iter().zip(us.iter().zip(&transposed));
        let parts: Vec<LinearPart<'_>> = parts
            .map(|((frozen, _), (u, b))| LinearPart {
                weight: &frozen.weight,
                bias: frozen.bias.as_ref(),
                low_rank: match (u, b) {
                    (Some(x), Some(w)) => Some(LowRank { x, w }),
                    _ => None,
                },
            })
            .collect();
        Ok((kernels.linear(x, &parts)?, us))
    }

    /// Returns `s dropout(x) Aᵀ` of each part.
    pub(super) fn low_rank_inputs(&self, kernels: &Kernels, x: &Tensor) -> Result<LowRankInputs> {
        let input = |(_, adapter): &(&FrozenLinear, Option<Adapter>)| {
            let Some(adapter) = adapter else {
                return Ok(None);
            };
            let x = adapter.input(kernels, x)?;
            kernels
                .product(&x, &adapter.a.t()?, adapter.scale)
                .map(Some)
        };
        self.parts.iter().map(input).collect()
    }

    fn transposed_bs(&self) -> Result<Vec<Option<Tensor>>> {
        let transposed = |(_, adapter): &(_, Option<Adapter>)| {
            adapter.as_ref().map(|adapter| adapter.b.t()).transpose()
        };
        self.parts.iter().map(transposed).collect()
    }

    /// Adds the gradients of the factors to the flat buffer and returns that of `x`, if wanted.
    pub(super) fn backward(
        &self,
        kernels: &Kernels,
        (x, us): (&Tensor, &LowRankInputs),
        dy: &Tensor,
        wanted: InputGradient,
        gradients: &mut [f32],
    ) -> Result<Option<Tensor>> {
        let mut dus = Vec::with_capacity(self.parts.len());
        let mut col = 0;
        for ((frozen, adapter), u) in self.parts.iter().zip(us) {
            let width = frozen.weight.rows();
            let part_dy = dy.narrow(1, col, width)?;
            col += width;
            let (Some(adapter), Some(u)) = (adapter, u) else {
                dus.push(None);
                continue;
            };
            let db = kernels.product(&part_dy.t()?, u, 1.0)?;
            let du = kernels.product(&part_dy, &adapter.b, adapter.scale)?;
            // dAᵀ: with the few columns on the right x is read once and not copied.
            let da = kernels.product(&adapter.input(kernels, x)?.t()?, &du, 1.0)?;
            accumulate(gradients, adapter.a_offset, &da.t()?)?;
            accumulate(gradients, adapter.b_offset, &db)?;
            dus.push(Some(du));
        }
        if wanted == InputGradient::Skipped {
            return Ok(None);
        }
        self.input_gradient(kernels, dy, &dus).map(Some)
    }

    fn input_gradient(
        &self,
        kernels: &Kernels,
        dy: &Tensor,
        dus: &[Option<Tensor>],
    ) -> Result<Tensor> {
        let parts = self.parts.iter().zip(dus);
        let low_rank: Vec<LinearPart<'_>> = parts
            .map(|((frozen, adapter), du)| LinearPart {
                weight: &frozen.weight,
                bias: None,
                low_rank: match (adapter, du) {
                    (Some(adapter), Some(x)) if adapter.dropout.is_none() => {
                        Some(LowRank { x, w: &adapter.a })
                    }
                    _ => None,
                },
            })
            .collect();
        let mut dx = kernels.linear_backward(dy, &low_rank)?;
        for ((_, adapter), du) in self.parts.iter().zip(dus) {
            if let (Some(adapter), Some(du)) = (adapter, du)
                && let Some(dropout) = adapter.dropout
            {
                let term = kernels.product(du, &adapter.a, 1.0)?;
                dx = kernels.add_dropout(&dx, &term, dropout)?;
            }
        }
        Ok(dx)
    }
}

fn accumulate(gradients: &mut [f32], offset: usize, gradient: &Tensor) -> Result<()> {
    let values: Vec<f32> = gradient.flatten_all()?.to_vec1()?;
    for (sum, value) in gradients[offset..].iter_mut().zip(values) {
        *sum += value;
    }
    Ok(())
}
