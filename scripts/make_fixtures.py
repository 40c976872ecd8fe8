"""Makes tests/fixtures: tiny random checkpoints and the golden numbers that transformers computes from them.

The results are committed and the Rust tests read only them, so Python is needed only to change them:

    python3 -m venv /tmp/fixtures && /tmp/fixtures/bin/pip install torch==2.6.0 transformers==4.57.1 \
        tokenizers==0.22.1 safetensors==0.6.2 gguf==0.19.0 numpy
    /tmp/fixtures/bin/python scripts/make_fixtures.py

Every weight comes from a named seed, so a second run with these versions writes the same checkpoints.
All goldens are f32 on the CPU with eager attention; bf16 and f16 checkpoints and GGUF files hold rounded
weights, and their goldens are computed in f32 from the rounded values. The files:

    <model>/            Hugging Face directory (config, safetensors, tokenizer, generation config)
    rope_variants/      config.json files that read tiny-llama's weights with another rope_scaling
    gguf/               GGUF files (see make_gguf_fixtures.py)
    golden/<name>.json  prompts, logits of the last prompt position, logprobs, 40 greedy tokens
"""

import json
import math
import pathlib
import shutil

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

FIXTURES = pathlib.Path(__file__).resolve().parent.parent / "tests" / "fixtures"
VOCAB_SIZE = 512
PROMPT_LENGTHS = (1, 5, 16, 17, 40, 100, 200)
NUM_GREEDY_TOKENS = 40
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# The words that Qwen2.5 splits on; a tokenizer that ignores them gives other ids.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' %}{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}"
    "{%- endif %}{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\\n' + message['content']"
    " + '<|im_end|>\\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
CORPUS = """
The river runs past the old stone mill and the garden behind it. In winter the lamp in the window is the only
light in the valley, and the miller counts seven letters on the table before he sleeps. You are a helpful
assistant. What is the capital of France? The capital of France is Paris. Write a short story about a horse,
a silver door and a market where music is sold by the hour. system user assistant. I am going to the market.
It is not the wind that moves the paper, said the girl; it is the one who reads it. Hello, world! How are you?
def add(a, b):
    return a + b
for number in range(10):
    print(number)
你好，世界。你是谁？我是一个助手。今天的天气很好，我们一起去市场。小姐，别的秀女都在求中选。
Ich gehe durch die Straße. Où est la bibliothèque? ¿Dónde está el río? 1 2 3 4 5 6 7 8 9 10 100 1000.
"""


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for name in ("golden", "rope_variants", "gguf", *MODELS):
        shutil.rmtree(FIXTURES / name, ignore_errors=True)
        (FIXTURES / name).mkdir(parents=True)
    tokenizer = train_tokenizer()
    states = {}
    for name, spec in MODELS.items():
        states[name] = make_model(name, spec, tokenizer)
    for dtype, name in ((torch.bfloat16, "tiny-qwen2-bf16"), (torch.float16, "tiny-qwen2-f16")):
        make_rounded(name, dtype, MODELS["tiny-qwen2"], states["tiny-qwen2"])
    make_rope_variants(states["tiny-llama"])
    import make_gguf_fixtures  # Imports this module back, so not at the top.

    make_gguf_fixtures.make_all(tokenizer)
    total = sum(path.stat().st_size for path in FIXTURES.rglob("*") if path.is_file())
    print(f"fixtures: {total / 1e6:.2f} MB")


def train_tokenizer():
    """Returns a byte-level BPE tokenizer with ChatML specials and exactly VOCAB_SIZE ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        min_frequency=1,
    )
    tokenizer.train_from_iterator([CORPUS], trainer)
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in SPECIALS])
    assert tokenizer.get_vocab_size() == VOCAB_SIZE, tokenizer.get_vocab_size()
    return tokenizer


def base_config(**changes):
    """Returns the config fields that all tiny models share, with `changes` on top."""
    config = dict(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=1024,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        hidden_act="silu",
        tie_word_embeddings=True,
        bos_token_id=VOCAB_SIZE - 3,
        eos_token_id=VOCAB_SIZE - 1,
        attention_dropout=0.0,
        initializer_range=0.02,
        use_cache=True,
    )
    config.update(changes)
    return config


LLAMA3_SCALING = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=128,
)
MODELS = {
    # Attention bias, tied embeddings, one safetensors file.
    "tiny-qwen2": dict(
        architecture="Qwen2",
        seed=11,
        shards=1,
        template="tokenizer_config",
        config=base_config(rms_norm_eps=1e-6, rope_theta=1000000.0, use_sliding_window=False, sliding_window=None),
        generation_config=dict(
            do_sample=True, temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05, eos_token_id=[511, 509]
        ),
    ),
    # Untied head, three shards behind an index, two KV heads (tensor parallel size 4 has to replicate them).
    "tiny-qwen2-untied": dict(
        architecture="Qwen2",
        seed=12,
        shards=3,
        template="tokenizer_config",
        config=base_config(
            num_hidden_layers=2, num_key_value_heads=2, tie_word_embeddings=False, use_sliding_window=False,
        ),
        generation_config=dict(eos_token_id=[511, 509]),
    ),
    # Norms on queries and keys, heads wider than hidden / num_heads, template in its own file.
    "tiny-qwen3": dict(
        architecture="Qwen3",
        seed=13,
        shards=1,
        template="chat_template.jinja",
        config=base_config(
            intermediate_size=64, head_dim=16, attention_bias=False, rope_theta=1000000.0, use_sliding_window=False,
        ),
        generation_config=dict(do_sample=True, temperature=0.6, top_p=0.95, top_k=20, eos_token_id=[511, 509]),
    ),
    # Llama 3 rope scaling, untied head.
    "tiny-llama": dict(
        architecture="Llama",
        seed=14,
        shards=2,
        template="tokenizer_config",
        config=base_config(
            intermediate_size=64, tie_word_embeddings=False, rms_norm_eps=1e-5, rope_theta=10000.0,
            rope_scaling=LLAMA3_SCALING, attention_bias=False, mlp_bias=False,
        ),
        generation_config=dict(eos_token_id=511),
    ),
}
ROPE_VARIANTS = {
    "default": dict(rope_scaling=None),
    "linear": dict(rope_scaling=dict(rope_type="linear", factor=4.0)),
    "yarn": dict(
        rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=128),
        max_position_embeddings=512,
    ),
}
# A golden whose best and second token are this close could flip under another order of summation.
MIN_GREEDY_GAP = 2e-3


def build(architecture, config):
    """Returns an f32 model of this config with eager attention and weights still to be filled."""
    config_class = getattr(transformers, f"{architecture}Config")
    model_class = getattr(transformers, f"{architecture}ForCausalLM")
    model = model_class._from_config(config_class(**config), attn_implementation="eager", dtype=torch.float32)
    return model.eval()


def random_state(model, seed):
    """Returns weights under which attention, MLP and head all matter and greedy text does not loop at once.

    Linear weights have the standard deviation 2 / sqrt(inputs), so that a layer's contribution outweighs the
    embedding of the last token (which under a tied head would only repeat itself).
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(shape, std, mean=0.0):
        return torch.randn(shape, generator=generator) * std + mean

    state = {}
    for name, parameter in sorted(model.state_dict().items()):
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if "norm" in name:
            state[name] = normal(parameter.shape, 0.1, 1.0)
        elif name.endswith("bias"):
            state[name] = normal(parameter.shape, 0.5)
        elif "embed_tokens" in name or "lm_head" in name:
            state[name] = normal(parameter.shape, 0.3)
        else:
            state[name] = normal(parameter.shape, 2.0 / math.sqrt(parameter.shape[1]))
    return state


def load_state(model, state):
    """Puts `state` into `model`; a tied head follows its embedding."""
    missing, unexpected = model.load_state_dict({k: v.float() for k, v in state.items()}, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    return model


def make_model(name, spec, tokenizer):
    """Writes one checkpoint directory and its golden; returns the weights."""
    model = build(spec["architecture"], spec["config"])
    state = random_state(model, spec["seed"])
    folder = FIXTURES / name
    write_config(folder, spec["architecture"], spec["config"], "float32")
    write_weights(folder, state, spec["shards"])
    write_json(folder / "generation_config.json", dict(
        bos_token_id=VOCAB_SIZE - 3, pad_token_id=VOCAB_SIZE - 3, **spec["generation_config"],
        transformers_version=transformers.__version__,
    ))
    write_tokenizer(folder, tokenizer, spec["template"])
    write_golden(name, name, load_state(model, state))
    return state


def make_rounded(name, dtype, spec, state):
    """Writes `state` rounded to `dtype`, with the golden of the rounded weights computed in f32."""
    folder = FIXTURES / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    rounded = {key: value.to(dtype) for key, value in state.items()}
    write_config(folder, spec["architecture"], spec["config"], str(dtype).removeprefix("torch."))
    write_weights(folder, rounded, 1)
    write_golden(name, name, load_state(build(spec["architecture"], spec["config"]), rounded))


def make_rope_variants(state):
    """Writes configs that differ from tiny-llama in rope_scaling only, and their goldens."""
    for variant, changes in ROPE_VARIANTS.items():
        config = dict(MODELS["tiny-llama"]["config"], **changes)
        write_config(FIXTURES / "rope_variants", "Llama", config, "float32", f"{variant}.json")
        write_golden(f"rope-{variant}", "tiny-llama", load_state(build("Llama", config), state), f"{variant}.json")


def write_config(folder, architecture, config, dtype, file_name="config.json"):
    """Writes config.json with HF's names, as transformers 4.x spells them."""
    fields = dict(architectures=[f"{architecture}ForCausalLM"], model_type=architecture.lower(), torch_dtype=dtype)
    write_json(folder / file_name, dict(sorted({**fields, **config}.items())))


def write_weights(folder, state, num_shards):
    """Writes one file, or `num_shards` files with an index; layers go to shards in turn."""
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    if num_shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(state)
    weight_map = {}
    for shard in range(num_shards):
        file_name = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        part = {name: state[name] for name in names[shard::num_shards]}
        weight_map.update(dict.fromkeys(part, file_name))
        save_file(part, folder / file_name, metadata={"format": "pt"})
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    index = dict(metadata=dict(total_size=size), weight_map=dict(sorted(weight_map.items())))
    write_json(folder / "model.safetensors.index.json", index)


def write_tokenizer(folder, tokenizer, template):
    """Writes tokenizer.json and tokenizer_config.json, the template inside or beside it."""
    data = json.loads(tokenizer.to_str())
    (folder / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    added = {
        str(tokenizer.token_to_id(text)): dict(
            content=text, lstrip=False, normalized=False, rstrip=False, single_word=False, special=True
        )
        for text in SPECIALS
    }
    config = dict(
        add_bos_token=False,
        added_tokens_decoder=added,
        bos_token=None,
        clean_up_tokenization_spaces=False,
        eos_token="<|im_end|>",
        model_max_length=1024,
        pad_token="<|endoftext|>",
        tokenizer_class="Qwen2Tokenizer",
        unk_token=None,
    )
    if template == "tokenizer_config":
        config["chat_template"] = CHATML_TEMPLATE
    else:
        (folder / template).write_text(CHATML_TEMPLATE, encoding="utf-8")
    write_json(folder / "tokenizer_config.json", config)


def write_golden(name, model_dir, model, config_file="config.json", prompt_lengths=PROMPT_LENGTHS):
    """Writes golden/<name>.json: what `model` computes for prompts of several lengths."""
    prompts = []
    for length in prompt_lengths:
        generator = torch.Generator().manual_seed(1000 + length)
        golden = None
        while golden is None or golden["min_greedy_gap"] < MIN_GREEDY_GAP:
            token_ids = torch.randint(0, VOCAB_SIZE - len(SPECIALS), (length,), generator=generator)
            golden = golden_of(model, token_ids)
        prompts.append(golden)
    versions = dict(torch=torch.__version__.split("+")[0], transformers=transformers.__version__)
    write_json(FIXTURES / "golden" / f"{name}.json", dict(
        model=model_dir, config_file=config_file, versions=versions, prompts=prompts,
    ), indent=None)
    gaps = [prompt["min_greedy_gap"] for prompt in prompts]
    distinct = [len(set(prompt["greedy_token_ids"])) for prompt in prompts]
    print(f"{name}: smallest greedy gap {min(gaps):.4f}, distinct greedy tokens {distinct}, "
          f"top-1 logprob {[prompt['greedy_logprobs'][0] for prompt in prompts]}")


@torch.no_grad()
def golden_of(model, prompt_token_ids):
    """Returns the golden of one prompt. Greedy tokens do not stop at end-of-sequence ids."""
    ids = prompt_token_ids.tolist()
    logits = model(torch.tensor([ids])).logits[0]
    logprobs = torch.log_softmax(logits.double(), dim=-1)
    top = torch.topk(logprobs, 5, dim=-1)
    golden = dict(
        prompt_token_ids=list(ids),
        # Entry i is the logprob of token i given the tokens before it; the first token has none.
        prompt_logprobs=[None] + [digits(logprobs[i, ids[i + 1]]) for i in range(len(ids) - 1)],
        # The five most likely tokens for position i + 1, after the first i + 1 tokens; the last few positions.
        prompt_top_positions=list(range(max(0, len(ids) - 4), len(ids))),
        prompt_top=[[[int(t), digits(v)] for t, v in zip(top.indices[i], top.values[i])]
                    for i in range(max(0, len(ids) - 4), len(ids))],
        last_logits=[digits(value) for value in logits[-1]],
        greedy_token_ids=[],
        greedy_logprobs=[],
    )
    gaps = []
    for _ in range(NUM_GREEDY_TOKENS):
        row = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1].double(), dim=-1)
        best = torch.topk(row, 2)
        gaps.append(float(best.values[0] - best.values[1]))
        ids.append(int(best.indices[0]))
        golden["greedy_token_ids"].append(ids[-1])
        golden["greedy_logprobs"].append(digits(best.values[0]))
    golden["min_greedy_gap"] = digits(min(gaps))
    return golden


def digits(value):
    """Rounds to six decimals: a tenth of a thousandth of the tolerance."""
    return round(float(value), 6)


def write_json(path, data, indent=2):
    separators = (",", ":") if indent is None else None
    path.write_text(json.dumps(data, indent=indent, ensure_ascii=False, separators=separators) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
