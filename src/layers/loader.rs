//! Takes tensors out of a checkpoint for one rank: looks up, checks the shape, cuts, packs.

use std::ops::Range;

use candle_core::Tensor;

use crate::kernels::{Kernels, Matrix};
use crate::weights::{StoredTensor, TensorSource};

use super::LayerError;

/// A checkpoint seen by one rank, at a name prefix as `model.layers.3.mlp`.
#[derive(Clone)]
pub struct Loader<'a> {
    checkpoint: &'a dyn TensorSource,
    kernels: &'a Kernels,
    rank: usize,
    world_size: usize,
    prefix: String,
}

impl<'a> Loader<'a> {
    /// Creates a loader at the root of `checkpoint`.
    pub fn new(
        checkpoint: &'a dyn TensorSource,
        kernels: &'a Kernels,
        rank: usize,
        world_size: usize,
    ) -> Self {
        Self {
            checkpoint,
            kernels,
            rank,
            world_size,
            prefix: String::new(),
        }
    }

    /// Returns the loader one name further down.
    #[must_use]
    pub fn at(&self, name: impl std::fmt::Display) -> Self {
        let prefix = self.name_of(name);
        Self {
            prefix,
            ..self.clone()
        }
    }

    /// Returns the name that this loader stands at.
    pub fn name(&self) -> &str {
        &self.prefix
    }

    /// Returns this rank's place in the group.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Returns the number of ranks that share the model.
    pub fn world_size(&self) -> usize {
        self.world_size
    }

    /// Returns the kernels that the weights are packed for.
    pub fn kernels(&self) -> &'a Kernels {
        self.kernels
    }

    /// Loads rows and columns of the matrix `name`, whose whole shape must be `shape`.
    ///
    /// # Errors
    /// [`LayerError`] naming the tensor.
    pub fn matrix(
        &self,
        name: &str,
        shape: [usize; 2],
        rows: Range<usize>,
        cols: Range<usize>,
    ) -> Result<Matrix, LayerError> {
        let StoredTensor { dtype, data, .. } = self.part(name, shape, &rows, &cols)?;
        self.kernels
            .load_matrix(dtype, rows.len(), cols.len(), data)
            .map_err(|source| self.kernel_error(name, source))
    }

    /// Loads as [`Self::matrix`] a weight that the kernels may quantise.
    ///
    /// # Errors
    /// [`LayerError`] naming the tensor.
    pub fn linear(
        &self,
        name: &str,
        shape: [usize; 2],
        rows: Range<usize>,
        cols: Range<usize>,
    ) -> Result<Matrix, LayerError> {
        let StoredTensor { dtype, data, .. } = self.part(name, shape, &rows, &cols)?;
        self.kernels
            .load_linear(dtype, rows.len(), cols.len(), data)
            .map_err(|source| self.kernel_error(name, source))
    }

    fn part(
        &self,
        name: &str,
        shape: [usize; 2],
        rows: &Range<usize>,
        cols: &Range<usize>,
    ) -> Result<StoredTensor, LayerError> {
        let tensor = self.tensor(name, &shape)?;
        let tensor = cut(tensor, 0, shape[0], rows)?;
        cut(tensor, 1, shape[1], cols)
    }

    /// Loads entries of the vector `name` of `len` values as f32.
    ///
    /// # Errors
    /// [`LayerError`] naming the tensor.
    pub fn vector(
        &self,
        name: &str,
        len: usize,
        range: Range<usize>,
    ) -> Result<Tensor, LayerError> {
        let tensor = cut(self.tensor(name, &[len])?, 0, len, &range)?;
        self.kernels
            .load_vector(tensor.dtype, range.len(), &tensor.data)
            .map_err(|source| self.kernel_error(name, source))
    }

    fn tensor(&self, name: &str, shape: &[usize]) -> Result<StoredTensor, LayerError> {
        let tensor = self.checkpoint.tensor(&self.name_of(name))?;
        tensor.expect_shape(shape)?;
        Ok(tensor)
    }

    fn name_of(&self, name: impl std::fmt::Display) -> String {
        if self.prefix.is_empty() {
            name.to_string()
        } else {
            format!("{}.{name}", self.prefix)
        }
    }

    fn kernel_error(&self, name: &str, source: candle_core::Error) -> LayerError {
        LayerError::Kernel {
            tensor: self.name_of(name),
            source,
        }
    }
}

/// Cuts `range` out of dimension `dim` of size `size`; the whole range costs nothing.
fn cut(
    tensor: StoredTensor,
    dim: usize,
    size: usize,
    range: &Range<usize>,
) -> Result<StoredTensor, LayerError> {
    if *range == (0..size) {
        return Ok(tensor);
    }
    Ok(tensor.narrow(dim, range.clone())?)
}
