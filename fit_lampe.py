"""LaMPE fitted to a model: the mapping length with the lowest loss, by input length, as a scaled sigmoid.

Does: measure the loss of a text over a grid of mapping lengths at four or more input lengths, fit m(n) = most / (1 +
exp(-(a n + b))) to the best ones, print the method to paste, and compare it with others on text that the fit has not
seen. All goes to a results file at once, so that an interrupted run continues. Does not: run the model itself, which
eval_perplexity.py does.

    python eval_perplexity.py book.txt --fit-lampe --documents 2 --plot fit.png
    python eval_perplexity.py book.txt --fit-lampe --lengths 4096,8192,16384,32768 --ckpt path/to/llama-7b

(arXiv 2508.02308, section 3: the best mapping length is flat for short inputs, and grows along a sigmoid.) Each input
is its `length` tokens in one pass, BOS in front; its loss is the mean over all its tokens.

Letters: n input length, m mapping length, L training length.
"""
from pathlib import Path

import numpy as np

from cli import (Results, counts, markdown, method_list, methods_asked, model_settings, new_parser, number,
                 open_checkpoint, place, read_text, say, settings_line, short_hash)
from geometry import lampe_fit
from model import load_model
from positions import Method
from show import figure_class, plot_lampe_fit, say_warnings

COMPARED = ("lampe", "self-extend")  # beside the fit, on other text
FEWEST = 4                           # input lengths that a fit of three numbers needs


# ---------------------------------------------------------------------------------------------------------------------
# the fit

def sigmoid(n, a, b, most):
    """m(n) = most / (1 + exp(-(a n + b))), for numbers or arrays n."""
    return most / (1 + np.exp(-(a * n + b)))


def fit_sigmoid(lengths, mappings, largest):
    """(a, b, most) of the sigmoid that is nearest to the best mapping length of every input length, by least squares.

    most stays at or below `largest`: data that have not levelled off do not say where they will.
    lengths 1, 2, 4, 8 and mappings 3, 3, 3, 3, largest 4: a sigmoid that is 3 all over.
    """
    longest = max(lengths)
    n = np.array(lengths) / longest
    m = np.array(mappings, dtype=float)
    middle = np.array([-1.0, 2.0])             # where the sigmoid is at its half, in units of the longest length
    steepness = np.log(np.array([0.3, 100.0]))
    for _ in range(30):
        # a grid of shapes; how high each must be has a closed form
        c = np.linspace(*middle, 41)[:, None, None]
        k = np.exp(np.linspace(*steepness, 41))[None, :, None]
        shape = 1 / (1 + np.exp(-k * (n - c)))  # (41, 41, lengths)
        most = np.minimum((shape * m).sum(-1) / (shape * shape).sum(-1), largest)
        error = ((most[..., None] * shape - m) ** 2).sum(-1)
        # a finer one around the best of them
        row, column = np.unravel_index(error.argmin(), error.shape)
        middle = around(c[row, 0, 0], middle)
        steepness = around(np.log(k[0, column, 0]), steepness)
    a = float(k[0, column, 0]) / longest
    return a, -a * longest * float(c[row, 0, 0]), float(most[row, column])


def around(centre, ends):
    """The ends of an interval two thirds as long, with this centre."""
    half = (ends[1] - ends[0]) / 3
    return np.array([centre - half, centre + half])


def fitted_method(a, b, most):
    """The Method that the fit is, as every script takes it."""
    return Method.parse(f"lampe:sigmoid=[{a:.6g},{b:.6g},{most:.6g}]")


# ---------------------------------------------------------------------------------------------------------------------
# what is measured

def measure(method, n, documents, loss_of, results):
    """The mean loss of a method on these documents of n tokens, from the results, or measured now."""
    for document in documents:
        if (str(method), n, document) not in results.rows:
            nll = loss_of(method, n, document)
            row = {"method": str(method), "length": n, "document": document, "nll": round(float(nll.mean()), 6)}
            results.add([row])
            say(f"{method}: {n} tokens, document {document + 1}, {row['nll']:.3f} nats per token")
    found = [results.rows[str(method), n, document]["nll"] for document in documents]
    return sum(found) / len(found)


def measure_grid(args, loss_of, results):
    """{n: {m: mean loss}}, mapping lengths below n alone: longer ones are plain RoPE too."""
    losses = {}
    for n in args.lengths:
        fitting = sorted({min(m, n - 1) for m in args.mappings})
        losses[n] = {}
        for m in fitting:
            method = Method("lampe", params={"mapping": m})
            losses[n][m] = measure(method, n, range(args.documents), loss_of, results)
    return losses


def best_mappings(losses):
    """The mapping length with the lowest loss, of each input length of measure_grid."""
    return [min(by_mapping, key=by_mapping.get) for by_mapping in losses.values()]


# ---------------------------------------------------------------------------------------------------------------------
# what was found

def report_grid(losses, fit):
    """A table of mapping lengths x input lengths in nats per token, the best in bold, and the line to paste, on
    stdout."""
    best = best_mappings(losses)
    lines = []
    for m in sorted({m for by_mapping in losses.values() for m in by_mapping}):
        cells = [f"{by_mapping[m]:.4f}" if m in by_mapping else "" for by_mapping in losses.values()]
        lines.append([m] + [f"**{cell}**" if m == top else cell for cell, top in zip(cells, best)])
    lines.append(["best"] + best)
    lines.append(["fitted"] + [f"{sigmoid(n, *fit):.0f}" for n in losses])
    print("nats per token by mapping length (down) and input length")
    print(markdown(["mapping", *losses], lines))
    print(f"\n{fitted_method(*fit)}")


def report_others(args, fitted, loss_of, results):
    """A table of the fitted method and others in nats per token, on documents after those of the fit, on stdout."""
    documents = range(args.documents, 2 * args.documents)
    lines = []
    for method in [fitted, *args.methods]:
        found = [measure(method, n, documents, loss_of, results) for n in args.lengths]
        lines.append([method, *(f"{loss:.4f}" for loss in found)])
    print("\nnats per token on text after that of the fit")
    print(markdown(["method", *args.lengths], lines))


# ---------------------------------------------------------------------------------------------------------------------
# the command line

def parse_args(argv):
    parser, flag = new_parser(__doc__)
    parser.add_argument("text", metavar="FILE", help="a UTF-8 text")
    flag("lengths", type=counts, metavar="N,N,...", help="input lengths in tokens; default: 1,2,4,8 times the window")
    flag("mappings", type=counts, metavar="M,M,...", help="default: 2,3,...,16 sixteenths of the window")
    flag("documents", type=number(int, 1), default=1, help="parts of the text of each length")
    flag("methods", "method", type=method_list, metavar="M,M,...",
         help=f"what the fit is compared with; default: {','.join(COMPARED)}")
    flag("results", default="perplexity.jsonl", metavar="FILE")
    flag("plot", metavar="FILE", help="the grid and the fit as a picture (needs matplotlib)")
    return parser.parse_args(argv)


def check(args, config, ids):
    """ValueError before anything long: too few lengths, a length too short to be mapped, too short a text. Whether the
    text is long enough to compare methods on another part of it."""
    if args.plot:
        figure_class()
    head = lampe_fit(None, config.train_len).head
    if len(set(args.lengths)) < FEWEST:
        raise ValueError(f"--lengths: a fit of three numbers needs at least {FEWEST} input lengths")
    if min(args.lengths) < max(2 * head, 3):
        raise ValueError(f"--lengths: LaMPE is plain RoPE below {max(2 * head, 3)} tokens")
    needed = args.documents * (max(args.lengths) - 1)
    if len(ids) < needed:
        raise ValueError(f"{args.text}: {len(ids)} tokens, not the {needed} of the longest input")
    say_warnings(config, args.methods, args.lengths)
    return len(ids) >= 2 * needed


def run(argv, losses):
    """The command: its exit code. losses(model, ids, method, impl=): of every token but the first, as in
    eval_perplexity.py."""
    args = parse_args(argv)
    path, config, tokenizer = open_checkpoint(args)
    L = config.train_len
    text = read_text(args.text)
    ids = tokenizer.encode(text, bos=False)
    args.lengths = sorted(args.lengths or [L, 2 * L, 4 * L, 8 * L])
    args.mappings = args.mappings or [max(k * L // 16, 1) for k in range(2, 17)]
    args.methods = methods_asked(config, args.methods, COMPARED)
    text_is_long = check(args, config, ids)
    device, dtype = place(args, config)
    settings = model_settings(args, path, L, dtype, text=Path(args.text).name, text_hash=short_hash(text.encode()),
                              protocol="fit-lampe")
    say(settings_line({**settings, "lengths": args.lengths, "mappings": args.mappings}))
    results = Results(args.results, settings, ("method", "length", "document"))
    model = load_model(path, config, dtype, device, quantize=args.quantize)

    def loss_of(method, n, document):
        part = ids[document * (n - 1):(document + 1) * (n - 1)]
        return losses(model, tokenizer.encode("") + part, method, impl=args.impl)
    grid = measure_grid(args, loss_of, results)
    fit = fit_sigmoid(args.lengths, best_mappings(grid), max(args.mappings))
    report_grid(grid, fit)
    if text_is_long:
        report_others(args, fitted_method(*fit), loss_of, results)
    else:
        say(f"{args.text}: too short to compare the fit on text that it has not seen")
    if args.plot:
        curve = [(n, sigmoid(n, *fit)) for n in range(min(args.lengths), max(args.lengths) + 1)]
        plot_lampe_fit(grid, best_mappings(grid), curve, args.plot)
    return 0
