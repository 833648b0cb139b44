"""Parts of self-contained HTML pages: escaped tables, lists and facts, and one style, light, dark and printable."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any


class Markup(str):
    """Text that is HTML already; everything else is escaped."""

    __slots__ = ()


class Text(str):
    """A cell of words: it stands left, numbers stand right."""

    __slots__ = ()


def whole_page(
    title: str, heading: str, lead: str, sections: Iterable[tuple[str, str]], style: str = "", contents: bool = False
) -> str:
    """A page that loads nothing: no script, no font, no picture from elsewhere.

    Args:
        title: of the window; plain text, as `heading` is.
        lead: HTML that stands before the sections.
        sections: plain title and HTML of each; one without content is left out.
        style: CSS after `STYLE`.
        contents: links to the sections before them.
    """
    full = [(name, content) for name, content in sections if content]
    place = ["" if not contents else f' id="section-{number}"' for number in range(len(full))]
    body = "".join(
        f"<section{where}><h2>{escaped(name)}</h2>{content}</section>"
        for where, (name, content) in zip(place, full, strict=True)
    )
    if contents:
        links = "".join(f'<a href="#section-{number}">{escaped(name)}</a> ' for number, (name, _) in enumerate(full))
        lead += f"<nav>{links}</nav>"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escaped(title)}</title><style>{STYLE}{style}</style></head><body><h1>{escaped(heading)}</h1>"
        f"{lead}{body}</body></html>\n"
    )


STYLE = (
    ":root{color-scheme:light dark;--ink:#1d2430;--soft:#5b6472;--line:#d9dde3;--band:#f4f6f8;--paper:#fff;--mark:#1f6fb2;"
    "--warn:#b3261e;--good:#1b7837}"
    "@media(prefers-color-scheme:dark){:root{--ink:#e4e7ec;--soft:#9aa4b2;--line:#353c47;--band:#1c222b;--paper:#12161c;"
    "--mark:#6cb2ee;--warn:#ff8a80;--good:#7fcf94}}"
    "body{font:15px/1.55 system-ui,sans-serif;max-width:58em;margin:2em auto;padding:0 1.2em;color:var(--ink);"
    "background:var(--paper)}h1{font-size:1.7em;margin-bottom:.3em}h2{font-size:1.15em;margin:2em 0 .5em;"
    "border-bottom:1px solid var(--line);padding-bottom:.2em}.lead{font-size:1.08em}p,li{max-width:48em}"
    ".wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;margin:.6em 0}"
    "caption{text-align:left;color:var(--soft);padding-bottom:.3em}"
    "th,td{padding:.25em .8em .25em 0;text-align:right;border-bottom:1px solid var(--line);vertical-align:top}"
    "th:first-child,th.t,td.t{text-align:left}thead th{color:var(--soft);font-weight:600}tbody th{font-weight:500}"
    ".facts th,.facts td{text-align:left}.facts th{white-space:nowrap}.facts td{overflow-wrap:anywhere}.soft{color:var(--soft)}"
    ".yes{color:var(--good)}.no{color:var(--warn)}svg{vertical-align:middle}text{fill:var(--ink);font-size:11px}"
    "text.soft{fill:var(--soft)}code{font-size:.87em}"
    "@media print{body{max-width:none;margin:0;font-size:11pt}section{break-inside:avoid}}"
)


def table(
    head: Sequence[Any], rows: Iterable[Sequence[Any]], caption: str, groups: Sequence[tuple[str, int]] = ()
) -> str:
    """Header cells on top and in the first column; `Text` cells stand left, all others right.

    Args:
        groups: name and number of columns of each group, from the left: a first line of the head; "" groups nothing.
    """
    titles = "".join(f'<th scope="col"{_left(cell)}>{escaped(cell)}</th>' for cell in head)
    over = "".join(
        f'<th scope="colgroup" colspan="{span}">{escaped(name)}</th>' if name else f'<td colspan="{span}"></td>'
        for name, span in groups
    )
    body = "".join(
        f'<tr><th scope="row">{escaped(row[0])}</th>'
        + "".join(f"<td{_left(cell)}>{escaped(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    title = f"<caption>{escaped(caption)}</caption>" if caption else ""
    top = f"<tr>{over}</tr>" if over else ""
    return f'<div class="wide"><table>{title}<thead>{top}<tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>'


def fact_table(pairs: Iterable[tuple[str, Any]]) -> str:
    """A table of two columns: name and fact."""
    rows = "".join(f'<tr><th scope="row">{escaped(name)}</th><td>{escaped(fact)}</td></tr>' for name, fact in pairs)
    return f'<table class="facts"><tbody>{rows}</tbody></table>'


def bullets(notes: Sequence[str]) -> str:
    """A list; nothing for no notes."""
    return f"<ul>{''.join(f'<li>{escaped(note)}</li>' for note in notes)}</ul>" if notes else ""


def escaped(value: Any) -> str:
    """HTML of a value's text; `Markup` as it is."""
    return value if isinstance(value, Markup) else html.escape(str(value))


def _left(cell: Any) -> str:
    return ' class="t"' if isinstance(cell, Text) else ""
