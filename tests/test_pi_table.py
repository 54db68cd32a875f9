"""experiments/pi.py: the commands that it runs, only those that are left to do, and the table that it makes of them."""
import json
import subprocess
from pathlib import Path

import pytest

import eval_passkey
import finetune
import train
from cli import run_command
from experiments import pi

WORDS = "--windows 2 --steps 0,4 --seeds 1,2 --trials 1 --methods pi,direct".split()


@pytest.fixture
def ran(monkeypatch):
    """The commands that were run, by a stand-in that writes what they would write."""
    commands = []

    def stand_in(words, stdout):
        script, words = Path(words[1]).name, words[2:]
        commands.append([script, *words])
        if script == "finetune.py":
            args = finetune.parse_args(words)
            args.out.mkdir(parents=True)
            curve = [{"step": step, "loss": 4.0, "validation": 3.0 + step, "old_window": 2.0} for step in args.keep]
            (args.out / "training.json").write_text(json.dumps({"curve": curve}))
        else:
            write_rows(eval_passkey.parse_args(words))
        return subprocess.CompletedProcess(words, 0)
    monkeypatch.setattr(pi.subprocess, "run", stand_in)
    return commands


def write_rows(args):
    """Rows of an evaluation: the nearest quarter of all needles is found after 4 steps, by seed 2 the nearest half."""
    share = 0.0 if "step-0" in args.ckpt else 0.5 if "seed2" in args.ckpt else 0.25
    with open(args.results, "a") as file:
        for n in args.lengths:
            for cell in range(args.depths):
                for trial in range(args.trials):
                    row = {"ckpt": args.ckpt, "task": args.task, "depths": args.depths, "method": str(args.methods[0]),
                           "length": n, "cell": cell, "trial": trial, "correct": cell >= args.depths * (1 - share)}
                    file.write(json.dumps(row) + "\n")


def test_the_table(ran, tmp_path, capsys):
    """Every run is trained once, and measured at all of its steps; a second call runs nothing and prints the same."""
    assert pi.run(["--out", str(tmp_path), *WORDS]) == 0
    first = capsys.readouterr().out
    trainings = [words for words in ran if words[0] == "finetune.py"]
    assert len(trainings) == 2 * 2 and len(ran) == 4 + 4 * 2 * 4
    one = finetune.parse_args(trainings[0][1:])
    assert (one.method, one.seq_len, one.steps, one.keep, one.save_every) == ("pi:factor=2", 512, 4, [0, 4], 4)
    assert {words[words.index("--method") + 1] for words in trainings} == {"pi:factor=2", "rope"}
    assert "| pi | 4 | 192 ± 91 | 0.38 ± 0.18 |" in first and "| direct | 0 | 0.00 ± 0.00 |" in first
    assert "| 7.00 ± 0.00 |" in first  # the validation loss
    assert pi.run(["--out", str(tmp_path), *WORDS]) == 0
    assert capsys.readouterr().out == first and len(ran) == 4 + 4 * 2 * 4


def test_commands_alone_and_bases_that_train_makes(ran, tmp_path, capsys):
    """--commands runs nothing; what it prints are words that the scripts take."""
    assert pi.run(["--out", str(tmp_path), *WORDS, "--commands", "--bases", "theta=10000+heads=2"]) == 0
    out, err = capsys.readouterr()
    lines = [line.split()[2:] for line in err.splitlines()]
    assert not ran and not out and lines[0][0] == "train.py"
    args = train.parse_args(lines[0][1:])
    assert (args.rope_theta, args.heads, args.steps) == (10000, 2, 2400)
    scripts = {"finetune.py": finetune, "eval_passkey.py": eval_passkey}
    for script, *words in lines[1:]:
        scripts[script].parse_args(words)
    assert len(lines) == 1 + 4 + 4 * 2 * 4


def test_a_growing_factor_and_the_step_of_saves():
    args = pi.parse_args(["--out", "x"])
    args.save_every = pi.common_step(args.steps)
    assert args.save_every == 50 and pi.common_step([0, 30, 45]) == 15
    words = pi.tune_command(args, "tiny", "pi-grow", 8, 1, 256)
    assert words[words.index("--grow") + 1] == "250" and words[words.index("--seq-len") + 1] == "2048"


@pytest.mark.parametrize("flags, named", [
    (["--bases", "depth=3"], "settings are theta"), (["--bases", "nowhere"], "no checkpoint folder nowhere"),
    (["--methods", "yarn"], "there are pi, direct"), (["--steps", "0"], "nothing is trained")])
def test_bad_input_is_one_clear_line(ran, flags, named, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        run_command(lambda: pi.run(["--out", str(tmp_path), *flags]), "pi.py")
    assert end.value.code == 2 and named in capsys.readouterr().err.splitlines()[-1] and not ran
