"""probe.py: hidden values of a repeated word, and where they cross what was seen within the window."""
import io
import re
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch

import eval_perplexity

from cli import run_command
from model import load
from probe import Threshold, choose_dims, crossing, hidden_values, repeated, threshold


def run(*argv):
    """(exit code, stdout, stderr) of the command."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as end:
        run_command(lambda: eval_perplexity.run(["--probe", *map(str, argv)]), "eval_perplexity.py")
    return end.value.code, out.getvalue(), err.getvalue()


def test_a_word_over_and_over():
    """BOS and the same tokens; positions are those at which the word is complete."""
    _, tokenizer = load("tiny")
    ids, positions = repeated(tokenizer, "hello", 20)
    word = ids[1:1 + int(positions[0])]
    assert tokenizer.decode(word).strip() == "hello" and len(ids) <= 20 < len(ids) + len(word)
    assert ids == tokenizer.encode("") + word * len(positions)
    assert positions.tolist() == list(range(len(word), 20, len(word)))


def test_hidden_values_are_those_of_transformers():
    """After layers 1 and 2 of the shipped model, read at once or in pieces, and BOS alone sees no other."""
    transformers = pytest.importorskip("transformers")
    model, tokenizer = load("tiny")
    ids, _ = repeated(tokenizer, "hello", 90)
    theirs = transformers.AutoModelForCausalLM.from_pretrained("checkpoints/tiny")
    want = torch.stack(theirs(torch.tensor([ids]), output_hidden_states=True).hidden_states[1:3])[:, 0]
    for chunk in (512, 37):
        assert torch.allclose(hidden_values(model, ids, "rope", [1, 2], chunk), want, atol=1e-4)
    assert not model.model.layers[0]._forward_hooks


def test_thresholds_and_crossings():
    """A rising series: its value at the window's end, crossed a margin later; and the same falling. A window of 6."""
    positions = torch.arange(0, 20, 2)
    rising = torch.tensor([0.0, 5, 10, 10.4, 10.6, 9, 8, 11, 12, 3])
    assert threshold(rising, positions, 6) == Threshold(10.0, True, 0.5)
    assert threshold(-rising, positions, 6) == Threshold(-10.0, False, 0.5)
    for values in (rising, -rising):
        assert crossing(values, positions, 6, threshold(values, positions, 6)) == 8
        assert crossing(values.clamp(-10.4, 10.4), positions, 6, threshold(values, positions, 6)) is None
    assert threshold(torch.full((10,), 3.0), positions, 6) is None


def test_dimensions_that_move_steadily_are_chosen():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(50, 30, generator=generator)
    values[:, 4] = torch.linspace(0, -3, 50)
    values[:, 17] = torch.linspace(0, 3, 50) ** 2
    values[:, 25] = torch.linspace(0, 3, 50)  # not among the first 20
    assert choose_dims(values, torch.arange(50), 40) == [5, 18]


def test_the_command_prints_crossings():
    """ReRoPE crosses nothing that plain RoPE crosses at once, as the recorded run has it. Layer 1 is flat."""
    code, out, _ = run("--word", "the", "--length", 600, "--layers", "4", "--dims", "6", "--methods", "rope,rerope")
    [row] = re.findall(r"^\| 4 \| 6 \| > (.*?) \| (.*?) \| (.*?) \|$", out, re.M)
    assert code == 0 and row[1:] == ("260", "never") and float(row[0]) == pytest.approx(7.1473, abs=1e-3)
    _, out, _ = run("--length", 300, "--layers", "1", "--dims", "7", "--methods", "rope")
    assert "| 1 | 7 | flat |  |" in out


def test_a_picture_of_the_probe(tmp_path):
    pytest.importorskip("matplotlib")
    code, _, _ = run("--length", 300, "--methods", "rope", "--plot", tmp_path / "probe.png")
    assert code == 0 and (tmp_path / "probe.png").stat().st_size > 10_000


@pytest.mark.parametrize("flags, named", [
    (["--length", "200"], "does not go beyond the window of 256"), (["--layers", "9"], "--layers: the model has 5"),
    (["--dims", "999"], "--dims: the model has 128"), (["--word", "pneumonoultra " * 40], "less than three times")])
def test_bad_input_is_one_clear_line(flags, named):
    code, out, err = run(*flags)
    assert code == 2 and not out and named in err.splitlines()[-1]


