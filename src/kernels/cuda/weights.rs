//! Weights on the GPU: an arena that matrices are loaded into side by side, and their conversion
//! to the computing type or to E4M3.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use candle_core::quantized::GgmlDType;
use candle_core::{DType, Result, bail};

use super::super::cpu::{self, Cpu, CpuMatrix};
use super::driver::{Address, Arg, Driver, Geometry};
use super::fp8;
use super::memory::Buffer;
use super::upload::Uploader;

/// Bytes of an arena's chunk when nothing else is asked for.
const CHUNK_BYTES: usize = 256 << 20;
/// The same of scales, which are 4 bytes a row.
const SCALES_CHUNK_BYTES: usize = 8 << 20;
/// Matrices begin at multiples of this.
const ALIGNMENT: usize = 16;
/// Rows after a matrix that may be read (and come to nothing): products round rows up, and the
/// last of several ranks has the width of the others.
pub(super) const READABLE_ROWS: usize = 72;
/// Rows of a block format that are expanded at a time, elements.
const EXPANDED_ELEMENTS: usize = 1 << 22;

/// A matrix `[rows, cols]`, row-major, of the computing type, or of E4M3 if it has scales.
pub(in crate::kernels) struct GpuMatrix {
    pub(in crate::kernels) rows: usize,
    pub(in crate::kernels) cols: usize,
    elements: Place,
    /// One f32 a row.
    scales: Option<Place>,
}

impl GpuMatrix {
    /// Returns where the elements begin.
    pub(super) fn address(&self) -> Address {
        self.elements.address
    }

    /// Returns where the elements of the computing type begin.
    ///
    /// # Errors
    /// When they are E4M3.
    pub(super) fn unquantized(&self) -> Result<Address> {
        match self.scales {
            None => Ok(self.elements.address),
            Some(_) => bail!("an FP8 matrix where only the computing type is read"),
        }
    }

    /// Returns where the scales begin, none of the computing type.
    pub(super) fn scales(&self) -> Option<Address> {
        self.scales.as_ref().map(|scales| scales.address)
    }

    fn element_bytes(&self) -> usize {
        match self.scales {
            Some(_) => 1,
            None => 2,
        }
    }
}

/// Part of a chunk, which stays as long as its parts.
struct Place {
    address: Address,
    num_bytes: usize,
    memory: Arc<Buffer>,
}

/// Where weights lie.
pub(super) struct Arena {
    elements: Region,
    scales: Region,
}

/// Memory that is handed out piece after piece.
struct Region {
    chunk: Mutex<Option<Chunk>>,
    chunk_bytes: usize,
}

struct Chunk {
    memory: Arc<Buffer>,
    used: usize,
}

impl Default for Arena {
    fn default() -> Self {
        let region = |chunk_bytes| Region {
            chunk: Mutex::new(None),
            chunk_bytes,
        };
        Self {
            elements: region(CHUNK_BYTES),
            scales: region(SCALES_CHUNK_BYTES),
        }
    }
}

impl Arena {
    /// Makes room for `num_bytes` of elements in one piece.
    pub(super) fn reserve(&self, driver: &Driver, num_bytes: usize) -> Result<()> {
        let memory = Arc::new(driver.allocate(num_bytes)?);
        *self.elements.lock() = Some(Chunk { memory, used: 0 });
        Ok(())
    }

    /// Returns room for a matrix of the computing type.
    fn take(&self, driver: &Driver, [rows, cols]: [usize; 2]) -> Result<Place> {
        let readable = READABLE_ROWS * cols * 2;
        self.elements.take(driver, rows * cols * 2, readable)
    }
}

impl Region {
    /// Returns room, directly after the piece before if it fits; of the bytes after it `readable`
    /// are allocated.
    fn take(&self, driver: &Driver, num_bytes: usize, readable: usize) -> Result<Place> {
        let mut chunk = self.lock();
        let padded = num_bytes.next_multiple_of(ALIGNMENT);
        let needed = padded + readable;
        if chunk
            .as_ref()
            .is_none_or(|c| c.used + needed > c.memory.num_bytes())
        {
            let memory = Arc::new(driver.allocate(needed.max(self.chunk_bytes))?);
            *chunk = Some(Chunk { memory, used: 0 });
        }
        let Some(chunk) = chunk.as_mut() else {
            bail!("the arena has no chunk");
        };
        let address = chunk.memory.address() + chunk.used as Address;
        chunk.used += padded;
        Ok(Place {
            address,
            num_bytes,
            memory: Arc::clone(&chunk.memory),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Option<Chunk>> {
        self.chunk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns one place for all parts: nothing moves if they lie side by side.
    fn join(&self, driver: &Driver, parts: &[&Place], readable: usize) -> Result<Place> {
        let Some(first) = parts.first() else {
            bail!("nothing to join");
        };
        let num_bytes = parts.iter().map(|part| part.num_bytes).sum();
        let follows = |pair: &[&Place]| {
            Arc::ptr_eq(&pair[0].memory, &pair[1].memory)
                && pair[0].address + pair[0].num_bytes as Address == pair[1].address
        };
        if parts.windows(2).all(follows) {
            return Ok(Place {
                address: first.address,
                num_bytes,
                memory: Arc::clone(&first.memory),
            });
        }
        let joined = self.take(driver, num_bytes, readable)?;
        let mut target = joined.address;
        for part in parts {
            driver.copy(target, part.address, part.num_bytes)?;
            target += part.num_bytes as Address;
        }
        Ok(joined)
    }
}

/// What loading writes to.
pub(super) struct Loading<'a> {
    pub(super) driver: &'a Driver,
    pub(super) arena: &'a Arena,
    pub(super) uploader: &'a Uploader,
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
        let elements = self.arena.take(self.driver, shape)?;
        self.fill(dtype, shape, data, elements.address)?;
        Ok(GpuMatrix {
            rows,
            cols,
            elements,
            scales: None,
        })
    }

    /// Copies a matrix to the GPU, each row quantised from the file's values.
    ///
    /// # Errors
    /// When the type is no float, FP8 products do not divide the shape, `data` has another
    /// length, or memory is out.
    pub(super) fn quantized(
        &self,
        dtype: GgmlDType,
        [rows, cols]: [usize; 2],
        data: &[u8],
    ) -> Result<GpuMatrix> {
        let Some((from, element_bytes)) = float_type(dtype) else {
            bail!(
                "FP8 weights are made of float32, float16 or bfloat16, this is {dtype:?}; give the \
                 checkpoint that is not quantised, or leave --quantization out"
            );
        };
        if !rows.is_multiple_of(fp8::ROW_MULTIPLE) || !cols.is_multiple_of(fp8::COLUMN_MULTIPLE) {
            bail!(
                "{rows} rows of {cols} columns on a rank: FP8 products need multiples of {} and {}; \
                 leave --quantization out, or use another --tensor-parallel-size",
                fp8::ROW_MULTIPLE,
                fp8::COLUMN_MULTIPLE
            );
        }
        check_len(dtype, [rows, cols], data.len(), element_bytes)?;
        let elements = self.arena.elements.take(self.driver, rows * cols, 0)?;
        let scales = self.arena.scales.take(self.driver, 4 * rows, 0)?;
        let staging = self.driver.allocate(data.len())?;
        // SAFETY: the staging buffer has that length.
        unsafe { self.uploader.upload(self.driver, staging.address(), data)? };
        let quantized = fp8::Rows {
            x: staging.address(),
            out: elements.address,
            scales: scales.address,
            shape: [rows, cols],
        };
        fp8::quantize_rows(self.driver, from, &quantized)?;
        // The buffer must not go before the kernel has read it.
        self.driver.synchronize()?;
        Ok(GpuMatrix {
            rows,
            cols,
            elements,
            scales: Some(scales),
        })
    }

    fn fill(
        &self,
        dtype: GgmlDType,
        [rows, cols]: [usize; 2],
        data: Bytes,
        address: Address,
    ) -> Result<()> {
        let Some((from, element_bytes)) = float_type(dtype) else {
            return self.expand(dtype, [rows, cols], data, address);
        };
        check_len(dtype, [rows, cols], data.len(), element_bytes)?;
        if from == "f32" {
            let staging = self.driver.allocate(data.len())?;
            // SAFETY: the staging buffer has that length.
            unsafe {
                self.uploader
                    .upload(self.driver, staging.address(), &data)?
            };
            self.convert(from, address, staging.address(), rows * cols)?;
            // The buffer must not go before the kernel has read it.
            return self.driver.synchronize();
        }
        // SAFETY: the arena gave that much room.
        unsafe { self.uploader.upload(self.driver, address, &data)? };
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

/// Joins matrices of the same columns and form: nothing moves if they lie side by side.
pub(super) fn join(driver: &Driver, arena: &Arena, parts: &[GpuMatrix]) -> Result<GpuMatrix> {
    let Some(first) = parts.first() else {
        bail!("no matrices to join");
    };
    let (cols, element_bytes) = (first.cols, first.element_bytes());
    if let Some(other) = parts.iter().find(|part| part.cols != cols) {
        bail!("matrices of {cols} and {} columns side by side", other.cols);
    }
    let scales: Vec<&Place> = parts.iter().filter_map(|p| p.scales.as_ref()).collect();
    if !scales.is_empty() && scales.len() < parts.len() {
        bail!(
            "{} of {} matrices side by side are FP8",
            scales.len(),
            parts.len()
        );
    }
    let elements: Vec<&Place> = parts.iter().map(|part| &part.elements).collect();
    let readable = READABLE_ROWS * cols * element_bytes;
    Ok(GpuMatrix {
        rows: parts.iter().map(|part| part.rows).sum(),
        cols,
        elements: arena.elements.join(driver, &elements, readable)?,
        scales: match scales.is_empty() {
            true => None,
            false => Some(arena.scales.join(driver, &scales, 0)?),
        },
    })
}

/// Returns what entry points call a file's type and the bytes of an element; none of blocks.
fn float_type(dtype: GgmlDType) -> Option<(&'static str, usize)> {
    match dtype {
        GgmlDType::F32 => Some(("f32", 4)),
        GgmlDType::F16 => Some(("f16", 2)),
        GgmlDType::BF16 => Some(("bf16", 2)),
        _ => None,
    }
}

fn check_len(
    dtype: GgmlDType,
    [rows, cols]: [usize; 2],
    num_bytes: usize,
    element_bytes: usize,
) -> Result<()> {
    if num_bytes != rows * cols * element_bytes {
        bail!("{num_bytes} bytes for {rows} x {cols} elements of {dtype:?}");
    }
    Ok(())
}

/// Returns what entry points call a type.
pub(super) fn type_name(dtype: DType) -> Result<&'static str> {
    match dtype {
        DType::F16 => Ok("f16"),
        DType::BF16 => Ok("bf16"),
        other => bail!("the CUDA kernels compute in float16 or bfloat16, not {other:?}"),
    }
}
