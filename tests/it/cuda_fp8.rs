//! The engine with `--quantization fp8` against the engine on the CPU, and against itself.
//!
//! Weights lie on E4M3's grid, so that FP8 rounds activations alone. That rounding is no small
//! matter: these shapes in numpy, with the same rounding, are up to 0.43 (and a tenth of its size more)
//! and 1.4% of the norm (3.7% of one logprob) from themselves without it, and as far from themselves
//! once anything has moved the last bits: what lies between two steps of E4M3 then falls otherwise.

use std::sync::Arc;

use infold::engine::{Dtype, Engine, EngineOptions, Quantization};
use infold::kernels::Kernels;
use infold::weights::Checkpoint;

use crate::cuda::{
    Tolerance, assert_all_near, assert_batchings_agree, has_gpu, on_gpu, params, prompts, run_alone,
};
use crate::random_models::{Linears, SHAPES, Shape};
use crate::tiny_engine::{options, run_together, start};

/// Twice what the rounding of activations does.
const FP8_TOLERANCE: Tolerance = Tolerance {
    logprob: 0.8,
    relative: 8e-2,
};

/// Whether there is a GPU, and it and this program have FP8 products; others refuse them.
pub(crate) fn has_fp8_products() -> bool {
    if !has_gpu() {
        return false;
    }
    let folder = SHAPES[0].write();
    let checkpoint = Arc::new(Checkpoint::open(folder.path()).unwrap());
    match Engine::start(checkpoint, &with_fp8(Dtype::Float16)) {
        Ok(_) => true,
        Err(error) => {
            let text = error.to_string();
            assert!(
                text.contains("compute capability 9.0 (H100, H200)"),
                "{text}"
            );
            let is_hopper = text.contains("has 9.0");
            assert!(!is_hopper || !compiled_for_hopper(), "{text}");
            eprintln!("skipped: {text}");
            false
        }
    }
}

/// Whether build.rs was let compile the kernels for compute capability 9.0, as unless told it does.
fn compiled_for_hopper() -> bool {
    let archs = option_env!("INFOLD_CUDA_ARCHS").unwrap_or("90a");
    let flags = option_env!("INFOLD_NVCC_FLAGS").unwrap_or_default();
    archs.contains("90a") || flags.contains("90a")
}

fn shapes() -> [Shape; 3] {
    SHAPES.map(|shape| Shape {
        linears: Linears::E4m3,
        ..shape
    })
}

fn with_fp8(dtype: Dtype) -> EngineOptions {
    EngineOptions {
        quantization: Quantization::Fp8,
        ..on_gpu(dtype)
    }
}

#[test]
fn fp8_answers_as_the_cpu_with_the_same_weights() {
    if !has_fp8_products() {
        return;
    }
    for shape in shapes() {
        let folder = shape.write();
        let want = run_alone(&start(folder.path(), &options()), &params(24));
        for dtype in [Dtype::Bfloat16, Dtype::Float16] {
            let what = format!("{} {dtype:?}", shape.model_type);
            let got = run_alone(&start(folder.path(), &with_fp8(dtype)), &params(24));
            assert_all_near(&what, &got, &want, FP8_TOLERANCE);
            let plain = run_alone(&start(folder.path(), &on_gpu(dtype)), &params(24));
            assert_ne!(got, plain, "{what}: nothing was quantised");
        }
    }
}

#[test]
fn batchings_of_fp8_agree() {
    if !has_fp8_products() {
        return;
    }
    for shape in shapes() {
        assert_batchings_agree(&shape, &with_fp8(Dtype::Float16), FP8_TOLERANCE);
    }
}

#[test]
fn fp8_answers_the_same_again() {
    if !has_fp8_products() {
        return;
    }
    let folder = shapes()[1].write();
    let engine = start(folder.path(), &with_fp8(Dtype::Float16));
    let first = run_alone(&engine, &params(40));
    assert_eq!(first, run_alone(&engine, &params(40)));
}

#[test]
fn fp8_refuses_columns_that_its_products_do_not_divide() {
    if !has_fp8_products() {
        return;
    }
    let folder = Shape {
        hidden: 200,
        ..SHAPES[1]
    }
    .write();
    let checkpoint = Arc::new(Checkpoint::open(folder.path()).unwrap());
    let refused = Engine::start(checkpoint, &with_fp8(Dtype::Float16));
    let text = refused.map(|_| ()).unwrap_err().to_string();
    assert!(text.contains("q_proj.weight"), "{text}");
    assert!(text.contains("multiples of 8 and 16"), "{text}");
}

#[test]
fn fp8_on_two_gpus_answers_as_on_one() {
    if Kernels::num_gpus() < 2 {
        eprintln!("skipped: this machine has fewer than two GPUs");
        return;
    }
    if !has_fp8_products() {
        return;
    }
    let folder = shapes()[0].write();
    let one = with_fp8(Dtype::Float16);
    let two = EngineOptions {
        tensor_parallel_size: 2,
        ..one.clone()
    };
    let want = run_alone(&start(folder.path(), &one), &params(40));
    let engine = start(folder.path(), &two);
    let got = run_alone(&engine, &params(40));
    assert_all_near("two GPUs", &got, &want, FP8_TOLERANCE);
    let got = run_together(&engine, &prompts(), &params(40));
    assert_all_near("two GPUs together", &got, &want, FP8_TOLERANCE);
}
