#!/usr/bin/env python3
"""Times `infold train` beside transformers + PEFT on the same batches of a CPU, in f32.

    infold merge --model SmolLM2-135M-Instruct.Q4_1.gguf --dtype float32 --output DIR/smol
    scripts/bench_train.py --infold target/release/infold --model DIR/smol --torch PYTHON --work DIR [--rounds 3]

PYTHON has torch, transformers and peft; scripts/oracle_stack.sh makes one (DIR/python-openblas; with the reference
BLAS of DIR/python nothing ends in minutes). Three cases: SmolLM2-135M and a random model of Qwen2.5-0.5B's shape with
rows of equal length (nothing to pack), and SmolLM2 on data/persona.json, which infold packs and the others pad to
the longest row of a batch. Both make whole updates of LoRA adapters of rank 8 on all linears, without recomputation:
forward, backward, clipping, AdamW. The programs alternate in short rounds; the first update of each is left out; the
table has medians, the ratios are medians of each round's ratio, memory is the highest resident set that the kernel
saw. The first losses of both must agree. Processor time is there because other programs disturb the clock.
"""

import argparse
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face."
WORDS = "river stone quiet garden copper window seven letter winter horse market silver door music paper".split()
HALF_BILLION = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864,
    "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936,
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "max_position_embeddings": 32768, "tie_word_embeddings": True,
    "torch_dtype": "float32", "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# Reads a specification, prints a line of JSON for each update.
TORCH = """
import json, sys, time, warnings
warnings.filterwarnings("ignore")
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

spec = json.load(open(sys.argv[1]))
torch.set_num_threads(spec["threads"])
tokenizer = AutoTokenizer.from_pretrained(spec["model"])
model = AutoModelForCausalLM.from_pretrained(spec["model"], torch_dtype=torch.float32)
targets = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=targets,
                                         task_type="CAUSAL_LM"))
model.train()
rows = []
for row in spec["rows"]:
    prompt = f"<|im_start|>system\\n{spec['system']}<|im_end|>\\n<|im_start|>user\\n{row[0]}<|im_end|>\\n<|im_start|>assistant\\n"
    prompt = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answer = tokenizer(row[1] + "<|im_end|>\\n", add_special_tokens=False)["input_ids"]
    rows.append((prompt + answer, [-100] * len(prompt) + answer))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0)
for step in range(spec["steps"]):
    batch = rows[step * spec["batch"]:][:spec["batch"]]
    width = -(-max(len(ids) for ids, _ in batch) // 8) * 8
    fill = lambda values, value: torch.tensor([row + [value] * (width - len(row)) for row in values])
    ids, mask = fill([ids for ids, _ in batch], 2), fill([[1] * len(ids) for ids, _ in batch], 0)
    labels = fill([labels for _, labels in batch], -100)
    start = time.perf_counter()
    loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    tokens = int(mask.sum())
    print(json.dumps({"loss": float(loss), "rate": tokens / (time.perf_counter() - start), "tokens": tokens}), flush=True)
"""


def make_half_billion(path, tokenizer):
    """A random model of Qwen2.5-0.5B's shape, made in a process of its own because of the memory."""
    script = """
import sys, torch
from safetensors.torch import save_file
import json
config = json.loads(sys.argv[2])
h, i, v, kv = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size", "num_key_value_heads"))
kv *= h // config["num_attention_heads"]
torch.manual_seed(1)
r = lambda *shape: torch.randn(*shape) * 0.02
tensors = {"model.embed_tokens.weight": r(v, h), "model.norm.weight": torch.ones(h)}
for n in range(config["num_hidden_layers"]):
    p = f"model.layers.{n}."
    for name, rows, cols in [("self_attn.q_proj", h, h), ("self_attn.k_proj", kv, h), ("self_attn.v_proj", kv, h),
                             ("self_attn.o_proj", h, h), ("mlp.gate_proj", i, h), ("mlp.up_proj", i, h),
                             ("mlp.down_proj", h, i)]:
        tensors[p + name + ".weight"] = r(rows, cols)
        if name[10] in "qkv":
            tensors[p + name + ".bias"] = r(rows)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        tensors[p + norm + ".weight"] = torch.ones(h)
save_file(tensors, sys.argv[1], metadata={"format": "pt"})
"""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(HALF_BILLION))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, path)
    return [script, str(path / "model.safetensors"), json.dumps(HALF_BILLION)]


def equal_rows(count, words):
    generator = random.Random(1)
    return [("Write.", " ".join(generator.choice(WORDS) for _ in range(words))) for _ in range(count)]


def cpu_seconds(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def run(command, read, environment=None):
    """Runs a command; returns what `read` makes of its lines, processor seconds between them, and peak MiB."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    found, times = [], []
    for line in process.stdout:
        entry = read(line)
        if entry:
            found.append(entry)
            times.append(cpu_seconds(process.pid))
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{command}:\n{errors[-3000:]}")
    return found, [b - a for a, b in zip(times, times[1:])], usage.ru_maxrss / 1024


def read_infold(line):
    match = re.match(r"(\{.*\})  ([0-9.]+) tokens/s", line)
    return match and {"loss": json.loads(match[1]).get("loss"), "rate": float(match[2])}


def measure(program, case, options, work):
    """Returns tokens a second, processor seconds for 1,000 tokens, peak MiB and the first loss."""
    if program == "infold":
        out = work / "out"
        keys = {
            "model_name_or_path": case["model"], "dataset": case["dataset"], "dataset_dir": case["dataset_dir"],
            "template": "smollm2", "output_dir": out, "max_steps": case["steps"], "learning_rate": 1e-4,
            "per_device_train_batch_size": case["batch"], "logging_steps": 1, "save_strategy": "no",
            "disable_shuffling": "true", "packing": case["packing"], "lr_scheduler_type": "constant",
        }  # fmt: skip
        command = [options.infold, "train", *(f"{key}={value}" for key, value in keys.items())]
        found, times, peak = run(command, read_infold)
        shutil.rmtree(out)
    else:
        spec = {key: case[key] for key in ("rows", "steps", "batch")}
        spec |= {"model": str(case["model"]), "system": SYSTEM, "threads": os.cpu_count()}
        (work / "spec.json").write_text(json.dumps(spec))
        environment = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count())}
        command = [program, "-c", TORCH, str(work / "spec.json")]
        found, times, peak = run(command, lambda line: line.startswith("{") and json.loads(line), environment)
        case["tokens"] = [entry["tokens"] for entry in found]
    found = found[: case["steps"]]
    seconds = sum(tokens / entry["rate"] for tokens, entry in zip(case["tokens"][1:], found[1:]))
    tokens = sum(case["tokens"][1:])
    return tokens / seconds, 1000 * sum(times[: case["steps"] - 1]) / tokens, peak, found[0]["loss"]


def cases(options, work):
    persona = json.loads((ROOT / "data/persona.json").read_text())
    persona = [(row["instruction"] + ("\n" + row["input"] if row["input"] else ""), row["output"]) for row in persona]
    sets = {"equal": equal_rows(64, 256), "short": equal_rows(64, 128)}
    for name, rows in sets.items():
        data = [{"instruction": question, "input": "", "output": answer} for question, answer in rows]
        (work / f"{name}.json").write_text(json.dumps(data))
    info = {name: {"file_name": f"{name}.json"} for name in sets}
    (work / "dataset_info.json").write_text(json.dumps(info))

    def unpacked(name):
        return {"rows": sets[name], "dataset": name, "dataset_dir": work, "packing": "false"}

    return {
        "135M, equal rows": unpacked("equal") | {"model": options.model, "batch": 4, "steps": options.steps},
        "135M, persona": {
            "model": options.model, "rows": persona, "dataset": "persona", "dataset_dir": ROOT / "data",
            "packing": "true", "batch": 8, "steps": options.steps + 1,
        },
        # Short rows and small batches: a round of the slower side stays below two minutes.
        "0.5B, equal rows": unpacked("short") | {"model": work / "half", "batch": 2, "steps": options.steps},
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--infold", required=True)
    parser.add_argument("--model", required=True, type=Path, help="SmolLM2-135M in f32, as `infold merge` writes it")
    parser.add_argument("--torch", required=True, help="a Python with torch, transformers and peft")
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="updates of a round, the first one left out")
    parser.add_argument("--only", help="cases whose name holds this text")
    options = parser.parse_args()
    options.model = options.model.resolve()

    work = options.work / "bench_train"
    work.mkdir(parents=True)
    print("| | infold, tokens/s | torch, tokens/s | ratio | ratio of processor time | memory, MiB | ratio |")
    print("|---|---:|---:|---:|---:|---:|---:|", flush=True)
    try:
        for name, case in cases(options, work).items():
            if options.only and options.only not in name:
                continue
            if case["model"] == work / "half":
                script, *arguments = make_half_billion(case["model"], options.model)
                subprocess.run([options.torch, "-c", script, *arguments], check=True)
            rounds = []
            for _ in range(options.rounds):
                theirs = measure(options.torch, case, options, work)
                ours = measure("infold", case, options, work)
                if abs(ours[3] - theirs[3]) > 0.002 * abs(theirs[3]):
                    sys.exit(f"{name}: the first losses are {ours[3]} and {theirs[3]}: not the same batches")
                rounds.append((ours, theirs))
                print(f"{name}: {ours[0]:.0f} and {theirs[0]:.0f} tokens/s, {ours[1]:.2f} and {theirs[1]:.2f} "
                      "processor seconds for 1,000 tokens", file=sys.stderr)  # fmt: skip
            median = lambda value: statistics.median(value(ours, theirs) for ours, theirs in rounds)
            print(
                f"| {name} | {median(lambda a, b: a[0]):.0f} | {median(lambda a, b: b[0]):.0f} "
                f"| {median(lambda a, b: a[0] / b[0]):.2f} | {median(lambda a, b: b[1] / a[1]):.2f} "
                f"| {median(lambda a, b: a[2]):.0f} and {median(lambda a, b: b[2]):.0f} "
                f"| {median(lambda a, b: a[2] / b[2]):.2f} |",
                flush=True,
            )
            time.sleep(1)
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
