#!/usr/bin/env python3
"""Loads what `infold merge` writes into transformers and compares its logits with those of the live adapter.

    DIR/python scripts/check_merged_logits.py INFOLD          (DIR: see scripts/oracle_stack.sh)
    DIR/python-newer scripts/check_merged_logits.py INFOLD    the cases that only the newer PEFT knows

The live logits are the goldens of tests/fixtures/adapters, f32, tied and untied. Prints the largest difference of each
case, and that of PEFT's own merge; fails above TOLERANCE.
"""

import json
import pathlib
import subprocess
import sys
import tempfile

import peft
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

FIXTURES = pathlib.Path(__file__).resolve().parent.parent / "tests" / "fixtures"
ADAPTERS = FIXTURES / "adapters"
# Of logits up to 10, as PEFT's own merge is asked to keep; live, B(Ax) is rounded elsewhere than (W + BA)x.
TOLERANCE = 2e-5


@torch.no_grad()
def difference(infold, case, prompt, live):
    base = FIXTURES / case["base"]
    if not base.exists():
        base = ADAPTERS / "bases" / case["base"]
    with tempfile.TemporaryDirectory() as folder:
        output = pathlib.Path(folder) / "merged"
        adapter = ADAPTERS / case["adapters"][0]["dir"]
        command = [infold, "merge", "--model", base, "--adapter", adapter, "--output", output]
        subprocess.run([str(part) for part in command], check=True, capture_output=True)
        model = AutoModelForCausalLM.from_pretrained(output, torch_dtype=torch.float32, attn_implementation="eager")
    logits = model.eval()(torch.tensor([prompt])).logits[0]
    # The goldens hold the last positions only.
    return float((logits[-len(live) :] - live).abs().max()), float(live.abs().max())


def main(infold):
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    described = json.loads((ADAPTERS / "cases.json").read_text())
    worst = count = 0
    for case in described["cases"]:
        golden = ADAPTERS / case["case"] / "live_logits.safetensors"
        if case["peft"] != peft.__version__ or not golden.exists():
            continue
        (live,) = load_file(golden).values()
        found, largest = difference(infold, case, described["prompt_token_ids"], live.reshape(-1, live.shape[-1]))
        tied = "tied" if case["tie_word_embeddings"] else "untied"
        print(
            f"{case['case']:40} {tied:7} {found:.1e} of logits up to {largest:.2f}, "
            f"PEFT's own merge {case['max_live_difference']:.1e}"
        )
        worst, count = max(worst, found), count + 1
    print(f"{count} cases, largest difference {worst:.1e}")
    sys.exit(worst > TOLERANCE or count == 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
