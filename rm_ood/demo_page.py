"""What the demo found, as a table for a terminal and as one self-contained page."""

from __future__ import annotations

import html
import textwrap
from typing import Any

from rm_ood.study.plots import dot_plot

_COLUMNS = (
    ("n", "n"), ("accuracy", "acc"), ("ece", "ECE"), ("auroc.combined.default", "any"), ("auroc.prompt.default", "prompt"),
    ("auroc.response.default", "resp."), ("auroc.response.final", "final"), ("auroc.response.reward", "reward"),
    ("auroc.pair.energy", "energy"), ("flag_rate.combined", "any"), ("flag_rate.prompt", "prompt"),
    ("flag_rate.response", "resp."),
)  # fmt: skip
_NOTES = (
    "AUROC against the clean rows, one response per prompt (energy: one pair); .5 is blind. any, prompt, resp.: the guard's "
    "default channels, joined and by axis. final: the distance in what the head reads, alone. reward: |standardised "
    "reward|, alone. energy: the paper's score of a reward pair. flagged: share of the items whose p-value is at most alpha.",
    "Languages are not translations of the English rows: a one-sided language row pairs texts at random, so read it beside "
    "`random pair`, which does the same in English. Accuracy is given where the preference still means something.",
)


def table(report: dict[str, Any]) -> str:
    """The report as text of at most 110 columns."""
    width = 24
    head = f"{'':{width}}" + f"{'':>21}" + f"{'AUROC':^42}" + f"{'flagged':^21}"
    names = f"{'shift, side':{width}}" + "".join(f"{title:>7}" for _, title in _COLUMNS)
    lines = [*_summary(report), "", head.rstrip(), names, "-" * len(names)]
    for row in _rows(report):
        lines.append(f"{row[0]:{width}}" + "".join(f"{cell:>7}" for cell in row[1:]))
    return "\n".join([*lines, "", *_wrapped(_NOTES)])


def page(report: dict[str, Any]) -> str:
    """The report as an HTML page that loads nothing from elsewhere."""
    shifts = report["shifts"]
    labels = [_label(row) for row in shifts]
    detection = dot_plot(
        "AUROC against clean English (energy: of pairs)",
        labels,
        {
            "prompt axis": [row["auroc"]["prompt"]["default"] for row in shifts],
            "response axis": [row["auroc"]["response"]["default"] for row in shifts],
            "final only": [row["auroc"]["response"]["final"] for row in shifts],
            "energy": [row["auroc"]["pair"]["energy"] for row in shifts],
        },
        {"blind": 0.5},
    )
    flags = dot_plot(
        "Share flagged, clean English first",
        ["clean", *labels],
        {
            "either axis": [report["id"]["false_alarm_rate"], *(row["flag_rate"]["combined"] for row in shifts)],
            "prompt axis": [None, *(row["flag_rate"]["prompt"] for row in shifts)],
            "response axis": [None, *(row["flag_rate"]["response"] for row in shifts)],
        },
        {"alpha": report["alpha"]},
    )
    paired = [row for row in shifts if row["accuracy"] is not None]
    accuracy = dot_plot(
        "Reward model: accuracy and calibration error, clean English first",
        ["clean", *(_label(row) for row in paired)],
        {
            "accuracy": [report["id"]["accuracy"], *(row["accuracy"] for row in paired)],
            "ECE": [report["id"]["ece"], *(row["ece"] for row in paired)],
        },
        {"chance": 0.5},
    )
    cells = "".join(
        f"<tr><th>{html.escape(row[0])}</th>{''.join(f'<td>{cell}</td>' for cell in row[1:])}</tr>"
        for row in _rows(report)
    )
    titles = "".join(f"<th>{title}</th>" for _, title in _COLUMNS)
    summary = "".join(f"<p>{html.escape(line)}</p>" for line in _summary(report))
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in _NOTES)
    versions = html.escape(", ".join(f"{name} {value}" for name, value in report["versions"].items()))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>rm_ood demo</title><style>{_STYLE}</style>'
        f"</head><body><h1>rm_ood demo</h1>{summary}<h2>What is detected</h2>{detection}<h2>What is flagged</h2>{flags}"
        f"<h2>What the reward model still knows</h2>{accuracy}<h2>Numbers</h2><table><thead>"
        '<tr><td></td><td colspan="3"></td><th colspan="6">AUROC</th><th colspan="3">flagged</th></tr>'
        f"<tr><th>shift, side</th>{titles}</tr></thead><tbody>{cells}</tbody></table>{notes}"
        f"<p>{report['seconds']} seconds; {versions}</p></body></html>\n"
    )


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:62em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;font-variant-numeric:tabular-nums}th,td{padding:.15em .6em;text-align:right}"
    "tbody th{text-align:left;font-weight:normal}tbody tr:nth-child(even){background:#f6f6f6}svg{max-width:100%}"
)


def _summary(report: dict[str, Any]) -> list[str]:
    clean, cal = report["id"], report["calibration"]
    mean, low, high = (100 * x for x in cal["expected_false_alarm_rate"])
    return [
        f"Reward model on {clean['n']} held-out English prompts: accuracy {clean['accuracy']:.3f}, ECE {clean['ece']:.3f}.",
        f"Guard: alpha {report['alpha']:g}, calibrated on n = {cal['n']} prompts, rank k = {cal['k']}: expected "
        f"false-alarm rate {mean:.1f} % (90 % interval {low:.1f} to {high:.1f} %); "
        f"measured {100 * clean['false_alarm_rate']:.1f} %.",
    ]


def _rows(report: dict[str, Any]) -> list[list[str]]:
    clean = report["id"]
    first = {"n": clean["n"], "accuracy": clean["accuracy"], "ece": clean["ece"]}
    rows = [("clean English", {**first, "flag_rate": {"combined": clean["false_alarm_rate"]}})]
    rows += [(_label(row), row) for row in report["shifts"]]
    return [[label, *(_cell(row, path) for path, _ in _COLUMNS)] for label, row in rows]


def _label(row: dict[str, Any]) -> str:
    severity = "" if row["severity"] is None else f" {row['severity']:g}"
    return f"{row['name']}{severity}, {row['side']}"


def _cell(row: dict[str, Any], path: str) -> str:
    value: Any = row
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def _wrapped(notes: tuple[str, ...]) -> list[str]:
    return [line for note in notes for line in textwrap.wrap(note, 108)]
