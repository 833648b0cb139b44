"""Does this guard still fit the model it runs on? Pass, recalibrated, or refit needed.

A model that moved its vectors by one scale (another dtype, a rescaled norm) keeps their geometry: the detectors are scaled
and the thresholds taken anew. One that turned them (fine-tuning, merging, another checkpoint) has another covariance, which
no threshold mends.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from rm_ood.calibration import CalibrationTable
from rm_ood.embed import Embedder, needed_channels
from rm_ood.fit import Fitter, check_overlap, warn_if_shifted
from rm_ood.identity import Canaries, Identity
from rm_ood.state import FittedState

PASS, RECALIBRATED, REFIT = "pass", "recalibrated", "refit needed"
# Largest share of the canaries' vectors that one scale may leave unexplained; half precision leaves .01, fine-tuning a
# tenth and more, a rotation all of it.
UNEXPLAINED = 0.1
# Scales closer to 1 than half precision can tell.
_SAME_SCALE = 0.02
# Level of the two tests that ask whether the sample scores like the calibration data.
_LEVEL = 0.01


@dataclass(frozen=True)
class Recalibration:
    """What `OODGuard.recalibrate` found and did.

    Attributes:
        status: `"pass"` (nothing was changed), `"recalibrated"`, or `"refit needed"` (nothing was changed).
        reason: why, in a sentence.
        n: prompts of the sample.
        flagged: share of the sample that the guard flagged as it was.
        p_value: two-sided rank-sum test of the sample's scores against the calibration scores.
        scale: channel -> factor of the canaries' vectors, new over fitted.
        unexplained: channel -> share of the new vectors' length that no factor explains, 0 to 1.
    """

    status: str
    reason: str
    n: int
    flagged: float
    p_value: float
    scale: Mapping[str, float]
    unexplained: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return {**asdict(self), "scale": dict(self.scale), "unexplained": dict(self.unexplained)}

    def __str__(self) -> str:
        geometry = ", ".join(
            f"{name} x {self.scale[name]:.3g}, {100 * self.unexplained[name]:.1f} % unexplained" for name in self.scale
        )
        return (
            f"{self.status}: {self.reason} ({self.n} prompts, {100 * self.flagged:.1f} % flagged, rank-sum p {self.p_value:.2g}"
            + (f"; canaries: {geometry})" if geometry else ")")
        )


def geometry(saved: Canaries | None, found: Canaries | None) -> tuple[dict[str, float], dict[str, float]]:
    """Per channel the factor c that brings the saved canary vectors nearest to the new ones, and the share it leaves.

    c = <new, old> / <old, old> over all eight; the share is |new - c old| / |new|.
    """
    scale: dict[str, float] = {}
    unexplained: dict[str, float] = {}
    for name, old in (saved.vectors if saved is not None and found is not None else {}).items():
        new = found.vectors[name].double() if found is not None else old.double()
        factor = float((new * old.double()).sum() / old.double().square().sum().clamp(min=1e-300))
        scale[name] = factor
        unexplained[name] = float((new - factor * old.double()).norm() / new.norm().clamp(min=1e-300))
    return scale, unexplained


def scaled(state: FittedState, scale: Mapping[str, float], rewards: NDArray[np.float64]) -> FittedState:
    """The state with its detectors scaled, and the reward's location and spread taken from the sample."""
    detectors = {
        name: detector.scaled(scale[name]) if abs(scale[name] - 1) > _SAME_SCALE else detector
        for name, detector in state.detectors.items()
    }
    spread = float(rewards.std(ddof=1))
    return replace(state, detectors=detectors, reward_mean=float(rewards.mean()), reward_sd=spread, _profiles={})


def calibrated(column: Embedder, state: FittedState, dataset: Any, *, progress: bool) -> FittedState:
    """The fit with another calibration, bound to the model at hand (see `OODGuard.calibrate`)."""
    bound = _bound(column, state)
    table, record = _sampled(column, bound, dataset, progress).table(bound)
    new = bound.with_table(table, record)
    new.profile(new.config.joined)
    if new.heldout is not None:
        warn_if_shifted(new.heldout, table.scores, table.channels, new.config.joined)
    return new


def recalibrated(
    column: Embedder, state: FittedState, dataset: Any, *, progress: bool
) -> tuple[Recalibration, FittedState | None]:
    """What `OODGuard.recalibrate` says, and the state to go on with; None where nothing changes."""
    state = state.restricted(needed_channels(state.config))
    state.profile(state.config.joined)
    sample = _sampled(column, state, dataset, progress)
    found = Canaries.of(column, state.config.text_format)
    report = judge(state, sample.table(state)[0], state.identity.canaries, found)
    if report.status != RECALIBRATED:
        return report, None
    rewards = np.array([kept.reward for kept in sample.reservoir.items()])
    moved = _bound(column, scaled(state, report.scale, rewards))
    table, record = sample.table(moved)
    new = replace(moved.with_table(table, {**record, "recalibration": report.to_dict()}), heldout=table.scores)
    new.profile(new.config.joined)
    return report, new


def _bound(column: Embedder, state: FittedState) -> FittedState:
    """The state bound to the model at hand: new thresholds hold for it, whatever it was allowed to differ in."""
    state = state.restricted(needed_channels(state.config))
    if not state.overrides:
        return state
    return replace(state, identity=Identity.of(column, state.config), overrides=(), _profiles={})


def _sampled(column: Embedder, state: FittedState, dataset: Any, progress: bool) -> Fitter:
    """Trusted data through the model; none of their prompts was fitted on."""
    fitter = Fitter(column, state.config, 1.0)
    fitter.run(dataset, labelled=False, progress=progress)
    check_overlap(fitter.reservoir, state.fit_keys)
    return fitter


def judge(state: FittedState, table: CalibrationTable, saved: Canaries | None, found: Canaries | None) -> Recalibration:
    """Compare a sample's raw scores with the calibration, and the canaries with those of the fit.

    Args:
        table: the sample as the guard scores it as it is.
        saved, found: the canaries of the fitted model and of this one; None where they were never asked.
    """
    profile = state.profile(state.config.joined)
    labels = None if table.groups is None else list(table.groups)
    ranking = profile.rank(table.scores, table.channels, table.lengths, labels)
    flags = int((ranking.p <= state.config.alpha).sum())
    p_value = float(stats.mannwhitneyu(profile.calibration_scores(), ranking.score).pvalue)
    too_many = float(stats.binomtest(flags, table.n, state.config.alpha, alternative="greater").pvalue)
    scale, unexplained = geometry(saved, found)
    status, reason = _status(min(p_value, too_many), scale, unexplained)
    return Recalibration(status, reason, table.n, flags / table.n, p_value, scale, unexplained)


def _status(p_value: float, scale: Mapping[str, float], unexplained: Mapping[str, float]) -> tuple[str, str]:
    turned = [name for name, share in unexplained.items() if not share <= UNEXPLAINED]
    flipped = [name for name, factor in scale.items() if not factor > 0]
    if turned or flipped:
        return (
            REFIT,
            f"the model's vectors of {turned or flipped} are turned, not scaled: fit a new guard on this model",
        )
    if p_value >= _LEVEL:
        return PASS, "the sample scores like the calibration data"
    if not scale:
        return REFIT, "the sample does not score like the calibration data, and no canaries were kept to tell why"
    moved = [name for name, factor in scale.items() if abs(factor - 1) > _SAME_SCALE]
    if moved:
        return RECALIBRATED, f"the vectors of {moved} are scaled: detectors scaled and thresholds taken from the sample"
    return RECALIBRATED, "the sample scores otherwise on the same vectors: thresholds taken from the sample"
