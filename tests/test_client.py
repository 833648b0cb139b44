"""The client of a served guard: a real server on this machine, a real guard behind it."""

from __future__ import annotations

import copy
import json
import pickle
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import numpy as np
import pytest
import torch
from conftest import POISON, preference_rows
from guard_server import GuardServer
from serving import FaultyScorer, serving

from rm_ood import (
    CalibrationWarning,
    Decision,
    Decisions,
    Dialogue,
    EngineError,
    GuardClient,
    InputError,
    MismatchError,
    OODGuard,
    UnavailableError,
)
from rm_ood.integrations import transport

KEY = "hunter2"
SECRET = "the seven bridges of the quiet island"


@pytest.fixture(scope="module")
def guard(shared_decoder: Any, decoder_tokenizer: Any) -> OODGuard:
    def chat(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [
            {
                "prompt": [{"role": "user", "content": r["prompt"]}],
                **{c: [{"role": "assistant", "content": r[c]}] for c in ("chosen", "rejected")},
            }
            for r in rows
        ]

    guard = OODGuard(copy.deepcopy(shared_decoder), decoder_tokenizer, alpha=0.2, channels="final", axes=("response",))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        return guard.fit(chat(preference_rows(60)), calibration=chat(preference_rows(110, seed=1)), progress=False)


@pytest.fixture
def server(guard: OODGuard) -> Iterator[GuardServer]:
    with GuardServer(guard, api_key=KEY, watch=True) as server:
        yield server


@pytest.fixture
def client(server: GuardServer) -> Iterator[GuardClient]:
    with GuardClient(server.url, api_key=KEY, retries=2, timeout=20) as client:
        yield client


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    taken: list[float] = []
    monkeypatch.setattr(transport.time, "sleep", taken.append)
    return taken


def texts(n: int = 12) -> tuple[list[str], list[str]]:
    rows = preference_rows(n, seed=5)
    return [r["prompt"] for r in rows], [r["chosen"] if i % 3 else "zqv {}; " * 9 for i, r in enumerate(rows)]


def assert_same(ours: Decisions, theirs: Decisions) -> None:
    assert ours.axes.keys() == theirs.axes.keys()
    np.testing.assert_allclose(ours.rewards, theirs.rewards, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(ours.is_ood, theirs.is_ood)
    np.testing.assert_array_equal(ours.p_values, theirs.p_values)
    np.testing.assert_array_equal(ours.nearest_class, theirs.nearest_class)  # type: ignore[arg-type]
    np.testing.assert_allclose(ours.class_log_odds, theirs.class_log_odds, atol=1e-3)  # type: ignore[arg-type]
    np.testing.assert_array_equal(ours.truncated, theirs.truncated)
    np.testing.assert_array_equal(ours.prompt_index, theirs.prompt_index)
    assert ours.reasons == theirs.reasons
    for name, axis in theirs.axes.items():
        mine = ours.axis(name)
        np.testing.assert_allclose(mine.ood_scores, axis.ood_scores, atol=1e-4)
        np.testing.assert_array_equal(mine.p_values, axis.p_values)
        np.testing.assert_array_equal(mine.is_ood, axis.is_ood)
        for key, channel in axis.channels.items():
            np.testing.assert_allclose(mine.channel(key).scores, channel.scores, rtol=1e-3, atol=1e-5)
            np.testing.assert_array_equal(mine.channel(key).p_values, channel.p_values)
            assert (mine.channel(key).class_scores is None) == (channel.class_scores is None)
            if channel.class_scores is not None:
                np.testing.assert_allclose(mine.channel(key).class_scores, channel.class_scores, rtol=1e-3, atol=1e-5)  # type: ignore[arg-type]


# -- the verdicts are the guard's own


def test_verdicts_are_those_of_the_guard(guard: OODGuard, server: GuardServer, client: GuardClient) -> None:
    client.batch_size = 5
    theirs = guard.check(*texts())
    ours = client.check(*texts())
    assert_same(ours, theirs)
    assert 0 < theirs.is_ood.sum() < 12
    assert [len(request["items"]) for request in server.requests] == [5, 5, 2]
    assert np.isnan(ours.alpha)


def test_the_call_forms_are_those_of_check(guard: OODGuard, server: GuardServer, client: GuardClient) -> None:
    one = client.check("name a river", "the Elbe")
    assert isinstance(one, Decision)
    assert one.p_value == guard.check("name a river", "the Elbe").p_value
    messages = [{"role": "user", "content": "name a river"}]
    assert isinstance(client.check(messages, [{"role": "assistant", "content": "the Elbe"}]), Decision)
    nested = (["name a river", messages], [["the Elbe", "no"], ["one two"]])
    assert_same(client.check(*nested), guard.check(*nested))
    for wrong in (lambda: client.check(["a"], [7]), lambda: client.check([], [])):
        with pytest.raises(InputError):
            wrong()
    assert client.check(Dialogue(messages), ["the Elbe"]).rewards == pytest.approx(one.reward, abs=1e-5)


def test_a_prompt_is_sent_once_for_its_answers(server: GuardServer, client: GuardClient) -> None:
    client.batch_size = 3
    client.check(["a", "a", "a", "a", "b", "a"], ["1", "2", "3", "4", "5", "6"])
    assert [[(item["id"], len(item["responses"])) for item in r["items"]] for r in server.requests] == [
        [("0", 3)],
        [("3", 1), ("4", 1), ("5", 1)],
    ]


def test_a_score_brings_the_alarm_and_the_guard(server: GuardServer, client: GuardClient) -> None:
    client.batch_size = 2
    reply = client.score(["a", "a", "b"], ["one two", "three", "four"], sessions=[("s", 1), None, "t"])
    assert [item.get("session") for r in server.requests for item in r["items"]] == ["('s', 1)", None, "t"]
    assert reply.monitor is not None
    assert reply.monitor["alarm"] is False
    assert (reply.mode, reply.guard) == ("shadow", "d" * 64)
    assert reply.request_ids == ("request-1", "request-2")
    for sessions in (["s"], "abc"):
        with pytest.raises(InputError, match="sessions: expected one per item, 3 of them"):
            client.score(["a", "a", "b"], ["1", "2", "3"], sessions=sessions)
    with pytest.raises(InputError, match="send a hash of a longer one"):
        client.score(["a"], ["b"], sessions=["s" * 129])
    client.score(["a"], ["b"], alpha=0.2)
    with pytest.raises(EngineError, match="another alpha is served there"):
        client.score(*texts(), alpha=1e-9)


def test_what_has_no_reward_is_flagged(guard: OODGuard) -> None:
    model = copy.deepcopy(guard.model)
    with torch.no_grad():
        model.get_input_embeddings().weight[guard.tokenizer(POISON, add_special_tokens=False)["input_ids"][-1]] = (
            torch.nan
        )
    poisoned = guard.on(model, guard.tokenizer)
    with GuardServer(poisoned) as server, GuardClient(server.url) as client:
        ours = client.check(["a river", "a river"], [POISON, "the Elbe"])
    theirs = poisoned.check(["a river", "a river"], [POISON, "the Elbe"])
    assert_same(ours[1:], theirs[1:])
    assert np.isnan(ours.rewards[0])
    assert ours.is_ood[0]
    for axis in ours.axes.values():
        assert np.isposinf(axis.ood_scores[0])
        assert axis.is_ood[0]
    assert ours.nearest_class is not None
    assert ours.nearest_class[0] == -1
    assert "non_finite" in ours.reasons[0]


def test_the_real_server_is_asked_alike(guard: OODGuard) -> None:
    pytest.importorskip("fastapi")
    from serving import guard_scorer, serving

    asked, said = texts(40)
    asked[3] = asked[4]
    with serving(guard_scorer(guard)) as (served, _), GuardClient(f"http://127.0.0.1:{served.port}") as client:
        reply = client.score(asked, said, sessions=[i % 7 for i in range(40)], alpha=0.2)
        nested = client.check(["name a river", "count"], [["the Elbe", "no"], ["one two"]])
        with pytest.raises(EngineError, match="422"):
            client.check("", "one")
    expected = guard.check(asked, said)
    assert_same(reply.decisions, expected)
    assert_same(nested, guard.check(["name a river", "count"], [["the Elbe", "no"], ["one two"]]))
    assert len(reply.request_ids) == 2
    if reply.monitor is not None:
        # Seven sessions.
        assert (reply.monitor["alarm"], reply.monitor["counted"]) == (False, 7)


def test_a_grouped_guard_is_told_the_groups(server: GuardServer, client: GuardClient) -> None:
    server.refusals = [(422, {})]
    with pytest.raises(EngineError, match="422"):
        client.check(["a", "a", "b"], ["1", "2", "3"], groups=["x", "y", "y"])
    assert [(item["id"], item["group"]) for item in server.requests[0]["items"]] == [("0", "x"), ("1", "y"), ("2", "y")]


# -- a reply that is not what was asked


def drop(*path: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def change(reply: dict[str, Any]) -> dict[str, Any]:
        *way, last = path
        place: Any = reply
        for key in way:
            place = place[key]
        del place[last]
        return reply

    return change


def put(*path: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def change(reply: dict[str, Any]) -> dict[str, Any]:
        *way, last, value = path
        place: Any = reply
        for key in way:
            place = place[key]
        place[last] = value
        return reply

    return change


ROW = ("results", 0)
AXIS = (*ROW, "axes", "response")
CHANNEL = (*AXIS, "channels", "final")
SPOILED = {
    "fewer rows": drop("results", 1),
    "no rows": put("results", None),
    "row is no object": put("results", 0, 3),
    "other order": lambda reply: {**reply, "results": reply["results"][::-1]},
    "no id": drop(*ROW, "id"),
    "no monitor": drop("monitor"),
    "monitor is text": put("monitor", "fine"),
    "another mode": put("mode", "loud"),
    "no guard": put("guard", ""),
    "no reward": drop(*ROW, "reward"),
    "reward is text": put(*ROW, "reward", "7"),
    "reward is a flag": put(*ROW, "reward", True),
    "reward is NaN": put(*ROW, "reward", float("nan")),
    "reward is infinite": put(*ROW, "reward", float("inf")),
    "reward is null and normal": lambda reply: put(*ROW, "is_ood", False)(put(*ROW, "reward", None)(reply)),
    "flag is a number": put(*ROW, "is_ood", 0),
    "p is null": put(*ROW, "p_value", None),
    "p above 1": put(*ROW, "p_value", 1.5),
    "no axes": put(*ROW, "axes", {}),
    "axes are a list": put(*ROW, "axes", []),
    "another axis": lambda reply: put(*ROW, "axes", {"prompt": reply["results"][0]["axes"]["response"]})(reply),
    "axis score is NaN": put(*AXIS, "ood_score", float("nan")),
    "axis score is null and normal": lambda reply: put(*AXIS, "is_ood", False)(put(*AXIS, "ood_score", None)(reply)),
    "no channels": put(*AXIS, "channels", {}),
    "channel without p": drop(*CHANNEL, "p_value"),
    "classes of another number": put(*CHANNEL, "class_scores", [1.0]),
    "classes of text": put(*CHANNEL, "class_scores", ["a", "b"]),
    "another class": put(*ROW, "nearest_class", "best"),
    "odds are text": put(*ROW, "class_log_odds", "2"),
    "reasons are text": put(*ROW, "reasons", "none"),
    "no truncated": drop(*ROW, "truncated"),
    "a list": lambda reply: [reply],
    "not JSON": lambda reply: b"{",
    "endless": lambda reply: b" " * 2**18,
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_reply_that_is_not_as_asked_is_an_error(name: str, server: GuardServer, client: GuardClient) -> None:
    server.spoil = SPOILED[name]
    with pytest.raises(EngineError) as caught:
        client.check(["name a river", "count"], ["the Elbe", SECRET])
    # Final: another try would be answered likewise.
    assert not isinstance(caught.value, UnavailableError)
    assert len(server.requests) == 1
    assert SECRET not in str(caught.value)
    assert KEY not in str(caught.value)


def test_a_guard_that_is_replaced_within_a_call_is_noticed(server: GuardServer, client: GuardClient) -> None:
    client.batch_size = 1
    server.spoil = lambda reply: {**reply, "guard": str(len(server.requests))}
    with pytest.raises(MismatchError, match="replaced between two requests"):
        client.check(["a", "b"], ["one", "two"])


# -- failures


def test_a_busy_server_is_asked_again_when_it_says(server: GuardServer, client: GuardClient, naps: list[float]) -> None:
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=9), usegmt=True)
    server.refusals = [(429, {"Retry-After": "4"}), (503, {"Retry-After": soon})]
    assert isinstance(client.check("name a river", "the Elbe"), Decision)
    assert naps[0] == 4.0
    assert 7 < naps[1] <= 9
    server.refusals = [(503, {})] * 9
    with pytest.raises(UnavailableError, match=r"answered 503, busy; 3 tries\. Is the guard server running there\?"):
        client.check("name a river", SECRET)


@pytest.mark.parametrize(("status", "kind"), [(500, UnavailableError), (400, EngineError), (422, EngineError)])
def test_refusals_are_final_and_quote_nothing(
    status: int, kind: type[Exception], server: GuardServer, client: GuardClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    server.refusals = [(status, {})]
    with pytest.raises(EngineError, match=f"answered {status}") as caught:
        client.check(SECRET, SECRET)
    assert type(caught.value) is kind
    assert len(server.requests) == 1
    told = str(caught.value) + caplog.text + repr(client) + repr(vars(client))
    assert SECRET not in told
    assert KEY not in told


def test_a_wrong_key_is_refused_by_name(server: GuardServer) -> None:
    with GuardClient(server.url, api_key="other") as client, pytest.raises(EngineError, match="401, 403: the key is"):
        client.check("a", "b")
    with pytest.raises(InputError, match="printable ASCII") as caught:
        GuardClient(server.url, api_key="schlüssel\n")
    assert "schl" not in str(caught.value)


def test_nobody_there_and_nobody_answers(naps: list[float]) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with GuardClient(url, retries=1) as client, pytest.raises(UnavailableError, match="2 tries"):
            client.check("a", "b")
        assert naps == [0.25]
        silent.listen()
        start = time.monotonic()
        with (
            GuardClient(url, timeout=0.2) as client,
            pytest.raises(UnavailableError, match="longer than the timeout"),
        ):
            client.check("a", "b")
        assert time.monotonic() - start < 5


def test_a_busy_server_costs_no_retries_but_patience(server: GuardServer, naps: list[float]) -> None:
    busy = [(429, {"Retry-After": "2"})] * 3 + [(503, {"Retry-After": "0"}), (429, {})]
    with GuardClient(server.url, api_key=KEY, retries=0, patience=60) as client:
        server.refusals = list(busy)
        assert isinstance(client.check("a", "b"), Decision)
        # None is not waited for by asking at once again and again.
        assert naps == [2, 2, 2, 0.25, 4]
        # A 503 that names no time may be anything's: it is a lost try.
        server.refusals = [(503, {})]
        with pytest.raises(UnavailableError, match="answered 503, busy; 1 tries"):
            client.check("a", "b")
    naps.clear()
    with GuardClient(server.url, api_key=KEY, retries=0, patience=5) as client:
        again = pickle.loads(pickle.dumps(client))
        for one in (client, again):
            server.refusals = [(429, {"Retry-After": "2"})] * 9
            with pytest.raises(
                UnavailableError, match="answered 429, busy, for 5 seconds of waiting: more is asked of it"
            ):
                one.check("a", "b")
            assert len(server.refusals) == 5
        again.close()
    assert naps == [2, 2, 1] * 2


def test_more_clients_than_the_queue_holds_lose_nothing(guard: OODGuard) -> None:
    scorer = FaultyScorer(guard, pause=0.02)
    rows = preference_rows(16, seed=5)
    calls = [([r["prompt"] for r in rows[i::8]], [r["chosen"] for r in rows[i::8]]) for i in range(8)]
    expected = [guard.check(*call) for call in calls]
    with serving(scorer, max_queue=2, max_items=2) as (reader, _):
        url = f"http://127.0.0.1:{reader.port}"

        def client(i: int) -> list[Decisions]:
            with GuardClient(url, retries=0, patience=60, batch_size=2) as one:
                return [one.check(*calls[i]) for _ in range(2)]

        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(client, range(8)))
        assert reader.metric('rm_ood_requests_total{status="429"}') > 0
    for both, theirs in zip(found, expected, strict=True):
        for ours in both:
            assert_same(ours, theirs)


# -- threads, processes, settings


def test_threads_share_a_client_and_a_pickled_one_is_another(
    guard: OODGuard, server: GuardServer, client: GuardClient
) -> None:
    asked, said = texts(24)
    expected = guard.check(asked, said)
    other = pickle.loads(pickle.dumps(client))
    assert other.batch_size == client.batch_size
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: (client, other)[i % 2].check(asked[i], said[i]), range(24)))
    assert [decision.is_ood for decision in found] == expected.is_ood.tolist()
    np.testing.assert_allclose([decision.reward for decision in found], expected.rewards, rtol=0, atol=1e-4)
    client.close()
    assert isinstance(other.check("a", "b"), Decision)
    other.close()


def test_settings_are_checked() -> None:
    for wrong in (
        {"url": "here"},
        {"batch_size": 0},
        {"batch_size": True},
        {"timeout": 0},
        {"retries": -1},
        {"patience": -1},
    ):
        with pytest.raises(InputError):
            GuardClient(**{"url": "http://127.0.0.1:1", **wrong})  # type: ignore[arg-type]


def test_the_rows_are_those_of_check_as_json(guard: OODGuard, server: GuardServer) -> None:
    """The stand-in's rows are what `rm-ood check` writes: nothing of it is made up."""
    [row] = server.answer({"prompt": "name a river", "response": "the Elbe", "id": "x"})["results"]
    assert json.loads(json.dumps(row)) == {"id": "x", **guard.check("name a river", "the Elbe").to_dict()}
