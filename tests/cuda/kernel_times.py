#!/usr/bin/env python3
"""Runs a program and prints what each CUDA kernel took in its steps, launched or replayed.

    tests/cuda/kernel_times.py [--steps LOW HIGH] [--end sample] -- target/release/infold bench ...

A step ends with a kernel whose name begins with --end. --steps takes those of LOW to HIGH milliseconds
alone: prompts, say, or decodes of one batch. Kernels that were launched early count the time that they
wait for their predecessor. Of one process, on as many GPUs as it likes, each with steps of its own. Needs a
C++ compiler and the CUDA toolkit in CUDA_HOME (/usr/local/cuda) with its CUPTI; for want of that the Python
package nvidia-cuda-cupti. --trace FILE reads lines that kernel_trace.cpp has written. Standard library only.
"""

import argparse
import collections
import importlib.util
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path


def cupti_folders():
    """Returns the folders of CUPTI's headers and of its library."""
    cuda = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    roots = [cuda, cuda / "extras" / "CUPTI"]
    package = importlib.util.find_spec("nvidia")
    for place in package.submodule_search_locations if package else []:
        roots += [Path(place) / "cu13", Path(place) / "cuda_cupti"]
    for root in roots:
        libraries = [path for folder in ["lib", "lib64"] for path in (root / folder).glob("libcupti.so.[0-9]*")]
        if libraries and (root / "include" / "cupti.h").exists():
            return [root / "include", cuda / "include"], libraries[0]
    sys.exit(f"none of {', '.join(map(str, roots))} has include/cupti.h and a libcupti.so.N")


def trace(command, folder):
    """Runs the command under the tracing library; returns the file of its lines."""
    headers, cupti = cupti_folders()
    library, lines = folder / "libkernel_trace.so", folder / "kernels.txt"
    source = Path(__file__).with_name("kernel_trace.cpp")
    subprocess.run(["c++", "-O2", "-std=c++17", "-shared", "-fPIC", *[f"-I{path}" for path in headers],
                    source, "-o", library, cupti], check=True)
    path = ":".join(filter(None, [os.environ.get("LD_LIBRARY_PATH"), str(cupti.parent)]))
    environment = {**os.environ, "CUDA_INJECTION64_PATH": str(library), "KERNEL_TRACE": str(lines),
                   "LD_LIBRARY_PATH": path}
    done = subprocess.run(command, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{command[0]} ended with {done.returncode}")
    if not lines.exists():
        sys.exit(f"{command[0]} did not start CUDA")
    return lines


def read_steps(lines, end):
    """Returns the steps of all GPUs, lists of (start, end, name) in µs."""
    kernels = []
    for line in lines.read_text().splitlines():
        gpu, start, stop, name = line.split(" ", 3)
        kernels.append((int(gpu), int(start) / 1e3, int(stop) / 1e3, re.sub(r"\(.*", "", name)))
    steps, open_steps = [], collections.defaultdict(list)
    for gpu, *kernel in sorted(kernels):
        open_steps[gpu].append(kernel)
        if kernel[2].startswith(end):
            steps.append(open_steps.pop(gpu))
    return steps


def span_ms(step):
    return (step[-1][1] - step[0][0]) / 1e3


def print_table(steps):
    times = collections.defaultdict(list)
    for step in steps:
        for start, stop, name in step:
            times[name].append(stop - start)
    print("| kernel | µs a step | times a step | median µs |\n|---|---:|---:|---:|")
    for name, each in sorted(times.items(), key=lambda item: -sum(item[1])):
        print(f"| {name[:60]} | {sum(each) / len(steps):,.0f} | {len(each) / len(steps):.1f} | "
              f"{statistics.median(each):,.1f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=float, nargs=2, default=[0, float("inf")], metavar=("LOW", "HIGH"),
                        help="milliseconds of the steps that count (all)")
    parser.add_argument("--end", default="sample", help="how the last kernel of a step begins (sample)")
    parser.add_argument("--trace", type=Path, help="a file of lines, in place of a command")
    parser.add_argument("command", nargs="*")
    options = parser.parse_args()
    if bool(options.command) == bool(options.trace):
        parser.error("expected -- and a command, or --trace FILE")
    with tempfile.TemporaryDirectory() as folder:
        steps = read_steps(options.trace or trace(options.command, Path(folder)), options.end)
    low, high = options.steps
    chosen = [step for step in steps if low <= span_ms(step) < high]
    if not chosen:
        sys.exit(f"of {len(steps)} steps none took {low:g} to {high:g} ms")
    print(f"{len(chosen)} of {len(steps)} steps, median {statistics.median(map(span_ms, chosen)):.2f} ms")
    print_table(chosen)


if __name__ == "__main__":
    main()
