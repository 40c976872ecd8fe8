"""Makes tests/fixtures/adapters: small adapters in every form that `infold merge` reads, and PEFT's merged result.

The results are committed and the Rust tests read only them. To make them again (see scripts/oracle_stack.sh):

    scripts/oracle_stack.sh /tmp/oracle newer
    /tmp/oracle/python scripts/make_adapter_fixtures.py          # everything that PEFT 0.12.0 knows; starts anew
    /tmp/oracle/python-newer scripts/make_adapter_fixtures.py    # adds what only PEFT 0.18.1 knows

Every weight comes from a seed made of its name. tests/fixtures/adapters/README.md describes the files.
"""

import hashlib
import json
import math
import pathlib
import shutil
import sys
import tempfile
import warnings
import zlib

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

FIXTURES = pathlib.Path(__file__).resolve().parent.parent / "tests" / "fixtures"
ADAPTERS = FIXTURES / "adapters"
NEWER = not peft.__version__.startswith("0.12.")
PROMPT = [5, 17, 301, 44, 260, 9, 128]
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
# The bound on |merged logits - live logits| that this script asserts; the tests may ask the same.
LIVE_TOLERANCE = 2e-5


def main():
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    cases = []
    if NEWER:
        cases = [
            case for case in json.loads((ADAPTERS / "cases.json").read_text())["cases"] if case["peft"] == "0.12.0"
        ]
    else:
        for path in ADAPTERS.glob("*/"):
            shutil.rmtree(path)
        (ADAPTERS / "bases").mkdir(parents=True)
        make_gpt2_base()
    import adapter_cases  # Imports this module back, so not at the top.

    for make in adapter_cases.NEWER_CASES if NEWER else adapter_cases.CASES:
        cases.extend(make())
    write_json(
        ADAPTERS / "cases.json",
        dict(prompt_token_ids=PROMPT, cases=sorted(cases, key=lambda case: case["case"])),
        indent=None,
    )
    if not NEWER:
        make_shard_goldens(cases)
    total = sum(path.stat().st_size for path in ADAPTERS.rglob("*") if path.is_file())
    print(f"{len(cases)} cases, {total / 1e6:.2f} MB")


def merged(name, base, config, *, tied=None, dtype="f32", resize=None, edit=None, prepare=None, note=None):
    """Makes the case of one adapter on `base` and returns its description.

    `tied` is the tie_word_embeddings that the merged model must have (None: as the base), `resize` the new
    vocabulary size, `edit(folder)` changes the saved adapter, `prepare(model)` the model before it is saved.
    """
    folder = new_folder(name)
    make_adapter(base, config, folder / "adapter", name, dtype=dtype, resize=resize, prepare=prepare)
    if edit is not None:
        edit(folder / "adapter")
    return golden(name, base, [("adapter", 1.0)], tied=tied, resize=resize, note=note)


def refused(name, base, reason, *, config=None, adapter=None, note=None):
    """Makes a case that `infold merge` must refuse: a config alone, or a config with tensors.

    `config` is a PEFT config object, `adapter(folder)` makes the whole folder itself.
    """
    folder = new_folder(name) / "adapter"
    if adapter is not None:
        adapter(folder)
    else:
        folder.mkdir()
        config.base_model_name_or_path = base
        config.inference_mode = True
        config.save_pretrained(folder)
    return dict(
        case=name,
        peft=peft.__version__,
        base=base,
        expect="refused",
        reason=reason,
        note=note,
        adapters=[dict(dir=f"{name}/adapter", weight=1.0)],
        files=files_of(name),
    )


def golden(name, base, adapters, *, tied=None, resize=None, accumulate="fp32", note=None):
    """Merges with PEFT, writes the changed tensors, hashes and live logits, and returns the description.

    One adapter (weight 1) or `accumulate="llamafactory"` is PEFT's own merge_and_unload, one adapter after the
    other; several adapters under "fp32" are `round(f32(W) + sum(weight * delta))` with PEFT's deltas.
    """
    folder = ADAPTERS / name
    base_state = stored_state(base)
    untie = tied is False and load(base).config.tie_word_embeddings
    if len(adapters) == 1 or accumulate == "llamafactory":
        assert all(weight == 1.0 for _, weight in adapters)
        model = load(base, resize=resize, untie=untie)
        for directory, _ in adapters:
            model = PeftModel.from_pretrained(model, folder / directory).merge_and_unload()
    else:
        model = weighted_sum(base, folder, adapters)
    model = model.to(next(iter(base_state.values())).dtype)
    if model.config.tie_word_embeddings:
        # PEFT leaves a copy of an equal head behind; the tied model needs none.
        assert same_bits(model.lm_head.weight.data, model.get_input_embeddings().weight.data), name
        model.tie_weights()
    with tempfile.TemporaryDirectory() as output:
        model.save_pretrained(output, safe_serialization=True, max_shard_size="5GB")
        state = load_file(f"{output}/model.safetensors")
        logits = logits_of(AutoModelForCausalLM.from_pretrained(output, torch_dtype=torch.float32))
        file_sha256 = sha256(pathlib.Path(output) / "model.safetensors")
    changed = {
        key: value for key, value in state.items() if key not in base_state or not same_bits(value, base_state[key])
    }
    stored = {key: value for key, value in changed.items() if not is_copy(value, base_state, folder, adapters)}
    if stored:
        save_file(stored, folder / "merged.safetensors", metadata={"format": "pt"})
    difference = check_live(folder, base, adapters, resize, logits, base_state)
    assert changed, name
    return dict(
        case=name,
        peft=peft.__version__,
        base=base,
        expect="merged",
        note=note,
        accumulate=accumulate,
        adapters=[dict(dir=f"{name}/{directory}", weight=weight) for directory, weight in adapters],
        tie_word_embeddings=model.config.tie_word_embeddings,
        config_changes=config_changes(model, base, resize),
        tensors={
            key: dict(
                dtype=dtype_name(value),
                shape=list(value.shape),
                sha256=tensor_sha256(value),
                golden="merged.safetensors" if key in stored else None,
            )
            for key, value in sorted(changed.items())
        },
        added=sorted(set(state) - set(base_state)),
        removed=sorted(set(base_state) - set(state)),
        num_tensors=len(state),
        total_size=sum(value.numel() * value.element_size() for value in state.values()),
        model_safetensors_sha256=file_sha256,
        max_live_difference=difference,
        files=files_of(name),
    )


def check_live(folder, base, adapters, resize, logits, base_state):
    """Writes the logits of the live adapter model (f32 base only) and checks the reloaded merged model against them."""
    if len(adapters) > 1 or any(value.dtype != torch.float32 for value in base_state.values()):
        return None
    live = logits_of(PeftModel.from_pretrained(load(base, resize=resize), folder / adapters[0][0]))
    difference = float((live - logits).abs().max())
    assert difference < LIVE_TOLERANCE, (folder.name, difference)
    save_file({"logits": live}, folder / "live_logits.safetensors")
    return difference


def weighted_sum(base, folder, adapters):
    """Returns the base with `W = round(f32(W) + sum of weight * delta)`, the deltas f32 and taken from PEFT."""
    model = load(base)
    deltas = {}
    for directory, weight in adapters:
        peft_model = PeftModel.from_pretrained(load(base), folder / directory)
        for key, module in peft_model.base_model.model.named_modules():
            if hasattr(module, "get_delta_weight"):
                delta = weight * module.get_delta_weight("default").detach().float()
                deltas[key] = deltas[key] + delta if key in deltas else delta
    for key, delta in deltas.items():
        weight = model.get_submodule(key).weight
        weight.data = (weight.data.float() + delta).to(weight.dtype)
    return model


def make_adapter(base, config, folder, seed, *, dtype="f32", resize=None, prepare=None):
    """Saves a PEFT adapter of `base` whose trainable tensors are all random and none of them zero."""
    config = LoraConfig(task_type="CAUSAL_LM", **config) if isinstance(config, dict) else config
    model = get_peft_model(load(base, resize=resize), config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            randomise(name, parameter, seed)
    if prepare is not None:
        prepare(model)
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    if dtype != "f32":
        path = folder / "adapter_model.safetensors"
        save_file({key: value.to(DTYPES[dtype]) for key, value in load_file(path).items()}, path, {"format": "pt"})
    # The path of the base on this machine was needed until here (PEFT compares vocabulary sizes).
    edit_config(folder, base_model_name_or_path=base, target_modules=sorted_list, modules_to_save=sorted_list)
    return model


def randomise(name, parameter, seed):
    """Fills one trainable tensor; the change that it makes is about a fifth of the weight it belongs to."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    noise = torch.randn(parameter.shape, generator=generator)
    if "lora_A" in name or "lora_embedding_A" in name:
        parameter.data = noise / math.sqrt(3 * max(parameter.shape))
    elif "lora_B" in name or "lora_embedding_B" in name:
        parameter.data = 0.1 * noise
    elif "lora_magnitude_vector" in name:
        parameter.data = parameter.data * (1 + 0.2 * noise)
    else:
        # modules_to_save, biases, token rows: near the value that they start from.
        parameter.data = parameter.data + (0.1 * noise).to(parameter.dtype)


def load(base, resize=None, untie=False, dtype="auto"):
    """Loads a base in its own dtype; new vocabulary rows are random but the same each time."""
    model = AutoModelForCausalLM.from_pretrained(base_path(base), torch_dtype=dtype, attn_implementation="eager")
    if resize is not None:
        old = model.config.vocab_size
        model.resize_token_embeddings(resize)
        for matrix in (model.get_input_embeddings(), model.get_output_embeddings()):
            generator = torch.Generator().manual_seed(resize)
            matrix.weight.data[old:] = 0.3 * torch.randn(matrix.weight.data[old:].shape, generator=generator)
    if untie:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        model.config.tie_word_embeddings = False
    return model.eval()


def make_gpt2_base():
    """Writes bases/tiny-gpt2: its Conv1D layers keep their weights as [in, out], which fan_in_fan_out is for."""
    torch.manual_seed(21)
    config = GPT2Config(
        vocab_size=512,
        n_positions=64,
        n_embd=16,
        n_layer=1,
        n_head=2,
        bos_token_id=509,
        eos_token_id=511,
        initializer_range=0.3,
    )
    GPT2LMHeadModel(config).eval().save_pretrained(ADAPTERS / "bases" / "tiny-gpt2")


def make_shard_goldens(cases):
    """Writes shards.json: what save_pretrained writes for several max_shard_size, by name, size and sha256."""
    entries = []
    sources = [
        ("base", name)
        for name in ("tiny-qwen2", "tiny-qwen2-untied", "tiny-qwen2-bf16", "tiny-qwen2-f16", "tiny-llama")
    ]
    sources += [("case", "all_linear_bf16"), ("case", "lm_head_lora_tied"), ("case", "modules_to_save_both_untied")]
    by_name = {case["case"]: case for case in cases}
    for kind, name in sources:
        case = by_name.get(name)
        base = case["base"] if kind == "case" else name
        model = load(base, untie=kind == "case" and case["added"] == ["lm_head.weight"])
        if kind == "case":
            model = PeftModel.from_pretrained(model, ADAPTERS / name / "adapter").merge_and_unload()
            model = model.to(next(iter(stored_state(base).values())).dtype)
        for size in ("5GB", "1MB", "0.2MB", "150KB", "64KB", "20KB", 131072, 100000):
            with tempfile.TemporaryDirectory() as output:
                model.save_pretrained(output, safe_serialization=True, max_shard_size=size)
                paths = sorted(path for path in pathlib.Path(output).iterdir() if ".safetensors" in path.name)
                entries.append(
                    dict(
                        source={kind: name},
                        max_shard_size=size,
                        files={path.name: dict(size=path.stat().st_size, sha256=sha256(path)) for path in paths},
                    )
                )
    write_json(ADAPTERS / "shards.json", dict(transformers=transformers.__version__, entries=entries), indent=1)


def stored_state(base):
    """Returns the tensors in a base's files."""
    return {
        key: value for path in sorted(base_path(base).glob("*.safetensors")) for key, value in load_file(path).items()
    }


def base_path(base):
    """Returns the folder of a base, which the adapters/bases folder or the fixtures folder has."""
    own = ADAPTERS / "bases" / base
    return own if own.exists() else FIXTURES / base


def config_changes(model, base, resize):
    """Returns the config.json keys whose value the merge must change."""
    old = json.loads((base_path(base) / "config.json").read_text())
    keys = ["tie_word_embeddings", "vocab_size"]
    return {key: getattr(model.config, key) for key in keys if key in old and old[key] != getattr(model.config, key)}


def is_copy(value, base_state, folder, adapters):
    """Whether a tensor equals one of the base's or the adapter's, so that its hash is enough of a golden."""
    known = list(base_state.values())
    for directory, _ in adapters:
        known += load_file(folder / directory / "adapter_model.safetensors").values()
    return any(other.shape == value.shape and same_bits(other.to(value.dtype), value) for other in known)


@torch.no_grad()
def logits_of(model):
    """Returns the f32 logits of the last two positions of PROMPT."""
    return model.float().eval()(torch.tensor([PROMPT])).logits[0, -2:].clone()


def edit_config(folder, **changes):
    """Changes keys of adapter_config.json; a callable gets the old value, None as a value is written as null."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        config[key] = value(config.get(key)) if callable(value) else value
    path.write_text(json.dumps(config, indent=2, sort_keys=True))


def edit_tensors(folder, change):
    """Rewrites adapter_model.safetensors with what `change(state)` returns."""
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def sorted_list(value):
    """PEFT writes a Python set in the order of its hashes, which differs from run to run."""
    return sorted(value) if isinstance(value, list) else value


def new_folder(name):
    """Makes an empty case folder."""
    folder = ADAPTERS / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def files_of(name):
    return sorted(str(path.relative_to(ADAPTERS)) for path in (ADAPTERS / name).rglob("*") if path.is_file())


def same_bits(left, right):
    return left.shape == right.shape and left.dtype == right.dtype and tensor_bytes(left) == tensor_bytes(right)


def tensor_bytes(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def tensor_sha256(tensor):
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


def dtype_name(tensor):
    return {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[tensor.dtype]


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_json(path, data, indent=1):
    separators = (",", ":") if indent is None else None
    path.write_text(json.dumps(data, indent=indent, ensure_ascii=False, separators=separators) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
    sys.modules["make_adapter_fixtures"] = sys.modules["__main__"]
    main()
