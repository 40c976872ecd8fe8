#!/usr/bin/env python3
"""Checks infold's GGUF files with the programs that read them; called by check_gguf_consumers.sh.

    scripts/check_gguf_consumers.py WORK_DIR [QWEN_TOKENIZER_DIR]

Random models of the three families, large enough for K-quants, are exported in every type. The `gguf` package must
read every tensor back close to the original, llama.cpp (xllamacpp) must give the logprobs and token ids that
`infold serve` gives on the safetensors, and a base with a GGUF adapter must equal the merged model. With the tokenizer
of Qwen2.5 its arrays must have the hashes of ollama's converter. INFOLD_BIN names the program.
"""

import hashlib
import json
import pathlib
import shutil
import subprocess
import sys

import gguf
import numpy as np
import safetensors.numpy

import infold_server

LLAMA_CPP = """
import sys, time
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.hostnames, params.port = ["127.0.0.1"], int(sys.argv[2])
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
params.n_parallel, params.n_ctx = 1, 512
# Both round to f16 otherwise.
params.cache_type_k = params.cache_type_v = 0
params.flash_attn_type = 0
if len(sys.argv) > 3:
    adapter = xllamacpp.CommonAdapterLoraInfo()
    adapter.path, adapter.scale = sys.argv[3], 1.0
    params.lora_adapters = [adapter]
server = xllamacpp.Server(params)
while True:
    time.sleep(3600)
"""

SHAPE = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 512, "max_position_embeddings": 512, "hidden_act": "silu",
    "bos_token_id": 509, "eos_token_id": 511, "torch_dtype": "float32",
}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS = {
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "rope_theta": 1e6, "rms_norm_eps": 1e-6,
              "tie_word_embeddings": True},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "rope_theta": 1e6, "rms_norm_eps": 1e-6, "head_dim": 64,
              "tie_word_embeddings": False},
    "llama": {"architectures": ["LlamaForCausalLM"], "rope_theta": 1e4, "rms_norm_eps": 1e-5,
              "rope_scaling": LLAMA3, "tie_word_embeddings": False},
}
# By file type: the largest error of a tensor, relative to its size; the mean error of a logprob. What llama.cpp's
# activations in eight bits lose is in the second.
LIMITS = {
    "f32": (0.0, 1e-4), "f16": (5e-4, 5e-3), "bf16": (4e-3, 3e-2), "q8_0": (8e-3, 4e-2), "q6_k": (0.03, 0.1),
    "q4_k_m": (0.1, 0.35), "q4_k_s": (0.1, 0.35),
}
LETTER = 64
PROMPTS = [[(7 * i * i + 11 * i + seed) % 500 for i in range(24)] for seed in range(4)]
TEXTS = ["The quick brown fox", "don't 12345 \n\n  x", "naïve café 北京 🙂", "<|im_start|>user\nhi<|im_end|>"]
GOLDEN = {
    "tokens": "1d93f6679b23a1152b725f7f473792d54d53c1040c5250d3e46b42f81e0a1a34",
    "token_type": "b178dbc9d1b2e08f84d02918e00fc2de2619a250e6c188c91a6605f701860055",
    "merges": "6b1b1c58f1223d74f9095929d3e6416cdd74784440221a5507b87b8197f2bfd2",
}


def tensors_of(model_type, config, rng):
    """Returns random f32 tensors by Hugging Face name."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim", hidden // config["num_attention_heads"])
    query, key_value = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    shapes = {
        "self_attn.q_proj": (query, hidden), "self_attn.k_proj": (key_value, hidden),
        "self_attn.v_proj": (key_value, hidden), "self_attn.o_proj": (hidden, query),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
    }
    matrix = lambda rows, columns: rng.standard_normal((rows, columns), np.float32) / np.float32(columns) ** 0.5
    norm = lambda size: (1 + 0.1 * rng.standard_normal(size)).astype(np.float32)
    tensors = {"model.embed_tokens.weight": matrix(config["vocab_size"], hidden), "model.norm.weight": norm(hidden)}
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = matrix(config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, shape in shapes.items():
            tensors[f"{prefix}{name}.weight"] = matrix(*shape)
            if model_type == "qwen2" and name[-6] in "qkv":
                tensors[f"{prefix}{name}.bias"] = 0.1 * rng.standard_normal(shape[0], np.float32)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = norm(hidden)
        if model_type == "qwen3":
            for name in ("q_norm", "k_norm"):
                tensors[f"{prefix}self_attn.{name}.weight"] = norm(head_dim)
    return tensors


def write_model(path, config, tensors, tokenizer):
    """Writes a model directory with the tokenizer files of another."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, path / name)


def write_adapter(path, tensors, rng):
    """Writes a PEFT adapter of all linears; returns the tensors with the adapter merged in f64."""
    rank, alpha = 8, 16
    adapter, merged = {}, dict(tensors)
    for name, weight in tensors.items():
        if "_proj.weight" not in name:
            continue
        rows, columns = weight.shape
        a = rng.standard_normal((rank, columns), np.float32) / np.float32(columns) ** 0.5
        b = 0.1 * rng.standard_normal((rows, rank), np.float32)
        stem = "base_model.model." + name.removesuffix(".weight")
        adapter |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b.astype(np.float32)}
        delta = alpha / rank * (b.astype(np.float64) @ a.astype(np.float64))
        merged[name] = (weight + delta).astype(np.float32)
    path.mkdir(parents=True)
    safetensors.numpy.save_file(adapter, path / "adapter_model.safetensors", metadata={"format": "pt"})
    names = sorted({name.split(".")[-2] for name in merged if "_proj.weight" in name})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha, "target_modules": names}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return merged


def export(output, *args):
    """Runs `infold merge`; returns the one GGUF file that it wrote."""
    command = [infold_server.infold_binary(), "merge", *args, "--output", output]
    subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
    (file,) = output.glob("*.gguf")
    return file


def llama_cpp(model, *adapter):
    """Starts llama.cpp on a file, with or without an adapter."""
    return infold_server.Server(lambda port: [sys.executable, "-c", LLAMA_CPP, model, port, *adapter])


def llama_cpp_logprobs(server, prompt):
    """Returns the logprobs of the token after `prompt`, by id.

    llama.cpp keeps them to itself where the token that it takes is an end or half a letter, so it is made to take one
    that is a letter; the logprobs are those without the bias.
    """
    body = {"prompt": prompt, "n_predict": 1, "temperature": 0, "n_probs": 512, "cache_prompt": False,
            "samplers": ["top_k"], "top_k": 1, "logit_bias": [[LETTER, 1000.0]]}
    status, answer = server.post("/completion", body)
    assert status == 200, answer
    return {entry["id"]: entry["logprob"] for entry in answer["completion_probabilities"][0]["top_logprobs"]}


def llama_cpp_ids(server, text):
    """Returns llama.cpp's token ids of a text."""
    body = {"content": text, "add_special": False, "parse_special": True}
    return server.post("/tokenize", body)[1]["tokens"]


def infold_logprobs(server, prompt):
    """Returns the 20 best logprobs of the token after `prompt`, by id."""
    body = {"model": "m", "prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": 20, "ignore_eos": True,
            "return_tokens_as_token_ids": True}
    status, answer = server.post("/v1/completions", body)
    assert status == 200, answer
    best = answer["choices"][0]["logprobs"]["top_logprobs"][0]
    return {int(token.removeprefix("token_id:")): logprob for token, logprob in best.items()}


def check_tensors(file, originals, heads, limit):
    """Compares what the `gguf` package reads with the tensors that were exported; returns the largest error."""
    reader = gguf.GGUFReader(file)
    names = gguf.get_tensor_name_map(reader_architecture(reader), 100)
    found = {tensor.name: tensor for tensor in reader.tensors}
    worst = 0.0
    for hf_name, original in originals.items():
        tensor = found.pop(names.get_name(hf_name, try_suffixes=(".weight", ".bias")))
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float64).reshape(original.shape)
        if heads and (".q_proj." in hf_name or ".k_proj." in hf_name):
            count = heads[".k_proj." in hf_name]
            split = values.reshape(count, original.shape[0] // count // 2, 2, *original.shape[1:])
            values = split.swapaxes(1, 2).reshape(original.shape)
        error = np.sqrt(np.mean((values - original) ** 2) / np.mean(original.astype(np.float64) ** 2))
        assert error <= limit, f"{file.name}: {hf_name} is off by {error:.5f} as {tensor.tensor_type.name}"
        worst = max(worst, error)
    assert set(found) <= {"rope_freqs.weight"}, f"{file.name}: {sorted(found)} were not exported"
    return worst


def reader_architecture(reader):
    """Returns gguf's number of the architecture that a file names."""
    name = reader.fields["general.architecture"].contents()
    return next(number for number, known in gguf.MODEL_ARCH_NAMES.items() if known == name)


def check_family(model_type, work, rng):
    """Exports one family in every type and compares all readers."""
    config = {"model_type": model_type, **SHAPE, **MODELS[model_type]}
    tensors = tensors_of(model_type, config, rng)
    tokenizer = infold_server.FIXTURES / "tiny-qwen2"
    base = work / model_type / "base"
    write_model(base, config, tensors, tokenizer)
    with infold_server.infold_serve(base, "--served-model-name", "m", "--disable-access-log") as server:
        expected = [infold_logprobs(server, prompt) for prompt in PROMPTS]
        bodies = [{"prompt": text, "add_special_tokens": False} for text in TEXTS]
        ids = [server.post("/tokenize", body)[1]["tokens"] for body in bodies]
    heads = (config["num_attention_heads"], config["num_key_value_heads"]) if model_type == "llama" else None
    files = {}
    for kind, (tensor_limit, logprob_limit) in LIMITS.items():
        files[kind] = export(work / model_type / kind, "--model", base, "--gguf", kind)
        worst = check_tensors(files[kind], tensors, heads, tensor_limit)
        with llama_cpp(files[kind]) as server:
            found = [llama_cpp_logprobs(server, prompt) for prompt in PROMPTS]
            theirs = [llama_cpp_ids(server, text) for text in TEXTS]
        assert theirs == ids, f"{model_type}: llama.cpp's ids {theirs}, infold's {ids}"
        pairs = [(theirs[token], logprob) for ours, theirs in zip(expected, found) for token, logprob in ours.items()]
        off = np.mean([abs(a - b) for a, b in pairs])
        assert off <= logprob_limit, f"{model_type} {kind}: logprobs are off by {off:.5f}"
        print(f"{model_type} {kind}: tensors within {worst:.2e}, logprobs within {off:.2e} on average", flush=True)
    check_adapter(model_type, work / model_type, base, files["f32"], (config, tensors, tokenizer), rng)


def check_adapter(model_type, work, base, base_file, model, rng):
    """Compares base and GGUF adapter with the merged model, both in llama.cpp."""
    config, tensors, tokenizer = model
    merged = write_adapter(work / "adapter", tensors, rng)
    write_model(work / "merged", config, merged, tokenizer)
    merged_file = export(work / "merged-gguf", "--model", work / "merged", "--gguf", "f32")
    adapter_file = export(work / "lora-gguf", "--model", base, "--adapter", work / "adapter", "--gguf-lora")
    logprobs = []
    for server in (llama_cpp(merged_file), llama_cpp(base_file, adapter_file), llama_cpp(base_file)):
        with server:
            logprobs.append([llama_cpp_logprobs(server, prompt) for prompt in PROMPTS])
    off = lambda a, b: max(abs(a[i][token] - b[i][token]) for i in range(len(PROMPTS)) for token in a[i])
    with_adapter, without = off(logprobs[0], logprobs[1]), off(logprobs[0], logprobs[2])
    assert without > 0.05, f"{model_type}: the adapter changes nothing ({without:.5f})"
    assert with_adapter < 1e-4, f"{model_type}: base + adapter is off the merged model by {with_adapter:.6f}"
    print(f"{model_type} adapter: within {with_adapter:.2e} of the merged model ({without:.2f} without)", flush=True)


def check_qwen_tokenizer(tokenizer, work, rng):
    """Compares the arrays of Qwen2.5's tokenizer with those of ollama's converter."""
    config = {"model_type": "qwen2", **SHAPE, **MODELS["qwen2"], "vocab_size": 151936, "hidden_size": 32,
              "intermediate_size": 32, "num_hidden_layers": 1, "bos_token_id": 151643, "eos_token_id": 151645}
    write_model(work / "qwen", config, tensors_of("qwen2", config, rng), tokenizer)
    fields = gguf.GGUFReader(export(work / "qwen-gguf", "--model", work / "qwen", "--gguf", "f16")).fields
    tokens, types, merges = (
        fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type", "merges")
    )
    # ollama numbers the filler from 0, and takes it and what the tokenizer does not call special for user defined.
    special = {token["id"] for token in json.loads((tokenizer / "tokenizer.json").read_text())["added_tokens"]
               if token["special"]}
    filler = [i for i, kind in enumerate(types) if kind == gguf.TokenType.UNUSED]
    for number, i in enumerate(filler):
        tokens[i] = f"[PAD{number}]"
    added = range(151643, len(tokens))
    types = [4 if i in added and i not in special else kind for i, kind in enumerate(types)]
    for name, values in (("tokens", tokens), ("token_type", types), ("merges", merges)):
        # As Go's json.Marshal writes it.
        text = json.dumps(values, ensure_ascii=False, separators=(",", ":"))
        for letter in "&<>\u2028\u2029":
            text = text.replace(letter, f"\\u{ord(letter):04x}")
        found = hashlib.sha256(text.encode()).hexdigest()
        assert found == GOLDEN[name], f"{name}: {found}"
    assert fields["tokenizer.ggml.pre"].contents() == "qwen2"
    print("the arrays of Qwen2.5's tokenizer have ollama's hashes")


def main():
    work = pathlib.Path(sys.argv[1])
    shutil.rmtree(work, ignore_errors=True)
    rng = np.random.default_rng(7)
    for model_type in MODELS:
        check_family(model_type, work, rng)
    if len(sys.argv) > 2:
        check_qwen_tokenizer(pathlib.Path(sys.argv[2]), work, rng)
    print("all GGUF consumers agree")


if __name__ == "__main__":
    main()
