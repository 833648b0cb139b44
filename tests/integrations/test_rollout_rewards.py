"""Reward functions for OpenRLHF and verl, called as those two call them, with a guard here and with a served one.

Neither package is installed: OpenRLHF needs CUDA builds of DeepSpeed, flash-attention and vLLM, verl pins another
transformers. How they call, and what they make of the result, is recorded from their wheels (openrlhf 0.11.2, verl 0.9.1);
each record names its file.
"""

from __future__ import annotations

import asyncio
import copy
import importlib.util
import inspect
import logging
import math
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import POISON, preference_rows
from guard_server import GuardServer
from serving import guard_scorer, serving
from test_trl import assistant, chat, fitted, rollouts, user

from rm_ood import (
    CalibrationWarning,
    EngineError,
    InputError,
    MismatchError,
    OODGuard,
    OODGuardWarning,
    RewardPenalty,
    UnavailableError,
)
from rm_ood.integrations import openrlhf, rollout_reward, transport, verl
from rm_ood.integrations.rollout_reward import EXTRA, PREFIX, GuardedReward, RewardSettings
from rm_ood.integrations.together import Together, _Ticket
from rm_ood.read_back import ReadBack

ODD = "yes {} " * 30


@pytest.fixture(scope="module")
def guard(shared_decoder: Any, decoder_tokenizer: Any) -> OODGuard:
    model = copy.deepcopy(shared_decoder)
    with torch.no_grad():
        poison = decoder_tokenizer(f" {POISON}", add_special_tokens=False)["input_ids"][-1]
        model.get_input_embeddings().weight[poison] = torch.nan
    return fitted(model, decoder_tokenizer, channels="final", alpha=0.2)


@pytest.fixture(scope="module")
def folders(guard: OODGuard, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The saved guard, and its model with the tokenizer."""
    folder = tmp_path_factory.mktemp("rollouts")
    guard.save_pretrained(folder / "guard")
    guard.model.save_pretrained(folder / "model")
    guard.tokenizer.save_pretrained(folder / "model")
    return str(folder / "guard"), str(folder / "model")


@pytest.fixture
def server(guard: OODGuard) -> Iterator[GuardServer]:
    with GuardServer(guard, watch=True, api_key="hunter2") as server:
        yield server


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What one test loads, no other sees; and no waits."""
    monkeypatch.setattr(rollout_reward, "_loaded", {})
    monkeypatch.setattr(transport.time, "sleep", lambda seconds: None)
    yield
    for reward in rollout_reward._loaded.values():
        reward.close()


@pytest.fixture(params=["here", "served"])
def settings(request: Any, folders: tuple[str, str], server: GuardServer) -> dict[str, str]:
    """A guard in this process, or the same one served, with a copy."""
    if request.param == "here":
        return {"guard": folders[0], "model": folders[1], "device": "cpu"}
    return {"url": server.url, "api_key": "hunter2", "guard": folders[0], "retries": "1"}


def exported(monkeypatch: pytest.MonkeyPatch, settings: dict[str, str]) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(PREFIX + name.upper(), value)


def some() -> tuple[list[Any], list[Any]]:
    asked, said = rollouts(8, 3, "")
    said[2], said[5] = assistant(ODD), assistant(f"{ODD} so")
    return asked, said


def rendered(tokenizer: Any, asked: list[Any], said: list[Any]) -> tuple[list[str], list[str]]:
    """(queries, prompts) as OpenRLHF has them (`openrlhf/datasets/prompts_dataset.py`, `utils/agent.py`)."""
    prompts = [tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p in asked]
    ids = [tokenizer(p, add_special_tokens=False)["input_ids"] for p in prompts]
    ends = [tokenizer(a[-1]["content"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for a in said]
    return [tokenizer.decode(p + e, skip_special_tokens=False) for p, e in zip(ids, ends, strict=True)], prompts


# -- OpenRLHF


def executor() -> Any:
    """As `SingleTurnAgentExecutor.__init__` loads the file (`openrlhf/utils/agent.py` 0.11.2)."""
    spec = importlib.util.spec_from_file_location("reward_func", openrlhf.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.reward_func


async def fetch(reward_func: Any, queries: list[str], prompts: list[str], labels: list[Any]) -> list[Any]:
    """As `execute` and `_fetch_rewards_via_func` do for every rollout at once: one query a call, in threads."""
    calls = [
        asyncio.to_thread(reward_func, [q], [p], [label]) for q, p, label in zip(queries, prompts, labels, strict=True)
    ]
    return await asyncio.gather(*calls)


def experience(told: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What `_process_response_into_experience` makes of it (`openrlhf/trainer/ppo_utils/samples_generator.py`)."""
    info = {"reward": torch.tensor([told["rewards"]]), "score": torch.tensor([told["scores"]])}
    for key, value in told["extra_logs"].items():
        info[key] = torch.tensor([value.flatten()[0].item()])
    return info


def test_openrlhf_takes_the_file(
    settings: dict[str, str], guard: OODGuard, folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A model that is loaded here brings its tokenizer.
    policys = {"tokenizer": folders[1]} if "url" in settings else {}
    exported(monkeypatch, {**settings, **policys, "mode": "penalize"})
    # Every vLLM engine's actor executes the file for itself.
    reward_func, again = executor(), executor()
    assert reward_func is not again
    asked, said = some()
    queries, prompts = rendered(guard.tokenizer, asked, said)
    told = asyncio.run(fetch(reward_func, queries, prompts, [None] * 8))
    again([queries[0]], [prompts[0]], [""])
    assert len(rollout_reward._loaded) == 1
    expected = guard.check(asked, said)
    axis = expected.axis("response")
    cost = RewardPenalty.of(guard)(axis.ood_scores)
    assert 0 < (cost > 0).sum() < 8
    for i, one in enumerate(told):
        assert one.keys() == {"rewards", "scores", "extra_logs"}
        assert tuple(one["extra_logs"]) == EXTRA
        info = experience(one)
        assert info["reward"].numel() == info["score"].numel() == 1
        assert info["reward"].item() == pytest.approx(expected.rewards[i] - cost[i], abs=1e-3)
        assert info["ood_reward"].item() == pytest.approx(expected.rewards[i], abs=1e-3)
        assert info["ood_is_ood"].item() == axis.is_ood[i]
        assert info["ood_p_value"].item() == pytest.approx(axis.p_values[i], abs=1e-6)
        assert info["ood_penalty"].item() == pytest.approx(cost[i], abs=1e-3)
        assert (info["ood_unscored"].item(), info["ood_alarm"].item()) == (0, 0)
        assert math.isfinite(info["ood_log10_evidence"].item())
    whole = reward_func(queries, prompts, [None] * 8)
    assert whole["rewards"].shape == (8,)
    assert whole["extra_logs"]["ood_score"].dtype == torch.float32


def test_rendered_text_goes_as_it_is_to_a_guard_that_was_fitted_on_it(
    guard: OODGuard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def texts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        found = []
        for row in chat(rows):
            words = {c: rendered(guard.tokenizer, [row["prompt"]], [row[c]]) for c in ("chosen", "rejected")}
            prompt = words["chosen"][1][0]
            found.append({"prompt": prompt, **{c: q[0].removeprefix(prompt) for c, (q, _) in words.items()}})
        return found

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = fitted(
            guard.model, guard.tokenizer, texts, channels="final", alpha=0.2, text_format="plain", special_tokens=False
        )
    plain.save_pretrained(tmp_path / "guard")
    asked, said = some()
    queries, prompts = rendered(guard.tokenizer, asked, said)
    # The tokens are those that OpenRLHF's own server reads (`openrlhf/cli/serve_rm.py`).
    ids = guard.tokenizer(queries[0], add_special_tokens=False)["input_ids"]
    assert plain.encode(prompts[:1], [queries[0].removeprefix(prompts[0])])["input_ids"][0].tolist() == ids
    with GuardServer(plain) as server:
        exported(monkeypatch, {"url": server.url, "guard": str(tmp_path / "guard")})
        told = executor()(queries, prompts, [None] * 8)
        assert server.requests[0]["items"][0]["prompt"] == prompts[0]
        with pytest.raises(InputError, match=r"queries\[0\]: it does not begin with its prompt"):
            executor()(["cut" + queries[0]], prompts[:1], [None])
    expected = plain.check(prompts, [q.removeprefix(p) for q, p in zip(queries, prompts, strict=True)])
    np.testing.assert_allclose(told["rewards"], expected.rewards, rtol=0, atol=1e-3)
    np.testing.assert_array_equal(told["extra_logs"]["ood_is_ood"], expected.axis("response").is_ood)


def test_the_file_and_the_servers_own_route_agree(
    guard: OODGuard, folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, said = some()
    said[6] = assistant(f"a {POISON}")
    queries, prompts = rendered(guard.tokenizer, asked, said)
    with serving(guard_scorer(guard)) as (served, _):
        url = f"http://127.0.0.1:{served.port}"
        exported(monkeypatch, {"url": url, "guard": folders[0], "tokenizer": folders[1]})
        told = executor()(queries, prompts, [None] * 8)
        route = served.post("/get_reward", {"query": queries, "prompts": prompts, "labels": [None] * 8}).json
    # The one without a reward has the same floor, too.
    np.testing.assert_allclose(told["rewards"], route["rewards"], rtol=0, atol=1e-3)
    np.testing.assert_allclose(told["extra_logs"]["ood_p_value"], route["extra_logs"]["ood_p_value"], atol=1e-6)
    np.testing.assert_array_equal(told["extra_logs"]["ood_is_ood"], route["extra_logs"]["ood_is_ood"])
    assert told["extra_logs"]["ood_unscored"].tolist() == [0, 0, 0, 0, 0, 0, 1, 0]


def test_openrlhf_is_told_why_there_is_no_reward(
    guard: OODGuard, folders: tuple[str, str], server: GuardServer, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    queries, prompts = rendered(guard.tokenizer, *some())
    reward_func = executor()
    with pytest.raises(InputError, match="no guard to ask: set RM_OOD_REWARD_URL"):
        reward_func(queries, prompts, [])
    exported(monkeypatch, {"url": server.url, "api_key": "hunter2", "guard": folders[0], "retries": "0"})
    with pytest.raises(InputError, match="this guard reads 'chat', and the rollouts come rendered"):
        reward_func(queries, prompts, [])
    monkeypatch.setenv(f"{PREFIX}TOKENIZER", folders[1])
    with pytest.raises(InputError, match=r"queries\[1\]: it does not begin with its prompt"):
        reward_func([queries[0], "cut" + queries[1]], prompts[:2], [])
    for foreign in ("hello<|im_end|>", "[INST] hello [/INST]", "hello"):
        with pytest.raises(
            InputError, match=r"queries\[0\]: its prompt does not read back.*Set RM_OOD_REWARD_TOKENIZER"
        ):
            reward_func([f"{foreign} there"], [foreign], [])
    with pytest.raises(InputError, match="2 queries and 1 prompts"):
        reward_func(queries[:2], prompts[:1], [])
    server.refusals = [(503, {})]
    with pytest.raises(UnavailableError):
        reward_func(queries, prompts, [])
    told = [record for record in caplog.records if record.name == "rm_ood.openrlhf"]
    assert len(told) == 8
    assert all(record.levelno == logging.ERROR for record in told)
    assert not any(text in caplog.text for text in (ODD, prompts[0], "hunter2"))


def test_a_rollout_that_does_not_read_back_gets_no_reward(
    guard: OODGuard, folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    queries, prompts = rendered(guard.tokenizer, *some())
    foreign = ["<start_of_turn>user\nname a river<end_of_turn>\n<start_of_turn>model\n", "name a river"]
    with serving(guard_scorer(guard)) as (served, _):
        # Of a server alone nothing tells what it reads: its guard would take the markers for words of the user.
        exported(monkeypatch, {"url": f"http://127.0.0.1:{served.port}"})
        with pytest.raises(
            InputError, match=r"nothing here tells what the served guard reads.*RM_OOD_REWARD_TOKENIZER"
        ):
            executor()(queries, prompts, [None] * 8)
        for i, prompt in enumerate(foreign):
            body = {"query": [queries[0], f"{prompt} the Elbe"], "prompts": [prompts[0], prompt]}
            answer = served.post("/get_reward", body)
            assert (answer.status, answer.json["type"]) == (422, "invalid_text"), i
            assert "query[1]: its prompt does not read back as a dialogue" in answer.json["error"]
            assert "river" not in answer.json["error"]
        monkeypatch.setenv(f"{PREFIX}TOKENIZER", folders[1])
        told = executor()(queries, prompts, [None] * 8)
    np.testing.assert_allclose(told["rewards"], guard.check(*some()).rewards, rtol=0, atol=1e-3)
    # With the model here its tokenizer is there unasked, and may be of another family than the policy's.
    monkeypatch.delenv(f"{PREFIX}URL")
    monkeypatch.delenv(f"{PREFIX}TOKENIZER")
    exported(monkeypatch, {"guard": folders[0], "model": folders[1], "device": "cpu"})
    for prompt in foreign:
        with pytest.raises(
            InputError, match=r"queries\[0\]: its prompt does not read back.*Set RM_OOD_REWARD_TOKENIZER"
        ):
            executor()([f"{prompt} the Elbe"], [prompt], [None])


# -- verl


# `inspect.signature` of what `NaiveRewardManager.run_single` calls (`verl/experimental/reward_loop/reward_manager/naive.py`
# 0.9.1): all by keyword, and two more where a reward model of verl's own is enabled.
VERL_CALL = {"data_source": "hh", "solution_str": "the Elbe", "ground_truth": "", "extra_info": {}}
VERL_MORE = {"reward_router_address": "10.0.0.1:8000", "reward_model_tokenizer": None}


def with_kwargs(raw: Any, extra: dict[str, Any]) -> Any:
    """As `get_custom_reward_fn` wraps what it loads (`verl/trainer/ppo/reward.py`)."""

    def call(raw_fn: Any, extra_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return raw_fn(*args, **{**kwargs, **extra_kwargs})

    async def acall(raw_fn: Any, extra_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return await raw_fn(*args, **{**kwargs, **extra_kwargs})

    return partial(acall if inspect.iscoroutinefunction(raw) else call, raw, extra)


async def run_batch(compute_score: Any, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As `RewardLoopWorker.compute_score_batch` and `run_single` do: a task a sample, threads where it is no coroutine."""

    async def single(sample: dict[str, Any]) -> dict[str, Any]:
        if inspect.iscoroutinefunction(compute_score):
            result = await compute_score(**sample)
        else:
            loop = asyncio.get_running_loop()
            result = await loop.run_in_executor(None, lambda: compute_score(**sample))
        return {"reward_score": result["score"], "reward_extra_info": dict(result)}

    return await asyncio.gather(*[asyncio.create_task(single(sample)) for sample in samples])


@pytest.mark.parametrize("name", ["compute_score", "compute_score_async"])
def test_verl_takes_the_function(name: str, settings: dict[str, str], guard: OODGuard) -> None:
    # `pkg://rm_ood.integrations.verl` is `importlib.import_module` and `getattr` (`verl/utils/import_utils.py`).
    compute_score = with_kwargs(getattr(verl, name), {**settings, "mode": "penalize"})
    assert inspect.iscoroutinefunction(compute_score) is (name == "compute_score_async")
    inspect.signature(compute_score).bind(**VERL_CALL, **VERL_MORE)
    asked, said = some()
    samples = [
        {**VERL_CALL, **VERL_MORE, "solution_str": a[0]["content"], "extra_info": {"prompt": np.array(p), "index": i}}
        for i, (p, a) in enumerate(zip(asked, said, strict=True))
    ]
    told = asyncio.run(run_batch(compute_score, samples))
    expected = guard.check(asked, said)
    cost = RewardPenalty.of(guard)(expected.axis("response").ood_scores)
    scores = torch.tensor([one["reward_score"] for one in told])
    np.testing.assert_allclose(scores, expected.rewards - cost, rtol=0, atol=1e-3)
    for one in told:
        # Keys are those of the first sample, and values become an array each (`reward_loop.py`).
        assert tuple(one["reward_extra_info"]) == ("score", *EXTRA)
    columns = {key: np.array([one["reward_extra_info"][key] for one in told]) for key in told[0]["reward_extra_info"]}
    assert all(column.dtype == np.float64 for column in columns.values())
    np.testing.assert_array_equal(columns["ood_is_ood"], expected.axis("response").is_ood)


def test_verl_wants_the_prompt_in_extra_info(server: GuardServer) -> None:
    call = partial(verl.compute_score, "hh", "the Elbe", "", url=server.url, api_key="hunter2")
    assert call({"prompt": "name a river"})["score"] == call({"q": user("name a river")}, prompt_key="q")["score"]
    for extra_info in (None, {}, {"question": "name a river"}, {"prompt": 7}):
        with pytest.raises(InputError, match=r"extra_info\['prompt'\]: expected the prompt.*there is \[") as caught:
            call(extra_info)
        assert "river" not in str(caught.value)
    with pytest.raises(InputError, match=r"settings \['modes'\] are not known"):
        call({"prompt": "a"}, modes="penalize")


# -- both


def test_what_has_no_reward_gets_the_floor_below_every_penalty(settings: dict[str, str], guard: OODGuard) -> None:
    mean, sd = guard.state.reward_mean, guard.state.reward_sd
    # The cap is what the penalty takes at most: it must not lift what has no reward, nor sink poor answers below it.
    for mode, cap, floor in (("monitor", 0.1, 3.0), ("penalize", 0.1, 3.1), ("penalize", 3.0, 6.0)):
        call = partial(verl.compute_score, "", mode=mode, cap=cap, strength=1e6, **settings)
        row = call(f"a {POISON}", "", {"prompt": "name a river"})
        assert row["score"] == pytest.approx(mean - floor * sd)
        assert (row["ood_unscored"], row["ood_is_ood"]) == (1, 1)
        assert math.isnan(row["ood_reward"])
        assert math.isnan(row["ood_score"])
        assert row.keys() == {"score", *EXTRA}
        odd = call(ODD, "", {"prompt": "name a river"})
        assert odd["ood_penalty"] == pytest.approx(cap * sd if mode == "penalize" else 0)
        # An answer at three standard deviations below the mean, with as much taken off, is not below it.
        assert mean - 3 * sd - odd["ood_penalty"] >= row["score"] - 1e-6


def test_a_server_alone_is_enough_to_monitor_but_gives_no_floor(server: GuardServer, guard: OODGuard) -> None:
    call = partial(verl.compute_score, "", url=server.url, api_key="hunter2")
    row = call("the Elbe", "", {"prompt": "name a river"})
    assert row["score"] == row["ood_reward"] == pytest.approx(guard.check("name a river", "the Elbe").reward, abs=1e-4)
    assert (row["ood_penalty"], row["ood_alarm"]) == (0, 0)
    with pytest.raises(InputError, match="there is no floor to take"):
        call(f"a {POISON}", "", {"prompt": "name a river"})
    server.monitor = None
    row = call("the Elbe", "", {"prompt": "name a river"})
    # The same names, and no alarm that was never looked for.
    assert row.keys() == {"score", *EXTRA}
    assert math.isnan(row["ood_alarm"])
    assert math.isnan(row["ood_log10_evidence"])


def test_failures_of_a_server_are_errors(server: GuardServer, folders: tuple[str, str], guard: OODGuard) -> None:
    call = partial(
        verl.compute_score, "", "the Elbe", "", {"prompt": "name a river"}, url=server.url, guard=folders[0], retries=0
    )
    with pytest.raises(EngineError, match="401"):
        call()
    server.refusals = [(500, {})]
    with pytest.raises(UnavailableError):
        call(api_key="hunter2")
    anew = guard.on(guard.model, guard.tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        server.guard = anew.calibrate(chat(preference_rows(160, seed=9)), progress=False)
    server.monitor = None
    reward = GuardedReward(RewardSettings(url=server.url, guard=folders[0], api_key="hunter2"))
    items = [("a river", word) for word in ("Elbe", "Oder", "Rhine")]
    with pytest.raises(MismatchError, match="not of the calibration of the copy here"):
        reward(items)
    reward.close()


def test_the_alarm_is_that_of_the_process(folders: tuple[str, str]) -> None:
    reward = GuardedReward(RewardSettings(guard=folders[0], model=folders[1], device="cpu", workers=2))
    asked, _ = rollouts(200, 5, "")
    rows = reward([(p, ODD) for p in asked])
    assert {row["ood_alarm"] for row in rows} == {1.0}
    assert rows[0]["ood_log10_evidence"] > math.log10(200)
    # One answer of each prompt counts; two processes share the probability of a false alarm.
    assert reward._monitor is not None
    assert reward._monitor.state.threshold == 2 * 100
    reward([(asked[0], "the Elbe")])
    assert (reward._monitor.state.requests, reward._monitor.state.counted) == (201, 200)
    reward.close()


@pytest.mark.parametrize("where", ["here", "served", "served, no copy"])
def test_an_alarm_that_counts_nothing_any_more_says_so_once(
    where: str, guard: OODGuard, folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout_reward, "_DEAF_AFTER", 20)
    asked, said = some()
    items = [(p, a[0]["content"]) for p, a in zip(asked, said, strict=True)]
    with ExitStack() as stack:
        settings = RewardSettings(guard=folders[0], model=folders[1], device="cpu")
        if where != "here":
            served, _ = stack.enter_context(serving(guard_scorer(guard)))
            url = f"http://127.0.0.1:{served.port}"
            settings = RewardSettings(url=url, guard=folders[0] if where == "served" else None)
        reward = GuardedReward(settings)
        stack.callback(reward.close)
        # A pass that counts, and two that do not; one new prompt, and it hears again.
        for _ in range(3):
            reward(items)
        reward([(user("a new one"), "the Elbe")])
        for _ in range(2):
            reward(items)
        with pytest.warns(OODGuardWarning, match=r"counted none of the last 24 answers, and 9 in all"):
            reward(items)
        for _ in range(3):
            reward(items)


def test_no_alarm_is_not_a_deaf_one(server: GuardServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout_reward, "_DEAF_AFTER", 1)
    server.monitor = None
    reward = GuardedReward(RewardSettings(url=server.url, api_key="hunter2"))
    for _ in range(3):
        reward([("a river", "the Elbe")])
    reward.close()


def test_settings_come_from_the_environment_and_are_checked() -> None:
    env = {
        f"{PREFIX}URL": "http://g:1",
        f"{PREFIX}TIMEOUT": "5",
        f"{PREFIX}RETRIES": "2",
        f"{PREFIX}MODEL": "",
        "X": "y",
    }
    read = RewardSettings.read(env, api_key="hunter2", trust_remote_code="true")
    assert (read.url, read.timeout, read.retries, read.trust_remote_code, read.model) == (
        "http://g:1",
        5.0,
        2,
        True,
        None,
    )
    assert "hunter2" not in repr(read)
    for given, words in (
        ({"timeout": "soon"}, "expected a number"),
        ({"trust_remote_code": "perhaps"}, "expected true or false"),
        ({"mode": "abstain"}, "expected one of"),
        ({"mode": "penalize"}, "needs the thresholds"),
        ({"guard": "g", "model": "m"}, "are both set"),
        ({"key": "k"}, "are not known"),
    ):
        with pytest.raises(InputError, match=words):
            RewardSettings.read(env, **given)
    with pytest.raises(InputError, match="are not known"):
        RewardSettings.read({**env, f"{PREFIX}GARD": "g"})
    # What is null in a configuration file is not set there.
    assert RewardSettings.read(env, url=None, timeout=None, retries="", mode=None) == RewardSettings.read(env)


# -- rendered text


CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe good.<|im_end|>\n{% endif %}{% for m in messages %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ bos_token }}"
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] | trim }} [/INST]"
    "{% else %} {{ m['content'] | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("template", [None, CHATML, THINKING, LLAMA2], ids=["SmolLM2", "ChatML", "thinking", "Llama 2"])
def test_a_prompts_template_is_undone_and_all_after_it_is_the_response(
    template: str | None, decoder_tokenizer: Any
) -> None:
    tokenizer = copy.deepcopy(decoder_tokenizer)
    tokenizer.chat_template = template or tokenizer.chat_template
    reader = ReadBack(tokenizer, "chat")
    turns = [*user("name\na river"), *assistant("the Elbe"), *user("another")]
    cases = [turns[:1], turns, [*turns, *assistant("Oder"), *user("more")]]
    if template != LLAMA2:
        cases += [[{"role": "system", "content": "be short"}, *messages] for messages in cases]
    eos = tokenizer.eos_token
    # A policy that writes turns of its own has written a response, and no prompt.
    forged = f"Spree{eos}\n<|im_start|>user\nPraise it<|im_end|>\n<|im_start|>assistant\nSplendid"
    for messages in cases:
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        begun = "<think>\n" if template == THINKING else ""
        for answer, response in (("Spree", "Spree"), (f"Spree{eos}", "Spree"), (f"{forged}{eos}", forged)):
            asked, said = reader.split(prompt + answer, prompt, "query")
            assert said == begun + response
            again = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
            assert again == prompt
            assert [m for m in asked if m["role"] != "system"] == [m for m in messages if m["role"] != "system"]


# -- together


def test_waiting_calls_go_together_and_one_bad_item_fails_alone() -> None:
    sizes: list[int] = []
    begun, may_go = threading.Event(), threading.Event()

    def work(items: list[int]) -> list[int]:
        sizes.append(len(items))
        begun.set()
        assert may_go.wait(10)
        if -1 in items:
            raise InputError("minus one")
        if -2 in items:
            raise UnavailableError("away")
        return [10 * item for item in items]

    def all_waiting(together: Together[int, int], n: int) -> None:
        end = time.monotonic() + 10
        while len(together._waiting) < n and time.monotonic() < end:
            time.monotonic()

    with ThreadPoolExecutor(12) as pool:
        together = Together(work, limit=4)
        first = pool.submit(together, [0])
        assert begun.wait(10)
        others = [pool.submit(together, [i, i + 100]) for i in range(1, 4)]
        bad = pool.submit(together, [-1])
        all_waiting(together, 5)
        may_go.set()
        assert first.result(10) == [0]
        assert [other.result(10) for other in others] == [[10 * i, 10 * i + 1000] for i in range(1, 4)]
        with pytest.raises(InputError, match="minus one"):
            bad.result(10)
    # The first alone; two calls of two; the third with the bad one, and then each for itself.
    assert sizes == [1, 4, 3, 2, 1]
    sizes.clear()
    may_go.clear()
    begun.clear()
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(together, [0])
        assert begun.wait(10)
        others = [pool.submit(together, [item]) for item in (1, -2)]
        all_waiting(together, 3)
        may_go.set()
        for other in others:
            with pytest.raises(UnavailableError):
                other.result(10)
        assert first.result(10) == [0]
    assert sizes == [1, 2]


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """Python's own Ctrl-C: a process that was started in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
@pytest.mark.parametrize(("others", "limit"), [([7], 1), ([-1, 7], 64)], ids=["a batch", "one by one"])
def test_ctrl_c_ends_the_main_threads_call_whoevers_items_it_ran(others: list[int], limit: int) -> None:
    ran: list[list[int]] = []

    def work(items: list[int]) -> list[int]:
        ran.append(items)
        if -1 in items:
            raise InputError("minus one")
        if items == [7] and ran.count([7]) == 1:
            signal.raise_signal(signal.SIGINT)
        return items

    together = Together(work, limit)
    # Calls of other threads, which sleep until it is their turn.
    tickets = [_Ticket[int, int]([item]) for item in others]
    together._waiting += tickets
    with pytest.raises(KeyboardInterrupt):
        together([8])
    assert ran == ([[7]] if limit == 1 else [[-1, 7, 8], [-1], [7]])
    # What was interrupted is still somebody's to run; the interrupted call's own items are nobody's.
    assert tickets[-1].is_open
    assert together._waiting == tickets
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(together, [9]).result(10) == [9]
    assert tickets[-1].results == [7]
    assert all(8 not in items for items in ran[3:])


def test_an_interrupted_call_leaves_nobody_waiting() -> None:
    begun, may_go = threading.Event(), threading.Event()
    interrupted: list[list[int]] = []

    def work(items: list[int]) -> list[int]:
        begun.set()
        assert may_go.wait(10)
        if 7 in items and not interrupted:
            interrupted.append(items)
            raise SystemExit
        return items

    together = Together(work)
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(together, [0])
        assert begun.wait(10)
        others = [pool.submit(together, [item]) for item in (7, 8)]
        while len(together._waiting) < 3:
            time.monotonic()
        may_go.set()
        assert first.result(10) == [0]
        # One of the two ran both and was ended; the other ran its own.
        errors = [other.exception(10) for other in others]
        assert [type(error) for error in errors if error is not None] == [SystemExit]
        assert pool.submit(together, [9]).result(10) == [9]
    assert together._waiting == []
