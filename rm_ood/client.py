"""`GuardClient`: ask a served guard (`POST /v1/score`); verdicts as `OODGuard.check` gives them, no model here."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, overload

from rm_ood.calls import Call, read_call
from rm_ood.config import GuardConfig
from rm_ood.decision import Decision, Decisions
from rm_ood.dialogue import Dialogue, Text
from rm_ood.errors import EngineError, InputError, MismatchError
from rm_ood.integrations.transport import JsonClient
from rm_ood.replies import read_rows

PATH = "/v1/score"
MODES = ("shadow", "warn", "enforce")
# Room in a reply: for its frame, and per item.
_FRAME_BYTES = 2**16
_ITEM_BYTES = 2**15
_LONGEST_NAME = 128
# What may be a text is the server's to say.
_ANY_TEXT = GuardConfig(allow_empty=True, max_chars=2**31)


@dataclass(frozen=True)
class ScoreReply:
    """What a served guard answered to one call.

    Attributes:
        decisions: the verdicts, in the order of the items; `alpha` is NaN unless it was given.
        monitor: the server's traffic alarm after the call (`alarm`, `e_value`, ...); None where none is kept.
        mode: `"shadow"`, `"warn"` or `"enforce"`.
        guard: digest of the guard that is served.
        request_ids: the server's names for the requests of this call.
    """

    decisions: Decisions
    monitor: Mapping[str, Any] | None
    mode: str
    guard: str
    request_ids: tuple[str, ...]


class GuardClient:
    """Verdicts and rewards of a served guard; safe to share between threads.

    It can be pickled, the key with it; a copy makes connections of its own. Neither texts nor the key are in its errors.

    Args:
        url: the server's address, `http://host:port`, before `/v1/score`.
        api_key: sent as `Authorization: Bearer ...`.
        timeout: seconds to connect, and to wait for any next part of a reply.
        retries: further tries after a lost connection, with doubling waits.
        patience: seconds that one request waits in all for a server that says it is busy (429, or 503 with `Retry-After`);
            these count as no retries.
        batch_size: answers in a request, at most the server's `max_items`; a call with more takes several, one after the
            other.

    Raises:
        InputError: httpx2 is not installed, no address, or a setting out of range.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout: float = 60.0,
        retries: int = 3,
        patience: float = 600.0,
        batch_size: int = 32,
    ) -> None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise InputError(f"batch_size={batch_size!r}: expected a positive integer")
        # A header of other characters would be an error that quotes it.
        if api_key is not None and not (isinstance(api_key, str) and api_key.isascii() and api_key.isprintable()):
            raise InputError("api_key: expected printable ASCII characters")
        self.batch_size = batch_size
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._client = JsonClient(
            url, headers=headers, timeout=timeout, retries=retries, patience=patience, server="guard server"
        )

    @overload
    def check(self, prompt: Text, response: str, *, groups: Sequence[str] | None = None) -> Decision: ...
    @overload
    def check(
        self, prompt: Sequence[Any] | Dialogue, response: Sequence[Any], *, groups: Sequence[str] | None = None
    ) -> Decisions: ...
    def check(self, prompt: Any, response: Any, *, groups: Sequence[str] | None = None) -> Decision | Decisions:
        """Reward and verdict of one item, or of many; the call forms are those of `OODGuard.check`.

        `alpha` of the verdicts is NaN, since a reply does not tell it; their flags are the server's.

        Args:
            groups: the group of each item, for a guard with a grouping column.
        Raises:
            UnavailableError: no answer after every try.
            EngineError: refused, or another answer than was asked for; nothing is scored then.
            MismatchError: the guard was replaced between two requests of the call.
            InputError: names the field, what came, and the remedy.
        """
        call = read_call(prompt, response, _ANY_TEXT)
        decisions = self._score(call, None, groups, float("nan")).decisions
        return decisions[0] if call.is_single else decisions

    def score(
        self,
        prompt: Any,
        response: Any,
        *,
        sessions: Sequence[Hashable | None] | None = None,
        groups: Sequence[str] | None = None,
        alpha: float = float("nan"),
    ) -> ScoreReply:
        """The same, with the server's alarm, mode and guard.

        Args:
            prompt, response, groups: as in `check`.
            sessions: one key per item for the server's alarm, which counts the first item of a session; None: its prompt. Keys
                are sent as they are, 128 characters at most.
            alpha: level that the flags have to be at, where it is known.
        Raises:
            As `check`; InputError for a call without items, sessions or groups of another number.
        """
        return self._score(read_call(prompt, response, _ANY_TEXT), sessions, groups, alpha)

    def _score(
        self, call: Call, sessions: Sequence[Hashable | None] | None, groups: Sequence[str] | None, alpha: float
    ) -> ScoreReply:
        n = len(call.items)
        if not n:
            raise InputError("got no items: a server's verdicts on nothing have no axes")
        keys = [
            {**session, **group}
            for session, group in zip(_names("session", sessions, n), _names("group", groups, n), strict=True)
        ]
        rows: list[Any] = []
        ids: list[str] = []
        answers: list[dict[str, Any]] = []
        for items, names in _requests(call, keys, self.batch_size):
            answer = self._ask(items, len(names))
            rows += answer["results"]
            ids += names
            answers.append(answer)
        if len({answer["guard"] for answer in answers}) != 1:
            raise MismatchError("the served guard was replaced between two requests of one call: send it again")
        last = answers[-1]
        return ScoreReply(
            decisions=read_rows(rows, ids, call.prompt_index, alpha=alpha),
            monitor=last["monitor"],
            mode=last["mode"],
            guard=last["guard"],
            request_ids=tuple(answer["request_id"] for answer in answers),
        )

    def _ask(self, items: list[dict[str, Any]], n: int) -> dict[str, Any]:
        """The reply to one request of n answers, its frame checked."""
        reply = self._client.post(PATH, {"items": items}, _FRAME_BYTES + n * _ITEM_BYTES)
        missing = sorted({"results", "monitor", "mode", "guard", "request_id"} - reply.keys())
        if missing:
            raise EngineError(f"{PATH}: the reply has no {missing}: is a guard served there?")
        if not isinstance(reply["results"], list) or len(reply["results"]) != n:
            raise EngineError(f"{PATH}: {n} answers were sent, and results is no list of so many")
        if not (reply["monitor"] is None or isinstance(reply["monitor"], dict)) or reply["mode"] not in MODES:
            raise EngineError(f"{PATH}: monitor or mode are not as documented")
        if not all(isinstance(reply[name], str) and reply[name] for name in ("guard", "request_id")):
            raise EngineError(f"{PATH}: guard and request_id: expected strings")
        return reply

    def close(self) -> None:
        """Close the connections; a second call does nothing."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _names(field: str, values: Sequence[Hashable | None] | None, n: int) -> list[dict[str, str]]:
    """A field of each item on the wire; without it where there is no value."""
    if values is None:
        return [{}] * n
    if isinstance(values, (str, bytes)) or len(values) != n:
        raise InputError(f"{field}s: expected one per item, {n} of them")
    names = [None if value is None else str(value) for value in values]
    if any(name is not None and not 1 <= len(name) <= _LONGEST_NAME for name in names):
        raise InputError(f"{field}s: expected 1 to {_LONGEST_NAME} characters each; send a hash of a longer one")
    return [{} if name is None else {field: name} for name in names]


def _requests(call: Call, keys: list[dict[str, str]], size: int) -> Iterator[tuple[list[dict[str, Any]], list[str]]]:
    """(items of the wire, ids of the rows to come) of requests of at most `size` answers.

    A run of answers to one prompt is one item, so that a prompt is sent once for them.
    """
    items: list[dict[str, Any]] = []
    ids: list[str] = []
    before: tuple[int, dict[str, str]] | None = None
    for i, (prompt, response) in enumerate(call.items):
        if len(ids) == size:
            yield items, ids
            items, ids, before = [], [], None
        run = (int(call.prompt_index[i]), keys[i])
        if run != before:
            items.append({"id": str(i), **_sent(prompt), "responses": [], **keys[i]})
            before = run
        answers = items[-1]["responses"]
        ids.append(f"{items[-1]['id']}#{len(answers)}")
        answers.append(response if isinstance(response, str) else [response])
    yield items, ids


def _sent(prompt: Text) -> dict[str, Any]:
    """The fields of an item that are its prompt's."""
    if not isinstance(prompt, Dialogue):
        return {"prompt": prompt}
    beside = {"tools": prompt.tools, "chat_template_kwargs": prompt.template_kwargs}
    return {"prompt": prompt.messages, **{name: value for name, value in beside.items() if value}}
