//! What calls of the driver answer: `CUresult`, its names and texts.

use std::ffi::{CStr, c_char, c_int};
use std::mem::MaybeUninit;

/// A `CUresult`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub struct Status(pub c_int);

/// What a call comes to before it is a number.
pub type Outcome<T = ()> = Result<T, Status>;

const fn c_text(text: &'static str) -> &'static CStr {
    match CStr::from_bytes_with_nul(text.as_bytes()) {
        Ok(text) => text,
        Err(_) => panic!("a text with a 0 at its end alone"),
    }
}

macro_rules! statuses {
    ($($name:ident = $code:literal, $cuda:literal, $text:literal;)*) => {
        impl Status {
            $(#[doc = $text] pub const $name: Self = Self($code);)*
        }
        const NAMES: &[(c_int, &CStr, &CStr)] =
            &[$(($code, c_text(concat!($cuda, "\0")), c_text(concat!($text, "\0")))),*];
    };
}

statuses! {
    SUCCESS = 0, "CUDA_SUCCESS", "no error";
    INVALID_VALUE = 1, "CUDA_ERROR_INVALID_VALUE", "invalid argument";
    OUT_OF_MEMORY = 2, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory";
    NO_DEVICE = 100, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected";
    INVALID_DEVICE = 101, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal";
    INVALID_IMAGE = 200, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid";
    INVALID_CONTEXT = 201, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context";
    NO_BINARY_FOR_GPU = 209, "CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device";
    INVALID_PTX = 218, "CUDA_ERROR_INVALID_PTX", "a PTX JIT compilation failed";
    FILE_NOT_FOUND = 301, "CUDA_ERROR_FILE_NOT_FOUND", "file not found";
    INVALID_HANDLE = 400, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle";
    NOT_FOUND = 500, "CUDA_ERROR_NOT_FOUND", "named symbol not found";
    NOT_READY = 600, "CUDA_ERROR_NOT_READY", "device not ready";
    ILLEGAL_ADDRESS = 700, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered";
    OUT_OF_RESOURCES = 701, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "too many resources requested for launch";
    PEER_ACCESS_ALREADY_ENABLED = 704, "CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED", "peer access is already enabled";
    MISALIGNED_ADDRESS = 716, "CUDA_ERROR_MISALIGNED_ADDRESS", "misaligned address";
    LAUNCH_FAILED = 719, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure";
    NOT_SUPPORTED = 801, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported";
    CAPTURE_UNSUPPORTED = 900, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing";
    CAPTURE_UNMATCHED = 903, "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED", "the capture was not initiated in this stream";
    CAPTURE_ISOLATION = 905, "CUDA_ERROR_STREAM_CAPTURE_ISOLATION", "dependency created on uncaptured work in another stream";
    CAPTURED_EVENT = 907, "CUDA_ERROR_CAPTURED_EVENT", "operation not permitted on an event last recorded in a capturing stream";
    INVALID_CLUSTER_SIZE = 912, "CUDA_ERROR_INVALID_CLUSTER_SIZE", "invalid cluster size";
}

/// Turns an outcome into what the call returns.
pub fn answer(outcome: Outcome) -> Status {
    outcome.err().unwrap_or(Status::SUCCESS)
}

/// Where a call puts a result; null is none.
pub type Out<'a, T> = Option<&'a mut MaybeUninit<T>>;

/// Puts a result where the caller wants it.
///
/// # Errors
/// When that is nowhere.
pub fn put<T>(out: Out<'_, T>, value: T) -> Outcome {
    out.ok_or(Status::INVALID_VALUE)?.write(value);
    Ok(())
}

fn named(status: Status) -> Outcome<(&'static CStr, &'static CStr)> {
    let found = NAMES.iter().find(|(code, ..)| *code == status.0);
    found.map_or(Err(Status::INVALID_VALUE), |(_, name, text)| {
        Ok((name, text))
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuGetErrorName(status: Status, name: Out<'_, *const c_char>) -> Status {
    answer(named(status).and_then(|(found, _)| put(name, found.as_ptr())))
}

#[unsafe(no_mangle)]
extern "C" fn cuGetErrorString(status: Status, text: Out<'_, *const c_char>) -> Status {
    answer(named(status).and_then(|(_, found)| put(text, found.as_ptr())))
}
