//! The numbers of the reference run, from configurations alone.

use std::cell::Cell;

use serde_json::json;

use super::*;
use crate::train::Recompute;

/// A shape of the Qwen2.5 family: hidden, intermediate, layers, heads, key-value heads, vocabulary,
/// tied head; and the trainable parameters of rank 8 on all linears.
type Shape = (usize, usize, usize, usize, usize, usize, bool, usize);

/// From 0.5B to 72B.
const FAMILY: [Shape; 7] = [
    (896, 4864, 24, 14, 2, 151_936, true, 4_399_104),
    (1536, 8960, 28, 12, 2, 151_936, true, 9_232_384),
    (2048, 11_008, 36, 16, 2, 151_936, true, 14_966_784),
    (3584, 18_944, 28, 28, 4, 152_064, false, 20_185_088),
    (5120, 13_824, 48, 40, 8, 152_064, false, 34_406_400),
    (5120, 27_648, 64, 40, 8, 152_064, false, 67_108_864),
    (8192, 29_568, 80, 64, 8, 152_064, false, 105_267_200),
];

fn model(index: usize) -> ModelConfig {
    let (hidden, intermediate, layers, heads, kv_heads, vocab, tied, _) = FAMILY[index];
    let json = json!({
        "model_type": "qwen2", "hidden_size": hidden, "intermediate_size": intermediate,
        "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": vocab, "tie_word_embeddings": tied,
        "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 32768
    });
    ModelConfig::from_json(&json).unwrap()
}

/// The reference run for 30 epochs, with `more`.
fn config(more: &[&str]) -> TrainConfig {
    let mut arguments = vec![
        "model_name_or_path=Qwen2.5-7B-Instruct",
        "dataset=identity",
        "output_dir=o",
        "num_train_epochs=30",
        "per_device_train_batch_size=4",
        "gradient_accumulation_steps=4",
        "learning_rate=5e-04",
        "lr_scheduler_type=cosine",
        "lora_alpha=32",
        "lora_dropout=0.1",
        "lora_target=q_proj,v_proj,k_proj,gate_proj,up_proj,o_proj,down_proj",
        "bf16=True",
    ];
    arguments.extend(more);
    let arguments: Vec<String> = arguments.into_iter().map(str::to_owned).collect();
    TrainConfig::from_arguments(&arguments, 1).unwrap()
}

fn plan(config: &TrainConfig, model: &ModelConfig, world_size: usize) -> Result<Plan, TrainError> {
    Plan::new(&PlanInputs {
        config,
        model,
        model_bytes: 15_231_233_024,
        template: TrainingTemplate::named("qwen").unwrap(),
        reports: &[],
        train: EncodeSummary {
            num_examples: 2030,
            num_tokens: 150_000,
            num_target_tokens: 60_000,
            longest: 201,
            ..EncodeSummary::default()
        },
        eval: None,
        world_size,
        available_memory: AVAILABLE.get(),
    })
}

thread_local! {
    /// The memory of the machine that a test plans for.
    static AVAILABLE: Cell<Option<u64>> = const { Cell::new(None) };
}

#[test]
fn the_reference_run_has_its_steps_and_parameters() {
    let plan_8 = plan(&config(&["num_ranks=8"]), &model(3), 8).unwrap();
    assert_eq!(plan_8.counts.total_updates, 480);
    assert_eq!(plan_8.lora.num_params(), 20_185_088);
    assert_eq!(2 * plan_8.lora.entries().len(), 392);
    assert_eq!(plan_8.base_parameters, 7_615_616_512);
    assert_eq!(
        plan(&config(&[]), &model(3), 1)
            .unwrap()
            .counts
            .total_updates,
        3810
    );
    let text = plan_8.to_string();
    for part in [
        "trainable params: 20,185,088 || all params: 7,635,801,600 || trainable%: 0.2643",
        "392 tensors",
        "480 in all: 30 epochs of 16 updates (64 micro-batches on each rank)",
        "4 examples x 4 micro-batches x 8 ranks = 128 examples an update",
        "5e-4 at first, 5e-4 at most",
        "at the end (cosine, 0 updates of warm-up)",
        "2,030, 150,000 tokens, 60,000 of them learned; the longest has 201",
    ] {
        assert!(text.contains(part), "{part} is not in\n{text}");
    }
}

#[test]
fn adapters_of_the_whole_family_have_the_known_sizes() {
    for (index, (.., trainable)) in FAMILY.iter().enumerate() {
        let layout = LoraLayout::new(&model(index), config(&[]).lora_options()).unwrap();
        assert_eq!(layout.num_params(), *trainable);
    }
}

#[test]
fn zero_divides_what_it_says() {
    let file = |stage| {
        let dir = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/tests/fixtures/training_configs"
        );
        format!("deepspeed={dir}/ds_config_zero{stage}.json")
    };
    let memory = |stage: usize| {
        let config = config(&[&file(stage), "num_ranks=8"]);
        plan(&config, &model(3), 8).unwrap().memory
    };
    let parameters = 4 * 20_185_088;
    assert_eq!(memory(2).base, 15_231_233_024);
    assert_eq!(memory(2).adapter, parameters + 3 * parameters / 8);
    assert_eq!(memory(3).base, 15_231_233_024 / 8);
    let config = config(&[&file(3), "num_ranks=8"]);
    let text = plan(&config, &model(3), 8).unwrap().to_string();
    // Two passes of 7/8 of 12.15 GiB in layers, forward and backward.
    let gathering = "42.5 GiB of layers to each rank in every update, 19.9 TiB in the run";
    assert!(text.contains(gathering), "{text}");
    assert!(text.contains("DeepSpeed's WarmupLR"), "{text}");
    assert!(
        text.contains("scheduler.type = WarmupLR: overrides lr_scheduler_type"),
        "{text}"
    );
}

#[test]
fn recomputation_keeps_only_the_inputs_of_layers() {
    let kept = |policy: &str| {
        plan(&config(&[policy]), &model(3), 1)
            .unwrap()
            .memory
            .activations
    };
    // Micro-batches are computed together up to 2048 tokens: two of 832, of which the plan
    // counts what may be at most.
    let tokens = 2048;
    assert_eq!(kept("recompute=full"), tokens * 28 * 3584 * 4);
    assert!(kept("recompute=mlp") > kept("recompute=full"));
    assert!(kept("recompute=none") > kept("recompute=mlp"));
    assert_eq!(kept("recompute=auto"), kept("recompute=none"));
}

#[test]
fn as_little_is_recomputed_as_fits_the_machine() {
    let planned = |available: u64, ranks: usize| {
        AVAILABLE.set(Some(available));
        let config = config(&[&format!("num_ranks={ranks}")]);
        plan(&config, &model(3), ranks).unwrap()
    };
    let gib = 1 << 30;
    for (available, recompute) in [
        (40, Recompute::None),
        (22, Recompute::Mlp),
        (17, Recompute::Full),
    ] {
        let plan = planned(available * gib, 1);
        assert_eq!(plan.memory.recompute, recompute, "{}", plan.memory);
        assert!(plan.memory.fits());
    }
    // Ranks share the base and nothing else.
    assert_eq!(planned(40 * gib, 4).memory.recompute, Recompute::Mlp);
    let text = planned(8 * gib, 1).to_string();
    let line = "more than the 8.0 GiB available: lower per_device_train_batch_size";
    assert!(text.contains(line), "{text}");
    AVAILABLE.set(None);
}

#[test]
fn a_name_that_is_no_linear_is_refused_with_the_names_there_are() {
    let text = plan(&config(&["lora_target=c_attn"]), &model(3), 1)
        .unwrap_err()
        .to_string();
    assert!(text.contains("c_attn") && text.contains("q_proj"), "{text}");
}

#[test]
fn a_schedule_that_counts_other_steps_is_refused() {
    let json =
        r#"deepspeed={"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 7}}}"#;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("ds.json");
    std::fs::write(&file, json.trim_start_matches("deepspeed=")).unwrap();
    let config = config(&[&format!("deepspeed={}", file.display())]);
    assert!(
        plan(&config, &model(3), 1).is_ok(),
        "the file's own warm-up counts"
    );
}

#[test]
fn what_is_trained_beside_plain_adapters_is_counted_and_named() {
    let more = ["use_dora=true", "additional_target=embed_tokens,norm"];
    let plan = plan(&config(&more), &model(3), 1).unwrap();
    // Magnitudes: the outputs of seven linears in 28 layers.
    let outputs = 2 * 3584 + 2 * 512 + 2 * 18_944 + 3584;
    let norms = (2 * 28 + 1) * 3584;
    let whole = 152_064 * 3584 + norms;
    assert_eq!(plan.lora.num_params(), 20_185_088 + 28 * outputs + whole);
    let text = plan.to_string();
    for part in [
        "DoRA r 8",
        "trained and saved whole: embed_tokens, input_layernorm, post_attention_layernorm, norm",
        "646 tensors",
    ] {
        assert!(text.contains(part), "{part} is not in\n{text}");
    }
}

#[test]
fn modules_that_can_not_be_trained_as_asked_are_refused_with_their_names() {
    for (more, part) in [
        (
            &["additional_target=wte"][..],
            "it has embed_tokens, q_proj",
        ),
        (
            &["additional_target=q_proj"],
            "q_proj, which lora_target names too",
        ),
        (
            &["lora_target=embed_tokens"],
            "trained whole with additional_target",
        ),
        (
            &["lora_target=lm_head", "use_dora=true"],
            "use_dora on lm_head",
        ),
    ] {
        let text = plan(&config(more), &model(3), 1).unwrap_err().to_string();
        assert!(text.contains(part), "{part} is not in {text}");
    }
    // Without a head in "all", as in LLaMA-Factory; by name it may have an adapter.
    let with_head = plan(&config(&["lora_target=q_proj,lm_head"]), &model(3), 1).unwrap();
    assert_eq!(with_head.lora.entries().len(), 29);
    // Beside "all" too, where LLaMA-Factory would leave it out without a word.
    let all_and_head = plan(&config(&["lora_target=all,lm_head"]), &model(3), 1).unwrap();
    assert_eq!(all_and_head.lora.entries().len(), 7 * 28 + 1);
}

#[test]
fn the_plan_says_what_sixteen_bits_mean() {
    let zero3 = concat!(
        "deepspeed=",
        env!("CARGO_MANIFEST_DIR"),
        "/tests/fixtures/training_configs/ds_config_zero3.json"
    );
    for (more, parts) in [
        (&["bf16=true"][..], &["saved as f32"][..]),
        (&["bf16=true", zero3], &["rounded to bf16 in every pass"]),
        (&["bf16=false"], &["what is trained is f32"]),
        (
            &["bf16=false", "fp16=true"],
            &[
                "saved as f32",
                "loss scale 65536 at first, halved at every overflow",
            ],
        ),
        (
            &["bf16=false", "fp16=true", zero3],
            &[
                "saved as f16",
                "halved after 2 overflows down to 1, doubled after 1000 updates",
            ],
        ),
    ] {
        let text = plan(&config(more), &model(3), 1).unwrap().to_string();
        for part in parts {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
    }
}

#[test]
fn no_examples_are_refused() {
    let config = config(&[
        "dataloader_drop_last=true",
        "per_device_train_batch_size=4096",
    ]);
    let text = plan(&config, &model(3), 1).unwrap_err().to_string();
    assert!(text.contains("2030 examples"), "{text}");
}

#[test]
fn sizes_and_counts_read_well() {
    assert_eq!(
        [grouped(7), grouped(1234), grouped(1_234_567)],
        ["7", "1,234", "1,234,567"]
    );
    assert_eq!(
        [bytes(12), bytes(1536), bytes(15_231_233_024)],
        ["12 bytes", "1.5 KiB", "14.2 GiB"]
    );
}
