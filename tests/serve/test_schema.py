"""The OpenAPI document is the contract: requests made from it, good and bad, find the replies that it describes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import preference_rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import Client, guard_scorer, serving

from rm_ood import CalibrationWarning, OODGuard

# Whether a text begins with its prompt, and whose the last message is, no schema can say: 422 answers both. Nor can it say how
# many digits an integer may have, where anything may be (400).
CONFIG = """
[checks]
positive_data_acceptance.expected-statuses = ["2xx", 400, 401, 413, 422, 429]
negative_data_rejection.expected-statuses = [400, 401, 404, 405, 413, 415, 422, 429]
"""
ITEMS, CHARS = 4, 120


@pytest.fixture(scope="module")
def client(shared_decoder: Any, decoder_tokenizer: Any) -> Iterator[Client]:
    """A guard that takes strings and messages alike, under limits that bodies made from the document can reach."""
    guard = OODGuard(shared_decoder, decoder_tokenizer, alpha=0.05, text_format="chat", channels="final")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        guard.fit(preference_rows(100), calibration=preference_rows(115, seed=1), progress=False)
    with serving(guard_scorer(guard), max_items=ITEMS, max_chars=CHARS, max_body_bytes=20_000) as (client, _):
        yield client
    guard.detach()


@pytest.mark.parametrize(("examples", "least"), [(10, 500), pytest.param(200, 2000, marks=pytest.mark.long)])
def test_requests_made_from_the_document_find_what_it_describes(
    client: Client, tmp_path: Path, examples: int, least: int
) -> None:
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    command = shutil.which("schemathesis", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert command is not None
    run = subprocess.run(
        [
            command, "run", f"http://127.0.0.1:{client.port}/openapi.json", "--checks", "all", "--mode", "all",
            "--phases", "examples,coverage,fuzzing", "--max-examples", f"{examples}", "--generation-deterministic",
            "--continue-on-failure", "--suppress-health-check", "all", "--no-color",
        ],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=1500,
        # The document is asked for under proxies otherwise.
        env={**os.environ, "NO_PROXY": "127.0.0.1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert int(re.findall(r"(\d+) generated", run.stdout)[0]) > least, run.stdout[-2000:]


text = st.text(st.characters(codec="utf-8"), max_size=CHARS)
words = text.filter(lambda t: t.strip())
message = st.builds(
    lambda role, content: {"role": role, "content": content}, st.sampled_from(["user", "assistant"]), text
)
prompt = words | st.builds(lambda m, t: [m, {"role": "user", "content": t[:60]}], message, words).filter(
    lambda ms: len(ms[0]["content"]) <= 60 and ms[1]["content"].strip()
)
names = st.fixed_dictionaries({}, optional={"id": st.text("abc-", min_size=1), "session": st.text("xyz", min_size=1)})
single = st.builds(lambda p, r, n: {"prompt": p, "response": r, **n}, prompt, text, names)
nested = st.builds(
    lambda p, r, n: {"prompt": p, "responses": r, **n}, prompt, st.lists(text, min_size=1, max_size=2), names
)
batch = st.builds(lambda items: {"items": items}, st.lists(single | nested, min_size=1, max_size=2))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(body=single | nested | batch)
def test_everything_that_is_valid_is_scored(client: Client, body: Any) -> None:
    answer = client.post("/v1/score", body)
    items = body.get("items", [body])
    expected: list[str] = []
    for i, item in enumerate(items):
        name = item.get("id", str(i))
        expected += [f"{name}#{j}" for j in range(len(item["responses"]))] if "responses" in item else [name]
    if len(set(expected)) < len(expected):
        assert (answer.status, answer.json["error"][:11]) == (422, "items[1].id"), (answer.json, body)
        return
    assert answer.status == 200, (answer.json, body)
    assert [row["id"] for row in answer.json["results"]] == expected


def test_the_examples_of_the_document_work(client: Client) -> None:
    document = client.get("/openapi.json").json
    tried = 0
    for path, operations in document["paths"].items():
        for operation in operations.values():
            body = operation.get("requestBody", {"content": {"application/json": {"examples": {}}}})
            for name, example in body["content"]["application/json"]["examples"].items():
                assert client.post(path, example["value"]).status == 200, (path, name)
                tried += 1
    assert tried == 7
    assert document["components"]["schemas"]["PromptResponse"]["properties"]["prompt"]["oneOf"][0]["maxLength"] == CHARS
