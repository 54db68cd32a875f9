"""A Plan: what every method promises, how its three parts combine, what is asked for (Method), and what is refused.

The distances of each geometry are in test_geometry.py, frequencies and scales by themselves in test_frequencies.py.
"""
import math
from types import SimpleNamespace

import pytest
import torch

from frequencies import FREQUENCIES, SCALES, alibi_slopes
from geometry import METHODS
from plan import Region, distance, farthest, largest_within, visible_keys
from positions import Method, make_plan

DECODED = 5  # tokens that follow the prompt in most tests


def needed(method, D):
    """Parameters without which a method cannot be: longrope's factors are found by search, here they are made up."""
    return {"short_factor": [1.0] * (D // 2), "long_factor": [2.0] * (D // 2)} if method == "longrope" else {}


def plan_of(method, n, L, i=None, T=None, D=8, H=4, **params):
    """The plan for n prompt tokens, T tokens in all (default n), all of them queries unless i says otherwise."""
    j = torch.arange(T or n)
    i = j if i is None else torch.as_tensor(i)
    return make_plan(method, i, j, n=n, L=L, D=D, H=H, **{**needed(method, D), **params})


def same(got, want):
    return torch.allclose(got, want, rtol=0, atol=0, equal_nan=True)


# ---------------------------------------------------------------------------------------------------------------------
# what every method promises

def check(plan, i):
    """Disjoint, causal, self at distance 0, none negative, bounds that never fall; and what is counted and measured."""
    d = distance(plan)  # raises where two regions overlap
    Tk = d.shape[1]
    assert d[torch.arange(Tk) > i[:, None]].isnan().all()
    assert (d[torch.arange(len(i)), i] == 0).all()
    assert d.nan_to_num().min() == 0
    for r in plan.regions:
        visible = r.end > r.start
        start, end = r.start[visible], r.end[visible]
        assert len(start) and (start >= 0).all() and (end <= Tk).all()
        assert (start.diff() >= 0).all() and (end.diff() >= 0).all()
    assert torch.equal(visible_keys(plan), (~d.isnan()).sum(1))
    assert max(farthest(r) for r in plan.regions) == d.nan_to_num().max()


@pytest.mark.parametrize("method", METHODS)
def test_regions_are_disjoint_causal_and_see_self(method):
    """Prompts of many lengths at L = 32, and one of 20 tokens that is decoded far beyond L."""
    for n, total in [*((n, n + DECODED) for n in (1, 2, 3, 31, 33, 64, 65, 101, 250)), (20, 70)]:
        check(plan_of(method, n, 32, T=total), torch.arange(total))


@pytest.mark.parametrize("method", METHODS)
def test_any_cut_gives_the_same_rows(method, cut):
    """Prefill in pieces and decoding are the same function of i; keys beyond the piece do not exist yet."""
    for n in (20, 33, 130):
        total = n + 12
        whole = plan_of(method, n, 32, T=total)
        rows = distance(whole)
        for a, b in cut(total):
            piece = plan_of(method, n, 32, i=range(a, b), T=b)
            assert same(distance(piece), rows[a:b, :b])
            assert whole.q_scale is None or torch.equal(piece.q_scale, whole.q_scale[a:b])
            assert piece.mscale == whole.mscale
            assert whole.inv_freq is None or torch.equal(piece.inv_freq, whole.inv_freq)


def config_of(L):
    """What Method asks of a Config."""
    return SimpleNamespace(train_len=L, freq="rope", freq_params={}, head_dim=8, num_attention_heads=4, rope_theta=1e4,
                           cosine_attention=None, rotary_dim=None, interleaved=False)


SHORT_SIGHTED = {"streaming-llm:sinks=2:recent=20": 22, "lm-infinite": 42, "sliding:window=9": 8, "chunked:chunk=8": 7}


@pytest.mark.parametrize("text", [*METHODS, *SHORT_SIGHTED])
def test_later_keys_are_those_that_a_later_query_sees(text):
    """Against the plan of all tokens, 300 decoded ones among them; with these keys alone a plan has the same distances.
    Most methods always see the first key, and all that follow; for some it stays at a few."""
    method = Method.of(text, **needed(text, 8))
    config = config_of(32)
    for n in (20, 70, 150):
        every = torch.arange(n + 300)
        d = distance(method.plan(config, n, every, every))
        for now in (1, 2, 33, n - 1, n, n + 130):
            kept = torch.zeros(now, dtype=torch.bool)
            for start, stop in method.later_keys(config, n, now):
                kept[start:stop] = True
            assert torch.equal(kept, (~d[now:, :now].isnan()).any(0)), (n, now)
            assert int(kept.sum()) <= SHORT_SIGHTED.get(text, now)
            i = torch.arange(now, now + 40)
            j = torch.cat((kept.nonzero()[:, 0], i))
            assert same(distance(method.plan(config, n, i, j)), d[i][:, j])


def test_the_worked_example_of_later_keys():
    method = Method.parse("streaming-llm:sinks=2:recent=4")
    assert method.later_keys(config_of(32), 12, 9) == [(0, 2), (5, 9)]
    with pytest.raises(ValueError, match="rope: query 9 sees a key that the cache has forgotten"):
        Method("rope").plan(config_of(32), 12, torch.tensor([9]), torch.tensor([0, 1, 5, 9]))


@pytest.mark.parametrize("method", METHODS)
def test_tiny_training_lengths_work_or_say_why(method):
    """Defaults in proportion to L meet their floor here. Either a sound plan or a ValueError, never a crash or nan."""
    for L in (1, 2, 3, 5, 8):
        try:
            plan = plan_of(method, 20, L)
        except ValueError as error:
            assert str(error)
            continue
        check(plan, torch.arange(20))
        assert plan.q_scale is None or plan.q_scale.isfinite().all()


# ---------------------------------------------------------------------------------------------------------------------
# frequencies and attention scales in a plan

def equal_plans(a, b):
    """Whether two plans say the same, tensor by tensor."""
    def numbers(plan):
        tensors = [plan.inv_freq, plan.q_scale, plan.slopes]
        tensors += [getattr(region, name) for region in plan.regions for name in ("q_pos", "k_pos", "start", "end")]
        lists = [None if x is None else x.tolist() for x in tensors]
        return lists, plan.mscale, plan.cosine, plan.interleaved, plan.key_set
    return numbers(a) == numbers(b)


@pytest.mark.parametrize("name", FREQUENCIES)
def test_a_frequency_rule_is_a_method_and_goes_with_any_geometry(name):
    inv_freq, mscale = FREQUENCIES[name](8, 1e4, 130, 32, **needed(name, 8))
    for plan in (plan_of(name, 130, 32), plan_of("mesa", 130, 32, freq=name, first=3, **needed(name, 8))):
        assert plan.mscale == mscale
        assert plan.inv_freq is None if inv_freq is None else torch.equal(plan.inv_freq, inv_freq)
        assert plan.slopes is None if name != "alibi" else torch.equal(plan.slopes, alibi_slopes(4))
    assert same(distance(plan), distance(plan_of("mesa", 130, 32, first=3)))
    i = torch.arange(130.)
    assert same(distance(plan_of(name, 130, 32)).nan_to_num(), (i[:, None] - i).clamp(min=0).double())


@pytest.mark.parametrize("name", [name for name in SCALES if name != "none"])
def test_an_attention_scale_takes_the_keys_that_a_query_sees(name):
    """A query under a window, or in one of Mesa's middle chunks, is not sharpened for what it does not see."""
    i = torch.arange(250, 310)
    for method in ("rope", "streaming-llm", "lm-infinite", "mesa"):
        plan = plan_of(method, 300, 32, i=i, T=310, D=16, attn_scale=name)
        assert torch.equal(plan.q_scale, SCALES[name](i, visible_keys(plan), 300, 32, 16))
    assert equal_plans(plan_of(name, 300, 32), plan_of("rope", 300, 32, attn_scale=name))


def test_mesa_sharpens_the_last_chunk_alone():
    plan = plan_of("mesa", 12, 6, first=2, chunk=4, width=2, last=2)
    assert visible_keys(plan).tolist() == [1, 2, 3, 4, 5, 6, 3, 4, 5, 6, 11, 12]
    assert plan.q_scale.tolist() == pytest.approx([1] * 10 + [math.log(11) / math.log(6), math.log(12) / math.log(6)])


@pytest.mark.parametrize("method, scale", [
    ("mesa", "logn"), ("stair", "logn"), ("rerope", "logn"), ("leaky-rerope", "logn"), ("ntk-mixed", "logn"),
    ("lampe", "constant"), ("string", "none"), ("self-extend", "none"), ("dca", "none"), ("yarn", "none")])
def test_scales_that_come_with_a_method(method, scale):
    """As in the released codes; "none" turns them off."""
    assert equal_plans(plan_of(method, 130, 32), plan_of(method, 130, 32, attn_scale=scale))
    assert plan_of(method, 130, 32, attn_scale="none").q_scale is None


def test_rotary_width_and_interleaved_pairs():
    """The first 12 of 16 channels turn, as 12 channels of their own would; scales go by the whole head."""
    plan = plan_of("mesa", 130, 32, D=16, rotary_dim=12, interleaved=True, freq="yarn", attn_scale="infoscale")
    assert len(plan.inv_freq) == 6 and torch.equal(plan.inv_freq, FREQUENCIES["yarn"](12, 1e4, 130, 32)[0])
    whole = plan_of("mesa", 130, 32, D=16, attn_scale="infoscale")
    assert len(whole.inv_freq) == 8 and torch.equal(plan.q_scale, whole.q_scale)
    assert plan.interleaved and plan.last().interleaved and not whole.interleaved


# ---------------------------------------------------------------------------------------------------------------------
# Method

@pytest.mark.parametrize("text, method", [
    ("", Method()), (":freq=yarn", Method(None, "yarn")), ("rope:attn-scale=none", Method("rope", attn_scale="none")),
    ("self-extend:group=8:freq=yarn:attn-scale=logn", Method("self-extend", "yarn", "logn", {"group": 8})),
    ("infoscale:clamp=false:per_sequence=true", Method("infoscale", params={"clamp": False, "per_sequence": True})),
    ("lampe:fit=llama3.1", Method("lampe", params={"fit": "llama3.1"})),
    ("leaky-rerope:k=2.5", Method("leaky-rerope", params={"k": 2.5})),
    ("longrope:long_factor=[1.0,2]:factor=4", Method("longrope", params={"long_factor": [1.0, 2], "factor": 4})),
], ids=str)
def test_a_method_is_a_text(text, method):
    """And is written as it is read."""
    assert Method.parse(text) == method
    assert str(method) == text


def test_other_spellings_of_a_method():
    for text, usual in {"mesa:first=16,last=8": "mesa:first=16:last=8", "mesa:freq=pi:last=8": "mesa:last=8:freq=pi",
                        "rope:attn_scale=logn": "rope:attn-scale=logn", "logn:x=False": "logn:x=false",
                        "mesa:first = 16 , last = -8": "mesa:first=16:last=-8",
                        "llama3:low-freq-factor=2": "llama3:low_freq_factor=2",
                        "longrope:a=[1, 2],b=[3,4]": "longrope:a=[1,2]:b=[3,4]"}.items():
        assert str(Method.parse(text)) == usual


def test_method_of():
    """A name, a text, None or a Method, with keywords added; what is added counts."""
    want = Method("mesa", "yarn", "none", {"first": 16, "last": 8})
    other = Method("mesa", "pi", "logn", {"first": 3})
    assert Method.of("mesa", "yarn", "none", first=16, last=8) == want
    assert Method.of("mesa:first=16", freq="yarn", attn_scale="none", last=8) == want
    assert Method.of(other, "yarn", "none", first=16, last=8) == want
    assert other == Method("mesa", "pi", "logn", {"first": 3})
    assert Method.of(None, "pi", k=2.0) == Method(None, "pi", None, {"k": 2.0})


def config(**changes):
    """What Method.plan reads of a model's Config."""
    fields = {"train_len": 32, "head_dim": 16, "num_attention_heads": 4, "rope_theta": 5e5, "freq": "rope",
              "freq_params": {}, "cosine_attention": None, "rotary_dim": None, "interleaved": False, **changes}
    return SimpleNamespace(**fields)


YARN = {"freq": "yarn", "freq_params": {"factor": 4.0}}
COSINE = {"cosine_attention": 24.0}


@pytest.mark.parametrize("fields, asked, method, params", [
    ({}, "", "rope", {}), ({}, "mesa:first=3", "mesa", {"first": 3}), ({}, "cosscale", "rope", {"cosine": 32.0}),
    ({}, "mesa:freq=pi:attn-scale=none:factor=2.0", "mesa", {"freq": "pi", "attn_scale": "none", "factor": 2.0}),
    (YARN, "", "yarn", {"factor": 4.0}), (YARN, "yarn", "yarn", {"factor": 4.0}), (YARN, "rope", "rope", {}),
    (YARN, "mesa", "mesa", {"freq": "yarn", "factor": 4.0}), (YARN, "mesa:freq=rope", "mesa", {}),
    (YARN, "mesa:factor=2", "mesa", {"freq": "yarn", "factor": 2}), (YARN, "pi", "pi", {}),
    ({"freq": "alibi"}, "mesa", "mesa", {"freq": "alibi"}),
    ({"freq": "nope"}, "mesa:freq=alibi", "mesa", {"freq": "alibi"}),
    (COSINE, "mesa", "mesa", {"cosine": 24.0}), (COSINE, "mesa:cosine=5", "mesa", {"cosine": 5}),
    ({"rotary_dim": 8, "interleaved": True}, "dca", "dca", {"rotary_dim": 8, "interleaved": True}),
], ids=str)
def test_a_method_for_a_model(fields, asked, method, params):
    """A method keeps the frequencies that the model was trained with, unless it has, or is given, others."""
    asked, i = Method.parse(asked), torch.arange(130)
    sizes = {"n": 130, "L": 32, "D": 16, "H": 4, "base": 5e5}
    assert equal_plans(asked.plan(config(**fields), 130), make_plan(method, i, i, **sizes, **params))
    rows = asked.plan(config(**fields), 130, i[100:120], i[:120])
    assert equal_plans(rows, make_plan(method, i[100:120], i[:120], **sizes, **params))


@pytest.mark.parametrize("asked, name", [("yarn", "yarn"), ("mesa:freq=pi", "pi"), ("rope", "rope")])
def test_rotary_rules_set_nothing_in_models_without_rotary_positions(asked, name):
    for freq in ("alibi", "nope"):
        with pytest.raises(ValueError, match=rf"no rotary positions \({freq}\), so {name} sets nothing"):
            Method.parse(asked).plan(config(freq=freq), 50)


# ---------------------------------------------------------------------------------------------------------------------
# errors name what is wrong

@pytest.mark.parametrize("name, values", [
    ("n", [0, -3, 10.5, "12", None]), ("L", [0, 1, -1, 32.0]), ("H", [0]), ("D", [0, 7, 8.0]),
    ("base", [0.0, -1e4, 1.0, "x"]), ("rotary_dim", [0, 7, 10]), ("cosine", [0.0, -3]),
    ("j", [torch.arange(1, 13), torch.arange(0, 24, 2)]),
    ("i", [torch.arange(0), torch.tensor([3, 2]), torch.tensor([4, 4]), torch.tensor([-1]), torch.tensor([12])])])
def test_wrong_sizes_are_named(name, values):
    sound = {"i": torch.arange(12), "j": torch.arange(12), "n": 12, "L": 8, "D": 8, "H": 4}
    for value in values:
        with pytest.raises(ValueError, match=rf"\b{name}\b"):
            make_plan("rope", **{**sound, name: value})


@pytest.mark.parametrize("method, settings", {
    "rope": "freq=ropey freq=mesa attn-scale=cosscale window=4 n=5 method=mesa clamp=true",
    "rerope": "windw=4 window=0 window=-4 window=2.5 window=four", "leaky-rerope": "window=0 k=0 k=-2.0",
    "self-extend": "group=0 group=2.5 window=0", "dca": "chunk=0 top=0 top=4 fit=gpt2", "string": "shift=0 window=2.5",
    "streaming-llm": "recent=0 sinks=x", "lm-infinite": "local=0 sinks=0 cap=6", "stair": "linear=0 width=0",
    "lampe": "mapping=0 head=0 tail=-2 fit=gpt2 fit=[1] logit_factor=0 sigmoid=[1,2] sigmoid=3 "
             "sigmoid=[0,1,9] sigmoid=[1,true,9] sigmoid=[1,1e3,9] sigmoid=[1,1,0]", "infoscale": "clamp=0",
    "logn": "power=0", "cosscale": "cosine=true",
    "mesa": "fit=gpt2 "
            "first=0 chunk=-1 chunk=8 last=0 linear=0 width=1.5 reserve=-1 margin=-1 remainder=x overlap=-1 overlap=6",
    "mrrope": "factor=0 beta_fast=-1 beta_slow=0", "p-rope": "partial_rotary_factor=0 partial_rotary_factor=2 factor=0",
    "cope-clip": "clip_low_n=0 clip_low_n=2.5 hard=1", "giraffe": "truncate_pos=0", "abf": "rope_theta=0",
    "resonance": "on=3 on=ropey", "ssmax": "s=0", "llama4": "floor_scale=0 beta=big", "chunked": "chunk=0",
    "ministral": "beta=0 original_max_position_embeddings=2.5", "sliding": "window=0 window=2.5",
    "yarn": "freq=pi factor=true factor=big factor=0 beta_fast=-1 beta_slow=0 attention_factor=-1.0 "
            "original_max_position_embeddings=10.5",
    "dynamic-yarn": "factor=2 beta_fast=0", "pi": "factor=0", "ntk": "factor=0", "dynamic-ntk": "factor=0",
    "ntk-mixed": "factor=0 b=0", "llama3": "factor=0 low_freq_factor=-1 high_freq_factor=0", "alibi": "freq=rope",
}.items())
def test_wrong_settings_are_named(method, settings):
    """12 tokens at L = 8 with one thing wrong: a ValueError that contains its name as a word."""
    for setting in settings.split():
        name, value = setting.split("=")
        wrong = value if name in ("freq", "attn-scale", "fit", "on") else name
        with pytest.raises(ValueError, match=rf"\b{wrong}\b"):
            plan_of(f"{method}:{setting}", 12, 8)


ERRORS = {
    "meza": "did you mean mesa.*leaky-rerope",
    "mesa:widht=2": "did you mean width.*overlap",
    "lampe:fit=lama2": "did you mean llama2.*mistral",
    "resonance:on=yran": "did you mean yarn.*mrrope",
    "resonance:on=alibi": "on=alibi turns nothing",
    "yarn:freq=pi": "yarn and pi both set the frequencies",
    "mesa:first=4:chunk=5": r"first 4 \+ overlap 0 \+ chunk 5 is over 8",
    "mesa:freq=longrope": "short_factor and long_factor",
    "mesa:first=3:window": "a setting is name=value, not 'window'",
}


@pytest.mark.parametrize("method, message", ERRORS.items(), ids=ERRORS)
def test_errors_say_why_what_was_meant_and_what_is_valid(method, message):
    with pytest.raises(ValueError, match=message):
        plan_of(method, 40, 8)


# ---------------------------------------------------------------------------------------------------------------------
# a plan is checked when it is made

def add_method(monkeypatch, geometry):
    """A row "mine" of METHODS for the time of a test."""
    monkeypatch.setitem(METHODS, "mine", (lambda i, j, n, L: geometry(i, j), None, None))


def only(i, query):
    """1 for one query, 0 for all others."""
    return (i == query).long()


def near(i):
    """The first key of a window of 4."""
    return (i - 3).clamp(min=0)


BROKEN = {  # rule: (geometry of 12 tokens, the first query that breaks it, what the message says)
    "end outside": (lambda i, j: [Region(i, j, 0 * i, i + 3)], "(0|10)", "outside|after"),
    "start outside": (lambda i, j: [Region(i, j, 0 * i - 1, i + 1)], 0, "outside"),
    "causal": (lambda i, j: [Region(i + 9, j, 0 * i, i + 1 + only(i, 5))], 5, "after"),
    "start falls": (lambda i, j: [Region(i, j, near(i) - 2 * only(i, 7), i + 1)], 7, "earlier first"),
    "end falls": (lambda i, j: [Region(i, j, i, i + 1), Region(i, j, 0 * i, i - 3 * only(i, 7))], 7, "earlier last"),
    "disjoint": (lambda i, j: [Region(i, j, near(i), i + 1), Region(i, j, 0 * i, near(i) + only(i, 9))], 9, "overlap"),
    "distance": (lambda i, j: [Region(i - only(i, 8), j, 0 * i, i + 1)], 8, "negative distance"),
    "distance inside": (lambda i, j: [Region(i, j + 3 * only(j, 2), 0 * i, i + 1)], 2, "negative distance"),
    "distance nan": (lambda i, j: [Region(i / (i != 0), j, 0 * i, i + 1)], 0, "distance"),
    "k_pos falls": (lambda i, j: [Region(i + 12, -j, 0 * i, i + 1)], 1, "farther than the first"),
    "sees a key": (lambda i, j: [Region(i, j, 0 * i, (i + 1) * (i != 4))], 4, "sees no key"),
    "no region": (lambda i, j: [], 0, "sees no key"),
    "short k_pos": (lambda i, j: [Region(i, j[1:], 0 * i, i + 1)], 0, "lengths"),
    "short end": (lambda i, j: [Region(i, j, 0 * i, i[1:])], 0, "lengths"),
}


@pytest.mark.parametrize("rule", BROKEN)
def test_a_broken_geometry_is_refused(rule, monkeypatch):
    """A ValueError that names the method, the query and the rule; where one row can break it, also in decoding."""
    geometry, query, words = BROKEN[rule]
    add_method(monkeypatch, geometry)
    queries = [range(12)]
    if rule in ("causal", "distance", "disjoint", "sees a key"):
        queries.append([query])
    for i in queries:
        with pytest.raises(ValueError, match=rf"^mine: query {query}\b.*({words})"):
            plan_of("mine", 12, 8, i=i)


def test_a_sound_geometry_is_accepted(monkeypatch):
    """What is empty may have any bounds, k_pos may fall between two intervals, and equal keys are found by value."""
    def blocks(i, j):
        own = i - i % 4
        return [Region(i % 4, j % 4, own, i + 1), Region(i - 90, j, 99 - i, 0 * i - 5),
                Region(i % 4 + 4, j % 4, (own - 4).clamp(min=0), own)]
    add_method(monkeypatch, blocks)
    plan = plan_of("mine", 12, 8)
    assert distance(plan)[11, 4:].tolist() == [7, 6, 5, 4, 3, 2, 1, 0] and plan.key_set == [0, 0]


def test_the_largest_position_of_every_interval():
    """What the check of distances rests on, where k_pos rises and falls."""
    values = torch.randint(100, (60,), generator=torch.Generator().manual_seed(0))
    for k_pos in (values, values.sort().values):
        start, end = torch.combinations(torch.arange(61)).T
        want = [max(k_pos.tolist()[a:b]) for a, b in zip(start.tolist(), end.tolist())]
        assert largest_within(k_pos, start, end).tolist() == want
        assert largest_within(k_pos, start[99:100], end[99:100]).tolist() == want[99:100]
