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
        return attend_fused(q, k, v, plan, kept)
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
    return attend_tiled(q, k, v, plan, kept=kept)


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
    key = id(pos), rows.start, rows.stop, str(device)  # the plan holds pos, so its id stays its own
    if key not in plan.tables:
        home = "cpu" if device.type == "mps" else device
        angle = pos[rows].to(home).double()[:, None] * plan.inv_freq.to(home)
        plan.tables[key] = tuple((f(angle) * plan.mscale).float().to(device) for f in (torch.cos, torch.sin))
    return plan.tables[key]


def rotate(x, cos, sin):
    """x (B, H, T, D) with each pair of channels (d, d + D/2) turned by its token's angle; cos, sin (T, D/2) float32.

    Half-split layout, as in Hugging Face checkpoints; an interleaved one would pair (2d, 2d + 1).
    """
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


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
            self.copies.append(copy)
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
    return q if plan.q_scale is None else (q * plan.q_scale.to(q.device, torch.float32)[:, None]).to(q.dtype), k


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
    return Tq in (1, Tk) and not r.start.any() and torch.equal(r.end, torch.arange(Tk - Tq + 1, Tk + 1))


def attend_fused(q, k, v, plan, kept=None):
    """scaled_dot_product_attention for a plan that is_causal."""
    (r,), group = plan.regions, q.shape[1] // k.shape[1]
    q, k = sharpened(q, k, plan)
    q, (_, k) = turned(q, plan, r.q_pos), rotated_keys(k, plan, r, len(r.q_pos) == 1 and kept)
    if q.shape[2] == 1:  # decoding: the query heads of a key head become its rows, so that k is read once
        return F.scaled_dot_product_attention(fold(q, k.shape[1]), k, v).reshape(q.shape)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=group > 1)


# ---------------------------------------------------------------------------------------------------------------------
# tiled: what runs

def attend_tiled(q, k, v, plan, block_q=256, block_k=1024, kept=None):
    """Tile by tile, only tiles that some query sees, parts merged by their log-sum-exp: O(Tq + Tk) memory, never T x T.

    Rows are cut where an interval jumps (the chunk borders of Mesa), so that within a block every region is a rectangle
    that all rows see, and edges no wider than the block, which are masked. block_k bounds a rectangle's width where
    PyTorch has no fused call for it.
    """
    (q, k), out = sharpened(q, k, plan), torch.empty_like(q)
    keys = [rotated_keys(k, plan, r, q.shape[2] == 1 and kept) for r in plan.regions]
    step = k.shape[2] if q.device.type == "cpu" and plan.slopes is None else block_k
    for a, b in row_blocks(plan, block_q):
        parts = []
        for r, (first, turned_k) in zip(plan.regions, keys):
            if r.end[a] <= r.start[a]:  # nothing to see in this region for the whole block
                continue
            rows = fold(turned(q[:, :, a:b], plan, r.q_pos, slice(a, b)), k.shape[1])
            for lo, hi, ragged in pieces(r, a, b, step):
                bias = piece_bias(plan, r, slice(a, b), slice(lo, hi), ragged, q, k.shape[1])
                parts.append(attend_piece(rows, turned_k[:, :, lo - first:hi - first], v[:, :, lo:hi], bias))
        out[:, :, a:b] = merge(parts).view(out[:, :, a:b].shape)
    return out


def rotated_keys(k, plan, r, kept=None):
    """The index of the first key that a region's queries see, and the keys from there to the last one seen, rotated."""
    live = r.end > r.start
    first, stop = int(r.start[live].min()), int(r.end[live].max())
    if kept and plan.inv_freq is not None:
        return first, kept.of(k, plan, r.k_pos)[:, :, first:stop]
    return first, turned(k[:, :, first:stop], plan, r.k_pos, slice(first, stop))


def fold(q, Hkv):
    """(B, H, T, D) -> (B, Hkv, G*T, D): the query heads of a key head as its rows, so that keys are never repeated."""
    B, H, T, D = q.shape
    return q.reshape(B, Hkv, H // Hkv * T, D)


def row_blocks(plan, block):
    """(a, b) ranges of rows, at most block long, within which no start or end moves by more than one key per row."""
    T = len(plan.regions[0].q_pos)
    cuts = set(range(0, T, block)) | {T}
    for r in plan.regions:
        jump = (r.start.diff().abs() > 1) | (r.end.diff().abs() > 1) | ((r.end > r.start).int().diff() != 0)
        cuts.update((jump.nonzero().flatten() + 1).tolist())
    return list(itertools.pairwise(sorted(cuts)))


def pieces(r, a, b, step):
    """Cut the keys that rows a..b see in region r into (lo, hi, ragged): what all rows see, and ragged edges.

    Rows 4 5 6 with a window of 4 see [1,5) [2,6) [3,7): the edge [1,3), the rectangle [3,5), the edge [5,7).
    """
    l0, l1, h0, h1 = (int(x) for x in (r.start[a], r.start[b - 1], r.end[a], r.end[b - 1]))
    if l1 >= h0:
        return [(l0, h1, True)]
    inner = [(lo, min(lo + step, h0), False) for lo in range(l1, h0, step)]
    return [(l0, l1, True)] * (l1 > l0) + inner + [(h0, h1, True)] * (h1 > h0)


def piece_bias(plan, r, rows, keys, ragged, q, Hkv):
    """Added to the folded scores of a piece, (B, Hkv or 1, G*rows, keys) float32 or None: ALiBi, -inf where unseen."""
    bias = alibi_bias(plan, r, rows, keys, q.device)
    if ragged:
        j = torch.arange(keys.start, keys.stop)
        outside = (j < r.start[rows, None]) | (j >= r.end[rows, None])
        bias = torch.zeros(1, 1, 1, device=q.device) if bias is None else bias
        bias = bias.masked_fill(outside.to(q.device), -math.inf)
    if bias is None:
        return None
    bias = fold(bias[None], Hkv) if len(bias) > 1 else bias.repeat(1, q.shape[1] // Hkv, 1)[None]
    return bias.expand(len(q), -1, -1, -1)


def attend_piece(q, k, v, bias):
    """Attention (B, Hkv, G*rows, D) of folded q over one piece, and its log-sum-exp (B, Hkv, G*rows) in float32."""
    return (flash_piece if q.device.type == "cpu" else plain_piece)(q, k, v, bias)


def flash_piece(q, k, v, bias):
    """attend_piece by PyTorch's flash kernel for CPUs; of a row that sees nothing it says log-sum-exp 0."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias)
    return out, lse if bias is None else lse.masked_fill(bias.amax(-1) == -math.inf, NEVER)


def plain_piece(q, k, v, bias):
    """attend_piece in plain PyTorch, for any device."""
    scores = (q.float() @ k.float().transpose(-1, -2)) / math.sqrt(q.shape[-1])
    scores = scores if bias is None else scores + bias
    lse = scores.logsumexp(-1).clamp(min=NEVER)
    return (scores - lse[..., None]).exp().to(v.dtype) @ v, lse


def merge(parts):
    """The attention over disjoint sets of keys from the (output, log-sum-exp) of each set, in float32."""
    out, lse = parts[0]
    for other, its_lse in parts[1:]:
        out = torch.lerp(out.float(), other.float(), torch.sigmoid(its_lse - lse)[..., None])
        lse = torch.logaddexp(lse, its_lse)
    return out
