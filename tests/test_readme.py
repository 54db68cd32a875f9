"""The README's promises that no other test keeps: its table, its examples, its way to add a method."""
import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

from geometry import METHODS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def python_blocks(text):
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def test_every_method_file_and_link():
    """Every method and every file is in a table, and what is linked is there."""
    methods = re.findall(r"^\| ([a-z0-9-]+) \|", README.split("## The methods")[1], flags=re.MULTILINE)
    assert set(METHODS) <= set(methods)
    files = re.findall(r"^\| ([a-z_]+\.py) \|", README, flags=re.MULTILINE)
    assert sorted(files) == sorted(file.name for file in ROOT.glob("*.py"))
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / link).exists(), link


def test_a_file_imports_only_from_files_above_it():
    files = re.findall(r"^\| ([a-z_]+)\.py \|", README, flags=re.MULTILINE)
    for place, file in enumerate(files):
        for node in ast.walk(ast.parse((ROOT / f"{file}.py").read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not set(names) & set(files[place:]), f"{file}.py, line {node.lineno}"


def test_examples_run_one_after_the_other(monkeypatch, capsys):
    """The blocks before "Add a method" are one session: load, generate, a batch, a second turn, attention alone."""
    monkeypatch.chdir(ROOT)
    session = {}
    for block in python_blocks(README.split("## Add a method")[0]):
        exec(block, session)
    assert session["tokens"].shape == session["answer"].shape == (2, 8)
    assert session["out"].shape == (1, 8, 3000, 64) and capsys.readouterr().out


CHECKS = """
import sys
import torch
sys.path[:0] = ["tests"]
import generate, show
from attention import attend
from oracle import oracle
from positions import make_plan

asked = "half-far:window=9:freq=half-slow:attn-scale=root-logn"
flags = ["--freq", "half-slow", "--attn-scale", "root-logn", "--max-new-tokens", "2"]
assert generate.run(["--method", "half-far:window=9", *flags]) == 0
assert generate.run(["--method", "half-slow", "--prompt", "x", "--max-new-tokens", "2"]) == 0
assert show.run(["half-far"]) == 0
for i in (torch.arange(61), torch.tensor([60])):
    q, k, v = (torch.randn(1, 2, T, 16) for T in (len(i), 61, 61))
    plan = make_plan(asked, i, torch.arange(61), n=58, L=20, D=16, H=2)
    assert len(plan.regions) == 2 and plan.q_scale.max() > 1
    for impl in ("dense", "tiled"):
        assert (attend(q, k, v, plan, impl) - oracle(q, k, v, plan)).abs().max() < 1e-5
"""


def test_add_a_method_as_the_readme_says(tmp_path):
    """The three functions and rows go into a copy of the repository; then command line and executors know them."""
    blocks = python_blocks(README.split("## Add a method")[1])
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    for folder in ("tests", "checkpoints/tiny"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    places = [("geometry.py", "METHODS"), ("frequencies.py", "FREQUENCIES"), ("frequencies.py", "SCALES")]
    for (file, table), function, row in zip(places, blocks[0::2], blocks[1::2]):
        assert len((function + row).splitlines()) < 20
        text = (tmp_path / file).read_text(encoding="utf-8")
        start = text.index(f"\n{table} = {{")
        end = text.index("\n}\n", start) + 1  # the line that closes the table
        text = text[:start] + "\n" + function + "\n" + text[start:end] + row + text[end:]
        (tmp_path / file).write_text(text, encoding="utf-8")
    done = subprocess.run([sys.executable, "-c", CHECKS], cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
