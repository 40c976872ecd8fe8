//! How the program's allocator treats memory that was freed.
//!
//! mimalloc gives large freed blocks back to the system after a moment, and gets them back as
//! pages that the system must clear first: a fifth of the processor time of a training step,
//! whose activations are freed and allocated again many times a second.

// Its C library holds the function below, whether or not it is the allocator of the program.
use mimalloc as _;
use std::ffi::{c_int, c_long};

/// `mi_option_purge_delay` of `mimalloc.h`, whose numbers do not change between versions.
const PURGE_DELAY: c_int = 15;
/// Never.
const NO_PURGE: c_long = -1;

unsafe extern "C" {
    fn mi_option_set(option: c_int, value: c_long);
}

/// Keeps memory that is freed from now on for later allocations, until the process ends. Without
/// effect where mimalloc is not the allocator.
pub fn keep_freed_memory() {
    // SAFETY: sets a number that mimalloc reads atomically; no memory of ours is involved.
    unsafe { mi_option_set(PURGE_DELAY, NO_PURGE) };
}
