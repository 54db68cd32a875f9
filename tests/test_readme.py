"""The README's promises that no other test keeps: its table, its way to add a method."""
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_method_is_in_the_table():
    from positions import METHODS
    listed = re.findall(r"^\| ([a-z0-9-]+) \|", README, flags=re.MULTILINE)
    assert set(METHODS) <= set(listed)


def test_add_a_method_as_the_readme_says(tmp_path):
    """Function and row go into a copy of positions.py; then the command line, the pictures and the tests know it."""
    function, row = re.findall(r"```python\n(.*?)```", README.split("## Add a method")[1], flags=re.DOTALL)[:2]
    for file in [*ROOT.glob("*.py"), ROOT / "pyproject.toml", ROOT / "README.md"]:
        shutil.copy(file, tmp_path)
    for folder in ("tests", "checkpoints"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    text = (tmp_path / "positions.py").read_text(encoding="utf-8")
    before, after = text.split("METHODS = {", 1)
    head, rest = after.split("\n", 1)
    (tmp_path / "positions.py").write_text(f"{before}{function}\n\nMETHODS = {{{head}\n{row}{rest}", encoding="utf-8")

    def run(*args):
        command = [sys.executable, *map(str, args)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    made = run("generate.py", "--method", "half-far", "--set", "window=32", "--max-new-tokens", 2)
    assert made.returncode == 0, made.stderr
    assert "region 2" in run("positions.py", "half-far").stdout
    tested = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_positions.py", "tests/test_attention.py",
                 "tests/test_strategies.py", "-k", "half-far")
    assert tested.returncode == 0 and "passed" in tested.stdout, tested.stdout[-2000:]
