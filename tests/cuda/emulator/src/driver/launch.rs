//! Launches: the checks that a driver makes, and the kernel's run in stream order.

use std::ffi::{c_int, c_uint, c_void};
use std::sync::Arc;

use crate::ptx;

use super::device::{config, max_shared_bytes};
use super::module::{FUNCTIONS, Function};
use super::profile::timed;
use super::registry::Handle;
use super::status::{Outcome, Status, answer};
use super::stream::{Fault, Stream, Work};

/// What a kernel moves its stream's clock by, nanoseconds.
const KERNEL_NANOSECONDS: u64 = 10_000;
/// Threads of a block, at most.
const MAX_THREADS: u32 = 1024;

/// `CUlaunchConfig`.
#[repr(C)]
struct LaunchConfig {
    grid: [c_uint; 3],
    block: [c_uint; 3],
    shared_bytes: c_uint,
    stream: Handle,
    attributes: *const LaunchAttribute,
    num_attributes: c_uint,
}

/// `CUlaunchAttribute`.
#[repr(C)]
struct LaunchAttribute {
    id: c_int,
    padding: [u8; 4],
    value: [u64; 8],
}

/// `CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION`: kernels begin while their predecessor
/// ends. Here they wait for it, as they may.
const PROGRAMMATIC_SERIALIZATION: c_int = 6;

/// # Safety
/// `params` must have a pointer to each of the kernel's parameters.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuLaunchKernelEx(
    config: Option<&LaunchConfig>,
    function: Handle,
    params: *const *const c_void,
    extra: *const *const c_void,
) -> Status {
    let Some(config) = config else {
        return Status::INVALID_VALUE;
    };
    for i in 0..config.num_attributes as usize {
        // SAFETY: the caller's array is that long.
        if unsafe { (*config.attributes.add(i)).id } != PROGRAMMATIC_SERIALIZATION {
            return Status::NOT_SUPPORTED;
        }
    }
    // SAFETY: the caller's.
    answer(unsafe { launch(config, function, params, extra) })
}

/// # Safety
/// As [`cuLaunchKernelEx`].
#[unsafe(no_mangle)]
unsafe extern "C" fn cuLaunchKernel(
    function: Handle,
    grid_x: c_uint,
    grid_y: c_uint,
    grid_z: c_uint,
    block_x: c_uint,
    block_y: c_uint,
    block_z: c_uint,
    shared_bytes: c_uint,
    stream: Handle,
    params: *const *const c_void,
    extra: *const *const c_void,
) -> Status {
    let config = LaunchConfig {
        grid: [grid_x, grid_y, grid_z],
        block: [block_x, block_y, block_z],
        shared_bytes,
        stream,
        attributes: std::ptr::null(),
        num_attributes: 0,
    };
    // SAFETY: the caller's.
    answer(unsafe { launch(&config, function, params, extra) })
}

/// # Safety
/// As [`cuLaunchKernelEx`].
unsafe fn launch(
    config: &LaunchConfig,
    function: Handle,
    params: *const *const c_void,
    extra: *const *const c_void,
) -> Outcome {
    let stream = Stream::of(config.stream)?;
    let function = FUNCTIONS.get(function)?;
    if function.device.ordinal != stream.device().ordinal {
        return Err(Status::INVALID_CONTEXT);
    }
    if !extra.is_null() {
        return Err(Status::NOT_SUPPORTED);
    }
    check(config, &function)?;
    let kernel = function.kernel();
    let num_bytes = kernel
        .params
        .iter()
        .map(|param| param.offset + param.num_bytes)
        .max()
        .unwrap_or(0);
    let mut bytes = vec![0; num_bytes];
    for (i, param) in kernel.params.iter().enumerate() {
        if params.is_null() {
            return Err(Status::INVALID_VALUE);
        }
        let target = &mut bytes[param.offset..][..param.num_bytes];
        // SAFETY: the caller's array has a pointer for each parameter, to as many bytes as the
        // kernel takes.
        unsafe {
            target
                .as_mut_ptr()
                .copy_from_nonoverlapping((*params.add(i)).cast(), param.num_bytes)
        };
    }
    stream.submit(run_later(config, function, bytes));
    Ok(())
}

/// Checks what a driver refuses before anything runs.
fn check(launch: &LaunchConfig, function: &Arc<Function>) -> Outcome {
    let kernel = function.kernel();
    let [x, y, z] = launch.block;
    let num_threads = u64::from(x) * u64::from(y) * u64::from(z);
    let is_grid = launch.grid.iter().all(|&blocks| blocks > 0)
        && launch.grid[0] <= i32::MAX as u32
        && launch.grid[1..].iter().all(|&blocks| blocks <= 65_535);
    if !is_grid || num_threads == 0 || num_threads > u64::from(MAX_THREADS) || z > 64 {
        return Err(Status::INVALID_VALUE);
    }
    if launch.shared_bytes > function.max_dynamic_bytes()
        || launch.shared_bytes + kernel.static_shared_bytes > max_shared_bytes()
    {
        return Err(Status::INVALID_VALUE);
    }
    if let Some(cluster) = kernel.cluster
        && launch
            .grid
            .iter()
            .zip(cluster)
            .any(|(blocks, size)| blocks % size.max(1) != 0)
    {
        return Err(Status::INVALID_CLUSTER_SIZE);
    }
    Ok(())
}

fn run_later(launch: &LaunchConfig, function: Arc<Function>, params: Vec<u8>) -> Work {
    let (grid, block, shared_bytes) = (launch.grid, launch.block, launch.shared_bytes);
    Work::lasting(KERNEL_NANOSECONDS, move || {
        let launch = ptx::Launch {
            grid,
            block,
            shared_bytes,
            params: &params,
            num_multiprocessors: config().num_multiprocessors,
        };
        let kernel = function.kernel();
        let ran = timed(&kernel.name, || ptx::run(kernel, &launch));
        ran.map_err(|text| Fault {
            status: status_of(&text),
            text,
        })
    })
}

/// Returns what a driver says of a fault that the interpreter describes.
fn status_of(text: &str) -> Status {
    match text {
        _ if text.contains("aligned") => Status::MISALIGNED_ADDRESS,
        _ if text.contains("allocat") => Status::ILLEGAL_ADDRESS,
        _ => Status::LAUNCH_FAILED,
    }
}
