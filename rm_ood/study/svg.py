"""Matplotlib figures as SVG inside a page: the page's colours and font, no identifier twice, the same bytes each time."""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Callable
from typing import Any

from rm_ood.errors import InputError

# Matplotlib draws with these; in the page they are CSS variables, which are other colours on a dark ground. The series
# are told apart by colour-blind readers as well (after Okabe and Ito, darkened for white paper).
INK, SOFT, LINE, PAPER, WARN = "#010101", "#020202", "#030303", "#040404", "#050505"
SERIES = ("#060606", "#070707", "#080808", "#090909", "#0a0a0a", "#0b0b0b")
_VARIABLES = {INK: "ink", SOFT: "soft", LINE: "line", PAPER: "paper", WARN: "warn"} | {
    colour: f"s{number}" for number, colour in enumerate(SERIES, 1)
}
STYLE = (
    ":root{--s1:#0072b2;--s2:#c8500a;--s3:#00805f;--s4:#a04a90;--s5:#846a00;--s6:#5b6472}"
    "@media(prefers-color-scheme:dark){:root{--s1:#56b4e9;--s2:#ff9a5c;--s3:#3ecf9e;--s4:#e39ad0;--s5:#e6c34a;"
    "--s6:#9aa4b2}}svg.plot{display:block;width:100%;height:auto;stroke-linejoin:round}"
)
_SETTINGS = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    # Comes with matplotlib, and is wider than what a page shows: what fits in it fits there.
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10.5,
    "legend.fontsize": 9.5,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": SOFT,
    "axes.linewidth": 0.8,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": False,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "legend.facecolor": PAPER,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.85,
    "legend.borderpad": 0.2,
    "legend.handlelength": 1.8,
}


def require_matplotlib() -> None:
    """Raises InputError, which says what to install, where matplotlib is missing; call it before long work."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError("the figures of a study need matplotlib: pip install 'rm_ood[study]'") from error


def drawing(
    key: str, title: str, description: str, draw: Callable[[Any], None], width: float = 340, height: float = 250
) -> str:
    """One figure as an `<svg>` element for an HTML page that has `STYLE`.

    Args:
        key: letters, digits and dashes; no two figures of a page share it.
        title, description: what it shows, for those who do not see it; plain text.
        draw: gets the matplotlib axes.
        width, height: in CSS pixels, at which the text has its own size; the page scales it.

    Raises:
        InputError: matplotlib is missing.
    """
    require_matplotlib()
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(), warnings.catch_warnings():
        # A name in another script is drawn by the browser, which has the glyphs.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        warnings.filterwarnings("ignore", "Matplotlib currently does not support", UserWarning)
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS | {"svg.hashsalt": key})
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        draw(figure.subplots())
        text = io.StringIO()
        # What `savefig` ends in, without its drawing everything twice.
        FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None, "Creator": None})
    return _inline(text.getvalue(), key, title, description)


def shortened(text: str, size: int = 26) -> str:
    """A label that leaves room for the drawing."""
    return text if len(text) <= size else text[: size - 1] + "…"


def _inline(svg: str, key: str, title: str, description: str) -> str:
    box = re.search(r'viewBox="([^"]*)"', svg)
    body = re.search(r"<svg [^>]*>(.*)</svg>", svg, re.DOTALL)
    if box is None or body is None:
        raise InputError("matplotlib wrote no SVG that this version reads: install the one that constraints.txt names")
    inner = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body[1], flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', inner))
    inner = re.sub(r"<[^<>]*>", lambda tag: _tag(tag[0], key, used), inner)
    inner = re.sub(r">\s+<", "><", inner.strip())
    inner = re.sub(r"<defs></defs>|<g></g>", "", inner)
    return (
        f'<svg class="plot" viewBox="{box[1]}" role="img" aria-labelledby="{key}-t {key}-d">'
        f'<title id="{key}-t">{html.escape(title)}</title><desc id="{key}-d">{html.escape(description)}</desc>'
        f"{inner}</svg>"
    )


def _tag(tag: str, key: str, used: set[str]) -> str:
    """One tag with identifiers of its own figure, the page's colours and font, and tenths of a pixel."""
    tag = re.sub(r' id="([^"]*)"', lambda m: f' id="{key}-{m[1]}"' if m[1] in used else "", tag)
    tag = re.sub(r'(url\(#|href="#)', rf"\g<1>{key}-", tag).replace("xlink:href", "href")
    tag = re.sub(r"font-family:[^;\"]*;? ?", "", tag)
    # Before matplotlib 3.9 or so, size and family come as one.
    tag = re.sub(r"font: ([^;'\"]*?\d+(?:\.\d+)?px)[^;\"]*", r"font-size: \1", tag)
    tag = re.sub(r"-?\d+\.\d{2,}", lambda m: f"{float(m[0]):.1f}".removesuffix(".0"), tag)
    tag = re.sub(r' transform="rotate\(-?0(?: [^)]*)?\)"', "", tag)
    for colour, name in _VARIABLES.items():
        tag = tag.replace(colour, f"var(--{name})")
    return re.sub(r"\s+", " ", tag)
