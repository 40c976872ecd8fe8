//! Reads the header of one GGUF file (versions 2 and 3, little endian).
//!
//! Every length is checked against the bytes that are left before anything is allocated, so that
//! a hostile file costs memory in proportion to its own size. Format:
//! <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.

use std::{
    collections::{BTreeMap, HashSet},
    path::Path,
};

use candle_core::quantized::GgmlDType;

use super::{
    WeightsError,
    gguf_names::RowOrder,
    index::{StoredDtype, TensorEntry},
};

/// Arrays of arrays do not occur in practice; deeper nesting is an attack on the stack.
const MAX_ARRAY_DEPTH: usize = 4;
/// ggml's own limit.
const MAX_DIMENSIONS: usize = 4;
/// Tensor data is aligned to this unless `general.alignment` says otherwise.
pub(super) const DEFAULT_ALIGNMENT: u64 = 32;

/// ggml's numbers of the tensor types that infold reads and writes.
pub(super) const GGML_TYPES: [(u32, GgmlDType); 11] = [
    (0, GgmlDType::F32),
    (1, GgmlDType::F16),
    (2, GgmlDType::Q4_0),
    (3, GgmlDType::Q4_1),
    (6, GgmlDType::Q5_0),
    (7, GgmlDType::Q5_1),
    (8, GgmlDType::Q8_0),
    (12, GgmlDType::Q4K),
    (13, GgmlDType::Q5K),
    (14, GgmlDType::Q6K),
    (30, GgmlDType::BF16),
];

/// The tensor types that can be read, for messages.
pub(super) const SUPPORTED_DTYPES: &str =
    "F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K and Q6_K";

/// A metadata value; integers and floats of all widths in one variant each.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    String(String),
    Array(Vec<Value>),
}

impl Value {
    pub(super) fn as_u64(&self) -> Option<u64> {
        match *self {
            Self::Unsigned(value) => Some(value),
            Self::Signed(value) => u64::try_from(value).ok(),
            _ => None,
        }
    }

    pub(super) fn as_f64(&self) -> Option<f64> {
        match *self {
            Self::Float(value) => Some(value),
            Self::Unsigned(value) => Some(value as f64),
            Self::Signed(value) => Some(value as f64),
            _ => None,
        }
    }

    pub(super) fn as_bool(&self) -> Option<bool> {
        match *self {
            Self::Bool(value) => Some(value),
            _ => None,
        }
    }

    pub(super) fn as_str(&self) -> Option<&str> {
        match self {
            Self::String(value) => Some(value),
            _ => None,
        }
    }

    pub(super) fn as_array(&self) -> Option<&[Value]> {
        match self {
            Self::Array(values) => Some(values),
            _ => None,
        }
    }
}

/// The header of a GGUF file; tensors under their GGUF names.
#[derive(Debug)]
pub(super) struct Header {
    pub(super) metadata: BTreeMap<String, Value>,
    pub(super) tensors: Vec<(String, TensorEntry)>,
}

/// Reads the header of the GGUF file with content `data`.
///
/// # Errors
/// [`WeightsError::Gguf`] with the byte where the format is broken,
/// [`Truncated`](WeightsError::Truncated) and
/// [`DuplicateTensor`](WeightsError::DuplicateTensor) with the tensor.
pub(super) fn read_header(path: &Path, data: &[u8]) -> Result<Header, WeightsError> {
    let mut reader = Reader {
        path,
        data,
        position: 0,
    };
    if reader.array::<4>()? != *b"GGUF" {
        return Err(reader.error("it does not begin with the letters GGUF"));
    }
    let version = reader.u32()?;
    if !(2..=3).contains(&version) {
        let order = if (2..=3).contains(&version.swap_bytes()) {
            " (big endian)"
        } else {
            ""
        };
        return Err(reader.error(format!(
            "version {version}{order} is not supported, only 2 and 3 in little endian are"
        )));
    }
    // A tensor takes at least 24 bytes (name length, dimensions, type, offset), a key at least
    // 13 (name length, type, a byte of value).
    let num_tensors = reader.count("tensors", 24)?;
    let num_keys = reader.count("metadata keys", 13)?;
    let mut metadata = BTreeMap::new();
    for _ in 0..num_keys {
        let key = reader.string()?;
        let kind = reader.u32()?;
        let value = reader.value(kind, 0)?;
        metadata.insert(key, value);
    }
    let tensors = reader.tensors(num_tensors)?;
    let alignment = match metadata.get("general.alignment") {
        None => DEFAULT_ALIGNMENT,
        Some(value) => {
            (value.as_u64().filter(|value| value.is_power_of_two())).ok_or_else(|| {
                WeightsError::GgufMetadata {
                    path: path.to_owned(),
                    key: "general.alignment".to_owned(),
                    reason: "is not a power of two",
                }
            })?
        }
    };
    let tensors = place(path, data.len() as u64, reader.position, alignment, tensors)?;
    Ok(Header { metadata, tensors })
}

/// A tensor as the header describes it.
struct RawTensor {
    name: String,
    /// Fastest-varying dimension first, as GGUF writes it.
    dimensions: Vec<u64>,
    kind: u32,
    /// From the start of the data section.
    offset: u64,
}

/// Turns offsets into byte ranges of the file, and checks that they lie in it one by one.
fn place(
    path: &Path,
    file_bytes: u64,
    header_end: usize,
    alignment: u64,
    tensors: Vec<RawTensor>,
) -> Result<Vec<(String, TensorEntry)>, WeightsError> {
    let data_start = (header_end as u64)
        .checked_next_multiple_of(alignment)
        .unwrap_or(u64::MAX);
    let mut names = HashSet::new();
    let mut entries = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        let size_bytes = tensor.size_bytes().map_err(|reason| WeightsError::Gguf {
            path: path.to_owned(),
            offset: header_end as u64,
            reason: format!("tensor {}: {reason}", tensor.name),
        })?;
        let begin = data_start.saturating_add(tensor.offset);
        let end = begin.saturating_add(size_bytes);
        if end > file_bytes {
            return Err(WeightsError::Truncated {
                path: path.to_owned(),
                tensor: tensor.name,
                expected_bytes: end,
                found_bytes: file_bytes,
            });
        }
        if !names.insert(tensor.name.clone()) {
            return Err(WeightsError::DuplicateTensor {
                tensor: tensor.name,
                first: path.to_owned(),
                second: path.to_owned(),
            });
        }
        let entry = TensorEntry {
            dtype: stored_dtype(tensor.kind),
            shape: (tensor.dimensions.iter().rev())
                .map(|&size| usize::try_from(size).unwrap_or(usize::MAX))
                .collect(),
            range: begin as usize..end as usize,
            row_order: RowOrder::AsStored,
        };
        entries.push((tensor.name, entry));
    }
    refuse_overlaps(path, data_start, &entries)?;
    Ok(entries)
}

fn refuse_overlaps(
    path: &Path,
    data_start: u64,
    entries: &[(String, TensorEntry)],
) -> Result<(), WeightsError> {
    let mut by_offset: Vec<_> = entries.iter().collect();
    by_offset.sort_by_key(|(_, entry)| entry.range.start);
    for pair in by_offset.windows(2) {
        let [(_, before), (name, after)] = [pair[0], pair[1]];
        if after.range.start < before.range.end {
            return Err(WeightsError::TensorOffset {
                path: path.to_owned(),
                tensor: name.clone(),
                expected: before.range.end as u64 - data_start,
                found: after.range.start as u64 - data_start,
            });
        }
    }
    Ok(())
}

impl RawTensor {
    /// Returns the bytes by shape and type; 0 for types whose layout is not known here, which
    /// are refused when the tensor is asked for.
    fn size_bytes(&self) -> Result<u64, String> {
        if self.dimensions.contains(&0) {
            return Err(format!(
                "shape {:?} has an empty dimension",
                self.dimensions
            ));
        }
        let StoredDtype::Known(dtype) = stored_dtype(self.kind) else {
            return Ok(0);
        };
        let block_size = dtype.block_size() as u64;
        let columns = self.dimensions.first().copied().unwrap_or(1);
        if columns % block_size != 0 {
            return Err(format!(
                "rows of {columns} do not divide into {dtype:?} blocks of {block_size}"
            ));
        }
        (self.dimensions.iter())
            .try_fold(1_u64, |product, &size| product.checked_mul(size))
            .and_then(|elements| (elements / block_size).checked_mul(dtype.type_size() as u64))
            .ok_or_else(|| format!("the size of shape {:?} overflows", self.dimensions))
    }
}

fn stored_dtype(kind: u32) -> StoredDtype {
    match GGML_TYPES.iter().find(|(number, _)| *number == kind) {
        Some((_, dtype)) => StoredDtype::Known(*dtype),
        None => StoredDtype::Other(other_type_name(kind)),
    }
}

/// Returns ggml's name of a tensor type that infold does not read.
fn other_type_name(kind: u32) -> String {
    let name = match kind {
        9 => "Q8_1",
        10 => "Q2_K",
        11 => "Q3_K",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        _ => return format!("ggml type {kind}"),
    };
    name.to_owned()
}

/// A cursor over the file that never reads past its end.
struct Reader<'a> {
    path: &'a Path,
    data: &'a [u8],
    position: usize,
}

impl Reader<'_> {
    fn error(&self, reason: impl Into<String>) -> WeightsError {
        WeightsError::Gguf {
            path: self.path.to_owned(),
            offset: self.position as u64,
            reason: reason.into(),
        }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], WeightsError> {
        let Some((bytes, _)) = self.data[self.position..].split_first_chunk::<N>() else {
            return Err(self.error(format!(
                "the file ends within its header ({} bytes)",
                self.data.len()
            )));
        };
        self.position += N;
        Ok(*bytes)
    }

    fn u32(&mut self) -> Result<u32, WeightsError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, WeightsError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// Reads a number of items that take at least `min_bytes` each in the rest of the file.
    fn count(&mut self, what: &str, min_bytes: usize) -> Result<usize, WeightsError> {
        let count = self.u64()?;
        let left = self.data.len() - self.position;
        match usize::try_from(count) {
            Ok(count) if count <= left / min_bytes => Ok(count),
            _ => Err(self.error(format!(
                "{count} {what} do not fit in the {left} bytes left"
            ))),
        }
    }

    fn string(&mut self) -> Result<String, WeightsError> {
        let length = self.count("bytes of text", 1)?;
        let bytes = &self.data[self.position..self.position + length];
        // Some vocabularies hold pieces of UTF-8; they only need to stay distinguishable.
        let text = String::from_utf8_lossy(bytes).into_owned();
        self.position += length;
        Ok(text)
    }

    fn value(&mut self, kind: u32, depth: usize) -> Result<Value, WeightsError> {
        Ok(match kind {
            0 => Value::Unsigned(u8::from_le_bytes(self.array()?).into()),
            1 => Value::Signed(i8::from_le_bytes(self.array()?).into()),
            2 => Value::Unsigned(u16::from_le_bytes(self.array()?).into()),
            3 => Value::Signed(i16::from_le_bytes(self.array()?).into()),
            4 => Value::Unsigned(self.u32()?.into()),
            5 => Value::Signed(i32::from_le_bytes(self.array()?).into()),
            6 => Value::Float(f32::from_le_bytes(self.array()?).into()),
            7 => Value::Bool(self.array::<1>()? != [0]),
            8 => Value::String(self.string()?),
            9 => {
                if depth == MAX_ARRAY_DEPTH {
                    return Err(self.error("arrays are nested too deeply"));
                }
                let kind = self.u32()?;
                let min_bytes = match kind {
                    0 | 1 | 7 => 1,
                    2 | 3 => 2,
                    4..=6 => 4,
                    9 => 12,
                    _ => 8,
                };
                let count = self.count("array elements", min_bytes)?;
                (0..count)
                    .map(|_| self.value(kind, depth + 1))
                    .collect::<Result<_, _>>()
                    .map(Value::Array)?
            }
            10 => Value::Unsigned(self.u64()?),
            11 => Value::Signed(i64::from_le_bytes(self.array()?)),
            12 => Value::Float(f64::from_le_bytes(self.array()?)),
            _ => return Err(self.error(format!("metadata value type {kind} is unknown"))),
        })
    }

    fn tensors(&mut self, count: usize) -> Result<Vec<RawTensor>, WeightsError> {
        let mut tensors = Vec::with_capacity(count);
        for _ in 0..count {
            let name = self.string()?;
            let num_dimensions = self.u32()? as usize;
            if num_dimensions > MAX_DIMENSIONS {
                return Err(self.error(format!(
                    "tensor {name} has {num_dimensions} dimensions, at most {MAX_DIMENSIONS} are allowed"
                )));
            }
            let dimensions = (0..num_dimensions)
                .map(|_| self.u64())
                .collect::<Result<_, _>>()?;
            tensors.push(RawTensor {
                name,
                dimensions,
                kind: self.u32()?,
                offset: self.u64()?,
            });
        }
        Ok(tensors)
    }
}
