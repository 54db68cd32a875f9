"""Speed and memory, measured side by side in one process.

Does: check every candidate against its reference; time all of them in turn, round after round; print medians, ratios to
PyTorch's own causal attention or to transformers on the same weights, and peak memory; append every result to a JSONL
file; say whether others were using the machine. Does not: compare with numbers of another day.

    python bench.py attention --lengths 4096,16384         # also: decode, model, batch, load, kernel (CUDA), all
    python bench.py parallel                               # several processes beside one, see bench_parallel.py
    python bench.py model --shape llama-7b --scratch DIR   # random weights in bfloat16, written once, memory-mapped

Only useful pairs of a query and a key count as work: 4 * D * H floating-point operations each.

Letters: H query heads, Hkv key heads, D width of a head, T tokens, n tokens of a prompt.
"""
import copy
import ctypes
import datetime
import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import bench_llama_cpp
import bench_parallel
from attention import attend, attend_dense
from batch import Row, decode_rows
from checkpoint import available_memory, weight_bytes
from cli import (keep_freed_memory, markdown, method_list, number, pick_device, plain_parser, read_rows, run_command,
                 say, settings_line)
from generate import decode, prefill
from config import Config
from model import DTYPES, Llama, load_model
from plan import visible_keys
from positions import Method, make_plan
from rotation import rotate_keys, rotate_queries
from show import figure_class, plot_bench

L = 4096  # training length of the attention benchmarks
LAYER_METHODS = ("rope", "rerope:window=512", "leaky-rerope:window=512", "self-extend:window=512", "lampe:head=512",
                 "dca:chunk=1024:top=4095", "mesa:first=1024:chunk=1024:last=1024", "lm-infinite:local=2048",
                 "streaming-llm:recent=1020")
MODEL_METHODS = ("rope", "mesa", "rerope")
PYTORCH = "pytorch causal"
PYTORCH_STEP = "pytorch, keys rotated before"
ROTATE_ALL = "all keys rotated at each step"
TRANSFORMERS = "transformers sdpa"
PADDED = "transformers, rows padded"
LLAMA_CPP = "llama.cpp bf16"
ROWS = (1, 4, 16)  # that are decoded at once


@dataclass
class Shape:
    """The shape of a random model."""
    layers: int
    width: int
    heads: int
    kv_heads: int
    mlp_width: int
    train_len: int
    vocabulary: int = 32000
    tied: bool = False  # the head is the embedding


SHAPES = {
    "110m": Shape(layers=12, width=768, heads=12, kv_heads=12, mlp_width=2048, train_len=1024, tied=True),
    "1b": Shape(layers=16, width=2048, heads=32, kv_heads=8, mlp_width=8192, train_len=4096),
    "llama-7b": Shape(layers=32, width=4096, heads=32, kv_heads=32, mlp_width=11008, train_len=4096),
}


# ---------------------------------------------------------------------------------------------------------------------
# measuring

@dataclass
class Measured:
    """What race finds of one call."""
    seconds: list[float]  # of each round
    peak: float           # bytes that it needs at once; nan where the platform does not say

    @property
    def median(self):
        return statistics.median(self.seconds)

    @property
    def best(self):
        return min(self.seconds)


def race(calls, rounds, device):
    """{name: Measured} of calls, a dict of functions: each run once for its peak memory, which also warms it up, then
    all in turn, `rounds` times."""
    measured = {name: Measured([], peak(call, device)) for name, call in calls.items()}
    for _ in range(rounds):
        for name, call in calls.items():
            wait(device)
            start = time.perf_counter()
            call()
            wait(device)
            measured[name].seconds.append(time.perf_counter() - start)
    return measured


def wait(device):
    """Until the accelerator has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def peak(call, device):
    """Bytes that a call needs at once beyond what was there before; nan where the platform does not say."""
    gc.collect()
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # memory that was freed, but is still held, would hide what the call takes
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
        before = process_memory("VmRSS")
    except (OSError, AttributeError, TypeError):
        call()
        return math.nan
    call()
    return process_memory("VmHWM") - before


def process_memory(field):
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")


def check(name, got, want, dtype):
    """ValueError where a candidate differs from its reference by more than rounding, by root mean squares."""
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2  # 0.03 between two engines in bfloat16, each 0.02 off
    error = float((got.float() - want.float()).norm() / want.float().norm())
    if not error < tolerance:
        raise ValueError(f"{name} is wrong by {error:.2g}: not timed")


# ---------------------------------------------------------------------------------------------------------------------
# the machine, and the report

def ceilings(device, width=2048, numbers=2 ** 26):
    """What the machine can do: TFLOP/s of a matrix product by type, GB/s of a copy (read and write), medians of 5."""
    found = {}
    for name in ("float32", "bfloat16"):
        x = torch.randn(width, width, device=device).to(DTYPES[name])
        seconds = race({name: partial(torch.matmul, x, x)}, 5, device)[name].median
        found[f"matmul {name} TFLOP/s"] = round(2 * width ** 3 / seconds / 1e12, 3)
    x = torch.zeros(numbers, device=device)
    y = torch.zeros_like(x)
    seconds = race({"copy": partial(y.copy_, x)}, 5, device)["copy"].median
    found["copy GB/s"] = round(2 * x.nbytes / seconds / 1e9, 1)
    return found


def machine(device):
    """What a reader needs to know of the machine and of versions."""
    found = {"device": device_name(device), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
             "python": platform.python_version()}
    for package in ("torch", "triton", "transformers", "llama_cpp_python"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            pass
    found["date"] = datetime.date.today().isoformat()
    return found


def device_name(device):
    """The name of the accelerator or of the processor."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(": ")[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def load_average():
    """Processes that ran or wanted to, on average over the last minute; None where the platform does not say."""
    if not hasattr(os, "getloadavg"):
        return None
    return round(os.getloadavg()[0], 2)


def is_busy(loads, threads):
    """Whether one of these loads is more than this process makes by itself: others were running, times are too long."""
    return any(load is not None and load > threads + 0.5 for load in loads)


class Report:
    """Prints tables, and appends each of their rows to a JSONL file with the machine, the command and the load."""

    def __init__(self, args, words):
        self.path = args.results
        open(self.path, "a").close()  # an OSError, before anything long, where it cannot be written
        self.load = load_average()  # when work on the next table began
        self.machine = machine(args.device)
        self.command = "python bench.py " + " ".join(words)
        print(settings_line({"command": self.command, **self.machine}))
        self.ceilings = ceilings(args.device)
        print("ceilings:", ", ".join(f"{value} {name}" for name, value in self.ceilings.items()), flush=True)

    def add(self, section, title, rows):
        """A table of rows, dicts with the same keys."""
        before = self.load
        after = load_average()
        self.load = after
        busy = is_busy((before, after), self.machine["threads"])
        where = {"load_before": before, "load": after, "busy": busy, "command": self.command, **self.machine,
                 **self.ceilings}
        with open(self.path, "a", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps({"section": section, **row, **where}) + "\n")
        mark = " (machine busy)" if busy else ""
        print(f"\n{title} (load {before} before, {after} after){mark}\n")
        print(markdown(list(rows[0]), [[cell(value) for value in row.values()] for row in rows]), flush=True)


def cell(value):
    """The text of a table cell: three digits of a number, nothing for nan."""
    if not isinstance(value, float):
        return str(value)
    if math.isnan(value):
        return ""
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


# ---------------------------------------------------------------------------------------------------------------------
# attention over one layer

@dataclass
class Candidate:
    """One way to compute attention over T tokens."""
    name: str
    call: Callable
    pairs: int                  # of a query and a key, the useful ones
    same_as: str | None = None  # the candidate whose result it must give


def inputs(args, queries, keys):
    """q (1, H, queries, D), and k and v (1, Hkv, keys, D)."""
    generator = torch.Generator().manual_seed(0)
    tensors = []
    for heads, tokens in ((args.heads, queries), (args.kv_heads, keys), (args.kv_heads, keys)):
        x = torch.randn(1, heads, tokens, args.width, generator=generator)
        tensors.append(x.to(args.device, DTYPES[args.dtype]))
    return tensors


def layer_plan(args, method, i, Tk):
    """The Plan of a Method for queries i among Tk keys, of a prompt that ends with them."""
    return make_plan(method, i, torch.arange(Tk), n=Tk, L=L, D=args.width, H=args.heads)


def layer_shape(args):
    """The shape of the layer in a few words."""
    return f"H={args.heads}, Hkv={args.kv_heads}, D={args.width}, {args.dtype}"


@torch.no_grad()
def attention(args, report):
    """Prefill of one layer: each method, rotation of q and k included, against PyTorch's causal attention without."""
    check_methods(args, 700)
    memory = {}
    keep_freed_memory(most=0, block=2 ** 17)  # while memory is measured, malloc gives back all that is freed
    for T in args.lengths:
        memory[T] = {candidate.name: peak(candidate.call, args.device) for candidate in attention_candidates(args, T)}
    keep_freed_memory(most=2 ** 26)  # where malloc comes to by itself
    for T in args.lengths:
        candidates = attention_candidates(args, T)
        check_candidates(candidates, DTYPES[args.dtype])
        measured = race({candidate.name: candidate.call for candidate in candidates}, args.rounds, args.device)
        rows = [attention_row(args, T, candidate, measured, memory[T]) for candidate in candidates]
        report.add("attention", f"attention over {T} tokens, {layer_shape(args)}", rows)


def check_methods(args, T):
    """ValueError where a method over T tokens differs from its definition."""
    q, k, v = inputs(args, T, T)
    for method in args.methods:
        plan = layer_plan(args, method, torch.arange(T), T)
        check(method, attend(q, k, v, plan, args.impl), attend_dense(q, k, v, plan), q.dtype)


def attention_candidates(args, T):
    """[Candidate] of all that compute attention over T tokens, with inputs of their own."""
    q, k, v = inputs(args, T, T)
    candidates = [Candidate(PYTORCH, partial(causal, q, k, v), T * (T + 1) // 2)]
    naive = []
    for method in args.methods:
        plan = layer_plan(args, method, torch.arange(T), T)
        pairs = int(visible_keys(plan).sum())
        candidates.append(Candidate(str(method), partial(attend, q, k, v, plan, args.impl), pairs))
        if method.name == "rerope" and len(plan.regions) == 2:
            naive.append(Candidate("two matrices", partial(two_matrices, q, k, v, plan), pairs, same_as=str(method)))
    if 16 * args.heads * T * T < available_memory():
        candidates += naive[:1]
    return candidates


def check_candidates(candidates, dtype):
    """ValueError where a candidate does not give what the one it is the same as gives."""
    calls = {candidate.name: candidate.call for candidate in candidates}
    for candidate in candidates:
        if candidate.same_as:
            check(candidate.name, candidate.call(), calls[candidate.same_as](), dtype)


def causal(q, k, v):
    """PyTorch's own causal attention, of keys and queries that are rotated already."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def two_matrices(q, k, v, plan):
    """ReRoPE as its first code has it: two T x T score matrices, one of them chosen for each pair."""
    group = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(group, 1)
    v = v.repeat_interleave(group, 1)
    near = region_scores(q, k, plan, 0)
    far = region_scores(q, k, plan, 1)
    i = torch.arange(q.shape[2], device=q.device)[:, None]
    j = torch.arange(k.shape[2], device=q.device)
    is_near = j >= plan.regions[0].start.to(q.device)[:, None]
    scores = torch.where(is_near, near, far).masked_fill(j > i, -math.inf)
    return scores.float().softmax(-1).to(v.dtype) @ v


def region_scores(q, k, plan, number):
    """Scores (B, H, T, T) of all q and k (B, H, T, D), at the distances of one region."""
    rotated_q = rotate_queries(q, plan, number)
    rotated_k = rotate_keys(k, plan, plan.key_set[number])
    return rotated_q @ rotated_k.transpose(-1, -2) / math.sqrt(q.shape[-1])


def attention_row(args, T, candidate, measured, memory):
    """One line of the attention table; memory: {name: bytes}."""
    mine = measured[candidate.name]
    used = memory.get(candidate.name, math.nan)  # two matrices may not have fitted then
    work = 4 * args.heads * args.width * candidate.pairs
    return {"method": candidate.name, "tokens": T, "ms": mine.median * 1e3, "best ms": mine.best * 1e3,
            "x pytorch": mine.median / measured[PYTORCH].median, "us/token": mine.median / T * 1e6,
            "pairs": candidate.pairs, "TFLOP/s": work / mine.median / 1e12, "peak MiB": used / 2 ** 20,
            "x its memory": used / memory[PYTORCH]}


# ---------------------------------------------------------------------------------------------------------------------
# decoding in one layer

@torch.no_grad()
def decode_attention(args, report):
    """One query against T cached keys: each method with the rotated keys that a cache keeps for it, beside PyTorch's
    attention to keys that are rotated already, and what released codes do at each step."""
    for T in args.lengths:
        q, k, v = inputs(args, 1, T)
        calls = {PYTORCH_STEP: partial(one_query, q, k, v)}
        calls.update(method_steps(args, q, k, v))
        calls.update(rotating_steps(args, q, k, v))
        measured = race(calls, args.rounds * 5, args.device)
        rows = [decode_row(name, T, measured, k.nbytes + v.nbytes) for name in calls]
        report.add("decode", f"one query, {T} keys, {layer_shape(args)}", rows)


def one_query(q, k, v):
    """PyTorch's attention of one query per head, the query heads of a key head as its rows, so that k is read once."""
    return F.scaled_dot_product_attention(q.view(1, k.shape[1], -1, q.shape[-1]), k, v)


def method_steps(args, q, k, v):
    """{name: function} of every method, each with the rotated keys that a cache would hold for it."""
    T = k.shape[2]
    calls = {}
    for method in args.methods:
        plan = layer_plan(args, method, torch.tensor([T - 1]), T)
        rotated = [rotate_keys(k, plan, number) for number in range(len(plan.key_positions))]
        call = partial(attend, q, k, v, plan, args.impl, rotated)
        check(method, call(), attend_dense(q, k, v, plan), q.dtype)
        calls[str(method)] = call
    return calls


def rotating_steps(args, q, k, v):
    """{name: function} of what released codes do at each step: rotate all keys, and copy the cache to let it grow."""
    T = k.shape[2]
    inv_freq = layer_plan(args, Method("rope"), torch.tensor([T - 1]), T).inv_freq
    angles = torch.outer(torch.arange(T), inv_freq).repeat(1, 2)
    cos = angles.cos().to(q.device, q.dtype)
    sin = angles.sin().to(q.device, q.dtype)
    old_k = k[:, :, :-1].clone()
    old_v = v[:, :, :-1].clone()

    def step(keys, values):
        rotated_q = rotate_like_transformers(q, cos[-1:], sin[-1:])
        rotated_keys = rotate_like_transformers(keys, cos, sin)
        return F.scaled_dot_product_attention(rotated_q, rotated_keys, values, enable_gqa=q.shape[1] != k.shape[1])

    def growing_step():
        return step(torch.cat((old_k, k[:, :, -1:]), 2), torch.cat((old_v, v[:, :, -1:]), 2))
    return {ROTATE_ALL: partial(step, k, v), "... and the cache copied to grow": growing_step}


def rotate_like_transformers(x, cos, sin):
    """x * cos + rotate_half(x) * sin with tables of full width, as released codes rotate a whole cache at each step."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def decode_row(name, T, measured, size):
    """One line of the decode table; size: bytes of k and v."""
    mine = measured[name]
    return {"method": name, "keys": T, "ms": mine.median * 1e3, "best ms": mine.best * 1e3,
            "x pytorch": mine.median / measured[PYTORCH_STEP].median,
            "faster than rotating all": measured[ROTATE_ALL].median / mine.median,
            "GB/s of k and v": size / mine.median / 1e9}


# ---------------------------------------------------------------------------------------------------------------------
# random checkpoints

def random_checkpoint(args):
    """The folder of a random checkpoint of args.shape in bfloat16, written if it is not there: one shard per layer."""
    folder = Path(args.scratch) / f"bench-{args.shape}"
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    fields = shape_fields(SHAPES[args.shape])
    with torch.device("meta"):
        model = Llama(Config(**fields))
    block = 0.02 * torch.randn(2 ** 22, generator=torch.Generator().manual_seed(0)).bfloat16()
    files = {}  # tensor name -> file
    for shard, weights in shards_of(model).items():
        say(f"\rwriting {folder}: {shard}", end="")
        tensors = {name: random_weight(block, name, weight.shape) for name, weight in weights.items()}
        save_file(tensors, folder / f"model-{shard}.safetensors", metadata={"format": "pt"})
        files.update(dict.fromkeys(weights, f"model-{shard}.safetensors"))
    say("")
    settings = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
                "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2, **fields}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (folder / "config.json").write_text(json.dumps(settings, indent=2))  # last: a folder that has it is whole
    return folder


def shape_fields(shape):
    """The fields of config.json that say a Shape."""
    return {"vocab_size": shape.vocabulary, "hidden_size": shape.width, "intermediate_size": shape.mlp_width,
            "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads, "head_dim": shape.width // shape.heads, "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0, "max_position_embeddings": shape.train_len, "tie_word_embeddings": shape.tied}


def shards_of(model):
    """{shard: {name: weight}}: a shard for each layer, called by its number, and one for the rest."""
    shards = {}
    for name, weight in model.named_parameters():
        shard = name.split(".")[2] if ".layers." in name else "rest"
        shards.setdefault(shard, {})[name] = weight
    return shards


def random_weight(block, name, shape):
    """A weight of the numbers in block, over and over from some place on (drawing billions would take minutes)."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=block.dtype)
    count = math.prod(shape)
    copies = math.ceil(count / len(block))
    start = zlib.crc32(name.encode()) % len(block)
    return block.roll(start).repeat(copies)[:count].view(shape)


# ---------------------------------------------------------------------------------------------------------------------
# whole models

@dataclass
class Engines:
    """The same weights in our model, in those of transformers for which there is room, and in llama.cpp."""
    ours: Llama
    transformers: dict  # {name: model}
    llama_cpp: dict     # {name: LlamaCpp}, each in a process of its own


@torch.no_grad()
def whole_model(args, report):
    """Prefill and decoding of a whole model in tokens per second, beside transformers, llama.cpp and the floor."""
    keep_freed_memory()  # as generate.py does; what is timed beside ours in this process has the use of it as well
    folder = random_checkpoint(args)
    ours = load_model(folder, Config.from_hf(folder), torch.bfloat16, args.device, tokens=10 ** 9)
    engines = Engines(ours, transformers_models(args, folder, ours), llama_cpp_engines(args, folder, ours))
    for n in args.lengths:
        ids = random_ids(n, args.device)
        prefilling(args, report, engines, ids)
        decoding(args, report, engines, ids)
    for engine in engines.llama_cpp.values():
        engine.close()


def random_ids(n, device):
    """A prompt (1, n) of random tokens."""
    return torch.randint(3, 1000, (1, n), generator=torch.Generator().manual_seed(n)).to(device)


def transformers_models(args, folder, ours):
    """{name: transformers model} of the same weights, checked to give the same logits under rope."""
    try:
        import transformers
    except ImportError:
        say("transformers is not installed: its rows are left out (pip install transformers)")
        return {}
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    ids = random_ids(64, args.device)
    want = ours(ids, ours.plan("rope", n=64)).float()
    size = weight_bytes(folder)
    models = {}
    for kind in ("sdpa", "eager"):
        if args.device == "cpu" and 2.2 * size > available_memory():
            say(f"transformers {kind}: not enough memory beside our {size / 2**30:.1f} GiB")
            continue
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16,
                                                                  attn_implementation=kind)
        model = model.eval().to(args.device)
        check(f"transformers {kind}", model(ids).logits, want, torch.bfloat16)
        models[f"transformers {kind}"] = model
    return models


def llama_cpp_engines(args, folder, ours):
    """{name: LlamaCpp} of the same weights, those in bfloat16 checked to give the same logits under rope."""
    missing = bench_llama_cpp.missing()
    if missing or args.device != "cpu":
        say(f"llama.cpp is left out: {'it runs on a CPU here' if not missing else 'pip install ' + ' '.join(missing)}")
        return {}
    ids = random_ids(64, args.device)
    want = ours(ids, ours.plan("rope", n=64), last_only=True)[0, -1]
    engines = {}
    for kind in bench_llama_cpp.KINDS:
        path = bench_llama_cpp.write_gguf(folder, kind)
        engine = bench_llama_cpp.LlamaCpp(path, args.threads, max(args.lengths) + 64)
        try:
            logits = engine.prefill(ids[0].tolist())
        except RuntimeError as error:  # as where it was compiled for another processor
            say(f"llama.cpp {kind} is left out: {error}")
            continue
        if kind == "bf16":
            check("llama.cpp", logits, want, torch.bfloat16)
        engines[f"llama.cpp {kind}"] = engine
    return engines


def speedup(measured, other, name):
    """How many times as fast as another a candidate is; nan where the other has not been timed."""
    return measured[other].median / measured[name].median if other in measured else math.nan


def prefilling(args, report, engines, ids):
    """The table of reading a prompt ids (1, n)."""
    n = ids.shape[1]
    config = engines.ours.config
    calls = {}
    pairs = {}  # of a query and a key, in one layer
    for name, model in engines.transformers.items():
        matrices = 48 * config.num_attention_heads * n * n  # bytes of scores that eager attention holds at once
        if "eager" not in name or matrices < available_memory():
            calls[name] = partial(model, ids, use_cache=True, logits_to_keep=1)
            pairs[name] = n * (n + 1) // 2
    for name, engine in engines.llama_cpp.items():
        calls[name] = partial(engine.prefill, ids[0].tolist())
        pairs[name] = n * (n + 1) // 2
    for method in args.methods:
        calls[str(method)] = partial(prefill, engines.ours, ids, method)
        pairs[str(method)] = int(visible_keys(method.plan(config, n)).sum())
    measured = race(calls, args.rounds, args.device)
    flops = report.ceilings["matmul bfloat16 TFLOP/s"] * 1e12
    rows = []
    for name, mine in measured.items():
        rows.append({"prefill": name, "tokens": n, "seconds": mine.median, "tokens/s": n / mine.median,
                     "x transformers sdpa": speedup(measured, TRANSFORMERS, name),
                     "x llama.cpp bf16": speedup(measured, LLAMA_CPP, name),
                     "floor s": prefill_work(engines.ours, n, pairs[name]) / flops, "peak MiB": mine.peak / 2 ** 20})
    report.add("prefill", f"prefill of {n} tokens, {args.shape}, bfloat16", rows)


def prefill_work(model, n, pairs):
    """Floating-point operations of reading n tokens: the matrix products and the pairs of all layers, but of the last
    one the products of keys and values alone, as only one token goes on."""
    c = model.config
    layer = sum(weight.numel() for weight in model.model.layers[0].parameters() if weight.ndim > 1)
    last = 2 * c.hidden_size * c.num_key_value_heads * c.head_dim
    layers = c.num_hidden_layers - 1
    return 2 * (layers * layer + last) * n + 4 * pairs * layers * c.num_attention_heads * c.head_dim


def decoding(args, report, engines, ids, tokens=8):
    """The table of decoding after a prompt ids (1, n), in turns of `tokens` tokens."""
    n = ids.shape[1]
    rounds = 3 * args.rounds
    calls = {}
    if TRANSFORMERS in engines.transformers:
        calls[TRANSFORMERS] = transformers_decoding(engines.transformers[TRANSFORMERS], ids, tokens)
    for name, engine in engines.llama_cpp.items():
        engine.prefill(ids[0].tolist())
        calls[name] = partial(engine.decode, n, tokens)
    for method in args.methods:
        calls[str(method)] = our_decoding(engines.ours, ids, method, tokens, room=tokens * (rounds + 1))
    measured = race(calls, rounds, args.device)
    floor = decoding_bytes(engines.ours, n) / (report.ceilings["copy GB/s"] * 1e9)
    rows = []
    for name, mine in measured.items():
        seconds = mine.median / tokens
        rows.append({"decode": name, "context": n, "ms/token": seconds * 1e3, "tokens/s": 1 / seconds,
                     "x transformers sdpa": speedup(measured, TRANSFORMERS, name),
                     "x llama.cpp bf16": speedup(measured, LLAMA_CPP, name),
                     "floor ms (weights and cache at copy speed)": floor * 1e3})
    report.add("decode model", f"decoding after {n} tokens, {args.shape}, bfloat16, {engines.ours.ways}", rows)


def transformers_decoding(model, ids, tokens):
    """A function that decodes so many more tokens after ids (1, n) each time it is called."""
    cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values

    def call():
        for _ in range(tokens):
            model(ids[:, :1], past_key_values=cache, use_cache=True)
    return call


def our_decoding(model, ids, method, tokens, room):
    """As transformers_decoding, in our model; room: the tokens that all calls together decode."""
    n = ids.shape[1]
    logits, cache = prefill(model, ids, method, room=room)

    def call():
        for _ in decode(model, logits, cache, method, n, greedy, tokens + 1):  # the first token needs no forward pass
            pass
    return call


def greedy(logits):
    """The likeliest token (B,) of logits (B, vocab_size)."""
    return logits.argmax(-1)


def decoding_bytes(model, n):
    """Bytes that a step after n tokens has to read: of weights and of cached keys and values, in bfloat16."""
    c = model.config
    weights = 0
    for name, weight in model.named_parameters():
        if "embed" not in name or c.tie_word_embeddings:
            weights += weight.numel()
    cached = 2 * n * c.num_hidden_layers * c.num_key_value_heads * c.head_dim
    return 2 * (weights + cached)


# ---------------------------------------------------------------------------------------------------------------------
# many rows at once

@torch.no_grad()
def batches(args, report):
    """Decoding of 1, 4 and 16 rows of different lengths together, beside the same rows one by one, and beside
    transformers, which pads them to the longest."""
    keep_freed_memory()
    folder = random_checkpoint(args)
    ours = load_model(folder, Config.from_hf(folder), torch.bfloat16, args.device)
    theirs = transformers_models(args, folder, ours).get(TRANSFORMERS)
    for n in args.lengths:
        one_row = {}  # method: tokens/s of one row, for the other numbers of rows
        for count in ROWS:
            prompts = [random_ids(max(n * (k + 1) // count, 1), args.device) for k in range(count)]
            batch_table(args, report, ours, theirs, prompts, one_row)


def batch_table(args, report, ours, theirs, prompts, one_row, tokens=4):
    """The table of decoding after prompts [(1, n)], in turns of `tokens` tokens for each of them."""
    count = len(prompts)
    calls = {}
    for method in args.methods:
        calls[str(method)] = rows_together(ours, prompts, method, tokens)
        calls[f"{method}, one by one"] = rows_one_by_one(ours, prompts, method, tokens)
    if theirs is not None:
        calls[PADDED] = padded_rows(theirs, prompts, tokens)
    measured = race(calls, args.rounds, args.device)
    rows = []
    for name, mine in measured.items():
        speed = count * tokens / mine.median
        method = name.removesuffix(", one by one")
        if count == 1:
            one_row[name] = speed
        alone = measured.get(f"{method}, one by one")
        rows.append({"batch": name, "rows": count, "longest": prompts[-1].shape[1], "tokens/s": speed,
                     "x one row": speed / one_row[name],
                     "x one by one": alone.median / mine.median if alone else math.nan,
                     "x transformers padded": speedup(measured, PADDED, name)})
    report.add("batch", f"decoding {count} rows, {args.shape}, bfloat16", rows)


def rows_together(model, prompts, method, tokens):
    """A function that decodes so many more tokens after each of prompts [(1, n)] each time it is called."""
    rows = []
    for ids in prompts:
        logits, cache = prefill(model, ids, method)
        rows.append(Row(len(rows), ids.shape[1], method, logits, cache, greedy, tokens + 1, never))

    def call():
        for row in rows:
            row.tokens = []  # the first token needs no forward pass
        for _ in decode_rows(model, rows, len(rows)):
            pass
    return call


def never(tokens):
    """No text ends before its room does."""
    return False


def rows_one_by_one(model, prompts, method, tokens):
    """As rows_together, but one row after the other."""
    calls = [our_decoding(model, ids, method, tokens, room=64) for ids in prompts]

    def call():
        for decode_row in calls:
            decode_row()
    return call


def padded_rows(model, prompts, tokens):
    """As rows_together, in a transformers model: prompts are padded at the left to the longest of them."""
    longest = max(ids.shape[1] for ids in prompts)
    padded = torch.cat([F.pad(ids, (longest - ids.shape[1], 0)) for ids in prompts])
    is_there = torch.cat([F.pad(torch.ones_like(ids), (longest - ids.shape[1], 0)) for ids in prompts])
    cache = model(padded, attention_mask=is_there, use_cache=True, logits_to_keep=1).past_key_values
    next_ids = torch.full_like(padded[:, :1], 3)

    def call():
        nonlocal is_there
        for _ in range(tokens):
            is_there = torch.cat((is_there, torch.ones_like(next_ids)), 1)
            model(next_ids, attention_mask=is_there, past_key_values=cache, use_cache=True)
    return call


# ---------------------------------------------------------------------------------------------------------------------
# loading

LOADING = "import sys, bench; bench.load_alone(sys.argv[1], sys.argv[2])"  # in a process of its own


@dataclass
class Loading:
    """What load_alone prints."""
    load: float  # seconds
    read: float  # seconds until every page has been read
    peak: float  # bytes


def loading(args, report):
    """Loading a sharded checkpoint in a process of its own, and reading every page of it; peak memory / weights."""
    folder = random_checkpoint(args)
    size = weight_bytes(folder)
    engines = ["ours"]
    if "transformers" in report.machine:
        engines.append("transformers")
    found = {engine: [] for engine in engines}
    for turn in range(args.rounds + 1):
        for engine in engines:
            loaded = run_load_alone(engine, folder)
            if turn > 0:  # the first one warms the file cache
                found[engine].append(loaded)
    rows = []
    for engine, runs in found.items():
        rows.append({"engine": engine, "load s": statistics.median(run.load for run in runs),
                     "load and read s": statistics.median(run.read for run in runs),
                     "peak / weights": statistics.median(run.peak for run in runs) / size})
    shards = len(list(folder.glob("*.safetensors")))
    report.add("load", f"loading {args.shape}, {shards} shards, {size / 2**30:.2f} GiB", rows)


def run_load_alone(engine, folder):
    """The Loading of load_alone in a process of its own. ValueError where that fails."""
    done = subprocess.run([sys.executable, "-c", LOADING, engine, folder.resolve()], capture_output=True, text=True,
                          cwd=Path(__file__).parent)
    if done.returncode:
        raise ValueError(f"loading with {engine} failed: {done.stderr.strip().splitlines()[-1]}")
    return Loading(*[float(x) for x in done.stdout.split()])


def load_alone(engine, path):
    """Load a checkpoint with "ours" or "transformers"; print the numbers of a Loading."""
    if engine == "ours":
        def make():
            return load_model(path, Config.from_hf(path))
    else:
        import transformers
        transformers.utils.logging.disable_progress_bar()
        make = partial(transformers.AutoModelForCausalLM.from_pretrained, path, dtype=torch.bfloat16)

    def load_and_read():
        start = time.perf_counter()
        model = make()
        print(time.perf_counter() - start)
        for weight in model.parameters():
            weight.detach().flatten()[::1024].float().sum().item()  # a number of every page
        print(time.perf_counter() - start)
    print(peak(load_and_read, "cpu"))


# ---------------------------------------------------------------------------------------------------------------------
# the command line

def kernel(args, report):
    """The Triton kernels against PyTorch's attention, on a CUDA device: attention and decoding in bfloat16."""
    args = copy.copy(args)
    args.impl = "triton"
    args.dtype = "bfloat16"
    attention(args, report)
    decode_attention(args, report)


def parallel(args, report):
    """Several processes on this machine beside one, and what the same counts say of up to 64 GPUs."""
    methods = [str(method) for method in args.methods]
    report.add("parallel", "several processes, checkpoint tiny", bench_parallel.measured_rows(methods, args.lengths))
    report.add("parallel, computed", f"LLaMA-2-7B in bfloat16, computed for {bench_parallel.FLOPS / 1e12:.0f} TFLOP/s "
               f"and {bench_parallel.BYTES / 1e9:.0f} GB/s a GPU", bench_parallel.computed_rows(methods))


SECTIONS = {"attention": attention, "decode": decode_attention, "model": whole_model, "batch": batches,
            "load": loading, "kernel": kernel, "parallel": parallel}
APART = ("kernel", "parallel")  # not among "all": one needs a GPU, the other starts processes
# what a section measures where the flags do not say
LENGTHS = {"attention": [2048, 8192, 16384], "decode": [4096, 16384], "model": [512, 4096, 8192], "batch": [1024],
           "load": [], "kernel": [4096, 16384, 65536], "parallel": [2049, 8191]}
METHODS = {"attention": LAYER_METHODS, "decode": LAYER_METHODS, "model": MODEL_METHODS, "batch": MODEL_METHODS[:2],
           "load": [], "kernel": LAYER_METHODS, "parallel": bench_parallel.METHODS}


def lengths(text):
    """An argparse type: "4096,16384" -> [4096, 16384]."""
    return [number(int, 16)(part) for part in text.split(",")]


def parse_args(argv):
    parser, flag = plain_parser(__doc__)
    parser.usage = "%(prog)s SECTION [flags]; --help lists them"
    parser.add_argument("section", choices=[*SECTIONS, "all"])
    flag("methods", type=method_list, help="comma-separated, each name[:parameter=value...]")
    flag("lengths", type=lengths, help="in tokens, comma-separated")
    flag("heads", type=number(int, 1), default=8)
    flag("kv-heads", type=number(int, 1), help="default: as many as --heads")
    flag("width", type=number(int, 16, 256), default=64, help="of a head")
    flag("dtype", choices=DTYPES, default="float32", help="of attention and decode")
    flag("shape", choices=SHAPES, default="110m", help="of model, batch and load")
    flag("scratch", default=tempfile.gettempdir(), metavar="DIR", help="where random checkpoints are written, and stay")
    flag("rounds", type=number(int, 1), default=5)
    flag("threads", type=number(int, 1), default=os.cpu_count())
    flag("device", choices=["auto", "cuda", "cpu"], default="auto")
    flag("impl", choices=["auto", "tiled", "triton"], default="auto", help="how attention is computed")
    flag("results", default="bench.jsonl", metavar="FILE")
    flag("plot", metavar="FILE", help="time and memory by length as a picture (needs matplotlib)")
    args = parser.parse_args(argv)
    args.kv_heads = args.kv_heads or args.heads
    if args.heads % args.kv_heads or args.width % 2:
        parser.error("--kv-heads must divide --heads, and --width be even")
    return args


def sections_of(args):
    """The names of the sections to run. ValueError for the kernels without a CUDA device."""
    if args.section == "kernel" and args.device != "cuda":
        raise ValueError("kernel: the compiled kernels need a CUDA device")
    if args.section != "all":
        return [args.section]
    return [section for section in SECTIONS if section not in APART or section == "kernel" and args.device == "cuda"]


def settings_of(args, section):
    """A copy of args with the lengths and the Methods of a section, where the flags name none."""
    settings = copy.copy(args)
    settings.lengths = args.lengths or LENGTHS[section]
    texts = dict.fromkeys(args.methods or METHODS[section])  # each of them once
    settings.methods = [Method.parse(text) for text in texts]
    return settings


def latest_attention(path):
    """The rows of the section attention in a results file, the latest of each method and length."""
    latest = {}
    for row in read_rows(path):
        if row["section"] == "attention":
            latest[row["method"], row["tokens"]] = row
    return list(latest.values())


def run(argv=None):
    """The command: its exit code."""
    args = parse_args(argv)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.device = pick_device(args.device)
    sections = sections_of(args)
    if args.plot:
        figure_class()  # is matplotlib here? before anything long
    for text in args.methods or []:  # names, before anything long
        layer_plan(args, Method.parse(text), torch.arange(8), 8)
    torch.set_num_threads(args.threads)
    report = Report(args, sys.argv[1:] if argv is None else argv)
    for section in sections:
        SECTIONS[section](settings_of(args, section), report)
    if args.plot:
        plot_bench(latest_attention(Path(args.results)), args.plot)
    return 0


if __name__ == "__main__":
    run_command(run, "bench.py")
