"""Frequency rules and attention scales: worked examples, closed forms, the tables of their papers, and transformers.

Every rule is a plain function (D, base, n, L, *, parameters) -> (inv_freq, mscale), every scale one of
(i, visible, n, L, D, *, parameters) -> a factor per query; they are called as such here.
"""
import math

import pytest
import torch

from frequencies import FREQUENCIES, SCALES, alibi_slopes, positive, power_of_two, whole

PLAIN_8 = [1, 0.1, 0.01, 0.001]  # the frequencies of RoPE for D = 8, base 10^4


def rotation(name, n=100, L=2048, D=128, base=1e4, **params):
    """inv_freq as Python floats, and mscale, of a rule for a prompt of n tokens."""
    inv_freq, mscale = FREQUENCIES[name](D, base, n, L, **params)
    return inv_freq.tolist(), mscale


def plain(D=128, base=1e4):
    return [base ** (-2 * p / D) for p in range(D // 2)]


def base_of(inv_freq):
    """The base of geometric frequencies for D = 128: pair 1 turns by base^(-1/64)."""
    return inv_freq[1] ** -64


# ---------------------------------------------------------------------------------------------------------------------
# frequency rules, one by one

def test_rope():
    """base^(-2p/D), in float64."""
    assert rotation("rope", D=8) == (pytest.approx(PLAIN_8, rel=1e-12), 1)
    assert rotation("rope", base=5e5)[0] == pytest.approx(plain(base=5e5), rel=1e-12)
    assert FREQUENCIES["rope"](8, 1e4, 1, 2)[0].dtype == torch.float64


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


@pytest.mark.parametrize("factor", [2.0, 3.5])
def test_pi_divides_all_frequencies(factor):
    """Half the speed is half of every distance: the last of 12 tokens sees 5.5 5 4.5 ... 0.5 0 at factor 2."""
    assert rotation("pi", D=8, factor=factor) == (pytest.approx([x / factor for x in PLAIN_8], rel=1e-12), 1)


def test_ntk_keeps_the_first_pair_and_divides_the_last():
    """D = 8, factor 2: 1, .1, .01, .001 over 2^0, 2^(1/3), 2^(2/3), 2^1."""
    want = [x / 2 ** (p / 3) for p, x in enumerate(PLAIN_8)]
    assert rotation("ntk", D=8, factor=2.0) == (pytest.approx(want, rel=1e-12), 1)


@pytest.mark.parametrize("factor, base", [(2, 20221), (4, 40890), (8, 82685)])
def test_ntk_bases_of_llama_2(factor, base):
    """The base that a factor amounts to, 10^4 factor^(128/126)."""
    assert base_of(rotation("ntk", L=4096, factor=float(factor))[0]) == pytest.approx(base, rel=1e-4)


@pytest.mark.parametrize("factor, n, base", [(1, 8192, 20221), (1, 16384, 40890), (2, 8192, 30528), (2, 16384, 72196),
                                             (4, 32768, 305922), (4, 4096, 1e4), (2, 17, 1e4)])
def test_dynamic_ntk_bases_of_llama_2(factor, n, base):
    """10^4 (f n/L - (f - 1))^(128/126) for n > L = 4096, the plain base up to L."""
    assert base_of(rotation("dynamic-ntk", n=n, L=4096, factor=float(factor))[0]) == pytest.approx(base, rel=1e-4)


@pytest.mark.parametrize("n, factor", [(1, 1), (2048, 1), (2049, 2), (4096, 2), (4097, 4), (20000, 16)])
def test_default_factor_is_the_power_of_two_that_the_prompt_needs(n, factor):
    """As models are tuned for 1, 2, 4, ... times their length."""
    assert power_of_two(None, n, 2048) == factor
    assert power_of_two(3.0, n, 2048) == 3
    for name in ("pi", "ntk", "ntk-mixed", "yarn"):
        assert rotation(name, n=n) == rotation(name, n=n, factor=float(factor))
    assert rotation("dynamic-ntk", n=n) == rotation("dynamic-ntk", n=n, factor=1.0)


@pytest.mark.parametrize("D, factor, b", [(128, 12.0, 0.75), (128, 4.0, None), (16, 8.0, 0.5), (8, 2.0, 1.0)])
def test_ntk_mixed(D, factor, b):
    """theta_p exp(-a (p+1)^b), a = ln k/(D/2)^b, b = 0.75: pair 0 slows down a little, the last by the whole factor."""
    got, mscale = rotation("ntk-mixed", n=8192, D=D, factor=factor, **({} if b is None else {"b": b}))
    b = b or 0.75
    a = math.log(factor) / (D / 2) ** b
    assert got == pytest.approx([x * math.exp(-a * (p + 1) ** b) for p, x in enumerate(plain(D))], rel=1e-12)
    assert got[-1] == pytest.approx(plain(D)[-1] / factor, rel=1e-12) and mscale == 1


@pytest.mark.parametrize("L, base, low, high", [(4096, 1e4, 20, 46), (2048, 1e4, 16, 41)])
def test_yarn_ramp(L, base, low, high):
    """The ramp of the released code, linear in the pair's index from `low` to `high`; the ends are kept or divided."""
    got, _ = rotation("yarn", L=L, base=base, factor=8.0)
    kept = [1 - min(max((p - low) / (high - low), 0), 1) for p in range(64)]
    assert got == pytest.approx([x * (k + (1 - k) / 8) for k, x in zip(kept, plain(base=base))], rel=1e-9)
    assert got[0] == 1 and got[-1] == pytest.approx(plain(base=base)[-1] / 8)


@pytest.mark.parametrize("n, L, base", [(3000, 2048, 1e4), (12288, 4096, 5e5), (40001, 2048, 1e4)])
def test_dynamic_yarn_is_yarn_by_the_prompts_length(n, L, base):
    """And plain RoPE up to L."""
    for params in ({}, {"beta_fast": 16.0, "beta_slow": 2.0}):
        got = rotation("dynamic-yarn", n=n, L=L, base=base, **params)
        assert got == rotation("yarn", n=n, L=L, base=base, factor=n / L, **params)
        assert got[1] == pytest.approx(0.1 * math.log(n / L) + 1)
    assert rotation("dynamic-yarn", n=L, L=L, base=base) == (pytest.approx(plain(base=base), rel=1e-12), 1)


@pytest.mark.parametrize("n, name", [(4096, "short_factor"), (4097, "long_factor")])
def test_longrope_divides_every_pair_by_its_own_factor(n, name):
    """Up to L the short factors, beyond it the long ones; logits times 1 + ln(factor)/ln(L)."""
    factors = {"short_factor": [1.0, 2.0, 3.0, 4.0], "long_factor": [1.0, 4.0, 16.0, 64.0]}
    got, mscale = rotation("longrope", n=n, L=4096, D=8, factor=32.0, **factors)
    assert got == pytest.approx([x / f for x, f in zip(PLAIN_8, factors[name])], rel=1e-12)
    assert mscale ** 2 == pytest.approx(1 + math.log(32) / math.log(4096))
    assert rotation("longrope", n=n, L=4096, D=8, **factors)[1] == 1


@pytest.mark.parametrize("L, base, counts", [(8192, 5e5, [29, 6, 29]), (4096, 1e4, [36, 10, 18])])
def test_llama3_bands(L, base, counts):
    """Pairs kept, blended and divided by 8, at the defaults of Llama 3.1."""
    got = torch.tensor(rotation("llama3", L=L, base=base)[0])
    before = torch.tensor(plain(base=base))
    kept, divided = torch.isclose(got, before), torch.isclose(got, before / 8)
    assert [int(kept.sum()), int((~kept & ~divided).sum()), int(divided.sum())] == counts


def test_llama3_blend():
    """Between the bands: t = (L/wavelength - low)/(high - low), theta' = (1 - t) theta/factor + t theta."""
    got, mscale = rotation("llama3", L=8192, base=5e5)
    for before, after in zip(plain(base=5e5), got):
        t = min(max((8192 * before / (2 * math.pi) - 1) / (4 - 1), 0), 1)
        assert after == pytest.approx((1 - t) * before / 8 + t * before, rel=1e-12)
    assert mscale == 1


@pytest.mark.parametrize("name, params", [
    ("dynamic-ntk", {"factor": 2.0}), ("yarn", {"factor": 4.0}), ("llama3", {}),
    ("longrope", {"short_factor": [1.0] * 64, "long_factor": [2.0] * 64, "factor": 8.0})], ids=lambda x: str(x)[:12])
def test_a_config_may_name_the_training_length(name, params):
    """original_max_position_embeddings is L for the rule that has it, whatever L the geometry goes by."""
    assert rotation(name, 5000, 300, original_max_position_embeddings=2048, **params) == rotation(name, 5000, **params)


# ---------------------------------------------------------------------------------------------------------------------
# transformers

def phi(D):
    """Factors in the style of Phi-3: mild for short prompts, growing with the pair for long ones."""
    return {"short_factor": [1 + p / 100 for p in range(D // 2)], "long_factor": [1.1 ** p for p in range(D // 2)]}


# What transformers 5.23.0 computes (in float32) for prompts of 5 L tokens, recorded once by ROPE_INIT_FUNCTIONS: the
# frequencies of the pairs 0, D/8, D/4, D/2 - 1, and mscale. Where transformers is installed it is called again below.
HF_TYPES = {"pi": "linear", "dynamic-ntk": "dynamic", "yarn": "yarn", "llama3": "llama3", "longrope": "longrope"}
BANDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
HF_SETTINGS = [  # rule, L, D, base, parameters, frequencies, mscale
    ("pi", 2048, 128, 1e4, {"factor": 2.0}, [.5, .05, .005, 5.7739097e-05], 1),
    ("pi", 4096, 32, 5e5, {"factor": 32.0}, [.03125, .0011751885, 4.419417e-05, 1.419272e-07], 1),
    ("dynamic-ntk", 2048, 128, 1e4, {"factor": 2.0}, [1, .057233814, .0032757095, 1.2830911e-05], 1),
    ("dynamic-ntk", 4096, 32, 5e5, {"factor": 8.0}, [1, .014802001, .00021909925, 1.3762637e-07], 1),
    ("dynamic-ntk", 8192, 128, 1e4, {"factor": 1.0}, [1, .066448286, .0044153752, 2.3095638e-05], 1),
    ("yarn", 2048, 128, 1e4, {"factor": 16.0}, [1, .1, .004, 7.2173871e-06], 1.27725887222398),
    ("yarn", 4096, 32, 1e4, {"factor": 32.0}, [1, .1, .0058482136, 5.5571231e-06], 1.34657359027997),
    ("yarn", 8192, 128, 5e5, {"factor": 4.0, "attention_factor": 1.25},
     [1, .037606031, .00054072868, 6.1378518e-07], 1.25),
    ("yarn", 4096, 128, 1e4, {"factor": 8.0, "mscale": 0.707, "mscale_all_dim": 1.0},
     [1, .1, .0059615388, 1.4434774e-05], .949560882462165),
    ("yarn", 4096, 128, 1e4, {"factor": 8.0, "mscale": 0.7}, [1, .1, .0059615388, 1.4434774e-05], 1.20794415416798),
    ("yarn", 2048, 128, 1e4, {"factor": 4.0, "truncate": False}, [1, .1, .0050569717, 2.8869548e-05], 1.13862943611199),
    ("yarn", 2048, 32, 1e4, {"factor": 4.0, "truncate": False}, [1, .1, .0050569717, 4.4456985e-05], 1.13862943611199),
    ("yarn", 2048, 128, 5e5, {"factor": 2.0, "beta_fast": 16.0, "beta_slow": 2.0},
     [1, .034187298, .00070710672, 1.2275704e-06], 1.06931471805599),
    ("yarn", 131072, 128, 1e4, {"factor": 2.0}, [1, .1, .01, 7.3906042e-05], 1.06931471805599),
    ("yarn", 128, 64, 1e4, {"factor": 4.0}, [1, .045454547, .0025, 3.3338038e-05], 1.13862943611199),
    ("llama3", 8192, 128, 5e5, {"factor": 8.0, **BANDS}, [1, .037606031, .00052484602, 3.0689259e-07], 1),
    ("llama3", 2048, 128, 1e4, {"factor": 32.0, **BANDS}, [1, .1, .0076087797, 3.6086935e-06], 1),
    ("llama3", 4096, 32, 1e4, {"factor": 4.0, "low_freq_factor": 2.0, "high_freq_factor": 8.0},
     [1, .1, .0081487326, 4.4456985e-05], 1),
    ("longrope", 4096, 64, 1e4, {"factor": 32.0, **phi(64)},
     [1, .046650738, .0021762913, 6.9474718e-06], 1.19023807142381),
    ("longrope", 4096, 64, 1e4, {"factor": 1.0, **phi(64)}, [1, .046650738, .0021762913, 6.9474718e-06], 1),
    ("longrope", 2048, 64, 5e5, {"attention_factor": 1.5, **phi(64)},
     [1, .017543491, .00030777405, 1.5701805e-07], 1.5),
]
HF_IDS = [f"{row[0]}-{number}" for number, row in enumerate(HF_SETTINGS)]


@pytest.mark.parametrize("name, L, D, base, params, theta, mscale", HF_SETTINGS, ids=HF_IDS)
def test_rules_equal_what_transformers_computed(name, L, D, base, params, theta, mscale):
    got, got_mscale = rotation(name, 5 * L, L, D, base, **params)
    assert [got[0], got[D // 8], got[D // 4], got[D // 2 - 1]] == pytest.approx(theta, rel=1e-6)
    assert got_mscale == pytest.approx(mscale, rel=1e-12)


@pytest.mark.parametrize("name, L, D, base, params, theta, mscale", HF_SETTINGS, ids=HF_IDS)
def test_rules_equal_transformers(name, L, D, base, params, theta, mscale):
    """All pairs, by the transformers that is installed."""
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    settings = {"rope_type": HF_TYPES[name], "rope_theta": base, **params}
    if name in ("yarn", "llama3", "longrope"):
        settings["original_max_position_embeddings"] = L
    window = L if name == "dynamic-ntk" else int(L * params.get("factor", 1))
    config = transformers.LlamaConfig(hidden_size=4 * D, num_attention_heads=4, head_dim=D,
                                      max_position_embeddings=window, rope_parameters=settings)
    their_theta, their_mscale = ROPE_INIT_FUNCTIONS[HF_TYPES[name]](config, "cpu", seq_len=5 * L)
    got, got_mscale = rotation(name, 5 * L, L, D, base, **params)
    assert got == pytest.approx(their_theta.tolist(), rel=1e-6)
    assert got_mscale == pytest.approx(their_mscale, rel=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# attention scales

def scale(name, visible, n=130, L=64, D=128, i=None, **params):
    """The factors of a scale for queries that see so many keys; i, their indices, are visible - 1 unless given."""
    visible = torch.as_tensor(visible)
    i = visible - 1 if i is None else torch.as_tensor(i)
    factors = SCALES[name](i, visible, n, L, D, **params)
    assert factors.shape == visible.shape and factors.dtype == torch.float64
    return factors.tolist()


def test_logn_of_twelve_tokens():
    """max(1, ln(visible)/ln(6))."""
    want = [1, 1, 1, 1, 1, 1, 1.086, 1.161, 1.226, 1.285, 1.338, 1.387]
    assert scale("logn", range(1, 13), n=12, L=6) == pytest.approx(want, abs=5e-4)
    assert scale("logn", [3, 36, 216], L=6, power=2.0) == pytest.approx([1, 4, 9])


SHARPNESS = [  # L, n, InfoScale at D = 128, log-n, YaRN's mscale^2 = (0.1 ln(n/L) + 1)^2
    (64, 128, 1.0772, 1.1667, 1.1434), (64, 256, 1.1485, 1.3333, 1.2965), (64, 512, 1.2150, 1.5000, 1.4591),
    (64, 1024, 1.2773, 1.6667, 1.6314), (64, 2048, 1.3361, 1.8333, 1.8133), (64, 4096, 1.3918, 2.0000, 2.0047),
    (2048, 8192, 1.0814, 1.1818, 1.2965), (2048, 16384, 1.1192, 1.2727, 1.4591),
    (4096, 8192, 1.0381, 1.0833, 1.1434), (4096, 16384, 1.0744, 1.1667, 1.2965), (4096, 32768, 1.1092, 1.2500, 1.4591),
]


@pytest.mark.parametrize("L, n, info, log, yarn", SHARPNESS)
def test_three_ways_to_sharpen(L, n, info, log, yarn):
    """All three are 1 for the L keys of training; for n keys InfoScale is the weakest, about the root of log-n."""
    assert scale("infoscale", [L, n], n=n, L=L) == pytest.approx([1, info], abs=5e-5)
    assert scale("infoscale", [1, n], n=n, L=L, per_sequence=True) == pytest.approx([info, info], abs=5e-5)
    assert scale("logn", [L, n], n=n, L=L) == pytest.approx([1, log], abs=5e-5)
    assert rotation("yarn", n, L, factor=n / L)[1] ** 2 == pytest.approx(yarn, abs=5e-5)
    assert 1 < info < math.sqrt(math.log(n) / math.log(L)) < log


def g(x, D=128):
    """InfoScale's cosine of a cap that holds one direction in x."""
    return math.sqrt(1 - x ** (-2 / D))


def test_infoscale_clamps():
    """clamp keeps all within L at 1; without it the first query, alone with itself, has g(1) = 0. Bound 1/g(L)."""
    want = [g(x) / g(64) for x in range(1, 131)]
    free = scale("infoscale", range(1, 131), clamp=False)
    assert free == pytest.approx(want, rel=1e-12, abs=0) and free[0] == 0 and free[63] == 1
    assert scale("infoscale", range(1, 131)) == pytest.approx([max(1, x) for x in want], rel=1e-12)
    assert free == sorted(free) and round(1 / g(64), 2) == 3.99 > free[-1]


def test_infoscale_of_a_sequence_goes_by_the_prompt():
    """g(n)/g(L) for every query, decoded ones as well; a short prompt is clamped unless that is off."""
    assert scale("infoscale", [1, 130, 150], n=130, per_sequence=True) == pytest.approx([g(130) / g(64)] * 3)
    assert scale("infoscale", [1, 20], n=20, per_sequence=True) == [1, 1]
    assert scale("infoscale", [1, 20], n=20, per_sequence=True, clamp=False) == pytest.approx([g(20) / g(64)] * 2)


def test_constant_is_what_the_releases_put_on_cos_and_sin():
    """(0.1 ln 2 + 1)^2 = 1.143434 on all logits."""
    assert scale("constant", [1, 130]) == pytest.approx([(0.1 * math.log(2) + 1) ** 2] * 2, rel=1e-6)
    assert scale("constant", [1, 130], logit_factor=1.5) == [1.5, 1.5]


@pytest.mark.parametrize("name", [name for name in SCALES if name != "none"])
def test_scales_are_functions_of_each_query(name):
    """Queries may come in pieces: no factor depends on the others of the call."""
    visible, i = list(range(1, 131)), list(range(300, 430))
    whole_prompt = scale(name, visible, i=i)
    assert scale(name, visible[:50], i=i[:50]) + scale(name, visible[50:], i=i[50:]) == whole_prompt
    assert all(0 < x < math.inf for x in whole_prompt)


# ---------------------------------------------------------------------------------------------------------------------
# errors name what is wrong

@pytest.mark.parametrize("name, params, wrong", [
    *((name, {"factor": 0}, "factor") for name in ("pi", "ntk", "ntk-mixed", "dynamic-ntk", "yarn", "llama3")),
    ("pi", {"factor": -2.0}, "factor"), ("ntk", {"factor": math.inf}, "factor"), ("pi", {"factor": math.nan}, "factor"),
    ("ntk-mixed", {"b": 0}, "b"), ("yarn", {"beta_fast": -1}, "beta_fast"), ("yarn", {"beta_slow": 0}, "beta_slow"),
    ("dynamic-yarn", {"beta_fast": 0}, "beta_fast"), ("yarn", {"attention_factor": -1.0}, "attention_factor"),
    ("llama3", {"low_freq_factor": -1.0}, "low_freq_factor"), ("llama3", {"high_freq_factor": 0}, "high_freq_factor"),
    ("llama3", {"low_freq_factor": 4.0}, "low_freq_factor 4.0 must be below high_freq_factor 4.0"),
    ("yarn", {"original_max_position_embeddings": 10.5}, "original_max_position_embeddings"),
    ("yarn", {"beta_fast": 1, "beta_slow": 2}, "beta_slow 2"), ("longrope", {"factor": 0, **phi(8)}, "factor"),
    ("yarn", {"factor": 4.0, "mscale": -1.0, "mscale_all_dim": 1.0}, "mscale"),
    ("longrope", {}, "short_factor and long_factor, 4 numbers each"),
    ("longrope", {"short_factor": [1.0] * 3}, "4 numbers each"), ("longrope", {"short_factor": 2.0}, "4 numbers each"),
    ("longrope", {"short_factor": [1.0, 1.0, 0, 1.0]}, "a factor of longrope"),
    ("longrope", {"short_factor": [1.0] * 4, "attention_factor": 0}, "attention_factor"),
], ids=str)
def test_rules_refuse_nonsense(name, params, wrong):
    with pytest.raises(ValueError, match=rf"\b{wrong}\b"):
        rotation(name, n=12, L=16, D=8, **params)


@pytest.mark.parametrize("name", ["ntk", "dynamic-ntk"])
def test_ntk_needs_two_pairs(name):
    with pytest.raises(ValueError, match="at least 4, not 2"):
        rotation(name, n=12, L=8, D=2)


@pytest.mark.parametrize("name, params", [("logn", {"power": 0}), ("constant", {"logit_factor": -1.0})])
def test_scales_refuse_nonsense(name, params):
    with pytest.raises(ValueError, match=next(iter(params))):
        scale(name, [1, 2], **params)


def test_whole_numbers():
    assert whole("x", 3) == 3 and whole("x", None, 7) == 7 and whole("x", 0, 7, least=0) == 0
    for wrong in (0, -1, 1.0, True, "3", 2 ** 40, math.nan):
        with pytest.raises(ValueError, match="x must be a whole number of at least 1"):
            whole("x", wrong)


def test_positive_numbers():
    assert positive("x", 3) == 3 and positive("x", None, 0.5) == 0.5 and positive("x", 1e-9) == 1e-9
    for wrong in (0, -1.0, True, "3", math.inf, math.nan, 1e15):
        with pytest.raises(ValueError, match="x must be a positive number"):
            positive("x", wrong)
