"""A LLaMA from scratch, with what its nearest relatives have beside (checkpoint.FAMILIES): the network, and how to load
it from a checkpoint folder.

Does not: read files itself (checkpoint.py, tokenizer.py), choose positions (positions.py), hold keys and
values (cache.py), or sample (generate.py).

    model, tokenizer = load("llama-7b", dtype="bfloat16")
    ids = tokenizer.encode("The sky is")
    logits = model(torch.tensor([ids]), model.plan("mesa", n=len(ids)))      # (1, T, vocab_size)

Letters: B batch, T tokens, H and Hkv query and key heads, Tq, Tk queries and keys, D head width.
"""
import torch
import torch.nn.functional as F
from torch import nn

from attention import attend
from checkpoint import find_checkpoint
from config import Config
from frequencies import pick
from positions import Method
from quantized import load_weights
from single_row import ATTENTIONS, PRODUCTS, Ways, fastest_ways
from tokenizer import load_tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# ---------------------------------------------------------------------------------------------------------------------
# the network; attributes are named as in Hugging Face checkpoints

class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the channels (arXiv 1910.07467)."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        if not is_single_row(x):
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        length = float(torch.linalg.vector_norm(x, dtype=torch.float32))  # what rms_norm computes, in three operations
        return x * (length ** 2 / x.numel() + self.eps) ** -0.5 * self.weight


def is_single_row(x):
    """Whether x (*, channels) is one row on a CPU, as in decoding: what counts is then how fast weights are read."""
    return x.numel() == x.shape[-1] and x.device.type == "cpu" and not torch.is_grad_enabled()


def linear(x, weight, bias, product):
    """F.linear; for a single row by product, one of single_row.PRODUCTS."""
    if not is_single_row(x):
        return F.linear(x, weight, bias)
    out = product(x.view(1, -1), weight).view(*x.shape[:-1], -1)
    return out if bias is None else out + bias


class Linear(nn.Linear):
    product = staticmethod(PRODUCTS[Ways().product])  # of a single row

    def forward(self, x):
        return linear(x, self.weight, self.bias, self.product)


class Attention(nn.Module):
    row = staticmethod(ATTENTIONS[Ways().attention])  # attention of a single row

    def __init__(self, c, layer):
        super().__init__()
        self.head_dim = c.head_dim
        self.layer = layer
        bias = c.attention_bias or c.qkv_bias
        self.q_proj = Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=bias)
        self.k_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=bias)
        self.v_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=bias)
        self.o_proj = Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=c.attention_bias)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x, plan, cache, impl):
        """The last Tq tokens of x (B, T, hidden_size), as many as the plan has queries, look at all there are."""
        q = self.q_norm(self.heads(self.q_proj(x[:, -plan.Tq:])))    # (B, H, Tq, D)
        k = self.k_norm(self.heads(self.k_proj(x)))                  # (B, Hkv, T, D)
        v = self.heads(self.v_proj(x))
        if cache is None:
            out = attend(q, k, v, plan, impl, row=self.row)                     # (B, H, Tq, D)
        else:
            out = cache.attend(self.layer, q, k, v, plan, impl, self.row)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def heads(self, x):
        """(B, T, heads * D) -> (B, heads, T, D)."""
        return x.view(*x.shape[:2], x.shape[-1] // self.head_dim, self.head_dim).transpose(1, 2)


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, c):
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c, layer)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, plan, cache, impl):
        h = self.self_attn(by_rows(self.input_layernorm, x), plan, cache, impl) + x[:, -plan.Tq:]
        return by_rows(self.feed_forward, h)

    def feed_forward(self, h):
        return h + self.mlp(self.post_attention_layernorm(h))


def by_rows(f, x, rows=2048):
    """f(x) (B, T, *) of an f that treats every token alone, on a CPU so many at a time: what lies between stays small
    (a sixth of the time of a 1B model's prefill of 8,192 tokens)."""
    if x.device.type != "cpu" or x.shape[1] <= rows:
        return f(x)
    return torch.cat([f(part) for part in x.split(rows, 1)], 1)


class Decoder(nn.Module):
    """All but the head: the part that checkpoints call `model`."""

    def __init__(self, c):
        super().__init__()
        weight = torch.empty(c.vocab_size, c.hidden_size)
        if not weight.is_meta:  # drawing random numbers on the meta device takes seconds
            nn.init.normal_(weight)
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size, _weight=weight)
        self.layers = nn.ModuleList(Block(c, layer) for layer in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, tokens, plans, cache, impl):
        x = self.embed_tokens(tokens)                   # (B, T, hidden_size)
        for block, plan in zip(self.layers, plans):
            x = block(x, plan, cache, impl)
        return self.norm(x)


class Llama(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.ways = Ways()                              # how a single row is computed, see use_ways
        self.ranks = None                               # the processes that its keys are spread over, see parallel.py
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def layers(self):
        return self.model.layers

    def plan(self, method=None, *, n, i=None, j=None, **settings):
        """The Plan of a method, see Config.plan; where some layers are local or without positions, a list with a Plan
        for each layer, these layers' own as they were trained. Layers that attend alike share one."""
        if not self.config.layer_methods:
            return self.config.plan(method, n=n, i=i, j=j, **settings)
        plans = self.config.plans(Method.of(method, **settings), n, i, j)
        return [plans[own] for own in self.config.layer_methods]

    def forward(self, tokens, plan, cache=None, last_only=False, impl="auto"):
        """Logits (B, Tq, vocab_size), or (B, 1, vocab_size) of the last token with last_only, for tokens (B, Tq) int64.

        plan: made by model.plan, i being these tokens and j all tokens so far, those in the cache and these; or a list
        of plans, one for each layer. With a cache the keys and values of the tokens are appended to it.
        """
        layers = self.config.num_hidden_layers
        plans = list(plan) if isinstance(plan, (list, tuple)) else [plan] * layers
        if len(plans) != layers:
            raise ValueError(f"{len(plans)} plans for {layers} layers")
        if last_only:  # of the other tokens the last layer then needs only keys and values: nearly a layer less to do
            plans[-1] = plans[-1].last()
        x = self.model(tokens, plans, cache, impl)
        if self.config.tie_word_embeddings:
            return linear(x, self.model.embed_tokens.weight, None, PRODUCTS[self.ways.product])
        return self.lm_head(x)

    def use_ways(self, ways):
        """Compute single rows by these single_row.Ways."""
        product = pick(PRODUCTS, "way to multiply", ways.product)
        row = pick(ATTENTIONS, "way to attend", ways.attention)
        self.ways = ways
        for module in self.modules():
            if isinstance(module, Linear):
                module.product = product
            elif isinstance(module, Attention):
                module.row = row


# ---------------------------------------------------------------------------------------------------------------------
# loading

def load(path, dtype=torch.float32, device="cpu", train_len=None, quantize=None):
    """(Llama, Tokenizer) of a Hugging Face folder, or of a name in checkpoints/; train_len overrides L.

    dtype: a torch type or its name; None keeps the stored type. quantize: "int8" or "int4", see quantized.py.
    device: torch's, or its name.
    Raises FileNotFoundError or ValueError, naming the file and the tensor, for anything missing, extra or misshapen,
    and ValueError for a device that is not there.
    """
    path = find_checkpoint(path)
    config = Config.from_hf(path, train_len)
    tokenizer = load_tokenizer(path, config.bos_token_id, config.vocab_size)
    return load_model(path, config, dtype, device, quantize=quantize), tokenizer


def check_device(device):
    """ValueError for a device, torch's or its name, that this machine lacks."""
    try:
        torch.device(device)
    except RuntimeError:
        raise ValueError(f"unknown device {device!r}; there are cpu, cuda and mps") from None
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):  # the latter where torch is built without CUDA
        raise ValueError(f"device {device}: this machine has none") from None


def load_model(path, config, dtype=None, device="cpu", tokens=0, quantize=None):
    """The Llama of a folder in evaluation mode; dtype and quantize as in load.

    tokens: how many it will decode, which says whether compiling for that may pay; see single_row.fastest_ways.
    """
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ValueError(f"weights of type {dtype} are not supported; there are {', '.join(DTYPES)}")
        dtype = DTYPES[dtype]
    check_device(device)
    with torch.device("meta"):
        model = Llama(config)
    load_weights(model, path, dtype, device, quantize)
    model.eval().requires_grad_(False)
    model.use_ways(fastest_ways(model, tokens))
    return model
