"""The guard card: what a guard was fitted and calibrated on, and what it promises."""

from __future__ import annotations

import html
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rm_ood.calibration import CalibrationTable
from rm_ood.channels import Channel
from rm_ood.config import GuardConfig
from rm_ood.conformal import false_alarm_interval, guaranteed_rank
from rm_ood.state import FittedState

_QUINTILES = 5


@dataclass(frozen=True)
class GuardCard:
    """A report of a fitted guard: `str(card)` is text for a person, `to_dict` for a program, `to_html` for a page."""

    values: dict[str, Any]

    @classmethod
    def of(cls, state: FittedState) -> GuardCard:
        """Read a fitted state."""
        c, record = state.config, state.record
        detectors = {
            name: {
                "width": d.n_features_in_,
                "classes": len(d.classes_),
                "samples": d.n_samples_,
                "shrinkage": round(d.shrinkage_, 6),
                "effective_rank": round(d.effective_rank_, 1),
                "in_verdict": name in c.joined,
            }
            for name, d in state.detectors.items()
        }
        return cls(
            {
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
                "calibration": None if state.table is None else _calibration(state, state.table),
                "fingerprint": dict(state.fingerprint),
            }
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        copy: dict[str, Any] = json.loads(json.dumps(self.values))
        return copy

    def __str__(self) -> str:
        v, fit, cal = self.values, self.values["fit"], self.values["calibration"]
        lines = [
            f"Guard on {v['fingerprint'].get('architecture', 'vectors')}, text format {v['text_format']}, "
            f"channels {', '.join(v['channels'])}",
            f"Fitted on {fit['items']} items of {fit['prompts']} prompts ({_classes(fit['classes'])}); "
            f"reward mean {fit['reward_mean']:.3f}, sd {fit['reward_sd']:.3f}; {fit['dropped_rows']} rows dropped, "
            f"{fit['truncated_items']} items truncated",
        ]
        for name, d in v["detectors"].items():
            note = "" if d["in_verdict"] else " (reported, not in the verdict)"
            lines.append(
                f"  {name}: width {d['width']}, {d['samples']} samples, shrinkage {d['shrinkage']:.4g}, "
                f"effective rank {d['effective_rank']}{note}"
            )
        if v["class_log_odds"]:
            odds = v["class_log_odds"]
            lines.append(
                f"class_log_odds tells a held-out chosen from a held-out rejected response with AUROC {odds['auroc']:.3f}; "
                f"rank correlation with the reward {odds['reward_correlation']:+.2f}"
            )
        if cal is None:
            return "\n".join([*lines, "Not calibrated: check() raises until calibrate() is called"])
        promise = (
            f"at most {100 * cal['alpha']:g} % with {100 * cal['confidence']:g} % confidence"
            if cal["confidence"] is not None
            else f"{100 * cal['alpha']:g} % on average"
        )
        pools = cal["by_group"] or [{**cal, "group": None}]
        for pool in pools:
            mean, low, high = (100 * x for x in pool["expected_false_alarm_rate"])
            name = "Calibrated" if pool["group"] is None else f"Group {pool['group']} calibrated"
            lines.append(
                f"{name} on n = {pool['n']} prompts, rank k = {pool['k']}: false alarms {promise}; expected "
                f"{mean:.2f} % (90 % interval {low:.2f} to {high:.2f} %)"
            )
        lines += [
            f"Length curves from {cal['n_length']} further prompts. False alarms by response length, each calibration prompt "
            "against the others: "
            + ", ".join(f"{b['tokens']} tokens {100 * b['rate']:.1f} %" for b in cal["by_length"]),
        ]
        lines += [f"Note: {note}" for note in fit["notes"]]
        return "\n".join(lines)

    def to_markdown(self) -> str:
        """The card as a README for a repository on the Hub."""
        return (
            f"---\nlibrary_name: rm_ood\ntags: [ood-detection, reward-model]\n---\n\n# Guard card\n\n```\n{self}\n```\n"
        )

    def to_html(self) -> str:
        """A self-contained page."""
        rows = "".join(
            f"<tr><th>{html.escape(key)}</th><td><pre>{html.escape(json.dumps(value, indent=1))}</pre></td></tr>"
            for key, value in self.values.items()
        )
        style = (
            "body{font:15px system-ui;max-width:60em;margin:2em auto;padding:0 1em}"
            "pre{white-space:pre-wrap}th{text-align:left;vertical-align:top}"
        )
        return (
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Guard card</title><style>{style}</style>'
            f"<h1>Guard card</h1><pre>{html.escape(str(self))}</pre><table>{rows}</table></html>"
        )


def _calibration(state: FittedState, table: CalibrationTable) -> dict[str, Any]:
    c = state.config
    part_b = np.flatnonzero(~table.part_a)
    groups = None if table.groups is None or c.groups in (None, "length") else [table.groups[i] for i in part_b]
    profile = state.profile(c.joined)
    lengths = table.lengths[part_b]
    score = profile.rank(table.scores[part_b], table.channels, lengths, groups).score
    labels = profile.labels(lengths, groups)
    flagged = np.array([_would_flag(profile.pools[label].scores, s, c) for label, s in zip(labels, score, strict=True)])
    edges = np.quantile(lengths[:, 1], np.arange(1, _QUINTILES) / _QUINTILES)
    quintile = np.searchsorted(edges, lengths[:, 1], side="left")
    by_length = [
        {
            "tokens": f"{lengths[rows, 1].min()}-{lengths[rows, 1].max()}",
            "n": int(rows.sum()),
            "rate": float(flagged[rows].mean()),
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
            "rate": float(flagged[[name == label for name in labels]].mean()),
        }
        for label, pool in profile.pools.items()
    ]
    return {
        "alpha": c.alpha,
        "confidence": c.confidence,
        "n": table.n_b,
        "n_length": table.n - table.n_b,
        "k": pools[0]["k"] if len(pools) == 1 else None,
        "expected_false_alarm_rate": pools[0]["expected_false_alarm_rate"] if len(pools) == 1 else None,
        "by_length": by_length,
        "by_group": pools if len(pools) > 1 else [],
        "axes": {axis: [n for n in c.joined if Channel.parse(n).axis == axis] for axis in c.axes},
    }


def _would_flag(calibration: NDArray[np.float64], score: float, config: GuardConfig) -> bool:
    """Whether a calibration prompt would be flagged against all the others of its pool."""
    k = guaranteed_rank(calibration.size - 1, config.alpha, config.confidence)
    return bool((calibration >= score).sum() <= k)


def _classes(counts: dict[str, int] | None) -> str:
    return ", ".join(f"{n} {name}" for name, n in (counts or {}).items())
