"""The parts of make_training_goldens.py that need no model: learning rates, data order, initial values, the plot.

Each algorithm that Rust has to repeat is also written out here in plain Python (`Mt19937`, `Pcg64` and what torch
and numpy make of their words) and compared with the library before a golden is written.
"""

import ast
import hashlib
import importlib.util
import json
import logging
import math
import os
import pathlib
import sys
import types

import torch
import transformers

LEARNING_RATE = 5e-4
MASK32, MASK64, MASK128 = 2**32 - 1, 2**64 - 1, 2**128 - 1


def make_schedules(folder):
    """The learning rate of every update under each schedule of transformers and of DeepSpeed."""
    huggingface = []
    names = ["linear", "cosine", "cosine_with_restarts", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"]
    for name in names:
        for steps, warmup in ((20, 0), (20, 2), (7, 3), (20, 20), (480, 48)):
            if name == "polynomial" and steps == warmup:
                continue  # transformers divides by zero at the last step.
            huggingface.append(hf_schedule(name, steps, warmup, {}))
    huggingface += [
        hf_schedule("cosine_with_restarts", 20, 2, dict(num_cycles=3)),
        hf_schedule("cosine_with_restarts", 21, 0, dict(num_cycles=2)),
        hf_schedule("cosine", 20, 2, dict(num_cycles=1.5)),
        hf_schedule("polynomial", 20, 2, dict(lr_end=1e-5, power=2.0)),
        hf_schedule("inverse_sqrt", 20, 2, dict(timescale=5)),
        hf_schedule("cosine_with_min_lr", 20, 2, dict(min_lr=1e-5)),
        hf_schedule("cosine_with_min_lr", 20, 2, dict(min_lr_rate=0.1)),
        hf_schedule("warmup_stable_decay", 20, 2, dict(num_stable_steps=10, num_decay_steps=8)),
        hf_schedule("warmup_stable_decay", 20, 2, dict(num_stable_steps=5, num_decay_steps=5, min_lr_ratio=0.1)),
        hf_schedule("warmup_stable_decay", 20, 0, dict(num_stable_steps=12, num_decay_steps=8, num_cycles=1.5)),
    ]
    deepspeed = []
    for warmup in (0, 1, 2, 5, 48):
        for kind in ("log", "linear"):
            total = 480 if warmup == 48 else 20
            bounds = dict(warmup_min_lr=0.0, warmup_max_lr=LEARNING_RATE, warmup_num_steps=warmup, warmup_type=kind)
            deepspeed.append(deepspeed_list("WarmupLR", total, bounds))
            deepspeed.append(deepspeed_list("WarmupDecayLR", total, dict(total_num_steps=total, **bounds)))
            deepspeed.append(deepspeed_list("WarmupCosineLR", total, dict(
                total_num_steps=total, warmup_num_steps=warmup, warmup_type=kind)))
    deepspeed.append(deepspeed_list("WarmupLR", 20, dict(warmup_min_lr=1e-5, warmup_max_lr=1e-3, warmup_num_steps=6)))
    deepspeed.append(deepspeed_list("WarmupDecayLR", 20, dict(
        total_num_steps=15, warmup_min_lr=1e-5, warmup_max_lr=1e-3, warmup_num_steps=6)))
    deepspeed.append(deepspeed_list("WarmupCosineLR", 20, dict(
        total_num_steps=20, warmup_num_steps=4, warmup_min_ratio=0.1, cos_min_ratio=0.05)))
    write(folder / "schedules.json", dict(
        notes=[
            "rates[t] is the learning rate of update t, from 0; one more entry than updates: the rate after the last.",
            "peak is the optimizer's rate, which WarmupLR and WarmupDecayLR ignore for warmup_max_lr.",
            "DeepSpeed sets the minimum at construction (WarmupCosineLR: 0) and steps after each update, so that"
            " rates[0] is the minimum and rates[t] has batch iteration t - 1: the first two are both the minimum.",
            "warmup_num_steps below 2 counts as 2. log: min + (max - min) * ln(t) / ln(warmup), linear: (t - 1) / warmup.",
            "WarmupDecayLR does not fall below 0 after total_num_steps.",
            "transformers 4.46 takes the scheduler's own default keyword arguments where kwargs is empty.",
        ],
        versions=dict(transformers=transformers.__version__, deepspeed="0.16.3"),
        peak=LEARNING_RATE, transformers=huggingface, deepspeed=deepspeed))


def hf_schedule(name, steps, warmup, kwargs):
    optimizer = dummy_optimizer()
    scheduler = transformers.get_scheduler(name, optimizer, warmup, steps, scheduler_specific_kwargs=kwargs)
    return dict(name=name, num_training_steps=steps, num_warmup_steps=warmup, kwargs=kwargs,
                rates=rates_of(optimizer, scheduler, steps))


def deepspeed_list(name, steps, kwargs):
    optimizer = dummy_optimizer()
    scheduler = deepspeed_schedule(optimizer, name, **kwargs)
    return dict(name=name, num_updates=steps, kwargs=kwargs, rates=rates_of(optimizer, scheduler, steps))


def rates_of(optimizer, scheduler, steps):
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return [float(rate) for rate in rates + [optimizer.param_groups[0]["lr"]]]


def dummy_optimizer():
    return torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=LEARNING_RATE)


def deepspeed_schedule(optimizer, name, **kwargs):
    """Returns a schedule of DeepSpeed's own file, which oracle_stack.sh took out of its source archive."""
    if "deepspeed.lr_schedules" not in sys.modules:
        logger = logging.getLogger("deepspeed")
        logger.setLevel(logging.ERROR)
        for module, fields in (("deepspeed", {}), ("deepspeed.utils", dict(logger=logger))):
            sys.modules[module] = types.ModuleType(module)
            vars(sys.modules[module]).update(fields)
        spec = importlib.util.spec_from_file_location("deepspeed.lr_schedules", stack() / "deepspeed" / "lr_schedules.py")
        sys.modules["deepspeed.lr_schedules"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["deepspeed.lr_schedules"])
        # Only wanted for its type; a plain module must not pass for an installed DeepSpeed.
        del sys.modules["deepspeed"], sys.modules["deepspeed.utils"]
    return getattr(sys.modules["deepspeed.lr_schedules"], name)(optimizer, **kwargs)


def stack():
    """Returns the folder of oracle_stack.sh, which its wrappers name."""
    return pathlib.Path(os.environ["ORACLE_STACK"])


def write(path, data):
    path.write_text(json.dumps(data, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")


make_order = make_init = make_plot = None
