"""What a method does, in text and in pictures: distances, costs, how far it reaches, what a model looks at with it;
and the plots of all evaluations but mechanisms.py.

Does: draw distance matrices, count pairs, find the longest prompt that stays within the training length,
warn of longer ones, plot the results of the evaluations. Does not: run a model, but for --trace, by tracing.py.

    python show.py mesa                                            # a small example as text, and what it costs
    python show.py mesa:first=2:chunk=4:width=2 --length 12 --train-len 6
    python show.py all --plot methods.png                          # every method in one picture
    python show.py --page methods.html                             # a page on which every method can be played with
    python show.py mesa --trace "The sky is"                       # what the last token attends to, layer by layer
"""
import math
from dataclasses import replace
from pathlib import Path

import torch

import hf
from cli import (accuracy, method_list, open_checkpoint, place, plain_parser, read_text, run_command, say, select)
from frequencies import FREQUENCIES, SCALES, UNROTATED, pick, rope, whole
from geometry import METHODS, cosscale, full
from model import DTYPES, load_model
from page import write_page
from plan import distance, farthest, visible_keys
from plots import HIGHLIGHTED, draw_curves, draw_traces, highlighted
from positions import Method, make_plan, parameters, parse_settings
from quantized import BITS
from tracing import passkey_case, text_case, trace, trace_text

LONGEST = 2 ** 20  # tokens at which the search for a method's reach ends
PRINTABLE = 4096   # tokens of the longest example that is printed as text
SAMPLES = 24       # tokens in the picture of a real prompt
GROWS = {          # the parameter of a method or frequency rule that, made larger, lets it serve a longer prompt
    "leaky-rerope": "k",
    "self-extend":  "group",
    "stair":        "width",
    "mesa":         "width",
    "pi":           "factor",
    "ntk":          "factor",
    "ntk-mixed":    "factor",
    "yarn":         "factor",
    "mrrope":       "factor",
    "p-rope":       "factor",
    "llama3":       "factor",
}


# ---------------------------------------------------------------------------------------------------------------------
# a plan as text

def picture(plan):
    """The distance matrix as text: a row per query, as far as the last key it sees, and a dot for an unseen key."""
    rows = [[cell(number) for number in row] for row in distance(plan).tolist()]
    width = 1 + max(len(text) for row in rows for text in row)
    lines = []
    for row in rows:
        last_seen = max(j for j, text in enumerate(row) if text != ".")
        lines.append("".join(text.rjust(width) for text in row[:last_seen + 1]))
    return "\n".join(lines)


def cell(number):
    """A distance in three digits, or as many as its whole part has."""
    if math.isnan(number):
        return "."
    if number < 999.5:
        return f"{number:.3g}"
    return f"{number:.0f}"


def describe(plan, n):
    """Lines on what a plan of n queries and n keys costs: its regions, their largest distances, attended pairs."""
    lines = []
    for number, r in enumerate(plan.regions, 1):
        visible = (r.end - r.start).clamp(min=0)
        lines.append(f"region {number}: {int((visible > 0).sum())} queries, {int(visible.sum())} pairs, "
                     f"largest distance {farthest(r):.6g}")
    pairs = int(visible_keys(plan).sum())
    causal = n * (n + 1) // 2
    lines.append(f"attended pairs: {pairs}, {pairs / causal:.1%} of full causal attention ({causal})")
    return lines


def list_methods():
    """Every method as text: the sentence that explains it, its parameters, its attention scale."""
    lines = []
    for name, (geometry, freq, scale) in METHODS.items():
        functions = geometry, FREQUENCIES.get(freq), SCALES.get(scale)
        lines.append(f"{name:13} {first_sentence(*functions)}")
        lines.append(f"{'':13} parameters: {settings_text(*functions)}; attention scale: {scale_text(freq, scale)}")
    return "\n".join(lines)


def first_sentence(geometry, rule, scale):
    """The first line of the docstring of what makes a method: its geometry, unless that is the plain one."""
    function = geometry
    if geometry is full:
        function = rule or scale
    line = function.__doc__.split("\n")[0]
    return " ".join(line.split())


def settings_text(*functions):
    """The parameters of these functions and their defaults: "window=auto, power=1.0"."""
    settings = parameters(*functions)
    if cosscale in functions:
        settings = {"cosine": 32}
    texts = [f"{name}={'auto' if default is None else default}" for name, default in settings.items()]
    return ", ".join(texts) or "none"


def scale_text(freq, scale):
    """The attention scale of a row of METHODS; YaRN's is a factor on cos and sin, called mscale."""
    if scale is None and freq in ("yarn", "dynamic-yarn", "mrrope"):
        return "mscale"
    return scale or "none"


# ---------------------------------------------------------------------------------------------------------------------
# how far a method reaches

def last_query_plan(config, method, n, total):
    """The plan of the last of `total` tokens, the first n of which are the prompt, with the keys that it may see."""
    last = torch.tensor([total - 1])
    earlier = [torch.arange(start, stop) for start, stop in config.later_keys(method, n, total - 1)]
    return method.plan(config, n, last, torch.cat([*earlier, last]))


def slowdown(plan, base=1e4):
    """The speed of the slowest channel pair, in that of plain RoPE's pair of the same index.

    1/factor for pi; 0 where nothing turns. Where slow pairs are at rest (p-rope, cope-clip, giraffe), that of the pair
    which is slowed least: cutting off the slow end lets nothing that still turns reach further.
    """
    if plan.inv_freq is None or not plan.inv_freq.any():
        return 0.0
    plain, _ = rope(2 * len(plan.inv_freq), base, 1, 1)
    counted = plan.inv_freq > 0
    if bool(counted.all()):
        counted = plan.inv_freq == plan.inv_freq.min()
    return float((plan.inv_freq / plain)[counted].max())


def within(plan, L, base=1e4):
    """Whether no distance of a plan, as its slowest channel pair turns, reaches L. Where nothing turns, none does."""
    return slowdown(plan, base) * largest_distance(plan) < L


def largest_distance(plan):
    return max(farthest(region) for region in plan.regions)


def longest(fits, most):
    """The largest m <= most with fits(m), for a fits that holds up to some m and not beyond; 0 where it never holds."""
    low = 0   # fits(low) holds, or low is 0
    high = 1
    while high <= most and fits(high):
        low = high
        high = 2 * high
    while high - low > 1 and low < most:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


def reach(config, method, most=LONGEST):
    """The longest prompt, in tokens, whose last token is within(L); at most `most`, where the search ends.

    Examples: rope L, self-extend (L - window) group + window, leaky-rerope window + k (L - window), pi factor * L.
    """
    def fits(n):
        plan = last_query_plan(config, method, n, n)
        return within(plan, config.train_len, config.rope_theta)
    return longest(fits, most)


def advice(name, freq, n, fits):
    """What would make a prompt of n tokens fit, "--set group=12", by trying values of the parameter that GROWS names.

    freq: the frequency rule of a method that has none of its own. fits({"group": 12}) says whether that would do.
    """
    parameter = GROWS.get(name) or GROWS.get(METHODS[name][1] or freq)
    no_way = "choose a method that reaches further"
    if parameter is None:
        return no_way

    def too_small(value):
        return not fits({parameter: value})

    value = 1 + longest(too_small, 4 * n)
    if value > 4 * n:
        return no_way
    return f"--set {parameter}={value} would do"


def warnings(config, method, n, new=0):
    """Sentences on what the model was not trained for, and on a prompt of n tokens, or the `new` tokens decoded after
    it, beyond the reach of a method."""
    total = n + new

    def fits(settings):
        plan = last_query_plan(config, Method.of(method, **settings), n, total)
        return within(plan, config.train_len, config.rope_theta)

    if not config.is_governed:
        nothing = f"no layer of this model sees all keys by their positions, so {method} changes nothing"
        return [nothing] if method.name else []
    sentences = untrained(config, method)
    if not fits({}):
        name = method.name or config.freq
        far = largest_distance(last_query_plan(config, method, n, total))
        way_out = advice(name, method.freq or config.freq, total, fits)
        sentences.append(f"{name} puts tokens {far:.6g} apart by token {total}, beyond the training length "
                         f"{config.train_len}: {way_out}")
    return sentences


def say_warnings(config, methods, lengths, new=0):
    """The warnings about prompts of these lengths, a line each on stderr."""
    for n in lengths:
        for method in methods:
            for warning in warnings(config, method, n, new):
                say(f"warning: {warning}")


def untrained(config, method):
    """Sentences on positions, or a kind of attention, that a model would have to be trained with."""
    sentences = []
    rule = config.freq
    if method.name in FREQUENCIES:
        rule = method.name
    rule = method.freq or rule
    if rule != config.freq and rule in UNROTATED:
        sentences.append(f"this model was trained with {config.freq}, not {rule}: expect nonsense")
    wants_cosine = method.name == "cosscale" or method.params.get("cosine")
    if wants_cosine and not config.cosine_attention:
        sentences.append("this model was not trained with cosine attention: expect nonsense")
    return sentences


# ---------------------------------------------------------------------------------------------------------------------
# what a method does with a prompt

def method_note(config, method):
    """The name of a method, and what becomes of the frequencies that config.json asks for."""
    note = method.name or f"{config.freq} (config.json)"
    if method.name and config.freq != "rope":
        _, own_freq, _ = METHODS[method.name]
        kept = (method.freq or own_freq) in (None, config.freq)
        note += f" ({config.freq} of config.json {'kept' if kept else 'dropped'})"
    if method.freq:
        note += f" freq={method.freq}"
    return note


def explain(config, method, n):
    """What a method does with a prompt of n tokens, as text: pairs, reach, a small picture."""
    L = config.train_len
    plan = method.plan(config, n)
    asked = str(method) if method.name else f"{config.freq}{method}"
    lines = [f"{asked}: prompt of {n} tokens, training length {L} ({n / L:.3g} times)", *describe(plan, n)]
    lines += layer_lines(config)
    if plan.q_scale is not None:
        lines.append(f"attention scale: {float(plan.q_scale.min()):.3f} to {float(plan.q_scale.max()):.3f}")
    if plan.mscale != 1:
        lines.append(f"logits times {plan.mscale ** 2:.3f}")
    lines.append(reach_text(config, method))
    which = f"{SAMPLES} of the {n} tokens, evenly spread" if n > SAMPLES else "all tokens"
    lines.append(f"{which}: how far from each are those before it")
    lines.append(small_picture(config, method, n))
    return "\n".join(lines)


def layer_lines(config):
    """A line that counts the layers by what they attend by, where it is not one for all."""
    if not config.layer_methods:
        return []
    counts = {own: config.layer_methods.count(own) for own in config.layer_methods}
    parts = [f"{count} by {own or 'the method'}" for own, count in counts.items()]
    return [f"layers: {', '.join(parts)}"]


def reach_text(config, method):
    settings = "these parameters" if method.params else "parameters that follow its length"
    tokens = reach(config, method)
    limit = f"{tokens} tokens" if tokens < LONGEST else "no limit below 2^20 tokens"
    return f"reach of a prompt with {settings}: {limit}"


def small_picture(config, method, n):
    """The distances between up to SAMPLES tokens, evenly spread over a prompt of n, as text."""
    samples = torch.linspace(0, n - 1, min(n, SAMPLES)).round().long()
    plan = method.plan(config, n, samples, torch.arange(n))
    return picture(plan.of_keys(samples))


# ---------------------------------------------------------------------------------------------------------------------
# accuracy in the terminal

def heatmap(rows, method, lengths, cells, in_colour):
    """A method's accuracy in the terminal: a line per depth, a column per length, red to green where in colour."""
    lines = [f"{method}: accuracy by depth (down) and length"]
    for cell in range(cells):
        line = f"{cell / cells:4.0%}-{(cell + 1) / cells:4.0%} "
        for n in lengths:
            share = accuracy(select(rows, method=method, length=n, cell=cell))
            line += coloured(share) if in_colour else f" {share:.2f} "
        lines.append(line)
    lines.append(" " * 10 + "".join(f"{n:>6}" for n in lengths))
    return "\n".join(lines)


def coloured(share):
    """A share as text for a terminal, white on red (0) to green (1)."""
    red = int(220 - 180 * share)
    green = int(60 + 120 * share)
    return f"\033[48;2;{red};{green};70m\033[97m {share:.2f} \033[0m"


# ---------------------------------------------------------------------------------------------------------------------
# plots: everything that needs matplotlib

def figure_class():
    """matplotlib's Figure; ValueError with one clear sentence where it is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("a picture needs matplotlib (pip install matplotlib)") from None
    return Figure


def new_figure(width, height):
    """An empty figure of so many inches."""
    Figure = figure_class()
    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def save(figure, path):
    """Write a figure to a file, in the format of its ending."""
    try:
        figure.savefig(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"cannot write {path}: {error}") from None


def plot_methods(plans, path, note, L):
    """The distance matrices of {name: plan}, for a training length L; note is the title."""
    columns = math.ceil(math.sqrt(len(plans)))
    rows = math.ceil(len(plans) / columns)
    figure = new_figure(2.4 * columns + 1.2, 2.5 * rows + 0.6)
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (name, plan) in zip(grid, plans.items()):
        draw_matrix(axes, plan, name, L)
    for axes in grid[len(plans):]:
        axes.axis("off")
    figure.colorbar(grid[0].images[0], ax=list(grid), shrink=0.6, extend="max",
                    label="distance as the slowest channel pair turns; red: never seen in training")
    figure.suptitle(note, fontsize=9)
    save(figure, path)


def draw_matrix(axes, plan, title, L):
    """A distance matrix on matplotlib axes: colour is distance, red from L on, white unseen; lines border regions."""
    from matplotlib import colormaps
    colours = colormaps["viridis_r"].with_extremes(over="red")
    apart = distance(plan) * (slowdown(plan) or 1.0)
    axes.imshow(apart.numpy(), cmap=colours, vmin=0, vmax=L - 1e-3, interpolation="nearest")
    j = torch.arange(apart.shape[1])
    for r in plan.regions:
        inside = (j >= r.start[:, None]) & (j < r.end[:, None])
        axes.contour(inside.float().numpy(), levels=[0.5], colors="black", linewidths=0.5)
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=9)


def plot_passkey(rows, methods, lengths, cells, L, path, highlight=None):
    """A heatmap per method, its depth divided into `cells`, and below them accuracy by length; dashed at the window.

    rows: those of eval_passkey.py's results file; highlight: see highlighted.
    """
    columns = min(len(methods), 4)
    heatmap_rows = math.ceil(len(methods) / columns)
    figure = new_figure(3.2 * columns, 2.4 * heatmap_rows + 4)
    grid = figure.add_gridspec(heatmap_rows + 2, columns)
    window_edge = sum(n <= L for n in lengths) - 0.5
    for number, method in enumerate(methods):
        axes = figure.add_subplot(grid[number // columns, number % columns])
        draw_heatmap(axes, select(rows, method=method), lengths, cells)
        axes.axvline(window_edge, color="black", linestyle="--", linewidth=1)
        axes.set_title(method)
    axes = figure.add_subplot(grid[-2:, :])
    axes.axvline(L, color="black", linestyle="--", linewidth=1)
    length_axis(axes, lengths)
    axes.set(xlabel="prompt length in tokens", ylabel="accuracy", ylim=(-0.03, 1.03))
    curves = {}
    for method in methods:
        curves[method] = lengths, [accuracy(select(rows, method=method, length=n)) for n in lengths]
    draw_curves(axes, curves, highlighted(curves, highlight))
    save(figure, path)


def draw_heatmap(axes, rows, lengths, cells):
    """The accuracy of one method's rows, depth down and length across, red to green."""
    matrix = []
    for cell in range(cells):
        matrix.append([accuracy(select(rows, length=n, cell=cell)) for n in lengths])
    axes.imshow(matrix, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    axes.set(xticks=range(len(lengths)), xticklabels=lengths, ylabel="depth", yticks=[])


def length_axis(axes, lengths):
    """A logarithmic horizontal axis with a mark at each length."""
    axes.set_xscale("log")
    axes.set_xticks(lengths, labels=[str(n) for n in lengths])
    axes.minorticks_off()


def plot_losses(curves, middles, L, path):
    """Loss by position, {method: nats per token in each stretch}, over the middles of the stretches; dashed at L."""
    figure = new_figure(8, 4.5)
    axes = figure.subplots()
    axes.axvline(L, color="black", linestyle="--", linewidth=1)
    axes.set(xlabel="position in tokens", ylabel="nats per token")
    draw_losses(axes, curves, middles)
    save(figure, path)


def draw_losses(axes, curves, middles):
    """Losses {method: nats per token in each stretch} over the middles of the stretches."""
    curves = {method: (middles, losses) for method, losses in curves.items()}
    values = [loss for _, losses in curves.values() for loss in losses if math.isfinite(loss)]
    if values:
        margin = 0.05 * (max(values) - min(values)) + 1e-3
        axes.set_ylim(min(values) - margin, max(values) + margin)
    draw_curves(axes, curves, highlighted(curves, best=min))


def plot_lampe_fit(losses, best, curve, path):
    """LaMPE fitted: left the loss over mapping lengths, {n: {m: nats per token}}, the best marked; right the best ones
    by input length, and the fit, a list of (n, m)."""
    figure = new_figure(11, 4.5)
    grid_axes, fit_axes = figure.subplots(1, 2)
    for (n, by_mapping), m in zip(losses.items(), best):
        [line] = grid_axes.plot(list(by_mapping), list(by_mapping.values()), marker=".", label=f"{n} tokens")
        grid_axes.plot(m, by_mapping[m], "o", color=line.get_color(), markersize=9)
    grid_axes.set(xlabel="mapping length", ylabel="nats per token")
    grid_axes.legend(fontsize=7)
    fit_axes.plot(list(losses), best, "o", label="lowest loss")
    fit_axes.plot(*zip(*curve), label="scaled sigmoid")
    length_axis(fit_axes, list(losses))
    fit_axes.set(xlabel="input length in tokens", ylabel="mapping length", ylim=(0, None))
    fit_axes.legend(fontsize=7)
    save(figure, path)


def plot_probe(values, limits, layers, dims, positions, L, path):
    """Hidden values by position, a panel for each layer (down) and dimension (across), a line for each method; the
    threshold and the window are dashed. values: {method: (layers, W, dims)}; limits: {(layer, dim): Threshold}."""
    figure = new_figure(4.5 * len(dims) + 1, 2.8 * len(layers) + 0.5)
    grid = figure.subplots(len(layers), len(dims), squeeze=False)
    for row, layer in enumerate(layers):
        for column, dim in enumerate(dims):
            axes = grid[row, column]
            for method, series in values.items():
                axes.plot(positions, series[row, :, column], linewidth=1, label=method)
            if limits[layer, dim]:
                axes.axhline(limits[layer, dim].value, color="red", linestyle="--", linewidth=1)
            axes.axvline(L, color="black", linestyle="--", linewidth=1)
            axes.set_title(f"after layer {layer}, dimension {dim}", fontsize=9)
    for axes in grid[-1]:
        axes.set(xlabel="position in tokens")
    grid[0, 0].legend(fontsize=7)
    save(figure, path)


def plot_training(curve, title, path):
    """The curve of a fine-tuning by step: [{step, loss, validation, old_window}], loss None before the first step."""
    figure = new_figure(8, 4.5)
    axes = figure.subplots()
    for name in ("loss", "validation", "old_window"):
        points = [(entry["step"], entry[name]) for entry in curve if entry[name] is not None]
        axes.plot(*zip(*points), marker=".", label=name.replace("_", " "))
    axes.set(xlabel="step", ylabel="nats per token", title=title)
    axes.legend(fontsize=7)
    save(figure, path)


def plot_ruler(scores, averages, tasks, lengths, L, path, highlight=None):
    """A heatmap per method, tasks down and lengths across, below them the mean of the tasks by length; dashed at the
    window. scores: {(method, task, length): percent}; averages: {method: percent by length}; highlight: see
    highlighted."""
    columns = min(len(averages), 4)
    heatmap_rows = math.ceil(len(averages) / columns)
    figure = new_figure(3.4 * columns + 1.2, (0.2 * len(tasks) + 1.2) * heatmap_rows + 4)
    grid = figure.add_gridspec(heatmap_rows + 2, columns)
    window_edge = sum(n <= L for n in lengths) - 0.5
    for number, method in enumerate(averages):
        axes = figure.add_subplot(grid[number // columns, number % columns])
        matrix = [[scores[method, task, length] for length in lengths] for task in tasks]
        axes.imshow(matrix, cmap="RdYlGn", vmin=0, vmax=100, aspect="auto")
        axes.axvline(window_edge, color="black", linestyle="--", linewidth=1)
        axes.set(xticks=range(len(lengths)), xticklabels=lengths, yticks=range(len(tasks)))
        axes.set_yticklabels(tasks if number % columns == 0 else [], fontsize=7)
        axes.set_title(method, fontsize=9)
    axes = figure.add_subplot(grid[-2:, :])
    axes.axvline(L, color="black", linestyle="--", linewidth=1)
    length_axis(axes, lengths)
    axes.set(xlabel="tokens of prompt and answer", ylabel="mean score in percent", ylim=(-3, 103))
    curves = {method: (lengths, curve) for method, curve in averages.items()}
    draw_curves(axes, curves, highlighted(curves, highlight))
    save(figure, path)


def plot_key_tokens(curves, key_curves, keys, middles, L, path):
    """Loss by position of all tokens, below it of the key tokens, {method: nats per token in each stretch}, over the
    middles of the stretches; a tick for each of the positions keys; dashed at L."""
    figure = new_figure(8, 7)
    rows = figure.subplots(2, 1, sharex=True)
    for axes, lines, label in zip(rows, (curves, key_curves), ("all tokens", "key tokens")):
        axes.axvline(L, color="black", linestyle="--", linewidth=1)
        axes.set(ylabel=f"nats per token, {label}")
        draw_losses(axes, lines, middles)
    rows[1].plot(keys, [0] * len(keys), "|", color="black", markersize=12)
    rows[1].set_ylim(bottom=min(0, rows[1].get_ylim()[0]))
    rows[1].set(xlabel="position in tokens; a tick for each key token")
    save(figure, path)


def plot_bench(rows, path):
    """Time and memory by length, a line per method; rows: dicts of bench.py's section attention, one of each method and
    length."""
    methods = dict.fromkeys(row["method"] for row in rows)
    lengths = sorted({row["tokens"] for row in rows})
    figure = new_figure(13, 4.5)
    time_axes, memory_axes = figure.subplots(1, 2)
    draw_bench(time_axes, rows, methods, lengths, "us/token", "\u00b5s/token")
    draw_bench(memory_axes, rows, methods, lengths, "peak MiB", "peak MiB")
    save(figure, path)


def draw_bench(axes, rows, methods, lengths, field, label):
    """One field of the rows by length, on logarithmic axes."""
    curves = {}
    for method in methods:
        values = {row["tokens"]: row[field] for row in select(rows, method=method)}
        measured = sorted(values)
        curves[method] = measured, [values[n] for n in measured]
    numbers = [value for _, ys in curves.values() for value in ys]
    axes.set(yscale="log", xlabel="tokens", ylabel=label, ylim=(min(numbers) / 1.2, max(numbers) * 1.2))
    length_axis(axes, lengths)
    draw_curves(axes, curves, highlighted(curves, best=min, names=("pytorch causal", *HIGHLIGHTED)))


# ---------------------------------------------------------------------------------------------------------------------
# the command line

def example(method, n, L):
    """The plan of a small example of n tokens: with narrow stairs, and factors for longrope, unless the method has its
    own."""
    geometry, own_freq, _ = pick(METHODS, "method", method.name)
    params = {}
    if "width" in parameters(geometry):
        params["width"] = max(2, math.ceil(2 * n / L))
    if (method.freq or own_freq) == "longrope":
        params["short_factor"] = [1.0] * 32
        params["long_factor"] = [n / L] * 32
    method = replace(method, params={**params, **method.params})
    i = torch.arange(n)
    return make_plan(method, i, i, n=n, L=L, D=64, H=8)


def check_file(path, force, usage):
    """ValueError for a file that has no ending, or is there already; usage is how to name one."""
    if not Path(path).suffix:
        raise ValueError(f"{path}: the name of a file needs an ending, as in: show.py {usage}")
    if Path(path).exists() and not force:
        raise ValueError(f"{path} is there already; --force overwrites it")


def parse_args(argv):
    parser, flag = plain_parser(__doc__)
    parser.usage = "%(prog)s METHOD [flags]; --help lists them"
    parser.add_argument("method", nargs="?", default="all", help="name[:parameter=value...], or several with commas; "
                        "without: all, for --plot alone, or with --trace what config.json says")
    flag("length", type=int, help="prompt length n; default: 32, or 128 for a picture file")
    flag("train-len", type=int, help="training length L; default: half of --length, or with --trace the model's")
    flag("set", action="append", default=[], metavar="name=value", help="parameters of the method, a=1,b=2; repeatable")
    flag("plot", metavar="FILE", help="draw a picture (needs matplotlib)")
    flag("page", metavar="FILE", help="make a page (HTML) on which every method can be played with")
    flag("force", action="store_true", help="overwrite the file of --plot or --page")
    flag("trace", nargs="?", const="", metavar="TEXT", help="run a model on this text: what its last token attends to; "
         "without a text a passkey prompt of --length tokens, by default 4 windows")
    flag("prompt-file", metavar="PATH", help="the same for the text of a UTF-8 file, - for stdin")
    flag("needle", metavar="TEXT", help="with --trace: words of the prompt to mark")
    flag("ckpt", default="tiny", help="with --trace: a folder, or a name in this one or in checkpoints/")
    flag("dtype", choices=["auto", *DTYPES], default="auto", help="with --trace")
    flag("device", choices=["auto", "cuda", "mps", "cpu"], default="auto", help="with --trace")
    flag("quantize", choices=BITS, help="with --trace: weights of 8 or 4 bits")
    parser.set_defaults(cache_dtype=None)
    args = parser.parse_args(argv)
    if args.trace is not None or args.prompt_file is not None:
        return args
    if args.length is None:
        args.length = 128 if args.plot else 32
    if args.train_len is None:
        args.train_len = max(args.length // 2, 2)
    return args


def traced_case(args, tokenizer, L):
    """The Case of --trace or --prompt-file, and what to call it."""
    if args.trace and args.prompt_file is not None:
        raise ValueError("give --trace with a text or --prompt-file, not both")
    if args.prompt_file is not None or args.trace:
        if args.length is not None:
            raise ValueError("--length is for the passkey prompt of --trace without a text")
        text = args.trace or read_text(args.prompt_file)
        case = text_case(tokenizer, text, args.needle)
        return case, f"a prompt of {case.n} tokens"
    if args.needle is not None:
        raise ValueError("--needle is for a text; the passkey prompt has one")
    case = passkey_case(tokenizer, whole("length", 4 * L if args.length is None else args.length))
    return case, f"a passkey prompt of {case.n} tokens"


def run_trace(args):
    """The command with --trace: what a model's last token attends to, as text or as a picture; the exit code."""
    path, config, tokenizer = open_checkpoint(args)
    if hf.takes(path):
        raise ValueError(f"{path}: --trace is for families of model.py; this one runs through transformers")
    L = config.train_len
    names = [None] if args.method == "all" else method_list(args.method)
    methods = [Method.of(name, **parse_settings(args.set)) for name in names]
    for method in methods:
        method.plan(config, n=1)  # a wrong name or setting shows here, before anything long
    if args.plot:
        figure_class()
        check_file(args.plot, args.force, "mesa --trace --plot trace.png")
    case, what = traced_case(args, tokenizer, L)
    say_warnings(config, methods, [case.n], len(case.ids) - case.n)
    device, dtype = place(args, config)
    model = load_model(path, config, dtype, device, quantize=args.quantize)
    traces = {str(method) or config.freq: trace(model, case, method) for method in methods}
    note = f"{what}, {case.n / L:.3g} times the window of {L}: where its last token looks"
    if len(case.ids) > case.n:
        note = f"{what}, {case.n / L:.3g} times the window of {L}: where the answer's first token looks"
    if args.plot:
        layers = config.num_hidden_layers
        figure = new_figure(12, (0.5 + 0.16 * max(layers, 4)) * len(traces) + 1)
        draw_traces(figure, traces, tokenizer, note)
        save(figure, args.plot)
        return 0
    for name, traced in traces.items():
        print(f"{name}: {note}", trace_text(traced, tokenizer), sep="\n")
    return 0


def run(argv=None):
    """The command: its exit code."""
    args = parse_args(argv)
    if args.trace is not None or args.prompt_file is not None:
        return run_trace(args)
    if args.page:
        check_file(args.page, args.force, "--page methods.html")
        write_page(args.page, slowdown=slowdown, reach=reach, sentence=first_sentence)
        return 0
    n = whole("length", args.length)
    L = whole("train_len", args.train_len, least=2)
    if args.plot:
        check_file(args.plot, args.force, "all --plot methods.png")
    elif args.method == "all":
        raise ValueError("name a method, or give --plot FILE for a picture of all")
    elif n > PRINTABLE:
        raise ValueError(f"a matrix of {n} tokens is too large to print; --length goes to {PRINTABLE}")

    names = METHODS if args.method == "all" else method_list(args.method)
    methods = [Method.of(name, **parse_settings(args.set)) for name in names]
    plans = {str(method): example(method, n, L) for method in methods}
    note = f"prompt of {n} tokens, training length {L}"
    if args.plot:
        plot_methods(plans, args.plot, note, L)
        return 0
    for name, plan in plans.items():
        print(f"{name}: {note}", picture(plan), *describe(plan, n), sep="\n")
    return 0


if __name__ == "__main__":
    run_command(run, "show.py")
