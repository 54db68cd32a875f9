"""Attention over a Plan: read attend_dense first, it is the definition; attend_tiled is what runs on a CPU, and
attend_row when decoding.

Does: score un-rotated queries against un-rotated keys, each region at its own positions; one softmax over all regions.
Does not: choose positions (positions.py makes the Plan), turn them into angles (rotation.py), project, or cache.
Inference only, except attend_dense and the fused case, which autograd can differentiate.

    out = attend(q, k, v, plan)          # q (B, H, Tq, D); k, v (B, Hkv, Tk, D), none of them rotated

Letters: B batch, H query heads, Hkv key heads, G = H/Hkv query heads that share a key head, Tq queries, Tk keys,
D head width. Query head h belongs to key head h // G, so q.view(B, Hkv, G, Tq, D) groups them without a copy of k.
"""
import importlib.util
import math

import torch
import torch.nn.functional as F

from rotation import rotate_keys, rotate_queries, row_blocks, unit_length
from single_row import flash_attention, matmul_attention
from tiles import NEVER, edge_mask, region_tiles, visible_span

IMPLEMENTATIONS = ("auto", "dense", "tiled", "triton")


def attend(q, k, v, plan, impl="auto", rotated=None, row=None):
    """Softmax attention (B, H, Tq, D) of q (B, H, Tq, D) over k, v (B, Hkv, Tk, D), by a plan made for Tq and Tk.

    impl: "dense", "tiled", "triton", or "auto": PyTorch's fused attention where the plan is plainly causal, else triton
    on CUDA and tiled elsewhere, or dense where a gradient is wanted.
    float64 goes through float32, but with dense; its result is float64 again.
    One query alone goes by attend_row, with auto and tiled alike. It takes rotated, for each of plan.key_positions the
    keys (B, Hkv, Tk, D) rotated to it, where the caller keeps them, and row, a function of single_row.ATTENTIONS.
    Raises ValueError where the shapes do not fit together, or Triton is asked for and cannot run.
    """
    check_shapes(q, k, v, plan)
    impl_asked = impl
    impl = choose(impl, q, k, v, plan)
    if impl == "dense":
        return attend_dense(q, k, v, plan)
    if q.dtype == torch.float64:  # of which the kernels know nothing, or give a wrong answer with a bias
        rotated = rotated and [keys.float() for keys in rotated]
        return attend(q.float(), k.float(), v.float(), plan, impl_asked, rotated, row).double()
    if impl == "triton":
        return attend_triton(q, k, v, plan)
    if impl == "row":
        return attend_row(q, k, v, plan, rotated, row)
    executor = attend_fused if impl == "fused" else attend_tiled
    groups = head_groups(q, k, plan)
    if len(groups) == 1 or torch.is_grad_enabled():
        return executor(q, k, v, plan)
    out = torch.empty_like(q)
    for heads, key_heads in groups:
        executor(q[:, heads], k[:, key_heads], v[:, key_heads], plan, out=out[:, heads])
    return out


def attend_part(q, k, v, plan, impl="auto", rotated=None, row=None):
    """(out (B, H, Tq, D), lse (B, H, Tq)), both float32: attention to these keys alone, and the log-sum-exp of its
    scores, by which it merges with the attention of the same queries to other keys (see merge_parts).

    Arguments and errors as in attend. A query that sees nothing gets zeros, and NEVER or less.
    """
    check_shapes(q, k, v, plan)
    impl = choose(impl, q, k, v, plan)
    if impl == "fused":  # PyTorch's own causal attention keeps its log-sum-exp
        impl = "triton" if q.is_cuda and not triton_missing(q) else "tiled"
    if impl == "dense":
        return dense_part(q, k, v, plan)
    if impl == "triton":
        out, lse = triton_part(q, k, v, plan)
        return out.float(), lse
    if impl == "row":
        out, lse = row_part(q, k, v, plan, rotated, row)
        return out.float(), lse
    out = torch.empty_like(q, dtype=torch.float32)
    lse = out.new_empty(q.shape[:3])
    for heads, key_heads in head_groups(q, k, plan):
        _, lse[:, heads] = tiled_part(q[:, heads], k[:, key_heads], v[:, key_heads], plan, total=out[:, heads])
    return out, lse


def choose(impl, q, k, v, plan):
    """The executor for impl: "dense", "fused", "tiled", "row" or "triton"."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"unknown attention implementation {impl!r}; there are {', '.join(IMPLEMENTATIONS)}")
    wants_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if impl in ("tiled", "triton") and wants_gradient:
        raise ValueError(f"impl={impl} has no gradient: use dense or auto")
    if impl == "triton" and triton_missing(q):
        raise ValueError(f"impl=triton: this machine lacks {triton_missing(q)}")
    if impl in ("dense", "triton"):
        return impl
    if impl == "auto":
        is_causal = is_plainly_causal(plan)
        if wants_gradient:
            return "fused" if is_causal else "dense"
        if q.is_cuda and not is_causal and not triton_missing(q):
            return "triton"
        if is_causal and plan.Tq > 1:
            return "fused"
    return "row" if plan.Tq == 1 else "tiled"


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
    B, H, Tq, D = q.shape
    if (B, D) != (k.shape[0], k.shape[3]) or k.shape != v.shape or H % k.shape[1]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together")
    if (Tq, k.shape[2]) != (plan.Tq, plan.Tk):
        raise ValueError(f"the plan is for {plan.Tq} queries and {plan.Tk} keys, not {Tq} and {k.shape[2]}")


def head_groups(q, k, plan, numbers=2 ** 22):
    """(query heads, key heads) slices that are attended one after another: on a CPU about so many numbers of q each.

    Rotated copies and sums then stay small however long the prompt. Heads come in multiples of the threads, which share
    them out. ALiBi's slopes are per head, so its heads stay together.
    """
    B, H, Tq, D = q.shape
    Hkv = k.shape[1]
    G = H // Hkv
    if q.device.type != "cpu" or plan.slopes is not None:
        return [(slice(0, H), slice(0, Hkv))]
    threads = torch.get_num_threads()
    query_heads = max(numbers // (B * Tq * D) // threads, 1) * threads
    step = math.ceil(query_heads / G)
    return [(slice(h * G, (h + step) * G), slice(h, h + step)) for h in range(0, Hkv, step)]


def alibi_bias(plan, region, rows, keys, device):
    """-slope * distance * attention scale (H, rows, keys) float32, for slices of rows and keys; None without ALiBi."""
    if plan.slopes is None:
        return None
    away = (region.q_pos[rows, None] - region.k_pos[keys]).double()
    if plan.q_scale is not None:
        away = away * plan.q_scale[rows, None]
    return (-plan.slopes[:, None, None] * away).float().to(device)


def fold(x, Hkv):
    """(B, H, T, *) -> (B, Hkv, G*T, *): the query heads of a key head as its rows, so that keys are never repeated."""
    return x.reshape(x.shape[0], Hkv, -1, x.shape[-1])


# ---------------------------------------------------------------------------------------------------------------------
# dense: the definition

def attend_dense(q, k, v, plan, return_weights=False, return_scores=False):
    """The whole (Tq, Tk) score matrix, filled in region by region: to read, to differentiate, and for small inputs.

    return_weights: also return the attention weights (B, H, Tq, Tk), float32. return_scores: return the scores instead,
    float32, -inf where a key is unseen.
    """
    B, H, Tq, D = q.shape
    Hkv, Tk = k.shape[1:3]
    j = torch.arange(Tk)
    scores = torch.full((B, H, Tq, Tk), -math.inf, dtype=torch.float32, device=q.device)  # no key is visible yet
    for number, region in enumerate(plan.regions):
        # 1. turn queries and keys by their positions in this region: their product then depends on the distance
        queries = rotate_queries(q, plan, number).float()
        keys = rotate_keys(k, plan, plan.key_set[number]).float()
        # 2. score every query against every key
        s = (fold(queries, Hkv) @ keys.transpose(-1, -2)).view(B, H, Tq, Tk) / math.sqrt(D)
        bias = alibi_bias(plan, region, slice(None), slice(None), q.device)
        if bias is not None:
            s = s + bias
        # 3. keep the scores of the keys that a query sees in this region
        inside = (j >= region.start[:, None]) & (j < region.end[:, None])  # (Tq, Tk)
        scores = torch.where(inside.to(q.device), s, scores)
    if return_scores:
        return scores
    # 4. one softmax over all regions
    weights = scores.softmax(-1)
    out = (fold(weights, Hkv) @ v.float()).view(B, H, Tq, D).to(q.dtype)
    return (out, weights) if return_weights else out


def dense_part(q, k, v, plan):
    """attend_part by attend_dense."""
    scores = attend_dense(q, k, v, plan, return_scores=True)
    lse = scores.logsumexp(-1).clamp(min=NEVER)
    weights = (scores - lse[..., None]).exp()
    return (fold(weights, k.shape[1]) @ v.float()).view(q.shape), lse


# ---------------------------------------------------------------------------------------------------------------------
# fused: a plan that is plain causal attention

def is_plainly_causal(plan):
    """Whether PyTorch's own causal attention computes this plan: as many queries as keys, one region, no ALiBi."""
    if len(plan.regions) > 1 or plan.slopes is not None or plan.Tq != plan.Tk:
        return False
    region = plan.regions[0]
    return not region.start.any() and torch.equal(region.end, torch.arange(1, plan.Tk + 1))


def attend_fused(q, k, v, plan, out=None):
    """scaled_dot_product_attention for a plan that is_plainly_causal; out as in attend_tiled."""
    queries = rotate_queries(q, plan, 0)
    keys = rotate_keys(k, plan, 0)
    result = F.scaled_dot_product_attention(queries, keys, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return result if out is None else out.copy_(result)


# ---------------------------------------------------------------------------------------------------------------------
# row: one query, as in decoding

def attend_row(q, k, v, plan, rotated=None, row=None):
    """One query, q (B, H, 1, D): attention to the keys of each region, merged by their log-sum-exp. See attend."""
    return row_part(q, k, v, plan, rotated, row)[0].to(q.dtype)


def row_part(q, k, v, plan, rotated=None, row=None):
    """attend_row, and the log-sum-exp (B, H, 1) of its scores; what several regions give together is float32."""
    Hkv = k.shape[1]
    if not has_flash(q):
        row = matmul_attention
    row = row or flash_attention
    outs = []
    lses = []
    for number, region in enumerate(plan.regions):
        first, end = int(region.start[0]), int(region.end[0])
        # 1. the keys that are seen, rotated; the query heads that share a key head are rows that meet it together
        key_set = plan.key_set[number]
        keys = rotated[key_set][:, :, first:end] if rotated else rotate_keys(k[:, :, first:end], plan, key_set, first)
        queries = fold(rotate_queries(q, plan, number), Hkv)  # (B, Hkv, G, D)
        bias = alibi_bias(plan, region, slice(None), slice(first, end), q.device)
        # 2. attention to them alone
        out, lse = row(queries, keys, v[:, :, first:end], None if bias is None else fold(bias[None], Hkv))
        outs.append(out)
        lses.append(lse)
    # 3. the regions' parts, weighted by their sums of exp(score)
    if len(outs) == 1:
        return outs[0].reshape(q.shape), lses[0].reshape(q.shape[:3])
    out, lse = merge_parts(torch.stack(outs), torch.stack(lses))
    return out.reshape(q.shape), lse.reshape(q.shape[:3])


# ---------------------------------------------------------------------------------------------------------------------
# tiled: what runs on a CPU, and wherever there is no Triton

def attend_tiled(q, k, v, plan, block_q=256, block_k=1024, out=None):
    """Region by region, piece by piece, merged by their log-sum-exp: O(Tq + Tk) memory, never T x T.

    Softmax over the union of two sets of keys is a weighted mean of the softmax over each, weights being their sums of
    exp(score); their logarithm, the log-sum-exp, is all that has to be remembered of a set.
    tiles.py cuts a region into pieces for PyTorch's flash attention; where there is none, for ALiBi and on other
    devices, every piece is at most block_q rows by block_k keys.
    out: a tensor (B, H, Tq, D) for the result; in float32 it also serves as the running sum.
    """
    total = out if out is not None and out.dtype == torch.float32 else None
    total, _ = tiled_part(q, k, v, plan, block_q, block_k, total)
    return total.to(q.dtype) if out is None else out.copy_(total)


def tiled_part(q, k, v, plan, block_q=256, block_k=1024, total=None):
    """The running sum (B, H, Tq, D) and the log-sum-exp (B, H, Tq) of attend_tiled, float32; total: a tensor for it."""
    fused = has_flash(q) and plan.slopes is None
    total = torch.empty_like(q, dtype=torch.float32) if total is None else total
    total.zero_()
    lse = torch.full(q.shape[:3], NEVER, device=q.device)
    for key_set in range(len(plan.key_positions)):
        # 1. rotate the keys that some query sees at these positions
        first, stop = visible_span(plan, key_set)
        keys = rotate_keys(k[:, :, first:stop], plan, key_set, first)
        for number in range(len(plan.regions)):
            if plan.key_set[number] != key_set:
                continue
            # 2. rotate the queries of a run of rows, and attend to what they see, piece by piece
            for rows, pieces in region_tiles(plan, number, block_q, plan.Tk if fused else block_k, fused):
                queries = rotate_queries(q, plan, number, rows)
                for lo, hi, kind in pieces:
                    bias = piece_bias(plan, number, rows, slice(lo, hi), kind, q.device)
                    part = attend_piece(queries, keys[:, :, lo - first:hi - first], v[:, :, lo:hi], bias, kind)
                    seeing = slice(rows.start, rows.start + part[0].shape[2])
                    merge(total[:, :, seeing], lse[:, :, seeing], *part)
    return total, lse


def piece_bias(plan, number, rows, keys, kind, device):
    """Added to the scores of a piece, (1, H or 1, rows, keys) float32 or None: ALiBi, NEVER where an edge is unseen."""
    region = plan.regions[number]
    bias = alibi_bias(plan, region, rows, keys, device)
    if kind == "edge":
        mask = edge_mask(plan, region.start[rows] - keys.start, region.end[rows] - keys.start, keys.stop - keys.start)
        mask = mask.to(device)
        bias = mask[None] if bias is None else bias + mask
    return None if bias is None else bias[None]


def has_flash(q):
    """Whether PyTorch has a flash kernel for q's device that also returns the log-sum-exp and takes any mask."""
    return q.device.type == "cpu"


def attend_piece(q, k, v, bias, kind):
    """Attention (B, H, rows, D) over one piece, and its log-sum-exp (B, H, rows) in float32: of all rows, or of all but
    the last, which sees nothing of a "shrinking" piece."""
    if not has_flash(q):
        return plain_piece(q, k, v, bias)
    if kind == "shrinking":  # read backwards, rows and keys alike, it is a growing one
        out, lse = attend_piece(q[:, :, :-1].flip(2), k.flip(2), v.flip(2), bias, "growing")
        return out.flip(2), lse.flip(2)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return flash(q, k, v, is_causal=kind == "growing", attn_mask=bias)


def plain_piece(q, k, v, bias):
    """attend_piece in plain PyTorch, for any device."""
    B, H, Tq, D = q.shape
    Hkv = k.shape[1]
    scores = (fold(q, Hkv).float() @ k.float().transpose(-1, -2)).view(B, H, Tq, -1) / math.sqrt(D)
    if bias is not None:
        scores = scores + bias
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp().to(v.dtype)
    return (fold(weights, Hkv) @ v).view(q.shape), lse


def merge(out, lse, part, part_lse):
    """Add the attention over one more set of keys to out (B, H, T, D) and lse (B, H, T), float32, in place."""
    weights = torch.sigmoid(part_lse - lse)[..., None]  # exp(part_lse) / (exp(lse) + exp(part_lse))
    for part_rows, out_rows, weight in row_blocks(part, out, weights):
        out_rows.lerp_(part_rows.float(), weight)
    lse.copy_(torch.logaddexp(lse, part_lse))


def merge_parts(outs, lses):
    """The attention (*, D) to the union of disjoint sets of keys, and its log-sum-exp (*): outs (parts, *, D) and lses
    (parts, *) of each set. Sets that a query does not see have NEVER; where it sees none, zeros stay zeros."""
    weights = lses.softmax(0)[..., None]
    return (outs * weights).sum(0), lses.logsumexp(0)


# ---------------------------------------------------------------------------------------------------------------------
# triton: what runs on a GPU

def attend_triton(q, k, v, plan):
    """The kernels of kernels.py. In prefill they get rotated queries and keys; in decoding they rotate keys themselves,
    as they read them."""
    return triton_part(q, k, v, plan)[0]


def triton_part(q, k, v, plan):
    """attend_triton, and the log-sum-exp (B, H, Tq) of its scores, float32."""
    import kernels  # here, so that other machines need no Triton
    if plan.Tq == 1:
        if plan.cosine is not None:
            q = unit_length(q) * (plan.cosine * math.sqrt(q.shape[-1]))
            k = unit_length(k)
        return kernels.decode(q, k, v, plan)
    queries = torch.stack([rotate_queries(q, plan, number) for number in range(len(plan.regions))])
    keys = torch.stack([rotate_keys(k, plan, number) for number in range(len(plan.key_positions))])
    return kernels.prefill(queries, keys, v, plan)
