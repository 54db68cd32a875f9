"""Positions: what is asked for (Method) becomes all that attention has to know about positions (Plan), as data.

A method answers three independent questions:
    geometry         which keys does query i see, and at what distance?         -> a list of Regions, geometry.py
    frequencies      how fast does each pair of channels turn per token?        -> inv_freq and mscale, frequencies.py
    attention scale  how sharp is the softmax of query i, given what it sees?   -> q_scale, frequencies.py
Here the three are put together. Does not touch queries, keys or scores: attention.py executes a plan.

    plan = make_plan("mesa", i, j, n=9000, L=2048, D=128, H=32)

Letters: i absolute query indices, j absolute key indices, n prompt length, L training length, D width of a head,
H number of query heads, Tq = len(i), Tk = len(j).
"""
import ast
import inspect
import re
from dataclasses import dataclass, field

import torch

from frequencies import (FITTED, FREQUENCIES, SCALES, UNROTATED, alibi_slopes, did_you_mean, followed_length, pick,
                         positive, power_of_two, whole)
from geometry import METHODS, cosscale, leaky_k, self_extend_group
from plan import Plan, among, check_regions, visible_keys


# ---------------------------------------------------------------------------------------------------------------------
# from a row of METHODS to a Plan

def make_plan(method, i, j, *, n, L, D, H, base=1e4, freq=None, attn_scale=None, cosine=None, rotary_dim=None,
              interleaved=False, **params):
    """The Plan of a method for the queries i (Tq,) and the keys j (Tk,), both int64, of a prompt of n tokens.

    j is 0..Tk-1, or without those that a cache has forgotten; i are some of j.

    method: a name in METHODS, a text as Method.parse takes it, or a Method. L training length, D head width, H query
    heads, base of the rotary frequencies. freq, a name in FREQUENCIES, says what a method without frequencies of its
    own uses (default rope); attn_scale, one in SCALES, replaces its row's; any geometry goes with any of both.
    cosine, interleaved: see Plan. rotary_dim: how many of the D channels turn (default all). params are the keyword
    parameters of the three functions.
    Raises ValueError for an unknown method or parameter, a value or combination that makes no sense, and for a
    geometry that breaks the promises of Region.
    """
    asked = Method.of(method, freq, attn_scale, **params)
    geometry, own_freq, own_scale = pick(METHODS, "method", asked.name)
    rule = pick(FREQUENCIES, "frequency rule", asked.freq or own_freq or "rope")
    if asked.freq and own_freq not in (None, "rope", asked.freq):
        raise ValueError(f"{asked.name} and {asked.freq} both set the frequencies: choose one")
    scale = pick(SCALES, "attention scale", asked.attn_scale or own_scale or "none")
    rotary_dim = D if rotary_dim is None else rotary_dim
    check_input(i, j, n=n, L=L, D=D, H=H, base=base, rotary_dim=rotary_dim)
    check_parameters(asked, geometry, rule, scale)

    # 1. geometry: regions
    regions = geometry(i, j, n, L, **asked.params_of(geometry))
    places = i  # of the queries among the keys
    if int(j[-1]) >= len(j):
        regions = among(asked.name, regions, i, j)
        places = torch.searchsorted(j, i)
    check_regions(asked.name, regions, places, len(j))

    # 2. frequencies
    own_L = whole("original_max_position_embeddings", asked.params_of(rule).get("original_max_position_embeddings"), L)
    length = followed_length(asked.freq or own_freq, n, own_L, int(i[-1]))
    inv_freq, mscale = rule(rotary_dim, base, length, L, **asked.params_of(rule))
    plan = Plan(regions, inv_freq, mscale, interleaved=interleaved)
    if rule is FREQUENCIES["alibi"]:
        plan.slopes = alibi_slopes(H)
    cosine = asked.params.get("cosine", cosine)
    if cosine is not None or geometry is cosscale:
        plan.cosine = positive("cosine", cosine, 32.0)

    # 3. attention scale: depends on how many keys a query sees
    if scale:
        plan.q_scale = scale(i, visible_keys(plan), n, L, D, **asked.params_of(scale))
    return plan


@dataclass(frozen=True)
class Method:
    """What is asked for, as one value: a row of METHODS, and what is to be otherwise than there.

    Method.parse("self-extend:group=8:freq=yarn:attn-scale=logn") == Method("self-extend", "yarn", "logn", {"group": 8})
    """
    name: str | None = None        # None: what the model's config.json says
    freq: str | None = None        # a name in FREQUENCIES, for a method without frequencies of its own
    attn_scale: str | None = None  # a name in SCALES, in place of the method's own
    params: dict = field(default_factory=dict)

    @staticmethod
    def parse(text):
        """The Method of a text name:setting=value:..., as every script takes it. ValueError for a broken setting."""
        name, *settings = text.split(":")
        return Method.of(name or None, **parse_settings(settings))

    @staticmethod
    def of(method, /, freq=None, attn_scale=None, **params):
        """The Method of a name, a text, None or a Method, with these settings added."""
        if isinstance(method, str) and ":" in method:
            method = Method.parse(method)
        if not isinstance(method, Method):
            method = Method(method)
        return Method(method.name, freq or method.freq, attn_scale or method.attn_scale, {**method.params, **params})

    def __str__(self):
        settings = {**self.params, "freq": self.freq, "attn-scale": self.attn_scale}
        texts = [f"{name}={setting_text(value)}" for name, value in settings.items() if value is not None]
        return ":".join([self.name or "", *texts])

    def params_of(self, function):
        """Those of the parameters that are this function's."""
        return {name: value for name, value in self.params.items() if name in parameters(function)}

    def plan(self, config, n, i=None, j=None):
        """The Plan for a model of this Config and a prompt of n tokens; queries i and keys j default to all n.

        A method without frequencies of its own keeps those that the model was trained with; one that has them (rope,
        pi, ntk, ...) replaces them. Raises ValueError where a model without rotary positions is asked for rotary ones.
        """
        method = Method(self.name or config.freq, self.freq, self.attn_scale, self.params)
        _, own_freq, _ = pick(METHODS, "method", method.name)
        asked_freq = method.freq or own_freq
        if asked_freq in (None, config.freq):
            method = Method(method.name, config.freq, method.attn_scale, {**config.freq_params, **method.params})
        elif config.freq in UNROTATED and asked_freq not in UNROTATED:
            raise ValueError(f"this model has no rotary positions ({config.freq}), so {asked_freq} sets nothing")
        i = torch.arange(n) if i is None else i
        j = torch.arange(n) if j is None else j
        heads = config.num_attention_heads
        all_heads = getattr(config, "all_heads", None) or heads
        plan = make_plan(method, i, j, n=n, L=config.train_len, D=config.head_dim, H=all_heads,
                         base=config.rope_theta, cosine=config.cosine_attention, rotary_dim=config.rotary_dim,
                         interleaved=config.interleaved)
        if plan.slopes is not None and all_heads > heads:  # this process has some of the heads (shards.py)
            plan.slopes = plan.slopes[config.first_head:config.first_head + heads]
        return plan

    def covering(self, config, n, new):
        """This Method with its automatic parameters fixed as they fit a prompt of n tokens and `new` ones after it: the
        factor of frequencies, Self-Extend's group, Leaky ReRoPE's k. (Mesa and stair count on what is decoded by
        themselves; LaMPE extends its mapping.) What is set already stays.

        Method("pi"), L = 2048, n = 2000, new = 100: pi:factor=2.0, where the prompt alone would need 1.
        """
        name = self.name or config.freq
        _, own_freq, _ = pick(METHODS, "method", name)
        rule = self.freq or own_freq or config.freq
        known = config.freq_params if rule == config.freq else {}
        total, L = max(n, 1) + new, config.train_len
        fitted = {}
        if rule in FITTED and "factor" not in known:
            fitted["factor"] = power_of_two(None, total, L)
        if name == "self-extend":
            fitted["group"] = self_extend_group(total, L, self.params.get("window"))
        if name == "leaky-rerope":
            fitted["k"] = leaky_k(total, L, self.params.get("window"))
        return Method(self.name, self.freq, self.attn_scale, {**fitted, **self.params})

    def later_keys(self, config, n, now):
        """The keys before index `now` that some query from there on sees: disjoint, rising intervals [(start, stop)].

        Only these does a cache have to keep. They are what the geometry says of all later queries of the prompt of n
        tokens, and of queries 1, 2, 4, ... 2^30 tokens on after it. As no bound of a region ever falls, the first query
        that sees something says where a region starts, and the last one where it ends.
        streaming-llm:sinks=2:recent=4, now 9: [(0, 2), (5, 9)].
        """
        geometry, _, _ = pick(METHODS, "method", self.name or config.freq)
        params = self.params_of(geometry)
        kept = []
        for i in later_queries(n, now):
            for r in geometry(i, torch.arange(1), n, config.train_len, **params):
                visible = r.end > r.start
                if bool(visible.any()):
                    kept.append((int(r.start[visible][0]), min(int(r.end[visible][-1]), now)))
            kept = merged(kept)
            if kept == [(0, now)]:
                break
        return kept


def later_queries(n, now, block=2 ** 16):
    """Yield the indices of queries from `now` on, so many at once: some beyond the prompt of n tokens, all in it."""
    yield max(n, now) - 1 + 2 ** torch.arange(31)
    for begin in range(now, n, block):
        yield torch.arange(begin, min(begin + block, n))


def merged(intervals):
    """The union of intervals (start, stop) as disjoint ones, rising; empty ones are left out."""
    found = []
    for start, stop in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        elif start < stop:
            found.append((start, stop))
    return found


def parse_settings(texts):
    """["first=16,last=8", "clamp=false"] -> {"first": 16, "last": 8, "clamp": False}; dashes become underscores.

    Values are whole and other numbers, true, false, lists like [1,2], or else texts.
    """
    settings = {}
    for text in texts:
        for setting in re.split(r",(?![^\[]*\])", text):  # at commas, but not at those inside of a list
            name, equals, value = (part.strip() for part in setting.partition("="))
            if not equals:
                raise ValueError(f"a setting is name=value, not {setting!r}")
            settings[name.replace("-", "_")] = setting_value(value)
    return settings


def setting_value(text):
    """The number, truth value or list that a text stands for, else the text."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def setting_text(value):
    """The text that setting_value reads as this value."""
    return str(value).lower() if isinstance(value, bool) else str(value).replace(" ", "")


def parameters(*functions):
    """The hyper-parameters of these functions and their defaults: their keyword-only arguments."""
    return {p.name: p.default for f in functions if f for p in inspect.signature(f).parameters.values()
            if p.kind is p.KEYWORD_ONLY}


# ---------------------------------------------------------------------------------------------------------------------
# checks of what is asked for

def check_input(i, j, *, base, rotary_dim, **sizes):
    """ValueError unless the sizes are positive integers, L at least 2, D even, and j counts from 0."""
    for name, value in sizes.items():
        whole(name, value, least=2 if name == "L" else 1)
    if sizes["D"] % 2:
        raise ValueError(f"an even head width D is needed, not {sizes['D']}")
    if whole("rotary_dim", rotary_dim, least=2) % 2 or rotary_dim > sizes["D"]:
        raise ValueError(f"rotary_dim must be even and at most the head width {sizes['D']}, not {rotary_dim}")
    if positive("base", base) <= 1:
        raise ValueError(f"base must be above 1, not {base}")
    if not is_rising(i) or not is_rising(j) or not torch.equal(j[torch.searchsorted(j, i).clamp(max=len(j) - 1)], i):
        raise ValueError("the keys j must be indices in rising order, and the queries i some of them")


def is_rising(x):
    """Whether x is a vector of indices, at least one, each larger than the one before it."""
    return len(x) > 0 and int(x[0]) >= 0 and bool((x.diff() > 0).all())


def check_parameters(method, *functions):
    """ValueError unless each parameter of the method is one of these functions' and of its kind."""
    known = parameters(*functions)
    for name, value in method.params.items():
        if name not in known and name != "cosine":
            listed = ", ".join(known) or "none"
            raise ValueError(f"{method.name}: unknown parameter {name!r}{did_you_mean(name, known)} (it has {listed})")
        wrong_kind = isinstance(known.get(name), bool) != isinstance(value, bool)
        if name in ("fit", "on"):  # names, not numbers
            wrong_kind = not isinstance(value, (str, type(None)))
        elif isinstance(value, str):
            wrong_kind = True
        if wrong_kind:
            raise ValueError(f"{method.name}: {name} cannot be {value!r}")
