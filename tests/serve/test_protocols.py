"""Modes, and the protocols of others: OpenRLHF's `/get_reward`, vLLM's `/classify`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from conftest import POISON
from serving import Client, guard_scorer, serving

from rm_ood import OODGuard

PROMPT = "question 4 0 quiet music island bridge doctor paper river"
NORMAL = "the bridge summer remember quiet"
STRANGE = "zzzz 9@9@9 qqqq !!!! 0x00 ;;;; zzzz 9@9@9"


@pytest.fixture(scope="module")
def clients(minilm_guard: OODGuard) -> Iterator[dict[str, Client]]:
    assert minilm_guard.check(PROMPT, STRANGE).is_ood
    assert not minilm_guard.check(PROMPT, NORMAL).is_ood
    with (
        serving(guard_scorer(minilm_guard), mode="shadow") as (shadow, _),
        serving(guard_scorer(minilm_guard), mode="warn", withheld_reward=-99.5) as (warn, _),
        serving(guard_scorer(minilm_guard), mode="enforce") as (enforce, _),
    ):
        yield {"shadow": shadow, "warn": warn, "enforce": enforce}


@pytest.mark.parametrize("mode", ["shadow", "warn", "enforce"])
def test_modes_differ_in_what_they_tell_and_withhold(
    clients: dict[str, Client], mode: str, minilm_guard: OODGuard
) -> None:
    answer = clients[mode].post("/v1/score", {"prompt": PROMPT, "responses": [NORMAL, STRANGE]})
    normal, strange = answer.json["results"]
    assert answer.json["mode"] == mode
    wanted = minilm_guard.check([PROMPT, PROMPT], [NORMAL, STRANGE])
    assert normal == {"id": "0#0", **wanted[0].to_dict()}
    if mode == "enforce":
        assert strange["reward"] is None
        assert strange["reasons"][-1] == "withheld"
        channel = strange["axes"]["response"]["channels"]["reward"]
        assert set(channel.values()) == {None}, "the reward, standardised"
        assert strange["is_ood"]
    else:
        assert strange == {"id": "0#1", **wanted[1].to_dict()}
    assert answer.headers.get("rm-ood-flagged") == (None if mode == "shadow" else "1/2")
    assert clients[mode].metric("rm_ood_withheld_rewards_total") == (mode == "enforce")


@pytest.mark.parametrize("mode", ["shadow", "warn", "enforce"])
def test_openrlhf_gets_rewards_and_logs(clients: dict[str, Client], mode: str, minilm_guard: OODGuard) -> None:
    texts = [NORMAL, STRANGE, f"a {POISON}"]
    body = {
        "query": [f"{PROMPT} {text}" for text in texts],
        "prompts": [f"{PROMPT} "] * 3,
        "labels": [None, 1, {"a": "b"}],
    }
    answer = clients[mode].post("/get_reward", body)
    assert answer.status == 200
    wanted = minilm_guard.check([f"{PROMPT} "] * 3, texts)
    found = answer.json
    assert found["scores"] == found["rewards"]
    assert found["rewards"][0] == pytest.approx(wanted.rewards[0], rel=1e-4)
    low = -99.5 if mode == "warn" else minilm_guard.state.reward_floor
    # What has no reward never counts as a good one.
    assert found["rewards"][2] == pytest.approx(low)
    assert found["rewards"][1] == pytest.approx(low if mode == "enforce" else wanted.rewards[1], rel=1e-4)
    logs = found["extra_logs"]
    assert logs["ood_is_ood"] == [0, 1, 1]
    assert logs["ood_withheld"] == [0, mode == "enforce", 1]
    assert logs["ood_p_value"] == pytest.approx(wanted.p_values, rel=1e-3)
    assert logs["ood_response_p_value"] == pytest.approx(wanted.axis("response").p_values, rel=1e-3)
    assert {len(values) for values in logs.values()} == {3}


def test_openrlhf_texts_that_do_not_fit_are_refused(clients: dict[str, Client]) -> None:
    ask = clients["warn"].post
    assert "begin with its prompt" in ask("/get_reward", {"query": ["abc"], "prompts": ["b"]}).json["error"]
    assert "one prompt per query" in ask("/get_reward", {"query": ["a", "ab"], "prompts": ["a"]}).json["error"]
    assert ask("/get_reward", {"query": ["abc"], "prompts": []}).status == 422
    assert ask("/get_reward", {"query": "abc", "prompts": ["a"]}).status == 422
    assert ask("/get_reward", {"query": ["a b"] * 33, "prompts": ["a"] * 33}).json["type"] == "too_many_items"


def test_vllm_clients_find_the_reward_last(clients: dict[str, Client], minilm_guard: OODGuard) -> None:
    text = f"\n\nHuman: {PROMPT}\n\nAssistant: {NORMAL}"
    answer = clients["warn"].post("/classify", {"model": "rm", "input": [text, text], "use_activation": False})
    assert answer.status == 200
    found = answer.json
    assert (found["object"], found["model"]) == ("list", "rm")
    assert found["id"] == f"classify-{answer.headers['x-request-id']}"
    wanted = minilm_guard.check(f"\n\nHuman: {PROMPT}\n\nAssistant:", NORMAL)
    for i, row in enumerate(found["data"]):
        assert (row["index"], row["num_classes"], row["label"]) == (i, 3, "ood" if wanted.is_ood else "in")
        assert row["probs"] == pytest.approx([float(wanted.is_ood), wanted.p_value, wanted.reward], rel=1e-3)
    assert found["usage"]["prompt_tokens"] == found["usage"]["total_tokens"] > 10
    assert clients["warn"].post("/classify", {"input": "no dialogue at all"}).json["type"] == "invalid_text"


@pytest.mark.parametrize(
    "body",
    [{}, {"input": "a", "use_activation": True}, {"input": [[1, 2]]}, {"input": "a", "messages": []}, {"input": []}],
)
def test_vllm_requests_that_are_not_served_are_refused(clients: dict[str, Client], body: Any) -> None:
    assert clients["warn"].post("/classify", body).status == 422
