#!/usr/bin/env python3
"""Loads what `infold merge` writes into transformers and compares its logits with those of the live adapter.

    DIR/python scripts/check_merged_logits.py INFOLD            (DIR: see scripts/oracle_stack.sh)
    DIR/python-peft-0.18 scripts/check_merged_logits.py INFOLD  the cases that only the newer PEFT knows

The cases are those of tests/fixtures/adapters with an f32 base, tied and untied. Both sides are computed in f64, to
which base, adapter and merged weights are widened exactly, so that what differs is what the merge rounded. Prints the
largest difference of each case as a part of the largest logit, and the same of a merge by PEFT in f64, which shows how
little of it comes from elsewhere; fails at TOLERANCE.
"""

import json
import pathlib
import subprocess
import sys
import tempfile
from unittest import mock

import peft
import torch
import transformers
from make_adapter_fixtures import ADAPTERS, base_path, load
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

# As parts of the largest logit. The rounding of an f32 weight is 6e-8 of it.
TOLERANCE = 1e-6
F64_TOLERANCE = 1e-10


@torch.no_grad()
def f64_logits(model, prompt):
    """Returns the logits of all positions of a prompt. A model's own type is what norms and softmax are computed in."""
    # transformers calls it by name: norms and softmax are computed in torch.float32, whatever the model's type is.
    with mock.patch.object(torch, "float32", torch.float64):
        logits = model.double().eval()(torch.tensor([prompt])).logits[0]
    assert logits.dtype == torch.float64
    return logits


def live_differences(output, base, adapter, prompt, *, resize=None, untie=False):
    """Returns how far the logits of a merged directory, and those of PEFT's merge in f64, are from the live adapter's.

    Both as parts of the largest logit. `untie`: whether the merge takes embedding and head apart.
    """
    live = f64_logits(PeftModel.from_pretrained(load(base, resize=resize), adapter), prompt)
    widened = PeftModel.from_pretrained(load(base, resize=resize, untie=untie), adapter).double().merge_and_unload()
    merged = AutoModelForCausalLM.from_pretrained(output, torch_dtype="auto", attn_implementation="eager")
    largest = float(live.abs().max())
    return [float((f64_logits(model, prompt) - live).abs().max()) / largest for model in (merged, widened)]


def merge(infold, base, adapter, output):
    command = [infold, "merge", "--model", base_path(base), "--adapter", adapter, "--output", output]
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)


def main(infold):
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    described = json.loads((ADAPTERS / "cases.json").read_text())
    worst = count = num_tied = 0
    for case in described["cases"]:
        # The goldens of the live adapter mark the cases with an f32 base and one adapter.
        is_live = (ADAPTERS / case["case"] / "live_logits.safetensors").exists()
        if not is_live or case["peft"] != peft.__version__:
            continue
        model_type = json.loads((base_path(case["base"]) / "config.json").read_text())["model_type"]
        if model_type not in transformers.CONFIG_MAPPING:
            print(f"{case['case']:40} not compared: this transformers has no {model_type}")
            continue
        adapter = ADAPTERS / case["adapters"][0]["dir"]
        with tempfile.TemporaryDirectory() as folder:
            output = pathlib.Path(folder) / "merged"
            merge(infold, case["base"], adapter, output)
            difference, in_f64 = live_differences(
                output,
                case["base"],
                adapter,
                described["prompt_token_ids"],
                resize=case["config_changes"].get("vocab_size"),
                untie=case["config_changes"].get("tie_word_embeddings") is False,
            )
        was_tied = AutoConfig.from_pretrained(base_path(case["base"])).tie_word_embeddings
        now_tied = "tied" if case["tie_word_embeddings"] else "untied"
        print(
            f"{case['case']:40} {'tied' if was_tied else 'untied':6} -> {now_tied:6} "
            f"{difference:.1e} of the largest logit, merged in f64 {in_f64:.1e}"
        )
        assert in_f64 < F64_TOLERANCE, "the comparison itself rounds"
        worst, count, num_tied = max(worst, difference), count + 1, num_tied + was_tied
    print(f"PEFT {peft.__version__}: {count} cases, {num_tied} on tied bases, largest difference {worst:.1e}")
    sys.exit(worst >= TOLERANCE or count == 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
