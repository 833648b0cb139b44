"""The fit: a pass over the data, alone or with others, then detectors and the calibration matrix from what it leaves."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from tqdm.auto import tqdm

from rm_ood.artifact import package_version
from rm_ood.calibration import CalibrationTable, split_parts
from rm_ood.channels import FINAL, REWARD
from rm_ood.collected import Collected, Shard, fit_moments
from rm_ood.config import GuardConfig
from rm_ood.detectors.contrasted import ContrastedMahalanobis
from rm_ood.detectors.mahalanobis import MahalanobisDetector
from rm_ood.embed import Embedded, Embedder
from rm_ood.errors import CalibrationError, CalibrationWarning
from rm_ood.fitting import WINDOW_BATCHES, windows
from rm_ood.identity import Identity
from rm_ood.moments import ClassMoments
from rm_ood.one_pass import Pass
from rm_ood.preferences import CHOSEN, CLASSES, REJECTED
from rm_ood.rows import data_digest, data_glance, is_one_pass
from rm_ood.state import ChannelScores, FittedState, class_log_odds
from rm_ood.strict_json import canonical_json
from rm_ood.text import TextEncoder
from rm_ood.workers import ALONE, Workers

_MANY_DUPLICATES = 0.2
# Rank-sum p-value, over all channels, under which two calibration sets are called different.
_SHIFTED = 1e-3
# Calibration prompts whose vectors are scored at a time: what a detector makes of them is several times as large as they are.
_SCORED_ROWS = 2048


class Fitter:
    """One pass over a dataset.

    Args:
        embedder: the model column.
        config: settings; `text_format="auto"` is settled by the first window of the data.
        share: share of the prompts that go to calibration, in [0, 1]; at 1 nothing is fitted.
        workers: who does it.

    Attributes:
        found: what the pass left, once it has run; whole on the first of several processes.
    """

    def __init__(self, embedder: Embedder, config: GuardConfig, share: float, workers: Workers = ALONE) -> None:
        self.embedder = embedder
        self.config = config
        self.share = share
        self.workers = workers
        # Told before the forwards, not after them.
        self._blind_to = embedder.capture.reward_direction() if config.project_out_reward and share < 1 else None
        self.found = self.empty()
        self.noise = fit_moments(config, 1)

    def run(self, dataset: Any, *, labelled: bool, progress: bool) -> None:
        """Read everything once. Of several processes, the first ends with all that was found.

        Raises:
            InputError, NonFiniteError, CaptureError: an unusable row under `on_bad="error"`.
            CalibrationError: no rows.
            MismatchError, WorkerError: of several processes, one that differs, fails or dies.
        """
        found = self.workers.collect(
            self.stage,
            lambda: self.task(dataset, labelled=labelled),
            self.empty,
            lambda shard: self.read(dataset, shard, labelled=labelled, progress=progress),
            again=not is_one_pass(dataset),
        )
        if found.text_format is None:
            raise CalibrationError(
                f"{self.stage}: no usable rows ({found.counts['rows']} read, {found.counts['dropped']} dropped)"
            )
        self.found = found
        self.config = replace(self.config, text_format=found.text_format)
        self._copy(self.embedder.text(found.text_format), progress)
        self.noise = self.workers.total(self.noise)
        if self.workers.is_first and found.duplicates.share > _MANY_DUPLICATES:
            warnings.warn(
                f"{found.duplicates.share:.0%} of the items are repeats of others: they add weight, not information",
                CalibrationWarning,
                stacklevel=3,
            )

    @property
    def stage(self) -> str:
        """What the pass is for, in a word."""
        return "fit" if self.share < 1 else "calibrate"

    def task(self, dataset: Any, *, labelled: bool) -> dict[str, str]:
        """Digests of all that the result of a pass depends on."""
        identity = Identity.of(self.embedder, replace(self.config, text_format="plain"), "weights")
        # The settings have what the text's contract depends on; a commit is not known of a local folder.
        fields = {name: value for name, value in identity.fields.items() if name not in ("text", "commit")}
        model = hashlib.sha256(canonical_json(fields).encode())
        if identity.weights is not None:
            model.update(identity.weights.names.encode() + identity.weights.values.numpy().tobytes())
        workers = self.workers
        settings = canonical_json([self.config.to_dict(), self.share, labelled])
        return {
            "version": package_version(),
            "settings": hashlib.sha256(settings.encode()).hexdigest(),
            "reward model": model.hexdigest(),
            # All rows are compared once they are read, unless finished shards stand for them.
            "data": data_glance(dataset) if workers.folder is None else data_digest(dataset, workers.beat),
        }

    def read(self, dataset: Any, shard: Shard, *, labelled: bool, progress: bool) -> Collected:
        """What the pass over one shard leaves."""
        workers = self.workers
        one = Pass(self.embedder, self.config, self.share, shard, beat=workers.beat, warns=workers.is_first)
        return one.run(dataset, labelled=labelled, progress=progress)

    def empty(self) -> Collected:
        """What a pass begins with."""
        return Collected(self.config, self.embedder.tokenizer)

    def _copy(self, text: TextEncoder, progress: bool) -> None:
        """The noisy copies through the model, when it is known which texts they are of."""
        turn, size = {"turn": self.workers.rank, "turns": self.workers.size}, self.config.batch_size * WINDOW_BATCHES
        total = len(self.found.copies.drawn)
        with tqdm(total=total, desc="noisy copies", unit="item", disable=not progress or not total) as bar:
            for window in windows(self.found.copies.encoded(text), size):
                for _, part in self.embedder.batches(window, text, **turn):
                    self._take_noise(part)
                    self.workers.beat()
                bar.update(len(window))

    def _take_noise(self, part: Embedded) -> None:
        good = [i for i, failed in enumerate(part.failed) if failed is None]
        vectors = {
            name: x[good]
            for name, x in part.vectors.items()
            if issubclass(self.config.detector_type(name), ContrastedMahalanobis)
        }
        everything = torch.ones(len(good), dtype=torch.bool)
        self.noise.update(vectors, part.rewards[good], torch.zeros(len(good), dtype=torch.int64), everything)

    def state(self, identity: Identity) -> FittedState:
        """Detectors from the moments.

        Raises:
            CalibrationError: nothing to fit on, or a class is missing.
        """
        if not self.found.moments.channels:
            raise CalibrationError(
                f"nothing to fit on: {len(self.found.fit_keys)} fit prompts, {len(self.found.reservoir)} calibration "
                "prompts. "
                "Pass more prompts, or a smaller share for calibration."
            )
        self._check_classes()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            detectors: dict[str, MahalanobisDetector] = {}
            for name, moments in self.found.moments.channels.items():
                detectors[name] = self.config.detector_type(name).from_moments(
                    moments,
                    shrinkage=self.config.shrinkage,  # type: ignore[arg-type]
                    floor=self.config.floor,
                    other_half=self.found.moments.other_half.get(name),
                    blind_to=self._blind_to if name == FINAL else None,
                )
                self.workers.beat()
        with warnings.catch_warnings(record=True) as of_noise:
            warnings.simplefilter("always")
            for name, detector in detectors.items():
                if isinstance(detector, ContrastedMahalanobis):
                    detector.fit_noise(self._noise_of(name))
                    self.workers.beat()
        found = [*(str(w.message) for w in caught), *(f"noisy copies: {w.message}" for w in of_noise)]
        notes = list(dict.fromkeys(found))
        for note in notes:
            warnings.warn(note, CalibrationWarning, stacklevel=5)
        notes = [*self.found.notes, *notes]
        reward = self.found.moments.reward
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
            fit_keys=self.found.fit_keys.sorted(),
            identity=identity,
            record={
                **self.found.counts,
                "fit_prompts": len(self.found.fit_keys),
                "class_counts": dict(zip(CLASSES, self.found.moments.class_counts(), strict=False)),
                "noisy_copies": self.noise.reward.n_samples,
                "duplicate_share": round(self.found.duplicates.share, 4),
                "notes": notes,
                "ends": self.found.ends.record(),
            },
        )

    def fitted(self) -> FittedState:
        """Detectors, and the calibration on the share that was held out for it.

        Raises:
            CalibrationError: as `state` and `table`, or too few prompts for the promise.
        """
        state = self.state(Identity({}))
        if self.share > 0:
            table, record = self.table(state)
            state = replace(state.with_table(table, record), heldout=table.scores)
            state.profile(self.config.joined)
            # The tokenizer as text is large, too: the vectors go before it comes.
            self.found.reservoir = self.empty().reservoir
        return replace(state, identity=Identity.of(self.embedder, self.config))

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
        counts = self.found.moments.class_counts()
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
        kept = self.found.reservoir
        if not len(kept):
            raise CalibrationError("no calibration prompts: pass more data, or a larger share for calibration")
        facts, parts = kept.facts(), []
        for start in range(0, len(kept), _SCORED_ROWS):
            vectors = kept.vectors(start, start + _SCORED_ROWS)
            parts.append(
                state.score(
                    {name: torch.from_numpy(vectors[name]) for name in state.detectors},
                    facts.rewards[start : start + _SCORED_ROWS],
                )
            )
        scored = ChannelScores.concatenate(parts)
        groups = None if facts.groups[0] is None else tuple(str(group) for group in facts.groups)
        table = CalibrationTable(
            scores=scored.scores,
            channels=scored.channels,
            lengths=facts.lengths,
            part_a=split_parts(facts.keys, self.config.seed),
            groups=groups,
        )
        record = {
            "calibration_prompts": len(kept),
            "score_reward_correlation": _reward_relation(scored.scores, scored.channels, facts.rewards),
            "class_log_odds": _informativeness(scored, facts.labels, facts.rewards),
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
            stacklevel=6,
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
    scored: ChannelScores, known: NDArray[np.int64], rewards: NDArray[np.float64]
) -> dict[str, float] | None:
    """How well `class_log_odds` tells held-out chosen from held-out rejected responses, one response a prompt."""
    if FINAL not in scored.classes or not {CHOSEN, REJECTED} <= set(known.tolist()) or np.ptp(rewards) == 0:
        return None
    odds = class_log_odds(scored.classes[FINAL])
    wins = stats.mannwhitneyu(odds[known == CHOSEN], odds[known == REJECTED]).statistic
    return {
        "auroc": float(wins / ((known == CHOSEN).sum() * (known == REJECTED).sum())),
        "reward_correlation": float(stats.spearmanr(odds, rewards).statistic),
    }
