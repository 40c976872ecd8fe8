//! A checkpoint with all weights as floats: what a GGUF file becomes when it is written as a
//! Hugging Face directory.
//!
//! Blocks are widened by candle's reference code, then rounded once to the dtype asked for.

use std::{borrow::Cow, ops::Range, sync::Arc};

use bytes::Bytes;
use candle_core::{
    Device,
    quantized::{GgmlDType, QStorage, QTensor},
};

use super::{
    Checkpoint, StoredTensor, TensorInfo, TensorSource, WeightsError, convert,
    state_dict_order::sort_as_state_dict,
};

/// A checkpoint whose tensors come out in one float dtype, whatever they are stored in.
#[derive(Debug)]
pub struct DequantizedCheckpoint {
    base: Arc<Checkpoint>,
    dtype: GgmlDType,
}

impl DequantizedCheckpoint {
    /// Wraps a checkpoint; `dtype` is F32, F16 or BF16.
    pub fn new(base: Arc<Checkpoint>, dtype: GgmlDType) -> Self {
        Self { base, dtype }
    }

    fn convert(&self, stored: &StoredTensor) -> Result<StoredTensor, WeightsError> {
        if stored.dtype == self.dtype {
            return Ok(stored.clone());
        }
        let values = match stored.to_f32() {
            Ok(values) => values,
            Err(_) => widen(stored).map_err(|source| WeightsError::Dequantize {
                tensor: stored.name.clone(),
                source: Box::new(source),
            })?,
        };
        let mut data = vec![0; values.len() * self.dtype.type_size()];
        convert::from_f32(self.dtype, &values, &mut data);
        if !convert::content(self.dtype, &data).all_finite {
            return Err(WeightsError::NotFinite {
                tensor: stored.name.clone(),
                dtype: format!("{:?}", self.dtype),
            });
        }
        Ok(StoredTensor {
            name: stored.name.clone(),
            dtype: self.dtype,
            shape: stored.shape.clone(),
            data: Bytes::from(data),
        })
    }
}

impl TensorSource for DequantizedCheckpoint {
    fn tensors(&self) -> Result<Vec<TensorInfo>, WeightsError> {
        let mut tensors = TensorSource::tensors(&*self.base)?;
        for tensor in &mut tensors {
            tensor.dtype = self.dtype;
        }
        sort_as_state_dict(&mut tensors);
        Ok(tensors)
    }

    fn tensor(&self, name: &str) -> Result<StoredTensor, WeightsError> {
        self.convert(&self.base.tensor(name)?)
    }

    fn rows(&self, name: &str, rows: Range<usize>) -> Result<StoredTensor, WeightsError> {
        self.convert(&TensorSource::rows(&*self.base, name, rows)?)
    }
}

/// Returns the weights of quantised blocks.
fn widen(stored: &StoredTensor) -> candle_core::Result<Vec<f32>> {
    // A copy of its own: candle wants the alignment of its block types, which a range of a
    // mapped file does not promise.
    let blocks = Cow::Owned(stored.data.to_vec());
    let storage = QStorage::from_data(blocks, &Device::Cpu, stored.dtype)?;
    let tensor = QTensor::new(storage, stored.shape.clone())?;
    tensor.dequantize(&Device::Cpu)?.flatten_all()?.to_vec1()
}
