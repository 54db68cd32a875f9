"""What plots are made of, on matplotlib's axes: curves that are named where they end, and strips of attention.

Does: choose which of many methods get a colour, keep their names apart, draw. Does not: open figures or measure
(show.py and mechanisms.py have the plots).

    draw_curves(axes, curves, highlighted(curves))      # curves {method: (xs, ys)}
"""
import math
import textwrap

from tracing import binned, next_text

HIGHLIGHTED = "rope", "yarn", "rerope", "dca", "streaming-llm", "mesa"  # in colour where not all methods can be
COLOURS = "#000000", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"  # Okabe and Ito: for all eyes
STRIP_COLOURS = "#ece7f5", "#9a86c9", "#4b2e83", "#150a2e"  # of attention, from none to all
NEEDLE_COLOUR = "#d55e00"


# ---------------------------------------------------------------------------------------------------------------------
# curves

def highlighted(curves, asked=None, best=max, names=HIGHLIGHTED):
    """The methods of the curves {method: (xs, ys)} that get a colour: those asked for; or all, if there are colours
    enough; or those of these names, and the one whose mean is best, max or min."""
    if asked:
        return asked
    if len(curves) <= len(COLOURS):
        return list(curves)
    chosen = [method for method in curves if method.split(":")[0] in names][:len(COLOURS) - 1]
    means = {method: sum(ys) / len(ys) for method, (_, ys) in curves.items() if all(map(math.isfinite, ys))}
    if means:
        winner = best(means, key=means.get)
        chosen += [winner] * (winner not in chosen)
    return chosen


def check_highlight(asked, methods):
    """ValueError unless there is a colour and a curve for every method to highlight; methods: all that are drawn."""
    names = [str(method) for method in methods]
    for method in asked or []:
        if method not in names:
            raise ValueError(f"--highlight {method}: not among the methods {', '.join(names)}")
    if len(asked or []) > len(COLOURS):
        raise ValueError(f"--highlight takes up to {len(COLOURS)} methods, not {len(asked)}")


def draw_curves(axes, curves, chosen):
    """The curves {method: (xs, ys)} of the chosen methods in colours, named where they end; the rest in grey, named
    under the axis. Scales and limits of the axes have to be set before."""
    for method, (xs, ys) in curves.items():
        if method not in chosen:
            axes.plot(xs, ys, color="0.78", linewidth=1, marker=".", label=method)
    for rank, (method, colour, marker) in enumerate(zip(chosen, COLOURS, "osD^vPX")):
        width = 1.4 + 2.5 * (len(chosen) - 1 - rank) / len(COLOURS)  # of curves that coincide, all are seen
        axes.plot(*curves[method], color=colour, marker=marker, markersize=4 + width, linewidth=width, label=method,
                  zorder=3)
    grey = [method for method in curves if method not in chosen]
    if grey:
        names = textwrap.fill(f"in grey: {', '.join(grey)}", 120)
        axes.set_xlabel(f"{axes.get_xlabel()}\n{names}", fontsize=8)
    ends = {}
    for method, colour in zip(chosen, COLOURS):
        known = [point for point in zip(*curves[method]) if math.isfinite(point[1])]
        if known:
            ends[method, colour] = known[-1]
    for (method, colour), height in zip(ends, label_heights(axes, ends.values())):
        axes.annotate(method, ends[method, colour], xytext=(1.03, height), textcoords="axes fraction", color=colour,
                      fontsize=8, va="center", annotation_clip=False,
                      arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "relpos": (0, 0.5)})


def label_heights(axes, ends, gap=0.055):
    """Where labels stand beside the ends (x, y) of lines, as shares of the height of the axes: in the same order, and
    at least a gap apart, pushed down from the top."""
    to_share = axes.transData + axes.transAxes.inverted()
    wanted = [float(to_share.transform(end)[1]) for end in ends]
    heights = [0.0] * len(wanted)
    room = 1.0
    for rank, place in enumerate(sorted(range(len(wanted)), key=lambda place: -wanted[place])):
        lowest = gap * (len(wanted) - 1 - rank)  # so that the labels below it have room
        heights[place] = max(min(wanted[place], room), lowest)
        room = heights[place] - gap
    return heights


# ---------------------------------------------------------------------------------------------------------------------
# strips of attention

def draw_traces(figure, traces, tokenizer, note):
    """Strips of {name: Trace} in an empty figure: the best head of every layer, beside it the mean of the heads; two
    lines stand around the needle, white is not seen, darkness grows as the root of the share. note: the title."""
    grid = figure.subplots(len(traces), 2, squeeze=False, sharex=True)
    for row, (name, traced) in zip(grid, traces.items()):
        draw_strips(row[0], traced.best(), traced)
        draw_strips(row[1], traced.mean(), traced)
        row[0].set_title(f"{name}: {next_text(traced, tokenizer)}", fontsize=9, loc="left")
        row[0].set_ylabel("layer, best head", fontsize=8)
        row[1].set_ylabel("mean of heads", fontsize=8)
        if traced.case.span:
            row[0].text(traced.case.span[1] + 0.01 * traced.case.n, 1.2, "needle", color=NEEDLE_COLOUR, fontsize=8)
    for axes in grid[-1]:
        axes.set_xlabel("token of the prompt")
    bar = figure.colorbar(grid[0, 0].images[0], ax=list(grid.flatten()), shrink=0.8, ticks=[0, 0.05, 0.25, 0.5, 1])
    bar.set_label("share of attention")
    figure.suptitle(note, fontsize=10)


def draw_strips(axes, weights, traced, bins=256):
    """Weights (layers, T) as a strip for each layer, summed over up to so many stretches of the prompt."""
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm
    layers, T = weights.shape
    bins = min(bins, T)
    shares = binned(weights, bins)
    shares[:, binned(traced.visible, bins) == 0] = math.nan
    colours = LinearSegmentedColormap.from_list("attention", STRIP_COLOURS).with_extremes(bad="white")
    axes.imshow(shares.numpy(), cmap=colours, norm=PowerNorm(0.5, 0, 1), aspect="auto", interpolation="nearest",
                extent=(0, T, layers + 0.5, 0.5))
    axes.tick_params(labelsize=8)
    if layers <= 12:
        axes.set_yticks(range(1, layers + 1))
    for edge in needle_edges(traced.case.span):
        axes.axvline(edge, color=NEEDLE_COLOUR, linewidth=1)


def needle_edges(span):
    """Where the needle begins and ends; nothing where there is none."""
    return () if span is None else (span[0], span[1] + 1)
