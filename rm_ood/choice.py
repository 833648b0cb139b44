"""Channels chosen on the user's own reward model, without out-of-distribution data: `rm-ood fit --channels auto`.

Which layers see a shift differs between reward models, and shifts that anyone can plant in clean text tell the good ones
from the bad (benchmarks/README.md, "Channels", has how far).
The prompts that the choice is made on are neither fitted nor calibrated on, so no promise of the guard is touched.
"""

from __future__ import annotations

import itertools
import numbers
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from rm_ood.channels import FINAL, GIVEN_PROMPT, Channel
from rm_ood.dialogue import Text
from rm_ood.errors import CalibrationError, InputError
from rm_ood.guard import OODGuard
from rm_ood.preferences import Item, RowReader, hash_fraction, prompt_key
from rm_ood.reward_model import find_blocks
from rm_ood.rows import NumberedRows, numbered_rows
from rm_ood.scoring import Scoring
from rm_ood.study.detection import auroc
from rm_ood.study.planted import EMPTY_RESPONSE, changed, changes
from rm_ood.workers import ALONE, Workers

# Fractions of the depth whose span means are candidates, and how many of them are joined at most.
DEPTHS, MOST_DEPTHS = (0.17, 0.33, 0.5, 0.67, 0.83, 1.0), 3
# Prompts to choose on: this share of the data, up to so many; fewer than the least tell too little.
TUNING_SHARE, MOST_PROMPTS, LEAST_PROMPTS = 0.1, 100, 30
# Another split than the one into fit and calibration.
_SALT = 0x7C1

# Joined as it is where that axis is judged.
_GIVEN = f"{GIVEN_PROMPT}/mean@0.67"

Clean = tuple[Text, str]
_Row = tuple[int, Mapping[str, Any]]


@dataclass(frozen=True)
class Choice:
    """Which channels were chosen, and why.

    Attributes:
        channels: those that are joined, `final` first where the guard judges responses.
        seen: mean AUROC, over planted shifts and sides, of the chosen channels.
        candidates: the depths of a candidate, as text -> its mean AUROC; all of them, best first.
        n_prompts: prompts that the choice was made on.
    """

    channels: tuple[str, ...]
    seen: float
    candidates: Mapping[str, float]
    n_prompts: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return {**asdict(self), "channels": list(self.channels), "candidates": dict(self.candidates)}

    @classmethod
    def from_saved(cls, _: Any, saved: Mapping[str, Any]) -> Choice:
        """The choice that `to_dict` wrote; JSON forgets the order of the candidates."""
        order = sorted(saved["candidates"].items(), key=lambda item: -item[1])
        return cls(tuple(saved["channels"]), saved["seen"], dict(order), saved["n_prompts"])

    def __str__(self) -> str:
        best = list(self.candidates.items())
        beside = ", ".join(f"{name} {value:.3f}" for name, value in best[1:4])
        return (
            f"Channels chosen on {self.n_prompts} prompts with planted shifts: {', '.join(self.channels)} (mean AUROC "
            f"{self.seen:.3f}; next: {beside}; last: {best[-1][0]} {best[-1][1]:.3f})"
        )


def pool(model: Any, axes: Sequence[str], layers: str | None = None) -> tuple[str, ...]:
    """Every channel that a choice is made from, for a model's depth: fit a guard with these.

    Args:
        model: the reward model. axes: what is judged. layers: as `GuardConfig.layers`.
    """
    n_blocks = len(find_blocks(model, layers))
    by_block = {round(depth * n_blocks): depth for depth in DEPTHS if round(depth * n_blocks) > 0}
    return _channels(axes, list(by_block.values()))


def fit_choosing(
    guard: OODGuard, dataset: Any, *, calibration: Any = 0.3, progress: bool = True, workers: Workers = ALONE
) -> Choice:
    """Fit and calibrate a guard, and keep the channels that see planted shifts best.

    Args:
        guard: made with `channels=pool(model, axes)`; afterwards it has the chosen channels alone.
        dataset: as for `OODGuard.fit`; a tenth of the prompts, at most 100, is kept aside for the choice.
        calibration: as for `OODGuard.fit`.
        progress: show progress bars on stderr.
        workers: as for `OODGuard.fit`; each chooses, and the choice of the first counts.

    Raises:
        CalibrationError: fewer than 30 prompts to choose on (pass more data, or name the channels), and as `fit`.
        InputError: the guard has no span means to choose from.
    """
    if not _depths(guard) or not set(guard.config.axes) & {"prompt", "response"}:
        raise InputError(
            f"channels: a choice is made from span means, as in pool(model, axes); this guard has {guard.config.joined}"
        )
    kept: dict[int, Clean] = {}
    others = _others(guard, dataset, kept)
    # Too few is known before the first forward: what is read to know it is fitted on afterwards.
    first = _until_enough(others, kept)
    is_share = isinstance(calibration, numbers.Real)
    # Read after the fit, when it is known which prompts were kept.
    calibrates = calibration if is_share else NumberedRows(_without(guard, calibration, kept))
    guard.fit(NumberedRows(itertools.chain(first, others)), calibration=calibrates, progress=progress, workers=workers)
    items = [item for item in kept.values() if _encodes(guard.scoring(), item)]
    choice = workers.from_first(
        lambda: choose_channels(guard, items, progress=progress),
        lambda chosen: ({}, chosen.to_dict()),
        Choice.from_saved,
    )
    guard.keep(choice.channels)
    guard.annotate(choice=choice.to_dict())
    return choice


def choose_channels(guard: OODGuard, items: Sequence[Clean], *, progress: bool = False) -> Choice:
    """The depths whose span means, joined with `final`, see planted shifts of clean items best.

    Args:
        guard: fitted and calibrated with span means at several depths (see `pool`); those are the candidates.
        items: clean (prompt, response), neither fitted nor calibrated on.
        progress: show a progress bar on stderr.
    """
    # What is planted here is no traffic: the guard's own check still has to warn when it sees some.
    scoring = replace(guard.scoring(), ends=None)
    axes, planted = scoring.state.config.axes, _planted(items, scoring.state.config.axes)
    candidates = [d for k in range(1, MOST_DEPTHS + 1) for d in itertools.combinations(_depths(guard), k)]
    fitted = scoring.state.channel_names
    profiles = {depths: scoring.state.profile(_channels(axes, depths, fitted)) for depths in candidates}

    def scores(group: Sequence[Clean]) -> dict[tuple[float, ...], NDArray[np.float64]]:
        group = [item for item in group if _encodes(scoring, item)]
        raw, part = scoring.score(scoring.encode(list(group)))
        # Items come with their spans here, always.
        spans = np.zeros((len(group), 2), dtype=np.int64) if part.lengths is None else part.lengths
        values = np.where(np.isfinite(raw.scores), raw.scores, np.inf)
        # Groups keep thresholds apart, not scores.
        labels = (
            None if scoring.state.config.groups is None else [next(iter(profiles[candidates[0]].pools))] * len(group)
        )
        found = {}
        for depths, profile in profiles.items():
            columns = [raw.channels.index(name) for name in profile.joined]
            ranking = profile.rank(values[:, columns], profile.joined, spans, labels)
            found[depths] = ranking.score
        return found

    seen: dict[tuple[float, ...], list[float]] = {depths: [] for depths in candidates}
    with tqdm(total=1 + len(planted), desc="choose channels", unit="shift", disable=not progress) as bar:
        clean = scores(items)
        bar.update()
        for group in planted:
            for depths, shifted in scores(group).items():
                seen[depths].append(auroc(clean[depths], shifted))
            bar.update()
    means = {depths: float(np.mean(values)) for depths, values in seen.items()}
    order = sorted(candidates, key=lambda depths: (-means[depths], len(depths), depths))
    return Choice(
        channels=_channels(axes, order[0], fitted),
        seen=means[order[0]],
        candidates={" + ".join(f"{d:g}" for d in depths): means[depths] for depths in order},
        n_prompts=len(items),
    )


def _channels(axes: Sequence[str], depths: Sequence[float], fitted: Collection[str] = ()) -> tuple[str, ...]:
    """`final` and the span means at some depths, with their contrasts where those were fitted."""
    final = (*((FINAL,) if "response" in axes else ()), *((_GIVEN,) if GIVEN_PROMPT in axes else ()))
    names = (f"{axis}/mean@{depth:g}" for depth in depths for axis in ("prompt", "response") if axis in axes)
    means = [Channel.parse(name) for name in names]
    contrasts = [str(mean.contrast) for mean in means]
    return (*final, *map(str, means), *(name for name in contrasts if name in fitted))


def _depths(guard: OODGuard) -> list[float]:
    """Fractions of the depth at which the guard has the span means of every axis that it judges."""
    parsed = [Channel.parse(name) for name in guard.config.joined]
    axes = {axis for axis in guard.config.axes if axis in ("prompt", "response")}
    found: dict[float, set[str]] = {}
    for channel in parsed:
        if channel.pooling == "mean" and isinstance(channel.layer, float):
            found.setdefault(channel.layer, set()).add(channel.axis)
    return sorted(depth for depth, has in found.items() if axes <= has)


def _planted(items: Sequence[Clean], axes: Sequence[str]) -> list[list[Clean]]:
    """The items under every planted shift, on every judged side and on both."""
    judged = [axis for axis in ("prompt", "response") if axis in axes]
    sides = [[axis] for axis in judged] + ([judged] if len(judged) == 2 else [])
    return [
        [changed(item, i, change, side, 0) for i, item in enumerate(items)]
        for name, change in changes(items).items()
        # No response is flagged by its reason, whatever the channels.
        if name != EMPTY_RESPONSE
        for side in sides
    ]


def _others(guard: OODGuard, dataset: Any, kept: dict[int, Clean]) -> Iterator[_Row]:
    """The rows that are fitted and calibrated on; the first response of each other prompt goes to `kept`.

    Raises:
        InputError: an unusable row under `on_bad="error"`. Otherwise the fit drops and counts it.
    """
    config, passed = guard.config, set[int]()
    reader = config.reader(labelled=True)
    for number, row in numbered_rows(dataset):
        try:
            item = reader.items(row, number)[0]
            key = prompt_key(item.prompt)
            if key in kept:
                continue
            wanted = hash_fraction(key, config.seed ^ _SALT) < TUNING_SHARE
            # A prompt whose first row came when there was no room is fitted on with all its rows.
            room = wanted and key not in passed and len(kept) < MOST_PROMPTS
            if room and isinstance(item.response, str):
                kept[key] = (item.prompt, item.response)
                continue
            if wanted:
                passed.add(key)
        except InputError:
            if config.on_bad == "error":
                raise
        yield number, row


def _until_enough(others: Iterator[_Row], kept: Mapping[int, Clean]) -> list[_Row]:
    """The rows up to the one by which enough prompts are kept for the choice.

    Raises:
        CalibrationError: the data end before.
    """
    rows: list[_Row] = []
    while len(kept) < LEAST_PROMPTS:
        row = next(others, None)
        if row is None:
            raise CalibrationError(
                f"channels='auto': {len(kept)} prompts to choose on, at least {LEAST_PROMPTS} are needed, of a "
                f"{TUNING_SHARE:.0%} share of the data ({len(rows)} rows beside them). Pass more data, or name the channels."
            )
        rows.append(row)
    return rows


def _without(guard: OODGuard, dataset: Any, kept: Mapping[int, Clean]) -> Iterator[_Row]:
    """The rows of a calibration set whose prompts were not kept for the choice."""
    reader = guard.config.reader(labelled=False)
    for number, row in numbered_rows(dataset):
        item = _readable(reader, row, number)
        if item is None or prompt_key(item.prompt) not in kept:
            yield number, row


def _encodes(scoring: Scoring, item: Clean) -> bool:
    """Whether the guard can read an item; what is too long may be an error."""
    try:
        replace(scoring, ends=None).encode([item])
    except InputError:
        return False
    return True


def _readable(reader: RowReader, row: Mapping[str, Any], number: int) -> Item | None:
    try:
        return reader.items(row, number)[0]
    except InputError:
        # The calibration says what is wrong with it, or drops it.
        return None
