"""Theory as tests: what papers prove about long inputs, run with the plans and the attention of this repository.

Part 1, Mesa-Extrapolation (arXiv 2410.15859): a model written down by hand, which fails beyond a known length.
Part 2, Position Interpolation (arXiv 2306.15595): scores beyond the positions of training.
Part 3, CosScale (arXiv 2501.08570): attention whose entropy does not grow with the length.

Distances, frequencies and attention scales are those of the repository; what they should lead to is typed in below,
from closed forms, or was computed once by other code than this file's.
"""
import math
from dataclasses import replace

import pytest
import torch

from attention import attend, attend_dense
from plan import distance
from positions import make_plan


def last_query(method, T, L, D=2, **settings):
    """The plan of a method for the last of T tokens."""
    return make_plan(method, torch.tensor([T - 1]), torch.arange(T), n=T, L=L, D=D, H=1, **settings)


# ---------------------------------------------------------------------------------------------------------------------
# Part 1. Mesa-Extrapolation, sections 3 and 4: a model that can only count up to M
#
# The input is <bos> and T - 1 copies of one token. Layer 1, written down by hand, reads off the position p(t); layer 2
# has the logits p(t) - p(i) and values of M for <bos>. Its output, with alpha the attention that position t pays to
# <bos>, is o_t = alpha * M - 1 + H, and it "fails" where o_t < H, which is where alpha * M < 1. Uniform attention has
# alpha = 1/t and fails right after t = M. A weave position encoding, at distances W, takes W(t - i) off the logits.
# (Printed as Eqs. 34-37, the weights have q.k = -t*i instead of t - i, and never fail; here q.k = t - i.)

def outputs(plan, p, M, H):
    """o_t of layer 2 for the last queries, as many as the plan has, where position i reads off p[i]."""
    one = torch.ones(len(p))
    is_bos = (torch.arange(len(p)) == 0).float()
    q = torch.stack((p, one), -1)[-plan.Tq:] * math.sqrt(2)  # attention divides by sqrt(D)
    k = torch.stack((one, -p), -1)
    v = torch.stack((M * is_bos, (1 - H) * one), -1)
    return attend(q[None, None], k[None, None], v[None, None], plan)[0, 0] @ torch.tensor([1.0, -1.0])


@pytest.mark.parametrize("attn_scale", ["none", "logn"])
def test_nope_fails_beyond_M(attn_scale):
    """Theorem 3.1, no positions, p = 0: uniform attention, which no attention scale changes."""
    M, H, T = 20, 0.3, 25
    plan = make_plan("nope", torch.arange(T), torch.arange(T), n=T, L=10, D=2, H=1, attn_scale=attn_scale)
    o = outputs(plan, torch.zeros(T), M, H)
    assert o.tolist() == pytest.approx([M / t - 1 + H for t in range(1, T + 1)], abs=1e-5)


@pytest.mark.parametrize("method, M, failing", [
    ("alibi", 16, 17), ("rerope:window=2", 16, 103), ("rerope:window=3", 16, 267), ("rerope:window=4", 64, 3333),
    ("stair:linear=4:width=2", 16, 51), ("stair:linear=4:width=4", 16, 109), ("stair:linear=4:width=50", 16, 255),
    ("stair:linear=4:width=1000", 16, 712), ("rerope:window=4", 16, 712)])
def test_weave_moves_the_threshold(method, M, failing):
    """Theorems 3.2, 3.3 and Corollary 4.1: with p(t) = W(t - 1) + 1 a weave lasts longer than M, but not for ever.

    ReRoPE, W = min(d, N): o_t > H <=> t < 2N + e^N (M - 2A) with A = (1 - e^-N)/(1 - e^-1). Wider stairs last longer,
    up to ReRoPE with the same N, which is one stair wider than the input.
    """
    H = 0.3
    for t in (failing - 1, failing):
        plan = last_query(method, t, L=2, freq="alibi", attn_scale="none")
        plan = replace(plan, slopes=torch.ones(1, dtype=torch.float64))
        W = distance(plan)[0].flip(0).float()
        o = float(outputs(plan, W + 1, M, H))
        assert o < H - 1e-5 if t == failing else o > H - 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# Part 2. Position Interpolation, appendix C: scores beyond the trained positions
#
# The score of a query and a key at distance s is a(s) = Re sum_j h_j exp(i s theta_j), j < d/2, where h_j is the
# product of the query's and the conjugate key's j-th pair of channels, as complex numbers.

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
# Part 3. CosScale against the growth of the entropy

@pytest.mark.parametrize("s, at_64, at_4096", [(8.0, 25.1, 628), (32.0, 2.05, 2.05), (128.0, 1.11, 1.11)])
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
