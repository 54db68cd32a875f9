"""fit_lampe.py: the sigmoid of released fits is found again, and the command prints a method that the CLI takes."""
import io
import re
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch

import eval_perplexity
import fit_lampe
from cli import run_command
from eval_perplexity import losses
from geometry import LAMPE
from model import load
from plan import distance
from positions import Method, make_plan

LICENSE = Path(__file__).resolve().parents[1] / "LICENSE"
SHORT = ("--fit-lampe", "--lengths", "40,48,56,64", "--mappings", "16,24,48")


def run(*argv):
    """(exit code, stdout, stderr) of the command."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as end:
        run_command(lambda: eval_perplexity.run([str(word) for word in argv]), "eval_perplexity.py")
    return end.value.code, out.getvalue(), err.getvalue()


@pytest.mark.parametrize("name, lengths", [
    ("llama3", [4096, 8192, 16384, 32768, 65536]), ("llama2", [4096, 8192, 16384, 32768]),
    ("llama3.1", [16384, 32768, 65536, 131072, 262144])])
def test_released_fits_are_found_from_their_own_points(name, lengths):
    """Rounded to whole tokens, as best mapping lengths are."""
    fit = LAMPE[name]
    points = [round(fit_lampe.sigmoid(n, fit.a, fit.b, fit.most)) for n in lengths]
    a, b, most = fit_lampe.fit_sigmoid(lengths, points, 2 * fit.most)
    assert (a, b, most) == pytest.approx((fit.a, fit.b, fit.most), rel=0.01)


def test_a_fit_of_data_that_say_little():
    """All alike: that number, everywhere. Still rising: not above the largest that was tried."""
    a, b, most = fit_lampe.fit_sigmoid([1, 2, 4, 8], [3, 3, 3, 3], 4)
    assert [fit_lampe.sigmoid(n, a, b, most) for n in (1, 3, 8, 100)] == pytest.approx([3] * 4, abs=0.05)
    assert fit_lampe.fit_sigmoid([1, 2, 4, 8], [1, 2, 4, 8], 8)[2] <= 8


def test_the_command_prints_a_method_to_paste(tmp_path):
    """Every cell of the grid is the loss by that mapping length, the best one bold; the last line of the fit is a
    method, whose mapping length is the table's; what was measured is not measured again."""
    file = tmp_path / "rows"
    code, out, err = run(LICENSE, *SHORT, "--results", file)
    assert code == 0 and len(file.read_text().splitlines()) == 4 * 3 + 3 * 4
    model, tokenizer = load("tiny")
    ids = tokenizer.encode(LICENSE.read_text())[:56]
    table = {m: float(losses(model, ids, Method("lampe", params={"mapping": m})).mean()) for m in (16, 24, 48)}
    column = {int(m): cell for m, cell in re.findall(r"^\| (16|24|48) \|(?: [^|]* \|){2} ([^|]*) \|", out, re.M)}
    best = min(table, key=table.get)
    assert column == {m: f"**{x:.4f}**" if m == best else f"{x:.4f}" for m, x in table.items()}

    method = re.search(r"^lampe:sigmoid=\[.*\]$", out, re.M).group()
    mappings = [int(cell) for cell in re.search(r"\| fitted \| (.*) \|", out).group(1).split(" | ")]
    for n, m in zip((40, 48, 56, 64), mappings):
        settings = {"i": torch.tensor([n - 1]), "j": torch.arange(n), "n": n, "L": 256, "D": 32, "H": 4}
        found = distance(make_plan(method, **settings))
        wanted = [distance(make_plan(f"lampe:mapping={x}", **settings)) for x in (m - 1, m)]  # rounded, and cut off
        assert any(torch.equal(found, other) for other in wanted)
    again = run(LICENSE, *SHORT, "--results", file)
    assert again[1] == out and "nats per token" not in again[2]


def test_a_picture_of_the_fit(tmp_path):
    pytest.importorskip("matplotlib")
    code, _, _ = run(LICENSE, "--fit_lampe", *SHORT[1:], "--results", tmp_path / "rows", "--plot", tmp_path / "fit.png")
    assert code == 0 and (tmp_path / "fit.png").stat().st_size > 10_000


@pytest.mark.parametrize("flags, named", [
    (["--lengths", "40,48,56"], "at least 4 input lengths"), (["--lengths", "8,40,48,56"], "plain RoPE below 32"),
    (["--lengths", "40,48,56,90000"], "tokens, not the 89999"), (["--length", "40"], "unrecognized arguments")])
def test_bad_input_is_one_clear_line(flags, named, tmp_path):
    code, out, err = run(LICENSE, "--fit-lampe", *flags, "--results", tmp_path / "rows")
    assert code == 2 and not out and named in err.splitlines()[-1]
