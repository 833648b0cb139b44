"""A saved guard and reward model, and a server process over them."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from harness import ROOT
from train_reward_model import BASES

from rm_ood import CalibrationWarning, OODGuard

BATCH = 16
WORDS = "answer river music paper garden window seven orange quiet small winter bridge letter market".split()  # noqa: SIM905


def pairs(n: int, seed: int = 0) -> list[tuple[str, str]]:
    rng = random.Random(seed)

    def words(low: int, high: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))

    return [(f"question {seed} {i} {words(4, 12)}", words(8, 48)) for i in range(n)]


def saved(name: str, folder: Path) -> OODGuard:
    """A guard with its model, and both saved."""
    model, tokenizer = BASES[name](seed=0)
    guard = OODGuard(model.eval(), tokenizer, alpha=0.2, batch_size=BATCH)
    rows = [{"prompt": p, "chosen": r, "rejected": f"{r} no"} for p, r in pairs(110, seed=1)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        guard.fit(rows, calibration=0.7, progress=False)
    guard.save_pretrained(folder / "guard")
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return guard


@contextmanager
def serving(command: Sequence[str], folder: Path) -> Iterator[tuple[int, int]]:
    """A server process: its port and its process id."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    process = subprocess.Popen(
        [sys.executable, *command], cwd=folder, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if line.startswith("{") and json.loads(line)["event"] == "listening":
                port = int(json.loads(line)["url"].rpartition(":")[2])
                break
        else:
            raise RuntimeError(f"no server from {command}")
        # Its log must not fill the pipe.
        with subprocess.Popen(["cat"], stdin=process.stderr, stdout=subprocess.DEVNULL):
            try:
                yield port, process.pid
            finally:
                process.terminate()
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
