//! A model of random weights, for measuring how fast one of its shape would be (`--load-format
//! dummy`): of the weights' directory nothing but `config.json` is read.

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use candle_core::quantized::GgmlDType;
use half::f16;
use serde_json::Value;

use super::directory::read_json;
use super::{ModelSource, StoredTensor, TensorInfo, TensorSource, WeightsError};

/// Weights are uniform in plus or minus this, as vLLM's dummy weights: sums stay small.
const SPREAD: f32 = 1e-3;

/// Elements after which the random numbers repeat.
const PATTERN: usize = (1 << 20) + 7;

/// Random float16 tensors of given shapes.
pub struct DummyCheckpoint {
    path: PathBuf,
    config: Value,
    tensors: Vec<TensorInfo>,
    by_name: HashMap<String, usize>,
    /// As long as the largest tensor; each begins with it.
    content: Bytes,
}

impl DummyCheckpoint {
    /// Reads `config.json` of the directory `path`.
    ///
    /// # Errors
    /// When there is none or it is no JSON.
    pub fn read_config(path: &Path) -> Result<Value, WeightsError> {
        read_json(&path.join("config.json"))
    }

    /// Reads `generation_config.json` of the directory `path`, if there is one.
    ///
    /// # Errors
    /// When it can not be read or is no JSON.
    pub fn read_generation_config(path: &Path) -> Result<Option<Value>, WeightsError> {
        let file = path.join("generation_config.json");
        file.exists().then(|| read_json(&file)).transpose()
    }

    /// Makes a model of `tensors`, names and shapes.
    pub fn new(path: &Path, config: Value, tensors: Vec<(String, Vec<usize>)>) -> Self {
        let tensors: Vec<TensorInfo> = tensors
            .into_iter()
            .map(|(name, shape)| TensorInfo {
                name,
                dtype: GgmlDType::F16,
                shape,
            })
            .collect();
        let largest = tensors
            .iter()
            .map(TensorInfo::num_elements)
            .max()
            .unwrap_or(0);
        let mut state = 1u64;
        let mut pattern = Vec::with_capacity(2 * PATTERN);
        for _ in 0..PATTERN {
            // Knuth's MMIX generator; its high bits are random enough for weights.
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let uniform = (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
            pattern.extend(f16::from_f32(SPREAD * uniform).to_le_bytes());
        }
        let num_bytes = 2 * largest as usize;
        let mut content = Vec::with_capacity(num_bytes);
        while content.len() < num_bytes {
            content.extend_from_slice(&pattern[..pattern.len().min(num_bytes - content.len())]);
        }
        let names = tensors.iter().enumerate();
        Self {
            by_name: names.map(|(i, tensor)| (tensor.name.clone(), i)).collect(),
            path: path.to_owned(),
            config,
            tensors,
            content: content.into(),
        }
    }
}

impl TensorSource for DummyCheckpoint {
    fn tensors(&self) -> Result<Vec<TensorInfo>, WeightsError> {
        Ok(self.tensors.clone())
    }

    fn tensor(&self, name: &str) -> Result<StoredTensor, WeightsError> {
        let info = self
            .by_name
            .get(name)
            .map(|&i| &self.tensors[i])
            .ok_or_else(|| WeightsError::MissingTensor {
                tensor: name.to_owned(),
                path: self.path.clone(),
            })?;
        Ok(StoredTensor {
            name: info.name.clone(),
            dtype: info.dtype,
            shape: info.shape.clone(),
            data: self.content.slice(..info.size_bytes() as usize),
        })
    }

    fn rows(&self, name: &str, rows: Range<usize>) -> Result<StoredTensor, WeightsError> {
        self.tensor(name)?.narrow(0, rows)
    }
}

impl ModelSource for DummyCheckpoint {
    fn config(&self) -> &Value {
        &self.config
    }

    fn path(&self) -> &Path {
        &self.path
    }

    fn num_parameters(&self) -> u64 {
        self.tensors.iter().map(TensorInfo::num_elements).sum()
    }

    fn size_bytes(&self) -> u64 {
        self.tensors.iter().map(TensorInfo::size_bytes).sum()
    }
}
