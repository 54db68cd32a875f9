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
from cli import run_command
from eval_passkey import (KMAX_CELLS, answer_batch, cut_line, first_integer, is_cut, kmax, make_trials, read_filler,
                          table)
from eval_perplexity import Window, losses, sliding_windows
from model import load
from positions import Method
from show import coloured, heatmap
from tasks import FILLER, Prompt, passkey_prompt, record_prompt

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
    trials = trials_of(tiny[1], 300, "--depths", 5, "--trials", 3)
    assert [trial.cell for trial in trials] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]
    assert [trial.number for trial in trials] == [0, 1, 2] * 5
    places = [trial.prompt.span[0] for trial in trials]
    steps = {second - first for first, second in zip(places, places[1:])}
    assert max(steps) - min(steps) <= 1
    assert places[0] == passkey_prompt(tiny[1], 300, depth=0).span[0]
    assert places[-1] == passkey_prompt(tiny[1], 300, depth=1).span[0]


def test_a_single_trial_has_its_needle_in_the_middle(tiny):
    trial, = trials_of(tiny[1], 300, "--depths", 1, "--trials", 1)
    assert trial.prompt.span == passkey_prompt(tiny[1], 300, 0.5).span


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


def test_filler_that_is_empty_is_refused(tiny, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="empty.txt: an empty filler"):
        read_filler(tmp_path / "empty.txt", tiny[1])


# ---- passkeys: the answers

def test_the_first_integer_of_an_answer():
    assert first_integer(" 71432. The sky is 5") == "71432" and first_integer("The sky") == ""


@pytest.mark.parametrize("method", ["rope", "mesa", "self-extend:attn-scale=logn"])
def test_answers_and_their_probabilities(tiny, method):
    """Of a batch with a cache, in pieces, as of a pass over prompt and answer at once, one prompt at a time."""
    model, tokenizer = tiny
    trials = trials_of(tokenizer, 400, "--depths", 2, "--trials", 1)
    answers, logps = answer_batch(model, tokenizer, trials, Method.parse(method), "auto")
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


def test_table():
    rows = made_up("mesa", 256, "++") + made_up("mesa", 512, "+-")
    rows += made_up("rope", 256, "+-") + made_up("rope", 512, "-")
    assert table(rows, ["rope", "mesa"], [256, 512], L=256) == (
        "| method | 256 (1x) | 512 (2x) |\n"
        "|---|---|---|\n"
        "| rope | 0.50 | 0.00 |\n"
        "| mesa | 1.00 | 0.50 |")


def test_heatmap():
    rows = made_up("mesa", 256, "++") + made_up("mesa", 1024, "-+")
    assert heatmap(rows, "mesa", [256, 1024], cells=2, in_colour=False) == (
        "mesa: accuracy by depth (down) and length\n"
        "  0%- 50%  1.00  0.00 \n"
        " 50%-100%  1.00  1.00 \n"
        "             256  1024")
    assert "\033[" in heatmap(rows, "mesa", [256], cells=2, in_colour=True)
    assert coloured(0.0) == "\033[48;2;220;60;70m\033[97m 0.00 \033[0m" and "48;2;40;180;70m" in coloured(1.0)


def test_what_cut_needles_cost():
    rows = made_up("mesa", 256, answers="+-++-", cut="xx...")
    assert cut_line(rows, "mesa") == ("mesa: 2 of 5 needles are cut by a boundary: accuracy 0.500, whole ones 0.667; "
                                      "1 of 2 misses are cut needles")
    assert cut_line(made_up("rope", 256, "+-"), "rope") is None


def test_report_says_what_cut_needles_cost(capsys):
    rows = made_up("mesa", 256, "+-", cut=".x") + made_up("rope", 256, "+-") + made_up("other", 256, "--", cut="xx")
    args = eval_passkey.parse_args(["--lengths", "256", "--depths", "2"])
    args.methods = [Method("mesa"), Method("rope")]
    eval_passkey.report(args, rows, L=256)
    out = capsys.readouterr().out
    assert out.startswith("| method | 256 (1x) |") and out.count("by depth") == 2 and "other" not in out
    assert out.splitlines()[-1] == cut_line(rows, "mesa")


def test_kmax_stops_at_the_first_failure():
    """Right from the end of the prompt, the last cell, up to a gap: what lies behind the gap does not count."""
    gaps = made_up("m", 3200, 5 * "+" + "-" + 14 * "+" + "-" + 11 * "+")
    assert kmax(gaps, "m", 3200) == 1100
    assert kmax(made_up("m", 3200, KMAX_CELLS * "+"), "m", 3200) == 3200
    assert kmax(made_up("m", 3200, KMAX_CELLS * "-"), "m", 3200) == 0


def test_kmax_needs_a_fifth_of_the_answers():
    right = made_up("m", 320, KMAX_CELLS * "+")
    wrong = made_up("m", 320, KMAX_CELLS * "-")
    assert kmax(right + 4 * wrong, "m", 320) == 320 and kmax(right + 5 * wrong, "m", 320) == 0


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
    file, out, err = grid
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
    assert [(row["method"], row["length"], row["cell"], row["trial"]) for row in rows[-4:]] == [
        ("pi:factor=8", 1024, 0, 0), ("pi:factor=8", 1024, 1, 0),
        ("mesa:first=20", 1024, 0, 0), ("mesa:first=20", 1024, 1, 0)]
    assert list(rows[-1]) == [
        "method", "length", "cell", "trial", "key", "answer", "correct", "logp", "cut",
        "ckpt", "weights", "task", "seed", "depths", "trials", "filler", "needles", "train_len", "dtype", "impl"]
    assert len(rows) == 12 and rows[-1]["key"] == rows[-1]["answer"] == "72641" and not rows[-1]["cut"]
    assert all(row["correct"] == (row["answer"] == row["key"]) and row["logp"] <= 0 for row in rows)


def test_what_is_finished_is_not_run_again(grid, monkeypatch):
    file, out, _ = grid
    before = file.read_bytes()
    monkeypatch.setattr(eval_passkey, "prefill", None)  # calling it would fail
    code, again, _ = run(eval_passkey, *GRID, "--results", file)
    assert code == 0 and again == out and file.read_bytes() == before
    code, part, _ = run(eval_passkey, *GRID, "--results", file, "--method", "rope", "--lengths", "1024")
    assert code == 0 and part.splitlines()[2:4] == ["| rope | 0.50 |", ""]


@pytest.mark.parametrize("rows", [10, 11])
def test_a_file_cut_anywhere_becomes_the_same_again(grid, tmp_path, rows):
    """Between two batches of two rows, and inside of one; each time in the middle of a line."""
    whole = grid[0].read_bytes()
    broken = tmp_path / "r.jsonl"
    broken.write_bytes(b"".join(whole.splitlines(keepends=True)[:rows]) + b'{"method": "me')
    code, out, _ = run(eval_passkey, *GRID, "--results", broken)
    assert code == 0 and out == grid[1] and broken.read_bytes() == whole


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
    file = tmp_path / "r.jsonl"
    killed = subprocess.run([sys.executable, "-c", KILLS_ITSELF, *GRID, "--results", file], cwd=ROOT,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
    assert killed.returncode == -signal.SIGKILL and len(rows_of(file)) == 8
    code, out, _ = run(eval_passkey, *GRID, "--results", file)
    assert code == 0 and out == grid[1] and file.read_bytes() == grid[0].read_bytes()


def test_results_of_other_settings_do_not_mix(tmp_path):
    file = tmp_path / "r.jsonl"
    args = ("--methods", "rope", "--lengths", "256", "--depths", "1", "--trials", "1", "--results", file)
    others = [(), ("--seed", "1"), ("--task", "lines"), ("--task", "kv"), ("--needles", "2"), ("--filler", LICENSE),
              ("--train-len", "300"), ("--dtype", "bfloat16"), ("--impl", "dense"), ("--ckpt", "tiny-cosine")]
    for _ in range(2):
        for more in others:
            assert run(eval_passkey, *args, *more)[0] == 0
    rows = rows_of(file)
    assert len(rows) == len(others)
    assert [row["task"] for row in rows[:4]] == ["passkey", "passkey", "lines", "kv"]


def test_methods_and_lengths_by_default(monkeypatch):
    """What config.json says first, and 1, 2, 4 and 8 windows."""
    asked = []
    monkeypatch.setattr(eval_passkey, "run_grid", lambda args, *_: asked.append(args))
    monkeypatch.setattr(eval_passkey, "report", lambda *_: None)
    run(eval_passkey)
    run(eval_passkey, "--ckpt", "tiny-alibi")
    assert [str(method) for method in asked[0].methods] == ["rope", "pi", "rerope", "self-extend", "mesa"]
    assert [str(method) for method in asked[1].methods] == ["alibi", "rerope", "self-extend", "mesa"]
    assert asked[0].lengths == [256, 512, 1024, 2048]


def test_the_effective_window_of_a_method(tmp_path, monkeypatch):
    monkeypatch.setattr(eval_passkey, "KMAX_CELLS", 4)
    monkeypatch.setattr(eval_passkey, "KMAX_TRIALS", 1)
    args = ("--kmax", "--method", "rope", "--lengths", "256", "--results", tmp_path / "r.jsonl")
    assert run(eval_passkey, *args)[1].splitlines()[-1] == "rope: k_max 256 of 256"
    assert len(rows_of(tmp_path / "r.jsonl")) == 4


@pytest.mark.parametrize("args, named", [
    (("--methods", "ropee"), "did you mean rope"),
    (("--methods", "mesa:fist=1"), "fist"),
    (("--methods", "rope:attn-scale=x"), "attention scale 'x'"),
    (("--method", ","), "no method"),
    (("--lengths", "20"), "at least"),
    (("--lengths", "-4"), "-4"),
    (("--task", "lines", "--lengths", "30"), "too few"),
    (("--trials", "0"), "--trials"),
    (("--needles", "9"), "--needles"),
    (("--task", "kv", "--needles", "2"), "--needles"),
    (("--filler", "nowhere.txt"), "nowhere.txt"),
    (("--ckpt", "nowhere"), "nowhere")], ids=str)
def test_bad_input_is_one_clear_line(args, named, tmp_path):
    code, out, err = run(eval_passkey, *args, "--results", tmp_path / "r.jsonl")
    assert code == 2 and not out and named in err.splitlines()[-1] and "Traceback" not in err
    assert not (tmp_path / "r.jsonl").exists()


def test_a_method_beyond_its_reach_is_warned_of():
    _, _, err = run(eval_passkey, "--methods", "rope", "--lengths", "512,20")  # 20 tokens are too few: nothing is run
    assert err.startswith("warning: rope puts tokens 511 apart") and "at least" in err.splitlines()[-1]


def test_picture_of_passkeys(grid, tmp_path):
    pytest.importorskip("matplotlib")
    code, out, _ = run(eval_passkey, *GRID, "--results", grid[0], "--plot", tmp_path / "p.png")
    assert code == 0 and out == grid[1] and (tmp_path / "p.png").stat().st_size > 1000


@pytest.mark.parametrize("script, args", [(eval_passkey, ()), (eval_perplexity, (LICENSE, "--length", "100"))])
def test_a_picture_without_matplotlib_is_refused_before_anything_long(script, args, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, err = run(script, *args, "--plot", tmp_path / "p.png", "--results", tmp_path / "r.jsonl")
    assert code == 2 and not out and "pip install matplotlib" in err.splitlines()[-1]
    assert not (tmp_path / "r.jsonl").exists()


# ---- perplexity: the loss

def test_losses_in_pieces_are_those_of_one_pass(tiny):
    model, tokenizer = tiny
    ids = record_prompt(tokenizer, "lines", 400, 0.5, random.Random(0)).ids
    for method in ("rope", "mesa:first=16"):
        at_once = F.cross_entropy(model(torch.tensor([ids]), model.plan(method, n=400))[0, :-1], torch.tensor(ids[1:]),
                                  reduction="none")
        in_pieces = losses(model, ids, method, chunk=70)
        assert in_pieces.shape == (399,) and (in_pieces - at_once).abs().max() < 1e-3


def record_of_600(tokenizer):
    return record_prompt(tokenizer, "lines", 600, 0.5, random.Random(0)).ids


# The mean loss of record_of_600 on checkpoints/tiny, by transformers 5.23: the last line of
# test_losses_recorded_are_those_of_transformers.
RECORDED = {"rope": 2.154894, "pi:factor=2": 2.036041, "dynamic-ntk": 1.522756, "yarn:factor=2": 1.430883}
SCALING = {
    "rope": None,
    "pi:factor=2": {"rope_type": "linear", "factor": 2.0},
    "dynamic-ntk": {"rope_type": "dynamic", "factor": 1.0},
    "yarn:factor=2": {"rope_type": "yarn", "factor": 2.0},
}


@pytest.mark.parametrize("method", RECORDED)
def test_losses_are_those_recorded_of_transformers(tiny, method):
    """600 tokens, beyond the window of 256."""
    model, tokenizer = tiny
    assert float(losses(model, record_of_600(tokenizer), method).mean()) == pytest.approx(RECORDED[method], abs=1e-4)


@pytest.mark.parametrize("method", SCALING)
@torch.inference_mode()
def test_losses_recorded_are_those_of_transformers(tiny, method):
    transformers = pytest.importorskip("transformers")
    folder = ROOT / "checkpoints" / "tiny"
    config = transformers.AutoConfig.from_pretrained(folder)
    if SCALING[method]:
        config.rope_parameters = {**SCALING[method], "rope_theta": 500.0}
    other = transformers.AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
    ids = torch.tensor(record_of_600(tiny[1]))
    logits = other(ids[None]).logits[0, :-1].float()
    assert float(F.cross_entropy(logits, ids[1:])) == pytest.approx(RECORDED[method], abs=1e-4)


# ---- perplexity: the two protocols

def test_sliding_windows():
    assert sliding_windows(10, 6, 2) == [Window(0, 6, 0), Window(2, 8, 6), Window(4, 10, 8)]
    assert sliding_windows(5, 6, 2) == [Window(0, 5, 0)]


@pytest.mark.parametrize("count, window, stride", [(1000, 300, 64), (1000, 300, 300), (299, 300, 1), (17, 5, 3)])
def test_windows_score_every_token_once(count, window, stride):
    windows = sliding_windows(count, window, stride)
    scored = [token for w in windows for token in range(w.first_scored, w.end)]
    assert scored == list(range(count)) and all(w.end - w.begin <= window for w in windows)
    assert all(w.first_scored - w.begin >= window - stride for w in windows[1:])  # so much is seen by every other token


@pytest.fixture
def book(tmp_path):
    """A text that the model knows."""
    file = tmp_path / "book.txt"
    file.write_text((FILLER + " ") * 60)
    return file


def test_loss_by_position(book, tmp_path):
    """Beyond its window plain RoPE loses the text, and Mesa does not; a second run reads what is there."""
    args = (book, "--methods", "rope,mesa", "--length", 1024, "--buckets", 4, "--results", tmp_path / "p.jsonl")
    code, out, _ = run(eval_perplexity, *args)
    title, header, _, *lines = out.splitlines()
    assert code == 0
    assert title == "nats per token by position; 1 documents of 1024 tokens, one pass each, window 256"
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

    code, out, _ = run(eval_perplexity, *args, "--documents", 3)
    three = rows_of(tmp_path / "p.jsonl")
    assert code == 0 and three[:2] == two and [row["document"] for row in three] == [0, 1, 2]
    assert float(out.splitlines()[-1].split("|")[2]) == pytest.approx(sum(row["nll"] for row in three) / 3, abs=1e-3)


def test_perplexity_by_sliding_window(tiny, tmp_path):
    model, tokenizer = tiny
    args = (LICENSE, "--methods", "rope", "--window", 101, "--tokens", 250, "--results", tmp_path / "p.jsonl")
    code, out, _ = run(eval_perplexity, *args)
    title, header, _, line = out.splitlines()
    assert code == 0 and header == "| method | per token | mean of windows |"
    assert title == "perplexity; sliding window of 101 tokens, stride 50, BOS in every window, only unscored tokens"

    ids = tokenizer.encode(LICENSE.read_text(), bos=False)[:250]
    parts = [losses(model, [1] + ids[0:100], "rope"), losses(model, [1] + ids[50:150], "rope")[-50:],
             losses(model, [1] + ids[100:200], "rope")[-50:], losses(model, [1] + ids[150:250], "rope")[-50:]]
    per_token, of_windows = [float(cell) for cell in line.split("|")[2:4]]
    assert per_token == pytest.approx(math.exp(torch.cat(parts).mean()), abs=1e-3)
    assert of_windows == pytest.approx(math.exp(sum(part.mean() for part in parts) / 4), abs=1e-3)

    rows = rows_of(tmp_path / "p.jsonl")
    assert [(row["span"], row["tokens"]) for row in rows] == [(0, 100), (1, 50), (2, 50), (3, 50)]
    assert run(eval_perplexity, *args)[1] == out and rows_of(tmp_path / "p.jsonl") == rows


def test_another_text_of_the_same_name_is_not_read_from_the_results(tmp_path):
    outs = []
    for text in ("The sky is blue. ", "A list of all values that are given. "):
        (tmp_path / "book.txt").write_text(text * 30)
        outs.append(run(eval_perplexity, tmp_path / "book.txt", "--method", "rope", "--length", 100, "--buckets", 1,
                        "--results", tmp_path / "p.jsonl")[1])
    assert outs[0] != outs[1] and len(rows_of(tmp_path / "p.jsonl")) == 2


def test_real_weights_beyond_their_window(asset, tmp_path):
    """A checkpoint trained by others, on a text of its kind: plain RoPE's loss explodes, and Mesa's does not."""
    text = asset("texts") / "tinystories_valid_30k.txt"
    out = run(eval_perplexity, text, "--ckpt", asset("tok105"), "--methods", "rope,mesa", "--length", 1024, "--buckets",
              2, "--results", tmp_path / "p.jsonl")[1]
    rope, mesa = [float(line.split("|")[3]) for line in out.splitlines()[3:5]]
    assert rope > 4 and mesa < 1.5


@pytest.mark.parametrize("args, named", [
    (("nowhere.txt",), "nowhere.txt"),
    ((ROOT / "checkpoints/tiny/tokenizer.model",), "UTF-8"),
    ((LICENSE, "--methods", "x", "--length", "200"), "unknown method 'x'"),
    ((LICENSE, "--length", "99999"), "--length 99999"),
    ((LICENSE, "--documents", "9"), "--documents 9"),
    ((LICENSE, "--length", "5"), "--buckets 8"),
    ((LICENSE, "--window", "256", "--stride", "256"), "leaves gaps"),
    ((LICENSE, "--window", "256", "--length", "5"), "another protocol")], ids=lambda args: " ".join(map(str, args[1:])))
def test_bad_input_of_perplexity_is_one_clear_line(args, named, tmp_path):
    code, out, err = run(eval_perplexity, *args, "--results", tmp_path / "p.jsonl")
    assert code == 2 and not out and named in err.splitlines()[-1] and "Traceback" not in err
    assert not (tmp_path / "p.jsonl").exists()


def test_a_text_too_short(tmp_path):
    (tmp_path / "short.txt").write_text("")
    assert "too short a text" in run(eval_perplexity, tmp_path / "short.txt")[2]


def test_picture_of_losses(book, tmp_path):
    pytest.importorskip("matplotlib")
    args = (book, "--methods", "rope,mesa", "--length", 300, "--results", tmp_path / "p.jsonl")
    code, _, _ = run(eval_perplexity, *args, "--plot", tmp_path / "p.png")
    assert code == 0 and (tmp_path / "p.png").stat().st_size > 1000
