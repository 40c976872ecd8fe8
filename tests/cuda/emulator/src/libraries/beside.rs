//! cuBLAS and cuRAND: handles, and nothing to do with them. candle's own products and random
//! numbers are not made; the loader says so of any other function.

use std::ffi::c_int;
use std::sync::Arc;

use crate::driver::registry::{Handle, Registry};
use crate::driver::status::{Out, Status, answer, put};

/// cuBLAS's and cuRAND's handles.
static HANDLES: Registry<()> = Registry::new();

fn create(handle: Out<'_, Handle>) -> Status {
    answer(put(handle, HANDLES.enter(Arc::new(()))))
}

fn check(handle: Handle) -> Status {
    answer(HANDLES.get(handle).map(|_| ()))
}

fn destroy(handle: Handle) -> Status {
    answer(HANDLES.remove(handle).map(|_| ()))
}

#[unsafe(no_mangle)]
extern "C" fn cublasCreate_v2(handle: Out<'_, Handle>) -> Status {
    create(handle)
}

#[unsafe(no_mangle)]
extern "C" fn cublasDestroy_v2(handle: Handle) -> Status {
    destroy(handle)
}

#[unsafe(no_mangle)]
extern "C" fn cublasSetStream_v2(handle: Handle, _stream: Handle) -> Status {
    check(handle)
}

#[unsafe(no_mangle)]
extern "C" fn curandCreateGenerator(generator: Out<'_, Handle>, _kind: c_int) -> Status {
    create(generator)
}

#[unsafe(no_mangle)]
extern "C" fn curandDestroyGenerator(generator: Handle) -> Status {
    destroy(generator)
}

#[unsafe(no_mangle)]
extern "C" fn curandSetPseudoRandomGeneratorSeed(generator: Handle, _seed: u64) -> Status {
    check(generator)
}

#[unsafe(no_mangle)]
extern "C" fn curandSetStream(generator: Handle, _stream: Handle) -> Status {
    check(generator)
}
