"""The geometry of every length-extrapolation method: which keys does query i see, and at what distance?

Each is a function of a few lines, and METHODS, at the end, has one row per method. Does not choose frequencies and
attention scales (frequencies.py), make a plan of all three (positions.py), or draw (show.py).

    near, far = rerope(i, j, n=9000, L=2048, window=512)           # two Regions

Letters: i absolute query indices (Tq,), j absolute key indices (Tk,), n prompt length, L training length. What depends
on the length of the input depends on n, which stays fixed while tokens are decoded, so that prefill, prefill in pieces
and decoding are one function of i.
"""
import math
from dataclasses import dataclass, replace

import torch

from frequencies import FREQUENCIES, SCALES, pick, positive, whole
from plan import Region


# ---------------------------------------------------------------------------------------------------------------------
# geometry: (i, j, n, L, *, hyper-parameters) -> regions. Keyword defaults of None are derived from L and n.

def full(i, j, n, L):
    """Every earlier key at its true distance i - j."""
    return [Region(i, j, 0 * i, i + 1)]


def cosscale(i, j, n, L):
    """CosScale: every earlier key at its true distance; logits are Plan.cosine times the cosine of query and key.

    (arXiv 2501.08570.) Needs a model trained so; the factor is its config's cosine_attention, else 32.
    """
    return full(i, j, n, L)


def near_far(i, j, window, far_q, far_k, sinks=None):
    """Keys nearer than window at true distances in one region; those beyond at far_q[i] - far_k[j] in the other, if
    sinks is given only the first `sinks` of them."""
    edge = (i - window + 1).clamp(min=0)  # the first key that is nearer than window
    far_end = edge if sinks is None else edge.clamp(max=sinks)
    return [Region(i, j, edge, i + 1), Region(far_q, far_k, 0 * i, far_end)]


def rerope(i, j, n, L, *, window=None):
    """ReRoPE: distance min(i - j, window), so nothing is ever further away than window (Su, kexue.fm 9708).

    window: L/4, the lower end of the blog's "a quarter to a half of the training length".
    """
    window = scaled("window", window, 512, L)
    return near_far(i, j, window, 0 * i + window, 0 * j)


def leaky_rerope(i, j, n, L, *, window=None, k=None):
    """Leaky ReRoPE: beyond window distances grow k times slower, window + (i - j - window)/k (Su, kexue.fm 9708).

    window: L/4. k: the smallest that keeps the last token of the prompt below L, (n - window)/(L - window), never
    below 1; the choice of Mesa-Extrapolation's comparison (arXiv 2410.15859).
    """
    k = positive("k", k, leaky_k(n, L, window))
    window = scaled("window", window, 512, L)
    return near_far(i, j, window, window + (i.double() - window) / k, j.double() / k)


def leaky_k(n, L, window=None):
    """Leaky ReRoPE's k where it is not given."""
    window = scaled("window", window, 512, L)
    return max(1.0, (n - window) / max(L - window, 1))


def self_extend(i, j, n, L, *, window=None, group=None):
    """Self-Extend: beyond window W, groups of G share a position: i//G + W - W//G - j//G (arXiv 2401.01325).

    window W: L/4. group G: the smallest that keeps the largest distance, about W + (n - W)/G, within two thirds of L,
    the authors' rule of thumb, or within (W + L)/2 for a wide window; 1, which is plain RoPE, while n <= L.
    """
    group = whole("group", group, self_extend_group(n, L, window))
    window = scaled("window", window, 512, L)
    if group == 1:
        return full(i, j, n, L)
    return near_far(i, j, window, i // group + window - window // group, j // group)


def self_extend_group(n, L, window=None):
    """Self-Extend's group where it is not given."""
    window = scaled("window", window, 512, L)
    limit = max(2 * L / 3, (window + L) / 2)
    needed = 1 if n <= L else math.ceil((n - window) / max(limit - window, 1))
    return max(needed, 1)


def dca_fit(fit, L):
    """(chunk, top) of Dual Chunk Attention: the paper's, 3L/4 and L - 1, or as released for a model.

    The releases call top chunk_size, and the difference of the two local_window or local_size: "llama" (3L/4 and L/8,
    for LLaMA, Mistral and Mixtral) and "qwen" (3L/4 and L/16, for Qwen1.5) of HKUNLP/ChunkLlama @ 2add4d7, "qwen-1m"
    (262144 and 8192) of Qwen2.5-1M's config.json, where attn-scale=qwen-1m goes with it.
    """
    if fit is None:
        return scaled("chunk", None, 1536, L), max(L - 1, 1)
    released = {"llama": (3 * L // 4, L // 8), "qwen": (3 * L // 4, L // 16), "qwen-1m": (262144, 8192)}
    chunk_size, local = pick(released, "DCA fit", fit)
    return max(chunk_size - local, 1), max(chunk_size, 1)


def dca(i, j, n, L, *, fit=None, chunk=None, top=None):
    """Dual Chunk Attention: keys stand at j mod chunk, queries where that gives distances of at most top.

    At i mod chunk for their own chunk, min(chunk + i mod chunk, top) for the one before, top for all earlier ones
    (arXiv 2402.17463, section 3). chunk: 3L/4; top: L - 1; or those of a model (fit; see dca_fit).
    chunk 4, top 5: query 10 sees 8 9 10 at 2 1 0, 4..7 at 5 4 3 2 and 0..3 at 5 4 3 2.
    """
    fitted_chunk, fitted_top = dca_fit(fit, L)
    chunk = whole("chunk", chunk, fitted_chunk)
    top = whole("top", top, fitted_top, least=chunk - 1)  # a nearer top would put keys behind the query
    own = i - i % chunk
    previous = (own - chunk).clamp(min=0)
    k_pos = j % chunk
    return [Region(i % chunk, k_pos, own, i + 1),
            Region((chunk + i % chunk).clamp(max=top), k_pos, previous, own),
            Region(0 * i + top, k_pos, 0 * i, previous)]


def string(i, j, n, L, *, shift=None, window=None):
    """STRING: distances from shift S on move closer, to i - j - S + W, well trained (arXiv 2410.18745, section 4).

    For making use of the trained window, n <= L. shift S: L/3. window W: L/32 (128 at L = 4096). The released code also
    multiplies the logits by 1.1434, which the paper does not mention: --attn-scale constant.
    """
    shift = whole("shift", shift, max(L // 3, 1))
    window = scaled("window", window, 64, L)
    return near_far(i, j, shift, i - shift + window, j)


def streaming_llm(i, j, n, L, *, sinks=4, recent=None):
    """StreamingLLM: the first `sinks` keys, the last `recent` and itself, by place in that cache (arXiv 2309.17453).

    A closed form of the rolling cache. recent: L - 1 - sinks, so that no distance reaches L. sinks 2, recent 4: query 9
    sees 0 1 at 6 5 and 5..9 at 4..0.
    """
    sinks = whole("sinks", sinks)
    recent = whole("recent", recent, max(L - 1 - sinks, 1))
    return near_far(i, j, recent + 1, i.clamp(max=sinks + recent), j, sinks)


def lm_infinite(i, j, n, L, *, local=None, sinks=10, cap=None):
    """LM-Infinite: the last `local` keys at their distance, the first `sinks` at cap (arXiv 2308.16137).

    local: L; sinks 10, the released drop-in's; cap: L - 1, the largest trained distance (the release has L).
    """
    local = whole("local", local, L)
    sinks = whole("sinks", sinks)
    cap = whole("cap", cap, max(L - 1, 1))
    if cap < local - 1:
        raise ValueError(f"lm-infinite: cap {cap} is below the largest local distance {local - 1}")
    return near_far(i, j, local, 0 * i + cap, 0 * j, sinks)


def chunked(i, j, n, L, *, chunk=None):
    """Chunked attention: the keys of the query's own chunk at true distances, as in Llama 4's local layers.

    chunk: L; Llama 4 has 8192. chunk 4: query 5 sees 4 5 at 1 0, query 8 itself alone.
    """
    chunk = whole("chunk", chunk, L)
    return [Region(i, j, i - i % chunk, i + 1)]


def sliding(i, j, n, L, *, window=None):
    """Sliding window: the last `window` keys, the query's own among them, at true distances (arXiv 2310.06825).

    As in Mistral and in the local layers of Gemma and Cohere2. window: L. window 4: query 8 sees 5 6 7 8 at 3 2 1 0.
    """
    window = whole("window", window, L)
    return [Region(i, j, (i - window + 1).clamp(min=0), i + 1)]


@dataclass
class LampeFit:
    """LaMPE's mapping length, m(n) = most / (1 + exp(-(a n + b))) from n = `sigmoid_from` on and `short` before."""
    a: float
    b: float
    most: float
    sigmoid_from: int
    short: int
    head: int
    tail: int


LAMPE = {  # the released code's fits (mistral's a and b are llama3's)
    "llama2": LampeFit(8.673006440952035e-05, -0.648012322406978, 2489.1055522414357, 8192, 1536, 512, 200),
    "llama3": LampeFit(1.0493097327094324e-04, -2.466638011138158, 6204.409324666837, 8192, 1536, 512, 200),
    "mistral": LampeFit(1.0493097327094324e-04, -2.466638011138158, 24576.0, 8192, 1536, 2048, 200),
    "llama3.1": LampeFit(4.505261149632588e-05, -2.788576860718702, 82358.52413056031, 0, 0, 8192, 1024),
}
LAMPE_WINDOWS = {4096: "llama2", 8192: "llama3", 32768: "mistral", 131072: "llama3.1"}


def lampe_fit(fit, L):
    """The LampeFit of a name; by default of the model with this window, else llama3's in proportion to L."""
    fit = fit or LAMPE_WINDOWS.get(L)
    if fit:
        return pick(LAMPE, "LaMPE fit", fit)
    like = LAMPE["llama3"]
    return LampeFit(like.a * 8192 / L, like.b, 0.75 * L, like.sigmoid_from * L // 8192, like.short * L // 8192,
                    max(like.head * L // 8192, 1), max(like.tail * L // 8192, 1))


def with_sigmoid(fit, sigmoid):
    """The LampeFit with a sigmoid of its own, [a, b, most] as fit_lampe.py prints it, for prompts of every length;
    unchanged where it is None."""
    if sigmoid is None:
        return fit
    if not isinstance(sigmoid, (list, tuple)) or len(sigmoid) != 3:
        raise ValueError(f"sigmoid must be three numbers, [a,b,most], not {sigmoid!r}")
    a, b, most = sigmoid
    if isinstance(b, bool) or not isinstance(b, (int, float)) or not abs(b) <= 100:
        raise ValueError(f"sigmoid: b must be a number between -100 and 100, not {b!r}")
    return replace(fit, a=positive("sigmoid: a", a), b=b, most=positive("sigmoid: most", most), sigmoid_from=0)


def lampe(i, j, n, L, *, fit=None, mapping=None, head=None, tail=None, sigmoid=None):
    """LaMPE: true distances below head, a middle rescaled to a mapping length m(n), true spacing again at the far end.

    With M(x) = floor(m x/(n - 1)): head i - j; middle M(i) + b1 - M(j); tail (the first keys, seen from the end of the
    prompt) i - b2 - j; b1 and b2 join them (arXiv 2508.02308; the released, separable form, each pair once, M extended
    linearly in decoding; the paper floors the distance instead, which is not separable). mapping m: a sigmoid of n,
    fitted to llama2, llama3, llama3.1 or mistral (fit; see lampe_fit), at most n - 1. head, tail: the fit's.
    sigmoid: [a, b, most] of a fit to the model at hand, see fit_lampe.py.
    Plain RoPE while n < 2 head, or where the tail would reach into the head.
    n=12, m=6, head=3, tail=2: M = 0 0 1 1 2 2 3 3 4 4 5 6, query 11 sees 0..11 at 8 7 6 6 5 5 4 4 3 2 1 0.
    """
    fit = with_sigmoid(lampe_fit(fit, L), sigmoid)
    head = whole("head", head, fit.head)
    tail = whole("tail", tail, fit.tail)
    if n < 2 * head or n < 3:
        return full(i, j, n, L)
    m = fit.short if n < fit.sigmoid_from else int(fit.most / (1 + math.exp(-(fit.a * n + fit.b))))
    m = min(whole("mapping", mapping, max(m, 1)), n - 1)

    def mapped(x):
        return m * x // (n - 1)

    # the tail ends with the plateau of M that it begins on: at the last x with M(x) = M(tail)
    next_step = mapped(min(tail, n - 1)) + 1
    tail_end = min(math.ceil(next_step * (n - 1) / m) - 1, n - 1)
    tail_from = n - tail_end                                   # distances from here on belong to the tail
    if tail_from < head:                                       # no middle is left to compress
        return full(i, j, n, L)
    b1 = head - mapped(head) - 1                               # the middle goes on where the head ends
    b2 = n - 1 - tail_end - mapped(n - 1 - tail_end) - b1      # and the tail where the middle ends

    near = (i - head + 1).clamp(min=0)
    far = (i - tail_from + 1).clamp(min=0)
    return [Region(i, j, near, i + 1),
            Region(mapped(i) + b1, mapped(j), far, near),
            Region(i - b2, j, 0 * i, far)]


def stair_slots(x, boundary, width):
    """Stair PE's positions: exact from boundary on, shared by groups of width tokens before it.

    boundary 9, width 2: tokens 0..11 -> slots 4 5 5 6 6 7 7 8 8 9 10 11 (arXiv 2410.15859, Eq. 3, in the floor
    form that Figure 1 shows: W(d) = d for d < N linear slots, N + floor((d - N)/width) beyond).
    """
    return torch.where(x >= boundary, x, boundary + (x - boundary).div(width, rounding_mode="floor"))


def stair_width(width, boundary, n, decoded, L):
    """The paper's width of 50, or the smallest that keeps all distances below L, `decoded` tokens after the prompt
    included."""
    slots = L - 1 - (n - 1 + decoded - boundary)  # what the linear part leaves over for the stairs
    return whole("width", width, max(50, math.ceil(boundary / max(slots, 1))))


def plain_then_stair(i, j, turn, boundary, width):
    """Plain RoPE for the queries before `turn`, one stair over all keys for those from it on."""
    slot_i = stair_slots(i, boundary, width)
    slot_j = stair_slots(j, boundary, width)
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
    return plain_then_stair(i, j, L if n <= L else 0, boundary, width)


def dynamic_split(n, L, first, last, reserve, margin, remainder, overlap=0):
    """Width of Mesa's middle chunks for a prompt of n tokens (arXiv 2410.15859, Algorithm 2, as in the released code).

    Full chunks of L - first - margin - overlap tokens if less than `remainder` is left over by them, else one more, all
    equal. (overlap is ours, see mesa.)
    With the constants for L = 2048 (100, 512, 50, 100, 200): n = 4096 -> 1767 (two chunks), 8192 -> 1526 (five).
    """
    most = max(L - first - margin - overlap, 1)
    room = max(n + reserve - last - first, 1)
    chunk = most
    if room % most >= remainder:
        chunk = max(room // (room // most + 1), 1)
    while room % chunk >= max(remainder, 1):  # many chunks may leave too many tokens over (the released code asserts)
        chunk -= 1
    return chunk


@dataclass
class MesaFit:
    """Mesa's constants for a model, in tokens: the first chunk, about the last one, and the stair's width."""
    first: int
    last: int
    width: int | None  # None: see stair_width
    reserve: int = 50
    margin: int = 100
    remainder: int = 200


MESA = {  # of the released code (soacker/Mesa-Extrapolation @ d8077eb), which has L = 2048 for all of them
    "open-llama": MesaFit(100, 512, 50),     # open_llama_3b, and whatever has no constants of its own
    "llama2": MesaFit(100, 800, 20),         # LLaMA-2-7B-chat, its window of 4096 notwithstanding
    "vicuna": MesaFit(100, 1024, 200),
}


def mesa_fit(fit, L):
    """The MesaFit of a name; by default that of L = 2048 in proportion to L, its width following the prompt."""
    if fit:
        return pick(MESA, "Mesa fit", fit)
    return MesaFit(scaled("first", None, 100, L), scaled("last", None, 512, L), None,
                   scaled("reserve", None, 50, L, least=0), scaled("margin", None, 100, L, least=0),
                   scaled("remainder", None, 200, L, least=0))


def mesa(i, j, n, L, *, fit=None, first=None, last=None, width=None, chunk=None, linear=None,
         reserve=None, margin=None, remainder=None, overlap=0):
    """Mesa-Extrapolation: chunks that see the first chunk and themselves; the last one sees all, by Stair PE.

    Middle chunks are renumbered as if each came right after the first, so no position there reaches L. The last chunk
    and all decoded tokens are on one stair, its boundary fixed by n at (start of the last chunk) - first + 1. Plain
    RoPE while n <= L, and the stair for what is then decoded beyond L (arXiv 2410.15859, Algorithm 1).
    n=12, L=6, first=2, chunk=4, width=2: chunks [0,2) [2,6) [6,10) [10,12); query 9 sees 0 1 at 5 4 and 6..9 at 3..0,
    query 11 sees 0..11 at 7 6 6 5 5 4 4 3 3 2 1 0.

    At L = 2048, and in proportion elsewhere: first 100 tokens, last about 512, and the released code's reserve 50
    (room kept for decoding), margin 100 and remainder 200. chunk: dynamic_split. width: stair_width for `last` decoded
    tokens. linear: how many tokens at the end of the prompt are exact; overrides the boundary. fit: the constants of a
    model, open-llama, llama2 or vicuna, to be used with L = 2048 as in the release (see MESA).
    overlap, ours and not the paper's: middle chunks also see that many tokens before them, numbered between the first
    chunk and their own, so that what a boundary cuts in two is whole for the later chunk.
    Raises ValueError for n > L where first + overlap + chunk is over L, or overlap is over chunk.
    """
    fit = mesa_fit(fit, L)
    first = whole("first", first, fit.first)
    last = whole("last", last, fit.last)
    width = fit.width if width is None else width
    reserve = whole("reserve", reserve, fit.reserve, least=0)
    margin = whole("margin", margin, fit.margin, least=0)
    remainder = whole("remainder", remainder, fit.remainder, least=0)
    overlap = whole("overlap", overlap, least=0)
    if n > L and chunk is None and first + overlap >= L:
        too_large = f"overlap {overlap} must be below {L - first}" if overlap else f"first {first} must be below {L}"
        raise ValueError(f"mesa: {too_large}, to leave room for a chunk within {L}")
    chunk = whole("chunk", chunk, dynamic_split(n, L, first, last, reserve, margin, remainder, overlap))
    if n > L and (first + overlap + chunk > L or overlap > chunk):
        raise ValueError(f"mesa: first {first} + overlap {overlap} + chunk {chunk} is over {L}, or overlap over chunk")

    if n <= L:  # plain, with a stair ready for what is decoded beyond L
        boundary = L - whole("linear", linear, first - 1 + last)
        return plain_then_stair(i, j, L, boundary, stair_width(width, boundary, L, last, L))

    # the last chunk begins at the first border after which at most `chunk` tokens are left
    last_start = first + chunk * math.ceil((n - first - chunk) / chunk)
    boundary = last_start - first + 1
    if linear is not None:
        boundary = n - whole("linear", linear)
    width = stair_width(width, boundary, n, last, L)
    everything = Region(stair_slots(i, boundary, width), stair_slots(j, boundary, width),
                        0 * i, (i + 1) * (i >= last_start))
    return [*mesa_chunks(i, j, first, chunk, overlap, last_start), everything]


def mesa_chunks(i, j, first, chunk, overlap, last_start):
    """The Regions of all chunks before the last: [0, first), then [first, first + chunk) and so on.

    Tokens of the first two stand at their index, those of later chunks at first + overlap + their place in the chunk.
    """
    in_chunk_i = (i - first) % chunk
    in_chunk_j = (j - first) % chunk
    local_i = torch.where(i < first + chunk, i, first + overlap + in_chunk_i)
    local_j = torch.where(j < first + chunk, j, first + overlap + in_chunk_j)
    before_j = first + overlap + in_chunk_j - chunk                  # a key as the chunk after its own sees it
    own_start = torch.where(i < first, 0, i - in_chunk_i)            # where the chunk of i starts
    middle = (i >= first) & (i < last_start)
    overlap_start = torch.where(middle & (own_start > first), own_start - overlap, own_start)
    own_chunk = Region(local_i, local_j, own_start, torch.where(i < last_start, i + 1, own_start))
    overlapped = Region(local_i, before_j, overlap_start, own_start)
    first_chunk = Region(local_i, local_j, 0 * i, first * middle)
    return [own_chunk, overlapped, first_chunk]


def scaled(name, value, at_2048, L, least=1):
    """value, or the constant published for L = 2048 in proportion to L, as a whole number >= least."""
    return whole(name, value, max(round(at_2048 * L / 2048), least), least)


# ---------------------------------------------------------------------------------------------------------------------
# the table of methods

METHODS = {  # name: (geometry, frequency rule or None: the model's own, attention scale or None)
    **{name: (full, name, None) for name in FREQUENCIES},                     # each rule, over all true distances
    "ntk-mixed":     (full, "ntk-mixed", "logn"),
    **{name: (full, None, name) for name in SCALES if name != "none"},        # each scale, over all true distances
    "cosscale":      (cosscale, None, None),
    "rerope":        (rerope, None, "logn"),
    "leaky-rerope":  (leaky_rerope, None, "logn"),
    "self-extend":   (self_extend, None, None),
    "dca":           (dca, None, None),
    "string":        (string, None, None),
    "streaming-llm": (streaming_llm, None, None),
    "lm-infinite":   (lm_infinite, None, None),
    "chunked":       (chunked, None, None),
    "sliding":       (sliding, None, None),
    "lampe":         (lampe, None, "constant"),
    "stair":         (stair, None, "logn"),
    "mesa":          (mesa, None, "logn"),
}
