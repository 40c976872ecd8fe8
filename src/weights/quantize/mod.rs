//! Encodes float tensors in the types of GGUF files, on all cores, in pieces.
//!
//! [`RowEncoder`] reads a [`StoredTensor`] of floats, puts its rows into the order of the file and
//! hands out encoded bytes; the bytes depend neither on the number of threads nor on the
//! instruction set. Quality is that of llama.cpp without an importance matrix.

mod k_blocks;
mod lanes;
mod legacy_blocks;
mod search;
#[cfg(test)]
mod tests;

use candle_core::quantized::GgmlDType;
use rayon::prelude::*;

use super::{RowOrder, StoredTensor, WeightsError, convert};

/// About how many weights one thread encodes at a time: they stay in its second-level cache.
const PIECE: usize = 1 << 14;
/// About how many weights are encoded before they are handed out.
const BATCH: usize = 1 << 22;

/// Returns the bytes of a tensor of `shape` (row-major) in `dtype`.
///
/// # Errors
/// [`WeightsError::UnevenBlocks`] when its rows do not divide into blocks; `name` is for that.
pub fn encoded_bytes(name: &str, dtype: GgmlDType, shape: &[usize]) -> Result<u64, WeightsError> {
    let columns = shape.last().copied().unwrap_or(1);
    let block_size = dtype.block_size();
    if !columns.is_multiple_of(block_size) {
        return Err(WeightsError::UnevenBlocks {
            tensor: name.to_owned(),
            columns,
            dtype: format!("{dtype:?}"),
            block_size,
        });
    }
    let blocks = shape.iter().product::<usize>() / block_size;
    Ok(blocks as u64 * dtype.type_size() as u64)
}

/// Encodes the rows of one tensor.
#[derive(Debug)]
pub struct RowEncoder<'a> {
    /// Name for errors: the tensor's in the file that is written.
    pub name: &'a str,
    /// The floats, F32, F16 or BF16, of one or more dimensions.
    pub tensor: &'a StoredTensor,
    /// Type to encode in.
    pub dtype: GgmlDType,
    /// Order of the rows in the file.
    pub order: RowOrder,
}

/// The numbers of an encoding, all in rows or bytes.
struct Shape {
    num_rows: usize,
    columns: usize,
    source_row_bytes: usize,
    row_bytes: usize,
}

impl RowEncoder<'_> {
    /// Encodes all rows and hands their bytes to `sink`, in order, some megabytes at a time.
    ///
    /// # Errors
    /// [`WeightsError::NotFloat`] when the tensor is quantised already,
    /// [`WeightsError::UnevenBlocks`] when its rows do not divide into blocks,
    /// [`WeightsError::Unrepresentable`] when it holds NaN, an infinity or a number too large for
    /// the type, and what `sink` returns.
    pub fn encode(
        &self,
        sink: &mut dyn FnMut(&[u8]) -> Result<(), WeightsError>,
    ) -> Result<(), WeightsError> {
        let shape = self.shape()?;
        let rows_per_piece = (PIECE / shape.columns.max(1)).max(1);
        let rows_per_batch = (BATCH / shape.columns.max(1)).max(1);
        let mut encoded = Vec::new();
        let mut first = 0;
        while first < shape.num_rows {
            let rows = rows_per_batch.min(shape.num_rows - first);
            encoded.resize(rows * shape.row_bytes, 0);
            let results: Vec<Result<(), WeightsError>> = encoded
                .par_chunks_mut(rows_per_piece * shape.row_bytes)
                .enumerate()
                .map_init(Vec::new, |weights, (piece, encoded)| {
                    let first = first + piece * rows_per_piece;
                    self.encode_piece(&shape, first, weights, encoded)
                })
                .collect();
            // The first fault in the order of the rows, whichever thread found it.
            results.into_iter().collect::<Result<(), _>>()?;
            sink(&encoded)?;
            first += rows;
        }
        Ok(())
    }

    fn shape(&self) -> Result<Shape, WeightsError> {
        let StoredTensor {
            dtype, shape, data, ..
        } = self.tensor;
        if !matches!(dtype, GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16) {
            return Err(WeightsError::NotFloat {
                tensor: self.name.to_owned(),
                dtype: format!("{dtype:?}"),
            });
        }
        // Biases have rows of one element in Hugging Face's sense, which is what `order` counts.
        let num_rows = match self.order {
            RowOrder::Interleaved { .. } => shape.first().copied().unwrap_or(1),
            RowOrder::AsStored => shape.iter().rev().skip(1).product(),
        };
        let columns = shape.iter().product::<usize>() / num_rows.max(1);
        let row_bytes = encoded_bytes(self.name, self.dtype, &[columns])? as usize;
        Ok(Shape {
            num_rows,
            columns,
            source_row_bytes: data.len() / num_rows.max(1),
            row_bytes,
        })
    }

    /// Encodes the rows from `first` on that `encoded` has room for.
    fn encode_piece(
        &self,
        shape: &Shape,
        first: usize,
        weights: &mut Vec<f32>,
        encoded: &mut [u8],
    ) -> Result<(), WeightsError> {
        let rows = encoded.len() / shape.row_bytes;
        weights.resize(rows * shape.columns, 0.0);
        for (row, weights) in weights.chunks_exact_mut(shape.columns).enumerate() {
            let source = self.order.source_row(first + row, shape.num_rows);
            let begin = source * shape.source_row_bytes;
            let bytes = &self.tensor.data[begin..begin + shape.source_row_bytes];
            convert::to_f32(self.tensor.dtype, bytes, weights);
        }
        let (bound, limit) = bound(self.dtype);
        if let Some(&value) = weights
            .iter()
            .find(|value| value.abs() >= bound || value.is_nan())
        {
            return Err(WeightsError::Unrepresentable {
                tensor: self.name.to_owned(),
                value,
                dtype: format!("{:?}", self.dtype),
                limit,
            });
        }
        encode_blocks(self.dtype, weights, encoded);
        Ok(())
    }
}

/// Returns the least size that a type, or the scales of its blocks, rounds to infinity.
fn bound(dtype: GgmlDType) -> (f32, &'static str) {
    match dtype {
        GgmlDType::F32 => (f32::INFINITY, "finite numbers only"),
        GgmlDType::BF16 => (f32::from_bits(0x7f7f_8000), "up to 3.39e38"),
        _ => (65_520.0, "up to 65504"),
    }
}

/// Encodes whole blocks with the best instructions that the processor has.
fn encode_blocks(dtype: GgmlDType, weights: &[f32], encoded: &mut [u8]) {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has what the function is compiled for.
        unsafe { encode_blocks_avx2(dtype, weights, encoded) };
        return;
    }
    encode_blocks_anywhere(dtype, weights, encoded);
}

/// The same code as [`encode_blocks_anywhere`], compiled for AVX2. Without fused operations: they
/// would round otherwise than on other processors.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn encode_blocks_avx2(dtype: GgmlDType, weights: &[f32], encoded: &mut [u8]) {
    encode_blocks_anywhere(dtype, weights, encoded);
}

#[inline(always)]
fn encode_blocks_anywhere(dtype: GgmlDType, weights: &[f32], encoded: &mut [u8]) {
    // A macro, since functions passed as arguments would not be compiled for AVX2 with the rest.
    macro_rules! each_block {
        ($encode:path) => {{
            let (weights, _) = weights.as_chunks();
            let (encoded, _) = encoded.as_chunks_mut();
            for (weights, encoded) in weights.iter().zip(encoded) {
                $encode(weights, encoded);
            }
        }};
    }
    match dtype {
        GgmlDType::Q8_0 => each_block!(legacy_blocks::q8_0),
        GgmlDType::Q4_0 => each_block!(legacy_blocks::q4_0),
        GgmlDType::Q5_0 => each_block!(legacy_blocks::q5_0),
        GgmlDType::Q5_1 => each_block!(legacy_blocks::q5_1),
        GgmlDType::Q4K => each_block!(k_blocks::q4_k),
        GgmlDType::Q5K => each_block!(k_blocks::q5_k),
        GgmlDType::Q6K => each_block!(k_blocks::q6_k),
        dtype => convert::from_f32(dtype, weights, encoded),
    }
}
