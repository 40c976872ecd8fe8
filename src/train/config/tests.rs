//! Configurations as users write them, and what they are told when something is wrong.

use std::path::PathBuf;

use super::super::{Duration, LrCurve, StepCounts, ZeroStage};
use super::*;

const FIXTURES: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/tests/fixtures/training_configs"
);

fn config(arguments: &[&str]) -> Result<TrainConfig, ConfigError> {
    let arguments: Vec<String> = arguments.iter().map(|&text| text.to_owned()).collect();
    TrainConfig::from_arguments(&arguments, 1)
}

/// A configuration with what must be given, and `more`.
fn with(more: &[&str]) -> Result<TrainConfig, ConfigError> {
    let mut arguments = vec!["model_name_or_path=m", "dataset=d", "output_dir=o"];
    arguments.extend(more);
    config(&arguments)
}

fn text(more: &[&str]) -> String {
    with(more).unwrap_err().to_string()
}

/// The arguments of the reference workflow's `train.sh`, word by word.
fn reference(deepspeed: &str) -> Vec<String> {
    let flags = "--stage sft --do_train True --model_name_or_path models/Qwen2___5-7B-Instruct \
        --finetuning_type lora --template qwen --dataset_dir dataset/ --dataset identity \
        --cutoff_len 1024 --num_train_epochs 5 --max_samples 100000 \
        --per_device_train_batch_size 4 --gradient_accumulation_steps 4 \
        --lr_scheduler_type cosine --learning_rate 5e-04 --lr_scheduler_type cosine \
        --max_grad_norm 1.0 --logging_steps 5 --save_steps 100 --neftune_noise_alpha 0 \
        --lora_rank 8 --lora_dropout 0.1 --lora_alpha 32 \
        --lora_target q_proj,v_proj,k_proj,gate_proj,up_proj,o_proj,down_proj \
        --output_dir ./output/qwen_7b_ds/train_2025_02_13 --bf16 True --plot_loss True";
    let words = flags.split_whitespace().map(str::to_owned);
    ["--deepspeed".to_owned(), format!("{FIXTURES}/{deepspeed}")]
        .into_iter()
        .chain(words)
        .collect()
}

#[test]
fn the_reference_command_line_runs_unmodified_with_both_deepspeed_files() {
    let config = TrainConfig::from_arguments(&reference("ds_config_zero3.json"), 8).unwrap();
    assert_eq!(config.data.request.dataset, ["identity"]);
    assert_eq!(config.data.request.max_samples, Some(100_000));
    assert_eq!(config.data.cutoff_len, 1024);
    assert_eq!(config.lora.lora_target.len(), 7);
    assert_eq!((config.lora.lora_rank, config.lora.lora_alpha), (8, 32.0));
    assert_eq!(config.batch.duration, Duration::Epochs(5.0));
    assert_eq!(config.optimizer.neftune_noise_alpha, None);
    assert_eq!(config.schedule.learning_rate, 5e-4);
    assert_eq!(config.schedule.lr_scheduler_type, LrSchedulerType::Cosine);
    assert_eq!(config.precision, Precision::Bf16);
    assert_eq!(config.output.logging, Cadence::Updates(5));
    assert!(config.output.plot_loss && config.do_train);
    let deepspeed = config.deepspeed.unwrap();
    assert_eq!(deepspeed.stage, ZeroStage::Three);
    assert_eq!(deepspeed.schedule.unwrap().name(), "WarmupLR");

    let config = TrainConfig::from_arguments(&reference("ds_config_zero2.json"), 8).unwrap();
    let deepspeed = config.deepspeed.unwrap();
    assert_eq!(
        (deepspeed.stage, deepspeed.schedule),
        (ZeroStage::Two, None)
    );
}

#[test]
fn a_usual_yaml_file_is_read() {
    let file = format!("{FIXTURES}/lora_sft.yaml");
    let config = config(&[&file]).unwrap();
    assert_eq!(config.lora.lora_alpha, 16.0, "twice the rank");
    assert_eq!(config.lora.lora_target, ["all"]);
    assert_eq!(config.schedule.learning_rate, 1e-4);
    assert_eq!(config.schedule.warmup_ratio, 0.1);
    assert_eq!(config.output.eval, Cadence::Updates(500));
    assert_eq!(config.output.resume_from_checkpoint, Resume::Automatic);
    assert!(!config.output.tensorboard);
    assert_eq!(config.recompute, None);
    assert_eq!(config.data.packing, Packing::Packed);
    let notes = config.notes.join("\n");
    assert!(
        notes.contains("`trust_remote_code`: no Python code runs here"),
        "{notes}"
    );
    assert!(notes.contains("`ddp_timeout`"), "{notes}");
}

#[test]
fn rarer_keys_and_overrides_are_read() {
    let file = format!("{FIXTURES}/lora_sft_ds3.yaml");
    let config = config(&[&file, "lora_rank=4", "--num-ranks", "2"]).unwrap();
    assert_eq!(
        config.lora.lora_rank, 4,
        "the command line goes over the file"
    );
    assert_eq!(config.lora.lora_target, ["q_proj", "v_proj"]);
    assert_eq!(config.data.cutoff_len, 1000);
    assert_eq!(config.schedule.learning_rate, 1e-4, "a YAML string");
    assert_eq!(config.model.adapter_name_or_path.len(), 2);
    assert_eq!(config.precision, Precision::Fp16);
    assert_eq!(config.output.eval, Cadence::Epoch, "the key's old name");
    assert_eq!(config.output.save_total_limit, Some(2));
    assert_eq!(config.batch.num_ranks, 2);
    assert!(
        config
            .notes
            .iter()
            .any(|note| note.contains("`flash_attn`"))
    );
}

#[test]
fn defaults_are_llama_factorys() {
    let config = with(&[]).unwrap();
    assert_eq!(config.data.request.dataset_dir, PathBuf::from("data"));
    assert_eq!(config.data.cutoff_len, 2048);
    assert_eq!(config.data.enable_thinking, Some(true));
    assert_eq!((config.lora.lora_rank, config.lora.lora_alpha), (8, 16.0));
    assert_eq!(config.lora.lora_dropout, 0.0);
    assert_eq!(config.batch.per_device_train_batch_size, 8);
    assert_eq!(config.batch.gradient_accumulation_steps, 1);
    assert_eq!(config.batch.duration, Duration::Epochs(3.0));
    assert_eq!(config.schedule.learning_rate, 5e-5);
    assert_eq!(config.schedule.lr_scheduler_type, LrSchedulerType::Linear);
    assert_eq!(config.optimizer.adam_epsilon, 1e-8);
    assert_eq!(config.optimizer.max_grad_norm, 1.0);
    assert_eq!(config.precision, Precision::F32);
    assert_eq!(config.output.logging, Cadence::Updates(500));
    assert_eq!(config.output.eval, Cadence::Never);
    assert_eq!(config.seed, 42);
    assert!(
        config
            .notes
            .iter()
            .any(|note| note.contains("mixed precision"))
    );
}

#[test]
fn flags_follow_the_argument_parser_of_hugging_face() {
    let config = with(&[
        "--per-device-train-batch-size",
        "2",
        "--plot_loss",
        "--overwrite_output_dir=yes",
        "--lora_target",
        "q_proj,",
        "v_proj",
        "--learning_rate",
        "2e-4",
        "--learning_rate",
        "3e-4",
        "--no_do_train",
        "--max_steps",
        "-1",
        "--enable_thinking",
        "null",
    ])
    .unwrap();
    assert_eq!(config.batch.per_device_train_batch_size, 2);
    assert!(config.output.plot_loss && config.output.overwrite_output_dir);
    assert_eq!(
        config.lora.lora_target,
        ["q_proj", "v_proj"],
        "split by the shell"
    );
    assert_eq!(config.schedule.learning_rate, 3e-4);
    assert!(!config.do_train);
    assert_eq!(config.data.enable_thinking, None);
}

#[test]
fn every_spelling_of_true_and_false_is_read() {
    for word in ["True", "true", "1", "yes", "Y", "on"] {
        assert!(
            with(&[&format!("use_rslora={word}")])
                .unwrap()
                .lora
                .use_rslora
        );
    }
    for word in ["False", "0", "no"] {
        assert!(
            !with(&[&format!("use_rslora={word}")])
                .unwrap()
                .lora
                .use_rslora
        );
    }
    let text = text(&["use_rslora=maybe"]);
    assert!(
        text.contains("`use_rslora` must be true or false, found \"maybe\""),
        "{text}"
    );
}

#[test]
fn unknown_keys_name_their_place_and_the_nearest_key() {
    let text = text(&["lora_rnak=8", "--frobnicate", "1"]);
    assert!(
        text.starts_with("Some keys are not used by the HfArgumentParser"),
        "{text}"
    );
    assert!(
        text.contains("`lora_rnak` (lora_rnak=8); did you mean `lora_rank`?"),
        "{text}"
    );
    assert!(text.contains("`frobnicate` (--frobnicate)"), "{text}");
}

#[test]
fn what_is_not_built_is_refused_with_a_way_out() {
    assert!(text(&["stage=dpo"]).contains("set stage: sft"));
    assert!(text(&["finetuning_type=full"]).contains("LoRA adapters"));
    assert!(text(&["quantization_bit=4"]).contains("`quantization_bit: 4` is not built"));
    assert!(text(&["--use_galore", "True"]).contains("AdamW"));
    assert!(text(&["optim=adafactor"]).contains("adamw_torch"));
    assert!(text(&["report_to=wandb"]).contains("trainer_log.jsonl"));
    assert!(with(&["use_galore=false", "label_smoothing_factor=0.0"]).is_ok());
    assert!(with(&["optim=adamw_torch_fused", "fsdp="]).is_ok());
}

#[test]
fn values_out_of_range_name_the_key_and_the_file() {
    assert!(text(&["lora_rank=0"]).contains("`lora_rank` must be a whole number of at least 1"));
    assert!(text(&["lora_dropout=1.0"]).contains("below 1"));
    assert!(text(&["learning_rate=fast"]).contains("must be a number, found \"fast\""));
    assert!(text(&["lr_scheduler_type=cosin"]).contains("one of linear, cosine"));
    assert!(text(&["num_train_epochs=0"]).contains("above 0"));
    assert!(text(&["logging_steps=2.5"]).contains("a share below 1"));
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("run.yaml");
    std::fs::write(&file, "cutoff_len: many\n").unwrap();
    let text = text(&[file.to_str().unwrap()]);
    assert!(
        text.contains("found \"many\"") && text.contains("run.yaml"),
        "{text}"
    );
}

#[test]
fn contradictions_are_refused() {
    assert!(text(&["bf16=true", "fp16=true"]).contains("At most one of fp16 and bf16"));
    assert!(text(&["train_on_prompt=1", "mask_history=1"]).contains("incompatible"));
    assert!(text(&["eval_strategy=steps"]).contains("set `val_size`"));
    assert!(text(&["load_best_model_at_end=1", "val_size=0.1"]).contains("eval_strategy"));
    assert!(text(&["early_stopping_steps=3"]).contains("eval_strategy"));
    let zero3 = concat!(
        "deepspeed=",
        env!("CARGO_MANIFEST_DIR"),
        "/tests/fixtures/training_configs/ds_config_zero3.json"
    );
    let zero3 = ["pure_bf16=true", "gradient_accumulation_steps=4", zero3];
    assert!(text(&zero3).contains("incompatible with DeepSpeed ZeRO-3"));
}

#[test]
fn what_must_be_given_is_asked_for() {
    let text = |arguments: &[&str]| config(arguments).unwrap_err().to_string();
    assert!(text(&["dataset=d", "output_dir=o"]).contains("Please provide `model_name_or_path`"));
    assert!(text(&["model_name_or_path=m", "output_dir=o"]).contains("provide `dataset`"));
    assert!(text(&["model_name_or_path=m", "dataset=d"]).contains("provide `output_dir`"));
}

#[test]
fn files_and_arguments_that_are_none_are_named() {
    assert!(text(&["gone.yaml"]).contains("cannot read \"gone.yaml\""));
    assert!(text(&["whatever"]).contains("unexpected argument \"whatever\""));
    let dir = tempfile::tempdir().unwrap();
    let yaml = dir.path().join("bad.yaml");
    std::fs::write(&yaml, "a: b: c\n").unwrap();
    assert!(text(&[yaml.to_str().unwrap()]).contains("not valid YAML"));
    let json = dir.path().join("good.json");
    std::fs::write(
        &json,
        r#"{"lora_rank": 4, "lora_target": ["q_proj", "v_proj"]}"#,
    )
    .unwrap();
    let config = with(&[json.to_str().unwrap()]).unwrap();
    assert_eq!(config.lora.lora_target, ["q_proj", "v_proj"]);
}

#[test]
fn a_deepspeed_file_that_does_not_fit_is_refused_in_hugging_faces_words() {
    let file = format!("deepspeed={FIXTURES}/ds_config_zero2.json");
    let text = text(&[&file, "gradient_accumulation_steps=8"]);
    assert!(
        text.contains("- ds gradient_accumulation_steps=4 vs hf"),
        "{text}"
    );
    let file = format!("deepspeed={FIXTURES}/ds_config_zero3.json");
    let config = with(&[&file, "prefer_hf_scheduler=true"]).unwrap();
    assert_eq!(config.deepspeed.unwrap().schedule, None);
}

#[test]
fn no_key_stands_in_two_tables() {
    let mut keys: Vec<&str> = key_table::READ.to_vec();
    keys.extend(key_table::NOTED.iter().flat_map(|(_, keys)| *keys));
    keys.extend(key_table::NOT_BUILT.iter().map(|(key, ..)| key));
    keys.extend(key_table::RENAMED.iter().map(|(key, _)| key));
    let count = keys.len();
    keys.sort_unstable();
    keys.dedup();
    assert_eq!(keys.len(), count);
}

#[test]
fn resume_from_checkpoint_is_a_truth_value_or_a_path() {
    let resume = |more: &[&str]| with(more).unwrap().output.resume_from_checkpoint;
    assert_eq!(resume(&[]), Resume::Automatic);
    assert_eq!(resume(&["resume_from_checkpoint=null"]), Resume::Automatic);
    assert_eq!(
        resume(&["--resume_from_checkpoint", "True"]),
        Resume::Newest
    );
    assert_eq!(resume(&["resume_from_checkpoint=False"]), Resume::Never);
    assert_eq!(
        resume(&["resume_from_checkpoint=out/checkpoint-4"]),
        Resume::From(PathBuf::from("out/checkpoint-4"))
    );
}

#[test]
fn intervals_follow_the_cadence() {
    assert_eq!(Cadence::Updates(5).interval(100, 10), Some(5));
    assert_eq!(Cadence::Share(0.25).interval(101, 10), Some(26));
    assert_eq!(Cadence::Epoch.interval(100, 10), Some(10));
    assert_eq!(Cadence::Never.interval(100, 10), None);
}

#[test]
fn the_schedule_has_the_parameters_given_and_deepspeed_s_wins() {
    let counts = StepCounts::new(100, 1, Duration::Updates(100));
    let schedule = |more: &[&str]| with(more).unwrap().lr_schedule(&counts);
    let cosine = schedule(&["lr_scheduler_type=cosine", "warmup_ratio=0.1"]);
    assert_eq!(cosine.curve, LrCurve::Cosine { num_cycles: 0.5 });
    assert_eq!((cosine.warmup_steps, cosine.total_steps), (10, 100));
    let restarts = schedule(&[
        "lr_scheduler_type=cosine_with_restarts",
        "lr_scheduler_kwargs={\"num_cycles\": 3}",
    ]);
    assert_eq!(
        restarts.curve,
        LrCurve::CosineWithRestarts { num_cycles: 3.0 }
    );
    let file = format!("deepspeed={FIXTURES}/ds_config_zero3.json");
    let deepspeed = schedule(&[&file, "lr_scheduler_type=cosine", "warmup_ratio=0.1"]);
    assert!(matches!(deepspeed.curve, LrCurve::WarmupLr(_)));
    assert_eq!(deepspeed.warmup_steps, 10);
    assert_eq!(deepspeed.at(99), 5e-5, "the rate stays where it rose to");

    let text = text(&[
        "lr_scheduler_type=cosine",
        "lr_scheduler_kwargs={\"power\": 2}",
    ]);
    assert!(text.contains("under: num_cycles (cosine)"), "{text}");
    let text = self::text(&["lr_scheduler_type=cosine_with_min_lr"]);
    assert!(text.contains("needs min_lr or min_lr_rate"), "{text}");
}

#[test]
fn a_stable_phase_and_its_decay_have_llama_factorys_defaults() {
    let counts = StepCounts::new(100, 1, Duration::Updates(100));
    let phases = |kwargs: &str| {
        let kwargs = format!("lr_scheduler_kwargs={{{kwargs}}}");
        let more = [
            "lr_scheduler_type=warmup_stable_decay",
            "warmup_steps=5",
            &kwargs,
        ];
        match with(&more).unwrap().lr_schedule(&counts).curve {
            LrCurve::WarmupStableDecay {
                num_stable_steps,
                num_decay_steps,
                ..
            } => (num_stable_steps, num_decay_steps),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(phases(""), (31, 64), "of 95 updates");
    assert_eq!(phases("\"num_decay_steps\": 20"), (31, 20));
    assert_eq!(phases("\"num_stable_steps\": 50"), (50, 64));
    assert_eq!(
        phases("\"num_stable_steps\": 7, \"num_decay_steps\": 0"),
        (7, 0)
    );
    let more = ["lr_scheduler_type=warmup_stable_decay"];
    assert!(with(&more).is_ok(), "no kwargs at all");
}

#[test]
fn a_limit_of_checkpoints_of_zero_or_less_is_none() {
    let limit = |value: &str| with(&[&format!("save_total_limit={value}")]);
    for value in ["0", "-1", "null"] {
        assert_eq!(
            limit(value).unwrap().output.save_total_limit,
            None,
            "{value}"
        );
    }
    assert_eq!(limit("3").unwrap().output.save_total_limit, Some(3));
    let text = limit("1.5").unwrap_err().to_string();
    assert!(
        text.contains("`save_total_limit` must be a whole number"),
        "{text}"
    );
}

#[test]
fn a_system_prompt_keeps_its_spaces_and_line_breaks() {
    // LLaMA-Factory puts it into the prompt as it is; YAML's `|` ends it with a line break.
    for text in ["You are here.\n", " lead", ""] {
        let config = with(&[&format!("default_system={text}")]).unwrap();
        assert_eq!(config.data.default_system.as_deref(), Some(text));
    }
}
