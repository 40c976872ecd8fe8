"""Times the all-reduce kernels on all visible GPUs inside graphs, beside NCCL's.

    python3 tests/cuda/bench_all_reduce.py FOLDER_OF_CUBINS [curve] [layers] [gather] [shared]

The folder needs the cubins of all_reduce, all_gather, norm and both gemm_small. Prints µs for one
all-reduce out of a chain of 100, plain and with overlapped launches; then what an all-reduce adds
to a layer of Qwen2.5-7B, the gather of logits, and, on two GPUs, the kernels of four ranks that
share them. CUDA_VISIBLE_DEVICES chooses the GPUs: 2, 3, 4, 6 or 8, for `layers` 2 or 4.
"""

import ctypes
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ranks as multi  # First: it sets what CUDA reads when it starts.
import torch

HIDDEN = 3584
SIZES = [4096] + [HIDDEN * 2 << i for i in range(11)] + [8 << 20]
CHAIN = 100
EPS = 1e-6


class NcclId(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_char * 128)]


def nccl_communicator(nccl, rank, world_size, meeting):
    """Joins the processes through the file `meeting`, which rank 0 writes."""
    unique, communicator = NcclId(), ctypes.c_void_p()
    if rank == 0:
        assert nccl.ncclGetUniqueId(ctypes.byref(unique)) == 0
        Path(meeting + ".new").write_bytes(bytes(unique))
        os.rename(meeting + ".new", meeting)
    while not os.path.exists(meeting):
        time.sleep(0.01)
    unique = NcclId.from_buffer_copy(Path(meeting).read_bytes())
    assert nccl.ncclCommInitRank(ctypes.byref(communicator), world_size, unique, rank) == 0
    return communicator


def nccl_rank(rank, world_size, meeting):
    """One process of NCCL's side; prints for each size the µs of all samples."""
    torch.cuda.set_device(rank)
    torch.zeros(1, device="cuda")
    nccl = ctypes.CDLL("libnccl.so.2")
    communicator = nccl_communicator(nccl, rank, world_size, meeting)
    stream = torch.cuda.Stream()
    half, addition = 6, 0
    times = {}
    for size in SIZES:
        x, out = (torch.zeros(size // 2, dtype=torch.float16, device="cuda") for _ in range(2))

        def reduce():
            result = nccl.ncclAllReduce(
                ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out.data_ptr()),
                ctypes.c_size_t(size // 2), half, addition, communicator,
                ctypes.c_void_p(stream.cuda_stream))
            assert result == 0, f"ncclAllReduce: {result}"

        torch.cuda.synchronize()
        times[size] = []
        with torch.cuda.stream(stream):
            reduce()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(capture_error_mode="thread_local")
            for _ in range(CHAIN):
                reduce()
            graph.capture_end()
            for _ in range(9):
                reduce()
                torch.cuda.synchronize()
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                graph.replay()
                end.record()
                end.synchronize()
                times[size].append(start.elapsed_time(end) * 1000 / CHAIN)
    print(json.dumps(times), flush=True)
    # The graphs hold NCCL's communicator, which therefore cannot be taken down in order.
    os._exit(0)


def time_nccl(world_size):
    """µs by size, of the rank that started last; empty where NCCL fails."""
    meeting = os.path.join(tempfile.mkdtemp(), "meeting")
    processes = [
        subprocess.Popen([sys.executable, __file__, "--nccl", str(rank), str(world_size), meeting],
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(world_size)
    ]
    outputs = []
    try:
        outputs = [process.communicate(timeout=60) for process in processes]
        times = [json.loads(output) for output, _ in outputs]
    except (subprocess.TimeoutExpired, json.JSONDecodeError) as error:
        for process in processes:
            process.kill()
        print(f"NCCL failed: {error!r} {[errors[-500:] for _, errors in outputs]}", flush=True)
        return {}
    return {size: statistics.median(map(min, *(rank[str(size)][2:] for rank in times)))
            for size in SIZES}


def median_us(ranks, run, count, repeats=7):
    """Median µs of one of `count` parts of run(rank), seen by the rank that starts last."""
    graphs = ranks.capture(run)
    last = ranks.world_size - 1
    samples = []
    for _ in range(repeats + 2):
        with ranks.on(last):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        ranks.replay(graphs, range(last))
        with ranks.on(last):
            start.record()
            graphs[last].replay()
            end.record()
        ranks.synchronize()
        samples.append(start.elapsed_time(end) * 1000 / count)
    ranks.assert_no_error()
    return statistics.median(samples[2:])


def both_us(ranks, run, count):
    """Plain and overlapped."""
    times = []
    for is_overlapped in [False, True]:
        for device in ranks.kernels.values():
            device.overlap = is_overlapped
        times.append(median_us(ranks, run, count))
    for device in ranks.kernels.values():
        device.overlap = False
    return times


class Message:
    def __init__(self, ranks, size):
        self.ranks, self.size = ranks, size
        self.rows = size // (2 * HIDDEN)
        self.x, self.out, self.sum, self.residual = (
            [torch.randn(size // 2, device=f"cuda:{device}").half() for device in ranks.devices]
            for _ in range(4))
        self.weight = [torch.randn(HIDDEN, device=f"cuda:{device}").half()
                       for device in ranks.devices]

    def reduce(self, rank, shots, grid, block):
        self.ranks.launch(rank, f"all_reduce_{shots}f16_r{self.ranks.world_size}", grid, block,
                          self.out[rank], self.x[rank], self.size // 16)

    def reduction(self, shots, grid, block):
        def run(rank):
            for _ in range(CHAIN):
                self.reduce(rank, shots, grid, block)
        return run

    def norm(self, shots, limit):
        name = f"all_reduce_{shots}add_rms_norm_f16_r{self.ranks.world_size}"

        def run(rank):
            for _ in range(CHAIN):
                self.ranks.launch(rank, name, min(limit, self.rows), 448, self.out[rank],
                                  self.sum[rank], self.x[rank], self.residual[rank],
                                  self.weight[rank], EPS, self.rows, HIDDEN)
        return run

    def apart(self, shots, grid, block):
        """The reduction and add_rms_norm as two launches."""
        def run(rank):
            kernels = self.ranks.kernels[self.ranks.devices[rank]]
            for _ in range(CHAIN):
                self.reduce(rank, shots, grid, block)
                kernels.launch("add_rms_norm_f16", [self.rows], 448, self.out[rank],
                               self.sum[rank], self.out[rank], self.residual[rank],
                               self.weight[rank], EPS, HIDDEN)
        return run


def best_geometry(ranks, message, shots, limit):
    """(µs plain, µs overlapped, grid, block) of the fastest plain one."""
    vectors = message.size // 16
    geometries = {(min(most, -(-vectors // block)), block)
                  for most, block in itertools.product([limit // 4, limit // 2, limit],
                                                       [128, 256, 512])}
    results = [(median_us(ranks, message.reduction(shots, *geometry), CHAIN, 3), *geometry)
               for geometry in sorted(geometries)]
    _, grid, block = min(results)
    return *both_us(ranks, message.reduction(shots, grid, block), CHAIN), grid, block


def crossover(table, first, second):
    """The first size from which on the second is faster."""
    for size in table:
        if all(table[later][second] < table[later][first] for later in table if later >= size):
            return f"{size >> 10} KB" if size < 1 << 20 else f"{size / (1 << 20):.1f} MB"
    return "none"


def curve(ranks, messages, limit, nccl):
    world = ranks.world_size
    print(f"{world} ranks, f16: µs of one in a graph, plain / overlapped launches, grid×block")
    print(f"{'bytes':>8} {'one shot':>24} {'two shots':>24} {'NCCL':>7} | with add + RMSNorm: "
          f"{'one shot':>13} {'two shots':>13} {'apart':>13}", flush=True)
    table = {}
    for size in messages:
        message = Message(ranks, size)
        one = best_geometry(ranks, message, "", limit)
        two = best_geometry(ranks, message, "two_shot_", limit)
        table[size] = {"one shot": one[1], "two shots": two[1],
                       "NCCL": nccl.get(size, float("nan"))}
        cells = [f"{plain:7.2f} {overlapped:7.2f} {f'{grid}×{block}':>8}"
                 for plain, overlapped, grid, block in (one, two)]
        line = f"{size:8} {cells[0]} {cells[1]} {table[size]['NCCL']:7.2f} |"
        if size % (2 * HIDDEN) == 0:
            shots, best = ("", one) if one[1] < two[1] else ("two_shot_", two)
            runs = [message.norm("", limit),
                    message.norm("two_shot_", limit) if message.rows >= world else None,
                    message.apart(shots, *best[2:])]
            for run in runs:
                plain, overlapped = both_us(ranks, run, CHAIN) if run else [float("nan")] * 2
                line += f" {plain:6.2f} {overlapped:6.2f}"
        print(line, flush=True)
    pairs = itertools.combinations(["one shot", "two shots", "NCCL"], 2)
    print("from which size on the second wins: "
          + "; ".join(f"{a}, {b}: {crossover(table, a, b)}" for a, b in pairs), flush=True)


def layers(ranks):
    """Products and norms of decoding with each rank's part of Qwen2.5-7B's layers."""
    world = ranks.world_size
    print(f"a layer's products and norms at TP {world}, µs plain / overlapped: with norms alone, "
          "with all-reduces, with those that the product sends")
    num_layers, qkv, ffn = 4, 4608 // world, 18944 // world
    shapes = {"qkv": (qkv, HIDDEN), "o": (HIDDEN, HIDDEN // world), "gate_up": (2 * ffn, HIDDEN),
              "down": (HIDDEN, ffn)}
    weights = [[{key: (torch.randn(shape, device=f"cuda:{device}") * shape[1] ** -0.5).half()
                 for key, shape in shapes.items()} for _ in range(num_layers)]
               for device in ranks.devices]
    for tokens in [1, 8]:
        buffers = [{key: torch.randn(tokens, width, device=f"cuda:{device}").half()
                    for key, width in [("x", HIDDEN), ("h", HIDDEN), ("sum", HIDDEN),
                                       ("qkv", qkv), ("act", ffn)]}
                   for device in ranks.devices]
        norm = [torch.randn(HIDDEN, device=f"cuda:{device}").half() for device in ranks.devices]

        def layer(rank, weight, reduce):
            kernels, b = ranks.kernels[ranks.devices[rank]], buffers[rank]

            def last_product(out, x, w, n, k):
                if reduce is pushed:
                    ranks.launch(rank, "gemm_small_push_f16_t8", n // 16, 256, out, x, w, tokens,
                                 n, k, shared_bytes=98304)
                else:
                    product("", "deep", out, x, w, n, k, None, None)

            def product(kind, form, out, x, w, n, k, *rest):
                rows, shared = {"wide": (16, 65536), "deep": (16, 98304)}[form]
                rows //= 2 if kind else 1
                kernels.launch(f"gemm_small{kind}_f16_t8_{form}", [-(-n // rows)], 256, out, x, w,
                               *rest, tokens, n, k, shared_bytes=shared)

            product("", "wide", b["qkv"], b["h"], weight["qkv"], qkv, HIDDEN, None, None)
            last_product(b["x"], b["qkv"], weight["o"], HIDDEN, HIDDEN // world)
            reduce(rank, b)
            product("_silu", "wide", b["act"], b["h"], weight["gate_up"], ffn, HIDDEN)
            last_product(b["x"], b["act"], weight["down"], HIDDEN, ffn)
            reduce(rank, b)

        def norm_of(rank, b, name):
            ranks.launch(rank, name, tokens, 448, b["h"], b["sum"], b["x"], b["sum"], norm[rank],
                         EPS, tokens, HIDDEN)

        def fused(rank, b):
            norm_of(rank, b, f"all_reduce_add_rms_norm_f16_r{world}")

        def pushed(rank, b):
            norm_of(rank, b, f"all_reduce_pushed_add_rms_norm_f16_r{world}")

        def local(rank, b):
            ranks.kernels[ranks.devices[rank]].launch(
                "add_rms_norm_f16", [tokens], 448, b["h"], b["sum"], b["x"], b["sum"],
                norm[rank], EPS, HIDDEN)

        times = {}
        for reduce in [local, fused, pushed, local, fused, pushed]:
            def run(rank, reduce=reduce):
                for _ in range(4):
                    for weight in weights[rank]:
                        layer(rank, weight, reduce)

            plain, overlapped = both_us(ranks, run, 4 * num_layers)
            times.setdefault(reduce.__name__, []).append(overlapped)
            print(f"{tokens} tokens, {reduce.__name__}: {plain:.2f} {overlapped:.2f}", flush=True)
        base = min(times["local"])
        print(f"one all-reduce adds {(min(times['fused']) - base) / 2:.2f}, sent by the product "
              f"{(min(times['pushed']) - base) / 2:.2f}", flush=True)


def gather(ranks):
    world = ranks.world_size
    width = 152064 // world
    print(f"all_gather_columns of {world} × {width:,} logits: µs plain / overlapped; to rank 0, to "
          "all")
    for rows in [1, 8, 64, 256]:
        x = [torch.randn(rows, width, device=f"cuda:{device}") for device in ranks.devices]
        out = [torch.empty(rows, world * width, device=f"cuda:{device}") for device in ranks.devices]
        cells = []
        for takers in [[0], range(world)]:
            outs = multi.Outputs()
            for rank in takers:
                outs.rows[rank] = out[rank].data_ptr()
            grid = min(128, -(-rows * width // 2048))

            def run(rank, grid=grid, outs=outs):
                for _ in range(20):
                    ranks.launch(rank, "all_gather_columns", grid, 512, x[rank], rows, width,
                                 outs)

            plain, overlapped = both_us(ranks, run, 20)
            cells.append(f"{plain:.2f} {overlapped:.2f}")
        print(f"{rows:3} rows: " + ", ".join(cells), flush=True)


def main():
    # NVLink multicast can put GPUs that others share out of service.
    os.environ["NCCL_NVLS_ENABLE"] = "0"
    if sys.argv[1] == "--nccl":
        nccl_rank(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
    devices = list(range(torch.cuda.device_count()))
    multi.enable_peer_access(devices)
    kernels = multi.load_kernels(sys.argv[1], devices)
    # One shot keeps what every rank sends.
    ranks = multi.Ranks(kernels, devices, len(devices) * SIZES[-1] + (1 << 20))
    sections = {"curve": lambda: curve(ranks, SIZES, 128, time_nccl(len(devices))),
                "layers": lambda: layers(ranks), "gather": lambda: gather(ranks)}
    if len(devices) == 2:
        # Two ranks on each GPU: the kernels of four, with more traffic on two links than on four.
        four = multi.Ranks(kernels, [0, 1, 0, 1], 4 * SIZES[8] + (1 << 20))
        sections["shared"] = lambda: curve(four, SIZES[1:9], 32, {})
    for name, section in sections.items():
        if name in (sys.argv[2:] or sections):
            section()


if __name__ == "__main__":
    main()
