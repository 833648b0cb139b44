"""Did the engine read the reward from the vector that it returned? The head, once more, on our side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rm_ood.channels import FINAL
from rm_ood.errors import InputError, MismatchError
from rm_ood.fingerprint import same_head
from rm_ood.reward_model import reward_column
from rm_ood.state import FittedState
from rm_ood.strict_json import parse_json
from rm_ood.vectors import as_tensor

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_MAX_INDEX = 2**25
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class RewardHead:
    """The row of a linear head that makes the reward: `weight` (H,) float64, `bias`, and eps of the dtype it runs in."""

    weight: Tensor
    bias: float
    eps: float

    def disagrees(self, vectors: Tensor, rewards: Tensor) -> Tensor:
        """Which rewards are not w.h + b of their vectors, (n,) bool; not finite disagrees.

        The tolerance is what rounding can do: eps of the head's dtype for its output, and float32's for a sum of H terms
        that are added up in float32, both times sum |w_i h_i| + |b|.

        Args:
            vectors: (n, H). rewards: (n,), as the engine returned them.
        """
        terms = vectors.double() * self.weight
        size = terms.abs().sum(1) + abs(self.bias)
        slack = self.eps + math.sqrt(len(self.weight)) * torch.finfo(torch.float32).eps
        return ~((terms.sum(1) + self.bias - rewards.double()).abs() <= slack * size)


def read_head(head: Any, state: FittedState) -> RewardHead:
    """The reward head from `(weight, bias)` or from a checkpoint.

    Args:
        head: weight (labels, H) or (H,) with bias (labels,), a number or None, in the dtype that the engine runs the head
            in; or a folder with safetensors files, of which the head's tensors alone are read.
        state: tells path, width and label of the head, and the dtype of the fit: the coarser of the two dtypes counts.
    Raises:
        InputError: no safetensors checkpoint there, or no such tensors in it.
        MismatchError: another shape, or another head than the guard was fitted on.
    """
    if isinstance(head, Sequence) and not isinstance(head, str):
        if len(head) != 2:
            raise InputError(f"head: expected (weight, bias) or a checkpoint folder, got {len(head)} values")
        weight, bias = _floating(head[0], "head weight"), _floating(head[1], "head bias")
    else:
        weight, bias = _from_checkpoint(Path(head), state.identity.fields.get("head_path", "score"))
    if weight is None:
        raise InputError("head: expected (weight, bias), got no weight")
    weight = weight.reshape(1, -1) if weight.ndim == 1 else weight
    width, column = state.detectors[FINAL].n_features_in_, reward_column(state.config.reward)
    labels = weight.shape[0]
    if weight.shape != (labels, width) or column >= labels or (bias is not None and bias.numel() != labels):
        raise MismatchError(
            f"head: expected weights of {width} columns with row {column} for the reward, got {tuple(weight.shape)}"
            f"{'' if bias is None else f' and {bias.numel()} biases'}"
        )
    # A head without bias may come with a bias of 0.
    forms = [_linear(weight, bias)] + ([_linear(weight, None)] if bias is not None and not bias.any() else [])
    if not any(same_head(state.identity.fields, form) for form in forms):
        raise MismatchError(
            "head: these are not the weights of the head that the guard was fitted on. Load the guard of this reward model."
        )
    dtypes = {weight.dtype, _DTYPES.get(state.identity.fields.get("dtype", ""), weight.dtype)}
    return RewardHead(
        weight=weight[column].double(),
        bias=0.0 if bias is None else float(bias.reshape(-1)[column]),
        eps=max(torch.finfo(dtype).eps for dtype in dtypes),
    )


def _floating(value: Any, name: str) -> Tensor | None:
    """A floating tensor on the CPU of an array, a tensor or a number; None stays None."""
    if value is None:
        return None
    tensor = (value.detach() if isinstance(value, Tensor) else as_tensor(value, name=name)).cpu()
    return tensor if tensor.is_floating_point() else tensor.to(torch.float32)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Module:
    module = nn.Module()
    module.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    if bias is not None:
        module.register_parameter("bias", nn.Parameter(bias.reshape(-1), requires_grad=False))
    return module


def _from_checkpoint(folder: Path, path: str) -> tuple[Tensor, Tensor | None]:
    files = _files(folder)
    name = f"{path}.weight"
    if name not in files:
        near = sorted(key for key in files if key.endswith(f"{path.rpartition('.')[2]}.weight"))[:6]
        raise InputError(f"head: the checkpoint {folder} has no tensor {name!r}; like it are {near}")
    bias = f"{path}.bias"
    return _tensor(files[name], name), _tensor(files[bias], bias) if bias in files else None


def _files(folder: Path) -> dict[str, Path]:
    """Tensor name -> file of a checkpoint, from its index or its one file."""
    index, single = folder / _INDEX, folder / _SINGLE
    if index.is_file():
        found = parse_json(index.read_bytes(), _INDEX, _MAX_INDEX)
        names = found.get("weight_map") if isinstance(found, dict) else None
        if not isinstance(names, dict) or any(not isinstance(f, str) or Path(f).name != f for f in names.values()):
            raise InputError(f"head: {index} has no weight_map of file names")
        return {name: folder / file for name, file in names.items()}
    if not single.is_file():
        raise InputError(
            f"head: {folder} holds neither {_SINGLE} nor {_INDEX}. Pass (weight, bias), or save as safetensors."
        )
    try:
        with safe_open(single, "pt") as tensors:
            return dict.fromkeys(tensors.keys(), single)
    except SafetensorError as error:
        raise InputError(f"head: {single} is not a whole safetensors file. Copy it again.") from error


def _tensor(file: Path, name: str) -> Tensor:
    try:
        with safe_open(file, "pt") as tensors:
            tensor: Tensor = tensors.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise InputError(f"head: {name} cannot be read from {file} ({type(error).__name__}). Copy it again.") from error
    if not tensor.is_floating_point() or torch.finfo(tensor.dtype).bits < 16:
        raise InputError(f"head: {name} is stored as {tensor.dtype}; a quantised head cannot be recomputed")
    return tensor
