//! The kernels against plain loops in `f64` and against candle, at every SIMD level.

use super::*;
use candle_core::quantized::QTensor;
use half::{bf16, f16};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const BLOCK_TYPES: [GgmlDType; 8] = [
    GgmlDType::Q4_0,
    GgmlDType::Q4_1,
    GgmlDType::Q5_0,
    GgmlDType::Q5_1,
    GgmlDType::Q8_0,
    GgmlDType::Q4K,
    GgmlDType::Q5K,
    GgmlDType::Q6K,
];
const BATCHES: [usize; 7] = [1, 2, 3, 7, 8, 9, 33];

fn levels() -> Vec<Kernels> {
    [SimdLevel::Scalar, SimdLevel::Avx2, SimdLevel::Avx512]
        .into_iter()
        .filter(|level| level.is_supported())
        .map(|level| Kernels::cpu_with(2, level).unwrap())
        .collect()
}

fn random(rng: &mut StdRng, len: usize) -> Vec<f32> {
    (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
}

fn tensor(data: &[f32], dims: &[usize]) -> Tensor {
    Tensor::from_slice(data, dims, &Device::Cpu).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

#[track_caller]
fn assert_close(got: &[f32], want: &[f64], tolerance: impl Fn(usize) -> f64) {
    assert_eq!(got.len(), want.len());
    for (index, (&got, &want)) in got.iter().zip(want).enumerate() {
        let error = (f64::from(got) - want).abs();
        let tolerance = tolerance(index);
        assert!(
            error <= tolerance,
            "at {index}: {got} for {want}, off by {error} > {tolerance}"
        );
    }
}

fn naive_matmul(x: &[f32], w: &[f32], cols: usize) -> Vec<f64> {
    let dot = |x: &[f32], w: &[f32]| {
        x.iter()
            .zip(w)
            .map(|(&x, &w)| f64::from(x) * f64::from(w))
            .sum::<f64>()
    };
    x.chunks_exact(cols)
        .flat_map(|x| w.chunks_exact(cols).map(move |w| dot(x, w)))
        .collect()
}

/// A random matrix as stored bytes, with the weights that candle reads from them.
fn stored(rng: &mut StdRng, dtype: GgmlDType, rows: usize, cols: usize) -> (Bytes, Vec<f32>) {
    let weights = random(rng, rows * cols);
    match dtype {
        GgmlDType::F32 => {
            let bytes: Vec<u8> = weights.iter().flat_map(|w| w.to_le_bytes()).collect();
            (unaligned(&bytes), weights)
        }
        GgmlDType::F16 => {
            let halves: Vec<f16> = weights.iter().map(|&w| f16::from_f32(w)).collect();
            let bytes: Vec<u8> = halves.iter().flat_map(|w| w.to_le_bytes()).collect();
            (
                unaligned(&bytes),
                halves.iter().map(|w| w.to_f32()).collect(),
            )
        }
        GgmlDType::BF16 => {
            let halves: Vec<bf16> = weights.iter().map(|&w| bf16::from_f32(w)).collect();
            let bytes: Vec<u8> = halves.iter().flat_map(|w| w.to_le_bytes()).collect();
            (
                unaligned(&bytes),
                halves.iter().map(|w| w.to_f32()).collect(),
            )
        }
        _ => {
            let quantized = QTensor::quantize(&tensor(&weights, &[rows, cols]), dtype).unwrap();
            let weights = values(&quantized.dequantize(&Device::Cpu).unwrap());
            (unaligned(&quantized.data().unwrap()), weights)
        }
    }
}

/// The same bytes at an odd address, as a slice of a memory map may have.
fn unaligned(bytes: &[u8]) -> Bytes {
    let mut shifted = vec![0; bytes.len() + 1];
    shifted[1..].copy_from_slice(bytes);
    Bytes::from(shifted).slice(1..)
}

#[test]
fn repacked_blocks_give_back_candles_weights() {
    let mut rng = StdRng::seed_from_u64(1);
    let kernels = Kernels::cpu(2).unwrap();
    for dtype in BLOCK_TYPES {
        let (rows, cols) = (37, 512);
        let (bytes, want) = stored(&mut rng, dtype, rows, cols);
        let matrix = kernels.load_matrix(dtype, rows, cols, bytes).unwrap();
        let ids: Vec<u32> = (0..rows as u32).collect();
        let got = values(&kernels.embedding(&ids, &matrix, 0).unwrap());
        let want: Vec<f64> = want.iter().map(|&w| f64::from(w)).collect();
        assert_close(&got, &want, |index| want[index].abs() * 1e-6 + 1e-9);
    }
}

#[test]
fn block_matmul_is_within_the_error_of_8_bit_activations() {
    let mut rng = StdRng::seed_from_u64(2);
    for kernels in levels() {
        for dtype in BLOCK_TYPES {
            let (rows, cols) = (37, 768);
            let (bytes, w) = stored(&mut rng, dtype, rows, cols);
            let matrix = kernels.load_matrix(dtype, rows, cols, bytes).unwrap();
            for num_rows in BATCHES {
                let x = random(&mut rng, num_rows * cols);
                let got = kernels.matmul(&tensor(&x, &[num_rows, cols]), &[&matrix], None);
                // Each activation is off by half a step, so a block of 32 by half a step times
                // the sum of its weights' magnitudes.
                let bound = |index: usize| {
                    let (x, w) = (&x[index / rows * cols..], &w[index % rows * cols..]);
                    let blocks = x[..cols].chunks_exact(32).zip(w[..cols].chunks_exact(32));
                    let bound = blocks.map(|(x, w)| {
                        let max = x.iter().fold(0.0f32, |max, x| max.max(x.abs()));
                        let magnitude: f32 = w.iter().map(|w| w.abs()).sum();
                        f64::from(max / 127.0 * 0.501 * magnitude)
                    });
                    bound.sum::<f64>() + 1e-4
                };
                let want = naive_matmul(&x, &w, cols);
                assert_close(&values(&got.unwrap()), &want, bound);
                // The bound is a worst case; the errors of random signs are far smaller.
                let got = kernels.matmul(&tensor(&x, &[num_rows, cols]), &[&matrix], None);
                assert_close(&values(&got.unwrap()), &want, |_| 0.3);
            }
        }
    }
}

#[test]
fn block_matmul_of_integers_is_exact() {
    // Activations that 8 bits hold exactly leave only the rounding of the sums.
    let mut rng = StdRng::seed_from_u64(3);
    for kernels in levels() {
        for dtype in BLOCK_TYPES {
            let (rows, cols) = (49, 512);
            let (bytes, w) = stored(&mut rng, dtype, rows, cols);
            let matrix = kernels.load_matrix(dtype, rows, cols, bytes).unwrap();
            for num_rows in BATCHES {
                let mut x: Vec<f32> = (0..num_rows * cols)
                    .map(|_| f32::from(rng.random_range(-127i8..=127)))
                    .collect();
                x.iter_mut().step_by(32).for_each(|x| *x = 127.0);
                let got = kernels.matmul(&tensor(&x, &[num_rows, cols]), &[&matrix], None);
                let want = naive_matmul(&x, &w, cols);
                assert_close(&values(&got.unwrap()), &want, |_| 0.02);
            }
        }
    }
}

#[test]
fn dense_matmul_equals_plain_loops() {
    let mut rng = StdRng::seed_from_u64(4);
    for kernels in levels() {
        for dtype in [GgmlDType::F32, GgmlDType::F16, GgmlDType::BF16] {
            for (rows, cols) in [(1, 1), (5, 15), (18, 16), (37, 100), (64, 576)] {
                let (bytes, w) = stored(&mut rng, dtype, rows, cols);
                let matrix = kernels.load_matrix(dtype, rows, cols, bytes).unwrap();
                for num_rows in BATCHES {
                    let x = random(&mut rng, num_rows * cols);
                    let x_tensor = tensor(&x, &[num_rows, cols]);
                    let got = kernels.matmul(&x_tensor, &[&matrix], None).unwrap();
                    let want = naive_matmul(&x, &w, cols);
                    assert_close(&values(&got), &want, |_| 2e-5);
                }
            }
        }
    }
}

#[test]
fn a_row_has_the_same_bits_alone_and_in_a_batch() {
    let mut rng = StdRng::seed_from_u64(5);
    for kernels in levels() {
        for dtype in BLOCK_TYPES
            .into_iter()
            .chain([GgmlDType::F32, GgmlDType::BF16])
        {
            let (rows, cols) = (40, 512);
            let (bytes, _) = stored(&mut rng, dtype, rows, cols);
            let matrix = kernels.load_matrix(dtype, rows, cols, bytes).unwrap();
            let x = tensor(&random(&mut rng, 700 * cols), &[700, cols]);
            let together = kernels.matmul(&x, &[&matrix], None).unwrap();
            for row in [0, 7, 8, 300, 697, 699] {
                let one = x.narrow(0, row, 1).unwrap();
                let alone = kernels.matmul(&one, &[&matrix], None).unwrap();
                let want = together.narrow(0, row, 1).unwrap();
                assert_eq!(values(&alone), values(&want), "{dtype:?} row {row}");
            }
        }
    }
}

#[test]
fn parts_of_different_types_and_a_bias_join_in_one_output() {
    let mut rng = StdRng::seed_from_u64(6);
    for kernels in levels() {
        let cols = 256;
        let mut weights = Vec::new();
        let mut matrices = Vec::new();
        for (dtype, rows) in [
            (GgmlDType::Q8_0, 20),
            (GgmlDType::F32, 7),
            (GgmlDType::Q6K, 33),
            (GgmlDType::BF16, 1),
        ] {
            let (bytes, w) = stored(&mut rng, dtype, rows, cols);
            matrices.push(kernels.load_matrix(dtype, rows, cols, bytes).unwrap());
            weights.extend(w);
        }
        let bias = random(&mut rng, 61);
        let parts: Vec<&Matrix> = matrices.iter().collect();
        for num_rows in BATCHES {
            let x = random(&mut rng, num_rows * cols);
            let x_tensor = tensor(&x, &[num_rows, cols]);
            let got = kernels
                .matmul(&x_tensor, &parts, Some(&tensor(&bias, &[61])))
                .unwrap();
            assert_eq!(got.dims(), [num_rows, 61]);
            let mut want = naive_matmul(&x, &weights, cols);
            for (index, want) in want.iter_mut().enumerate() {
                *want += f64::from(bias[index % 61]);
            }
            assert_close(&values(&got), &want, |_| 0.15);
        }
    }
}

#[test]
fn embedding_gives_zeros_for_ids_of_other_ranks() {
    let mut rng = StdRng::seed_from_u64(7);
    let kernels = Kernels::cpu(2).unwrap();
    let (bytes, w) = stored(&mut rng, GgmlDType::BF16, 10, 24);
    let table = kernels.load_matrix(GgmlDType::BF16, 10, 24, bytes).unwrap();
    let got = values(
        &kernels
            .embedding(&[100, 99, 109, 110, 0], &table, 100)
            .unwrap(),
    );
    assert_eq!(got[..24], w[..24]);
    assert_eq!(got[24..48], [0.0; 24]);
    assert_eq!(got[48..72], w[9 * 24..]);
    assert_eq!(got[72..], [0.0; 48]);
}

#[test]
fn wrong_inputs_are_refused_with_their_numbers() {
    let kernels = Kernels::cpu(1).unwrap();
    let data = Bytes::from(vec![0; 34 * 2]);
    let refused = |result: Result<Matrix>, text: &str| {
        let error = result.err().unwrap().to_string();
        assert!(error.contains(text), "{error}");
    };
    refused(
        kernels.load_matrix(GgmlDType::Q8_0, 2, 33, data.clone()),
        "multiple of 32",
    );
    refused(
        kernels.load_matrix(GgmlDType::Q4K, 2, 32, data.clone()),
        "multiple of 256",
    );
    refused(
        kernels.load_matrix(GgmlDType::Q8_0, 3, 32, data.clone()),
        "102 bytes, got 68",
    );
    refused(
        kernels.load_matrix(GgmlDType::Q2K, 1, 256, data.clone()),
        "no kernel",
    );
    let matrix = kernels.load_matrix(GgmlDType::Q8_0, 2, 32, data).unwrap();
    let x = tensor(&[0.0; 33], &[1, 33]);
    assert!(kernels.matmul(&x, &[&matrix], None).is_err());
    assert!(kernels.gather_rows(&x, &[1]).is_err());
    assert!(Kernels::cpu(0).is_err());
}

#[test]
fn elementwise_kernels_equal_plain_loops() {
    let mut rng = StdRng::seed_from_u64(8);
    for kernels in levels() {
        for width in [1, 8, 15, 16, 100, 576] {
            for num_rows in BATCHES {
                let dims = [num_rows, width];
                let x = random(&mut rng, num_rows * width);
                let y = random(&mut rng, num_rows * width);
                let weight = random(&mut rng, width);
                let (xt, yt, wt) = (
                    tensor(&x, &dims),
                    tensor(&y, &dims),
                    tensor(&weight, &[width]),
                );
                let sum: Vec<f64> = x
                    .iter()
                    .zip(&y)
                    .map(|(&x, &y)| f64::from(x) + f64::from(y))
                    .collect();
                let norm = |x: &[f64]| -> Vec<f64> {
                    let rows = x.chunks_exact(width).flat_map(|x| {
                        let mean = x.iter().map(|x| x * x).sum::<f64>() / width as f64;
                        let scale = 1.0 / (mean + 1e-5).sqrt();
                        let weight = weight.iter().map(|&w| f64::from(w));
                        x.iter().zip(weight).map(move |(x, w)| x * scale * w)
                    });
                    rows.collect()
                };
                let x64: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
                let got = kernels.rms_norm(&xt, &wt, 1e-5).unwrap();
                assert_close(&values(&got), &norm(&x64), |_| 2e-6);
                let (got, got_sum) = kernels.add_rms_norm(&xt, &yt, &wt, 1e-5).unwrap();
                assert_close(&values(&got), &norm(&sum), |_| 2e-6);
                assert_close(&values(&got_sum), &sum, |_| 1e-6);
                assert_close(&values(&kernels.add(&xt, &yt).unwrap()), &sum, |_| 1e-6);
            }
        }
    }
}

#[test]
fn silu_is_accurate_over_its_whole_range() {
    let mut rng = StdRng::seed_from_u64(9);
    for kernels in levels() {
        for width in [1, 8, 33, 1536] {
            let mut gate_up: Vec<f32> = random(&mut rng, 6 * width);
            for (index, value) in gate_up.iter_mut().enumerate() {
                *value *= [1.0, 10.0, 100.0, 1000.0][index % 4];
            }
            let got = kernels
                .silu_and_mul(&tensor(&gate_up, &[3, 2 * width]))
                .unwrap();
            let want: Vec<f64> = gate_up
                .chunks_exact(2 * width)
                .flat_map(|row| row[..width].iter().zip(&row[width..]))
                .map(|(&gate, &up)| {
                    let gate = f64::from(gate);
                    gate / (1.0 + (-gate).exp()) * f64::from(up)
                })
                .collect();
            assert_close(&values(&got), &want, |index| {
                want[index].abs() * 1e-6 + 1e-30
            });
        }
    }
}

#[test]
fn not_a_number_passes_through_instead_of_vanishing() {
    for kernels in levels() {
        let x = tensor(&[f32::NAN, 1.0, 2.0, 3.0], &[1, 4]);
        assert!(values(&kernels.silu_and_mul(&x).unwrap())[0].is_nan());
    }
}

#[test]
fn gathered_rows_come_in_the_order_asked_for() {
    let kernels = Kernels::cpu(1).unwrap();
    let x = tensor(&[0.0, 1.0, 2.0, 3.0, 4.0, 5.0], &[3, 2]);
    let got = kernels.gather_rows(&x, &[2, 0, 2]).unwrap();
    assert_eq!(values(&got), [4.0, 5.0, 0.0, 1.0, 4.0, 5.0]);
}
