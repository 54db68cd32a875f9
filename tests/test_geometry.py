"""Integers first: every method's distances against a formula typed from its paper, one pair of tokens at a time.

The formulas below are Python arithmetic on one query i and one key j; they share no code and no tensor with
geometry.py. A wrong boundary shows here as a wrong number in a small matrix, long before it is a bad perplexity.
"""
import math
from dataclasses import replace
from itertools import count

import pytest
import torch

from geometry import MESA, dynamic_split, mesa_fit, stair_slots
from plan import distance, farthest, visible_keys
from positions import make_plan

NONE = None  # in a formula: query i does not see key j
DECODED = 40  # tokens that follow the prompt in most tests


def plan_of(method, n, L, i=None, T=None, D=8, H=4, **params):
    """The plan for n prompt tokens, T tokens in all (default n), all of them queries unless i says otherwise."""
    j = torch.arange(T or n)
    i = j if i is None else torch.as_tensor(i)
    return make_plan(method, i, j, n=n, L=L, D=D, H=H, **params)


def expected(pair, i, j):
    """(Tq, Tk) float64 matrix of a formula, nan where nothing is seen."""
    def cell(a, b):
        d = pair(a, b) if b <= a else NONE
        return math.nan if d is NONE else float(d)
    return torch.tensor([[cell(a, b) for b in j] for a in i], dtype=torch.float64)


def same(got, want, atol=0.0):
    return torch.allclose(got, want, rtol=0, atol=atol, equal_nan=True)


def matrix(text):
    """The rows 0..11 of a matrix of 12 tokens; "." for a key that is not seen. First rows that are left out are plain.

    "Plain" is RoPE: 0; 1 0; 2 1 0; ...
    """
    lines = [line.split() for line in text.strip().splitlines()]
    rows = [range(i, -1, -1) for i in range(12 - len(lines))] + lines
    rows = [[math.nan if x == "." else float(x) for x in row] + [math.nan] * (12 - len(row)) for row in rows]
    return torch.tensor(rows, dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------------------
# worked examples: 12 tokens

TWELVE = {  # name: (method, L, parameters, the last rows of the matrix)
    "rope": ("rope", 6, {}, "11  10  9   8   7   6   5   4   3   2   1   0"),
    "rerope": ("rerope", 6, {"window": 4}, """
        4    4    3    2    1    0
        4    4    4    3    2    1    0
        4    4    4    4    3    2    1    0
        4    4    4    4    4    3    2    1    0
        4    4    4    4    4    4    3    2    1    0
        4    4    4    4    4    4    4    3    2    1    0
        4    4    4    4    4    4    4    4    3    2    1    0"""),
    "leaky-rerope": ("leaky-rerope", 8, {"window": 4}, """
        4.5  4    3    2    1    0
        5    4.5  4    3    2    1    0
        5.5  5    4.5  4    3    2    1    0
        6    5.5  5    4.5  4    3    2    1    0
        6.5  6    5.5  5    4.5  4    3    2    1    0
        7    6.5  6    5.5  5    4.5  4    3    2    1    0
        7.5  7    6.5  6    5.5  5    4.5  4    3    2    1    0"""),  # k = (12 - 4)/(8 - 4)
    "self-extend": ("self-extend", 6, {"window": 4, "group": 2}, """
        4    4    3    2    1    0
        5    5    4    3    2    1    0
        5    5    4    4    3    2    1    0
        6    6    5    5    4    3    2    1    0
        6    6    5    5    4    4    3    2    1    0
        7    7    6    6    5    5    4    3    2    1    0
        7    7    6    6    5    5    4    4    3    2    1    0"""),
    "dca": ("dca", 6, {"chunk": 4, "top": 5}, """
        5   4   3   2   2   1   0
        5   4   3   2   3   2   1   0
        5   4   3   2   4   3   2   1   0
        5   4   3   2   5   4   3   2   1   0
        5   4   3   2   5   4   3   2   2   1   0
        5   4   3   2   5   4   3   2   3   2   1   0"""),
    "string": ("string", 12, {"window": 2}, """
        2   3   2   1   0
        3   2   3   2   1   0
        4   3   2   3   2   1   0
        5   4   3   2   3   2   1   0
        6   5   4   3   2   3   2   1   0
        7   6   5   4   3   2   3   2   1   0
        8   7   6   5   4   3   2   3   2   1   0
        9   8   7   6   5   4   3   2   3   2   1   0"""),  # shift L/3
    "streaming-llm": ("streaming-llm", 12, {"sinks": 2, "recent": 4}, """
        6   5   .   4   3   2   1   0
        6   5   .   .   4   3   2   1   0
        6   5   .   .   .   4   3   2   1   0
        6   5   .   .   .   .   4   3   2   1   0
        6   5   .   .   .   .   .   4   3   2   1   0"""),
    "lm-infinite": ("lm-infinite", 4, {"sinks": 2, "cap": 4}, """
        4   4   3   2   1   0
        4   4   .   3   2   1   0
        4   4   .   .   3   2   1   0
        4   4   .   .   .   3   2   1   0
        4   4   .   .   .   .   3   2   1   0
        4   4   .   .   .   .   .   3   2   1   0
        4   4   .   .   .   .   .   .   3   2   1   0"""),  # local L
    "chunked": ("chunked", 6, {"chunk": 4}, """
        .   .   .   .   0
        .   .   .   .   1   0
        .   .   .   .   2   1   0
        .   .   .   .   3   2   1   0
        .   .   .   .   .   .   .   .   0
        .   .   .   .   .   .   .   .   1   0
        .   .   .   .   .   .   .   .   2   1   0
        .   .   .   .   .   .   .   .   3   2   1   0"""),
    "sliding": ("sliding", 6, {"window": 4}, """
        .   3   2   1   0
        .   .   3   2   1   0
        .   .   .   3   2   1   0
        .   .   .   .   3   2   1   0
        .   .   .   .   .   3   2   1   0
        .   .   .   .   .   .   3   2   1   0
        .   .   .   .   .   .   .   3   2   1   0
        .   .   .   .   .   .   .   .   3   2   1   0"""),
    "lampe": ("lampe", 16, {"mapping": 6, "head": 3, "tail": 2}, """
        2   2   1   0
        3   3   2   1   0
        3   3   2   2   1   0
        4   4   3   3   2   1   0
        4   4   3   3   2   2   1   0
        5   5   4   4   3   3   2   1   0
        6   5   4   4   3   3   2   2   1   0
        7   6   5   5   4   4   3   3   2   1   0
        8   7   6   6   5   5   4   4   3   2   1   0"""),
    "mesa": ("mesa", 6, {"first": 2, "chunk": 4, "width": 2, "last": 2}, """
        2   1   .   .   .   .   0
        3   2   .   .   .   .   1   0
        4   3   .   .   .   .   2   1   0
        5   4   .   .   .   .   3   2   1   0
        6   5   5   4   4   3   3   2   2   1   0
        7   6   6   5   5   4   4   3   3   2   1   0"""),  # chunks [0,2) [2,6) [6,10) [10,12)
    "mesa, overlap": ("mesa", 7, {"first": 2, "chunk": 4, "width": 2, "last": 2, "overlap": 1}, """
        3   2   .   .   .   1   0
        4   3   .   .   .   2   1   0
        5   4   .   .   .   3   2   1   0
        6   5   .   .   .   4   3   2   1   0
        6   5   5   4   4   3   3   2   2   1   0
        7   6   6   5   5   4   4   3   3   2   1   0"""),  # queries 6..9 also see key 5
}


@pytest.mark.parametrize("method, L, params, text", TWELVE.values(), ids=TWELVE)
def test_twelve_tokens(method, L, params, text):
    assert same(distance(plan_of(method, 12, L, **params)), matrix(text))


# ---------------------------------------------------------------------------------------------------------------------
# one formula per geometry: (n, L, parameters) -> pair(i, j) for j <= i

def share(at_2048, L, least=1):
    """A constant published for L = 2048, in proportion to L."""
    return max(least, round(at_2048 * L / 2048))


def true_distance(n, L, **ignored):
    return lambda i, j: i - j


def rerope(n, L, window=None):
    """Su, kexue.fm 9708: min(D, w)."""
    w = window or L // 4
    return lambda i, j: min(i - j, w)


def leaky_rerope(n, L, window=None, k=None):
    """Su, kexue.fm 9708: D for D < w, else w + (D - w)/k; 1/k = (L - w)/(n - w) in Mesa's comparison, never above 1."""
    w = window or L // 4
    k = k or max(1, (n - w) / (L - w))
    return lambda i, j: i - j if i - j < w else w + (i - j - w) / k


def self_extend(n, L, window=None, group=None):
    """arXiv 2401.01325: D for D < W, else i//G - j//G + W - W//G; G from W + (n - W)/G <= 2L/3 (or (W + L)/2)."""
    W, G = window or L // 4, group or 1
    while group is None and n > L and W + (n - W) / G > max(2 * L / 3, (W + L) / 2):
        G += 1
    return lambda i, j: i - j if i - j < W else i // G - j // G + W - W // G


def dca(n, L, chunk=None, top=None):
    """arXiv 2402.17463: i%s - j%s in a chunk, min(s + i%s, c-1) - j%s to the one before, c-1 - j%s to older ones."""
    s, top = chunk or share(1536, L), top or L - 1

    def pair(i, j):
        chunks_ago = min(i // s - j // s, 2)
        return (i % s, min(s + i % s, top), top)[chunks_ago] - j % s
    return pair


def string(n, L, shift=None, window=None):
    """arXiv 2410.18745: D below S, else D - S + W."""
    S, W = shift or L // 3, window or share(64, L)
    return lambda i, j: i - j if i - j < S else i - j - S + W


def streaming_llm(n, L, sinks=4, recent=None):
    """arXiv 2309.17453, a rolling cache: keys stand at their slot in it, the new token behind; evict after each."""
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
    """arXiv 2308.16137: D < local or j < sinks is seen, at min(D, cap)."""
    local, cap = local or L, cap or L - 1
    return lambda i, j: min(i - j, cap) if i - j < local or j < sinks else NONE


def chunked(n, L, chunk=None):
    """Llama 4's local layers (meta-llama/llama-models @ a9c89c4: create_chunked_attention_mask): i // C = j // C."""
    C = chunk or L
    return lambda i, j: i - j if i // C == j // C else NONE


def sliding(n, L, window=None):
    """Mistral (arXiv 2310.06825): D < W is seen, at D."""
    W = window or L
    return lambda i, j: i - j if i - j < W else NONE


def lampe_constants(n, L):
    """Mapping length, head and tail: llama3's, made for 8192 tokens, in proportion to L, with 3/4 L for its maximum."""
    a, b = 1.0493097327094324e-04 * 8192 / L, -2.466638011138158
    m = 1536 * L // 8192 if n < L else int(0.75 * L / (1 + math.exp(-(a * n + b))))
    return m, max(512 * L // 8192, 1), max(200 * L // 8192, 1)


def lampe_joints(n, m, head, tail):
    """M; r2, where the tail's plateau ends; b1 and b2, which join the three parts."""
    def M(x):
        return m * x // (n - 1)
    r2 = max(x for x in range(n) if M(x) == M(min(tail, n - 1)))
    b1 = head - M(head) - 1
    return M, r2, b1, (n - 1 - r2) - M(n - 1 - r2) - b1


def lampe(n, L, mapping=None, head=None, tail=None):
    """arXiv 2508.02308, released code, each pair once: head, the mapped middle, from n - r2 on the tail.

    (The paper floors the distance instead, so that its largest is m - 1; the code's is larger.)
    """
    m, default_head, default_tail = lampe_constants(n, L)
    m, head, tail = min(mapping or m, n - 1), head or default_head, tail or default_tail
    if n < 2 * head or n - lampe_joints(n, m, head, tail)[1] < head:  # nothing between head and tail
        return true_distance(n, L)
    M, r2, b1, b2 = lampe_joints(n, m, head, tail)

    def pair(i, j):
        if i - j < head:
            return i - j
        return M(i) + b1 - M(j) if i - j < n - r2 else i - b2 - j
    return pair


def stair_slot(x, P, E):
    """arXiv 2410.15859, separable: slot(x) = x from P on, P - ceil((P - x)/E) before."""
    return x if x >= P else P - (P - x + E - 1) // E


def stair_width(P, n, last, L):
    """50, or the smallest E that keeps the distance of the last decoded token to token 0 below L."""
    return next(E for E in count(50) if n + last - 1 - stair_slot(0, P, E) < L)


def stair(n, L, linear=None, width=None):
    """One grid for all queries, with N = linear exact slots for the last prompt token (L/4); while n <= L from L on."""
    P = max(n, L) - (linear or L // 4)
    E = width or stair_width(P, max(n, L), linear or share(512, L), L)
    return lambda i, j: i - j if n <= L and i < L else stair_slot(i, P, E) - stair_slot(j, P, E)


def split(n, L, F, last, overlap, reserve, margin, remainder):
    """DynamicSplit, Algorithm 2, as released: I' = I + 50 - Lc - F, D = T0 - F - 100; C = D or I'//(N + 1).

    The released code asserts I' mod C < remainder, and so stops where there are many chunks; the engine narrows C.
    """
    D, rest = L - F - margin - overlap, n + reserve - last - F
    C = D if rest % D < remainder else rest // (rest // D + 1)
    return next(c for c in range(C, 0, -1) if rest % c < remainder)


def mesa(n, L, first=None, last=None, width=None, chunk=None, linear=None, overlap=0, reserve=None, margin=None,
         remainder=None):
    """arXiv 2410.15859, Algorithm 1: chunks see the first one and themselves, renumbered; the last sees all, by stairs.

    Our overlap: `overlap` tokens more, numbered between the first chunk and one's own.
    """
    F, last = first or share(100, L), last or share(512, L)
    if n <= L:
        return stair(n, L, linear or F - 1 + last, width or stair_width(L - (linear or F - 1 + last), L, last, L))
    constants = reserve or share(50, L), margin or share(100, L), remainder or share(200, L)
    C = chunk or split(n, L, F, last, overlap, *constants)
    starts = [0, F]
    while starts[-1] + C < n:
        starts.append(starts[-1] + C)
    P = n - linear if linear else starts[-1] - F + 1
    E = width or stair_width(P, n, last, L)

    def pair(i, j):
        if i >= starts[-1]:
            return stair_slot(i, P, E) - stair_slot(j, P, E)
        home = max(s for s in starts if s <= i)
        before = overlap if home > F else 0  # the second chunk already follows the first one
        if j >= home - before:
            return i - j
        return F + before + (i - home) - j if j < F else NONE
    return pair


FORMULAS = {"rerope": rerope, "leaky-rerope": leaky_rerope, "self-extend": self_extend, "dca": dca, "string": string,
            "streaming-llm": streaming_llm, "lm-infinite": lm_infinite, "chunked": chunked, "sliding": sliding,
            "lampe": lampe, "stair": stair, "mesa": mesa}
SETTINGS = [
    *((method, {}) for method in FORMULAS),
    ("rerope", {"window": 5}),
    ("leaky-rerope", {"window": 6, "k": 2.5}), ("leaky-rerope", {"window": 6}),
    ("self-extend", {"window": 7, "group": 3}),  # W % G != 0: the released W/G and the paper's W//G differ
    ("self-extend", {"window": 24}),
    ("dca", {"chunk": 11, "top": 17}), ("dca", {"chunk": 7, "top": 6}),
    ("string", {"shift": 9, "window": 4}),
    ("streaming-llm", {"sinks": 2, "recent": 9}), ("streaming-llm", {"sinks": 1, "recent": 1}),
    ("lm-infinite", {"local": 9, "sinks": 3, "cap": 9}), ("lm-infinite", {"local": 9, "sinks": 1, "cap": 8}),
    ("chunked", {"chunk": 7}), ("chunked", {"chunk": 1}), ("sliding", {"window": 9}), ("sliding", {"window": 1}),
    ("lampe", {"mapping": 20, "head": 5, "tail": 3}), ("lampe", {"mapping": 600, "head": 16, "tail": 17}),
    ("stair", {"linear": 11, "width": 3}), ("stair", {"linear": 11}),
    ("mesa", {"first": 3, "chunk": 11, "width": 4, "last": 6}), ("mesa", {"chunk": 13, "first": 4, "linear": 20}),
    ("mesa", {"first": 5, "last": 9}), ("mesa", {"reserve": 3, "margin": 4, "remainder": 6}),
    ("mesa", {"overlap": 1, "width": 60}), ("mesa", {"overlap": 9, "first": 2, "chunk": 9}),
]
LENGTHS = [(1, 32), (2, 32), (30, 32), (33, 32), (61, 32), (130, 32), (1000, 32),  # n, L
           (107, 48), (205, 97), (523, 256)]  # 48 is not a multiple of anything published, 97 is prime


@pytest.mark.parametrize("method, params", SETTINGS, ids=str)
def test_distances_are_the_formula(method, params):
    """The prompt and the tokens decoded after it: inside L, at its edges and far beyond; defaults follow L.

    What depends on the length of the prompt stays as it was at prefill. (Mesa's released code lets the boundary of the
    stairs jump while decoding, LaMPE's freezes M, and fails after `head` tokens.)
    """
    for n, L in LENGTHS:
        total = n + DECODED
        i = range(total) if n < 100 else sorted({*range(0, total, n // 15), *range(n - 3, total, 4)})
        plan = plan_of(method, n, L, i=i, T=total, **params)
        tolerance = 1e-9 if method == "leaky-rerope" else 0  # the others are whole numbers
        assert same(distance(plan), expected(FORMULAS[method](n, L, **params), i, range(total)), tolerance), (n, L)


def test_dca_as_qwen_runs_it():
    """Qwen2.5-1M in vLLM, chunk_size 16 and local_size 4: our chunk is their difference c, our top is chunk_size.

    Keys at j mod c, queries at i mod c in their chunk, at min(i mod c + c, chunk_size) for the one before, and at
    min(2c - 1, chunk_size) for older ones (vllm-project/vllm @ 07b1349: dual_chunk_rope.py).
    """
    size, c = 16, 12

    def pair(i, j):
        chunks_ago = min(i // c - j // c, 2)
        return (i % c, min(i % c + c, size), min(2 * c - 1, size))[chunks_ago] - j % c
    plan = plan_of("dca", 61, 32, chunk=c, top=size, attn_scale="qwen-1m")
    assert same(distance(plan), expected(pair, range(61), range(61)))


def test_stair():
    """Slots from a boundary of 9 on, in steps of 2 before it; exact distances for the last query alone.

    It has W(d) = d for d < N, N + floor((d - N)/E) beyond, as Figure 1 of arXiv 2410.15859 shows (its Eq. 3 rounds up).
    For every query alike that does not factor into a position of the query and one of the key.
    """
    assert stair_slots(torch.arange(12), 9, 2).tolist() == [4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 10, 11]
    d = distance(plan_of("stair", 12, 6, linear=3, width=2))
    assert d[10, :11].tolist() == [6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 0]
    assert d[11].tolist() == [7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 1, 0]


@pytest.mark.parametrize("method", ["rerope", "leaky-rerope", "self-extend", "dca", "streaming-llm", "lm-infinite",
                                    "chunked", "sliding", "lampe", "stair", "mesa", "pi", "ntk", "ntk-mixed", "yarn",
                                    "mrrope", "dynamic-ntk", "dynamic-yarn"])
def test_defaults_stay_below_the_training_length(method):
    """Every distance of a prompt of 8 L, as the slowest channel pair turns."""
    for L in (64, 100):
        plan = plan_of(method, 8 * L, L, D=16)
        slower = float(plan.inv_freq[-1]) / 1e4 ** (-14 / 16)
        assert max(farthest(r) for r in plan.regions) * slower < L


# ---------------------------------------------------------------------------------------------------------------------
# mesa's arithmetic

@pytest.mark.parametrize("n, chunk, chunks", [(4096, 1623, 4), (8192, 1835, 6), (16384, 1726, 11), (32768, 1773, 20)])
def test_dynamic_split_table(n, chunk, chunks):
    """llama2 as released, first = 100 and last = 800: the width of the chunks and their number."""
    assert dynamic_split(n, 2048, 100, 800, 50, 100, 200) == chunk
    plan = plan_of("mesa", n, 2048, first=100, last=800)
    borders = (visible_keys(plan).diff() != 1).sum()  # within a chunk, and into the second chunk, one key is added
    assert borders + 2 == chunks


@pytest.mark.parametrize("L, lengths", [
    (32, [1, 31, 32, *range(33, 2049, 97)]), (100, range(101, 6401, 397)), (256, range(257, 16385, 1597)),
    (2048, [2048, 2049, 2100, 3223, 4097, 12345, 131072])])
def test_mesa_stays_below_the_training_length(L, lengths):
    """All that mesa is for: no distance reaches L, up to 64 L, and for about L/4 decoded tokens more; chunks fit L."""
    for n in lengths:
        plan = plan_of("mesa", n, L, T=n + L // 4)
        assert max(farthest(r) for r in plan.regions) < L, n


RELEASED = {  # as the released codes have it: a fit and L, the method and L in numbers
    "mesa:fit=open-llama": (2048, "mesa:first=100:last=512:width=50:reserve=50:margin=100:remainder=200"),
    "mesa:fit=llama2": (2048, "mesa:first=100:last=800:width=20:reserve=50:margin=100:remainder=200"),
    "mesa:fit=vicuna": (2048, "mesa:first=100:last=1024:width=200:reserve=50:margin=100:remainder=200"),
    "mesa:fit=llama2:width=33": (2048, "mesa:first=100:last=800:width=33:reserve=50:margin=100:remainder=200"),
    "dca:fit=llama": (4096, "dca:chunk=2560:top=3072"), "dca:fit=qwen": (32768, "dca:chunk=22528:top=24576"),
    "dca:fit=qwen-1m": (262144, "dca:chunk=253952:top=262144"),
}


@pytest.mark.parametrize("fit", RELEASED)
def test_fits_of_mesa_and_dca_as_released(fit):
    L, numbers = RELEASED[fit]
    for n in (3 * L // 2, 4 * L):
        one, other = (plan_of(method, n, L, i=[n - 1]) for method in (fit, numbers))
        assert [(int(r.q_pos), int(r.start), int(r.end)) for r in one.regions] == \
               [(int(r.q_pos), int(r.start), int(r.end)) for r in other.regions]
        assert all(torch.equal(r.k_pos, s.k_pos) for r, s in zip(one.regions, other.regions))
    assert mesa_fit(None, 2048) == replace(MESA["open-llama"], width=None)


def test_chunks_of_a_fit():
    """LLaMA-2's at 4,096, 8,192 and 16,384 tokens, as the released code splits them."""
    fit = MESA["llama2"]
    for n, chunk in ((4096, 1623), (8192, 1835), (16384, 1726), (32768, 1773)):
        assert dynamic_split(n, 2048, fit.first, fit.last, fit.reserve, fit.margin, fit.remainder) == chunk


# ---------------------------------------------------------------------------------------------------------------------
# LaMPE's arithmetic

PROMPTS = [1024, 4096, 8191, 8192, 12288, 16384, 25600, 32768, 49152, 65536, 98304, 131072]
FITTED = {  # as released: the window a fit was made for, its head and tail, the mapping length at these prompt lengths
    "llama2": (4096, 512, 200, [1536, 1536, 1536, 1283, 1500, 1702, 2061, 2239, 2423, 2473, 2488, 2489]),
    "llama3": (8192, 512, 200, [1536, 1536, 1536, 1036, 1461, 1993, 3441, 4501, 5810, 6129, 6201, 6204]),
    "mistral": (32768, 2048, 200, [1536, 1536, 1536, 4104, 5788, 7898, 13631, 17829, 23015, 24280, 24566, 24575]),
    "llama3.1": (131072, 8192, 1024, [4983, 5672, 6728, 6728, 7960, 9389, 13433, 17468, 29672, 44548, 68981, 78864]),
}


@pytest.mark.parametrize("fit", FITTED)
def test_lampe_fits_as_released(fit):
    """By the fit's name and by its window, all is as with the numbers of the table; below two heads that is plain."""
    window, head, tail, mapping = FITTED[fit]
    for n, m in zip(PROMPTS, mapping):
        want = distance(plan_of("lampe", n, 100, i=[n - 1], mapping=m, head=head, tail=tail))
        assert same(distance(plan_of("lampe", n, 100, i=[n - 1], fit=fit)), want), n
        assert same(distance(plan_of("lampe", n, window, i=[n - 1])), want), n
        assert bool(want.max() < n - 1) == (n >= 2 * head), n


def test_lampe_with_a_sigmoid_of_ones_own():
    """[a, b, most] as text, as the command line has it: those of llama3 give its mapping lengths from 8,192 tokens on,
    and below it what the sigmoid gives, where the release has 1,536."""
    method = "lampe:sigmoid=[1.0493097327094324e-04,-2.466638011138158,6204.409324666837]"
    for n, mapping in ((1024, 535), (8192, 1036), (12288, 1461), (131072, 6204)):
        want = plan_of("lampe", n, 8192, i=[n - 1], mapping=mapping)
        assert same(distance(plan_of(method, n, 8192, i=[n - 1])), distance(want)), n


def test_lampe_largest_distances():
    """llama3 as released, at 32,768 and 131,072 tokens: below its window of 8,192."""
    for n, largest in ((32768, 5117), (131072, 6892)):
        assert farthest(plan_of("lampe", n, 8192, i=[n - 1]).regions[-1]) == largest
