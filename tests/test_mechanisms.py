"""mechanisms.py: attention on the needle against the oracle, the head's own prompts, what is seen, resuming."""
import json
import re

import pytest
import torch

import mechanisms
from cli import run_command
from config import Config
from mechanisms import (choose_head, dilution_rows, largest_distance, make_trials, mass, middle_methods,
                        last_token_plan, resolution_methods, seen_share, swept)
from model import Llama, load
from oracle import oracle
from plan import distance
from positions import Method
from tracing import Trace, prompt_case

CONFIG = Config(vocab_size=1024, hidden_size=64, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, head_dim=16, train_len=32)


@pytest.fixture(scope="module")
def tiny():
    return load("tiny")


@pytest.fixture
def command(capsys, tmp_path, monkeypatch):
    """command("middle", ...) -> (exit code, stdout, stderr) on the tiny model, its results in a file of its own."""
    monkeypatch.setattr(mechanisms, "HEAD_PROMPTS", 2)

    def call(*args):
        argv = [*map(str, args), "--ckpt", "tiny", "--results", str(tmp_path / "results")]
        with pytest.raises(SystemExit) as end:
            run_command(lambda: mechanisms.run(argv), "mechanisms.py")
        out, err = capsys.readouterr()
        return end.value.code, out, err
    return call


# ---- dilution

@pytest.mark.parametrize("method", ["rope", "rerope:window=9", "mesa:first=4:chunk=20"])
def test_attention_on_entries_is_the_oracles(tiny, method):
    """Of a random model's first layer, each head: the sums over the right entry and over the best wrong one of weights
    that the oracle gives as its output, where the values are the rows of the unit matrix."""
    torch.manual_seed(0)
    model = Llama(CONFIG).eval().requires_grad_(False)
    first = model.model.layers[0]
    for weight in (first.self_attn.q_proj.weight, first.self_attn.k_proj.weight):
        weight *= 3  # attention that differs from entry to entry
    method = Method.parse(method)
    [trial] = make_trials(tiny[1], "kv", 90, 1, "a seed")
    case = prompt_case(tiny[1], trial.prompt)
    T = len(case.ids)
    plan = method.plan(CONFIG, 90, torch.arange(T), torch.arange(T))
    x = first.input_layernorm(model.model.embed_tokens(torch.tensor([case.ids])))
    q, k = (first.self_attn.heads(project(x)) for project in (first.self_attn.q_proj, first.self_attn.k_proj))
    weights = oracle(q, k, torch.eye(T).expand(1, 2, T, T), plan)[0, :, -1]  # (H, T)
    assert len(trial.prompt.others) >= 3
    for head in range(4):
        [row] = dilution_rows(None, model, tiny[1], [trial], method, (0, head))
        start, last = trial.prompt.span
        assert row["mass"] == pytest.approx(float(weights[head, start:last + 1].sum()), abs=2e-5)
        wrong = max(float(weights[head, start:last + 1].sum()) for start, last in trial.prompt.others)
        assert row["wrong"] == pytest.approx(wrong, abs=2e-5) and row["wrong"] != row["mass"]


def test_a_passkey_has_no_wrong_entry_and_its_first_digit_is_found(tiny):
    model, tokenizer = tiny
    trials = make_trials(tokenizer, "passkey", 200, 3, 0)
    head = choose_head(model, tokenizer, "passkey", 256, 0)
    rows = dilution_rows(None, model, tokenizer, trials, Method("rope"), head)
    assert [row["correct"] for row in rows] == [True] * 3
    assert min(row["mass"] for row in rows) > 0.5 and {row["wrong"] for row in rows} == {None}
    assert {(row["layer"], row["head"]) for row in rows} == {head}


@pytest.mark.parametrize("task", ["passkey", "kv"])
def test_the_head_is_chosen_on_other_prompts_inside_the_window(tiny, task, monkeypatch):
    """As config.json says, on prompts that end inside the window with their answer and none of which is measured; the
    head that attends most to the needle on average, not the one that does once."""
    cases = []

    def fake(model, case, method):
        cases.append((case, method))
        weights = torch.zeros(3, 4, len(case.ids))
        weights[2, 1, case.span[0]] = 0.6
        weights[0, 3, case.span[0]] = 1.0 if len(cases) == 1 else 0.1
        weights[1, 2, case.span[1] + 1] = 0.9  # beside the needle
        return Trace(weights, None, None, case)

    monkeypatch.setattr(mechanisms, "trace", fake)
    assert choose_head(None, tiny[1], task, 256, 0) == (2, 1)
    measured = [trial.prompt.ids for n in (250, 256) for trial in make_trials(tiny[1], task, n, 12, 0)]
    assert len(cases) == mechanisms.HEAD_PROMPTS
    for case, method in cases:
        assert 200 < case.n and len(case.ids) + 5 <= 256 and method == Method()
        assert case.ids[:case.n] not in measured
    keys = {trial.prompt.answer for trial in make_trials(tiny[1], task, cases[0][0].n, 12, 0)}
    chosen_on = {trial.prompt.answer for trial in make_trials(tiny[1], task, cases[0][0].n, 12, "head-0")}
    assert not keys & chosen_on


# ---- resolution

def test_what_is_swept(tiny):
    """At 16 windows of 256 from steps of half of 16 on; only the shorter ones reach beyond the window."""
    config = tiny[0].config
    texts = resolution_methods(config, [4096])
    assert texts[0] == "mesa:width=8" and texts[7:9] == [f"self-extend:group={x}:attn-scale=logn" for x in (8, 16)]
    assert texts[-1] == "rerope:window=256" and len(texts) == 20
    assert [swept(Method.parse(text)) for text in texts[-2:]] == [("window", 128), ("window", 256)]
    assert resolution_methods(config, [64])[0] == "mesa:width=2"
    with pytest.raises(ValueError, match="mesa:width="):
        swept(Method("mesa"))


# ---- middle

@pytest.mark.parametrize("method", ["streaming-llm", "lm-infinite", "mesa", "rerope", "sliding"])
def test_the_share_that_is_seen_is_the_plans(tiny, method):
    """That of finite distances in the last row of the distance matrix, for spans seen whole, cut and unseen."""
    config = tiny[0].config
    plan = last_token_plan(config, Method(method), 600)
    seen = ~distance(plan)[0].isnan()
    shares = []
    for span in [(0, 9), (2, 25), (8, 40), (200, 225), (330, 360), (560, 599), (599, 599)]:
        shares.append(seen_share(plan, span))
        assert shares[-1] == pytest.approx(float(seen[span[0]:span[1] + 1].float().mean()))
    if method in ("mesa", "rerope"):
        assert shares == [1.0] * 7
    else:
        assert shares[3] == 0 and 0 < shares[4] < 1 and shares[5] == 1


def test_rerope_that_sees_half_of_the_prompt(tiny):
    """Every distance is ReRoPE's; of the keys beyond its window the first 300 are seen."""
    config = tiny[0].config
    half = distance(Method.parse(middle_methods(config, [600])[2]).plan(config, 600))
    whole = distance(Method("rerope").plan(config, 600))
    seen = ~half.isnan()
    assert torch.equal(half[seen], whole[seen])
    assert seen[-1].nonzero()[:, 0].tolist() == [*range(300), *range(600 - 64, 600)]


def test_needles_fall_into_the_cells_of_their_depth(tiny):
    cells = [trial.cell for trial in make_trials(tiny[1], "passkey", 300, 33, 0)]
    assert cells == sorted(cells) and cells[0] == 0 and cells[1:3] == [0, 1] and cells[-2:] == [15, 15]


def test_mass():
    assert mass(torch.tensor([[0.1, 0.2, 0.3, 0.4], [1.0, 0, 0, 0]]), (1, 2)).tolist() == pytest.approx([0.5, 0])


# ---- the command

def test_dilution_goes_on_where_it_was(command, tmp_path, monkeypatch):
    """The second run measures nothing anew and prints the same; its lines are read off the rows."""
    asked = ["dilution", "--lengths", "100,300", "--methods", "rope,rerope:attn-scale=none", "--prompts", "2"]
    code, out, _ = command(*asked)
    rows = [json.loads(line) for line in (tmp_path / "results").read_text().splitlines()]
    assert code == 0 and len(rows) == 2 * 2 * 2 * 2
    of_cell = [row for row in rows if row["task"] == "kv" and row["method"] == "rope" and row["length"] == 300]
    given, wrong = (sum(row[name] for row in of_cell) / 2 for name in ("mass", "wrong"))
    right = sum(row["correct"] for row in of_cell) / 2
    assert f"| {given:.2f} ({wrong:.2f}); {right:.2f} |" in out
    assert re.search(r"^passkey: layer \d, head \d; attention on the needle 0.\d\d where", out, re.MULTILINE)
    monkeypatch.setattr(mechanisms, "dilution_rows", None)
    monkeypatch.setattr(mechanisms.SECTIONS["dilution"], "rows", None)
    assert command(*asked)[:2] == (0, out)


def test_resolution_and_middle(command):
    code, out, _ = command("resolution", "--lengths", 520, "--methods", "mesa:width=9,rerope:window=256",
                           "--prompts", 2, "--tasks", "passkey")
    assert code == 0 and "| rerope:window=256 | 1.00 |" in out and "accuracy at 520" in out
    code, out, _ = command("middle", "--lengths", 1024, "--methods", "streaming-llm,rerope", "--prompts", 3)
    assert code == 0 and "| 0.50-0.56 | 0.00 (0.00) | 1.00 (1.00) |" in out
    assert "streaming-llm: accuracy 1.00 of 1 needles seen whole, 0.00 of 2 needles seen not at all" in out


def test_pictures(command, monkeypatch):
    pytest.importorskip("matplotlib")
    saved = {}

    def keep(figure, path):
        saved[str(path)] = figure
        figure.canvas.draw()

    monkeypatch.setattr(mechanisms, "save", keep)
    command("dilution", "--lengths", "100", "--methods", "rope,mesa", "--prompts", 1, "--plot", "a.png")
    command("resolution", "--lengths", "300", "--methods", "self-extend:group=2,rerope:window=9", "--prompts", 1,
            "--tasks", "passkey", "--plot", "b.png")
    command("middle", "--lengths", "300", "--methods", "sliding,rerope", "--prompts", 2, "--plot", "c.png")
    assert [len(saved[name].axes) for name in ("a.png", "b.png", "c.png")] == [4, 2, 2]
    dotted = [line for line in saved["a.png"].axes[2].lines if line.get_linestyle() == ":"]
    assert len(dotted) == 2 and not [line for line in saved["a.png"].axes[0].lines if line.get_linestyle() == ":"]
    assert [bar.get_height() for bar in saved["c.png"].axes[0].patches] == [0, 1]


def test_a_picture_of_every_section_has_its_name():
    args = mechanisms.parse_args(["--plot", "folder/why.png"])
    assert mechanisms.sections_asked(args) == ["dilution", "resolution", "middle"]
    assert str(mechanisms.plot_file(args, "middle")).replace("\\", "/") == "folder/why-middle.png"


def test_the_largest_distance_is_that_of_the_method_alone():
    rows = [{"method": "a", "farthest": 3.0}, {"method": "a", "farthest": 5.0}, {"method": "b", "farthest": 9.0}]
    assert largest_distance(rows, "a") == 5


@pytest.mark.parametrize("args, words", [
    (["all", "--methods", "rope"], "for one section"), (["middle", "--lengths", "300,400"], "one of --lengths"),
    (["middle", "--tasks", "kv,lines"], "one of --tasks"), (["middle", "--tasks", "keys"], "unknown task 'keys'"),
    (["resolution", "--methods", "mesa"], "mesa:width="), (["middle", "--methods", "meza"], "did you mean mesa?"),
    (["dilution", "--lengths", "9"], "at least"), (["sideways"], "invalid choice")])
def test_mistakes_are_one_clear_line(args, words, command):
    code, out, err = command(*args)
    assert code == 2 and not out and words in err and "Traceback" not in err
