"""The pass over the data: rows to items, items to vectors, vectors to moments or to the calibration reservoir."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from tqdm.auto import tqdm

from rm_ood.calibration import CalibrationTable, split_parts
from rm_ood.channels import FINAL, REWARD
from rm_ood.config import GuardConfig
from rm_ood.copies import NOISY_PROMPTS, NoisyCopies
from rm_ood.detectors.contrasted import ContrastedMahalanobis
from rm_ood.detectors.gaussian import NormalisedMahalanobis
from rm_ood.detectors.mahalanobis import MahalanobisDetector
from rm_ood.dialogue import response_text
from rm_ood.embed import Embedded, Embedder, needed_channels
from rm_ood.errors import (
    CalibrationError,
    CalibrationWarning,
    CaptureError,
    InputError,
    NonFiniteError,
    TokenisationWarning,
)
from rm_ood.fitting import (
    WINDOW_BATCHES,
    DuplicateSketch,
    FitMoments,
    Kept,
    KeySet,
    Reservoir,
    in_other_half,
    windows,
)
from rm_ood.identity import Identity
from rm_ood.moments import ClassMoments
from rm_ood.preferences import (
    CHOSEN,
    CLASSES,
    REJECTED,
    Item,
    RowReader,
    hash_fraction,
    prompt_key,
    stable_hash,
)
from rm_ood.rows import dataset_length, numbered_rows
from rm_ood.skew import Ends, grpo_difference
from rm_ood.state import ChannelScores, FittedState, class_log_odds
from rm_ood.text import Encoded, TextEncoder, resolve_format

_MANY_DUPLICATES = 0.2
# Rank-sum p-value, over all channels, under which two calibration sets are called different.
_SHIFTED = 1e-3


@dataclass(frozen=True)
class _Work:
    """An item on its way through the model, and what its vectors are for."""

    item: Item
    encoded: Encoded
    key: int
    for_calibration: bool
    response_hash: int
    first: bool


class Fitter:
    """One pass over a dataset.

    Args:
        embedder: the model column.
        config: settings; `text_format="auto"` is settled by the first window of the data.
        share: share of the prompts that go to calibration, in [0, 1]; at 1 nothing is fitted.
    """

    def __init__(self, embedder: Embedder, config: GuardConfig, share: float) -> None:
        self.embedder = embedder
        self.config = config
        self.share = share
        self.moments = FitMoments(
            1 if config.one_class else len(CLASSES),
            normalised=lambda name: issubclass(config.detector_type(name), NormalisedMahalanobis),
        )
        # Told before the forwards, not after them.
        self._blind_to = embedder.capture.reward_direction() if config.project_out_reward and share < 1 else None
        self.noise = FitMoments(1, normalised=self.moments.normalised)
        self.copies = NoisyCopies(NOISY_PROMPTS, config.seed)
        self._copied = any(issubclass(config.detector_type(n), ContrastedMahalanobis) for n in needed_channels(config))
        self.reservoir = Reservoir[Kept](config.max_calibration, config.seed)
        self.fit_keys = KeySet()
        self.duplicates = DuplicateSketch()
        self.ends = Ends(embedder.tokenizer)
        self.notes: list[str] = []
        self.counts = {"rows": 0, "items": 0, "fit_items": 0, "dropped": 0, "truncated": 0}

    def run(self, dataset: Any, *, labelled: bool, progress: bool) -> None:
        """Read everything once.

        Raises:
            InputError, NonFiniteError, CaptureError: an unusable row under `on_bad="error"`.
            CalibrationError: no rows.
        """
        reader = self.config.reader(labelled=labelled)
        text: TextEncoder | None = None
        started = time.monotonic()
        description = "fit" if self.share < 1 else "calibrate"
        with tqdm(total=dataset_length(dataset), desc=description, unit="row", disable=not progress) as bar:
            for items in windows(self._items(dataset, reader), self.config.batch_size * WINDOW_BATCHES):
                if text is None:
                    settled = resolve_format(
                        self.config.text_format, self.embedder.tokenizer, (i.prompt for i in items)
                    )
                    self.config = replace(self.config, text_format=settled)
                    text = self.embedder.text(settled)
                    self._warn_of_grpo(items, text)
                self._window(items, text)
                bar.update(self.counts["rows"] - bar.n)
                bar.set_postfix_str(f"{self.counts['items'] / (time.monotonic() - started):.1f} items/s")
        if text is None:
            raise CalibrationError(
                f"{description}: no usable rows ({self.counts['rows']} read, {self.counts['dropped']} dropped)"
            )
        self._copy(text, progress)
        if self.duplicates.share > _MANY_DUPLICATES:
            warnings.warn(
                f"{self.duplicates.share:.0%} of the items are repeats of others: they add weight, not information",
                CalibrationWarning,
                stacklevel=3,
            )

    def _warn_of_grpo(self, items: list[Item], text: TextEncoder) -> None:
        """Data tokenised the training way, and served another way, is the one skew that only the fit can foresee."""
        if self.share == 1 or text.text_format != "plain":
            return
        usable = (item for item in items if isinstance(item.prompt, str) and isinstance(item.response, str))
        difference = grpo_difference(text, usable)
        if difference is not None:
            self.notes.append(difference)
            warnings.warn(difference, TokenisationWarning, stacklevel=4)

    def _items(self, dataset: Any, reader: RowReader) -> Iterator[Item]:
        for number, row in numbered_rows(dataset):
            self.counts["rows"] += 1
            try:
                items = reader.items(row, number)
            except InputError:
                if self.config.on_bad == "error":
                    raise
                self.counts["dropped"] += 1
                continue
            yield from items

    def _window(self, items: list[Item], text: TextEncoder) -> None:
        work = self._chosen(items, text)
        for index, part in self.embedder.batches([w.encoded for w in work], text) if work else ():
            self._take([work[i] for i in index], part)

    def _chosen(self, items: list[Item], text: TextEncoder) -> list[_Work]:
        """Items that are worth a forward: all fit items, and the one response drawn for a calibration prompt."""
        work: list[_Work] = []
        drawn: dict[int, _Work] = {}
        for item in items:
            encoded = self._encoded(item, text)
            if encoded is None:
                continue
            key = prompt_key(item.prompt)
            response = response_text(item.response)
            self.duplicates.add(stable_hash(response, key % 2**63))
            rank = self.reservoir.response_hash(key, response)
            if hash_fraction(key, self.config.seed) < self.share:
                if self.reservoir.wants(key, rank) and (key not in drawn or rank < drawn[key].response_hash):
                    drawn[key] = _Work(item, encoded, key, True, rank, False)
            else:
                work.append(_Work(item, encoded, key, False, rank, self.fit_keys.add(key)))
                if self._copied:
                    self.copies.offer(key, item)
        return [*work, *drawn.values()]

    def _copy(self, text: TextEncoder, progress: bool) -> None:
        """The noisy copies through the model, when it is known which texts they are of."""
        encoded = list(self.copies.encoded(text))
        with tqdm(total=len(encoded), desc="noisy copies", unit="item", disable=not progress or not encoded) as bar:
            for index, part in self.embedder.batches(encoded, text) if encoded else ():
                self._take_noise(part)
                bar.update(len(index))

    def _take_noise(self, part: Embedded) -> None:
        good = [i for i, failed in enumerate(part.failed) if failed is None]
        vectors = {
            name: x[good]
            for name, x in part.vectors.items()
            if issubclass(self.config.detector_type(name), ContrastedMahalanobis)
        }
        everything = torch.ones(len(good), dtype=torch.bool)
        self.noise.update(vectors, part.rewards[good], torch.zeros(len(good), dtype=torch.int64), everything)

    def _encoded(self, item: Item, text: TextEncoder) -> Encoded | None:
        """Token ids and spans; None for an item that is dropped."""
        try:
            encoded = text.encode(item.prompt, item.response, item.where)
        except InputError:
            if self.config.on_bad == "error":
                raise
            self.counts["dropped"] += 1
            return None
        self.ends.add(encoded.input_ids)
        return encoded

    def _take(self, work: list[_Work], part: Embedded) -> None:
        good = self._usable(work, part)
        self.counts["items"] += len(work)
        self.counts["truncated"] += int(part.truncated.sum())
        fit = [i for i in good if not work[i].for_calibration]
        if fit:
            self.counts["fit_items"] += len(fit)
            labels = torch.tensor([work[i].item.label or 0 for i in fit])
            first = torch.tensor([work[i].first for i in fit])
            other = None
            if self.config.shrinkage == "likelihood":
                other = torch.tensor([in_other_half(work[i].key, self.config.seed) for i in fit])
            self.moments.update({n: x[fit] for n, x in part.vectors.items()}, part.rewards[fit], labels, first, other)
        # Items come with their spans here, always.
        lengths = np.zeros((len(work), 2), dtype=np.int64) if part.lengths is None else part.lengths
        for i in good:
            if work[i].for_calibration:
                self.reservoir.offer(
                    Kept(
                        key=work[i].key,
                        response_hash=work[i].response_hash,
                        group=work[i].item.group,
                        label=work[i].item.label,
                        vectors={name: x[i].float().cpu().clone() for name, x in part.vectors.items()},
                        reward=float(part.rewards[i]),
                        lengths=(int(lengths[i, 0]), int(lengths[i, 1])),
                    )
                )

    def _usable(self, work: list[_Work], part: Embedded) -> list[int]:
        """Rows of a batch with trustworthy vectors; the others raise, or are dropped where they are the data's fault."""
        wrong = [work[i].item.where for i, f in enumerate(part.failed) if f == "read_out_mismatch"]
        if wrong:
            raise CaptureError(
                f"read-out self-check failed for {len(wrong)} of {len(work)} items (first: {wrong[:10]}): the head's output at "
                f"the read-out position is not the returned reward. read_out={self.config.read_out!r} does not fit this "
                "model: choose another rule, or name its head with head='dotted.path'."
            )
        infinite = [work[i].item.where for i, f in enumerate(part.failed) if f == "non_finite"]
        if infinite and self.config.on_bad == "error":
            raise NonFiniteError(
                f"NaN or infinity in the vectors or rewards of {len(infinite)} items (first: {infinite[:10]}). float16 "
                "overflows easily: use bfloat16 or float32; or leave such rows out with on_bad='drop'."
            )
        self.counts["dropped"] += len(infinite)
        return [i for i, failed in enumerate(part.failed) if failed is None]

    def state(self, identity: Identity) -> FittedState:
        """Detectors from the moments.

        Raises:
            CalibrationError: nothing to fit on, or a class is missing.
        """
        if not self.moments.channels:
            raise CalibrationError(
                f"nothing to fit on: {len(self.fit_keys)} fit prompts, {len(self.reservoir)} calibration prompts. "
                "Pass more prompts, or a smaller share for calibration."
            )
        self._check_classes()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            detectors: dict[str, MahalanobisDetector] = {
                name: self.config.detector_type(name).from_moments(
                    moments,
                    shrinkage=self.config.shrinkage,  # type: ignore[arg-type]
                    floor=self.config.floor,
                    other_half=self.moments.other_half.get(name),
                    blind_to=self._blind_to if name == FINAL else None,
                )
                for name, moments in self.moments.channels.items()
            }
        with warnings.catch_warnings(record=True) as of_noise:
            warnings.simplefilter("always")
            for name, detector in detectors.items():
                if isinstance(detector, ContrastedMahalanobis):
                    detector.fit_noise(self._noise_of(name))
        found = [*(str(w.message) for w in caught), *(f"noisy copies: {w.message}" for w in of_noise)]
        notes = list(dict.fromkeys(found))
        for note in notes:
            warnings.warn(note, CalibrationWarning, stacklevel=4)
        notes = [*self.notes, *notes]
        reward = self.moments.reward
        variance = float(reward.within_scatter()[0, 0]) / max(reward.n_samples - 1, 1)
        if variance <= 0:
            raise CalibrationError(
                f"no variance: all {reward.n_samples} fit rewards are equal. Is this a trained reward model, and is it in eval "
                "mode?"
            )
        return FittedState(
            config=self.config,
            detectors=detectors,
            reward_mean=float(reward.means[0, 0]),
            reward_sd=variance**0.5,
            table=None,
            heldout=None,
            fit_keys=self.fit_keys.sorted(),
            identity=identity,
            record={
                **self.counts,
                "fit_prompts": len(self.fit_keys),
                "class_counts": dict(zip(CLASSES, self.moments.class_counts(), strict=False)),
                "noisy_copies": self.noise.reward.n_samples,
                "duplicate_share": round(self.duplicates.share, 4),
                "notes": notes,
                "ends": self.ends.record(),
            },
        )

    def _noise_of(self, channel: str) -> ClassMoments:
        """Moments of the noisy copies.

        Raises:
            CalibrationError: there are none: no fit text has a word of letters.
        """
        if channel not in self.noise.channels:
            raise CalibrationError(
                "no noisy copies to contrast with: the fit texts hold no words of letters. Pass span_means='unit'"
            )
        return self.noise.channels[channel]

    def _check_classes(self) -> None:
        counts = self.moments.class_counts()
        missing = [name for name, count in zip(CLASSES, counts, strict=False) if count == 0]
        if missing:
            raise CalibrationError(
                f"no {' or '.join(missing)} responses in the fit data (counts: {counts}). Fit on preference pairs, or pass "
                "one_class=True for a single Gaussian without class_log_odds."
            )

    def table(self, state: FittedState) -> tuple[CalibrationTable, dict[str, Any]]:
        """Calibration matrix of the reservoir's prompts, and what the card says of it.

        Raises:
            CalibrationError: no prompts, or scores that are not numbers.
        """
        kept = self.reservoir.items()
        if not kept:
            raise CalibrationError("no calibration prompts: pass more data, or a larger share for calibration")
        vectors = {name: torch.stack([k.vectors[name] for k in kept]) for name in state.detectors}
        rewards = np.array([k.reward for k in kept])
        scored = state.score(vectors, rewards)
        keys = np.array([k.key for k in kept], dtype=np.uint64)
        groups = None if kept[0].group is None else tuple(str(k.group) for k in kept)
        table = CalibrationTable(
            scores=scored.scores,
            channels=scored.channels,
            lengths=np.array([k.lengths for k in kept], dtype=np.int64),
            part_a=split_parts(keys, self.config.seed),
            groups=groups,
        )
        record = {
            "calibration_prompts": len(kept),
            "score_reward_correlation": _reward_relation(scored.scores, scored.channels, rewards),
            "class_log_odds": _informativeness(scored, [k.label for k in kept], rewards),
        }
        return table, record


def check_overlap(prompt_keys: Iterable[int], fit_keys: NDArray[np.uint64]) -> None:
    """Refuse calibration prompts that were fitted on.

    Args:
        prompt_keys: `prompt_key` of each.
    Raises:
        CalibrationError: with the number of shared prompts.
    """
    keys = np.array(list(prompt_keys), dtype=np.uint64)
    shared = int(np.isin(keys, fit_keys).sum())
    if shared:
        raise CalibrationError(
            f"{shared} of {len(keys)} calibration prompts were fitted on: scores on fit data are smaller by construction, so "
            "the threshold would be too low. Leave those prompts out (prompts count as equal when their first user turn is)."
        )


def warn_if_shifted(
    heldout: NDArray[np.float64], scores: NDArray[np.float64], channels: Iterable[str], joined: tuple[str, ...]
) -> None:
    """Warn where a new calibration set does not look like the held-out share of the fit data (rank-sum per channel)."""
    columns = [i for i, name in enumerate(channels) if name in joined or name == REWARD]
    p = min(float(stats.mannwhitneyu(heldout[:, i], scores[:, i]).pvalue) for i in columns)
    if p * len(columns) < _SHIFTED:
        warnings.warn(
            f"the calibration data do not look like the held-out share of the fit data (rank-sum p = {p:.1e}): fine if they "
            "are the traffic you serve; otherwise the threshold is for other data than the guard was fitted on",
            CalibrationWarning,
            stacklevel=4,
        )


def _reward_relation(
    scores: NDArray[np.float64], channels: tuple[str, ...], rewards: NDArray[np.float64]
) -> dict[str, float]:
    """Spearman correlation of each channel's score with the reward, where both vary."""
    relation = {}
    for i, name in enumerate(channels):
        if np.ptp(scores[:, i]) > 0 and np.ptp(rewards) > 0:
            relation[name] = float(stats.spearmanr(scores[:, i], rewards).statistic)
    return relation


def _informativeness(
    scored: ChannelScores, labels: list[int | None], rewards: NDArray[np.float64]
) -> dict[str, float] | None:
    """How well `class_log_odds` tells held-out chosen from held-out rejected responses, one response a prompt."""
    known = np.array([-1 if label is None else label for label in labels])
    if FINAL not in scored.classes or not {CHOSEN, REJECTED} <= set(known.tolist()) or np.ptp(rewards) == 0:
        return None
    odds = class_log_odds(scored.classes[FINAL])
    wins = stats.mannwhitneyu(odds[known == CHOSEN], odds[known == REJECTED]).statistic
    return {
        "auroc": float(wins / ((known == CHOSEN).sum() * (known == REJECTED).sum())),
        "reward_correlation": float(stats.spearmanr(odds, rewards).statistic),
    }
