//! What kernels ask of their tensors, checked once at the border.

use candle_core::{CpuStorage, Result, Storage, StorageRef, Tensor, bail};

/// The data of a contiguous `f32` CPU tensor, locked for reading.
pub(super) struct F32View<'a> {
    storage: StorageRef<'a>,
    start: usize,
    len: usize,
}

impl<'a> F32View<'a> {
    /// Borrows a tensor's data.
    ///
    /// # Errors
    ///
    /// When the tensor is not contiguous, not `f32` or not on the CPU; `name` names it.
    pub(super) fn new(name: &str, tensor: &'a Tensor) -> Result<Self> {
        let (storage, layout) = tensor.storage_and_layout();
        let Some((start, end)) = layout.contiguous_offsets() else {
            bail!("{name} must be contiguous, got {layout:?}");
        };
        let Storage::Cpu(CpuStorage::F32(_)) = &*storage else {
            let (dtype, device) = (tensor.dtype(), tensor.device());
            bail!("{name} must be f32 on the CPU, got {dtype:?} on {device:?}");
        };
        let len = end - start;
        Ok(Self {
            storage,
            start,
            len,
        })
    }

    /// Borrows the data of a tensor that must have the given shape.
    pub(super) fn shaped(name: &str, tensor: &'a Tensor, dims: &[usize]) -> Result<Self> {
        if tensor.dims() != dims {
            bail!("{name} must have shape {dims:?}, got {:?}", tensor.dims());
        }
        Self::new(name, tensor)
    }

    /// Returns the elements.
    pub(super) fn get(&self) -> &[f32] {
        match &*self.storage {
            Storage::Cpu(CpuStorage::F32(data)) => &data[self.start..self.start + self.len],
            // `new` has let no other storage in.
            _ => &[],
        }
    }
}

/// Returns the two dimensions of a matrix of activations, whose columns must be `cols`.
pub(super) fn rows_of(name: &str, tensor: &Tensor, cols: usize) -> Result<usize> {
    match tensor.dims() {
        &[rows, width] if width == cols => Ok(rows),
        dims => bail!("{name} must have shape [_, {cols}], got {dims:?}"),
    }
}

/// Checks that each of `values` is below `limit`.
pub(super) fn all_below(name: &str, values: &[u32], limit: usize) -> Result<()> {
    match values.iter().find(|&&value| value as usize >= limit) {
        Some(value) => bail!("{name} {value} is not below {limit}"),
        None => Ok(()),
    }
}

/// Checks that no value occurs twice.
pub(super) fn all_distinct(name: &str, values: &[u32]) -> Result<()> {
    let mut sorted = values.to_vec();
    // Slots come in rising runs, which this sort passes over in linear time.
    sorted.sort();
    match sorted.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => bail!("{name} {} occurs twice", pair[0]),
        None => Ok(()),
    }
}

/// Checks the length of a list.
pub(super) fn has_len(name: &str, got: usize, want: usize) -> Result<()> {
    if got != want {
        bail!("{name} must have {want} elements, got {got}");
    }
    Ok(())
}

/// Checks offsets: `num + 1` of them, rising from 0 to `total`.
pub(super) fn is_offsets(name: &str, offsets: &[u32], num: usize, total: usize) -> Result<()> {
    has_len(name, offsets.len(), num + 1)?;
    let is_rising = offsets.windows(2).all(|pair| pair[0] <= pair[1]);
    let ends = (offsets[0] as usize, offsets[num] as usize);
    if !is_rising || ends != (0, total) {
        bail!("{name} must rise from 0 to {total}, got {offsets:?}");
    }
    Ok(())
}

/// The data of an `f32` CPU matrix whose rows, or columns, are contiguous.
pub(super) struct F32Matrix<'a> {
    storage: StorageRef<'a>,
    start: usize,
    dims: [usize; 2],
    stride: usize,
    is_transposed: bool,
}

impl<'a> F32Matrix<'a> {
    /// Borrows a matrix's data.
    ///
    /// # Errors
    ///
    /// When it is not two-dimensional, neither stride is 1, or it is not `f32` on the CPU;
    /// `name` names it.
    pub(super) fn new(name: &str, tensor: &'a Tensor) -> Result<Self> {
        let (rows, cols) = tensor.dims2()?;
        let (storage, layout) = tensor.storage_and_layout();
        let (stride, is_transposed) = match *layout.stride() {
            [stride, 1] => (stride, false),
            [stride, _] if cols == 1 => (stride, false),
            [1, stride] => (stride, true),
            [_, stride] if rows == 1 => (stride, true),
            _ => bail!("{name} must have contiguous rows or columns, got {layout:?}"),
        };
        let Storage::Cpu(CpuStorage::F32(_)) = &*storage else {
            let (dtype, device) = (tensor.dtype(), tensor.device());
            bail!("{name} must be f32 on the CPU, got {dtype:?} on {device:?}");
        };
        let start = layout.start_offset();
        Ok(Self {
            storage,
            start,
            dims: [rows, cols],
            stride,
            is_transposed,
        })
    }

    /// Returns rows and columns.
    pub(super) fn dims(&self) -> [usize; 2] {
        self.dims
    }

    /// Returns the elements between two rows, or two columns of a transposed matrix.
    pub(super) fn stride(&self) -> usize {
        self.stride
    }

    /// Says whether columns are contiguous, not rows.
    pub(super) fn is_transposed(&self) -> bool {
        self.is_transposed
    }

    /// Returns the elements from the matrix's first on.
    pub(super) fn get(&self) -> &[f32] {
        match &*self.storage {
            Storage::Cpu(CpuStorage::F32(data)) => &data[self.start..],
            // `new` has let no other storage in.
            _ => &[],
        }
    }
}
