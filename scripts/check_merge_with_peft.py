#!/usr/bin/env python3
"""Merges random adapters into random tiny models with infold and with PEFT, and compares the files byte for byte.

    DIR/python scripts/check_merge_with_peft.py INFOLD            (DIR: see scripts/oracle_stack.sh)
    DIR/python-peft-0.18 scripts/check_merge_with_peft.py INFOLD  the forms that only the newer PEFT knows
      --seed N       other models and adapters (default 0)
      --rounds N     cases of each form (default 2)
      --form NAME    this form alone

Every form that `infold merge` reads has a function below, which draws its details: shapes, ranks, dtypes, tied or
untied. Shards and index are compared with those of `save_pretrained`. Where the base is f32, so are the logits of the
result with those of the live adapter, as scripts/check_merged_logits.py does.

DoRA divides by norms whose last bits PyTorch makes in another order on each kind of processor; infold's are those of
ATEN_CPU_CAPABILITY=avx2, which DIR/python sets. With `default` or `avx512` the form dora fails here.
"""

import argparse
import dataclasses
import pathlib
import random
import re
import subprocess
import sys
import tempfile
import warnings

import peft
import torch
import transformers
from adapter_cases import add_target_biases, drop_base_layers
from check_merged_logits import F64_TOLERANCE, TOLERANCE, live_differences
from make_adapter_fixtures import ALL_LINEAR, DTYPES, NEWER, edit_config, load, make_adapter, weighted_sum
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config


@dataclasses.dataclass
class Case:
    """What a form wishes for; the rest is drawn."""

    # A configuration for each adapter.
    configs: list
    family: str = None
    dtype: str = None
    tied: bool = None
    # Whether a tied model comes apart.
    untie: bool = False
    adapter_dtype: str = None
    # Rows added to the vocabulary.
    more_tokens: int = 0
    # Changes the folder of a saved adapter.
    edit: object = None
    weights: list = None
    accumulate: str = "fp32"


def lora(rng, **wishes):
    """Draws the configuration of an adapter."""
    targets = rng.sample(ALL_LINEAR, rng.randint(1, 4))
    return {**dict(r=rng.randint(1, 9), lora_alpha=rng.randint(1, 40), target_modules=targets), **wishes}


def plain(rng):
    return Case([lora(rng)])


def rslora(rng):
    return Case([lora(rng, use_rslora=True)])


def patterns(rng):
    keys = rng.sample(["q_proj", "layers.0.mlp.up_proj", r"self_attn.(k|v)_proj", r"layers\.[01]\.mlp\.down_proj"], 3)
    # PEFT writes them sorted and takes the first that matches.
    ranks, alphas = ({key: rng.randint(1, 9) for key in sorted(keys)} for _ in range(2))
    return Case([lora(rng, target_modules=ALL_LINEAR, rank_pattern=ranks, alpha_pattern=alphas)])


def target_regex(rng):
    return Case([lora(rng, target_modules=r".*layers\.[02]\.(self_attn\.(q|k)|mlp\.down)_proj")])


def target_all_linear(rng):
    keep_the_word = lambda folder: edit_config(folder, target_modules="all-linear")
    return Case([lora(rng, target_modules="all-linear")], edit=keep_the_word)


def some_layers(rng):
    return Case([lora(rng, layers_to_transform=[1], layers_pattern="layers")])


def dora(rng):
    return Case([lora(rng, use_dora=True, use_rslora=rng.random() < 0.3)])


def embedding(rng):
    return Case([lora(rng, target_modules=["embed_tokens", "v_proj"])], untie=True, edit=maybe_without_base(rng))


def lm_head(rng):
    return Case([lora(rng, target_modules=["lm_head", "o_proj"])], untie=True, edit=maybe_without_base(rng))


def embedding_and_lm_head(rng):
    return Case([lora(rng, target_modules=["lm_head", "embed_tokens"])], untie=True, edit=maybe_without_base(rng))


def maybe_without_base(rng):
    """PEFT saves the base layer beside an embedding's factors, or not, as it is told."""
    return rng.choice([None, drop_base_layers])


def modules_to_save(rng):
    modules = rng.sample(["embed_tokens", "lm_head", "input_layernorm", "k_proj"], rng.randint(1, 3))
    untie = any(name in modules for name in ("embed_tokens", "lm_head"))
    return Case([lora(rng, target_modules=["q_proj", "down_proj"], modules_to_save=modules)], untie=untie)


def bias_all(rng):
    return Case([lora(rng, bias="all")])


def bias_lora_only(rng):
    # PEFT 0.12 trains these biases and does not save them; they are added to its file, which it loads.
    # They have the length of k and v.
    config = lora(rng, target_modules=rng.choice([["k_proj"], ["k_proj", "v_proj"]]), bias="lora_only")
    return Case([config], family="qwen2", edit=add_target_biases)


def resized_vocabulary(rng):
    return Case([lora(rng)], more_tokens=rng.randint(1, 9))


def resized_modules_to_save(rng):
    config = lora(rng, target_modules=["v_proj"], modules_to_save=["embed_tokens", "lm_head"])
    return Case([config], more_tokens=rng.randint(1, 9), untie=True)


def fan_in_fan_out(rng, **more):
    targets = rng.choice([["c_attn"], ["c_attn", "c_proj"], ["c_fc", "c_proj"]])
    return Case([lora(rng, target_modules=targets, fan_in_fan_out=True, **more)], family="gpt2", tied=True)


def fan_in_fan_out_dora(rng):
    return fan_in_fan_out(rng, use_dora=True)


def adapter_f16(rng):
    return Case([lora(rng)], adapter_dtype="f16")


def adapter_bf16(rng):
    return Case([lora(rng)], adapter_dtype="bf16")


def several_summed(rng):
    return Case([lora(rng), lora(rng)], weights=[round(rng.uniform(-1, 2), 2) for _ in range(2)])


def several_as_llamafactory(rng):
    return Case([lora(rng), lora(rng)], weights=[1.0, 1.0], accumulate="llamafactory")


def trainer_checkpoint(rng):
    def add_state(folder):
        for name in ("optimizer.pt", "rng_state.pth", "trainer_state.json"):
            (folder / name).write_text("{}")

    return Case([lora(rng)], edit=add_state)


def lora_bias(rng):
    config = lora(rng, target_modules=rng.sample(["q_proj", "k_proj", "v_proj"], 2), lora_bias=True)
    return Case([config], family="qwen2")


def trained_tokens(rng):
    tokens = rng.sample(range(40), rng.randint(1, 5))
    return Case([lora(rng, trainable_token_indices={"embed_tokens": tokens})])


def dora_embedding(rng):
    return Case([lora(rng, target_modules=["embed_tokens"], use_dora=True)], untie=True, edit=maybe_without_base(rng))


def patterns_apart(rng):
    ranks, alphas = {"q_proj": rng.randint(1, 9)}, {"layers.0.self_attn.q_proj": rng.randint(1, 40)}
    return Case([lora(rng, target_modules=["q_proj", "v_proj"], rank_pattern=ranks, alpha_pattern=alphas)])


FORMS = [
    plain,
    rslora,
    patterns,
    target_regex,
    target_all_linear,
    some_layers,
    dora,
    embedding,
    lm_head,
    embedding_and_lm_head,
    modules_to_save,
    bias_all,
    bias_lora_only,
    resized_vocabulary,
    resized_modules_to_save,
    fan_in_fan_out,
    fan_in_fan_out_dora,
    adapter_f16,
    adapter_bf16,
    several_summed,
    several_as_llamafactory,
    trainer_checkpoint,
]
NEWER_FORMS = [plain, dora, lora_bias, trained_tokens, dora_embedding, patterns_apart]


def make_base(rng, case, folder):
    """Saves a random model; sizes are drawn so that vectors of 8 or 16 values have something left over."""
    num_heads, num_kv_heads = rng.choice([(2, 1), (2, 2), (4, 2), (3, 1)])
    sizes = dict(
        vocab_size=rng.randint(40, 150),
        hidden_size=num_heads * rng.choice([4, 6, 10, 16]),
        intermediate_size=rng.randint(5, 90),
        num_hidden_layers=3,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        tie_word_embeddings=case.tied,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
    )
    if case.family == "gpt2":
        width = sizes["hidden_size"]
        config = GPT2Config(vocab_size=sizes["vocab_size"], n_positions=64, n_embd=width, n_layer=2, n_head=num_heads)
    else:
        config = {"qwen2": Qwen2Config, "llama": LlamaConfig}[case.family](**sizes)
    torch.manual_seed(rng.getrandbits(32))
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            # Norms and biases, which begin as ones and zeros.
            parameter.data += 0.2 * torch.randn(parameter.shape)
    model.to(DTYPES[case.dtype]).save_pretrained(folder)
    return sizes["vocab_size"]


def merged_by_peft(case, base, folder, adapters, resize):
    """Returns the merged model in the base's dtype."""
    untie = case.untie and case.tied
    if len(adapters) == 1 or case.accumulate == "llamafactory":
        model = load(base, resize=resize, untie=untie)
        for adapter in adapters:
            model = PeftModel.from_pretrained(model, folder / adapter).merge_and_unload()
    else:
        model = weighted_sum(base, folder, list(zip(adapters, case.weights)))
    model = model.to(DTYPES[case.dtype])
    if model.config.tie_word_embeddings:
        # PEFT leaves a copy of an equal head behind.
        model.tie_weights()
    return model


def compare(found, expected):
    """Returns what differs between the weight files of two directories, or None."""
    files = [{path.name: path.read_bytes() for path in folder.glob("*.safetensors*")} for folder in (found, expected)]
    if files[0] == files[1]:
        return None
    found, expected = (
        {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}
        for folder in (found, expected)
    )
    differing = [f"{name} is {'missing' if name in expected else 'too much'}" for name in set(found) ^ set(expected)]
    for name in sorted(set(found) & set(expected)):
        ours, theirs = found[name].double(), expected[name].double()
        if ours.shape != theirs.shape:
            differing.append(f"{name} is {list(ours.shape)}, PEFT's {list(theirs.shape)}")
        elif not torch.equal(ours, theirs):
            count, largest = int((ours != theirs).sum()), float((ours - theirs).abs().max())
            differing.append(f"{name}: {count} of {ours.numel()} differ, at most by {largest:.1e}")
    return "; ".join(differing) or f"the tensors agree, the files do not: {sorted(files[0])} {sorted(files[1])}"


def run(form, seed, infold, folder):
    """Makes, merges and compares one case; returns the fault, if any, and the difference of the logits, if f32."""
    # Not random.Random(tuple), whose hash of a string differs from run to run.
    rng = random.Random(f"{form.__name__} {seed}")
    case = form(rng)
    case.family = case.family or rng.choice(["qwen2", "llama"])
    case.dtype = case.dtype or rng.choice(["f32", "bf16", "f16"])
    case.tied = rng.random() < 0.5 if case.tied is None else case.tied
    base = str(folder / "base")
    vocabulary = make_base(rng, case, base)
    resize = vocabulary + case.more_tokens if case.more_tokens else None
    adapters = []
    for index, config in enumerate(case.configs):
        adapters.append(f"adapter-{index}")
        dtype = case.adapter_dtype or "f32"
        make_adapter(base, config, folder / adapters[-1], f"{seed} {index}", dtype=dtype, resize=resize)
        if case.edit is not None:
            case.edit(folder / adapters[-1])
    size = rng.choice(["5GB", "100KB", "20KB", f"{rng.randint(3, 60)}KB"])
    model = merged_by_peft(case, base, folder, adapters, resize)
    model.save_pretrained(folder / "expected", max_shard_size=size)
    paths = ",".join(str(folder / adapter) for adapter in adapters)
    command = [infold, "merge", "--model", base, "--adapter", paths, "--output", str(folder / "merged")]
    command += ["--max-shard-size", size, "--accumulate", case.accumulate]
    if case.weights:
        command += ["--adapter-weight", ",".join(map(str, case.weights))]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        return f"infold: {result.stderr.strip()}", None
    fault = compare(folder / "merged", folder / "expected")
    if fault or case.dtype != "f32" or len(adapters) > 1:
        return fault, None
    prompt = rng.sample(range(vocabulary), 7)
    difference, in_f64 = live_differences(
        folder / "merged", base, folder / adapters[0], prompt, resize=resize, untie=case.untie and case.tied
    )
    if in_f64 >= F64_TOLERANCE:
        fault = f"the comparison of the logits itself rounds: {in_f64:.1e} of the largest logit"
    elif difference >= TOLERANCE:
        fault = f"logits differ from the live adapter's by {difference:.1e} of the largest"
    return fault, difference


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("infold")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--form")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    forms = [form for form in (NEWER_FORMS if NEWER else FORMS) if args.form in (None, form.__name__)]
    faults, logits = [], []
    for form in forms:
        differences = []
        for number in range(args.rounds):
            seed = args.seed * 1000 + number
            with tempfile.TemporaryDirectory() as folder:
                fault, difference = run(form, seed, args.infold, pathlib.Path(folder))
            if fault:
                faults.append(f"{form.__name__}, round {number}: {fault}")
                print(f"FAILED {faults[-1]}", flush=True)
            if difference is not None:
                differences.append(difference)
        logits += differences
        shown = f", logits of {len(differences)} within {max(differences):.1e}" if differences else ""
        print(f"{form.__name__:26} {args.rounds} cases{shown}", flush=True)
    capability = re.search(r"CPU capability usage: (\S+)", torch.__config__.show())
    print(
        f"PEFT {peft.__version__}, seed {args.seed}, torch {torch.__version__} for {capability[1] if capability else '?'}: "
        f"{len(forms) * args.rounds - len(faults)} of {len(forms) * args.rounds} merges are byte-equal, logits of "
        f"{len(logits)} in f32 within {max(logits, default=0):.1e} of the largest"
    )
    sys.exit(bool(faults) or not forms)


if __name__ == "__main__":
    main()
