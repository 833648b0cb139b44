"""What a server is started with: limits, mode, key; checked before anything is loaded."""

from __future__ import annotations

import hashlib
import ipaddress
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from rm_ood.errors import InputError

MODES = ("shadow", "warn", "enforce")
KEY_VARIABLE = "RM_OOD_API_KEY"
ENGINE_KEY_VARIABLE = "RM_OOD_ENGINE_KEY"
_HOST = re.compile(r"\*|(\*\.)?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_HEADER = re.compile(r"(?:\[([^\[\]]*)\]|([^:\[\]]*))(?::[0-9]*)?")
_SHORTEST_KEY, _LONGEST_KEY = 16, 512


@dataclass(frozen=True)
class ServeSettings:
    """Settings of one server.

    Attributes:
        mode: what becomes of a flagged item's reward (see `rm_ood.serve.policy`).
        api_key: SHA-256 of the key that every route but `/livez` asks for; None: no key.
        allowed_hosts: names that a request's `Host` may have, beside this machine's own; `*.example.com` is every name below
            it, `*` any. Without any, every name is taken with a key, and in an application of one's own; `rm-ood serve` without
            a key takes this machine's own names alone, since a page in a browser here can give a name of its own this
            machine's address, and then ask and read.
        max_body_bytes: of a request. max_items: answers in a request. max_chars: characters of one text.
        max_queue: items that wait for the model; more are answered 429. max_wait_s: so is what would get its scores later than
            this, by the time that batches take; None: than `model_timeout_s`.
        max_connections: open at once; more are answered 503.
        request_timeout_s: to receive a request, and for a reader to take a reply. model_timeout_s: from its receipt to its
            scores. drain_timeout_s: to finish what was accepted after SIGTERM.
        batch_size: items in one forward; None: the guard's own.
        batch_wait_s: how long an idle model waits for a batch to fill.
        withheld_reward: what replies that need a number say for a withheld reward; None: `FittedState.reward_floor`.
        monitor_state: file in which the traffic monitor outlives the process. monitor_save_s: how often it is written.
        unready_on_alarm: not ready once the traffic monitor has alarmed.
    """

    mode: str = "warn"
    api_key: bytes | None = field(default=None, repr=False)
    allowed_hosts: tuple[str, ...] = ()
    max_body_bytes: int = 2**20
    max_items: int = 32
    max_chars: int = 20_000
    max_queue: int = 64
    max_wait_s: float | None = None
    max_connections: int = 128
    request_timeout_s: float = 10.0
    model_timeout_s: float = 30.0
    drain_timeout_s: float = 30.0
    batch_size: int | None = None
    batch_wait_s: float = 0.002
    withheld_reward: float | None = None
    monitor_state: Path | None = None
    monitor_save_s: float = 10.0
    unready_on_alarm: bool = False

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise InputError(f"mode={self.mode!r}: expected one of {MODES}")
        counts = ("max_body_bytes", "max_items", "max_chars", "max_queue", "max_connections")
        for name in (*counts, *(["batch_size"] if self.batch_size is not None else [])):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{name}={value!r}: expected a whole number from 1")
        for name in (f.name for f in fields(self) if f.name.endswith("_s")):
            value = getattr(self, name)
            if name == "max_wait_s" and value is None:
                continue
            lowest_ok = value >= 0 if name == "batch_wait_s" else value > 0
            if not (lowest_ok and math.isfinite(value)):
                raise InputError(f"{name}={value!r}: expected seconds above 0")
        if self.max_items > self.max_queue:
            raise InputError(
                f"max_items={self.max_items}, max_queue={self.max_queue}: a full request would never fit into the queue"
            )
        for name in self.allowed_hosts:
            if not (_HOST.fullmatch(name) or _is_address(name)):
                raise InputError(
                    f"allowed_hosts={name!r}: expected a name without scheme and port, *. and a domain, an address, or *"
                )
        if self.withheld_reward is not None and not math.isfinite(self.withheld_reward):
            raise InputError(f"withheld_reward={self.withheld_reward!r}: expected a finite number")


def read_api_key(file: str | None) -> bytes | None:
    """SHA-256 of the key in a file, or in the environment variable `RM_OOD_API_KEY`; None where there is neither.

    Raises:
        InputError: both are given, or the key is shorter than 16 characters or not printable ASCII. Never tells the key.
        FileNotFoundError: no such file.
    """
    key = _read_key(file, "--api-key-file", KEY_VARIABLE, _SHORTEST_KEY)
    return None if key is None else key_digest(key)


def read_engine_key(file: str | None) -> str | None:
    """The inference engine's key in a file, or in `RM_OOD_ENGINE_KEY`; raises as `read_api_key`, and takes short keys."""
    return _read_key(file, "--engine-key-file", ENGINE_KEY_VARIABLE, 1)


def _read_key(file: str | None, option: str, variable: str, shortest: int) -> str | None:
    given = os.environ.get(variable)
    if file is not None and given is not None:
        raise InputError(f"{option} and {variable} are both given: leave one out")
    if file is not None:
        try:
            given = Path(file).read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            raise
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{option}: cannot be read ({type(error).__name__})") from error
    if given is None:
        return None
    if not shortest <= len(given) <= _LONGEST_KEY or not all("!" <= c <= "~" for c in given):
        raise InputError(
            f"{option}, {variable}: a key of {len(given)} characters; expected {shortest} to {_LONGEST_KEY} printable ASCII "
            "characters without spaces, such as from: openssl rand -hex 32"
        )
    return given


def key_digest(key: str) -> bytes:
    """What is kept of a key, and compared."""
    return hashlib.sha256(key.encode()).digest()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    return ipaddress.ip_address(host).is_loopback if _is_address(host) else host == "localhost"


def host_name(header: str) -> str:
    """The name in a `Host` header, without its port; "" where there is more, or other, than both."""
    found = _HEADER.fullmatch(header)
    return "" if found is None else (found[1] or found[2] or "").rstrip(".").lower()


def is_allowed_host(name: str, allowed: Sequence[str]) -> bool:
    """Whether requests may be for this name: one of this machine's own, or a pattern of `ServeSettings.allowed_hosts`."""
    return is_loopback(name) or any(
        name.endswith(one[1:]) if one.startswith("*") else name == one for one in (p.lower() for p in allowed)
    )


def check_host(host: str, api_key: bytes | None) -> None:
    """Other machines only reach a server that asks for a key.

    Raises:
        InputError: another address than loopback, and no key.
    """
    if api_key is None and not is_loopback(host):
        raise InputError(
            f"--host {host} can be reached from other machines: set a key with --api-key-file FILE or {KEY_VARIABLE}, or "
            "serve on 127.0.0.1"
        )
