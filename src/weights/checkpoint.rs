//! Opens a checkpoint (Hugging Face directory or GGUF file) as an index over mapped files.
//!
//! Opening reads headers only; [`Checkpoint::tensor`] hands out bytes of the mapping, so weights
//! are in memory once, in the page cache, however many ranks look at them.

use std::{
    collections::BTreeMap,
    fs::File,
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use memmap2::{Advice, Mmap};
use serde_json::Value;

use super::{
    GgufVocabulary, StoredTensor, WeightsError, directory, gguf, gguf_file,
    gguf_names::RowOrder,
    index::{StoredDtype, TensorEntry},
};

/// The file format of a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// A Hugging Face directory of safetensors.
    Safetensors,
    /// One GGUF file, possibly split into parts.
    Gguf,
}

/// Where the tokenizer of a checkpoint is.
#[derive(Debug, Clone, PartialEq)]
pub enum TokenizerSource {
    /// A directory with `tokenizer.json` and its companions.
    Directory(PathBuf),
    /// The vocabulary that a GGUF file carries.
    Gguf(Box<GgufVocabulary>),
}

/// An opened checkpoint: configuration and index in memory, weights mapped.
#[derive(Debug)]
pub struct Checkpoint {
    pub(super) path: PathBuf,
    pub(super) format: Format,
    pub(super) config: Value,
    pub(super) generation_config: Option<Value>,
    pub(super) tokenizer: TokenizerSource,
    pub(super) files: Vec<MappedFile>,
    /// By Hugging Face name: the file's number and the place in it.
    pub(super) tensors: BTreeMap<String, (usize, TensorEntry)>,
}

impl Checkpoint {
    /// Opens a directory with `config.json` and safetensors, a GGUF file, or a directory with
    /// exactly one GGUF file.
    ///
    /// # Errors
    /// [`WeightsError`], naming the file and the tensor, when something is missing, truncated
    /// or contradicts itself.
    pub fn open(path: &Path) -> Result<Self, WeightsError> {
        let metadata = std::fs::metadata(path).map_err(|source| WeightsError::Io {
            path: path.to_owned(),
            source,
        })?;
        if metadata.is_dir() {
            directory::open(path)
        } else if has_extension(path, "safetensors") {
            Err(WeightsError::NotACheckpoint {
                path: path.to_owned(),
                missing: "a safetensors file alone has no configuration, give its directory",
            })
        } else {
            gguf_file::open(path)
        }
    }

    /// Returns the path of the directory or GGUF file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the file format.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Returns the content of `config.json`; for GGUF the same keys, made from its metadata.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// Returns the content of `generation_config.json`, if the model has one; for GGUF the
    /// tokens that end a generation.
    pub fn generation_config(&self) -> Option<&Value> {
        self.generation_config.as_ref()
    }

    /// Returns where the tokenizer is.
    pub fn tokenizer(&self) -> TokenizerSource {
        self.tokenizer.clone()
    }

    /// Returns the Hugging Face names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Returns whether there is a tensor of that name.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Returns a tensor by its Hugging Face name, also for GGUF.
    ///
    /// The bytes are those of the mapped file; only q and k of a `llama` GGUF are copied, to
    /// undo llama.cpp's interleaving of their rows.
    ///
    /// # Errors
    /// [`WeightsError::MissingTensor`]; [`WeightsError::UnsupportedDtype`] when it is stored in
    /// a type that infold does not read.
    pub fn tensor(&self, name: &str) -> Result<StoredTensor, WeightsError> {
        let (file, entry) = self
            .tensors
            .get(name)
            .ok_or_else(|| WeightsError::MissingTensor {
                path: self.path.clone(),
                tensor: name.to_owned(),
            })?;
        let file = &self.files[*file];
        let dtype = match &entry.dtype {
            StoredDtype::Known(dtype) => *dtype,
            StoredDtype::Other(dtype) => {
                return Err(WeightsError::UnsupportedDtype {
                    path: file.path.clone(),
                    tensor: name.to_owned(),
                    dtype: dtype.clone(),
                    supported: match self.format {
                        Format::Safetensors => "F32, F16 and BF16",
                        Format::Gguf => gguf::SUPPORTED_DTYPES,
                    },
                });
            }
        };
        let tensor = StoredTensor {
            name: name.to_owned(),
            dtype,
            shape: entry.shape.clone(),
            data: file.bytes(&entry.range),
        };
        Ok(match entry.row_order {
            RowOrder::AsStored => tensor,
            order @ RowOrder::Interleaved { .. } => {
                let num_rows = tensor.shape[0];
                tensor.permute_rows(|row| order.stored_row(row, num_rows))
            }
        })
    }

    /// Returns the number of weights.
    pub fn num_parameters(&self) -> u64 {
        self.tensors.values().fold(0, |total: u64, (_, entry)| {
            let elements = (entry.shape.iter())
                .fold(1, |product: u64, &size| product.saturating_mul(size as u64));
            total.saturating_add(elements)
        })
    }

    /// Returns the bytes of all tensors as stored.
    pub fn size_bytes(&self) -> u64 {
        self.tensors
            .values()
            .map(|(_, entry)| entry.range.len() as u64)
            .sum()
    }
}

/// Returns whether the file name ends in `.extension`.
pub(super) fn has_extension(path: &Path, extension: &str) -> bool {
    path.extension()
        .is_some_and(|found| found.eq_ignore_ascii_case(extension))
}

/// A file in memory as long as any tensor of it is.
#[derive(Debug)]
pub(super) struct MappedFile {
    pub(super) path: PathBuf,
    map: Arc<Mmap>,
    bytes: Bytes,
}

/// Lets `Bytes` keep the mapping that this file also needs for its advice.
struct MapOwner(Arc<Mmap>);

impl AsRef<[u8]> for MapOwner {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl MappedFile {
    /// Maps the file read-only.
    pub(super) fn open(path: &Path) -> Result<Self, WeightsError> {
        let io_error = |source| WeightsError::Io {
            path: path.to_owned(),
            source,
        };
        let file = File::open(path).map_err(io_error)?;
        // SAFETY: the mapping is private and read-only. Should another process change or cut
        // the file meanwhile, its bytes change or the process gets SIGBUS, as with every program
        // that maps model files; the bytes are plain numbers for which any value is valid.
        let map = Arc::new(unsafe { Mmap::map(&file) }.map_err(io_error)?);
        Ok(Self {
            path: path.to_owned(),
            bytes: Bytes::from_owner(MapOwner(Arc::clone(&map))),
            map,
        })
    }

    /// Returns the whole content.
    pub(super) fn data(&self) -> &[u8] {
        &self.map
    }

    /// Returns the bytes of a tensor and has the system begin to read them.
    fn bytes(&self, range: &Range<usize>) -> Bytes {
        // Only advice: where the system does not take it, pages come in as they are touched.
        let _ = self
            .map
            .advise_range(Advice::WillNeed, range.start, range.len());
        self.bytes.slice(range.clone())
    }
}
