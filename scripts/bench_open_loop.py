#!/usr/bin/env python3
"""Measures `infold serve` beside vLLM through HTTP under open-loop load, and prints a table with ratios.

    scripts/bench_open_loop.py --model DIR --vllm python3        DIR: config.json and the tokenizer
    scripts/bench_open_loop.py --model DIR --vllm python3 --check --json FILE
    scripts/bench_open_loop.py --model DIR                       ours alone

Both serve random weights in the shape of config.json (--load-format dummy) in float16 with the same flags, one after
the other: ours to find its saturation, vLLM, ours again; so vLLM, the slow one to start, starts once. Requests are
/v1/completions, streamed, of random token ids, 256 to 768 in and 64 to 192 out (uniform), temperature 0.7, no end of
sequence, no prefix cache. Saturation: output tokens a second with --concurrency requests always in flight, over the
mean output of a request. Then Poisson arrivals at 50, 80 and 95 % of the LOWER of the two saturations: both get the
same prompts at the same times.

Times count from the arrival that was due, so a client that lags can hide nothing; its lag and its CPU share stand in
the last rows. Arrivals of the first --warmup seconds of a rate are not counted. TPOT is (last - first chunk) /
(tokens - 1) of a request, ITL the gap between two chunks of a request. --check ends with 1 if a p50 or p99 of ours is
above vLLM's, a request failed, or the client lagged. About 5 minutes with vLLM. Needs `infold` ($INFOLD_BIN, or
target/), and for --vllm a Python that has vLLM. Standard library only.
"""

import argparse
import json
import os
import pathlib
import random
import shlex
import sys
import time

import http_load
import infold_server

# Names of the measures of a run: label, how it is shown. A smaller one is better.
MEASURES = [
    ("TTFT p50", "ms"), ("TTFT p99", "ms"), ("TPOT p50", "ms"), ("TPOT p99", "ms"), ("ITL p50", "ms"), ("ITL p99", "ms"),
]
# A client whose arrivals come so late (p99) is no measure of a server.
MAX_LAG_MS = 5.0
VLLM_ENV = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


def log(text):
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def flags(options, port):
    """Returns what both servers are given."""
    return [
        "--host", "127.0.0.1", "--port", port, "--served-model-name", "bench", "--load-format", "dummy",
        "--dtype", "half", "--max-model-len", options.max_model_len, "--no-enable-prefix-caching",
        "--tensor-parallel-size", options.tensor_parallel_size, "--generation-config", "vllm",
        "--disable-uvicorn-access-log", "--disable-log-stats", *options.both,
    ]


def start_ours(options):
    return infold_server.Server(
        lambda port: [infold_server.infold_binary(), "serve", options.model, *flags(options, port), *options.ours],
        ready_timeout_secs=options.ready_timeout)


def start_peer(options):
    if options.peer_command:
        program = shlex.split(options.peer_command)
    else:
        program = [options.vllm, "-m", "vllm.entrypoints.cli.main", "serve"]
    return infold_server.Server(
        lambda port: [*program, options.model, *flags(options, port), *options.theirs],
        env=VLLM_ENV, ready_timeout_secs=options.ready_timeout)


def vocabulary_size(model):
    """Returns how many ids both config.json and the tokenizer have."""
    vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]
    vocabulary = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    return min(vocab_size, len(vocabulary))


def make_requests(options, seed, count, rate=None):
    """Returns `count` requests; with a rate they arrive as a Poisson process of it, a second."""
    rng, arrival, requests = random.Random(seed), 0.0, []
    ids = range(options.vocab_size)
    for index in range(count):
        if rate is not None:
            arrival += rng.expovariate(rate)
        body = {
            "model": "bench",
            "prompt": rng.choices(ids, k=rng.randint(*options.input_len)),
            "max_tokens": rng.randint(*options.output_len),
            "temperature": 0.7,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        requests.append(http_load.Request(index, body, None if rate is None else arrival))
    return requests


def saturate(server, options, secs):
    """Returns requests a second at saturation, by the tokens of the last three quarters of the time."""
    requests = make_requests(options, seed=1, count=2 * options.concurrency + 64)
    load = http_load.run_load(server.port, requests, options.processes, options.concurrency, secs)
    failed = [answer.error for answer in load.answers if answer.error]
    if failed:
        raise RuntimeError(f"{len(failed)} requests failed: {failed[0]}\n{server.log()}")
    tokens_a_sec = load.tokens_between(secs / 4, secs) / (secs * 3 / 4)
    return {"tok/s": tokens_a_sec, "req/s": tokens_a_sec / (sum(options.output_len) / 2), "client CPU": load.client_cpu}


def percentile(values, percent):
    """Returns the smallest value that `percent` of all do not exceed."""
    values = sorted(values)
    return values[max(0, -(-len(values) * percent // 100) - 1)] if values else float("nan")


def open_loop(server, options, fraction, saturation):
    """Runs one rate and returns its measures, times in ms."""
    rate = fraction * saturation
    count = max(1, round(rate * options.secs))
    requests = make_requests(options, seed=1000 + round(fraction * 100), count=count, rate=rate)
    load = http_load.run_load(server.port, requests, options.processes)
    good = [answer for answer in load.answers if not answer.error]
    errors = [answer.error for answer in load.answers if answer.error]
    counted = [answer for answer in good if answer.scheduled >= load.started + options.warmup]
    times = {
        "TTFT": [answer.first_token_secs for answer in counted],
        "TPOT": [answer.token_secs for answer in counted if answer.token_secs is not None],
        "ITL": [after - before for answer in counted
                for before, after in zip(answer.chunk_times, answer.chunk_times[1:])],
    }
    result = {f"{name} p{percent}": percentile(values, percent) * 1e3
              for name, values in times.items() for percent in (50, 99)}
    lags = [answer.sent - answer.scheduled for answer in load.answers]
    num_chunks = sum(len(answer.chunk_times) for answer in good)
    return {
        **result,
        "rate": rate,
        "requests": len(counted),
        "errors": len(errors),
        "first error": errors[0] if errors else None,
        "output tok/s": load.tokens_between(options.warmup, options.secs) / (options.secs - options.warmup),
        "tokens a chunk": sum(answer.num_tokens for answer in good) / max(1, num_chunks),
        "client CPU": load.client_cpu,
        "lag p99": percentile(lags, 99) * 1e3,
        "lag max": max(lags) * 1e3,
    }


def measure(server, options, saturation):
    """Returns the measures of all rates, by fraction."""
    saturate(server, options, options.settle)
    runs = {}
    for fraction in options.fractions:
        runs[fraction] = open_loop(server, options, fraction, saturation)
        log(f"  {fraction:.0%} ({runs[fraction]['rate']:.1f} requests/s): "
            + ", ".join(f"{name} {runs[fraction][name]:.1f}" for name, _ in MEASURES))
    return runs


def run(options):
    """Runs both servers; returns their results by name: start, saturation, runs."""
    results = {}
    log(f"infold: {options.saturation_secs:.0f} s of saturation")
    with start_ours(options) as server:
        ours = {"start": server.secs_to_ready, "saturation": saturate(server, options, options.saturation_secs)}
        results["infold"] = ours
        log(f"  {ours['saturation']['req/s']:.1f} requests/s")
        lower = ours["saturation"]["req/s"]
        if not options.has_peer:
            ours["runs"] = measure(server, options, lower)
            return results
    log(f"{options.peer_name}: starts")
    with start_peer(options) as server:
        theirs = {"start": server.secs_to_ready, "saturation": saturate(server, options, options.saturation_secs)}
        results["peer"] = theirs
        log(f"  {theirs['saturation']['req/s']:.1f} requests/s")
        lower = min(lower, theirs["saturation"]["req/s"])
        theirs["runs"] = measure(server, options, lower)
    log("infold: again")
    with start_ours(options) as server:
        ours["runs"] = measure(server, options, lower)
    return results


def row(name, theirs, ours, digits=1, ratio=True):
    """Returns a table row; `theirs` is None without a peer."""
    shown = f"{ours:,.{digits}f}"
    if theirs is None:
        return f"| {name} | | {shown} | |"
    return f"| {name} | {theirs:,.{digits}f} | {shown} | {f'{ours / theirs:.2f}' if ratio and theirs else ''} |"


def table(options, results):
    """Returns the Markdown table."""
    ours, peer = results["infold"], results.get("peer")
    get = (lambda *keys: _at(peer, keys)) if peer else (lambda *keys: None)
    lines = [f"| | {options.peer_name if peer else ''} | infold | infold / {options.peer_name} |", "|---|---:|---:|---:|"]
    lines.append(row("start to ready, s", get("start"), ours["start"]))
    lines.append(row("saturation, output tok/s", get("saturation", "tok/s"), ours["saturation"]["tok/s"], 0))
    lines.append(row("saturation, requests/s", get("saturation", "req/s"), ours["saturation"]["req/s"]))
    for fraction in options.fractions:
        run_of_ours = ours["runs"][fraction]
        prefix = f"{fraction:.0%}"
        lines.append(f"| **{prefix}: {run_of_ours['rate']:.1f} requests/s**, {run_of_ours['requests']} counted | | | |")
        for name, unit in MEASURES:
            lines.append(row(f"{prefix} {name}, {unit}", get("runs", fraction, name), run_of_ours[name], 2))
        lines.append(row(f"{prefix} output tok/s", get("runs", fraction, "output tok/s"), run_of_ours["output tok/s"], 0))
        for name, digits in (("errors", 0), ("tokens a chunk", 2), ("client CPU", 2), ("lag p99", 2), ("lag max", 2)):
            unit = ", ms" if name.startswith("lag") else ""
            lines.append(row(f"{prefix} {name}{unit}", get("runs", fraction, name), run_of_ours[name], digits, False))
    return "\n".join(lines)


def _at(value, keys):
    for key in keys:
        value = value[key]
    return value


def faults_of(options, results):
    """Returns what --check complains about, in words."""
    faults = []
    for name, result in results.items():
        for fraction, measured in result["runs"].items():
            where = f"{name} at {fraction:.0%}"
            if measured["errors"]:
                faults.append(f"{where}: {measured['errors']} requests failed: {measured['first error']}")
            if measured["lag p99"] > MAX_LAG_MS:
                faults.append(f"{where}: the client lagged by {measured['lag p99']:.1f} ms (p99): more --processes")
    if "peer" not in results:
        return [*faults, "--check needs --vllm or --peer-command"]
    for fraction in options.fractions:
        ours, theirs = (results[name]["runs"][fraction] for name in ("infold", "peer"))
        for name, unit in MEASURES:
            if not ours[name] <= theirs[name]:
                faults.append(f"{fraction:.0%} {name}: {ours[name]:.2f} {unit} against {theirs[name]:.2f}")
    return faults


def pair(text):
    low, high = (int(part) for part in text.split("-"))
    if not 0 < low <= high:
        raise argparse.ArgumentTypeError(f"expected LOW-HIGH such as 256-768, got {text}")
    return low, high


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, type=pathlib.Path, help="directory with config.json and tokenizer")
    parser.add_argument("--vllm", metavar="PYTHON", help="a Python that has vLLM")
    parser.add_argument("--peer-command", metavar="COMMAND",
                        help="in place of `PYTHON -m vllm.entrypoints.cli.main serve`: model and flags are appended")
    parser.add_argument("--peer-name", default="vLLM", help="name of the other column")
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.5, 0.8, 0.95], help="of the lower saturation")
    parser.add_argument("--secs", type=float, default=15.0, help="length of the arrivals of a rate")
    parser.add_argument("--warmup", type=float, default=3.0, help="of --secs, not counted")
    parser.add_argument("--saturation-secs", type=float, default=20.0, help="length of the closed loop")
    parser.add_argument("--settle", type=float, default=4.0, help="closed loop before the rates, not counted")
    parser.add_argument("--concurrency", type=int, default=256, help="requests in flight at saturation")
    parser.add_argument("--input-len", type=pair, default=(256, 768), metavar="LOW-HIGH")
    parser.add_argument("--output-len", type=pair, default=(64, 192), metavar="LOW-HIGH")
    parser.add_argument("--max-model-len", type=int, default=8192)
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--processes", type=int, default=max(1, min(4, (os.cpu_count() or 1) // 4)), help="of the client")
    parser.add_argument("--ready-timeout", type=float, default=300.0, help="seconds a server may take to start")
    parser.add_argument("--both", type=shlex.split, default=[], metavar="FLAGS", help="further flags of both servers")
    parser.add_argument("--ours", type=shlex.split, default=[], metavar="FLAGS", help="further flags of infold")
    parser.add_argument("--theirs", type=shlex.split, default=[], metavar="FLAGS", help="further flags of the other")
    parser.add_argument("--check", action="store_true", help="end with 1 if ours is above the other's anywhere")
    parser.add_argument("--json", type=pathlib.Path, help="write all results here")
    options = parser.parse_args()
    if not options.secs > options.warmup >= 0:
        parser.error("--warmup must be shorter than --secs")
    options.has_peer = bool(options.vllm or options.peer_command)
    options.vocab_size = vocabulary_size(options.model)
    return options


def main():
    options = parse_options()
    results = run(options)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    print(table(options, results), flush=True)
    faults = faults_of(options, results) if options.check else []
    for fault in faults:
        print("FAULT:", fault)
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
