"""The whole model against transformers on real and random checkpoints, the cache, and folders that are wrong."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import Config, KVCache, Llama, by_rows, load, load_model, load_tokenizer
from positions import METHODS

METHODS = [name for name in METHODS if name != "longrope"]  # its factors come from a config, see test_strategies.py

SHIPPED = Path(__file__).parents[1] / "checkpoints/tiny"
TINY = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, max_position_embeddings=32)


def random_model(seed=0, **changes):
    """An untrained Llama of ours whose weights are large enough that attention matters."""
    torch.manual_seed(seed)
    model = Llama(Config(**{**TINY, "train_len": 32, **changes})).eval().requires_grad_(False)
    for p in model.parameters():
        if p.ndim > 1:
            p.normal_(0, 0.3)
    return model


def write_checkpoint(path, **changes):
    """A folder as transformers would write it, of random_model(); returns its tensors."""
    model = random_model()
    tensors = {name: p.clone() for name, p in model.named_parameters()}
    fields = {"model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-6, **TINY, **changes}
    (path / "config.json").write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))
    save_file(tensors, path / "model.safetensors")
    return tensors


def load_folder(path, **options):
    """load() without the tokenizer."""
    return load_model(path, Config.from_hf(path), **options)


def logits_in_pieces(model, ids, method, ranges, n):
    """Logits of all tokens, the prompt of n and what follows read in the given pieces through a KVCache."""
    cache, out = KVCache(model.config, size=16), []
    for a, b in ranges:
        plan = model.plan(method, n=n, i=torch.arange(a, b), j=torch.arange(b))
        out.append(model(ids[:, a:b], plan, cache))
    return torch.cat(out, 1)


# ---------------------------------------------------------------------------------------------------------------------
# real checkpoints against transformers

def theirs(path):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def greedy(model, ids, count):
    """The obvious loop: prefill, then one token at a time."""
    cache, n, out = KVCache(model.config), len(ids), []
    tokens = torch.tensor([ids])
    for _ in range(count):
        past = len(cache)
        i, j = torch.arange(past, past + tokens.shape[1]), torch.arange(past + tokens.shape[1])
        logits = model(tokens, model.plan(n=n, i=i, j=j), cache, last_only=True)
        tokens = logits[:, -1].argmax(-1, keepdim=True)
        out.append(int(tokens))
    return out


@pytest.mark.parametrize("name", ["stories260K", "tok105"])
def test_greedy_story_is_that_of_transformers(name, asset):
    """Each of our 64 ids is the likeliest to transformers after those before it, so its greedy story is the same."""
    model, tokenizer = load(asset(name))
    ids = tokenizer.encode("Once upon a time")
    story = greedy(model, ids, 64)
    with torch.no_grad():
        want = theirs(asset(name))(torch.tensor([ids + story])).logits[0].argmax(-1)
    assert story == want[len(ids) - 1:-1].tolist()
    assert "there was a little" in tokenizer.decode(ids + story)


@pytest.mark.parametrize("tokens, tolerance", [(200, 1e-4), (1500, 1e-3)])
@pytest.mark.parametrize("name", ["stories260K", "tok105"])
def test_logits_are_those_of_transformers(name, tokens, tolerance, asset):
    """Inside the window, and far beyond it, where plain RoPE still has to be the same wrong answer."""
    model, tokenizer = load(asset(name))
    text = (asset("texts") / "tinystories_valid_30k.txt").read_text(encoding="utf-8")
    ids = torch.tensor([[i % model.config.vocab_size for i in tokenizer.encode(text)[:tokens]]])
    with torch.no_grad():
        want = theirs(asset(name))(ids).logits
        got = model(ids, model.plan(n=tokens))
    assert ids.shape[1] == tokens
    assert float((got - want).abs().max()) < tolerance


def test_a_sharded_copy_is_the_same_model(asset, tmp_path):
    source = asset("tok105")
    tensors = load_file(source / "model.safetensors")
    names, weight_map = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, tmp_path / file)
        weight_map |= {name: file for name in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for file in ("config.json", "tokenizer.model"):
        (tmp_path / file).write_bytes((source / file).read_bytes())
    (one, tokenizer), (two, _) = load(source), load(tmp_path)
    ids = torch.tensor([tokenizer.encode("Once upon a time, there was a")])
    plan = one.plan(n=ids.shape[1])
    assert torch.equal(one(ids, plan), two(ids, plan))


# ---------------------------------------------------------------------------------------------------------------------
# random checkpoints, written by transformers

LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}

HF_CONFIGS = {
    "plain": {},
    "mha": {"num_key_value_heads": 4},
    "one-key-head": {"num_key_value_heads": 1},
    "head_dim": {"head_dim": 16},
    "tied": {"tie_word_embeddings": True},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "rope_theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "rms_norm_eps": {"rms_norm_eps": 0.1},
    "eos-list": {"eos_token_id": [2, 5]},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
    "yarn": {"rope_parameters": {**YARN, "rope_theta": 10000.0}},
    "yarn-options": {"rope_parameters": {**YARN, "rope_theta": 100.0, "beta_fast": 8.0, "beta_slow": 0.5, "mscale": 0.7,
                                         "mscale_all_dim": 1.0}},
    "yarn-attention": {"rope_parameters": {**YARN, "rope_theta": 100.0, "attention_factor": 1.5, "truncate": False}},
    "llama3": {"rope_parameters": {**LLAMA3, "rope_theta": 10000.0}},
}


def hf_checkpoint(path, changes):
    """A random LlamaForCausalLM saved by transformers, and itself. Norms and biases are random too."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**TINY, **changes})).eval().requires_grad_(False)
    for p in model.parameters():
        p.normal_(1, 0.3) if p.ndim == 1 else p.normal_(0, 0.3)
    model.save_pretrained(path)
    return model


def respell(path, type_key):
    """Rewrite rope_parameters in config.json as older files have it: rope_theta beside rope_scaling."""
    raw = json.loads((path / "config.json").read_text())
    rope = raw.pop("rope_parameters")
    raw["rope_theta"], kind = rope.pop("rope_theta"), rope.pop("rope_type")
    raw["rope_scaling"] = None if kind == "default" else {type_key: kind, **rope}
    raw["torch_dtype"] = raw.pop("dtype", "float32")
    (path / "config.json").write_text(json.dumps(raw))


def check_against(model, path):
    """Logits of 2 x 50 tokens, past max_position_embeddings = 32, of the folder against a model of transformers."""
    ours = load_folder(path)
    ids = torch.randint(0, 64, (2, 50), generator=torch.Generator().manual_seed(1))
    want, got = model(ids).logits, ours(ids, ours.plan(n=50))
    assert float((got - want).abs().max()) < 1e-4 * float(want.abs().max())
    return ours


@pytest.mark.parametrize("name", HF_CONFIGS)
def test_random_checkpoint_of_transformers(name, tmp_path):
    ours = check_against(hf_checkpoint(tmp_path, HF_CONFIGS[name]), tmp_path)
    assert ours.config.eos_token_id == ((2, 5) if name == "eos-list" else (2,))


@pytest.mark.parametrize("type_key", ["rope_type", "type"])
@pytest.mark.parametrize("name", [name for name, changes in HF_CONFIGS.items() if "rope_parameters" in changes])
def test_older_spelling_of_rope_scaling(name, type_key, tmp_path):
    model = hf_checkpoint(tmp_path, HF_CONFIGS[name])
    respell(tmp_path, type_key)
    check_against(model, tmp_path)


def test_missing_head_dim_and_kv_heads_have_their_defaults(tmp_path):
    """LLaMA-1 folders have neither: head_dim = hidden_size / heads, as many key heads as heads."""
    model = hf_checkpoint(tmp_path, {"num_key_value_heads": 4})
    raw = json.loads((tmp_path / "config.json").read_text())
    del raw["head_dim"], raw["num_key_value_heads"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    check_against(model, tmp_path)


@pytest.mark.parametrize("fields, L", [
    ({}, 32),
    ({"original_max_position_embeddings": 8}, 8),
    ({"rope_scaling": YARN}, 16), ({"rope_parameters": {**LLAMA3, "rope_theta": 1e4}}, 16),
    ({"rope_scaling": {"type": "linear", "factor": 2.0, "original_max_position_embeddings": 16}}, 16),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, 32),
])
def test_training_length(fields, L, tmp_path):
    """original_max_position_embeddings wherever it is, else max_position_embeddings; train_len overrides both."""
    write_checkpoint(tmp_path, **fields)
    assert Config.from_hf(tmp_path).train_len == L
    assert Config.from_hf(tmp_path, train_len=7).train_len == 7


@pytest.mark.parametrize("method, want", [
    (None, ("yarn", 4)), ("yarn", ("yarn", 4)), ("mesa", ("yarn", 4)), ("rerope", ("yarn", 4)), ("rope", ("rope", 1)),
    ("pi", ("pi", None))])
def test_a_method_keeps_the_frequencies_the_model_was_trained_with(method, want, tmp_path):
    """Unless it has its own: mesa on a YaRN model is mesa with YaRN's frequencies and mscale."""
    write_checkpoint(tmp_path, rope_scaling=YARN)
    model = load_folder(tmp_path)
    name, factor = want
    reference = model.plan("rope", n=40, freq=name, **({"factor": 4.0} if factor == 4 else {}))
    plan = model.plan(method, n=40)
    assert torch.equal(plan.inv_freq, reference.inv_freq) and plan.mscale == reference.mscale


# ---------------------------------------------------------------------------------------------------------------------
# the cache

@pytest.mark.parametrize("method", METHODS)
def test_prefill_in_pieces_one_layer(method, cut):
    """Any cut of the prompt, and decoding, give the logits of one forward pass."""
    model = random_model(num_hidden_layers=1)
    n, ids = 90, torch.randint(0, 64, (2, 102), generator=torch.Generator().manual_seed(1))
    want = model(ids, model.plan(method, n=n, i=torch.arange(102), j=torch.arange(102)))
    got = logits_in_pieces(model, ids, method, cut(102), n)
    assert float((got - want).abs().max()) < 1e-4


@pytest.mark.parametrize("method", ["mesa", "self-extend"])
def test_implementations_agree_in_a_model(method):
    model, ids = random_model(), torch.arange(60)[None]
    plan = model.plan(method, n=60)
    want = model(ids, plan, impl="dense")
    assert float((model(ids, plan, impl="tiled") - want).abs().max()) < 1e-4
    assert float((model(ids, plan) - want).abs().max()) < 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_last_only_is_the_last_row(method):
    """The last layer then computes one query; of a whole prompt, and of the second of two pieces."""
    model, ids = random_model(), torch.arange(60)[None]
    for first in (0, 25):
        caches = [KVCache(model.config, 60), KVCache(model.config, 60)]
        if first:
            before = model.plan(method, n=60, i=torch.arange(first), j=torch.arange(first))
            for cache in caches:
                model(ids[:, :first], before, cache)
        plan = model.plan(method, n=60, i=torch.arange(first, 60))
        whole = model(ids[:, first:], plan, caches[0])
        last = model(ids[:, first:], plan, caches[1], last_only=True)
        assert torch.allclose(last, whole[:, -1:], atol=1e-4)
        assert torch.equal(caches[0].k[-1], caches[1].k[-1])


def test_by_rows_is_the_whole():
    x = torch.randn(2, 10, 4)
    assert torch.equal(by_rows(lambda part: 2 * part.cumsum(-1), x, rows=3), 2 * x.cumsum(-1))


def test_cache_grows_and_keeps_what_it_holds():
    """5, 3 and 20 tokens into room for 4: capacity 8, 8, 32; two layers, each with its own keys."""
    config = random_model().config
    cache, pieces = KVCache(config, size=4), [torch.randn(1, 2, T, 8) for T in (5, 3, 20)]
    for number, piece in enumerate(pieces):
        for layer in (0, 1):
            k, v = cache.append(layer, piece + layer, -piece)
        so_far = torch.cat(pieces[:number + 1], 2)
        assert torch.equal(k, so_far + 1) and torch.equal(v, -so_far)
        assert len(cache) == so_far.shape[2]
    assert cache.size == 32 and cache.k[0].shape == (1, 2, 32, 8)
    assert torch.equal(cache.k[0][:, :, :28], so_far)


def test_cache_keeps_the_type_of_the_keys():
    cache = KVCache(random_model().config)
    assert len(cache) == 0
    k, _ = cache.append(0, *torch.zeros(2, 1, 2, 3, 8, dtype=torch.bfloat16))
    assert k.dtype == torch.bfloat16


# ---------------------------------------------------------------------------------------------------------------------
# folders that are wrong

def edit_config(path, **changes):
    raw = json.loads((path / "config.json").read_text())
    raw = {k: v for k, v in (raw | changes).items() if v is not ...}
    (path / "config.json").write_text(json.dumps(raw))


def edit_tensors(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def write_index(path, **weight_map):
    """Move the weights to one shard, with an index that also says weight_map."""
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    save_file(tensors, path / "part.safetensors")
    names = {name: "part.safetensors" for name in tensors} | weight_map
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def truncate(path):
    """Cut the last byte off, as a broken download does."""
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def only_pickle(path):
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


WRONG = {  # what is done to a good folder: the error, and words of its message
    "no config": (lambda p: (p / "config.json").unlink(), FileNotFoundError, ["config.json"]),
    "config not json": (lambda p: (p / "config.json").write_text("{"), ValueError, ["config.json", "JSON"]),
    "config a list": (lambda p: (p / "config.json").write_text("[1, 2]"), ValueError, ["config.json"]),
    "missing field": (lambda p: edit_config(p, hidden_size=...), ValueError, ["hidden_size"]),
    "missing layers": (lambda p: edit_config(p, num_hidden_layers=...), ValueError, ["num_hidden_layers"]),
    "missing vocab": (lambda p: edit_config(p, vocab_size=...), ValueError, ["vocab_size"]),
    "missing heads": (lambda p: edit_config(p, num_attention_heads=...), ValueError, ["num_attention_heads"]),
    "unknown rope": (lambda p: edit_config(p, rope_scaling={"rope_type": "x7"}), ValueError, ["x7", "yarn"]),
    "unknown rope, new": (lambda p: edit_config(p, rope_parameters={"rope_type": "x9"}), ValueError, ["x9", "llama3"]),
    "partial rotary": (lambda p: edit_config(p, partial_rotary_factor=0.5), ValueError, ["partial_rotary_factor"]),
    "not a llama": (lambda p: edit_config(p, model_type="gpt2"), ValueError, ["gpt2"]),
    "not silu": (lambda p: edit_config(p, hidden_act="gelu"), ValueError, ["gelu"]),
    "pickle only": (only_pickle, ValueError, ["pytorch_model.bin", "safetensors"]),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), FileNotFoundError, ["model.safetensors"]),
    "truncated": (truncate, ValueError, ["model.safetensors"]),
    "empty file": (lambda p: (p / "model.safetensors").write_bytes(b""), ValueError, ["model.safetensors"]),
    "shard missing": (lambda p: write_index(p, **{"model.norm.weight": "part-2.safetensors"}), FileNotFoundError,
                      ["part-2.safetensors"]),
    "shard without its tensor": (lambda p: write_index(p, **{"model.layers.9.mlp.up_proj.weight": "part.safetensors"}),
                                 ValueError, ["part.safetensors", "model.layers.9.mlp.up_proj.weight"]),
    "missing tensor": (lambda p: edit_tensors(p, lambda t: t.pop("model.norm.weight")), ValueError,
                       ["model.norm.weight"]),
    "missing head": (lambda p: edit_tensors(p, lambda t: t.pop("lm_head.weight")), ValueError, ["lm_head.weight"]),
    "extra tensor": (lambda p: edit_tensors(p, lambda t: t.update(extra=torch.zeros(2, 3))), ValueError,
                     ["extra", r"\(2, 3\)"]),
    "bias not in config": (lambda p: edit_tensors(p, lambda t: t.update(
        {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)})), ValueError, ["q_proj.bias"]),
    "wrong shape": (lambda p: edit_tensors(p, lambda t: t.update({"model.norm.weight": torch.zeros(31)})), ValueError,
                    ["model.norm.weight", r"\(31,\)", r"\(32,\)"]),
    "index not json": (lambda p: (write_index(p), (p / "model.safetensors.index.json").write_text("oops")), ValueError,
                       ["model.safetensors.index.json"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_folders_say_what_is_wrong(name, tmp_path):
    write_checkpoint(tmp_path)
    load_folder(tmp_path)
    damage, error, words = WRONG[name]
    damage(tmp_path)
    with pytest.raises(error) as caught:
        load_folder(tmp_path)
    for word in words:
        assert caught.match(word)
    assert str(tmp_path) in str(caught.value)


def test_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no-such-folder"):
        load(tmp_path / "no-such-folder")


def test_no_tokenizer(tmp_path):
    write_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="tokenizer.model"):
        load(tmp_path)


def test_broken_tokenizer(tmp_path):
    write_checkpoint(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="tokenizer.model"):
        load(tmp_path)


def test_old_rotary_buffers_are_ignored(tmp_path):
    """LLaMA-1 conversions store rotary_emb.inv_freq in every layer; ours computes its own."""
    write_checkpoint(tmp_path)
    edit_tensors(tmp_path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}))
    load_folder(tmp_path)


def test_tied_checkpoint_that_also_carries_its_head(tmp_path):
    """Some tied models are saved with a copy of the embedding as lm_head.weight."""
    tensors = write_checkpoint(tmp_path, tie_word_embeddings=True)
    model = load_folder(tmp_path)
    ids = torch.arange(9)[None]
    x = model.model(ids, model.plan(n=9), None, "auto", False)
    want = x @ tensors["model.embed_tokens.weight"].T
    assert torch.allclose(model(ids, model.plan(n=9)), want, atol=1e-5)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
def test_dtype(dtype, tmp_path):
    """dtype None keeps what is stored."""
    tensors = write_checkpoint(tmp_path)
    save_file({name: t.bfloat16() for name, t in tensors.items()}, tmp_path / "model.safetensors")
    model = load_folder(tmp_path, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype or torch.bfloat16}


LOADING = """
import sys, torch
from model import Config, load_model

def status(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024

def touched(path):
    model = load_model(path, Config.from_hf(path))
    return model, [p.view(torch.int16).max() for p in model.parameters()]  # reads every page

touched(sys.argv[1])  # a tiny one first: what torch imports on first use is not the loader's
before = status("VmRSS")
kept = touched(sys.argv[2])
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_loading_takes_the_memory_of_the_checkpoint_once(tmp_path):
    """200 MB of bfloat16, copied tensor by tensor: at most 1.1 times its size with every weight touched."""
    small, large = tmp_path / "small", tmp_path / "large"
    wide = dict(TINY, hidden_size=1024, intermediate_size=4096, num_hidden_layers=6, num_attention_heads=16,
                num_key_value_heads=16, head_dim=64)
    for path, fields in ((small, TINY), (large, wide)):
        path.mkdir()
        (path / "config.json").write_text(json.dumps(fields))
        with torch.device("meta"):
            shapes = {name: p.shape for name, p in Llama(Config(**fields)).named_parameters()}
        save_file({name: torch.ones(s, dtype=torch.bfloat16) for name, s in shapes.items()}, path / "model.safetensors")
    size = (large / "model.safetensors").stat().st_size
    out = subprocess.run([sys.executable, "-c", LOADING, small, large], capture_output=True, text=True, check=True,
                         cwd=Path(__file__).parents[1])
    assert size > 180e6 and float(out.stdout) <= 1.1 * size


# ---------------------------------------------------------------------------------------------------------------------
# text

NASTY = ["", " ", "   ", "a", "?", " leading", "trailing ", "two  spaces   three", "line\nbreak\n\n\nmore\n", "\n",
         "\t tab", "Hello, world! 12345 007", "한글 텍스트입니다", "你好，世界", "🦙", "🦙🦙 twice", "👩‍👩‍👧‍👦 family",
         "naïve café",
         "mixed 🦙한a\n 9", "<s>", "\u00a0nbsp", "e\u0301 combining", "\U0001F9FF\U0001F9FF\U0001F9FF\U0001F9FF end"]


@pytest.fixture
def llama_tokenizer(asset):
    return load_tokenizer(asset("llama_tokenizer"), Config(**TINY))


@pytest.mark.parametrize("text", NASTY + ["a \ufffd replaced", "\ufffd"], ids=ascii)
def test_stream_is_decode_piece_by_piece(text, llama_tokenizer):
    """No space lost, no character cut in half: U+FFFD shows only where the text itself has it."""
    ids = llama_tokenizer.encode(text)
    pieces = list(llama_tokenizer.stream(ids))
    assert "".join(pieces) == llama_tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("text", NASTY, ids=ascii)
def test_stream_continues_a_prompt(text, llama_tokenizer):
    """With the prompt as context, prompt + stream is the text of all ids: the first word keeps its space."""
    prompt = llama_tokenizer.encode("The llama said:")
    ids = llama_tokenizer.encode(" and then " + text, bos=False)
    streamed = "".join(llama_tokenizer.stream(iter(ids), prompt))
    assert llama_tokenizer.decode(prompt) + streamed == llama_tokenizer.decode(prompt + ids)


def test_stream_does_not_hold_text_back(llama_tokenizer):
    """Each word is out as soon as its token is in."""
    came = []
    def tokens():  # noqa: E306
        for token in llama_tokenizer.encode("one two three four five"):
            yield token
            came.append("in")
    stream = llama_tokenizer.stream(tokens())
    assert next(stream) == "one" and len(came) <= 2


@pytest.mark.parametrize("text", NASTY, ids=ascii)
def test_decode_undoes_encode(text, llama_tokenizer):
    """Sentencepiece drops one leading space of a decoded text and adds one when encoding."""
    ids = llama_tokenizer.encode(text)
    assert llama_tokenizer.decode(ids) == text.removeprefix("<s>")


@pytest.mark.parametrize("text", ["Hello", "<s>Hello", " Hello", "", "<s>"])
def test_bos_once(text, llama_tokenizer):
    ids = llama_tokenizer.encode(text)
    assert ids[0] == 1 and 1 not in ids[1:]
    assert ids[1:] == llama_tokenizer.encode(text.removeprefix("<s>"), bos=False)


def test_no_bos_where_there_is_none(asset):
    tokenizer = load_tokenizer(asset("llama_tokenizer"), Config(**TINY, bos_token_id=None))
    assert tokenizer.encode("Hello") == tokenizer.encode("Hello", bos=False)


def test_known_ids(llama_tokenizer):
    """The ids that every LLaMA implementation gives."""
    assert llama_tokenizer.encode("Hello world") == [1, 15043, 3186]


def test_tokenizer_json(tmp_path):
    """Where there is no tokenizer.model: tokenizer.json by the tokenizers package."""
    tokenizers = pytest.importorskip("tokenizers")
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "<s>": 1, "hello": 2, "world": 3}, "<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    core.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path, Config(**TINY))
    assert tokenizer.encode("hello world") == [1, 2, 3]


# ---------------------------------------------------------------------------------------------------------------------
# rotated copies of the cache

@torch.inference_mode()
def test_decoding_may_change_its_method_and_be_cut_back():
    """Kept copies of rotated keys serve only the positions they were made for."""
    model, tokenizer = load(SHIPPED)
    tokens = torch.tensor([tokenizer.encode("One day a little bear found a red ball in the wood. " * 8)])
    n = tokens.shape[1]
    cache = KVCache(model.config)
    model(tokens[:, :n - 8], model.plan("mesa", n=n, i=torch.arange(n - 8), j=torch.arange(n - 8)), cache)
    steps = [("mesa", {}, n - 8), ("mesa", {}, n - 7), ("rerope", {}, n - 6), ("mesa", {}, n - 5),
             ("yarn", {"factor": 2}, n - 4), ("mesa", {"cosine": 4.0}, n - 3), ("mesa", {}, n - 6),
             ("self-extend", {}, n - 5), ("rerope", {}, n - 4)]
    for method, params, t in steps:
        cache.cut(t)
        fresh = KVCache(model.config)
        for layer in range(len(cache.k)):
            fresh.append(layer, cache.k[layer][:, :, :t], cache.v[layer][:, :, :t])
        plan = model.plan(method, n=n, i=torch.tensor([t]), j=torch.arange(t + 1), **params)
        got, want = (model(tokens[:, t:t + 1], plan, c) for c in (cache, fresh))
        assert torch.allclose(got, want, atol=1e-5), (method, t)
