"""The calibration table: channel scores of held-out prompts, and how any of its channels are joined into one verdict.

Part A of the prompts fits how each channel's score depends on the span's length; part B is what every verdict is
ranked among. Standardise on A, take the maximum over channels, then over axes, rank in B: the rank is exact whatever A
learned, because B and the traffic go through the same fixed function.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rm_ood.channels import AXES, REWARD, SPANS, Channel
from rm_ood.conformal import (
    ALL,
    Floats,
    Ints,
    Pool,
    check_groups,
    guaranteed_rank,
    in_groups,
    minimum_calibration,
    pool_groups,
    ranked_by_group,
    scores_digest,
)
from rm_ood.errors import CalibrationError, InputError
from rm_ood.length import LengthStandardiser

Bools = NDArray[np.bool_]
MINIMUM_A = 50
LENGTH = "length"
LENGTH_BINS = 5


def part_a_size(n: int) -> int:
    """How many of n calibration prompts go to part A: a fifth, at least 50."""
    return min(n, max(MINIMUM_A, math.ceil(n / 5)))


def prompts_needed(alpha: float, confidence: float | None) -> int:
    """Calibration prompts needed in all, parts A and B together: 374 for 1 % at 95 %."""
    needed = minimum_calibration(alpha, confidence)
    n = needed + MINIMUM_A
    while n - part_a_size(n) < needed:
        n += 1
    return n


def split_parts(keys: ArrayLike, seed: int) -> Bools:
    """Which prompts are in part A: those with the smallest seeded hash.

    Args:
        keys: (n,) uint64, one distinct key (hash of the normalised prompt) per prompt.
        seed: any integer.

    Returns:
        (n,) bool; depends on the set of keys, not on their order.

    Raises:
        CalibrationError: a key appears twice; n counts prompts.
    """
    values = np.asarray(keys, dtype=np.uint64).ravel()
    repeated = values.size - np.unique(values).size
    if repeated:
        raise CalibrationError(f"{repeated} of {values.size} calibration rows repeat a prompt: keep one row per prompt")
    # A bijection of 64-bit words, so that distinct prompts cannot tie.
    hashed = splitmix64(values ^ splitmix64(np.array([seed % 2**64], dtype=np.uint64)))
    part_a = np.zeros(values.size, dtype=bool)
    part_a[np.argsort(hashed)[: part_a_size(values.size)]] = True
    return part_a


def splitmix64(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijection of 64-bit words that looks like noise (Steele, Lea, Flood, OOPSLA 2014)."""
    z = words + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@dataclass(frozen=True)
class Ranking:
    """What a `Profile` says about q inputs. Every p-value: small = out-of-distribution.

    Attributes:
        z: channel -> (q,) standardised score.
        channel_p: channel -> (q,) p-value of that channel alone.
        axis_score: axis -> (q,) largest z of the axis' joined channels.
        axis_p: axis -> (q,) p-value of the axis alone.
        score: (q,) largest axis score.
        p: (q,) combined p-value; flagged exactly when p <= alpha.
    """

    z: dict[str, Floats]
    channel_p: dict[str, Floats]
    axis_score: dict[str, Floats]
    axis_p: dict[str, Floats]
    score: Floats
    p: Floats


@dataclass(frozen=True)
class Profile:
    """One choice of joined channels, with part B standardised and sorted.

    Attributes:
        joined: channels in the verdict.
        channels: all channels of the table, in its order.
        pools: group -> `Pool` (k, threshold, sorted scores) of the combined score; without groups, the one pool "all".
        length_edges: response lengths (tokens) between the groups of `groups="length"`, else None.
    """

    alpha: float
    confidence: float | None
    joined: tuple[str, ...]
    channels: tuple[str, ...]
    pools: dict[str, Pool]
    length_edges: tuple[int, ...] | None
    _standardisers: dict[str, LengthStandardiser] = field(repr=False)
    _ascending: dict[str, dict[str, Floats]] = field(repr=False)

    def rank(
        self,
        scores: ArrayLike,
        channels: tuple[str, ...],
        lengths: ArrayLike,
        groups: Sequence[str] | None = None,
    ) -> Ranking:
        """Standardise, join and rank q inputs.

        Args:
            scores: (q, m) channel scores in the detectors' own unit; a non-finite score gets the smallest p-value.
            channels: m names; every joined channel must be there, further ones get their own z and p-value.
            lengths: (q, 2) prompt and response span lengths in tokens.
            groups: (q,) labels when the profile has column groups.

        Raises:
            InputError: a channel the table lacks, a joined channel missing, wrong shapes, or an unknown group.
        """
        table = np.asarray(scores, dtype=np.float64)
        spans = np.asarray(lengths, dtype=np.int64)
        self._check(table, channels, spans)
        labels = self.labels(spans, groups)
        z = {name: self._standardisers[name](table[:, i], _span(name, spans)) for i, name in enumerate(channels)}
        axis_score = _axis_scores(z, self.joined)
        score = _largest(axis_score)
        return Ranking(
            z=z,
            channel_p={name: self._p(name, z[name], labels) for name in channels},
            axis_score=axis_score,
            axis_p={axis: self._p(_axis_key(axis), values, labels) for axis, values in axis_score.items()},
            score=score,
            p=self._p(_JOINED, score, labels),
        )

    def calibration_scores(self) -> Floats:
        """Combined scores of part B, (n_b,): what every verdict is ranked among."""
        return np.concatenate([pool.scores for pool in {id(pool): pool for pool in self.pools.values()}.values()])

    def axis_scores(self, axes: Sequence[str] | None = None) -> dict[str, Floats]:
        """Axis -> scores of part B, (n_b,): what a traffic monitor compares an axis' `ood_score` with.

        Raises:
            InputError: an axis that is not judged.
        """
        wanted = [axis for axis in AXES if _axis_key(axis) in self._ascending] if axes is None else axes
        if not wanted:
            raise InputError("axes: got none")
        return {axis: np.concatenate([scores for scores, _ in self.axis_pools(axis)]) for axis in wanted}

    @cached_property
    def digests(self) -> dict[str, str]:
        """Axis -> digest of `axis_scores`: tells whether two verdicts were ranked among the same scores."""
        return {axis: scores_digest(scores) for axis, scores in self.axis_scores().items()}

    def axis_pools(self, axis: str | None) -> list[tuple[Floats, int]]:
        """(scores in ascending order, k of alpha) of each group of one axis; of the whole verdict for None.

        Raises:
            InputError: an axis that is not judged.
        """
        key = _JOINED if axis is None else _axis_key(axis)
        if key not in self._ascending:
            judged = [name for name in AXES if _axis_key(name) in self._ascending]
            raise InputError(f"axis {axis!r}: this guard judges {judged}")
        # Groups that were too small share one pool.
        pools = {id(scores): scores for scores in self._ascending[key].values()}.values()
        return [(scores, guaranteed_rank(scores.size, self.alpha, self.confidence)) for scores in pools]

    def _p(self, key: str, values: Floats, labels: list[str]) -> Floats:
        return ranked_by_group(self._ascending[key], values, labels, self.confidence)

    def _check(self, table: Floats, channels: tuple[str, ...], spans: Ints) -> None:
        unknown = [name for name in channels if name not in self._standardisers]
        if unknown:
            raise InputError(f"channels {unknown} are not in this calibration; it has {list(self.channels)}")
        missing = [name for name in self.joined if name not in channels]
        if missing:
            raise InputError(f"channels {missing} are part of the verdict: pass their scores too")
        if table.ndim != 2 or table.shape[1] != len(channels) or len(set(channels)) != len(channels):
            raise InputError(f"scores: expected (q, {len(channels)}) for channels {channels}, got {table.shape}")
        if spans.shape != (len(table), 2):
            raise InputError(f"lengths: expected ({len(table)}, 2), got {spans.shape}")

    def labels(self, spans: Ints, groups: Sequence[str] | None) -> list[str]:
        """The pool that each of q inputs is ranked in, by span lengths (q, 2) or given groups."""
        if self.length_edges is not None:
            return _length_labels(spans[:, 1], self.length_edges)
        if self.pools.keys() == {ALL} and groups is None:
            return [ALL] * len(spans)
        return check_groups(groups, len(spans), self.pools)


@dataclass(frozen=True)
class CalibrationTable:
    """Channel scores of n calibration prompts, one response each; saved with the guard as it is.

    Args:
        scores: (n, m) float64 channel scores in the detectors' own unit (squared distances, weighed where the detector
            weighs them; ratios of distances for contrasts; |standardised reward| for the channel `reward`); +inf where an
            input had no finite score.
        channels: m names, see `rm_ood.channels`.
        lengths: (n, 2) int64 prompt and response span lengths in tokens.
        part_a: (n,) bool, from `split_parts`.
        groups: (n,) labels, or None.

    Raises:
        CalibrationError: shapes that disagree, NaN or -inf scores, an unknown or doubled channel.
    """

    scores: Floats = field(repr=False)
    channels: tuple[str, ...]
    lengths: Ints = field(repr=False)
    part_a: Bools = field(repr=False)
    groups: tuple[str, ...] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name, dtype in (("scores", np.float64), ("lengths", np.int64), ("part_a", np.bool_)):
            object.__setattr__(self, name, np.ascontiguousarray(getattr(self, name), dtype=dtype))
        n, m = len(self.part_a), len(self.channels)
        shapes = {"scores": self.scores.shape, "lengths": self.lengths.shape, "part_a": self.part_a.shape}
        if shapes != {"scores": (n, m), "lengths": (n, 2), "part_a": (n,)} or len(set(self.channels)) != m:
            raise CalibrationError(f"calibration table: {shapes} do not fit together for channels {self.channels}")
        if self.groups is not None and len(self.groups) != n:
            raise CalibrationError(f"calibration table: {len(self.groups)} groups for {n} prompts")
        bad = np.isnan(self.scores) | np.isneginf(self.scores)
        if bad.any():
            names = [self.channels[i] for i in np.flatnonzero(bad.any(axis=0))]
            raise CalibrationError(f"calibration scores: {int(bad.any(axis=1).sum())} rows are NaN or -inf in {names}")
        if self.lengths.min(initial=0) < 0:
            raise CalibrationError("calibration table: a span length is negative")

    @property
    def n(self) -> int:
        """Number of calibration prompts."""
        return len(self.part_a)

    @property
    def n_b(self) -> int:
        """Number of prompts in part B: the n of every promise."""
        return self.n - int(self.part_a.sum())

    def profile(
        self,
        joined: tuple[str, ...],
        *,
        alpha: float,
        confidence: float | None,
        groups: str | None = None,
    ) -> Profile:
        """Join some channels into a verdict.

        Args:
            joined: channels of the verdict, at least one.
            alpha: tolerated false-alarm rate per input, a fraction in (0, 1).
            confidence: share of calibration draws in which alpha holds; None: on average.
            groups: None; `"length"` for quintiles of the response length; any other name for the table's own labels.
                Each group keeps the promise by itself, as far as it has prompts enough; small ones are merged.

        Raises:
            CalibrationError: too few prompts; the message names how many are missing in all.
            InputError: no channel, one that the table lacks, or groups that it does not have.
        """
        lacking = [name for name in joined if name not in self.channels]
        if lacking or not joined:
            raise InputError(f"channels {lacking or '()'} are not in this calibration; it has {list(self.channels)}")
        if groups not in (None, LENGTH) and self.groups is None:
            raise InputError(f"groups={groups!r}: the calibration rows were read without a group column")
        needed = minimum_calibration(alpha, confidence)
        self._check_size(needed, alpha, confidence)
        standardisers = {name: self._standardise(name) for name in self.channels}
        part_b: Bools = np.logical_not(self.part_a)
        lengths, scores = self.lengths[part_b], self.scores[part_b]
        z = {name: standardisers[name](scores[:, i], _span(name, lengths)) for i, name in enumerate(self.channels)}
        axis_score = _axis_scores(z, joined)
        ranked = {_JOINED: _largest(axis_score), **z}
        ranked.update({_axis_key(axis): values for axis, values in axis_score.items()})

        edges = _length_edges(self.lengths[self.part_a, 1], lengths[:, 1], needed) if groups == LENGTH else None
        labels, names = self._part_b_labels(groups, part_b, edges)
        members = pool_groups({name: labels.count(name) for name in names}, needed)
        rows = {pooled: in_groups(labels, pooled) for pooled in set(members.values())}
        pools = {pooled: Pool.fit(ranked[_JOINED][inside], alpha, confidence) for pooled, inside in rows.items()}
        ascending = {
            key: {pooled: np.sort(values[inside]) for pooled, inside in rows.items()} for key, values in ranked.items()
        }
        return Profile(
            alpha=alpha,
            confidence=confidence,
            joined=tuple(joined),
            channels=self.channels,
            pools={name: pools[members[name]] for name in names},
            length_edges=edges,
            _standardisers=standardisers,
            _ascending={key: {name: by_pool[members[name]] for name in names} for key, by_pool in ascending.items()},
        )

    def _part_b_labels(
        self, groups: str | None, part_b: Bools, edges: tuple[int, ...] | None
    ) -> tuple[list[str], list[str]]:
        """The group of each prompt of part B, and all groups in the order of the report."""
        if edges is not None:
            return _length_labels(self.lengths[part_b, 1], edges), _length_names(edges)
        if groups is None or self.groups is None:
            return [ALL] * self.n_b, [ALL]
        return [self.groups[i] for i in np.flatnonzero(part_b)], sorted(set(self.groups))

    def _check_size(self, needed: int, alpha: float, confidence: float | None) -> None:
        total = prompts_needed(alpha, confidence)
        short = max(0, needed - self.n_b) + max(0, MINIMUM_A - int(self.part_a.sum()))
        if short:
            missing = max(short, total - self.n)
            raise CalibrationError(
                f"alpha={alpha} at confidence {confidence} needs {total} calibration prompts ({needed} to rank among "
                f"and the rest to fit the length curves): have {self.n}, need {missing} more. "
                "Pass more in-distribution prompts, or raise alpha."
            )

    def _standardise(self, name: str) -> LengthStandardiser:
        scores = self.scores[self.part_a, self.channels.index(name)]
        finite = np.isfinite(scores)
        if 2 * finite.sum() < MINIMUM_A:
            raise CalibrationError(
                f"channel {name}: only {int(finite.sum())} of the {scores.size} calibration scores of part A are finite"
            )
        lengths = _span(name, self.lengths[self.part_a])
        # Squared distances compare as logs; |reward|, and detectors whose scores go below 0, as they are.
        logarithmic = name != REWARD and bool((scores >= 0).all())
        return LengthStandardiser.fit(scores[finite], lengths[finite], logarithmic=logarithmic)


_JOINED = "joined"


def _axis_key(axis: str) -> str:
    return f"axis {axis}"


def _span(channel: str, lengths: Ints) -> Ints:
    return lengths[:, SPANS.index(Channel.parse(channel).span)]


def _axis_scores(z: dict[str, Floats], joined: tuple[str, ...]) -> dict[str, Floats]:
    by_axis = {axis: [z[name] for name in joined if Channel.parse(name).axis == axis] for axis in AXES}
    return {axis: np.maximum.reduce(columns) for axis, columns in by_axis.items() if columns}


def _largest(axis_score: dict[str, Floats]) -> Floats:
    return np.asarray(np.max(list(axis_score.values()), axis=0), dtype=np.float64)


def _length_edges(part_a: Ints, part_b: Ints, needed: int) -> tuple[int, ...]:
    """Response lengths that end each group but the last: quintiles of A, neighbours merged until B fills each."""
    shares = np.arange(1, LENGTH_BINS) / LENGTH_BINS
    edges = sorted({int(edge) for edge in np.quantile(part_a, shares, method="lower")})
    while edges:
        counts = np.bincount(np.searchsorted(edges, part_b, side="left"), minlength=len(edges) + 1)
        smallest = int(counts.argmin())
        if counts[smallest] >= needed:
            break
        left = smallest == len(edges) or (smallest > 0 and counts[smallest - 1] < counts[smallest + 1])
        del edges[smallest - 1 if left else smallest]
    return tuple(edges)


def _length_names(edges: tuple[int, ...]) -> list[str]:
    starts = [0, *(edge + 1 for edge in edges)]
    return [*(f"{low}-{high} tokens" for low, high in zip(starts, edges, strict=False)), f"{starts[-1]}+ tokens"]


def _length_labels(lengths: Ints, edges: tuple[int, ...]) -> list[str]:
    names = _length_names(edges)
    return [names[i] for i in np.searchsorted(edges, lengths, side="left")]
