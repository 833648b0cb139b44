"""JSON over HTTP to an inference engine or a served guard, with every way it can go wrong named.

What a server answers to a request that it refuses may echo the request, so no error quotes a reply.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rm_ood.errors import EngineError, InputError, UnavailableError

# A server that is busy or starting says so with these.
_BUSY = (429, 503)
_FIRST_WAIT_S = 0.25
_LONGEST_WAIT_S = 30.0
_TOO_LONG = "took longer than the timeout. Raise timeout=, or send fewer items at once (batch_size=)."


class JsonClient:
    """Asks one server for JSON; safe to share between threads, and pickled with its headers.

    Args:
        url: the server's address, `http://host:port`, before any path such as `/v1`.
        headers: sent with every request, such as `{"Authorization": "Bearer ..."}`.
        timeout: seconds to connect, and to wait for any next part of the reply.
        whole_s: seconds in which the whole of a reply has to come, or little more; None: as long as it takes.
        retries: further tries after a lost connection, or a 503 that names no time to come back, with doubling waits; other
            errors are final.
        patience: seconds to wait in all, in one request, for a server that says it is busy: a 429, or a 503 with
            `Retry-After`, which is kept to up to 30 seconds. It is up and asks for time, so these count as no retries.
        server: what errors call the server.

    Raises:
        InputError: httpx2 is not installed, or an address that is none.
    """

    def __init__(
        self,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        timeout: float = 60.0,
        whole_s: float | None = None,
        retries: int = 3,
        patience: float = 600.0,
        server: str = "engine",
    ) -> None:
        try:
            import httpx2
        except ImportError as error:
            raise InputError(f"talking to the {server} needs httpx2: pip install 'rm_ood[engines]'") from error
        if not timeout > 0 or isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
            raise InputError(f"timeout={timeout!r}, retries={retries!r}: expected seconds above 0 and a count from 0")
        if isinstance(patience, bool) or not 0 <= patience < np.inf:
            raise InputError(f"patience={patience!r}: expected seconds from 0")
        try:
            parsed = httpx2.URL(url)
        except (TypeError, httpx2.InvalidURL) as error:
            raise InputError("url: expected http://host:port or https://..., got no address at all") from error
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise InputError(f"url: expected http://host:port or https://..., got the scheme {parsed.scheme!r}")
        self.retries, self.patience = retries, patience
        self._server = server
        self._url, self._headers, self._timeout, self._whole_s = url, dict(headers or {}), timeout, whole_s
        self._base = parsed
        # A redirect would carry the text to a server that nobody named.
        # Without TLS no certificates are read, which takes most of a second.
        self._client = httpx2.Client(
            headers=self._headers, timeout=timeout, follow_redirects=False, verify=parsed.scheme == "https"
        )

    def get(self, path: str, limit: int) -> dict[str, Any]:
        """The JSON object that the server answers to a GET; raises as `post`."""
        return self._ask("GET", path, None, limit)

    def post(self, path: str, body: Mapping[str, Any], limit: int) -> dict[str, Any]:
        """The JSON object that the server answers.

        Args:
            path: below the address, from `/`.
            body: JSON-able.
            limit: bytes of reply that are read at most.
        Raises:
            UnavailableError: no answer in time or after every try, busy for longer than `patience`, or a status from
                500.
            EngineError: another status than 200, too much of it, or no JSON object.
        """
        return self._ask("POST", path, body, limit)

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None, limit: int) -> dict[str, Any]:
        import httpx2

        target = self._base.copy_with(path=self._base.path.rstrip("/") + path)
        # Without user, password and query.
        where = f"{target.scheme}://{target.netloc.decode()}{target.path}"
        lost, waited, wait = 0, 0.0, _FIRST_WAIT_S
        while True:
            cause: Exception | None = None
            try:
                with self._client.stream(method, target, json=body) as reply:
                    asked = reply.headers.get("retry-after")
                    if reply.status_code not in _BUSY:
                        _check_status(where, reply.status_code, self._server)
                        return _parse(where, _read(where, reply, limit, self._whole_s))
                    problem = f"answered {reply.status_code}, busy"
                    if reply.status_code == 429 or asked is not None:
                        if waited >= self.patience:
                            raise UnavailableError(
                                f"{where} {problem}, for {waited:.0f} seconds of waiting: more is asked of it than it can do. "
                                f"Ask less at once, or raise patience= ({self.patience:g} seconds).",
                                "busy",
                                _asked_wait(asked, wait),
                            )
                        pause = min(_asked_wait(asked, wait), self.patience - waited)
                        waited += pause
                    else:
                        lost, pause = lost + 1, wait
            except httpx2.TimeoutException as error:
                if not isinstance(error, httpx2.ConnectTimeout):
                    raise UnavailableError(f"{where} {_TOO_LONG}", "timeout") from error
                problem, cause = "did not take the connection in time", error
                lost, pause = lost + 1, wait
            except (httpx2.NetworkError, httpx2.RemoteProtocolError) as error:
                # Scoring changes nothing on the server, so a request whose answer was lost may be sent again.
                problem, cause = f"could not be reached or hung up ({type(error).__name__})", error
                lost, pause = lost + 1, wait
            except httpx2.HTTPError as error:
                raise EngineError(
                    f"{where} could not be asked, or its answer not be read ({type(error).__name__})"
                ) from error
            if lost > self.retries:
                raise UnavailableError(
                    f"{where} {problem}; {self.retries + 1} tries. Is the {self._server} running there?",
                    "unreachable",
                ) from cause
            # Beside the connection, which other threads want meanwhile.
            time.sleep(pause)
            wait = min(2 * wait, _LONGEST_WAIT_S)

    def close(self) -> None:
        """Close the connections; a second call does nothing."""
        self._client.close()

    def __getstate__(self) -> dict[str, Any]:
        # A copy in another process makes its own connections.
        own = {name: getattr(self, f"_{name}") for name in ("url", "headers", "timeout", "whole_s", "server")}
        return {**own, "retries": self.retries, "patience": self.patience}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        JsonClient.__init__(self, **saved)


def number_rows(value: Any, n: int, name: str) -> NDArray[np.float64]:
    """n rows of numbers of one length, (n, m) float64; null is NaN, which is flagged.

    Raises:
        EngineError: another count, ragged rows, or what is no number.
    """
    if not isinstance(value, list) or len(value) != n:
        found = f"{len(value)} rows" if isinstance(value, list) else type(value).__name__
        raise EngineError(f"{name}: {n} items were sent, the reply has {found}")
    if any(not isinstance(row, list) for row in value) or len({len(row) for row in value}) != 1 or not value[0]:
        raise EngineError(f"{name}: expected one list of numbers per item, all of one length")
    if any(type(v) not in (float, int) and v is not None for row in value for v in row):
        raise EngineError(f"{name}: holds something that is no number")
    try:
        return np.array(value, dtype=np.float64)
    except OverflowError as error:
        raise EngineError(f"{name}: holds an integer too large for a float") from error


def _asked_wait(retry_after: str | None, wait: float) -> float:
    """Seconds the server asks for, by a number or by a date to come, but never none and never endlessly."""
    asked = wait
    if retry_after is not None and retry_after.isdecimal():
        asked = float(retry_after)
    elif retry_after is not None:
        try:
            asked = max(wait, parsedate_to_datetime(retry_after).timestamp() - time.time())
        except ValueError:
            # Neither: as if it had not asked.
            asked = wait
    return min(max(asked, _FIRST_WAIT_S), _LONGEST_WAIT_S)


def _check_status(where: str, status: int, server: str) -> None:
    if status == 200:
        return
    hints = {
        3: "It redirects elsewhere, and nothing was sent there: pass the final address as url.",
        4: f"The {server} refuses the request: its own log says why. 404: another server, or url holds a path; 401, 403: "
        "the key is missing or wrong.",
        5: f"The {server} failed on it: its own log says why.",
    }
    kind = UnavailableError if status >= 500 else EngineError
    raise kind(f"{where} answered {status}. {hints.get(status // 100, 'Expected 200.')}")


def _read(where: str, reply: Any, limit: int, whole_s: float | None) -> bytes:
    parts, size, begun = [], 0, time.monotonic()
    for part in reply.iter_bytes():
        size += len(part)
        # Each part in time, and never the last one.
        if whole_s is not None and time.monotonic() - begun > whole_s:
            raise UnavailableError(f"{where} {_TOO_LONG}", "timeout")
        if size > limit:
            raise EngineError(
                f"{where} answered more than the {limit} bytes that a reply of this many items can take: is it another "
                "model, or another program?"
            )
        parts.append(part)
    return b"".join(parts)


def _parse(where: str, data: bytes) -> dict[str, Any]:
    try:
        # NaN and Infinity, which some servers write, are kept: the item is then flagged.
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise EngineError(f"{where} answered 200 with {len(data)} bytes that are not JSON") from error
    if not isinstance(value, dict):
        raise EngineError(f"{where} answered a JSON {type(value).__name__}, expected an object")
    return value
