"""What attention over a Plan means, in float64 and slowly, sharing no rotation code with attention.py.

rotation.py turns every query and every key by its own position, so that their product depends on the difference.
Here nothing is turned: each (query, key) PAIR is scored at its own distance d, so a sign or layout error in rotate()
cannot cancel out. For a channel pair (a, b), (p, p + r/2) in the half-split layout or (2p, 2p + 1) interleaved,

    score += (qa ka + qb kb) cos(d theta_p) + (qa kb - qb ka) sin(d theta_p)

which is the real part of (qa + i qb) (ka - i kb) e^(i d theta_p). Channels beyond the rotary width r just multiply.
"""
import math

import torch


def oracle_distance(plan):
    """(Tq, Tk) float64 distances, inf where the key is unseen; read off plan.regions row by row."""
    region = plan.regions[0]
    out = torch.full((len(region.q_pos), len(region.k_pos)), math.inf, dtype=torch.float64)
    for r in plan.regions:
        for row, (start, end) in enumerate(zip(r.start.tolist(), r.end.tolist())):
            if end > start:
                assert (out[row, start:end] == math.inf).all(), f"query row {row} sees a key twice"
                out[row, start:end] = r.q_pos[row] - r.k_pos[start:end]
    return out


def oracle_scores(q, k, plan, d):
    """(B, H, Tq, Tk) logits before the mask: rotation, mscale^2 on what turns, 1/sqrt(D), ALiBi, attention scale.

    CosScale: q and k of length 1, and plan.cosine for 1/sqrt(D). A rotation keeps lengths, so the order is immaterial.
    """
    D = q.shape[-1]
    if plan.cosine is not None:
        q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
    pairs = 0 if plan.inv_freq is None else len(plan.inv_freq)
    scores = torch.zeros(*q.shape[:3], k.shape[2], dtype=torch.float64)
    for p in range(pairs):
        a, b = (2 * p, 2 * p + 1) if plan.interleaved else (p, p + pairs)
        qa, qb = q[..., a, None], q[..., b, None]                    # (B, H, Tq, 1)
        ka, kb = k[..., a].unsqueeze(-2), k[..., b].unsqueeze(-2)    # (B, H, 1, Tk)
        scores += (qa * ka + qb * kb) * torch.cos(d * float(plan.inv_freq[p]))
        scores += (qa * kb - qb * ka) * torch.sin(d * float(plan.inv_freq[p]))
    scores = scores * plan.mscale ** 2
    for channel in range(2 * pairs, D):
        scores += q[..., channel, None] * k[..., channel].unsqueeze(-2)
    scores = scores * (plan.cosine or 1 / math.sqrt(D))
    if plan.slopes is not None:
        scores = scores - plan.slopes.double()[:, None, None] * d
    return scores if plan.q_scale is None else scores * plan.q_scale.double()[:, None]


def oracle_weights(q, k, plan):
    """The attention weights (B, H, Tq, Tk) float64; head h uses key head h // G."""
    head = torch.arange(q.shape[1]) // (q.shape[1] // k.shape[1])
    d = oracle_distance(plan)
    visible = d < math.inf
    scores = oracle_scores(q.double(), k.double()[:, head], plan, d.masked_fill(~visible, 0.0))
    return scores.masked_fill(~visible, -math.inf).softmax(-1)


def oracle(q, k, v, plan):
    """Attention (B, H, Tq, D) float64 of q (B, H, Tq, D) over k, v (B, Hkv, Tk, D)."""
    head = torch.arange(q.shape[1]) // (q.shape[1] // k.shape[1])
    return oracle_weights(q, k, plan) @ v.double()[:, head]
