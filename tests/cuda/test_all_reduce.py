"""Checks the collectives of src/kernels/cuda on two GPUs, or on one that holds all ranks.

    python3 tests/cuda/test_all_reduce.py FOLDER_OF_CUBINS [part of a test's name]

2, 3, 4, 6 and 8 ranks, spread over the GPUs at hand (at most two are used). Every result must have
the very bits of a sum in the order of ranks, on all ranks, REPEATS (100) times over, with poisoned
outputs and with ranks that start late. QUICK=1 takes 2 ranks alone, each on a GPU of its own: for
compute-sanitizer. Prints one line a test.
"""

import itertools
import os
import random
import sys
import time
import traceback

import ranks as multi  # First: it sets what CUDA reads when it starts.
import torch

import reference
from driver import relative_error

TYPES = {"f16": torch.float16, "bf16": torch.bfloat16}
TOLERANCE = {"f16": 1e-3, "bf16": 6e-3}
QUICK = "QUICK" in os.environ
REPEATS = int(os.environ.get("REPEATS", "100"))
NUM_GPUS = min(2, torch.cuda.device_count())
WORLDS = [2] if QUICK else [2, 3, 4, 6, 8]
SLOT_BYTES = 17 << 20
EPS = 1e-6
PUSH_BYTES = 98304
BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32,
        torch.int32: torch.int32}


def make_ranks(kernels, world, timeout_s=10.0):
    return multi.Ranks(kernels, [rank % NUM_GPUS for rank in range(world)], SLOT_BYTES, timeout_s)


def max_grid(world):
    """So many blocks that all ranks' blocks, and those of their next launch, fit on a GPU."""
    return 128 if world <= NUM_GPUS else 64 // -(-world // NUM_GPUS)


class Operation:
    """A collective with its buffers on all ranks; what they must hold after it is in `wants`."""

    def __init__(self, ranks, type_name, grid, block):
        self.ranks, self.type_name, self.dtype = ranks, type_name, TYPES[type_name]
        self.grid, self.block = grid, block
        self.inputs, self.outputs, self.wants = [], [], []

    def place(self, values):
        """The values on all ranks, to be brought back before each run."""
        masters = [value.to(f"cuda:{device}")
                   for value, device in zip(values, self.ranks.devices, strict=True)]
        copies = [master.clone() for master in masters]
        self.inputs += zip(copies, masters, strict=True)
        return copies

    def expect(self, outputs, want):
        for output in outputs:
            if output is not None:
                self.outputs.append(output)
                self.wants.append(want.to(output.device))

    def reset(self):
        for output in self.outputs:
            output.fill_(float("nan"))
        for copy, master in self.inputs:
            copy.copy_(master)

    def is_right(self):
        """Whether all outputs have the bits they must have, as 0-d tensors."""
        return [(output.view(BITS[output.dtype]) == want.view(BITS[want.dtype])).all()
                for output, want in zip(self.outputs, self.wants, strict=True)]


def random_parts(ranks, *shape, dtype):
    return [torch.randn(*shape, device="cuda:0").to(dtype) for _ in range(ranks.world_size)]


def sum_in_order(parts):
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.to(parts[0].dtype)


class Reduction(Operation):
    def __init__(self, ranks, shots, type_name, num_vectors, grid, block, in_place=False,
                 parts=None):
        super().__init__(ranks, type_name, grid, block)
        self.name = f"all_reduce_{shots}{type_name}_r{ranks.world_size}"
        self.num_vectors = num_vectors
        parts = parts or random_parts(ranks, 8 * num_vectors, dtype=self.dtype)
        self.x = self.place(parts)
        self.out = self.x if in_place else [torch.empty_like(x) for x in self.x]
        self.expect(self.out, sum_in_order(parts))

    def run(self, rank):
        self.ranks.launch(rank, self.name, self.grid, self.block, self.out[rank], self.x[rank],
                          self.num_vectors)


class Norm(Operation):
    def __init__(self, ranks, shots, type_name, rows, width, grid, block, in_place=False,
                 parts=None):
        super().__init__(ranks, type_name, grid, block)
        self.name = f"all_reduce_{shots}add_rms_norm_{type_name}_r{ranks.world_size}"
        self.rows, self.width = rows, width
        parts = parts or random_parts(ranks, rows, width, dtype=self.dtype)
        self.x = self.place(parts)
        residual = random_parts(ranks, rows, width, dtype=self.dtype)[0]
        self.residual = self.place([residual] * ranks.world_size)
        weight = torch.randn(width, device="cuda:0").to(self.dtype)
        self.weight = self.place([weight] * ranks.world_size)
        self.out = self.x if in_place else [torch.empty_like(x) for x in self.x]
        self.sum = self.residual if in_place else [torch.empty_like(x) for x in self.x]
        x, out, total = sum_in_order(parts), *(torch.empty_like(residual) for _ in range(2))
        with torch.cuda.device(0):
            ranks.kernels[0].launch(f"add_rms_norm_{type_name}_wide", [rows], block, out, total, x,
                                    residual, weight, EPS, width)
        error = relative_error(out, reference.rms_norm(total, weight, EPS))
        assert error < TOLERANCE[type_name], f"add_rms_norm itself: {error}"
        self.expect(self.out, out)
        self.expect(self.sum, total)

    def run(self, rank):
        self.ranks.launch(rank, self.name, self.grid, self.block, self.out[rank], self.sum[rank],
                          self.x[rank], self.residual[rank], self.weight[rank], EPS, self.rows,
                          self.width)


class PushedNorm(Norm):
    """A product that sends its part of the sum, and the norm that takes it."""

    def __init__(self, ranks, type_name, tokens, width, k, grid, block):
        dtype = TYPES[type_name]
        self.k, self.suffix = k, f"{type_name}_t{8 if tokens <= 8 else 16}"
        inputs = random_parts(ranks, tokens, k, dtype=dtype)
        weights = [(part.float() * k**-0.5).to(dtype)
                   for part in random_parts(ranks, width, k, dtype=dtype)]
        parts = [torch.empty(tokens, width, device="cuda:0", dtype=dtype) for _ in inputs]
        with torch.cuda.device(0):
            for out, x, weight in zip(parts, inputs, weights, strict=True):
                ranks.kernels[0].launch(f"gemm_small_{self.suffix}_deep", [-(-width // 16)], 256,
                                        out, x, weight, None, None, tokens, width, k,
                                        shared_bytes=PUSH_BYTES)
        super().__init__(ranks, "pushed_", type_name, tokens, width, grid, block, parts=parts)
        self.product_x, self.product_weight = self.place(inputs), self.place(weights)

    def reset(self):
        super().reset()
        for x in self.x:
            x.fill_(float("nan"))

    def run(self, rank):
        self.ranks.launch(rank, f"gemm_small_push_{self.suffix}", -(-self.width // 16), 256,
                          self.x[rank], self.product_x[rank], self.product_weight[rank],
                          self.rows, self.width, self.k, shared_bytes=PUSH_BYTES)
        super().run(rank)


class Gather(Operation):
    def __init__(self, ranks, rows, width, grid, block, takers):
        super().__init__(ranks, "f16", grid, block)
        self.name = "all_gather_columns"
        self.rows, self.width = rows, width
        parts = random_parts(ranks, rows, width, dtype=torch.float32)
        self.x = self.place(parts)
        self.out = [
            ranks.empty(rank, rows, ranks.world_size * width, dtype=torch.float32)
            if rank in takers else None for rank in range(ranks.world_size)
        ]
        self.outs = multi.Outputs()
        for rank in takers:
            self.outs.rows[rank] = self.out[rank].data_ptr()
        self.expect(self.out, torch.cat(parts, -1))

    def run(self, rank):
        self.ranks.launch(rank, self.name, self.grid, self.block, self.x[rank], self.rows,
                          self.width, self.outs)


class Broadcast(Operation):
    """Rank 0's ids on all ranks; what fills the last vector goes along."""

    def __init__(self, ranks, num_ids, block):
        super().__init__(ranks, "f16", 1, block)
        self.name = "broadcast_ids"
        self.num_vectors = -(-num_ids // 4)
        first, *others = [
            torch.randint(0, 1 << 31, (4 * self.num_vectors,), device="cuda:0").int()
            for _ in range(ranks.world_size)
        ]
        self.ids = self.place([first, *others])
        for ids in self.ids:
            self.wants.append(first.to(ids.device))
            self.outputs.append(ids)

    def reset(self):
        for copy, master in self.inputs:
            copy.copy_(master)

    def run(self, rank):
        self.ranks.launch(rank, self.name, 1, self.block, self.ids[rank], self.num_vectors)


def norm_block(width):
    return min(512, -(-width // 8 // 32) * 32)


def random_operation(ranks, type_name, chance):
    world, limit = ranks.world_size, max_grid(ranks.world_size)
    grid = chance.choice([1, 2, 3, limit, chance.randint(1, limit)])
    shots = chance.choice(["", "two_shot_"])
    in_place = chance.random() < 0.4
    kind = chance.choice(["reduction", "reduction", "norm", "norm", "pushed", "gather", "ids"])
    if kind == "ids":
        return Broadcast(ranks, chance.choice([1, 5, 256, 512]), chance.choice([32, 128]))
    if kind == "pushed":
        # Few blocks where ranks share a GPU: those that wait for their turn take room, too.
        width = chance.choice([64, 128] if world > NUM_GPUS else [64, 896, 3584])
        tokens = chance.choice([1, 7, 16])
        return PushedNorm(ranks, type_name, tokens, width, chance.choice([64, 1800]),
                          min(grid, tokens), norm_block(width))
    if kind == "gather":
        takers = chance.choice([[0], list(range(world)), [world - 1]])
        return Gather(ranks, chance.choice([1, 3, 40]), chance.choice([4, 200, 5004]), grid,
                      chance.choice([32, 512]), takers)
    if kind == "norm":
        width = chance.choice([64, 896, 3584, 8192, 16384])
        rows = chance.choice([8, 11, 32] if shots else [1, 2, 9, 32])
        return Norm(ranks, shots, type_name, rows, width, min(grid, rows), norm_block(width),
                    in_place)
    num_vectors = chance.choice([8, 13, 448, 3000, 30000] if shots else [1, 8, 448, 3000, 20000])
    return Reduction(ranks, shots, type_name, num_vectors, grid, chance.choice([32, 96, 256, 512]),
                     in_place)


def check_steady(ranks, operations, chance, repeats, what):
    """Replays the operations as one graph a rank; every output must have its bits each time."""
    def run(rank):
        for operation in operations:
            operation.run(rank)

    graphs = ranks.capture(run)
    for repeat in range(repeats):
        for operation in operations:
            operation.reset()
        ranks.synchronize()
        order = list(range(ranks.world_size))
        chance.shuffle(order)
        for rank in range(ranks.world_size):
            if chance.random() < 0.3:
                with ranks.on(rank):
                    torch.cuda._sleep(chance.randint(1, 400_000))
        ranks.replay(graphs, order)
        ranks.synchronize()
        ranks.assert_no_error()
        right = [(operation.name, flag) for operation in operations
                 for flag in operation.is_right()]
        wrong = [f"{i}: {name}" for i, (name, flag) in enumerate(right) if not flag]
        assert not wrong, f"{what}, repeat {repeat}: wrong bits in {wrong[:6]} of {len(right)}"


def test_each_collective_alone(kernels, type_name):
    chance = random.Random(1)
    for world in WORLDS:
        ranks, limit = make_ranks(kernels, world), max_grid(world)
        for shots, in_place in itertools.product(["", "two_shot_"], [False, True]):
            cases = [Reduction(ranks, shots, type_name, n, min(limit, grid), block, in_place)
                     for n, grid, block in [(world, 1, 32), (448, 1, 448), (448, 4, 128),
                                            (40_000, 128, 512), (12_345, 3, 512)]]
            cases += [Norm(ranks, shots, type_name, rows, width, min(limit, rows),
                           norm_block(width), in_place)
                      for rows, width in [(world, 3584), (3 * world + 1, 512), (70, 8192)]]
            if not shots:
                cases += [Norm(ranks, shots, type_name, 1, 3584, 1, 448, in_place),
                          Broadcast(ranks, 3, 32), Broadcast(ranks, 512, 128),
                          PushedNorm(ranks, type_name, 3, 512, 256, 2, 64),
                          PushedNorm(ranks, type_name, 16, 896, 1000, 16, 128)]
            for case in cases:
                ranks.synchronize()
                for rank in range(world):
                    with ranks.on(rank):
                        case.run(rank)
                ranks.synchronize()
                ranks.assert_no_error()
                assert all(case.is_right()), f"{case.name} in_place={in_place}, eager"
                check_steady(ranks, [case], chance, min(REPEATS, 5), case.name)


def test_the_largest_message(kernels, type_name):
    ranks = make_ranks(kernels, 2)
    grid = max_grid(2)
    big = Reduction(ranks, "two_shot_", type_name, (8 << 20) // 16, grid, 512)
    one = Reduction(ranks, "", type_name, (8 << 20) // 16, grid, 512)
    norm = Norm(ranks, "two_shot_", type_name, 1170, 3584, grid, 448)
    check_steady(ranks, [big, norm, one, big], random.Random(2), min(REPEATS, 20), "8 MB")


def check_mixed(kernels, type_name, is_overlapped):
    seed = int(time.time())
    chance = random.Random(seed)
    for world in WORLDS:
        ranks = make_ranks(kernels, world)
        operations = [random_operation(ranks, type_name, chance) for _ in range(24)]
        for device in kernels.values():
            device.overlap = is_overlapped
        try:
            check_steady(ranks, operations, chance, REPEATS, f"{world} ranks, seed {seed}")
        finally:
            for device in kernels.values():
                device.overlap = False


def test_mixed_sequences(kernels, type_name):
    check_mixed(kernels, type_name, is_overlapped=False)


def test_mixed_sequences_overlapped(kernels, type_name):
    check_mixed(kernels, type_name, is_overlapped=True)


def test_special_values(kernels, type_name):
    """NaNs of all bits, infinities and negative zeros travel; all ranks get the same bits."""
    ranks = make_ranks(kernels, 2)
    for shots in ["", "two_shot_"]:
        parts = random_parts(ranks, 4096, dtype=TYPES[type_name])
        for part, shift in zip(parts, [0, 1], strict=True):
            bits = part.view(torch.int16)
            bits[100 + shift : 120] = -1  # 0xffff, in pairs and alone.
            bits[200:220] = -32768  # Negative zero in both.
            part[300 + shift] = float("inf")
            part[400] = float("inf") if shift else float("-inf")
        case = Reduction(ranks, shots, type_name, 512, 2, 128, parts=parts)
        for rank in range(2):
            with ranks.on(rank):
                case.run(rank)
        ranks.synchronize()
        ranks.assert_no_error()
        first, second = (out.cpu() for out in case.out)
        assert torch.equal(first.view(torch.int16), second.view(torch.int16)), "ranks differ"
        want = case.wants[0].cpu()
        assert torch.equal(first.isnan(), want.isnan()), "NaNs"
        kept = ~want.isnan()
        assert torch.equal(first[kept].view(torch.int16), want[kept].view(torch.int16)), "values"


def test_missing_rank_ends_the_wait(kernels, type_name):
    for make in [lambda ranks: Reduction(ranks, "", type_name, 20_000, 8, 512),
                 lambda ranks: Reduction(ranks, "two_shot_", type_name, 20_000, 8, 512),
                 lambda ranks: Norm(ranks, "", type_name, 9, 3584, 9, 448),
                 lambda ranks: Norm(ranks, "two_shot_", type_name, 9, 3584, 9, 448),
                 lambda ranks: Gather(ranks, 3, 400, 4, 512, [0, 1]),
                 lambda ranks: Broadcast(ranks, 100, 32)]:
        ranks = make_ranks(kernels, 2, timeout_s=0.2)
        case = make(ranks)
        ranks.synchronize()
        start = time.time()
        with ranks.on(0):
            case.run(0)
        ranks.synchronize()
        waited = time.time() - start
        assert 0.15 < waited < 2, f"{case.name} waited {waited:.2f} s"
        assert ranks.errors.tolist() == [2, 0], f"{case.name}: errors {ranks.errors.tolist()}"
        # The error stands: the next collectives do not wait as long again.
        start = time.time()
        with ranks.on(0):
            for _ in range(3):
                case.run(0)
        ranks.synchronize()
        assert time.time() - start < 0.15, f"{case.name} waits again"


def main():
    torch.manual_seed(int(time.time()))
    devices = list(range(NUM_GPUS))
    multi.enable_peer_access(devices)
    kernels = multi.load_kernels(sys.argv[1], devices)
    wanted = sys.argv[2] if len(sys.argv) > 2 else ""
    failed = 0
    for test in [value for key, value in list(globals().items()) if key.startswith("test_")]:
        if wanted not in test.__name__:
            continue
        for type_name in TYPES:
            start = time.time()
            try:
                test(kernels, type_name)
                result = "ok"
            except Exception as error:
                failed += 1
                result = f"FAILED {type(error).__name__}: {error}"[:600]
                traceback.print_exc(limit=3)
            print(f"{test.__name__} {type_name}: {result} ({time.time() - start:.1f} s)", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
