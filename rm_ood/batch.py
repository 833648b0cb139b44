"""Verdicts on a whole file: read, check in windows, write rows as they come."""

from __future__ import annotations

import gzip
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from tqdm.auto import tqdm

from rm_ood.channels import Channel
from rm_ood.errors import OODGuardWarning, SaveError
from rm_ood.fitting import WINDOW_BATCHES, KeySet, windows
from rm_ood.guard import OODGuard
from rm_ood.preferences import Item, named_items, stable_hash
from rm_ood.rows import dataset_length, iter_rows


def check_file(guard: OODGuard, dataset: Any, output: str, *, progress: bool = True) -> dict[str, Any]:
    """Check every row of a dataset and write one JSON object per verdict.

    A row with one response gives one verdict under the row's id (its own, or its number); a preference row gives one per
    response, `id#chosen` and `id#rejected`. Verdicts are in the order of the data; a warning tells of ids that are not distinct.

    Args:
        guard: a calibrated guard with its model.
        dataset: rows or a path (see `rm_ood.preferences`).
        output: JSON Lines file, gzip where it ends in `.gz`, or `-` for stdout. Written whole or not at all.
        progress: show a progress bar on stderr.
    Returns:
        Counts: items, and flagged items in all and by axis.
    Raises:
        InputError: an unusable row; the file is then not written.
        SaveError: the disk refuses.
    """
    c, reader = guard.config, guard.config.reader(labelled=False)
    flagged = dict.fromkeys(("combined", *judged_axes(guard)), 0)
    count = 0
    seen, repeated = KeySet(), ""
    with (
        _replacing(output) as out,
        tqdm(total=dataset_length(dataset), desc="check", unit="row", disable=not progress) as bar,
    ):
        for window in windows(named_items(iter_rows(dataset), reader, bar.update), c.batch_size * WINDOW_BATCHES):
            for name, item in window:
                # JSON may hold half a surrogate pair.
                if not seen.add(stable_hash(ascii(name))):
                    repeated = repeated or item.where
            for row in verdict_rows(guard, window):
                out.write(json.dumps(row, allow_nan=False) + "\n")
                flagged["combined"] += row["is_ood"]
                for axis, verdict in row["axes"].items():
                    flagged[axis] += verdict["is_ood"]
            count += len(window)
    if repeated:
        warnings.warn(
            f"{count - len(seen)} verdicts have the id of an earlier one, the first of them that of {repeated} (a row without "
            "an id has its number). They are in the order of the data; to tell them apart by their ids, give each row its own",
            OODGuardWarning,
            stacklevel=2,
        )
    return {"items": count, "flagged": flagged, "alpha": c.alpha, "output": output}


def judged_axes(guard: OODGuard) -> list[str]:
    """The axes that a verdict of this guard has."""
    c = guard.config
    return [axis for axis in c.axes if any(Channel.parse(name).axis == axis for name in c.joined)]


def verdict_rows(guard: OODGuard, window: Sequence[tuple[str, Item]]) -> list[dict[str, Any]]:
    """The rows that `rm-ood check` writes for some items with their ids."""
    items = [item for _, item in window]
    groups = None if guard.config.group_column is None else [str(item.group) for item in items]
    # A message is one answer in a list of its own.
    responses = [i.response if isinstance(i.response, str) else [i.response] for i in items]
    decisions = guard.check([i.prompt for i in items], responses, groups=groups)
    return [{"id": name, **decision.to_dict()} for (name, _), decision in zip(window, decisions, strict=True)]


@contextmanager
def _replacing(output: str) -> Iterator[IO[str]]:
    """A text stream to stdout, or to a temporary file that takes the name of `output` at the end."""
    if output == "-":
        yield sys.stdout
        return
    target = Path(output).resolve()
    opener: Any = gzip.open if target.suffix == ".gz" else open
    if target.exists() and not target.is_file():
        # A pipe or a device is written to, never replaced.
        with opener(target, "wt", encoding="utf-8") as stream:
            yield stream
        return
    try:
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    except OSError as error:
        raise SaveError(f"cannot write {output}: {error.strerror}. Choose another --output.") from error
    try:
        os.close(handle)
        with opener(temporary, "wt", encoding="utf-8") as stream:
            yield stream
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, target)
    finally:
        Path(temporary).unlink(missing_ok=True)
