//! Matrices as loaded, and their products: cuts `y = x Wᵀ` into tasks.
//!
//! A task is a run of 16-row units of the weights by a chunk of the rows of x. The chunk is
//! sized to stay in a core's L2 cache while the units pass through L1; with few rows of x there
//! is one chunk and the weights are streamed once.

use super::activation::{Activations, MAX_GROUP};
use super::buffer::{FloatBytes, Lines, Output, for_each_piece};
use super::dense::{DenseDot, DenseType};
use super::gemm::{Elements, Operand};
use super::pool::Pool;
use super::quant_dot::QuantDot;
use super::quant_pack::{TILE_ROWS, TileLayout};
use super::simd::SimdLevel;
use bytes::Bytes;
use candle_core::quantized::GgmlDType;
use candle_core::{Result, bail};
use std::ops::Range;
use std::sync::Arc;

/// Bytes of a chunk of activations: part of an L2 cache of 1 MiB.
const CHUNK_BYTES: usize = 384 * 1024;
/// Multiply-adds below which a task is not worth handing out.
const MIN_TASK_WORK: usize = 128 * 1024;
/// Tasks for each thread, so that a thread that is put aside delays little.
const TASKS_PER_THREAD: usize = 6;

/// The weights of a linear layer or an embedding, as the kernels want them.
pub(in crate::kernels) struct CpuMatrix {
    pub(in crate::kernels) rows: usize,
    pub(in crate::kernels) cols: usize,
    data: Data,
}

enum Data {
    /// As in the file.
    Dense(DenseType, Bytes),
    /// Tiles of 16 rows.
    Tiles(TileLayout, Lines),
}

/// What every kernel runs on.
#[derive(Clone, Copy)]
pub(in crate::kernels) struct Cpu<'a> {
    pub(super) level: SimdLevel,
    pub(super) pool: &'a Pool,
}

impl CpuMatrix {
    /// Takes dense bytes as they are and repacks block formats.
    ///
    /// # Errors
    ///
    /// When there is no kernel for the type, the columns are not a multiple of its block, or
    /// `data` is not `rows * cols` elements.
    pub(in crate::kernels) fn load(
        cpu: Cpu<'_>,
        dtype: GgmlDType,
        [rows, cols]: [usize; 2],
        data: Bytes,
    ) -> Result<Self> {
        let dense = match dtype {
            GgmlDType::F32 => Some(DenseType::F32),
            GgmlDType::F16 => Some(DenseType::F16),
            GgmlDType::BF16 => Some(DenseType::BF16),
            _ => None,
        };
        let data = match dense {
            Some(dense) => {
                check_len(dtype, [rows, cols], &data)?;
                Data::Dense(dense, data)
            }
            None => {
                let layout = TileLayout::new(dtype, cols)?;
                check_len(dtype, [rows, cols], &data)?;
                Data::Tiles(layout, pack(cpu, &layout, dtype, cols, &data))
            }
        };
        Ok(Self { rows, cols, data })
    }

    /// Takes a matrix that begins at `offset` of `values` and shares their memory.
    ///
    /// # Errors
    ///
    /// On a machine whose floats are not little-endian, as those of files are.
    pub(in crate::kernels) fn share(
        values: Arc<Vec<f32>>,
        offset: usize,
        [rows, cols]: [usize; 2],
    ) -> Result<Self> {
        if cfg!(target_endian = "big") {
            bail!("modules are trained whole on little-endian machines only");
        }
        let bytes = Bytes::from_owner(FloatBytes(values));
        let data = bytes.slice(4 * offset..4 * (offset + rows * cols));
        Ok(Self {
            rows,
            cols,
            data: Data::Dense(DenseType::F32, data),
        })
    }

    /// Writes the weights of one row.
    pub(super) fn row_to_f32(&self, row: usize, out: &mut [f32]) {
        match &self.data {
            Data::Dense(dtype, data) => {
                let row_bytes = self.cols * dtype.size_bytes();
                dtype.to_f32(&data[row * row_bytes..(row + 1) * row_bytes], out);
            }
            Data::Tiles(layout, lines) => {
                let tile = &lines.bytes()[row / TILE_ROWS * layout.tile_bytes..];
                layout.dequantize_row(tile, row % TILE_ROWS, out);
            }
        }
    }

    /// Returns the weights as a product reads them; tiles must have been widened before.
    ///
    /// # Panics
    ///
    /// When the matrix holds tiles, which [`CpuMatrix::widened`] replaces at load.
    pub(super) fn operand(&self) -> Operand<'_> {
        match &self.data {
            Data::Dense(dtype, data) => Operand::new(
                Elements::Stored(*dtype, data),
                [self.rows, self.cols],
                self.cols,
            ),
            Data::Tiles(..) => panic!("training multiplies dense weights only"),
        }
    }

    /// Says whether [`CpuMatrix::operand`] may be called.
    pub(in crate::kernels) fn is_dense(&self) -> bool {
        matches!(self.data, Data::Dense(..))
    }

    /// Returns tiles as dense `f32`, dense weights as they are.
    pub(in crate::kernels) fn widened(self) -> Self {
        if self.is_dense() {
            return self;
        }
        let mut bytes = Vec::with_capacity(self.rows * self.cols * 4);
        let mut row_values = vec![0f32; self.cols];
        for row in 0..self.rows {
            self.row_to_f32(row, &mut row_values);
            bytes.extend(row_values.iter().flat_map(|value| value.to_le_bytes()));
        }
        Self {
            data: Data::Dense(DenseType::F32, Bytes::from(bytes)),
            ..self
        }
    }

    fn num_units(&self) -> usize {
        self.rows.div_ceil(TILE_ROWS)
    }
}

fn check_len(dtype: GgmlDType, [rows, cols]: [usize; 2], data: &[u8]) -> Result<()> {
    let want = rows * (cols / dtype.block_size()) * dtype.type_size();
    if data.len() != want {
        let got = data.len();
        bail!("{dtype:?} weights of {rows} x {cols} take {want} bytes, got {got}");
    }
    Ok(())
}

fn pack(cpu: Cpu<'_>, layout: &TileLayout, dtype: GgmlDType, cols: usize, data: &[u8]) -> Lines {
    let row_bytes = cols / dtype.block_size() * dtype.type_size();
    let num_tiles = data.len().div_ceil(row_bytes * TILE_ROWS);
    let mut lines = Lines::zeroed(num_tiles * layout.tile_bytes / 64);
    for_each_piece(
        cpu.pool,
        lines.bytes_mut(),
        layout.tile_bytes,
        |index, tile| {
            let rows: Vec<&[u8]> = data
                .chunks_exact(row_bytes)
                .skip(index * TILE_ROWS)
                .take(TILE_ROWS)
                .collect();
            layout.pack(dtype, &rows, tile);
        },
    );
    lines
}

/// One part of a product: a matrix and where its outputs begin.
struct Part<'a> {
    matrix: &'a CpuMatrix,
    first_unit: usize,
    first_col: usize,
}

/// Returns `x Wᵀ + bias` for the row-wise concatenation W of `matrices`, `[num_rows, Σ rows]`.
/// All shapes agree, as `Kernels::matmul` has checked.
pub(in crate::kernels) fn matmul(
    cpu: Cpu<'_>,
    x: &[f32],
    matrices: &[&CpuMatrix],
    bias: Option<&[f32]>,
) -> Vec<f32> {
    let Some(cols) = matrices.first().map(|matrix| matrix.cols) else {
        return Vec::new();
    };
    let num_rows = x.len() / cols;
    let (mut num_units, mut width) = (0, 0);
    let mut parts = Vec::with_capacity(matrices.len());
    for &matrix in matrices {
        parts.push(Part {
            matrix,
            first_unit: num_units,
            first_col: width,
        });
        num_units += matrix.num_units();
        width += matrix.rows;
    }
    let has_tiles = matrices.iter().any(|m| matches!(m.data, Data::Tiles(..)));
    let activations = has_tiles.then(|| Activations::quantize(cpu.level, cpu.pool, x, cols));
    let out = Output::new(num_rows * width);
    let product = Product {
        cpu,
        x,
        activations: activations.as_ref(),
        bias,
        out: &out,
        width,
    };
    product.run(&parts, num_units, cols, num_rows);
    // SAFETY: the tasks cover all units for all rows, and a unit writes all its columns.
    unsafe { out.finish() }
}

struct Product<'a> {
    cpu: Cpu<'a>,
    x: &'a [f32],
    /// Present when any part has tiles.
    activations: Option<&'a Activations>,
    bias: Option<&'a [f32]>,
    out: &'a Output<f32>,
    width: usize,
}

impl Product<'_> {
    fn run(&self, parts: &[Part<'_>], num_units: usize, cols: usize, num_rows: usize) {
        let row_bytes = cols * if self.activations.is_some() { 2 } else { 4 };
        let chunk_rows = (CHUNK_BYTES / row_bytes)
            .max(MAX_GROUP)
            .next_multiple_of(MAX_GROUP);
        let num_chunks = num_rows.div_ceil(chunk_rows);
        if num_chunks == 0 {
            return;
        }
        let chunk_rows = num_rows.div_ceil(num_chunks).next_multiple_of(MAX_GROUP);
        let num_chunks = num_rows.div_ceil(chunk_rows);
        let unit_work = TILE_ROWS * cols * chunk_rows.min(num_rows);
        let wanted = TASKS_PER_THREAD * self.cpu.pool.num_threads();
        let task_units = (num_units * num_chunks)
            .div_ceil(wanted)
            .max(MIN_TASK_WORK.div_ceil(unit_work))
            .min(num_units);
        let tasks_per_chunk = num_units.div_ceil(task_units);
        self.cpu.pool.run(num_chunks * tasks_per_chunk, |task| {
            let (chunk, index) = (task / tasks_per_chunk, task % tasks_per_chunk);
            let rows = chunk * chunk_rows..((chunk + 1) * chunk_rows).min(num_rows);
            let units = index * task_units..((index + 1) * task_units).min(num_units);
            for part in parts {
                let end = part.first_unit + part.matrix.num_units();
                let first = units.start.max(part.first_unit);
                let last = units.end.min(end);
                if first < last {
                    let units = first - part.first_unit..last - part.first_unit;
                    self.run_part(part, units, rows.clone());
                }
            }
        });
    }

    fn run_part(&self, part: &Part<'_>, units: Range<usize>, rows: Range<usize>) {
        let CpuMatrix {
            rows: height,
            cols,
            data,
        } = part.matrix;
        let (first, last) = (
            units.start * TILE_ROWS,
            (units.end * TILE_ROWS).min(*height),
        );
        let first_col = part.first_col + first;
        let bias = self
            .bias
            .map(|bias| &bias[first_col..first_col + last - first]);
        let out = self.out.at(first_col);
        match (data, self.activations) {
            (Data::Tiles(layout, lines), Some(activations)) => {
                let tiles = units.start * layout.tile_bytes..units.end * layout.tile_bytes;
                let job = QuantDot {
                    layout,
                    tiles: &lines.bytes()[tiles],
                    num_weight_rows: last - first,
                    activations,
                    rows,
                    bias,
                    out,
                    out_stride: self.width,
                };
                // SAFETY: the level is supported; the columns of these units for these rows lie
                // in the output, and no other task has them.
                unsafe { job.run(self.cpu.level) };
            }
            (Data::Dense(dtype, weights), _) => {
                let row_bytes = cols * dtype.size_bytes();
                let job = DenseDot {
                    dtype: *dtype,
                    weights: &weights[first * row_bytes..last * row_bytes],
                    cols: *cols,
                    x: self.x,
                    rows,
                    bias,
                    out,
                    out_stride: self.width,
                };
                // SAFETY: as above.
                unsafe { job.run(self.cpu.level) };
            }
            (Data::Tiles(..), None) => unreachable!("tiles come with quantised activations"),
        }
    }
}

/// Returns the rows of `table` for `ids`, less `first_id`; ids outside the table give zeros.
pub(in crate::kernels) fn embedding(
    cpu: Cpu<'_>,
    ids: &[u32],
    table: &CpuMatrix,
    first_id: usize,
) -> Vec<f32> {
    let mut out = vec![0.0; ids.len() * table.cols];
    for_each_piece(cpu.pool, &mut out, table.cols, |index, out| {
        let row = (ids[index] as usize).checked_sub(first_id);
        if let Some(row) = row.filter(|&row| row < table.rows) {
            table.row_to_f32(row, out);
        }
    });
    out
}
