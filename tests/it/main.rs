//! The one integration test binary.

mod engine_invariance;
mod models_golden;
mod openai_sdk;
mod tiny_engine;
