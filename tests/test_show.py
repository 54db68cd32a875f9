"""show.py: matrices as text, what a method costs and how far it reaches, the sentences that warn, every plot."""
import importlib.util
import re
import sys
from dataclasses import replace

import pytest
import torch

import show
from cli import run_command
from frequencies import FREQUENCIES, rope
from generate import decode, prefill, sample
from geometry import METHODS, full
from model import Config, Llama, load
from plan import distance
from positions import Method, make_plan

SHAPES = ("rope", "rerope", "dca", "mesa", "streaming-llm", "lampe", "alibi")  # one method of each kind of geometry
needs_matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is missing")


def plan_of(method, n, L, **params):
    i = torch.arange(n)
    return make_plan(method, i, i, n=n, L=L, D=16, H=4, **params)


def config_of(L, **changes):
    """The Config of a small model with a training length of L."""
    config = Config(vocab_size=16, hidden_size=64, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, head_dim=16, train_len=L)
    return replace(config, **changes)


LONGROPE = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}  # of a width of 16; they are found by search


def method_of(name, **params):
    """A Method by name, with what longrope cannot do without."""
    return Method.of(name, **(LONGROPE if name == "longrope" else {}), **params)


@pytest.fixture
def command(capsys):
    """command("mesa", "--length", 12) -> (exit code, stdout, stderr) of show.py, in this process."""
    def call(*args):
        with pytest.raises(SystemExit) as end:
            run_command(lambda: show.run([str(arg) for arg in args]), "show.py")
        out, err = capsys.readouterr()
        return end.value.code, out, err
    return call


# ---- the picture in text

def test_a_picture_in_text():
    """Mesa's first chunk [0, 2), its middle chunks [2, 6) and [6, 10), and the last one, which sees all by stair."""
    plan = plan_of("mesa", 12, 6, first=2, chunk=4, width=2, last=2)
    assert show.picture(plan).splitlines() == [
        " 0",
        " 1 0",
        " 2 1 0",
        " 3 2 1 0",
        " 4 3 2 1 0",
        " 5 4 3 2 1 0",
        " 2 1 . . . . 0",
        " 3 2 . . . . 1 0",
        " 4 3 . . . . 2 1 0",
        " 5 4 . . . . 3 2 1 0",
        " 6 5 5 4 4 3 3 2 2 1 0",
        " 7 6 6 5 5 4 4 3 3 2 1 0"]


@pytest.mark.parametrize("method, n, L, query, row", [
    ("streaming-llm:sinks=2:recent=4", 12, 12, 9, "6 5 . . . 4 3 2 1 0"),
    ("mesa:first=2:chunk=4:width=2:last=2:overlap=1", 12, 7, 8, "5 4 . . . 3 2 1 0"),
    ("leaky-rerope:window=2:k=3", 6, 6, 5, "3 2.67 2.33 2 1 0")])
def test_unseen_keys_are_dots_and_parts_of_a_token_have_three_digits(method, n, L, query, row):
    assert show.picture(plan_of(method, n, L)).splitlines()[query].split() == row.split()


@pytest.mark.parametrize("number, text", [(0.0, "0"), (7 / 3, "2.33"), (218.25, "218"), (999.4, "999"), (999.5, "1000"),
                                          (2047.0, "2047"), (123456.0, "123456"), (float("nan"), ".")])
def test_a_distance_in_a_picture(number, text):
    assert show.cell(number) == text


@pytest.mark.parametrize("method", SHAPES)
def test_a_picture_of_some_keys_has_their_columns(method):
    """What --explain draws of a long prompt: the rows and columns of its matrix at some of its tokens."""
    n, tokens = 300, torch.tensor([0, 7, 8, 100, 199, 201, 299])
    whole = distance(plan_of(method, n, 40))[tokens][:, tokens]
    some = make_plan(method, tokens, torch.arange(n), n=n, L=40, D=16, H=4)
    assert torch.equal(distance(show.with_keys(some, tokens)).nan_to_num(-1), whole.nan_to_num(-1))


# ---- costs

def test_describe_names_the_cost():
    """62 pairs of 78 seen: 23 in own chunks, 16 of the first chunk, 23 by the last; the largest distance is 7."""
    plan = plan_of("mesa", 12, 6, first=2, chunk=4, width=2, last=2)
    assert show.describe(plan, 12) == [
        "region 1: 10 queries, 23 pairs, largest distance 3",
        "region 2: 8 queries, 16 pairs, largest distance 5",
        "region 3: 2 queries, 23 pairs, largest distance 7",
        "attended pairs: 62, 79.5% of full causal attention (78)"]


@pytest.mark.parametrize("method", METHODS)
def test_the_largest_distance_is_that_of_the_whole_matrix(method):
    for n, L in ((300, 40), (41, 16)):
        plan = plan_of(method_of(method), n, L)
        assert show.largest_distance(plan) == float(distance(plan).nan_to_num(0).max())


@pytest.mark.parametrize("name", METHODS)
def test_list_methods_has_two_lines_for_every_method(name):
    lines = show.list_methods().splitlines()
    assert len(lines) == 2 * len(METHODS)
    number = list(METHODS).index(name)
    assert lines[2 * number].split()[0] == name and len(lines[2 * number].split()) > 5
    assert lines[2 * number + 1].strip().startswith("parameters: ")


@pytest.mark.parametrize("name, sentence, line", [
    ("rope", "RoPE: pair p", "parameters: none; attention scale: none"),
    ("logn", "log-n scaling", "parameters: power=1.0; attention scale: logn"),
    ("cosscale", "CosScale", "parameters: cosine=32; attention scale: none"),
    ("dynamic-yarn", "Dynamic YaRN", "parameters: beta_fast=32, beta_slow=1; attention scale: mscale"),
    ("rerope", "ReRoPE", "parameters: window=auto, power=1.0; attention scale: logn")])
def test_list_methods(name, sentence, line):
    lines = show.list_methods().splitlines()
    number = list(METHODS).index(name)
    assert lines[2 * number].startswith(f"{name:13} {sentence}") and lines[2 * number + 1].strip() == line


# ---- how far a method reaches

REACHES = [  # the longest prompt for L = 64 whose last token stays below L; 2^20 is where the search ends
    ("rope", 64), ("logn", 64), ("infoscale", 64), ("cosscale", 64),
    ("self-extend:window=16:group=4", 48 * 4 + 16), ("self-extend:window=24:group=8", 40 * 8 + 24),
    ("self-extend:window=16:group=1", 64),
    ("leaky-rerope:window=16:k=4", 16 + 4 * 48), ("leaky-rerope:window=20:k=16.0", 20 + 16 * 44),
    ("string:shift=20:window=4", 64 + 20 - 4), ("dca:chunk=20:top=64", 40), ("dca:chunk=20:top=63", 2 ** 20),
    *[(f"{method}:factor={f}", 64 * f) for method in ("pi", "ntk", "ntk-mixed", "yarn") for f in (2, 3, 7)],
    *[(method, 2 ** 20) for method in ("nope", "alibi", "rerope", "dca", "streaming-llm", "lm-infinite")],
    ("logn:freq=nope", 2 ** 20), ("rerope:freq=pi:factor=2", 2 ** 20),
]


@pytest.mark.parametrize("method, tokens", REACHES, ids=str)
def test_reach(method, tokens):
    """(L - W) G + W, W + k (L - W), factor L, ..."""
    assert show.reach(config_of(64), Method.parse(method)) == tokens


def test_reach_of_lampe_grows_without_end_at_a_window_of_its_own_fit():
    assert show.reach(config_of(8192), Method("lampe")) == 2 ** 20


def p_rope(D, base, n, L, *, turning=0.75, factor=1.0):
    """Plain RoPE whose slowest pairs are at rest, as in p-RoPE (arXiv 2410.06205); the others divided by factor."""
    inv_freq, mscale = rope(D, base, n, L)
    inv_freq = inv_freq / factor
    inv_freq[round(turning * len(inv_freq)):] = 0
    return inv_freq, mscale


@pytest.mark.parametrize("method, tokens", [("p-rope", 64), ("p-rope:turning=0.125", 64), ("p-rope:factor=3.0", 192),
                                            ("p-rope:turning=0.0", 2 ** 20)])
def test_pairs_at_rest_reach_no_further_than_those_that_turn(method, tokens, monkeypatch):
    """The slowest pair that turns counts, against plain RoPE's of the same index. Where none turns, nothing limits."""
    monkeypatch.setitem(FREQUENCIES, "p-rope", p_rope)
    monkeypatch.setitem(METHODS, "p-rope", (full, "p-rope", None))
    assert show.reach(config_of(64), Method.parse(method)) == tokens


@pytest.mark.parametrize("fields", [{"rotary_dim": 8}, {"rope_theta": 500.0}], ids=str)
def test_reach_of_models_of_other_shapes(fields):
    """With a rotary width below the head's; with another base."""
    assert show.reach(config_of(64, **fields), Method.of("yarn", factor=2.0)) == 128


# ---- advice and warnings

@pytest.mark.parametrize("method", ["leaky-rerope:k=2.0", "self-extend:group=2", "stair:width=1", "mesa:width=1",
                                    "pi:factor=2.0", "ntk:factor=2.0", "ntk-mixed:factor=2.0", "yarn:factor=2.0",
                                    "llama3", "infoscale:freq=pi:factor=2.0", "logn:freq=yarn:factor=2.0"])
def test_advice_is_the_smallest_value_that_does(method):
    """16 L and a bit: with the advised value of the parameter nothing is warned of, with one less it still is."""
    config, method, n = config_of(64), Method.parse(method), 16 * 64 + 5
    [warning] = show.warnings(config, method, n)
    name, value = re.search(r"--set (\w+)=(\d+) would do", warning).groups()
    assert show.warnings(config, Method.of(method, **{name: int(value)}), n) == []
    assert show.warnings(config, Method.of(method, **{name: int(value) - 1}), n) != []


@pytest.mark.parametrize("method", ["rope", "string", "infoscale"])
def test_a_method_that_no_parameter_helps(method):
    [warning] = show.warnings(config_of(64), Method(method), 200)
    assert warning.startswith(f"{method} puts tokens ") and warning.endswith("choose a method that reaches further")


def test_advice_where_no_value_is_enough():
    assert show.advice("pi", None, 999, lambda settings: False) == "choose a method that reaches further"


def test_the_limit_is_the_training_length_with_what_is_decoded():
    """Of a prompt of 60 tokens and 4 new ones the last stands at index 63."""
    config = config_of(64)
    assert show.warnings(config, Method("rope"), 60, new=4) == []
    assert show.warnings(config, Method("rope"), 60, new=5) == [
        "rope puts tokens 64 apart by token 65, beyond the training length 64: choose a method that reaches further"]
    assert "rope puts tokens 64 apart" in show.warnings(config, Method(), 65)[0]


def test_parameters_that_follow_the_length_of_the_prompt_do_not_grow_with_what_is_decoded():
    """The factor of pi is 1 for 60 tokens and 2 for 70."""
    config = config_of(64)
    assert show.warnings(config, Method("pi"), 70) == []
    assert show.warnings(config, Method("pi"), 60, new=10) == [
        "pi puts tokens 69 apart by token 70, beyond the training length 64: --set factor=2 would do"]


@pytest.mark.parametrize("method, words", [
    ("alibi", ["trained with rope, not alibi"]), ("nope", ["trained with rope, not nope"]),
    ("mesa:freq=alibi", ["trained with rope, not alibi"]), ("cosscale", ["cosine"]), ("mesa:cosine=32.0", ["cosine"]),
    ("mesa:freq=nope:cosine=8.0", ["trained with rope, not nope", "cosine"]),
    *[(method, []) for method in ("", "mesa", "yarn", "mesa:freq=pi", "lampe")]])
def test_warnings_of_what_a_rotary_model_was_not_trained_for(method, words):
    warnings = show.warnings(config_of(64), Method.parse(method), 20)
    assert len(warnings) == len(words) and all(word in warning for word, warning in zip(words, warnings))


@pytest.mark.parametrize("method", ["", "alibi", "mesa", "cosscale", "mesa:cosine=16.0"])
def test_what_a_model_was_trained_with_is_no_reason_for_a_warning(method):
    config = config_of(64, freq="alibi", cosine_attention=16.0)
    assert show.warnings(config, Method.parse(method), 20) == []


def test_alibi_without_its_slopes_is():
    assert "alibi, not nope" in show.warnings(config_of(64, freq="alibi"), Method("nope"), 20)[0]


# ---- explain

def test_explain():
    """Of 300 tokens, seen by Mesa with a first chunk of 5: the picture is that of this plan."""
    config, method = config_of(64), Method.of("mesa", first=5)
    lines = show.explain(config, method, 300, new=12, dtype=torch.bfloat16).splitlines()
    assert lines[0] == "mesa:first=5: prompt of 300 tokens, training length 64 (4.69 times)"
    plan = method.plan(config, 300)
    assert lines[1:5] == show.describe(plan, 300)
    assert lines[5] == f"attention scale: 1.000 to {float(plan.q_scale.max()):.3f}"
    assert lines[6] == "reach of a prompt with these parameters: no limit below 2^20 tokens"
    assert lines[7] == show.memory_text(config, method, 300, 12, torch.bfloat16)
    assert lines[8].startswith("24 of the 300 tokens, evenly spread")
    assert len(lines) == 9 + 24
    last_row = distance(plan)[-1]
    tokens = [round(k * 299 / 23) for k in range(24)]
    assert lines[-1].split() == [f"{last_row[j]:.0f}" for j in tokens]


def test_explain_without_settings_of_a_short_prompt():
    lines = show.explain(config_of(64), Method("yarn", None, None, {}), 5).splitlines()
    assert lines[0] == "yarn: prompt of 5 tokens, training length 64 (0.0781 times)"
    assert "reach of a prompt with parameters that follow its length: no limit below 2^20 tokens" in lines
    assert lines[-5:] == [" 0", " 1 0", " 2 1 0", " 3 2 1 0", " 4 3 2 1 0"]


def test_explain_says_what_config_json_says():
    config = config_of(64, freq="yarn", freq_params={"factor": 4.0})
    text = show.explain(config, Method(), 100)
    assert text.startswith("yarn: prompt of 100 tokens") and "logits times 1.296" in text
    assert "follow its length: 256 tokens" in text
    assert show.explain(config, Method.of(None, attn_scale="logn"), 100).startswith("yarn:attn-scale=logn: prompt of")


def test_the_memory_of_weights_and_cache():
    """Of 8192 tokens: keys and values of 2 layers of 2 heads of 16 channels, in 2 bytes each."""
    model, _ = load("tiny")
    assert show.weight_count(model.config) == sum(p.numel() for p in model.parameters())
    text = show.memory_text(config_of(64), Method("rope"), 8000, 192, torch.bfloat16)
    assert "in bfloat16, cache 2.0 MiB for the prompt and 192 new tokens, keys rotated for decoding 1.0 MiB" in text


@pytest.mark.parametrize("method", ["rope", "nope", "rerope", "self-extend", "leaky-rerope", "mesa", "dca", "lampe",
                                    "cosscale", "nope:cosine=8.0"])
def test_the_memory_of_the_cache_is_what_decoding_fills(method):
    """Keys, values and their rotated copies of 150 tokens, in all layers, without the room for more."""
    model, method, n, new = Llama(config_of(64)), Method.parse(method), 140, 11
    logits, cache = prefill(model, torch.ones(1, n, dtype=torch.long), method)
    list(decode(model, logits, cache, method, n, sample, new))
    T = len(cache)
    copies = [copy for layer in cache.copies for copy in layer if len(copy.positions) == T]
    held = sum(x[:, :, :T].numel() for x in (*cache.k, *cache.v))
    rotated = sum(copy.keys[:, :, :T].numel() for copy in copies)
    last = show.last_query_plan(model.config, method, n, n + 1)
    keys = show.key_count(model.config, T)
    assert held == 2 * keys and rotated == show.rotated_copies(last) * keys


def test_a_plan_for_each_layer_is_shown_by_its_first(monkeypatch):
    config, method, plan = config_of(64), Method("pi", params={"factor": 2.0}), Method.plan
    alone = show.explain(config, method, 100), show.warnings(config, method, 100), show.warnings(config, method, 200)

    def plans(self, *args):
        return [plan(self, *args), plan(Method("rope"), *args)]
    monkeypatch.setattr(Method, "plan", plans)
    assert alone == (show.explain(config, method, 100), show.warnings(config, method, 100),
                     show.warnings(config, method, 200))


# ---- the command

def test_a_small_example_and_its_cost(command):
    """63 pairs: two sinks and four recent keys."""
    code, out, err = command("streaming-llm", "--length", 12, "--set", "sinks=2", "--set", "recent=4")
    lines = out.splitlines()
    assert code == 0 and not err
    assert lines[0] == "streaming-llm:sinks=2:recent=4: prompt of 12 tokens, training length 6"
    assert lines[10].split() == "6 5 . . . 4 3 2 1 0".split()
    assert "attended pairs: 63," in out and "largest distance 6" in out


def test_settings_in_the_name_and_in_set_are_the_same(command):
    length = "--length", 12, "--train-len", 6
    texts = [command("mesa:first=2:chunk=4:width=2", *length),
             command("mesa", *length, "--set", "first=2,chunk=4,width=2"),
             command("mesa:first=2", *length, "--set", "chunk=4", "--set", "width=2")]
    assert texts[0] == texts[1] == texts[2] and texts[0][0] == 0
    assert texts[0][1].splitlines()[12].split() == "7 6 6 5 5 4 4 3 3 2 1 0".split()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_an_example(method, command):
    code, out, _ = command(method)
    assert code == 0 and "prompt of 32 tokens, training length 16" in out and len(out.splitlines()) > 33


@pytest.mark.parametrize("args, words", [
    (["all"], "--plot"), (["meza"], "did you mean mesa?"), (["mesa", "--set", "windw=3"], "windw"),
    (["longrope", "--set", "long_factor=[1.0]", "--length", "4"], "long_factor"), (["dca:chunk=0"], "chunk"),
    (["rope", "--length", "-3"], "-3"), (["rope", "--length", "4097"], "4096"),
    (["rope", "--train-len", "1"], "train_len"),
    (["all", "--plot", "all"], "show.py all --plot methods.png"), (["all", "--plot", "there.png"], "--force"),
], ids=str)
def test_mistakes_are_one_clear_line(args, words, command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.png").write_text("mine", encoding="utf-8")
    code, out, err = command(*args)
    assert code == 2 and not out and words in err and len(err.splitlines()) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["there.png"]
    assert (tmp_path / "there.png").read_text(encoding="utf-8") == "mine"


def test_a_picture_without_matplotlib_is_one_clear_line(command, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, err = command("all", "--plot", tmp_path / "x.png")
    assert code == 2 and not out and "pip install matplotlib" in err and len(err.splitlines()) == 1
    assert not (tmp_path / "x.png").exists()


# ---- plots

@needs_matplotlib
def test_a_picture_of_all_methods_replaces_a_file_only_by_force(command, monkeypatch, tmp_path):
    monkeypatch.setattr(show, "METHODS", {name: METHODS[name] for name in SHAPES})  # a picture of all takes long
    path = tmp_path / "x.png"
    assert command("all", "--length", 24, "--plot", path)[0] == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    path.write_text("mine", encoding="utf-8")
    assert command("rope", "--length", 24, "--plot", path)[0] == 2
    assert command("rope", "--length", 24, "--plot", path, "--force")[0] == 0
    assert path.read_bytes().startswith(b"\x89PNG")


@needs_matplotlib
@pytest.mark.parametrize("file", ["x.nonsense", "no/such/folder/x.png"])
def test_a_file_that_cannot_be_written_is_one_clear_line(file, command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, out, err = command("rope", "--plot", file)
    assert code == 2 and not out and err.startswith(f"show.py: cannot write {file}") and len(err.splitlines()) == 1


@pytest.fixture
def figure(monkeypatch, tmp_path):
    """figure() -> the figure that a plot_... function has saved."""
    pytest.importorskip("matplotlib")
    saved, save = [], show.save

    def saving(figure, path):
        save(figure, path)
        saved.append(figure)
    monkeypatch.setattr(show, "save", saving)
    return lambda: saved[-1]


def curves(axes):
    """{label: [(x, y), ...]} of the labelled lines of a plot."""
    return {line.get_label(): [*zip(*line.get_data())] for line in axes.lines if not line.get_label().startswith("_")}


def dashed_at(axes):
    [edge] = [line for line in axes.lines if line.get_linestyle() == "--"]
    return edge.get_xdata()[0]


def test_plot_methods(figure, tmp_path):
    """Distances as the slowest pair turns: of pi by 2 they are half, red from L on; of nope as they are."""
    plans = {name: plan_of(name, 12, 6) for name in ("rope", "pi", "nope")}
    show.plot_methods(plans, tmp_path / "x.png", "a note", 6)
    rope_axes, pi_axes, nope_axes, *_ = figure().axes
    assert [axes.get_title() for axes in figure().axes[:3]] == ["rope", "pi", "nope"]
    for axes, name, factor in ((rope_axes, "rope", 1), (pi_axes, "pi", 0.5), (nope_axes, "nope", 1)):
        image = axes.images[0]
        drawn = torch.tensor(image.get_array().filled(-1))
        assert torch.allclose(drawn, (factor * distance(plans[name])).nan_to_num(-1))
        assert image.norm.vmax < 6 and image.norm.vmax > 5.9
    assert figure().get_suptitle() == "a note"


def passkey_rows():
    """Two methods, two lengths, two cells of two trials; only rope's at 512 are wrong, in one trial of the second cell
    and all of the first."""
    rows = []
    for method in ("rope", "mesa"):
        for length in (256, 512):
            for cell in (0, 1):
                for trial in (0, 1):
                    wrong = method == "rope" and length == 512 and (cell == 0 or trial == 0)
                    rows.append({"method": method, "length": length, "cell": cell, "correct": not wrong})
    return rows


def test_plot_passkey(figure, tmp_path):
    show.plot_passkey(passkey_rows(), ["rope", "mesa"], [256, 512], 2, 256, tmp_path / "x.png")
    rope_axes, mesa_axes, accuracy_axes = figure().axes
    assert rope_axes.images[0].get_array().tolist() == [[1, 0], [1, 0.5]]
    assert mesa_axes.images[0].get_array().tolist() == [[1, 1], [1, 1]]
    assert dashed_at(rope_axes) == 0.5 and dashed_at(accuracy_axes) == 256
    assert curves(accuracy_axes) == {"rope": [(256, 1), (512, 0.25)], "mesa": [(256, 1), (512, 1)]}
    assert (tmp_path / "x.png").exists()


def test_plot_losses(figure, tmp_path):
    show.plot_losses({"rope": [2.0, 3.5], "mesa": [2.0, 2.5]}, [128, 384], 256, tmp_path / "x.png")
    [axes] = figure().axes
    assert curves(axes) == {"rope": [(128, 2), (384, 3.5)], "mesa": [(128, 2), (384, 2.5)]}
    assert dashed_at(axes) == 256


def test_plot_bench(figure, tmp_path):
    """Points in order of length, also where the file has them in another."""
    rows = [{"method": "mesa", "tokens": n, "us/token": n / 100, "peak MiB": n / 1000} for n in (4096, 2048)]
    show.plot_bench(rows, tmp_path / "x.png")
    time_axes, memory_axes = figure().axes
    assert curves(time_axes) == {"mesa": [(2048, 20.48), (4096, 40.96)]}
    assert curves(memory_axes) == {"mesa": [(2048, 2.048), (4096, 4.096)]}
    assert [label.get_text() for label in memory_axes.get_xticklabels()] == ["2048", "4096"]
