"""generate.py: the library (prefill, decode, sample, generate) and its command line as users meet it."""
import functools
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import generate as script
from cli import run_command
from generate import decode, generate, prefill, sample
from geometry import METHODS
from model import load
from positions import Method
from tasks import passkey_prompt

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def tiny():
    return load("tiny")


@pytest.fixture
def command(capsys):
    """command("--method", "mesa") -> (exit code, stdout, stderr) of generate.py, in this process."""
    def call(*args):
        with pytest.raises(SystemExit) as end:
            run_command(lambda: script.run([str(arg) for arg in args]), "generate.py")
        out, err = capsys.readouterr()
        return end.value.code, out, err
    return call


# ---- the promise of the README

def test_mesa_finds_the_passkey_at_eight_times_the_window(command):
    code, out, err = command("--method", "mesa")
    assert code == 0 and re.search(r"\d+", out).group() == "71432"
    assert "71432" not in command("--method", "rope")[1]
    note, memory, settings, verdict, speed = err.splitlines()
    assert verdict == "the answer is right: 71432"
    assert memory.startswith("memory: about ") and "weights 3.9 MiB, cache 5.2 MiB, rotated keys 5.2 MiB" in memory
    assert note == "no prompt given: a passkey prompt of 2048 tokens, 8 times the window; the key is 71432"
    assert settings == ("ckpt=tiny method=mesa set=defaults attn-scale=logn prompt=2048 train-len=256 dtype=float32 "
                        "device=cpu quantize=none cache-dtype=none impl=auto prefill-chunk=8192 max-new-tokens=64 "
                        "temperature=0.0 top-k=0 top-p=1.0 seed=1337")
    assert re.fullmatch(r"prefill [\d.]+ tokens/s, decode [\d.]+ tokens/s, peak memory \d+ MiB", speed)


# ---- the library

def test_generate_takes_the_words_of_model_plan(tiny):
    """A name and keywords, a text, or a Method; the tokens are those of model.plan with the same words."""
    model, tokenizer = tiny
    ids = tokenizer.encode("The grass is green. The sky is blue. " * 30)
    params = dict(first=3, factor=2.0, logit_factor=1.2)  # of the geometry, of pi and of the constant scale
    words = dict(method="mesa", freq="pi", attn_scale="constant", **params)
    text = "mesa:first=3:freq=pi:factor=2.0:attn-scale=constant:logit_factor=1.2"
    outs = [list(generate(model, ids, max_new_tokens=6, **words)),
            list(generate(model, ids, text, max_new_tokens=6)),
            list(generate(model, ids, Method("mesa", "pi", "constant", params), max_new_tokens=6))]
    assert outs[0] == outs[1] == outs[2]
    logits = model(torch.tensor([ids]), model.plan(n=len(ids), **words), last_only=True)
    assert outs[0][0] == int(logits.argmax()) and len(outs[0]) == 6
    assert outs[0] != list(generate(model, ids, "mesa", max_new_tokens=6))


@pytest.mark.parametrize("name", ["dynamic-ntk", "self-extend", "mesa"])
def test_decoding_has_the_logits_of_one_pass_at_the_length_of_the_prompt(tiny, name):
    """The positions of what is decoded depend on n, the length of the prompt, which does not grow with it. A loop of
    one's own may go on where decode stopped: the cache it leaves, which has grown in it, is of ordinary tensors."""
    model, tokenizer = tiny
    ids, method, chosen_from = tokenizer.encode("The grass is green. " * 60), Method(name), []

    def choose(logits):
        assert torch.is_inference_mode_enabled()
        chosen_from.append(logits)
        return sample(logits)
    n = len(ids)
    logits, cache = prefill(model, torch.tensor([ids]), method, room=2)
    ids += [int(token) for token in decode(model, logits, cache, method, n, choose, 12)]
    assert len(chosen_from) == 12 and len(cache) == n + 11  # nobody wants the logits after the last token
    with torch.no_grad():
        for tokens in (ids[-1:], [7, 8]):
            begin, end = len(cache), len(cache) + len(tokens)
            plan = model.plan(method, n=n, i=torch.arange(begin, end), j=torch.arange(end))
            chosen_from.append(model(torch.tensor([tokens]), plan, cache)[0])
        every = torch.arange(len(ids) + 2)
        whole = model(torch.tensor([ids + [7, 8]]), model.plan(method, n=n, i=every, j=every))[0, n - 1:]
    assert (torch.cat(chosen_from) - whole).abs().max() < 1e-5 * whole.abs().max()


def test_any_cut_of_the_prefill_gives_the_same_tokens(tiny):
    model, tokenizer = tiny
    ids = passkey_prompt(tokenizer, 700).ids
    outs = [list(generate(model, ids, "mesa", max_new_tokens=12, prefill_chunk=c)) for c in (10_000, 97, 256)]
    assert outs[0] == outs[1] == outs[2] and "71432" in tokenizer.decode(outs[0])


def test_sampling_keeps_what_top_k_and_top_p_allow():
    logits = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log().expand(500, 4)

    def drawn(temperature=1.0, **options):
        return set(sample(logits, temperature, generator=torch.Generator().manual_seed(1), **options).tolist())
    assert drawn() == {0, 1, 2, 3}
    assert drawn(top_k=2) == drawn(top_p=0.6) == {1, 3}
    assert drawn(top_k=3, top_p=0.9) == {0, 1, 3}
    assert drawn(top_k=1) == drawn(top_p=0.4) == drawn(top_p=0.0) == drawn(0.0) == drawn(1e-9) == {1}


def test_sampling_has_the_probabilities_of_the_temperature():
    """At temperature 2, of 0.8 and 0.2, square roots: 2/3 and 1/3."""
    logits = torch.tensor([[0.8, 0.2]]).log().expand(30_000, 2)
    drawn = sample(logits, 2.0, generator=torch.Generator().manual_seed(1))
    assert abs(float(drawn.float().mean()) - 1 / 3) < 0.01


def test_sampling_follows_the_seed(tiny):
    def drawn(seed):
        return list(generate(tiny[0], [1, 5, 6], max_new_tokens=20, temperature=1.5, seed=seed))
    assert drawn(7) == drawn(7) != drawn(8)


def test_generation_stops_at_any_eos_and_includes_it(tiny, monkeypatch):
    model, tokenizer = tiny
    ids = tokenizer.encode("The grass is green.")
    free = list(generate(model, ids, "rope", max_new_tokens=6))
    monkeypatch.setattr(model.config, "eos_token_id", (free[2], 99_999))
    assert list(generate(model, ids, "rope", max_new_tokens=6)) == free[:free.index(free[2]) + 1]


def test_progress_is_told_after_every_layer_of_every_piece(tiny):
    """The model has 5 layers; the first 100 tokens are in the cache."""
    told = []
    ids = list(range(1, 301))
    _, cache = prefill(tiny[0], torch.tensor([ids[:100]]), Method("rope"))
    list(generate(tiny[0], ids, "rope", max_new_tokens=1, prefill_chunk=150, cache=cache,
                  progress=lambda done, n: told.append((done, n))))
    assert [done for done, _ in told] == [100, 130, 160, 190, 220, 250, 250, 260, 270, 280, 290, 300]
    assert {n for _, n in told} == {300} and not tiny[0].model.layers[0]._forward_hooks


@pytest.mark.parametrize("ids, message", [([], "empty"), ([10**6], "vocabulary"), ([-1], "vocabulary")])
def test_prompt_must_be_ids_of_the_model(tiny, ids, message):
    with pytest.raises(ValueError, match=message):
        next(generate(tiny[0], ids))


# ---- the command line: prompts

def test_a_prompt_from_a_file_from_stdin_or_from_the_line_goes_on(command, tiny, monkeypatch, tmp_path):
    """With the space before its first word that a decoding on its own would lose."""
    model, tokenizer = tiny
    text = "Ünï → 12. The grass is green. The sky is"
    (tmp_path / "prompt.txt").write_text(text, encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(text.encode())))
    ids = tokenizer.encode(text)
    told = tokenizer.decode(ids + list(generate(model, ids, max_new_tokens=9)))
    for how in (("--prompt", text), ("--prompt-file", tmp_path / "prompt.txt"), ("--prompt_file", "-")):
        code, out, _ = command(*how, "--max-new-tokens", 9)
        assert code == 0 and text + out == told + "\n" and out.startswith(" ")


# ---- the command line: methods

def test_a_method_is_written_in_one_text_or_with_flags(command):
    prompt = "--prompt", "The grass is green. The sky is blue. " * 30, "--max-new-tokens", 8
    ways = [
        ("--method", "mesa:overlap=16:first=9:freq=pi:attn-scale=infoscale"),
        ("--methods", "mesa:overlap=16,first=9", "--freq", "pi", "--attn-scale", "infoscale"),
        ("--method", "mesa", "--set", "overlap=16,first=9", "--freq", "pi", "--attn_scale", "infoscale"),
        ("--method", "mesa:overlap=16", "--set", "first=9", "--set", "freq=pi,attn-scale=infoscale")]
    texts = []
    for way in ways:
        code, out, err = command(*way, *prompt)
        assert code == 0 and " method=mesa freq=pi set=overlap=16,first=9 attn-scale=infoscale prompt=" in err
        texts.append(out)
    assert len(set(texts)) == 1


@pytest.mark.parametrize("args, line", [
    ([], "method=rope (config.json) set=defaults attn-scale=none"),
    (["--method", "infoscale", "--set", "clamp=FALSE"], "method=infoscale set=clamp=false attn-scale=infoscale"),
    (["--ckpt", "tiny-alibi", "--method", "rerope"],
     "method=rerope (alibi of config.json kept) set=defaults attn-scale=logn"),
    (["--ckpt", "tiny-alibi", "--method", "mesa", "--freq", "nope"],
     "method=mesa (alibi of config.json dropped) freq=nope set=defaults")])
def test_the_settings_line_says_what_became_of_the_method(args, line, command):
    code, _, err = command(*args, "--prompt", "The grass is green.", "--max-new-tokens", 1)
    assert code == 0 and f" {line} " in err and "decode" not in err


def test_explain_and_list_methods(command):
    """What is explained is the prompt, with room for what would be decoded, in the type asked for."""
    code, out, err = command("--method", "mesa", "--explain", "--set", "first=16")
    assert code == 0 and "2048 tokens, training length 256 (8 times)" in out and "warning" not in err
    assert out.startswith("mesa:first=16: prompt of") and "region 3" in out and " . " in out
    assert "memory: about " in out and " weights 3.9 MiB, cache 5.2 MiB, rotated keys 5.2 MiB, activations " in out
    assert out.endswith("decoding on cpu: weights by mv, cached keys by flash\n")
    _, out, err = command("--explain", "--prompt", "x", "--max-new-tokens", 8189, "--dtype", "bfloat16")
    assert "weights 2.0 MiB, cache 10.0 MiB" in out and "memory" not in err
    code, out, _ = command("--list-methods")
    assert code == 0 and [line.split()[0] for line in out.splitlines()[::2]] == list(METHODS)


def test_what_is_decoded_beyond_the_reach_is_warned_of(command):
    """Of 252 tokens and 5 new ones the last is at index 256; --explain speaks of the prompt alone."""
    args = "--method", "rope", "--prompt", "The grass is green. " * 50, "--max-new-tokens", 5
    code, _, err = command(*args)
    assert code == 0 and "rope puts tokens 256 apart by token 257, beyond the training length 256" in err
    assert "warning" not in command(*args[:-1], 4)[2]
    assert "warning" not in command(*args, "--explain")[2]


# ---- the command line: bad input

@pytest.mark.parametrize("args, words", [
    (("--method", "meza"), "did you mean mesa?"),
    (("--freq", "yarm"), "did you mean yarn?"),
    (("--attn-scale", "log"), "did you mean logn?"),
    (("--method", "mesa", "--set", "fist=3"), "did you mean first?"),
    (("--methods", "rope,mesa:first=3,last=9"), "one method here, not 2: rope, mesa:first=3:last=9"),
    (("--method", "yarn", "--freq", "pi"), "choose one"),
    (("--ckpt", "tiny-nope", "--freq", "pi"), "no rotary positions"),
    (("--method", "mesa", "--set", "first=99999999999999999999"), "first"),
    (("--method", "mesa", "--set", "chunk=300"), "chunk"),
    (("--method", "ntk", "--set", "factor=1e308"), "factor"),
    (("--train-len", "99999999999999999999999"), "train_len"),
    (("--temperature", "nan"), "temperature"),
    (("--prompt", " "), "empty"),
    (("--prompt", "x", "--prompt-file", "y"), "not both")], ids=lambda value: str(value)[-30:])
def test_bad_input_is_one_clear_line_and_exit_code_2(args, words, command):
    code, out, err = command(*args)
    assert code == 2 and not out.strip() and words in err.strip().splitlines()[-1] and "Traceback" not in err


# ---- processes of their own, and torch.compile

@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_ends_with_what_was_generated():
    args = ("--prompt", "The grass is green.", "--temperature", "1", "--max-new-tokens", "100000")
    process = subprocess.Popen([sys.executable, ROOT / "generate.py", *args], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    process.stdout.read(20)  # it has begun to write
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode in (0, 130) and b"Traceback" not in err and b"decode" in err


def test_a_32k_prompt_fits_in_a_gigabyte_and_a_half(tmp_path, tiny):
    """All in all, Python and PyTorch included; the scores of one head alone would be 4 GiB."""
    filler = "The grass is green. The sky is blue. "
    text = filler * (100 * 33_000 // len(tiny[1].encode(filler * 100, bos=False)) + 1)
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    args = ("--method", "mesa", "--prompt-file", tmp_path / "long.txt", "--max-new-tokens", "8")
    done = subprocess.run([sys.executable, ROOT / "generate.py", *args], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and int(re.search(r" prompt=(\d+)", done.stderr).group(1)) >= 32_768
    assert "\r" not in done.stderr
    peak = int(re.search(r"peak memory (\d+) MiB", done.stderr).group(1))
    said = float(re.search(r"memory: about ([\d.]+) MiB", done.stderr).group(1))
    assert peak < 1536 and abs(said / peak - 1) < 0.15


def test_compiled_model_writes_the_same(command, monkeypatch):
    """As torch.compile traces it; the making of C++ code, which takes 20 seconds and a compiler, is left out."""
    args = "--method", "mesa", "--prompt", "The grass is green. " * 60, "--max-new-tokens", 2
    plain = command(*args)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    compiled = command(*args, "--compile")
    assert compiled[0] == 0 and compiled[:2] == plain[:2]


def test_compile_without_a_compiler_is_one_clear_line(command, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    code, out, err = command("--compile", "--prompt", "x")
    assert code == 2 and not out and "C++ compiler" in err.splitlines()[-1] and "Traceback" not in err
