"""Checkpoint folders: what is read from config.json and safetensors, and what is said about folders that are wrong."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from make_golden import LLAMA3, SIZES, weight
from safetensors.torch import load_file, save_file

import checkpoint
from checkpoint import find_checkpoint, refuse_unfinished, weight_bytes
from config import Config
from model import Llama, load, load_model

ROOT = Path(__file__).parents[1]

SHAPES = {  # of the tensors of a LLaMA of SIZES with one layer, under the names that Hugging Face gives them
    "model.embed_tokens.weight": (64, 32), "model.norm.weight": (32,), "lm_head.weight": (64, 32),
    "model.layers.0.input_layernorm.weight": (32,), "model.layers.0.post_attention_layernorm.weight": (32,),
    "model.layers.0.self_attn.q_proj.weight": (32, 32), "model.layers.0.self_attn.k_proj.weight": (16, 32),
    "model.layers.0.self_attn.v_proj.weight": (16, 32), "model.layers.0.self_attn.o_proj.weight": (32, 32),
    "model.layers.0.mlp.gate_proj.weight": (48, 32), "model.layers.0.mlp.up_proj.weight": (48, 32),
    "model.layers.0.mlp.down_proj.weight": (32, 48)}


@pytest.fixture
def folder(tmp_path):
    """A good checkpoint folder: config.json and model.safetensors."""
    write_config(tmp_path)
    save_file({name: weight(name, shape) for name, shape in SHAPES.items()}, tmp_path / "model.safetensors")
    return tmp_path


def write_config(folder, **changes):
    """A config.json with these fields changed; ... leaves one out."""
    fields = {"model_type": "llama", "hidden_act": "silu", **SIZES, "num_hidden_layers": 1, **changes}
    fields = {name: value for name, value in fields.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")


def change_tensors(folder, changes):
    """The weights with these added, replaced or, where None, left out."""
    tensors = {**load_file(folder / "model.safetensors"), **changes}
    save_file({name: t for name, t in tensors.items() if t is not None}, folder / "model.safetensors")


def shard(folder, **also):
    """Move the weights to two files, with an index that says where they are, and `also` what is not true."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    index = {"metadata": {}, "weight_map": {**weight_map, **also}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def read(folder, **options):
    """The model of a folder without a tokenizer."""
    return load_model(folder, Config.from_hf(folder), **options)


def is_as_written(model):
    """Whether the parameters of a model are the weights of SHAPES."""
    return all(torch.equal(p, weight(name, p.shape)) for name, p in model.named_parameters())


# ---------------------------------------------------------------------------------------------------------------------
# weights

def test_names_and_shapes_are_those_of_hugging_face(folder):
    model = read(folder)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == SHAPES
    assert is_as_written(model)


def test_a_sharded_checkpoint_is_the_same_model(folder):
    size = weight_bytes(folder)
    shard(folder)
    assert is_as_written(read(folder))
    assert 0 <= weight_bytes(folder) - size < 2000  # a second header


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a mapped file may not be written to")
@pytest.mark.parametrize("free", [0, 2 ** 40])
def test_weights_are_copied_where_there_is_room(free, folder, monkeypatch):
    """Else they stay in the mapped file, which another process may then still write to."""
    monkeypatch.setattr(checkpoint, "available_memory", lambda: free)
    model = read(folder)
    assert is_as_written(model)
    file = folder / "model.safetensors"
    with open(file, "r+b") as f:
        f.seek(file.stat().st_size - 1024)
        f.write(bytes(1024))
    assert is_as_written(model) == (free > 0)


def test_tied_heads_and_old_rotary_buffers(folder):
    """LLaMA-1 is saved with rotary_emb.inv_freq in every layer, some tied models with their embedding as the head."""
    change_tensors(folder, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)})
    assert is_as_written(read(folder))
    write_config(folder, tie_word_embeddings=True)
    assert is_as_written(read(folder))
    change_tensors(folder, {"lm_head.weight": None})
    assert is_as_written(read(folder))


@pytest.mark.parametrize("dtype, want", [
    (None, torch.bfloat16), (torch.float16, torch.float16), ("float32", torch.float32)], ids=str)
def test_dtype(dtype, want, folder):
    """A type, its name, or None for what is stored."""
    save_file({name: weight(name, shape).bfloat16() for name, shape in SHAPES.items()}, folder / "model.safetensors")
    model = read(folder, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {want}
    assert torch.equal(model.model.norm.weight.bfloat16(), weight("model.norm.weight", (32,)).bfloat16())
    with pytest.raises(ValueError, match="int8.*bfloat16"):
        read(folder, dtype="int8")


LOADING = """
import sys, torch
from config import Config
from model import load_model

def status(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024

def touched(path):
    model = load_model(path, Config.from_hf(path))
    return model, [p.view(torch.int16).max() for p in model.parameters()]  # reads every page

touched("checkpoints/tiny")  # first: what torch imports on first use is not the loader's
before = status("VmRSS")
held = touched(sys.argv[1])
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_loading_takes_the_memory_of_the_checkpoint_once(tmp_path):
    """120 MB of bfloat16, copied tensor by tensor: at most 1.1 times its size with every weight touched."""
    wide = {**SIZES, "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 6, "head_dim": 64,
            "num_attention_heads": 16, "num_key_value_heads": 16}
    write_config(tmp_path, **wide)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Llama(Config(**wide)).named_parameters()}
    tensors = {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    size = weight_bytes(tmp_path)
    done = subprocess.run([sys.executable, "-c", LOADING, tmp_path], stdout=subprocess.PIPE, check=True, cwd=ROOT)
    assert size > 120e6 and float(done.stdout) <= 1.1 * size


# ---------------------------------------------------------------------------------------------------------------------
# config.json

def config_of(folder, train_len=None, **changes):
    write_config(folder, **changes)
    return Config.from_hf(folder, train_len)


@pytest.mark.parametrize("fields, want", [
    ({}, {"head_dim": 8, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": (2,), "dtype": "float32",
          "rope_theta": 1e4, "freq": "rope", "cosine_attention": None, "rms_norm_eps": 1e-6, "train_len": 32}),
    ({"head_dim": ..., "num_key_value_heads": ...}, {"head_dim": 8, "num_key_value_heads": 4}),
    ({"head_dim": 16, "rms_norm_eps": 1e-5}, {"head_dim": 16, "rms_norm_eps": 1e-5}),
    ({"eos_token_id": [2, 5], "bos_token_id": None}, {"eos_token_id": (2, 5), "bos_token_id": None}),
    ({"eos_token_id": None, "bos_token_id": 0}, {"eos_token_id": (), "bos_token_id": 0}),
    ({"torch_dtype": "float16"}, {"dtype": "float16"}), ({"dtype": "bfloat16"}, {"dtype": "bfloat16"}),
    ({"rope_theta": 5e5}, {"rope_theta": 5e5}),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.5}}, {"rope_theta": 7.5, "freq": "rope"}),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, {"freq": "yarn", "train_len": 32}),
    ({"rope_parameters": LLAMA3}, {"freq": "llama3", "train_len": 16}),
    ({"max_position_embeddings": ...}, {"train_len": 2048}),
    ({"original_max_position_embeddings": 8}, {"train_len": 8}),
    ({"position_encoding": "alibi"}, {"freq": "alibi", "train_len": 32}),
    ({"model_type": "mistral", "sliding_window": None}, {"freq": "rope"}),
    ({"cosine_attention": 24.0}, {"cosine_attention": 24.0}),
    ({"model_type": "mistral"}, {"layer_methods": ("sliding:window=4096",)}),
    ({"model_type": "qwen2"}, {"qkv_bias": True, "qk_norm": False, "layer_methods": ()}),
    ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 0},
     {"layer_methods": ("sliding:window=4096",)}),
    ({"model_type": "qwen3", "head_dim": ..., "layer_types": ["full_attention"]},
     {"qkv_bias": False, "qk_norm": True, "head_dim": 128, "layer_methods": ()}),
    ({"model_type": "qwen2", "dual_chunk_attention_config": {"original_max_position_embeddings": 16}},
     {"train_len": 16, "max_position_embeddings": 32, "freq": "rope"}),
    ({"model_type": "smollm3", "tie_word_embeddings": ...}, {"layer_methods": (), "tie_word_embeddings": True}),
    ({"model_type": "smollm3", "no_rope_layer_interval": 1}, {"layer_methods": ("nope",)}),
    ({"model_type": "smollm3", "no_rope_layers": [0], "use_sliding_window": True, "sliding_window": 7},
     {"layer_methods": ("sliding:window=7:freq=nope",)}),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0, "finetuned": True, "attn_factor": None}}, {"freq": "yarn"}),
    ], ids=str)
def test_fields_and_their_defaults(fields, want, tmp_path):
    """LLaMA-1 folders have neither head_dim nor num_key_value_heads; newer ones have rope_parameters for rope_theta.

    L is original_max_position_embeddings wherever it is, else max_position_embeddings; train_len overrides both.
    """
    config = config_of(tmp_path, **fields)
    assert {name: getattr(config, name) for name in want} == want
    assert config_of(tmp_path, train_len=7, **fields).train_len == 7


WRONG_FIELDS = {  # what is wrong in a config.json: the fields, and words of the message
    "no width": ({"hidden_size": ...}, ["hidden_size"]),
    "a size that is no number": ({"intermediate_size": "48"}, ["intermediate_size", "'48'"]),
    "heads that do not divide": ({"num_key_value_heads": 3}, ["num_key_value_heads 3", "num_attention_heads 4"]),
    "unknown rope": ({"rope_scaling": {"rope_type": "x7"}}, ["x7", "yarn"]),
    "rope that is no object": ({"rope_scaling": "yarn"}, ["rope_scaling", "'yarn'"]),
    "rope without factor": ({"rope_scaling": {"rope_type": "linear"}}, ["'linear'", "factor"]),
    "partial rotary": ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
    "unknown positions": ({"position_encoding": "learned"}, ["position_encoding", "learned", "alibi"]),
    "not a llama": ({"model_type": "gpt2"}, ["gpt2"]),
    "not silu": ({"hidden_act": "gelu"}, ["gelu"]),
    "a sliding window": ({"sliding_window": 4096}, ["sliding_window 4096"]),
    "a window of no size": ({"model_type": "qwen2", "sliding_window": None, "layer_types": ["sliding_attention"]},
                            ["sliding_window must be a whole number"]),
    "layers of an unknown kind": ({"model_type": "qwen3", "layer_types": ["linear_attention"]}, ["linear_attention"]),
    "too many layers": ({"model_type": "qwen3", "layer_types": ["full_attention"] * 2}, ["not of 1 layers"]),
    "attn_factor": ({"rope_scaling": {"type": "yarn", "factor": 2.0, "attn_factor": 0.8}}, ["yarn", "attn_factor"]),
    "a key of another type": ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 32}}, ["beta_fast"]),
    "a key of nobody": ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0, "alpha": 4}}, ["llama3", "alpha"]),
    "a factor without a type": ({"rope_scaling": {"factor": 2.0}}, ["factor 2.0", "no type"]),
}


@pytest.mark.parametrize("fields, words", WRONG_FIELDS.values(), ids=WRONG_FIELDS)
def test_wrong_configs_say_what_is_wrong(fields, words, tmp_path):
    """In one line that names the file."""
    with pytest.raises(ValueError) as caught:
        config_of(tmp_path, **fields)
    for word in [str(tmp_path / "config.json"), *words]:
        assert word in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# folders that are wrong

INDEX = "model.safetensors.index.json"
WRONG_FILES = {  # what is wrong in a folder: files with another text, or None: without them; words of the message
    "no config": ({"config.json": None}, ["config.json"]),
    "config cut": ({"config.json": "{"}, ["config.json", "JSON"]),
    "config a list": ({"config.json": "[1, 2]"}, ["config.json", "object"]),
    "no weights": ({"model.safetensors": None}, ["model.safetensors"]),
    "a pickle": ({"model.safetensors": None, "pytorch_model.bin": "x"}, ["pytorch_model.bin is a pickle"]),
    "index without map": ({"model.safetensors": None, INDEX: '{"weight_map": [1]}'}, [INDEX, "weight_map"]),
    "no shard": ({"model.safetensors": None, INDEX: '{"weight_map": {"x": "part-9"}}'}, ["part-9", "not there"]),
}
WRONG_TENSORS = {
    "one missing": ({"model.norm.weight": None}, ["lacks 1 tensors", "model.norm.weight"]),
    "one too many": ({"extra": torch.zeros(2, 3)}, ["unexpected", "extra", "(2, 3)"]),
    "wrong shape": ({"model.norm.weight": torch.zeros(31)}, ["model.norm.weight", "(31,)", "(32,)"]),
    "quantised": ({"model.norm.weight": torch.zeros(32, dtype=torch.int8)}, ["model.norm.weight", "quantised"]),
}


def refused(folder, words):
    """Whether reading a folder fails with a message of these words that names the folder."""
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        read(folder)
    return all(word in str(caught.value) for word in [str(folder), *words])


@pytest.mark.parametrize("files, words", WRONG_FILES.values(), ids=WRONG_FILES)
def test_wrong_folders_say_what_is_wrong(files, words, folder):
    for name, text in files.items():
        (folder / name).unlink(missing_ok=True)
        if text is not None:
            (folder / name).write_text(text, encoding="utf-8")
    assert refused(folder, words)


@pytest.mark.parametrize("tensors, words", WRONG_TENSORS.values(), ids=WRONG_TENSORS)
def test_wrong_weights_say_what_is_wrong(tensors, words, folder):
    change_tensors(folder, tensors)
    assert refused(folder, words)


def test_a_broken_download(folder):
    """The last byte is missing."""
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert refused(folder, ["model.safetensors", "not a whole"])


def test_a_shard_that_lacks_a_tensor(folder):
    shard(folder, extra="part-1.safetensors")
    assert refused(folder, ["part-1.safetensors", "the index says that extra is here"])


# ---------------------------------------------------------------------------------------------------------------------
# finding a folder

def test_a_checkpoint_is_a_folder_or_a_name_in_checkpoints(tmp_path, monkeypatch):
    """Here first, then beside the code."""
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint(tmp_path) == tmp_path
    assert find_checkpoint("tiny") == ROOT / "checkpoints/tiny"
    (tmp_path / "checkpoints/tiny").mkdir(parents=True)
    assert find_checkpoint("tiny") == Path("checkpoints/tiny")


def test_what_is_not_there_is_named(folder):
    """The folder, or the tokenizer in it."""
    for find in (find_checkpoint, load, Config.from_hf):
        with pytest.raises(FileNotFoundError, match="no-such-folder"):
            find(folder / "no-such-folder")
    with pytest.raises(FileNotFoundError, match="tokenizer.model"):
        load(folder)


def test_unfinished_training_is_refused(folder):
    refuse_unfinished(folder)
    (folder / checkpoint.UNFINISHED).touch()
    with pytest.raises(ValueError, match="unfinished.*train.py"):
        refuse_unfinished(folder)
