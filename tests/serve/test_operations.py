"""What runs beside a server: metrics, dashboard, alert rules, image, traces, the card as a page."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from browser import browser
from conftest import POISON, preference_rows
from prometheus_client.parser import text_string_to_metric_families
from serving import Client, FaultyScorer, serving

from rm_ood import OODGuard
from rm_ood.cli import _parser
from rm_ood.serve.metrics import Metrics
from rm_ood.serve.server import Server

DEPLOY = Path(__file__).resolve().parents[2] / "rm_ood/serve/deploy"
ROWS = preference_rows(8, seed=11)
# Names in an expression that are Prometheus', not ours.
_METRIC = re.compile(r"\b(?:rm_ood|process)_[a-z_]+")


@pytest.fixture(scope="module")
def served(minilm_guard: OODGuard) -> Iterator[tuple[Client, Server]]:
    """A server that has met everything: good, flagged, failing, refused."""
    with serving(FaultyScorer(minilm_guard), mode="enforce") as (client, server):
        items = [{"prompt": row["prompt"], "response": row["chosen"]} for row in ROWS]
        odd = [f"a {POISON}", "explode", "zzzz 9@9@9 qqqq !!!! 0x00 ;;;;"]
        items += [{"prompt": "a question", "response": text} for text in odd]
        assert client.post("/v1/score", {"items": items}).status == 200
        client.post("/v1/score", {"prompt": "a question", "response": "explode"})
        client.post("/v1/score", b"{")
        client.get("/nothing")
        yield client, server


def families(client: Client) -> dict[str, Any]:
    text = client.get("/metrics").body.decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


def samples(client: Client) -> set[str]:
    return {sample.name for family in families(client).values() for sample in family.samples}


def test_the_metrics_have_the_documented_names_and_fixed_labels(served: tuple[Client, Server]) -> None:
    client, server = served
    found = samples(client)
    assert {
        "rm_ood_requests_total", "rm_ood_request_duration_seconds_bucket", "rm_ood_scored_items_total", "rm_ood_score_bucket",
        "rm_ood_reward_bucket", "rm_ood_batch_size_bucket", "rm_ood_batch_wait_seconds_bucket", "rm_ood_queue_depth",
        "rm_ood_detector_info",
    } <= found  # fmt: skip
    (info,) = families(client)["rm_ood_detector_info"].samples
    assert info.labels.keys() == {"version", "layer", "n_fit", "guard"}
    assert info.labels["guard"] == server.service.scorer.digest[:12]
    assert client.metric('rm_ood_scored_items_total{decision="ood"}') >= 3
    assert client.metric("rm_ood_scored_items_total") == len(ROWS) + 4
    assert client.metric("rm_ood_p_value_count") == len(ROWS) + 4
    # Three have no reward.
    assert client.metric("rm_ood_reward_count") == len(ROWS) + 1
    assert client.metric('rm_ood_requests_total{endpoint="/v1/score",status="400"}') == 1
    assert client.metric('rm_ood_requests_total{endpoint="other",status="404"}') == 1


def series(text: bytes) -> set[tuple[str, tuple[tuple[str, str], ...]]]:
    found = text_string_to_metric_families(text.decode())
    return {(one.name, tuple(sorted(one.labels.items()))) for family in found for one in family.samples}


def test_every_series_is_there_before_its_first_event(served: tuple[Client, Server]) -> None:
    client, _ = served
    at_start = series(Metrics().text("")[0])
    # The guard's own name and labels are known once there is a guard.
    at_start |= {one for one in series(client.get("/metrics").body) if one[0] == "rm_ood_detector_info"}
    assert series(client.get("/metrics").body) == at_start
    assert len(at_start) <= 200


def test_clients_cannot_make_series(served: tuple[Client, Server]) -> None:
    client, _ = served

    def count() -> int:
        return sum(len(family.samples) for family in families(client).values())

    for i in range(30):
        client.get(f"/{i}", headers={"X-Request-Id": f"id-{i}"})
        client.ask(f"VERB{i}", f"/v1/score/{i}", b"")
        client.post("/v1/score", {"items": [{"id": f"{i}", "session": f"{i}", "prompt": f"{i}", "response": f"{i}"}]})
    before = count()
    for i in range(30, 60):
        client.get(f"/{i}?{i}", headers={"X-Request-Id": f"id-{i}"})
        client.post("/v1/score", {"items": [{"id": f"{i}", "session": f"{i}", "prompt": f"{i}", "response": f"{i}"}]})
        client.post("/get_reward", {"query": [f"{i} a"], "prompts": [f"{i}"]})
        client.post("/classify", {"input": f"{i}"})
    assert count() <= min(200, before + 40)


def expressions() -> dict[str, str]:
    dashboard = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
    rules = yaml.safe_load((DEPLOY / "prometheus-alerts.yml").read_text())
    found = {f"{p['title']} {t['refId']}": t["expr"] for p in dashboard["panels"] for t in p["targets"]}
    found |= {f"variable {v['name']}": v["query"] for v in dashboard["templating"]["list"] if v["type"] == "query"}
    for group in rules["groups"]:
        assert group["name"]
        for rule in group["rules"]:
            assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}
            assert rule["labels"]["severity"] in ("warning", "critical")
            assert rule["annotations"]["summary"]
            found[rule["alert"]] = rule["expr"]
    return found


def test_dashboard_and_alerts_ask_for_what_there_is(served: tuple[Client, Server]) -> None:
    client, _ = served
    there = families(client)
    names = samples(client)
    labels: dict[str, dict[str, set[str]]] = {}
    for family in there.values():
        for sample in family.samples:
            known = labels.setdefault(sample.name, {})
            for label, value in sample.labels.items():
                known.setdefault(label, set()).add(value)
    # Prometheus adds these itself.
    target = {"job", "instance"}
    asked = set()
    for where, expression in expressions().items():
        used = set(_METRIC.findall(expression))
        assert used, where
        assert used <= names, where
        asked |= used
        for name, matchers in re.findall(r"((?:rm_ood|process)_[a-z_]+)\{([^}]*)\}", expression):
            for label, wanted in re.findall(r"(\w+)(?:=~?|!=)\"([^\"]*)\"", matchers):
                assert label in labels[name].keys() | target, (where, label)
                if label not in target:
                    assert set(wanted.split("|")) <= labels[name][label], (where, label)
        for group in re.findall(r"by \(([^)]*)\)", expression):
            grouped = set().union(*(labels[name] for name in used)) | target
            assert {label.strip() for label in group.split(",")} <= grouped, where
        assert expression.count("(") == expression.count(")")
    # Every metric of ours is shown somewhere.
    ours = {name for name in names if name.startswith("rm_ood_")}
    assert {re.sub(r"_(bucket|sum|count)$", "", n) for n in ours} == {
        re.sub(r"_(bucket|sum|count)$", "", n) for n in asked if n.startswith("rm_ood_")
    }


# Debian's package `prometheus` has it, which `.ci/run` installs.
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="no promtool: install Debian's package prometheus")


def promtool(*arguments: str | Path, folder: Path) -> None:
    assert PROMTOOL is not None
    ran = subprocess.run([PROMTOOL, *arguments], cwd=folder, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@needs_promtool
def test_prometheus_reads_the_alerts_and_the_dashboards_queries(tmp_path: Path) -> None:
    promtool("check", "rules", DEPLOY / "prometheus-alerts.yml", folder=tmp_path)
    queries = [expression for expression in expressions().values() if not expression.startswith("label_values(")]
    rules = [{"record": f"panel:{i}", "expr": expression} for i, expression in enumerate(queries)]
    (tmp_path / "panels.yml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    promtool("check", "rules", "panels.yml", folder=tmp_path)


TARGET = 'job="guard",instance="a"'


def counter(name: str, values: str, labels: str = "") -> dict[str, str]:
    return {"series": f"rm_ood_{name}{{{TARGET}{labels and f',{labels}'}}}", "values": values}


# Alert -> series, a value a minute, and whether it sounds at their end.
FIRST, CALM = "0x20 1x20", "0x40"
TRAFFIC = counter("requests_total", "0+60x40", 'endpoint="/v1/score",status="200"')
ALERTS = {
    "a first unscored item": (
        "RmOodUnscored", [counter("unscored_items_total", "0x30 1x10", 'reason="scoring_failed"')], True,
    ),
    "a first roll-back": ("RmOodGuardRolledBack", [counter("guard_reloads_total", FIRST, 'outcome="rolled_back"')], True),
    "a first failure of the monitor": (
        "RmOodMonitorFails", [counter("monitor_failures_total", "0x30 1x10", 'what="save"')], True,
    ),
    "no roll-back": ("RmOodGuardRolledBack", [counter("guard_reloads_total", CALM, 'outcome="rolled_back"')], False),
    "a server that is gone": (
        "RmOodDown", [counter("ready", "1x20 _x20"), {"series": f"up{{{TARGET}}}", "values": "1x20 0x20"}], True,
    ),
    "a server that is not ready": (
        "RmOodDown", [counter("ready", "0x40"), {"series": f"up{{{TARGET}}}", "values": "1x40"}], False,
    ),
    "another program that is gone": ("RmOodDown", [{"series": f"up{{{TARGET}}}", "values": "1x20 0x20"}], False),
    "one scoring request in fifty fails, among many scrapes": (
        "RmOodErrors",
        [
            TRAFFIC,
            counter("requests_total", "0+1.2x40", 'endpoint="/v1/score",status="500"'),
            counter("requests_total", "0+6000x40", 'endpoint="other",status="200"'),
        ],
        True,
    ),
    "probes of a server that drains": (
        "RmOodOverloaded",
        [TRAFFIC, counter("requests_total", "0+60x40", 'endpoint="other",status="503"')],
        False,
    ),
    "one scoring request in ten turned away": (
        "RmOodOverloaded", [TRAFFIC, counter("requests_total", "0+6x40", 'endpoint="/classify",status="429"')], True,
    ),
}  # fmt: skip


@needs_promtool
def test_alerts_sound_when_they_should(tmp_path: Path) -> None:
    rules = yaml.safe_load((DEPLOY / "prometheus-alerts.yml").read_text())
    told = {rule["alert"]: rule for group in rules["groups"] for rule in group["rules"]}
    cases = []
    for name, (alert, given, sounds) in ALERTS.items():
        by = (
            {"job": "guard", "instance": "a"}
            if alert != "RmOodErrors" and alert != "RmOodOverloaded"
            else {"job": "guard"}
        )
        if alert in ("RmOodUnscored", "RmOodMonitorFails", "RmOodGuardRolledBack"):
            own = re.search(r',(\w+)="(\w+)"\}', given[0]["series"])
            assert own is not None
            by |= {own[1]: own[2]}
        if alert == "RmOodUnscored":
            del by["instance"]
        reason = by.get("reason", by.get("what", ""))
        notes = {
            key: re.sub(r"\{\{ .labels.\w+ \}\}", reason, text) for key, text in told[alert]["annotations"].items()
        }
        expected = [{"exp_labels": by | told[alert]["labels"], "exp_annotations": notes}] if sounds else []
        one = {"eval_time": "38m", "alertname": alert, "exp_alerts": expected}
        cases.append({"name": name, "interval": "1m", "input_series": given, "alert_rule_test": [one]})
    (tmp_path / "rules.yml").write_text((DEPLOY / "prometheus-alerts.yml").read_text())
    (tmp_path / "cases.yml").write_text(
        yaml.safe_dump({"rule_files": ["rules.yml"], "evaluation_interval": "1m", "tests": cases})
    )
    promtool("test", "rules", "cases.yml", folder=tmp_path)


def test_the_image_starts_the_server_with_options_that_there_are() -> None:
    lines = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    found = {
        word: json.loads(rest)
        for word, _, rest in (line.partition(" ") for line in lines)
        if word in ("ENTRYPOINT", "CMD")
    }
    program, *arguments = found["ENTRYPOINT"] + found["CMD"]
    assert program == "rm-ood"
    parsed = _parser().parse_args(arguments)
    assert (parsed.command, parsed.guard, parsed.model, parsed.host) == ("serve", "/guard", "/model", "0.0.0.0")
    (health,) = (json.loads(line.partition("CMD ")[2]) for line in lines if line.startswith("HEALTHCHECK"))
    compile(health[2], "health", "exec")
    assert "/livez" in health[2]
    assert [line for line in lines if line.startswith("USER ")] == ["USER guard"]


def test_spans_carry_verdicts_and_no_text(minilm_guard: OODGuard) -> None:
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with serving(FaultyScorer(minilm_guard)) as (client, _):
        body = {"prompt": ROWS[0]["prompt"], "responses": [ROWS[0]["chosen"], f"a {POISON}"]}
        rows = client.post("/v1/score", body, headers={"traceparent": parent}).json["results"]
        client.post("/v1/score", {"prompt": "secret words", "response": "explode"})
        client.get("/secret-path")
    scored, failed, other = exporter.get_finished_spans()
    assert scored.name == "POST /v1/score"
    assert scored.parent is not None
    assert f"{scored.context.trace_id:032x}" == parent.split("-")[1]
    assert dict(scored.attributes or {}) == {
        "http.request.method": "POST", "http.route": "/v1/score", "http.response.status_code": 200,
        "gen_ai.operation.name": "evaluate",
    }  # fmt: skip
    for row, event in zip(rows, scored.events, strict=True):
        found = dict(event.attributes or {})
        assert event.name == "gen_ai.evaluation.result"
        assert found["gen_ai.evaluation.name"] == "out_of_distribution"
        assert found["gen_ai.evaluation.score.value"] == pytest.approx(row["p_value"])
        assert found["gen_ai.evaluation.score.label"] == ("ood" if row["is_ood"] else "in")
        assert found["gen_ai.evaluation.explanation"] == ", ".join(row["reasons"])
    assert (failed.attributes or {})["http.response.status_code"] == 500
    assert other.name == "GET other"
    assert "secret" not in "".join(span.to_json() for span in (scored, failed, other))


def test_without_opentelemetry_nothing_is_traced(monkeypatch: pytest.MonkeyPatch, minilm_guard: OODGuard) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with serving(FaultyScorer(minilm_guard)) as (client, _):
        assert client.post("/v1/score", {"prompt": "a question", "response": "an answer"}).status == 200


def test_the_card_is_a_page_in_a_browser(served: tuple[Client, Server], tmp_path: Path, minilm_guard: OODGuard) -> None:
    client, _ = served
    address = f"http://127.0.0.1:{client.port}/"
    with browser(tmp_path / "profile") as page:
        for width, scheme in ((1200, "light"), (390, "dark")):
            page.open(address, width, scheme)
            assert page.console() == []
            # Its policy allows nothing to be loaded, and the browser agrees.
            assert page.requests() <= {address, f"{address}favicon.ico"}
            fit = minilm_guard.report().to_dict()["fit"]
            assert f"{fit['prompts']}" in page.run("return document.body.innerText")
            # The policy lets its own style through.
            assert page.run("return getComputedStyle(document.body).maxWidth") != "none"
            assert page.run("return document.documentElement.scrollWidth <= window.innerWidth"), (width, scheme)
