"""Tensor parallel: a Llama whose matrices are cut among ranks, each of which reads only its part of a checkpoint.

A rank has some of the heads and some of the channels between the two matrices of a feed-forward network: rows of
q, k, v, gate and up, columns of o and down (Megatron-LM, arXiv 1909.08053). What o and down write is then a part of a
sum, and all ranks add their parts up: two exchanges a layer. So a rank's model is an ordinary Llama of a Config with
fewer heads, and a hook on two modules of each layer. Embeddings, norms and the head are whole on every rank.
torch's parallelize_module cuts the same way; on a CPU its decoding takes 1.7 times as long as hooks.

    model = load_shard(path, config, ranks, "bfloat16")

Letters: N ranks.
"""
from dataclasses import replace

import torch

from model import DTYPES, Llama
from quantized import load_weights, shapes_of
from single_row import fastest_ways

ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")   # cut by output channels, their biases too
COLUMNS = ("o_proj", "down_proj")                               # cut by input channels; rank 0 alone adds a bias


def local_config(config, rank, N):
    """The Config of one of N ranks. ValueError where N does not divide what is to be cut."""
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if getattr(config, name) % N:
            raise ValueError(f"--tensor-parallel {N} does not divide {name} {getattr(config, name)}")
    if config.bits:
        raise ValueError("--tensor-parallel reads float weights; --quantize makes them integers after they are cut")
    heads = config.num_attention_heads // N
    return replace(config, num_attention_heads=heads, num_key_value_heads=config.num_key_value_heads // N,
                   intermediate_size=config.intermediate_size // N, first_head=rank * heads,
                   all_heads=config.num_attention_heads)


def parts_of(shapes, rank, N):
    """{name: slices} of the tensors that are cut, for {name: shape} of the whole model."""
    parts = {}
    for name, shape in shapes.items():
        module = name.split(".")[-2]
        if module in ROWS:
            parts[name] = (share(shape[0], rank, N), *[slice(None)] * (len(shape) - 1))
        elif module in COLUMNS and len(shape) == 2:
            parts[name] = (slice(None), share(shape[1], rank, N))
    return parts


def share(size, rank, N):
    """The slice of a rank: share(12, 1, 3) == slice(4, 8)."""
    return slice(rank * size // N, (rank + 1) * size // N)


def load_shard(path, config, ranks, dtype=None, device="cpu", tokens=0, quantize=None):
    """This rank's part of the Llama of a folder; the arguments are those of model.load_model."""
    with torch.device("meta"):
        shapes = shapes_of(Llama(config))
        model = Llama(local_config(config, ranks.rank, ranks.size))
    dtype = DTYPES[dtype] if isinstance(dtype, str) else dtype
    load_weights(model, path, dtype, device, quantize, shapes, parts_of(shapes, ranks.rank, ranks.size))
    model.eval().requires_grad_(False)
    model.use_ways(fastest_ways(model, tokens))
    add_up(model, ranks)
    return model


def add_up(model, ranks):
    """Let the outputs of o and down be the sums over ranks."""
    def total(module, inputs, out):
        return ranks.sum(out.float(), "sums").to(out.dtype)

    for block in model.model.layers:
        for module in (block.self_attn.o_proj, block.mlp.down_proj):
            if module.bias is not None and ranks.rank:
                module.bias = None
            module.register_forward_hook(total)
