"""Where every token believes it is: each length-extrapolation method as data.

A method answers three independent questions, and METHODS has one row per method:
    geometry         which keys does query i see, and at what distance?            -> a list of Regions
    frequencies      how fast does each channel pair turn per unit of distance?    -> inv_freq (D/2,), mscale
    attention scale  how sharp is the softmax of query i, given what it sees?      -> q_scale (Tq,)
Does not touch queries, keys or scores: attention.py executes what is described here.

    python positions.py mesa                            # picture of a small example, and its cost
    plan = make_plan("mesa", i, j, n=9000, L=2048, D=128, H=32)

Letters: i absolute query index, j absolute key index, n prompt length, L training length, D head width,
H query heads, Tq = len(i), Tk = len(j). What depends on the length of the input depends on n, which stays
fixed while tokens are decoded, so that prefill, prefill in pieces and decoding are one function of i.
"""
import argparse
import ast
import inspect
import math
import os
import sys
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass
class Region:
    """Query i sees the keys start[i] <= j < end[i], each at the distance q_pos[i] - k_pos[j].

    Over the queries whose interval is not empty neither bound ever decreases; the regions of one query are disjoint;
    no distance is negative, and none is larger than that of the first key of an interval.
    Example, ReRoPE with window 3: query 5 sees 3 4 5 at 2 1 0 in its near region (q_pos 5, k_pos 3 4 5) and
    0 1 2 at 3 3 3 in its far region (q_pos 3, k_pos 0 0 0).
    """
    q_pos: Tensor  # (Tq,)
    k_pos: Tensor  # (Tk,)
    start: Tensor  # (Tq,) first key seen
    end: Tensor    # (Tq,) one past the last key seen; end <= start where nothing is seen


@dataclass
class Plan:
    """All that attention has to know about positions, for the queries i and the keys j it was made for."""
    regions: list[Region]
    inv_freq: Tensor | None = None   # (D/2,) float64, radians per unit of distance; None: nothing is rotated
    mscale: float = 1.0              # multiplies cos and sin, hence the logits by its square (YaRN)
    q_scale: Tensor | None = None    # (Tq,) float64 factor on all logits of a query
    slopes: Tensor | None = None     # (H,) ALiBi: slope * distance is subtracted from the logits
    cosine: float | None = None      # CosScale: logits are this times the cosine of q and k, not q.k/sqrt(D)
    tables: dict = field(init=False, default_factory=dict, repr=False, compare=False)  # what executors make of it

    def once(self, key, make):
        """make(), kept under a key, so that all layers share it; the plan holds what keys name by id()."""
        if key not in self.tables:
            self.tables[key] = make()
        return self.tables[key]

    def last(self):
        """The plan of the last query alone."""
        regions = [Region(r.q_pos[-1:], r.k_pos, r.start[-1:], r.end[-1:]) for r in self.regions
                   if r.end[-1] > r.start[-1]]
        return replace(self, regions=regions, q_scale=None if self.q_scale is None else self.q_scale[-1:])


# ---------------------------------------------------------------------------------------------------------------------
# geometry: (i, j, n, L, *, hyper-parameters) -> regions. Keyword defaults of None are derived from L and n.

def full(i, j, n, L):
    """Every earlier key at its true distance i - j."""
    return [Region(i, j, 0 * i, i + 1)]


def cosscale(i, j, n, L):
    """CosScale: every earlier key at its true distance; logits are Plan.cosine times the cosine of query and key.

    (arXiv 2501.08570.) Needs a model trained so; the factor is its config's cosine_attention, else 32.
    """
    return full(i, j, n, L)


def near_far(i, j, window, far_q, far_k, sinks=None):
    """True distances below window in one region, far_q[i] - far_k[j] in the other, there of the first `sinks` keys."""
    edge = (i - window + 1).clamp(min=0)
    return [Region(i, j, edge, i + 1), Region(far_q, far_k, 0 * i, edge if sinks is None else edge.clamp(max=sinks))]


def rerope(i, j, n, L, *, window=None):
    """ReRoPE: distance min(i - j, window), so nothing is ever further away than window (Su, kexue.fm 9708).

    window: L/4, the lower end of the blog's "a quarter to a half of the training length".
    """
    window = scaled("window", window, 512, L)
    return near_far(i, j, window, 0 * i + window, 0 * j)


def leaky_rerope(i, j, n, L, *, window=None, k=None):
    """Leaky ReRoPE: beyond window distances grow k times slower, window + (i - j - window)/k (Su, kexue.fm 9708).

    window: L/4. k: the smallest that keeps the last token of the prompt below L, (n - window)/(L - window), never
    below 1; the choice of Mesa-Extrapolation's comparison (arXiv 2410.15859).
    """
    window = scaled("window", window, 512, L)
    k = positive("k", k, max(1.0, (n - window) / max(L - window, 1)))
    return near_far(i, j, window, window + (i.double() - window) / k, j.double() / k)


def self_extend(i, j, n, L, *, window=None, group=None):
    """Self-Extend: beyond window W, groups of G share a position: i//G + W - W//G - j//G (arXiv 2401.01325).

    window W: L/4. group G: the smallest that keeps the largest distance, about W + (n - W)/G, within two thirds of L,
    the authors' rule of thumb, or within (W + L)/2 for a wide window; 1, which is plain RoPE, while n <= L.
    """
    window = scaled("window", window, 512, L)
    limit = max(2 * L / 3, (window + L) / 2)
    needed = 1 if n <= L else math.ceil((n - window) / max(limit - window, 1))
    group = whole("group", group, max(needed, 1))
    if group == 1:
        return full(i, j, n, L)
    return near_far(i, j, window, i // group + window - window // group, j // group)


def dca(i, j, n, L, *, chunk=None, top=None):
    """Dual Chunk Attention: keys stand at j mod chunk, queries where that gives distances of at most top.

    At i mod chunk for their own chunk, min(chunk + i mod chunk, top) for the one before, top for all earlier ones
    (arXiv 2402.17463, section 3). chunk: 3L/4; top: L - 1. (The released code: top 3L/4, chunk 3L/4 - L/8.)
    chunk 4, top 5: query 10 sees 8 9 10 at 2 1 0, 4..7 at 5 4 3 2 and 0..3 at 5 4 3 2.
    """
    chunk = scaled("chunk", chunk, 1536, L)
    top = whole("top", top, max(L - 1, 1), least=chunk - 1)  # a nearer top would put keys behind the query
    begin, local = i - i % chunk, j % chunk
    before = (begin - chunk).clamp(min=0)
    return [Region(i % chunk, local, begin, i + 1), Region((chunk + i % chunk).clamp(max=top), local, before, begin),
            Region(0 * i + top, local, 0 * i, before)]


def string(i, j, n, L, *, shift=None, window=None):
    """STRING: distances from shift S on move closer, to i - j - S + W, well trained (arXiv 2410.18745, section 4).

    For making use of the trained window, n <= L. shift S: L/3. window W: L/32 (128 at L = 4096). The released code also
    multiplies the logits by 1.1434, which the paper does not mention: --attn-scale constant.
    """
    shift = whole("shift", shift, max(L // 3, 1))
    window = scaled("window", window, 64, L)
    return near_far(i, j, shift, i - shift + window, j)


def streaming_llm(i, j, n, L, *, sinks=4, recent=None):
    """StreamingLLM: the first `sinks` keys and the last `recent`, at positions inside that cache (arXiv 2309.17453).

    A closed form of the rolling cache. recent: L - 1 - sinks, so that no distance reaches L. sinks 2, recent 4: query 9
    sees 0 1 at 6 5 and 5..9 at 4..0.
    """
    sinks = whole("sinks", sinks)
    recent = whole("recent", recent, max(L - 1 - sinks, 1))
    return near_far(i, j, recent + 1, i.clamp(max=sinks + recent), j, sinks)


def lm_infinite(i, j, n, L, *, local=None, sinks=10, cap=None):
    """LM-Infinite: the last `local` keys at their distance, the first `sinks` at cap (arXiv 2308.16137).

    local: L; sinks 10, the released drop-in's; cap: L - 1, the largest trained distance (the release has L).
    """
    local, sinks = whole("local", local, L), whole("sinks", sinks)
    cap = whole("cap", cap, max(L - 1, 1))
    if cap < local - 1:
        raise ValueError(f"lm-infinite: cap {cap} is below the largest local distance {local - 1}")
    return near_far(i, j, local, 0 * i + cap, 0 * j, sinks)


# LaMPE's fits of the mapping length, m(n) = most / (1 + exp(-(a n + b))), to models by their window:
LAMPE = {  # a, b, most, fewer tokens than this: m =, head, tail (released code; mistral's a and b are llama3's)
    "llama2": (8.673006440952035e-05, -0.648012322406978, 2489.1055522414357, (8192, 1536), 512, 200),
    "llama3": (1.0493097327094324e-04, -2.466638011138158, 6204.409324666837, (8192, 1536), 512, 200),
    "mistral": (1.0493097327094324e-04, -2.466638011138158, 24576.0, (8192, 1536), 2048, 200),
    "llama3.1": (4.505261149632588e-05, -2.788576860718702, 82358.52413056031, (0, 0), 8192, 1024),
}


def lampe_fit(fit, L):
    """The constants of a fit by name; default: of the model with this window, else llama3's in proportion to L."""
    if fit is None:
        fit = {4096: "llama2", 8192: "llama3", 32768: "mistral", 131072: "llama3.1"}.get(L)
    if fit is not None:
        return pick(LAMPE, "LaMPE fit", fit)
    a, b, _, (below, floor), head, tail = LAMPE["llama3"]
    return (a * 8192 / L, b, 0.75 * L, (below * L // 8192, floor * L // 8192),
            max(head * L // 8192, 1), max(tail * L // 8192, 1))


def lampe(i, j, n, L, *, fit=None, mapping=None, head=None, tail=None):
    """LaMPE: true distances below head, a middle rescaled to a mapping length m(n), true spacing again at the far end.

    With M(x) = floor(m x/(n - 1)): head i - j; middle M(i) + b1 - M(j); tail (the first keys, seen from the end of the
    prompt) i - b2 - j; b1 and b2 join them (arXiv 2508.02308; the released, separable form, each pair once, M extended
    linearly in decoding; the paper floors the distance instead, which is not separable). mapping m: a sigmoid of n,
    fitted to llama2, llama3, llama3.1 or mistral (fit; see lampe_fit), at most n - 1. head, tail: the fit's.
    Plain RoPE while n < 2 head, or where the tail would reach into the head.
    n=12, m=6, head=3, tail=2: M = 0 0 1 1 2 2 3 3 4 4 5 6, query 11 sees 0..11 at 8 7 6 6 5 5 4 4 3 2 1 0.
    """
    a, b, most, (below, floor), fitted_head, fitted_tail = lampe_fit(fit, L)
    head, tail = whole("head", head, fitted_head), whole("tail", tail, fitted_tail)
    if n < 2 * head or n < 3:
        return full(i, j, n, L)
    m = floor if n < below else int(most / (1 + math.exp(-(a * n + b))))
    m = min(whole("mapping", mapping, max(m, 1)), n - 1)

    def mapped(x):
        return m * x // (n - 1)
    last = min(-(-(mapped(min(tail, n - 1)) + 1) * (n - 1) // m) - 1, n - 1)  # the last x with M(x) = M(tail)
    b1 = head - mapped(head) - 1
    b2 = n - 1 - last - mapped(n - 1 - last) - b1
    if n - last < head:  # no middle is left to compress
        return full(i, j, n, L)
    near, far = (i - head + 1).clamp(min=0), (i - (n - last) + 1).clamp(min=0)
    return [Region(i, j, near, i + 1), Region(mapped(i) + b1, mapped(j), far, near), Region(i - b2, j, 0 * i, far)]


def stair_slots(x, boundary, width):
    """Stair PE's positions: exact from boundary on, shared by groups of width tokens before it.

    boundary 9, width 2: tokens 0..11 -> slots 4 5 5 6 6 7 7 8 8 9 10 11 (arXiv 2410.15859, Eq. 3, in the floor
    form that Figure 1 shows: W(d) = d for d < N linear slots, N + floor((d - N)/width) beyond).
    """
    return torch.where(x >= boundary, x, boundary + (x - boundary).div(width, rounding_mode="floor"))


def stair_width(width, boundary, n, last, L):
    """The paper's width of 50, or the smallest that keeps all distances below L, `last` decoded tokens included."""
    slots = L - 1 - (n - 1 + last - boundary)  # what the linear part leaves over for the stairs
    return whole("width", width, max(50, math.ceil(boundary / max(slots, 1))))


def plain_then_stair(i, j, turn, slot_i, slot_j):
    """Plain RoPE for the queries before `turn`, one stair over all keys for those from it on."""
    return [Region(i, j, 0 * i, (i + 1) * (i < turn)), Region(slot_i, slot_j, 0 * i, (i + 1) * (i >= turn))]


def stair(i, j, n, L, *, linear=None, width=None):
    """Stair PE alone: one grid for all tokens, exact for the last `linear` ones of the prompt, stairs before them.

    linear: L/4 (the paper's N = 512 at L = 2048); width as in mesa; plain RoPE while n <= L. This is the separable form
    that the authors run: the grid is anchored at a boundary fixed by n, so the last query has exactly Eq. 3's distances
    while an early one has no linear zone of its own and cannot tell near neighbours apart: for study. Mesa reads the
    prompt in chunks for this very reason.
    """
    linear = scaled("linear", linear, 512, L)
    boundary = max(n, L) - linear
    width = stair_width(width, boundary, max(n, L), linear, L)
    slot_i, slot_j = stair_slots(i, boundary, width), stair_slots(j, boundary, width)
    return plain_then_stair(i, j, L if n <= L else 0, slot_i, slot_j)


def dynamic_split(n, L, first, last, reserve, margin, remainder, overlap=0):
    """Width of Mesa's middle chunks for a prompt of n tokens (arXiv 2410.15859, Algorithm 2, as in the released code).

    Full chunks of L - first - margin - overlap tokens if less than `remainder` is left over by them, else one more, all
    equal. (overlap is ours, see mesa.)
    With the constants for L = 2048 (100, 512, 50, 100, 200): n = 4096 -> 1767 (two chunks), 8192 -> 1526 (five).
    """
    most, room = max(L - first - margin - overlap, 1), max(n + reserve - last - first, 1)
    count, rest = divmod(room, most)
    chunk = most if rest < remainder else max(room // (count + 1), 1)
    while room % chunk >= max(remainder, 1):  # many chunks leave many tokens over (the released code stops there)
        chunk -= 1
    return chunk


def mesa(i, j, n, L, *, first=None, last=None, width=None, chunk=None, linear=None,
         reserve=None, margin=None, remainder=None, overlap=0):
    """Mesa-Extrapolation: chunks that see the first chunk and themselves; the last one sees all, by Stair PE.

    Middle chunks are renumbered as if each came right after the first, so no position there reaches L. The last chunk
    and all decoded tokens are on one stair, its boundary fixed by n at (start of the last chunk) - first + 1. Plain
    RoPE while n <= L, and the stair for what is then decoded beyond L (arXiv 2410.15859, Algorithm 1).
    n=12, L=6, first=2, chunk=4, width=2: chunks [0,2) [2,6) [6,10) [10,12); query 9 sees 0 1 at 5 4 and 6..9 at 3..0,
    query 11 sees 0..11 at 7 6 6 5 5 4 4 3 3 2 1 0.

    At L = 2048, and in proportion elsewhere: first 100 tokens, last about 512, and the released code's reserve 50
    (room kept for decoding), margin 100 and remainder 200. chunk: dynamic_split. width: stair_width.
    linear: how many tokens at the end of the prompt are exact; overrides the boundary.
    overlap, ours and not the paper's: middle chunks also see that many tokens before them, numbered between the first
    chunk and their own, so that what a boundary cuts in two is whole for the later chunk.
    Raises ValueError where first + overlap + chunk exceeds L.
    """
    first, last = scaled("first", first, 100, L), scaled("last", last, 512, L)
    reserve, margin = scaled("reserve", reserve, 50, L, least=0), scaled("margin", margin, 100, L, least=0)
    remainder = scaled("remainder", remainder, 200, L, least=0)
    overlap = whole("overlap", overlap, least=0)
    chunk = whole("chunk", chunk, dynamic_split(n, L, first, last, reserve, margin, remainder, overlap))
    if n > L and (first + overlap + chunk > L or overlap > chunk):
        raise ValueError(f"mesa: first {first} + overlap {overlap} + chunk {chunk} is over {L}, or overlap over chunk")
    begin = first + chunk * max(0, math.ceil((n - first - chunk) / chunk)) if n > L else L  # start of the last chunk
    boundary = max(n, L) - whole("linear", linear, first - 1 + (last if n <= L else n - begin))
    width = stair_width(width, boundary, max(n, L), last, L)
    slot_i, slot_j = stair_slots(i, boundary, width), stair_slots(j, boundary, width)
    if n <= L:
        return plain_then_stair(i, j, L, slot_i, slot_j)

    def local(x):  # position of a token right after the first chunk and, from the second chunk on, the overlap
        return torch.where(x < first + chunk, x, first + overlap + (x - first) % chunk)
    own = torch.where(i < first, 0, i - (i - first) % chunk)  # where the chunk of i starts
    local_i, local_j, middle = local(i), local(j), (i >= first) & (i < begin)
    before = torch.where(middle & (own > first), own - overlap, own)
    return [Region(local_i, local_j, own, torch.where(i < begin, i + 1, own)),
            Region(local_i, first + overlap + (j - first) % chunk - chunk, before, own),
            Region(local_i, local_j, 0 * i, first * middle),
            Region(slot_i, slot_j, 0 * i, (i + 1) * (i >= begin))]


# ---------------------------------------------------------------------------------------------------------------------
# frequencies: (D, base, n, L, *, parameters) -> inv_freq (D/2,) float64 in radians per token, or None; and mscale.
# The names of the parameters are those of rope_scaling in a Hugging Face config.json.

def rope(D, base, n, L):
    """RoPE: pair p = 0..D/2-1 turns by base^(-2p/D) radians per token (RoFormer, arXiv 2104.09864, section 3.2.2)."""
    return base ** (-torch.arange(0, D, 2, dtype=torch.float64) / D), 1.0


def nope(D, base, n, L):
    """No position encoding at all: only the causal mask orders tokens (arXiv 2305.19466). Needs a model trained so."""
    return None, 1.0


def alibi(D, base, n, L):
    """ALiBi: no rotation, slope * distance off the logits (arXiv 2108.12409). Needs a model trained so."""
    return None, 1.0


def pi(D, base, n, L, *, factor=None):
    """Position Interpolation: frequencies divided by factor, so factor * L tokens fit in L (arXiv 2306.15595, Eq. 4).

    factor: fixed for a tuned model, also for short inputs; by default the power of two that the prompt needs.
    """
    return rope(D, base, n, L)[0] / rung(factor, n, L), 1.0


def ntk(D, base, n, L, *, factor=None):
    """NTK-aware scaling: base * factor^(D/(D-2)); the first pair keeps its speed, the last is divided by factor.

    (bloc97, 2023; arXiv 2309.00071, section 3.1.) factor as for pi.
    """
    return rope(D, slowed(base, rung(factor, n, L), D), n, L)


def dynamic_ntk(D, base, n, L, *, factor=1.0, original_max_position_embeddings=None):
    """Dynamic NTK: NTK-aware scaling by factor*n/L - (factor - 1) for the prompt length n at hand; plain RoPE up to L.

    (emozilla, 2023; arXiv 2309.00071, section 3.3.) n is fixed at prefill: a cache of rotated keys would mix bases.
    """
    L = whole("original_max_position_embeddings", original_max_position_embeddings, L)
    stretch = max(1.0, positive("factor", factor) * n / L - (factor - 1))
    return rope(D, slowed(base, stretch, D), n, L)


def slowed(base, factor, D):
    """The base with which the slowest channel pair turns `factor` times slower and the first as before."""
    if D < 4:
        raise ValueError(f"NTK scaling needs a head width D of at least 4, not {D}")
    return base * factor ** (D / (D - 2))


def ntk_mixed(D, base, n, L, *, factor=None, b=0.75):
    """NTK mixed radix: pair p slowed by exp(a (p+1)^b), a = ln(factor)/(D/2)^b: the last by factor (Su, kexue.fm 9706).

    factor as for pi (the released patch has 12), b 0.75.
    """
    p, factor = torch.arange(1, D // 2 + 1, dtype=torch.float64), rung(factor, n, L)
    return rope(D, base, n, L)[0] * torch.exp(-math.log(factor) * (p / (D // 2)) ** positive("b", b)), 1.0


def yarn(D, base, n, L, *, factor=None, beta_fast=32, beta_slow=1, attention_factor=None, mscale=None,
         mscale_all_dim=None, truncate=True, original_max_position_embeddings=None):
    """YaRN: pairs with over beta_fast turns in L keep their speed, those under beta_slow are divided by factor.

    Between them a ramp, linear in the pair's index as in all published checkpoints (the paper's is linear in the number
    of turns); logits times (0.1 ln factor + 1)^2 (arXiv 2309.00071, Definitions 2 and 3). factor as for pi.
    """
    L = whole("original_max_position_embeddings", original_max_position_embeddings, L)
    factor = rung(factor, n, L)

    def pair(turns):  # the (fractional) channel pair that turns this often in L tokens
        return D * math.log(L / (turns * 2 * math.pi)) / (2 * math.log(base))
    low, high = pair(positive("beta_fast", beta_fast)), pair(positive("beta_slow", beta_slow))
    low, high = (max(math.floor(low), 0), min(math.ceil(high), D - 1)) if truncate else (max(low, 0), min(high, D - 1))
    ramp = ((torch.arange(D // 2, dtype=torch.float64) - low) / (high - low or 0.001)).clamp(0, 1)
    plain = rope(D, base, n, L)[0]

    def sharpen(weight):
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0
    if attention_factor is None:
        attention_factor = sharpen(mscale) / sharpen(mscale_all_dim) if mscale and mscale_all_dim else sharpen(1.0)
    return plain * (1 - ramp) + plain / factor * ramp, positive("attention_factor", attention_factor)


def dynamic_yarn(D, base, n, L, *, beta_fast=32, beta_slow=1):
    """Dynamic YaRN: YaRN by the factor n/L of the prompt, plain RoPE up to L (arXiv 2309.00071, section 3.3)."""
    return yarn(D, base, n, L, factor=max(1.0, n / L), beta_fast=beta_fast, beta_slow=beta_slow)


def longrope(D, base, n, L, *, short_factor=None, long_factor=None, factor=None, attention_factor=None,
             original_max_position_embeddings=None):
    """LongRoPE: every pair divided by a factor of its own, found by search and kept in config.json (arXiv 2402.13753).

    short_factor while n <= L, long_factor beyond; logits times 1 + ln(factor)/ln(L), as in Phi-3.
    Raises ValueError where the factors, D/2 numbers each, are missing.
    """
    L = whole("original_max_position_embeddings", original_max_position_embeddings, L)
    factors = long_factor if n > L else short_factor
    if not isinstance(factors, list) or len(factors) != D // 2:
        raise ValueError(f"longrope needs short_factor and long_factor, {D // 2} numbers each, from config.json")
    factors = [positive("a factor of longrope", x) for x in factors]
    usual = math.sqrt(1 + math.log(factor) / math.log(L)) if factor and factor > 1 else 1.0
    mscale = positive("attention_factor", attention_factor, usual)
    return rope(D, base, n, L)[0] / torch.tensor(factors, dtype=torch.float64), mscale


def llama3(D, base, n, L, *, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
           original_max_position_embeddings=None):
    """Llama 3.1: wavelengths above L/low_freq_factor are multiplied by factor, those below L/high_freq_factor kept.

    Between them a blend, linear in L/wavelength. (Llama 3 report, arXiv 2407.21783, and its released code.)
    """
    L = whole("original_max_position_embeddings", original_max_position_embeddings, L)
    low, high = positive("low_freq_factor", low_freq_factor), positive("high_freq_factor", high_freq_factor)
    if low >= high:
        raise ValueError(f"low_freq_factor {low} must be below high_freq_factor {high}")
    plain = rope(D, base, n, L)[0]
    keep = ((L * plain / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
    return plain * keep + plain / positive("factor", factor) * (1 - keep), 1.0


def alibi_slopes(H):
    """ALiBi's slopes (H,): 2^(-8h/H), h = 1..H, where H is a power of two; else the gaps are filled from twice as many.

    8 heads: 1/2 1/4 ... 1/256. 12 heads: those, then 2^-0.5 2^-1.5 2^-2.5 2^-3.5 (arXiv 2108.12409, section 3).
    """
    power = 2 ** int(math.log2(H))
    slopes = [2 ** (-8 * h / power) for h in range(1, power + 1)]
    return torch.tensor(slopes + [2 ** (-4 * h / power) for h in range(1, 2 * (H - power), 2)], dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------------------
# attention scale: (seen (Tq,) keys each query sees, n, L, D, *, parameters) -> (Tq,) factor on its logits

def logn(seen, n, L, D, *, power=1.0):
    """log-n scaling: max(1, ln(seen)/ln(L)), against the dilution of the softmax over many keys (Su, kexue.fm 8823).

    power, ours: that factor to a power, for prompts of hundreds of windows, where 1 is not sharp enough.
    """
    return (seen.double().log() / math.log(L)).clamp(min=1.0) ** positive("power", power)


def infoscale(seen, n, L, D, *, clamp=True, per_sequence=False):
    """InfoScale: g(seen)/g(L), g(x) = sqrt(1 - x^(-2/D)), meant to keep the softmax's entropy (arXiv 2501.08570).

    clamp: never below 1, so that nothing changes within L. per_sequence: one factor for all queries, g(n)/g(L), as in
    the released encoder; it does not clamp there.
    """
    keys = torch.full_like(seen, n) if per_sequence else seen
    ratio = ((1 - keys.double() ** (-2 / D)) / (1 - L ** (-2 / D))).sqrt()
    return ratio.clamp(min=1.0) if clamp else ratio


def constant(seen, n, L, D, *, logit_factor=1.143434):
    """One factor for all: (0.1 ln 2 + 1)^2, whose root the released LaMPE and STRING put on cos and sin."""
    return torch.full(seen.shape, positive("logit_factor", logit_factor), dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------------------
# the tables, and what makes a Plan of a row

METHODS = {  # name: (geometry, frequencies or None: the model's own, attention scale or None)
    "rope":          (full, rope, None),
    "nope":          (full, nope, None),
    "alibi":         (full, alibi, None),
    "pi":            (full, pi, None),
    "ntk":           (full, ntk, None),
    "ntk-mixed":     (full, ntk_mixed, logn),
    "dynamic-ntk":   (full, dynamic_ntk, None),
    "yarn":          (full, yarn, None),
    "dynamic-yarn":  (full, dynamic_yarn, None),
    "llama3":        (full, llama3, None),
    "longrope":      (full, longrope, None),
    "logn":          (full, None, logn),
    "infoscale":     (full, None, infoscale),
    "cosscale":      (cosscale, None, None),
    "rerope":        (rerope, None, logn),
    "leaky-rerope":  (leaky_rerope, None, logn),
    "self-extend":   (self_extend, None, None),
    "dca":           (dca, None, None),
    "string":        (string, None, None),
    "streaming-llm": (streaming_llm, None, None),
    "lm-infinite":   (lm_infinite, None, None),
    "lampe":         (lampe, None, constant),
    "stair":         (stair, None, logn),
    "mesa":          (mesa, None, logn),
}
FREQUENCIES = {name: row[1] for name, row in METHODS.items() if row[1]}
# the parameter of a function that, made larger, lets it serve a longer prompt
GROWS = {leaky_rerope: "k", self_extend: "group", stair: "width", mesa: "width", pi: "factor",
         ntk: "factor", ntk_mixed: "factor", yarn: "factor", llama3: "factor"}
SCALES = {"none": None, "logn": logn, "infoscale": infoscale, "constant": constant}


def make_plan(method, i, j, *, n, L, D, H, base=1e4, freq=None, attn_scale=None, cosine=None, **params):
    """The Plan of a method for the queries i (Tq,) and the keys j = 0..Tk-1, both int64, of a prompt of n tokens.

    L training length, D head width, H query heads, base of the rotary frequencies. freq, a name in FREQUENCIES, says
    what a method without frequencies of its own uses (default rope); attn_scale, one in SCALES, replaces its row's; any
    geometry goes with any of both. cosine: see Plan. params are the keyword parameters of the three functions.
    Raises ValueError for an unknown method or parameter, or a value or combination that makes no sense.
    """
    geometry, frequencies, scale = pick(METHODS, "method", method)
    if freq:
        asked = pick(FREQUENCIES, "frequency rule", freq)
        if frequencies not in (None, rope, asked):
            raise ValueError(f"{method} and {freq} both set the frequencies: choose one")
        frequencies = asked
    frequencies = frequencies or rope
    if positive("base", base) <= 1:
        raise ValueError(f"base must be above 1, not {base}")
    scale = pick(SCALES, "attention scale", attn_scale) if attn_scale else scale
    check_input(i, j, n=n, L=L, D=D, H=H)
    known = parameters(geometry, frequencies, scale)
    for name, value in params.items():
        if name not in known:
            raise ValueError(f"{method}: unknown parameter {name!r}; it has {', '.join(known) or 'none'}")
        if isinstance(known[name], bool) is not isinstance(value, bool) or isinstance(value, str) and name != "fit":
            raise ValueError(f"{method}: {name} cannot be {value!r}")

    def own(function):
        return {name: value for name, value in params.items() if name in parameters(function)}
    regions = [r for r in geometry(i, j, n, L, **own(geometry)) if bool((r.end > r.start).any())]
    inv_freq, mscale = frequencies(D, base, n, L, **own(frequencies))
    plan = Plan(regions, inv_freq, mscale, slopes=alibi_slopes(H) if frequencies is alibi else None)
    if cosine is not None or geometry is cosscale:
        plan.cosine = positive("cosine", cosine, 32.0)
    if scale:
        plan.q_scale = scale(seen(plan), n, L, D, **own(scale))
    return plan


def parameters(*functions):
    """The hyper-parameters of these functions and their defaults: their keyword-only arguments."""
    return {p.name: p.default for f in functions if f for p in inspect.signature(f).parameters.values()
            if p.kind is p.KEYWORD_ONLY}


def pick(table, kind, name):
    """table[name], or a ValueError that lists the names."""
    if name not in table:
        raise ValueError(f"unknown {kind} {name!r}; there are {', '.join(table)}")
    return table[name]


def check_input(i, j, **sizes):
    """ValueError unless the sizes are positive integers, L at least 2, D even, and j counts from 0."""
    for name, value in sizes.items():
        whole(name, value, least=2 if name == "L" else 1)
    if sizes["D"] % 2:
        raise ValueError(f"rotary positions need an even head width D, not {sizes['D']}")
    ordered = len(i) and int(i[0]) >= 0 and int(i[-1]) < len(j) and bool((i.diff() > 0).all())
    if not ordered or not torch.equal(j, torch.arange(len(j))):
        raise ValueError("the keys j must be 0..Tk-1, and the queries i some of them in rising order")


def whole(name, value, default=None, least=1):
    """value, or default where it is None, checked to be a whole number >= least."""
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2 ** 40:
        raise ValueError(f"{name} must be a whole number of at least {least} and below 2^40, not {value!r}")
    return value


def positive(name, value, default=None):
    """value, or default where it is None, checked to be a positive number."""
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e15:
        raise ValueError(f"{name} must be a positive number, not {value!r}")
    return value


def scaled(name, value, at_2048, L, least=1):
    """value, or the constant published for L = 2048 in proportion to L, as a whole number >= least."""
    return whole(name, value, max(round(at_2048 * L / 2048), least), least)


def rung(factor, n, L):
    """factor, or the smallest power of two with n <= factor * L: 1, 2, 4, ..., as models are tuned for."""
    return positive("factor", factor, max(1.0, 2.0 ** math.ceil(math.log2(n / L))))


# ---------------------------------------------------------------------------------------------------------------------
# looking at a plan

def seen(plan):
    """Number of keys that each query sees, (Tq,) int64. Its sum is the cost of the method in (query, key) pairs."""
    return sum((r.end - r.start).clamp(min=0) for r in plan.regions)


def distance(plan):
    """The (Tq, Tk) float64 matrix of distances, nan where a key is unseen. For tests and pictures: it is T x T.

    Raises ValueError if two regions overlap.
    """
    out = torch.full((len(plan.regions[0].q_pos), len(plan.regions[0].k_pos)), math.nan, dtype=torch.float64)
    j = torch.arange(out.shape[1])
    for r in plan.regions:
        inside = (j >= r.start[:, None]) & (j < r.end[:, None])
        if bool((inside & ~out.isnan()).any()):
            raise ValueError("two regions overlap")
        out = torch.where(inside, (r.q_pos[:, None] - r.k_pos).double(), out)
    return out


def picture(plan):
    """The distance matrix as text, a row per query, a dot for an unseen key."""
    d = distance(plan)
    cells = [["." if math.isnan(x) else f"{x:.3g}" for x in row] for row in d.tolist()]
    width = max(len(cell) for row in cells for cell in row) + 1
    causal = [row[:1 + max(j for j, cell in enumerate(row) if cell != ".")] for row in cells]
    return "\n".join("".join(cell.rjust(width) for cell in row) for row in causal)


def farthest(r):
    """The largest distance in a region: that of the first key of some query's interval."""
    live = r.end > r.start
    return float((r.q_pos[live] - r.k_pos[r.start[live]]).max())


def slowdown(plan, base=1e4):
    """By how much the slowest channel pair turns slower than plain RoPE's: 1/factor for pi, 1 where nothing turns."""
    if plan.inv_freq is None:
        return 1.0
    return float(plan.inv_freq[-1] / rope(2 * len(plan.inv_freq), base, 1, 1)[0][-1])


def longest(fits, most=2 ** 20):
    """The largest m <= most with fits(m), for a fits that holds up to some m and not beyond; 0 where it never holds."""
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    while high - low > 1 and low < most:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def within(plan, L, base):
    """Whether no distance of a plan, as its slowest channel pair turns, reaches L; always so where nothing turns."""
    return plan.inv_freq is None or slowdown(plan, base) * max(farthest(r) for r in plan.regions) < L


def reach(plan_at, L, base):
    """The longest prompt, in tokens, whose last token is within(L); at most 2^20, where the search ends.

    plan_at(n, i, j) makes the plan of a prompt of n tokens with the parameters in question. Examples: rope L,
    self-extend (L - W)G + W, leaky-rerope W + k(L - W), pi factor * L.
    """
    return longest(lambda n: within(plan_at(n, torch.tensor([n - 1]), torch.arange(n)), L, base))


def advice(method, freq, n, fits):
    """What would make a prompt of n tokens fit, "--set group=12", by trying values of the parameter GROWS names."""
    geometry, frequencies, _ = METHODS[method]
    name = GROWS.get(geometry) or GROWS.get(frequencies or FREQUENCIES.get(freq))
    value = name and 1 + longest(lambda v: not fits({name: v}), 4 * n)
    return f"--set {name}={value} would do" if value and value <= 4 * n else "choose a method that reaches further"


def describe(plan, n, L):
    """Lines that say what a plan costs and how far it looks: its regions, largest distance and attended pairs."""
    lines = []
    for number, r in enumerate(plan.regions, 1):
        pairs = int((r.end - r.start).clamp(min=0).sum())
        lines.append(f"region {number}: {int((r.end > r.start).sum())} queries, {pairs} pairs, "
                     f"largest distance {farthest(r):.6g}")
    pairs, causal = int(seen(plan).sum()), n * (n + 1) // 2
    lines.append(f"attended pairs: {pairs}, {pairs / causal:.1%} of full causal attention ({causal})")
    return lines


def parse_settings(pairs, also=()):
    """["first=16", "clamp=false"] -> {"first": 16, "clamp": False}, with dashes in names read as underscores.

    Arguments of make_plan that are no parameters of a method are refused, but for those in `also`.
    """
    out, taken = {}, {"method", "i", "j", "n", "L", "D", "H", "base", "freq", "attn_scale"} - set(also)
    for pair in pairs:
        name, equals, text = (part.strip() for part in pair.partition("="))
        if not equals:
            raise ValueError(f"a setting is name=value, not {pair!r}")
        name = name.replace("-", "_")
        if name in taken:
            raise ValueError(f"{name!r} is no parameter of a method")
        try:
            out[name] = ast.literal_eval({"true": "True", "false": "False"}.get(text.lower(), text))
        except (ValueError, SyntaxError):
            out[name] = text
    return out


def figure_class():
    """matplotlib's Figure; ValueError with one clear sentence where it is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("a picture needs matplotlib (pip install matplotlib)") from None
    return Figure


def draw(axes, plan, title, L):
    """A distance matrix on matplotlib axes: colour is distance, red from L on, white unseen; lines border regions."""
    from matplotlib import colormaps
    colours = colormaps["viridis_r"].with_extremes(over="red")
    axes.imshow((distance(plan) * slowdown(plan)).numpy(), cmap=colours, vmin=0, vmax=L - 1e-3, interpolation="nearest")
    j = torch.arange(len(plan.regions[0].k_pos))
    for r in plan.regions:
        inside = ((j >= r.start[:, None]) & (j < r.end[:, None])).float()
        axes.contour(inside.numpy(), levels=[0.5], colors="black", linewidths=0.5)
    axes.set_title(title, fontsize=9)
    axes.set_xticks([])
    axes.set_yticks([])


def plot(plans, path, note, L):
    """Draw {name: plan} for a training length L into one picture file. Needs matplotlib."""
    Figure = figure_class()
    columns = math.ceil(math.sqrt(len(plans)))
    rows = math.ceil(len(plans) / columns)
    figure = Figure(figsize=(2.4 * columns + 1.2, 2.5 * rows + 0.6), dpi=110, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (name, plan) in zip(grid, plans.items()):
        draw(axes, plan, name, L)
    for axes in grid[len(plans):]:
        axes.axis("off")
    figure.colorbar(grid[0].images[0], ax=list(grid), shrink=0.6, extend="max",
                    label="distance as the slowest channel pair turns; red: never seen in training")
    figure.suptitle(note, fontsize=9)
    try:
        figure.savefig(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"cannot write {path}: {error}") from None


def example(method, n, L, settings):
    """The plan of a small example: with narrow stairs, and factors for longrope, unless settings say otherwise."""
    narrow = {"width": max(2, math.ceil(2 * n / L))} if "width" in parameters(METHODS[method][0]) else {}
    factors = {"short_factor": [1.0] * 32, "long_factor": [n / L] * 32} if method == "longrope" else {}
    settings = {**narrow, **factors, **settings}
    i = torch.arange(whole("length", n))
    return make_plan(method, i, i, n=n, L=L, D=64, H=8, **settings)


def main():
    parser = argparse.ArgumentParser(description="Show the distance matrix of a method, and what it costs.")
    parser.add_argument("method", nargs="?", choices=[*METHODS, "all"], default="all", help="all: for --plot alone")
    parser.add_argument("--length", type=int, help="prompt length n; default: 32, or 128 for a picture file")
    parser.add_argument("--train-len", "--train_len", type=int, help="training length L; default: half of --length")
    parser.add_argument("--set", action="append", default=[], metavar="name=value", help="a parameter of the method")
    parser.add_argument("--plot", metavar="FILE", help="draw a picture; all: every method, in methods.png")
    args = parser.parse_args()
    if args.plot == "all":
        args.method, args.plot = "all", "methods.png"
    settings, n = parse_settings(args.set), (128 if args.plot else 32) if args.length is None else args.length
    L = max(n // 2, 2) if args.train_len is None else args.train_len
    names = list(METHODS) if args.method == "all" else [args.method]
    whole("train_len", L, least=2)
    plans = {name: example(name, n, L, settings) for name in names}
    note = f"prompt of {n} tokens, training length {L}, {settings or 'defaults'}"
    if args.plot:
        plot(plans, args.plot, note, L)
    elif args.method == "all":
        raise ValueError("name a method, or give --plot FILE for a picture of all")
    elif n > 4096:
        raise ValueError(f"a matrix of {n} tokens is too large to print; --length goes to 4096")
    else:
        print(f"{args.method}: {note}", picture(plans[args.method]), *describe(plans[args.method], n, L), sep="\n")


def run_command(command, name):
    """Run a command and exit with its code: for bad input with one line on stderr and code 2."""
    try:
        code = command()
        sys.stdout.flush()
        sys.exit(code)
    except BrokenPipeError:  # the reader of stdout has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError, OverflowError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    run_command(main, "positions.py")
