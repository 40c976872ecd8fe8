//! The libraries beside the driver, as far as a program with the feature `cuda` calls them:
//! cuBLASLt's products, NCCL's collectives, and of cuBLAS and cuRAND what candle makes with each
//! device and never uses.

mod beside;
mod cublaslt;
mod nccl;
mod product;
