"""What attention over a Plan means, in float64 and slowly, sharing no rotation code with attention.py.

attention.py turns every query and every key by its own position, so that their product depends on the difference.
Here nothing is turned: each (query, key) PAIR is scored at its own distance d, so a sign or layout error in rotate()
cannot cancel out. For a channel pair p = (a, b) = (p, p + D/2), the half-split layout,

    score += (qa ka + qb kb) cos(d theta_p) + (qa kb - qb ka) sin(d theta_p)

which is the real part of (qa + i qb) (ka - i kb) e^(i d theta_p).
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
    """(B, H, Tq, Tk) logits before the mask: rotation, mscale^2, 1/sqrt(D), ALiBi, attention scale, in that order.

    CosScale: q and k of length 1, and plan.cosine for 1/sqrt(D). A rotation keeps lengths, so the order is immaterial.
    """
    D = q.shape[-1]
    if plan.cosine is not None:
        q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
    qa, qb = q[..., : D // 2], q[..., D // 2:]
    ka, kb = k[..., : D // 2], k[..., D // 2:]
    theta = torch.zeros(D // 2) if plan.inv_freq is None else plan.inv_freq
    scores = torch.zeros(*q.shape[:3], k.shape[2], dtype=torch.float64)
    for p in range(D // 2):
        qa_p, qb_p = qa[..., p, None], qb[..., p, None]                    # (B, H, Tq, 1)
        ka_p, kb_p = ka[..., p].unsqueeze(-2), kb[..., p].unsqueeze(-2)    # (B, H, 1, Tk)
        scores += (qa_p * ka_p + qb_p * kb_p) * torch.cos(d * float(theta[p]))
        scores += (qa_p * kb_p - qb_p * ka_p) * torch.sin(d * float(theta[p]))
    scores = scores * plan.mscale ** 2 * (plan.cosine or 1 / math.sqrt(D))
    if plan.slopes is not None:
        scores = scores - plan.slopes.double()[:, None, None] * d
    return scores if plan.q_scale is None else scores * plan.q_scale.double()[:, None]


def oracle(q, k, v, plan):
    """Attention (B, H, Tq, D) float64 of q (B, H, Tq, D) over k, v (B, Hkv, Tk, D); head h uses key head h // G."""
    q, k, v = q.double(), k.double(), v.double()
    head = torch.arange(q.shape[1]) // (q.shape[1] // k.shape[1])
    d = oracle_distance(plan)
    seen = d < math.inf
    scores = oracle_scores(q, k[:, head], plan, d.masked_fill(~seen, 0.0))
    return scores.masked_fill(~seen, -math.inf).softmax(-1) @ v[:, head]
