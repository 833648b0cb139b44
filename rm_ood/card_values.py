"""The numbers of the guard card, all from the fitted state: its detectors, fit record and calibration table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from rm_ood.calibration import CalibrationTable, Profile, Ranking
from rm_ood.channels import FINAL, SPANS, Channel
from rm_ood.config import GuardConfig
from rm_ood.conformal import ALL, Pool, false_alarm_interval, guaranteed_rank
from rm_ood.detectors.conditional import ConditionalMahalanobis
from rm_ood.detectors.contrasted import ContrastedMahalanobis
from rm_ood.detectors.gaussian import NormalisedMahalanobis
from rm_ood.detectors.mahalanobis import MahalanobisDetector
from rm_ood.power import BATCH_LEVEL, BATCH_POWER, batch_shift, batch_size, item_shift, share_interval, spread
from rm_ood.state import FittedState

_QUINTILES = 5
_ITEM_POWERS = (0.5, 0.8)
_BATCHES = (100, 1000)
# In standard deviations: too small to be told from one item.
_SMALL_SHIFT = 0.3
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_CLASSES = "class-conditional Mahalanobis, tied covariance"
_ONE_CLASS = "Mahalanobis, one Gaussian"
_CONDITIONAL = "Mahalanobis of the response given the prompt, one Gaussian of both"


def _variant(detector: MahalanobisDetector, channel: str, joined: Sequence[str], project_out_reward: bool) -> str:
    """What sets a channel's distance apart, to be said after its name."""
    unit = ", of vectors of length 1 (Mahalanobis++)" if isinstance(detector, NormalisedMahalanobis) else ""
    if isinstance(detector, ContrastedMahalanobis):
        copies = f"{detector.noise_.n_samples_} noisy copies of the fit texts"
        if str(Channel.parse(channel).contrast) not in joined:
            unit += f", weighed against {copies}"
        elif channel in joined:
            unit += f", weighed against {copies}; and the ratio of the two distances by itself"
        else:
            unit += f": its ratio to the distance from {copies}"
    return unit + (", without the direction of the reward" if project_out_reward and channel == FINAL else "")


def card_values(state: FittedState) -> dict[str, Any]:
    """JSON-able values of a fitted state; what needs a calibration is None without one."""
    c, record, table = state.config, state.record, state.table
    seen = None if table is None else _Seen.of(state, table)
    detectors = {
        name: {
            "width": d.n_features_in_,
            "classes": len(d.classes_),
            "samples": d.n_samples_,
            "samples_per_feature": round(d.n_samples_ / d.n_features_in_, 2),
            "estimator": _estimator(d) + _variant(d, name, c.joined, c.project_out_reward),
            "shrinkage_rule": c.shrinkage,
            "shrinkage": round(d.shrinkage_, 6),
            "floor": c.floor,
            "effective_rank": round(d.effective_rank_, 1),
            "in_verdict": any(str(Channel.parse(joined).vector) == name for joined in c.joined),
        }
        for name, d in sorted(state.detectors.items(), key=lambda item: item[0] != FINAL)
    }
    return {
        "channels": list(c.joined),
        "text_format": c.text_format,
        "fit": {
            "items": record.get("fit_items"),
            "prompts": record.get("fit_prompts"),
            "classes": record.get("class_counts"),
            "dropped_rows": record.get("dropped"),
            "truncated_items": record.get("truncated"),
            "duplicate_share": record.get("duplicate_share"),
            "reward_mean": state.reward_mean,
            "reward_sd": state.reward_sd,
            "notes": record.get("notes", []),
        },
        "detectors": detectors,
        "class_log_odds": record.get("class_log_odds"),
        "score_reward_correlation": record.get("score_reward_correlation"),
        "calibration": None if seen is None else _calibration(c, seen),
        "length_correlation": None if seen is None else _length_correlation(seen),
        "detectable": None if seen is None else _detectable(seen.profile),
        "doctor": record.get("doctor"),
        "fingerprint": dict(sorted(state.identity.fields.items())),
    }


def _estimator(detector: MahalanobisDetector) -> str:
    if isinstance(detector, ConditionalMahalanobis):
        return _CONDITIONAL
    return _ONE_CLASS if len(detector.classes_) == 1 else _CLASSES


@dataclass(frozen=True)
class _Seen:
    """Part B of the calibration prompts as the guard sees it: n rows, standardised, joined and flagged."""

    profile: Profile
    channels: tuple[str, ...]
    raw: NDArray[np.float64]
    lengths: NDArray[np.int64]
    ranking: Ranking
    labels: list[str]
    flagged: NDArray[np.bool_]
    n_length: int

    @classmethod
    def of(cls, state: FittedState, table: CalibrationTable) -> _Seen:
        c = state.config
        part_b = np.flatnonzero(~table.part_a)
        groups = None if table.groups is None or c.groups in (None, "length") else [table.groups[i] for i in part_b]
        profile = state.profile(c.joined)
        raw, lengths = table.scores[part_b], table.lengths[part_b]
        ranking, labels = profile.rank(raw, table.channels, lengths, groups), profile.labels(lengths, groups)
        flagged = [
            _would_flag(profile.pools[label].scores, s, c) for label, s in zip(labels, ranking.score, strict=True)
        ]
        return cls(profile, table.channels, raw, lengths, ranking, labels, np.array(flagged), table.n - table.n_b)


def _calibration(c: GuardConfig, seen: _Seen) -> dict[str, Any]:
    edges = np.quantile(seen.lengths[:, 1], np.arange(1, _QUINTILES) / _QUINTILES)
    quintile = np.searchsorted(edges, seen.lengths[:, 1], side="left")
    by_length = [
        {
            "tokens": f"{seen.lengths[rows, 1].min()}-{seen.lengths[rows, 1].max()}",
            "n": int(rows.sum()),
            **_rate(seen.flagged[rows]),
        }
        for rows in (quintile == q for q in range(_QUINTILES))
        if rows.any()
    ]
    pools = [
        {
            "group": label,
            "n": pool.scores.size,
            "k": pool.k,
            "expected_false_alarm_rate": [
                float(x) for x in false_alarm_interval(pool.scores.size, c.alpha, c.confidence)
            ],
            **_rate(seen.flagged[[name == label for name in seen.labels]]),
        }
        for label, pool in seen.profile.pools.items()
    ]
    n_b = len(seen.raw)
    return {
        "alpha": c.alpha,
        "confidence": c.confidence,
        "n": n_b,
        "n_length": seen.n_length,
        "k": pools[0]["k"] if len(pools) == 1 else None,
        "expected_false_alarm_rate": pools[0]["expected_false_alarm_rate"] if len(pools) == 1 else None,
        "by_length": by_length,
        "by_group": pools if len(pools) > 1 else [],
        "axes": {axis: [n for n in c.joined if Channel.parse(n).axis == axis] for axis in c.axes},
    }


def _rate(flagged: NDArray[np.bool_]) -> dict[str, Any]:
    """Share of some calibration prompts that is flagged, each against the others, and its exact 95 % interval."""
    count, n = int(flagged.sum()), flagged.size
    if n == 0:
        # A group may have all its prompts in part A.
        return {"flagged": 0, "rate": None, "low": None, "high": None}
    low, high = share_interval(count, n)
    return {"flagged": count, "rate": count / n, "low": low, "high": high}


def _length_correlation(seen: _Seen) -> dict[str, Any]:
    """Spearman correlation of scores with span lengths (tokens), over part B: before and after standardisation.

    Channels go with the span of their own axis. Below `chance` in size is what unrelated numbers show (95 %).
    """
    spans = dict(zip(SPANS, seen.lengths.T, strict=True))
    return {
        "n": len(seen.raw),
        "chance": 1.96 / math.sqrt(max(len(seen.raw) - 1, 1)),
        "channels": {
            name: {
                "raw": _spearman(seen.raw[:, i], spans[Channel.parse(name).span]),
                "standardised": _spearman(seen.ranking.z[name], spans[Channel.parse(name).span]),
            }
            for i, name in enumerate(seen.channels)
        },
        "joined": {axis: _spearman(seen.ranking.score, length) for axis, length in spans.items()},
    }


def _spearman(scores: NDArray[np.float64], lengths: NDArray[np.int64]) -> float | None:
    finite = np.isfinite(scores)
    x, y = scores[finite], lengths[finite]
    return float(stats.spearmanr(x, y).statistic) if x.size > 2 and np.ptp(x) > 0 and np.ptp(y) > 0 else None


def _detectable(profile: Profile) -> list[dict[str, Any]]:
    """Smallest shifts that are detected, per pool of prompts that are ranked together; see `rm_ood.power`.

    In standard deviations of the pool's joined standardised scores: of one item (flagged with probability 50 and 80 %),
    and of all items of a batch (rank-sum test). `prompts` is after how many a shift of 0.3 is found; None: never.
    """
    members: dict[int, tuple[Pool, list[str]]] = {}
    for label, pool in profile.pools.items():
        members.setdefault(id(pool), (pool, []))[1].append(label)
    return [_pool_reach(pool, labels) for pool, labels in members.values()]


def _pool_reach(pool: Pool, labels: list[str]) -> dict[str, Any]:
    scores, unit = pool.scores, spread(pool.scores)

    def in_units(shift: float | None) -> float | None:
        return None if shift is None or unit is None else shift / unit

    return {
        "group": None if labels == [ALL] else ", ".join(labels),
        "n": scores.size,
        "unit": unit,
        "threshold": pool.threshold,
        "quantiles": [float(q) for q in np.quantile(scores[np.isfinite(scores)], _QUANTILES)],
        "item": [{"power": p, "shift": in_units(item_shift(scores, pool.threshold, p))} for p in _ITEM_POWERS],
        "batch": [{"prompts": m, "shift": in_units(batch_shift(scores, m))} for m in _BATCHES],
        "batch_level": BATCH_LEVEL,
        "batch_power": BATCH_POWER,
        "small_shift": _SMALL_SHIFT,
        "prompts": None if unit is None else batch_size(scores, _SMALL_SHIFT * unit),
    }


def _would_flag(calibration: NDArray[np.float64], score: float, config: GuardConfig) -> bool:
    """Whether a calibration prompt would be flagged against all the others of its pool."""
    k = guaranteed_rank(calibration.size - 1, config.alpha, config.confidence)
    return bool((calibration >= score).sum() <= k)
