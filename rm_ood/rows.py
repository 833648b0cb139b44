"""Where rows come from: lists, data sets, iterables, JSON, JSON Lines and Parquet files, one pass each."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from rm_ood.errors import InputError

# Bytes that are read at once for a digest.
_PIECE = 2**20


def iter_rows(dataset: Any) -> Iterator[Mapping[str, Any]]:
    """The rows of a dataset in any accepted form, one pass, without asking for its length.

    Raises:
        FileNotFoundError: a path that does not exist.
        InputError: a form that is not known, a file that is not UTF-8 JSON Lines, a row that is not a mapping.
    """
    if isinstance(dataset, (str, os.PathLike)):
        rows: Iterable[Any] = _iter_file(Path(dataset))
    elif isinstance(dataset, Mapping):
        if not hasattr(dataset, "column_names"):
            raise InputError(
                "dataset: expected rows, got a mapping of columns or splits. "
                f"Pass one split or a list of dicts (keys here: {sorted(map(str, dataset))[:10]})."
            )
        raise InputError(f"dataset: got several splits {sorted(map(str, dataset))}. Pass one of them.")
    elif isinstance(dataset, Iterable):
        rows = dataset
    else:
        raise InputError(
            f"dataset: expected rows (list of dicts, datasets.Dataset, iterable) or a path, got {type(dataset).__name__}"
        )
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise InputError(f"rows[{number}]: expected a mapping of columns, got {type(row).__name__}")
        yield row


@dataclass(frozen=True)
class NumberedRows:
    """Some of the rows of a source, each with its number there: what an error about a row names, whoever reads them.

    Attributes:
        pairs: (number, row), one pass.
    """

    pairs: Iterable[tuple[int, Mapping[str, Any]]]


def numbered_rows(dataset: Any) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The rows of a dataset with their numbers in the user's own source. Accepts and raises as `iter_rows`."""
    yield from dataset.pairs if isinstance(dataset, NumberedRows) else enumerate(iter_rows(dataset))


def is_one_pass(dataset: Any) -> bool:
    """Whether the rows can be read only once, as those of a generator."""
    rows = dataset.pairs if isinstance(dataset, NumberedRows) else dataset
    return isinstance(rows, Iterator)


def data_digest(dataset: Any, beat: Callable[[], None] = lambda: None) -> str:
    """SHA-256 of a file's bytes, or of every row in its order; empty for what can be read only once, or is not there.

    Args:
        beat: called now and then, to show that the reading is getting on.
    """
    sha = hashlib.sha256()
    if isinstance(dataset, (str, os.PathLike)):
        path = Path(dataset)
        if not path.is_file():
            return ""
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                sha.update(piece)
                beat()
        return sha.hexdigest()
    rows = dataset.pairs if isinstance(dataset, NumberedRows) else dataset
    if is_one_pass(rows) or isinstance(rows, Mapping) or not isinstance(rows, Iterable):
        return ""
    for row in rows:
        sha.update(row_bytes(row))
        beat()
    return sha.hexdigest()


def data_glance(dataset: Any) -> str:
    """What tells most data apart without reading them: a file's size, or the number of rows and the first; empty where
    that takes a pass."""
    if isinstance(dataset, (str, os.PathLike)):
        path = Path(dataset)
        return f"{path.stat().st_size} bytes" if path.is_file() else ""
    rows = dataset.pairs if isinstance(dataset, NumberedRows) else dataset
    length = dataset_length(rows)
    if length is None or isinstance(rows, Mapping) or not isinstance(rows, Iterable):
        return ""
    first = hashlib.sha256(row_bytes(next(iter(rows), None))).hexdigest()
    return f"{length} rows, {first}"


def row_bytes(row: Any) -> bytes:
    """A row, or any plain value, as bytes that are the same in every process, and end where the next one's begin."""
    return json.dumps(row, default=repr).encode() + b"\n"


def dataset_length(dataset: Any) -> int | None:
    """Number of rows where the source knows it."""
    return len(dataset) if hasattr(dataset, "__len__") and not isinstance(dataset, (str, os.PathLike)) else None


def _iter_file(path: Path) -> Iterator[Any]:
    if not path.exists():
        raise FileNotFoundError(
            f"no data file at {path}. Pass JSON Lines (.jsonl, .jsonl.gz), Parquet, or a datasets.Dataset; "
            "a dataset on the Hub has to be loaded with datasets.load_dataset first (the command line does it for --data ID)."
        )
    if path.is_dir():
        raise InputError(f"{path} is a folder: pass one JSON Lines or Parquet file of it")
    if path.suffix == ".parquet":
        yield from _iter_parquet(path)
        return
    if path.suffix == ".json" and (listed := _listed(path)) is not None:
        yield from listed
        return
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
        number = 0
        while line := _next_line(cast(IO[bytes], lines), path.name, number):
            number += 1
            if line.strip():
                yield _parse_line(path.name, number, line)


def _listed(path: Path) -> list[Any] | None:
    """The rows of a file that is one JSON list; None where each line is an object of its own."""
    content = path.read_bytes()
    if not content.lstrip().startswith(b"["):
        return None
    try:
        return list(json.loads(content))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path.name}: not a whole JSON list ({type(error).__name__})") from error


def _next_line(lines: IO[bytes], name: str, number: int) -> bytes:
    try:
        return lines.readline()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{name}: not a whole gzip file (it breaks after line {number}). Copy it again.") from error


def _iter_parquet(path: Path) -> Iterator[Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f"{path.name}: reading Parquet needs pyarrow: pip install 'rm_ood[data]'") from error
    with path.open("rb") as source:
        try:
            batches = pyarrow.parquet.ParquetFile(source).iter_batches(batch_size=1024)
            while (batch := next(batches, None)) is not None:
                yield from batch.to_pylist()
        except (pyarrow.ArrowInvalid, pyarrow.ArrowIOError) as error:
            raise InputError(f"{path.name}: not a whole Parquet file. Copy it again.") from error


def _parse_line(name: str, number: int, line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{name} line {number}: not UTF-8 (byte {error.start} of the line)") from error
    except (ValueError, RecursionError) as error:
        detail = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
        raise InputError(f"{name} line {number}: not JSON ({detail}). Each line has to hold one object.") from error
