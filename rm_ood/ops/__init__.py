"""Operators of the statistics column: tensors in, tensors out, no model.

`class_scatter` and `whitened_sq_distance`, each with a float64-able reference (`reference.py`) and a blocked CPU path, and
`packed_sq_distance`, the latter as one Triton launch; all registered with `torch.library` as `rm_ood::NAME`. The algebra is
in ops/README.md.
"""

from __future__ import annotations

import importlib.metadata

import torch

from rm_ood.ops.distance import packed_sq_distance, whitened_sq_distance
from rm_ood.ops.distance_launch import INTERPRETED, unavailable
from rm_ood.ops.metric import fallbacks
from rm_ood.ops.packing import Packed, pack
from rm_ood.ops.scatter import class_scatter

__all__ = ["Packed", "backend_info", "class_scatter", "pack", "packed_sq_distance", "whitened_sq_distance"]


def backend_info() -> dict[str, str]:
    """What runs the operators: versions, and per device type `triton`, or `pytorch` and why no kernel.

    `fallbacks`, where there were any, says why vectors went to PyTorch in this process on a device that has a kernel, or to
    another mode than a saved guard's.
    """
    info = {"torch": torch.__version__, "cpu": "triton interpreter" if INTERPRETED else "pytorch"}
    try:
        info["triton"] = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        info["triton"] = "not installed"
    if torch.cuda.is_available():  # pragma: no cover - needs a GPU
        reason = unavailable(torch.device("cuda", torch.cuda.current_device()))
        info["cuda"] = "triton" if reason is None else f"pytorch: {reason}"
    if fallbacks:
        info["fallbacks"] = "; ".join(sorted(fallbacks))
    return info
