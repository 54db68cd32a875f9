"""train.py: a run depends on its settings alone, survives a kill, and writes a folder others can read."""
import json
import random
import re
import zlib
from pathlib import Path

import pytest
import torch

import train
from checkpoint import UNFINISHED
from cli import run_command
from config import Config
from model import load
from ruler_tasks import RulerPrompt, is_held_out
from tasks import FILLER, NEEDLE
from tokenizer import load_tokenizer

TINY = Path(__file__).resolve().parents[1] / "checkpoints" / "tiny"
TEXTS = [f"The {a} cat sat on the {b} mat, and nobody in the {a} house asked why it was {b}. It slept."
         for a in ("grey", "old", "small", "quick") for b in ("red", "warm", "dusty", "round")]
SMALL = ("--steps 4 --batch 6 --window 160 --vocab 400 --width 16 --layers 1 --heads 2 --kv-heads 1 "
         "--save-every 2").split()


@pytest.fixture(autouse=True, scope="module")
def few_documents():
    """And whatever the threads of a run, the tests of other files keep theirs."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "prose", lambda: TEXTS)
        yield
    torch.set_num_threads(threads)


def small(*flags):
    """The settings of a small run."""
    return train.parse_args(["--out", "x", *SMALL, *flags])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    train.run(["--out", str(folder), *SMALL])
    return folder


@pytest.fixture(scope="module")
def corpus(finished):
    """What the run draws its batches from."""
    model, tokenizer = load(finished)
    return train.make_corpus(small(), tokenizer, TEXTS, model.config)


# ---- the parts

def test_a_docstring_becomes_one_line(tmp_path):
    """Those of 200 characters and more; a file that is no Python has none."""
    file = tmp_path / "a.py"
    file.write_text('def f():\n    """Short."""\n\n\ndef g():\n    """' + "Long\n    words. " * 30 + '"""\n')
    assert train.docstrings(file) == [("Long words. " * 30).strip()]
    file.write_text("def f(:\n")
    assert train.docstrings(file) == []


def test_learning_rate_rises_then_falls():
    args = train.parse_args(["--out", "x", "--steps", "1000", "--warmup", "10", "--lr", "0.01"])
    rates = [train.learning_rate(step, args) for step in range(1000)]
    assert rates[0] == pytest.approx(0.001) and rates[500] == pytest.approx(0.01 * 0.51)
    assert rates[999] == pytest.approx(0.01 * 0.02, rel=1e-3)
    assert max(rates) == pytest.approx(0.01, rel=1e-3) and rates.index(max(rates)) == 9


def test_updates_of_matrices_are_orthogonal():
    x = torch.randn(48, 20, generator=torch.Generator().manual_seed(0))
    for matrix in (x, x.T):
        values = torch.linalg.svdvals(train.orthogonal(matrix))
        assert 0.6 < float(values.min()) and float(values.max()) < 1.3


# ---- batches

@pytest.mark.parametrize("step, shape, ids_sum, weights_sum", [
    (0, (56, 74), 638646374, 3320746687), (1200, (16, 257), 3096611862, 4207588464)])
def test_the_same_numbers_are_drawn_as_ever(step, shape, ids_sum, weights_sum):
    """Checksums of two batches: with other draws the commands of the shipped checkpoints would make other weights.
    Rows are short at first, and as long as the window in the end."""
    args = train.parse_args(["--out", "x"])
    config = Config.from_hf(TINY)
    corpus = train.make_corpus(args, load_tokenizer(TINY, config.bos_token_id), TEXTS, config)
    ids, weights = train.batch(step, args, corpus, config)
    tenths = (10 * weights).round().int()
    assert tuple(ids.shape) == shape
    assert zlib.crc32(str(ids.tolist()).encode()) == ids_sum
    assert zlib.crc32(str(tenths.tolist()).encode()) == weights_sum


def test_ruler_rows_are_drawn_from_what_the_evaluation_leaves(corpus):
    """Every kind of the mix comes up, each row ends in its answer and filler that does not count, and no name, value or
    help topic is one of the evaluation's."""
    args = train.parse_args(["--out", "x", "--mix", "ruler"])
    config = Config.from_hf(TINY)
    corpus = train.make_corpus(args, load_tokenizer(TINY, config.bos_token_id), TEXTS, config)
    assert corpus.material.test is False
    seen = set()
    for step in (2000, 2001):
        ids, weights = train.batch(step, args, corpus, config)
        assert ids.shape == (len(weights), weights.shape[1] + 1)
        for kind, row, weight in zip(train.kinds(args, step, len(ids)), ids, weights):
            seen.add(kind)
            text = corpus.tokenizer.decode(row.tolist())
            answer = corpus.tokenizer.decode(row[1:][weight == 8.0].tolist())
            if kind in train.RULER and answer:
                found = re.findall(r"[a-z]+-[a-z]+(?= is)|[A-Z]{3}|\d{5}", answer)
                assert answer in text and FILLER[:9] not in answer and not any(map(is_held_out, found))
    assert seen == set(train.MIXES["ruler"])


def test_needles_said_again_stand_in_the_prompt_and_their_values_count():
    tokenizer = load_tokenizer(TINY, 1)
    text = "The magic number of red-ant is 12345.\nThe grass.\nThe magic number of old-bee is 67890.\nWhat is"
    prompt = RulerPrompt([], text, ["12345"], "12345.", "niah_multikey_1")
    again = train.needles_again(random.Random(0), tokenizer, prompt, 200)
    needles = sorted(tokenizer.decode(again.ids).replace(". The", ".\nThe").splitlines())
    assert needles == sorted(text.split("\n")[0:3:2])
    counted = [token for token, weight in zip(again.ids, again.weights) if weight == 4.0]
    assert sorted(tokenizer.decode(counted).replace(" ", "").split(".")) == ["", "12345", "67890"]
    one = len(tokenizer.encode("The magic number of red-ant is 12345.", bos=False))
    assert len(train.needles_again(random.Random(0), tokenizer, prompt, one).ids) <= one
    assert not train.needles_again(random.Random(0), tokenizer, prompt, 5).ids


def test_an_answer_that_may_be_in_any_order_is_in_that_of_the_text():
    prompt = RulerPrompt([], "first 222, then 111, and 333", ["111", "222", "333"], "111, 222, and 333.", "")
    prompt.task = "niah_multivalue"
    assert train.in_order(prompt) == "222, 111, and 333."
    prompt.task = "niah_multiquery"  # in the order of the question
    assert train.in_order(prompt) == prompt.answer


@pytest.mark.parametrize("task, question, value", [
    ("kv", r"of ([a-z-]+)\? \1: (\d{5}),$", r"(\d{5}),"),
    ("lines", r"of line ([a-z-]+)\? line \1: REGISTER_CONTENT is <(\d{5})>$", r"<(\d{5})>")])
def test_a_record_asks_for_what_it_holds(task, question, value, corpus):
    """The answer stands behind the same name in the record. Predicting it and </s>, and each value of an entry that is
    said again, has a weight of 8; the rest one of 0.1."""
    tokenizer = corpus.tokenizer
    for seed in range(12):
        row = train.record_row(random.Random(seed), task, corpus, 300, 2)
        text = tokenizer.decode(row.ids)
        name, answer = re.search(question, text).groups()
        record = text.split("What is")[0]
        assert len(row.ids) == len(row.weights) + 1 == 301
        assert train.RECORDS[task].entry.format(name=name, value=answer) in record

        values = re.findall(value, record)
        said_again = [value for k, value in enumerate(values) if value in values[:k]]
        taught = tokenizer.decode([token for token, weight in zip(row.ids[1:], row.weights) if weight == 8])
        assert re.findall(r"\d{5}", taught) == [*said_again, answer] and set(row.weights) == {0.1, 8.0}


def test_some_needles_are_torn(corpus):
    """A fifth, with filler inside."""
    rng = random.Random(0)
    whole = 0
    for _ in range(200):
        text = corpus.tokenizer.decode(train.passkey_row(rng, corpus, 300, 2).ids)
        whole += NEEDLE.format(key=text[-6:-1]) in text
    assert 140 < whole < 190


# ---- the run

def test_an_interrupted_run_ends_in_the_same_weights(finished, tmp_path, monkeypatch):
    """Killed one step after a save: that step is done again. With other settings it does not go on."""
    step = train.train_step

    def dies(number, *rest):
        if number == 3:
            raise KeyboardInterrupt
        return step(number, *rest)
    monkeypatch.setattr(train, "train_step", dies)
    with pytest.raises(KeyboardInterrupt):
        train.run(["--out", str(tmp_path), *SMALL])
    (tmp_path / "training-state.part").write_bytes(b"half a save")  # what a kill during a save leaves
    assert (tmp_path / UNFINISHED).exists() and not (tmp_path / "model.safetensors").exists()

    monkeypatch.setattr(train, "train_step", step)
    with pytest.raises(ValueError, match="other settings"):
        train.run(["--out", str(tmp_path), *SMALL, "--seed", "2"])
    train.run(["--out", str(tmp_path), *SMALL])
    assert (tmp_path / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()
    ours, theirs = [json.loads((folder / "training.json").read_text())["curve"] for folder in (tmp_path, finished)]
    assert [(entry["step"], entry["prose"]) for entry in ours] == [(entry["step"], entry["prose"]) for entry in theirs]


def test_a_finished_run_says_how_the_weights_were_made_and_is_not_overwritten(finished):
    record = json.loads((finished / "training.json").read_text())
    assert record["command"] == " ".join(["python train.py --out", str(finished), *SMALL])
    assert record["settings"]["kv_heads"] == 1 and "out" not in record["settings"]
    assert record["parameters"] == sum(weight.numel() for weight in load(finished)[0].parameters())
    assert [entry["step"] for entry in record["curve"]] == [2, 4]
    assert sorted(file.name for file in finished.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json",
        "training.json"]
    with pytest.raises(ValueError, match="finished run"):
        train.run(["--out", str(finished), *SMALL])


def test_init_starts_from_a_checkpoint(finished, tmp_path):
    """The same weights and the same tokenizer; a model of another shape is refused before anything is written."""
    model = train.new_model(small())
    train.start_from(finished, model)
    for name, weight in load(finished)[0].named_parameters():
        assert torch.equal(model.get_parameter(name), weight)

    start = ["--init", str(finished)]
    train.run(["--out", str(tmp_path / "next"), *SMALL, *start, "--steps", "1"])
    assert (tmp_path / "next" / "tokenizer.model").read_bytes() == (finished / "tokenizer.model").read_bytes()
    before, after = [json.loads((folder / "training.json").read_text()) for folder in (finished, tmp_path / "next")]
    assert "started_from" not in before and after["started_from"] == before
    for flags, named in ((["--width", "32"], "shapes"), (["--rope-theta", "10000"], "rope-theta 500")):
        with pytest.raises(ValueError, match=named):
            train.run(["--out", str(tmp_path / "other"), *SMALL, *start, *flags])
    assert not (tmp_path / "other").exists()


def test_init_from_cosine_to_dot_products_keeps_the_size_of_logits(tmp_path):
    """16 cos(q, k) against q.k/sqrt(8): |q| |k| becomes 16 sqrt(8). What the start is, is in its config.json."""
    train.write_folder(tmp_path, train.new_model(small("--cosine", "16", "--store", "bfloat16")))
    config = Config.from_hf(tmp_path)
    assert (config.freq, config.cosine_attention, config.dtype) == ("rope", 16, "bfloat16")
    model = train.new_model(small())
    train.start_from(tmp_path, model)
    attention = model.model.layers[0].self_attn
    x = torch.randn(1000, 16)  # rows of a norm: as long on average as there are channels
    with torch.no_grad():
        q = attention.q_proj(x).view(1000, 2, 8).square().sum(-1).mean().sqrt()
        k = attention.k_proj(x).view(1000, 1, 8).square().sum(-1).mean().sqrt()
    assert float(q * k) == pytest.approx(16 * 8 ** 0.5, rel=0.1)


def test_other_positions_are_in_config_json(tmp_path):
    train.write_folder(tmp_path, train.new_model(small("--position", "alibi")))
    assert Config.from_hf(tmp_path).freq == "alibi"


def test_transformers_reads_the_folder(finished):
    transformers = pytest.importorskip("transformers")
    model, tokenizer = load(finished)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(finished)
    ids = torch.tensor([tokenizer.encode("The old cat sat on the warm mat.")])
    ours = model(ids, model.plan("rope", n=ids.shape[1]))
    assert torch.allclose(ours, theirs(ids).logits, atol=1e-4)


@pytest.mark.parametrize("bad, named", [
    (["--steps", "-1"], "steps"), (["--lr", "nan"], "lr"), (["--heads", "3"], "--heads must divide"),
    (["--kv-heads", "3", "--heads", "4"], "--kv-heads divide"),
    (["--vocab", "5000"], "train.py: --vocab 5000"),  # more than the texts yield
    (["--window", "64"], "train.py: --window 64")])   # less than the shortest prompt takes
def test_bad_settings_are_one_clear_line(bad, named, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        run_command(lambda: train.run(["--out", str(tmp_path), *SMALL, *bad]), "train.py")
    assert end.value.code == 2 and named in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "model.safetensors").exists()
