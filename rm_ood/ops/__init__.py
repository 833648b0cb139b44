"""Operators of the statistics column: tensors in, tensors out, no model.

Two operators, each with a float64-able reference (`reference.py`) and a blocked CPU path, registered with
`torch.library` as `rm_ood::class_scatter` and `rm_ood::whitened_sq_distance`. The algebra is in ops/README.md.
"""

from __future__ import annotations

import torch

from rm_ood.ops.distance import whitened_sq_distance
from rm_ood.ops.scatter import class_scatter

__all__ = ["backend_info", "class_scatter", "whitened_sq_distance"]


def backend_info() -> dict[str, str]:
    """What runs the operators: the PyTorch version and, per device type, the implementation."""
    info = {"torch": torch.__version__, "cpu": "pytorch"}
    if torch.cuda.is_available():  # pragma: no cover - needs a GPU
        info["cuda"] = "pytorch"
    return info
