//! One GPU through the driver: its stream, our kernels by name, launches, memory, graphs.
//!
//! Two streams: candle's, on which the few tensors that stay are allocated and filled, and ours,
//! on which everything runs. Loading ends with a wait for both, and tensors that stay are freed
//! after another; so none needs an event, and the recording of a graph sees no allocation.

use std::collections::HashMap;
use std::ffi::{CStr, c_void};
use std::mem::MaybeUninit;
use std::ptr;

use candle_core::backend::BackendDevice;
use candle_core::{CudaDevice, Device, Result, bail};
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;

use super::memory::Buffer;

/// The compiled kernels: a name and a fat binary for each file of this folder.
static FATBINS: &[(&str, &[u8])] = include!(concat!(env!("OUT_DIR"), "/fatbins.rs"));

/// Kernels compiled for this capability on wait for their predecessor themselves, and may run in
/// clusters.
pub(super) const OVERLAPPING: i32 = 90;
/// Shared memory that a kernel may use without asking, bytes.
const DEFAULT_SHARED_BYTES: u32 = 48 * 1024;

/// An address on the GPU.
pub(super) type Address = sys::CUdeviceptr;

/// One parameter of a kernel.
#[derive(Clone, Copy)]
pub(super) enum Arg {
    Pointer(Address),
    F32(f32),
    I32(i32),
    U32(u32),
    I64(i64),
    /// A structure passed by value, which lives until the launch has returned.
    Structure(*const c_void),
}

impl Arg {
    /// Returns the address of the value inside.
    fn as_ptr(&self) -> *mut c_void {
        match self {
            Self::Pointer(value) => ptr::from_ref(value).cast_mut().cast(),
            Self::F32(value) => ptr::from_ref(value).cast_mut().cast(),
            Self::I32(value) => ptr::from_ref(value).cast_mut().cast(),
            Self::U32(value) => ptr::from_ref(value).cast_mut().cast(),
            Self::I64(value) => ptr::from_ref(value).cast_mut().cast(),
            Self::Structure(value) => value.cast_mut(),
        }
    }
}

/// How a kernel is launched.
#[derive(Clone, Copy)]
pub(super) struct Geometry {
    pub(super) grid: [usize; 3],
    pub(super) block: usize,
    pub(super) shared_bytes: u32,
}

impl Geometry {
    /// Returns a launch without dynamic shared memory.
    pub(super) fn new(grid: [usize; 3], block: usize) -> Self {
        Self {
            grid,
            block,
            shared_bytes: 0,
        }
    }
}

/// A GPU with our kernels loaded.
pub(super) struct Driver {
    device: Device,
    cuda: CudaDevice,
    stream: sys::CUstream,
    functions: HashMap<String, sys::CUfunction>,
    pub(super) num_multiprocessors: usize,
    /// Major and minor compute capability.
    pub(super) capability: (i32, i32),
    /// The capability that our kernels are compiled for, 80 to 90: less than the GPU's where the
    /// driver translates the PTX of an older one.
    pub(super) compiled_for: i32,
    /// Shared memory that one block may have at most.
    pub(super) shared_bytes_per_block: usize,
}

// SAFETY: contexts, streams, modules and functions of the driver may be used from any thread;
// each call below makes the context current first.
unsafe impl Send for Driver {}
// SAFETY: as above; the fields never change after `new`.
unsafe impl Sync for Driver {}

impl Driver {
    /// Opens GPU `ordinal` (of those that `CUDA_VISIBLE_DEVICES` leaves) and loads our kernels.
    ///
    /// # Errors
    /// When there is no driver, no such GPU, or it is older than compute capability 8.0.
    pub(super) fn new(ordinal: usize) -> Result<Self> {
        check_device(ordinal)?;
        let cuda = CudaDevice::new_with_stream(ordinal)?;
        // SAFETY: the file's documentation says why no tensor needs an event.
        unsafe { cuda.disable_event_tracking() };
        let capability = (
            attribute(
                ordinal,
                Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            )?,
            attribute(
                ordinal,
                Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )?,
        );
        if capability < (8, 0) {
            let (major, minor) = capability;
            bail!(
                "GPU {ordinal} has compute capability {major}.{minor}; the kernels need 8.0 (Ampere) or newer"
            );
        }
        let multiprocessors =
            attribute(ordinal, Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let shared_bytes = attribute(
            ordinal,
            Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
        )?;
        let mut functions = HashMap::new();
        for (name, image) in FATBINS {
            load_functions(name, image, &mut functions)?;
        }
        let compiled_for = match functions.values().next() {
            Some(&function) => architecture_of(function)?,
            None => bail!("no CUDA kernel is compiled into this program"),
        };
        let stream = told(
            "create a stream",
            result::stream::create(result::stream::StreamKind::NonBlocking),
        )?;
        Ok(Self {
            device: Device::Cuda(cuda.clone()),
            cuda,
            stream,
            functions,
            num_multiprocessors: multiprocessors as usize,
            capability,
            compiled_for,
            shared_bytes_per_block: shared_bytes as usize,
        })
    }

    /// Returns candle's device, on which tensors are made.
    pub(super) fn device(&self) -> &Device {
        &self.device
    }

    /// Returns the stream that everything runs on.
    pub(super) fn stream(&self) -> sys::CUstream {
        self.stream
    }

    /// Returns whether the GPU's image has kernel `name`.
    pub(super) fn has_kernel(&self, name: &str) -> bool {
        self.functions.contains_key(name)
    }

    /// Makes the GPU's context current on the calling thread.
    pub(super) fn bind(&self) -> Result<()> {
        told(
            "use the GPU",
            self.cuda.cuda_stream().context().bind_to_thread(),
        )
    }

    /// Launches the kernel `name`. With programmatic serialisation where kernels are compiled to
    /// wait for their predecessor, so that it begins while that one ends.
    ///
    /// # Errors
    /// When there is no such kernel or the launch is refused.
    pub(super) fn launch(&self, name: &str, geometry: Geometry, args: &[Arg]) -> Result<()> {
        let Some(&function) = self.functions.get(name) else {
            bail!("no CUDA kernel {name} for this dtype, head size or group");
        };
        let mut pointers: Vec<*mut c_void> = args.iter().map(Arg::as_ptr).collect();
        // SAFETY: a plain C structure whose every bit pattern is valid.
        let mut value: sys::CUlaunchAttributeValue = unsafe { MaybeUninit::zeroed().assume_init() };
        value.programmaticStreamSerializationAllowed = 1;
        let mut overlap = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value,
        };
        let [x, y, z] = geometry.grid.map(|blocks| blocks as u32);
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: geometry.block as u32,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: geometry.shared_bytes,
            hStream: self.stream,
            attrs: &raw mut overlap,
            numAttrs: u32::from(self.compiled_for >= OVERLAPPING),
        };
        // SAFETY: `args` are the entry point's parameters in order (each caller's duty), and the
        // structures live until the call returns.
        let launched = unsafe {
            sys::cuLaunchKernelEx(
                &raw const config,
                function,
                pointers.as_mut_ptr(),
                ptr::null_mut(),
            )
        };
        told(name, launched.result())
    }

    /// Waits until everything in the stream has run.
    ///
    /// # Errors
    /// When a kernel has faulted: the GPU cannot be used any more.
    pub(super) fn synchronize(&self) -> Result<()> {
        self.bind()?;
        // SAFETY: the stream lives as long as `self`.
        told("wait for the GPU", unsafe {
            result::stream::synchronize(self.stream)
        })
    }

    /// Waits for candle's stream too.
    pub(super) fn synchronize_all(&self) -> Result<()> {
        self.cuda.synchronize()?;
        self.synchronize()
    }

    /// Copies `values` to `target` in stream order. The caller keeps them until the stream has
    /// come there if they are pinned; other memory is copied before the call returns.
    ///
    /// # Safety
    /// `target` must have room for `values`.
    pub(super) unsafe fn upload<T>(&self, target: Address, values: &[T]) -> Result<()> {
        // SAFETY: passed on.
        let copied = unsafe { result::memcpy_htod_async(target, values, self.stream) };
        told("copy to the GPU", copied)
    }

    /// Copies from `source` to `values` in stream order.
    ///
    /// # Safety
    /// `source` must hold that many values, and `values` must live until the stream has come
    /// there.
    pub(super) unsafe fn download<T>(&self, values: &mut [T], source: Address) -> Result<()> {
        // SAFETY: passed on.
        let copied = unsafe { result::memcpy_dtoh_async(values, source, self.stream) };
        told("copy from the GPU", copied)
    }

    /// Copies bytes from one place of the GPU to another, in stream order.
    ///
    /// # Errors
    /// When either is not allocated.
    pub(super) fn copy(&self, target: Address, source: Address, num_bytes: usize) -> Result<()> {
        // SAFETY: both ranges lie inside matrices of the arena.
        told("copy on the GPU", unsafe {
            result::memcpy_dtod_async(target, source, num_bytes, self.stream)
        })
    }

    /// Copies `num_rows` rows of `row_bytes` each between places `[target, source]` of the GPU whose
    /// rows begin `[target, source]` pitches after each other, in stream order.
    ///
    /// # Errors
    /// When either is not allocated.
    pub(super) fn copy_rows(
        &self,
        [target, source]: [Address; 2],
        [target_pitch, source_pitch]: [usize; 2],
        row_bytes: usize,
        num_rows: usize,
    ) -> Result<()> {
        let copy = sys::CUDA_MEMCPY2D {
            srcXInBytes: 0,
            srcY: 0,
            srcMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
            srcHost: ptr::null(),
            srcDevice: source,
            srcArray: ptr::null_mut(),
            srcPitch: source_pitch,
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
            dstHost: ptr::null_mut(),
            dstDevice: target,
            dstArray: ptr::null_mut(),
            dstPitch: target_pitch,
            WidthInBytes: row_bytes,
            Height: num_rows,
        };
        // SAFETY: the description is whole; both ranges lie inside buffers of this GPU.
        told("copy rows on the GPU", unsafe {
            sys::cuMemcpy2DAsync_v2(&raw const copy, self.stream).result()
        })
    }

    /// Zeroes `num_bytes` bytes in stream order.
    ///
    /// # Safety
    /// They must be allocated.
    pub(super) unsafe fn zero(&self, target: Address, num_bytes: usize) -> Result<()> {
        // SAFETY: passed on.
        unsafe { self.fill(target, 0, num_bytes) }
    }

    /// Sets each of `num_bytes` bytes to `value` in stream order.
    ///
    /// # Safety
    /// They must be allocated.
    pub(super) unsafe fn fill(&self, target: Address, value: u8, num_bytes: usize) -> Result<()> {
        // SAFETY: passed on.
        told("fill memory", unsafe {
            result::memset_d8_async(target, value, num_bytes, self.stream)
        })
    }

    /// Returns free and total bytes of the GPU.
    pub(super) fn memory(&self) -> Result<(u64, u64)> {
        self.bind()?;
        let (free, total) = told("ask for the memory", result::mem_get_info())?;
        Ok((free as u64, total as u64))
    }

    /// Allocates bytes that stay where they are.
    pub(super) fn allocate(&self, num_bytes: usize) -> Result<Buffer> {
        self.bind()?;
        // SAFETY: the pointer is used only as an address until something was written there.
        match unsafe { result::malloc_sync(num_bytes.max(16)) } {
            Ok(address) => Ok(Buffer::new(address, num_bytes)),
            Err(error) => {
                let (free, total) = self.memory().unwrap_or_default();
                bail!(
                    "{num_bytes} bytes of GPU memory cannot be had ({free} of {total} are free): {}",
                    text(error)
                )
            }
        }
    }

    /// Allocates zeroed bytes.
    pub(super) fn allocate_zeroed(&self, num_bytes: usize) -> Result<Buffer> {
        let buffer = self.allocate(num_bytes)?;
        // SAFETY: just allocated.
        unsafe { self.zero(buffer.address(), num_bytes)? };
        Ok(buffer)
    }

    /// Records what `work` launches instead of running it.
    ///
    /// # Errors
    /// Those of `work`, or when something in it cannot be recorded.
    pub(super) fn record<R>(&self, work: impl FnOnce() -> Result<R>) -> Result<(Graph, R)> {
        self.bind()?;
        // Thread-local: allocations on candle's stream go on, other ranks are not disturbed.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the stream lives as long as `self`.
        told("record a graph", unsafe {
            result::stream::begin_capture(self.stream, mode)
        })?;
        let outcome = work();
        // Also after an error: the stream must leave the recording.
        // SAFETY: begun above.
        let graph = told("record a graph", unsafe {
            result::stream::end_capture(self.stream)
        });
        let (outcome, graph) = (outcome?, graph?);
        // SAFETY: just recorded; the executable does not need it afterwards.
        let executable = unsafe {
            let executable = result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0));
            let _ = result::graph::destroy(graph);
            executable
        };
        let graph = Graph(told("build a graph", executable)?);
        Ok((graph, outcome))
    }

    /// Runs a recorded graph.
    pub(super) fn replay(&self, graph: &Graph) -> Result<()> {
        // SAFETY: both live.
        told("run a graph", unsafe {
            result::graph::launch(graph.0, self.stream)
        })
    }

    /// Lets kernel `name`, where it exists, have that much dynamic shared memory.
    ///
    /// # Errors
    /// When the GPU has less.
    pub(super) fn allow_shared(&self, name: &str, num_bytes: u32) -> Result<()> {
        let Some(&function) = self.functions.get(name) else {
            return Ok(());
        };
        if num_bytes <= DEFAULT_SHARED_BYTES {
            return Ok(());
        }
        let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the function is one of a loaded module.
        told(name, unsafe {
            result::function::set_function_attribute(function, attribute, num_bytes as i32)
        })
    }
}

/// A recorded sequence of launches.
pub(in crate::kernels) struct Graph(sys::CUgraphExec);

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: instantiated by `Driver::record`, destroyed once.
        let _ = unsafe { result::graph::exec_destroy(self.0) };
    }
}

use sys::CUdevice_attribute as Attribute;

/// Ends the process without exit handlers.
pub(in crate::kernels) fn end_process(code: i32) -> ! {
    // SAFETY: it does not return; Rust has no handlers of its own that matter.
    unsafe { libc::_exit(code) }
}

/// Returns the number of GPUs, 0 where there is no driver.
pub(in crate::kernels) fn num_gpus() -> usize {
    let count = result::init().and_then(|()| result::device::get_count());
    count.map_or(0, |count| count as usize)
}

fn attribute(ordinal: usize, attribute: Attribute) -> Result<i32> {
    let device = told("find the GPU", result::device::get(ordinal as i32))?;
    // SAFETY: a device that `get` returned.
    told("ask the GPU", unsafe {
        result::device::get_attribute(device, attribute)
    })
}

fn check_device(ordinal: usize) -> Result<()> {
    told("start the CUDA driver", result::init())?;
    let count = told("count the GPUs", result::device::get_count())?;
    if ordinal >= count as usize {
        bail!("there is no GPU {ordinal}: CUDA sees {count} (CUDA_VISIBLE_DEVICES chooses which)");
    }
    Ok(())
}

/// Loads a fat binary and adds its kernels by name. Modules stay until the process ends.
fn load_functions(
    file: &str,
    image: &[u8],
    functions: &mut HashMap<String, sys::CUfunction>,
) -> Result<()> {
    let what = format!("load the kernels of {file}.cu");
    // SAFETY: the image is one that nvcc wrote; the arrays have the counted length; names belong
    // to the module, which is never unloaded.
    unsafe {
        let module = told(&what, result::module::load_data(image.as_ptr().cast()))?;
        let mut count = 0;
        told(
            &what,
            sys::cuModuleGetFunctionCount(&raw mut count, module).result(),
        )?;
        let mut found = vec![ptr::null_mut(); count as usize];
        told(
            &what,
            sys::cuModuleEnumerateFunctions(found.as_mut_ptr(), count, module).result(),
        )?;
        for function in found {
            let mut name = ptr::null();
            told(&what, sys::cuFuncGetName(&raw mut name, function).result())?;
            let name = CStr::from_ptr(name).to_string_lossy().into_owned();
            functions.insert(name, function);
        }
    }
    Ok(())
}

/// Returns the virtual architecture that a kernel was compiled for, such as 80.
fn architecture_of(function: sys::CUfunction) -> Result<i32> {
    let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_PTX_VERSION;
    // SAFETY: the function belongs to a loaded module.
    told("ask what a kernel is compiled for", unsafe {
        result::function::get_function_attribute(function, attribute)
    })
}

/// Says what could not be done.
pub(super) fn told<T>(what: &str, result: std::result::Result<T, DriverError>) -> Result<T> {
    result.map_err(|error| candle_core::Error::Msg(format!("CUDA cannot {what}: {}", text(error))))
}

fn text(error: DriverError) -> String {
    let string = |text: std::result::Result<&CStr, DriverError>| {
        text.map_or_else(
            |_| "?".to_owned(),
            |text| text.to_string_lossy().into_owned(),
        )
    };
    format!(
        "{} ({})",
        string(error.error_string()),
        string(error.error_name())
    )
}
