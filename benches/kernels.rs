//! Speed of the CPU kernels, beside candle's own matmul.
//!
//! `cargo bench --bench kernels [-- FILTER]` prints the median of 7 timings of each case whose
//! name contains FILTER: GB/s of weights read for one row, GOP/s for more.

use bytes::Bytes;
use candle_core::quantized::{GgmlDType, QMatMul, QTensor};
use candle_core::{DType, Device, Module, Result, Tensor};
use infold::kernels::{AttentionBatch, Kernels, RopeAndCache};
use std::io::Write;
use std::time::Instant;

/// SmolLM2-135M, then Qwen2.5-0.5B: (rows, cols) of qkv, o, gate_up, down and the head.
const SHAPES: [(usize, usize); 9] = [
    (960, 576),
    (576, 576),
    (3072, 576),
    (576, 1536),
    (49152, 576),
    (1152, 896),
    (9728, 896),
    (896, 4864),
    (151_936, 896),
];

const DTYPES: [GgmlDType; 10] = [
    GgmlDType::Q4_0,
    GgmlDType::Q4_1,
    GgmlDType::Q5_0,
    GgmlDType::Q5_1,
    GgmlDType::Q8_0,
    GgmlDType::Q4K,
    GgmlDType::Q5K,
    GgmlDType::Q6K,
    GgmlDType::BF16,
    GgmlDType::F32,
];

fn main() -> Result<()> {
    let filter = std::env::args()
        .skip(1)
        .find(|arg| !arg.starts_with('-'))
        .unwrap_or_default();
    let num_threads = std::thread::available_parallelism()?.get();
    let kernels = Kernels::cpu(num_threads)?;
    let mut out = std::io::stdout();
    for dtype in DTYPES {
        for (rows, cols) in SHAPES {
            for num_rows in [1, 8, 32, 512] {
                let name = format!("matmul {dtype:?} {rows}x{cols} m={num_rows}");
                let is_long = rows * num_rows > 20_000_000;
                if name.contains(&filter) && cols.is_multiple_of(dtype.block_size()) && !is_long {
                    let line = matmul(&kernels, dtype, [rows, cols], num_rows)?;
                    writeln!(out, "{name:36} {line}")?;
                }
            }
        }
    }
    for (num_sequences, start, end) in [(1, 1023, 1024), (8, 1023, 1024), (1, 0, 1024)] {
        let name = format!("attention {num_sequences} x {start}..{end}");
        if name.contains(&filter) {
            let time = attention(&kernels, num_sequences, start, end)?;
            writeln!(out, "{name:36} {:9.3} ms a layer", time * 1e3)?;
        }
    }
    for num_rows in [1, 8, 512] {
        let name = format!("elementwise m={num_rows}");
        if name.contains(&filter) {
            writeln!(out, "{name:36} {}", elementwise(&kernels, num_rows)?)?;
        }
    }
    Ok(())
}

/// Returns the median seconds of a call.
fn time(mut f: impl FnMut() -> Result<Tensor>) -> Result<f64> {
    let start = Instant::now();
    std::hint::black_box(f()?);
    let num_calls = (0.02 / start.elapsed().as_secs_f64()).clamp(1.0, 1000.0) as usize;
    let mut times = Vec::new();
    for _ in 0..7 {
        let start = Instant::now();
        for _ in 0..num_calls {
            std::hint::black_box(f()?);
        }
        times.push(start.elapsed().as_secs_f64() / num_calls as f64);
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

fn speed(seconds: f64, num_bytes: usize, num_ops: f64, num_rows: usize) -> String {
    let micros = seconds * 1e6;
    if num_rows == 1 {
        format!(
            "{micros:10.1} us {:7.1} GB/s",
            num_bytes as f64 / seconds / 1e9
        )
    } else {
        format!("{micros:10.1} us {:7.1} GOP/s", num_ops / seconds / 1e9)
    }
}

fn matmul(
    kernels: &Kernels,
    dtype: GgmlDType,
    [rows, cols]: [usize; 2],
    num_rows: usize,
) -> Result<String> {
    let device = kernels.device();
    let weights = Tensor::rand(-1f32, 1f32, (rows, cols), device)?;
    let quantized = QTensor::quantize(&weights, dtype)?;
    let data = Bytes::from(quantized.data()?.into_owned());
    let num_bytes = data.len();
    // Copies enough to overflow the last-level cache, as the layers of a model do.
    let num_copies = (100_000_000 / num_bytes).clamp(1, 64);
    let matrices = (0..num_copies)
        .map(|_| kernels.load_matrix(dtype, rows, cols, data.clone()))
        .collect::<Result<Vec<_>>>()?;
    let x = Tensor::rand(-1f32, 1f32, (num_rows, cols), device)?;
    let mut next = (0..num_copies).cycle();
    let ours = time(|| kernels.matmul(&x, &[&matrices[next.next().unwrap_or(0)]], None))?;
    let theirs = QMatMul::from_qtensor(quantized)?;
    let theirs = time(|| theirs.forward(&x))?;
    let num_ops = 2.0 * (rows * cols * num_rows) as f64;
    let ours_text = speed(ours, num_bytes, num_ops, num_rows);
    let theirs_text = speed(theirs, num_bytes, num_ops, num_rows);
    Ok(format!(
        "{ours_text}   candle {theirs_text}   {:6.2}x",
        theirs / ours
    ))
}

/// SmolLM2's attention: 9 heads, 3 kv heads of 64.
fn attention(kernels: &Kernels, num_sequences: u32, start: u32, end: u32) -> Result<f64> {
    let device = kernels.device();
    let num_blocks = end.div_ceil(16);
    let mut kv =
        kernels.new_kv_blocks((num_blocks * num_sequences) as usize, 16, 3, 64, DType::F32)?;
    let table = Tensor::rand(-1f32, 1f32, (end as usize, 32), device)?;
    for sequence in 0..num_sequences {
        let qkv = Tensor::rand(-1f32, 1f32, (end as usize, 15 * 64), device)?;
        let first = sequence * num_blocks * 16;
        let args = RopeAndCache {
            num_heads: 9,
            num_kv_heads: 3,
            head_dim: 64,
            q_norm: None,
            k_norm: None,
            eps: 1e-6,
            cos: &table,
            sin: &table,
            positions: &(0..end).collect::<Vec<_>>(),
            slot_mapping: &(first..first + end).collect::<Vec<_>>(),
        };
        kernels.rope_and_cache(&qkv, &args, &mut kv)?;
    }
    let num_tokens = end - start;
    let batch = AttentionBatch {
        cu_seqlens_q: (0..=num_sequences).map(|i| i * num_tokens).collect(),
        context_lens: vec![end; num_sequences as usize],
        block_tables: (0..num_sequences * num_blocks).collect(),
        cu_blocks: (0..=num_sequences).map(|i| i * num_blocks).collect(),
        positions: (0..num_sequences).flat_map(|_| start..end).collect(),
        slot_mapping: Vec::new(),
    };
    let q = Tensor::rand(
        -1f32,
        1f32,
        ((num_sequences * num_tokens) as usize, 9 * 64),
        device,
    )?;
    time(|| kernels.paged_attention(&q, &kv, &batch, 9, 0.125))
}

fn elementwise(kernels: &Kernels, num_rows: usize) -> Result<String> {
    let device = kernels.device();
    let x = Tensor::rand(-1f32, 1f32, (num_rows, 576), device)?;
    let weight = Tensor::rand(-1f32, 1f32, 576, device)?;
    let gate_up = Tensor::rand(-1f32, 1f32, (num_rows, 3072), device)?;
    let norm = time(|| Ok(kernels.add_rms_norm(&x, &x, &weight, 1e-5)?.0))? * 1e6;
    let silu = time(|| kernels.silu_and_mul(&gate_up))? * 1e6;
    let add = time(|| kernels.add(&x, &x))? * 1e6;
    Ok(format!(
        "add_rms_norm {norm:.1} us, silu_and_mul {silu:.1} us, add {add:.1} us"
    ))
}
