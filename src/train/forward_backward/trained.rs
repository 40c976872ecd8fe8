//! The trained parameters of one step, as the kernels read them.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};
use half::{bf16, f16};

use crate::kernels::{Dropout, Kernels};

use super::super::TrainError;
use super::super::lora::LoraLayout;
use super::super::model::FrozenLinear;
use super::super::modules::Module;
use super::StepOptions;
use super::adapted::{Adapter, AdapterOffsets, WholeOffsets};
use super::noise::mix;

/// Adapters and whole modules ready to multiply with: the values of one step.
pub struct LoraTensors<'a> {
    pub(super) layout: &'a LoraLayout,
    /// The adapters' parameters.
    flat: Tensor,
    linears: BTreeMap<Module, FrozenLinear>,
    norms: BTreeMap<Module, Tensor>,
}

/// A norm's weight and where its gradient goes, if it is trained.
pub(super) struct Norm {
    pub(super) weight: Tensor,
    pub(super) offset: Option<usize>,
}

/// Returns values as numbers of a type have them; f32 are the same memory.
fn rounded(params: &Arc<Vec<f32>>, dtype: DType) -> Arc<Vec<f32>> {
    let round: fn(f32) -> f32 = match dtype {
        DType::BF16 => |value| bf16::from_f32(value).to_f32(),
        DType::F16 => |value| f16::from_f32(value).to_f32(),
        _ => return Arc::clone(params),
    };
    Arc::new(params.iter().map(|value| round(*value)).collect())
}

impl<'a> LoraTensors<'a> {
    /// Takes the flat parameters, in the layout's type; modules trained whole share their memory.
    ///
    /// # Errors
    /// When their number is not the layout's.
    pub fn new(
        kernels: &Kernels,
        layout: &'a LoraLayout,
        params: &Arc<Vec<f32>>,
    ) -> std::result::Result<Self, TrainError> {
        let build = || {
            if params.len() != layout.num_params() {
                let (found, want) = (params.len(), layout.num_params());
                candle_core::bail!("{found} trained parameters, expected {want}");
            }
            let params = &rounded(params, layout.options().dtype);
            let adapters = &params[..layout.num_lora_params()];
            let flat = Tensor::from_slice(adapters, adapters.len(), &Device::Cpu)?;
            let mut trained = Self {
                layout,
                flat,
                linears: BTreeMap::new(),
                norms: BTreeMap::new(),
            };
            trained.add_whole(kernels, params)?;
            Ok(trained)
        };
        build().map_err(TrainError::kernel("trained parameters"))
    }

    fn add_whole(&mut self, kernels: &Kernels, params: &Arc<Vec<f32>>) -> Result<()> {
        let vector = |offset: usize, len: usize| {
            Tensor::from_slice(&params[offset..offset + len], len, &Device::Cpu)
        };
        for entry in self.layout.whole() {
            let [rows, cols] = entry.shape[..] else {
                let weight = vector(entry.offset, entry.shape[0])?;
                self.norms.insert(entry.module, weight);
                continue;
            };
            let bias = entry.bias_offset.map(|offset| vector(offset, rows));
            let linear = FrozenLinear {
                weight: kernels.share_matrix(params, entry.offset, [rows, cols])?,
                bias: bias.transpose()?,
            };
            self.linears.insert(entry.module, linear);
        }
        Ok(())
    }

    /// Returns a module's own weights where it is trained whole, else `base`, with the places of
    /// its gradients.
    pub(super) fn whole<'l>(
        &'l self,
        module: Module,
        base: &'l FrozenLinear,
    ) -> (&'l FrozenLinear, Option<WholeOffsets>) {
        let entry = self.layout.whole_entry(module);
        match (entry, self.linears.get(&module)) {
            (Some(entry), Some(linear)) => {
                let offsets = WholeOffsets {
                    weight: entry.offset,
                    bias: entry.bias_offset,
                };
                (linear, Some(offsets))
            }
            _ => (base, None),
        }
    }

    /// Returns a norm's own weight where it is trained, else `base`.
    pub(super) fn norm(&self, module: Module, base: &Tensor) -> Norm {
        let entry = self.layout.whole_entry(module);
        match (entry, self.norms.get(&module)) {
            (Some(entry), Some(weight)) => Norm {
                weight: weight.clone(),
                offset: Some(entry.offset),
            },
            _ => Norm {
                weight: base.clone(),
                offset: None,
            },
        }
    }

    /// Returns the adapter of a linear, if it has one. `site` numbers the linear in the model.
    pub(super) fn adapter(
        &self,
        module: Module,
        site: usize,
        dropout: f32,
        options: &StepOptions,
    ) -> Result<Option<Adapter>> {
        let Some(entry) = self.layout.entry(module) else {
            return Ok(None);
        };
        let (a, b) = self.layout.factors(&self.flat, entry)?;
        let magnitude = entry
            .magnitude_offset
            .map(|offset| self.flat.narrow(0, offset, entry.out_features)?.to_vec1())
            .transpose()?;
        Ok(Some(Adapter {
            a,
            b,
            magnitude,
            scale: self.layout.options().scaling() as f32,
            dropout: (dropout > 0.0).then(|| Dropout {
                probability: dropout,
                key: mix(options.noise_key, site as u64 + 1),
            }),
            offsets: AdapterOffsets {
                a: entry.a_offset,
                b: entry.b_offset,
                magnitude: entry.magnitude_offset,
            },
        }))
    }
}
