#!/usr/bin/env python3
"""Compares 200 greedy tokens of a model on a GPU with the same on the CPU, up to their first difference.

    scripts/compare_devices.py MODEL [--device cuda:0] [--dtype half] [--tensor-parallel-size N]

MODEL is a directory or a GGUF file; the binary is built with `--features cuda`. As in compare_llama_cpp.py a first
difference is fine only at a near-tie: in the CPU's logprobs the GPU's token is less than 0.1 below the best. The
logprobs of the tokens before it must agree within 0.1, in bfloat16, which has 3 bits less, within 0.2. Ends with 1
otherwise.
"""

import argparse
import sys

import compare_llama_cpp as texts
from infold_server import infold_serve

MAX_DIFFERENCES = {"bfloat16": 0.2}
MAX_DIFFERENCE = 0.1


def answers(model, *args):
    """Returns for each prompt its ids, the greedy tokens and their logprobs."""
    with infold_serve(model, "--served-model-name", "bench", *args) as server:
        prompts = [server.post("/tokenize", {"prompt": prompt})[1]["tokens"] for prompt in texts.PROMPTS]
        return [(ids, *texts.infold_completion(server, ids, texts.NUM_TOKENS)) for ids in prompts]


def compare(prompt, on_cpu, on_gpu, max_difference):
    """Prints the first difference and the largest of logprobs before it; returns whether both are small."""
    ids, want, want_logprobs = on_cpu
    _, got, got_logprobs = on_gpu
    same = next((i for i, (a, b) in enumerate(zip(want, got)) if a != b), len(want))
    pairs = zip(want_logprobs["token_logprobs"][:same], got_logprobs["token_logprobs"][:same])
    largest = max((abs(a - b) for a, b in pairs), default=0.0)
    line = f"{prompt[:40]!r}: {same} of {len(want)} tokens equal after {len(ids)}, logprobs within {largest:.4f}"
    gap = 0.0
    if same < len(want):
        best = want_logprobs["token_logprobs"][same]
        other = want_logprobs["top_logprobs"][same].get(f"token_id:{got[same]}")
        gap = float("inf") if other is None else best - other
        line += f", then a gap of {gap:.4f}"
    print(line, flush=True)
    return gap < texts.MAX_GAP and largest < max_difference


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--device", default="cuda:0", help="of the second run")
    parser.add_argument("--dtype", default="half", help="of the second run")
    parser.add_argument("--tensor-parallel-size", default="1", help="of the second run")
    options = parser.parse_args()
    limits = ["--max-model-len", "512", "--max-num-seqs", "8"]
    on_cpu = answers(options.model, "--device", "cpu", *limits)
    on_gpu = answers(options.model, "--device", options.device, "--dtype", options.dtype,
                     "--tensor-parallel-size", options.tensor_parallel_size, *limits)
    max_difference = MAX_DIFFERENCES.get(options.dtype, MAX_DIFFERENCE)
    near = [compare(*each, max_difference) for each in zip(texts.PROMPTS, on_cpu, on_gpu)]
    sys.exit(0 if all(near) else 1)


if __name__ == "__main__":
    main()
