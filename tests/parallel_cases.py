"""What test_parallel.py runs on several ranks: every method by N ranks against one process.

    MASTER_ADDR=127.0.0.1 MASTER_PORT=29500 python tests/parallel_cases.py       # one JSON line on stdout

A random LLaMA of two layers; a prompt whose length divides by nothing, then greedy tokens. What the ranks send is
counted and compared with parallel.traffic. Every method by two ranks, one of each shape by three. The file forks, so
that its four processes import torch once.
"""
import json
import os
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import parallel  # noqa: E402
from checkpoint import find_checkpoint  # noqa: E402
from config import Config  # noqa: E402
from generate import decode, prefill, sample  # noqa: E402
from geometry import METHODS  # noqa: E402
from memory import estimate  # noqa: E402
from model import Llama, load_model  # noqa: E402
from positions import Method  # noqa: E402
from ranks import Ranks, join  # noqa: E402
from shards import load_shard  # noqa: E402

n, NEW, LAYERS, WORLD = 131, 5, 2, 4
EXTRA = ("mesa:overlap=5", "mesa:first=7:chunk=11", "dca:freq=yarn:attn-scale=logn", "alibi-mesa", "cosine-mesa",
         "pieces-rope", "pieces-mesa:overlap=3", "batch-mesa", "turn-mesa", "turn-rerope", "short-mesa",
         "layers-mesa", "layers-rope", "int8-mesa")


def make_model(kind):
    """The same random model on all ranks; its positions by kind: rope, alibi, nope or cosine; with a sliding layer; or
    with a cache of fewer bytes."""
    fields = {"alibi": {"freq": "alibi"}, "nope": {"freq": "nope"}, "cosine": {"cosine_attention": 8.0},
              "layers": {"layer_methods": ("sliding:window=24", "")}, "int8": {"cache_dtype": "int8"}}.get(kind, {})
    config = Config(97, 48, 64, LAYERS, 4, 2, 16, rope_theta=500.0, max_position_embeddings=40, train_len=40,
                    eos_token_id=(2,), **fields)
    torch.manual_seed(1)
    model = Llama(config).eval().requires_grad_(False)
    for weight in model.parameters():
        if weight.ndim == 2:
            weight.mul_(2)
    return model


def cases():
    """[(name, kind of model, Method, what is special)]."""
    found = []
    for name in (*METHODS, *EXTRA):
        special, _, method = name.rpartition("-") if name.split("-")[0] in SPECIAL else ("", "", name)
        kind = {"alibi": "alibi", "nope": "nope", "cosscale": "cosine"}.get(method, "rope")
        kind = special if special in ("alibi", "cosine", "layers", "int8") else kind
        params = {}
        if method == "longrope":
            params = {"short_factor": [1.0] * 8, "long_factor": [1.0 + p for p in range(8)], "factor": 4.0}
        found.append((name, kind, Method.of(method, **params), special))
    return found


SHAPES = ("rope", "nope", "self-extend", "dca", "streaming-llm", "lampe", "mesa", "mesa:overlap=5", "layers-mesa")
SPECIAL = ("alibi", "cosine", "pieces", "batch", "turn", "short", "layers", "int8")


def read(model, method, special):
    """(tokens, logits (steps, B, vocabulary)) of a prompt and of NEW greedy tokens."""
    generator = torch.Generator().manual_seed(3)
    length = {"short": 9, "long": 301}.get(special, n)
    tokens = torch.randint(3, 97, (2 if special == "batch" else 1, length), generator=generator)
    chunk = chunk_of(special)
    cache = parallel.new_cache(model)
    if special == "turn":  # a first turn, of which the cache keeps all but the end
        prefill(model, tokens[:, :100], method, cache=cache)
        cache.cut(87)
    logits, cache = prefill(model, tokens, method, NEW, chunk, cache=cache)
    steps = []

    def choose(logits):
        steps.append(logits)
        return sample(logits)
    written = torch.stack(list(decode(model, logits, cache, method, tokens.shape[1], choose, NEW)))
    return written.tolist(), torch.stack(steps), cache


def compare(name, kind, method, special, ranks, want):
    """What became of a case: the largest error, whether tokens are the same, bytes sent and those of the formula."""
    model = make_model(kind)
    model.ranks = ranks
    ranks.sent.clear()
    tokens, logits, cache = read(model, method, special)
    held = sum(x[:, :, :length].nbytes for x, length in zip((*cache.held.k, *cache.held.v), 2 * cache.held.length))
    gathered = [None] * ranks.size
    dist.all_gather_object(gathered, (dict(ranks.sent), tokens, held), group=ranks.group)
    if ranks.rank:
        return None
    sent = Counter()
    for theirs, _, _ in gathered:
        sent.update(theirs)
    row = {"name": name, "N": ranks.size, "error": float((logits - want[1]).abs().max()),
           "same": all(tokens == want[0] for _, tokens, _ in gathered), "sent": dict(sent)}
    if special not in ("turn", "batch", "short"):
        row["held"] = max(held for _, _, held in gathered)
        row["estimate"] = estimate(model.config, method, [n], NEW - 1, torch.float32, chunk=chunk_of(special),
                                   N=ranks.size).cache
    if special != "turn":
        row["formula"] = formula(model.config, method, special, ranks.size)
    return row


def chunk_of(special):
    return 16 if special == "pieces" else 8192


def formula(config, method, special, N):
    """The bytes of {what} that all ranks send: of the last layer of the prompt only its last token attends."""
    length = 9 if special == "short" else n
    sizes = parallel.sizes_of(config, torch.float32, 2 if special == "batch" else 1)
    plans = config.plans(method, length)
    total = Counter()
    for own in (config.layer_methods or [""] * LAYERS)[:-1]:
        counted, _ = parallel.traffic(plans[own], length, N, sizes, chunk_of(special), parallel.leading(plans))
        merged = counted.pop("merge")
        total.update(counted)
    return {**{what: count for what, count in total.items() if count}, "merge": merged * LAYERS * NEW}


def compare_shards(world):
    """Shipped checkpoints, their matrices cut in two: against one process; then also their keys spread over two."""
    keys, matrices = world.split(2)
    rows = []
    for folder, method, with_keys in (("tiny", "rope", 0), ("tiny", "mesa", 0), ("tiny-alibi", "alibi", 0),
                                      ("tiny-cosine", "cosscale", 0), ("tiny-alibi", "mesa", 1)):
        path = find_checkpoint(folder)
        config = Config.from_hf(path)
        model = load_shard(path, config, matrices, "float32")
        model.ranks = keys if with_keys else None
        got = read(model, Method(method), "long")
        want = read(load_model(path, config, "float32"), Method(method), "long")
        rows.append({"name": f"{folder} {method}", "error": float((got[1] - want[1]).abs().max()),
                     "same": got[0] == want[0], "sent": dict(matrices.sent)})
        matrices.sent.clear()
    return rows


def compare_keys(world):
    """The rows of all cases, on all ranks: each by ranks 0 and 1 or by 2 and 3, one of each shape by three."""
    all_cases = cases()
    mine = {number: read(make_model(kind), method, special)[:2]
            for number, (_, kind, method, special) in enumerate(all_cases) if number % WORLD == world.rank}
    want = {number: found for theirs in world.everyone(mine) for number, found in theirs.items()}
    rows = []
    pair = world.rank // 2
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3]), dist.new_group([0, 1, 2])]
    two = Ranks(world.rank % 2, 2, group=groups[pair])
    for number, case in enumerate(all_cases):
        if number % 2 == pair:
            rows.append(compare(*case, two, want[number]))
    three = Ranks(world.rank, 3, group=groups[2])
    for number, case in enumerate(all_cases):
        if world.rank < 3 and case[0] in SHAPES:
            rows.append(compare(*case, three, want[number]))
    return [row for theirs in world.everyone(rows) for row in theirs if row]


def main():
    rank = next((rank for rank in range(1, WORLD) if os.fork() == 0), 0)  # rank 0 is the process that was started
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), LOCAL_WORLD_SIZE=str(WORLD))
    world = join("cases")
    rows = compare_keys(world)
    print(json.dumps({"keys": rows, "shards": compare_shards(world)}))
    world.leave(0)


if __name__ == "__main__":
    main()
