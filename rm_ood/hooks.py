"""What happens inside a forward: hooks that reduce activations to channel vectors at once, thread by thread.

No (B, T, H) tensor is kept, nothing is shared between threads, and nothing here breaks a compiled graph.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rm_ood.channels import FINAL, GIVEN_PROMPT, Channel
from rm_ood.errors import InputError
from rm_ood.spans import Spans


@dataclass
class Request:
    """One forward's spans going in and pooled vectors coming out; lives in its own thread only."""

    positions: Tensor
    spans: Spans
    columns: Tensor | None = None
    vectors: dict[str, Tensor] = field(default_factory=dict)
    head_output: Tensor | None = None
    turns: Tensor | None = None
    pooled: bool = False


class Slot(threading.local):
    """The request of the thread that is in a forward; None otherwise, so that foreign forwards cost nothing."""

    request: Request | None = None


class Hook:
    """A forward hook that belongs to one guard.

    A copy of the model (`copy.deepcopy`, adapters that copy the head) keeps the guard's own hook; a pickled model leaves it
    behind.
    """

    def __init__(
        self, slot: Slot, channels: Mapping[str, Channel], shift: int, *, is_head: bool = False, is_gate: bool = False
    ) -> None:
        self.slot = slot
        self.channels = channels
        self.shift = shift
        self.is_head = is_head
        self.is_gate = is_gate
        self.live = True

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        request = self.slot.request
        if request is None or not self.live:
            return
        if self.is_head:
            _read_head(request, self.channels, self.shift, args[0].detach(), output.detach())
        elif self.is_gate:
            for name in self.channels:
                request.vectors[name] = args[0].detach().float()
        else:
            hidden = (output[0] if isinstance(output, (tuple, list)) else output).detach()
            for name, channel in self.channels.items():
                request.vectors[name] = _pool(hidden, request.positions, request.spans, channel)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return self

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return _inert, ()


def _inert() -> Any:
    return _nothing


def _nothing(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """What is left of a guard's hook in a pickled model."""


def _read_head(request: Request, channels: Mapping[str, Channel], shift: int, hidden: Tensor, scores: Tensor) -> None:
    """Channels of the tensor that enters the head, (B, H) or (B, T, H), and the head's own output."""
    if hidden.ndim == 2:
        others = [name for name in channels if name != FINAL]
        if others or request.columns is not None:
            raise InputError(
                f"{f'channels {others}' if others else 'turn scores'}: this head reads one pooled vector per item, so the final "
                "layer has no tokens to pool. Name a block instead, for example 'response/mean@1.0'."
            )
        request.vectors[FINAL], request.head_output, request.pooled = hidden, scores, True
        return
    rows = torch.arange(hidden.shape[0], device=hidden.device)
    at = (request.positions + shift).clamp(max=hidden.shape[1] - 1).to(hidden.device)
    request.head_output = scores[rows, at]
    if request.columns is not None:
        columns = (request.columns + shift).clamp(0, hidden.shape[1] - 1).to(hidden.device)
        request.turns = hidden[rows[:, None], columns]
    spans = request.spans.shifted(shift) if shift else request.spans
    for name, channel in channels.items():
        # `final` keeps the model's dtype: it is what the head read.
        request.vectors[name] = hidden[rows, at] if name == FINAL else _pool(hidden, at, spans, channel)


def _pool(hidden: Tensor, positions: Tensor, spans: Spans, channel: Channel) -> Tensor:
    """One float32 vector per row of (B, T, H): at a token, or the mean over a span; of prompt and response side by side."""
    rows = torch.arange(hidden.shape[0], device=hidden.device)
    read_out = hidden[rows, positions.to(hidden.device)].float()
    is_pair = channel.axis == GIVEN_PROMPT
    if channel.pooling == "readout" and not is_pair:
        return read_out
    if channel.pooling != "mean":
        if spans.prompt_end is None:
            raise InputError(f"channel {channel} needs prompt_end, (B,): the last column before the response")
        prompt_end = hidden[rows, spans.prompt_end.to(hidden.device)].float()
        return torch.cat([prompt_end, read_out], 1) if is_pair else prompt_end
    if is_pair:
        masks = [spans.prompt_mask, spans.response_mask]
    else:
        masks = [spans.prompt_mask if channel.axis == "prompt" else spans.response_mask]
    return torch.cat([span_mean(hidden, mask, read_out, channel) for mask in masks], 1)


def span_mean(hidden: Tensor, span: Tensor | None, read_out: Tensor, channel: Channel) -> Tensor:
    """Mean of (B, T, H) over the tokens of a span (B, T), (B, H) float32; of an empty one the read-out vector (B, H)."""
    if span is None:
        raise InputError(
            f"channel {channel} needs the spans: pass prompt_end, (B,), the last column before the response"
        )
    mask = span.to(hidden.device)
    count = mask.sum(1, keepdim=True)
    # A select, not a product: 0 * inf in a padded column would poison the mean.
    # An empty span takes the read-out vector of the same layer; the item's reasons say so.
    total = torch.where(mask[:, :, None], hidden, 0).sum(1, dtype=torch.float32)
    return torch.where(count > 0, total / count.clamp(min=1), read_out)
