"""How well a model predicts a text, by method: loss by position, or perplexity by sliding window.

Does: two protocols on any UTF-8 text, LongPPL beside the first; never all logits at once; all goes to a results file
at once, so that an interrupted run continues. Does not: download texts.

    python eval_perplexity.py book.txt --methods rope,mesa --length 2048       # mean loss in each of 8 stretches
    python eval_perplexity.py book.txt --methods rope,mesa --window 1024       # perplexity, stride 256
    python eval_perplexity.py book.txt --methods rope,mesa --length 2048 --longppl   # and of the tokens that need it
    python eval_perplexity.py book.txt --fit-lampe                             # LaMPE for this model, see fit_lampe.py
    python eval_perplexity.py --probe                                          # hidden values by position, see probe.py

Loss by position: each document is `length` tokens in one pass, BOS in front, a prompt of n = length tokens to a method.
Sliding window (arXiv 2306.15595, section 3.2): windows of `window` tokens, BOS in front of each, every `stride` tokens;
one scores only the tokens that no earlier one has scored, so all but the first see window - stride tokens or more.
LongPPL (arXiv 2410.23771): exp of the mean loss of those tokens of the documents that the far context helps. One method
finds them for all (--key-method), and is favoured by that: they are tokens that it predicts well.
"""
import functools
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

import fit_lampe
import probe
from cli import (Results, agreed, is_together, markdown, method_list, methods_asked, model_settings, new_parser, number,
                 open_checkpoint, open_model, place, rank_flags, read_text, run_command, say, select, settings_line,
                 short_hash)
from parallel import new_cache
from positions import Method
from show import figure_class, plot_key_tokens, plot_losses, say_warnings

DEFAULT_METHODS = ("rerope", "self-extend", "mesa")  # after what config.json says
KEY_LINES = 12  # key tokens that are printed of a document


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
    cache = new_cache(model, n)
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

def run_documents(args, model, tokenizer, ids, method, results, keys_of):
    """Rows of the mean loss in every stretch of every document that results does not hold yet. keys_of(document): which
    of its tokens are key, None without --longppl."""
    front = bos(tokenizer)
    for document in range(args.documents):
        rows_keys = [(str(method), document, bucket) for bucket in range(args.buckets)]
        if not results.claim(rows_keys):
            continue
        part_ids = document_ids(args, ids, document)
        nll = losses(model, front + part_ids, method, impl=args.impl)
        begin = len(part_ids) - len(nll)  # 1 where no BOS is in front of the first token
        rows = []
        for bucket, part in enumerate(nll.tensor_split(args.buckets)):
            row = {"method": str(method), "document": document, "bucket": bucket,
                   "nll": round(float(part.mean()), 6), "tokens": len(part)}
            if args.longppl:
                row |= key_columns(part, keys_of(document)[begin:begin + len(part)], begin)
            rows.append(row)
            begin += len(part)
        results.add(rows)
        say(f"{method}: document {document + 1} of {args.documents}, {float(nll.mean()):.3f} nats per token")


def document_ids(args, ids, document):
    """The tokens of a document, without the BOS."""
    begin = document * (args.length - 1)
    return ids[begin:begin + args.length - 1]


def report_documents(args, rows, L):
    """A table of methods x stretches in nats per token, on stdout; a picture where it is asked for."""
    curves = {}
    key_curves = {}
    for method in map(str, args.methods):
        stretches = [select(rows, method=method, bucket=bucket) for bucket in range(args.buckets)]
        curves[method] = [mean(found) for found in stretches]
        if args.longppl:
            key_curves[method] = [key_mean(found) for found in stretches]

    edges = [round(k * args.length / args.buckets) for k in range(args.buckets + 1)]
    header = ["method"] + [f"{begin}-{end}" for begin, end in zip(edges, edges[1:])]
    lines = [[method] + [f"{loss:.3f}" for loss in curve] for method, curve in curves.items()]
    print(f"nats per token by position; {args.documents} documents of {args.length} tokens, one pass each, window {L}")
    print(markdown(header, lines))
    middles = [(bucket + 0.5) * args.length / args.buckets for bucket in range(args.buckets)]
    if args.plot and args.longppl:
        places = [place for found in key_places(rows, str(args.methods[0])).values() for place in found]
        plot_key_tokens(curves, key_curves, places, middles, L, args.plot)
    elif args.plot:
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
        if not results.claim([(str(method), index)]):
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
# key tokens

@dataclass
class KeyRule:
    """Which tokens are key tokens."""
    method: Method
    short: int      # tokens of the short context
    stride: int     # tokens that share one
    gain: float     # nats that the whole context must save
    most: float     # nats that may be left

    def __str__(self):
        return f"{self.method} short={self.short} stride={self.stride} gain={self.gain:g} most={self.most:g}"


def key_tokens(model, front, ids, rule, impl="auto"):
    """Which of ids need the far context (LongPPL, arXiv 2410.23771): bool (len(ids),).

    A token is key where its loss given `short` to short + stride tokens before it, minus its loss given all of them, is
    above `gain` and the latter is below `most`; the first `short` tokens never are. front: the BOS, as a list, before
    the whole and before every short context (the released code, PKU-ML/LongPPL @ 1decd2a, has one before the whole).
    """
    whole = token_losses(model, front, ids, rule.method, impl)
    short = torch.full_like(whole, torch.nan)
    for window in sliding_windows(len(ids), rule.short + rule.stride, rule.stride):
        nll = token_losses(model, front, ids[window.begin:window.end], rule.method, impl)
        short[window.first_scored:window.end] = nll[window.first_scored - window.begin:]
    short[:rule.short] = torch.nan  # comparisons with it are false
    return (short - whole > rule.gain) & (whole < rule.most)


def token_losses(model, front, ids, method, impl):
    """The loss of every one of ids, in nats: (len(ids),); nan for the first one where no BOS is in front of it."""
    nll = losses(model, front + ids, method, impl=impl)
    return F.pad(nll, (len(ids) - len(nll), 0), value=torch.nan)


def key_columns(part, keys, begin):
    """What the row of a stretch of a document says of its key tokens: part and keys are the losses of its tokens and
    which are key, begin is the index of the first of them in the text."""
    places = keys.nonzero()[:, 0]
    key_nll = float(part[places].mean()) if len(places) else 0.0
    return {"key_nll": round(key_nll, 6), "key_tokens": len(places), "keys": (begin + places).tolist()}


def key_mean(rows):
    """The mean loss per key token; nan where there are none."""
    count = sum(row["key_tokens"] for row in rows)
    if not count:
        return float("nan")
    return sum(row["key_nll"] * row["key_tokens"] for row in rows) / count


def key_places(rows, method):
    """{document: the indices of its key tokens in it} of the rows of a method."""
    places = {}
    for row in select(rows, method=method):
        places.setdefault(row["document"], []).extend(row["keys"])
    return places


def report_keys(args, rows, tokenizer, ids):
    """A table of perplexity and LongPPL, and the first key tokens of each document within their text, on stdout."""
    places = key_places(rows, str(args.methods[0]))
    count = sum(len(found) for found in places.values())
    print(f"\nLongPPL: {count} key tokens of {args.documents * args.length}, by {args.key_rule}")
    lines = []
    for method in map(str, args.methods):
        found = select(rows, method=method)
        longppl = f"{math.exp(key_mean(found)):.3f}" if count else "-"
        lines.append([method, f"{math.exp(mean(found)):.3f}", longppl])
    print(markdown(["method", "perplexity", "LongPPL"], lines))
    for document, found in sorted(places.items()):
        for line in marked(tokenizer, document_ids(args, ids, document), sorted(found))[:KEY_LINES]:
            print(f"document {document + 1}, {line}")


def marked(tokenizer, ids, keys, before=16, after=6):
    """A line for each run of key tokens: "token 213: ... The pass key is [[71432]]. Remember ..."; keys: sorted."""
    lines = []
    for k, key in enumerate(keys):
        if k and keys[k - 1] == key - 1:
            continue  # inside a run
        end = key
        while end in keys:
            end += 1
        start = max(key - before, 0)
        left = tokenizer.decode(ids[start:key])
        middle = tokenizer.decode(ids[start:end])[len(left):]
        right = tokenizer.decode(ids[start:end + after])[len(left) + len(middle):]
        lines.append(f"token {key}: " + " ".join(f"{left}[[{middle}]]{right}".split()))
    return lines


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
    flag("longppl", action="store_true", help="with loss by position: also perplexity over key tokens")
    flag("key-method", default="rerope", metavar="M", help="the method that finds the key tokens, for all; "
         "default: %(default)s")
    flag("key-short", type=number(int, 1), help="tokens of the short context; default: 4096, or half of a window below "
         "8192")
    flag("key-stride", type=number(int, 1), help="tokens that share a short context; default: a quarter of it")
    flag("key-gain", type=number(float, 0), default=2.0, help="nats that the whole context saves; default: 2")
    flag("key-most", type=number(float, 0), default=2.0, help="nats of a key token given all; default: 2")
    flag("fit-lampe", action="store_true", help="fit LaMPE's mapping length instead; its flags: --fit-lampe --help")
    flag("probe", action="store_true", help="hidden values by position instead, no FILE; its flags: --probe --help")
    flag("results", default="perplexity.jsonl", metavar="FILE")
    rank_flags(flag, evaluation=True)
    flag("plot", metavar="FILE", help="loss by position as a picture (needs matplotlib)")
    args = parser.parse_args(argv)
    if args.window and (args.length or args.plot or args.longppl):
        parser.error("--window is another protocol than --length, --plot and --longppl")
    if args.window and args.stride is None:
        args.stride = min(256, args.window // 2)
    return args


def key_rule(args, L):
    """The KeyRule of the flags, None without --longppl; the paper has a short context of 4,096 tokens, stride 1,024."""
    if not args.longppl:
        return None
    short = args.key_short or max(1, min(4096, L // 2))
    stride = args.key_stride or max(1, short // 4)
    if short >= args.length - 1:
        raise ValueError(f"--longppl: no token of --length {args.length} has more than the short context of {short} "
                         "tokens before it")
    return KeyRule(Method.parse(args.key_method), short, stride, args.key_gain, args.key_most)


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
    finders = [args.key_rule.method] if args.longppl else []
    say_warnings(config, args.methods + finders, [args.window or args.length])


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
    settings = {"length": args.length, "buckets": args.buckets}
    if args.longppl:
        settings["key_rule"] = str(args.key_rule)
    return settings, ("method", "document", "bucket")


def run(argv=None, ranks=None):
    """The command: its exit code; ranks: this process among others, a Ranks."""
    words = sys.argv[1:] if argv is None else list(argv)
    rest = [word for word in words if word not in ("--probe", "--fit-lampe", "--fit_lampe")]
    if len(rest) < len(words) and ranks and ranks.size > 1:
        raise ValueError("--fit-lampe and --probe run in one process, not under torchrun")
    if "--probe" in words:
        return probe.run([word for word in words if word != "--probe"])
    if len(rest) < len(words):
        return fit_lampe.run(rest, losses)
    args = parse_args(words)
    path, config, tokenizer = open_checkpoint(args)
    L = config.train_len
    text = read_text(args.text)
    ids = tokenizer.encode(text, bos=False)[:args.tokens]
    args.length = args.length or 8 * L
    args.methods = methods_asked(config, args.methods, (config.freq, *DEFAULT_METHODS))
    args.key_rule = key_rule(args, L)
    check(args, config, tokenizer, ids)
    device, dtype = place(args, config)

    protocol, key_fields = protocol_asked(args, len(ids))
    settings = model_settings(args, path, L, dtype, text=Path(args.text).name, text_hash=short_hash(text.encode()),
                              **protocol)
    say(settings_line({**settings, "methods": args.methods, "device": device}))
    ranks = agreed(ranks, args, path, settings={**settings, "methods": args.methods})
    results = Results(args.results, settings, key_fields, ranks, is_together(args))
    model = open_model(args, path, config, dtype, device, ranks=ranks)
    run_all(args, model, tokenizer, ids, results)
    results.finish()
    if ranks.rank:
        return 0
    if args.window:
        report_windows(args, results.rows.values())
        return 0
    rows = [row for row in results.rows.values() if row["document"] < args.documents]
    report_documents(args, rows, L)
    if args.longppl:
        report_keys(args, rows, tokenizer, ids)
    return 0


def run_all(args, model, tokenizer, ids, results):
    """Every method by the protocol asked for; the key tokens of a document are found once for all methods."""
    @functools.cache
    def keys_of(document):
        return key_tokens(model, bos(tokenizer), document_ids(args, ids, document), args.key_rule, args.impl)

    for method in args.methods:
        if args.window:
            run_windows(args, model, tokenizer, ids, method, results)
        else:
            run_documents(args, model, tokenizer, ids, method, results, keys_of)


if __name__ == "__main__":
    run_command(run, "eval_perplexity.py")
