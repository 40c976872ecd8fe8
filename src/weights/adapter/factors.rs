//! The factors of the deltas of a tensor in f32, as the arithmetic in [`fold`](super::fold) wants
//! them.

use std::{
    ops::Range,
    sync::{Arc, PoisonError},
};

use candle_core::quantized::GgmlDType;

use super::{
    fold::{Block, LowRank, NotFinite},
    keys::Part,
    merged::{Accumulate, Delta, Layout, MergedCheckpoint, Recipe, not_finite, values},
    simd,
};
use crate::weights::{WeightsError, convert};

/// Rows of a weight that are measured at a time.
const MEASURED_ROWS: usize = 4096;

/// The right factor of each delta of a tensor.
pub(super) type RightFactors = Arc<[Arc<Vec<f32>>]>;

impl MergedCheckpoint {
    /// Finds the factors of columns where DoRA goes by them: `m / ‖column of W + Δ‖`.
    pub(super) fn measure_columns(&mut self) -> Result<(), WeightsError> {
        for index in 0..self.recipes.len() {
            let recipe = &self.recipes[index];
            let by_columns = |delta: &Delta| {
                matches!(delta.layout, Layout::Embedding | Layout::Transposed)
                    && self.adapters[delta.adapter].config().dora
            };
            let Some(position) = recipe.deltas.iter().position(by_columns) else {
                continue;
            };
            let delta = &recipe.deltas[position];
            let right = self.right_factor(delta)?;
            let magnitude = values(&self.part(delta.adapter, &delta.module, Part::Magnitude)?);
            let mut squares = vec![0.0_f32; magnitude.len()];
            let rows = recipe.info.shape[0];
            for start in (0..rows).step_by(MEASURED_ROWS) {
                let rows = start..(start + MEASURED_ROWS).min(rows);
                let origin = self.origin_rows(recipe, rows.clone())?;
                let sum = Block {
                    weight: &origin,
                    from: recipe.base_dtype,
                    to: GgmlDType::F32,
                    cols: magnitude.len(),
                    deltas: vec![self.low_rank(delta, &right, &rows)?],
                    accumulate: Accumulate::Fp32,
                };
                let (sum, _) = sum.fold().map_err(|NotFinite| not_finite(&recipe.info))?;
                for row in convert::values(GgmlDType::F32, &sum).chunks(magnitude.len()) {
                    simd::add_squares(&mut squares, row);
                }
            }
            let factors = (magnitude.iter().zip(&squares))
                .map(|(magnitude, square)| magnitude / square.sqrt())
                .collect();
            self.recipes[index].deltas[position].column_factors = Some(factors);
        }
        Ok(())
    }

    /// Returns the right factors of a tensor's deltas, made once for all its blocks.
    pub(super) fn right_factors(&self, recipe: &Recipe) -> Result<RightFactors, WeightsError> {
        let last = (self.right_factors.lock()).unwrap_or_else(PoisonError::into_inner);
        if let Some((name, factors)) = &*last
            && *name == recipe.info.name
        {
            return Ok(Arc::clone(factors));
        }
        drop(last);
        let factors: RightFactors = (recipe.deltas.iter())
            .map(|delta| self.right_factor(delta))
            .collect::<Result<_, _>>()?;
        let mut last = (self.right_factors.lock()).unwrap_or_else(PoisonError::into_inner);
        *last = Some((recipe.info.name.clone(), Arc::clone(&factors)));
        Ok(factors)
    }

    /// Returns `R` of a delta, `[rank, columns of the weight]`.
    fn right_factor(&self, delta: &Delta) -> Result<Arc<Vec<f32>>, WeightsError> {
        let part = |part| self.part(delta.adapter, &delta.module, part);
        let right = match delta.layout {
            Layout::Linear => values(&part(Part::A)?),
            Layout::Transposed | Layout::Embedding => {
                let b = part(match delta.layout {
                    Layout::Embedding => Part::EmbeddingB,
                    _ => Part::B,
                })?;
                convert::transpose(&values(&b), b.shape[0], b.shape[1])
            }
            Layout::Bias => vec![1.0],
        };
        Ok(Arc::new(right))
    }

    /// Returns the factors of a delta for some rows of the weight.
    pub(super) fn low_rank(
        &self,
        delta: &Delta,
        right: &Arc<Vec<f32>>,
        rows: &Range<usize>,
    ) -> Result<LowRank, WeightsError> {
        let part = |part| self.part(delta.adapter, &delta.module, part);
        let (left, rank) = match delta.layout {
            Layout::Linear => {
                let b = part(Part::B)?.narrow(0, rows.clone())?;
                (values(&b), b.shape[1])
            }
            Layout::Transposed | Layout::Embedding => {
                let a = part(match delta.layout {
                    Layout::Embedding => Part::EmbeddingA,
                    _ => Part::A,
                })?;
                let a = a.narrow(1, rows.clone())?;
                (
                    convert::transpose(&values(&a), a.shape[0], rows.len()),
                    a.shape[0],
                )
            }
            Layout::Bias => {
                let bias = part(Part::BiasOfB)?.narrow(0, rows.clone())?;
                (values(&bias), 1)
            }
        };
        let magnitude = match delta.layout {
            Layout::Linear if self.adapters[delta.adapter].config().dora => {
                Some(values(&part(Part::Magnitude)?.narrow(0, rows.clone())?))
            }
            _ => None,
        };
        Ok(LowRank {
            left,
            right: Arc::clone(right),
            rank,
            scale: delta.scale,
            weight: delta.weight,
            magnitude,
            column_factors: delta.column_factors.clone(),
        })
    }
}
