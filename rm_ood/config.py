"""Every setting of a guard, in one frozen object that is saved as it is."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from rm_ood.channels import GIVEN_PROMPT, Channel, resolve_channels
from rm_ood.covariance import SHRINKAGES
from rm_ood.detectors.conditional import ConditionalMahalanobis
from rm_ood.detectors.contrasted import ContrastedMahalanobis
from rm_ood.detectors.gaussian import NormalisedMahalanobis
from rm_ood.detectors.mahalanobis import MahalanobisDetector
from rm_ood.errors import InputError
from rm_ood.preferences import RowReader
from rm_ood.readers import READ_OUTS
from rm_ood.text import FORMATS, ON_TOO_LONG


@dataclass(frozen=True)
class GuardConfig:
    """Settings of `OODGuard`; the constructor's keywords are these fields.

    Attributes:
        axes: what is judged: `"prompt"`, `"response"`, `"response_given_prompt"` (is the response strange for this prompt).
        channels: names of the channels that are joined into the verdict (see `rm_ood.channels`).
        detector: `"mahalanobis"`.
        alpha: tolerated false-alarm rate per item, a fraction in (0, 1).
        confidence: probability, over the draw of the calibration prompts, that the true false-alarm rate is at most
            `alpha`; None keeps `alpha` on average only.
        groups: a column to calibrate by (each group keeps `alpha` by itself), `"length"` for quintiles of the response's
            length, or None.
        max_length: longest input in tokens; None takes the tokenizer's limit.
        on_too_long: `"flag"` cuts from the left and gives the reason, `"truncate"` cuts, `"error"` raises.
        batch_size: items in a forward pass.
        seed: seed of the fit/calibration split and of the draw of one response per prompt.
        head: dotted path of the reward head where the rule (last Linear with `num_labels` outputs) is wrong.
        layers: dotted path of the list of transformer blocks where the rule (`num_hidden_layers` long) is wrong.
        reward: `"auto"`, or the output that is the reward: `"logits"`, `"end_scores"`, `"output"` (a bare tensor, the first of
            a tuple), with `":i"` for one of several columns.
        read_out: rule for the read-out position: `"auto"` (of the model's class), `"non_pad"`, `"last_token"`,
            `"before_pad"`, `"first"` (see `rm_ood.reward_model.read_out_positions`).
        prompt_pass: judge the prompt in a second, prompt-only forward; strict for encoders, whose one pass lets the prompt's
            vectors see the response. `response_given_prompt` then takes the prompt's part from there. Costs a forward over
            the prompt.
        shrinkage: `"oas"`, `"likelihood"` (under which each half of the fit prompts is the likeliest given the other; keeps
            two sets of moments while it fits), or a fixed coefficient in [0, 1].
        floor: smallest eigenvalue of the covariance as a share of its mean eigenvalue.
        span_means: the distance of span means: `"contrast"` (vectors of length 1, weighed against noisy copies of the fit
            texts, which cost one more forward per fit prompt; channels `axis/contrast@layer` need it), `"unit"` (vectors of
            length 1: Mahalanobis++) or `"raw"`.
        project_out_reward: leave the direction that the reward is read along out of the channel `final`.
        text_format: `"auto"`, `"chat"`, `"pair"` or `"plain"` (see `rm_ood.text`); `"auto"` is settled by `fit`.
        split_special_tokens: read special tokens that users typed as ordinary text (pair and plain formats).
        append_eos: end plain text with the end token, as TRL's RewardTrainer trains on.
        special_tokens: give plain text the special tokens that the tokenizer adds; TRL's GRPOTrainer serves it without.
        allow_empty: accept empty prompts.
        max_chars: longest text accepted, in characters.
        on_bad: `"error"`, or `"drop"` to leave out (and count) rows of fit and calibration data that cannot be used.
        eval_mode: `"error"` refuses a model in training mode, `"switch"` puts it in eval mode for the pass and back.
        one_class: one Gaussian for all responses, for data that lack chosen or rejected.
        max_calibration: calibration prompts kept, drawn by a seeded hash.
    """

    axes: tuple[str, ...] = ("prompt", "response")
    channels: tuple[str, ...] | str = "default"
    detector: str = "mahalanobis"
    alpha: float = 0.01
    confidence: float | None = 0.95
    groups: str | None = None
    max_length: int | None = None
    on_too_long: str = "flag"
    batch_size: int = 16
    seed: int = 0
    head: str | None = None
    layers: str | None = None
    reward: str = "auto"
    read_out: str = "auto"
    prompt_pass: bool = False
    shrinkage: float | str = "oas"
    floor: float = 1e-4
    span_means: str = "contrast"
    project_out_reward: bool = False
    text_format: str = "auto"
    split_special_tokens: bool = False
    append_eos: bool = False
    special_tokens: bool = True
    allow_empty: bool = False
    max_chars: int = 200_000
    on_bad: str = "error"
    eval_mode: str = "error"
    one_class: bool = False
    max_calibration: int = 10_000

    def __post_init__(self) -> None:
        axes = (self.axes,) if isinstance(self.axes, str) else tuple(self.axes)
        object.__setattr__(self, "axes", axes)
        object.__setattr__(self, "channels", self._channels(axes))
        _require(_is_number(self.alpha) and 0 < self.alpha < 1, "alpha", self.alpha, "a fraction in (0, 1)")
        _require(
            self.confidence is None or (_is_number(self.confidence) and 0 < self.confidence < 1),
            "confidence",
            self.confidence,
            "a fraction in (0, 1) or None",
        )
        _require(self.detector == "mahalanobis", "detector", self.detector, "'mahalanobis'")
        _require(
            _is_shrinkage(self.shrinkage), "shrinkage", self.shrinkage, "'oas', 'likelihood' or a number in [0, 1]"
        )
        _require(_is_number(self.floor) and 0 <= self.floor <= 1, "floor", self.floor, "a number in [0, 1]")
        for name in ("batch_size", "max_calibration", "max_chars"):
            value = getattr(self, name)
            _require(_is_integer(value) and value > 0, name, value, "a positive integer")
        length, seed = self.max_length, self.seed
        _require(
            length is None or (_is_integer(length) and length >= 2), "max_length", length, "2 tokens or more, or None"
        )
        _require(_is_integer(seed) and -(2**63) <= seed < 2**63, "seed", seed, "a 64-bit integer")
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            _require(value in choices, name, value, f"one of {choices}")
        _require(
            isinstance(self.reward, str) and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*(:[0-9]+)?", self.reward) is not None,
            "reward",
            self.reward,
            "'auto', or the name of an output, with ':<column>' for one of several ('logits:0')",
        )
        for name in (
            "project_out_reward",
            "prompt_pass",
            "split_special_tokens",
            "append_eos",
            "special_tokens",
            "allow_empty",
            "one_class",
        ):
            value = getattr(self, name)
            _require(isinstance(value, bool), name, value, "True or False")
        for name in ("groups", "head", "layers"):
            value = getattr(self, name)
            _require(value is None or isinstance(value, str), name, value, "a string or None")

    def _channels(self, axes: tuple[str, ...]) -> tuple[str, ...]:
        names = resolve_channels(self.channels, axes)
        contrasts = [name for name in names if Channel.parse(name).pooling == "contrast"]
        if not contrasts or self.span_means == "contrast":
            return names
        _require(self.channels == "default", "channels", contrasts, "no contrast unless span_means='contrast'")
        return tuple(name for name in names if name not in contrasts)

    @property
    def joined(self) -> tuple[str, ...]:
        """Channels that make the verdict, `final` first where it is among them."""
        return tuple(self.channels)

    @property
    def group_column(self) -> str | None:
        """The column that the guard is calibrated by; None where it is by none, or by length."""
        return None if self.groups in (None, "length") else self.groups

    def reader(self, *, labelled: bool) -> RowReader:
        """How rows are read, wherever the guard reads some: to fit (`labelled`), to calibrate or to check."""
        return RowReader(
            require_labels=labelled and not self.one_class,
            group_column=self.group_column,
            allow_empty=self.allow_empty,
            max_chars=self.max_chars,
        )

    def detector_type(self, channel: str) -> type[MahalanobisDetector]:
        """The detector of a channel's vector: that of `span_means` for means over one span, else plain or conditional."""
        parsed = Channel.parse(channel)
        if parsed.axis == GIVEN_PROMPT:
            return ConditionalMahalanobis
        return _SPAN_MEANS[self.span_means] if parsed.pooling == "mean" else MahalanobisDetector

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The settings that `to_dict` wrote.

        Raises:
            InputError: a field that this version does not know, or a value that is out of range.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise InputError(f"settings {unknown} are not known; the settings are {sorted(known)}")
        settings: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**settings)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able settings."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}


_SPAN_MEANS: dict[str, type[MahalanobisDetector]] = {
    "contrast": ContrastedMahalanobis,
    "unit": NormalisedMahalanobis,
    "raw": MahalanobisDetector,
}
_CHOICES = {
    "on_too_long": ON_TOO_LONG,
    "text_format": ("auto", *FORMATS),
    "read_out": ("auto", *READ_OUTS),
    "span_means": tuple(_SPAN_MEANS),
    "on_bad": ("error", "drop"),
    "eval_mode": ("error", "switch"),
}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_shrinkage(value: Any) -> bool:
    return value in SHRINKAGES if isinstance(value, str) else _is_number(value) and 0 <= value <= 1


def _require(holds: bool, name: str, value: Any, wanted: str) -> None:
    if not holds:
        raise InputError(f"{name}={value!r}: expected {wanted}")
