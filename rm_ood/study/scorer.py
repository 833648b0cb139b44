"""Texts to raw scores for a study: each distinct text once through the reward model, kept by content."""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from rm_ood.channels import REWARD, Channel
from rm_ood.detectors import Detector
from rm_ood.dialogue import Dialogue, Response, Text, check_prompt, check_response
from rm_ood.embed import Embedded, needed_channels
from rm_ood.errors import InputError, TokenisationWarning
from rm_ood.fitting import WINDOW_BATCHES
from rm_ood.guard import OODGuard
from rm_ood.identity import Identity
from rm_ood.state import ChannelScores, FittedState, fitted_channels
from rm_ood.study.cache import Record, ScoreCache
from rm_ood.text import Encoded

Floats = NDArray[np.float64]
Item = tuple[Text, Response]
# Name -> (channel whose vectors it reads, or several side by side; fitted detector).
Baselines = Mapping[str, tuple[str | tuple[str, ...], Detector]]
# Reason code of a text that the guard refuses to read.
UNREADABLE = "unreadable_input"


@dataclass(frozen=True)
class Scores:
    """Raw scores of n items: what `FittedState.decide` takes, and the baselines' own.

    Attributes:
        scored: the guard's channels.
        part: rewards, span lengths, reasons; no vectors.
        baselines: name -> (n,) scores, larger = more out-of-distribution; +inf where an item could not be scored.
    """

    scored: ChannelScores
    part: Embedded
    baselines: dict[str, Floats]

    def take(self, index: NDArray[np.int64]) -> Scores:
        """Some of the items, in another order."""
        part = self.part
        return Scores(
            self.scored.take(index),
            Embedded(
                vectors={},
                rewards=part.rewards[index],
                lengths=None if part.lengths is None else part.lengths[index],
                failed=[part.failed[i] for i in index],
                reasons=[part.reasons[i] for i in index],
                truncated=part.truncated[index],
            ),
            {name: scores[index] for name, scores in self.baselines.items()},
        )


class Scorer:
    """A guard that scores each distinct text once; a context manager.

    Args:
        guard: calibrated, with its reward model.
        cache: file of earlier scores (see `ScoreCache`); None keeps them for this object's life only.
        baselines: further fitted detectors, each on the vectors of one of the guard's channels.
        progress: show a progress bar on stderr.

    Attributes:
        n_forwarded: texts that went through the reward model so far.

    Raises:
        InputError: a baseline on vectors that the guard does not take. FormatError, SaveError: as `ScoreCache`.
    """

    def __init__(
        self,
        guard: OODGuard,
        *,
        cache: str | Path | None = None,
        baselines: Baselines | None = None,
        progress: bool = False,
    ) -> None:
        self.guard = guard
        self.baselines = {name: (_channels(on), detector) for name, (on, detector) in (baselines or {}).items()}
        self.progress = progress
        self.n_forwarded = 0
        self._seen: set[bytes] = set()
        scoring = guard.scoring()
        # What is read here is no traffic: the guard's own check still has to warn when it sees some.
        self._scoring = replace(scoring, ends=copy(scoring.ends))
        state = scoring.state
        state.profile(state.config.joined)
        known = [name for name in needed_channels(state.config) if name in state.detectors]
        for name, (channels, _) in self.baselines.items():
            if not set(channels) <= set(known):
                raise InputError(
                    f"baseline {name!r}: this guard takes vectors of {known}, not of {sorted(set(channels) - set(known))}"
                )
        # In the order of `FittedState.score`.
        read = [name for name in state.detectors if name in known]
        self._channels = (*fitted_channels({name: state.detectors[name] for name in read}), REWARD)
        self._classes = {name: k for name in read if (k := len(state.detectors[name].classes_)) > 1}
        self._width = 4 + len(self._channels) + sum(self._classes.values()) + len(self.baselines)
        self._identity = _identity(guard, self.baselines)
        self._cache = ScoreCache(cache)

    @property
    def state(self) -> FittedState:
        """What judges the scores."""
        return self._scoring.state

    @property
    def n_distinct(self) -> int:
        """Distinct texts that were asked for so far."""
        return len(self._seen)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cache.close()

    def rewards(self, prompts: Sequence[Text], responses: Sequence[Response]) -> Floats:
        """(n,) rewards; NaN where there is none. What a shift that asks the reward model is given."""
        items = list(zip(prompts, responses, strict=True))
        return self.score(items).part.rewards if items else np.empty(0)

    def score(self, items: Sequence[Item], names: Sequence[str | None] | None = None) -> Scores:
        """Raw scores of n items, at least one.

        Args:
            items: prompt and response each.
            names: what an error calls each item, such as `rows[3].chosen`; an item with None that cannot be read is no
                error, but cannot be scored.

        Raises:
            InputError: an item with a name that cannot be read.
        """
        texts: dict[bytes, int] = {}
        where = np.empty(len(items), dtype=np.int64)
        first: list[int] = []
        for i, item in enumerate(items):
            where[i] = texts.setdefault(_text_key(item), len(texts))
            if where[i] == len(first):
                first.append(i)
            elif names is not None and names[i] is not None and names[first[where[i]]] is None:
                first[where[i]] = i
        distinct = [items[i] for i in first]
        self._seen |= texts.keys()
        records = self._records(distinct, [None if names is None else names[i] for i in first])
        return self._unpack(records).take(where)

    def _records(self, items: Sequence[Item], names: Sequence[str | None]) -> list[Record]:
        """One record per distinct text: batches are the same whether or not a study was interrupted."""
        size = self.state.config.batch_size
        order = sorted(range(len(items)), key=lambda i: _size(items[i]))
        records: list[Record | None] = [None] * len(items)
        started, cached, before = time.monotonic(), 0, self.n_forwarded
        with tqdm(total=len(items), desc="score", unit="text", disable=not self.progress) as bar:
            for start in range(0, len(order), size * WINDOW_BATCHES):
                window = order[start : start + size * WINDOW_BATCHES]
                encoded = {i: item for i in window if (item := self._encode(items[i], names[i])) is not None}
                for i in window:
                    if i not in encoded:
                        records[i] = Record(np.full(self._width, np.nan), UNREADABLE, ())
                ready = sorted(encoded, key=lambda i: len(encoded[i].input_ids))
                for at in range(0, len(ready), size):
                    batch = ready[at : at + size]
                    cached += self._batch({i: encoded[i] for i in batch}, records)
                    bar.update(len(batch))
                    rate = (self.n_forwarded - before) / max(time.monotonic() - started, 1e-9)
                    bar.set_postfix_str(
                        f"{rate:.1f} forwards/s, {100 * cached / max(1, bar.n):.0f} % cached", refresh=False
                    )
                bar.update(len(window) - len(encoded))
        return [record for record in records if record is not None]

    def _batch(self, encoded: Mapping[int, Encoded], records: list[Record | None]) -> int:
        """Fill in the records of one batch; returns how many of them were there."""
        keys = {i: self._key(item) for i, item in encoded.items()}
        known = self._cache.get(list(keys.values()))
        missing = {keys[i]: item for i, item in encoded.items() if keys[i] not in known}
        if missing:
            fresh: dict[bytes, Record] = {}
            waiting = list(missing)
            for index, scored, part in self._scoring.batches(list(missing.values())):
                numbers = self._pack(scored, part)
                for row, i in enumerate(index):
                    fresh[waiting[i]] = Record(numbers[row], part.failed[row], tuple(part.reasons[row]))
            self._cache.put(fresh)
            self.n_forwarded += len(fresh)
            known |= fresh
        for i, key in keys.items():
            records[i] = known[key]
        return len(keys) - len(missing)

    def _encode(self, item: Item, name: str | None) -> Encoded | None:
        config = self.state.config
        where = name or "item.response"
        given = item[1] if isinstance(item[1], str) else [item[1]]
        try:
            # An empty side may be the shift itself.
            prompt = check_prompt(
                item[0], f"{where.rpartition('.')[0]}.prompt", allow_empty=True, max_chars=config.max_chars
            )
            response = check_response(given, where, max_chars=config.max_chars)
            with warnings.catch_warnings():
                # Shifted text may well be tokenised unlike the fit data; the reason is kept.
                warnings.simplefilter("ignore", TokenisationWarning)
                return self._scoring.encode([(prompt, response)])[0]
        except InputError as error:
            if name is None:
                return None
            raise InputError(str(error).replace("items[0]", where)) from error

    def _key(self, item: Encoded) -> bytes:
        read = json.dumps(list(vars(item).values()), separators=(",", ":"))
        return hashlib.blake2b(self._identity + read.encode(), digest_size=20).digest()

    def _pack(self, scored: ChannelScores, part: Embedded) -> Floats:
        lengths = np.zeros((len(part.rewards), 2)) if part.lengths is None else part.lengths
        columns = [part.rewards[:, None], lengths, part.truncated[:, None], scored.scores]
        columns += [scored.classes[name] for name in self._classes]
        for channels, detector in self.baselines.values():
            # Layers of a model that is split over devices leave their vectors where they are.
            found = [part.vectors[name].float() for name in channels]
            vectors = torch.cat([x.to(found[0].device) for x in found], dim=1)
            columns.append(detector.score(vectors).double().cpu().numpy()[:, None])
        return np.concatenate(columns, axis=1).astype(np.float64)

    def _unpack(self, records: Sequence[Record]) -> Scores:
        table = np.stack([record.numbers for record in records])
        head, rest = table[:, :4], table[:, 4:]
        scores, rest = rest[:, : len(self._channels)], rest[:, len(self._channels) :]
        classes = {}
        for name, k in self._classes.items():
            classes[name], rest = rest[:, :k], rest[:, k:]
        failed = [record.failed for record in records]
        unusable = np.array([f is not None for f in failed])[:, None] | np.isnan(rest)
        rest = np.where(unusable, np.inf, rest)
        unread = np.isnan(head[:, 1:])
        head = np.concatenate([head[:, :1], np.where(unread, 0, head[:, 1:])], axis=1)
        part = Embedded(
            vectors={},
            rewards=head[:, 0],
            lengths=head[:, 1:3].astype(np.int64),
            failed=failed,
            reasons=[record.reasons for record in records],
            truncated=head[:, 3] > 0,
        )
        return Scores(
            ChannelScores(self._channels, scores, classes),
            part,
            {name: rest[:, i] for i, name in enumerate(self.baselines)},
        )


def _channels(on: str | tuple[str, ...]) -> tuple[str, ...]:
    return tuple(str(Channel.parse(name)) for name in ((on,) if isinstance(on, str) else on))


def _identity(guard: OODGuard, baselines: Mapping[str, tuple[tuple[str, ...], Detector]]) -> bytes:
    """Digest of all that a text's raw scores depend on beside the text: reward model, detectors, baselines."""
    scoring = guard.scoring()
    state, column = scoring.state, scoring.column
    found = Identity.of(column, state.config, "weights")
    sha = hashlib.sha256()
    c = state.config
    settings: list[Any] = [dict(found.fields), c.reward, c.layers, c.prompt_pass, needed_channels(c), list(baselines)]
    settings += [state.reward_mean, state.reward_sd, state.channel_names]
    sha.update(json.dumps(settings, sort_keys=True).encode())
    if found.weights is not None:
        sha.update(found.weights.names.encode() + found.weights.values.numpy().tobytes())
    fitted: Iterable[tuple[str, Any]] = [
        *state.detectors.items(),
        *((f"{n} {c}", d) for n, (c, d) in baselines.items()),
    ]
    for name, detector in fitted:
        sha.update(f"{name} {type(detector).__qualname__} {_settings(detector)}".encode())
        for key, tensor in sorted(detector.state_tensors().items()):
            sha.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.cpu().numpy().tobytes())
    return sha.digest()


def _settings(detector: Any) -> str:
    """A detector's settings: learned state ends in an underscore, and tensors among the settings are in that state."""
    plain = {
        name: value for name, value in vars(detector).items() if not name.endswith("_") and not name.startswith("_")
    }
    nested = {name: _settings(value) for name, value in plain.items() if isinstance(value, Detector)}
    kept = {name: value for name, value in plain.items() if isinstance(value, str | int | float | bool | torch.dtype)}
    return repr(sorted({**kept, **nested}.items(), key=lambda item: item[0]))


def _text_key(item: Item) -> bytes:
    prompt, response = item
    parts: list[Any] = [prompt, response]
    if isinstance(prompt, Dialogue):
        parts = [prompt.messages, prompt.tools, prompt.template_kwargs, response]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).digest()


def _size(item: Item) -> int:
    """About how many characters an item has: enough to bring texts of like length together."""
    return sum(len(side) if isinstance(side, str) else len(str(side)) for side in item)
