"""The Triton kernels without a GPU: run in Triton's interpreter against the oracle, and compiled ahead of time.

The interpreter is chosen for a whole process, so one test starts this file again with TRITON_INTERPRET=1. On a machine
with a GPU the same cases also run compiled. The compiled kernels' registers, stack and tensor-core instructions are
read from the binary.
"""
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from oracle import oracle

triton = pytest.importorskip("triton", minversion="3.4")

import kernels  # noqa: E402
from attention import attend  # noqa: E402
from positions import METHODS, make_plan  # noqa: E402

INTERPRETED = triton.knobs.runtime.interpret
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
runs = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs a GPU, or Triton's interpreter")
compiles = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")

SHAPES = {"prompt": (130, 0, 4, 2, 16), "piece of a prompt": (101, 71, 3, 3, 16), "decoding": (150, 149, 4, 1, 16),
          "decoding a head of its own": (77, 76, 2, 2, 32)}  # keys, first query, H, Hkv, D
COMPOSITIONS = [("mesa", {"freq": "alibi"}), ("mesa", {"overlap": 4, "cosine": 8.0}), ("dca", {"freq": "yarn"}),
                ("self-extend", {"freq": "yarn", "attn_scale": "infoscale"}), ("rerope", {"freq": "nope"}),
                ("streaming-llm", {"freq": "alibi", "attn_scale": "logn"})]
CASES = [(m, {}) for m in METHODS if m != "longrope"] + COMPOSITIONS


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
    plan = make_plan(method, torch.arange(begin, Tk), torch.arange(Tk), n=Tk, L=L, D=D, H=H, **params)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, T, heads, D, generator=g).to(DEVICE, dtype).transpose(1, 2)  # as the model makes them
               for heads, T in ((H, Tk - begin), (Hkv, Tk), (Hkv, Tk)))
    want = oracle(q.cpu(), k.cpu(), v.cpu(), plan)
    return float((attend(q, k, v, plan, "triton").cpu().double() - want).abs().max() / want.abs().max())


@runs
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("method, params", CASES, ids=str)
def test_every_method_equals_the_oracle(method, params, shape, small_tiles):
    rounding = 5e-6 if method != "cosscale" else 2e-5  # CosScale's logits reach 32
    assert error(method, params, shape) < rounding


@runs
@pytest.mark.parametrize("D", [16, 24, 64, 80, 128, 256])
def test_every_head_width(D):
    """With the tiles that ship; widths that are no power of two are padded."""
    assert error("mesa", {}, (90, 0, 2, 1, D)) < 5e-6
    assert error("mesa", {}, (90, 89, 2, 1, D)) < 5e-6


@runs
@pytest.mark.parametrize("dtype", [torch.float16] + [torch.bfloat16] * (DEVICE == "cuda"))
def test_half_precision(dtype):
    """(The interpreter multiplies bfloat16 bit patterns as integers, so bfloat16 needs a GPU.)"""
    for shape in SHAPES.values():
        assert error("mesa", {}, shape, dtype) < 2e-2


@compiles
@pytest.mark.skipif(DEVICE == "cuda", reason="the cases above have run compiled")
def test_in_the_interpreter():
    """The cases above, in a process of their own."""
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
                          env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-3000:]


@compiles
def test_missing_device_is_one_clear_sentence():
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="impl=triton: this machine lacks a CUDA device"):
            error("rope", {}, SHAPES["prompt"])


# ---------------------------------------------------------------------------------------------------------------------
# ahead of time, for GPUs that are not here

SHARED = {80: 166_912, 89: 101_376, 90: 232_448}  # bytes of shared memory per program


def compiled(function, constants, pointers, arch, warps, stages):
    """(registers, stack bytes, tensor-core instructions) of a kernel for sm_{arch}; pointers and strides are aligned to
    16 bytes, as the JIT finds them."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    names = function.arg_names
    strides = [n for n in names if n[1:2] == "_"]
    kinds = {**dict.fromkeys(names, "i32"), "scale": "fp32", **dict.fromkeys(strides, "i64"), **pointers,
             **dict.fromkeys(constants, "constexpr")}
    aligned = [*pointers, *strides]
    source = ASTSource(fn=function, signature={n: kinds[n] for n in names},
                       constexprs={(names.index(n),): v for n, v in constants.items()},
                       attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned})
    options = {"num_warps": warps, "num_stages": stages}
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage, code = (subprocess.run([tools / tool, flag, file.name], capture_output=True, text=True).stdout
                       for tool, flag in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c")))
    assert binary.metadata.shared <= (SHARED[arch] if function is kernels.prefill_kernel else SHARED[89])
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return registers, stack, len(re.findall(r"\bHG?MMA\b", code))


def prefill_binary(D, arch, tilt=False):
    BM, BN, warps, stages = kernels.PREFILL.get((2, D), kernels.SMALL)
    stages = kernels.fitting(stages, BM, BN, D * 2, SHARED[arch])
    constants = dict(TILT=tilt, D=D, DP=D, BM=BM, BN=BN, PRECISION="tf32")
    pointers = dict(Q="*bf16", K="*bf16", V="*bf16", OUT="*bf16", START="*i32", END="*i32", QPOS="*fp32", KPOS="*fp32",
                    TILTS="*fp32", COPY="*i64")
    return compiled(kernels.prefill_kernel, constants, pointers, arch, warps, stages)


def decode_binary(D, arch, size=2):
    BN, warps, stages = kernels.DECODE.get((size, D), kernels.SMALL_DECODE)
    kind, precision = {2: ("*bf16", "tf32"), 4: ("*fp32", "ieee")}[size]
    constants = dict(TILT=False, G=4, GP=16, D=D, EP=max(16, D // 2), DP=D, BN=BN, PRECISION=precision)
    pointers = dict(Q=kind, K=kind, V=kind, TURN="*i32", COS="*fp32", SIN="*fp32", DISTANCE="*fp32",
                    TILTS="*fp32", BLOCKS="*i32", OUT="*fp32", LSE="*fp32")
    return compiled(kernels.decode_kernel, constants, pointers, arch, warps, stages)


@compiles
@pytest.mark.parametrize("arch, D", [(90, 64), (90, 128), (80, 64)])
def test_prefill_uses_tensor_cores_and_spills_nothing(arch, D):
    registers, stack, products = prefill_binary(D, arch)
    print(f"prefill sm_{arch} D={D}: {registers} registers, {stack} bytes of stack, {products} tensor-core products")
    assert registers <= 255 and stack == 0 and products > 0


@compiles
@pytest.mark.parametrize("arch, D", [(90, 64), (90, 128), (80, 64), (80, 128)])
def test_decoding_uses_tensor_cores_and_spills_nothing(arch, D):
    registers, stack, products = decode_binary(D, arch)
    print(f"decode sm_{arch} D={D}: {registers} registers, {stack} bytes of stack, {products} tensor-core products")
    assert registers <= 255 and stack == 0 and products > 0


@compiles
@pytest.mark.parametrize("arch", [80, 89, 90])
def test_everything_else_fits_in_shared_memory(arch):
    """With ALiBi; the widest heads, and width 128 on an sm_80 or sm_89, which spill a little."""
    prefill_binary(128, arch, tilt=True)
    prefill_binary(256, arch)
    prefill_binary(128, arch)
    for D in (128, 256):
        decode_binary(D, arch, size=4)
        decode_binary(D, arch)
