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
LONG = 8192  # rows of one fused call at most
NEVER = -1e30  # the log of a weight that is zero; finite, so that what sees nothing gives no nan


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
    """f, attend_fused or attend_tiled, on a CPU a few key heads at a time: rotated copies and sums stay small, however
    long the prompt. SHARE numbers in their queries, but no fewer heads than threads, which share them out. Not with
    ALiBi, whose slopes are per head."""
    (B, H, Tq, D), Hkv, threads = q.shape, k.shape[1], torch.get_num_threads()
    per = max(SHARE // (B * Tq * D) // threads, 1) * threads  # query heads, and from here on key heads
    per = -(-per * Hkv // H)
    if per >= Hkv or q.device.type != "cpu" or plan.slopes is not None or torch.is_grad_enabled():
        return f(q, k, v, plan, kept=kept)
    out, group = torch.empty_like(q), H // Hkv
    for h in range(0, Hkv, per):
        heads = slice(h * group, (h + per) * group)
        f(q[:, heads], k[:, h:h + per], v[:, h:h + per], plan, out=out[:, heads])
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

def cos_sin(plan, pos, rows, device, scale=None):
    """cos and sin (T, D/2) of pos[rows] * inv_freq, made once for all layers: angles in float64, tables in float32.

    (float32 angles are off by 1.5e-3 at position 131,072.) MPS has no float64, so its angles are computed on the CPU.
    A scale for each of these tokens is multiplied in, and so costs nothing in the layers.
    """
    def make():
        home = "cpu" if device.type == "mps" else device
        theta, at = plan.inv_freq.to(home), pos[rows, None].to(home).double()
        size = torch.full_like(at, plan.mscale) if scale is None else plan.mscale * scale[:, None].to(home)
        tables = torch.empty(2, len(at), len(theta), device=device)
        for cos, sin, positions, sizes in blocks(*tables, at, size):
            angle = positions * theta
            cos.copy_(angle.cos() * sizes)
            sin.copy_(angle.sin() * sizes)
        return tables
    return plan.once((id(pos), scale is None, rows.start, rows.stop, str(device)), make)


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


def still(plan, pos):
    """Whether keys at these positions stay as they are: the plan rotates nothing, or they all stand at 0 (ReRoPE)."""
    return plan.inv_freq is None or plan.once(("still", id(pos)), lambda: plan.mscale == 1 and not pos.any())


def turned(k, plan, pos, rows=slice(None)):
    """k (B, Hkv, T, D), whose tokens are at pos[rows], rotated."""
    return k if still(plan, pos) else rotate(k, *cos_sin(plan, pos, rows, k.device))


def asking(q, plan, r, rows=slice(None)):
    """Queries [rows] of q (B, H, Tq, D) as they look into region r: rotated, and times the attention scale."""
    q, scale = q[:, :, rows], plan.q_scale
    if plan.inv_freq is not None:
        cos, sin = cos_sin(plan, r.q_pos, slice(None), q.device, scale)
        return rotate(q, cos[rows], sin[rows])
    return q if scale is None else (q * scale[rows, None].to(q.device, torch.float32)).to(q.dtype)


def with_room(x, room):
    """A copy of x (B, H, T, D) at the start of a tensor (B, H, room, D), which may be written to in and outside of
    torch.inference_mode alike."""
    with torch.inference_mode(False):
        grown = torch.empty(*x.shape[:2], room, x.shape[3], dtype=x.dtype, device=x.device)
    grown[:, :, :x.shape[2]] = x
    return grown


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
            copy[2] = with_room(copy[2][:, :, :old], new + new // 2)
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


def with_cosine(q, k, plan):
    """q and k as they are; with Plan.cosine such that q.k/sqrt(D) is that times their cosine (CosScale; rotation
    changes no length, so it may come after)."""
    if plan.cosine is None:
        return q, k
    q, k = (F.normalize(x.float(), dim=-1, eps=1e-9).to(x.dtype) for x in (q, k))
    return q * (plan.cosine * math.sqrt(q.shape[-1])), k


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
    (q, k), j = with_cosine(q, k, plan), torch.arange(Tk)
    scores = torch.full((B, H, Tq, Tk), -math.inf, dtype=torch.float32, device=q.device)
    for r in plan.regions:
        rotated = fold(asking(q, plan, r), Hkv).float()
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


def attend_fused(q, k, v, plan, kept=None, out=None):
    """scaled_dot_product_attention for a plan that is_causal; out as in attend_tiled."""
    (r,), group = plan.regions, q.shape[1] // k.shape[1]
    q, k = with_cosine(q, k, plan)
    q, (_, k) = asking(q, plan, r), rotated_keys(k, plan, [r], kept)
    if q.shape[2] == 1:  # decoding: the query heads of a key head become its rows, so that k is read once
        return F.scaled_dot_product_attention(fold(q, k.shape[1]), k, v).reshape(q.shape)
    made = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=group > 1)
    return made if out is None else out.copy_(made)


# ---------------------------------------------------------------------------------------------------------------------
# tiled: what runs

def attend_tiled(q, k, v, plan, block_q=256, block_k=1024, kept=None, out=None):
    """Region by region, piece by piece, merged by their log-sum-exp: O(Tq + Tk) memory, never T x T.

    The rows of a region are cut into runs, of which each sees a rectangle, a triangle or a sliding window of keys. The
    first two go to PyTorch's fused attention LONG rows at a time, windows block_q, with a mask for the ragged edge.
    Where there is no fused call, ALiBi and other devices, every piece is at most block_q rows by block_k keys.
    out: a tensor (B, H, Tq, D) for the result; in float32 it also serves as the running sum.
    """
    q, k = with_cosine(q, k, plan)
    total = out if out is not None and out.dtype == torch.float32 else torch.empty_like(q, dtype=torch.float32)
    total.zero_()
    lse = torch.full(q.shape[:3], NEVER, device=q.device)
    for _, regions in itertools.groupby(plan.regions, lambda r: id(r.k_pos)):
        add_regions(total, lse, q, k, v, plan, list(regions), block_q, block_k, kept)
    return total.to(q.dtype) if out is None else out.copy_(total)


def add_regions(out, lse, q, k, v, plan, regions, block_q, block_k, kept):
    """Merge the attention over what these regions see, of one k_pos, into out (B, H, Tq, D) and lse (B, H, Tq)."""
    fused, (first, keys) = has_fused(q, plan), rotated_keys(k, plan, regions, kept)
    for r in regions:
        for a, b in plan.once(("rows", id(r), block_q, fused), lambda r=r: list(row_blocks(r, block_q, fused))):
            rows = asking(q, plan, r, slice(a, b))
            for lo, hi, kind in pieces(r, a, b, k.shape[2] if fused else block_k, fused):
                bias = piece_bias(plan, r, slice(a, b), slice(lo, hi), kind, q.device)
                merge(out[:, :, a:b], lse[:, :, a:b], *attend_piece(
                    rows, keys[:, :, lo - first:hi - first], v[:, :, lo:hi], bias, kind == "triangle"))


def rotated_keys(k, plan, regions, kept=None):
    """The index of the first key that queries see in these regions, all of one k_pos, and the keys from there to the
    last one seen, rotated."""
    pos = regions[0].k_pos

    def span():
        live = [(r.start[r.end > r.start], r.end[r.end > r.start]) for r in regions]
        return min(int(start.min()) for start, _ in live), max(int(end.max()) for _, end in live)
    first, stop = plan.once(("span", *map(id, regions)), span)
    if kept and not still(plan, pos):
        return first, kept.of(k, plan, pos)[:, :, first:stop]
    return first, turned(k[:, :, first:stop], plan, pos, slice(first, stop))


def has_fused(q, plan):
    """Whether there is a fused call for pieces of any size."""
    return q.device.type == "cpu" and plan.slopes is None


def row_blocks(r, block, fused):
    """(a, b) ranges of the rows that see something in region r, within which start and end each stand still or move by
    one key per row; of at most `block` rows, or LONG where start stands still and there is a fused call."""
    T, live = len(r.start), r.end > r.start
    steps = torch.stack((r.start.diff(), r.end.diff()))
    jump = (steps.abs() > 1).any(0) | live.diff()
    turn = (steps.diff() != 0).any(0) & ~jump[:-1]  # a run's own first step may be any
    jump[1:] |= turn
    cuts = [0, *(jump.nonzero().flatten() + 1).tolist(), T]
    for a, b in itertools.pairwise(cuts):
        if live[a]:
            step = LONG if fused and r.start[a] == r.start[b - 1] else block
            yield from ((c, min(c + step, b)) for c in range(a, b, step))


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
    """Added to the scores of a piece, (1, H or 1, rows, keys) float32 or None: ALiBi, NEVER where an edge is unseen."""
    bias = alibi_bias(plan, r, rows, keys, device)
    if kind == "edge":
        start, end = r.start[rows] - keys.start, r.end[rows] - keys.start
        key = keys.stop - keys.start, *(int(x) for x in (start[0], start[-1], end[0], end[-1])), len(start), str(device)

        def make():
            j = torch.arange(keys.stop - keys.start)
            outside = (j < start[:, None]) | (j >= end[:, None])
            return torch.zeros(outside.shape).masked_fill_(outside, NEVER).to(device)
        mask = plan.once(key, make)  # the blocks of a sliding window have one and the same
        bias = mask[None] if bias is None else bias + mask
    return None if bias is None else bias[None]


def attend_piece(q, k, v, bias, causal):
    """Attention (B, H, rows, D) over one piece, and its log-sum-exp (B, H, rows) in float32."""
    if q.device.type == "cpu":
        return flash_piece(q, k, v, bias, causal)
    return plain_piece(q, k, v, bias)


def flash_piece(q, k, v, bias, causal=False):
    """attend_piece by PyTorch's flash kernel for CPUs."""
    shape = q.shape
    if shape[2] == 1:  # decoding: the query heads of a key head become its rows, so that its keys are read once
        q, bias = fold(q, k.shape[1]), None if bias is None else fold(bias, k.shape[1])
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, is_causal=causal, attn_mask=bias)
    return out.reshape(shape), lse.reshape(shape[:3])


def plain_piece(q, k, v, bias):
    """attend_piece in plain PyTorch, for any device."""
    scores = (fold(q, k.shape[1]).float() @ k.float().transpose(-1, -2)).view(*q.shape[:3], -1) / math.sqrt(q.shape[-1])
    scores = scores if bias is None else scores + bias
    lse = scores.logsumexp(-1)
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
