#!/usr/bin/env python3
"""Runs the whole chain on several GPUs and prints a table: a random checkpoint of Qwen2.5-7B's shape, the
merge of an adapter in shards of 5 GB, the reference serve command at tensor parallel size 4, curl and
`requests.post`, greedy tokens beside those of one GPU, faults of a rank, SIGTERM under load.

    scripts/check_tensor_parallel.py                          4 GPUs; 32 GB in /dev/shm or a temporary folder
    scripts/check_tensor_parallel.py --tensor-parallel-size 2
    scripts/check_tensor_parallel.py --shape tiny --device cpu --tensor-parallel-size 2     no GPU: the logic
    scripts/check_tensor_parallel.py --model DIR              an own checkpoint in place of the random one

Ends with 1 if a row has failed. Needs `infold` built with `--features cuda` ($INFOLD_BIN, or target/release/infold)
and curl; `requests` where it is installed. Standard library only. About 3 minutes on 4 H100.
"""

import argparse
import json
import math
import multiprocessing
import os
import pathlib
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time

from infold_server import FIXTURES, Server, infold_binary

QWEN_7B = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 32768,
}
TINY = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 1024, "max_position_embeddings": 8192,
}
NAME = "Qwen2.5-7B-sft"
PORT = 6006
# Bytes of random bits that tensors are cut from, one after another: no divisor of a row's length, so that no
# two rows are equal.
BLOCK_BYTES = 2 * 33554467
# A token may differ where the other one's logprob is this near.
NEAR_TIE = 0.1
# Seconds from a fault to the end of the process.
MOST_SECS_TO_END = 5.0


class Table:
    """The rows so far; printed as they come."""

    def __init__(self):
        self.has_failed = False
        print("| step | result | s |\n|---|---|---:|", flush=True)

    def row(self, step, result, secs, is_good=True):
        self.has_failed |= not is_good
        mark = "" if is_good else "FAILED: "
        print(f"| {step} | {mark}{result} | {secs:.1f} |", flush=True)


# --- the checkpoint ---------------------------------------------------------------------------------------


def tensors_of(config):
    """Yields `(name, shape, exponent)`: values are random in ±[2^exponent, 2^(exponent + 1)); 0 is all ones."""
    hidden, mlp, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head = hidden // config["num_attention_heads"]
    kv = head * config["num_key_value_heads"]

    def linear(cols):
        return round(math.log2(1 / math.sqrt(cols)) - 0.5)

    yield "model.embed_tokens.weight", [vocab, hidden], -6
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, rows, cols, has_bias in [
            ("self_attn.q_proj", hidden, hidden, True), ("self_attn.k_proj", kv, hidden, True),
            ("self_attn.v_proj", kv, hidden, True), ("self_attn.o_proj", hidden, hidden, False),
            ("mlp.gate_proj", mlp, hidden, False), ("mlp.up_proj", mlp, hidden, False),
            ("mlp.down_proj", hidden, mlp, False),
        ]:
            yield f"{prefix}{name}.weight", [rows, cols], linear(cols)
            if has_bias:
                yield f"{prefix}{name}.bias", [rows], -4
        yield f"{prefix}input_layernorm.weight", [hidden], 0
        yield f"{prefix}post_attention_layernorm.weight", [hidden], 0
    yield "model.norm.weight", [hidden], 0
    yield "lm_head.weight", [vocab, hidden], linear(hidden) + 1


def adapter_tensors_of(config, rank):
    """Yields the factors of all linears, as `tensors_of`."""
    for name, shape, _ in tensors_of(config):
        if "_proj.weight" in name:
            base = "base_model.model." + name.removesuffix(".weight")
            yield f"{base}.lora_A.weight", [rank, shape[1]], -7
            yield f"{base}.lora_B.weight", [shape[0], rank], -7


def random_block(exponent, cache={}):  # pylint: disable=dangerous-default-value
    """Returns float16 values as bytes: sign and fraction are random, the exponent is fixed."""
    if exponent not in cache:
        count = BLOCK_BYTES // 2
        if exponent == 0:
            cache[exponent] = b"\x00\x3c" * count
        else:
            biased = (exponent + 15) << 2
            table = bytes((byte & 0x83) | biased for byte in range(256))
            values = bytearray(2 * count)
            values[0::2] = os.urandom(count)
            values[1::2] = os.urandom(count).translate(table)
            cache[exponent] = bytes(values)
    return cache[exponent]


def num_bytes(shape):
    return 2 * math.prod(shape)


def write_safetensors(job):
    """Writes one file of `(name, shape, exponent)`."""
    path, tensors = job
    header, start = {}, 0
    for name, shape, _ in tensors:
        end = start + num_bytes(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    place = 0
    with open(path, "wb", buffering=0) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, shape, exponent in tensors:
            left, block = num_bytes(shape), memoryview(random_block(exponent))
            while left:
                start = place % BLOCK_BYTES
                part = block[start:start + min(left, BLOCK_BYTES - start)]
                file.write(part)
                place, left = place + len(part), left - len(part)


def make_checkpoint(folder, config, tokenizer):
    """Writes a sharded checkpoint and returns its bytes."""
    folder.mkdir(parents=True)
    shards, size, total = [[]], 0, 0
    for tensor in tensors_of(config):
        if size > 4 << 30:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += num_bytes(tensor[1])
        total += num_bytes(tensor[1])
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    with multiprocessing.Pool(len(shards)) as pool:
        pool.map(write_safetensors, [(folder / name, shard) for name, shard in zip(names, shards)])
    weight_map = {tensor[0]: name for name, shard in zip(names, shards) for tensor in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    ids = json.loads((tokenizer / "config.json").read_text())
    full = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0, "tie_word_embeddings": False, "torch_dtype": "float16", "use_sliding_window": False,
        "bos_token_id": ids.get("bos_token_id"), "eos_token_id": ids.get("eos_token_id"), **config,
    }
    (folder / "config.json").write_text(json.dumps(full, indent=2))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (tokenizer / name).exists():
            shutil.copy(tokenizer / name, folder / name)
    return total


def make_adapter(folder, config, rank=8):
    folder.mkdir(parents=True)
    write_safetensors((folder / "adapter_model.safetensors", list(adapter_tensors_of(config, rank))))
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    (folder / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 16, "lora_dropout": 0.0,
        "bias": "none", "target_modules": modules, "base_model_name_or_path": "base", "fan_in_fan_out": False,
        "inference_mode": True, "use_rslora": False, "use_dora": False, "modules_to_save": None,
    }))


def merge(folder, base, adapter):
    """Merges as the reference workflow does, with its file; returns the shards' sizes."""
    merged = folder / "merged"
    (folder / "export.yaml").write_text(
        f"model_name_or_path: {base}\nadapter_name_or_path: {adapter}\ntemplate: qwen\nfinetuning_type: lora\n"
        f"trust_remote_code: true\nexport_dir: {merged}\nexport_size: 5\nexport_device: gpu\n"
        "export_legacy_format: false\n"
    )
    subprocess.run([infold_binary(), "merge", folder / "export.yaml"], check=True, stdout=subprocess.DEVNULL,
                   stderr=subprocess.PIPE)
    return merged, sorted(path.stat().st_size for path in merged.glob("*.safetensors"))


# --- the server -------------------------------------------------------------------------------------------


def serve(options, model, num_ranks, *extra, fault=None):
    """Starts the reference command."""
    arguments = ["--tensor-parallel-size", num_ranks, "--served-model-name", NAME, "--max-model-len", 8192,
                 "--dtype", "half", "--host", "0.0.0.0"]
    if options.device == "cpu":
        arguments += ["--device", "cpu", "--kv-cache-memory-bytes", "256MiB"]
    env = {"INFOLD_FAULT": fault} if fault else None
    return Server(lambda port: [infold_binary(), "serve", "--model", model, "--port", port, *arguments, *extra],
                  env=env, port=PORT)


def memory_mib():
    """Returns the used memory of each GPU, or nothing without nvidia-smi."""
    try:
        done = subprocess.run(["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"],
                              stdout=subprocess.PIPE, check=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return [int(line) for line in done.stdout.split()]


def in_use():
    used = memory_mib()
    return "" if used is None else f", {'/'.join(map(str, used))} MiB used"


def is_memory_back(before):
    """Waits up to a second for the driver; returns a text and whether the memory is back."""
    if before is None:
        return "no nvidia-smi", True
    for _ in range(10):
        now = memory_mib()
        if all(after <= start + 16 for start, after in zip(before, now)):
            break
        time.sleep(0.1)
    text = f"{'/'.join(map(str, now))} MiB used, before {'/'.join(map(str, before))}"
    return text, all(after <= start + 16 for start, after in zip(before, now))


def greedy(server, vocab_size):
    """Returns tokens, logprobs and alternatives of some prompts of random ids."""
    answers = []
    for salt, length in enumerate([1, 17, 100, 700]):
        prompt = [(i * i * 31 + i * 17 + salt * 101 + 7) % vocab_size for i in range(length)]
        status, body = server.post("/v1/completions", {
            "model": NAME, "prompt": prompt, "max_tokens": 48, "temperature": 0, "ignore_eos": True, "logprobs": 5,
            "return_tokens_as_token_ids": True,
        })
        if status != 200:
            raise RuntimeError(f"{status}: {body}")
        answers.append(body["choices"][0]["logprobs"])
    return answers


def compare(got, want):
    """Returns a text and whether tokens are equal up to near-ties."""
    equal = total = 0
    worst, ties, is_good = 0.0, [], True
    for mine, other in zip(got, want):
        total += len(other["tokens"])
        for i, (token, wanted) in enumerate(zip(mine["tokens"], other["tokens"])):
            worst = max(worst, abs(mine["token_logprobs"][i] - other["token_logprobs"][i]))
            if token == wanted:
                equal += 1
                continue
            rival = other["top_logprobs"][i].get(token, -math.inf)
            ties.append(other["token_logprobs"][i] - rival)
            is_good &= ties[-1] <= NEAR_TIE
            # What follows another token is another text.
            break
    gaps = f", parted at gaps {', '.join(f'{gap:.3f}' for gap in ties)}" if ties else ""
    return f"{equal} of {total} tokens equal{gaps}; logprobs differ by {worst:.4f} at most", is_good


class Load:
    """Requests in the background, each of several hundred steps."""

    def __init__(self, server, count=16):
        self.answers = [None] * count
        self.threads = [threading.Thread(target=self._ask, args=(server, i)) for i in range(count)]
        for thread in self.threads:
            thread.start()

    def _ask(self, server, index):
        try:
            self.answers[index] = server.request("POST", "/v1/completions", {
                "model": NAME, "prompt": [3 + index, 5, 7], "max_tokens": 600, "temperature": 0, "ignore_eos": True,
            }, 120)
        except OSError as error:
            self.answers[index] = (0, str(error))

    def wait(self):
        for thread in self.threads:
            thread.join()
        return self.answers


def ask_as_reference(server):
    """Asks with curl and with requests as the reference workflow does; yields `(name, text, is_good)`."""
    body = {"model": NAME, "messages": [{"role": "user", "content": "你是谁?"}], "max_tokens": 64, "temperature": 0.7}
    url = f"{server.url}/v1/chat/completions"
    done = subprocess.run(["curl", "-sS", url, "-H", "Content-Type: application/json", "-d", json.dumps(body)],
                          stdout=subprocess.PIPE, text=True, check=False)
    yield "curl", *describe(done.returncode == 0, done.stdout)
    try:
        import requests  # pylint: disable=import-outside-toplevel
    except ImportError:
        yield "requests.post", "requests is not installed", True
        return
    reply = requests.post(url, headers={"Content-Type": "application/json"}, json=body, timeout=120)
    yield "requests.post", *describe(reply.status_code == 200, reply.text)


def describe(is_good, text):
    try:
        reply = json.loads(text)
        content = reply["choices"][0]["message"]["content"]
        tokens = reply["usage"]["completion_tokens"]
        return f"{tokens} tokens, {len(content)} characters", is_good
    except (ValueError, KeyError, TypeError):
        return text[:200], False


def check_fault(table, options, model, kind, before):
    """A rank fails under load: 503, errors, an end in time, memory given back."""
    num_ranks = options.tensor_parallel_size
    extra = ["--distributed-timeout-seconds", 2] if options.device == "cpu" else []
    with serve(options, model, num_ranks, *extra, fault=f"rank=1,step=100,kind={kind}") as server:
        load = Load(server)
        while True:
            try:
                status, text = server.get("/health")
            except OSError as error:
                status, text = 0, str(error)
            if status != 200:
                break
            time.sleep(0.01)
        started = time.perf_counter()
        answers = load.wait()
        try:
            code = server.process.wait(30)
        except subprocess.TimeoutExpired:
            code = "none"
        secs = time.perf_counter() - started
    memory, is_back = is_memory_back(before)
    failed = sum(status != 200 for status, _ in answers)
    try:
        reason = json.loads(text)["error"]["message"]
    except (ValueError, KeyError):
        reason = text
    is_good = status == 503 and code == 1 and secs <= MOST_SECS_TO_END and failed == len(answers) and is_back
    table.row(f"fault of rank 1: {kind}", f"/health {status} ({reason}); {failed} of {len(answers)} requests end with "
              f"an error; exit {code}; {memory}", secs, is_good)


def check_signal(table, server, before):
    """SIGTERM while requests run: they finish, the process ends with 0, memory is given back."""
    load = Load(server)
    while json.loads(server.get("/load")[1])["server_load"] < len(load.threads):
        time.sleep(0.01)
    started = time.perf_counter()
    server.process.terminate()
    answers = load.wait()
    try:
        code = server.process.wait(60)
    except subprocess.TimeoutExpired:
        code = "none"
    secs = time.perf_counter() - started
    memory, is_back = is_memory_back(before)
    done = sum(status == 200 for status, _ in answers)
    table.row("SIGTERM under load", f"{done} of {len(answers)} requests finish; exit {code}; {memory}", secs,
              done == len(answers) and code == 0 and is_back)


def check_servers(table, options, model, vocab_size):
    before = memory_mib()
    num_ranks = options.tensor_parallel_size
    with serve(options, model, 1) as server:
        secs, started = server.secs_to_ready, time.perf_counter()
        want = greedy(server, vocab_size)
        table.row("one rank", f"ready in {secs:.1f} s", time.perf_counter() - started)
    with serve(options, model, num_ranks, "--shutdown-timeout", 60) as server:
        table.row(f"{num_ranks} ranks", f"ready in {server.secs_to_ready:.1f} s{in_use()}",
                  server.secs_to_ready)
        for name, text, is_good in ask_as_reference(server):
            table.row(name, text, 0, is_good)
        started = time.perf_counter()
        text, is_good = compare(greedy(server, vocab_size), want)
        table.row(f"{num_ranks} ranks = one", text, time.perf_counter() - started, is_good)
        check_signal(table, server, before)
    started = time.perf_counter()
    try:
        with serve(options, model, num_ranks, "--disable-custom-all-reduce") as server:
            text, is_good = compare(greedy(server, vocab_size), want)
    except RuntimeError as error:
        text = str(error).strip().replace("\n", " ")[-600:]
        is_good = "NCCL was not found" in text
    name = "the same through NCCL" if options.device == "cuda" else "--disable-custom-all-reduce (no effect)"
    table.row(name, text, time.perf_counter() - started, is_good)
    for kind in ("panic", "error", "stall"):
        check_fault(table, options, model, kind, before)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, help="a checkpoint that is there already")
    parser.add_argument("--shape", choices=["7b", "tiny"], default="7b")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tensor-parallel-size", type=int, default=4)
    parser.add_argument("--tokenizer", type=pathlib.Path, default=FIXTURES / "tiny-qwen2")
    parser.add_argument("--work", type=pathlib.Path, help="a folder for 32 GB")
    options = parser.parse_args()
    table = Table()
    shape = QWEN_7B if options.shape == "7b" else TINY
    memory_disk = pathlib.Path("/dev/shm")
    if options.work is None and memory_disk.is_dir() and shutil.disk_usage(memory_disk).free > 40 << 30:
        options.work = memory_disk
    with tempfile.TemporaryDirectory(prefix="tensor-parallel-", dir=options.work) as folder:
        folder = pathlib.Path(folder)
        base = options.model
        if base is None:
            base, started = folder / "base", time.perf_counter()
            size = make_checkpoint(base, shape, options.tokenizer)
            table.row("random checkpoint", f"{size / 1e9:.3f} GB", time.perf_counter() - started)
        config = json.loads((base / "config.json").read_text())
        make_adapter(folder / "adapter", config)
        started = time.perf_counter()
        merged, sizes = merge(folder, base, folder / "adapter")
        table.row("merge, export_size 5", f"{len(sizes)} shards of {', '.join(f'{size / 1e9:.3f}' for size in sizes)} GB",
                  time.perf_counter() - started, max(sizes) <= 5.1e9)
        check_servers(table, options, merged, config["vocab_size"])
    sys.exit(int(table.has_failed))


if __name__ == "__main__":
    main()
