//! The kernels on the CPU.
//!
//! Slices in, vectors out: `kernels/mod.rs` checks tensors before it calls here. `pool` owns the
//! threads, `simd` the instruction sets; `quant_pack`, `quant_dot` and `activation` are the block
//! formats, `dense` the others, `matmul` cuts both into tasks; `kv`, `attention` and `attention_scan`
//! are the paged cache, `e4m3` its smallest elements; `elementwise` is the rest. Training multiplies with `gemm`, on which
//! `product_sum`, `varlen_attention` and `cross_entropy` stand; `gradients` is its elementwise,
//! `columns` its sums over rows. `unsafe` code stays in this folder.

mod activation;
mod attention;
mod attention_scan;
mod buffer;
mod columns;
mod cross_entropy;
mod dense;
mod e4m3;
mod elementwise;
mod gemm;
mod gemm_pack;
mod gradients;
mod kv;
mod matmul;
mod memory;
mod pool;
mod product_sum;
mod quant_dot;
mod quant_pack;
mod simd;
mod varlen_attention;

pub(super) use attention::{AttentionInputs, paged_attention};
pub(super) use columns::{ScaledColumns, column_dots, row_norms, scale_columns};
pub(super) use cross_entropy::{CrossEntropy, HeadSinks, cross_entropy};
pub(super) use elementwise::{add, add_rms_norm, gather_rows, rms_norm, silu_and_mul};
pub(super) use gradients::{
    NormGradient, Rotation, rms_norm_backward, rotate_heads, rotate_heads_backward,
    silu_and_mul_backward,
};
pub(super) use kv::{CpuKv, KvType, RopeInputs, rope_and_cache};
pub(super) use matmul::{Cpu, CpuMatrix, embedding, matmul};
pub use memory::keep_freed_memory;
pub(super) use product_sum::{ProductSum, dropout, product_of};
pub use simd::SimdLevel;
pub(super) use varlen_attention::{
    Varlen, VarlenSaved, varlen_attention, varlen_attention_backward,
};

/// The instruction set and the threads that kernels run on.
pub(super) struct CpuRuntime {
    level: SimdLevel,
    pool: pool::Pool,
}

impl CpuRuntime {
    /// Starts the threads.
    ///
    /// # Errors
    ///
    /// When the machine lacks the level, `num_threads` is 0 or a thread cannot be started.
    pub(super) fn new(num_threads: usize, level: SimdLevel) -> candle_core::Result<Self> {
        if !level.is_supported() {
            candle_core::bail!("this machine has no {level:?} instructions");
        }
        if num_threads == 0 {
            candle_core::bail!("kernels need at least 1 thread, got 0");
        }
        let pool = pool::Pool::new(num_threads)?;
        Ok(Self { level, pool })
    }

    /// Returns the number of threads, the calling one included.
    pub(super) fn num_threads(&self) -> usize {
        self.pool.num_threads()
    }

    /// Lends the level and the threads to a kernel.
    pub(super) fn get(&self) -> Cpu<'_> {
        Cpu {
            level: self.level,
            pool: &self.pool,
        }
    }
}
