"""Makes tests/fixtures/training: what transformers 4.46.2, PEFT 0.12.0 and torch compute when they train LoRA.

The results are committed and the Rust tests read only them. To make them again (see scripts/oracle_stack.sh):

    scripts/oracle_stack.sh /tmp/oracle newer
    /tmp/oracle/python scripts/make_training_goldens.py                    # all parts
    /tmp/oracle/python-newer scripts/make_training_goldens.py              # adds Qwen3, which 4.46.2 does not know

Names of parts after the script make only those. This file has the numeric parts (`gradients`, `trajectories`,
`adapters`); training_order_goldens.py has `schedules`, `order`, `init` and `plot`. Everything runs in f32 on the
CPU with eager attention, dropout 0 and one thread. tests/fixtures/training/README.md describes the files.
"""

import json
import math
import pathlib
import shutil
import sys
import tempfile
import warnings

import peft
import torch
import transformers
from make_adapter_fixtures import ALL_LINEAR, edit_config, load, logits_of, make_adapter, PROMPT, write_json
from peft import PeftModel
from safetensors.torch import save_file

TRAINING = pathlib.Path(__file__).resolve().parent.parent / "tests" / "fixtures" / "training"
NEWER = not peft.__version__.startswith("0.12.")
NUM_STEPS = 20


def main():
    import training_order_goldens as order

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    parts = dict(gradients=make_gradients, trajectories=make_trajectories, adapters=make_adapters)
    if not NEWER:
        parts.update(schedules=order.make_schedules, order=order.make_order, init=order.make_init, plot=order.make_plot)
    for name in sys.argv[1:] or parts:
        (TRAINING / name).mkdir(parents=True, exist_ok=True)
        parts[name](TRAINING / name)
    total = sum(path.stat().st_size for path in TRAINING.rglob("*") if path.is_file())
    print(f"training goldens: {total / 1e6:.2f} MB")


def make_gradients(folder):
    """Loss and LoRA gradients of one batch of sequences of different lengths."""
    full = dict(r=8, lora_alpha=32, lora_dropout=0.0, target_modules=ALL_LINEAR)
    some = dict(full, target_modules=["q_proj", "v_proj"])
    head = dict(r=2, lora_alpha=4, target_modules=["down_proj"], modules_to_save=["lm_head"])
    # On a tied base the copies of embedding and head come apart. "norm" names every module that ends so.
    tables = dict(r=2, lora_alpha=4, target_modules=["v_proj"], modules_to_save=["embed_tokens", "lm_head"])
    small = dict(r=2, lora_alpha=4, target_modules=["q_proj"], modules_to_save=["norm", "k_proj"])
    cases = [
        ("qwen2_all_linear", "tiny-qwen2", full),
        ("qwen2_q_v", "tiny-qwen2", some),
        ("qwen2_rslora", "tiny-qwen2", dict(some, use_rslora=True)),
        ("qwen2_dora", "tiny-qwen2", dict(some, target_modules=["q_proj", "o_proj", "up_proj"], use_dora=True)),
        ("qwen2_fresh", "tiny-qwen2-untied", dict(full, r=4)),
        ("llama_all_linear", "tiny-llama", full),
        ("llama_modules_to_save", "tiny-llama", head),
        ("llama_lora_on_lm_head", "tiny-llama", dict(r=4, lora_alpha=8, target_modules=["lm_head", "up_proj"])),
        ("qwen2_whole_tables", "tiny-qwen2", tables),
        ("qwen2_whole_norms_and_k_proj", "tiny-qwen2", small),
    ]
    if NEWER:
        cases = [("qwen3_all_linear", "tiny-qwen3", full)]
    entries = kept(folder / "cases.json")
    for name, base, config in cases:
        # B is zero in a fresh adapter, and so is the gradient of A; elsewhere B is random.
        fresh = name.endswith("fresh")
        new_adapter(base, config, folder / name, name, zero_b=fresh)
        model = trainable(base, folder / name)
        batch = list(range(8))
        loss, gradients = gradients_of(model, [batch])
        save_file(gradients, folder / name / "gradients.safetensors", metadata={"format": "pt"})
        _, exact = gradients_of(trainable(base, folder / name).double(), [batch])
        entries.append(
            dict(
                case=name,
                peft=peft.__version__,
                transformers=transformers.__version__,
                base=base,
                adapter=name,
                sequences=batch,
                loss=loss,
                num_target_tokens=num_targets(batch),
                token_losses=token_losses(model, batch),
                grad_norm=norm_of(gradients),
                gradients=f"{name}/gradients.safetensors",
                f32_noise=max(relative(value, exact[key]) for key, value in gradients.items()),
            )
        )
        print(name, loss, entries[-1]["grad_norm"], entries[-1]["f32_noise"])
    write_json(
        folder / "cases.json", dict(sequences=sequences(), cases=sorted(entries, key=lambda entry: entry["case"]))
    )


def make_trajectories(folder):
    """Twenty AdamW updates: loss, norm, learning rate of each, and the adapter at the end."""
    lora = dict(r=2, lora_alpha=8, lora_dropout=0.0, target_modules=ALL_LINEAR)
    cosine = dict(lr_scheduler_type="cosine", warmup_ratio=0.1)
    cases = [
        ("cosine_accumulation_1", "tiny-qwen2", lora, dict(accumulation=1, **cosine)),
        ("cosine_accumulation_4", "tiny-qwen2", lora, dict(accumulation=4, **cosine)),
        (
            "warmup_lr_accumulation_4",
            "tiny-qwen2",
            lora,
            dict(accumulation=4, deepspeed_scheduler=dict(type="WarmupLR", warmup_num_steps=5), weight_decay=0.01),
        ),
        (
            "warmup_lr_accumulation_1",
            "tiny-qwen2",
            lora,
            dict(accumulation=1, deepspeed_scheduler=dict(type="WarmupLR", warmup_num_steps=0), weight_decay=0.01),
        ),
        (
            "constant_without_clip",
            "tiny-qwen2",
            lora,
            dict(accumulation=1, lr_scheduler_type="constant", max_grad_norm=0.0),
        ),
        (
            "linear_weight_decay",
            "tiny-qwen2",
            lora,
            dict(accumulation=1, lr_scheduler_type="linear", warmup_steps=3, weight_decay=0.1, max_grad_norm=8.0),
        ),
        (
            "lora_plus",
            "tiny-qwen2",
            lora,
            dict(accumulation=1, weight_decay=0.01, loraplus_lr_ratio=16.0, learning_rate=5e-4, **cosine),
        ),
        (
            "llama_accumulation_2",
            "tiny-llama",
            dict(lora, target_modules=["q_proj", "v_proj"], r=4),
            dict(accumulation=2, **cosine),
        ),
        (
            "dora_accumulation_2",
            "tiny-qwen2",
            dict(lora, target_modules=["q_proj", "o_proj", "up_proj"], use_dora=True),
            dict(accumulation=2, **cosine),
        ),
        (
            "whole_modules_accumulation_2",
            "tiny-qwen2",
            dict(lora, target_modules=["v_proj"], modules_to_save=["embed_tokens", "lm_head", "norm"]),
            dict(accumulation=2, **cosine),
        ),
        (
            "llama_lora_on_lm_head",
            "tiny-llama",
            dict(lora, target_modules=["lm_head"]),
            dict(accumulation=1, **cosine),
        ),
    ]
    if NEWER:
        cases = [
            (
                "qwen3_accumulation_2",
                "tiny-qwen3",
                dict(lora, target_modules=["q_proj", "v_proj"], r=4),
                dict(accumulation=2, **cosine),
            )
        ]
    entries = kept(folder / "cases.json")
    for name, base, config, options in cases:
        options = dict(
            dict(
                learning_rate=2e-3,
                weight_decay=0.0,
                max_grad_norm=1.0,
                adam_beta1=0.9,
                adam_beta2=0.999,
                adam_epsilon=1e-8,
                warmup_steps=0,
                micro_batch_size=2,
            ),
            **options,
        )
        new_adapter(base, config, folder / name / "initial", name, zero_b=True)
        initial = folder / name / "initial"
        log, state = train(trainable(base, initial), options)
        save_file(state, folder / name / "final.safetensors", metadata={"format": "pt"})
        _, exact = train(trainable(base, initial).double(), options)
        entry = dict(
            case=name,
            peft=peft.__version__,
            base=base,
            adapter=f"{name}/initial",
            final=f"{name}/final.safetensors",
            options=options,
            steps=log,
            f32_noise=max(float((value - exact[key]).abs().max()) for key, value in state.items()),
            trainer_4_46_2=(
                None
                if NEWER or "deepspeed_scheduler" in options or "loraplus_lr_ratio" in options
                else compare_with_trainer(trainable(base, initial), options, log, state)
            ),
        )
        entries.append(entry)
        norms = [step["grad_norm"] for step in log]
        print(
            name, log[0]["loss"], log[-1]["loss"], min(norms), max(norms), entry["f32_noise"], entry["trainer_4_46_2"]
        )
    write_json(
        folder / "cases.json", dict(sequences=sequences(), cases=sorted(entries, key=lambda entry: entry["case"]))
    )


def train(model, options):
    """Runs NUM_STEPS updates with torch's AdamW and returns the log and the trained tensors.

    The one loss definition: the mean over all target tokens of the update's micro-batches together.
    """
    optimizer, scheduler = optimizer_and_scheduler(model, options)
    log = []
    for step in range(NUM_STEPS):
        micro_batches = micro_batches_of(step, options)
        loss, gradients = gradients_of(model, micro_batches)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        norm = norm_of(gradients)
        if options["max_grad_norm"] > 0:
            norm = float(torch.nn.utils.clip_grad_norm_(parameters, options["max_grad_norm"]))
        entry = dict(
            micro_batches=micro_batches,
            num_target_tokens=sum(map(num_targets, micro_batches)),
            loss=loss,
            grad_norm=norm,
            learning_rates=[group["lr"] for group in optimizer.param_groups],
        )
        optimizer.step()
        scheduler.step()
        entry["learning_rates_after"] = [group["lr"] for group in optimizer.param_groups]
        log.append(entry)
    return log, trained_tensors(model)


def optimizer_and_scheduler(model, options):
    """Returns torch's AdamW, in LLaMA-Factory's groups under LoRA+, and HF's or DeepSpeed's schedule."""
    import training_order_goldens as order

    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    rate, decay = options["learning_rate"], options["weight_decay"]
    groups = [dict(params=[parameter for _, parameter in named], lr=rate, weight_decay=decay)]
    if "loraplus_lr_ratio" in options:
        a = [parameter for name, parameter in named if "lora_B" not in name]
        b = [parameter for name, parameter in named if "lora_B" in name]
        groups = [
            dict(params=a, lr=rate, weight_decay=decay),
            dict(params=b, lr=rate * options["loraplus_lr_ratio"], weight_decay=decay),
        ]
    optimizer = torch.optim.AdamW(
        groups, lr=rate, betas=(options["adam_beta1"], options["adam_beta2"]), eps=options["adam_epsilon"]
    )
    if "deepspeed_scheduler" in options:
        config = dict(options["deepspeed_scheduler"])
        return optimizer, order.deepspeed_schedule(
            optimizer, config.pop("type"), warmup_min_lr=0.0, warmup_max_lr=rate, **config
        )
    return optimizer, transformers.get_scheduler(
        options["lr_scheduler_type"], optimizer, warmup_count(options), NUM_STEPS
    )


def warmup_count(options):
    return options["warmup_steps"] or math.ceil(NUM_STEPS * options.get("warmup_ratio", 0.0))


def micro_batches_of(step, options):
    """Returns the sequence numbers of each micro-batch of an update: the pool in order, round and round."""
    size, count = options["micro_batch_size"], options["accumulation"]
    pool = len(sequences())
    first = step * size * count
    return [[(first + micro * size + row) % pool for row in range(size)] for micro in range(count)]


def gradients_of(model, micro_batches):
    """Returns the loss and the gradients of the token mean over all micro-batches, leaving them in `.grad`."""
    model.zero_grad(set_to_none=True)
    targets = sum(map(num_targets, micro_batches))
    total = 0.0
    for batch in micro_batches:
        loss = model(**padded(batch), num_items_in_batch=targets).loss
        loss.backward()
        total += float(loss)
    gradients = {
        saved_name(name): parameter.grad.clone().float()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    return total, dict(sorted(gradients.items()))


def compare_with_trainer(model, options, log, state):
    """Runs the same updates in transformers' own Trainer, asserts that they agree and returns the differences.

    The Trainer divides by the number of labels, the first of a sequence included, which no position predicts;
    the collator here masks that one, so that it counts what is summed.
    """
    order = [index for step in range(NUM_STEPS) for batch in micro_batches_of(step, options) for index in batch]

    class Fixed(transformers.Trainer):
        def _get_train_sampler(self):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    with tempfile.TemporaryDirectory() as output:
        arguments = transformers.TrainingArguments(
            output,
            per_device_train_batch_size=options["micro_batch_size"],
            max_steps=NUM_STEPS,
            logging_steps=1,
            gradient_accumulation_steps=options["accumulation"],
            learning_rate=options["learning_rate"],
            weight_decay=options["weight_decay"],
            max_grad_norm=options["max_grad_norm"],
            optim="adamw_torch",
            lr_scheduler_type=options["lr_scheduler_type"],
            warmup_ratio=options.get("warmup_ratio", 0.0),
            warmup_steps=options["warmup_steps"],
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
            logging_nan_inf_filter=False,
        )
        trainer = Fixed(model=model, args=arguments, train_dataset=order, data_collator=without_first_label)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == NUM_STEPS
    trained = trained_tensors(model)
    differences = dict(
        max_loss_difference=max(abs(entry["loss"] - ours["loss"]) for entry, ours in zip(logs, log)),
        max_grad_norm_difference=(
            max(abs(entry["grad_norm"] - ours["grad_norm"]) for entry, ours in zip(logs, log))
            if options["max_grad_norm"] > 0
            else None
        ),
        max_learning_rate_difference=max(
            abs(entry["learning_rate"] - ours["learning_rates_after"][0]) for entry, ours in zip(logs, log)
        ),
        max_final_difference=max(float((value - trained[key]).abs().max()) for key, value in state.items()),
    )
    # The Trainer rounds the losses that it logs to four decimals; without clipping it logs no norm.
    assert differences["max_loss_difference"] < 6e-5 and differences["max_final_difference"] < 1e-6, differences
    return differences


def without_first_label(batch):
    inputs = padded(batch)
    inputs["labels"][:, 0] = -100
    return inputs


def make_adapters(folder):
    """An adapter as this version of PEFT saves it, and the logits of base + adapter, for others to load."""
    for base in ("tiny-qwen3",) if NEWER else ("tiny-qwen2", "tiny-llama"):
        name = f"peft-{peft.__version__}-{base}"
        config = dict(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=ALL_LINEAR)
        new_adapter(base, config, folder / name, name, zero_b=False)
        logits = logits_of(PeftModel.from_pretrained(load(base), folder / name))
        write_json(
            folder / name / "logits.json",
            dict(
                base=base,
                peft=peft.__version__,
                token_ids=PROMPT,
                positions=[len(PROMPT) - 2, len(PROMPT) - 1],
                logits=[[round(float(value), 6) for value in row] for row in logits],
            ),
            indent=None,
        )


def new_adapter(base, config, folder, seed, *, zero_b):
    """Saves an adapter of `base` with random A, and B either zero, as a run begins, or random."""
    shutil.rmtree(folder, ignore_errors=True)

    def prepare(model):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and zero_b and "lora_B" in name:
                parameter.data.zero_()

    make_adapter(base, dict(config), folder, seed, prepare=prepare)
    edit_config(folder, base_model_name_or_path=base)


def trainable(base, folder):
    return PeftModel.from_pretrained(load(base), folder, is_trainable=True).train()


def trained_tensors(model):
    tensors = {
        saved_name(name): parameter.detach().clone().float()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    return dict(sorted(tensors.items()))


def saved_name(name):
    """Returns the name that PEFT gives a trained tensor in adapter_model.safetensors."""
    name = name.replace(".default", "").replace("modules_to_save.", "")
    return name.removesuffix(".weight") if "lora_magnitude_vector" in name else name


def sequences():
    """Returns the pool of token sequences with their labels: lengths from 2 to 33, prompts masked with -100."""
    generator = torch.Generator().manual_seed(77)
    lengths = [12, 33, 5, 21, 2, 17, 9, 28, 3, 14, 25, 7]
    pool = []
    for index, length in enumerate(lengths):
        ids = torch.randint(0, 509, (length,), generator=generator).tolist()
        labels = [-100] * (length // 3) + ids[length // 3 :]
        if index == 1:  # Two turns: two spans of targets.
            labels = [-100] * 8 + ids[8:15] + [-100] * 10 + ids[25:]
        if index == 5:  # Trained on the prompt too; the first label has no position that predicts it.
            labels = list(ids)
        if index == 8:  # No target at all.
            labels = [-100] * length
        pool.append(dict(input_ids=ids, labels=labels))
    return pool


def num_targets(batch):
    """Counts the labels that a position before them predicts."""
    return sum(label != -100 for index in batch for label in sequences()[index]["labels"][1:])


def padded(batch):
    """Returns a batch padded on the right, as the collator does."""
    rows = [sequences()[index] for index in batch]
    width = max(len(row["input_ids"]) for row in rows)

    def pad(values, filler):
        return torch.tensor([value + [filler] * (width - len(value)) for value in values])

    return dict(
        input_ids=pad([row["input_ids"] for row in rows], 509),
        labels=pad([row["labels"] for row in rows], -100),
        attention_mask=pad([[1] * len(row["input_ids"]) for row in rows], 0),
    )


@torch.no_grad()
def token_losses(model, batch):
    """Returns per sequence the loss of each of its target tokens, one sequence at a time and unpadded."""
    result = []
    for index in batch:
        row = sequences()[index]
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].double()
        labels = torch.tensor(row["labels"][1:])
        losses = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="none")
        result.append([round(float(loss), 6) for loss, label in zip(losses, labels) if label != -100])
    return result


def norm_of(gradients):
    return math.sqrt(sum(float(value.double().pow(2).sum()) for value in gradients.values()))


def relative(value, exact):
    """The error measure of the tests: largest difference over the largest magnitude of the tensor."""
    return float((value - exact).abs().max() / exact.abs().max().clamp_min(1e-12))


def kept(path):
    """Returns the entries that the other version of PEFT has made."""
    if not path.exists():
        return []
    return [case for case in json.loads(path.read_text())["cases"] if case["peft"].startswith("0.12.") == NEWER]


if __name__ == "__main__":
    sys.modules["make_training_goldens"] = sys.modules["__main__"]
    main()
