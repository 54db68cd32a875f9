"""memory.py: what is counted is what is taken, and what is not free is refused by name. That the sum is what a process
takes at its peak, a test of a process in test_generate.py says."""
from dataclasses import replace

import pytest
import torch

import generate as script
from cli import run_command
from config import Config
from generate import decode, prefill, sample
from memory import Memory, activation_bytes, estimate, refuse
from model import Llama
from positions import Method

SMALL = Config(vocab_size=16, hidden_size=64, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
               num_key_value_heads=2, head_dim=16, train_len=64)
GIB = 2 ** 30


@pytest.mark.parametrize("method", ["rope", "nope", "rerope", "self-extend", "nope:cosine=8.0", "streaming-llm"])
@pytest.mark.parametrize("cache_dtype", [None, "bfloat16", "int8"])
def test_the_cache_is_what_prefill_and_decoding_fill(method, cache_dtype):
    """Keys, values and their rotated copies of a prompt of 140 tokens in pieces of 40 and of 10 more, in all layers."""
    config = replace(SMALL, cache_dtype=cache_dtype)
    model, method = Llama(config), Method.parse(method)
    memory = estimate(config, method, [140], 10, torch.float32, chunk=40)
    logits, cache = prefill(model, torch.ones(1, 140, dtype=torch.long), method, chunk=40)
    list(decode(model, logits, cache, method, 140, sample, 11))
    T = len(cache) - cache.forgotten
    copies = [copy for layer in cache.copies for copy in layer if len(copy.positions) == T]
    held = sum(x[:, :, :T].nbytes for x in (*cache.k, *cache.v))
    rotated = sum(copy.keys[:, :, :T].nbytes for copy in copies)
    if method.name == "streaming-llm":  # which has held more, while it read the prompt
        room = sum(x.nbytes for x in (*cache.k, *cache.v))
        assert held <= memory.cache <= room and rotated <= memory.rotated
    else:
        assert (memory.cache, memory.rotated) == (held, rotated)


def test_rows_of_a_batch_each_have_a_cache():
    """The two longest of three prompts run at once."""
    both = estimate(SMALL, Method("mesa"), [30, 500, 200], 10, torch.float32, rows=2)
    alone = [estimate(SMALL, Method("mesa"), [n], 10, torch.float32) for n in (200, 500)]
    assert both.cache == sum(memory.cache for memory in alone) and both.activations == alone[1].activations


def test_activations_follow_the_piece():
    """Twice the tokens take about twice the room, half the bytes a number less, and a plan its own."""
    def bytes_of(T, dtype=torch.float32):
        return activation_bytes(SMALL, SMALL.plan("rope", n=T), dtype, None)
    assert 1.8 < bytes_of(4000) / bytes_of(2000) < 2.2
    assert bytes_of(2000, torch.bfloat16) < bytes_of(2000)


@pytest.mark.parametrize("memory, words, others", [
    (Memory(0, 13 * GIB, GIB, 0, GIB, GIB), ["--quantize int8 or int4"], ["--cache-dtype", "--prefill-chunk"]),
    (Memory(0, GIB, 9 * GIB, 0, GIB, GIB), ["--cache-dtype int8", "--rows below 8", "a shorter"], ["--quantize"]),
    (Memory(0, GIB, GIB, 0, 9 * GIB, GIB), ["--prefill-chunk below 8192"], ["--quantize", "--cache-dtype"])])
def test_what_would_lower_it_is_named(memory, words, others):
    refuse(memory, memory.needed, SMALL, None, 8192, rows=8)
    with pytest.raises(ValueError) as refusal:
        refuse(memory, memory.needed - 1, SMALL, None, 8192, rows=8)
    text = str(refusal.value)
    assert all(word in text for word in [*words, "--force"]) and not any(word in text for word in others)


@pytest.mark.parametrize("many", [False, True])
def test_a_run_that_would_not_fit_is_refused_before_anything_is_loaded(many, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(script, "free_memory", lambda device: 2 ** 20)
    (tmp_path / "in").write_text('{"prompt": "The grass is green."}\n')
    batch = ["--prompts", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    args = ["--max-new-tokens", "3", *(batch if many else ["--prompt", "The grass is green."])]
    with pytest.raises(SystemExit) as end, monkeypatch.context() as patch:
        patch.setattr(script, "open_model", None)
        run_command(lambda: script.run(args), "generate.py")
    out, err = capsys.readouterr()
    assert end.value.code == 2 and not out and "1.0 MiB are free" in err and "--quantize int8 or int4" in err
    assert script.run([*args, "--force"]) == 0
