//! A CUDA driver for machines without a GPU: `libcuda.so.1` and what else a program with the
//! feature `cuda` links, on the CPU. `scripts/check_cuda_emulated.sh` builds it and runs the tests.
//!
//! `ptx` reads and runs kernels' PTX; `driver` answers the driver's calls around it, each stream a
//! host thread; `libraries` stands in for cuBLASLt and NCCL. Device memory is memory of the process
//! and a device address is its address, so that copies are copies; each access of a kernel is
//! checked against the allocations. Results are those of the PTX ISA, speed is not: it is there so
//! that kernels and the engine around them can be tested where there is no GPU.
//!
//! The library is put on the loader's path under the name of each library that it stands in for;
//! files that are one file are loaded once. The environment says what the GPUs are:
//!
//! | variable | unless set | |
//! |---|---|---|
//! | `EMULATED_GPUS` | 1 | how many there are |
//! | `EMULATED_CAPABILITY` | 8.0 | compute capability: 8.0, 8.6, 8.9 or 9.0 |
//! | `EMULATED_MULTIPROCESSORS` | 4 | of each; more make more blocks where kernels fill the GPU |
//! | `EMULATED_MEMORY_MIB` | 4096 | of each |
//! | `EMULATED_CUBLASLT` | fast | or slow: whether its products count as faster than kernels |
//! | `EMULATED_PROFILE` | | set: a table of the CPU's time by kernel when the program ends |
//!
//! A fault is printed once, with kernel, thread and line of the PTX; then all calls of that GPU fail
//! as after a fault of a real one.

pub mod driver;
pub mod libraries;
pub mod memory;
pub mod ptx;
pub mod tensor_map;
