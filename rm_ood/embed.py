"""Items to vectors: length-sorted batches through the reward model, one forward each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rm_ood.capture import Capture, Captured
from rm_ood.channels import FINAL, GIVEN_PROMPT, Channel
from rm_ood.config import GuardConfig
from rm_ood.reward_model import check_padding, eval_mode, pad_id, text_config
from rm_ood.text import Encoded, TextEncoder
from rm_ood.wrappers import input_device, unwrap


@dataclass(frozen=True)
class Embedded:
    """Channel vectors of a batch of items and what happened on the way.

    Attributes:
        vectors: channel -> (n, H); (n, 2H) on the axis `response_given_prompt`.
        rewards: (n,) float64; NaN where none came.
        lengths: (n, 2) int: tokens in the prompt's and the response's span; None where the spans are not known.
        failed: n reason codes for items whose vectors cannot be trusted, or None.
        reasons: n tuples of reason codes.
        truncated: (n,) bool.
    """

    vectors: dict[str, Tensor]
    rewards: NDArray[np.float64]
    lengths: NDArray[np.int64] | None
    failed: list[str | None]
    reasons: list[tuple[str, ...]]
    truncated: NDArray[np.bool_]


class Embedder:
    """The model column in one object: text to channel vectors.

    Args:
        model: the reward model.
        tokenizer: its fast tokenizer.
        config: the guard's settings.
        capture: hooks on the model.
    """

    def __init__(self, model: Any, tokenizer: Any, config: GuardConfig, capture: Capture) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        self.capture = capture

    def text(self, text_format: str) -> TextEncoder:
        """The tokenisation of a resolved format."""
        c = self.config
        return TextEncoder(
            self.tokenizer,
            text_format,
            max_length=c.max_length if c.max_length is not None else self._model_limit(),
            on_too_long=c.on_too_long,
            split_special_tokens=c.split_special_tokens,
            append_eos=c.append_eos,
            special_tokens=c.special_tokens,
            pad_id=pad_id(self.model),
            suffix=self._suffix(),
        )

    def _suffix(self) -> tuple[int, ...]:
        """The token that the model reads its reward at, where it is none of the text's own."""
        name = self.capture.reader.suffix
        return () if name is None else (int(getattr(unwrap(self.model), name)),)

    def _model_limit(self) -> int:
        """The smaller of the tokenizer's and the model's own limit."""
        positions = getattr(text_config(self.model), "max_position_embeddings", None)
        limit = int(self.tokenizer.model_max_length)
        return min(limit, positions) if isinstance(positions, int) and positions > 0 else limit

    @property
    def device(self) -> torch.device:
        """Where the model takes its inputs."""
        return input_device(self.model)

    def batches(
        self, items: Sequence[Encoded], text: TextEncoder, *, turn: int = 0, turns: int = 1
    ) -> Iterator[tuple[NDArray[np.int64], Embedded]]:
        """(indices into `items`, their vectors), shortest items first, so that padding is little.

        Args:
            turn, turns: several processes take turns: batch b is for the one whose `turn` is b modulo `turns`.
        """
        size = self.config.batch_size
        check_padding(self.model, min(size, len(items)))
        order = np.argsort([len(item.input_ids) for item in items], kind="stable")
        for start in range(turn * size, len(order), turns * size):
            index = order[start : start + size]
            yield index, self._embed([items[i] for i in index], text)

    def _embed(self, items: list[Encoded], text: TextEncoder) -> Embedded:
        with eval_mode(self.model, switch=self.config.eval_mode == "switch"), torch.inference_mode():
            captured = self._forward(items, text)
            mine = [name for name in captured.vectors if Channel.parse(name).reads_prompt]
            if self.config.prompt_pass and mine:
                alone = self._forward([item.prompt_only() for item in items], text).vectors
                for name in mine:
                    both, prompt = captured.vectors[name], alone[name]
                    # The response's half sees the prompt, as it should.
                    width = prompt.shape[1] // (2 if Channel.parse(name).axis == GIVEN_PROMPT else 1)
                    captured.vectors[name] = torch.cat([prompt[:, :width], both[:, width:]], 1)
        return embedded(captured, *span_facts(items))

    def _forward(self, items: list[Encoded], text: TextEncoder) -> Captured:
        batch = text.pad(items, device=self.device, beside=self.capture.reader.pad_columns)
        return self.capture.forward(batch.inputs, batch.spans)[1]


def span_facts(
    items: Sequence[Encoded],
) -> tuple[NDArray[np.int64], list[tuple[str, ...]], NDArray[np.bool_]]:
    """What is known of n items before any forward: span lengths (n, 2), reasons, and which were cut, (n,) bool."""
    lengths = np.array([[sum(item.prompt_mask), sum(item.response_mask)] for item in items], dtype=np.int64)
    reasons = [(*item.reasons, *_empty_spans(span, item.reasons)) for item, span in zip(items, lengths, strict=True)]
    return lengths, reasons, np.array([item.dropped > 0 for item in items], dtype=bool)


def _empty_spans(lengths: NDArray[np.int64], known: tuple[str, ...]) -> tuple[str, ...]:
    """Reasons for spans without a token of their own, which take the read-out vector instead."""
    prompt = ("empty_prompt_span",) if lengths[0] == 0 else ()
    response = ("empty_response_span",) if lengths[1] == 0 and "empty_response" not in known else ()
    return (*prompt, *response)


def embedded(
    captured: Captured,
    lengths: NDArray[np.int64] | None,
    reasons: list[tuple[str, ...]],
    truncated: NDArray[np.bool_],
) -> Embedded:
    """What a forward left behind, with the items that cannot be trusted named."""
    if captured.unchecked:
        reasons = [(*given, "unchecked_read_out") for given in reasons]
    device = captured.rewards.device
    finite = [torch.isfinite(vectors).all(1).to(device) for vectors in captured.vectors.values()]
    found = torch.stack([captured.rewards.double(), captured.mismatch.to(device, torch.float64), *finite])
    # One copy for all: each waits for the device.
    rewards, mismatch, *usable = found.cpu().numpy()
    failed: list[str | None] = [None] * len(rewards)
    good = np.isfinite(rewards) & np.all(usable, axis=0)
    for i in range(len(failed)):
        if not good[i]:
            failed[i] = "non_finite"
        elif mismatch[i]:
            failed[i] = "read_out_mismatch"
    return Embedded(captured.vectors, rewards, lengths, failed, reasons, truncated)


def merge(parts: Sequence[Embedded], order: NDArray[np.int64]) -> Embedded:
    """Several batches as one, its rows taken in `order`; vectors are left out."""
    failed = [f for part in parts for f in part.failed]
    reasons = [r for part in parts for r in part.reasons]
    lengths = [part.lengths for part in parts if part.lengths is not None]
    return Embedded(
        vectors={},
        rewards=np.concatenate([part.rewards for part in parts])[order],
        lengths=np.concatenate(lengths)[order] if len(lengths) == len(parts) else None,
        failed=[failed[i] for i in order],
        reasons=[reasons[i] for i in order],
        truncated=np.concatenate([part.truncated for part in parts])[order],
    )


def needed_channels(config: GuardConfig) -> tuple[str, ...]:
    """Channels to capture: the vectors of the verdict's, and `final`, which is in every guard."""
    return tuple(dict.fromkeys((FINAL, *(str(Channel.parse(name).vector) for name in config.joined))))
