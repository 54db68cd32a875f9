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
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from cache import KVCache
from cli import (Results, fingerprint, markdown, method_list, methods_asked, new_parser, number, open_checkpoint, place,
                 read_text, run_command, say, select, settings_line, short_hash, type_name)
from model import load_model
from show import figure_class, plot_losses, warnings

DEFAULT_METHODS = ("rerope", "self-extend", "mesa")  # after what config.json says


# ---------------------------------------------------------------------------------------------------------------------
# the loss of a prompt

@torch.no_grad()
def losses(model, ids, method, chunk=512, impl="auto"):
    """-log p in nats of every token of ids but the first, given all before it: (len(ids) - 1,), on the CPU.

    The prompt length is n = len(ids); so many tokens at a time as chunk says.
    """
    n = len(ids)
    device = next(model.parameters()).device
    tokens = torch.tensor([ids])
    cache = KVCache(model.config, n)
    parts = []
    for begin in range(0, n - 1, chunk):
        end = min(begin + chunk, n - 1)
        plan = model.plan(method, n=n, i=torch.arange(begin, end), j=torch.arange(end))
        logits = model(tokens[:, begin:end].to(device), plan, cache, impl=impl)[0].float()  # (end - begin, vocab)
        following = tokens[0, begin + 1:end + 1].to(device)
        parts.append(F.cross_entropy(logits, following, reduction="none").cpu())
    return torch.cat(parts)


def bos(tokenizer):
    """The BOS token as a list of token ids, empty where the model has none."""
    return tokenizer.encode("")


def mean(rows):
    """The mean loss per token."""
    return sum(row["nll"] * row["tokens"] for row in rows) / sum(row["tokens"] for row in rows)


def mean_of_means(rows):
    """The mean of the rows' means."""
    return sum(row["nll"] for row in rows) / len(rows)


# ---------------------------------------------------------------------------------------------------------------------
# loss by position

def run_documents(args, model, tokenizer, ids, method, results):
    """Rows of the mean loss in every stretch of every document that results does not hold yet."""
    for document in range(args.documents):
        keys = [(str(method), document, bucket) for bucket in range(args.buckets)]
        if all(key in results.rows for key in keys):
            continue
        begin = document * (args.length - 1)
        nll = losses(model, bos(tokenizer) + ids[begin:begin + args.length - 1], method, impl=args.impl)
        rows = []
        for bucket, part in enumerate(nll.tensor_split(args.buckets)):
            rows.append({"method": str(method), "document": document, "bucket": bucket,
                         "nll": round(float(part.mean()), 6), "tokens": len(part)})
        results.add(rows)
        say(f"{method}: document {document + 1} of {args.documents}, {float(nll.mean()):.3f} nats per token")


def report_documents(args, rows, L):
    """A table of methods x stretches in nats per token, on stdout; a picture where it is asked for."""
    rows = [row for row in rows if row["document"] < args.documents]
    curves = {}
    for method in map(str, args.methods):
        curves[method] = [mean(select(rows, method=method, bucket=bucket)) for bucket in range(args.buckets)]

    edges = [round(k * args.length / args.buckets) for k in range(args.buckets + 1)]
    header = ["method"] + [f"{begin}-{end}" for begin, end in zip(edges, edges[1:])]
    lines = [[method] + [f"{loss:.3f}" for loss in curve] for method, curve in curves.items()]
    print(f"nats per token by position; {args.documents} documents of {args.length} tokens, one pass each, window {L}")
    print(markdown(header, lines))
    if args.plot:
        middles = [(bucket + 0.5) * args.length / args.buckets for bucket in range(args.buckets)]
        plot_losses(curves, middles, L, args.plot)


# ---------------------------------------------------------------------------------------------------------------------
# perplexity by sliding window

@dataclass
class Window:
    """The tokens begin..end-1 of a text, of which those from first_scored on are scored."""
    begin: int
    end: int
    first_scored: int


def sliding_windows(count, window, stride):
    """The Windows over `count` tokens, of `window` tokens each but the last, one every `stride` tokens.

    10 tokens, window 6, stride 2: 0..5 scored from 0 on, 2..7 from 6 on, 4..9 from 8 on.
    """
    windows = []
    scored = 0
    for begin in range(0, count, stride):
        end = min(begin + window, count)
        windows.append(Window(begin, end, scored))
        scored = end
        if end == count:
            break
    return windows


def run_windows(args, model, tokenizer, ids, method, results):
    """Rows of the mean loss of every window's newly scored tokens that results does not hold yet."""
    windows = sliding_windows(len(ids), args.window - len(bos(tokenizer)), args.stride)
    for index, window in enumerate(windows):
        if (str(method), index) in results.rows:
            continue
        nll = losses(model, bos(tokenizer) + ids[window.begin:window.end], method, impl=args.impl)
        nll = nll[-(window.end - window.first_scored):]  # without a BOS the first token of all has no loss
        results.add([{"method": str(method), "span": index, "nll": round(float(nll.mean()), 6), "tokens": len(nll)}])
        say(f"\r{method}: window {index + 1} of {len(windows)}", end="\n" if window.end == len(ids) else "")


def report_windows(args, rows):
    """A table of each method's perplexity by both averages, on stdout."""
    lines = []
    for method in map(str, args.methods):
        found = select(rows, method=method)
        lines.append([method, f"{math.exp(mean(found)):.3f}", f"{math.exp(mean_of_means(found)):.3f}"])
    print(f"perplexity; sliding window of {args.window} tokens, stride {args.stride}, BOS in every window, "
          "only unscored tokens")
    print(markdown(["method", "per token", "mean of windows"], lines))


# ---------------------------------------------------------------------------------------------------------------------
# the command line

def parse_args(argv):
    parser, flag = new_parser(__doc__)
    parser.add_argument("text", metavar="FILE", help="a UTF-8 text")
    flag("methods", "method", type=method_list, metavar="M,M,...", help="comma-separated, as in eval_passkey.py")
    flag("length", type=number(int, 2), help="loss by position: tokens per document; default: 8 times the window")
    flag("documents", type=number(int, 1), default=1, help="consecutive parts of the text, of --length tokens each")
    flag("buckets", type=number(int, 1), default=8, help="stretches that a document is divided into")
    flag("window", type=number(int, 2), help="sliding-window perplexity with windows of so many tokens instead")
    flag("stride", type=number(int, 1), help="default: 256, or half of a --window below 512")
    flag("tokens", type=number(int, 2), help="with --window: use only the first so many tokens of the text")
    flag("results", default="perplexity.jsonl", metavar="FILE")
    flag("plot", metavar="FILE", help="loss by position as a picture (needs matplotlib)")
    args = parser.parse_args(argv)
    if args.window and (args.length or args.plot):
        parser.error("--window is another protocol than --length and --plot")
    if args.window and args.stride is None:
        args.stride = min(256, args.window // 2)
    return args


def check(args, config, tokenizer, ids):
    """ValueError for lengths that do not go together, before anything long; warnings of what will not work well."""
    if args.plot:
        figure_class()
    if len(ids) < 2:
        raise ValueError(f"{args.text}: too short a text")
    if args.window:
        check_windows(args, tokenizer)
    else:
        check_documents(args, ids)
    for method in args.methods:
        for warning in warnings(config, method, args.window or args.length):
            say(f"warning: {warning}")


def check_windows(args, tokenizer):
    if args.stride > args.window - len(bos(tokenizer)):
        raise ValueError(f"--stride {args.stride} leaves gaps between windows of {args.window} tokens, BOS included")


def check_documents(args, ids):
    if args.buckets >= args.length:
        raise ValueError(f"--buckets {args.buckets} must be fewer than the {args.length} tokens of a document")
    if len(ids) < args.documents * (args.length - 1):
        raise ValueError(f"{args.text}: {len(ids)} tokens, not --documents {args.documents} of --length {args.length}")


def protocol_asked(args, text_tokens):
    """(the settings of the protocol asked for, the fields that tell its rows apart)."""
    if args.window:
        return {"window": args.window, "stride": args.stride, "text_tokens": text_tokens}, ("method", "span")
    return {"length": args.length, "buckets": args.buckets}, ("method", "document", "bucket")


def run(argv=None):
    """The command: its exit code."""
    args = parse_args(argv)
    path, config, tokenizer = open_checkpoint(args)
    L = config.train_len
    text = read_text(args.text)
    ids = tokenizer.encode(text, bos=False)[:args.tokens]
    args.length = args.length or 8 * L
    args.methods = methods_asked(config, args.methods, (config.freq, *DEFAULT_METHODS))
    check(args, config, tokenizer, ids)
    device, dtype = place(args, config)

    protocol, key_fields = protocol_asked(args, len(ids))
    settings = {"ckpt": args.ckpt, "weights": fingerprint(path), "text": Path(args.text).name,
                "text_hash": short_hash(text.encode()), **protocol,
                "train_len": L, "dtype": type_name(dtype), "impl": args.impl}
    say(settings_line({**settings, "methods": args.methods, "device": device}))
    results = Results(args.results, settings, key_fields)
    model = load_model(path, config, dtype, device)
    for method in args.methods:
        if args.window:
            run_windows(args, model, tokenizer, ids, method, results)
        else:
            run_documents(args, model, tokenizer, ids, method, results)
    if args.window:
        report_windows(args, results.rows.values())
    else:
        report_documents(args, results.rows.values(), L)
    return 0


if __name__ == "__main__":
    run_command(run, "eval_perplexity.py")
