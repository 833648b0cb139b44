"""Several processes over `torch.distributed` that share one pass over the data.

Inside the loop over the data nothing is exchanged but a sign of life in the group's key-value store. When all shards are
done the moments are summed in one reduction, and the first process gets the draws and counts as tensors and JSON; nothing
is pickled. A process that fails says so in the store, and one that dies falls silent: either ends the others.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rm_ood.artifact import seal, unseal
from rm_ood.collected import Collected, Saved, Shard, named_moments
from rm_ood.errors import InputError, MismatchError, OODGuardError, WorkerError
from rm_ood.fitting import FitMoments
from rm_ood.moments import ClassMoments
from rm_ood.workers import ShardFolder, Workers

TIMEOUT_S = 1800.0
# Seconds between two signs of life, and between two looks at the store while waiting.
_BEAT_S, _POLL_S = 1.0, 0.1
# Bytes sent at once: some back ends count them in 32 bits.
_CHUNK = 2**28
_FAILED = "failed"
T = TypeVar("T")


class Gang(Workers):
    """The processes of a `torch.distributed` group; use it as a context, so that the others hear of an error here.

    Args:
        group: the group; None is the default one.
        store: key-value store that all of them reach; None takes the default group's.
        timeout: seconds without a sign of life after which a process counts as lost; longer than the longest forward, and
            than loading the model takes one process more than another.
        shards, folder: as for `Workers`; the folder has to be one that all of them see.
    """

    def __init__(
        self,
        group: Any = None,
        *,
        store: Any = None,
        timeout: float = TIMEOUT_S,
        shards: int | None = None,
        folder: ShardFolder | None = None,
    ) -> None:
        super().__init__(shards=shards, folder=folder)
        if not dist.is_initialized():
            raise InputError(
                "no process group: start with torchrun and call torch.distributed.init_process_group first"
            )
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.timeout = timeout
        # There is no public way to the store of the default group.
        base = dist.distributed_c10d._get_default_store() if store is None else store
        self._store = dist.PrefixStore("rm_ood", base)  # type: ignore[attr-defined]
        backends = str(dist.get_backend_config(group))
        cuda = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else ""
        self._wire = "cpu" if "cpu:" in backends else cuda
        self._sums = cuda if cuda and "nccl" in backends else "cpu"
        self._meetings = 0
        self._beats, self._told, self._listened = itertools.count(1), -_BEAT_S, time.monotonic()
        self._heard: dict[int, tuple[bytes, float]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, WorkerError):
            # The store may be gone with the process that held it; the error at hand counts.
            try:
                self._store.compare_set(_FAILED, "", f"rank {self.rank} failed: {type(error).__name__}: {error}")
            except RuntimeError:
                return

    def beat(self) -> None:
        now = time.monotonic()
        if now - self._told < _BEAT_S:
            return
        self._told = now
        with self._storing():
            self._store.set(f"beat/{self.rank}", str(next(self._beats)))
            if self._store.check([_FAILED]):
                raise WorkerError(f"rank {self.rank} stopped: {self._store.get(_FAILED).decode()}")
            if now - self._listened >= self.timeout / 10:
                self._listened = now
                self._listen(now)

    def agree(self, facts: Mapping[str, str]) -> None:
        self._heard = {}
        said = [json.loads(other) for other in self._meet(json.dumps(facts))]
        for other, theirs in enumerate(said):
            known = {k: (v, theirs.get(k, "")) for k, v in said[0].items()}
            differing = sorted(k for k, (v, w) in known.items() if "" not in (v, w) and v != w)
            if differing:
                raise MismatchError(
                    f"rank {other} has other {', '.join(differing)} than rank 0: every process needs the same data, reward "
                    "model, settings and version of rm_ood"
                )

    def collect(
        self,
        stage: str,
        task: Callable[[], Mapping[str, str]],
        empty: Callable[[], Collected],
        one: Callable[[Shard], Collected],
        *,
        again: bool,
    ) -> Collected:
        digests = task()
        self.agree({**digests, "number of shards": str(self.count)})
        # One list for all: a shard may be finished while others still look.
        found = json.loads(self._meet(json.dumps(self.finished(stage)) if self.is_first else "")[0])
        missing = [i for i in range(self.count) if i not in found]
        mine = (found[self.rank :: self.size], missing[self.rank :: self.size])
        whole = self._merged(stage, digests, empty, one, *mine, again)
        self.agree({"rows": whole.rows_digest, "text format": whole.text_format or ""})
        whole.moments = self.total(whole.moments)
        with self._together("gathering the draws"):
            for draw in (whole.reservoir, whole.copies.drawn):
                keys = self._all(json.dumps(draw.keys()).encode())
                draw.outlive([key for other in keys for key in json.loads(other)])
            received = self._to_first(seal(*whole.to_saved(with_moments=False)))
        for rank, data in enumerate(received, start=1):
            other = empty()
            other.load(*unseal(data, f"rank {rank}"))
            whole.merge(other)
        with self._together("sending what is copied"):
            about = json.loads(self._broadcast(whole.drawn_copies() if self.is_first else b""))
        whole.take_copies(about)
        return whole

    def total(self, moments: FitMoments) -> FitMoments:
        """The sum over all processes; one without data takes part with zeros.

        Raises:
            MismatchError: channels or widths differ. WorkerError: another process ended.
        """
        own = {(kind, name): part for kind, name, part in named_moments(moments)}
        shapes = [[*key, part.n_features, part.n_classes] for key, part in own.items()]
        said = [json.loads(other) for other in self._meet(json.dumps(shapes))]
        longest = max(said, key=len)
        if any(other != longest and len(other) > 1 for other in said):
            raise MismatchError(f"the processes have vectors of different channels or widths: {said[:4]}")
        whole = FitMoments(moments.n_classes, moments.normalised)
        with self._together("summing the moments"):
            for kind, name, d, k in longest:
                part = ClassMoments(d, k, device=self._sums)
                if (kind, name) in own:
                    part.merge(own.pop((kind, name)))
                part.all_reduce(self.group)
                if kind == "reward":
                    whole.reward = part
                else:
                    getattr(whole, kind)[name] = part
                self.beat()
        return whole

    def from_first(self, make: Callable[[], T], pack: Callable[[T], Saved], unpack: Callable[..., T]) -> T:
        made, data = None, b""
        if self.is_first:
            with self._working():
                made = make()
                data = seal(*pack(made))
        # A meeting first: who waits in a broadcast hears of no failure.
        self._meet("")
        with self._together("sending the result"):
            data = self._broadcast(data)
        return unpack(*unseal(data, "rank 0")) if made is None else made

    # -- the store

    @contextmanager
    def _storing(self) -> Iterator[None]:
        try:
            yield
        except OODGuardError:
            raise
        except RuntimeError as error:
            raise WorkerError(
                f"rank {self.rank} lost the store of the process group ({type(error).__name__}): the process that holds it ended"
            ) from error

    def _meet(self, said: str) -> list[bytes]:
        """What every process says at this meeting, by rank; bounded by their failure or silence."""
        self._meetings += 1
        keys = [f"{self._meetings}/{rank}" for rank in range(self.size)]
        with self._storing():
            self._store.set(keys[self.rank], said)
            wait = _POLL_S / 10
            while not self._store.check(keys):
                try:
                    self.beat()
                except WorkerError:
                    # Once all have come, each learns by itself what another has failed of.
                    if self._store.check(keys):
                        break
                    raise
                time.sleep(wait)
                wait = min(2 * wait, _POLL_S)
            return [self._store.get(key) for key in keys]

    @contextmanager
    def _working(self) -> Iterator[None]:
        """Signs of life by a thread, while this one is in work that cannot stop to give any: others wait for it."""
        done = threading.Event()

        def tell() -> None:
            # Without the store there is nobody to tell; who works learns of it at the next meeting.
            with suppress(RuntimeError):
                while not done.wait(_BEAT_S):
                    self._store.set(f"beat/{self.rank}", str(next(self._beats)))

        teller = threading.Thread(target=tell, name="rm-ood-beat", daemon=True)
        teller.start()
        try:
            yield
        finally:
            done.set()
            teller.join()

    def _listen(self, now: float) -> None:
        """Look for signs of life of the others."""
        for rank in range(self.size):
            key = f"beat/{rank}"
            beat = self._store.get(key) if self._store.check([key]) else b""
            last, since = self._heard.get(rank, (None, now))
            if beat != last:
                self._heard[rank] = (beat, now)
            elif now - since > self.timeout and rank != self.rank:
                raise WorkerError(f"rank {self.rank} stopped: rank {rank} was not heard of for {now - since:.0f} s")

    # -- collectives

    @contextmanager
    def _together(self, what: str) -> Iterator[None]:
        try:
            yield
        except OODGuardError:
            raise
        except RuntimeError as error:
            # The reason may be in the store.
            self._told = -_BEAT_S
            self.beat()
            raise WorkerError(
                f"rank {self.rank}: {what} broke off ({type(error).__name__}): another process ended, or the network did"
            ) from error

    def _broadcast(self, data: bytes, source: int = 0) -> bytes:
        size = torch.tensor([len(data)], dtype=torch.int64, device=self._wire)
        dist.broadcast(size, group=self.group, group_src=source)
        payload = self._buffer(data if self.rank == source else None, int(size))
        for piece in _pieces(payload):
            dist.broadcast(piece, group=self.group, group_src=source)
        return payload.cpu().numpy().tobytes()

    def _all(self, data: bytes) -> list[bytes]:
        return [self._broadcast(data if rank == self.rank else b"", rank) for rank in range(self.size)]

    def _to_first(self, data: bytes) -> list[bytes]:
        """What the others send, by rank, on the first; nothing elsewhere."""
        if not self.is_first:
            dist.send(torch.tensor([len(data)], device=self._wire), group=self.group, group_dst=0)
            for piece in _pieces(self._buffer(data, len(data))):
                dist.send(piece, group=self.group, group_dst=0)
            return []
        received = []
        for rank in range(1, self.size):
            size = torch.zeros(1, dtype=torch.int64, device=self._wire)
            dist.recv(size, group=self.group, group_src=rank)
            payload = self._buffer(None, int(size))
            for piece in _pieces(payload):
                dist.recv(piece, group=self.group, group_src=rank)
            received.append(payload.cpu().numpy().tobytes())
        return received

    def _buffer(self, data: bytes | None, size: int) -> Tensor:
        if data is None or not size:
            return torch.empty(size, dtype=torch.uint8, device=self._wire)
        return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self._wire)


def _pieces(payload: Tensor) -> list[Tensor]:
    """Views of at most `_CHUNK` bytes."""
    return [payload[start : start + _CHUNK] for start in range(0, len(payload), _CHUNK)]


@contextmanager
def joined(
    *,
    device: str | None = None,
    timeout: float = TIMEOUT_S,
    shards: int | None = None,
    folder: ShardFolder | None = None,
) -> Iterator[Gang]:
    """The processes that torchrun started, as a gang; the process group is made, and ended afterwards.

    Args:
        device: where the reward model will be; on `cuda` the moments are summed by NCCL, all else by Gloo.
    Raises:
        WorkerError: the others cannot be reached.
    """
    backend = "cpu:gloo,cuda:nccl" if device is not None and device.startswith("cuda") else "gloo"
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))  # type: ignore[attr-defined]
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("group", store),  # type: ignore[attr-defined]
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout),
        )
    except (RuntimeError, ValueError) as error:
        raise WorkerError(f"the processes did not find each other ({type(error).__name__}: {error})") from error
    try:
        with Gang(store=store, timeout=timeout, shards=shards, folder=folder) as gang:
            yield gang
    finally:
        dist.destroy_process_group()
