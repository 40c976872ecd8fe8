//! The paged key-value cache of one layer, and the kernel that fills it.
//!
//! Keys lie as `[block][kv_head][head_dim][block_size]`, so that lanes are tokens when scores are
//! made; values as `[block][kv_head][block_size][head_dim]`, so that lanes are dimensions when
//! they are summed. Rotary embedding is the half-split form of Llama and Qwen.

use super::buffer::Output;
use super::e4m3;
use super::elementwise::rms_norm_row;
use super::matmul::Cpu;
use super::simd::{Simd, Task};
use half::f16;
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use std::ops::Range;
use std::sync::atomic::{AtomicPtr, Ordering};

/// Keys and values of one layer.
pub(in crate::kernels) struct CpuKv {
    pub(in crate::kernels) num_blocks: usize,
    pub(in crate::kernels) block_size: usize,
    pub(in crate::kernels) num_kv_heads: usize,
    pub(in crate::kernels) head_dim: usize,
    pub(super) data: KvData,
}

/// The element types; `f16` and E4M3 as their bits.
pub(super) enum KvData {
    F32 { keys: Vec<f32>, values: Vec<f32> },
    F16 { keys: Vec<u16>, values: Vec<u16> },
    E4m3 { keys: Vec<u8>, values: Vec<u8> },
}

impl KvData {
    /// Returns where the keys and where the values begin.
    pub(super) fn starts(&self) -> (*const u8, *const u8) {
        match self {
            Self::F32 { keys, values } => (keys.as_ptr().cast(), values.as_ptr().cast()),
            Self::F16 { keys, values } => (keys.as_ptr().cast(), values.as_ptr().cast()),
            Self::E4m3 { keys, values } => (keys.as_ptr(), values.as_ptr()),
        }
    }
}

/// The element type of a cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::kernels) enum KvType {
    F32,
    F16,
    E4m3,
}

impl CpuKv {
    /// Reserves zeroed memory that the operating system provides on first touch.
    pub(in crate::kernels) fn new(
        [num_blocks, block_size, num_kv_heads, head_dim]: [usize; 4],
        dtype: KvType,
    ) -> Self {
        let len = num_blocks * block_size * num_kv_heads * head_dim;
        let data = match dtype {
            KvType::F32 => KvData::F32 {
                keys: vec![0.0; len],
                values: vec![0.0; len],
            },
            KvType::F16 => KvData::F16 {
                keys: vec![0; len],
                values: vec![0; len],
            },
            KvType::E4m3 => KvData::E4m3 {
                keys: vec![0; len],
                values: vec![0; len],
            },
        };
        Self {
            num_blocks,
            block_size,
            num_kv_heads,
            head_dim,
            data,
        }
    }

    /// Copies a block's keys and values; both blocks are in range.
    pub(in crate::kernels) fn copy_block(&mut self, source: usize, target: usize) {
        let len = self.block_size * self.num_kv_heads * self.head_dim;
        let (source, target) = (source * len..(source + 1) * len, target * len);
        match &mut self.data {
            KvData::F32 { keys, values } => copy_within([keys, values], source, target),
            KvData::F16 { keys, values } => copy_within([keys, values], source, target),
            KvData::E4m3 { keys, values } => copy_within([keys, values], source, target),
        }
    }

    /// Returns the number of token slots.
    pub(in crate::kernels) fn num_slots(&self) -> usize {
        self.num_blocks * self.block_size
    }

    /// Rounds what an `f32` cache holds to E4M3.
    #[cfg(test)]
    pub(in crate::kernels) fn round_to_e4m3(&mut self) {
        let KvData::F32 { keys, values } = &mut self.data else {
            panic!("only an f32 cache can hold what it is rounded to");
        };
        for value in keys.iter_mut().chain(values) {
            *value = e4m3::to_f32(e4m3::from_f32(*value));
        }
    }
}

fn copy_within<T: Copy>(caches: [&mut Vec<T>; 2], source: Range<usize>, target: usize) {
    for cache in caches {
        cache.copy_within(source.clone(), target);
    }
}

/// Stores of one cache element type.
trait StoreType: Copy + Send {
    /// Converts `from` into `to`, of equal length.
    fn convert(from: &[f32], to: &mut [Self]);
}

impl StoreType for f32 {
    #[inline(always)]
    fn convert(from: &[f32], to: &mut [Self]) {
        to.copy_from_slice(from);
    }
}

impl StoreType for u16 {
    #[inline(always)]
    fn convert(from: &[f32], to: &mut [Self]) {
        to.reinterpret_cast_mut::<f16>()
            .convert_from_f32_slice(from);
    }
}

impl StoreType for u8 {
    #[inline(always)]
    fn convert(from: &[f32], to: &mut [Self]) {
        for (to, &from) in to.iter_mut().zip(from) {
            *to = e4m3::from_f32(from);
        }
    }
}

/// What `rope_and_cache` needs besides the cache; see `kernels::RopeAndCache`.
pub(in crate::kernels) struct RopeInputs<'a> {
    pub(in crate::kernels) qkv: &'a [f32],
    pub(in crate::kernels) num_heads: usize,
    pub(in crate::kernels) q_norm: Option<&'a [f32]>,
    pub(in crate::kernels) k_norm: Option<&'a [f32]>,
    pub(in crate::kernels) eps: f32,
    pub(in crate::kernels) cos: &'a [f32],
    pub(in crate::kernels) sin: &'a [f32],
    pub(in crate::kernels) positions: &'a [u32],
    pub(in crate::kernels) slot_mapping: &'a [u32],
}

/// Returns the rotated queries and writes the rotated keys and the values to their slots, which
/// are distinct and exist, as are the positions.
pub(in crate::kernels) fn rope_and_cache(
    cpu: Cpu<'_>,
    inputs: &RopeInputs<'_>,
    kv: &mut CpuKv,
) -> Vec<f32> {
    let dims = Dims {
        block_size: kv.block_size,
        num_kv_heads: kv.num_kv_heads,
        head_dim: kv.head_dim,
    };
    match &mut kv.data {
        KvData::F32 { keys, values } => fill(cpu, inputs, dims, keys, values),
        KvData::F16 { keys, values } => fill(cpu, inputs, dims, keys, values),
        KvData::E4m3 { keys, values } => fill(cpu, inputs, dims, keys, values),
    }
}

#[derive(Clone, Copy)]
struct Dims {
    block_size: usize,
    num_kv_heads: usize,
    head_dim: usize,
}

/// Elements of qkv below which a second thread costs more than it saves.
const MIN_TASK_ELEMENTS: usize = 16 * 1024;

fn fill<T: StoreType>(
    cpu: Cpu<'_>,
    inputs: &RopeInputs<'_>,
    dims: Dims,
    keys: &mut [T],
    values: &mut [T],
) -> Vec<f32> {
    let num_tokens = inputs.positions.len();
    let q_width = inputs.num_heads * dims.head_dim;
    let width = q_width + 2 * dims.num_kv_heads * dims.head_dim;
    let queries = Output::new(num_tokens * q_width);
    let keys = AtomicPtr::new(keys.as_mut_ptr());
    let values = AtomicPtr::new(values.as_mut_ptr());
    let task_tokens = MIN_TASK_ELEMENTS.div_ceil(width);
    cpu.pool.run(num_tokens.div_ceil(task_tokens), |task| {
        let start = task * task_tokens;
        let tokens = RopeTokens {
            inputs,
            dims,
            tokens: start..(start + task_tokens).min(num_tokens),
            queries: queries.at(start * q_width),
            keys: keys.load(Ordering::Relaxed),
            values: values.load(Ordering::Relaxed),
        };
        // SAFETY: the level is supported.
        unsafe { cpu.level.run(tokens) };
    });
    // SAFETY: the tasks cover all tokens.
    unsafe { queries.finish() }
}

struct RopeTokens<'a, T> {
    inputs: &'a RopeInputs<'a>,
    dims: Dims,
    tokens: Range<usize>,
    /// Where the queries of the first token go.
    queries: *mut f32,
    keys: *mut T,
    values: *mut T,
}

impl<T: StoreType> Task for RopeTokens<'_, T> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self {
            inputs,
            dims,
            tokens,
            queries,
            keys,
            values,
        } = self;
        let Dims {
            block_size,
            num_kv_heads,
            head_dim,
        } = dims;
        let (half, num_heads) = (head_dim / 2, inputs.num_heads);
        let width = (num_heads + 2 * num_kv_heads) * head_dim;
        let mut rotated = vec![0.0f32; head_dim];
        for (index, token) in tokens.enumerate() {
            let heads = &inputs.qkv[token * width..(token + 1) * width];
            let angle = inputs.positions[token] as usize * half;
            let cos = &inputs.cos[angle..angle + half];
            let sin = &inputs.sin[angle..angle + half];
            let head = |head: usize| &heads[head * head_dim..(head + 1) * head_dim];
            for h in 0..num_heads {
                // SAFETY: head `h` of this token is within the queries.
                let out = unsafe { queries.add((index * num_heads + h) * head_dim) };
                // SAFETY: `out` has `head_dim` elements, as have the head and the norm.
                unsafe { rotate(simd, head(h), inputs.q_norm, inputs.eps, [cos, sin], out) };
            }
            let slot = inputs.slot_mapping[token] as usize;
            let (block, offset) = (slot / block_size, slot % block_size);
            for h in 0..num_kv_heads {
                let base = (block * num_kv_heads + h) * head_dim * block_size;
                let (k, v) = (head(num_heads + h), head(num_heads + num_kv_heads + h));
                let out = rotated.as_mut_ptr();
                // SAFETY: `rotated` has `head_dim` elements.
                unsafe { rotate(simd, k, inputs.k_norm, inputs.eps, [cos, sin], out) };
                // SAFETY: the slot exists and no other token has it.
                unsafe {
                    put_key(&rotated, keys.add(base + offset), block_size);
                    let to = values.add(base + offset * head_dim);
                    T::convert(v, std::slice::from_raw_parts_mut(to, head_dim));
                }
            }
        }
    }
}

/// Writes a key down its column of a block.
///
/// # Safety
///
/// `column` must be writable at each multiple of `block_size` below `key.len() * block_size`.
#[inline(always)]
unsafe fn put_key<T: StoreType>(key: &[f32], column: *mut T, block_size: usize) {
    let mut buffer = [const { std::mem::MaybeUninit::<T>::uninit() }; 16];
    for (index, part) in key.chunks(16).enumerate() {
        // SAFETY: the buffer is only read where `convert` has written it; `T` is a plain number,
        // for which any bits are valid.
        let converted =
            unsafe { std::slice::from_raw_parts_mut(buffer.as_mut_ptr().cast::<T>(), part.len()) };
        T::convert(part, converted);
        for (i, &value) in converted.iter().enumerate() {
            // SAFETY: the caller's promise.
            unsafe { column.add((index * 16 + i) * block_size).write(value) };
        }
    }
}

/// Normalises a head if it has a norm and rotates it: with x = (a, b) in halves,
/// (a cos - b sin, b cos + a sin).
///
/// # Safety
///
/// `out` must be writable for as many elements as `head` has; `norm` has as many.
#[inline(always)]
unsafe fn rotate<S: Simd>(
    simd: S,
    head: &[f32],
    norm: Option<&[f32]>,
    eps: f32,
    [cos, sin]: [&[f32]; 2],
    out: *mut f32,
) {
    let half = cos.len();
    let mut x = head.as_ptr();
    // SAFETY: the two halves of `head` and `out`, and `half` elements of the tables.
    unsafe {
        if let Some(norm) = norm {
            rms_norm_row(simd, x, norm, eps, out);
            x = out.cast_const();
        }
        let mut at = 0;
        while at < half {
            let len = (half - at).min(16);
            let (a, b) = (
                simd.load_part(x.add(at), len),
                simd.load_part(x.add(half + at), len),
            );
            let cos = simd.load_part(cos.as_ptr().add(at), len);
            let sin = simd.load_part(sin.as_ptr().add(at), len);
            let minus_b = simd.sub(simd.splat(0.0), b);
            simd.store_part(out.add(at), len, simd.fma(a, cos, simd.mul(minus_b, sin)));
            simd.store_part(out.add(half + at), len, simd.fma(b, cos, simd.mul(a, sin)));
            at += 16;
        }
    }
}
