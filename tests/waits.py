"""What makes the host wait for a device, found without one."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class NoHostSync(TorchDispatchMode):
    """Refuses values that are read on the host, and shapes that depend on values."""

    REFUSED = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "is_nonzero")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition("::")[2].partition(".")[0]
        assert name not in self.REFUSED, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))
