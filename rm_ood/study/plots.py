"""The figures of a study, each a small panel: a page shows as many beside each other as fit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rm_ood.study.svg import INK, SERIES, SOFT, WARN, drawing, shortened

Interval = tuple[float, float] | None
# Each side looks the same in every figure; colour is never the only difference.
_SIDES = {"prompt": (SERIES[0], "o", "-"), "response": (SERIES[1], "s", "--"), "both": (SERIES[2], "^", "-.")}
_OTHER = (SERIES[3], "D", ":")
_AXES = {"prompt": (SERIES[0], "o"), "response": (SERIES[1], "s"), "either": (SERIES[3], "D")}
_LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
_MARKERS = ("o", "s", "^", "D", "v", "P")
# Below this share of the pairs an accuracy rests on a handful.
_FEWEST = 0.1


def reliability(key: str, label: str, clean: Mapping[str, Any], shifted: Mapping[str, Any]) -> str:
    """Share of pairs that are right against confidence: two REL objects; the area of a dot is its share of the pairs."""

    def draw(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], color=SOFT, linewidth=1, linestyle=":", label="as sure as right")
        lowest, left = 0.4, 0.5
        for name, curve, colour, marker, line in (
            ("clean", clean, SERIES[5], "o", "--"),
            ("shifted", shifted, SERIES[1], "s", "-"),
        ):
            x, y, count = _bins(curve)
            if not x.size:
                continue
            axes.plot(x, y, color=colour, linestyle=line, marker=marker, markersize=3.5, label=name)
            axes.scatter(x, y, s=900 * count / count.sum(), color=colour, alpha=0.25, marker="o", linewidth=0)
            lowest, left = min(lowest, y.min()), min(left, x.min())
        axes.set(xlim=(left - 0.02, 1.02), ylim=(max(lowest - 0.05, -0.03), 1.03))
        axes.set(xlabel="confidence", ylabel="share right")
        axes.legend(loc="upper left")

    text = f"Reliability of {label}. Expected calibration error shows as the distance of the dots from the diagonal."
    return drawing(key, f"Reliability: {label}", text, draw)


def distributions(
    key: str,
    label: str,
    unit: str,
    clean: Mapping[str, Any],
    shifted: Mapping[str, Any],
    line: tuple[str, float] | None,
) -> str:
    """Densities of two HIST objects; `unit` names what is counted, `line` a place on its axis."""

    def draw(axes: Any) -> None:
        ends, top = [] if line is None else [line[1]], 0.0
        for name, hist, colour, style in (
            ("clean", clean, SERIES[5], "-"),
            ("shifted", shifted, SERIES[0], "-"),
        ):
            edges, density = _density(hist)
            if not density.size:
                continue
            axes.stairs(density, edges, fill=True, color=colour, alpha=0.3 if name == "clean" else 0.15)
            axes.stairs(density, edges, color=colour, linestyle=style, linewidth=1.6, label=name)
            ends += _central(hist)
            top = max(top, density.max())
        if line is not None:
            axes.axvline(line[1], color=WARN, linestyle="--", linewidth=1.4, label=line[0])
        margin = 0.04 * (max(ends) - min(ends)) if ends else 0.0
        if margin:
            axes.set(xlim=(min(ends) - margin, max(ends) + margin), ylim=(0, 1.28 * top))
        axes.set(xlabel=unit, ylabel="density", yticks=[])
        axes.legend(loc="upper right", ncols=3, columnspacing=1, handlelength=1.4)

    return drawing(key, f"{unit}: {label}", f"Distribution of the {unit} of clean and of shifted items.", draw)


def roc(key: str, label: str, curves: Mapping[str, Mapping[str, Sequence[float]]], areas: Mapping[str, float]) -> str:
    """Share of the shifted items caught against share of the clean ones flagged: axis/detector -> fpr, tpr; its area."""

    def draw(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], color=SOFT, linewidth=1, linestyle=":")
        for number, (name, curve) in enumerate(curves.items()):
            area = f" {areas[name]:.2f}" if name in areas else ""
            colour = _AXES.get(name.removesuffix("/default"), (SERIES[(2, 4, 5)[number % 3]],))[0]
            line = _LINES[number % len(_LINES)]
            axes.plot(curve["fpr"], curve["tpr"], color=colour, linestyle=line, label=shortened(name, 22) + area)
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel="clean flagged", ylabel="shifted caught")
        axes.legend(loc="lower right")

    return drawing(key, f"ROC: {label}", f"ROC curves of {', '.join(curves)}; the diagonal is a blind detector.", draw)


def severity(
    key: str, label: str, unit: str, clean: float | None, sides: Mapping[str, Sequence[tuple[float, float, Interval]]]
) -> str:
    """One number against severity: side -> (severity, value, interval), from the least severe on; clean is at 0."""

    def draw(axes: Any) -> None:
        for side, points in sides.items():
            colour, marker, line = _SIDES.get(side, _OTHER)
            x, y = [p[0] for p in points], [p[1] for p in points]
            if clean is not None and x[0] > 0:
                x, y = [0.0, *x], [clean, *y]
            axes.plot(x, y, color=colour, linestyle=line, marker=marker, label=side)
            known = [(at, span) for at, _, span in points if span is not None]
            if known:
                low, high = zip(*(span for _, span in known), strict=True)
                axes.fill_between([at for at, _ in known], low, high, color=colour, alpha=0.15, linewidth=0)
        if clean is not None:
            axes.axhline(clean, color=SOFT, linewidth=1, linestyle=":")
            axes.plot([0], [clean], color=INK, marker="o", linestyle="none", label="clean", zorder=3)
        axes.set(xlabel="severity", ylabel=unit)
        axes.margins(y=0.12)
        axes.set_ylim(*_fractions(axes))
        axes.legend(loc="best")

    return drawing(key, f"{unit} against severity: {label}", f"{unit} of {label} by side, from clean on.", draw)


def risk_coverage(key: str, label: str, curves: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Accuracy on the least suspicious share of the pairs: name -> RC object; the first is the clean one."""

    def draw(axes: Any) -> None:
        for number, (name, curve) in enumerate(curves.items()):
            colour = SERIES[5] if number == 0 else SERIES[(number - 1) % 5]
            kept = [(x, y) for x, y in zip(curve["coverage"], curve["accuracy"], strict=True) if x >= _FEWEST]
            x, y = [place[0] for place in kept], [place[1] for place in kept]
            axes.plot(x, y, color=colour, linestyle=_LINES[number % 6], label=shortened(name, 24))
        axes.set(xlim=(0, 1.02), xlabel="share of pairs kept", ylabel="accuracy on these")
        axes.margins(y=0.12)
        axes.set_ylim(*_fractions(axes))
        axes.figure.legend(loc="outside lower center", ncols=2)

    text = f"Accuracy where the least out-of-distribution pairs are kept: {', '.join(curves)}."
    return drawing(key, f"Risk and coverage: {label}", text, draw, height=255 + 15 * ((len(curves) + 1) // 2))


def dots(
    key: str,
    label: str,
    unit: str,
    names: Sequence[str],
    series: Mapping[str, Sequence[tuple[float | None, Interval]]],
    line: tuple[str, float] | None = None,
) -> str:
    """One line per name, one dot and interval per series, from 0 to 1.

    Args:
        names: n names, from top to bottom.
        series: name -> n pairs of a fraction and its interval; None leaves a gap.
        line: a name and where it is.
    """

    def draw(axes: Any) -> None:
        handles = []
        for number, (name, values) in enumerate(series.items()):
            colour, marker = _AXES.get(name, (SERIES[number % 6], _MARKERS[number % 6]))
            shift = 0.22 * (number - (len(series) - 1) / 2)
            for row, (value, span) in enumerate(values):
                if value is None or math.isnan(value):
                    continue
                if span is not None:
                    axes.plot(span, [row + shift] * 2, color=colour, linewidth=1.2)
                axes.plot([value], [row + shift], color=colour, marker=marker, linestyle="none", alpha=0.9)
            handles += axes.plot([], [], color=colour, marker=marker, linestyle="none", label=name)
        if line is not None:
            handles.append(axes.axvline(line[1], color=WARN, linestyle="--", linewidth=1.2, label=line[0]))
        axes.set(xlim=(-0.02, 1.02), ylim=(len(names) - 0.5, -0.5), xlabel=unit)
        axes.set_yticks(range(len(names)), [shortened(name, 22) for name in names], fontsize=9.5)
        axes.tick_params(axis="y", length=0)
        axes.figure.legend(
            handles=handles, loc="outside upper center", ncols=len(handles), columnspacing=1, handletextpad=0.3,
            handlelength=1.2,
        )  # fmt: skip

    height = 75 + 21 * len(names)
    return drawing(key, f"{unit}: {label}", f"{unit} of {label}; the table has the numbers.", draw, height=height)


def scatter(
    key: str,
    label: str,
    axes_names: tuple[str, str],
    points: Mapping[str, Sequence[tuple[float, float]]],
    line: tuple[str, float] | None = None,
    square: bool = False,
) -> str:
    """One dot a condition, by side: side -> (x, y), fractions; `line` is a height with its name; `square`: both axes alike."""

    def draw(axes: Any) -> None:
        for side, places in points.items():
            colour, marker, _ = _SIDES.get(side, _OTHER)
            x, y = zip(*places, strict=True)
            axes.plot(x, y, color=colour, marker=marker, linestyle="none", markersize=6, alpha=0.8, label=side)
        if line is not None:
            axes.axhline(line[1], color=SOFT, linestyle=":", linewidth=1.2, label=line[0])
        axes.set(xlim=(-0.03, 1.03), xlabel=axes_names[0], ylabel=axes_names[1])
        axes.locator_params(nbins=6)
        axes.margins(y=0.12)
        axes.set_ylim(*_fractions(axes))
        if square:
            top = max(0.2, *(value for places in points.values() for place in places for value in place))
            axes.set(xlim=(-0.04 * top, 1.08 * top), ylim=(-0.04 * top, 1.08 * top))
        axes.legend(loc="best")

    x, y = axes_names
    return drawing(key, label, f"One dot per shifted condition: {y} against {x}, by side.", draw)


def _fractions(axes: Any) -> tuple[float, float]:
    """Limits that leave out what no fraction can be."""
    low, high = axes.get_ylim()
    return max(low, -0.03), min(high, 1.03)


def _bins(curve: Mapping[str, Any]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Confidence, accuracy and count of the bins that hold a pair."""
    kept = [
        (x, y, n)
        for x, y, n in zip(curve["confidence"], curve["accuracy"], curve["count"], strict=True)
        if n and x is not None and y is not None
    ]
    found = np.array(kept, dtype=np.float64).reshape(-1, 3)
    return found[:, 0], found[:, 1], found[:, 2]


def _density(hist: Mapping[str, Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    edges, count = np.array(hist["edges"], dtype=np.float64), np.array(hist["count"], dtype=np.float64)
    if not count.sum():
        return edges, np.zeros(0)
    return edges, count / (count.sum() * np.diff(edges))


def _central(hist: Mapping[str, Any]) -> list[float]:
    """Edges around the central 99 % of the items: one far outlier does not make a figure of one bar."""
    share = np.cumsum(hist["count"]) / np.sum(hist["count"])
    first, last = int(np.searchsorted(share, 0.005, side="right")), int(np.searchsorted(share, 0.995))
    return [float(hist["edges"][first]), float(hist["edges"][min(last, len(share) - 1) + 1])]
