"""generate.py and eval_passkey.py as their users meet them: from the command line, in a fresh process."""
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from generate import decode, generate, passkey_parts, passkey_prompt, plan_maker, prefill, sample
from generate import run as generate_main
from model import compile_dense, load
from positions import parse_settings, run_command

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "checkpoints" / "tiny"


def run(*args, script="generate.py", stdin=b"", cwd=ROOT):
    """The finished process of a command line, output as text."""
    done = subprocess.run([sys.executable, ROOT / script, *map(str, args)], input=stdin, capture_output=True, cwd=cwd,
                          timeout=300)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.fixture(scope="module")
def tiny():
    return load(TINY)


# ---- the promise of the README

def test_mesa_finds_the_passkey_at_eight_times_the_window():
    code, out, err = run("--method", "mesa")
    assert code == 0 and re.search(r"\d+", out).group() == "71432"
    assert "method=mesa" in err.splitlines()[1] and "tokens/s" in err and "peak memory" in err


def test_plain_rope_does_not():
    code, out, _ = run("--method", "rope", "--max-new-tokens", "12")
    found = re.search(r"\d+", out)
    assert code == 0 and (not found or found.group() != "71432")


def test_eval_passkey_prints_the_table(tmp_path):
    code, out, _ = run("--methods", "rope,pi:factor=8,mesa:first=20", "--lengths", "256,1024", "--depths", "2",
                       "--trials", "2", "--results", tmp_path / "r.jsonl", script="eval_passkey.py")
    assert code == 0 and out.splitlines()[0] == "| method | 256 (1x) | 1024 (4x) |"
    assert out.splitlines()[2:5] == ["| rope | 1.00 | 0.00 |", "| pi:factor=8 | 0.00 | 0.00 |",
                                     "| mesa:first=20 | 1.00 | 0.75 |"]  # of the key 94442 a digit is wrong


# ---- the library

def test_prompt_has_exactly_the_tokens_asked_for_and_the_needle_at_its_depth(tiny):
    tokenizer = tiny[1]
    for n in (90, 256, 1001):
        for depth in (0, 0.3, 1):
            before, needle, after = passkey_parts(tokenizer, n, depth, "12345")
            assert len(before + needle + after) == n and before[0] == tokenizer.bos_id
            assert tokenizer.decode(needle).count("12345") == 2
    first, last = (passkey_parts(tokenizer, 256, depth) for depth in (0, 1))
    assert len(first[0]) < len(last[0]) and len(first[2]) > len(last[2])
    with pytest.raises(ValueError, match="takes at least"):
        passkey_parts(tokenizer, 10)


def test_any_cut_of_the_prefill_gives_the_same_tokens(tiny):
    model, tokenizer = tiny
    ids = passkey_prompt(tokenizer, 700)
    outs = [list(generate(model, ids, method="mesa", max_new_tokens=12, prefill_chunk=c)) for c in (10_000, 97, 256)]
    assert outs[0] == outs[1] == outs[2] and "71432" in tokenizer.decode(outs[0])


def test_greedy_equals_sampling_from_the_likeliest_alone(tiny):
    model, tokenizer = tiny
    ids = tokenizer.encode("The grass is green.")
    greedy = list(generate(model, ids, method="rope", max_new_tokens=8))
    for narrow in (dict(top_k=1), dict(top_p=0.0)):
        assert list(generate(model, ids, method="rope", max_new_tokens=8, temperature=1.0, seed=0, **narrow)) == greedy


def test_sampling_keeps_what_top_k_and_top_p_allow_and_follows_the_seed():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(500, 4)
    drawn = {name: set(sample(logits, 1.0, *how, torch.Generator().manual_seed(1)).tolist())
             for name, how in {"all": (0, 1.0), "k": (2, 1.0), "p": (0, 0.6), "p first": (0, 0.4)}.items()}
    assert drawn == {"all": {0, 1, 2, 3}, "k": {0, 1}, "p": {0, 1}, "p first": {0}}
    first, second = (sample(logits, 1.0, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, second)


def test_generation_stops_at_any_eos_and_includes_it(tiny):
    model, tokenizer = tiny
    ids = tokenizer.encode("The grass is green.")
    free = list(generate(model, ids, method="rope", max_new_tokens=6))
    kept, model.config.eos_token_id = model.config.eos_token_id, (free[2], 99_999)
    try:
        assert list(generate(model, ids, method="rope", max_new_tokens=6)) == free[:free.index(free[2]) + 1]
    finally:
        model.config.eos_token_id = kept


def test_a_batch_decodes_like_its_rows(tiny):
    model, tokenizer = tiny
    prompts = [passkey_prompt(tokenizer, 600, depth, key) for depth, key in ((0.1, "11111"), (0.9, "98765"))]
    plan = plan_maker(model, 600, "mesa")
    state = prefill(model, torch.tensor(prompts), plan)
    together = torch.stack(list(decode(model, *state, plan, sample, 8)), 1).tolist()
    alone = [list(generate(model, ids, method="mesa", max_new_tokens=8)) for ids in prompts]
    assert [row[:len(a)] for row, a in zip(together, alone)] == alone


@pytest.mark.parametrize("method", ["rope", "self-extend", "mesa"])
def test_a_loop_of_ones_own_may_go_on_where_decode_stopped(tiny, method):
    """decode runs in torch.inference_mode, but the cache it leaves, which has grown in it, is of ordinary tensors."""
    model, tokenizer = tiny
    ids = tokenizer.encode("The grass is green. " * 20)
    plan = plan_maker(model, len(ids), method)
    logits, cache = prefill(model, torch.tensor([ids]), plan, room=2)
    ids += [int(token) for token in decode(model, logits, cache, plan, sample, 100)]
    with torch.no_grad():
        for tokens in (ids[-1:], [7, 8]):
            begin, end = len(cache), len(cache) + len(tokens)
            logits = model(torch.tensor([tokens]), plan(torch.arange(begin, end), torch.arange(end)), cache)
        whole = model(torch.tensor([ids + [7, 8]]), plan(torch.arange(end), torch.arange(end)))
    assert end == len(ids) + 2 and (logits[0, -1] - whole[0, -1]).abs().max() < 1e-5 * whole.abs().max()



@pytest.mark.parametrize("ids, message", [([], "empty"), ([10**6], "vocabulary"), ([-1], "vocabulary")])
def test_prompt_must_be_ids_of_the_model(tiny, ids, message):
    with pytest.raises(ValueError, match=message):
        next(generate(tiny[0], ids))


# ---- the command line

def test_prompt_from_a_file_from_stdin_and_from_the_line_are_the_same(tmp_path):
    text = "The sky is blue. Ünï → 12"
    (tmp_path / "prompt.txt").write_text(text, encoding="utf-8")
    outs = [run(*how, "--max-new-tokens", 8, stdin=text.encode())[:2]
            for how in (("--prompt", text), ("--prompt-file", tmp_path / "prompt.txt"), ("--prompt_file", "-"))]
    assert outs[0][0] == 0 and outs[0] == outs[1] == outs[2]


def test_checkpoint_by_name_in_checkpoints_and_by_folder_from_elsewhere(tmp_path):
    for how in (("--ckpt", "tiny"), ("--ckpt", TINY), ()):
        assert run(*how, "--prompt", "Here we go.", "--max-new-tokens", 2, cwd=tmp_path)[0] == 0


def test_explain_and_list_methods_run_no_model():
    code, out, _ = run("--method", "mesa", "--explain", "--set", "first=16")
    assert code == 0 and "2048 tokens, training length 256 (8 times)" in out
    assert "region 3" in out and "of full causal attention" in out and " . " in out
    code, out, _ = run("--list-methods")
    assert code == 0 and all(name in out for name in ("mesa", "rerope", "dynamic-ntk", "stair"))


BAD = {
    "no such folder": (("--ckpt", "nowhere"), "nowhere"),
    "unknown method": (("--method", "meza"), "meza"),
    "unknown parameter": (("--method", "mesa", "--set", "fist=3"), "fist"),
    "parameter without value": (("--method", "mesa", "--set", "first"), "first"),
    "parameter of the wrong kind": (("--method", "mesa", "--set", "first=many"), "first"),
    "parameter out of range": (("--method", "mesa", "--set", "width=0"), "width"),
    "chunk beyond the window": (("--method", "mesa", "--set", "chunk=300"), "chunk"),
    "empty prompt": (("--prompt", " "), "empty"),
    "no such prompt file": (("--prompt-file", "nowhere.txt"), "nowhere.txt"),
    "negative length": (("--max-new-tokens", "-3"), "max-new-tokens"),
    "temperature": (("--temperature", "nan"), "temperature"),
    "unknown device": (("--device", "tpu"), "device"),
    "unknown flag": (("--methd", "mesa"), "methd"),
    "argument that is no parameter": (("--set", "n=5"), "'n'"),
    "parameter that is neither true nor false": (("--method", "infoscale", "--set", "clamp=maybe"), "clamp"),
    "huge parameter": (("--method", "mesa", "--set", "first=99999999999999999999"), "first"),
    "huge factor": (("--method", "ntk", "--set", "factor=1e308"), "factor"),
    "huge window": (("--train-len", "99999999999999999999999"), "train_len"),
    "huge seed": (("--seed", "99999999999999999999999"), "seed"),
    "two prompts": (("--prompt", "x", "--prompt-file", "y"), "not both"),
    "two frequency rules": (("--method", "yarn", "--freq", "pi"), "choose one"),
    "triton without a GPU": (("--impl", "triton", "--prompt", "x"), "CUDA"),
}


@pytest.mark.parametrize("args, named", BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_clear_line_and_exit_code_2(args, named, capsys):
    if "triton" in args and torch.cuda.is_available():
        pytest.skip("it runs here")
    with pytest.raises(SystemExit) as end:
        run_command(lambda: generate_main([*args]), "generate.py")
    out, err = capsys.readouterr()
    assert end.value.code == 2 and not out.strip() and named in err.strip().splitlines()[-1]


def test_bad_input_from_a_shell():
    code, out, err = run("--method", "meza")
    assert code == 2 and not out and err.startswith("generate.py: unknown method 'meza'") and len(err.splitlines()) == 1


def test_what_is_decoded_beyond_the_reach_is_warned_of():
    """Inside the window is the prompt, but not the 300 tokens that follow it."""
    code, _, err = run("--method", "rope", "--prompt", "The sky is blue.", "--max-new-tokens", 300)
    assert code == 0 and "beyond the training length 256" in err


def test_true_and_false_in_any_case():
    for text in ("false", "False"):
        assert parse_settings([f"clamp={text}"]) == {"clamp": False}


def test_prompt_file_that_is_not_utf8(tmp_path):
    (tmp_path / "latin.txt").write_bytes("Grün".encode("latin-1"))
    code, _, err = run("--prompt-file", tmp_path / "latin.txt")
    assert code == 2 and "not UTF-8" in err and len(err.strip().splitlines()) == 1


def test_broken_checkpoints(tmp_path):
    whole = (TINY / "model.safetensors").read_bytes()
    for name in ("config.json", "tokenizer.model"):
        (tmp_path / name).write_bytes((TINY / name).read_bytes())
    for content, said in ((None, "no model.safetensors"), (whole[:len(whole) // 2], "not a whole safetensors file")):
        if content:
            (tmp_path / "model.safetensors").write_bytes(content)
        code, _, err = run("--ckpt", tmp_path, "--prompt", "x")
        assert code == 2 and said in err and "Traceback" not in err
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert "pickle" in run("--ckpt", tmp_path, "--prompt", "x")[2]
    (tmp_path / "tokenizer.model").unlink()
    assert "tokenizer" in run("--ckpt", tmp_path, "--prompt", "x")[2]


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_ends_with_what_was_generated():
    args = ("--prompt", "The grass is green.", "--temperature", "1", "--max-new-tokens", "100000")
    process = subprocess.Popen([sys.executable, ROOT / "generate.py", *args], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    process.stdout.read(20)  # it has begun to write
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (0, 130) and b"Traceback" not in err and b"decode" in err


def test_a_32k_prompt_fits_in_a_gigabyte_and_a_half(tmp_path, tiny):
    """All in all, Python and PyTorch included; the scores of one head alone would be 4 GiB."""
    filler = "The grass is green. The sky is blue. "
    text = filler * (100 * 33_000 // len(tiny[1].encode(filler * 100, bos=False)) + 1)
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    code, _, err = run("--method", "mesa", "--prompt-file", tmp_path / "long.txt", "--max-new-tokens", 8)
    assert code == 0 and int(re.search(r" prompt=(\d+)", err).group(1)) >= 32_768
    assert int(re.search(r"peak memory (\d+) MiB", err).group(1)) < 1536


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_model_writes_the_same():
    args = "--method", "mesa", "--max-new-tokens", 6
    assert run(*args, "--compile")[:2] == run(*args)[:2]


def test_compile_without_a_compiler_is_one_clear_sentence(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="C\\+\\+ compiler"):
        compile_dense(None)
