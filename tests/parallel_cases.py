"""What test_parallel.py runs on several ranks: every method by N ranks against one process.

    torchrun --nproc-per-node 4 tests/parallel_cases.py       # one JSON line on stdout

A random LLaMA of two layers; a prompt whose length divides by nothing, then greedy tokens. What the ranks send is
counted and compared with parallel.traffic. Four ranks read with one method of each shape only.
"""
import json
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
from model import Llama, load_model  # noqa: E402
from positions import Method  # noqa: E402
from ranks import Ranks, join  # noqa: E402
from shards import load_shard  # noqa: E402

n, NEW, LAYERS = 211, 16, 2
EXTRA = ("mesa:overlap=5", "mesa:first=7:chunk=11", "dca:freq=yarn:attn-scale=logn", "alibi-mesa", "cosine-mesa",
         "pieces-rope", "pieces-mesa:overlap=3", "batch-mesa", "turn-mesa", "turn-rerope", "short-mesa")


def make_model(kind):
    """The same random model on all ranks; its positions by kind: rope, alibi, nope or cosine."""
    fields = {"alibi": {"freq": "alibi"}, "nope": {"freq": "nope"}, "cosine": {"cosine_attention": 8.0}}.get(kind, {})
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
        kind = special if special in ("alibi", "cosine") else kind
        params = {}
        if method == "longrope":
            params = {"short_factor": [1.0] * 8, "long_factor": [1.0 + p for p in range(8)], "factor": 4.0}
        found.append((name, kind, Method.of(method, **params), special))
    return found


SHAPES = ("rope", "nope", "self-extend", "dca", "streaming-llm", "lampe", "mesa", "mesa:overlap=5")
SPECIAL = ("alibi", "cosine", "pieces", "batch", "turn", "short")


def read(model, method, special):
    """(tokens, logits (steps, B, vocabulary)) of a prompt and of NEW greedy tokens."""
    generator = torch.Generator().manual_seed(3)
    length = {"short": 9, "long": 301}.get(special, n)
    tokens = torch.randint(3, 97, (2 if special == "batch" else 1, length), generator=generator)
    chunk = 16 if special == "pieces" else 8192
    cache = parallel.new_cache(model)
    if special == "turn":  # a first turn, of which the cache keeps all but the end
        prefill(model, tokens[:, :150], method, cache=cache)
        cache.cut(131)
    logits, cache = prefill(model, tokens, method, NEW, chunk, cache=cache)
    steps = []

    def choose(logits):
        steps.append(logits)
        return sample(logits)
    count = torch.stack(list(decode(model, logits, cache, method, tokens.shape[1], choose, NEW)))
    return count.tolist(), torch.stack(steps)


def compare(name, kind, method, special, ranks, want):
    """What became of a case: the largest error, whether tokens are the same, bytes sent and those of the formula."""
    model = make_model(kind)
    model.ranks = ranks
    ranks.sent.clear()
    tokens, logits = read(model, method, special)
    gathered = [None] * ranks.size
    dist.all_gather_object(gathered, (dict(ranks.sent), tokens), group=ranks.group)
    if ranks.rank:
        return None
    sent = Counter()
    for theirs, _ in gathered:
        sent.update(theirs)
    row = {"name": name, "N": ranks.size, "error": float((logits - want[1]).abs().max()),
           "same": all(tokens == want[0] for _, tokens in gathered), "sent": dict(sent)}
    if special != "turn":
        length = 9 if special == "short" else n
        sizes = parallel.sizes_of(model.config, torch.float32, 2 if special == "batch" else 1)
        plan = method.plan(model.config, length)
        counted, _ = parallel.traffic(plan, length, ranks.size, sizes, 16 if special == "pieces" else 8192)
        formula = {what: count * (LAYERS - 1) for what, count in counted.items() if what != "merge" and count}
        row["formula"] = {**formula, "merge": counted["merge"] * LAYERS * NEW}
    return row


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


def main():
    world = join("cases")
    all_cases = cases()
    mine = {number: read(make_model(kind), method, special)
            for number, (_, kind, method, special) in enumerate(all_cases) if number % world.size == world.rank}
    want = {}
    for theirs in world.everyone(mine):
        want.update(theirs)
    rows = []
    for size in (2, 3, 4):
        group = dist.new_group(list(range(size)))
        if world.rank < size:
            ranks = Ranks(world.rank, size, group=group)
            for number, case in enumerate(all_cases):
                if size < 4 or case[0] in SHAPES:
                    rows.append(compare(*case, ranks, want[number]))
        world.barrier()
    print(json.dumps({"keys": [row for row in rows if row], "shards": compare_shards(world)}))
    world.leave(0)


if __name__ == "__main__":
    main()
