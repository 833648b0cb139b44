"""Every score of a study, one row per scored response, for whoever wants to look further."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from rm_ood.errors import InputError
from rm_ood.study.judged import Judged

PARQUET, JSON_LINES = "scores.parquet", "scores.jsonl.gz"


@dataclass(frozen=True)
class ScoredRows:
    """Columns of one length, by name.

    `condition`, `side`, `severity`, `id`, `subset`, `which` (`chosen`, `rejected[0]`, ...), `reward`, `is_ood`, `p_value`,
    `reasons`; for each axis `prompt.ood_score`, `prompt.p_value`, `prompt.is_ood`; for each channel its `.score`,
    `.ood_score` and `.p_value`; for each baseline its score. NaN and infinite scores are missing.
    """

    columns: dict[str, list[Any]]

    @classmethod
    def of(cls, judged: Sequence[Judged]) -> Self:
        """The rows of all conditions."""
        parts = [_columns(one) for one in judged]
        return cls({name: [value for part in parts for value in part[name]] for name in parts[0]})

    def frame(self) -> Any:
        """As a pandas table.

        Raises:
            InputError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise InputError("frame() needs pandas: pip install pandas") from error
        return pandas.DataFrame(self.columns)

    def write(self, folder: Path) -> Path:
        """As Parquet, or as compressed JSON Lines where pyarrow is not installed; returns the file."""
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            path = folder / JSON_LINES
            names = list(self.columns)
            with gzip.open(path, "wt", encoding="utf-8") as out:
                for row in zip(*self.columns.values(), strict=True):
                    out.write(json.dumps(dict(zip(names, row, strict=True))) + "\n")
            return path
        path = folder / PARQUET
        pyarrow.parquet.write_table(pyarrow.table(self.columns), path)
        return path


def _columns(judged: Judged) -> dict[str, list[Any]]:
    condition, decisions, n = judged.condition, judged.decisions, len(judged.decisions)
    rows = [judged.rows[i] for i in judged.row_of]
    place = np.arange(n) - judged.chosen[judged.row_of]
    found: dict[str, list[Any]] = {
        "condition": [condition.name] * n,
        "side": [condition.side] * n,
        "severity": [None if condition.severity is None else float(condition.severity)] * n,
        "id": [row.id for row in rows],
        "subset": [row.subset for row in rows],
        "which": ["chosen" if k == 0 else f"rejected[{k - 1}]" for k in place],
        "reward": _numbers(decisions.rewards),
        "is_ood": decisions.is_ood.tolist(),
        "p_value": _numbers(decisions.p_values),
        "reasons": [" ".join(reasons) for reasons in decisions.reasons],
    }
    for name, axis in decisions.axes.items():
        found[f"{name}.ood_score"] = _numbers(axis.ood_scores)
        found[f"{name}.p_value"] = _numbers(axis.p_values)
        found[f"{name}.is_ood"] = axis.is_ood.tolist()
        for channel, values in axis.channels.items():
            found[f"{channel}.score"] = _numbers(values.scores)
            found[f"{channel}.ood_score"] = _numbers(values.ood_scores)
            found[f"{channel}.p_value"] = _numbers(values.p_values)
    for (_, name), scores in judged.baselines.items():
        found[f"baseline.{name}"] = _numbers(scores)
    return found


def _numbers(values: Any) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]
