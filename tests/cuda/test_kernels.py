"""Checks every CUDA kernel against references, on fresh random inputs and poisoned outputs.

    python3 tests/cuda/test_kernels.py FOLDER_OF_CUBINS [part of a test's name]
    QUICK=1 REPEATS=1 compute-sanitizer --tool racecheck python3 tests/cuda/test_kernels.py ...

Each check runs for f16 and bf16 and, where it applies, head dimensions 64 and 128 and KV caches of
the same type and of E4M3 (kernels with fp8 in the name). Every kernel is
run again (REPEATS times, 100 if the variable is not set) and must give the same bits: a moving
result is a race. QUICK=1 takes one shape of each test. CLUSTER=1 is for a sampler compiled with
-DCLUSTER=1, as for GPUs before sm_90. Prints one line a test.
"""

import ctypes
import itertools
import os
import struct
import sys
import time
import traceback

import numpy as np
import torch

import reference
from driver import Kernels, int64, matrix_map, relative_error, tensor_map

TYPES = {"f16": torch.float16, "bf16": torch.bfloat16}
# Twice the rounding of the output, relative to the norm of the whole.
TOLERANCE = {"f16": 1e-3, "bf16": 6e-3}
QUICK = "QUICK" in os.environ
CLUSTER = int(os.environ.get("CLUSTER", "8"))
REPEATS = int(os.environ.get("REPEATS", "100"))
# Forms of gemm_small: rows of a block, threads, dynamic shared memory.
GEMM_FORMS = {"wide": (16, 256, 65536), "deep": (16, 256, 98304), "r32": (32, 128, 65536)}
LOG2E = 1.4426950408889634
# What names of kernels have before the type when the KV cache is E4M3.
CACHES = ["", "fp8_"]


def shapes_of(*lists):
    """All combinations, or one with QUICK."""
    return list(itertools.product(*(part[:1] if QUICK else part for part in lists)))


def poisoned(*shape, dtype):
    return torch.full(shape, float("nan"), device="cuda", dtype=dtype)


def random(*shape, dtype, scale=1.0):
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


def is_nan(x):
    """Which elements are no number, bytes being E4M3."""
    return x.isnan() if x.is_floating_point() else x & 0x7F == 0x7F


class Stored:
    """What a KV cache of a kernel with `form` in its name holds of elements of `dtype`: those, or
    bytes of E4M3."""

    def __init__(self, form, dtype):
        self.is_fp8 = form == "fp8_"
        self.dtype = torch.uint8 if self.is_fp8 else dtype

    def poisoned(self, *shape):
        if self.is_fp8:
            return torch.full(shape, poison_of(torch.uint8), device="cuda", dtype=torch.uint8)
        return poisoned(*shape, dtype=self.dtype)

    def encode(self, x):
        if self.is_fp8:
            return x.float().clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
        return x.to(self.dtype)

    def decode(self, x):
        """Returns f64."""
        return (x.view(torch.float8_e4m3fn).float() if self.is_fp8 else x).double()


def ints(values):
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def assert_close(got, want, type_name, what, factor=1.0):
    error = relative_error(got, want)
    bound = TOLERANCE[type_name] * factor
    assert error < bound, f"{what} {type_name}: relative error {error:.2e}, allowed {bound:.0e}"


def poison_of(dtype):
    """What outputs are filled with: no number, also as E4M3."""
    return float("nan") if dtype.is_floating_point else 0x7F if dtype == torch.uint8 else -1


def assert_steady(run, outputs, what, repeats=100):
    """Runs again and again; all outputs must keep their bits."""
    first = [output.clone() for output in outputs]
    for i in range(min(repeats, REPEATS)):
        for output in outputs:
            output.fill_(poison_of(output.dtype))
        run()
        for output, want in zip(outputs, first):
            same = torch.equal(output.nan_to_num(-7), want.nan_to_num(-7))
            assert same, f"{what}: repeat {i} differs"


def tile_bytes(columns):
    """Dynamic shared memory of gemm_tile."""
    stage = 128 * (128 + columns)
    return 1024 + min(6, 220_000 // stage) * stage


def gemm_tile(kernels, name, columns, out, x, w, bias=None, is_silu=False, scales=(),
              residual=None):
    """Launches gemm_tile for whole tensors; `scales` of x and w for a name with fp8."""
    (tokens, k), n = x.shape, out.shape[1]
    blocks = torch.cuda.get_device_properties(0).multi_processor_count // 2 * 2
    args = [matrix_map(x, 128), matrix_map(w, columns // 2), out]
    args += [] if is_silu else [bias, residual]
    kernels.launch(f"gemm_tile{'_silu' * is_silu}_{name}_n{columns}", [blocks], 384, *args,
                   *scales, tokens, n, k, shared_bytes=tile_bytes(columns))


def gemm_stream(kernels, name, limit, out, x, w, bias=None, kind="", blocks=None, scales=()):
    """Launches gemm_stream; kind "", "_silu" or "_f32out"; `scales` as gemm_tile."""
    (tokens, k), n = x.shape, out.shape[1]
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    blocks = min(blocks or processors, -(-w.shape[0] // 64) * -(-k // 64))
    key = limit, blocks
    if key not in _stream_memory:
        _stream_memory[key] = (torch.full([blocks, 64 * limit], float("nan"), device="cuda"),
                               torch.zeros(blocks, dtype=torch.int32, device="cuda"))
    if kind == "_silu":
        w_map = tensor_map(w, (k, 8, 2, n // 8), (k, n * k, 8 * k), (64, 8, 2, 4))
    else:
        w_map = matrix_map(w, 64)
    args = [matrix_map(x, limit), w_map, out] + [bias] * (kind != "_silu")
    infix = f"_silu_{name}" if kind == "_silu" else f"_{name}{kind}"
    stage = 128 * (64 + limit)
    stages = 131_072 // stage
    kernels.launch(f"gemm_stream{infix}_t{limit}", [blocks], 160, *args, *scales,
                   *_stream_memory[key], tokens, n, k,
                   shared_bytes=1024 + 272 * limit + stages * stage)


_stream_memory = {}


def test_gemm_hopper(kernels, name, dtype):
    """gemm_tile and gemm_stream: every form, tails of every dimension, all launches overlapped."""
    if torch.cuda.get_device_capability() != (9, 0):
        return

    def product(out, call, want, what, repeats):
        kernels.overlap = True
        call()
        kernels.overlap = False
        assert_close(out, want, name, what)
        kernels.overlap = True
        assert_steady(call, [out], what, repeats)
        kernels.overlap = False

    def operands(tokens, n, k, is_silu):
        x = random(tokens, k, dtype=dtype)
        w = random(2 * n if is_silu else n, k, dtype=dtype, scale=k**-0.5)
        want = x.double() @ w.double().T
        if is_silu:
            gate, up = want.chunk(2, -1)
            want = torch.nn.functional.silu(gate) * up
        return x, w, want

    shapes = [(300, 1000, 520), (1, 8, 8), (256, 4608, 3584), (2100, 1160, 256), (129, 512, 18944)]
    for tokens, n, k in shapes[:1] if QUICK else shapes:
        for is_silu in [False, True]:
            x, w, want = operands(tokens, n, k, is_silu)
            bias = None if is_silu else random(n, dtype=dtype)
            if bias is not None:
                want = want + bias.double()
            for columns in [128, 192, 256] if is_silu else [128, 192, 224, 256]:
                out = poisoned(tokens, n, dtype=dtype)
                product(out, lambda: gemm_tile(kernels, name, columns, out, x, w, bias, is_silu),
                        want, f"gemm_tile n{columns} {'silu ' * is_silu}{tokens} {n} {k}", 5)
                if not is_silu:
                    residual, total = random(tokens, n, dtype=dtype), torch.empty_like(out)
                    gemm_tile(kernels, name, columns, total, x, w, bias, residual=residual)
                    assert torch.equal(total, out + residual), f"gemm_tile n{columns} + residual"
    for limit, kind in itertools.product([16, 32, 64], ["", "_silu", "_f32out"]):
        shapes = [(limit, 1000, 520, None), (limit // 2 + 1, 4608, 3584, None), (1, 8, 8, None),
                  (limit, 520, 18944, 264)]
        for tokens, n, k, blocks in shapes[:1] if QUICK else shapes:
            x, w, want = operands(tokens, n, k, kind == "_silu")
            bias = None if kind == "_silu" else random(n, dtype=dtype)
            if bias is not None:
                want = want + bias.double()
            out = poisoned(tokens, n, dtype=torch.float32 if kind == "_f32out" else dtype)
            product(out, lambda: gemm_stream(kernels, name, limit, out, x, w, bias, kind, blocks),
                    want, f"gemm_stream{kind} t{limit} {tokens} {n} {k}", REPEATS)


def norm_of(width, name):
    """The end of a norm's name, and its block."""
    return name + "_wide" * (width > 8192), min(1024, max(32, -(-width // 8 // 32) * 32))


NORM_SHAPES = [(1, 3584), (7, 64), (300, 896), (5, 18944), (3, 8192), (2, 8200)]


def test_norm(kernels, name, dtype):
    for rows, width in NORM_SHAPES:
        suffix, block = norm_of(width, name)
        x, residual = (random(rows, width, dtype=dtype, scale=3) for _ in range(2))
        weight = random(width, dtype=dtype)
        out, total = (poisoned(rows, width, dtype=dtype) for _ in range(2))
        args = (weight, 1e-6, width)
        kernels.launch(f"rms_norm_{suffix}", [rows], block, out, x, *args)
        assert_close(out, reference.rms_norm(x, weight, 1e-6), name, "rms_norm")

        def run():
            kernels.launch(f"add_rms_norm_{suffix}", [rows], block, out, total, x, residual, *args)

        out.fill_(float("nan"))
        run()
        assert torch.equal(total, (x.float() + residual.float()).to(dtype)), "add_rms_norm's sum"
        assert_close(out, reference.rms_norm(total, weight, 1e-6), name, "add_rms_norm")
        assert_steady(run, [out, total], "add_rms_norm")


def test_elementwise(kernels, name, dtype):
    for rows, width in [(1, 18944), (33, 1000), (256, 4864)]:
        grid = [rows, -(-width // 2048)]
        gate_up = random(rows, 2 * width, dtype=dtype, scale=2)
        out = poisoned(rows, width, dtype=dtype)
        kernels.launch(f"silu_and_mul_{name}", grid, 256, out, gate_up, width)
        gate, up = gate_up.double().chunk(2, -1)
        assert_close(out, torch.nn.functional.silu(gate) * up, name, "silu_and_mul")
        table = random(500, width, dtype=dtype)
        tokens = torch.randint(90, 610, (rows,), device="cuda", dtype=torch.int32)
        known = (tokens >= 100) & (tokens < 600)
        want = torch.where(known[:, None], table[(tokens - 100).clamp(0, 499).long()], 0)
        # Some ids stand for what a row of the step before drew.
        places = torch.randperm(rows, device="cuda")
        drawn = torch.empty_like(tokens)
        drawn[places] = tokens
        is_drawn = torch.rand(rows, device="cuda") < 0.5
        for ids in [tokens, torch.where(is_drawn, -1 - places, tokens).int()]:
            out = poisoned(rows, width, dtype=dtype)
            kernels.launch(f"embedding_{name}", grid, 256, out, table, ids, drawn, 100, 500, width)
            assert torch.equal(out, want), "embedding"
        picked = torch.randint(-1, 500, (rows,), device="cuda", dtype=torch.int32)
        out = poisoned(rows, width, dtype=dtype)
        kernels.launch(f"gather_rows_{name}", grid, 256, out, table, picked, 500, width)
        want = torch.where((picked >= 0)[:, None], table[picked.clamp(0).long()], 0)
        assert torch.equal(out, want), "gather_rows"


class BlockPairs(ctypes.Structure):
    """The parameter of that name in elementwise.cu."""

    _fields_ = [("pairs", ctypes.c_int * 256)]

    @classmethod
    def of(cls, pairs):
        return cls((ctypes.c_int * 256)(*itertools.chain(*pairs)))


def test_copy_blocks(kernels, name, dtype):
    cache = random(3, 40, 4, 16, 128, dtype=dtype)
    want = cache.clone()
    pairs = [(3, 7), (0, 39), (12, 13)]
    for source, target in pairs:
        want[:, target] = want[:, source]
    layer_bytes, block_bytes = 40 * 4 * 16 * 128 * 2, 4 * 16 * 128 * 2
    kernels.launch("copy_blocks", [2, len(pairs), 3], 256, cache, BlockPairs.of(pairs),
                   int64(layer_bytes), int64(block_bytes))
    assert torch.equal(cache, want), "copy_blocks"


def test_rope_and_cache(kernels, name, dtype):
    shapes = shapes_of([128, 64], [(28, 4), (16, 16), (6, 1)], [False, True], [37, 1])
    for (dim, (heads, kv_heads), has_norm, tokens), form in itertools.product(shapes, CACHES):
        stored = Stored(form, dtype)
        width = (heads + 2 * kv_heads) * dim
        shift = 4 if heads == 28 else 6
        blocks = 4
        qkv = random(tokens, width, dtype=dtype)
        # Beyond E4M3's greatest and below its smallest.
        qkv[0, -1], qkv[0, -2], qkv[0, -3] = 3000.0, -500.0, 1e-4
        bias = None if has_norm else random(width, dtype=dtype)
        norms = [random(dim, dtype=dtype) if has_norm else None for _ in range(2)]
        angles = torch.rand(500, dim // 2, device="cuda") * 6.28
        cos, sin = angles.cos(), angles.sin()
        positions = torch.randint(0, 500, (tokens,), device="cuda", dtype=torch.int32)
        slots = torch.randperm(blocks << shift, device="cuda")[:tokens].int()
        if tokens > 3:
            slots[3] = -1
        q_out = poisoned(tokens, heads, dim, dtype=dtype)
        caches = [stored.poisoned(blocks, kv_heads, 1 << shift, dim) for _ in range(2)]

        def run(block=256):
            kernels.launch(f"rope_and_cache_{form}{name}_{dim}", [tokens], block, q_out, *caches,
                           qkv, bias, *norms, cos, sin, positions, slots, 1e-6, heads, kv_heads, shift)

        run()
        x = qkv.double() + (bias.double() if bias is not None else 0)
        x = x.view(tokens, -1, dim)
        q, k, v = x.split([heads, kv_heads, kv_heads], 1)
        if has_norm:
            q, k = (reference.rms_norm(y, norm, 1e-6) for y, norm in zip((q, k), norms))
        at = positions.long()
        q, k = (reference.rope(y, cos[at], sin[at]) for y in (q, k))
        assert_close(q_out, q, name, f"rope q {dim}")
        kept = slots >= 0
        where = slots[kept].long()
        for cache, want in zip(caches, (k, v)):
            got = cache[where >> shift, :, where & ((1 << shift) - 1)]
            assert_cached(stored, got, want[kept], name, f"rope cache {form}{dim}")
            untouched = torch.ones(blocks << shift, dtype=torch.bool, device="cuda")
            untouched[where] = False
            rest = cache.transpose(1, 2).reshape(blocks << shift, -1)[untouched]
            assert is_nan(rest).all(), "rope_and_cache wrote other slots"
        assert_steady(run, [q_out, *caches], "rope_and_cache", 20)
        # Few threads take heads in several rounds.
        assert_steady(lambda: run(32), [q_out, *caches], "rope_and_cache in a small block", 2)


def assert_cached(stored, got, want, name, what):
    """Asserts that a cache holds `want`; of E4M3 the very codes, but where f32 and f64 may fall on
    two sides of a middle between two of them."""
    if not stored.is_fp8:
        assert_close(got, want, name, what)
        return
    codes = stored.encode(want)
    differ = codes != got
    middle = (stored.decode(codes) + stored.decode(got))[differ] / 2
    distance = (middle - want[differ]).abs()
    is_near = distance <= 1e-5 * (1 + middle.abs())
    assert is_near.all(), f"{what}: {(~is_near).sum()} of {codes.numel()} codes are wrong"


def test_gemm_small(kernels, name, dtype):
    for tokens_max, form in itertools.product([8, 16], GEMM_FORMS):
        suffix = f"t{tokens_max}_{form}"
        rows, threads, shared_bytes = GEMM_FORMS[form]
        for (tokens, n, k), in shapes_of([
            (tokens_max - 1, 1000, 200), (1, 4608, 3584), (tokens_max, 3584, 3584),
            (5, 100, 18944), (3, 37, 8), (tokens_max, 16, 4864),
        ]):
            x = random(tokens, k, dtype=dtype)
            weight = random(n, k, dtype=dtype, scale=k**-0.5)
            bias, residual = random(n, dtype=dtype), random(tokens, n, dtype=dtype)
            grid = [-(-n // rows)]
            out = poisoned(tokens, n, dtype=dtype)
            want = x.double() @ weight.double().T

            def run():
                kernels.launch(f"gemm_small_{name}_{suffix}", grid, threads, out, x, weight,
                               bias, residual, tokens, n, k, shared_bytes=shared_bytes)

            run()
            assert_close(out, want + bias.double() + residual.double(), name, f"gemm {suffix}")
            assert_steady(run, [out], f"gemm {suffix}")
            out32 = poisoned(tokens, n, dtype=torch.float32)
            kernels.launch(f"gemm_small_{name}_f32out_{suffix}", grid, threads, out32, x,
                           weight, None, tokens, n, k, shared_bytes=shared_bytes)
            error = relative_error(out32, want)
            assert error < 1e-5, f"gemm f32out {suffix}: {error:.2e}"
            if n % 2 == 0:
                half = n // 2
                out = poisoned(tokens, half, dtype=dtype)
                kernels.launch(f"gemm_small_silu_{name}_{suffix}", [-(-half // (rows // 2))], threads,
                               out, x, weight, tokens, half, k, shared_bytes=shared_bytes)
                gate, up = want.chunk(2, -1)
                want = torch.nn.functional.silu(gate) * up
                assert_close(out, want, name, f"gemm silu {suffix}")


class Batch:
    """Random sequences in a paged cache of which every unused slot is NaN."""

    def __init__(self, lens, heads, kv_heads, dim, dtype, shift, scale=1.0, form=""):
        self.lens = lens  # (query_len, context_len)
        self.form = form
        stored = Stored(form, dtype)
        self.heads, self.kv_heads, self.dim, self.shift = heads, kv_heads, dim, shift
        size = 1 << shift
        num_blocks = [-(-context // size) for _, context in lens]
        total = sum(num_blocks) + 3
        order = torch.randperm(total).tolist()
        self.caches = [stored.poisoned(total, kv_heads, size, dim) for _ in range(2)]
        tokens = sum(query for query, _ in lens)
        self.q = random(tokens, heads, dim, dtype=dtype, scale=scale)
        tables, cu_blocks, cu_seqlens, self.contents = [], [0], [0], []
        for (query, context), count in zip(lens, num_blocks):
            table, order = order[:count], order[count:]
            tables += table
            cu_blocks.append(len(tables))
            cu_seqlens.append(cu_seqlens[-1] + query)
            content = [stored.encode(random(context, kv_heads, dim, dtype=dtype))
                       for _ in range(2)]
            where = torch.arange(context, device="cuda")
            blocks = torch.tensor(table, device="cuda")[where >> shift] if count else where
            for cache, part in zip(self.caches, content):
                cache[blocks, :, where & (size - 1)] = part
            self.contents.append([stored.decode(part) for part in content])
        self.cu_seqlens, self.cu_blocks = ints(cu_seqlens), ints(cu_blocks)
        self.block_tables = ints(tables)
        self.context_lens = ints([context for _, context in lens])

    def want(self, scale):
        outs, start = [], 0
        for (query, context), (keys, values) in zip(self.lens, self.contents):
            q = self.q[start : start + query]
            outs.append(reference.attention(q, keys, values, context - query, scale))
            start += query
        return torch.cat(outs)

    def tables(self):
        return self.cu_seqlens, self.context_lens, self.block_tables, self.cu_blocks


def test_attention_decode(kernels, name, dtype):
    groups = [(28, 4, 8), (8, 8, 8), (12, 1, 16), (16, 1, 16), (16, 2, 16)]
    shapes = itertools.product(shapes_of([128, 64], groups, [4, 6]), CACHES)
    for (dim, (heads, kv_heads, group), shift), form in shapes:
        for (lens, splits, split_tokens), in shapes_of([
            ([(1, 1), (1, 17), (1, 640), (3, 70), (0, 0), (1, 1000)], 4, 256),
            ([(1, 5000), (0, 0), (1, 33), (3, 70)], 24, 208),
            ([(1, 9000)], 3, 48),
        ]):
            batch = Batch(lens, heads, kv_heads, dim, dtype, shift, 2.0, form)
            out = poisoned(*batch.q.shape, dtype=dtype)
            size = len(lens) * kv_heads * splits * (heads // kv_heads) * (dim + 4)
            partial = poisoned(size, dtype=torch.float32)
            counters = torch.zeros(len(lens) * kv_heads, device="cuda", dtype=torch.int32)
            scale = dim**-0.5
            split = ints([split_tokens])

            def run():
                kernels.launch(f"attention_decode_{form}{name}_{dim}_g{group}",
                               [splits, kv_heads, len(lens)], 128, out, batch.q, *batch.caches,
                               *batch.tables(), split, partial, counters, scale * LOG2E, heads,
                               kv_heads, shift, shared_bytes=512 * dim)

            run()
            want, start = batch.want(scale), 0
            for query, context in lens:
                rows = slice(start, start + query)
                if query == 1:
                    assert_close(out[rows], want[rows], name, f"decode {form}{dim} {context}")
                else:
                    assert out[rows].isnan().all(), "decode wrote another's rows"
                start += query
            assert counters.sum().item() == 0, "counters are not left zero"
            assert_steady(run, [out], f"decode {form}{dim}")


def test_rope_attention_decode(kernels, name, dtype):
    """Outputs and caches have the bits of rope_and_cache followed by attention_decode."""
    groups = [(28, 4, 8), (8, 8, 8), (12, 1, 16), (16, 1, 16), (16, 2, 16)]
    shapes = itertools.product(shapes_of([128, 64], groups, [4, 6], [False, True]), CACHES)
    for (dim, (heads, kv_heads, group), shift, has_norm), form in shapes:
        lens = [(1, 1), (1, 17), (1, 640), (0, 0), (1, 1000), (1, 16), (1, 2049)]
        batch = Batch(lens, heads, kv_heads, dim, dtype, shift, 1.0, form)
        tokens, splits, split = batch.q.shape[0], 4, ints([256])
        qkv = random(tokens, (heads + 2 * kv_heads) * dim, dtype=dtype)
        norms = [random(dim, dtype=dtype) if has_norm else None for _ in range(2)]
        angles = torch.rand(3000, dim // 2, device="cuda") * 6.28
        cos, sin = angles.cos(), angles.sin()
        there = batch.context_lens > 0
        positions = (batch.context_lens - 1)[there]
        ends = batch.cu_blocks[1:][there].long() - 1
        slots = ((batch.block_tables[ends] << shift) + positions % (1 << shift)).int()
        slots[1] = -1  # Its key and value are not kept.
        stats = len(lens) * kv_heads
        partial = poisoned(stats * splits * (heads // kv_heads) * (dim + 4), dtype=torch.float32)
        counters = torch.zeros(stats, device="cuda", dtype=torch.int32)
        turns = [*norms, cos, sin, positions, slots]
        grid = [splits, kv_heads, len(lens)]

        def attend(kernel, out, caches, *queries):
            kernels.launch(f"{kernel}_{form}{name}_{dim}_g{group}", grid, 128, out, *queries, *caches,
                           *batch.tables(), split, partial, counters, dim**-0.5 * LOG2E, heads,
                           kv_heads, shift, shared_bytes=512 * dim)

        caches = [cache.clone() for cache in batch.caches]
        q, want = (poisoned(tokens, heads * dim, dtype=dtype) for _ in range(2))
        kernels.launch(f"rope_and_cache_{form}{name}_{dim}", [tokens], 96, q, *caches, qkv,
                       None, *turns, 1e-6, heads, kv_heads, shift)
        attend("attention_decode", want, caches, q)
        out = poisoned(tokens, heads * dim, dtype=dtype)

        def run():
            attend("rope_attention_decode", out, batch.caches, qkv, *turns, 1e-6)

        run()
        assert out.isfinite().all()
        assert torch.equal(out, want), f"rope_attention_decode {form}{dim} g{group} {name}"
        for cache, other in zip(batch.caches, caches):
            assert torch.equal(cache.nan_to_num(-7), other.nan_to_num(-7)), "other keys or values"
        assert counters.sum().item() == 0, "counters are not left zero"
        assert_steady(run, [out], f"rope_attention_decode {dim}", 20)


class Prefill:
    """Launches of a prefill attention: `form` is "" or "_wgmma" (compute capability 9.0, no cache of
    E4M3)."""

    def __init__(self, kernels, form, name, batch, min_query, num_blocks=None):
        self.kernels, self.form, self.batch, self.min_query = kernels, form, batch, min_query
        self.name = f"attention_prefill{form}_{batch.form}{name}_{batch.dim}"
        tokens, group = batch.q.shape[0], batch.heads // batch.kv_heads
        tiles = -(-tokens * group // 128) + len(batch.lens)
        if form:
            multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
            self.grid = [num_blocks or min(multiprocessors, tiles * batch.kv_heads)]
            self.cache = [matrix_map(cache.view(-1, batch.dim), 16) for cache in batch.caches]
            self.counters = torch.zeros(2, device="cuda", dtype=torch.int32)
        else:
            self.grid = [batch.kv_heads, tiles]
            self.cache = batch.caches

    def run(self, out, q):
        batch, dim = self.batch, self.batch.dim
        self.kernels.launch(
            self.name, self.grid, 384 if self.form else 128, out, q, *self.cache, *batch.tables(),
            *([self.counters] if self.form else []), dim**-0.5 * LOG2E, len(batch.lens),
            self.min_query, batch.heads, batch.kv_heads, batch.shift,
            shared_bytes=1536 * dim + 1024 if self.form else (640 if batch.form else 768) * dim)


def prefill_forms(kernels, name):
    """The forms that this folder of cubins and GPU have."""
    forms = [form for form in ["", "_wgmma"]
             if f"attention_prefill{form}_{name}_128" in kernels.functions]
    assert forms, "no attention_prefill among the cubins"
    return forms


def check_prefill(batch, out, want, name, min_query, what):
    start = 0
    for query, context in batch.lens:
        rows = slice(start, start + query)
        if query >= min_query:
            assert_close(out[rows], want[rows], name, f"{what} {query} of {context}")
        elif query:
            assert out[rows].isnan().all(), f"{what} wrote a decode's row"
        start += query


PREFILL_LENS = [
    [(1, 1), (64, 64), (33, 500), (1, 700), (0, 0), (200, 200), (5, 5)],
    [(700, 700)],
    [(130, 1500), (300, 301)] + [(2, 40)] * 40 + [(19, 19)],
    [(128, 128), (1, 128), (129, 256), (127, 127), (16, 144), (2, 129)],
    [(300, 4200), (1, 4096), (17, 4097)],
]


def test_attention_prefill(kernels, name, dtype):
    caches = [(28, 4, 4), (28, 4, 5), (28, 4, 6), (4, 4, 4), (12, 1, 5), (16, 4, 4), (16, 1, 6)]
    for dim, (heads, kv_heads, shift) in shapes_of([128, 64], caches):
        for (lens, min_query), cache in itertools.product(shapes_of(PREFILL_LENS, [1, 2]), CACHES):
            batch = Batch(lens, heads, kv_heads, dim, dtype, shift, 2.0, cache)
            want = batch.want(dim**-0.5)
            for form in [""] if cache else prefill_forms(kernels, name):
                job = Prefill(kernels, form, name, batch, min_query)
                out = poisoned(*batch.q.shape, dtype=dtype)
                job.run(out, batch.q)
                what = f"prefill{form} {cache}{heads}/{kv_heads} x {dim}, block {1 << shift},"
                check_prefill(batch, out, want, name, min_query, what)
                assert_steady(lambda: job.run(out, batch.q), [out], what,
                              100 if shift == 4 else 10)


def test_prefill_wgmma_gives_the_same_on_any_grid(kernels, name, dtype):
    if "_wgmma" not in prefill_forms(kernels, name):
        return
    for dim, lens in shapes_of([128, 64], PREFILL_LENS):
        batch = Batch(lens, 28, 4, dim, dtype, 4, scale=2.0)
        want = None
        for num_blocks in [None, 1, 3, 50, 1000]:
            job = Prefill(kernels, "_wgmma", name, batch, 1, num_blocks)
            out = poisoned(*batch.q.shape, dtype=dtype)
            job.run(out, batch.q)
            want = out if want is None else want
            assert torch.equal(out, want), f"prefill_wgmma {dim} on {num_blocks} blocks"
            assert (job.counters == 0).all(), "prefill_wgmma left its counters"


def test_overlapped_prefills_change_nothing(kernels, name, dtype):
    """Each launch's queries are the one's before results."""
    forms = [(form, "") for form in prefill_forms(kernels, name)] + [("", "fp8_")]
    for form, cache in forms:
        batch = Batch([(300, 700), (2, 9), (128, 128)], 28, 4, 128, dtype, 4, form=cache)
        job = Prefill(kernels, form, name, batch, 1)
        outs = [poisoned(*batch.q.shape, dtype=dtype) for _ in range(6)]

        def chain():
            for q, out in zip([batch.q] + outs, outs):
                job.run(out, q)

        chain()
        want = outs[-1].clone()
        assert want.isfinite().all(), "the chain's result"
        graph = torch.cuda.CUDAGraph()
        kernels.overlap = True
        try:
            with torch.cuda.graph(graph):
                chain()
        finally:
            kernels.overlap = False
        assert_steady(graph.replay, outs, f"overlapped prefill{form} {cache}")
        assert torch.equal(outs[-1], want), f"overlapped launches change prefill{form} {cache}"


def test_overlapped_launches_change_nothing(kernels, name, dtype):
    for form in CACHES:
        check_overlapped_chain(kernels, name, dtype, form)


def check_overlapped_chain(kernels, name, dtype, form):
    """A chain of layers in a graph, with kernels that start before their predecessor ends."""
    hidden, heads, kv_heads, dim, ffn, tokens, layers = 512, 8, 2, 64, 1024, 3, 6
    batch = Batch([(1, 300), (1, 17), (1, 900)], heads, kv_heads, dim, dtype, 4,
                  form=form)
    qkv_width = (heads + 2 * kv_heads) * dim
    weights = [[random(n, k, dtype=dtype, scale=k**-0.5) for n, k in
                [(qkv_width, hidden), (hidden, heads * dim), (2 * ffn, hidden), (hidden, ffn)]]
               for _ in range(layers)]
    norm = random(hidden, dtype=dtype)
    cos, sin = (torch.rand(1000, dim // 2, device="cuda") for _ in range(2))
    positions = batch.context_lens - 1
    ends = batch.cu_blocks[1:].long() - 1
    slots = (batch.block_tables[ends] * 16 + positions % 16).int()
    start = random(tokens, hidden, dtype=dtype)
    x, y, h, attended = (poisoned(tokens, hidden, dtype=dtype) for _ in range(4))
    q_out = poisoned(tokens, heads * dim, dtype=dtype)
    qkv, act = (poisoned(tokens, width, dtype=dtype) for width in (qkv_width, ffn))
    splits, split = 5, ints([192])
    partial = poisoned(tokens * kv_heads * splits * 4 * (dim + 4), dtype=torch.float32)
    counters = torch.zeros(tokens * kv_heads, device="cuda", dtype=torch.int32)

    def gemm(kind, form, out, x, w, *others):
        rows, threads, shared_bytes = GEMM_FORMS[form]
        n, k = w.shape
        kernels.launch(f"gemm_small{kind}_{name}_t8_{form}", [-(-n // rows)], threads, out, x, w,
                       *others, tokens, n // 2 if kind else n, k, shared_bytes=shared_bytes)

    def attend(kernel, *queries):
        kernels.launch(f"{kernel}_{form}{name}_{dim}_g8", [splits, kv_heads, tokens], 128, attended,
                       *queries, *batch.caches, *batch.tables(), split, partial, counters,
                       dim**-0.5 * LOG2E, heads, kv_heads, 4, shared_bytes=512 * dim)

    def chain():
        x.copy_(start)
        for i, (qkv_w, o_w, gate_up_w, down_w) in enumerate(weights):
            kernels.launch(f"rms_norm_{name}", [tokens], 64, h, x, norm, 1e-6, hidden)
            gemm("", "wide", qkv, h, qkv_w, None, None)
            turns = None, None, cos, sin, positions, slots
            if i % 2 == 0:
                attend("rope_attention_decode", qkv, *turns, 1e-6)
            else:
                kernels.launch(f"rope_and_cache_{form}{name}_{dim}", [tokens], 64, q_out,
                               *batch.caches, qkv, None, *turns, 1e-6, heads, kv_heads, 4)
                attend("attention_decode", q_out)
            gemm("", "deep", y, attended, o_w, None, x)
            kernels.launch(f"rms_norm_{name}", [tokens], 64, h, y, norm, 1e-6, hidden)
            gemm("_silu", "r32", act, h, gate_up_w)
            gemm("", "wide", x, act, down_w, None, y)

    chain()
    want = x.clone()
    assert want.isfinite().all(), "the chain's result"
    graph = torch.cuda.CUDAGraph()
    kernels.overlap = True
    try:
        with torch.cuda.graph(graph):
            chain()
    finally:
        kernels.overlap = False
    assert_steady(graph.replay, [x, y, h, attended, q_out, qkv, act], "overlapped chain")
    assert torch.equal(x, want), "overlapped launches change the result"


DEFAULTS = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, typical_p=1.0,
                repetition_penalty=1.0, frequency_penalty=0.0, presence_penalty=0.0, seed=0,
                output_index=0, counts_slot=-1, mask_row=-1, num_logprobs=-1, bias_start=0,
                bias_end=0)


def packed_params(rows):
    image = b"".join(
        struct.pack("<fIffffffQQiiiIII", *(row[name] for name in DEFAULTS), 0) for row in rows
    )
    return torch.frombuffer(bytearray(image), dtype=torch.uint8).cuda()


class SamplerRun:
    """One launch of `sample` and its outputs."""

    def __init__(self, kernels, logits, rows, bias=(), masks=None, counts=None, vocab=None):
        num, stride = logits.shape
        self.vocab = vocab or stride
        self.kernels, self.logits = kernels, logits
        self.params = packed_params(rows)
        self.bias_ids = ints([token for token, _ in bias] or [0])
        self.bias_values = torch.tensor([value for _, value in bias] or [0.0], device="cuda")
        self.masks, self.counts = masks, counts
        self.tokens, self.status, self.ranks = (
            torch.full((num,), -1, device="cuda", dtype=torch.int32) for _ in range(3)
        )
        self.logprobs = torch.full((num,), float("nan"), device="cuda")
        self.top_ids = torch.full((num, 20), -1, device="cuda", dtype=torch.int32)
        self.top_logprobs = torch.full((num, 20), float("nan"), device="cuda")
        self.grid = [num * CLUSTER]
        self.shared_len = -(-(-(-self.vocab // CLUSTER)) // 4) * 4
        self.scratch = None
        if self.shared_len > 45000:
            self.use_scratch()

    def use_scratch(self):
        """Keeps the rows in global memory, as where shared memory is too small."""
        share = -(-(-(-self.vocab // CLUSTER)) // 4) * 4
        self.scratch = poisoned(self.grid[0], share, dtype=torch.float32)
        self.shared_len = 0

    def run(self):
        stride = self.logits.shape[1]
        mask_stride = self.masks.shape[1] if self.masks is not None else 0
        counts_stride = self.counts.shape[1] if self.counts is not None else 0
        self.kernels.launch("sample", self.grid, 512, self.tokens, self.status, self.logprobs,
                            self.ranks, self.top_ids, self.top_logprobs, self.logits,
                            self.scratch, self.params, self.bias_ids, self.bias_values,
                            self.masks, self.counts, self.vocab, int64(stride),
                            int64(mask_stride), int64(counts_stride), 20, self.shared_len,
                            shared_bytes=4 * self.shared_len)
        return self


def test_sampler_draws_as_the_cpu(kernels, name, dtype):
    if name != "f16":
        return
    rng = np.random.default_rng()
    borderline = 0
    for (vocab, num), in shapes_of([(1000, 48), (152064, 48), (49152, 32), (17, 16)]):
        logits = rng.normal(0, 3, (num, vocab)).astype(np.float32)
        # Ties, as float16 logits have many.
        logits[::3] = np.round(logits[::3] * 8) / 8
        counts = np.zeros((num, vocab + vocab % 2), np.uint16)
        allowed = rng.random((num, -(-vocab // 32) * 32)) < 0.5
        rows, bias = [], []
        for i in range(num):
            pick = lambda *options: options[rng.integers(len(options))]
            row = dict(DEFAULTS, temperature=pick(0.0, 0.3, 0.7, 1.0, 1.0, 2.0),
                       top_k=pick(0, 0, 1, 5, 50, 2000), top_p=pick(1.0, 1.0, 0.9, 0.5, 0.999),
                       min_p=pick(0.0, 0.0, 0.05), typical_p=pick(1.0, 1.0, 1.0, 0.7),
                       seed=int(rng.integers(2**63)), output_index=int(rng.integers(3000)))
            start = len(bias)
            if i % 4 == 1:
                chosen = rng.choice(vocab, min(8, vocab), replace=False)
                bias += [(int(t), float(np.float32(v))) for t, v in
                         zip(chosen, [-np.inf, 5, -3, 100, -100, 1, 2, 0.1])]
            row.update(bias_start=start, bias_end=len(bias))
            if i % 4 == 2:
                row.update(mask_row=i)
            if i % 4 in (2, 3):
                seen = rng.random(vocab) < 0.1
                counts[i, :vocab] = np.where(seen, rng.integers(0, 4, vocab), 0)
                counts[i, :vocab] |= np.where(rng.random(vocab) < 0.05, 0x8000, 0).astype(np.uint16)
                row.update(counts_slot=i, repetition_penalty=pick(1.0, 1.2, 0.8),
                           frequency_penalty=pick(0.0, 0.5), presence_penalty=pick(0.0, 1.5))
            rows.append(row)
        words = np.packbits(allowed, axis=1, bitorder="little").view(np.int32)
        device_counts = torch.from_numpy(counts.view(np.int16)).cuda()
        padded = torch.nn.functional.pad(torch.from_numpy(logits), (0, -vocab % 4),
                                         value=float("nan")).cuda()
        job = SamplerRun(kernels, padded, rows, bias, torch.from_numpy(words.copy()).cuda(),
                         device_counts, vocab)
        job.run()
        assert (job.status == 0).all(), job.status
        got = job.tokens.tolist()
        for i, row in enumerate(rows):
            want, margin = reference.sample(
                logits[i], row, bias[row["bias_start"] : row["bias_end"]],
                allowed[i, :vocab] if row["mask_row"] >= 0 else None,
                counts[i, :vocab] if row["counts_slot"] >= 0 else None)
            if got[i] != want:
                assert margin < 2e-6, f"row {i} of {vocab}: {got[i]} for {want} ({margin}), {row}"
                borderline += 1
        after = device_counts.cpu().numpy().view(np.uint16)
        for i, row in enumerate(rows):
            if row["counts_slot"] >= 0:
                counts[i, got[i]] += 1
        assert (after == counts).all(), "counts"
        # Without shared memory for the row, and repeated: the same tokens.
        for slot, row in enumerate(rows):
            row["counts_slot"] = -1
        plain = SamplerRun(kernels, job.logits, rows, bias, job.masks, vocab=vocab)
        plain.run()
        assert_steady(plain.run, [plain.tokens], "sample", 50)
        scratch = SamplerRun(kernels, job.logits, rows, bias, job.masks, vocab=vocab)
        scratch.use_scratch()
        scratch.run()
        assert torch.equal(scratch.tokens, plain.tokens), "sample through scratch"
    assert borderline < 4, f"{borderline} draws differ near a border"


def test_sampler_reports(kernels, name, dtype):
    if name != "f16":
        return
    vocab, stride = 50000, 50048
    logits = torch.randn(6, stride, device="cuda") * 4
    logits[:, vocab:] = float("nan")
    logits[1] = (logits[1] * 2).round()
    logits[1, vocab:] = float("nan")
    logits[2, 77] = float("nan")
    logits[3, 78] = float("inf")
    logits[4, :vocab] = float("-inf")
    rows = [dict(DEFAULTS, num_logprobs=20, seed=i) for i in range(6)]
    rows[5] = dict(rows[5], top_k=0xFFFFFFFF)
    job = SamplerRun(kernels, logits, rows, vocab=vocab).run()
    assert job.status.tolist() == [0, 0, 1, 1, 2, -1], job.status
    assert job.tokens[2:4].tolist() == [77, 78] and job.tokens[5] == -1, job.tokens
    assert job.logprobs[2].isnan() and job.logprobs[3] == float("inf"), job.logprobs
    for i in range(2):
        row = logits[i, :vocab].double()
        logprobs = row.log_softmax(-1)
        token = job.tokens[i].item()
        assert abs(job.logprobs[i].item() - logprobs[token].item()) < 1e-5, "logprob"
        assert job.ranks[i].item() == (row >= row[token]).sum().item(), "rank"
        order = torch.sort(-row, stable=True).indices[:20]
        assert job.top_ids[i].tolist() == order.tolist(), "top ids"
        assert (job.top_logprobs[i].double() - logprobs[order]).abs().max() < 1e-5, "top logprobs"


def test_mark_tokens(kernels, name, dtype):
    if name != "f16":
        return
    counts = torch.zeros(1000, dtype=torch.int16, device="cuda")
    ids = torch.randint(0, 1100, (5000,), device="cuda", dtype=torch.int32)
    kernels.launch("mark_tokens", [4], 256, counts, ids, 300, 5000, 1000)
    want = np.bincount(ids[300:].cpu().numpy(), minlength=1100)[:1000].astype(np.uint16)
    prompt = ids[:300].cpu().numpy()
    want[prompt[prompt < 1000]] |= 0x8000
    assert (counts.cpu().numpy().view(np.uint16) == want).all(), "mark_tokens"


def main(names):
    """Runs the tests of a module's globals."""
    torch.manual_seed(int(time.time()))
    kernels = Kernels(sys.argv[1])
    wanted = sys.argv[2] if len(sys.argv) > 2 else ""
    failed = 0
    for test in [value for key, value in list(names.items()) if key.startswith("test_")]:
        if wanted not in test.__name__:
            continue
        for type_name, dtype in TYPES.items():
            start = time.time()
            try:
                test(kernels, type_name, dtype)
                torch.cuda.synchronize()
                result = "ok"
            except Exception as error:
                failed += 1
                result = f"FAILED {type(error).__name__}: {error}"[:600]
                traceback.print_exc(limit=3)
            print(f"{test.__name__} {type_name}: {result} ({time.time() - start:.1f} s)", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main(globals())
