//! One safe function an operation, on the CPU now, on CUDA later.
