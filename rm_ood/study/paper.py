"""The study of LeVine et al. on files of reward pairs: their definitions, and the correct ones beside them.

Reference:
    LeVine et al., "A baseline analysis of reward models' ability to accurately analyze foundation models under
    distribution shift", arXiv 2311.14743, 2023, and its released code and scores.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from rm_ood.study.detection import aupr, auroc, fpr95_id_positive, fpr95_ood_positive
from rm_ood.study.metrics import energy_score, fit_temperature, max_softmax_score, pair_metrics
from rm_ood.study.rewards import Floats
from rm_ood.study.score_files import read_pairs_file, score_files

# A tie is correct; [low, high) bins, of which none holds confidence 1; the maximum over bins of more than 30 pairs.
PAPER: Mapping[str, Any] = {"ties": "correct", "closed": "left", "keep_certain": False, "min_count": 31}
_PAPER_NUMBERS = ("accuracy", "confidence", "ece", "mce", "brier", "nll", "temperature")
_DETECTORS = {"energy": energy_score, "max_softmax": max_softmax_score}
_FILES = ("study-scores.json", "study-scores.md", "study-scores.csv")

Pairs = tuple[Floats, Floats]


def study_scores(
    paths: Iterable[str | os.PathLike[str]], clean: str | os.PathLike[str] | None = None, *, progress: bool = True
) -> dict[str, Any]:
    """Accuracy, calibration and detection of every file of reward pairs, by the paper's definitions and the correct ones.

    Args:
        paths: CSV files with the columns `chosen` and `rejected`, plain or gzip; folders are walked.
        clean: the in-distribution file of all of them; otherwise the paper's folder layout says which it is.
        progress: a bar on stderr.

    Returns:
        `files`, a row each: `file`, `condition`, `side`, `severity`, `id_file`, `paper` (its numbers, and `gap`, confidence
        minus accuracy), `correct` (those of `pair_metrics`, with the clean file's temperature), and `energy` and
        `max_softmax` (`auroc`, `fpr95` in both conventions, `aupr`; None for a clean file and where there is none).

    Raises:
        FileNotFoundError, InputError, NonFiniteError: as `score_files` and `read_pairs_file`.
    """
    files = score_files(paths, clean)
    names = _names([file.path for file in files])
    rows: list[dict[str, Any]] = []
    # Files come by clean file, that one first: one clean file at a time is held.
    held: Path | None = None
    for file in tqdm(files, desc="files", disable=not progress):
        pairs = read_pairs_file(file.path)
        if file.is_clean:
            held, ground, temperature = file.path, pairs, fit_temperature(*pairs)
        compared = file.clean is not None and file.clean == held
        rows.append(
            {
                "file": names[file.path],
                "condition": file.condition,
                "side": file.side,
                "severity": file.severity,
                "id_file": names[file.clean] if file.clean is not None else None,
                **_numbers(pairs, temperature if compared else None),
                **(_detection(ground, pairs) if compared and not file.is_clean else dict.fromkeys(_DETECTORS)),
            }
        )
    return {"files": rows}


def write_study(doc: Mapping[str, Any], folder: str | os.PathLike[str]) -> list[Path]:
    """Write a study as JSON, Markdown and a CSV table; returns their paths."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    texts = (json.dumps(doc, indent=1, allow_nan=False) + "\n", markdown(doc) + "\n", _table_csv(doc))
    written = [target / name for name in _FILES]
    for path, text in zip(written, texts, strict=True):
        path.write_text(text, encoding="utf-8")
    return written


def markdown(doc: Mapping[str, Any]) -> str:
    """The study as Markdown: a table for each clean file and its shifted ones."""
    groups: dict[str | None, list[Mapping[str, Any]]] = {}
    for row in doc["files"]:
        groups.setdefault(row["id_file"], []).append(row)
    parts = ["# Reward pairs under shift", _LEGEND]
    for origin, rows in groups.items():
        parts += [f"## {_escaped(origin or 'Without a clean file')}", _table(rows)]
    return "\n\n".join(parts)


_LEGEND = """\
Two numbers: the paper's definition / the correct one. The paper counts a tie as right, its bins are [low, high) and lose
confidence 1; the correct definitions give a tie half a credit, bins are (low, high] and lose nothing. Accuracy (acc),
mean confidence (conf), gap (conf - acc by the paper), expected and maximum calibration error (ECE, MCE) in %; debiased
ECE and ECE at the clean file's temperature by the correct definitions. T: temperature with the smallest NLL (inf: none
is finite). AUROC, AUPR and FPR: of the pair's energy and of max-softmax (MSP) against the clean file, shifted = positive.
FPR95 OOD+: share of clean pairs flagged where 95 % of the shifted are caught (the paper); ID+: share of shifted pairs
accepted where 95 % of the clean are kept (a guard's operating point)."""


def _numbers(pairs: Pairs, temperature: float | None) -> dict[str, Any]:
    theirs = pair_metrics(*pairs, **PAPER)
    paper = {name: theirs[name] for name in _PAPER_NUMBERS}
    paper["gap"] = float(theirs["confidence"] or 0) - float(theirs["accuracy"] or 0)
    return {
        "paper": paper,
        "correct": pair_metrics(*pairs, temperature=temperature),
    }


def _detection(clean: Pairs, shifted: Pairs) -> dict[str, Any]:
    found = {}
    for name, score in _DETECTORS.items():
        sides = score(*clean), score(*shifted)
        found[name] = {
            "auroc": auroc(*sides),
            "fpr95": {"id_positive": fpr95_id_positive(*sides), "ood_positive": fpr95_ood_positive(*sides)},
            "aupr": aupr(*sides),
        }
    return found


def _names(paths: Sequence[Path]) -> dict[Path, str]:
    """Each path as seen from the deepest folder that holds all of them."""
    base = os.path.commonpath([path.absolute().parent for path in paths])
    return {path: path.absolute().relative_to(base).as_posix() for path in paths}


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [list(_COLUMNS), ["---"] + ["---:"] * (len(_COLUMNS) - 1), *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) if not i else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
        + " |"
        for line in lines
    )  # fmt: skip


_COLUMNS = (
    "condition", "n", "ties %", "acc", "conf", "gap", "ECE", "MCE", "debiased ECE", "ECE at ID T", "Brier", "NLL", "T",
    "AUROC", "FPR95 OOD+", "FPR95 ID+", "AUPR", "MSP AUROC",
)  # fmt: skip


def _cells(row: Mapping[str, Any]) -> list[str]:
    paper, correct = row["paper"], row["correct"]
    energy, softmax = row["energy"], row["max_softmax"]

    def both(name: str) -> str:
        return f"{_percent(paper[name])} / {_percent(correct[name])}"

    return [
        _escaped(row["condition"]),
        str(correct["n_pairs"]),
        _percent(correct["ties"] / correct["n_pairs"]),
        both("accuracy"),
        _percent(correct["confidence"]),
        f"{100 * paper['gap']:+.1f}",
        both("ece"),
        both("mce"),
        _percent(correct["ece_debiased"]),
        _percent(correct["ece_at_id_temperature"]),
        f"{correct['brier']:.4f}",
        f"{correct['nll']:.3f}",
        "inf" if correct["temperature"] is None else f"{correct['temperature']:.2f}",
        *(
            ["-"] * 4
            if energy is None
            else [
                f"{value:.3f}"
                for value in (
                    energy["auroc"], energy["fpr95"]["ood_positive"], energy["fpr95"]["id_positive"], energy["aupr"],
                )
            ]
        ),
        "-" if softmax is None else f"{softmax['auroc']:.3f}",
    ]  # fmt: skip


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _table_csv(doc: Mapping[str, Any]) -> str:
    flat = [_flat({k: v for k, v in row.items() if k not in _DETECTORS or v is not None}) for row in doc["files"]]
    # A clean file has no detection: its cells stay empty.
    columns = list(dict.fromkeys(name for row in flat for name in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue()


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat
