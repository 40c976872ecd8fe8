//! infold: one program that trains, merges and serves language models.
//!
//! # The map
//!
//! Verbs are the program's commands, nouns are the libraries that the verbs share. Arrows only
//! point down this list; `tests/it/architecture.rs` holds the code to it.
//!
//! | verb | |
//! |---|---|
//! | [`serve`] | strings and JSON in, server-sent events out: vLLM's flags and API |
//! | [`merge`] | base and LoRA adapters in, one model out: shards, GGUF, Modelfile |
//! | [`mod@bench`] | the engine measured without HTTP |
//! | [`chat`] | a client in the terminal |
//! | [`mod@train`] | rows and LLaMA-Factory's configuration in, a LoRA adapter and checkpoints out |
//!
//! | noun | |
//! |---|---|
//! | [`engine`] | token ids in, token events out: scheduler, paged KV cache, sampler, ranks |
//! | [`models`] | Qwen2, Qwen3 and Llama as one decoder |
//! | [`layers`] | tensor-parallel linears, attention, embeddings, rotary embedding |
//! | [`kernels`] | one safe function an operation: SIMD on the CPU, CUDA on a GPU |
//! | [`distributed`] | ranks and their collectives |
//! | [`weights`] | checkpoints: safetensors, GGUF, the hub; adapters folded into them |
//! | [`text`] | tokenizer, chat and training templates, labels, detokenisation, stop strings |
//! | [`vocabulary`] | a GGUF file's vocabulary as plain data, between those two |
//!
//! # Rules
//!
//! - A rank is one thread that owns its kernels, its slice of the model and its KV cache; nothing
//!   else touches its tensors. Only host data crosses threads.
//! - The engine thread owns all engine state. The rest holds an [`engine::EngineHandle`]: a
//!   sender and counters. Dropping a stream of events aborts its sequence. With
//!   `--data-parallel-size` several such threads stand behind one handle.
//! - `axum` and status codes live in [`serve`] alone, files and mappings in [`weights`] alone,
//!   strings in [`text`] and the verbs alone.
//! - Activations are candle tensors: f32 on the CPU, where weights stay as stored and are read by
//!   own kernels; float16 or bfloat16 on a GPU.
//!
//! # One chat request
//!
//! 1. `serve/router.rs` routes to `serve/openai/chat.rs`; `validate.rs` refuses what is not
//!    supported and names the field.
//! 2. `convert.rs` renders the messages ([`text::ChatTemplate`]), encodes them
//!    ([`text::Tokenizer`]) and fills an [`engine::GenerateRequest`].
//! 3. [`engine::EngineHandle::submit_choices`] queues it at the replica with the least load; a full
//!    queue answers 429.
//! 4. The engine thread (`engine/core.rs`) schedules one mixed batch a step: decodes first, then
//!    chunks of prompts. `batch.rs` lays it out as integers, `model_runner.rs` runs it on every
//!    rank through [`models::Decoder`], [`layers`] and [`kernels::Kernels`]; `sampler.rs` draws.
//! 5. [`engine::TokenEvent`]s go to `serve/openai/choice.rs`, which detokenises, looks for stop
//!    strings and hands deltas to `chat.rs` as JSON or server-sent events.
//!
//! # One step on a GPU
//!
//! 1. `engine/model_runner.rs` pads a step of one token a sequence to a bucket and stages its
//!    integers with one upload ([`kernels::Kernels::stage`]); larger steps run as they are.
//! 2. A bucket's step was recorded at the start: the same [`models::Decoder`] and [`layers`] as on
//!    the CPU ran once while the stream recorded ([`kernels::Kernels::record`]). Now it is replayed.
//! 3. [`kernels::Kernels::launch_draws`] draws all tokens on the GPU by the rules of
//!    `engine/sampler.rs`; only ids and the logprobs asked for come back.
//! 4. The engine does not wait for them: it schedules and launches the next step, in which
//!    [`kernels::drawn_id`] stands for a token that only the GPU knows, and then reads this one's
//!    and sends them while the GPU works. A step of which it draws tokens itself is read first.
//! 5. With several GPUs every rank replays its own graph; the all-reduces inside write into the
//!    other ranks' memory (`kernels/cuda/peers.rs`) or go through NCCL (`kernels/cuda/nccl.rs`), and
//!    rank 0 draws and tells the others.
//!
//! # One failing rank
//!
//! 1. A rank whose step is an error or a panic is recorded (`engine/watchdog.rs`) before its group
//!    learns that it has left, so the first record is the cause. A rank that does not come to a
//!    collective is named by those who wait: on the CPU by [`distributed::Comm`], on GPUs by the
//!    kernels after 4 s; a step that does not end, by the watchdog.
//! 2. The watchdog sets [`engine::EngineHandle::death`], which all replicas share and which ends the
//!    streams of all requests, and lets kernels that wait for the rank end ([`kernels::Interrupt`]).
//! 3. `serve/listen.rs` answers 503 on `/health` for a second, then the process ends with 1; memory of
//!    GPUs goes with it. `INFOLD_FAULT` ([`engine::Fault`]) makes a rank fail, for tests.
//!
//! # One start
//!
//! [`weights::resolve_model`] finds the files, [`weights::Checkpoint`] maps them,
//! [`models::ModelConfig`] checks the shape, `engine/config.rs` plans the KV cache, then each rank
//! cuts its slices ([`layers::Loader`]) and packs quantised ones for its SIMD level. On GPUs the
//! weights come first, then the largest step is run to measure what is left for the KV cache.
//!
//! # One merge
//!
//! 1. `merge/settings.rs` reads the flags or LLaMA-Factory's file; [`weights::Adapter`] sorts the
//!    tensors of each adapter by module.
//! 2. [`weights::MergedCheckpoint::plan`] finds by headers which tensor takes which deltas, and
//!    every fault, before a byte is written; tied embeddings come apart if they must.
//! 3. [`weights::ShardPlan`] splits the result as `save_pretrained` does; [`weights::write_shards`]
//!    asks for blocks of rows, which are folded on all cores while others are written and hashed.
//! 4. `merge/output.rs` wrote all that aside and renames it. The same [`weights::ModelSource`]
//!    starts a server without writing anything (`infold serve --merge-adapter`).

pub mod bench;
pub mod chat;
pub mod distributed;
pub mod engine;
pub mod kernels;
pub mod layers;
pub mod merge;
pub mod models;
pub mod serve;
pub mod text;
pub mod train;
pub mod vocabulary;
pub mod weights;
