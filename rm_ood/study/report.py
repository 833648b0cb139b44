"""The report of a study, from its document alone: one self-contained page, and the same tables as Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rm_ood.markup import Markup, Text, escaped, fact_table, table, whole_page
from rm_ood.study import findings, plots, svg
from rm_ood.study.findings import Cell, Doc, Table, at, base, label, name_of, telling

# Figures of one kind on a page; a study of many conditions shows those that tell most.
_PANELS, _FAMILIES, _DOTS, _CURVES = 9, 6, 24, 5
_ROWS_SHOWN = 60
_FIRST_DETECTORS = ("combined/default", "prompt/default", "response/default", "response/final", "pair/energy")
_STYLE = (
    "body{max-width:80em}th,td{padding-right:.65em}figure{margin:0;min-width:0;max-width:27em}figcaption{font-weight:600;font-size:.93em}"
    "h1,h3,figcaption{overflow-wrap:anywhere}h3{font-size:1em;margin:1.6em 0 .2em}"
    ".grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(20em,100%),1fr));gap:1.2em 1.6em;margin:1em 0;"
    "align-items:start}.beside{display:flex;flex-wrap:wrap;gap:1em 3em}.beside figure{flex:1 1 20em}.beside .wide{flex:1 1 22em}"
    ".lead p{margin:.3em 0}.lead p:first-child{font-size:1.08em;font-weight:600}"
    "nav{margin:1.2em 0 0;font-size:.93em}nav a{color:var(--mark);margin-right:1.2em;white-space:nowrap}"
    "small{display:block;color:var(--soft);font-size:.8em;white-space:nowrap}table{font-size:.9em}"
    "caption{max-width:min(60em,100vw - 3em);position:sticky;left:0}thead th{vertical-align:bottom;min-width:3.6em}"
    "thead th[scope=colgroup]{text-align:center;border-bottom:2px solid var(--line)}.long{display:inline-block;width:8.5em}"
    ".wide tbody th,.wide thead tr:last-child th:first-child{position:sticky;left:0;background:var(--paper);min-width:6em}"
    "tbody tr:hover>*{background:var(--band)}tbody th{overflow-wrap:anywhere}"
    "details{margin:.8em 0}summary{cursor:pointer;color:var(--mark);font-weight:600}"
    "blockquote{margin:.4em 0;padding:.2em .8em;border-left:3px solid var(--line);white-space:pre-wrap;"
    "overflow-wrap:anywhere}.note{border-left:3px solid var(--warn);padding-left:.8em}"
    "@media(min-width:50em){.wide tbody th{min-width:9.5em}}"
    "@page{size:landscape}@media print{section{break-inside:auto}h2,h3,caption{break-after:avoid}"
    "figure,tr{break-inside:avoid}nav{display:none}"
    "thead{display:table-header-group}.wide{overflow:visible}table{font-size:7.5pt}th,td{padding-right:.4em}"
    ".wide th,.wide thead tr:last-child th:first-child{min-width:0;position:static}.long{width:7em}"
    "small{white-space:normal}.grid{grid-template-columns:1fr 1fr 1fr}}"
)


def html_page(doc: Doc) -> str:
    """The report as an HTML page that loads nothing from elsewhere.

    Args:
        doc: what `Study.to_dict` gives. `threshold`, the joined OOD score above which an item is flagged, is drawn in the
            score distributions where it is there. Texts are shown only where the document has `examples`.

    Raises:
        InputError: matplotlib is missing.
    """
    svg.require_matplotlib()
    title = str(at(doc, "title") or "Shift study of a reward model")
    lead = "".join(f"<p>{escaped(sentence)}</p>" for sentence in findings.summary(doc))
    sections = [
        ("By shift and side", _html(findings.overview(doc)) + _bird_view(doc)),
        ("How sure, how right", _reliability(doc)),
        ("Against severity", _severity(doc)),
        ("What the guard sees", _scores(doc) + _roc(doc) + _detectors(doc)),
        ("Does the flag tell?", _flag_tells(doc)),
        ("Which side is flagged", _attribution(doc)),
        ("Subsets", _folded(findings.subsets(doc), "by subset")),
        ("The reward model's calibration in full", _html(findings.calibration_numbers(doc))),
        ("Flagged examples", _examples(doc)),
        ("How it was made", fact_table(findings.how_made(doc))),
    ]
    return whole_page(title, title, f'<div class="lead">{lead}</div>', sections, svg.STYLE + _STYLE, contents=True)


def markdown(doc: Doc) -> str:
    """The report's sentences and tables as Markdown; texts only where the document has `examples`."""
    parts = [f"# {_plain(at(doc, 'title') or 'Shift study of a reward model')}"]
    parts += [_plain(sentence) for sentence in findings.summary(doc)]
    tables = [
        ("By shift and side", findings.overview(doc)),
        ("Every detector: AUROC", findings.detectors(doc, "auroc", "Against clean; .5 is blind.", "auroc")),
        *((f"Every detector: {title}", _fpr(doc, key, caption)) for key, title, caption in _FPR95),
        ("Flagged against not flagged", findings.selective(doc)),
        ("Which side is flagged", findings.attribution(doc)),
        ("Subsets", findings.subsets(doc)),
        ("The reward model's calibration in full", findings.calibration_numbers(doc)),
    ]
    parts += [f"## {title}\n\n{_markdown(found)}" for title, found in tables if found is not None]
    if at(doc, "examples"):
        lines = [
            f"- {_plain(label_of(e))}: prompt {_plain(e['prompt'])}; response {_plain(e['response'])}"
            for e in doc["examples"]
        ]
        parts.append("## Flagged examples\n\nTexts of the data, which may offend.\n\n" + "\n".join(lines))
    made = "\n".join(f"- {name}: {_plain(fact)}" for name, fact in findings.how_made(doc))
    return "\n\n".join([*parts, f"## How it was made\n\n{made}"]) + "\n"


def label_of(example: Mapping[str, Any]) -> str:
    """Where an example comes from, and its numbers."""
    reward = "none" if example["reward"] is None else f"{example['reward']:+.2f}"
    return f"{example['shift']}, {example['side']}: p {example['p_value']:.3g}, reward {reward}"


def _bird_view(doc: Doc) -> str:
    """Accuracy and ECE, and shares flagged, of every condition by side."""
    models, flags = [], []
    for side in findings.sides(doc):
        rows = telling(doc, [row for row in doc["shifts"] if row["side"] == side], _DOTS)
        measured = [row for row in rows if at(row, "accuracy") is not None]
        if measured:
            clean = findings.clean_lines(doc, measured)
            known, names = _with_clean(clean, measured)
            series = {
                title: [(at(row, key), _span(at(row, "intervals", key))) for row in known]
                for key, title in (("accuracy", "accuracy"), ("ece", "ECE"))
            }
            drawn = plots.dots(f"dots-{_key(side)}", side, "accuracy and ECE", names, series, ("chance", 0.5))
            models.append(_figure(f"Reward model, {side} shifted", drawn))
        clean = findings.clean_lines(doc, rows)
        known, names = _with_clean(clean, rows)
        rates = {
            title: [(_rate(row, key), _flag_span(row, key)) for row in known]
            for key, title in findings.flags(doc).items()
        }
        if any(value is not None for values in rates.values() for value, _ in values[len(clean) :]):
            drawn = plots.dots(f"flags-{_key(side)}", side, "share flagged", names, rates, ("alpha", doc["alpha"]))
            flags.append(_figure(f"Flagged, {side} shifted", drawn))
    return _grid(models) + _grid(flags)


def _with_clean(clean: list[tuple[str, Doc]], rows: list[Doc]) -> tuple[list[Doc], list[str]]:
    return [*(found for _, found in clean), *rows], [*(name for name, _ in clean), *(name_of(row) for row in rows)]


def _reliability(doc: Doc) -> str:
    rows = [row for row in doc["shifts"] if at(row, "reliability") and at(base(doc, row), "reliability")]
    if not rows:
        return ""
    return _few(doc, rows) + _grid(
        _figure(
            label(row),
            plots.reliability(f"rel-{number}", label(row), base(doc, row)["reliability"], row["reliability"]),
        )
        for number, row in enumerate(telling(doc, rows, _PANELS))
    )


def _severity(doc: Doc) -> str:
    families: dict[str, dict[str, list[Doc]]] = {}
    for row in doc["shifts"]:
        if at(row, "severity") is not None:
            families.setdefault(str(row["name"]), {}).setdefault(str(row["side"]), []).append(row)
    several = {n: by for n, by in families.items() if any(len(rows) > 1 for rows in by.values())}
    parts = []
    for number, (name, by_side) in enumerate(list(several.items())[:_FAMILIES]):
        for key, unit in (("accuracy", "accuracy"), ("ece", "ECE"), ("flagged", "share flagged")):
            lines = {}
            for side, rows in by_side.items():
                found = [(float(r["severity"]), *_measured(r, key)) for r in rows]
                points = sorted((at_, value, span) for at_, value, span in found if value is not None)
                if points:
                    lines[side] = points
            if lines:
                value, _ = _measured(doc["id"], key)
                drawn = plots.severity(f"sev-{number}-{key}", name, unit, value, lines)
                parts.append(_figure(f"{name}: {unit}", drawn))
    return _grid(parts)


def _scores(doc: Doc) -> str:
    """Distributions of the joined OOD score with the threshold, and of the reward margin."""
    text = ""
    threshold = at(doc, "threshold")
    line = None if threshold is None else ("threshold", float(threshold))
    for key, title, unit, mark in (
        ("ood_scores", "OOD scores", "OOD score", line),
        ("margins", "Margins of the reward", "chosen minus rejected reward", ("tie", 0.0)),
    ):
        rows = [row for row in doc["shifts"] if at(row, key) and at(base(doc, row), key)]
        if rows:
            ends = '<p class="soft">Outermost bars hold what lies beyond them.</p>'
            text += f"<h3>{title}</h3>{_few(doc, rows)}{ends}" + _grid(
                _figure(
                    label(row),
                    plots.distributions(f"{key[:3]}-{number}", label(row), unit, base(doc, row)[key], row[key], mark),
                )
                for number, row in enumerate(telling(doc, rows, _PANELS))
            )
    return text


def _roc(doc: Doc) -> str:
    rows = [row for row in doc["shifts"] if at(row, "roc")]
    if not rows:
        return ""
    parts = []
    for number, row in enumerate(telling(doc, rows, _PANELS)):
        known = [name for name in _FIRST_DETECTORS if name in row["roc"]]
        names = [*known, *(name for name in row["roc"] if name not in known)][:_CURVES]
        curves = {name.replace("combined", "either"): row["roc"][name] for name in names}
        found = {name: at(row, "auroc", *name.replace("either", "combined").split("/", 1)) for name in curves}
        areas = {name: area for name, area in found.items() if area is not None}
        parts.append(_figure(label(row), plots.roc(f"roc-{number}", label(row), curves, areas)))
    return f"<h3>ROC curves, with their areas</h3>{_few(doc, rows)}{_grid(parts)}"


_FPR95 = (
    (
        "ood_positive",
        "clean flagged where 95 % of shifted are caught",
        "FPR95 with the shifted as positives: share of the clean items flagged at the threshold that catches 95 % of the "
        "shifted ones.",
    ),
    (
        "id_positive",
        "shifted let through where 95 % of clean are kept",
        "FPR95 with the clean as positives: share of the shifted items let through at the threshold that keeps 95 % of the "
        "clean ones.",
    ),
)


def _fpr(doc: Doc, key: str, caption: str) -> Table | None:
    return findings.detectors(doc, f"fpr95_{key}", caption, "fpr95", key)


def _detectors(doc: Doc) -> str:
    caption = (
        "AUROC of every detector against the clean items, one response a prompt; under pair of rewards, one score a pair. "
        ".5 is blind."
    )
    text = _html(findings.detectors(doc, "auroc", caption, "auroc"))
    for key, title, caption in _FPR95:
        text += _details(f"Every detector: {title}", _html(_fpr(doc, key, caption)))
    return f"<h3>Every detector</h3>{text}" if text else ""


def _flag_tells(doc: Doc) -> str:
    text = ""
    places: dict[str, list[tuple[float, float]]] = {}
    for row in doc["shifts"]:
        if at(row, "accuracy") is not None and _rate(row, "combined") is not None:
            places.setdefault(str(row["side"]), []).append((row["flag_rate"]["combined"], row["accuracy"]))
    found = _folded(findings.selective(doc), "by condition")
    if places:
        title, clean = "Accuracy against share flagged", at(doc, "id", "accuracy")
        line = None if clean is None else ("clean", clean)
        drawn = plots.scatter("tells", title, ("share flagged", "accuracy"), places, line)
        text = f'<div class="beside">{_figure("A dot low on the left: wrong, and no warning", drawn)}{found}</div>'
    parts = []
    clean_curve = at(doc, "id", "risk_coverage")
    for side in findings.sides(doc):
        rows = [row for row in doc["shifts"] if row["side"] == side and at(row, "risk_coverage")]
        if rows and clean_curve:
            curves = {"clean": clean_curve} | {name_of(r): r["risk_coverage"] for r in telling(doc, rows, _CURVES - 1)}
            drawn = plots.risk_coverage(f"cover-{_key(side)}", side, curves)
            parts.append(_figure(f"{side} shifted", drawn))
    least = "<h3>Accuracy where only the least suspicious pairs are kept</h3>" if parts else ""
    return (text or found) + least + _grid(parts)


def _attribution(doc: Doc) -> str:
    places: dict[str, list[tuple[float, float]]] = {}
    for row in doc["shifts"]:
        x, y = _rate(row, "prompt"), _rate(row, "response")
        if x is not None and y is not None:
            places.setdefault(str(row["side"]), []).append((x, y))
    found = _html(findings.attribution(doc))
    if not places:
        return found
    axes = ("share flagged by the prompt axis", "by the response axis")
    drawn = plots.scatter("sides", "Prompt flag and response flag", axes, places, square=True)
    told = (
        "<p>A flag that tells the side keeps prompt shifts at the bottom right and response shifts at the top left.</p>"
    )
    return f'{told}<div class="beside">{_figure("Prompt flag and response flag", drawn)}{found}</div>'


def _examples(doc: Doc) -> str:
    if not at(doc, "examples"):
        return ""
    shown = "".join(
        f"<h3>{escaped(label_of(e))}</h3><p>Prompt</p><blockquote>{_words(e['prompt'])}</blockquote>"
        f"<p>Response</p><blockquote>{_words(e['response'])}</blockquote>"
        for e in doc["examples"]
    )
    warning = '<p class="note">Texts of the data, as they are: some may offend, and some may be private.</p>'
    return warning + _details(f"Show the texts ({len(doc['examples'])})", shown)


def _words(value: Any) -> str:
    # What a text file cannot hold (half a surrogate pair) is shown as a question mark.
    return escaped(str(value).encode("utf-8", "replace").decode())


def _html(found: Table | None) -> str:
    if found is None:
        return ""
    rows = [[_cell(value, place < found.words) for place, value in enumerate(row)] for row in found.rows]
    head = [Text(name) if place < found.words else _head(name) for place, name in enumerate(found.head)]
    return table(head, rows, found.caption, found.groups)


def _head(name: str) -> Any:
    # Else a long head is as narrow as its column, and many lines high.
    return Markup(f'<span class="long">{escaped(name)}</span>') if len(name) > 24 else name


def _cell(value: Any, words: bool) -> Any:
    if isinstance(value, Cell):
        number, span = value.shown()
        return Markup(f"{escaped(number)}<small>{escaped(span)}</small>") if span else number
    return Text(value) if words else value


def _folded(found: Table | None, what: str) -> str:
    """A long table is folded away."""
    if found is None or len(found.rows) <= _ROWS_SHOWN:
        return _html(found)
    return _details(f"{len(found.rows)} rows {what}", _html(found))


def _details(title: str, content: str) -> str:
    return f"<details><summary>{escaped(title)}</summary>{content}</details>" if content else ""


def _few(doc: Doc, rows: Sequence[Doc]) -> str:
    if len(rows) <= _PANELS:
        return ""
    which = "on each side those with the largest fall in accuracy; all are in the tables"
    return f'<p class="soft">{_PANELS} of {len(rows)} conditions: {which}.</p>'


def _figure(caption: str, drawn: str) -> str:
    return f"<figure><figcaption>{escaped(caption)}</figcaption>{drawn}</figure>"


def _grid(figures: Any) -> str:
    inside = "".join(figures)
    return f'<div class="grid">{inside}</div>' if inside else ""


def _measured(found: Doc, key: str) -> tuple[float | None, plots.Interval]:
    if key == "flagged":
        return _rate(found, "combined"), _flag_span(found, "combined")
    return at(found, key), _span(at(found, "intervals", key))


def _rate(found: Doc, name: str) -> float | None:
    rate: float | None = at(found, "flag_rate", name)
    return at(found, "false_alarm_rate") if rate is None and name == "combined" else rate


def _flag_span(found: Doc, name: str) -> plots.Interval:
    return _span(at(found, "intervals", "flag_rate", name))


def _span(found: Any) -> plots.Interval:
    return None if found is None else (float(found[0]), float(found[1]))


def _key(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "other"


def _markdown(found: Table) -> str:
    def cell(value: Any) -> str:
        if isinstance(value, Cell):
            number, span = value.shown()
            return f"{number} ({span})" if span else number
        return _plain(value)

    # Markdown has no second line of heads: the group goes into each.
    over = [name for name, span in found.groups for _ in range(span)] or [""] * len(found.head)
    head = [_plain(f"{group}: {name}" if group else name) for group, name in zip(over, found.head, strict=True)]
    lines = [head, ["---"] * found.words + ["---:"] * (len(head) - found.words)]
    lines += [[cell(value) for value in row] for row in found.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{_plain(found.caption)}"


def _plain(value: Any) -> str:
    """Text on one line without meaning for Markdown or HTML."""
    line = " ".join(str(value).encode("utf-8", "replace").decode().split())
    return re.sub(r"([\\`*_{}\[\]<>|#~])", r"\\\1", line.replace("&", "&amp;"))
