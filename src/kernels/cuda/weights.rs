//! Weights on the GPU: an arena that matrices are loaded into side by side, and their conversion.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use candle_core::quantized::GgmlDType;
use candle_core::{DType, Result, bail};

use super::super::cpu::{self, Cpu, CpuMatrix};
use super::driver::{Address, Arg, Driver, Geometry};
use super::memory::Buffer;

/// Bytes of an arena's chunk when nothing else is asked for.
const CHUNK_BYTES: usize = 256 << 20;
/// Matrices begin at multiples of this.
const ALIGNMENT: usize = 16;
/// Rows after a matrix that may be read (and come to nothing): products round rows up, and the
/// last of several ranks has the width of the others.
pub(super) const READABLE_ROWS: usize = 72;
/// Rows of a block format that are expanded at a time, elements.
const EXPANDED_ELEMENTS: usize = 1 << 22;

/// A matrix `[rows, cols]` of the computing type, row-major.
pub(in crate::kernels) struct GpuMatrix {
    pub(in crate::kernels) rows: usize,
    pub(in crate::kernels) cols: usize,
    pub(super) address: Address,
    memory: Arc<Buffer>,
}

/// Where weights lie.
#[derive(Default)]
pub(super) struct Arena {
    chunk: Mutex<Option<Chunk>>,
}

struct Chunk {
    memory: Arc<Buffer>,
    used: usize,
}

impl Arena {
    /// Makes room for `num_bytes` in one piece.
    pub(super) fn reserve(&self, driver: &Driver, num_bytes: usize) -> Result<()> {
        let memory = Arc::new(driver.allocate(num_bytes)?);
        *self.chunk.lock().unwrap_or_else(PoisonError::into_inner) =
            Some(Chunk { memory, used: 0 });
        Ok(())
    }

    /// Returns room for a matrix of 16-bit elements, directly after the one before if it fits.
    fn take(&self, driver: &Driver, [rows, cols]: [usize; 2]) -> Result<(Address, Arc<Buffer>)> {
        let mut chunk = self.chunk.lock().unwrap_or_else(PoisonError::into_inner);
        let num_bytes = (rows * cols * 2).next_multiple_of(ALIGNMENT);
        let readable = num_bytes + READABLE_ROWS * cols * 2;
        if chunk
            .as_ref()
            .is_none_or(|c| c.used + readable > c.memory.num_bytes())
        {
            let memory = Arc::new(driver.allocate(readable.max(CHUNK_BYTES))?);
            *chunk = Some(Chunk { memory, used: 0 });
        }
        let Some(chunk) = chunk.as_mut() else {
            bail!("the arena has no chunk");
        };
        let address = chunk.memory.address() + chunk.used as Address;
        chunk.used += num_bytes;
        Ok((address, Arc::clone(&chunk.memory)))
    }
}

/// What loading writes to.
pub(super) struct Loading<'a> {
    pub(super) driver: &'a Driver,
    pub(super) arena: &'a Arena,
    /// `F16` or `BF16`.
    pub(super) dtype: DType,
    /// Expands block formats.
    pub(super) cpu: Cpu<'a>,
}

impl Loading<'_> {
    /// Copies a matrix to the GPU, converted to the computing type.
    ///
    /// # Errors
    /// When the type has no kernel, `data` has another length, or memory is out.
    pub(super) fn matrix(
        &self,
        dtype: GgmlDType,
        shape: [usize; 2],
        data: Bytes,
    ) -> Result<GpuMatrix> {
        let [rows, cols] = shape;
        if !cols.is_multiple_of(8) {
            bail!("a matrix of {cols} columns: the CUDA kernels need a multiple of 8");
        }
        let (address, memory) = self.arena.take(self.driver, shape)?;
        self.fill(dtype, shape, data, address)?;
        Ok(GpuMatrix {
            rows,
            cols,
            address,
            memory,
        })
    }

    fn fill(
        &self,
        dtype: GgmlDType,
        [rows, cols]: [usize; 2],
        data: Bytes,
        address: Address,
    ) -> Result<()> {
        let from = match dtype {
            GgmlDType::F32 => "f32",
            GgmlDType::F16 => "f16",
            GgmlDType::BF16 => "bf16",
            _ => return self.expand(dtype, [rows, cols], data, address),
        };
        let num_bytes = rows * cols * if from == "f32" { 4 } else { 2 };
        if data.len() != num_bytes {
            bail!(
                "{} bytes for {rows} x {cols} elements of {dtype:?}",
                data.len()
            );
        }
        if from == "f32" {
            let staging = self.driver.allocate(num_bytes)?;
            // SAFETY: the staging buffer has that length.
            unsafe { self.driver.upload(staging.address(), &data)? };
            self.convert(from, address, staging.address(), rows * cols)?;
            // The buffer must not go before the kernel has read it.
            return self.driver.synchronize();
        }
        // SAFETY: the arena gave that much room.
        unsafe { self.driver.upload(address, &data)? };
        match from == type_name(self.dtype)? {
            true => Ok(()),
            false => self.convert(from, address, address, rows * cols),
        }
    }

    fn convert(&self, from: &str, out: Address, x: Address, len: usize) -> Result<()> {
        let name = format!("convert_{from}_{}", type_name(self.dtype)?);
        let blocks = len.div_ceil(256).min(16 * self.driver.num_multiprocessors);
        let args = [Arg::Pointer(out), Arg::Pointer(x), Arg::I64(len as i64)];
        self.driver
            .launch(&name, Geometry::new([blocks, 1, 1], 256), &args)
    }

    /// Expands a block format on the CPU, some rows at a time.
    fn expand(
        &self,
        dtype: GgmlDType,
        [rows, cols]: [usize; 2],
        data: Bytes,
        address: Address,
    ) -> Result<()> {
        let matrix = CpuMatrix::load(self.cpu, dtype, [rows, cols], data)?;
        let step = (EXPANDED_ELEMENTS / cols).max(1);
        let ids: Vec<u32> = (0..rows as u32).collect();
        for (i, ids) in ids.chunks(step).enumerate() {
            let values = cpu::embedding(self.cpu, ids, &matrix, 0);
            let bits = match self.dtype {
                DType::F16 => values
                    .iter()
                    .map(|&v| half::f16::from_f32(v).to_bits())
                    .collect(),
                _ => values
                    .iter()
                    .map(|&v| half::bf16::from_f32(v).to_bits())
                    .collect::<Vec<u16>>(),
            };
            // SAFETY: rows of the matrix that the arena gave room for; ordinary memory is read
            // before the call returns.
            unsafe {
                self.driver
                    .upload(address + (i * step * cols * 2) as Address, &bits)?
            };
        }
        Ok(())
    }
}

/// Joins matrices of the same columns: nothing moves if they lie side by side.
pub(super) fn join(driver: &Driver, arena: &Arena, parts: Vec<GpuMatrix>) -> Result<GpuMatrix> {
    let rows: usize = parts.iter().map(|part| part.rows).sum();
    let Some(first) = parts.first() else {
        bail!("no matrices to join");
    };
    let cols = first.cols;
    if let Some(other) = parts.iter().find(|part| part.cols != cols) {
        bail!("matrices of {cols} and {} columns side by side", other.cols);
    }
    let follows = |pair: &[GpuMatrix]| {
        Arc::ptr_eq(&pair[0].memory, &pair[1].memory)
            && pair[0].address + (pair[0].rows * cols * 2) as Address == pair[1].address
    };
    let (mut address, mut memory) = (first.address, Arc::clone(&first.memory));
    if !parts.windows(2).all(follows) {
        (address, memory) = arena.take(driver, [rows, cols])?;
        let mut target = address;
        for part in &parts {
            let num_bytes = part.rows * cols * 2;
            driver.copy(target, part.address, num_bytes)?;
            target += num_bytes as Address;
        }
    }
    Ok(GpuMatrix {
        rows,
        cols,
        address,
        memory,
    })
}

/// Returns what entry points call a type.
pub(super) fn type_name(dtype: DType) -> Result<&'static str> {
    match dtype {
        DType::F16 => Ok("f16"),
        DType::BF16 => Ok("bf16"),
        other => bail!("the CUDA kernels compute in float16 or bfloat16, not {other:?}"),
    }
}
