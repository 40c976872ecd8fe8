//! Reads the header of one safetensors file and checks every claim in it against the file.
//!
//! The `safetensors` crate refuses a bad header too, but without saying which tensor is at fault
//! and which sizes were expected and found, and it refuses a whole file for one dtype it does
//! not know. Format: <https://github.com/huggingface/safetensors#format>.

use std::{collections::HashSet, fmt, path::Path};

use candle_core::quantized::GgmlDType;
use serde::{
    Deserialize,
    de::{Deserializer, Error as _, IgnoredAny, MapAccess, Visitor},
};

use super::{
    RowOrder, WeightsError,
    index::{StoredDtype, TensorEntry},
};

/// The header's length comes first, as a little-endian `u64`.
const LENGTH_BYTES: usize = 8;

/// Returns the tensors of the safetensors file with content `data`, in file order.
///
/// # Errors
/// [`WeightsError::HeaderTooLong`], [`Json`](WeightsError::Json),
/// [`TensorSize`](WeightsError::TensorSize), [`Truncated`](WeightsError::Truncated),
/// [`TensorOffset`](WeightsError::TensorOffset) or
/// [`TrailingBytes`](WeightsError::TrailingBytes), each naming `path` and the tensor.
pub(super) fn read_index(
    path: &Path,
    data: &[u8],
) -> Result<Vec<(String, TensorEntry)>, WeightsError> {
    let header = header_of(path, data)?;
    let data_start = (LENGTH_BYTES + header.len()) as u64;
    let header: Header = serde_json::from_slice(header).map_err(|source| WeightsError::Json {
        path: path.to_owned(),
        source,
    })?;
    let mut tensors = header.tensors;
    tensors.sort_by_key(|(_, tensor)| tensor.data_offsets);

    let mut end_of_previous = 0;
    let mut entries = Vec::with_capacity(tensors.len());
    for (name, tensor) in tensors {
        let [begin, end] = tensor.data_offsets;
        if begin != end_of_previous {
            return Err(WeightsError::TensorOffset {
                path: path.to_owned(),
                tensor: name,
                expected: end_of_previous,
                found: begin,
            });
        }
        let entry = tensor.into_entry(path, &name, data_start, data.len() as u64)?;
        end_of_previous = end;
        entries.push((name, entry));
    }
    if data_start + end_of_previous != data.len() as u64 {
        return Err(WeightsError::TrailingBytes {
            path: path.to_owned(),
            expected_bytes: data_start + end_of_previous,
            found_bytes: data.len() as u64,
        });
    }
    Ok(entries)
}

fn header_of<'a>(path: &Path, data: &'a [u8]) -> Result<&'a [u8], WeightsError> {
    let too_long = |header_bytes| WeightsError::HeaderTooLong {
        path: path.to_owned(),
        header_bytes,
        file_bytes: data.len() as u64,
    };
    let (length, rest) = data
        .split_first_chunk::<LENGTH_BYTES>()
        .ok_or_else(|| too_long(LENGTH_BYTES as u64))?;
    let length = u64::from_le_bytes(*length);
    usize::try_from(length)
        .ok()
        .and_then(|length| rest.get(..length))
        .ok_or_else(|| too_long(length))
}

/// The JSON header, its tensors in the order of appearance.
struct Header {
    tensors: Vec<(String, Tensor)>,
}

/// What the header says about a tensor.
#[derive(Deserialize)]
struct Tensor {
    dtype: String,
    shape: Vec<u64>,
    /// From the end of the header, in bytes.
    data_offsets: [u64; 2],
}

impl Tensor {
    fn into_entry(
        self,
        path: &Path,
        name: &str,
        data_start: u64,
        file_bytes: u64,
    ) -> Result<TensorEntry, WeightsError> {
        let [begin, end] = self.data_offsets;
        let found_bytes = end.saturating_sub(begin);
        // Elements wider than a byte are whole bytes; narrower ones come in pairs or quads.
        let bits = dtype_bits(&self.dtype);
        let expected_bits = self
            .shape
            .iter()
            .try_fold(bits.unwrap_or(0), |product, &size| {
                product.checked_mul(size)
            });
        let expected_bytes = expected_bits.map_or(u64::MAX, |bits| bits.div_ceil(8));
        if begin > end || (bits.is_some() && expected_bytes != found_bytes) {
            return Err(WeightsError::TensorSize {
                path: path.to_owned(),
                tensor: name.to_owned(),
                dtype: self.dtype,
                shape: self.shape,
                expected_bytes,
                found_bytes,
            });
        }
        let end_in_file = data_start.saturating_add(end);
        if end_in_file > file_bytes {
            return Err(WeightsError::Truncated {
                path: path.to_owned(),
                tensor: name.to_owned(),
                expected_bytes: end_in_file,
                found_bytes: file_bytes,
            });
        }
        Ok(TensorEntry {
            dtype: match self.dtype.as_str() {
                "F32" => StoredDtype::Known(GgmlDType::F32),
                "F16" => StoredDtype::Known(GgmlDType::F16),
                "BF16" => StoredDtype::Known(GgmlDType::BF16),
                _ => StoredDtype::Other(self.dtype),
            },
            // An unknown dtype has an unchecked shape: saturate, it is refused when asked for.
            shape: (self.shape.iter())
                .map(|&size| usize::try_from(size).unwrap_or(usize::MAX))
                .collect(),
            // Both fit: they are within a file that is mapped into memory.
            range: (data_start + begin) as usize..end_in_file as usize,
            row_order: RowOrder::AsStored,
        })
    }
}

/// Returns the width of an element, or `None` for a dtype this reader does not know.
fn dtype_bits(dtype: &str) -> Option<u64> {
    Some(match dtype {
        "F4" => 4,
        "F6_E2M3" | "F6_E3M2" => 6,
        "BOOL" | "U8" | "I8" | "F8_E4M3" | "F8_E5M2" | "F8_E8M0" => 8,
        "F16" | "BF16" | "U16" | "I16" => 16,
        "F32" | "U32" | "I32" => 32,
        "F64" | "U64" | "I64" | "C64" => 64,
        _ => return None,
    })
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct HeaderVisitor;

        impl<'de> Visitor<'de> for HeaderVisitor {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object of tensors by name")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut tensors = Vec::new();
                // A map type would silently keep the last of two tensors with one name.
                let mut seen = HashSet::new();
                while let Some(name) = map.next_key::<String>()? {
                    if !seen.insert(name.clone()) {
                        return Err(A::Error::custom(format!("tensor {name} is listed twice")));
                    }
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                    } else {
                        let tensor = map
                            .next_value()
                            .map_err(|error| A::Error::custom(format!("tensor {name}: {error}")))?;
                        tensors.push((name, tensor));
                    }
                }
                Ok(Header { tensors })
            }
        }

        deserializer.deserialize_map(HeaderVisitor)
    }
}
