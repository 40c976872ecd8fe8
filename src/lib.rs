//! infold: fine-tune, merge and serve language models with one program.
//!
//! Three verbs stand on seven nouns. A verb is a command of the program, a noun is a library
//! that the verbs share; arrows only point down this list.
//!
//! - [`serve`]: strings and JSON in, server-sent events out.
//! - [`engine`]: token ids in, token events out: scheduler, paged KV cache, sampler.
//! - [`models`]: Qwen2, Qwen3 and Llama as one decoder.
//! - [`layers`]: tensor-parallel linears, attention, embeddings, rotary embedding.
//! - [`kernels`]: one safe function an operation, on the CPU (reference and SIMD).
//! - [`distributed`]: ranks and their collectives.
//! - [`weights`]: checkpoints in (safetensors, GGUF, hub).
//! - [`text`]: tokenizer, chat template, incremental detokenisation.

pub mod bench;
pub mod chat;
pub mod distributed;
pub mod engine;
pub mod kernels;
pub mod layers;
pub mod models;
pub mod serve;
pub mod text;
pub mod weights;
