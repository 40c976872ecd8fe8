//! A checkpoint exported as GGUF answers as the checkpoint does.

use infold::merge::gguf::{GgufFileType, GgufOptions, GgufPlan};
use infold::text::GgufVocabulary;
use infold::weights::Checkpoint;

use crate::tiny_engine::{assert_same, fixtures, greedy, options, run, start, start_fixture};

/// Exports a fixture and compares greedy tokens and logprobs of both.
fn check(model: &str, file_type: GgufFileType, tolerance: f32) {
    let source = fixtures().join(model);
    let checkpoint = Checkpoint::open(&source).unwrap();
    let vocabulary = GgufVocabulary::from_dir(&source, checkpoint.config()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    let wanted = GgufOptions {
        file_type,
        name: None,
    };
    let plan = GgufPlan::new(&checkpoint, checkpoint.config(), &vocabulary, &wanted).unwrap();
    plan.write(&checkpoint, &path, &mut |_| {}).unwrap();

    let prompt: Vec<u32> = (0..40).map(|i| (i * i * 7 + 3) % 500).collect();
    let before = run(&start_fixture(model, &options()), &prompt, greedy(8));
    let after = run(&start(&path, &options()), &prompt, greedy(8));
    assert_same(model, &after, &before, tolerance);
}

#[test]
fn f32_files_answer_as_their_checkpoints_of_every_family() {
    for model in [
        "tiny-qwen2",
        "tiny-qwen2-untied",
        "tiny-qwen3",
        "tiny-llama",
    ] {
        check(model, GgufFileType::F32, 1e-4);
    }
}

#[test]
fn rows_too_short_for_blocks_of_256_are_stored_in_smaller_ones() {
    let source = fixtures().join("tiny-qwen3");
    let checkpoint = Checkpoint::open(&source).unwrap();
    let vocabulary = GgufVocabulary::from_dir(&source, checkpoint.config()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    let wanted = GgufOptions {
        file_type: GgufFileType::Q4KM,
        name: None,
    };
    let plan = GgufPlan::new(&checkpoint, checkpoint.config(), &vocabulary, &wanted).unwrap();
    let summary = plan.write(&checkpoint, &path, &mut |_| {}).unwrap();
    // Three layers of seven matrices fall back; the head takes Q8_0 without a detour.
    assert_eq!(summary.fallbacks.len(), 21);
    let prompt = [1, 2, 3, 4, 5];
    let answer = run(&start(&path, &options()), &prompt, greedy(4));
    assert_eq!(answer.token_ids.len(), 4);
}
