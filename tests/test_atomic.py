"""Locks, temporary files and folder syncing under the atomic save."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import sys
import threading
import time
from pathlib import Path

import pytest

from rm_ood import SaveError
from rm_ood.atomic import locked_folder, remove_temporaries, sync_folder, write_temporary


def test_temporary_is_beside_the_target_and_removed_at_the_end(tmp_path: Path) -> None:
    with contextlib.ExitStack() as cleanup:
        path = write_temporary(tmp_path, "guard", b"bytes", cleanup)
        assert path.parent == tmp_path
        assert path.read_bytes() == b"bytes"
    assert list(tmp_path.iterdir()) == []


def test_temporary_that_was_moved_stays_where_it_is(tmp_path: Path) -> None:
    with contextlib.ExitStack() as cleanup:
        os.replace(write_temporary(tmp_path, "guard", b"bytes", cleanup), tmp_path / "guard")
    assert [p.name for p in tmp_path.iterdir()] == ["guard"]


_AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root makes devices")


@pytest.mark.parametrize("kind", ["link", "dangling link", "folder", "pipe", pytest.param("device", marks=_AS_ROOT)])
def test_only_a_file_of_its_own_is_replaced(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "guard"
    (tmp_path / "other").write_bytes(b"precious")
    if kind == "device":
        os.mknod(target, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    elif kind == "pipe":
        os.mkfifo(target)
    elif kind == "folder":
        target.mkdir()
    else:
        target.symlink_to(tmp_path / ("other" if kind == "link" else "none"))
    before = target.lstat()
    what = {"folder": "a folder", "pipe": "a device or a pipe", "device": "a device or a pipe"}.get(
        kind, "a symbolic link"
    )
    with contextlib.ExitStack() as cleanup, pytest.raises(SaveError, match=f"guard is {what}, and is not replaced"):
        write_temporary(tmp_path, "guard", b"bytes", cleanup)
    assert (target.lstat().st_mode, target.lstat().st_ino) == (before.st_mode, before.st_ino)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["guard", "other"]
    assert (tmp_path / "other").read_bytes() == b"precious"


def test_temporary_is_removed_when_it_cannot_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), contextlib.ExitStack() as cleanup:
        write_temporary(tmp_path, "guard", b"bytes", cleanup)
    assert list(tmp_path.iterdir()) == []


def test_mode_follows_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        with contextlib.ExitStack() as cleanup:
            mode = write_temporary(tmp_path, "guard", b"", cleanup).stat().st_mode
    finally:
        os.umask(old)
    assert mode & 0o777 == 0o640


def test_only_own_temporaries_are_removed(tmp_path: Path) -> None:
    names = [".guard.0123.tmp", ".guard.tmp", "guard.1.tmp", ".other.1.tmp", "guard"]
    for name in names:
        (tmp_path / name).touch()
    remove_temporaries(tmp_path, "guard")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names[1:])


def test_a_folder_that_cannot_be_synced_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handles = []

    def refuse(handle: int) -> None:
        handles.append(handle)
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    sync_folder(tmp_path)
    sync_folder(tmp_path / "missing")
    assert len(handles) == 1
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(handles[0])


def test_lock_is_exclusive_and_released(tmp_path: Path) -> None:
    with locked_folder(tmp_path, 0) as first:
        with locked_folder(tmp_path, 0) as second:
            assert (first, second) == (True, False)
        # The one that did not get it must not have released it.
        with locked_folder(tmp_path, 0.05) as third:
            assert third is False
    with locked_folder(tmp_path, 0) as again:
        assert again is True


def test_lock_is_released_when_its_body_raises(tmp_path: Path) -> None:
    handles = []

    def fail_inside() -> None:
        with locked_folder(tmp_path, 0):
            # A duplicate of the handle, as a forked child has: closing ours alone would leave the folder locked.
            ours = [int(fd) for fd in os.listdir("/proc/self/fd") if _is(fd, tmp_path)]
            handles.extend(os.dup(fd) for fd in ours)
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    with locked_folder(tmp_path, 0) as again:
        assert again is True
    assert len(handles) == 1
    os.close(handles[0])


def _is(fd: str, folder: Path) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{fd}") == str(folder)
    except OSError:
        return False


def test_lock_waits_for_its_turn(tmp_path: Path) -> None:
    inside = threading.Event()

    def hold() -> None:
        with locked_folder(tmp_path, 0):
            inside.set()
            time.sleep(0.2)

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait()
    with locked_folder(tmp_path, 30) as held:
        assert held is True
    thread.join()


def test_where_folders_cannot_be_locked_saving_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with locked_folder(tmp_path, 0) as held:
        assert held is None
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with locked_folder(tmp_path, 0) as held:
        assert held is None
    with locked_folder(tmp_path / "missing", 0) as held:
        assert held is None
