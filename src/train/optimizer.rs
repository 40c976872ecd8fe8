//! AdamW over flat buffers, clipping by the global norm, and the loss scale of fp16.
//!
//! Arithmetic is torch's `AdamW` (single tensor, f32): the decay first, then
//! `w -= lr / (1 - β1^t) * m / (sqrt(v / (1 - β2^t)) + ε)`.

use std::ops::Range;

use super::TrainError;
use super::lora::{LoraLayout, Role};

/// The numbers of the optimizer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWOptions {
    /// `adam_beta1`.
    pub beta1: f64,
    /// `adam_beta2`.
    pub beta2: f64,
    /// `adam_epsilon`.
    pub epsilon: f64,
    /// `weight_decay`, decoupled.
    pub weight_decay: f64,
    /// `max_grad_norm`; 0 for no clipping.
    pub max_grad_norm: f64,
    /// `loraplus_lr_ratio`: the learning rate of every B over that of A; 1 for plain LoRA.
    pub loraplus_lr_ratio: f64,
}

impl Default for AdamWOptions {
    /// Returns Hugging Face's defaults.
    fn default() -> Self {
        Self {
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.0,
            max_grad_norm: 1.0,
            loraplus_lr_ratio: 1.0,
        }
    }
}

/// The optimizer's states for one part of the flat parameters.
pub struct AdamW {
    options: AdamWOptions,
    /// The part of the parameters that this rank updates.
    range: Range<usize>,
    /// First and second moments of the part.
    pub(super) exp_avg: Vec<f32>,
    pub(super) exp_avg_sq: Vec<f32>,
    /// Updates made.
    pub(super) num_updates: u64,
    groups: Vec<Group>,
}

/// A piece of the part that is updated alike.
struct Group {
    range: Range<usize>,
    /// Factor of the learning rate.
    rate_factor: f64,
    weight_decay: f64,
}

impl AdamW {
    /// Returns fresh states for parameters `range`.
    pub fn new(options: AdamWOptions, layout: &LoraLayout, range: Range<usize>) -> Self {
        let clip = |piece: Range<usize>| {
            piece.start.clamp(range.start, range.end)..piece.end.clamp(range.start, range.end)
        };
        let mut end = 0;
        let groups = layout.tensors().into_iter().map(|tensor| {
            let start = end;
            end += tensor.len();
            // As LLaMA-Factory sorts them for LoRA+: B and all vectors are fast.
            let is_slow = matches!(tensor.role, Role::A | Role::Weight);
            Group {
                range: clip(start..end),
                rate_factor: if is_slow {
                    1.0
                } else {
                    options.loraplus_lr_ratio
                },
                weight_decay: match tensor.role {
                    // As Hugging Face's trainer: norms and biases do not decay.
                    Role::Vector => 0.0,
                    _ => options.weight_decay,
                },
            }
        });
        Self {
            options,
            exp_avg: vec![0.0; range.len()],
            exp_avg_sq: vec![0.0; range.len()],
            num_updates: 0,
            groups: groups.filter(|group| !group.range.is_empty()).collect(),
            range,
        }
    }

    /// Updates `params` (the part) with its gradients.
    ///
    /// # Panics
    ///
    /// When either has another length than the part.
    pub fn step(&mut self, params: &mut [f32], gradients: &[f32], learning_rate: f64) {
        assert_eq!(params.len(), self.range.len(), "parameters of the part");
        assert_eq!(gradients.len(), self.range.len(), "gradients of the part");
        self.num_updates += 1;
        let AdamWOptions {
            beta1,
            beta2,
            epsilon,
            ..
        } = self.options;
        let exponent = self.num_updates.min(i32::MAX as u64) as i32;
        let correction1 = 1.0 - beta1.powi(exponent);
        let root2 = ((1.0 - beta2.powi(exponent)).sqrt()) as f32;
        let (beta2, keep1, keep2) = (beta2 as f32, (1.0 - beta1) as f32, (1.0 - beta2) as f32);
        let epsilon = epsilon as f32;
        for group in &self.groups {
            let learning_rate = learning_rate * group.rate_factor;
            let decay = (1.0 - learning_rate * group.weight_decay) as f32;
            let step_size = (learning_rate / correction1) as f32;
            let first = self.range.start;
            let part = group.range.start - first..group.range.end - first;
            let values = params[part.clone()]
                .iter_mut()
                .zip(&gradients[part.clone()]);
            let moments = self.exp_avg[part.clone()]
                .iter_mut()
                .zip(&mut self.exp_avg_sq[part]);
            for ((w, g), (m, v)) in values.zip(moments) {
                *w *= decay;
                *m += keep1 * (g - *m);
                *v = *v * beta2 + keep2 * g * g;
                *w -= step_size * (*m / (v.sqrt() / root2 + epsilon));
            }
        }
    }
}

/// Returns the factor that brings gradients of norm `norm` to at most `max_grad_norm`, 1 where
/// they are or where clipping is off.
pub fn clip_coefficient(norm: f64, max_grad_norm: f64) -> f32 {
    if max_grad_norm <= 0.0 {
        return 1.0;
    }
    // The small number is torch's `clip_grad_norm_`.
    (max_grad_norm / (norm + 1e-6)).min(1.0) as f32
}

/// The numbers of DeepSpeed's `fp16` block.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LossScaleOptions {
    /// The scale at the start: 2^`initial_scale_power`, or `loss_scale`.
    pub initial_scale: f64,
    /// Whether the scale adapts: `loss_scale` is 0.
    pub is_dynamic: bool,
    /// Updates without overflow before the scale doubles.
    pub loss_scale_window: u64,
    /// Overflows before the scale halves; counted anew when it doubles.
    pub hysteresis: u64,
    /// Whether overflows are counted anew at every update that is applied.
    pub consecutive_hysteresis: bool,
    /// The scale never falls below.
    pub min_loss_scale: f64,
}

impl Default for LossScaleOptions {
    /// Returns what `loss_scale: 0` means in the reference's `ds_config` files.
    fn default() -> Self {
        Self {
            initial_scale: 65_536.0,
            is_dynamic: true,
            loss_scale_window: 1000,
            hysteresis: 2,
            consecutive_hysteresis: false,
            min_loss_scale: 1.0,
        }
    }
}

impl LossScaleOptions {
    /// Returns torch's `GradScaler`, which fp16 has without DeepSpeed: every overflow halves the
    /// scale. Torch has no smallest scale and goes on for ever; here 1 is the smallest.
    pub fn torch() -> Self {
        Self {
            loss_scale_window: 2000,
            hysteresis: 1,
            ..Self::default()
        }
    }
}

/// The loss scale of fp16 (DeepSpeed's `LossScaler` and `DynamicLossScaler`).
#[derive(Debug, Clone, PartialEq)]
pub struct LossScaler {
    options: LossScaleOptions,
    pub(super) scale: f64,
    pub(super) num_updates: u64,
    pub(super) last_overflow: Option<u64>,
    pub(super) hysteresis_left: u64,
}

impl LossScaler {
    /// Returns the scaler of a fresh run.
    pub fn new(options: LossScaleOptions) -> Self {
        Self {
            scale: options.initial_scale,
            num_updates: 0,
            last_overflow: None,
            hysteresis_left: options.hysteresis,
            options,
        }
    }

    /// Returns the factor of the loss.
    pub fn scale(&self) -> f64 {
        self.scale
    }

    /// Takes note of an update whose gradients overflowed, which is then skipped.
    ///
    /// # Errors
    /// [`TrainError::LossScale`] when the scale can not fall any more.
    pub fn overflowed(&mut self, step: u64) -> Result<(), TrainError> {
        let min_loss_scale = self.options.min_loss_scale;
        if !self.options.is_dynamic {
            return Ok(());
        }
        if self.hysteresis_left > 1 {
            self.hysteresis_left -= 1;
        } else if self.scale <= min_loss_scale {
            return Err(TrainError::LossScale {
                min_loss_scale,
                step,
            });
        } else {
            self.scale = (self.scale / 2.0).max(min_loss_scale);
        }
        self.last_overflow = Some(self.num_updates);
        self.num_updates += 1;
        Ok(())
    }

    /// Takes note of an update that was applied.
    pub fn applied(&mut self) {
        if !self.options.is_dynamic {
            return;
        }
        if self.options.consecutive_hysteresis {
            self.hysteresis_left = self.options.hysteresis;
        }
        let since = match self.last_overflow {
            Some(last) => self.num_updates - last,
            None => self.num_updates + 1,
        };
        if since.is_multiple_of(self.options.loss_scale_window) {
            self.hysteresis_left = self.options.hysteresis;
            self.scale *= 2.0;
        }
        self.num_updates += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clipping_is_torchs() {
        assert_eq!(clip_coefficient(4.0, 1.0), (1.0f64 / 4.000_001) as f32);
        assert_eq!(clip_coefficient(0.5, 1.0), 1.0);
        assert_eq!(clip_coefficient(4.0, 0.0), 1.0);
    }

    #[test]
    fn the_loss_scale_halves_after_two_overflows_and_doubles_after_a_window() {
        let mut scaler = LossScaler::new(LossScaleOptions {
            loss_scale_window: 3,
            ..LossScaleOptions::default()
        });
        scaler.overflowed(1).unwrap();
        assert_eq!(scaler.scale(), 65_536.0);
        scaler.overflowed(2).unwrap();
        assert_eq!(scaler.scale(), 32_768.0);
        scaler.overflowed(3).unwrap();
        assert_eq!(scaler.scale(), 16_384.0);
        for _ in 0..2 {
            scaler.applied();
        }
        assert_eq!(scaler.scale(), 16_384.0);
        scaler.applied();
        assert_eq!(scaler.scale(), 32_768.0);
    }

    #[test]
    fn a_loss_scale_at_its_minimum_ends_the_run() {
        let mut scaler = LossScaler::new(LossScaleOptions {
            initial_scale: 2.0,
            hysteresis: 1,
            ..LossScaleOptions::default()
        });
        scaler.overflowed(1).unwrap();
        let error = scaler.overflowed(2).unwrap_err().to_string();
        assert!(
            error.contains("minimum 1") && error.contains("step 2"),
            "{error}"
        );
    }
}
