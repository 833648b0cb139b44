"""A thread that takes calls one after the other, awaited from the event loop."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")


# What asks a thread to end. Everything else that is no Exception, such as a panic in a library's Rust, is its call's failure.
_ENDS = (SystemExit, KeyboardInterrupt)


class WorkerEnded(Exception):
    """There is no thread any more to make a call in."""


class Worker:
    """One thread, which never keeps the process alive: a call that hangs must not keep a server from ending.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._ended = False
        self._stopped = False
        # Between the look at these and the queue, the thread must not be asked to end: nobody would take the call.
        self._ending = threading.Lock()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    async def run(self, call: Callable[..., T], *args: Any) -> T:
        """The result of `call(*args)`, made in the thread; its exception is raised here.

        A cancelled wait does not stop a call that has begun; one that has not is left out.

        Raises:
            WorkerEnded: the thread has ended or was stopped, or ends in this call.
            RuntimeError: for what is no Exception, of which only SystemExit and KeyboardInterrupt end the thread.
        """
        # A failure holds the frames that it went through: none of them keeps the future, which holds the failure, or both would
        # stay, and what the call was given, until a collection.
        return await self._queued(call, *args)

    def _queued(self, call: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        with self._ending:
            if self._ended or self._stopped:
                raise WorkerEnded
            self._calls.put(partial(self._make, loop, future, call, args))
        return future

    def _make(
        self, loop: asyncio.AbstractEventLoop, future: asyncio.Future[T], call: Callable[..., T], args: tuple[Any, ...]
    ) -> None:
        if future.cancelled():
            return
        result: T | None = None
        failure: Exception | None = None
        try:
            if self._ended:
                failure = WorkerEnded()
            else:
                result = call(*args)
        except Exception as error:
            failure = error
        except _ENDS:
            with self._ending:
                self._ended = True
            failure = WorkerEnded()
            raise
        except BaseException as error:
            # Its message may quote what the call was given.
            failure = RuntimeError(f"the call ended by {type(error).__name__}")
        finally:
            # The loop may have ended while the call ran.
            if not loop.is_closed():
                loop.call_soon_threadsafe(_settle, future, result, failure)
            del future, result, failure

    def stop(self) -> None:
        """Let the thread end after the calls that wait for it."""
        with self._ending:
            self._stopped = True
            self._calls.put(None)

    @property
    def alive(self) -> bool:
        """Whether the thread still takes calls."""
        return not (self._ended or self._stopped) and self._thread.is_alive()

    def _work(self) -> None:
        try:
            while (work := self._calls.get()) is not None:
                work()
                # Nor does this frame, while it waits for the next.
                del work
        finally:
            # What waits behind a call that ended the thread is told so.
            while self._ended and not self._calls.empty():
                if (work := self._calls.get()) is not None:
                    work()


def _settle(future: asyncio.Future[T], result: T | None, failure: Exception | None) -> None:
    if future.done():
        return
    if failure is None:
        future.set_result(result)  # type: ignore[arg-type]
    else:
        future.set_exception(failure)
