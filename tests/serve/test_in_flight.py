"""Scorers that take several batches at once, and those that say that nothing can be scored now."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from serving import Client, FaultyScorer, serving, wait_until

from rm_ood import OODGuard
from rm_ood.serve.refusal import Refusal


def ask(client: Client, i: int) -> Any:
    return client.post("/v1/score", {"prompt": f"question {i}", "response": f"answer {i}"})


@pytest.mark.parametrize("concurrency", [1, 3])
def test_as_many_batches_are_in_flight_as_the_scorer_takes(concurrency: int, minilm_guard: OODGuard) -> None:
    faulty = FaultyScorer(minilm_guard)
    faulty.concurrency, faulty.batch_size = concurrency, 1
    with serving(faulty, batch_wait_s=0.0) as (client, server), ThreadPoolExecutor(8) as pool:
        faulty.go.clear()
        asked = [pool.submit(ask, client, i) for i in range(8)]
        wait_until(lambda: len(faulty.seen) == concurrency and server.service.batcher.waiting == 8 - concurrency)
        assert server.service.batcher.busy_since is not None
        assert server.service.batcher.runs(server.service.served)
        faulty.go.set()
        for i, future in enumerate(asked):
            (row,) = future.result().json["results"]
            assert row["reward"] == pytest.approx(minilm_guard.check(f"question {i}", f"answer {i}").reward, rel=1e-4)
        wait_until(lambda: server.service.batcher.busy_since is None)
    assert sorted(len(texts) for texts in faulty.seen) == [1] * 8


def test_a_scorer_that_refuses_refuses_every_item_of_the_batch(minilm_guard: OODGuard) -> None:
    class Away(FaultyScorer):
        away = True

        def score(self, works: Any) -> Any:
            if self.away:
                self.seen.append([])
                self.problem = "engine cannot be reached"
                raise Refusal(503, "engine_unavailable", "away", 7.0)
            self.problem = None
            return super().score(works)

    scorer = Away(minilm_guard)
    with serving(scorer) as (client, _):
        answer = client.post("/v1/score", {"prompt": "q", "responses": ["a", "b", "c"]})
        assert (answer.status, answer.json["type"], answer.headers["retry-after"]) == (503, "engine_unavailable", "7")
        # Not asked again item by item.
        assert scorer.seen == [[]]
        assert client.get("/readyz").json == {"ready": False, "reasons": ["engine cannot be reached"]}
        scorer.away = False
        assert client.post("/v1/score", {"prompt": "q", "responses": ["a", "b"]}).status == 200
        assert client.get("/readyz").status == 200
        assert client.metric("rm_ood_scored_items_total") == 2
