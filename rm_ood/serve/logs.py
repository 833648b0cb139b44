"""One JSON object a line on stderr: events, counts, lengths, times; never a text, a key, an address or a path."""

from __future__ import annotations

import datetime
import json
import logging
import sys
import warnings
from typing import Any

from rm_ood.errors import OODGuardWarning

_LOGGER = logging.getLogger("rm_ood.serve")
_LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def log(event: str, *, level: str = "info", **fields: Any) -> None:
    """Write an event; `fields` are numbers and words of ours."""
    _LOGGER.log(_LEVELS[level], event, extra={"fields": fields})


class JsonFormatter(logging.Formatter):
    """A record as one JSON object. Exceptions are told by their type alone: a message may hold what was being read."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        at = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        own = record.name == _LOGGER.name
        line: dict[str, Any] = {
            "time": at.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            # Of other loggers the first line of the template alone: arguments, and what asyncio writes below it, may be
            # anything.
            "event": (str(record.msg).splitlines() or [""])[0],
        }
        if not own:
            line["logger"] = record.name.partition(".")[0]
        line |= getattr(record, "fields", {})
        if record.exc_info is not None and record.exc_info[0] is not None:
            line["error"] = record.exc_info[0].__name__
        return json.dumps(line)


def configure() -> None:
    """Send the server's, uvicorn's and Python's warnings to stderr as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    for name, level in ((_LOGGER.name, logging.INFO), ("uvicorn.error", logging.WARNING), ("asyncio", logging.ERROR)):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False
        logger.setLevel(level)
    # What other packages say, which Python would write as it came.
    if not logging.getLogger().handlers:
        logging.getLogger().addHandler(handler)
    warnings.showwarning = _show_warning  # type: ignore[assignment]


def _show_warning(message: Any, category: type[Warning], *_: Any) -> None:
    # Ours never quote a text; of others nobody knows.
    told = {"message": str(message)} if issubclass(category, OODGuardWarning) else {}
    log("python_warning", level="warning", category=category.__name__, **told)
