"""Plots are well-formed SVG with one dot per value."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree

import pytest

from rm_ood.study.plots import dot_plot

SVG = "{http://www.w3.org/2000/svg}"


def test_one_dot_per_value_and_one_in_the_legend():
    svg = dot_plot("t", ["a", "b", "c"], {"one": [0.0, None, 1.0], "two": [math.nan, 0.25, 0.5]}, {"half": 0.5})
    root = ElementTree.fromstring(svg)
    dots = [c for c in root.iter(f"{SVG}circle") if c.find(f"{SVG}title") is not None]
    assert [c.find(f"{SVG}title").text for c in dots] == [
        "a: one 0.000", "c: one 1.000", "b: two 0.250", "c: two 0.500",
    ]  # fmt: skip
    assert len(list(root.iter(f"{SVG}circle"))) == len(dots) + 2
    assert [float(c.get("cx")) for c in dots] == [190.0, 610.0, 295.0, 400.0]
    dashed = [line for line in root.iter(f"{SVG}line") if line.get("stroke-dasharray") != "none"]
    assert [float(line.get("x1")) for line in dashed] == [400.0]
    # Rows are top to bottom, and everything is inside the drawing.
    heights = {c.find(f"{SVG}title").text[0]: float(c.get("cy")) for c in dots}
    assert heights["a"] < heights["b"] < heights["c"] < float(root.get("viewBox").split()[3])


def test_text_is_escaped():
    svg = dot_plot("<t>", ["a & b"], {"<s>": [0.5]})
    assert "a & b" in [t.text for t in ElementTree.fromstring(svg).iter(f"{SVG}text")]
    assert "<t>" not in svg


def test_a_series_of_another_length_is_refused():
    with pytest.raises(ValueError, match="zip"):
        dot_plot("t", ["a"], {"s": [0.1, 0.2]})
