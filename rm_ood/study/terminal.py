"""A study's main numbers as a table for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from rm_ood.channels import GIVEN_PROMPT
from rm_ood.study.findings import Doc, at, clean_lines, label, left_out

_COLUMNS = (
    ("n", "n"), ("accuracy", "acc"), ("ece", "ECE"), ("auroc.combined.default", "any"), ("auroc.prompt.default", "prompt"),
    ("auroc.response.default", "resp."), ("auroc.response_given_prompt.default", "given"),
    ("auroc.response.final", "final"), ("auroc.response.reward", "reward"), ("auroc.pair.energy", "energy"),
    ("flag_rate.combined", "any"), ("flag_rate.prompt", "prompt"), ("flag_rate.response", "resp."),
    ("flag_rate.response_given_prompt", "given"),
)  # fmt: skip
_NOTES = (
    "AUROC against the clean rows, one response per prompt (energy: one pair); .5 is blind. any, prompt, resp.: the guard's "
    "joined channels, in all and by axis; given: the response given the prompt. final: the distance in what the head "
    "reads, alone. reward: |standardised reward|, alone. energy: the paper's score of a reward pair. flagged: share of the "
    "items whose p-value is at most alpha.",
)
_NARROW, _WIDE, _WIDTH = 24, 44, 108


def table(doc: Doc, rows: str = "clean rows", notes: Sequence[str] = ()) -> str:
    """The document of a study as text of about 110 columns, 125 where the guard judges the response given the prompt.

    Args:
        rows: what the clean rows are, in words.
        notes: more to read below the table.
    """
    clean = [(name, {**found, "auroc": None}) for name, found in clean_lines(doc, doc["shifts"])]
    lines = [*clean, *((label(row), row) for row in doc["shifts"])]
    width = min(_WIDE, max(_NARROW, *(len(name) for name, _ in lines)))
    columns = [entry for entry in _COLUMNS if GIVEN_PROMPT not in entry[0] or _is_judged(doc, GIVEN_PROMPT)]
    n_areas, n_flags = (sum(path.startswith(kind) for path, _ in columns) for kind in ("auroc.", "flag_rate."))
    head = f"{'':{width}}" + f"{'':>21}" + f"{'AUROC':^{7 * n_areas}}" + f"{'flagged':^{7 * n_flags}}"
    names = f"{'shift, side':{width}}" + "".join(f"{title:>7}" for _, title in columns)
    body = [
        f"{_cut(name, width):{width}}" + "".join(f"{_cell(row, path):>7}" for path, _ in columns) for name, row in lines
    ]
    below = [line for note in (*_NOTES, *notes) for line in textwrap.wrap(note, _WIDTH)]
    return "\n".join([*_summary(doc, rows), "", head.rstrip(), names, "-" * len(names), *body, "", *below])


def _summary(doc: Doc, rows: str) -> list[str]:
    clean, cal = doc["id"], doc["calibration"]
    if clean["accuracy"] is None:
        told = "no pair has two finite rewards"
    else:
        told = f"accuracy {clean['accuracy']:.3f}, ECE {clean['ece']:.3f}"
    lines = [f"Reward model on {clean['n']} {rows}: {told}."]
    lines += [f"Left out as unusable: {out}."] if (out := left_out(doc)) else []
    flagged = f"measured {100 * clean['false_alarm_rate']:.1f} %."
    if cal["by_group"]:
        return [*lines, f"Guard: alpha {doc['alpha']:g}, calibrated in {len(cal['by_group'])} groups; {flagged}"]
    mean, low, high = (100 * x for x in cal["expected_false_alarm_rate"])
    return [
        *lines,
        f"Guard: alpha {doc['alpha']:g}, calibrated on n = {cal['n']} prompts, rank k = {cal['k']}: expected "
        f"false-alarm rate {mean:.1f} % (90 % interval {low:.1f} to {high:.1f} %); {flagged}",
    ]


def _is_judged(doc: Doc, axis: str) -> bool:
    return any(at(found, "flag_rate", axis) is not None for found in (doc["id"], *doc["shifts"]))


def _cut(name: str, width: int) -> str:
    return name if len(name) <= width else f"{name[: width - 3]}..."


def _cell(row: Doc, path: str) -> str:
    value = at(row, *path.split("."))
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.3f}"
