//! The driver: the functions of `libcuda.so.1` that a program with the feature `cuda` calls, as
//! `cuda.h` declares them. What is not here is not called: the loader names a function that is
//! missing.
//!
//! Handles are numbers in registries, so a wrong or destroyed one is refused as by a real driver.

pub mod allocations;
mod copies;
pub mod device;
mod image;
mod launch;
mod module;
pub mod profile;
pub mod registry;
pub mod status;
pub mod stream;
mod stream_calls;
mod tensor_maps;
