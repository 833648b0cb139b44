"""The guard card: what a guard was fitted and calibrated on, and what it promises."""

from __future__ import annotations

import html
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from rm_ood.channels import Channel
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
                "calibration": None if state.table is None else _calibration(state),
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
        mean, low, high = (100 * x for x in cal["expected_false_alarm_rate"])
        promise = (
            f"at most {100 * cal['alpha']:g} % with {100 * cal['confidence']:g} % confidence"
            if cal["confidence"] is not None
            else f"{100 * cal['alpha']:g} % on average"
        )
        lines += [
            f"Calibrated on n = {cal['n']} prompts (and {cal['n_length']} for the length curves), rank k = {cal['k']}: "
            f"false alarms {promise}; expected {mean:.2f} % (90 % interval {low:.2f} to {high:.2f} %)",
            "False alarms among the calibration prompts by response length: "
            + ", ".join(f"{b['tokens']}: {100 * b['rate']:.1f} %" for b in cal["by_length"]),
        ]
        if cal["by_group"]:
            lines.append("By group: " + ", ".join(f"{b['group']}: {100 * b['rate']:.1f} %" for b in cal["by_group"]))
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


def _calibration(state: FittedState) -> dict[str, Any]:
    c, table = state.config, state.table
    if table is None:
        raise TypeError("a calibrated state is needed")
    part_b = ~table.part_a
    groups = (
        None
        if table.groups is None or c.groups in (None, "length")
        else [table.groups[i] for i in np.flatnonzero(part_b)]
    )
    ranking = state.profile(c.joined).rank(table.scores[part_b], table.channels, table.lengths[part_b], groups)
    flagged = ranking.p <= c.alpha
    lengths = table.lengths[part_b, 1]
    edges = np.quantile(lengths, np.arange(1, _QUINTILES) / _QUINTILES)
    quintile = np.searchsorted(edges, lengths, side="left")
    by_length = [
        {
            "tokens": f"{lengths[rows].min()}-{lengths[rows].max()}",
            "n": int(rows.sum()),
            "rate": float(flagged[rows].mean()),
        }
        for rows in (quintile == q for q in range(_QUINTILES))
        if rows.any()
    ]
    by_group = [
        {"group": name, "n": len(rows), "rate": float(flagged[rows].mean())}
        for name in sorted(set(groups or ()))
        for rows in [[i for i, g in enumerate(groups or ()) if g == name]]
    ]
    return {
        "alpha": c.alpha,
        "confidence": c.confidence,
        "n": table.n_b,
        "n_length": table.n - table.n_b,
        "k": guaranteed_rank(table.n_b, c.alpha, c.confidence),
        "expected_false_alarm_rate": [float(x) for x in false_alarm_interval(table.n_b, c.alpha, c.confidence)],
        "by_length": by_length,
        "by_group": by_group,
        "axes": {axis: [n for n in c.joined if Channel.parse(n).axis == axis] for axis in c.axes},
        "prompts_seen": state.record.get("calibration_prompts_seen"),
    }


def _classes(counts: dict[str, int] | None) -> str:
    return ", ".join(f"{n} {name}" for name, n in (counts or {}).items())
