"""chat.py: templates, turns that share a cache, and saved caches, on the shipped model and a small template."""
import io
import json
import shutil
from functools import partial
from pathlib import Path

import pytest

import chat
from cache import KVCache
from chat import Conversation, read_template
from cli import run_command
from generate import generate, run
from model import load
from tasks import passkey_prompt
from tokenizer import load_tokenizer

TINY = Path(__file__).parents[1] / "checkpoints/tiny"
CHATML = """{%- for message in messages %}
<|im_start|>{{ message.role + '\\n' + message.content | trim + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. " * 5
LINES = [f"{FILLER}The pass key is 71432.", f"Remember it. {FILLER}", "What is the pass key? The pass key is"]


@pytest.fixture(scope="module")
def tiny():
    return load("tiny")


@pytest.fixture
def folder(tmp_path):
    """folder(template) -> a copy of the shipped checkpoint with this template, and ChatML's two control tokens."""
    def make(template=CHATML):
        path = shutil.copytree(TINY, tmp_path / "chatml")
        added = {"1020": {"content": "<|im_start|>"}, "1021": {"content": "<|im_end|>"}}
        config = {"chat_template": template, "bos_token": {"content": "<s>"}, "added_tokens_decoder": added}
        (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        return path
    return make


@pytest.fixture
def command(capsys, monkeypatch):
    """command("--chat", lines=["Hi"]) -> (exit code, stdout, stderr) of generate.py, in this process."""
    def call(*args, lines=()):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        with pytest.raises(SystemExit) as end:
            run_command(lambda: run([str(arg) for arg in args]), "generate.py")
        return end.value.code, *capsys.readouterr()
    return call


def conversation(model, tokenizer, method="rope", template=None):
    cache = KVCache(model.config)
    answer = partial(generate, model, method=method, cache=cache, max_new_tokens=8)
    return Conversation(tokenizer, template, answer, cache)


def ask(turns, line):
    turns.turn(line, write=str)  # nowhere
    return turns.messages[-1]["content"]


def test_a_template_is_rendered_as_transformers_does(folder):
    """Blocks take their line's spaces and newline with them; the text ends where the answer begins."""
    path = folder([{"name": "tools", "template": "no"}, {"name": "default", "template": CHATML}])
    template = read_template(path)
    text = template.render([{"role": "system", "content": "Brief."}, {"role": "user", "content": " Hi "}])
    assert text == "<|im_start|>system\nBrief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    template.source = "{{ bos_token }}{{ messages | tojson }}{{ strftime_now('%Y')[:2] }}{{ eos_token is defined }}"
    assert template.render([{"role": "user", "content": "é<"}]) == '<s>[{"role": "user", "content": "é<"}]20False'
    (path / "chat_template.jinja").write_text("of its own", encoding="utf-8")
    assert read_template(path).source == "of its own" and read_template(TINY) is None


@pytest.mark.parametrize("source, words", [
    ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "did not end within 1 seconds"),
    ("{% for a in range(99999) %}{{ 'x' * 999 }}{% endfor %}", "writes without end"),
    ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ("{% include 'secret' %}", "no loader"),
    ("{{ raise_exception('roles must alternate') }}", "roles must alternate")])
def test_a_template_that_loops_escapes_or_refuses_is_one_line(folder, source, words, command, monkeypatch):
    if "seconds" in words:
        monkeypatch.setattr(chat, "SECONDS", 1)
    code, out, err = command("--chat", "--ckpt", folder(source))
    assert code == 2 and not out and words in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("method", ["rope", "mesa", "rerope"])
@pytest.mark.parametrize("template", [None, CHATML])
def test_a_chat_of_three_turns_is_one_prompt_and_computes_each_token_once(tiny, folder, template, method):
    """Greedy, in float32, beyond the window; the counted tokens are those that go through the model."""
    model, tokenizer = tiny
    if template:
        path = folder()
        tokenizer, template = load_tokenizer(path, bos_id=1), read_template(path)
    counted = []
    hook = model.model.register_forward_pre_hook(lambda module, args: counted.append(args[0].shape[1]))
    turns = conversation(model, tokenizer, method, template)
    answers = [ask(turns, line) for line in LINES]
    hook.remove()
    assert sum(counted) == len(turns.cached) == turns.counts.computed + turns.counts.answered - 3
    _, ids = conversation(model, tokenizer, method, template).prompt(turns.messages[:-1])  # all encoded anew
    assert ids == turns.ids[:len(ids)] and len(ids) > 256
    assert answers[2] == "".join(tokenizer.stream(generate(model, ids, method, max_new_tokens=8), ids))


def test_a_template_that_drops_older_answers_keeps_what_is_equal(tiny, folder):
    path = folder("{% for m in messages if m.role == 'user' %}{{ m.content }}</s>{% endfor %}")
    turns = conversation(tiny[0], load_tokenizer(path, bos_id=1), template=read_template(path))
    assert all([ask(turns, line) for line in LINES])
    fresh = turns.tokenizer.encode_rendered("".join(f"{line}</s>" for line in LINES))
    assert turns.cached[:len(fresh)] == fresh and turns.counts.computed == len(fresh)


def test_ctrl_c_stops_an_answer_and_leaves_a_sound_cache(tiny):
    """Wherever it comes: here between two layers of the fourth token."""
    turns, fresh = conversation(*tiny), conversation(*tiny)
    steps = iter(range(3))

    def interrupt(module, args):
        if next(steps, None) is None:
            raise KeyboardInterrupt
    hook = tiny[0].model.layers[2].register_forward_pre_hook(interrupt)
    begun = ask(turns, "The grass is")
    hook.remove()
    assert begun and set(turns.cache.length) == {len(turns.cached)}
    fresh.begin_with(turns.messages, [])
    assert ask(turns, "The sky is") == ask(fresh, "The sky is")


def test_commands_stop_and_reset(command):
    flags = "--chat", "--max-new-tokens", 9, "--stop", "tring", "--stop", "zz", "--system", "Hm."
    code, out, err = command(*flags, lines=["The sky", "/stats", "/reset", "", "The sky", "/stats", "/exit", "x"])
    assert code == 0 and out == " is a s\n is a s\n" and err.count("no chat template") == 1
    first, second = [line for line in err.splitlines() if line.startswith("turns 1")]
    assert first == second and " 0 taken from the cache" in first


def test_prompt_ids_are_the_prompt(command, tiny):
    ids = ",".join(str(token) for token in tiny[1].encode("The sky is"))
    given = "--max-new-tokens", 5
    assert command("--prompt-ids", ids, *given)[:2] == command("--prompt", "The sky is", *given)[:2]


def test_a_book_is_read_once_and_asked_twice(command, tiny, tmp_path):
    """With the tokens that one prompt of book and question gives; and a chat goes on after it, and after itself."""
    model, tokenizer = tiny
    file, method, question = tmp_path / "book.safetensors", "mesa:first=64", LINES[2]
    book = passkey_prompt(tokenizer, 1024).ids[:1000]
    given = "--method", method, "--max-new-tokens", 8
    command(*given, "--prompt-ids", ",".join(map(str, book)), "--save-cache", file)
    for text in (question, " The sky is"):
        code, out, err = command(*given, "--load-cache", file, "--prompt", text)
        ids = book + tokenizer.encode_more(text)
        whole = "".join(tokenizer.stream(generate(model, ids, method, max_new_tokens=8), ids))
        assert code == 0 and out == f"{whole}\n" and "1000 tokens" in err
    _, out, err = command(*given, "--load-cache", file, "--save-cache", file, "--chat", lines=[question, "/stats"])
    assert "71432" in out and "1000 taken from the cache" in err
    _, out, err = command(*given, "--load-cache", file, "--chat", "--prompt", "Then", lines=["/stats"])
    assert f"{1000 + len(tokenizer.encode_more(question)) + 7} taken from the cache" in err


def test_a_book_of_which_little_is_kept(command, tiny, tmp_path):
    """What StreamingLLM has forgotten is not in the file either."""
    model, tokenizer = tiny
    book = passkey_prompt(tokenizer, 3000).ids
    given = "--method", "streaming-llm", "--max-new-tokens", 8
    ids = ",".join(map(str, book))
    command(*given, "--prompt-ids", ids, "--prefill-chunk", 500, "--save-cache", tmp_path / "a")
    command(*given, "--prompt-ids", ids, "--save-cache", tmp_path / "b")
    assert (tmp_path / "a").stat().st_size < (tmp_path / "b").stat().st_size / 3
    outs = [command(*given, "--load-cache", tmp_path / name, "--prompt", " The sky is") for name in "ab"]
    assert outs[0][0] == 0 and outs[0][1] == outs[1][1] and "3000 tokens" in outs[0][2]


def test_a_book_in_a_cache_of_fewer_bytes(command, tiny, tmp_path):
    ids = ",".join(map(str, passkey_prompt(tiny[1], 600).ids))
    given = "--method", "mesa", "--max-new-tokens", 8, "--cache-dtype", "int8"
    whole = command(*given, "--prompt-ids", ids, "--save-cache", tmp_path / "a")[1]
    code, out, _ = command(*given, "--load-cache", tmp_path / "a", "--prompt", " The sky is")
    assert code == 0 and out and "71432" in whole
    assert "with cache-dtype int8" in command(*given[:-2], "--load-cache", tmp_path / "a", "--prompt", "x")[2]


@pytest.mark.parametrize("args, words", [
    ((), "method mesa:first=64:last=32, but this run has method rope"),
    (("--method", "mesa:first=64:last=32", "--ckpt", "tiny-nope"), "with checkpoint"),
    (("--method", "mesa:first=64:last=32", "--dtype", "bfloat16"), "with dtype float32"),
    (("--load-cache", TINY / "model.safetensors"), "not a saved cache"),
    (("--load-cache", TINY / "config.json"), "not a whole safetensors file")])
def test_a_saved_cache_is_refused_where_anything_differs(args, words, command, tmp_path):
    file = tmp_path / "a.safetensors"
    prompt = "--prompt", "The sky is", "--max-new-tokens", 1
    command(*prompt, "--method", "mesa:first=64:last=32", "--save-cache", file)
    code, out, err = command(*prompt, "--load-cache", file, *args)
    assert code == 2 and not out and words in err and len(err.splitlines()) == 1
