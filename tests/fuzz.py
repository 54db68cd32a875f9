"""Bad input by the thousand: seeded mutations of everything that generate.py and eval_passkey.py read, in one process.

Does: make a small random checkpoint, spoil it or what is asked of it, run the script's own run(argv), and judge how
that ends. A case ran (exit 0) or was refused (exit 2, one clear line on stderr); all else fails, and so does a refusal
or a run where the mutation says that the other is right, a run with another answer where nothing was spoilt, ten
seconds of work without an end, 2 GiB more memory, and a dead interpreter. Does not: write outside of its own folder.

    python tests/fuzz.py --n 2000 --seed 0              # counts by kind and outcome; exit code 1 where a case fails
    python tests/fuzz.py --seed 0 --case 137 --show     # one of them again, with its command and what it wrote
"""
import argparse
import ast
import io
import json
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import load_file, save_file

import chat
import eval_passkey
import generate
from cli import process_bytes, run_command
from frequencies import FREQUENCIES, SCALES
from geometry import METHODS
from positions import parameters

TINY = Path(__file__).resolve().parents[1] / "checkpoints" / "tiny"
SIZES = {"vocab_size": 1024, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}
CONFIG = {"model_type": "llama", "hidden_act": "silu", **SIZES, "rms_norm_eps": 1e-5, "rope_theta": 500.0,
          "max_position_embeddings": 32, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2}
SHORT = ["--max-new-tokens", "2"]
PROMPT = ["--prompt", "The sky is blue. The grass is green.", *SHORT]
ODD = [0, -1, 1, 2, 3, 7, 10 ** 8, 2 ** 31, 2 ** 63, 10 ** 400, -2 ** 70, 0.5, 1.0, -0.0, 1e308, float("nan"),
       float("inf"), True, False, None, "", "x", "\ud800", "\x00", [], {}, [1], {"a": 1}, [[]], [None], "1", "null"]
SECONDS = 10
MEMORY = 2 * 2 ** 30


class Hang(BaseException):
    """A case that does not end."""


# ---------------------------------------------------------------------------------------------------------------------
# a sound checkpoint

def make_checkpoint(folder):
    """A random LLaMA of two layers, 100 kB, with the tokenizer of the shipped model."""
    folder.mkdir()
    write_json(folder / "config.json", CONFIG)
    shutil.copy(TINY / "tokenizer.model", folder)
    shutil.copy(TINY / "tokenizer_config.json", folder)
    torch.manual_seed(0)
    save_file({name: 0.3 * torch.randn(shape) for name, shape in shapes(SIZES).items()}, folder / "model.safetensors")


def shapes(sizes):
    """{name: shape} of the tensors of a LLaMA of these sizes."""
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    query = sizes["num_attention_heads"] * sizes["head_dim"]
    key = sizes["num_key_value_heads"] * sizes["head_dim"]
    found = {"model.embed_tokens.weight": (sizes["vocab_size"], hidden), "model.norm.weight": (hidden,),
             "lm_head.weight": (sizes["vocab_size"], hidden)}
    for number in range(sizes["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        found |= {f"{layer}.input_layernorm.weight": (hidden,), f"{layer}.post_attention_layernorm.weight": (hidden,),
                  f"{layer}.self_attn.q_proj.weight": (query, hidden),
                  f"{layer}.self_attn.k_proj.weight": (key, hidden),
                  f"{layer}.self_attn.v_proj.weight": (key, hidden),
                  f"{layer}.self_attn.o_proj.weight": (hidden, query),
                  f"{layer}.mlp.gate_proj.weight": (inner, hidden), f"{layer}.mlp.up_proj.weight": (inner, hidden),
                  f"{layer}.mlp.down_proj.weight": (hidden, inner)}
    return found


def write_json(file, data):
    file.write_text(json.dumps(data), encoding="utf-8")


def change_config(folder, **changes):
    write_json(folder / "config.json", {**CONFIG, **changes})


def change_tensors(folder, changes):
    """The weights with these added, replaced or, where None, left out."""
    tensors = {**load_file(folder / "model.safetensors"), **changes}
    save_file({name: t for name, t in tensors.items() if t is not None}, folder / "model.safetensors")


def read_header(file):
    """(header, data) of a safetensors file."""
    raw = file.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8:8 + size]), raw[8 + size:]


def write_header(file, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def spoil(rng, raw):
    """Bytes cut off, flipped, removed, doubled or replaced."""
    raw = bytearray(raw)
    kind = rng.randrange(6)
    if kind == 0:
        return bytes(raw[:rng.randrange(len(raw))])
    if kind == 1:
        return b""
    if kind == 2:
        return rng.randbytes(rng.randrange(1, 3000))
    for _ in range(rng.choice([1, 3, 30])):
        place = rng.randrange(len(raw))
        if kind == 3:
            raw[place] = rng.randrange(256)
        elif kind == 4:
            del raw[place:place + rng.randrange(1, 9)]
        else:
            raw[place:place] = raw[place:place + rng.randrange(1, 99)]
    return bytes(raw)


# ---------------------------------------------------------------------------------------------------------------------
# kinds of cases: (rng, folder) -> (arguments of generate.py, what is right). The latter is "refused", "ran", "same"
# (ran, with the answer of the sound checkpoint), a text that stderr must hold, or None where more than one may be.

def header_length(rng, folder):
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    size = rng.choice([0, 1, 7, 2 ** 63, 2 ** 64 - 1, 10 ** 8, len(raw), rng.randrange(len(raw))])
    file.write_bytes(struct.pack("<Q", size) + raw[8:])
    return PROMPT, "refused"


def header_lies(rng, folder):
    file = folder / "model.safetensors"
    header, data = read_header(file)
    name = rng.choice([name for name in header if name != "__metadata__"])
    entry = header[name]
    begin, end = entry["data_offsets"]
    lies = {"data_offsets": [[begin, end + 4], [end, begin], [0, 0], [-1, 3], [begin, 2 ** 60], [begin + 4, end + 4],
                             [2 ** 63, 2 ** 64], [], "x", None, [begin]],
            "shape": [[2 ** 40, 2 ** 40], [-1], [], [0], "x", None, [10 ** 30], entry["shape"] + [2], [1.5]],
            "dtype": ["F64", "I8", "F8_E4M3", "BOOL", "x", None, 7, "F16"]}
    key = rng.choice(list(lies))
    entry[key] = rng.choice(lies[key])
    write_header(file, header, data)
    return PROMPT, "refused"


def header_overlap(rng, folder):
    file = folder / "model.safetensors"
    header, data = read_header(file)
    one, other = rng.sample(sorted(name for name in header if name.endswith("norm.weight")), 2)
    header[one] = header[other]
    write_header(file, header, data)
    return PROMPT, "refused"


def header_junk(rng, folder):
    file = folder / "model.safetensors"
    header, data = read_header(file)
    junk = [b"", b"{", b"[]", b"null", b"{}", b"[" * 10 ** 5, b"\xff" * 50, spoil(rng, json.dumps(header).encode())]
    write_header(file, rng.choice(junk), data)
    return PROMPT, None


def weights_spoilt(rng, folder):
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    file.write_bytes(rng.choice([b"", raw[:rng.randrange(len(raw))], raw + b"x", rng.randbytes(5000)]))
    return PROMPT, "refused"


def tensors_changed(rng, folder):
    name = rng.choice(sorted(shapes(SIZES)))
    shape = shapes(SIZES)[name]
    wrong = [{name: None}, {name + ".x": torch.zeros(3)}, {name: torch.zeros(*shape, 1)}, {name: torch.zeros(0)},
             {name: torch.zeros(shape, dtype=torch.int64)}, {name: torch.zeros(shape[0] + 1, *shape[1:])},
             {"model.layers.2.mlp.up_proj.weight": torch.zeros(24, 16)}]
    change_tensors(folder, rng.choice(wrong))
    return PROMPT + rng.choice([[], ["--quantize", "int8"], ["--quantize", "int4"]]), "refused"


def weights_not_finite(rng, folder):
    name = rng.choice(sorted(shapes(SIZES)))
    weight = load_file(folder / "model.safetensors")[name]
    weight.view(-1)[rng.randrange(weight.numel())] = rng.choice([float("nan"), float("inf"), -float("inf")])
    change_tensors(folder, {name: weight})
    return PROMPT + rng.choice([[], ["--dtype", "bfloat16"], ["--quantize", "int8"]]), name


def shard(folder, changes):
    """Weights in two files with an index; changes: {tensor name: file} that is not true."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    places = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(names)}
    for file in set(places.values()):
        save_file({name: tensors[name] for name in names if places[name] == file}, folder / file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": {**places, **changes}})


def index_lies(rng, folder):
    shutil.copy(folder / "model.safetensors", folder.parent / "outside.safetensors")
    lies = ["../outside.safetensors", str(folder.parent / "outside.safetensors"), "model.safetensors.index.json",
            "none.safetensors", "", ".", "..", "/dev/zero", "/proc/self/mem", "x" * 300, "a\x00b", "config.json",
            7, None, []]
    shard(folder, {"model.norm.weight": rng.choice(lies)})
    return PROMPT, "refused"


def index_junk(rng, folder):
    shard(folder, {})
    junk = ["", "{", "[]", "null", "{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": null}',
            "[" * 10 ** 5, '{"a":' * 10 ** 5]
    (folder / "model.safetensors.index.json").write_text(rng.choice(junk))
    return PROMPT, "refused"


def link_out(rng, folder):
    name = rng.choice(["model.safetensors", "config.json", "tokenizer.model", "tokenizer_config.json"])
    outside = folder.parent / f"outside-{name}"
    shutil.move(folder / name, outside)
    (folder / name).symlink_to(rng.choice([outside, f"../{outside.name}"]))
    return PROMPT, "refused"


def link_odd(rng, folder):
    """To itself, to a device, to nowhere, to a folder."""
    name = rng.choice(["model.safetensors", "config.json", "tokenizer.model"])
    (folder / name).unlink()
    (folder / name).symlink_to(rng.choice([name, "/dev/zero", "nowhere", ".", "/dev/stdin"]))
    return PROMPT, "refused"


def nothing_wrong(rng, folder):
    """What changes no number: shards, a link inside the folder, keys that nobody reads."""
    kind = rng.randrange(4)
    if kind == 0:
        shard(folder, {})
    elif kind == 1:
        (folder / "model.safetensors").rename(folder / "weights")
        (folder / "model.safetensors").symlink_to("weights")
    elif kind == 2:
        change_config(folder, **{"".join(rng.choices("abcdef", k=9)): rng.choice([None, 1, "x"])})
    return PROMPT, "same"


def config_size(rng, folder):
    """A size that the tensors there contradict."""
    name = rng.choice(sorted(SIZES))
    values = [value for value in ODD if value != SIZES[name] or isinstance(value, bool)]
    if name in ("head_dim", "num_key_value_heads"):
        values = [value for value in values if value is not None]   # which then has a default
    change_config(folder, **{name: rng.choice(values)})
    return PROMPT + rng.choice([[], [], ["--quantize", "int4"], ["--explain"]]), "refused"


def config_other(rng, folder):
    names = [name for name in CONFIG if name not in SIZES] + [
        "sliding_window", "attention_bias", "mlp_bias", "torch_dtype", "dtype", "position_encoding", "quantization",
        "layer_types", "cosine_attention", "partial_rotary_factor", "original_max_position_embeddings",
        "dual_chunk_attention_config", "rope_parameters", "rope_scaling", "text_config"]
    changes = {name: rng.choice(ODD) for name in rng.sample(names, rng.choice([1, 1, 2]))}
    if rng.random() < 0.3:
        changes["model_type"] = rng.choice(["mistral", "qwen2", "qwen3", "smollm3"])
    change_config(folder, **changes)
    return PROMPT, None


def config_rope(rng, folder):
    rope = {"rope_type": rng.choice(["linear", "dynamic", "yarn", "llama3", "longrope", "default", *ODD])}
    names = ["factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "short_factor",
             "long_factor", "low_freq_factor", "high_freq_factor", "attention_factor", "rope_theta", "truncate"]
    for name in rng.sample(names, rng.randrange(1, 6)):
        rope[name] = rng.choice([*ODD, [1.0, 1.0], [2.0, 0.0], [1, "x"], 4.0])
    change_config(folder, rope_scaling=rng.choice([rope, rope, rope, *ODD]))
    return PROMPT, None


def config_layers(rng, folder):
    """Kinds of layers, of every family that has them."""
    changes = {"model_type": rng.choice(["qwen2", "qwen3", "smollm3", "mistral"]), "use_sliding_window": True}
    for name in ("sliding_window", "max_window_layers", "no_rope_layer_interval", "no_rope_layers", "layer_types"):
        if rng.random() < 0.5:
            changes[name] = rng.choice([*ODD, ["sliding_attention"] * 2, ["x", 7], [0, 1], "ab"])
    change_config(folder, **changes)
    return PROMPT, None


def config_missing(rng, folder):
    name = rng.choice(["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"])
    write_json(folder / "config.json", {key: value for key, value in CONFIG.items() if key != name})
    return PROMPT, "refused"


def config_junk(rng, folder):
    file = folder / rng.choice(["config.json", "generation_config.json", "tokenizer_config.json"])
    junk = ["", "{", "[]", "null", "7", '"x"', "[" * 10 ** 5, '{"a":' * 10 ** 5, "\x00" * 100, "9" * 10 ** 5,
            '{"eos_token_id": 1e400}x', "nan"]
    file.write_text(rng.choice(junk))
    return PROMPT, "refused"


def eos(rng, folder):
    write_json(folder / "generation_config.json", {"eos_token_id": rng.choice([*ODD, [2, 3], [-1], [2, "x"]])})
    return PROMPT, None


def vocabulary(rng, folder):
    """An embedding that has fewer rows than the tokenizer has pieces."""
    vocab = rng.choice([3, 64, 1000, 1023])
    change_vocabulary(folder, vocab)
    return PROMPT, "refused"


def vocabulary_larger(rng, folder):
    """One that has far more: no words for what the model writes."""
    change_vocabulary(folder, 5000)
    return PROMPT, "warning: "


def change_vocabulary(folder, size):
    weight = torch.randn(size, SIZES["hidden_size"])
    change_tensors(folder, {"model.embed_tokens.weight": weight, "lm_head.weight": weight.clone()})
    change_config(folder, vocab_size=size)


def tokenizer_spoilt(rng, folder):
    file = folder / "tokenizer.model"
    file.write_bytes(spoil(rng, file.read_bytes()))
    return PROMPT, None


def tokenizer_none(rng, folder):
    (folder / "tokenizer.model").unlink()
    file = rng.choice(["tokenizer.model", "tokenizer.json"])
    junk = [b"", b"{}", b"[]", b"null", b"\x00", b"[" * 10 ** 5, rng.randbytes(500), b'{"model": {"type": "BPE"}}',
            b'{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}', b'{"added_tokens": 7}']
    if rng.random() < 0.9:
        (folder / file).write_bytes(rng.choice(junk))
    return PROMPT, "refused"


def tokenizer_words(rng, folder):
    """A tokenizer.json, sound or nearly so, of a few words."""
    (folder / "tokenizer.model").unlink()
    model = {"type": "WordLevel", "vocab": {"x": 0, "a": rng.choice([1, 5, 1023, 1024, 2 ** 31, 2 ** 32 - 1])},
             "unk_token": rng.choice(["x", "y", None])}
    data = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
            "pre_tokenizer": rng.choice([None, {"type": "Whitespace"}]), "post_processor": None, "decoder": None,
            "model": model}
    if rng.random() < 0.5:
        data[rng.choice(sorted(data))] = rng.choice(ODD)
    write_json(folder / "tokenizer.json", data)
    return PROMPT, None


def tokenizer_settings(rng, folder):
    names = ["add_bos_token", "bos_token", "eos_token", "added_tokens_decoder", "chat_template", "model_max_length"]
    settings = {name: rng.choice([*ODD, {"5": {"content": "<x>"}}, {"x": 1}, {"content": "<s>"}])
                for name in rng.sample(names, 3)}
    write_json(folder / "tokenizer_config.json", settings)
    if rng.random() < 0.3:
        write_json(folder / "added_tokens.json", rng.choice([*ODD, {"<x>": 5}, {"<x>": -7}, {"<x>": 10 ** 9}]))
    return PROMPT + rng.choice([[], ["--chat"]]), None


def template(rng, folder):
    """Chat templates; those that loop are stopped."""
    loops = ["{% for i in range(10**9) %}{% endfor %}", "{% for i in range(99999) %}{{ 'x' * 10**5 }}{% endfor %}",
             "{{ 'x' * 10**10 }}", "{{ 9 ** (9 ** 9) }}"]
    broken = ["{% if %}", "{{ x.y.z }}", "{{ raise_exception('no') }}", "{{ ''.__class__.__mro__ }}",
              "{% include 'config.json' %}", "{{ messages[9].content }}", "{{ 1 / 0 }}", "{" * 999, "{{" + "(" * 9999]
    odd = ["", "x", "{{ messages }}", "{{ bos_token }}{{ messages[0].content }}", "\x00", "{{ '\x00' }}", "\ufdd0"]
    source, right = rng.choice([*[(text, "refused") for text in loops + broken], *[(text, None) for text in odd]])
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    write_json(folder / "tokenizer_config.json", {**settings, "chat_template": source})
    return ["--chat", *PROMPT], right


def prompt_file(rng, folder):
    file = folder.parent / "prompt.txt"
    texts = {b"": "refused", b" \n": "refused", b"\xff\xfe": "refused", b"a\xc3": "refused", b"\xed\xa0\x80": "refused",
             b"a": "ran", b"a\x00b\x00": "ran", b"\x00": "ran", "\U0001f600\ufdd0\ue000\ufffd".encode(): "ran",
             b"<s></s><unk>": "ran", b"x" * 3000: "ran", b"\xef\xbb\xbfa": "ran", b"\r\n\x1b[31m.": "ran"}
    raw = rng.choice(sorted(texts))
    file.write_bytes(raw)
    return ["--prompt-file", str(file), *SHORT], texts[raw]


def prompt_text(rng, folder):
    texts = {"": "refused", "  ": "refused", "a\udcff": "refused", "\ud800": "refused", "a": "ran",
             "\u202e\u0301": "ran"}
    text = rng.choice(sorted(texts))
    is_system = rng.random() < 0.3
    return ["--system" if is_system else "--prompt", text, *SHORT], "refused" if is_system else texts[text]


def prompt_ids(rng, folder):
    texts = {"": "refused", "1024": "refused", "-1": "refused", "1,,2": "refused", "x": "refused", "9" * 300: "refused",
             "1,99999999999999999999": "refused", "1.5": "refused", "0": "ran", "1023": "ran", "1,2,3": "ran",
             ",".join(["5"] * 2000): "ran"}
    text = rng.choice(sorted(texts))
    method = rng.choice([[], ["--method", "mesa"], ["--method", "self-extend"]])
    return [f"--prompt-ids={text}", *SHORT, *method], texts[text]


def prompts(rng, folder):
    file = folder.parent / "prompts.jsonl"
    bad = [b"{}", b"x", b"[]", b"null", b'{"prompt": 7}', b'{"prompt": ""}', b'{"ids": []}', b'{"ids": [1024]}',
           b'{"ids": [-1]}', b'{"ids": [1.5]}', b'{"ids": [true]}', b'{"ids": 7}', b'{"prompt": "\\ud800"}', b"\xff",
           b'{"prompt": "a", "ids": [1]}', b'{"prompt": "a", "seed": -1}', b'{"prompt": "a", "seed": 1e99}',
           b'{"prompt": "a", "seed": 99999999999999999999999}', b"[" * 10 ** 5, b'{"ids": [99999999999999999999]}', b""]
    good = [b'{"prompt": "a\\u0000"}', b'{"ids": [5]}', b'{"prompt": "a", "row": 7, "x": [1]}', b"  "]
    lines = rng.choices(good, k=2) + [b'{"ids": [9, 8]}']
    is_bad = rng.random() < 0.6
    if is_bad:
        lines.insert(rng.randrange(3), rng.choice(bad[:-1]))
    file.write_bytes(b"\n".join(lines))
    argv = ["--prompts", str(file), "--out", str(folder.parent / "answers.jsonl"), *SHORT]
    return argv, "refused" if is_bad else "ran"


def answers_cut(rng, folder):
    """A file of answers that was cut anywhere ends as if it had not been."""
    file = folder.parent / "prompts.jsonl"
    file.write_text('{"ids": [5, 6]}\n{"ids": [7]}\n{"ids": [9, 8, 7]}\n')
    argv = ["--prompts", str(file), "--out", str(folder.parent / "answers.jsonl"), *SHORT]
    whole = (folder.parent / "answers.whole").read_bytes()
    (folder.parent / "answers.jsonl").write_bytes(whole[:rng.randrange(len(whole) + 1)])
    return argv, "whole"


def answers_junk(rng, folder):
    file = folder.parent / "prompts.jsonl"
    file.write_text('{"ids": [5, 6]}\n')
    whole = (folder.parent / "answers.whole").read_bytes()
    junk = [b"x\n", b"x", b"[]\n", b"null\n", b"\xff\xfe\n", b"\x00", b"[" * 10 ** 5 + b"\n", whole + b"x\n",
            b"7\n" + whole]
    (folder.parent / "answers.jsonl").write_bytes(rng.choice(junk))
    return ["--prompts", str(file), "--out", str(folder.parent / "answers.jsonl"), *SHORT], "refused"


def saved_cache(rng, folder):
    """A saved cache that is none, or is spoilt; its ids and settings have a hash, its numbers have none."""
    file = folder.parent / "cache"
    raw = (folder.parent / "cache.whole").read_bytes()
    size = 8 + struct.unpack("<Q", raw[:8])[0]
    head = spoil(rng, raw[:size])
    file.write_bytes(rng.choice([b"", raw[:rng.randrange(len(raw))], head + raw[size:], rng.randbytes(99),
                                 (folder / "model.safetensors").read_bytes()]))
    return ["--load-cache", str(file), *PROMPT], None


def method_settings(rng, folder):
    name = rng.choice([*METHODS, *METHODS, "x", "", "mesa "])
    geometry, own_freq, own_scale = METHODS.get(name, (None, None, None))
    freq = rng.choice([None, None, *FREQUENCIES])
    scale = rng.choice([None, None, *SCALES])
    known = parameters(geometry, FREQUENCIES.get(freq or own_freq), SCALES.get(scale or own_scale))
    parts = [name]
    for setting in rng.sample([*known, "x"], rng.randrange(min(3, len(known) + 1))):
        value = rng.choice([0, 1, 2, 8, 31, 32, 33, 1000, -1, 0.5, 2.5, "true", "x", "[1,2]", "[]", "nan", "inf",
                            "1e308", "1e999", 2 ** 39, 2 ** 70, "9" * 5000, "(" * 999, "{}", "None", "", "\x00", "'a'",
                            "1_0"])
        parts.append(f"{setting}={value}")
    parts += [f"freq={freq}"] * bool(freq) + [f"attn-scale={scale}"] * bool(scale)
    words = rng.choice([1, 8, 40])
    ids = ",".join(str(rng.randrange(1024)) for _ in range(words))
    return ["--method", ":".join(parts), "--prompt-ids", ids, *SHORT, *rng.choice([[], [], ["--explain"]])], None


FLAGS = {
    "--ckpt": ["", "nowhere", "x.gguf", "/dev/null", "\x00", "x" * 300, "..", "http://a/b", "meta-llama/Llama-2-7b"],
    "--dtype": ["float64", "auto", "bfloat16", "float16", ""], "--device": ["cuda", "mps", "tpu", "cpu", ""],
    "--impl": ["dense", "tiled", "triton", "x"], "--cache-dtype": ["int8", "bfloat16", "int4"],
    "--train-len": ["0", "-1", "1", "2", "8", "x", "99999999999999", "9" * 300],
    "--quantize": ["int8", "int4", "int3"], "--max-new-tokens": ["0", "1", "-3", "x", "99999999999"],
    "--temperature": ["-1", "nan", "inf", "1e-9", "1e300", "x"], "--top-k": ["-1", "1", "99999999999999999999"],
    "--top-p": ["0", "nan", "2", "1e-300"], "--seed": ["-1", "99999999999999999999", "5"],
    "--prefill-chunk": ["0", "1", "99999999999999"], "--rows": ["0", "1", "x"],
    "--set": ["", "=", "a", "a=", "first=", "window=1e9", "x=[", "x=[1,2", "freq=yarn"],
    "--freq": ["", "x", "yarn", "longrope", "alibi"], "--attn-scale": ["", "x", "logn", "none"], "--stop": ["", "a"],
    "--method": ["", ",", ":", "=", "all", "rope,mesa", "mesa:", "mesa:=", "mesa::", "all,mesa"],
    "--prompts": ["nowhere", "/dev/null", "."], "--out": ["/nowhere/x", "."], "--save-cache": ["/nowhere/x", "."],
    "--load-cache": ["nowhere", ".", "/dev/null"], "--prompt-file": ["nowhere", ".", "/dev/null", ""],
    "--threads": ["0", "-1", "x", "1", "99999999999"], "--chat": [None], "--explain": [None], "--quiet": [None],
    "--list-methods": [None], "--x": [None], "x": [None]}


def flags(rng, folder):
    argv = [*PROMPT] if rng.random() < 0.8 else [*SHORT, "--prompt-ids", "5"]
    for flag in rng.sample(sorted(FLAGS), rng.choice([1, 1, 2, 3])):
        value = rng.choice(FLAGS[flag])
        argv += [flag] if value is None else [f"{flag}={value}"]
    return argv, None


def other_formats(rng, folder):
    """A path that is no folder, a folder of another kind of weights."""
    name = rng.choice(["model.gguf", "pytorch_model.bin", "consolidated.00.pth", "model.safetensors"])
    file = folder / name
    if name == "model.safetensors":
        return ["--ckpt", str(file), *PROMPT], "refused"
    (folder / "model.safetensors").rename(file)
    return rng.choice([PROMPT, ["--ckpt", str(file), *PROMPT]]), "refused"


def results_cut(rng, folder):
    """A file of eval_passkey.py that was cut anywhere ends with the rows of one that was not."""
    whole = (folder.parent / "results.whole").read_bytes()
    (folder.parent / "results.jsonl").write_bytes(whole[:rng.randrange(len(whole) + 1)])
    return evaluation(folder.parent / "results.jsonl"), "whole"


def evaluation(results):
    return ["eval_passkey.py", "--methods", "rope", "--lengths", "120,150", "--depths", "1", "--trials", "1",
            "--results", str(results)]


KINDS = [
    header_length, header_lies, header_overlap, header_junk, weights_spoilt, tensors_changed, weights_not_finite,
    index_lies, index_junk, link_out, link_odd, nothing_wrong, other_formats, config_size, config_size, config_other,
    config_other, config_rope, config_layers, config_missing, config_junk, eos, vocabulary, vocabulary_larger,
    tokenizer_spoilt, tokenizer_none, tokenizer_words, tokenizer_settings, prompt_file, prompt_text, prompt_ids,
    prompts, answers_cut, answers_junk, results_cut, saved_cache, method_settings, method_settings, method_settings,
    flags, flags, flags]
SLOW_KINDS = [template]     # each starts a process, and a loop in it ends after a second: one case in a hundred


# ---------------------------------------------------------------------------------------------------------------------
# running and judging

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="this one alone")
    parser.add_argument("--show", action="store_true", help="print every command, and what it wrote")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    numbers = range(args.n) if args.case is None else [args.case]
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        os.chdir(place)
        prepare(place)
        outcomes = run_cases(args, list(numbers), place)
        os.chdir("/")
    counts = Counter((kind, "failed" if end not in ("ran", "refused") else end) for kind, end in outcomes)
    for (kind, end), count in sorted(counts.items()):
        print(f"{kind:20} {end:8} {count}")
    failed = sum(end not in ("ran", "refused") for _, end in outcomes)
    print(f"{len(outcomes)} cases, {failed} failed")
    return 1 if failed else 0


def prepare(place):
    """The sound checkpoint, and the files that cases cut: answers, results, a cache."""
    make_checkpoint(place / "sound")
    (place / "prompts.jsonl").write_text('{"ids": [5, 6]}\n{"ids": [7]}\n{"ids": [9, 8, 7]}\n')
    shutil.copytree(place / "sound", place / "ckpt")
    for argv in (["--prompts", str(place / "prompts.jsonl"), "--out", "answers.whole", *SHORT],
                 evaluation("results.whole"), [*PROMPT, "--save-cache", "cache.whole"], PROMPT):
        code, out, err = outcome(argv, place)
        if code != 0:
            sys.exit(f"a sound run failed: {argv}: {err}")
    (place / "answer").write_text(out)


def run_cases(args, numbers, place):
    """[(kind, how it ended)] of cases by number. A process of its own runs them; where it dies, the next one goes on
    after the case that it died of."""
    outcomes = []
    while len(outcomes) < len(numbers):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            run_here(args, numbers[len(outcomes):], place, writing)
        os.close(writing)
        with os.fdopen(reading) as lines:
            begun = None
            for line in lines:
                if begun is None:
                    begun = line.strip()
                else:
                    outcomes.append((begun, ast.literal_eval(line)))
                    begun = None
        _, status = os.waitpid(child, 0)
        if status != 0:
            number = numbers[len(outcomes)]
            print(f"FAILED seed {args.seed} case {number} {begun}: the interpreter ended with status {status}")
            outcomes.append((begun, "the interpreter died"))
    return outcomes


def run_here(args, numbers, place, report):
    """What the process that runs cases does: two lines for each, its kind and how it ended."""
    import resource
    most = process_bytes("VmSize") + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    chat.SECONDS = 1
    signal.signal(signal.SIGALRM, hang)
    signal.signal(signal.SIGPROF, hang)
    signal.signal(signal.SIGVTALRM, signal.SIG_DFL)
    for number in numbers:
        rng = random.Random(f"{args.seed}-{number}")
        kind = rng.choice(SLOW_KINDS) if rng.random() < 0.01 else rng.choice(KINDS)
        os.write(report, f"{kind.__name__}\n".encode())
        folder = fresh(place)
        argv, right = kind(rng, folder)
        code, out, err = outcome(argv, place)
        end = judge(code, out, err, right, place)
        if args.show or end not in ("ran", "refused"):
            mark = "" if end in ("ran", "refused") else "FAILED "
            print(f"{mark}seed {args.seed} case {number} {kind.__name__}: {end}\n  {short(repr(argv))}\n"
                  f"  right: {right}\n  stdout {short(repr(out))}\n  stderr {short(err)}", flush=True)
        os.write(report, f"{end!r}\n".encode())
    os._exit(0)


def hang(*_):
    raise Hang()


def set_timers(seconds):
    """Raise Hang after so much time of the processor, or twelve times as much of the clock; end the process where that
    does not come through."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, 12 * seconds)
    signal.setitimer(signal.ITIMER_VIRTUAL, 3 * seconds)


def short(text, most=1500):
    return text if len(text) <= most else f"{text[:most // 2]} ... {text[-most // 2:]}"


def fresh(place):
    """A folder with a sound checkpoint in it, and nothing else of the case before around it."""
    for path in place.iterdir():
        if path.name in ("sound", "answer") or path.suffix == ".whole":
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    shutil.copytree(place / "sound", place / "ckpt")
    return place / "ckpt"


def outcome(argv, place):
    """(exit code or the exception that came out, stdout, stderr) of a script; what libraries write included."""
    script = eval_passkey if argv[0] == "eval_passkey.py" else generate
    argv = argv[1:] if script is eval_passkey else argv
    if not any(word.startswith("--ckpt") for word in argv):
        argv = ["--ckpt", str(place / "ckpt"), *argv]
    saved = os.dup(1), os.dup(2)
    before = sys.stdin, sys.stdout, sys.stderr
    with open(place / "out", "wb+") as out, open(place / "err", "wb+") as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        sys.stdin = io.TextIOWrapper(io.BytesIO(b"Hi\n\x00\n/stats\n"), encoding="utf-8")
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
        set_timers(SECONDS)
        try:
            run_command(partial(script.run, argv), f"{script.__name__}.py")
        except SystemExit as end:
            code = end.code
        except BaseException as error:
            code = error
        finally:
            set_timers(0)
            sys.stdin, sys.stdout, sys.stderr = before
            os.dup2(saved[0], 1)
            os.dup2(saved[1], 2)
            os.close(saved[0])
            os.close(saved[1])
    return code, *[(place / name).read_bytes().decode(errors="replace") for name in ("out", "err")]


def judge(code, out, err, right, place):
    """"ran", "refused", or what is wrong with how a case ended."""
    lines = err.splitlines()
    if isinstance(code, BaseException):
        where = code.__traceback__
        while where.tb_next:
            where = where.tb_next
        file = Path(where.tb_frame.f_code.co_filename).name
        return f"{type(code).__name__} at {file}:{where.tb_lineno}: {code}"[:300]
    if code not in (0, 2) or "Traceback" in err:
        return f"exit code {code}"
    end = "ran" if code == 0 else "refused"
    if end == "refused":
        said = [line for line in lines if line.startswith(("generate.py: ", "eval_passkey.py: ", "fuzz.py: error: "))]
        if len(said) != 1 or lines[-1] != said[0] or len(said[0]) > 2000 or said[0].endswith(": "):
            return "not refused in one clear line"
    if right in ("ran", "refused") and end != right:
        return f"{end}, but should have been {right}"
    if right in ("same", "whole") and end != "ran":
        return "refused, though nothing is wrong"
    if right == "same" and out != (place / "answer").read_text():
        return "another answer, though nothing is wrong"
    if right == "whole" and not is_whole(place):
        return "another file than of a run that was not cut"
    if right not in ("ran", "refused", "same", "whole", None) and not any(right in line for line in lines):
        return f"no {right!r} on stderr"
    return end


def is_whole(place):
    """Whether a file that had been cut is what it was before."""
    names = [name for name in ("answers", "results") if (place / f"{name}.jsonl").exists()]
    return all((place / f"{name}.jsonl").read_bytes() == (place / f"{name}.whole").read_bytes() for name in names)


if __name__ == "__main__":
    sys.exit(main())
