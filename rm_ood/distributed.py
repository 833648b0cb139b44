"""Fit on several processes or machines: `torchrun -m rm_ood.distributed fit ...`, with the options of `rm-ood fit`.

Every process reads all rows and runs the reward model over its own shard of the prompts. From Python, under torchrun:

```python
from rm_ood.gang import joined

with joined() as workers:
    guard.fit(dataset, workers=workers)  # every process ends with the same guard
```
"""

from __future__ import annotations

import argparse
import numbers
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from rm_ood import commands
from rm_ood.cli import add_command, amount, carry_out, fit_arguments, whole_number
from rm_ood.collected import Shard
from rm_ood.errors import InputError
from rm_ood.fit import Fitter
from rm_ood.gang import TIMEOUT_S, joined
from rm_ood.guard import OODGuard
from rm_ood.workers import ShardFolder, Workers


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in one of the processes; returns the exit code."""
    arguments = _parser().parse_args(argv)
    rank = os.environ.get("RANK")
    return carry_out("rm_ood.distributed fit" + ("" if rank is None else f" (rank {rank})"), arguments)


def save_shards(
    guard: OODGuard,
    dataset: Any,
    folder: ShardFolder,
    count: int,
    only: Iterable[int],
    *,
    calibration: Any = 0.3,
    progress: bool = True,
) -> list[str]:
    """Do some shards of a fit and keep them; `guard.fit` on `Workers(shards=count, folder=...)` takes all of them.

    Args:
        guard, dataset, calibration, progress: as for `OODGuard.fit`.
        folder: where they are kept. count: number of shards in all. only: those to do now.
    Returns:
        `fit 3 of 8` and the like, for those that were done now.
    """
    column, wanted = guard.column, sorted(set(only))
    if not all(0 <= i < count for i in wanted):
        raise InputError(f"only={wanted}: the shards are 0 to {count - 1}")
    is_share = isinstance(calibration, numbers.Real)
    workers = Workers(shards=count, folder=folder)
    fitter = Fitter(column, guard.config, float(calibration) if is_share else 0.0, workers)
    done: list[str] = []
    for data, labelled in ((dataset, True), *(() if is_share else ((calibration, False),))):
        task = fitter.task(data, labelled=labelled)
        finished = folder.finished(fitter.stage, count, wanted)
        text_format = None
        for shard in (Shard(i, count) for i in wanted):
            if shard.index in finished:
                part = folder.load(fitter.stage, shard, task, fitter.empty())
            else:
                part = fitter.read(data, shard, labelled=labelled, progress=progress)
                folder.save(fitter.stage, shard, task, part)
                done.append(f"{fitter.stage} {shard.index} of {count}")
            text_format = part.text_format
        settled = replace(guard.config, text_format=text_format or guard.config.text_format)
        fitter = Fitter(column, settled, 1.0, workers)
    return done


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="torchrun -m rm_ood.distributed", description="What rm-ood does, on several processes or machines."
    )
    parsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    fit = add_command(
        parsers, "fit", _fit, "fit and calibrate a guard, each process on a shard of the prompts",
        """
        torchrun --nproc-per-node 8 -m rm_ood.distributed fit --model my-reward-model --data pairs.jsonl --output guard
        torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29400 \\
            -m rm_ood.distributed fit --model my-reward-model --data pairs.jsonl --output guard --shard-dir shards --resume
        python -m rm_ood.distributed fit --only 3 --shards 8 --shard-dir shards --model ... --data ... --output guard
        """,
    )  # fmt: skip
    fit_arguments(fit)
    group = fit.add_argument_group("processes")
    group.add_argument("--shards", type=whole_number, metavar="N", help="parts of the data (default: one a process)")
    group.add_argument(
        "--shard-dir", metavar="DIR", help="keep each finished shard here, in a folder that all processes see"
    )
    group.add_argument("--resume", action="store_true", help="take the shards that --shard-dir holds already")
    group.add_argument(
        "--only", type=_numbers, metavar="I,J", help="do these of --shards, without the others and without a guard"
    )
    group.add_argument(
        "--timeout",
        type=amount,
        default=TIMEOUT_S,
        metavar="S",
        help="seconds of silence after which a process counts as lost (default: %(default)g)",
    )
    return parser


def _fit(a: argparse.Namespace) -> dict[str, Any] | None:
    if a.shard_dir is None and (a.resume or a.only is not None):
        raise InputError("--resume and --only need --shard-dir: where the finished shards are")
    folder = None if a.shard_dir is None else ShardFolder(a.shard_dir, resume=a.resume)
    if a.only is not None:
        return _only(a, folder)
    if "RANK" not in os.environ:
        return commands.fit(a, Workers(shards=a.shards, folder=folder))
    if a.device is None and torch.cuda.is_available():
        a.device = f"cuda:{_local_gpu()}"
    if a.device is not None and a.device.startswith("cuda"):
        torch.cuda.set_device(a.device)
    with joined(device=a.device, timeout=a.timeout, shards=a.shards, folder=folder) as gang:
        a.progress = a.progress and gang.is_first
        return commands.fit(a, gang)


def _only(a: argparse.Namespace, folder: ShardFolder | None) -> dict[str, Any]:
    if folder is None or a.shards is None:
        raise InputError("--only needs --shards: how many there are in all")
    if getattr(a, "channels", None) == "auto":
        raise InputError("--only and --channels auto: the choice needs a guard; name the channels")
    guard, dataset, calibration = commands.to_fit(a)
    done = save_shards(guard, dataset, folder, a.shards, a.only, calibration=calibration, progress=a.progress)
    return {"json": {"shards": done}, "text": f"Done: {', '.join(done) or 'nothing was left to do'}; in {folder.path}"}


def _local_gpu() -> int:
    local, n = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= n:
        raise InputError(
            f"process {local} of this machine has no GPU of its own: {n} are here. Pass --nproc-per-node {n}"
        )
    return local


def _numbers(text: str) -> list[int]:
    return [whole_number(part, low=0) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
