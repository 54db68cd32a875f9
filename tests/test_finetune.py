"""finetune.py: what is trained is what config.json says, a killed run ends in the same bits, others read the folder."""
import json
from pathlib import Path

import pytest
import torch

import finetune
from checkpoint import UNFINISHED
from cli import run_command
from config import Config
from finetune import length_at, method_at, new_config, positions_at, token_losses, trained_method, training_plan
from generate import run as generate_command
from model import load
from plan import distance
from positions import Method

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "checkpoints" / "tiny"
FAST = ("--train-len 32 --steps 4 --save-every 2 --batch 2 --val-rows 1 --compute float32 --data "
        + str(ROOT / "LICENSE")).split()


@pytest.fixture(autouse=True)
def same_threads():
    """Whatever the threads of a run, other tests keep theirs."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def tune(out, *flags):
    return finetune.run(["--init", str(TINY), "--out", str(out), *FAST, *map(str, flags)])


def parsed(*flags):
    """The settings of a run from tiny, filled in."""
    args = finetune.parse_args(["--init", str(TINY), "--out", "x", *FAST, *flags])
    config = Config.from_hf(TINY, args.train_len)
    finetune.complete(args, TINY, config)
    finetune.complete_recipe(args, 10 ** 6)
    return args


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run with Position Interpolation, and what it kept on the way."""
    folder = tmp_path_factory.mktemp("runs") / "pi"
    tune(folder, "--method", "pi:factor=2", "--keep", "0,3")
    return folder


# ---- what is trained

def test_what_a_method_and_a_window_leave_open():
    """The factor follows from the window, or the window from the factor."""
    config = Config.from_hf(TINY)
    assert trained_method("pi:factor=8", config, None) == (Method.parse("pi:factor=8"), 2048)
    assert trained_method("yarn", config, 1000) == (Method.parse("yarn:factor=4.0"), 1000)
    assert trained_method("rope", config, 512) == (Method("rope"), 512)
    assert trained_method("drope", config, None) == (Method("nope"), 256)


@pytest.mark.parametrize("text", ["pi:factor=4", "yarn:factor=4", "ntk:factor=4", "llama3:factor=4", "rope",
                                  "abf:rope_theta=5000", "yarn:factor=4:beta_fast=8", "drope"])
def test_config_json_says_what_was_trained(text, tmp_path):
    """Read again, it gives the frequencies of the training, for a short and for a long prompt; transformers agrees."""
    config = Config.from_hf(TINY)
    method, seq_len = trained_method(text, config, 1024)
    model, _ = load(TINY)
    raw = new_config(json.loads((TINY / "config.json").read_text()), config, method, seq_len)
    finetune.write_folder(tmp_path, TINY, model, raw, torch.float32)
    again = Config.from_hf(tmp_path)
    assert again.max_position_embeddings == 1024
    assert again.train_len == (256 if method.name in ("pi", "yarn", "llama3") else 1024)
    ids = torch.arange(3, 43)[None]
    ours = model(ids, training_plan(model, method, 40))
    for n in (40, 900):
        want = method.plan(config, n=n)
        got = again.plan(n=n)
        assert want.mscale == got.mscale
        assert (want.inv_freq is None) == (got.inv_freq is None)
        assert want.inv_freq is None or torch.allclose(want.inv_freq, got.inv_freq, rtol=1e-12)
    if method.name != "nope":
        transformers = pytest.importorskip("transformers")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.allclose(theirs(ids).logits, ours, atol=1e-4)


def test_factor_and_length_grow_together():
    """From the old window to the new one; positions reach no further than the interpolated window."""
    args = parsed("--method", "pi:factor=4", "--grow", "4")
    lengths = [length_at(step, args) for step in range(6)]
    assert lengths == [56, 80, 104, 128, 128, 128]
    factors = [method_at(Method.parse(args.method), n, args.seq_len).params["factor"] for n in lengths]
    assert factors == [1.75, 2.5, 3.25, 4, 4, 4]
    assert [n / factor for n, factor in zip(lengths, factors)] == [32] * 6
    assert length_at(0, parsed("--method", "pi:factor=4")) == 128


def test_rows_are_pieces_of_the_text_and_depend_on_the_step_alone():
    args = parsed("--method", "pi:factor=2")
    model, tokenizer = load(TINY)
    source = finetune.make_source(args, tokenizer, model.config)
    ids, weights = finetune.rows_at(7, args, source, model.config)
    assert ids.shape == (2, 65) and weights.shape == (2, 64) and bool((weights == 1).all())
    text = " ".join(map(str, source.stream.tolist()))
    for row in ids.tolist():
        assert row[0] == tokenizer.bos_id and " ".join(map(str, row[1:])) in text
    assert torch.equal(finetune.rows_at(7, args, source, model.config)[0], ids)
    assert not torch.equal(finetune.rows_at(8, args, source, model.config)[0], ids)
    assert len(source.held_out) == 64 and " ".join(map(str, source.held_out.tolist())) not in text


def test_documents_of_jsonl(tmp_path):
    """Each is packed between BOS and EOS; a broken line is named."""
    _, tokenizer = load(TINY)
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "One."}\n{"text": "Two.", "more": 3}\n')
    ids = finetune.packed(finetune.read_documents(file), tokenizer, Config.from_hf(TINY)).tolist()
    assert ids == tokenizer.encode("One.") + [2] + tokenizer.encode("Two.") + [2]
    file.write_text('{"text": "One."}\n{"words": "Two."}\n')
    with pytest.raises(ValueError, match="line 2"):
        finetune.read_documents(file)


@pytest.mark.parametrize("kind", ["pose", "randpos"])
def test_short_rows_at_far_positions(kind):
    """32 tokens somewhere within 128, in order; pose has one gap. Over the steps all distances come up, and the model
    sees those of the positions."""
    args = parsed("--method", "pi:factor=4", "--positions", kind)
    farthest = 0
    for step in range(40):
        positions = positions_at(step, args, 32)
        steps = positions.diff()
        assert len(positions) == 32 and 0 <= int(positions[0]) and int(positions[-1]) < 128 and bool((steps > 0).all())
        if kind == "pose":
            assert int(positions[0]) == 0 and int((steps > 1).sum()) <= 1
        farthest = max(farthest, int(positions[-1] - positions[0]))
    assert farthest > 100
    model, _ = load(TINY)
    apart = distance(training_plan(model, Method.parse(args.method), 32, positions))
    want = (positions[:, None] - positions).double()
    assert torch.equal(apart.nan_to_num(-1), torch.where(want >= 0, want, -1))


# ---- a step

def test_checkpointing_and_passes_leave_the_gradient_as_it_is():
    """Losses are those of transformers' shifted cross entropy; recomputed ones, and two passes of a row, sum up."""
    model, _ = load(TINY)
    model.requires_grad_(True)
    ids = torch.randint(3, 1000, (2, 41), generator=torch.Generator().manual_seed(0))
    gradients = []
    for parts, recompute in (([ids], False), ([ids], True), (ids.split(1), False)):
        model.zero_grad()
        for part in parts:
            losses = token_losses(model, part, training_plan(model, Method.parse("pi:factor=2"), 40), recompute)
            (losses.sum() / 80).backward()
        gradients.append({name: weight.grad.clone() for name, weight in model.named_parameters()})
    logits = model(ids[:, :-1], model.plan("pi:factor=2", n=40))
    want = -logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    assert torch.allclose(token_losses(model, ids, model.plan("pi:factor=2", n=40)), want, atol=1e-4)
    for other in gradients[1:]:
        for name, gradient in other.items():
            assert torch.allclose(gradient, gradients[0][name], atol=1e-5), name


@pytest.mark.parametrize("flags", [["--micro", "1"], ["--checkpointing"]])
def test_a_step_is_the_same_in_passes(flags):
    """Three rows at once, or one after the other: the same loss and the same gradient, no longer than 1."""
    found = []
    for given in ([], flags):
        args = parsed("--method", "yarn:factor=2", "--batch", "3", *given)
        model = load(TINY)[0].requires_grad_(True)
        source = finetune.make_source(args, load(TINY)[1], model.config)
        loss = finetune.train_step(0, args, model, [], source)
        found.append((loss, torch.cat([weight.grad.flatten() for weight in model.parameters()])))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-5)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-5) and float(found[0][1].norm()) < 1.001


def test_the_published_recipe_is_that_of_large_models():
    args = finetune.parse_args(["--init", "x", "--out", "x", "--method", "pi:factor=4", "--seq-len", "8192"])
    finetune.complete_recipe(args, 7 * 10 ** 9)
    assert (args.optimizer, args.lr, args.batch, args.micro, args.steps) == ("adamw", 2e-5, 64, 1, 1000)
    rates = [finetune.learning_rate(step, args) for step in (0, 10, 20, 999)]
    assert rates == pytest.approx([2e-6, 1.1e-5, 2e-5, 2e-5])
    [adamw] = finetune.optimizers_of(args, load(TINY)[0].requires_grad_(True))
    assert (adamw.defaults["betas"], adamw.defaults["weight_decay"]) == ((0.9, 0.95), 0.0)


# ---- a run

def test_a_fine_tuned_folder_runs_here_and_in_transformers(finished, capsys):
    """The same logits, beyond the old window; generate.py takes it; kept steps are folders too."""
    record = json.loads((finished / "training.json").read_text())
    assert [entry["step"] for entry in record["curve"]] == [0, 2, 4]
    assert record["curve"][-1]["validation"] < record["curve"][0]["validation"]
    assert not (finished / UNFINISHED).exists()
    model, tokenizer = load(finished)
    start, later = [load(finished / name)[0].model.norm.weight for name in ("step-0", "step-3")]
    assert torch.equal(start, load(TINY)[0].model.norm.weight) and not torch.equal(later, model.model.norm.weight)
    assert Config.from_hf(finished / "step-0").freq == "pi"
    ids = torch.tensor([tokenizer.encode("The grass is green. The sky is blue. " * 8)[:60]])
    ours = model(ids, model.plan(n=60))
    assert generate_command(["--ckpt", str(finished), "--prompt", "Once", "--max-new-tokens", "3"]) == 0
    capsys.readouterr()
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(finished)
    assert torch.allclose(theirs(ids).logits, ours, atol=1e-4)


@pytest.mark.parametrize("dying", [1, 3])
def test_killed_at_any_step_it_ends_in_the_same_bits(finished, dying, tmp_path, monkeypatch):
    """Before the first save and after it. With other settings it does not go on."""
    step = finetune.train_step

    def dies(number, *rest):
        if number == dying:
            raise KeyboardInterrupt
        return step(number, *rest)
    monkeypatch.setattr(finetune, "train_step", dies)
    with pytest.raises(KeyboardInterrupt):
        tune(tmp_path, "--method", "pi:factor=2", "--keep", "0,3")
    monkeypatch.setattr(finetune, "train_step", step)
    if dying > 2:
        with pytest.raises(ValueError, match="other settings"):
            tune(tmp_path, "--method", "pi:factor=2", "--lr", "0.001")
    tune(tmp_path, "--method", "pi:factor=2", "--keep", "0,3")
    for name in ("model.safetensors", "step-3/model.safetensors"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()
    curves = [json.loads((folder / "training.json").read_text())["curve"] for folder in (tmp_path, finished)]
    assert curves[0] == curves[1]


def test_the_built_in_mix(tmp_path, monkeypatch):
    """Rows of every kind at the new window; the validation is text that no row is drawn from."""
    texts = [f"The {a} cat sat on the {b} mat. Nobody in the {a} house asked why it was {b}, and it slept all day."
             for a in ("grey", "old", "small", "quick") for b in ("red", "warm", "dusty", "round")] * 12
    monkeypatch.setattr(finetune, "prose", lambda: texts)
    finetune.run(["--init", str(TINY), "--out", str(tmp_path), "--method", "pi:factor=2", "--train-len", "100",
                  "--steps", "1", "--val-rows", "1", "--batch", "6"])
    assert json.loads((tmp_path / "training.json").read_text())["curve"][-1]["loss"] > 0


def test_a_picture_of_the_curve(finished, tmp_path):
    pytest.importorskip("matplotlib")
    curve = json.loads((finished / "training.json").read_text())["curve"]
    finetune.plot_training(curve, "pi:factor=2", tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 5000


@pytest.mark.parametrize("flags, named", [
    (["--method", "mesa"], "can say rope, pi"), (["--method", "pi:attn-scale=logn"], "can say rope, pi"),
    (["--method", "pi"], "give --seq-len"), (["--method", "pi:factr=2", "--seq-len", "64"], "did you mean factor"),
    (["--method", "rope", "--seq-len", "16"], "shorter than the old window"),
    (["--method", "rope", "--seq-len", "999"], "too few to train"),
    (["--method", "drope", "--positions", "pose"], "drope drops that"),
    (["--method", "pi:factor=2", "--init", "nowhere"], "no checkpoint folder nowhere"),
    (["--method", "pi:factor=2", "--init", "tiny-nope"], "no rotary positions")])
def test_bad_settings_are_one_clear_line(flags, named, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        run_command(lambda: tune(tmp_path / "out", *flags), "finetune.py")
    assert end.value.code == 2 and named in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
