"""The later rows of METHODS, and how the three parts of a method combine: numbers first, a real checkpoint last.

    geometry         dca, string, streaming-llm, lm-infinite, lampe, and mesa's overlap
    frequencies      ntk-mixed, dynamic-yarn, longrope
    attention scale  infoscale, constant; and cosscale, which replaces the product

Every geometry is compared with Python arithmetic on one query i and one key j, typed from its paper, that shares no
code and no tensor with positions.py; the streaming one with a cache that rolls. Then what only shows in combination:
compositions against the float64 oracle, how far a method reaches, decoding, model configs, pictures.
"""
import functools
import json
import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracle import oracle

from attention import attend
from model import Config, KVCache, Llama, load
from positions import METHODS, advice, distance, make_plan, picture, reach, seen, slowdown, within

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ROOT / "checkpoints/tiny"
NONE = None    # in a formula: query i does not see key j
DECODED = 5    # tokens that follow the prompt in most tests


def needed(method, D, factor=4.0):
    """Parameters without which a method cannot be: longrope's factors are found by search, here they are made up."""
    if method != "longrope":
        return {}
    return {"short_factor": [1.0 + p / D for p in range(D // 2)],
            "long_factor": [1.0 + (factor - 1) * p / (D // 2 - 1) for p in range(D // 2)], "factor": factor}


def plan_of(method, n, L, i=None, T=None, D=8, H=4, **params):
    """The plan for n prompt tokens, T tokens in all (default n), all of them queries unless i says otherwise."""
    j = torch.arange(T or n)
    return make_plan(method, j if i is None else torch.as_tensor(i), j, n=n, L=L, D=D, H=H,
                     **{**needed(method, D), **params})


def last_row(method, n, L, **params):
    """Distances from the last of n tokens to all of them, as Python numbers."""
    return distance(plan_of(method, n, L, i=[n - 1], **params))[0].tolist()


# ---------------------------------------------------------------------------------------------------------------------
# one formula per geometry: (n, L, parameters) -> pair(i, j) for j <= i

def share(at_2048, L, least=1):
    """A constant published for L = 2048, in proportion to L."""
    return max(least, round(at_2048 * L / 2048))


def dca(n, L, chunk=None, top=None):
    """baselines.md section 3: i%s - j%s in a chunk, min(s + i%s, c-1) - j%s to the one before, c-1 - j%s to older."""
    s, top = chunk or share(1536, L), top or L - 1

    def pair(i, j):
        chunks_ago = min(i // s - j // s, 2)
        return (i % s, min(s + i % s, top), top)[chunks_ago] - j % s
    return pair


def string(n, L, shift=None, window=None):
    """baselines.md section 3: D below S, else D - S + W."""
    S, W = shift or L // 3, window or share(64, L)
    return lambda i, j: i - j if i - j < S else i - j - S + W


def streaming_llm(n, L, sinks=4, recent=None):
    """A rolling cache: keys stand at their slot in it, the new token right behind; evict after each token."""
    recent = recent or L - 1 - sinks
    rows, cache = [], []

    def pair(i, j):
        while len(rows) <= i:
            new = len(rows)
            rows.append({**{key: len(cache) - slot for slot, key in enumerate(cache)}, new: 0})
            cache.append(new)
            cache[:] = cache[:sinks] + cache[sinks:][-recent:]
        return rows[i].get(j, NONE)
    return pair


def lm_infinite(n, L, local=None, sinks=10, cap=None):
    """baselines.md section 3: D < L_local or j < g is seen, at min(D, cap)."""
    local, cap = local or L, cap or L - 1
    return lambda i, j: min(i - j, cap) if i - j < local or j < sinks else NONE


FITS = {  # lampe.md section 1: a, b, L, mapping below 8192 tokens, head, tail
    "llama2": (8.673006440952035e-05, -0.648012322406978, 2489.1055522414357, 1536, 512, 200),
    "llama3": (1.0493097327094324e-04, -2.466638011138158, 6204.409324666837, 1536, 512, 200),
}


def lampe_constants(n, L, fit):
    """mapping length, head and tail; without a fit llama3's in proportion to L = 8192, with 3/4 L for its maximum."""
    a, b, most, below, head, tail = FITS[fit or "llama3"]
    rule = 8192
    if fit is None:
        a, most, rule, below, head, tail = a * 8192 / L, 0.75 * L, *(x * L // 8192 for x in (8192, below, head, tail))
    return below if n < rule else int(most / (1 + math.exp(-(a * n + b)))), max(head, 1), max(tail, 1)


def lampe_joints(n, m, head, tail):
    """M, r2, b1, b2 of lampe.md section 2b."""
    def M(x):
        return m * x // (n - 1)
    r2 = max(x for x in range(n) if M(x) == M(min(tail, n - 1)))  # the end of tail's plateau
    b1 = head - M(head) - 1
    return M, r2, b1, (n - 1 - r2) - M(n - 1 - r2) - b1


def lampe(n, L, fit=None, mapping=None, head=None, tail=None):
    """lampe.md section 2b, each pair once: head below `head`, tail from n - r2 on, between them the mapped middle."""
    m, default_head, default_tail = lampe_constants(n, L, fit)
    m, head, tail = min(mapping or m, n - 1), head or default_head, tail or default_tail
    if n < 2 * head:
        return lambda i, j: i - j
    M, r2, b1, b2 = lampe_joints(n, m, head, tail)
    if n - r2 < head:  # nothing between head and tail
        return lambda i, j: i - j

    def pair(i, j):
        if i - j < head:
            return i - j
        return M(i) + b1 - M(j) if i - j < n - r2 else i - b2 - j
    return pair


def stair_slot(x, P, E):
    """mesa.md section 3: x from P on, P - ceil((P - x)/E) before."""
    return x if x >= P else P + (x - P) // E


def split(n, L, F, last, overlap):
    """DynamicSplit, mesa.md section 2, its divisor less the overlap; narrowed until less than `remainder` is left."""
    reserve, margin, remainder = share(50, L, 0), share(100, L, 0), share(200, L, 0)
    D, rest = L - F - margin - overlap, n + reserve - last - F
    C = D if rest % D < remainder else rest // (rest // D + 1)
    return next(c for c in range(C, 0, -1) if rest % c < remainder)


def mesa(n, L, first=None, last=None, width=None, chunk=None, overlap=0):
    """mesa.md sections 2 and 3, and our overlap: `overlap` tokens more, numbered between first chunk and own one."""
    if n <= L:
        return lambda i, j: i - j
    F, last = first or share(100, L), last or share(512, L)
    C = chunk or split(n, L, F, last, overlap)
    starts = [0, F]
    while starts[-1] + C < n:
        starts.append(starts[-1] + C)
    P = starts[-1] - F + 1
    E = width or next(E for E in range(50, 50 + n) if n + last - 1 - stair_slot(0, P, E) < L)

    def pair(i, j):
        if i >= starts[-1]:
            return stair_slot(i, P, E) - stair_slot(j, P, E)
        home = max(s for s in starts if s <= i)
        before = overlap if home > F else 0  # the second chunk already follows the first one
        if j >= home - before:
            return i - j
        return F + before + (i - home) - j if j < F else NONE
    return pair


GEOMETRIES = [  # method, formula, parameters
    ("dca", dca, {}), ("dca", dca, {"chunk": 11, "top": 17}), ("dca", dca, {"chunk": 7, "top": 6}),
    ("string", string, {}), ("string", string, {"shift": 9, "window": 4}),
    ("string", string, {"shift": 1, "window": 1}),
    ("streaming-llm", streaming_llm, {}), ("streaming-llm", streaming_llm, {"sinks": 2, "recent": 9}),
    ("streaming-llm", streaming_llm, {"sinks": 1, "recent": 1}),
    ("lm-infinite", lm_infinite, {}), ("lm-infinite", lm_infinite, {"local": 9, "sinks": 3, "cap": 9}),
    ("lm-infinite", lm_infinite, {"local": 9, "sinks": 1, "cap": 8}),
    ("lampe", lampe, {}), ("lampe", lampe, {"mapping": 20, "head": 5, "tail": 3}),
    ("lampe", lampe, {"mapping": 600, "head": 17, "tail": 11}), ("lampe", lampe, {"fit": "llama2", "head": 6}),
    ("mesa", mesa, {"overlap": 4}), ("mesa", mesa, {"overlap": 3, "first": 3, "chunk": 9, "width": 3, "last": 5}),
    ("mesa", mesa, {"overlap": 9, "first": 2, "chunk": 9}), ("mesa", mesa, {"overlap": 1, "width": 60}),
]


def expected(pair, i, j):
    """(Tq, Tk) float64 matrix of a formula, nan where nothing is seen."""
    def cell(a, b):
        d = pair(a, b) if b <= a else NONE
        return math.nan if d is NONE else float(d)
    return torch.tensor([[cell(a, b) for b in j] for a in i], dtype=torch.float64)


def same(got, want):
    return torch.allclose(got, want.to(got.dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("L", [32, 97])
@pytest.mark.parametrize("n", [1, 2, 37, 130, 1000])
@pytest.mark.parametrize("method, formula, params", GEOMETRIES, ids=lambda x: "" if callable(x) else str(x))
def test_distances_are_the_formula(method, formula, params, n, L):
    """The prompt and the tokens decoded after it, as integers; of 1000 tokens every 29th query and the last ones."""
    total = n + DECODED
    i = range(total) if n < 200 else sorted({*range(0, total, 29), *range(n - 3, total)})
    plan = plan_of(method, n, L, i=list(i), T=total, **params)
    assert not any(x.is_floating_point() for r in plan.regions for x in (r.q_pos, r.k_pos, r.start, r.end))
    assert same(distance(plan), expected(formula(n, L, **params), i, range(total)))


@pytest.mark.parametrize("n", [4, 32, 33, 61, 250])
@pytest.mark.parametrize("method", METHODS)
def test_invariants(method, n):
    """Disjoint (distance() raises otherwise), causal, self at 0, none below 0, bounds that never decrease."""
    T = n + 20
    plan = plan_of(method, n, 32, T=T)
    d = distance(plan)
    assert torch.equal(d.isnan() | torch.ones(T, T).tril().bool(), torch.ones(T, T).bool())
    assert not d.diagonal().any() and d.nan_to_num().min() == 0
    for r in plan.regions:
        live = r.end > r.start
        assert (r.start[live] >= 0).all() and (r.end[live] <= T).all()
        assert (r.start[live].diff() >= 0).all() and (r.end[live].diff() >= 0).all()
    assert torch.equal(seen(plan), (~d.isnan()).sum(1))


# ---------------------------------------------------------------------------------------------------------------------
# the matrices of the specs, literally

def matrix(text):
    """Rows of numbers, "." for a key that is not seen; rows may stop early."""
    rows = [[math.nan if x == "." else float(x) for x in line.split()] for line in text.splitlines() if line.strip()]
    width = max(len(row) for row in rows)
    return torch.tensor([row + [math.nan] * (width - len(row)) for row in rows], dtype=torch.float64)


PLAIN_6 = "0\n1 0\n2 1 0\n3 2 1 0\n4 3 2 1 0\n5 4 3 2 1 0\n"
PLAIN_10 = PLAIN_6 + "6 5 4 3 2 1 0\n7 6 5 4 3 2 1 0\n8 7 6 5 4 3 2 1 0\n9 8 7 6 5 4 3 2 1 0\n"

DCA_PAPER = PLAIN_10 + """
9   8   7   6   5   4   4   3   2   1   0
9   8   7   6   5   4   5   4   3   2   1   0
"""

DCA_RELEASED = PLAIN_10 + """
10   9   8   7   6   5   4   3   2   1   0
10   9   8   7   6   5   5   4   3   2   1   0
"""

DCA_THREE_CHUNKS = PLAIN_6 + """
5   4   3   2   2   1   0
5   4   3   2   3   2   1   0
5   4   3   2   4   3   2   1   0
5   4   3   2   5   4   3   2   1   0
5   4   3   2   5   4   3   2   2   1   0
5   4   3   2   5   4   3   2   3   2   1   0
"""

STRING = """
0
1   0
2   1   0
3   2   1   0
2   3   2   1   0
3   2   3   2   1   0
4   3   2   3   2   1   0
5   4   3   2   3   2   1   0
6   5   4   3   2   3   2   1   0
7   6   5   4   3   2   3   2   1   0
8   7   6   5   4   3   2   3   2   1   0
9   8   7   6   5   4   3   2   3   2   1   0
"""

STREAMING = PLAIN_6 + """
6   5   4   3   2   1   0
6   5   .   4   3   2   1   0
6   5   .   .   4   3   2   1   0
6   5   .   .   .   4   3   2   1   0
6   5   .   .   .   .   4   3   2   1   0
6   5   .   .   .   .   .   4   3   2   1   0
"""

LM_INFINITE = """
0
1   0
2   1   0
3   2   1   0
4   3   2   1   0
4   4   3   2   1   0
4   4   .   3   2   1   0
4   4   .   .   3   2   1   0
4   4   .   .   .   3   2   1   0
4   4   .   .   .   .   3   2   1   0
4   4   .   .   .   .   .   3   2   1   0
4   4   .   .   .   .   .   .   3   2   1   0
"""

LAMPE_6 = """
0
1   0
2   1   0
2   2   1   0
3   3   2   1   0
3   3   2   2   1   0
4   4   3   3   2   1   0
4   4   3   3   2   2   1   0
5   5   4   4   3   3   2   1   0
6   5   4   4   3   3   2   2   1   0
7   6   5   5   4   4   3   3   2   1   0
8   7   6   6   5   5   4   4   3   2   1   0
"""


TWELVE = {  # name: (method, L, parameters, matrix)
    "dca": ("dca", 10, {"chunk": 6, "top": 9}, DCA_PAPER),
    "dca, top L - 1": ("dca", 10, {"chunk": 6}, DCA_PAPER),
    "dca, released": ("dca", 10, {"chunk": 6, "top": 10}, DCA_RELEASED),
    "dca, three chunks": ("dca", 6, {"chunk": 4, "top": 5}, DCA_THREE_CHUNKS),
    "string, shift L/3": ("string", 12, {"window": 2}, STRING),
    "streaming-llm": ("streaming-llm", 12, {"sinks": 2, "recent": 4}, STREAMING),
    "lm-infinite, local L": ("lm-infinite", 4, {"sinks": 2, "cap": 4}, LM_INFINITE),
    "lampe": ("lampe", 16, {"mapping": 6, "head": 3, "tail": 2}, LAMPE_6),
}


@pytest.mark.parametrize("method, L, params, text", TWELVE.values(), ids=TWELVE)
def test_twelve_tokens(method, L, params, text):
    assert same(distance(plan_of(method, 12, L, **params)), matrix(text))


def test_mesa_overlap_of_twelve_tokens():
    """mesa.md section 6 with an overlap of 1: queries 6..9 also see key 5, and see 0 and 1 one further away.

    first 2, chunk 4: chunks [0,2) [2,6) [6,10) [10,12). Query 8 is at 2 + 1 + (8 - 6) = 5. The last chunk is as ever.
    """
    d = distance(plan_of("mesa", 12, 7, first=2, chunk=4, width=2, last=2, overlap=1))
    assert same(d[5:11, :11], matrix("""
        5   4   3   2   1   0
        3   2   .   .   .   1   0
        4   3   .   .   .   2   1   0
        5   4   .   .   .   3   2   1   0
        6   5   .   .   .   4   3   2   1   0
        6   5   5   4   4   3   3   2   2   1   0"""))


def test_longest_distances_of_baselines():
    """baselines.md section 3: DCA c-1, STRING n-1-S+W, StreamingLLM sinks + R, LM-Infinite cap; n = 1000, L = 64."""
    far = {m: max(last_row(m, 1000, 64), key=lambda x: -1 if math.isnan(x) else x)
           for m in ("dca", "string", "streaming-llm", "lm-infinite")}
    assert far == {"dca": 63, "string": 999 - 21 + 2, "streaming-llm": 63, "lm-infinite": 63}


# ---------------------------------------------------------------------------------------------------------------------
# formulas that are no difference of two positions

def strict_stair(d, linear, width):
    """Eq. 3 of arXiv 2410.15859 in the floor form of its Figure 1, for every query alike."""
    return d if d < linear else linear + (d - linear) // width


@pytest.mark.parametrize("n, L, linear, width", [(12, 6, 3, 2), (40, 16, 4, 5), (100, 16, 16, 3)])
def test_stair_is_strict_for_the_last_query_only(n, L, linear, width):
    """Row by row Eq. 3 does not factor: two queries' distances to a key do not differ by the same for every key."""
    got = distance(plan_of("stair", n, L, linear=linear, width=width))
    strict = expected(lambda i, j: strict_stair(i - j, linear, width), range(n), range(n))
    assert same(got[-1], strict[-1]) and not same(got[-2], strict[-2])
    assert set((got[-1] - got[-2])[:-1].tolist()) == {1.0}
    assert set((strict[-1] - strict[-2])[:-1].tolist()) == {0.0, 1.0}


def test_stair_of_twelve_tokens():
    """mesa.md section 6: N = 3, E = 2; strict Stair PE has 6 6 5 5 4 4 3 3 2 1 0 for query 10."""
    d = distance(plan_of("stair", 12, 6, linear=3, width=2))
    assert same(d[10:], matrix("6 5 5 4 4 3 3 2 2 1 0\n7 6 6 5 5 4 4 3 3 2 1 0"))
    assert [strict_stair(10 - j, 3, 2) for j in range(11)] == [6, 6, 5, 5, 4, 4, 3, 3, 2, 1, 0]


def lampe_paper(n, m, head, tail):
    """lampe.md section 2a: the floor is on the distance."""
    def pair(i, j):
        d = i - j
        if d <= head:
            return d
        return (m - head - tail) * (d - head) // (n - head - tail) + head if d < n - tail else m - n + d
    return pair


def test_lampe_of_the_paper():
    """lampe.md section 3, last rows, n = 12, head = 3, tail = 2: the paper's form, and ours with m = 8."""
    assert [lampe_paper(12, 6, 3, 2)(11, j) for j in range(12)] == [5, 4, 3, 3, 3, 3, 3, 3, 3, 2, 1, 0]
    assert [lampe_paper(12, 8, 3, 2)(11, j) for j in range(12)] == [7, 6, 5, 5, 4, 4, 3, 3, 3, 2, 1, 0]
    assert last_row("lampe", 12, 16, mapping=8, head=3, tail=2) == [8, 7, 7, 6, 6, 5, 4, 3, 3, 2, 1, 0]


@pytest.mark.parametrize("n, m, head, tail", [(12, 6, 3, 2), (12, 8, 3, 2), (130, 40, 9, 4), (300, 100, 20, 30)])
def test_lampe_mapping_is_the_papers_maximum_and_the_codes_slope(n, m, head, tail):
    """The paper's largest distance is m - 1; the code's is r2 + M(n-1-r2) + head - M(head) - 1, which is more."""
    paper = expected(lampe_paper(n, m, head, tail), range(n), range(n))
    code = distance(plan_of("lampe", n, 16, mapping=m, head=head, tail=tail))
    M, r2, _, _ = lampe_joints(n, m, head, tail)
    assert paper.nan_to_num().max() == m - 1
    assert code.nan_to_num().max() == code[-1, 0] == r2 + M(n - 1 - r2) + head - M(head) - 1 > m - 1
    assert not same(code, paper)


# ---------------------------------------------------------------------------------------------------------------------
# LaMPE's arithmetic

LENGTHS = [1024, 4096, 8191, 8192, 12288, 16384, 25600, 32768, 49152, 65536, 98304, 131072]
MAPPING = {  # lampe.md section 1: the mapping length of each fit at these prompt lengths
    "llama2": [1536, 1536, 1536, 1283, 1500, 1702, 2061, 2239, 2423, 2473, 2488, 2489],
    "llama3": [1536, 1536, 1536, 1036, 1461, 1993, 3441, 4501, 5810, 6129, 6201, 6204],
    "mistral": [1536, 1536, 1536, 4104, 5788, 7898, 13631, 17829, 23015, 24280, 24566, 24575],
    "llama3.1": [4983, 5672, 6728, 6728, 7960, 9389, 13433, 17468, 29672, 44548, 68981, 78864],
}
WINDOWS = {"llama2": 4096, "llama3": 8192, "mistral": 32768, "llama3.1": 131072}
HEADS = {"llama2": (512, 200), "llama3": (512, 200), "mistral": (2048, 200), "llama3.1": (8192, 1024)}


def middle_positions(n, L, **params):
    """M(0), M(1), ..., M(n-1) as the keys of the middle region have them; M(n-1) = m."""
    head, middle, *tail = plan_of("lampe", n, L, i=[n - 1], **params).regions
    return middle.k_pos


@pytest.mark.parametrize("fit", MAPPING)
def test_lampe_mapping_lengths(fit):
    """All of the table, never above n - 1; by the fit's name, and by the window that the fit was made for."""
    got = [int(middle_positions(n, 100, fit=fit, head=16, tail=2)[-1]) for n in LENGTHS]
    assert got == [min(m, n - 1) for m, n in zip(MAPPING[fit], LENGTHS)]
    by_window = [int(middle_positions(n, WINDOWS[fit], head=16, tail=2)[-1]) for n in LENGTHS[3:7]]
    assert by_window == [min(m, n - 1) for m, n in zip(MAPPING[fit][3:7], LENGTHS[3:7])]


@pytest.mark.parametrize("L, n, farthest", [(8192, 32768, 5117), (8192, 131072, 6892), (4096, 32768, 2906),
                                            (4096, 131072, 3197)])
def test_lampe_largest_distances(L, n, farthest):
    """lampe.md section 2b, llama3 and llama2 with the head and tail of the release: far below L."""
    row = last_row("lampe", n, L)
    assert max(row) == row[0] == farthest < L


@pytest.mark.parametrize("fit", HEADS)
def test_lampe_is_plain_below_two_heads(fit):
    """n < 2 head: plain RoPE, for the decoded tokens too; at 2 head the head keeps `head` true distances."""
    head, tail = HEADS[fit]
    n = 2 * head
    plain = plan_of("lampe", n - 1, 64, i=[n - 2, n + 700], T=n + 701, fit=fit)
    assert len(plain.regions) == 1 and plain.regions[0].q_pos.tolist() == [n - 2, n + 700]
    d = torch.tensor(last_row("lampe", n, 64, fit=fit, mapping=head)).flip(0)
    assert d[:head].tolist() == list(range(head)) and head - 1 <= d[head] <= head and d[-1] < n - 1


@pytest.mark.parametrize("n, head, tail", [(12, 3, 2), (100, 7, 9), (131, 40, 30)])
def test_lampe_never_stretches(n, head, tail):
    """A mapping length above n - 1 is n - 1, where M(x) = x and all from head on are one nearer: lampe.md section 3."""
    d = distance(plan_of("lampe", n, 16, mapping=10 ** 6, head=head, tail=tail))
    assert same(d, expected(lambda i, j: i - j - (i - j >= head), range(n), range(n)))


DECODE_6 = """
9   8   7   6   5   5   4   4   3   3   2   1   0
10  9   8   7   6   6   5   5   4   4   3   2   1   0
11  10  9   8   7   6   5   5   4   4   3   2   2   1   0
"""

DECODE_8 = """
9   8   7   6   6   5   4   3   3   2   2   1   0
10  9   8   7   7   6   5   4   4   3   2   2   1   0
"""


@pytest.mark.parametrize("m, text", [(6, DECODE_6), (8, DECODE_8)])
def test_lampe_decodes_along_the_same_slope(m, text):
    """n = 12: M goes on, M(12) M(13) M(14) = 6 7 7 with m = 6. Frozen at 6, as released, row 14 ends in 3 1 2 1 0."""
    want = matrix(text)
    T = want.shape[1]
    plan = plan_of("lampe", 12, 16, i=list(range(12, T)), T=T, mapping=m, head=3, tail=2)
    assert same(distance(plan), want)


@pytest.mark.parametrize("n, L, params", [
    (64, 32, {}), (700, 256, {}), (200, 64, {"head": 9, "tail": 5, "mapping": 77}),
    (333, 64, {"head": 40, "tail": 100, "mapping": 332})])
def test_lampe_decodes_beyond_its_head(n, L, params):
    """3 head tokens and more: causal, distances grow by 0 or 1 with every key further away, and n stays the prompt's.

    (The released code fails after `head` tokens: its table of mapped positions ends there.)
    """
    T = n + max(3 * params.get("head", 0), 60)
    d = distance(plan_of("lampe", n, L, T=T, **params))
    steps = (d[:, :-1] - d[:, 1:])[torch.ones(T, T - 1).tril(-1).bool()]
    assert set(steps.tolist()) == {0.0, 1.0}
    assert same(d[:n, :n], distance(plan_of("lampe", n, L, **params)))


@pytest.mark.parametrize("n, m, head, tail", [(12, 1, 3, 2), (29, 24, 10, 28)])
def test_lampe_without_a_middle_is_continuous_or_says_why(n, m, head, tail):
    """lampe.md section 3, property 1: steps of 0 or 1. Here the tail begins inside the head, n - r2 < head."""
    try:
        row = last_row("lampe", n, 16, mapping=m, head=head, tail=tail)
    except ValueError:
        return
    assert {a - b for a, b in zip(row, row[1:])} <= {0.0, 1.0}


# ---------------------------------------------------------------------------------------------------------------------
# frequencies

def rotation(method, n=100, L=2048, D=128, base=1e4, **params):
    """inv_freq as Python floats, and the plan, of a method for a prompt of n tokens."""
    plan = plan_of(method, n, L, i=[n - 1], D=D, base=base, **params)
    return plan.inv_freq.tolist(), plan


@pytest.mark.parametrize("D, factor, b", [(128, 12.0, 0.75), (128, 4.0, 0.75), (16, 8.0, 0.5), (8, 2.0, 1.0)])
def test_ntk_mixed(D, factor, b):
    """theta_p exp(-a (p+1)^b) with a = ln k/(D/2)^b: pair 0 slows down a little, the last one by the whole factor."""
    got, plan = rotation("ntk-mixed", n=8192, D=D, factor=factor, **({} if b == 0.75 else {"b": b}))
    a = math.log(factor) / (D / 2) ** b
    want = [1e4 ** (-2 * p / D) * math.exp(-a * (p + 1) ** b) for p in range(D // 2)]
    assert got == pytest.approx(want, rel=1e-12) and plan.mscale == 1
    assert got[0] == pytest.approx(math.exp(-a)) and got[-1] == pytest.approx(1e4 ** (2 / D - 1) / factor, rel=1e-12)
    assert plan.q_scale.tolist() == pytest.approx([math.log(8192) / math.log(2048)])  # the patch has log-n with it


@pytest.mark.parametrize("L, base", [(2048, 1e4), (4096, 5e5)])
@pytest.mark.parametrize("n", [3000, 12288, 40001])
def test_dynamic_yarn_is_yarn_by_the_prompts_length(n, L, base):
    for params in ({}, {"beta_fast": 16.0, "beta_slow": 2.0}):
        got, plan = rotation("dynamic-yarn", n=n, L=L, base=base, **params)
        want, fixed = rotation("yarn", n=n, L=L, base=base, factor=max(1.0, n / L), **params)
        assert got == want and plan.mscale == fixed.mscale
    assert plan.mscale == pytest.approx(0.1 * math.log(max(1, n / L)) + 1)


@pytest.mark.parametrize("n", [1, 2048])
def test_dynamic_yarn_is_plain_inside_the_training_length(n):
    got, plan = rotation("dynamic-yarn", n=n)
    assert got == pytest.approx(rotation("rope")[0], rel=1e-14) and plan.mscale == 1


def test_longrope_divides_every_pair_by_its_own_factor():
    """Up to L the short factors, beyond it the long ones; logits times 1 + ln(factor)/ln(L)."""
    factors = {"short_factor": [1.0, 2.0, 3.0, 4.0], "long_factor": [1.0, 4.0, 16.0, 64.0], "factor": 32.0}
    for n, name in ((4096, "short_factor"), (4097, "long_factor")):
        got, plan = rotation("longrope", n=n, L=4096, D=8, **factors)
        assert got == pytest.approx([x / f for x, f in zip([1, .1, .01, .001], factors[name])], rel=1e-12)
        assert plan.mscale ** 2 == pytest.approx(1 + math.log(32) / math.log(4096))
    assert rotation("longrope", L=4096, D=8, **{**factors, "attention_factor": 1.25})[1].mscale == 1.25


PHI = {"short_factor": [1 + 0.01 * p for p in range(32)], "long_factor": [1.1 ** p for p in range(32)]}


@pytest.mark.parametrize("extra", [{}, {"factor": 8.0}, {"attention_factor": 1.5}, {"factor": 1.0}], ids=str)
@pytest.mark.parametrize("L, base, window", [(4096, 1e4, 131072), (2048, 5e5, 16384)])
@pytest.mark.parametrize("times", [0.5, 1, 5])
def test_longrope_equals_transformers(L, base, window, extra, times, tmp_path):
    """A Phi-3 style config.json, short and long prompt: frequencies to 1e-6, the factor on cos and sin exactly."""
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    rope = {"rope_type": "longrope", "rope_theta": base, "original_max_position_embeddings": L, **PHI, **extra}
    theirs = transformers.LlamaConfig(hidden_size=256, num_attention_heads=4, head_dim=64,
                                      max_position_embeddings=window, rope_parameters=dict(rope))
    n = int(times * L)
    theta, mscale = ROPE_INIT_FUNCTIONS["longrope"](theirs, "cpu", seq_len=n)
    config = write_config(tmp_path, hidden_size=256, head_dim=64, max_position_embeddings=window, rope_parameters=rope)
    plan = config.plan(n=n, i=torch.tensor([n - 1]))
    assert config.train_len == L and config.freq == "longrope"
    assert torch.allclose(plan.inv_freq, theta.double(), rtol=1e-6, atol=0)
    assert plan.mscale == pytest.approx(mscale, rel=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# attention scale

@pytest.mark.parametrize("L, n, factor", [
    (64, 128, 1.0772), (64, 256, 1.1485), (64, 512, 1.2150), (64, 1024, 1.2773), (64, 2048, 1.3361), (64, 4096, 1.3918),
    (2048, 8192, 1.0814), (2048, 16384, 1.1192), (4096, 8192, 1.0381), (4096, 16384, 1.0744), (4096, 32768, 1.1092)])
def test_infoscale_table(L, n, factor):
    """infoscale.md section 1, D = 128; of the last query, which sees n keys, and of a whole sequence."""
    plan = plan_of("infoscale", n, L, i=[L - 1, n - 1], D=128)
    assert [round(x, 4) for x in plan.q_scale.tolist()] == [1, factor]
    sequence = plan_of("infoscale", n, L, i=[0, n - 1], D=128, per_sequence=True)
    assert [round(x, 4) for x in sequence.q_scale.tolist()] == [factor, factor]


def g(x, D):
    return math.sqrt(1 - x ** (-2 / D))


def test_infoscale_options():
    """clamp keeps all within L at 1; without it the first query, alone with itself, has g(1) = 0. Bound 1/g(L)."""
    clamped, free = (plan_of("infoscale", 130, 64, D=128, clamp=clamp).q_scale.tolist() for clamp in (True, False))
    want = [g(x, 128) / g(64, 128) for x in range(1, 131)]
    assert free == pytest.approx(want, rel=1e-12, abs=0) and free[0] == 0 and free[63] == 1
    assert clamped == pytest.approx([max(1, x) for x in want], rel=1e-12)
    assert free == sorted(free) and round(1 / g(64, 128), 2) == 3.99 > free[-1]
    short = plan_of("infoscale", 20, 64, D=128, per_sequence=True, clamp=False).q_scale
    assert short.tolist() == pytest.approx([g(20, 128) / g(64, 128)] * 20)


def test_infoscale_per_sequence_keeps_the_prompts_length_while_decoding():
    plan = plan_of("infoscale", 130, 64, i=[130, 149], T=150, D=128, per_sequence=True)
    assert plan.q_scale.tolist() == pytest.approx([g(130, 128) / g(64, 128)] * 2)


@pytest.mark.parametrize("method", ["streaming-llm", "lm-infinite", "mesa"])
def test_infoscale_counts_the_keys_that_a_query_sees(method):
    """A window is not sharpened for what it does not see."""
    plan = plan_of(method, 300, 32, attn_scale="infoscale", clamp=False)
    assert plan.q_scale.tolist() == pytest.approx([g(x, 8) / g(32, 8) for x in seen(plan).tolist()], rel=1e-12)


def test_constant_is_what_the_releases_put_on_cos_and_sin():
    """(0.1 ln 2 + 1)^2 = 1.143434 on all logits, for LaMPE always, for STRING when asked."""
    want = [(0.1 * math.log(2) + 1) ** 2] * 20
    for plan in (plan_of("lampe", 20, 8), plan_of("lampe", 20, 64), plan_of("string", 20, 64, attn_scale="constant")):
        assert plan.q_scale.tolist() == pytest.approx(want, rel=1e-6) and plan.mscale == 1
    assert plan_of("string", 20, 64).q_scale is None and plan_of("lampe", 20, 64, attn_scale="none").q_scale is None
    assert plan_of("rope", 3, 64, attn_scale="constant", logit_factor=1.5).q_scale.tolist() == [1.5] * 3


@pytest.mark.parametrize("impl", ["dense", "tiled", "auto"])
def test_cosscale_is_blind_to_the_lengths_of_q_and_k(impl):
    """Logits are s cos(q, k), within s of 0: with s tiny all keys weigh the same, with s large the likest one wins."""
    q, k, v = inputs(1, 4, 2, 8, 30)
    plan = plan_of("cosscale", 30, 64, cosine=16.0)
    longer = attend(q * torch.linspace(0.1, 9, 30)[:, None], k * torch.linspace(7, 0.2, 30)[:, None], v, plan, impl)
    assert torch.allclose(longer, attend(q, k, v, plan, impl), atol=1e-5)
    mean = v.cumsum(2) / torch.arange(1, 31)[:, None]
    flat = attend(q, k, v, plan_of("cosscale", 30, 64, cosine=1e-6), impl)
    assert torch.allclose(flat, mean[:, [0, 0, 1, 1]], atol=1e-5)
    own = attend(k[:, [0, 0, 1, 1]], k, v, plan_of("cosscale", 30, 64, freq="nope", cosine=1000.0), impl)
    assert torch.allclose(own, v[:, [0, 0, 1, 1]], atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# composition

def inputs(B, H, Hkv, D, T, seed=0):
    """Random q (B, H, T, D), k and v (B, Hkv, T, D)."""
    noise = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(B, heads, T, D, generator=noise) for heads in (H, Hkv, Hkv))


COMPOSITIONS = [  # any geometry, any frequencies, any attention scale, any product
    ("dca", {"freq": "yarn", "factor": 4.0, "attn_scale": "logn"}),
    ("string", {"freq": "alibi", "attn_scale": "constant"}),
    ("streaming-llm", {"freq": "ntk", "factor": 2.0, "attn_scale": "infoscale", "clamp": False, "recent": 9}),
    ("lm-infinite", {"freq": "nope", "attn_scale": "logn", "cosine": 8.0}),
    ("lampe", {"freq": "pi", "factor": 2.0, "attn_scale": "infoscale", "per_sequence": True}),
    ("mesa", {"freq": "alibi", "overlap": 4, "cosine": 10.0}),
    ("mesa", {"freq": "longrope", "attn_scale": "none", "overlap": 3, **needed("longrope", 16)}),
    ("self-extend", {"freq": "dynamic-yarn", "attn_scale": "constant", "logit_factor": 1.3, "cosine": 12.0}),
    ("leaky-rerope", {"freq": "ntk-mixed", "factor": 3.0, "attn_scale": "none"}),
    ("cosscale", {"freq": "llama3", "attn_scale": "infoscale", "cosine": 16.0}),
    ("alibi", {"attn_scale": "logn", "cosine": 6.0}),
    ("rerope", {"freq": "dynamic-ntk", "attn_scale": "constant"}),
]


@pytest.mark.parametrize("n", [37, 130])
@pytest.mark.parametrize("method, params", COMPOSITIONS, ids=str)
def test_compositions(method, params, n):
    """Dense, tiled and the oracle, which turns every pair of tokens by its own distance; and one decoded token."""
    for i, T in ((None, n), ([n + 3], n + 4)):
        q, k, v = inputs(2, 6, 3, 16, T)
        plan = plan_of(method, n, 32, i=i, T=T, D=16, H=6, **params)
        q = q if i is None else q[:, :, i]
        want = oracle(q, k, v, plan)
        for impl in ("dense", "tiled", "auto"):
            error = (attend(q, k, v, plan, impl).double() - want).abs().max() / want.abs().max()
            assert error <= 2e-6, impl


@pytest.mark.parametrize("method, params, why", [
    ("yarn", {"freq": "pi"}, "yarn and pi both set the frequencies"),
    ("alibi", {"freq": "rope"}, "both set the frequencies"),
    ("mesa", {"overlap": 9, "first": 2, "chunk": 8}, "overlap"), ("mesa", {"overlap": 8, "chunk": 20}, "overlap"),
    ("mesa", {"overlap": -1}, "overlap"), ("lm-infinite", {"local": 8, "cap": 6}, "cap 6 is below"),
    ("dca", {"chunk": 0}, "chunk"), ("dca", {"top": 0}, "top"), ("dca", {"chunk": 8, "top": 5}, "top"),
    ("string", {"shift": 0}, "shift"), ("string", {"window": 0}, "window"), ("string", {"window": 2.5}, "window"),
    ("streaming-llm", {"recent": 0}, "recent"), ("streaming-llm", {"sinks": "x"}, "sinks"),
    ("lampe", {"fit": "gpt2"}, "llama3.1"), ("lampe", {"mapping": 0}, "mapping"), ("lampe", {"head": 0}, "head"),
    ("lampe", {"tail": -2}, "tail"), ("lampe", {"logit_factor": 0}, "logit_factor"),
    ("cosscale", {"cosine": 0.0}, "cosine"), ("rope", {"cosine": -3}, "cosine"), ("rope", {"clamp": True}, "clamp"),
    ("ntk-mixed", {"b": 0}, r"\bb\b"), ("ntk-mixed", {"factor": -1}, "factor"),
    ("dynamic-yarn", {"factor": 2}, "factor"),
    ("longrope", {"short_factor": None, "long_factor": None}, "short_factor and long_factor"),
    ("longrope", {"long_factor": [1.0]}, "4 numbers each"), ("dca", {"attn_scale": "cosscale"}, "infoscale"),
], ids=str)
def test_nonsense_is_refused_with_a_reason(method, params, why):
    with pytest.raises(ValueError, match=why):
        plan_of(method, 40, 24, **params)


# ---------------------------------------------------------------------------------------------------------------------
# how far a method reaches

def plan_at(method, L, **params):
    """(n, i, j) -> plan: what reach() asks for."""
    return lambda n, i, j: make_plan(method, i, j, n=n, L=L, D=16, H=4, **{**needed(method, 16), **params})


REACHES = [  # method, parameters, the longest prompt for L = 64 whose last token stays below L
    ("rope", {}, 64), ("logn", {}, 64), ("infoscale", {}, 64), ("cosscale", {}, 64),
    ("self-extend", {"window": 16, "group": 4}, 48 * 4 + 16), ("self-extend", {"window": 24, "group": 8}, 40 * 8 + 24),
    ("self-extend", {"window": 16, "group": 1}, 64),
    ("leaky-rerope", {"window": 16, "k": 4}, 16 + 4 * 48), ("leaky-rerope", {"window": 20, "k": 16.0}, 20 + 16 * 44),
    ("string", {"shift": 20, "window": 4}, 64 + 20 - 4), ("dca", {"chunk": 20, "top": 64}, 40),
    *((method, {"factor": f}, int(64 * f)) for method in ("pi", "ntk", "ntk-mixed", "yarn") for f in (2.0, 3.0, 7.0)),
    *((method, {}, 2 ** 20) for method in ("nope", "alibi", "rerope", "dca", "streaming-llm", "lm-infinite")),
    ("logn", {"freq": "nope"}, 2 ** 20), ("dca", {"chunk": 20, "top": 63}, 2 ** 20),
]


@pytest.mark.parametrize("method, params, tokens", REACHES, ids=str)
def test_reach(method, params, tokens):
    """(L - W)G + W, W + k(L - W), factor L, ...; 2^20 is where the search ends."""
    assert reach(plan_at(method, 64, **params), 64, 1e4) == tokens


@pytest.mark.parametrize("L", [32, 64, 100])
@pytest.mark.parametrize("method", ["rerope", "leaky-rerope", "self-extend", "dca", "streaming-llm", "lm-infinite",
                                    "stair", "mesa", "pi", "ntk", "ntk-mixed", "yarn", "dynamic-ntk", "dynamic-yarn"])
def test_defaults_stay_below_the_training_length(method, L):
    """Every distance of a prompt of 8 L, times the speed of the slowest channel pair.

    (Not LaMPE's at L = 32: its tail is rounded up to a plateau of M, n/m tokens wide, so that its largest distance
    grows with n after all; from L = 64 on there is room for that at 8 L.)
    """
    plan = plan_of(method, 8 * L, L, D=16)
    assert float(distance(plan).nan_to_num().max()) * slowdown(plan) < L


@pytest.mark.parametrize("L", [64, 100, 256])
def test_lampe_stays_below_the_training_length(L):
    """At 8 L; with llama3's fit at any length up to 2^20."""
    assert max(last_row("lampe", 8 * L, L)) < L
    assert L > 64 or reach(plan_at("lampe", 8192), 8192, 1e4) == 2 ** 20


@pytest.mark.parametrize("method, freq, params", [
    ("leaky-rerope", None, {"k": 2.0}), ("self-extend", None, {"group": 2}), ("stair", None, {"width": 1}),
    ("mesa", None, {"width": 1}), ("pi", None, {"factor": 2.0}), ("ntk", None, {"factor": 2.0}),
    ("ntk-mixed", None, {"factor": 2.0}), ("yarn", None, {"factor": 2.0}), ("llama3", None, {}),
    ("cosscale", "pi", {"factor": 2.0}), ("logn", "yarn", {"factor": 2.0})])
def test_advice_is_the_smallest_value_that_does(method, freq, params):
    """16 L and a bit: the advised value of the parameter fits, one less does not."""
    L, n = 64, 16 * 64 + 5

    def fits(over):
        plan = plan_at(method, L, freq=freq, **{**params, **over})
        return within(plan(n, torch.tensor([n - 1]), torch.arange(n)), L, 1e4)
    assert not fits({})
    name, value = re.fullmatch(r"--set (\w+)=(\d+) would do", advice(method, freq, n, fits)).groups()
    assert fits({name: int(value)}) and not fits({name: int(value) - 1})


@pytest.mark.parametrize("method", ["rope", "string", "infoscale"])
def test_advice_where_no_parameter_helps(method):
    assert advice(method, None, 999, lambda over: False) == "choose a method that reaches further"


# ---------------------------------------------------------------------------------------------------------------------
# the shipped checkpoint: decoding is the same function of i as prefill

@functools.cache
def checkpoint():
    """The shipped model, and 856 tokens (1, 856) to read."""
    model, tokenizer = load(SHIPPED)
    return model, torch.tensor([tokenizer.encode((ROOT / "README.md").read_text(encoding="utf-8"))[:856]])


@pytest.mark.parametrize("method, params, decoded", [
    *((method, {}, 200 if method in ("mesa", "lampe") else 12) for method in METHODS),
    ("mesa", {"overlap": 20}, 30), ("lampe", {"freq": "alibi", "cosine": 8.0}, 30)], ids=str)
@torch.inference_mode()
def test_pieces_and_decoding_equal_one_pass(method, params, decoded, cut):
    """A prompt of 600 at L = 256 in uneven pieces, then token by token, against all 856 at once with the same n."""
    model, tokens = checkpoint()
    n, total, cache = 600, tokens.shape[1], KVCache(model.config)
    params = {**needed(method, model.config.head_dim), **params}
    assert total == 856 and model.config.train_len == 256

    def plan(a, b):
        return model.plan(method, n=n, i=torch.arange(a, b), j=torch.arange(b), **params)
    whole = model(tokens, plan(0, total))[0]
    for a, b in [*cut(n), *((t, t + 1) for t in range(n, n + decoded))]:
        logits = model(tokens[:, a:b], plan(a, b), cache)[0]
        assert (logits - whole[a:b]).abs().max() < 1e-5 * whole.abs().max(), (a, b)


# ---------------------------------------------------------------------------------------------------------------------
# models that are not rotary: position_encoding in config.json is the name of a row of METHODS

TINY = {"model_type": "llama", "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 24}


def write_config(folder, **changes):
    """The Config that is read from a config.json with these keys changed."""
    (folder / "config.json").write_text(json.dumps({**TINY, **changes}), encoding="utf-8")
    return Config.from_hf(folder)


@pytest.mark.parametrize("encoding, freq", [("alibi", "alibi"), ("nope", "nope"), ("rope", "rope"), (None, "rope")])
def test_position_encoding_is_read(encoding, freq, tmp_path):
    """Our key of config.json; every geometry then keeps the model's own encoding."""
    config = write_config(tmp_path, **({"position_encoding": encoding} if encoding else {}))
    assert config.freq == freq and config.train_len == 24 and config.cosine_attention is None
    for method in (None, "mesa", "self-extend", "logn"):
        plan = config.plan(method, n=100)
        assert (plan.inv_freq is None) == (freq != "rope") and (plan.slopes is not None) == (freq == "alibi")
        assert plan.cosine is None


def test_unknown_position_encoding(tmp_path):
    with pytest.raises(ValueError, match="position_encoding.*learned.*alibi"):
        write_config(tmp_path, position_encoding="learned")


def test_cosine_attention_is_read(tmp_path):
    """A model trained with CosScale has it with every method; a setting replaces the factor."""
    config = write_config(tmp_path, cosine_attention=24.0)
    assert config.cosine_attention == 24 and config.plan("mesa", n=90).cosine == 24
    assert config.plan("cosscale", n=90).cosine == 24 and config.plan(n=9, cosine=5.0).cosine == 5
    assert write_config(tmp_path).plan("cosscale", n=9).cosine == 32


@pytest.mark.parametrize("changes", [{"position_encoding": "alibi"}, {"position_encoding": "nope"},
                                     {"cosine_attention": 24.0}], ids=str)
@pytest.mark.parametrize("method", [None, "mesa", "self-extend"])
@torch.inference_mode()
def test_other_models_run(changes, method, tmp_path, cut):
    """A random one: dense and tiled agree, so do pieces and one pass, and its encoding makes a difference."""
    torch.manual_seed(0)
    model = Llama(write_config(tmp_path, **changes)).eval()
    tokens, n, cache = torch.randint(50, (1, 90), generator=torch.Generator().manual_seed(1)), 80, KVCache(model.config)
    j = torch.arange(90)
    whole = model(tokens, model.plan(method, n=n, i=j, j=j), impl="dense")
    assert whole.isfinite().all()
    assert torch.allclose(model(tokens, model.plan(method, n=n, i=j, j=j), impl="tiled"), whole, atol=1e-5)
    for a, b in cut(90):
        piece = model(tokens[:, a:b], model.plan(method, n=n, i=j[a:b], j=j[:b]), cache)
        assert torch.allclose(piece, whole[:, a:b], atol=1e-5)
    other = write_config(tmp_path).plan(method, n=n, i=j, j=j)
    assert not torch.allclose(model(tokens, other), whole, atol=1e-5)


@pytest.mark.parametrize("encoding", ["alibi", "nope"])
@pytest.mark.parametrize("asked", [{"method": "yarn"}, {"method": "rope"}, {"method": "mesa", "freq": "pi"},
                                   {"method": "ntk-mixed"}, {"method": "dynamic-yarn"}], ids=str)
def test_rotary_rules_on_other_models_are_refused(encoding, asked, tmp_path):
    """config.plan("yarn") of an ALiBi model: the error says that there is nothing rotary to set."""
    config = write_config(tmp_path, position_encoding=encoding)
    with pytest.raises(ValueError, match=f"no rotary positions.*{asked.get('freq') or asked['method']}"):
        config.plan(**asked, n=50)


def test_two_rules_are_refused_by_a_model_too(tmp_path):
    with pytest.raises(ValueError, match="yarn and pi both set the frequencies"):
        write_config(tmp_path).plan("yarn", freq="pi", n=50)


def test_warnings_of_a_rotary_model(tmp_path):
    config = write_config(tmp_path)
    for silent in ({}, {"method": "mesa"}, {"method": "yarn"}, {"method": "mesa", "freq": "pi"}, {"method": "lampe"}):
        assert config.warnings(**silent) == []
    for asked, name in (({"method": "alibi"}, "alibi"), ({"method": "nope"}, "nope"),
                        ({"method": "mesa", "freq": "alibi"}, "alibi")):
        assert len(config.warnings(**asked)) == 1
        assert f"trained with rope, not {name}" in config.warnings(**asked)[0]
    for asked in ({"method": "cosscale"}, {"method": "mesa", "cosine": 32.0}):
        assert len(config.warnings(**asked)) == 1 and "cosine" in config.warnings(**asked)[0]
    assert len(config.warnings("mesa", freq="nope", cosine=8.0)) == 2


def test_warnings_of_other_models(tmp_path):
    """What a model was trained with is no reason for a warning, ALiBi without its slopes is."""
    model = write_config(tmp_path, position_encoding="alibi", cosine_attention=16.0)
    for silent in ({}, {"method": "alibi"}, {"method": "mesa"}, {"method": "cosscale"}, {"cosine": 16.0}):
        assert model.warnings(**silent) == []
    assert "alibi, not nope" in model.warnings("nope")[0]


# ---------------------------------------------------------------------------------------------------------------------
# pictures

def test_pictures_mark_unseen_keys():
    rows = picture(plan_of("streaming-llm", 12, 12, sinks=2, recent=4)).splitlines()
    assert rows[9].split() == "6 5 . . . 4 3 2 1 0".split()
    rows = picture(plan_of("mesa", 12, 7, first=2, chunk=4, width=2, last=2, overlap=1)).splitlines()
    assert rows[8].split() == "5 4 . . . 3 2 1 0".split()


def command(monkeypatch, *args):
    """The exit code of positions.py, run as a script in this process."""
    monkeypatch.setattr(sys, "argv", ["positions.py", *map(str, args)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "positions.py"), run_name="__main__")
    return end.value.code or 0


def test_a_picture_file_of_all_methods(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    assert command(monkeypatch, "all", "--length", 24, "--plot", tmp_path / "x.png") == 0
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_without_matplotlib_is_one_clear_line(tmp_path):
    """In a fresh process, where a package of that name that cannot be imported stands in front of the real one."""
    (tmp_path / "matplotlib").mkdir()
    (tmp_path / "matplotlib/__init__.py").write_text("raise ImportError('no matplotlib here')\n", encoding="utf-8")
    done = subprocess.run([sys.executable, ROOT / "positions.py", "all", "--plot", tmp_path / "x.png"], text=True,
                          capture_output=True, timeout=300, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode != 0 and done.stdout == "" and "pip install matplotlib" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("args, why", [
    (("all",), "--plot"), (("mesa", "--set", "windw=3"), "windw"), (("dca", "--set", "chunk=0"), "chunk"),
    (("mesa", "--plot", "x.nonsense"), "x.nonsense"), (("rope", "--plot", "no/such/folder/x.png"), "no/such/folder"),
    (("longrope", "--set", "long_factor=[1.0]", "--length", "4"), "long_factor"), (("rope", "--length", "-3"), "-3"),
], ids=str)
def test_mistakes_are_one_clear_line(args, why, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    if "--plot" in args:
        pytest.importorskip("matplotlib")
    assert command(monkeypatch, *args) == 2
    out, err = capsys.readouterr()
    assert not out and why in err and len(err.splitlines()) == 1


def test_a_picture_in_text_and_its_cost(monkeypatch, capsys):
    """The 63 pairs of baselines.md section 6."""
    command(monkeypatch, "streaming-llm", "--length", 12, "--set", "sinks=2", "--set", "recent=4")
    out = capsys.readouterr().out
    assert "attended pairs: 63," in out and "largest distance 6" in out
    assert re.search(r"^ *6 +5 +\. +\. +4 +3 +2 +1 +0$", out, re.M)
