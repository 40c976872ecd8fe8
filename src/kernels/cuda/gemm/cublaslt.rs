//! cuBLASLt: its handle, and products described for it.

use std::ffi::c_void;
use std::ptr;

use candle_core::{DType, Result, bail};
use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;

use super::super::driver::{Address, Driver};
use super::super::memory::Buffer;
use super::Product;

pub(super) use sys::cublasLtMatmulAlgo_t as Algorithm;

const WORKSPACE_BYTES: usize = 64 << 20;
/// Algorithms that are tried for a shape.
const MAX_ALGORITHMS: usize = 8;

/// The library's handle and the memory that it works in.
pub(super) struct Library {
    dtype: DType,
    handle: sys::cublasLtHandle_t,
    workspace: Buffer,
}

// SAFETY: the handle may be used from any thread.
unsafe impl Send for Library {}
// SAFETY: as above.
unsafe impl Sync for Library {}

impl Library {
    pub(super) fn new(driver: &Driver, dtype: DType) -> Result<Self> {
        Ok(Self {
            dtype,
            handle: told("start", result::create_handle())?,
            workspace: driver.allocate(WORKSPACE_BYTES)?,
        })
    }

    /// Computes `product`, which `plan` was made for, with its residual, which is added before the
    /// sum is rounded.
    pub(super) fn run(&self, driver: &Driver, product: &Product, plan: &Plan) -> Result<()> {
        let alpha = 1f32;
        let beta = product.residual.map_or(0f32, |_| 1f32);
        let read = |address: Address| address as *const c_void;
        // SAFETY: the plan's layouts describe these operands; scalars are read before the call
        // returns.
        told("multiply", unsafe {
            result::matmul(
                self.handle,
                plan.product,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                read(product.weight),
                plan.weight,
                read(product.x),
                plan.x,
                read(product.residual.unwrap_or(product.out)),
                plan.out,
                product.out as *mut c_void,
                plan.out,
                &raw const plan.algorithm,
                self.workspace.address() as *mut c_void,
                WORKSPACE_BYTES,
                driver.stream().cast(),
            )
        })
    }

    /// Writes so much memory that nothing else is left in the GPU's cache.
    pub(super) fn flush_cache(&self, driver: &Driver) -> Result<()> {
        // SAFETY: the workspace is that long.
        unsafe { driver.zero(self.workspace.address(), WORKSPACE_BYTES) }
    }
}

impl Drop for Library {
    fn drop(&mut self) {
        // SAFETY: created by `new`, destroyed once.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

/// A product's descriptors and algorithm. cuBLASLt is column-major: it sees `out` as `[n, rows]`,
/// W as `[k, n]` transposed and x as `[k, rows]`.
pub(super) struct Plan {
    product: sys::cublasLtMatmulDesc_t,
    weight: sys::cublasLtMatrixLayout_t,
    x: sys::cublasLtMatrixLayout_t,
    out: sys::cublasLtMatrixLayout_t,
    pub(super) algorithm: Algorithm,
}

impl Plan {
    /// Describes a product; returns also the algorithms that may be fastest, best guess first.
    pub(super) fn new(library: &Library, product: &Product) -> Result<(Self, Vec<Algorithm>)> {
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        let cuda_type = |dtype| match dtype {
            DType::F32 => sys::cudaDataType::CUDA_R_32F,
            DType::F16 => sys::cudaDataType::CUDA_R_16F,
            _ => sys::cudaDataType::CUDA_R_16BF,
        };
        let (rows, n, k) = (product.num_rows as u64, product.n as u64, product.k as u64);
        let layout = |dtype, height: u64, width| {
            result::create_matrix_layout(cuda_type(dtype), height, width, height as i64)
        };
        let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let mut plan = Self {
            product: told(
                "plan",
                result::create_matmul_desc(compute, cuda_type(DType::F32)),
            )?,
            weight: told("plan", layout(library.dtype, k, n))?,
            x: told("plan", layout(library.dtype, k, rows))?,
            out: told("plan", layout(product.out_dtype, n, rows))?,
            // SAFETY: a plain C structure; overwritten below.
            algorithm: unsafe { std::mem::zeroed() },
        };
        // CUBLAS_OP_T, which the bindings of cuBLASLt leave out.
        let transposed = 1i32;
        plan.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &transposed)?;
        if let Some(bias) = product.bias {
            let epilogue = sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS as i32;
            plan.set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue)?;
            plan.set_bias(bias)?;
        }
        let preference = told("plan", result::create_matmul_pref())?;
        let limit = WORKSPACE_BYTES;
        let attribute =
            sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        // SAFETY: plain C structures; only those that the library fills are read.
        let mut found: [sys::cublasLtMatmulHeuristicResult_t; MAX_ALGORITHMS] =
            unsafe { std::mem::zeroed() };
        let mut num_found = 0;
        // SAFETY: all were created above; the attribute is a size_t; `found` has that length.
        let asked = unsafe {
            result::set_matmul_pref_attribute(
                preference,
                attribute,
                ptr::from_ref(&limit).cast(),
                size_of::<usize>(),
            )
            .and_then(|()| {
                sys::cublasLtMatmulAlgoGetHeuristic(
                    library.handle,
                    plan.product,
                    plan.weight,
                    plan.x,
                    plan.out,
                    plan.out,
                    preference,
                    MAX_ALGORITHMS as i32,
                    found.as_mut_ptr(),
                    &raw mut num_found,
                )
                .result()
            })
        };
        // SAFETY: created above.
        let _ = unsafe { result::destroy_matmul_pref(preference) };
        told("find an algorithm", asked)?;
        let usable = found[..num_found as usize]
            .iter()
            .filter(|result| result.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS);
        let algorithms: Vec<_> = usable.map(|result| result.algo).collect();
        let Some(first) = algorithms.first() else {
            bail!("cuBLASLt has no algorithm for a product of {rows} x {k} by {n} x {k}");
        };
        plan.algorithm = *first;
        Ok((plan, algorithms))
    }

    /// Returns whether an algorithm that was found for another number of rows fits.
    pub(super) fn accepts(&self, library: &Library, algorithm: &Algorithm) -> bool {
        // SAFETY: a plain C structure that the call fills; all else lives.
        unsafe {
            let mut found: sys::cublasLtMatmulHeuristicResult_t = std::mem::zeroed();
            let checked = sys::cublasLtMatmulAlgoCheck(
                library.handle,
                self.product,
                self.weight,
                self.x,
                self.out,
                self.out,
                ptr::from_ref(algorithm),
                &raw mut found,
            );
            checked.result().is_ok() && found.workspaceSize <= WORKSPACE_BYTES
        }
    }

    pub(super) fn set_bias(&self, bias: Address) -> Result<()> {
        self.set(
            sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER,
            &bias,
        )
    }

    fn set<T>(&self, attribute: sys::cublasLtMatmulDescAttributes_t, value: &T) -> Result<()> {
        // SAFETY: the descriptor lives, and the library copies the value.
        told("plan", unsafe {
            result::set_matmul_desc_attribute(
                self.product,
                attribute,
                ptr::from_ref(value).cast(),
                size_of::<T>(),
            )
        })
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: created by `new`, destroyed once.
        unsafe {
            for layout in [self.weight, self.x, self.out] {
                let _ = result::destroy_matrix_layout(layout);
            }
            let _ = result::destroy_matmul_desc(self.product);
        }
    }
}

fn told<T>(what: &str, result: std::result::Result<T, CublasError>) -> Result<T> {
    result.map_err(|error| candle_core::Error::Msg(format!("cuBLASLt cannot {what}: {error}")))
}
