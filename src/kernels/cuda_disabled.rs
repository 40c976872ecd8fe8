//! In place of `cuda` in a build without that feature: a GPU that cannot be opened.

use bytes::Bytes;
use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device, Result, Tensor, bail};

use super::cpu::Cpu;
use super::{AttentionBatch, CollectiveChoice, DeviceOptions, Draw, Drawn, RopeAndCache};

/// There is none: every method is one of a value that does not exist.
pub(super) enum Gpu {}

#[derive(Debug, Clone, Copy)]
pub(super) enum Staged {}

pub(super) enum Graph {}

pub(super) enum PendingDraws {}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum UniqueId {}

#[derive(Clone)]
pub(super) enum Interrupt {}

impl Interrupt {
    pub(super) fn raise(self) {
        match self {}
    }
}

pub(super) struct GpuMatrix {
    pub(super) rows: usize,
    pub(super) cols: usize,
}

pub(super) struct GpuKv {
    pub(super) num_blocks: usize,
    pub(super) block_size: usize,
}

#[expect(dead_code, reason = "read by the real one only")]
pub(super) struct StepArrays<'a> {
    pub(super) input_ids: &'a [u32],
    pub(super) attention: &'a AttentionBatch,
    pub(super) logits_rows: &'a [u32],
    pub(super) bucket: Option<usize>,
}

pub(super) fn num_gpus() -> usize {
    0
}

pub(super) fn end_process(code: i32) -> ! {
    std::process::exit(code)
}

pub(super) fn choose_collectives(
    _first: usize,
    _world_size: usize,
    _choice: CollectiveChoice,
) -> Result<Option<UniqueId>> {
    Ok(None)
}

/// Methods whose body no value can reach.
macro_rules! unreachable_methods {
    ($(fn $name:ident $(<$g:ident>)? (&self $(, $arg:ident: $kind:ty)* $(,)?) -> $out:ty;)*) => {
        impl Gpu {
            $(pub(super) fn $name $(<$g>)? (&self $(, $arg: $kind)*) -> $out {
                $(let _ = $arg;)*
                match *self {}
            })*
        }
    };
}

impl Gpu {
    pub(super) fn new(options: &DeviceOptions) -> Result<Self> {
        bail!(
            "GPU {} cannot be used: this infold was built without CUDA; build it with \
             `cargo build --release --features cuda`, or use --device cpu",
            options.ordinal
        )
    }

    pub(super) fn record<R>(&self, _work: impl FnOnce() -> Result<R>) -> Result<(Graph, R)> {
        match *self {}
    }
}

unreachable_methods! {
    fn device(&self) -> &Device;
    fn memory(&self) -> Result<(u64, u64)>;
    fn synchronize(&self) -> Result<()>;
    fn reserve_weights(&self, num_bytes: usize) -> Result<()>;
    fn next_layer(&self) -> ();
    fn settle_activations(&self) -> Result<()>;
    fn load_matrix(&self, cpu: Cpu<'_>, dtype: GgmlDType, shape: [usize; 2], data: Bytes) -> Result<GpuMatrix>;
    fn load_linear(&self, cpu: Cpu<'_>, dtype: GgmlDType, shape: [usize; 2], data: Bytes) -> Result<GpuMatrix>;
    fn join(&self, parts: Vec<GpuMatrix>) -> Result<GpuMatrix>;
    fn vector(&self, values: &Tensor) -> Result<Tensor>;
    fn join_vectors(&self, parts: &[Tensor]) -> Result<Tensor>;
    fn stage(&self, step: &StepArrays<'_>) -> Result<Staged>;
    fn replay(&self, graph: &Graph) -> Result<()>;
    fn matmul(&self, x: &Tensor, weight: &GpuMatrix, bias: Option<&Tensor>) -> Result<Tensor>;
    fn matmul_onto(&self, x: &Tensor, weight: &GpuMatrix, bias: Option<&Tensor>, residual: &Tensor) -> Result<(Option<Tensor>, Tensor)>;
    fn matmul_silu(&self, x: &Tensor, weight: &GpuMatrix) -> Result<Tensor>;
    fn logits(&self, x: &Tensor, weight: &GpuMatrix, width: usize) -> Result<Tensor>;
    fn embedding(&self, staged: &Staged, table: &GpuMatrix, vocab_start: usize) -> Result<Tensor>;
    fn rms_norm(&self, x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor>;
    fn add_rms_norm(&self, x: &Tensor, residual: &Tensor, weight: &Tensor, eps: f32) -> Result<(Tensor, Tensor)>;
    fn silu_and_mul(&self, gate_up: &Tensor) -> Result<Tensor>;
    fn gather_logits_rows(&self, x: &Tensor, staged: &Staged, num_rows: usize) -> Result<Tensor>;
    fn new_kv_cache(&self, num_layers: usize, sizes: [usize; 4], dtype: DType) -> Result<Vec<GpuKv>>;
    fn copy_blocks(&self, layers: &[&GpuKv], copies: &[(u32, u32)]) -> Result<()>;
    fn rope_and_attention(&self, qkv: &Tensor, args: &RopeAndCache<'_>, staged: &Staged, kv: &GpuKv, scale: f32) -> Result<Tensor>;
    fn rope_and_cache(&self, qkv: &Tensor, args: &RopeAndCache<'_>, staged: &Staged, kv: &GpuKv) -> Result<Tensor>;
    fn paged_attention(&self, q: &Tensor, kv: &GpuKv, staged: &Staged, num_heads: usize, scale: f32) -> Result<Tensor>;
    fn launch_draws(&self, logits: &Tensor, draws: &[Option<Draw>]) -> Result<PendingDraws>;
    fn launch_no_draws(&self) -> Result<PendingDraws>;
    fn finish_draws(&self, draws: PendingDraws) -> Result<Vec<Option<Drawn>>>;
    fn share_drawn_ids(&self, num_rows: usize) -> Result<()>;
    fn mark_tokens(&self, slot: usize, prompt: &[u32], drawn: &[u32]) -> Result<()>;
    fn join_group(&self, options: &DeviceOptions) -> Result<()>;
    fn leave_group(&self) -> ();
    fn has_group(&self) -> bool;
    fn peer_addresses(&self) -> Result<[u64; 2]>;
    fn connect_peers(&self, all: &[[u64; 2]]) -> Result<()>;
    fn check_collectives(&self) -> Result<()>;
    fn interrupt(&self) -> Option<Interrupt>;
    fn all_reduce(&self, x: &Tensor) -> Result<Tensor>;
    fn all_reduce_add_rms_norm(&self, x: &Tensor, residual: &Tensor, weight: &Tensor, eps: f32) -> Result<(Tensor, Tensor)>;
    fn all_gather_columns(&self, x: &Tensor) -> Result<Tensor>;
    fn read_rows(&self, tensor: &Tensor, num_rows: usize) -> Result<Vec<f32>>;
}
