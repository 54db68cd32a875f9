"""cli.py: what the scripts share; flags, errors in one line, the model asked for, results that survive a kill."""
import ctypes
import io
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import cli
from cli import (Results, fingerprint, keep_freed_memory, method_list, methods_asked, open_checkpoint, pick_device,
                 pick_dtype, plain_parser, read_text, run_command)
from config import Config
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


@pytest.mark.parametrize("error, code, line", [
    (ValueError("no such thing"), 2, "x.py: no such thing\n"), (OSError("no such thing"), 2, "x.py: no such thing\n"),
    (OverflowError("too large"), 2, "x.py: too large\n"), (KeyboardInterrupt(), 130, "")], ids=repr)
def test_bad_input_is_one_line_and_ctrl_c_none(error, code, line, capsys):
    def run():
        raise error
    assert ended(run, capsys) == (code, line)


def test_the_exit_code_of_a_script_is_what_it_returns(capsys):
    assert ended(lambda: 130, capsys) == (130, "")


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


# ---- flags

def test_flags_with_dashes_underscores_and_two_names(capsys):
    """They are not abbreviated."""
    parser, flag = plain_parser("What the script does.\n\nAnd more.")
    flag("kv-heads", type=int)
    flag("methods", "method")
    for argv in (["--kv-heads", "2", "--methods", "rope"], ["--kv_heads", "2", "--method", "rope"]):
        assert vars(parser.parse_args(argv)) == {"kv_heads": 2, "methods": "rope"}
    with pytest.raises(SystemExit):
        parser.parse_args(["--kv", "3"])
    assert "--kv" in capsys.readouterr().err


@pytest.mark.parametrize("text, methods", [
    ("mesa:first=16,last=8,rope", ["mesa:first=16:last=8", "rope"]),
    ("rope,,mesa,", ["rope", "mesa"]),
    ("longrope:long_factor=[1,2],short_factor=[1,1],pi:factor=8",
     ["longrope:long_factor=[1,2]:short_factor=[1,1]", "pi:factor=8"]),
    ("first=16", ["first=16"])])  # no method before it: refused as a method of this name
def test_a_list_of_methods(text, methods):
    assert method_list(text) == methods


# ---- methods

def test_methods_by_default_are_said_once_and_suit_the_model():
    assert methods_asked(Config.from_hf(TINY), None, ["rope", "pi", "rope", "longrope"]) == [
        Method("rope"), Method("pi")]


def test_all_methods_are_those_that_the_model_can_take():
    """longrope needs factors from a config.json; a model with ALiBi has no frequencies that a rule could change."""
    tiny = methods_asked(Config.from_hf(TINY), ["all"], [])
    assert [str(method) for method in tiny] == [name for name in METHODS if name != "longrope"]
    alibi = methods_asked(Config.from_hf(ROOT / "checkpoints" / "tiny-alibi"), ["all"], [])
    names = {str(method) for method in alibi}
    assert {"alibi", "nope", "mesa", "rerope"} <= names and not {"rope", "pi", "yarn"} & names


# ---- the model asked for

def args(**given):
    return SimpleNamespace(**{"ckpt": "tiny", "train_len": None, **given})


def test_a_checkpoint_is_opened_by_name_unless_it_is_unfinished(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    path, config, tokenizer = open_checkpoint(args(train_len=512))
    assert path.samefile(TINY) and config.train_len == 512
    assert tokenizer.decode(tokenizer.encode("The sky is blue.")) == "The sky is blue."
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_checkpoint(args(ckpt="nowhere"))
    shutil.copytree(TINY, "mine")
    (tmp_path / "mine" / "training-state.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="unfinished"):
        open_checkpoint(args(ckpt="mine"))


def test_dtype():
    """As stored or as asked for, but not float16 on a CPU unless asked for."""
    assert pick_dtype("auto", "bfloat16", "cpu") is torch.bfloat16
    assert pick_dtype("auto", "float16", "cpu") is torch.bfloat16
    assert pick_dtype("auto", "float16", "cuda") is torch.float16
    assert pick_dtype("float16", "float32", "cpu") is torch.float16
    with pytest.raises(ValueError, match="float8.*there are float32"):
        pick_dtype("auto", "float8_e4m3fn", "cpu")


def test_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("auto") == "mps" and pick_device("cpu") == "cpu"
    with pytest.raises(ValueError, match="--device cuda: this machine has none"):
        pick_device("cuda")


@pytest.mark.parametrize("broken", [AttributeError, TypeError])  # macOS, Windows
def test_a_machine_without_glibc_keeps_its_malloc(monkeypatch, broken):
    def no_library(name):
        raise broken
    monkeypatch.setattr(ctypes, "CDLL", no_library)
    keep_freed_memory()


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

@pytest.mark.parametrize("line", ["A text.", "[1, 2]"])
def test_a_file_that_holds_something_else_is_refused_and_left_alone(tmp_path, line):
    file = tmp_path / "notes.txt"
    file.write_text(f'{{"seed": 0}}\n{line}\n')
    with pytest.raises(ValueError, match="notes.txt: line 2 is not a result"):
        Results(file, {"seed": 0}, ())
    assert file.read_text() == f'{{"seed": 0}}\n{line}\n'
    file.write_text(line)  # nor is it taken for the half line that a kill leaves
    with pytest.raises(ValueError, match="notes.txt: its last line is not a result"):
        Results(file, {"seed": 0}, ())
    assert file.read_text() == line


def test_a_fingerprint_tells_checkpoints_apart_and_never_changes(tmp_path):
    """Or old results would be made anew: recorded with the code that made results/RESULTS.md."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(TINY / name, tmp_path)
    assert fingerprint(tmp_path) == "af550519286c0d04"
    with open(tmp_path / "model.safetensors", "ab") as weights:
        weights.write(b"more")
    other_weights = fingerprint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert len({"af550519286c0d04", other_weights, fingerprint(tmp_path)}) == 3


# ---- progress

@pytest.mark.parametrize("terminal", [True, False])
def test_progress(terminal, monkeypatch, capsys):
    """100 steps of a second each: the time left from the first on; in lines ever further apart, or in one line. Nothing
    of what takes less than two seconds in all."""
    clock = [0.0]
    monkeypatch.setattr(cli.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    progress = cli.Progress("prefill")
    for seconds in (0.019, 1.0):
        for done in range(20, 121):  # 20 were there before
            progress(done, 120)
            clock[0] += seconds
    said = capsys.readouterr().err
    if terminal:
        assert said.startswith("\r\033[Kprefill 21/120, 99 s left\r\033[Kprefill 22/120, 98 s left")
        assert said.endswith("\033[Kprefill 120/120, 0 s left\n") and said.count("\n") == 1
    else:
        lines = said.splitlines()
        assert lines[:2] == ["prefill 21/120, 99 s left", "prefill 23/120, 97 s left"]
        assert lines[-1] == "prefill 120/120, 0 s left" and 20 < len(lines) < 40 and "\r" not in said
