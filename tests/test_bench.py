"""bench.py: races are fair, wrong candidates are not timed, every section runs, and rows say where they were made."""
import json

import pytest
import torch

import bench
from test_generate import run

SMALL = ("--lengths", "600", "--rounds", "1", "--threads", "1", "--heads", "2", "--width", "16", "--device", "cpu")


def rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_race_takes_turns():
    """One unmeasured round, then round after round, so that a slow spell of the machine hits all alike."""
    order = []
    times, _ = bench.race({name: lambda name=name: order.append(name) for name in "abc"}, 2, "cpu")
    assert "".join(order) == "abcabcabc" and {name: len(t) for name, t in times.items()} == dict.fromkeys("abc", 2)


def test_peak_is_what_a_call_takes():
    """32 MiB more than before; the second time as well, although the first has freed its memory."""
    found = [bench.peak(lambda: torch.ones(2 ** 23).sum(), "cpu") / 2 ** 20 for _ in range(2)]
    assert all(31 < mib < 36 for mib in found) or found[0] != found[0]


def test_a_wrong_candidate_is_not_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "attend", lambda q, k, v, *_: q)
    with pytest.raises(ValueError, match="wrong by"):
        bench.run(["attention", *SMALL, "--results", str(tmp_path / "b.jsonl")])


def test_pairs_are_those_of_the_plan():
    """Causal attention has T (T + 1) / 2 pairs, 4 sinks, 10 recent keys and itself at most 15."""
    args = bench.parse_args(["attention"])
    plans = [bench.plan_of(args, spec, torch.arange(40), 40) for spec in ("rope", "streaming-llm:recent=10")]
    assert [int(bench.seen(plan).sum()) for plan in plans] == [820, 15 * 16 // 2 + 25 * 15]


@pytest.mark.parametrize("section, fields", [
    ("attention", {"x pytorch", "TFLOP/s", "peak MiB"}), ("decode", {"x pytorch", "faster than rotating all"})])
def test_layer_sections(section, fields, tmp_path):
    code, out, _ = run(section, *SMALL, "--results", tmp_path / "b.jsonl", script="bench.py")
    found = rows(tmp_path / "b.jsonl")
    assert code == 0 and "ceilings" in out and len(found) >= len(bench.METHODS) + 1
    assert all(fields | {"load", "torch", "threads", "command", "copy GB/s"} <= row.keys() for row in found)
    first = next(row for row in found if row["method"].startswith("pytorch"))
    assert first["x pytorch"] == 1 and all(row["best ms"] <= row["ms"] for row in found)


def test_whole_models_and_loading(tmp_path, monkeypatch):
    """A random checkpoint is written once, gives transformers the same logits, and both are timed."""
    monkeypatch.setitem(bench.SHAPES, "110m", (2, 32, 4, 2, 64, 1200, 256))
    args = "--lengths", "40", *SMALL[2:], "--scratch", str(tmp_path), "--results", str(tmp_path / "b.jsonl")
    bench.run(["model", *args])
    written = (tmp_path / "bench-110m" / "config.json").stat().st_mtime_ns
    bench.run(["load", *args])
    assert written == (tmp_path / "bench-110m" / "config.json").stat().st_mtime_ns
    sections = [row["section"] for row in rows(tmp_path / "b.jsonl")]
    assert sections.count("prefill") >= 2 and sections.count("decode model") >= 2 and "load" in sections
    assert all(row["tokens/s"] > 0 for row in rows(tmp_path / "b.jsonl") if row["section"] == "prefill")


def test_picture(tmp_path):
    pytest.importorskip("matplotlib")
    run("attention", *SMALL, "--methods", "rope,mesa", "--results", tmp_path / "b.jsonl", "--plot", tmp_path / "b.png",
        script="bench.py")
    assert (tmp_path / "b.png").stat().st_size > 1000


@pytest.mark.parametrize("args, named", [
    (("attention", "--methods", "ropee"), "ropee"), (("attention", "--lengths", "0"), "0"), (("fly",), "fly"),
    (("attention", "--kv-heads", "3"), "kv-heads"), (("kernel", "--device", "cpu"), "CUDA")])
def test_bad_input_is_one_clear_line(args, named, tmp_path):
    code, _, err = run(*args, "--results", tmp_path / "b.jsonl", script="bench.py")
    assert code == 2 and named in err.splitlines()[-1] and "Traceback" not in err
    assert not (tmp_path / "b.jsonl").exists()
