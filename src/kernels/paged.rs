//! The paged KV cache of a layer and the batch that works on it, on the CPU or a GPU.

use candle_core::{Result, Tensor, bail};

use super::check;
use super::cpu::CpuKv;
use super::cuda::GpuKv;
use super::device::Staged;

/// Keys and values of one layer, in blocks of tokens.
pub struct KvBlocks(pub(super) KvData);

pub(super) enum KvData {
    Cpu(CpuKv),
    Gpu(GpuKv),
}

impl KvBlocks {
    /// Returns the number of blocks.
    pub fn num_blocks(&self) -> usize {
        match &self.0 {
            KvData::Cpu(kv) => kv.num_blocks,
            KvData::Gpu(kv) => kv.num_blocks,
        }
    }

    /// Returns the tokens of a block.
    pub fn block_size(&self) -> usize {
        match &self.0 {
            KvData::Cpu(kv) => kv.block_size,
            KvData::Gpu(kv) => kv.block_size,
        }
    }

    pub(super) fn gpu(&self) -> Result<&GpuKv> {
        match &self.0 {
            KvData::Gpu(kv) => Ok(kv),
            KvData::Cpu(_) => bail!("a KV cache of the CPU in a kernel of the GPU"),
        }
    }
}

/// What [`Kernels::rope_and_cache`](super::Kernels::rope_and_cache) needs besides the activations and the cache.
pub struct RopeAndCache<'a> {
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads.
    pub num_kv_heads: usize,
    /// Elements of a head; even.
    pub head_dim: usize,
    /// Weight `[head_dim]` of the queries' norm (Qwen3).
    pub q_norm: Option<&'a Tensor>,
    /// Weight `[head_dim]` of the keys' norm (Qwen3).
    pub k_norm: Option<&'a Tensor>,
    /// Epsilon of both norms.
    pub eps: f32,
    /// Cosines `[max_positions, head_dim / 2]`.
    pub cos: &'a Tensor,
    /// Sines `[max_positions, head_dim / 2]`.
    pub sin: &'a Tensor,
    /// Each token's position, and its cache slot `block * block_size + offset`, all distinct.
    pub batch: &'a AttentionBatch,
}

/// One batch of prefill chunks and decodes, mixed: n sequences, m tokens.
#[derive(Debug, Clone, Default)]
pub struct AttentionBatch {
    /// Where each sequence's tokens begin; n + 1.
    pub cu_seqlens_q: Vec<u32>,
    /// Tokens of each sequence in the cache, this step's included; n.
    pub context_lens: Vec<u32>,
    /// Blocks of all sequences, one after the other.
    pub block_tables: Vec<u32>,
    /// Where each sequence's blocks begin in `block_tables`; n + 1.
    pub cu_blocks: Vec<u32>,
    /// Position of each token; m.
    pub positions: Vec<u32>,
    /// Cache slot of each token; m.
    pub slot_mapping: Vec<u32>,
    /// The same on the GPU, once [`Kernels::stage`](super::Kernels::stage) has put it there.
    pub staged: Option<Staged>,
}

/// Checks a batch of `num_tokens` tokens against a cache of `[blocks, tokens of a block]`.
pub(super) fn check_batch(
    batch: &AttentionBatch,
    [num_blocks, block_size]: [usize; 2],
    num_tokens: usize,
) -> Result<()> {
    let num_sequences = batch.context_lens.len();
    let num_table_blocks = batch.block_tables.len();
    check::is_offsets(
        "cu_seqlens_q",
        &batch.cu_seqlens_q,
        num_sequences,
        num_tokens,
    )?;
    check::is_offsets(
        "cu_blocks",
        &batch.cu_blocks,
        num_sequences,
        num_table_blocks,
    )?;
    check::has_len("positions", batch.positions.len(), num_tokens)?;
    check::all_below("block", &batch.block_tables, num_blocks)?;
    let tokens = batch.cu_seqlens_q.windows(2);
    let blocks = batch.cu_blocks.windows(2);
    for ((tokens, blocks), &context_len) in tokens.zip(blocks).zip(&batch.context_lens) {
        let positions = &batch.positions[tokens[0] as usize..tokens[1] as usize];
        check::all_below("position", positions, context_len as usize)?;
        let num_slots = (blocks[1] - blocks[0]) as usize * block_size;
        if num_slots < context_len as usize {
            bail!("a context of {context_len} tokens in blocks of {num_slots}");
        }
    }
    Ok(())
}
