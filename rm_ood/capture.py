"""Which vectors a forward pass leaves behind, and the check that they are the right ones.

A forward hook on the reward head sees the very tensor that the reward is computed from, and the head's own output.
Intermediate layers are hooked the same way and reduced at once to span means.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rm_ood.channels import FINAL, REWARD, Channel
from rm_ood.errors import CaptureError, InputError
from rm_ood.hooks import Hook, Request, Slot
from rm_ood.readers import RewardReader, reader_of
from rm_ood.reward_model import (
    check_left_padding,
    find_blocks,
    find_head,
    has_left_padding,
    is_per_token,
    read_out_positions,
    read_reward,
    reward_column,
)
from rm_ood.spans import Spans
from rm_ood.wrappers import called_path, input_device, plain_path, refuse_unsupported, unwrap

# Of `reward_direction`: length of the vectors that go through the head, and how many at once (a head may have a vocabulary of
# outputs).
_LONG, _UNITS = 256.0, 512


@dataclass
class Captured:
    """What one forward pass left behind.

    Attributes:
        vectors: channel name -> (B, H), or (B, 2H) on the axis `response_given_prompt`, in float32 (`final` in the model's
            dtype), detached.
        rewards: (B,) as the model returned them.
        mismatch: (B,) bool: the head's own output at the read-out position is not the returned reward.
        turns: (B, K, H) what the head read at further columns, where they were asked for.
        unchecked: nothing tells whether the reward was read where the head's output was: a value per token came back, or no
            reward.
    """

    vectors: dict[str, Tensor]
    rewards: Tensor
    mismatch: Tensor
    turns: Tensor | None = None
    unchecked: bool = False


class Capture:
    """Hooks on a reward model that turn one forward pass into channel vectors.

    Args:
        model: the reward model, wrapped or not.
        channels: channel names; `final` is always captured.
        head: dotted path of the head where the rule is wrong.
        layers: dotted path of the list of blocks where the rule is wrong.
        read_out: rule for the read-out position (see `read_out_positions`).
        reward: which output is the reward (see `read_reward`).

    Raises:
        InputError: no head or no blocks found, a channel that the model has no layer for, or a wrapper that no guard can
            be put on.
    """

    def __init__(
        self,
        model: nn.Module,
        channels: Sequence[str],
        *,
        head: str | None = None,
        layers: str | None = None,
        read_out: str = "auto",
        reward: str = "auto",
    ) -> None:
        refuse_unsupported(model)
        self.model = model
        self.reader = reader_of(model)
        self.read_out = read_out
        self._rule = self.reader.read_out if read_out == "auto" else read_out
        self.reward = self.reader.reward if reward == "auto" else reward
        # The reader's own comparison of head and reward holds where the caller named no column.
        self._agrees = self.reader.agrees if reward == "auto" else None
        self.head_path, head_module = find_head(model, head)
        if self._agrees is None and isinstance(self.reward, str):
            _check_labels(head_module, self.head_path, self.reward)
        parsed = {name: Channel.parse(name) for name in (FINAL, *channels) if name != REWARD}
        self._at_gate, self._at_head, deep = _places(parsed, self.reader)
        self._at_block: dict[int, dict[str, Channel]] = {}
        self._layers = layers
        n_blocks = len(find_blocks(model, layers)) if deep else 0
        for name, channel in deep.items():
            self._at_block.setdefault(channel.block(n_blocks), {})[name] = channel
        self._slot = Slot()
        self._hooked: dict[str, nn.Module] = {}
        self._placed: list[Hook] = []
        self._handles: list[RemovableHandle] = []
        self._moving = threading.Lock()
        # A guard that is gone leaves no hooks behind.
        weakref.finalize(self, _remove, self._handles, self._placed)
        self.attach()

    def attach(self) -> None:
        """Put the hooks in place; a second call does nothing."""
        with self._moving:
            if not self._handles:
                self._place()

    def _place(self) -> None:
        """Hook the modules that stand in the model now, then take the old hooks away: a forward under way misses none."""
        handles, placed = list(self._handles), list(self._placed)
        hooked = {}
        new: list[tuple[RemovableHandle, Hook]] = []
        for path, module, hook in self._hooks():
            hooked[path] = module
            new.append((module.register_forward_hook(hook), hook))
        self._hooked = hooked
        self._handles[:] = [handle for handle, _ in new]
        self._placed[:] = [hook for _, hook in new]
        _remove(handles, placed)

    def _hooks(self) -> Iterator[tuple[str, nn.Module, Hook]]:
        inner = unwrap(self.model)
        head = called_path(inner, self.head_path)
        yield head, inner.get_submodule(head), Hook(self._slot, self._at_head, self.reader.head_shift, is_head=True)
        if self._at_gate:
            gate = called_path(inner, str(self.reader.prompt_head))
            yield gate, inner.get_submodule(gate), Hook(self._slot, self._at_gate, 0, is_gate=True)
        if self._at_block:
            blocks = find_blocks(self.model, self._layers)
            stack = next(name for name, module in inner.named_modules() if module is blocks)
            for index, channels in self._at_block.items():
                yield f"{stack}.{index}", blocks[index], Hook(self._slot, channels, 0)

    @property
    def rule(self) -> str:
        """Name of the rule for the read-out position, the reader's own where the settings leave it open."""
        return self._rule if isinstance(self._rule, str) else "own"

    def hook_points(self) -> dict[str, str]:
        """Channel -> plain dotted path of the module that it is read at."""
        return {name: plain_path(path) for path, _, hook in self._hooks() for name in hook.channels}

    def reward_direction(self) -> Tensor:
        """(1, H) float64: how the reward depends on the vector that enters the head.

        Read off the head's own outputs at the unit vectors, so that adapters, quantised and offloaded weights count as they
        run.

        Raises:
            InputError: the head is not linear, or the reward is more than one of its outputs.
        """
        head = unwrap(self.model).get_submodule(called_path(unwrap(self.model), self.head_path))
        width = getattr(head, "in_features", None)
        # A reader with a comparison of its own may make the reward of several outputs; of a single one it makes what it likes.
        is_one = self._agrees is None or getattr(head, "out_features", None) == 1
        if not isinstance(width, int) or not isinstance(self.reward, str) or not is_one:
            raise InputError(
                f"project_out_reward: the reward is not one output of a Linear ({self.head_path!r} is a "
                f"{type(head).__name__}), so it has no one direction"
            )
        parameters = (*head.parameters(), *self.model.parameters())
        like = next((p for p in parameters if p.is_floating_point()), torch.empty(0))
        # Long, so that in half precision the rounding of the bias does not drown the weights.
        units = _LONG * torch.eye(width + 1, width, dtype=like.dtype, device=input_device(self.model))
        column = reward_column(self.reward)
        with torch.inference_mode():
            outputs = torch.cat([head(part)[:, column].double() for part in torch.split(units, _UNITS)])
        # The last row is the head's output at 0.
        direction: Tensor = (outputs[:-1] - outputs[-1])[None].cpu().clone() / _LONG
        return direction

    def detach(self) -> None:
        """Remove the hooks; a second call does nothing."""
        with self._moving:
            _remove(self._handles, self._placed)
            self._hooked = {}

    def _follow(self) -> None:
        """Hook the modules that stand in the model now: adapters that are added, merged or unloaded replace them."""
        if not self._handles:
            raise CaptureError("the guard's hooks were removed (detach, or the end of its with-block): call attach()")
        if not self._stays():
            with self._moving:
                if not self._stays():
                    self._place()

    def _stays(self) -> bool:
        inner = unwrap(self.model)
        try:
            # In a model that was wrapped in adapters after the guard, the head that is called stands further out.
            return all(
                called_path(inner, path) == path and inner.get_submodule(path) is module
                for path, module in self._hooked.items()
            )
        except AttributeError:
            return False

    @contextmanager
    def listen(self, inputs: Mapping[str, Any], spans: Spans, columns: Tensor | None = None) -> Iterator[Request]:
        """Capture what passes the hooks in this thread until the end of the block, whoever calls the modules.

        Raises:
            CaptureError: after the block, if the hooks saw nothing.
            InputError: after the block, if the padding changed what the model returned.
        """
        self._follow()
        # Asked before the forward, not after it: the answer waits for the device.
        is_left_padded = has_left_padding(inputs)
        request = Request(read_out_positions(self.model, inputs, self._rule), spans, columns)
        self._slot.request = request
        try:
            yield request
        finally:
            self._slot.request = None
        wanted = (*self._at_head, *self._at_gate, *(n for channels in self._at_block.values() for n in channels))
        missing = [name for name in wanted if name not in request.vectors]
        if request.head_output is None or missing:
            raise CaptureError(
                f"no activation captured for {missing or [FINAL]}: the forward did not pass through {self.head_path!r} and "
                "the hooked blocks. A model compiled before the guard was made skips late hooks: make the guard before the "
                "first compiled call, or call torch._dynamo.reset()."
            )
        if is_left_padded:
            check_left_padding(self.model, inputs, request.pooled, self.reader.read_out)

    def forward(self, inputs: Mapping[str, Any], spans: Spans, columns: Tensor | None = None) -> tuple[Any, Captured]:
        """One forward pass of the model, its own output untouched, and the vectors of it.

        Args:
            inputs: keyword arguments of the model; never altered.
            spans: where prompt and response are, as far as the channels need it.
            columns: (B, K) int, further columns at which to take what the head reads.
        Raises:
            CaptureError: the hooks saw nothing (removed, or set after the model was compiled).
            InputError: an output that holds no reward, or padding that the model cannot take.
        """
        with self.listen(inputs, spans, columns) as request:
            outputs = self.model(**{**inputs, **self.reader.inputs})
        return outputs, self.captured(request, outputs)

    def captured(self, request: Request, outputs: Any) -> Captured:
        """The vectors of a finished request, checked against the rewards in the model's output."""
        own, unchecked = self.reward, False
        if isinstance(own, str):
            unchecked = is_per_token(outputs, own)
            if unchecked and self.read_out == "auto" and self.reader == RewardReader():
                raise InputError(
                    "this model returns a value for every token, so nothing in its output tells which one is the reward. Name "
                    "the token: read_out='last_token', or another rule."
                )
            rewards = read_reward(outputs, own, request.positions)
        else:
            rewards = own(outputs, request.positions)
        rewards = rewards.detach()
        mismatch = self._mismatch(request, outputs, rewards)
        return Captured(request.vectors, rewards, mismatch, request.turns, unchecked)

    def observed(self, request: Request, rewards: Tensor | None) -> Captured:
        """The vectors of calls that were not the model's own forward, checked against (B,) rewards where there are any.

        Raises:
            CaptureError: the head was not called.
            InputError: no rewards, and the model's reward is more than a column of its head's output.
        """
        if request.head_output is None:
            raise CaptureError(f"no activation captured for {[FINAL]}: the head {self.head_path!r} was not called")
        if self._agrees is not None or not isinstance(self.reward, str):
            raise InputError(
                "this model's reward is more than one output of its head, so it cannot be told from direct calls of backbone "
                "and head: call the guard on the model's inputs"
            )
        own = request.head_output[:, reward_column(self.reward)]
        found = own if rewards is None else rewards.detach().reshape(-1)
        if found.shape != own.shape:
            raise InputError(f"rewards: expected {len(own)} values, one per row, got {len(found)}")
        return Captured(request.vectors, found, self._mismatch(request, None, found), request.turns, rewards is None)

    def _mismatch(self, request: Request, outputs: Any, rewards: Tensor) -> Tensor:
        """(B,) bool: the head's output at the read-out position did not give the reward."""
        head = request.head_output
        if head is None:
            raise CaptureError(f"no activation captured for {[FINAL]}")
        # Equal NaNs agree: the reward is then flagged for being NaN, not for the position.
        if self._agrees is not None:
            agrees: Tensor = self._agrees(self.model, head, outputs, rewards)
            return ~(agrees | rewards.isnan())
        value = head[:, reward_column(self.reward) if isinstance(self.reward, str) else 0].to(rewards)
        return ~((value == rewards) | (value.isnan() & rewards.isnan()))


def _places(
    channels: Mapping[str, Channel], reader: RewardReader
) -> tuple[dict[str, Channel], dict[str, Channel], dict[str, Channel]]:
    """Channels read at the gate of a gated head, at the head, and at the blocks."""
    gate, head, deep = {}, {}, {}
    for name, channel in channels.items():
        if channel.layer != FINAL:
            deep[name] = channel
        elif reader.prompt_head is not None and channel.pooling == "prompt_end":
            gate[name] = channel
        else:
            head[name] = channel
    return gate, head, deep


def _check_labels(head: nn.Module, path: str, reward: str) -> None:
    labels = getattr(head, "out_features", None)
    if isinstance(labels, int) and (reward_column(reward) >= labels or (labels != 1 and ":" not in reward)):
        raise InputError(
            f"reward={reward!r}: the head {path!r} has {labels} outputs. Name the one that is the reward, reward='logits:0' to "
            f"'logits:{labels - 1}', or another head with head='dotted.path'."
        )


def _remove(handles: list[RemovableHandle], hooks: list[Hook]) -> None:
    while handles:
        handles.pop().remove()
    while hooks:
        # A copy of the hook may stand on a copied module (adapters copy the head).
        hooks.pop().live = False
