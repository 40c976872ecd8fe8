#!/usr/bin/env python3
"""Measures `infold bench` beside vLLM on the same GPUs in one run, and prints a table with ratios.

    scripts/bench_gpu.py --model DIR --vllm python3       DIR: config.json, and the tokenizer for vLLM
    scripts/bench_gpu.py --model DIR --tensor-parallel-size 4 --vllm python3 --check
    scripts/bench_gpu.py --model DIR                      ours alone

Weights are random in the shape of config.json, in float16; prompts are random ids, tokens are drawn with
temperature 0.7 to the full length, without a prefix cache. Ours runs before and after vLLM. --check ends
with 1 if a ratio is below its goal. Needs `infold` built with `--features cuda` ($INFOLD_BIN, or
target/release/infold), and for --vllm a Python that has vLLM. Standard library only.
"""

import argparse
import json
import os
import pathlib
import random
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Sequences, prompt tokens, drawn tokens; what is compared; the goal of ours over vLLM's on one GPU and
# on four (for milliseconds, of vLLM's over ours).
CASES = [
    ((1, 16, 256), "tok/s", 1.15, 1.3),
    ((8, 128, 256), "tok/s", 1.15, 1.2),
    ((32, 128, 256), "tok/s", 1.15, 1.2),
    ((1, 2048, 1), "ms", 1 / 0.85, 1 / 0.7),
    ((256, 512, 256), "tok/s", 1.1, 1.15),
    ((512, 1024, 128), "tok/s", 1.1, 1.1),
]
MAX_MODEL_LEN = 8192


def case_name(size):
    return f"{size[0]}x{size[1]}/{size[2]}"


def measure_infold(options):
    """Returns seconds to ready and seconds by case."""
    binary = os.environ.get("INFOLD_BIN", ROOT / "target" / "release" / "infold")
    command = [
        binary, "bench", options.model, "--json", "--dummy-weights", "--dtype", "half",
        "--device", options.device, "--max-model-len", MAX_MODEL_LEN, "--no-enable-prefix-caching",
        "--temperature", 0.7, "--repetitions", options.repetitions,
        "--tensor-parallel-size", options.tensor_parallel_size,
        "--case", *[case_name(size) for size in options.sizes],
    ]
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, check=True, text=True)
    # What was measured is not lost when the rest does not end.
    print(f"infold: {done.stdout.strip()}", file=sys.stderr, flush=True)
    report = json.loads(done.stdout)
    seconds = {}
    for case in report["cases"]:
        size = (case["batch_size"], case["input_len"], case["output_len"])
        seconds[size] = size[0] * size[2] / case["output_tok_s"]
    return report["load_seconds"], seconds


def measure_vllm(options):
    """As `measure_infold`, in a process of vLLM's Python."""
    command = [options.vllm, __file__, "--as-vllm", "--model", options.model, "--repetitions",
               options.repetitions, "--tensor-parallel-size", options.tensor_parallel_size,
               "--case", *[case_name(size) for size in options.sizes]]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, check=True, text=True,
                          env=environment)
    # vLLM writes to standard output too.
    line = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")][-1]
    report = json.loads(line.removeprefix("RESULT "))
    return report["start"], {tuple(size): seconds for size, seconds in report["cases"]}


def run_as_vllm(options):
    """Inside vLLM's Python: measures and prints one line."""
    started = time.perf_counter()
    from vllm import LLM, SamplingParams  # pylint: disable=import-error

    llm = LLM(model=options.model, load_format="dummy", dtype="float16", enable_prefix_caching=False,
              tensor_parallel_size=options.tensor_parallel_size, max_model_len=MAX_MODEL_LEN,
              gpu_memory_utilization=0.9, disable_log_stats=True)
    start = time.perf_counter() - started
    rng = random.Random(0)

    def run(size):
        prompts = [{"prompt_token_ids": [rng.randrange(1000, 100000) for _ in range(size[1])]}
                   for _ in range(size[0])]
        params = SamplingParams(temperature=0.7, max_tokens=size[2], ignore_eos=True)
        started = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - started

    cases = []
    for size in options.sizes:
        # The first run warms up and is not counted.
        cases.append((size, statistics.median([run(size) for _ in range(options.repetitions + 1)][1:])))
        print(f"vLLM: {case_name(size)} in {cases[-1][1]:.3f} s", file=sys.stderr, flush=True)
    print("RESULT " + json.dumps({"start": start, "cases": cases}), flush=True)


def print_table(options, ours, theirs):
    """Prints the comparison; returns the names of cases below their goal."""
    missed = []
    start = statistics.median(start for start, _ in ours)
    print("| sequences x prompt/output | vLLM | infold | ratio | goal |\n|---|---:|---:|---:|---:|")
    if theirs is None:
        print(f"| start to ready, s | | {start:.1f} | | |")
    else:
        print(f"| start to ready, s | {theirs[0]:.1f} | {start:.1f} | {theirs[0] / start:.1f} | |")
    for size, unit, goal_of_one, goal_of_more in CASES:
        if size not in options.sizes:
            continue
        goal = goal_of_one if options.tensor_parallel_size == 1 else goal_of_more
        seconds = statistics.median(seconds[size] for _, seconds in ours)

        def shown(seconds):
            return f"{seconds * 1e3:.1f}" if unit == "ms" else f"{size[0] * size[2] / seconds:,.0f}"

        name = f"{case_name(size)}, {unit}"
        if theirs is None:
            print(f"| {name} | | {shown(seconds)} | | |")
            continue
        ratio = theirs[1][size] / seconds
        print(f"| {name} | {shown(theirs[1][size])} | {shown(seconds)} | {ratio:.2f} | {goal:.2f} |")
        if ratio < goal:
            missed.append(name)
    return missed


def parse_case(text):
    sizes = {case_name(size): size for size, *_ in CASES}
    if text not in sizes:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(sizes)}, got {text}")
    return sizes[text]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="directory with config.json")
    parser.add_argument("--vllm", metavar="PYTHON", help="a Python that has vLLM")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--device", default="cuda", help="of infold")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--case", dest="sizes", type=parse_case, nargs="+", default=[size for size, *_ in CASES])
    parser.add_argument("--check", action="store_true", help="end with 1 if a goal is missed")
    parser.add_argument("--as-vllm", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_vllm:
        run_as_vllm(options)
        return
    ours = [measure_infold(options)]
    theirs = None
    if options.vllm:
        theirs = measure_vllm(options)
        ours.append(measure_infold(options))
    missed = print_table(options, ours, theirs)
    if options.check and (missed or theirs is None):
        sys.exit(f"below the goal: {', '.join(missed)}" if missed else "--check needs --vllm")


if __name__ == "__main__":
    main()
