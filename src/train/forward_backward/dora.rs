//! Magnitudes apart from directions (DoRA, arXiv:2402.09353), as PEFT computes them.
//!
//! With n the norms of the rows of W + s B A and c = m / n, both per output, and x' = dropout(x):
//! y = x Wᵀ + b + (c - 1) x' Wᵀ + c s B A x', which without dropout is c z + b for
//! z = x Wᵀ + u Bᵀ. The norms count as constants in the backward pass (section 4.3 of the paper):
//! dm = Σ dy z' / n with z' = x' Wᵀ + u Bᵀ, and all else is LoRA's backward with c dy for dy.
//! Under dropout dx = dy W + dropout((c - 1) dy W + du A).

use candle_core::{Result, Tensor};

use crate::kernels::{Kernels, LinearPart, LowRank, Matrix};

use super::adapted::{AdaptedLinear, Adapter, AdapterSaved, LinearsSaved, add_values};

/// What a linear's outputs are multiplied by.
pub(super) struct Scales {
    /// c, `[out]`.
    factors: Vec<f32>,
    /// n, `[out]`.
    norms: Vec<f32>,
}

impl Scales {
    /// Returns the factors of an adapter with magnitudes.
    pub(super) fn new(
        kernels: &Kernels,
        weight: &Matrix,
        adapter: &Adapter,
    ) -> Result<Option<Self>> {
        let Some(magnitude) = &adapter.magnitude else {
            return Ok(None);
        };
        let factors = Some((&adapter.a, &adapter.b));
        let norms = kernels.row_norms(weight, factors, adapter.scale)?;
        let factors = magnitude.iter().zip(&norms).map(|(m, n)| m / n).collect();
        Ok(Some(Self { factors, norms }))
    }

    /// Returns Bᵀ with each column multiplied by its output's factor.
    pub(super) fn scaled_right(&self, kernels: &Kernels, adapter: &Adapter) -> Result<Tensor> {
        let b = adapter.b.t()?.contiguous()?;
        kernels.scale_columns(&b, &self.factors, None, None)
    }

    /// Returns c - 1.
    fn excess(&self) -> Vec<f32> {
        self.factors.iter().map(|factor| factor - 1.0).collect()
    }
}

/// Says whether the outputs as a whole are multiplied by factors: there are magnitudes and no
/// dropout.
pub(super) fn scales_all(part: &AdaptedLinear<'_>, saved: Option<&AdapterSaved>) -> bool {
    let has_dropout = part.adapter.as_ref().is_some_and(|a| a.dropout.is_some());
    saved.is_some_and(|saved| saved.dora.is_some()) && !has_dropout
}

fn scales_of(saved: &Option<AdapterSaved>) -> Option<&Scales> {
    saved.as_ref().and_then(|saved| saved.dora.as_ref())
}

/// Turns the sums of products of linears side by side into their outputs.
pub(super) fn finish(
    kernels: &Kernels,
    parts: &[AdaptedLinear<'_>],
    saved: &LinearsSaved,
    (x, y): (&Tensor, Tensor),
) -> Result<Tensor> {
    if saved.iter().all(|saved| scales_of(saved).is_none()) {
        return Ok(y);
    }
    if parts
        .iter()
        .zip(saved)
        .any(|(part, saved)| scales_all(part, saved.as_ref()))
    {
        return scale_outputs(kernels, parts, saved, &y);
    }
    let (mut outputs, mut col) = (Vec::with_capacity(parts.len()), 0);
    for (part, saved) in parts.iter().zip(saved) {
        let y = y.narrow(1, col, part.width())?.contiguous()?;
        col += part.width();
        let (Some(adapter), Some(scales)) = (&part.adapter, scales_of(saved)) else {
            outputs.push(y);
            continue;
        };
        let plain = LinearPart {
            weight: &part.linear.weight,
            bias: None,
            low_rank: None,
        };
        let dropped = kernels.linear(&adapter.input(kernels, x)?, &[plain])?;
        outputs.push(kernels.scale_columns(&dropped, &scales.excess(), None, Some(&y))?);
    }
    Tensor::cat(&outputs, 1)
}

/// Returns `c y + b`, side by side; parts without magnitudes stay as they are.
fn scale_outputs(
    kernels: &Kernels,
    parts: &[AdaptedLinear<'_>],
    saved: &LinearsSaved,
    y: &Tensor,
) -> Result<Tensor> {
    let mut biases = Vec::new();
    for (part, saved) in parts.iter().zip(saved) {
        match (scales_of(saved), &part.linear.bias) {
            (Some(_), Some(bias)) => biases.extend(bias.to_vec1::<f32>()?),
            _ => biases.resize(biases.len() + part.width(), 0.0),
        }
    }
    kernels.scale_columns(y, &all_factors(parts, saved), Some(&biases), None)
}

fn all_factors(parts: &[AdaptedLinear<'_>], saved: &LinearsSaved) -> Vec<f32> {
    let mut factors = Vec::new();
    for (part, saved) in parts.iter().zip(saved) {
        match scales_of(saved) {
            Some(scales) => factors.extend_from_slice(&scales.factors),
            None => factors.resize(factors.len() + part.width(), 1.0),
        }
    }
    factors
}

/// Returns `c dy`, side by side.
pub(super) fn scale_gradient(
    kernels: &Kernels,
    parts: &[AdaptedLinear<'_>],
    saved: &LinearsSaved,
    dy: &Tensor,
) -> Result<Tensor> {
    if saved.iter().all(|saved| scales_of(saved).is_none()) {
        return Ok(dy.clone());
    }
    kernels.scale_columns(dy, &all_factors(parts, saved), None, None)
}

/// Adds the gradient of one linear's magnitudes, `Σ dy z' / n`, to the flat buffer.
pub(super) fn magnitude_gradient(
    kernels: &Kernels,
    part: &AdaptedLinear<'_>,
    saved: &AdapterSaved,
    (x, dy): (&Tensor, &Tensor),
    gradients: &mut [f32],
) -> Result<()> {
    let (Some(adapter), Some(scales)) = (&part.adapter, &saved.dora) else {
        return Ok(());
    };
    let Some(offset) = adapter.offsets.magnitude else {
        return Ok(());
    };
    let b = adapter.b.t()?;
    let linear = LinearPart {
        weight: &part.linear.weight,
        bias: None,
        low_rank: Some(LowRank { x: &saved.u, w: &b }),
    };
    let z = kernels.linear(&adapter.input(kernels, x)?, &[linear])?;
    let mut dots = kernels.column_dots(&dy.contiguous()?, Some(&z))?;
    for (dot, norm) in dots.iter_mut().zip(&scales.norms) {
        *dot /= norm;
    }
    add_values(gradients, offset, &dots);
    Ok(())
}

/// Returns what reaches a linear's input through its dropout: `(c - 1) dy W + du A`, with the
/// linear's columns of `dy` and `c dy`.
pub(super) fn dropped_gradient(
    kernels: &Kernels,
    part: &AdaptedLinear<'_>,
    (dy, scaled_dy): (&Tensor, &Tensor),
    (col, width): (usize, usize),
    du: &Tensor,
) -> Result<Tensor> {
    let low_rank = part.adapter.as_ref().map(|adapter| LowRank {
        x: du,
        w: &adapter.a,
    });
    let linear = LinearPart {
        weight: &part.linear.weight,
        bias: None,
        low_rank,
    };
    let excess = (scaled_dy.narrow(1, col, width)? - dy.narrow(1, col, width)?)?;
    kernels.linear_backward(&excess, &[linear])
}
