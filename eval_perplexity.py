"""How well a model predicts a text, by method: loss by position, or perplexity by sliding window.

Does: two protocols on any UTF-8 text; never all logits at once; every document and window goes to a results file at
once, so that an interrupted run continues. Does not: download texts.

    python eval_perplexity.py book.txt --methods rope,mesa --length 2048       # mean loss in each of 8 stretches
    python eval_perplexity.py book.txt --methods rope,mesa --window 1024       # perplexity, stride 256

Loss by position: each document is `length` tokens in one pass, BOS in front, a prompt of n = length tokens to a method.
Sliding window (arXiv 2306.15595, section 3.2): windows of `window` tokens, BOS in front of each, every `stride` tokens;
one scores only the tokens that no earlier one has scored, so all but the first see window - stride tokens or more.
"""
import math
from pathlib import Path

import torch
import torch.nn.functional as F

from eval_passkey import Results, fingerprint, parse_method, select, short_hash
from generate import (asked_methods, method_list, new_parser, number, opened, placed, plan_maker, read_text, say,
                      warnings)
from model import KVCache, load_model
from positions import figure_class, run_command


@torch.no_grad()
def losses(model, ids, how, chunk=512, impl="auto"):
    """-log p (len(ids) - 1,) in nats of every token but the first, given all before it; prompt length n = len(ids)."""
    n, device = len(ids), next(model.parameters()).device
    plan, cache, tokens = plan_maker(model, n, *how), KVCache(model.config, n), torch.tensor([ids])
    out = []
    for begin in range(0, n - 1, chunk):
        stop = min(begin + chunk, n - 1)
        step = plan(torch.arange(begin, stop), torch.arange(stop))
        logits = model(tokens[:, begin:stop].to(device), step, cache, impl=impl)[0].float()
        out.append(F.cross_entropy(logits, tokens[0, begin + 1:stop + 1].to(device), reduction="none").cpu())
    return torch.cat(out)


def windows(count, window, stride):
    """(begin, end, first token to score) of sliding windows over `count` tokens.

    10 tokens, window 6, stride 2: (0, 6, 0) (2, 8, 6) (4, 10, 8).
    """
    out, scored = [], 0
    for begin in range(0, count, stride):
        end = min(begin + window, count)
        out.append((begin, end, scored))
        scored = end
        if end == count:
            return out


def head(tokenizer):
    """BOS, where the model has one."""
    return [] if tokenizer.bos_id is None else [tokenizer.bos_id]


def by_position(args, model, tokenizer, ids, spec, results):
    """Rows of the mean loss in every stretch of every document."""
    for document in range(args.documents):
        if any((spec, document, k) not in results.rows for k in range(args.buckets)):
            begin = document * (args.length - 1)
            piece = head(tokenizer) + ids[begin:begin + args.length - 1]
            nll = losses(model, piece, parse_method(spec), impl=args.impl)
            parts = nll.tensor_split(args.buckets)
            results.add([{"method": spec, "document": document, "bucket": k, "nll": round(float(part.mean()), 6),
                          "tokens": len(part)} for k, part in enumerate(parts)])
            say(f"{spec}: document {document + 1} of {args.documents}, {float(nll.mean()):.3f} nats per token")


def sliding(args, model, tokenizer, ids, spec, results):
    """Rows of the summed loss of every window's newly scored tokens."""
    spans = windows(len(ids), args.window - len(head(tokenizer)), args.stride)
    for index, (begin, end, first) in enumerate(spans):
        if (spec, index) not in results.rows:
            nll = losses(model, head(tokenizer) + ids[begin:end], parse_method(spec), impl=args.impl)
            nll = nll[-(end - first):]  # without a BOS nothing predicts the first token, and it is not scored
            results.add([{"method": spec, "span": index, "nll": round(float(nll.mean()), 6), "tokens": len(nll)}])
            say(f"\r{spec}: window {index + 1} of {len(spans)}", end="\n" if end == len(ids) else "")


def mean(rows):
    """(mean per token, mean of the rows' means) of the loss."""
    tokens = sum(row["tokens"] for row in rows)
    return sum(row["nll"] * row["tokens"] for row in rows) / tokens, sum(row["nll"] for row in rows) / len(rows)


def table_by_position(args, rows, L):
    """Markdown: methods x stretches, mean nats per token."""
    edges = [round(k * args.length / args.buckets) for k in range(args.buckets + 1)]
    head_line = "| method | " + " | ".join(f"{a}-{b}" for a, b in zip(edges, edges[1:])) + " |"
    found = {m: [mean(select(rows, method=m, bucket=k))[0] for k in range(args.buckets)] for m in args.methods}
    lines = [f"| {m} | " + " | ".join(f"{x:.3f}" for x in found[m]) + " |" for m in args.methods]
    note = f"nats per token by position; {args.documents} documents of {args.length} tokens, one pass each, window {L}"
    return "\n".join([note, head_line, "|---" * (args.buckets + 1) + "|", *lines])


def table_sliding(args, rows):
    """Markdown: perplexity of each method by both averages."""
    lines = [f"perplexity; sliding window of {args.window} tokens, stride {args.stride}, BOS in every window, "
             "only unscored tokens", "| method | per token | mean of windows |", "|---|---|---|"]
    for m in args.methods:
        token, window = mean(select(rows, method=m))
        lines.append(f"| {m} | {math.exp(token):.3f} | {math.exp(window):.3f} |")
    return "\n".join(lines)


def plot(args, rows, L):
    """Loss by position as a picture, dashed at the window. Needs matplotlib."""
    Figure = figure_class()
    figure = Figure(figsize=(8, 4.5), dpi=110, layout="constrained")
    axes = figure.subplots()
    middle = [(k + 0.5) * args.length / args.buckets for k in range(args.buckets)]
    for m in args.methods:
        axes.plot(middle, [mean(select(rows, method=m, bucket=k))[0] for k in range(args.buckets)], marker=".", label=m)
    axes.axvline(L, color="black", linestyle="--", linewidth=1)
    axes.set(xlabel="position in tokens", ylabel="nats per token")
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(args.plot)


def parse_args(argv):
    parser, flag = new_parser(__doc__)
    parser.add_argument("text", metavar="FILE", help="a UTF-8 text")
    flag("methods", type=method_list, help="comma-separated, as in eval_passkey.py")
    flag("length", type=number(int, 2), help="loss by position: tokens per document; default: 8 times the window")
    flag("documents", type=number(int, 1), default=1, help="consecutive parts of the text, of --length tokens each")
    flag("buckets", type=number(int, 1), default=8, help="stretches that a document is divided into")
    flag("window", type=number(int, 2), help="sliding-window perplexity with windows of so many tokens instead")
    flag("stride", type=number(int, 1), help="default: 256, or half of a --window below 512")
    flag("tokens", type=number(int, 2), help="with --window: use only the first so many tokens of the text")
    flag("results", default="perplexity.jsonl", metavar="FILE")
    flag("plot", metavar="FILE", help="loss by position as a picture (needs matplotlib)")
    args = parser.parse_args(argv)
    args.stride = args.stride or min(256, (args.window or 512) // 2)
    if args.window and (args.length or args.plot):
        parser.error("--window is another protocol than --length and --plot")
    return args


def check(args, config, tokenizer, ids):
    """ValueError for lengths that do not go together, before anything long; warnings of what will not work well."""
    if args.plot:
        figure_class()
    if len(ids) < 2:
        raise ValueError(f"{args.text}: too short a text")
    if args.window and args.stride > args.window - len(head(tokenizer)):
        raise ValueError(f"--stride {args.stride} leaves gaps between windows of {args.window} tokens, BOS included")
    if args.buckets >= args.length:
        raise ValueError(f"--buckets {args.buckets} must be fewer than the {args.length} tokens of a document")
    if not args.window and len(ids) < args.documents * (args.length - 1):
        raise ValueError(f"{args.text}: {len(ids)} tokens, not --documents {args.documents} of --length {args.length}")
    for spec in args.methods:
        for warning in warnings(config, args.window or args.length, *parse_method(spec)):
            say(f"warning: {warning}")


def run(argv=None):
    """The command: its exit code."""
    args = parse_args(argv)
    path, config, tokenizer = opened(args)
    L, text = config.train_len, read_text(args.text)
    ids = tokenizer.encode(text, bos=False)[:args.tokens]
    args.length = args.length or 8 * L
    args.methods = asked_methods(config, args.methods, (config.freq, "rerope", "self-extend", "mesa"))
    check(args, config, tokenizer, ids)
    device, dtype = placed(args, config)
    protocol = {"window": args.window, "stride": args.stride, "text_tokens": len(ids)} if args.window else {
        "length": args.length, "buckets": args.buckets}
    settings = {"ckpt": args.ckpt, "weights": fingerprint(path), "text": Path(args.text).name,
                "text_hash": short_hash(text.encode()), **protocol,
                "train_len": L, "dtype": str(dtype).removeprefix("torch."), "impl": args.impl}
    say(" ".join(f"{name}={value}" for name, value in {**settings, "methods": ",".join(args.methods),
                                                         "device": device}.items()))
    place = ("method", "span") if args.window else ("method", "document", "bucket")
    results, model = Results(args.results, settings, place), load_model(path, config, dtype, device)
    for spec in args.methods:
        (sliding if args.window else by_position)(args, model, tokenizer, ids, spec, results)
    rows = [row for row in results.rows.values() if args.window or row["document"] < args.documents]
    print(table_sliding(args, rows) if args.window else table_by_position(args, rows, L))
    if args.plot:
        plot(args, rows, L)
    return 0


if __name__ == "__main__":
    run_command(run, "eval_perplexity.py")
