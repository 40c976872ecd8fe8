//! One safe function an operation, on the CPU or on a GPU.
//!
//! [`Kernels`] is one rank's handle: its threads and its instruction set, or its GPU (feature
//! `cuda`). Every method checks dtypes, contiguity, shapes and indices before any unsafe code
//! runs. Activations are candle tensors `[tokens, width]`, `f32` on the CPU, `f16` or `bf16` on a
//! GPU; weights are [`Matrix`], on the CPU in the checkpoint's precision or in GGML blocks; keys
//! and values live in [`KvBlocks`], one for each layer. It knows nothing of layers or ranks;
//! `layers` and `engine` call it.
//!
//! On the CPU a row's result has the same bits alone and in any batch, for every method: sums run
//! in an order that depends on the row's own shape and positions only. On a GPU the number of
//! rows decides which kernel multiplies, so that bits may differ between batch sizes.

#[cfg(test)]
mod attention_tests;
mod check;
mod collectives;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(not(feature = "cuda"))]
#[path = "cuda_disabled.rs"]
mod cuda;
mod device;
mod paged;
#[cfg(test)]
mod tests;
mod training;
mod training_columns;
mod training_head;
#[cfg(test)]
mod training_head_tests;
#[cfg(test)]
mod training_tests;

use bytes::Bytes;
use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device, Result, Tensor, bail};
use check::F32View;
use cpu::{AttentionInputs, Cpu, CpuKv, CpuMatrix, CpuRuntime, KvType, RopeInputs};
use cuda::{Gpu, GpuMatrix};
use paged::{KvData, check_batch};
use std::sync::Arc;

pub use collectives::{CollectiveChoice, Collectives, Interrupt, NcclGroup};
pub use cpu::{SimdLevel, keep_freed_memory};
pub use device::{
    DeviceOptions, Draw, DrawOutcome, Drawn, Graph, MAX_STEP_BIASES, MAX_TOP_LOGPROBS, NO_SLOT,
    PendingDraws, Quantization, Staged, drawn_id, vocab_part_len,
};
pub use paged::{AttentionBatch, KvBlocks, RopeAndCache};
pub use training::{Dropout, LinearPart, LowRank, RopeArgs, VarlenArgs};
pub use training_head::{HeadGradient, HeadOutput};

/// One rank's kernels and its threads. Cheap to clone.
#[derive(Clone)]
pub struct Kernels {
    runtime: Arc<CpuRuntime>,
    /// Where everything but training runs, if there is one.
    gpu: Option<Arc<Gpu>>,
    device: Device,
}

/// Weights `[rows, cols]` in the form that the kernels read: on the CPU dense ones as they lie in
/// the file and blocks repacked, without loss; on a GPU of the computing type or in E4M3.
pub struct Matrix(MatrixData);

enum MatrixData {
    Cpu(CpuMatrix),
    Gpu(GpuMatrix),
}

impl Matrix {
    /// Returns the number of rows, a linear layer's outputs.
    pub fn rows(&self) -> usize {
        match &self.0 {
            MatrixData::Cpu(matrix) => matrix.rows,
            MatrixData::Gpu(matrix) => matrix.rows,
        }
    }

    /// Returns the number of columns, a linear layer's inputs.
    pub fn cols(&self) -> usize {
        match &self.0 {
            MatrixData::Cpu(matrix) => matrix.cols,
            MatrixData::Gpu(matrix) => matrix.cols,
        }
    }

    fn cpu(&self) -> Result<&CpuMatrix> {
        match &self.0 {
            MatrixData::Cpu(matrix) => Ok(matrix),
            MatrixData::Gpu(_) => bail!("a matrix of the GPU in a kernel of the CPU"),
        }
    }

    fn gpu(&self) -> Result<&GpuMatrix> {
        match &self.0 {
            MatrixData::Gpu(matrix) => Ok(matrix),
            MatrixData::Cpu(_) => bail!("a matrix of the CPU in a kernel of the GPU"),
        }
    }

    fn into_gpu(self) -> Result<GpuMatrix> {
        match self.0 {
            MatrixData::Gpu(matrix) => Ok(matrix),
            MatrixData::Cpu(_) => bail!("a matrix of the CPU in a kernel of the GPU"),
        }
    }
}

impl Kernels {
    /// Starts the kernels of one rank on the CPU: the calling thread and `num_threads - 1`
    /// workers, with the machine's best instruction set.
    ///
    /// # Errors
    ///
    /// When `num_threads` is 0 or a thread cannot be started.
    pub fn cpu(num_threads: usize) -> Result<Self> {
        Self::cpu_with(num_threads, SimdLevel::detect())
    }

    /// As [`Kernels::cpu`], with a chosen instruction set.
    ///
    /// # Errors
    ///
    /// Also when the machine lacks the instruction set.
    pub fn cpu_with(num_threads: usize, level: SimdLevel) -> Result<Self> {
        Ok(Self {
            runtime: Arc::new(CpuRuntime::new(num_threads, level)?),
            gpu: None,
            device: Device::Cpu,
        })
    }

    /// Returns the device of all tensors that come and go.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Returns the number of threads, the calling one included.
    pub fn num_threads(&self) -> usize {
        self.runtime.num_threads()
    }

    fn get(&self) -> Cpu<'_> {
        self.runtime.get()
    }

    fn tensor(&self, data: Vec<f32>, dims: [usize; 2]) -> Result<Tensor> {
        Tensor::from_vec(data, &dims, &self.device)
    }

    /// Loads a row-major matrix `[rows, cols]`. `data` may be a slice of a memory map, at any
    /// alignment; dense types keep it, block types (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K,
    /// Q6_K) copy it into tiles.
    ///
    /// # Errors
    ///
    /// When the type has no kernel, `cols` is not a multiple of its block, or `data` has another
    /// length.
    pub fn load_matrix(
        &self,
        dtype: GgmlDType,
        rows: usize,
        cols: usize,
        data: Bytes,
    ) -> Result<Matrix> {
        Ok(Matrix(match &self.gpu {
            Some(gpu) => MatrixData::Gpu(gpu.load_matrix(self.get(), dtype, [rows, cols], data)?),
            None => MatrixData::Cpu(CpuMatrix::load(self.get(), dtype, [rows, cols], data)?),
        }))
    }

    /// Loads a weight `[rows, cols]` of a decoder layer's linear: as [`Kernels::load_matrix`], but
    /// on a GPU that was opened with [`Quantization::Fp8`] in E4M3, each row divided by a 448th of
    /// its largest magnitude and rounded from the file's values.
    ///
    /// # Errors
    ///
    /// As [`Kernels::load_matrix`]; for FP8 also when `cols` is not a multiple of 16, `rows` not of
    /// 8, or the file has blocks.
    pub fn load_linear(
        &self,
        dtype: GgmlDType,
        rows: usize,
        cols: usize,
        data: Bytes,
    ) -> Result<Matrix> {
        match &self.gpu {
            Some(gpu) => {
                let matrix = gpu.load_linear(self.get(), dtype, [rows, cols], data)?;
                Ok(Matrix(MatrixData::Gpu(matrix)))
            }
            None => self.load_matrix(dtype, rows, cols, data),
        }
    }

    /// Loads a vector of `len` elements of any type that [`Kernels::load_matrix`] takes, as `f32`,
    /// on a GPU in the computing type.
    ///
    /// # Errors
    ///
    /// As [`Kernels::load_matrix`].
    pub fn load_vector(&self, dtype: GgmlDType, len: usize, data: &[u8]) -> Result<Tensor> {
        let data = Bytes::copy_from_slice(data);
        let row = CpuMatrix::load(self.get(), dtype, [1, len], data)?;
        let values = cpu::embedding(self.get(), &[0], &row, 0);
        let values = Tensor::from_vec(values, len, &Device::Cpu)?;
        self.gpu
            .as_ref()
            .map_or(Ok(values.clone()), |gpu| gpu.vector(&values))
    }

    /// Returns `x Wᵀ + bias`, `[m, Σ rows]`, for `x: [m, cols]`, the row-wise concatenation W of
    /// `parts` and `bias: [Σ rows]`. Parts may differ in type. Block formats multiply `x`
    /// quantised to 8 bits by blocks of 32.
    ///
    /// # Errors
    ///
    /// When shapes or dtypes disagree, or there are no parts.
    pub fn matmul(&self, x: &Tensor, parts: &[&Matrix], bias: Option<&Tensor>) -> Result<Tensor> {
        let Some(first) = parts.first() else {
            bail!("a matmul needs at least one matrix");
        };
        let cols = first.cols();
        if let Some(other) = parts.iter().find(|part| part.cols() != cols) {
            bail!(
                "matrices of {cols} and {} columns in one matmul",
                other.cols()
            );
        }
        if let Some(gpu) = &self.gpu {
            let [weight] = parts else {
                bail!("matrices must be joined before a GPU multiplies by them");
            };
            return gpu.matmul(x, weight.gpu()?, bias);
        }
        let num_rows = check::rows_of("x", x, cols)?;
        let width = parts.iter().map(|part| part.rows()).sum();
        let x = F32View::new("x", x)?;
        let bias = bias
            .map(|bias| F32View::shaped("bias", bias, &[width]))
            .transpose()?;
        let matrices = parts
            .iter()
            .map(|part| part.cpu())
            .collect::<Result<Vec<_>>>()?;
        let bias = bias.as_ref().map(F32View::get);
        let out = cpu::matmul(self.get(), x.get(), &matrices, bias);
        self.tensor(out, [num_rows, width])
    }

    /// Returns the rows of `table` for `ids` in `vocab_start..vocab_start + rows`, `[ids, cols]`;
    /// other ids give zeros, so that ranks that share a vocabulary can add their results.
    ///
    /// # Errors
    ///
    /// When the tensor cannot be made.
    pub fn embedding(&self, ids: &[u32], table: &Matrix, vocab_start: usize) -> Result<Tensor> {
        let out = cpu::embedding(self.get(), ids, table.cpu()?, vocab_start);
        self.tensor(out, [ids.len(), table.cols()])
    }

    /// Returns `x / sqrt(mean(x²) + eps) * weight` for each row of `x: [m, width]`, with
    /// `weight: [width]`.
    ///
    /// # Errors
    ///
    /// When shapes or dtypes disagree.
    pub fn rms_norm(&self, x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
        if let Some(gpu) = &self.gpu {
            return gpu.rms_norm(x, weight, eps);
        }
        let width = weight.elem_count();
        let num_rows = check::rows_of("x", x, width)?;
        let (x, weight) = (F32View::new("x", x)?, norm_weight(weight, width)?);
        let out = cpu::rms_norm(self.get(), x.get(), weight.get(), eps);
        self.tensor(out, [num_rows, width])
    }

    /// Returns the norm of `x + residual` as [`Kernels::rms_norm`], and `x + residual`.
    ///
    /// # Errors
    ///
    /// When shapes or dtypes disagree.
    pub fn add_rms_norm(
        &self,
        x: &Tensor,
        residual: &Tensor,
        weight: &Tensor,
        eps: f32,
    ) -> Result<(Tensor, Tensor)> {
        if let Some(gpu) = &self.gpu {
            return gpu.add_rms_norm(x, residual, weight, eps);
        }
        let width = weight.elem_count();
        let num_rows = check::rows_of("x", x, width)?;
        let residual = F32View::shaped("residual", residual, x.dims())?;
        let (x, weight) = (F32View::new("x", x)?, norm_weight(weight, width)?);
        let (out, sum) = cpu::add_rms_norm(self.get(), x.get(), residual.get(), weight.get(), eps);
        let dims = [num_rows, width];
        Ok((self.tensor(out, dims)?, self.tensor(sum, dims)?))
    }

    /// Returns silu(gate) * up, `[m, i]`, for `gate_up: [m, 2 i]`, gates before ups in a row.
    ///
    /// # Errors
    ///
    /// When the width is odd, or the tensor is not `f32` and contiguous.
    pub fn silu_and_mul(&self, gate_up: &Tensor) -> Result<Tensor> {
        let (num_rows, width) = gate_up.dims2()?;
        if !width.is_multiple_of(2) || width == 0 {
            bail!("gate_up must have an even width, got {width}");
        }
        if let Some(gpu) = &self.gpu {
            return gpu.silu_and_mul(gate_up);
        }
        let gate_up = F32View::new("gate_up", gate_up)?;
        let out = cpu::silu_and_mul(self.get(), gate_up.get(), width / 2);
        self.tensor(out, [num_rows, width / 2])
    }

    /// Returns `a + b`, of one shape.
    ///
    /// # Errors
    ///
    /// When shapes or dtypes disagree.
    pub fn add(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        let b = F32View::shaped("b", b, a.dims())?;
        let out = cpu::add(self.get(), F32View::new("a", a)?.get(), b.get());
        Tensor::from_vec(out, a.dims(), &self.device)
    }

    /// Returns the given rows of `x: [m, width]`, in the given order.
    ///
    /// # Errors
    ///
    /// When a row does not exist.
    pub fn gather_rows(&self, x: &Tensor, rows: &[u32]) -> Result<Tensor> {
        let (num_rows, width) = x.dims2()?;
        check::all_below("row", rows, num_rows)?;
        let out = cpu::gather_rows(F32View::new("x", x)?.get(), width, rows);
        self.tensor(out, [rows.len(), width])
    }

    /// Reserves the keys and values of `num_layers` layers, zeroed: on the CPU in `f32`, `f16` or
    /// E4M3, and the operating system provides the memory when it is first written; on a GPU in the
    /// computing type or E4M3. E4M3 is rounded to when it is written, to nearest, ties to even, with
    /// ±448 for all that is larger; it is read exactly.
    ///
    /// `sizes` are `[num_blocks, block_size, num_kv_heads, head_dim]`.
    ///
    /// # Errors
    ///
    /// When the block size is not a multiple of 16 (on a GPU a power of two), a size is 0, `dtype`
    /// is another, or a GPU has no kernel for the head size or too little memory.
    pub fn new_kv_cache(
        &self,
        num_layers: usize,
        sizes: [usize; 4],
        dtype: DType,
    ) -> Result<Vec<KvBlocks>> {
        let block_size = sizes[1];
        if !block_size.is_multiple_of(16) {
            bail!("block_size must be a multiple of 16, got {block_size}");
        }
        if sizes.contains(&0) {
            bail!("a KV cache of [blocks, block_size, kv_heads, head_dim] = {sizes:?}");
        }
        if let Some(gpu) = &self.gpu {
            let layers = gpu.new_kv_cache(num_layers, sizes, dtype)?;
            return Ok(layers
                .into_iter()
                .map(|kv| KvBlocks(KvData::Gpu(kv)))
                .collect());
        }
        let dtype = match dtype {
            DType::F32 => KvType::F32,
            DType::F16 => KvType::F16,
            DType::F8E4M3 => KvType::E4m3,
            other => bail!("the KV cache on the CPU is f32, f16 or f8e4m3, got {other:?}"),
        };
        Ok((0..num_layers)
            .map(|_| KvBlocks(KvData::Cpu(CpuKv::new(sizes, dtype))))
            .collect())
    }

    /// Caches the keys and values of `qkv` as [`Self::rope_and_cache`] does and returns what
    /// [`Self::paged_attention`] makes of its queries; on a GPU in one kernel where each sequence
    /// has one token.
    ///
    /// # Errors
    ///
    /// Those of both.
    pub fn rope_and_attention(
        &self,
        qkv: &Tensor,
        args: &RopeAndCache<'_>,
        kv: &mut KvBlocks,
        scale: f32,
    ) -> Result<Tensor> {
        if let (KvData::Gpu(kv), Some(gpu)) = (&kv.0, &self.gpu) {
            return gpu.rope_and_attention(qkv, args, args.batch.staged()?, kv, scale);
        }
        let q = self.rope_and_cache(qkv, args, kv)?;
        self.paged_attention(&q, kv, args.batch, args.num_heads, scale)
    }

    /// Takes `qkv: [m, (num_heads + 2 num_kv_heads) head_dim]`, norms queries and keys where a
    /// norm is given, rotates both (half-split form), writes keys and values to their slots and
    /// returns the queries, `[m, num_heads * head_dim]`.
    ///
    /// # Errors
    ///
    /// When shapes or dtypes disagree, a position has no row in the tables, or a slot does not
    /// exist or occurs twice.
    pub fn rope_and_cache(
        &self,
        qkv: &Tensor,
        args: &RopeAndCache<'_>,
        kv: &mut KvBlocks,
    ) -> Result<Tensor> {
        let &RopeAndCache {
            num_heads,
            num_kv_heads,
            head_dim,
            eps,
            batch,
            ..
        } = args;
        let kv = match &mut kv.0 {
            KvData::Cpu(kv) => kv,
            KvData::Gpu(kv) => {
                let Some(gpu) = &self.gpu else {
                    bail!("a KV cache of the GPU in a kernel of the CPU");
                };
                return gpu.rope_and_cache(qkv, args, batch.staged()?, kv);
            }
        };
        if (num_kv_heads, head_dim) != (kv.num_kv_heads, kv.head_dim) || head_dim % 2 == 1 {
            let (heads, dim) = (kv.num_kv_heads, kv.head_dim);
            bail!("{num_kv_heads} kv heads of {head_dim} for a cache of {heads} of {dim}");
        }
        let num_tokens = check::rows_of("qkv", qkv, (num_heads + 2 * num_kv_heads) * head_dim)?;
        check::has_len("positions", batch.positions.len(), num_tokens)?;
        check::has_len("slot_mapping", batch.slot_mapping.len(), num_tokens)?;
        let (max_positions, half) = args.cos.dims2()?;
        check::all_below("position", &batch.positions, max_positions)?;
        check::all_below("slot", &batch.slot_mapping, kv.num_slots())?;
        check::all_distinct("slot", &batch.slot_mapping)?;
        if half != head_dim / 2 {
            bail!("cos must have {} columns, got {half}", head_dim / 2);
        }
        let qkv = F32View::new("qkv", qkv)?;
        let cos = F32View::new("cos", args.cos)?;
        let sin = F32View::shaped("sin", args.sin, args.cos.dims())?;
        let q_norm = args
            .q_norm
            .map(|norm| norm_weight(norm, head_dim))
            .transpose()?;
        let k_norm = args
            .k_norm
            .map(|norm| norm_weight(norm, head_dim))
            .transpose()?;
        let inputs = RopeInputs {
            qkv: qkv.get(),
            num_heads,
            q_norm: q_norm.as_ref().map(F32View::get),
            k_norm: k_norm.as_ref().map(F32View::get),
            eps,
            cos: cos.get(),
            sin: sin.get(),
            positions: &batch.positions,
            slot_mapping: &batch.slot_mapping,
        };
        let out = cpu::rope_and_cache(self.get(), &inputs, kv);
        self.tensor(out, [num_tokens, num_heads * head_dim])
    }

    /// Returns causal attention of `q: [m, num_heads * head_dim]` over the cached keys and
    /// values: a token at position p sees positions 0 to p of its sequence. Query heads share
    /// kv heads in equal consecutive groups.
    ///
    /// # Errors
    ///
    /// When shapes or dtypes disagree, a position is not below its sequence's context length, or
    /// a sequence has too few blocks or one that does not exist.
    pub fn paged_attention(
        &self,
        q: &Tensor,
        kv: &KvBlocks,
        batch: &AttentionBatch,
        num_heads: usize,
        scale: f32,
    ) -> Result<Tensor> {
        let kv = match (&kv.0, &self.gpu) {
            (KvData::Cpu(kv), _) => kv,
            (KvData::Gpu(kv), Some(gpu)) => {
                return gpu.paged_attention(q, kv, batch.staged()?, num_heads, scale);
            }
            (KvData::Gpu(_), None) => bail!("a KV cache of the GPU in a kernel of the CPU"),
        };
        if num_heads == 0 || !num_heads.is_multiple_of(kv.num_kv_heads) {
            bail!(
                "{num_heads} heads cannot share {} kv heads",
                kv.num_kv_heads
            );
        }
        let width = num_heads * kv.head_dim;
        let num_tokens = check::rows_of("q", q, width)?;
        check_batch(batch, [kv.num_blocks, kv.block_size], num_tokens)?;
        let q = F32View::new("q", q)?;
        let inputs = AttentionInputs {
            q: q.get(),
            num_heads,
            scale,
            cu_seqlens_q: &batch.cu_seqlens_q,
            block_tables: &batch.block_tables,
            cu_blocks: &batch.cu_blocks,
            positions: &batch.positions,
        };
        let out = cpu::paged_attention(self.get(), &inputs, kv);
        self.tensor(out, [num_tokens, width])
    }
}

fn norm_weight(weight: &Tensor, width: usize) -> Result<F32View<'_>> {
    F32View::shaped("the norm's weight", weight, &[width])
}
