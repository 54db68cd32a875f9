"""Theory as tests: what papers prove about long inputs, run with the plans and the attention of this repository.

Part 1, Mesa-Extrapolation (arXiv 2410.15859): two-layer models written down by hand, which fail beyond a known length.
Part 2, Position Interpolation (arXiv 2306.15595): scores between and beyond the positions of training.
Part 3, InfoScale and CosScale (arXiv 2501.08570): does scaling the logits keep the entropy of attention from growing?

Distances, frequencies and attention scales are those of the repository; what they should lead to is typed in below,
from closed forms. Where a proof has a slip, the docstring says what holds instead. Some numbers are in no paper
("ours"): they were computed once, by other code than this file's.
"""
import math
from dataclasses import replace
from itertools import count

import pytest
import torch

from attention import attend, attend_dense
from plan import distance
from positions import make_plan


def last_query(method, T, L, D=2, **settings):
    """The plan of a method for the last of T tokens."""
    return make_plan(method, torch.tensor([T - 1]), torch.arange(T), n=T, L=L, D=D, H=1, **settings)


# ---------------------------------------------------------------------------------------------------------------------
# Part 1. Mesa-Extrapolation, sections 3 and 4: models that can only count up to M
#
# The input is <bos> and T - 1 copies of one token. The model is two layers of weights written down by hand; its output
# o_t is a number, and it "fails" at t where o_t < H. All of them end in the same way. With alpha the attention that
# position t pays to <bos> in the last layer,
#       o_t = alpha * M - 1 + H,      so that      o_t > H  <=>  alpha * M > 1.
# Uniform attention has alpha = 1/t and fails right after t = M, the model's effective window. A weave position encoding
# puts W(t - i) in the place of the distance t - i; with an ALiBi of slope 1 it adds -W(t - i) to the logits.
# (Printed as Eqs. 34-37, the weights have q.k = -t*i instead of t - i, and never fail; here q.k = t - i.)

def counted(T):
    """1, 2, ..., T: positions count from 1, as in the paper; position 1 is <bos>."""
    return torch.arange(1, T + 1, dtype=torch.float64)


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
    """Theorem 3.1, no position encoding: o_t > H for t < M, o_t = H at M, o_t < H beyond.

    attend() runs it for M = 20, H = 0.3. All keys are equal, so attention is uniform, alpha = 1/t; for the same reason
    no attention scale helps, since it multiplies logits that are all the same.
    """
    M, H, T = 20, 0.3, 25
    plan = make_plan("nope", torch.arange(T), torch.arange(T), n=T, L=10, D=2, H=1, attn_scale=attn_scale)
    values = torch.tensor([[M, 1 - H]] + [[0, 1 - H]] * (T - 1))[None, None]  # (M * is_bos, 1 - H), per token
    same = torch.ones_like(values)
    o = attend(same, same, values, plan)[0, 0] @ torch.tensor([1.0, -1.0])
    assert o.tolist() == pytest.approx([M / t - 1 + H for t in range(1, T + 1)], abs=1e-5)


@pytest.mark.parametrize("M", [1, 16, 64])
def test_a_position_encoding_fails_beyond_M(M):
    """Theorem 3.2, ALiBi of slope 1: layer 1 reads off t exactly, layer 2 is uniform, so o_t = M/t - 1 + H again."""
    H, W = 0.3, weave("alibi", 100)
    p = read_off(W)
    assert p.tolist() == pytest.approx(counted(100).tolist(), rel=1e-12)
    o = [float(bos_weight(W, p, t)) * M - 1 + H for t in range(1, 101)]
    assert o == pytest.approx([M / t - 1 + H for t in range(1, 101)], abs=1e-9)
    assert first_failing(W, p, M) == M + 1


REROPE_WINDOWS = {(16, 2): 103, (16, 3): 267, (16, 4): 712, (16, 5): 1919, (64, 2): 457, (64, 4): 3333}  # (M, N): t


@pytest.mark.parametrize("M, N", REROPE_WINDOWS)
def test_weave_moves_the_threshold(M, N):
    """Theorem 3.3, W = min(d, N): a weave encoding lasts longer than the plain one, but not for ever.

    The proof ends with alpha > 1/T, where o_T > H needs alpha > 1/M. alpha = 1/(2A + (t - 2N) e^-N) for t >= 2N, with
    A = (1 - e^-N)/(1 - e^-1), so that o_t > H <=> t < 2N + e^N (M - 2A): exponential in N and linear in M.
    """
    failing = REROPE_WINDOWS[M, N]
    A = (1 - math.e ** -N) / (1 - math.e ** -1)
    W, p = weave("rerope", failing, window=N), idealised(N, failing)
    assert first_failing(W, p, M) == failing == math.ceil(2 * N + math.e ** N * (M - 2 * A))
    assert float(bos_weight(W, p, failing)) == pytest.approx(1 / (2 * A + (failing - 2 * N) * math.e ** -N), rel=1e-12)


@pytest.mark.parametrize("M, N", [(2, 4), (4, 4), (5, 8)])
def test_weave_gains_nothing_if_N_reaches_M(M, N):
    """Up to position N + 1 all distances are below or at N, so the encoding is the plain one and fails at M + 1."""
    assert first_failing(weave("rerope", 2 * N, window=N), idealised(N, 2 * N), M) == M + 1


@pytest.mark.parametrize("M, N, failing", [(6, 2, 192), (8, 2, 724), (6, 3, 481)])
def test_weave_with_positions_as_read_off(M, N, failing):
    """Theorem 3.3 without the idealisation (ours): with p(t) from layer 1 the model lasts longer, and fails, too.

    The logits of far keys fall with p(i), and the sum of their weights grows like ln t. (Idealised: at 29, 43 and 67.)
    """
    W = weave("rerope", failing, window=N)
    assert first_failing(W, read_off(W), M) == failing > 5 * first_failing(W, idealised(N, failing), M)


def test_the_engine_runs_the_weave_model():
    """Theorem 3.3 by attend() and not by the tensors of this file: M = 16, N = 2, o_t > H at t = 102, not at 103."""
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


@pytest.mark.parametrize("N, E", [(4, 2), (4, 4), (4, 50)])
def test_stair_prefers_bos(N, E):
    """Corollary 4.1, Stair PE: with p(t) = W(t - 1) + 1 no logit W(t - 1) - W(i - 1) - W(t - i) is above that of <bos>.

    All pairs up to t = 200; it says that W(a + b) <= W(a) + W(b).
    """
    W = weave("stair", 200, linear=N, width=E)
    for t in range(1, 201):
        logits = W[t - 1] - W[:t] - W[:t].flip(0)
        assert logits[0] == logits.max() == 0


@pytest.mark.parametrize("M, N, E, failing", [(16, 4, 2, 51), (16, 4, 4, 109), (16, 4, 50, 255), (16, 4, 1000, 712),
                                              (64, 4, 2, 243), (64, 4, 50, 1105)])
def test_stair_moves_the_threshold(M, N, E, failing):
    """Corollary 4.1, Stair PE: the window is finite here, too; wider stairs last longer, up to ReRoPE with the same N.

    One stair wider than the input is ReRoPE: the same distances, the same first failing position, 712.
    """
    W = weave("stair", failing, linear=N, width=E)
    assert first_failing(W, W + 1, M) == failing
    assert M + 1 < failing <= REROPE_WINDOWS[M, N]
    assert torch.equal(W, weave("rerope", failing, window=N)) == (E == 1000)


# ---------------------------------------------------------------------------------------------------------------------
# Part 2. Position Interpolation, section 2 and appendix C: scores between and beyond the trained positions
#
# The score of a query and a key at distance s is a(s) = Re sum_j h_j exp(i s theta_j), j < d/2, theta_j = c^(-2j/d),
# where h_j is the product of the query's and the conjugate key's j-th pair of channels, as complex numbers.

def turned(s, theta):
    """exp(i s theta_j) as a (len(s), d/2) complex tensor."""
    return torch.exp(1j * torch.outer(torch.as_tensor(s, dtype=torch.float64), theta))


@pytest.mark.parametrize("d, c", [(128, 1e4), (64, 1e4), (128, 5e5)])
def test_interpolated_scores_are_bounded(d, c):
    """Theorem 2.1, corrected: |a - a_linear| <= max|h| (s - s1)(s2 - s)/(2 (1 - c^(-4/d))) between two positions.

    (The proof's d/(4 ln c) in the place of 1/(1 - c^(-4/d)) bounds sum theta_j^2 from the wrong side: halfway between
    two positions it promises 0.4343 at d = 128, c = 10^4, where h_j = exp(-i theta_j/2) has 0.4939; ours: 0.4998.)
    pi with factor 8 puts token m at s = m/8: random h and h whose score peaks at some s, |h| = 1, for all of 0..63.
    """
    theta = last_query("pi", 512, L=64, D=d, base=c, factor=8).inv_freq
    phases = torch.rand(200, d // 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    peaks = turned([8 * s for s in (0.5, 10.5, 63.25)], theta).conj()
    h = torch.cat((torch.exp(2j * math.pi * phases), peaks))
    a = (h @ turned(range(513), theta).T).real
    left, right, r = a[:, :-1:8, None], a[:, 8::8, None], torch.arange(8) / 8
    error = (a[:, :-1].unflatten(1, (64, 8)) - (left * (1 - r) + right * r)).abs()
    bound = r * (1 - r) / 2 / (1 - c ** (-4 / d))
    assert bool((error <= bound + 1e-12).all()) and float((error / bound)[..., 1:].max()) > 0.9


@pytest.fixture(scope="module")
def fitted():
    """128 coefficients each, for 8 draws, of scores that are noise, N(0, 1), at the distances 0..2047 of training."""
    y = torch.randn(2048, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plan = last_query("rope", 2048, L=2048, D=128)
    return torch.linalg.lstsq(sines(plan), y, rcond=1e-8, driver="gelsd").solution


def sines(plan):
    """sin and cos of all angles of the last query (Tk, 128), of which every score is a linear combination."""
    d = distance(plan)[0]
    angle = torch.outer(d[~d.isnan()], plan.inv_freq)
    return torch.cat((angle.sin(), angle.cos()), 1)


@pytest.mark.parametrize("method", ["rope", "pi", "rerope", "leaky-rerope", "self-extend", "dca", "streaming-llm",
                                    "lm-infinite", "lampe", "stair", "mesa"])
def test_fitted_scores_blow_up_beyond_the_trained_range(method, fitted):
    """Figure 2 and appendix C.1: scores fitted to noise at 0..L-1 are below 2 there and in between, and huge beyond.

    So they are for plain RoPE at twice the length; every other method looks no further than training did.
    """
    largest = (sines(last_query(method, 4096, L=2048, D=128)) @ fitted).abs().amax(0)
    assert bool((largest > 100).all() if method == "rope" else (largest < 2).all())


# ---------------------------------------------------------------------------------------------------------------------
# Part 3. InfoScale and log-n: attention scales against the growth of the entropy
#
# With n keys the logits of a query are multiplied by t(n): InfoScale g(n)/g(n0), g(x) = sqrt(1 - x^(-2/d)), about
# sqrt(ln n/ln n0); log-n ln n/ln n0. The entropy over n random keys whose logits spread by sigma is ln n - sigma^2/2
# while sigma^2 < 2 ln n, so keeping it takes sigma(n)^2 = sigma^2 + 2 ln(n/n0): a factor that depends on sigma. Neither
# scale is that; InfoScale meets it where sigma^2 = 2 ln n0. (Derivations and numbers are ours.)

N0 = 64                                    # training length
LENGTHS = [N0 * 2 ** k for k in range(7)]  # 64 ... 4096


def sharpness(method, n):
    """The factor on the logits of a query that sees n keys."""
    plan = last_query(method, n, L=N0, D=128)
    return 1.0 if plan.q_scale is None else float(plan.q_scale)


def entropy(logits):
    """-sum p ln p of softmax(logits), along the last dimension."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize("sigma, none, info, log", [(0.5, 1.00, 0.97, 0.91), (1.0, 0.99, 0.88, 0.64),
                                                    (2.0, 0.90, 0.53, 0.08), (2.88, 0.66, 0.26, -0.04)])
def test_entropy_against_length(sigma, none, info, log):
    """The slope of the entropy against ln n, from 64 to 4096 keys, without a scale, with InfoScale and with log-n.

    InfoScale's claim is 0. At sigma = 1, a usual value, it removes 12 % of the growth, log-n a third. At 2.88, which is
    sqrt(2 ln 64), log-n keeps the entropy. (The numbers: from 2048 queries with keys of their own.)
    """
    z = sigma * torch.randn(128, 4096, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.tensor(LENGTHS, dtype=torch.float64).log()
    x = x - x.mean()
    for method, slope in (("rope", none), ("infoscale", info), ("logn", log)):
        mean = torch.stack([entropy(sharpness(method, n) * z[:, :n]).mean() for n in LENGTHS])
        assert float((x * mean).sum() / (x * x).sum()) == pytest.approx(slope, abs=0.03), method


@pytest.mark.parametrize("s, at_64, at_4096", [(8.0, 25.1, 628), (11.3, 10.3, 35.4), (32.0, 2.05, 2.05),
                                               (128.0, 1.11, 1.11)])
def test_large_cosscale_is_a_window(s, at_64, at_4096):
    """CosScale, logits s cos(q, k): with a large s attention is windowed, whatever the length.

    All keys are equal before they are rotated, so the cosine is the RoPE kernel (2/d) sum_j cos(distance theta_j); the
    effective number of keys, exp(entropy), of a query that sees 64 and 4096 of them. From s = 32 on both are the same.
    """
    for T, effective in ((64, at_64), (4096, at_4096)):
        ones = torch.ones(1, 1, T, 128)
        plan = last_query("cosscale", T, L=64, D=128, cosine=s)
        _, weights = attend_dense(ones[:, :, -1:], ones, ones, plan, return_weights=True)
        p = weights.double().flatten()
        assert math.exp(-(p * p.clamp(min=1e-30).log()).sum()) == pytest.approx(effective, rel=0.025)
