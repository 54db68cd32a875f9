"""quantize.py: products are those of the definition, a model loses little, and a folder is what loading computes."""
import weakref

import pytest
import torch
from make_golden import PROMPT
from safetensors.torch import load_file, save_file
from torch import nn

import checkpoint
import eval_passkey
import quantize
import quantized as library
from generate import generate
from memory import estimate
from model import load
from positions import Method
from quantized import QuantizedLinear, quantize_int4, quantize_int8, quantized_tensors, unpack_int4, unpack_int8

ERRORS = {8: 0.009, 4: 0.078}  # of a product of normal random weights, relative
TYPES = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}  # of rounding


def error(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


def definition(weight, bits):
    """What a weight (N, K) becomes, group by group, in float64."""
    groups = []
    for group in weight.double().split(weight.shape[1] if bits == 8 else 32, 1):
        least = group.amin(1, keepdim=True) if bits == 4 else 0
        step = (group.amax(1, keepdim=True) - least) / 15 if bits == 4 else group.abs().amax(1, keepdim=True) / 127
        groups.append(((group - least) / step.clamp(min=1e-30)).round() * step + least)
    return torch.cat(groups, 1)


def quantized(weight, bits, dtype=torch.float32):
    """A QuantizedLinear of a weight (N, K), without bias."""
    layer = QuantizedLinear(nn.Linear(weight.shape[1], weight.shape[0], bias=False), bits)
    state = quantized_tensors(layer, "", dtype, weight)
    layer.load_state_dict({name[1:]: tensor for name, tensor in state.items()}, assign=True)
    layer.arrange()
    return layer


def test_a_worked_example():
    values, scale = quantize_int8(torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0]]))    # (2, 32) and (2,)
    assert values[:, :4].tolist() == [[64, -127, 32, 0], [0, 0, 0, 0]]
    assert scale[0] == 2 / 127 and unpack_int8(values, scale, 0, 1)[0, 1] == -2
    row = torch.arange(32.0)[None] / 2                      # from 0 to 15.5
    values, scale = quantize_int4(row)                      # (1, 32, 32) and (1, 64, 2)
    assert (values[0, :, 0] & 15).tolist() == [round(k * 15 / 31) for k in range(32)]
    assert (unpack_int4(values, scale, 0, 64)[:1] - row).abs().max() <= 15.5 / 15 / 2 + 1e-5


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("N, K", [(128, 256), (336, 128), (72, 336), (20, 33)])
@pytest.mark.parametrize("dtype", TYPES)
def test_products_are_those_of_the_definition(bits, N, K, dtype, monkeypatch):
    """By the operators, and unpacked in blocks; also where K is no multiple of 32, or N of 64; bias included."""
    torch.manual_seed(0)
    weight = torch.randn(N, K)
    layer = quantized(weight, bits, dtype)
    layer.bias = bias = nn.Parameter(torch.ones(N, dtype=dtype), requires_grad=False)
    monkeypatch.setattr(library, "BLOCK", 64 * K)
    for shape in ((1, 1, K), (2, 3, K), (40, K)):
        x = torch.randn(shape).to(dtype)
        want = x.double() @ definition(weight, bits).T + bias.double()
        for few in (0, 100):
            monkeypatch.setitem(library.FEW, bits, few)
            assert layer(x).dtype == dtype and error(layer(x), want) < TYPES[dtype]


@pytest.mark.parametrize("bits, tile", [(8, None), (4, 64), (4, 32), (4, None)])
def test_errors_are_small(bits, tile, monkeypatch):
    """In int4 with the order of channels of AVX512, of AVX2, and of a processor that has neither."""
    torch.manual_seed(0)
    weight, x = torch.randn(512, 1024), torch.randn(8, 1024)
    monkeypatch.setattr(library, "operator_tile", lambda: tile)
    assert 0.8 * ERRORS[bits] < error(quantized(weight, bits).many(x), x @ weight.T) < 1.02 * ERRORS[bits]


@pytest.mark.parametrize("name", ["int8", "int4"])
@torch.inference_mode()
def test_loading_and_a_folder(name, tmp_path, monkeypatch):
    """They compute the same; loading holds one matrix at a time; the weights take the bytes that --explain says; a
    passkey is still found; and results say that they are of quantised weights."""
    read, matrices = checkpoint.read_tensor, []

    def read_alone(file, name, *args):
        assert all(matrix() is None for matrix in matrices)
        tensor = read(file, name, *args)
        matrices.extend([weakref.ref(tensor)] if "proj" in name else [])
        return tensor
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "read_tensor", read_alone)
        model, tokenizer = load("tiny", quantize=name)
    held = sum(tensor.nbytes for tensor in model.state_dict().values()) / 2 ** 20
    assert estimate(model.config, Method("rope"), [9], 0, torch.float32, name).weights / 2 ** 20 == held < 1.5  # of 3.9
    monkeypatch.setattr(quantize, "SHARD", 2 ** 18)
    assert quantize.run(["tiny", str(tmp_path / "out"), "--bits", name[3:]]) == 0
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    written, _ = load(tmp_path / "out", quantize=name)
    ids = tokenizer.encode(PROMPT)
    assert torch.equal(*(m(torch.tensor([ids]), m.plan("mesa", n=len(ids))) for m in (model, written)))
    assert tokenizer.decode(list(generate(written, ids, max_new_tokens=6))).startswith("41827")
    flags = ["--ckpt", "tiny", "--quantize", name, "--lengths", "256", "--methods", "rope", "--trials", "1"]
    assert eval_passkey.run([*flags, "--depths", "2", "--results", str(tmp_path / "rows")]) == 0
    assert (tmp_path / "rows").read_text().count(f'"quantize": "{name}"') == 2


def test_wrong_input_is_one_line(tmp_path):
    out = tmp_path / "out"
    quantize.run(["tiny", str(out), "--bits", "4"])
    file, name = out / "model-00001.safetensors", "model.layers.0.mlp.up_proj.int4"

    def refused(words, call, *args, **settings):
        with pytest.raises(ValueError, match=f"^[^\n]*{words}[^\n]*$"):
            call(*args, **settings)
    refused("'int2' is not one of int8, int4", load, "tiny", quantize="int2")
    refused("int4 already", load, out, quantize="int8")
    refused("a checkpoint in it already", quantize.run, ["tiny", str(out)])
    save_file({**load_file(file), name: torch.zeros(6, 128, 32, dtype=torch.int8)}, file)
    refused(f"{name} is of type I8", load, out)
    save_file({"x": torch.zeros(1)}, file)
    refused("is here, but it is not", load, out)
    (out / "config.json").write_text((out / "config.json").read_text().replace('"bits": 4', '"bits": 2'))
    refused("unknown quantization", load, out)
