"""bench.py: races are fair, wrong candidates are not timed, every section runs, and rows say where they were made."""
import gc
import json

import pytest
import torch

import bench
from cli import run_command
from plan import visible_keys
from positions import Method

SMALL = ["--rounds", "1", "--threads", "1", "--heads", "2", "--width", "16", "--device", "cpu"]
TINY = bench.Shape(layers=2, width=32, heads=4, kv_heads=2, mlp_width=64, train_len=256, vocabulary=1200)
CEILINGS = {"matmul bfloat16 TFLOP/s": 1.0, "copy GB/s": 10.0}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The ceilings are measured by one test alone, and what the others have left is no garbage to be collected whenever
    memory is measured. Whatever the threads of a command, other tests keep theirs."""
    monkeypatch.setattr(bench, "ceilings", lambda device: CEILINGS)
    threads = torch.get_num_threads()
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


def rows_in(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


# ---- measuring

def test_race_takes_turns():
    """One unmeasured round, then round after round, so that a slow spell of the machine hits all alike."""
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    measured = bench.race(calls, 2, "cpu")
    assert "".join(order) == "abc" + "abc" + "abc"
    assert [len(measured[name].seconds) for name in "abc"] == [2, 2, 2]


def test_median_and_best():
    measured = bench.Measured([3.0, 1.0, 10.0], peak=0)
    assert (measured.median, measured.best) == (3.0, 1.0)


def test_peak_is_what_a_call_takes():
    """32 MiB more than before; the second time as well, although the first has freed its memory."""
    for _ in range(2):
        found = bench.peak(lambda: torch.ones(2 ** 23).sum(), "cpu") / 2 ** 20
        assert 31 < found < 36 or found != found  # nan where the platform does not say


def test_pairs_are_those_of_the_plan():
    """40 tokens: 40 * 41 / 2 pairs for causal attention; with 4 sinks, 10 recent keys and itself 15 a query at most."""
    args = bench.parse_args(["attention"])
    for text, pairs in (("rope", 820), ("streaming-llm:recent=10", 15 * 16 // 2 + 25 * 15)):
        plan = bench.layer_plan(args, Method.parse(text), torch.arange(40), 40)
        assert int(visible_keys(plan).sum()) == pairs


def test_a_wrong_candidate_is_not_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "attend", lambda q, k, v, *_: q)
    for section in ("attention", "decode"):
        with pytest.raises(ValueError, match="rope is wrong by"):
            bench.run([section, *SMALL, "--lengths", "64", "--results", str(tmp_path / "b.jsonl")])
    assert not (tmp_path / "b.jsonl").exists()


def test_two_matrices_are_checked_against_rerope(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "two_matrices", lambda q, k, v, plan: q)
    with pytest.raises(ValueError, match="two matrices is wrong by"):
        bench.run(["attention", *SMALL, "--lengths", "600", "--methods", "rerope:window=512",
                   "--results", str(tmp_path / "b.jsonl")])


def test_ceilings(monkeypatch):
    monkeypatch.undo()
    found = bench.ceilings("cpu", width=512, numbers=2 ** 16)
    assert found.keys() == {"matmul float32 TFLOP/s", "matmul bfloat16 TFLOP/s", "copy GB/s"}
    assert min(found.values()) > 0


# ---- tables

@pytest.mark.parametrize("value, text", [
    (0.123456, "0.123"), (12.3456, "12.3"), (1234.56, "1235"), (float("nan"), ""), (4096, "4096"), ("rope", "rope")])
def test_cells(value, text):
    assert bench.cell(value) == text


@pytest.mark.parametrize("loads, busy", [((0.3, 1.5), False), ((1.6, 1.0), True), ((0.1, 1.6), True),
                                         ((None, None), False)])
def test_a_table_made_on_a_busy_machine_says_so(loads, busy, tmp_path, monkeypatch, capsys):
    """One thread of our own makes a load of 1; above 1.5 others are at work."""
    answers = iter(loads)
    monkeypatch.setattr(bench, "load_average", lambda: next(answers))
    torch.set_num_threads(1)
    args = bench.parse_args(["attention", "--device", "cpu", "--results", str(tmp_path / "b.jsonl")])
    bench.Report(args, ["attention"]).add("attention", "a table", [{"method": "rope", "ms": 1.0}])
    out = capsys.readouterr().out
    assert f"a table (load {loads[0]} before, {loads[1]} after)" in out
    assert ("(machine busy)" in out) == busy
    [row] = rows_in(tmp_path / "b.jsonl")
    assert (row["load_before"], row["load"], row["busy"]) == (*loads, busy)


# ---- sections

@pytest.mark.parametrize("section, fields", [
    ("attention", {"x pytorch", "TFLOP/s", "peak MiB"}), ("decode", {"x pytorch", "faster than rotating all"})])
def test_sections_of_one_layer(section, fields, tmp_path, capsys):
    """Every method and PyTorch's own call; rows say where they were made. Grouped heads in decoding."""
    heads = ["--kv-heads", "1"] if section == "decode" else []
    assert bench.run([section, *SMALL, *heads, "--lengths", "600", "--results", str(tmp_path / "b.jsonl")]) == 0
    out = capsys.readouterr().out
    assert "ceilings" in out and "| method |" in out and "load" in out
    rows = rows_in(tmp_path / "b.jsonl")
    assert {str(Method.parse(text)) for text in bench.LAYER_METHODS} < {row["method"] for row in rows}
    where = {"section", "load", "load_before", "torch", "threads", "command", "copy GB/s"}
    for row in rows:
        assert fields | where <= row.keys() and row["best ms"] <= row["ms"]
    assert rows[0]["method"].startswith("pytorch") and rows[0]["x pytorch"] == 1


def test_a_random_checkpoint_is_written_once(tmp_path, monkeypatch):
    """A shard for each layer and one for the rest; a folder that is there is taken as it is."""
    monkeypatch.setitem(bench.SHAPES, "110m", TINY)
    args = bench.parse_args(["load", "--scratch", str(tmp_path)])
    folder = bench.random_checkpoint(args)
    written = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert sorted(written) == ["config.json", "model-0.safetensors", "model-1.safetensors", "model-rest.safetensors",
                               "model.safetensors.index.json"]
    assert bench.random_checkpoint(args) == folder
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == written


def test_whole_models(tmp_path, monkeypatch):
    """Prefill and decoding; transformers, where it is installed, has the same logits and is the measure."""
    monkeypatch.setitem(bench.SHAPES, "110m", TINY)
    results = tmp_path / "b.jsonl"
    bench.run(["model", *SMALL, "--lengths", "40", "--scratch", str(tmp_path), "--results", str(results)])
    for section, title in (("prefill", "prefill"), ("decode model", "decode")):
        rows = {row[title]: row for row in rows_in(results) if row["section"] == section}
        assert {"rope", "mesa"} <= rows.keys()
        assert all(row["tokens/s"] > 0 for row in rows.values())
        if "transformers sdpa" in rows:
            assert rows["transformers sdpa"]["x transformers sdpa"] == 1 and rows["rope"]["x transformers sdpa"] > 0


def test_loading_is_a_median_without_the_first_turn(tmp_path, monkeypatch, capsys):
    """The first turn, which may find a cold file cache, does not count."""
    monkeypatch.setitem(bench.SHAPES, "110m", TINY)
    monkeypatch.setattr(bench, "machine", lambda device: {"threads": 1})  # as if transformers were not installed
    turns = iter([bench.Loading(9.0, 9.0, 9e9), bench.Loading(1.0, 2.0, 1e5), bench.Loading(3.0, 4.0, 2e5),
                  bench.Loading(2.0, 5.0, 3e5)])
    monkeypatch.setattr(bench, "run_load_alone", lambda engine, folder: next(turns))
    results = tmp_path / "b.jsonl"
    bench.run(["load", "--rounds", "3", "--device", "cpu", "--scratch", str(tmp_path), "--results", str(results)])
    [row] = rows_in(results)
    size = sum(file.stat().st_size for file in (tmp_path / "bench-110m").glob("*.safetensors"))
    assert (row["engine"], row["load s"], row["load and read s"]) == ("ours", 2.0, 4.0)
    assert row["peak / weights"] == 2e5 / size and "loading 110m, 3 shards" in capsys.readouterr().out


def test_loading_in_a_process_of_its_own(tmp_path, monkeypatch):
    """The folder may be relative to where the command is given; an error in there is an error here."""
    monkeypatch.setitem(bench.SHAPES, "110m", TINY)
    monkeypatch.chdir(tmp_path)
    folder = bench.random_checkpoint(bench.parse_args(["load", "--scratch", "."]))
    loaded = bench.run_load_alone("ours", folder)
    assert 0 < loaded.load <= loaded.read
    monkeypatch.setattr(bench, "LOADING", "raise SystemExit('no room')")
    with pytest.raises(ValueError, match="loading with ours failed: no room"):
        bench.run_load_alone("ours", folder)


def test_picture_of_the_latest_rows(tmp_path):
    pytest.importorskip("matplotlib")
    results = tmp_path / "b.jsonl"
    old = [{"section": "attention", "method": "rope", "tokens": 64, "us/token": 1.0, "peak MiB": 1.0},
           {"section": "decode", "method": "rope", "keys": 64}]
    results.write_text("".join(json.dumps(row) + "\n" for row in old))
    bench.run(["attention", *SMALL, "--lengths", "64", "--methods", "rope,mesa", "--results", str(results),
               "--plot", str(tmp_path / "b.png")])
    latest = bench.latest_attention(results)
    assert sorted(row["method"] for row in latest) == ["mesa", "pytorch causal", "rope"]
    assert all("command" in row for row in latest)
    assert (tmp_path / "b.png").stat().st_size > 1000


# ---- the command line

def test_flags_may_be_spelled_with_underscores():
    assert bench.parse_args(["attention", "--kv_heads", "4"]) == bench.parse_args(["attention", "--kv-heads", "4"])


@pytest.mark.parametrize("args, named", [
    (["attention", "--methods", "ropee"], "did you mean rope"), (["attention", "--lengths", "0"], "0"),
    (["attention", "--kv-heads", "3"], "kv-heads"), (["kernel", "--device", "cpu"], "CUDA"), (["fly"], "fly")])
def test_bad_input_is_one_clear_line(args, named, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        run_command(lambda: bench.run([*args, "--results", str(tmp_path / "b.jsonl")]), "bench.py")
    assert end.value.code == 2 and named in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "b.jsonl").exists()
