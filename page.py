"""A page to play with the methods: one HTML file that draws plans made beforehand, over a grid of lengths and settings.

Does: choose the grid, make every plan of it, pack their vectors into JSON; trace the shipped model on a passkey with a
few methods. Does not: draw matrices (page_template.html, in plain JavaScript), or measure how far a method reaches
(show.py, which hands that over).

    python show.py --page methods.html

The window is tiny, so that single tokens are seen. A plan covers the longest prompt and what is decoded after it: row i
of a shorter prompt is the same row, and most methods have one plan for all lengths. Everything that plans share is
written once and then named by its number.
"""
import base64
import json
import math
import struct
import zlib
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import torch

from config import Config
from frequencies import FREQUENCIES, SCALES, rope
from geometry import METHODS
from model import load
from positions import Method, parameters
from tracing import answer_rank, binned, passkey_case, trace

L = 32                                   # training length
LENGTHS = range(L // 2, 8 * L + 1, L // 2)
NEW = L // 2                             # tokens decoded after the prompt
FARTHEST = 64 * L                        # where the search for a method's reach ends
MOST = 128                               # combinations of settings of one method
LONGEST_BLOCK = 32                       # steps that repeat, see pack
TRACED = "rope", "rerope", "streaming-llm", "mesa"  # methods with which the shipped model is traced,
WINDOWS = 1, 2, 4, 8                     # on passkey prompts of so many windows
BINS = 128                               # stretches into which their tokens are summed
DARK = (236, 231, 245), (154, 134, 201), (75, 46, 131), (21, 10, 46)  # colours of attention, from none to all
TEMPLATE = Path(__file__).parent / "page_template.html"

# the slowest of 32 pairs turns 14 degrees in a window, as in LLaMA with its 2,048 tokens
CONFIG = Config(vocab_size=16, hidden_size=512, intermediate_size=512, num_hidden_layers=1, num_attention_heads=8,
                num_key_value_heads=8, head_dim=64, rope_theta=160.0, train_len=L)

VALUES = {  # where a parameter's slider stops, beside its default
    "window": (4, 8, 16, 24), "group": (2, 4, 8, 16), "k": (2, 4, 8, 16), "factor": (1, 2, 4, 8),
    "beta_fast": (4, 8), "beta_slow": (0.5, 2), "chunk": (8, 16, 24), "top": (15, 23, 47), "shift": (4, 8, 16),
    "sinks": (1, 4, 8), "recent": (8, 16, 48), "local": (8, 16, 24), "cap": (15, 47), "mapping": (8, 16, 24, 48),
    "head": (8,), "tail": (8,), "linear": (4, 16), "width": (2, 4, 8, 16), "first": (8,), "overlap": (4, 8),
    "on": ("pi", "yarn"), "rope_theta": (1e3, 1e4), "s": (0.2, 0.4),
}
START = {"width": 16}                    # where it stands at first, if not at its default
NO_SLIDER = ("mesa:linear", "lampe:logit_factor", "last", "reserve", "margin", "remainder", "power", "fit", "sigmoid",
             "mscale", "mscale_all_dim", "attention_factor", "truncate", "original_max_position_embeddings",
             "short_factor", "long_factor")
NEEDED = {                               # parameters without a default that would do
    "short_factor": [1.0] * 32,
    "long_factor": [8 ** (pair / 31) for pair in range(32)],
}


@dataclass
class Tables:
    """What plans share, {thing: its number}: vectors, speeds of channel pairs, and the plans that name them."""
    vectors: dict = field(default_factory=dict)
    speeds: dict = field(default_factory=dict)
    plans: dict = field(default_factory=dict)


def numbered(table, thing):
    """The number of a thing in a table, which takes it up if it is new."""
    return table.setdefault(thing, len(table))


def write_page(path, *, slowdown, reach, sentence):
    """Write the page. slowdown, reach and sentence are functions of show.py: of a plan and a base, of a Config, a
    Method and the end of the search, and of a geometry, a frequency rule and an attention scale."""
    text = json.dumps(page_data(slowdown, reach, sentence), separators=(",", ":"))
    html = TEMPLATE.read_text(encoding="utf-8").replace("{{DATA}}", text.replace("</", "<\\/"))
    try:
        Path(path).write_text(html, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error}") from None


def page_data(slowdown, reach, sentence):
    """All that the page knows, as a value for JSON.

    vectors: texts, see pack. speeds: of the slowest pair that turns, of the same pair in training, of the fastest
    (radians per token), slowdown, mscale. plans: a list of regions [q_pos, k_pos, start, end], the attention scale in
    thousandths, the speeds, all by number; or the sentence that refuses it. A method's plans: for every combination of
    its sliders, the last one running fastest, one number, or one for each length. traces: of some methods, one for each
    of WINDOWS, see trace_data.
    """
    tables = Tables()
    methods = {name: method_data(name, tables, slowdown, reach, sentence) for name in METHODS}
    return {"train_len": L, "lengths": list(LENGTHS), "new": NEW, "farthest": FARTHEST, "methods": methods,
            "vectors": [pack(vector) for vector in tables.vectors], "speeds": list(tables.speeds),
            "plans": list(tables.plans), "traces": traces_data()}


def method_data(name, tables, slowdown, reach, sentence):
    """A method's sentence and sliders, and for each combination of their values its plans and its reach."""
    geometry, rule, scale = METHODS[name]
    functions = geometry, FREQUENCIES.get(rule), SCALES.get(scale)
    stops = sliders(name, parameters(*functions))
    plans = []
    reaches = []
    for values in product(*stops.values()):
        method = method_of(name, dict(zip(stops, values)))
        numbers = [numbered(tables.plans, plan_data(method, n, tables, slowdown)) for n in LENGTHS]
        plans.append(numbers[0] if len(set(numbers)) == 1 else numbers)
        reaches.append(reach_or_none(method, reach))
    shown = [{"name": slider, "values": list(values), "start": start(slider, values, parameters(*functions))}
             for slider, values in stops.items()]
    return {"about": sentence(*functions).replace("`", ""), "sliders": shown, "plans": plans, "reach": reaches}


def method_of(name, settings):
    """The Method of a combination of settings, None being the default."""
    geometry, rule, _ = METHODS[name]
    known = parameters(geometry, FREQUENCIES.get(rule))
    needed = {setting: value for setting, value in NEEDED.items() if setting in known}
    asked = {setting: value for setting, value in settings.items() if value is not None}
    return Method.of(name, **needed, **asked)


def sliders(name, defaults):
    """{parameter: the values of its slider}, for at most MOST combinations: the last parameters go without."""
    stops = {}
    for parameter, default in defaults.items():
        values = slider_values(parameter, default)
        if has_slider(name, parameter, values, default):
            stops[parameter] = values
    while math.prod(len(values) for values in stops.values()) > MOST:
        stops.popitem()
    return stops


def slider_values(parameter, default):
    """The values at which a slider stops: those of VALUES, or a few around its default, and the default."""
    if isinstance(default, bool):
        return False, True
    if default is None:
        return None, *VALUES.get(parameter, (4, 8, 16))
    around = default,
    if isinstance(default, int):
        around = max(default // 2, 1), 2 * default
    elif isinstance(default, float):
        around = default / 2, 2 * default
    return tuple(sorted({default, *VALUES.get(parameter, around)}))


def start(parameter, values, defaults):
    """The place among its values at which a slider stands at first."""
    return values.index(START.get(parameter, defaults[parameter]))


def has_slider(name, parameter, values, default):
    """Whether a parameter is one to play with, and the method takes a value of it beside the default."""
    if parameter in NO_SLIDER or f"{name}:{parameter}" in NO_SLIDER:
        return False
    return any(takes(name, parameter, value) for value in values if value != default)


def takes(name, parameter, value):
    """Whether a method takes this value at the longest length, all else being default."""
    try:
        method_of(name, {parameter: value}).plan(CONFIG, LENGTHS[-1])
    except ValueError:
        return False
    return True


def reach_or_none(method, reach):
    """The reach of a method up to FARTHEST tokens, None where it refuses a length."""
    try:
        return reach(CONFIG, method, FARTHEST)
    except ValueError:
        return None


def plan_data(method, n, tables, slowdown):
    """A plan for a prompt of n tokens as a tuple of numbers of its parts, see page_data; or why there is none."""
    tokens = torch.arange(LENGTHS[-1] + NEW)  # so that lengths share vectors
    now = tokens[:n + NEW]
    try:
        plan = method.plan(CONFIG, n, tokens, tokens)
        turning = method.plan(CONFIG, n, now, now)  # frequencies may follow what has been decoded
    except ValueError as error:
        return str(error)
    regions = tuple(region_data(r, tables) for r in plan.regions)
    scale = None
    if plan.q_scale is not None:
        scale = numbered(tables.vectors, tuple((1000 * plan.q_scale).round().long().tolist()))
    return regions, scale, numbered(tables.speeds, speeds_of(turning, slowdown))


def speeds_of(plan, slowdown):
    """The slowest pair that turns, the same pair in training, the fastest pair; slowdown and mscale. See page_data."""
    slowest = trained = fastest = 0.0
    if plan.inv_freq is not None and bool(plan.inv_freq.any()):
        plain, _ = rope(CONFIG.head_dim, CONFIG.rope_theta, L, L)
        slowest = plan.inv_freq[plan.inv_freq > 0].min()
        trained = plain[plan.inv_freq == slowest].min()
        fastest = plan.inv_freq.max()
    speeds = slowest, trained, fastest, slowdown(plan, CONFIG.rope_theta), plan.mscale
    return tuple(float(f"{float(speed):.5g}") for speed in speeds)


def region_data(r, tables):
    """The numbers of a Region's vectors."""
    vectors = r.q_pos, r.k_pos, r.start, r.end
    return tuple(numbered(tables.vectors, tuple(vector.tolist())) for vector in vectors)


def pack(values):
    """A vector as text: the steps from each value to the next, from 0 on, those that repeat with a count before them.

    0 1 2 3 3 4 4 5 5 -> steps 0 1 1 1 0 1 0 1 0 -> "0 3*1 2*0,1 0". Steps are rounded to nine digits after the point.
    """
    steps = [f"{round(after - before, 9) or 0:.12g}" for before, after in zip((0, *values), values)]
    runs = []
    single = []  # steps that do not repeat
    at = 0
    while at < len(steps):
        count, block = repeated(steps, at)
        if count == 1:
            single.append(steps[at])
            at += 1
            continue
        if single:
            runs.append(",".join(single))
            single = []
        runs.append(f"{count}*{','.join(block)}")
        at += count * len(block)
    if single:
        runs.append(",".join(single))
    return " ".join(runs)


def repeated(steps, at):
    """The block of steps from `at` on whose repetition saves most, and how often it stands there: (count, block)."""
    best = 1, steps[at:at + 1]
    most_saved = 1  # two equal steps are as short without a count
    for size in range(1, LONGEST_BLOCK + 1):
        block = steps[at:at + size]
        count = 1
        while steps[at + count * size:at + (count + 1) * size] == block:
            count += 1
        saved = (count - 1) * size
        if saved > most_saved:
            best = count, block
            most_saved = saved
    return best


# ---------------------------------------------------------------------------------------------------------------------
# what the shipped model looks at

def traces_data():
    """{method: [trace_data for each of WINDOWS]} of the shipped model."""
    model, tokenizer = load("tiny")
    cases = [passkey_case(tokenizer, windows * model.config.train_len) for windows in WINDOWS]
    traces = {}
    for name in TRACED:
        of_name = [trace(model, case, Method(name)) for case in cases]
        traces[name] = [trace_data(traced, windows, tokenizer) for traced, windows in zip(of_name, WINDOWS)]
    return traces


def trace_data(traced, windows, tokenizer):
    """A Trace for the page: pictures of the best head and the mean of the heads of every layer, over the prompt; where
    the needle is, as CSS; what to say of it."""
    n = traced.case.n
    first, last = traced.case.span
    seen = binned(traced.visible[:n], BINS) > 0
    needle = {"left": f"{first / n:.2%}", "width": f"{(last + 1 - first) / n:.2%}"}
    return {"windows": windows, "needle": needle, "text": trace_sentence(traced, windows, tokenizer),
            "best": strips_png(binned(traced.best()[:, :n], BINS), seen),
            "mean": strips_png(binned(traced.mean()[:, :n], BINS), seen)}


def strips_png(shares, seen):
    """Shares of attention (layers, BINS) as a PNG in a data URI, a pixel each: the root of a share is its place in a
    palette of 255 colours along DARK; the last one is white, for stretches of which no key is seen, seen (BINS,)."""
    levels = (shares.clamp(0, 1).sqrt() * 254).round().long()
    levels[:, ~seen] = 255
    ramp = torch.tensor(DARK, dtype=torch.float32).T[None]                              # (1, 3, 4)
    colours = torch.nn.functional.interpolate(ramp, 255, mode="linear", align_corners=True)[0].T.round().long()
    palette = bytes(colours.flatten().tolist()) + b"\xff\xff\xff"
    rows = b"".join(b"\0" + bytes(row) for row in levels.tolist())                      # each without a filter
    size = struct.pack(">IIBBBBB", levels.shape[1], levels.shape[0], 8, 3, 0, 0, 0)     # 8 bits, palette
    chunks = (b"IHDR", size), (b"PLTE", palette), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b"")
    png = b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(name, body) for name, body in chunks)
    return "data:image/png;base64," + base64.b64encode(png).decode()


def png_chunk(name, body):
    """A chunk of a PNG file: its length, name and body, and a checksum."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def trace_sentence(traced, windows, tokenizer):
    """What a Trace of a passkey says: the head that attends most to the needle, and the logit of the right digit."""
    case = traced.case
    first, last = case.span
    on_needle = traced.best()[:, first:last + 1].sum(-1)
    layer = int(on_needle.argmax())
    most = first + int(traced.best()[layer, first:last + 1].argmax())
    look = (f"Head {traced.heads()[layer] + 1} of layer {layer + 1} gives the needle {on_needle[layer]:.0%} of its "
            f"attention, most to a \u201c{tokenizer.decode([case.ids[most]])}\u201d.")
    if not bool(traced.visible[first:last + 1].any()):
        look = "The needle is not seen."
    p = traced.logits.softmax(-1)
    likeliest = int(p.argmax())
    verdict = f"rank {answer_rank(traced)}"
    if likeliest != case.right:
        verdict += f"; the likeliest is {tokenizer.decode([likeliest])} with {p[likeliest]:.2f}"
    return (f"{case.n} tokens, {windows} \u00d7 its window. {look} The right digit, {tokenizer.decode([case.right])}, "
            f"has logit {traced.logits[case.right]:.1f}, probability {p[case.right]:.2f}, {verdict}.")
