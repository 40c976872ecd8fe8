//! `gemm_stream` and `gemm_tile`: products through Hopper's tensor copies and warpgroups, of the
//! computing type and of FP8.

use candle_core::{DType, Result};

use super::super::driver::{Arg, Driver, Geometry};
use super::super::memory::Buffer;
use super::super::tensor_map::TensorMap;
use super::super::weights::type_name;
use super::{MAX_TUNED_ROWS, Product};

/// Columns of `gemm_tile`'s tiles, and those whose halves also make whole octets for SiLU.
const TILE_COLUMNS: [usize; 4] = [128, 192, 224, 256];
const SILU_COLUMNS: [usize; 3] = [128, 192, 256];
/// Rows of x that the two blocks of a cluster take.
const PAIR_ROWS: usize = 256;
/// What a tile costs beside its products, in columns; estimated from times on an H200.
const TILE_OVERHEAD: usize = 24;
/// Fewer rows leave too much of a pair of tiles empty (measured: from 192 on ahead of cuBLASLt).
pub(super) const MIN_TILE_ROWS: usize = 192;
/// Numbers of rows that `gemm_stream` is compiled for.
const STREAM_ROWS: [usize; 3] = [16, 32, MAX_STREAM_ROWS];
/// The most of them.
pub(super) const MAX_STREAM_ROWS: usize = 64;
/// Rows of W and 16-bit elements of K of `gemm_stream`'s steps.
const STREAM_STEP: usize = 64;
/// Dynamic shared memory of `gemm_stream`'s and `gemm_tile`'s rings, at most.
const STREAM_RING_BYTES: usize = 131_072;
const TILE_RING_BYTES: usize = 220_000;

/// How one of these kernels is launched.
#[derive(Clone, Copy, Debug)]
pub(in super::super) enum Form {
    /// `gemm_tile` with so many columns.
    Tile(usize),
    /// `gemm_stream`.
    Stream,
}

/// What the kernels need between calls.
pub(super) struct Hopper {
    dtype: DType,
    num_multiprocessors: usize,
    /// Sums that a block leaves for another one, and whether they are there.
    partial: Buffer,
    flags: Buffer,
}

impl Hopper {
    /// Returns none where the GPU's image lacks the kernels: it has them for compute capability 9.0.
    pub(super) fn new(driver: &Driver, dtype: DType) -> Result<Option<Self>> {
        let name = type_name(dtype)?;
        if !driver.has_kernel(&format!("gemm_tile_{name}_n{}", TILE_COLUMNS[0])) {
            return Ok(None);
        }
        for name in [name.to_owned(), format!("fp8_{name}")] {
            for columns in TILE_COLUMNS {
                for kernel in ["gemm_tile", "gemm_tile_silu"] {
                    let kernel = format!("{kernel}_{name}_n{columns}");
                    driver.allow_shared(&kernel, tile_bytes(columns))?;
                }
            }
            for rows in STREAM_ROWS {
                for kernel in [
                    format!("gemm_stream_{name}_t{rows}"),
                    format!("gemm_stream_{name}_f32out_t{rows}"),
                    format!("gemm_stream_silu_{name}_t{rows}"),
                ] {
                    driver.allow_shared(&kernel, stream_bytes(rows))?;
                }
            }
        }
        let num_blocks = driver.num_multiprocessors;
        let max_sums = num_blocks * MAX_STREAM_ROWS * STREAM_STEP;
        Ok(Some(Self {
            dtype,
            num_multiprocessors: num_blocks,
            partial: driver.allocate(max_sums * size_of::<f32>())?,
            flags: driver.allocate_zeroed(num_blocks * size_of::<u32>())?,
        }))
    }

    /// Returns the form that may be fastest for a product.
    ///
    /// Of prompts' rows cuBLASLt is ahead where it counts, in steps: of 8,192 rows at an H100's limit
    /// of power by 5 % for the down product, though alone and of zeros `gemm_tile` may be.
    pub(super) fn candidate(&self, product: &Product) -> Option<Form> {
        if !product.n.is_multiple_of(8) {
            return None;
        }
        match product.num_rows {
            0..=MAX_STREAM_ROWS => Some(Form::Stream),
            MIN_TILE_ROWS..=MAX_TUNED_ROWS if product.out_dtype == self.dtype => {
                Some(self.tile_of(product))
            }
            _ => None,
        }
    }

    /// Returns the form of `gemm_tile` whose waves of tiles waste least.
    fn tile_of(&self, product: &Product) -> Form {
        let cost = |columns| self.tiles_cost(product.num_rows, product.n, columns, columns);
        Form::Tile(cheapest(&TILE_COLUMNS, cost))
    }

    /// Returns the form that computes `silu(x Gᵀ) · (x Uᵀ)` for `n` outputs, or none where two
    /// kernels are faster.
    pub(super) fn silu_form(&self, num_rows: usize, n: usize) -> Option<Form> {
        let is_faster = n.is_multiple_of(8) && !(65..MIN_TILE_ROWS).contains(&num_rows);
        is_faster.then(|| self.any_silu_form(num_rows, n))
    }

    /// Returns the same for any number of rows and `n` a multiple of 8.
    pub(super) fn any_silu_form(&self, num_rows: usize, n: usize) -> Form {
        stream_form(num_rows).unwrap_or_else(|| {
            let cost = |columns| self.tiles_cost(num_rows, n, columns / 2, columns);
            Form::Tile(cheapest(&SILU_COLUMNS, cost))
        })
    }

    /// Returns all forms of `gemm_tile` with SiLU.
    pub(super) fn tiled_silu_forms() -> Vec<Form> {
        SILU_COLUMNS.map(Form::Tile).to_vec()
    }

    /// Returns the form for a product of FP8.
    pub(super) fn fp8_form(&self, product: &Product) -> Form {
        stream_form(product.num_rows).unwrap_or_else(|| self.tile_of(product))
    }

    /// Estimates the time of a product in tiles of `columns`, `out_columns` of the output.
    fn tiles_cost(&self, num_rows: usize, n: usize, out_columns: usize, columns: usize) -> usize {
        let num_tiles = num_rows.div_ceil(PAIR_ROWS) * n.div_ceil(out_columns);
        num_tiles.div_ceil(self.num_multiprocessors / 2) * (columns + TILE_OVERHEAD)
    }

    /// Returns what entry points call the product's types.
    fn type_names(&self, product: &Product) -> Result<String> {
        let fp8 = product.scales.map_or("", |_| "fp8_");
        Ok(format!("{fp8}{}", type_name(self.dtype)?))
    }

    /// Computes `x Wᵀ + bias`, and returns whether the residual was added; a form of
    /// [`Self::candidate`] or [`Self::fp8_form`].
    pub(super) fn multiply(&self, driver: &Driver, product: &Product, form: Form) -> Result<bool> {
        let name = self.type_names(product)?;
        let weight_rows = product.n;
        let mut operands = vec![Arg::Pointer(product.bias.unwrap_or(0))];
        match form {
            Form::Tile(columns) => {
                operands.push(Arg::Pointer(product.residual.unwrap_or(0)));
                operands.extend(scale_args(product));
                let kernel = format!("gemm_tile_{name}_n{columns}");
                self.launch_tile(driver, product, &kernel, columns, weight_rows, &operands)?;
                Ok(product.residual.is_some())
            }
            Form::Stream => {
                operands.extend(scale_args(product));
                let rows = stream_rows(product.num_rows);
                let kind = if product.out_dtype == DType::F32 {
                    "_f32out"
                } else {
                    ""
                };
                let kernel = format!("gemm_stream_{name}{kind}_t{rows}");
                let weight = weight_map(driver, product, weight_rows, STREAM_STEP)?;
                self.launch_stream(driver, product, &kernel, &weight, weight_rows, &operands)?;
                Ok(false)
            }
        }
    }

    /// Computes `silu(x Gᵀ) · (x Uᵀ)` for `n` outputs, G's rows before U's.
    pub(super) fn multiply_silu(
        &self,
        driver: &Driver,
        product: &Product,
        form: Form,
    ) -> Result<()> {
        let name = self.type_names(product)?;
        let weight_rows = 2 * product.n;
        let operands = scale_args(product);
        match form {
            Form::Tile(columns) => {
                let kernel = format!("gemm_tile_silu_{name}_n{columns}");
                self.launch_tile(driver, product, &kernel, columns, weight_rows, &operands)
            }
            Form::Stream => {
                let kernel = format!("gemm_stream_silu_{name}_t{}", stream_rows(product.num_rows));
                // Octets of gates and of ups in turn.
                let (n, k) = (product.n as u64, product.columns() as u64);
                let weight = driver.tensor_map(
                    product.weight,
                    [k, 8, 2, n / 8],
                    &[k, n * k, 8 * k],
                    [64, 8, 2, STREAM_STEP as u32 / 16],
                )?;
                self.launch_stream(driver, product, &kernel, &weight, weight_rows, &operands)
            }
        }
    }

    fn launch_tile(
        &self,
        driver: &Driver,
        product: &Product,
        kernel: &str,
        columns: usize,
        weight_rows: usize,
        operands: &[Arg],
    ) -> Result<()> {
        let x = rows_map(driver, product, PAIR_ROWS / 2)?;
        let weight = weight_map(driver, product, weight_rows, columns / 2)?;
        let mut args = vec![Arg::map(&x), Arg::map(&weight), Arg::Pointer(product.out)];
        args.extend(operands);
        args.extend(product.sizes());
        let geometry = Geometry {
            grid: [self.num_multiprocessors / 2 * 2, 1, 1],
            block: 384,
            shared_bytes: tile_bytes(columns),
        };
        driver.launch(kernel, geometry, &args)
    }

    fn launch_stream(
        &self,
        driver: &Driver,
        product: &Product,
        kernel: &str,
        weight: &TensorMap,
        weight_rows: usize,
        operands: &[Arg],
    ) -> Result<()> {
        let rows = stream_rows(product.num_rows);
        let x = rows_map(driver, product, rows)?;
        let num_steps = weight_rows.div_ceil(STREAM_STEP) * product.columns().div_ceil(STREAM_STEP);
        let mut args = vec![Arg::map(&x), Arg::map(weight), Arg::Pointer(product.out)];
        args.extend(operands);
        args.extend([&self.partial, &self.flags].map(|buffer| Arg::Pointer(buffer.address())));
        args.extend(product.sizes());
        let geometry = Geometry {
            grid: [num_steps.min(self.num_multiprocessors), 1, 1],
            block: 160,
            shared_bytes: stream_bytes(rows),
        };
        driver.launch(kernel, geometry, &args)
    }
}

/// Describes x in boxes of `box_rows` rows.
fn rows_map(driver: &Driver, product: &Product, box_rows: usize) -> Result<TensorMap> {
    driver.matrix_map(product.x, [product.num_rows, product.columns()], box_rows)
}

/// Describes W, which has `rows` rows, in boxes of `box_rows` rows.
fn weight_map(
    driver: &Driver,
    product: &Product,
    rows: usize,
    box_rows: usize,
) -> Result<TensorMap> {
    driver.matrix_map(product.weight, [rows, product.columns()], box_rows)
}

/// Returns the scales as the kernels take them, none of the computing type.
fn scale_args(product: &Product) -> Vec<Arg> {
    let scales = product.scales.map(|scales| [scales.x, scales.weight]);
    scales.into_iter().flatten().map(Arg::Pointer).collect()
}

/// Returns `gemm_stream` where it takes so many rows.
fn stream_form(num_rows: usize) -> Option<Form> {
    (num_rows <= MAX_STREAM_ROWS).then_some(Form::Stream)
}

/// Returns the choice of least cost, the first of equals.
fn cheapest(choices: &[usize], cost: impl Fn(usize) -> usize) -> usize {
    let cheapest = choices.iter().copied().min_by_key(|&choice| cost(choice));
    cheapest.unwrap_or(choices[0])
}

/// Returns the rows that the kernel for `num_rows` is compiled for.
fn stream_rows(num_rows: usize) -> usize {
    let fits = STREAM_ROWS.into_iter().find(|&rows| num_rows <= rows);
    fits.unwrap_or(MAX_STREAM_ROWS)
}

fn stream_bytes(rows: usize) -> u32 {
    let stage = 128 * (STREAM_STEP + rows);
    (1024 + 272 * rows + STREAM_RING_BYTES / stage * stage) as u32
}

fn tile_bytes(columns: usize) -> u32 {
    let stage = 128 * (128 + columns);
    (1024 + (TILE_RING_BYTES / stage).min(6) * stage) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_memory_is_what_the_kernels_have() {
        // 227 KiB a block; gemm_stream leaves room for a block of attention_decode (64 KiB) in a
        // multiprocessor's 228 KiB, of which 1 KiB a block is not to be had.
        for columns in TILE_COLUMNS {
            assert!(tile_bytes(columns) <= 227 << 10, "{columns}");
        }
        for rows in STREAM_ROWS {
            assert!(stream_bytes(rows) <= (228 - 64 - 2) << 10, "{rows}");
        }
        assert_eq!(tile_bytes(256), 1024 + 4 * 49_152);
        assert_eq!(stream_bytes(32), 1024 + 272 * 32 + 10 * 12_288);
    }

    #[test]
    fn up_to_64_rows_are_streamed() {
        let streamed = [1, 32, 33, 64, 65].map(|rows| stream_form(rows).is_some());
        assert_eq!(streamed, [true, true, true, true, false]);
    }

    #[test]
    fn rows_take_the_smallest_kernel_that_holds_them() {
        assert_eq!([1, 16, 17, 33, 64].map(stream_rows), [16, 16, 32, 64, 64]);
    }
}
