"""The panels of a study's figures: every value is drawn, what is missing leaves a gap, and outliers keep to the edge."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from rm_ood.study import plots

REL = {"edges": [0.5, 0.75, 1.0], "confidence": [0.6, 0.9], "accuracy": [0.7, 0.8], "count": [30, 10]}
NO_PAIRS = {"edges": [0.5, 0.75, 1.0], "confidence": [None, None], "accuracy": [None, None], "count": [0, 0]}
HIST = {"edges": [0.0, 1.0, 2.0, 3.0], "count": [10, 20, 10]}


def words(svg: str) -> list[str]:
    return [text.text or "" for text in ElementTree.fromstring(svg).iter("text")]


def numbers(svg: str) -> list[float]:
    """What the ticks say."""
    return [float(word) for word in words(svg) if re.fullmatch(r"-?[\d.]+", word)]


def markers(svg: str, colour: str) -> int:
    """Marks in the drawing of one of the page's colours."""
    return len(re.findall(rf"<use [^>]*fill: var\(--{colour}\)", svg))


def test_one_dot_per_value_and_one_in_the_legend():
    series = {
        "accuracy": [(0.1, (0.05, 0.2)), (None, None), (1.0, None)],
        "ECE": [(math.nan, None), (0.25, None), (0.5, None)],
    }
    svg = plots.dots("d", "prompt", "accuracy and ECE", ["a", "b", "c"], series, ("chance", 0.5))
    assert [markers(svg, colour) for colour in ("s1", "s2")] == [3, 3]
    assert {"a", "b", "c", "accuracy", "ECE", "chance"} <= set(words(svg))


def test_an_axis_has_its_colour_in_every_figure():
    svg = plots.dots("d", "x", "share flagged", ["a"], {"either": [(0.1, None)], "response": [(0.2, None)]})
    assert [markers(svg, colour) for colour in ("s1", "s2", "s4")] == [0, 2, 2]
    curve = {"fpr": [0, 0.5, 1], "tpr": [0, 0.9, 1]}
    svg = plots.roc("r", "x", {"response/default": curve, "response/knn": curve}, {"response/default": 0.7})
    assert "response/default 0.70" in words(svg)
    assert "response/knn" in words(svg)
    # Curve and legend.
    assert svg.count("stroke: var(--s2)") == 2


@pytest.mark.parametrize(("clean", "shifted"), [(REL, NO_PAIRS), (NO_PAIRS, REL), (NO_PAIRS, NO_PAIRS)])
def test_a_reliability_diagram_leaves_out_who_has_no_pairs(clean, shifted):
    shown = set(words(plots.reliability("r", "x", clean, shifted)))
    assert ("clean" in shown, "shifted" in shown) == (clean is REL, shifted is REL)


def test_a_reliability_diagram_reaches_what_is_below_chance():
    low = {**REL, "accuracy": [0.05, 0.8]}
    assert min(numbers(plots.reliability("r", "x", REL, low))) <= 0.2


def test_one_outlier_does_not_make_a_figure_of_one_bar():
    far = {"edges": [0.0, 1.0, 2.0, 1000.0], "count": [400, 600, 1]}
    svg = plots.distributions("h", "x", "OOD score", HIST, far, ("threshold", 2.5))
    assert max(numbers(svg)) <= 4
    assert {"clean", "shifted", "threshold"} <= set(words(svg))


def test_a_line_beyond_all_scores_is_inside_the_drawing():
    assert max(numbers(plots.distributions("h", "x", "OOD score", HIST, HIST, ("threshold", 9.0)))) >= 8


def test_a_distribution_of_nothing_is_left_out():
    svg = plots.distributions("h", "x", "OOD score", HIST, {**HIST, "count": [0, 0, 0]}, None)
    assert "shifted" not in words(svg)


@pytest.mark.parametrize("clean", [0.8, None])
def test_severity_starts_at_clean(clean):
    points = [(0.3, 0.7, (0.65, 0.75)), (0.9, 0.5, None)]
    svg = plots.severity("s", "noise", "accuracy", clean, {"response": points, "elsewhere": points[:1]})
    shown = words(svg)
    assert ("clean" in shown) == (clean is not None)
    # Clean at the start of the line, two points, the band of the interval, the legend.
    assert markers(svg, "s2") == (5 if clean else 4)
    assert "elsewhere" in shown


def test_accuracy_on_a_handful_of_pairs_is_not_drawn():
    noisy = {"coverage": [0.01, 0.02, 0.5, 1.0], "accuracy": [0.0, 0.0, 0.8, 0.85]}
    svg = plots.risk_coverage("c", "x", {"clean": noisy, "es": noisy})
    # The axis of accuracies from .8 to .85 has hundredths; that of coverage has not.
    assert min(float(word) for word in words(svg) if re.fullmatch(r"0\.\d\d", word)) > 0.7
    assert {"clean", "es"} <= set(words(svg))


def test_a_square_figure_has_like_axes():
    points = {"prompt": [(0.3, 0.02)], "response": [(0.01, 0.4)]}
    ticks = numbers(plots.scatter("q", "x", ("a", "b"), points, square=True))
    assert ticks[: len(ticks) // 2] == ticks[len(ticks) // 2 :]
    assert max(ticks) == 0.4
