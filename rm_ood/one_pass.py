"""The pass over one shard of the data: rows to items, items to vectors, vectors to sums and to the calibration reservoir."""

from __future__ import annotations

import hashlib
import itertools
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from rm_ood.collected import Collected, Shard
from rm_ood.config import GuardConfig
from rm_ood.detectors.contrasted import ContrastedMahalanobis
from rm_ood.dialogue import response_text
from rm_ood.drawing import Kept
from rm_ood.embed import Embedded, Embedder, needed_channels
from rm_ood.errors import CaptureError, InputError, NonFiniteError, TokenisationWarning
from rm_ood.fitting import WINDOW_BATCHES, in_other_half, windows
from rm_ood.preferences import Item, hash_fraction, prompt_key, stable_hash
from rm_ood.rows import dataset_length, numbered_rows, row_bytes
from rm_ood.skew import grpo_difference
from rm_ood.text import Encoded, TextEncoder, resolve_format


@dataclass(frozen=True)
class _Work:
    """An item on its way through the model, and what its vectors are for."""

    item: Item
    encoded: Encoded
    key: int
    for_calibration: bool
    response_hash: int
    first: bool


class Pass:
    """Every row is read, and what belongs to the shard goes through the model.

    Args:
        embedder: the model column.
        config: settings; `text_format="auto"` is settled by the first window of the data, whatever the shard.
        share: share of the prompts that go to calibration, in [0, 1]; at 1 nothing is fitted.
        shard: the prompts to take.
        beat: called now and then, to show that the pass is getting on.
        warns: whether this process tells of what all of them see.

    Attributes:
        found: what the pass leaves.
    """

    def __init__(
        self,
        embedder: Embedder,
        config: GuardConfig,
        share: float,
        shard: Shard,
        *,
        beat: Callable[[], None],
        warns: bool = True,
    ) -> None:
        self.embedder = embedder
        self.config = config
        self.share = share
        self.shard = shard
        self.found = Collected(config, embedder.tokenizer)
        self._beat = beat
        self._warns = warns
        self._copied = any(issubclass(config.detector_type(n), ContrastedMahalanobis) for n in needed_channels(config))

    def run(self, dataset: Any, *, labelled: bool, progress: bool) -> Collected:
        """Read everything once.

        Raises:
            InputError, NonFiniteError, CaptureError: an unusable row under `on_bad="error"`.
        """
        size, started = self.config.batch_size * WINDOW_BATCHES, time.monotonic()
        description = "fit" if self.share < 1 else "calibrate"
        with tqdm(total=dataset_length(dataset), desc=description, unit="row", disable=not progress) as bar:
            items = self._items(dataset, labelled, bar.update)
            first = list(itertools.islice(items, size))
            if first:
                prompts = (item.prompt for item in first)
                self.found.text_format = resolve_format(self.config.text_format, self.embedder.tokenizer, prompts)
                text = self.embedder.text(self.found.text_format)
                self._warn_of_grpo(first, text)
                for window in windows(self._own(itertools.chain(first, items)), size):
                    self._window(window, text)
                    bar.set_postfix_str(f"{self.found.counts['items'] / (time.monotonic() - started):.1f} items/s")
        return self.found

    def _items(self, dataset: Any, labelled: bool, after_row: Callable[[int], object]) -> Iterator[Item]:
        """The items of all rows, of whatever shard."""
        reader, counts, sha = self.config.reader(labelled=labelled), self.found.counts, hashlib.sha256()
        for number, row in numbered_rows(dataset):
            own = self.shard.has(number)
            counts["rows"] += own
            if self.shard.count > 1:
                sha.update(row_bytes(row))
                self._beat()
            try:
                items = reader.items(row, number)
            except InputError:
                if self.config.on_bad == "error":
                    raise
                counts["dropped"] += own
                continue
            yield from items
            after_row(1)
        if self.shard.count > 1:
            self.found.rows_digest = sha.hexdigest()

    def _own(self, items: Iterator[Item]) -> Iterator[Item]:
        """The items of the shard's prompts."""
        if self.shard.count == 1:
            return items
        return (item for item in items if self.shard.has(prompt_key(item.prompt)))

    def _warn_of_grpo(self, items: list[Item], text: TextEncoder) -> None:
        """Data tokenised the training way, and served another way, is the one skew that only the fit can foresee."""
        if self.share == 1 or text.text_format != "plain":
            return
        usable = (item for item in items if isinstance(item.prompt, str) and isinstance(item.response, str))
        difference = grpo_difference(text, usable)
        if difference is not None:
            self.found.notes.append(difference)
            if self._warns:
                # The caller of `fit`, above the pass, the workers and the fitter.
                warnings.warn(difference, TokenisationWarning, stacklevel=9)

    def _window(self, items: list[Item], text: TextEncoder) -> None:
        work = self._chosen(items, text)
        for index, part in self.embedder.batches([w.encoded for w in work], text) if work else ():
            self._take([work[i] for i in index], part)
            self._beat()

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
            self.found.duplicates.add(stable_hash(response, key % 2**63))
            rank = self.found.reservoir.response_hash(key, response)
            if hash_fraction(key, self.config.seed) < self.share:
                if self.found.reservoir.wants(key, rank) and (key not in drawn or rank < drawn[key].response_hash):
                    drawn[key] = _Work(item, encoded, key, True, rank, False)
            else:
                work.append(_Work(item, encoded, key, False, rank, self.found.fit_keys.add(key)))
                if self._copied:
                    self.found.copies.offer(key, item)
        return [*work, *drawn.values()]

    def _encoded(self, item: Item, text: TextEncoder) -> Encoded | None:
        """Token ids and spans; None for an item that is dropped."""
        try:
            encoded = text.encode(item.prompt, item.response, item.where)
        except InputError:
            if self.config.on_bad == "error":
                raise
            self.found.counts["dropped"] += 1
            return None
        self.found.ends.add(encoded.input_ids)
        return encoded

    def _take(self, work: list[_Work], part: Embedded) -> None:
        good = self._usable(work, part)
        self.found.counts["items"] += len(work)
        self.found.counts["truncated"] += int(part.truncated.sum())
        fit = [i for i in good if not work[i].for_calibration]
        if fit:
            self.found.counts["fit_items"] += len(fit)
            labels = torch.tensor([work[i].item.label or 0 for i in fit])
            first = torch.tensor([work[i].first for i in fit])
            other = None
            if self.config.shrinkage == "likelihood":
                other = torch.tensor([in_other_half(work[i].key, self.config.seed) for i in fit])
            self.found.moments.update(
                {n: x[fit] for n, x in part.vectors.items()}, part.rewards[fit], labels, first, other
            )
        # Items come with their spans here, always.
        lengths = np.zeros((len(work), 2), dtype=np.int64) if part.lengths is None else part.lengths
        for i in good:
            if work[i].for_calibration:
                self.found.reservoir.offer(
                    Kept(
                        key=work[i].key,
                        response_hash=work[i].response_hash,
                        group=work[i].item.group,
                        label=work[i].item.label,
                        vectors={name: x[i].float().cpu().numpy() for name, x in part.vectors.items()},
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
        self.found.counts["dropped"] += len(infinite)
        return [i for i, failed in enumerate(part.failed) if failed is None]
