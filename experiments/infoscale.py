"""InfoScale and CosScale in miniature: trained at 64 tokens, evaluated at up to 64 times as many.

Does: train a GAU (causal, and on masked words) and a LLaMA, each with dot products and with cosines (CosScale), on the
prose of train.py; then measure, at 1 to 64 times the window, loss and accuracy under softmax alone, InfoScale, log-n,
CosScale and both, the entropy of every layer, and how far attention reaches. One command; killed, it goes on where it
was. Does not: use the paper's data or weights (arXiv 2501.08570), of which we have seen no table: it quotes none.

    python -m experiments.infoscale --out runs/infoscale                                     # 3 seeds: the whole table
    python -m experiments.infoscale --out runs/smoke --steps 20 --batch 4 --seeds 1 --times 1,4 --documents 1   # to try
    python -m experiments.infoscale --out runs/infoscale --cosine 8 --plot infoscale.png     # another s beside it

causal: the loss of the last window of tokens, which see nearly all n. masked: of the 15 % of all tokens that a mask
has replaced. Entropy and reach (the distance within which 90 % of the attention lies) are means over 64 queries and all
heads: the last ones of a causal model, else evenly spread.

Letters: n tokens of an evaluation, L training length, H heads.
"""
import argparse
import math
import os
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from checkpoint import find_checkpoint
from cli import Results, counts, markdown, number, plain_parser, run_command, say, select, short_hash
from config import Config
from experiments.gau import Gau, GauConfig
from finetune import HELD_OUT, packed
from rotation import rotate_keys, rotate_queries
from show import figure_class, length_axis, new_figure, save
from tokenizer import load_tokenizer
from train import MUON, learning_rate, make_optimizers, new_model, prose, restore_state, save_state

ARCHITECTURES = ("llama", "gau", "gau-masked")
SETTINGS = {  # name in the tables: (whether trained with cosines, the row of METHODS at evaluation)
    "softmax":            (False, "rope"),
    "InfoScale":          (False, "infoscale"),
    "log-n":              (False, "logn"),
    "CosScale":           (True, "rope"),
    "CosScale+InfoScale": (True, "infoscale"),
}
MASKED = 0.15
QUERIES = 64     # whose attention is looked at


# ---------------------------------------------------------------------------------------------------------------------
# models and their training

def build(args, architecture, cosine, vocab_size):
    """A model with fresh weights; cosine: the s of CosScale, or None."""
    if architecture == "llama":
        sizes = argparse.Namespace(vocab=vocab_size, width=128, layers=4, heads=4, kv_heads=2, rope_theta=args.theta,
                                   window=args.window, store="float32", position="rope", cosine=cosine)
        return new_model(sizes)
    return Gau(GauConfig(vocab_size=vocab_size, rope_theta=args.theta, train_len=args.window, cosine=cosine,
                         causal=architecture == "gau"))


def masks_words(model):
    return isinstance(model, Gau) and not model.config.causal


def draw(model, ids, generator):
    """(what the model reads, what it should say, where that counts), each (B, T), of ids (B, T + 1) or for masked
    words (B, T)."""
    if not masks_words(model):
        return ids[:, :-1], ids[:, 1:], torch.ones_like(ids[:, 1:], dtype=torch.bool)
    chosen = torch.rand(ids.shape, generator=generator) < MASKED
    chosen[:, -1] |= ~chosen.any(1)
    return ids.masked_fill(chosen, model.config.vocab_size), ids, chosen


def rows(model, stream, starts, length, bos):
    """ids of pieces of the stream, BOS in front: (B, length + 1), or for masked words (B, length)."""
    room = length - len(bos) + (not masks_words(model))
    front = torch.tensor(bos, dtype=torch.int64)
    return torch.stack([torch.cat((front, stream[start:start + room].long())) for start in starts])


def train_model(args, name, model, stream, bos, seed):
    """Train a model in place, or go on with it, or read it, if it has been trained with these settings."""
    settings = argparse.Namespace(name=name, steps=args.steps, batch=args.batch, lr=args.lr, warmup=args.warmup,
                                  window=args.window, theta=args.theta, seed=seed)
    file = args.out / f"{name}-{short_hash(str(settings).encode())}.safetensors"
    if file.is_file():
        model.load_state_dict(load_file(file))
        return
    state = file.with_suffix(".pt")
    optimizers = make_optimizers(model, args.lr)
    done, curve = restore_state(state, settings, model, optimizers)
    losses = []
    for step in range(done, args.steps):
        losses.append(train_step(step, settings, model, optimizers, stream, bos))
        if (step + 1) % 100 == 0 or step + 1 == args.steps:
            curve.append({"step": step + 1, "loss": sum(losses) / len(losses)})
            say(f"{name}: step {step + 1} of {args.steps}, {curve[-1]['loss']:.3f} nats per token")
            save_state(state, settings, step + 1, model, optimizers, curve)
            losses = []
    part = file.with_suffix(".part")
    save_file({weight: tensor.detach().contiguous() for weight, tensor in model.named_parameters()}, part)
    os.replace(part, file)
    state.unlink()


def train_step(step, settings, model, optimizers, stream, bos):
    """One update; the loss before it. Rows and masks depend on seed and step alone."""
    generator = torch.Generator().manual_seed(settings.seed * 10 ** 6 + step)
    starts = torch.randint(len(stream) - settings.window - 1, (settings.batch,), generator=generator).tolist()
    read, wanted, counted = draw(model, rows(model, stream, starts, settings.window, bos), generator)
    loss = F.cross_entropy(model(read, model.plan("rope", n=read.shape[1]))[counted], wanted[counted])
    model.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer, times in zip(optimizers, (1, MUON)):
        for group in optimizer.param_groups:
            group["lr"] = times * learning_rate(step, settings)
        optimizer.step()
    return float(loss.detach())


# ---------------------------------------------------------------------------------------------------------------------
# what attention does

def attention_of(q, k, plan, asking):
    """Attention weights (B, H, len(asking), Tk) of some queries, un-rotated q (B, H, T, D), k (B, Hkv, T, D)."""
    [region] = plan.regions
    queries = rotate_queries(q, plan, 0)[:, :, asking].float()
    keys = rotate_keys(k, plan, 0).float().repeat_interleave(q.shape[1] // k.shape[1], 1)
    j = torch.arange(plan.Tk)
    seen = (j >= region.start[asking, None]) & (j < region.end[asking, None])
    scores = queries @ keys.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return scores.masked_fill(~seen, -math.inf).softmax(-1)


def entropy(weights):
    """The mean of -sum p ln p, in nats, of attention weights (*, keys)."""
    return float(torch.special.entr(weights).sum(-1).mean())


def reach(weights, asking, share=0.9):
    """The mean distance |i - j| within which this share of a query's attention lies; weights (B, H, queries, keys)."""
    away = (asking[:, None] - torch.arange(weights.shape[-1])).abs()       # (queries, keys)
    order = away.argsort(-1)
    mass = weights.gather(-1, order.expand_as(weights)).cumsum(-1)
    last = (mass < share).sum(-1).clamp(max=weights.shape[-1] - 1)         # (B, H, queries)
    nearest_first = away.gather(-1, order).expand(*weights.shape)
    return float(nearest_first.gather(-1, last[..., None]).float().mean())


def watch(model, found, asking):
    """Hooks that append (entropy, reach) to found, layer by layer, in every forward pass."""
    def look(module, given):
        x, plan = given[0], given[1]
        if hasattr(module, "watched"):
            q, k = module.watched(x)
        else:
            q, k = module.heads(module.q_proj(x)), module.heads(module.k_proj(x))
        weights = attention_of(q, k, plan, asking)
        found.append((entropy(weights), reach(weights, asking)))
    modules = model.layers if isinstance(model, Gau) else [block.self_attn for block in model.model.layers]
    return [module.register_forward_pre_hook(look) for module in modules]


@torch.no_grad()
def evaluate(args, model, method, n, document, stream, bos):
    """A row of what a model does with a document of n held-out tokens under a method."""
    ids = rows(model, stream, [document * n], n, bos)
    read, wanted, counted = draw(model, ids, torch.Generator().manual_seed(document))
    asking = torch.linspace(0, n - 1, min(QUERIES, n)).long()
    if not masks_words(model):
        counted[:, :-args.window] = False
        asking = torch.arange(n - min(QUERIES, n), n)
    found = []
    hooks = watch(model, found, asking)
    logits = model(read, model.plan(method, n=n))[counted].float()
    for hook in hooks:
        hook.remove()
    return {"loss": round(float(F.cross_entropy(logits, wanted[counted])), 5),
            "accuracy": round(float((logits.argmax(-1) == wanted[counted]).float().mean()), 5),
            "entropy": [round(each, 4) for each, _ in found], "reach": [round(each, 1) for _, each in found]}


# ---------------------------------------------------------------------------------------------------------------------
# the tables

def averaged(found, field, layer=None):
    """(mean over seeds, spread between them) of a field of rows; layer: which one's, of a field that has all."""
    by_seed = {}
    for row in found:
        by_seed.setdefault(row["seed"], []).append(row[field] if layer is None else row[field][layer])
    means = [statistics.mean(values) for values in by_seed.values()]
    return statistics.mean(means), statistics.stdev(means) if len(means) > 1 else None


def cell(mean, spread, digits):
    return f"{mean:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")


def report(args, found):
    """Tables of loss and accuracy, and of entropy and reach by layer, on stdout; rows: those of the results."""
    lengths = [times * args.window for times in args.times]
    for architecture in args.models:
        ours = select(found, model=architecture)
        for field, digits in (("loss", 3), ("accuracy", 3)):
            lines = [[name] + [cell(*averaged(select(ours, setting=name, n=n), field), digits) for n in lengths]
                     for name in SETTINGS]
            print(f"\n{architecture}, {field} at {', '.join(f'{n}' for n in lengths)} tokens (window {args.window}, "
                  f"s = {args.cosine:g}, {len(args.seeds)} seeds)")
            print(markdown(["setting", *(f"{n} ({n // args.window}x)" for n in lengths)], lines))
        for field, unit in (("entropy", "nats"), ("reach", "tokens that hold 90 %")):
            lines = []
            for name in SETTINGS:
                for layer in range(len(ours[0][field])):
                    cells = [averaged(select(ours, setting=name, n=n), field, layer)[0] for n in lengths]
                    lines.append([name, layer + 1, *(f"{mean:.2f}" for mean in cells)])
            print(f"\n{architecture}, {field} of attention by layer ({unit})")
            print(markdown(["setting", "layer", *lengths], lines))


def plot(args, found):
    """Loss (above) and mean entropy of all layers (below) by length, a column for each architecture."""
    figure = new_figure(4.5 * len(args.models), 7)
    grid = figure.subplots(2, len(args.models), squeeze=False)
    lengths = [times * args.window for times in args.times]
    for column, architecture in enumerate(args.models):
        for name in SETTINGS:
            here = [select(found, model=architecture, setting=name, n=n) for n in lengths]
            grid[0, column].plot(lengths, [averaged(rows, "loss")[0] for rows in here], marker=".", label=name)
            entropies = [statistics.mean(statistics.mean(row["entropy"]) for row in rows) for rows in here]
            grid[1, column].plot(lengths, entropies, marker=".", label=name)
        grid[0, column].set(title=architecture, ylabel="nats per token")
        grid[1, column].set(xlabel="tokens", ylabel="entropy of attention in nats")
        for axes in grid[:, column]:
            length_axis(axes, lengths)
    grid[0, 0].legend(fontsize=7)
    save(figure, args.plot)


# ---------------------------------------------------------------------------------------------------------------------
# the command line

def parse_args(argv):
    parser, flag = plain_parser(__doc__)
    flag("out", type=Path, required=True, metavar="FOLDER", help="for weights and results")
    flag("models", type=lambda text: text.split(","), default=list(ARCHITECTURES), metavar="M,M,...",
         help=f"of {', '.join(ARCHITECTURES)}; default: all")
    flag("seeds", type=counts, default=[1, 2, 3], metavar="N,N,...")
    flag("steps", type=number(int, 1), default=2000, help="of every training")
    flag("batch", type=number(int, 1), default=64, help="rows of a step")
    flag("lr", type=number(float, 1e-9, 1), default=3e-3)
    flag("warmup", type=number(int, 0), default=100)
    flag("window", type=number(int, 8), default=64, help="tokens of a row in training")
    flag("theta", type=number(float, 2), default=10000.0, help="base of the rotary frequencies")
    flag("cosine", type=number(float, 1e-3), default=32.0, help="s of CosScale; the release has 128 for its GAU")
    flag("times", type=counts, default=[1, 2, 4, 8, 16, 32, 64], metavar="N,N,...", help="lengths, in windows")
    flag("documents", type=number(int, 1), default=4, help="held-out texts of each length")
    flag("plot", metavar="FILE", help="loss and entropy by length as a picture (needs matplotlib)")
    args = parser.parse_args(argv)
    if not set(args.models) <= set(ARCHITECTURES):
        parser.error(f"--models: there are {', '.join(ARCHITECTURES)}")
    return args


def texts(tokenizer, config):
    """(the tokens of training, those of the evaluation), of the prose that comes with Python."""
    documents = prose()
    rest = [text for place, text in enumerate(documents) if place % HELD_OUT]
    return packed(rest, tokenizer, config), packed(documents[::HELD_OUT], tokenizer, config)


def run(argv=None):
    """The command: its exit code."""
    args = parse_args(argv)
    if args.plot:
        figure_class()
    torch.set_num_threads(1)  # so that sums are made in one order, and a rerun gives the same weights
    args.out.mkdir(parents=True, exist_ok=True)
    folder = find_checkpoint("tiny")  # for its tokenizer
    config = Config.from_hf(folder)
    tokenizer = load_tokenizer(folder, config.bos_token_id)
    bos = tokenizer.encode("")
    stream, held_out = texts(tokenizer, config)
    if len(held_out) < args.documents * max(args.times) * args.window + 1:
        raise ValueError(f"--documents {args.documents}: the held-out text has {len(held_out)} tokens")

    common = {"window": args.window, "steps": args.steps, "batch": args.batch, "lr": args.lr, "theta": args.theta,
              "warmup": args.warmup, "cosine": args.cosine}
    results = Results(args.out / "results.jsonl", common, ("model", "seed", "setting", "n", "document"))
    for seed in args.seeds:
        for architecture in args.models:
            for cosine in (None, args.cosine):
                run_model(args, architecture, cosine, seed, config.vocab_size, stream, held_out, bos, results)
    found = [row for row in results.rows.values() if row["seed"] in args.seeds and row["document"] < args.documents]
    report(args, found)
    if args.plot:
        plot(args, found)
    return 0


def run_model(args, architecture, cosine, seed, vocab_size, stream, held_out, bos, results):
    """Train one model, and measure it in all settings that are its own."""
    torch.manual_seed(seed)
    model = build(args, architecture, cosine, vocab_size)
    kind = "dot" if cosine is None else f"cosine{cosine:g}"
    train_model(args, f"{architecture}-{kind}-{seed}", model, stream, bos, seed)
    model.eval()
    for name, (is_cosine, method) in SETTINGS.items():
        if is_cosine != (cosine is not None):
            continue
        for n in (times * args.window for times in args.times):
            for document in range(args.documents):
                if (architecture, seed, name, n, document) not in results.rows:
                    row = evaluate(args, model, method, n, document, held_out, bos)
                    results.add([{"model": architecture, "seed": seed, "setting": name, "n": n, "document": document,
                                  **row}])
            say(f"{architecture} {seed} {name}: {n} tokens measured")


if __name__ == "__main__":
    run_command(run, "infoscale.py")
