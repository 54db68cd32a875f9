"""Integers first: every method's distances against a formula typed from its paper, one pair of tokens at a time.

The formulas below are Python arithmetic on one query i and one key j; they share no code and no tensor with
positions.py. A wrong boundary shows here as a wrong number in a small matrix, long before it is a bad perplexity.
"""
import math
from fractions import Fraction

import pytest
import torch

from positions import (METHODS, alibi_slopes, describe, distance, dynamic_split, make_plan, parse_settings, picture,
                       seen, stair_slots)

METHODS = [name for name in METHODS if name != "longrope"]  # its factors come from a config, see test_strategies.py

NONE = None  # in a formula: query i does not see key j
DECODED = 5  # tokens that follow the prompt in most tests


def plan_of(method, n, L, i=None, j=None, D=8, H=4, **params):
    """The plan for n prompt tokens, with all of them as queries and keys unless i and j say otherwise."""
    i = torch.arange(n) if i is None else i
    j = torch.arange(n) if j is None else j
    return make_plan(method, i, j, n=n, L=L, D=D, H=H, **params)


# ---------------------------------------------------------------------------------------------------------------------
# one formula per method: (n, L, parameters) -> pair(i, j) for j <= i

def causal(n, L, **ignored):
    """RoPE and all that only changes frequencies, slopes or sharpness: the true distance."""
    return lambda i, j: i - j


def rerope(n, L, window=None):
    """Su, kexue.fm 9708: min(D, w)."""
    w = window or L // 4
    return lambda i, j: min(i - j, w)


def leaky_rerope(n, L, window=None, k=None):
    """Su, kexue.fm 9708: D for D < w, else w + (D - w)/k; 1/k = (L - w)/(n - w) in Mesa's comparison, never above 1."""
    w = window or L // 4
    k = Fraction(k) if k else max(Fraction(1), Fraction(n - w, L - w))
    return lambda i, j: i - j if i - j < w else w + (i - j - w) / k


def self_extend(n, L, window=None, group=None):
    """arXiv 2401.01325: D for D < W, else i//G - j//G + W - W//G; G from W + (n - W)/G <= 2L/3."""
    W, G = window or L // 4, group or 1
    while group is None and n > L and W + Fraction(n - W, G) > Fraction(2 * L, 3):
        G += 1
    return lambda i, j: i - j if i - j < W else i // G - j // G + W - W // G


def ceil_div(a, b):
    return -(-a // b)


def stair_slot(x, P, E):
    """mesa.md section 3: slot(x) = x from P on, P - ceil((P - x)/E) before."""
    return x if x >= P else P - ceil_div(P - x, E)


def default_width(P, n, last, L):
    """50, or the smallest E that keeps the distance of the last decoded token to token 0 below L."""
    reach = lambda E: n + last - 1 - stair_slot(0, P, E)  # noqa: E731
    return 50 if reach(50) < L else next(E for E in range(1, n + 1) if reach(E) < L)


def share(value, at_2048, L):
    """A released constant, made for L = 2048, in proportion to L."""
    return max(1, round(at_2048 * L / 2048)) if value is None else value


def stair(n, L, linear=None, width=None):
    """mesa.md sections 1 and 3: one grid for all, N = linear exact slots for the last prompt token (L/4)."""
    if n <= L:
        return causal(n, L)
    P = n - (linear or L // 4)
    E = width or default_width(P, n, share(None, 512, L), L)
    return lambda i, j: stair_slot(i, P, E) - stair_slot(j, P, E)


def split(n, L, F, last, reserve, margin, remainder):
    """DynamicSplit as released, mesa.md section 2: I' = I + 50 - Lc - F, D = T0 - F - 100; C = D or I'//(N + 1).

    The released code asserts I' mod C < remainder, and so stops where there are many chunks; the engine narrows C.
    """
    D, rest = L - F - margin, n + reserve - last - F
    N, M = divmod(rest, D)
    C = D if M < remainder else rest // (N + 1)
    return next(c for c in range(C, 0, -1) if rest % c < remainder)


def chunk_starts(n, F, C):
    """[0, F), then chunks of C; the one that starts at b is the last if b + C >= n."""
    starts = [0, F]
    while starts[-1] + C < n:
        starts.append(starts[-1] + C)
    return starts


def mesa(n, L, first=None, last=None, width=None, chunk=None, linear=None, reserve=None, margin=None, remainder=None):
    """mesa.md sections 2 and 3: chunks see the first chunk and themselves, renumbered; the last sees all, by stairs."""
    if n <= L:
        return causal(n, L)
    F, last = share(first, 100, L), share(last, 512, L)
    C = chunk or split(n, L, F, last, share(reserve, 50, L), share(margin, 100, L), share(remainder, 200, L))
    starts = chunk_starts(n, F, C)
    P = n - linear if linear else starts[-1] - F + 1
    E = width or default_width(P, n, last, L)

    def pair(i, j):
        if i >= starts[-1]:
            return stair_slot(i, P, E) - stair_slot(j, P, E)
        home = max(s for s in starts if s <= i)
        if j >= home:
            return i - j
        return F + (i - home) - j if j < F else NONE
    return pair


FORMULAS = {  # method: (formula, one setting of every parameter away from its default)
    "rope": (causal, {}),
    "nope": (causal, {}),
    "alibi": (causal, {}),
    "pi": (causal, {"factor": 3.0}),
    "ntk": (causal, {"factor": 3.0}),
    "dynamic-ntk": (causal, {"factor": 2.0}),
    "yarn": (causal, {"factor": 5.0, "beta_fast": 16, "beta_slow": 2}),
    "llama3": (causal, {"factor": 4.0, "low_freq_factor": 2.0}),
    "logn": (causal, {}),
    "rerope": (rerope, {"window": 5}),
    "leaky-rerope": (leaky_rerope, {"window": 6, "k": 2.5}),
    "self-extend": (self_extend, {"window": 7, "group": 3}),   # W % G != 0: LongLM's W/G and the paper's W//G differ
    "stair": (stair, {"linear": 11, "width": 3}),
    "mesa": (mesa, {"first": 3, "chunk": 11, "width": 4, "last": 6}),
}


def expected(pair, i, j):
    """(Tq, Tk) float64 matrix of a formula, nan where nothing is seen."""
    def cell(a, b):
        d = pair(a, b) if b <= a else NONE
        return math.nan if d is NONE else float(d)
    return torch.tensor([[cell(a, b) for b in j] for a in i], dtype=torch.float64)


def same(got, want):
    return torch.allclose(got, want.to(got.dtype), rtol=0, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("n", [1, 2, 37, 130])
@pytest.mark.parametrize("setting", ["defaults", "explicit"])
@pytest.mark.parametrize("method", FORMULAS)
def test_distances_are_the_formula(method, setting, n):
    """Prompt and the tokens decoded after it: n stays what it was at prefill."""
    formula, params = FORMULAS[method][0], FORMULAS[method][1] if setting == "explicit" else {}
    L, ids = 32, range(n + DECODED)
    plan = plan_of(method, n, L, torch.arange(len(ids)), torch.arange(len(ids)), **params)
    assert same(distance(plan), expected(formula(n, L, **params), ids, ids))


@pytest.mark.parametrize("params", [{"linear": 9}, {"first": 5, "last": 9}, {"chunk": 13, "first": 4, "linear": 20},
                                    {"reserve": 3, "margin": 4, "remainder": 6}, {"width": 2, "last": 4}])
@pytest.mark.parametrize("n", [33, 61, 130])
def test_mesa_parameters_one_by_one(n, params):
    ids = range(n + DECODED)
    plan = plan_of("mesa", n, 32, torch.arange(len(ids)), torch.arange(len(ids)), **params)
    assert same(distance(plan), expected(mesa(n, 32, **params), ids, ids))


@pytest.mark.parametrize("L", [48, 97, 256])
@pytest.mark.parametrize("method", FORMULAS)
def test_distances_at_other_training_lengths(method, L):
    """Defaults scale with L; 48 is not a multiple of anything published, 97 is prime."""
    n, formula = 2 * L + 11, FORMULAS[method][0]
    rows = torch.arange(0, n + DECODED, 7)
    plan = plan_of(method, n, L, rows, torch.arange(n + DECODED))
    assert same(distance(plan), expected(formula(n, L), rows.tolist(), range(n + DECODED)))


@pytest.mark.parametrize("n", [467, 700, 1500])
def test_mesa_of_very_many_chunks(n):
    """15 to 47 times the training length, every 13th query."""
    rows, ids = torch.arange(0, n + DECODED, 13), torch.arange(n + DECODED)
    assert same(distance(plan_of("mesa", n, 32, rows, ids)), expected(mesa(n, 32), rows.tolist(), ids.tolist()))


# ---------------------------------------------------------------------------------------------------------------------
# what every method promises

def check_regions(plan, i):
    """Disjoint (distance() raises otherwise), causal, self at distance 0, bounds that never decrease."""
    d, T = distance(plan), len(plan.regions[0].k_pos)
    future = torch.arange(T) > i[:, None]
    assert d[future].isnan().all()
    assert (d[torch.arange(len(i)), i] == 0).all()
    for r in plan.regions:
        live = r.end > r.start
        assert (r.start[live] >= 0).all() and (r.end[live] <= T).all()
        assert (r.start[live].diff() >= 0).all() and (r.end[live].diff() >= 0).all()
    assert torch.equal(seen(plan), (~d.isnan()).sum(1))


@pytest.mark.parametrize("n", [1, 2, 3, 31, 32, 33, 45, 64, 65, 101, 250])
@pytest.mark.parametrize("method", METHODS)
def test_regions_are_disjoint_causal_and_see_self(method, n):
    i = torch.arange(n + DECODED)
    check_regions(plan_of(method, n, 32, i, i), i)


@pytest.mark.parametrize("method", METHODS)
def test_short_prompts_decode_across_the_training_length(method):
    """A prompt of 20 at L = 32, decoded to 70: nothing changes shape on the way."""
    i = torch.arange(70)
    check_regions(plan_of(method, 20, 32, i, i), i)


@pytest.mark.parametrize("n", [20, 32, 33, 130])
@pytest.mark.parametrize("method", METHODS)
def test_any_cut_gives_the_same_rows(method, n, cut):
    """Prefill in pieces and decoding are the same function of i; keys beyond the piece do not exist yet."""
    total = n + 12
    whole = plan_of(method, n, 32, torch.arange(total), torch.arange(total))
    rows, scales = distance(whole), whole.q_scale
    for a, b in cut(total):
        piece = plan_of(method, n, 32, torch.arange(a, b), torch.arange(b))
        assert same(distance(piece), rows[a:b, :b])
        assert scales is None or torch.equal(piece.q_scale, scales[a:b])
        assert piece.mscale == whole.mscale
        assert whole.inv_freq is None or torch.equal(piece.inv_freq, whole.inv_freq)


@pytest.mark.parametrize("method", [m for m in FORMULAS if m not in ("rerope", "leaky-rerope")])
def test_inside_the_training_length_it_is_the_base_model(method):
    """Self-Extend with group 1, stair, mesa: true distances and log-n = 1 while n <= L. (ReRoPE clips inside L too.)"""
    plan = plan_of(method, 32, 32)
    assert same(distance(plan), expected(causal(32, 32), range(32), range(32)))
    assert plan.q_scale is None or (plan.q_scale == 1).all()


# ---------------------------------------------------------------------------------------------------------------------
# the matrices of the papers and specs, literally

def matrix(text):
    """Rows of numbers, "." for a key that is not seen; rows may stop early."""
    rows = [[math.nan if x == "." else float(x) for x in line.split()] for line in text.strip().splitlines()]
    width = max(len(row) for row in rows)
    return torch.tensor([row + [math.nan] * (width - len(row)) for row in rows], dtype=torch.float64)


MESA_12 = """
0
1   0
2   1   0
3   2   1   0
4   3   2   1   0
5   4   3   2   1   0
2   1   .   .   .   .   0
3   2   .   .   .   .   1   0
4   3   .   .   .   .   2   1   0
5   4   .   .   .   .   3   2   1   0
6   5   5   4   4   3   3   2   2   1   0
7   6   6   5   5   4   4   3   3   2   1   0
"""

REROPE_12 = """
0
1    0
2    1    0
3    2    1    0
4    3    2    1    0
4    4    3    2    1    0
4    4    4    3    2    1    0
4    4    4    4    3    2    1    0
4    4    4    4    4    3    2    1    0
4    4    4    4    4    4    3    2    1    0
4    4    4    4    4    4    4    3    2    1    0
4    4    4    4    4    4    4    4    3    2    1    0
"""

LEAKY_12 = """
0
1    0
2    1    0
3    2    1    0
4    3    2    1    0
4.5  4    3    2    1    0
5    4.5  4    3    2    1    0
5.5  5    4.5  4    3    2    1    0
6    5.5  5    4.5  4    3    2    1    0
6.5  6    5.5  5    4.5  4    3    2    1    0
7    6.5  6    5.5  5    4.5  4    3    2    1    0
7.5  7    6.5  6    5.5  5    4.5  4    3    2    1    0
"""

SELF_EXTEND_12 = """
0
1    0
2    1    0
3    2    1    0
4    3    2    1    0
4    4    3    2    1    0
5    5    4    3    2    1    0
5    5    4    4    3    2    1    0
6    6    5    5    4    3    2    1    0
6    6    5    5    4    4    3    2    1    0
7    7    6    6    5    5    4    3    2    1    0
7    7    6    6    5    5    4    4    3    2    1    0
"""

ROPE_12 = "\n".join(" ".join(str(i - j) for j in range(i + 1)) for i in range(12))


@pytest.mark.parametrize("method, L, params, text", [
    ("rope", 6, {}, ROPE_12),
    ("rerope", 6, {"window": 4}, REROPE_12),
    ("leaky-rerope", 6, {"window": 4, "k": 2}, LEAKY_12),
    ("self-extend", 6, {"window": 4, "group": 2}, SELF_EXTEND_12),
    ("mesa", 6, {"first": 2, "chunk": 4, "width": 2, "last": 2}, MESA_12),
], ids=["rope", "rerope", "leaky-rerope", "self-extend", "mesa"])
def test_twelve_tokens(method, L, params, text):
    assert same(distance(plan_of(method, 12, L, **params)), matrix(text))


def test_leaky_rerope_chooses_k_from_the_lengths():
    """mesa.md section 6: T0 = 8, w = 4, 12 tokens: 1/k = 1/2."""
    assert same(distance(plan_of("leaky-rerope", 12, 8, window=4))[11], matrix("7.5 7 6.5 6 5.5 5 4.5 4 3 2 1 0")[0])


def test_mesa_keeps_its_boundary_while_decoding():
    """The 13th and 14th token with P still 9; the released code would collapse to 6 5 5 4 4 3 3 2 2 1 1 0 0."""
    plan = plan_of("mesa", 12, 6, torch.tensor([12, 13]), torch.arange(14), first=2, chunk=4, width=2, last=2)
    want = matrix("8 7 7 6 6 5 5 4 4 3 2 1 0\n9 8 8 7 7 6 6 5 5 4 3 2 1 0")
    assert same(distance(plan), want)


def test_mesa_layout_of_figure_1():
    """T = 13, F = 2, C = 3: chunks of 2, 3, 3, 3, 2; the last row is W(d) with N = 3 linear slots and E = 2.

    Row 11 is on the same grid, anchored at P = 11 - 2 + 1 = 10; strict Stair PE would have 7 6 6 5 5 4 4 3 3 2 1 0.
    """
    d = distance(plan_of("mesa", 13, 5, first=2, chunk=3, width=2, last=2))
    assert same(d[12], matrix("7 7 6 6 5 5 4 4 3 3 2 1 0")[0])
    assert same(d[11, :12], matrix("6 6 5 5 4 4 3 3 2 2 1 0")[0])
    assert same(d[8, :9], matrix("2 1 . . . . . . 0")[0])
    assert same(d[7, :8], matrix("4 3 . . . 2 1 0")[0])


def test_stair_slots():
    assert stair_slots(torch.arange(12), 9, 2).tolist() == [4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 10, 11]


@pytest.mark.parametrize("linear, width, n", [(4, 2, 40), (16, 5, 100), (3, 50, 200)])
def test_stair_gives_its_last_query_eq_3(linear, width, n):
    """W(d) = d for d < N, N + floor((d - N)/E) beyond: the floor form that Figure 1 of arXiv 2410.15859 shows."""
    def W(d):
        return d if d < linear else linear + (d - linear) // width
    plan = plan_of("stair", n, 16, torch.tensor([n - 1]), torch.arange(n), linear=linear, width=width)
    assert distance(plan)[0].tolist() == [W(n - 1 - j) for j in range(n)]


def test_pi_at_factor_2_is_half_of_every_distance():
    """PI s = 2: rope's distances with half the speed turn by the same angle as the matrix of halves."""
    plan, plain = plan_of("pi", 12, 6, factor=2.0), plan_of("rope", 12, 6)
    halves = distance(plan)[..., None] * (plan.inv_freq / plain.inv_freq)
    assert halves[11, :, 0].tolist() == [5.5, 5, 4.5, 4, 3.5, 3, 2.5, 2, 1.5, 1, 0.5, 0]
    assert plan.inv_freq.tolist() == (plain.inv_freq / 2).tolist()


def test_logn_of_twelve_tokens():
    want = [1, 1, 1, 1, 1, 1, 1.086, 1.161, 1.226, 1.285, 1.338, 1.387]
    got = plan_of("logn", 12, 6).q_scale
    assert [round(x, 3) for x in got.tolist()] == want


def test_attention_scale_takes_the_keys_that_a_query_sees():
    """A query in Mesa's middle chunk sees at most L keys and is not sharpened; the last chunk sees all."""
    plan = plan_of("mesa", 12, 6, first=2, chunk=4, width=2, last=2)
    want = [1] * 10 + [math.log(11) / math.log(6), math.log(12) / math.log(6)]
    assert torch.allclose(plan.q_scale, torch.tensor(want, dtype=torch.float64))
    assert seen(plan).tolist() == [1, 2, 3, 4, 5, 6, 3, 4, 5, 6, 11, 12]


def test_alibi_slopes():
    """Powers of two: 2^(-8h/H). Else the gaps come from the list of twice the length, every second one."""
    assert alibi_slopes(8).tolist() == [2.0 ** -h for h in range(1, 9)]
    assert alibi_slopes(1).tolist() == [2.0 ** -8]
    twelve = [2.0 ** -h for h in range(1, 9)] + [2.0 ** -(h + 0.5) for h in range(4)]
    assert torch.allclose(alibi_slopes(12).double(), torch.tensor(twelve, dtype=torch.float64))
    forty = alibi_slopes(40)
    assert [round(x, 3) for x in forty[32:].tolist()] == [.917, .771, .648, .545, .459, .386, .324, .273]
    assert torch.equal(forty[:32], alibi_slopes(32)) and round(float(forty[0]), 3) == .841


# ---------------------------------------------------------------------------------------------------------------------
# mesa's arithmetic

@pytest.mark.parametrize("n, chunk, chunks", [(4096, 1623, 4), (8192, 1835, 6), (16384, 1726, 11), (32768, 1773, 20)])
def test_dynamic_split_table(n, chunk, chunks):
    """mesa.md section 4, the row for llama2: T -> C and the number of chunks, with first = 100 and last = 800."""
    assert dynamic_split(n, 2048, 100, 800, 50, 100, 200) == chunk
    plan = plan_of("mesa", n, 2048, first=100, last=800)
    borders = (seen(plan).diff() != 1).sum()  # within a chunk, and from the first chunk to the second, one key is added
    assert borders + 2 == chunks


def largest(plan):
    """The largest distance of a plan without a T x T matrix: that of each interval's first key, the least k_pos."""
    far = []
    for r in plan.regions:
        live = r.end > r.start
        start, end = r.start[live], r.end[live]
        falls = torch.cat((torch.zeros(1), (r.k_pos.diff() < 0).cumsum(0)))  # how often k_pos fell, up to each key
        assert torch.equal(falls[start], falls[end - 1])
        far.append(float((r.q_pos[live] - r.k_pos[start]).max()))
    return max(far)


@pytest.mark.parametrize("L, lengths", [
    (32, range(33, 2049, 13)), (64, range(65, 4097, 29)), (100, range(101, 6401, 97)), (256, range(257, 16385, 499)),
    (2048, [2049, 2050, 2100, 3000, 3223, 4095, 4096, 4097, 8192, 12345, 16384, 32768, 65537, 131072])])
def test_mesa_stays_below_the_training_length(L, lengths):
    """All that mesa is for: no distance reaches L, up to 64 L, and for about L/4 decoded tokens more."""
    for n in lengths:
        total = torch.arange(n + L // 4)
        plan = plan_of("mesa", n, L, total, total)
        assert largest(plan) < L, n


@pytest.mark.parametrize("n", [1, 5, 31, 32])
def test_mesa_decodes_across_the_training_length(n):
    """A short prompt is plain RoPE, and what is decoded beyond L = 32 stays below 32 for `last` = 8 tokens."""
    i = torch.arange(40)
    d = distance(plan_of("mesa", n, 32, i, i))
    assert same(d[:32], expected(causal(n, 32), range(32), range(40)))
    assert d.nan_to_num().max() < 32


@pytest.mark.parametrize("L", [32, 64, 100, 2048])
def test_mesa_chunks_fit(L):
    """first + chunk <= L at every length: no middle chunk has a position that training did not see."""
    F, last = share(None, 100, L), share(None, 512, L)
    constants = [share(None, x, L) for x in (50, 100, 200)]
    assert all(F + dynamic_split(n, L, F, last, *constants) <= L for n in range(L + 1, 64 * L, 7))


# ---------------------------------------------------------------------------------------------------------------------
# frequencies

def inv_freq(method, n=100, L=2048, D=128, base=1e4, **params):
    i = torch.arange(1)
    return make_plan(method, i, i, n=n, L=L, D=D, H=4, base=base, **params)


def test_rope_frequencies():
    assert inv_freq("rope", D=8, base=1e4).inv_freq.tolist() == pytest.approx([1, 0.1, 0.01, 0.001], rel=1e-12)
    assert inv_freq("rope").inv_freq.dtype == torch.float64


def test_ntk_keeps_the_first_pair_and_divides_the_last():
    plain, ntk = inv_freq("rope").inv_freq, inv_freq("ntk", factor=8.0).inv_freq
    assert float(ntk[0]) == 1 and float(ntk[-1]) == pytest.approx(float(plain[-1]) / 8, rel=1e-12)
    assert inv_freq("ntk", D=8, factor=2.0).inv_freq.tolist() == pytest.approx(
        [x * y for x, y in zip([1, .1, .01, .001], [1, 2 ** (-1 / 3), 2 ** (-2 / 3), 0.5])], rel=1e-12)


@pytest.mark.parametrize("factor, n, base", [(2, 1, 20221), (4, 1, 40890), (8, 1, 82685)])
def test_ntk_bases_of_llama_2(factor, n, base):
    """baselines.md section 2, D = 128: the base that a factor amounts to."""
    theta = inv_freq("ntk", L=4096, factor=float(factor)).inv_freq
    assert float(theta[1]) ** (-64) == pytest.approx(base, rel=1e-4)


@pytest.mark.parametrize("factor, n, base", [(1, 8192, 20221), (1, 16384, 40890), (2, 8192, 30528), (2, 16384, 72196),
                                             (4, 32768, 305922), (4, 4096, 1e4), (2, 17, 1e4)])
def test_dynamic_ntk_bases_of_llama_2(factor, n, base):
    """base (f n/L - (f - 1))^(D/(D-2)) for n > L, the plain base up to L."""
    theta = inv_freq("dynamic-ntk", n=n, L=4096, factor=float(factor)).inv_freq
    assert float(theta[1]) ** (-64) == pytest.approx(base, rel=1e-4)


@pytest.mark.parametrize("n, factor", [(100, 1), (2048, 1), (2049, 2), (4096, 2), (4097, 4), (20000, 16)])
@pytest.mark.parametrize("method", ["pi", "ntk", "yarn"])
def test_default_factor_is_the_power_of_two_that_the_prompt_needs(method, n, factor):
    default, fixed = inv_freq(method, n=n), inv_freq(method, n=n, factor=float(factor))
    assert torch.equal(default.inv_freq, fixed.inv_freq) and default.mscale == fixed.mscale


@pytest.mark.parametrize("L, base, low, high", [(4096, 1e4, 20, 46), (2048, 1e4, 16, 41)])
def test_yarn_ramp(L, base, low, high):
    """The ramp of the released code, linear in the pair's index from `low` to `high`; ends kept or divided."""
    ratio = inv_freq("yarn", L=L, base=base, factor=8.0).inv_freq / inv_freq("rope", base=base).inv_freq
    kept = [1 - min(max((p - low) / (high - low), 0), 1) for p in range(64)]
    assert ratio.tolist() == pytest.approx([k + (1 - k) / 8 for k in kept], rel=1e-9)
    assert float(ratio[0]) == pytest.approx(1) and float(ratio[-1]) == pytest.approx(1 / 8)


@pytest.mark.parametrize("factor, logits", [(1, 1), (2, 1.1434), (4, 1.2965), (8, 1.4591), (16, 1.6314), (32, 1.8133)])
def test_yarn_temperature(factor, logits):
    """mscale^2 = (0.1 ln s + 1)^2, baselines.md section 2.1."""
    assert inv_freq("yarn", factor=float(factor)).mscale ** 2 == pytest.approx(logits, abs=5e-5)


@pytest.mark.parametrize("L, base, counts", [(8192, 5e5, [29, 6, 29]), (4096, 1e4, [36, 10, 18])])
def test_llama3_bands(L, base, counts):
    """Pairs kept, blended and divided by 8: baselines.md section 2.2."""
    plain, got = inv_freq("rope", base=base).inv_freq, inv_freq("llama3", L=L, base=base).inv_freq
    kept, divided = torch.isclose(got, plain), torch.isclose(got, plain / 8)
    assert [int(kept.sum()), int((~kept & ~divided).sum()), int(divided.sum())] == counts


def test_llama3_blend_is_continuous_and_exact():
    """Between the bands: t = (L/wavelength - low)/(high - low), theta' = (1 - t) theta/factor + t theta."""
    plain, got = inv_freq("rope", base=5e5).inv_freq, inv_freq("llama3", L=8192, base=5e5).inv_freq
    t = ((8192 * plain / (2 * math.pi) - 1) / (4 - 1)).clamp(0, 1)
    assert torch.allclose(got, (1 - t) * plain / 8 + t * plain, rtol=1e-12)


def test_methods_without_rotation():
    nope, alibi = inv_freq("nope"), inv_freq("alibi")
    assert nope.inv_freq is None and nope.slopes is None
    assert alibi.inv_freq is None and torch.equal(alibi.slopes, alibi_slopes(4))


def test_methods_compose():
    """Any geometry with any frequencies and any attention scale."""
    n, i = 130, torch.arange(130)
    plan = plan_of("mesa", n, 32, freq="yarn", attn_scale="none", factor=4.0, first=3)
    assert same(distance(plan), expected(mesa(n, 32, first=3), i.tolist(), i.tolist()))
    assert torch.equal(plan.inv_freq, plan_of("yarn", n, 32, factor=4.0).inv_freq)
    assert plan.mscale == 0.1 * math.log(4) + 1 and plan.q_scale is None
    sharp = plan_of("rope", n, 32, attn_scale="logn").q_scale
    assert torch.equal(sharp, plan_of("logn", n, 32).q_scale)


HF_SETTINGS = [
    ("pi", "linear", 2048, 1e4, {"factor": 2.0}),
    ("pi", "linear", 4096, 5e5, {"factor": 32.0}),
    ("dynamic-ntk", "dynamic", 2048, 1e4, {"factor": 2.0}),
    ("dynamic-ntk", "dynamic", 4096, 5e5, {"factor": 8.0}),
    ("dynamic-ntk", "dynamic", 8192, 1e4, {"factor": 1.0}),
    ("yarn", "yarn", 2048, 1e4, {"factor": 16.0}),
    ("yarn", "yarn", 4096, 1e4, {"factor": 32.0}),
    ("yarn", "yarn", 8192, 5e5, {"factor": 4.0, "attention_factor": 1.25}),
    ("yarn", "yarn", 4096, 1e4, {"factor": 8.0, "mscale": 0.707, "mscale_all_dim": 1.0}),
    ("yarn", "yarn", 4096, 1e4, {"factor": 8.0, "mscale": 1.0, "mscale_all_dim": 1.0}),
    ("yarn", "yarn", 4096, 1e4, {"factor": 8.0, "mscale": 0.7}),
    ("yarn", "yarn", 2048, 1e4, {"factor": 4.0, "truncate": False}),
    ("yarn", "yarn", 2048, 5e5, {"factor": 2.0, "beta_fast": 16.0, "beta_slow": 2.0}),
    ("llama3", "llama3", 8192, 5e5, {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
    ("llama3", "llama3", 2048, 1e4, {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
    ("llama3", "llama3", 4096, 1e4, {"factor": 4.0, "low_freq_factor": 2.0, "high_freq_factor": 8.0}),
]


@pytest.mark.parametrize("D", [32, 128])
@pytest.mark.parametrize("method, kind, L, base, params", HF_SETTINGS,
                         ids=[f"{kind}-{L}-{'-'.join(map(str, p.values()))}" for _, kind, L, _, p in HF_SETTINGS])
def test_frequencies_equal_transformers(method, kind, L, base, params, D):
    """inv_freq and the factor on cos and sin for a prompt of 5 L tokens."""
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    rope = {"rope_type": kind, "rope_theta": base, **params}
    if kind in ("yarn", "llama3"):
        rope["original_max_position_embeddings"] = L
    window = L if kind == "dynamic" else int(L * params["factor"])
    config = transformers.LlamaConfig(hidden_size=4 * D, num_attention_heads=4, head_dim=D,
                                      max_position_embeddings=window, rope_parameters=rope)
    theta, mscale = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=5 * L)
    plan = inv_freq(method, n=5 * L, L=L, D=D, base=base, **params)
    assert torch.allclose(plan.inv_freq, theta.double(), rtol=1e-6, atol=0)
    assert plan.mscale == pytest.approx(mscale, rel=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# errors name what is wrong

@pytest.mark.parametrize("change, name", [
    ({"method": "ropey"}, "ropey"),
    ({"method": "rerope", "windw": 4}, "windw"),
    ({"method": "rope", "window": 4}, "window"),
    ({"freq": "ropey"}, "ropey"),
    ({"freq": "mesa"}, "mesa"),
    ({"attn_scale": "temperature"}, "temperature"),
    ({"n": 0}, "n"), ({"n": -3}, "n"), ({"n": 10.5}, "n"), ({"n": "12"}, "n"),
    ({"L": 0}, "L"), ({"L": -1}, "L"), ({"L": 32.0}, "L"), ({"H": 0}, "H"), ({"D": 7}, "head width"), ({"D": 0}, "D"),
    ({"j": torch.arange(1, 13)}, "j"), ({"j": torch.arange(0, 24, 2)}, "j"),
    ({"method": "rerope", "window": 0}, "window"), ({"method": "rerope", "window": -4}, "window"),
    ({"method": "rerope", "window": 2.5}, "window"), ({"method": "rerope", "window": "four"}, "window"),
    ({"method": "leaky-rerope", "k": 0}, "k"), ({"method": "leaky-rerope", "k": -2.0}, "k"),
    ({"method": "leaky-rerope", "window": 0}, "window"),
    ({"method": "self-extend", "group": 0}, "group"), ({"method": "self-extend", "group": 2.5}, "group"),
    ({"method": "self-extend", "window": 0}, "window"),
    ({"method": "stair", "linear": 0}, "linear"), ({"method": "stair", "width": 0}, "width"),
    ({"method": "mesa", "first": 0}, "first"), ({"method": "mesa", "chunk": -1}, "chunk"),
    ({"method": "mesa", "width": 1.5}, "width"), ({"method": "mesa", "last": 0}, "last"),
    ({"method": "mesa", "first": 4, "chunk": 5}, "chunk"), ({"method": "mesa", "linear": 0}, "linear"),
    ({"method": "mesa", "reserve": -1}, "reserve"), ({"method": "mesa", "remainder": "x"}, "remainder"),
    ({"method": "pi", "factor": 0}, "factor"), ({"method": "pi", "factor": -2.0}, "factor"),
    ({"method": "ntk", "factor": 0.0}, "factor"), ({"method": "dynamic-ntk", "factor": -1.0}, "factor"),
    ({"method": "yarn", "factor": 0}, "factor"), ({"method": "yarn", "factor": "big"}, "factor"),
    ({"method": "yarn", "beta_fast": -1}, "beta_fast"), ({"method": "yarn", "beta_slow": 0}, "beta_slow"),
    ({"method": "yarn", "attention_factor": -1.0}, "attention_factor"),
    ({"method": "llama3", "factor": 0}, "factor"), ({"method": "llama3", "low_freq_factor": -1.0}, "low_freq_factor"),
    ({"base": 0.0}, "base"), ({"base": -1e4}, "base"),
], ids=lambda x: "-".join(f"{k}={v}" for k, v in x.items() if k != "j") if isinstance(x, dict) else str(x))
def test_errors_name_what_is_wrong(change, name):
    """12 tokens at L = 8 with one thing wrong: a ValueError whose message contains the name as a word."""
    settings = {"method": "rope", "i": torch.arange(12), "j": torch.arange(12), "n": 12, "L": 8, "D": 8, "H": 4}
    settings.update(change)
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        make_plan(**settings)


@pytest.mark.parametrize("wrong, valid", [({"method": "ropey"}, "leaky-rerope"), ({"freq": "ropey"}, "dynamic-ntk"),
                                          ({"attn_scale": "x"}, "logn"), ({"method": "mesa", "widht": 2}, "width")])
def test_errors_list_what_is_valid(wrong, valid):
    i = torch.arange(4)
    with pytest.raises(ValueError, match=valid):
        make_plan(**{"method": "rope", "i": i, "j": i, "n": 4, "L": 8, "D": 8, "H": 4, **wrong})


@pytest.mark.parametrize("L", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("method", METHODS)
def test_tiny_training_lengths_work_or_say_why(method, L):
    """Defaults in proportion to L meet their floor here. Either a sound plan or a ValueError, never a crash or nan."""
    i = torch.arange(20)
    try:
        plan = plan_of(method, 20, L, i, i)
    except ValueError:
        return
    check_regions(plan, i)
    assert plan.q_scale is None or plan.q_scale.isfinite().all()


def test_distance_refuses_regions_that_overlap():
    """The check that the released LaMPE and STRING would fail: a pair that two regions claim."""
    plan = plan_of("rerope", 12, 8)
    plan.regions[1].end = plan.regions[1].end + 1
    with pytest.raises(ValueError):
        distance(plan)


# ---------------------------------------------------------------------------------------------------------------------
# the picture

def test_picture_shows_the_matrix():
    rows = picture(plan_of("mesa", 12, 6, first=2, chunk=4, width=2, last=2)).splitlines()
    assert rows[9].split() == "5 4 . . . . 3 2 1 0".split()
    assert rows[11].split() == "7 6 6 5 5 4 4 3 3 2 1 0".split()


def test_describe_names_the_cost():
    """62 pairs of 78 seen: 23 in own chunks, 16 of the first chunk, 23 by the last; the largest distance is 7."""
    plan = plan_of("mesa", 12, 6, first=2, chunk=4, width=2, last=2)
    assert int(seen(plan).sum()) == 62
    text = "\n".join(describe(plan, 12, 6))
    assert "attended pairs: 62, 79.5%" in text and "largest distance 7" in text


def test_settings_from_the_command_line():
    assert parse_settings(["first=16", "k=2.5", "beta-fast=8"]) == {"first": 16, "k": 2.5, "beta_fast": 8}
    with pytest.raises(ValueError, match="window"):
        parse_settings(["window"])
