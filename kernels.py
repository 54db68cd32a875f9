"""Attention over a Plan on a GPU: one Triton kernel for prefill, one for decoding, for every method alike.

How it works, for a reader who has never written a kernel. A kernel is one small program that runs many times at once;
here, once for every tile of BM queries of a head. Softmax attention seems to need the whole row of scores before
the first weight is known, and those T x T scores are what does not fit. FLASH ATTENTION (arXiv 2205.14135) walks
over the keys tile by tile and keeps, per query, three running things: the largest score m so far, the sum l of
exp(score - m), and the weighted sum acc of values. When a larger score appears, l and acc are scaled down by
exp(old m - new m). At the end acc / l is exact. The scores of one tile live in registers and are forgotten.

THE INTERVAL IDEA: a method is a few regions (see plan.py), and in each a query sees one interval of keys. So the
walk goes region by region over the keys from the first to the last that some query of the tile sees, with queries and
keys rotated for that region, all into the same m, l, acc. Between those ends lies a span that all queries of the tile
see in full, where no mask is needed; only its two ragged edges compare every key with every query's interval.

Keys are rotated once per region before prefill, a small part of its work; rotating inside the walk would repeat it
for every tile of queries. DECODING is the opposite: one query, bound by reading the cache, so its kernel reads the
un-rotated keys once, rotates them in registers, and shares them out to many programs whose parts merge at the end.

Does: forward, any number of query heads per key head, lengths that fill no tile, widths 16 to 256, fp32, bf16, fp16.
Does not: gradients. A plan is read for its vectors only. attend(q, k, v, plan, impl="triton") comes here, on CUDA by
default.

Letters: B batch, H query heads, Hkv key heads, G = H/Hkv, Tq queries, Tk keys, R regions, D head width.
"""
import math

import torch
import triton
import triton.language as tl

LOG2E = math.log2(math.e)  # the kernels work with powers of two
LN2 = tl.constexpr(math.log(2))
NEVER = tl.constexpr(-1e30)  # the log of a weight that is zero, as in tiles.py
# (bytes per number, head width padded to a power of two) -> queries and keys per tile, warps, pipeline stages
PREFILL = {(2, 64): (128, 64, 8, 3), (2, 128): (128, 64, 8, 3), (2, 256): (64, 32, 4, 2), (4, 128): (64, 32, 4, 2),
           (4, 256): (32, 32, 4, 2)}
SMALL = (64, 64, 4, 2)   # everything else
# the same for decoding: keys per tile, warps, stages; wide tiles are small enough for the shared memory of any card
DECODE = {(2, 256): (32, 4, 2), (4, 128): (32, 4, 2), (4, 256): (32, 4, 1)}
SMALL_DECODE = (64, 4, 2)
SPLITS = 64              # programs that share the keys of a head in decoding, at most


# ---------------------------------------------------------------------------------------------------------------------
# the kernels

@triton.jit
def accumulate(acc, m, l, s, v, PRECISION: tl.constexpr):
    """One step of flash attention: the scores s (rows, BN), in base 2, of BN keys and their values v, into the running
    sums. -inf marks a key that a query does not see."""
    top = tl.maximum(m, tl.max(s, 1))
    safe = tl.where(top == float("-inf"), 0.0, top)  # a query that has seen no key yet
    p = tl.exp2(s - safe[:, None])
    shrink = tl.exp2(m - safe)                       # what was summed before was relative to the old m
    l = l * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, top, l


@triton.jit
def walk(acc, m, l, q, K, V, KPOS, q_pos, tilt, lo, hi, begin, end, stride_k, stride_v, scale,
         EDGE: tl.constexpr, TILT: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr,
         PRECISION: tl.constexpr):
    """Take the keys begin..end, in tiles of BN, into the running (acc, m, l) of a tile of queries."""
    d = tl.arange(0, DP)
    for n0 in range(begin, end, BN):
        n = n0 + tl.arange(0, BN)
        there = n >= 0
        if EDGE:
            there = n < end
        # 1. a tile of keys, transposed, and its scores
        k = tl.load(K + n[None, :] * stride_k + d[:, None], mask=there[None, :] & (d < D)[:, None], other=0.0)
        s = tl.dot(q, k, input_precision=PRECISION) * scale
        if TILT:  # ALiBi: slope * distance off the score
            k_pos = tl.load(KPOS + n, mask=there, other=0.0)
            s -= tilt[:, None] * (q_pos[:, None] - k_pos[None, :])
        # 2. at a ragged edge, each query's own interval lo..hi
        if EDGE:
            s = tl.where((n[None, :] >= lo[:, None]) & (n[None, :] < hi[:, None]), s, float("-inf"))
        # 3. into the running sums
        v = tl.load(V + n[:, None] * stride_v + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0.0)
        acc, m, l = accumulate(acc, m, l, s, v, PRECISION)
    return acc, m, l


@triton.jit
def spans(lo, hi, Tk, BN: tl.constexpr):
    """For intervals lo..hi of a tile of queries: some query sees the keys first..last, all see full0..full1."""
    visible = lo < hi
    first = tl.min(tl.where(visible, lo, Tk), 0) // BN * BN
    last = tl.maximum(tl.max(tl.where(visible, hi, 0), 0), first)
    full0 = tl.minimum(tl.cdiv(tl.max(lo, 0), BN) * BN, last)
    full0 = tl.maximum(full0, first)
    full1 = tl.maximum(tl.min(hi, 0) // BN * BN, full0)
    return first, full0, full1, last


@triton.jit
def prefill_kernel(Q, K, V, OUT, LSE, START, END, QPOS, KPOS, TILTS, KEYSET, R, Tq, Tk, H, G, scale,
                   q_r: tl.int64, q_b: tl.int64, q_h: tl.int64, q_t: tl.int64,
                   k_r: tl.int64, k_b: tl.int64, k_h: tl.int64, k_t: tl.int64,
                   v_b: tl.int64, v_h: tl.int64, v_t: tl.int64, o_b: tl.int64, o_h: tl.int64, o_t: tl.int64,
                   TILT: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                   PRECISION: tl.constexpr):
    """One tile of BM queries of one head: all regions, all keys they see."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest rows first
    b = tl.program_id(1) // H
    h = tl.program_id(1) % H
    i = tile * BM + tl.arange(0, BM)
    row = tl.minimum(i, Tq - 1)  # rows beyond the end repeat the last one and are not stored
    d = tl.arange(0, DP)
    acc = tl.zeros([BM, DP], tl.float32)
    m = tl.full([BM], float("-inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    Vh = V + b * v_b + (h // G) * v_h
    for r in range(R):
        # 1. the interval lo..hi of each query, and what some and all queries of the tile see
        lo = tl.load(START + r * Tq + row)
        hi = tl.load(END + r * Tq + row)
        first, full0, full1, last = spans(lo, hi, Tk, BN)
        # 2. queries as they look into this region, and the keys at its positions
        q = tl.load(Q + r * q_r + b * q_b + h * q_h + row[:, None] * q_t + d[None, :], mask=(d < D)[None, :], other=0.0)
        Kh = K + tl.load(KEYSET + r) * k_r + b * k_b + (h // G) * k_h
        q_pos = tl.zeros([BM], tl.float32)
        tilt = tl.zeros([BM], tl.float32)
        if TILT:
            q_pos = tl.load(QPOS + r * Tq + row)
            tilt = tl.load(TILTS + h * Tq + row)
        # 3. the ragged edge, what all see, the other edge
        acc, m, l = walk(acc, m, l, q, Kh, Vh, KPOS + r * Tk, q_pos, tilt, lo, hi, first, full0, k_t, v_t, scale,
                         True, TILT, D, DP, BN, PRECISION)
        acc, m, l = walk(acc, m, l, q, Kh, Vh, KPOS + r * Tk, q_pos, tilt, lo, hi, full0, full1, k_t, v_t, scale,
                         False, TILT, D, DP, BN, PRECISION)
        acc, m, l = walk(acc, m, l, q, Kh, Vh, KPOS + r * Tk, q_pos, tilt, lo, hi, full1, last, k_t, v_t, scale,
                         True, TILT, D, DP, BN, PRECISION)
    some = l > 0  # of the keys of one process among several a query may see none
    l = tl.where(some, l, 1.0)
    tl.store(OUT + b * o_b + h * o_h + i[:, None] * o_t + d[None, :], (acc / l[:, None]).to(OUT.dtype.element_ty),
             mask=(i < Tq)[:, None] & (d < D)[None, :])
    tl.store(LSE + tl.program_id(1) * Tq + i, tl.where(some, (m + tl.log2(l)) * LN2, NEVER), mask=i < Tq)


@triton.jit
def pair_channels(e, D: tl.constexpr, RD: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The two channels of pair e; pairs beyond the rotary width RD are of channels that do not turn."""
    if INTERLEAVED:
        low = 2 * e
        high = 2 * e + 1
    elif RD == D:
        low = e
        high = e + D // 2
    else:
        low = tl.where(e < RD // 2, e, e + RD // 2)
        high = tl.where(e < RD // 2, e + RD // 2, e + D // 2)
    return low, high


@triton.jit
def turned_scores(qa, qb, Kh, COS, SIN, n, angle, low, high, e, k_t, D: tl.constexpr, PRECISION: tl.constexpr):
    """q.k (GP, BN) of un-rotated keys n, turned back by their distance: row `angle` of the tables, -1 where unseen."""
    E: tl.constexpr = D // 2
    there = (angle >= 0)[:, None] & (e < E)[None, :]
    at = angle[:, None] * E + e[None, :]
    c = tl.load(COS + at, mask=there, other=0.0)
    z = tl.load(SIN + at, mask=there, other=0.0)
    ka = tl.load(Kh + n[:, None] * k_t + low[None, :], mask=there, other=0.0).to(tl.float32)
    kb = tl.load(Kh + n[:, None] * k_t + high[None, :], mask=there, other=0.0).to(tl.float32)
    turned_a = (ka * c + kb * z).to(qa.dtype)
    turned_b = (kb * c - ka * z).to(qa.dtype)
    s = tl.dot(qa, tl.trans(turned_a), input_precision=PRECISION)
    return tl.dot(qb, tl.trans(turned_b), s, input_precision=PRECISION)


@triton.jit
def decode_kernel(Q, K, V, ANGLE, COS, SIN, DISTANCE, TILTS, BLOCKS, OUT, LSE, scale, count, per, Tk, Hkv,
                  k_b: tl.int64, k_h: tl.int64, k_t: tl.int64, v_b: tl.int64, v_h: tl.int64, v_t: tl.int64,
                  TILT: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, RD: tl.constexpr,
                  INTERLEAVED: tl.constexpr, EP: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr,
                  PRECISION: tl.constexpr):
    """One query against its share of the key blocks, for the G query heads of one key head."""
    share = tl.program_id(0)
    bh = tl.program_id(1)
    b = bh // Hkv
    hk = bh % Hkv
    g = tl.arange(0, GP)
    e = tl.arange(0, EP)
    d = tl.arange(0, DP)
    low, high = pair_channels(e, D, RD, INTERLEAVED)
    half = (g < G)[:, None] & (e < D // 2)[None, :]
    qa = tl.load(Q + bh * G * D + g[:, None] * D + low[None, :], mask=half, other=0.0)
    qb = tl.load(Q + bh * G * D + g[:, None] * D + high[None, :], mask=half, other=0.0)
    tilt = tl.load(TILTS + hk * G + g, mask=(g < G) & TILT, other=0.0)
    acc = tl.zeros([GP, DP], tl.float32)
    m = tl.full([GP], float("-inf"), tl.float32)
    l = tl.zeros([GP], tl.float32)
    Kh = K + b * k_b + hk * k_h
    Vh = V + b * v_b + hk * v_h
    for block in range(share * per, tl.minimum(share * per + per, count)):
        n = tl.load(BLOCKS + block) * BN + tl.arange(0, BN)
        # 1. scores of the keys that are seen: those with an angle
        angle = tl.load(ANGLE + n, mask=n < Tk, other=-1)
        visible = angle >= 0
        s = turned_scores(qa, qb, Kh, COS, SIN, n, angle, low, high, e, k_t, D, PRECISION) * scale
        if TILT:
            s -= tilt[:, None] * tl.load(DISTANCE + n, mask=visible, other=0.0)[None, :]
        s = tl.where(visible[None, :], s, float("-inf"))
        # 2. into the running sums
        v = tl.load(Vh + n[:, None] * v_t + d[None, :], mask=visible[:, None] & (d < D)[None, :], other=0.0)
        acc, m, l = accumulate(acc, m, l, s, v, PRECISION)
    out = (share * tl.num_programs(1) + bh) * G + g
    tl.store(OUT + out[:, None] * D + d[None, :], acc / l[:, None], mask=(g < G)[:, None] & (d < D)[None, :])
    tl.store(LSE + out, m + tl.log2(l), mask=g < G)  # base 2


# ---------------------------------------------------------------------------------------------------------------------
# prefill: from a Plan to the arguments of its kernel

def prefill(queries, keys, v, plan):
    """Attention (B, H, Tq, D) by the prefill kernel, and the log-sum-exp (B, H, Tq) of its scores, float32: NEVER for a
    query that sees nothing, which gets zeros.

    queries (R, B, H, Tq, D): q rotated for each region of the plan, times the attention scale. keys (key sets, B, Hkv,
    Tk, D): k rotated for each of plan.key_positions. v (B, Hkv, Tk, D).
    """
    R, B, H, Tq, D = queries.shape
    Hkv, Tk = v.shape[1:3]
    v = v if v.stride(-1) == 1 else v.contiguous()
    out = torch.empty_like(queries[0])
    lse = queries.new_empty(B, H, Tq, dtype=torch.float32)
    vectors = plan.shared(("prefill vectors", str(v.device)), lambda: prefill_vectors(plan, v.device))
    DP = max(16, triton.next_power_of_2(D))
    BM, BN, warps, stages = PREFILL.get((v.element_size(), DP), SMALL)
    stages = fitting_stages(stages, BM, BN, DP * v.element_size(), shared_memory(v.device))
    prefill_kernel[(triton.cdiv(Tq, BM), B * H)](
        queries, keys, v, out, lse, *vectors, R, Tq, Tk, H, H // Hkv, LOG2E / math.sqrt(D),
        *queries.stride()[:4], *keys.stride()[:4], *v.stride()[:3], *out.stride()[:3],
        TILT=plan.slopes is not None, D=D, DP=DP, BM=BM, BN=BN, PRECISION=precision(v.dtype),
        num_warps=warps, num_stages=stages)
    return out, lse


def prefill_vectors(plan, device):
    """start, end, q_pos (R, Tq), k_pos (R, Tk), ALiBi's tilts (H, Tq) and each region's key set (R,), on the device."""
    start = torch.stack([r.start for r in plan.regions]).to(torch.int32)
    end = torch.stack([r.end for r in plan.regions]).to(torch.int32)
    q_pos = torch.stack([r.q_pos.float() for r in plan.regions])
    k_pos = torch.stack([r.k_pos.float() for r in plan.regions])
    key_set = torch.tensor(plan.key_set, dtype=torch.int64)
    return [x.contiguous().to(device) for x in (start, end, q_pos, k_pos, tilts(plan), key_set)]


def tilts(plan):
    """ALiBi's slope times the query's attention scale, in base 2: (H, Tq) float32; one unused zero without ALiBi."""
    if plan.slopes is None:
        return torch.zeros(1)
    scale = torch.ones(plan.Tq) if plan.q_scale is None else plan.q_scale
    return (plan.slopes[:, None] * scale * LOG2E).float()


def shared_memory(device):
    """Bytes of shared memory that a program may have: 227 KiB on an H100, 163 on an A100, 99 on consumer cards."""
    if device.type != "cuda":
        return 232_448
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def fitting_stages(stages, BM, BN, width, room):
    """The pipeline stages whose tiles, BM queries and per stage BN keys and values of width bytes, fit in room."""
    return max(1, min(stages, (room // width - BM) // (2 * BN)))


def precision(dtype):
    """float32 products are exact, not TF32; half precision does not look at this."""
    return "ieee" if dtype == torch.float32 else "tf32"


# ---------------------------------------------------------------------------------------------------------------------
# decoding: from a Plan to the arguments of its kernel

def decode(q, k, v, plan):
    """Attention (B, H, 1, D) by the decoding kernel, and the log-sum-exp (B, H, 1) of its scores, float32.

    q (B, H, 1, D), k and v (B, Hkv, Tk, D), none of them rotated.

    The plan's attention scale is applied here; CosScale's unit lengths are the caller's.
    """
    B, H, _, D = q.shape
    Hkv, Tk = k.shape[1:3]
    G = H // Hkv
    DP = max(16, triton.next_power_of_2(D))
    BN, warps, stages = DECODE.get((q.element_size(), DP), SMALL_DECODE)
    vectors = plan.shared(("decode vectors", BN, str(q.device)), lambda: decode_vectors(plan, BN, D, q.device))
    blocks = vectors[-1]
    per = triton.cdiv(len(blocks), SPLITS)   # blocks of keys for each program
    splits = triton.cdiv(len(blocks), per)
    out = q.new_empty(splits, B, H, D, dtype=torch.float32)
    lse = q.new_empty(splits, B, H, dtype=torch.float32)
    k = k if k.stride(-1) == 1 else k.contiguous()
    v = v if v.stride(-1) == 1 else v.contiguous()
    scale = LOG2E / math.sqrt(D)
    if plan.q_scale is not None:
        scale *= float(plan.q_scale[0])
    rotary_dim = D if plan.inv_freq is None else 2 * len(plan.inv_freq)
    decode_kernel[(splits, B * Hkv)](
        q.contiguous(), k, v, *vectors, out, lse, scale, len(blocks), per, Tk, Hkv, *k.stride()[:3], *v.stride()[:3],
        TILT=plan.slopes is not None, G=G, GP=max(16, triton.next_power_of_2(G)), D=D, RD=rotary_dim,
        INTERLEAVED=plan.interleaved, EP=max(16, DP // 2), DP=DP, BN=BN, PRECISION=precision(q.dtype),
        num_warps=warps, num_stages=stages)
    # the programs' parts, weighted by their sums of exp(score)
    lse = lse * math.log(2)
    weights = lse.softmax(0)
    return (out * weights[..., None]).sum(0)[:, :, None].to(q.dtype), lse.logsumexp(0)[:, :, None]


def decode_vectors(plan, BN, D, device):
    """What one query sees: the row of the cos and sin tables (Tk,) of every key, -1 where it is unseen; the tables;
    its distance (Tk,); ALiBi's tilts; and the numbers of the blocks of BN keys that hold a visible one.

    A row of the tables belongs to a distance where all are whole numbers and small, else to a key.
    """
    Tk = plan.Tk
    distance = torch.zeros(Tk, dtype=torch.float64)
    visible = torch.zeros(Tk, dtype=torch.bool)
    for r in plan.regions:
        a, b = int(r.start[0]), int(r.end[0])
        distance[a:b] = (r.q_pos[0] - r.k_pos[a:b]).double()
        visible[a:b] = True
    if bool((distance == distance.round()).all()) and float(distance.max()) < Tk:
        angle = distance.int()
        cos, sin = pair_tables(plan, torch.arange(int(distance.max()) + 1).double().to(device), D)
    else:
        angle = torch.arange(Tk, dtype=torch.int32)
        cos, sin = pair_tables(plan, distance.to(device), D)
    angle = angle.masked_fill(~visible, -1)
    in_blocks = torch.nn.functional.pad(visible, (0, -Tk % BN)).view(-1, BN).any(1)
    blocks = in_blocks.nonzero().flatten().int()
    return [x.contiguous().to(device) for x in (angle, cos, sin, distance.float(), tilts(plan), blocks)]


def pair_tables(plan, distances, D):
    """cos and sin (rows, D/2) float32 of distances (rows,) for every channel pair, mscale^2 in them; pairs beyond the
    rotary width do not turn."""
    cos = torch.ones(len(distances), D // 2, device=distances.device)
    sin = torch.zeros(len(distances), D // 2, device=distances.device)
    if plan.inv_freq is not None:
        angles = distances[:, None] * plan.inv_freq.to(distances.device)
        cos[:, :angles.shape[1]] = angles.cos() * plan.mscale ** 2
        sin[:, :angles.shape[1]] = angles.sin() * plan.mscale ** 2
    return cos, sin
