"""Launching the distance kernel: block sizes, how many programs share the work, and the memory between them."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rm_ood.errors import InputError, MismatchError
from rm_ood.ops.packing import PANEL, WIDTH, Packed
from rm_ood.ops.streams import capturing, settle

# More classes go to PyTorch: their sums would not fit the registers.
MOST_CLASSES = 16
INPUTS = (torch.bfloat16, torch.float16, torch.float32)


class Blocks(NamedTuple):
    """Rows of x and of W that one product takes, and how the kernel is compiled for it."""

    rows: int
    columns: int
    warps: int
    stages: int


class Device(NamedTuple):
    """What the choice of blocks depends on: compute capability (major * 10 + minor) and multiprocessors."""

    capability: int
    processors: int
    interpreted: bool = False


class Choices(NamedTuple):
    """Blocks by the size of the batch: up to 16 rows, up to 64, and more, there by the parts that x is split into."""

    few: Blocks
    some: Blocks
    many: tuple[Blocks, Blocks, Blocks]


_FEW, _SOME = 16, 64
# By the least compute capability. Up to 64 rows the one read of W is all the time there is: small products with many copies
# under way. Beyond, tensor cores set the pace, and registers and shared memory set the blocks: each of these compiles without
# spills for up to 16 classes. 8.6 to 8.9 and 12.0 have 99 KiB of shared memory, 8.0 has 163, the others 227.
TABLE = {
    80: Choices(
        Blocks(16, 16, 4, 6),
        Blocks(64, 32, 4, 4),
        (Blocks(128, 64, 8, 3), Blocks(128, 32, 8, 3), Blocks(128, 32, 8, 3)),
    ),
    86: Choices(
        Blocks(16, 16, 4, 6),
        Blocks(64, 32, 4, 3),
        (Blocks(128, 64, 8, 2), Blocks(128, 32, 8, 2), Blocks(128, 32, 8, 2)),
    ),
    90: Choices(
        Blocks(16, 16, 4, 8),
        Blocks(64, 32, 4, 6),
        (Blocks(128, 128, 8, 3), Blocks(128, 128, 8, 3), Blocks(128, 64, 8, 3)),
    ),
    100: Choices(
        Blocks(16, 16, 4, 8),
        Blocks(64, 32, 4, 6),
        (Blocks(128, 128, 8, 3), Blocks(128, 128, 8, 3), Blocks(128, 64, 8, 3)),
    ),
    120: Choices(
        Blocks(16, 16, 4, 6),
        Blocks(64, 32, 4, 3),
        (Blocks(128, 64, 8, 2), Blocks(128, 32, 8, 2), Blocks(128, 32, 8, 2)),
    ),
}
# float32 products run outside the tensor cores, everywhere: in larger blocks they spill, or become TF32 on 10.0.
_FLOAT32 = Choices(Blocks(16, 32, 4, 3), Blocks(32, 32, 4, 3), (Blocks(32, 32, 4, 3),) * 3)
# From this capability on, blocks of W come by bulk copies (TMA).
BULK_COPY = 90
# What `tune` tries beside the table's own, by the dtype of the tiles. bfloat16 parts of float32 vectors are a trap in blocks of
# 128x128 on 10.0, which would end the process's use of the GPU; whole float32 in blocks of 64 rows becomes TF32 there.
_SMALL = (
    Blocks(16, 16, 4, 4), Blocks(16, 16, 4, 8), Blocks(16, 32, 4, 6), Blocks(64, 32, 4, 4), Blocks(64, 32, 4, 6),
    Blocks(64, 64, 4, 4), Blocks(128, 64, 8, 3),
)  # fmt: skip
CANDIDATES = {
    torch.float16: (*_SMALL, Blocks(128, 128, 8, 3), Blocks(128, 128, 8, 4)),
    torch.bfloat16: _SMALL,
    torch.float32: (Blocks(16, 16, 4, 4), Blocks(16, 32, 4, 4), Blocks(32, 32, 4, 3), Blocks(32, 64, 4, 4)),
}
# Relative difference of distances that the order of a sum can make; TF32 is ten times as far off.
_SAME = 1e-4
_tuned: dict[tuple[Any, ...], Blocks] = {}
# Triton's interpreter stands in for a GPU, on CPU tensors.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def unavailable(device: torch.device) -> str | None:
    """Why the kernel cannot run on a device; None where it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cuda":  # pragma: no cover - needs a GPU
        if torch.version.cuda is None:
            return "written for NVIDIA GPUs"
        return None if device_of(device).capability >= min(TABLE) else "compute capability below 8.0"
    return None if device.type == "cpu" and INTERPRETED else f"no kernel for {device.type}"


def unsupported(x: Tensor, n_classes: int) -> str | None:
    """Why the kernel cannot take x and so many classes; None where it can."""
    if x.dtype not in INPUTS:
        return f"vectors of {x.dtype}"
    return f"{n_classes} classes, more than {MOST_CLASSES}" if n_classes > MOST_CLASSES else None


@functools.cache
def device_of(device: torch.device) -> Device:
    """Read once a device: asking is a driver call."""
    if device.type != "cuda":
        return Device(90, 4, interpreted=True)
    properties = torch.cuda.get_device_properties(device)  # pragma: no cover - needs a GPU
    return Device(10 * properties.major + properties.minor, properties.multi_processor_count)  # pragma: no cover


def blocks_for(device: Device, tiles: torch.dtype, n: int, x_parts: int) -> Blocks:
    """Blocks of the table for n rows."""
    known = max((least for least in TABLE if least <= device.capability), default=min(TABLE))
    choices = _FLOAT32 if tiles == torch.float32 else TABLE[known]
    if n <= _SOME:
        return choices.few if n <= _FEW else choices.some
    return choices.many[x_parts - 1]


def split_for(device: Device, blocks: Blocks, n: int, d: int, g: int) -> int:
    """Programs that share the W of one row block: one wave of all, each with a short and a long tile row."""
    tile_rows, others = -(-d // blocks.columns), -(-n // blocks.rows) * g
    return max(1, min(-(-tile_rows // 2), device.processors // others))


def x_parts(tiles: torch.dtype, x: torch.dtype, *, changed: bool) -> int:
    """Parts of the tiles' dtype that hold a value of x, or of x `changed` by factor or centre, as float32 does."""
    if tiles == torch.float32:
        return 1
    if x == torch.float32 or changed:
        return 2 if tiles == torch.float16 else 3
    return 2 if (tiles, x) == (torch.bfloat16, torch.float16) else 1


def constants(
    blocks: Blocks,
    split: int,
    *,
    k: int,
    parts: int,
    x_parts: int,
    rows: bool,
    factors: bool,
    center: bool,
    bulk_copy: bool,
    widen: bool = False,
) -> dict[str, Any]:
    """Compile-time arguments of the kernel."""
    return {
        "PANEL": PANEL, "WIDTH": WIDTH, "K": k, "K_PAD": 1 << (k - 1).bit_length(), "BM": blocks.rows,
        "BJ": blocks.columns, "SPLIT": split, "PARTS": parts, "X_PARTS": x_parts, "HAS_ROWS": rows,
        "HAS_FACTORS": factors, "HAS_CENTER": center, "BULK_COPY": bulk_copy, "WIDEN": widen,
    }  # fmt: skip


def launch(
    x: Tensor,
    tiles: Tensor,
    scales: Tensor,
    shifts: Tensor,
    center: Tensor | None,
    rows: Tensor | None,
    factors: Tensor | None,
    x_scale: float,
    blocks: Blocks | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One launch; arguments, results and errors as `rm_ood.ops.distance.packed_sq_distance`."""
    # Triton is optional, and importing it takes a second.
    check(x, scales, shifts, rows, factors)
    kernel = importlib.import_module("rm_ood.ops.distance_kernel").distance_kernel
    descriptor = importlib.import_module("triton.tools.tensor_descriptor").TensorDescriptor
    if x.stride(-1) != 1:
        x = x.contiguous()
    # The kernel takes one step in memory from one to the next.
    rows = None if rows is None else rows.contiguous()
    factors = None if factors is None else factors.contiguous()
    n, d, (g, k) = len(x), x.shape[-1], shifts.shape[:2]
    sq = x.new_empty(g, n, k, dtype=torch.float32)
    lowest = x.new_empty(g, n, dtype=torch.float32)
    nearest = x.new_empty(g, n, dtype=torch.int64)
    if n == 0:
        return sq, lowest, nearest
    device = device_of(x.device)
    changed = factors is not None or center is not None
    parts = x_parts(tiles.dtype, x.dtype, changed=changed)
    if blocks is None:
        blocks = _tuned.get(_key(x, tiles, k, changed)) or blocks_for(device, tiles.dtype, n, parts)
    split = split_for(device, blocks, n, d, g)
    row_blocks = -(-n // blocks.rows)
    bulk_copy = device.capability >= BULK_COPY
    flat = tiles.view(-1, WIDTH)
    compiled = constants(
        blocks,
        split,
        k=k,
        parts=tiles.shape[1],
        x_parts=parts,
        rows=rows is not None,
        factors=factors is not None,
        center=center is not None,
        bulk_copy=bulk_copy,
        widen=device.interpreted and tiles.dtype == torch.bfloat16,
    )
    partials = x.new_empty(g * split * n * compiled["K_PAD"] if split > 1 else 1, dtype=torch.float32)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        kernel[(row_blocks, split, g)](
            x,
            x if rows is None else rows,
            x if factors is None else factors,
            x if center is None else center,
            descriptor.from_tensor(flat, [blocks.columns, WIDTH]) if bulk_copy else flat,
            scales,
            shifts,
            sq,
            lowest,
            nearest,
            partials,
            tickets(x.device) if split > 1 else partials,
            n,
            d,
            x.shape[1] if rows is not None else 1,
            x.stride(0),
            x.stride(1) if rows is not None else 0,
            tiles.shape[2],
            x_scale,
            **compiled,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
            enable_fp_fusion=True,
        )
    return sq, lowest, nearest


def check(x: Tensor, scales: Tensor, shifts: Tensor, rows: Tensor | None, factors: Tensor | None) -> None:
    """The kernel trusts what it is given: sizes that do not fit would read other memory."""
    if reason := unsupported(x, shifts.shape[1]):
        raise InputError(f"packed_sq_distance takes no {reason}; use whitened_sq_distance")
    if x.ndim != (2 if rows is None else 3):
        raise InputError(f"x: expected (n, d), or (n, T, d) with rows, got shape {tuple(x.shape)}")
    if x.shape[-1] != scales.shape[1]:
        raise MismatchError(f"x: expected {scales.shape[1]} features, got {x.shape[-1]}")
    for name, given, dtype in (("rows", rows, torch.int64), ("factors", factors, torch.float32)):
        if given is not None and (given.shape != x.shape[:1] or given.dtype != dtype or given.device != x.device):
            raise MismatchError(
                f"{name}: expected {dtype} of shape ({len(x)},) on {x.device}, got {given.dtype} {tuple(given.shape)} on "
                f"{given.device}"
            )


def tune(
    x: Tensor,
    packed: Packed,
    rows: Tensor | None = None,
    factors: Tensor | None = None,
    *,
    measure: Callable[[Callable[[], object]], float] | None = None,
) -> Blocks:
    """Time the blocks there are on a batch like those to come; later batches like it run with the fastest.

    Blocks whose distances are not those of the table's blocks are left out.

    Args:
        x, rows, factors: as in `packed_sq_distance`, with vectors that can be scored.
        measure: seconds of a call; by default `triton.testing.do_bench`.
    """
    errors = importlib.import_module("triton.runtime.errors")
    measure = measure or importlib.import_module("triton.testing").do_bench
    arguments = (x, packed.tiles, packed.scales, packed.shifts, packed.center, rows, factors, packed.x_scale)
    changed = factors is not None or packed.center is not None
    parts = x_parts(packed.tiles.dtype, x.dtype, changed=changed)
    own = blocks_for(device_of(x.device), packed.tiles.dtype, len(x), parts)
    expected = launch(*arguments, own)[0]
    times = {own: measure(functools.partial(launch, *arguments, own))}
    for blocks in CANDIDATES[packed.tiles.dtype]:
        if blocks == own:
            continue
        try:
            got = launch(*arguments, blocks)[0]
            if torch.allclose(got, expected, rtol=_SAME, atol=_SAME):
                times[blocks] = measure(functools.partial(launch, *arguments, blocks))
        except errors.OutOfResources:
            continue
    best = min(times, key=times.__getitem__)
    _tuned[_key(x, packed.tiles, packed.shifts.shape[1], changed)] = best
    return best


def _key(x: Tensor, tiles: Tensor, k: int, changed: bool) -> tuple[Any, ...]:
    # Batches within a power of two share their blocks.
    size = (len(x) - 1).bit_length()
    return (x.device, size, x.shape[-1], x.dtype, tiles.dtype, tiles.shape[:2], k, changed)


class Tickets:
    """Counters in a device's memory that are zero between launches; no two launches in flight share any.

    Launches on one stream follow each other, so a stream has its own counters. A graph may be replayed beside anything, so
    every launch captured into one gets counters for good; where they run out, the graph zeroes its own.
    """

    # Programs that share work are at most one wave: fewer row blocks than multiprocessors.
    EACH, ALL = 512, 256

    def __init__(self, device: torch.device) -> None:
        self._free = torch.zeros(self.ALL, self.EACH, dtype=torch.int32, device=device)
        self._given = 0
        self._by_stream: dict[int, Tensor] = {}
        self._lock = threading.Lock()

    def take(self, stream: int | None) -> Tensor:
        """Counters for a launch on a stream; on none, for a launch of a graph."""
        with self._lock:
            if stream is not None and stream in self._by_stream:
                return self._by_stream[stream]
            if self._given == self.ALL:
                return torch.zeros_like(self._free[0])
            taken = self._free[self._given]
            self._given += 1
            if stream is not None:
                self._by_stream[stream] = taken
            return taken


_tickets: dict[torch.device, Tickets] = {}
_creation = threading.Lock()


def tickets(device: torch.device) -> Tensor:
    """Zeroed counters for the next launch on the current stream."""
    stream: int | None = 0
    if device.type == "cuda":  # pragma: no cover - needs a GPU
        captured = capturing(device)
        stream = None if captured else torch.cuda.current_stream(device).cuda_stream
        if captured and device not in _tickets:
            # Memory that is made during a capture belongs to the graph, which zeroes it in every replay.
            return torch.zeros(Tickets.EACH, dtype=torch.int32, device=device)
    with _creation:
        if device not in _tickets:
            made = Tickets(device)
            # Zeroed on this stream alone, and then taken on all of them.
            settle(device)
            _tickets[device] = made
    return _tickets[device].take(stream)
