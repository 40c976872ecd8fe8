//! Opens a GGUF file, with its further parts if it is split, as a [`Checkpoint`].

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use candle_core::quantized::GgmlDType;

use super::{
    Checkpoint, Format, TokenizerSource, WeightsError,
    checkpoint::MappedFile,
    gguf,
    gguf_model::{Metadata, TensorFacts},
    index::{StoredDtype, TensorEntry},
    torch_dtype,
};

/// Holds Llama 3's divisors of the rotary frequencies; part of the configuration, not a weight.
const ROPE_FREQS: &str = "rope_freqs.weight";

/// Opens the GGUF file `path`; of a split file any part may be named.
///
/// # Errors
/// As [`Checkpoint::open`].
pub(super) fn open(path: &Path) -> Result<Checkpoint, WeightsError> {
    let paths = part_paths(path);
    let mut files = Vec::new();
    let mut headers = Vec::new();
    for path in &paths {
        let file = MappedFile::open(path)?;
        headers.push(gguf::read_header(path, file.data())?);
        files.push(file);
    }
    let (first, path) = (&headers[0].metadata, paths[0].clone());
    check_split(&path, first, headers.len())?;
    let metadata = Metadata::new(&path, first)?;

    let mut tensors = BTreeMap::new();
    let mut rope_freq_factors = None;
    for (number, header) in headers.iter().enumerate() {
        for (name, entry) in &header.tensors {
            let mut entry = entry.clone();
            if name == ROPE_FREQS {
                rope_freq_factors = Some(floats(&files[number], &entry)?);
                continue;
            }
            let name = metadata.to_hf(name, &mut entry)?;
            if let Some((first, _)) = tensors.get(&name) {
                let first: &usize = first;
                return Err(WeightsError::DuplicateTensor {
                    tensor: name,
                    first: files[*first].path.clone(),
                    second: files[number].path.clone(),
                });
            }
            tensors.insert(name, (number, entry));
        }
    }
    let facts = tensor_facts(&path, &tensors, rope_freq_factors)?;
    Ok(Checkpoint {
        format: Format::Gguf,
        config: metadata.config(&facts)?,
        generation_config: Some(metadata.generation_config()),
        tokenizer: TokenizerSource::Gguf(Box::new(metadata.vocabulary()?)),
        path,
        files,
        tensors,
    })
}

fn tensor_facts(
    path: &Path,
    tensors: &BTreeMap<String, (usize, TensorEntry)>,
    rope_freq_factors: Option<Vec<f32>>,
) -> Result<TensorFacts, WeightsError> {
    let embedding = "model.embed_tokens.weight";
    let (_, embedding) = tensors
        .get(embedding)
        .ok_or_else(|| WeightsError::MissingTensor {
            path: path.to_owned(),
            tensor: embedding.to_owned(),
        })?;
    Ok(TensorFacts {
        vocab_size: embedding.shape.first().copied().unwrap_or(0),
        tie_word_embeddings: !tensors.contains_key("lm_head.weight"),
        torch_dtype: match embedding.dtype {
            StoredDtype::Known(dtype) => torch_dtype(dtype),
            StoredDtype::Other(_) => torch_dtype(GgmlDType::F16),
        },
        rope_freq_factors,
    })
}

/// Reads a small f32 tensor.
fn floats(file: &MappedFile, entry: &TensorEntry) -> Result<Vec<f32>, WeightsError> {
    if entry.dtype != StoredDtype::Known(GgmlDType::F32) {
        return Err(WeightsError::UnsupportedDtype {
            path: file.path.clone(),
            tensor: ROPE_FREQS.to_owned(),
            dtype: format!("{:?}", entry.dtype),
            supported: "F32",
        });
    }
    let (values, _rest) = file.data()[entry.range.clone()].as_chunks::<4>();
    Ok(values
        .iter()
        .map(|&value| f32::from_le_bytes(value))
        .collect())
}

/// A part of a split file, by its name: `model-00002-of-00005.gguf`.
#[derive(Debug, PartialEq)]
pub(super) struct Split<'a> {
    stem: &'a str,
    /// From 1.
    pub(super) number: u32,
    count: u32,
}

/// Reads the name of a split file; `None` for any other.
pub(super) fn split_of(name: &str) -> Option<Split<'_>> {
    let (rest, count) = name.strip_suffix(".gguf")?.rsplit_once("-of-")?;
    let (stem, number) = rest.rsplit_once('-')?;
    let number_of = |text: &str| (text.len() == 5).then(|| text.parse().ok()).flatten();
    let (number, count) = (number_of(number)?, number_of(count)?);
    (1..=count).contains(&number).then_some(Split {
        stem,
        number,
        count,
    })
}

/// Returns the names of all parts of the file that `name` is a part of, or `name` alone.
pub(super) fn all_parts(name: &str) -> Vec<String> {
    let Some(Split { stem, count, .. }) = split_of(name) else {
        return vec![name.to_owned()];
    };
    (1..=count)
        .map(|number| format!("{stem}-{number:05}-of-{count:05}.gguf"))
        .collect()
}

/// Returns the paths of all parts of the file that `path` is a part of, or `path` alone.
fn part_paths(path: &Path) -> Vec<PathBuf> {
    match path.file_name().and_then(|name| name.to_str()) {
        Some(name) if split_of(name).is_some() => (all_parts(name).iter())
            .map(|part| path.with_file_name(part))
            .collect(),
        _ => vec![path.to_owned()],
    }
}

/// Refuses a part of a split file whose name does not lead to the others.
fn check_split(
    path: &Path,
    metadata: &BTreeMap<String, gguf::Value>,
    num_parts: usize,
) -> Result<(), WeightsError> {
    let count = metadata.get("split.count").and_then(gguf::Value::as_u64);
    match count {
        Some(count) if count > 1 && count != num_parts as u64 => Err(WeightsError::GgufMetadata {
            path: path.to_owned(),
            key: "split.count".to_owned(),
            reason: "does not match the file's name (parts are called NAME-00001-of-0000N.gguf)",
        }),
        _ => Ok(()),
    }
}
