"""show.py: matrices as text, what a method costs and how far it reaches, the sentences that warn, every plot."""
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import show
from cli import run_command
from frequencies import FREQUENCIES, rope
from geometry import METHODS, full
from config import Config
from plan import distance
from positions import Method, make_plan

ROOT = Path(__file__).resolve().parents[1]


def plan_of(method, n, L):
    i = torch.arange(n)
    return make_plan(method, i, i, n=n, L=L, D=16, H=4)


def config_of(L, **changes):
    """The Config of a small model with a training length of L."""
    config = Config(vocab_size=16, hidden_size=64, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, head_dim=16, train_len=L)
    return replace(config, **changes)


@pytest.fixture
def command(capsys):
    """command("mesa", "--length", 12) -> (exit code, stdout, stderr) of show.py, in this process."""
    def call(*args):
        with pytest.raises(SystemExit) as end:
            run_command(lambda: show.run([str(arg) for arg in args]), "show.py")
        out, err = capsys.readouterr()
        return end.value.code, out, err
    return call


# ---- an example as text, and what it costs

def test_the_example_of_the_readme(command):
    """Its matrix, and its cost: 62 pairs of 78 seen, 23 in own chunks, 16 of the first chunk, 23 by the last."""
    length = "--length", 12, "--train-len", 6
    code, out, _ = command("mesa:first=2:chunk=4:width=2", *length)
    title, *matrix = out.splitlines()[:13]
    assert code == 0 and title == "mesa:first=2:chunk=4:width=2: prompt of 12 tokens, training length 6"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "".join(f"    {line}\n" for line in matrix) in readme
    assert out.splitlines()[13:] == [
        "region 1: 10 queries, 23 pairs, largest distance 3",
        "region 2: 8 queries, 16 pairs, largest distance 5",
        "region 3: 2 queries, 23 pairs, largest distance 7",
        "attended pairs: 62, 79.5% of full causal attention (78)"]
    assert command("mesa:first=2", *length, "--set", "chunk=4", "--set", "width=2")[1] == out


def test_parts_of_a_token_have_three_digits():
    text = show.picture(plan_of("leaky-rerope:window=2:k=3", 6, 12))
    assert text.splitlines()[-1].split() == ["3", "2.67", "2.33", "2", "1", "0"]


def test_every_method_has_an_example(command):
    for method in METHODS:
        code, out, _ = command(method)
        assert code == 0 and "prompt of 32 tokens, training length 16" in out, method


# ---- how far a method reaches

END = 2 ** 20  # of the search


@pytest.mark.parametrize("method, tokens", [
    ("rope", 64), ("infoscale", 64), ("pi:factor=3", 192), ("ntk:factor=3", 192), ("ntk-mixed:factor=7", 448),
    ("yarn:factor=2", 128), ("self-extend:window=24:group=8", 40 * 8 + 24), ("leaky-rerope:window=16:k=4", 16 + 4 * 48),
    ("string:shift=20:window=4", 64 + 20 - 4), ("dca:chunk=20:top=64", 40), ("dca:chunk=20:top=63", END),
    ("nope", END), ("alibi", END), ("streaming-llm", END), ("rerope:freq=pi:factor=2", END)])
def test_reach(method, tokens):
    """The longest prompt whose last token stays below L = 64: (L - W) G + W, W + k (L - W), factor L, ..."""
    assert show.reach(config_of(64), Method.parse(method)) == tokens


def test_reach_of_models_of_other_shapes():
    """With a rotary width below the head's; with another base; at the window that LaMPE has a fit for."""
    yarn = Method("yarn", params={"factor": 2.0})
    assert show.reach(config_of(64, rotary_dim=8), yarn) == show.reach(config_of(64, rope_theta=500.0), yarn) == 128
    assert show.reach(config_of(8192), Method("lampe")) == END


def test_pairs_at_rest_reach_no_further_than_those_that_turn(monkeypatch):
    """As in p-RoPE (arXiv 2410.06205): the slowest pair that turns counts, against plain RoPE's of the same index."""
    def p_rope(D, base, n, L):
        inv_freq, mscale = rope(D, base, n, L)
        inv_freq[6:] = 0
        return inv_freq / 3, mscale
    monkeypatch.setitem(FREQUENCIES, "p-rope", p_rope)
    monkeypatch.setitem(METHODS, "p-rope", (full, "p-rope", None))
    assert show.reach(config_of(64), Method("p-rope")) == 192


# ---- advice and warnings

@pytest.mark.parametrize("method", ["leaky-rerope:k=2.0", "self-extend:group=2", "stair:width=1", "mesa:width=1",
                                    "ntk:factor=2.0", "llama3", "infoscale:freq=pi:factor=2.0"])
def test_advice_is_the_smallest_value_that_does(method):
    """16 L and a bit: with the advised value of the parameter nothing is warned of, with one less it still is."""
    config, method, n = config_of(64), Method.parse(method), 16 * 64 + 5
    [warning] = show.warnings(config, method, n)
    name, value = re.search(r"--set (\w+)=(\d+) would do", warning).groups()
    assert show.warnings(config, Method.of(method, **{name: int(value)}), n) == []
    assert show.warnings(config, Method.of(method, **{name: int(value) - 1}), n) != []


def test_the_limit_is_the_training_length_with_what_is_decoded():
    """Of a prompt of 60 tokens and 4 new ones the last stands at index 63. Parameters that follow the length of the
    prompt do not grow with what is decoded: the factor of pi is 1 for 60 tokens and 2 for 70."""
    config = config_of(64)
    assert show.warnings(config, Method("rope"), 60, new=4) == []
    assert show.warnings(config, Method("rope"), 60, new=5) == [
        "rope puts tokens 64 apart by token 65, beyond the training length 64: choose a method that reaches further"]
    assert "rope puts tokens 64 apart" in show.warnings(config, Method(), 65)[0]
    assert show.warnings(config, Method("pi"), 70) == []
    assert show.warnings(config, Method("pi"), 60, new=10) == [
        "pi puts tokens 69 apart by token 70, beyond the training length 64: --set factor=2 would do"]


ALIBI = {"freq": "alibi", "cosine_attention": 16.0}


@pytest.mark.parametrize("fields, method, words", [
    ({}, "alibi", ["trained with rope, not alibi"]), ({}, "mesa:freq=alibi", ["trained with rope, not alibi"]),
    ({}, "cosscale", ["cosine"]), ({}, "mesa:freq=nope:cosine=8.0", ["trained with rope, not nope", "cosine"]),
    ({}, "mesa:freq=pi", []), (ALIBI, "", []), (ALIBI, "mesa:cosine=16.0", []),
    (ALIBI, "nope", ["trained with alibi, not nope"])])
def test_warnings_of_what_a_model_was_not_trained_for(fields, method, words):
    warnings = show.warnings(config_of(64, **fields), Method.parse(method), 20)
    assert len(warnings) == len(words) and all(word in warning for word, warning in zip(words, warnings))


# ---- explain

def test_explain():
    """Of 300 tokens, seen by Mesa with a first chunk of 5: the picture is that of this plan."""
    config, method = config_of(64), Method.of("mesa", first=5)
    lines = show.explain(config, method, 300).splitlines()
    plan = method.plan(config, 300)
    assert lines[:8] == [
        "mesa:first=5: prompt of 300 tokens, training length 64 (4.69 times)",
        *show.describe(plan, 300),
        f"attention scale: 1.000 to {float(plan.q_scale.max()):.3f}",
        "reach of a prompt with these parameters: no limit below 2^20 tokens",
        "24 of the 300 tokens, evenly spread: how far from each are those before it"]
    tokens = [round(k * 299 / 23) for k in range(24)]
    whole = distance(plan)[tokens][:, tokens].tolist()
    assert [line.split() for line in lines[8:]] == [[show.cell(x) for x in row[:k + 1]] for k, row in enumerate(whole)]


def test_explain_of_a_short_prompt_says_what_config_json_says():
    config = config_of(64, freq="yarn", freq_params={"factor": 4.0})
    text = show.explain(config, Method(), 5)
    assert text.startswith("yarn: prompt of 5 tokens, training length 64 (0.0781 times)")
    assert "logits times 1.296" in text and "parameters that follow its length: 256 tokens" in text
    assert text.splitlines()[-5:] == [" 0", " 1 0", " 2 1 0", " 3 2 1 0", " 4 3 2 1 0"]


# ---- mistakes

@pytest.mark.parametrize("args, words", [
    (["all"], "--plot"), (["meza"], "did you mean mesa?"), (["rope", "--length", "4097"], "4096"),
    (["rope", "--train-len", "1"], "train_len"), (["all", "--plot", "all"], "show.py all --plot methods.png"),
    (["all", "--plot", "there.png"], "--force"), (["all", "--plot", "new.png"], "pip install matplotlib")])
def test_mistakes_are_one_clear_line(args, words, command, monkeypatch, tmp_path):
    """On a machine without matplotlib."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    (tmp_path / "there.png").write_text("mine", encoding="utf-8")
    code, out, err = command(*args)
    assert code == 2 and not out and words in err and len(err.splitlines()) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["there.png"]
    assert (tmp_path / "there.png").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("file", ["x.nonsense", "no/such/folder/x.png"])
def test_a_picture_that_cannot_be_written_is_one_clear_line(file, command, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    code, out, err = command("rope", "--plot", file)
    assert code == 2 and not out and err.startswith(f"show.py: cannot write {file}") and len(err.splitlines()) == 1


# ---- plots

def test_a_picture_of_all_methods_replaces_a_file_by_force(command, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    few = {name: METHODS[name] for name in ("rope", "dca", "mesa", "streaming-llm")}  # a picture of all takes long
    monkeypatch.setattr(show, "METHODS", few)
    path = tmp_path / "x.png"
    path.write_text("mine", encoding="utf-8")
    assert command("all", "--length", 24, "--plot", path, "--force")[0] == 0
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def figure(monkeypatch):
    """figure() -> the figure that a plot_... function would have saved."""
    pytest.importorskip("matplotlib")
    saved = []
    monkeypatch.setattr(show, "save", lambda figure, path: saved.append(figure))
    return lambda: saved[-1]


def curves(axes):
    """{label: [(x, y), ...]} of the labelled lines of a plot."""
    return {line.get_label(): [*zip(*line.get_data())] for line in axes.lines if not line.get_label().startswith("_")}


def dashed_at(axes):
    [edge] = [line for line in axes.lines if line.get_linestyle() == "--"]
    return edge.get_xdata()[0]


def test_plot_methods(figure):
    """Distances as the slowest pair turns: of pi by 2 they are half, red from L on; of nope as they are."""
    plans = {name: plan_of(name, 12, 6) for name in ("rope", "pi", "nope")}
    show.plot_methods(plans, "x.png", "a note", 6)
    for axes, name, factor in zip(figure().axes, plans, (1, 0.5, 1)):
        image = axes.images[0]
        drawn = torch.tensor(image.get_array().filled(-1))
        assert axes.get_title() == name
        assert torch.allclose(drawn, (factor * distance(plans[name])).nan_to_num(-1))
        assert image.norm.vmax < 6 and image.norm.vmax > 5.9
    assert figure().get_suptitle() == "a note"


def test_plot_passkey(figure):
    """Two lengths, two cells of two trials: only rope's at 512 are wrong, both of the first cell, one of the second."""
    rows = []
    for length in (256, 512):
        for cell, trial in ((0, 0), (0, 1), (1, 0), (1, 1)):
            wrong = length == 512 and (cell, trial) != (1, 1)
            rows.append({"method": "rope", "length": length, "cell": cell, "correct": not wrong})
            rows.append({"method": "mesa", "length": length, "cell": cell, "correct": True})
    show.plot_passkey(rows, ["rope", "mesa"], [256, 512], 2, 256, "x.png")
    rope_axes, mesa_axes, accuracy_axes = figure().axes
    assert rope_axes.images[0].get_array().tolist() == [[1, 0], [1, 0.5]]
    assert mesa_axes.images[0].get_array().tolist() == [[1, 1], [1, 1]]
    assert dashed_at(rope_axes) == 0.5 and dashed_at(accuracy_axes) == 256
    assert curves(accuracy_axes) == {"rope": [(256, 1), (512, 0.25)], "mesa": [(256, 1), (512, 1)]}


def test_plot_bench(figure):
    """Points in order of length, also where the file has them in another."""
    rows = [{"method": "mesa", "tokens": n, "us/token": n / 100, "peak MiB": n / 1000} for n in (4096, 2048)]
    show.plot_bench(rows, "x.png")
    time_axes, memory_axes = figure().axes
    assert curves(time_axes) == {"mesa": [(2048, 20.48), (4096, 40.96)]}
    assert curves(memory_axes) == {"mesa": [(2048, 2.048), (4096, 4.096)]}
    assert [label.get_text() for label in memory_axes.get_xticklabels()] == ["2048", "4096"]
