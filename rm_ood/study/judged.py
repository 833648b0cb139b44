"""One condition of a study, scored and judged: which scores are compared, pair by pair and prompt by prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from rm_ood.calibration import LENGTH
from rm_ood.channels import REWARD, Channel
from rm_ood.decision import Decisions
from rm_ood.preferences import stable_hash
from rm_ood.study.metrics import energy_score, max_softmax_score
from rm_ood.study.pairs import Pair
from rm_ood.study.scorer import Item, Scorer, Scores
from rm_ood.study.shifts import Condition

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
# The guard's joined verdict of an axis, and minus the reward (the channel `reward` is two-sided).
DEFAULT, LOW_REWARD = "default", "low reward"


@dataclass(frozen=True)
class Draw:
    """One response per prompt, as in calibration, so that items are as independent as the calibration's.

    Attributes:
        rows: (k,) the row drawn for each prompt.
        items: (k,) its response that is judged, chosen or rejected by a coin.
        pairs: (k, 2) the chosen and one rejected response of that row.
        clusters: the prompt of each.
    """

    rows: Ints
    items: Ints
    pairs: Ints
    clusters: list[int]


@dataclass(frozen=True)
class Judged:
    """The verdicts on every response of a condition.

    Attributes:
        condition: what was judged.
        decisions: of every response, row by row, the chosen one first.
        lengths: (n,) tokens of each response.
        baselines: (axis, name) -> (n,) scores, larger = more out-of-distribution.
        seed: of the draw.
    """

    condition: Condition
    decisions: Decisions
    lengths: Ints
    baselines: dict[tuple[str, str], Floats]
    seed: int

    @property
    def rows(self) -> list[Pair]:
        """The condition's rows."""
        return self.condition.rows

    @cached_property
    def chosen(self) -> Ints:
        """(rows,) the chosen response of each row; its rejected ones come after it."""
        sizes = [1 + len(row.rejected) for row in self.rows]
        return np.cumsum([0, *sizes[:-1]])

    @cached_property
    def row_of(self) -> Ints:
        """(n,) the row of each response."""
        return np.repeat(np.arange(len(self.rows)), [1 + len(row.rejected) for row in self.rows])

    @cached_property
    def pairs(self) -> Ints:
        """(p, 2) chosen and rejected response of every pair; a row with several rejected has several pairs."""
        rejected = np.setdiff1d(np.arange(len(self.row_of)), self.chosen)
        return np.stack([self.chosen[self.row_of[rejected]], rejected], axis=1)

    @cached_property
    def scored_pairs(self) -> Ints:
        """The pairs that both have a finite reward."""
        return self.pairs[np.isfinite(self.decisions.rewards[self.pairs]).all(axis=1)]

    @cached_property
    def combined(self) -> Floats:
        """(n,) largest standardised score over the axes: what the verdict ranks."""
        return _closed(np.max([axis.ood_scores for axis in self.decisions.axes.values()], axis=0))

    def matching(self, shifted: Judged) -> Judged:
        """The verdicts on the rows that a shifted condition has, by id: what it is compared with.

        Itself, where that condition has a row of every id, or has rows of its own.
        """
        wanted, mine = {row.id for row in shifted.rows}, {row.id for row in self.rows}
        if wanted >= mine or not wanted <= mine:
            return self
        kept = np.array([row.id in wanted for row in self.rows])
        items = np.flatnonzero(kept[self.row_of])
        rows = [row for row, keep in zip(self.rows, kept, strict=True) if keep]
        baselines = {name: scores[items] for name, scores in self.baselines.items()}
        condition = replace(self.condition, rows=rows)
        return Judged(condition, self.decisions[items], self.lengths[items], baselines, self.seed)

    @cached_property
    def draw(self) -> Draw:
        """One response per prompt of the condition."""
        return self.drawn(range(len(self.rows)))

    def drawn(self, among: Sequence[int]) -> Draw:
        """One response per prompt of some rows; a hash of the prompt decides, so a shift does not change the draw."""
        first: dict[int, int] = {}
        for i in among:
            other = first.get(self.rows[i].cluster)
            if other is None or self._order(i) < self._order(other):
                first[self.rows[i].cluster] = i
        rows = np.array(sorted(first.values()), dtype=np.int64)
        clusters = [self.rows[i].cluster for i in rows]
        # Bits of a hash of its own: that of the fit's split would make all calibration prompts fall on one side.
        coins = [stable_hash(f"study {cluster:016x}", self.seed) for cluster in clusters]
        rejected = [
            self.chosen[i] + 1 + (coin >> 1) % len(self.rows[i].rejected) for i, coin in zip(rows, coins, strict=True)
        ]
        pairs = np.stack([self.chosen[rows], np.array(rejected, dtype=np.int64)], axis=1)
        items = pairs[np.arange(len(rows)), [coin & 1 for coin in coins]]
        return Draw(rows, items, pairs, clusters)

    def _order(self, i: int) -> int:
        return stable_hash(self.rows[i].id, self.seed)

    @cached_property
    def detectors(self) -> dict[tuple[str, str], Floats]:
        """(axis, detector) -> (k,) scores of the draw; +inf where an item could not be scored. Of pairs for the axis `pair`."""
        items, found = self.draw.items, {("combined", DEFAULT): self.combined[self.draw.items]}
        for axis, verdict in self.decisions.axes.items():
            found[axis, DEFAULT] = _closed(verdict.ood_scores[items])
            found |= {(axis, name): _closed(c.ood_scores[items]) for name, c in verdict.channels.items()}
        rewards = self.decisions.rewards
        if ("response", REWARD) in found:
            found["response", LOW_REWARD] = _closed(-rewards[items])
        found |= {key: _closed(scores[items]) for key, scores in self.baselines.items()}
        both = rewards[self.draw.pairs]
        known = np.isfinite(both).all(axis=1)
        for name, score in (("energy", energy_score), ("max softmax", max_softmax_score)):
            values = np.full(len(both), np.inf)
            if known.any():
                values[known] = score(*both[known].T)
            found["pair", name] = values
        return found

    @cached_property
    def flags(self) -> dict[str, NDArray[np.bool_]]:
        """`combined` and each judged axis -> (n,) flags of every response."""
        axes = {name: verdict.is_ood for name, verdict in self.decisions.axes.items()}
        return {"combined": self.decisions.is_ood, **axes}


def _closed(scores: Floats) -> Floats:
    """NaN as +inf: what cannot be scored counts as out-of-distribution."""
    return np.where(np.isnan(scores), np.inf, scores)


def judge(scorer: Scorer, conditions: Sequence[Condition], *, seed: int) -> list[Judged]:
    """Score all conditions, the first of which is clean, in one pass over their distinct texts; then judge each.

    A guard that is calibrated by a column ranks each row among the calibration prompts of its subset.

    Raises:
        InputError: a clean item that cannot be read, or a subset that the guard was not calibrated for.
    """
    items: list[Item] = []
    names: list[str | None] = []
    for number, condition in enumerate(conditions):
        for i, row in enumerate(condition.rows):
            which = ["chosen", *(f"rejected[{j}]" for j in range(len(row.rejected)))]
            items += [(row.prompt, response) for response in row.responses]
            names += [f"rows[{i}].{field}" if number == 0 else None for field in which]
    scores = scorer.score(items, names)
    judged, start = [], 0
    for condition in conditions:
        n = sum(len(row.responses) for row in condition.rows)
        judged.append(_judged(scorer, condition, scores.take(np.arange(start, start + n)), seed))
        start += n
    return judged


def _judged(scorer: Scorer, condition: Condition, scores: Scores, seed: int) -> Judged:
    groups = None
    if scorer.state.config.groups not in (None, LENGTH):
        groups = [str(row.subset) for row in condition.rows for _ in row.responses]
    decisions = scorer.state.decide(scores.scored, scores.part, groups=groups)
    axes = {name: Channel.parse(channels[-1]).axis for name, (channels, _) in scorer.baselines.items()}
    lengths = np.zeros((len(decisions), 2), dtype=np.int64) if scores.part.lengths is None else scores.part.lengths
    baselines = {(axes[name], name): values for name, values in scores.baselines.items()}
    return Judged(condition, decisions, lengths[:, 1], baselines, seed)
