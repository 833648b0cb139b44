"""What one pass over a shard of the data leaves: it adds up over shards, files and processes.

A shard is some of the prompts with all their rows, so that what is drawn or counted once a prompt never meets in two.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rm_ood.config import GuardConfig
from rm_ood.copies import NOISY_PROMPTS, Copied, NoisyCopies
from rm_ood.detectors.gaussian import NormalisedMahalanobis
from rm_ood.drawing import UNKNOWN, Kept, KeptPrompts
from rm_ood.errors import FormatError, MismatchError
from rm_ood.fitting import DuplicateSketch, FitMoments, KeySet
from rm_ood.moments import ClassMoments
from rm_ood.preferences import CLASSES
from rm_ood.skew import Ends

_COUNTS = ("rows", "items", "fit_items", "dropped", "truncated")
Saved = tuple[dict[str, Tensor], dict[str, Any]]


@dataclass(frozen=True)
class Shard:
    """One of `count` disjoint parts of the prompts, numbered from 0."""

    index: int = 0
    count: int = 1

    def has(self, key: int) -> bool:
        """Whether a prompt with this key (or a row with this number, if it cannot be read) belongs here."""
        return key % self.count == self.index


class Collected:
    """The sums, draws and counts of a pass; see the classes they are of.

    Attributes:
        moments: of the fit items. reservoir: calibration prompts. copies: fit prompts that are copied with noise.
        fit_keys: prompts that were fitted on. duplicates, ends, counts, notes: for the card.
        text_format: as the first rows of the data settled it; None before there was a row.
        rows_digest: SHA-256 of every row that was read, those of other shards included; empty where there are no others.
    """

    def __init__(self, config: GuardConfig, tokenizer: Any) -> None:
        self.moments = fit_moments(config, 1 if config.one_class else len(CLASSES))
        self.copies = NoisyCopies(NOISY_PROMPTS, config.seed)
        self.reservoir = KeptPrompts(config.max_calibration, config.seed)
        self.fit_keys = KeySet()
        self.duplicates = DuplicateSketch()
        self.ends = Ends(tokenizer)
        self.notes: list[str] = []
        self.counts = dict.fromkeys(_COUNTS, 0)
        self.text_format: str | None = None
        self.rows_digest = ""

    def merge(self, other: Collected) -> None:
        """Add what a pass over another shard left.

        Raises:
            MismatchError: it read other data.
        """
        if "" not in (self.rows_digest, other.rows_digest) and self.rows_digest != other.rows_digest:
            raise MismatchError("shards of different data: each has to be of the same rows in the same order")
        self.moments.merge(other.moments)
        self.copies.drawn.merge(other.copies.drawn)
        self.reservoir.merge(other.reservoir)
        self.fit_keys.merge(other.fit_keys)
        self.duplicates.merge(other.duplicates)
        self.ends.merge(other.ends)
        self.notes = list(dict.fromkeys([*self.notes, *other.notes]))
        self.counts = {name: self.counts[name] + other.counts[name] for name in _COUNTS}
        self.text_format = self.text_format or other.text_format
        self.rows_digest = self.rows_digest or other.rows_digest

    def drawn_copies(self) -> bytes:
        """The fit items that are copied with noise, as JSON."""
        return json.dumps([copied.to_json() for copied in self.copies.drawn.items()]).encode()

    def take_copies(self, drawn: list[Any]) -> None:
        """Copy these and no others (the JSON of `drawn_copies`)."""
        self.copies = NoisyCopies(NOISY_PROMPTS, self.copies.seed)
        for copied in drawn:
            self.copies.drawn.offer(Copied.from_json(copied))

    def to_saved(self, *, with_moments: bool = True) -> Saved:
        """Tensors and JSON-able settings for `rm_ood.artifact.seal`.

        The texts of the fit prompts that are copied with noise, at most 4,000, are in it.
        """
        limit, hashes, repeats = self.duplicates.to_arrays()
        tensors: dict[str, Tensor] = {
            "fit_keys": _signed(self.fit_keys.sorted()),
            "duplicates.hashes": _signed(hashes),
            "duplicates.counts": torch.from_numpy(repeats),
            "copies": _bytes_tensor(self.drawn_copies()),
            "ends": _json_tensor(self.ends.to_dict()),
        }
        facts, vectors = self.reservoir.facts(), self.reservoir.vectors()
        labels = [None if label == UNKNOWN else label for label in facts.labels.tolist()]
        columns = (facts.keys.tolist(), facts.response_hashes.tolist(), facts.groups, labels, *facts.lengths.T.tolist())
        tensors["kept.facts"] = _json_tensor(list(zip(*columns, strict=True)))
        tensors["kept.rewards"] = torch.from_numpy(facts.rewards)
        tensors |= {f"kept.{i}": torch.from_numpy(x) for i, x in enumerate(vectors.values())}
        moments: list[tuple[str, str]] = []
        if with_moments:
            for kind, name, part in named_moments(self.moments):
                tensors |= {f"moments.{len(moments)}.{n}": t for n, t in part.state_tensors().items()}
                moments.append((kind, name))
        config = {
            "kept": list(vectors),
            "moments": moments,
            "duplicates_limit": limit,
            "notes": self.notes,
            "counts": self.counts,
            "text_format": self.text_format,
            "rows_digest": self.rows_digest,
        }
        return tensors, config

    def load(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
        """Become what `to_saved` wrote, on an object that was made with the same settings.

        Raises:
            FormatError: something is missing or malformed.
        """
        try:
            self._load(tensors, config)
        except FormatError:
            raise
        except (KeyError, TypeError, ValueError, IndexError, RuntimeError, OverflowError) as error:
            raise FormatError(f"a shard's state is incomplete or malformed ({type(error).__name__})") from error

    def _load(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
        self.fit_keys = KeySet(_unsigned(tensors["fit_keys"]))
        self.duplicates = DuplicateSketch.from_arrays(
            int(config["duplicates_limit"]),
            _unsigned(tensors["duplicates.hashes"]),
            tensors["duplicates.counts"].numpy(),
        )
        self.ends.load(_json_of(tensors["ends"]))
        self.take_copies(_json_of(tensors["copies"]))
        vectors = {name: tensors[f"kept.{i}"].numpy() for i, name in enumerate(config["kept"])}
        facts, rewards = _json_of(tensors["kept.facts"]), tensors["kept.rewards"].tolist()
        for i, (key, response_hash, group, label, *lengths) in enumerate(facts):
            rows = {name: x[i] for name, x in vectors.items()}
            self.reservoir.offer(
                Kept(key, response_hash, group, label, rows, rewards[i], (int(lengths[0]), int(lengths[1])))
            )
        for i, (kind, name) in enumerate(config["moments"]):
            prefix = f"moments.{i}."
            own = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
            part = ClassMoments.from_state(own)
            if kind == "reward":
                self.moments.reward = part
            else:
                getattr(self.moments, kind)[name] = part
        self.notes, self.counts = list(config["notes"]), {name: int(config["counts"][name]) for name in _COUNTS}
        self.text_format, self.rows_digest = config["text_format"], str(config["rows_digest"])


def fit_moments(config: GuardConfig, n_classes: int) -> FitMoments:
    """Empty moments that scale the vectors of channels whose detectors read directions."""
    return FitMoments(n_classes, lambda name: issubclass(config.detector_type(name), NormalisedMahalanobis))


def named_moments(moments: FitMoments) -> list[tuple[str, str, ClassMoments]]:
    """(kind, channel, moments) of all that a fit sums: `channels`, `other_half` and `reward`."""
    return [
        *(("channels", name, part) for name, part in moments.channels.items()),
        *(("other_half", name, part) for name, part in moments.other_half.items()),
        ("reward", "", moments.reward),
    ]


def _signed(keys: np.ndarray[Any, np.dtype[np.uint64]]) -> Tensor:
    return torch.from_numpy(keys.view(np.int64).copy())


def _unsigned(keys: Tensor) -> np.ndarray[Any, np.dtype[np.uint64]]:
    return keys.numpy().view(np.uint64)


def _json_tensor(value: Any) -> Tensor:
    return _bytes_tensor(json.dumps(value).encode())


def _bytes_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _json_of(tensor: Tensor) -> Any:
    return json.loads(tensor.numpy().tobytes())
