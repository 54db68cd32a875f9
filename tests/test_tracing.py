"""tracing.py: weights against the oracle, logits against the model, the needle, a trace as text; show.py --trace."""
import re
import sys

import pytest
import torch

import show
from cli import run_command
from config import Config
from model import Llama, load
from oracle import oracle
from positions import Method
from tracing import Case, Trace, bars, binned, find, needle_line, passkey_case, text_case, trace, trace_text

CONFIG = Config(vocab_size=16, hidden_size=64, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, head_dim=16, train_len=6)
IDS = torch.randint(3, 16, (16,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Llama(CONFIG).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tiny():
    return load("tiny")


@pytest.fixture
def command(capsys):
    """command("mesa", "--trace", "a text") -> (exit code, stdout, stderr) of show.py, in this process."""
    def call(*args):
        with pytest.raises(SystemExit) as end:
            run_command(lambda: show.run([str(arg) for arg in args]), "show.py")
        out, err = capsys.readouterr()
        return end.value.code, out, err
    return call


# ---- the model

@pytest.mark.parametrize("method", ["rope", "rerope:window=2", "streaming-llm:sinks=1:recent=3", "self-extend",
                                    "mesa:first=2:chunk=4:width=3", "alibi", "nope:cosine=8.0"])
def test_weights_and_logits(model, method):
    """Of one pass over all 16 tokens: the logits the model's, the weights of its first layer the oracle's, which gives
    them as its output where the values are the rows of the unit matrix."""
    method = Method.parse(method)
    plan = method.plan(CONFIG, 16)
    traced = trace(model, Case(IDS, 16), method, chunk=5)
    assert torch.allclose(traced.logits, model(torch.tensor([IDS]), plan)[0, -1], atol=1e-4)

    first = model.model.layers[0]
    x = first.input_layernorm(model.model.embed_tokens(torch.tensor([IDS])))
    q, k = (first.self_attn.heads(project(x)) for project in (first.self_attn.q_proj, first.self_attn.k_proj))
    weights = oracle(q, k, torch.eye(16).expand(1, 2, 16, 16), plan)[0, :, -1]
    assert (traced.weights[0] - weights).abs().max() < 1e-5
    assert torch.equal(traced.visible, weights.sum(0) > 0)
    assert traced.weights.shape == (2, 4, 16) and torch.allclose(traced.weights.sum(-1), torch.ones(2, 4))


def test_tokens_after_the_prompt_count_as_decoded(model):
    """The last of 16 tokens, 9 of them the prompt, stands where Mesa for a prompt of 9 puts it."""
    method = Method.of("mesa", first=2, chunk=4, width=3)
    plan = method.plan(CONFIG, 9, torch.arange(16), torch.arange(16))
    traced = trace(model, Case(IDS, 9), method)
    assert torch.allclose(traced.logits, model(torch.tensor([IDS]), plan)[0, -1], atol=1e-4)
    assert not torch.allclose(traced.logits, trace(model, Case(IDS, 16), method).logits, atol=1e-3)


@pytest.mark.parametrize("ids", [[], [1, 16]])
def test_ids_that_the_model_does_not_have(model, ids):
    with pytest.raises(ValueError, match="empty|vocabulary of 16"):
        trace(model, Case(ids, len(ids)), Method("rope"))


# ---- the best head, and the needle

WEIGHTS = torch.tensor([[[0.9, 0.0, 0.1, 0.0], [0.2, 0.5, 0.0, 0.3], [0.1, 0.3, 0.4, 0.2]]])  # one layer, three heads


@pytest.mark.parametrize("span, head", [((0, 0), 0), ((1, 1), 1), ((1, 2), 2), ((2, 3), 2), (None, 1)])
def test_the_best_head_sees_most_of_the_needle_or_is_the_sharpest(span, head):
    traced = Trace(WEIGHTS, torch.ones(4, dtype=torch.bool), torch.zeros(3), Case([5, 6, 7, 8], 4, span))
    assert traced.heads().tolist() == [head]
    assert torch.equal(traced.best(), WEIGHTS[:, head])
    assert torch.allclose(traced.mean(), torch.tensor([[0.4, 0.8 / 3, 0.5 / 3, 0.5 / 3]]))


def test_a_passkey_is_traced_at_the_token_before_its_first_digit(tiny):
    """The tokenizer writes " 71432" as a space and five digits: the space looks for the 7."""
    _, tokenizer = tiny
    case = passkey_case(tokenizer, 300)
    assert len(case.ids) == 301 and case.n == 300 and tokenizer.decode([case.right]) == "7"
    assert tokenizer.decode([*case.ids, case.right]).endswith("The pass key is 7")
    first, last = case.span
    assert tokenizer.decode(case.ids[first:last + 1]).startswith("The pass key is 71432.")


def test_find_the_last_place_of_a_needle(tiny):
    _, tokenizer = tiny
    case = text_case(tokenizer, "The key is 38. The grass is green. The key is 38. Go.", "key is 38")
    first, last = case.span
    assert tokenizer.decode(case.ids[first:last + 1]) == "key is 38"
    assert "grass" not in tokenizer.decode(case.ids[first:])
    for needle in ("key is 39", " "):
        with pytest.raises(ValueError, match="not in the prompt"):
            find(tokenizer, case.ids, needle)


def test_rope_fails_and_rerope_finds_the_digit(tiny):
    """What the README says of its figure: at 4 windows one head of layer 3 reads the 7, with plain RoPE none does, and
    StreamingLLM does not see it."""
    model, tokenizer = tiny
    case = passkey_case(tokenizer, 1024)
    digit = case.ids.index(case.right, case.span[0])
    traces = {name: trace(model, case, Method(name)) for name in ("rope", "rerope", "streaming-llm", "mesa")}
    ranks = {name: int((traced.logits > traced.logits[case.right]).sum()) for name, traced in traces.items()}
    assert ranks["rerope"] == ranks["mesa"] == 0 and ranks["rope"] > 0
    shares = {name: float(traced.best()[2, digit]) for name, traced in traces.items()}
    assert shares["rerope"] > 0.9 and shares["mesa"] > 0.9 and shares["rope"] < 0.1 and shares["streaming-llm"] == 0
    rope_needle = traces["rope"].best()[2, case.span[0]:case.span[1] + 1].sum()
    assert rope_needle > 0.9 and not traces["streaming-llm"].visible[digit]


# ---- as text

def test_text():
    assert binned(torch.tensor([1, 2, 3, 4, 5]), 2).tolist() == [6, 9]
    assert bars(torch.tensor([0.0, 0.25, 1.0, 0.0]), torch.tensor([True, True, True, False])) == "▁▅█ "
    assert needle_line((4, 7), 16, 8) == "  vv needle"


def test_a_trace_as_text(command):
    """A line for the mean and one for the best head of each of the five layers, and the key that one of them reads."""
    code, out, err = command("rope", "--trace", "--length", 200)
    lines = out.splitlines()
    assert code == 0 and not err and len(lines) == 3 + 2 * 5 + 1
    assert lines[0].startswith("rope: a passkey prompt of 200 tokens, 0.781 times the window of 256")
    assert lines[2].strip() == "vvvvvvvvv needle" and re.search(r"head 4 .* '7' 1\.00, ", lines[8])
    assert lines[-1].startswith("right digit 7: logit 1") and "rank 1 of 1024" in lines[-1]


def test_a_text_of_ones_own(command, tmp_path, tiny):
    """From the command line and from a file, by two methods, and as the checkpoint's config.json says."""
    text = "The grass is green. The sky is blue. The grass is"
    code, out, _ = command("rerope,mesa:first=4", "--trace", text, "--needle", "grass is green")
    assert code == 0 and out.count("needle") == 2 and "mesa:first=4: a prompt of" in out and "next: '" in out
    (tmp_path / "x.txt").write_text(text, encoding="utf-8")
    code, out, _ = command("--prompt-file", tmp_path / "x.txt")
    assert code == 0 and out.startswith("rope: a prompt of") and "needle" not in out
    model, tokenizer = tiny
    assert trace_text(trace(model, text_case(tokenizer, text), Method()), tokenizer) in out


def test_a_picture(monkeypatch):
    pytest.importorskip("matplotlib")
    saved = []
    monkeypatch.setattr(show, "save", lambda figure, path: saved.append(figure))
    assert show.run(["rope,streaming-llm", "--trace", "--length", "300", "--plot", "x.png"]) == 0
    rope_best, rope_mean, streaming_best, _, _ = saved[0].axes
    assert rope_best.get_title(loc="left").startswith("rope: right digit 7") and "300" in saved[0].get_suptitle()
    assert rope_best.images[0].get_array().shape == rope_mean.images[0].get_array().shape == (5, 256)
    assert not rope_best.images[0].get_array().mask.any()
    assert streaming_best.images[0].get_array().mask[:, 10:20].all()  # the unseen middle
    assert [line.get_xdata()[0] for line in rope_best.lines] == [92, 117]  # 25 tokens


@pytest.mark.parametrize("args, words", [
    (["meza", "--trace"], "did you mean mesa?"), (["rope", "--trace", " "], "empty"),
    (["rope", "--trace", "a", "--needle", "c"], "is not in"), (["rope", "--trace", "--needle", "7"], "--needle"),
    (["rope", "--trace", "--length", "5"], "at least"), (["rope", "--trace", "a", "--length", "9"], "--length"),
    (["rope", "--trace", "a", "--prompt-file", "x"], "not both"), (["rope", "--prompt-file", "none.txt"], "none.txt"),
    (["rope", "--trace", "--ckpt", "none"], "none"), (["rope", "--trace", "--plot", "x.png"], "install matplotlib")])
def test_mistakes_are_one_clear_line(args, words, command, monkeypatch, tmp_path):
    """On a machine without matplotlib."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, err = command(*args)
    assert code == 2 and not out and words in err and len(err.splitlines()) == 1
