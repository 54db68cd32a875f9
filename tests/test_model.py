"""The network, its cache and its plans: against transformers, against a LLaMA written down in float64, and in pieces.

What transformers computes is recorded in golden.json by make_golden.py, and computed anew where it is installed. The
recorded checkpoints are random: the weight of a tensor is a formula of its name.
"""
import json

import pytest
import torch
from make_golden import (GOLDEN, GREEDY, HF_CONFIGS, KEPT, KEPT_OF_STORY, LONGROPE, PROMPT, SIZES, STORY, TOKENS, YARN,
                         hf_model, weight)
from oracle import oracle

from batch import next_plan
from cache import KVCache, pack, unpack
from frequencies import FREQUENCIES
from geometry import METHODS
from config import Config
from generate import prefill
from model import Llama, by_rows, load, load_model
from plan import Plan, Region
from positions import Method

GOLDEN = json.loads(GOLDEN.read_text(encoding="utf-8"))


def random_model(**changes):
    """A Llama of SIZES, its weights a formula of their names; large enough that attention matters."""
    return with_weights(Config(**{**SIZES, "train_len": 32, **changes}))


def with_weights(config):
    model = Llama(config).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        p.copy_(weight(name, p.shape))
    return model


def read_config(folder, train_len=None, **fields):
    """The Config that is read from a config.json of these fields."""
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **SIZES, **fields}), encoding="utf-8")
    return Config.from_hf(folder, train_len)


def error(got, want):
    """The largest difference as a part of the largest value."""
    return float((got - want).abs().max() / want.abs().max())


def reference(model, tokens, attention):
    """Logits of a LLaMA (no tied head) as its paper has it, in float64, and of its relatives with biases of q, k and v
    and with norms of q and k; attention(layer, q, k, v)."""
    c, w = model.config, {name: p.double() for name, p in model.named_parameters()}

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + c.rms_norm_eps).sqrt() * w[name]

    def heads(x, name):
        x = x @ w[f"{name}_proj.weight"].T + w.get(f"{name}_proj.bias", 0)
        x = x.unflatten(-1, (-1, c.head_dim)).transpose(1, 2)
        return norm(x, f"{name}_norm.weight") if f"{name}_norm.weight" in w else x

    x = w["model.embed_tokens.weight"][tokens]
    for layer in range(c.num_hidden_layers):
        at = f"model.layers.{layer}."
        h = norm(x, at + "input_layernorm.weight")
        q, k, v = (heads(h, f"{at}self_attn.{name}") for name in "qkv")
        out = attention(layer, q, k, v).transpose(1, 2).flatten(2)
        x = x + out @ w[at + "self_attn.o_proj.weight"].T
        h = norm(x, at + "post_attention_layernorm.weight")
        gate = torch.nn.functional.silu(h @ w[at + "mlp.gate_proj.weight"].T)
        x = x + (gate * (h @ w[at + "mlp.up_proj.weight"].T)) @ w[at + "mlp.down_proj.weight"].T
    return norm(x, "model.norm.weight") @ w["lm_head.weight"].T


def by_oracle(*plans):
    """attention(layer, q, k, v) of one plan for all layers, or of one each."""
    def attention(layer, q, k, v):
        return oracle(q, k, v, plans[layer % len(plans)])
    return attention


def in_pieces(model, tokens, ranges, plan):
    """Logits of all tokens, read in pieces through a cache by the plans (or lists of plans) of plan(first, last)."""
    cache = KVCache(model.config, size=16)
    return torch.cat([model(tokens[:, a:b], plan(a, b), cache) for a, b in ranges], 1)


def plan_maker(model, method, n, **params):
    """plan(first, last) of a method for queries first..last-1 of a prompt of n tokens and what follows it."""
    if method == "longrope":
        factors = [2.0 + p for p in range(model.config.head_dim // 2)]
        params = {**params, "short_factor": factors, "long_factor": factors, "factor": 4.0}

    def plan(first, last):
        return model.plan(method, n=n, i=torch.arange(first, last), j=torch.arange(last), **params)
    return plan


# ---------------------------------------------------------------------------------------------------------------------
# what transformers computes

def older_spelling(config, type_key):
    """A config with rope_theta beside rope_scaling, as older files have it, for rope_parameters."""
    rope = dict(config["rope_parameters"])
    kind = rope.pop("rope_type")
    older = {name: value for name, value in config.items() if name != "rope_parameters"}
    older["rope_theta"] = rope.pop("rope_theta")
    older["rope_scaling"] = None if kind == "default" else {type_key: kind, **rope}
    return older


@pytest.mark.parametrize("name", HF_CONFIGS)
def test_random_checkpoints(name, tmp_path):
    """Their config.json as transformers wrote it, and as older files are spelled: the logits it recorded."""
    config = GOLDEN[name]["config"]
    for spelled in (config, older_spelling(config, "rope_type"), older_spelling(config, "type")):
        (tmp_path / "config.json").write_text(json.dumps(spelled), encoding="utf-8")
        model = with_weights(Config.from_hf(tmp_path))
        logits = model(TOKENS, model.plan(n=50))[0]
        assert error(logits[KEPT[0]][:, KEPT[1]], torch.tensor(GOLDEN[name]["logits"])) < 1e-5


@pytest.mark.parametrize("name", HF_CONFIGS)
def test_random_checkpoints_of_the_transformers_installed(name, tmp_path):
    """Written by it, read by us: all logits of two rows; and what is recorded is what it computes."""
    pytest.importorskip("transformers")
    theirs = hf_model(HF_CONFIGS[name])
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path, Config.from_hf(tmp_path))
    tokens = torch.cat([TOKENS, TOKENS.flip(1)])
    want = theirs(tokens).logits
    assert error(ours(tokens, ours.plan(n=50)), want) < 1e-5
    assert error(want[0][KEPT[0]][:, KEPT[1]], torch.tensor(GOLDEN[name]["logits"])) < 1e-5


@pytest.fixture(scope="module")
def tiny():
    return load("tiny")


def greedy(model, ids, count):
    """The obvious loop: prefill, then one token at a time."""
    cache, n = KVCache(model.config), len(ids)
    tokens = torch.tensor([ids])
    story = []
    for _ in range(count):
        first, last = len(cache), len(cache) + tokens.shape[1]
        logits = model(tokens, plan_maker(model, None, n)(first, last), cache, last_only=True)
        tokens = logits[:, -1].argmax(-1, keepdim=True)
        story.append(int(tokens))
    return story


@torch.inference_mode()
def test_the_shipped_model_is_what_transformers_makes_of_it(tiny):
    """Inside its window of 256 tokens and beyond, where plain RoPE has to be the same wrong answer."""
    model, tokenizer = tiny
    ids = tokenizer.encode(STORY)[:400]
    logits = model(torch.tensor([ids]), model.plan(n=400))[0]
    assert error(logits[KEPT_OF_STORY], torch.tensor(GOLDEN["checkpoints/tiny"]["logits"])) < 1e-5
    story = greedy(model, tokenizer.encode(PROMPT), GREEDY)
    assert story == GOLDEN["checkpoints/tiny"]["greedy"]
    assert tokenizer.decode(story).startswith("41827.")


@pytest.mark.parametrize("name", ["stories260K", "tok105"])
@torch.inference_mode()
def test_other_trained_models_against_transformers(name, asset):
    """1500 tokens, past their windows of 512 and 256; then 64 greedy ids, of which each is also its choice."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(asset(name), dtype=torch.float32).eval()
    model, tokenizer = load(asset(name))
    text = (asset("texts") / "tinystories_valid_30k.txt").read_text(encoding="utf-8")
    ids = torch.tensor([[i % model.config.vocab_size for i in tokenizer.encode(text)[:1500]]])
    got, want = model(ids, model.plan(n=1500)), theirs(ids).logits
    assert float((got - want)[:, :200].abs().max()) < 1e-4 and float((got - want).abs().max()) < 1e-3
    ids = tokenizer.encode("Once upon a time")
    story = greedy(model, ids, 64)
    assert story == theirs(torch.tensor([ids + story])).logits[0].argmax(-1)[len(ids) - 1:-1].tolist()
    assert "there was a little" in tokenizer.decode(ids + story)


# ---------------------------------------------------------------------------------------------------------------------
# every method, in one pass, in pieces and decoding

@pytest.mark.parametrize("method", METHODS)
def test_logits_are_those_of_a_llama_in_float64(method):
    """By every executor; with last_only, where the last layer computes one query, those of the last token."""
    model = random_model()
    plan = plan_maker(model, method, 50)(0, 50)
    want = reference(model, TOKENS, by_oracle(plan))
    for impl in ("auto", "dense", "tiled"):
        assert error(model(TOKENS, plan, impl=impl), want) < 1e-5
        assert error(model(TOKENS, plan, last_only=True, impl=impl), want[:, -1:]) < 1e-5


CUTS = [*((method, {}) for method in METHODS), ("mesa", {"overlap": 20}), ("lampe", {"freq": "alibi", "cosine": 8.0}),
        ("mesa", {"cosine": 8.0}), ("self-extend", {"freq": "yarn", "attn_scale": "infoscale"})]


@pytest.mark.parametrize("method, params", CUTS, ids=str)
@torch.inference_mode()
def test_pieces_and_decoding_equal_one_pass(method, params, tiny, cut):
    """The shipped model, window 256: a prompt of 300 in uneven pieces, then tokens one by one; where much depends on
    the length of the prompt, 60 of them."""
    model, tokenizer = tiny
    total = 360 if method in ("mesa", "lampe") else 312
    tokens = torch.tensor([tokenizer.encode(STORY)[:total]])
    plan = plan_maker(model, method, 300, **params)
    decoded = [(t, t + 1) for t in range(300, total)]
    assert error(in_pieces(model, tokens, [*cut(300), *decoded], plan), model(tokens, plan(0, total))) < 1e-5


@pytest.mark.parametrize("method", ["rope", "alibi", "streaming-llm", "mesa"])
@torch.inference_mode()
def test_batches_biases_and_last_only_in_pieces(method, cut):
    """A model with biases and a tied head, whose single rows take a path of their own; one row of tokens, and two."""
    model = random_model(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    tokens = torch.cat([TOKENS, TOKENS.flip(1)], 1)
    plan = plan_maker(model, method, 90)
    for rows in (tokens, torch.cat([tokens, tokens.roll(1)])):
        want = model(rows, plan(0, 100))
        assert error(in_pieces(model, rows, cut(100), plan), want) < 1e-5
        cache = KVCache(model.config)
        for a, b in cut(100):
            assert error(model(rows[:, a:b], plan(a, b), cache, last_only=True), want[:, b - 1:b]) < 1e-5


def test_by_rows_is_the_whole():
    x = torch.randn(2, 10, 4)

    def running_sum(part):
        return part.cumsum(-1)
    assert torch.equal(by_rows(running_sum, x, rows=3), running_sum(x))


# ---------------------------------------------------------------------------------------------------------------------
# a plan for each layer

def mixed_plans(model, n):
    """plans(first, last): full rotary by Mesa; a sliding window of 12; no positions; Self-Extend."""
    def plans(first, last):
        i, j = torch.arange(first, last), torch.arange(last)
        window = Plan([Region(i, j, (i - 11).clamp(min=0), i + 1)], inv_freq=FREQUENCIES["rope"](8, 100.0, n, 32)[0])
        return [model.plan("mesa", n=n, i=i, j=j), window, model.plan("nope", n=n, i=i, j=j),
                model.plan("self-extend", n=n, i=i, j=j, attn_scale="logn")]
    return plans


@torch.inference_mode()
def test_a_plan_for_each_layer(cut):
    """In one pass, by every executor, and in pieces; the order of the layers makes a difference."""
    model = random_model(num_hidden_layers=4)
    plans = mixed_plans(model, 40)
    want = reference(model, TOKENS, by_oracle(*plans(0, 50)))
    for impl in ("auto", "dense"):
        assert error(model(TOKENS, plans(0, 50), impl=impl), want) < 1e-5
    assert error(model(TOKENS, plans(0, 50), last_only=True), want[:, -1:]) < 1e-5
    assert error(in_pieces(model, TOKENS, cut(50), plans), want) < 1e-5
    assert error(model(TOKENS, plans(0, 50)[::-1]), want) > 0.1
    with pytest.raises(ValueError, match="3 plans for 4 layers"):
        model(TOKENS, plans(0, 50)[:3])


# ---------------------------------------------------------------------------------------------------------------------
# other kinds of models

KINDS = [{"rotary_dim": 4}, {"interleaved": True}, {"rotary_dim": 4, "interleaved": True, "cosine_attention": 8.0},
         {"freq": "alibi"}, {"freq": "nope"}]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@torch.inference_mode()
def test_other_kinds_of_models(kind, cut):
    """Every geometry against the oracle and in pieces; and what kind of model it is makes a difference."""
    model, plain = random_model(**kind), random_model()
    for method in (None, "rerope", "self-extend", "dca", "streaming-llm", "lampe", "mesa"):
        plan = plan_maker(model, method, 40)
        want = reference(model, TOKENS, by_oracle(plan(0, 50)))
        assert error(model(TOKENS, plan(0, 50)), want) < 1e-5, method
        assert error(in_pieces(model, TOKENS, cut(50), plan), want) < 1e-5, method
        assert error(model(TOKENS, plan_maker(plain, method, 40)(0, 50)), want) > 1e-3, method


@torch.inference_mode()
def test_biases_norms_and_layers_of_other_families(cut):
    """The method governs the first layer alone; the second has a window, and no positions."""
    model = random_model(qkv_bias=True, qk_norm=True, layer_methods=("", "sliding:window=12:freq=nope"))
    plan = plan_maker(model, "mesa", 40)
    mesa, local = plan(0, 50)
    assert len(mesa.regions) == 3 and local.inv_freq is None and int(local.regions[0].start[49]) == 38
    want = reference(model, TOKENS, by_oracle(mesa, local))
    for impl in ("auto", "dense", "tiled"):
        assert error(model(TOKENS, plan(0, 50), impl=impl), want) < 1e-5
    assert error(in_pieces(model, TOKENS, cut(50), plan), want) < 1e-5
    for part in ("q_proj.bias", "k_proj.bias", "v_proj.bias", "q_norm.weight", "k_norm.weight"):
        parameter = model.get_parameter(f"model.layers.1.self_attn.{part}")
        parameter[::3] += 1  # each makes a difference
        assert error(model(TOKENS, plan(0, 50)), want) > 1e-3, part
        parameter[::3] -= 1
    with pytest.raises(ValueError, match="not of 2 layers"):
        random_model(layer_methods=("",))


# ---------------------------------------------------------------------------------------------------------------------
# the cache

STEPS = [  # method, its parameters, and how many tokens the cache is first cut back to
    ("mesa", {}, 42), ("mesa", {}, 43), ("rerope", {}, 44), ("mesa", {}, 45), ("yarn", {"factor": 2}, 46),
    ("mesa", {"cosine": 4.0}, 47), ("rerope", {"cosine": 4.0}, 48), ("nope", {"cosine": 4.0}, 49), ("mesa", {}, 43),
    ("mesa", {}, 44), ("mesa", {}, 45), ("mesa", {}, 46), ("self-extend", {}, 45), ("rerope", {}, 46),
    ("alibi", {}, 47), ("mesa", {"cosine": 4.0}, 48), ("rerope", {}, 46), ("rerope", {}, 46)]


@torch.inference_mode()
def test_decoding_may_change_its_method_and_be_cut_back():
    """Copies of rotated keys serve only the tokens, the positions and the rule that they were made for."""
    model = random_model()
    cache = KVCache(model.config)
    model(TOKENS[:, :42], plan_maker(model, "mesa", 50)(0, 42), cache)
    for token, (method, params, t) in enumerate(STEPS):
        cache.cut(t)
        fresh = KVCache(model.config)
        for layer in range(len(cache.k)):
            fresh.append(layer, cache.k[layer][:, :, :t], cache.v[layer][:, :, :t])
        plan = plan_maker(model, method, 50, **params)(t, t + 1)
        got, want = (model(torch.tensor([[token]]), plan, c) for c in (cache, fresh))
        assert error(got, want) < 1e-5, (method, t)


FORGETFUL = ["streaming-llm", "streaming-llm:sinks=2:recent=20:freq=yarn", "lm-infinite", "sliding:window=30",
             "chunked:chunk=32", "sliding:window=5:freq=alibi:attn-scale=logn"]


@pytest.mark.parametrize("method", FORGETFUL)
@torch.inference_mode()
def test_a_cache_that_forgets_gives_the_logits_of_one_that_does_not(method):
    """A prompt in pieces of 50, and 150 tokens decoded; what it holds is what is seen and a piece, doubled at most."""
    model = random_model()
    method = Method.parse(method)
    tokens = TOKENS.repeat(1, 8)[:, :400]
    want = model(tokens, plan_maker(model, method, 250)(0, 400))
    logits, cache = prefill(model, tokens[:, :250], method, room=8, chunk=50)
    got = [logits]
    for t in range(250, 400):
        got.append(model(tokens[:, t:t + 1], next_plan(model, method, 250, cache), cache)[:, 0])
    assert error(torch.stack(got, 1), want[:, 249:]) < 1e-5
    assert len(cache) == 400 and cache.k[0].shape[2] <= 130
    with pytest.raises(ValueError, match="query 400 sees a key that the cache has forgotten"):
        model.plan("rope", n=250, i=torch.tensor([400]), j=cache.indices(new=1))


@pytest.mark.parametrize("cache_dtype, bound", [("bfloat16", 0.03), ("int8", 0.05)])
@torch.inference_mode()
def test_a_cache_of_fewer_bytes(cache_dtype, bound, cut):
    """Near the logits of a whole one, and the same whatever the pieces; it grows and forgets as any other."""
    model, plain = random_model(cache_dtype=cache_dtype), random_model()
    for method in ("mesa", "streaming-llm:recent=20"):
        plan = plan_maker(model, method, 40)
        want = model(TOKENS, plan(0, 50))
        got = in_pieces(model, TOKENS, [(0, 50)], plan)
        assert 0 < error(got, want) < bound
        assert error(in_pieces(model, TOKENS, cut(50), plan), got) < 1e-5
        logits, cache = prefill(model, TOKENS, Method.parse(method), chunk=13)
        whole, other = prefill(plain, TOKENS, Method.parse(method), chunk=13)
        assert 0 < error(logits, whole) < bound and len(cache.kept) == len(other.kept)
        assert cache.k[0].nbytes <= other.k[0].nbytes * (0.5 if cache_dtype == "bfloat16" else 12 / 32)


def test_int8_rows_of_a_cache():
    """A scale for every token and head, and nothing lost but rounding; zeros stay zeros."""
    x = torch.randn(2, 3, 5, 8) * torch.tensor([1e-3, 1.0, 1e4])[:, None, None]
    x[0, 0, 0] = 0
    rows = pack(x, torch.int8)
    assert rows.dtype == torch.int8 and rows.shape == (2, 3, 5, 12)
    assert ((unpack(rows, torch.float32) - x).abs() <= x.abs().amax(-1, keepdim=True) / 253).all()
    assert pack(x, None) is x and unpack(x, torch.float32) is x
    with pytest.raises(ValueError, match="int9.*int8"):
        KVCache(Config(**{**SIZES, "cache_dtype": "int9"}))


@torch.inference_mode()
def test_a_cache_that_has_forgotten_is_cut_back_where_it_can_be():
    """To where it last forgot, as nothing before has been seen by what comes then; else to nothing."""
    model = random_model()
    method = Method.parse("streaming-llm:recent=20")
    want = model(TOKENS, plan_maker(model, method, 50)(0, 50))[:, 40:]
    for length in (40, 43, 49):
        _, cache = prefill(model, TOKENS, method, chunk=20)
        assert cache.until == 40 and cache.kept.tolist() == [0, 1, 2, 3, *range(20, 40)]
        cache.cut(length)
        assert len(cache) == length
        plan = model.plan(method, n=50, i=torch.arange(length, 50), j=cache.indices(new=50 - length))
        assert error(model(TOKENS[:, length:], plan, cache), want[:, length - 40:]) < 1e-5
    cache.cut(39)
    assert len(cache) == 0 and error(prefill(model, TOKENS, method, cache=cache)[0], want[:, -1]) < 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# what a Config says, and what is asked of it

@pytest.mark.parametrize("rope", [YARN, {**LONGROPE, "original_max_position_embeddings": 16},
                                  {"rope_type": "dynamic", "factor": 2.0}, {"type": "llama3", "factor": 2.0}], ids=str)
def test_train_len_does_not_bend_the_frequencies_of_a_checkpoint(rope, tmp_path):
    """They are those of the length it was stretched from; L is what is asked for, as ReRoPE's window of L/4 is."""
    trained = read_config(tmp_path, rope_scaling=rope).plan(n=50)
    for train_len in (8, 32, 300):
        config = read_config(tmp_path, train_len, rope_scaling=rope)
        assert config.train_len == train_len
        assert config.plan("rerope", n=320).regions[1].q_pos[0] == train_len // 4
        for plan in (config.plan(n=50), config.plan("rerope", n=50)):
            assert torch.equal(plan.inv_freq, trained.inv_freq) and plan.mscale == trained.mscale


@pytest.mark.parametrize("field, value", [
    ("hidden_size", 0), ("num_hidden_layers", True), ("vocab_size", 64.0), ("train_len", -5), ("head_dim", None),
    ("rms_norm_eps", 0), ("rope_theta", "1e4"), ("num_key_value_heads", 3), ("bos_token_id", 64),
    ("bos_token_id", -1), ("eos_token_id", (2, 99))])
def test_sizes_that_no_model_can_have(field, value):
    with pytest.raises(ValueError, match="token id" if "token" in field else field):
        Config(**{**SIZES, field: value})


@torch.inference_mode()
def test_load_takes_a_name_and_a_type_by_name(tmp_path, monkeypatch):
    """From any folder; and a training length for the methods. All runs in that type, the cache too."""
    monkeypatch.chdir(tmp_path)
    model, tokenizer = load("tiny", dtype="bfloat16", train_len=99)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and not model.training
    assert model.config.train_len == 99 and tokenizer.bos_id == 1
    assert not any(p.requires_grad for p in model.parameters())
    assert tokenizer.decode(greedy(model, tokenizer.encode(PROMPT), 6)).startswith("41827")
