"""SIGHUP, the request for a newly loaded guard, from before there is a server to do it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def hangups() -> Iterator[threading.Event]:
    """While a model is loaded, SIGHUP does not end the process: it is kept.

    Yields:
        Set by a SIGHUP; the guard may have been read before it, so that it has to be loaded anew.
    """
    asked = threading.Event()
    if not hasattr(signal, "SIGHUP") or threading.current_thread() is not threading.main_thread():
        yield asked
        return
    # No log line from here: the handler may run in the middle of a write to stderr.
    before = signal.signal(signal.SIGHUP, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGHUP, before)
