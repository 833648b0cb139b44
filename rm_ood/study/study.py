"""`run_study`: how far a reward model can be trusted off its own ground, and whether the guard's flag tells."""

from __future__ import annotations

import json
import platform
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from rm_ood.calibration import LENGTH
from rm_ood.conformal import ALL
from rm_ood.dialogue import Text, content_text, messages_of, response_text
from rm_ood.errors import CalibrationWarning, InputError
from rm_ood.guard import OODGuard
from rm_ood.study.judged import Judged, judge
from rm_ood.study.numbers import Settings, id_numbers, shift_numbers
from rm_ood.study.pairs import Pair
from rm_ood.study.report import html_page, markdown
from rm_ood.study.scored_rows import ScoredRows
from rm_ood.study.scorer import Baselines, Scorer
from rm_ood.study.shifts import Condition

CLEAN = "clean"
_PACKAGES = ("rm_ood", "torch", "transformers", "numpy")


@dataclass(frozen=True)
class Study:
    """What a study found.

    Attributes:
        doc: every number, JSON-able: what the pages are made from.
        rows: every scored response with its scores.
        n_texts: distinct texts of all conditions. n_forwarded: those that went through the reward model this time.
    """

    doc: dict[str, Any]
    rows: ScoredRows = field(repr=False)
    n_texts: int
    n_forwarded: int

    def to_dict(self) -> dict[str, Any]:
        """The document."""
        return self.doc

    def frame(self) -> Any:
        """A pandas table, one row per scored response: condition, side, severity, id, which response, verdict, scores.

        Raises:
            InputError: pandas is not installed.
        """
        return self.rows.frame()

    def save(self, folder: str | Path) -> list[Path]:
        """Write `study.json`, `report.html`, `report.md` and `scores.parquet` (`scores.jsonl.gz` without pyarrow).

        Returns:
            The files.
        """
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        texts = {
            "study.json": json.dumps(self.doc, indent=1, allow_nan=False) + "\n",
            "report.html": html_page(self.doc),
            "report.md": markdown(self.doc),
        }
        for name, text in texts.items():
            (place / name).write_text(text, encoding="utf-8")
        return [*(place / name for name in texts), self.rows.write(place)]


def run_study(
    guard: OODGuard,
    rows: Sequence[Pair],
    conditions: Iterable[Condition],
    *,
    cache: str | Path | None = None,
    baselines: Baselines | None = None,
    scorer: Scorer | None = None,
    seed: int = 0,
    n_bootstrap: int = 1000,
    n_examples: int = 0,
    title: str | None = None,
    model: str | None = None,
    command: str | None = None,
    dropped: Mapping[str, int] | None = None,
    progress: bool = True,
) -> Study:
    """Score clean and shifted rows, and compare: accuracy, calibration, detection, flags.

    The reward model reads each distinct text once, over all conditions and, with a cache, over all studies; a study that
    was interrupted goes on where it was. Every response gets a verdict; detection and flag rates count one response per
    prompt, as calibration does. What cannot be scored counts as flagged; pairs without two finite rewards are left out of
    accuracy and counted in `unscored_pairs`. The texts are no traffic of the guard.

    Args:
        guard: calibrated, with its reward model.
        rows: clean rows that neither the reward model nor the guard has seen.
        conditions: shifted versions of them (`rm_ood.study.shifts.conditions`).
        cache: SQLite file of scores by content, made if it is not there; None keeps nothing.
        baselines: name -> (channel, or several side by side; fitted detector), to stand beside the guard's channels.
        scorer: instead of `cache` and `baselines`, where shifts ask the same reward model: `conditions(...,
            reward=scorer.rewards)`.
        seed: of the draw of one response per prompt, and of the bootstrap.
        n_bootstrap: draws of the prompts for each 95 % interval; 0 leaves intervals out.
        n_examples: flagged texts to show per condition, smallest p-value first. Texts are sensitive.
        title, model, command: for the report.
        dropped: for the report: what was left out as unusable before -> how often (see `read_pairs`).
        progress: show progress bars on stderr.

    Raises:
        InputError: no rows, a clean row that cannot be read, a shifted condition without rows.
        NotFittedError, MismatchError: the guard is not calibrated, or has no reward model.
        FormatError, SaveError: as `ScoreCache`.
    """
    started = time.perf_counter()
    if scorer is not None and (cache is not None or baselines):
        raise InputError("scorer: it has its own cache and baselines; pass those to Scorer")
    if not rows:
        raise InputError("rows: none to study")
    _check_groups(guard, rows)
    everything = [Condition(CLEAN, "none", None, list(rows)), *conditions]
    empty = [f"{c.name}, {c.side}" for c in everything if not c.rows]
    if empty:
        raise InputError(f"conditions: no rows in {empty}")
    if scorer is None:
        with Scorer(guard, cache=cache, baselines=baselines, progress=progress) as own:
            judged, counts = judge(own, everything, seed=seed), (own.n_distinct, own.n_forwarded)
    else:
        judged, counts = judge(scorer, everything, seed=seed), (scorer.n_distinct, scorer.n_forwarded)
    clean = judged[0]
    _warn_of_tokenisation(clean)
    settings = Settings.of(judged, n_bootstrap, seed)
    config = guard.state.config
    doc = {
        "title": title or f"Shift study of {model or _model_name(guard)}",
        "model": model or _model_name(guard),
        "channels": list(config.joined),
        "alpha": config.alpha,
        "confidence": config.confidence,
        "seed": seed,
        "versions": _versions(),
        "command": command,
        "dropped": {what: n for what, n in (dropped or {}).items() if n},
        "calibration": guard.report().to_dict()["calibration"],
        "threshold": _threshold(guard),
        "id": id_numbers(clean, settings),
        "shifts": _shifts(judged, settings, progress),
    }
    if n_examples:
        doc["examples"] = [example for j in judged for example in _examples(j, n_examples)]
    doc["seconds"] = round(time.perf_counter() - started, 1)
    return Study(doc, ScoredRows.of(judged), *counts)


def _shifts(judged: Sequence[Judged], settings: Settings, progress: bool) -> list[dict[str, Any]]:
    """The document's `shifts`. One that lacks some of the clean rows has the numbers of those it has as its `baseline`."""
    clean, found = judged[0], []
    known: dict[tuple[str, ...], dict[str, Any]] = {}
    for shifted in tqdm(judged[1:], desc="measure", unit="condition", disable=not progress):
        base = clean.matching(shifted)
        ids = tuple(row.id for row in base.rows)
        if base is not clean and ids not in known:
            known[ids] = id_numbers(base, settings)
        found.append({**shift_numbers(base, shifted, settings), "baseline": known.get(ids)})
    return found


def _check_groups(guard: OODGuard, rows: Sequence[Pair]) -> None:
    column = guard.state.config.groups
    if column not in (None, LENGTH) and any(row.subset is None for row in rows):
        raise InputError(f"the guard is calibrated by the column {column!r}: read the rows with subset={column!r}")


def _warn_of_tokenisation(clean: Judged) -> None:
    """Of shifted rows the reason says it; clean rows should not have it."""
    odd = sum("tokenised_unlike_fit" in reasons for reasons in clean.decisions.reasons)
    if odd:
        warnings.warn(
            f"{odd} of {len(clean.decisions)} clean texts are tokenised unlike the fit data: their flags are about that",
            CalibrationWarning,
            stacklevel=3,
        )


def _threshold(guard: OODGuard) -> float | None:
    """The joined score above which an item is flagged; None where every group has its own."""
    pools = guard.state.profile(guard.state.config.joined).pools
    return pools[ALL].threshold if pools.keys() == {ALL} else None


def _model_name(guard: OODGuard) -> str:
    config = guard.model.config
    return Path(getattr(config, "_name_or_path", "") or type(guard.model).__name__).name


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            # Run from a checkout.
            continue
    return found


def _examples(judged: Judged, count: int) -> list[dict[str, Any]]:
    decisions, c = judged.decisions, judged.condition
    flagged = [i for i in judged.draw.items.tolist() if decisions.is_ood[i]]
    shown = []
    for i in sorted(flagged, key=lambda i: decisions.p_values[i])[:count]:
        row = judged.rows[judged.row_of[i]]
        reward = float(decisions.rewards[i])
        shown.append(
            {
                "shift": c.name if c.severity is None else f"{c.name} {c.severity:g}",
                "side": c.side,
                "prompt": _words(row.prompt),
                "response": response_text(row.responses[i - judged.chosen[judged.row_of[i]]]),
                "p_value": float(decisions.p_values[i]),
                "reward": reward if reward == reward else None,
            }
        )
    return shown


def _words(prompt: Text) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message['role']}: {content_text(message)}" for message in messages_of(prompt))
