"""The numbers of a study's document: of the clean rows, and of each shifted condition beside them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rm_ood.channels import SPANS
from rm_ood.study.bootstrap import clustered_interval, detection_resamples, ece_interval, percentile_interval
from rm_ood.study.detection import auroc, fpr95_id_positive, fpr95_ood_positive, roc_curve
from rm_ood.study.judged import Judged
from rm_ood.study.metrics import (
    ece,
    histogram,
    margins,
    pair_credits,
    pair_metrics,
    reliability_curve,
    risk_coverage,
    selective_metrics,
)

Floats = NDArray[np.float64]
Doc = dict[str, Any]
# Told of every guard; None for what it does not judge. What else it judges comes after them.
_FLAGS = ("combined", *SPANS)
_BINS = 40
# Share of the pooled values past which they count in the outermost bin, at either end.
_TAIL = 0.005


@dataclass(frozen=True)
class Settings:
    """What the numbers of all conditions share.

    Attributes:
        n_bootstrap: draws of the prompts for each interval; 0 leaves intervals out.
        seed: of these draws.
        temperature: that of the clean pairs; infinite where none is best; None without clean pairs.
        score_edges, margin_edges: bins of the histograms.
    """

    n_bootstrap: int
    seed: int
    temperature: float | None
    score_edges: Floats
    margin_edges: Floats

    @classmethod
    def of(cls, judged: Sequence[Judged], n_bootstrap: int, seed: int) -> Settings:
        """Settings for all conditions, the clean one first."""
        clean = judged[0]
        temperature = None
        if len(clean.scored_pairs):
            fitted = pair_metrics(*_rewards(clean))["temperature"]
            temperature = math.inf if fitted is None else float(fitted)
        gaps = [margins(*_rewards(j)) for j in judged if j.condition.paired and len(j.scored_pairs)]
        scores = [j.combined[j.draw.items] for j in judged]
        return cls(n_bootstrap, seed, temperature, _edges(scores), _edges(gaps))


def id_numbers(clean: Judged, settings: Settings) -> Doc:
    """The document's `id`."""
    pairs, flags = _pair_numbers(clean, settings), _flag_numbers(clean, settings)
    rate, intervals = flags["flag_rate"]["combined"], pairs["intervals"] | flags["intervals"]
    return {"n": len(clean.rows), "false_alarm_rate": rate, **pairs, **flags, "intervals": intervals}


def shift_numbers(clean: Judged, shifted: Judged, settings: Settings) -> Doc:
    """One entry of the document's `shifts`; `clean` holds the rows that it is compared with (`Judged.matching`)."""
    condition = shifted.condition
    pairs = _pair_numbers(shifted, settings)
    if not condition.paired:
        # A preference that means nothing is not measured.
        pairs |= dict.fromkeys(pairs)
        pairs["intervals"] = {"accuracy": None, "ece": None}
        pairs["unscored_pairs"] = len(shifted.pairs) - len(shifted.scored_pairs)
        pairs["subsets"] = _subsets(shifted)
    found = {
        "name": condition.name,
        "side": condition.side,
        "severity": condition.severity,
        "n": len(shifted.rows),
        "paired": condition.paired,
        **pairs,
        **(flags := _flag_numbers(shifted, settings)),
        **_detection(clean, shifted),
        "reward_change": _reward_change(clean, shifted),
    }
    found["intervals"] = {**pairs["intervals"], **flags["intervals"], **_detection_intervals(clean, shifted, settings)}
    return found


def _pair_numbers(judged: Judged, settings: Settings) -> Doc:
    """Accuracy and calibration over the pairs whose rewards are known; the others are counted."""
    where = judged.scored_pairs
    found: Doc = {
        "accuracy": None, "accuracy_all": None, "ece": None, "metrics": None, "reliability": None, "risk_coverage": None,
        "margins": None, "selective": None, "unscored_pairs": len(judged.pairs) - len(where),
        "subsets": _subsets(judged), "intervals": {"accuracy": None, "ece": None},
    }  # fmt: skip
    if not len(where):
        return found
    chosen, rejected = _rewards(judged)
    credits = pair_credits(chosen, rejected)
    clusters = [judged.rows[i].cluster for i in judged.row_of[where[:, 0]]]
    lengths = judged.lengths[where]
    metrics = pair_metrics(chosen, rejected, temperature=settings.temperature, lengths=(lengths[:, 0], lengths[:, 1]))
    # A pair is as suspicious as the worse of its responses, and flagged if either is.
    suspicion = judged.combined[where].max(axis=1)
    flagged = judged.decisions.is_ood[where].any(axis=1)
    return found | {
        "accuracy": metrics["accuracy"],
        "accuracy_all": _accuracy_all(judged),
        "ece": metrics["ece"],
        "metrics": metrics,
        "reliability": reliability_curve(chosen, rejected),
        "risk_coverage": _rounded(risk_coverage(suspicion, credits)),
        "margins": histogram(margins(chosen, rejected), edges=settings.margin_edges),
        "selective": selective_metrics(chosen, rejected, flagged),
        "intervals": {
            "accuracy": _interval(settings, np.mean, clusters, credits),
            "ece": _ece_interval(settings, chosen, rejected, clusters),
        },
    }


def _flag_numbers(judged: Judged, settings: Settings) -> Doc:
    """What is flagged of one response per prompt, why else, and how the scores lie."""
    draw = judged.draw
    flags = {name: judged.flags[name][draw.items] for name in _flags(judged) if name in judged.flags}
    reasons = Counter(reason for i in draw.items for reason in judged.decisions.reasons[i])
    return {
        "n_judged": len(draw.items),
        "flag_rate": {name: float(flags[name].mean()) if name in flags else None for name in _flags(judged)},
        "ood_scores": histogram(judged.combined[draw.items], edges=settings.score_edges),
        "reasons": dict(sorted(reasons.items())),
        "intervals": {"flag_rate": {name: _interval(settings, np.mean, draw.clusters, f) for name, f in flags.items()}},
    }


def _flags(judged: Judged) -> tuple[str, ...]:
    return (*_FLAGS, *(name for name in judged.flags if name not in _FLAGS))


def _detection(clean: Judged, shifted: Judged) -> Doc:
    metrics = {"auroc": auroc, "id_positive": fpr95_id_positive, "ood_positive": fpr95_ood_positive}
    found: dict[str, dict[str, dict[str, float]]] = {name: {} for name in metrics}
    curves = {}
    for (axis, detector), scores in shifted.detectors.items():
        ours = clean.detectors[axis, detector]
        for name, metric in metrics.items():
            found[name].setdefault(axis, {})[detector] = metric(ours, scores)
        curves[f"{axis}/{detector}"] = _rounded(roc_curve(ours, scores))
    fpr95 = {name: found[name] for name in ("id_positive", "ood_positive")}
    return {"auroc": found["auroc"], "fpr95": fpr95, "roc": curves}


def _detection_intervals(clean: Judged, shifted: Judged, settings: Settings) -> Doc:
    found: dict[str, dict[str, dict[str, list[float] | None]]] = {
        name: {} for name in ("auroc", "fpr95_id_positive", "fpr95_ood_positive")
    }
    for (axis, detector), scores in shifted.detectors.items():
        drawn = None
        if settings.n_bootstrap:
            drawn = detection_resamples(
                clean.detectors[axis, detector],
                scores,
                clean.draw.clusters,
                shifted.draw.clusters,
                n_resamples=settings.n_bootstrap,
                seed=settings.seed,
            )
        for name, by_axis in found.items():
            ends = None if drawn is None else _ends(percentile_interval(drawn[name]))
            by_axis.setdefault(axis, {})[detector] = ends
    return found


def _subsets(judged: Judged) -> Doc:
    """Numbers by subset of the rows, where rows have one."""
    members: dict[str, list[int]] = {}
    for i, row in enumerate(judged.rows):
        if row.subset is not None:
            members.setdefault(row.subset, []).append(i)
    found = {}
    for name in sorted(members):
        inside = np.isin(judged.row_of[judged.scored_pairs[:, 0]], members[name])
        both = judged.decisions.rewards[judged.scored_pairs[inside]]
        known = len(both) > 0 and judged.condition.paired
        items = judged.drawn(members[name]).items
        found[name] = {
            "n": len(members[name]),
            "accuracy": float(pair_credits(*both.T).mean()) if known else None,
            "ece": ece(*both.T) if known else None,
            "flag_rate": {
                n: float(judged.flags[n][items].mean()) if n in judged.flags else None for n in _flags(judged)
            },
        }
    return found


def _accuracy_all(judged: Judged) -> float | None:
    """Share of rows whose chosen response beats all rejected ones; m that tie with it leave 1 / (m + 1)."""
    rewards, credit = judged.decisions.rewards, []
    for i, row in enumerate(judged.rows):
        start = judged.chosen[i]
        own = rewards[start : start + 1 + len(row.rejected)]
        if np.isfinite(own).all():
            best = own.max()
            credit.append(1 / (own == best).sum() if own[0] == best else 0.0)
    return float(np.mean(credit)) if credit else None


def _reward_change(clean: Judged, shifted: Judged) -> Doc | None:
    """How the chosen responses' rewards moved, of the rows that have one clean row of the same id."""
    count = Counter(row.id for row in clean.rows)
    before = {
        row.id: clean.decisions.rewards[i]
        for row, i in zip(clean.rows, clean.chosen, strict=True)
        if count[row.id] == 1
    }
    moved = [
        shifted.decisions.rewards[i] - before[row.id]
        for row, i in zip(shifted.rows, shifted.chosen, strict=True)
        if row.id in before
    ]
    known = np.array([m for m in moved if math.isfinite(m)])
    return {"mean": float(known.mean()), "raised": float((known > 0).mean())} if known.size else None


def _rounded(curve: dict[str, list[float]]) -> dict[str, list[float]]:
    """A curve to be drawn: more digits would only make the document large."""
    return {name: [round(value, 5) for value in values] for name, values in curve.items()}


def _rewards(judged: Judged) -> tuple[Floats, Floats]:
    both = judged.decisions.rewards[judged.scored_pairs]
    return both[:, 0], both[:, 1]


def _interval(
    settings: Settings, statistic: Callable[..., Any], clusters: Sequence[int], *arrays: NDArray[Any]
) -> list[float] | None:
    if not settings.n_bootstrap:
        return None
    return _ends(clustered_interval(statistic, clusters, *arrays, n_resamples=settings.n_bootstrap, seed=settings.seed))


def _ece_interval(settings: Settings, chosen: Floats, rejected: Floats, clusters: Sequence[int]) -> list[float] | None:
    if not settings.n_bootstrap:
        return None
    return _ends(ece_interval(chosen, rejected, clusters, n_resamples=settings.n_bootstrap, seed=settings.seed))


def _ends(interval: tuple[float, float]) -> list[float] | None:
    return list(interval) if all(map(math.isfinite, interval)) else None


def _edges(parts: Sequence[Floats]) -> Floats:
    """Bins of equal width over the bulk of the pooled finite values."""
    pooled = np.concatenate([*parts, np.empty(0)])
    pooled = pooled[np.isfinite(pooled)]
    low, high = np.quantile(pooled, [_TAIL, 1 - _TAIL]) if pooled.size else (0.0, 1.0)
    if not high > low:
        low, high = low - 0.5, high + 0.5
    return np.linspace(low, high, _BINS + 1)
