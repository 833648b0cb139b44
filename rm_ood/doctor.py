"""What a guard catches and what it is blind to: shifts planted in items that it passes.

Each clean item that the guard passes is changed in one known way (another script, shuffled words, code, one word
repeated, random characters, no response, the answer to another prompt) on one side or on both, and checked again.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from tqdm.auto import tqdm

from rm_ood.canaries import EVERYDAY
from rm_ood.channels import GIVEN_PROMPT, SPANS
from rm_ood.decision import Decisions
from rm_ood.dialogue import check_prompt, check_response
from rm_ood.errors import CalibrationWarning, InputError
from rm_ood.guard import OODGuard
from rm_ood.power import share_interval
from rm_ood.study.detection import auroc
from rm_ood.study.planted import EMPTY_RESPONSE, MISMATCHED, OTHER_SCRIPT, Item, changed, changes, mismatched

MOST_ITEMS = 60
CAUGHT = 0.5
RULE = "caught: at least half of the items that pass clean are flagged after the change"
# Fewer items than this leave a share uncertain by more than 22 points either way.
_FEW = 20
# Binomial p-value of the clean items' flags under which they are not what the guard was calibrated on.
_FOREIGN = 1e-3
_SHORT = {"prompt": "prompt", "response": "resp.", GIVEN_PROMPT: "given"}
_SIDES = (("prompt",), ("response",), SPANS)


@dataclass(frozen=True)
class Share:
    """`count` of `n` items, with its exact 95 % interval (Clopper-Pearson)."""

    count: int
    n: int

    @property
    def share(self) -> float:
        """count / n, a fraction."""
        return self.count / self.n

    def to_dict(self) -> dict[str, Any]:
        """`count`, `share`, `low`, `high`."""
        low, high = share_interval(self.count, self.n)
        return {"count": self.count, "share": self.share, "low": low, "high": high}


@dataclass(frozen=True)
class Planted:
    """What one shift did.

    Attributes:
        name: of the shift. side: `"prompt"`, `"response"` or `"both"`: what was changed.
        n: items that pass clean and that the shift changes.
        flagged: `"combined"` and each judged axis -> share of them that is flagged now.
        auroc: probability that a changed item's combined score is above a clean one's; .5 is blind.
    """

    name: str
    side: str
    n: int
    flagged: dict[str, Share]
    auroc: float

    @property
    def caught(self) -> bool:
        """Whether at least half of the items are flagged."""
        return self.flagged["combined"].share >= CAUGHT


@dataclass(frozen=True)
class Findings:
    """What `plant` found: `str(findings)` is a table for a person, `to_dict` is for a program and the guard card.

    Attributes:
        items: `"given"` or `"built-in"`.
        alpha: the guard's promise per item.
        clean: `"combined"` and each judged axis -> share of the clean items that is flagged.
        clean_p: probability of that many combined flags or more at a false-alarm rate of alpha (exact binomial).
        planted: one entry per shift and side.
        notes: what limits the findings.
    """

    items: str
    seed: int
    alpha: float
    clean: dict[str, Share]
    clean_p: float
    planted: tuple[Planted, ...]
    notes: tuple[str, ...]

    @property
    def as_calibrated(self) -> bool:
        """Whether the clean items may be what the guard was calibrated on."""
        return self.clean_p >= _FOREIGN

    @property
    def caught(self) -> tuple[str, ...]:
        """Shifts that are caught: name, then side and share flagged."""
        return _by_shift([row for row in self.planted if row.caught])

    @property
    def blind(self) -> tuple[str, ...]:
        """Shifts that are not, in the same form."""
        return _by_shift([row for row in self.planted if not row.caught])

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values; of prompt and response, the one that the guard does not judge is None."""
        return {
            "items": self.items,
            "seed": self.seed,
            "alpha": self.alpha,
            "rule": RULE,
            "clean": {
                "n": self.clean["combined"].n,
                "flagged": _flagged(self.clean),
                "p_value": self.clean_p,
                "as_calibrated": self.as_calibrated,
            },
            "shifts": [
                {
                    "name": row.name,
                    "side": row.side,
                    "n": row.n,
                    "flagged": _flagged(row.flagged),
                    "auroc": row.auroc,
                    "caught": row.caught,
                }
                for row in self.planted
            ],
            "caught": list(self.caught),
            "blind": list(self.blind),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        axes = "".join(f"{_SHORT[axis]:>8}" for axis in _axes(self.clean))
        head = f"{'planted':<30}{'n':>4}{'flagged':>9}{'95 % interval':>17}{axes}{'AUROC':>7}"
        lines = [head, "-" * len(head), _line("nothing (clean items)", self.clean, None)]
        lines += [_line(f"{row.name}, {row.side}", row.flagged, row.auroc) for row in self.planted]
        lines += ["", *(f"Note: {note}" for note in self.notes)]
        if not self.planted:
            return "\n".join([*lines, "caught: unknown", "blind to: unknown"])
        lines += [
            f"{RULE[0].upper()}{RULE[1:]}.",
            f"caught: {', '.join(self.caught) or 'none of these'}",
            f"blind to: {', '.join(self.blind) or 'none of these'}",
        ]
        return "\n".join(lines)


def plant(
    guard: OODGuard,
    items: Sequence[tuple[Any, Any]] | None = None,
    *,
    groups: Sequence[str] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Findings:
    """Plant known shifts in clean items and see which the guard flags.

    The planted items pass through `guard.check` and count as its traffic: use a guard that serves no other.

    Args:
        guard: calibrated, with its reward model.
        items: clean (prompt, response) pairs from what the guard was calibrated for, best neither fitted nor calibrated
            on; a seeded draw of 60 is used. In a message list the last user turn is changed. None: 40 built-in pairs of
            everyday English, which may well be out of distribution for a guard of anything else: the findings say so.
        groups: the group of each item, for a guard with a grouping column.
        seed: decides the draw, the shuffles and the noise.
        progress: show a progress bar on stderr.

    Raises:
        InputError: no items, items that are no pairs, or groups that do not fit.
        NotFittedError, MismatchError: the guard is not calibrated, or has no reward model.
    """
    pairs = _read(guard, EVERYDAY if items is None else items)
    if groups is not None and len(groups) != len(pairs):
        raise InputError(f"groups: {len(pairs)} labels needed, one per item, got {len(groups)}")
    draw = sorted(random.Random(seed).sample(range(len(pairs)), min(len(pairs), MOST_ITEMS)))
    labels = None if groups is None else [groups[i] for i in draw]
    pairs = [pairs[i] for i in draw]
    shifts = changes(pairs)
    steps = [(name, sides) for name in shifts for sides in (_SIDES[1:2] if name == EMPTY_RESPONSE else _SIDES)]
    planted: list[Planted] = []
    # The guard warns that this is not the traffic it knows; here that is the purpose.
    with (
        warnings.catch_warnings(),
        tqdm(total=len(steps) + 2, desc="doctor", unit="shift", disable=not progress) as bar,
    ):
        warnings.simplefilter("ignore", CalibrationWarning)
        clean = _check(guard, pairs, labels)
        bar.update()
        passed = np.flatnonzero(~clean.is_ood).tolist()
        lonely = False

        def measure(name: str, side: str, after: dict[int, Item]) -> None:
            # A text of one word has no other order.
            where = [i for i, item in after.items() if item != pairs[i]]
            if where:
                shifted = _check(guard, [after[i] for i in where], labels and [labels[i] for i in where])
                area = auroc(_combined(clean)[where], _combined(shifted))
                planted.append(Planted(name, side, len(where), _shares(shifted), area))
            bar.update()

        for name, sides in steps:
            after = {i: changed(pairs[i], i, shifts[name], sides, seed) for i in passed}
            measure(name, sides[0] if len(sides) == 1 else "both", after)
        try:
            others = mismatched([pairs[i] for i in passed], seed) if passed else []
        except InputError:
            others, lonely = [], True
        measure(MISMATCHED, "response", dict(zip(passed, others, strict=False)))
    alpha, shares = guard.config.alpha, _shares(clean)
    p = float(stats.binom.sf(shares["combined"].count - 1, len(pairs), alpha))
    notes = [
        *_notes(shares, p, alpha),
        *(f"the guard does not judge the {a} by itself" for a in SPANS if a not in shares),
    ]
    if OTHER_SCRIPT not in shifts:
        notes.append("other script: the items hold every script that could be planted")
    if lonely:
        notes.append(f"{MISMATCHED}: more than half of the items that pass share one prompt")
    source = "built-in" if items is None else "given"
    return Findings(source, seed, alpha, shares, p, tuple(planted), tuple(notes))


def _notes(clean: dict[str, Share], p: float, alpha: float) -> list[str]:
    flags, notes = clean["combined"], []
    passed = flags.n - flags.count
    if p < _FOREIGN:
        notes.append(
            f"{flags.count} of {flags.n} clean items are flagged, at most {100 * alpha:g} % were promised (binomial p = "
            f"{p:.1e}): the items are not what this guard was calibrated on. Pass (prompt, response) pairs of its own traffic."
        )
    if not passed:
        notes.append("no clean item passes, so there was nothing to plant shifts in")
    elif passed < _FEW:
        low, high = share_interval(passed // 2, passed)
        notes.append(
            f"only {passed} items pass clean: a share near one half may be {100 * low:.0f} to {100 * high:.0f} %"
        )
    return notes


def _read(guard: OODGuard, items: Sequence[tuple[Any, Any]]) -> list[Item]:
    if not len(items):
        raise InputError("items: got none. Pass clean (prompt, response) pairs, or None for the built-in ones.")
    pairs = []
    for i, item in enumerate(items):
        if isinstance(item, str) or not isinstance(item, Sequence) or len(item) != 2:
            raise InputError(f"items[{i}]: expected a (prompt, response) pair, got {type(item).__name__}")
        limits = {"max_chars": guard.config.max_chars}
        prompt = check_prompt(item[0], f"items[{i}].prompt", allow_empty=guard.config.allow_empty, **limits)
        response = check_response(item[1], f"items[{i}].response", **limits)
        if not isinstance(response, str):
            raise InputError(f"items[{i}].response: expected a plain text to plant shifts in, got a message")
        pairs.append((prompt, response))
    return pairs


def _check(guard: OODGuard, items: Sequence[Item], groups: Sequence[str] | None) -> Decisions:
    return guard.check([prompt for prompt, _ in items], [response for _, response in items], groups=groups)


def _combined(decisions: Decisions) -> NDArray[np.float64]:
    return np.asarray(np.max([axis.ood_scores for axis in decisions.axes.values()], axis=0), dtype=np.float64)


def _shares(decisions: Decisions) -> dict[str, Share]:
    flags = {"combined": decisions.is_ood} | {name: axis.is_ood for name, axis in decisions.axes.items()}
    return {name: Share(int(flag.sum()), len(flag)) for name, flag in flags.items()}


def _by_shift(rows: Sequence[Planted]) -> tuple[str, ...]:
    sides: dict[str, list[str]] = {}
    for row in rows:
        sides.setdefault(row.name, []).append(f"{row.side} {100 * row.flagged['combined'].share:.0f} %")
    return tuple(f"{name} ({', '.join(shares)})" for name, shares in sides.items())


def _flagged(shares: dict[str, Share]) -> dict[str, Any]:
    return {name: shares[name].to_dict() if name in shares else None for name in ("combined", *_axes(shares))}


def _axes(shares: dict[str, Share]) -> tuple[str, ...]:
    """Prompt and response, judged or not, then what else is judged."""
    return (*SPANS, *(name for name in shares if name not in ("combined", *SPANS)))


def _line(label: str, flagged: dict[str, Share], area: float | None) -> str:
    low, high = share_interval(flagged["combined"].count, flagged["combined"].n)
    axes = "".join(f"{f'{100 * flagged[axis].share:.0f} %' if axis in flagged else '-':>8}" for axis in _axes(flagged))
    share = f"{100 * flagged['combined'].share:.0f} %"
    interval = f"{100 * low:.0f} to {100 * high:.0f} %"
    tail = f"{'-' if area is None else f'{area:.2f}':>7}"
    return f"{label:<30}{flagged['combined'].n:>4}{share:>9}{interval:>17}{axes}{tail}"
