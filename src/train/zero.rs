//! What data-parallel ranks divide among them: ZeRO (Rajbhandari et al., arXiv:1910.02054).
//!
//! Stage 1 divides the optimizer's moments, stage 2 the reduced gradients too, stage 3 the layers
//! of the frozen base too (`sharded`). Sums run in rank order and the norm over the same pieces
//! at every stage, so that all stages give the same bits.

use std::ops::Range;
use std::sync::Arc;

use candle_core::Result;

use crate::distributed::Comm;

use super::lora::LoraLayout;
use super::optimizer::{AdamW, AdamWOptions, clip_coefficient};

/// From here on a number rounds to infinity in f16.
const F16_OVERFLOW: f32 = 65_520.0;

/// What the ranks divide.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ZeroStage {
    /// Nothing: every rank holds everything.
    Zero,
    /// The moments of the optimizer.
    One,
    /// The reduced gradients too.
    Two,
    /// The frozen base too.
    Three,
}

/// Returns the piece of `len` elements that belongs to `rank`; the last may be shorter.
pub(super) fn piece(len: usize, rank: usize, world_size: usize) -> Range<usize> {
    let size = len.div_ceil(world_size);
    (rank * size).min(len)..((rank + 1) * size).min(len)
}

/// The trainable parameters of one rank with what updates them.
pub(super) struct Trainable {
    stage: ZeroStage,
    /// All parameters.
    pub(super) params: Arc<Vec<f32>>,
    pub(super) adamw: AdamW,
    /// What this rank updates.
    range: Range<usize>,
    options: AdamWOptions,
}

/// Reduced gradients: all of them, or this rank's piece.
pub(super) struct Reduced {
    values: Vec<f32>,
    /// Norm of all of them.
    pub(super) norm: f64,
    /// Whether one of them, before `scale`, is beyond the range of f16.
    pub(super) overflows_f16: bool,
}

impl Trainable {
    pub(super) fn new(
        stage: ZeroStage,
        comm: &Comm,
        layout: &LoraLayout,
        params: Vec<f32>,
        options: AdamWOptions,
    ) -> Self {
        let range = match stage {
            ZeroStage::Zero => 0..params.len(),
            _ => piece(params.len(), comm.rank(), comm.world_size()),
        };
        Self {
            stage,
            params: Arc::new(params),
            adamw: AdamW::new(options, layout, range.clone()),
            range,
            options,
        }
    }

    /// Adds the ranks' gradients, multiplied by `scale`, and returns what this rank needs of
    /// them.
    pub(super) fn reduce(&self, comm: &Comm, gradients: Vec<f32>, scale: f32) -> Result<Reduced> {
        let mut values = match self.stage {
            ZeroStage::Zero | ZeroStage::One => comm.all_reduce_values(gradients)?,
            ZeroStage::Two | ZeroStage::Three => {
                comm.reduce_scatter(gradients, self.range.clone())?
            }
        };
        let is_beyond = |value: &f32| value.is_nan() || value.abs() >= F16_OVERFLOW;
        let beyond = values.iter().any(is_beyond);
        let beyond = comm.all_reduce_f64(&[f64::from(u8::from(beyond))])?;
        if scale != 1.0 {
            values.iter_mut().for_each(|value| *value *= scale);
        }
        let norm = self.norm(comm, &values)?;
        Ok(Reduced {
            values,
            norm,
            overflows_f16: beyond[0] > 0.0,
        })
    }

    fn norm(&self, comm: &Comm, values: &[f32]) -> Result<f64> {
        let squares =
            |values: &[f32]| -> f64 { values.iter().map(|&g| f64::from(g) * f64::from(g)).sum() };
        let sum: f64 = match self.stage {
            ZeroStage::Zero | ZeroStage::One => (0..comm.world_size())
                .map(|rank| squares(&values[piece(values.len(), rank, comm.world_size())]))
                .sum(),
            ZeroStage::Two | ZeroStage::Three => comm.all_reduce_f64(&[squares(values)])?[0],
        };
        Ok(sum.sqrt())
    }

    /// Clips and applies the gradients; every rank then has all new parameters.
    pub(super) fn update(
        &mut self,
        comm: &Comm,
        reduced: Reduced,
        learning_rate: f64,
    ) -> Result<()> {
        let Reduced {
            mut values, norm, ..
        } = reduced;
        let coefficient = clip_coefficient(norm, self.options.max_grad_norm);
        if coefficient != 1.0 {
            values.iter_mut().for_each(|value| *value *= coefficient);
        }
        let part = match values.len() == self.range.len() {
            true => &values[..],
            false => &values[self.range.clone()],
        };
        // Nothing else holds them between two passes, so that nothing is copied here.
        let params = Arc::make_mut(&mut self.params);
        self.adamw
            .step(&mut params[self.range.clone()], part, learning_rate);
        if self.stage != ZeroStage::Zero {
            self.params = Arc::new(comm.all_gather(params[self.range.clone()].to_vec())?);
        }
        Ok(())
    }

    /// Returns all first and second moments, on every rank.
    pub(super) fn gather_moments(&self, comm: &Comm) -> Result<(Vec<f32>, Vec<f32>)> {
        let (first, second) = (self.adamw.exp_avg.clone(), self.adamw.exp_avg_sq.clone());
        match self.stage {
            ZeroStage::Zero => Ok((first, second)),
            _ => Ok((comm.all_gather(first)?, comm.all_gather(second)?)),
        }
    }

    /// Takes this rank's part of all moments.
    pub(super) fn set_moments(&mut self, first: &[f32], second: &[f32], num_updates: u64) {
        self.adamw
            .exp_avg
            .copy_from_slice(&first[self.range.clone()]);
        self.adamw
            .exp_avg_sq
            .copy_from_slice(&second[self.range.clone()]);
        self.adamw.num_updates = num_updates;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_everything_once() {
        for (len, world_size) in [(10, 3), (2, 4), (0, 2), (8, 8)] {
            let pieces = (0..world_size).map(|rank| piece(len, rank, world_size));
            let all: Vec<usize> = pieces.flatten().collect();
            assert_eq!(all, (0..len).collect::<Vec<_>>());
        }
    }
}
