//! One rank: owns its kernels, its part of the model and its KV cache, and runs batches.
//!
//! On a GPU a step whose sequences all have one token is padded to a bucket and replayed as a
//! graph that was recorded at the start. A step is launched and later finished; on a GPU another
//! may be launched between if this one's tokens are all drawn on the device.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::{CpuStorage, DType, Result, Storage, Tensor};

use crate::distributed::Comm;
use crate::kernels::{
    AttentionBatch, Collectives, DeviceOptions, Drawn, Graph, Kernels, KvBlocks, PendingDraws,
    Quantization,
};
use crate::layers::{ForwardContext, Loader};
use crate::models::{Decoder, ModelConfig};
use crate::weights::ModelSource;

use super::EngineError;
use super::batch::StepInput;
use super::config::Graphs;
use super::watchdog::{Operation, RankWatch};

/// Rows of logits computed at a time: bounds their memory at 64 · vocab_size · 4 bytes.
const LOGITS_CHUNK: usize = 64;
/// Bytes of the GPU's weights beside what the checkpoint counts: room that matrices leave.
const WEIGHTS_SLACK: usize = 64 << 20;

/// Where ranks compute.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Placement {
    /// With this many threads each.
    Cpu { num_threads: usize },
    /// Rank r on GPU `first + r`, in `dtype`, met through `collectives`.
    Gpu {
        first: usize,
        dtype: DType,
        quantization: Quantization,
        collectives: Collectives,
    },
}

/// What every rank needs to start.
#[derive(Clone)]
pub(super) struct RunnerConfig {
    pub(super) model: ModelConfig,
    /// The longest sequence that may be asked for.
    pub(super) max_model_len: usize,
    pub(super) placement: Placement,
    pub(super) block_size: usize,
    pub(super) kv_dtype: DType,
    pub(super) max_num_tokens: usize,
    pub(super) max_num_seqs: usize,
    pub(super) graphs: Graphs,
    /// Whether a step's input may have ids that the step before drew.
    pub(super) launches_ahead: bool,
}

/// Returns the bytes that a GPU's part of the weights takes at most: 2 each, or 1 where quantised.
fn reserved_bytes(
    num_parameters: usize,
    model: &ModelConfig,
    quantization: Quantization,
    world_size: usize,
) -> usize {
    let saved = match quantization {
        Quantization::None => 0,
        Quantization::Fp8 => model.num_linear_parameters(),
    };
    // A file that lacks tensors is found when they are looked up.
    (2 * num_parameters).saturating_sub(saved) / world_size + WEIGHTS_SLACK
}

/// What a row of logits came to.
pub(super) enum RowOutput<'a> {
    /// The logits, f32 `[vocab_size]`.
    Logits(&'a [f32]),
    /// A token that the device drew.
    Drawn(Drawn),
}

/// A step that was launched and is to be finished.
pub(super) struct LaunchedStep {
    input: Arc<StepInput>,
    work: Work,
}

/// What a launched step still lacks.
enum Work {
    /// Logits of these hidden states, on the CPU.
    Logits(Tensor),
    /// The same on a GPU, of the batch as it is staged.
    StagedLogits(Tensor, Box<AttentionBatch>),
    /// Drawing from some of these logits and reading the others.
    Reading(Tensor),
    /// The tokens that the device draws.
    Drawing(PendingDraws),
    /// Nothing that this rank sees.
    Nothing,
}

/// A step of one bucket, recorded.
struct RecordedStep {
    graph: Graph,
    logits: Tensor,
}

/// One rank's model and cache. Stays on the thread that made it.
pub(super) struct ModelRunner {
    config: RunnerConfig,
    kernels: Kernels,
    comm: Arc<Comm>,
    watch: RankWatch,
    decoder: Decoder,
    kv_cache: Vec<KvBlocks>,
    recorded: HashMap<usize, RecordedStep>,
}

impl ModelRunner {
    /// Loads this rank's part; the KV cache comes with [`Self::allocate_kv_cache`].
    pub(super) fn load(
        config: &RunnerConfig,
        checkpoint: &dyn ModelSource,
        comm: Arc<Comm>,
        watch: RankWatch,
    ) -> std::result::Result<Self, EngineError> {
        let world_size = comm.world_size();
        let kernels = match config.placement {
            Placement::Cpu { num_threads } => Kernels::cpu(num_threads)?,
            Placement::Gpu {
                first,
                dtype,
                quantization,
                collectives,
            } => open_gpu(
                &DeviceOptions {
                    ordinal: first + comm.rank(),
                    dtype,
                    quantization,
                    max_num_tokens: config.max_num_tokens,
                    max_num_sequences: config.max_num_seqs,
                    max_sequence_blocks: config.max_model_len.div_ceil(config.block_size),
                    num_kv_heads: (config.model.num_kv_heads / world_size).max(1),
                    vocab_size: config.model.vocab_size,
                    rank: comm.rank(),
                    world_size,
                    collectives,
                },
                &comm,
                &watch,
            )?,
        };
        if let Some(interrupt) = kernels.interrupt() {
            watch.on_failure(|| interrupt.raise());
        }
        if let Placement::Gpu { quantization, .. } = config.placement {
            let num_parameters = checkpoint.num_parameters() as usize;
            let (model, size) = (&config.model, world_size);
            kernels.reserve_weights(reserved_bytes(num_parameters, model, quantization, size))?;
        }
        let loader = Loader::new(checkpoint, &kernels, comm.rank(), world_size);
        let decoder = Decoder::load(&loader, &config.model, config.max_model_len)?;
        kernels.synchronize()?;
        Ok(Self {
            config: config.clone(),
            kernels,
            comm,
            watch,
            decoder,
            kv_cache: Vec::new(),
            recorded: HashMap::new(),
        })
    }

    /// Runs the largest step once on a cache of one block and returns free and total bytes of
    /// the GPU after it; none on the CPU.
    pub(super) fn measure_memory(&mut self) -> Result<Option<(u64, u64)>> {
        if !self.kernels.is_on_gpu() {
            return Ok(None);
        }
        self.allocate_kv_cache(1)?;
        let (tokens, sequences) = (self.config.max_num_tokens, self.config.max_num_seqs);
        let input = StepInput::largest(tokens, sequences, self.config.block_size);
        let batch = self.stage(&input, None)?;
        if let Some(hidden) = self.forward(&input, &batch)? {
            let drawn = hidden.narrow(0, 0, input.draws.len())?;
            let logits = self.logits(&drawn, &batch)?;
            let work = self.launch_draws(&logits, &input)?;
            let input = Arc::new(input);
            self.finish_step(LaunchedStep { input, work }, |_, _| {})?;
        }
        self.kernels.synchronize()?;
        self.kv_cache.clear();
        self.recorded.clear();
        self.kernels.settle_activations()?;
        self.kernels.gpu_memory()
    }

    /// Allocates the KV cache for good and connects the ranks, which must all come here.
    pub(super) fn finish(&mut self, num_blocks: usize) -> Result<()> {
        self.watch.begin(Operation::Connecting);
        self.allocate_kv_cache(num_blocks)?;
        if self.kernels.has_group() {
            let own = self.kernels.peer_addresses()?;
            // From here on nobody allocates.
            let all = self.comm.all_gather_u64(&own)?;
            let all: Vec<[u64; 2]> = all.iter().map(|pair| [pair[0], pair[1]]).collect();
            self.kernels.connect_peers(&all)?;
        }
        if !self.kernels.is_on_gpu() {
            return Ok(());
        }
        // Records every bucket now, so that no request waits for it.
        for bucket in self.config.graphs.buckets(self.config.max_num_seqs) {
            self.watch.begin(Operation::Connecting);
            self.run(Arc::new(StepInput::decodes(bucket)))?;
            // Building the next graph allocates: nothing may run then that waits for a peer.
            self.kernels.synchronize()?;
        }
        Ok(())
    }

    /// Leaves a group of GPUs that meets through NCCL; no step may follow.
    pub(super) fn leave_group(&mut self) {
        // NCCL does not let go of a group that a graph refers to.
        self.recorded.clear();
        self.kernels.leave_group();
    }

    fn allocate_kv_cache(&mut self, num_blocks: usize) -> Result<()> {
        let sizes = [
            num_blocks,
            self.config.block_size,
            self.decoder.num_kv_heads(),
            self.config.model.head_dim,
        ];
        let num_layers = self.config.model.num_layers;
        // Recorded steps write to the cache that goes.
        self.recorded.clear();
        self.kv_cache = self
            .kernels
            .new_kv_cache(num_layers, sizes, self.config.kv_dtype)?;
        Ok(())
    }

    /// Runs one step for its effect on the cache and the other ranks.
    pub(super) fn run(&mut self, input: Arc<StepInput>) -> Result<()> {
        let step = self.launch(input)?;
        self.finish_step(step, |_, _| {})
    }

    /// Launches one step. It must be finished before the next one is launched, unless it
    /// [is drawn on the device](StepInput::is_drawn_on_device).
    pub(super) fn launch(&mut self, input: Arc<StepInput>) -> Result<LaunchedStep> {
        self.kernels
            .copy_blocks(&mut self.kv_cache, &input.block_copies)?;
        let work = match self.kernels.is_on_gpu() {
            true => self.launch_on_gpu(&input)?,
            false => {
                let hidden = self.forward(&input, &input.attention)?;
                hidden.map_or(Work::Nothing, Work::Logits)
            }
        };
        Ok(LaunchedStep { input, work })
    }

    /// Hands over what became of each row of a step's `logits_rows`, in order. Steps are finished
    /// in the order of their launches.
    pub(super) fn finish_step(
        &mut self,
        step: LaunchedStep,
        mut on_row: impl FnMut(usize, RowOutput<'_>),
    ) -> Result<()> {
        let LaunchedStep { input, work } = step;
        match work {
            Work::Logits(hidden) => self.read_on_cpu(&hidden, &input, &mut on_row)?,
            Work::StagedLogits(hidden, batch) => {
                let num_rows = input.logits_rows.len();
                let chunk = self.config.max_num_seqs.min(LOGITS_CHUNK);
                for start in (0..num_rows).step_by(chunk) {
                    let rows = start..(start + chunk).min(num_rows);
                    let selected = hidden.narrow(0, start, rows.len())?;
                    let logits = self.logits(&selected, &batch)?;
                    self.read_rows(&logits, rows, &input, &mut on_row)?;
                }
            }
            Work::Reading(logits) => {
                self.read_rows(&logits, 0..input.logits_rows.len(), &input, &mut on_row)?;
            }
            Work::Drawing(draws) => {
                let drawn = self.kernels.finish_draws(draws)?.into_iter().flatten();
                for (row, drawn) in drawn.enumerate() {
                    on_row(row, RowOutput::Drawn(drawn));
                }
            }
            Work::Nothing => {}
        }
        self.kernels.check_collectives()
    }

    fn launch_on_gpu(&mut self, input: &StepInput) -> Result<Work> {
        let bucket = input
            .num_decodes()
            .and_then(|num| self.config.graphs.bucket(num))
            .map(|bucket| bucket.min(self.config.max_num_seqs));
        let batch = self.stage(input, bucket)?;
        let logits = match bucket {
            Some(bucket) => self.run_bucket(bucket, input, &batch)?,
            None => {
                let Some(hidden) = self.forward(input, &batch)? else {
                    return self.end_without_rows();
                };
                if !input.is_drawn_on_device() {
                    return Ok(Work::StagedLogits(hidden, Box::new(batch)));
                }
                self.logits(&hidden, &batch)?
            }
        };
        match input.is_drawn_on_device() {
            true => self.launch_draws(&logits, input),
            false => Ok(Work::Reading(logits)),
        }
    }

    /// Uploads a step's integers and returns the batch that knows where they are.
    fn stage(&self, input: &StepInput, bucket: Option<usize>) -> Result<AttentionBatch> {
        let mut batch = input.attention.clone();
        let Some(kv) = self.kv_cache.first() else {
            candle_core::bail!("a step before the KV cache");
        };
        self.kernels
            .stage(&input.input_ids, &mut batch, &input.logits_rows, bucket, kv)?;
        Ok(batch)
    }

    /// Lets the first rank draw from all rows, and tells the other GPUs what it draws.
    fn launch_draws(&self, logits: &Tensor, input: &StepInput) -> Result<Work> {
        let work = match self.comm.rank() {
            0 => Work::Drawing(self.kernels.launch_draws(logits, &input.draws)?),
            _ => Work::Nothing,
        };
        if self.config.launches_ahead {
            self.kernels.share_drawn_ids(input.draws.len())?;
        }
        Ok(work)
    }

    /// A prompt that goes on in the next step draws nothing; the first rank waits for it all the
    /// same, so that no more than one step is launched ahead.
    fn end_without_rows(&self) -> Result<Work> {
        Ok(match self.comm.rank() {
            0 => Work::Drawing(self.kernels.launch_no_draws()?),
            _ => Work::Nothing,
        })
    }

    fn read_on_cpu(
        &self,
        hidden: &Tensor,
        input: &StepInput,
        on_row: &mut impl FnMut(usize, RowOutput<'_>),
    ) -> Result<()> {
        let num_rows = input.logits_rows.len();
        for start in (0..num_rows).step_by(LOGITS_CHUNK) {
            let num_chunk_rows = LOGITS_CHUNK.min(num_rows - start);
            let selected = hidden.narrow(0, start, num_chunk_rows)?;
            let logits = self.logits(&selected, &input.attention)?;
            with_values(&logits, |values| {
                let width = values.len() / num_chunk_rows;
                for (i, values) in values.chunks_exact(width).enumerate() {
                    on_row(start + i, RowOutput::Logits(values));
                }
            })?;
        }
        Ok(())
    }

    /// Runs a step of one bucket: as recorded, or the first time as it is.
    fn run_bucket(
        &mut self,
        bucket: usize,
        input: &StepInput,
        batch: &AttentionBatch,
    ) -> Result<Tensor> {
        if let Some(step) = self.recorded.get(&bucket) {
            self.kernels.replay(&step.graph)?;
            return Ok(step.logits.clone());
        }
        let step = |runner: &mut Self| {
            let Some(hidden) = runner.forward(input, batch)? else {
                candle_core::bail!("a step of {bucket} sequences without rows of logits");
            };
            runner.logits(&hidden, batch)
        };
        // Makes the allocator's pool large enough and lets cuBLAS choose; then the same again
        // is only recorded.
        let logits = step(self)?;
        self.kernels.synchronize()?;
        // Building a graph allocates: no rank may then wait for a kernel that is still to come.
        self.comm.barrier()?;
        let kernels = self.kernels.clone();
        let (graph, recorded) = kernels.record(|| step(self))?;
        self.recorded.insert(
            bucket,
            RecordedStep {
                graph,
                logits: recorded,
            },
        );
        self.comm.barrier()?;
        Ok(logits)
    }

    /// Returns the hidden states of the rows that logits are needed of; none of no rows.
    fn forward(&mut self, input: &StepInput, batch: &AttentionBatch) -> Result<Option<Tensor>> {
        let context = ForwardContext {
            kernels: &self.kernels,
            comm: &self.comm,
            batch,
        };
        let (ids, rows) = (&input.input_ids, &input.logits_rows);
        self.decoder
            .forward(ids, rows, &context, &mut self.kv_cache)
    }

    fn logits(&self, hidden: &Tensor, batch: &AttentionBatch) -> Result<Tensor> {
        let context = ForwardContext {
            kernels: &self.kernels,
            comm: &self.comm,
            batch,
        };
        self.decoder.logits(hidden, &context)
    }

    /// Draws from the rows that ask for it and copies the others to the host.
    fn read_rows(
        &self,
        logits: &Tensor,
        rows: std::ops::Range<usize>,
        input: &StepInput,
        on_row: &mut impl FnMut(usize, RowOutput<'_>),
    ) -> Result<()> {
        if self.comm.rank() != 0 {
            return Ok(());
        }
        let draws = &input.draws[rows.clone()];
        let drawn = match draws.iter().any(Option::is_some) {
            true => {
                let pending = self.kernels.launch_draws(logits, draws)?;
                self.kernels.finish_draws(pending)?
            }
            false => vec![None; draws.len()],
        };
        for (i, drawn) in drawn.into_iter().enumerate() {
            match drawn {
                Some(drawn) => on_row(rows.start + i, RowOutput::Drawn(drawn)),
                None => {
                    let values = self.kernels.read_rows(&logits.narrow(0, i, 1)?, 1)?;
                    on_row(rows.start + i, RowOutput::Logits(&values));
                }
            }
        }
        Ok(())
    }

    /// Returns whether tokens are drawn by [`crate::kernels::Draw`].
    pub(super) fn draws_on_device(&self) -> bool {
        self.kernels.is_on_gpu()
    }

    /// Fills a penalty slot of the device.
    pub(super) fn mark_tokens(&self, slot: usize, prompt: &[u32], drawn: &[u32]) -> Result<()> {
        self.kernels.mark_tokens(slot, prompt, drawn)
    }
}

impl Drop for ModelRunner {
    fn drop(&mut self) {
        self.leave_group();
    }
}

/// Opens a rank's GPU and meets the others.
fn open_gpu(options: &DeviceOptions, comm: &Comm, watch: &RankWatch) -> Result<Kernels> {
    let kernels = Kernels::cuda(options)?;
    if let Collectives::Nccl(_) = options.collectives {
        // A rank whose GPU cannot be opened fails this: NCCL would wait for it.
        comm.barrier()?;
        watch.begin(Operation::Connecting);
        kernels.join_group(options)?;
        watch.end();
    }
    Ok(kernels)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fp8_halves_the_linears_and_nothing_else() {
        let model = ModelConfig::from_json(&serde_json::json!({
            "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 64,
        }))
        .unwrap();
        let tensors = model.tensors();
        let num_parameters: usize = (tensors.iter())
            .map(|(_, shape)| shape.iter().product::<usize>())
            .sum();
        // Of each layer q, k, v, o and three of the MLP.
        let linears = 2 * (64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 128);
        let bytes = |quantization| {
            let all = reserved_bytes(num_parameters, &model, quantization, 2);
            2 * (all - WEIGHTS_SLACK)
        };
        assert_eq!(bytes(Quantization::None), 2 * num_parameters);
        assert_eq!(
            bytes(Quantization::Fp8),
            2 * (num_parameters - linears) + linears
        );
    }
}
