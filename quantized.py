"""Weights in 8 or 4 bits, quantised while a checkpoint is loaded, or read as quantize.py has written them.

int8 has a scale for each output channel, int4 a scale and a zero for each group of 32 weights of an output channel. The
matrices of the layers are quantised, and an untied head, always in int8; embeddings, norms and biases stay as they are.
On a CPU a few rows are multiplied by torch's own operators, which read the integers as they lie; for more rows, and on
other devices, a block of the weight at a time is unpacked and multiplied. Does not: calibrate, or read GPTQ and AWQ.

    model, tokenizer = load("llama-7b", dtype="bfloat16", quantize="int8")

Letters: N output and K input channels; N' and K' are these up to whole tiles of 64 and whole groups of 32; R rows of x.
"""
import functools
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from checkpoint import read_tensors

BITS = {"int8": 8, "int4": 4}
GROUP, TILE = 32, 64
FEW = {8: 16, 4: 48}     # rows of x up to which the operators are faster than unpacking: for one row 4 and 20 times
BLOCK = 2 ** 20          # weights that are unpacked or quantised at once


# ---------------------------------------------------------------------------------------------------------------------
# int8: weight[n, k] = values[n, k] * scale[n]

def quantize_int8(weight):
    """values (N, K') int8 and scale (N,) float32 of a weight (N, K): the largest of each row becomes 127 or -127. Zeros
    fill up the last group, as torch's operator reads whole vectors."""
    weight = weight.float()
    scale = weight.abs().amax(1).clamp(min=1e-30) / 127
    values = (weight / scale[:, None]).round().to(torch.int8)
    return F.pad(values, (0, -weight.shape[1] % GROUP)), scale


def unpack_int8(values, scale, begin, end):
    """Rows begin to end of the weight, (end - begin, K'), in the type of the scale."""
    return values[begin:end].to(scale.dtype) * scale[begin:end, None]


# ---------------------------------------------------------------------------------------------------------------------
# int4: weight[n, k] = (number[n, k] - 8) * scale[k // 32, n, 0] + scale[k // 32, n, 1], numbers from 0 to 15

def quantize_int4(weight):
    """values (N'/64, K', 32) uint8, see pack, and scale (K'/32, N', 2) float32 of a weight (N, K): the least of each
    group becomes 0, the largest 15. What fills up the last group and the last tile repeats what is beside it."""
    N, K = weight.shape
    n = torch.arange(N + -N % TILE, device=weight.device).clamp(max=N - 1)
    k = torch.arange(K + -K % GROUP, device=weight.device).clamp(max=K - 1)
    groups = weight.float()[n][:, k].unflatten(1, (-1, GROUP))      # (N', K'/32, 32)
    least = groups.amin(-1)
    scale = (groups.amax(-1) - least).clamp(min=1e-30) / 15
    numbers = ((groups - least[..., None]) / scale[..., None]).round().to(torch.uint8)
    tiles = numbers.view(-1, TILE, len(k)).transpose(1, 2)          # (N'/64, K', 64)
    scale_and_zero = torch.stack((scale, least + 8 * scale), -1)    # (N', K'/32, 2)
    return pack(tiles), scale_and_zero.transpose(0, 1).contiguous()


def pack(tiles):
    """Two numbers of 4 bits a byte: tiles (T, K, size) of `size` output channels -> (T, K, size/2). The first half of a
    tile's channels are the low bits: torch's order on a CPU with AVX512 (size 64) or AVX2 (size 32)."""
    low, high = tiles.chunk(2, -1)
    return (low | (high << 4)).contiguous()


def unpack_numbers(values):
    """The inverse of pack."""
    return torch.cat((values & 15, values >> 4), -1)


def unpack_int4(values, scale, begin, end):
    """Rows begin to end of the weight, multiples of 64: (end - begin, K'), in the type of the scale."""
    size = 2 * values.shape[-1]
    numbers = unpack_numbers(values[begin // size:end // size])                # (T, K', size)
    numbers = numbers.to(scale.dtype).unflatten(1, (-1, GROUP))                # (T, K'/32, 32, size)
    scale = scale[:, begin:end].unflatten(1, (-1, size)).permute(3, 1, 0, 2)   # (2, T, K'/32, size)
    scale, zero = scale[:, :, :, None].contiguous()
    tiles = torch.addcmul(zero - 8 * scale, numbers, scale).flatten(1, 2)      # (T, K', size)
    return tiles.transpose(0, 1).flatten(1).T


@functools.cache
def operator_tile():
    """The size of tiles that torch's operator for int4 reads on this CPU; None where it is none that we know."""
    numbers = torch.arange(TILE * GROUP, dtype=torch.int32, device="cpu").view(TILE, GROUP) * 7 // 5 % 16
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers, 1)
    except (AttributeError, RuntimeError):
        return None
    for size in (64, 32):
        tiles = numbers.to(torch.uint8).view(-1, size, GROUP).transpose(1, 2)
        if torch.equal(pack(tiles).flatten(), packed.flatten()):
            return size
    return None


# ---------------------------------------------------------------------------------------------------------------------
# a layer

class QuantizedLinear(nn.Module):
    """x @ weight.T + bias with a weight of 8 or 4 bits, in place of a Linear. x (*, K) and the scales are of one type,
    float32, bfloat16 or float16; so is what comes out, (*, N)."""

    def __init__(self, linear, bits):
        super().__init__()
        self.bits = bits
        self.arranged = False   # as torch's operator reads it
        self.out_features, self.in_features = linear.weight.shape
        self.bias = linear.bias
        N = self.out_features + -self.out_features % TILE
        K = self.in_features + -self.in_features % GROUP
        if bits == 8:
            self.register_buffer("int8", torch.empty(self.out_features, K, dtype=torch.int8))
            self.register_buffer("scale", torch.empty(self.out_features))
        else:
            self.register_buffer("int4", torch.empty(N // TILE, K, TILE // 2, dtype=torch.uint8))
            self.register_buffer("scale", torch.empty(K // GROUP, N, 2))

    def forward(self, x):
        rows = F.pad(x.reshape(-1, self.in_features), (0, -self.in_features % GROUP))
        out = self.few(rows) if self.has_operator(rows) else self.many(rows)
        out = out[:, :self.out_features].view(*x.shape[:-1], -1)
        return out if self.bias is None else out + self.bias

    def has_operator(self, rows):
        """Whether torch's operator is there for these rows (R, K') and faster than unpacking."""
        is_there = self.arranged and rows.device.type == "cpu" and rows.dtype.itemsize <= 4
        return is_there and len(rows) <= FEW[self.bits]

    def few(self, rows):
        """The product of rows (R, K') by torch's operators."""
        if self.bits == 8:
            return torch.ops.aten._weight_int8pack_mm(rows.contiguous(), self.int8, self.scale)
        packed = self.int4.view(-1, rows.shape[1] // 2)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(rows.contiguous(), packed, GROUP, self.scale)

    def many(self, rows):
        """The product of rows (R, K') with a block of the unpacked weight after the other."""
        N = len(self.scale) if self.bits == 8 else self.scale.shape[1]
        step = rows_of_block(rows.shape[1])
        out = rows.new_empty(len(rows), N)
        for begin in range(0, N, step):
            end = min(begin + step, N)
            out[:, begin:end] = rows @ self.unpack(begin, end).T
        return out

    def unpack(self, begin, end):
        """Rows begin to end of the weight as the scales' type."""
        if self.bits == 8:
            return unpack_int8(self.int8, self.scale, begin, end)
        return unpack_int4(self.int4, self.scale, begin, end)

    def arrange(self):
        """Put int4 on a CPU into the tiles that its operator reads; files hold tiles of 64."""
        size = operator_tile()
        if self.bits == 4 and self.int4.device.type == "cpu" and size not in (None, TILE):
            tiles = unpack_numbers(self.int4).unflatten(-1, (-1, size))     # (N'/64, K', 64/size, size)
            self.int4 = pack(tiles.transpose(1, 2).flatten(0, 1))
        self.arranged = self.bits == 8 or 2 * self.int4.shape[-1] == size


def rows_of_block(K):
    """How many rows of K weights make a block, in whole tiles."""
    return max(1, BLOCK // K // TILE) * TILE


# ---------------------------------------------------------------------------------------------------------------------
# a model

def bits_asked(config, quantize=None):
    """The bits of a model's weights: as stored, or those of quantize, "int8" or "int4"; None for plain weights."""
    if quantize is None:
        return config.bits
    if quantize not in BITS:
        raise ValueError(f"quantize {quantize!r} is not one of {', '.join(BITS)}")
    if config.bits not in (None, BITS[quantize]):
        raise ValueError(f"the checkpoint is int{config.bits} already, and cannot become {quantize}")
    return BITS[quantize]


def quantize_layers(model, bits):
    """Put a QuantizedLinear in the place of every nn.Linear of a Llama on the meta device: {name: layer}."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    layers = {}
    with torch.device("meta"):
        for name, linear in linears.items():
            layers[name] = QuantizedLinear(linear, 8 if name == "lm_head" else bits)
            model.set_submodule(name, layers[name])
    return layers


def quantized_tensors(layer, name, dtype, weight):
    """{name: tensor} that stand for the weight (N, K) of a layer of this name, its scales in dtype, None: the weight's.
    A block of rows at a time, as float32 would be twice the weight."""
    values = torch.empty_like(layer.int8 if layer.bits == 8 else layer.int4, device=weight.device)
    scale = torch.empty_like(layer.scale, dtype=dtype or weight.dtype, device=weight.device)
    step = rows_of_block(weight.shape[1])
    for begin in range(0, len(weight), step):
        rows = weight[begin:begin + step]
        if layer.bits == 8:
            values[begin:begin + step], scale[begin:begin + step] = quantize_int8(rows)
        else:
            tiles = slice(begin // TILE, (begin + step) // TILE)
            values[tiles], scale[:, begin:begin + step] = quantize_int4(rows)
    return {f"{name}.int{layer.bits}": values, f"{name}.scale": scale}


def shapes_of(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def weights_of(model, path, dtype=None, device="cpu", quantize=None, shapes=None, parts=None):
    """Yield (name, tensor) for a Llama on the meta device, whose layers are changed to take them: the weights of a
    folder, each quantised as soon as it is read where that is asked for. shapes, parts: see load_weights."""
    bits = bits_asked(model.config, quantize)
    shapes = shapes or shapes_of(model)
    changes = {}
    if bits:
        layers = quantize_layers(model, bits)
        if model.config.bits:
            shapes = shapes_of(model)
        else:
            changes = {f"{name}.weight": partial(quantized_tensors, layer, name, dtype)
                       for name, layer in layers.items()}
    return read_tensors(path, shapes, dtype, device, changes, parts)


def load_weights(model, path, dtype=None, device="cpu", quantize=None, shapes=None, parts=None):
    """Give a Llama on the meta device the weights of a folder; see model.load.

    Where it is but a part of the model: shapes, {name: shape} of the whole one, and parts, see read_tensors.
    """
    tensors = weights_of(model, path, dtype, device, quantize, shapes, parts)
    model.load_state_dict(dict(tensors), assign=True)
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.arrange()
