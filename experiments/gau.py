"""A Gated Attention Unit model: GAU-alpha's layer as a second small architecture, causal or for masked words.

One layer is attention and feed-forward network at once (arXiv 2202.10447; ZhuiyiTechnology/GAU-alpha):

    u, v, b = split(SiLU(W_in x))          # widths e, e and s; one projection makes all three
    q, k    = b * gamma_q, b * gamma_k     # one head of key size s, rotated
    o       = W_out (u * (A v))            # A = softmax(q k^T / sqrt(s)); u gates what attention brings
    x       = norm(x + o)                  # RMS norm without gain, after the sum

Does: the network, and plans for it by the rows of METHODS that see all keys. Does not: train or measure it
(infoscale.py), cache keys. Left out of GAU-alpha: token types, dropout, and its pre-training.

    model = Gau(GauConfig(vocab_size=1024, train_len=64))
    logits = model(tokens, model.plan("infoscale", n=tokens.shape[1]))          # (B, T, vocab_size)

Letters: B batch, T tokens, D width, e inner width, s key size, L training length.
"""
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from frequencies import SCALES
from geometry import METHODS
from plan import Region
from positions import Method, make_plan
from rotation import rotate_keys, rotate_queries


@dataclass
class GauConfig:
    """The sizes of a Gau; GAU-alpha has 12000, 768, 1536, 128 and 24 (InfoScale's experiments its first 6 layers)."""
    vocab_size: int = 1024
    width: int = 128             # D
    inner: int = 256             # e
    key_size: int = 64           # s
    layers: int = 6
    rope_theta: float = 10000.0
    train_len: int = 64          # L
    causal: bool = True          # else every token sees all, as for masked words
    cosine: float | None = None  # CosScale: logits are this times the cosine of q and k


def norm(x, eps=1e-12):
    """x / sqrt(mean(x^2) + eps) over the channels: without gain or bias."""
    return F.rms_norm(x, x.shape[-1:], eps=eps)


class GauLayer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.sizes = [c.inner, c.inner, c.key_size]
        self.in_proj = nn.Linear(c.width, sum(self.sizes), bias=False)
        self.out_proj = nn.Linear(c.inner, c.width, bias=False)
        self.gamma_q = nn.Parameter(torch.ones(c.key_size))
        self.gamma_k = nn.Parameter(torch.ones(c.key_size))

    def forward(self, x, plan):
        """x (B, T, D) -> (B, T, D)."""
        u, v, base = F.silu(self.in_proj(x)).split(self.sizes, -1)
        q, k = self.queries_keys(base)
        return norm(x + self.out_proj(u * attend_wide(q, k, v, plan)))

    def queries_keys(self, base):
        """Un-rotated queries and keys (B, 1, T, s) of the shared projection (B, T, s)."""
        return (base * self.gamma_q)[:, None], (base * self.gamma_k)[:, None]

    def watched(self, x):
        """Queries and keys (B, 1, T, s) of an input x (B, T, D), to look at its attention from outside."""
        return self.queries_keys(F.silu(self.in_proj(x)).split(self.sizes, -1)[2])


def attend_wide(q, k, v, plan, block=512):
    """Softmax attention (B, T, e) of q over k (B, 1, T, s) and v (B, T, e), whose width is not that of the keys, for a
    plan of one region; `block` queries at a time."""
    [region] = plan.regions
    q = rotate_queries(q, plan, 0)[:, 0]
    k = rotate_keys(k, plan, 0)[:, 0].transpose(1, 2) / math.sqrt(q.shape[-1])
    j = torch.arange(plan.Tk)
    outs = []
    for begin in range(0, plan.Tq, block):
        rows = slice(begin, begin + block)
        seen = (j >= region.start[rows, None]) & (j < region.end[rows, None])
        scores = (q[:, rows] @ k).float().masked_fill(~seen.to(q.device), -math.inf)
        outs.append(scores.softmax(-1).to(v.dtype) @ v)
    return torch.cat(outs, 1)


class Gau(nn.Module):
    """The network; its last token id, vocab_size, is the mask, which it reads and never writes."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size + 1, config.width)
        self.layers = nn.ModuleList(GauLayer(config) for _ in range(config.layers))
        for weight in self.parameters():
            if weight.ndim > 1:
                nn.init.normal_(weight, std=0.02)

    def forward(self, tokens, plan):
        """Logits (B, T, vocab_size) for tokens (B, T) int64; the head is the embedding."""
        x = norm(self.embed_tokens(tokens))
        for layer in self.layers:
            x = layer(x, plan)
        return F.linear(x, self.embed_tokens.weight[:-1])

    def plan(self, method="rope", *, n):
        """The Plan of n tokens by a row of METHODS that sees all keys: rope, infoscale, logn, pi, ...

        Where the model is not causal, every query sees all n keys, and InfoScale has one factor for all, g(n)/g(L)
        without a clamp, as in the released encoder.
        """
        c = self.config
        i = torch.arange(n)
        sizes = {"n": n, "L": c.train_len, "D": c.key_size, "H": 1, "base": c.rope_theta, "cosine": c.cosine}
        plan = make_plan(method, i, i, **sizes)
        if c.causal:
            return plan
        asked = Method.of(method)
        scale = SCALES[asked.attn_scale or METHODS[asked.name][2] or "none"]
        if scale:
            all_keys = torch.full((n,), n)
            settings = {"per_sequence": True} if scale is SCALES["infoscale"] else {}
            plan.q_scale = scale(i, all_keys, n, c.train_len, c.key_size, **settings)
        return replace(plan, regions=[Region(i, i, 0 * i, 0 * i + n)])
