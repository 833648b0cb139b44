"""What the suites share: alternating timing, result rows, and the table they are appended to."""

from __future__ import annotations

import csv
import ctypes
import datetime
import importlib.metadata
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"


@dataclass(frozen=True)
class Row:
    """One measured number. `value` is a median; `low` and `high` are the 10 % and 90 % points over the rounds.

    `shape` is text such as `n=64 d=384 k=2`, `peak_memory` is in bytes, and `ratio` says how many times better than the
    peer of the same run this provider is; both are empty where they were not measured.
    """

    suite: str
    op: str
    provider: str
    shape: str
    dtype: str
    metric: str
    value: float
    low: float | None
    high: float | None
    unit: str
    peak_memory: int | None = None
    ratio: float | None = None


COLUMNS = (*(field.name for field in fields(Row)), "device", "driver", "torch", "triton", "commit", "date")


@dataclass(frozen=True)
class Timing:
    """Seconds a call, one sample a round; the rounds of all providers of one `alternate` call are paired."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def low(self) -> float:
        return quantile(self.samples, 0.1)

    @property
    def high(self) -> float:
        return quantile(self.samples, 0.9)

    def times_faster_than(self, other: Timing) -> float:
        """Median over the rounds of the other's time over this one's: drift of the machine cancels within a round."""
        return statistics.median(b / a for a, b in zip(self.samples, other.samples, strict=True))


def quantile(samples: Iterable[float], q: float) -> float:
    """The q-quantile, linear between samples."""
    ordered = sorted(samples)
    position = q * (len(ordered) - 1)
    lower = int(position)
    upper = min(lower + 1, len(ordered) - 1)
    return ordered[lower] + (position - lower) * (ordered[upper] - ordered[lower])


def alternate(
    providers: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 15,
    seconds: float = 0.02,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, Timing]:
    """Time the providers in turn, round after round, in one process; the order turns by one each round.

    A sample follows an untimed call: a machine may put aside memory that nobody touches for a second or two, as while a slow
    provider runs, and the next one to need its own then pays tens of milliseconds. Calls of a second or more go without.

    Args:
        providers: what to call, by name; each is called twice beforehand.
        rounds: samples per provider.
        seconds: least length of one sample; short calls are repeated within it.
        clock: CPU time by default, which other load on the machine changes least.
    """
    repeats, long = {}, set()
    for name, call in providers.items():
        call()
        start = clock()
        call()
        taken = clock() - start
        repeats[name] = max(1, round(seconds / max(taken, 1e-7)))
        if taken >= 1:
            long.add(name)
    samples: dict[str, list[float]] = {name: [] for name in providers}
    names = list(providers)
    for index in range(rounds):
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            if name not in long:
                providers[name]()
            start = clock()
            for _ in range(repeats[name]):
                providers[name]()
            samples[name].append((clock() - start) / repeats[name])
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def memory_of(suite: str, first: str, call: str) -> int:
    """Bytes of resident memory that a call, an expression in a suite's own terms, adds at its highest; one thread, a new process.

    Args:
        first: another expression that is evaluated before, for what a first call loads and keeps.
    """
    code = (
        f"import torch, harness\nfrom suites.{suite} import *\ntorch.set_num_threads(1)\nready = {first}\n"
        f"with harness.added() as peak:\n    {call}\nprint(peak[0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "benchmarks", capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@contextmanager
def added() -> Iterator[list[int]]:
    """Bytes between resident memory now and its peak within, as the one entry of a list that is filled at the end."""
    # What was freed before would be taken again unseen.
    ctypes.CDLL(None).malloc_trim(0)
    # The peak counts from here; the resource module's would count from the parent of this process.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before, peak = _kib("VmRSS"), list[int]()
    yield peak
    peak.append(1024 * (_kib("VmHWM") - before))


def _kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def waited() -> float:
    """A clock of a GPU: seconds, once what was launched is done."""
    torch.cuda.synchronize()
    return time.perf_counter()


def environment() -> dict[str, str]:
    """Device, driver, versions, commit and date: what makes a row comparable."""
    driver = ""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    else:
        device = f"{_processor()}, {torch.get_num_threads()} thread(s)"
    commit = _output("git", "rev-parse", "--short", "HEAD")
    changed = _output("git", "status", "--porcelain", "--untracked-files=no", "--", "rm_ood", "benchmarks/*.py")
    return {
        "device": device,
        "driver": driver,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "commit": f"{commit}+changes" if changed else commit,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def results_file() -> Path:
    """`benchmarks/results/<device>.csv`: `cpu`, or the name of the GPU."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return RESULTS / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.csv"


def append(rows: Iterable[Row], path: Path) -> None:
    """Append rows with this machine's environment; a new file starts with the column names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    about = environment()
    with path.open("a", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows({name: _cell(value) for name, value in (asdict(row) | about).items()} for row in rows)


def table(rows: Iterable[Row]) -> str:
    """Rows as a Markdown table for people."""
    lines = ["| op | provider | shape | metric | median | 10 % | 90 % | unit | ratio |", "|---" * 9 + "|"]
    for row in rows:
        numbers = [_cell(number) for number in (row.value, row.low, row.high)]
        cells = [row.op, row.provider, row.shape, row.metric, *numbers, row.unit, _cell(row.ratio)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _processor() -> str:
    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    match = re.search(r"model name\s*:\s*(.+)", info)
    return match[1].strip() if match else platform.machine()


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
