"""Raw scores by content, in one SQLite file: a reward model reads each text once, also over interrupted studies.

The file holds hashes and numbers, no text. Its keys cover whatever the scores depend on, so that one file may serve several
guards and models.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from rm_ood.errors import FormatError, SaveError

# "rmod": tells a file of ours from another program's database.
_APPLICATION = 0x726D6F64
_VERSION = 1
# Variables in one statement; SQLite allows 999 at least.
_ASKED = 500
# Another study may hold the file for the time of a write.
_WAIT_S = 60.0
_TABLE = (
    "CREATE TABLE scores (key BLOB PRIMARY KEY, numbers BLOB NOT NULL, notes TEXT NOT NULL, digest BLOB NOT NULL) "
    "WITHOUT ROWID"
)


class Record(NamedTuple):
    """What a forward said of one text.

    Attributes:
        numbers: (m,) float64, in an order that the key fixes.
        failed: reason code where the vectors cannot be trusted, else None.
        reasons: further reason codes.
    """

    numbers: NDArray[np.float64]
    failed: str | None
    reasons: tuple[str, ...]


class ScoreCache:
    """Records by key, each batch committed as one; a context manager.

    Args:
        path: SQLite file, made if it is not there; None keeps records in memory.

    Raises:
        FormatError: not a whole score cache. SaveError: the file cannot be opened or written.
    """

    def __init__(self, path: str | Path | None) -> None:
        self._path = None if path is None else Path(path)
        if self._path is not None and not self._path.parent.is_dir():
            raise SaveError(f"score cache {self._path}: no folder {self._path.parent}")
        with self._told():
            self._connection = sqlite3.connect(self._path or ":memory:", timeout=_WAIT_S, isolation_level=None)
        try:
            with self._told():
                self._open()
        except BaseException:
            self._connection.close()
            raise

    def get(self, keys: Sequence[bytes]) -> dict[bytes, Record]:
        """The records that are there, by key.

        Raises:
            FormatError: a record that was changed or cut.
        """
        found: dict[bytes, Record] = {}
        for start in range(0, len(keys), _ASKED):
            asked = keys[start : start + _ASKED]
            query = f"SELECT key, numbers, notes, digest FROM scores WHERE key IN ({','.join('?' * len(asked))})"
            with self._told():
                rows = self._connection.execute(query, list(asked)).fetchall()
            for key, numbers, notes, digest in rows:
                if _digest(key, numbers, notes) != digest:
                    raise self._broken("a record does not match its digest")
                failed, reasons = json.loads(notes)
                found[key] = Record(np.frombuffer(numbers, dtype=np.float64), failed, tuple(reasons))
        return found

    def put(self, records: Mapping[bytes, Record]) -> None:
        """Add records, all or none of them; those that are there stay.

        Raises:
            SaveError: the disk refuses.
        """
        rows = []
        for key, record in records.items():
            numbers = np.asarray(record.numbers, dtype=np.float64).tobytes()
            notes = json.dumps([record.failed, record.reasons])
            rows.append((key, numbers, notes, _digest(key, numbers, notes)))
        with self._told():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                self._connection.executemany("INSERT OR IGNORE INTO scores VALUES (?, ?, ?, ?)", rows)
                self._connection.execute("COMMIT")
            finally:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")

    def __len__(self) -> int:
        with self._told():
            return int(self._connection.execute("SELECT COUNT(*) FROM scores").fetchone()[0])

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> None:
        execute = self._connection.execute
        # In this order: another process may make the tables and the numbers, at once, in between.
        names = [name for (name,) in execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        application, version = (execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version"))
        if not names and application == 0:
            # A commit then needs no sync, and survives a killed process.
            execute("PRAGMA journal_mode = WAL")
            execute("BEGIN IMMEDIATE")
            if not execute("SELECT 1 FROM sqlite_master").fetchone():
                execute(f"PRAGMA application_id = {_APPLICATION}")
                execute(f"PRAGMA user_version = {_VERSION}")
                execute(_TABLE)
            execute("COMMIT")
        elif application != _APPLICATION:
            raise FormatError(f"{self._path} is the database of another program: pass another file for the score cache")
        elif version != _VERSION:
            raise FormatError(
                f"score cache {self._path}: written in format {version}, this version reads {_VERSION}. Delete the file, or "
                "pass another one."
            )
        elif (told := execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            raise self._broken(told)
        execute("PRAGMA synchronous = NORMAL")

    def _broken(self, why: object) -> FormatError:
        return FormatError(
            f"score cache {self._path}: not whole ({why}). Delete the file, or pass another one: it holds scores only, and "
            "they are computed again."
        )

    @contextmanager
    def _told(self) -> Iterator[None]:
        """SQLite's errors as the package's own."""
        try:
            yield
        except sqlite3.OperationalError as error:
            raise SaveError(
                f"score cache {self._path}: {error}. Is the disk full or read-only, or does another study use the file?"
            ) from error
        except sqlite3.DatabaseError as error:
            raise self._broken(error) from error


def _digest(key: bytes, numbers: bytes, notes: str) -> bytes:
    return hashlib.blake2b(key + numbers + notes.encode(), digest_size=8).digest()
