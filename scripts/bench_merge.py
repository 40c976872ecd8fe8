#!/usr/bin/env python3
"""Times `infold merge` beside `cp -r` of the base and beside PEFT, on a random model of Qwen2.5-1.5B's shape.

    scripts/bench_merge.py --infold target/release/infold --work DIR [--gguf] [--peft] [--rounds 3] [--rank 8]

Needs torch and safetensors; `--peft` also transformers and peft (all on the CPU). `--gguf` also merges straight into
a q4_k_m file. DIR gets about 10 GB, which are removed again. Every time is that of a whole process until its output is
on the disk (`sync`), the medians are over alternating rounds, memory is the highest resident set that the kernel saw.
Prints a Markdown table.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

HIDDEN, INTERMEDIATE, LAYERS, KV, VOCAB = 1536, 8960, 28, 256, 151936
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "max_position_embeddings": 32768,
    "model_type": "qwen2",
    "num_attention_heads": 12,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": VOCAB,
}
TOKENIZER = Path(__file__).resolve().parent.parent / "tests/fixtures/tiny-qwen2"
PEFT = """
import sys, torch
from transformers import AutoModelForCausalLM
from peft import PeftModel
base, adapter, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, torch_dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(output, max_shard_size="5GB")
"""


def random(*shape, scale=0.02):
    import torch

    return torch.randn(*shape) * scale


def make_base(path):
    import torch
    from safetensors.torch import save_file

    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    # GGUF files hold the vocabulary; the tokens that the small one lacks are filled up.
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, path)
    tensors = {"model.embed_tokens.weight": random(VOCAB, HIDDEN), "model.norm.weight": torch.ones(HIDDEN)}
    for layer in range(LAYERS):
        for name, shape in LINEARS.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = random(*shape)
            if name[-6] in "qkv":
                tensors[f"model.layers.{layer}.{name}.bias"] = random(shape[0])
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = torch.ones(HIDDEN)
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def make_adapter(path, rank):
    from safetensors.torch import save_file

    path.mkdir()
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "base", "r": rank,
              "lora_alpha": 2 * rank, "target_modules": [name.split(".")[1] for name in LINEARS]}
    (path / "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for layer in range(LAYERS):
        for name, (rows, cols) in LINEARS.items():
            module = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{module}.lora_A.weight"] = random(rank, cols)
            tensors[f"{module}.lora_B.weight"] = random(rows, rank)
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})


def make(base, adapter, rank):
    import torch

    torch.manual_seed(1)
    make_base(base)
    make_adapter(adapter, rank)


def run(command, output):
    """Returns seconds and peak MiB of a command whose output directory is removed afterwards."""
    os.sync()
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    alone = time.perf_counter() - start
    if process.returncode:
        sys.exit(f"{command}: {errors}")
    os.sync()
    seconds = time.perf_counter() - start
    shutil.rmtree(output)
    return seconds, alone, usage.ru_maxrss / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--infold", required=True)
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--gguf", action="store_true")
    parser.add_argument("--peft", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rank", type=int, default=8)
    args = parser.parse_args()

    work = args.work / "bench_merge"
    work.mkdir(parents=True)
    base, adapter, output = work / "base", work / "adapter", work / "output"
    try:
        # A process of its own, and torch only there: a child's peak begins with the size of its parent.
        making = multiprocessing.Process(target=make, args=(base, adapter, args.rank))
        making.start()
        making.join()
        merge = [args.infold, "merge", "--model", base, "--adapter", adapter, "--output", output]
        commands = {"cp -r": ["cp", "-r", base, output], "infold merge": merge}
        if args.gguf:
            commands["infold merge to q4_k_m"] = [*merge, "--gguf", "q4_k_m", "--gguf-only"]
        if args.peft:
            commands["PEFT"] = [sys.executable, "-c", PEFT, base, adapter, output]
        results = {name: [] for name in commands}
        for _ in range(args.rounds):
            for name, command in commands.items():
                results[name].append(run([str(part) for part in command], output))
    finally:
        shutil.rmtree(work)

    medians = {name: [statistics.median(values) for values in zip(*runs)] for name, runs in results.items()}
    reference = medians["cp -r"]
    print("| | to the disk, s | × cp | process alone, s | peak, MiB |")
    print("|---|---:|---:|---:|---:|")
    for name, (seconds, alone, peak) in medians.items():
        print(f"| {name} | {seconds:.2f} | {seconds / reference[0]:.2f} | {alone:.2f} | {peak:.0f} |")


if __name__ == "__main__":
    main()
