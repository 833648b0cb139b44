"""Verdicts on Parquet files by a pool of actors: `python -m rm_ood.ray_data check ...`, the rows of `rm-ood check`.

Each actor loads the reward model and its guard once. Rows come out in no promised order, so each needs an id of its own.
In a pipeline of one's own: `verdicts(dataset, guard="guard", model="my-reward-model")`.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rm_ood import commands, errors
from rm_ood.batch import judged_axes, verdict_rows
from rm_ood.channels import Channel
from rm_ood.cli import add_command, amount, carry_out, guard_arguments, whole_number
from rm_ood.errors import InputError, SaveError, WorkerError
from rm_ood.fitting import WINDOW_BATCHES
from rm_ood.guard import OODGuard
from rm_ood.preferences import Item, names
from rm_ood.reward_model import load_reward_model

# Verdicts in a file of the output, about.
_ROWS_PER_FILE = 100_000


class Scorer:
    """One actor: a guard on its reward model, for batches of rows.

    Args:
        guard, model: folders or Hub ids. model_options: as for `load_reward_model`.
        id_column: the column with each row's own id.
        options: as for `OODGuard.from_pretrained`.
    """

    def __init__(
        self,
        guard: str,
        model: str,
        model_options: Mapping[str, Any],
        id_column: str,
        options: Mapping[str, Any],
    ) -> None:
        self.guard = OODGuard.from_pretrained(guard, *load_reward_model(model, **model_options), **options)
        self.reader = self.guard.config.reader(labelled=False)
        self.id_column = id_column
        self.schema = schema(self.guard)

    def __call__(self, batch: Any) -> Any:
        """An Arrow table of rows to one of verdicts.

        Raises:
            InputError: a row that cannot be used; names its id.
        """
        import pyarrow

        window: list[tuple[str, Item]] = []
        for row in batch.to_pylist():
            name = row.get(self.id_column)
            if name is None:
                raise InputError(f"a row without an id: column {self.id_column!r} is null")
            row = {key: value for key, value in row.items() if key != self.id_column} | {"id": name}
            window += names(self.reader.items(row, 0, f"rows[id={name}]"))
        return pyarrow.Table.from_pylist(verdict_rows(self.guard, window) if window else [], self.schema)


def schema(guard: OODGuard) -> Any:
    """The Arrow schema of verdicts: the nested columns of `rm-ood check`'s rows, whatever a batch holds of them."""
    import pyarrow as pa

    number, flag = pa.float64(), pa.bool_()
    channel = [("score", number), ("ood_score", number), ("p_value", number), ("class_scores", pa.list_(number))]
    axes = []
    for axis in judged_axes(guard):
        channels = [name for name in guard.state.channel_names if Channel.parse(name).axis == axis]
        nested = pa.struct([(name, pa.struct(channel)) for name in channels])
        fields = [("ood_score", number), ("p_value", number), ("is_ood", flag), ("channels", nested)]
        axes.append((axis, pa.struct(fields)))
    return pa.schema(
        [
            ("id", pa.string()),
            ("reward", number),
            ("is_ood", flag),
            ("p_value", number),
            ("axes", pa.struct(axes)),
            ("nearest_class", pa.string()),
            ("class_log_odds", number),
            ("reasons", pa.list_(pa.string())),
            ("truncated", flag),
        ]
    )


def verdicts(
    dataset: Any,
    *,
    guard: str,
    model: str,
    actors: int | tuple[int, int] = 1,
    gpus: float = 0,
    cpus: float | None = None,
    batch_size: int | None = None,
    id_column: str = "id",
    model_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """A Ray data set of rows to one of verdicts, lazily.

    Args:
        dataset: rows as `rm-ood check` takes them, each with an id of its own (`check_parquet` looks, this does not).
        guard, model: folders or Hub ids that every machine sees.
        actors: how many, or the least and the most. gpus: of each.
        cpus: of each; by default 1, or as much less as leaves one of the cluster's to read and write with.
        batch_size: rows that an actor gets at once and sorts by length. The forwards are of the guard's own batch size.
        id_column: the column with the ids.
        model_options: of `load_reward_model`. options: of `OODGuard.from_pretrained`.
    Raises:
        InputError: no such column, or too many CPUs are asked for.
        FileNotFoundError, FormatError, IntegrityError: the guard cannot be read.
    """
    import ray
    import ray.data

    columns = dataset.columns() or []
    if id_column not in columns:
        raise InputError(
            f"no column {id_column!r} (columns: {sorted(columns)[:20]}): verdicts come in any order, so every row needs an id "
            "of its own. Add one, or name it with --id-column"
        )
    saved = OODGuard.from_pretrained(guard)
    arguments = {
        "guard": guard,
        "model": model,
        "model_options": dict(model_options or {}),
        "id_column": id_column,
        "options": options,
    }
    low, high = (actors, actors) if isinstance(actors, int) else actors
    if not 1 <= low <= high or (batch_size is not None and batch_size < 1):
        raise InputError(
            f"actors={actors}, batch_size={batch_size}: expected at least 1 actor, no more of them at most than at least, and "
            "at least 1 row in a batch"
        )
    total = float(ray.cluster_resources().get("CPU", 1))
    cpus = min(1.0, max(total - 1, 0.5) / high) if cpus is None else cpus
    if low * cpus >= total:
        raise InputError(
            f"{low} actors of {cpus:g} CPUs leave none of the cluster's {total:g} to read and write with: Ray would wait for "
            "ever. Take fewer actors, or a share of a CPU for each (--cpus-per-actor)"
        )
    size = saved.config.batch_size * WINDOW_BATCHES if batch_size is None else batch_size
    # Ray cuts batches at the borders of blocks, and makes blocks of so many bytes: a few for hours of work.
    return dataset.repartition(target_num_rows_per_block=size).map_batches(
        Scorer,
        fn_constructor_kwargs=arguments,
        compute=ray.data.ActorPoolStrategy(min_size=low, max_size=high),
        batch_size=size,
        batch_format="pyarrow",
        num_gpus=gpus,
        num_cpus=cpus,
    )


def check_parquet(data: str, output: str, *, overwrite: bool = False, **options: Any) -> dict[str, Any]:
    """Check every row of Parquet files and write the verdicts as a folder of Parquet files.

    Args:
        data: a file, a folder or a pattern; local, or of a file system that Arrow knows (`s3://...`).
        output: the folder. A local one appears when it is whole; elsewhere the files appear one by one.
        overwrite: replace a folder that is there.
        options: as for `verdicts`.
    Returns:
        Counts as of `rm-ood check`: items, and flagged items in all and by axis.
    Raises:
        InputError: an unusable row, or two with one id. SaveError: the folder is there. WorkerError: an actor died.
    """
    import ray.data

    axes = judged_axes(OODGuard.from_pretrained(options["guard"]))
    with _failures(), _whole(output, overwrite, data) as target:
        rows = ray.data.read_parquet(data)
        checked = verdicts(rows, **options)
        _check_ids(rows, options.get("id_column", "id"))
        checked.write_parquet(target, min_rows_per_file=_ROWS_PER_FILE)
    return {**_counts(output, axes), "output": output}


def _check_ids(dataset: Any, column: str) -> None:
    """Read the ids, and keep eight bytes of each.

    Raises:
        InputError: two rows have one id; names it.
    """
    import numpy as np
    from pandas.util import hash_array

    def hashed() -> Iterator[tuple[Any, Any]]:
        for batch in dataset.select_columns([column]).iter_batches(batch_format="pyarrow", batch_size=_ROWS_PER_FILE):
            # One that is null is refused by who reads the row.
            ids = np.array([str(name) for name in batch[column].to_pylist() if name is not None], dtype=object)
            yield ids, hash_array(ids, categorize=False)

    sorted_ = np.sort(np.concatenate([np.empty(0, np.uint64), *(hashes for _, hashes in hashed())]))
    repeated = sorted_[1:][sorted_[1:] == sorted_[:-1]]
    if len(repeated):
        names = (ids[hashes == repeated[0]] for ids, hashes in hashed())
        name = next(found[0] for found in names if len(found))
        raise InputError(
            f"rows[id={name}]: another row has this id, and verdicts come in any order: nobody could tell which is whose. Give "
            "each row an id of its own, or name another column with --id-column"
        )


def _counts(folder: str, axes: Sequence[str]) -> dict[str, Any]:
    import pyarrow.compute
    import pyarrow.dataset

    field = pyarrow.compute.field
    columns = {"combined": field("is_ood"), **{axis: field("axes", axis, "is_ood") for axis in axes}}
    count, flagged = 0, dict.fromkeys(columns, 0)
    for batch in pyarrow.dataset.dataset(folder, format="parquet").to_batches(columns=columns):
        count += batch.num_rows
        for name in columns:
            flagged[name] += batch.column(name).true_count
    return {"items": count, "flagged": flagged}


@contextmanager
def _whole(output: str, overwrite: bool, data: str) -> Iterator[str]:
    """Where to write; a local folder gets its name at the end, in place of one of Parquet files that are not the data."""
    if "://" in output:
        yield output
        return
    target = Path(output).resolve()
    if target.exists() and not overwrite:
        raise SaveError(f"{output} is there already: pass --overwrite to replace it, or another --output")
    if target.exists():
        if not target.is_dir() or any(not file.is_file() or file.suffix != ".parquet" for file in target.iterdir()):
            raise SaveError(
                f"{output} is no folder of Parquet files alone, which --overwrite replaces: pass another --output"
            )
        source = Path(data).resolve()
        if "://" not in data and (source == target or target in source.parents):
            raise SaveError(f"{output} holds the data, which --overwrite would delete: pass another --output")
    temporary, old = (target.with_name(f".{target.name}.{secrets.token_hex(8)}") for _ in range(2))
    try:
        # Of no rows Ray writes no folder.
        temporary.mkdir(parents=True)
        yield str(temporary)
        if target.is_dir():
            os.replace(target, old)
        os.replace(temporary, target)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _failures() -> Iterator[None]:
    """An actor's own error instead of Ray's account of it."""
    from ray.exceptions import RayError

    try:
        yield
    except RayError as error:
        # What was raised in another process comes back as text.
        told = re.findall(r"^rm_ood\.errors\.(\w+): (.*)$", str(error), re.MULTILINE)
        if told:
            name, message = told[-1]
            raise getattr(errors, name)(message) from None
        last = str(error).strip().splitlines()[-1:]
        raise WorkerError(f"an actor failed: {type(error).__name__}: {' '.join(last)[:500]}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    arguments = _parser().parse_args(argv)
    return carry_out(f"rm_ood.ray_data {arguments.command}", arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m rm_ood.ray_data", description="What rm-ood does, by a pool of Ray actors."
    )
    parsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    check = add_command(
        parsers, "check", _check, "reward and verdict of every row of Parquet files",
        """
        python -m rm_ood.ray_data check --guard guard --model my-reward-model --data answers.parquet --output verdicts
        python -m rm_ood.ray_data check --guard guard --model my-reward-model --data answers/ --output verdicts \\
            --address auto --actors 8
        """,
    )  # fmt: skip
    guard_arguments(check)
    add = check.add_argument
    add("--data", required=True, metavar="PARQUET", help="a file or folder: prompt and response, or preference rows")
    add("--output", required=True, metavar="DIR", help="folder of Parquet files with the verdicts")
    add("--overwrite", action="store_true", help="replace a folder that is there")
    add("--id-column", default="id", metavar="NAME", help="column with each row's own id (default: %(default)s)")
    add("--actors", type=whole_number, default=1, metavar="N", help="reward models side by side (default: %(default)s)")
    add("--gpus-per-actor", type=partial(amount, zero=True), metavar="X", help="default: 1 where the cluster has GPUs")
    add("--cpus-per-actor", type=amount, metavar="X", help="default: 1, or as much less as leaves one to read with")
    add(
        "--batch-size", type=whole_number, metavar="N", help="rows that an actor sorts by length at once (default: 512)"
    )
    add("--address", help="a Ray cluster, such as auto; default: RAY_ADDRESS, or one on this machine")
    return parser


def _check(a: argparse.Namespace) -> dict[str, Any]:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise InputError(f"this needs {error.name}: pip install 'rm_ood[ray]'") from error

    started = not ray.is_initialized()
    if started:
        ray.init(address=a.address, include_dashboard=False, logging_level=logging.WARNING)
    try:
        ray.data.DataContext.get_current().enable_progress_bars = a.progress
        if not a.progress:
            logging.getLogger("ray.data").setLevel(logging.WARNING)
        has_gpu = ray.cluster_resources().get("GPU", 0) >= 1
        gpus = float(has_gpu) if a.gpus_per_actor is None else a.gpus_per_actor
        summary = check_parquet(
            a.data,
            a.output,
            overwrite=a.overwrite,
            guard=a.guard,
            model=a.model,
            actors=a.actors,
            gpus=gpus,
            cpus=a.cpus_per_actor,
            batch_size=a.batch_size,
            id_column=a.id_column,
            model_options=commands.model_options(a),
            allow_dtype_change=a.allow_dtype_change,
        )
    finally:
        if started:
            ray.shutdown()
    flagged = ", ".join(f"{axis} {count}" for axis, count in summary["flagged"].items())
    return {"json": summary, "text": f"{summary['items']} items, flagged: {flagged}; rows in {a.output}"}


if __name__ == "__main__":
    sys.exit(main())
