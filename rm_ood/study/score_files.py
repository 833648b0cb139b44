"""Files of reward pairs, and what their place says: condition, side, severity, and which file is the clean one.

The layout is that of the scores that LeVine et al. released: `english_original_scores.csv` beside
`translation/<language>/`, and `<side>/00_scores.csv` ... `09_scores.csv` for word noise of strength 0 to .9.
"""

from __future__ import annotations

import csv
import gzip
import io
import math
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rm_ood.errors import InputError, NonFiniteError

COLUMNS = ("chosen", "rejected")
_SUFFIXES = (".csv", ".csv.gz")
_ENGLISH, _WORD_NOISE = "english_original_scores", re.compile(r"(\d\d)_scores")
_SIDES = {"prompt": "prompt", "response": "response", "prompt_and_response": "both"}


@dataclass(frozen=True)
class ScoreFile:
    """A file of reward pairs: `side` is prompt, response, both or back (translated there and back), or not known."""

    path: Path
    condition: str
    side: str | None = None
    severity: float | None = None
    clean: Path | None = None

    @property
    def is_clean(self) -> bool:
        """Whether others are compared with it."""
        return self.clean == self.path


def score_files(
    paths: Iterable[str | os.PathLike[str]], clean: str | os.PathLike[str] | None = None
) -> list[ScoreFile]:
    """Every `.csv` and `.csv.gz` that the paths name or hold, and the clean files they are compared with, once each.

    Args:
        paths: files and folders; folders are walked.
        clean: the clean file of all of them. Without it, the layout says; a file outside the layout has none.

    Returns:
        By clean file, that one first, otherwise in the order given.

    Raises:
        FileNotFoundError: a path that does not exist.
        InputError: no path, a file that is no CSV, or a folder without one.
    """
    files = {path: _described(path) for given in paths for path in _walk(given)}
    if not files:
        raise InputError("study-scores: expected at least one CSV file of reward pairs, got none")
    if clean is not None:
        if Path(clean).is_dir():
            raise InputError(f"{clean}: expected one clean file, got a folder")
        (ground,) = _walk(clean)
        files = {path: replace(file, clean=ground) for path, file in files.items()}
        files.setdefault(ground, replace(_described(ground), clean=ground))
    for file in list(files.values()):
        if file.clean is not None and file.clean not in files:
            files[file.clean] = _described(file.clean)
    groups: dict[Path, list[ScoreFile]] = {}
    for file in files.values():
        groups.setdefault(file.clean or file.path, []).append(file)
    return [file for group in groups.values() for file in sorted(group, key=lambda f: not f.is_clean)]


def read_pairs_file(path: Path) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The columns `chosen` and `rejected` of a CSV file, (n,) each; gzip where it ends in .gz; other columns are ignored.

    Raises:
        FileNotFoundError: no such file.
        InputError: a column is missing or there twice, no row, a cell that is no number, not UTF-8, not a whole gzip file.
        NonFiniteError: a reward that is NaN or infinite. Both name file and line.
    """
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            text = file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 (byte {error.start})") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: not a whole gzip file. Copy it again.") from error
    lines = csv.reader(io.StringIO(text, newline=""))
    try:
        head = [name.strip() for name in next(lines, [])]
        wrong = [name for name in COLUMNS if head.count(name) != 1]
        if wrong:
            raise InputError(
                f"{path} line 1: expected each of the columns chosen and rejected once, got {head.count(wrong[0])} of "
                f"{wrong[0]} among {len(head)} columns"
            )
        at = [head.index(name) for name in COLUMNS]
        values = [[_number(path, lines.line_num, row, name, i) for name, i in zip(COLUMNS, at, strict=True)]
                  for row in lines if row]  # fmt: skip
    except csv.Error as error:
        raise InputError(f"{path} line {lines.line_num}: not CSV ({error})") from error
    if not values:
        raise InputError(f"{path}: no reward pair below the header")
    chosen, rejected = np.array(values, dtype=np.float64).T
    return chosen, rejected


def _number(path: Path, line: int, row: list[str], name: str, i: int) -> float:
    # The cell itself is not quoted: it may be text.
    if i >= len(row):
        raise InputError(f"{path} line {line}: {len(row)} columns, {name} is column {i + 1}")
    try:
        value = float(row[i])
    except ValueError:
        raise InputError(f"{path} line {line}: {name} is no number") from None
    if not math.isfinite(value):
        raise NonFiniteError(
            f"{path} line {line}: {name} is {value}, no finite reward. Leave such pairs out, and say how many they were."
        )
    return value


def _walk(given: str | os.PathLike[str]) -> Iterator[Path]:
    path = Path(os.path.abspath(given))
    if path.is_dir():
        found = sorted(inner for inner in path.rglob("*") if inner.name.endswith(_SUFFIXES) and inner.is_file())
        if not found:
            raise InputError(f"{path}: no .csv or .csv.gz file in this folder")
        yield from found
    elif not path.exists():
        raise FileNotFoundError(
            f"no file at {path}: pass CSV files with the columns chosen and rejected, or folders of them"
        )
    elif not path.name.endswith(_SUFFIXES):
        raise InputError(f"{path}: expected a .csv or .csv.gz file, or a folder of them")
    else:
        yield path


def _described(path: Path) -> ScoreFile:
    stem = path.name.removesuffix(".gz").removesuffix(".csv")
    if stem == _ENGLISH:
        return ScoreFile(path, "english", clean=path)
    if path.parent.parent.name == "translation":
        language = path.parent.name
        side = {
            f"{language}_prompt_english_response": "prompt",
            f"english_prompt_{language}_response": "response",
            f"{language}_prompt_{language}_response": "both",
            "translated_back_scores": "back",
        }.get(stem)
        if side is not None:
            return ScoreFile(path, f"{language} {side}", side, clean=_sibling(path.parent.parent.parent, _ENGLISH))
    noise = _WORD_NOISE.fullmatch(stem)
    if noise and path.parent.name in _SIDES:
        side, severity = _SIDES[path.parent.name], int(noise[1]) / 10
        return ScoreFile(path, f"word {side} {severity:g}", side, severity, _sibling(path.parent, "00_scores"))
    return ScoreFile(path, stem)


def _sibling(folder: Path, stem: str) -> Path | None:
    return next((path for suffix in _SUFFIXES if (path := folder / (stem + suffix)).is_file()), None)
