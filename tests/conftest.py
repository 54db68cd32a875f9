"""Shared by all test files: Triton's interpreter, one thread, the real checkpoints where present, one way to cut."""
import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton: kernels then run on the CPU, in this process
torch.set_num_threads(1)  # these tensors are tiny: two threads take three times as long on a busy machine
ASSETS = Path(__file__).parents[2] / "shared/assets"


@pytest.fixture
def asset():
    """asset("tok105") -> the folder of a real checkpoint or tokenizer; skips the test where it is absent."""
    def find(name):
        if not (ASSETS / name).is_dir():
            pytest.skip(f"{ASSETS / name} is not here")
        return ASSETS / name
    return find


@pytest.fixture
def cut():
    """cut(130) -> (0, 10), (10, 37), (37, 55), (55, 56), ...: uneven pieces, single tokens, one large rest."""
    def ranges(total):
        sizes = []
        left = total
        for size in [10, 27, 18, 1, 1, 1, 1, max(1, total - 66), *[1] * total]:
            if left:
                sizes.append(min(size, left))
                left -= sizes[-1]
        ends = torch.tensor(sizes).cumsum(0).tolist()
        return list(zip([0] + ends, ends))
    return ranges
