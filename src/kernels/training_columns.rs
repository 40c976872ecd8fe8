//! Operations of training on columns and rows as a whole: factors, sums, norms.

use super::check::{self, F32View};
use super::cpu::{self, CpuMatrix, ScaledColumns};
use super::{Kernels, Matrix, MatrixData};
use candle_core::{Result, Tensor, bail};
use std::sync::Arc;

impl Kernels {
    /// Returns the matrix `[rows, cols]` that begins at `offset` of `values`, which it shares.
    ///
    /// # Errors
    /// When `values` end before the matrix does.
    pub fn share_matrix(
        &self,
        values: &Arc<Vec<f32>>,
        offset: usize,
        [rows, cols]: [usize; 2],
    ) -> Result<Matrix> {
        let end = offset + rows * cols;
        if end > values.len() {
            bail!("a matrix up to element {end} of {}", values.len());
        }
        let matrix = CpuMatrix::share(Arc::clone(values), offset, [rows, cols])?;
        Ok(Matrix(MatrixData::Cpu(matrix)))
    }

    /// Returns `x: [m, n]` with each column times its factor `[n]`, plus its `bias` `[n]`, plus
    /// `sum: [m, n]`, where given.
    ///
    /// # Errors
    /// When shapes or dtypes disagree.
    pub fn scale_columns(
        &self,
        x: &Tensor,
        factors: &[f32],
        bias: Option<&[f32]>,
        sum: Option<&Tensor>,
    ) -> Result<Tensor> {
        let width = factors.len();
        let num_rows = check::rows_of("x", x, width)?;
        check::has_len("bias", bias.map_or(width, <[f32]>::len), width)?;
        let sum = sum
            .map(|sum| F32View::shaped("sum", sum, x.dims()))
            .transpose()?;
        let x = F32View::new("x", x)?;
        let columns = ScaledColumns {
            x: x.get(),
            factors,
            bias,
            sum: sum.as_ref().map(F32View::get),
        };
        self.tensor(cpu::scale_columns(self.get(), &columns), [num_rows, width])
    }

    /// Returns for each column of `a: [m, n]` the sum over rows of `a * b`, or of `a` alone.
    ///
    /// # Errors
    /// When shapes or dtypes disagree.
    pub fn column_dots(&self, a: &Tensor, b: Option<&Tensor>) -> Result<Vec<f32>> {
        let width = a.dims2()?.1;
        let b = b.map(|b| F32View::shaped("b", b, a.dims())).transpose()?;
        let a = F32View::new("a", a)?;
        let b = b.as_ref().map(F32View::get);
        Ok(cpu::column_dots(self.get(), a.get(), b, width))
    }

    /// Returns the norm of each row of `weight + scale * b * a`, `[out]`, for `a: [rank, in]` and
    /// `b: [out, rank]`; of the weight alone without them.
    ///
    /// # Errors
    /// When shapes or dtypes disagree.
    pub fn row_norms(
        &self,
        weight: &Matrix,
        factors: Option<(&Tensor, &Tensor)>,
        scale: f32,
    ) -> Result<Vec<f32>> {
        let Some((a, b)) = factors else {
            return Ok(cpu::row_norms(self.get(), weight.cpu()?, (&[], &[]), scale));
        };
        let rank = check::rows_of("a", a, weight.cols())?;
        let b = F32View::shaped("b", b, &[weight.rows(), rank])?;
        let a = F32View::new("a", a)?;
        let factors = (a.get(), b.get());
        Ok(cpu::row_norms(self.get(), weight.cpu()?, factors, scale))
    }
}
