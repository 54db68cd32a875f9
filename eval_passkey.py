"""Retrieval: how often a model repeats five digits hidden in a long prompt, by method, length and depth.

Does: three tasks, a passkey in filler (arXiv 2305.16300), and a line or a key-value pair asked of a record full of them
(LongEval's lines, arXiv 2307.03172's pairs). Builds prompts of an exact number of tokens,
decodes greedily, counts the answers whose first integer is the key, and measures the log-probability of the answer.
Every trial goes to results.jsonl at once, and what is there is not run again, so an interrupted run continues.
Does not: sample, or judge anything but the key.

    python eval_passkey.py --methods rope,pi:factor=8,rerope,self-extend:attn-scale=logn,mesa --lengths 256,512,1024
    python eval_passkey.py --task lines
"""
import argparse
import hashlib
import itertools
import json
import random
import re
import sys
import time
from pathlib import Path

import torch

from generate import (FILLER, NEEDLE, QUESTION, TASK, asked_methods, cycled, decode, method_list, new_parser, number,
                      opened, placed, plan_maker, prefill, read_text, sample, say, warnings)
from model import load_model
from positions import figure_class, parse_settings, run_command

TASKS = ("passkey", "lines", "kv")
RECORDS = {  # what comes first, an entry, the question, and the answer as it stands in an entry
    "lines": ("Below is a record of lines. Remember the REGISTER_CONTENT of each line.",
              "line {name}: REGISTER_CONTENT is <{value}>",
              "What is the REGISTER_CONTENT of line {name}? line {name}: REGISTER_CONTENT is", "<{value}>"),
    "kv": ("Below is a list of keys and values. Remember the value of each key.",
           "{name}: {value},", "What is the value of {name}? {name}:", "{value},")}
WORDS = """
ant ape arch arm ash axe bag ball band bank barn bath bean bear bed bee bell belt bird boat bone boot bowl boy bread
bull bus bush cake camp cap car card cart cat cave chain chin clay clock club coal coat coin comb cook cord cork corn
cow crab crow cup dart desk dish dog doll door dove drum duck dust ear egg elf elm face fan farm fern fig fire fish
flag foot fork fox frog fruit game gate gem gift goat gold hand harp hat hawk hen herb hill hive hook horn ice ink
iron jar jet jug king kite knee knot lace lake lamb lamp leaf lens lime lion lock log map mask meal milk mill mint
mole moon moss moth mouse mule nail neck nest net nose nut oak oar owl paint palm pan park pea pen pig pipe pot rat
rock room root rug salt
""".split()  # names of entries
PAIRS = ["-".join(pair) for pair in itertools.permutations(WORDS, 2)]  # where words are too few
NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry")  # owners of several keys
BATCH = 16384  # tokens that run together
GRID = 32      # distances of --kmax


# ---------------------------------------------------------------------------------------------------------------------
# prompts

def sentences(keys):
    """(needle of every key, question for the last key) for one key, or for several that are told apart by a name."""
    if len(keys) == 1:
        return [NEEDLE.format(key=keys[0])], QUESTION
    owned = [f"The pass key of {name} is {key}. Remember it. {key} is the pass key of {name}."
             for name, key in zip(NAMES, keys)]
    name = NAMES[len(keys) - 1]
    return owned, f"What is the pass key of {name}? The pass key of {name} is"


def build(tokenizer, n, depth, keys, filler):
    """(ids of exactly n tokens, (first, last) token of the needle asked for), the needle asked for at depth 0 to 1.

    filler: token ids, cycled. The other needles are spread evenly over the filler. ValueError where n is too short.
    """
    needles, question = sentences(keys)
    head, question, *needles = ([tokenizer.encode(text, bos=False) for text in (TASK, question, *needles)])
    head = [tokenizer.bos_id] * (tokenizer.bos_id is not None) + head
    room = n - len(head) - len(question) - sum(map(len, needles))
    if room < 0:
        raise ValueError(f"a passkey prompt takes at least {n - room} tokens, not {n}")
    others = [(k + 1) / len(needles) for k in range(len(needles) - 1)]
    spread = sorted((round(d * room), k == len(needles) - 1, needle) for k, (d, needle)
                    in enumerate(zip([*others, depth], needles)))
    ids, fill, done = list(head), itertools.cycle(filler), 0
    for at, asked, needle in spread:
        ids += itertools.islice(fill, at - done)
        if asked:
            span = len(ids), len(ids) + len(needle) - 1
        ids, done, fill = ids + needle, at, itertools.cycle(filler)
    return ids + list(itertools.islice(fill, room - done)) + question, span


def entries(tokenizer, task, room, rng, names=None):
    """[(name, value, ids)] of as many entries of a record as fit into room tokens.

    names: what to draw names from, none twice; by default WORDS, or, where these are too few, PAIRS like "moth-lamp".
    Values have five digits.
    """
    _, entry, *_ = RECORDS[task]

    def encoded(name):
        value = str(rng.randrange(10000, 100000))
        return name, value, tokenizer.encode(entry.format(name=name, value=value), bos=False)
    count = max(room, 0) // min(len(encoded(word)[-1]) for word in WORDS[:8])
    names = names or (WORDS if count <= len(WORDS) else PAIRS)
    out = []
    for name in rng.sample(names, min(count, len(names))):
        out.append(encoded(name))
        room -= len(out[-1][-1])
        if room < 0:
            return out[:-1]
    return out


def record(tokenizer, task, n, depth, rng):
    """(ids of exactly n tokens, (first, last) token of the entry asked for, its value): a record full of entries like
    it (LongEval's lines, or key-value pairs). ValueError where n is too short for one entry."""
    first, _, question, _ = RECORDS[task]
    head, after = tokenizer.encode(first), tokenizer.encode(question.format(name=PAIRS[0]), bos=False)
    found = entries(tokenizer, task, n - len(head) - len(after) - 8, rng)
    if not found:
        raise ValueError(f"{n} tokens are too few for a prompt of the task {task}")
    asked = round(depth * (len(found) - 1))
    name, value, _ = found[asked]
    after, body = tokenizer.encode(question.format(name=name), bos=False), [ids for *_, ids in found]
    pad = n - len(head) - len(after) - sum(map(len, body))
    head += cycled(tokenizer.encode(FILLER, bos=False), pad)
    at = len(head) + sum(map(len, body[:asked]))
    return head + list(itertools.chain.from_iterable(body)) + after, (at, at + len(body[asked]) - 1), value


def filler_ids(args, tokenizer):
    """Token ids of --filler."""
    fill = tokenizer.encode(FILLER if args.filler == "repeat" else read_text(args.filler), bos=False)
    if not fill:
        raise ValueError(f"{args.filler}: an empty filler")
    return fill


def filler_name(args):
    """What tells the rows of one filler from those of another: "repeat", or a file's name and a hash of its text."""
    if args.filler == "repeat":
        return "repeat"
    return f"{Path(args.filler).name} {short_hash(read_text(args.filler).encode())}"


def cases(args, tokenizer, n, fill):
    """[(cell, trial, key, ids, span)] of one length: args.depths cells of the depth range, args.trials needles in each,
    all evenly spread from the start to the end; keys and the place in a text filler are fixed by the seed."""
    count, out = args.depths * args.trials, []
    for t in range(count):
        rng, depth = random.Random(f"{args.seed}-{n}-{t}"), t / (count - 1) if count > 1 else 0.5
        if args.task == "passkey":
            keys = [str(rng.randrange(10000, 100000)) for _ in range(args.needles)]
            start = 0 if args.filler == "repeat" else rng.randrange(len(fill))
            key, (ids, span) = keys[-1], build(tokenizer, n, depth, keys, fill[start:] + fill[:start])
        else:
            ids, span, key = record(tokenizer, args.task, n, depth, rng)
        out.append((t // args.trials, t % args.trials, key, ids, span))
    return out


# ---------------------------------------------------------------------------------------------------------------------
# answers

def parse_method(text):
    """"self-extend:group=8:freq=yarn:attn-scale=logn" -> ("self-extend", "yarn", "logn", {"group": 8})."""
    name, *settings = text.split(":")
    params = parse_settings(settings, also=("freq", "attn_scale"))
    return name, params.pop("freq", None), params.pop("attn_scale", None), params


def answer(model, tokenizer, prompts, texts, how, impl):
    """[(first integer of the greedy answer or "", log-probability of the right text)] for prompts of one length."""
    n, plan = len(prompts[0]), plan_maker(model, len(prompts[0]), *how)
    wanted = torch.tensor([tokenizer.encode(text, bos=False) for text in texts])
    steps = wanted.shape[1]
    logits, cache = prefill(model, torch.tensor(prompts), plan, 2 * steps + 4, impl=impl)
    with torch.no_grad():  # the answer as if it had been written, for its probability; then the cache forgets it
        step = plan(torch.arange(n, n + steps - 1), torch.arange(n + steps - 1))
        forced = model(wanted[:, :-1].to(logits.device), step, cache, impl=impl)
    cache.cut(n)
    logp = torch.cat((logits[:, None], forced), 1).float().log_softmax(-1).cpu()
    logp = logp.gather(-1, wanted[..., None]).sum((1, 2)).tolist()
    written = torch.stack([token.cpu() for token in decode(model, logits, cache, plan, sample, steps + 3, impl)], 1)
    found = [re.search(r"\d+", tokenizer.decode(ids)) for ids in written.tolist()]
    return [(f.group() if f else "", round(p, 3)) for f, p in zip(found, logp)]


def is_cut(model, n, span, how):
    """Whether the last token of the needle cannot see its first one: a chunk boundary of Mesa, the edge of a window."""
    first, last = span
    plan = plan_maker(model, n, *how)(torch.tensor([last]), torch.arange(n))
    return not any(int(r.start) <= first < int(r.end) for r in plan.regions)


# ---------------------------------------------------------------------------------------------------------------------
# the grid, one line of results.jsonl per trial

class Results:
    """The rows of a results file that were made with these settings, and the file to append to.

    place: the names of the fields that tell the rows of one run apart.
    """

    def __init__(self, path, settings, place=("method", "length", "cell", "trial")):
        self.path, self.settings, self.names, self.rows = Path(path), settings, place, {}
        if self.path.exists():
            whole = self.path.read_bytes()
            kept = whole[:whole.rfind(b"\n") + 1]  # a killed run may have left half a line
            if len(kept) < len(whole):
                self.path.write_bytes(kept)
            for count, line in enumerate(kept.splitlines(), 1):
                try:
                    row = json.loads(line)
                except ValueError:
                    raise ValueError(f"{path}: line {count} is not a result; choose another --results file") from None
                if {name: row.get(name) for name in settings} == settings:
                    self.rows[self.place(row)] = row

    def place(self, row):
        return tuple(row[name] for name in self.names)

    def add(self, rows):
        """Append the rows that are not there yet, in one write."""
        fresh = [{**row, **self.settings} for row in rows if self.place(row) not in self.rows]
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in fresh))
        self.rows.update({self.place(row): row for row in fresh})


def short_hash(data):
    """16 hexadecimal digits that tell these bytes from others."""
    return hashlib.sha256(data).hexdigest()[:16]


def fingerprint(path):
    """A short hash of a checkpoint's config and of the name, size and first megabyte of its weight files."""
    h = hashlib.sha256((path / "config.json").read_bytes())
    for file in sorted(path.glob("*.safetensors")):
        with open(file, "rb") as f:
            h.update(f"{file.name} {file.stat().st_size}".encode() + f.read(2 ** 20))
    return h.hexdigest()[:16]


def run_grid(args, model, tokenizer, fill, results):
    """Every trial of every method and length that results does not hold yet."""
    total = len(args.methods) * sum(args.lengths)
    start, done, spent = time.perf_counter(), 0, 0
    for n in args.lengths:
        prompts = cases(args, tokenizer, n, fill)
        size = max(1, BATCH // n)
        for spec in args.methods:
            missing = [c for c in prompts if (spec, n, c[0], c[1]) not in results.rows]
            for begin in range(0, len(prompts), size):
                batch = prompts[begin:begin + size]
                if any(case in missing for case in batch):  # always whole, so that a rerun gives the same digits
                    results.add(rows_of(args, model, tokenizer, batch, spec, n))
            done, spent = done + n, spent + n * bool(missing)
            left = (time.perf_counter() - start) / max(spent, 1) * (total - done)
            found = share(select(results.rows.values(), method=spec, length=n))
            say(f"{spec} {n}: {found:.2f} ({left:.0f} s left)")


def rows_of(args, model, tokenizer, batch, spec, n):
    """The results of a batch of cases."""
    how, form = parse_method(spec), "{value}" if args.task == "passkey" else RECORDS[args.task][-1]
    texts = [form.format(value=key) for _, _, key, _, _ in batch]
    answers = answer(model, tokenizer, [ids for *_, ids, _ in batch], texts, how, args.impl)
    return [{"method": spec, "length": n, "cell": cell, "trial": trial, "key": key, "answer": text,
             "correct": text == key, "logp": logp, "cut": is_cut(model, n, span, how)}
            for (cell, trial, key, _, span), (text, logp) in zip(batch, answers)]


# ---------------------------------------------------------------------------------------------------------------------
# what was found

def share(rows):
    """The share of right answers."""
    return sum(row["correct"] for row in rows) / len(rows) if rows else float("nan")


def select(rows, **where):
    return [row for row in rows if all(row[name] == value for name, value in where.items())]


def table(rows, methods, lengths, L):
    """Markdown, methods x lengths, of the share of right answers."""
    head = "| method | " + " | ".join(f"{n} ({n / L:g}x)" for n in lengths) + " |"
    lines = [f"| {m} | " + " | ".join(f"{share(select(rows, method=m, length=n)):.2f}" for n in lengths) + " |"
             for m in methods]
    return "\n".join([head, "|---" * (len(lengths) + 1) + "|", *lines])


def heatmap(rows, method, lengths, cells, colour):
    """A method's accuracy in the terminal, a line per depth, a column per length; coloured red to green where asked."""
    lines = [f"{method}: accuracy by depth (down) and length"]
    for cell in range(cells):
        line = f"{cell / cells:4.0%}-{(cell + 1) / cells:4.0%} "
        for n in lengths:
            x = share(select(rows, method=method, length=n, cell=cell))
            text = f" {x:.2f} "
            line += f"\033[48;2;{int(220 - 180 * x)};{int(60 + 120 * x)};70m\033[97m{text}\033[0m" if colour else text
        lines.append(line)
    return "\n".join([*lines, " " * 10 + "".join(f"{n:>6}" for n in lengths)])


def cut_lines(rows, methods):
    """For each method that cuts needles in two: how much of its loss that explains."""
    lines = []
    for m in methods:
        mine = select(rows, method=m)
        cut, whole = select(mine, cut=True), select(mine, cut=False)
        if cut:
            lost, missed = sum(not row["correct"] for row in cut), sum(not row["correct"] for row in mine)
            lines.append(f"{m}: {len(cut)} of {len(mine)} needles are cut by a boundary: accuracy {share(cut):.3f}, "
                         f"whole ones {share(whole):.3f}; {lost} of {missed} misses are cut needles")
    return lines


def kmax(rows, method, n):
    """A method's effective window (arXiv 2306.15595, section 3.3): the largest distance of the needle from the end, in
    tokens, with a fifth of the answers right at it and at all shorter distances of the grid."""
    best = 0
    for step in range(1, GRID + 1):
        if share(select(rows, method=method, length=n, cell=GRID - step)) < 0.2:
            break
        best = n * step // GRID
    return best


def plot(rows, methods, lengths, cells, L, path):
    """One picture: a heatmap per method, and accuracy by length; dashed at the window. Needs matplotlib."""
    Figure = figure_class()
    columns = min(len(methods), 4)
    figure = Figure(figsize=(3.2 * columns, 2.4 * -(-len(methods) // columns) + 4), dpi=110, layout="constrained")
    grid = figure.add_gridspec(-(-len(methods) // columns) + 2, columns)
    edge = sum(n <= L for n in lengths) - 0.5
    for k, m in enumerate(methods):
        axes = figure.add_subplot(grid[k // columns, k % columns])
        axes.imshow([[share(select(rows, method=m, length=n, cell=c)) for n in lengths] for c in range(cells)],
                    cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
        axes.axvline(edge, color="black", linestyle="--", linewidth=1)
        axes.set(title=m, xticks=range(len(lengths)), xticklabels=lengths, ylabel="depth", yticks=[])
    axes = figure.add_subplot(grid[-2:, :])
    for m in methods:
        axes.plot(lengths, [share(select(rows, method=m, length=n)) for n in lengths], marker="o", label=m)
    axes.axvline(L, color="black", linestyle="--", linewidth=1)
    axes.set(xscale="log", xlabel="prompt length in tokens", ylabel="accuracy", xticks=lengths, xticklabels=lengths)
    axes.minorticks_off()
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(path)


# ---------------------------------------------------------------------------------------------------------------------
# the command line

def parse_args(argv):
    parser, flag = new_parser(__doc__)

    def counts(text):
        return [number(int, 1)(part) for part in text.split(",")]
    flag("methods", type=method_list,
         help="comma-separated, each name[:parameter=value...], freq=... and attn-scale=... among them; or all")
    flag("lengths", type=counts, help="in tokens; default: 1,2,4,8 times the window")
    flag("depths", type=number(int, 1), default=5, help="cells that the depth range is divided into")
    flag("trials", type=number(int, 1), default=4, help="prompts per method, length and depth")
    flag("task", choices=TASKS, default="passkey", help="a passkey, or one line or key of a record full of them")
    flag("filler", default="repeat", metavar="repeat|FILE", help="five repeated sentences, or a UTF-8 text")
    flag("needles", type=number(int, 1, len(NAMES)), default=1, help="keys in a prompt; one is asked for")
    flag("kmax", action="store_true", help=f"the effective window: {GRID} depths, 10 trials, a fifth right")
    flag("results", default="results.jsonl", metavar="FILE")
    flag("plot", metavar="FILE", help="heatmaps and accuracy by length as a picture (needs matplotlib)")
    flag("seed", type=number(int, 0), default=0)
    args = parser.parse_args(argv)
    if args.task != "passkey" and (args.needles > 1 or args.filler != "repeat"):
        parser.error(f"--needles and --filler are for the passkey, not for --task {args.task}")
    if args.kmax:
        args.depths, args.trials = GRID, 10
    return args


def check(args, config, tokenizer, fill):
    """Look at lengths, methods and the want of matplotlib before anything long; warnings of what will not work well."""
    if args.plot:
        figure_class()
    for n in args.lengths:
        cases(argparse.Namespace(**{**vars(args), "depths": 1, "trials": 1}), tokenizer, n, fill)
        for spec in args.methods:
            for warning in warnings(config, n, *parse_method(spec)):
                say(f"warning: {warning}")


def report(args, results, L):
    """Table, heatmaps and what boundaries cost, on stdout."""
    rows = [row for row in results.rows.values() if row["method"] in args.methods and row["length"] in args.lengths]
    print(table(rows, args.methods, args.lengths, L))
    for m in args.methods:
        if args.kmax:
            print(f"{m}: k_max " + ", ".join(f"{kmax(rows, m, n)} of {n}" for n in args.lengths))
        elif args.depths > 1:
            print("\n" + heatmap(rows, m, args.lengths, args.depths, sys.stdout.isatty()))
    for line in cut_lines(rows, args.methods):
        print(line)
    if args.plot:
        plot(rows, args.methods, args.lengths, args.depths, L, args.plot)


def run(argv=None):
    """The command: its exit code."""
    args = parse_args(argv)
    path, config, tokenizer = opened(args)
    args.methods = asked_methods(config, args.methods, (config.freq, "pi", "rerope", "self-extend", "mesa"))
    args.lengths = args.lengths or [config.train_len * k for k in (1, 2, 4, 8)]
    fill = filler_ids(args, tokenizer)
    check(args, config, tokenizer, fill)
    device, dtype = placed(args, config)
    settings = {"ckpt": args.ckpt, "weights": fingerprint(path), "task": args.task, "seed": args.seed,
                "depths": args.depths, "trials": args.trials, "filler": filler_name(args), "needles": args.needles,
                "train_len": config.train_len, "dtype": str(dtype).removeprefix("torch."), "impl": args.impl}
    say(" ".join(f"{name}={value}" for name, value in {**settings, "methods": ",".join(args.methods), "device": device,
                                                         "lengths": ",".join(map(str, args.lengths))}.items()))
    results = Results(args.results, settings)
    run_grid(args, load_model(path, config, dtype, device), tokenizer, fill, results)
    report(args, results, config.train_len)
    return 0


if __name__ == "__main__":
    run_command(run, "eval_passkey.py")
