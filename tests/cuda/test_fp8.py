"""Checks the FP8 kernels: quantize_rows bit for bit, products against f64 of what they multiply.

    python3 tests/cuda/test_fp8.py FOLDER_OF_CUBINS [part of a test's name]

As test_kernels.py: fresh random inputs, poisoned outputs, REPEATS and QUICK. Needs compute
capability 9.0, elsewhere every test ends at once.
"""

import itertools

import numpy as np
import torch

from driver import relative_error
from test_kernels import (NORM_SHAPES, REPEATS, TOLERANCE, assert_steady, gemm_stream, gemm_tile,
                          main, norm_of, poisoned, random)

LARGEST = 448.0
FILES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def is_hopper():
    return torch.cuda.get_device_capability() == (9, 0)


def accumulation_error(k):
    """What a product of K elements may lose before its output is rounded. Hopper adds 32 products
    to a sum with 13 bits behind the leading one of the largest. That simulated loses 0.12% of the
    norm at K = 3584 and 0.34% at 18944, growing with the root of K; three times that is allowed."""
    return 6e-5 * k**0.5


def quantize_rows(kernels, x):
    """Returns E4M3 as bytes, and the scales."""
    rows, width = x.shape
    out = torch.full([rows, width], 0x7F, dtype=torch.uint8, device="cuda")
    scales = poisoned(rows, dtype=torch.float32)
    launch_quantize(kernels, out, scales, x)
    return out, scales


def launch_quantize(kernels, out, scales, x):
    rows, width = x.shape
    name = {dtype: name for name, dtype in FILES.items()}[x.dtype]
    block = min(1024, -(-width // 8 // 32) * 32)
    kernels.launch(f"quantize_rows_{name}", [rows], block, out, scales, x, width)


def quantized(x):
    """The reference: E4M3 as bytes and scales, divisions by numpy, which rounds as IEEE 754 says."""
    largest = x.float().abs().amax(-1).cpu().numpy()
    scales = np.maximum(largest / np.float32(LARGEST), np.float32(1e-30))
    scales = np.where(largest > 0, scales, np.float32(1)).astype(np.float32)
    inverse = torch.from_numpy(np.float32(1) / scales).cuda()
    values = (x.float() * inverse[:, None]).clamp(-LARGEST, LARGEST)
    return values.to(torch.float8_e4m3fn).view(torch.uint8), torch.from_numpy(scales).cuda()


def values_of(quantized, scales):
    """E4M3 bytes and scales as f64."""
    elements = quantized.view(torch.float8_e4m3fn).float().double()
    return elements * scales[:, None].double()


def pairs(quantized):
    """E4M3 bytes as the maps see them."""
    return quantized.view(torch.int16)


def test_quantize_rows(kernels, name, dtype):
    if not is_hopper():
        return
    dtypes = [dtype] + [torch.float32] * (name == "f16")
    shapes = [(1, 16), (7, 3584), (33, 18944), (3, 40000), (2000, 512), (5, 8), (64, 2064)]
    for (rows, width), dtype in itertools.product(shapes, dtypes):
        what = f"quantize_rows {dtype} {rows} {width}"
        # Rows of any size, from below f16's smallest to near its largest.
        size = 10 ** torch.empty(rows, 1, device="cuda").uniform_(-9, 3.7)
        x = (torch.randn(rows, width, device="cuda") * size).to(dtype)
        if rows > 4:
            x[1] = 0
            x[2] = 0
            x[2, width // 2] = 1e-7
            x[3, width - 1] = 60000
        out, scales = quantize_rows(kernels, x)
        want, want_scales = quantized(x)
        assert torch.equal(scales, want_scales), f"{what}: scales"
        differing = (out != want).sum().item()
        assert differing == 0, f"{what}: {differing} elements of {out.numel()}"
        if rows > 4:
            assert scales[1].item() == 1 and not out[1].any(), f"{what}: a row of zeros"
        poisonable = [out.view(torch.int8), scales]
        assert_steady(lambda: launch_quantize(kernels, out, scales, x), poisonable, what, 10)
        # Each element's own rounding: half a step, of 2^-3 or, below 2^-6, of 2^-9.
        back = values_of(out, scales)
        bound = torch.maximum(x.double().abs() / 16, scales[:, None].double() * 2.0**-10) * 1.001
        assert ((back - x.double()).abs() <= bound).all(), f"{what}: rounding"
    x = random(3, 64, dtype=dtype)
    x[1, 5] = float("nan")
    out, scales = quantize_rows(kernels, x)
    assert values_of(out, scales)[1, 5].isnan(), "NaN must stay"
    assert values_of(out, scales)[[0, 2]].isfinite().all(), "other rows stay finite"


def test_norms_quantise_as_quantize_rows(kernels, name, dtype):
    if not is_hopper():
        return
    for rows, width in NORM_SHAPES:
        suffix, block = norm_of(width, name)
        x, residual = (random(rows, width, dtype=dtype, scale=3) for _ in range(2))
        weight = random(width, dtype=dtype)
        for kind in ["", "add_"]:
            outs = [[poisoned(rows, width, dtype=dtype) for _ in range(2)] for _ in range(2)]
            inputs = [x, residual, weight] if kind else [x, weight]
            for (out, total), more in zip(outs, [False, True]):
                elements = torch.full([rows, width], -1, dtype=torch.int8, device="cuda")
                scales = poisoned(rows, dtype=torch.float32)
                targets = [out] + [elements, scales] * more + [total] * (kind != "")
                kernels.launch(f"{kind}rms_norm{'_fp8' * more}_{suffix}", [rows], block, *targets,
                               *inputs, 1e-6, width)
            what = f"{kind}rms_norm_fp8 {name} {rows} {width}"
            assert torch.equal(outs[0][0], outs[1][0]), f"{what}: the norm"
            if kind:
                assert torch.equal(outs[0][1], outs[1][1]), f"{what}: the sum"
            want, want_scales = quantized(outs[0][0])
            assert torch.equal(scales, want_scales), f"{what}: scales"
            assert torch.equal(elements.view(torch.uint8), want), f"{what}: elements"


def product_cases():
    """(kernel's launcher, its label, whether it has SiLU, tokens, n, k, repeats)"""
    for tokens, n, k in [(300, 1000, 528), (1, 8, 16), (256, 4608, 3584), (2100, 1160, 256),
                         (129, 512, 18944), (65, 3584, 3584)]:
        for is_silu in [False, True]:
            for columns in [128, 192, 256] if is_silu else [128, 192, 224, 256]:
                def tile(kernels, name, out, x, w, bias, scales, is_silu=is_silu, columns=columns):
                    gemm_tile(kernels, name, columns, out, x, w, bias, is_silu, scales)
                yield tile, f"gemm_tile n{columns}", is_silu, tokens, n, k, 5
    for limit, is_silu in itertools.product([16, 32, 64], [False, True]):
        for tokens, n, k, blocks in [(limit, 1000, 528, None), (limit // 2 + 1, 4608, 3584, None),
                                     (1, 8, 16, None), (limit, 520, 18944, 264),
                                     (1, 3584, 3584, 264)]:
            def stream(kernels, name, out, x, w, bias, scales, is_silu=is_silu, limit=limit,
                       blocks=blocks):
                gemm_stream(kernels, name, limit, out, x, w, bias, "_silu" * is_silu, blocks,
                            scales)
            yield stream, f"gemm_stream t{limit}", is_silu, tokens, n, k, REPEATS


def test_gemm_fp8(kernels, name, dtype):
    """Every form, tails of every dimension, all launches overlapped; scales differ by rows."""
    if not is_hopper():
        return
    for launch, label, is_silu, tokens, n, k, repeats in product_cases():
        what = f"fp8 {label} {'silu ' * is_silu}{tokens} {n} {k} {name}"
        rows = 2 * n if is_silu else n
        x = random(tokens, k, dtype=torch.float32)
        x *= torch.empty(tokens, 1, device="cuda").uniform_(0.3, 3)
        w = random(rows, k, dtype=torch.float32, scale=k**-0.5)
        w *= torch.empty(rows, 1, device="cuda").uniform_(0.3, 3)
        (x8, x_scales), (w8, w_scales) = quantized(x), quantized(w)
        want = values_of(x8, x_scales) @ values_of(w8, w_scales).T
        bias = None
        if is_silu:
            gate, up = want.chunk(2, -1)
            want = torch.nn.functional.silu(gate) * up
        else:
            bias = random(n, dtype=dtype)
            want = want + bias.double()
        out = poisoned(tokens, n, dtype=dtype)

        def call():
            launch(kernels, f"fp8_{name}", out, pairs(x8), pairs(w8), bias, (x_scales, w_scales))

        kernels.overlap = True
        try:
            call()
            error = relative_error(out, want)
            bound = TOLERANCE[name] + accumulation_error(k) * (2 if is_silu else 1)
            assert error < bound, f"{what}: relative error {error:.2e}, allowed {bound:.1e}"
            assert_steady(call, [out], what, repeats)
        finally:
            kernels.overlap = False


def test_small_sums_are_exact(kernels, name, dtype):
    """Operands of small whole numbers, whose sums fit the accumulator: every bit must be right, so
    that a lost or doubled element of K shows."""
    if not is_hopper():
        return
    for launch, label, is_silu, tokens, n, k, _ in product_cases():
        if is_silu or k > 528:
            continue
        x, w = (torch.randint(-1, 2, (rows, k), device="cuda").float() for rows in (tokens, n))
        x8, w8 = (values.to(torch.float8_e4m3fn).view(torch.uint8) for values in (x, w))
        scales = tuple(torch.full([rows], 0.5, device="cuda") for rows in (tokens, n))
        out = poisoned(tokens, n, dtype=dtype)
        launch(kernels, f"fp8_{name}", out, pairs(x8), pairs(w8), None, scales)
        want = (x.double() @ w.double().T / 4).to(dtype)
        assert torch.equal(out, want), f"fp8 {label} {tokens} {n} {k} {name}: not exact"


def test_overlapped_fp8_layers_change_nothing(kernels, name, dtype):
    """A chain of layers in a graph: kernels that start early must not read old scales."""
    if not is_hopper():
        return
    hidden, ffn, layers = 512, 1024, 6
    norm = random(hidden, dtype=dtype)
    weights = [[quantized(random(n, k, dtype=torch.float32, scale=k**-0.5)) for n, k in
                [(hidden, hidden), (2 * ffn, hidden), (hidden, ffn)]] for _ in range(layers)]
    for tokens in [1, 40, 300]:
        start = random(tokens, hidden, dtype=dtype)
        x, y, h = (poisoned(tokens, hidden, dtype=dtype) for _ in range(3))
        act = poisoned(tokens, ffn, dtype=dtype)
        # One buffer for all, as in the engine.
        x8 = torch.zeros(tokens * ffn, dtype=torch.uint8, device="cuda")
        scales = poisoned(tokens, dtype=torch.float32)

        def product(out, x, weight, is_silu=False):
            w8, w_scales = weight
            part = x8[:x.numel()].view(x.shape)
            launch_quantize(kernels, part, scales, x)
            args = kernels, f"fp8_{name}"
            if tokens <= 64:
                limit = 16 if tokens <= 16 else 64
                gemm_stream(*args, limit, out, pairs(part), pairs(w8), None, "_silu" * is_silu,
                            scales=(scales, w_scales))
            else:
                gemm_tile(*args, 128, out, pairs(part), pairs(w8), None, is_silu,
                          (scales, w_scales))

        def chain():
            x.copy_(start)
            for o_w, gate_up_w, down_w in weights:
                kernels.launch(f"rms_norm_{name}", [tokens], 64, h, x, norm, 1e-6, hidden)
                product(y, h, o_w)
                product(act, y, gate_up_w, is_silu=True)
                product(x, act, down_w)

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
        assert_steady(graph.replay, [x, y, h, act], f"overlapped chain of {tokens}")
        assert torch.equal(x, want), f"overlapped launches change the result of {tokens} tokens"


if __name__ == "__main__":
    main(globals())
