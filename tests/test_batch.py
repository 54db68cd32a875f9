"""batch.py and what stands around it in generate.py: many prompts at once give what each gives alone, and files of
prompts and answers survive what happens to them."""
import json

import pytest
import torch

import generate as script
from batch import Row, decode_rows
from cli import methods_asked, run_command
from generate import decode, generate, generate_batch, prefill, sample
from model import load
from positions import Method

METHODS = [str(method) for method in methods_asked(load("tiny")[0].config, ["all"], ())]
TEXT = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "


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


def prompts_of(tokenizer, lengths):
    ids = tokenizer.encode(TEXT * 40)
    return [ids[:1] + ids[k + 1:k + n] for k, n in enumerate(lengths)]


# ---- rows together and alone

@pytest.mark.parametrize("method", METHODS)
def test_rows_of_a_batch_have_the_logits_and_tokens_that_they_have_alone(method, tiny):
    """Prompts of 1 to 300 tokens, 256 being the window, and answers of 1 to 5; two rows run at a time."""
    model, tokenizer = tiny
    method = Method.parse(method)
    alone = []
    waiting = []
    for number, ids in enumerate(prompts_of(tokenizer, (1, 300, 30, 257))):
        room = (5, 1, 3, 4)[number]
        logits, cache = prefill(model, torch.tensor([ids]), method)
        alone.append([])
        list(decode(model, logits, cache, method, len(ids), keeping(alone[-1]), room))
        cache.cut(len(ids))
        together = []
        row = Row(number, len(ids), method, logits, cache, keeping(together), room, lambda tokens: False)
        waiting.append((row, together))
    ended = list(decode_rows(model, (row for row, _ in waiting), most=2))
    assert sorted(row.number for row in ended) == [0, 1, 2, 3] and ended[0].number == 1
    for (row, together), want in zip(waiting, alone):
        want = torch.cat(want)
        together = torch.cat(together)
        assert float((together - want).abs().max()) < 1e-4
        assert row.tokens == want.argmax(-1).tolist() and len(row.tokens) == row.room


def keeping(found):
    """sample, which appends the logits that it gets to a list."""
    def choose(logits):
        found.append(logits)
        return sample(logits)
    return choose


def test_rows_of_different_methods_may_share_a_batch(tiny):
    model, tokenizer = tiny
    ids = prompts_of(tokenizer, [300])[0]
    rows = []
    for number, name in enumerate(("rope", "mesa", "self-extend")):
        method = Method(name)
        logits, cache = prefill(model, torch.tensor([ids]), method)
        rows.append(Row(number, 300, method, logits, cache, sample, 6, lambda tokens: False))
    for row in decode_rows(model, rows):
        assert row.tokens == list(generate(model, ids, row.method, max_new_tokens=6))


def test_generate_batch_samples_from_seeds_of_its_rows_and_ends_where_they_end(tiny, monkeypatch):
    """Whatever runs beside a row, it draws the tokens that it draws alone, up to an eos of its own."""
    model, tokenizer = tiny
    prompts = prompts_of(tokenizer, (5, 60, 9, 300, 1))
    settings = dict(method="mesa", max_new_tokens=20, temperature=1.5, top_k=50)
    free = list(generate(model, prompts[1], seed=2, **settings))
    monkeypatch.setattr(model.config, "eos_token_id", (free[4],))
    want = {k: list(generate(model, ids, seed=k + 1, **settings)) for k, ids in enumerate(prompts)}
    assert want[1] == free[:free.index(free[4]) + 1] and len({len(tokens) for tokens in want.values()}) > 1
    for rows in (1, 3, 99):
        assert dict(generate_batch(model, prompts, rows=rows, seed=[1, 2, 3, 4, 5], **settings)) == want
    assert dict(generate_batch(model, prompts[:2], seed=1, **settings))[0] == want[0]
    assert list(generate_batch(model, [])) == []


@pytest.mark.parametrize("prompts, message", [([[1], []], "empty"), ([[1], [10 ** 6]], "vocabulary")])
def test_every_prompt_must_be_ids_of_the_model(prompts, message, tiny):
    with pytest.raises(ValueError, match=message):
        next(generate_batch(tiny[0], prompts))


# ---- files

def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def files(tmp_path):
    """A file of four prompts, and where their answers are to be."""
    rows = [{"id": "a", "prompt": TEXT[:19]}, {"prompt": "The grass"}, {"ids": [1, 5, 6], "seed": 3},
            {"prompt": "Ünï → 12"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in rows), encoding="utf-8")
    return tmp_path / "in.jsonl", tmp_path / "out.jsonl"


def test_answers_in_a_file_are_those_of_each_prompt_alone(files, command, tiny):
    """With what stood beside a prompt; a stop text ends a row as it ends a prompt alone."""
    flags = ["--method", "mesa", "--max-new-tokens", 12, "--stop", "blue", "--rows", 2]
    code, out, err = command(*flags, "--prompts", files[0], "--out", files[1])
    assert code == 0 and not out and "prompts=4 to-answer=4 rows=2" in err
    rows = lines(files[1])
    assert [row["row"] for row in rows] == [0, 1, 2, 3] and rows[0]["id"] == "a" and rows[2]["seed"] == 3
    for prompt, row in zip((TEXT[:19], "The grass"), rows):
        assert command(*flags[:-2], "--prompt", prompt)[1] == row["answer"] + "\n"
    assert rows[0]["ended"] == "stop" and "blue" not in rows[0]["answer"] and rows[2]["ended"] == "length"
    drawn = list(generate(tiny[0], [1, 5, 6], "mesa", max_new_tokens=12))
    assert rows[2]["ids"] == drawn


def test_answers_that_are_there_are_kept(files, command):
    """Wherever a run was killed, in mid-line too, the next one ends with the same file; other settings, another prompt
    and another seed are other answers."""
    flags = ["--temperature", 1, "--max-new-tokens", 8, "--prompts", files[0], "--out", files[1]]
    command(*flags)
    whole = files[1].read_bytes()
    reversed_lines = b"".join(reversed(whole.splitlines(keepends=True)))
    for left in (reversed_lines[:1000], whole[:300], whole[:-1], whole):
        files[1].write_bytes(left)
        code, _, err = command(*flags)
        assert code == 0 and f"to-answer={4 - left.count(10)} " in err and files[1].read_bytes() == whole
    command(*flags, "--top-k", 3)
    assert files[1].read_bytes().startswith(whole) and len(lines(files[1])) == 8
    text = files[0].read_text(encoding="utf-8")
    files[0].write_text(text.replace("grass\"", "grass\", \"seed\": 5"), encoding="utf-8")
    assert "to-answer=1 " in command(*flags)[2]


def test_several_prompt_files(command, tmp_path):
    """In their order, each under its name, whichever ends first."""
    for name, text in (("a", "The grass is green."), ("b", TEXT * 20)):
        (tmp_path / name).write_text(text, encoding="utf-8")
    args = ["--prompt-file", tmp_path / "a", "--max-new-tokens", 6]
    code, out, _ = command(*args, "--prompt-file", tmp_path / "b")
    first = command(*args)[1]
    second = command("--prompt-file", tmp_path / "b", "--max-new-tokens", 6)[1]
    assert code == 0 and out == f"==> {tmp_path / 'a'} <==\n{first}==> {tmp_path / 'b'} <==\n{second}"


@pytest.mark.parametrize("text, words", [
    ("", "no prompts"), ("{\"prompt\": \"x\"}\n{", "line 2: not JSON"), ("[1]", "line 1: not an object"),
    ("{\"ids\": [1], \"prompt\": \"x\"}", "not an object"), ("{\"prompt\": \" \"}", "prompt is empty"),
    ("{\"prompt\": 3}", "prompt is empty"), ("{\"ids\": []}", "whole numbers"), ("{\"ids\": [1.5]}", "whole numbers"),
    ("{\"ids\": [1], \"seed\": -1}", "whole number"), ("{\"ids\": [99999]}", "vocabulary")])
def test_bad_files_of_prompts(text, words, files, command):
    files[0].write_text(text, encoding="utf-8")
    code, out, err = command("--prompts", files[0], "--out", files[1])
    assert code == 2 and not out and words in err.splitlines()[-1]


@pytest.mark.parametrize("args, words", [
    (["--prompts", "x"], "go together"), (["--out", "x"], "go together"),
    (["--prompts", "x", "--out", "y", "--prompt", "z"], "--prompt is not there for several prompts"),
    (["--prompts", "x", "--out", "y", "--chat"], "--chat is not there"),
    (["--prompt-file", "x", "--prompt-file", "y", "--save-cache", "z"], "--save-cache is not there"),
    (["--prompts", "no such file", "--out", "no/such/folder"], "no such file")], ids=str)
def test_flags_that_do_not_go_together(args, words, command):
    code, out, err = command(*args)
    assert code == 2 and not out and words in err and "Traceback" not in err
