//! The tables of keys that `keys.rs` looks into.

/// Keys that [`TrainConfig`](super::TrainConfig) reads. The last group is infold's own.
#[rustfmt::skip]
pub(super) const READ: &[&str] = &[
    "stage", "do_train", "do_eval", "model_name_or_path", "model_revision", "adapter_name_or_path",
    "create_new_adapter", "disable_gradient_checkpointing", "gradient_checkpointing",
    "template", "dataset", "eval_dataset", "dataset_dir", "cutoff_len", "max_samples", "val_size",
    "packing", "neat_packing", "train_on_prompt", "mask_history", "default_system",
    "enable_thinking", "preserve_thinking", "disable_shuffling",
    "lora_rank", "lora_alpha", "lora_dropout", "lora_target", "additional_target", "use_rslora",
    "use_dora", "loraplus_lr_ratio",
    "num_train_epochs", "max_steps", "per_device_train_batch_size", "per_device_eval_batch_size",
    "gradient_accumulation_steps", "dataloader_drop_last",
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_ratio", "warmup_steps",
    "optim", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
    "neftune_noise_alpha", "bf16", "fp16", "pure_bf16", "seed", "data_seed",
    "logging_strategy", "logging_steps", "logging_first_step", "save_strategy", "save_steps",
    "save_total_limit", "save_only_model", "eval_strategy", "eval_steps", "eval_delay",
    "eval_on_start",
    "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "early_stopping_steps",
    "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "plot_loss", "report_to",
    "run_name", "logging_dir", "include_num_input_tokens_seen",
    "include_effective_tokens_per_second", "disable_tqdm", "deepspeed",
    "dry_run", "num_ranks", "recompute", "max_dropped_ratio", "prefer_hf_scheduler",
];

/// Keys that take several values on the command line.
#[rustfmt::skip]
pub(super) const LISTS: &[&str] = &[
    "dataset", "eval_dataset", "adapter_name_or_path", "lora_target", "additional_target",
    "report_to", "label_names", "include_for_metrics", "debug", "fsdp", "optim_target_modules",
];

/// Old or foreign names of keys.
pub(super) const RENAMED: &[(&str, &str)] = &[
    ("evaluation_strategy", "eval_strategy"),
    ("per_gpu_train_batch_size", "per_device_train_batch_size"),
    ("per_gpu_eval_batch_size", "per_device_eval_batch_size"),
    ("checkpoint_dir", "adapter_name_or_path"),
    ("max_source_length", "cutoff_len"),
    ("template_name", "template"),
];

/// Keys that are accepted without effect: `(reason, keys)`.
#[rustfmt::skip]
pub(super) const NOTED: &[(&str, &[&str])] = &[
    ("no Python code runs here", &[
        "trust_remote_code", "use_fast_tokenizer", "low_cpu_mem_usage", "torch_compile",
        "torch_compile_backend", "torch_compile_mode", "torchdynamo", "torch_empty_cache_steps",
        "jit_mode_eval", "use_ipex", "tf32", "debug", "full_determinism", "past_index",
        "half_precision_backend", "fp16_backend", "fp16_opt_level", "mp_parameters",
        "use_legacy_prediction_loop", "label_names", "remove_unused_columns",
        "gradient_checkpointing_kwargs", "use_reentrant_gc", "skip_memory_metrics",
        "use_v1_kernels", "offload_folder", "tpu_num_cores", "tpu_metrics_debug",
    ]),
    ("the kernels are infold's own", &[
        "flash_attn", "enable_liger_kernel", "use_liger_kernel", "liger_kernel_config",
        "use_unsloth", "use_unsloth_gc", "use_cache", "use_kv_cache", "infer_backend",
        "infer_dtype",
    ]),
    ("norms, logits and losses are always computed in f32", &[
        "upcast_layernorm", "upcast_lmhead_output",
    ]),
    ("examples are read once and stay in memory", &[
        "preprocessing_num_workers", "preprocessing_batch_size", "overwrite_cache",
        "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers",
        "dataloader_prefetch_factor", "buffer_size", "data_shared_file_system", "cache_dir",
        "accelerator_config", "eval_accumulation_steps", "eval_do_concat_batches",
        "batch_eval_metrics", "eval_use_gather_object", "length_column_name",
        "auto_find_batch_size",
    ]),
    ("ranks are threads of one process", &[
        "ddp_timeout", "ddp_backend", "ddp_find_unused_parameters", "ddp_bucket_cap_mb",
        "ddp_broadcast_buffers", "local_rank", "log_on_each_node", "save_on_each_node",
        "_n_gpu", "ray_scope", "ray_num_workers", "ray_init_kwargs", "ray_run_name",
        "ray_storage_path", "resources_per_worker", "placement_strategy", "master_addr",
        "master_port", "average_tokens_across_devices",
    ]),
    ("the mean is always over the target tokens of all ranks and micro-batches", &[
        "loss_norm",
    ]),
    ("adapters go on the linears of the layers, there are none on embeddings", &[
        "loraplus_lr_embedding",
    ]),
    ("set HF_TOKEN or HF_HOME in the environment", &[
        "hf_hub_token", "ms_hub_token", "om_hub_token", "hub_token",
    ]),
    ("nothing is uploaded", &[
        "hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision",
        "push_to_hub_model_id", "push_to_hub_organization", "push_to_hub_token", "export_hub_model_id",
        "project", "trackio_space_id",
    ]),
    ("the log is set by RUST_LOG", &[
        "log_level", "log_level_replica", "print_param_status", "logging_nan_inf_filter",
    ]),
    ("adapters are always written as safetensors, the trainer's state always whole", &[
        "save_safetensors", "restore_callback_states_from_checkpoint",
    ]),
    ("it has an effect only with another key that is not set or not built", &[
        "freeze_trainable_layers", "freeze_trainable_modules", "freeze_extra_modules",
        "freeze_vision_tower", "freeze_multi_modal_projector", "freeze_language_model",
        "pissa_iter", "quantization_method", "quantization_type", "double_quantization",
        "quantization_device_map", "galore_target", "galore_rank", "galore_update_interval",
        "galore_scale", "galore_proj_type", "galore_layerwise", "apollo_target", "apollo_rank",
        "apollo_update_interval", "apollo_scale", "apollo_proj", "apollo_proj_type",
        "apollo_scale_type", "apollo_layerwise", "apollo_scale_front", "badam_mode",
        "badam_start_block", "badam_switch_mode", "badam_switch_interval", "badam_update_ratio",
        "badam_mask_mode", "badam_verbose", "swanlab_project", "swanlab_workspace",
        "swanlab_run_name", "swanlab_mode", "swanlab_api_key", "swanlab_logdir",
        "swanlab_lark_webhook_url", "swanlab_lark_secret", "module_dropout", "oft_rank",
        "oft_block_size", "oft_target", "asft_alpha", "eaft_alpha", "fsdp_config",
        "fsdp_min_num_params", "fsdp_transformer_layer_cls_to_wrap", "fp8_backend",
        "fp8_enable_fsdp_float8_all_gather", "profiler_output_dir", "profiler_wait_steps",
        "profiler_warmup_steps", "profiler_active_steps", "profiler_repeat",
        "profiler_record_shapes", "profiler_profile_memory", "profiler_with_stack",
        "profile_modules", "kt_weight_path", "kt_expert_checkpoint_path", "kt_use_lora_experts",
        "kt_lora_expert_num", "kt_lora_expert_intermediate_size", "hyper_parallel_args",
        "init_special_tokens", "moe_aux_loss_coef", "optim_args", "adapter_folder",
    ]),
    ("only other stages read it", &[
        "pref_beta", "pref_ftx", "pref_bco_weight", "pref_loss", "dpo_label_smoothing",
        "kto_chosen_weight", "kto_rejected_weight", "simpo_gamma", "ppo_buffer_size", "ppo_epochs",
        "ppo_score_norm", "ppo_target", "ppo_whiten_rewards", "ref_model", "ref_model_adapters",
        "ref_model_quantization_bit", "reward_model", "reward_model_adapters",
        "reward_model_quantization_bit", "reward_model_type", "ld_alpha",
    ]),
    ("only text is learned from", &[
        "media_dir", "image_max_pixels", "image_min_pixels", "image_do_pan_and_scan",
        "crop_to_patches", "video_max_pixels", "video_min_pixels", "video_fps", "video_maxlen",
        "use_audio_in_video", "audio_sampling_rate", "image_resolution", "video_resolution",
    ]),
    ("`infold merge` and `infold serve` have their own flags", &[
        "export_dir", "export_size", "export_device", "export_quantization_bit",
        "export_quantization_dataset", "export_quantization_nsamples",
        "export_quantization_maxlen", "export_legacy_format", "vllm_maxlen", "vllm_gpu_util",
        "vllm_enforce_eager", "vllm_max_lora_rank", "vllm_config", "sglang_maxlen",
        "sglang_mem_fraction", "sglang_tp_size", "sglang_config", "sglang_lora_backend",
        "do_sample", "temperature", "top_p", "top_k", "num_beams", "max_length", "max_new_tokens",
        "repetition_penalty", "length_penalty", "skip_special_tokens", "eval_num_beams",
        "generation_max_length", "generation_num_beams", "generation_config", "sortish_sampler",
    ]),
    ("evaluation computes the loss alone", &[
        "prediction_loss_only", "include_inputs_for_metrics", "include_for_metrics",
        "bf16_full_eval", "fp16_full_eval",
    ]),
    ("tokens per second are always shown", &["include_tokens_per_second"]),
    ("the device is chosen at start", &["no_cuda", "use_cpu", "use_mps_device"]),
];

const SUPERVISED_LORA: &str = "infold trains LoRA adapters by supervised fine-tuning";
const QUANTIZED: &str = "train on the unquantised checkpoint: the base stays in its own type";
const OPTIMIZER: &str = "the optimiser is AdamW; leave the key out";
const TOKENS: &str = "train with the tokenizer's own tokens, or add them with transformers first";
const LOADED_WHOLE: &str = "data sets are read whole; leave the key out";
const LOSS: &str = "the loss is the mean cross entropy of the target tokens; leave the key out";
const SPREAD: &str = "use --num-ranks, with a DeepSpeed configuration to shard";
const EVALUATION: &str = "evaluation computes the loss; leave the key out";

/// Keys that are refused unless their value is one of those listed: `(key, values, advice)`.
#[rustfmt::skip]
pub(super) const NOT_BUILT: &[(&str, &[&str], &str)] = &[
    ("finetuning_type", &["lora"], SUPERVISED_LORA),
    ("do_predict", &["false"], "merge the adapter and ask it through `infold serve`"),
    ("predict_with_generate", &["false"], "merge the adapter and ask it through `infold serve`"),
    ("compute_accuracy", &["false"], EVALUATION),
    ("eval_on_each_dataset", &["false"], "name one evaluation set, or evaluate each in a run"),
    ("streaming", &["false"], LOADED_WHOLE),
    ("mix_strategy", &["concat"], "data sets follow one another and are shuffled; use concat"),
    ("interleave_probs", &[], "data sets follow one another; repeat one with num_samples"),
    ("tokenized_path", &[], "tokenising takes seconds here; leave the key out"),
    ("ignore_pad_token_for_loss", &["true"], "padding is never learned; leave the key out"),
    ("split_special_tokens", &["false"], "special tokens in a text are recognised"),
    ("tool_format", &[], "tools are written as the template does; leave the key out"),
    ("resize_vocab", &["false"], TOKENS),
    ("add_tokens", &[], TOKENS),
    ("add_special_tokens", &[], TOKENS),
    ("new_special_tokens", &[], TOKENS),
    ("new_special_tokens_config", &[], TOKENS),
    ("rope_scaling", &["none"], "set rope_scaling in the model's config.json instead"),
    ("shift_attn", &["false"], "attention is always exact"),
    ("mixture_of_depths", &[], SUPERVISED_LORA),
    ("train_from_scratch", &["false"], SUPERVISED_LORA),
    ("quantization_bit", &[], QUANTIZED),
    ("pissa_init", &["false"], "adapters start from LoRA's own initialisation"),
    ("pissa_convert", &["false"], "adapters start from LoRA's own initialisation"),
    ("use_llama_pro", &["false"], SUPERVISED_LORA),
    ("use_galore", &["false"], OPTIMIZER),
    ("use_apollo", &["false"], OPTIMIZER),
    ("use_badam", &["false"], OPTIMIZER),
    ("use_adam_mini", &["false"], OPTIMIZER),
    ("use_muon", &["false"], OPTIMIZER),
    ("adafactor", &["false"], OPTIMIZER),
    ("optim_target_modules", &[], OPTIMIZER),
    ("use_mca", &["false"], SPREAD),
    ("use_hyper_parallel", &["false"], SPREAD),
    ("use_kt", &["false"], SPREAD),
    ("fsdp", &["false", "none"], SPREAD),
    ("parallelism_config", &[], SPREAD),
    ("use_swanlab", &["false"], "set report_to: tensorboard, or read trainer_log.jsonl"),
    ("use_dft_loss", &["false"], LOSS),
    ("use_asft_loss", &["false"], LOSS),
    ("use_eaft_loss", &["false"], LOSS),
    ("label_smoothing_factor", &["0"], LOSS),
    ("group_by_length", &["false"], "batches follow the sampler; packing leaves no padding"),
    ("ignore_data_skip", &["false"], "a resumed run continues where the data stood"),
    ("push_to_hub", &["false"], "nothing is uploaded; use the hub's own tool on output_dir"),
    ("fp8", &["false"], "set bf16: true"),
    ("enable_torch_profiler", &["false"], "profile the process itself, for example with perf"),
];
