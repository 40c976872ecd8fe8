//! The kernels on the CPU.
//!
//! Slices in, vectors out: `kernels/mod.rs` checks tensors before it calls here. `pool` owns the
//! threads, `simd` the instruction sets; `quant_pack`, `quant_dot` and `activation` are the block
//! formats, `dense` the others, `matmul` cuts both into tasks; `kv`, `attention` and `attention_scan`
//! are the paged cache; `elementwise` is the rest. `unsafe` code stays in this folder.

mod activation;
mod attention;
mod attention_scan;
mod buffer;
mod dense;
mod elementwise;
mod kv;
mod matmul;
mod pool;
mod quant_dot;
mod quant_pack;
mod simd;

pub(super) use attention::{AttentionInputs, paged_attention};
pub(super) use elementwise::{add, add_rms_norm, gather_rows, rms_norm, silu_and_mul};
pub(super) use kv::{CpuKv, KvType, RopeInputs, rope_and_cache};
pub(super) use matmul::{Cpu, CpuMatrix, embedding, matmul};
pub use simd::SimdLevel;

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
