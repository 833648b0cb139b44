"""What a process or a region says of the precision of products, put aside: a distance has to be the same in all of them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

# Entering a context costs as much as the arithmetic of a short row.
_AS_IS: AbstractContextManager[object] = nullcontext()


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Inside a training loop's autocast the product would run in bfloat16, an error of several per cent."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else _AS_IS
