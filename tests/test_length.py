"""What follows the length: automatic parameters that cover what is decoded, and frequencies that change at L."""
from dataclasses import replace

import pytest
import torch

from cache import KVCache
from config import Config
from frequencies import followed_length
from generate import generate, prefill
from model import Llama
from positions import Method

SMALL = Config(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
               num_key_value_heads=1, head_dim=8, max_position_embeddings=32, train_len=32, eos_token_id=())
FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 1.5, 2.5, 4.0], "factor": 4.0}


def model_of(config):
    torch.manual_seed(0)
    return Llama(config).eval()


@pytest.mark.parametrize("text, n, new, covered", [
    ("pi", 30, 2, {"factor": 1.0}), ("pi", 30, 3, {"factor": 2.0}), ("yarn", 64, 1, {"factor": 4.0}),
    ("pi:factor=8", 30, 3, {"factor": 8}), ("rope", 30, 9, {}), ("mesa:freq=ntk", 60, 9, {"factor": 4.0}),
    ("self-extend", 32, 0, {"group": 1}), ("self-extend:window=8", 32, 1, {"window": 8, "group": 2}),
    ("self-extend:group=5", 99, 9, {"group": 5}), ("leaky-rerope:window=8", 40, 16, {"window": 8, "k": 2.0}),
    ("dynamic-ntk", 30, 9, {}), ("llama3", 99, 9, {})])
def test_automatic_parameters_cover_what_is_decoded(text, n, new, covered):
    """As those of a prompt that is so long as prompt and new tokens together; what is set stays."""
    asked = Method.parse(text)
    method = asked.covering(SMALL, n, new)
    assert method == replace(asked, params=covered)
    alone, longer = method.plan(SMALL, n + new), asked.plan(SMALL, n + new)
    for one, other in zip(alone.regions, longer.regions, strict=True):
        assert torch.equal(one.q_pos, other.q_pos) and torch.equal(one.k_pos, other.k_pos)
    assert torch.equal(alone.inv_freq, longer.inv_freq)


def test_what_a_checkpoint_was_trained_with_is_not_covered():
    yarn = replace(SMALL, freq="yarn", freq_params={"factor": 4.0, "original_max_position_embeddings": 32})
    assert Method("mesa").covering(yarn, 100, 300).params == {}
    assert Method("pi").covering(yarn, 100, 300).params == {"factor": 16.0}


def test_generate_covers_what_it_writes():
    """Pi's factor is 2 from the first token on."""
    model = model_of(SMALL)
    ids = list(range(1, 30))
    assert list(generate(model, ids, "pi", max_new_tokens=9)) == list(
        generate(model, ids, "pi", factor=2, max_new_tokens=9))


@pytest.mark.parametrize("rule, n, last, length", [
    ("longrope", 30, 31, 30), ("longrope", 30, 32, 33), ("longrope", 32, 31, 32), ("dynamic-ntk", 30, 40, 41),
    ("dynamic-ntk", 33, 40, 33), ("pi", 30, 40, 30), (None, 30, 40, 30)])
def test_which_length_frequencies_follow(rule, n, last, length):
    assert followed_length(rule, n, 32, last) == length


@pytest.mark.parametrize("freq, params", [("longrope", FACTORS), ("dynamic-ntk", {"factor": 2.0}), ("dynamic-yarn", {}),
                                          ("yarn", {"factor": 2.0, "original_max_position_embeddings": 32})])
def test_decoding_across_L_is_a_fresh_prefill(freq, params):
    """In a model of one layer, whose keys are cached un-rotated, and are turned anew. Deeper layers of others keep
    the keys that came of the frequencies before L, so that two layers differ, but for yarn, which does not change."""
    for layers in (1, 2):
        config = replace(SMALL, num_hidden_layers=layers, freq=freq, freq_params=params)
        model = model_of(config)
        tokens = torch.randint(64, (1, 36), generator=torch.Generator().manual_seed(1))
        with torch.inference_mode():
            _, cache = prefill(model, tokens[:, :29], Method(), room=8)
            for end in range(30, 37):       # token by token, over L = 32
                plan = model.plan(n=29, i=torch.tensor([end - 1]), j=cache.indices(new=1))
                logits = model(tokens[:, end - 1:end], plan, cache)[:, -1]
                fresh, _ = prefill(model, tokens[:, :end], Method(), cache=KVCache(config))
                is_same = torch.allclose(logits, fresh, atol=1e-5)
                assert is_same or (layers == 2 and end > 32 and freq != "yarn"), end
        assert is_same == (layers == 1 or freq == "yarn")
        assert all(len(copies) == 1 for copies in cache.copies)     # none of the copies before is held


def test_decode_crosses_L_in_generate():
    """The tokens of a model of one layer are those of prompts that grow by one token each."""
    config = replace(SMALL, num_hidden_layers=1, freq="longrope", freq_params=FACTORS)
    model = model_of(config)
    ids = list(range(1, 30))
    written = list(generate(model, ids, max_new_tokens=8))
    for token in written:
        assert next(generate(model, ids, max_new_tokens=1)) == token
        ids.append(token)
