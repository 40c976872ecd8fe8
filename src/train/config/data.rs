//! The keys of data, template and tokens.

use std::path::PathBuf;

use super::super::dataset::DataRequest;
use super::{ConfigError, Settings};

/// How the examples of a micro-batch are laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    /// Side by side without padding; attention stays within each example.
    Packed,
    /// One row each, filled up to the longest (`packing: false`).
    Padded,
}

/// Data sets, template and tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct DataConfig {
    /// The data sets, read alike by `train` and `check-data`.
    pub request: DataRequest,
    /// The name of the template; absent means the model's own chat template.
    pub template: Option<String>,
    /// Replaces the template's default system prompt; may be empty.
    pub default_system: Option<String>,
    /// LLaMA-Factory's `enable_thinking`: true unless given, absent for `null`.
    pub enable_thinking: Option<bool>,
    /// Whether thoughts of earlier answers are kept.
    pub preserve_thinking: bool,
    /// Tokens of an example, at most.
    pub cutoff_len: usize,
    /// Whether prompts are learned too.
    pub train_on_prompt: bool,
    /// Whether the last answer alone is learned.
    pub mask_history: bool,
    /// How micro-batches are laid out.
    pub packing: Packing,
    /// Whether examples are visited as they stand.
    pub disable_shuffling: bool,
    /// The seed of the order, if not the run's.
    pub data_seed: Option<u64>,
}

impl DataConfig {
    pub(super) fn from_settings(settings: &Settings) -> Result<Self, ConfigError> {
        let request = request(settings)?;
        let train_on_prompt = settings.bool("train_on_prompt", false)?;
        let mask_history = settings.bool("mask_history", false)?;
        if train_on_prompt && mask_history {
            return Err(ConfigError::Conflict {
                what: "`train_on_prompt` is incompatible with `mask_history`: set one of them"
                    .to_owned(),
            });
        }
        let packed = settings.bool("neat_packing", false)? || settings.bool("packing", true)?;
        // An explicit null is a third value here: thoughts are left as they are.
        let enable_thinking = if settings.is_given("enable_thinking") {
            settings.opt_bool("enable_thinking")?
        } else {
            Some(true)
        };
        Ok(Self {
            request,
            template: settings.opt_text("template")?,
            default_system: settings.opt_whole_text("default_system")?,
            enable_thinking,
            preserve_thinking: settings.bool("preserve_thinking", false)?,
            cutoff_len: settings.whole("cutoff_len", 2048, 1)? as usize,
            train_on_prompt,
            mask_history,
            packing: if packed {
                Packing::Packed
            } else {
                Packing::Padded
            },
            disable_shuffling: settings.bool("disable_shuffling", false)?,
            data_seed: settings.opt_whole("data_seed", 0)?,
        })
    }
}

fn request(settings: &Settings) -> Result<DataRequest, ConfigError> {
    let dataset = settings.list("dataset")?;
    if dataset.is_empty() {
        return Err(ConfigError::Missing {
            key: "dataset",
            advice: "names out of dataset_info.json, or the path of a file, with commas between",
        });
    }
    let dataset_dir = settings.opt_text("dataset_dir")?;
    let dataset_dir = dataset_dir.unwrap_or_else(|| "data".to_owned());
    if dataset_dir == "ONLINE" || dataset_dir.starts_with("REMOTE:") {
        return Err(settings.invalid(
            "dataset_dir",
            "a folder; download the data set and name its file",
        ));
    }
    Ok(DataRequest {
        dataset_dir: PathBuf::from(dataset_dir),
        dataset,
        eval_dataset: settings.list("eval_dataset")?,
        max_samples: settings.opt_whole("max_samples", 1)?.map(|n| n as usize),
        val_size: settings.f64_in("val_size", 0.0, 0.0..=f64::INFINITY)?,
        max_dropped_ratio: settings.f64_in("max_dropped_ratio", 0.5, 0.0..=1.0)?,
        seed: settings.whole("seed", 42, 0)?,
    })
}
