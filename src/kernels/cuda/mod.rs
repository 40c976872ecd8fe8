//! The kernels on a GPU: our own CUDA kernels (the `.cu` files of this folder, see its README)
//! and cuBLASLt. Activations are `f16` or `bf16` tensors on candle's device, logits `f32`.
//!
//! `driver` is the GPU (streams, launches, graphs), `event` a place in its stream, `memory` what
//! owns memory, `weights` loads matrices, `fp8` quantises them and what they multiply,
//! `activations` is where results go, `batch` stages a step's integers, `gemm` multiplies, `norm`
//! norms, `paged` is the KV cache with its kernels, `sampler` draws tokens, `peers` are the
//! collectives of several GPUs, `nccl` those where GPUs cannot reach each other, `turns` is what
//! lets the host prepare a step while another runs, `upload` brings weights from files.
//! `unsafe` code stays in this folder.

mod activations;
mod batch;
mod driver;
mod event;
mod fp8;
mod gemm;
mod memory;
mod nccl;
mod norm;
mod paged;
mod peers;
mod sampler;
mod tensor_map;
mod turns;
mod upload;
mod weights;

use std::sync::{Mutex, OnceLock};

use bytes::Bytes;
use candle_core::cuda_backend::cudarc::driver::DevicePtr;
use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device, Result, Storage, Tensor, bail};
use half::{bf16, f16};

use super::check;
use super::cpu::Cpu;
use super::{CollectiveChoice, Collectives, DeviceOptions, Quantization, vocab_part_len};
use activations::{Activations, Lifetime};
use batch::{Limits, Stage};
use driver::{Address, Arg, Driver, Geometry};
use fp8::Prepared;
use gemm::{Gemm, Product};
use nccl::Nccl;
use paged::Scratch;
use peers::Peers;
use sampler::Sampler;
use upload::Uploader;
use weights::{Arena, Loading, READABLE_ROWS, type_name};

pub(super) use batch::{Staged, StepArrays};
pub(super) use driver::Graph;
pub(super) use driver::{end_process, num_gpus};
pub(super) use nccl::UniqueId;
pub(super) use paged::GpuKv;
pub(super) use peers::Interrupt;
pub(super) use sampler::PendingDraws;
pub(super) use weights::GpuMatrix;

/// A GPU, its weights' memory and what its kernels need between calls.
pub(super) struct Gpu {
    driver: Driver,
    /// `F16` or `BF16`.
    dtype: DType,
    /// The type's part of entry points' names.
    type_name: &'static str,
    quantization: Quantization,
    /// What this layer's last norm has quantised: within a layer no address is used again.
    prepared: Mutex<Option<Prepared>>,
    arena: Arena,
    uploader: Uploader,
    activations: Activations,
    stage: Stage,
    gemm: Gemm,
    scratch: Scratch,
    sampler: Sampler,
    /// The group of GPUs that this one belongs to.
    peers: Option<Peers>,
    /// The same where it meets through NCCL, once it has joined.
    nccl: OnceLock<Nccl>,
}

impl Gpu {
    /// Opens a GPU and allocates what a step of the largest size needs besides activations.
    ///
    /// # Errors
    /// When there is no such GPU, it is too old, or its memory is too small.
    pub(super) fn new(options: &DeviceOptions) -> Result<Self> {
        let dtype = options.dtype;
        let type_name = type_name(dtype)?;
        let driver = Driver::new(options.ordinal)?;
        let limits = Limits {
            num_tokens: options.max_num_tokens,
            num_sequences: options.max_num_sequences,
            num_sequence_blocks: options.max_sequence_blocks,
            num_kv_heads: options.num_kv_heads,
        };
        let mut gpu = Self {
            arena: Arena::default(),
            uploader: Uploader::new(options.world_size),
            activations: Activations::new(dtype),
            stage: Stage::new(&driver, limits)?,
            gemm: Gemm::new(&driver, dtype, options.max_num_tokens)?,
            scratch: Scratch::new(&driver, type_name)?,
            sampler: Sampler::new(&driver, options.max_num_sequences, options.vocab_size)?,
            dtype,
            type_name,
            quantization: options.quantization,
            prepared: Mutex::new(None),
            driver,
            peers: None,
            nccl: OnceLock::new(),
        };
        if options.quantization == Quantization::Fp8 && !gpu.gemm.has_fp8() {
            let (major, minor) = gpu.driver.capability;
            bail!(
                "--quantization fp8 needs a GPU of compute capability 9.0 (H100, H200) and a program \
                 that was compiled for it; GPU {} has {major}.{minor}: leave the flag out",
                options.ordinal
            );
        }
        if options.world_size > 1 && options.collectives == Collectives::Peers {
            let place = [options.rank, options.world_size];
            let shape = joined_logits(options);
            gpu.peers = Some(gpu.new_peers(place, options.ordinal - options.rank, shape)?);
        }
        Ok(gpu)
    }

    /// Joins the group of `options` where it meets through NCCL, with all its other ranks at once.
    pub(super) fn join_group(&self, options: &DeviceOptions) -> Result<()> {
        let Collectives::Nccl(group) = options.collectives else {
            return Ok(());
        };
        self.driver.bind()?;
        let place = [options.rank, options.world_size];
        let nccl = Nccl::join(self, group.0, place, joined_logits(options))?;
        let _ = self.nccl.set(nccl);
        Ok(())
    }

    /// Leaves a group that meets through NCCL, once all recorded graphs are gone.
    pub(super) fn leave_group(&self) {
        if let Some(nccl) = self.nccl.get()
            && self.driver.bind().is_ok()
        {
            nccl.leave();
        }
    }

    pub(super) fn device(&self) -> &Device {
        self.driver.device()
    }

    /// Returns free and total bytes.
    pub(super) fn memory(&self) -> Result<(u64, u64)> {
        self.driver.synchronize_all()?;
        self.driver.memory()
    }

    pub(super) fn synchronize(&self) -> Result<()> {
        self.driver.synchronize_all()
    }

    pub(super) fn reserve_weights(&self, num_bytes: usize) -> Result<()> {
        self.arena.reserve(&self.driver, num_bytes)
    }

    pub(super) fn load_matrix(
        &self,
        cpu: Cpu<'_>,
        dtype: GgmlDType,
        shape: [usize; 2],
        data: Bytes,
    ) -> Result<GpuMatrix> {
        self.loading(cpu).matrix(dtype, shape, data)
    }

    pub(super) fn load_linear(
        &self,
        cpu: Cpu<'_>,
        dtype: GgmlDType,
        shape: [usize; 2],
        data: Bytes,
    ) -> Result<GpuMatrix> {
        match self.quantization {
            Quantization::None => self.load_matrix(cpu, dtype, shape, data),
            Quantization::Fp8 => self.loading(cpu).quantized(dtype, shape, &data),
        }
    }

    fn loading<'a>(&'a self, cpu: Cpu<'a>) -> Loading<'a> {
        Loading {
            driver: &self.driver,
            arena: &self.arena,
            uploader: &self.uploader,
            dtype: self.dtype,
            cpu,
        }
    }

    pub(super) fn join(&self, parts: Vec<GpuMatrix>) -> Result<GpuMatrix> {
        weights::join(&self.driver, &self.arena, &parts)
    }

    /// Makes a vector of the computing type.
    pub(super) fn vector(&self, values: &Tensor) -> Result<Tensor> {
        values.to_dtype(self.dtype)?.to_device(self.device())
    }

    /// Lays vectors of the computing type one after another.
    pub(super) fn join_vectors(&self, parts: &[Tensor]) -> Result<Tensor> {
        let len = parts.iter().map(Tensor::elem_count).sum();
        let (tensor, mut target) = self.new_lasting([1, len], self.dtype)?;
        // candle's stream uploads the parts, ours copies them.
        self.driver.synchronize_all()?;
        for part in parts {
            let num_bytes = 2 * part.elem_count();
            let source = self.address("a vector", part, self.dtype)?;
            self.driver.copy(target, source, num_bytes)?;
            target += num_bytes as Address;
        }
        // The parts go when the caller drops them: not before they were read.
        self.driver.synchronize()?;
        tensor.reshape(len)
    }

    /// Copies rows of logits to the host.
    pub(super) fn read_rows(&self, tensor: &Tensor, num_rows: usize) -> Result<Vec<f32>> {
        let width = tensor.dims2()?.1;
        let mut values = vec![0f32; num_rows * width];
        for (row, values) in values.chunks_exact_mut(width).enumerate() {
            let source = self.address("a row", &tensor.narrow(0, row, 1)?, DType::F32)?;
            // SAFETY: a row of the tensor; the wait below comes before the values are read.
            unsafe { self.driver.download(values, source)? };
        }
        self.driver.synchronize()?;
        Ok(values)
    }

    pub(super) fn stage(&self, step: &StepArrays<'_>) -> Result<Staged> {
        self.stage.stage(&self.driver, step)
    }

    pub(super) fn next_layer(&self) {
        *self.prepared() = None;
        self.activations.next_layer();
    }

    /// Fixes the memory of activations at what the steps so far took, and frees what loading
    /// needed.
    pub(super) fn settle_activations(&self) -> Result<()> {
        self.synchronize()?;
        self.uploader.free(&self.driver)?;
        self.activations.settle(self.device())
    }

    pub(super) fn record<R>(&self, work: impl FnOnce() -> Result<R>) -> Result<(Graph, R)> {
        self.driver.record(work)
    }

    pub(super) fn replay(&self, graph: &Graph) -> Result<()> {
        self.driver.replay(graph)
    }

    /// Returns `x Wᵀ + bias`, of the computing type.
    pub(super) fn matmul(
        &self,
        x: &Tensor,
        weight: &GpuMatrix,
        bias: Option<&Tensor>,
    ) -> Result<Tensor> {
        let (product, _) = self.multiply(x, weight, [bias, None], Lifetime::Layer)?;
        Ok(product)
    }

    /// Returns `x Wᵀ + bias` and `residual`, or none and their sum where one kernel makes it.
    pub(super) fn matmul_onto(
        &self,
        x: &Tensor,
        weight: &GpuMatrix,
        bias: Option<&Tensor>,
        residual: &Tensor,
    ) -> Result<(Option<Tensor>, Tensor)> {
        let addends = [bias, Some(residual)];
        let (product, is_added) = self.multiply(x, weight, addends, Lifetime::Layer)?;
        if !is_added {
            return Ok((Some(product), residual.clone()));
        }
        // Where the norm adds it makes room for the sum. A step that comes to that may be as large
        // as the one that memory was measured with.
        self.new_tensor([product.dim(0)?, product.dim(1)?])?;
        Ok((None, product))
    }

    /// Returns `x Wᵀ + bias` and whether the residual, the second of `addends`, is added.
    fn multiply(
        &self,
        x: &Tensor,
        weight: &GpuMatrix,
        addends: [Option<&Tensor>; 2],
        life: Lifetime,
    ) -> Result<(Tensor, bool)> {
        let (num_rows, n) = (check::rows_of("x", x, weight.cols)?, weight.rows);
        let (tensor, out) = self.new_activation([num_rows, n], life)?;
        let [bias, residual] = addends;
        if let Some(residual) = residual
            && residual.dims() != [num_rows, n]
        {
            bail!(
                "a residual {:?} of a product {:?}",
                residual.dims(),
                [num_rows, n]
            );
        }
        let (x, scales) = self.operand(x, num_rows, weight)?;
        let address = |what, tensor: Option<&Tensor>| {
            tensor
                .map(|tensor| self.address(what, tensor, self.dtype))
                .transpose()
        };
        let product = Product {
            out,
            x,
            weight: weight.address(),
            scales,
            bias: address("bias", bias)?,
            residual: address("residual", residual)?,
            num_rows,
            n,
            k: weight.cols,
            out_dtype: self.dtype,
        };
        let is_added = self.gemm.multiply(&self.driver, &product)?;
        Ok((tensor, is_added))
    }

    /// Returns `silu(gate) · up` of the two halves of `x Wᵀ`.
    pub(super) fn matmul_silu(&self, x: &Tensor, weight: &GpuMatrix) -> Result<Tensor> {
        let num_rows = check::rows_of("x", x, weight.cols)?;
        let n = weight.rows / 2;
        let form = match weight.scales() {
            Some(_) => Some(self.gemm.fp8_silu_form(num_rows, n)?),
            None => self.gemm.silu_form(num_rows, n, weight.cols),
        };
        let Some(form) = form else {
            let (gate_up, _) = self.multiply(x, weight, [None; 2], Lifetime::Call)?;
            return self.silu_and_mul(&gate_up);
        };
        if weight.scales().is_none() {
            // A later step of fewer rows may need room for gates and ups.
            let plain_rows = num_rows.min(gemm::MAX_PLAIN_SILU_ROWS);
            self.activations
                .expect(plain_rows * weight.rows, Lifetime::Call);
        }
        let (tensor, out) = self.new_tensor([num_rows, n])?;
        let (x, scales) = self.operand(x, num_rows, weight)?;
        let product = Product {
            out,
            x,
            weight: weight.address(),
            scales,
            bias: None,
            residual: None,
            num_rows,
            n,
            k: weight.cols,
            out_dtype: self.dtype,
        };
        self.gemm.multiply_silu(&self.driver, &product, form)?;
        Ok(tensor)
    }

    /// Returns logits `f32 [rows, vocabulary]` in the sampler's buffer, which the next call
    /// overwrites.
    pub(super) fn logits(&self, x: &Tensor, weight: &GpuMatrix, width: usize) -> Result<Tensor> {
        let num_rows = check::rows_of("x", x, weight.cols)?;
        // Rows of logits begin on 16 bytes, and all ranks have as many columns; what lies after
        // the matrix gives columns that nobody reads.
        let n = width.next_multiple_of(8);
        if n > weight.rows + READABLE_ROWS {
            bail!(
                "{n} columns of logits from a matrix of {} rows",
                weight.rows
            );
        }
        let (tensor, out) = self.sampler.logits_buffer(self, num_rows, n)?;
        let product = Product {
            out,
            x: self.address("x", x, self.dtype)?,
            weight: weight.unquantized()?,
            scales: None,
            bias: None,
            residual: None,
            num_rows,
            n,
            k: weight.cols,
            out_dtype: DType::F32,
        };
        self.gemm.multiply(&self.driver, &product)?;
        tensor.narrow(1, 0, width)
    }

    /// Looks up the staged step's ids, some of which may be what the step before drew.
    pub(super) fn embedding(
        &self,
        staged: &Staged,
        table: &GpuMatrix,
        vocab_start: usize,
    ) -> Result<Tensor> {
        let width = table.cols;
        let (tensor, out) = self.new_tensor([staged.num_tokens, width])?;
        let args = [
            Arg::Pointer(out),
            Arg::Pointer(table.unquantized()?),
            Arg::Pointer(staged.ids),
            Arg::Pointer(self.sampler.drawn_ids()),
            Arg::U32(vocab_start as u32),
            Arg::I32(table.rows as i32),
            Arg::I32(width as i32),
        ];
        self.by_columns("embedding", width, staged.num_tokens, &args)?;
        Ok(tensor)
    }

    pub(super) fn silu_and_mul(&self, gate_up: &Tensor) -> Result<Tensor> {
        let (num_rows, width) = gate_up.dims2()?;
        let width = width / 2;
        let (tensor, out) = self.new_tensor([num_rows, width])?;
        let args = [
            Arg::Pointer(out),
            Arg::Pointer(self.address("gate_up", gate_up, self.dtype)?),
            Arg::I32(width as i32),
        ];
        self.by_columns("silu_and_mul", width, num_rows, &args)?;
        Ok(tensor)
    }

    /// Returns the rows of `x` that logits of the staged step are wanted of, `num_rows` of them.
    pub(super) fn gather_logits_rows(
        &self,
        x: &Tensor,
        staged: &Staged,
        num_rows: usize,
    ) -> Result<Tensor> {
        let (num_tokens, width) = x.dims2()?;
        if num_rows != staged.num_logits_rows {
            bail!("{num_rows} rows of {} staged ones", staged.num_logits_rows);
        }
        let (tensor, out) = self.new_tensor([num_rows, width])?;
        let args = [
            Arg::Pointer(out),
            Arg::Pointer(self.address("x", x, self.dtype)?),
            Arg::Pointer(staged.logits_rows),
            Arg::I32(num_tokens as i32),
            Arg::I32(width as i32),
        ];
        self.by_columns("gather_rows", width, num_rows, &args)?;
        Ok(tensor)
    }

    /// Launches a kernel whose threads take 8 columns of a row each.
    fn by_columns(&self, name: &str, width: usize, num_rows: usize, args: &[Arg]) -> Result<()> {
        let block = (width / 8).next_multiple_of(32).min(256);
        let grid = [num_rows, width.div_ceil(8 * block), 1];
        let name = format!("{name}_{}", self.type_name);
        self.driver.launch(&name, Geometry::new(grid, block), args)
    }

    /// Makes a tensor of the computing type whose elements a kernel is about to write.
    fn new_tensor(&self, dims: [usize; 2]) -> Result<(Tensor, Address)> {
        self.new_activation(dims, Lifetime::Layer)
    }

    fn new_activation(&self, dims: [usize; 2], life: Lifetime) -> Result<(Tensor, Address)> {
        let tensor = self.activations.take(self.device(), &dims, life)?;
        let address = self.address("an output", &tensor, self.dtype)?;
        Ok((tensor, address))
    }

    /// Makes a tensor that stays, likewise undefined.
    fn new_lasting(&self, dims: [usize; 2], dtype: DType) -> Result<(Tensor, Address)> {
        // SAFETY: each caller has every element written before it is read.
        let tensor = unsafe { Tensor::empty(&dims, dtype, self.device())? };
        let address = self.address("an output", &tensor, dtype)?;
        Ok((tensor, address))
    }

    /// Returns where a tensor's elements begin.
    fn address(&self, name: &str, tensor: &Tensor, dtype: DType) -> Result<Address> {
        let (storage, layout) = tensor.storage_and_layout();
        let Storage::Cuda(storage) = &*storage else {
            bail!("{name} must be on the GPU");
        };
        if tensor.dtype() != dtype || !layout.is_contiguous() {
            bail!(
                "{name} must be contiguous {dtype:?}, got {:?} {layout:?}",
                tensor.dtype()
            );
        }
        let stream = storage.device.cuda_stream();
        let base = match dtype {
            DType::F16 => storage.as_cuda_slice::<f16>()?.device_ptr(&stream).0,
            DType::BF16 => storage.as_cuda_slice::<bf16>()?.device_ptr(&stream).0,
            DType::F32 => storage.as_cuda_slice::<f32>()?.device_ptr(&stream).0,
            other => bail!("{name}: no kernel takes {other:?}"),
        };
        Ok(base + (layout.start_offset() * dtype.size_in_bytes()) as Address)
    }
}

impl Drop for Gpu {
    /// Waits for what is in flight: it works on memory that goes now.
    fn drop(&mut self) {
        let _ = self.synchronize();
    }
}

/// Returns the shape of the logits that rank 0 joins.
fn joined_logits(options: &DeviceOptions) -> [usize; 2] {
    let width = vocab_part_len(options.vocab_size, options.world_size);
    [options.max_num_sequences, options.world_size * width]
}

/// Chooses how the ranks on `world_size` GPUs from `first` on meet: none is through our kernels.
pub(super) fn choose_collectives(
    first: usize,
    world_size: usize,
    choice: CollectiveChoice,
) -> Result<Option<UniqueId>> {
    let obstacle = match choice {
        CollectiveChoice::Fastest => peers::obstacle(first, world_size)?,
        CollectiveChoice::Nccl => Some("--disable-custom-all-reduce is given".to_owned()),
    };
    let Some(obstacle) = obstacle else {
        return Ok(None);
    };
    match nccl::new_group() {
        Ok((id, name)) => {
            tracing::info!("ranks meet through {name}: {obstacle}");
            Ok(Some(id))
        }
        Err(error) => bail!("{obstacle}, so the ranks need NCCL. {error}"),
    }
}
