"""Where every token believes it is: each length-extrapolation method as data.

A method answers three independent questions, and METHODS has one row per method:
    geometry         which keys does query i see, and at what distance?            -> a list of Regions
    frequencies      how fast does each channel pair turn per unit of distance?    -> inv_freq (D/2,), mscale
    attention scale  how sharp is the softmax of query i, given what it sees?      -> q_scale (Tq,)
Does not touch queries, keys or scores: attention.py executes what is described here.

    python positions.py mesa                            # picture of a small example, and its cost
    plan = make_plan("mesa", i, j, n=9000, L=2048, D=128, H=32)

Letters: i absolute query index, j absolute key index, n prompt length, L training length, D head width,
H query heads, Tq = len(i), Tk = len(j). What depends on the length of the input depends on n, which stays
fixed while tokens are decoded, so that prefill, prefill in pieces and decoding are one function of i.
"""
import argparse
import ast
import inspect
import math
import sys
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Region:
    """Query i sees the keys start[i] <= j < end[i], each at the distance q_pos[i] - k_pos[j].

    Over the rows where the interval is not empty neither bound ever decreases; the regions of one query are disjoint.
    Example, ReRoPE with window 3: query 5 sees 3 4 5 at 2 1 0 in its near region (q_pos 5, k_pos 3 4 5) and
    0 1 2 at 3 3 3 in its far region (q_pos 3, k_pos 0 0 0).
    """
    q_pos: Tensor  # (Tq,)
    k_pos: Tensor  # (Tk,)
    start: Tensor  # (Tq,) first key seen
    end: Tensor    # (Tq,) one past the last key seen; end <= start where nothing is seen


@dataclass
class Plan:
    """All that attention has to know about positions, for the queries i and the keys j it was made for."""
    regions: list[Region]
    inv_freq: Tensor | None = None   # (D/2,) float64, radians per unit of distance; None: nothing is rotated
    mscale: float = 1.0              # multiplies cos and sin, hence the logits by its square (YaRN)
    q_scale: Tensor | None = None    # (Tq,) float64 factor on all logits of a query
    slopes: Tensor | None = None     # (H,) ALiBi: slope * distance is subtracted from the logits
    tables: dict = field(default_factory=dict, repr=False, compare=False)  # attention.py keeps cos and sin here


# ---------------------------------------------------------------------------------------------------------------------
# geometry: (i, j, n, L, *, hyper-parameters) -> regions. Keyword defaults of None are derived from L and n.

def full(i, j, n, L):
    """Every earlier key at its true distance i - j."""
    return [Region(i, j, 0 * i, i + 1)]


def near_far(i, j, window, far_q, far_k):
    """True distances i - j < window in one region, far_q[i] - far_k[j] beyond it in the other."""
    edge = (i - window + 1).clamp(min=0)
    return [Region(i, j, edge, i + 1), Region(far_q, far_k, 0 * i, edge)]


def rerope(i, j, n, L, *, window=None):
    """ReRoPE: distance min(i - j, window), so nothing is ever further away than window (Su, kexue.fm 9708).

    window: L/4, the lower end of the blog's "a quarter to a half of the training length".
    """
    window = scaled("window", window, 512, L)
    return near_far(i, j, window, 0 * i + window, 0 * j)


def leaky_rerope(i, j, n, L, *, window=None, k=None):
    """Leaky ReRoPE: beyond window distances grow k times slower, window + (i - j - window)/k (Su, kexue.fm 9708).

    window: L/4. k: the smallest that keeps the last token of the prompt below L, (n - window)/(L - window), never
    below 1; the choice of Mesa-Extrapolation's comparison (arXiv 2410.15859, section 5).
    """
    window = scaled("window", window, 512, L)
    k = positive("k", k, max(1.0, (n - window) / max(L - window, 1)))
    return near_far(i, j, window, window + (i.double() - window) / k, j.double() / k)


def self_extend(i, j, n, L, *, window=None, group=None):
    """Self-Extend: beyond window W, groups of G share a position: i//G + W - W//G - j//G (arXiv 2401.01325, Eq. 4).

    window W: L/4. group G: the smallest that keeps the largest distance, about W + (n - W)/G, within two thirds of L,
    the authors' rule of thumb; 1, which is plain RoPE, while n <= L.
    """
    window = scaled("window", window, 512, L)
    needed = 1 if n <= L else math.ceil((n - window) / max(2 * L / 3 - window, 1))
    group = whole("group", group, max(needed, 1))
    if group == 1:
        return full(i, j, n, L)
    return near_far(i, j, window, i // group + window - window // group, j // group)


def stair_slots(x, boundary, width):
    """Stair PE's positions: exact from boundary on, shared by groups of width tokens before it.

    boundary 9, width 2: tokens 0..11 -> slots 4 5 5 6 6 7 7 8 8 9 10 11 (arXiv 2410.15859, section 4.1, in the floor
    form that Figure 1 shows: W(d) = d for d < N linear slots, N + floor((d - N)/width) beyond).
    """
    return torch.where(x >= boundary, x, boundary + (x - boundary).div(width, rounding_mode="floor"))


def stair_width(width, boundary, n, last, L):
    """The paper's width of 50, or the smallest that keeps all distances below L, `last` decoded tokens included."""
    slots = L - 1 - (n - 1 + last - boundary)  # what the linear part leaves over for the stairs
    return whole("width", width, max(50, math.ceil(boundary / max(slots, 1))))


def plain_then_stair(i, j, turn, slot_i, slot_j):
    """Plain RoPE for the queries before `turn`, one stair over all keys for those from it on."""
    return [Region(i, j, 0 * i, (i + 1) * (i < turn)), Region(slot_i, slot_j, 0 * i, (i + 1) * (i >= turn))]


def stair(i, j, n, L, *, linear=None, width=None):
    """Stair PE alone: one grid for all tokens, exact for the last `linear` ones of the prompt, stairs before them.

    linear: L/4 (the paper's N = 512 at L = 2048); width as in mesa; plain RoPE while n <= L. This is the separable form
    that the authors run: the grid is anchored at a boundary fixed by n, so the last query has exactly Eq. 3's distances
    while an early one has no linear zone of its own and cannot tell near neighbours apart: for study. Mesa reads the
    prompt in chunks for this very reason.
    """
    linear = scaled("linear", linear, 512, L)
    boundary = max(n, L) - linear
    width = stair_width(width, boundary, max(n, L), linear, L)
    slot_i, slot_j = stair_slots(i, boundary, width), stair_slots(j, boundary, width)
    return plain_then_stair(i, j, L if n <= L else 0, slot_i, slot_j)


def dynamic_split(n, L, first, last, reserve, margin, remainder):
    """Width of Mesa's middle chunks for a prompt of n tokens (arXiv 2410.15859, Algorithm 2, as in the released code).

    Full chunks of L - first - margin tokens if less than `remainder` is left over by them, else one more, all equal.
    With the constants for L = 2048 (100, 512, 50, 100, 200): n = 4096 -> 1767 (two chunks), 8192 -> 1526 (five).
    """
    most, room = max(L - first - margin, 1), max(n + reserve - last - first, 1)
    count, rest = divmod(room, most)
    chunk = most if rest < remainder else max(room // (count + 1), 1)
    while room % chunk >= max(remainder, 1):  # many chunks leave many tokens over (the released code stops there)
        chunk -= 1
    return chunk


def mesa(i, j, n, L, *, first=None, last=None, width=None, chunk=None, linear=None,
         reserve=None, margin=None, remainder=None):
    """Mesa-Extrapolation: chunks that see the first chunk and themselves; the last one sees all, by Stair PE.

    Middle chunks are renumbered as if each came right after the first, so that no position there reaches L. The last
    chunk and all decoded tokens are on one stair, its boundary fixed by n at (start of the last chunk) - first + 1.
    Plain RoPE while n <= L, and the stair for what is then decoded beyond L (arXiv 2410.15859, Algorithm 1).
    n=12, L=6, first=2, chunk=4, width=2: chunks [0,2) [2,6) [6,10) [10,12); query 9 sees 0 1 at 5 4 and 6..9 at 3..0,
    query 11 sees 0..11 at 7 6 6 5 5 4 4 3 3 2 1 0.

    At L = 2048, and in proportion elsewhere: first 100 tokens, last about 512, and the released code's reserve 50
    (room kept for decoding), margin 100 and remainder 200. chunk: dynamic_split. width: stair_width.
    linear: how many tokens before the last of the prompt are exact; overrides the boundary.
    Raises ValueError where first + chunk exceeds L.
    """
    first, last = scaled("first", first, 100, L), scaled("last", last, 512, L)
    reserve, margin = scaled("reserve", reserve, 50, L, least=0), scaled("margin", margin, 100, L, least=0)
    remainder = scaled("remainder", remainder, 200, L, least=0)
    chunk = whole("chunk", chunk, dynamic_split(n, L, first, last, reserve, margin, remainder))
    if n > L and first + chunk > L:
        raise ValueError(f"mesa: first + chunk is {first + chunk}, more than the training length {L}")
    begin = first + chunk * max(0, math.ceil((n - first - chunk) / chunk)) if n > L else L  # start of the last chunk
    exact = first + last - 1 if n <= L else n - begin + first - 1
    boundary = max(n, L) - whole("linear", linear, exact)
    width = stair_width(width, boundary, max(n, L), last, L)
    slot_i, slot_j = stair_slots(i, boundary, width), stair_slots(j, boundary, width)
    if n <= L:
        return plain_then_stair(i, j, L, slot_i, slot_j)

    def local(x):  # position of a token right after the first chunk
        return torch.where(x < first, x, first + (x - first) % chunk)
    own = torch.where(i < first, 0, i - (i - first) % chunk)  # where the chunk of i starts
    local_i, local_j, middle = local(i), local(j), (i >= first) & (i < begin)
    return [Region(local_i, local_j, own, torch.where(i < begin, i + 1, own)),
            Region(local_i, local_j, 0 * i, first * middle),
            Region(slot_i, slot_j, 0 * i, (i + 1) * (i >= begin))]


# ---------------------------------------------------------------------------------------------------------------------
# frequencies: (D, base, n, L, *, parameters) -> inv_freq (D/2,) float64 in radians per token, or None; and mscale.
# The names of the parameters are those of rope_scaling in a Hugging Face config.json.

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
    return rope(D, base, n, L)[0] / rung(factor, n, L), 1.0


def ntk(D, base, n, L, *, factor=None):
    """NTK-aware scaling: base * factor^(D/(D-2)); the first pair keeps its speed, the last is divided by factor.

    (bloc97, 2023; arXiv 2309.00071, section 3.1.) factor as for pi.
    """
    return rope(D, base * rung(factor, n, L) ** (D / (D - 2)), n, L)


def dynamic_ntk(D, base, n, L, *, factor=1.0, original_max_position_embeddings=None):
    """Dynamic NTK: NTK-aware scaling by factor*n/L - (factor - 1) for the prompt length n at hand; plain RoPE up to L.

    (emozilla, 2023; arXiv 2309.00071, section 3.3.) n is fixed at prefill: a cache of rotated keys would mix bases.
    """
    L = original_max_position_embeddings or L
    stretch = max(1.0, positive("factor", factor) * n / L - (factor - 1))
    return rope(D, base * stretch ** (D / (D - 2)), n, L)


def yarn(D, base, n, L, *, factor=None, beta_fast=32, beta_slow=1, attention_factor=None, mscale=None,
         mscale_all_dim=None, truncate=True, original_max_position_embeddings=None):
    """YaRN: pairs with over beta_fast turns in L keep their speed, those under beta_slow are divided by factor.

    Between them a ramp, linear in the pair's index as in all published checkpoints (the paper's is linear in the number
    of turns); logits times (0.1 ln factor + 1)^2 (arXiv 2309.00071, Definitions 2 and 3). factor as for pi.
    """
    L = original_max_position_embeddings or L
    factor = rung(factor, n, L)

    def pair(turns):  # the (fractional) channel pair that turns this often in L tokens
        return D * math.log(L / (turns * 2 * math.pi)) / (2 * math.log(base))
    low, high = pair(positive("beta_fast", beta_fast)), pair(positive("beta_slow", beta_slow))
    low, high = (max(math.floor(low), 0), min(math.ceil(high), D - 1)) if truncate else (max(low, 0), min(high, D - 1))
    ramp = ((torch.arange(D // 2, dtype=torch.float64) - low) / (high - low or 0.001)).clamp(0, 1)
    plain = rope(D, base, n, L)[0]

    def sharpen(weight):
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0
    if attention_factor is None:
        attention_factor = sharpen(mscale) / sharpen(mscale_all_dim) if mscale and mscale_all_dim else sharpen(1.0)
    return plain * (1 - ramp) + plain / factor * ramp, positive("attention_factor", attention_factor)


def llama3(D, base, n, L, *, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
           original_max_position_embeddings=None):
    """Llama 3.1: wavelengths above L/low_freq_factor are multiplied by factor, those below L/high_freq_factor kept.

    Between them a blend, linear in L/wavelength. (Llama 3 report, arXiv 2407.21783, and its released code.)
    """
    L = original_max_position_embeddings or L
    low, high = positive("low_freq_factor", low_freq_factor), positive("high_freq_factor", high_freq_factor)
    plain = rope(D, base, n, L)[0]
    keep = ((L * plain / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
    return plain * keep + plain / positive("factor", factor) * (1 - keep), 1.0


def alibi_slopes(H):
    """ALiBi's slopes (H,): 2^(-8h/H), h = 1..H, where H is a power of two; else the gaps are filled from twice as many.

    8 heads: 1/2 1/4 ... 1/256. 12 heads: those, then 2^-0.5 2^-1.5 2^-2.5 2^-3.5 (arXiv 2108.12409, section 3).
    """
    power = 2 ** int(math.log2(H))
    slopes = [2 ** (-8 * h / power) for h in range(1, power + 1)]
    return torch.tensor(slopes + [2 ** (-4 * h / power) for h in range(1, 2 * (H - power), 2)], dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------------------
# attention scale: (seen (Tq,) keys each query sees, L, D, *, parameters) -> (Tq,) factor on its logits

def logn(seen, L, D):
    """log-n scaling: max(1, ln(seen)/ln(L)), against the dilution of the softmax over many keys (Su, kexue.fm 8823)."""
    return (seen.double().log() / math.log(L)).clamp(min=1.0)


# ---------------------------------------------------------------------------------------------------------------------
# the tables, and what makes a Plan of a row

METHODS = {  # name: (geometry, frequencies or None: the model's own, attention scale or None)
    "rope":         (full, rope, None),
    "nope":         (full, nope, None),
    "alibi":        (full, alibi, None),
    "pi":           (full, pi, None),
    "ntk":          (full, ntk, None),
    "dynamic-ntk":  (full, dynamic_ntk, None),
    "yarn":         (full, yarn, None),
    "llama3":       (full, llama3, None),
    "logn":         (full, None, logn),
    "rerope":       (rerope, None, logn),
    "leaky-rerope": (leaky_rerope, None, logn),
    "self-extend":  (self_extend, None, None),
    "stair":        (stair, None, logn),
    "mesa":         (mesa, None, logn),
}
FREQUENCIES = {name: row[1] for name, row in METHODS.items() if row[1]}
SCALES = {"none": None, "logn": logn}


def make_plan(method, i, j, *, n, L, D, H, base=1e4, freq=None, attn_scale=None, **params):
    """The Plan of a method for the queries i (Tq,) and the keys j = 0..Tk-1, both int64, of a prompt of n tokens.

    L training length, D head width, H query heads, base of the rotary frequencies. freq, a name in FREQUENCIES, and
    attn_scale, one in SCALES, replace what the method's row says; params are the keyword parameters of its functions.
    Raises ValueError for an unknown method or parameter, or a value that makes no sense.
    """
    geometry, frequencies, scale = pick(METHODS, "method", method)
    frequencies = pick(FREQUENCIES, "frequency rule", freq) if freq else frequencies or rope
    positive("base", base)
    scale = pick(SCALES, "attention scale", attn_scale) if attn_scale else scale
    check_input(i, j, n=n, L=L, D=D, H=H)
    known = parameters(geometry, frequencies, scale)
    for name in params:
        if name not in known:
            raise ValueError(f"{method}: unknown parameter {name!r}; it has {', '.join(known) or 'none'}")

    def own(function):
        return {name: value for name, value in params.items() if name in parameters(function)}
    regions = [r for r in geometry(i, j, n, L, **own(geometry)) if bool((r.end > r.start).any())]
    inv_freq, mscale = frequencies(D, base, n, L, **own(frequencies))
    plan = Plan(regions, inv_freq, mscale, slopes=alibi_slopes(H) if frequencies is alibi else None)
    if scale:
        plan.q_scale = scale(seen(plan), L, D, **own(scale))
    return plan


def parameters(*functions):
    """The hyper-parameters of these functions and their defaults: their keyword-only arguments."""
    return {p.name: p.default for f in functions if f for p in inspect.signature(f).parameters.values()
            if p.kind is p.KEYWORD_ONLY}


def pick(table, kind, name):
    """table[name], or a ValueError that lists the names."""
    if name not in table:
        raise ValueError(f"unknown {kind} {name!r}; there are {', '.join(table)}")
    return table[name]


def check_input(i, j, **sizes):
    """ValueError unless the sizes are positive integers, L at least 2, D even, and j counts from 0."""
    for name, value in sizes.items():
        whole(name, value, least=2 if name == "L" else 1)
    if sizes["D"] % 2:
        raise ValueError(f"rotary positions need an even head width, not {sizes['D']}")
    if not len(i) or not torch.equal(j, torch.arange(len(j))) or int(i.min()) < 0 or int(i.max()) >= len(j):
        raise ValueError("the keys j must be 0..Tk-1, and the queries i a non-empty selection of them")


def whole(name, value, default=None, least=1):
    """value, or default where it is None, checked to be a whole number >= least."""
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")
    return value


def positive(name, value, default=None):
    """value, or default where it is None, checked to be a positive number."""
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive number, not {value!r}")
    return value


def scaled(name, value, at_2048, L, least=1):
    """value, or the constant published for L = 2048 in proportion to L, as a whole number >= least."""
    return whole(name, value, max(round(at_2048 * L / 2048), least), least)


def rung(factor, n, L):
    """factor, or the smallest power of two with n <= factor * L: 1, 2, 4, ..., as models are tuned for."""
    return positive("factor", factor, max(1.0, 2.0 ** math.ceil(math.log2(n / L))))


# ---------------------------------------------------------------------------------------------------------------------
# looking at a plan

def seen(plan):
    """Number of keys that each query sees, (Tq,) int64. Its sum is the cost of the method in (query, key) pairs."""
    return sum((r.end - r.start).clamp(min=0) for r in plan.regions)


def distance(plan):
    """The (Tq, Tk) float64 matrix of distances, nan where a key is unseen. For tests and pictures: it is T x T.

    Raises ValueError if two regions overlap.
    """
    out = torch.full((len(plan.regions[0].q_pos), len(plan.regions[0].k_pos)), math.nan, dtype=torch.float64)
    j = torch.arange(out.shape[1])
    for r in plan.regions:
        inside = (j >= r.start[:, None]) & (j < r.end[:, None])
        if bool((inside & ~out.isnan()).any()):
            raise ValueError("two regions overlap")
        out = torch.where(inside, (r.q_pos[:, None] - r.k_pos).double(), out)
    return out


def picture(plan):
    """The distance matrix as text, a row per query, a dot for an unseen key."""
    d = distance(plan)
    cells = [["." if math.isnan(x) else f"{x:.3g}" for x in row] for row in d.tolist()]
    width = max(len(cell) for row in cells for cell in row) + 1
    causal = [row[:1 + max(j for j, cell in enumerate(row) if cell != ".")] for row in cells]
    return "\n".join("".join(cell.rjust(width) for cell in row) for row in causal)


def describe(plan, n, L):
    """Lines that say what a plan costs and how far it looks: its regions, largest distance and attended pairs."""
    lines = []
    for number, r in enumerate(plan.regions, 1):
        rows = (r.end > r.start).nonzero().flatten()
        sampled = {*rows[::max(1, len(rows) // 256)].tolist(), int(rows[-1])}
        far = max(float((r.q_pos[t] - r.k_pos[r.start[t]:r.end[t]]).max()) for t in sampled)
        pairs = int((r.end - r.start).clamp(min=0).sum())
        lines.append(f"region {number}: {len(rows)} queries, {pairs} pairs, largest distance {far:.6g}")
    pairs, causal = int(seen(plan).sum()), n * (n + 1) // 2
    lines.append(f"attended pairs: {pairs}, {pairs / causal:.1%} of full causal attention ({causal})")
    return lines


def parse_settings(pairs):
    """["first=16", "k=2.5"] -> {"first": 16, "k": 2.5}, with dashes in names read as underscores."""
    out = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"a setting is name=value, not {pair!r}")
        try:
            value = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError):
            value = text.strip()
        out[name.strip().replace("-", "_")] = value
    return out


def main():
    parser = argparse.ArgumentParser(description="Print the distance matrix of a method, and what it costs.")
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--length", type=int, default=32, help="prompt length n")
    parser.add_argument("--train-len", "--train_len", type=int, default=16, help="training length L")
    parser.add_argument("--set", action="append", default=[], metavar="name=value", help="a parameter of the method")
    args = parser.parse_args()
    settings = parse_settings(args.set)
    if "width" in parameters(METHODS[args.method][0]):
        settings.setdefault("width", 2)  # so that a small example shows stairs
    i = torch.arange(args.length)
    plan = make_plan(args.method, i, i, n=args.length, L=args.train_len, D=64, H=8, **settings)
    print(f"{args.method}: prompt of {args.length} tokens, training length {args.train_len}, {settings or 'defaults'}")
    print(picture(plan))
    print("\n".join(describe(plan, args.length, args.train_len)))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"positions.py: {error}")
