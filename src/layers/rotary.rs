//! Rotary position embedding: the tables of cosines and sines, always computed in f32.
//!
//! Formulas as in transformers' `modeling_rope_utils.py` (default, linear, llama3, yarn); the
//! half-split (NeoX) pairing is applied by the kernel.

use std::f32::consts::PI;

use candle_core::{Device, Result, Tensor};

/// How positions beyond the trained length are squeezed in.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    Default,
    /// Every frequency divided by `factor`.
    Linear {
        /// Ratio of new to trained length.
        factor: f64,
    },
    /// Llama 3's: low frequencies divided by `factor`, high ones kept, smooth between.
    Llama3 {
        /// Divisor of low frequencies.
        factor: f64,
        /// Turns in the trained length below which a frequency is low.
        low_freq_factor: f64,
        /// Turns in the trained length above which a frequency is high.
        high_freq_factor: f64,
        /// Trained length.
        original_max_position_embeddings: usize,
    },
    /// YaRN (arXiv 2309.00071): interpolated below `beta_slow` turns, kept above `beta_fast`.
    Yarn {
        /// Ratio of new to trained length.
        factor: f64,
        /// Turns above which a frequency is kept.
        beta_fast: f64,
        /// Turns below which a frequency is interpolated.
        beta_slow: f64,
        /// Multiplies cosines and sines; computed from `factor` when absent.
        attention_factor: Option<f64>,
        /// DeepSeek's numerator of the attention factor.
        mscale: Option<f64>,
        /// DeepSeek's denominator of the attention factor.
        mscale_all_dim: Option<f64>,
        /// Whether the borders of the ramp are rounded outwards.
        truncate: bool,
        /// Trained length.
        original_max_position_embeddings: usize,
    },
}

/// What a model says about its rotary embedding.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// Base of the frequencies.
    pub theta: f64,
    /// Scaling.
    pub scaling: RopeScaling,
    /// Explicit divisors of the frequencies, `head_dim / 2` of them (GGUF's `rope_freqs`).
    pub freq_factors: Option<Vec<f32>>,
}

/// Cosines and sines of every position.
pub struct RotaryEmbedding {
    cos: Tensor,
    sin: Tensor,
}

impl RotaryEmbedding {
    /// Computes the tables for positions `0..max_positions`.
    ///
    /// # Errors
    /// When explicit divisors are not `head_dim / 2` in number.
    pub fn new(
        config: &RopeConfig,
        head_dim: usize,
        max_positions: usize,
        device: &Device,
    ) -> Result<Self> {
        let (inv_freq, attention_factor) = frequencies(config, head_dim)?;
        let num_values = max_positions * inv_freq.len();
        let (mut cos, mut sin) = (
            Vec::with_capacity(num_values),
            Vec::with_capacity(num_values),
        );
        for position in 0..max_positions {
            for frequency in &inv_freq {
                let (s, c) = (position as f32 * frequency).sin_cos();
                cos.push(c * attention_factor);
                sin.push(s * attention_factor);
            }
        }
        let shape = (max_positions, inv_freq.len());
        Ok(Self {
            cos: Tensor::from_vec(cos, shape, device)?,
            sin: Tensor::from_vec(sin, shape, device)?,
        })
    }

    /// Returns the cosines, f32 `[max_positions, head_dim / 2]`.
    pub fn cos(&self) -> &Tensor {
        &self.cos
    }

    /// Returns the sines, f32 `[max_positions, head_dim / 2]`.
    pub fn sin(&self) -> &Tensor {
        &self.sin
    }
}

/// Returns the `head_dim / 2` angular frequencies (radians a token) and the factor on cos and sin.
fn frequencies(config: &RopeConfig, head_dim: usize) -> Result<(Vec<f32>, f32)> {
    let base = config.theta as f32;
    let plain: Vec<f32> = (0..head_dim / 2)
        .map(|i| 1.0 / base.powf((2 * i) as f32 / head_dim as f32))
        .collect();
    let (mut inv_freq, attention_factor) = match &config.scaling {
        RopeScaling::Default => (plain, 1.0),
        RopeScaling::Linear { factor } => (plain.iter().map(|f| f / *factor as f32).collect(), 1.0),
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } => {
            let bounds = (*low_freq_factor as f32, *high_freq_factor as f32);
            let trained = *original_max_position_embeddings as f32;
            (
                plain
                    .iter()
                    .map(|&f| llama3(f, *factor as f32, bounds, trained))
                    .collect(),
                1.0,
            )
        }
        RopeScaling::Yarn { .. } => yarn(&config.scaling, &plain, config.theta, head_dim),
    };
    if let Some(factors) = &config.freq_factors {
        if factors.len() != inv_freq.len() {
            candle_core::bail!(
                "{} rope frequency factors, expected {}",
                factors.len(),
                inv_freq.len()
            );
        }
        for (frequency, factor) in inv_freq.iter_mut().zip(factors) {
            *frequency /= factor;
        }
    }
    Ok((inv_freq, attention_factor))
}

fn llama3(frequency: f32, factor: f32, (low, high): (f32, f32), trained: f32) -> f32 {
    let wavelength = 2.0 * PI / frequency;
    if wavelength > trained / low {
        return frequency / factor;
    }
    if wavelength < trained / high {
        return frequency;
    }
    let smooth = (trained / wavelength - low) / (high - low);
    (1.0 - smooth) * frequency / factor + smooth * frequency
}

fn yarn(scaling: &RopeScaling, plain: &[f32], theta: f64, head_dim: usize) -> (Vec<f32>, f32) {
    let RopeScaling::Yarn {
        factor,
        beta_fast,
        beta_slow,
        attention_factor,
        mscale,
        mscale_all_dim,
        truncate,
        original_max_position_embeddings,
    } = scaling
    else {
        return (plain.to_vec(), 1.0);
    };
    // mscale(s, m) = 0.1 · m · ln s + 1, and 1 where nothing is stretched.
    let scale_of = |m: f64| {
        if *factor <= 1.0 {
            1.0
        } else {
            0.1 * m * factor.ln() + 1.0
        }
    };
    let attention_factor = attention_factor.unwrap_or_else(|| match (mscale, mscale_all_dim) {
        (Some(m), Some(all)) if *m != 0.0 && *all != 0.0 => scale_of(*m) / scale_of(*all),
        _ => scale_of(1.0),
    });
    // The pair index that makes `turns` turns within the trained length:
    // theta^(2i/d) · 2π · turns = trained  ⇔  i = d · ln(trained / (2π · turns)) / (2 · ln theta).
    let trained = *original_max_position_embeddings as f64;
    let index_of = |turns: f64| {
        head_dim as f64 * (trained / (turns * 2.0 * std::f64::consts::PI)).ln() / (2.0 * theta.ln())
    };
    let (mut low, mut high) = (index_of(*beta_fast), index_of(*beta_slow));
    if *truncate {
        (low, high) = (low.floor(), high.ceil());
    }
    let low = low.max(0.0) as f32;
    let mut high = high.min(head_dim as f64 - 1.0) as f32;
    if low == high {
        // As in transformers: a ramp of no width would divide by zero.
        high += 0.001;
    }
    let inv_freq = plain.iter().enumerate().map(|(i, &frequency)| {
        let kept = 1.0 - ((i as f32 - low) / (high - low)).clamp(0.0, 1.0);
        frequency / *factor as f32 * (1.0 - kept) + frequency * kept
    });
    (inv_freq.collect(), attention_factor as f32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(scaling: RopeScaling) -> RopeConfig {
        RopeConfig {
            theta: 10_000.0,
            scaling,
            freq_factors: None,
        }
    }

    #[test]
    fn linear_scaling_divides_every_frequency() {
        let (plain, _) = frequencies(&config(RopeScaling::Default), 8).unwrap();
        let (scaled, _) = frequencies(&config(RopeScaling::Linear { factor: 4.0 }), 8).unwrap();
        for (plain, scaled) in plain.iter().zip(scaled) {
            assert!((plain / 4.0 - scaled).abs() < 1e-9);
        }
    }

    #[test]
    fn llama3_keeps_high_and_divides_low_frequencies() {
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 64,
        };
        let (plain, _) = frequencies(&config(RopeScaling::Default), 16).unwrap();
        let (scaled, _) = frequencies(&config(scaling), 16).unwrap();
        assert_eq!(plain[0], scaled[0]);
        assert_eq!(plain[7] / 8.0, scaled[7]);
    }

    #[test]
    fn explicit_factors_of_another_length_are_refused() {
        let config = RopeConfig {
            freq_factors: Some(vec![1.0; 3]),
            ..config(RopeScaling::Default)
        };
        let error = frequencies(&config, 8).unwrap_err().to_string();
        assert!(
            error.contains("3 rope frequency factors, expected 4"),
            "{error}"
        );
    }
}
