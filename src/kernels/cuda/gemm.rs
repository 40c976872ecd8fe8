//! Products `x Wᵀ`: our own kernels where few rows of x wait for the weights, cuBLASLt above.
//!
//! Which is faster where was measured on an H200 with Qwen2.5-7B's shapes (docs/gpu_log.md): up
//! to 8 rows own kernels throughout; up to 16 for the widest and the narrowest products.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::c_void;
use std::ptr;
use std::sync::{Mutex, PoisonError};

use candle_core::{DType, Result};
use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;

use super::driver::{Address, Arg, Buffer, Driver, Geometry};
use super::weights::type_name;

const WORKSPACE_BYTES: usize = 64 << 20;
/// Rows of x that `gemm_small` takes.
pub(super) const MAX_SMALL_ROWS: usize = 16;

/// One product.
#[derive(Clone, Copy)]
pub(super) struct Product {
    pub(super) out: Address,
    pub(super) x: Address,
    pub(super) weight: Address,
    pub(super) bias: Option<Address>,
    /// Rows of x.
    pub(super) num_rows: usize,
    /// Rows of W.
    pub(super) n: usize,
    /// Columns of both.
    pub(super) k: usize,
    /// `F32` (logits) or the computing type.
    pub(super) out_dtype: DType,
}

/// Forms of `gemm_small`.
#[derive(Clone, Copy)]
enum Form {
    Wide,
    Deep,
    Rows32,
}

impl Form {
    /// Returns the form for a product, or none where cuBLASLt is ahead.
    fn of(num_rows: usize, n: usize, k: usize) -> Option<Self> {
        match num_rows {
            0..=8 if n >= 4096 => Some(Self::Wide),
            0..=8 => Some(Self::Deep),
            9..=MAX_SMALL_ROWS if n >= 16384 => Some(Self::Rows32),
            9..=MAX_SMALL_ROWS if n <= 4096 && k <= 4096 => Some(Self::Deep),
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
}

/// Our kernels' type, cuBLASLt's handle and the algorithms that it chose.
pub(super) struct Gemm {
    dtype: DType,
    handle: sys::cublasLtHandle_t,
    workspace: Buffer,
    plans: Mutex<HashMap<[usize; 5], Plan>>,
}

// SAFETY: cuBLASLt's handle may be used from any thread; plans are behind a lock.
unsafe impl Send for Gemm {}
// SAFETY: as above.
unsafe impl Sync for Gemm {}

impl Gemm {
    pub(super) fn new(driver: &Driver, dtype: DType) -> Result<Self> {
        let name = type_name(dtype)?;
        for form in [Form::Wide, Form::Deep, Form::Rows32] {
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
        Ok(Self {
            dtype,
            handle: told("start", result::create_handle())?,
            workspace: driver.allocate(WORKSPACE_BYTES)?,
            plans: Mutex::new(HashMap::new()),
        })
    }

    /// Computes `x Wᵀ + bias`.
    pub(super) fn multiply(&self, driver: &Driver, product: &Product) -> Result<()> {
        let &Product { num_rows, n, k, .. } = product;
        match Form::of(num_rows, n, k) {
            Some(form) => self.multiply_small(driver, product, form),
            None => self.multiply_large(driver, product),
        }
    }

    fn multiply_small(&self, driver: &Driver, product: &Product, form: Form) -> Result<()> {
        let is_f32 = product.out_dtype == DType::F32;
        let name = format!(
            "gemm_small_{}{}_t{}_{}",
            type_name(self.dtype)?,
            if is_f32 { "_f32out" } else { "" },
            if product.num_rows <= 8 { 8 } else { 16 },
            form.name()
        );
        let mut args = vec![
            Arg::Pointer(product.out),
            Arg::Pointer(product.x),
            Arg::Pointer(product.weight),
            Arg::Pointer(product.bias.unwrap_or(0)),
        ];
        if !is_f32 {
            // No residual.
            args.push(Arg::Pointer(0));
        }
        args.extend([product.num_rows, product.n, product.k].map(|v| Arg::I32(v as i32)));
        driver.launch(&name, form.geometry(product.n), &args)
    }

    /// Computes `silu(x Gᵀ) · (x Uᵀ)` for `n` outputs, where a kernel of ours does so; else
    /// returns false.
    pub(super) fn multiply_silu(&self, driver: &Driver, product: &Product) -> Result<bool> {
        let &Product { num_rows, n, k, .. } = product;
        let Some(form) = Form::of(num_rows, 2 * n, k) else {
            return Ok(false);
        };
        let name = format!(
            "gemm_small_silu_{}_t{}_{}",
            type_name(self.dtype)?,
            if num_rows <= 8 { 8 } else { 16 },
            form.name()
        );
        let args = [
            Arg::Pointer(product.out),
            Arg::Pointer(product.x),
            Arg::Pointer(product.weight),
            Arg::I32(num_rows as i32),
            Arg::I32(n as i32),
            Arg::I32(k as i32),
        ];
        driver.launch(&name, form.geometry(2 * n), &args)?;
        Ok(true)
    }

    fn multiply_large(&self, driver: &Driver, product: &Product) -> Result<()> {
        let &Product {
            num_rows,
            n,
            k,
            bias,
            out_dtype,
            ..
        } = product;
        let key = [
            num_rows,
            n,
            k,
            usize::from(bias.is_some()),
            usize::from(out_dtype == DType::F32),
        ];
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        let plan = match plans.entry(key) {
            Entry::Occupied(plan) => plan.into_mut(),
            Entry::Vacant(place) => place.insert(Plan::new(self, product)?),
        };
        if let Some(bias) = bias {
            plan.set_bias(bias)?;
        }
        let (alpha, beta) = (1f32, 0f32);
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
                read(product.out),
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
}

impl Drop for Gemm {
    fn drop(&mut self) {
        // SAFETY: created by `new`, destroyed once.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

/// A product's descriptors and algorithm. cuBLASLt is column-major: it sees `out` as `[n, rows]`,
/// W as `[k, n]` transposed and x as `[k, rows]`.
struct Plan {
    product: sys::cublasLtMatmulDesc_t,
    weight: sys::cublasLtMatrixLayout_t,
    x: sys::cublasLtMatrixLayout_t,
    out: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

impl Plan {
    fn new(gemm: &Gemm, product: &Product) -> Result<Self> {
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
            weight: told("plan", layout(gemm.dtype, k, n))?,
            x: told("plan", layout(gemm.dtype, k, rows))?,
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
        // SAFETY: all were created above; the attribute is a size_t.
        let found = unsafe {
            result::set_matmul_pref_attribute(
                preference,
                attribute,
                ptr::from_ref(&limit).cast(),
                size_of::<usize>(),
            )
            .and_then(|()| {
                result::get_matmul_algo_heuristic(
                    gemm.handle,
                    plan.product,
                    plan.weight,
                    plan.x,
                    plan.out,
                    plan.out,
                    preference,
                )
            })
        };
        // SAFETY: created above.
        let _ = unsafe { result::destroy_matmul_pref(preference) };
        plan.algorithm = told("find an algorithm", found)?.algo;
        Ok(plan)
    }

    fn set_bias(&self, bias: Address) -> Result<()> {
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
