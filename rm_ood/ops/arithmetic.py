"""What a process or a region says of the precision of products, put aside: a distance has to be the same in all of them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

# Entering a context costs as much as the arithmetic of a short row.
AS_IS: AbstractContextManager[object] = nullcontext()


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Inside a training loop's autocast the product would run in bfloat16, an error of several per cent."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else AS_IS


def exact_dtype(device_type: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a product has the precision of `dtype`: float64 for float32 where PyTorch may round that to fewer bits.

    `torch.set_float32_matmul_precision` and its kin are of the process: put back by one thread, they would change for another.
    """
    if dtype != torch.float32:
        return dtype
    backend = torch.backends.cuda if device_type == "cuda" else torch.backends.mkldnn
    return dtype if backend.matmul.fp32_precision in ("none", "ieee") else torch.float64
