"""A single row on a CPU, as in decoding: the ways to multiply it with weights and to attend from it, and the fastest.

Does: name the ways, and time them on a model's own weights. Does not: decide when they are used (model.py's Linear and
attention.py's attend do, where there is one row). Processors differ: with AMX the matrix-vector kernel reads weights
1.3 times as fast as F.linear, on others half as fast, so the choice is measured and no name of a processor is asked.

    ways = fastest_ways(model)               # Ways(product="mv", attention="flash")
    model.use_ways(ways)

Letters: B batch, Hkv key heads, G query heads that share one, T keys, D head width.
"""
import math
import shutil
import statistics
import time
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Ways:
    """How a single row is multiplied, a row of PRODUCTS, and how it attends, a row of ATTENTIONS."""
    product: str = "mv"
    attention: str = "flash"

    def __str__(self):
        return f"weights by {self.product}, cached keys by {self.attention}"


# ---------------------------------------------------------------------------------------------------------------------
# one row times a weight: product(x (1, K), weight (N, K)) -> (1, N)

def mv_product(x, weight):
    """By the matrix-vector kernel."""
    return torch.mv(weight, x[0])[None]


def row_sums(x, weight):
    """The definition, for a compiler: products in float32, and their sums."""
    return (weight.float() * x.float()).sum(-1)[None].to(x.dtype)


@cache
def compiled_for(shape, dtype):
    """row_sums, compiled for weights of one shape: a function of its own for each, as one that meets many shapes falls
    back to running uncompiled."""
    def product(x, weight):
        return row_sums(x, weight)
    return torch.compile(product, dynamic=False)


def compiled_product(x, weight):
    """row_sums by torch.compile."""
    return compiled_for(weight.shape, weight.dtype)(x, weight)


PRODUCTS = {"linear": F.linear, "mv": mv_product, "compiled": compiled_product}


# ---------------------------------------------------------------------------------------------------------------------
# one row's attention to a set of keys: (q (B, Hkv, G, D), k, v (B, Hkv, T, D), bias (1, Hkv, G, T) or None)
# -> its output (B, Hkv, G, D) and the log-sum-exp of its scores (B, Hkv, G), float32

def flash_attention(q, k, v, bias=None):
    """By PyTorch's flash kernel for CPUs. Query heads that share a key head are its rows, so that k is read once."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias)


def matmul_attention(q, k, v, bias=None):
    """By two matrix products, on any device."""
    scores = (q @ k.transpose(-1, -2)).float() / math.sqrt(q.shape[-1])
    if bias is not None:
        scores = scores + bias
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp()
    return weights.to(v.dtype) @ v, lse


def attention_sums(q, k, v, bias=None):
    """The definition, for a compiler: products in float32, and their sums."""
    scores = (k.float()[:, :, None] * q.float()[:, :, :, None]).sum(-1) / math.sqrt(q.shape[-1])
    if bias is not None:
        scores = scores + bias
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp()
    out = (weights[..., None] * v.float()[:, :, None]).sum(-2)
    return out.to(v.dtype), lse


@cache
def compiled_sums():
    """attention_sums, compiled for any number of keys."""
    return torch.compile(attention_sums, dynamic=True)


def compiled_attention(q, k, v, bias=None):
    """attention_sums by torch.compile."""
    return compiled_sums()(q, k, v, bias)


ATTENTIONS = {"flash": flash_attention, "matmul": matmul_attention, "compiled": compiled_attention}


# ---------------------------------------------------------------------------------------------------------------------
# which is the fastest here

LEAST = 2 ** 27   # bytes of weights below which every way is fast enough, and results should not depend on a clock
COMPILING = 20.0  # seconds that torch.compile may take for a model


def fastest_ways(model, tokens=0):
    """The Ways that are fastest for this model on this machine, timed in some milliseconds; the default for models
    below LEAST bytes and away from CPUs.

    tokens: how many will be decoded. torch.compile's ways are tried only where the seconds that the others take beyond
    copying as many bytes, times the tokens, exceed COMPILING.
    """
    weights = timed_weights(model)
    bytes_timed = sum(weight.nbytes for weight in weights)
    if bytes_timed < LEAST or weights[0].device.type != "cpu":
        return Ways()
    q, keys, values = timed_keys(model, weights[0].dtype)
    layers = model.config.num_hidden_layers

    def multiply(product):
        for weight in weights:
            product(torch.ones(1, weight.shape[1], dtype=weight.dtype), weight)

    def attend(attention):
        for k, v in zip(keys, values):
            attention(q, k, v)
    copying = copy_seconds() if tokens else 0.0
    all_weights = sum(weight.nbytes for weight in model.parameters())
    return Ways(fastest(PRODUCTS, multiply, bytes_timed * copying, tokens * all_weights / bytes_timed),
                fastest(ATTENTIONS, attend, 2 * keys.nbytes * copying, tokens * layers / len(keys)))


def fastest(table, run, floor, times):
    """The name of the way in table that run(way) is fastest with.

    floor: seconds that run needs at least; times: how often it will be run. "compiled" is tried where that may pay.
    """
    plain = {name: partial(run, way) for name, way in table.items() if name != "compiled"}
    seconds = medians(plain)
    name = min(seconds, key=seconds.get)
    if times * (seconds[name] - floor) < COMPILING or not has_compiler():
        return name
    seconds = medians({name: plain[name], "compiled": partial(run, table["compiled"])})
    return min(seconds, key=seconds.get)


def has_compiler():
    """Whether there is the C++ compiler that torch.compile needs."""
    return any(map(shutil.which, ("g++", "clang++", "c++", "cl")))


@torch.no_grad()
def medians(calls, rounds=3):
    """{name: seconds} of calls {name: function}: all in turn, after one call each to warm up."""
    for call in calls.values():
        call()
    seconds = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def copy_seconds():
    """Seconds per byte that is moved, read or written, in a copy of LEAST/2 bytes."""
    x = torch.zeros(LEAST // 2, dtype=torch.uint8)
    y = torch.zeros_like(x)
    return medians({"copy": partial(y.copy_, x)})["copy"] / LEAST


def timed_weights(model):
    """The matrices of the first layers, about LEAST bytes of them: more than a processor's cache holds."""
    weights = []
    for layer in model.model.layers:
        if sum(weight.nbytes for weight in weights) < LEAST:
            weights += [weight for weight in layer.parameters() if weight.ndim == 2]
    return weights


def timed_keys(model, dtype, T=2048):
    """A query (1, Hkv, G, D), and keys and values (layers, 1, Hkv, T, D) as caches hold them, of LEAST/16 bytes."""
    c = model.config
    G = c.num_attention_heads // c.num_key_value_heads
    shape = (1, c.num_key_value_heads, T, c.head_dim)
    layers = max(2, LEAST // 16 // (math.prod(shape) * dtype.itemsize))
    keys = torch.ones(layers, *shape, dtype=dtype)
    return keys[0, :, :, :G], keys, torch.ones_like(keys)
