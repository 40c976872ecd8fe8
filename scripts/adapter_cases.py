"""The list of cases of make_adapter_fixtures.py: each function returns the descriptions of a few cases."""

import json
import shutil

import peft
import torch
from make_adapter_fixtures import ADAPTERS, ALL_LINEAR, edit_config, edit_tensors, golden, make_adapter, merged, refused
from make_adapter_fixtures import new_folder
from peft import LoraConfig
from safetensors.torch import load_file

PLAIN = dict(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj", "v_proj"])
FEW = dict(PLAIN, r=2, target_modules=["k_proj"])


def plain_cases():
    full = dict(r=8, lora_alpha=32, lora_dropout=0.1, target_modules=ALL_LINEAR)
    yield merged("all_linear_bf16", "tiny-qwen2-bf16", full, note="the reference workflow's r, alpha and targets")
    yield merged("all_linear_f32", "tiny-qwen2-untied", full)
    yield merged("all_linear_f16", "tiny-qwen2-f16", dict(full, r=4))
    yield merged("llama_f32", "tiny-llama", dict(PLAIN, target_modules=["o_proj", "down_proj"]))
    yield merged("rslora", "tiny-qwen2-bf16", dict(PLAIN, use_rslora=True, r=6), note="scale 8 / sqrt(6)")
    yield merged("scale_not_a_power_of_two", "tiny-qwen2-bf16", dict(PLAIN, r=3, lora_alpha=7))
    yield merged("adapter_f16", "tiny-qwen2-bf16", PLAIN, dtype="f16")
    yield merged("adapter_bf16", "tiny-qwen2-bf16", PLAIN, dtype="bf16")
    yield merged("adapter_bf16_on_f32", "tiny-qwen2", PLAIN, dtype="bf16")
    yield merged("adapter_bf16_on_f16", "tiny-qwen2-f16", PLAIN, dtype="bf16")


def pattern_cases():
    patterns = dict(
        rank_pattern={"q_proj": 2, "layers.1.self_attn.v_proj": 8},
        alpha_pattern={"q_proj": 5, "layers.1.self_attn.v_proj": 64},
    )
    yield merged("rank_and_alpha_pattern", "tiny-qwen2-bf16", dict(PLAIN, **patterns))
    regex = dict(
        rank_pattern={r"layers\.(0|2)\.self_attn\.q_proj": 1, "self_attn.(k|v)_proj": 3},
        alpha_pattern={r"layers\.(0|2)\.self_attn\.q_proj": 6, "self_attn.(k|v)_proj": 9},
    )
    yield merged("pattern_regex_keys", "tiny-qwen2-bf16", dict(PLAIN, **regex))
    # PEFT writes the keys sorted, so the order of the file is the alphabetical one.
    first = dict(
        rank_pattern={"layers.0.self_attn.v_proj": 6, "v_proj": 2},
        alpha_pattern={"layers.0.self_attn.v_proj": 100, "v_proj": 12},
    )
    yield merged(
        "pattern_first_key_wins",
        "tiny-qwen2-bf16",
        dict(PLAIN, **first),
        note="both keys match layer 0; the first of the file's order decides",
    )
    yield merged("rslora_with_patterns", "tiny-qwen2-bf16", dict(PLAIN, use_rslora=True, **patterns))


def target_cases():
    yield merged("target_regex", "tiny-qwen2-bf16", dict(FEW, target_modules=r".*layers\.[02]\.self_attn\.(q|k)_proj"))
    yield merged(
        "target_all_linear",
        "tiny-qwen2-bf16",
        dict(FEW, r=1, target_modules="all-linear"),
        edit=lambda folder: edit_config(folder, target_modules="all-linear"),
        note="PEFT writes the names that it found; the string is what a user's own config may keep",
    )
    yield merged("layers_to_transform", "tiny-qwen2-bf16", dict(FEW, layers_to_transform=[1], layers_pattern="layers"))
    yield merged(
        "lora_on_some_layers",
        "tiny-qwen2-bf16",
        dict(FEW, target_modules=["layers.0.self_attn.k_proj", "layers.2.mlp.up_proj"]),
    )


def dora_cases():
    dora = dict(PLAIN, use_dora=True)
    yield merged("dora_bf16", "tiny-qwen2-bf16", dora, note="the norms are those of ATEN_CPU_CAPABILITY=avx2")
    yield merged("dora_f32", "tiny-qwen2-untied", dict(dora, target_modules=["o_proj", "gate_proj"]))
    yield merged("dora_rslora", "tiny-qwen2-bf16", dict(dora, use_rslora=True, r=3))


def head_and_embedding_cases():
    few = dict(r=2, lora_alpha=16)
    yield merged(
        "embedding_lora_untied",
        "tiny-qwen2-untied",
        dict(few, target_modules=["embed_tokens"]),
        edit=drop_base_layers,
        note="saved with save_embedding_layers=False; the tied case has PEFT's default",
    )
    yield merged(
        "embedding_lora_bf16_tied", "tiny-qwen2-bf16", dict(few, target_modules=["embed_tokens", "q_proj"]), tied=False
    )
    yield merged("embedding_lora_tied", "tiny-qwen2", dict(few, target_modules=["embed_tokens"]), tied=False)
    yield merged(
        "lm_head_lora_untied", "tiny-llama", dict(few, target_modules=["lm_head", "v_proj"]), edit=drop_base_layers
    )
    yield merged("lm_head_lora_tied", "tiny-qwen2", dict(few, target_modules=["lm_head"]), tied=False)
    yield merged("lm_head_lora_bf16_tied", "tiny-qwen2-bf16", dict(few, target_modules=["lm_head"]), tied=False)
    yield merged(
        "lm_head_and_embedding_lora_tied",
        "tiny-qwen2-bf16",
        dict(few, r=1, target_modules=["lm_head", "embed_tokens"]),
        tied=False,
        edit=drop_base_layers,
    )


def drop_base_layers(folder):
    edit_tensors(folder, lambda state: {name: value for name, value in state.items() if "base_layer" not in name})


def modules_to_save_cases():
    yield merged("modules_to_save_lm_head_tied", "tiny-qwen2", dict(FEW, modules_to_save=["lm_head"]), tied=False)
    yield merged(
        "modules_to_save_embed_tied",
        "tiny-qwen2-bf16",
        dict(FEW, modules_to_save=["embed_tokens"]),
        tied=False,
        dtype="bf16",
    )
    yield merged(
        "modules_to_save_both_tied",
        "tiny-qwen2-bf16",
        dict(FEW, modules_to_save=["embed_tokens", "lm_head"]),
        tied=False,
        dtype="bf16",
    )
    yield merged(
        "modules_to_save_both_equal_tied",
        "tiny-qwen2-bf16",
        dict(FEW, modules_to_save=["embed_tokens", "lm_head"]),
        tied=True,
        dtype="bf16",
        prepare=copy_embedding,
        note="the two replacements are bit-equal, so the result stays tied",
    )
    yield merged(
        "modules_to_save_both_untied",
        "tiny-qwen2-untied",
        dict(FEW, modules_to_save=["embed_tokens", "lm_head"]),
        dtype="bf16",
        note="f32 base, bf16 replacements",
    )
    yield merged("modules_to_save_norms", "tiny-qwen2-untied", dict(FEW, modules_to_save=["input_layernorm", "norm"]))
    yield merged("modules_to_save_linear_with_bias", "tiny-qwen2-bf16", dict(FEW, modules_to_save=["q_proj"]))


def copy_embedding(model):
    state = dict(model.named_parameters())
    head = next(state[key] for key in state if "lm_head.modules_to_save" in key)
    head.data = next(state[key] for key in state if "embed_tokens.modules_to_save" in key).data.clone()


def bias_cases():
    yield merged(
        "bias_all",
        "tiny-qwen2-untied",
        dict(FEW, bias="all"),
        note="biases of targets (base_layer.bias) and of the other linears (bias)",
    )
    yield merged("bias_all_bf16", "tiny-qwen2-bf16", dict(FEW, bias="all"))
    yield merged(
        "bias_lora_only_lost",
        "tiny-qwen2-bf16",
        dict(FEW, bias="lora_only"),
        note="PEFT before 0.21 trains these biases and does not save them",
    )
    yield merged(
        "bias_lora_only",
        "tiny-qwen2-untied",
        dict(FEW, bias="lora_only"),
        edit=add_target_biases,
        note="the biases as PEFT 0.21 saves them, added here to a file of 0.12, which loads them",
    )


def add_target_biases(folder):
    def change(state):
        names = [name.replace("lora_A.weight", "base_layer.bias") for name in state if name.endswith("lora_A.weight")]
        generator = torch.Generator().manual_seed(5)
        size = next(value.shape[0] for name, value in state.items() if "lora_B" in name)
        return {**state, **{name: 0.3 * torch.randn(size, generator=generator) for name in sorted(names)}}

    edit_tensors(folder, change)


def vocabulary_cases():
    yield merged("resized_vocab_tied", "tiny-qwen2", FEW, resize=515, note="PEFT adds the resized matrices by itself")
    both = dict(FEW, modules_to_save=["embed_tokens", "lm_head"])
    yield merged(
        "resized_vocab_modules_to_save_tied",
        "tiny-qwen2-bf16",
        both,
        resize=514,
        dtype="bf16",
        tied=False,
        note="as PEFT 0.12 writes it: each replacement three times (name.weight, name.modules_to_save.weight and,"
        " with the values before training, name.original_module.weight); name.weight is the one that counts",
    )
    yield merged(
        "resized_vocab_modules_to_save_untied",
        "tiny-llama",
        both,
        resize=576,
        dtype="bf16",
        edit=lambda folder: edit_tensors(folder, without_wrapper_copies),
        note="as later PEFT writes it",
    )


def without_wrapper_copies(state):
    return {
        name: value
        for name, value in state.items()
        if ".modules_to_save." not in name and ".original_module." not in name
    }


def conv1d_cases():
    conv = dict(FEW, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    yield merged("fan_in_fan_out_conv1d", "tiny-gpt2", conv, note="base weights are [in, out]; W + (s B A)^T")
    yield merged("dora_conv1d", "tiny-gpt2", dict(conv, use_dora=True), note="columns get the lengths")
    yield merged(
        "fan_in_fan_out_on_linear",
        "tiny-qwen2-bf16",
        FEW,
        edit=lambda folder: edit_config(folder, fan_in_fan_out=True),
        note="PEFT sets the flag back to false for a torch Linear, so nothing is transposed",
    )


def several_adapter_cases():
    def two(name):
        folder = new_folder(name)
        make_adapter("tiny-qwen2-bf16", PLAIN, folder / "first", name)
        make_adapter(
            "tiny-qwen2-bf16", dict(PLAIN, r=2, target_modules=["q_proj", "k_proj"]), folder / "second", name + "2"
        )

    for name, weights, accumulate in (
        ("two_adapters_llamafactory", (1.0, 1.0), "llamafactory"),
        ("two_adapters_fp32", (1.0, 1.0), "fp32"),
        ("two_adapters_weighted", (0.7, -0.25), "fp32"),
    ):
        two(name)
        yield golden(
            name,
            "tiny-qwen2-bf16",
            list(zip(("first", "second"), weights)),
            accumulate=accumulate,
            note=(
                "the deltas are added to each other in f32, in this order, then to f32(W), rounded once"
                if accumulate == "fp32"
                else "W is rounded to bf16 after each adapter"
            ),
        )


def checkpoint_cases():
    def as_checkpoint(folder):
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
            (folder / name).write_bytes(b"stand-in: merge does not read this file\n")
        state = dict(best_metric=None, epoch=1.0, global_step=10, log_history=[], max_steps=10, num_train_epochs=1)
        (folder / "trainer_state.json").write_text(json.dumps(state, indent=2))

    yield merged("trainer_checkpoint", "tiny-qwen2-bf16", FEW, edit=as_checkpoint)

    def only_deepspeed(folder):
        (folder / "global_step10").mkdir(parents=True)
        (folder / "global_step10" / "mp_rank_00_model_states.pt").write_bytes(b"stand-in\n")
        (folder / "latest").write_text("global_step10")

    yield refused("deepspeed_checkpoint_only", "tiny-qwen2-bf16", "no adapter_config.json", adapter=only_deepspeed)


def refused_config_cases():
    """Kinds that do not merge by adding B A onto the base, as PEFT 0.12 writes their configs."""
    base = "tiny-qwen2-bf16"
    lora = dict(FEW, task_type="CAUSAL_LM")
    for name, init in (("pissa", "pissa"), ("pissa_niter", "pissa_niter_4"), ("olora", "olora")):
        yield refused(
            f"refused_{name}",
            base,
            "initialisation changes the base",
            config=LoraConfig(**lora, init_lora_weights=init),
        )
    loftq = LoraConfig(**lora)
    loftq.init_lora_weights, loftq.loftq_config = "loftq", dict(loftq_bits=4, loftq_iter=1)
    yield refused("refused_loftq", base, "initialisation changes the base", config=loftq)
    yield refused(
        "refused_layer_replication",
        base,
        "layer_replication",
        config=LoraConfig(**lora, layer_replication=[[0, 2], [1, 3]]),
    )
    targets = ["k_proj"]
    others = dict(
        ia3=peft.IA3Config(task_type="CAUSAL_LM", target_modules=targets, feedforward_modules=[]),
        prompt_tuning=peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        prefix_tuning=peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        p_tuning=peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        adalora=peft.AdaLoraConfig(task_type="CAUSAL_LM", target_modules=targets),
        loha=peft.LoHaConfig(task_type="CAUSAL_LM", target_modules=targets),
        lokr=peft.LoKrConfig(task_type="CAUSAL_LM", target_modules=targets),
        oft=peft.OFTConfig(task_type="CAUSAL_LM", target_modules=targets),
        boft=peft.BOFTConfig(task_type="CAUSAL_LM", target_modules=targets),
        vera=peft.VeraConfig(task_type="CAUSAL_LM", target_modules=targets),
        fourierft=peft.FourierFTConfig(task_type="CAUSAL_LM", target_modules=targets),
        ln_tuning=peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["norm"]),
    )
    for name, config in others.items():
        yield refused(f"refused_{name}", base, "peft_type", config=config)


def refused_tensor_cases():
    """Adapters whose tensors do not fit; each starts as a good one."""
    base = "tiny-qwen2-bf16"
    key = "base_model.model.model.layers.1.self_attn.k_proj.lora_{}.weight".format

    def spoiled(name, reason, change, on=base, made_on=base):
        def make(folder):
            make_adapter(made_on, FEW, folder, name)
            edit_tensors(folder, change)
            edit_config(folder, base_model_name_or_path=made_on)

        return refused(f"refused_{name}", on, reason, adapter=make)

    def without(*letters):
        return lambda state: {name: value for name, value in state.items() if name not in [key(it) for it in letters]}

    def replaced(letter, value):
        return lambda state: {**state, key(letter): value(state[key(letter)])}

    yield spoiled("a_without_b", "A without B", without("B"))
    yield spoiled("b_without_a", "B without A", without("A"))
    yield spoiled("rank_mismatch", "rank", replaced("B", lambda value: torch.cat([value, value], dim=1)))
    yield spoiled("wrong_input_size", "shape", replaced("A", lambda value: torch.cat([value, value], dim=1)))
    yield spoiled(
        "unknown_layer",
        "not in the base",
        lambda state: {
            **state,
            **{
                name.replace("layers.1.", "layers.9."): value + 0
                for name, value in state.items()
                if "layers.1." in name
            },
        },
    )
    yield spoiled("unknown_suffix", "not used", lambda state: {**state, key("C"): torch.ones(2, 2)})
    yield spoiled(
        "all_zero_b",
        "zero B",
        lambda state: {name: value * 0 if "lora_B" in name else value for name, value in state.items()},
    )
    yield spoiled(
        "empty_zero3_save", "empty", lambda state: {name: value.new_empty(0) for name, value in state.items()}
    )
    yield spoiled("nan", "NaN", replaced("A", lambda value: value.index_fill(0, torch.tensor([0]), float("nan"))))
    yield spoiled("inf", "Inf", replaced("B", lambda value: value.index_fill(0, torch.tensor([3]), float("inf"))))
    yield spoiled(
        "f16_overflow",
        "overflow",
        replaced("B", lambda value: value * 1e8),
        on="tiny-qwen2-f16",
        made_on="tiny-qwen2-f16",
    )
    yield spoiled("other_base", "shape", lambda state: state, on="tiny-qwen2-bf16", made_on="tiny-qwen2-untied")


def newer_cases():
    """What PEFT 0.12.0 cannot make."""
    yield merged("newer_plain", "tiny-qwen2-bf16", FEW, note="a config with all the keys of PEFT 0.18")
    yield merged("newer_lora_bias", "tiny-qwen2-untied", dict(FEW, lora_bias=True))
    yield merged("newer_lora_bias_bf16", "tiny-qwen2-bf16", dict(PLAIN, lora_bias=True))
    yield merged(
        "newer_patterns_looked_up_apart",
        "tiny-qwen2-bf16",
        dict(PLAIN, rank_pattern={"q_proj": 2}, alpha_pattern={"layers.0.self_attn.q_proj": 32}),
        note="layer 0: rank 2 from one key, alpha 32 from another; PEFT 0.12 would take the default alpha",
    )
    yield merged(
        "newer_pattern_full_name",
        "tiny-qwen2-bf16",
        dict(PLAIN, alpha_pattern={r"^model.layers.1.self_attn.v_proj": 3, "lf_attn.q_proj": 77}),
        note="a key matches a whole name or what follows a dot: the second key matches nothing",
    )
    yield merged(
        "newer_trainable_tokens_untied",
        "tiny-qwen2-untied",
        dict(FEW, trainable_token_indices={"embed_tokens": [3, 500, 7]}),
    )
    yield merged(
        "newer_trainable_tokens_tied",
        "tiny-qwen2-bf16",
        dict(FEW, trainable_token_indices=[3, 500, 7]),
        tied=True,
        note="PEFT ties the new rows of both matrices, so the result stays tied",
    )
    yield merged(
        "newer_dora_embedding",
        "tiny-qwen2-untied",
        dict(r=2, lora_alpha=16, use_dora=True, target_modules=["embed_tokens"]),
        edit=drop_base_layers,
    )
    yield merged("newer_exclude_modules", "tiny-qwen2-bf16", dict(FEW, exclude_modules=["layers.0.self_attn.k_proj"]))
    yield merged("newer_qwen3", "tiny-qwen3", dict(FEW, target_modules=["k_proj", "v_proj"]))


def newer_refused_cases():
    base = "tiny-qwen2-bf16"
    lora = dict(FEW, task_type="CAUSAL_LM")
    yield refused(
        "refused_newer_corda",
        base,
        "initialisation changes the base",
        config=LoraConfig(**lora, init_lora_weights="corda", corda_config=peft.tuners.lora.config.CordaConfig()),
    )
    yield refused("refused_newer_alora", base, "alora", config=LoraConfig(**lora, alora_invocation_tokens=[5, 6]))
    yield refused(
        "refused_newer_target_parameters",
        base,
        "target_parameters",
        config=LoraConfig(**lora, target_parameters=["mlp.experts.gate_up_proj"]),
    )
    yield refused("refused_newer_qalora", base, "use_qalora", config=LoraConfig(**lora, use_qalora=True))
    yield refused(
        "refused_newer_arrow",
        base,
        "arrow_config",
        config=LoraConfig(**lora, arrow_config=peft.tuners.lora.config.ArrowConfig()),
    )

    def lora_ga(folder):
        shutil.copytree(ADAPTERS / "refused_pissa" / "adapter", folder)
        edit_config(folder, init_lora_weights="lora_ga")

    yield refused("refused_lora_ga", base, "initialisation changes the base", adapter=lora_ga)

    def bias_on_o_proj(folder):
        make_adapter(base, dict(FEW, target_modules=["k_proj"], lora_bias=True), folder, "refused_lora_bias")
        edit_tensors(folder, lambda state: {name.replace("k_proj", "o_proj"): value for name, value in state.items()})
        state = load_file(folder / "adapter_model.safetensors")
        edit_tensors(
            folder,
            lambda _: {
                name: (
                    torch.ones(64, 2)
                    if name.endswith("lora_B.weight")
                    else torch.ones(64) if name.endswith("bias") else value
                )
                for name, value in state.items()
            },
        )
        edit_config(folder, target_modules=["o_proj"])

    yield refused("refused_lora_bias_without_base_bias", base, "no bias", adapter=bias_on_o_proj)


CASES = (
    plain_cases,
    pattern_cases,
    target_cases,
    dora_cases,
    head_and_embedding_cases,
    modules_to_save_cases,
    bias_cases,
    vocabulary_cases,
    conv1d_cases,
    several_adapter_cases,
    checkpoint_cases,
    refused_config_cases,
    refused_tensor_cases,
)
NEWER_CASES = (newer_cases, newer_refused_cases)
