"""Loads adapters into PEFT and compares the logits of base + adapter with those that infold computed.

    DIR/python scripts/check_adapter_with_peft.py BASE ADAPTER LOGITS.json     (DIR: see scripts/oracle_stack.sh)

LOGITS.json: {"token_ids": [...], "positions": [...], "logits": [[...], ...]}, one row of logits per position, as the
files in tests/fixtures/training/adapters have it. Prints the largest difference; fails above 1e-4, or when PEFT finds
a tensor missing or one that it does not know.
"""

import json
import pathlib
import sys

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

TOLERANCE = 1e-4


@torch.no_grad()
def main(base, adapter, logits_file):
    expected = json.loads(pathlib.Path(logits_file).read_text())
    model = AutoModelForCausalLM.from_pretrained(base, torch_dtype=torch.float32, attn_implementation="eager")
    model = PeftModel.from_pretrained(model, adapter).eval()
    # PEFT says nothing of tensors that it has no place for.
    saved = set(load_file(pathlib.Path(adapter) / "adapter_model.safetensors"))
    known = set(get_peft_model_state_dict(model))
    assert saved == known, f"only in the file: {sorted(saved - known)[:5]}; only in PEFT: {sorted(known - saved)[:5]}"
    logits = model(torch.tensor([expected["token_ids"]])).logits[0, expected["positions"]]
    difference = float((logits - torch.tensor(expected["logits"])).abs().max())
    print(f"{adapter}: {len(saved)} tensors, largest difference of a logit {difference:.2e}")
    sys.exit(difference > TOLERANCE)


if __name__ == "__main__":
    main(*sys.argv[1:])
