//! Tensors as compute capability 9.0's tensor memory accelerator (TMA) sees them.
//!
//! `hopper.cuh` has what copies their boxes to shared memory. A map is plain data: the driver packs
//! sizes, strides and the address, and nothing is read from there before a kernel copies.

use std::ffi::c_void;
use std::ptr::from_ref;

use candle_core::Result;
use cudarc::driver::sys;

use super::driver::{Address, Arg, Driver, told};

/// Columns of a box of a matrix: with 16 bits each, the 128 bytes of the swizzle.
const BOX_COLUMNS: u32 = 64;
/// Dimensions that a map may have.
const MAX_RANK: usize = 5;

/// A tensor of 16-bit elements; kernels take it by value.
pub(super) type TensorMap = sys::CUtensorMap;

impl Arg {
    /// Returns the parameter for a map, which lives until the launch has returned.
    pub(super) fn map(map: &TensorMap) -> Self {
        Self::Structure(from_ref(map).cast())
    }
}

impl Driver {
    /// Describes a row-major matrix `[rows, columns]` of 16-bit elements, of which kernels copy
    /// boxes of `box_rows` rows and 64 columns.
    ///
    /// # Errors
    /// As [`Self::tensor_map`].
    pub(super) fn matrix_map(
        &self,
        address: Address,
        [rows, columns]: [usize; 2],
        box_rows: usize,
    ) -> Result<TensorMap> {
        let columns = columns as u64;
        let box_sizes = [BOX_COLUMNS, box_rows as u32];
        self.tensor_map(address, [columns, rows as u64], &[columns], box_sizes)
    }

    /// Describes a tensor of 16-bit elements: sizes and the boxes that kernels copy with the
    /// 128-byte swizzle, innermost dimension first, and the strides of the other dimensions in
    /// elements. Kernels find zeros outside.
    ///
    /// # Errors
    /// When `address` or a stride is not on 16 bytes or a size is over the driver's limits.
    ///
    /// # Panics
    /// When there is not one stride fewer than sizes, or more than 5 of these.
    pub(super) fn tensor_map<const RANK: usize>(
        &self,
        address: Address,
        sizes: [u64; RANK],
        strides: &[u64],
        box_sizes: [u32; RANK],
    ) -> Result<TensorMap> {
        assert!(
            strides.len() + 1 == RANK && RANK <= MAX_RANK,
            "{RANK} sizes and {} strides",
            strides.len()
        );
        self.bind()?;
        let mut stride_bytes = [0; MAX_RANK];
        for (bytes, stride) in stride_bytes.iter_mut().zip(strides) {
            *bytes = 2 * stride;
        }
        let mut map = TensorMap { opaque: [0; 16] };
        // SAFETY: the arrays have RANK elements or more (checked above for strides), and the call
        // only reads them and fills the map.
        let encoded = unsafe {
            sys::cuTensorMapEncodeTiled(
                &raw mut map,
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT16,
                RANK as u32,
                address as *mut c_void,
                sizes.as_ptr(),
                stride_bytes.as_ptr(),
                box_sizes.as_ptr(),
                [1; MAX_RANK].as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        told("describe a tensor for TMA", encoded.result())?;
        Ok(map)
    }
}
