"""The threshold probe: hidden values against position for one repeated word, and where they leave what was trained.

Does: read BOS and a word over and over, by every method; record some dimensions of the hidden states after some
layers; say at which position each crosses its threshold, and draw it. Does not: predict a single task's failure.

    python eval_perplexity.py --probe --plot probe.png                   # rope, dynamic-ntk, rerope, mesa on tiny
    python eval_perplexity.py --probe --ckpt path/to/llama-7b --length 16000 --layers 1,2 --dims 1,6

(Mesa-Extrapolation, arXiv 2410.15859, appendix F.) With one word repeated, a hidden value depends on the position
alone, and beyond a threshold the model fails. The threshold of a dimension is its extreme within the window, by the
model's own positions: of the largest and the smallest value the one that is nearer to the value at the window's end.
Where values rise or fall all along, as in the paper's figures, that is the value at the window's end itself. A method
crosses it at the first position beyond the window that is further out by more than a margin. A dimension that does not
move within the window, as most after layer 1, has no threshold.

Letters: n length of the input, L training length; layers and dimensions count from 1, as in the paper.
"""
from dataclasses import dataclass

import torch

from cache import KVCache
from cli import (counts, markdown, method_list, methods_asked, new_parser, number, open_checkpoint, place, say,
                 settings_line)
from model import load_model
from positions import Method
from show import figure_class, plot_probe

METHODS = ("rope", "dynamic-ntk", "rerope", "mesa")
AMONG = 20     # dimensions that --dims auto chooses from, as the paper
MARGIN = 0.05  # of the range within the window: how far beyond a threshold counts
FLAT = 1e-3    # of the values within the window: their range, where they do not move


@dataclass
class Threshold:
    """What a hidden value does not pass within the window."""
    value: float
    upward: bool    # whether passing it means to become larger
    margin: float


# ---------------------------------------------------------------------------------------------------------------------
# recording

def repeated(tokenizer, word, n):
    """(the n ids of BOS and a word over and over, the positions (W,) of the last token of every word)."""
    front = tokenizer.encode("")
    ids = tokenizer.encode_more(f" {word}")
    if not ids:
        raise ValueError(f"--word {word!r} has no tokens")
    words = (n - len(front)) // len(ids)
    if words < 1:
        raise ValueError(f"--length {n}: too short for the word {word!r} of {len(ids)} tokens")
    positions = len(front) - 1 + len(ids) * torch.arange(1, words + 1)
    return front + ids * words, positions


@torch.no_grad()
def hidden_values(model, ids, method, layers, chunk=512, impl="auto"):
    """The hidden states (len(layers), n, hidden_size) float32 after these layers, on the CPU, of a prompt ids (n,)."""
    n = len(ids)
    device = next(model.parameters()).device
    cache = KVCache(model.config, n)
    parts = []  # for each piece of the prompt, the output of every layer
    hooks = [block.register_forward_hook(lambda block, given, out: parts[-1].append(out[0].float().cpu()))
             for block in model.model.layers]
    for begin in range(0, n, chunk):
        end = min(begin + chunk, n)
        plan = model.plan(method, n=n, i=torch.arange(begin, end), j=torch.arange(end))
        parts.append([])
        model.model(torch.tensor([ids[begin:end]]).to(device), [plan] * len(hooks), cache, impl)
    for hook in hooks:
        hook.remove()
    return torch.stack([torch.cat([part[layer - 1] for part in parts]) for layer in layers])


# ---------------------------------------------------------------------------------------------------------------------
# thresholds

def threshold(values, positions, L):
    """The Threshold of a dimension, values (W,) at positions (W,) by the model's own positions; None where it does not
    move within the window."""
    trained = values[positions < L]
    low, high, last = float(trained.min()), float(trained.max()), float(trained[-1])
    if high - low < FLAT * (abs(high) + abs(low)):
        return None
    upward = high - last <= last - low
    return Threshold(high if upward else low, upward, MARGIN * (high - low))


def crossing(values, positions, L, limit):
    """The first of the positions (W,) from L on at which values (W,) are beyond a Threshold, None where none is."""
    over = values - limit.value if limit.upward else limit.value - values
    beyond = (over > limit.margin) & (positions >= L)
    return int(positions[beyond][0]) if bool(beyond.any()) else None


def choose_dims(values, positions, L, count=2):
    """The `count` dimensions, from 1, of the first 20 that rise or fall most steadily with the position within the
    window: values (W, hidden_size). Not all dimensions show a threshold."""
    inside = positions < L
    where = positions[inside].double()
    what = values[inside, :AMONG].double()
    steadiness = torch.corrcoef(torch.cat((where[:, None], what), 1).T)[0, 1:].abs().nan_to_num()
    return sorted((steadiness.topk(min(count, len(steadiness))).indices + 1).tolist())


# ---------------------------------------------------------------------------------------------------------------------
# the command line

def parse_args(argv):
    parser, flag = new_parser(__doc__)
    flag("methods", "method", type=method_list, metavar="M,M,...", help=f"default: {','.join(METHODS)}")
    flag("length", type=number(int, 8), help="tokens; default: 8 times the window")
    flag("word", default="hello", help="what is repeated; default: %(default)s")
    flag("layers", type=counts, default=[1, 2], metavar="N,N,...", help="after which layers, from 1; default: 1,2")
    flag("dims", type=counts, metavar="N,N,...", help="which dimensions, from 1; default: the two of the first 20 that "
         "rise or fall most steadily after the last of --layers")
    flag("plot", metavar="FILE", help="the values against position as a picture (needs matplotlib)")
    return parser.parse_args(argv)


def check(args, config):
    """ValueError before anything long."""
    if args.plot:
        figure_class()
    if args.length <= config.train_len:
        raise ValueError(f"--length {args.length} does not go beyond the window of {config.train_len} tokens")
    if max(args.layers) > config.num_hidden_layers:
        raise ValueError(f"--layers: the model has {config.num_hidden_layers}")
    if args.dims and max(args.dims) > config.hidden_size:
        raise ValueError(f"--dims: the model has {config.hidden_size}")


def run(argv):
    """The command: its exit code."""
    args = parse_args(argv)
    path, config, tokenizer = open_checkpoint(args)
    L = config.train_len
    args.length = args.length or 8 * L
    args.methods = methods_asked(config, args.methods, METHODS)
    check(args, config)
    ids, positions = repeated(tokenizer, args.word, args.length)
    if not bool((positions < L).sum() >= 3):
        raise ValueError(f"--word {args.word!r}: the window of {L} tokens holds it less than three times")
    device, dtype = place(args, config)
    say(settings_line({"ckpt": args.ckpt, "methods": args.methods, "length": args.length, "word": args.word,
                       "train-len": L, "dtype": dtype, "device": device}))
    model = load_model(path, config, dtype, device, quantize=args.quantize)

    own = hidden_values(model, ids, Method(), args.layers, impl=args.impl)[:, positions]
    dims = args.dims or choose_dims(own[-1], positions, L)
    columns = torch.tensor(dims) - 1
    values = {}  # of every method: (layers, W, dims)
    for method in args.methods:
        values[str(method)] = hidden_values(model, ids, method, args.layers, impl=args.impl)[:, positions][..., columns]
        say(f"{method}: {len(ids)} tokens read")
    report(args, own[..., columns], values, dims, positions, L)
    return 0


def report(args, own, values, dims, positions, L):
    """A table of crossings, layers and dimensions down and methods across, on stdout; a picture where asked for."""
    limits = {}
    lines = []
    for place_of_layer, layer in enumerate(args.layers):
        for column, dim in enumerate(dims):
            limit = threshold(own[place_of_layer, :, column], positions, L)
            limits[layer, dim] = limit
            if limit is None:
                lines.append([layer, dim, "flat", *("" for _ in values)])
                continue
            found = [crossing(series[place_of_layer, :, column], positions, L, limit) for series in values.values()]
            sign = ">" if limit.upward else "<"
            lines.append([layer, dim, f"{sign} {limit.value:.4f}", *("never" if at is None else at for at in found)])
    print(f"position at which a hidden value crosses its threshold; {args.word!r} repeated, {args.length} tokens, "
          f"window {L}")
    print(markdown(["layer", "dimension", "threshold", *values], lines))
    if args.plot:
        plot_probe(values, limits, args.layers, dims, positions, L, args.plot)
