"""The Triton kernels without a GPU: run in Triton's interpreter against the oracle, and compiled ahead of time.

conftest.py chooses the interpreter for the whole run where there is no GPU; with one the same cases run compiled. The
compiled kernels' registers, stack and tensor-core instructions are read from the binary, in a process of its own.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracle import oracle

triton = pytest.importorskip("triton", minversion="3.4")

import kernels  # noqa: E402
from attention import attend  # noqa: E402
from frequencies import FREQUENCIES, SCALES  # noqa: E402
from geometry import METHODS  # noqa: E402
from positions import make_plan  # noqa: E402

DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"
PROMPT = (70, 0, 2, 1, 16)  # keys, first query, H, Hkv, D
PIECE = (70, 45, 1, 1, 16)
DECODING = (133, 132, 4, 2, 16)
CASES = [*((method, {}) for method in METHODS), ("mesa", {"freq": "alibi"}), ("mesa", {"overlap": 4, "cosine": 8.0}),
         ("dca", {"freq": "yarn"}), ("streaming-llm", {"freq": "alibi", "attn_scale": "logn"}),
         ("mesa", {"rotary_dim": 8}), ("mesa", {"interleaved": True}), ("leaky-rerope", {"rotary_dim": 12}),
         ("leaky-rerope", {"interleaved": True, "rotary_dim": 12})]


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 32, so that short inputs have edges and insides, and three shares in decoding."""
    monkeypatch.setattr(kernels, "PREFILL", {})
    monkeypatch.setattr(kernels, "SMALL", (32, 32, 4, 2))
    monkeypatch.setattr(kernels, "DECODE", {})
    monkeypatch.setattr(kernels, "SMALL_DECODE", (32, 4, 2))
    monkeypatch.setattr(kernels, "SPLITS", 3)


def error(method, params, shape, dtype=torch.float32, L=40):
    """The largest error of attend(impl="triton") as a part of the largest value."""
    Tk, begin, H, Hkv, D = shape
    if method == "longrope":  # its factors are found by search and kept in config.json; here made up
        params = {"short_factor": [1.0] * (D // 2), "long_factor": [1.0 + p for p in range(D // 2)], "factor": 4.0}
    plan = make_plan(method, torch.arange(begin, Tk), torch.arange(Tk), n=Tk, L=L, D=D, H=H, **params)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, T, heads, D, generator=generator).to(DEVICE, dtype).transpose(1, 2)  # as the model's
               for heads, T in ((H, Tk - begin), (Hkv, Tk), (Hkv, Tk)))
    want = oracle(q.cpu(), k.cpu(), v.cpu(), plan)
    return float((attend(q, k, v, plan, "triton").cpu().double() - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("method, params", CASES, ids=str)
def test_every_method_equals_the_oracle(method, params, small_tiles):
    """Prefill and decoding; of a prompt a piece where only numbers change, as q and k come to its kernel rotated."""
    rounding = 5e-6 if method != "cosscale" else 2e-5  # CosScale's logits reach 32
    only_numbers = method in FREQUENCIES or method in SCALES
    prefill = PIECE if only_numbers and method != "alibi" else PROMPT
    assert error(method, params, prefill) < rounding
    assert error(method, params, DECODING) < rounding


@pytest.mark.parametrize("D", [24, 64, 80, 256])
def test_every_head_width(D):
    """With the tiles that ship; widths that are no power of two are padded. A piece of a prompt, and decoding alone."""
    assert error("mesa", {}, (90, 20, 2, 1, D)) < 5e-6
    assert error("mesa", {}, (90, 89, 2, 2, D)) < 5e-6


@pytest.mark.parametrize("dtype", [torch.float16] + [torch.bfloat16] * (DEVICE == "cuda"))
def test_half_precision(dtype):
    """(The interpreter multiplies bfloat16 bit patterns as integers, so bfloat16 needs a GPU.)"""
    for shape in (PROMPT, PIECE, DECODING):
        assert error("mesa", {}, shape, dtype) < 2e-2


@pytest.mark.skipif(DEVICE == "cuda", reason="there is one")
def test_a_missing_device_is_one_clear_sentence(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match="impl=triton: this machine lacks a CUDA device"):
        error("rope", {}, PROMPT)


# ---------------------------------------------------------------------------------------------------------------------
# ahead of time, for GPUs that are not here

@pytest.fixture(scope="module")
def binaries():
    """{kernel and GPU: registers, stack bytes, shared bytes, tensor-core products} by compile_kernels.py."""
    if not (Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump").exists():
        pytest.skip("this Triton has no tools to look into a binary")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, Path(__file__).with_name("compile_kernels.py")], env=environment, check=True,
                          capture_output=True, text=True)
    return json.loads(done.stdout)


SHARED = {"sm_80": 166_912, "sm_89": 101_376, "sm_90": 232_448}  # bytes of shared memory that a program may have


def test_everything_fits_in_shared_memory(binaries):
    """All widths, with ALiBi, with a rotary width below the head's; decoding fits the smallest card everywhere."""
    for name, found in binaries.items():
        smallest = SHARED["sm_89"] if name.startswith("decode") else SHARED[name.split()[1]]
        assert found["shared"] <= smallest, (name, found)


@pytest.mark.parametrize("name", ["prefill sm_90 D=128", "prefill sm_80 D=64", "decode sm_90 D=128",
                                  "decode sm_80 D=64"])
def test_usual_widths_use_tensor_cores_and_spill_nothing(name, binaries):
    found = binaries[name]
    assert found["registers"] <= 255 and found["stack"] == 0 and found["products"] > 0, found
