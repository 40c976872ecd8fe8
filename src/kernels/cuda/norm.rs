//! RMSNorm, alone or after adding a residual (`norm.cu`), and how norms are launched.

use candle_core::{Result, Tensor};

use super::super::check;
use super::Gpu;
use super::driver::{Arg, Geometry};

/// Threads of a norm's block, at most.
const MAX_NORM_THREADS: usize = 1024;

impl Gpu {
    pub(in crate::kernels) fn rms_norm(
        &self,
        x: &Tensor,
        weight: &Tensor,
        eps: f32,
    ) -> Result<Tensor> {
        let width = weight.elem_count();
        let num_rows = check::rows_of("x", x, width)?;
        let (tensor, out) = self.new_tensor([num_rows, width])?;
        let (name, mut args) = self.norm_outputs("rms_norm", out, [num_rows, width])?;
        args.extend([
            Arg::Pointer(self.address("x", x, self.dtype)?),
            Arg::Pointer(self.address("the norm's weight", weight, self.dtype)?),
            Arg::F32(eps),
            Arg::I32(width as i32),
        ]);
        self.driver
            .launch(&name, norm_geometry(num_rows, width), &args)?;
        Ok(tensor)
    }

    pub(in crate::kernels) fn add_rms_norm(
        &self,
        x: &Tensor,
        residual: &Tensor,
        weight: &Tensor,
        eps: f32,
    ) -> Result<(Tensor, Tensor)> {
        let width = weight.elem_count();
        let num_rows = check::rows_of("x", x, width)?;
        check::rows_of("residual", residual, width)?;
        let (tensor, out) = self.new_tensor([num_rows, width])?;
        let (sum_tensor, sum) = self.new_tensor([num_rows, width])?;
        let (name, mut args) = self.norm_outputs("add_rms_norm", out, [num_rows, width])?;
        args.extend([
            Arg::Pointer(sum),
            Arg::Pointer(self.address("x", x, self.dtype)?),
            Arg::Pointer(self.address("residual", residual, self.dtype)?),
            Arg::Pointer(self.address("the norm's weight", weight, self.dtype)?),
            Arg::F32(eps),
            Arg::I32(width as i32),
        ]);
        self.driver
            .launch(&name, norm_geometry(num_rows, width), &args)?;
        Ok((tensor, sum_tensor))
    }
}

/// One block a row, which holds the row in registers: eight elements a thread, of a
/// [`norm_form`] up to 32.
pub(super) fn norm_geometry(num_rows: usize, width: usize) -> Geometry {
    let block = width.div_ceil(8).next_multiple_of(32).min(MAX_NORM_THREADS);
    Geometry::new([num_rows, 1, 1], block)
}

/// Returns the end of a norm's name: the entry points without one have one vector a thread.
pub(super) fn norm_form(width: usize) -> &'static str {
    match width.div_ceil(8) {
        ..=MAX_NORM_THREADS => "",
        _ => "_wide",
    }
}
