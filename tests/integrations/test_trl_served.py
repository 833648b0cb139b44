"""`OODReward` that asks a served guard, over a real port, in TRL's own trainer too."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from guard_server import GuardServer
from test_trl import METRICS, assistant, chat, fitted, preference_rows, prompts, rollouts, trainer

from rm_ood import (
    CalibrationWarning,
    EngineError,
    GuardClient,
    InputError,
    MismatchError,
    OODGuard,
    OODGuardWarning,
    UnavailableError,
)
from rm_ood.integrations import transport
from rm_ood.integrations.trl import MODES, OODReward

pytestmark = pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning")
ODD = "yes {} " * 30


@pytest.fixture(scope="module")
def guard(shared_decoder: Any, decoder_tokenizer: Any) -> OODGuard:
    return fitted(copy.deepcopy(shared_decoder), decoder_tokenizer, channels="final", alpha=0.2)


@pytest.fixture(scope="module")
def copied(guard: OODGuard, tmp_path_factory: pytest.TempPathFactory) -> OODGuard:
    """The saved guard, as the trainer's machine has it: without a model."""
    folder = tmp_path_factory.mktemp("served") / "guard"
    guard.save_pretrained(folder)
    return OODGuard.from_pretrained(folder)


@pytest.fixture
def server(guard: OODGuard) -> Iterator[GuardServer]:
    with GuardServer(guard, watch=True) as server:
        yield server


@pytest.fixture
def client(server: GuardServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[GuardClient]:
    monkeypatch.setattr(transport.time, "sleep", lambda seconds: None)
    with GuardClient(server.url, retries=1) as client:
        yield client


def some() -> tuple[list[Any], list[Any]]:
    """20 completions, a few of them odd, one that ends in a tool's answer."""
    asked, said = rollouts(20, 3, "")
    said[4], said[9] = assistant(ODD), assistant(ODD)
    said[6] = [*said[6], {"role": "tool", "content": "7"}]
    return asked, said


@pytest.mark.parametrize("mode", MODES)
def test_rewards_and_metrics_are_those_of_the_guard_itself(
    mode: str, guard: OODGuard, copied: OODGuard, client: GuardClient
) -> None:
    here: dict[str, Any] = {}
    there: dict[str, Any] = {}
    local = OODReward(guard, mode=mode)(*some(), log_metric=here.__setitem__, log_extra=here.__setitem__)
    served = OODReward(copied, mode=mode, client=client)(
        *some(), log_metric=there.__setitem__, log_extra=there.__setitem__
    )
    assert [value is None for value in served] == [value is None for value in local]
    assert (served.count(None) > 1) is (mode == "abstain")
    pairs = [(a, b) for a, b in zip(served, local, strict=True) if a is not None and b is not None]
    assert [a for a, _ in pairs] == pytest.approx([b for _, b in pairs], abs=1e-4)
    assert there.pop("ood/unavailable") == 0
    assert there.keys() == here.keys() >= METRICS
    for name in METRICS:
        assert there[name] == pytest.approx(here[name], abs=1e-3)
    assert there["ood_flag"] == here["ood_flag"]


def test_tools_and_template_keywords_are_sent(
    guard: OODGuard, copied: OODGuard, client: GuardClient, server: GuardServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}]
    beside = (
        "{% if tools or brief %}<|im_start|>system\n{{ tools | tojson if tools }}{{ 'Be brief.' if brief }}<|im_end|>\n"
        "{% endif %}"
    )
    monkeypatch.setattr(guard.tokenizer, "chat_template", beside + guard.tokenizer.chat_template)
    bare = OODReward(guard)(*some())
    for asked in ({"tools": tools}, {"chat_template_kwargs": {"brief": True}}):
        local = OODReward(guard, **asked)(*some())
        served = OODReward(copied, client=client, **asked)(*some())
        assert np.allclose(np.array(served, float), np.array(local, float), atol=1e-4, equal_nan=True)
        assert not np.allclose(np.array(local, float), np.array(bare, float), atol=1e-3, equal_nan=True)
        assert all(item[name] == value for item in server.requests[-1]["items"] for name, value in asked.items())


def test_a_real_run_asks_the_server(
    guard: OODGuard, copied: OODGuard, client: GuardClient, server: GuardServer, tmp_path: Path
) -> None:
    reward = pickle.loads(pickle.dumps(OODReward(copied, client=client)))
    run = trainer("GRPO", guard, reward, tmp_path, prompts())
    run.train()
    entry = next(e for e in run.state.log_history if "reward" in e)
    assert set(entry) >= METRICS | {"ood/unavailable", "rewards/ood_reward/mean"}
    assert entry["ood/unavailable"] == entry["ood/unscored_frac"] == 0
    assert reward.monitor is not None
    assert (reward.monitor.state.requests, reward.monitor.state.counted) == (8, 2)
    # The server's own alarm counted a prompt once too, and was told no text for it.
    assert server.monitor is not None
    assert server.monitor.state.counted == 2
    for request in server.requests:
        for item in request["items"]:
            assert len(item["session"]) == 16
            int(item["session"], 16)
    reward._served.client.close()


@pytest.mark.parametrize("mode", MODES)
def test_what_nobody_scored_has_no_reward(
    mode: str, copied: OODGuard, client: GuardClient, server: GuardServer
) -> None:
    reward = OODReward(copied, mode=mode, client=client, outages=2, session="call")
    down = [(503, {}), (503, {})]
    for _ in range(2):
        logged: dict[str, Any] = {}
        server.refusals = list(down)
        with pytest.warns(
            OODGuardWarning, match="no reward for this call's completions: .* answered 503, busy; 2 tries"
        ):
            got = reward(*some(), log_metric=logged.__setitem__, log_extra=logged.__setitem__)
        assert got == [None] * 20
        assert {name: value for name, value in logged.items() if name.startswith("ood/")} == {
            "ood/unavailable": 1, "ood/abstain_frac": 1, "ood/unscored_frac": 1,
        }  # fmt: skip
        assert logged["ood_reward"] == [None] * 20
        # One that is answered in between begins the count anew.
        assert reward(*some()).count(None) < 20
    server.refusals = down * 2
    with pytest.warns(OODGuardWarning):
        reward(*some())
    with pytest.raises(UnavailableError, match="So it was in 2 calls in a row, and nothing is learnt"):
        reward(*some())
    assert reward.monitor is not None
    # Nor is an outage traffic.
    assert reward.monitor.state.requests == 2 * 19


def test_a_withheld_reward_is_none(copied: OODGuard, client: GuardClient, server: GuardServer) -> None:
    def enforce(reply: dict[str, Any]) -> dict[str, Any]:
        rows = [{**row, "reward": None if row["is_ood"] else row["reward"]} for row in reply["results"]]
        return {**reply, "mode": "enforce", "results": rows}

    server.spoil = enforce
    told: dict[str, list[Any]] = {}
    got = OODReward(copied, mode="penalize", client=client)(*some(), log_extra=told.__setitem__)
    # The sixth ends in a tool's answer; the others were withheld.
    assert [i for i, value in enumerate(got) if value is None] == [
        i for i, flag in enumerate(told["ood_flag"]) if flag != 0
    ]
    assert 1 < got.count(None) < 15


def test_another_guard_than_the_copy_is_noticed(
    guard: OODGuard, copied: OODGuard, client: GuardClient, server: GuardServer
) -> None:
    reward = OODReward(copied, client=client)
    reward(*some())
    anew = guard.on(guard.model, guard.tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        server.guard = anew.calibrate(chat(preference_rows(160, seed=9)), progress=False)
    server.monitor = None
    with pytest.raises(MismatchError, match="not of the calibration of the copy here"):
        reward(*some())
    server.spoil = lambda reply: {
        **reply, "results": [{**row, "axes": {"prompt": row["axes"]["response"]}} for row in reply["results"]]
    }  # fmt: skip
    with pytest.raises(MismatchError, match=r"the served guard judges \['prompt'\], the copy here \['response'\]"):
        reward(*some())
    server.spoil = lambda reply: reply
    other = guard.on(guard.model, guard.tokenizer)
    state = guard.state.with_settings({"alpha": 0.5, "confidence": None})
    other._bind(guard.model, guard.tokenizer, state.config, state)
    server.guard = other
    with pytest.raises(EngineError, match="another alpha is served there"):
        reward(*some())
    server.spoil = lambda reply: {**reply, "results": reply["results"][:-1]}
    with pytest.raises(EngineError, match="results is no list of so many"):
        reward(*some())


def test_what_a_server_cannot_do_is_refused(copied: OODGuard, client: GuardClient) -> None:
    for wrong in ({"baseline": 3}, {"baseline": [{}]}):
        with pytest.raises(InputError, match="a served guard takes no baseline"):
            OODReward(copied, client=client, **wrong)  # type: ignore[arg-type]
    for outages in (0, True, 1.5):
        with pytest.raises(InputError, match="outages="):
            OODReward(copied, client=client, outages=outages)  # type: ignore[arg-type]
    with pytest.raises(MismatchError, match="no reward model"):
        OODReward(copied)
    assert "yes" not in json.dumps(vars(client), default=str)
