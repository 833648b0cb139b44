"""Memory that is written once, on the stream of whoever came first, and then read on all of them."""

from __future__ import annotations

import torch


def settle(device: torch.device) -> None:
    """Wait until what was launched on the current stream is in memory: other streams do not wait for this one."""
    if device.type == "cuda":  # pragma: no cover - needs a GPU
        torch.cuda.current_stream(device).synchronize()


def capturing(device: torch.device) -> bool:
    """Whether the current stream is being captured into a graph, where nobody may wait."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
