"""RULER (arXiv 2404.06654): needles, variables, words to count, questions in long prompts, by method, task and length.

Does: the tasks of ruler_tasks.py, the three of tasks.py (passkey, lines, kv), or any prompts with references from a
file; on one seed or several, with the spread; greedy answers in batches, scored as
NVIDIA/RULER does (scripts/eval/synthetic/constants.py), or exactly, by F1 or by ROUGE-L; every answer goes to a results
file at once, and what is there is not run again. Does not: sample, or use chat templates.

    python eval_ruler.py --tasks all --methods rope,rerope,mesa                   # 4 lengths, 20 prompts a cell
    python eval_ruler.py --tasks vt --lengths 4096 --ckpt llama-7b --write vt.jsonl     # prompts in NVIDIA's format
    python eval_ruler.py --data narrativeqa.jsonl --score f1 --methods rope,mesa        # prompts from a file

A length counts the prompt and the tokens that the model may write, as in RULER.
"""
import itertools
import json
import random
import re
import statistics
import string
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from cli import (Results, agreed, counts, is_together, markdown, method_list, methods_asked, model_settings, new_parser,
                 number, open_checkpoint, open_model, place, rank_flags, read_text, run_command, say, select,
                 settings_line, short_hash)
from generate import decode, prefill, sample
from plots import HIGHLIGHTED, check_highlight
from ruler_tasks import NIAH, SIZES, TASKS, Size, answer_room, new_material, ruler_prompt, scaled_down, size_for
from show import figure_class, plot_ruler, say_warnings
from tasks import TASKS as DIGITS, passkey_prompt, random_digits, record_prompt

DEFAULT_METHODS = ("yarn", "rerope", "self-extend", "mesa")  # after what config.json says
BATCH = 16384       # tokens that run together
THRESHOLD = 85.6    # percent: Llama-2-7B's mean at 4,096 tokens, from which a length counts as effective
ROOM = 64           # tokens that a model may write for a prompt from a file
DIGITS_ROOM = 8     # tokens that a model may write for five digits
REFERENCE_FIELDS = ("outputs", "answers", "references", "output", "answer")


# ---------------------------------------------------------------------------------------------------------------------
# the prompts

@dataclass
class Case:
    """One prompt, and its place in the table."""
    task: str
    length: int            # the column it counts for
    seed: int
    number: int            # which one of its task, length and seed
    text: str
    ids: list[int]
    references: list[str]
    room: int              # tokens that the model may write


@dataclass
class Cell:
    """The prompts of one task, length and seed."""
    task: str
    length: int
    seed: int
    count: int
    make: Callable[[], list[Case]]


@dataclass
class Scaled:
    """How large a task is for one model."""
    size: Size
    room: int              # tokens that the model may write


def scaled_tasks(args, tokenizer, window, material):
    """{task: Scaled} of the tasks asked for: the same at all lengths, so as to fit into a window of so many tokens."""
    found = {}
    for task in args.tasks:
        if task in DIGITS:
            found[task] = Scaled(SIZES[0], DIGITS_ROOM)
            continue
        size = SIZES[0] if args.full else size_for(tokenizer, task, window, material)
        found[task] = Scaled(size, answer_room(tokenizer, task, size, material))
    return found


def make_cases(args, tokenizer, task, length, seed, scaled, material):
    """The args.samples Cases of a task, a length and a seed; what is drawn is fixed by these and its number."""
    cases = []
    for k in range(args.samples):
        rng = random.Random(f"test-{seed}-{task}-{length}-{k}")  # no seed of training begins with "test"
        n = length - scaled.room
        if task in DIGITS:
            prompt = digits_prompt(tokenizer, task, n, rng)
            text, references = tokenizer.decode(prompt.ids), [prompt.answer]
        else:
            prompt = ruler_prompt(tokenizer, task, n, rng, material, scaled.size)
            text, references = prompt.text, prompt.references
        cases.append(Case(task, length, seed, k, text, prompt.ids, references, scaled.room))
    return cases


def digits_prompt(tokenizer, task, n, rng):
    """A Prompt of tasks.py of n tokens, its needle at a random depth."""
    depth = rng.random()
    if task == "passkey":
        return passkey_prompt(tokenizer, n, depth, [random_digits(rng)])
    return record_prompt(tokenizer, task, n, depth, rng)


def read_json(path):
    """The contents of a JSON file; ValueError where it is something else."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None


def read_material(args):
    """The Material of --prose and --qa."""
    prose = None if args.prose is None else read_text(args.prose)
    squad = None if args.qa is None else read_json(args.qa)
    try:
        return new_material(prose=prose, squad=squad)
    except ValueError as error:
        names = ", ".join(name for name in (args.prose, args.qa) if name)
        raise ValueError(f"{names}: {error}") from None


def read_cases(args, tokenizer):
    """The Cases of --data, a JSON object a line. The text is its `input` and `answer_prefix`, after its `context` where
    it has one, or what --template says; references are its `outputs` or `answers`; `task` or `dataset`, else the file's
    name, names the task, and `max_new_tokens` the room of an answer."""
    cases = []
    numbers = Counter()
    for line, text in enumerate(read_text(args.data).splitlines(), 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
            prompt = prompt_text(row, args.template)
            references = references_of(row)
        except (ValueError, KeyError, AttributeError, IndexError, TypeError) as error:
            raise ValueError(f"{args.data}: line {line} is no prompt with references "
                             f"({type(error).__name__}: {error})") from None
        task = str(row.get("task") or row.get("dataset") or file_task(args.data))
        ids = tokenizer.encode(prompt)
        if not ids:
            raise ValueError(f"{args.data}: line {line} is an empty prompt")
        room = args.max_new_tokens or int(row.get("max_new_tokens") or ROOM)
        length = len(ids) + room
        if row.get("length") != length:  # not from --write: prompts of many lengths, in columns of powers of two
            length = 1 << (length - 1).bit_length()
        cases.append(Case(task, length, 0, numbers[task, length], prompt, ids, references, room))
        numbers[task, length] += 1
    if not cases:
        raise ValueError(f"{args.data}: no prompts")
    return cases


def file_task(path):
    """The task of a file: its name, or that of its folder where NVIDIA's scripts wrote it, vt/validation.jsonl."""
    path = Path(path)
    return path.parent.name if path.stem in ("validation", "test") and path.parent.name else path.stem


def prompt_text(row, template):
    """The text of a row of --data."""
    if template:
        return template.replace("\\n", "\n").format_map(row)
    text = row["input"] + row.get("answer_prefix", "")
    return f"{row['context']}\n\n{text}" if row.get("context") else text


def references_of(row):
    """The references of a row of --data, a list of texts."""
    found = next((row[name] for name in REFERENCE_FIELDS if row.get(name)), None)
    if isinstance(found, str):
        found = [found]
    if not isinstance(found, list):
        raise ValueError(f"none of {', '.join(REFERENCE_FIELDS)}")
    return [str(reference) for reference in found]


def cells_of(cases):
    """The Cells of the Cases of a file, by length."""
    groups = {}
    for case in cases:
        groups.setdefault((case.length, case.task), []).append(case)
    return [Cell(task, length, 0, len(groups[length, task]), partial(list, groups[length, task]))
            for length, task in sorted(groups)]


def write_cases(path, cells):
    """A file of prompts with NVIDIA's fields index, input, outputs and length; and task and max_new_tokens, which
    --data reads."""
    rows = []
    for cell in cells:
        for case in cell.make():
            rows.append({"index": case.number, "input": case.text, "outputs": case.references, "length": case.length,
                         "task": case.task, "max_new_tokens": case.room})
    write_rows(path, rows)


def write_rows(path, rows):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# scores, from 0 to 1

def found_shares(answer, references):
    """1 for every reference that the answer holds, in upper or lower case, else 0."""
    return [float(reference.lower() in answer.lower()) for reference in references]


def substring_score(task, answer, references):
    """RULER's: the share of references found, but for qa whether any is."""
    found = found_shares(answer, references)
    return max(found) if task.startswith("qa") else sum(found) / len(found)


def exact_score(task, answer, references):
    """Whether the first line of the answer is a reference, articles, case and punctuation aside."""
    words = normal_words(first_line(answer))
    return float(any(words == normal_words(reference) for reference in references))


def f1_score(task, answer, references):
    """The best F1 of the words of the answer's first line with those of a reference (SQuAD, arXiv 1606.05250)."""
    return max(word_f1(normal_words(first_line(answer)), normal_words(reference)) for reference in references)


def rouge_score(task, answer, references):
    """The best ROUGE-L F measure with a reference, by the rouge-score package."""
    scorer = rouge_scorer()
    return max(scorer.score(reference, answer)["rougeL"].fmeasure for reference in references)


def rouge_scorer():
    """ROUGE-L of the rouge-score package; ValueError with one clear sentence where it is missing."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise ValueError("--score rouge-l needs the rouge-score package (pip install rouge-score)") from None
    return RougeScorer(["rougeL"], use_stemmer=True)


def first_line(text):
    return text.strip().split("\n")[0]


def normal_words(text):
    """The words of a text as SQuAD compares them: "The Eiffel Tower." -> ["eiffel", "tower"]."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def word_f1(words, others):
    """2 x common / all, common words counted as often as in both; two empty lists agree."""
    if not words or not others:
        return float(words == others)
    common = sum((Counter(words) & Counter(others)).values())
    return 2 * common / (len(words) + len(others))


SCORES = {"substring": substring_score, "exact": exact_score, "f1": f1_score, "rouge-l": rouge_score}


# ---------------------------------------------------------------------------------------------------------------------
# answers

def answer_batch(model, tokenizer, cases, method, impl):
    """The answers of Cases of equally long prompts, as text: greedy, each to the end of the text or of its room."""
    prompts = torch.tensor([case.ids for case in cases])
    room = max(case.room for case in cases)
    eos = torch.tensor(model.config.eos_token_id or [-1])
    logits, cache = prefill(model, prompts, method, room=room, impl=impl)
    steps = []
    ended = torch.zeros(len(cases), dtype=torch.bool)
    for token in decode(model, logits, cache, method, prompts.shape[1], sample, room, impl):
        steps.append(token.cpu())
        ended |= torch.isin(steps[-1], eos)
        if ended.all():
            break
    written = torch.stack(steps, dim=1).tolist()
    ends = set(eos.tolist())
    return [tokenizer.decode(until(ids[:case.room], ends)) for ids, case in zip(written, cases)]


def until(ids, ends):
    """The ids before the first one that is in ends."""
    for k, token in enumerate(ids):
        if token in ends:
            return ids[:k]
    return ids


def batches(cases):
    """Lists of consecutive cases with equally long prompts, of up to BATCH tokens."""
    found = []
    for case in cases:
        if found and len(found[-1][0].ids) == len(case.ids) and (len(found[-1]) + 1) * len(case.ids) <= BATCH:
            found[-1].append(case)
        else:
            found.append([case])
    return found


# ---------------------------------------------------------------------------------------------------------------------
# the grid, one row of the results file per answer

def run_grid(args, model, tokenizer, cells, results):
    """Every method on every cell; prompts are made where a row is missing."""
    start = time.perf_counter()
    tokens_run = 0
    tokens_left = len(args.methods) * sum(cell.length * cell.count for cell in cells)
    for cell in cells:
        cases = None
        for method in args.methods:
            keys = keys_of(cell, method)
            if not all(key in results.rows for key in keys):
                cases = cases or cell.make()
                run_cases(args, model, tokenizer, cases, method, results)
                tokens_run += cell.length * cell.count
            tokens_left -= cell.length * cell.count
            seconds_left = (time.perf_counter() - start) / max(tokens_run, 1) * tokens_left
            results.gather()
            score = percent([results.rows[key] for key in keys if key in results.rows])
            say(f"{method} {cell.task} {cell.length}: {score:.1f} ({seconds_left:.0f} s left)")


def keys_of(cell, method):
    """The keys of a method's rows of a Cell, as Results has them."""
    return [(str(method), cell.task, cell.length, cell.seed, number) for number in range(cell.count)]


def run_cases(args, model, tokenizer, cases, method, results):
    """Run the batches of cases that lack a row in results, each batch whole."""
    for batch in batches(cases):
        keys = [(str(method), case.task, case.length, case.seed, case.number) for case in batch]
        if not results.claim(keys):
            continue
        rows = []
        for case, answer in zip(batch, answer_batch(model, tokenizer, batch, method, args.impl)):
            score = SCORES[args.score](case.task, answer, case.references)
            rows.append({"method": str(method), "task": case.task, "length": case.length, "trial": case.number,
                         "seed": case.seed, "tokens": len(case.ids), "references": case.references, "answer": answer,
                         "score": round(score, 4)})
        results.add(rows)


# ---------------------------------------------------------------------------------------------------------------------
# what was found

def percent(rows):
    """The mean score in percent; nan of no rows."""
    if not rows:
        return float("nan")
    return 100 * sum(row["score"] for row in rows) / len(rows)


def score_table(rows, methods, tasks, lengths):
    """{(method, task, length): percent}, nan where there are no rows."""
    groups = {}
    for row in rows:
        groups.setdefault((row["method"], row["task"], row["length"]), []).append(row)
    return {(method, task, length): percent(groups.get((method, task, length), []))
            for method in methods for task in tasks for length in lengths}


def means(scores, method, tasks, lengths):
    """[the mean over the tasks that have a score at this length, for each length]."""
    found = []
    for length in lengths:
        here = [scores[method, task, length] for task in tasks]
        here = [score for score in here if score == score]  # a nan is not equal to itself
        found.append(sum(here) / len(here) if here else float("nan"))
    return found


def spread_over_seeds(rows, method, tasks, lengths):
    """[the standard deviation of the seeds' means over the tasks, for each length]; nan of a single seed."""
    columns = []
    for seed in sorted({row["seed"] for row in rows}):
        scores = score_table(select(rows, seed=seed), [method], tasks, lengths)
        columns.append(means(scores, method, tasks, lengths))
    if len(columns) < 2:
        return [float("nan")] * len(lengths)
    return [statistics.stdev(column) for column in zip(*columns)]


def mean_text(average, spread):
    return cell_text(average) + (f" ± {spread:.1f}" if spread == spread else "")


def effective_length(lengths, averages, threshold):
    """The longest length whose mean is at least the threshold, as text; "below 256" where none is."""
    reached = [length for length, average in zip(lengths, averages) if average >= threshold]
    return str(max(reached)) if reached else f"below {min(lengths)}"


def cell_text(score):
    return f"{score:.1f}" if score == score else "-"


def report(args, rows, tasks, lengths, L):
    """The table of methods x tasks x lengths, that of the means with the effective lengths; a picture where asked."""
    methods = [str(method) for method in args.methods]
    scores = score_table(rows, methods, tasks, lengths)
    averages = {method: means(scores, method, tasks, lengths) for method in methods}
    lines = []
    for column, length in enumerate(lengths):
        for method in methods:
            cells = [cell_text(scores[method, task, length]) for task in tasks]
            lines.append([f"{length} ({length / L:g}x)", method, *cells, cell_text(averages[method][column])])
    print(markdown(["length", "method", *[short_name(task) for task in tasks], "mean"], lines))
    lines = []
    for method in methods:
        reach = effective_length(lengths, averages[method], args.threshold)
        spreads = spread_over_seeds(rows, method, tasks, lengths)
        cells = [mean_text(average, spread) for average, spread in zip(averages[method], spreads)]
        lines.append([method, *cells, reach])
    header = ["mean", *[f"{length} ({length / L:g}x)" for length in lengths], f"effective ({args.threshold:g})"]
    print("\n" + markdown(header, lines))
    if args.plot:
        plot_ruler(scores, averages, tasks, lengths, L, args.plot, args.highlight)


def short_name(task):
    """A task as the head of a column."""
    return task.removeprefix("niah_")


def write_predictions(folder, rows):
    """Answers as NVIDIA's evaluate.py reads them: folder/METHOD/LENGTH/TASK.jsonl with index, pred, outputs, others."""
    files = {}
    for row in rows:
        method = re.sub(r"[^\w.=-]", "_", row["method"])
        path = Path(folder) / method / str(row["length"]) / f"{row['task']}.jsonl"
        files.setdefault(path, []).append({"index": row["trial"], "pred": row["answer"], "input": "", "others": {},
                                           "outputs": row["references"], "length": row["length"]})
    for path, found in files.items():
        write_rows(path, found)


# ---------------------------------------------------------------------------------------------------------------------
# the command line

def parse_args(argv):
    parser, flag = new_parser(__doc__)
    parser.set_defaults(ckpt="tiny-ruler")  # the shipped model that was trained on these tasks
    flag("methods", "method", type=method_list, metavar="M,M,...", help="as in eval_passkey.py; or all")
    flag("tasks", "task", metavar="all|niah|T,T,...", help=f"of {', '.join((*TASKS, *DIGITS))}; default: all, "
         "RULER's (qa with --qa)")
    flag("lengths", type=counts, metavar="N,N,...",
         help="tokens of prompt and answer; default: 1,2,4,8 times the window")
    flag("samples", type=number(int, 1), default=20, help="prompts per task and length")
    flag("full", action="store_true", help="RULER's own sizes also for a small window, where they fit")
    flag("prose", metavar="FILE", help="a UTF-8 text as the hay; default: Python's help topics")
    flag("qa", metavar="FILE", help="questions for the task qa, in SQuAD's format")
    flag("data", metavar="FILE.jsonl", help="run the prompts of a file instead: input, outputs (or answers, context)")
    flag("template", metavar="TEXT", help="with --data: the prompt, with fields in braces, as {context} or {input}")
    flag("max-new-tokens", type=number(int, 1), help=f"with --data: tokens of an answer; default: {ROOM}, or the "
         "row's max_new_tokens")
    flag("score", choices=list(SCORES), default="substring", help="default: substring, RULER's")
    flag("threshold", type=number(float, 0, 100), default=THRESHOLD, help="percent, for the effective length")
    flag("write", metavar="FILE.jsonl", help="write the prompts, and stop")
    flag("predictions", metavar="FOLDER", help="write the answers as NVIDIA's evaluate.py reads them")
    flag("results", default="ruler.jsonl", metavar="FILE")
    rank_flags(flag, evaluation=True)
    flag("plot", metavar="FILE", help="heatmaps and means by length as a picture (needs matplotlib)")
    flag("highlight", type=method_list, metavar="M,M,...",
         help=f"methods in colour on --plot; default: all, or of many the best and {', '.join(HIGHLIGHTED)}")
    flag("seed", type=seeds, default=[0], metavar="N,N,...",
         help="prompts are drawn anew for each; the means get their standard deviation over seeds; default: 0")
    args = parser.parse_args(argv)
    if args.data and (args.tasks or args.lengths or args.write or args.prose or args.qa or args.full):
        parser.error("--data brings its own prompts: no --tasks, --lengths, --write, --prose, --qa or --full with it")
    if not args.data and (args.template or args.max_new_tokens):
        parser.error("--template and --max-new-tokens are for --data")
    return args


def seeds(text):
    """An argparse type: "0,1,2" -> [0, 1, 2]."""
    parse = number(int, 0)
    return list(dict.fromkeys(parse(part) for part in text.split(",")))


def tasks_asked(text, with_qa):
    """The list of tasks that --tasks asks for."""
    groups = {"all": [task for task in TASKS if task != "qa" or with_qa], "niah": NIAH}
    names = []
    for name in (text or "all").split(","):
        names += groups.get(name, [name])
    for name in names:
        if name not in (*TASKS, *DIGITS):
            raise ValueError(f"--tasks: unknown task {name!r}; there are {', '.join((*TASKS, *DIGITS))}")
    if "qa" in names and not with_qa:
        raise ValueError("--tasks qa needs --qa FILE, questions in SQuAD's format")
    return list(dict.fromkeys(names))


def say_sizes(scaled, window):
    """Which tasks are smaller than RULER's, and in what."""
    groups = {}
    for task, found in scaled.items():
        if task not in DIGITS:
            groups.setdefault(scaled_down(task, found.size), []).append(task)
    for text, tasks in groups.items():
        if text:
            say(f"scaled down for a window of {window} tokens: {', '.join(tasks)}: {text}")


def own_prompts(args, tokenizer, L):
    """(Cells, settings that tell their rows from others) of the tasks by name. ValueError before all that is
    long where a length is too short."""
    args.lengths = args.lengths or [L, 2 * L, 4 * L, 8 * L]
    args.tasks = tasks_asked(args.tasks, args.qa)
    material = read_material(args)
    window = min(L, *args.lengths)
    scaled = scaled_tasks(args, tokenizer, window, material)
    say_sizes(scaled, window)
    cells = []
    for length, task, seed in itertools.product(args.lengths, args.tasks, args.seed):
        room = scaled[task].room
        if length <= room:
            raise ValueError(f"--lengths {length}: an answer of the task {task} may take {room} tokens")
        make = partial(make_cases, args, tokenizer, task, length, seed, scaled[task], material)
        cells.append(Cell(task, length, seed, args.samples, make))
    for cell in cells:
        if cell.length == min(args.lengths) and cell.seed == args.seed[0]:
            cell.make()
    material_hash = short_hash(repr((material.prose, material.questions, material.paragraphs)).encode())
    return cells, {"material": material_hash, "scaled_for": window, "full": args.full}


def prompts_asked(args, tokenizer, L):
    """(Cells, settings that tell their rows from others)."""
    if not args.data:
        return own_prompts(args, tokenizer, L)
    cases = read_cases(args, tokenizer)
    data = repr([(case.text, case.references, case.room) for case in cases])
    return cells_of(cases), {"data": Path(args.data).name, "data_hash": short_hash(data.encode())}


def check(args, config, lengths):
    """ValueError before anything long: what is not installed, a method that makes no sense. Warnings of what will not
    work well."""
    if args.plot:
        figure_class()
        check_highlight(args.highlight, args.methods)
    if args.score == "rouge-l":
        rouge_scorer()
    say_warnings(config, args.methods, lengths)


def run(argv=None, ranks=None):
    """The command: its exit code; ranks: this process among others, a Ranks."""
    args = parse_args(argv)
    path, config, tokenizer = open_checkpoint(args)
    L = config.train_len
    args.methods = methods_asked(config, args.methods, (config.freq, *DEFAULT_METHODS))
    cells, prompt_settings = prompts_asked(args, tokenizer, L)
    if args.write and not {cell.task for cell in cells}.isdisjoint(DIGITS):
        raise ValueError(f"--write is for RULER's tasks: those of {', '.join(DIGITS)} are made of tokens, not of text")
    if args.write:
        if ranks is None or ranks.rank == 0:
            write_cases(args.write, cells)
        return 0
    lengths = list(dict.fromkeys(cell.length for cell in cells))
    check(args, config, lengths)
    device, dtype = place(args, config)

    settings = model_settings(args, path, L, dtype, **prompt_settings, score_by=args.score)
    say(settings_line({**settings, "methods": args.methods, "device": device, "lengths": lengths}))
    ranks = agreed(ranks, args, path, settings={**settings, "methods": args.methods, "lengths": lengths})
    results = Results(args.results, settings, ("method", "task", "length", "seed", "trial"), ranks, is_together(args))
    model = open_model(args, path, config, dtype, device, ranks=ranks)
    run_grid(args, model, tokenizer, cells, results)
    results.finish()
    if ranks.rank:
        return 0

    rows = [results.rows[key] for method in args.methods for cell in cells for key in keys_of(cell, method)]
    report(args, rows, list(dict.fromkeys(cell.task for cell in cells)), lengths, L)
    if args.predictions:
        write_predictions(args.predictions, rows)
    return 0


if __name__ == "__main__":
    run_command(run, "eval_ruler.py")
