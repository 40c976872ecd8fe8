//! fp16's loss scale in whole runs, and adapters of sixteen bits.

use super::*;
use crate::train::adapter_out::named_tensors;
use crate::train::files::read_tensors;

/// Updates at one rate over an epoch that does not end, so that only their order counts.
fn run_of(total_updates: u64) -> Run {
    let mut run = Run::new("tiny-llama", total_updates);
    run.schedule.curve = LrCurve::Constant;
    run.schedule.warmup_steps = 0;
    run.length.micro_batches_per_epoch = 1000;
    run
}

/// A scale at which the gradients of this model, about 0.1 at most, leave the range of f16 until
/// it has been halved some times.
fn too_large() -> LossScaleOptions {
    LossScaleOptions {
        initial_scale: f64::exp2(30.0),
        ..LossScaleOptions::default()
    }
}

#[test]
fn an_overflow_skips_its_update_and_halves_the_scale_after_the_hysteresis() {
    let dir = tempfile::tempdir().unwrap();
    let mut run = run_of(20);
    run.loss_scale = Some(too_large());
    let (scaled, _) = run.run(dir.path(), &batches).unwrap();
    let skips = run.skips.lock().unwrap().clone();
    assert!((3..18).contains(&skips.len()), "{skips:?}");
    // DeepSpeed's rule: the first overflow lowers the hysteresis, every further one the scale.
    let mut scale = f64::exp2(30.0);
    assert_eq!(skips[0], (1, scale, scale));
    for (_, attempted, next) in &skips[1..] {
        assert_eq!((*attempted, *next), (scale, scale / 2.0));
        scale = *next;
    }

    // The rest is what a run without scale makes of the data that were not skipped: powers of two
    // change no bit.
    let is_skipped = |step: &u64| skips.iter().any(|(skipped, ..)| skipped == step);
    let applied: Vec<u64> = (1..=20).filter(|step| !is_skipped(step)).collect();
    let plain = run_of(applied.len() as u64);
    let accumulation = plain.length.accumulation;
    let rest = |place: BatchPlace| {
        let update = applied[(place.index / accumulation) as usize] - 1;
        batches(BatchPlace {
            index: update * accumulation + place.index % accumulation,
            ..place
        })
    };
    let dir = tempfile::tempdir().unwrap();
    let (plain_summary, _) = plain.run(dir.path(), &rest).unwrap();
    assert_eq!(scaled.params, plain_summary.params);
}

#[test]
fn a_resumed_run_knows_its_loss_scale() {
    let (whole_dir, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let run = |start: Start| {
        let mut run = run_of(24);
        run.loss_scale = Some(LossScaleOptions {
            // Grows into overflows again and again.
            loss_scale_window: 3,
            ..too_large()
        });
        run.save_steps = Some(9);
        run.start = start;
        run
    };
    let whole = run(Start::Fresh);
    let (want, _) = whole.run(whole_dir.path(), &batches).unwrap();
    let skips = whole.skips.lock().unwrap().clone();
    assert!(skips.iter().any(|(step, ..)| *step > 12), "{skips:?}");
    let failing = |place: BatchPlace| match place.index {
        24.. => Err("the disk is gone".into()),
        _ => batches(place),
    };
    run(Start::Fresh).run(dir.path(), &failing).unwrap_err();
    let resumed = run(Start::Checkpoint(dir.path().join("checkpoint-9")));
    let (got, _) = resumed.run(dir.path(), &batches).unwrap();
    assert_eq!(got.params, want.params);
    let rest: Vec<_> = skips.iter().filter(|(step, ..)| *step > 9).collect();
    assert_eq!(
        resumed.skips.lock().unwrap().iter().collect::<Vec<_>>(),
        rest
    );
}

#[test]
fn a_fixed_scale_stays_and_the_smallest_scale_ends_the_run() {
    let dir = tempfile::tempdir().unwrap();
    let mut run = run_of(3);
    run.loss_scale = Some(LossScaleOptions {
        is_dynamic: false,
        ..too_large()
    });
    run.run(dir.path(), &batches).unwrap();
    let scale = f64::exp2(30.0);
    let want = [(1, scale, scale), (2, scale, scale), (3, scale, scale)];
    assert_eq!(*run.skips.lock().unwrap(), want);

    run.loss_scale = Some(LossScaleOptions {
        min_loss_scale: f64::exp2(29.0),
        ..too_large()
    });
    let error = run.run(dir.path(), &batches).unwrap_err().to_string();
    assert!(
        error.contains("minimum 536870912") && error.contains("step 3"),
        "{error}"
    );
}

#[test]
fn adapters_of_sixteen_bits_are_saved_as_they_were_multiplied_with() {
    for (dtype, round) in [
        (
            DType::BF16,
            (|x| half::bf16::from_f32(x).to_f32()) as fn(f32) -> f32,
        ),
        (DType::F16, |x| half::f16::from_f32(x).to_f32()),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let mut run = Run::new("tiny-qwen2", 4);
        run.lora.dtype = dtype;
        let (summary, _) = run.run(dir.path(), &batches).unwrap();
        let layout = LoraLayout::new(&run.base.config, run.lora.clone()).unwrap();
        let file = dir.path().join("adapter_model.safetensors");
        let bytes = std::fs::metadata(&file).unwrap().len();
        assert!(bytes < 3 * layout.num_params() as u64, "{bytes} bytes");
        let saved = read_tensors(&file).unwrap();
        let mut num_rounded = 0;
        for (name, _, values) in named_tensors(&layout, &summary.params) {
            let rounded: Vec<f32> = values.iter().map(|x| round(*x)).collect();
            assert_eq!(saved[&name].1, rounded, "{name}");
            num_rounded += usize::from(rounded != values);
        }
        // The optimizer had more bits than the file.
        assert!(num_rounded > 20, "{num_rounded}");
        // Evaluated is what is in the file.
        run.evaluation = Some((4, None));
        let evaluated = tempfile::tempdir().unwrap();
        run.run(evaluated.path(), &batches).unwrap();
        let best = |dir: &Path| read_json(&dir.join("trainer_state.json"))["best_metric"].clone();
        let mut again = Run::new("tiny-qwen2", 1);
        again.start = Start::Adapter(dir.path().to_owned());
        again.evaluation = Some((1, None));
        again.schedule.learning_rate = 0.0;
        let from_file = tempfile::tempdir().unwrap();
        again.run(from_file.path(), &batches).unwrap();
        assert!(best(evaluated.path()).is_f64());
        assert_eq!(best(evaluated.path()), best(from_file.path()));
    }
}
