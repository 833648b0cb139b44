"""The saved state of a traffic monitor: one JSON file, written atomically, with a digest over all of it."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rm_ood.atomic import locked_folder, remove_temporaries, sync_folder, write_temporary
from rm_ood.errors import FormatError, IntegrityError, SaveError
from rm_ood.strict_json import canonical_json, parse_json

FORMAT_VERSION = 2
# A session takes at most 21 bytes of the file, so that what is saved also loads.
MAX_SESSIONS = 1_000_000
_KIND = "rm_ood traffic monitor"
_MAX_BYTES = 2**25
_LOCK_WAIT_S = 60.0


def write_monitor(path: Path, content: Callable[[], Mapping[str, Any]]) -> None:
    """Replace the file: after a crash at any point it is the old one or the new one.

    Args:
        content: gives the state; called once it is this saver's turn, so that a later state never gives way to an earlier.
    Raises:
        SaveError: the path is no regular file, the disk refuses, or another process has been saving here for a minute.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked_folder(path.parent, _LOCK_WAIT_S) as locked, contextlib.ExitStack() as cleanup:
            if locked is False:
                raise SaveError(f"{path.parent}: another process has been saving here for {_LOCK_WAIT_S:.0f} s")
            signed = {**content(), "kind": _KIND, "format_version": FORMAT_VERSION}
            data = canonical_json({**signed, "sha256": _digest(signed)}).encode()
            if len(data) > _MAX_BYTES:
                raise SaveError(f"monitor not saved to {path}: {len(data)} bytes, at most {_MAX_BYTES} load")
            remove_temporaries(path.parent, path.name)
            os.replace(write_temporary(path.parent, path.name, data, cleanup), path)
            sync_folder(path.parent)
    except SaveError:
        raise
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise SaveError(f"monitor not saved to {path}: {why}. What was there before still loads") from error


def read_monitor(path: Path) -> dict[str, Any]:
    """What `write_monitor` wrote.

    Raises:
        FileNotFoundError: no such file.
        FormatError: something else, or another format. IntegrityError: it was cut or changed.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror or type(error).__name__}") from error
    content = parse_json(data, str(path), _MAX_BYTES)
    if not isinstance(content, dict) or content.get("kind") != _KIND:
        raise FormatError(f"{path}: not the state of a traffic monitor")
    if content.get("format_version") != FORMAT_VERSION:
        raise FormatError(f"{path}: format {content.get('format_version')}, this version reads {FORMAT_VERSION}")
    digest = content.pop("sha256", None)
    # The second half: 1e5 and 1E5 are one number in other bytes.
    if digest != _digest(content) or canonical_json({**content, "sha256": digest}).encode() != data:
        raise IntegrityError(f"{path}: it was cut or changed after it was written. Start a new monitor")
    return content


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()
