"""Run by tests/test_gang.py, once per process: what two gloo processes do together, one scenario after the other.

`python gang_processes.py RANK FOLDER`; what a scenario ends with is in FOLDER/NAME-RANK.json, its guard in FOLDER/NAME.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent
SETTINGS = {"alpha": 0.05, "max_length": 128, "batch_size": 8}


def main(rank: int, folder: Path) -> None:
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group(
        "gloo", store=dist.PrefixStore("group", store), rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    from conftest import preference_rows
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from rm_ood import CalibrationWarning, OODGuard
    from rm_ood.errors import OODGuardError
    from rm_ood.gang import Gang
    from rm_ood.preferences import prompt_key
    from rm_ood.rows import data_digest

    warnings.simplefilter("ignore", CalibrationWarning)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model", dtype=torch.float64)
    rows = preference_rows(160)

    def guard(**changes: Any) -> OODGuard:
        return OODGuard(copy.deepcopy(model), tokenizer, **{**SETTINGS, **changes})

    def run(name: str, scenario: Callable[[Gang], Any], **options: Any) -> None:
        started = time.monotonic()
        try:
            with Gang(store=dist.PrefixStore(name, store), **options) as gang:
                result = scenario(gang)
        except OODGuardError as error:
            result = f"{type(error).__name__}: {error}"
        if isinstance(result, OODGuard):
            if rank == 0:
                result.save_pretrained(folder / name)
            # The other process has the same guard, to the bit of what it says.
            result = result.check(["a question"], ["an answer"]).to_dict()
        said = {"result": result, "seconds": time.monotonic() - started}
        (folder / f"{name}-{rank}.json").write_text(json.dumps(said))
        dist.barrier()

    run("whole", lambda gang: guard().fit(rows, calibration=0.75, progress=False, workers=gang))
    mine = [row for row in rows if prompt_key(row["prompt"]) % 2 == 0]
    run("empty", lambda gang: guard(alpha=0.2).fit(mine, calibration=0.9, progress=False, workers=gang))
    other = preference_rows(110, seed=7)
    run("other-data", lambda gang: guard().fit(rows, calibration=other, progress=False, workers=gang))
    run("settings", lambda gang: guard(seed=rank).fit(rows, progress=False, workers=gang))
    run("data", lambda gang: guard().fit(rows[rank:], progress=False, workers=gang))
    read: list[int] = []

    class Stream:
        """Rows that can be read again, of which nobody knows how many there are."""

        def __iter__(self) -> Iterator[Any]:
            read.append(0)
            for row in rows:
                read[-1] += 1
                yield row

    def once(gang: Gang) -> list[int]:
        guard().fit(Stream(), calibration=0.75, progress=False, workers=gang)
        return read

    run("once", once)

    def slow_rows() -> Iterator[Any]:
        # The second one's disk is slow: longer in all than the others wait, never so between two rows.
        for row in rows[:6]:
            time.sleep(rank)
            yield row

    def digest(gang: Gang) -> str:
        class Slow:
            def __iter__(self) -> Iterator[Any]:
                return slow_rows()

        gang.agree({"data": data_digest(Slow(), gang.beat)})
        return "agreed"

    run("slow-data", digest, timeout=3)
    changed = guard()
    with torch.no_grad():
        changed.model.score.weight[0, rank] += rank
    run("model", lambda gang: changed.fit(rows, progress=False, workers=gang))
    swapped = [rows[0], *(rows[1:3][::-1] if rank else rows[1:3]), *rows[3:]]
    # What can be read only once has no digest before it is read.
    run("order", lambda gang: guard().fit(iter(swapped), progress=False, workers=gang))
    run("few", lambda gang: guard(alpha=0.001).fit(rows, progress=False, workers=gang))

    def slowly() -> str:
        time.sleep(6)
        return "made"

    def slow(gang: Gang) -> str:
        return gang.from_first(slowly, lambda made: ({}, {"made": made}), lambda tensors, config: str(config["made"]))

    run("slow", slow, timeout=2)

    def failing() -> Iterator[Any]:
        yield from rows[:100]
        if rank == 1:
            raise OSError("the disk is gone")
        # The others are in the middle of it.
        for row in rows[100:]:
            time.sleep(0.2)
            yield row

    try:
        run("failing", lambda gang: guard(batch_size=1).fit(failing(), progress=False, workers=gang))
    except OSError:
        (folder / "failing-1.json").write_text(json.dumps({"result": "OSError", "seconds": 0}))
        dist.barrier()

    def killed() -> Iterator[Any]:
        yield from rows[:100]
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        yield from rows[100:]

    def lost(gang: Gang) -> Any:
        return guard().fit(killed(), progress=False, workers=gang)

    dist.barrier = lambda: None
    run("killed", lost, timeout=3)


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT.parent), str(ROOT.parent / "benchmarks")]
    main(int(sys.argv[1]), Path(sys.argv[2]))
    # The group cannot be ended in good order without the process that was killed.
    os._exit(0)
