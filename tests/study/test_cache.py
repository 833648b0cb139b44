"""Scores by content: what is put comes back, and a file that is not whole is an error that says what to do."""

from __future__ import annotations

import math
import sqlite3
import threading
from pathlib import Path

import numpy as np
import pytest

from rm_ood.errors import FormatError, SaveError
from rm_ood.study.cache import Record, ScoreCache


def record(*numbers: float, failed: str | None = None, reasons: tuple[str, ...] = ()) -> Record:
    return Record(np.array(numbers, dtype=np.float64), failed, reasons)


def many(n: int) -> dict[bytes, Record]:
    return {i.to_bytes(20, "big"): record(i, i / 3, -i) for i in range(n)}


def test_records_come_back_bit_for_bit_in_another_process_s_file(tmp_path: Path) -> None:
    path = tmp_path / "scores.sqlite"
    odd = record(math.nan, math.inf, -0.0, 5e-324, failed="non_finite", reasons=("truncated", "a b"))
    with ScoreCache(path) as cache:
        assert cache.get([b"k"]) == {}
        cache.put({b"k": odd})
        cache.put({b"k": record(1.0), b"other": record()})
    with ScoreCache(path) as cache:
        assert len(cache) == 2
        found = cache.get([b"k", b"nothing"])
    assert found.keys() == {b"k"}
    # The first record of a key stays.
    assert found[b"k"].numbers.tobytes() == odd.numbers.tobytes()
    assert found[b"k"][1:] == odd[1:]


def test_more_keys_than_one_statement_takes() -> None:
    with ScoreCache(None) as cache:
        cache.put(many(1234))
        found = cache.get(list(many(1300)))
    assert {key: r.numbers.tolist() for key, r in found.items()} == {
        k: r.numbers.tolist() for k, r in many(1234).items()
    }


def test_a_batch_is_kept_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "scores.sqlite"
    with ScoreCache(path) as cache:
        cache.put({b"a": record(1.0)})
        with pytest.raises(AttributeError):
            cache.put({b"b": record(2.0), b"c": None})  # type: ignore[dict-item]
        # What a killed process leaves: the file is never closed.
        with ScoreCache(path) as other:
            assert other.get([b"a", b"b"]).keys() == {b"a"}
            other.put({b"d": record(3.0)})
        assert cache.get([b"d"])[b"d"].numbers.tolist() == [3.0]


def test_two_studies_may_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "scores.sqlite"
    failures = []

    def write(start: int) -> None:
        try:
            with ScoreCache(path) as cache:
                for i in range(start, start + 40):
                    cache.put({i.to_bytes(4, "big"): record(i)})
        except Exception as error:  # told by the assertion below
            failures.append(error)

    threads = [threading.Thread(target=write, args=(100 * k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    with ScoreCache(path) as cache:
        assert len(cache) == 120


def whole_file(path: Path) -> bytes:
    with ScoreCache(path) as cache:
        cache.put(many(2000))
    return path.read_bytes()


@pytest.mark.parametrize("keep", [100, 5000, 50_000])
def test_a_file_that_was_cut_says_to_delete_it(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "scores.sqlite"
    path.write_bytes(whole_file(path)[:keep])
    with pytest.raises(FormatError, match=r"scores\.sqlite: not whole .*Delete the file, or pass another one"), \
            ScoreCache(path) as cache:  # fmt: skip
        cache.get(list(many(2000)))


def test_a_changed_number_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "scores.sqlite"
    with ScoreCache(path) as cache:
        cache.put({b"a": record(1.0), b"b": record(2.0)})
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE scores SET numbers = ? WHERE key = ?", (np.array([7.0]).tobytes(), b"a"))
    connection.close()
    with ScoreCache(path) as cache:
        assert cache.get([b"b"])[b"b"].numbers.tolist() == [2.0]
        with pytest.raises(FormatError, match="does not match its digest"):
            cache.get([b"a"])


def test_other_files_are_refused_and_left_alone(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("not a database, but somebody's notes " * 100)
    with pytest.raises(FormatError, match="not whole"):
        ScoreCache(text)
    assert text.read_text().startswith("not a database")
    foreign = tmp_path / "mail.sqlite"
    with sqlite3.connect(foreign) as connection:
        connection.execute("CREATE TABLE mail (body TEXT)")
    connection.close()
    with pytest.raises(FormatError, match=r"mail\.sqlite is the database of another program"):
        ScoreCache(foreign)
    newer = tmp_path / "newer.sqlite"
    ScoreCache(newer).close()
    with sqlite3.connect(newer) as connection:
        connection.execute("PRAGMA user_version = 9")
    connection.close()
    with pytest.raises(FormatError, match="written in format 9, this version reads 1"):
        ScoreCache(newer)
    with pytest.raises(SaveError, match="no folder"):
        ScoreCache(tmp_path / "none" / "scores.sqlite")
    with pytest.raises(SaveError, match="unable to open"):
        ScoreCache(tmp_path)
