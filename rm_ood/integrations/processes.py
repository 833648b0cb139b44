"""The processes of one training run: how many, and what each of them says."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist

from rm_ood.errors import InputError


def processes() -> int:
    """How many there are; 1 outside `torch.distributed`."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather(value: Any) -> list[Any]:
    """One value of each process, on all of them, in the order of their ranks; every process has to call.

    Values travel as JSON, so that nothing that another process says is run. Tuples arrive as lists.

    Raises:
        InputError: a value that JSON has no form for; raised after the exchange, on every process.
    """
    n = processes()
    if n == 1:
        return [value]
    try:
        data = json.dumps(value).encode()
    except (TypeError, ValueError):
        # The others wait in the exchange: they are told with nothing.
        data = b""
    device = _device()
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(n)]
    dist.all_gather(sizes, torch.tensor([len(data)], dtype=torch.int64, device=device))
    counts = [int(size) for size in sizes]
    if not all(counts):
        raise InputError(f"process {counts.index(0)} has a value that JSON has no form for")
    own = torch.zeros(max(counts), dtype=torch.uint8, device=device)
    own[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
    parts = [torch.empty_like(own) for _ in range(n)]
    dist.all_gather(parts, own)
    return [json.loads(bytes(part[:count].cpu().numpy())) for part, count in zip(parts, counts, strict=True)]


def _device() -> torch.device:
    """Where the processes' backend takes tensors: the CPU if it does there."""
    kinds = [part.split(":")[0] for part in str(dist.get_backend_config()).split(",")]
    if "cpu" in kinds:
        return torch.device("cpu")
    return torch.device(kinds[0], torch.get_device_module(kinds[0]).current_device())
