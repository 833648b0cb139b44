"""The model raises, hangs, or gives NaN: the item that did it is flagged or refused, the others are scored as always."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from conftest import POISON
from serving import Answer, Client, FaultyScorer, serving, wait_until

from rm_ood import OODGuard
from rm_ood.serve.server import Server

GOOD = ["the answer is small", "orange paper window", "quiet music in winter"]


@pytest.fixture
def faulty(minilm_guard: OODGuard) -> FaultyScorer:
    return FaultyScorer(minilm_guard)


@pytest.fixture
def served(faulty: FaultyScorer) -> Iterator[tuple[Client, Server]]:
    with serving(faulty, model_timeout_s=1.0, drain_timeout_s=1.0) as both:
        yield both


def test_an_item_that_the_model_fails_on_is_flagged_beside_scored_ones(
    served: tuple[Client, Server], minilm_guard: OODGuard
) -> None:
    client, _ = served
    answers = [GOOD[0], "explode", GOOD[1], GOOD[2], "explode too"]
    answer = client.post("/v1/score", {"prompt": "a question", "responses": answers})
    assert answer.status == 200
    for row, text in zip(answer.json["results"], answers, strict=True):
        if "explode" in text:
            assert (row["reward"], row["is_ood"], row["reasons"][0]) == (None, True, "scoring_failed")
            assert 0 < row["p_value"] <= minilm_guard.config.alpha
            assert all(axis["ood_score"] is None and axis["is_ood"] for axis in row["axes"].values())
        else:
            assert row["reward"] == pytest.approx(minilm_guard.check("a question", text).reward, rel=1e-4)
            assert row["reasons"] == []
    assert client.metric('rm_ood_unscored_items_total{reason="scoring_failed"}') == 2


def test_a_request_of_nothing_but_failures_is_an_error_and_spoils_no_other(
    served: tuple[Client, Server], faulty: FaultyScorer, capsys: pytest.CaptureFixture[str]
) -> None:
    client, server = served
    faulty.go.clear()
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(client.post, "/v1/score", {"prompt": "a question", "response": GOOD[0]})
        wait_until(lambda: faulty.seen)
        bad = pool.submit(client.post, "/v1/score", {"prompt": "a question", "response": "explode"})
        good = [pool.submit(client.post, "/v1/score", {"prompt": "a question", "response": text}) for text in GOOD]
        wait_until(lambda: server.service.batcher.waiting == 4)
        faulty.go.set()
        assert first.result().status == 200
        assert [future.result().status for future in good] == [200] * 3
        assert (bad.result().status, bad.result().json["type"]) == (500, "internal")
    # They went to the model together.
    assert len(faulty.seen[1]) == 4
    assert "explode" not in "".join(capsys.readouterr())


def test_a_nan_is_flagged_and_never_given_out(served: tuple[Client, Server]) -> None:
    client, _ = served
    body = {"prompt": "a question", "responses": [GOOD[0], f"a {POISON}"]}
    answer = client.post("/v1/score", body)
    good, bad = answer.json["results"]
    assert (bad["reward"], bad["is_ood"], bad["reasons"]) == (None, True, ["non_finite"])
    assert good["reward"] is not None
    assert b"NaN" not in answer.body
    assert b"Infinity" not in answer.body
    query = {"query": ["a question" + GOOD[0], f"a question a {POISON}"], "prompts": ["a question"] * 2}
    rewards = client.post("/get_reward", query).json["rewards"]
    assert rewards[1] < rewards[0] - 1
    assert client.metric('rm_ood_unscored_items_total{reason="non_finite"}') == 2


def test_a_model_that_hangs_is_told_by_time_and_by_readiness(
    served: tuple[Client, Server], faulty: FaultyScorer
) -> None:
    client, server = served
    faulty.go.clear()
    start = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(client.post, "/v1/score", {"prompt": "q", "response": GOOD[i]}) for i in range(2)]
        answers = [future.result() for future in asked]
    assert [(a.status, a.json["type"]) for a in answers] == [(504, "model_timeout")] * 2
    assert 1.0 <= time.monotonic() - start < 3
    wait_until(lambda: client.get("/readyz").status == 503)
    assert client.get("/readyz").json["reasons"] == ["model does not answer"]
    answer = client.post("/v1/score", {"prompt": "q", "response": GOOD[2]})
    assert (answer.status, answer.json["type"], answer.headers["retry-after"]) == (503, "model_stuck", "1")
    assert client.get("/livez").status == 200
    assert server.service.batcher.waiting == 0
    faulty.go.set()
    wait_until(lambda: client.get("/readyz").status == 200)
    assert client.post("/v1/score", {"prompt": "q", "response": GOOD[0]}).status == 200


def test_a_template_that_hangs_holds_up_nobody_who_needs_none(minilm_guard: OODGuard) -> None:
    class Slow(FaultyScorer):
        splits = 0

        def split(self, text: str, prompt: str | None, where: str) -> Any:
            self.splits += 1
            self.go.wait(30)
            return super().split(text, prompt, where)

    slow = Slow(minilm_guard)
    body = {"query": ["a question and an answer"], "prompts": ["a question"]}
    with serving(slow, model_timeout_s=1.0) as (client, _), ThreadPoolExecutor(1) as pool:
        slow.go.clear()
        asked = pool.submit(client.post, "/get_reward", body)
        try:
            wait_until(lambda: slow.splits)
            assert Client(client.port, timeout=0.8).get("/livez").status == 200
            assert (asked.result().status, asked.result().json["type"]) == (504, "model_timeout")
        finally:
            slow.go.set()
        assert client.post("/get_reward", body).status == 200


def test_a_server_whose_model_hangs_still_ends(minilm_guard: OODGuard) -> None:
    faulty = FaultyScorer(minilm_guard)
    answers: list[Answer | Exception] = []

    def ask(client: Client) -> None:
        try:
            answers.append(client.post("/v1/score", {"prompt": "q", "response": GOOD[0]}))
        except OSError as error:
            answers.append(error)

    with serving(faulty, model_timeout_s=60.0, drain_timeout_s=1.0) as (client, _):
        faulty.go.clear()
        asking = threading.Thread(target=ask, args=(client,))
        asking.start()
        wait_until(lambda: faulty.seen)
        start = time.monotonic()
    assert time.monotonic() - start < 10
    asking.join()
    faulty.go.set()
    # It was let go without a verdict.
    (answer,) = answers
    assert isinstance(answer, Exception) or answer.status >= 500
