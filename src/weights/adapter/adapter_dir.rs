//! Opens the directory of a PEFT adapter, and sorts its tensors by module.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use candle_core::quantized::GgmlDType;
use serde_json::Value;

use super::{
    config::AdapterConfig,
    faults::{AdapterFaults, Fault},
    keys::{self, Part},
};
use crate::weights::{
    StoredTensor, WeightsError,
    checkpoint::MappedFile,
    convert,
    directory::file_names,
    index::{StoredDtype, TensorEntry},
    safetensors,
};

/// The name of the configuration in the directory.
pub(in crate::weights) const CONFIG_FILE: &str = "adapter_config.json";
/// The name of the weights in the directory.
pub(in crate::weights) const TENSORS_FILE: &str = "adapter_model.safetensors";

/// A PEFT LoRA adapter: its configuration, and its tensors mapped.
#[derive(Debug)]
pub struct Adapter {
    dir: PathBuf,
    config: AdapterConfig,
    file: MappedFile,
    /// By name in the file.
    tensors: BTreeMap<String, TensorEntry>,
    /// The name in the file by module and part.
    pub(super) parts: BTreeMap<(String, Part), String>,
    /// What is wrong with the file whatever the base is.
    pub(super) faults: Vec<Fault>,
}

/// What a pair `A`, `B` is added to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoraTarget {
    /// `A` is `[r, in]`, `B` is `[out, r]`.
    Linear,
    /// `A` is `[r, vocabulary]`, `B` is `[hidden, r]`; the delta is `(B·A)ᵀ`.
    Embedding,
}

/// The low-rank pair of one module.
#[derive(Debug, Clone)]
pub struct LoraModule {
    /// The module as the base model names it, e.g. `model.layers.0.self_attn.q_proj`.
    pub module: String,
    /// What it is added to.
    pub target: LoraTarget,
    /// `A`, in the dtype in which it is stored.
    pub a: StoredTensor,
    /// `B`, in the dtype in which it is stored.
    pub b: StoredTensor,
    /// The factor of `B·A`, with rank stabilisation and patterns.
    pub scaling: f64,
}

impl Adapter {
    /// Opens `dir`, or `subfolder` in it, also a Trainer's `checkpoint-N`.
    ///
    /// # Errors
    /// [`WeightsError::NotAnAdapter`] saying which file is missing, a damaged file, or
    /// [`WeightsError::AdapterFaults`] for a kind of adapter that cannot be merged.
    pub fn open(dir: &Path, subfolder: Option<&str>) -> Result<Self, WeightsError> {
        let dir = subfolder.map_or_else(|| dir.to_owned(), |subfolder| dir.join(subfolder));
        let names = file_names(&dir)?;
        let has = |name: &str| names.iter().any(|found| found == name);
        let missing = |problem| WeightsError::NotAnAdapter {
            path: dir.clone(),
            problem,
        };
        if !has(CONFIG_FILE) {
            return Err(missing(problem_of(&names)));
        }
        // The configuration first: another kind of adapter also has other files.
        let config = read_config(&dir)?;
        if !has(TENSORS_FILE) {
            return Err(missing(problem_of(&names)));
        }
        let file = MappedFile::open(&dir.join(TENSORS_FILE))?;
        let tensors = safetensors::read_index(&file.path, file.data())?
            .into_iter()
            .collect();
        let mut adapter = Self {
            dir,
            config,
            file,
            tensors,
            parts: BTreeMap::new(),
            faults: Vec::new(),
        };
        adapter.sort_tensors()?;
        Ok(adapter)
    }

    /// Returns the directory that holds the adapter.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Returns the checked `adapter_config.json`.
    pub fn config(&self) -> &AdapterConfig {
        &self.config
    }

    /// Returns every low-rank pair, sorted by module; what else there is, [`has_more`] says.
    ///
    /// [`has_more`]: Self::has_more
    ///
    /// # Errors
    /// A dtype that infold does not read.
    pub fn modules(&self) -> Result<Vec<LoraModule>, WeightsError> {
        let mut modules = Vec::new();
        for (module, part) in self.parts.keys() {
            let (target, b) = match part {
                Part::A => (LoraTarget::Linear, Part::B),
                Part::EmbeddingA => (LoraTarget::Embedding, Part::EmbeddingB),
                _ => continue,
            };
            let (Some(a), Some(b)) = (self.part(module, *part)?, self.part(module, b)?) else {
                continue;
            };
            modules.push(LoraModule {
                scaling: self.config.scaling(module, a.shape[0]),
                module: module.clone(),
                target,
                a,
                b,
            });
        }
        Ok(modules)
    }

    /// Returns the names of the tensors that are not halves of low-rank pairs: replaced weights
    /// and biases, DoRA's magnitudes, rows of tokens.
    pub fn has_more(&self) -> impl Iterator<Item = &str> {
        (self.parts.iter())
            .filter(|((_, part), _)| {
                !matches!(
                    part,
                    Part::A | Part::B | Part::EmbeddingA | Part::EmbeddingB
                )
            })
            .map(|(_, name)| name.as_str())
    }

    /// Returns the tensor that plays a part in a module.
    pub(super) fn part(
        &self,
        module: &str,
        part: Part,
    ) -> Result<Option<StoredTensor>, WeightsError> {
        (self.parts.get(&(module.to_owned(), part)))
            .map(|name| self.tensor(name))
            .transpose()
    }

    /// Returns the tensor of a name in the file.
    fn tensor(&self, name: &str) -> Result<StoredTensor, WeightsError> {
        let entry = &self.tensors[name];
        let dtype = match &entry.dtype {
            StoredDtype::Known(dtype) => *dtype,
            StoredDtype::Other(dtype) => {
                return Err(WeightsError::UnsupportedDtype {
                    path: self.file.path.clone(),
                    tensor: name.to_owned(),
                    dtype: dtype.clone(),
                    supported: "F32, F16 and BF16",
                });
            }
        };
        Ok(StoredTensor {
            name: name.to_owned(),
            dtype,
            shape: entry.shape.clone(),
            data: self.file.bytes(&entry.range),
        })
    }

    /// Finds the part of every tensor, and what is wrong with the values.
    fn sort_tensors(&mut self) -> Result<(), WeightsError> {
        if self.tensors.is_empty() {
            self.faults.push(Fault::NoTensors);
        }
        let mut any_b = false;
        let mut all_zero = true;
        let names: Vec<String> = self.tensors.keys().cloned().collect();
        for name in names {
            let tensor = self.tensor(&name)?;
            if tensor.data.is_empty() {
                self.faults.push(Fault::Empty {
                    tensor: name,
                    shape: tensor.shape,
                });
                continue;
            }
            let content = convert::content(tensor.dtype, &tensor.data);
            if !content.all_finite {
                self.faults.push(Fault::NotFinite {
                    tensor: name.clone(),
                });
            }
            let Some((module, part)) = keys::parse(&name) else {
                self.faults.push(Fault::Unmatched { tensor: name });
                continue;
            };
            if matches!(part, Part::B | Part::EmbeddingB) {
                any_b = true;
            }
            // Replaced weights or rows are a change too, whatever B is.
            all_zero &= content.all_zero || matches!(part, Part::A | Part::EmbeddingA);
            let key = (module.to_owned(), part);
            if let Some(first) = self.parts.insert(key, name.clone()) {
                self.faults.push(Fault::ReplacedTwice {
                    tensor: module.to_owned(),
                    first,
                    second: name,
                });
            }
        }
        if any_b && all_zero {
            self.faults.push(Fault::AllZero);
        }
        Ok(())
    }
}

fn read_config(dir: &Path) -> Result<AdapterConfig, WeightsError> {
    let path = dir.join(CONFIG_FILE);
    let text = std::fs::read(&path).map_err(|source| WeightsError::Io {
        path: path.clone(),
        source,
    })?;
    let json: Value =
        serde_json::from_slice(&text).map_err(|source| WeightsError::Json { path, source })?;
    let faults_of = |faults: Vec<Fault>| AdapterFaults {
        faults: (faults.into_iter())
            .map(|fault| (dir.to_owned(), fault))
            .collect(),
        hints: Vec::new(),
    };
    Ok(AdapterConfig::from_json(json).map_err(faults_of)?)
}

/// Says which file is missing, and what the directory seems to be instead.
fn problem_of(names: &[String]) -> String {
    let has = |name: &str| names.iter().any(|found| found == name);
    if has("adapter_model.bin") || has("adapter_model.pt") {
        "its weights are pickled (adapter_model.bin), which infold does not load: load it with \
         PEFT and save it again with save_pretrained(..., safe_serialization=True)"
            .to_owned()
    } else if let Some(newest) = newest_checkpoint(names) {
        format!("it holds the checkpoints of a training: give one of them, e.g. {newest}")
    } else if has(CONFIG_FILE) {
        format!("{TENSORS_FILE} is missing: the save was interrupted, or the weights lie elsewhere")
    } else if has(TENSORS_FILE) {
        format!("{CONFIG_FILE} is missing: copy it from the training's output directory")
    } else if names.iter().any(|name| name.starts_with("global_step")) {
        format!(
            "it holds DeepSpeed's state alone, {CONFIG_FILE} and {TENSORS_FILE} are missing: \
             gather the weights with its zero_to_fp32.py, or save the adapter from the training"
        )
    } else if has("config.json") {
        format!("it is a whole model, {CONFIG_FILE} is missing: give it as the base model")
    } else {
        format!("{CONFIG_FILE} and {TENSORS_FILE} are missing")
    }
}

/// Returns the `checkpoint-N` with the highest number.
fn newest_checkpoint(names: &[String]) -> Option<&String> {
    let step = |name: &&String| {
        name.strip_prefix("checkpoint-")
            .and_then(|step| step.parse::<u64>().ok())
    };
    names
        .iter()
        .filter(|name| step(name).is_some())
        .max_by_key(step)
}

/// Returns whether weights of this dtype can be folded.
pub(super) fn is_float(dtype: GgmlDType) -> bool {
    matches!(dtype, GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16)
}
