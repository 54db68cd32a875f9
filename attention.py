"""Attention over a Plan: read attend_dense first, it is the definition; attend_tiled is what runs.

Does: rotate un-rotated queries and keys by each region's positions, score, one softmax over all regions.
Does not: choose positions (positions.py makes the Plan), project, or cache. Inference only, except attend_dense and
the fused case, which autograd can differentiate.

    out = attend(q, k, v, plan)          # q (B, H, Tq, D); k, v (B, Hkv, Tk, D), none of them rotated

Letters: B batch, H query heads, Hkv key heads, G = H/Hkv query heads that share a key head, Tq queries, Tk keys,
D head width. Query head h belongs to key head h // G, so q.view(B, Hkv, G, Tq, D) groups them without a copy of k.
"""
import importlib.util
import itertools
import math

import torch
import torch.nn.functional as F

IMPLEMENTATIONS = ("auto", "dense", "tiled", "triton")
SHARE, BLOCK = 2 ** 22, 2 ** 18  # numbers that a CPU works on at a time: some heads, some rows
NEVER = -1e30  # the log of a weight that is zero; finite, so that merging two empty parts gives no nan


def attend(q, k, v, plan, impl="auto", kept=None):
    """Softmax attention (B, H, Tq, D) of q (B, H, Tq, D) over k, v (B, Hkv, Tk, D), by a plan made for Tq and Tk.

    impl: "dense", "tiled", "triton", or "auto": PyTorch's fused attention where the plan is plainly causal, else triton
    on CUDA and tiled elsewhere, or dense where a gradient is wanted.
    kept: a TurnedKeys that has seen these keys before, to decode without rotating all of them again.
    Raises ValueError where the shapes do not fit together, or Triton is asked for and cannot run.
    """
    check_shapes(q, k, v, plan)
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"unknown attention implementation {impl!r}; there are {', '.join(IMPLEMENTATIONS)}")
    if impl == "auto" and is_causal(plan):
        return by_heads(attend_fused, q, k, v, plan, kept)
    wants_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if impl in ("tiled", "triton") and wants_gradient:
        raise ValueError(f"impl={impl} has no gradient: use dense or auto")
    if impl == "dense" or impl == "auto" and wants_gradient:
        return attend_dense(q, k, v, plan)
    if impl == "triton" or impl == "auto" and q.is_cuda:
        missing = triton_missing(q)
        if missing is None:
            from kernels import attend_triton  # here, so that other machines need no Triton
            return attend_triton(q, k, v, plan)
        if impl == "triton":
            raise ValueError(f"impl=triton: this machine lacks {missing}")
    return by_heads(attend_tiled, q, k, v, plan, kept)


def by_heads(f, q, k, v, plan, kept):
    """f, attend_fused or attend_tiled, on a CPU of as many key heads at a time as have at most SHARE numbers in their
    queries: rotated copies and sums stay small, however long the prompt. Not with ALiBi, whose slopes are per head."""
    H, Hkv = q.shape[1], k.shape[1]
    group, per = H // Hkv, max(1, SHARE * Hkv // q.numel())
    if per >= Hkv or q.device.type != "cpu" or plan.slopes is not None or torch.is_grad_enabled():
        return f(q, k, v, plan, kept=kept)
    out = torch.empty_like(q)
    for h in range(0, Hkv, per):
        heads = slice(h * group, (h + per) * group)
        out[:, heads] = f(q[:, heads], k[:, h:h + per], v[:, h:h + per], plan)
    return out


def triton_missing(q):
    """What keeps the Triton kernels from running on q, in a few words; None where nothing does."""
    if importlib.util.find_spec("triton") is None:
        return "the triton package (pip install triton)"
    import triton
    if not hasattr(triton, "knobs"):
        return "Triton 3.4 or newer"
    return None if q.is_cuda or triton.knobs.runtime.interpret else "a CUDA device"


def check_shapes(q, k, v, plan):
    """ValueError unless the shapes of q, k, v and plan fit together."""
    (B, H, Tq, D), (Bk, Hkv, Tk, Dk) = q.shape, k.shape
    region = plan.regions[0]
    if (B, D) != (Bk, Dk) or k.shape != v.shape or H % Hkv:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together")
    if (Tq, Tk) != (len(region.q_pos), len(region.k_pos)):
        raise ValueError(f"the plan is for {len(region.q_pos)} queries and {len(region.k_pos)} keys, not {Tq} and {Tk}")


# ---------------------------------------------------------------------------------------------------------------------
# rotation

def cos_sin(plan, pos, rows, device):
    """cos and sin (T, D/2) of pos[rows] * inv_freq, made once for all layers: angles in float64, tables in float32.

    (float32 angles are off by 1.5e-3 at position 131,072.) MPS has no float64, so its angles are computed on the CPU.
    """
    def make():
        home = "cpu" if device.type == "mps" else device
        angle = pos[rows].to(home).double()[:, None] * plan.inv_freq.to(home)
        return tuple((f(angle) * plan.mscale).float().to(device) for f in (torch.cos, torch.sin))
    return plan.once((id(pos), rows.start, rows.stop, str(device)), make)


def rotate(x, cos, sin):
    """x (B, H, T, D) with each pair of channels (d, d + D/2) turned by its token's angle; cos, sin (T, D/2) float32.

    Half-split layout, as in Hugging Face checkpoints; an interleaved one would pair (2d, 2d + 1).
    """
    if torch.is_grad_enabled():
        a, b = x.float().chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)
    out = torch.empty_like(x)
    for part, done, c, s in blocks(x, out, cos, sin):
        a, b = part.float().chunk(2, -1)
        low, high = done.chunk(2, -1)
        low.copy_((a * c).addcmul_(b, s, value=-1))
        high.copy_((b * c).addcmul_(a, s))
    return out


def blocks(*tensors):
    """The tensors, (*, T, *) each, together in blocks of some of the T rows: on a CPU of BLOCK numbers of the first, so
    that its cache holds what a block needs in between; else whole."""
    x = tensors[0]
    if x.numel() <= BLOCK or x.device.type != "cpu":
        return [tensors]
    rows = max(1, BLOCK * x.shape[-2] // x.numel())
    return zip(*(t.split(rows, -2) for t in tensors))


def turned(x, plan, pos, rows=slice(None)):
    """x (B, H, T, D), whose tokens are at pos[rows], rotated; or as it is where the plan rotates nothing."""
    if plan.inv_freq is None:
        return x
    return rotate(x, *cos_sin(plan, pos, rows, x.device))


class TurnedKeys:
    """The keys of one layer as decoding needs them: rotated for every set of positions in use, a token at a time.

    Which positions those are is up to the plans: a copy serves a plan as long as the positions of the keys it holds
    have not changed; a plan that moves them gets a new one. Self-Extend decodes with two copies, at j and j // group.
    """

    def __init__(self):
        self.copies = []  # [positions held, (inv_freq, mscale, cosine), keys (B, Hkv, room, D)]

    def of(self, k, plan, pos):
        """k (B, Hkv, Tk, D) rotated to pos (Tk,), of which only what is new is computed."""
        copy = next((c for c in self.copies if self.serves(c, plan, pos)), None)
        if copy is None:
            copy = [pos[:0], (plan.inv_freq, plan.mscale, plan.cosine), k[:, :, :0]]
            self.copies = [*self.copies[-3:], copy]  # of old plans none is kept for ever
        old, new = len(copy[0]), len(pos)
        if copy[2].shape[2] < new:
            grown = k.new_empty(*k.shape[:2], new + new // 2, k.shape[3])
            grown[:, :, :old] = copy[2][:, :, :old]
            copy[2] = grown
        copy[2][:, :, old:new] = turned(k[:, :, old:], plan, pos, slice(old, new))
        copy[0] = pos
        return copy[2][:, :, :new]

    @staticmethod
    def serves(copy, plan, pos):
        held, (inv_freq, *rest), _ = copy
        return (rest == [plan.mscale, plan.cosine] and torch.equal(inv_freq, plan.inv_freq)
                and len(held) <= len(pos) and torch.equal(held, pos[:len(held)]))

    def cut(self, length):
        """Forget all but the first `length` keys."""
        for copy in self.copies:
            copy[0] = copy[0][:length]


def sharpened(q, k, plan):
    """q and k with the attention scale of each query multiplied in; with Plan.cosine such that q.k/sqrt(D) is that
    times their cosine (CosScale; rotation changes no length, so it may come after)."""
    if plan.cosine is not None:
        q, k = (F.normalize(x.float(), dim=-1, eps=1e-9).to(x.dtype) for x in (q, k))
        q = q * (plan.cosine * math.sqrt(q.shape[-1]))
    if plan.q_scale is None or plan.once("flat", lambda: bool((plan.q_scale == 1).all())):
        return q, k
    scales = plan.q_scale.to(q.device, torch.float32)[:, None]
    return torch.cat([(part * scale).to(q.dtype) for part, scale in blocks(q, scales)], -2), k


def alibi_bias(plan, region, rows, keys, device):
    """-slope * distance * attention scale, (H, rows, keys) float32 for slices of rows and keys; None without ALiBi."""
    if plan.slopes is None:
        return None
    away = (region.q_pos[rows, None] - region.k_pos[keys]).double()
    if plan.q_scale is not None:
        away = away * plan.q_scale[rows, None]
    return (-plan.slopes[:, None, None] * away).float().to(device)


# ---------------------------------------------------------------------------------------------------------------------
# dense: the definition

def attend_dense(q, k, v, plan):
    """The whole (Tq, Tk) score matrix, filled in region by region: to read, to differentiate, and for small inputs."""
    B, H, Tq, D = q.shape
    Hkv, Tk = k.shape[1:3]
    (q, k), j = sharpened(q, k, plan), torch.arange(Tk)
    scores = torch.full((B, H, Tq, Tk), -math.inf, dtype=torch.float32, device=q.device)
    for r in plan.regions:
        rotated = fold(turned(q, plan, r.q_pos), Hkv).float()
        s = (rotated @ turned(k, plan, r.k_pos).float().transpose(-1, -2)).view(B, H, Tq, Tk) / math.sqrt(D)
        bias = alibi_bias(plan, r, slice(None), slice(None), q.device)
        inside = (j >= r.start[:, None]) & (j < r.end[:, None])
        scores = torch.where(inside.to(q.device), s if bias is None else s + bias, scores)
    weights = scores.softmax(-1).view(B, Hkv, -1, Tk)
    return (weights @ v.float()).view(B, H, Tq, D).to(q.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# fused: a plan that is plain causal attention

def is_causal(plan):
    """Whether PyTorch's own causal attention computes this plan: one region, all keys up to the query, no ALiBi.

    Its mask starts at the first key, so the queries must too, or be a single one that sees every key.
    """
    if len(plan.regions) > 1 or plan.slopes is not None:
        return False
    r = plan.regions[0]
    Tq, Tk = len(r.q_pos), len(r.k_pos)
    return plan.once("causal", lambda: Tq in (1, Tk) and not r.start.any() and torch.equal(
        r.end, torch.arange(Tk - Tq + 1, Tk + 1)))


def attend_fused(q, k, v, plan, kept=None):
    """scaled_dot_product_attention for a plan that is_causal."""
    (r,), group = plan.regions, q.shape[1] // k.shape[1]
    q, k = sharpened(q, k, plan)
    q, (_, k) = turned(q, plan, r.q_pos), rotated_keys(k, plan, r, kept)
    if q.shape[2] == 1:  # decoding: the query heads of a key head become its rows, so that k is read once
        return F.scaled_dot_product_attention(fold(q, k.shape[1]), k, v).reshape(q.shape)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=group > 1)


# ---------------------------------------------------------------------------------------------------------------------
# tiled: what runs

def attend_tiled(q, k, v, plan, block_q=256, block_k=1024, kept=None):
    """Region by region, piece by piece, merged by their log-sum-exp: O(Tq + Tk) memory, never T x T.

    The rows of a region are cut into runs, of which each sees a rectangle, a triangle or a sliding window of keys. The
    first two go to PyTorch's fused attention whole, windows in blocks of block_q rows with a mask for the ragged edge.
    Where there is no fused call, ALiBi and other devices, every piece is at most block_q rows by block_k keys.
    """
    q, k = sharpened(q, k, plan)
    out = torch.zeros_like(q, dtype=torch.float32)
    lse = torch.full(q.shape[:3], NEVER, device=q.device)
    fused = has_fused(q, plan)
    for r in plan.regions:
        first, keys = rotated_keys(k, plan, r, kept)
        for a, b in plan.once(("rows", id(r), block_q, fused), lambda r=r: list(row_blocks(r, block_q, fused))):
            rows = turned(q[:, :, a:b], plan, r.q_pos, slice(a, b))
            for lo, hi, kind in pieces(r, a, b, k.shape[2] if fused else block_k, fused):
                bias = piece_bias(plan, r, slice(a, b), slice(lo, hi), kind, q.device)
                part = attend_piece(rows, keys[:, :, lo - first:hi - first], v[:, :, lo:hi], bias, kind == "triangle")
                merge(out[:, :, a:b], lse[:, :, a:b], *part)
    return out.to(q.dtype)


def rotated_keys(k, plan, r, kept=None):
    """The index of the first key that a region's queries see, and the keys from there to the last one seen, rotated."""
    def span():
        live = r.end > r.start
        return int(r.start[live].min()), int(r.end[live].max())
    first, stop = plan.once(("span", id(r)), span)
    if kept and plan.inv_freq is not None:
        return first, kept.of(k, plan, r.k_pos)[:, :, first:stop]
    return first, turned(k[:, :, first:stop], plan, r.k_pos, slice(first, stop))


def has_fused(q, plan):
    """Whether there is a fused call for pieces of any size."""
    return q.device.type == "cpu" and plan.slopes is None


def row_blocks(r, block, fused):
    """(a, b) ranges of the rows that see something in region r, within which start and end each stand still or move by
    one key per row; of at most `block` rows, but whole where start stands still and there is a fused call."""
    T, live = len(r.start), r.end > r.start
    steps = torch.stack((r.start.diff(), r.end.diff()))
    jump = (steps.abs() > 1).any(0) | live.diff()
    turn = (steps.diff() != 0).any(0) & ~jump[:-1]  # a run's own first step may be any
    jump[1:] |= turn
    cuts = [0, *(jump.nonzero().flatten() + 1).tolist(), T]
    for a, b in itertools.pairwise(cuts):
        if live[a]:
            whole = fused and r.start[a] == r.start[b - 1]
            yield from ((c, min(c + block, b)) for c in range(a, b, block)) if not whole else [(a, b)]


def pieces(r, a, b, step, fused):
    """Cut the keys that rows a..b see in region r into (lo, hi, kind): a "rectangle" that all rows see in steps, and
    what is ragged: a "triangle" of b - a keys of which each row sees one more, or an "edge" that needs a mask.

    Rows 4 5 6 with a window of 4 see [1,5) [2,6) [3,7): the edge [1,3), the rectangle [3,4), the triangle [4,7).
    """
    l0, l1, h0, h1 = (int(x) for x in (r.start[a], r.start[b - 1], r.end[a], r.end[b - 1]))
    if l1 >= h0:
        return [(l0, h1, "edge")]
    triangle = fused and h1 - h0 == b - a - 1 > 0
    top = h0 - triangle
    inner = [(lo, min(lo + step, top), "rectangle") for lo in range(l1, top, step)]
    last = [(top, h1, "triangle" if triangle else "edge")] * (h1 > top)
    return [(l0, l1, "edge")] * (l1 > l0) + inner + last


def piece_bias(plan, r, rows, keys, kind, device):
    """Added to the scores of a piece, (1, H or 1, rows, keys) float32 or None: ALiBi, -inf where an edge is unseen."""
    bias = alibi_bias(plan, r, rows, keys, device)
    if kind == "edge":
        start, end = r.start[rows] - keys.start, r.end[rows] - keys.start
        key = keys.stop - keys.start, *(int(x) for x in (start[0], start[-1], end[0], end[-1])), len(start), str(device)

        def make():
            j = torch.arange(keys.stop - keys.start)
            outside = (j < start[:, None]) | (j >= end[:, None])
            return torch.zeros(outside.shape).masked_fill_(outside, -math.inf).to(device)
        mask = plan.once(key, make)  # the blocks of a sliding window have one and the same
        bias = mask[None] if bias is None else bias + mask
    return None if bias is None else bias[None]


def attend_piece(q, k, v, bias, causal):
    """Attention (B, H, rows, D) over one piece, and its log-sum-exp (B, H, rows) in float32."""
    if q.device.type == "cpu":
        return flash_piece(q, k, v, bias, causal)
    return plain_piece(q, k, v, bias)


def flash_piece(q, k, v, bias, causal=False):
    """attend_piece by PyTorch's flash kernel for CPUs; of a row that sees nothing it says log-sum-exp 0."""
    shape = q.shape
    if shape[2] == 1:  # decoding: the query heads of a key head become its rows, so that its keys are read once
        q, bias = fold(q, k.shape[1]), None if bias is None else fold(bias, k.shape[1])
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, is_causal=causal, attn_mask=bias)
    lse = lse if bias is None else lse.masked_fill(bias.amax(-1) == -math.inf, NEVER)
    return out.reshape(shape), lse.reshape(shape[:3])


def plain_piece(q, k, v, bias):
    """attend_piece in plain PyTorch, for any device."""
    scores = (fold(q, k.shape[1]).float() @ k.float().transpose(-1, -2)).view(*q.shape[:3], -1) / math.sqrt(q.shape[-1])
    scores = scores if bias is None else scores + bias
    lse = scores.logsumexp(-1).clamp(min=NEVER)
    weights = (scores - lse[..., None]).exp().to(v.dtype)
    return (fold(weights, k.shape[1]) @ v).view(q.shape), lse


def fold(x, Hkv):
    """(B, H, T, *) -> (B, Hkv, G*T, *): the query heads of a key head as its rows, so that keys are never repeated."""
    return x.reshape(x.shape[0], Hkv, -1, x.shape[-1])


def merge(out, lse, part, its_lse):
    """Add the attention over one more set of keys to out (B, H, T, D) and lse (B, H, T), float32, in place."""
    for old, new, weight in blocks(out, part, torch.sigmoid(its_lse - lse)[..., None]):
        old.lerp_(new.float(), weight)
    lse.copy_(torch.logaddexp(lse, its_lse))
