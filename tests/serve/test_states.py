"""Start, score, drain, restart, swap the guard, in any order: verdicts, counts and readiness stay what they must be."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import POISON, preference_rows
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from serving import Client, serving, wait_until

from rm_ood import CalibrationWarning, OODGuard
from rm_ood.serve.scorer import GuardScorer
from rm_ood.serve.server import Server

TEXTS = [(row["prompt"], row["chosen"]) for row in preference_rows(12, seed=11)]
TEXTS += [("a question", f"a {POISON}"), ("zzzz 9@9@9", "!!!! 0x00 ;;;;"), ("a question", "")]
some_texts = st.lists(st.integers(0, len(TEXTS) - 1), min_size=1, max_size=5, unique=True)
GUARDS = ("first", "recalibrated")


class Machine(RuleBasedStateMachine):
    """A server, and what is known of it. `guards` and `folders` are set by the test."""

    guards: dict[str, OODGuard]
    folders: Path

    @initialize(guard=st.sampled_from(GUARDS))
    def begin(self, guard: str) -> None:
        self.state = self.folders / "monitor.json"
        for old in self.folders.glob("monitor.json*"):
            old.unlink()
        self.stack: contextlib.ExitStack | None = None
        # Whose traffic the saved state is, and how many items of it were scored.
        self.watched, self.counted = guard, 0
        self.start(guard)

    def scorer(self, name: str) -> GuardScorer:
        guard = self.guards["first"]
        return GuardScorer(OODGuard.from_pretrained(self.folders / name, guard.model, guard.tokenizer))

    @precondition(lambda self: self.stack is None)
    @rule(guard=st.sampled_from(GUARDS))
    def start(self, guard: str) -> None:
        self.serves = guard
        if guard != self.watched:
            self.watched, self.counted = guard, 0
        self.asked = self.swaps = self.failed_swaps = 0
        self.stack = contextlib.ExitStack()
        both = self.stack.enter_context(serving(self.scorer(guard), monitor_state=self.state, mode="shadow"))
        self.client: Client = both[0]
        self.server: Server = both[1]

    def ask(self, texts: list[int]) -> dict[str, Any] | None:
        """The reply, checked; None from a server that takes no more."""
        items = [{"id": f"{i}", "prompt": TEXTS[i][0], "response": TEXTS[i][1]} for i in texts]
        try:
            answer = self.client.post("/v1/score", {"items": items})
        except OSError:
            return None
        assert answer.status == 200, answer.body
        reply: dict[str, Any] = answer.json
        wanted = self.guards[self.serves]
        for i, row in zip(texts, reply["results"], strict=True):
            alone = wanted.check(*TEXTS[i])
            assert (row["id"], row["is_ood"], row["reasons"]) == (f"{i}", alone.is_ood, list(alone.reasons))
            assert row["reward"] == pytest.approx(alone.to_dict()["reward"], abs=1e-4)
            assert row["p_value"] == pytest.approx(alone.p_value, abs=0.02)
        return reply

    @precondition(lambda self: self.stack is not None)
    @rule(texts=some_texts)
    def score(self, texts: list[int]) -> None:
        reply = self.ask(texts)
        assert reply is not None
        self.asked += 1
        self.counted += len(texts)
        assert reply["monitor"]["requests"] == self.counted
        assert reply["guard"] == self.server.service.scorer.digest

    @precondition(lambda self: self.stack is not None)
    @rule(requests=st.lists(some_texts, min_size=2, max_size=4))
    def score_together(self, requests: list[list[int]]) -> None:
        with ThreadPoolExecutor(len(requests)) as pool:
            replies = list(pool.map(self.ask, requests))
        assert None not in replies
        self.asked += len(requests)
        self.counted += sum(map(len, requests))

    @precondition(lambda self: self.stack is not None)
    @rule(
        body=st.sampled_from([b"{", b"[]", b'{"prompt": "a"}', b'{"prompt": "a", "response": "b", "more": 1}', b"\xff"])
    )
    def send_nonsense(self, body: bytes) -> None:
        assert self.client.post("/v1/score", body).status in (400, 422)
        self.asked += 1

    def reload(self, load: Callable[[], GuardScorer]) -> bool:
        self.server.service.load = load
        loop = self.server.service.batcher._task.get_loop()  # type: ignore[union-attr]
        return asyncio.run_coroutine_threadsafe(self.server.service.reload(), loop).result(60)

    @precondition(lambda self: self.stack is not None)
    @rule(guard=st.sampled_from(GUARDS))
    def swap(self, guard: str) -> None:
        assert self.reload(lambda: self.scorer(guard))
        self.swaps += 1
        self.serves = guard
        if guard != self.watched:
            self.watched, self.counted = guard, 0

    @precondition(lambda self: self.stack is not None)
    @rule()
    def swap_in_vain(self) -> None:
        assert not self.reload(lambda: self.scorer("broken"))
        self.failed_swaps += 1

    @precondition(lambda self: self.stack is not None)
    @rule(requests=st.lists(some_texts, max_size=3))
    def drain(self, requests: list[list[int]]) -> None:
        assert self.stack is not None
        with ThreadPoolExecutor(max(1, len(requests))) as pool:
            asked = [pool.submit(self.ask, texts) for texts in requests]
            self.stack.close()
            self.stack = None
            replies = [one.result() for one in asked]
        self.counted += sum(len(texts) for texts, reply in zip(requests, replies, strict=True) if reply is not None)
        saved = self.scorer(self.serves).monitor(self.state) if self.state.exists() else None
        assert (saved.state.requests if saved is not None else 0) == self.counted

    @invariant()
    def what_must_hold(self) -> None:
        if getattr(self, "stack", None) is None:
            return
        assert self.client.get("/readyz").json == {"ready": True, "reasons": []}
        batcher = self.server.service.batcher
        assert batcher.waiting == 0
        wait_until(lambda: batcher.busy_since is None)
        # The request that asks is itself in flight.
        wait_until(lambda: self.client.metric("rm_ood_requests_in_flight") == 1)
        assert self.client.metric('rm_ood_requests_total{endpoint="/v1/score"}') == self.asked
        assert self.client.metric('rm_ood_guard_reloads_total{outcome="replaced"}') == self.swaps
        assert self.client.metric('rm_ood_guard_reloads_total{outcome="rolled_back"}') == self.failed_swaps
        assert self.server.service.served.traffic.state.requests == self.counted

    def teardown(self) -> None:
        if getattr(self, "stack", None) is not None:
            self.stack.close()  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def prepared(minilm_guard: OODGuard, tmp_path_factory: pytest.TempPathFactory) -> Iterator[type[Machine]]:
    folders = tmp_path_factory.mktemp("states")
    for name in (*GUARDS, "broken"):
        minilm_guard.save_pretrained(folders / name)
    # Their own models: verdicts are asked for while the server's runs.
    first, second = (
        OODGuard.from_pretrained(folders / "first", copy.deepcopy(minilm_guard.model), minilm_guard.tokenizer)
        for _ in range(2)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        second.calibrate(preference_rows(115, seed=5), progress=False)
    second.save_pretrained(folders / "recalibrated", overwrite=True)
    authority = folders / "broken/ood_guard.safetensors"
    authority.write_bytes(authority.read_bytes()[:-1])
    yield type("Prepared", (Machine,), {"guards": {"first": first, "recalibrated": second}, "folders": folders})
    for guard in (first, second):
        guard.detach()


@pytest.mark.parametrize(
    ("runs", "steps"),
    [pytest.param(4, 20, id="20 steps"), pytest.param(5, 200, id="200 steps", marks=pytest.mark.long)],
)
def test_the_server_keeps_its_promises_in_every_order(prepared: type[Machine], runs: int, steps: int) -> None:
    run_state_machine_as_test(
        prepared,
        settings=settings(
            max_examples=runs,
            stateful_step_count=steps,
            deadline=None,
            derandomize=True,
            # A run takes seconds: the first that fails is told as it is.
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )
