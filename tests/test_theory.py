"""Theory as tests: what three papers prove about long inputs, checked in numbers, with the slips in their proofs.

Part 1, Mesa-Extrapolation (arXiv 2410.15859): two-layer models written down by hand, which fail beyond a known length.
Part 2, Position Interpolation (arXiv 2306.15595): the bound on a score between two trained positions.
Part 3, InfoScale (arXiv 2501.08570): does scaling the logits keep the entropy of attention from growing?

Distances, frequencies and attention scales are those of positions.py; what they should lead to is typed in below, from
closed forms. Every docstring has a claim, the slip in its proof if there is one, and what is checked. Some numbers
are in no paper ("ours"): they were computed once, by other code than this file's.
"""
import math
from dataclasses import replace
from itertools import count

import pytest
import torch
from torch.nn.functional import normalize

from attention import attend
from positions import distance, make_plan, rope


def seeded(seed=0):
    """The same random numbers in every run."""
    return torch.Generator().manual_seed(seed)


def last_query(method, T, L, D=2, **settings):
    """The plan of a method for the last of T tokens, which sees all of them."""
    return make_plan(method, torch.tensor([T - 1]), torch.arange(T), n=T, L=L, D=D, H=1, **settings)


def counted(T):
    """1, 2, ..., T: in part 1 positions count from 1, as in the paper; position 1 is <bos>."""
    return torch.arange(1, T + 1, dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------------------
# Part 1. Mesa-Extrapolation, sections 3 and 4: models that can only count up to M
#
# The input is <bos> and T - 1 copies of one token. The model is two layers of weights written down by hand; its output
# o_t is a number, and it "fails" at t where o_t < H. All of them end in the same way. With alpha the attention that
# position t pays to <bos> in the last layer,
#       o_t = alpha * M - 1 + H,      so that      o_t > H  <=>  alpha * M > 1.
# Uniform attention has alpha = 1/t and fails right after t = M, the model's effective window. A weave position encoding
# puts W(t - i) in the place of the distance t - i; with an ALiBi of slope 1 it adds -W(t - i) to the logits.

def weave(method, T, **settings):
    """W(0), W(1), ..., W(T - 1): the distances at which a method's last query sees the keys, the nearest first."""
    return distance(last_query(method, T, L=2, **settings))[0].flip(0)


def bos_signal(W):
    """Layer 1: keys are zero, so the logits are -W(t - i), and only <bos> has a value, 1: x_t, the attention on it."""
    weight = torch.exp(-W)
    return weight / weight.cumsum(0)


def read_off(W):
    """The MLP after layer 1: the position p(t) = ln(1 + (e - 1)/x_t), which is t where W(d) = d."""
    return torch.log(1 + (math.e - 1) / bos_signal(W))


def bos_weight(W, p, t):
    """Layer 2: queries (p(t), 1) and keys (1, -p(i)) give the logits p(t) - p(i) - W(t - i); alpha at position t."""
    return torch.softmax(p[t - 1] - p[:t] - W[:t].flip(0), 0)[0]


def first_failing(W, p, M):
    """The first position t where o_t < H; equality, as at t = M with uniform attention, is not yet a failure."""
    return next(t for t in count(1) if M * bos_weight(W, p, t) < 1 - 1e-9)


def idealised(N, T):
    """What the paper takes layer 1 to have read off under W = min(d, N): p(t) = min(t, N + 1)."""
    return counted(T).clamp(max=N + 1)


@pytest.mark.parametrize("attn_scale", ["none", "logn"])
def test_nope_fails_beyond_M(attn_scale):
    """Mesa-Extrapolation, Theorem 3.1 (no position encoding).

    Claim: there are weights with o_t > H for t < M and o_t < H for t > M.
    Slip: none. The bound is exact, with o_t = H at t = M.
    Check: attention.py runs it for M = 20, H = 0.3. All keys are equal, so attention is uniform, alpha = 1/t; for the
    same reason no attention scale helps, since it multiplies logits that are all the same.
    """
    M, H, T = 20, 0.3, 25
    plan = make_plan("nope", torch.arange(T), torch.arange(T), n=T, L=10, D=2, H=1, attn_scale=attn_scale)
    values = torch.tensor([[M, 1 - H]] + [[0, 1 - H]] * (T - 1))[None, None]  # (M * is_bos, 1 - H), per token
    same = torch.ones_like(values)
    o = attend(same, same, values, plan)[0, 0] @ torch.tensor([1.0, -1.0])
    assert o[18:21].tolist() == pytest.approx([0.352632, 0.3, 0.252381], abs=1e-5)
    assert bool((o[:M - 1] > H + 1e-3).all()) and bool((o[M:] < H - 1e-3).all())


def test_pe_layer_1_reads_off_the_position():
    """Mesa-Extrapolation, Theorem 3.2 (ALiBi of slope 1), first layer.

    Claim: the attention on <bos> is x_t = (e - 1)/(e^t - 1), from which an MLP recovers t.
    Slip: none on paper; in floating point x_t is 0 from t = 105 on (float32) or 747 on (float64).
    Check: x_t and the position for t <= 64, and where the signal dies.
    """
    t, W = counted(64), weave("alibi", 64)
    assert torch.allclose(bos_signal(W), (math.e - 1) / (t.exp() - 1), rtol=1e-12, atol=0)
    assert torch.allclose(read_off(W), t, rtol=1e-12, atol=0)
    W = weave("alibi", 1000)
    dead32, dead64 = (int((bos_signal(w) == 0).nonzero()[0]) + 1 for w in (W.float(), W))
    assert 85 <= dead32 <= 106 and 705 <= dead64 <= 748  # a few less where the CPU flushes denormal numbers


@pytest.mark.parametrize("M", [1, 16, 64])
def test_pe_fails_beyond_M(M):
    """Mesa-Extrapolation, Theorem 3.2 (ALiBi of slope 1), second layer.

    Claim: there are weights that fail exactly beyond M with a position encoding, too.
    Slip: in the weights, not in the claim; see the next test. Here q = (t, 1) and k = (1, -i), whose product t - i
    cancels the bias -(t - i), so that attention is uniform again.
    Check: o_t = M/t - 1 + H, with the positions that layer 1 read off; the first failing position is M + 1.
    """
    H, W = 0.3, weave("alibi", 100)
    p = read_off(W)
    o = [float(bos_weight(W, p, t)) * M - 1 + H for t in range(1, 101)]
    assert o == pytest.approx([M / t - 1 + H for t in range(1, 101)], abs=1e-9)
    assert first_failing(W, p, M) == M + 1


def test_pe_with_the_printed_weights_never_fails():
    """Mesa-Extrapolation, Theorem 3.2, Eqs. 34-37.

    Claim: q = (0, 0, t, ...) and k = (0, 0, -i, ...) cancel the bias -(t - i).
    Slip: their product is -t * i, not t - i.
    Check: the logits -t * i - (t - i) = -t - i(t - 1) are largest at i = 1, so <bos> gets most of the attention, and
    ever more of it: o_t > H at every t, and the model as printed has no finite window.
    """
    M = 16
    alpha = [torch.softmax(-t * counted(t) - (t - counted(t)), 0)[0] for t in range(1, 201)]
    assert all(M * a > 10 for a in alpha)
    assert float(alpha[199]) == pytest.approx(1)


@pytest.mark.parametrize("N, last_exact", [(3, 24), (6, 421)])
def test_weave_layer_1_saturates(N, last_exact):
    """Mesa-Extrapolation, Theorem 3.3 (weave position encodings, W = min(d, N)), first layer.

    Claim: the same weights read off a position "almost equal" to min(t, N + 1).
    Slip: only while N is about ln t or more. Exactly, p(t) = ln(e^(N+1) + (e - 1)(t - N - 1)) for t > N, which grows
    without bound, and rounds to N + 1 only while t < N + 1 + 0.3775 e^(N+1): 24.6 for N = 3, 421.02 for N = 6.
    Check: both, with the distances of ReRoPE.
    """
    p = read_off(weave("rerope", 600, window=N))
    exact = torch.log(math.e ** (N + 1) + (math.e - 1) * (counted(600)[N:] - N - 1))
    assert torch.allclose(p[:N], counted(N)) and torch.allclose(p[N:], exact, rtol=1e-12, atol=0)
    assert int((p.round() == N + 1).nonzero()[-1]) + 1 == last_exact == int(N + 1 + 0.37754 * math.e ** (N + 1))


REROPE_WINDOWS = [  # M, N, first failing t
    (16, 2, 103), (16, 3, 267), (16, 4, 712), (16, 5, 1919),
    (64, 2, 457), (64, 3, 1232), (64, 4, 3333), (64, 5, 9043),
]


@pytest.mark.parametrize("M, N, failing", REROPE_WINDOWS)
def test_weave_moves_the_threshold(M, N, failing):
    """Mesa-Extrapolation, Theorem 3.3 (weave position encodings, W = min(d, N)).

    Claim: the weights that fail beyond M with the plain encoding give o_T > H for all T > M with a weave encoding.
    Slip: the proof ends with alpha > 1/T, but o_T > H needs alpha > 1/M. The window is longer, not infinite:
        alpha = 1/(2A + (t - 2N) e^-N) for t >= 2N, with A = (1 - e^-N)/(1 - e^-1), so that
        o_t > H  <=>  t < 2N + e^N (M - 2A),
    exponential in N and linear in M.
    Check: with ReRoPE's distances the first failing position is the first one not below that, and alpha > 1/t there.
    """
    A = (1 - math.e ** -N) / (1 - math.e ** -1)
    W, p = weave("rerope", failing, window=N), idealised(N, failing)
    assert first_failing(W, p, M) == failing == math.ceil(2 * N + math.e ** N * (M - 2 * A))
    alpha = float(bos_weight(W, p, failing))
    assert alpha == pytest.approx(1 / (2 * A + (failing - 2 * N) * math.e ** -N), rel=1e-12)
    assert alpha > 1 / failing


@pytest.mark.parametrize("M, N", [(2, 4), (4, 4), (5, 8)])
def test_weave_gains_nothing_if_N_reaches_M(M, N):
    """Mesa-Extrapolation, Theorem 3.3, a condition it does not state (ours).

    Claim: weave encodings extend the window of the plain one.
    Slip: only if N < M. Up to position N + 1 all distances are below or at N, so the encoding is the plain one.
    Check: the first failing position is M + 1, as without weaving.
    """
    assert first_failing(weave("rerope", 2 * N, window=N), idealised(N, 2 * N), M) == M + 1


@pytest.mark.parametrize("M, N, failing", [(6, 2, 192), (8, 2, 724), (6, 3, 481)])
def test_weave_with_positions_as_read_off(M, N, failing):
    """Mesa-Extrapolation, Theorem 3.3, without the idealisation (ours).

    Claim: the position is "almost equal" to min(t, N + 1).
    Slip: the threshold 2N + e^N (M - 2A) lies where that no longer holds (test_weave_layer_1_saturates).
    Check: with p(t) as layer 1 gives it the logits of far keys fall with p(i), the sum of their weights grows like ln t
    and not like t, and the model lasts longer, exponentially in M. Yet it fails, too. (Idealised: at 29, 43 and 67.)
    """
    W = weave("rerope", failing, window=N)
    assert first_failing(W, read_off(W), M) == failing > 5 * first_failing(W, idealised(N, failing), M)


def test_the_engine_runs_the_weave_model():
    """Mesa-Extrapolation, Theorem 3.3, by attention.py and not by the tensors of this file.

    Claim: replacing t - i by W(t - i) in ALiBi is all it takes.
    Slip: as above.
    Check: M = 16 with ReRoPE's distances, N = 2: both layers of the model, o_t > H at t = 102 and no longer at 103.
    """
    M, H, N, T = 16, 0.3, 2, 110
    i = torch.arange(T)
    plan = make_plan("rerope", i, i, n=T, L=2, D=2, H=1, window=N, freq="alibi", attn_scale="none")
    plan = replace(plan, slopes=torch.ones(1, dtype=torch.float64))
    is_bos, zero = (i == 0).float(), torch.zeros(1, 1, T, 2)
    x = attend(zero, zero, is_bos[:, None].repeat(1, 1, 1, 2), plan)
    assert torch.allclose(x[0, 0, :, 0].double(), bos_signal(weave("rerope", T, window=N)), rtol=1e-4, atol=0)
    p, one = idealised(N, T).float(), torch.ones(T)
    q, k = torch.stack((p, one), -1) * math.sqrt(2), torch.stack((one, -p), -1)  # attention divides by sqrt(D)
    v = torch.stack((M * is_bos, (1 - H) * one), -1)
    o = attend(q[None, None], k[None, None], v[None, None], plan)[0, 0] @ torch.tensor([1.0, -1.0])
    assert bool((o[:102] > H).all()) and bool((o[102:] < H).all())


def stair_floor(d, N, E):
    """Stair PE as in Figure 1: N linear slots 0..N-1, then steps of E."""
    return d if d < N else N + (d - N) // E


def stair_ceil(d, N, E):
    """Stair PE as in Eq. 3."""
    return d if d <= N else N - (N - d) // E  # -(-x // E) is x/E rounded up


@pytest.mark.parametrize("N, E", [(4, 2), (4, 4), (4, 50), (2, 3)])
def test_stair_has_two_definitions(N, E):
    """Mesa-Extrapolation, Eq. 3 (Stair PE).

    Claim: Eq. 3 with N = 4, E = 2 is what Figure 1 shows.
    Slip: Eq. 3 rounds up and gives 7 6 6 5 5 4 3 2 1 0 for the tenth query; the figure has 6 6 5 5 4 4 3 2 1 0, rounded
    down. Rounding down with N is rounding up with N - 1, so they differ by what N counts.
    Check: that identity, and that positions.py has the figure's form.
    """
    down = [stair_floor(d, N, E) for d in range(60)]
    assert down == [stair_ceil(d, N - 1, E) for d in range(60)]
    assert weave("stair", 60, linear=N, width=E).tolist() == down
    assert [stair_ceil(d, 4, 2) for d in range(9, -1, -1)] == [7, 6, 6, 5, 5, 4, 3, 2, 1, 0]
    assert weave("stair", 10, linear=4, width=2).flip(0).tolist() == [6, 6, 5, 5, 4, 4, 3, 2, 1, 0]


@pytest.mark.parametrize("N, E", [(4, 2), (4, 4), (4, 50)])
def test_stair_prefers_bos(N, E):
    """Mesa-Extrapolation, Corollary 4.1 (Stair PE).

    Claim: with p(t) = W(t - 1) + 1 the logits W(t - 1) - W(i - 1) - W(t - i) are 0 at <bos> and nowhere larger.
    Slip: none.
    Check: all pairs up to t = 200, which is W(a + b) <= W(a) + W(b).
    """
    W = weave("stair", 200, linear=N, width=E)
    for t in range(1, 201):
        logits = W[t - 1] - W[:t] - W[:t].flip(0)
        assert logits[0] == logits.max() == 0


STAIR_WINDOWS = [  # M, N, E, first failing t
    (16, 4, 2, 51), (16, 4, 4, 109), (16, 4, 50, 255),
    (64, 4, 2, 243), (64, 4, 4, 529), (64, 4, 50, 1105),
]


@pytest.mark.parametrize("M, N, E, failing", STAIR_WINDOWS)
def test_stair_moves_the_threshold(M, N, E, failing):
    """Mesa-Extrapolation, Corollary 4.1 (Stair PE, floor form).

    Claim: Stair PE extrapolates beyond M as Theorem 3.3 says.
    Slip: the one of Theorem 3.3, alpha > 1/T is not enough: the window is finite.
    Check: the first failing position, computed from Stair's distances. Wider stairs last longer, but not as long as
    ReRoPE with the same N, which is the limit of one infinitely wide stair: M < Stair < ReRoPE.
    """
    W = weave("stair", failing, linear=N, width=E)
    assert first_failing(W, W + 1, M) == failing
    rerope = {(M, N): t for M, N, t in REROPE_WINDOWS}[M, N]
    assert M + 1 < failing < rerope


def test_an_infinitely_wide_stair_is_rerope():
    """Mesa-Extrapolation, Corollary 4.1, its limit of large E.

    Claim: Stair PE with N linear slots tends to ReRoPE with window N.
    Slip: none.
    Check: with one stair wider than the input, the same distances, hence the same first failing position, 712.
    """
    W = weave("stair", 712, linear=4, width=1000)
    assert torch.equal(W, weave("rerope", 712, window=4))
    assert first_failing(W, W + 1, 16) == 712


# ---------------------------------------------------------------------------------------------------------------------
# Part 2. Position Interpolation, section 2 and appendix C: scores between and beyond the trained positions
#
# The score of a query and a key at distance s is a(s) = Re sum_j h_j exp(i s theta_j), j < d/2, theta_j = c^(-2j/d),
# where h_j is the product of the query's and the conjugate key's j-th pair of channels, as complex numbers.

def theta(d=128, c=1e4):
    """The project's rotary frequencies."""
    return rope(d, c, n=1, L=2)[0]


def turns(s, freq):
    """exp(i s theta_j) as a (len(s), d/2) complex tensor."""
    return torch.exp(1j * torch.outer(torch.as_tensor(s, dtype=torch.float64), freq))


def score(h, s, freq):
    """a(s) for each row of h (n, d/2), each s and these frequencies: (n, len(s))."""
    return (h @ turns(s, freq).T).real


def random_units(n, d=128):
    """h with |h_j| = 1 and random phases, (n, d/2)."""
    return torch.exp(2j * math.pi * torch.rand(n, d // 2, generator=seeded(), dtype=torch.float64))


def worst_case(d=128, c=1e4, s=0.5):
    """h with |h_j| = 1 whose score peaks at s: all pairs of channels agree there."""
    return torch.exp(-1j * s * theta(d, c))[None]


def curvature_as_proved(d, c):
    """The proof's bound on sum_j theta_j^2, d/(4 ln c)."""
    return d / (4 * math.log(c))


def curvature(d, c):
    """A true bound on sum_j theta_j^2: the geometric series summed to infinity, 1/(1 - c^(-4/d))."""
    return 1 / (1 - c ** (-4 / d))


def midpoint_error(h, freq):
    """|a(1/2) - (a(0) + a(1))/2|: halfway between two trained positions, against the straight line between them."""
    a = score(h, [0, 0.5, 1], freq)
    return (a[:, 1] - (a[:, 0] + a[:, 2]) / 2).abs()


def test_the_constant_of_the_interpolation_bound():
    """Position Interpolation, Theorem 2.1, the constant.

    Claim: |a(s) - a_linear(s)| <= max|h| d (s - s1)(s2 - s)/(8 ln c), at most d max|h|/294.73 for c = 10^4.
    Slip: the proof uses c^x <= 1 + x ln c for x < 0, which is the wrong way round (e^y >= 1 + y). It needs
    sum_j theta_j^2 <= d/(4 ln c) = 3.474 at d = 128, but the sum is 3.998.
    Check: the sum by the project's frequencies; the corrected bound is d max|h|/256.1 halfway between two positions.
    """
    d, c = 128, 1e4
    total = float((theta() ** 2).sum())
    assert total == pytest.approx((1 - c ** -2) / (1 - c ** (-4 / d)))
    assert total == pytest.approx(3.998, abs=5e-4)
    assert curvature_as_proved(d, c) == pytest.approx(3.474, abs=5e-4)
    assert curvature_as_proved(d, c) < total < curvature(d, c)
    assert d / (curvature_as_proved(d, c) / 8) == pytest.approx(294.73, abs=5e-3)  # (s - s1)(s2 - s)/2 = 1/8
    assert d / (curvature(d, c) / 8) == pytest.approx(256.1, abs=0.05)


@pytest.mark.parametrize("d, c", [(128, 1e4), (64, 1e4), (128, 5e5)])
def test_the_interpolation_bound_is_violated(d, c):
    """Position Interpolation, Theorem 2.1, Eq. 7.

    Claim: halfway between two positions the error is at most d max|h|/(32 ln c), 0.4343 at d = 128, c = 10^4.
    Slip: the constant, as above; a false inequality in a proof need not make the theorem false, but here it does.
    Check: h_j = exp(-i theta_j/2) has |h_j| = 1 and an error of 0.4939, above the printed bound and below the corrected
    one, 0.4998. At the paper's d and c random h stays below both, so a test with random numbers would not have found
    this; at d = 64 some of 2000 draws exceed the printed bound, too (ours).
    """
    printed, corrected = curvature_as_proved(d, c) / 8, curvature(d, c) / 8
    worst = float(midpoint_error(worst_case(d, c), theta(d, c)))
    assert printed < worst < corrected
    random = float(midpoint_error(random_units(2000, d), theta(d, c)).max())
    assert random < corrected and (random > printed or d == 128)
    if (d, c) == (128, 1e4):
        assert random < printed
        assert (printed, worst, corrected) == pytest.approx((0.4343, 0.4939, 0.4998), abs=5e-5)


@pytest.mark.parametrize("d, c", [(128, 1e4), (64, 1e4), (128, 5e5)])
def test_the_corrected_interpolation_bound_holds(d, c):
    """Position Interpolation, Theorem 2.1, corrected: |a - a_linear| <= max|h| (s - s1)(s2 - s)/(2(1 - c^(-4/d))).

    Claim: a model tuned to distances 0, 1, 2, ... has well-behaved scores between them, which is where PI goes.
    Slip: the constant, as above. Nor does it say that the scores at the trained positions are good ones.
    Check: the method pi with factor 8 puts token m at s = m/8; all of 0..63, random h and worst cases, |h| = 1.
    """
    freq = make_plan("pi", torch.tensor([0]), torch.tensor([0]), n=512, L=64, D=d, H=1, base=c, factor=8).inv_freq
    h = torch.cat([random_units(200, d)] + [worst_case(d, c, s) for s in (0.5, 10.5, 63.25)])
    a = score(h, range(513), freq)
    left, right, r = a[:, :-1:8, None], a[:, 8::8, None], torch.arange(8) / 8
    error = (a[:, :-1].unflatten(1, (64, 8)) - (left * (1 - r) + right * r)).abs()
    assert bool((error <= r * (1 - r) / 2 * curvature(d, c) + 1e-12).all())


def extrapolation_bound(last):
    """B(s) = sum_{k=1}^{d/2} |sum_{j<k} exp(i s theta_j)| for s = 0..last-1, d = 128."""
    return turns(range(last), theta()).cumsum(1).abs().sum(1)


def test_the_extrapolation_bound_holds():
    """Position Interpolation, Eq. 8 (from RoFormer, section 3.4.3).

    Claim: |a(s)| <= 2 max|h| B(s), by Abel summation.
    Slip: none; but it bounds the size of a score, whereas Theorem 2.1 bounds an interpolation error, so that their
    ratio, which the next test is about, does not compare like with like.
    Check: random h with |h| = 1, s up to 4095.
    """
    a = score(random_units(50), range(4096), theta())
    assert bool((a.abs() <= 2 * extrapolation_bound(4096)).all())


def test_interpolation_is_600_times_more_stable_up_to_4096():
    """Position Interpolation, section 2.3: the ratio of the two bounds (Figure 5).

    Claim: B(s) >= d, so the bound for interpolation is at least 2 * 294.73, about 600 times smaller.
    Slip: true on the range of the figure, s < 4096, and false from s = 4861 on; and with the corrected constant the
    ratio is 512 B/d, not 589 B/d.
    Check: B(s)/d for s < 32768: its minima, medians, and where it first falls below 1.
    """
    b = extrapolation_bound(32768) / 128
    printed, corrected = 2 * 32 * math.log(1e4), 2 * 8 * 128 / curvature(128, 1e4)
    assert float(b[0]) == pytest.approx(16.25)
    assert [float(b[:2048].min()), float(b[:2048].median())] == pytest.approx([1.41, 2.86], abs=6e-3)
    assert [float(b[:4096].min()), float(b[:4096].median())] == pytest.approx([1.116, 2.58], abs=6e-3)
    assert int(b[:4096].argmin()) == 3643 and int((b < 1).nonzero()[0]) == 4861
    assert float((b < 1).double().mean()) == pytest.approx(0.027, abs=5e-4)
    assert int(b.argmin()) == 22297 and float(b.min()) == pytest.approx(0.629, abs=5e-4)
    assert [printed, corrected] == pytest.approx([589.5, 512.2], abs=0.05)
    assert [printed * float(x) for x in (b[:4096].min(), b.min())] == pytest.approx([658, 371], abs=0.5)
    assert corrected * float(b[:4096].min()) == pytest.approx(572, abs=0.5)


def sines(s):
    """The 128 features sin(s theta_j), cos(s theta_j), of which every score is a linear combination."""
    angle = torch.outer(torch.as_tensor(s, dtype=torch.float64), theta())
    return torch.cat((angle.sin(), angle.cos()), 1)


def ridge(X, y, penalty):
    """argmin |X b - y|^2 + penalty |b|^2; singular values under 1e-8 of the largest are round-off, and left out."""
    X, y = torch.cat((X, math.sqrt(penalty) * torch.eye(128))), torch.cat((y, torch.zeros(128, y.shape[1])))
    return torch.linalg.lstsq(X, y, rcond=1e-8, driver="gelsd").solution


@pytest.fixture(scope="module")
def fitted():
    """For each penalty the largest fitted |score| in range, between positions, beyond, and max|h|: 8 random draws."""
    trained, between, beyond = sines(range(2048)), sines(torch.arange(25, 75, 0.125)), sines(range(2048, 4096))
    y, out = torch.randn(2048, 8, generator=seeded(), dtype=torch.float64), {}
    for penalty in (0, 1e-3, 0.1, 1, 10, 100):
        b = ridge(trained, y, penalty)
        size = b.unflatten(0, (2, 64)).norm(dim=0)
        out[penalty] = [x.abs().amax(0) for x in (trained @ b, between @ b, beyond @ b, size)]
    return out


def test_fitted_scores_blow_up_beyond_the_trained_range(fitted):
    """Position Interpolation, Figure 2 and appendix C.1.

    Claim: scores fitted to noise, N(0, 1) at 0..2047, are within about [-1, 1] there and in between, and exceed 8000
    beyond.
    Slip: the effect is there, the number is not: the features are dependent to within round-off, so the size beyond
    depends on the arithmetic (hundreds or thousands in float32, millions and more in float64).
    Check: in every draw no larger between the positions than at them, and more than 10 times as large beyond.
    """
    trained, between, beyond, _ = fitted[0]
    assert bool((between < 1.05 * trained).all()) and bool((trained < 2).all())
    assert bool((beyond > 10 * trained).all())


def test_ridge_regression_removes_the_blow_up(fitted):
    """Position Interpolation, the remark that a ridge penalty makes extrapolation behave.

    Claim: with a penalty on h the scores beyond the range are comparable to those within.
    Slip: none; and it shows what the blow-up comes from, the size of h, a factor of both bounds above.
    Check: medians over the draws: beyond and max|h| fall with the penalty, and from 10 on it is "comparable".
    """
    beyond, size = ([float(row[column].median()) for row in fitted.values()] for column in (2, 3))
    assert beyond == sorted(beyond, reverse=True) and size == sorted(size, reverse=True)
    assert size[0] > 1e3 and 1 < size[1] < 20 and size[-1] < 0.2
    assert beyond[0] > 1e3 and 5 < beyond[1] < 200 and 1 < beyond[2] < 20
    for penalty in (10, 100):
        trained, _, outside, _ = fitted[penalty]
        assert float((outside / trained).median()) < 2


# ---------------------------------------------------------------------------------------------------------------------
# Part 3. InfoScale and log-n: attention scales against the growth of the entropy
#
# With n keys the logits of a query are multiplied by t(n): InfoScale g(n)/g(n0), g(x) = sqrt(1 - x^(-2/d)); log-n
# ln n/ln n0; YaRN one factor for its stretch. The body of the InfoScale paper was not available for these notes, only
# its abstract and released code: the derivations and numbers below are ours, and so no proof of theirs is judged.

N0 = 64                                 # training length n0 of the released models
LENGTHS = [N0 * 2 ** k for k in range(7)]  # 64 ... 4096


def sharpness(method, n, n0, **settings):
    """The factor on the logits of a query that sees n keys."""
    plan = last_query(method, n, L=n0, D=128, **settings)
    return plan.mscale ** 2 * (1.0 if plan.q_scale is None else float(plan.q_scale))


def entropy(logits):
    """-sum p ln p of softmax(logits), along the last dimension."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


SHARPNESS = [  # n0, n, InfoScale, sqrt(ln n/ln n0), log-n, YaRN
    (64, 128, 1.0772, 1.0801, 1.1667, 1.1434), (64, 256, 1.1485, 1.1547, 1.3333, 1.2965),
    (64, 512, 1.2150, 1.2247, 1.5000, 1.4591), (64, 1024, 1.2773, 1.2910, 1.6667, 1.6314),
    (64, 2048, 1.3361, 1.3540, 1.8333, 1.8133), (64, 4096, 1.3918, 1.4142, 2.0000, 2.0047),
    (2048, 8192, 1.0814, 1.0871, 1.1818, 1.2965), (2048, 16384, 1.1192, 1.1282, 1.2727, 1.4591),
    (4096, 8192, 1.0381, 1.0408, 1.0833, 1.1434), (4096, 16384, 1.0744, 1.0801, 1.1667, 1.2965),
    (4096, 32768, 1.1092, 1.1180, 1.2500, 1.4591),
]


@pytest.mark.parametrize("n0, n, info, root, log, yarn", SHARPNESS)
def test_infoscale_is_the_weakest_of_four(n0, n, info, root, log, yarn):
    """InfoScale's formula, next to the other attention scales, d = 128.

    Claim: t(n) = g(n)/g(n0) keeps the entropy of n0 keys.
    Slip: g(n) is about sqrt(2 ln n/d), so t is about sqrt(ln n/ln n0), half of log-n's growth in logarithms: they
    cannot both be right for the same logits.
    Check: the table, to four digits, and t(n0) = 1.
    """
    assert sharpness("infoscale", n, n0) == pytest.approx(info, abs=5e-5)
    assert sharpness("logn", n, n0) == pytest.approx(log, abs=5e-5)
    assert sharpness("yarn", n, n0, factor=n / n0) == pytest.approx(yarn, abs=5e-5)
    assert math.sqrt(math.log(n) / math.log(n0)) == pytest.approx(root, abs=5e-5)
    assert 1 < info < root < min(log, yarn)
    assert sharpness("infoscale", n0, n0) == sharpness("logn", n0, n0) == 1


@pytest.fixture(scope="module")
def cosines():
    """Cosines of 256 random queries with 4096 random keys, d = 128, (256, 4096): their spread is 1/sqrt(d)."""
    generator = seeded()

    def directions(n):
        return normalize(torch.randn(n, 128, generator=generator, dtype=torch.float64))
    return torch.cat([directions(8) @ directions(4096).T for _ in range(32)])  # new keys for every 8 queries


def slope(values):
    """Least-squares slope of values against ln n, n in LENGTHS."""
    x = torch.tensor(LENGTHS, dtype=torch.float64).log()
    x = x - x.mean()
    return float((x * torch.stack(values)).sum() / (x * x).sum())


def entropy_slope(cosines, sigma, scale):
    """d H/d ln n of attention over n random keys whose logits spread by sigma, multiplied by scale(n)."""
    z = sigma * math.sqrt(128) * cosines
    return slope([entropy(scale(n) * z[:, :n]).mean() for n in LENGTHS])


def test_infoscale_is_the_cosine_of_a_cap(cosines):
    """InfoScale, where g(n) = sqrt(1 - n^(-2/d)) comes from.

    Claim: g(n) is the cosine to the rim of a spherical cap that holds one key in n.
    Slip: the largest of n random cosines stays below it (0.207 against 0.251 at n = 64); and solving H = 0 for the
    scale gives n^(2/d) g(n), of which the release keeps g(n): 6.7 % too little from 64 to 4096.
    Check: the measured largest cosine, and the ratio of the exact root (d - 2) cos/sin^2 to g.
    """
    def g(n):
        return math.sqrt(1 - n ** (-2 / 128))
    assert [g(64), g(4096)] == pytest.approx([0.251, 0.349], abs=5e-4)
    measured = [float(cosines[:, :n].amax(1).mean()) for n in (64, 4096)]
    assert measured == pytest.approx([0.207, 0.314], abs=0.008)
    root = [126 * g(n) / (1 - g(n) ** 2) for n in (64, 4096)]
    assert root[1] / root[0] / (g(4096) / g(64)) == pytest.approx(1.067, abs=5e-4)


ENTROPY_SLOPES = [  # sigma, then d H/d ln n with no scale, InfoScale, sqrt-log, log-n, and the Gaussian rule below
    (0.5, 1.00, 0.97, 0.97, 0.91, 0.17),
    (1.0, 0.99, 0.89, 0.88, 0.66, 0.20),
    (2.0, 0.91, 0.56, 0.54, 0.12, 0.27),
    (2.88, 0.69, 0.30, 0.28, -0.02, 0.28),   # sqrt(2 ln 64), where InfoScale is that rule
    (4.0, 0.44, 0.14, 0.13, -0.05, 0.24),
    (11.3, 0.08, 0.02, 0.02, -0.02, 0.07),   # CosScale with s = 128
]  # from 3072 queries, each with keys of its own, cosines drawn from their closed distribution; standard error 0.005


@pytest.mark.parametrize("sigma, none, info, root, log, rule", ENTROPY_SLOPES)
def test_entropy_against_length(cosines, sigma, none, info, root, log, rule):
    """InfoScale's title, "entropy invariance", on random directions.

    Claim: with t(n) on the logits the entropy does not depend on the number of keys n, i.e. its slope is 0.
    Slip: H is about ln n - sigma^2/2, so invariance needs sigma(n)^2 = sigma^2 + 2 ln(n/n0), a factor that depends on
    the spread sigma of a head's logits. InfoScale is that rule only at sigma^2 = 2 ln n0. At sigma = 1, a usual value,
    it removes 11 % of the growth. (That rule, in turn, holds only while sigma(n)^2 < 2 ln n.)
    Check: the slope from 64 to 4096 keys with each scale, within Monte-Carlo error.
    """
    def gaussian(n):
        return math.sqrt(sigma ** 2 + 2 * math.log(n / N0)) / sigma
    scales = [lambda n: sharpness("rope", n, N0), lambda n: sharpness("infoscale", n, N0),
              lambda n: math.sqrt(sharpness("logn", n, N0)), lambda n: sharpness("logn", n, N0), gaussian]
    measured = [entropy_slope(cosines, sigma, scale) for scale in scales]
    assert measured == pytest.approx([none, info, root, log, rule], abs=0.04)


@pytest.mark.parametrize("sigma", [0.5, 1.0])
def test_entropy_of_gaussian_logits(cosines, sigma):
    """The entropy of attention over n random keys whose logits spread by sigma.

    Claim: H = ln n - sigma^2/2 while sigma^2 < 2 ln n: a cumulant expansion, exact for Gaussian logits and many keys.
    Slip: none; beyond that limit the largest logit decides, and the entropy stays near 0.
    Check: all lengths, unscaled.
    """
    z = sigma * math.sqrt(128) * cosines
    measured = [float(entropy(z[:, :n]).mean()) for n in LENGTHS]
    assert measured == pytest.approx([math.log(n) - sigma ** 2 / 2 for n in LENGTHS], abs=0.05)


NEEDED = [(0.5, 6.68), (1.0, 3.58), (2.0, 2.24), (2.88, 1.94), (4.0, 1.79), (11.3, 1.60)]  # sigma, t*(4096)


@pytest.mark.parametrize("sigma, needed", NEEDED)
def test_the_scale_that_would_keep_the_entropy(cosines, sigma, needed):
    """InfoScale, turned round: the t* for which 4096 keys have the entropy that 64 had.

    Claim: t* = g(4096)/g(64) = 1.39 whatever the logits.
    Slip: t* depends on sigma, and is above 1.39 in all rows; log-n's 2.00 is near it at sigma = sqrt(2 ln 64) = 2.88.
    Check: t* by bisection (H falls as t grows, d H/d ln t = -t^2 Var_p(z)).
    """
    z = sigma * math.sqrt(128) * cosines
    target, low, high = entropy(z[:, :N0]).mean(), 1.0, 16.0
    for _ in range(12):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if entropy(middle * z).mean() > target else (low, middle)
    assert low == pytest.approx(needed, rel=0.1)
    assert low > 1.04 * sharpness("infoscale", 4096, N0)
    if sigma == 2.88:
        assert low == pytest.approx(sharpness("logn", 4096, N0), rel=0.08)


def test_entropy_falls_with_the_scale():
    """The derivative that makes the bisection above work.

    Claim: d H/d ln t = -t^2 Var_p(z), p = softmax(t z).
    Slip: none.
    Check: autograd on random logits.
    """
    z = torch.randn(100, generator=seeded(), dtype=torch.float64)
    t = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    derivative = t.detach() * torch.autograd.grad(entropy(t * z), t)[0]
    p = torch.softmax(1.3 * z, 0)
    variance = (p * z ** 2).sum() - (p * z).sum() ** 2
    assert float(derivative) == pytest.approx(-1.3 ** 2 * float(variance), rel=1e-9)


COSSCALE = [  # s, effective keys exp(H) at n = 64 and 4096, radius of 90 % of the mass, effective keys with InfoScale
    (8, 32.1, 829, 1190, 83.9),
    (math.sqrt(128), 16.6, 74.2, 208, 10.2),
    (16, 7.6, 9.6, 4, 4.6),
    (32, 3.2, 3.2, 1, 2.6),
    (64, 2.0, 2.0, 1, 1.6),
    (128, 1.23, 1.23, 0, 1.06),
]


def kernel(n, s):
    """Distances and logits s cos(q, k), both (n,), for a query amid n keys that equal it before they are rotated.

    The cosine is then the RoPE kernel (2/d) sum_j cos(distance * theta_j).
    """
    away = (torch.arange(n) - n // 2).abs()
    return away, s * torch.cos(torch.outer(away.double(), theta())).mean(1)


@pytest.mark.parametrize("s, at_64, at_4096, radius, with_info", COSSCALE)
def test_large_cosscale_is_a_window(s, at_64, at_4096, radius, with_info):
    """CosScale, the companion of InfoScale: logits are s cos(q, k).

    Claim: with a large s attention is windowed, whatever the length.
    Slip: none seen; but from s = 32 on it is the window and not InfoScale that keeps the entropy from growing.
    Check: by the RoPE kernel alone, without content: the effective number of keys and the radius of 90 % of the mass.
    """
    away, logits = kernel(4096, s)
    assert float(entropy(kernel(64, s)[1]).exp()) == pytest.approx(at_64, rel=0.025)
    assert float(entropy(logits).exp()) == pytest.approx(at_4096, rel=0.025)
    assert float(entropy(sharpness("infoscale", 4096, N0) * logits).exp()) == pytest.approx(with_info, rel=0.025)
    mass = torch.zeros(2049, dtype=torch.float64).scatter_add(0, away, logits.softmax(0)).cumsum(0)
    assert int((mass < 0.9).sum()) == pytest.approx(radius, abs=1)
