"""Rotating queries and keys: each channel pair by its token's position times its frequency.

Does: tables of cos and sin, made once for all layers; queries and keys as the regions of a Plan want them.
Does not: choose positions or frequencies (positions.py, frequencies.py), or score (attention.py). Keys are cached
un-rotated, because where a key stands depends on the method, the region and the query; here they get their positions.

    cos, sin = cos_sin(plan, positions, device)
    q = rotate(q, cos, sin)                          # (B, H, T, D)

Letters: B batch, H query heads, Hkv key heads, T tokens, D head width, r <= D its rotary width.
"""
import math

import torch
import torch.nn.functional as F


def rotate(x, cos, sin, interleaved=False):
    """x (B, H, T, D) with its channel pairs turned by each token's angles; cos, sin (T, r/2) float32.

    Pair p is the channels p and p + r/2 (half-split, as in Hugging Face checkpoints), or 2p and 2p + 1 (interleaved).
    Channels from the rotary width r on pass unchanged.
    """
    if torch.is_grad_enabled():
        a, b = channel_pairs(x.float(), cos, interleaved)
        pairs = (a * cos - b * sin, b * cos + a * sin)
        turned = torch.stack(pairs, -1).flatten(-2) if interleaved else torch.cat(pairs, -1)
        return torch.cat((turned.to(x.dtype), x[..., turned.shape[-1]:]), -1)
    out = torch.empty_like(x)
    for x_rows, out_rows, c, s in row_blocks(x, out, cos, sin):
        a, b = channel_pairs(x_rows.float(), c, interleaved)
        out_a, out_b = channel_pairs(out_rows, c, interleaved)
        out_a.copy_((a * c).addcmul_(b, s, value=-1))
        out_b.copy_((b * c).addcmul_(a, s))
    width = 2 * cos.shape[-1]
    out[..., width:] = x[..., width:]
    return out


def channel_pairs(x, cos, interleaved):
    """The first and the second channel of every pair of x (*, D), two views (*, r/2); cos (T, r/2) tells r."""
    rotary = x[..., :2 * cos.shape[-1]]
    if interleaved:
        return rotary[..., 0::2], rotary[..., 1::2]
    return rotary.chunk(2, -1)


def row_blocks(x, *others, numbers=2 ** 18):
    """The tensors (*, T, *) cut into the same blocks of rows: a block of x has about so many numbers, which stay in a
    CPU's cache (2 to 3 % of a whole prefill); uncut on other devices."""
    if x.numel() <= numbers or x.device.type != "cpu":
        return [(x, *others)]
    rows = max(1, numbers * x.shape[-2] // x.numel())
    return zip(*(t.split(rows, -2) for t in (x, *others)))


def cos_sin(plan, positions, device):
    """cos and sin (T, r/2) of positions (T,) * inv_freq, times mscale.

    Angles in float64, tables in float32: float32 angles are off by 1.5e-3 at position 131,072. MPS has no float64, so
    its angles are computed on the CPU.
    """
    home = "cpu" if device.type == "mps" else device
    angles = positions.to(home, torch.float64)[:, None] * plan.inv_freq.to(home)
    tables = torch.empty(2, *angles.shape, device=device)
    for angle, cos, sin in row_blocks(angles, *tables):
        cos.copy_(angle.cos() * plan.mscale)
        sin.copy_(angle.sin() * plan.mscale)
    return tables


def rotate_queries(q, plan, number, rows=slice(None)):
    """Queries [rows] of q (B, H, Tq, D) as they look into region `number`: rotated, and times the attention scale."""
    q = q[:, :, rows]
    if plan.cosine is not None:
        q = unit_length(q) * (plan.cosine * math.sqrt(q.shape[-1]))
    if plan.q_scale is not None:
        q = (q * plan.q_scale[rows, None].to(q.device, torch.float32)).to(q.dtype)
    if plan.inv_freq is None:
        return q

    def tables():
        return cos_sin(plan, plan.regions[number].q_pos, q.device)
    cos, sin = plan.shared(("query tables", number, str(q.device)), tables)
    return rotate(q, cos[rows], sin[rows], plan.interleaved)


def rotate_keys(k, plan, number, first=0):
    """Keys k (B, Hkv, T, D), rotated: they are at plan.key_positions[number][first:first + T]."""
    positions = plan.key_positions[number][first:first + k.shape[2]]
    if plan.cosine is not None:
        k = unit_length(k)
    if is_unrotated(plan, number):
        return k
    key = ("key tables", number, first, len(positions), str(k.device))
    cos, sin = plan.shared(key, lambda: cos_sin(plan, positions, k.device))
    return rotate(k, cos, sin, plan.interleaved)


def is_unrotated(plan, number):
    """Whether keys are not turned at plan.key_positions[number]: nothing turns, or all stand at 0 (ReRoPE), whose cache
    then needs no rotated copy of them."""
    if plan.inv_freq is None:
        return True
    return plan.shared(("unrotated", number), lambda: plan.mscale == 1 and not plan.key_positions[number].any())


def unit_length(x):
    """x (*, D) with every vector scaled to length 1 (CosScale)."""
    return F.normalize(x.float(), dim=-1, eps=1e-9).to(x.dtype)
