"""Attention over a Plan on a GPU: one Triton kernel for prefill, one for decoding, for every method alike.

How it works, for a reader who has never written a kernel. A kernel is one small program that runs many times at once;
here, once for every tile of BM queries of a head. Softmax attention seems to need the whole row of scores before
the first weight is known, and those T x T scores are what does not fit. FLASH ATTENTION (arXiv 2205.14135) walks
over the keys tile by tile and keeps, per query, three running things: the largest score m so far, the sum l of
exp(score - m), and the weighted sum acc of values. When a larger score appears, l and acc are scaled down by
exp(old m - new m). At the end acc / l is exact. The scores of one tile live in registers and are forgotten.

THE INTERVAL IDEA: a method is a few regions (see positions.py), and in each a query sees one interval of keys. So the
walk goes region by region over the keys from the first to the last that some query of the tile sees, with queries and
keys rotated for that region, all into the same m, l, acc. Between those ends lies a span that all queries of the tile
see in full, where no mask is needed; only its two ragged edges compare every key with every query's interval.

Keys are rotated once per region before prefill, a small part of its work; rotating inside the walk would repeat it
for every tile of queries. DECODING is the opposite: one query, bound by reading the cache, so its kernel reads the
un-rotated keys once, rotates them in registers, and shares them out to many programs whose parts merge at the end.

Does: forward, any number of query heads per key head, lengths that fill no tile, widths 16 to 256, fp32, bf16, fp16.
Does not: gradients. attend(q, k, v, plan, impl="triton") comes here; on CUDA it is the default.
"""
import math

import torch
import triton
import triton.language as tl

from attention import asking, turned, with_cosine

LOG2E = math.log2(math.e)
# (bytes per number, head width padded to a power of two) -> queries and keys per tile, warps, pipeline stages
PREFILL = {(2, 64): (128, 64, 8, 3), (2, 128): (128, 64, 8, 3), (2, 256): (64, 32, 4, 2), (4, 128): (64, 32, 4, 2),
           (4, 256): (32, 32, 4, 2)}
SMALL = (64, 64, 4, 2)   # everything else
# the same for decoding: keys per tile, warps, stages; wide tiles are small enough for the shared memory of any card
DECODE = {(2, 256): (32, 4, 2), (4, 128): (32, 4, 2), (4, 256): (32, 4, 1)}
SMALL_DECODE = (64, 4, 2)
SPLITS = 64              # programs that share the keys of a head in decoding, at most


@triton.jit
def walk(acc, m, l, q, K, V, KPOS, q_pos, tilt, lo, hi, begin, end, stride_k, stride_v, scale,
         EDGE: tl.constexpr, TILT: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr,
         PRECISION: tl.constexpr):
    """Take the keys begin..end, in tiles of BN, into the running (acc, m, l) of a tile of queries."""
    d = tl.arange(0, DP)
    for n0 in range(begin, end, BN):
        n = n0 + tl.arange(0, BN)
        there = (n < end) if EDGE else (n >= 0)
        k = tl.load(K + n[None, :] * stride_k + d[:, None], mask=there[None, :] & (d < D)[:, None], other=0.0)
        s = tl.dot(q, k, input_precision=PRECISION) * scale
        if TILT:  # ALiBi: slope * distance off the score
            k_pos = tl.load(KPOS + n, mask=there, other=0.0)
            s -= tilt[:, None] * (q_pos[:, None] - k_pos[None, :])
        if EDGE:
            s = tl.where((n[None, :] >= lo[:, None]) & (n[None, :] < hi[:, None]), s, float("-inf"))
        top = tl.maximum(m, tl.max(s, 1))
        safe = tl.where(top == float("-inf"), 0.0, top)  # a query that has seen no key yet
        p = tl.exp2(s - safe[:, None])
        shrink = tl.exp2(m - safe)
        v = tl.load(V + n[:, None] * stride_v + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0.0)
        l = l * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        m = top
    return acc, m, l


@triton.jit
def prefill_kernel(Q, K, V, OUT, START, END, QPOS, KPOS, TILTS, COPY, R, Tq, Tk, H, G, scale,
                   q_r: tl.int64, q_b: tl.int64, q_h: tl.int64, q_t: tl.int64,
                   k_r: tl.int64, k_b: tl.int64, k_h: tl.int64, k_t: tl.int64,
                   v_b: tl.int64, v_h: tl.int64, v_t: tl.int64, o_b: tl.int64, o_h: tl.int64, o_t: tl.int64,
                   TILT: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                   PRECISION: tl.constexpr):
    """One tile of BM queries of one head: all regions, all keys they see."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest rows first
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    i = tile * BM + tl.arange(0, BM)
    row, d = tl.minimum(i, Tq - 1), tl.arange(0, DP)  # rows beyond the end repeat the last one and are not stored
    acc = tl.zeros([BM, DP], tl.float32)
    m = tl.full([BM], float("-inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    Vh = V + b * v_b + (h // G) * v_h
    for r in range(R):
        lo, hi = tl.load(START + r * Tq + row), tl.load(END + r * Tq + row)
        live = lo < hi
        first = tl.min(tl.where(live, lo, Tk), 0) // BN * BN
        last = tl.maximum(tl.max(tl.where(live, hi, 0), 0), first)
        full0 = tl.minimum(tl.cdiv(tl.max(lo, 0), BN) * BN, last)   # all queries see full0 .. full1
        full0 = tl.maximum(full0, first)
        full1 = tl.maximum(tl.min(hi, 0) // BN * BN, full0)
        q = tl.load(Q + r * q_r + b * q_b + h * q_h + row[:, None] * q_t + d[None, :], mask=(d < D)[None, :], other=0.0)
        q_pos, tilt = tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32)
        if TILT:
            q_pos, tilt = tl.load(QPOS + r * Tq + row), tl.load(TILTS + h * Tq + row)
        Kh = K + tl.load(COPY + r) * k_r + b * k_b + (h // G) * k_h  # regions share equal copies
        acc, m, l = walk(acc, m, l, q, Kh, Vh, KPOS + r * Tk, q_pos, tilt, lo, hi, first, full0, k_t, v_t, scale,
                         True, TILT, D, DP, BN, PRECISION)
        acc, m, l = walk(acc, m, l, q, Kh, Vh, KPOS + r * Tk, q_pos, tilt, lo, hi, full0, full1, k_t, v_t, scale,
                         False, TILT, D, DP, BN, PRECISION)
        acc, m, l = walk(acc, m, l, q, Kh, Vh, KPOS + r * Tk, q_pos, tilt, lo, hi, full1, last, k_t, v_t, scale,
                         True, TILT, D, DP, BN, PRECISION)
    tl.store(OUT + b * o_b + h * o_h + i[:, None] * o_t + d[None, :], (acc / l[:, None]).to(OUT.dtype.element_ty),
             mask=(i < Tq)[:, None] & (d < D)[None, :])


@triton.jit
def decode_kernel(Q, K, V, TURN, COS, SIN, DISTANCE, TILTS, BLOCKS, OUT, LSE, scale, count, per, Tk, Hkv,
                  k_b: tl.int64, k_h: tl.int64, k_t: tl.int64, v_b: tl.int64, v_h: tl.int64, v_t: tl.int64,
                  TILT: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, EP: tl.constexpr,
                  DP: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr):
    """One query against its share of the key blocks, for the G query heads of one key head."""
    share, bh = tl.program_id(0), tl.program_id(1)
    b, hk = bh // Hkv, bh % Hkv
    E: tl.constexpr = D // 2
    g, e, d = tl.arange(0, GP), tl.arange(0, EP), tl.arange(0, DP)
    half = (g < G)[:, None] & (e < E)[None, :]
    qa = tl.load(Q + bh * G * D + g[:, None] * D + e[None, :], mask=half, other=0.0)
    qb = tl.load(Q + bh * G * D + E + g[:, None] * D + e[None, :], mask=half, other=0.0)
    tilt = tl.load(TILTS + hk * G + g, mask=(g < G) & TILT, other=0.0)
    acc, m, l = tl.zeros([GP, DP], tl.float32), tl.full([GP], float("-inf"), tl.float32), tl.zeros([GP], tl.float32)
    Kh, Vh = K + b * k_b + hk * k_h, V + b * v_b + hk * v_h
    for block in range(share * per, tl.minimum(share * per + per, count)):
        n = tl.load(BLOCKS + block) * BN + tl.arange(0, BN)
        turn = tl.load(TURN + n, mask=n < Tk, other=-1)  # row of the tables; -1 is a key that is not seen
        seen = turn >= 0
        half_k = seen[:, None] & (e < E)[None, :]
        at = turn[:, None] * E + e[None, :]
        c, z = tl.load(COS + at, mask=half_k, other=0.0), tl.load(SIN + at, mask=half_k, other=0.0)
        ka = tl.load(Kh + n[:, None] * k_t + e[None, :], mask=half_k, other=0.0).to(tl.float32)
        kb = tl.load(Kh + n[:, None] * k_t + E + e[None, :], mask=half_k, other=0.0).to(tl.float32)
        ra, rb = (ka * c + kb * z).to(qa.dtype), (kb * c - ka * z).to(qa.dtype)  # turned back by the distance
        s = tl.dot(qa, tl.trans(ra), input_precision=PRECISION)
        s = tl.dot(qb, tl.trans(rb), s, input_precision=PRECISION) * scale
        if TILT:
            s -= tilt[:, None] * tl.load(DISTANCE + n, mask=seen, other=0.0)[None, :]
        s = tl.where(seen[None, :], s, float("-inf"))
        top = tl.maximum(m, tl.max(s, 1))
        safe = tl.where(top == float("-inf"), 0.0, top)
        p, shrink = tl.exp2(s - safe[:, None]), tl.exp2(m - safe)
        v = tl.load(Vh + n[:, None] * v_t + d[None, :], mask=seen[:, None] & (d < D)[None, :], other=0.0)
        l = l * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        m = top
    out = (share * tl.num_programs(1) + bh) * G + g
    tl.store(OUT + out[:, None] * D + d[None, :], acc / l[:, None], mask=(g < G)[:, None] & (d < D)[None, :])
    tl.store(LSE + out, m + tl.log2(l), mask=g < G)  # base 2


# ---------------------------------------------------------------------------------------------------------------------
# from a Plan to the arguments of a kernel

def attend_triton(q, k, v, plan):
    """Attention (B, H, Tq, D) by plan; shapes as in attention.attend, which checks them."""
    q, k = with_cosine(q, k, plan)
    return (decode if q.shape[2] == 1 else prefill)(q, k, v, plan)


def prefill(q, k, v, plan):
    """The prefill kernel on q (B, H, Tq, D) and k and v (B, Hkv, Tk, D), none of them rotated."""
    (B, H, Tq, D), (Hkv, Tk), out = q.shape, k.shape[1:3], torch.empty_like(q)
    table = on_device(plan, q.device)
    queries = torch.stack([asking(q, plan, r) for r in plan.regions])
    keys = torch.stack([turned(k, plan, plan.regions[r].k_pos) for r in table["copied"]])
    v, DP = v if v.stride(-1) == 1 else v.contiguous(), max(16, triton.next_power_of_2(D))
    BM, BN, warps, stages = PREFILL.get((q.element_size(), DP), SMALL)
    stages = fitting(stages, BM, BN, DP * q.element_size(), shared_memory(q.device))
    prefill_kernel[(triton.cdiv(Tq, BM), B * H)](
        queries, keys, v, out, *(table[name] for name in ("start", "end", "q_pos", "k_pos", "tilts", "copy")),
        len(plan.regions), Tq, Tk, H, H // Hkv, LOG2E / math.sqrt(D),
        *queries.stride()[:4], *keys.stride()[:4], *v.stride()[:3], *out.stride()[:3],
        TILT=plan.slopes is not None, D=D, DP=DP, BM=BM, BN=BN, PRECISION=precision(q), num_warps=warps,
        num_stages=stages)
    return out


def shared_memory(device):
    """Bytes of shared memory that a program may have: 227 KiB on an H100, 163 on an A100, 99 on consumer cards."""
    if device.type != "cuda":
        return 232_448
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def fitting(stages, BM, BN, width, room):
    """The pipeline stages whose tiles, BM queries and per stage BN keys and values of width bytes, fit in room."""
    return max(1, min(stages, (room // width - BM) // (2 * BN)))


def on_device(plan, device):
    """The vectors of a plan on the device, made once for all layers: intervals, positions, which copy of the keys."""
    def make():
        first = {}  # k_pos -> the region that came with it first
        copied = [first.setdefault(id(r.k_pos), number) for number, r in enumerate(plan.regions)]
        order = sorted(set(copied))
        kinds = {"start": torch.int32, "end": torch.int32, "q_pos": torch.float32, "k_pos": torch.float32}
        stacked = {name: torch.stack([getattr(r, name) for r in plan.regions]).to(kind).to(device)
                   for name, kind in kinds.items()}
        copy = torch.tensor([order.index(r) for r in copied], dtype=torch.int64, device=device)
        return {**stacked, "copied": order, "copy": copy, "tilts": tilts(plan).to(device)}
    return plan.once(("triton", str(device)), make)


def tilts(plan):
    """ALiBi's slope times the query's attention scale, in base 2: (H, Tq) float32; one unused zero without ALiBi."""
    if plan.slopes is None:
        return torch.zeros(1)
    rows = torch.ones(len(plan.regions[0].q_pos)) if plan.q_scale is None else plan.q_scale
    return (plan.slopes[:, None] * rows * LOG2E).float()


def decode(q, k, v, plan):
    """The decoding kernel on q (B, H, 1, D) and k and v (B, Hkv, Tk, D), none of them rotated."""
    (B, H, _, D), (Hkv, Tk) = q.shape, k.shape[1:3]
    DP = max(16, triton.next_power_of_2(D))
    BN, warps, stages = DECODE.get((q.element_size(), DP), SMALL_DECODE)
    turn, cos, sin, distance, tilt, blocks = turning(plan, BN, D, q.device)
    per = triton.cdiv(len(blocks), min(SPLITS, len(blocks)))
    splits = triton.cdiv(len(blocks), per)
    out, lse = q.new_empty(splits, B, H, D, dtype=torch.float32), q.new_empty(splits, B, H, dtype=torch.float32)
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    scale = LOG2E / math.sqrt(D) * (1.0 if plan.q_scale is None else float(plan.q_scale[0]))
    decode_kernel[(splits, B * Hkv)](
        q.contiguous(), k, v, turn, cos, sin, distance, tilt, blocks, out, lse, scale, len(blocks), per,
        Tk, Hkv, *k.stride()[:3], *v.stride()[:3], TILT=plan.slopes is not None, G=H // Hkv,
        GP=max(16, triton.next_power_of_2(H // Hkv)), D=D, EP=max(16, DP // 2), DP=DP, BN=BN, PRECISION=precision(q),
        num_warps=warps, num_stages=stages)
    return (out * (lse * math.log(2)).softmax(0)[..., None]).sum(0)[:, :, None].to(q.dtype)


def turning(plan, BN, D, device):
    """What one query sees, made once for all layers: per key the row of the cos and sin tables (-1: unseen) and its
    distance, the tables, ALiBi's tilts, and the blocks of BN keys that hold a seen one.

    A row of the tables belongs to a distance where all are whole numbers and small, else to a key.
    """
    def make():
        Tk = len(plan.regions[0].k_pos)
        distance, seen = torch.zeros(Tk, dtype=torch.float64), torch.zeros(Tk, dtype=torch.bool)
        for r in plan.regions:
            a, b = int(r.start[0]), int(r.end[0])
            distance[a:b], seen[a:b] = (r.q_pos[0] - r.k_pos[a:b]).double(), True
        whole = bool((distance == distance.round()).all()) and float(distance.max()) < Tk
        turn = distance.int() if whole else torch.arange(Tk, dtype=torch.int32)
        rows = torch.arange(int(distance.max()) + 1).double() if whole else distance
        theta = torch.zeros(D // 2, dtype=torch.float64) if plan.inv_freq is None else plan.inv_freq
        angle = rows.to(device)[:, None] * theta.to(device)
        blocks = torch.nonzero(torch.nn.functional.pad(seen, (0, -Tk % BN)).view(-1, BN).any(1)).flatten().int()
        made = turn.masked_fill(~seen, -1), *((f(angle) * plan.mscale ** 2).float() for f in (torch.cos, torch.sin))
        return [x.contiguous().to(device) for x in (*made, distance.float(), tilts(plan), blocks)]
    return plan.once(("decode", BN, str(device)), make)


def precision(q):
    """float32 products are exact, not TF32; half precision does not look at this."""
    return "ieee" if q.dtype == torch.float32 else "tf32"
