//! The integration tests: one binary, one module a subject.

mod architecture;
mod chat_templates;
mod engine_invariance;
mod hub;
mod models_golden;
mod openai_sdk;
mod tiny_engine;
mod weights;
