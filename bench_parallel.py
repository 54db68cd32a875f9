"""Several processes beside one: what bench.py parallel measures on this machine, and what it computes for larger ones.

Measured, by gloo processes of one thread each: whether tokens and logits are those of one process, bytes sent against
parallel.traffic, memory of the caches, and the CPU time of the busiest process: what a machine with a core for each
would wait for, as long as none waits for another's keys. Computed: seconds of a prefill by up to 64 GPUs, from the same
counts of bytes and pairs, and bandwidths that are assumed. Does not: measure networks or GPUs.

    python bench.py parallel --lengths 2049,8191
    torchrun --nproc-per-node 2 bench_parallel.py --methods mesa --lengths 8191 --out FILE      # one measurement

Letters: N ranks, n tokens of a prompt, H query heads, D width of a head.
"""
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from checkpoint import find_checkpoint
from cli import counts, method_list, plain_parser, run_command
from config import Config
from generate import decode, prefill, sample
from model import load_model
from parallel import Holdings, errands, key_bytes, query_bytes, sizes_of, spread, traffic, waves
from plan import visible_keys
from positions import Method
from ranks import Ranks

MEASURED = (1, 2, 4)                             # processes
COMPUTED = (1, 8, 64)                           # GPUs
METHODS = ("rope", "rerope", "streaming-llm", "mesa", "mesa:overlap=32")
NEW = 16                                         # greedy tokens
LLAMA_7B = Config(32000, 4096, 11008, 32, 32, 32, 128, max_position_embeddings=4096, train_len=4096)
FLOPS = 989e12 / 2                               # of an H100 in bfloat16, half of what is printed on it
BYTES = 50e9                                     # a second into or out of one GPU: one port of 400 Gb/s
LONG = (131_072, 1_048_576)


# ---------------------------------------------------------------------------------------------------------------------
# measured

def measure(ranks, model, method, n):
    """One prompt of n random tokens and NEW greedy ones by these ranks: {what: number or tensor}, on rank 0."""
    generator = torch.Generator().manual_seed(n)
    tokens = torch.randint(3, model.config.vocab_size, (1, n), generator=generator)
    steps = []

    def choose(logits):
        steps.append(logits.clone())
        return sample(logits)
    ranks.sent.clear()
    begin = time.thread_time()
    logits, cache = prefill(model, tokens, method, NEW)
    reading = time.thread_time() - begin
    prompt_sent = dict(ranks.sent)
    begin = time.thread_time()
    written = [int(token) for token in decode(model, logits, cache, method, n, choose, NEW)]
    decoding = (time.thread_time() - begin) / (NEW - 1)
    held = cache.held if ranks.size > 1 else cache
    size = sum(held.k[layer][:, :, :length].nbytes * 2 for layer, length in enumerate(held.length))
    mine = {"prefill": reading, "decode": decoding, "cache": size, "sent": prompt_sent}
    everyone = ranks.everyone(mine) if ranks.size > 1 else [mine]
    sent = Counter()
    for theirs in everyone:
        sent.update(theirs["sent"])
    return {"prefill": max(theirs["prefill"] for theirs in everyone), "cache": max(t["cache"] for t in everyone),
            "decode": max(theirs["decode"] for theirs in everyone), "sent": dict(sent), "tokens": written,
            "logits": torch.cat(steps)}


def formula(config, method, n, N):
    """The bytes of {what} that all ranks together send while they read a prompt: of a layer, times the layers; in the
    last one only its last token attends."""
    sent, _ = traffic(method.plan(config, n), n, N, sizes_of(config, torch.float32))
    layers = config.num_hidden_layers
    return {what: count * (layers if what == "merge" else layers - 1) for what, count in sent.items() if count}


def run_by(N, methods, lengths):
    """What measure finds by N processes: {(method, n): {...}}. ValueError where a process fails."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.pt"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(N), __file__,
                   "--methods", ",".join(methods), "--lengths", ",".join(map(str, lengths)), "--out", out]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if done.returncode:
            raise ValueError(f"{N} processes failed: {done.stderr.strip().splitlines()[0]}")
        return torch.load(out, weights_only=True)


def measured_rows(methods, lengths):
    """The rows of the table: every method, length and number of processes."""
    config = Config.from_hf(find_checkpoint("tiny"))
    found = {N: run_by(N, methods, lengths) for N in MEASURED}
    rows = []
    for n in lengths:
        for method in methods:
            one = found[1][method, n]
            for N in MEASURED:
                this = found[N][method, n]
                sent = sum(this["sent"].values())
                want = sum(formula(config, Method.parse(method), n, N).values()) if N > 1 else 0
                rows.append({"method": method, "tokens": n, "N": N, "same tokens": this["tokens"] == one["tokens"],
                             "logits differ by": float((this["logits"] - one["logits"]).abs().max()),
                             "kB sent": sent / 1e3, "formula": want / 1e3, "cache MiB": this["cache"] / 2**20,
                             "prefill CPU ms": this["prefill"] * 1e3, "of one": this["prefill"] / one["prefill"],
                             "token CPU ms": this["decode"] * 1e3})
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# computed

def seconds(config, method, n, N, piece=8192, dtype=torch.bfloat16):
    """(seconds, of which it is the network that is waited for, GB that cross it) of a prefill by N GPUs.

    A wave takes as long as its slowest GPU computes or sends or receives, whichever is longest: all of it is taken to
    overlap. What a query sees is counted where the keys are that it meets.
    """
    sizes = sizes_of(config, dtype)
    layers, width = config.num_hidden_layers, config.hidden_size
    key_width = config.num_key_value_heads * config.head_dim
    weights = layers * (2 * width ** 2 + 2 * width * key_width + 3 * width * config.intermediate_size)
    plan = method.plan(config, n)
    pairs_of = visible_keys(plan)
    holdings = Holdings.none(N)
    total = waited = crossed = 0.0
    for wave in waves(plan, 0, n - 1, N, piece):
        pairs, out, into = torch.zeros(3, N, dtype=torch.float64)
        for asker, owner, found in errands(plan, holdings, wave, sizes):
            there, back = query_bytes(sizes, found.rows.stop - found.rows.start)
            if found.by_keys:
                there, back = 0, key_bytes(sizes, len(found.keys))
            else:
                moved = int(visible_keys(found.plan).sum())
                pairs[asker] -= moved
                pairs[owner] += moved
            out[asker], into[owner] = out[asker] + there, into[owner] + there
            out[owner], into[asker] = out[owner] + back, into[asker] + back
        tokens = torch.tensor([float(len(holdings.tokens(wave, rank))) for rank in range(N)])
        for rank in range(N):
            pairs[rank] += int(pairs_of[holdings.tokens(wave, rank)].sum())
        flops = 2 * weights * tokens + 4 * config.num_attention_heads * config.head_dim * layers * pairs
        computing = float(flops.max()) / FLOPS
        network = layers * float(torch.maximum(out, into).max()) / BYTES
        total += max(computing, network)
        waited += max(0.0, network - computing)
        crossed += layers * float(out.sum()) / 1e9
    return total, waited, crossed


def computed_rows(methods, lengths=LONG, sizes=COMPUTED):
    """The rows of the table: LLaMA-2-7B by up to 64 GPUs."""
    rows = []
    for n in lengths:
        for method in methods:
            alone = None
            for N in sizes:
                total, waited, crossed = seconds(LLAMA_7B, Method.parse(method), n, N)
                alone = alone or total
                cache = key_bytes(sizes_of(LLAMA_7B, torch.bfloat16), n) * LLAMA_7B.num_hidden_layers / N
                rows.append({"method": method, "tokens": n, "GPUs": N, "prefill s": total, "network s": waited,
                             "speed-up": alone / total, "GB sent": crossed, "cache GiB a GPU": cache / 2**30})
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# one measurement, by torchrun

def parse_args(argv):
    parser, flag = plain_parser(__doc__)
    flag("methods", type=method_list, required=True)
    flag("lengths", type=counts, required=True)
    flag("out", type=Path, required=True)
    return parser.parse_args(argv)


def run(argv=None, ranks=None):
    """The command: its exit code."""
    args = parse_args(argv)
    torch.set_num_threads(1)
    ranks = ranks or Ranks()
    path = find_checkpoint("tiny")
    model = load_model(path, Config.from_hf(path), torch.float32)
    spread(model, ranks)
    measure(ranks, model, Method.parse(args.methods[0]), args.lengths[0])  # to warm up
    found = {(method, n): measure(ranks, model, Method.parse(method), n)
             for n in args.lengths for method in args.methods}
    if ranks.rank == 0:
        torch.save(found, args.out)
    return 0


if __name__ == "__main__":
    run_command(run, "bench_parallel.py")
