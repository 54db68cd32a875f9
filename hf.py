"""Every method inside of transformers: a model loaded there attends by a Plan, and all else of it stays as it is.

Does: give transformers' public attention interface an attention over plans; keep its rotary module from rotating, so
that keys are cached un-rotated; follow the prompt's length. Does not: change weights, caches, generate or tokenizers.
transformers (5 or newer) is optional, and only imported here.

    extend(model, "mesa:first=64")           # any model of FAMILIES; again, with another method, needs no reload
    model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=64)
    restore(model)

Model, at the end, is such a model with the methods of a model.Llama, for the scripts.

Letters: B batch, H query heads, Hkv key heads, Tq queries, Tk keys, D head width, n prompt length.
"""
import importlib.util
import inspect
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from attention import alibi_bias, attend, fold
from checkpoint import (check_layers, eos_tokens, fields_of, generation_eos, own_method, position_fields, read_json,
                        stored_tensors)
from config import Config
from positions import Method
from rotation import rotate_keys, rotate_queries
from tokenizer import Tokenizer, json_tokenizer

NAME = "beyond"  # of our attention, among those that transformers knows


# ---------------------------------------------------------------------------------------------------------------------
# what config.json does not say about a family

def by_no_rope_layers(config, layer):
    """SmolLM3 and Llama 4 list the layers that have positions, as no_rope_layers."""
    return not config.no_rope_layers[layer]


def full_layers(config, layer):
    """Cohere2's full layers have no positions, only its sliding ones."""
    return config.layer_types[layer] == "full_attention"


@dataclass
class Family:
    """What has to be known of a family beside its config.json."""
    interleaved: bool = False              # which channels are a pair: (2p, 2p + 1), else (p, p + r/2)
    position_free: Callable | None = None  # (config, layer) -> whether the layer has no positions; None: all have


FAMILIES = {  # model_type in config.json: of the text model, where there are others beside it
    "llama":       Family(),
    "mistral":     Family(),
    "mixtral":     Family(),
    "qwen2":       Family(),
    "qwen3":       Family(),
    "qwen3_moe":   Family(),
    "phi":         Family(),
    "phi3":        Family(),
    "gemma":       Family(),
    "gemma2":      Family(),
    "gemma3_text": Family(),
    "smollm3":     Family(position_free=by_no_rope_layers),
    "olmo2":       Family(),
    "cohere":      Family(interleaved=True),
    "cohere2":     Family(interleaved=True, position_free=full_layers),
    "granite":     Family(),
    "starcoder2":  Family(),
    "stablelm":    Family(),
    "gpt_neox":    Family(),
    "glm":         Family(interleaved=True),
    "nemotron":    Family(),
    "llama4_text": Family(interleaved=True, position_free=by_no_rope_layers),
    "gpt_oss":     Family(),
}


# ---------------------------------------------------------------------------------------------------------------------
# extend and restore

def extend(model, method=None, train_len=None):
    """Let a transformers model attend by a method, until restore(model); returns the model.

    method: a text like "mesa:first=64", or a Method; None is what config.json says. train_len overrides L.
    Layers that are local or without positions in the config stay as trained; so do frequencies, unless the method has
    its own. n is the length of the prompt, and grows with each further turn in the same cache; see announce.
    Raises ValueError for an unknown method or setting, and, by name, for a family that is not in FAMILIES.
    """
    interface = attention_interface()
    decoder = decoder_of(model)
    rotary = getattr(decoder, "rotary_emb", None)
    kind = decoder.config.model_type
    if kind not in FAMILIES or rotary is None:
        raise ValueError(f"hf.py cannot extend models of type {kind}; it knows {', '.join(FAMILIES)}")
    layers = read_layers(decoder.config, FAMILIES[kind], rotary, train_len)
    method = Method.of(method)
    method.plan(governed(layers).config, n=1)  # a wrong name or setting shows here
    attentions = [m for m in decoder.modules() if hasattr(m, "layer_idx") and hasattr(m, "is_causal")]
    if len(attentions) != len(layers) or not all(m.is_causal for m in attentions):
        raise ValueError(f"hf.py: this {kind} has layers without causal attention")
    if method.name and governed(layers).own:
        warnings.warn(f"no layer of this {kind} sees all keys by their positions, so {method} changes nothing",
                      stacklevel=2)

    restore(model)
    extension = Extension(method, layers, decoder.config._attn_implementation)
    for module in (decoder, *attentions):
        module.beyond = extension
    extension.hooks = [rotary.register_forward_hook(unrotated),
                       decoder.register_forward_pre_hook(extension.begin, with_kwargs=True),
                       decoder.register_forward_hook(extension.end)]
    interface.AttentionInterface.register(NAME, attend_by_plan)
    interface.AttentionMaskInterface.register(NAME, left_padding)
    decoder.set_attn_implementation(NAME)
    return model


def restore(model):
    """Undo extend, where there is something to undo. Caches filled before hold un-rotated keys: drop them."""
    decoder = decoder_of(model)
    extension = extension_of(decoder)
    if extension is None:
        return model
    for hook in extension.hooks:
        hook.remove()
    for module in decoder.modules():
        if extension_of(module):
            del module.beyond
    decoder.set_attn_implementation(extension.attention_before)
    return model


def announce(cache, n):
    """Say that the prompt which goes into a cache, a turn of it included, will end after n tokens.

    For prompts that are read in pieces: without it a piece of several tokens counts as a turn, and ends the prompt.
    """
    cache.announced = n


def attention_interface():
    """transformers, with the two interfaces that extend needs; ValueError where it is missing or too old."""
    try:
        import transformers
        transformers.AttentionMaskInterface  # noqa: B018
    except (ImportError, AttributeError):
        raise ValueError("hf.py needs transformers 5 or newer: pip install 'transformers>=5'") from None
    return transformers


def decoder_of(model):
    """The part of a transformers model that has the layers."""
    decoder = model.get_decoder()
    if hasattr(decoder, "rotary_emb"):
        return decoder
    return getattr(decoder, "model", decoder)  # Llama4ForCausalLM calls itself its decoder


def extension_of(module):
    """The Extension of a module; None where it has none."""
    return getattr(module, NAME, None)


# ---------------------------------------------------------------------------------------------------------------------
# the layers of a model

@dataclass
class Layer:
    """How a layer was trained to attend."""
    config: Config       # the positions
    own: Method | None   # what a local layer, or one without positions, attends by; None: by the method asked for

    @property
    def chunk(self):
        """The size of its chunks, which keys are cut off by; 1 where it has none."""
        return self.own.params.get("chunk", 1) if self.own else 1


def read_layers(config, family, rotary, train_len=None):
    """A Layer for every layer of a model with this transformers config; layers that are alike share one."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        is_local = getattr(config, "sliding_window", None) is not None
        kinds = ["sliding_attention" if is_local else "full_attention"] * config.num_hidden_layers
    different = {}
    layers = []
    for number, kind in enumerate(kinds):
        is_free = bool(family.position_free and family.position_free(config, number))
        if (kind, is_free) not in different:
            positions = trained_positions(config, kind, family, rotary, train_len)
            own = own_method(kind, is_free, config.to_dict())
            different[kind, is_free] = Layer(positions, Method.parse(own) if own else None)
        layers.append(different[kind, is_free])
    return layers


def governed(layers):
    """The first layer that attends by the method asked for, else the first one."""
    return next((layer for layer in layers if layer.own is None), layers[0])


def trained_positions(config, kind, family, rotary, train_len=None):
    """Our Config of a layer's positions, from a transformers config. The ids of special tokens are not in it.

    Raises ValueError where the frequencies that we compute are not those of its rotary module.
    """
    rope = config.rope_parameters
    rope = dict(rope.get(kind) or rope)  # one for all layers, or one for each kind of layer
    rope.pop("partial_rotary_factor", None)
    fields = position_fields({**config.to_dict(), "rope_parameters": rope, "partial_rotary_factor": None})
    fields["train_len"] = train_len or fields["train_len"]
    inv_freq, mscale = trained_frequencies(rotary, kind)
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    intermediate_size = getattr(config, "intermediate_size", None) or config.hidden_size
    positions = Config(config.vocab_size, config.hidden_size, intermediate_size, config.num_hidden_layers, heads,
                       key_heads, head_dim, bos_token_id=None, eos_token_id=(), rotary_dim=2 * len(inv_freq),
                       interleaved=family.interleaved, **fields)
    plan = positions.plan(n=1)
    rounding = max(1e-4, 2 * torch.finfo(inv_freq.dtype).eps)
    equal = torch.allclose(plan.inv_freq, inv_freq.cpu().double(), rtol=rounding, atol=0)
    if not equal or not math.isclose(plan.mscale, mscale, rel_tol=1e-4):
        raise ValueError(f"hf.py: the frequencies of this {config.model_type} are not those of rope_type {rope}")
    return positions


def trained_frequencies(rotary, kind):
    """inv_freq (r/2,), as it was before any prompt, and mscale of a rotary module, for a kind of layer."""
    if hasattr(rotary, f"{kind}_original_inv_freq"):  # Gemma 3 has one for each kind
        return getattr(rotary, f"{kind}_original_inv_freq"), getattr(rotary, f"{kind}_attention_scaling")
    return rotary.original_inv_freq, rotary.attention_scaling


# ---------------------------------------------------------------------------------------------------------------------
# a forward pass

@dataclass
class Given:
    """What Model.forward brings to a forward pass."""
    plans: list        # a Plan for each layer
    cache: object      # cache.KVCache, or None
    impl: str

    def attend(self, number, q, k, v, softcap, sinks):
        """Extension.attend, for rows without padding; the keys and values are those of the tokens alone."""
        plan = self.plans[number]
        if softcap or sinks is not None:
            if self.cache is not None:
                k, v = self.cache.append(number, k, v)
            return attend_scores(q, k, v, plan, softcap, sinks)
        if self.cache is None:
            return attend(q, k, v, plan, self.impl)
        return self.cache.attend(number, q, k, v, plan, self.impl, row=None)


@dataclass
class Extension:
    """What extend adds to a model, and the state of the forward pass that it is in."""
    method: Method
    layers: list[Layer]
    attention_before: str             # the attention implementation that restore goes back to
    hooks: list = field(default_factory=list)
    first: int = 0                    # index of the first query
    n: int = 0                        # length of the prompt
    plans: dict = field(default_factory=dict)  # of this pass: all layers of a kind share one
    given: Given | None = None                 # by Model.forward: then nothing of the above is asked

    def begin(self, decoder, args, kwargs):
        """Before a pass: where it begins, and how long the prompt is, which is kept with the cache that holds it.

        Several tokens are a prompt, a turn or a piece of them, and n reaches at least to their end; a single one after
        others is being decoded, where n stays.
        """
        tokens = args[0] if args else kwargs.get("input_ids")
        if tokens is None:
            tokens = kwargs["inputs_embeds"]
        cache = cache_of(kwargs)
        if cache is not None and cache.is_compileable:
            raise ValueError("hf.py: static caches are not supported; leave cache_implementation as it is")
        self.plans = {}
        self.first = 0 if cache is None else int(cache.get_seq_length())
        end = self.first + tokens.shape[1]
        if tokens.shape[1] > 1 or self.first == 0 or not hasattr(cache, "prompt_length"):
            self.n = max(end, getattr(cache, "announced", 0))
        else:
            self.n = max(cache.prompt_length, getattr(cache, "announced", 0))
        if cache is not None:
            cache.prompt_length = self.n

    def end(self, decoder, args, output):
        """After a pass: the cache may have been made in it."""
        cache = cache_of(output)
        if cache is not None:
            cache.prompt_length = self.n

    def attend(self, number, q, k, v, padding, softcap, sinks):
        """Layer `number` for rows with so much padding at the left, q (B, H, Tq, D) and k, v (B, Hkv, Tk, D); their
        output, of the queries that are no padding."""
        if self.given is not None:
            return self.given.attend(number, q, k, v, softcap, sinks)
        layer = self.layers[number]
        # 1. The first key is at index `absent` of its row, as a local layer's cache has dropped those before. Padding
        #    goes, and what is left of a chunk that has lost its beginning: nobody looks at it any more.
        absent = self.first + q.shape[2] - k.shape[2] - padding
        cut = -absent if absent < 0 else -absent % layer.chunk
        q = q[:, :, max(0, padding - self.first):]
        k = k[:, :, cut:]
        v = v[:, :, cut:]
        if q.shape[2] == 0:
            return q
        # 2. The queries are the last of these keys; where they stand is their distance from the end.
        key = id(layer), padding
        if key not in self.plans:
            j = torch.arange(k.shape[2])
            method = layer.own or self.method
            self.plans[key] = method.plan(layer.config, max(1, self.n - padding), j[-q.shape[2]:], j)
        # 3. attention
        if softcap or sinks is not None:
            return attend_scores(q, k, v, self.plans[key], softcap, sinks)
        return attend(q, k, v, self.plans[key])


def cache_argument(model, cache):
    """A cache as a keyword argument of a model; older releases call it past_key_values."""
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return {name: cache}


def cache_of(values):
    """The cache among keyword arguments or in an output; None where there is none."""
    if not hasattr(values, "get"):
        return None
    return values.get("cache") if values.get("cache") is not None else values.get("past_key_values")


def unrotated(rotary, args, output):
    """For the output of a rotary module one that rotates by nothing: cos 1 and sin 0, or complex numbers 1."""
    if isinstance(output, torch.Tensor):
        return torch.ones_like(output)
    cos, sin = output
    return torch.ones_like(cos), torch.zeros_like(sin)


def left_padding(batch_size, attention_mask=None, allow_is_causal_skip=True, **_):
    """For AttentionMaskInterface, in place of a mask: the number of padding tokens at the left of every row, or None
    without any. attention_mask: (B, Tk) of bool, or None."""
    if not allow_is_causal_skip:
        raise ValueError("hf.py: attention is plainly causal; packed sequences and blocks of images are not supported")
    if attention_mask is None or bool(attention_mask.all()):
        return None
    if bool((attention_mask[:, :-1] & ~attention_mask[:, 1:]).any()):
        raise ValueError("hf.py: padding must be at the left (tokenizer.padding_side = 'left')")
    return tuple((~attention_mask).sum(1).tolist())


def attend_by_plan(module, query, key, value, attention_mask, scaling=None, dropout=0.0, softcap=None, s_aux=None, **_):
    """For AttentionInterface: the output (B, Tq, H, D) of query (B, H, Tq, D) over key, value (B, Hkv, Tk, D), None.

    attention_mask: what left_padding gave. softcap: logits are softcap * tanh(logits / softcap). s_aux (H,): attention
    sinks, see attend_scores. Raises ValueError for a mask of one's own, and for dropout.
    """
    if isinstance(attention_mask, torch.Tensor) or dropout:
        raise ValueError("hf.py: attention masks of four dimensions and dropout are not supported")
    extension = extension_of(module)
    B, H, Tq, D = query.shape
    factor = 1.0 if scaling is None else scaling * math.sqrt(D)  # attend divides by sqrt(D)
    if not math.isclose(factor, 1.0):
        query = query * factor
    if attention_mask is None:
        out = extension.attend(module.layer_idx, query, key, value, 0, softcap, s_aux)
        return out.transpose(1, 2), None
    out = torch.zeros_like(query)
    paddings = torch.tensor(attention_mask)
    for padding in set(attention_mask):  # a plan of its own for each length of a row
        rows = (paddings == padding).nonzero()[:, 0].to(query.device)
        part = extension.attend(module.layer_idx, query[rows], key[rows], value[rows], padding, softcap, s_aux)
        out[rows, :, Tq - part.shape[2]:] = part
    return out.transpose(1, 2), None


def attend_scores(q, k, v, plan, softcap=None, sinks=None, block=256):
    """attend for logits that are capped, softcap * tanh(logits / softcap) (Gemma 2, arXiv 2408.00118), or that share
    their softmax with a sink, a logit of each head that has no value (gpt-oss, arXiv 2508.10925): sinks (H,).

    The definition, attend_dense, a block of rows at a time.
    """
    B, H, Tq, D = q.shape
    Hkv, Tk = k.shape[1:3]
    j = torch.arange(Tk)
    keys = [rotate_keys(k, plan, number).float() for number in range(len(plan.key_positions))]
    outs = []
    for begin in range(0, Tq, block):
        rows = slice(begin, min(begin + block, Tq))
        scores = torch.full((B, H, rows.stop - begin, Tk), -math.inf, device=q.device)
        for number, region in enumerate(plan.regions):
            queries = rotate_queries(q, plan, number, rows).float()
            s = (fold(queries, Hkv) @ keys[plan.key_set[number]].transpose(-1, -2)).view(scores.shape) / math.sqrt(D)
            bias = alibi_bias(plan, region, rows, slice(0, Tk), q.device)
            if bias is not None:
                s = s + bias
            if softcap:
                s = softcap * torch.tanh(s / softcap)
            inside = (j >= region.start[rows, None]) & (j < region.end[rows, None])
            scores = torch.where(inside.to(q.device), s, scores)
        if sinks is not None:
            sink = sinks.float().view(1, H, 1, 1).expand(B, H, scores.shape[2], 1)
            scores = torch.cat((scores, sink), -1)
        weights = scores.softmax(-1)[..., :Tk]
        outs.append((fold(weights, Hkv) @ v.float()).view(B, H, -1, D).to(q.dtype))
    return torch.cat(outs, 2)


# ---------------------------------------------------------------------------------------------------------------------
# for the scripts: a checkpoint folder, and its model with the methods of a model.Llama

class CountOnly:
    """What transformers gets for its cache where we have our own: it counts the tokens before, and holds nothing."""
    is_compileable = False
    is_sliding = is_linear = is_dummy = ()  # of its layers, of which it has none

    def __init__(self, length):
        self.length = length

    def get_seq_length(self, layer_idx=0):
        return self.length

    def get_query_offset(self, layer_idx=0):
        return self.length

    def get_mask_sizes(self, query_length, layer_idx=0):
        return self.length + query_length, 0

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        return key_states, value_states


class Model(torch.nn.Module):
    """A transformers model as the scripts want one: `config`, `plan` and `forward` are those of model.Llama, so that
    decoding, batches, chat, saved caches and the evaluations run on it as on ours, with our cache.KVCache."""

    def __init__(self, theirs, config, train_len=None):
        super().__init__()
        self.theirs = extend(theirs, None, train_len)
        self.extension = extension_of(decoder_of(theirs))
        self.config = config
        self.ranks = None                           # its keys are in this process alone, see parallel.py
        self.ways = "as transformers does"

    def plan(self, method=None, *, n, i=None, j=None, **settings):
        """A list with a Plan for each layer; see model.Llama.plan."""
        asked = Method.of(method, **settings)
        plans = {}
        for layer in self.extension.layers:
            if id(layer) not in plans:
                plans[id(layer)] = (layer.own or asked).plan(layer.config, n, i, j)
        return [plans[id(layer)] for layer in self.extension.layers]

    @property
    def layers(self):
        return decoder_of(self.theirs).layers

    def forward(self, tokens, plan, cache=None, last_only=False, impl="auto"):
        """Logits (B, Tq, vocab_size), or (B, 1, vocab_size) with last_only, for tokens (B, Tq); see model.Llama."""
        before = CountOnly(plan[0].Tk - tokens.shape[1])
        self.extension.given = Given(plan, cache, impl)
        try:
            return self.theirs(tokens, logits_to_keep=int(last_only), **cache_argument(self.theirs, before)).logits
        finally:
            self.extension.given = None


def takes(path):
    """Whether a checkpoint folder is of a family that this file can run and model.py cannot."""
    file = Path(path) / "config.json"
    raw = read_json(file) if file.is_file() else {}
    text_config = raw.get("text_config")
    kind = (text_config if text_config and isinstance(text_config, dict) else raw).get("model_type", "llama")
    if not isinstance(kind, str) or kind not in FAMILIES:
        return False
    if raw.get("quantization_config"):
        return True
    try:
        check_layers(raw.get("num_hidden_layers"), {})
        fields_of(raw)
    except (ValueError, TypeError, AttributeError):
        return kind != "llama"  # what is wrong with a LLaMA, model.py says
    return False


def from_folder(path, load, **settings):
    """load(path, ...) of one of transformers' Auto classes, "AutoConfig.from_pretrained": nothing is downloaded, and
    no code of a folder is run. ValueError, in one line, where transformers is missing or fails."""
    if importlib.util.find_spec("transformers") is None:
        kind = read_json(Path(path) / "config.json").get("model_type")
        raise ValueError(f"{path}: for this {kind} transformers is needed: pip install 'transformers>=5'")
    name, method = load.split(".")
    try:
        return getattr(getattr(attention_interface(), name), method)(path, local_files_only=True, **settings)
    except Exception as error:  # there is none that it may not raise
        raise ValueError(f"{path}: {name} of transformers: {first_line(error)}") from None


def first_line(error):
    """The first line of an exception's text, the second one too where that is only its title."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def open_folder(path, train_len=None):
    """(Config, Tokenizer) of a folder, for Model. The Config has the positions of the layers that a method governs."""
    raw = read_json(Path(path) / "config.json")
    if "num_hidden_layers" in raw:
        check_layers(raw["num_hidden_layers"], stored_tensors(Path(path)))
    theirs = from_folder(path, "AutoConfig.from_pretrained")
    try:
        with torch.device("meta"):
            decoder = decoder_of(attention_interface().AutoModelForCausalLM.from_config(theirs))
        rotary = type(decoder.rotary_emb)(decoder.config)  # not on the meta device: its frequencies are numbers
    except Exception as error:  # of sizes that do not go together, there is none that it may not raise
        raise ValueError(f"{path}: transformers cannot build this model: {first_line(error)}") from None
    layers = read_layers(decoder.config, FAMILIES[decoder.config.model_type], rotary, train_len)
    own = tuple(str(layer.own) if layer.own else "" for layer in layers)
    tokenizer = open_tokenizer(path)
    fields = {"bos_token_id": tokenizer.bos_id, "eos_token_id": eos_tokens(theirs.get_text_config().eos_token_id),
              "dtype": stored_type(path), "layer_methods": own if any(own) else ()}
    fields |= generation_eos(path, decoder.config.vocab_size)
    return replace(governed(layers).config, **fields), tokenizer


def positions_of(model):
    """The Config of the layers that an extended model's method governs: its training length, its frequencies."""
    return governed(extension_of(decoder_of(model)).layers).config


def stored_type(path):
    """The name of the type that a folder's weights are stored in, as its config.json says."""
    raw = read_json(Path(path) / "config.json")
    raw = {**(raw.get("text_config") or {}), **raw}
    return str(raw.get("dtype") or raw.get("torch_dtype") or "float32")


def open_tokenizer(path):
    """The Tokenizer of a folder; transformers says whether a text begins with a BOS."""
    core = from_folder(path, "AutoTokenizer.from_pretrained")
    has_bos = core.bos_token_id is not None and core.encode("a")[:1] == [core.bos_token_id]
    bos_id = core.bos_token_id if has_bos else None
    if (Path(path) / "tokenizer.json").is_file():
        tokenizer = json_tokenizer(Path(path) / "tokenizer.json", bos_id)
        tokenizer.bos_id = bos_id
        return tokenizer

    def encode(text):
        return core.encode(text, add_special_tokens=False)
    return Tokenizer(encode, core.decode, bos_id)


def load_model(path, config, dtype=None, device="cpu", train_len=None):
    """The Model of a folder; config and train_len as in open_folder, dtype None: as stored."""
    theirs = from_folder(path, "AutoModelForCausalLM.from_pretrained", dtype=dtype or "auto")
    return Model(theirs.to(device).eval().requires_grad_(False), config, train_len)
