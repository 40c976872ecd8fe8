//! `gemm_small`: up to 16 rows of x, any GPU.

use candle_core::{DType, Result};

use super::super::driver::{Arg, Driver, Geometry};
use super::super::weights::type_name;
use super::Product;

/// Rows of x that `gemm_small` takes.
const MAX_ROWS: usize = 16;

/// Forms of `gemm_small`.
#[derive(Clone, Copy)]
pub(in super::super) enum Form {
    Wide,
    Deep,
    Rows32,
}

impl Form {
    /// Returns the form for a product with `n` rows of W, or none where others are ahead.
    pub(super) fn of(num_rows: usize, n: usize, k: usize) -> Option<Self> {
        match num_rows {
            0..=8 if n >= 4096 => Some(Self::Wide),
            0..=8 => Some(Self::Deep),
            9..=MAX_ROWS if n >= 16384 => Some(Self::Rows32),
            9..=MAX_ROWS if n <= 4096 && k <= 4096 => Some(Self::Deep),
            _ => None,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Wide => "wide",
            Self::Deep => "deep",
            Self::Rows32 => "r32",
        }
    }

    /// Returns how a product with `n` rows of W is launched.
    fn geometry(self, n: usize) -> Geometry {
        let (rows, block, shared_bytes) = match self {
            Self::Wide => (16, 256, 65_536),
            Self::Deep => (16, 256, 98_304),
            Self::Rows32 => (32, 128, 65_536),
        };
        Geometry {
            grid: [n.div_ceil(rows), 1, 1],
            block,
            shared_bytes,
        }
    }

    /// Lets all kernels have their shared memory.
    pub(super) fn prepare(driver: &Driver, dtype: DType) -> Result<()> {
        let name = type_name(dtype)?;
        for form in [Self::Wide, Self::Deep, Self::Rows32] {
            for tokens in [8, 16] {
                let (form, bytes) = (form.name(), form.geometry(1).shared_bytes);
                for kernel in [
                    format!("gemm_small_{name}_t{tokens}_{form}"),
                    format!("gemm_small_{name}_f32out_t{tokens}_{form}"),
                    format!("gemm_small_silu_{name}_t{tokens}_{form}"),
                ] {
                    driver.allow_shared(&kernel, bytes)?;
                }
            }
        }
        Ok(())
    }

    pub(super) fn multiply(self, driver: &Driver, dtype: DType, product: &Product) -> Result<()> {
        let is_f32 = product.out_dtype == DType::F32;
        let name = format!(
            "gemm_small_{}{}_t{}_{}",
            type_name(dtype)?,
            if is_f32 { "_f32out" } else { "" },
            if product.num_rows <= 8 { 8 } else { 16 },
            self.name()
        );
        let mut args = vec![
            Arg::Pointer(product.out),
            Arg::Pointer(product.x),
            Arg::Pointer(product.weight),
            Arg::Pointer(product.bias.unwrap_or(0)),
        ];
        if !is_f32 {
            // No residual: of so few rows the norm behind adds it for nothing.
            args.push(Arg::Pointer(0));
        }
        args.extend(product.sizes());
        driver.launch(&name, self.geometry(product.n), &args)
    }

    /// Computes `silu(x Gᵀ) · (x Uᵀ)` for `n` outputs.
    pub(super) fn multiply_silu(
        self,
        driver: &Driver,
        dtype: DType,
        product: &Product,
    ) -> Result<()> {
        let name = format!(
            "gemm_small_silu_{}_t{}_{}",
            type_name(dtype)?,
            if product.num_rows <= 8 { 8 } else { 16 },
            self.name()
        );
        let mut args = vec![
            Arg::Pointer(product.out),
            Arg::Pointer(product.x),
            Arg::Pointer(product.weight),
        ];
        args.extend(product.sizes());
        driver.launch(&name, self.geometry(2 * product.n), &args)
    }
}
