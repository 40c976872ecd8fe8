//! What kernels do on a GPU besides computing: staging a step, recording graphs, drawing tokens.
//!
//! The CPU needs none of it: there [`Kernels::stage`] leaves a batch as it is, nothing is
//! recorded, and the engine draws from the logits itself.

use candle_core::{DType, Result, Tensor, bail};

use super::cuda::{self, Gpu};
use super::{
    AttentionBatch, Collectives, Kernels, KvBlocks, KvData, Matrix, MatrixData, check, check_batch,
};

/// What the linears of decoder layers are multiplied as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quantization {
    /// As the computing type.
    None,
    /// As FP8 (E4M3) with one scale a row of the weight and one a row of its input, which is
    /// quantised before each product.
    Fp8,
}

/// What [`Kernels::cuda`] opens a GPU for.
#[derive(Debug, Clone, Copy)]
pub struct DeviceOptions {
    /// Which of the GPUs that `CUDA_VISIBLE_DEVICES` leaves, from 0.
    pub ordinal: usize,
    /// Type of weights and activations, and of the KV cache unless that is E4M3: `F16` or `BF16`.
    pub dtype: DType,
    /// What [`Kernels::load_linear`] makes of weights.
    pub quantization: Quantization,
    /// Tokens of the largest step.
    pub max_num_tokens: usize,
    /// Sequences of the largest step, and rows of logits at a time.
    pub max_num_sequences: usize,
    /// KV blocks of the longest sequence.
    pub max_sequence_blocks: usize,
    /// Key and value heads of this rank.
    pub num_kv_heads: usize,
    /// Tokens of the vocabulary.
    pub vocab_size: usize,
    /// This GPU's place in its group.
    pub rank: usize,
    /// GPUs of the group, on consecutive ordinals.
    pub world_size: usize,
    /// How they meet, the same on all.
    pub collectives: Collectives,
}

/// Returns the rows of the vocabulary that each of `world_size` ranks holds, the last ones maybe
/// fewer.
pub fn vocab_part_len(vocab_size: usize, world_size: usize) -> usize {
    // Rows of logits that ranks join begin on 16 bytes.
    match world_size {
        1 => vocab_size,
        _ => vocab_size.div_ceil(world_size).next_multiple_of(8),
    }
}

/// How one row's token is drawn on the device. The meanings, and which token a seed gives, are
/// those of the engine's sampler.
#[derive(Debug, Clone, PartialEq)]
pub struct Draw {
    /// 0 is greedy.
    pub temperature: f32,
    /// 0 is off.
    pub top_k: u32,
    /// 1 is off.
    pub top_p: f32,
    /// 0 is off.
    pub min_p: f32,
    /// 1 is off.
    pub typical_p: f32,
    /// 1 is off; needs a penalty slot.
    pub repetition_penalty: f32,
    /// 0 is off; needs a penalty slot.
    pub frequency_penalty: f32,
    /// 0 is off; needs a penalty slot.
    pub presence_penalty: f32,
    /// Seed of the sequence's stream.
    pub seed: u64,
    /// Which of the sequence's tokens this is, from 0.
    pub output_index: u64,
    /// The slot that [`Kernels::mark_tokens`] filled; the drawn token is added there.
    pub penalty_slot: Option<usize>,
    /// Report logprobs, and of this many most likely tokens.
    pub num_logprobs: Option<usize>,
    /// `(token, bias)`, each token once; `-inf` forbids.
    pub biases: Vec<(u32, f32)>,
}

impl Draw {
    /// Returns the draw that takes the most likely token.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            typical_p: 1.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            seed: 0,
            output_index: 0,
            penalty_slot: None,
            num_logprobs: None,
            biases: Vec::new(),
        }
    }
}

/// What became of a [`Draw`].
#[derive(Debug, Clone, PartialEq)]
pub struct Drawn {
    /// The token; where the outcome is `NotFinite`, the one with the bad logit.
    pub token_id: u32,
    /// Whether there is a token.
    pub outcome: DrawOutcome,
    /// The token's logprob where asked for; the bad logit where it is not finite.
    pub logprob: f32,
    /// The token's place by probability, from 1, where logprobs were asked for.
    pub rank: usize,
    /// The most likely `(token, logprob)`, best first, as many as were asked for.
    pub top: Vec<(u32, f32)>,
}

/// Whether a token was drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DrawOutcome {
    /// It was.
    Drawn,
    /// A logit is NaN or infinite.
    NotFinite,
    /// All tokens are forbidden or impossible.
    NothingLeft,
}

/// What a GPU is drawing; to be given to [`Kernels::finish_draws`].
pub struct PendingDraws(cuda::PendingDraws);

/// Returns the input id that stands for the token that row `row` of the draws launched last gets.
/// Only [`Kernels::stage`] takes it.
pub fn drawn_id(row: u32) -> u32 {
    // Read as a signed number it is -1 - row, which no token has.
    !row
}

/// Where a step's integers lie on the GPU.
#[derive(Debug, Clone, Copy)]
pub struct Staged(pub(super) cuda::Staged);

/// A recorded run of kernels.
pub struct Graph(cuda::Graph);

/// A slot of no block: on a GPU the token's keys and values are not kept.
pub const NO_SLOT: u32 = u32::MAX;

/// Most alternatives that a [`Draw`] can report: vLLM's `--max-logprobs`.
pub const MAX_TOP_LOGPROBS: usize = 20;

/// The most biases of all draws of one step.
pub const MAX_STEP_BIASES: usize = 1 << 16;

impl Kernels {
    /// Opens a GPU. Weights and activations are of `options.dtype`; one thread
    /// expands block formats while weights are loaded.
    ///
    /// # Errors
    /// When the program was built without the feature `cuda`, there is no such GPU, it is older
    /// than compute capability 8.0 (for FP8: another than 9.0), or its memory is too small.
    pub fn cuda(options: &DeviceOptions) -> Result<Self> {
        let gpu = Gpu::new(options)?;
        let mut kernels = Self::cpu(1)?;
        kernels.device = gpu.device().clone();
        kernels.gpu = Some(gpu.into());
        Ok(kernels)
    }

    /// Returns the number of GPUs that CUDA sees; 0 also without the feature `cuda`.
    pub fn num_gpus() -> usize {
        cuda::num_gpus()
    }

    /// Ends the process where a rank may have failed, with the feature `cuda` without the exit
    /// handlers of libraries: they may wait for a thread that hangs in them, or crash (seen with
    /// NCCL).
    pub fn end_process(code: u8) -> ! {
        cuda::end_process(i32::from(code))
    }

    /// Returns whether these kernels run on a GPU.
    pub fn is_on_gpu(&self) -> bool {
        self.gpu.is_some()
    }

    /// Returns free and total bytes of the GPU, none on the CPU.
    ///
    /// # Errors
    /// When the GPU has faulted.
    pub fn gpu_memory(&self) -> Result<Option<(u64, u64)>> {
        self.gpu.as_ref().map(|gpu| gpu.memory()).transpose()
    }

    /// Waits until the GPU has done everything; nothing on the CPU.
    ///
    /// # Errors
    /// When the GPU has faulted.
    pub fn synchronize(&self) -> Result<()> {
        self.gpu.as_ref().map_or(Ok(()), |gpu| gpu.synchronize())
    }

    /// Makes room for the GPU's weights in one piece.
    ///
    /// # Errors
    /// When its memory is too small.
    pub fn reserve_weights(&self, num_bytes: usize) -> Result<()> {
        self.gpu
            .as_ref()
            .map_or(Ok(()), |gpu| gpu.reserve_weights(num_bytes))
    }

    /// Lays matrices that are always multiplied together side by side: one matrix on a GPU, the
    /// same ones on the CPU.
    ///
    /// # Errors
    /// When their columns differ or memory is out.
    pub fn join(&self, parts: Vec<Matrix>) -> Result<Vec<Matrix>> {
        let Some(gpu) = &self.gpu else {
            return Ok(parts);
        };
        let parts = parts
            .into_iter()
            .map(Matrix::into_gpu)
            .collect::<Result<_>>()?;
        Ok(vec![Matrix(MatrixData::Gpu(gpu.join(parts)?))])
    }

    /// Lays vectors one after another.
    ///
    /// # Errors
    /// When they are not vectors of this device.
    pub fn join_vectors(&self, parts: &[Tensor]) -> Result<Tensor> {
        match &self.gpu {
            Some(gpu) => gpu.join_vectors(parts),
            None => Tensor::cat(parts, 0),
        }
    }

    /// Begins a layer. On a GPU a tensor that a method returned is gone when the layer after the
    /// next begins; on the CPU nothing happens.
    pub fn next_layer(&self) {
        if let Some(gpu) = &self.gpu {
            gpu.next_layer();
        }
    }

    /// Fixes the GPU's memory of activations at what the steps so far took at most; later ones
    /// must not be larger. Recorded graphs and tensors are no longer valid.
    ///
    /// # Errors
    /// When the GPU has faulted.
    pub fn settle_activations(&self) -> Result<()> {
        self.gpu
            .as_ref()
            .map_or(Ok(()), |gpu| gpu.settle_activations())
    }

    /// Uploads a step's integers, of which some ids may be [`drawn_id`]s; with a `bucket`, padded
    /// to that many sequences of one token each. `kv` is any layer of the cache that the step works on; a
    /// token whose slot is [`NO_SLOT`] writes nothing there. On the CPU nothing happens.
    ///
    /// # Errors
    /// When the step exceeds the [`DeviceOptions`], lists do not fit together, or a block, slot or
    /// position does not exist.
    pub fn stage(
        &self,
        input_ids: &[u32],
        batch: &mut AttentionBatch,
        logits_rows: &[u32],
        bucket: Option<usize>,
        kv: &KvBlocks,
    ) -> Result<()> {
        let Some(gpu) = &self.gpu else {
            return Ok(());
        };
        let num_tokens = input_ids.len();
        let cache = [kv.num_blocks(), kv.block_size()];
        check_batch(batch, cache, num_tokens)?;
        check::has_len("slot_mapping", batch.slot_mapping.len(), num_tokens)?;
        let mut slots = batch.slot_mapping.iter();
        if let Some(slot) =
            slots.find(|&&slot| slot != NO_SLOT && slot as usize >= cache[0] * cache[1])
        {
            bail!("slot {slot} in a cache of {cache:?} blocks and tokens of a block");
        }
        check::all_below("row of logits", logits_rows, num_tokens)?;
        let staged = gpu.stage(&cuda::StepArrays {
            input_ids,
            attention: batch,
            logits_rows,
            bucket,
        })?;
        batch.staged = Some(Staged(staged));
        Ok(())
    }

    /// Records what `work` launches, to be replayed; nothing of it runs now.
    ///
    /// # Errors
    /// Those of `work`, and on the CPU, which records nothing.
    pub fn record<R>(&self, work: impl FnOnce() -> Result<R>) -> Result<(Graph, R)> {
        let Some(gpu) = &self.gpu else {
            bail!("only a GPU records graphs");
        };
        let (graph, result) = gpu.record(work)?;
        Ok((Graph(graph), result))
    }

    /// Runs a recorded graph on what is staged now.
    ///
    /// # Errors
    /// When the GPU has faulted.
    pub fn replay(&self, graph: &Graph) -> Result<()> {
        self.gpu.as_ref().map_or(Ok(()), |gpu| gpu.replay(&graph.0))
    }

    /// Returns the embeddings of a batch's tokens `[tokens, cols]`, `ids` on the CPU, the staged
    /// ones on a GPU; otherwise as [`Kernels::embedding`].
    ///
    /// # Errors
    /// When nothing is staged.
    pub fn embed_batch(
        &self,
        ids: &[u32],
        batch: &AttentionBatch,
        table: &Matrix,
        vocab_start: usize,
    ) -> Result<Tensor> {
        match &self.gpu {
            Some(gpu) => gpu.embedding(batch.staged()?, table.gpu()?, vocab_start),
            None => self.embedding(ids, table, vocab_start),
        }
    }

    /// Returns `x Wᵀ + bias` and `residual`, both `[m, rows]`, or none and their sum where one
    /// kernel of a GPU makes it (cuBLASLt's rounds once, ours as if it was added later). Not where
    /// ranks meet on GPUs: they add first.
    ///
    /// # Errors
    /// When shapes or dtypes disagree.
    pub fn matmul_onto(
        &self,
        x: &Tensor,
        weight: &Matrix,
        bias: Option<&Tensor>,
        residual: Tensor,
    ) -> Result<(Option<Tensor>, Tensor)> {
        match &self.gpu {
            Some(gpu) if !gpu.has_group() => gpu.matmul_onto(x, weight.gpu()?, bias, &residual),
            _ => Ok((Some(self.matmul(x, &[weight], bias)?), residual)),
        }
    }

    /// Returns those rows of `x: [tokens, width]` that logits are wanted of: `rows` on the CPU, the
    /// staged ones, which must be as many, on a GPU.
    ///
    /// # Errors
    /// When nothing is staged, other rows are, or a row does not exist.
    pub fn gather_batch_rows(
        &self,
        x: &Tensor,
        rows: &[u32],
        batch: &AttentionBatch,
    ) -> Result<Tensor> {
        match &self.gpu {
            Some(gpu) => gpu.gather_logits_rows(x, batch.staged()?, rows.len()),
            None => self.gather_rows(x, rows),
        }
    }

    /// Returns logits `f32 [m, rows]` of `x: [m, cols]`; on a GPU `[m, width]`, of which the
    /// columns from the matrix's rows on mean nothing, and the next call overwrites them.
    ///
    /// # Errors
    /// When shapes disagree, or there are more rows than the GPU's buffer holds.
    pub fn logits(&self, x: &Tensor, weight: &Matrix, width: usize) -> Result<Tensor> {
        match &self.gpu {
            Some(gpu) => gpu.logits(x, weight.gpu()?, width),
            None => self.matmul(x, &[weight], None),
        }
    }

    /// Returns silu(gate) · up of the two halves of `x Wᵀ + bias`, in one kernel where that is
    /// faster.
    ///
    /// # Errors
    /// As [`Kernels::matmul`].
    pub fn matmul_silu(
        &self,
        x: &Tensor,
        parts: &[&Matrix],
        bias: Option<&Tensor>,
    ) -> Result<Tensor> {
        match (&self.gpu, parts, bias) {
            (Some(gpu), [weight], None) => gpu.matmul_silu(x, weight.gpu()?),
            _ => self.silu_and_mul(&self.matmul(x, parts, bias)?),
        }
    }

    /// Draws a token for each row that has a [`Draw`], on the GPU. `logits` is what
    /// [`Kernels::logits`] returned last, with at least as many rows.
    ///
    /// # Errors
    /// On the CPU, when two draws are pending already, or when the GPU has faulted.
    pub fn launch_draws(&self, logits: &Tensor, draws: &[Option<Draw>]) -> Result<PendingDraws> {
        match &self.gpu {
            Some(gpu) => gpu.launch_draws(logits, draws).map(PendingDraws),
            None => bail!("the engine draws tokens itself on the CPU"),
        }
    }

    /// Draws nothing: what is pending is only that the GPU comes here.
    ///
    /// # Errors
    /// As [`Kernels::launch_draws`].
    pub fn launch_no_draws(&self) -> Result<PendingDraws> {
        match &self.gpu {
            Some(gpu) => gpu.launch_no_draws().map(PendingDraws),
            None => bail!("the engine draws tokens itself on the CPU"),
        }
    }

    /// Waits for draws and returns what became of each row; none where there was no [`Draw`].
    ///
    /// # Errors
    /// When the GPU has faulted.
    pub fn finish_draws(&self, draws: PendingDraws) -> Result<Vec<Option<Drawn>>> {
        match &self.gpu {
            Some(gpu) => gpu.finish_draws(draws.0),
            None => bail!("the engine draws tokens itself on the CPU"),
        }
    }

    /// Gives all ranks the ids that rank 0's last [`Kernels::launch_draws`] draws for `num_rows`
    /// rows, so that the next step of each may have [`drawn_id`]s. Every rank must call it.
    ///
    /// # Errors
    /// When the GPU has faulted.
    pub fn share_drawn_ids(&self, num_rows: usize) -> Result<()> {
        self.gpu
            .as_ref()
            .map_or(Ok(()), |gpu| gpu.share_drawn_ids(num_rows))
    }

    /// Fills a penalty slot: tokens of the prompt and drawn ones, the latter as often as drawn.
    ///
    /// # Errors
    /// On the CPU, or when there is no such slot.
    pub fn mark_tokens(&self, slot: usize, prompt: &[u32], drawn: &[u32]) -> Result<()> {
        match &self.gpu {
            Some(gpu) => gpu.mark_tokens(slot, prompt, drawn),
            None => bail!("penalties have no slots on the CPU"),
        }
    }

    /// Copies the first `num_rows` rows of `f32 [rows, width]` from the GPU to the host, flat.
    ///
    /// # Errors
    /// On the CPU, or when the tensor is of another type.
    pub fn read_rows(&self, tensor: &Tensor, num_rows: usize) -> Result<Vec<f32>> {
        match &self.gpu {
            Some(gpu) => gpu.read_rows(tensor, num_rows),
            None => bail!("rows on the CPU need no copy"),
        }
    }

    /// Copies keys and values of whole blocks in every layer, one `(source, target)` after the
    /// other.
    ///
    /// # Errors
    /// A block outside the cache.
    pub fn copy_blocks(&self, layers: &mut [KvBlocks], copies: &[(u32, u32)]) -> Result<()> {
        let num_blocks = layers.first().map_or(0, KvBlocks::num_blocks);
        for &(source, target) in copies {
            if source.max(target) as usize >= num_blocks {
                bail!("copy of block {source} to {target} in a cache of {num_blocks} blocks");
            }
        }
        if let Some(gpu) = &self.gpu {
            let layers = layers
                .iter()
                .map(KvBlocks::gpu)
                .collect::<Result<Vec<_>>>()?;
            return gpu.copy_blocks(&layers, copies);
        }
        for layer in layers {
            for &(source, target) in copies {
                if let KvData::Cpu(kv) = &mut layer.0 {
                    kv.copy_block(source as usize, target as usize);
                }
            }
        }
        Ok(())
    }
}

impl AttentionBatch {
    pub(super) fn staged(&self) -> Result<&cuda::Staged> {
        match &self.staged {
            Some(staged) => Ok(&staged.0),
            None => bail!("the batch was not staged on the GPU"),
        }
    }
}
