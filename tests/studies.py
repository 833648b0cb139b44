"""Documents of studies as `rm_ood.study.study` writes them, with made-up but consistent numbers, for the report's tests."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from rm_ood.study.detection import auroc, fpr95_id_positive, fpr95_ood_positive
from rm_ood.study.metrics import ece, energy_score, pair_accuracy
from rm_ood.study.report import html_page

ALPHA, THRESHOLD = 0.05, 2.1
LANGUAGES = ("es", "de", "fr", "ru", "hi", "zh")
FAMILIES = ("word noise", "character noise", "truncation")
SEVERITIES = (0.1, 0.3, 0.5, 0.9)
DETECTORS = (
    ("prompt", "default"), ("response", "default"), ("response", "final"), ("response", "reward"), ("response", "knn"),
    ("combined", "default"), ("pair", "energy"),
)  # fmt: skip


def shifts(many: bool = False) -> list[tuple[str, str, float | None, bool]]:
    """Name, side, severity, paired: 11 conditions, or 54."""
    if not many:
        found = [("word noise", side, s, True) for side in ("prompt", "response") for s in (0.1, 0.5, 0.9)]
        found += [("es", side, None, True) for side in ("prompt", "response", "both")]
        return [*found, ("random pair", "prompt", None, False), ("random pair", "response", None, False)]
    sides = ("prompt", "response", "both")
    found = [(name, side, s, True) for name in FAMILIES for side in sides for s in SEVERITIES]
    return found + [(name, side, None, name != "zh") for name in LANGUAGES for side in sides]


def full_document(
    conditions: Sequence[tuple[str, str, float | None, bool]] = (), n: int = 400, examples: bool = False
) -> dict[str, Any]:
    """Every field of the document; the numbers are those of random rewards and scores, so they fit together."""
    rng = np.random.default_rng(0)
    clean = _drawn(rng, n, 1.2, {"prompt": 0.0, "response": 0.0})
    rows = []
    for name, side, severity, paired in conditions or shifts():
        strength = severity if severity is not None else rng.uniform(0.2, 0.9)
        moved = {axis: 3 * strength * (side in (axis, "both")) for axis in ("prompt", "response")}
        shifted = _drawn(rng, n, 1.2 * (1 - strength) if side != "prompt" else 1.2 - 0.4 * strength, moved)
        rows.append({"name": name, "side": side, "severity": severity, **_row(clean, shifted, n, paired)})
    found = _measured(clean, n, True)
    doc = {
        "title": "Shift study of minilm-hh",
        "model": "minilm-hh",
        "channels": ["final", "response/mean@0.67", "prompt/mean@0.67"],
        "alpha": ALPHA,
        "confidence": 0.95,
        "threshold": THRESHOLD,
        "seed": 0,
        "versions": {"rm_ood": "0.1.0", "torch": "2.13.0", "python": "3.11.7"},
        "seconds": 812.4,
        "command": "rm-ood study --guard guard --model minilm-hh --data pairs.jsonl.gz --output study",
        "calibration": {"alpha": ALPHA, "confidence": 0.95, "n": 299, "n_length": 75, "k": 9,
                        "expected_false_alarm_rate": [0.03, 0.015, 0.048], "by_length": [], "by_group": []},
        "id": found | {"false_alarm_rate": found["flag_rate"]["combined"]},
        "shifts": rows,
        "examples": [],
    }  # fmt: skip
    if examples:
        doc["examples"] = [
            {"shift": "es", "side": "response", "prompt": "a <script>alert(1)</script> & b", "response": "| c\nd \ud800",
             "p_value": 0.003, "reward": -1.25},
        ]  # fmt: skip
    else:
        json.dumps(doc, allow_nan=False)
    return doc


def contract_document() -> dict[str, Any]:
    """Only what the contract of `rm-ood demo`'s report.json names."""
    doc = full_document()
    names = ("name", "side", "severity", "n", "accuracy", "ece", "auroc", "fpr95", "flag_rate")
    return {
        "id": {key: doc["id"][key] for key in ("n", "accuracy", "ece", "false_alarm_rate")},
        "shifts": [{key: row[key] for key in names} for row in doc["shifts"]],
        **{key: doc[key] for key in ("alpha", "versions", "seconds")},
    }


DOCUMENTS = {
    "full": lambda: full_document(examples=True),
    "contract": contract_document,
    "many": lambda: full_document(shifts(many=True), n=200),
}


@functools.cache
def page_of(name: str) -> str:
    """The page of one of the documents, made once for all tests."""
    return html_page(DOCUMENTS[name]())


class _Items:
    def __init__(self, rewards: NDArray[np.float64], scores: dict[str, NDArray[np.float64]]) -> None:
        self.rewards = rewards
        joined = np.maximum(scores["prompt"], scores["response"])
        noise = np.random.default_rng(len(rewards)).normal(size=len(rewards))
        self.scores = {
            ("prompt", "default"): scores["prompt"],
            ("response", "default"): scores["response"],
            ("response", "final"): scores["response"] + noise,
            ("response", "reward"): np.abs(rewards[:, 0]),
            ("response", "knn"): scores["response"] + 2 * noise,
            ("combined", "default"): joined,
            ("pair", "energy"): energy_score(*rewards.T),
        }
        self.flags = {"combined": joined > THRESHOLD} | {a: scores[a] > THRESHOLD for a in ("prompt", "response")}


def _drawn(rng: np.random.Generator, n: int, gap: float, moved: dict[str, float]) -> _Items:
    base = rng.normal(size=n)
    rewards = np.stack([base + gap + rng.normal(size=n), base + rng.normal(size=n)], axis=1)
    return _Items(rewards, {axis: rng.normal(by, 1 + by / 4, size=n) for axis, by in moved.items()})


def _row(clean: _Items, shifted: _Items, n: int, paired: bool) -> dict[str, Any]:
    found = _measured(shifted, n, paired)
    metrics = {"auroc": auroc, "id_positive": fpr95_id_positive, "ood_positive": fpr95_ood_positive}
    values: dict[str, Any] = {name: {} for name in metrics}
    for axis, detector in DETECTORS:
        for name, metric in metrics.items():
            value = metric(clean.scores[axis, detector], shifted.scores[axis, detector])
            values[name].setdefault(axis, {})[detector] = value
    intervals = {
        axis: {detector: _around(value, n) for detector, value in by.items()} for axis, by in values["auroc"].items()
    }
    return found | {
        "auroc": values["auroc"],
        "fpr95": {"id_positive": values["id_positive"], "ood_positive": values["ood_positive"]},
        "intervals": found["intervals"] | {"auroc": intervals},
        "paired": paired,
        "roc": {f"{a}/{d}": _roc(clean.scores[a, d], shifted.scores[a, d]) for a, d in DETECTORS},
        "reward_change": {
            "mean": float((shifted.rewards - clean.rewards)[:, 0].mean()),
            "raised": float((shifted.rewards > clean.rewards)[:, 0].mean()),
        },
    }


def _measured(items: _Items, n: int, paired: bool) -> dict[str, Any]:
    chosen, rejected = items.rewards.T
    accuracy, error = (pair_accuracy(chosen, rejected), ece(chosen, rejected)) if paired else (None, None)
    sure = 1 / (1 + np.exp(-np.abs(chosen - rejected)))
    right = (chosen > rejected).astype(float)
    joined, flagged = items.scores["combined", "default"], items.flags["combined"]
    rates = {name: float(flags.mean()) for name, flags in items.flags.items()}
    intervals: dict[str, Any] = {"flag_rate": {name: _around(rate, n) for name, rate in rates.items()}}
    intervals |= {"accuracy": _around(accuracy, n), "ece": _around(error, n)} if paired else {}
    both = {"n": n, "accuracy": accuracy, "ece": error, "flag_rate": rates}
    halves = {"chat": slice(0, n // 2), "code": slice(n // 2, n)}
    return both | {
        "intervals": intervals,
        "metrics": {
            "n_pairs": n, "accuracy": accuracy, "ties": 0, "confidence": float(sure.mean()), "ece": error,
            "ece_equal_mass": error, "ece_debiased": 0.9 * error, "mce": 1.7 * error, "brier": 0.2, "nll": 0.6,
            "temperature": None if accuracy < 0.52 else 1.8, "ece_at_id_temperature": 0.8 * error,
            "length_reward_correlation": -0.12,
        } if paired else None,
        "reliability": _bins(sure, right) if paired else None,
        "risk_coverage": _coverage(joined, right) if paired else None,
        "ood_scores": _hist(joined, np.linspace(-4, 9, 41)),
        "margins": _hist(chosen - rejected, np.linspace(-7, 7, 41)) if paired else None,
        "selective": {
            "flagged": _part(items.rewards[flagged]), "unflagged": _part(items.rewards[~flagged]),
        } if paired else None,
        "subsets": {
            name: _part(items.rewards[rows]) | {"flag_rate": float(flagged[rows].mean())} for name, rows in halves.items()
        },
    }  # fmt: skip


def _part(rewards: NDArray[np.float64]) -> dict[str, Any]:
    if not len(rewards):
        return {"n": 0, "accuracy": None, "ece": None}
    return {"n": len(rewards), "accuracy": pair_accuracy(*rewards.T), "ece": ece(*rewards.T)}


def _around(value: float, n: int) -> list[float]:
    half = 1.96 * float(np.sqrt(max(value * (1 - value), 1e-4) / n))
    return [max(0.0, value - half), min(1.0, value + half)]


def _hist(values: NDArray[np.float64], edges: NDArray[np.float64]) -> dict[str, Any]:
    return {"edges": edges.tolist(), "count": np.histogram(values, edges)[0].tolist()}


def _bins(sure: NDArray[np.float64], right: NDArray[np.float64]) -> dict[str, Any]:
    edges = np.linspace(0, 1, 11)
    count = np.histogram(sure, edges)[0]
    mean = [stats.binned_statistic(sure, values, "mean", edges)[0] for values in (sure, right)]
    confidence, accuracy = ([None if np.isnan(x) else float(x) for x in values] for values in mean)
    return {"edges": edges.tolist(), "confidence": confidence, "accuracy": accuracy, "count": count.tolist()}


def _coverage(scores: NDArray[np.float64], right: NDArray[np.float64]) -> dict[str, Any]:
    order = np.argsort(scores)
    kept = np.unique(np.linspace(1, len(scores), 50).astype(int))
    return {"coverage": (kept / len(scores)).tolist(), "accuracy": [float(right[order[:k]].mean()) for k in kept]}


def _roc(clean: NDArray[np.float64], shifted: NDArray[np.float64]) -> dict[str, Any]:
    at = np.quantile(np.concatenate([clean, shifted]), np.linspace(1, 0, 60))
    rates = [[float((scores >= t).mean()) for t in at] for scores in (clean, shifted)]
    return {"fpr": [0.0, *rates[0]], "tpr": [0.0, *rates[1]]}
