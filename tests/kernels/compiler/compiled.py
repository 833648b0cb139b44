"""Kernels compiled ahead of time, without a GPU: registers, spills, shared memory and instructions from the machine code.

`python tests/kernels/compiler/compiled.py` prints the table of `rm_ood/ops/README.md`.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rm_ood.ops import distance_launch, scatter_launch
from rm_ood.ops.distance_kernel import distance_kernel
from rm_ood.ops.distance_launch import Blocks, Device
from rm_ood.ops.packing import MODES
from rm_ood.ops.scatter_kernel import scatter_kernel

# KiB of shared memory that one program may have.
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
_TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
_FAMILIES = {"HMMA": r"\bHMMA", "HGMMA": r"\bHGMMA", "UTCMMA": r"\bUTC\w*MMA"}


class Machine(NamedTuple):
    """What one kernel became."""

    registers: int
    stack: int
    spills: int
    shared: float
    mma: dict[str, int]
    bulk_copies: int
    ptx: str
    sass: str


class Case(NamedTuple):
    """One compiled configuration of the distance kernel."""

    cc: int
    batch: str
    mode: str
    x: torch.dtype
    k: int
    # Tokens of hidden states; a centre for vectors that are not float32; a width that is no multiple of 16; other blocks.
    rows: bool = False
    center: bool = False
    odd: bool = False
    forced: Blocks | None = None

    @property
    def changed(self) -> bool:
        return self.x == torch.float32 or self.center

    @property
    def blocks(self) -> Blocks:
        if self.forced is not None:
            return self.forced
        tiles = MODES[self.mode].dtype
        parts = distance_launch.x_parts(tiles, self.x, changed=self.changed)
        n = {"<= 16": 16, "<= 64": 64, "> 64": 4096}[self.batch]
        return distance_launch.blocks_for(Device(self.cc, 132), tiles, n, parts)


def cases() -> list[Case]:
    """What ships: every size of batch in the default mode, the other modes and vectors where registers are scarcest."""
    bf16, fp32 = torch.bfloat16, torch.float32
    found = []
    for cc in (80, 90, 100):
        found += [Case(cc, batch, "fp16x2", bf16, 2) for batch in ("<= 16", "<= 64", "> 64")]
        found += [Case(cc, "> 64", "fp16x2", bf16, 16), Case(cc, "> 64", "fp16x2", fp32, 2)]
        found += [
            Case(cc, "> 64", "fp16", bf16, 2),
            Case(cc, "> 64", "bf16x3", fp32, 2),
            Case(cc, "> 64", "fp32", bf16, 2),
        ]
    return found + [Case(cc, "> 64", "fp16x2", x, 2) for cc in (86, 120) for x in (bf16, fp32)]


def variants() -> list[Case]:
    """What ships beside the cases of the table: one class, tokens by index, odd widths, a centre for bfloat16 vectors."""
    bf16 = torch.bfloat16
    found = []
    for cc in (80, 90, 100):
        found += [Case(cc, "<= 16", "fp16x2", bf16, 1, odd=True), Case(cc, "<= 64", "fp16x2", bf16, 2, rows=True)]
        found += [Case(cc, "> 64", "fp16x2", bf16, 2, center=True), Case(cc, "> 64", "bf16x3", bf16, 1, rows=True)]
    return found


def candidates() -> list[Case]:
    """What `tune` may try where the compiler is known to change what it is asked for."""
    fp16, bf16, fp32 = torch.float16, torch.bfloat16, torch.float32
    wanted = [("fp32", fp32, bf16), ("bf16x3", bf16, fp32), ("fp16x2", fp16, fp32)]
    return [
        Case(100, "> 64", mode, x, 2, forced=blocks)
        for mode, tiles, x in wanted
        for blocks in distance_launch.CANDIDATES[tiles]
    ]


@functools.cache
def distance(case: Case, split: int = 4) -> Machine:
    """The distance kernel as it is launched for a case; float32 vectors with factors and a centre."""
    mode, blocks = MODES[case.mode], case.blocks
    bulk_copy = case.cc >= distance_launch.BULK_COPY
    constants = distance_launch.constants(
        blocks,
        split,
        k=case.k,
        parts=mode.parts,
        x_parts=distance_launch.x_parts(mode.dtype, case.x, changed=case.changed),
        rows=case.rows,
        factors=case.x == torch.float32,
        center=case.changed,
        bulk_copy=bulk_copy,
    )
    x, tile = _NAMES[case.x], _NAMES[mode.dtype]
    kinds = dict.fromkeys(("factors", "center", "scales", "shifts", "sq", "lowest", "partials"), "*fp32")
    kinds |= {
        "x": f"*{x}",
        "rows": "*i64" if case.rows else f"*{x}",
        "nearest": "*i64",
        "tickets": "*i32",
        "x_scale": "fp32",
    }
    kinds |= dict.fromkeys(("n", "d", "n_tokens", "item_stride", "token_stride", "plane"), "i32")
    kinds["tiles"] = f"tensordesc<{tile}[{blocks.columns}, 64]>" if bulk_copy else f"*{tile}"
    aligned = [name for name, kind in kinds.items() if kind.startswith("*")] + ["plane"]
    aligned += [] if case.odd else ["d", "item_stride", *(["token_stride"] if case.rows else [])]
    return compiled(distance_kernel, kinds, constants, aligned, case.cc, blocks.warps, blocks.stages)


@functools.cache
def scatter(cc: int, split_x: bool) -> Machine:
    """The scatter kernel of bfloat16 vectors and two classes."""
    columns, rows, warps, stages = scatter_launch.TILES[split_x]
    constants = {
        "K": 2,
        "K_PAD": 16,
        "BT": columns,
        "BN": rows,
        "LONG": scatter_launch.STRETCH // rows,
        "SPLIT_X": split_x,
    }
    kinds = {"x": "*bf16", "labels": "*i64", "pivot": "*fp32", "scales": "*fp32", "scatter": "*fp64", "sums": "*fp64"}
    aligned = [*kinds, "d", "row_stride"]
    kinds |= dict.fromkeys(("n", "d", "row_stride"), "i32")
    return compiled(scatter_kernel, kinds, constants, aligned, cc, warps, stages)


def compiled(
    kernel: Any, kinds: dict[str, str], constants: dict[str, Any], aligned: list[str], cc: int, warps: int, stages: int
) -> Machine:
    """Compile a kernel for a compute capability and take the machine code apart."""
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: kinds.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        # As a launch would find them: this decides the width of the copies.
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    made = triton.compile(source, target=GPUTarget("cuda", cc, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(made.asm["cubin"])
        usage, sass = (
            subprocess.run([_TOOL, option, cubin], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    found = dict(re.findall(r"(REG|STACK):(\d+)", usage))
    return Machine(
        registers=int(found["REG"]),
        stack=int(found["STACK"]),
        spills=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        shared=made.metadata.shared / 1024,
        mma={name: count for name, pattern in _FAMILIES.items() if (count := len(re.findall(pattern, sass)))},
        bulk_copies=len(re.findall(r"\bUTMALDG", sass)),
        ptx=made.asm["ptx"],
        sass=sass,
    )


HEADER = (
    "| kernel | sm | rows of x | mode | x | k | block | registers | spills | shared KiB | tensor-core | bulk copies |"
)


def rows() -> list[list[str]]:
    """The lines of the table, as cells."""
    found = []
    for case in cases():
        b = case.blocks
        shape = f"{b.rows}x{b.columns}, {b.warps} warps, {b.stages} stages"
        head = ["distance", str(case.cc), case.batch, case.mode, _NAMES[case.x], str(case.k), shape]
        found.append(head + _numbers(distance(case)))
    for cc in (80, 90, 100):
        for split_x, mode in ((True, "fp16x4"), (False, "fp32")):
            columns, _, warps, stages = scatter_launch.TILES[split_x]
            shape = f"{columns}x{columns}, {warps} warps, {stages} stages"
            found.append(["scatter", str(cc), "any", mode, "bf16", "2", shape, *_numbers(scatter(cc, split_x))])
    return found


def _numbers(made: Machine) -> list[str]:
    mma = ", ".join(f"{count} {name}" for name, count in made.mma.items()) or "none"
    return [str(made.registers), str(made.spills), f"{made.shared:.0f}", mma, str(made.bulk_copies)]


def table() -> str:
    """The table of the README."""
    lines = [HEADER, "|---" * HEADER.count(" | ") + "|---|", *("| " + " | ".join(cells) + " |" for cells in rows())]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
