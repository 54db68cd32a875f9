"""cli.py: what the scripts share; flags, errors in one line, the model asked for, results that survive a kill."""
import argparse
import ctypes
import io
import json
import math
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import cli
from cli import (Results, accuracy, can_take, counts, fingerprint, keep_freed_memory, markdown, method_list,
                 methods_asked, new_parser, number, open_checkpoint, peak_memory, pick_device, pick_dtype, place,
                 plain_parser, read_text, run_command, select, settings_line, short_hash, type_name)
from model import Config
from geometry import METHODS
from positions import Method

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "checkpoints" / "tiny"


# ---- running a script

def ended(run, capsys):
    """(exit code, stderr) of a script."""
    with pytest.raises(SystemExit) as end:
        run_command(run, "x.py")
    return end.value.code, capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError("no such thing"), FileNotFoundError("no such thing"),
                                   OverflowError("no such thing")], ids=lambda error: type(error).__name__)
def test_bad_input_is_one_line_and_code_2(error, capsys):
    def run():
        raise error
    assert ended(run, capsys) == (2, "x.py: no such thing\n")


def test_the_exit_code_of_a_script_is_what_it_returns(capsys):
    assert ended(lambda: 0, capsys) == (0, "")
    assert ended(lambda: 130, capsys) == (130, "")


def test_ctrl_c_is_code_130_and_no_traceback(capsys):
    def run():
        raise KeyboardInterrupt
    assert ended(run, capsys) == (130, "")


def test_a_mistake_of_ours_is_not_hidden():
    def run():
        raise KeyError("a mistake")
    with pytest.raises(KeyError):
        run_command(run, "x.py")


def test_a_reader_that_goes_away_is_no_error(monkeypatch, capsys):
    """As in `python generate.py | head -1`: no traceback, and none from what Python itself flushes at the end."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert ended(lambda: print("a result"), capsys) == (1, "")
        stdout.flush()


def test_settings_line():
    assert settings_line({"ckpt": "tiny", "lengths": [256, 512], "seed": 0}) == "ckpt=tiny lengths=256,512 seed=0"


# ---- flags

def test_flags_with_dashes_underscores_and_two_names():
    parser, flag = plain_parser("What the script does.\n\nAnd more.")
    flag("kv-heads", type=int)
    flag("methods", "method")
    for argv in (["--kv-heads", "2", "--methods", "rope"], ["--kv_heads", "2", "--method", "rope"]):
        assert vars(parser.parse_args(argv)) == {"kv_heads": 2, "methods": "rope"}
    assert parser.description == "What the script does."


def test_flags_are_not_abbreviated(capsys):
    parser, flag = plain_parser("What the script does.")
    flag("trials")
    with pytest.raises(SystemExit):
        parser.parse_args(["--tri", "3"])
    assert "--tri" in capsys.readouterr().err


def test_flags_of_every_script_that_runs_a_model():
    parser, _ = new_parser("What the script does.")
    assert vars(parser.parse_args([])) == {
        "ckpt": "tiny", "dtype": "auto", "device": "auto", "impl": "auto", "train_len": None}


def test_numbers_and_counts():
    assert number(int, 1)("7") == 7 and number(float, 0, 1)("0.5") == 0.5 and counts("256,1024") == [256, 1024]


@pytest.mark.parametrize("parse, text", [
    (number(int, 1), "0"), (number(int, 1), "x"), (number(float, 0, 1), "nan"), (number(float, 0, 1), "1.5"),
    (counts, "4,-4"), (counts, ""), (method_list, ""), (method_list, ",")])
def test_numbers_counts_and_lists_refuse(parse, text):
    with pytest.raises((argparse.ArgumentTypeError, ValueError)):
        parse(text)


@pytest.mark.parametrize("text, methods", [
    ("rope", ["rope"]),
    ("rope,mesa:overlap=32", ["rope", "mesa:overlap=32"]),
    ("mesa:first=16,last=8,rope", ["mesa:first=16:last=8", "rope"]),
    ("rope,,mesa,", ["rope", "mesa"]),
    ("longrope:long_factor=[1,2],short_factor=[1,1],pi:factor=8",
     ["longrope:long_factor=[1,2]:short_factor=[1,1]", "pi:factor=8"]),
    ("first=16", ["first=16"])])  # no method before it: refused as a method of this name
def test_a_list_of_methods(text, methods):
    assert method_list(text) == methods


# ---- methods

@pytest.fixture(scope="module")
def config():
    return Config.from_hf(TINY)


def test_methods_asked_for_are_taken_as_they_are(config):
    asked = methods_asked(config, ["mesa:first=16", "rope"], ["pi"])
    assert asked == [Method("mesa", params={"first": 16}), Method("rope")]


def test_methods_by_default_are_said_once_and_suit_the_model(config):
    assert methods_asked(config, None, ["rope", "pi", "rope", "longrope"]) == [Method("rope"), Method("pi")]


def test_all_methods_are_those_that_the_model_can_take(config):
    """longrope needs factors from a config.json; a model with ALiBi has no frequencies that a rule could change."""
    assert [str(method) for method in methods_asked(config, ["all"], [])] == [m for m in METHODS if m != "longrope"]
    alibi = Config.from_hf(ROOT / "checkpoints" / "tiny-alibi")
    names = {str(method) for method in methods_asked(alibi, ["all"], [])}
    assert {"alibi", "nope", "mesa", "rerope"} <= names and not {"rope", "pi", "yarn"} & names
    assert can_take(config, Method("yarn")) and not can_take(alibi, Method("yarn"))


# ---- the model asked for

def args(**given):
    return SimpleNamespace(**{"ckpt": "tiny", "train_len": None, "device": "cpu", "dtype": "auto", **given})


def test_open_a_checkpoint_by_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    path, config, tokenizer = open_checkpoint(args(train_len=512))
    assert path.samefile(TINY) and config.train_len == 512
    assert tokenizer.decode(tokenizer.encode("The sky is blue.")) == "The sky is blue."


def test_an_unfinished_checkpoint_is_refused(tmp_path):
    for name in ("config.json", "tokenizer.model"):
        shutil.copy(TINY / name, tmp_path)
    assert open_checkpoint(args(ckpt=str(tmp_path)))[0] == tmp_path
    (tmp_path / "training-state.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="unfinished"):
        open_checkpoint(args(ckpt=str(tmp_path)))


def test_no_such_checkpoint():
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_checkpoint(args(ckpt="nowhere"))


@pytest.mark.parametrize("name, stored, device, dtype", [
    ("auto", "float32", "cpu", torch.float32), ("auto", "bfloat16", "cpu", torch.bfloat16),
    ("auto", "float16", "cpu", torch.bfloat16), ("auto", "float16", "cuda", torch.float16),
    ("float16", "float32", "cpu", torch.float16)])
def test_dtype(name, stored, device, dtype):
    assert pick_dtype(name, stored, device) is dtype


def test_a_dtype_that_there_is_not():
    with pytest.raises(ValueError, match="float8.*there are float32"):
        pick_dtype("auto", "float8_e4m3fn", "cpu")


def test_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("auto") == "mps" and pick_device("cpu") == "cpu"
    with pytest.raises(ValueError, match="--device cuda: this machine has none"):
        pick_device("cuda")


def test_place(config, monkeypatch):
    monkeypatch.setattr(cli, "keep_freed_memory", lambda: None)  # it would last for the rest of the tests
    assert place(args(), config) == ("cpu", torch.float32)
    assert type_name(torch.float32) == "float32"


@pytest.mark.parametrize("broken", [OSError, AttributeError, TypeError])
def test_a_machine_without_glibc_keeps_its_malloc(monkeypatch, broken):
    def no_library(name):
        raise broken
    monkeypatch.setattr(ctypes, "CDLL", no_library)
    keep_freed_memory()


def test_peak_memory_of_this_process():
    pytest.importorskip("resource")
    assert 2 ** 26 < peak_memory("cpu") < 2 ** 40


def test_text_files(tmp_path, monkeypatch):
    (tmp_path / "utf8.txt").write_text("Grün → 12", encoding="utf-8")
    (tmp_path / "marked.txt").write_text("Grün → 12", encoding="utf-8-sig")  # as some editors begin a file
    (tmp_path / "latin.txt").write_bytes("Grün".encode("latin-1"))
    assert read_text(tmp_path / "utf8.txt") == read_text(tmp_path / "marked.txt") == "Grün → 12"
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO("Grün".encode())))
    assert read_text("-") == "Grün"
    with pytest.raises(ValueError, match=r"latin.txt: not UTF-8 text .* at byte 2"):
        read_text(tmp_path / "latin.txt")


# ---- results

def test_results_are_written_at_once_and_read_again(tmp_path):
    file = tmp_path / "r.jsonl"
    results = Results(file, {"seed": 0}, ("method", "trial"))
    results.add([{"method": "rope", "trial": 0, "x": 1}, {"method": "rope", "trial": 1, "x": 2}])
    assert file.read_text().splitlines() == ['{"method": "rope", "trial": 0, "x": 1, "seed": 0}',
                                             '{"method": "rope", "trial": 1, "x": 2, "seed": 0}']
    assert Results(file, {"seed": 0}, ("method", "trial")).rows == results.rows
    assert results.rows["rope", 1] == {"method": "rope", "trial": 1, "x": 2, "seed": 0}


def test_a_result_that_is_there_is_not_written_again(tmp_path):
    file = tmp_path / "r.jsonl"
    results = Results(file, {"seed": 0}, ("method",))
    results.add([{"method": "rope", "x": 1}])
    results.add([{"method": "rope", "x": 2}, {"method": "mesa", "x": 3}])
    assert [json.loads(line)["x"] for line in file.read_text().splitlines()] == [1, 3]
    assert results.rows["rope",]["x"] == 1


def test_results_of_other_settings_stay_but_are_not_taken(tmp_path):
    file = tmp_path / "r.jsonl"
    Results(file, {"seed": 0}, ("method",)).add([{"method": "rope", "x": 1}])
    other = Results(file, {"seed": 1}, ("method",))
    assert other.rows == {}
    other.add([{"method": "rope", "x": 2}])
    assert len(file.read_text().splitlines()) == 2
    assert Results(file, {"seed": 0, "new": 3}, ("method",)).rows == {}  # made before there was such a setting


def test_half_a_line_that_a_killed_run_left_is_cut_off(tmp_path):
    file = tmp_path / "r.jsonl"
    Results(file, {"seed": 0}, ("method",)).add([{"method": "rope"}])
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"method": "me')
    results = Results(file, {"seed": 0}, ("method",))
    assert file.read_bytes() == whole and list(results.rows) == [("rope",)]


@pytest.mark.parametrize("line", ["A text.", "[1, 2]", "3"])
def test_a_file_that_holds_something_else_is_refused_and_left_alone(tmp_path, line):
    file = tmp_path / "notes.txt"
    file.write_text(f'{{"seed": 0}}\n{line}\n')
    with pytest.raises(ValueError, match="notes.txt: line 2 is not a result"):
        Results(file, {"seed": 0}, ())
    assert file.read_text() == f'{{"seed": 0}}\n{line}\n'


def test_select_and_accuracy():
    rows = [{"method": m, "n": n, "correct": m == "mesa" or n == 1} for m in ("rope", "mesa") for n in (1, 2)]
    assert select(rows, method="rope", n=2) == [{"method": "rope", "n": 2, "correct": False}]
    assert accuracy(rows) == 0.75 and accuracy(select(rows, method="rope")) == 0.5
    assert math.isnan(accuracy([]))


def test_markdown():
    assert markdown(["method", "256"], [["rope", 0.5], ["mesa", "1.00"]]) == (
        "| method | 256 |\n"
        "|---|---|\n"
        "| rope | 0.5 |\n"
        "| mesa | 1.00 |")


def test_fingerprint_tells_checkpoints_apart(tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(TINY / name, tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = fingerprint(tmp_path)
    assert whole == fingerprint(TINY) and len(whole) == 16
    weights.write_bytes(weights.read_bytes() + b"more")
    other_weights = fingerprint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert len({whole, other_weights, fingerprint(tmp_path)}) == 3


def test_a_fingerprint_never_changes():
    """Or old results would be made anew: recorded with the code that made results/RESULTS.md."""
    assert short_hash(b"The sky is blue.") == "52ae4fd504d855f1"
    assert fingerprint(TINY) == "af550519286c0d04"
