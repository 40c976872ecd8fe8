//! The integration tests: one binary, one module a subject.

#![expect(
    clippy::unwrap_used,
    reason = "a test ends where something unforeseen happens"
)]

mod architecture;
mod chat_templates;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "cuda")]
mod cuda_draws;
#[cfg(feature = "cuda")]
mod cuda_fp8;
#[cfg(feature = "cuda")]
mod cuda_kv_cache_fp8;
#[cfg(feature = "cuda")]
mod cuda_ranks;
mod data_parallel;
mod engine_invariance;
mod fake_hub;
mod faults;
mod gguf_export;
mod hub;
mod kv_cache_fp8;
mod merge;
mod models_golden;
mod openai_sdk;
#[cfg(feature = "cuda")]
mod random_models;
mod server;
mod tiny_engine;
mod train;
mod train_again;
mod weights;
