#!/usr/bin/env python3
"""Measures infold and llama.cpp side by side: the same GGUF, the same threads, the same load over HTTP.

    pip install xllamacpp && scripts/bench_serve.py MODEL.gguf [--rounds 3] [--threads 2] [--json FILE]
Each round starts one server, measures it alone, stops it, then the other; the order swaps every round. The
table shows medians and their ratio. `infold bench` runs on the same model, for what HTTP adds. Standard library
only, except that the llama.cpp side runs in a Python that has xllamacpp (--python).
"""

import argparse
import contextlib
import http.client
import json
import pathlib
import random
import selectors
import socket
import statistics
import subprocess
import sys
import threading
import time

import infold_server

WORDS = "river stone quiet lamp garden copper window seven letter winter horse market silver door music paper".split()
PROMPT_TOKENS = 1040
CASES = {
    # name: (unit, "lower" or "higher" is better, the goal for ours / theirs)
    "time per token alone": ("ms", "lower", "<= 1.0"),
    "prompt speed, 1,040 tokens": ("tok/s", "higher", ">= 2.0"),
    "output at concurrency 8": ("tok/s", "higher", ">= 2.0"),
    "output at concurrency 32": ("tok/s", "higher", ">= 3.0"),
    "first token, prefix cached": ("ms", "lower", "<= 1.5 steps"),
    "start to ready": ("s", "lower", "<= 2 s"),
    "peak memory": ("MiB", "lower", ""),
}
# llama.cpp's own server inside the wheel; runs in a child, prints nothing that matters.
LLAMA_CPP = """
import sys, time
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.hostnames, params.port = ["127.0.0.1"], int(sys.argv[2])
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(sys.argv[3])
params.n_parallel, params.n_ctx = int(sys.argv[4]), int(sys.argv[5])
params.cont_batching = True
server = xllamacpp.Server(params)
while True:
    time.sleep(3600)
"""


def start_llama_cpp(options, slots=8):
    """Starts llama.cpp with room for 2,048 tokens a slot."""
    return infold_server.Server(
        lambda port: [options.python, "-c", LLAMA_CPP, options.model, port, options.threads, slots, slots * 2048]
    )


def start_infold(options, slots=8):
    """Starts infold; `slots` is llama.cpp's notion and needs no counterpart."""
    del slots
    args = ["--threads", options.threads, "--served-model-name", "bench", "--disable-access-log"]
    args += ["--max-model-len", 2048, "--generation-config", "vllm", *options.serve_args]
    return infold_server.infold_serve(options.model, *map(str, args))


def stream(server, prompt, max_tokens):
    """Streams one greedy completion; returns (prompt tokens, output tokens, secs to first token, secs in all)."""
    body = {
        "model": "bench", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True,
        "stream": True, "stream_options": {"include_usage": True}, "cache_prompt": True,
    }
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=600)
    started = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(f"{response.status}: {response.read()[:300]!r}")
    first = usage = None
    for line in response:
        if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
            continue
        event = json.loads(line[6:])
        if first is None and event["choices"]:
            first = time.perf_counter()
        usage = event.get("usage") or usage
    ended = time.perf_counter()
    connection.close()
    return usage["prompt_tokens"], usage["completion_tokens"], first - started, ended - started


def text(num_words, salt):
    """Returns a prompt that shares no beginning with another salt's."""
    return f"Request {salt}. " + " ".join(WORDS[(salt * 7 + k * k) % len(WORDS)] for k in range(num_words)) + "."


def prompt_of(server, num_tokens, salt):
    """Returns a prompt of exactly or nearly `num_tokens` tokens, as the server counts them."""
    num_words = num_tokens * 2 // 3
    for _ in range(8):
        prompt = text(num_words, salt)
        status, answer = server.post("/tokenize", {"model": "bench", "prompt": prompt, "content": prompt})
        if status != 200:
            raise RuntimeError(f"/tokenize answered {status}: {answer}")
        difference = num_tokens - len(answer["tokens"])
        if abs(difference) <= 1:
            break
        num_words += difference if abs(difference) < 4 else difference * num_words // len(answer["tokens"])
    return prompt


def measure_alone(server, salt):
    """Returns time per token, prompt speed and the first token of a cached prefix, nothing else running."""
    stream(server, text(20, salt), 16)  # Pages the weights in.
    _, count, first, whole = stream(server, text(20, salt + 1), 128)
    tpot_secs = (whole - first) / (count - 1)
    prompt = prompt_of(server, PROMPT_TOKENS, salt + 2)
    num_prompt, _, cold_secs, _ = stream(server, prompt, 1)
    cached_secs = min(stream(server, prompt, 1)[2] for _ in range(3))
    return {
        "time per token alone": tpot_secs * 1e3,
        "prompt speed, 1,040 tokens": num_prompt / cold_secs,
        "first token, prefix cached": cached_secs * 1e3,
    }


def measure_load(server, concurrency, num_requests, max_tokens, salt):
    """Returns output tokens per second with `concurrency` requests in flight."""
    left, lock, counts, errors = list(range(num_requests)), threading.Lock(), [], []

    def worker():
        with contextlib.suppress(IndexError):
            while True:
                with lock:
                    index = left.pop()
                try:
                    counts.append(stream(server, text(60, salt + index), max_tokens)[1])
                except Exception as error:  # Reported below; a thread's own traceback would be lost.
                    errors.append(error)

    threads = [threading.Thread(target=worker) for _ in range(concurrency)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise RuntimeError(f"{len(errors)} of {num_requests} requests failed: {errors[0]!r}")
    return sum(counts) / (time.perf_counter() - started)


def measure(start, options, salt):
    """Returns one round of one program. A second server serves concurrency 32: llama.cpp fixes its slots at start."""
    with start(options) as server:
        result = {"start to ready": server.secs_to_ready, **measure_alone(server, salt)}
        result["output at concurrency 8"] = measure_load(server, 8, 16, options.max_tokens, salt + 100)
        result["peak memory"] = server.memory_kib("VmHWM") / 1024
    with start(options, 32) as server:
        stream(server, text(20, salt), 16)
        result["output at concurrency 32"] = measure_load(server, 32, 32, options.max_tokens, salt + 200)
    return result


def stream_all(server, prompts, max_tokens):
    """Streams all prompts at once and returns the seconds until the last is done.

    One thread that the kernel wakes only when an answer is whole (SO_RCVLOWAT): a client that reads every event as
    it comes takes the processor from the server, which here runs on the same cores, and would be measured with it.
    """
    done, selector = 0, selectors.DefaultSelector()
    started = time.perf_counter()
    for prompt in prompts:
        body = {"model": "bench", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        payload = json.dumps({**body, "stream": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: bench\r\nConnection: close\r\nContent-Length: {len(payload)}\r\n"
        connection = socket.create_connection(("127.0.0.1", server.port))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1 << 19)
        connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + payload)
        selector.register(connection, selectors.EVENT_READ, data=[])
    while done < len(prompts):
        for key, _ in selector.select():
            received = key.fileobj.recv(65536)
            key.data.append(received)
            if not received:
                answer = b"".join(key.data)
                if not answer.startswith(b"HTTP/1.1 200") or answer.count(b"data: {") != max_tokens:
                    raise RuntimeError(f"not the answer expected: {answer[:300]!r}")
                selector.unregister(key.fileobj)
                key.fileobj.close()
                done += 1
    return time.perf_counter() - started


def http_overhead(options):
    """Returns Markdown lines: output tok/s over HTTP beside `infold bench` on equal work (64 tokens in, 96 out)."""
    sizes = (1, 8, 32)
    command = [infold_server.infold_binary(), "bench", options.model, "--threads", options.threads, "--json"]
    command += ["--batch-size", *sizes, "--input-len", 64, "--output-len", 96, "--max-model-len", 2048]
    run = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise RuntimeError(f"infold bench ended with {run.returncode}: {run.stderr[-500:]}")
    offline = {case["batch_size"]: case["output_tok_s"] for case in json.loads(run.stdout)["cases"]}
    lines = ["| requests at once | infold bench, tok/s | over HTTP, tok/s | HTTP adds |", "| ---: | ---: | ---: | ---: |"]
    rng = random.Random(0)
    with start_infold(options) as server:
        for size in sizes:
            rates = []
            for _ in range(options.rounds + 1):
                prompts = [[rng.randrange(10_000) for _ in range(64)] for _ in range(size)]
                rates.append(size * 96 / stream_all(server, prompts, 96))
            rate = statistics.median(rates[1:])
            lines.append(f"| {size} | {offline[size]:.1f} | {rate:.1f} | {(offline[size] / rate - 1) * 100:.1f} % |")
    return "\n".join(lines)


def table(results):
    """Returns the Markdown table of medians."""
    lines = ["| | infold | llama.cpp | ratio | goal |", "| --- | ---: | ---: | ---: | --- |"]
    for case, (unit, _, goal) in CASES.items():
        ours, theirs = (
            statistics.median(round_[case] for round_ in results[name]) if results[name] else float("nan")
            for name in ("infold", "llama.cpp")
        )
        lines.append(f"| {case}, {unit} | {ours:.2f} | {theirs:.2f} | {ours / theirs:.2f} | {goal} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=pathlib.Path, help="GGUF file that both serve")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=96, help="output tokens of a request under load")
    parser.add_argument("--python", default=sys.executable, help="a Python that has xllamacpp")
    parser.add_argument("--only", choices=("infold", "llama.cpp"), help="measure one program")
    parser.add_argument("--json", type=pathlib.Path, help="write every round here")
    parser.add_argument("serve_args", nargs="*", help="after --: further flags of infold serve")
    options = parser.parse_args()
    programs = {"infold": start_infold, "llama.cpp": start_llama_cpp}
    if options.only:
        programs = {options.only: programs[options.only]}
    results = {"infold": [], "llama.cpp": []}
    for index in range(options.rounds):
        order = list(programs) if index % 2 == 0 else list(reversed(programs))
        for name in order:
            results[name].append(measure(programs[name], options, index * 1000))
            shown = {case: round(value, 2) for case, value in results[name][-1].items()}
            print(f"round {index + 1} {name}: {json.dumps(shown)}", file=sys.stderr, flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))
    if "infold" in programs:
        print("\n" + http_overhead(options))


if __name__ == "__main__":
    main()
