"""What test_parallel.py runs on two ranks: a small run of train.py on few texts.

    torchrun --nproc-per-node 2 tests/ddp_case.py --out FOLDER ...
"""
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
import train  # noqa: E402
from cli import run_command  # noqa: E402

TEXTS = [f"The {a} cat sat on the {b} mat, and nobody in the {a} house asked why it was {b}. It slept."
         for a in ("grey", "old", "small", "quick") for b in ("red", "warm", "dusty", "round")]

if __name__ == "__main__":
    train.prose = lambda: TEXTS
    run_command(train.run, "train.py")
