"""bench.py: races are fair, wrong candidates are not timed, every section runs, and rows say where they were made."""
import gc
import json
from types import SimpleNamespace

import pytest
import torch

import bench
import bench_llama_cpp
from cli import run_command
from config import Config
from model import load_model
from positions import Method
from rotation import rotate

SMALL = ["--rounds", "1", "--threads", "1", "--heads", "2", "--width", "16", "--device", "cpu"]
TINY = bench.Shape(layers=2, width=32, heads=4, kv_heads=2, mlp_width=64, train_len=256, vocabulary=1200)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The ceilings are measured by one test alone, and what the others have left is no garbage to be collected whenever
    memory is measured. Whatever the threads of a command, other tests keep theirs."""
    monkeypatch.setattr(bench, "ceilings", lambda device: {"matmul bfloat16 TFLOP/s": 1.0, "copy GB/s": 10.0})
    monkeypatch.setitem(bench.SHAPES, "110m", TINY)
    threads = torch.get_num_threads()
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


@pytest.fixture
def file(tmp_path):
    """The results file."""
    return tmp_path / "b.jsonl"


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


def test_peak_is_what_a_call_takes():
    """32 MiB more than before; the second time as well, although the first has freed its memory."""
    for _ in range(2):
        found = bench.peak(lambda: torch.ones(2 ** 23).sum(), "cpu") / 2 ** 20
        assert 31 < found < 36 or found != found  # nan where the platform does not say


@pytest.mark.parametrize("section, broken, args, named", [
    ("attention", "attend", ["--lengths", "64"], "rope is wrong by"),
    ("decode", "attend", ["--lengths", "64"], "rope is wrong by"),
    ("attention", "two_matrices", ["--lengths", "600", "--methods", "rerope:window=512"], "two matrices is wrong by")])
def test_a_wrong_candidate_is_not_timed(section, broken, args, named, file, monkeypatch):
    monkeypatch.setattr(bench, broken, lambda q, *_: q)
    with pytest.raises(ValueError, match=named):
        bench.run([section, *SMALL, *args, "--results", str(file)])
    assert not file.read_text()


def test_ceilings(monkeypatch):
    monkeypatch.undo()
    found = bench.ceilings("cpu", width=512, numbers=2 ** 16)
    assert found.keys() == {"matmul float32 TFLOP/s", "matmul bfloat16 TFLOP/s", "copy GB/s"}
    assert min(found.values()) > 0


def test_a_busy_machine():
    """One thread of our own makes a load of 1; above 1.5 others are at work."""
    assert bench.is_busy((1.6, 1.0), threads=1) and bench.is_busy((0.1, 1.6), threads=1)
    assert not bench.is_busy((0.3, 1.5), threads=1) and not bench.is_busy((None, None), threads=1)


# ---- sections

@pytest.mark.parametrize("section, flags, fields", [
    ("attention", [], {"x pytorch", "TFLOP/s", "peak MiB"}),
    ("decode", ["--kv-heads", "1"], {"x pytorch", "faster than rotating all"})])
def test_sections_of_one_layer(section, flags, fields, file, capsys):
    """Every method and PyTorch's own call; rows say where they were made."""
    assert bench.run([section, *SMALL, *flags, "--lengths", "600", "--results", str(file)]) == 0
    assert "| method |" in capsys.readouterr().out
    rows = rows_in(file)
    assert {str(Method.parse(text)) for text in bench.LAYER_METHODS} < {row["method"] for row in rows}
    where = {"section", "load", "load_before", "busy", "torch", "threads", "command", "copy GB/s"}
    for row in rows:
        assert fields | where <= row.keys() and row["best ms"] <= row["ms"]
    assert rows[0]["method"].startswith("pytorch") and rows[0]["x pytorch"] == 1


def test_whole_models(file, tmp_path):
    """Prefill and decoding; transformers, where it is installed, has the same logits and is the measure."""
    bench.run(["model", *SMALL, "--lengths", "40", "--scratch", str(tmp_path), "--results", str(file)])
    for section, title in (("prefill", "prefill"), ("decode model", "decode")):
        rows = {row[title]: row for row in rows_in(file) if row["section"] == section}
        assert {"rope", "mesa"} <= rows.keys()
        assert all(row["tokens/s"] > 0 for row in rows.values())
        if "transformers sdpa" in rows:
            assert rows["transformers sdpa"]["x transformers sdpa"] == 1 and rows["rope"]["x transformers sdpa"] > 0


def test_rows_at_once(file, tmp_path):
    """Together, one by one, and padded where transformers is installed; how many times one row's tokens come out."""
    bench.run(["batch", *SMALL, "--lengths", "40", "--methods", "mesa", "--scratch", str(tmp_path), "--results",
               str(file)])
    rows = rows_in(file)
    assert {row["rows"] for row in rows} == {1, 4, 16} and all(row["tokens/s"] > 0 for row in rows)
    assert {"mesa", "mesa, one by one"} <= {row["batch"] for row in rows}
    for row in rows:
        assert row["x one row"] == 1 or row["rows"] > 1
        assert row["x one by one"] == 1 or "one by one" not in row["batch"]


def test_loading_is_a_median_without_the_first_turn(file, tmp_path, monkeypatch, capsys):
    """The first turn, which may find a cold file cache, does not count."""
    monkeypatch.setattr(bench, "machine", lambda device: {"threads": 1})  # as if transformers were not installed
    turns = iter([bench.Loading(9.0, 9.0, 9e9), bench.Loading(1.0, 2.0, 1e5), bench.Loading(3.0, 4.0, 2e5),
                  bench.Loading(2.0, 5.0, 3e5)])
    monkeypatch.setattr(bench, "run_load_alone", lambda engine, folder: next(turns))
    bench.run(["load", "--rounds", "3", "--device", "cpu", "--scratch", str(tmp_path), "--results", str(file)])
    [row] = rows_in(file)
    size = sum(file.stat().st_size for file in (tmp_path / "bench-110m").glob("*.safetensors"))
    assert (row["engine"], row["load s"], row["load and read s"]) == ("ours", 2.0, 4.0)
    assert row["peak / weights"] == 2e5 / size and "loading 110m, 3 shards" in capsys.readouterr().out


def test_a_random_checkpoint_is_written_once_and_loaded_in_a_process_of_its_own(tmp_path, monkeypatch):
    """A folder that is there is taken as it is, and may be relative; an error in the process is an error here."""
    monkeypatch.chdir(tmp_path)
    args = bench.parse_args(["load", "--scratch", "."])
    folder = bench.random_checkpoint(args)
    written = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert bench.random_checkpoint(args) == folder
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == written
    loaded = bench.run_load_alone("ours", folder)
    assert 0 < loaded.load <= loaded.read
    monkeypatch.setattr(bench, "LOADING", "raise SystemExit('no room')")
    with pytest.raises(ValueError, match="loading with ours failed: no room"):
        bench.run_load_alone("ours", folder)


def test_picture_of_the_latest_rows(file, tmp_path):
    pytest.importorskip("matplotlib")
    old = [{"section": "attention", "method": "rope", "tokens": 64, "us/token": 1.0, "peak MiB": 1.0},
           {"section": "decode", "method": "rope", "keys": 64}]
    file.write_text("".join(json.dumps(row) + "\n" for row in old))
    bench.run(["attention", *SMALL, "--lengths", "64", "--methods", "rope,mesa", "--results", str(file),
               "--plot", str(tmp_path / "b.png")])
    latest = bench.latest_attention(file)
    assert sorted(row["method"] for row in latest) == ["mesa", "pytorch causal", "rope"]
    assert all("command" in row for row in latest)
    assert (tmp_path / "b.png").stat().st_size > 1000


@pytest.mark.parametrize("args, named", [
    (["attention", "--methods", "ropee"], "did you mean rope"), (["attention", "--kv-heads", "3"], "kv-heads"),
    (["kernel", "--device", "cpu"], "CUDA")])
def test_bad_input_is_one_clear_line(args, named, file, capsys):
    with pytest.raises(SystemExit) as end:
        run_command(lambda: bench.run([*args, "--results", str(file)]), "bench.py")
    assert end.value.code == 2 and named in capsys.readouterr().err.splitlines()[-1] and not file.exists()


# ---- llama.cpp

def test_rows_of_queries_and_keys_in_metas_order():
    """Turned as pairs of neighbours, as llama.cpp does, they give the scores of ours."""
    heads, D, T = 3, 8, 5
    weights = torch.randn(2, heads * D, 16)
    x = torch.randn(T, 16)
    angles = torch.arange(T)[:, None] * torch.rand(D // 2)

    def scores(q_weight, k_weight, interleaved):
        q, k = [rotate((x @ w.T).view(1, T, heads, D).transpose(1, 2), angles.cos(), angles.sin(), interleaved)
                for w in (q_weight, k_weight)]
        return q @ k.transpose(-1, -2)
    moved = [bench_llama_cpp.interleave_rows(w, heads) for w in weights]
    assert torch.allclose(scores(*moved, interleaved=True), scores(*weights, interleaved=False), atol=1e-5)


def test_a_checkpoint_as_gguf(tmp_path):
    gguf = pytest.importorskip("gguf")
    folder = bench.random_checkpoint(SimpleNamespace(scratch=tmp_path, shape="110m"))
    reader = gguf.GGUFReader(bench_llama_cpp.write_gguf(folder, "bf16"))
    assert {"token_embd.weight", "blk.0.attn_q.weight", "blk.1.ffn_norm.weight"} <= {t.name for t in reader.tensors}
    if bench_llama_cpp.missing():
        return
    ours = load_model(folder, Config.from_hf(folder), torch.bfloat16)
    ids = bench.random_ids(20, "cpu")
    engine = bench_llama_cpp.LlamaCpp(folder / "bf16.gguf", threads=1, context=64)
    want = ours(ids, ours.plan("rope", n=20), last_only=True)[0, -1]
    bench.check("llama.cpp", engine.prefill(ids[0].tolist()), want, torch.bfloat16)
    engine.decode(20, 2)
    engine.close()
