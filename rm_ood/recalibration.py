"""Does this guard still fit the model it runs on? Pass, recalibrated, or refit needed.

A model that moved its vectors by one scale (another dtype, a rescaled norm) keeps their geometry: the detectors are scaled
and the thresholds taken anew. One that turned them (fine-tuning, merging, another checkpoint) has another covariance, which
no threshold mends.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from scipy import stats
from torch import Tensor

from rm_ood.calibration import CalibrationTable
from rm_ood.embed import Embedder, needed_channels
from rm_ood.errors import CalibrationWarning
from rm_ood.fit import Fitter, check_overlap, warn_if_shifted
from rm_ood.identity import Canaries, Identity
from rm_ood.state import FittedState
from rm_ood.workers import ALONE, Workers

PASS, RECALIBRATED, REFIT = "pass", "recalibrated", "refit needed"
# Largest share of the canaries' vectors that one scale may leave unexplained; half precision leaves .01, fine-tuning a
# tenth and more, a rotation all of it.
UNEXPLAINED = 0.1
# Largest factor by which the canaries' squared distances may move either way; batch layouts and half precision move them by
# a tenth.
DRIFT = 1.3
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
        drift: channel -> median ratio of the canaries' squared distances, new (scaled back) over fitted; 1 = the same.
    """

    status: str
    reason: str
    n: int
    flagged: float
    p_value: float
    scale: Mapping[str, float]
    unexplained: Mapping[str, float]
    drift: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return asdict(self)

    def __str__(self) -> str:
        geometry = ", ".join(
            f"{name} x {self.scale[name]:.3g}, {100 * self.unexplained[name]:.1f} % unexplained, "
            f"distances x {self.drift[name]:.2f}"
            for name in self.scale
        )
        return (
            f"{self.status}: {self.reason} ({self.n} prompts, {100 * self.flagged:.1f} % flagged, rank-sum p {self.p_value:.2g}"
            + (f"; canaries: {geometry})" if geometry else ")")
        )


def geometry(state: FittedState, found: Canaries | None) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """How the canaries' vectors moved since the fit, per channel: factor, what it leaves, and what the detector makes of it.

    The factor is c = <new, old> / <old, old> over all eight; it leaves |new - c old| / |new|; and the drift is the median over
    the canaries of d_sq(new / c) / d_sq(old), which sees turns that are small beside the vectors' length but large beside
    their spread. Empty where there is nothing to compare.
    """
    scale: dict[str, float] = {}
    unexplained: dict[str, float] = {}
    saved = state.identity.canaries
    if saved is None or found is None:
        return scale, unexplained, {}
    back: dict[str, Tensor] = {}
    for name in state.detectors:
        old, new = saved.vectors[name].double(), found.vectors[name].double()
        factor = float((new * old).sum() / old.square().sum().clamp(min=1e-300))
        scale[name] = factor
        unexplained[name] = float((new - factor * old).norm() / new.norm().clamp(min=1e-300))
        back[name] = (new / factor).float() if factor > 0 else new.float()
    before = state.distances({name: saved.vectors[name] for name in state.detectors})
    drift = np.median(state.distances(back) / np.maximum(before, 1e-300), axis=0)
    return scale, unexplained, {name: float(d) for name, d in zip(state.detectors, drift, strict=True)}


def _turned(scale: Mapping[str, float], unexplained: Mapping[str, float], drift: Mapping[str, float]) -> list[str]:
    """Channels whose vectors moved by more than one factor."""
    return [
        name
        for name in scale
        if not (unexplained[name] <= UNEXPLAINED and scale[name] > 0 and 1 / DRIFT <= drift[name] <= DRIFT)
    ]


def scaled(state: FittedState, scale: Mapping[str, float], found: Canaries | None) -> FittedState:
    """The state with the detectors that moved scaled, and the reward's location and spread moved as the canaries' were."""
    moved = {name: factor for name, factor in scale.items() if abs(factor - 1) > _SAME_SCALE}
    if not moved or found is None or state.identity.canaries is None:
        return state
    detectors = {n: d.scaled(moved[n]) if n in moved else d for n, d in state.detectors.items()}
    slope, shift = np.polyfit(state.identity.canaries.rewards, found.rewards, 1)
    spread = abs(float(slope)) * state.reward_sd
    mean = float(slope) * state.reward_mean + float(shift)
    if not spread > 0:
        mean, spread = state.reward_mean, state.reward_sd
    return replace(state, detectors=detectors, reward_mean=mean, reward_sd=spread, heldout=None, _profiles={})


def calibrated(
    column: Embedder, state: FittedState, dataset: Any, *, progress: bool, workers: Workers = ALONE
) -> FittedState:
    """The fit with another calibration, bound to the model at hand (see `OODGuard.calibrate`)."""
    state = state.restricted(needed_channels(state.config))
    bound = _bound(column, state)
    scale, unexplained, drift = geometry(state, bound.identity.canaries)
    if workers.is_first and (turned := _turned(scale, unexplained, drift)):
        warnings.warn(
            f"the model's vectors of {turned} are not those that the guard was fitted on: the false-alarm rate will hold, but "
            "what is caught is anybody's guess. Fit a new guard on this model.",
            CalibrationWarning,
            stacklevel=3,
        )
    sample = _sampled(column, bound, dataset, progress, workers)

    def made() -> FittedState:
        table, record = _table(sample, bound)
        new = bound.with_table(table, record)
        new.profile(new.config.joined)
        if new.heldout is not None:
            warn_if_shifted(new.heldout, table.scores, table.channels, new.config.joined)
        return new

    return workers.from_first(made, FittedState.to_saved, FittedState.from_saved)


def recalibrated(
    column: Embedder, state: FittedState, dataset: Any, *, progress: bool
) -> tuple[Recalibration, FittedState | None]:
    """What `OODGuard.recalibrate` says, and the state to go on with; None where nothing changes."""
    state = state.restricted(needed_channels(state.config))
    state.profile(state.config.joined)
    sample = _sampled(column, state, dataset, progress)
    sampled = _table(sample, state)[0]
    found = Canaries.of(column, state.config.text_format)
    report = judge(state, sampled, found)
    if report.status != RECALIBRATED:
        return report, None
    moved = scaled(state, report.scale, found)
    table, record = sample.table(moved)
    new = _bound(column, moved.with_table(table, {**record, "recalibration": report.to_dict()}))
    new.profile(new.config.joined)
    return report, new


def _bound(column: Embedder, state: FittedState) -> FittedState:
    """The state bound to the model at hand, which new thresholds hold for."""
    return replace(state, identity=Identity.of(column, state.config), overrides=(), _profiles={})


def _sampled(column: Embedder, state: FittedState, dataset: Any, progress: bool, workers: Workers = ALONE) -> Fitter:
    """Trusted data through the model."""
    fitter = Fitter(column, state.config, 1.0, workers)
    fitter.run(dataset, labelled=False, progress=progress)
    return fitter


def _table(sample: Fitter, state: FittedState) -> tuple[CalibrationTable, dict[str, Any]]:
    """Calibration matrix of trusted data, none of whose prompts was fitted on."""
    check_overlap(sample.found.reservoir.keys(), state.fit_keys)
    return sample.table(state)


def judge(state: FittedState, table: CalibrationTable, found: Canaries | None) -> Recalibration:
    """Compare a sample's raw scores with the calibration, and the canaries with those of the fit.

    Args:
        table: the sample as the guard scores it as it is.
        found: the canaries of the model at hand; None where it could not be asked.
    """
    profile = state.profile(state.config.joined)
    labels = None if table.groups is None else list(table.groups)
    ranking = profile.rank(table.scores, table.channels, table.lengths, labels)
    flags = int((ranking.p <= state.config.alpha).sum())
    p_value = float(stats.mannwhitneyu(profile.calibration_scores(), ranking.score).pvalue)
    too_many = float(stats.binomtest(flags, table.n, state.config.alpha, alternative="greater").pvalue)
    scale, unexplained, drift = geometry(state, found)
    status, reason = _status(min(p_value, too_many), scale, _turned(scale, unexplained, drift))
    return Recalibration(status, reason, table.n, flags / table.n, p_value, scale, unexplained, drift)


def _status(p_value: float, scale: Mapping[str, float], turned: list[str]) -> tuple[str, str]:
    if turned:
        return REFIT, f"the model's vectors of {turned} are turned, not scaled: fit a new guard on this model"
    if p_value >= _LEVEL:
        return PASS, "the sample scores like the calibration data"
    if not scale:
        return REFIT, "the sample does not score like the calibration data, and no canaries were kept to tell why"
    moved = [name for name, factor in scale.items() if abs(factor - 1) > _SAME_SCALE]
    if moved:
        return RECALIBRATED, f"the vectors of {moved} are scaled: detectors scaled and thresholds taken from the sample"
    return RECALIBRATED, "the sample scores otherwise on the same vectors: thresholds taken from the sample"
