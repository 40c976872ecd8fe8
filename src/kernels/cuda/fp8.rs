//! FP8: matrices of E4M3 elements with one `f32` scale a row, of weights and of activations.
//!
//! Weights are quantised while they are loaded. What they multiply is quantised by the norm that
//! made it, or else before the product.

use std::sync::{MutexGuard, PoisonError};

use candle_core::{Result, Tensor};

use super::activations::Lifetime;
use super::driver::{Address, Arg, Driver, Geometry};
use super::norm::norm_form;
use super::weights::GpuMatrix;
use super::{Gpu, Quantization};

/// What an FP8 product divides evenly: rows of a weight, and columns, which begin on 16 bytes.
pub(super) const ROW_MULTIPLE: usize = 8;
pub(super) const COLUMN_MULTIPLE: usize = 16;

/// Where the scales of a product's operands lie.
#[derive(Clone, Copy)]
pub(super) struct Scales {
    /// One a row of x.
    pub(super) x: Address,
    /// One a row of the weight.
    pub(super) weight: Address,
}

/// E4M3 rows of activations and their scales.
#[derive(Clone, Copy)]
struct Quantized {
    elements: Address,
    scales: Address,
}

/// What a norm has quantised beside its output.
pub(super) struct Prepared {
    /// The output.
    x: Address,
    shape: [usize; 2],
    quantized: Quantized,
}

/// Where `quantize_rows` reads and writes.
pub(super) struct Rows {
    /// Elements `[rows, cols]` of the type that the kernel's name ends with.
    pub(super) x: Address,
    /// E4M3 `[rows, cols]`.
    pub(super) out: Address,
    /// `f32 [rows]`.
    pub(super) scales: Address,
    pub(super) shape: [usize; 2],
}

/// Quantises rows of `from` (`f32`, `f16` or `bf16`).
///
/// # Errors
/// When the launch is refused.
pub(super) fn quantize_rows(driver: &Driver, from: &str, rows: &Rows) -> Result<()> {
    let [num_rows, cols] = rows.shape;
    let block = (cols / 8).next_multiple_of(32).min(1024);
    let args = [
        Arg::Pointer(rows.out),
        Arg::Pointer(rows.scales),
        Arg::Pointer(rows.x),
        Arg::I32(cols as i32),
    ];
    let name = format!("quantize_rows_{from}");
    driver.launch(&name, Geometry::new([num_rows, 1, 1], block), &args)
}

/// Returns the length of E4M3 rows and, behind them, their scales, in elements of two bytes.
fn quantized_len([rows, cols]: [usize; 2]) -> usize {
    rows * cols / 2 + 2 * rows
}

impl Gpu {
    /// Returns where a product with `weight` reads `x`: where it lies, or quantised with its
    /// scales, which the next tensor with [`Lifetime::Call`] may overwrite.
    pub(super) fn operand(
        &self,
        x: &Tensor,
        num_rows: usize,
        weight: &GpuMatrix,
    ) -> Result<(Address, Option<Scales>)> {
        let x = self.address("x", x, self.dtype)?;
        let Some(weight_scales) = weight.scales() else {
            return Ok((x, None));
        };
        let shape = [num_rows, weight.cols];
        let prepared = self.prepared();
        let is_this = |prepared: &&Prepared| (prepared.x, prepared.shape) == (x, shape);
        let quantized = match prepared.as_ref().filter(is_this) {
            Some(prepared) => prepared.quantized,
            None => {
                let quantized = self.new_quantized(shape, Lifetime::Call)?;
                let rows = Rows {
                    x,
                    out: quantized.elements,
                    scales: quantized.scales,
                    shape,
                };
                quantize_rows(&self.driver, self.type_name, &rows)?;
                quantized
            }
        };
        let scales = Scales {
            x: quantized.scales,
            weight: weight_scales,
        };
        Ok((quantized.elements, Some(scales)))
    }

    /// Makes room for E4M3 rows and their scales.
    fn new_quantized(&self, shape: [usize; 2], life: Lifetime) -> Result<Quantized> {
        let (_, elements) = self.new_activation([1, quantized_len(shape)], life)?;
        Ok(Quantized {
            elements,
            scales: elements + (shape[0] * shape[1]) as Address,
        })
    }

    /// Returns the name of a norm that writes to `x`, and where it quantises that too, if FP8
    /// products are to read it.
    pub(super) fn norm_outputs(
        &self,
        name: &str,
        x: Address,
        shape: [usize; 2],
    ) -> Result<(String, Vec<Arg>)> {
        let mut outputs = vec![Arg::Pointer(x)];
        let is_fp8 =
            self.quantization == Quantization::Fp8 && shape[1].is_multiple_of(COLUMN_MULTIPLE);
        let wide = norm_form(shape[1]);
        if !is_fp8 {
            return Ok((format!("{name}_{}{wide}", self.type_name), outputs));
        }
        // Norms of a group's sums do not quantise, and they come after the largest step.
        self.activations
            .expect(quantized_len(shape), Lifetime::Call);
        let quantized = self.new_quantized(shape, Lifetime::Layer)?;
        outputs.extend([quantized.elements, quantized.scales].map(Arg::Pointer));
        *self.prepared() = Some(Prepared {
            x,
            shape,
            quantized,
        });
        Ok((format!("{name}_fp8_{}{wide}", self.type_name), outputs))
    }

    /// Returns what this layer's last norm has quantised.
    pub(super) fn prepared(&self) -> MutexGuard<'_, Option<Prepared>> {
        self.prepared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_lie_behind_the_elements() {
        // 3 rows of 16 bytes and 3 of 4 bytes.
        assert_eq!(2 * quantized_len([3, 16]), 3 * 16 + 3 * 4);
    }
}
