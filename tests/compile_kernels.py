"""Compile the Triton kernels ahead of time for GPUs that are not here, and print what became of them as JSON.

    python tests/compile_kernels.py       # {"prefill sm_90 D=64": {"registers": 168, "stack": 0, ...}, ...}

test_kernels.py runs it in a process of its own, as Triton's interpreter is chosen for a whole process.
"""
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import kernels  # noqa: E402

SHARED = {80: 166_912, 89: 101_376, 90: 232_448}  # bytes of shared memory that a program may have


def compiled(function, constants, pointers, arch, warps, stages):
    """What a kernel becomes for sm_{arch}; pointers and strides are aligned to 16 bytes, as the JIT finds them."""
    names = function.arg_names
    strides = [name for name in names if name[1:2] == "_"]
    kinds = dict.fromkeys(names, "i32") | dict.fromkeys(strides, "i64") | {"scale": "fp32"}
    kinds = kinds | pointers | dict.fromkeys(constants, "constexpr")
    aligned = [*pointers, *strides]
    source = ASTSource(fn=function, signature=kinds,
                       constexprs={(names.index(name),): value for name, value in constants.items()},
                       attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned})
    options = {"num_warps": warps, "num_stages": stages}
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    usage = look_into(binary, "cuobjdump", "-res-usage")
    code = look_into(binary, "nvdisasm", "-c")
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return {"registers": int(registers), "stack": int(stack), "shared": binary.metadata.shared,
            "products": len(re.findall(r"\bHG?MMA\b", code))}


def look_into(binary, tool, flag):
    """What one of Triton's own tools says of a binary."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        return subprocess.run([tools / tool, flag, file.name], capture_output=True, text=True).stdout


def prefill_binary(D, arch, tilt=False):
    """The prefill kernel for bfloat16."""
    BM, BN, warps, stages = kernels.PREFILL.get((2, D), kernels.SMALL)
    stages = kernels.fitting_stages(stages, BM, BN, D * 2, SHARED[arch])
    constants = dict(TILT=tilt, D=D, DP=D, BM=BM, BN=BN, PRECISION="tf32")
    pointers = dict(Q="*bf16", K="*bf16", V="*bf16", OUT="*bf16", LSE="*fp32", START="*i32", END="*i32",
                    QPOS="*fp32", KPOS="*fp32", TILTS="*fp32", KEYSET="*i64")
    return compiled(kernels.prefill_kernel, constants, pointers, arch, warps, stages)


def decode_binary(D, arch, size=2, rotary_dim=None):
    """The decoding kernel for bfloat16, or for float32 with size 4."""
    BN, warps, stages = kernels.DECODE.get((size, D), kernels.SMALL_DECODE)
    kind = {2: "*bf16", 4: "*fp32"}[size]
    constants = dict(TILT=False, G=4, GP=16, D=D, RD=rotary_dim or D, INTERLEAVED=False, EP=max(16, D // 2), DP=D,
                     BN=BN, PRECISION={2: "tf32", 4: "ieee"}[size])
    pointers = dict(Q=kind, K=kind, V=kind, ANGLE="*i32", COS="*fp32", SIN="*fp32", DISTANCE="*fp32",
                    TILTS="*fp32", BLOCKS="*i32", OUT="*fp32", LSE="*fp32")
    return compiled(kernels.decode_kernel, constants, pointers, arch, warps, stages)


def main():
    found = {
        "prefill sm_80 D=64": prefill_binary(64, 80),
        "prefill sm_90 D=128": prefill_binary(128, 90),
        "prefill sm_80 D=128 ALiBi": prefill_binary(128, 80, tilt=True),
        "prefill sm_89 D=128 ALiBi": prefill_binary(128, 89, tilt=True),
        "prefill sm_89 D=256": prefill_binary(256, 89),
        "decode sm_80 D=64": decode_binary(64, 80),
        "decode sm_90 D=128": decode_binary(128, 90),
        "decode sm_90 D=128 half rotary": decode_binary(128, 90, rotary_dim=64),
        "decode sm_89 D=256": decode_binary(256, 89),
        "decode sm_89 D=256 fp32": decode_binary(256, 89, size=4),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
