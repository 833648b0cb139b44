"""The server beside a loop over the guard itself, and what is its own (`serve_limits`): latency, overload, bad clients, memory.

Server and load run on one machine, the model on one thread. `throughput` is items a second of wall-clock time: the guard
called in a loop with full batches, the server asked with full batches (`batched`) or single items (`single`), in turn, round
after round; `ratio` is the server's share of the loop of its round, the median over the rounds. `latency` at 70 % is of
evenly spaced requests of a full batch, at 70 % of the batched throughput of the same run; `ratio` is unloaded median over it.
What is named stub has a model that takes 20 ms for a batch of four and gives no scores.
"""

from __future__ import annotations

import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import load
import serve_limits
import torch
from harness import Row
from serve_limits import all_answered, latency, measured
from server_process import BATCH, pairs, saved, serving
from train_reward_model import BASES

from rm_ood import OODGuard

TESTS = ("tests/serve/test_serving.py", "tests/serve/test_overload.py", "tests/serve/test_bounds.py")
ROUNDS, ROUND_S = 5, 2.0
LOAD, LOAD_S = 0.7, 15.0


def measure() -> Iterator[Row]:
    """Rows of `benchmarks/run.py serve`."""
    torch.set_num_threads(1)
    for name in BASES:
        yield from _beside_the_loop(name)
        print(f"{name} beside the loop: done", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        saved("minilm", Path(folder)).detach()
        for part in (
            serve_limits.load_and_overload,
            serve_limits.rush,
            serve_limits.flood,
            serve_limits.bad_clients,
            serve_limits.endurance,
        ):
            yield from part(Path(folder))
            print(f"{part.__name__}: done", file=sys.stderr)


def _beside_the_loop(name: str) -> Iterator[Row]:
    asked = pairs(20 * BATCH)
    groups = [asked[i : i + BATCH] for i in range(0, len(asked), BATCH)]
    batched = itertools.cycle([load.body(group) for group in groups])
    single = itertools.cycle([load.body([pair]) for pair in asked])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        guard = saved(name, folder)
        command = [
            "-m",
            "rm_ood.cli",
            "serve",
            "--guard",
            "guard",
            "--model",
            "model",
            "--port",
            "0",
            "--mode",
            "shadow",
        ]
        with serving(command, folder) as (port, _):
            rates: dict[str, list[float]] = {"loop": [], "batched": [], "single": []}
            for _ in range(ROUNDS):
                rates["loop"].append(_loop(guard, groups))
                for form, bodies, clients, items in (("batched", batched, 3, BATCH), ("single", single, 3 * BATCH, 1)):
                    shots, took = load.closed(port, bodies, ROUND_S, clients)
                    all_answered(shots)
                    rates[form].append(items * len(shots) / took)
            shape = f"{name} batch={BATCH} load={os.getloadavg()[0]:.1f}"
            for form, values in rates.items():
                ratio = statistics.median(v / loop for v, loop in zip(values, rates["loop"], strict=True))
                yield measured(
                    "throughput",
                    "guard in a loop" if form == "loop" else f"server, {form}",
                    shape,
                    values,
                    "items/s",
                    ratio,
                )
            alone, _ = load.closed(port, batched, 5.0, 1)
            rate = LOAD * statistics.median(rates["batched"]) / BATCH
            loaded = load.opened(port, batched, LOAD_S, rate)
            all_answered(loaded)
            unloaded = statistics.median(shot.seconds for shot in alone)
            yield from latency("server, unloaded", shape, alone, unloaded)
            yield from latency(f"server, {LOAD:.0%} load", f"{shape} rate={rate:.1f}/s", loaded, unloaded)
        guard.detach()


def _loop(guard: OODGuard, groups: Sequence[Sequence[tuple[str, str]]]) -> float:
    """Items a second of the guard by itself."""
    start, n = time.perf_counter(), 0
    for group in itertools.cycle(groups):
        guard.check([p for p, _ in group], [r for _, r in group])
        n += len(group)
        if (took := time.perf_counter() - start) >= ROUND_S:
            return n / took
    raise AssertionError
