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


def make_order(folder):
    """In which order examples are drawn: accelerate's batches, num_samples, val_size."""
    epochs = []
    for num_examples in (10, 2030):
        for seed in (42, 7):
            for epoch in range(3):
                batch_sizes = (4, 3, 1) if num_examples == 10 else (4,)
                epochs.append(epoch_entry(num_examples, seed, epoch, batch_sizes))
    for size in (1, 2, 3, 5, 64, 1000):
        epochs.append(epoch_entry(size, 42, 0, (2,)))
    check_trainer_order(10, 4)
    write(folder / "sampler.json", dict(notes=SAMPLER_NOTES, epochs=epochs))
    write(folder / "num_samples.json", dict(notes=NUM_SAMPLES_NOTES, cases=[
        num_samples_entry(seed, datasets) for seed, datasets in (
            (42, [(10, 4)]), (42, [(10, 10)]), (42, [(10, 25)]), (7, [(10, 25)]), (42, [(100, 30), (10, 25), (5, 3)]),
            (42, [(1, 3)]), (42, [(2030, 12)]), (0, [(300, 310)]))]))
    write(folder / "val_size.json", dict(notes=VAL_SIZE_NOTES, cases=[
        val_size_entry(num_examples, seed, size) for num_examples, seed, size in (
            (10, 42, 0.1), (10, 42, 0.25), (10, 7, 3), (91, 42, 0.1), (91, 0, 0.05), (91, 42, 90), (2030, 42, 0.1),
            (2030, 42, 200), (2, 42, 0.5), (3, 2**32 + 5, 0.34))]))


def epoch_entry(num_examples, seed, epoch, batch_sizes):
    """One epoch's permutation and every rank's batches, from accelerate's own samplers."""
    from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler
    from torch.utils.data import BatchSampler

    def batches(batch_size, world_size, rank):
        sampler = SeedableRandomSampler(range(num_examples), data_seed=seed)
        sampler.set_epoch(epoch)
        batch_sampler = BatchSampler(sampler, batch_size, drop_last=False)
        if world_size > 1:  # accelerate leaves the sampler of a single process alone.
            batch_sampler = BatchSamplerShard(batch_sampler, world_size, rank, even_batches=True)
        return [[int(index) for index in batch] for batch in batch_sampler]

    permutation = [index for batch in batches(num_examples, 1, 0) for index in batch]
    assert permutation == torch_randperm(num_examples, seed + epoch)
    shards = []
    for batch_size in batch_sizes:
        for world_size in (1, 2, 8):
            ranks = [batches(batch_size, world_size, rank) for rank in range(world_size)]
            shards.append(dict(batch_size=batch_size, world_size=world_size, ranks=[
                shard if num_examples <= 10 else dict(num_batches=len(shard), first=shard[0], last=shard[-1],
                                                      sha256=digest(shard)) for shard in ranks]))
    return dict(num_examples=num_examples, seed=seed, epoch=epoch, permutation=permutation, shards=shards)


def check_trainer_order(num_examples, batch_size):
    """Asserts that a whole run of transformers' Trainer visits the examples in the order that is written down."""
    import tempfile

    class Recorder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.seen = []

        def forward(self, index, labels=None):
            self.seen.append(index.tolist())
            return dict(loss=self.weight.sum())

    model = Recorder()
    with tempfile.TemporaryDirectory() as output:
        arguments = transformers.TrainingArguments(
            output, per_device_train_batch_size=batch_size, num_train_epochs=3, report_to=[], save_strategy="no",
            use_cpu=True, disable_tqdm=True, logging_strategy="no", remove_unused_columns=False, seed=42)
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=list(range(num_examples)),
                                       data_collator=lambda rows: dict(index=torch.tensor(rows)))
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    flat = [index for batch in model.seen for index in batch]
    assert flat == [index for epoch in range(3) for index in torch_randperm(num_examples, 42 + epoch)], flat


SAMPLER_NOTES = [
    "accelerate 1.1.1 (SeedableRandomSampler, BatchSampler, BatchSamplerShard with even_batches) under torch 1.13.1;"
    " torch 2.6 draws the same permutations. The seed is data_seed, else seed; epoch e draws with seed + e.",
    "torch.randperm(n) with a CPU generator: MT19937 seeded with the low 32 bits (Knuth's initialisation, multiplier"
    " 1812433253); r = 0..n-1; for i in 0..n-2: z = next_u32 % (n - i), swap r[i] and r[i + z].",
    "Batches are cut from the permutation, the last may be short; with one process that is all. With W processes, rank"
    " p gets batches p, p + W, ...; the end is filled from initial = the first W batches (doubled until it has at"
    " least W * batch_size entries), read from its start: first the short batch is filled, then whole batches follow"
    " until the number of batches is a multiple of W. With 10 or fewer examples `ranks` lists the batches of each rank;"
    " else num_batches, first, last and the sha256 of the indices joined by commas.",
    "transformers.Trainer (4.46.2) visits them in this order in a run of three epochs (checked when made).",
]
NUM_SAMPLES_NOTES = [
    "LLaMA-Factory 0.9.1, num_samples: permutation(n)[:k], and when k > n also choice(n, k - n), both of numpy's global"
    " generator, seeded by transformers.set_seed(seed) when arguments are parsed. Several data sets draw from it one"
    " after the other; `datasets` is a list of n, num_samples and the indices.",
    "numpy RandomState(seed): MT19937 seeded as torch's. permutation(n): a = 0..n-1; for i from n-1 down to 1:"
    " j = interval(i), swap a[i] and a[j]. choice(n, k): k times interval(n - 1). interval(max): mask = the smallest"
    " 2^b - 1 that is at least max; draw next_u32 & mask until it is <= max; max = 0 draws nothing.",
    "The permutation is drawn of the whole data set even when few samples are kept.",
]
VAL_SIZE_NOTES = [
    "LLaMA-Factory: val_size > 1 is a count, else a fraction; datasets.train_test_split(test_size, seed). A fraction f"
    " gives ceil(f * n) test examples and n - that for training.",
    "permutation = numpy default_rng(seed).permutation(n); test = its first entries, train = the rest, in that order."
    " An error when either part would be empty.",
    "default_rng(seed) is PCG64 (XSL-RR, 128-bit LCG, multiplier 0x2360ED051FC65DA44385DF649FCCF645) seeded through"
    " SeedSequence; see Pcg64 in scripts/training_order_goldens.py for every constant. Its 32-bit words are the low,"
    " then the high half of a 64-bit word. permutation: a = 0..n-1; for i from n-1 down to 1: j = interval(i), swap"
    " a[i] and a[j]. interval(max): mask = the smallest 2^b - 1 that is at least max; draw next_u32 & mask until it is"
    " <= max (numpy 1.24 and 2.4 agree).",
]


def num_samples_entry(seed, datasets):
    import numpy

    random, own = numpy.random.RandomState(seed), Mt19937(seed)
    entries = []
    for size, count in datasets:
        indices = random.permutation(size)[:count].tolist()
        if count > size:
            indices += random.choice(size, count - size).tolist()
        permutation = list(range(size))
        for i in range(size - 1, 0, -1):
            j = own.interval(i)
            permutation[i], permutation[j] = permutation[j], permutation[i]
        mine = permutation[:count] + [own.interval(size - 1) for _ in range(max(0, count - size))]
        assert indices == mine, (seed, size, count)
        entries.append(dict(num_examples=size, num_samples=count, indices=indices))
    return dict(seed=seed, datasets=entries)


def val_size_entry(num_examples, seed, val_size):
    import datasets

    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_dict(dict(index=list(range(num_examples))))
    split = rows.train_test_split(test_size=int(val_size) if val_size > 1 else val_size, seed=seed)
    test, train = split["test"]["index"], split["train"]["index"]
    permutation, own = list(range(num_examples)), Pcg64(seed)
    for i in range(num_examples - 1, 0, -1):
        j = own.interval(i)
        permutation[i], permutation[j] = permutation[j], permutation[i]
    assert test + train == permutation, (num_examples, seed)
    return dict(num_examples=num_examples, seed=seed, val_size=val_size, num_test=len(test), num_train=len(train),
                test=test, train_first=train[:10], train_sha256=digest([train]))


def make_init(folder):
    """The initial lora_A that PEFT draws after transformers.set_seed, and the words that it takes."""
    import peft
    from make_training_goldens import load

    entries = []
    for base, rank, targets, seed in (("tiny-qwen2", 4, ["q_proj", "v_proj"], 42), ("tiny-llama", 2, ["down_proj"], 7)):
        transformers.set_seed(seed)
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=8, target_modules=targets)
        model = peft.get_peft_model(load(base), config)
        own, tensors = Mt19937(seed), []
        for name, module in model.named_modules():
            if not hasattr(module, "lora_A") or "default" not in module.lora_A:
                continue
            inputs, outputs = module.in_features, module.out_features
            for _ in range(rank * inputs + outputs * rank):  # The constructors of both Linear layers.
                own.next_u32()
            bound = 1 / math.sqrt(inputs)
            mine = torch.tensor([[own.uniform(-bound, bound) for _ in range(inputs)] for _ in range(rank)])
            actual = module.lora_A["default"].weight.detach()
            assert torch.equal(mine, actual), (name, (mine - actual).abs().max())
            assert not module.lora_B["default"].weight.any()
            tensors.append(dict(module=name.removeprefix("base_model.model."), shape=list(actual.shape),
                                first=[float(value) for value in actual.flatten()[:4]],
                                sha256=hashlib.sha256(actual.contiguous().numpy().tobytes()).hexdigest()))
        entries.append(dict(base=base, r=rank, target_modules=targets, seed=seed, lora_A=tensors))
    write(folder / "lora_init.json", dict(notes=INIT_NOTES, cases=entries))


INIT_NOTES = [
    "After set_seed(seed) and loading the base (which draws nothing), PEFT 0.12 visits the target modules in the order"
    " of named_modules, layer by layer (q, k, v, o, gate, up, down). Each draws r * in words for the constructor of"
    " lora_A, out * r for that of lora_B, then r * in for reset_lora_parameters, which are the values: row by row,"
    " U(-1/sqrt(in), 1/sqrt(in)). B is zero.",
    "A uniform f32 from one word w of torch's MT19937: x = (w & 0xffffff) * 2^-24; x * (to - from) + from, in f32 with"
    " each operation rounded. `first` are the first four values, sha256 is of the little-endian f32 bytes.",
]


def make_plot(folder):
    """LLaMA-Factory's smoothed loss curve."""
    source = ast.parse((stack() / "llamafactory" / "ploting.py").read_text())
    function = next(node for node in source.body if isinstance(node, ast.FunctionDef) and node.name == "smooth")
    function.decorator_list, function.returns, function.args.args[0].annotation = [], None, None
    scope = dict(math=math)
    exec(compile(ast.Module([function], []), "ploting.py", "exec"), scope)
    random = Mt19937(3)
    curves = [[], [2.5], [2.5, 1.0], [1.0] * 5]
    for length in (20, 48, 381):
        curves.append([round(0.4 + 2.2 * math.exp(-4 * step / length) + 0.3 * (random.next_u32() / 2**32), 4) for step in range(length)])
    write(folder / "smooth.json", dict(
        notes=["LLaMA-Factory 0.9.1, smooth(): w = 1.8 * (1 / (1 + exp(-0.05 * n)) - 0.5); s starts as x[0]; for each x:"
               " s = w * s + (1 - w) * x."],
        cases=[dict(values=curve, smoothed=scope["smooth"](curve)) for curve in curves]))


def torch_randperm(count, seed):
    random, permutation = Mt19937(seed), list(range(count))
    for i in range(count - 1):
        z = random.next_u32() % (count - i)
        permutation[i], permutation[i + z] = permutation[i + z], permutation[i]
    return permutation


class Mt19937:
    """The generator of torch's CPU generator and of numpy's RandomState."""

    def __init__(self, seed):
        self.state, self.next = [seed & MASK32], 624
        for i in range(1, 624):
            previous = self.state[-1]
            self.state.append((1812433253 * (previous ^ (previous >> 30)) + i) & MASK32)

    def next_u32(self):
        if self.next == 624:
            for i in range(624):
                mixed = (self.state[i] & 0x80000000) | (self.state[(i + 1) % 624] & 0x7FFFFFFF)
                self.state[i] = self.state[(i + 397) % 624] ^ (mixed >> 1) ^ (0x9908B0DF if mixed & 1 else 0)
            self.next = 0
        word = self.state[self.next]
        self.next += 1
        word ^= word >> 11
        word ^= (word << 7) & 0x9D2C5680
        word ^= (word << 15) & 0xEFC60000
        return word ^ (word >> 18)

    def interval(self, maximum):
        """numpy's legacy bounded integer: masked rejection, 0 to `maximum`."""
        if maximum == 0:
            return 0
        mask = (1 << maximum.bit_length()) - 1
        while (value := self.next_u32() & mask) > maximum:
            pass
        return value

    def uniform(self, low, high):
        """torch's uniform_ of one f32."""
        import numpy

        low, high = numpy.float32(low), numpy.float32(high)
        fraction = numpy.float32(self.next_u32() & 0xFFFFFF) * numpy.float32(2**-24)
        return float(numpy.float32(numpy.float32(fraction * numpy.float32(high - low)) + low))


class Pcg64:
    """numpy's default_rng(seed)."""

    MULTIPLIER = 0x2360ED051FC65DA44385DF649FCCF645

    def __init__(self, seed):
        words = self.seed_sequence(seed)
        initial, sequence = (words[0] << 64) | words[1], (words[2] << 64) | words[3]
        self.increment, self.state, self.half = ((sequence << 1) | 1) & MASK128, 0, None
        self.step()
        self.state = (self.state + initial) & MASK128
        self.step()

    @staticmethod
    def seed_sequence(seed):
        """Returns the four u64 that SeedSequence(seed) makes."""
        entropy = [seed & MASK32]
        while seed := seed >> 32:
            entropy.append(seed & MASK32)
        constant = 0x43B0D7E5

        def hashed(value):
            nonlocal constant
            value ^= constant
            constant = constant * 0x931E8875 & MASK32
            value = value * constant & MASK32
            return value ^ (value >> 16)

        def mixed(left, right):
            value = (0xCA01F9DD * left - 0x4973F715 * right) & MASK32
            return value ^ (value >> 16)

        assert len(entropy) <= 4, "longer seeds are mixed in afterwards; no seed here is"
        pool = [hashed(entropy[i] if i < len(entropy) else 0) for i in range(4)]
        for source in range(4):
            for target in range(4):
                if source != target:
                    pool[target] = mixed(pool[target], hashed(pool[source]))
        constant, words = 0x8B51F9DD, []
        for i in range(8):
            value = pool[i % 4] ^ constant
            constant = constant * 0x58F38DED & MASK32
            value = value * constant & MASK32
            words.append(value ^ (value >> 16))
        return [words[2 * i] | (words[2 * i + 1] << 32) for i in range(4)]

    def step(self):
        self.state = (self.state * self.MULTIPLIER + self.increment) & MASK128

    def next_u64(self):
        self.step()
        value, turn = (self.state >> 64) ^ (self.state & MASK64), self.state >> 122
        return ((value >> turn) | (value << (64 - turn))) & MASK64

    def next_u32(self):
        if self.half is None:
            word = self.next_u64()
            self.half = word >> 32
            return word & MASK32
        word, self.half = self.half, None
        return word

    def interval(self, maximum):
        """What Generator.permutation draws: masked rejection as the legacy generator's, 0 to `maximum`."""
        return Mt19937.interval(self, maximum)


def digest(batches):
    """Returns the sha256 of all indices, joined by commas."""
    return hashlib.sha256(",".join(str(index) for batch in batches for index in batch).encode()).hexdigest()


def write(path, data):
    path.write_text(json.dumps(data, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
