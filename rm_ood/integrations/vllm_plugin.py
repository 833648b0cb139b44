"""vLLM general plugin: a guarded classifier in place of the reward head, so that one `/classify` gives both numbers.

vLLM's sequence classifiers hand their pooled vectors, (B, H), to `DispatchPooler.for_seq_cls(config, classifier=head)`,
and answer whatever numbers the classifier returns. Written for, and tested against recorded signatures of, vLLM 0.33;
vLLM itself was never started with it (see README.md beside this file).
"""

from __future__ import annotations

import hashlib
import os
from typing import Any

import torch
from torch import Tensor

from rm_ood import artifact, hub
from rm_ood.channels import FINAL
from rm_ood.detectors.mahalanobis import MahalanobisDetector
from rm_ood.errors import EngineError, InputError, MismatchError
from rm_ood.preferences import CLASSES
from rm_ood.reward_model import reward_column
from rm_ood.state import FittedState

GUARD_VARIABLE = "RM_OOD_GUARD"
# JSON has no infinity: this stands for a vector that has no distance.
UNSCORABLE = torch.finfo(torch.float32).max


def register() -> None:
    """Entry point of the group `vllm.general_plugins`; vLLM calls it in every process, more than once.

    Does nothing unless the environment variable RM_OOD_GUARD names a saved guard. The guard itself is loaded when vLLM
    builds the model.

    Raises:
        EngineError: a vLLM without `DispatchPooler.for_seq_cls`: serving without the guard would look like serving with it.
    """
    path = os.environ.get(GUARD_VARIABLE)
    if not path:
        return
    from vllm.model_executor.layers.pooler import DispatchPooler

    original = getattr(DispatchPooler, "for_seq_cls", None)
    if original is None:
        raise EngineError(
            f"{GUARD_VARIABLE} is set, but this vLLM has no DispatchPooler.for_seq_cls to put the guard in; rm_ood was written "
            "for vLLM 0.33. Unset the variable, or use that version."
        )
    if getattr(original, "guarded", False):
        return

    def for_seq_cls(cls: Any, /, pooler_config: Any, *, classifier: Any = None, **others: Any) -> Any:
        _check_calibration(pooler_config)
        return original.__func__(cls, pooler_config, classifier=GuardedClassifier(classifier, path), **others)

    for_seq_cls.guarded = True  # type: ignore[attr-defined]
    DispatchPooler.for_seq_cls = classmethod(for_seq_cls)


class GuardedClassifier:
    """Maps pooled vectors (B, H) to (B, K) float32: squared distances, the guard's number, and the reward, last.

    Not an `nn.Module`, so that vLLM's weight loading sees the same names with and without it. Runs on the device of the
    vectors; the head's own output passes through as it is. `/classify` has to be asked with `use_activation: false`:
    otherwise vLLM applies sigmoid or softmax to all K numbers, which `VLLMScorer` notices by the guard's number.

    Args:
        head: the reward head, one linear layer; called with (B, H).
        guard_path: a saved guard of the same reward model; its channel `final` is used.

    Attributes:
        columns: names of the K numbers: `sq_distance_chosen`, `sq_distance_rejected` (larger = more OOD; 3.4e38 where there
            is no distance; `sq_distance` alone for a guard of one class), `guard` (minus the number of `guard_number`),
            `reward`. The distances become a verdict in `VLLMScorer`, which has the calibration.

    Raises:
        InputError: no head, or one that is not one linear layer: its input is not what the guard was fitted on.
        MismatchError: a head of another width.
    """

    def __init__(self, head: Any, guard_path: str) -> None:
        weight = getattr(head, "weight", None)
        if not callable(head) or not isinstance(weight, Tensor):
            raise InputError(
                f"vLLM reads this model's reward with {type(head).__name__}, not with one linear layer, so the pooled vector is "
                "not what the reward is computed from. Serve the model with transformers and OODGuard."
            )
        # vLLM builds models under a default device and dtype of its own, which loading does not heed.
        state = FittedState.from_saved(*artifact.read_guard(hub.local_folder(guard_path)))
        self.detector = state.detectors[FINAL]
        if weight.ndim == 2 and weight.is_floating_point() and weight.shape[1] != self.detector.n_features_in_:
            raise MismatchError(
                f"the guard at {guard_path} reads vectors of {self.detector.n_features_in_} features, this model's head "
                f"{weight.shape[1]}: it is another reward model's"
            )
        self.columns = (*distance_columns(self.detector), "guard", "reward")
        self._head = head
        self._reward = reward_column(state.config.reward)
        self._number = -float(guard_number(self.detector))

    def __call__(self, x: Tensor) -> Tensor:
        """Distances, number and reward of pooled vectors (B, H), any floating dtype; (B, K) float32 on their device."""
        output = self._head(x)
        # A layer that returns its bias beside the output.
        scores = output[0] if isinstance(output, tuple) else output
        if self.detector.whitening_.device != x.device:
            self.detector.to(x.device)
        distances = self.detector.sq_distances(x).clamp(max=UNSCORABLE)
        number = distances.new_full((len(x), 1), self._number)
        return torch.cat([distances, number, scores[:, self._reward, None].to(distances)], 1)


def distance_columns(detector: MahalanobisDetector) -> tuple[str, ...]:
    """Names of the squared distances, one per class."""
    k = len(detector.classes_)
    return tuple(f"sq_distance_{name}" for name in CLASSES) if k == len(CLASSES) else ("sq_distance",) * k


def guard_number(detector: MahalanobisDetector) -> int:
    """A number of the fitted detector, 1 to 2**24, so exact in float32: distances of another one would be ranked wrongly."""
    sha = hashlib.sha256()
    for tensor in (detector.center_, detector.offsets_, detector.whitening_.diagonal()):
        sha.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return 1 + int.from_bytes(sha.digest()[:3], "big")


def _check_calibration(pooler_config: Any) -> None:
    """Refuse vLLM's own affine map of the scores: it would move the distances too."""
    moved = [name for name in ("logit_mean", "logit_sigma") if getattr(pooler_config, name, None) is not None]
    if moved:
        raise InputError(
            f"the pooler config sets {moved}, which vLLM would apply to the distances as well: leave them out"
        )
