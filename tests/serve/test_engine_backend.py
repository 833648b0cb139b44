"""A server in front of SGLang or vLLM, in whose place a stand-in answers with a real model: verdicts, outages, recovery."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import preference_rows
from engine_server import Engine
from serving import Answer, Client, serving, wait_until

from rm_ood import EngineError, GuardClient, InputError, MismatchError, OODGuard
from rm_ood.cli import BAD_INPUT, MISMATCH, main
from rm_ood.integrations.model_files import model_files
from rm_ood.integrations.vllm_plugin import GuardedClassifier
from rm_ood.serve.engine import EngineBackend, EngineSettings, load_backend
from rm_ood.serve.server import Server

pytestmark = [
    pytest.mark.filterwarnings("ignore::rm_ood.CalibrationWarning"),
    pytest.mark.filterwarnings("ignore::rm_ood.TokenisationWarning"),
]

ROWS = preference_rows(24, seed=5)
ITEMS = [(r["prompt"], r["chosen"]) for r in ROWS] + [("xk " * 200, "zqv " * 9), ("count", "{}();" * 8)]
SECRET = "a most private question"
KEY = "sesame-0123"


@pytest.fixture(scope="module")
def made(
    shared_decoder: Any, decoder_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, OODGuard]:
    """A folder with `guard`, fitted with a channel that no engine has, and `model`; the guard on the model, by `final`."""
    folder = tmp_path_factory.mktemp("served")
    guard = OODGuard(
        copy.deepcopy(shared_decoder), decoder_tokenizer, alpha=0.1, max_length=64, text_format="plain", append_eos=True,
        channels=("final", "response/mean@0.67"), axes=("response",), span_means="raw", batch_size=4,
    )  # fmt: skip
    guard.fit(preference_rows(300), calibration=0.5, progress=False).save_pretrained(folder / "guard")
    shared_decoder.save_pretrained(folder / "model")
    decoder_tokenizer.save_pretrained(folder / "model")
    guard.detach()
    return folder, OODGuard.from_pretrained(folder / "guard", guard.model, decoder_tokenizer, channels="final")


@pytest.fixture
def engine(shared_decoder: Any) -> Iterator[Engine]:
    with Engine(shared_decoder, shared_decoder.score) as engine:
        yield engine


FILES = lru_cache(model_files)


def backend(folder: Path, engine: Engine, *, batch_size: int | None = None, **settings: Any) -> EngineBackend:
    asked = EngineSettings(engine.url, **{"probe_s": 60.0, "retries": 0, **settings})
    return load_backend(folder / "guard", FILES(str(folder / "model")), asked, batch_size, channels="final")


@contextmanager
def served(folder: Path, engine: Engine, **settings: Any) -> Iterator[tuple[Client, Server]]:
    scorer = backend(folder, engine, **settings)
    try:
        with serving(scorer, max_queue=256) as both:
            yield both
    finally:
        scorer.close()


def ask(client: Client, items: list[tuple[str, str]]) -> Answer:
    return client.post("/v1/score", {"items": [{"prompt": p, "response": r} for p, r in items]})


def assert_rows(rows: list[dict[str, Any]], guard: OODGuard, items: list[tuple[str, str]]) -> None:
    """Rewards and distances to rounding; p-values, flags and reasons as they are."""
    expected = guard.check(*map(list, zip(*items, strict=True)))
    for row, wanted in zip(rows, (d.to_dict() for d in expected), strict=True):
        assert row["reward"] == pytest.approx(wanted["reward"], abs=1e-4)
        for name in ("p_value", "is_ood", "nearest_class", "reasons", "truncated"):
            assert row[name] == wanted[name], name
        ours, theirs = (r["axes"]["response"]["channels"]["final"] for r in (row, wanted))
        np.testing.assert_allclose(ours["class_scores"], theirs["class_scores"], rtol=1e-4)


# -- the same verdicts


@pytest.mark.parametrize("kind", ["sglang", "vllm", "vllm-vectors"])
def test_the_verdicts_are_those_of_the_guard_on_the_model(
    kind: str, made: tuple[Path, OODGuard], engine: Engine, shared_decoder: Any
) -> None:
    folder, guard = made
    engine.owner = kind.removesuffix("-vectors")
    if kind == "vllm":
        engine.head = GuardedClassifier(shared_decoder.score, str(folder / "guard"))
    with served(folder, engine, kind="vllm-vectors" if kind == "vllm-vectors" else "auto") as (client, server):
        answer = ask(client, ITEMS)
        assert answer.status == 200
        assert_rows(answer.json["results"], guard, ITEMS)
        assert 0 < sum(row["is_ood"] for row in answer.json["results"]) < len(ITEMS)
        # The traffic is watched, and the other protocols and the card are there.
        assert answer.json["monitor"]["requests"] == len(ITEMS)
        prompt, response = ITEMS[0]
        rewards = client.post("/get_reward", {"query": [prompt + response], "prompts": [prompt]}).json["rewards"]
        assert rewards == pytest.approx([guard.check(prompt, response).reward], abs=1e-4)
        with GuardClient(server.url) as asking:
            found = asking.check(*map(list, zip(*ITEMS, strict=True)))
        assert found.p_values.tolist() == [row["p_value"] for row in answer.json["results"]]
        assert client.get("/readyz").status == client.get("/v1/guard").status == 200
        assert client.metric("rm_ood_scored_items_total") == 2 * len(ITEMS) + 1
        assert server.service.scorer.digest == answer.json["guard"]
    # Batches are of the guard's own size, canaries too; what an engine is sent are ids.
    sent = [body.get("items", body.get("input")) for _, body, _ in engine.requests]
    assert [len(ids) for ids in sent[:2]] == [4, 4]
    assert max(map(len, sent)) == 4
    assert all(type(i) is int for ids in sent for item in ids for i in item)


def test_several_requests_are_in_flight_and_no_more_than_may(made: tuple[Path, OODGuard], engine: Engine) -> None:
    folder, guard = made
    with served(folder, engine, concurrency=3, batch_size=1) as (client, _), ThreadPoolExecutor(8) as pool:
        go = threading.Event()
        engine.raw = lambda handler: not go.wait(20)
        asked = [pool.submit(ask, client, [item]) for item in ITEMS[:8]]
        wait_until(lambda: engine.in_flight == 3)
        time.sleep(0.1)
        go.set()
        rows = [future.result().json["results"][0] for future in asked]
        assert_rows(rows, guard, ITEMS[:8])
    assert engine.most_in_flight == 3


# -- one item


BAD = ("a question", "they explode")


@pytest.fixture
def holds(decoder_tokenizer: Any) -> Callable[[list[int]], bool]:
    """Whether the ids of an item are those of `BAD`."""
    bad = decoder_tokenizer(" explode")["input_ids"]
    return lambda ids: any(ids[i : i + len(bad)] == bad for i in range(len(ids)))


def test_an_item_without_a_usable_vector_is_flagged_alone(
    made: tuple[Path, OODGuard], engine: Engine, holds: Callable[[list[int]], bool]
) -> None:
    folder, guard = made

    def spoil(reply: dict[str, Any]) -> dict[str, Any]:
        for i, ids in enumerate(engine.requests[-1][1]["items"]):
            if holds(ids):
                change(reply, i)
        return reply

    def poison(reply: dict[str, Any], i: int) -> None:
        reply["pooled_hidden_states"][i][3] = float("nan")

    def move(reply: dict[str, Any], i: int) -> None:
        reply["scores"][i][0] += 0.01

    with served(folder, engine) as (client, _):
        engine.spoil = spoil
        # The second is seen by the head of the checkpoint.
        for change, reason in ((poison, "non_finite"), (move, "read_out_mismatch")):  # noqa: B007
            first, second, third = ask(client, [ITEMS[0], BAD, ITEMS[2]]).json["results"]
            assert_rows([first, third], guard, [ITEMS[0], ITEMS[2]])
            assert (second["is_ood"], second["reasons"]) == (True, [reason])
            assert second["p_value"] <= guard.config.alpha
        assert client.get("/readyz").status == 200


@pytest.mark.parametrize("fault", ["a failure", "a refusal", "a short vector"])
def test_an_item_that_the_engine_fails_on_spoils_no_other(
    fault: str, made: tuple[Path, OODGuard], engine: Engine, holds: Callable[[list[int]], bool]
) -> None:
    folder, guard = made

    def raw(handler: Any) -> bool:
        if fault == "a short vector" or not any(map(holds, handler.body["items"])):
            return False
        handler.reply(500 if fault == "a failure" else 400, SECRET.encode())
        return True

    def spoil(reply: dict[str, Any]) -> dict[str, Any]:
        for ids, vector in zip(engine.requests[-1][1]["items"], reply["pooled_hidden_states"], strict=True):
            if holds(ids):
                vector.pop()
        return reply

    with served(folder, engine, concurrency=1) as (client, _):
        engine.raw = raw
        if fault == "a short vector":
            engine.spoil = spoil
        answer = ask(client, [*ITEMS[:2], BAD, ITEMS[3]])
        assert answer.status == 200
        rows = answer.json["results"]
        assert_rows([*rows[:2], rows[3]], guard, [*ITEMS[:2], ITEMS[3]])
        assert (rows[2]["reward"], rows[2]["is_ood"], rows[2]["reasons"]) == (None, True, ["scoring_failed"])
        alone = ask(client, [BAD])
        assert (alone.status, alone.json["type"]) == (502, "engine_failed")
        assert client.get("/readyz").status == 200
        assert SECRET not in answer.body.decode() + alone.body.decode()


# -- the engine


def send(status: int, data: bytes, **headers: str) -> Callable[[Any], bool]:
    def raw(handler: Any) -> bool:
        handler.reply(status, data, **headers)
        return True

    return raw


FAULTS: dict[str, tuple[Callable[[Any], bool], int, str, str | None]] = {
    "a failure": (send(500, SECRET.encode()), 502, "engine_failed", "engine fails"),
    "no JSON": (send(200, b"<html>"), 502, "engine_failed", "engine fails"),
    "a huge body": (send(200, b"[" + b"1," * 10**6 + b"1]"), 502, "engine_failed", "engine fails"),
    "a redirect": (send(307, b"", Location="http://127.0.0.1:1/"), 502, "engine_failed", "engine fails"),
    "starting": (send(503, b""), 503, "engine_unavailable", "engine cannot be reached"),
    "busy": (send(429, b"", Retry_After="7"), 503, "engine_busy", None),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_engine_that_fails_is_told_and_never_a_score(
    fault: str, made: tuple[Path, OODGuard], engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, guard = made
    raw, status, kind, problem = FAULTS[fault]
    with served(folder, engine, probe_s=0.2) as (client, _):
        engine.raw = raw
        answer = client.post("/v1/score", {"prompt": SECRET, "responses": ["a", "b"]})
        assert (answer.status, answer.json["type"]) == (status, kind)
        assert answer.headers["retry-after"] == ("7" if kind == "engine_busy" else "5")
        if problem is None:
            assert client.get("/readyz").status == 200
        else:
            wait_until(lambda: client.get("/readyz").json["reasons"] == [problem])
        assert client.get("/livez").status == 200
        assert client.metric(f'rm_ood_requests_total{{endpoint="/v1/score",status="{status}"}}') == 1
        engine.raw = lambda handler: False
        wait_until(lambda: client.get("/readyz").status == 200)
        assert_rows(ask(client, ITEMS[:3]).json["results"], guard, ITEMS[:3])
        assert client.metric("rm_ood_scored_items_total") == 3
        shown = answer.body.decode() + "".join(capsys.readouterr())
        assert SECRET not in shown
        assert engine.url.rpartition(":")[2] not in answer.body.decode()


def drip(handler: Any, ends: threading.Event) -> bool:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    while not ends.wait(0.1):
        handler.wfile.write(b" ")
    return True


@pytest.mark.parametrize("in_parts", [False, True])
def test_an_engine_that_is_slow_is_told_by_time_and_by_readiness(
    in_parts: bool, made: tuple[Path, OODGuard], engine: Engine
) -> None:
    folder, guard = made
    with served(folder, engine, timeout_s=2.0, probe_s=30.0) as (client, _):
        ends = threading.Event()
        engine.raw = lambda handler: drip(handler, ends) if in_parts else not ends.wait(30)
        start = time.monotonic()
        answer = ask(client, ITEMS[:2])
        assert 2.0 <= time.monotonic() - start < 10
        assert (answer.status, answer.json["type"], answer.headers["retry-after"]) == (504, "engine_timeout", "1")
        # The canaries are asked at once, not at the next probe.
        wait_until(lambda: client.get("/readyz").json["reasons"] == ["engine does not answer in time"])
        # While it is out it is asked once a second at most: others are not kept waiting.
        assert ask(client, ITEMS[:2]).json["type"] == "engine_timeout"
        ends.set()
        engine.raw = lambda handler: False
        wait_until(lambda: ask(client, ITEMS[:2]).status == 200)
        assert_rows(ask(client, ITEMS[:2]).json["results"], guard, ITEMS[:2])


def test_an_engine_that_dies_and_comes_back_is_believed_when_it_is_the_same_model(
    made: tuple[Path, OODGuard], shared_decoder: Any
) -> None:
    folder, guard = made
    other = another_model(shared_decoder)
    first = Engine(shared_decoder, shared_decoder.score)
    port = first.server.server_address[1]
    with served(folder, first, probe_s=0.2) as (client, _):
        assert ask(client, ITEMS[:2]).status == 200
        first.stop()
        answer = ask(client, ITEMS[:2])
        assert (answer.status, answer.json["type"], answer.headers["retry-after"]) == (503, "engine_unavailable", "5")
        assert client.get("/readyz").json["reasons"] == ["engine cannot be reached"]
        with Engine(other, other.score, port=port) as another:
            wait_until(lambda: client.get("/readyz").json["reasons"] == ["engine serves another reward model"])
            answer = ask(client, ITEMS[:2])
            assert (answer.status, answer.json["type"]) == (502, "engine_mismatch")
            assert all(len(body["items"]) == 4 for _, body, _ in another.requests), "no item was sent"
        with Engine(shared_decoder, shared_decoder.score, port=port):
            wait_until(lambda: client.get("/readyz").status == 200)
            assert_rows(ask(client, ITEMS[:2]).json["results"], guard, ITEMS[:2])
        assert client.metric("rm_ood_scored_items_total") == 4


def test_a_model_that_is_swapped_is_found_by_the_probe_and_what_is_under_way_is_not_believed(
    made: tuple[Path, OODGuard], engine: Engine, shared_decoder: Any, holds: Callable[[list[int]], bool]
) -> None:
    folder, _ = made
    with served(folder, engine, probe_s=0.1) as (client, server), ThreadPoolExecutor(1) as pool:
        go = threading.Event()
        engine.raw = lambda handler: any(map(holds, handler.body["items"])) and not go.wait(20)
        under_way = pool.submit(ask, client, [BAD])
        wait_until(lambda: any(any(map(holds, body["items"])) for _, body, _ in engine.requests))
        other = copy.deepcopy(shared_decoder)
        with torch.no_grad():
            other.model.layers[0].mlp.down_proj.weight.mul_(1.5)
        engine.model = other
        wait_until(lambda: client.get("/readyz").status == 503)
        go.set()
        for answer in (under_way.result(), ask(client, ITEMS[:1])):
            assert (answer.status, answer.json["type"]) == (502, "engine_mismatch")
        assert client.metric("rm_ood_ready") == client.metric("rm_ood_scored_items_total") == 0
        assert server.service.unready() == ["engine serves another reward model"]


def another_model(model: Any) -> Any:
    """Of the same shapes and with the same head, so that only the canaries tell."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[-1].mlp.down_proj.weight.mul_(1.5)
    return other


@contextmanager
def under_way(folder: Path, engine: Engine, **settings: Any) -> Iterator[tuple[Client, Future[Answer]]]:
    """A server whose engine has a request, and is stopped with it."""
    with served(folder, engine, probe_s=30.0, **settings) as (client, _), ThreadPoolExecutor(1) as pool:
        go = threading.Event()
        asked = len(engine.requests)
        engine.raw = lambda handler: not go.wait(20)
        answer = pool.submit(ask, client, ITEMS[:2])
        wait_until(lambda: len(engine.requests) > asked)
        engine.stop()
        go.set()
        yield client, answer


def test_a_try_that_was_lost_is_not_made_again_with_another_model(
    made: tuple[Path, OODGuard], engine: Engine, shared_decoder: Any
) -> None:
    other = another_model(shared_decoder)
    port = engine.server.server_address[1]
    with under_way(made[0], engine, retries=2) as (client, answer), Engine(other, other.score, port=port) as another:
        found = answer.result()
        assert (found.status, found.json["type"]) == (502, "engine_mismatch")
        assert client.get("/readyz").json["reasons"] == ["engine serves another reward model"]
        assert client.metric("rm_ood_scored_items_total") == 0
        assert all(len(body["items"]) == 4 for _, body, _ in another.requests), "no item was sent"


def test_a_try_that_was_lost_is_made_again_when_the_same_model_is_back(
    made: tuple[Path, OODGuard], engine: Engine, shared_decoder: Any
) -> None:
    folder, guard = made
    port = engine.server.server_address[1]
    with under_way(folder, engine, retries=3) as (client, answer):
        # Down for longer than the first question whether it is back.
        time.sleep(0.2)
        with Engine(shared_decoder, shared_decoder.score, port=port) as again:
            assert_rows(answer.result().json["results"], guard, ITEMS[:2])
            assert [len(body["items"]) for _, body, _ in again.requests] == [4, 4, 2]
            assert client.get("/readyz").status == 200


def test_an_answer_that_came_while_another_try_was_lost_is_not_believed(
    made: tuple[Path, OODGuard], engine: Engine, shared_decoder: Any, holds: Callable[[list[int]], bool]
) -> None:
    folder, guard = made
    other = another_model(shared_decoder)

    def raw(handler: Any) -> bool:
        items = handler.body["items"]
        if len(items) == 1 and holds(items[0]) and not lost.is_set():
            # Hangs up without an answer, once.
            lost.set()
            raise ConnectionAbortedError
        if len(items) == 2 and engine.model is shared_decoder and not late.is_set():
            late.set()
            engine.model = other
            reply = engine.answer(handler.path, handler.body)
            asked.set()
            assert lost.wait(20)
            engine.model = shared_decoder
            assert done.wait(20)
            handler.reply(200, json.dumps(reply).encode())
            return True
        return False

    late, asked, lost, done = (threading.Event() for _ in range(4))
    with served(folder, engine, probe_s=30.0, retries=2) as (client, _), ThreadPoolExecutor(1) as pool:
        engine.raw = raw
        answer = pool.submit(ask, client, ITEMS[:2])
        assert asked.wait(20)
        # This one is lost, asks the canaries, finds the right model and is scored by it.
        assert ask(client, [BAD]).status == 200
        done.set()
        # What the other model said meanwhile is asked again.
        assert_rows(answer.result().json["results"], guard, ITEMS[:2])


def test_canaries_that_were_asked_before_a_connection_was_lost_prove_nothing(
    made: tuple[Path, OODGuard],
    engine: Engine,
    shared_decoder: Any,
    holds: Callable[[list[int]], bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events: list[str] = []
    monkeypatch.setattr("rm_ood.serve.engine.log", lambda event, **_: events.append(event))
    held, go = threading.Event(), threading.Event()

    def raw(handler: Any) -> bool:
        if any(map(holds, handler.body["items"])):
            raise ConnectionAbortedError
        # The second half of a probe's canaries.
        if held.is_set() or len(engine.requests) % 2:
            return False
        reply = engine.answer(handler.path, handler.body)
        held.set()
        assert go.wait(20)
        handler.reply(200, json.dumps(reply).encode())
        return True

    with served(made[0], engine, probe_s=0.2) as (client, _):
        engine.raw = raw
        assert held.wait(20)
        assert ask(client, [BAD]).json["type"] == "engine_unavailable"
        engine.model = another_model(shared_decoder)
        go.set()
        wait_until(lambda: client.get("/readyz").json["reasons"] == ["engine serves another reward model"])
        assert "engine_back" not in events


def test_vectors_that_were_normalised_are_not_taken(made: tuple[Path, OODGuard], engine: Engine) -> None:
    def spoil(reply: dict[str, Any]) -> dict[str, Any]:
        for row in reply["data"]:
            row["data"] = (np.array(row["data"]) / np.linalg.norm(row["data"])).tolist()
        return reply

    engine.spoil = spoil
    with pytest.raises(MismatchError, match="they differ in final by"):
        backend(made[0], engine, kind="vllm-vectors")
    engine.spoil = lambda reply: {**reply, "data": [{**row, "data": row["data"][1:]} for row in reply["data"]]}
    with pytest.raises(MismatchError, match="vectors of 31 features, the guard was fitted on 32"):
        backend(made[0], engine, kind="vllm-vectors")


# -- the start


def test_what_cannot_be_served_is_refused_at_the_start(
    made: tuple[Path, OODGuard], engine: Engine, shared_decoder: Any, tmp_path: Path
) -> None:
    folder, _ = made
    files = FILES(str(folder / "model"))
    settings = EngineSettings(engine.url, retries=0)
    with pytest.raises(InputError, match=r"not \['response/mean@0.67'\]\. Serve it with --channels final"):
        load_backend(folder / "guard", files, settings, None)
    engine.owner = "somebody"
    with pytest.raises(EngineError, match="names neither SGLang nor vLLM"):
        backend(folder, engine)
    engine.owner = "vllm"
    with pytest.raises(MismatchError, match="RM_OOD_GUARD"):
        backend(folder, engine)
    engine.owner = "sglang"
    other = copy.deepcopy(shared_decoder)
    with torch.no_grad():
        other.score.weight.mul_(1.1)
    engine.head = other.score
    with pytest.raises(MismatchError, match="8 rewards are not those of their vectors"):
        backend(folder, engine, batch_size=8)
    # Without a checkpoint nobody recomputes the rewards; the canaries' own are known.
    plain = tmp_path / "tokenizer"
    files.tokenizer.save_pretrained(plain)
    found = model_files(str(plain))
    assert found.head is None
    with pytest.raises(MismatchError, match=r"not those of the reward model that the guard was fitted on: .*reward by"):
        load_backend(folder / "guard", found, settings, None, channels="final")
    # Where the engine gives no reward there is none without the head.
    with pytest.raises(InputError, match="the reward head is needed"):
        load_backend(folder / "guard", found, replace(settings, kind="vllm-vectors"), None, channels="final")
    engine.head = shared_decoder.score
    engine.key = KEY
    with pytest.raises(EngineError, match="401"):
        backend(folder, engine)
    with pytest.raises(FileNotFoundError):
        model_files("./nowhere")
    with pytest.raises(InputError, match="no tokenizer can be loaded"):
        model_files(str(folder))
    for wrong in ({"kind": "tgi"}, {"retries": -1}, {"concurrency": 0}, {"timeout_s": 0.0}, {"probe_s": float("nan")}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            EngineSettings(engine.url, **wrong)  # type: ignore[arg-type]


def test_a_guard_without_canaries_is_refused(made: tuple[Path, OODGuard], engine: Engine, tmp_path: Path) -> None:
    folder, guard = made
    bare = copy.copy(guard)
    bare._state = replace(guard.state, identity=replace(guard.state.identity, canaries=None))
    bare.save_pretrained(tmp_path / "guard")
    with pytest.raises(InputError, match="keeps no answers to the canary texts"):
        load_backend(
            tmp_path / "guard", FILES(str(folder / "model")), EngineSettings(engine.url), None, channels="final"
        )
    assert not engine.requests


@pytest.mark.parametrize("kind", ["auto", "sglang"])
def test_an_engine_that_takes_less_than_the_guard_is_told_at_the_start(
    kind: str, made: tuple[Path, OODGuard], engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    monkeypatch.setattr("rm_ood.serve.engine.log", lambda event, **_: events.append(event))
    # The guard's own limit is 64.
    for limit, told in ((64, []), (63, ["engine_limit"]), (None, [])):
        engine.limit = limit
        events.clear()
        scorer = backend(made[0], engine, kind=kind)
        scorer.tell()
        scorer.close()
        assert events == ["engine", *told]


def test_an_engine_of_a_named_kind_needs_no_list_of_models(made: tuple[Path, OODGuard], engine: Engine) -> None:
    engine.lists = False
    with pytest.raises(EngineError, match="--engine-kind"):
        backend(made[0], engine)
    with served(made[0], engine, kind="sglang") as (client, _):
        assert ask(client, ITEMS[:1]).status == 200


def test_another_dtype_is_served_when_it_is_allowed_and_every_verdict_says_so(
    made: tuple[Path, OODGuard], shared_decoder: Any
) -> None:
    folder, _ = made
    coarse = copy.deepcopy(shared_decoder).to(torch.bfloat16)
    files = FILES(str(folder / "model"))
    with Engine(coarse, coarse.score) as engine:
        settings = EngineSettings(engine.url, retries=0)
        with pytest.raises(MismatchError, match="--allow-dtype-change"):
            load_backend(folder / "guard", files, settings, None, channels="final")
        scorer = load_backend(folder / "guard", files, settings, None, channels="final", allow_dtype_change=True)
        try:
            with serving(scorer) as (client, _):
                (row,) = ask(client, ITEMS[:1]).json["results"]
                assert row["reasons"] == ["model_mismatch:dtype"]
        finally:
            scorer.close()


def test_the_command_refuses_what_cannot_work(
    made: tuple[Path, OODGuard], capsys: pytest.CaptureFixture[str], tmp_path: Path, engine: Engine, shared_decoder: Any
) -> None:
    folder, _ = made
    base = ["serve", "--guard", str(folder / "guard"), "--model", str(folder / "model"), "--channels", "final"]
    at = ["--engine", engine.url, "--engine-retries", "0"]

    def said(*more: str) -> tuple[int, str]:
        return main([*base, *more]), capsys.readouterr().err

    assert said("--engine-timeout", "3") == (BAD_INPUT, "rm-ood serve: --engine-timeout needs --engine URL\n")
    assert said(*at, "--device", "cpu")[1].startswith("rm-ood serve: --device and --dtype are the engine's own")
    assert "expected less than --model-timeout" in said(*at, "--engine-timeout", "30")[1]
    (tmp_path / "key").write_text("two words")
    code, error = said(*at, "--engine-key-file", str(tmp_path / "key"))
    assert (code, "words" in error, "--engine-key-file" in error) == (BAD_INPUT, False, True)
    with pytest.raises(SystemExit):
        main([*base, *at, "--engine-key", KEY])
    assert KEY not in capsys.readouterr().err
    other = copy.deepcopy(shared_decoder)
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    engine.model = other
    code, error = said(*at)
    assert (code, "canary texts" in error) == (MISMATCH, True)
    engine.stop()
    code, error = said(*at)
    assert code == BAD_INPUT
    assert "could not be reached" in error


def test_the_command_serves_without_the_models_weights(
    made: tuple[Path, OODGuard], engine: Engine, tmp_path: Path, decoder_tokenizer: Any
) -> None:
    folder, guard = made
    engine.key = KEY
    decoder_tokenizer.save_pretrained(tmp_path / "tokenizer")
    process = subprocess.Popen(
        [
            sys.executable, "-m", "rm_ood.cli", "serve", "--guard", str(folder / "guard"), "--model", str(tmp_path / "tokenizer"),
            "--channels", "final", "--engine", engine.url, "--engine-probe", "0.2", "--port", "0", "--json",
        ],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "RM_OOD_ENGINE_KEY": KEY},
    )  # fmt: skip
    assert process.stderr is not None
    assert process.stdout is not None
    with process.stderr, process.stdout:
        try:
            lines = []
            for line in process.stderr:
                lines.append(line)
                if '"listening"' in line:
                    break
            events = [json.loads(line) for line in lines]
            assert events[-1]["event"] == "listening", lines
            assert events[-2].items() >= {"event": "engine", "kind": "sglang", "head_checked": False}.items()
            client = Client(int(events[-1]["url"].rpartition(":")[2]))
            assert_rows(ask(client, ITEMS[:5]).json["results"], guard, ITEMS[:5])
            # The guard is loaded anew, and asked the canaries before it takes over.
            asked = len(engine.requests)
            process.send_signal(signal.SIGHUP)
            wait_until(lambda: client.metric('rm_ood_guard_reloads_total{outcome="replaced"}') == 1)
            assert len(engine.requests) > asked
            assert_rows(ask(client, ITEMS[:5]).json["results"], guard, ITEMS[:5])
            process.send_signal(signal.SIGTERM)
            out = process.stdout.read()
            rest = process.stderr.read()
            assert process.wait(30) == 0
            assert json.loads(out)["requests"] >= 3
            assert KEY not in "".join(lines) + rest + out
            assert engine.url not in "".join(lines) + rest
        finally:
            process.kill()
            process.wait()
