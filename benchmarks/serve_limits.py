"""What is the server's own, over a model that takes 20 ms for a batch of four: load, rushes, floods, bad clients, endurance.

`rate` is of requests with one item each, sent on time whether the ones before are answered or not. Times are from when a request
was due to its reply's last byte.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import os
import select
import socket
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import load
import stub_server
from harness import ROOT, Row, quantile
from server_process import pairs, serving

STUB_MS = 20
# Items a second that the stub can answer.
CAPACITY = 1000 / STUB_MS * stub_server.BATCH
CALM, CALM_S = CAPACITY / 2, 20.0
OVERLOAD, OVERLOAD_S = 3 * CAPACITY, 10.0
RUSH, RUSH_WAIT_S = 100, 0.4
FLOOD, FLOOD_S = 600.0, 10.0
# Bad clients: how many of a kind, the deadline that they miss, and how long the others are asked beside them.
HALF_HEADS, SLOW_BODIES, STUCK_READERS = 200, 50, 5
DEADLINE_S, BESIDE_S, BESIDE = 4.0, 8.0, CAPACITY / 4
# Between requests of one that never reads: what is measured is not that it asks for much at once.
ASK_S = 0.04
HUGE = 2 * 2**20
HEAD = b"POST /v1/score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
REQUESTS, WARM_UP = 30_000, 5_000


@contextmanager
def _stub(folder: Path, milliseconds: int = STUB_MS, item_ms: int = 0, **settings: float) -> Iterator[tuple[int, int]]:
    options = [f"{name}={value}" for name, value in settings.items()]
    with serving(
        [str(ROOT / "benchmarks/stub_server.py"), "guard", "model", str(milliseconds), str(item_ms), *options], folder
    ) as both:
        yield both


def _bodies() -> Iterator[bytes]:
    return itertools.cycle([load.body([pair]) for pair in pairs(200)])


def load_and_overload(folder: Path) -> Iterator[Row]:
    """At half, and at three times, what the stub can do."""
    with _stub(folder) as (port, _):
        # The first requests of a process load what later ones find.
        load.opened(port, _bodies(), 1.0, CALM)
        calm = load.opened(port, _bodies(), CALM_S, CALM)
        answered = [shot for shot in calm if shot.status == 200]
        shape = _shape(f"rate={CALM:.0f}/s")
        yield measured(
            "overload", "answered at half its load", shape, [len(answered) / len(calm)], "share", metric="share"
        )
        yield from latency("stub, half its load", shape, answered, None)
        shots = load.opened(port, _bodies(), OVERLOAD_S, OVERLOAD)
        shape = _shape(f"rate={OVERLOAD:.0f}/s")
        accepted = [shot for shot in shots if shot.status == 200]
        shed = [shot for shot in shots if shot.status in (429, 503)]
        yield from _shares("overload", shape, shots)
        calm_p99 = quantile([shot.seconds for shot in answered], 0.99)
        yield from latency("stub, accepted in overload", shape, accepted, calm_p99)
        yield from latency("stub, shed in overload", shape, shed, None)


def rush(folder: Path) -> Iterator[Row]:
    """One after the other, then many at once, with a model that takes its time by the item."""
    with _stub(folder, 0, STUB_MS, max_wait_s=RUSH_WAIT_S) as (port, _):
        load.closed(port, _bodies(), 1.0, 1)
        shots = load.opened(port, _bodies(), RUSH / 1e4, 1e4)
        shape = f"{STUB_MS} ms/item max_wait={RUSH_WAIT_S} s load={os.getloadavg()[0]:.1f}"
        answered = [shot for shot in shots if shot.status == 200]
        late = sum(shot.seconds > RUSH_WAIT_S for shot in answered)
        for provider, value in (("answered", len(answered)), ("answered later than they may be", late)):
            yield measured("rush", f"{provider}, of {len(shots)}", shape, [float(value)], "requests", metric="count")
        yield from latency("stub, accepted in the rush", shape, answered, None)


def flood(folder: Path) -> Iterator[Row]:
    """A new connection for every request."""
    with _stub(folder) as (port, _):
        load.opened(port, _bodies(), 1.0, CALM)
        most, done = [0.0], threading.Event()

        def watch() -> None:
            # Kept from before the flood, so that the limit does not hold for it.
            kept = http.client.HTTPConnection("127.0.0.1", port)
            while not done.wait(0.1):
                kept.request("GET", "/metrics")
                lines = kept.getresponse().read().decode().splitlines()
                most[0] = max(
                    most[0], next(float(line.split()[1]) for line in lines if line.startswith("rm_ood_connections "))
                )
            kept.close()

        watcher = threading.Thread(target=watch)
        watcher.start()
        shots = load.opened(port, _bodies(), FLOOD_S, FLOOD, keep=False)
        done.set()
        watcher.join()
        shape = _shape(f"connections={FLOOD:.0f}/s")
        yield from _shares("flood", shape, shots)
        yield from latency("stub, every answer in the flood", shape, [shot for shot in shots if shot.status], None)
        yield measured("flood", "connections open at once", shape, most, "connections", metric="count")


def bad_clients(folder: Path) -> Iterator[Row]:
    """Others beside half heads, slow bodies and stuck readers; bodies past the limit."""
    with _stub(folder, max_connections=400, request_timeout_s=DEADLINE_S) as (port, pid):
        load.opened(port, _bodies(), 1.0, CALM)
        alone = [shot for shot in load.opened(port, _bodies(), BESIDE_S, BESIDE) if shot.status == 200]
        p99 = quantile([shot.seconds for shot in alone], 0.99)
        shape = f"rate={BESIDE:.0f}/s deadline={DEADLINE_S:.0f} s"
        yield from latency("stub, alone", _shape(shape), alone, p99)
        for name, count, start in (
            ("half heads", HALF_HEADS, _half_head),
            ("slow bodies", SLOW_BODIES, _slow_body),
            ("stuck readers", STUCK_READERS, _stuck_reader),
        ):
            done = threading.Event()
            bad = [start(port, done) for _ in range(count)]
            shots = load.opened(port, _bodies(), BESIDE_S, BESIDE)
            about = _shape(f"{shape} {count} {name}")
            answered = [shot for shot in shots if shot.status == 200]
            share = len(answered) / len(shots)
            yield measured("bad clients", f"others answered beside {name}", about, [share], "share", metric="share")
            yield from latency(f"stub, beside {name}", about, answered, p99)
            left = sum(not _is_closed(one) for one in bad)
            yield measured("bad clients", f"{name} left", about, [float(left)], "connections", metric="count")
            done.set()
            for one in bad:
                one.close()
        yield from _huge_bodies(port, pid)


def _half_head(port: int, done: threading.Event) -> socket.socket:
    one = socket.create_connection(("127.0.0.1", port))
    one.sendall(HEAD)
    return one


def _slow_body(port: int, done: threading.Event) -> socket.socket:
    one = socket.create_connection(("127.0.0.1", port))
    one.sendall(HEAD + b"Content-Length: 1000\r\n\r\n")

    def drip() -> None:
        with contextlib.suppress(OSError):
            while not done.wait(1.0):
                one.sendall(b" ")

    threading.Thread(target=drip, daemon=True).start()
    return one


def _stuck_reader(port: int, done: threading.Event) -> socket.socket:
    one = socket.socket()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    one.connect(("127.0.0.1", port))

    def ask() -> None:
        with contextlib.suppress(OSError):
            while not done.wait(ASK_S):
                one.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n")

    threading.Thread(target=ask, daemon=True).start()
    return one


def _is_closed(one: socket.socket) -> bool:
    """Whether the other side has ended the connection, whatever it said before."""
    one.settimeout(0.2)
    try:
        while one.recv(2**20):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


def _huge_bodies(port: int, pid: int) -> Iterator[Row]:
    """2 MiB, declared and in chunks: how soon they are refused, and what they cost in memory at its highest."""
    chunk = b"10000\r\n" + b"x" * 2**16 + b"\r\n"
    kinds = {
        "declared": [HEAD + b"Content-Length: %d\r\n\r\n" % HUGE, *[b"x" * 2**16] * (HUGE // 2**16)],
        "chunked": [HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *[chunk] * (HUGE // 2**16)],
    }
    for name, parts in kinds.items():
        _refused(port, parts)
        Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")
        before = _resident(pid, "VmRSS")
        took = [_refused(port, parts) for _ in range(5)]
        grown = (_resident(pid, "VmHWM") - before) / 1024
        shape = _shape(f"body={HUGE}")
        yield measured(
            "bad clients", f"{name} body past the limit", shape, [1000 * s for s in took], "ms", metric="refused"
        )
        yield measured("bad clients", f"{name} body past the limit", shape, [grown], "MiB", metric="peak memory")


def _refused(port: int, parts: Sequence[bytes]) -> float:
    """Seconds from the first byte sent to a 413."""
    with socket.create_connection(("127.0.0.1", port)) as one:
        start = time.perf_counter()
        for part in parts:
            if select.select([one], [], [], 0)[0]:
                break
            with contextlib.suppress(OSError):
                one.sendall(part)
        reply = one.recv(4096)
        took = time.perf_counter() - start
    if not reply.startswith(b"HTTP/1.1 413"):
        raise RuntimeError(f"not refused: {reply[:60]!r}")
    return took


def endurance(folder: Path, requests: int = REQUESTS) -> Iterator[Row]:
    """Many requests with names of their own: series and memory must not grow with them."""

    def make(i: int) -> bytes:
        if i % 4 == 0:
            return load.request(f"/{i}", {})
        if i % 4 == 1:
            return load.request("/v1/score", {"prompt": f"{i}", f"field {i}": 1})
        name = f"name-{i}"
        body = {"id": name, "session": name, "prompt": f"prompt {i}", "response": f"{i}"}
        return load.request("/v1/score", body, f"X-Request-Id: {name}\r\n")

    with _stub(folder, 0) as (port, pid):
        bodies = load.endless(make)
        sent = memory = 0
        start = time.perf_counter()
        while sent < requests:
            shots, _ = load.closed(port, bodies, 2.0, 16)
            sent += len(shots)
            if not memory and sent >= WARM_UP:
                memory = _resident(pid, "VmRSS")
        grown = (_resident(pid, "VmRSS") - memory) / 1024
        took = time.perf_counter() - start
        with urlopen(f"http://127.0.0.1:{port}/metrics") as metrics:
            series = sum(1 for line in metrics.read().decode().splitlines() if line and not line.startswith("#"))
        shape = _shape(f"requests={sent}", 0)
        yield measured("endurance", "series", shape, [float(series)], "series", metric="count")
        yield measured("endurance", f"memory after the first {WARM_UP}", shape, [grown], "MiB", metric="growth")
        yield measured("endurance", "requests", shape, [sent / took], "requests/s", metric="rate")


def _resident(pid: int, field: str) -> int:
    """KiB."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def _shape(about: str, milliseconds: int = STUB_MS) -> str:
    return f"{milliseconds} ms/batch {about} load={os.getloadavg()[0]:.1f}"


def _shares(op: str, shape: str, shots: Sequence[load.Shot]) -> Iterator[Row]:
    """How requests were answered."""
    shed = [shot for shot in shots if shot.status in (429, 503)]
    known = sum(shot.status == 200 for shot in shots) + len(shed)
    for provider, value in (
        ("429 or 503", len(shed) / len(shots)),
        ("503, too many connections", sum(shot.status == 503 for shot in shed) / len(shots)),
        ("with Retry-After, of those", sum(shot.retry_after for shot in shed) / max(1, len(shed))),
        ("another answer, or none", (len(shots) - known) / len(shots)),
    ):
        yield measured(op, provider, shape, [value], "share", metric="share")


def all_answered(shots: Sequence[load.Shot]) -> None:
    """Nothing but 200.

    Raises:
        RuntimeError: anything else.
    """
    wrong = [shot.status for shot in shots if shot.status != 200]
    if wrong or not shots:
        raise RuntimeError(f"{len(wrong)} of {len(shots)} requests were not answered: {sorted(set(wrong))}")


def latency(provider: str, shape: str, shots: Sequence[load.Shot], unloaded: float | None) -> Iterator[Row]:
    """Median and 99 % point, and the time of an unloaded server over each."""
    seconds = [shot.seconds for shot in shots]
    for metric, value in (("median", statistics.median(seconds)), ("p99", quantile(seconds, 0.99))):
        ratio = None if unloaded is None else unloaded / value
        yield Row("serve", "latency", provider, shape, "float32", metric, 1000 * value, None, None, "ms", ratio=ratio)


def measured(
    op: str,
    provider: str,
    shape: str,
    values: Sequence[float],
    unit: str,
    ratio: float | None = None,
    metric: str = "throughput",
) -> Row:
    """One row, the median of `values` and their spread."""
    low, high = (quantile(values, 0.1), quantile(values, 0.9)) if len(values) > 1 else (None, None)
    return Row("serve", op, provider, shape, "float32", metric, statistics.median(values), low, high, unit, ratio=ratio)
