//! A base model with adapters folded in: each tensor is made when it is asked for.

use std::{
    collections::HashMap,
    ops::Range,
    path::Path,
    sync::{Arc, Mutex},
};

use bytes::Bytes;
use candle_core::quantized::GgmlDType;
use serde_json::Value;

use super::{
    Adapter,
    factors::RightFactors,
    fold::{Block, NotFinite},
    keys::Part,
    plan,
    stats::DeltaStats,
    tied,
};
use crate::weights::{
    Checkpoint, ModelSource, StoredTensor, TensorInfo, TensorSource, WeightsError, convert,
};

/// When the sum of several adapters is rounded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Accumulate {
    /// All deltas are summed in f32, and the result is rounded once.
    #[default]
    Fp32,
    /// The weights are rounded to the output's dtype after each adapter, as LLaMA-Factory does.
    LlamaFactory,
}

/// How adapters are folded in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MergeOptions {
    /// When the sum is rounded.
    pub accumulate: Accumulate,
    /// The dtype of all weights, F32, F16 or BF16; `None` keeps each tensor's.
    pub dtype: Option<GgmlDType>,
}

/// Where the values of a tensor come from before anything is added.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Origin {
    /// A tensor of the base.
    Base(String),
    /// A tensor of an adapter that takes its place, in the base's dtype.
    Adapter {
        adapter: usize,
        module: String,
        part: Part,
    },
}

/// How a delta lies on a weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    /// `W [out, in] += s·B·A`.
    Linear,
    /// `W [in, out] += s·(B·A)ᵀ`: GPT-2's layers.
    Transposed,
    /// `E [vocabulary, hidden] += s·(B·A)ᵀ`.
    Embedding,
    /// `b [out] += s·b_B`.
    Bias,
}

/// One thing added to a weight.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Delta {
    pub(super) adapter: usize,
    pub(super) module: String,
    pub(super) layout: Layout,
    /// The adapter's scaling.
    pub(super) scale: f32,
    /// The adapter's weight.
    pub(super) weight: f32,
    /// DoRA on an embedding or a transposed weight: what each column is multiplied by, known
    /// after a pass over it.
    pub(super) column_factors: Option<Vec<f32>>,
}

/// How a tensor of the result is made.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Recipe {
    /// As it comes out.
    pub(super) info: TensorInfo,
    /// The dtype in the base.
    pub(super) base_dtype: GgmlDType,
    pub(super) origin: Origin,
    pub(super) deltas: Vec<Delta>,
    /// The adapter and module whose rows of tokens are put in last.
    pub(super) token_rows: Option<(usize, String)>,
}

impl Recipe {
    /// Returns whether the bytes are those of the base.
    pub(super) fn is_copy(&self) -> bool {
        !self.is_touched() && self.info.dtype == self.base_dtype
    }

    /// Returns whether an adapter has a part in it.
    pub(super) fn is_touched(&self) -> bool {
        !self.deltas.is_empty()
            || self.token_rows.is_some()
            || matches!(self.origin, Origin::Adapter { .. })
    }
}

/// A tensor, or rows of one, and how much the adapters changed it.
#[derive(Debug, Clone)]
pub struct MergedTensor {
    /// The values.
    pub tensor: StoredTensor,
    /// The change, for a tensor that something is added to.
    pub stats: Option<DeltaStats>,
}

/// A base checkpoint with adapters folded in.
#[derive(Debug)]
pub struct MergedCheckpoint {
    pub(super) base: Arc<Checkpoint>,
    pub(super) adapters: Vec<Adapter>,
    pub(super) options: MergeOptions,
    /// In the order of the model's state dict.
    pub(super) recipes: Vec<Recipe>,
    pub(super) by_name: HashMap<String, usize>,
    pub(super) config: Value,
    pub(super) config_changes: Vec<(String, Value)>,
    pub(super) warnings: Vec<String>,
    /// Those of the tensor that was folded last, whose next block needs them again.
    pub(super) right_factors: Mutex<Option<(String, RightFactors)>>,
}

impl MergedCheckpoint {
    /// Plans the merge of `adapters`, each with its weight, into `base`.
    ///
    /// Reads the headers of the base and the whole of the adapters. Without adapters it is the
    /// base, in another dtype if so wished.
    ///
    /// # Errors
    /// [`WeightsError::AdapterFaults`] with every reason why it cannot be done, and what
    /// [`Checkpoint::tensor`] returns for the base.
    pub fn plan(
        base: Arc<Checkpoint>,
        adapters: Vec<(Adapter, f32)>,
        options: MergeOptions,
    ) -> Result<Self, WeightsError> {
        let mut merged = plan::plan(base, adapters, options)?;
        merged.measure_columns()?;
        tied::settle(&mut merged)?;
        Ok(merged)
    }

    /// Returns the base.
    pub fn base(&self) -> &Checkpoint {
        &self.base
    }

    /// Returns the adapters in the order in which they are folded in.
    pub fn adapters(&self) -> &[Adapter] {
        &self.adapters
    }

    /// Returns the keys of `config.json` that differ from the base's, with their new values.
    pub fn config_changes(&self) -> &[(String, Value)] {
        &self.config_changes
    }

    /// Returns what is worth a look though nothing is wrong, one sentence each.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Returns whether an adapter changes the tensor.
    pub fn is_touched(&self, name: &str) -> bool {
        (self.by_name.get(name)).is_some_and(|&recipe| self.recipes[recipe].is_touched())
    }

    /// Makes rows of a tensor; of a vector, elements. Rows of the base are not copied.
    ///
    /// # Errors
    /// No such tensor or rows; [`WeightsError::NotFinite`] when the sum is not a number of the
    /// output's dtype.
    pub fn fold_rows(&self, name: &str, rows: Range<usize>) -> Result<MergedTensor, WeightsError> {
        let recipe = self.recipe(name)?;
        let origin = self.origin_rows(recipe, rows.clone())?;
        let mut shape = recipe.info.shape.clone();
        if let Some(first) = shape.first_mut() {
            *first = rows.len();
        }
        let (data, stats) = if recipe.is_copy() {
            (origin, None)
        } else {
            let size = origin.len() / recipe.base_dtype.type_size() * recipe.info.dtype.type_size();
            let mut data = vec![0; size];
            let stats = self.fold_origin(recipe, &rows, &origin, &mut data)?;
            (data.into(), stats)
        };
        let tensor = StoredTensor {
            name: name.to_owned(),
            dtype: recipe.info.dtype,
            shape,
            data,
        };
        Ok(MergedTensor { tensor, stats })
    }

    /// Makes rows of a tensor as [`fold_rows`](Self::fold_rows) does, into `bytes`; returns the
    /// change, for a tensor that something is added to.
    ///
    /// # Errors
    /// As `fold_rows`.
    ///
    /// # Panics
    /// When `bytes` has not the size of the rows.
    pub fn fold_rows_into(
        &self,
        name: &str,
        rows: Range<usize>,
        bytes: &mut [u8],
    ) -> Result<Option<DeltaStats>, WeightsError> {
        let recipe = self.recipe(name)?;
        let origin = self.origin_rows(recipe, rows.clone())?;
        if recipe.is_copy() {
            bytes.copy_from_slice(&origin);
            return Ok(None);
        }
        self.fold_origin(recipe, &rows, &origin, bytes)
    }

    fn recipe(&self, name: &str) -> Result<&Recipe, WeightsError> {
        match self.by_name.get(name) {
            Some(&recipe) => Ok(&self.recipes[recipe]),
            None => Err(WeightsError::MissingTensor {
                path: self.base.path().to_owned(),
                tensor: name.to_owned(),
            }),
        }
    }

    /// Folds all deltas into rows of the origin.
    fn fold_origin(
        &self,
        recipe: &Recipe,
        rows: &Range<usize>,
        origin: &[u8],
        bytes: &mut [u8],
    ) -> Result<Option<DeltaStats>, WeightsError> {
        let block = Block {
            weight: origin,
            from: recipe.base_dtype,
            to: recipe.info.dtype,
            cols: recipe.info.shape.iter().skip(1).product::<usize>().max(1),
            deltas: (recipe.deltas.iter().zip(&*self.right_factors(recipe)?))
                .map(|(delta, right)| self.low_rank(delta, right, rows))
                .collect::<Result<_, _>>()?,
            accumulate: self.options.accumulate,
        };
        let stats = block
            .fold_into(bytes)
            .map_err(|NotFinite| not_finite(&recipe.info))?;
        if let Some((adapter, module)) = &recipe.token_rows {
            self.put_token_rows(*adapter, module, recipe, rows, bytes)?;
        }
        Ok((!recipe.deltas.is_empty()).then_some(stats))
    }

    /// Returns the rows before anything is added, in the base's dtype.
    pub(super) fn origin_rows(
        &self,
        recipe: &Recipe,
        rows: Range<usize>,
    ) -> Result<Bytes, WeightsError> {
        match &recipe.origin {
            Origin::Base(name) => Ok(self.base.rows(name, rows)?.data),
            Origin::Adapter {
                adapter,
                module,
                part,
            } => {
                let tensor = self.part(*adapter, module, *part)?.narrow(0, rows)?;
                if tensor.dtype == recipe.base_dtype {
                    return Ok(tensor.data);
                }
                let values = convert::values(tensor.dtype, &tensor.data);
                let mut bytes = vec![0; values.len() * recipe.base_dtype.type_size()];
                convert::from_f32(recipe.base_dtype, &values, &mut bytes);
                Ok(bytes.into())
            }
        }
    }

    /// Overwrites the rows of trained tokens.
    fn put_token_rows(
        &self,
        adapter: usize,
        module: &str,
        recipe: &Recipe,
        rows: &Range<usize>,
        data: &mut [u8],
    ) -> Result<(), WeightsError> {
        let tensor = self.part(adapter, module, Part::TokenRows)?;
        let hidden = tensor.shape[1];
        let values = values(&tensor);
        let row_bytes = hidden * recipe.info.dtype.type_size();
        let indices = self.adapters[adapter].config().token_indices_of(module);
        for (row, values) in indices
            .unwrap_or_default()
            .iter()
            .zip(values.chunks(hidden))
        {
            if rows.contains(row) {
                let start = (row - rows.start) * row_bytes;
                let bytes = &mut data[start..start + row_bytes];
                convert::from_f32(recipe.info.dtype, values, bytes);
            }
        }
        Ok(())
    }

    /// Returns a part that the plan found.
    pub(super) fn part(
        &self,
        adapter: usize,
        module: &str,
        part: Part,
    ) -> Result<StoredTensor, WeightsError> {
        let adapter = &self.adapters[adapter];
        adapter
            .part(module, part)?
            .ok_or_else(|| WeightsError::MissingTensor {
                path: adapter.dir().to_owned(),
                tensor: format!("{module} ({part:?})"),
            })
    }
}

impl TensorSource for MergedCheckpoint {
    fn tensors(&self) -> Result<Vec<TensorInfo>, WeightsError> {
        Ok((self.recipes.iter())
            .map(|recipe| recipe.info.clone())
            .collect())
    }

    fn tensor(&self, name: &str) -> Result<StoredTensor, WeightsError> {
        let recipe = self.by_name.get(name).map(|&recipe| &self.recipes[recipe]);
        match recipe {
            Some(recipe) if recipe.is_copy() => match &recipe.origin {
                Origin::Base(origin) => Ok(StoredTensor {
                    name: name.to_owned(),
                    ..self.base.tensor(origin)?
                }),
                Origin::Adapter { .. } => self.rows(name, 0..recipe.info.shape[0]),
            },
            Some(recipe) => self.rows(name, 0..recipe.info.shape[0]),
            None => self.rows(name, 0..0),
        }
    }

    fn rows(&self, name: &str, rows: Range<usize>) -> Result<StoredTensor, WeightsError> {
        Ok(self.fold_rows(name, rows)?.tensor)
    }

    fn read_rows(
        &self,
        name: &str,
        rows: Range<usize>,
        bytes: &mut [u8],
    ) -> Result<(), WeightsError> {
        self.fold_rows_into(name, rows, bytes)?;
        Ok(())
    }
}

impl ModelSource for MergedCheckpoint {
    fn config(&self) -> &Value {
        &self.config
    }

    fn path(&self) -> &Path {
        self.base.path()
    }

    fn num_parameters(&self) -> u64 {
        let infos = self.recipes.iter().map(|recipe| &recipe.info);
        infos.map(TensorInfo::num_elements).sum()
    }

    fn size_bytes(&self) -> u64 {
        let infos = self.recipes.iter().map(|recipe| &recipe.info);
        infos.map(TensorInfo::size_bytes).sum()
    }
}

pub(super) fn not_finite(info: &TensorInfo) -> WeightsError {
    WeightsError::NotFinite {
        tensor: info.name.clone(),
        dtype: format!("{:?}", info.dtype),
    }
}

pub(super) fn values(tensor: &StoredTensor) -> Vec<f32> {
    convert::values(tensor.dtype, &tensor.data)
}
