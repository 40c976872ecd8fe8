"""References that the kernels are checked against: attention in f64, the CPU sampler in numpy.

The sampler is a port of src/engine/sampler.rs and its modules with the same roundings: f32 where
that has f32, sums in f64.
"""

import numpy as np
import torch


def rms_norm(x, weight, eps):
    x = x.double()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.double()


def rope(x, cos, sin):
    """x [tokens, heads, D]; cos, sin [tokens, D / 2]; half-split form."""
    first, second = x.chunk(2, -1)
    cos, sin = cos[:, None].double(), sin[:, None].double()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def attention(q, keys, values, first_position, scale):
    """q [n, heads, D], keys and values [context, kv_heads, D]; causal, in f64."""
    group = q.shape[1] // keys.shape[1]
    keys = keys.double().repeat_interleave(group, 1)
    values = values.double().repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q.double(), keys) * scale
    rows = torch.arange(q.shape[0], device=q.device)[:, None] + first_position
    columns = torch.arange(keys.shape[0], device=q.device)[None]
    scores = scores.masked_fill(columns > rows, float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)


def philox_uniform(seed, index):
    counter = [index & 0xFFFFFFFF, index >> 32, 0, 0]
    key = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        first = 0xD2511F53 * counter[0]
        second = 0xCD9E8D57 * counter[2]
        counter = [
            (second >> 32) ^ counter[1] ^ key[0],
            second & 0xFFFFFFFF,
            (first >> 32) ^ counter[3] ^ key[1],
            first & 0xFFFFFFFF,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return ((counter[1] << 32 | counter[0]) >> 11) * 2.0**-53


def weight_of(x):
    """e^x for x ≤ 0, as select.rs."""
    f = np.float32
    clamped = np.where(x > f(-87), x, f(-87)).astype(f)
    rounded = clamped * f(np.log2(np.e)) + f(12582912)
    n = rounded - f(12582912)
    r = clamped - n * f(0.6933594) - n * f(-2.1219444e-4)
    p = np.full_like(r, f(1.9875691e-4))
    for coefficient in [1.3981999e-3, 8.333452e-3, 4.1665796e-2, 1.6666665e-1, 0.5]:
        p = p * r + f(coefficient)
    e_to_r = p * r * r + r + f(1)
    exponent = (rounded.view(np.uint32) - f(12582912).view(np.uint32)) + np.uint32(127)
    power = (exponent << np.uint32(23)).view(f)
    return np.where(x > f(-87), e_to_r * power, f(0)).astype(f)


def _cutoff(keys, weights, fraction):
    """The smallest key up to which the tokens have `fraction` of the mass, and how near it is."""
    order = np.argsort(keys, kind="stable")
    sums = np.cumsum(weights[order], dtype=np.float64)
    target = float(np.float32(fraction)) * sums[-1]
    index = min(np.searchsorted(sums, target), len(order) - 1)
    margin = np.abs(sums - target).min() / sums[-1]
    return keys[order[index]], margin


def sample(logits, params, bias=(), allowed=None, counts=None):
    """Returns (token, margin): how near the draw came to another token, relative to all mass."""
    f = np.float32
    x = logits.astype(f).copy()
    for token, value in bias:
        x[token] += f(value)
    if allowed is not None:
        x[~allowed] = -np.inf
    if counts is not None:
        seen = counts != 0
        drawn = (counts & 0x7FFF).astype(f)
        scaled = np.where(x > 0, x / f(params["repetition_penalty"]),
                          x * f(params["repetition_penalty"])).astype(f)
        lowered = scaled - f(params["frequency_penalty"]) * drawn - f(params["presence_penalty"])
        x = np.where(seen, np.where(drawn > 0, lowered, scaled), x).astype(f)
    if params["temperature"] < 1e-5:
        return int(np.argmax(x)), 1.0
    x = ((x - x.max()) / max(f(params["temperature"]), f(1e-2))).astype(f)
    margin = 1.0
    if params["min_p"] > 0:
        x[x < np.log(f(params["min_p"]))] = -np.inf
    top_k = params["top_k"]
    if 0 < top_k < len(x):
        x[x < np.partition(x, -top_k)[-top_k]] = -np.inf
    for name, distance in [("top_p", lambda x: -x), ("typical_p", None)]:
        if params[name] >= 1:
            continue
        weights = weight_of(x)
        kept = weights > 0
        if distance is None:
            w = weights[kept].astype(np.float64)
            mean = f((x[kept].astype(np.float64) * w).sum() / w.sum())
            distance = lambda x: np.abs(mean - x)
        cutoff, near = _cutoff(distance(x[kept]), weights[kept].astype(np.float64), params[name])
        margin = min(margin, near)
        with np.errstate(invalid="ignore"):
            x[~(distance(x) <= cutoff)] = -np.inf
    weights = weight_of(x).astype(np.float64)
    sums = np.cumsum(weights)
    target = philox_uniform(params["seed"], params["output_index"]) * sums[-1]
    token = int(np.searchsorted(sums, target, side="right"))
    return token, min(margin, np.abs(sums - target).min() / sums[-1])
