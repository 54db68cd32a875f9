"""Why methods differ far outside the window, on a checkpoint: three causes, each measured by itself and drawn.

dilution    how much attention one head gives to the needle as the prompt grows, beside the first digit of the answer
resolution  retrieval by how many tokens share a distance (Mesa's stairs, Self-Extend's groups), and by ReRoPE's window
middle      retrieval by the depth of the needle, beside the share of the needle that the last token sees

Does: run prompts of tasks.py, print a table for each section, draw its figure. Every prompt goes to a results file at
once, and what is there is not run again. Does not: rank methods (eval_passkey.py and eval_ruler.py do).

    python mechanisms.py dilution --plot dilution.png
    python mechanisms.py resolution --plot resolution.png
    python mechanisms.py middle --plot middle.png
    python mechanisms.py all --plot why.png              # why-dilution.png, why-resolution.png, why-middle.png
"""
import argparse
import itertools
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import hf
from cli import (Results, accuracy, counts, markdown, method_list, methods_asked, model_settings, new_parser, number,
                 open_checkpoint, place, run_command, say, select, settings_line)
from eval_passkey import BATCH, Trial, answer_batch
from model import load_model
from plan import farthest
from plots import COLOURS, draw_curves, highlighted
from positions import Method
from show import figure_class, length_axis, new_figure, save, say_warnings
from tasks import TASKS, answer_text, passkey_prompt, random_digits, record_prompt
from tracing import prompt_case, trace

CKPT = "tiny-ruler"
HEAD_PROMPTS = 16  # on which the head of `dilution` is chosen
CELLS = 16         # parts of the depth range in `middle`
SWEPT = {"mesa": "width", "self-extend": "group", "rerope": "window"}  # what `resolution` varies
SWEPT_LABELS = {
    "width": "tokens on a step of the stair",
    "group": "tokens in a group",
    "window": "tokens at true distances, all before them at one",
}


# ---------------------------------------------------------------------------------------------------------------------
# prompts

def make_trials(tokenizer, task, n, count, seed):
    """count Trials of a task of n tokens, their depths evenly spread from the start to the end; a Trial's cell is the
    part of the depth range, of CELLS, that its needle is in. Keys are fixed by seed, task, n and number."""
    trials = []
    for k in range(count):
        depth = k / (count - 1) if count > 1 else 0.5
        rng = random.Random(f"{seed}-{task}-{n}-{k}")
        if task == "passkey":
            prompt = passkey_prompt(tokenizer, n, depth, [random_digits(rng)])
        else:
            prompt = record_prompt(tokenizer, task, n, depth, rng)
        cell = min(int(depth * CELLS), CELLS - 1)
        trials.append(Trial(cell, k, prompt))
    return trials


# ---------------------------------------------------------------------------------------------------------------------
# dilution: what one head gives to the needle

def dilution_methods(config, lengths):
    """The methods of `dilution`: ReRoPE also without its log-n, which is there to undo dilution."""
    return ["rope", "yarn", "rerope", "rerope:attn-scale=none", "self-extend", "mesa"]


def choose_head(model, tokenizer, task, L, seed):
    """(layer, head), both from 0: of all heads the one that gives most attention to the needle, on average.

    On prompts of its own that end, with their answer, inside the window of L tokens, read as config.json says. So the
    head is the same for all methods and lengths, and was not chosen on what is measured with it.
    """
    room = len(tokenizer.encode(answer_text(task, "10000"), bos=False))
    total = 0
    for trial in make_trials(tokenizer, task, L - room, HEAD_PROMPTS, f"head-{seed}"):
        traced = trace(model, prompt_case(tokenizer, trial.prompt), Method())
        total = total + mass(traced.weights, trial.prompt.span)  # (layers, H)
    layer, head = divmod(int(total.argmax()), total.shape[1])
    return layer, head


def mass(weights, span):
    """The sum (*) of attention weights (*, T) over the tokens first..last of a span."""
    first, last = span
    return weights[..., first:last + 1].sum(-1)


def dilution_rows(args, model, tokenizer, trials, method, head):
    """The rows of Trials: what a head gives to the needle and to the wrong entry it attends to most, None where there
    is none, in the token that has to name the first digit; and whether that digit is the likeliest next token."""
    layer, number = head
    rows = []
    for trial in trials:
        traced = trace(model, prompt_case(tokenizer, trial.prompt), method)
        weights = traced.weights[layer, number]  # (T,)
        wrong = [float(mass(weights, span)) for span in trial.prompt.others]
        rows.append({"mass": round(float(mass(weights, trial.prompt.span)), 6),
                     "wrong": round(max(wrong), 6) if wrong else None,
                     "layer": layer, "head": number,
                     "correct": int(traced.logits.argmax()) == traced.case.right})
    return rows


def mean(rows, name):
    """The mean of a field of rows; nan where there are none, or the field is None."""
    values = [row[name] for row in rows if row[name] is not None]
    return sum(values) / len(values) if values else math.nan


def dilution_table(rows, methods, lengths, L):
    """Markdown, tasks and methods x lengths; below it for each task the head, and what it gives to the needle where the
    digit is right and where it is wrong."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    header = ["task", "method", *length_labels(lengths, L)]
    lines = []
    for task, method in itertools.product(tasks, methods):
        cells = [dilution_cell(select(rows, task=task, method=method, length=n)) for n in lengths]
        lines.append([task, method, *cells])
    text = ["attention on the needle, in brackets on the most attended wrong entry; share of right first digits", "",
            markdown(header, lines), ""]
    for task in tasks:
        of_task = select(rows, task=task)
        head = of_task[0]
        right, wrong = (mean(select(of_task, correct=value), "mass") for value in (True, False))
        text.append(f"{task}: layer {head['layer'] + 1}, head {head['head'] + 1}; attention on the needle "
                    f"{share(right)} where the first digit is right, {share(wrong)} where it is wrong")
    return "\n".join(text)


def dilution_cell(rows):
    """A cell of the table: "0.61 (0.08); 0.90"."""
    wrong = mean(rows, "wrong")
    brackets = "" if math.isnan(wrong) else f" ({wrong:.2f})"
    return f"{share(mean(rows, 'mass'))}{brackets}; {share(accuracy(rows))}"


def share(value):
    """A share in two digits, - for nan."""
    return "-" if math.isnan(value) else f"{value:.2f}"


def length_labels(lengths, L):
    return [f"{n} ({n / L:g}x)" for n in lengths]


def plot_dilution(rows, methods, lengths, L):
    """A figure with a row for each task: at the left attention on the needle by length, dotted on the most attended
    wrong entry; at the right the share of right first digits. Dashed at the window."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure = new_figure(13, 3.6 * len(tasks))
    for (left, right), task in zip(figure.subplots(len(tasks), 2, squeeze=False), tasks):
        groups = {method: [select(rows, task=task, method=method, length=n) for n in lengths] for method in methods}
        given = {method: (lengths, [mean(group, "mass") for group in found]) for method, found in groups.items()}
        digits = {method: (lengths, [accuracy(group) for group in found]) for method, found in groups.items()}
        chosen = highlighted(given)
        for axes, curves, label in ((left, given, "attention on the needle"), (right, digits, "first digit right")):
            length_axis(axes, lengths)
            axes.axvline(L, color="black", linestyle="--", linewidth=1)
            axes.set(ylim=(-0.03, 1.03), xlabel="prompt length in tokens", ylabel=label)
            axes.set_title(task, loc="left", fontsize=9)
            draw_curves(axes, curves, chosen)
        if rows_have_wrong(groups):
            left.set_title("dotted: on the most attended wrong entry", loc="right", fontsize=8)
            for method, colour in zip(chosen, COLOURS):
                left.plot(lengths, [mean(group, "wrong") for group in groups[method]], color=colour, linestyle=":")
    return figure


def rows_have_wrong(groups):
    """Whether there are wrong entries in any of the groups {method: [rows of each length]}."""
    return any(row["wrong"] is not None for found in groups.values() for rows in found for row in rows)


# ---------------------------------------------------------------------------------------------------------------------
# resolution: how many tokens share a distance

def resolution_methods(config, lengths):
    """Mesa by the width of its stairs, Self-Extend by group, ReRoPE by window, as texts, for the prompts' length.

    Steps and groups go from half of n/L, which puts the first tokens beyond the window, to half of the prompt. All
    three with log-n, so that only resolution differs.
    """
    L = config.train_len
    n = lengths[0]
    fold = max(n // L, 1)
    steps = sorted(max(step, 2) for step in (fold // 2, fold, 2 * fold, 4 * fold, 8 * fold, n // 8, n // 2))
    windows = [max(L // part, 1) for part in (32, 16, 8, 4, 2, 1)]
    texts = [f"mesa:width={step}" for step in steps]
    texts += [f"self-extend:group={step}:attn-scale=logn" for step in steps]
    texts += [f"rerope:window={window}" for window in windows]
    return list(dict.fromkeys(texts))


def swept(method):
    """(name of the parameter, its value) that `resolution` varies in a Method; ValueError where it sets none."""
    name = SWEPT.get(method.name)
    if name not in method.params:
        wanted = ", ".join(f"{method}:{name}=..." for method, name in SWEPT.items())
        raise ValueError(f"resolution: {method} is none of {wanted}")
    return name, method.params[name]


def answer_rows(args, model, tokenizer, trials, method, head):
    """The rows of Trials: the five digits that the model writes, whether they are right, the log-probability of the
    right ones, and what the prompt's last token sees: how much of the needle, how far. head is not used."""
    answers, logps = answer_batch(model, tokenizer, trials, method, args.impl)
    rows = []
    for trial, answer, logp in zip(trials, answers, logps):
        n = len(trial.prompt.ids)
        plan = last_token_plan(model.config, method, n)
        rows.append({"answer": answer, "cell": trial.cell, "correct": answer == trial.prompt.answer,
                     "logp": round(logp, 3),
                     "seen": round(seen_share(plan, trial.prompt.span), 4),
                     "farthest": max(farthest(region) for region in plan.regions)})
    return rows


def resolution_table(rows, methods, lengths, L):
    """Markdown, a line for each method: its largest distance in the last token, in windows; by task accuracy, and the
    mean log-probability of the right answer, which still tells methods apart where accuracy does not."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    lines = []
    for method in methods:
        groups = [select(rows, method=method, task=task) for task in tasks]
        cells = [f"{share(accuracy(group))} ({mean(group, 'logp'):.1f})" for group in groups]
        lines.append([method, f"{largest_distance(rows, method) / L:.2f}", *cells])
    title = f"accuracy at {length_labels(lengths, L)[0]}, in brackets the mean log-probability of the right answer"
    return f"{title}\n\n" + markdown(["method", "largest distance (windows)", *tasks], lines)


def largest_distance(rows, method):
    """The largest distance that the last token of a prompt sees with a method."""
    return max(row["farthest"] for row in select(rows, method=method))


def plot_resolution(rows, methods, lengths, L):
    """A figure with a panel for each method that is varied: accuracy by its parameter, a curve for each task; grey
    where distances are beyond the window."""
    families = {}
    for text in methods:
        method = Method.parse(text)
        families.setdefault(method.name, []).append((swept(method)[1], text))
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure = new_figure(4.6 * len(families) + 0.6, 3.6)
    for axes, (family, points) in zip(figure.subplots(1, len(families), squeeze=False)[0], families.items()):
        points.sort()
        values = [value for value, _ in points]
        length_axis(axes, values)
        axes.tick_params(axis="x", labelsize=8)
        axes.set(ylim=(-0.03, 1.03), xlabel=SWEPT_LABELS[SWEPT[family]], ylabel="accuracy")
        axes.set_title(f"{family}, {length_labels(lengths, L)[0]}", loc="left", fontsize=9)
        for value, text in points:
            if largest_distance(rows, text) >= L:
                axes.axvspan(value / 1.3, value * 1.3, color="0.9", linewidth=0)
        curves = {}
        for task in tasks:
            curves[task] = values, [accuracy(select(rows, method=text, task=task)) for _, text in points]
        draw_curves(axes, curves, tasks)
    figure.suptitle("grey: the farthest tokens are beyond the window", fontsize=8)
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# middle: what the last token sees

def last_token_plan(config, method, n):
    """The plan of the last token of a prompt of n, over all of them."""
    return method.plan(config, n, torch.tensor([n - 1]), torch.arange(n))


def seen_share(plan, span):
    """The share of the tokens first..last of a span that the last query of a plan sees.

    A query that sees 0..3 and 10..19 sees half of the span 2..5, and nothing of 4..9.
    """
    first, last = span
    seen = 0
    for region in plan.regions:
        start = max(int(region.start[-1]), first)
        end = min(int(region.end[-1]), last + 1)
        seen += max(end - start, 0)
    return seen / (last + 1 - first)


def middle_methods(config, lengths):
    """What does not see the middle, what does, and between them ReRoPE (but for log-n) that sees, of what is beyond its
    window, the first half of the prompt alone: nothing else about it differs."""
    near = max(config.train_len // 4, 1)
    half = f"lm-infinite:local={near}:cap={near}:sinks={max(lengths[0] // 2, 1)}"
    return ["streaming-llm", "lm-infinite", half, "rerope", "mesa"]


def middle_table(rows, methods, lengths, L):
    """Markdown, depths x methods, of accuracy and the share of the needle that is seen; below it accuracy where the
    last token sees the needle whole, in part and not at all."""
    cells = sorted({row["cell"] for row in rows})
    lines = []
    for cell in cells:
        groups = [select(rows, method=method, cell=cell) for method in methods]
        shares = [f"{share(accuracy(group))} ({share(mean(group, 'seen'))})" for group in groups]
        lines.append([f"{cell / CELLS:.2f}-{(cell + 1) / CELLS:.2f}", *shares])
    text = [f"accuracy at {length_labels(lengths, L)[0]}, in brackets the share of the needle that the last token sees",
            "", markdown(["depth", *methods], lines), ""]
    for method in methods:
        text.append(f"{method}: accuracy " + ", ".join(seen_texts(select(rows, method=method))))
    return "\n".join(text)


def seen_texts(rows):
    """How accuracy goes with what is seen: ["0.97 of 12 needles seen whole", ...]."""
    groups = {"whole": [row for row in rows if row["seen"] == 1],
              "in part": [row for row in rows if 0 < row["seen"] < 1],
              "not at all": [row for row in rows if row["seen"] == 0]}
    return [f"{accuracy(group):.2f} of {len(group)} needles seen {how}" for how, group in groups.items() if group]


def plot_middle(rows, methods, lengths, L):
    """A figure with a panel for each method: accuracy by depth, over the share of the needle that is seen, in grey."""
    columns = min(len(methods), 5)
    figure = new_figure(2.9 * columns, 3.2 * math.ceil(len(methods) / columns))
    grid = figure.subplots(math.ceil(len(methods) / columns), columns, squeeze=False).flatten()
    for axes, method in zip(grid, methods):
        groups = {}
        for row in select(rows, method=method):
            groups.setdefault(row["cell"], []).append(row)
        cells = sorted(groups)
        axes.bar([(cell + 0.5) / CELLS for cell in cells], [mean(groups[cell], "seen") for cell in cells],
                 width=1 / CELLS, color="0.82", label="share of the needle seen")
        axes.plot([(cell + 0.5) / CELLS for cell in cells], [accuracy(groups[cell]) for cell in cells],
                  color=COLOURS[1], marker="o", markersize=4, label="accuracy")
        axes.set(xlim=(0, 1), ylim=(-0.03, 1.06), xlabel="depth of the needle")
        axes.set_title(method, fontsize=8)
    for axes in grid[len(methods):]:
        axes.axis("off")
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    figure.suptitle(f"prompts of {length_labels(lengths, L)[0]} tokens", fontsize=9)
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# the sections

@dataclass
class Section:
    """What one section measures, and how it is told."""
    tasks: tuple          # default tasks, of tasks.py
    windows: tuple        # default lengths, in windows of the model
    prompts: int          # default number for each task, method and length
    methods: Callable     # methods(config, lengths) -> default methods as texts
    rows: Callable        # rows(args, model, tokenizer, trials, method, head) -> a dict for each Trial
    table: Callable       # table(rows, methods, lengths, L) -> text
    plot: Callable        # plot(rows, methods, lengths, L) -> a figure
    wants_head: bool = False


@dataclass
class Asked:
    """What a section is run with."""
    tasks: list
    methods: list[Method]
    lengths: list[int]


SECTIONS = {
    "dilution": Section(("passkey", "kv"), (1, 2, 4, 8, 16, 32), 12, dilution_methods,
                        dilution_rows, dilution_table, plot_dilution, wants_head=True),
    "resolution": Section(("passkey", "kv"), (16,), 16, resolution_methods,
                          answer_rows, resolution_table, plot_resolution),
    "middle": Section(("passkey",), (8,), 160, middle_methods, answer_rows, middle_table, plot_middle),
}


def run_section(args, name, model, tokenizer, settings):
    """Run what the results file lacks of a section; the rows of all that is asked for."""
    section = SECTIONS[name]
    asked = args.asked[name]
    count = args.prompts or section.prompts
    results = Results(args.results, {**settings, "section": name, "prompts": count},
                      ("task", "method", "length", "number"))
    start = time.perf_counter()
    tokens_run = 0  # of one prompt per task, method and length
    tokens_left = len(asked.tasks) * len(asked.methods) * sum(asked.lengths)
    rows = []
    for task in asked.tasks:
        head = choose_head(model, tokenizer, task, model.config.train_len, args.seed) if section.wants_head else None
        for n in asked.lengths:
            trials = make_trials(tokenizer, task, n, count, args.seed)
            for method in asked.methods:
                if run_trials(args, section, model, tokenizer, trials, method, head, results):
                    tokens_run += n
                tokens_left -= n
                seconds_left = (time.perf_counter() - start) / max(tokens_run, 1) * tokens_left
                found = select(results.rows.values(), task=task, method=str(method), length=n)
                say(f"{name} {task} {method} {n}: {accuracy(found):.2f} ({seconds_left:.0f} s left)")
                rows += found
    return rows


def run_trials(args, section, model, tokenizer, trials, method, head, results):
    """Run the batches of Trials that lack a row in results, each whole; returns whether there were any."""
    n = len(trials[0].prompt.ids)
    size = max(1, BATCH // n)
    was_run = False
    for begin in range(0, len(trials), size):
        batch = trials[begin:begin + size]
        names = [{"task": trial.prompt.task, "method": str(method), "length": n, "number": trial.number}
                 for trial in batch]
        if not all(results.key(row) in results.rows for row in names):
            found = section.rows(args, model, tokenizer, batch, method, head)
            results.add([{**row, **rest} for row, rest in zip(names, found)])
            was_run = True
    return was_run


# ---------------------------------------------------------------------------------------------------------------------
# the command line

def parse_args(argv):
    parser, flag = new_parser(__doc__)
    parser.usage = "%(prog)s [dilution|resolution|middle|all] [flags]; --help lists them"
    parser.set_defaults(ckpt=CKPT)
    parser.add_argument("section", nargs="?", choices=[*SECTIONS, "all"], default="all")
    flag("methods", "method", type=method_list, metavar="M,M,...", help="of one section, in place of its own")
    flag("tasks", type=task_list, metavar="T,T,...",
         help="of one section; default: passkey,kv, for middle passkey; there is lines too")
    flag("lengths", type=counts, metavar="N,N,...",
         help="in tokens, of one section; default: 1 to 32 windows for dilution, 16 for resolution, 8 for middle")
    defaults = ", ".join(f"{section.prompts} for {name}" for name, section in SECTIONS.items())
    flag("prompts", type=number(int, 1), help=f"for each task, method and length; default: {defaults}")
    flag("results", default="mechanisms.jsonl", metavar="FILE")
    flag("plot", metavar="FILE", help="draw the section's figure; of all, FILE-dilution and so on (needs matplotlib)")
    flag("seed", type=number(int, 0), default=0)
    args = parser.parse_args(argv)
    if args.section == "all" and (args.methods or args.lengths or args.tasks):
        parser.error("--methods, --tasks and --lengths are for one section: dilution, resolution or middle")
    if args.section != "dilution" and len(args.lengths or []) > 1:
        parser.error(f"{args.section} takes one of --lengths")
    if args.section == "middle" and len(args.tasks or []) > 1:
        parser.error("middle takes one of --tasks")
    return args


def task_list(text):
    """An argparse type: "passkey,kv" -> ["passkey", "kv"]."""
    tasks = list(dict.fromkeys(text.split(",")))
    for task in tasks:
        if task not in TASKS:
            raise argparse.ArgumentTypeError(f"unknown task {task!r}; there are {', '.join(TASKS)}")
    return tasks


def sections_asked(args):
    """The names of the sections to run."""
    return list(SECTIONS) if args.section == "all" else [args.section]


def check(args, config, tokenizer):
    """args.asked, {section: Asked}; ValueError before anything long: no matplotlib, a length too short, a method that
    makes no sense. Warnings of what will not work well, but of what resolution stretches on purpose."""
    if args.plot:
        figure_class()
    args.asked = {}
    for name in sections_asked(args):
        section = SECTIONS[name]
        lengths = args.lengths or [windows * config.train_len for windows in section.windows]
        methods = methods_asked(config, args.methods, section.methods(config, lengths))
        asked = Asked(args.tasks or list(section.tasks), methods, list(dict.fromkeys(lengths)))
        for task, n in itertools.product(asked.tasks, asked.lengths):
            make_trials(tokenizer, task, n, 1, args.seed)
        for method, n in itertools.product(methods, asked.lengths):
            last_token_plan(config, method, n)
            if name == "resolution":
                swept(method)
        if name != "resolution":
            say_warnings(config, methods, asked.lengths)
        args.asked[name] = asked


def plot_file(args, name):
    """The file of a section's figure: that of --plot, or of all sections why-dilution.png for why.png."""
    path = Path(args.plot)
    return path if args.section != "all" else path.with_name(f"{path.stem}-{name}{path.suffix}")


def run(argv=None):
    """The command: its exit code."""
    args = parse_args(argv)
    path, config, tokenizer = open_checkpoint(args)
    if hf.takes(path):
        raise ValueError(f"{path}: mechanisms.py is for families of model.py; this one runs through transformers")
    L = config.train_len
    check(args, config, tokenizer)
    device, dtype = place(args, config)
    settings = model_settings(args, path, L, dtype, seed=args.seed)
    say(settings_line({**settings, "device": device}))
    model = load_model(path, config, dtype, device, quantize=args.quantize)
    for name, asked in args.asked.items():
        rows = run_section(args, name, model, tokenizer, settings)
        told = rows, [str(method) for method in asked.methods], asked.lengths, L
        print(f"{name}: {SECTIONS[name].table(*told)}\n")
        if args.plot:
            save(SECTIONS[name].plot(*told), plot_file(args, name))
    return 0


if __name__ == "__main__":
    run_command(run, "mechanisms.py")
