//! Products `x Wᵀ`: our own kernels where few rows of x wait for the weights, cuBLASLt above.
//!
//! Which is faster where was measured on an H200 with Qwen2.5-7B's shapes (docs/gpu_log.md): up
//! to 8 rows own kernels throughout; up to 16 for the widest and the narrowest products. Of
//! cuBLASLt's algorithms the fastest is found by measuring, once for each class of rows that
//! steps of one token a sequence have and for the largest step; others take its first choice.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::c_void;
use std::ptr;
use std::sync::{Mutex, PoisonError};

use candle_core::{DType, Result, bail};
use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;

use super::driver::{Address, Arg, Driver, Geometry};
use super::memory::Buffer;
use super::weights::type_name;

const WORKSPACE_BYTES: usize = 64 << 20;
/// Algorithms that are tried for a shape, and how often each.
const MAX_ALGORITHMS: usize = 8;
const TRIALS: usize = 3;
/// Steps of up to so many rows are recorded, and so come often.
const MAX_TUNED_ROWS: usize = 512;
/// Rows between one class and the next.
const CLASS_ROWS: usize = 64;
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
    /// Rows of the largest step.
    max_rows: usize,
    plans: Mutex<Plans>,
}

/// Rows, columns of the output, columns of x, whether there is a bias, whether the output is f32.
type Key = [usize; 5];

#[derive(Default)]
struct Plans {
    by_shape: HashMap<Key, Plan>,
    /// The fastest algorithm of a class, under the key of its largest number of rows. Whoever
    /// comes first decides, which must be the largest: tiles are made for numbers of rows, and
    /// one for 200 rows takes twice as long for 256 (measured).
    tuned: HashMap<Key, sys::cublasLtMatmulAlgo_t>,
}

// SAFETY: cuBLASLt's handle may be used from any thread; plans are behind a lock.
unsafe impl Send for Gemm {}
// SAFETY: as above.
unsafe impl Sync for Gemm {}

impl Gemm {
    pub(super) fn new(driver: &Driver, dtype: DType, max_rows: usize) -> Result<Self> {
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
            max_rows,
            plans: Mutex::new(Plans::default()),
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
        let Plans { by_shape, tuned } = &mut *plans;
        let plan = match by_shape.entry(key) {
            Entry::Occupied(plan) => plan.into_mut(),
            Entry::Vacant(place) => place.insert(self.new_plan(driver, product, key, tuned)?),
        };
        if let Some(bias) = bias {
            plan.set_bias(bias)?;
        }
        self.run(driver, product, plan)
    }

    fn run(&self, driver: &Driver, product: &Product, plan: &Plan) -> Result<()> {
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

    fn new_plan(
        &self,
        driver: &Driver,
        product: &Product,
        key: Key,
        tuned: &mut HashMap<Key, sys::cublasLtMatmulAlgo_t>,
    ) -> Result<Plan> {
        let (mut plan, algorithms) = Plan::new(self, product)?;
        let class = match key[0] {
            rows if rows == self.max_rows => rows,
            rows @ ..32 => rows.next_multiple_of(32),
            rows @ ..=MAX_TUNED_ROWS => rows.next_multiple_of(CLASS_ROWS),
            _ => return Ok(plan),
        };
        let [_, shape @ ..] = key;
        let [n, k, bias, is_f32] = shape;
        match tuned.entry([class, n, k, bias, is_f32]) {
            Entry::Occupied(algorithm) if plan.accepts(self, algorithm.get()) => {
                plan.algorithm = *algorithm.get();
            }
            Entry::Occupied(_) => {}
            Entry::Vacant(place) => {
                self.tune(driver, product, &mut plan, &algorithms)?;
                place.insert(plan.algorithm);
            }
        }
        Ok(plan)
    }

    /// Takes the fastest of `algorithms` into the plan.
    fn tune(
        &self,
        driver: &Driver,
        product: &Product,
        plan: &mut Plan,
        algorithms: &[sys::cublasLtMatmulAlgo_t],
    ) -> Result<()> {
        let mut fastest = (f32::INFINITY, plan.algorithm);
        for &algorithm in algorithms {
            plan.algorithm = algorithm;
            // One that cannot run is none.
            if self.run(driver, product, plan).is_err() {
                continue;
            }
            for _ in 0..TRIALS {
                // Weights must come from memory, as in a step: this pushes them out of the cache.
                // SAFETY: the workspace is that long.
                unsafe { driver.zero(self.workspace.address(), WORKSPACE_BYTES)? };
                let time = driver.time(|| self.run(driver, product, plan))?;
                if time < fastest.0 {
                    fastest = (time, algorithm);
                }
            }
        }
        plan.algorithm = fastest.1;
        Ok(())
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
    /// Describes a product; returns also the algorithms that may be fastest, best guess first.
    fn new(gemm: &Gemm, product: &Product) -> Result<(Self, Vec<sys::cublasLtMatmulAlgo_t>)> {
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
                    gemm.handle,
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
    fn accepts(&self, gemm: &Gemm, algorithm: &sys::cublasLtMatmulAlgo_t) -> bool {
        // SAFETY: a plain C structure that the call fills; all else lives.
        unsafe {
            let mut found: sys::cublasLtMatmulHeuristicResult_t = std::mem::zeroed();
            let checked = sys::cublasLtMatmulAlgoCheck(
                gemm.handle,
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
