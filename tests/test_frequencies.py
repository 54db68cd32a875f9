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
    "p-rope": ({"partial_rotary_factor": 0.5, "factor": 2.0}, [2, 2, math.inf, math.inf]),
    "cope-clip": ({"clip_low_n": 3}, [1, 1, 2, math.inf]),  # times (1 + cos t)/2 for t = 0, pi/2, pi
    "giraffe": ({"truncate_pos": 314}, [1, 1, 0.16 * 314 / (2 * math.pi), math.inf]),  # 0.01 is half a turn in 314
    "abf": ({"rope_theta": 1e8}, [1, 10, 100, 1000]),
    "resonance": ({}, [6 / (2 * math.pi), 63 / (20 * math.pi), 628 / (200 * math.pi), 6283 / (2000 * math.pi)]),
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
    for name in ("pi", "ntk", "ntk-mixed", "yarn", "mrrope"):
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


def test_mrrope_divides_more_and_more_within_the_band_of_yarn():
    """D = 8, L = 2048: the band is the pairs 1, 2, 3, which get 8^0, 8^(2/6) and 8^1 of a factor of 8."""
    got, mscale = rotation("mrrope", D=8, factor=8.0)
    assert got == pytest.approx([1, 0.1, 0.01 / 2, 0.001 / 8], rel=1e-12)
    assert mscale == pytest.approx(0.1 * math.log(8) + 1)


def test_pairs_at_rest():
    """HardClip; the defaults of p-rope and cope-clip for 128 channels; rounding leaves them at rest."""
    assert rotation("cope-clip", D=8, clip_low_n=3, hard=True)[0] == pytest.approx([1, 0, 0, 0])
    for name, params, turning in (("cope-clip", {"hard": True}, 44), ("cope-clip", {}, 63), ("p-rope", {}, 16),
                                  ("resonance", {"on": "p-rope"}, 16)):
        got, _ = rotation(name, **params)
        assert all(x > 0 for x in got[:turning]) and got[turning:] == [0] * (64 - turning)
    assert rotation("p-rope", partial_rotary_factor=1.0)[0] == pytest.approx(plain(), rel=1e-12)


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
# other released codes

PAIRS = [0, 15, 21, 33, 45, 48, 62, 63]  # of 64
RELEASED = [  # rule, L, base, parameters, frequencies of PAIRS, mscale: what the released formulas give in float64
    # mattian7/mrRoPE @ d1a6f31: scaled_rope/LlamaYaRNRadix.py, yarn_radix3
    ("mrrope", 4096, 1e4, {"factor": 8.0},
     [1, .115478198468946, .0484091095352504, .00505086265218195, .000224546126432739, .000125, 1.66690179020415e-05,
      1.44347748086182e-05], 1.20794415416798),
    ("mrrope", 8192, 5e5, {"factor": 4.0},
     [1, .0461640502654605, .0127765992098418, .000388386992731722, 2.45952773559272e-05, 1.32957397423625e-05,
      7.53464538034793e-07, 6.13785197782902e-07], 1.13862943611199),
    # sheryc/resonance_rope @ 4a7f5a7: scaled_rope/modeling_llama_yarn.py, LlamaYaRNScaledResonanceRotaryEmbedding.py
    ("resonance", 4096, 1e4, {},
     [1.0471975511966, .116355283466289, .0487068628463534, .00865452521650081, .00153999639881853, .00100002949342346,
      .000133352830341057, .000115478502245535], 1),
    ("resonance", 4096, 1e4, {"on": "yarn", "n": 16384},  # a factor of 4
     [1.0471975511966, .116355283466289, .047241994790824, .00541187364959482, .000429413976707189,
      .000249997425980965, 3.3338030695656e-05, 2.88694929134657e-05], 1.13862943611199),
    # transformers 5.24.0: modeling_rope_utils.py, _compute_proportional_rope_parameters
    ("p-rope", 4096, 1e6, {"factor": 2.0}, [.5, .0196209487924227, 0, 0, 0, 0, 0, 0], 1),
    # hrlics/CoPE @ ed52ba5: modeling_cope.py
    ("cope-clip", 8192, 5e5, {},
     [1, .0461640502654605, .0134904198902267, .00115204274026278, 9.77102143725421e-05, 4.75758931509045e-05,
      2.0552548462129e-08, 0], 1),
    # abacusai/Long-Context @ c2a90d1: python/models/interpolate.py, truncate 4096
    ("giraffe", 4096, 1e4, {},
     [1, .115478198468946, .0486967525165863, .00865964323360065, .00153992652605949, 9.58737992428526e-05, 0, 0], 1),
]


@pytest.mark.parametrize("name, L, base, params, frequencies, mscale", RELEASED)
def test_rules_equal_their_released_codes(name, L, base, params, frequencies, mscale):
    got, got_mscale = rotation(name, **{"n": L, "L": L, "base": base, **params})
    assert [got[p] for p in PAIRS] == pytest.approx(frequencies, rel=1e-12, abs=0)
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


def test_ssmax_is_logn_without_its_floor():
    assert scale("ssmax", [1, 8, 64, 4096]) == pytest.approx([0, 0.5, 1, 2])
    assert scale("ssmax", [1, 8], s=0.43) == pytest.approx([0, 0.43 * math.log(8)])


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


RELEASED_SCALES = [  # scale, L, indices of queries, factors: what the released formulas give in float64
    # meta-llama/llama-models @ a9c89c4: models/llama4/model.py, attn_temperature_tuning
    ("llama4", 8192, [0, 8190, 8191, 99999, 1048575], [1, 1, 1.06931471805599, 1.25649493574615, 1.48598124043617]),
    # transformers 5.24.0: models/ministral3/modeling_ministral3.py, get_llama_4_attn_scale
    ("ministral", 16384, [0, 16383, 16384, 99999, 262143],
     [1, 1, 1.06931471805599, 1.19459101490553, 1.27725887222398]),
]


@pytest.mark.parametrize("name, L, i, factors", RELEASED_SCALES)
def test_scales_equal_their_released_codes(name, L, i, factors):
    """They go by the index of a query, not by the keys it sees."""
    i = torch.tensor(i)
    got = SCALES[name](i, torch.ones_like(i), 130, L, 128)
    assert got.tolist() == pytest.approx(factors, rel=1e-12) and got.dtype == torch.float64


@pytest.mark.parametrize("n, factor", [(1000, 1), (262144, 1), (1010000, 1.28795525611565)])
def test_qwen_1m_as_released(n, factor):
    """vLLM has the root, 0.1 ln(n/L) + 1, on the keys (vllm-project/vllm @ 006e0ac: dual_chunk_flash_attn.py, forward)
    and again on the logits (there, _dual_chunk_flash_attn_prefill_func)."""
    assert scale("qwen-1m", [1, n], n=n, L=262144) == pytest.approx([factor] * 2, rel=1e-12)


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
    ("mrrope", {"beta_fast": 1, "beta_slow": 2}, "beta_slow 2 must not be above beta_fast 1"),
    ("p-rope", {"partial_rotary_factor": 1.5}, "partial_rotary_factor must not be above 1"),
    ("resonance", {"on": "nope"}, "on=nope turns nothing"),
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
