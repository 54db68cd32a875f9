"""train.py: a run depends on its settings alone, survives a kill, and writes a folder others can read."""
import json
import random
import re

import pytest
import torch

import train
from model import load

TEXTS = [f"The {a} cat sat on the {b} mat, and nobody in the {a} house asked why it was {b}. It slept."
         for a in ("grey", "old", "small", "quick") for b in ("red", "warm", "dusty", "round")]
SMALL = ("--steps 6 --batch 7 --window 320 --vocab 400 --width 16 --layers 1 --heads 2 --kv-heads 1 "
         "--save-every 2").split()


@pytest.fixture(autouse=True)
def few_documents(monkeypatch):
    monkeypatch.setattr(train, "prose", lambda: TEXTS)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(folder, *more):
    train.main(["--out", str(folder), *SMALL, *more])
    return load(folder)


def weights(model):
    return torch.cat([w.flatten() for w in model.parameters()])


def test_an_interrupted_run_ends_in_the_same_weights(tmp_path, monkeypatch):
    whole, _ = run(tmp_path / "whole")
    step = train.train_step

    def dies(number, *rest):
        if number == 5:  # one step after a save: that step is done again
            raise KeyboardInterrupt
        return step(number, *rest)
    monkeypatch.setattr(train, "train_step", dies)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut")
    (tmp_path / "cut" / "training-state.part").write_bytes(b"half a save")  # what a kill during a save leaves
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    monkeypatch.setattr(train, "train_step", step)
    resumed, _ = run(tmp_path / "cut")
    assert torch.equal(weights(whole), weights(resumed))
    curves = [json.loads((tmp_path / run / "training.json").read_text())["curve"] for run in ("whole", "cut")]
    assert [entry["step"] for entry in curves[1]] == [2, 4, 6]
    assert [entry["prose"] for entry in curves[0]] == [entry["prose"] for entry in curves[1]]


def test_other_settings_do_not_continue_an_unfinished_run(tmp_path, monkeypatch):
    def dies(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(train, "write_folder", dies)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    with pytest.raises(ValueError, match="other settings"):
        run(tmp_path, "--seed", "2")


def test_a_finished_run_is_not_overwritten(tmp_path):
    run(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.model",
        "tokenizer_config.json", "training.json"]
    with pytest.raises(ValueError, match="finished run"):
        run(tmp_path)


def test_batches_are_what_they_say(tmp_path):
    """As long as each other and no longer than the window; what is no prose ends in an answer of five digits."""
    model, tokenizer = run(tmp_path)
    args = train.settings(["--out", str(tmp_path), *SMALL])
    corpus = train.make_corpus(args, tokenizer, TEXTS, model.config)
    for step in (0, 700, 800, 5000):
        ids, loss_weights = train.batch(step, args, corpus, model.config)
        assert torch.equal(ids, train.batch(step, args, corpus, model.config)[0])
        assert ids.shape[1] == loss_weights.shape[1] + 1 <= args.window + 1
        assert (ids[:, 0] == 1).all() and len(ids) >= len(train.MIX)
        for kind, row, weight in zip(train.kinds(len(ids)), ids.tolist(), loss_weights):
            if kind == "prose":
                assert (weight == 1).all()
                continue
            text = tokenizer.decode(row)
            answer = re.search(r"(\d{5})\W$", text).group(1)
            assert row[-1] == 2 and text.count(answer) >= 2 and weight[-7:].min() > 1


def test_a_record_asks_for_what_it_holds(tmp_path):
    """The answer stands behind the same name in the record; names are told apart by nothing else."""
    model, tokenizer = run(tmp_path)
    args = train.settings(["--out", str(tmp_path), *SMALL])
    corpus = train.make_corpus(args, tokenizer, TEXTS, model.config)
    for seed in range(20):
        ids, weights = train.record_row(random.Random(seed), "kv", corpus, 300, 2)
        text = tokenizer.decode(ids)
        name, answer = re.search(r"of ([a-z-]+)\? \1: (\d{5}),$", text).groups()
        assert len(ids) == len(weights) + 1 == 301 and f"{name}: {answer}," in text.split("What is")[0]


def test_init_starts_from_a_checkpoint(tmp_path):
    """The same weights and tokenizer; from cosine to dot products, logits of about the same size."""
    first, _ = run(tmp_path / "cosine", "--cosine", "16", "--store", "float32")
    model = train.new_model(train.settings(["--out", "x", *SMALL, "--cosine", "16"]))
    train.start_from(tmp_path / "cosine", model)
    assert torch.equal(weights(first), weights(model))
    model = train.new_model(train.settings(["--out", "x", *SMALL]))
    train.start_from(tmp_path / "cosine", model)
    x = torch.randn(1000, 16)
    q, k = (layer(x).unflatten(-1, (-1, 8)).norm(dim=-1).square().mean().sqrt()
            for layer in (model.model.layers[0].self_attn.q_proj, model.model.layers[0].self_attn.k_proj))
    assert float((q * k).detach()) == pytest.approx(16 * 8 ** 0.5, rel=0.1)
    run(tmp_path / "rope", "--init", str(tmp_path / "cosine"))
    assert (tmp_path / "rope/tokenizer.model").read_bytes() == (tmp_path / "cosine/tokenizer.model").read_bytes()
    with pytest.raises(ValueError, match="shapes"):
        run(tmp_path / "wide", "--init", str(tmp_path / "cosine"), "--width", "32")
    assert not (tmp_path / "wide").exists()


def test_updates_of_matrices_are_orthogonal():
    x = torch.randn(48, 20, generator=torch.Generator().manual_seed(0))
    for shape in (x, x.T):
        assert 0.6 < float(torch.linalg.svdvals(train.orthogonal(shape)).min())
        assert float(torch.linalg.svdvals(train.orthogonal(shape)).max()) < 1.3


def test_most_needles_are_whole_and_some_are_torn(tmp_path):
    model, tokenizer = run(tmp_path)
    args = train.settings(["--out", str(tmp_path), *SMALL])
    corpus = train.make_corpus(args, tokenizer, TEXTS, model.config)
    rng, whole = random.Random(0), 0
    for _ in range(200):
        ids, _ = train.passkey_row(rng, corpus, 300, 2)
        text = tokenizer.decode(ids)
        whole += train.NEEDLE.format(key=text[-6:-1]) in text
    assert 140 < whole < 190


def test_transformers_reads_the_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    model, tokenizer = run(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([tokenizer.encode("The old cat sat on the warm mat.")])
    ours = model(ids, model.plan("rope", n=ids.shape[1]))
    assert torch.allclose(ours, theirs(ids).logits, atol=1e-4)


@pytest.mark.parametrize("bad", [("--steps", "-1"), ("--heads", "3"), ("--lr", "nan"), ("--window", "10"),
                                 ("--vocab", "5"), ("--batch", "5"), ("--kv-heads", "3", "--heads", "4")], ids=str)
def test_bad_settings_are_refused_before_anything_is_written(bad, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        run(tmp_path / "new", *bad)
    assert end.value.code == 2 and bad[0].strip("-") in capsys.readouterr().err and not (tmp_path / "new").exists()
