//! The driver's calls, as a program makes them.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::ptr::{from_ref, null, null_mut};
use std::sync::Once;

// Its functions are found by their names.
use emulator as _;

type Handle = usize;

unsafe extern "C" {
    fn cuInit(flags: c_uint) -> c_int;
    fn cuDevicePrimaryCtxRetain(context: *mut Handle, device: c_int) -> c_int;
    fn cuCtxSetCurrent(context: Handle) -> c_int;
    fn cuMemAlloc_v2(address: *mut u64, num_bytes: usize) -> c_int;
    fn cuMemFree_v2(address: u64) -> c_int;
    fn cuMemHostAlloc(address: *mut *mut u32, num_bytes: usize, flags: c_uint) -> c_int;
    fn cuMemcpyHtoDAsync_v2(
        target: u64,
        source: *const u32,
        num_bytes: usize,
        stream: Handle,
    ) -> c_int;
    fn cuMemcpyDtoHAsync_v2(
        target: *mut u32,
        source: u64,
        num_bytes: usize,
        stream: Handle,
    ) -> c_int;
    fn cuMemsetD8Async(target: u64, value: u8, num_bytes: usize, stream: Handle) -> c_int;
    fn cuStreamCreate(stream: *mut Handle, flags: c_uint) -> c_int;
    fn cuStreamSynchronize(stream: Handle) -> c_int;
    fn cuStreamWaitEvent(stream: Handle, event: Handle, flags: c_uint) -> c_int;
    fn cuStreamBeginCapture_v2(stream: Handle, mode: c_int) -> c_int;
    fn cuStreamEndCapture(stream: Handle, graph: *mut Handle) -> c_int;
    fn cuGraphInstantiateWithFlags(executable: *mut Handle, graph: Handle, flags: u64) -> c_int;
    fn cuGraphLaunch(executable: Handle, stream: Handle) -> c_int;
    fn cuEventCreate(event: *mut Handle, flags: c_uint) -> c_int;
    fn cuEventRecord(event: Handle, stream: Handle) -> c_int;
    fn cuEventElapsedTime_v2(milliseconds: *mut f32, start: Handle, end: Handle) -> c_int;
    fn cuModuleLoadData(module: *mut Handle, image: *const c_char) -> c_int;
    fn cuModuleGetFunction(function: *mut Handle, module: Handle, name: *const c_char) -> c_int;
    fn cuLaunchKernel(
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
    ) -> c_int;
    fn cuGetErrorName(status: c_int, name: *mut *const c_char) -> c_int;
}

/// Calls a function of the driver, which must answer with 0, and returns what it puts into its
/// first argument.
macro_rules! made {
    ($function:ident($first:expr $(, $rest:expr)*)) => {{
        let mut value = $first;
        // SAFETY: a place for the result, and arguments that live.
        let status = unsafe { $function(&raw mut value $(, $rest)*) };
        assert_eq!(status, 0, stringify!($function));
        value
    }};
}

/// Calls a function of the driver, which must answer with 0.
macro_rules! done {
    ($function:ident($($argument:expr),*)) => {{
        // SAFETY: arguments that live.
        let status = unsafe { $function($($argument),*) };
        assert_eq!(status, 0, stringify!($function));
    }};
}

/// Adds the second parameter to each of 32 words at the first one.
const ADD: &CStr = c"
.version 8.0
.target sm_80
.address_size 64
.visible .entry add(.param .u64 words, .param .u32 more)
{
    .reg .b32 %r<5>;
    .reg .b64 %rd<5>;
    ld.param.u64 %rd1, [words];
    ld.param.u32 %r1, [more];
    cvta.to.global.u64 %rd2, %rd1;
    mov.u32 %r2, %tid.x;
    mul.wide.u32 %rd3, %r2, 4;
    add.s64 %rd4, %rd2, %rd3;
    ld.global.u32 %r3, [%rd4];
    add.s32 %r4, %r3, %r1;
    st.global.u32 [%rd4], %r4;
    ret;
}
";

/// Makes the context of a GPU current. Each test that faults has a GPU of its own.
fn use_gpu(ordinal: c_int) {
    static CONFIGURED: Once = Once::new();
    CONFIGURED.call_once(|| {
        // SAFETY: before the driver or any other thread of this program reads it.
        unsafe { std::env::set_var("EMULATED_GPUS", "3") };
    });
    done!(cuInit(0));
    let context = made!(cuDevicePrimaryCtxRetain(0, ordinal));
    done!(cuCtxSetCurrent(context));
}

fn stream() -> Handle {
    made!(cuStreamCreate(0, 1))
}

fn add() -> Handle {
    let module = made!(cuModuleLoadData(0, ADD.as_ptr()));
    made!(cuModuleGetFunction(0, module, c"add".as_ptr()))
}

fn launch(function: Handle, words: u64, more: u32, stream: Handle) -> c_int {
    let params = [from_ref(&words).cast(), from_ref(&more).cast()];
    // SAFETY: two parameters, as the kernel has.
    unsafe {
        cuLaunchKernel(
            function,
            1,
            1,
            1,
            32,
            1,
            1,
            0,
            stream,
            params.as_ptr(),
            null(),
        )
    }
}

fn read(words: u64, stream: Handle) -> [u32; 32] {
    let mut values = [0; 32];
    done!(cuMemcpyDtoHAsync_v2(
        values.as_mut_ptr(),
        words,
        128,
        stream
    ));
    done!(cuStreamSynchronize(stream));
    values
}

#[test]
fn work_is_done_in_order_and_params_are_copied_at_once() {
    use_gpu(0);
    let (stream, add) = (stream(), add());
    let words = made!(cuMemAlloc_v2(0, 128));
    let first: Vec<u32> = (0..32).collect();
    done!(cuMemcpyHtoDAsync_v2(words, first.as_ptr(), 128, stream));
    // What is not pinned has been read.
    drop(first);
    for more in 1..=10 {
        assert_eq!(launch(add, words, more, stream), 0);
    }
    assert_eq!(read(words, stream), std::array::from_fn(|i| i as u32 + 55));
    done!(cuMemFree_v2(words));
}

#[test]
fn pinned_memory_is_read_when_the_stream_comes_there() {
    use_gpu(0);
    let (ahead, behind) = (stream(), stream());
    let [words, other] = [(); 2].map(|()| made!(cuMemAlloc_v2(0, 128)));
    let pinned = made!(cuMemHostAlloc(null_mut(), 128, 0));
    let (event, add) = (made!(cuEventCreate(0, 2)), add());
    done!(cuMemsetD8Async(words, 0, 128, ahead));
    done!(cuMemsetD8Async(other, 0, 128, ahead));
    (0..50).for_each(|_| assert_eq!(launch(add, words, 2, ahead), 0));
    done!(cuMemcpyDtoHAsync_v2(pinned, words, 128, ahead));
    done!(cuEventRecord(event, ahead));
    done!(cuStreamWaitEvent(behind, event, 0));
    done!(cuMemcpyHtoDAsync_v2(other, pinned, 128, behind));
    assert_eq!(read(other, behind), [100; 32]);
}

#[test]
fn a_graph_runs_what_was_recorded_as_often_as_it_is_launched() {
    use_gpu(0);
    let (stream, add) = (stream(), add());
    let words = made!(cuMemAlloc_v2(0, 128));
    done!(cuMemsetD8Async(words, 0, 128, stream));
    done!(cuStreamBeginCapture_v2(stream, 2));
    assert_eq!(launch(add, words, 3, stream), 0);
    assert_eq!(launch(add, words, 4, stream), 0);
    // SAFETY: a stream.
    let status = unsafe { cuStreamSynchronize(stream) };
    assert_eq!(status, 900, "waiting for what is recorded");
    let mut graph = 0;
    done!(cuStreamEndCapture(stream, &raw mut graph));
    let executable = made!(cuGraphInstantiateWithFlags(0, graph, 0));
    assert_eq!(read(words, stream), [0; 32]);
    (0..5).for_each(|_| done!(cuGraphLaunch(executable, stream)));
    assert_eq!(read(words, stream), [35; 32]);
}

#[test]
fn times_are_counted() {
    use_gpu(0);
    let (stream, add) = (stream(), add());
    let words = made!(cuMemAlloc_v2(0, 128));
    let [start, end] = [(); 2].map(|()| made!(cuEventCreate(0, 0)));
    done!(cuEventRecord(start, stream));
    (0..3).for_each(|_| assert_eq!(launch(add, words, 1, stream), 0));
    done!(cuEventRecord(end, stream));
    done!(cuStreamSynchronize(stream));
    assert!(made!(cuEventElapsedTime_v2(0.0, start, end)) >= 0.03);
}

#[test]
fn a_fault_is_the_answer_to_all_later_calls_of_that_gpu() {
    use_gpu(1);
    let (stream, add) = (stream(), add());
    let words = made!(cuMemAlloc_v2(0, 128));
    assert_eq!(launch(add, words + 4, 1, stream), 0);
    // SAFETY: a stream.
    let status = unsafe { cuStreamSynchronize(stream) };
    let mut name = null();
    done!(cuGetErrorName(status, &raw mut name));
    // SAFETY: a text of the driver.
    let name = unsafe { CStr::from_ptr(name) };
    assert_eq!(name, c"CUDA_ERROR_ILLEGAL_ADDRESS");
    assert_eq!(launch(add, words, 1, stream), status);
    use_gpu(2);
    assert_ne!(made!(cuMemAlloc_v2(0, 128)), 0);
}

#[test]
fn a_launch_that_cannot_be_is_refused_at_once() {
    use_gpu(0);
    let (stream, add) = (stream(), add());
    let params = [null(); 2];
    for (blocks, threads, shared_bytes) in [(0, 32, 0), (1, 1025, 0), (1, 32, 48 * 1024 + 1)] {
        // SAFETY: refused before the parameters are read.
        let status = unsafe {
            cuLaunchKernel(
                add,
                blocks,
                1,
                1,
                threads,
                1,
                1,
                shared_bytes,
                stream,
                params.as_ptr(),
                null(),
            )
        };
        assert_eq!(status, 1, "{blocks} {threads} {shared_bytes}");
    }
    assert_eq!(launch(add, 0, 0, 12_345), 400, "a stream that is none");
}
