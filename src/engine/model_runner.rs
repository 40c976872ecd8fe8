//! One rank: owns its kernels, its part of the model and its KV cache, and runs batches.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::JoinHandle;

use candle_core::{CpuStorage, DType, Result, Storage, Tensor};

use crate::distributed::Comm;
use crate::kernels::{Kernels, KvBlocks};
use crate::layers::{ForwardContext, Loader};
use crate::models::{Decoder, ModelConfig};
use crate::weights::ModelSource;

use super::EngineError;
use super::batch::StepInput;

/// Rows of logits computed at a time: bounds their memory at 64 · vocab_size · 4 bytes.
const LOGITS_CHUNK: usize = 64;

/// What every rank needs to start.
#[derive(Clone)]
pub(super) struct RunnerConfig {
    pub(super) checkpoint: Arc<dyn ModelSource>,
    pub(super) model: ModelConfig,
    pub(super) max_model_len: usize,
    pub(super) num_threads: usize,
    pub(super) num_blocks: usize,
    pub(super) block_size: usize,
    pub(super) kv_dtype: DType,
}

/// One rank's model and cache. Stays on the thread that made it.
pub(super) struct ModelRunner {
    kernels: Kernels,
    comm: Comm,
    decoder: Decoder,
    kv_cache: Vec<KvBlocks>,
}

impl ModelRunner {
    /// Loads this rank's part and allocates its KV cache.
    pub(super) fn load(
        config: &RunnerConfig,
        comm: Comm,
    ) -> std::result::Result<Self, EngineError> {
        let kernels = Kernels::cpu(config.num_threads)?;
        let loader = Loader::new(
            &*config.checkpoint,
            &kernels,
            comm.rank(),
            comm.world_size(),
        );
        let decoder = Decoder::load(&loader, &config.model, config.max_model_len)?;
        let kv_cache = (0..config.model.num_layers)
            .map(|_| {
                kernels.new_kv_blocks(
                    config.num_blocks,
                    config.block_size,
                    decoder.num_kv_heads(),
                    config.model.head_dim,
                    config.kv_dtype,
                )
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            kernels,
            comm,
            decoder,
            kv_cache,
        })
    }

    /// Runs one step and hands the logits over in chunks of rows: `on_logits(rows, values)` with
    /// `values` f32 `[rows, vocab_size]` flat, `rows` indexing `input.logits_rows`.
    pub(super) fn run(
        &mut self,
        input: &StepInput,
        mut on_logits: impl FnMut(Range<usize>, &[f32]),
    ) -> Result<()> {
        let context = ForwardContext {
            kernels: &self.kernels,
            comm: &self.comm,
            batch: &input.attention,
        };
        for kv_blocks in &mut self.kv_cache {
            self.kernels.copy_blocks(kv_blocks, &input.block_copies)?;
        }
        let hidden = self
            .decoder
            .forward(&input.input_ids, &context, &mut self.kv_cache)?;
        for start in (0..input.logits_rows.len()).step_by(LOGITS_CHUNK) {
            let rows = start..(start + LOGITS_CHUNK).min(input.logits_rows.len());
            let selected = self
                .kernels
                .gather_rows(&hidden, &input.logits_rows[rows.clone()])?;
            let logits = self.decoder.logits(&selected, &context)?;
            with_values(&logits, |values| on_logits(rows, values))?;
        }
        Ok(())
    }
}

/// Lends the values of a contiguous f32 CPU tensor without a copy.
fn with_values(tensor: &Tensor, read: impl FnOnce(&[f32])) -> Result<()> {
    let (storage, layout) = tensor.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(CpuStorage::F32(values)), Some((start, end))) => read(&values[start..end]),
        _ => candle_core::bail!("logits must be a contiguous f32 tensor on the CPU"),
    }
    Ok(())
}

/// All ranks of an engine: rank 0 on the calling thread, the others on threads of their own.
pub(super) struct Ranks {
    first: ModelRunner,
    others: Vec<(mpsc::Sender<Arc<StepInput>>, JoinHandle<()>)>,
}

impl Ranks {
    /// Loads every rank's part, all at once.
    pub(super) fn load(
        config: &RunnerConfig,
        tensor_parallel_size: usize,
    ) -> std::result::Result<Self, EngineError> {
        let mut comms = Comm::local_group(tensor_parallel_size).into_iter();
        let first_comm = comms.next().ok_or(EngineError::InvalidOption {
            option: "tensor-parallel-size",
            wanted: "at least 1".to_owned(),
            found: 0,
        })?;
        let mut others = Vec::new();
        let (loaded, outcomes) = mpsc::channel();
        for comm in comms {
            let (steps, inputs) = mpsc::channel::<Arc<StepInput>>();
            let (config, loaded) = (config.clone(), loaded.clone());
            let thread = std::thread::Builder::new()
                .name(format!("rank-{}", comm.rank()))
                .spawn(move || run_rank(&config, comm, &loaded, &inputs))
                .map_err(|source| EngineError::Thread { source })?;
            others.push((steps, thread));
        }
        let first = ModelRunner::load(config, first_comm)?;
        for _ in &others {
            // Every rank sends exactly once, or ends and leaves the channel short.
            outcomes
                .recv()
                .unwrap_or_else(|_| Err(EngineError::died("a rank ended while loading")))?;
        }
        Ok(Self { first, others })
    }

    /// Runs one step on every rank; logits arrive on the calling thread.
    pub(super) fn run(
        &mut self,
        input: StepInput,
        on_logits: impl FnMut(Range<usize>, &[f32]),
    ) -> Result<()> {
        let input = Arc::new(input);
        for (steps, _) in &self.others {
            // A rank that ended makes the first collective fail with its number.
            let _ = steps.send(Arc::clone(&input));
        }
        self.first.run(&input, on_logits)
    }
}

impl Drop for Ranks {
    fn drop(&mut self) {
        for (steps, thread) in self.others.drain(..) {
            drop(steps);
            // A rank that panicked has already been reported through its collective.
            let _ = thread.join();
        }
    }
}

fn run_rank(
    config: &RunnerConfig,
    comm: Comm,
    loaded: &mpsc::Sender<std::result::Result<(), EngineError>>,
    inputs: &mpsc::Receiver<Arc<StepInput>>,
) {
    let rank = comm.rank();
    let mut runner = match ModelRunner::load(config, comm) {
        Ok(runner) => {
            let _ = loaded.send(Ok(()));
            runner
        }
        Err(error) => {
            let _ = loaded.send(Err(error));
            return;
        }
    };
    while let Ok(input) = inputs.recv() {
        if let Err(error) = runner.run(&input, |_, _| {}) {
            tracing::error!(rank, %error, "a step failed");
            return;
        }
    }
}

/// Returns the dtype whose name decides the KV cache's: that of the first attention weight.
pub(super) fn weight_dtype(
    checkpoint: &dyn ModelSource,
) -> Option<candle_core::quantized::GgmlDType> {
    checkpoint
        .tensor("model.layers.0.self_attn.q_proj.weight")
        .ok()
        .map(|tensor| tensor.dtype)
}

/// Returns the checkpoint's name for messages: its last path part.
pub(super) fn display_name(path: &Path) -> String {
    path.file_name().map_or_else(
        || path.display().to_string(),
        |name| name.to_string_lossy().into_owned(),
    )
}
