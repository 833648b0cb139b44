"""Channels: which vector of the reward model is scored, on which axis.

A channel is (axis, layer, pooling), written `axis/pooling@layer`: `response/mean@0.67` is the mean over the response's
tokens at the output of block round(0.67 L), and `response/contrast@0.67` is the same vector, scored by whether noise on
the words explains it better than the fit data do. Two names are short: `final` is the tensor that enters the reward head at
the read-out position (what the reward is computed from), and `reward` is the reward itself. On the axis
`response_given_prompt` a vector is two side by side, the prompt's and the response's of the same layer: `mean` of both
spans, or `readout` with the prompt's end before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from rm_ood.errors import InputError

# What has tokens of its own; span lengths are in this order.
SPANS = ("prompt", "response")
GIVEN_PROMPT = "response_given_prompt"
AXES = (*SPANS, GIVEN_PROMPT)
POOLINGS = ("readout", "prompt_end", "mean", "contrast")
FINAL = "final"
REWARD = "reward"
# Span means two thirds up the stack beside what the head reads: chosen in benchmarks/README.md, "Channels".
DEFAULT_CHANNELS = (
    FINAL,
    "prompt/mean@0.67",
    "prompt/contrast@0.67",
    "response/mean@0.67",
    "response/contrast@0.67",
    f"{GIVEN_PROMPT}/mean@0.67",
)


@dataclass(frozen=True)
class Channel:
    """One vector (or the reward) that is scored.

    Args:
        axis: `"prompt"`, `"response"` or `"response_given_prompt"`.
        layer: `"final"` (the tensor that enters the head), a fraction of the depth in (0, 1] (the output of block
            round(fraction * L)), or a negative index (-1: output of the last block).
        pooling: `"readout"`, `"prompt_end"`, `"mean"` over the axis' tokens, `"contrast"` (another score of that mean), or
            `"reward"`.
    """

    axis: str
    layer: float | int | str
    pooling: str

    @classmethod
    def parse(cls, text: str | Channel) -> Channel:
        """Read `final`, `reward` or `axis/pooling[@layer]`.

        Raises:
            InputError: the text is none of these; the message shows the syntax.
        """
        if isinstance(text, cls):
            return text
        if not isinstance(text, str):
            raise InputError(f"channel: expected str or Channel, got {type(text).__name__}. {_SYNTAX}")
        if text == FINAL:
            return cls("response", FINAL, "readout")
        if text == REWARD:
            return cls("response", FINAL, REWARD)
        head, _, layer_text = text.partition("@")
        axis, _, pooling = head.partition("/")
        if axis not in AXES or pooling not in POOLINGS:
            raise InputError(f"channel {text!r} is not known. {_SYNTAX}")
        if pooling == "readout" and axis == "prompt":
            raise InputError(f"channel {text!r}: the read-out token belongs to the response axis. {_SYNTAX}")
        if pooling in ("prompt_end", "contrast") and axis == GIVEN_PROMPT:
            raise InputError(f"channel {text!r}: this axis takes mean, or readout beside the prompt's end. {_SYNTAX}")
        return cls(axis, _parse_layer(text, layer_text), pooling)

    def __str__(self) -> str:
        if self.pooling == REWARD:
            return REWARD
        if self.axis == "response" and self.pooling == "readout" and self.layer == FINAL:
            return FINAL
        at = "" if self.layer == FINAL else f"@{self.layer}"
        return f"{self.axis}/{self.pooling}{at}"

    @property
    def vector(self) -> Channel:
        """The channel whose vector is scored: the mean of a contrast, else this one."""
        return replace(self, pooling="mean") if self.pooling == "contrast" else self

    @property
    def contrast(self) -> Channel:
        """The second score of a span mean."""
        return replace(self, pooling="contrast")

    @property
    def span(self) -> str:
        """Whose tokens the score goes with: the prompt's for the prompt axis, else the response's."""
        return "prompt" if self.axis == "prompt" else "response"

    @property
    def reads_prompt(self) -> bool:
        """Whether a vector of the prompt is in it."""
        return self.axis != "response"

    def block(self, n_blocks: int) -> int:
        """Index of the block, from 0, whose output this channel reads in a stack of `n_blocks`."""
        if isinstance(self.layer, str):
            raise InputError(f"channel {self}: the final layer is read at the head, not at a block")
        index = n_blocks + self.layer if isinstance(self.layer, int) else round(self.layer * n_blocks) - 1
        if not 0 <= index < n_blocks:
            raise InputError(f"channel {self}: no such layer in a model of {n_blocks} blocks")
        return index


def _parse_layer(text: str, layer: str) -> float | int | str:
    if layer in ("", FINAL):
        return FINAL
    try:
        return _layer(int(layer) if layer.lstrip("-").isdigit() else float(layer))
    except ValueError as error:
        raise InputError(f"channel {text!r}: {layer!r} is no layer. {_SYNTAX}") from error


def _layer(value: float | int) -> float | int:
    if isinstance(value, int):
        if value == 1:
            return 1.0
        if value >= 0:
            raise ValueError("layers are counted from the end")
        return value
    if not (math.isfinite(value) and 0 < value <= 1):
        raise ValueError("a fraction of the depth lies in (0, 1]")
    return value


def resolve_channels(channels: str | Channel | Iterable[str | Channel], axes: Iterable[str]) -> tuple[str, ...]:
    """Names of the channels that are joined into the verdict, in canonical form, `final` first.

    `"default"` is `DEFAULT_CHANNELS` on the given axes. `final` is computed in every guard, but joins the verdict only
    when it is listed.

    Raises:
        InputError: an unknown axis or channel, a channel on an axis that the guard lacks, or nothing left.
    """
    axes = tuple(axes)
    unknown = [axis for axis in axes if axis not in AXES]
    if unknown or not axes:
        raise InputError(f"axes={axes!r}: expected some of {AXES}")
    if channels == "default":
        names = [name for name in DEFAULT_CHANNELS if Channel.parse(name).axis in axes]
    else:
        if isinstance(channels, Channel):
            channels = (channels,)
        if not isinstance(channels, Iterable):
            raise InputError(f"channels: expected names, got {type(channels).__name__}. {_SYNTAX}")
        listed = channels.split(",") if isinstance(channels, str) else list(channels)
        names = [str(Channel.parse(c.strip() if isinstance(c, str) else c)) for c in listed]
        outside = [name for name in names if Channel.parse(name).axis not in axes]
        if outside:
            raise InputError(f"channels {outside} are on an axis that axes={axes!r} leaves out")
    if not names:
        raise InputError("channels: at least one is needed; 'final' is the plain final-layer guard")
    return tuple(sorted(dict.fromkeys(names), key=lambda name: (name != FINAL, names.index(name))))


_SYNTAX = (
    "Write 'final', 'reward' or 'axis/pooling@layer', for example 'response/mean@0.67' or 'prompt/prompt_end'; "
    "axis: prompt, response, response_given_prompt; pooling: readout, prompt_end, mean, contrast; layer: a fraction in "
    "(0, 1] or a negative index."
)
