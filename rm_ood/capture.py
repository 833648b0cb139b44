"""The hooks: which vectors a forward pass leaves behind, thread by thread, and the check that they are the right ones.

A forward hook on the reward head sees the very tensor that the reward is computed from, and the head's own output.
Intermediate layers are hooked the same way and reduced at once to span means; no (B, T, H) tensor is kept.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rm_ood.channels import FINAL, REWARD, Channel
from rm_ood.errors import CaptureError, InputError
from rm_ood.reward_model import (
    find_blocks,
    find_head,
    read_out_positions,
    read_reward,
    reward_column,
)
from rm_ood.spans import Spans


@dataclass
class Captured:
    """What one forward pass left behind.

    Attributes:
        vectors: channel name -> (B, H) in float32 (`final` in the model's dtype), detached.
        rewards: (B,) as the model returned them.
        mismatch: (B,) bool: the head's own output at the read-out position is not the returned reward.
    """

    vectors: dict[str, Tensor]
    rewards: Tensor
    mismatch: Tensor


@dataclass
class _Request:
    """One forward's spans going in and pooled vectors coming out; lives in its own thread only."""

    positions: Tensor
    spans: Spans
    vectors: dict[str, Tensor] = field(default_factory=dict)
    head_output: Tensor | None = None


class _Slot(threading.local):
    """The request of the thread that is in a forward; None otherwise, so that foreign forwards cost nothing."""

    request: _Request | None = None


class Capture:
    """Hooks on a reward model that turn one forward pass into channel vectors.

    Args:
        model: the reward model.
        channels: channel names; `final` is always captured.
        head: dotted path of the head where the rule is wrong.
        layers: dotted path of the list of blocks where the rule is wrong.
        read_out: rule for the read-out position (see `read_out_positions`).
        reward: `"logits"` or `"logits:i"`.

    Raises:
        InputError: no head or no blocks found, or a channel that the model has no layer for.
    """

    def __init__(
        self,
        model: nn.Module,
        channels: Sequence[str],
        *,
        head: str | None = None,
        layers: str | None = None,
        read_out: str = "auto",
        reward: str = "logits",
    ) -> None:
        self.model = model
        self.read_out = read_out
        self.reward = reward
        self.head_path, self._head = find_head(model, head)
        _check_labels(self._head, self.head_path, reward)
        parsed = {name: Channel.parse(name) for name in (FINAL, *channels) if name != REWARD}
        self._at_head = {name: c for name, c in parsed.items() if c.layer == FINAL}
        self._at_block: dict[int, dict[str, Channel]] = {}
        deep = {name: c for name, c in parsed.items() if c.layer != FINAL}
        self._blocks: list[nn.Module] = list(find_blocks(model, layers)) if deep else []
        for name, channel in deep.items():
            self._at_block.setdefault(channel.block(len(self._blocks)), {})[name] = channel
        self._slot = _Slot()
        self._handles: list[RemovableHandle] = []
        # A guard that is gone leaves no hooks behind.
        weakref.finalize(self, _remove, self._handles)
        self.attach()

    def attach(self) -> None:
        """Put the hooks in place; a second call does nothing."""
        if self._handles:
            return
        self._handles.append(self._head.register_forward_hook(_head_hook(self._slot, self._at_head)))
        for index, channels in self._at_block.items():
            self._handles.append(self._blocks[index].register_forward_hook(_block_hook(self._slot, channels)))

    def detach(self) -> None:
        """Remove the hooks; a second call does nothing."""
        _remove(self._handles)

    def forward(self, inputs: Mapping[str, Any], spans: Spans) -> tuple[Any, Captured]:
        """One forward pass of the model, its own output untouched, and the vectors of it.

        Args:
            inputs: keyword arguments of the model; never altered.
            spans: where prompt and response are, as far as the channels need it.
        Raises:
            CaptureError: the hooks saw nothing (removed, or set after the model was compiled).
        """
        if not self._handles:
            raise CaptureError("the guard's hooks were removed (detach, or the end of its with-block): call attach()")
        request = _Request(
            positions=read_out_positions(self.model, dict(inputs), self.read_out),
            spans=spans,
        )
        self._slot.request = request
        try:
            outputs = self.model(**inputs)
        finally:
            self._slot.request = None
        missing = [
            n for n in (*self._at_head, *(n for c in self._at_block.values() for n in c)) if n not in request.vectors
        ]
        if request.head_output is None or missing:
            raise CaptureError(
                f"no activation captured for {missing or [FINAL]}: the forward did not pass through {self.head_path!r} and "
                "the hooked blocks. A model compiled before the guard was made skips late hooks: make the guard before the "
                "first compiled call, or call torch._dynamo.reset()."
            )
        rewards = read_reward(outputs, self.reward)
        from_head = request.head_output[:, reward_column(self.reward)].to(rewards)
        return outputs, Captured(
            vectors=request.vectors,
            rewards=rewards.detach(),
            # Equal NaNs agree: the reward is then flagged for being NaN, not for the position.
            mismatch=~((from_head == rewards) | (from_head.isnan() & rewards.isnan())).detach(),
        )


def _check_labels(head: nn.Module, path: str, reward: str) -> None:
    labels = getattr(head, "out_features", None)
    if labels is not None and (reward_column(reward) >= labels or (labels != 1 and ":" not in reward)):
        raise InputError(
            f"reward={reward!r}: the head {path!r} has {labels} outputs. Name the one that is the reward, reward='logits:0' to "
            f"'logits:{labels - 1}', or another head with head='dotted.path'."
        )


def _remove(handles: list[RemovableHandle]) -> None:
    while handles:
        handles.pop().remove()


def _head_hook(slot: _Slot, channels: Mapping[str, Channel]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        request = slot.request
        if request is None:
            return
        hidden, scores = args[0].detach(), output.detach()
        if hidden.ndim == 2:
            others = [name for name in channels if name != FINAL]
            if others:
                raise InputError(
                    f"channels {others}: this head reads one pooled vector per item, so the final layer has no tokens to "
                    "pool. Name a block instead, for example 'response/mean@1.0'."
                )
            request.vectors[FINAL], request.head_output = hidden, scores
            return
        rows = torch.arange(hidden.shape[0], device=hidden.device)
        at = request.positions.to(hidden.device)
        request.head_output = scores[rows, at]
        for name, channel in channels.items():
            # `final` keeps the model's dtype: it is what the head read.
            pooled = hidden[rows, at] if name == FINAL else _pool(hidden, request, channel)
            request.vectors[name] = pooled

    return hook


def _block_hook(slot: _Slot, channels: Mapping[str, Channel]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        request = slot.request
        if request is None:
            return
        hidden = (output[0] if isinstance(output, (tuple, list)) else output).detach()
        for name, channel in channels.items():
            request.vectors[name] = _pool(hidden, request, channel)

    return hook


def _pool(hidden: Tensor, request: _Request, channel: Channel) -> Tensor:
    """One float32 vector per row of (B, T, H): at a token, or the mean over a span."""
    rows = torch.arange(hidden.shape[0], device=hidden.device)
    read_out = hidden[rows, request.positions.to(hidden.device)].float()
    if channel.pooling == "readout":
        return read_out
    if channel.pooling == "prompt_end":
        if request.spans.prompt_end is None:
            raise InputError(f"channel {channel} needs prompt_end, (B,): the last column before the response")
        return hidden[rows, request.spans.prompt_end.to(hidden.device)].float()
    span = request.spans.prompt_mask if channel.axis == "prompt" else request.spans.response_mask
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
