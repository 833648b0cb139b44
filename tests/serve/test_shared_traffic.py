"""One monitor over many replicas: the evidence of one stream, told once, in one file; and what stands behind a proxy."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import preference_rows
from prometheus_client.parser import text_string_to_metric_families
from serving import guard_scorer

from rm_ood import OODGuard, TrafficMonitor
from rm_ood.errors import IntegrityError, SaveError
from rm_ood.serve import ray_replica, shared_traffic
from rm_ood.serve.app import build_app
from rm_ood.serve.behind_proxy import BehindProxy
from rm_ood.serve.metrics import Metrics
from rm_ood.serve.ray_replica import Plan, Replica, ReplicaService, _LateApp
from rm_ood.serve.refusal import Refusal
from rm_ood.serve.service import Service
from rm_ood.serve.settings import ServeSettings
from rm_ood.serve.shared_traffic import Report, SharedTraffic, Watch

CALIBRATION = np.random.default_rng(0).normal(size=400)
ROWS = preference_rows(24, seed=11)


def report(*scores: float, sessions: list[int | None] | None = None) -> Report:
    return Report({"all": np.array(scores)}, np.array(scores) > 2, sessions or [None] * len(scores))


def to(watch: Watch) -> Callable[..., Awaitable[Any]]:
    async def ask(method: str, *args: Any) -> Any:
        return await getattr(watch, method)(*args)

    return ask


def test_replicas_make_one_stream() -> None:
    rng = np.random.default_rng(1)
    stream = [*zip(rng.normal(0.4, 1, 600).tolist(), rng.integers(0, 300, 600).tolist(), strict=True)]
    alone = TrafficMonitor(CALIBRATION)
    for score, session in stream:
        alone.update(score, sessions=[session], flags=[score > 2])

    async def spread() -> Any:
        watch = Watch(None, 1.0)
        for _ in range(3):
            await watch.open(TrafficMonitor(CALIBRATION))
        key = TrafficMonitor(CALIBRATION).digest
        return [await watch.watch(key, [report(score, sessions=[session])]) for score, session in stream][-1]

    # Evidence, threshold and sessions are those of a stream that no replica sees whole.
    state = asyncio.run(spread())
    assert state == alone.state
    assert (state.threshold, state.counted) == (100, len({session for _, session in stream}))


def test_a_watch_goes_on_where_another_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_traffic, "LEASE_WAIT_S", 0.1)
    folder = str(tmp_path / "monitor")
    fresh = TrafficMonitor(CALIBRATION)

    async def lives() -> None:
        first = Watch(folder, 0.02)
        await first.open(fresh)
        assert await first.watch("other", [report(1.0)]) is None
        await first.watch(fresh.digest, [report(1.0, 2.5)])
        # Two write to one file in no case.
        with pytest.raises(SaveError, match=r"another deployment has been using it for .* Name another folder"):
            Watch(folder, 1.0)
        file = tmp_path / "monitor" / f"monitor-{fresh.digest[:16]}.json"
        async with asyncio.timeout(10):
            while not file.exists() or TrafficMonitor.load(file, CALIBRATION).state.requests < 2:
                await asyncio.sleep(0.01)
        await first.watch(fresh.digest, [report(0.5)])
        await first.close()
        second = Watch(folder, 100.0)
        state = await second.open(TrafficMonitor(CALIBRATION))
        assert (state.requests, state.counted) == (3, 3)
        # Another calibration, or other settings, are another stream.
        assert (await second.open(TrafficMonitor(CALIBRATION, alpha=0.05))).requests == 0
        assert (await second.open(TrafficMonitor(CALIBRATION[:300]))).requests == 0
        # An alarm is written before it is told.
        state = await second.watch(fresh.digest, [report(*[9.0] * 40)])
        assert state is not None
        assert state.alarm
        assert TrafficMonitor.load(file, CALIBRATION).state.alarm
        await second.close()
        file.write_text(file.read_text().replace("9", "8", 1))
        third = Watch(folder, 1.0)
        with pytest.raises(IntegrityError):
            await third.open(TrafficMonitor(CALIBRATION))
        TrafficMonitor(CALIBRATION, alpha=0.05).save(file)
        with pytest.raises(IntegrityError, match="the state of another monitor"):
            await third.open(TrafficMonitor(CALIBRATION))
        await third.close()

    asyncio.run(lives())


def test_a_watch_forgets_who_is_not_heard_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(shared_traffic, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    old, new = TrafficMonitor(CALIBRATION).digest, TrafficMonitor(CALIBRATION[:300]).digest

    async def lives() -> None:
        watch, in_memory = Watch(str(tmp_path), 100.0), Watch(None, 100.0)
        for one in (watch, in_memory):
            await one.open(TrafficMonitor(CALIBRATION))
            await one.watch(old, [report(1.0, 2.5)])
            await one.open(TrafficMonitor(CALIBRATION[:300]))
            await one.publish("gone", [])
        for _ in range(40):
            clock[0] += 10.0
            for one in (watch, in_memory):
                # A replica tells that it is there although it has no verdicts.
                assert await one.watch(new, []) is not None
                await one.publish("there", [])
                await one.save()
        assert set(watch._monitors) == set(watch._saved) == set(watch._told) == {new}
        assert set(watch._families) == set(in_memory._families) == {"there"}
        # Without a file it would be lost.
        assert set(in_memory._monitors) == {old, new}
        # Who comes back is told to open it again, and goes on.
        assert await watch.watch(old, []) is None
        assert (await watch.open(TrafficMonitor(CALIBRATION))).requests == 2
        for one in (watch, in_memory):
            await one.close()

    asyncio.run(lives())


def test_a_folder_that_is_none_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match="not a folder that can be written"):
        Watch(str(tmp_path / "file"), 1.0)


def test_what_cannot_be_saved_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(self: TrafficMonitor, path: Any) -> None:
        raise SaveError("no")

    async def lives() -> None:
        watch = Watch(str(tmp_path), 100.0)
        fresh = TrafficMonitor(CALIBRATION)
        await watch.open(fresh)
        monkeypatch.setattr(TrafficMonitor, "save", refuses)
        await watch.save()
        shown = shared_traffic.Together(await watch.collected("a", []))
        text = Metrics().text("", shown)[0].decode()
        assert 'rm_ood_monitor_failures_total{replica="watch",what="save"} 1.0' in text

    asyncio.run(lives())


def test_verdicts_are_told_once_or_not_at_all(minilm_guard: OODGuard) -> None:
    scorer = guard_scorer(minilm_guard)
    works = scorer.encode(
        [
            SimpleNamespace(prompt=r["prompt"], response=r["chosen"], session=("s", i), group=None)
            for i, r in enumerate(ROWS)
        ]  # type: ignore[misc]
    )[:8]
    decisions = scorer.score(works)

    async def lives() -> None:
        watch, metrics = Watch(None, 1.0), Metrics()
        fails = 0

        async def ask(method: str, *args: Any) -> Any:
            nonlocal fails
            answer = await to(watch)(method, *args)
            if method == "watch" and fails:
                # It was counted, and the answer got lost.
                fails -= 1
                raise ConnectionError
            return answer

        traffic = SharedTraffic(scorer, metrics, ask)
        failures = metrics.monitor_failures.labels("watch")._value
        traffic.watch(works[:4], decisions[:4])
        await asyncio.sleep(0)
        # A watch that does not know the calibration is told it.
        await traffic.save()
        assert (traffic.state.requests, traffic.state.counted, failures.get()) == (4, 4, 0)
        await asyncio.sleep(0.01)
        fails = 1
        traffic.watch(works[4:], decisions[4:])
        traffic.watch(works[:4], decisions[:4])
        await asyncio.sleep(0)
        await traffic.save()
        assert failures.get() == 2
        await traffic.save()
        assert (traffic.state.requests, traffic.state.counted) == (12, 8)
        # From the model's thread.
        await asyncio.to_thread(traffic.watch, works[4:], decisions[4:])
        for _ in range(100):
            await asyncio.sleep(0.01)
            if traffic.state.requests == 16:
                break
        assert traffic.row()["requests"] == 16
        # Of the deployment, not of this replica.
        assert traffic.uncounted == 4
        assert traffic.watches_as(minilm_guard.monitor())
        assert not traffic.watches_as(minilm_guard.monitor(lifetime=50))

    asyncio.run(lives())


def test_a_watch_that_is_silent_costs_no_memory_and_no_reply(
    minilm_guard: OODGuard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_traffic, "_MOST_REPORTS", 3)
    monkeypatch.setattr(ray_replica, "_BEAT_S", 0.01)
    scorer = guard_scorer(minilm_guard)

    async def lives() -> None:
        gone = asyncio.Event()

        async def ask(method: str, *args: Any) -> Any:
            if method == "open":
                return scorer.monitor(None).state
            await gone.wait()
            raise TimeoutError

        service = ReplicaService(scorer, ServeSettings(monitor_state=Path("nowhere")), ask, "a")
        await service.join()
        await service.start()
        query: Any = SimpleNamespace(prompt="a question", response="an answer", session=None, group=None, where="item")
        for _ in range(6):
            (outcome,) = await service.decide([query])
            assert not outcome.failed
        lost = service.metrics.monitor_failures.labels("watch")._value
        assert 1 <= lost.get() <= 3
        gone.set()
        with pytest.raises(Refusal) as told:
            await service.exposition("")
        assert (told.value.status, told.value.kind) == (503, "metrics_unavailable")
        await service.stop()
        assert lost.get() >= 6

    asyncio.run(lives())


def test_a_replica_waits_for_a_watch_that_starts_and_not_for_one_that_hangs(
    minilm_guard: OODGuard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_replica, "_ASK_TIMEOUT_S", 0.05)
    scorer = guard_scorer(minilm_guard)

    async def lives() -> None:
        async def ask(method: str, *args: Any) -> Any:
            if method == "watch":
                await asyncio.Event().wait()
            await asyncio.sleep(0.3)
            return scorer.monitor(None).state

        service = ReplicaService(scorer, ServeSettings(), ask, "a")
        await service.join()
        async with asyncio.timeout(10):
            await service.served.traffic.save()
        assert service.metrics.monitor_failures.labels("watch")._value.get() == 1
        await service.start()
        await service.stop()

    # The watch of another deployment may have to let go of its folder first.
    assert ray_replica._JOIN_TIMEOUT_S > shared_traffic.LEASE_WAIT_S
    asyncio.run(lives())


def test_a_replica_that_stops_loses_no_report_uncounted(
    minilm_guard: OODGuard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_replica, "_BEAT_S", 0.01)
    scorer = guard_scorer(minilm_guard)

    async def lives() -> None:
        watch = Watch(None, 1.0)
        empty, full, go = asyncio.Event(), asyncio.Event(), asyncio.Event()
        released = asyncio.Event()

        async def ask(method: str, *args: Any) -> Any:
            if method == "watch":
                (full if args[1] else empty).set()
                # The beat is under way as a verdict comes; it tells that too.
                await (go if args[1] else released).wait()
            return await to(watch)(method, *args)

        service = ReplicaService(scorer, ServeSettings(), ask, "a")
        await service.join()
        await service.start()
        await empty.wait()
        query: Any = SimpleNamespace(prompt="a question", response="an answer", session=None, group=None, where="item")
        await service.decide([query])
        released.set()
        await full.wait()
        stopping = asyncio.create_task(service.stop())
        await asyncio.sleep(0.1)
        go.set()
        await stopping
        assert service.served.traffic.state.requests == 1
        assert watch._monitors[scorer.monitor(None).digest].state.requests == 1
        await watch.close()

    asyncio.run(lives())


def test_a_watch_that_begins_anew_leaves_no_negative_count(minilm_guard: OODGuard) -> None:
    scorer = guard_scorer(minilm_guard)
    works = scorer.encode(
        [SimpleNamespace(prompt=r["prompt"], response=r["chosen"], session="one", group=None) for r in ROWS[:8]]  # type: ignore[misc]
    )
    decisions = scorer.score(works)

    async def lives() -> None:
        watch = Watch(None, 1.0)
        # A monitor that travels is another one.
        traffic = SharedTraffic(
            scorer, Metrics(), lambda method, *args: to(watch)(method, *(copy.deepcopy(arg) for arg in args))
        )

        async def told(n: int) -> None:
            traffic.watch(works[:n], decisions[:n])
            await asyncio.sleep(0)
            await traffic.save()

        await told(1)
        await told(8)
        assert (traffic.state.requests, traffic.uncounted) == (9, 8)
        watch = Watch(None, 1.0)
        await traffic.save()
        assert (traffic.state.requests, traffic.uncounted) == (0, 0)

    asyncio.run(lives())


def test_the_same_user_config_again_reloads_nothing(
    minilm_guard: OODGuard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    minilm_guard.model.save_pretrained(tmp_path / "model")
    minilm_guard.tokenizer.save_pretrained(tmp_path / "model")
    minilm_guard.save_pretrained(tmp_path / "guard")
    # What only a cluster has: its proxies, and the name that it gives a replica.
    monkeypatch.setattr(ray_replica, "_check_proxies", lambda key: None)
    monkeypatch.setattr(ray_replica.logs, "configure", lambda: None)

    class Here(Replica):
        async def _start(self, scorer: Any) -> ReplicaService:
            service = ReplicaService(scorer, self._plan.settings, to(Watch(None, 1.0)), "a")
            await service.start()
            return service

    async def lives() -> None:
        replica = Here(Plan(str(tmp_path / "model"), ServeSettings(), {"device": "cpu"}, {}), None)
        config = {"guard": str(tmp_path / "guard")}
        await replica.reconfigure(config)
        service = replica._service
        assert service is not None
        served, outcomes = service.served, service.metrics.reloads
        # As Ray calls it where a replica's rank changes.
        await replica.reconfigure(dict(config))
        assert service.served is served
        await replica.reconfigure({**config, "version": 2})
        assert service.served is not served
        await replica.reconfigure({"guard": str(tmp_path / "none")})
        await replica.reconfigure({"guard": str(tmp_path / "none")})
        assert [outcomes.labels(name)._value.get() for name in ("replaced", "rolled_back")] == [1, 1]
        await replica._stop()

    asyncio.run(lives())


def test_metrics_of_all_replicas_are_one_exposition(minilm_guard: OODGuard, monkeypatch: pytest.MonkeyPatch) -> None:
    async def lives() -> None:
        watch = Watch(None, 1.0)
        services = [ReplicaService(guard_scorer(minilm_guard), ServeSettings(), to(watch), name) for name in "ab"]
        for n, service in enumerate(services):
            for _ in range(n + 1):
                service.metrics.answered("/v1/score", 200, 0.02)
            await service._show("publish")
        for accept in ("", "application/openmetrics-text; version=1.0.0"):
            data, kind = await services[0].exposition(accept)
            assert ("openmetrics" in kind) == bool(accept)
        data, _ = await services[0].exposition("")
        families = {family.name: family for family in text_string_to_metric_families(data.decode())}
        counts = {
            s.labels["replica"]: s.value
            for s in families["rm_ood_requests"].samples
            if (s.name, s.labels["endpoint"], s.labels["status"]) == ("rm_ood_requests_total", "/v1/score", "200")
        }
        assert counts == {"a": 1, "b": 2}
        assert families["rm_ood_request_duration_seconds"].type == "histogram"
        assert all("replica" in s.labels for family in families.values() for s in family.samples)
        # The dead are forgotten.
        monkeypatch.setattr(shared_traffic, "_GONE_S", 0.05)
        await asyncio.sleep(0.1)
        assert b'replica="b"' not in (await services[0].exposition(""))[0]
        for service in services:
            await service.stop()

    asyncio.run(lives())


def test_behind_a_proxy_a_key_is_needed_where_others_reach_it(
    minilm_guard: OODGuard, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="rm_ood.serve")

    def behind(settings: ServeSettings) -> tuple[Service, Callable[..., Any]]:
        async def made() -> Service:
            return Service(guard_scorer(minilm_guard), settings)

        service = asyncio.run(made())
        app = BehindProxy(build_app(service.scorer, settings, service=service), settings.api_key is not None)

        def ask(path: str, server: Any, *, root_path: str = "", request_id: bytes = b"mine") -> Any:
            sent: list[Any] = []

            async def receive() -> Any:
                return {"type": "http.request", "body": b"", "more_body": False}

            async def send(message: Any) -> None:
                sent.append(message)

            headers = [(b"x-request-id", request_id)]
            scope = {
                "type": "http", "method": "GET", "path": path, "root_path": root_path, "query_string": b"",
                "server": server, "headers": headers,
            }  # fmt: skip
            asyncio.run(app(scope, receive, send))
            reply = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
            return sent[0]["status"], reply, sent[1]["body"]

        return service, ask

    elsewhere = (("10.0.0.7", 8000), ("0.0.0.0", 8000), None, ("", None))
    service, ask = behind(ServeSettings())
    status, headers, _ = ask("/v1/guard", ("127.0.0.1", 8000))
    # The proxy writes the id itself.
    assert (status, "x-request-id" in headers) == (200, False)
    for n, server in enumerate(elsewhere, 1):
        caplog.clear()
        status, headers, body = ask("/v1/guard", server, request_id=b"not one\xff")
        assert status == 403
        assert b'"key_needed"' in body
        assert b"not one" not in body
        assert headers["cache-control"] == "no-store"
        assert "x-request-id" not in headers
        assert service.metrics.requests.labels("other", "403")._value.get() == n
        (line,) = [record for record in caplog.records if record.msg == "request"]
        assert (line.fields["status"], line.fields["error"]) == (403, "key_needed")  # type: ignore[attr-defined]
        assert ask("/livez", server)[0] == 200
    # Under a prefix it is still what it is.
    assert ask("/guards/a/v1/guard", ("127.0.0.1", 8000), root_path="/guards/a")[0] == 200
    assert ask("/guards/livez", ("10.0.0.7", 1), root_path="/guards")[0] == 200
    assert ask("/guards/readyz", ("10.0.0.7", 1), root_path="/guards")[0] == 403
    _, ask = behind(ServeSettings(api_key=b"digest"))
    for server in elsewhere:
        assert ask("/v1/guard", server)[0] == 401


def test_nothing_is_served_before_a_guard_is_named() -> None:
    async def stop() -> None:
        raise AssertionError

    with pytest.raises(RuntimeError, match="names no guard"):
        asyncio.run(_LateApp(stop)({"type": "http"}, None, None))  # type: ignore[arg-type]
