"""Who does a pass over the data: one process here; `rm_ood.gang` has several. Finished shards can be kept as files.

The fit runs the same code either way; what is different is in `Workers.collect`, `Workers.total` and `Workers.from_first`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from rm_ood.artifact import seal, unseal
from rm_ood.atomic import remove_temporaries, sync_folder, write_temporary
from rm_ood.collected import Collected, Saved, Shard
from rm_ood.errors import InputError, MismatchError, SaveError
from rm_ood.fitting import FitMoments

_KIND = "rm_ood shard"
T = TypeVar("T")


class ShardFolder:
    """Finished shards as files: `fit-00003-of-00008.safetensors`. They hold up to 4,000 texts of the fit data each.

    Args:
        path: made if missing; one that every process sees.
        resume: take the shards that are there; else it is an error that there are some.
    """

    def __init__(self, path: str | os.PathLike[str], *, resume: bool = False) -> None:
        self.path = Path(path)
        self.resume = resume

    def finished(self, stage: str, count: int, among: Iterable[int] | None = None) -> list[int]:
        """Shards of a stage that are there.

        Args:
            among: look for these; None is all.
        Raises:
            SaveError: there are some, and none are to be taken.
        """
        wanted = range(count) if among is None else among
        found = [i for i in wanted if self._file(stage, Shard(i, count)).exists()]
        if found and not self.resume:
            raise SaveError(
                f"{self.path} holds finished {stage} shards, {len(found)} of {count}: pass --resume to take them, or another "
                "folder"
            )
        return found

    def save(self, stage: str, shard: Shard, task: Mapping[str, str], part: Collected) -> None:
        """Write a finished shard, whole or not at all.

        Raises:
            SaveError: the disk refuses.
        """
        tensors, config = part.to_saved()
        data = seal(tensors, {"kind": _KIND, "task": dict(task), "collected": config})
        file = self._file(stage, shard)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with contextlib.ExitStack() as cleanup:
                remove_temporaries(self.path, file.name)
                os.replace(write_temporary(self.path, file.name, data, cleanup), file)
            sync_folder(self.path)
        except OSError as error:
            raise SaveError(f"shard not saved to {file}: {error.strerror or type(error).__name__}") from error

    def load(self, stage: str, shard: Shard, task: Mapping[str, str], empty: Collected) -> Collected:
        """A finished shard, put into an empty object of the same settings.

        Raises:
            MismatchError: it is of other data, another model or other settings; names which.
            IntegrityError, FormatError: cut, changed, or something else.
        """
        file = self._file(stage, shard)
        tensors, config = unseal(file.read_bytes(), str(file))
        if config.get("kind") != _KIND:
            raise MismatchError(f"{file} is no shard of a fit: choose another folder")
        other = sorted(name for name, digest in task.items() if config["task"].get(name) != digest)
        if other:
            raise MismatchError(
                f"{file} was made with other {', '.join(other)}: --resume goes on with the same data, reward model, settings "
                "and version; choose another folder, or delete it"
            )
        empty.load(tensors, config["collected"])
        return empty

    def _file(self, stage: str, shard: Shard) -> Path:
        return self.path / f"{stage}-{shard.index:05d}-of-{shard.count:05d}.safetensors"


class Workers:
    """The one process that does everything.

    Args:
        shards: into how many parts the prompts are split; None is one for each process.
        folder: where finished shards are kept, and taken from; None keeps none.

    Attributes:
        rank: number of this process, from 0. size: of how many.
    """

    rank, size = 0, 1

    def __init__(self, *, shards: int | None = None, folder: ShardFolder | None = None) -> None:
        if shards is not None and shards < 1:
            raise InputError(f"shards={shards}: expected at least 1")
        self.shards = shards
        self.folder = folder

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that fits, warns and saves."""
        return self.rank == 0

    @property
    def count(self) -> int:
        """Number of shards."""
        return self.size if self.shards is None else self.shards

    def beat(self) -> None:
        """Tell the others that this process is getting on, and hear whether they are."""

    def agree(self, facts: Mapping[str, str]) -> None:
        """Make sure that all processes have the same digests; an empty one is not known, and agrees with any.

        Raises:
            MismatchError: on all of them.
        """

    def collect(
        self,
        stage: str,
        task: Callable[[], Mapping[str, str]],
        empty: Callable[[], Collected],
        one: Callable[[Shard], Collected],
        *,
        again: bool,
    ) -> Collected:
        """Everything that the pass over all shards leaves; on other processes than the first only what they go on with.

        Args:
            stage: `fit` or `calibrate`. task: gives the digests of what the shards are made from.
            empty: makes what `one` fills. one: does the pass over a shard.
            again: whether the data can be read more than once.
        """
        finished = self.finished(stage)
        missing = [i for i in range(self.count) if i not in finished]
        digests = {} if self.folder is None else task()
        return self._merged(stage, digests, empty, one, finished, missing, again)

    def finished(self, stage: str) -> list[int]:
        """Shards that are files already."""
        return [] if self.folder is None else self.folder.finished(stage, self.count)

    def _merged(
        self,
        stage: str,
        task: Mapping[str, str],
        empty: Callable[[], Collected],
        one: Callable[[Shard], Collected],
        finished: Sequence[int],
        missing: Sequence[int],
        again: bool,
    ) -> Collected:
        """Own shards, some from files, some by a pass each."""
        if len(missing) > 1 and not again:
            raise InputError(
                f"{len(missing)} shards for one process, of data that can be read only once: pass a path, a list or a Dataset, "
                "or as many processes as shards"
            )
        whole: Collected | None = None
        for index in sorted((*finished, *missing)):
            shard = Shard(index, self.count)
            if index in missing:
                part = one(shard)
                if self.folder is not None:
                    self.folder.save(stage, shard, task, part)
            else:
                part = self._folder().load(stage, shard, task, empty())
            whole = part if whole is None else whole
            if part is not whole:
                whole.merge(part)
            self.beat()
        return empty() if whole is None else whole

    def _folder(self) -> ShardFolder:
        if self.folder is None:
            raise InputError("no folder of finished shards was given")
        return self.folder

    def total(self, moments: FitMoments) -> FitMoments:
        """The sum over all processes, on each."""
        return moments

    def from_first(self, make: Callable[[], T], pack: Callable[[T], Saved], unpack: Callable[..., T]) -> T:
        """What the first process makes, on each; an error there ends all of them.

        Args:
            pack, unpack: to and from tensors and JSON-able settings.
        """
        return make()


ALONE = Workers()
