"""What a fitted guard knows, immutable: detectors, calibration matrix, fit record; to and from saved tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rm_ood.artifact import check_schema
from rm_ood.calibration import CalibrationTable, Profile, Ranking
from rm_ood.canaries import CANARIES
from rm_ood.channels import FINAL, REWARD, Channel
from rm_ood.config import GuardConfig
from rm_ood.decision import AxisDecisions, ChannelDecisions, Decisions
from rm_ood.detectors.contrasted import ContrastedMahalanobis
from rm_ood.detectors.mahalanobis import MahalanobisDetector
from rm_ood.embed import Embedded
from rm_ood.errors import CalibrationError, FormatError, InputError, MismatchError, NotFittedError
from rm_ood.fingerprint import REQUIRED, SAMPLES, WeightSamples
from rm_ood.identity import Canaries, Identity
from rm_ood.preferences import CHOSEN, REJECTED

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ChannelScores:
    """Raw scores of n items: (n, m) in the order of `channels`, and per-class squared distances where there are classes."""

    channels: tuple[str, ...]
    scores: Floats
    classes: dict[str, Floats]

    @classmethod
    def concatenate(cls, parts: Sequence[ChannelScores]) -> ChannelScores:
        """The scores of several batches of the same channels as one."""
        names = parts[0].classes
        classes = {name: np.concatenate([part.classes[name] for part in parts]) for name in names}
        return cls(parts[0].channels, np.concatenate([part.scores for part in parts]), classes)

    def take(self, order: NDArray[np.int64]) -> ChannelScores:
        """Rows in another order."""
        return ChannelScores(self.channels, self.scores[order], {name: d[order] for name, d in self.classes.items()})


@dataclass(frozen=True)
class FittedState:
    """Everything `check` needs, swapped as one reference when a fit or calibration ends.

    Attributes:
        config: settings with `text_format` settled.
        detectors: channel of a vector -> its fitted detector.
        reward_mean, reward_sd: of the fit items, for the channel `reward`.
        table: calibration matrix, or None before calibration.
        heldout: raw calibration scores of the held-out share of the fit data, for comparison with a later set.
        fit_keys: (n,) uint64, sorted: the prompts that were fitted on.
        identity: of the reward model that was fitted (or last calibrated) on.
        overrides: fields in which the model at hand differs and was allowed to; every verdict says so.
        record: counts and notes of the fit for the guard card, JSON-able.
    """

    config: GuardConfig
    detectors: Mapping[str, MahalanobisDetector]
    reward_mean: float
    reward_sd: float
    table: CalibrationTable | None
    heldout: Floats | None
    fit_keys: NDArray[np.uint64]
    identity: Identity
    record: Mapping[str, Any]
    overrides: tuple[str, ...] = ()
    _profiles: dict[Any, Profile] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def channel_names(self) -> tuple[str, ...]:
        """Columns of the calibration matrix: every channel that was fitted, then the reward."""
        return (*fitted_channels(self.detectors), REWARD)

    @property
    def reward_floor(self) -> float:
        """A number for rewards that are not given out, no higher than any calibration prompt's reward.

        As far below the mean reward of the fit data as the calibration prompts' lie on either side of it at most, and three
        standard deviations at least.
        """
        table = self.table
        farthest = 0.0 if table is None else float(table.scores[:, table.channels.index(REWARD)].max())
        return self.reward_mean - max(3.0, farthest) * self.reward_sd

    def with_table(self, table: CalibrationTable, record: Mapping[str, Any]) -> FittedState:
        """The same fit with another calibration. What the doctor found of the old one goes."""
        kept = {name: value for name, value in self.record.items() if name != "doctor"}
        return replace(self, table=table, record={**kept, **record}, _profiles={})

    def with_settings(self, changes: Mapping[str, Any]) -> FittedState:
        """The same fit and calibration under other settings of the verdict (channels, alpha, confidence).

        Raises:
            InputError: a value out of range, or a channel that was not fitted.
        """
        config = replace(self.config, **changes)
        lacking = [name for name in config.joined if name not in self.channel_names]
        if lacking:
            raise InputError(f"channels {lacking} were not fitted; this guard has {list(self.channel_names)}")
        record = {name: value for name, value in self.record.items() if name != "doctor"}
        return replace(self, config=config, record=record, _profiles={})

    def restricted(self, channels: Collection[str]) -> FittedState:
        """The state without the detectors of other vectors: what a guard loaded with fewer channels can calibrate anew."""
        if self.detectors.keys() <= set(channels):
            return self
        detectors = {name: d for name, d in self.detectors.items() if name in channels}
        kept = (*fitted_channels(detectors), REWARD)
        columns = [self.channel_names.index(name) for name in kept]
        table = self.table
        if table is not None:
            table = replace(table, scores=table.scores[:, columns], channels=kept)
        return replace(
            self,
            detectors=detectors,
            heldout=None if self.heldout is None else self.heldout[:, columns],
            table=table,
            _profiles={},
        )

    def score(self, vectors: Mapping[str, Tensor], rewards: Floats | None) -> ChannelScores:
        """Raw channel scores of n items.

        Raises:
            MismatchError: a channel the guard lacks, or vectors of another width.
        """
        unknown = sorted(set(vectors) - set(self.detectors))
        if unknown:
            raise MismatchError(f"channels {unknown} are not in this guard; it has {sorted(self.detectors)}")
        names: list[tuple[str, str | None]] = []
        each: list[Tensor] = []
        for name, detector in self.detectors.items():
            if name not in vectors:
                continue
            if isinstance(detector, ContrastedMahalanobis):
                sq, ratio = detector.contrasted(vectors[name])
                names += [(name, None), (name, str(Channel.parse(name).contrast))]
                each += [sq.double(), ratio.double()[:, None]]
            else:
                names.append((name, None))
                each.append(detector.sq_distances(vectors[name]).double())
        if not each:
            return self.score_distances({}, rewards)
        # One copy for all channels: each waits for the device.
        ends = np.cumsum([part.shape[1] for part in each])[:-1]
        found = zip(names, np.split(torch.cat(each, 1).cpu().numpy(), ends, axis=1), strict=True)
        distances: dict[str, Floats] = {}
        ratios: dict[str, Floats] = {}
        for (name, contrast), part in found:
            if contrast is None:
                distances[name] = part
            else:
                ratios[contrast] = part[:, 0]
        return self.score_distances(distances, rewards, ratios)

    def score_distances(
        self, distances: Mapping[str, Floats], rewards: Floats | None, ratios: Mapping[str, Floats] | None = None
    ) -> ChannelScores:
        """Raw channel scores of n items whose distances are known already.

        Args:
            distances: channel -> (n, k) squared distances to the classes. rewards: (n,).
            ratios: contrast channel -> (n,) ratio of the distance to that to the noisy copies.
        """
        names = [*distances, *(ratios or {})]
        columns = [*(sq.min(1) for sq in distances.values()), *(ratios or {}).values()]
        classes = {name: sq for name, sq in distances.items() if sq.shape[1] > 1}
        if rewards is not None:
            with np.errstate(invalid="ignore"):
                score = np.abs(rewards - self.reward_mean) / self.reward_sd
            columns.append(np.where(np.isfinite(score), score, np.inf))
            names.append(REWARD)
        return ChannelScores(tuple(names), np.stack(columns, 1), classes)

    def distances(self, vectors: Mapping[str, Tensor]) -> Floats:
        """Squared distance to the nearest class of n items, (n, channels), in the order of the detectors; not weighed."""
        own = (d.own_sq_distances(vectors[name]) for name, d in self.detectors.items() if name in vectors)
        return np.stack([distances.double().cpu().numpy().min(1) for distances in own], 1)

    def profile(self, joined: tuple[str, ...], *, with_lengths: bool = True) -> Profile:
        """Standardisation and ranks for a set of joined channels, made on first use.

        Raises:
            NotFittedError: no calibration yet.
        """
        table = self.table
        if table is None:
            raise NotFittedError("the guard is fitted but not calibrated: call calibrate(dataset) before check()")
        key = (joined, with_lengths)
        if key not in self._profiles:
            if not with_lengths:
                table = replace(table, lengths=np.zeros_like(table.lengths))
            c = self.config
            self._profiles[key] = table.profile(joined, alpha=c.alpha, confidence=c.confidence, groups=c.groups)
        return self._profiles[key]

    def decide(
        self,
        scored: ChannelScores,
        part: Embedded,
        *,
        groups: Sequence[str] | None = None,
        prompt_index: NDArray[np.int64] | None = None,
    ) -> Decisions:
        """Verdicts from raw scores. Items that could not be scored get the smallest p-value, so they are flagged.

        Args:
            scored: raw channel scores of n items.
            part: what else is known of them; its vectors are not read.
            groups: (n,) labels, for a guard with a grouping column.
            prompt_index: (n,) which prompt of the call an item belongs to.
        """
        joined = tuple(name for name in self.config.joined if name in scored.channels)
        if not joined:
            raise InputError(f"none of the guard's channels {self.config.joined} was given; got {scored.channels}")
        bad = np.array([f is not None for f in part.failed], dtype=bool) | ~np.isfinite(scored.scores).all(1)
        raw = np.where(bad[:, None], np.inf, scored.scores)
        if part.lengths is None and self.config.groups == "length":
            raise InputError("this guard is calibrated by length: pass lengths=, (n, 2) prompt and response tokens")
        spans = np.zeros((len(raw), 2), dtype=np.int64) if part.lengths is None else part.lengths
        profile = self.profile(joined, with_lengths=part.lengths is not None)
        ranking = profile.rank(raw, scored.channels, spans, groups)
        mismatch = tuple(f"model_mismatch:{name}" for name in self.overrides)
        notes = [
            ((fail or "non_finite"), *given, *mismatch) if is_bad else (*given, *mismatch)
            for is_bad, fail, given in zip(bad, part.failed, part.reasons, strict=True)
        ]
        distances = scored.classes.get(FINAL)
        return Decisions(
            rewards=part.rewards,
            is_ood=ranking.p <= self.config.alpha,
            p_values=ranking.p,
            axes=self._axes(raw, scored, ranking, profile.digests),
            nearest_class=None if distances is None else np.where(bad, -1, distances.argmin(1)),
            class_log_odds=None if distances is None else np.where(bad, np.nan, class_log_odds(distances)),
            reasons=tuple(notes),
            truncated=part.truncated,
            prompt_index=np.arange(len(raw)) if prompt_index is None else prompt_index,
            alpha=self.config.alpha,
        )

    def nothing(self) -> Decisions:
        """The verdicts on no items."""
        names = self.channel_names
        none = Embedded({}, np.empty(0), np.empty((0, 2), dtype=np.int64), [], [], np.empty(0, dtype=bool))
        classes = {n: np.empty((0, len(d.classes_))) for n, d in self.detectors.items() if len(d.classes_) > 1}
        return self.decide(ChannelScores(names, np.empty((0, len(names))), classes), none, groups=[])

    def _axes(
        self, raw: Floats, scored: ChannelScores, ranking: Ranking, digests: Mapping[str, str]
    ) -> dict[str, AxisDecisions]:
        axes = {}
        for axis in self.config.axes:
            if axis not in ranking.axis_score:
                continue
            channels = {
                name: ChannelDecisions(
                    scores=raw[:, column],
                    ood_scores=ranking.z[name],
                    p_values=ranking.channel_p[name],
                    class_scores=scored.classes.get(name),
                )
                for column, name in enumerate(scored.channels)
                if Channel.parse(name).axis == axis
            }
            p = ranking.axis_p[axis]
            axes[axis] = AxisDecisions(ranking.axis_score[axis], p, p <= self.config.alpha, channels, digests[axis])
        return axes

    def to(self, device: torch.device) -> FittedState:
        """Move the detectors, and with them the scoring."""
        for detector in self.detectors.values():
            detector.to(device)
        return self

    def to_saved(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON-able settings for `rm_ood.artifact`."""
        tensors: dict[str, Tensor] = {"fit.prompt_keys": torch.from_numpy(self.fit_keys.view(np.int64).copy())}
        fits: dict[str, dict[str, Any]] = {}
        for i, (name, detector) in enumerate(self.detectors.items()):
            state = detector.state_tensors()
            tensors |= {f"channel.{i}.{key}": value.cpu().contiguous() for key, value in state.items()}
            fits[name] = {"shrinkage": detector.shrinkage_, "effective_rank": detector.effective_rank_}
            if detector.precision is not None:
                fits[name]["precision"] = detector.precision
        group_names: list[str] = []
        if self.table is not None:
            tensors["calibration.scores"] = torch.from_numpy(self.table.scores.copy())
            tensors["calibration.lengths"] = torch.from_numpy(self.table.lengths.copy())
            tensors["calibration.part_a"] = torch.from_numpy(self.table.part_a.copy())
            if self.table.groups is not None:
                group_names = sorted(set(self.table.groups))
                codes = [group_names.index(group) for group in self.table.groups]
                tensors["calibration.groups"] = torch.tensor(codes, dtype=torch.int64)
        if self.heldout is not None:
            tensors["heldout.scores"] = torch.from_numpy(self.heldout.copy())
        if self.identity.weights is not None:
            tensors["identity.weights"] = self.identity.weights.values
        if self.identity.canaries is not None:
            tensors["identity.rewards"] = torch.from_numpy(self.identity.canaries.rewards.copy())
            for i, name in enumerate(self.detectors):
                tensors[f"identity.canaries.{i}"] = self.identity.canaries.vectors[name].contiguous()
        config = {
            "settings": self.config.to_dict(),
            "channels": list(self.detectors),
            "detectors": fits,
            "reward": {"mean": self.reward_mean, "sd": self.reward_sd},
            "group_names": group_names,
            "fingerprint": dict(self.identity.fields),
            "weight_names": None if self.identity.weights is None else self.identity.weights.names,
            "record": dict(self.record),
        }
        return tensors, config

    @classmethod
    def from_saved(cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> FittedState:
        """The state that `to_saved` wrote.

        Raises:
            FormatError: a missing, unknown or malformed tensor or setting, naming it.
        """
        try:
            # Guards that were saved before there was a choice took vectors as they came.
            settings = GuardConfig.from_dict({"span_means": "raw", **config["settings"]})
            names = [str(Channel.parse(name)) for name in config["channels"]]
            mean, sd = float(config["reward"]["mean"]), float(config["reward"]["sd"])
            fits, group_names = config["detectors"], list(config["group_names"])
            detectors = {
                name: settings.detector_type(name).from_state(
                    _prefixed(tensors, f"channel.{i}."),
                    shrinkage=settings.shrinkage,  # type: ignore[arg-type]
                    floor=settings.floor,
                    effective_shrinkage=float(fits[name]["shrinkage"]),
                    effective_rank=float(fits[name]["effective_rank"]),
                    # Of guards whose distances a kernel has measured.
                    precision=_precision(fits[name]),
                )
                for i, name in enumerate(names)
            }
            fields, record = _fields(config["fingerprint"]), dict(config["record"])
            weight_names = config["weight_names"]
        except FormatError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"saved guard: settings are incomplete or malformed ({error})") from error
        if not np.isfinite([mean, sd]).all() or sd <= 0:
            raise FormatError(f"saved guard: reward mean {mean} and standard deviation {sd} are not usable")
        columns = (*fitted_channels(detectors), REWARD)
        lacking = [name for name in settings.joined if name not in columns]
        if FINAL not in detectors or lacking:
            raise FormatError(
                f"saved guard: channels {names}; 'final' and those of the settings, {lacking}, are needed"
            )
        prefixes = tuple(f"channel.{i}." for i in range(len(names)))
        others = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefixes)}
        widths = [detector.n_features_in_ for detector in detectors.values()]
        _check_others(others, len(columns), widths)
        return cls(
            config=settings,
            detectors=detectors,
            reward_mean=mean,
            reward_sd=sd,
            table=_table(tensors, columns, group_names),
            heldout=tensors["heldout.scores"].numpy() if "heldout.scores" in tensors else None,
            fit_keys=tensors["fit.prompt_keys"].numpy().view(np.uint64),
            identity=_identity(others, fields, weight_names, names),
            record=record,
        )


def fitted_channels(detectors: Mapping[str, MahalanobisDetector]) -> tuple[str, ...]:
    """The channels that some vectors' detectors score: each vector's own, then the contrasts."""
    contrasted = (name for name, detector in detectors.items() if isinstance(detector, ContrastedMahalanobis))
    return (*detectors, *(str(Channel.parse(name).contrast) for name in contrasted))


def _precision(fit: Mapping[str, Any]) -> Any:
    """What is recorded of a detector's kernel, for the detector to read; it is there or not, but never null."""
    if "precision" in fit and fit["precision"] is None:
        raise FormatError("saved guard: precision is null; leave it out")
    return fit.get("precision")


def _prefixed(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _fields(value: Any) -> dict[str, str]:
    """The fingerprint: texts by name, whole or none at all (vectors of unknown origin)."""
    fields = dict(value)
    if not all(isinstance(k, str) and isinstance(v, str) for k, v in fields.items()):
        raise FormatError("saved guard: the fingerprint holds something else than texts")
    if fields and not fields.keys() >= REQUIRED:
        raise FormatError(f"saved guard: the fingerprint lacks {sorted(REQUIRED - fields.keys())}")
    return fields


def _identity(
    tensors: Mapping[str, Tensor], fields: dict[str, str], weight_names: Any, channels: list[str]
) -> Identity:
    weights = canaries = None
    if ("identity.weights" in tensors) != isinstance(weight_names, str):
        raise FormatError("saved guard: weight_names and identity.weights belong together, and one is missing")
    if "identity.weights" in tensors:
        weights = WeightSamples(str(weight_names), tensors["identity.weights"])
    if "identity.rewards" in tensors:
        vectors = {name: tensors[f"identity.canaries.{i}"] for i, name in enumerate(channels)}
        canaries = Canaries(vectors, tensors["identity.rewards"].numpy())
    return Identity(fields, weights, canaries)


def _check_others(tensors: Mapping[str, Tensor], n_channels: int, widths: list[int]) -> None:
    """Every tensor beside the detectors' own: exact names, dtypes and shapes."""

    def rows(name: str) -> int:
        return tensors[name].shape[0] if name in tensors and tensors[name].ndim else 0

    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "fit.prompt_keys": (torch.int64, (rows("fit.prompt_keys"),))
    }
    if any(name.startswith("calibration.") for name in tensors):
        n = rows("calibration.scores")
        expected["calibration.scores"] = (torch.float64, (n, n_channels))
        expected["calibration.lengths"] = (torch.int64, (n, 2))
        expected["calibration.part_a"] = (torch.bool, (n,))
        if "calibration.groups" in tensors:
            expected["calibration.groups"] = (torch.int64, (n,))
    if "heldout.scores" in tensors:
        expected["heldout.scores"] = (torch.float64, (rows("heldout.scores"), n_channels))
    if "identity.weights" in tensors:
        expected["identity.weights"] = (torch.float32, (rows("identity.weights"), SAMPLES))
    if any(name in tensors for name in ("identity.rewards", "identity.canaries.0")):
        expected["identity.rewards"] = (torch.float64, (len(CANARIES),))
        for i, width in enumerate(widths):
            expected[f"identity.canaries.{i}"] = (torch.float32, (len(CANARIES), width))
    check_schema(tensors, expected, allow_inf=("calibration.scores", "heldout.scores", "identity.weights"))


def _table(tensors: Mapping[str, Tensor], channels: tuple[str, ...], group_names: list[str]) -> CalibrationTable | None:
    if "calibration.scores" not in tensors:
        return None
    scores = tensors["calibration.scores"]
    groups = None
    if "calibration.groups" in tensors:
        codes = tensors["calibration.groups"].tolist()
        if any(not 0 <= code < len(group_names) for code in codes):
            raise FormatError("calibration.groups: a code outside the group names")
        groups = tuple(group_names[code] for code in codes)
    try:
        return CalibrationTable(
            scores=scores.numpy(),
            channels=channels,
            lengths=tensors["calibration.lengths"].numpy(),
            part_a=tensors["calibration.part_a"].numpy(),
            groups=groups,
        )
    except CalibrationError as error:
        raise FormatError(f"saved guard: {error}") from error


def class_log_odds(distances: Floats) -> Floats:
    """(d_rejected - d_chosen) / 2 of (n, 2) squared distances; positive = chosen-like."""
    with np.errstate(invalid="ignore"):
        return (distances[:, REJECTED] - distances[:, CHOSEN]) / 2
