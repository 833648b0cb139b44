"""Modes: what becomes of the reward of an item that is flagged.

- `shadow`: nothing; verdicts are in the reply, in the metrics and in the log.
- `warn`: the reply says beside them how many items are flagged (`RM-OOD-Flagged: 2/8`).
- `enforce`: the reward is withheld: null, with the reason `withheld`.

A reward that is not a finite number is never given out, in no mode. Where a protocol has no null (`/get_reward`,
`/classify`), one number stands for all of them: by default the guard's `reward_floor`, no higher than the reward of any
calibration prompt, and at least three standard deviations below the fit data's mean. It says nothing of an item's own reward,
so it may lie above one that is lower than any calibration prompt's: where a policy must never gain by being flagged, whatever
it writes, pass a `--withheld-reward` below all that the reward model gives.
"""

from __future__ import annotations

import math
from typing import Any

from rm_ood.decision import Decision

WITHHELD = "withheld"


def is_withheld(decision: Decision, mode: str) -> bool:
    """Whether the item's reward stays here."""
    return not math.isfinite(decision.reward) or (mode == "enforce" and decision.is_ood)


def row(name: str, decision: Decision, mode: str) -> dict[str, Any]:
    """A row of `rm-ood check`; under `enforce` a flagged item has no reward."""
    found = {"id": name, **decision.to_dict()}
    if mode == "enforce" and decision.is_ood:
        found["reward"] = None
        for axis in found["axes"].values():
            # The channel of the reward is the reward, standardised.
            channels = {
                name: channel for name, channel in axis["channels"].items() if name.rpartition("/")[2] == "reward"
            }
            axis["channels"] |= {name: dict.fromkeys(channel) for name, channel in channels.items()}
        found["reasons"] = [*found["reasons"], WITHHELD]
    return found


def number(decision: Decision, mode: str, withheld_reward: float) -> float:
    """The reward for protocols that need a number."""
    return withheld_reward if is_withheld(decision, mode) else decision.reward
