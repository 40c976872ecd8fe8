//! FP8: matrices of E4M3 elements with one `f32` scale a row, of weights and of activations.

use candle_core::Result;

use super::driver::{Address, Arg, Driver, Geometry};

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
