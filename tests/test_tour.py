"""TOUR.md: its commands print what it shows, and the functions it names are there."""
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import show

ROOT = Path(__file__).resolve().parents[1]
TOUR = (ROOT / "TOUR.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    \$ python (.*)\n\n((?:    .*\n)+)", TOUR, flags=re.MULTILINE)


@pytest.mark.parametrize("command, output", COMMANDS)
def test_every_command_prints_what_the_tour_shows(command, output, capsys):
    script, *args = shlex.split(command)
    if script == "show.py":
        assert show.run(args) == 0
        printed = capsys.readouterr().out
    else:
        done = subprocess.run([sys.executable, script, *args], cwd=ROOT, capture_output=True, text=True, timeout=120)
        printed = done.stdout
    assert printed == re.sub(r"^    ", "", output, flags=re.MULTILINE)


def test_six_steps_and_the_functions_they_name():
    assert len(COMMANDS) == len(re.findall(r"^## \d\. ", TOUR, flags=re.MULTILINE)) == 6
    for names, file in re.findall(r"((?:`\w+`(?:, | and )?)+) in (\w+\.py)", TOUR):
        code = (ROOT / file).read_text(encoding="utf-8")
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"^(def|class) {name}\b", code, flags=re.MULTILINE), (name, file)
