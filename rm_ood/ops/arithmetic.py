"""What a process or a region says of the precision of products, put aside: a distance has to be the same in all of them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

# Entering a context costs as much as the arithmetic of a short row.
AS_IS: AbstractContextManager[object] = nullcontext()
# Held here, and asked by `__getattr__`: each attribute on the way costs as much as a small sum, and the settings, looked for
# as other attributes are, raise an error inside first.
_CPU: Any = torch.backends.mkldnn.matmul.__getattr__  # type: ignore[attr-defined]
_CUDA: Any = torch.backends.cuda.matmul.__getattr__


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Inside a training loop's autocast the product would run in bfloat16, an error of several per cent."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else AS_IS


def exact_dtype(device_type: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a product has the precision of `dtype`: float64 for float32 where PyTorch may round that to fewer bits.

    `torch.set_float32_matmul_precision` and its kin are of the process: put back by one thread, they would change for another.
    """
    if dtype != torch.float32:
        return dtype
    products = _CUDA if device_type == "cuda" else _CPU
    return dtype if products("fp32_precision") in ("none", "ieee") else torch.float64
