"""Bad input: a few hundred cases of tests/fuzz.py, what it must be able to see, and single mistakes by name."""
import json
import subprocess
import sys
import time
from pathlib import Path

import fuzz
import pytest
import torch

import cli
from checkpoint import own_file
from cli import WarningsOnly, plain_parser, run_command
from config import Config
from model import load, load_model
from tokenizer import load_tokenizer

FUZZ = Path(fuzz.__file__)


@pytest.fixture
def folder(tmp_path):
    """A sound checkpoint."""
    fuzz.make_checkpoint(tmp_path / "ckpt")
    return tmp_path / "ckpt"


def test_a_few_hundred_cases():
    """In a process of its own, as it forks; a seed that differs from CI's."""
    done = subprocess.run([sys.executable, FUZZ, "--n", "200", "--seed", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("200 cases, 0 failed\n")


@pytest.mark.parametrize("code, err, right, end", [
    (0, "", None, "ran"), (2, "generate.py: no\n", None, "refused"),
    (2, "warning: x\ngenerate.py: no\n", None, "refused"),
    (0, "", "refused", "ran, but should have been refused"), (2, "generate.py: no\n", "ran", "refused, but"),
    (2, "no\n", None, "not refused in one"), (2, "generate.py: a\nb\n", None, "not refused in one"),
    (2, "generate.py: \n", None, "not refused in one"), (1, "", None, "exit code 1"),
    (None, "", None, "exit code None"), (0, "warning: y\n", "warning: x", "no 'warning: x'")])
def test_what_a_case_is_judged_by(code, err, right, end, tmp_path):
    assert fuzz.judge(code, "", err, right, tmp_path).startswith(end)


def test_a_hundred_million_layers_are_refused_at_once(folder):
    """Beside weights of two, and where there are no weights to compare with."""
    fuzz.change_config(folder, num_hidden_layers=10 ** 8)
    begin = time.process_time()
    with pytest.raises(ValueError, match="more than 10000"):
        Config.from_hf(folder)
    for layers, found in ((3, "weights of 2 layers"), (1, "weights of layer 1")):
        fuzz.change_config(folder, num_hidden_layers=layers)
        with pytest.raises(ValueError, match=found):
            Config.from_hf(folder)
    (folder / "model.safetensors").unlink()
    assert Config.from_hf(folder).num_hidden_layers == 1 and time.process_time() - begin < 1


def test_a_file_of_a_checkpoint_lies_in_its_folder(folder, tmp_path):
    """A snapshot in Hugging Face's cache links to the blobs beside it."""
    assert own_file(folder, "config.json") == folder / "config.json"
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="outside of its folder"):
        own_file(folder, "../config.json")
    snapshot = tmp_path / "models--x" / "snapshots" / "1f"
    snapshot.mkdir(parents=True)
    blobs = tmp_path / "models--x" / "blobs"
    blobs.mkdir()
    (folder / "config.json").rename(blobs / "5e")
    for place in (snapshot, folder):
        (place / "config.json").symlink_to(blobs / "5e")
    assert Config.from_hf(snapshot).hidden_size == 16
    with pytest.raises(ValueError, match="outside of its folder"):
        Config.from_hf(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"quantize": "int4"}], ids=str)
def test_weights_that_are_not_finite_are_named(folder, value, options):
    weight = torch.full((24, 16), 1.0)
    weight[3, 5] = value
    fuzz.change_tensors(folder, {"model.layers.1.mlp.up_proj.weight": weight})
    with pytest.warns(UserWarning, match=r"NaN or Inf in 1 tensors, model.layers.1.mlp.up_proj.weight"):
        load_model(folder, Config.from_hf(folder), **options)


@pytest.mark.filterwarnings("error")
def test_large_finite_weights_are_no_matter(folder):
    """Their sum overflows."""
    fuzz.change_tensors(folder, {"model.norm.weight": torch.full((16,), 3e38)})
    load_model(folder, Config.from_hf(folder))


def test_tokenizers_of_other_models(folder):
    with pytest.raises(ValueError, match="1024 pieces.*vocab_size is 1000"):
        load_tokenizer(folder, 1, 1000)
    with pytest.warns(UserWarning, match="is it this model's"):
        load_tokenizer(folder, 1, 32000)
    tokenizer = load_tokenizer(folder, 1, 1088)   # padded
    for text in ("\ud800", "a\udcff"):
        with pytest.raises(ValueError, match="not UTF-8"):
            tokenizer.encode(text)


def test_devices_that_are_not_there():
    for device in ("cuda", "mps"):
        if not getattr(torch, device).is_available():
            with pytest.raises(ValueError, match=f"device {device}: this machine has none"):
                load("tiny", device=device)
    with pytest.raises(ValueError, match="unknown device 'tpu7'"):
        load("tiny", device="tpu7")
    with pytest.raises(ValueError, match="GGUF is not read"):
        load(__file__)


def test_help_shows_one_spelling_and_every_default(capsys):
    parser, flag = plain_parser("What it does.")
    flag("kv-heads", "heads", type=int, default=3, help="how many")
    flag("some", action="append", default=[], help="repeatable")
    flag("out-file", required=True)
    flag("go", action="store_true", help="just so")
    text = " ".join(parser.format_help().split())
    assert "--kv-heads KV_HEADS how many; default: 3" in text and "repeatable; default: none" in text
    assert not any(hidden in text for hidden in ("--kv_heads", "--heads", "--out_file")) and text.endswith("just so")
    given = vars(parser.parse_args(["--kv_heads", "5", "--out_file", "x", "--some", "a", "--some", "b"]))
    assert given == {"kv_heads": 5, "out_file": "x", "some": ["a", "b"], "go": False}
    assert vars(parser.parse_args(["--out-file", "x"]))["kv_heads"] == 3
    with pytest.raises(SystemExit):
        parser.parse_args([])


def test_quiet_passes_on_warnings_and_errors(capsys):
    def run():
        sys.stderr = WarningsOnly(sys.stderr)
        cli.say("settings")
        cli.say("warning: careful")
        raise ValueError("no")
    with pytest.raises(SystemExit):
        run_command(run, "x.py")
    cli.say("after it")
    assert capsys.readouterr().err == "warning: careful\nx.py: no\nafter it\n"


def test_json_that_nobody_wrote(folder):
    (folder / "config.json").write_text("[" * 10 ** 5)
    with pytest.raises(ValueError, match="nested too deep"):
        Config.from_hf(folder)
    (folder / "config.json").write_text(json.dumps(fuzz.CONFIG)[:-5])
    with pytest.raises(ValueError, match="not JSON"):
        Config.from_hf(folder)
