"""The evaluations: prompts of an exact length, results that survive a kill, losses that equal transformers'."""
import json
import math
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import eval_passkey
import eval_perplexity
from eval_passkey import GRID, Results, build, cases, kmax, parse_method, record
from model import load
from test_generate import ROOT, TINY, run

STORIES = "texts/tinystories_valid_30k.txt"


@pytest.fixture(scope="module")
def tokenizer():
    return load(TINY)[1]


# ---- prompts

@pytest.mark.parametrize("keys", [["12345"], ["11111", "22222", "33333"]])
@pytest.mark.parametrize("n", [180, 333])
def test_prompt_is_exact_and_holds_every_key(tokenizer, n, keys):
    filler = tokenizer.encode("Nothing to see. ", bos=False)
    for depth in (0, 0.4, 1):
        ids, (first, last) = build(tokenizer, n, depth, keys, filler)
        assert len(ids) == n and tokenizer.decode(ids[first:last + 1]).count(keys[-1]) == 2
        assert all(key in tokenizer.decode(ids) for key in keys) and not tokenizer.decode(ids).endswith(" ")


def test_needles_are_spread_evenly_and_keys_follow_the_seed(tokenizer):
    args = SimpleNamespace(depths=5, trials=3, seed=1, task="passkey", filler="repeat", needles=1)
    fill = eval_passkey.filler_ids(args, tokenizer)
    rows = cases(args, tokenizer, 300, fill)
    places = [span[0] for *_, span in rows]
    assert max(abs((b - a) - (places[1] - places[0])) for a, b in zip(places, places[1:])) <= 1
    assert [cell for cell, *_ in rows] == [c for c in range(5) for _ in range(3)]
    again = cases(args, tokenizer, 300, fill)
    other = cases(SimpleNamespace(**{**vars(args), "seed": 2}), tokenizer, 300, fill)
    assert [r[2] for r in rows] == [r[2] for r in again] != [r[2] for r in other]


@pytest.mark.parametrize("task", ["lines", "kv"])
def test_records_are_exact_and_ask_for_one_entry(tokenizer, task):
    """n tokens, full of entries, none named twice; the one asked for lies at its depth and holds the right value."""
    for n in (250, 333, 4000):
        for depth in (0, 0.5, 1):
            ids, (first, last), value = record(tokenizer, task, n, depth, random.Random(n))
            text, entry = tokenizer.decode(ids), tokenizer.decode(ids[first:last + 1])
            name = re.search(r"(?:line )?([a-z-]+):", entry).group(1)
            names = re.findall(r"line ([a-z-]+): R" if task == "lines" else r"([a-z-]+): \d", text.split(" What")[0])
            assert len(ids) == n and value in entry and text.endswith((f"{name}:", f"{name}: REGISTER_CONTENT is"))
            assert name in names and len(set(names)) == len(names) > n / 60
        assert first > 0.7 * n - 60


def test_method_with_settings():
    text = "self-extend:group=8:freq=yarn:attn-scale=logn"
    assert parse_method(text) == ("self-extend", "yarn", "logn", {"group": 8})


def test_kmax_stops_at_the_first_failure():
    """Right from the end (distance 0) up to a gap: what lies behind the gap does not count."""
    good = [c not in (5, 20) for c in range(GRID)]  # cell 31 is nearest to the end
    rows = [{"method": "m", "length": 3200, "cell": c, "correct": ok} for c, ok in enumerate(good)]
    assert kmax(rows, "m", 3200) == 100 * (GRID - 21)


# ---- results.jsonl

ARGS = ("--methods", "rope,mesa", "--lengths", "256,600", "--depths", "3", "--trials", "4")


def test_interrupted_run_ends_with_the_same_file(tmp_path):
    """Killed outright, half a line at the end of the file, and started again: byte for byte the undisturbed run."""
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    code, table, _ = run(*ARGS, "--results", whole, script="eval_passkey.py")
    assert code == 0 and len(whole.read_text().splitlines()) == 48
    process = subprocess.Popen([sys.executable, ROOT / "eval_passkey.py", *ARGS, "--results", broken],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while process.poll() is None and not broken.exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    broken.write_bytes(broken.read_bytes() + b'{"method": "ro')
    code, again, _ = run(*ARGS, "--results", broken, script="eval_passkey.py")
    assert code == 0 and again == table and broken.read_bytes() == whole.read_bytes()


def test_finished_trials_are_not_repeated_and_other_settings_do_not_mix(tmp_path):
    file, args = tmp_path / "r.jsonl", ("--methods", "rope", "--lengths", "256", "--depths", "1", "--trials", "2")
    tables = [run(*args, *more, "--results", file, script="eval_passkey.py")[1] for more in ((), (), ("--seed", "1"))]
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert tables[0] == tables[1] and [row["seed"] for row in rows] == [0, 0, 1, 1]
    assert all(row["correct"] == (row["answer"] == row["key"]) and row["logp"] <= 0 for row in rows)


@pytest.mark.parametrize("task", ["lines", "kv"])
def test_other_tasks_run_and_do_not_mix(task, tmp_path):
    file, args = tmp_path / "r.jsonl", ("--methods", "rope", "--lengths", "256", "--depths", "2", "--trials", "2")
    for kind in ("passkey", task):
        assert run(*args, "--task", kind, "--results", file, script="eval_passkey.py")[0] == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["task"] for row in rows] == ["passkey"] * 4 + [task] * 4


def test_a_row_of_other_settings_is_not_taken(tmp_path):
    file = tmp_path / "r.jsonl"
    first = Results(file, {"seed": 0}, ("method",))
    first.add([{"method": "rope", "x": 1}])
    first.add([{"method": "rope", "x": 2}])  # there already
    assert Results(file, {"seed": 0}, ("method",)).rows == {("rope",): {"method": "rope", "x": 1, "seed": 0}}
    assert not Results(file, {"seed": 1}, ("method",)).rows


def test_heatmap_and_plots(tmp_path):
    pytest.importorskip("matplotlib")
    files = "--results", tmp_path / "r.jsonl", "--plot", tmp_path / "p.png"
    code, out, err = run(*ARGS, *files, script="eval_passkey.py")
    assert code == 0 and "accuracy by depth" in out and "s left" in err and (tmp_path / "p.png").stat().st_size > 1000


@pytest.mark.parametrize("args, named", [
    (("--methods", "ropee"), "ropee"), (("--methods", "mesa:fist=1"), "fist"), (("--lengths", "20"), "at least"),
    (("--lengths", "-4"), "-4"), (("--trials", "0"), "trials"), (("--filler", "nowhere.txt"), "nowhere.txt"),
    (("--ckpt", "nowhere"), "nowhere"), (("--methods", "rope:attn-scale=x"), "x"),
    (("--task", "kv", "--needles", "2"), "needles"), (("--task", "lines", "--lengths", "30"), "few")])
def test_bad_input_is_one_clear_line(args, named, tmp_path):
    code, out, err = run(*args, "--results", tmp_path / "r.jsonl", script="eval_passkey.py")
    assert code == 2 and not out and named in err.splitlines()[-1] and "Traceback" not in err
    assert not (tmp_path / "r.jsonl").exists()


# ---- eval_perplexity.py

def test_windows_score_every_token_once():
    spans = eval_perplexity.windows(1000, 300, 64)
    scored = [t for _, end, first in spans for t in range(first, end)]
    assert scored == list(range(1000)) and all(end - begin <= 300 for begin, end, _ in spans)
    assert eval_perplexity.windows(10, 6, 2) == [(0, 6, 0), (2, 8, 6), (4, 10, 8)]


@pytest.mark.parametrize("method, scaling", [
    ("rope", None), ("pi:factor=2", {"rope_type": "linear", "factor": 2.0}),
    ("dynamic-ntk", {"rope_type": "dynamic", "factor": 1.0}), ("yarn:factor=2", {"rope_type": "yarn", "factor": 2.0})])
@torch.inference_mode()
def test_losses_equal_transformers(asset, method, scaling):
    """stories260K, 900 tokens, beyond its window of 512: mean loss to 1e-3 nats."""
    transformers = pytest.importorskip("transformers")
    folder = asset("stories260K")
    model, tokenizer = load(folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    if scaling:
        config.rope_parameters = {**scaling, "rope_theta": 10000.0}
    other = transformers.AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
    ids = tokenizer.encode(asset("texts").joinpath(Path(STORIES).name).read_text(encoding="utf-8"))[:900]
    ours = eval_perplexity.losses(model, ids, parse_method(method), chunk=200).mean()
    theirs = torch.nn.functional.cross_entropy(other(torch.tensor([ids])).logits[0, :-1].float(), torch.tensor(ids[1:]))
    assert abs(float(ours - theirs)) < 1e-3


def test_another_text_of_the_same_name_is_not_read_from_the_results(tmp_path):
    outs = []
    for text in ("The sky is blue. " * 30, "A list of all values that are given. " * 30):
        (tmp_path / "book.txt").write_text(text)
        outs.append(run(tmp_path / "book.txt", "--methods", "rope", "--length", 100, "--buckets", 1, "--results",
                        tmp_path / "p.jsonl", script="eval_perplexity.py")[1])
    assert outs[0] != outs[1] and len((tmp_path / "p.jsonl").read_text().splitlines()) == 2


def test_loss_by_position_and_sliding_window(asset, tmp_path):
    """Past tok105's window plain RoPE's loss explodes and Mesa's does not; a second run reads what is there."""
    args = (asset("texts") / Path(STORIES).name, "--ckpt", asset("tok105"), "--results", tmp_path / "p.jsonl")
    lines = [run(*args, "--methods", "rope,mesa", "--length", 1024, "--buckets", 2, script="eval_perplexity.py")[1]
             for _ in range(2)]
    assert lines[0] == lines[1] and len((tmp_path / "p.jsonl").read_text().splitlines()) == 4
    late = [float(row.split("|")[3]) for row in lines[0].splitlines()[3:5]]
    assert late[0] > 4 and late[1] < 1.5
    code, out, _ = run(*args, "--methods", "rope", "--window", 300, "--tokens", 1000, script="eval_perplexity.py")
    token, window = (float(x) for x in out.splitlines()[3].split("|")[2:4])
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines() if '"span"' in line]
    assert code == 0 and sum(row["tokens"] for row in rows) == 1000
    assert token == pytest.approx(math.exp(sum(r["nll"] * r["tokens"] for r in rows) / 1000), abs=1e-3)
    assert window == pytest.approx(math.exp(sum(r["nll"] for r in rows) / len(rows)), abs=1e-3)


@pytest.mark.parametrize("args, named", [
    ((ROOT / "nowhere.txt",), "nowhere.txt"), ((TINY / "tokenizer.model",), "UTF-8"),
    ((ROOT / "LICENSE", "--length", "99999"), "tokens"), ((ROOT / "LICENSE", "--length", "200", "--methods", "x"), "x"),
    ((ROOT / "LICENSE", "--window", "256", "--stride", "256"), "stride"),
    ((ROOT / "LICENSE", "--length", "5"), "buckets")])
def test_bad_input_of_perplexity_is_one_clear_line(args, named, tmp_path):
    code, out, err = run(*args, "--results", tmp_path / "p.jsonl", script="eval_perplexity.py")
    assert code == 2 and not out and named in err.splitlines()[-1] and "Traceback" not in err


def test_fingerprint_tells_checkpoints_apart(tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((TINY / name).read_bytes())
    same = eval_passkey.fingerprint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert same == eval_passkey.fingerprint(TINY) != eval_passkey.fingerprint(tmp_path)
