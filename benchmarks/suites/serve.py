"""The server beside a loop over the guard itself, and what is its own: latency, overload, series, memory.

Server and load run on one machine, the model on one thread. `throughput` is items a second of wall-clock time: the guard
called in a loop with full batches, the server asked with full batches (`batched`) or single items (`single`), in turn, round
after round; `ratio` is the server's share of the loop of its round, the median over the rounds. `latency` at 70 % is of
evenly spaced requests of a full batch, at 70 % of the batched throughput of the same run; `ratio` is unloaded median over it.
What is named stub has a model that takes 20 ms for a batch of two and gives no scores.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import load
import stub_server
import torch
from harness import ROOT, Row, quantile
from train_reward_model import BASES

from rm_ood import CalibrationWarning, OODGuard

TESTS = ("tests/serve/test_serving.py", "tests/serve/test_overload.py")
BATCH, ROUNDS, ROUND_S = 16, 5, 2.0
LOAD, LOAD_S = 0.7, 15.0
STUB_MS, STUB_S = 20, 10.0
# Requests a second that the stub can answer.
STUB_CAPACITY = 1000 / STUB_MS * stub_server.BATCH
REQUESTS, WARM_UP = 30_000, 5_000
WORDS = "answer river music paper garden window seven orange quiet small winter bridge letter market".split()  # noqa: SIM905


def measure() -> Iterator[Row]:
    """Rows of `benchmarks/run.py serve`."""
    torch.set_num_threads(1)
    for name in BASES:
        yield from _beside_the_loop(name)
        print(f"{name} beside the loop: done", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        guard = _saved("minilm", Path(folder))
        guard.detach()
        yield from _stub(Path(folder))
        yield from _endurance(Path(folder))


def _pairs(n: int, seed: int = 0) -> list[tuple[str, str]]:
    rng = random.Random(seed)

    def words(low: int, high: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))

    return [(f"question {seed} {i} {words(4, 12)}", words(8, 48)) for i in range(n)]


def _saved(name: str, folder: Path) -> OODGuard:
    """A guard with its model, and both saved."""
    model, tokenizer = BASES[name](seed=0)
    guard = OODGuard(model.eval(), tokenizer, alpha=0.2, batch_size=BATCH)
    rows = [{"prompt": p, "chosen": r, "rejected": f"{r} no"} for p, r in _pairs(110, seed=1)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        guard.fit(rows, calibration=0.7, progress=False)
    guard.save_pretrained(folder / "guard")
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return guard


@contextmanager
def _serving(command: Sequence[str], folder: Path) -> Iterator[tuple[int, int]]:
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
        drain = subprocess.Popen(["cat"], stdin=process.stderr, stdout=subprocess.DEVNULL)
        yield port, process.pid
    finally:
        process.terminate()
        process.wait()
        drain.wait()


def _beside_the_loop(name: str) -> Iterator[Row]:
    pairs = _pairs(20 * BATCH)
    groups = [pairs[i : i + BATCH] for i in range(0, len(pairs), BATCH)]
    batched = itertools.cycle([load.body(group) for group in groups])
    single = itertools.cycle([load.body([pair]) for pair in pairs])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        guard = _saved(name, folder)
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
        with _serving(command, folder) as (port, _):
            rates: dict[str, list[float]] = {"loop": [], "batched": [], "single": []}
            for _ in range(ROUNDS):
                rates["loop"].append(_loop(guard, groups))
                for form, bodies, clients, items in (("batched", batched, 3, BATCH), ("single", single, 3 * BATCH, 1)):
                    shots, took = load.closed(port, bodies, ROUND_S, clients)
                    _all_answered(shots)
                    rates[form].append(items * len(shots) / took)
            shape = f"{name} batch={BATCH}"
            for form, values in rates.items():
                ratio = statistics.median(v / loop for v, loop in zip(values, rates["loop"], strict=True))
                yield _row(
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
            _all_answered(loaded)
            unloaded = statistics.median(shot.seconds for shot in alone)
            yield from _latency("server, unloaded", shape, alone, unloaded)
            yield from _latency(f"server, {LOAD:.0%} load", f"{shape} rate={rate:.1f}/s", loaded, unloaded)
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


def _stub(folder: Path) -> Iterator[Row]:
    """Below, and at three times, what the stub can do."""
    pairs = [load.body([pair]) for pair in _pairs(200)]
    with _serving([str(ROOT / "benchmarks/stub_server.py"), "guard", "model", str(STUB_MS)], folder) as (port, _):
        rate = STUB_CAPACITY / 2
        calm = load.opened(port, itertools.cycle(pairs), STUB_S, rate)
        shape = f"{STUB_MS} ms/batch rate={rate:.0f}/s"
        answered = [shot for shot in calm if shot.status == 200]
        yield _row("overload", "answered at half its load", shape, [len(answered) / len(calm)], "share", metric="share")
        yield from _latency("stub, half its load", shape, answered, None)
        rate = 3 * STUB_CAPACITY
        shots = load.opened(port, itertools.cycle(pairs), STUB_S, rate)
        shape = f"{STUB_MS} ms/batch rate={rate:.0f}/s"
        accepted = [shot for shot in shots if shot.status == 200]
        shed = [shot for shot in shots if shot.status in (429, 503)]
        other = len(shots) - len(accepted) - len(shed)
        crowded = sum(shot.status == 503 for shot in shed)
        told = sum(shot.retry_after for shot in shed)
        for provider, value in (
            ("429 or 503", len(shed) / len(shots)),
            ("503, too many connections", crowded / len(shots)),
            ("with Retry-After, of those", told / max(1, len(shed))),
            ("another answer, or none", other / len(shots)),
        ):
            yield _row("overload", provider, shape, [value], "share", metric="share")
        yield from _latency("stub, accepted in overload", shape, accepted, None)
        yield from _latency("stub, shed in overload", shape, shed, None)


def _endurance(folder: Path) -> Iterator[Row]:
    """Many requests with names of their own: series and memory must not grow with them."""

    def make(i: int) -> bytes:
        if i % 4 == 0:
            return load.request(f"/{i}", {})
        if i % 4 == 1:
            return load.request("/v1/score", {"prompt": f"{i}", f"field {i}": 1})
        name = f"name-{i}"
        return load.request("/v1/score", {"id": name, "session": name, "prompt": f"prompt {i}", "response": f"{i}"})

    with _serving([str(ROOT / "benchmarks/stub_server.py"), "guard", "model", "0"], folder) as (port, pid):
        bodies = load.endless(make)
        sent = 0
        memory = 0
        start = time.perf_counter()
        while sent < REQUESTS:
            shots, _ = load.closed(port, bodies, 2.0, 16)
            sent += len(shots)
            if not memory and sent >= WARM_UP:
                memory = _resident(pid)
        grown = (_resident(pid) - memory) / 2**20
        took = time.perf_counter() - start
        text = urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
        series = sum(1 for line in text.splitlines() if line and not line.startswith("#"))
        shape = f"requests={sent}"
        yield _row("endurance", "series", shape, [float(series)], "series", metric="count")
        yield _row("endurance", f"memory after the first {WARM_UP}", shape, [grown], "MiB", metric="growth")
        yield _row("endurance", "requests", shape, [sent / took], "requests/s", metric="rate")


def _resident(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _all_answered(shots: Sequence[load.Shot]) -> None:
    wrong = [shot.status for shot in shots if shot.status != 200]
    if wrong or not shots:
        raise RuntimeError(f"{len(wrong)} of {len(shots)} requests were not answered: {sorted(set(wrong))}")


def _latency(provider: str, shape: str, shots: Sequence[load.Shot], unloaded: float | None) -> Iterator[Row]:
    seconds = [shot.seconds for shot in shots]
    for metric, value in (("median", statistics.median(seconds)), ("p99", quantile(seconds, 0.99))):
        ratio = None if unloaded is None else unloaded / value
        yield Row("serve", "latency", provider, shape, "float32", metric, 1000 * value, None, None, "ms", ratio=ratio)


def _row(
    op: str,
    provider: str,
    shape: str,
    values: Sequence[float],
    unit: str,
    ratio: float | None = None,
    metric: str = "throughput",
) -> Row:
    low, high = (quantile(values, 0.1), quantile(values, 0.9)) if len(values) > 1 else (None, None)
    return Row("serve", op, provider, shape, "float32", metric, statistics.median(values), low, high, unit, ratio=ratio)
