"""Ray Serve: two replicas behind Ray's proxy, one monitor over both; a replica that dies; a guard put in another's place."""

from __future__ import annotations

import contextlib
import copy
import json
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from conftest import POISON, preference_rows
from serving import Client, guard_scorer, serving, wait_until
from test_ray_data import RAY_WARNINGS
from test_same_verdicts import assert_same_row
from test_serving import example

from rm_ood import CalibrationWarning, OODGuard
from rm_ood.cli import main as rm_ood
from rm_ood.client import GuardClient
from rm_ood.errors import InputError
from rm_ood.ray_data import Scorer
from rm_ood.reward_model import load_reward_model
from rm_ood.serve.ray_replica import _check_proxies
from rm_ood.serve.ray_serve import NAME, WATCH, app, deployment
from rm_ood.serve.settings import KEY_VARIABLE, ServeSettings, key_digest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::rm_ood.CalibrationWarning"),
    pytest.mark.filterwarnings(*RAY_WARNINGS),
    # Ray Serve 2.60 as it is imported.
    pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`"),
]
KEY = "k" * 32
ROWS = preference_rows(24, seed=11)
PAIRS = [(row["prompt"], row["chosen"]) for row in ROWS]
ITEMS = [{"id": f"item {i}", "prompt": p, "response": r} for i, (p, r) in enumerate(PAIRS)]


@pytest.fixture(scope="module")
def place(minilm_guard: OODGuard, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a reward model, its guard, the same calibrated anew, and a guard of another model."""
    folder = tmp_path_factory.mktemp("ray_serve")
    minilm_guard.model.save_pretrained(folder / "model")
    minilm_guard.tokenizer.save_pretrained(folder / "model")
    minilm_guard.save_pretrained(folder / "guard")
    model = copy.deepcopy(minilm_guard.model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        again = OODGuard.from_pretrained(folder / "guard", model, minilm_guard.tokenizer)
        again.calibrate(preference_rows(130, seed=7), progress=False).save_pretrained(folder / "recalibrated")
        model.classifier.weight.data.mul_(2)
        other = OODGuard(model, minilm_guard.tokenizer, alpha=0.05, max_length=64)
        other.fit(preference_rows(60), calibration=preference_rows(115, seed=1), progress=False)
        other.save_pretrained(folder / "of another model")
    (folder / "key").write_text(KEY)
    return folder


# -- what is asked of Ray, before there is a cluster


def test_autoscaling_goes_by_batches_and_is_checked(place: Path) -> None:
    def built(**options: Any) -> Any:
        bound = deployment(str(place / "guard"), str(place / "model"), **options)
        return bound._bound_deployment._deployment_config

    config = built(replicas=(1, 3), autoscaling={"upscale_delay_s": 5.0}, settings=ServeSettings(max_queue=48))
    scaling = config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.upscale_delay_s) == (1, 3, 5.0)
    assert (config.max_ongoing_requests, config.max_queued_requests) == (48, 48)
    assert OODGuard.from_pretrained(place / "guard").config.batch_size == 16
    # Ray counts requests, the queue items: with two of 32 in a queue of 64 there is no room for a third.
    for settings, target in (
        (ServeSettings(), 1.5),
        (ServeSettings(max_queue=48), 0.75),
        (ServeSettings(max_items=8), 6),
        (ServeSettings(max_items=1), 16),
        (ServeSettings(max_items=1, batch_size=4), 4),
        (ServeSettings(max_items=1, max_queue=8), 6),
    ):
        assert built(replicas=(0, 2), settings=settings).autoscaling_config.target_ongoing_requests == target
    # A drain is given the time that the settings give it.
    assert built(settings=ServeSettings(drain_timeout_s=7)).graceful_shutdown_timeout_s > 7
    for options, message in (
        ({"replicas": 0}, "replicas=0: expected a number from 1"),
        ({"replicas": (3, 2)}, "the least and the most"),
        ({"replicas": 2, "target_ongoing_requests": 4}, "give the least and the most"),
        ({"replicas": (1, 2), "target_ongoing_requests": 65}, "at most max_ongoing_requests=64"),
        ({"replicas": (1, 2), "autoscaling": {"upscale": 1}}, r"no settings \['upscale'\]"),
        ({"replicas": (1, 2), "autoscaling": {"min_replicas": 2}}, r"no settings \['min_replicas'\]"),
        ({"replicas": (1, 2), "autoscaling": {"upscale_delay_s": -1}}, "upscale_delay_s: Input should be greater"),
        ({"max_ongoing_requests": 0}, "max_ongoing_requests=0"),
        ({"max_queued_requests": True}, "max_queued_requests=True"),
        ({"gpus": -1.0}, "gpus=-1.0"),
    ):
        with pytest.raises(InputError, match=message):
            built(**options)
    with pytest.raises(FileNotFoundError):
        deployment(str(place / "none"), str(place / "model"))


def test_arguments_may_be_text_and_say_what_is_wrong_with_them(place: Path) -> None:
    names = {"guard": str(place / "guard"), "model": str(place / "model")}
    # As `serve run` passes them.
    bound = app(
        {
            **names,
            "min_replicas": "1",
            "max_replicas": "2",
            "mode": "enforce",
            "cpus": "0.5",
            "max_items": "8",
            "allowed_hosts": "a, b",
            "autoscaling": '{"upscale_delay_s": 5}',
        }
    )
    chosen = bound._bound_deployment
    scaling = chosen._deployment_config.autoscaling_config
    assert (scaling.max_replicas, scaling.upscale_delay_s) == (2, 5)
    assert chosen.ray_actor_options["num_cpus"] == 0.5
    plan = chosen.init_args[0]
    assert (plan.settings.mode, plan.settings.max_items, plan.settings.api_key) == ("enforce", 8, None)
    assert plan.settings.allowed_hosts == ("a", "b")
    assert plan.model_options == {"device": "cpu"}
    assert app({**names, "gpus": 0.5, "device": "cuda"})._bound_deployment.init_args[0].model_options == {
        "device": "cuda"
    }
    for given, message in (
        ({"model": "m"}, r"missing \['guard'\]"),
        ({**names, "replica": 2}, r"no arguments \['replica'\]"),
        ({**names, "replicas": "two"}, "replicas: Input should be a valid integer"),
        ({**names, "autoscaling": "upscale_delay_s=5"}, "autoscaling: Invalid JSON"),
        ({**names, "autoscaling": "[5]"}, "autoscaling: Input should be an object"),
        ({**names, "mode": "loud"}, "mode='loud': expected one of"),
        ({**names, "min_replicas": 1}, "both min_replicas and max_replicas"),
        ({**names, "replicas": 1, "min_replicas": 1, "max_replicas": 2}, "both min_replicas"),
        ({**names, "api_key": KEY}, "use api_key_file"),
    ):
        with pytest.raises(InputError, match=message) as told:
            app(given)
        assert KEY not in str(told.value)


def test_a_key_may_be_in_the_environment(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def key(built: Any) -> Any:
        return built._bound_deployment.init_args[0].settings.api_key

    names = {"guard": str(place / "guard"), "model": str(place / "model")}
    assert key(deployment(**names)) is None
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    assert key(deployment(**names)) == key(app(names)) == key_digest(KEY)
    assert key(deployment(**names, settings=ServeSettings(api_key=b"another"))) == b"another"
    with pytest.raises(InputError, match="both given"):
        app({**names, "api_key_file": str(place / "key")})


def test_the_command_of_the_readme_is_one(place: Path) -> None:
    program, verb, target, *words = example("ray-serve").split()
    assert (program, verb, target) == ("serve", "run", f"{app.__module__}:{app.__name__}")
    given = dict(word.split("=") for word in words)
    assert given.keys() >= {"guard", "model"}
    app({**given, "guard": str(place / "guard")})


# -- with a cluster


class Cluster:
    """Ray Serve with the application, as a Serve config deploys it."""

    def __init__(self, place: Path, port: int) -> None:
        self.place, self.client = place, Client(port, KEY)

    def deploy(self, guard: str, **arguments: Any) -> None:
        """What `serve deploy` does with a config; returns once Ray says that all is well, or not."""
        from ray.serve.context import _get_global_client
        from ray.serve.schema import ServeDeploySchema

        arguments = {
            "guard": str(self.place / "guard"), "model": str(self.place / "model"), "replicas": 2, "cpus": 0.5,
            "api_key_file": str(self.place / "key"), "monitor_state": str(self.place / "monitor"),
            "monitor_save_s": 0.2, "max_chars": 500, "request_timeout_s": 2, **arguments,
        }  # fmt: skip
        arguments = {name: value for name, value in arguments.items() if value is not None}
        one = {
            "name": "default", "import_path": "rm_ood.serve.ray_serve:app", "args": arguments,
            "deployments": [{"name": NAME, "user_config": {"guard": str(self.place / guard)}}],
        }  # fmt: skip
        _get_global_client().deploy_apps(ServeDeploySchema.model_validate({"applications": [one]}))
        time.sleep(0.5)
        wait_until(lambda: self.status() in ("RUNNING", "DEPLOY_FAILED", "UNHEALTHY"), 240)

    @staticmethod
    def status() -> str:
        from ray import serve

        return str(serve.status().applications["default"].status.value)

    def actors(self, name: str) -> dict[str, Any]:
        """Names of the replicas of a deployment, and their handles."""
        import ray

        found = {}
        for actor in ray.util.list_named_actors(all_namespaces=True):
            if f"#{name}#" in actor["name"]:
                # One that has just died has no handle.
                with contextlib.suppress(ValueError):
                    found[actor["name"]] = ray.get_actor(actor["name"], actor["namespace"])
        return found

    def score(self, items: Any, **more: Any) -> Any:
        answer = self.client.post("/v1/score", {"items": items}, **more)
        assert answer.status == 200, answer.body
        return answer.json

    def answered(self) -> dict[str, float]:
        """Replica -> requests to /v1/score, of those that had some."""
        found = {}
        for line in self.client.get("/metrics").body.decode().splitlines():
            if line.startswith("rm_ood_requests_total{") and '"/v1/score"' in line:
                name = line.partition('replica="')[2].partition('"')[0]
                found[name] = found.get(name, 0.0) + float(line.rpartition(" ")[2])
        return {name: count for name, count in found.items() if count}

    def digests(self) -> set[str]:
        return {self.client.get("/v1/guard").json["digest"] for _ in range(12)}


@pytest.fixture(scope="module")
def cluster(place: Path) -> Iterator[Cluster]:
    import ray
    from ray import serve

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    with pytest.MonkeyPatch.context() as environment:
        # How often Ray counts requests; 10 s by default.
        environment.setenv("RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S", "1")
        environment.setenv("RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S", "1")
        ray.init(num_cpus=2, include_dashboard=False, logging_level="error", log_to_driver=False)
        serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"log_level": "ERROR"})
        found = Cluster(place, port)
        found.deploy("guard")
        assert found.status() == "RUNNING"
        yield found
        serve.shutdown()
        ray.shutdown()


def test_both_replicas_answer_alike(cluster: Cluster, minilm_guard: OODGuard) -> None:
    decisions = minilm_guard.check(*zip(*PAIRS, strict=True))
    rows = {}

    def ask(item: Any) -> None:
        rows[item["id"]] = cluster.score([item])["results"][0]

    threads = [threading.Thread(target=ask, args=(item,)) for item in ITEMS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for item, decision in zip(ITEMS, decisions, strict=True):
        assert_same_row(rows[item["id"]], {"id": item["id"], **decision.to_dict()})
    asked = len(ITEMS)

    def both() -> bool:
        nonlocal asked
        cluster.score(ITEMS[:1])
        asked += 1
        return len(cluster.answered()) == 2

    wait_until(both, 60)
    # Whichever replica answers shows both; each is heard of every second.
    wait_until(lambda: sum(cluster.answered().values()) == asked)


def test_five_ways_to_ask_give_the_same_verdicts(cluster: Cluster, tmp_path: Path) -> None:
    paths = {"guard": str(cluster.place / "guard"), "model": str(cluster.place / "model")}
    # Like the fit data, unlike them, without an answer, and one that cannot be scored.
    odd = [
        ("zzzz 9@9@9", "0x00 ;;;;"),
        ("Яку музику ти любиш?", "!!!!"),
        (PAIRS[0][0], ""),
        ("a question", f"a {POISON}"),
    ]
    items = [{"id": f"item {i}", "prompt": p, "response": r} for i, (p, r) in enumerate([*PAIRS[:16], *odd])]

    guard = OODGuard.from_pretrained(paths["guard"], *load_reward_model(paths["model"]))
    decisions = guard.check([item["prompt"] for item in items], [item["response"] for item in items])
    expected = [{"id": item["id"], **d.to_dict()} for item, d in zip(items, decisions, strict=True)]
    assert 0 < sum(row["is_ood"] for row in expected) < len(items)

    data, output = tmp_path / "items.jsonl", tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(item) + "\n" for item in items))
    options = ["--guard", paths["guard"], "--model", paths["model"], "--no-progress"]
    assert rm_ood(["check", *options, "--data", str(data), "--output", str(output)]) == 0
    found = {"rm-ood check": [json.loads(line) for line in output.read_text().splitlines()]}
    with serving(guard_scorer(guard)) as (client, _):
        found["rm-ood serve"] = client.post("/v1/score", {"items": items}).json["results"]
    found["Ray Serve"] = cluster.score(items)["results"]
    # What an actor runs; test_ray_data.py has a pool of them.
    found["Ray Data"] = Scorer(**paths, model_options={}, id_column="id", options={})(
        pa.Table.from_pylist(items)
    ).to_pylist()
    for rows in found.values():
        for row, same in zip(rows, expected, strict=True):
            assert_same_row(row, same)


def test_bad_items_and_wrong_keys_get_the_replies_of_the_server(cluster: Cluster) -> None:
    client = cluster.client
    rows = cluster.score([ITEMS[0], {"prompt": "a question", "response": f"a {POISON}"}])["results"]
    assert rows[0]["reward"] is not None
    assert (rows[1]["reward"], rows[1]["is_ood"], rows[1]["reasons"][0]) == (None, True, "non_finite")
    for body, status, kind in (
        (b"{", 400, "not_json"),
        ({"prompt": "a"}, 422, "invalid_request"),
        ({"prompt": "a" * 501, "response": "b"}, 422, "invalid_text"),
        (b'{"prompt": "' + b"a" * 2**20 + b'"}', 413, "body_too_large"),
    ):
        answer = client.post("/v1/score", body)
        assert answer.status == status
        assert answer.json["type"] == kind
    assert client.post("/v1/score", ITEMS[0], key="wrong").status == 401
    assert Client(client.port).get("/metrics").json["type"] == "unauthorized"
    assert Client(client.port).get("/livez").status == 200
    assert client.get("/readyz").json == {"ready": True, "reasons": []}
    assert client.get("/nothing").json["type"] == "not_found"
    assert client.post("/get_reward", {"query": ["what? that"], "prompts": ["what?"]}).status == 200
    # A body that does not arrive, through Ray's proxy.
    head = f"POST /v1/score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nAuthorization: Bearer {KEY}\r\n"
    sent = client.raw(f"{head}Content-Length: 100\r\nConnection: close\r\n\r\n".encode(), b'{"prompt"', timeout=20)
    assert sent.startswith(b"HTTP/1.1 408 ")
    # One header, and the id that the reply tells.
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", client.port)
    headers = {"content-type": "application/json", "authorization": f"Bearer {KEY}", "x-request-id": "mine-7"}
    connection.request("POST", "/v1/score", json.dumps({"prompt": "a", "response": "b"}), headers)
    reply = connection.getresponse()
    assert reply.headers.get_all("x-request-id") == ["mine-7"]
    assert json.loads(reply.read())["request_id"] == "mine-7"
    connection.close()


def test_the_monitor_is_one_over_replicas_and_outlives_them(cluster: Cluster) -> None:
    # A session counts once, whichever replica its items come to.
    def told() -> Any:
        """Where the monitor stands once nothing is on its way: then a reply knows of one item more than the one before."""
        last = -1
        for _ in range(20):
            state = cluster.score([{**ITEMS[0], "session": "one user"}])["monitor"]
            if state["requests"] == last + 1:
                return state
            last = state["requests"]
            time.sleep(2)
        raise AssertionError("never at rest")

    before = told()
    for i in range(20):
        cluster.score([{**ITEMS[i], "session": "one user"}])
    after = told()
    assert after["counted"] == before["counted"]
    assert after["requests"] >= before["requests"] + 20
    (file,) = (cluster.place / "monitor").glob("monitor-*.json")
    guard = OODGuard.from_pretrained(cluster.place / "guard")
    wait_until(lambda: guard.monitor(file).state.requests >= after["requests"])

    # A watch that dies is started anew, and goes on from the file. What cannot be told meanwhile is no reply's fault.
    import ray

    ((name, watch),) = cluster.actors(WATCH).items()
    known = guard.monitor(file).state
    ray.kill(watch)

    def another() -> bool:
        cluster.score([{**ITEMS[3], "session": "one user"}])
        return set(cluster.actors(WATCH)) not in ({name}, set()) and cluster.client.get("/metrics").status == 200

    wait_until(another, 120)
    state = told()
    assert known.requests < state["requests"]
    assert state["counted"] == known.counted


def test_other_machines_need_a_key(cluster: Cluster) -> None:
    from ray.serve.context import _get_global_client

    _check_proxies(None)
    options = _get_global_client().http_config
    host = options.host
    try:
        options.host = "0.0.0.0"
        with pytest.raises(InputError, match=r"listen on 0.0.0.0.*set a key \(api_key_file"):
            _check_proxies(None)
        _check_proxies(b"digest")
    finally:
        options.host = host


def test_a_guard_is_put_in_the_place_of_another_and_a_wrong_one_is_not(
    cluster: Cluster, minilm_guard: OODGuard
) -> None:
    client = cluster.client
    (old,) = cluster.digests()
    replicas = set(cluster.actors(NAME))
    done, seen = threading.Event(), []

    def ask() -> None:
        while not done.is_set():
            seen.append(client.post("/v1/score", {"items": ITEMS[:3]}))

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        cluster.deploy("recalibrated")
        wait_until(lambda: old not in cluster.digests(), 60)
    finally:
        done.set()
        thread.join()
    (new,) = cluster.digests()
    # In the same processes, and no request was lost.
    assert set(cluster.actors(NAME)) == replicas
    assert {answer.status for answer in seen} == {200}
    assert {answer.json["guard"] for answer in seen} == {old, new}
    expected = OODGuard.from_pretrained(
        cluster.place / "recalibrated", copy.deepcopy(minilm_guard.model), minilm_guard.tokenizer
    ).check(*PAIRS[5])
    (row,) = cluster.score([ITEMS[5]])["results"]
    assert row["p_value"] == pytest.approx(expected.p_value, rel=1e-3)
    # Another calibration has a monitor, and a file, of its own.
    wait_until(lambda: len(list((cluster.place / "monitor").glob("monitor-*.json"))) == 2, 60)

    cluster.deploy("of another model")
    rolled_back = 'rm_ood_guard_reloads_total{outcome="rolled_back"}'
    wait_until(lambda: client.metric(rolled_back) == 2, 60)
    assert (cluster.digests(), set(cluster.actors(NAME))) == ({new}, replicas)
    cluster.deploy("recalibrated")
    assert cluster.status() == "RUNNING"


def test_a_replica_that_dies_comes_back_while_the_other_serves(cluster: Cluster) -> None:
    import ray

    (guard,) = cluster.digests()
    before = set(cluster.answered())
    name, actor = next(iter(cluster.actors(NAME).items()))
    ray.kill(actor)
    answers = [cluster.client.post("/v1/score", ITEMS[0]) for _ in range(10)]
    # What was sent to it as it died is lost.
    assert sum(answer.status == 200 for answer in answers) >= 8
    wait_until(lambda: name not in cluster.actors(NAME) and len(cluster.actors(NAME)) == 2, 60)

    def new_one_answers() -> bool:
        cluster.score([ITEMS[0]])
        return not set(cluster.answered()) <= before

    wait_until(new_one_answers, 120)
    # With the guard that was put in, not that of the arguments.
    assert cluster.digests() == {guard}


def test_ray_adds_a_replica_for_full_requests_and_reloads_no_guard_for_it(cluster: Cluster) -> None:
    delays = {"look_back_period_s": 11, "upscale_delay_s": 0.5, "downscale_delay_s": 0.5}
    # Other arguments make other replicas. `replicas` of the arguments that the others share gives way.
    cluster.deploy("recalibrated", replicas=None, min_replicas="1", max_replicas="2", autoscaling=json.dumps(delays))
    assert cluster.status() == "RUNNING"
    wait_until(lambda: len(cluster.actors(NAME)) == 1, 120)
    (one,) = cluster.actors(NAME)
    done = threading.Event()

    def ask() -> None:
        # 32 items a request.
        client = GuardClient(f"http://127.0.0.1:{cluster.client.port}", api_key=KEY)
        while not done.is_set():
            client.check(*zip(*PAIRS[:16] * 2, strict=True))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: len(cluster.actors(NAME)) == 2, 120)
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert one in cluster.actors(NAME)
    # Of those that were before, shown for some seconds more, there may have been some.
    wait_until(lambda: cluster.client.metric("rm_ood_guard_reloads_total") == 0, 30)
