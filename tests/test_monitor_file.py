"""The saved state of a monitor: old or new after a crash, refused when it is not what was written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rm_ood
from rm_ood import FormatError, InputError, IntegrityError, MismatchError, SaveError, TrafficMonitor
from rm_ood.atomic import locked_folder
from rm_ood.monitor_file import MAX_SESSIONS, read_monitor, write_monitor

CALIBRATION = np.random.default_rng(0).normal(size=400)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    monitor = TrafficMonitor(CALIBRATION, ratios=(4,))
    monitor.update(CALIBRATION[:30], sessions=[f"user {i % 20}" for i in range(30)])
    monitor.save(tmp_path / "folder" / "monitor.json")
    return tmp_path / "folder" / "monitor.json"


def test_the_file_is_readable_and_names_no_session(path: Path) -> None:
    text = path.read_text(encoding="ascii")
    assert json.loads(text)["counts"] == [30, 20, 0, 0]
    assert "user" not in text
    assert [p.name for p in path.parent.iterdir()] == ["monitor.json"]


def test_every_truncation_and_flipped_bit_is_refused(path: Path) -> None:
    data = path.read_bytes()
    for size in range(0, len(data), 29):
        path.write_bytes(data[:size])
        with pytest.raises(FormatError):
            read_monitor(path)
    for place in range(0, len(data) * 8, 13):
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        with pytest.raises(FormatError):
            read_monitor(path)
    path.write_bytes(data)
    assert TrafficMonitor.load(path, CALIBRATION).state.counted == 20


def test_a_device_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "null")
    monitor = TrafficMonitor(CALIBRATION, ratios=(4,))
    with pytest.raises(SaveError, match="null is a device or a pipe, and is not replaced"):
        monitor.save(tmp_path / "null")
    assert (tmp_path / "null").is_fifo()


def test_another_spelling_of_a_number_is_a_change(path: Path) -> None:
    text = path.read_text(encoding="ascii")
    assert "100.0" in text
    path.write_text(text.replace("100.0", "1e2"), encoding="ascii")
    with pytest.raises(IntegrityError, match="cut or changed"):
        read_monitor(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[]", "not the state of a traffic monitor"),
        (b'{"kind": "guard"}', "not the state of a traffic monitor"),
        (b'{"kind": "rm_ood traffic monitor", "format_version": 1}', "format 1, this version reads 2"),
        (b'{"kind": "rm_ood traffic monitor", "kind": 1}', "appears twice"),
        (b'{"kind": NaN}', "not strict JSON"),
        (b"\x80\x04", "not strict JSON"),
    ],
)
def test_something_else_is_refused_by_name(path: Path, data: bytes, message: str) -> None:
    path.write_bytes(data)
    with pytest.raises(FormatError, match=message):
        TrafficMonitor.load(path, CALIBRATION)


def test_nothing_there_is_said_or_begun_anew(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        TrafficMonitor.load(tmp_path / "none.json", CALIBRATION)
    assert TrafficMonitor.open(tmp_path / "none.json", CALIBRATION, lifetime=50).state.threshold == 50
    with pytest.raises(FormatError, match="cannot be read"):
        TrafficMonitor.load(tmp_path, CALIBRATION)


def test_another_calibration_or_setting_is_a_mismatch(path: Path) -> None:
    with pytest.raises(MismatchError, match="other calibration scores"):
        TrafficMonitor.load(path, CALIBRATION[:-1])
    with pytest.raises(MismatchError, match="other calibration scores"):
        TrafficMonitor.load(path, {"response": CALIBRATION})
    with pytest.raises(MismatchError, match="other settings: lifetime, ratios"):
        TrafficMonitor.load(path, CALIBRATION, lifetime=20, ratios=(2,), seed=0)
    assert TrafficMonitor.open(path, CALIBRATION, lifetime=100, ratios=(4,)).state.counted == 20


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("settings", "workers"), 0, "malformed"),
        (("settings", "colour"), 1, "malformed"),
        (("axes",), [], "malformed"),
        (("axes", "all", "hits"), [1], "counts"),
        (("axes", "all", "wealth", "ever"), [1.0], "bets"),
        (("axes", "all", "wealth"), None, "malformed"),
        (("flags", "flagged"), 99, "99 of 20"),
        (("counts",), [1], "malformed"),
        (("sessions",), ["a"], "malformed"),
        (("alarm_of",), ["response"], "malformed"),
        (("watched",), {"other": "0"}, "malformed"),
    ],
)
def test_a_signed_state_that_cannot_be_is_refused(path: Path, where: tuple[str, ...], value: Any, message: str) -> None:
    content = read_monitor(path)
    inner = content
    for name in where[:-1]:
        inner = inner[name]
    inner[where[-1]] = value
    write_monitor(path, lambda: content)
    with pytest.raises(FormatError, match=message):
        TrafficMonitor.load(path, CALIBRATION)


def test_a_disk_that_refuses_leaves_what_was_there(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = TrafficMonitor.load(path, CALIBRATION)
    monitor.update(0.5)

    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", refuse)
        with pytest.raises(SaveError, match=r"No space left.*still loads"):
            monitor.save(path)
    assert [p.name for p in path.parent.iterdir()] == ["monitor.json"]
    assert TrafficMonitor.load(path, CALIBRATION).state.counted == 20
    monitor.save(path)
    assert TrafficMonitor.load(path, CALIBRATION).state.counted == 21


def test_a_save_that_waits_its_turn_writes_what_there_is_then(path: Path) -> None:
    """Two savers of one path: the later one may not have waited with an earlier state."""
    monitor = TrafficMonitor.load(path, CALIBRATION)
    with locked_folder(path.parent, 1.0) as locked:
        assert locked
        saver = threading.Thread(target=monitor.save, args=(path,))
        saver.start()
        time.sleep(0.3)
        monitor.update(0.5)
    saver.join(timeout=30)
    assert TrafficMonitor.load(path, CALIBRATION).state.counted == 21


def test_a_monitor_with_all_its_sessions_loads(tmp_path: Path) -> None:
    monitor = TrafficMonitor(CALIBRATION, session_memory=MAX_SESSIONS)
    # The longest that a key's number is.
    monitor._sessions.update(dict.fromkeys(range(2**64 - MAX_SESSIONS, 2**64)))
    monitor.save(tmp_path / "monitor.json")
    assert len(TrafficMonitor.load(tmp_path / "monitor.json", CALIBRATION)._sessions) == MAX_SESSIONS
    with pytest.raises(InputError, match="session_memory=1000001: expected at most 1000000"):
        TrafficMonitor(CALIBRATION, session_memory=MAX_SESSIONS + 1)


def test_what_would_not_load_is_not_saved(path: Path) -> None:
    with pytest.raises(SaveError, match="bytes, at most"):
        write_monitor(path, lambda: {"sessions": "x" * 2**25})
    assert TrafficMonitor.load(path, CALIBRATION).state.counted == 20


def test_settings_of_other_types_are_saved_as_numbers(tmp_path: Path) -> None:
    monitor = TrafficMonitor(
        CALIBRATION, alpha=np.float32(0.01), budget=np.float32(0.02), ratios=np.array([2, 4]), seed=np.int64(3)
    )
    monitor.save(tmp_path / "monitor.json")
    assert TrafficMonitor.load(tmp_path / "monitor.json", CALIBRATION, budget=np.float32(0.02)).state == monitor.state


def test_a_setting_that_there_is_not_is_refused(path: Path) -> None:
    with pytest.raises(InputError, match=r"settings \['foo'\]"):
        TrafficMonitor.load(path, CALIBRATION, foo="foo")


def test_what_an_alarm_was_about_is_saved(tmp_path: Path) -> None:
    monitor = TrafficMonitor(CALIBRATION, recurring=1000)
    monitor.update(CALIBRATION[:50] + 5)
    monitor.save(tmp_path / "monitor.json")
    assert monitor.state.message is not None
    assert TrafficMonitor.load(tmp_path / "monitor.json", CALIBRATION).state.message == monitor.state.message


_KILLED = """
import json, os, signal, sys
from pathlib import Path
from rm_ood.monitor_file import read_monitor, write_monitor
path = Path(sys.argv[1])
write_monitor(path, lambda: {"which": 0})
seen = []
for step in range(50):
    child = os.fork()
    if child == 0:
        left = [step]
        def stepped(call):
            def wrapper(*args, **options):
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1
                return call(*args, **options)
            return wrapper
        os.replace, os.fsync, Path.open, Path.unlink = map(stepped, (os.replace, os.fsync, Path.open, Path.unlink))
        write_monitor(path, lambda: {"which": 1})
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    seen.append(read_monitor(path)["which"])
    write_monitor(path, lambda: {"which": 0})
    assert len(list(path.parent.iterdir())) == 1, "stale files"
    if code == 0:
        break
print(json.dumps(seen))
"""


def test_a_save_that_is_killed_at_any_step_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, str(tmp_path / "state" / "monitor.json")],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(Path(rm_ood.__file__).parents[1])},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    seen = json.loads(done.stdout)
    assert seen == sorted(seen)
    assert set(seen) == {0, 1}
    assert len(seen) >= 5
