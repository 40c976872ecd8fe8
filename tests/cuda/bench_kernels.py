"""Times the CUDA kernels at the Qwen2.5-7B shape beside torch's, and prints a short table.

    python3 tests/cuda/bench_kernels.py FOLDER_OF_CUBINS [sections]

Sections: memory gemm stream tile sustained fp8 decode prefill small sampler step (all when none is
named). Calls are captured in a CUDA graph over rotating weights that do not fit the L2 cache; times are
medians of 7 replays. The percentage is of the read bandwidth that `read_all` reaches in the same
run.
"""

import itertools
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

try:
    import pynvml
except ImportError:
    pynvml = None

from driver import Kernels, int64, median_us
from test_fp8 import launch_quantize, pairs, quantized
from test_kernels import (CACHES, DEFAULTS, GEMM_FORMS, LOG2E, Batch, Prefill, SamplerRun,
                          gemm_stream, gemm_tile, ints, prefill_forms, random)

HIDDEN, HEADS, KV_HEADS, DIM, FFN, VOCAB, LAYERS = 3584, 28, 4, 128, 18944, 152064, 28
QKV = (HEADS + 2 * KV_HEADS) * DIM
DTYPE, NAME = torch.float16, "f16"


def memory(kernels, ceilings):
    size = 4 << 30
    source = torch.empty(size, dtype=torch.uint8, device="cuda")
    source.view(torch.int32).random_()
    target = torch.empty_like(source)
    time = median_us([lambda: target.copy_(source)])
    print(f"copy {2 * size / time / 1e6:.2f} TB/s (read + written)")
    sink = torch.zeros(10000, dtype=torch.int32, device="cuda")
    best = 0
    for blocks in [132 * 2, 132 * 4, 132 * 16]:
        run = lambda: kernels.launch("read_all", [blocks], 512, sink, source, int64(size // 16))
        best = max(best, size / median_us([run]) / 1e6)
    print(f"read {best:.2f} TB/s")
    ceilings["read"] = best


def multiply(kernels, kind, form, out, x, w, *others):
    """Launches gemm_small; kind is "", "_silu" or "_f32out"."""
    tokens, (n, k) = x.shape[0], w.shape
    rows, threads, shared_bytes = GEMM_FORMS[form]
    limit = 8 if tokens <= 8 else 16
    infix = f"_silu_{NAME}" if kind == "_silu" else f"_{NAME}{kind}"
    kernels.launch(f"gemm_small{infix}_t{limit}_{form}", [-(-n // rows)], threads, out, x, w,
                   *others, tokens, n // 2 if kind == "_silu" else n, k,
                   shared_bytes=shared_bytes)


def gemm(kernels, ceilings):
    print("GEMM: torch µs | form: plain µs, overlapped µs, TB/s, % of read")
    for label, n, k in SHAPES:
        count = max(2, -(-(400 << 20) // (n * k * 2)))
        weights = [random(n, k, dtype=DTYPE, scale=k**-0.5) for _ in range(count)]
        repeats = 20 if n < 10000 else 2
        for tokens in [1, 4, 8, 16]:
            x = random(tokens, k, dtype=DTYPE)
            out = torch.empty(tokens, n, dtype=DTYPE, device="cuda")
            base = median_us([lambda w=w: torch.mm(x, w.T, out=out) for w in weights] * repeats)
            cells = [f"{base:6.1f} {n * k * 2 / base / 1e6:.2f}"]
            for form in GEMM_FORMS:
                kind, others = ("_silu", []) if label == "gate_up" else ("", [None, None])
                calls = [lambda w=w: multiply(kernels, kind, form, out, x, w, *others)
                         for w in weights] * repeats
                plain = median_us(calls)
                kernels.overlap = True
                time = median_us(calls)
                kernels.overlap = False
                speed = n * k * 2 / time / 1e6
                cells.append(f"{form} {plain:5.1f} {time:5.1f} {speed:.2f} "
                             f"{100 * speed / ceilings['read']:2.0f}%")
            print(f"{label:8} M {tokens:2}: " + " | ".join(cells), flush=True)


SHAPES = [("qkv", QKV, HIDDEN), ("o", HIDDEN, HIDDEN), ("gate_up", 2 * FFN, HIDDEN),
          ("down", HIDDEN, FFN), ("head", VOCAB, HIDDEN)]


def stream(kernels, ceilings):
    """Up to 64 tokens: gemm_stream beside cuBLAS; overlapped launches."""
    print("gemm_stream, overlapped: torch µs | µs TB/s, % of read")
    for label, n, k in SHAPES:
        count = max(2, -(-(400 << 20) // (n * k * 2)))
        weights = [random(n, k, dtype=DTYPE, scale=k**-0.5) for _ in range(count)]
        repeats = 20 if n < 10000 else 2
        for tokens in [8, 16, 32, 64]:
            limit = max(16, tokens)
            x = random(tokens, k, dtype=DTYPE)
            out = torch.empty(tokens, n, dtype=DTYPE, device="cuda")
            base = median_us([lambda w=w: torch.mm(x, w.T, out=out) for w in weights] * repeats)
            kind = {"gate_up": "_silu", "head": "_f32out"}.get(label, "")
            half = torch.empty(tokens, n // 2 if label == "gate_up" else n, device="cuda",
                               dtype=torch.float32 if label == "head" else DTYPE)
            kernels.overlap = True
            time = median_us([lambda w=w: gemm_stream(kernels, NAME, limit, half, x, w, None, kind)
                              for w in weights] * repeats)
            kernels.overlap = False
            speed = n * k * 2 / time / 1e6
            print(f"{label:8} M {tokens:3}: {base:.1f} | {time:.1f} {speed:.2f} "
                  f"{100 * speed / ceilings['read']:.0f}%", flush=True)


def tile(kernels, ceilings):
    """From 128 tokens on: gemm_tile beside cuBLAS."""
    print("gemm_tile: torch µs TFLOP/s (gate_up: and silu_and_mul µs) | columns: µs TFLOP/s")
    for label, n, k in SHAPES[:4]:
        count = max(1, -(-(200 << 20) // (n * k * 2)))
        weights = [random(n, k, dtype=DTYPE, scale=k**-0.5) for _ in range(count)]
        repeats = max(1, 6 // count)
        for tokens in [128, 192, 256, 512, 2048, 8192]:
            x = random(tokens, k, dtype=DTYPE)
            out = torch.empty(tokens, n, dtype=DTYPE, device="cuda")
            base = median_us([lambda w=w: torch.mm(x, w.T, out=out) for w in weights] * repeats)
            flops = 2 * tokens * n * k
            head = f"{base:.0f} {flops / base / 1e6:.0f}"
            kernels.overlap = True
            is_silu = label == "gate_up"
            half = out
            if is_silu:
                half = torch.empty(tokens, n // 2, dtype=DTYPE, device="cuda")
                extra = median_us([lambda: kernels.launch(
                    f"silu_and_mul_{NAME}", [tokens, -(-FFN // 2048)], 256, half, out, FFN)] * 5)
                head += f" (+ {extra:.0f})"
            cells = []
            for columns in [128, 192, 256] if is_silu else [128, 192, 224, 256]:
                time = median_us([lambda w=w: gemm_tile(kernels, NAME, columns, half, x, w, None,
                                                        is_silu) for w in weights] * repeats)
                cells.append(f"n{columns}: {time:.0f} {flops / time / 1e6:.0f}")
            kernels.overlap = False
            print(f"{label:8} M {tokens:4}: {head} | " + " | ".join(cells), flush=True)


def watched(call, secs):
    """Repeats `call` for so long; returns µs of one, and the median clock (MHz) and power (W) of the
    second half, 0 where pynvml is missing."""
    median_us([call])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(4):
            call()
    count = max(2, int(secs * 1e6 / (4 * median_us([call]))))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    clocks, powers, began = [0], [0], time.monotonic()
    start.record()
    for _ in range(count):
        graph.replay()
    end.record()
    while not end.query():
        if pynvml is not None and time.monotonic() - began > secs / 2:
            gpu = pynvml.nvmlDeviceGetHandleByIndex(0)
            clocks.append(pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_SM))
            powers.append(pynvml.nvmlDeviceGetPowerUsage(gpu) / 1000)
        time.sleep(0.02)
    end.synchronize()
    return (start.elapsed_time(end) * 1000 / count / 4, statistics.median_low(clocks),
            statistics.median_low(powers))


def sustained(kernels, ceilings):
    """Large products for 0.8 s each, as serving goes on: the GPU's power is the limit."""
    print("sustained products: µs TFLOP/s MHz W; with SiLU for gate_up in ours alone")
    if pynvml is not None:
        pynvml.nvmlInit()
    for label, tokens in [("qkv", 8192), ("gate_up", 2048), ("gate_up", 8192), ("down", 2048)]:
        n, k = next((n, k) for name, n, k in SHAPES if name == label)
        is_silu = label == "gate_up"
        x, w = random(tokens, k, dtype=DTYPE), random(n, k, dtype=DTYPE, scale=k**-0.5)
        out = torch.empty(tokens, n, dtype=DTYPE, device="cuda")
        half = torch.empty(tokens, n // 2, dtype=DTYPE, device="cuda") if is_silu else out
        runs = {"torch": lambda: torch.mm(x, w.T, out=out)}
        for columns in [192, 256] if is_silu else [192, 224, 256]:
            runs[f"n{columns}"] = lambda columns=columns: gemm_tile(
                kernels, NAME, columns, half, x, w, None, is_silu)
        for name, run in runs.items():
            kernels.overlap = name != "torch"
            us, clock, power = watched(run, 0.8)
            kernels.overlap = False
            print(f"{label:8} M {tokens:4} {name:5}: {us:.0f} {2 * tokens * n * k / us / 1e6:.0f} "
                  f"{clock} {power:.0f}", flush=True)


def torch_fp8(x, w, out):
    """torch._scaled_mm with a scale a row of both, as vLLM multiplies; None where it has none."""
    (x8, x_scales), (w8, w_scales) = x, w
    x8, w8 = (values.view(torch.float8_e4m3fn) for values in (x8, w8))
    run = lambda: torch._scaled_mm(x8, w8.T, x_scales[:, None], w_scales[None],
                                   out_dtype=torch.bfloat16, use_fast_accum=True, out=out)
    try:
        run()
    except (RuntimeError, ValueError):
        return None
    return run


def fp8(kernels, ceilings):
    """Products of FP8 beside torch's, both without the quantisation of x, which comes after."""
    print("fp8, overlapped: torch µs (gate_up: without SiLU) | form: µs, TB/s, TFLOP/s")
    kernels.overlap = True
    for label, n, k in SHAPES[:4]:
        count = max(2, -(-(400 << 20) // (n * k)))
        weights = [quantized(random(n, k, dtype=DTYPE, scale=k**-0.5)) for _ in range(count)]
        is_silu = label == "gate_up"
        for tokens in [1, 16, 32, 64, 65, 128, 256, 2048, 8192]:
            x8, x_scales = x = quantized(random(tokens, k, dtype=DTYPE))
            # torch scales rows in bfloat16 only.
            out = torch.empty(tokens, n, dtype=torch.bfloat16, device="cuda")
            half = torch.empty(tokens, n // 2 if is_silu else n, dtype=DTYPE, device="cuda")
            used = weights if tokens < 2048 else weights[:2]
            repeats = max(1, (20 if tokens < 2048 else 4) // len(used))
            calls = [torch_fp8(x, w, out) for w in used]
            base = median_us(calls * repeats) if all(calls) else float("nan")
            cells = []

            def add(what, call):
                time = median_us([lambda w=w: call(*w) for w in used] * repeats)
                cells.append(f"{what} {time:.1f} {n * k / time / 1e6:.2f} "
                             f"{2 * tokens * n * k / time / 1e6:.0f}")

            if tokens <= 64:
                limit = 16 if tokens <= 16 else 32 if tokens <= 32 else 64
                add("stream", lambda w8, scales: gemm_stream(
                    kernels, f"fp8_{NAME}", limit, half, pairs(x8), pairs(w8), None,
                    "_silu" * is_silu, None, (x_scales, scales)))
            for columns in ([128, 192, 256] if is_silu else [128, 192, 224, 256]) * (tokens >= 64):
                add(f"n{columns}:", lambda w8, scales: gemm_tile(
                    kernels, f"fp8_{NAME}", columns, half, pairs(x8), pairs(w8), None, is_silu,
                    (x_scales, scales)))
            print(f"{label:8} M {tokens:4}: {base:.1f} | " + " | ".join(cells), flush=True)
        del weights
    for width in [HIDDEN, FFN]:
        cells = []
        for tokens in [1, 32, 256, 2048, 8192]:
            x = random(tokens, width, dtype=DTYPE)
            out, scales = quantized(x)
            time = median_us([lambda: launch_quantize(kernels, out, scales, x)] * 20)
            cells.append(f"M {tokens}: {time:.1f} {3 * tokens * width / time / 1e6:.2f}")
        print(f"quantize_rows of {width}, µs TB/s: " + " | ".join(cells), flush=True)


def decode(kernels, ceilings):
    print("decode attention: batch × context, splits × tokens: µs, TB/s; torch SDPA µs; then with a "
          "cache of E4M3")
    for (batch_size, context), form in itertools.product(
            [(1, 512), (1, 2048), (1, 16384), (8, 384), (32, 384), (32, 2048), (256, 640),
             (512, 1088)], CACHES):
        data = batch_size * context * KV_HEADS * DIM * (2 if form else 4)
        copies = max(1, min(8, (200 << 20) // data))
        batches = [Batch([(1, context)] * batch_size, HEADS, KV_HEADS, DIM, DTYPE, 4, form=form)
                   for _ in range(copies)]
        cells = []
        for wanted in [132, 264, 396, 792]:
            splits = max(1, min(64, round(wanted / (batch_size * KV_HEADS))))
            split_tokens = max(64, -(-context // splits // 64) * 64)
            splits = -(-context // split_tokens)
            out = torch.empty_like(batches[0].q)
            partial = torch.empty(batch_size * KV_HEADS * splits * 7 * 132, device="cuda")
            counters = torch.zeros(batch_size * KV_HEADS, dtype=torch.int32, device="cuda")
            split = ints([split_tokens])
            calls = [lambda b=b: kernels.launch(
                f"attention_decode_{form}{NAME}_128_g8", [splits, KV_HEADS, batch_size], 128, out,
                b.q, *b.caches, *b.tables(), split, partial, counters, DIM**-0.5 * LOG2E, HEADS,
                KV_HEADS, 4, shared_bytes=512 * DIM) for b in batches]
            time = median_us(calls * 8)
            cell = f"{splits}×{split_tokens}: {time:.1f} {data / time / 1e6:.2f}"
            if cell.split(":")[0] not in [other.split(":")[0] for other in cells]:
                cells.append(cell)
        if form:
            print(f"{batch_size:3} × {context:5} E4M3: " + " | ".join(cells), flush=True)
            continue
        q = random(batch_size, HEADS, 1, DIM, dtype=DTYPE)
        dense = [[random(batch_size, KV_HEADS, context, DIM, dtype=DTYPE) for _ in range(2)]
                 for _ in range(copies)]
        base = median_us([lambda k=k, v=v: F.scaled_dot_product_attention(
            q, k, v, enable_gqa=True) for k, v in dense] * 8)
        print(f"{batch_size:3} × {context:5}: " + " | ".join(cells) + f" | torch {base:.1f}",
              flush=True)


def prefill(kernels, ceilings):
    print("prefill attention: sequences × new tokens (+ cached): µs, TFLOP/s of each form; "
          "torch SDPA (contiguous)")
    for count, tokens, cached in [(1, 2048, 0), (4, 1024, 0), (8, 512, 0), (1, 8192, 0),
                                  (1, 512, 4096)]:
        batch, narrow = (Batch([(tokens, cached + tokens)] * count, HEADS, KV_HEADS, DIM, DTYPE, 4,
                               form=form) for form in CACHES)
        out = torch.empty_like(batch.q)
        flops = 4 * count * (tokens * cached + tokens * tokens // 2) * HEADS * DIM
        cells = []
        jobs = [(form.strip("_") or "mma.sync", Prefill(kernels, form, NAME, batch, 2))
                for form in prefill_forms(kernels, NAME)]
        for what, job in jobs + [("E4M3", Prefill(kernels, "", NAME, narrow, 2))]:
            time = median_us([lambda: job.run(out, batch.q)] * 5)
            cells.append(f"{what} {time:.0f} {flops / time / 1e6:.0f}")
        q = random(count, HEADS, tokens, DIM, dtype=DTYPE)
        k, v = (random(count, KV_HEADS, cached + tokens, DIM, dtype=DTYPE) for _ in range(2))
        if cached:
            # The flash kernel takes this mask, but not with fewer heads of keys.
            k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
            mask = dict(attn_mask=causal_lower_right(tokens, cached + tokens))
        else:
            mask = dict(is_causal=True, enable_gqa=True)
        base = median_us([lambda: F.scaled_dot_product_attention(q, k, v, **mask)] * 5)
        print(f"{count:2} × {tokens} + {cached}: " + " | ".join(cells) +
              f" | torch {base:.0f} {flops / base / 1e6:.0f}", flush=True)


def small(kernels, ceilings):
    print("small kernels, µs at tokens = 1, 32, 256, 2048")
    rows = {}
    for tokens in [1, 32, 256, 2048]:
        x, residual = (random(tokens, HIDDEN, dtype=DTYPE) for _ in range(2))
        weight = random(HIDDEN, dtype=DTYPE)
        qkv, bias = random(tokens, QKV, dtype=DTYPE), random(QKV, dtype=DTYPE)
        q_out = torch.empty(tokens, HEADS * DIM, dtype=DTYPE, device="cuda")
        caches = [torch.zeros(256, KV_HEADS, 16, DIM, dtype=DTYPE, device="cuda")
                  for _ in range(2)]
        cos, sin = (torch.rand(4096, DIM // 2, device="cuda") for _ in range(2))
        positions = torch.arange(tokens, device="cuda", dtype=torch.int32)
        gate_up = random(tokens, 2 * FFN, dtype=DTYPE)
        act = torch.empty(tokens, FFN, dtype=DTYPE, device="cuda")
        runs = {
            "add_rms_norm": lambda: kernels.launch(
                f"add_rms_norm_{NAME}", [tokens], 448, x, residual, x, residual, weight, 1e-6,
                HIDDEN),
            "rope_and_cache": lambda: kernels.launch(
                f"rope_and_cache_{NAME}_128", [tokens], 96, q_out, *caches, qkv, bias, None,
                None, cos, sin, positions, positions, 1e-6, HEADS, KV_HEADS, 4),
            "silu_and_mul": lambda: kernels.launch(
                f"silu_and_mul_{NAME}", [tokens, -(-FFN // 2048)], 256, act, gate_up, FFN),
            "torch rms_norm": lambda: F.rms_norm(x, (HIDDEN,), weight, 1e-6),
        }
        for key, run in runs.items():
            rows.setdefault(key, []).append(median_us([run] * 50))
    for key, times in rows.items():
        print(f"{key:16}" + " ".join(f"{time:7.2f}" for time in times), flush=True)


def sampler(kernels, ceilings):
    print("sampler, vocabulary 152064, µs at rows = 1, 32, 256")
    kinds = {"greedy": dict(temperature=0.0), "temperature": dict(),
             "top_p 0.8 top_k 20": dict(temperature=0.7, top_p=0.8, top_k=20),
             "top_p 0.95": dict(top_p=0.95), "greedy, 5 logprobs": dict(temperature=0.0,
                                                                       num_logprobs=5)}
    for key, changes in kinds.items():
        times = []
        for rows in [1, 32, 256]:
            logits = torch.randn(rows, VOCAB, device="cuda") * 2.5
            params = [dict(DEFAULTS, seed=i, **changes) for i in range(rows)]
            job = SamplerRun(kernels, logits, params)
            times.append(median_us([job.run] * 10))
        print(f"{key:20}" + " ".join(f"{time:7.1f}" for time in times), flush=True)
    for rows in [1, 256]:
        logits = torch.randn(rows, VOCAB, device="cuda")
        print(f"torch argmax, {rows} rows: {median_us([lambda: logits.argmax(-1)] * 10):.1f}")


def step(kernels, ceilings):
    """A whole decode step, kernels only: 28 layers, final norm, head, sampler."""
    print("decode step of the whole model, µs: plain launches, overlapped launches; rope and "
          "attention as two kernels, as one; tok/s of the last")
    weights = [[random(n, k, dtype=DTYPE, scale=k**-0.5) for n, k in
                [(QKV, HIDDEN), (HIDDEN, HIDDEN), (2 * FFN, HIDDEN), (HIDDEN, FFN)]]
               for _ in range(LAYERS)]
    head = random(VOCAB, HIDDEN, dtype=DTYPE, scale=HIDDEN**-0.5)
    norm, bias = random(HIDDEN, dtype=DTYPE), random(QKV, dtype=DTYPE)
    cos, sin = (torch.rand(8192, DIM // 2, device="cuda") for _ in range(2))
    for tokens, context in [(1, 384), (1, 2048), (4, 384), (8, 384), (16, 384), (32, 384),
                            (64, 384)]:
        wide = "wide" if tokens <= 8 else "r32"
        limit = 32 if tokens <= 32 else 64
        batch = Batch([(1, context)] * tokens, HEADS, KV_HEADS, DIM, DTYPE, 4)
        x = random(tokens, HIDDEN, dtype=DTYPE)
        h, y, q_out, attended = (torch.empty_like(x) for _ in range(4))
        qkv = torch.empty(tokens, QKV, dtype=DTYPE, device="cuda")
        act = torch.empty(tokens, FFN, dtype=DTYPE, device="cuda")
        logits = torch.empty(tokens, VOCAB, device="cuda")
        slots = ints([-1] * tokens)
        positions = ints([context - 1] * tokens)
        splits = max(1, min(64, 132 // (tokens * KV_HEADS)))
        split_tokens = max(64, -(-context // splits // 64) * 64)
        splits = -(-context // split_tokens)
        partial = torch.empty(tokens * KV_HEADS * splits * 7 * 132, device="cuda")
        counters = torch.zeros(tokens * KV_HEADS, dtype=torch.int32, device="cuda")
        split = ints([split_tokens])
        job = SamplerRun(kernels, logits, [dict(DEFAULTS, temperature=0.0)] * tokens)

        def attend(kernel, *queries):
            kernels.launch(f"{kernel}_{NAME}_128_g8", [splits, KV_HEADS, tokens], 128, attended,
                           *queries, *batch.caches, *batch.tables(), split, partial, counters,
                           DIM**-0.5 * LOG2E, HEADS, KV_HEADS, 4, shared_bytes=512 * DIM)

        def product(out, x, w, form, bias=None, kind=""):
            if tokens > 16:
                gemm_stream(kernels, NAME, limit, out, x, w, bias, kind)
            else:
                others = {"": [bias, None], "_silu": [], "_f32out": [bias]}[kind]
                multiply(kernels, kind, form, out, x, w, *others)

        def add_norm():
            kernels.launch(f"add_rms_norm_{NAME}", [tokens], 448, h, x, y, x, norm, 1e-6, HIDDEN)

        def run(is_one):
            turns = None, None, cos, sin, positions, slots
            kernels.launch(f"rms_norm_{NAME}", [tokens], 448, h, x, norm, 1e-6, HIDDEN)
            for qkv_w, o_w, gate_up_w, down_w in weights:
                product(qkv, h, qkv_w, "wide", bias)
                if is_one:
                    attend("rope_attention_decode", qkv, *turns, 1e-6)
                else:
                    kernels.launch(f"rope_and_cache_{NAME}_128", [tokens], 96, q_out,
                                   *batch.caches, qkv, None, *turns, 1e-6, HEADS, KV_HEADS, 4)
                    attend("attention_decode", q_out)
                product(y, attended, o_w, "deep")
                add_norm()
                product(act, h, gate_up_w, wide, kind="_silu")
                product(y, act, down_w, "deep")
                add_norm()
            product(logits, h, head, wide, kind="_f32out")
            job.run()

        times = []
        for is_one, kernels.overlap in itertools.product([False, True], [False, True]):
            start = x.clone()
            times.append(median_us([lambda is_one=is_one: run(is_one)]))
            x.copy_(start)
        kernels.overlap = False
        data = 2 * (sum(w.numel() for layer in weights for w in layer) + head.numel())
        print(f"{tokens:2} × {context:4}: {times[0]:.0f} {times[1]:.0f}; {times[2]:.0f} "
              f"{times[3]:.0f}; {tokens * 1e6 / times[3]:.0f} tok/s, weights at "
              f"{100 * data / times[3] / 1e6 / ceilings['read']:.0f}%", flush=True)


def main():
    kernels = Kernels(sys.argv[1])
    ceilings = {"read": 4.5}
    sections = [memory, gemm, stream, tile, sustained, fp8, decode, prefill, small, sampler, step]
    for section in sections:
        if len(sys.argv) == 2 or section.__name__ in sys.argv[2:]:
            try:
                section(kernels, ceilings)
            except Exception as error:
                print(f"{section.__name__} FAILED: {error!r}"[:800], flush=True)
            kernels.overlap = False
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
