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
    StoredTensor, TensorInfo, WeightsError, directory, gguf, gguf_file,
    gguf_names::RowOrder,
    index::{StoredDtype, TensorEntry},
};
use crate::vocabulary::GgufVocabulary;

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
        let (file, entry) = self.find(name)?;
        let tensor = self.tensor_of(name, file, entry)?;
        file.will_need(&entry.range);
        Ok(match entry.row_order {
            RowOrder::AsStored => tensor,
            order @ RowOrder::Interleaved { .. } => {
                let num_rows = tensor.shape[0];
                tensor.permute_rows(|row| order.stored_row(row, num_rows))
            }
        })
    }

    /// Returns what a tensor is, without a look at its bytes.
    ///
    /// # Errors
    /// As [`tensor`](Self::tensor).
    pub(super) fn info(&self, name: &str) -> Result<TensorInfo, WeightsError> {
        let (file, entry) = self.find(name)?;
        let StoredTensor {
            name, dtype, shape, ..
        } = self.tensor_of(name, file, entry)?;
        Ok(TensorInfo { name, dtype, shape })
    }

    fn find(&self, name: &str) -> Result<(&MappedFile, &TensorEntry), WeightsError> {
        match self.tensors.get(name) {
            Some((file, entry)) => Ok((&self.files[*file], entry)),
            None => Err(WeightsError::MissingTensor {
                path: self.path.clone(),
                tensor: name.to_owned(),
            }),
        }
    }

    /// Returns a tensor with its rows in the order of the file.
    fn tensor_of(
        &self,
        name: &str,
        file: &MappedFile,
        entry: &TensorEntry,
    ) -> Result<StoredTensor, WeightsError> {
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
        Ok(StoredTensor {
            name: name.to_owned(),
            dtype,
            shape: entry.shape.clone(),
            data: file.bytes.slice(entry.range.clone()),
        })
    }

    /// Returns rows of a tensor whose pages leave this process when the rows are dropped, so
    /// that one pass over a model of any size stays small. They remain in the page cache.
    ///
    /// # Errors
    /// As [`tensor`](Self::tensor) and [`StoredTensor::narrow`].
    pub(super) fn passing_rows(
        &self,
        name: &str,
        rows: Range<usize>,
    ) -> Result<StoredTensor, WeightsError> {
        let (file, entry) = self.find(name)?;
        if entry.row_order != RowOrder::AsStored {
            return self.tensor(name)?.narrow(0, rows);
        }
        let tensor = self.tensor_of(name, file, entry)?;
        let passing = tensor.narrow(0, rows)?;
        // Read ahead by as much again, so that the disk works while these rows are.
        let start = passing.data.as_ptr() as usize - file.data().as_ptr() as usize;
        let end = (start + 2 * passing.data.len()).min(entry.range.end);
        file.will_need(&(start..end));
        Ok(StoredTensor {
            data: file.passing(passing.data),
            ..passing
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

/// Bytes of a mapping that are read once.
struct PassingBytes {
    map: Arc<Mmap>,
    bytes: Bytes,
}

impl AsRef<[u8]> for PassingBytes {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for PassingBytes {
    fn drop(&mut self) {
        #[cfg(unix)]
        {
            let start = self.bytes.as_ptr() as usize - self.map.as_ptr() as usize;
            let advice = memmap2::UncheckedAdvice::DontNeed;
            // SAFETY: the mapping is of a file, shared with nobody and never written to. Pages
            // that go come back with the same content when they are touched again.
            let _ = unsafe { (self.map).unchecked_advise_range(advice, start, self.bytes.len()) };
        }
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

    /// Wraps bytes of the mapping so that their pages are let go with them.
    fn passing(&self, bytes: Bytes) -> Bytes {
        Bytes::from_owner(PassingBytes {
            map: Arc::clone(&self.map),
            bytes,
        })
    }

    /// Has the system begin to read a range of the file.
    fn will_need(&self, range: &Range<usize>) {
        // Only advice: where the system does not take it, pages come in as they are touched.
        let _ = self
            .map
            .advise_range(Advice::WillNeed, range.start, range.len());
    }

    /// Returns the bytes of a range and has the system begin to read them.
    pub(super) fn bytes(&self, range: &Range<usize>) -> Bytes {
        self.will_need(range);
        self.bytes.slice(range.clone())
    }
}
