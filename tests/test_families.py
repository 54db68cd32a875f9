"""The families that model.py knows beside LLaMA, as small random checkpoints on disk, against transformers.

What is compared goes beyond the training length and beyond the windows of local layers. Needs transformers.
"""
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]
pytest.importorskip("transformers", minversion="5")

import hf  # noqa: E402
import quantize  # noqa: E402
from config import Config  # noqa: E402
from generate import decode, generate, prefill, sample  # noqa: E402
from model import load_model  # noqa: E402
from positions import Method  # noqa: E402
from quantized import QuantizedLinear  # noqa: E402
from show import explain, warnings  # noqa: E402
from test_hf import L, T, close, logits_of, prompt, theirs_tokens, tiny_model  # noqa: E402

FREE = "nope"
LOCAL = "sliding:window=9"
SLIDING = dict(use_sliding_window=True, sliding_window=9, eos_token_id=None)
NATIVE = {  # a case: (family, settings of its config, what each of the four layers attends by)
    "llama": ("llama", {}, ()),
    "mistral": ("mistral", dict(sliding_window=9), (LOCAL,) * 4),
    "qwen2": ("qwen2", {}, ()),
    "qwen2 sliding": ("qwen2", dict(SLIDING, max_window_layers=2), ("", "", LOCAL, LOCAL)),
    "qwen2 layer_types": ("qwen2", dict(SLIDING, layer_types=["sliding_attention", "full_attention"] * 2),
                          (LOCAL, "", LOCAL, "")),
    "qwen3": ("qwen3", dict(use_sliding_window=False), ()),
    "qwen3 sliding, biases": ("qwen3", dict(SLIDING, max_window_layers=1, attention_bias=True), ("",) + (LOCAL,) * 3),
    "qwen3 yarn": ("qwen3", dict(rope_parameters=dict(rope_type="yarn", factor=4.0, rope_theta=1e4,
                                                      original_max_position_embeddings=L)), ()),
    "smollm3": ("smollm3", {}, ("", "", "", FREE)),
    "smollm3 sliding": ("smollm3", dict(SLIDING, no_rope_layers=[1, 0, 1, 0], tie_word_embeddings=False),
                        ("", f"{LOCAL}:freq=nope") * 2),
}


@pytest.fixture(params=NATIVE)
def models(request, tmp_path):
    """(the model in transformers, the same read by model.py from what transformers has written, its layers)"""
    family, settings, layers = NATIVE[request.param]
    theirs = uneven_model(family, **{"eos_token_id": None, **settings})
    return theirs, written(theirs, tmp_path), layers


def uneven_model(family, **settings):
    """A random model in transformers whose biases and norms are no zeros and ones."""
    theirs = tiny_model(family, **{"use_sliding_window": False, "sliding_window": None, **settings})
    with torch.no_grad():
        for weight in theirs.parameters():
            if weight.ndim == 1:
                weight.add_(0.3 * torch.randn(weight.shape))
    return theirs


def written(theirs, folder, **settings):
    theirs.save_pretrained(folder)
    return load_model(folder, Config.from_hf(folder), **settings)


def greedy(model, ids, method=None, count=64):
    """The likeliest tokens after a prompt, without an eos that ends them."""
    asked = Method.of(method)
    logits, cache = prefill(model, ids, asked)
    return [int(token) for token in decode(model, logits, cache, asked, ids.shape[1], sample, count)]


def test_logits_and_tokens_are_those_of_transformers(models):
    """Inside of the windows, and beyond; by rope with 64 tokens decoded; and by a method that governs other layers."""
    theirs, ours, layers = models
    assert ours.config.layer_methods == layers
    for ids in (prompt(8), prompt(T, rows=2)):
        with torch.no_grad():
            assert (ours(ids, ours.plan(n=ids.shape[1])) - logits_of(theirs, ids)).abs().max() < 1e-4
    for ids in (prompt(8), prompt(T)):
        assert greedy(ours, ids) == theirs_tokens(theirs, ids, 64)
    ids = prompt(T)
    plain = logits_of(theirs, ids)
    with torch.no_grad():
        mesa = ours(ids, ours.plan("mesa", n=T))
    if ours.config.is_governed:
        hf.extend(theirs, "mesa")
        assert (mesa - logits_of(theirs, ids)).abs().max() < 1e-4
        assert greedy(ours, ids, "mesa") == theirs_tokens(theirs, ids, 64)
    assert close(mesa, plain) != ours.config.is_governed


@torch.inference_mode()
def test_pieces_and_decoding_are_one_pass(models, cut):
    _, ours, _ = models
    ids = prompt(T)
    for method in (None, "mesa"):
        plan = ours.plan(method, n=60, i=torch.arange(T), j=torch.arange(T))
        whole = ours(ids, plan)
        for impl in ("dense", "tiled"):
            assert close(ours(ids, plan, impl=impl), whole)
        asked = Method.of(method)
        logits, cache = prefill(ours, ids[:, :60], asked, chunk=17)
        assert close(logits, whole[:, 59])
        for t in range(60, T):
            plan = ours.plan(method, n=60, i=torch.tensor([t]), j=cache.indices(new=1))
            assert close(ours(ids[:, t:t + 1], plan, cache)[:, 0], whole[:, t])


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_quantised_weights_keep_biases_and_norms(family, tmp_path):
    plain = written(uneven_model(family), tmp_path / "plain")
    assert quantize.run([str(tmp_path / "plain"), str(tmp_path / "int8")]) == 0
    ours = load_model(tmp_path / "int8", Config.from_hf(tmp_path / "int8"))
    assert isinstance(ours.model.layers[0].self_attn.q_proj, QuantizedLinear)
    names = {name for name in plain.state_dict() if name.endswith(("_norm.weight", "bias"))}
    assert len(names) == {"qwen2": 12, "qwen3": 8}[family]
    assert all(torch.equal(ours.state_dict()[name], plain.state_dict()[name]) for name in names)
    ids = prompt(T)
    with torch.no_grad():
        a, b = (model(ids, model.plan("mesa", n=T)) for model in (ours, plain))
    assert 1e-4 < (a - b).abs().max() / b.abs().max() < 0.1


def test_what_is_said_of_layers(tmp_path):
    def config(family, **settings):
        folder = tmp_path / f"{family}{len(list(tmp_path.iterdir()))}"
        tiny_model(family, **settings).config.save_pretrained(folder)
        return Config.from_hf(folder)
    mesa = Method("mesa")
    free = config("smollm3")
    assert "layers: 3 by the method, 1 by nope" in explain(free, mesa, T) and not warnings(free, mesa, T)
    local = config("mistral", sliding_window=9)
    assert "mesa changes nothing" in warnings(local, mesa, T)[0] and not warnings(local, Method(), T)


def test_eos_of_generation_config(tmp_path):
    """It goes before config.json's, as in transformers."""
    ours = written(tiny_model("llama"), tmp_path)
    ids = prompt(20)[0].tolist()
    answer = greedy(ours, prompt(20), count=8)
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": [2, answer[3]]}), encoding="utf-8")
    ours = load_model(tmp_path, Config.from_hf(tmp_path))
    assert ours.config.eos_token_id == (2, answer[3])
    assert list(generate(ours, ids, max_new_tokens=8)) == answer[:answer.index(answer[3]) + 1]
    file.write_text(json.dumps({"eos_token_id": 97}), encoding="utf-8")
    with pytest.raises(ValueError, match="generation_config.json: eos_token_id 97 is outside the vocabulary of 97"):
        Config.from_hf(tmp_path)
    file.write_text(json.dumps({"eos_token_id": None}), encoding="utf-8")
    assert Config.from_hf(tmp_path).eos_token_id == (2,)
