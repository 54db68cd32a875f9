"""Retrieval: how often a model repeats five digits hidden in a long prompt, by method, length and depth.

Does: the three tasks of tasks.py. Decodes greedily, counts the answers whose first integer is the key, and measures the
log-probability of the right answer. Every trial goes to a results file at once, and what is there is not run again, so
an interrupted run continues. Does not: sample, or judge anything but the key.

    python eval_passkey.py --methods rope,pi:factor=8,rerope,self-extend:attn-scale=logn,mesa --lengths 256,512,1024
    python eval_passkey.py --task lines
"""
import random
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from cli import (Results, accuracy, agreed, counts, is_together, markdown, method_list, methods_asked, model_settings,
                 new_parser, number, open_checkpoint, open_model, place, rank_flags, read_text, run_command, say,
                 select, settings_line, short_hash)
from generate import decode, prefill, sample
from plots import HIGHLIGHTED, check_highlight
from show import figure_class, heatmap, plot_passkey, say_warnings
from tasks import FILLER, NAMES, TASKS, Prompt, answer_text, passkey_prompt, random_digits, record_prompt

DEFAULT_METHODS = ("pi", "rerope", "self-extend", "mesa")  # after what config.json says
BATCH = 16384     # tokens that run together
KMAX_CELLS = 32   # distances of --kmax
KMAX_TRIALS = 10


# ---------------------------------------------------------------------------------------------------------------------
# the trials of one length

@dataclass
class Trial:
    """One prompt, and its place in the grid."""
    cell: int        # which part of the depth range, 0 at the start of the prompt
    number: int      # which one of the trials in this cell
    prompt: Prompt


def make_trials(args, tokenizer, n, filler):
    """The args.depths * args.trials Trials of n tokens, their depths evenly spread from the start to the end.

    Keys, and the place in a text filler, are fixed by args.seed, by n and by the number of the trial.
    """
    count = args.depths * args.trials
    trials = []
    for k in range(count):
        depth = k / (count - 1) if count > 1 else 0.5
        rng = random.Random(f"{args.seed}-{n}-{k}")
        prompt = make_prompt(args, tokenizer, n, depth, rng, filler)
        trials.append(Trial(k // args.trials, k % args.trials, prompt))
    return trials


def make_prompt(args, tokenizer, n, depth, rng, filler):
    """The Prompt of args.task with n tokens; filler: token ids, of which those of a text begin at a random place."""
    if args.task != "passkey":
        return record_prompt(tokenizer, args.task, n, depth, rng)
    keys = [random_digits(rng) for _ in range(args.needles)]
    if args.filler != "repeat":
        start = rng.randrange(len(filler))
        filler = filler[start:] + filler[:start]
    return passkey_prompt(tokenizer, n, depth, keys, filler)


def read_filler(name, tokenizer):
    """(token ids, label) of --filler; the label tells its rows from those of another: "repeat", or name and hash."""
    if name == "repeat":
        return tokenizer.encode(FILLER, bos=False), "repeat"
    text = read_text(name)
    ids = tokenizer.encode(text, bos=False)
    if not ids:
        raise ValueError(f"{name}: an empty filler")
    return ids, f"{Path(name).name} {short_hash(text.encode())}"


# ---------------------------------------------------------------------------------------------------------------------
# answers

def answer_batch(model, tokenizer, trials, method, impl):
    """(answers, log-probabilities of the right ones) for Trials of one length; an answer is the first integer that the
    model writes, as text, "" where it writes none."""
    n = len(trials[0].prompt.ids)
    prompts = torch.tensor([trial.prompt.ids for trial in trials])
    texts = [answer_text(trial.prompt.task, trial.prompt.answer) for trial in trials]
    right = torch.tensor([tokenizer.encode(text, bos=False) for text in texts])
    length = right.shape[1]

    logits, cache = prefill(model, prompts, method, room=2 * length + 4, impl=impl)
    logps = answer_logps(model, logits, cache, right, method, n, impl)
    cache.cut(n)  # forget the right answer
    steps = list(decode(model, logits, cache, method, n, sample, length + 3, impl))
    written = torch.stack(steps, dim=1)  # (B, length + 3)
    return [first_integer(tokenizer.decode(ids)) for ids in written.tolist()], logps


@torch.no_grad()
def answer_logps(model, logits, cache, right, method, n, impl):
    """The log-probability of each answer right (B, length), given logits (B, vocab) and cache after n tokens of prompt.

    As if the answer had been written: one pass over all its tokens but the last, which are left in the cache.
    """
    end = n + right.shape[1] - 1
    logits = logits[:, None]
    if end > n:
        plan = model.plan(method, n=n, i=torch.arange(n, end), j=cache.indices(end - n))
        rest = model(right[:, :-1].to(logits.device), plan, cache, impl=impl)
        logits = torch.cat((logits, rest), dim=1)  # (B, length, vocab)
    logp = logits.float().log_softmax(-1).cpu().gather(-1, right[..., None])
    return logp.sum((1, 2)).tolist()


def first_integer(text):
    """"The key is 71432." -> "71432"; "" where there is none."""
    found = re.search(r"\d+", text)
    return found.group() if found else ""


def is_cut(model, prompt, method):
    """Whether the last token of the needle cannot see its first one: a chunk boundary of Mesa, the edge of a window."""
    first, last = prompt.span
    plan = model.config.plan(method, n=len(prompt.ids), i=torch.tensor([last]), j=torch.arange(len(prompt.ids)))
    for region in plan.regions:
        if int(region.start) <= first < int(region.end):
            return False
    return True


# ---------------------------------------------------------------------------------------------------------------------
# the grid, one row of the results file per trial

def run_grid(args, model, tokenizer, filler, results):
    """Every trial of every method and length that results does not hold yet."""
    start = time.perf_counter()
    tokens_run = 0  # of one prompt per method and length
    tokens_left = len(args.methods) * sum(args.lengths)
    for n in args.lengths:
        trials = make_trials(args, tokenizer, n, filler)
        for method in args.methods:
            if run_trials(args, model, tokenizer, trials, method, n, results):
                tokens_run += n
            tokens_left -= n
            seconds_left = (time.perf_counter() - start) / max(tokens_run, 1) * tokens_left
            results.gather()
            share = accuracy(select(results.rows.values(), method=str(method), length=n))
            say(f"{method} {n}: {share:.2f} ({seconds_left:.0f} s left)")


def run_trials(args, model, tokenizer, trials, method, n, results):
    """Run the batches of trials that lack a row in results; returns whether there were any.

    A batch always runs whole, so that a run that was interrupted ends with the same digits as one that was not.
    """
    size = max(1, BATCH // n)
    was_run = False
    for begin in range(0, len(trials), size):
        batch = trials[begin:begin + size]
        keys = [(str(method), n, trial.cell, trial.number) for trial in batch]
        if results.claim(keys):
            results.add(batch_rows(args, model, tokenizer, batch, method, n))
            was_run = True
    return was_run


def batch_rows(args, model, tokenizer, trials, method, n):
    """The rows of a batch of Trials."""
    answers, logps = answer_batch(model, tokenizer, trials, method, args.impl)
    rows = []
    for trial, answer, logp in zip(trials, answers, logps):
        key = trial.prompt.answer
        rows.append({"method": str(method), "length": n, "cell": trial.cell, "trial": trial.number, "key": key,
                     "answer": answer, "correct": answer == key, "logp": round(logp, 3),
                     "cut": is_cut(model, trial.prompt, method)})
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# what was found; rows are those of the results file, methods are named as there

def table(rows, methods, lengths, L):
    """Markdown, methods x lengths, of the share of right answers."""
    header = ["method"] + [f"{n} ({n / L:g}x)" for n in lengths]
    lines = []
    for method in methods:
        shares = [accuracy(select(rows, method=method, length=n)) for n in lengths]
        lines.append([method] + [f"{share:.2f}" for share in shares])
    return markdown(header, lines)


def cut_line(rows, method):
    """How much of a method's loss its cut needles explain, as text; None where it cuts none."""
    rows = select(rows, method=method)
    cut = select(rows, cut=True)
    whole = select(rows, cut=False)
    if not cut:
        return None
    missed_cut = len(select(cut, correct=False))
    missed = len(select(rows, correct=False))
    return (f"{method}: {len(cut)} of {len(rows)} needles are cut by a boundary: accuracy {accuracy(cut):.3f}, "
            f"whole ones {accuracy(whole):.3f}; {missed_cut} of {missed} misses are cut needles")


def kmax(rows, method, n):
    """A method's effective window (arXiv 2306.15595, section 3.3): the largest distance of the needle from the end, in
    tokens, with a fifth of the answers right at it and at all shorter distances of the grid."""
    reached = 0
    for step in range(1, KMAX_CELLS + 1):
        cell = KMAX_CELLS - step  # the last cell is the nearest to the end
        if accuracy(select(rows, method=method, length=n, cell=cell)) < 0.2:
            break
        reached = n * step // KMAX_CELLS
    return reached


def report(args, rows, L):
    """Table, heatmaps and what boundaries cost, on stdout; a picture where it is asked for."""
    methods = [str(method) for method in args.methods]
    rows = [row for row in rows if row["method"] in methods and row["length"] in args.lengths]
    print(table(rows, methods, args.lengths, L))
    for method in methods:
        if args.kmax:
            print(f"{method}: k_max " + ", ".join(f"{kmax(rows, method, n)} of {n}" for n in args.lengths))
        elif args.depths > 1:
            print("\n" + heatmap(rows, method, args.lengths, args.depths, sys.stdout.isatty()))
    for method in methods:
        line = cut_line(rows, method)
        if line:
            print(line)
    if args.plot:
        plot_passkey(rows, methods, args.lengths, args.depths, L, args.plot, args.highlight)


# ---------------------------------------------------------------------------------------------------------------------
# the command line

def parse_args(argv):
    parser, flag = new_parser(__doc__)
    flag("methods", "method", type=method_list, metavar="M,M,...",
         help="comma-separated, each name[:parameter=value...], freq=... and attn-scale=... among them; or all")
    flag("lengths", type=counts, metavar="N,N,...", help="in tokens; default: 1,2,4,8 times the window")
    flag("depths", type=number(int, 1), default=5, help="cells that the depth range is divided into")
    flag("trials", type=number(int, 1), default=4, help="prompts per method, length and depth")
    flag("task", choices=TASKS, default="passkey", help="a passkey, or one line or key of a record full of them")
    flag("filler", default="repeat", metavar="repeat|FILE", help="five repeated sentences, or a UTF-8 text")
    flag("needles", type=number(int, 1, len(NAMES)), default=1, help="keys in a prompt; one is asked for")
    flag("kmax", action="store_true",
         help=f"the effective window: {KMAX_CELLS} depths, {KMAX_TRIALS} trials, a fifth right")
    flag("results", default="results.jsonl", metavar="FILE")
    rank_flags(flag, evaluation=True)
    flag("plot", metavar="FILE", help="heatmaps and accuracy by length as a picture (needs matplotlib)")
    flag("highlight", type=method_list, metavar="M,M,...",
         help=f"methods in colour on --plot; default: all, or of many the best and {', '.join(HIGHLIGHTED)}")
    flag("seed", type=number(int, 0), default=0)
    args = parser.parse_args(argv)
    if args.task != "passkey" and (args.needles > 1 or args.filler != "repeat"):
        parser.error(f"--needles and --filler are for the passkey, not for --task {args.task}")
    if args.kmax:
        args.depths, args.trials = KMAX_CELLS, KMAX_TRIALS
    return args


def check(args, config, tokenizer, filler):
    """ValueError before anything long: no matplotlib, a length too short, a method that makes no sense. Warnings of
    what will not work well."""
    if args.plot:
        figure_class()
        check_highlight(args.highlight, args.methods)
    for n in args.lengths:
        make_prompt(args, tokenizer, n, 0.5, random.Random(0), filler)
    say_warnings(config, args.methods, args.lengths)


def run(argv=None, ranks=None):
    """The command: its exit code; ranks: this process among others, a Ranks."""
    args = parse_args(argv)
    path, config, tokenizer = open_checkpoint(args)
    L = config.train_len
    args.methods = methods_asked(config, args.methods, (config.freq, *DEFAULT_METHODS))
    args.lengths = args.lengths or [L, 2 * L, 4 * L, 8 * L]
    filler, filler_label = read_filler(args.filler, tokenizer)
    check(args, config, tokenizer, filler)
    device, dtype = place(args, config)

    settings = model_settings(args, path, L, dtype, task=args.task, seed=args.seed, depths=args.depths,
                              trials=args.trials, filler=filler_label, needles=args.needles)
    say(settings_line({**settings, "methods": args.methods, "device": device, "lengths": args.lengths}))
    ranks = agreed(ranks, args, path, settings={**settings, "methods": args.methods, "lengths": args.lengths})
    results = Results(args.results, settings, ("method", "length", "cell", "trial"), ranks, is_together(args))
    model = open_model(args, path, config, dtype, device, ranks=ranks)
    run_grid(args, model, tokenizer, filler, results)
    results.finish()
    if ranks.rank == 0:
        report(args, results.rows.values(), L)
    return 0


if __name__ == "__main__":
    run_command(run, "eval_passkey.py")
