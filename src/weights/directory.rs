//! Opens a Hugging Face model directory: configuration, safetensors and their index.

use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
};

use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value;

use super::{
    Checkpoint, Format, TokenizerSource, WeightsError,
    checkpoint::{MappedFile, has_extension},
    gguf_file, safetensors,
};

/// `model.safetensors.index.json`.
#[derive(Deserialize)]
struct Index {
    /// File name by tensor name.
    weight_map: BTreeMap<String, String>,
}

/// Opens the checkpoint in the directory `path`.
///
/// # Errors
/// As [`Checkpoint::open`].
pub(super) fn open(path: &Path) -> Result<Checkpoint, WeightsError> {
    let names = file_names(path)?;
    let has = |name: &str| names.iter().any(|found| found == name);
    if has("adapter_config.json") && !has("config.json") {
        return Err(adapter_only(path)?);
    }
    let shards = shard_names(path, &names)?;
    let ggufs: Vec<&String> = names
        .iter()
        .filter(|name| has_extension(Path::new(name), "gguf"))
        .collect();
    if shards.names.is_empty() && !ggufs.is_empty() {
        return gguf_file::open(&only_gguf(path, &ggufs)?);
    }
    let not_a_checkpoint = |missing| WeightsError::NotACheckpoint {
        path: path.to_owned(),
        missing,
    };
    if shards.names.is_empty() {
        let is_pickle = |name: &String| {
            ["bin", "pt", "pth"]
                .iter()
                .any(|extension| has_extension(Path::new(name), extension))
        };
        return Err(not_a_checkpoint(if names.iter().any(is_pickle) {
            "it has pickled weights (.bin, .pt), which infold does not load: save the model \
             with `save_pretrained(..., safe_serialization=True)`"
        } else {
            "it has neither safetensors nor GGUF files"
        }));
    }
    if !has("config.json") {
        return Err(not_a_checkpoint("config.json is missing"));
    }
    let generation_config = "generation_config.json";
    let mut checkpoint = Checkpoint {
        path: path.to_owned(),
        format: Format::Safetensors,
        config: read_json(&path.join("config.json"))?,
        generation_config: has(generation_config)
            .then(|| read_json(&path.join(generation_config)))
            .transpose()?,
        tokenizer: TokenizerSource::Directory(path.to_owned()),
        files: Vec::new(),
        tensors: BTreeMap::new(),
    };
    for name in &shards.names {
        add_shard(&mut checkpoint, name, shards.index.as_ref())?;
    }
    if let Some(index) = &shards.index {
        check_index(&checkpoint, index)?;
    }
    Ok(checkpoint)
}

/// The safetensors files of a directory, in order, and the index that names them.
struct Shards {
    names: Vec<String>,
    index: Option<Index>,
}

/// The weights, when they are in one file.
pub(super) const SINGLE_FILE: &str = "model.safetensors";
/// Says which file has which tensor, when there are several.
pub(super) const INDEX_FILE: &str = "model.safetensors.index.json";

fn shard_names(path: &Path, names: &[String]) -> Result<Shards, WeightsError> {
    let has = |name: &str| names.iter().any(|found| found == name);
    if has(SINGLE_FILE) {
        return Ok(Shards {
            names: vec![SINGLE_FILE.to_owned()],
            index: None,
        });
    }
    if !has(INDEX_FILE) {
        let names = names.iter().filter(|name| is_shard(name));
        return Ok(Shards {
            names: names.cloned().collect(),
            index: None,
        });
    }
    let index: Index = read_json(&path.join(INDEX_FILE))?;
    let mut shards: Vec<String> = Vec::new();
    for (tensor, shard) in &index.weight_map {
        // Comparing with the listing also refuses names that lead out of the directory.
        if !has(shard) {
            return Err(WeightsError::MissingShard {
                index: path.join(INDEX_FILE),
                tensor: tensor.clone(),
                shard: shard.clone(),
            });
        }
        shards.push(shard.clone());
    }
    shards.sort();
    shards.dedup();
    Ok(Shards {
        names: shards,
        index: Some(index),
    })
}

/// Returns whether a file name is that of weights of the model.
pub(super) fn is_shard(name: &str) -> bool {
    // Mistral's `consolidated*` repeat the weights under other names.
    has_extension(Path::new(name), "safetensors")
        && !name.starts_with("adapter_")
        && !name.starts_with("consolidated")
}

/// Returns the files that the index of the directory `path` names and that are not there.
pub(super) fn missing_shards(path: &Path) -> Result<Vec<String>, WeightsError> {
    let index: Index = read_json(&path.join(INDEX_FILE))?;
    let mut shards: Vec<String> = index.weight_map.into_values().collect();
    shards.sort();
    shards.dedup();
    shards.retain(|shard| !path.join(shard).exists());
    Ok(shards)
}

fn add_shard(
    checkpoint: &mut Checkpoint,
    name: &str,
    index: Option<&Index>,
) -> Result<(), WeightsError> {
    let file = MappedFile::open(&checkpoint.path.join(name))?;
    let number = checkpoint.files.len();
    for (tensor, entry) in safetensors::read_index(&file.path, file.data())? {
        let elsewhere = index
            .and_then(|index| index.weight_map.get(&tensor))
            .is_some_and(|shard| shard != name);
        if elsewhere {
            continue;
        }
        if let Some((first, _)) = checkpoint.tensors.get(&tensor) {
            return Err(WeightsError::DuplicateTensor {
                first: checkpoint.files[*first].path.clone(),
                second: file.path,
                tensor,
            });
        }
        checkpoint.tensors.insert(tensor, (number, entry));
    }
    checkpoint.files.push(file);
    Ok(())
}

/// Checks that every tensor of the index was found where the index says.
fn check_index(checkpoint: &Checkpoint, index: &Index) -> Result<(), WeightsError> {
    let missing = (index.weight_map.iter()).find(|(tensor, _)| !checkpoint.contains(tensor));
    match missing {
        None => Ok(()),
        Some((tensor, shard)) => Err(WeightsError::NotInShard {
            index: checkpoint.path.join(INDEX_FILE),
            tensor: tensor.clone(),
            shard: shard.clone(),
        }),
    }
}

/// Returns the one GGUF file of a directory, the first part if it is split.
fn only_gguf(path: &Path, names: &[&String]) -> Result<std::path::PathBuf, WeightsError> {
    let is_first = |name: &&&String| match gguf_file::split_of(name) {
        Some(split) => split.number == 1,
        None => true,
    };
    match names.iter().filter(is_first).collect::<Vec<_>>()[..] {
        [name] => Ok(path.join(name)),
        _ => Err(WeightsError::SeveralGguf {
            path: path.to_owned(),
            files: names.iter().map(|name| (*name).clone()).collect(),
        }),
    }
}

fn adapter_only(path: &Path) -> Result<WeightsError, WeightsError> {
    let config: HashMap<String, Value> = read_json(&path.join("adapter_config.json"))?;
    let base_model = config.get("base_model_name_or_path");
    Ok(WeightsError::AdapterOnly {
        path: path.to_owned(),
        base_model: base_model
            .and_then(Value::as_str)
            .unwrap_or("an unnamed base model")
            .to_owned(),
    })
}

/// Returns the names of the files in a directory, sorted.
pub(super) fn file_names(path: &Path) -> Result<Vec<String>, WeightsError> {
    let io_error = |source| WeightsError::Io {
        path: path.to_owned(),
        source,
    };
    let mut names = Vec::new();
    for entry in std::fs::read_dir(path).map_err(io_error)? {
        // A name that is not UTF-8 is none that a checkpoint uses.
        if let Ok(name) = entry.map_err(io_error)?.file_name().into_string() {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

pub(super) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, WeightsError> {
    let text = std::fs::read(path).map_err(|source| WeightsError::Io {
        path: path.to_owned(),
        source,
    })?;
    serde_json::from_slice(&text).map_err(|source| WeightsError::Json {
        path: path.to_owned(),
        source,
    })
}
