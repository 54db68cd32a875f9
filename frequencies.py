"""RoPE frequencies and attention scales: two of the three parts of a length-extrapolation method.

A frequency rule says how fast each pair of channels turns per token, an attention scale how much sharper the softmax of
a query gets. Both are plain functions of a few numbers, to be copied into any model. Does not choose positions
(geometry.py) and does not rotate anything (rotation.py).

    inv_freq, mscale = yarn(D=128, base=10000.0, n=32768, L=4096, factor=8.0)    # cos(i * inv_freq) * mscale, ...

Letters: D width of a head (of its rotary part), p = 0 .. D/2 - 1 the channel pair, n prompt length, L training length,
i absolute query index, Tq number of queries.
"""
import difflib
import math

import torch

# ---------------------------------------------------------------------------------------------------------------------
# frequency rules: (D, base, n, L, *, parameters) -> inv_freq (D/2,) float64 in radians per token, or None; and mscale,
# a factor on cos and sin. The parameters have the names that rope_scaling gives them in a Hugging Face config.json.


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
    plain, mscale = rope(D, base, n, L)
    return plain / power_of_two(factor, n, L), mscale


def ntk(D, base, n, L, *, factor=None):
    """NTK-aware scaling: base * factor^(D/(D-2)); the first pair keeps its speed, the last is divided by factor.

    (bloc97, 2023; arXiv 2309.00071, section 3.1.) factor as for pi.
    """
    return rope(D, ntk_base(base, power_of_two(factor, n, L), D), n, L)


def dynamic_ntk(D, base, n, L, *, factor=1.0, original_max_position_embeddings=None):
    """Dynamic NTK: NTK-aware scaling by factor*n/L - (factor - 1) for the prompt length n at hand; plain RoPE up to L.

    (emozilla, 2023; arXiv 2309.00071, section 3.3.) n is fixed at prefill, but for FOLLOWING.
    """
    L = whole("original_max_position_embeddings", original_max_position_embeddings, L)
    factor = positive("factor", factor)
    stretch = max(1.0, factor * n / L - (factor - 1))
    return rope(D, ntk_base(base, stretch, D), n, L)


def ntk_base(base, factor, D):
    """The base with which the slowest channel pair turns `factor` times slower and the first as before."""
    if D < 4:
        raise ValueError(f"NTK scaling needs a head width D of at least 4, not {D}")
    return base * factor ** (D / (D - 2))


def ntk_mixed(D, base, n, L, *, factor=None, b=0.75):
    """NTK mixed radix: pair p slowed by exp(a (p+1)^b), a = ln(factor)/(D/2)^b: the last by factor (Su, kexue.fm 9706).

    factor as for pi (the released patch has 12), b 0.75.
    """
    factor = power_of_two(factor, n, L)
    share = torch.arange(1, D // 2 + 1, dtype=torch.float64) / (D // 2)
    plain, mscale = rope(D, base, n, L)
    return plain * torch.exp(-math.log(factor) * share ** positive("b", b)), mscale


def yarn(D, base, n, L, *, factor=None, beta_fast=32, beta_slow=1, attention_factor=None, mscale=None,
         mscale_all_dim=None, truncate=True, original_max_position_embeddings=None):
    """YaRN: pairs with over beta_fast turns in L keep their speed, those under beta_slow are divided by factor.

    Between them a ramp, linear in the pair's index as in all published checkpoints (the paper's is linear in the number
    of turns); logits times (0.1 ln factor + 1)^2 (arXiv 2309.00071, Definitions 2 and 3). factor as for pi.
    """
    L = whole("original_max_position_embeddings", original_max_position_embeddings, L)
    factor = power_of_two(factor, n, L)
    low, high = yarn_band(beta_fast, beta_slow, D, base, L, truncate)
    width = high - low or 0.001
    ramp = ((torch.arange(D // 2, dtype=torch.float64) - low) / width).clamp(0, 1)
    plain, _ = rope(D, base, n, L)
    inv_freq = plain * (1 - ramp) + plain / factor * ramp
    if attention_factor is None:
        attention_factor = yarn_mscale(factor, 1.0)
        if mscale and mscale_all_dim:
            upper = yarn_mscale(factor, positive("mscale", mscale))
            lower = yarn_mscale(factor, positive("mscale_all_dim", mscale_all_dim))
            attention_factor = upper / lower
    return inv_freq, positive("attention_factor", attention_factor)


def yarn_band(beta_fast, beta_slow, D, base, L, truncate=True):
    """The channel pairs low and high between which YaRN's ramp runs, whole numbers if truncate.

    L = 4096, D = 128, base 10^4, 32 and 1 turns: 20 and 46.
    """
    low = pair_with_turns(positive("beta_fast", beta_fast), D, base, L)
    high = pair_with_turns(positive("beta_slow", beta_slow), D, base, L)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    if beta_fast < beta_slow:
        raise ValueError(f"beta_slow {beta_slow} must not be above beta_fast {beta_fast}")
    return max(low, 0), min(high, D - 1)


def pair_with_turns(turns, D, base, L):
    """The (fractional) index of the channel pair that turns this often in L tokens."""
    return D * math.log(L / (turns * 2 * math.pi)) / (2 * math.log(base))


def yarn_mscale(factor, weight):
    """YaRN's factor on cos and sin, 0.1 * weight * ln(factor) + 1; 1 where nothing is stretched."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def dynamic_yarn(D, base, n, L, *, beta_fast=32, beta_slow=1):
    """Dynamic YaRN: YaRN by the factor n/L of the prompt, plain RoPE up to L (arXiv 2309.00071, section 3.3)."""
    return yarn(D, base, n, L, factor=max(1.0, n / L), beta_fast=beta_fast, beta_slow=beta_slow)


def mrrope(D, base, n, L, *, factor=None, beta_fast=32, beta_slow=1):
    """MrRoPE-Pro: YaRN with a progressive ramp, pair low + k of its band divided by factor^(k (k+1)/(m (m+1))).

    m = high - low is the width of the band; pairs before it keep their speed, those behind it are divided by factor;
    logits times (0.1 ln factor + 1)^2 (arXiv 2601.22181; yarn_radix3 of the released code). factor as for pi.
    """
    factor = power_of_two(factor, n, L)
    low, high = yarn_band(beta_fast, beta_slow, D, base, L)
    m = max(high - low, 1)
    k = (torch.arange(D // 2, dtype=torch.float64) - low).clamp(0, m)
    plain, _ = rope(D, base, n, L)
    return plain / factor ** (k * (k + 1) / (m * (m + 1))), yarn_mscale(factor, 1.0)


def longrope(D, base, n, L, *, short_factor=None, long_factor=None, factor=None, attention_factor=None,
             original_max_position_embeddings=None):
    """LongRoPE: every pair divided by a factor of its own, found by search and kept in config.json (arXiv 2402.13753).

    short_factor while n <= L, long_factor beyond; logits times 1 + ln(factor)/ln(L), as in Phi-3.
    Raises ValueError where the factors, D/2 numbers each, are missing.
    """
    L = whole("original_max_position_embeddings", original_max_position_embeddings, L)
    divisors = long_factor if n > L else short_factor
    if not isinstance(divisors, list) or len(divisors) != D // 2:
        raise ValueError(f"longrope needs short_factor and long_factor, {D // 2} numbers each, from config.json")
    divisors = [positive("a factor of longrope", x) for x in divisors]
    plain, mscale = rope(D, base, n, L)
    if factor is not None and positive("factor", factor) > 1:
        mscale = math.sqrt(1 + math.log(factor) / math.log(L))
    return plain / torch.tensor(divisors, dtype=torch.float64), positive("attention_factor", attention_factor, mscale)


def llama3(D, base, n, L, *, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
           original_max_position_embeddings=None):
    """Llama 3.1: wavelengths above L/low_freq_factor are multiplied by factor, those below L/high_freq_factor kept.

    Between them a blend, linear in L/wavelength. (Llama 3 report, arXiv 2407.21783, and its released code.)
    """
    L = whole("original_max_position_embeddings", original_max_position_embeddings, L)
    low = positive("low_freq_factor", low_freq_factor)
    high = positive("high_freq_factor", high_freq_factor)
    if low >= high:
        raise ValueError(f"low_freq_factor {low} must be below high_freq_factor {high}")
    plain, mscale = rope(D, base, n, L)
    turns = L * plain / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return plain * keep + plain / positive("factor", factor) * (1 - keep), mscale


def p_rope(D, base, n, L, *, partial_rotary_factor=0.25, factor=1.0):
    """p-RoPE: only the fastest pairs turn, the slow ones rest and carry meaning alone. Needs a model trained so.

    partial_rotary_factor: the share of the pairs that turn, 0.25 as in Gemma 4's full layers; their frequencies are
    divided by factor (arXiv 2410.06205; rope_type "proportional" in transformers).
    """
    if positive("partial_rotary_factor", partial_rotary_factor) > 1:
        raise ValueError(f"partial_rotary_factor must not be above 1, but is {partial_rotary_factor}")
    inv_freq, mscale = rope(D, base, n, L)
    inv_freq[int(partial_rotary_factor * D // 2):] = 0
    return inv_freq / positive("factor", factor), mscale


def cope_clip(D, base, n, L, *, clip_low_n=None, hard=False):
    """CoPE, clipped RoPE: the slowest pairs times (1 + cos t)/2, t = 0..pi, the last at rest. For models trained so.

    clip_low_n: how many pairs; the release has 20 for D = 128, here in proportion to D. hard: all of them at rest, the
    paper's HardClip (arXiv 2602.05258).
    """
    clipped = min(whole("clip_low_n", clip_low_n, max(round(20 * D / 128), 1)), D // 2)
    t = torch.linspace(0, math.pi, clipped, dtype=torch.float64)
    taper = (1 + t.cos()) / 2
    if hard:
        taper = torch.zeros_like(t)
    inv_freq, mscale = rope(D, base, n, L)
    inv_freq[-clipped:] *= taper
    return inv_freq, mscale


def giraffe(D, base, n, L, *, truncate_pos=None):
    """Giraffe's truncated basis: pairs that turn less than once in L turn once in 16 L, those under 1/8 turn rest.

    truncate_pos: the wavelength to cut at, for L. For models trained so (arXiv 2308.10882, with the constants of the
    released code).
    """
    cutoff = 2 * math.pi / whole("truncate_pos", truncate_pos, L)
    plain, mscale = rope(D, base, n, L)
    inv_freq = plain.clone()
    inv_freq[plain < cutoff] = cutoff / 16
    inv_freq[plain < cutoff / 8] = 0
    return inv_freq, mscale


def abf(D, base, n, L, *, rope_theta=5e5):
    """ABF, adjusted base frequency: a larger base, with which a model is then trained further (arXiv 2309.16039).

    rope_theta: the base in place of the model's, 500,000 for 10,000. EntropyABF is abf:attn-scale=logn.
    """
    return rope(D, positive("rope_theta", rope_theta), n, L)


def resonance(D, base, n, L, *, on="rope"):
    """Resonance RoPE: wavelengths rounded to whole tokens, so that every turn repeats the angles of the first.

    on: the rule whose wavelengths are rounded, with its own defaults; resonance:on=yarn is the paper's Resonance YaRN
    (arXiv 2403.00071). Raises ValueError for a rule that turns nothing.
    """
    rule = pick(FREQUENCIES, "frequency rule", on)
    inv_freq, mscale = rule(D, base, n, L)
    if inv_freq is None:
        raise ValueError(f"resonance: on={on} turns nothing")
    wavelengths = (2 * math.pi / inv_freq).round()  # of pairs at rest infinite, so that they stay at rest
    return 2 * math.pi / wavelengths, mscale


FREQUENCIES = {
    "rope":         rope,
    "nope":         nope,
    "alibi":        alibi,
    "pi":           pi,
    "ntk":          ntk,
    "ntk-mixed":    ntk_mixed,
    "dynamic-ntk":  dynamic_ntk,
    "yarn":         yarn,
    "dynamic-yarn": dynamic_yarn,
    "llama3":       llama3,
    "longrope":     longrope,
    "mrrope":       mrrope,
    "p-rope":       p_rope,
    "cope-clip":    cope_clip,
    "giraffe":      giraffe,
    "abf":          abf,
    "resonance":    resonance,
}
UNROTATED = ("nope", "alibi")  # rules of models whose queries and keys are never rotated
FITTED = ("pi", "ntk", "ntk-mixed", "yarn", "mrrope")    # rules whose factor is, by default, what n needs
FOLLOWING = ("dynamic-ntk", "dynamic-yarn", "longrope")  # that change at L: where decoding crosses it, n follows


def followed_length(rule, n, L, last):
    """The n for a rule of FREQUENCIES, by name, at query `last`: n, the prompt's length, as long as decoding goes on;
    but where a prompt within L is decoded beyond it, what is there by then, so that all keys turn as in a prompt of
    that length. n = 30, L = 32: 30 until query 31, then 33, 34, ... for longrope."""
    crosses = rule in FOLLOWING and n <= L <= last
    return last + 1 if crosses else n


def alibi_slopes(H):
    """ALiBi's slopes (H,): 2^(-8h/H), h = 1..H, where H is a power of two; else the gaps are filled from twice as many.

    8 heads: 1/2 1/4 ... 1/256. 12 heads: those, then 2^-0.5 2^-1.5 2^-2.5 2^-3.5 (arXiv 2108.12409, section 3).
    """
    power = 2 ** int(math.log2(H))
    slopes = [2 ** (-8 * h / power) for h in range(1, power + 1)]
    between = [2 ** (-4 * h / power) for h in range(1, 2 * (H - power), 2)]
    return torch.tensor(slopes + between, dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------------------
# attention scales: (i, visible, n, L, D, *, parameters) -> (Tq,) float64, a factor on all logits of each query.
# i (Tq,) is the query's absolute index, visible (Tq,) the number of keys it sees.

def logn(i, visible, n, L, D, *, power=1.0):
    """log-n scaling: max(1, ln(visible)/ln(L)), against the dilution of the softmax over many keys (Su, kexue.fm 8823).

    power, ours: that factor to a power, for prompts of hundreds of windows, where 1 is not sharp enough.
    """
    return (visible.double().log() / math.log(L)).clamp(min=1.0) ** positive("power", power)


def infoscale(i, visible, n, L, D, *, clamp=True, per_sequence=False):
    """InfoScale: g(visible)/g(L), g(x) = sqrt(1 - x^(-2/D)), meant to keep the softmax's entropy (arXiv 2501.08570).

    clamp: never below 1, so that nothing changes within L. per_sequence: one factor for all queries, g(n)/g(L), as in
    the released encoder; it does not clamp there.
    """
    keys = torch.full_like(visible, n) if per_sequence else visible
    ratio = ((1 - keys.double() ** (-2 / D)) / (1 - L ** (-2 / D))).sqrt()
    return ratio.clamp(min=1.0) if clamp else ratio


def constant(i, visible, n, L, D, *, logit_factor=1.143434):
    """One factor for all: (0.1 ln 2 + 1)^2, whose root the released LaMPE and STRING put on cos and sin."""
    return torch.full(visible.shape, positive("logit_factor", logit_factor), dtype=torch.float64)


def ssmax(i, visible, n, L, D, *, s=None):
    """Scalable-Softmax: s ln(visible), so that attention to a key does not fade with their number (arXiv 2501.19399).

    s: the paper's is learned for every head; by default 1/ln(L), the form without training: log-n without its floor.
    """
    return visible.double().log() * positive("s", s, 1 / math.log(L))


def llama4(i, visible, n, L, D, *, floor_scale=None, beta=0.1):
    """Llama 4: 1 + beta ln(1 + floor((i + 1)/floor_scale)), a step up for every window (released code).

    floor_scale: L; Llama 4 has 8192, and scales its layers without positions alone.
    """
    windows = (i + 1).div(whole("floor_scale", floor_scale, L), rounding_mode="floor")
    return 1 + positive("beta", beta) * (1 + windows).double().log()


def ministral(i, visible, n, L, D, *, beta=0.1, original_max_position_embeddings=None):
    """Ministral 3: 1 + beta ln(1 + floor(i/L)), on all layers, beside YaRN (as in transformers)."""
    L = whole("original_max_position_embeddings", original_max_position_embeddings, L)
    windows = i.div(L, rounding_mode="floor")
    return 1 + positive("beta", beta) * (1 + windows).double().log()


def qwen_1m(i, visible, n, L, D):
    """Qwen2.5-1M: max(1, 0.1 ln(n/L) + 1)^2 by the length of the prompt, for all queries alike (arXiv 2501.15383).

    The release (in vLLM) multiplies the keys by the root of it and the logits by the root again, which is the same.
    """
    root = max(1.0, 0.1 * math.log(n / L) + 1)
    return torch.full(visible.shape, root ** 2, dtype=torch.float64)


SCALES = {
    "none":      None,
    "logn":      logn,
    "infoscale": infoscale,
    "constant":  constant,
    "ssmax":     ssmax,
    "llama4":    llama4,
    "ministral": ministral,
    "qwen-1m":   qwen_1m,
}


# ---------------------------------------------------------------------------------------------------------------------
# checking numbers and names

def whole(name, value, default=None, least=1):
    """value, or default where it is None; ValueError unless it is a whole number >= least."""
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2 ** 40:
        raise ValueError(f"{name} must be a whole number of at least {least} and below 2^40, not {value!r}")
    return value


def positive(name, value, default=None):
    """value, or default where it is None; ValueError unless it is a positive number."""
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e15:
        raise ValueError(f"{name} must be a positive number, not {value!r}")
    return value


def power_of_two(factor, n, L):
    """factor, or the smallest power of two with n <= factor * L: 1, 2, 4, ..., as models are tuned for."""
    return positive("factor", factor, max(1.0, 2.0 ** math.ceil(math.log2(n / L))))


def pick(table, kind, name):
    """table[name], or a ValueError that lists the names and says which one may have been meant."""
    if name not in table:
        raise ValueError(f"unknown {kind} {name!r}{did_you_mean(name, table)} (there are {', '.join(table)})")
    return table[name]


def did_you_mean(name, names):
    """": did you mean mesa?" for "meza"; nothing where no name is close."""
    close = difflib.get_close_matches(str(name), names, n=1)
    return f": did you mean {close[0]}?" if close else ""
