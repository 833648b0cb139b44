"""The guard card: what a guard was fitted and calibrated on, what it promises, what it can detect and what it cannot."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from rm_ood.card_page import page
from rm_ood.card_values import card_values
from rm_ood.state import FittedState


@dataclass(frozen=True)
class GuardCard:
    """A report of a fitted guard: `str(card)` is text for a person, `to_dict` for a program, `to_html` for a page."""

    values: dict[str, Any]

    @classmethod
    def of(cls, state: FittedState) -> GuardCard:
        """Read a fitted state."""
        return cls(card_values(state))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        copy: dict[str, Any] = json.loads(json.dumps(self.values))
        return copy

    def __str__(self) -> str:
        v, fit, cal = self.values, self.values["fit"], self.values["calibration"]
        lines = [
            f"Guard on {v['fingerprint'].get('architecture', 'vectors')}, text format {v['text_format']}, "
            f"channels {', '.join(v['channels'])}",
            f"Fitted on {fit['items']} items of {fit['prompts']} prompts ({_classes(v)}); "
            f"reward mean {fit['reward_mean']:.3f}, sd {fit['reward_sd']:.3f}; {fit['dropped_rows']} rows dropped, "
            f"{fit['truncated_items']} items truncated",
        ]
        for name, d in v["detectors"].items():
            note = "" if d["in_verdict"] else " (reported, not in the verdict)"
            lines.append(
                f"  {name}: {d['estimator']}, width {d['width']}, {d['samples']} samples ({d['samples_per_feature']:g} a "
                f"feature), shrinkage {d['shrinkage']:.4g} ({d['shrinkage_rule']}, floor {d['floor']:g}), effective rank "
                f"{d['effective_rank']}{note}"
            )
        if v["class_log_odds"]:
            odds = v["class_log_odds"]
            lines.append(
                f"class_log_odds tells a held-out chosen from a held-out rejected response with AUROC {odds['auroc']:.3f}; "
                f"rank correlation with the reward {odds['reward_correlation']:+.2f}"
            )
        if cal is None:
            lines.append("Not calibrated: check() raises until calibrate() is called")
        else:
            lines += [*_promises(cal), *_relations(v["length_correlation"]), *_reach(v["detectable"])]
        lines += [*_blind_spots(v["doctor"]), *(f"Note: {note}" for note in fit["notes"])]
        return "\n".join(lines)

    def to_markdown(self) -> str:
        """The card as a README for a repository on the Hub."""
        return (
            f"---\nlibrary_name: rm_ood\ntags: [ood-detection, reward-model]\n---\n\n# Guard card\n\n```\n{self}\n```\n"
        )

    def to_html(self) -> str:
        """A self-contained page."""
        return page(self.to_dict())


def _classes(values: dict[str, Any]) -> str:
    if all(d["classes"] == 1 for d in values["detectors"].values()):
        return "one class"
    return ", ".join(f"{n} {name}" for name, n in (values["fit"]["classes"] or {}).items())


def _promises(cal: dict[str, Any]) -> list[str]:
    promise = (
        f"at most {100 * cal['alpha']:g} % with {100 * cal['confidence']:g} % confidence"
        if cal["confidence"] is not None
        else f"{100 * cal['alpha']:g} % on average"
    )
    lines = []
    for pool in cal["by_group"] or [{**cal, "group": None}]:
        mean, low, high = (100 * x for x in pool["expected_false_alarm_rate"])
        name = "Calibrated" if pool["group"] is None else f"Group {pool['group']} calibrated"
        seen = "" if pool["group"] is None or pool["rate"] is None else f"; its own prompts {100 * pool['rate']:.1f} %"
        lines.append(
            f"{name} on n = {pool['n']} prompts, rank k = {pool['k']}: false alarms {promise}; expected "
            f"{mean:.2f} % (90 % interval {low:.2f} to {high:.2f} %){seen}"
        )
    return [
        *lines,
        f"Length curves from {cal['n_length']} further prompts. False alarms by response length, each calibration prompt "
        "against the others: " + ", ".join(f"{b['tokens']} tokens {100 * b['rate']:.1f} %" for b in cal["by_length"]),
    ]


def _relations(found: dict[str, Any]) -> list[str]:
    channels = ", ".join(
        f"{name} {_signed(r['raw'])} -> {_signed(r['standardised'])}" for name, r in found["channels"].items()
    )
    joined = " and ".join(f"{_signed(r)} ({axis})" for axis, r in found["joined"].items())
    return [
        f"Rank correlation with the span's length, raw -> standardised: {channels}; joined score {joined}; "
        f"within {found['chance']:.2f} of 0 is chance"
    ]


def _reach(pools: list[dict[str, Any]]) -> list[str]:
    lines = []
    for pool in pools:
        where = "" if pool["group"] is None else f" (group {pool['group']})"
        if pool["unit"] is None:
            lines.append(f"Detectable shift{where}: unknown, the calibration scores do not vary")
            continue
        item = " and ".join(f"{100 * i['power']:.0f} % if its score moves by {i['shift']:.1f} sd" for i in pool["item"])
        batch = ", ".join(f"{b['prompts']} prompts: {_sd(b['shift'])}" for b in pool["batch"])
        lines.append(
            f"Detectable shift{where}: one item is flagged with probability {item}; a whole batch (rank-sum at "
            f"{pool['batch_level']:g}, power {100 * pool['batch_power']:.0f} %) from {batch}; a shift of "
            f"{pool['small_shift']:g} sd {_after(pool)}"
        )
    return lines


def _after(pool: dict[str, Any]) -> str:
    if pool["prompts"] is None:
        return f"is not found with n = {pool['n']} calibration prompts"
    return f"is found after about {pool['prompts']} prompts"


def _blind_spots(doctor: dict[str, Any] | None) -> list[str]:
    if doctor is None:
        return ["Blind spots: not examined; the doctor plants shifts and says which are caught"]
    clean = doctor["clean"]
    lines = [
        f"Doctor, {clean['n']} {doctor['items']} items at alpha {doctor['alpha']:g}: "
        f"caught: {', '.join(doctor['caught']) or 'none'}; blind to: {', '.join(doctor['blind']) or 'none'}"
    ]
    return lines + [f"Doctor's note: {note}" for note in doctor["notes"]]


def _signed(value: float | None) -> str:
    # Plus 0 turns a rounded -0.00 into +0.00.
    return "-" if value is None else f"{round(value, 2) + 0:+.2f}"


def _sd(shift: float | None) -> str:
    return "none" if shift is None else f"{shift:.2f} sd"
