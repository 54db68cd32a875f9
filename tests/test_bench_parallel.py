"""bench_parallel.py: one process's measurement, and what is computed for GPUs that are not here."""
import pytest
import torch

import bench_parallel
from bench_parallel import LLAMA_7B, seconds
from positions import Method


def test_one_process_measures_itself(tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(bench_parallel, "NEW", 2)
    out = tmp_path / "found.pt"
    assert bench_parallel.run(["--methods", "mesa", "--lengths", "300", "--out", str(out)]) == 0
    torch.set_num_threads(threads)
    found = torch.load(out, weights_only=True)["mesa", 300]
    assert found["prefill"] > 0 and not found["sent"] and len(found["tokens"]) == 2
    assert found["cache"] == 301 * 5 * 2 * 2 * 32 * 4  # tokens, layers, keys and values, heads, width, bytes


def test_one_gpu_computes_all_and_waits_for_nobody():
    """n = 2^13 tokens: 2 operations a weight and token, 4 x 4,096 a layer and pair."""
    n = 8193
    total, waited, crossed = seconds(LLAMA_7B, Method("rope"), n, 1)
    weights = 32 * (4 * 4096 ** 2 + 3 * 4096 * 11008)
    flops = 2 * weights * 8192 + 4 * 4096 * 32 * 8192 * 8193 / 2
    assert total == pytest.approx(flops / bench_parallel.FLOPS, rel=1e-6) and waited == crossed == 0


def test_more_gpus_are_faster_and_mesa_sends_little():
    rope, mesa = (seconds(LLAMA_7B, Method(name), 40001, 4) for name in ("rope", "mesa"))
    assert rope[0] < seconds(LLAMA_7B, Method("rope"), 40001, 1)[0] / 2
    assert mesa[0] < rope[0] and mesa[2] < rope[2] / 10
    keys = 2 * 32 * 128 * 2 * 32  # bytes of a token's keys and values in all layers
    wave = 4 * 8192
    rest = 40000 - wave
    fetched = 1.5 * wave + 3 * wave + 1.5 * rest  # of the ranks before in a wave; of others' in the wave before, ...
    assert rope[2] <= fetched * keys / 1e9 * 1.01
