//! One tensor as it lies in a file: dtype, shape and bytes, whole or cut for a rank.

use std::ops::Range;

use bytes::{Bytes, BytesMut};
use candle_core::quantized::GgmlDType;

use super::{WeightsError, convert};

/// Which part of a tensor a rank keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shard {
    /// The dimension that is cut: 0 for rows (column-parallel), 1 for columns (row-parallel).
    pub dim: usize,
    /// Which of the parts, from 0.
    pub rank: usize,
    /// Number of equal parts.
    pub world_size: usize,
}

/// A tensor in the dtype in which it is stored; cloning shares the bytes.
#[derive(Clone)]
pub struct StoredTensor {
    /// Hugging Face name, also for tensors of a GGUF file.
    pub name: String,
    /// Element or block type.
    pub dtype: GgmlDType,
    /// Row-major shape: a linear's weight is `[rows, columns]` = `[out_features, in_features]`.
    pub shape: Vec<usize>,
    /// The elements, little endian, rows one after the other. Mapped straight from the file, so
    /// nothing is promised about the alignment of the first byte.
    pub data: Bytes,
}

impl StoredTensor {
    /// Checks the shape against what the configuration asks for.
    ///
    /// # Errors
    /// [`WeightsError::Shape`] when they differ.
    pub fn expect_shape(&self, expected: &[usize]) -> Result<(), WeightsError> {
        if self.shape == expected {
            return Ok(());
        }
        Err(WeightsError::Shape {
            tensor: self.name.clone(),
            expected: expected.to_vec(),
            found: self.shape.clone(),
        })
    }

    /// Returns the elements of a float tensor (F32, F16 or BF16) as f32.
    ///
    /// # Errors
    /// [`WeightsError::UnsupportedDtype`] for blocks of quantised weights.
    pub fn to_f32(&self) -> Result<Vec<f32>, WeightsError> {
        match self.dtype {
            GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16 => {
                Ok(convert::values(self.dtype, &self.data))
            }
            dtype => Err(WeightsError::NotFloat {
                tensor: self.name.clone(),
                dtype: format!("{dtype:?}"),
            }),
        }
    }

    /// Returns the part that belongs to `shard.rank`: rows without a copy, columns copied.
    ///
    /// # Errors
    /// [`WeightsError::UnevenShard`] when the dimension does not divide by `world_size`, and what
    /// [`narrow`](Self::narrow) returns.
    pub fn shard(&self, shard: &Shard) -> Result<Self, WeightsError> {
        let Shard {
            dim,
            rank,
            world_size,
        } = *shard;
        let size = self.shape.get(dim).copied().unwrap_or(0);
        if size == 0 || world_size == 0 || !size.is_multiple_of(world_size) {
            return Err(WeightsError::UnevenShard {
                tensor: self.name.clone(),
                dim,
                size,
                world_size,
            });
        }
        let length = size / world_size;
        self.narrow(dim, rank * length..(rank + 1) * length)
    }

    /// Returns the elements `range` of dimension `dim` (0 or 1): rows without a copy, columns
    /// copied.
    ///
    /// # Errors
    /// [`WeightsError::OutOfRange`] when the tensor has no such range,
    /// [`WeightsError::SplitBlock`] when a column range cuts through a block of a quantised
    /// dtype.
    pub fn narrow(&self, dim: usize, range: Range<usize>) -> Result<Self, WeightsError> {
        let size = self.shape.get(dim).copied().unwrap_or(0);
        if dim > 1 || dim >= self.shape.len() || range.start > range.end || range.end > size {
            return Err(WeightsError::OutOfRange {
                tensor: self.name.clone(),
                shape: self.shape.clone(),
                dim,
                start: range.start,
                end: range.end,
            });
        }
        let mut shape = self.shape.clone();
        shape[dim] = range.len();
        let data = if dim == 0 && self.shape.len() == 1 {
            self.data.slice(self.bytes_of(&range)?)
        } else if dim == 0 {
            let row_bytes = self.data.len() / size.max(1);
            self.data
                .slice(range.start * row_bytes..range.end * row_bytes)
        } else {
            self.copy_columns(&range)?
        };
        Ok(Self {
            name: self.name.clone(),
            dtype: self.dtype,
            shape,
            data,
        })
    }

    /// Returns where the elements `range` of one row lie in it, in bytes.
    fn bytes_of(&self, range: &Range<usize>) -> Result<Range<usize>, WeightsError> {
        let block_size = self.dtype.block_size();
        if !range.start.is_multiple_of(block_size) || !range.end.is_multiple_of(block_size) {
            return Err(WeightsError::SplitBlock {
                tensor: self.name.clone(),
                dtype: format!("{:?}", self.dtype),
                block_size,
                start: range.start,
                end: range.end,
            });
        }
        let type_size = self.dtype.type_size();
        Ok(range.start / block_size * type_size..range.end / block_size * type_size)
    }

    fn copy_columns(&self, range: &Range<usize>) -> Result<Bytes, WeightsError> {
        // The stride of a "column" is everything below dimension 1 (nothing, for a matrix).
        let inner: usize = self.shape[2..].iter().product();
        let bytes = self.bytes_of(&(range.start * inner..range.end * inner))?;
        let num_rows = self.shape[0].max(1);
        let row_bytes = self.data.len() / num_rows;
        let mut copy = BytesMut::with_capacity(num_rows * bytes.len());
        for row in self.data.chunks_exact(row_bytes.max(1)) {
            copy.extend_from_slice(&row[bytes.clone()]);
        }
        Ok(copy.freeze())
    }

    /// Returns the tensor with its rows reordered: row `i` of the result is row `source(i)`.
    ///
    /// Rows are whole blocks in every dtype, so quantised tensors need no requantisation.
    pub(super) fn permute_rows(&self, source: impl Fn(usize) -> usize) -> Self {
        let num_rows = self.shape[0].max(1);
        let row_bytes = self.data.len() / num_rows;
        let mut copy = BytesMut::with_capacity(self.data.len());
        for row in 0..num_rows {
            let start = source(row) * row_bytes;
            copy.extend_from_slice(&self.data[start..start + row_bytes]);
        }
        Self {
            data: copy.freeze(),
            ..self.clone()
        }
    }
}

impl std::fmt::Debug for StoredTensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The bytes of a weight would fill the screen.
        f.debug_struct("StoredTensor")
            .field("name", &self.name)
            .field("dtype", &self.dtype)
            .field("shape", &self.shape)
            .field("size_bytes", &self.data.len())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(dtype: GgmlDType, shape: &[usize]) -> StoredTensor {
        let elements: usize = shape.iter().product();
        let size_bytes = elements / dtype.block_size() * dtype.type_size();
        StoredTensor {
            name: "w".into(),
            dtype,
            shape: shape.to_vec(),
            data: (0..size_bytes)
                .map(|i| (i % 251) as u8)
                .collect::<Vec<_>>()
                .into(),
        }
    }

    #[test]
    fn rows_are_shared_and_columns_are_copied_in_order() {
        let whole = tensor(GgmlDType::F32, &[4, 6]);
        let rows = whole
            .shard(&Shard {
                dim: 0,
                rank: 1,
                world_size: 2,
            })
            .unwrap();
        assert_eq!(rows.shape, [2, 6]);
        assert_eq!(rows.data.as_ptr(), whole.data[48..].as_ptr());

        let columns = whole
            .shard(&Shard {
                dim: 1,
                rank: 2,
                world_size: 3,
            })
            .unwrap();
        assert_eq!(columns.shape, [4, 2]);
        for row in 0..4 {
            assert_eq!(
                columns.data[row * 8..(row + 1) * 8],
                whole.data[row * 24 + 16..row * 24 + 24]
            );
        }
    }

    #[test]
    fn a_bias_is_cut_by_elements() {
        let bias = tensor(GgmlDType::BF16, &[6]);
        let part = bias.narrow(0, 2..5).unwrap();
        assert_eq!((part.shape, part.data), (vec![3], bias.data.slice(4..10)));
    }

    #[test]
    fn quantised_columns_are_cut_at_block_borders_only() {
        let whole = tensor(GgmlDType::Q4_1, &[2, 96]);
        let half = Shard {
            dim: 1,
            rank: 0,
            world_size: 2,
        };
        assert!(matches!(
            whole.shard(&half),
            Err(WeightsError::SplitBlock {
                block_size: 32,
                end: 48,
                ..
            })
        ));
        let third = Shard {
            dim: 1,
            rank: 1,
            world_size: 3,
        };
        let part = whole.shard(&third).unwrap();
        assert_eq!(part.data.len(), 2 * 20);
        assert_eq!(part.data[20..], whole.data[80..100]);
    }

    #[test]
    fn impossible_shards_are_refused() {
        let whole = tensor(GgmlDType::F16, &[4, 6]);
        for shard in [
            Shard {
                dim: 0,
                rank: 0,
                world_size: 3,
            },
            Shard {
                dim: 2,
                rank: 0,
                world_size: 1,
            },
            Shard {
                dim: 1,
                rank: 0,
                world_size: 0,
            },
        ] {
            assert!(matches!(
                whole.shard(&shard),
                Err(WeightsError::UnevenShard { .. })
            ));
        }
        let outside = Shard {
            dim: 0,
            rank: 2,
            world_size: 2,
        };
        assert!(matches!(
            whole.shard(&outside),
            Err(WeightsError::OutOfRange { .. })
        ));
        assert!(whole.expect_shape(&[4, 6]).is_ok());
        assert!(matches!(
            whole.expect_shape(&[6, 4]),
            Err(WeightsError::Shape { .. })
        ));
    }
}
