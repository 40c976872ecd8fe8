#!/usr/bin/env python3
"""Compares 200 greedy tokens of infold and llama.cpp on the same GGUF, up to their first difference.

    pip install xllamacpp && scripts/compare_llama_cpp.py MODEL.gguf [--python PYTHON_WITH_XLLAMACPP]
A first difference is fine only where the two candidates nearly tie: in infold's logprobs the token that llama.cpp
took is less than 0.1 below the best. Ends with 1 otherwise.
"""

import argparse
import pathlib
import sys

import bench_serve

MAX_GAP = 0.1
NUM_TOKENS = 200
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a village by the river, there lived",
    "Water boils at 100 degrees Celsius because",
    "1, 2, 3, 5, 8, 13,",
)


def llama_cpp_tokens(server, token_ids):
    """Returns llama.cpp's greedy continuation of `token_ids`, as ids."""
    body = {
        "prompt": token_ids, "n_predict": NUM_TOKENS, "temperature": 0, "samplers": ["top_k"], "top_k": 1,
        "ignore_eos": True, "return_tokens": True, "cache_prompt": False,
    }
    status, answer = server.post("/completion", body)
    assert status == 200, answer
    return answer["tokens"]


def infold_completion(server, token_ids, max_tokens):
    """Returns infold's greedy tokens and, for each, its logprob and the 20 best as `id text → logprob`."""
    body = {
        "model": "bench", "prompt": token_ids, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True,
        "logprobs": 20, "return_token_ids": True, "return_tokens_as_token_ids": True,
    }
    status, answer = server.post("/v1/completions", body)
    assert status == 200, answer
    choice = answer["choices"][0]
    return choice["token_ids"], choice["logprobs"]


def compare(prompt, token_ids, ours, theirs, logprobs):
    """Prints the first difference of one prompt; returns whether it is a near-tie (or there is none)."""
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))
    if same == NUM_TOKENS:
        print(f"{prompt[:40]!r}: all {NUM_TOKENS} tokens equal")
        return True
    best = logprobs["token_logprobs"][same]
    other = logprobs["top_logprobs"][same].get(f"token_id:{theirs[same]}")
    gap = float("inf") if other is None else best - other
    print(f"{prompt[:40]!r}: {same} equal after {len(token_ids)} prompt tokens, then {ours[same]} ({best:.4f}) "
          f"for llama.cpp's {theirs[same]} ({other}): gap {gap:.4f}")
    return gap < MAX_GAP


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--python", default=sys.executable, help="a Python that has xllamacpp")
    options = parser.parse_args()
    options.serve_args = []
    with bench_serve.start_infold(options) as server:
        prompts = [server.post("/tokenize", {"prompt": prompt})[1]["tokens"] for prompt in PROMPTS]
        ours = [infold_completion(server, token_ids, NUM_TOKENS) for token_ids in prompts]
    with bench_serve.start_llama_cpp(options, 1) as server:
        for prompt, token_ids in zip(PROMPTS, prompts):
            theirs = server.post("/tokenize", {"content": prompt})[1]["tokens"]
            assert theirs == token_ids, f"{prompt!r}: infold's ids {token_ids}, llama.cpp's {theirs}"
        continuations = [llama_cpp_tokens(server, token_ids) for token_ids in prompts]
    near = [
        compare(prompt, token_ids, tokens, theirs, logprobs)
        for prompt, token_ids, (tokens, logprobs), theirs in zip(PROMPTS, prompts, ours, continuations)
    ]
    sys.exit(0 if all(near) else 1)


if __name__ == "__main__":
    main()
