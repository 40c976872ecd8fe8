//! Speed of the CPU kernels, beside candle's own matmul.
//!
//! `cargo bench --bench kernels [-- [FILTER] [threads=N] [alone]]` prints the median and the best
//! of 15 timings of each case whose name contains FILTER: GB/s of weights read for one row, GOP/s
//! for more. `alone` leaves candle out. On a busy machine the best with one thread means most.

use bytes::Bytes;
use candle_core::quantized::{GgmlDType, QMatMul, QTensor};
use candle_core::{DType, Module, Result, Tensor};
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

/// What a matmul is compared with.
#[derive(Clone, Copy, PartialEq)]
enum Beside {
    Candle,
    Nothing,
}

/// Seconds of a call.
struct Times {
    median: f64,
    best: f64,
}

fn main() -> Result<()> {
    let (mut filter, mut beside) = (String::new(), Beside::Candle);
    let mut num_threads = std::thread::available_parallelism()?.get();
    for arg in std::env::args().skip(1).filter(|arg| !arg.starts_with('-')) {
        match arg.strip_prefix("threads=") {
            Some(number) => num_threads = number.parse().map_err(candle_core::Error::wrap)?,
            None if arg == "alone" => beside = Beside::Nothing,
            None => filter = arg,
        }
    }
    let kernels = Kernels::cpu(num_threads)?;
    let mut out = std::io::stdout();
    for dtype in DTYPES {
        for (rows, cols) in SHAPES {
            for num_rows in [1, 8, 32, 512] {
                let name = format!("matmul {dtype:?} {rows}x{cols} m={num_rows}");
                let is_long = rows * num_rows > 20_000_000;
                if name.contains(&filter) && cols.is_multiple_of(dtype.block_size()) && !is_long {
                    let line = matmul(&kernels, dtype, [rows, cols], num_rows, beside)?;
                    writeln!(out, "{name:32} {line}")?;
                }
            }
        }
    }
    for (num_sequences, start, end) in [(1, 1023, 1024), (8, 1023, 1024), (1, 0, 1024)] {
        let name = format!("attention {num_sequences} x {start}..{end}");
        if name.contains(&filter) {
            let times = attention(&kernels, num_sequences, start, end)?;
            let [median, best] = [times.median, times.best].map(|seconds| seconds * 1e3);
            writeln!(out, "{name:32} {median:9.3} ms (best {best:.3}) a layer")?;
        }
    }
    for num_rows in [1, 8, 512] {
        let name = format!("elementwise m={num_rows}");
        if name.contains(&filter) {
            writeln!(out, "{name:32} {}", elementwise(&kernels, num_rows)?)?;
        }
    }
    Ok(())
}

fn time(mut f: impl FnMut() -> Result<Tensor>) -> Result<Times> {
    let start = Instant::now();
    std::hint::black_box(f()?);
    let num_calls = (0.003 / start.elapsed().as_secs_f64()).clamp(1.0, 100.0) as usize;
    let mut times = Vec::new();
    for _ in 0..15 {
        let start = Instant::now();
        for _ in 0..num_calls {
            std::hint::black_box(f()?);
        }
        times.push(start.elapsed().as_secs_f64() / num_calls as f64);
    }
    times.sort_by(f64::total_cmp);
    Ok(Times {
        median: times[times.len() / 2],
        best: times[0],
    })
}

fn speed(times: &Times, num_bytes: usize, num_ops: f64, num_rows: usize) -> String {
    let micros = times.median * 1e6;
    let (work, unit) = match num_rows {
        1 => (num_bytes as f64, "GB/s"),
        _ => (num_ops, "GOP/s"),
    };
    let [median, best] = [times.median, times.best].map(|seconds| work / seconds / 1e9);
    format!("{micros:9.1} us {median:6.1} (best {best:6.1}) {unit}")
}

fn matmul(
    kernels: &Kernels,
    dtype: GgmlDType,
    [rows, cols]: [usize; 2],
    num_rows: usize,
    beside: Beside,
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
    let num_ops = 2.0 * (rows * cols * num_rows) as f64;
    let text = speed(&ours, num_bytes, num_ops, num_rows);
    if beside == Beside::Nothing {
        return Ok(text);
    }
    let theirs = QMatMul::from_qtensor(quantized)?;
    let theirs = time(|| theirs.forward(&x))?;
    let faster = theirs.median / ours.median;
    let theirs = speed(&theirs, num_bytes, num_ops, num_rows);
    Ok(format!("{text}   candle {theirs}   {faster:6.2}x"))
}

/// SmolLM2's attention: 9 heads, 3 kv heads of 64.
fn attention(kernels: &Kernels, num_sequences: u32, start: u32, end: u32) -> Result<Times> {
    let device = kernels.device();
    let num_blocks = end.div_ceil(16);
    let num_all_blocks = (num_blocks * num_sequences) as usize;
    let mut layers = kernels.new_kv_cache(1, [num_all_blocks, 16, 3, 64], DType::F32)?;
    let kv = &mut layers[0];
    let table = Tensor::rand(-1f32, 1f32, (end as usize, 32), device)?;
    for sequence in 0..num_sequences {
        let qkv = Tensor::rand(-1f32, 1f32, (end as usize, 15 * 64), device)?;
        let first = sequence * num_blocks * 16;
        let batch = AttentionBatch {
            positions: (0..end).collect(),
            slot_mapping: (first..first + end).collect(),
            ..AttentionBatch::default()
        };
        let args = RopeAndCache {
            num_heads: 9,
            num_kv_heads: 3,
            head_dim: 64,
            q_norm: None,
            k_norm: None,
            eps: 1e-6,
            cos: &table,
            sin: &table,
            batch: &batch,
        };
        kernels.rope_and_cache(&qkv, &args, kv)?;
    }
    let num_tokens = end - start;
    let batch = AttentionBatch {
        cu_seqlens_q: (0..=num_sequences).map(|i| i * num_tokens).collect(),
        context_lens: vec![end; num_sequences as usize],
        block_tables: (0..num_sequences * num_blocks).collect(),
        cu_blocks: (0..=num_sequences).map(|i| i * num_blocks).collect(),
        positions: (0..num_sequences).flat_map(|_| start..end).collect(),
        ..AttentionBatch::default()
    };
    let num_queries = (num_sequences * num_tokens) as usize;
    let q = Tensor::rand(-1f32, 1f32, (num_queries, 9 * 64), device)?;
    time(|| kernels.paged_attention(&q, kv, &batch, 9, 0.125))
}

fn elementwise(kernels: &Kernels, num_rows: usize) -> Result<String> {
    let device = kernels.device();
    let x = Tensor::rand(-1f32, 1f32, (num_rows, 576), device)?;
    let weight = Tensor::rand(-1f32, 1f32, 576, device)?;
    let gate_up = Tensor::rand(-1f32, 1f32, (num_rows, 3072), device)?;
    let norm = time(|| Ok(kernels.add_rms_norm(&x, &x, &weight, 1e-5)?.0))?.best * 1e6;
    let silu = time(|| kernels.silu_and_mul(&gate_up))?.best * 1e6;
    let add = time(|| kernels.add(&x, &x))?.best * 1e6;
    Ok(format!(
        "best: add_rms_norm {norm:.1} us, silu_and_mul {silu:.1} us, add {add:.1} us"
    ))
}
