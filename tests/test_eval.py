"""eval_passkey.py and eval_perplexity.py: what they measure, what they print, and results that survive a kill."""
import contextlib
import io
import json
import math
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import eval_passkey
import eval_perplexity
from cli import run_command, short_hash
from eval_passkey import answer_batch, is_cut, make_trials, read_filler
from eval_perplexity import KeyRule, Window, key_tokens, losses, sliding_windows
from model import load
from positions import Method
from tasks import FILLER, NEEDLE, QUESTION, Prompt, passkey_prompt, record_prompt

ROOT = Path(__file__).resolve().parents[1]
LICENSE = ROOT / "LICENSE"


def run(script, *argv):
    """(exit code, stdout, stderr) of a script, run in this process."""
    argv = [str(word) for word in argv]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
        run_command(lambda: script.run(argv), f"{script.__name__}.py")
    return end.value.code, out.getvalue(), err.getvalue()


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def tiny():
    """(model, tokenizer) of the model that ships, with a window of 256 tokens."""
    return load("tiny")


# ---- passkeys: the trials

def trials_of(tokenizer, n, *argv):
    args = eval_passkey.parse_args([str(word) for word in argv])
    filler, _ = read_filler(args.filler, tokenizer)
    return make_trials(args, tokenizer, n, filler)


def test_needles_are_spread_evenly_over_the_depth(tiny):
    """From the start to the end; a single one stands in the middle."""
    trials = trials_of(tiny[1], 300, "--depths", 3, "--trials", 2)
    assert [(trial.cell, trial.number) for trial in trials] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    for k, trial in enumerate(trials):
        assert trial.prompt.span == passkey_prompt(tiny[1], 300, depth=k / 5).span
    [alone] = trials_of(tiny[1], 300, "--depths", 1, "--trials", 1)
    assert alone.prompt.span == passkey_prompt(tiny[1], 300, depth=0.5).span


def test_keys_follow_seed_and_length(tiny):
    """Recorded, as results must stay comparable with those made before."""
    def keys(n, *argv):
        return [trial.prompt.answer for trial in trials_of(tiny[1], n, "--depths", 2, "--trials", 1, *argv)]
    assert keys(300) == ["86787", "20465"]
    assert keys(301) == ["83160", "95387"]
    assert keys(300, "--seed", 1) == ["18098", "73899"]
    assert keys(300, "--task", "kv") == ["34950", "55466"]
    assert keys(300, "--needles", 3) == ["84020", "98362"]


def test_filler_of_a_text_begins_at_a_random_place(tiny):
    tokenizer = tiny[1]
    text, label = read_filler(LICENSE, tokenizer)
    assert text == tokenizer.encode(LICENSE.read_text(), bos=False) and label.startswith("LICENSE ")
    starts = set()
    for trial in trials_of(tokenizer, 300, "--filler", LICENSE, "--depths", 4, "--trials", 1):
        behind = trial.prompt.ids[trial.prompt.span[1] + 1:][:20]  # filler begins anew behind the needle
        starts |= {k for k in range(len(text)) if (text + text)[k:k + 20] == behind}
    assert len(starts) >= 3


# ---- passkeys: the answers

@pytest.mark.parametrize("method", ["rope", "mesa"])
def test_answers_and_their_probabilities(tiny, method):
    """Of a batch with a cache, in pieces, as of a pass over prompt and answer at once, one prompt at a time."""
    model, tokenizer = tiny
    trials = trials_of(tokenizer, 400, "--depths", 2, "--trials", 1)
    answers, logps = answer_batch(model, tokenizer, trials, Method(method), "auto")
    for trial, answer, logp in zip(trials, answers, logps):
        right = tokenizer.encode(trial.prompt.answer, bos=False)
        i = torch.arange(400 + len(right) - 1)
        plan = model.plan(method, n=400, i=i, j=i)
        logits = model(torch.tensor([trial.prompt.ids + right[:-1]]), plan)[0, -len(right):]
        assert logp == pytest.approx(-float(F.cross_entropy(logits, torch.tensor(right), reduction="sum")), abs=1e-3)
        likeliest = logits.argmax(-1).tolist()
        assert (answer == trial.prompt.answer) == (likeliest == right)


def test_where_a_method_cuts_a_needle(tiny):
    """Mesa's first chunk is 0..19, then come chunks of 100 tokens; the last one, from 520 on, sees all."""
    def cut(method, first, last):
        return is_cut(tiny[0], Prompt([0] * 600, "", (first, last), "passkey"), Method.parse(method))
    mesa = "mesa:first=20:chunk=100"
    assert cut(mesa, 110, 125) and cut(mesa, 219, 220)
    assert not cut(mesa, 120, 135) and not cut(mesa, 200, 219)   # inside one chunk
    assert not cut(mesa, 10, 25) and not cut(mesa, 510, 525)     # the first chunk is seen by all; the last one sees all
    assert not cut("mesa:first=20:chunk=100:overlap=15", 110, 125)
    assert not cut("rope", 0, 599)
    assert cut("streaming-llm:sinks=4:recent=10", 100, 111) and not cut("streaming-llm:sinks=4:recent=10", 100, 110)


# ---- passkeys: what is printed

def made_up(method, length, answers, cut=""):
    """Rows of one trial in each cell: answers "+-+" says which are correct, cut "x.." which needles are cut."""
    rows = []
    for cell, answer in enumerate(answers):
        rows.append({"method": method, "length": length, "cell": cell, "correct": answer == "+",
                     "cut": cut[cell:cell + 1] == "x"})
    return rows


def test_report_says_what_cut_needles_cost(capsys):
    """Of the methods asked for; where all needles are cut, there is no accuracy of whole ones."""
    rows = made_up("mesa", 256, "+-++-", cut="xx...") + made_up("dca", 256, "-", cut="x") + made_up("rope", 256, "+")
    args = eval_passkey.parse_args(["--lengths", "256", "--depths", "1"])
    args.methods = [Method("mesa"), Method("dca")]
    eval_passkey.report(args, rows, L=256)
    assert capsys.readouterr().out.splitlines()[3:] == [
        "| dca | 0.00 |",
        "mesa: 2 of 5 needles are cut by a boundary: accuracy 0.500, whole ones 0.667; 1 of 2 misses are cut needles",
        "dca: 1 of 1 needles are cut by a boundary: accuracy 0.000, whole ones nan; 1 of 1 misses are cut needles"]


def test_the_effective_window(capsys):
    """Right from the end of the prompt, the last of 32 cells, up to a gap: what lies behind it does not count. A fifth
    of the answers has to be right."""
    args = eval_passkey.parse_args(["--kmax", "--lengths", "3200"])
    args.methods = [Method("rope"), Method("mesa"), Method("dca")]
    rows = made_up("rope", 3200, 5 * "+" + "-" + 14 * "+" + "-" + 11 * "+")
    rows += made_up("mesa", 3200, 32 * "+") + 4 * made_up("mesa", 3200, 32 * "-")
    rows += made_up("dca", 3200, 32 * "+") + 5 * made_up("dca", 3200, 32 * "-")
    eval_passkey.report(args, rows, L=256)
    assert (args.depths, args.trials) == (32, 10)
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "rope: k_max 1100 of 3200", "mesa: k_max 3200 of 3200", "dca: k_max 0 of 3200"]


# ---- passkeys: the command

GRID = ("--methods", "rope,pi:factor=8,mesa:first=20", "--lengths", "256,1024", "--depths", "2", "--trials", "1")


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """(results file, stdout, stderr) of GRID."""
    file = tmp_path_factory.mktemp("grid") / "r.jsonl"
    code, out, err = run(eval_passkey, *GRID, "--results", file)
    assert code == 0
    return file, out, err


def test_the_command_prints_table_and_heatmaps(grid):
    _, out, err = grid
    lines = out.splitlines()
    assert lines[:5] == [
        "| method | 256 (1x) | 1024 (4x) |",
        "|---|---|---|",
        "| rope | 1.00 | 0.50 |",
        "| pi:factor=8 | 0.00 | 0.00 |",
        "| mesa:first=20 | 1.00 | 1.00 |"]
    assert lines[6:10] == [
        "rope: accuracy by depth (down) and length",
        "  0%- 50%  1.00  0.00 ",
        " 50%-100%  1.00  1.00 ",
        "             256  1024"]
    warning, settings, *progress = err.splitlines()
    assert warning.startswith("warning: rope puts tokens 1023 apart")
    assert settings.startswith("ckpt=tiny weights=af550519286c0d04 task=passkey seed=0 depths=2 trials=1 filler=repeat")
    assert "methods=rope,pi:factor=8,mesa:first=20 device=" in settings and settings.endswith("lengths=256,1024")
    assert len(progress) == 6 and progress[-1] == "mesa:first=20 1024: 1.00 (0 s left)"


def test_a_row_for_every_trial(grid):
    rows = rows_of(grid[0])
    assert len(rows) == 12 and all(row["correct"] == (row["answer"] == row["key"]) for row in rows)
    last = {"method": "mesa:first=20", "length": 1024, "cell": 1, "trial": 0, "key": "72641", "answer": "72641",
            "correct": True, "cut": False, "ckpt": "tiny", "weights": "af550519286c0d04", "task": "passkey", "seed": 0,
            "depths": 2, "trials": 1, "filler": "repeat", "needles": 1, "train_len": 256, "dtype": "float32",
            "impl": "auto", "quantize": None, "cache_dtype": None}
    logp = rows[-1].pop("logp")
    assert rows[-1] == last and -1 < logp <= 0


def test_what_is_finished_is_not_run_again(grid, monkeypatch):
    file, out, _ = grid
    before = file.read_bytes()
    monkeypatch.setattr(eval_passkey, "prefill", None)  # calling it would fail
    code, again, _ = run(eval_passkey, *GRID, "--results", file)
    assert code == 0 and again == out and file.read_bytes() == before
    code, part, _ = run(eval_passkey, *GRID, "--results", file, "--method", "rope", "--lengths", "1024")
    assert code == 0 and part.splitlines()[2:4] == ["| rope | 0.50 |", ""]


KILLS_ITSELF = """
import os, signal, sys
import eval_passkey

def add_and_die(results, rows, add=eval_passkey.Results.add):
    add(results, rows)
    if len(results.rows) == 8:
        os.kill(os.getpid(), signal.SIGKILL)

eval_passkey.Results.add = add_and_die
eval_passkey.run(sys.argv[1:])
"""


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_killed_run_continues_and_ends_with_the_same_file(grid, tmp_path):
    """Also where it was killed inside of a batch, of two rows here, and of a line."""
    file = tmp_path / "r.jsonl"
    killed = subprocess.run([sys.executable, "-c", KILLS_ITSELF, *GRID, "--results", file], cwd=ROOT,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
    assert killed.returncode == -signal.SIGKILL and len(rows_of(file)) == 8
    file.write_bytes(file.read_bytes()[:-40])
    code, out, _ = run(eval_passkey, *GRID, "--results", file)
    assert code == 0 and out == grid[1] and file.read_bytes() == grid[0].read_bytes()


def test_results_of_other_settings_do_not_mix(tmp_path):
    file = tmp_path / "r.jsonl"
    args = ("--methods", "rope", "--lengths", "256", "--depths", "1", "--trials", "1", "--results", file)
    others = [(), ("--task", "lines"), ("--task", "kv"), ("--needles", "2"), ("--filler", LICENSE),
              ("--dtype", "bfloat16", "--impl", "dense")]
    for _ in range(2):
        for more in others:
            assert run(eval_passkey, *args, *more)[0] == 0
    assert [row["task"] for row in rows_of(file)] == ["passkey", "lines", "kv", "passkey", "passkey", "passkey"]


# ---- perplexity

@pytest.mark.parametrize("method, recorded", [
    ("rope", 2.154894), ("pi:factor=2", 2.036041), ("dynamic-ntk", 1.522756), ("yarn:factor=2", 1.430883)])
def test_losses_are_those_of_transformers(tiny, method, recorded):
    """Of 600 tokens, in two pieces, beyond the window of 256; in transformers 5.23 with rope_parameters of the types
    default, linear and yarn (factor 2), and dynamic (factor 1)."""
    model, tokenizer = tiny
    ids = record_prompt(tokenizer, "lines", 600, 0.5, random.Random(0)).ids
    assert float(losses(model, ids, method).mean()) == pytest.approx(recorded, abs=1e-4)


def test_sliding_windows():
    """Every token is scored once; all but those of the first window see window - stride tokens or more."""
    assert sliding_windows(10, 6, 2) == [Window(0, 6, 0), Window(2, 8, 6), Window(4, 10, 8)]
    assert sliding_windows(9, 4, 3) == [Window(0, 4, 0), Window(3, 7, 4), Window(6, 9, 7)]
    assert sliding_windows(5, 6, 2) == [Window(0, 5, 0)]


@pytest.fixture
def book(tmp_path):
    """A text that the model knows."""
    file = tmp_path / "book.txt"
    file.write_text((FILLER + " ") * 60)
    return file


def test_loss_by_position(book, tmp_path):
    """Beyond its window plain RoPE loses the text, and Mesa does not; a second run reads what is there."""
    args = (book, "--methods", "rope,mesa", "--length", 1024, "--buckets", 4, "--results", tmp_path / "p.jsonl")
    code, out, err = run(eval_perplexity, *args)
    _, header, _, *lines = out.splitlines()
    assert code == 0 and err.startswith("warning: rope puts tokens 1023 apart")
    assert header == "| method | 0-256 | 256-512 | 512-768 | 768-1024 |"
    rope, mesa = [[float(cell) for cell in line.split("|")[2:-1]] for line in lines]
    assert rope[0] < 0.2 and rope[3] > 1 and max(mesa) < 0.2

    rows = rows_of(tmp_path / "p.jsonl")
    assert [row["bucket"] for row in rows] == [0, 1, 2, 3] * 2 and sum(row["tokens"] for row in rows[:4]) == 1023
    assert run(eval_perplexity, *args)[1] == out and len(rows_of(tmp_path / "p.jsonl")) == 8


def test_loss_by_position_of_several_documents(tiny, tmp_path):
    """Consecutive parts of the text, BOS in front of each; a second run makes the third document alone."""
    model, tokenizer = tiny
    args = (LICENSE, "--methods", "mesa", "--length", 101, "--buckets", 1, "--results", tmp_path / "p.jsonl")
    run(eval_perplexity, *args, "--documents", 2)
    two = rows_of(tmp_path / "p.jsonl")
    ids = tokenizer.encode(LICENSE.read_text(), bos=False)
    expected = [float(losses(model, [1] + ids[begin:begin + 100], "mesa").mean()) for begin in (0, 100)]
    assert [row["nll"] for row in two] == pytest.approx(expected, abs=1e-5)
    assert two[0]["text_hash"] == short_hash(LICENSE.read_bytes())  # rows of another text of this name are others

    code, out, _ = run(eval_perplexity, *args, "--documents", 3)
    three = rows_of(tmp_path / "p.jsonl")
    assert code == 0 and three[:2] == two and [row["document"] for row in three] == [0, 1, 2]
    assert float(out.splitlines()[-1].split("|")[2]) == pytest.approx(sum(row["nll"] for row in three) / 3, abs=1e-3)


def test_perplexity_by_sliding_window(tiny, tmp_path):
    model, tokenizer = tiny
    args = (LICENSE, "--methods", "rope", "--window", 101, "--tokens", 250, "--results", tmp_path / "p.jsonl")
    code, out, _ = run(eval_perplexity, *args)
    _, header, _, line = out.splitlines()
    assert code == 0 and header == "| method | per token | mean of windows |"

    ids = tokenizer.encode(LICENSE.read_text(), bos=False)[:250]
    windows = [ids[0:100], ids[50:150], ids[100:200], ids[150:250]]
    first, *others = [losses(model, [1] + window, "rope") for window in windows]
    parts = [first] + [part[-50:] for part in others]
    per_token, of_windows = [float(cell) for cell in line.split("|")[2:4]]
    assert per_token == pytest.approx(math.exp(torch.cat(parts).mean()), abs=1e-3)
    assert of_windows == pytest.approx(math.exp(sum(part.mean() for part in parts) / 4), abs=1e-3)

    rows = rows_of(tmp_path / "p.jsonl")
    assert [(row["span"], row["tokens"]) for row in rows] == [(0, 100), (1, 50), (2, 50), (3, 50)]
    assert run(eval_perplexity, *args)[1] == out and rows_of(tmp_path / "p.jsonl") == rows


# ---- key tokens

KEY_TEXT = f"{NEEDLE.format(key=71432)} {(FILLER + ' ') * 3}{QUESTION} 71432. {FILLER}"


@torch.no_grad()
def test_key_tokens_are_those_of_the_definition(tiny):
    """Token by token: the loss given 40 to 59 tokens, minus that given all, above 2; the latter below 2."""
    model, tokenizer = tiny
    ids = tokenizer.encode(KEY_TEXT, bos=False)
    rule = KeyRule(Method("rope"), short=40, stride=20, gain=2, most=2)

    def loss(begin, token):
        i = torch.arange(token - begin + 1)
        logits = model(torch.tensor([[1] + ids[begin:token]]), model.plan("rope", n=len(ids) + 1, i=i, j=i))[0, -1]
        return -float(logits.log_softmax(-1)[ids[token]])

    expected = []
    for token in range(40, len(ids)):
        whole = loss(0, token)
        if whole < 2 and loss((token - 40) // 20 * 20, token) - whole > 2:
            expected.append(token)
    assert key_tokens(model, [1], ids, rule).nonzero()[:, 0].tolist() == expected
    assert "71432" in tokenizer.decode(ids[expected[0]:expected[-1] + 1])


def test_perplexity_over_key_tokens(tiny, tmp_path):
    """Beside the loss of all; the key tokens are marked in their text, and a second run reads them from the file."""
    model, tokenizer = tiny
    (tmp_path / "keys.txt").write_text(KEY_TEXT)
    ids = tokenizer.encode(KEY_TEXT, bos=False)
    args = (tmp_path / "keys.txt", "--methods", "mesa:first=16", "--length", len(ids) + 1, "--longppl", "--key-short",
            "40", "--key-stride", "20", "--key-method", "rope", "--results", tmp_path / "p.jsonl")
    code, out, _ = run(eval_perplexity, *args)
    keys = key_tokens(model, [1], ids, KeyRule(Method("rope"), 40, 20, 2, 2))
    nll = losses(model, [1] + ids, "mesa:first=16")
    lines = out.splitlines()
    assert code == 0 and lines[5].startswith(f"LongPPL: {int(keys.sum())} key tokens")
    perplexity, longppl = [float(cell) for cell in lines[8].split("|")[2:4]]
    assert perplexity == pytest.approx(math.exp(nll.mean()), abs=1e-3)
    assert longppl == pytest.approx(math.exp(nll[keys].mean()), abs=1e-3)
    assert "[[" in lines[9] and "71432" in lines[9]
    assert run(eval_perplexity, *args)[1] == out


# ---- pictures, and bad input, of both

def test_pictures(grid, book, tmp_path):
    pytest.importorskip("matplotlib")
    code, out, _ = run(eval_passkey, *GRID, "--results", grid[0], "--plot", tmp_path / "a.png")
    assert code == 0 and out == grid[1] and (tmp_path / "a.png").stat().st_size > 1000
    args = (book, "--methods", "rope,mesa", "--length", 300, "--results", tmp_path / "p.jsonl")
    run(eval_perplexity, *args, "--longppl", "--plot", tmp_path / "c.png")
    assert (tmp_path / "c.png").stat().st_size > 1000
    code, _, _ = run(eval_perplexity, *args, "--plot", tmp_path / "b.png")
    assert code == 0 and (tmp_path / "b.png").stat().st_size > 1000


def refused(script, args, named, results):
    """Checks that a command ends with one clear line, and writes no results."""
    code, out, err = run(script, *args, "--results", results)
    assert code == 2 and not out and named in err.splitlines()[-1] and "Traceback" not in err
    assert not results.exists()


@pytest.mark.parametrize("script, args", [(eval_passkey, ()), (eval_perplexity, (LICENSE, "--length", "100"))])
def test_a_picture_without_matplotlib_is_refused_before_anything_long(script, args, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    refused(script, (*args, "--plot", "p.png"), "pip install matplotlib", tmp_path / "r.jsonl")


@pytest.mark.parametrize("script, args, named", [
    (eval_passkey, ("--methods", "ropee"), "did you mean rope"),
    (eval_passkey, ("--lengths", "20"), "at least"),
    (eval_passkey, ("--task", "lines", "--lengths", "30"), "too few"),
    (eval_passkey, ("--trials", "0"), "--trials"),
    (eval_passkey, ("--task", "kv", "--needles", "2"), "--needles"),
    (eval_passkey, ("--filler", os.devnull), "an empty filler"),
    (eval_perplexity, ("nowhere.txt",), "nowhere.txt"),
    (eval_perplexity, (os.devnull,), "too short a text"),
    (eval_perplexity, (LICENSE, "--documents", "9"), "--documents 9"),
    (eval_perplexity, (LICENSE, "--length", "5"), "--buckets 8"),
    (eval_perplexity, (LICENSE, "--length", "99", "--longppl"), "--longppl"),
    (eval_perplexity, (LICENSE, "--window", "256", "--stride", "256"), "leaves gaps"),
    (eval_perplexity, (LICENSE, "--window", "256", "--length", "5"), "another protocol")])
def test_bad_input_is_one_clear_line(script, args, named, tmp_path):
    refused(script, args, named, tmp_path / "r.jsonl")
