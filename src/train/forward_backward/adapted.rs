//! Linears that read the same input, with what is trained of them: forward and backward.
//!
//! With u = s dropout(x) Aᵀ: y = x Wᵀ + b + u Bᵀ. From dy follow dB = dyᵀ u, du = s dy B,
//! dA = duᵀ dropout(x) and dx = dy W + dropout(du A), the mask being that of the forward pass.
//! A linear that is trained whole has dW = dyᵀ x and db = Σ dy. Nothing else has a gradient.
//! With magnitudes (`dora`) dy is first multiplied by their factors.

use candle_core::{Result, Tensor};

use crate::kernels::{Dropout, Kernels, LinearPart, LowRank};

use super::super::model::FrozenLinear;
use super::dora;

/// The adapter of one linear in one micro-batch.
pub(super) struct Adapter {
    /// `[rank, in]`.
    pub(super) a: Tensor,
    /// `[out, rank]`.
    pub(super) b: Tensor,
    /// `[out]`, with DoRA.
    pub(super) magnitude: Option<Vec<f32>>,
    pub(super) scale: f32,
    pub(super) dropout: Option<Dropout>,
    pub(super) offsets: AdapterOffsets,
}

/// Where an adapter's gradients lie in the flat buffer.
#[derive(Debug, Clone, Copy)]
pub(super) struct AdapterOffsets {
    pub(super) a: usize,
    pub(super) b: usize,
    pub(super) magnitude: Option<usize>,
}

/// Where the gradients of a linear that is trained whole lie in the flat buffer.
#[derive(Debug, Clone, Copy)]
pub(super) struct WholeOffsets {
    pub(super) weight: usize,
    pub(super) bias: Option<usize>,
}

/// One linear with what is trained of it.
pub(super) struct AdaptedLinear<'a> {
    pub(super) linear: &'a FrozenLinear,
    pub(super) adapter: Option<Adapter>,
    pub(super) whole: Option<WholeOffsets>,
}

/// Linears side by side.
pub(super) struct AdaptedLinears<'a> {
    pub(super) parts: Vec<AdaptedLinear<'a>>,
}

/// What the backward pass of an adapter needs besides the input.
pub(super) struct AdapterSaved {
    /// `s dropout(x) Aᵀ`, `[tokens, rank]`.
    pub(super) u: Tensor,
    /// With DoRA.
    pub(super) dora: Option<dora::Scales>,
}

/// What the backward pass needs besides the input, one for each part with an adapter.
pub(super) type LinearsSaved = Vec<Option<AdapterSaved>>;

/// Whether the gradient of the input is needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum InputGradient {
    /// Something below is trained.
    Wanted,
    /// Everything below is frozen.
    Skipped,
}

impl Adapter {
    pub(super) fn input(&self, kernels: &Kernels, x: &Tensor) -> Result<Tensor> {
        match self.dropout {
            Some(dropout) => kernels.dropout(x, dropout),
            None => Ok(x.clone()),
        }
    }

    /// Returns `s dropout(x) Aᵀ`.
    pub(super) fn low_rank_input(&self, kernels: &Kernels, x: &Tensor) -> Result<Tensor> {
        let x = self.input(kernels, x)?;
        kernels.product(&x, &self.a.t()?, self.scale)
    }
}

impl<'a> AdaptedLinear<'a> {
    /// Returns the columns of the output.
    pub(super) fn width(&self) -> usize {
        self.linear.weight.rows()
    }

    fn save(&self, kernels: &Kernels, x: &Tensor) -> Result<Option<AdapterSaved>> {
        let Some(adapter) = &self.adapter else {
            return Ok(None);
        };
        Ok(Some(AdapterSaved {
            u: adapter.low_rank_input(kernels, x)?,
            dora: dora::Scales::new(kernels, &self.linear.weight, adapter)?,
        }))
    }
}

impl AdaptedLinears<'_> {
    /// Returns the outputs side by side and what the backward pass needs besides `x`.
    pub(super) fn forward(&self, kernels: &Kernels, x: &Tensor) -> Result<(Tensor, LinearsSaved)> {
        let saved = self.save(kernels, x)?;
        let rights = self.right_factors(kernels, &saved)?;
        let parts = self.parts.iter().zip(saved.iter().zip(&rights));
        let linears: Vec<LinearPart<'_>> = parts
            .map(|(part, (saved, right))| LinearPart {
                weight: &part.linear.weight,
                // With factors on the columns the bias comes after them.
                bias: match dora::scales_all(part, saved.as_ref()) {
                    true => None,
                    false => part.linear.bias.as_ref(),
                },
                low_rank: match (saved, right) {
                    (Some(saved), Some(w)) => Some(LowRank { x: &saved.u, w }),
                    _ => None,
                },
            })
            .collect();
        let y = kernels.linear(x, &linears)?;
        let y = dora::finish(kernels, &self.parts, &saved, (x, y))?;
        Ok((y, saved))
    }

    /// Returns what the backward pass needs besides `x`, without the outputs.
    pub(super) fn save(&self, kernels: &Kernels, x: &Tensor) -> Result<LinearsSaved> {
        let parts = self.parts.iter();
        parts.map(|part| part.save(kernels, x)).collect()
    }

    /// Returns what each `u` is multiplied by: Bᵀ, its columns scaled where magnitudes demand it.
    fn right_factors(
        &self,
        kernels: &Kernels,
        saved: &LinearsSaved,
    ) -> Result<Vec<Option<Tensor>>> {
        let parts = self.parts.iter().zip(saved);
        let right = |(part, saved): (&AdaptedLinear<'_>, &Option<AdapterSaved>)| {
            let (Some(adapter), Some(saved)) = (&part.adapter, saved) else {
                return Ok(None);
            };
            match (&saved.dora, adapter.dropout) {
                (Some(scales), Some(_)) => scales.scaled_right(kernels, adapter).map(Some),
                _ => adapter.b.t().map(Some),
            }
        };
        parts.map(right).collect()
    }

    /// Adds the gradients of what is trained to the flat buffer and returns that of `x`, if
    /// wanted.
    pub(super) fn backward(
        &self,
        kernels: &Kernels,
        (x, saved): (&Tensor, &LinearsSaved),
        dy: &Tensor,
        wanted: InputGradient,
        gradients: &mut [f32],
    ) -> Result<Option<Tensor>> {
        let scaled_dy = dora::scale_gradient(kernels, &self.parts, saved, dy)?;
        let mut dus = Vec::with_capacity(self.parts.len());
        let mut col = 0;
        for (part, saved) in self.parts.iter().zip(saved) {
            let part_dy = dy.narrow(1, col, part.width())?;
            let scaled = scaled_dy.narrow(1, col, part.width())?;
            col += part.width();
            if let Some(offsets) = part.whole {
                whole_gradients(kernels, x, &part_dy, offsets, gradients)?;
            }
            let (Some(adapter), Some(saved)) = (&part.adapter, saved) else {
                dus.push(None);
                continue;
            };
            dora::magnitude_gradient(kernels, part, saved, (x, &part_dy), gradients)?;
            let db = kernels.product(&scaled.t()?, &saved.u, 1.0)?;
            let du = kernels.product(&scaled, &adapter.b, adapter.scale)?;
            // dAᵀ: with the few columns on the right x is read once and not copied.
            let da = kernels.product(&adapter.input(kernels, x)?.t()?, &du, 1.0)?;
            accumulate(gradients, adapter.offsets.a, &da.t()?)?;
            accumulate(gradients, adapter.offsets.b, &db)?;
            dus.push(Some(du));
        }
        if wanted == InputGradient::Skipped {
            return Ok(None);
        }
        self.input_gradient(kernels, saved, (dy, &scaled_dy), &dus)
            .map(Some)
    }

    fn input_gradient(
        &self,
        kernels: &Kernels,
        saved: &LinearsSaved,
        (dy, scaled_dy): (&Tensor, &Tensor),
        dus: &[Option<Tensor>],
    ) -> Result<Tensor> {
        let parts = self.parts.iter().zip(dus);
        let linears: Vec<LinearPart<'_>> = parts
            .map(|(part, du)| LinearPart {
                weight: &part.linear.weight,
                bias: None,
                low_rank: match (&part.adapter, du) {
                    (Some(adapter), Some(x)) if adapter.dropout.is_none() => {
                        Some(LowRank { x, w: &adapter.a })
                    }
                    _ => None,
                },
            })
            .collect();
        let has_dropout = self.parts.iter().any(|part| {
            let adapter = part.adapter.as_ref();
            adapter.is_some_and(|adapter| adapter.dropout.is_some())
        });
        // Under dropout x reaches the weight itself as it is, without the magnitudes' factors.
        let main_dy = if has_dropout { dy } else { scaled_dy };
        let mut dx = kernels.linear_backward(main_dy, &linears)?;
        let mut col = 0;
        for ((part, saved), du) in self.parts.iter().zip(saved).zip(dus) {
            let range = (col, part.width());
            col += part.width();
            let (Some(adapter), Some(saved), Some(du)) = (&part.adapter, saved, du) else {
                continue;
            };
            let Some(dropout) = adapter.dropout else {
                continue;
            };
            let term = match saved.dora {
                None => kernels.product(du, &adapter.a, 1.0)?,
                Some(_) => dora::dropped_gradient(kernels, part, (dy, scaled_dy), range, du)?,
            };
            dx = kernels.add_dropout(&dx, &term, dropout)?;
        }
        Ok(dx)
    }
}

fn whole_gradients(
    kernels: &Kernels,
    x: &Tensor,
    dy: &Tensor,
    offsets: WholeOffsets,
    gradients: &mut [f32],
) -> Result<()> {
    let dw = kernels.product(&dy.t()?, x, 1.0)?;
    accumulate(gradients, offsets.weight, &dw)?;
    if let Some(offset) = offsets.bias {
        let db = kernels.column_dots(&dy.contiguous()?, None)?;
        add_values(gradients, offset, &db);
    }
    Ok(())
}

/// Adds a gradient to its place in the flat buffer.
pub(super) fn accumulate(gradients: &mut [f32], offset: usize, gradient: &Tensor) -> Result<()> {
    let values: Vec<f32> = gradient.flatten_all()?.to_vec1()?;
    add_values(gradients, offset, &values);
    Ok(())
}

/// Adds the values of a gradient to their place in the flat buffer.
pub(super) fn add_values(gradients: &mut [f32], offset: usize, values: &[f32]) {
    for (sum, value) in gradients[offset..].iter_mut().zip(values) {
        *sum += value;
    }
}
