"""Is this the reward model that the guard was fitted on? The three tiers together, and what the model says of known texts.

Tier 2: eight canary texts, synthetic, with the vectors and rewards that the fitted model gave them. They see what no
configuration tells: another attention kernel, wrong position ids, a hook on another layer, an adapter that is not merged.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rm_ood.canaries import CANARIES
from rm_ood.config import GuardConfig
from rm_ood.embed import Embedder
from rm_ood.errors import CalibrationWarning, CaptureError, InputError, MismatchError
from rm_ood.fingerprint import WeightSamples, check_fingerprint, check_weights, fingerprint, require_fingerprint

# Relative difference of a vector between batch layouts and devices, by the dtype of the model (1 % seen in bfloat16).
_TOLERANCE = {"float64": 1e-4, "float32": 1e-4}
_COARSE_TOLERANCE = 5e-2
# Where another dtype was allowed: the weights are known to be the same ones, rounded, so only what computes is in question.
_ACROSS_DTYPES = 0.25
_DISTANCE_TOLERANCE = 0.1
# Channel vectors -> (8, channels) squared distances, in the order of the vectors.
Score = Callable[[Mapping[str, Tensor]], NDArray[np.float64]]
TIERS = ("config", "weights", "canaries")


@dataclass(frozen=True)
class Canaries:
    """What a model said of the canary texts.

    Attributes:
        vectors: channel -> (8, H) float32.
        rewards: (8,) float64.
    """

    vectors: Mapping[str, Tensor]
    rewards: NDArray[np.float64]

    @classmethod
    def of(cls, embedder: Embedder, text_format: str) -> Canaries | None:
        """Ask the model; None, with a warning, where it cannot be asked.

        Raises:
            MismatchError: training mode.
            CaptureError: the self-check failed.
        """
        text = embedder.text(text_format)
        try:
            encoded = [text.encode(prompt, response, "canary") for prompt, response in CANARIES]
        except InputError as error:
            _unasked(str(error))
            return None
        order, parts = zip(*embedder.batches(encoded, text), strict=True)
        failed = {reason for part in parts for reason in part.failed if reason is not None}
        if "read_out_mismatch" in failed:
            raise CaptureError(
                "read-out self-check failed on the canaries: the head's output at the read-out position is not the reward"
            )
        if failed:
            _unasked(f"the model's answers are {', '.join(failed)}")
            return None
        back = np.argsort(np.concatenate(order))
        names = parts[0].vectors
        vectors = {n: torch.cat([part.vectors[n] for part in parts]).float().cpu()[back].contiguous() for n in names}
        return cls(vectors, np.concatenate([part.rewards for part in parts])[back])


def _unasked(why: str) -> None:
    warnings.warn(
        f"the guard is bound to its model without canaries (fingerprint tier 2): {why}",
        CalibrationWarning,
        stacklevel=7,
    )


@dataclass(frozen=True)
class Identity:
    """A reward model as a guard knows it.

    Attributes:
        fields: tier 0.
        weights: tier 1; None for a guard that was never near a model.
        canaries: tier 2; None where they could not be asked.
    """

    fields: Mapping[str, str]
    weights: WeightSamples | None = None
    canaries: Canaries | None = None

    @classmethod
    def of(cls, embedder: Embedder, config: GuardConfig, tier: str = "canaries") -> Identity:
        """Take a model's identity, up to a tier.

        Raises:
            MismatchError: training mode, when canaries are asked.
        """
        fields = fingerprint(
            embedder.model,
            embedder.tokenizer,
            head=config.head,
            read_out=embedder.capture.rule,
            text=embedder.text(config.text_format).contract(),
            hooks=embedder.capture.hook_points(),
            switches_mode=config.eval_mode == "switch",
        )
        return cls(
            fields,
            WeightSamples.of(embedder.model) if tier != "config" else None,
            Canaries.of(embedder, config.text_format) if tier == "canaries" else None,
        )

    def check(
        self, embedder: Embedder, config: GuardConfig, tier: str, score: Score, *, allow: Collection[str] = ()
    ) -> list[str]:
        """Compare with a model, tier by tier, cheapest first.

        Args:
            tier: the last tier to compare: `"config"`, `"weights"` or `"canaries"`.
            score: the guard's own distances, to compare those of the canaries as well.
            allow: fields that may differ: names of tier 0, `"weights"`, `"canaries"`. With another dtype allowed, weights may
                differ by its rounding, and canaries by 25 % (see `compare`).
        Returns:
            The fields that differ and were allowed to.
        Raises:
            MismatchError: naming tier and field.
            InputError: `allow` names a field that there is not.
        """
        require_fingerprint(self.fields)
        unknown = sorted(set(allow) - self.fields.keys() - {"weights", "canaries"})
        if isinstance(allow, str) or unknown:
            raise InputError(
                f"allow={allow!r}: expected a list of fields: 'weights', 'canaries', or of {sorted(self.fields)}"
            )
        found = Identity.of(embedder, config, "config")
        changed = check_fingerprint(self.fields, found.fields, allow=allow)
        dtypes = (self.fields["dtype"], found.fields["dtype"])
        if tier != "config" and self.weights is not None:
            changed += check_weights(self.weights, WeightSamples.of(embedder.model), dtypes, allow=allow)
        if tier == "canaries" and self.canaries is not None:
            changed += self._check_canaries(Canaries.of(embedder, config.text_format), dtypes, score, allow)
        return changed

    def _check_canaries(
        self, found: Canaries | None, dtypes: tuple[str, str], score: Score, allow: Collection[str]
    ) -> list[str]:
        if found is None or self.canaries is None:
            told: str | None = "they could not be asked"
        else:
            told = compare(self.canaries, found, dtypes, score)
        if told is None:
            return []
        if "canaries" in allow:
            return ["canaries"]
        raise MismatchError(
            f"this reward model says other things than the one that the guard was fitted on (fingerprint tier 2): canaries: "
            f"{told}. Its configuration and weights may be the same, but what it computes is not: another attention kernel, "
            "autocast, adapter, position ids or hooked layer. Run it as it was, or pass allow=('canaries',) and ask "
            "guard.recalibrate(sample)."
        )


def compare(saved: Canaries, found: Canaries, dtypes: tuple[str, str], score: Score) -> str | None:
    """What differs between two models' canaries, worst channel first; None if nothing does.

    Tolerances: vectors and rewards, relative to their size, 1e-4 for float32 and float64, 5 % for coarser dtypes and 25 %
    from one dtype to another; squared distances 10 %, in one and the same dtype (another one moves them further, and needs a
    calibration anyway).
    """
    same_dtype = dtypes[0] == dtypes[1]
    tolerance = _TOLERANCE.get(dtypes[0], _COARSE_TOLERANCE) if same_dtype else _ACROSS_DTYPES
    # A guard may be loaded with fewer channels.
    before = {name: vectors for name, vectors in saved.vectors.items() if name in found.vectors}
    worst: dict[str, float] = {}
    for name, vectors in before.items():
        other = found.vectors[name]
        if other.shape != vectors.shape:
            return f"channel {name}: vectors of width {other.shape[1]}, not {vectors.shape[1]}"
        gap = (other - vectors).norm(dim=1) / vectors.norm(dim=1).clamp(min=1e-12)
        worst[name] = float(gap.nan_to_num(nan=float("inf")).max())
    spread = max(float(np.ptp(saved.rewards)), float(np.abs(saved.rewards).max()), 1e-12)
    worst["reward"] = float(np.nan_to_num(np.abs(found.rewards - saved.rewards) / spread, nan=np.inf).max())
    over = {name: gap for name, gap in worst.items() if gap > tolerance}
    if not over and same_dtype:
        tolerance = _DISTANCE_TOLERANCE
        gaps = np.abs(score(found.vectors) / np.maximum(score(before), 1e-300) - 1).max(axis=0)
        over = {f"distance of {n}": float(g) for n, g in zip(before, gaps, strict=True) if not g <= tolerance}
    if not over:
        return None
    shown = ", ".join(f"{name} by {100 * gap:.2g} %" for name, gap in sorted(over.items(), key=lambda item: -item[1]))
    return f"they differ in {shown} (tolerance {100 * tolerance:g} %)"
