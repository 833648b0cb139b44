"""`rm-ood serve`: the process, its routes, and the same verdicts as in Python."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import POISON
from serving import Client, guard_scorer, serving

from rm_ood import EngineError, GuardClient, OODGuard
from rm_ood.serve.settings import key_digest

PAIRS = [("question about the river", "the answer is small"), ("a garden in winter", "orange orange orange 42")]


@pytest.fixture(scope="module")
def client(minilm_guard: OODGuard) -> Iterator[Client]:
    with serving(guard_scorer(minilm_guard)) as (client, _):
        yield client


def test_one_item_has_the_verdict_of_python(client: Client, minilm_guard: OODGuard) -> None:
    prompt, response = PAIRS[0]
    answer = client.post("/v1/score", {"prompt": prompt, "response": response})
    assert answer.status == 200
    body = answer.json
    assert body["results"] == [{"id": "0", **minilm_guard.check(prompt, response).to_dict()}]
    assert set(body) == {"results", "monitor", "mode", "guard", "request_id"}
    assert body["request_id"] == answer.headers["x-request-id"]


def test_a_batch_and_nested_answers_keep_their_order_and_ids(client: Client, minilm_guard: OODGuard) -> None:
    (p0, r0), (p1, r1) = PAIRS
    body = {"items": [{"id": "first", "prompt": p1, "responses": [r0, r1, ""]}, {"prompt": p0, "response": r0}]}
    rows = client.post("/v1/score", body).json["results"]
    assert [row["id"] for row in rows] == ["first#0", "first#1", "first#2", "1"]
    expected = [minilm_guard.check(p, r).to_dict() for p, r in [(p1, r0), (p1, r1), (p1, ""), (p0, r0)]]
    for row, wanted in zip(rows, expected, strict=True):
        assert (row["is_ood"], row["reasons"]) == (wanted["is_ood"], wanted["reasons"])
        assert row["reward"] == pytest.approx(wanted["reward"], rel=1e-4)
        assert row["p_value"] == pytest.approx(wanted["p_value"], rel=1e-3)


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"{", 400, "not strict JSON"),
        (b'{"prompt": "a", "prompt": "b", "response": "c"}', 400, "doubled keys"),
        (b'{"prompt": "\\ud800", "response": "c"}', 400, "surrogates"),
        (b"[]", 422, "body"),
        ({"prompt": "a"}, 422, "response: Field required"),
        ({"prompt": "a", "response": "b", "sekret": 1}, 422, "(unknown field)"),
        ({"prompt": " ", "response": "b"}, 422, "prompt"),
        ({"prompt": "a", "response": 3}, 422, "response"),
        ({"items": [{"prompt": "a", "response": "b"}, {"prompt": "a"}]}, 422, "items[1].response"),
        ({"messages": [{"role": "user", "content": "a"}] * 2}, 422, "last message"),
        ({"prompt": [{"role": "user", "content": "a"}], "response": "b"}, 422, "chat template"),
        ({"items": [{"prompt": "a", "responses": ["b"] * 20}] * 2}, 422, "40 answers"),
        ({"prompt": "a" * 20_001, "response": "b"}, 422, "20001 characters"),
        (
            {"items": [{"prompt": "a", "response": "b"}, *[{"id": "x", "prompt": "a", "response": "b"}] * 2]},
            422, "items[2].id: the reply would name items[1] so too",
        ),
        ({"items": [{"id": "1", "prompt": "a", "response": "b"}, {"prompt": "a", "response": "b"}]}, 422, "items[1].id"),
        (
            {"items": [{"id": "x", "prompt": "a", "responses": ["b"]}, {"id": "x#0", "prompt": "a", "response": "b"}]},
            422, "items[1].id",
        ),
    ],
)  # fmt: skip
def test_a_bad_request_is_refused_by_name(client: Client, body: Any, status: int, words: str) -> None:
    answer = client.post("/v1/score", body)
    assert answer.status == status
    assert words in answer.json["error"]
    assert set(answer.json) == {"error", "type", "request_id"}
    assert "sekret" not in answer.body.decode()


def test_other_routes(client: Client, minilm_guard: OODGuard) -> None:
    assert client.get("/livez").status == 200
    assert client.get("/readyz").json == {"ready": True, "reasons": []}
    assert client.get("/health").status == client.get("/healthz").status == 200
    card = client.get("/v1/guard").json
    assert card["channels"] == minilm_guard.report().to_dict()["channels"]
    assert "<html" in client.get("/").body.decode()
    assert client.get("/nothing").status == 404
    assert client.get("/v1/score").status == 405
    assert client.post("/v1/score", b"x", headers={"content-type": "text/plain"}).status == 415


README = Path(__file__).resolve().parents[2] / "README.md"


def example(name: str) -> str:
    """The README's block under a marker."""
    found = re.search(rf"<!-- example: {name} -->\n```\w+\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    assert found is not None
    return found[1]


@pytest.mark.skipif(
    shutil.which("curl") is None, reason="no curl here: apt-get install -y --no-install-recommends curl"
)
def test_the_curl_commands_of_the_readme_work_as_printed(client: Client) -> None:
    script = (
        example("curl")
        .replace("127.0.0.1:8000", f"127.0.0.1:{client.port}")
        .replace("curl -sS", "curl -sS -w '\\n%{http_code}\\n'")
    )
    run = subprocess.run(["bash", "-e"], input=script, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    codes = [line for line in run.stdout.splitlines() if re.fullmatch(r"[0-9]{3}", line)]
    assert codes == ["200"] * 7
    replies = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert [row["id"] for row in replies[1]["results"]] == ["a#0", "a#1", "b"]
    assert len(replies[2]["rewards"]) == 1
    assert len(replies[3]["data"]) == 1


def test_the_client_of_the_readme_works_as_printed(client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    exec(example("client").replace("127.0.0.1:8000", f"127.0.0.1:{client.port}"), {})
    assert re.fullmatch(r"\[.*\] \[[TrueFals ]*\] (True|False)\n", capsys.readouterr().out)


def test_the_client_gives_what_the_guard_gives(client: Client, minilm_guard: OODGuard) -> None:
    prompts, answers = [p for p, _ in PAIRS], [[r, "", f"a {POISON}"] for _, r in PAIRS]
    with GuardClient(f"http://127.0.0.1:{client.port}", batch_size=4) as asked:
        found, wanted = asked.check(prompts, answers), minilm_guard.check(prompts, answers)
        single = asked.check(*PAIRS[0])
    assert single.to_dict() == minilm_guard.check(*PAIRS[0]).to_dict()
    np.testing.assert_allclose(found.rewards, wanted.rewards, rtol=1e-4)
    np.testing.assert_allclose(found.p_values, wanted.p_values, rtol=1e-3)
    np.testing.assert_array_equal(found.is_ood, wanted.is_ood)
    np.testing.assert_array_equal(found.prompt_index, wanted.prompt_index)
    assert found.reasons == wanted.reasons


def test_the_clients_key_opens_the_server(minilm_guard: OODGuard) -> None:
    key = "k" * 32
    with serving(guard_scorer(minilm_guard), api_key=key_digest(key)) as (client, _):
        url = f"http://127.0.0.1:{client.port}"
        with GuardClient(url, api_key=key) as asked:
            assert asked.check(*PAIRS[0]).reward == minilm_guard.check(*PAIRS[0]).reward
        with GuardClient(url, api_key="x" * 32) as asked, pytest.raises(EngineError, match="401"):
            asked.check(*PAIRS[0])
