"""plots.py: which of many curves get a colour, and names that stand apart."""
import math

import pytest

from plots import COLOURS, check_highlight, draw_curves, highlighted, label_heights

MANY = {f"method-{number}": ([1, 2], [number, number]) for number in range(9)}


def test_which_methods_are_in_colour():
    """Those asked for; all of a few; of many the known ones and the best, largest or smallest, each in a colour."""
    few = {name: MANY[name] for name in list(MANY)[:7]}
    assert highlighted(MANY, ["method-3"]) == ["method-3"] and highlighted(few) == list(few)
    many = {**MANY, "mesa": ([1], [5]), "rope:factor=2": ([1], [4])}
    assert highlighted(many) == ["mesa", "rope:factor=2", "method-8"]
    assert highlighted(many, best=min) == ["mesa", "rope:factor=2", "method-0"]
    assert highlighted({**many, "mesa": ([1], [99])}) == ["mesa", "rope:factor=2"]
    variants = {f"mesa:width={number}": ([1], [number]) for number in range(9)}
    assert len(highlighted(variants)) == len(COLOURS) and "mesa:width=8" in highlighted(variants)


def test_what_cannot_be_highlighted():
    check_highlight(None, [])
    check_highlight(["mesa"], ["rope", "mesa"])
    with pytest.raises(ValueError, match="--highlight meza: not among the methods rope, mesa"):
        check_highlight(["meza"], ["rope", "mesa"])
    with pytest.raises(ValueError, match="up to 7 methods, not 9"):
        check_highlight(list(MANY), MANY)


def test_curves_are_named_where_they_end():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    axes = figure.subplots()
    axes.set(xlabel="tokens", ylim=(0, 10))
    draw_curves(axes, MANY, ["method-2", "method-5"])
    colours = {line.get_label(): line.get_color() for line in axes.lines}
    assert colours["method-2"] == COLOURS[0] and colours["method-5"] == COLOURS[1]
    assert {colours[name] for name in MANY if name not in ("method-2", "method-5")} == {"0.78"}
    assert axes.get_xlabel().startswith("tokens\nin grey: method-0, method-1, method-3, method-4, ")
    assert [text.get_text() for text in axes.texts] == ["method-2", "method-5"]
    assert [text.xyann[1] for text in axes.texts] == pytest.approx([0.2, 0.5])


def test_what_was_not_measured_has_no_end():
    """A curve ends at its last number, and one of none has no name."""
    figure = pytest.importorskip("matplotlib.figure").Figure()
    axes = figure.subplots()
    draw_curves(axes, {"half": ([1, 2], [0.5, math.nan]), "none": ([1, 2], [math.nan] * 2)}, ["half", "none"])
    assert [(text.get_text(), text.xy) for text in axes.texts] == [("half", (1, 0.5))]
    figure.canvas.draw()


def test_names_stand_apart():
    """At 0, 5, 5 and 10 of 10; and four at the bottom, which move up."""
    axes = pytest.importorskip("matplotlib.figure").Figure().subplots()
    axes.set(ylim=(0, 10))
    assert label_heights(axes, [(0, 5), (0, 10), (0, 5), (0, 0)], gap=0.1) == pytest.approx([0.5, 1, 0.4, 0])
    assert label_heights(axes, [(0, 0)] * 4, gap=0.1) == pytest.approx([0.3, 0.2, 0.1, 0])
