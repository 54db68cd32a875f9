"""A LLaMA from scratch that reads ordinary Hugging Face checkpoint folders.

Does: config.json, safetensors (one file or sharded, memory-mapped, names as they are), tokenizer.model, the forward
pass, a cache of un-rotated keys. Does not: choose positions (positions.py), sample (generate.py), or unpickle.

    model, tokenizer = load("llama-7b", dtype=torch.bfloat16)
    ids = tokenizer.encode("The sky is")
    logits = model(torch.tensor([ids]), model.plan("mesa", n=len(ids)))      # (1, T, vocab_size)

Letters as in attention.py: B batch, H and Hkv query and key heads, Tq, Tk queries and keys, D head width.
"""
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import torch
import torch.nn.functional as F
from torch import nn

from attention import TurnedKeys, attend, with_room
from positions import FREQUENCIES, METHODS, alibi, make_plan, nope, parameters, pick, positive, whole

# rope_type in config.json -> the row of METHODS that computes it
ROPE_TYPES = {"default": "rope", "linear": "pi", "dynamic": "dynamic-ntk", "yarn": "yarn", "llama3": "llama3",
              "longrope": "longrope"}
ENCODINGS = ("rope", "alibi", "nope")  # values of our key position_encoding, rows of METHODS
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Config:
    """The fields of config.json that shape a LLaMA, under their Hugging Face names, and what its positions are."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = 1
    eos_token_id: tuple[int, ...] = (2,)
    dtype: str = "float32"                           # as stored
    train_len: int = 2048                            # L: original_max_position_embeddings, else max_position_embeddings
    freq: str = "rope"                               # the frequencies it was trained with, a row of METHODS
    freq_params: dict = field(default_factory=dict)  # and their parameters
    cosine_attention: float | None = None            # our key: logits are this times the cosine of q and k (CosScale)

    @staticmethod
    def from_hf(path, train_len=None):
        """The Config of a checkpoint folder; train_len overrides L. ValueError names what is missing or unsupported."""
        file = Path(path) / "config.json"
        raw = read_json(file)
        try:
            return config_of(raw, train_len)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}: {error}") from None

    def __post_init__(self):
        """ValueError for sizes that no model can have."""
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "num_key_value_heads", "head_dim", "max_position_embeddings", "train_len"):
            whole(name, getattr(self, name))
        for name in ("rms_norm_eps", "rope_theta"):
            positive(name, getattr(self, name))
        for token in self.eos_token_id if self.bos_token_id is None else (self.bos_token_id, *self.eos_token_id):
            if whole("a token id", token, least=0) >= self.vocab_size:
                raise ValueError(f"token id {token} is outside the vocabulary of {self.vocab_size}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"num_key_value_heads {self.num_key_value_heads} does not divide num_attention_heads "
                             f"{self.num_attention_heads}")

    def plan(self, method=None, *, n, i=None, j=None, freq=None, attn_scale=None, **params):
        """The Plan of a method for this model; queries i and keys j default to a whole prompt of n tokens.

        method None is what config.json says. A method without frequencies of its own keeps those that the model was
        trained with; one that has them (rope, pi, ntk, ...) replaces them. See positions.make_plan for the rest.
        """
        method = method or self.freq
        rule = pick(FREQUENCIES, "frequency rule", freq) if freq else pick(METHODS, "method", method)[1]
        if rule in (None, FREQUENCIES[self.freq]):
            freq, params = freq or self.freq, {**self.freq_params, **params}
        elif self.freq in ("alibi", "nope") and rule not in (alibi, nope):
            raise ValueError(f"this model has no rotary positions ({self.freq}), so {freq or method} sets nothing")
        i = torch.arange(n) if i is None else i
        j = torch.arange(n) if j is None else j
        return make_plan(method, i, j, n=n, L=self.train_len, D=self.head_dim, H=self.num_attention_heads,
                         base=self.rope_theta, freq=freq, attn_scale=attn_scale,
                         **{"cosine": self.cosine_attention, **params})

    def warnings(self, method=None, freq=None, cosine=None):
        """Sentences on what is asked of a model that was not trained for it."""
        rule = freq or (method if method in FREQUENCIES else self.freq)
        out = []
        if rule != self.freq and rule in ("alibi", "nope"):
            out.append(f"this model was trained with {self.freq}, not {rule}: expect nonsense")
        if (cosine or method == "cosscale") and not self.cosine_attention:
            out.append("this model was not trained with cosine attention: expect nonsense")
        return out


def read_json(path):
    """The JSON object in a file; FileNotFoundError or ValueError that names it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent}: no {path.name} in this folder" if path.parent.is_dir()
                                else f"{path.parent}: no such folder")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: not a JSON object")
    return data


def config_of(raw, train_len):
    """The Config of the fields of a config.json."""
    kind, act, window = raw.get("model_type", "llama"), raw.get("hidden_act", "silu"), raw.get("sliding_window")
    if kind not in ("llama", "mistral") or act != "silu" or window:
        raise ValueError(f"not a LLaMA: model_type {kind}, hidden_act {act}, sliding_window {window}")
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        whole(name, raw.get(name))
    same = {name: raw[name] for name in Config.__dataclass_fields__ if raw.get(name) is not None}
    heads, eos = raw["num_attention_heads"], raw.get("eos_token_id", 2)
    freq, theta, params, L = rope_settings(raw)
    same.update(num_key_value_heads=same.get("num_key_value_heads", heads), rope_theta=theta, train_len=train_len or L,
                head_dim=same.get("head_dim", raw["hidden_size"] // heads), freq=freq, freq_params=params,
                eos_token_id=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
                bos_token_id=raw.get("bos_token_id", 1),
                dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"))
    return Config(**same)


def rope_settings(raw):
    """(row of METHODS, rope_theta, its parameters, training length) from rope_scaling or the newer rope_parameters."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"rope_scaling must be an object, not {rope!r}")
    rope = dict(rope)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise ValueError(f"unknown rope_type {kind!r}; known are {', '.join(ROPE_TYPES)}")
    if (rope.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ValueError("partial_rotary_factor is not supported")
    encoding = raw.get("position_encoding", "rope")
    if encoding not in ENCODINGS:
        raise ValueError(f"unknown position_encoding {encoding!r}, not one of {ENCODINGS}")
    L = (rope.get("original_max_position_embeddings") or raw.get("original_max_position_embeddings")
         or raw.get("max_position_embeddings", 2048))
    if encoding != "rope":
        return encoding, 10000.0, {}, L
    if kind == "longrope" and rope.get("factor") is None:
        rope["factor"] = raw.get("max_position_embeddings", L) / L
    if kind != "default" and rope.get("factor") is None:
        raise ValueError(f"rope_type {kind!r} has no factor")
    theta = next((x for x in (rope.get("rope_theta"), raw.get("rope_theta")) if x is not None), 10000.0)
    known = parameters(METHODS[ROPE_TYPES[kind]][1])
    rope["original_max_position_embeddings"] = L  # --train-len must not bend the frequencies of the checkpoint
    return ROPE_TYPES[kind], theta, {key: value for key, value in rope.items() if key in known}, L


# ---------------------------------------------------------------------------------------------------------------------
# the network; attributes are named as in Hugging Face checkpoints

class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the channels, computed in float32 (arXiv 1910.07467)."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        if not single_row(x):
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        length = float(torch.linalg.vector_norm(x, dtype=torch.float32))  # the same in three operations, not twelve
        return x * (length ** 2 / x.numel() + self.eps) ** -0.5 * self.weight


def single_row(x):
    """Whether x (*, channels) is one row on a CPU, as in decoding, where what counts is how little is done besides
    reading the weights."""
    return x.numel() == x.shape[-1] and x.device.type == "cpu" and not torch.is_grad_enabled()


def by_rows(f, x, rows=512):
    """f(x) (B, T, *) of an f that treats every token alone, on a CPU so many at a time: what lies between stays in its
    cache, which makes long inputs up to twice as fast."""
    if x.device.type != "cpu" or x.shape[1] <= rows:
        return f(x)
    return torch.cat([f(part) for part in x.split(rows, 1)], 1)


def linear(x, weight, bias=None):
    """F.linear; for a single row by mv, which reads weights up to twice as fast."""
    if not single_row(x):
        return F.linear(x, weight, bias)
    out = torch.mv(weight, x.flatten())
    return (out if bias is None else out + bias).view(*x.shape[:-1], -1)


class Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


class Attention(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.head_dim, self.layer = c.head_dim, layer
        self.q_proj = Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=c.attention_bias)
        self.k_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.attention_bias)
        self.v_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.attention_bias)
        self.o_proj = Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=c.attention_bias)

    def forward(self, x, plan, cache, impl):
        """The last Tq tokens of x (B, T, hidden_size) look at all; Tq is the plan's."""
        asking = x[:, -len(plan.regions[0].q_pos):]
        q, k, v = (made.view(*made.shape[:2], -1, self.head_dim).transpose(1, 2)  # (B, heads, T, D)
                   for made in (self.q_proj(asking), self.k_proj(x), self.v_proj(x)))
        kept = None
        if cache is not None:
            (k, v), kept = cache.append(self.layer, k, v), cache.kept[self.layer] if x.shape[1] == 1 else None
        return self.o_proj(attend(q, k, v, plan, impl, kept).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, c):
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c, layer)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, plan, cache, impl):
        seen = self.self_attn(by_rows(self.input_layernorm, x), plan, cache, impl)
        return by_rows(lambda rows: rows + self.mlp(self.post_attention_layernorm(rows)), x[:, -seen.shape[1]:] + seen)


class Trunk(nn.Module):
    """All but the head: the part that checkpoints call `model`."""

    def __init__(self, c):
        super().__init__()
        weight = torch.empty(c.vocab_size, c.hidden_size)
        if not weight.is_meta:  # drawing random numbers on the meta device takes seconds
            nn.init.normal_(weight)
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size, _weight=weight)
        self.layers = nn.ModuleList(Block(c, layer) for layer in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, tokens, plan, cache, impl, last_only):
        x = self.embed_tokens(tokens)
        for block in self.layers[:-1]:
            x = block(x, plan, cache, impl)
        # where one token is asked for, the last layer needs the others' keys and values, and nothing else of them
        return self.norm(self.layers[-1](x, plan.last() if last_only else plan, cache, impl))


class Llama(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.model = config, Trunk(config)
        self.plan = config.plan  # plan = model.plan("mesa", n=len(ids))
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, tokens, plan, cache=None, last_only=False, impl="auto"):
        """Logits (B, Tq, vocab_size), or (B, 1, vocab_size) of the last token with last_only, for tokens (B, Tq) int64.

        plan: made by model.plan for these queries and, with a cache, for its keys and these. With a cache the keys and
        values of the tokens are appended to it.
        """
        x = self.model(tokens, plan, cache, impl, last_only)
        return linear(x, self.model.embed_tokens.weight) if self.config.tie_word_embeddings else self.lm_head(x)


def compile_dense(model):
    """Let torch.compile fuse all of a Llama but its attention, in place: takes about a minute at the first tokens.

    Raises ValueError where there is no C++ compiler.
    """
    if not any(map(shutil.which, ("g++", "clang++", "c++", "cl"))):
        raise ValueError("torch.compile needs a C++ compiler (g++ or clang++), and there is none")
    for block in model.model.layers:
        for part in (block.input_layernorm, block.post_attention_layernorm, block.mlp):
            part.compile(dynamic=True)


class KVCache:
    """Un-rotated keys and values of every layer, (B, Hkv, size, D) each; size doubles where it was too small.

    Un-rotated, because the position of a cached key depends on the method, the region and the query that looks at it.
    After two appends of 5 and 3 tokens, append returns views of 8 tokens and len(cache) is 8.
    """

    def __init__(self, config, size=64):
        self.size, self.length = max(size, 1), [0] * config.num_hidden_layers
        self.k, self.v = [None] * config.num_hidden_layers, [None] * config.num_hidden_layers
        self.kept = [TurnedKeys() for _ in self.k]  # and what decoding wants rotated

    def __len__(self):
        return self.length[-1]

    def cut(self, length):
        """Forget all but the first `length` tokens."""
        self.length = [length] * len(self.length)
        for kept in self.kept:
            kept.cut(length)

    def append(self, layer, k, v):
        """Store k, v (B, Hkv, T, D) after what the layer holds; returns views of all its keys and values."""
        old, new = self.length[layer], self.length[layer] + k.shape[2]
        while new > self.size:
            self.size *= 2
        for held, fresh in ((self.k, k), (self.v, v)):
            if held[layer] is None or held[layer].shape[2] < new:
                held[layer] = with_room((fresh if old == 0 else held[layer])[:, :, :old], self.size)
            held[layer][:, :, old:new] = fresh
        self.length[layer] = new
        return self.k[layer][:, :, :new], self.v[layer][:, :, :new]


# ---------------------------------------------------------------------------------------------------------------------
# reading a checkpoint folder

def load(path, dtype=torch.float32, device="cpu", train_len=None):
    """(Llama, tokenizer) of a Hugging Face folder; dtype None keeps the stored type. train_len overrides L.

    Raises FileNotFoundError or ValueError, naming the file and the tensor, for anything missing, extra or misshapen.
    """
    config = Config.from_hf(path, train_len)
    tokenizer = load_tokenizer(path, config)
    return load_model(path, config, dtype, device), tokenizer


def load_model(path, config, dtype=None, device="cpu"):
    """The Llama of a folder. Where neither type nor device changes, weights that would fill more than a quarter of the
    free memory stay memory-mapped files; smaller ones are copied, as decoding reads memory of its own faster."""
    with torch.device("meta"):
        model = Llama(config)
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    files, state = weight_files(Path(path)), {}
    sizes = {file: file.stat().st_size if file.is_file() else 0 for file in files}
    copied = sum(sizes.values()) < available_memory() / 4
    for file in sorted(files, key=sizes.get, reverse=True):  # what is mapped while it is copied gets smaller
        state.update(read_tensors(file, files[file], wanted, config, dtype, device, copied))
    missing = sorted(wanted.keys() - state.keys())
    if missing:
        raise ValueError(f"{path}: the checkpoint lacks {len(missing)} tensors, among them {missing[0]}")
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def weight_files(path):
    """{safetensors file: tensor names it should hold, or None for whatever is there}."""
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.is_file():
        return {single: None}
    if index.is_file():
        files, places = {}, read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
            raise ValueError(f"{index}: no weight_map from tensor names to files")
        for name, file in places.items():
            files.setdefault(path / file, []).append(name)
        return files
    pickles = sorted(p.name for ending in ("*.bin", "*.pth", "*.pt") for p in path.glob(ending))
    if pickles:
        raise ValueError(f"{path}: {pickles[0]} is a pickle, which can run code when read; convert it to safetensors")
    raise FileNotFoundError(f"{path}: no model.safetensors and no model.safetensors.index.json in this folder")


def available_memory():
    """Bytes of memory that are free, or what most machines have."""
    try:
        return 1024 * int(next(x for x in open("/proc/meminfo") if x.startswith("MemAvailable")).split()[1])
    except (OSError, StopIteration):
        return 8 * 2 ** 30


def read_tensors(file, names, wanted, config, dtype, device, copied=False):
    """{name: tensor} from one file, each checked by name and shape before it is read."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: the index names this file, but it is not there")
    out = {}
    try:
        with safetensors.safe_open(file, framework="pt", device="cpu") as f:
            held = set(f.keys())
            for name in sorted(held if names is None else names):
                if name not in held:
                    raise ValueError(f"{file}: the index says that {name} is here, but it is not")
                if name.endswith("rotary_emb.inv_freq") or name == "lm_head.weight" and config.tie_word_embeddings:
                    continue
                shape = tuple(f.get_slice(name).get_shape())
                if name not in wanted:
                    raise ValueError(f"{file}: unexpected tensor {name} {shape}")
                if shape != wanted[name]:
                    raise ValueError(f"{file}: {name} has shape {shape}, config.json implies {wanted[name]}")
                if f.get_slice(name).get_dtype() not in ("F64", "F32", "BF16", "F16"):
                    raise ValueError(f"{file}: {name} is not of a float type, and quantised weights are not supported")
                out[name] = read_tensor(file, name, dtype, device, copied)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file}: not a whole safetensors file ({error})") from None
    return out


def read_tensor(file, name, dtype, device, copied):
    """One tensor, mapped to the file or copied from it; its file is opened for it alone, so that no more of it is held
    than is in use."""
    with safetensors.safe_open(file, framework="pt", device="cpu") as f:
        held = f.get_tensor(name)
        tensor = held.to(device=device, dtype=dtype)
        return tensor.clone() if copied and tensor is held else tensor


# ---------------------------------------------------------------------------------------------------------------------
# text

def load_tokenizer(path, config):
    """The tokenizer of a folder: tokenizer.model by sentencepiece, or tokenizer.json by the optional tokenizers."""
    path = Path(path)
    if (path / "tokenizer.model").is_file():
        import sentencepiece
        try:
            core = sentencepiece.SentencePieceProcessor(model_file=str(path / "tokenizer.model"))
        except (RuntimeError, OSError):
            raise ValueError(f"{path / 'tokenizer.model'}: not a sentencepiece model") from None
        return Tokenizer(core.encode, core.decode, config.bos_token_id)
    if (path / "tokenizer.json").is_file():
        try:
            import tokenizers
        except ImportError:
            raise ValueError(f"{path}: tokenizer.json needs the tokenizers package (pip install tokenizers)") from None
        core = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
        return Tokenizer(lambda text: core.encode(text, add_special_tokens=False).ids, core.decode, config.bos_token_id)
    raise FileNotFoundError(f"{path}: no tokenizer.model and no tokenizer.json in this folder")


class Tokenizer:
    """Text to token ids and back. Does add BOS, once; does not know chat templates."""

    def __init__(self, encode, decode, bos_id):
        self._encode, self._decode, self.bos_id = encode, decode, bos_id

    def encode(self, text, bos=True):
        """Token ids, with BOS in front unless bos is False or the model has none. A leading "<s>" is not doubled."""
        if bos and self.bos_id is not None:
            return [self.bos_id] + self._encode(text.removeprefix("<s>"))
        return self._encode(text)

    def decode(self, ids):
        return self._decode(list(ids))

    def stream(self, ids, context=()):
        """Yield the text of ids piece by piece as they come, spaces kept, no character split; context: the ids before.

        A token's text depends on its neighbours (sentencepiece drops a leading space, an emoji is four byte tokens), so
        what is new is the difference of two decodings of the last few tokens; an unfinished character waits.
        """
        held = list(context)[-8:]  # decoded before; gives the first new token its space
        shown = len(held)
        for token in ids:
            held.append(token)
            before, now = self._decode(held[:shown]), self._decode(held)
            if len(now) > len(before) and not now.endswith("\ufffd") or len(held) - shown > 8:
                yield now[len(before):]
                held, shown = held[shown:], len(held) - shown
        yield self._decode(held)[len(self._decode(held[:shown])):]
