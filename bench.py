"""Speed and memory, measured side by side in one process.

Does: check every candidate against its reference; time all of them in turn, round after round; print medians, ratios to
PyTorch's own causal attention or to transformers on the same weights, and peak memory; append every result to a JSONL
file. Does not: compare with numbers of another day.

    python bench.py attention --lengths 4096,16384         # also: decode, model, load, kernel (CUDA only), all
    python bench.py model --shape llama-7b --scratch DIR   # random weights in bfloat16, written once, memory-mapped

Only useful pairs of a query and a key count as work: 4 * D * H floating-point operations each.
"""
import argparse
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
from importlib import metadata
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from attention import TurnedKeys, asking, attend, attend_dense, turned
from eval_passkey import parse_method
from generate import decode, keep_freed_memory, method_list, number, pick_device, plan_maker, prefill, say
from model import DTYPES, Config, Llama, available_memory, config_of, load_model
from positions import figure_class, make_plan, run_command, seen

L = 4096  # training length of the attention benchmarks
METHODS = ("rope", "rerope:window=512", "leaky-rerope:window=512", "self-extend:window=512", "lampe:head=512",
           "dca:chunk=1024:top=4095", "mesa:first=1024:chunk=1024:last=1024", "lm-infinite:local=2048",
           "streaming-llm:recent=1020")
SHAPES = {  # layers, width, heads, key heads, width of the MLP, vocabulary, training length
    "110m": (12, 768, 12, 12, 2048, 32000, 1024), "1b": (16, 2048, 32, 8, 8192, 32000, 4096),
    "llama-7b": (32, 4096, 32, 32, 11008, 32000, 4096)}


# ---------------------------------------------------------------------------------------------------------------------
# measuring

def race(calls, rounds, device):
    """({name: [seconds]}, {name: bytes}) of calls, a dict of functions: each run once for its peak memory, which also
    warms it up, then all in turn, `rounds` times."""
    memory = {name: peak(call, device) for name, call in calls.items()}
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            wait(device)
            start = time.perf_counter()
            call()
            wait(device)
            times[name].append(time.perf_counter() - start)
    return times, memory


def wait(device):
    """Until the accelerator has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def status(field):
    """A field of /proc/self/status in bytes."""
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return 1024 * int(line.split()[1])


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
        before = status("VmRSS")
    except (OSError, AttributeError, TypeError):
        return math.nan
    call()
    return status("VmHWM") - before


def ceilings(device):
    """What the machine can do: TFLOP/s of a matrix product by type, GB/s of a copy (read and write), medians of 5."""
    out = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2048, 2048, device=device).to(dtype)
        seconds = statistics.median(race({"": lambda x=x: x @ x}, 5, device)[0][""])
        out[f"matmul {str(dtype).removeprefix('torch.')} TFLOP/s"] = round(2 * 2048 ** 3 / seconds / 1e12, 3)
    x = torch.zeros(2 ** 26, device=device)
    y = torch.zeros_like(x)
    seconds = statistics.median(race({"": lambda: y.copy_(x)}, 5, device)[0][""])
    return {**out, "copy GB/s": round(2 * x.nbytes / seconds / 1e9, 1)}


def machine(device):
    """What a reader needs to know of the machine and of versions."""
    def version(package):
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    try:
        if device == "cpu":
            name = next(x for x in open("/proc/cpuinfo") if x.startswith("model name")).split(": ")[1].strip()
    except (OSError, StopIteration):
        pass
    versions = {package: version(package) for package in ("torch", "triton", "transformers")}
    return {"device": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "python": platform.python_version(), **{k: v for k, v in versions.items() if v},
            "date": datetime.date.today().isoformat()}


class Report:
    """Prints tables, and appends each of their rows to a JSONL file with the machine, the command and the load."""

    def __init__(self, args, path):
        self.path, self.common = path, {"command": "python bench.py " + " ".join(sys.argv[1:]), **machine(args.device)}
        print(" ".join(f"{key}={value}" for key, value in self.common.items()))
        self.ceilings = ceilings(args.device)
        print("ceilings:", ", ".join(f"{value} {key}" for key, value in self.ceilings.items()), flush=True)

    def add(self, section, title, rows):
        """A markdown table of rows, dicts with the same keys."""
        load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
        with open(self.path, "a", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps({"section": section, **row, "load": load, **self.common, **self.ceilings}) + "\n")
        print(f"\n{title} (load {load})\n\n| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
        for row in rows:
            print("| " + " | ".join(shown(x) for x in row.values()) + " |", flush=True)


def shown(x):
    """A table cell."""
    if isinstance(x, float):
        return "" if math.isnan(x) else f"{x:.3g}" if abs(x) < 100 else f"{x:.0f}"
    return str(x)


def check(name, got, want, dtype):
    """ValueError where a candidate differs from its reference by more than rounding."""
    tolerance = {torch.float32: 1e-4}.get(dtype, 3e-2) * max(1.0, float(want.float().abs().max()))
    error = float((got.float() - want.float()).abs().max())
    if not error < tolerance:
        raise ValueError(f"{name} is wrong by {error:.2g}: not timed")


# ---------------------------------------------------------------------------------------------------------------------
# attention over one layer

def inputs(args, T, keys=None):
    """q (1, H, T, D), and k and v (1, Hkv, keys or T, D)."""
    generator, dtype = torch.Generator().manual_seed(0), DTYPES[args.dtype]
    shapes = (args.heads, T), (args.kv_heads, keys or T), (args.kv_heads, keys or T)
    return [torch.randn(1, h, t, args.width, generator=generator).to(args.device, dtype) for h, t in shapes]


def plan_of(args, spec, i, Tk):
    """The plan of a method for queries i among Tk keys, of a prompt that ends with them."""
    method, freq, scale, params = parse_method(spec)
    return make_plan(method, i, torch.arange(Tk), n=Tk, L=L, D=args.width, H=args.heads, freq=freq, attn_scale=scale,
                     **params)


def layer(args):
    """The shape of the layer in a few words."""
    return f"H={args.heads}, Hkv={args.kv_heads}, D={args.width}, {args.dtype}"


def two_matrix(q, k, v, plan):
    """ReRoPE as its first code has it: two T x T score matrices, one of them chosen for each pair."""
    T, D = q.shape[2:]
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    far, near = sorted(plan.regions, key=lambda r: int(r.start[-1]))
    scores = [asking(q, plan, r) @ turned(k, plan, r.k_pos).transpose(-1, -2) / math.sqrt(D) for r in (near, far)]
    i, j = torch.arange(T, device=q.device)[:, None], torch.arange(T, device=q.device)
    scores = torch.where(j >= near.start.to(q.device)[:, None], *scores).masked_fill(j > i, -math.inf)
    return scores.float().softmax(-1).to(v.dtype) @ v


def causal(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


@torch.no_grad()
def attention(args, report):
    """Prefill of one layer: each method, rotation of q and k included, against PyTorch's causal attention without."""
    q, k, v = inputs(args, 700)
    for spec in args.methods:
        plan = plan_of(args, spec, torch.arange(700), 700)
        check(spec, attend(q, k, v, plan, args.impl), attend_dense(q, k, v, plan), q.dtype)
    keep_freed_memory(most=0, block=2 ** 17)  # while memory is measured, malloc gives back all that is freed
    memory = {T: {name: peak(call, args.device) for name, call in candidates(args, T)[0].items()} for T in args.lengths}
    keep_freed_memory(most=2 ** 26)  # where malloc comes to by itself
    for T in args.lengths:
        calls, plans = candidates(args, T)
        if "two matrices" in calls:
            naive = next(spec for spec in plans if plans[spec] is plans["two matrices"])
            check("two matrices", calls["two matrices"](), calls[naive](), DTYPES[args.dtype])
        times, _ = race(calls, args.rounds, args.device)
        report.add("attention", f"attention over {T} tokens, {layer(args)}",
                   [attention_row(args, T, name, times, memory[T], plans) for name in calls])


def candidates(args, T):
    """({name: function}, {name: plan}) of all that compute attention over T tokens, of inputs of their own."""
    q, k, v = inputs(args, T)
    plans = {spec: plan_of(args, spec, torch.arange(T), T) for spec in args.methods}
    calls = {"pytorch causal": lambda: causal(q, k, v)}
    for spec, plan in plans.items():
        calls[spec] = lambda plan=plan: attend(q, k, v, plan, args.impl)
    naive = next((spec for spec in plans if spec.startswith("rerope") and len(plans[spec].regions) == 2), None)
    if naive and 16 * args.heads * T * T < available_memory():
        plans["two matrices"] = plans[naive]
        calls["two matrices"] = lambda: two_matrix(q, k, v, plans[naive])
    return calls, plans


def attention_row(args, T, name, times, memory, plans):
    """One line of the attention table."""
    seconds, full = statistics.median(times[name]), statistics.median(times["pytorch causal"])
    useful = int(seen(plans[name]).sum()) if name in plans else T * (T + 1) // 2
    used = memory.get(name, math.nan)  # two matrices may not have fitted then
    return {"method": name, "tokens": T, "ms": seconds * 1e3, "best ms": min(times[name]) * 1e3,
            "x pytorch": seconds / full, "us/token": seconds / T * 1e6, "pairs": useful,
            "TFLOP/s": 4 * args.heads * args.width * useful / seconds / 1e12, "peak MiB": used / 2 ** 20,
            "x its memory": used / memory["pytorch causal"]}


# ---------------------------------------------------------------------------------------------------------------------
# decoding in one layer

def rotate_like_transformers(x, cos, sin):
    """x * cos + rotate_half(x) * sin with tables of full width, as released codes turn a whole cache at each step."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


@torch.no_grad()
def decode_attention(args, report):
    """One query against T cached keys: each method, against one region of rotated keys, and what others do per step."""
    for T in args.lengths:
        q, k, v = inputs(args, 1, T)
        _, old, old_v = inputs(args, 1, T - 1)
        calls = {"pytorch, keys rotated before": lambda q=q, k=k, v=v: F.scaled_dot_product_attention(
            q.unflatten(1, (k.shape[1], -1))[:, :, :, 0], k, v)}
        for spec in args.methods:
            plan, kept = plan_of(args, spec, torch.tensor([T - 1]), T), TurnedKeys()
            check(spec, attend(q, k, v, plan, args.impl, kept), attend_dense(q, k, v, plan), q.dtype)
            calls[spec] = lambda plan=plan, kept=kept, q=q, k=k, v=v: attend(q, k, v, plan, args.impl, kept)
        plan = plan_of(args, "rope", torch.tensor([T - 1]), T)
        angle = torch.outer(torch.arange(T), plan.inv_freq).repeat(1, 2)
        cos, sin = (f(angle).to(q.device, q.dtype) for f in (torch.cos, torch.sin))

        def every_step(q=q, k=k, v=v, cos=cos, sin=sin):
            turned_q = rotate_like_transformers(q, cos[-1:], sin[-1:])
            return F.scaled_dot_product_attention(turned_q, rotate_like_transformers(k, cos, sin), v,
                                                  enable_gqa=q.shape[1] != k.shape[1])

        def growing(k=k, v=v, old=old, old_v=old_v, every_step=every_step):
            return every_step(k=torch.cat((old, k[:, :, -1:]), 2), v=torch.cat((old_v, v[:, :, -1:]), 2))
        calls |= {"all keys rotated at each step": every_step, "... and the cache copied to grow": growing}
        times, _ = race(calls, args.rounds * 5, args.device)
        base, slow = (statistics.median(times[name]) for name in (next(iter(calls)), "all keys rotated at each step"))
        report.add("decode", f"one query, {T} keys, {layer(args)}", [
            {"method": name, "keys": T, "ms": statistics.median(t) * 1e3, "best ms": min(t) * 1e3,
             "x pytorch": statistics.median(t) / base, "faster than rotating all": slow / statistics.median(t),
             "GB/s of k and v": (k.nbytes + v.nbytes) / statistics.median(t) / 1e9} for name, t in times.items()])


# ---------------------------------------------------------------------------------------------------------------------
# whole models of random weights

def checkpoint(args):
    """The folder of a random checkpoint of this shape in bfloat16, written if it is not there: one shard per layer."""
    layers, width, heads, kv, wide, vocab, window = SHAPES[args.shape]
    folder = Path(args.scratch) / f"bench-{args.shape}"
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
                "vocab_size": vocab, "hidden_size": width, "intermediate_size": wide, "num_hidden_layers": layers,
                "num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": width // heads,
                "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": window,
                "torch_dtype": "bfloat16", "tie_word_embeddings": args.shape == "110m", "bos_token_id": 1,
                "eos_token_id": 2}
    with torch.device("meta"):
        model = Llama(config_of(settings, None))
    shards, block = {}, 0.02 * torch.randn(2 ** 22, generator=torch.Generator().manual_seed(0)).bfloat16()
    for name, weight in model.named_parameters():
        shards.setdefault(name.split(".")[2] if ".layers." in name else "rest", []).append((name, weight.shape))
    for shard, names in shards.items():
        say(f"\rwriting {folder}: {shard}", end="")
        tensors = {name: random_weight(block, name, shape) for name, shape in names}
        save_file(tensors, folder / f"model-{shard}.safetensors", metadata={"format": "pt"})
    say("")
    places = {name: f"model-{shard}.safetensors" for shard, names in shards.items() for name, _ in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "config.json").write_text(json.dumps(settings, indent=2))  # last: a folder that has it is whole
    return folder


def weight_bytes(folder):
    """Bytes of the weight files of a checkpoint."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def random_weight(block, name, shape):
    """A weight of the numbers in block, over and over from some place on (drawing billions would take minutes)."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=block.dtype)
    count, start = math.prod(shape), zlib.crc32(name.encode()) % len(block)
    return block.roll(start).repeat(-(-count // len(block)))[:count].view(shape)


def transformers_model(folder, kind):
    """The same weights in transformers; None where it is not installed."""
    try:
        import transformers
    except ImportError:
        say("transformers is not installed: its rows are left out (pip install transformers)")
        return None
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation=kind)
    return model.eval()


def others(args, folder, ours):
    """{name: transformers model} of the same weights, checked to give the same logits under rope."""
    out = {}
    ids = torch.randint(3, 1000, (1, 64), generator=torch.Generator().manual_seed(0))
    want = ours(ids.to(args.device), ours.plan("rope", n=64)).float()
    size = weight_bytes(folder)
    for kind in ("sdpa", "eager"):
        if args.device == "cpu" and 2.2 * size > available_memory():
            say(f"transformers {kind}: not enough memory beside our {size / 2**30:.1f} GiB")
            continue
        model = transformers_model(folder, kind)
        if model is not None:
            out[f"transformers {kind}"] = model.to(args.device)
            check(kind, model(ids.to(args.device)).logits, want, torch.bfloat16)
    return out


@torch.no_grad()
def whole_model(args, report):
    """Prefill and decoding of a whole model in tokens per second, beside transformers and the arithmetic floor."""
    folder = checkpoint(args)
    config = Config.from_hf(folder)
    ours = load_model(folder, config, torch.bfloat16, args.device)
    rivals = others(args, folder, ours)
    weights = sum(p.numel() for name, p in ours.named_parameters() if p.ndim > 1 and "embed" not in name)
    flops = report.ceilings["matmul bfloat16 TFLOP/s"] * 1e12
    for n in args.lengths:
        ids = torch.randint(3, 1000, (1, n), generator=torch.Generator().manual_seed(n)).to(args.device)
        plans = {spec: plan_maker(ours, n, *parse_method(spec)) for spec in args.methods}
        calls = {name: lambda model=model, ids=ids: model(ids, use_cache=True, logits_to_keep=1)
                 for name, model in rivals.items()
                 if "eager" not in name or 48 * config.num_attention_heads * n * n < available_memory()}
        calls |= {spec: lambda plan=plan, ids=ids: prefill(ours, ids, plan) for spec, plan in plans.items()}
        times, memory = race(calls, args.rounds, args.device)
        times, rows = {name: statistics.median(t) for name, t in times.items()}, []
        for name, seconds in times.items():
            plan = plans[name](torch.arange(n), torch.arange(n)) if name in plans else None
            useful = int(seen(plan).sum()) if plan else n * (n + 1) // 2
            work = 2 * weights * n + 4 * useful * config.num_hidden_layers * config.hidden_size
            rows.append({"prefill": name, "tokens": n, "seconds": seconds, "tokens/s": n / seconds,
                         "x transformers sdpa": times.get("transformers sdpa", math.nan) / seconds,
                         "floor s": work / flops, "peak MiB": memory[name] / 2 ** 20})
        report.add("prefill", f"prefill of {n} tokens, {args.shape}, bfloat16", rows)
        decoding(args, report, ours, rivals, plans, ids, n)


def decoding(args, report, ours, rivals, plans, ids, n, tokens=8):
    """Tokens per second after a prompt of n tokens, in turns of `tokens` tokens."""
    calls, rounds = {}, 3 * args.rounds
    for name, model in rivals.items():
        if "sdpa" in name:
            cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values

            def rival(model=model, cache=cache):
                for _ in range(tokens):
                    model(ids[:, :1], past_key_values=cache, use_cache=True)
            calls[name] = rival
    for spec, plan in plans.items():
        logits, cache = prefill(ours, ids, plan, room=tokens * (rounds + 1))
        calls[spec] = lambda plan=plan, logits=logits, cache=cache: list(
            decode(ours, logits, cache, plan, lambda logits: logits.argmax(-1), tokens + 1))
    times = {name: statistics.median(t) / tokens for name, t in race(calls, rounds, args.device)[0].items()}
    c = ours.config
    cached = 4 * n * c.num_hidden_layers * c.num_key_value_heads * c.head_dim  # bytes of k and v
    read = 2 * sum(p.numel() for name, p in ours.named_parameters() if "embed" not in name or c.tie_word_embeddings)
    report.add("decode model", f"decoding after {n} tokens, {args.shape}, bfloat16", [
        {"decode": name, "context": n, "ms/token": t * 1e3, "tokens/s": 1 / t,
         "x transformers sdpa": times.get("transformers sdpa", math.nan) / t,
         "floor ms (weights and cache at copy speed)": (read + cached) / report.ceilings["copy GB/s"] / 1e6}
        for name, t in times.items()])


LOADING = """
import sys, time
import torch
from bench import peak
if sys.argv[1] == "ours":
    from model import Config, load_model
    make = lambda path: load_model(path, Config.from_hf(path))
else:
    import transformers
    transformers.utils.logging.disable_progress_bar()
    make = lambda path: transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
def load():
    start = time.perf_counter()
    model = make(sys.argv[2])
    print(time.perf_counter() - start)
    total = sum(float(p.detach().flatten()[::1024].float().sum()) for p in model.parameters())  # read every page
    print(time.perf_counter() - start)
print(peak(load, "cpu"))
"""


def loading(args, report):
    """Loading a sharded checkpoint in a process of its own, and reading every page of it; peak memory / weights."""
    folder = checkpoint(args)
    size = weight_bytes(folder)
    engines = ["ours"] + ["transformers"] * ("transformers" in report.common)
    found = {engine: [] for engine in engines}
    for turn in range(args.rounds + 1):
        for engine in engines:
            out = subprocess.run([sys.executable, "-c", LOADING, engine, str(folder)], capture_output=True, text=True,
                                 cwd=Path(__file__).parent)
            if out.returncode:
                raise ValueError(f"loading with {engine} failed: {out.stderr.strip().splitlines()[-1]}")
            if turn:  # the first one warms the file cache
                found[engine].append([float(x) for x in out.stdout.split()])
    shards = len(list(folder.glob("*.safetensors")))
    report.add("load", f"loading {args.shape}, {shards} shards, {size / 2**30:.2f} GiB",
               [{"engine": engine, "load s": statistics.median(x[0] for x in rows),
                 "load and read s": statistics.median(x[1] for x in rows),
                 "peak / weights": statistics.median(x[2] for x in rows) / size}
                for engine, rows in found.items()])


def kernel(args, report):
    """The Triton kernels against PyTorch's attention, on a CUDA device: attention and decoding in bfloat16."""
    if args.device != "cuda":
        raise ValueError("kernel: the compiled kernels need a CUDA device")
    args.impl, args.dtype = "triton", "bfloat16"
    attention(args, report)
    decode_attention(args, report)


# ---------------------------------------------------------------------------------------------------------------------
# the command line

def plot(path, results):
    """Time and memory by length, a line per method, from the attention rows of a results file. Needs matplotlib."""
    Figure = figure_class()
    rows = [json.loads(line) for line in Path(results).read_text(encoding="utf-8").splitlines()]
    rows = {(row["method"], row["tokens"]): row for row in rows if row["section"] == "attention"}  # the latest of each
    figure = Figure(figsize=(13, 4.5), dpi=110, layout="constrained")
    for axes, field in zip(figure.subplots(1, 2), ("us/token", "peak MiB")):
        for k, name in enumerate(dict.fromkeys(method for method, _ in rows)):
            mine = sorted((T, row[field]) for (method, T), row in rows.items() if method == name)
            axes.plot(*zip(*mine), "o-" if k < 10 else "s--", color=f"C{k % 10}", label=name)
        lengths = sorted({T for _, T in rows})
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=field.replace("us", "\u00b5s"), xticks=lengths,
                 xticklabels=lengths)
        axes.minorticks_off()
    figure.legend(*axes.get_legend_handles_labels(), fontsize=7, loc="outside right center")
    figure.savefig(path)


SECTIONS = {"attention": attention, "decode": decode_attention, "model": whole_model, "load": loading, "kernel": kernel}
LENGTHS = {"attention": [2048, 8192, 16384], "decode": [4096, 16384], "model": [512, 4096, 8192], "load": [],
           "kernel": [4096, 16384, 65536]}


def parse_args(argv):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("section", choices=[*SECTIONS, "all"])
    p.add_argument("--methods", type=method_list, help="comma-separated, each name[:parameter=value...]")
    p.add_argument("--lengths", type=lambda text: [number(int, 16)(part) for part in text.split(",")])
    p.add_argument("--heads", type=number(int, 1), default=8)
    p.add_argument("--kv-heads", type=number(int, 1), help="default: as many as --heads")
    p.add_argument("--width", type=number(int, 16, 256), default=64, help="of a head")
    p.add_argument("--dtype", choices=DTYPES, default="float32", help="of attention and decode")
    p.add_argument("--shape", choices=SHAPES, default="110m", help="of model and load")
    p.add_argument("--scratch", default=tempfile.gettempdir(), metavar="DIR",
                   help="where random checkpoints are written, and stay")
    p.add_argument("--rounds", type=number(int, 1), default=5)
    p.add_argument("--threads", type=number(int, 1), default=os.cpu_count())
    p.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    p.add_argument("--impl", choices=["auto", "tiled", "triton"], default="auto")
    p.add_argument("--results", default="bench.jsonl", metavar="FILE")
    p.add_argument("--plot", metavar="FILE", help="time and memory by length as a picture (needs matplotlib)")
    args = p.parse_args(argv)
    args.kv_heads = args.kv_heads or args.heads
    if args.heads % args.kv_heads or args.width % 2:
        p.error("--kv-heads must divide --heads, and --width be even")
    return args


def run(argv=None):
    """The command: its exit code."""
    args = parse_args(argv)
    args.device = pick_device("cpu" if args.device == "auto" and not torch.cuda.is_available() else args.device)
    if args.plot:
        figure_class()
    for spec in args.methods or ():
        plan_of(args, spec, torch.arange(8), 8)  # names, before anything long
    torch.set_num_threads(args.threads)
    sections = [args.section] if args.section != "all" else [s for s in SECTIONS if s != "kernel" or
                                                             args.device == "cuda"]
    report, lengths, methods = Report(args, args.results), args.lengths, args.methods
    for section in sections:
        whole = section in ("model", "load")
        args.lengths, args.methods = lengths or LENGTHS[section], methods or (("rope", "mesa") if whole else METHODS)
        SECTIONS[section](args, report)
    if args.plot:
        plot(args.plot, args.results)
    return 0


if __name__ == "__main__":
    run_command(run, "bench.py")
