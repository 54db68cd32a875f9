"""Hugging Face checkpoint folders: config.json and safetensors, read and checked.

Does: find a folder, read the fields that shape a LLaMA, or one of FAMILIES, and its positions, read weights (one file
or sharded), each tensor checked by name, shape and type before it is read. Does not: build the network (model.py), read
the tokenizer (tokenizer.py), or unpickle anything.

    fields = config_fields("llama-7b")                    # for config.Config(**fields)
    state = read_weights("llama-7b", shapes)              # {name: tensor} for the {name: shape} that is wanted
"""
import json
import os
import re
import warnings
from contextlib import contextmanager
from pathlib import Path

import safetensors
import torch

from frequencies import FREQUENCIES, UNROTATED, whole
from positions import parameters

# rope_type in config.json -> the row of FREQUENCIES that computes it
ROPE_TYPES = {"default": "rope", "linear": "pi", "dynamic": "dynamic-ntk", "yarn": "yarn", "llama3": "llama3",
              "longrope": "longrope"}
ENCODINGS = ("rope", *UNROTATED)     # values of our key position_encoding
UNFINISHED = "training-state.pt"     # in a folder that train.py has not finished; it writes and deletes it
NEUTRAL = ("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor",
           "finetuned")                # keys of rope_scaling that every type has, or that change no number
FAMILIES = {  # model_type in config.json: what its network has that a LLaMA's has not, as fields of config.Config
    "llama":   {},
    "mistral": {},
    "qwen2":   {"qkv_bias": True},
    "qwen3":   {"qk_norm": True},
    "smollm3": {},
}
ABSENT = {  # and what its config.json means where it lacks these keys
    "llama":   {},
    "mistral": {"sliding_window": 4096},
    "qwen2":   {"sliding_window": 4096, "max_window_layers": 28, "max_position_embeddings": 32768},
    "qwen3":   {"sliding_window": 4096, "max_window_layers": 28, "max_position_embeddings": 32768, "head_dim": 128},
    "smollm3": {"no_rope_layer_interval": 4, "max_position_embeddings": 32768, "rope_theta": 2e6,
                "tie_word_embeddings": True},
}
LOCAL = {  # kind of layer in config.json's layer_types: the method that it is, its setting, and the key with its value
    "sliding_attention": ("sliding", "window", "sliding_window"),
    "chunked_attention": ("chunked", "chunk", "attention_chunk_size"),
}
FLOAT_TYPES = ("F64", "F32", "BF16", "F16")
INTEGER_TYPES = {"int8": ("I8",), "int4": ("U8",)}          # of the tensors of these names in quantize.py's folders
QUANTIZATIONS = {8: {"bits": 8}, 4: {"bits": 4, "group": 32}}  # values of our key quantization, which it writes
MOST_LAYERS = 10 ** 4       # that a config.json may have; lists of them are made before a network is


def find_checkpoint(name):
    """The folder of a checkpoint: name itself, or checkpoints/name here or beside this file. FileNotFoundError."""
    places = [Path(name), Path("checkpoints") / name, Path(__file__).parent / "checkpoints" / name]
    for place in places:
        if place.is_dir():
            return place
    if Path(name).is_file():
        raise ValueError(f"{name}: a file; a checkpoint is a folder in the Hugging Face layout, with config.json and "
                         "safetensors (GGUF is not read)")
    raise FileNotFoundError(f"no checkpoint folder {name} (looked at {', '.join(map(str, places))})")


def refuse_unfinished(path):
    """ValueError for a folder that train.py is not done with."""
    if (Path(path) / UNFINISHED).exists():
        raise ValueError(f"{path}: an unfinished run of train.py; the same command finishes it")


def own_file(folder, name):
    """folder/name; ValueError where that lies, or links, outside of the folder. A snapshot in Hugging Face's cache may
    link to the blobs beside it."""
    file = Path(folder) / name
    root = Path(os.path.realpath(folder))
    if root.parent.name == "snapshots":
        root = root.parent.parent
    place = Path(os.path.realpath(file))
    if not place.is_relative_to(root):
        raise ValueError(f"{file}: outside of its folder, at {place}; a checkpoint's files have to be in it")
    return file


def read_json(path):
    """The JSON object in a file; FileNotFoundError or ValueError that names it."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder")
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent}: no {path.name} in this folder")
    own_file(path.parent, path.name)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{path}: not JSON that anybody wrote: nested too deep") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: not a JSON object")
    return data


# ---------------------------------------------------------------------------------------------------------------------
# config.json

def config_fields(path, train_len=None):
    """The keyword arguments of config.Config for a checkpoint folder; train_len overrides the training length L.

    Raises ValueError or FileNotFoundError that names the file and what is missing or unsupported.
    """
    file = Path(path) / "config.json"
    raw = read_json(file)
    stored = stored_tensors(Path(path))
    try:
        check_layers(raw.get("num_hidden_layers"), stored)
        fields = fields_of(raw, train_len)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: {error}") from None
    check_widths(fields, stored)
    return fields | generation_eos(path, fields["vocab_size"])


def check_layers(layers, stored):
    """ValueError for a num_hidden_layers that no model has, or that is not that of the tensors stored. Comes before
    anything is made for each layer."""
    if whole("num_hidden_layers", layers) > MOST_LAYERS:
        raise ValueError(f"num_hidden_layers {layers} is more than {MOST_LAYERS}")
    numbers = [int(found[1]) for found in (re.match(r"model\.layers\.(\d{1,9})\.", name) for name in stored) if found]
    if numbers and max(numbers) >= layers:
        raise ValueError(f"num_hidden_layers is {layers}, but there are weights of layer {max(numbers)}")
    if numbers and max(numbers) + 1 < layers:
        raise ValueError(f"num_hidden_layers is {layers}, but there are weights of {max(numbers) + 1} layers")


def check_widths(fields, stored):
    """ValueError, as of read_tensors, where the sizes in a config.json are not those of the tensors stored. Comes
    before a network of these sizes is planned."""
    hidden = fields["hidden_size"]
    head = whole("head_dim", fields["head_dim"])
    key_heads = whole("num_key_value_heads", fields["num_key_value_heads"])
    attention = "model.layers.0.self_attn"
    wanted = {"model.embed_tokens.weight": (fields["vocab_size"], hidden),
              f"{attention}.q_proj.weight": (fields["num_attention_heads"] * head, hidden),
              f"{attention}.k_proj.weight": (key_heads * head, hidden),
              "model.layers.0.mlp.gate_proj.weight": (fields["intermediate_size"], hidden)}
    for name in wanted.keys() & stored.keys():
        check_tensor(*stored[name], shapes=wanted)


def generation_eos(path, vocab_size):
    """{"eos_token_id": ids} that end a text by generation_config.json, which goes before config.json; {} where it does
    not say. ValueError for what are no token ids."""
    file = Path(path) / "generation_config.json"
    value = read_json(file).get("eos_token_id") if file.is_file() else None
    if value is None:
        return {}
    tokens = eos_tokens(value)
    if not all(isinstance(token, int) and 0 <= token < vocab_size for token in tokens):
        raise ValueError(f"{file}: eos_token_id {value!r} is outside the vocabulary of {vocab_size}")
    return {"eos_token_id": tokens}


SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
OPTIONAL = ("num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings",
            "attention_bias", "mlp_bias", "cosine_attention")


def fields_of(raw, train_len=None):
    """The keyword arguments of config.Config for the contents of a config.json."""
    kind = raw.get("model_type", "llama")
    activation = raw.get("hidden_act", "silu")
    if kind not in FAMILIES or activation != "silu":
        raise ValueError(f"model_type {kind} with hidden_act {activation} is none of {', '.join(FAMILIES)} with silu")
    raw = {**ABSENT[kind], **raw}
    fields = {name: whole(name, raw.get(name)) for name in SIZES}
    fields |= {name: raw[name] for name in OPTIONAL if raw.get(name) is not None}
    heads = raw["num_attention_heads"]
    fields.setdefault("num_key_value_heads", heads)
    fields.setdefault("head_dim", raw["hidden_size"] // heads)
    fields["bos_token_id"] = raw.get("bos_token_id", 1)
    fields["eos_token_id"] = eos_tokens(raw.get("eos_token_id", 2))
    fields["dtype"] = str(raw.get("dtype") or raw.get("torch_dtype") or "float32")
    fields["bits"] = stored_bits(raw)
    fields |= FAMILIES[kind]
    fields["layer_methods"] = layer_methods(kind, raw)
    fields |= position_fields(raw)
    fields["train_len"] = train_len or fields["train_len"]
    return fields


def eos_tokens(value):
    """The token ids that end a text, as a tuple: config.json has one, a list or null."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def stored_bits(raw):
    """The bits of weights that quantize.py has written, None for plain weights."""
    found = raw.get("quantization")
    if found is None:
        return None
    for bits, known in QUANTIZATIONS.items():
        if found == known:
            return bits
    raise ValueError(f"unknown quantization {found!r}; known are {', '.join(map(str, QUANTIZATIONS.values()))}")


def layer_methods(kind, raw):
    """For every layer what own_method says of it, () where it says nothing of any.

    Mistral's layers are all local or none; Qwen's from max_window_layers on; SmolLM3's are those without positions, one
    in no_rope_layer_interval; layer_types says otherwise. Qwen and SmolLM3 have use_sliding_window beside the window.
    """
    layers = raw["num_hidden_layers"]
    window = raw.get("sliding_window")
    if kind == "llama" and window:
        raise ValueError(f"a llama has no sliding_window {window}")
    rotary = [1] * layers
    if kind == "smollm3":
        interval = whole("no_rope_layer_interval", raw["no_rope_layer_interval"])
        rotary = raw.get("no_rope_layers") or [(number + 1) % interval for number in range(layers)]
    types = None if kind in ("llama", "mistral") else raw.get("layer_types")
    if types is None:
        types = ["full_attention"] * layers
        for number in range(layers):
            of_qwen = kind.startswith("qwen") and number >= raw["max_window_layers"]
            of_smollm = kind == "smollm3" and not rotary[number]
            is_local = kind == "mistral" or raw.get("use_sliding_window") and (of_qwen or of_smollm)
            if window and is_local:
                types[number] = "sliding_attention"
    if len(types) != layers or len(rotary) < layers:
        raise ValueError(f"layer_types and no_rope_layers are not of {layers} layers")
    own = tuple(own_method(types[number], not rotary[number], raw) for number in range(layers))
    return own if any(own) else ()


def own_method(kind, is_free, raw):
    """What a layer of this kind, without positions if is_free, attends by whatever method is asked for, as text:
    "sliding:window=4096", "nope"; "" where it is rotary and sees all keys, so that the method asked for governs it."""
    if kind == "full_attention":
        return "nope" if is_free else ""
    if kind not in LOCAL:
        raise ValueError(f"layers of kind {kind} are not supported")
    name, setting, source = LOCAL[kind]
    return f"{name}:{setting}={whole(source, raw.get(source))}" + ":freq=nope" * is_free


def position_fields(raw):
    """Config's freq, freq_params, rope_theta and train_len, from rope_scaling or the newer rope_parameters."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"rope_scaling must be an object, not {rope!r}")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise ValueError(f"unknown rope_type {kind!r}; known are {', '.join(ROPE_TYPES)}")
    if (rope.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ValueError("partial_rotary_factor is not supported")
    encoding = raw.get("position_encoding", "rope")
    if encoding not in ENCODINGS:
        raise ValueError(f"unknown position_encoding {encoding!r}, not one of {ENCODINGS}")
    chunked = raw.get("dual_chunk_attention_config") or {}  # Qwen2.5-1M, see geometry.dca_fit
    L = (rope.get("original_max_position_embeddings") or raw.get("original_max_position_embeddings")
         or chunked.get("original_max_position_embeddings") or raw.get("max_position_embeddings", 2048))
    if encoding != "rope":
        return {"freq": encoding, "train_len": L}

    settings = dict(rope)
    if kind == "longrope" and settings.get("factor") is None:
        settings["factor"] = raw.get("max_position_embeddings", L) / L
    if kind != "default" and settings.get("factor") is None:
        raise ValueError(f"rope_type {kind!r} has no factor")
    settings["original_max_position_embeddings"] = L  # --train-len must not bend the frequencies of the checkpoint
    known = parameters(FREQUENCIES[ROPE_TYPES[kind]])
    unknown = [name for name, value in rope.items() if value is not None and name not in (*known, *NEUTRAL)]
    if unknown:
        raise ValueError(f"rope_scaling of type {kind} has {unknown[0]}, which is not supported and may change the "
                         "numbers")
    if kind == "default" and rope.get("factor") not in (None, 1):
        raise ValueError(f"rope_scaling has the factor {rope['factor']}, but no type")
    theta = rope.get("rope_theta")
    if theta is None:
        theta = raw.get("rope_theta")
    return {"freq": ROPE_TYPES[kind], "freq_params": {name: settings[name] for name in known if name in settings},
            "rope_theta": 10000.0 if theta is None else theta, "train_len": L}


# ---------------------------------------------------------------------------------------------------------------------
# weights

def stored_tensors(path):
    """{name: (file, name, shape, type)} of all tensors in the safetensors files of a folder, of their headers alone;
    {} where there are none. ValueError for files that are not whole."""
    if not (path / "model.safetensors").is_file() and not (path / "model.safetensors.index.json").is_file():
        return {}
    stored = {}
    for file in weight_files(path):
        if not file.is_file():
            continue
        with whole_file(file) as f:
            for name in f.keys():
                tensor = f.get_slice(name)
                stored[name] = (file, name, tuple(tensor.get_shape()), tensor.get_dtype())
    return stored


def read_weights(path, shapes, dtype=None, device="cpu"):
    """{name: tensor} for the {name: shape} wanted of a folder; see read_tensors."""
    return dict(read_tensors(path, shapes, dtype, device))


def read_tensors(path, shapes, dtype=None, device="cpu", changes=None, parts=None):
    """Yield (name, tensor) for the {name: shape} wanted of a folder; dtype None keeps the stored type.

    changes: {name: f}; of such a tensor, as it is stored, the items of the dict f(tensor) come instead.
    parts: {name: slices}; of such a tensor only tensor[slices] is read, in memory of its own.
    Where neither type nor device changes, weights that would fill more than a quarter of the free memory stay
    memory-mapped files; smaller ones are copied, as decoding reads memory of its own faster.
    Raises ValueError or FileNotFoundError, naming file and tensor, for what is missing, extra, misshapen or of a type
    that is no float. Warns of tensors that hold NaN or Inf.
    """
    files = weight_files(Path(path))
    copied = weight_bytes(path) < available_memory() / 4
    found = set()
    parts = parts or {}
    spoilt = []
    for file in sorted(files, key=file_size, reverse=True):  # what is mapped while it is copied gets smaller
        for name in checked_names(file, files[file], shapes):
            found.add(name)
            is_changed = changes and name in changes
            kind = None if is_changed else dtype
            tensor = read_tensor(file, name, kind, device, copied and not is_changed, parts.get(name))
            if not is_finite(tensor):
                spoilt.append(name)
            if is_changed:
                yield from changes[name](tensor).items()
            else:
                yield name, tensor
            del tensor      # the reader may be done with it
    if spoilt:
        warnings.warn(f"{path}: NaN or Inf in {len(spoilt)} tensors, {', '.join(spoilt[:3])}: expect nonsense",
                      stacklevel=2)
    missing = sorted(shapes.keys() - found)
    if missing:
        raise ValueError(f"{path}: the checkpoint lacks {len(missing)} tensors, among them {missing[0]}")


def is_finite(tensor, block=2 ** 17):
    """Whether all numbers of a tensor are finite, looked at a block after the other."""
    if not tensor.is_floating_point():
        return True
    return all(bool(part.isfinite().all()) for part in tensor.detach().flatten().split(block))


def weight_files(path):
    """{safetensors file: tensor names it should hold, or None for whatever is there}."""
    single = path / "model.safetensors"
    index = path / "model.safetensors.index.json"
    if single.is_file():
        return {own_file(path, single.name): None}
    if index.is_file():
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
            raise ValueError(f"{index}: no weight_map from tensor names to files")
        files = {}
        for name, file in places.items():
            files.setdefault(own_file(path, file), []).append(name)
        return files
    pickles = sorted(p.name for ending in ("*.bin", "*.pth", "*.pt") for p in path.glob(ending))
    if pickles:
        raise ValueError(f"{path}: {pickles[0]} is a pickle, which can run code when read; convert it to safetensors")
    raise FileNotFoundError(f"{path}: no model.safetensors and no model.safetensors.index.json in this folder")


def weight_bytes(path):
    """Bytes of the weight files of a folder."""
    return sum(file_size(file) for file in weight_files(Path(path)))


def file_size(file):
    return file.stat().st_size if file.is_file() else 0


def available_memory():
    """Bytes of memory that are free, or what most machines have."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    except (OSError, StopIteration):
        return 8 * 2 ** 30


def checked_names(file, names, shapes):
    """The tensors to read from a file, each there, wanted, of its shape and of floats; names None: all it holds."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: the index names this file, but it is not there")
    checked = []
    with whole_file(file) as f:
        held = set(f.keys())
        for name in sorted(held if names is None else names):
            if name not in held:
                raise ValueError(f"{file}: the index says that {name} is here, but it is not")
            tied_head = name == "lm_head.weight" and name not in shapes
            if name.endswith("rotary_emb.inv_freq") or tied_head:
                continue
            tensor = f.get_slice(name)
            check_tensor(file, name, tuple(tensor.get_shape()), tensor.get_dtype(), shapes)
            checked.append(name)
    return checked


@contextmanager
def whole_file(file):
    """An open safetensors file; ValueError that names it, where it is none or a part of one."""
    try:
        with safetensors.safe_open(file, framework="pt", device="cpu") as f:
            yield f
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file}: not a whole safetensors file ({error})") from None


def check_tensor(file, name, shape, dtype, shapes):
    """ValueError unless this tensor is wanted, of the shape that is wanted, and of floats, or of the
    integers that its name says."""
    if name not in shapes:
        raise ValueError(f"{file}: unexpected tensor {name} {shape}")
    if shape != shapes[name]:
        raise ValueError(f"{file}: {name} has shape {shape}, config.json implies {shapes[name]}")
    if dtype not in INTEGER_TYPES.get(name.split(".")[-1], FLOAT_TYPES):
        raise ValueError(f"{file}: {name} is of type {dtype}; quantised weights are read as quantize.py writes them")


def read_tensor(file, name, dtype, device, copied, part=None):
    """One tensor, mapped to the file or copied from it; its file is opened for it alone, so that no more of it is held
    than is in use. part: slices, of which alone a copy is made."""
    with safetensors.safe_open(file, framework="pt", device="cpu") as f:
        if part is not None:  # a mapped view, which along the second dimension does not lie in one piece
            slices = f.get_slice(name)[part].clone(memory_format=torch.contiguous_format)
            return slices.to(device=device, dtype=dtype if slices.is_floating_point() else None)
        mapped = f.get_tensor(name)
    tensor = mapped.to(device=device, dtype=dtype if mapped.is_floating_point() else None)
    return tensor.clone() if copied and tensor is mapped else tensor
