"""experiments/gau.py and infoscale.py: the layer is its formulas, plans and measures are their definitions."""
import io
import json
import math
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch

from experiments import infoscale
from experiments.gau import Gau, GauConfig, GauLayer, attend_wide
from plan import visible_keys
from rotation import cos_sin


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def small(**settings):
    torch.manual_seed(0)
    model = Gau(GauConfig(vocab_size=50, width=12, inner=20, key_size=8, layers=2, train_len=8, **settings))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3 * torch.randn_like(weight))  # gains too, and logits that differ
    return model


def by_pairs(model, tokens, factor):
    """Logits (T, vocab) of tokens (T,), pair by pair in float64, typed from the formulas; factor[i]: of all logits of
    query i."""
    c = model.config
    w = {name: weight.double() for name, weight in model.named_parameters()}
    T = len(tokens)
    angle = torch.tensor([c.rope_theta ** (-2 * p / c.key_size) for p in range(c.key_size // 2)], dtype=torch.float64)
    x = w["embed_tokens.weight"][tokens]
    x = x / (x ** 2).mean(1, keepdim=True).sqrt()
    for layer in range(c.layers):
        z = x @ w[f"layers.{layer}.in_proj.weight"].T
        z = z / (1 + (-z).exp())
        u, v, b = z[:, :c.inner], z[:, c.inner:2 * c.inner], z[:, 2 * c.inner:]
        q, k = b * w[f"layers.{layer}.gamma_q"], b * w[f"layers.{layer}.gamma_k"]
        logits = torch.full((T, T), -math.inf, dtype=torch.float64)
        for i in range(T):
            for j in range(i + 1 if c.causal else T):
                turn = (i - j) * angle
                a, d = q[i].chunk(2)
                e, f = k[j].chunk(2)
                dot = ((a * e + d * f) * turn.cos() + (a * f - d * e) * turn.sin()).sum()
                if c.cosine:
                    logits[i, j] = c.cosine * dot / q[i].norm() / k[j].norm()
                else:
                    logits[i, j] = dot / c.key_size ** 0.5
            logits[i] = logits[i] * factor[i]
        x = x + (u * (logits.softmax(1) @ v)) @ w[f"layers.{layer}.out_proj.weight"].T
        x = x / (x ** 2).mean(1, keepdim=True).sqrt()
    return x @ w["embed_tokens.weight"][:-1].T


def infoscale_of(keys, key_size=8, L=8):
    return (1 - keys ** (-2 / key_size)) ** 0.5 / (1 - L ** (-2 / key_size)) ** 0.5


@pytest.mark.parametrize("settings, method, factor", [
    ({}, "rope", lambda i: 1.0), ({"causal": False}, "rope", lambda i: 1.0), ({"cosine": 6.0}, "rope", lambda i: 1.0),
    ({}, "infoscale", lambda i: max(1.0, infoscale_of(i + 1))), ({}, "logn", lambda i: max(1.0, math.log(i + 1, 8))),
    ({"causal": False}, "infoscale", lambda i: infoscale_of(13)),
    ({"causal": False}, "logn", lambda i: math.log(13, 8)),
    ({"cosine": 6.0, "causal": False}, "infoscale", lambda i: infoscale_of(13))])
def test_logits_are_those_of_the_formulas(settings, method, factor):
    """13 tokens at L = 8, causal or not, dot products or cosines, each attention scale."""
    model = small(**settings)
    tokens = torch.randint(0, 51, (13,), generator=torch.Generator().manual_seed(1))
    want = by_pairs(model, tokens, [factor(i) for i in range(13)])
    assert torch.allclose(model(tokens[None], model.plan(method, n=13))[0].double(), want, atol=1e-4)


def test_sizes_are_those_of_gau_alpha():
    """3.64 million weights a layer; no biases."""
    layer = GauLayer(GauConfig(12000, 768, 1536, 128))
    assert sum(weight.numel() for weight in layer.parameters()) == 768 * 3200 + 1536 * 768 + 2 * 128


def test_who_sees_whom():
    assert visible_keys(small().plan(n=13)).tolist() == list(range(1, 14))
    assert visible_keys(small(causal=False).plan(n=13)).tolist() == [13] * 13


def test_blocks_of_queries_are_one_attention():
    model = small()
    plan = model.plan("logn", n=13)
    q, k, v = torch.randn(2, 1, 13, 8), torch.randn(2, 1, 13, 8), torch.randn(2, 13, 20)
    assert torch.allclose(attend_wide(q, k, v, plan, block=4), attend_wide(q, k, v, plan), atol=1e-6)
    assert cos_sin(plan, torch.arange(3), torch.device("cpu")).shape == (2, 3, 4)


# ---- the driver

def test_entropy_and_reach():
    """Uniform over 8 of 16 keys: ln 8, and 90 % of it within the 8th nearest; all on one key: 0, at its distance."""
    asking = torch.tensor([7, 15])
    uniform = torch.zeros(1, 1, 2, 16)
    uniform[..., 0, :8] = 1 / 8
    uniform[..., 1, 8:] = 1 / 8
    assert infoscale.entropy(uniform) == pytest.approx(math.log(8))
    assert infoscale.reach(uniform, asking) == 7
    one = torch.zeros(1, 1, 2, 16)
    one[..., 3] = 1
    assert infoscale.entropy(one) == 0 and infoscale.reach(one, asking) == (4 + 12) / 2


@pytest.mark.parametrize("architecture", infoscale.ARCHITECTURES)
def test_attention_is_watched_where_the_model_attends(architecture):
    """One entry a layer; weights sum to one over what a query sees, and log-n makes them sharper."""
    args = infoscale.parse_args(["--out", "x", "--window", "16"])
    torch.manual_seed(0)
    model = infoscale.build(args, architecture, None, 50)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    tokens = torch.randint(0, 50, (1, 64))
    entropies = {}
    for method in ("rope", "logn"):
        found = []
        hooks = infoscale.watch(model, found, torch.arange(48, 64))
        with torch.no_grad():
            model(tokens, model.plan(method, n=64))
        for hook in hooks:
            hook.remove()
        assert len(found) == (4 if architecture == "llama" else 6)
        assert all(0 <= each <= math.log(64) and 0 <= far < 64 for each, far in found)
        entropies[method] = found[0][0]
    assert entropies["logn"] < entropies["rope"]


def test_masked_words_are_read_as_the_mask_and_asked_for():
    args = infoscale.parse_args(["--out", "x"])
    model = infoscale.build(args, "gau-masked", None, 50)
    ids = torch.randint(0, 50, (40, 64))
    read, wanted, counted = infoscale.draw(model, ids, torch.Generator().manual_seed(0))
    assert torch.equal(wanted, ids) and torch.equal(read[~counted], ids[~counted]) and bool((read[counted] == 50).all())
    assert 0.12 < float(counted.float().mean()) < 0.18
    read, wanted, counted = infoscale.draw(infoscale.build(args, "gau", None, 50), ids, None)
    assert torch.equal(read, ids[:, :-1]) and torch.equal(wanted, ids[:, 1:]) and bool(counted.all())


def test_the_command_makes_its_tables_and_goes_on_where_it_was(tmp_path, monkeypatch):
    """All settings at two lengths; a training that was killed, and rows that are there, are not made again."""
    monkeypatch.setattr(infoscale, "prose", lambda: [f"The {word} is on the table." * 30 for word in "abcdefgh"] * 8)
    step = infoscale.train_step
    taken = []

    def counted(number, settings, *rest):
        taken.append(number)
        return step(number, settings, *rest)
    monkeypatch.setattr(infoscale, "train_step", counted)
    argv = ["--out", str(tmp_path), "--models", "gau-masked", "--steps", "2", "--batch", "2", "--seeds", "1,2",
            "--times", "1,2", "--documents", "1"]
    outs = []
    for _ in range(2):
        out = io.StringIO()
        with redirect_stdout(out), redirect_stderr(io.StringIO()):
            assert infoscale.run(argv) == 0
        outs.append(out.getvalue())
    assert outs[0] == outs[1] and len(taken) == 2 * 2 * 2
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 5 * 2 and all(len(row["entropy"]) == 6 for row in rows)
    assert "| CosScale+InfoScale |" in outs[0] and outs[0].count(" ± ") == 2 * 5 * 2
    found = {row["setting"]: row["loss"] for row in rows if row["n"] == 64 and row["seed"] == 1}
    assert found["softmax"] == pytest.approx(found["InfoScale"], abs=1e-4) != found["CosScale"]
