//! Blocks against llama.cpp's, and tensors from end to end.

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use half::{bf16, f16};
use sha2::{Digest, Sha256};

use super::*;

/// SHA-256 of [`sample`] as llama.cpp quantises it (`ggml_quantize_chunk` of the xllamacpp wheel
/// 2026.10.11549); for the first four also as the `gguf` Python package 0.19.0 does.
const LLAMA_CPP: [(GgmlDType, &str); 7] = [
    (
        GgmlDType::Q8_0,
        "6e8778c7b3bfd44b0e4d337bf2ae466b6b8d8dd280c0e3e7f75c09369830d46c",
    ),
    (
        GgmlDType::Q4_0,
        "0bcdcc72e96a6b1bb29d15b75edea62d4d9ed82c01e4e43afa35f8cac6a430e1",
    ),
    (
        GgmlDType::Q5_0,
        "de2936e91bccc8b4192d475317131ad72e4a22e1ff219b98511ddabf7ecbf88a",
    ),
    (
        GgmlDType::Q5_1,
        "83351a07554fb64dedbee03af4c215932843f1879488acb0967ae0ead2982bad",
    ),
    (
        GgmlDType::Q4K,
        "5ccf91a601f463124764ee9fd1abadc4cbd4243314815ce0a85cd951ad1b3812",
    ),
    (
        GgmlDType::Q5K,
        "e2ba75dbc9cacf275a765e8b071488d67706b34ff9b09fe331415a07addcad67",
    ),
    (
        GgmlDType::Q6K,
        "0186b96cc974c14c89ca3bcb9bd7e07b8bf71137b785d8f487236c85d195347e",
    ),
];

/// 64 blocks of 256 weights, exact in f32, of groups of different sizes.
fn sample() -> Vec<f32> {
    (0..256 * 64_i64)
        .map(|i| {
            let value = (i * 7919 + i * i * 31) % 2003 - 1001;
            value as f32 / 16384.0 * ((i / 32) % 5 + 1) as f32
        })
        .collect()
}

fn tensor(dtype: GgmlDType, shape: &[usize], data: Vec<u8>) -> StoredTensor {
    StoredTensor {
        name: "w".into(),
        dtype,
        shape: shape.to_vec(),
        data: data.into(),
    }
}

fn floats(shape: &[usize], values: &[f32]) -> StoredTensor {
    let bytes = values.iter().flat_map(|value| value.to_le_bytes());
    tensor(GgmlDType::F32, shape, bytes.collect())
}

fn encode(
    tensor: &StoredTensor,
    dtype: GgmlDType,
    order: RowOrder,
) -> Result<Vec<u8>, WeightsError> {
    let encoder = RowEncoder {
        name: "blk.0.w",
        tensor,
        dtype,
        order,
    };
    let mut encoded = Vec::new();
    encoder.encode(&mut |bytes| {
        encoded.extend_from_slice(bytes);
        Ok(())
    })?;
    Ok(encoded)
}

#[test]
fn blocks_have_the_bytes_of_llama_cpp() {
    let weights = floats(&[16, 1024], &sample());
    for (dtype, expected) in LLAMA_CPP {
        let encoded = encode(&weights, dtype, RowOrder::AsStored).unwrap();
        assert_eq!(
            encoded.len() as u64,
            encoded_bytes("w", dtype, &[16, 1024]).unwrap()
        );
        let found: String = Sha256::digest(&encoded)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        assert_eq!(found, expected, "{dtype:?}");
    }
}

#[test]
fn bytes_depend_neither_on_threads_nor_on_instructions() {
    let weights = floats(&[128, 128], &sample());
    let pool = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        pool.unwrap()
    };
    let legacy = [GgmlDType::Q5_1, GgmlDType::F16];
    for dtype in legacy {
        let run = || encode(&weights, dtype, RowOrder::AsStored).unwrap();
        assert_eq!(pool(1).install(run), pool(3).install(run), "{dtype:?}");
    }
    for (dtype, _) in LLAMA_CPP {
        let values = sample();
        let size = encoded_bytes("w", dtype, &[values.len()]).unwrap() as usize;
        let (mut best, mut anywhere) = (vec![0; size], vec![0; size]);
        encode_blocks(dtype, &values, &mut best);
        encode_blocks_anywhere(dtype, &values, &mut anywhere);
        assert_eq!(best, anywhere, "{dtype:?}");
    }
}

#[test]
fn the_weighted_search_loses_less_than_candles_plain_one() {
    let values = sample();
    let on_cpu = Tensor::from_slice(&values, values.len(), &Device::Cpu).unwrap();
    let rmse = |dequantised: Vec<f32>| {
        let off = dequantised.iter().zip(&values);
        (off.map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>() / values.len() as f64).sqrt()
    };
    for (dtype, at_most) in [(GgmlDType::Q4K, 0.97), (GgmlDType::Q5K, 0.99)] {
        let candle = QTensor::quantize(&on_cpu, dtype).unwrap();
        let candle = rmse(read_back(dtype, &candle.data().unwrap()));
        let weights = floats(&[values.len()], &values);
        let ours = encode(&weights, dtype, RowOrder::AsStored).unwrap();
        let ours = rmse(read_back(dtype, &ours));
        assert!(ours < at_most * candle, "{dtype:?}: {ours} and {candle}");
    }
}

fn read_back(dtype: GgmlDType, bytes: &[u8]) -> Vec<f32> {
    let storage = candle_core::quantized::QStorage::from_data(bytes.into(), &Device::Cpu, dtype);
    let elements = bytes.len() / dtype.type_size() * dtype.block_size();
    let tensor = QTensor::new(storage.unwrap(), elements).unwrap();
    (tensor.dequantize(&Device::Cpu).unwrap())
        .to_vec1()
        .unwrap()
}

#[test]
fn zeros_and_weights_too_small_for_a_scale_become_zeros() {
    for scale in [0.0, 1e-20] {
        let values: Vec<f32> = sample()[..256].iter().map(|value| value * scale).collect();
        for (dtype, _) in LLAMA_CPP {
            let encoded = encode(&floats(&[256], &values), dtype, RowOrder::AsStored).unwrap();
            let back = read_back(dtype, &encoded);
            assert!(back.iter().all(|&value| value == 0.0), "{dtype:?}");
        }
    }
}

#[test]
fn float_types_round_to_the_nearest() {
    let values = [1.0, -0.1, 65504.0, 1e-7, 3.140_625, 0.0];
    let weights = floats(&[2, 3], &values);
    let half = encode(&weights, GgmlDType::F16, RowOrder::AsStored).unwrap();
    let expected: Vec<u8> = (values.iter())
        .flat_map(|&value| f16::from_f32(value).to_le_bytes())
        .collect();
    assert_eq!(half, expected);
    let brain = encode(&weights, GgmlDType::BF16, RowOrder::AsStored).unwrap();
    let expected: Vec<u8> = (values.iter())
        .flat_map(|&value| bf16::from_f32(value).to_le_bytes())
        .collect();
    assert_eq!(brain, expected);
    // What was 16 bits before stays what it was.
    for (dtype, bytes) in [(GgmlDType::F16, half), (GgmlDType::BF16, brain)] {
        let stored = tensor(dtype, &[2, 3], bytes.clone());
        assert_eq!(encode(&stored, dtype, RowOrder::AsStored).unwrap(), bytes);
        let wide = encode(&stored, GgmlDType::F32, RowOrder::AsStored).unwrap();
        assert_eq!(wide.len(), 24);
        assert_eq!(wide[..4], 1.0_f32.to_le_bytes());
    }
}

#[test]
fn rows_of_heads_are_interleaved_in_matrices_and_biases() {
    let order = RowOrder::Interleaved { num_heads: 2 };
    let values: Vec<f32> = (0..16).map(|row| row as f32).collect();
    let expected = [0, 2, 1, 3, 4, 6, 5, 7].map(|row| row as f32);
    let bias = encode(&floats(&[8], &values[..8]), GgmlDType::F32, order).unwrap();
    assert_eq!(read_back(GgmlDType::F32, &bias), expected);
    let matrix = encode(&floats(&[8, 2], &values), GgmlDType::F32, order).unwrap();
    let firsts: Vec<f32> = read_back(GgmlDType::F32, &matrix)
        .iter()
        .step_by(2)
        .map(|value| value / 2.0)
        .collect();
    assert_eq!(firsts, expected);
}

#[test]
fn values_that_a_type_cannot_hold_are_refused_with_the_tensor() {
    let mut values = sample();
    values[300] = 70_000.0;
    for dtype in [GgmlDType::F16, GgmlDType::Q8_0, GgmlDType::Q4K] {
        let found = encode(&floats(&[16, 1024], &values), dtype, RowOrder::AsStored);
        assert!(
            matches!(
                &found,
                Err(WeightsError::Unrepresentable { tensor, value: 70_000.0, .. })
                    if tensor == "blk.0.w"
            ),
            "{found:?}"
        );
    }
    for dtype in [GgmlDType::F32, GgmlDType::BF16] {
        encode(&floats(&[16, 1024], &values), dtype, RowOrder::AsStored).unwrap();
        for bad in [f32::NAN, f32::NEG_INFINITY] {
            values[300] = bad;
            let found = encode(&floats(&[16, 1024], &values), dtype, RowOrder::AsStored);
            assert!(matches!(found, Err(WeightsError::Unrepresentable { .. })));
        }
        values[300] = 70_000.0;
    }
}

#[test]
fn what_does_not_fit_blocks_or_is_quantised_already_is_refused() {
    let uneven = encode(
        &floats(&[2, 96], &sample()[..192]),
        GgmlDType::Q4K,
        RowOrder::AsStored,
    );
    assert!(matches!(
        uneven,
        Err(WeightsError::UnevenBlocks {
            columns: 96,
            block_size: 256,
            ..
        })
    ));
    let quantised = tensor(GgmlDType::Q8_0, &[1, 32], vec![0; 34]);
    assert!(matches!(
        encode(&quantised, GgmlDType::F16, RowOrder::AsStored),
        Err(WeightsError::NotFloat { .. })
    ));
}
