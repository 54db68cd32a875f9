"""Frequency rules and attention scales: worked examples, closed forms, the tables of their papers, and transformers.

Every rule is a plain function (D, base, n, L, *, parameters) -> (inv_freq, mscale), every scale one of
(i, visible, n, L, D, *, parameters) -> a factor per query; they are called as such here.
"""
import math

import pytest
import torch

from frequencies import FREQUENCIES, SCALES, alibi_slopes, positive, whole

PLAIN_8 = [1, 0.1, 0.01, 0.001]  # the frequencies of RoPE for D = 8, base 10^4


def rotation(name, n=100, L=2048, D=128, base=1e4, **params):
    """inv_freq as Python floats, and mscale, of a rule for a prompt of n tokens."""
    inv_freq, mscale = FREQUENCIES[name](D, base, n, L, **params)
    return inv_freq.tolist(), mscale


def plain(D=128, base=1e4):
    return [base ** (-2 * p / D) for p in range(D // 2)]


# ---------------------------------------------------------------------------------------------------------------------
# frequency rules

FOUR_PAIRS = {  # rule: parameters, and what the frequencies 1, 0.1, 0.01, 0.001 of four channel pairs are divided by
    "rope": ({}, [1, 1, 1, 1]),
    "pi": ({"factor": 2.0}, [2, 2, 2, 2]),  # the last of 12 tokens sees 5.5 5 4.5 ... 0.5 0
    "ntk": ({"factor": 2.0}, [1, 2 ** (1 / 3), 2 ** (2 / 3), 2]),
    "ntk-mixed": ({"factor": 16.0, "b": 1.0}, [2, 4, 8, 16]),
    "longrope": ({"short_factor": [1.0, 2.0, 3.0, 4.0]}, [1, 2, 3, 4]),
}


@pytest.mark.parametrize("name", FOUR_PAIRS)
def test_four_channel_pairs(name):
    params, divisors = FOUR_PAIRS[name]
    want = [x / divisor for x, divisor in zip(PLAIN_8, divisors)]
    assert rotation(name, D=8, **params) == (pytest.approx(want, rel=1e-12), 1)
    assert FREQUENCIES[name](8, 1e4, 1, 2, **params)[0].dtype == torch.float64


@pytest.mark.parametrize("name", ["nope", "alibi"])
def test_rules_that_rotate_nothing(name):
    assert FREQUENCIES[name](128, 1e4, 100, 2048) == (None, 1)


def test_alibi_slopes():
    """Powers of two: 2^(-8h/H). Else the gaps come from the list of twice the length, every second one."""
    assert alibi_slopes(8).tolist() == [2.0 ** -h for h in range(1, 9)]
    assert alibi_slopes(1).tolist() == [2.0 ** -8]
    between = [2 ** -0.5, 2 ** -1.5, 2 ** -2.5, 2 ** -3.5]
    assert alibi_slopes(12).tolist() == pytest.approx(alibi_slopes(8).tolist() + between)
    forty = alibi_slopes(40)
    assert torch.equal(forty[:32], alibi_slopes(32)) and forty.dtype == torch.float64
    assert forty[32:].tolist() == pytest.approx([.917, .771, .648, .545, .459, .386, .324, .273], abs=5e-4)


@pytest.mark.parametrize("name, factor, n, base", [
    ("ntk", 2, 1, 20221), ("ntk", 4, 1, 40890), ("ntk", 8, 1, 82685),
    ("dynamic-ntk", 1, 8192, 20221), ("dynamic-ntk", 2, 8192, 30528), ("dynamic-ntk", 4, 32768, 305922),
    ("dynamic-ntk", 4, 4096, 1e4), ("dynamic-ntk", 2, 17, 1e4)])
def test_ntk_bases_of_llama_2(name, factor, n, base):
    """L = 4096: 10^4 f^(128/126), dynamic 10^4 (f n/L - (f - 1))^(128/126), and the plain base up to L."""
    inv_freq, _ = rotation(name, n, L=4096, factor=float(factor))
    assert inv_freq[1] ** -64 == pytest.approx(base, rel=1e-4)  # pair 1 of 128 channels turns by base^(-1/64)


@pytest.mark.parametrize("n, factor", [(1, 1), (2048, 1), (2049, 2), (4096, 2), (4097, 4), (20000, 16)])
def test_default_factor_is_the_power_of_two_that_the_prompt_needs(n, factor):
    """As models are tuned for 1, 2, 4, ... times their length."""
    for name in ("pi", "ntk", "ntk-mixed", "yarn"):
        assert rotation(name, n=n) == rotation(name, n=n, factor=float(factor))
    assert rotation("dynamic-ntk", n=n) == rotation("dynamic-ntk", n=n, factor=1.0)


def test_ntk_mixed():
    """theta_p exp(-a (p+1)^b), a = ln k/(D/2)^b, b = 0.75: pair 0 slows down a little, the last by the whole factor."""
    a = math.log(12) / 64 ** 0.75
    want = [x * math.exp(-a * (p + 1) ** 0.75) for p, x in enumerate(plain())]
    assert rotation("ntk-mixed", factor=12.0) == (pytest.approx(want, rel=1e-12), 1)
    assert want[-1] == pytest.approx(plain()[-1] / 12)


@pytest.mark.parametrize("L, low, high", [(4096, 20, 46), (2048, 16, 41)])
def test_yarn_ramp(L, low, high):
    """The ramp of the released code, linear in the pair's index from `low` to `high`; the ends are kept or divided."""
    kept = [1 - min(max((p - low) / (high - low), 0), 1) for p in range(64)]
    want = [x * (k + (1 - k) / 8) for k, x in zip(kept, plain())]
    assert rotation("yarn", L=L, factor=8.0)[0] == pytest.approx(want, rel=1e-9)


def test_dynamic_yarn_is_yarn_by_the_prompts_length():
    """And plain RoPE up to L."""
    betas = {"beta_fast": 16.0, "beta_slow": 2.0}
    got = rotation("dynamic-yarn", n=3000, **betas)
    assert got == rotation("yarn", n=3000, factor=3000 / 2048, **betas)
    assert got[1] == pytest.approx(0.1 * math.log(3000 / 2048) + 1)
    assert rotation("dynamic-yarn", n=2048) == (pytest.approx(plain(), rel=1e-12), 1)


@pytest.mark.parametrize("n, divisors", [(4096, [1, 2, 3, 4]), (4097, [1, 4, 16, 64])])
def test_longrope_divides_every_pair_by_its_own_factor(n, divisors):
    """Up to L the short factors, beyond it the long ones; logits times 1 + ln(factor)/ln(L)."""
    factors = {"short_factor": [1.0, 2.0, 3.0, 4.0], "long_factor": [1.0, 4.0, 16.0, 64.0]}
    got, mscale = rotation("longrope", n=n, L=4096, D=8, factor=32.0, **factors)
    assert got == pytest.approx([x / divisor for x, divisor in zip(PLAIN_8, divisors)], rel=1e-12)
    assert mscale ** 2 == pytest.approx(1 + math.log(32) / math.log(4096))


# ---------------------------------------------------------------------------------------------------------------------
# transformers

def phi(D):
    """Factors in the style of Phi-3: mild for short prompts, growing with the pair for long ones."""
    return {"short_factor": [1 + p / 100 for p in range(D // 2)], "long_factor": [1.1 ** p for p in range(D // 2)]}


# What transformers 5.23.0 computes (in float32) for prompts of 5 L tokens, recorded once by ROPE_INIT_FUNCTIONS: the
# frequencies of the pairs 0, D/8, D/4, D/2 - 1, and mscale. (Where it is installed, test_model.py calls it again.)
HF_SETTINGS = [  # rule, L, D, base, parameters, frequencies, mscale
    ("pi", 4096, 32, 5e5, {"factor": 32.0}, [.03125, .0011751885, 4.419417e-05, 1.419272e-07], 1),
    ("dynamic-ntk", 4096, 32, 5e5, {"factor": 8.0}, [1, .014802001, .00021909925, 1.3762637e-07], 1),
    ("yarn", 4096, 32, 1e4, {"factor": 32.0}, [1, .1, .0058482136, 5.5571231e-06], 1.34657359027997),
    ("yarn", 8192, 128, 5e5, {"factor": 4.0, "attention_factor": 1.25},
     [1, .037606031, .00054072868, 6.1378518e-07], 1.25),
    ("yarn", 4096, 128, 1e4, {"factor": 8.0, "mscale": 0.707, "mscale_all_dim": 1.0},
     [1, .1, .0059615388, 1.4434774e-05], .949560882462165),
    ("yarn", 4096, 128, 1e4, {"factor": 8.0, "mscale": 0.7}, [1, .1, .0059615388, 1.4434774e-05], 1.20794415416798),
    ("yarn", 2048, 128, 1e4, {"factor": 4.0, "truncate": False}, [1, .1, .0050569717, 2.8869548e-05], 1.13862943611199),
    ("yarn", 2048, 128, 5e5, {"factor": 2.0, "beta_fast": 16.0, "beta_slow": 2.0},
     [1, .034187298, .00070710672, 1.2275704e-06], 1.06931471805599),
    ("yarn", 131072, 128, 1e4, {"factor": 2.0}, [1, .1, .01, 7.3906042e-05], 1.06931471805599),
    ("yarn", 128, 64, 1e4, {"factor": 4.0}, [1, .045454547, .0025, 3.3338038e-05], 1.13862943611199),
    ("llama3", 8192, 128, 5e5, {}, [1, .037606031, .00052484602, 3.0689259e-07], 1),  # as in Llama 3.1: 8, 1 and 4
    ("llama3", 4096, 32, 1e4, {"factor": 4.0, "low_freq_factor": 2.0, "high_freq_factor": 8.0},
     [1, .1, .0081487326, 4.4456985e-05], 1),
    ("longrope", 4096, 64, 1e4, {"factor": 32.0, **phi(64)},
     [1, .046650738, .0021762913, 6.9474718e-06], 1.19023807142381),
    ("longrope", 2048, 64, 5e5, {"attention_factor": 1.5, **phi(64)},
     [1, .017543491, .00030777405, 1.5701805e-07], 1.5),
]


@pytest.mark.parametrize("name, L, D, base, params, theta, mscale", HF_SETTINGS)
def test_rules_equal_what_transformers_computed(name, L, D, base, params, theta, mscale):
    got, got_mscale = rotation(name, 5 * L, L, D, base, **params)
    assert [got[0], got[D // 8], got[D // 4], got[D // 2 - 1]] == pytest.approx(theta, rel=1e-6)
    assert got_mscale == pytest.approx(mscale, rel=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# attention scales

def scale(name, visible, n=130, L=64, D=128, **params):
    """The factors of a scale for queries that see so many keys."""
    visible = torch.as_tensor(visible)
    factors = SCALES[name](visible - 1, visible, n, L, D, **params)
    assert factors.shape == visible.shape and factors.dtype == torch.float64
    return factors.tolist()


def test_logn_of_twelve_tokens():
    """max(1, ln(visible)/ln(6))."""
    want = [1, 1, 1, 1, 1, 1, 1.086, 1.161, 1.226, 1.285, 1.338, 1.387]
    assert scale("logn", range(1, 13), n=12, L=6) == pytest.approx(want, abs=5e-4)
    assert scale("logn", [3, 36, 216], L=6, power=2.0) == pytest.approx([1, 4, 9])


@pytest.mark.parametrize("L, n, info, log, yarn", [
    (64, 128, 1.0772, 1.1667, 1.1434), (64, 4096, 1.3918, 2.0000, 2.0047), (2048, 8192, 1.0814, 1.1818, 1.2965),
    (4096, 8192, 1.0381, 1.0833, 1.1434), (4096, 32768, 1.1092, 1.2500, 1.4591)])
def test_three_ways_to_sharpen(L, n, info, log, yarn):
    """InfoScale at D = 128, log-n, and YaRN's (0.1 ln(n/L) + 1)^2: all three are 1 for the L keys of training."""
    assert scale("infoscale", [L, n], n=n, L=L) == pytest.approx([1, info], abs=5e-5)
    assert scale("infoscale", [1, n], n=n, L=L, per_sequence=True) == pytest.approx([info, info], abs=5e-5)
    assert scale("logn", [L, n], n=n, L=L) == pytest.approx([1, log], abs=5e-5)
    assert rotation("yarn", n, L, factor=n / L)[1] ** 2 == pytest.approx(yarn, abs=5e-5)


def test_infoscale_clamps():
    """g(visible)/g(64) with g(x) = sqrt(1 - x^(-2/D)): clamped at 1 within L; free it is 0 for one key alone.

    per_sequence: g(n)/g(64) for every query, decoded ones as well.
    """
    def g(x):
        return math.sqrt(1 - x ** (-2 / 128))
    want = [g(x) / g(64) for x in range(1, 131)]
    assert scale("infoscale", range(1, 131), clamp=False) == pytest.approx(want, rel=1e-12, abs=0) and want[0] == 0
    assert scale("infoscale", range(1, 131)) == pytest.approx([max(1, x) for x in want], rel=1e-12)
    assert scale("infoscale", [1, 130, 150], n=130, per_sequence=True) == pytest.approx([g(130) / g(64)] * 3)
    assert scale("infoscale", [1, 20], n=20, per_sequence=True) == [1, 1]
    assert scale("infoscale", [1, 20], n=20, per_sequence=True, clamp=False) == pytest.approx([g(20) / g(64)] * 2)


def test_constant_is_what_the_releases_put_on_cos_and_sin():
    """(0.1 ln 2 + 1)^2 = 1.143434 on all logits."""
    assert scale("constant", [1, 130]) == pytest.approx([(0.1 * math.log(2) + 1) ** 2] * 2, rel=1e-6)
    assert scale("constant", [1, 130], logit_factor=1.5) == [1.5, 1.5]


# ---------------------------------------------------------------------------------------------------------------------
# errors name what is wrong

@pytest.mark.parametrize("name, params, wrong", [
    ("llama3", {"low_freq_factor": 4.0}, "low_freq_factor 4.0 must be below high_freq_factor 4.0"),
    ("yarn", {"beta_fast": 1, "beta_slow": 2}, "beta_slow 2 must not be above beta_fast 1"),
    ("yarn", {"factor": 4.0, "mscale": -1.0, "mscale_all_dim": 1.0}, "mscale"),
    ("longrope", {"short_factor": [1.0] * 3}, "4 numbers each"), ("longrope", {"short_factor": 2.0}, "4 numbers each"),
    ("longrope", {"short_factor": [1.0, 1.0, 0, 1.0]}, "a factor of longrope"),
    ("longrope", {"short_factor": [1.0] * 4, "attention_factor": 0}, "attention_factor"),
    ("longrope", {"short_factor": [1.0] * 4, "factor": 0}, "factor"),
    ("ntk", {"D": 2}, "at least 4, not 2"), ("dynamic-ntk", {"D": 2}, "at least 4, not 2"),
], ids=str)
def test_rules_refuse_nonsense(name, params, wrong):
    """(Single numbers that are out of range: test_positions.py.)"""
    with pytest.raises(ValueError, match=rf"\b{wrong}\b"):
        rotation(name, n=12, L=16, **{"D": 8, **params})


@pytest.mark.parametrize("check, message, wrong", [
    (whole, "x must be a whole number of at least 1", [0, -1, 1.0, True, "3", 2 ** 40, math.nan]),
    (positive, "x must be a positive number", [0, -1.0, True, "3", math.inf, math.nan, 1e15])])
def test_numbers_are_checked(check, message, wrong):
    assert check("x", 3) == 3 and check("x", None, 7) == 7
    for value in wrong:
        with pytest.raises(ValueError, match=message):
            check("x", value)
