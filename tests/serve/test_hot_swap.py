"""Another guard in the place of this one, under load; and the traffic monitor beside it."""

from __future__ import annotations

import asyncio
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import preference_rows
from serving import FaultyScorer, guard_scorer, serving, wait_until

from rm_ood import CalibrationWarning, MismatchError, OODGuard
from rm_ood.serve.scorer import GuardScorer, Scorer
from rm_ood.serve.server import Server

ROWS = preference_rows(40, seed=11)


def items(n: int) -> dict[str, Any]:
    return {"items": [{"prompt": row["prompt"], "response": row["chosen"]} for row in ROWS[:n]]}


@pytest.fixture
def folder(tmp_path: Path, minilm_guard: OODGuard) -> Path:
    minilm_guard.save_pretrained(tmp_path / "guard")
    return tmp_path / "guard"


def reload(server: Server, load: Callable[[], Scorer]) -> bool:
    server.service.load = load
    loop = server.service.batcher._task.get_loop()  # type: ignore[union-attr]
    return asyncio.run_coroutine_threadsafe(server.service.reload(), loop).result(60)


def again(folder: Path, guard: OODGuard, **options: Any) -> GuardScorer:
    return GuardScorer(OODGuard.from_pretrained(folder, guard.model, guard.tokenizer, **options))


def test_a_swap_under_load_loses_nothing(minilm_guard: OODGuard, folder: Path) -> None:
    with serving(again(folder, minilm_guard), max_queue=256) as (client, server):
        answers: list[dict[str, Any]] = []
        done = threading.Event()

        def ask() -> None:
            while not done.is_set():
                answer = client.post("/v1/score", items(3))
                assert answer.status == 200
                answers.append(answer.json)

        def more(n: int) -> None:
            before = len(answers)
            wait_until(lambda: len(answers) > before + n)

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        digests = [server.service.scorer.digest]
        for alpha in (0.5, 0.05, 0.3):
            more(4)
            assert reload(server, lambda alpha=alpha: again(folder, minilm_guard, alpha=alpha))
            digests.append(server.service.scorer.digest)
        more(8)
        done.set()
        for thread in threads:
            thread.join()
        alphas = dict(zip(digests, (0.05, 0.5, 0.05, 0.3), strict=True))
        assert len(set(digests)) == 3
        for answer in answers:
            for row in answer["results"]:
                assert row["is_ood"] == (row["p_value"] <= alphas[answer["guard"]])
        assert {answer["guard"] for answer in answers} == set(digests)
        # One set of hooks is left beside the shared guard's own.
        assert client.metric('rm_ood_guard_reloads_total{outcome="replaced"}') == 3
        assert client.metric("rm_ood_detector_info") == 1


def test_a_guard_that_fails_its_checks_changes_nothing(
    minilm_guard: OODGuard, minilm: tuple[Any, Any], folder: Path
) -> None:
    other = OODGuard(*minilm, alpha=0.05, max_length=64, channels="final")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        other.fit(preference_rows(100), calibration=preference_rows(115, seed=1), progress=False)
    other.save_pretrained(folder.parent / "other")
    other.detach()

    class Blind(GuardScorer):
        """Loads well, and gives no rewards."""

        def score(self, works: Any) -> Any:
            return self.failed(works, "non_finite")

    def raises() -> Scorer:
        raise RuntimeError("no")

    with serving(guard_scorer(minilm_guard)) as (client, server):
        before = client.post("/v1/score", items(2)).json
        assert not reload(server, lambda: again(folder.parent / "other", minilm_guard))
        assert not reload(
            server, lambda: Blind(OODGuard.from_pretrained(folder, minilm_guard.model, minilm_guard.tokenizer))
        )
        assert not reload(server, raises)
        after = client.post("/v1/score", items(2)).json
        assert (after["results"], after["guard"]) == (before["results"], before["guard"])
        assert client.metric('rm_ood_guard_reloads_total{outcome="rolled_back"}') == 3


def test_the_monitor_goes_on_only_where_the_calibration_does(
    minilm_guard: OODGuard, folder: Path, tmp_path: Path
) -> None:
    recalibrated = OODGuard.from_pretrained(folder, minilm_guard.model, minilm_guard.tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        recalibrated.calibrate(preference_rows(115, seed=5), progress=False)
    recalibrated.save_pretrained(tmp_path / "recalibrated")
    recalibrated.detach()
    state = tmp_path / "monitor.json"
    with serving(again(folder, minilm_guard), monitor_state=state) as (client, server):
        assert client.post("/v1/score", items(3)).json["monitor"]["requests"] == 3
        assert reload(server, lambda: again(folder, minilm_guard))
        assert client.post("/v1/score", items(3)).json["monitor"]["requests"] == 6
        assert reload(server, lambda: again(tmp_path / "recalibrated", minilm_guard))
        # What the one before saw is kept beside it, and so is what it sees of requests that it had accepted.
        assert again(folder, minilm_guard).monitor(f"{state}.old").state.requests == 6
        assert client.post("/v1/score", items(2)).json["monitor"]["requests"] == 2
    # What was saved at the end is the state of the guard that was served at the end.
    with pytest.raises(MismatchError, match="other calibration scores"):
        again(folder, minilm_guard).monitor(state)
    assert again(tmp_path / "recalibrated", minilm_guard).monitor(state).state.requests == 2
    assert again(folder, minilm_guard).monitor(f"{state}.old").state.requests == 6
    # A server that finds another calibration's state moves it aside; a swap leaves none of the old one, traffic or not.
    with serving(again(folder, minilm_guard), monitor_state=state) as (client, server):
        assert client.post("/v1/score", items(1)).json["monitor"]["requests"] == 1
        assert again(tmp_path / "recalibrated", minilm_guard).monitor(f"{state}.old").state.requests == 2
        assert reload(server, lambda: again(tmp_path / "recalibrated", minilm_guard))
    assert again(tmp_path / "recalibrated", minilm_guard).monitor(state).state.requests == 0
    # What a request that was accepted before the swap shows is evidence about the guard that scores it.
    faulty = FaultyScorer(minilm_guard)
    state.unlink()
    with serving(faulty, monitor_state=state) as (client, server), ThreadPoolExecutor(2) as pool:
        faulty.go.clear()
        asked = pool.submit(client.post, "/v1/score", items(3))
        wait_until(lambda: faulty.seen)
        swapped = pool.submit(reload, server, lambda: again(tmp_path / "recalibrated", minilm_guard))
        wait_until(lambda: server.service.scorer is not faulty)
        faulty.go.set()
        assert swapped.result()
        assert asked.result().status == 200
        assert again(folder, minilm_guard).monitor(f"{state}.old").state.requests == 3


def test_one_of_a_session_counts(minilm_guard: OODGuard) -> None:
    with serving(guard_scorer(minilm_guard)) as (client, _):

        def counted(body: Any) -> int:
            found: int = client.post("/v1/score", body).json["monitor"]["counted"]
            return found

        row = ROWS[0]
        one = {"prompt": row["prompt"], "response": row["chosen"]}
        assert counted(one) == 1
        # The prompt is the session of what names none, within a request and across.
        assert counted({**one, "response": "another"}) == 1
        assert counted({"prompt": row["prompt"].upper(), "responses": ["x", "y"]}) == 1
        assert counted({**one, "session": "a"}) == 2
        assert counted({"prompt": "something else", "response": "z", "session": "a"}) == 2
        assert counted({"items": [{**one, "session": "b"}, {**one, "session": "c"}, {**one, "session": "b"}]}) == 4


def test_the_alarm_is_told_in_replies_metrics_and_readiness(minilm_guard: OODGuard) -> None:
    with (
        serving(guard_scorer(minilm_guard), unready_on_alarm=True) as (strict, _),
        serving(guard_scorer(minilm_guard)) as (lenient, _),
    ):
        for client in (strict, lenient):
            assert client.metric("rm_ood_monitor_alarm") == 0
            reply: Any = None
            for i in range(30):
                odd = [{"prompt": f"{i} {j} @@@ ;;; 0x{j}", "response": f"!!!! {i} zz {j} ((("} for j in range(8)]
                reply = client.post("/v1/score", {"items": odd}).json["monitor"]
                if reply["alarm"]:
                    break
            assert reply["alarm"]
            assert reply["e_value"] >= 1
            assert "larger than the calibration data's" in reply["message"]
            assert client.metric("rm_ood_monitor_alarm") == 1
            assert client.metric("rm_ood_monitor_flag_rate") > 0.2
            # Scoring goes on.
            assert client.post("/v1/score", items(1)).status == 200
        assert strict.get("/readyz").json == {"ready": False, "reasons": ["traffic alarm"]}
        assert strict.get("/readyz").status == 503
        assert strict.metric("rm_ood_ready") == 0
        assert lenient.get("/readyz").status == 200


def test_a_monitor_that_cannot_be_saved_is_counted_and_spoils_nothing(minilm_guard: OODGuard, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with serving(guard_scorer(minilm_guard), monitor_state=tmp_path / "file/monitor.json", monitor_save_s=0.02) as (
        client,
        _,
    ):
        assert client.post("/v1/score", items(1)).status == 200
        wait_until(lambda: client.metric('rm_ood_monitor_failures_total{what="save"}') > 0)
        assert client.get("/readyz").status == 200


def test_batches_hold_items_of_like_length_and_one_guard(minilm_guard: OODGuard) -> None:
    faulty = FaultyScorer(minilm_guard)
    # As long as the first one is held here, nothing is late.
    with serving(faulty, max_queue=64, model_timeout_s=3600.0, request_timeout_s=3600.0) as (client, server):
        faulty.go.clear()
        threads = []

        def ask(text: str) -> None:
            thread = threading.Thread(
                target=client.post, args=("/v1/score", {"prompt": "a question", "response": text})
            )
            thread.start()
            threads.append(thread)

        ask("first")
        wait_until(lambda: len(faulty.seen) == 1)
        rng = np.random.default_rng(0)
        texts = ["river " * int(n) for n in rng.permutation(np.arange(1, 33))]
        for i, text in enumerate(texts):
            ask(text)
            wait_until(lambda i=i: server.service.batcher.waiting == i + 1)
        faulty.go.set()
        for thread in threads:
            thread.join()
        first, second = faulty.seen[1], faulty.seen[2]
        assert len(first) == len(second) == 16
        # The one that came first is in the first batch, with its neighbours in length.
        assert texts[0] in first
        own = len(texts[0])
        assert max(abs(len(t) - own) for t in first) <= min(abs(len(t) - own) for t in second)
        padded = client.metric('rm_ood_tokens_total{kind="padding"}')
        assert padded < 0.5 * client.metric('rm_ood_tokens_total{kind="text"}')


def test_a_monitor_that_hears_nothing_is_told_once(
    minilm_guard: OODGuard, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("rm_ood.serve.traffic._QUIET", 10)
    same = {"items": [{**item, "session": "s"} for item in items(4)["items"]]}
    with serving(guard_scorer(minilm_guard)) as (client, _):

        def ask(body: Any) -> tuple[float, int]:
            assert client.post("/v1/score", body).status == 200
            told = [record for record in caplog.records if record.msg == "monitor_hears_nothing"]
            return client.metric("rm_ood_monitor_uncounted_items"), len(told)

        # The first counts, and then no other of its session.
        assert [ask(same) for _ in range(5)] == [(0, 0), (4, 0), (8, 0), (12, 1), (16, 1)]
        assert ask(items(1)) == (0, 1)
        assert [ask(same) for _ in range(3)] == [(4, 1), (8, 1), (12, 2)]
