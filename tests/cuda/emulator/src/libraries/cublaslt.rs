//! cuBLASLt: products in stream order, computed by the CPU.
//!
//! Two algorithms for every product, which differ in the order of the sum, as real ones do.

use std::ffi::{c_int, c_void};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::driver::allocations::holds;
use crate::driver::device::config;
use crate::driver::profile::timed;
use crate::driver::registry::{Handle, Registry};
use crate::driver::status::{Out, Status, put};
use crate::driver::stream::{Fault, Stream, Work};

use super::product::{Matrix, Product, Type};

/// A `cublasStatus_t`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
struct BlasStatus(c_int);

impl BlasStatus {
    const SUCCESS: Self = Self(0);
    const INVALID_VALUE: Self = Self(7);
    const EXECUTION_FAILED: Self = Self(13);
    const NOT_SUPPORTED: Self = Self(15);
}

impl From<Status> for BlasStatus {
    fn from(status: Status) -> Self {
        match status {
            Status::INVALID_HANDLE | Status::INVALID_VALUE => Self::INVALID_VALUE,
            _ => Self::EXECUTION_FAILED,
        }
    }
}

type BlasOutcome<T = ()> = Result<T, BlasStatus>;

fn answer(outcome: BlasOutcome) -> BlasStatus {
    outcome.err().unwrap_or(BlasStatus::SUCCESS)
}

/// What a product counts as beside a kernel, nanoseconds.
const FAST_NANOSECONDS: u64 = 5_000;
const SLOW_NANOSECONDS: u64 = 40_000;
/// What the first word of an algorithm is, so that other memory is none.
const ALGORITHM: u64 = 0x1f_0a_11_00;
const NUM_ALGORITHMS: usize = 2;

/// `cublasLtMatmulAlgo_t`.
#[derive(Clone, Copy)]
#[repr(C)]
struct Algorithm {
    data: [u64; 8],
}

impl Algorithm {
    fn new(index: usize) -> Self {
        Self {
            data: [ALGORITHM, index as u64, 0, 0, 0, 0, 0, 0],
        }
    }

    /// Returns in how many parts the inner dimension is summed.
    fn num_parts(&self) -> BlasOutcome<usize> {
        match self.data[..2] {
            [ALGORITHM, index] if index < NUM_ALGORITHMS as u64 => Ok(index as usize + 1),
            _ => Err(BlasStatus::INVALID_VALUE),
        }
    }
}

/// `cublasLtMatmulHeuristicResult_t`.
#[repr(C)]
struct HeuristicResult {
    algorithm: Algorithm,
    workspace_bytes: usize,
    state: BlasStatus,
    num_waves: f32,
    reserved: [c_int; 4],
}

impl HeuristicResult {
    fn new(algorithm: Algorithm) -> Self {
        Self {
            algorithm,
            workspace_bytes: 0,
            state: BlasStatus::SUCCESS,
            num_waves: 1.0,
            reserved: [0; 4],
        }
    }
}

/// `cublasLtMatmulDesc_t`.
#[derive(Clone, Copy, Default)]
struct Description {
    transpose_a: bool,
    transpose_b: bool,
    has_bias: bool,
    bias: u64,
}

/// `cublasLtMatrixLayout_t`.
#[derive(Clone, Copy)]
struct Layout {
    dtype: Type,
    rows: usize,
    cols: usize,
    leading: usize,
}

impl Layout {
    fn at(self, address: u64) -> Matrix {
        let Self {
            dtype,
            rows,
            cols,
            leading,
        } = self;
        Matrix {
            address,
            dtype,
            rows,
            cols,
            leading,
        }
    }
}

static LIBRARIES: Registry<()> = Registry::new();
static DESCRIPTIONS: Registry<Mutex<Description>> = Registry::new();
static LAYOUTS: Registry<Layout> = Registry::new();
static PREFERENCES: Registry<()> = Registry::new();

fn lock(description: &Mutex<Description>) -> MutexGuard<'_, Description> {
    description.lock().unwrap_or_else(PoisonError::into_inner)
}

fn destroy<T>(registry: &Registry<T>, handle: Handle) -> BlasStatus {
    answer(
        registry
            .remove(handle)
            .map(|_| ())
            .map_err(BlasStatus::from),
    )
}

#[unsafe(no_mangle)]
extern "C" fn cublasLtCreate(handle: Out<'_, Handle>) -> BlasStatus {
    answer(put(handle, LIBRARIES.enter(Arc::new(()))).map_err(BlasStatus::from))
}

#[unsafe(no_mangle)]
extern "C" fn cublasLtDestroy(handle: Handle) -> BlasStatus {
    destroy(&LIBRARIES, handle)
}

/// Sums in f32 alone are known (`CUBLAS_COMPUTE_32F`), with factors in f32.
#[unsafe(no_mangle)]
extern "C" fn cublasLtMatmulDescCreate(
    out: Out<'_, Handle>,
    compute: c_int,
    scale: c_int,
) -> BlasStatus {
    if (compute, Type::of(scale)) != (68, Some(Type::F32)) {
        return BlasStatus::NOT_SUPPORTED;
    }
    answer(put(out, DESCRIPTIONS.enter(Arc::default())).map_err(BlasStatus::from))
}

#[unsafe(no_mangle)]
extern "C" fn cublasLtMatmulDescDestroy(description: Handle) -> BlasStatus {
    destroy(&DESCRIPTIONS, description)
}

/// # Safety
/// `value` must have `num_bytes` bytes.
#[unsafe(no_mangle)]
unsafe extern "C" fn cublasLtMatmulDescSetAttribute(
    description: Handle,
    attribute: c_int,
    value: *const c_void,
    num_bytes: usize,
) -> BlasStatus {
    let number = match (value.is_null(), num_bytes) {
        // SAFETY: the caller's.
        (false, 4) => u64::from(unsafe { value.cast::<u32>().read_unaligned() }),
        // SAFETY: as above.
        (false, 8) => unsafe { value.cast::<u64>().read_unaligned() },
        _ => return BlasStatus::INVALID_VALUE,
    };
    let set = |description: &Mutex<Description>| {
        let mut description = lock(description);
        match (attribute, num_bytes, number) {
            (3, 4, 0 | 1) => description.transpose_a = number == 1,
            (4, 4, 0 | 1) => description.transpose_b = number == 1,
            // The default epilogue, and the bias.
            (7, 4, 1 | 4) => description.has_bias = number == 4,
            (8, 8, _) => description.bias = number,
            _ => return Err(BlasStatus::NOT_SUPPORTED),
        }
        Ok(())
    };
    answer(
        DESCRIPTIONS
            .get(description)
            .map_err(BlasStatus::from)
            .and_then(|description| set(&description)),
    )
}

#[unsafe(no_mangle)]
extern "C" fn cublasLtMatrixLayoutCreate(
    out: Out<'_, Handle>,
    dtype: c_int,
    rows: u64,
    cols: u64,
    leading: i64,
) -> BlasStatus {
    let Some(dtype) = Type::of(dtype) else {
        return BlasStatus::NOT_SUPPORTED;
    };
    let leading = usize::try_from(leading).unwrap_or(0);
    let layout = Layout {
        dtype,
        rows: rows as usize,
        cols: cols as usize,
        leading,
    };
    if layout.rows == 0 || layout.cols == 0 || leading < layout.rows {
        return BlasStatus::INVALID_VALUE;
    }
    answer(put(out, LAYOUTS.enter(Arc::new(layout))).map_err(BlasStatus::from))
}

#[unsafe(no_mangle)]
extern "C" fn cublasLtMatrixLayoutDestroy(layout: Handle) -> BlasStatus {
    destroy(&LAYOUTS, layout)
}

#[unsafe(no_mangle)]
extern "C" fn cublasLtMatmulPreferenceCreate(out: Out<'_, Handle>) -> BlasStatus {
    answer(put(out, PREFERENCES.enter(Arc::new(()))).map_err(BlasStatus::from))
}

#[unsafe(no_mangle)]
extern "C" fn cublasLtMatmulPreferenceDestroy(preference: Handle) -> BlasStatus {
    destroy(&PREFERENCES, preference)
}

/// Nothing here needs a workspace, so its limit is kept whatever it is.
#[unsafe(no_mangle)]
extern "C" fn cublasLtMatmulPreferenceSetAttribute(
    preference: Handle,
    attribute: c_int,
    value: *const c_void,
    num_bytes: usize,
) -> BlasStatus {
    match (attribute, value.is_null(), num_bytes) {
        (1, false, 8) => answer(
            PREFERENCES
                .get(preference)
                .map(|_| ())
                .map_err(BlasStatus::from),
        ),
        _ => BlasStatus::NOT_SUPPORTED,
    }
}

/// A product's handles.
struct Call {
    description: Handle,
    /// Of A, B, C and D.
    layouts: [Handle; 4],
}

impl Call {
    /// Returns the product of matrices at `addresses`.
    fn product(&self, addresses: [u64; 4]) -> BlasOutcome<Product> {
        let description = *lock(&*DESCRIPTIONS.get(self.description)?);
        let layout = |i: usize| {
            LAYOUTS
                .get(self.layouts[i])
                .map(|layout| layout.at(addresses[i]))
        };
        let (a, b, c, d) = (layout(0)?, layout(1)?, layout(2)?, layout(3)?);
        let bias = Matrix {
            address: description.bias,
            cols: 1,
            leading: d.rows,
            ..d
        };
        let product = Product {
            a: (a, description.transpose_a),
            b: (b, description.transpose_b),
            c,
            d,
            bias: description.has_bias.then_some(bias),
            alpha: 1.0,
            beta: 0.0,
            num_parts: 1,
        };
        if product.inner().is_none() {
            return Err(BlasStatus::INVALID_VALUE);
        }
        let is_known = a.dtype == b.dtype
            && c.dtype == d.dtype
            && (d.dtype == a.dtype || d.dtype == Type::F32);
        is_known.then_some(product).ok_or(BlasStatus::NOT_SUPPORTED)
    }
}

/// # Safety
/// `results` must have room for `num_wanted` results.
#[unsafe(no_mangle)]
unsafe extern "C" fn cublasLtMatmulAlgoGetHeuristic(
    library: Handle,
    description: Handle,
    a: Handle,
    b: Handle,
    c: Handle,
    d: Handle,
    preference: Handle,
    num_wanted: c_int,
    results: *mut HeuristicResult,
    num_found: Out<'_, c_int>,
) -> BlasStatus {
    let find = || {
        LIBRARIES.get(library)?;
        PREFERENCES.get(preference)?;
        Call {
            description,
            layouts: [a, b, c, d],
        }
        .product([0; 4])?;
        let num = NUM_ALGORITHMS.min(usize::try_from(num_wanted).unwrap_or(0));
        for i in 0..num {
            // SAFETY: below `num_wanted`.
            unsafe {
                results
                    .add(i)
                    .write(HeuristicResult::new(Algorithm::new(i)))
            };
        }
        put(num_found, num as c_int)?;
        Ok(())
    };
    answer(find())
}

#[unsafe(no_mangle)]
extern "C" fn cublasLtMatmulAlgoCheck(
    library: Handle,
    description: Handle,
    a: Handle,
    b: Handle,
    c: Handle,
    d: Handle,
    algorithm: Option<&Algorithm>,
    result: Out<'_, HeuristicResult>,
) -> BlasStatus {
    let check = || {
        LIBRARIES.get(library)?;
        Call {
            description,
            layouts: [a, b, c, d],
        }
        .product([0; 4])?;
        let &algorithm = algorithm.ok_or(BlasStatus::INVALID_VALUE)?;
        algorithm.num_parts()?;
        put(result, HeuristicResult::new(algorithm))?;
        Ok(())
    };
    answer(check())
}

#[unsafe(no_mangle)]
extern "C" fn cublasLtMatmul(
    library: Handle,
    description: Handle,
    alpha: Option<&f32>,
    a: u64,
    a_layout: Handle,
    b: u64,
    b_layout: Handle,
    beta: Option<&f32>,
    c: u64,
    c_layout: Handle,
    d: u64,
    d_layout: Handle,
    algorithm: Option<&Algorithm>,
    _workspace: u64,
    _workspace_bytes: usize,
    stream: Handle,
) -> BlasStatus {
    let multiply = || {
        LIBRARIES.get(library)?;
        let stream = Stream::of(stream)?;
        let call = Call {
            description,
            layouts: [a_layout, b_layout, c_layout, d_layout],
        };
        let product = Product {
            alpha: *alpha.ok_or(BlasStatus::INVALID_VALUE)?,
            beta: *beta.ok_or(BlasStatus::INVALID_VALUE)?,
            num_parts: algorithm.map_or(Ok(1), Algorithm::num_parts)?,
            ..call.product([a, b, c, d])?
        };
        let nanoseconds = if config().has_fast_products {
            FAST_NANOSECONDS
        } else {
            SLOW_NANOSECONDS
        };
        stream.submit(Work::lasting(nanoseconds, move || {
            check_memory(&product)?;
            // SAFETY: just checked; what else works on D is ordered by streams.
            unsafe { timed("cublasLtMatmul", || product.compute()) };
            Ok(())
        }));
        Ok(())
    };
    answer(multiply())
}

/// Checks that the operands are allocated.
fn check_memory(product: &Product) -> Result<(), Fault> {
    let c = (product.beta != 0.0).then_some(product.c);
    let matrices = [
        ("A", Some(product.a.0)),
        ("B", Some(product.b.0)),
        ("C", c),
        ("D", Some(product.d)),
        ("the bias", product.bias),
    ];
    for (name, matrix) in matrices {
        let Some(matrix) = matrix else {
            continue;
        };
        let is_aligned = matrix
            .address
            .is_multiple_of(matrix.dtype.num_bytes() as u64);
        if !is_aligned || !holds(matrix.address, matrix.num_bytes()) {
            let text = format!(
                "cuBLASLt: {name} is outside of all allocations or misaligned: {matrix:x?}"
            );
            return Err(Fault {
                status: Status::ILLEGAL_ADDRESS,
                text,
            });
        }
    }
    Ok(())
}
