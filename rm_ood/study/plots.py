"""Drawings as SVG text, without a plotting library: they go into one self-contained page."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

_COLOURS = ("#2166ac", "#b2182b", "#1b7837", "#7b3294", "#8c510a", "#555555")
_ROW, _LEFT, _WIDTH, _TOP, _BOTTOM, _LEGEND = 18, 190, 420, 46, 26, 130


def dot_plot(
    title: str,
    labels: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    marks: Mapping[str, float] | None = None,
) -> str:
    """One line per label, one dot per series, on an axis from 0 to 1.

    Args:
        title: says what the axis is.
        labels: n names, from top to bottom.
        series: name -> n fractions in [0, 1]; None (or NaN) leaves a gap.
        marks: name -> position of a dashed vertical line, such as an expected rate.

    Returns:
        An `<svg>` element; its text is escaped.
    """
    height = _TOP + _ROW * len(labels) + _BOTTOM
    bottom = height - _BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_LEFT + _WIDTH + _LEGEND} {height}" role="img" '
        f'font-family="system-ui, sans-serif" font-size="12"><title>{html.escape(title)}</title>',
        _text(_LEFT, 16, title, weight="bold"),
    ]
    for tick in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        parts += [
            _line(_x(tick), _TOP - 6, _x(tick), bottom, "#ddd"),
            _text(_x(tick), bottom + 16, f"{tick:g}", "middle"),
        ]
    for name, at in (marks or {}).items():
        parts += [_line(_x(at), _TOP - 6, _x(at), bottom, "#333", "4 3"), _text(_x(at), _TOP - 10, name, "middle")]
    for row, label in enumerate(labels):
        y = _TOP + _ROW * row + _ROW / 2
        parts += [_line(_LEFT, y, _LEFT + _WIDTH, y, "#f0f0f0"), _text(_LEFT - 8, y + 4, label, "end")]
    for number, (name, values) in enumerate(series.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        y = _TOP + 16 * number
        parts += [_dot(_LEFT + _WIDTH + 18, y, colour), _text(_LEFT + _WIDTH + 28, y + 4, name)]
        for label, row, value in zip(labels, range(len(labels)), values, strict=True):
            if value is not None and not math.isnan(value):
                y_row = _TOP + _ROW * row + _ROW / 2
                parts.append(_dot(_x(value), y_row, colour, f"{label}: {name} {value:.3f}"))
    return "".join([*parts, "</svg>"])


def _x(value: float) -> float:
    return _LEFT + _WIDTH * value


def _text(x: float, y: float, text: str, anchor: str = "start", weight: str = "normal") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}">{html.escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, dashes: str = "none") -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-dasharray="{dashes}"/>'
    )


def _dot(x: float, y: float, colour: str, tip: str = "") -> str:
    title = f"<title>{html.escape(tip)}</title>" if tip else ""
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour}" fill-opacity=".8">{title}</circle>'
