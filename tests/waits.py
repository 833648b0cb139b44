"""What makes the host wait for a device, found without one."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class NoHostSync(TorchDispatchMode):
    """Refuses values that are read on the host, and shapes that depend on values."""

    INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_")
    REFUSED = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "is_nonzero")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition("::")[2].partition(".")[0]
        assert name not in self.REFUSED, f"{name} waits for the device"
        if name in self.INDEXED:
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            # One value for all is filled in where the mask is; anything else needs to know how many there are.
            filled = name != "index" and args[2].numel() == 1
            assert not masks or filled, f"{name} with a mask waits for the device"
        return func(*args, **(kwargs or {}))
