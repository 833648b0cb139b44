"""A penalty on out-of-distribution rewards, in reward units: what a policy that leaves the known ground loses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rm_ood.decision import Decisions
from rm_ood.errors import CalibrationError, InputError

if TYPE_CHECKING:
    from rm_ood.guard import OODGuard

Floats = NDArray[np.float64]
RESPONSE = "response"
# Between the quartiles of a normal law lie so many standard deviations.
_QUARTILES = 1.3489795


def verdict_scores(decisions: Decisions, axis: str | None) -> Floats:
    """(n,) OOD scores of one axis; of the whole verdict (the largest over the axes) for None.

    Raises:
        InputError: the guard does not judge that axis.
    """
    if axis is not None:
        return decisions.axis(axis).ood_scores
    return np.asarray(np.max([a.ood_scores for a in decisions.axes.values()], axis=0), dtype=np.float64)


@dataclass(frozen=True)
class RewardPenalty:
    """penalty(s) = unit * min(cap, strength * max(0, s - threshold) / spread) for an OOD score s.

    Zero at or below the threshold of alpha, so that an in-distribution reward is left alone but for a share alpha; never
    falling in s; continuous, so that a policy is drawn back instead of cut off; and bounded, so that no far outlier rules a
    batch. What has no finite score costs the whole cap.

    IBL subtracts a Mahalanobis distance in the latent space of a reward model that was trained for it, from every response,
    however ordinary, and without a bound. Here it is the distance beyond what held-out data reach, on the reward model as it
    is.

    Args:
        threshold, spread: of the OOD score: where flags begin, and its spread on calibration data.
        unit: one standard deviation of the reward on the fit data; what follows is in this unit.
        strength: reward standard deviations lost for one spread beyond the threshold.
        cap: reward standard deviations lost at most.
        axis: whose score is read; None: that of the whole verdict.

    Raises:
        InputError: a number that is not positive and finite.

    Reference:
        Miao et al., "Information-theoretic reward modeling for stable RLHF: detecting and mitigating reward hacking", 2025
        (arXiv 2510.13694), for IBL.
    """

    threshold: float
    spread: float
    unit: float
    strength: float = 1.0
    cap: float = 3.0
    axis: str | None = RESPONSE

    def __post_init__(self) -> None:
        positive = {name: getattr(self, name) for name in ("spread", "unit", "strength", "cap")}
        bad = {name: value for name, value in positive.items() if not 0 < value < np.inf}
        if bad or not np.isfinite(self.threshold):
            raise InputError(f"penalty: threshold={self.threshold}, {bad or positive}: expected finite, and above 0")

    @classmethod
    def of(
        cls, guard: OODGuard, *, axis: str | None = RESPONSE, strength: float = 1.0, cap: float = 3.0
    ) -> RewardPenalty:
        """The penalty in a calibrated guard's own units.

        With a guard that is calibrated by group it begins where the last group's flags do.

        Args:
            axis: by default the response, which is what a policy chooses; None: the whole verdict, the prompt included.
            strength, cap: see the class.
        Raises:
            NotFittedError: the guard is not fitted or not calibrated.
            InputError: an axis that it does not judge. CalibrationError: its calibration scores do not vary.
        """
        state = guard.state
        profile = state.profile(state.config.joined)
        pools = profile.axis_pools(axis)
        finite = np.concatenate([scores[np.isfinite(scores)] for scores, _ in pools])
        low, high = np.quantile(finite, [0.25, 0.75])
        thresholds = [float(scores[-k]) for scores, k in pools]
        if not high > low or not np.isfinite(max(thresholds)):
            raise CalibrationError(
                f"penalty on {axis or 'the whole verdict'}: the calibration scores do not vary, or the threshold "
                f"{max(thresholds)} is infinite"
            )
        return cls(max(thresholds), float(high - low) / _QUARTILES, state.reward_sd, strength, cap, axis)

    def __call__(self, scores: ArrayLike) -> Floats:
        """Penalties of OOD scores, (n,) >= 0, in reward units: to be subtracted."""
        s = np.asarray(scores, dtype=np.float64)
        excess = np.maximum(s - self.threshold, 0.0) / self.spread
        return self.unit * np.where(np.isfinite(s), np.minimum(self.cap, self.strength * excess), self.cap)

    def apply(
        self,
        decisions: Decisions,
        *,
        groups: ArrayLike | None = None,
        neutral: bool = False,
        gather: Callable[[Any], list[Any]] | None = None,
    ) -> Floats:
        """Rewards with the penalty taken off, (n,); NaN where the reward model gave none (abstain from those).

        Args:
            decisions: the guard's verdicts.
            groups: (n,) which items were sampled for one prompt; by default the verdicts' own `prompt_index`.
            neutral: give each group its mean penalty back. The mean reward of a group is then what the reward model said,
                so that prompts whose answers are all strange are not punished as such, and only the comparison within the
                group, which GRPO and RLOO learn from, feels the penalty; items below the threshold gain. A group with fewer
                than two scored members has no such comparison and is given nothing back: its penalty would be undone.
            gather: for groups that are split over processes: gives what each of them passes, in JSON's types, to all of them
                (`rm_ood.integrations.processes.gather`). `groups` are then labels that mean the same everywhere, and every
                process calls, one without items by `gather({})`.
        Raises:
            InputError: groups of another length, groups of one member each, or an axis that the guard does not judge.
        """
        penalty = self(verdict_scores(decisions, self.axis))
        scored = np.isfinite(decisions.rewards)
        if neutral:
            labels = np.asarray(decisions.prompt_index if groups is None else groups)
            if labels.shape != penalty.shape:
                raise InputError(f"groups: expected {penalty.size} labels, got shape {labels.shape}")
            penalty = penalty - _given_back(labels, penalty, scored, gather)
        return np.where(scored, decisions.rewards - penalty, np.nan)


def _given_back(
    labels: NDArray[Any], penalty: Floats, scored: NDArray[np.bool_], gather: Callable[[Any], list[Any]] | None
) -> Floats:
    """(n,) mean penalty of each item's group over its scored members, wherever they are."""
    names, group, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    total = np.bincount(group, np.where(scored, penalty, 0.0), names.size)
    own = {
        str(name): [float(cost), int(count), int(size)]
        for name, cost, count, size in zip(names, total, np.bincount(group, scored, names.size), sizes, strict=True)
    }
    joined: dict[str, Floats] = {}
    for part in [own] if gather is None else gather(own):
        for name, sums in part.items():
            joined[name] = joined.get(name, np.zeros(3)) + sums
    if joined and max(size for _, _, size in joined.values()) == 1:
        raise InputError(
            f"neutral=True: each of the {len(joined)} groups has one member, which would get its own penalty back. Judge "
            "all answers to a prompt in one call, or pass groups=, one label per item"
        )
    means = [cost / count if count > 1 else 0.0 for cost, count, _ in (joined[str(name)] for name in names)]
    return np.array(means)[group]
