"""Pieces of an atomic save: a lock on the folder, what may be replaced, temporary files beside the target, a synced folder."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from rm_ood.errors import SaveError


def refuse_other_than_file(path: Path) -> None:
    """Replace no device or pipe, and nothing by way of a link: only a regular file, or nothing yet.

    Raises:
        SaveError: something else is there.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        what = "a symbolic link" if stat.S_ISLNK(mode) else "a folder" if stat.S_ISDIR(mode) else "a device or a pipe"
        raise SaveError(f"{path} is {what}, and is not replaced: what is saved here is a file of its own")


def write_temporary(folder: Path, name: str, data: bytes, cleanup: contextlib.ExitStack) -> Path:
    """Write and sync a file beside `name`, for `os.replace`; `cleanup` removes it if it is still there.

    Raises:
        SaveError: `name` is not a regular file. OSError: the disk refuses.
    """
    refuse_other_than_file(folder / name)
    path = folder / f".{name}.{secrets.token_hex(8)}.tmp"
    with path.open("xb") as file:
        cleanup.callback(path.unlink, missing_ok=True)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return path


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last through a power cut."""
    # Some network file systems cannot sync a folder; the bytes of the files are synced either way.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove_temporaries(folder: Path, name: str) -> None:
    """Remove what killed saves left behind; to be called with the folder locked."""
    for stale in folder.glob(f".{name}.*.tmp"):
        stale.unlink()


@contextlib.contextmanager
def locked_folder(folder: Path, wait_s: float) -> Iterator[bool | None]:
    """One saver at a time: True when held, False after `wait_s`, None where folders cannot be locked."""
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        yield None
        return
    try:
        yield acquire(handle, wait_s)
    finally:
        # By hand: closing does not release it while a forked child still has the handle.
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


def acquire(handle: int, wait_s: float) -> bool | None:
    """Lock an open file or folder until it is closed: True, False after `wait_s`, None where it cannot be locked."""
    import fcntl

    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.02)
        except OSError:
            return None
        else:
            return True
