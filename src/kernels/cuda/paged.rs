//! The paged KV cache on a GPU and the kernels that write and read it.

use std::sync::Arc;

use candle_core::{Result, Tensor, bail};

use super::super::{RopeAndCache, check};
use super::batch::{SPLIT_BLOCKS_PER_MULTIPROCESSOR, Staged};
use super::driver::{Address, Arg, Driver, Geometry};
use super::memory::Buffer;
use super::tensor_map::TensorMap;
use super::{DType, Gpu};

/// Rows (token, head) of a tile of `attention_prefill`.
const PREFILL_TILE_ROWS: usize = 128;
/// Heads that a thread of `rope_and_cache` reads at once.
const HEADS_OF_A_THREAD: usize = 3;
/// Tokens of a box that `attention_prefill_wgmma` copies of the cache.
const PREFILL_BOX_TOKENS: usize = 16;
/// Pairs of blocks copied by one launch: those of `BlockPairs` in elementwise.cu.
const MAX_COPIES: usize = 128;

/// Keys and values of one layer: `[num_blocks][num_kv_heads][block_size][head_dim]` each.
pub(in crate::kernels) struct GpuKv {
    pub(in crate::kernels) num_blocks: usize,
    pub(in crate::kernels) block_size: usize,
    pub(in crate::kernels) num_kv_heads: usize,
    pub(in crate::kernels) head_dim: usize,
    /// The computing type or E4M3.
    dtype: DType,
    keys: Address,
    values: Address,
    /// Keys and values for `attention_prefill_wgmma`, where the GPU has it and it reads the type.
    maps: Option<Box<[TensorMap; 2]>>,
    _memory: Arc<Buffer>,
}

impl GpuKv {
    fn block_bytes(&self) -> usize {
        self.dtype.size_in_bytes() * self.num_kv_heads * self.block_size * self.head_dim
    }

    /// Returns what its element type adds to the names of kernels that read or write it.
    fn form(&self) -> &'static str {
        match self.dtype {
            DType::F8E4M3 => FP8_FORM,
            _ => "",
        }
    }

    fn block_shift(&self) -> i32 {
        self.block_size.trailing_zeros() as i32
    }
}

/// What names of kernels have before the computing type when the cache is E4M3.
const FP8_FORM: &str = "_fp8";

/// What the attention kernels need between launches.
pub(super) struct Scratch {
    /// Partial results of splits.
    partial: Buffer,
    /// Zero between launches.
    counters: Buffer,
    /// `attention_prefill_wgmma`'s, zero between launches.
    prefill_counters: Buffer,
    has_wgmma_prefill: bool,
}

impl Scratch {
    pub(super) fn new(driver: &Driver, type_name: &str) -> Result<Self> {
        for dim in [64u32, 128] {
            for form in ["", FP8_FORM] {
                for group in [8, 16] {
                    for kernel in ["attention_decode", "rope_attention_decode"] {
                        let name = format!("{kernel}{form}_{type_name}_{dim}_g{group}");
                        driver.allow_shared(&name, 512 * dim)?;
                    }
                }
                let name = format!("attention_prefill{form}_{type_name}_{dim}");
                driver.allow_shared(&name, prefill_shared_bytes(form, dim))?;
            }
            let name = format!("attention_prefill_wgmma_{type_name}_{dim}");
            driver.allow_shared(&name, wgmma_shared_bytes(dim))?;
        }
        let wgmma_name = format!("attention_prefill_wgmma_{type_name}_128");
        // Splits come in only while few sequences leave the GPU idle, so their number times the
        // sequences times the kv heads stays near `max_splits`' blocks.
        let num_partials = 4 * SPLIT_BLOCKS_PER_MULTIPROCESSOR * driver.num_multiprocessors;
        Ok(Self {
            partial: driver.allocate(num_partials * MAX_GROUP * (128 + 4) * 4)?,
            counters: driver.allocate_zeroed(4 * MAX_COUNTERS)?,
            prefill_counters: driver.allocate_zeroed(8)?,
            has_wgmma_prefill: driver.has_kernel(&wgmma_name),
        })
    }
}

/// Returns the dynamic shared memory of `attention_prefill`, whose `form` says what the cache is.
fn prefill_shared_bytes(form: &str, head_dim: u32) -> u32 {
    match form {
        // One pair of widened tiles beside the codes.
        FP8_FORM => 640 * head_dim,
        _ => 768 * head_dim,
    }
}

/// Returns the dynamic shared memory of `attention_prefill_wgmma`.
fn wgmma_shared_bytes(head_dim: u32) -> u32 {
    1536 * head_dim + 1024
}

/// Query heads that share a kv head, at most.
const MAX_GROUP: usize = 16;
/// Sequences times kv heads that may be split.
const MAX_COUNTERS: usize = 1 << 16;

impl Gpu {
    /// Reserves the keys and values of `num_layers` layers, of the computing type or E4M3.
    pub(in crate::kernels) fn new_kv_cache(
        &self,
        num_layers: usize,
        [num_blocks, block_size, num_kv_heads, head_dim]: [usize; 4],
        dtype: DType,
    ) -> Result<Vec<GpuKv>> {
        if ![self.dtype, DType::F8E4M3].contains(&dtype) {
            bail!(
                "the KV cache of a GPU that computes in {:?} is that or F8E4M3, got {dtype:?}",
                self.dtype
            );
        }
        if !block_size.is_power_of_two() {
            bail!("--block-size must be a power of two on a GPU, got {block_size}");
        }
        if ![64, 128].contains(&head_dim) {
            bail!(
                "the CUDA attention kernels are made for heads of 64 and 128, the model has {head_dim}"
            );
        }
        let half = num_blocks * num_kv_heads * block_size * head_dim * dtype.size_in_bytes();
        let memory = Arc::new(self.driver.allocate_zeroed(2 * half * num_layers)?);
        let num_rows = num_blocks * num_kv_heads * block_size;
        let has_boxes = num_rows > 0 && block_size >= PREFILL_BOX_TOKENS;
        let map = |address| {
            self.driver
                .matrix_map(address, [num_rows, head_dim], PREFILL_BOX_TOKENS)
        };
        let layer = |index: usize| {
            let keys = memory.address() + (2 * index * half) as Address;
            let values = keys + half as Address;
            // It hands tiles to the tensor cores as they come in: not of E4M3.
            let reads = self.scratch.has_wgmma_prefill && dtype == self.dtype;
            let maps = if reads && has_boxes {
                Some(Box::new([map(keys)?, map(values)?]))
            } else {
                None
            };
            Ok(GpuKv {
                num_blocks,
                block_size,
                num_kv_heads,
                head_dim,
                dtype,
                keys,
                values,
                maps,
                _memory: Arc::clone(&memory),
            })
        };
        (0..num_layers).map(layer).collect()
    }

    /// Copies blocks in all layers of a cache, in the given order.
    pub(in crate::kernels) fn copy_blocks(
        &self,
        layers: &[&GpuKv],
        copies: &[(u32, u32)],
    ) -> Result<()> {
        let (Some(first), false) = (layers.first(), copies.is_empty()) else {
            return Ok(());
        };
        let stride = layers.get(1).map_or(0, |second| second.keys - first.keys);
        let mut rest = copies;
        while !rest.is_empty() {
            let (now, later) = rest.split_at(independent(rest).min(MAX_COPIES));
            rest = later;
            let mut pairs = [[0i32; 2]; MAX_COPIES];
            for (pair, &(from, to)) in pairs.iter_mut().zip(now) {
                *pair = [from as i32, to as i32];
            }
            for cache in [first.keys, first.values] {
                let args = [
                    Arg::Pointer(cache),
                    Arg::Structure((&raw const pairs).cast()),
                    Arg::I64(stride as i64),
                    Arg::I64(first.block_bytes() as i64),
                ];
                let chunks = first.block_bytes().div_ceil(16 * 256).min(8);
                let geometry = Geometry::new([chunks, now.len(), layers.len()], 256);
                self.driver.launch("copy_blocks", geometry, &args)?;
            }
        }
        Ok(())
    }

    /// Caches the staged step's keys and values and returns causal attention of its queries: in
    /// one kernel if every sequence has one token, in two otherwise.
    pub(in crate::kernels) fn rope_and_attention(
        &self,
        qkv: &Tensor,
        args: &RopeAndCache<'_>,
        staged: &Staged,
        kv: &GpuKv,
        scale: f32,
    ) -> Result<Tensor> {
        if staged.num_prefills > 0 {
            let q = self.rope_and_cache(qkv, args, staged, kv)?;
            return self.paged_attention(&q, kv, staged, args.num_heads, scale);
        }
        let num_tokens = check_projection(qkv, args, staged, kv)?;
        check_group(args.num_heads, kv)?;
        let (tensor, out) = self.new_tensor([num_tokens, args.num_heads * kv.head_dim])?;
        let mut kernel_args = vec![Arg::Pointer(out)];
        kernel_args.extend(self.projection(qkv, args, staged)?);
        kernel_args.push(Arg::F32(args.eps));
        let (name, num_heads) = ("rope_attention_decode", args.num_heads);
        self.attention_decode(name, kernel_args, kv, staged, num_heads, scale)?;
        Ok(tensor)
    }

    /// Norms, rotates and caches the staged step's keys, and returns its queries.
    pub(in crate::kernels) fn rope_and_cache(
        &self,
        qkv: &Tensor,
        args: &RopeAndCache<'_>,
        staged: &Staged,
        kv: &GpuKv,
    ) -> Result<Tensor> {
        let (num_heads, head_dim) = (args.num_heads, args.head_dim);
        let all_heads = num_heads + 2 * args.num_kv_heads;
        let num_tokens = check_projection(qkv, args, staged, kv)?;
        let (tensor, out) = self.new_tensor([num_tokens, num_heads * head_dim])?;
        let [qkv, tables @ ..] = self.projection(qkv, args, staged)?;
        // The bias has been added by the product.
        let bias = 0;
        let mut kernel_args = [out, kv.keys, kv.values].map(Arg::Pointer).to_vec();
        kernel_args.extend([qkv, Arg::Pointer(bias)]);
        kernel_args.extend(tables);
        kernel_args.push(Arg::F32(args.eps));
        kernel_args
            .extend([num_heads as i32, args.num_kv_heads as i32, kv.block_shift()].map(Arg::I32));
        let name = format!("rope_and_cache{}_{}_{head_dim}", kv.form(), self.type_name);
        let num_threads = all_heads.div_ceil(HEADS_OF_A_THREAD) * head_dim / 16;
        let block = num_threads.next_multiple_of(32).min(256);
        let geometry = Geometry::new([num_tokens, 1, 1], block);
        self.driver.launch(&name, geometry, &kernel_args)?;
        Ok(tensor)
    }

    /// Returns causal attention of the staged step's queries.
    pub(in crate::kernels) fn paged_attention(
        &self,
        q: &Tensor,
        kv: &GpuKv,
        staged: &Staged,
        num_heads: usize,
        scale: f32,
    ) -> Result<Tensor> {
        let width = num_heads * kv.head_dim;
        let num_tokens = check::rows_of("q", q, width)?;
        check::has_len("the staged step", staged.num_tokens, num_tokens)?;
        check_group(num_heads, kv)?;
        let (tensor, out) = self.new_tensor([num_tokens, width])?;
        let q = self.address("q", q, self.dtype)?;
        // Decodes first: their kernel counts on rope_and_cache being its predecessor.
        if staged.num_decodes > 0 {
            let queries = [out, q].map(Arg::Pointer).to_vec();
            self.attention_decode("attention_decode", queries, kv, staged, num_heads, scale)?;
        }
        if staged.num_prefills > 0 {
            self.attention_prefill([out, q], kv, staged, num_heads, scale)?;
        }
        Ok(tensor)
    }

    /// Returns the kernels' parameters from the product's output to the slots.
    fn projection(
        &self,
        qkv: &Tensor,
        args: &RopeAndCache<'_>,
        staged: &Staged,
    ) -> Result<[Arg; 7]> {
        let norm = |weight: Option<&Tensor>| match weight {
            Some(weight) => self.address("a head's norm", weight, self.dtype),
            None => Ok(0),
        };
        Ok([
            self.address("qkv", qkv, self.dtype)?,
            norm(args.q_norm)?,
            norm(args.k_norm)?,
            self.address("cos", args.cos, DType::F32)?,
            self.address("sin", args.sin, DType::F32)?,
            staged.positions,
            staged.slots,
        ]
        .map(Arg::Pointer))
    }

    /// Launches `kernel`, whose parameters before the cache are `args`.
    fn attention_decode(
        &self,
        kernel: &str,
        mut args: Vec<Arg>,
        kv: &GpuKv,
        staged: &Staged,
        num_heads: usize,
        scale: f32,
    ) -> Result<()> {
        let group = num_heads / kv.num_kv_heads;
        let num_rows = staged.num_sequences * kv.num_kv_heads;
        if staged.num_splits > 1 && num_rows > MAX_COUNTERS {
            bail!("{num_rows} sequences times kv heads share splits; the limit is {MAX_COUNTERS}");
        }
        let [tables @ .., split_tokens] = [
            staged.cu_seqlens_q,
            staged.context_lens,
            staged.block_tables,
            staged.cu_blocks,
            staged.split_tokens,
        ];
        args.extend([kv.keys, kv.values].map(Arg::Pointer));
        args.extend(tables.map(Arg::Pointer));
        let scratch = [
            split_tokens,
            self.scratch.partial.address(),
            self.scratch.counters.address(),
        ];
        args.extend(scratch.map(Arg::Pointer));
        args.push(Arg::F32(scale * std::f32::consts::LOG2_E));
        args.extend([num_heads as i32, kv.num_kv_heads as i32, kv.block_shift()].map(Arg::I32));
        let bound = if group <= 8 { 8 } else { 16 };
        let (form, type_name, dim) = (kv.form(), self.type_name, kv.head_dim);
        let name = format!("{kernel}{form}_{type_name}_{dim}_g{bound}");
        let geometry = Geometry {
            grid: [staged.num_splits, kv.num_kv_heads, staged.num_sequences],
            block: 128,
            shared_bytes: 512 * kv.head_dim as u32,
        };
        self.driver.launch(&name, geometry, &args)
    }

    fn attention_prefill(
        &self,
        [out, q]: [Address; 2],
        kv: &GpuKv,
        staged: &Staged,
        num_heads: usize,
        scale: f32,
    ) -> Result<()> {
        let group = num_heads / kv.num_kv_heads;
        let tiles =
            (staged.num_prefill_tokens * group).div_ceil(PREFILL_TILE_ROWS) + staged.num_prefills;
        let (form, cache, geometry) = match &kv.maps {
            Some(maps) => {
                let num_blocks = self.driver.num_multiprocessors.min(tiles * kv.num_kv_heads);
                let geometry = Geometry {
                    grid: [num_blocks, 1, 1],
                    block: 384,
                    shared_bytes: wgmma_shared_bytes(kv.head_dim as u32),
                };
                let cache = maps.each_ref().map(Arg::map);
                ("_wgmma", cache, geometry)
            }
            None => {
                let geometry = Geometry {
                    grid: [kv.num_kv_heads, tiles, 1],
                    block: 128,
                    shared_bytes: prefill_shared_bytes(kv.form(), kv.head_dim as u32),
                };
                (kv.form(), [kv.keys, kv.values].map(Arg::Pointer), geometry)
            }
        };
        let mut args = vec![Arg::Pointer(out), Arg::Pointer(q)];
        args.extend(cache);
        // The kernels look through all sequences that they are told of for each tile.
        let first = 4 * staged.prefills_begin as Address;
        let tables = [
            staged.cu_seqlens_q + first,
            staged.context_lens + first,
            staged.block_tables,
            staged.cu_blocks + first,
        ];
        args.extend(tables.map(Arg::Pointer));
        if kv.maps.is_some() {
            args.push(Arg::Pointer(self.scratch.prefill_counters.address()));
        }
        args.push(Arg::F32(scale * std::f32::consts::LOG2_E));
        // Sequences of one token are attention_decode's.
        let numbers = [
            (staged.prefills_end - staged.prefills_begin) as i32,
            2,
            num_heads as i32,
            kv.num_kv_heads as i32,
            kv.block_shift(),
        ];
        args.extend(numbers.map(Arg::I32));
        let name = format!("attention_prefill{form}_{}_{}", self.type_name, kv.head_dim);
        self.driver.launch(&name, geometry, &args)
    }
}

/// Checks that the attention kernels know how many heads share a kv head.
fn check_group(num_heads: usize, kv: &GpuKv) -> Result<()> {
    let group = num_heads / kv.num_kv_heads;
    if group * kv.num_kv_heads != num_heads || group > MAX_GROUP {
        bail!(
            "{num_heads} heads over {} kv heads: at most {MAX_GROUP} may share one",
            kv.num_kv_heads
        );
    }
    Ok(())
}

/// Checks that the product's output, the tables and the cache belong to the staged step, and returns
/// its tokens.
fn check_projection(
    qkv: &Tensor,
    args: &RopeAndCache<'_>,
    staged: &Staged,
    kv: &GpuKv,
) -> Result<usize> {
    if (args.num_kv_heads, args.head_dim) != (kv.num_kv_heads, kv.head_dim) {
        let (heads, dim) = (args.num_kv_heads, args.head_dim);
        bail!("{heads} kv heads of {dim} for another cache");
    }
    let all_heads = args.num_heads + 2 * args.num_kv_heads;
    let num_tokens = check::rows_of("qkv", qkv, all_heads * args.head_dim)?;
    check::has_len("the staged step", staged.num_tokens, num_tokens)?;
    let num_positions = args.cos.dims()[0];
    if staged.max_position >= num_positions {
        let position = staged.max_position;
        bail!("position {position} is not below {num_positions}");
    }
    Ok(num_tokens)
}

/// Returns how many copies from the first on may run at once: none reads or writes what another
/// writes.
fn independent(copies: &[(u32, u32)]) -> usize {
    let mut sources = std::collections::HashSet::new();
    let mut targets = std::collections::HashSet::new();
    copies
        .iter()
        .take_while(|(source, target)| {
            let is_free = !targets.contains(source) && !sources.contains(target);
            sources.insert(*source);
            is_free && targets.insert(*target)
        })
        .count()
}
