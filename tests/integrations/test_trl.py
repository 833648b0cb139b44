"""Rewards with a guard in TRL's own trainers, on CPU: a tiny policy, a tiny reward model, a real tokenizer."""

from __future__ import annotations

import argparse
import copy
import pickle
import random
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import preference_rows, sentence
from datasets import Dataset
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, TrainerControl, TrainerState

from rm_ood import (
    CalibrationError,
    CalibrationWarning,
    InputError,
    MismatchError,
    NotFittedError,
    OODGuard,
    OODGuardWarning,
    RewardPenalty,
)
from rm_ood.integrations.trl import OODReward, alarm_callback, guard_at_end

# TRL 1.16 sets an option that transformers 5.23 renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning")

METRICS = {
    "ood/reward_mean", "ood/score_mean", "ood/flag_frac", "ood/penalty_mean", "ood/abstain_frac", "ood/unscored_frac",
    "ood/baseline", "ood/log10_evidence", "ood/alarm", "ood/counted_frac",
}  # fmt: skip


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def chat(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"prompt": user(r["prompt"]), "chosen": assistant(r["chosen"]), "rejected": assistant(r["rejected"])}
        for r in rows
    ]


def fitted(model: Any, tokenizer: Any, change: Any = chat, **settings: Any) -> OODGuard:
    settings = {"axes": ("response",), "channels": ["final", "response/mean@0.33"], "alpha": 0.05, **settings}
    guard = OODGuard(model, tokenizer, **settings)
    return guard.fit(change(preference_rows(200)), calibration=change(preference_rows(150, seed=1)), progress=False)


@pytest.fixture(scope="module")
def guard(shared_decoder: Any, decoder_tokenizer: Any) -> OODGuard:
    model = copy.deepcopy(shared_decoder)
    model.config._name_or_path = "made/by-hand"
    return fitted(model, decoder_tokenizer, span_means="raw")


@pytest.fixture
def own_guard(guard: OODGuard) -> OODGuard:
    """The same guard, for tests that calibrate it."""
    return guard.on(guard.model, guard.tokenizer)


@pytest.fixture(scope="module")
def half(guard: OODGuard) -> OODGuard:
    """A guard that flags about half of what a policy that was never trained writes: some of every group."""
    rng = random.Random(5)
    tokenizer = guard.tokenizer
    rows = [
        {"prompt": user(f"{i} {sentence(rng)}"), "response": tokenizer.decode(rng.choices(range(1000, 40000), k=8))}
        for i in range(150)
    ]
    state = guard.state.with_settings({"alpha": 0.5, "confidence": None})
    relaxed = guard.on(guard.model, tokenizer)
    relaxed._bind(guard.model, tokenizer, state.config, state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        return relaxed.calibrate(rows, progress=False)


def policy(guard: OODGuard, *, collapsed: bool = False) -> Any:
    """A random decoder; a collapsed one says one token again and again."""
    config = copy.deepcopy(guard.model.config)
    config.num_hidden_layers = 1
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    if collapsed:
        with torch.no_grad():
            model.get_input_embeddings().weight[:, 0] = 1000.0
            model.lm_head.weight.zero_()
            model.lm_head.weight[guard.tokenizer(" yes", add_special_tokens=False)["input_ids"], 0] = 10.0
    return model


def prompts(n: int = 40, *, plain: bool = False) -> Dataset:
    rows = preference_rows(n, seed=7)
    return Dataset.from_list([{"prompt": r["prompt"] if plain else user(r["prompt"])} for r in rows])


def trainer(kind: str, guard: OODGuard, rewards: Any, folder: Path, data: Dataset, **options: Any) -> Any:
    import trl

    callbacks = options.pop("callbacks", [])
    processing = options.pop("reward_processing_classes", None)
    model = policy(guard, collapsed=options.pop("collapsed", False))
    settings = {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True, "max_steps": 1,
        "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 8, "logging_steps": 1,
        "save_strategy": "no", "beta": 0.0, **options,
    }  # fmt: skip
    return getattr(trl, f"{kind}Trainer")(
        model,
        reward_funcs=rewards,
        args=getattr(trl, f"{kind}Config")(**settings),
        train_dataset=data,
        processing_class=guard.tokenizer,
        reward_processing_classes=processing,
        callbacks=callbacks,
    )


def test_grpo_logs_the_guard_and_gives_the_rewards_of_the_model_itself(guard: OODGuard, tmp_path: Path) -> None:
    reward = OODReward(guard)
    run = trainer(
        "GRPO",
        guard,
        [guard.model, reward],
        tmp_path,
        prompts(),
        reward_weights=[1.0, 0.0],
        reward_processing_classes=[guard.tokenizer, None],
        max_steps=2,
        log_completions=True,
    )
    run.train()
    logs = [entry for entry in run.state.log_history if "reward" in entry]
    assert len(logs) == 2
    for entry in logs:
        assert set(entry) >= METRICS | {"rewards/ood_reward/mean"}
        assert entry["rewards/by-hand/mean"] == pytest.approx(entry["rewards/ood_reward/mean"], abs=1e-5)
        # Weight 0: logged, and without effect.
        assert entry["reward"] == pytest.approx(entry["rewards/by-hand/mean"], abs=1e-5)
    told = run._logs["rewards"]
    np.testing.assert_allclose(told["by-hand"], told["ood_reward"], rtol=0, atol=1e-5)
    assert np.std(told["by-hand"]) > 0.1
    assert set(run._logs["extra"]) == {"ood_score", "ood_p_value", "ood_flag", "ood_reward"}
    assert list(run._logs["extra"]["ood_reward"]) == pytest.approx(list(told["ood_reward"]), abs=1e-5)
    assert reward.monitor is not None
    # Two prompts in each of two steps, four completions of each.
    assert (reward.monitor.state.requests, reward.monitor.state.counted) == (16, 4)


def test_plain_text_is_scored_as_grpo_scores_a_model(guard: OODGuard, tmp_path: Path) -> None:
    plain = fitted(
        guard.model,
        guard.tokenizer,
        list,
        channels="final",
        text_format="plain",
        special_tokens=False,
        append_eos=False,
    )
    run = trainer(
        "GRPO",
        guard,
        [guard.model, OODReward(plain)],
        tmp_path,
        prompts(plain=True),
        reward_processing_classes=[guard.tokenizer, None],
    )
    run.train()
    told = run._logs["rewards"]
    assert len(told["by-hand"]) == 8
    np.testing.assert_allclose(told["by-hand"], told["ood_reward"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_abstained_completions_have_no_advantage_and_no_part_in_the_mean(
    kind: str, half: OODGuard, tmp_path: Path
) -> None:
    run = trainer(kind, half, OODReward(half, mode="abstain"), tmp_path, prompts())
    run.train()
    rewards = np.array(run._logs["rewards"]["ood_reward"]).reshape(2, 4)
    advantages = np.array(run._logs["advantages"]).reshape(2, 4)
    none = np.isnan(rewards)
    assert 0 < none.sum() < 7
    assert np.all(advantages[none] == 0)
    assert any(advantages[~none] != 0)
    for group in range(2):
        if (~none[group]).sum() > 1:
            assert advantages[group][~none[group]].sum() == pytest.approx(0, abs=1e-5)
    entry = next(e for e in run.state.log_history if "ood/abstain_frac" in e)
    assert entry["ood/abstain_frac"] == pytest.approx(none.mean())
    assert entry["ood/flag_frac"] == pytest.approx(none.mean())


def test_the_penalty_is_taken_off_inside_the_reward(half: OODGuard) -> None:
    rows = preference_rows(20, seed=8)
    asked, said = [user(r["prompt"]) for r in rows for _ in range(2)], []
    for i, r in enumerate(rows):
        said += [assistant(r["chosen"]), assistant(half.tokenizer.decode(range(900 * i + 900, 900 * i + 912)))]
    logged: dict[str, float] = {}
    raw = OODReward(half)(asked, said)
    less = OODReward(half, mode="penalize", strength=2.0)(asked, said, log_metric=logged.__setitem__)
    cost = np.array(raw, dtype=float) - np.array(less, dtype=float)
    flags = half.check(asked, said).axis("response").is_ood
    assert 0 < flags.sum() < 40
    # Zero where nothing is flagged; the last score that is not flagged may be the threshold itself.
    assert np.abs(cost[~flags]).max() < 1e-9
    assert (cost[flags] > 0).mean() > 0.9
    assert cost.max() <= 3 * half.state.reward_sd + 1e-9
    assert logged["ood/penalty_mean"] == pytest.approx(cost.mean())
    neutral = np.array(OODReward(half, mode="penalize", strength=2.0, neutral=True)(asked, said), dtype=float)
    np.testing.assert_allclose(neutral.reshape(20, 2).mean(1), np.array(raw, dtype=float).reshape(20, 2).mean(1))


def rollouts(n: int, seed: int, words: str) -> tuple[list[Any], list[Any]]:
    """n prompts with an answer that begins as the data do and ends in `words`."""
    rng = random.Random(seed)
    asked = [user(f"{seed} {i} {sentence(rng)}") for i in range(n)]
    return asked, [assistant(f"{sentence(rng)} {words}") for _ in range(n)]


DRIFTED, HACKED = "yes " * 10, "yes " * 60


def test_a_baseline_of_steps_moves_thresholds_and_alarm_to_the_initial_policy(own_guard: OODGuard) -> None:
    before = OODReward(own_guard, mode="abstain")
    without = before(*rollouts(150, 20, DRIFTED), trainer_state=TrainerState(global_step=0))
    # Another generator's text is far from preference data before any training.
    assert before.alarmed
    assert without.count(None) > 25
    reward, logged = OODReward(own_guard, mode="abstain", baseline=2), {}
    for step in range(2):
        got = reward(
            *rollouts(75, step, DRIFTED), trainer_state=TrainerState(global_step=step), log_metric=logged.__setitem__
        )
        # Its rewards are left as they are.
        assert None not in got
        assert logged["ood/baseline"] == 1
    assert reward.monitor is None
    for step in range(2, 6):
        got = reward(
            *rollouts(75, step, DRIFTED), trainer_state=TrainerState(global_step=step), log_metric=logged.__setitem__
        )
        assert got.count(None) < 12
    assert (logged["ood/baseline"], logged["ood/alarm"]) == (0, 0)
    asked, said = rollouts(75, 6, "")[0], [assistant(HACKED)] * 75
    got = reward(asked, said, trainer_state=TrainerState(global_step=6), log_metric=logged.__setitem__)
    assert logged["ood/alarm"] == 1
    assert logged["ood/log10_evidence"] > 2
    assert got.count(None) > 30


def test_a_baseline_of_steps_moves_the_penalty_too(own_guard: OODGuard) -> None:
    reward = OODReward(own_guard, mode="penalize", baseline=2)
    for step in range(3):
        asked, said = rollouts(75, step, DRIFTED)
        got = reward(asked, said, trainer_state=TrainerState(global_step=step))
    penalty = RewardPenalty.of(own_guard)
    assert penalty != RewardPenalty.of(before_baseline(own_guard))
    expected = penalty.apply(own_guard.check(asked, said))
    assert got == pytest.approx(expected.tolist(), abs=1e-4)


def before_baseline(guard: OODGuard) -> OODGuard:
    rows = chat(preference_rows(150, seed=1))
    return guard.on(guard.model, guard.tokenizer).calibrate(rows, progress=False)


def test_a_baseline_of_rows_is_the_guards_calibration(own_guard: OODGuard) -> None:
    asked, said = rollouts(150, 30, DRIFTED)
    rows = [{"prompt": p, "response": r} for p, r in zip(asked, said, strict=True)]
    reward = OODReward(own_guard, baseline=rows)
    reward(*rollouts(150, 31, DRIFTED))
    assert not reward.alarmed
    assert own_guard.check(*rollouts(150, 32, DRIFTED)).is_ood.mean() < 0.15


def test_a_baseline_that_is_too_small_or_gone_is_refused(own_guard: OODGuard) -> None:
    reward = OODReward(own_guard, baseline=1)
    reward(*rollouts(30, 0, ""))
    with pytest.raises(CalibrationError, match="baseline=1: the first steps' rollouts answered 30 prompts"):
        reward(*rollouts(30, 1, ""))
    resumed = OODReward(own_guard, baseline=5)
    with pytest.raises(CalibrationError, match="first call is at step 70, when the initial policy's rollouts are gone"):
        resumed(*rollouts(3, 0, ""), trainer_state=TrainerState(global_step=70))


def test_sessions_decide_whether_a_prompt_that_comes_back_counts(guard: OODGuard) -> None:
    for session, counted in (("prompt", 10), ("call", 30)):
        reward, logged = OODReward(guard, session=session), {}
        for i in range(3):
            asked, said = rollouts(10, 40, "")
            # Once, and only where nothing counts.
            told = pytest.warns(OODGuardWarning, match="none of this call's 20 completions counts for the alarm")
            with told if (session, i) == ("prompt", 1) else nullcontext():
                reward(asked * 2, said * 2, log_metric=logged.__setitem__)
            assert logged["ood/counted_frac"] == (0 if session == "prompt" and i else 0.5)
        assert reward.monitor is not None
        assert (reward.monitor.state.requests, reward.monitor.state.counted) == (60, counted)


def test_a_hack_that_begins_in_the_second_pass_alarms(own_guard: OODGuard) -> None:
    asked, said = rollouts(150, 43, DRIFTED)
    rows = [{"prompt": p, "response": r} for p, r in zip(*rollouts(150, 42, DRIFTED), strict=True)]
    reward, honest = OODReward(own_guard, baseline=rows), OODReward(own_guard)
    for step in range(3):
        state = TrainerState(global_step=step, epoch=step / 3)
        part = slice(50 * step, 50 * step + 50)
        reward(asked[part], said[part], trainer_state=state)
    # A resumed run begins with a later pass.
    for number in range(7, 10):
        anew = rollouts(150, 44 + number, DRIFTED)[1]
        honest(asked, anew, trainer_state=TrainerState(global_step=number, epoch=float(number)))
    assert not reward.alarmed
    assert not honest.alarmed
    logged: dict[str, float] = {}
    hacked = [assistant(HACKED)] * 150
    reward = pickle.loads(pickle.dumps(reward))
    reward(asked, hacked, trainer_state=TrainerState(global_step=3, epoch=1.0), log_metric=logged.__setitem__)
    assert reward.alarmed
    assert logged["ood/counted_frac"] == 1
    state = reward.monitor.state
    assert (state.counted, state.requests) == (300, 300)
    assert state.alarm_at > 150


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_real_run_counts_each_prompt_in_each_epoch(accumulated: int, guard: OODGuard, tmp_path: Path) -> None:
    reward = OODReward(guard)
    steps = 3 * 2 // accumulated
    trainer(
        "GRPO", guard, reward, tmp_path, prompts(4), max_steps=steps, gradient_accumulation_steps=accumulated
    ).train()
    assert reward.monitor is not None
    assert (reward.monitor.state.counted, reward.monitor.state.requests) == (12, 48)


def test_calls_of_threads_are_told_apart(guard: OODGuard) -> None:
    # As AsyncGRPOTrainer calls it.
    reward = OODReward(guard, session="call")
    asked, said = rollouts(3, 41, "")
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda _: reward(asked, said), range(12)))
    assert all(None not in one for one in got)
    assert reward.monitor is not None
    assert (reward.calls, reward.monitor.state.counted) == (12, 36)


def test_what_cannot_be_scored_is_none_and_counted(guard: OODGuard) -> None:
    asked, said = rollouts(4, 50, "")
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
    tool = {"role": "tool", "content": "7"}
    logged: dict[str, Any] = {}
    # The last assistant message is the response; one that ends in a tool's answer has none.
    said[1] = [{"role": "assistant", "content": "wait"}, *user("go on"), *said[1]]
    said[3] = [call, tool]
    rewards = OODReward(guard)(asked, said, log_metric=logged.__setitem__, log_extra=logged.__setitem__)
    assert [value is None for value in rewards] == [False, False, False, True]
    assert rewards[1] == pytest.approx(float(guard.check([*asked[1], *said[1][:-1]], said[1][-1:]).reward), abs=1e-5)
    assert logged["ood/abstain_frac"] == logged["ood/unscored_frac"] == 0.25
    assert logged["ood_reward"] == rewards
    assert logged["ood_score"][3] is None
    assert OODReward(guard)([], []) == []
    empty = OODReward(guard)(asked[:1], [assistant("")])
    assert empty[0] is not None


def test_a_nan_reward_is_none_in_every_mode(guard: OODGuard) -> None:
    model = copy.deepcopy(guard.model)
    bad = guard.tokenizer(" zebra", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        model.get_input_embeddings().weight[bad[-1]] = float("nan")
    asked, said = rollouts(3, 60, "")
    said[1] = assistant("a zebra")
    for mode in ("monitor", "penalize"):
        rewards = OODReward(guard.on(model, guard.tokenizer), mode=mode)(asked, said)
        assert [value is None for value in rewards] == [False, True, False]
    # Nor is it part of a baseline, which may hold no NaN.
    reward = OODReward(guard.on(model, guard.tokenizer), baseline=1)
    asked, said = rollouts(120, 61, "")
    reward(asked, [assistant("a zebra"), *said[1:]])
    assert None not in reward(*rollouts(3, 62, ""))
    assert reward.monitor is not None


@pytest.mark.parametrize("mode", ["monitor", "penalize", "abstain"])
def test_a_floor_lies_below_every_reward_in_every_mode(mode: str, guard: OODGuard) -> None:
    asked, said = rollouts(20, 63, "")
    said[1] = assistant(HACKED)
    said[3] = [{"role": "tool", "content": "7"}]
    none = OODReward(guard, mode=mode)(asked, said)
    got = OODReward(guard, mode=mode, missing="floor")(asked, said)
    missing = [i for i, value in enumerate(none) if value is None]
    assert 3 in missing
    assert (1 in missing) is (mode == "abstain")
    scored = [value for value in none if value is not None]
    floor = got[3]
    assert floor is not None
    assert [value for i, value in enumerate(got) if i not in missing] == pytest.approx(scored, abs=1e-5)
    assert {got[i] for i in missing} == {floor}
    assert floor < min(scored)
    assert floor <= guard.state.reward_mean - 6 * guard.state.reward_sd


def test_a_floor_lies_below_rewards_of_any_size(own_guard: OODGuard) -> None:
    # A drifted model: all of its rewards are far below those that the guard was fitted on.
    model = copy.deepcopy(own_guard.model)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.01)
        model.score.weight.mul_(1000.0)
    asked, said = rollouts(20, 64, "")
    said[3] = [{"role": "tool", "content": "7"}]
    got = OODReward(own_guard.on(model, own_guard.tokenizer), missing="floor")(asked, said)
    assert got[3] == min(value for value in got if value is not None)
    assert sorted(got)[1] < own_guard.state.reward_mean - 6 * own_guard.state.reward_sd  # type: ignore[type-var,operator]


@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_beside_another_function_what_is_missing_does_not_win_with_a_floor(
    kind: str, half: OODGuard, tmp_path: Path
) -> None:
    def negative(completions: list[Any], **columns: Any) -> list[float]:
        return [-0.01 * i for i in range(len(completions))]

    reward = OODReward(half, mode="abstain", missing="floor")
    run = trainer(kind, half, [reward, negative], tmp_path, prompts())
    run.train()
    flags = np.array(run._logs["extra"]["ood_flag"]).reshape(2, 4) == 1
    advantages = np.array(run._logs["advantages"]).reshape(2, 4)
    mixed = [group for group in range(2) if 0 < flags[group].sum() < 4]
    assert mixed
    for group in mixed:
        assert advantages[group][flags[group]].max() < advantages[group][~flags[group]].min()


@pytest.mark.parametrize("mode", ["monitor", "penalize", "abstain"])
def test_a_guard_that_is_calibrated_underneath_is_noticed(mode: str, guard: OODGuard) -> None:
    shared = guard.on(guard.model, guard.tokenizer)
    reward, waiting = OODReward(shared, mode=mode), OODReward(shared, mode=mode, baseline=1)
    reward(*rollouts(5, 66, ""))
    waiting(*rollouts(120, 67, ""))
    asked, said = rollouts(150, 68, DRIFTED)
    after = OODReward(
        shared, mode=mode, baseline=[{"prompt": p, "response": r} for p, r in zip(asked, said, strict=True)]
    )
    for stale in (reward, pickle.loads(pickle.dumps(reward)), waiting):
        with pytest.raises(MismatchError, match="calibrated or fitted anew since this OODReward was made"):
            stale(*rollouts(5, 69, ""))
    assert pickle.loads(pickle.dumps(after))(*rollouts(5, 69, DRIFTED)).count(None) < 5


def test_a_pickled_reward_takes_its_model_along_and_has_its_own_monitor(guard: OODGuard) -> None:
    reward = OODReward(guard, mode="penalize", name="guarded", session="call")
    asked, said = rollouts(6, 70, DRIFTED)
    expected = reward(asked, said)
    other = pickle.loads(pickle.dumps(reward))
    assert other.guard.model is not guard.model
    assert other(completions=said, prompts=asked, completion_ids=[[1]] * 6) == pytest.approx(expected, abs=1e-6)
    assert other.__name__ == "guarded"
    assert (reward.monitor.state.requests, other.monitor.state.requests) == (6, 12)  # type: ignore[union-attr]


def test_no_gradient_flows_and_the_models_mode_is_asked_for(guard: OODGuard) -> None:
    with torch.enable_grad():
        assert all(isinstance(value, float) for value in OODReward(guard)(*rollouts(2, 0, "")))
    training = guard.on(copy.deepcopy(guard.model).train(), guard.tokenizer)
    with pytest.raises(MismatchError, match="training mode"):
        OODReward(training)(*rollouts(2, 0, ""))


def test_the_alarm_ends_a_real_run(guard: OODGuard, tmp_path: Path) -> None:
    reward = OODReward(guard)
    run = trainer(
        "GRPO",
        guard,
        reward,
        tmp_path,
        prompts(200),
        callbacks=[alarm_callback(reward)],
        collapsed=True,
        max_steps=12,
        num_generations=2,
        max_completion_length=24,
    )
    with pytest.warns(CalibrationWarning, match=r"stopped at step \d+: the traffic's response scores are"):
        run.train()
    assert 1 <= run.state.global_step < 12
    assert run.state.log_history[-2]["ood/alarm"] == 1


def test_the_callback_may_only_warn_and_refuses_a_reward_nobody_calls(guard: OODGuard) -> None:
    reward, control = OODReward(guard), TrainerControl()
    callback = alarm_callback(reward, "warn")
    with pytest.raises(InputError, match="never called in this process"):
        callback.on_step_end(None, TrainerState(global_step=1), control)
    reward(*rollouts(150, 80, HACKED))
    assert reward.alarmed
    with pytest.warns(CalibrationWarning, match="alarm at step 1: the traffic's response scores"):
        callback.on_step_end(None, TrainerState(global_step=1), control)
    # Once.
    callback.on_step_end(None, TrainerState(global_step=2), control)
    assert not control.should_training_stop


def test_a_run_that_goes_on_from_a_checkpoint_goes_on_with_its_monitor(guard: OODGuard, tmp_path: Path) -> None:
    def run(steps: int, reward: OODReward, start: bool) -> Any:
        one = trainer(
            "GRPO", guard, reward, tmp_path, prompts(40), callbacks=[alarm_callback(reward)], max_steps=steps,
            save_strategy="steps", save_steps=2,
        )  # fmt: skip
        one.train(resume_from_checkpoint=None if start else True)
        assert reward.monitor is not None
        return reward.monitor.state

    first, other = OODReward(guard, session="call"), OODReward(guard, session="call")
    before = run(2, first, True)
    assert (tmp_path / "checkpoint-2" / "ood_reward_monitor_0.json").is_file()
    # One that has seen less than the checkpoint's is replaced.
    other(*rollouts(2, 0, ""))
    after = run(3, other, False)
    assert other.calls == first.calls + 1
    assert after.requests == before.requests + 8
    # Prompts of a later call count again.
    assert after.counted == before.counted + 2
    (tmp_path / "checkpoint-2" / "ood_reward_monitor_0.json").unlink()
    (tmp_path / "checkpoint-3").rename(tmp_path / "elsewhere")
    with pytest.warns(CalibrationWarning, match="goes on at step 2, and its monitor begins anew"):
        anew = run(3, OODReward(guard, session="call"), False)
    assert anew.requests == 8


def test_a_run_that_goes_on_in_its_process_has_not_forgotten_the_alarm(guard: OODGuard, tmp_path: Path) -> None:
    reward = OODReward(guard, session="call")
    run = trainer(
        "GRPO", guard, reward, tmp_path, prompts(40), callbacks=[alarm_callback(reward)], max_steps=2,
        save_strategy="steps", save_steps=2,
    )  # fmt: skip
    run.train()
    # The checkpoint's monitor knows nothing of this.
    reward(*rollouts(150, 80, HACKED))
    assert reward.alarmed
    run.args.max_steps = 4
    for calls in (4, 5):
        with pytest.warns(CalibrationWarning, match="stopped at step 3: the traffic's response scores are"):
            run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert reward.calls == calls


def test_a_monitor_that_cannot_be_saved_does_not_end_the_run(guard: OODGuard, tmp_path: Path) -> None:
    reward, callback = OODReward(guard), alarm_callback(OODReward(guard))
    args, state = argparse.Namespace(output_dir=tmp_path, resume_from_checkpoint=None, process_index=1), TrainerState()
    state.global_step = 5
    # Nothing was watched yet.
    callback.on_save(args, state, TrainerControl())
    assert not (tmp_path / "checkpoint-5").exists()
    reward(*rollouts(2, 0, ""))
    (tmp_path / "checkpoint-5" / "ood_reward_monitor_1.json").mkdir(parents=True)
    with pytest.warns(OODGuardWarning, match="is a folder, and is not replaced"):
        alarm_callback(reward).on_save(args, state, TrainerControl())


def test_two_processes_take_one_baseline_and_stop_at_the_same_step(own_guard: OODGuard, tmp_path: Path) -> None:
    with (tmp_path / "reward").open("wb") as file:
        pickle.dump(OODReward(own_guard, baseline=1), file)
    script = Path(__file__).with_name("two_trainers.py")
    command = [sys.executable, str(script), str(tmp_path / "store"), str(tmp_path / "reward")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([*command, str(rank)], **pipes) for rank in range(2)]  # type: ignore[call-overload]
    try:
        told = [process.communicate(timeout=300) for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], told
    first, second = (out.split() for out, _ in told)
    # Calibration, threshold (twice that of one process), step of the stop; and the own alarm.
    assert first[:3] == second[:3]
    assert first[1] == "200.0"
    assert int(first[2]) > 2
    assert (first[3], second[3]) == ("False", "True")


@pytest.mark.parametrize("bf16", [False, True])
def test_reward_trainer_leaves_a_guard_beside_the_model(
    bf16: bool, tiny_decoder: Any, decoder_tokenizer: Any, tmp_path: Path
) -> None:
    import trl

    train, held_out = chat(preference_rows(200)), chat(preference_rows(130, seed=1))
    callback = guard_at_end(train, calibration=held_out, axes=("response",), channels="final", alpha=0.05)
    args = trl.RewardConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=bf16,
        report_to=[],
        disable_tqdm=True,
        max_steps=2,
        save_strategy="no",
        max_length=128,
        learning_rate=1e-3,
    )
    run = trl.RewardTrainer(
        model=tiny_decoder[0],
        args=args,
        train_dataset=Dataset.from_list(train),
        processing_class=decoder_tokenizer,
        callbacks=[callback],
    )
    run.train()
    assert callback.guard is not None
    assert run.model.training
    run.save_model()
    model = LlamaForSequenceClassification.from_pretrained(tmp_path).eval()
    # The saved model is the one of the guard: its weights and canaries are compared.
    loaded = OODGuard.from_pretrained(tmp_path / "guard", model, decoder_tokenizer)
    asked, said = rollouts(5, 90, "")
    loaded_rewards = loaded.check(asked, said).rewards
    with pytest.raises(MismatchError, match="training mode"):
        callback.guard.check(asked, said)
    run.model.eval()
    np.testing.assert_allclose(loaded_rewards, callback.guard.check(asked, said).rewards, rtol=0, atol=1e-4)


def test_a_guard_that_cannot_be_fitted_does_not_cost_the_model(tiny_decoder: Any, tmp_path: Path) -> None:
    callback = guard_at_end(chat(preference_rows(260)), axes=("response",), channels="final")
    args = _Arguments(str(tmp_path))
    state = TrainerState(is_world_process_zero=True)
    with pytest.warns(CalibrationWarning, match="no guard was saved: .* calibration prompts"):
        callback.on_train_end(args, state, None, model=tiny_decoder[0], processing_class=tiny_decoder[1])
    assert callback.guard is None
    callback.on_train_end(args, TrainerState(is_world_process_zero=False), None, model=None)
    callback.on_train_begin(args, state, None)
    with pytest.raises(InputError, match="no process has the whole model"):
        callback.on_train_begin(_Arguments(str(tmp_path), deepspeed="zero3.json"), state, None)


def test_no_error_of_the_fit_costs_the_model(tiny_decoder: Any, tmp_path: Path) -> None:
    class Exhausted(list[Any]):
        def __iter__(self) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory")

    callback = guard_at_end(Exhausted(), axes=("response",), channels="final")
    tiny_decoder[0].train()
    with pytest.warns(CalibrationWarning, match=r"no guard was saved: OutOfMemoryError: .*\. Save the model, load it"):
        callback.on_train_end(
            _Arguments(str(tmp_path)),
            TrainerState(is_world_process_zero=True),
            None,
            model=tiny_decoder[0],
            processing_class=tiny_decoder[1],
        )
    assert callback.guard is None
    assert tiny_decoder[0].training
    for wrong in ({"chanels": "final"}, {"alpha": 2.0}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            guard_at_end([], **wrong)


class _Arguments:
    """The three fields of TrainingArguments that are read; the real ones want a DeepSpeed that is installed."""

    def __init__(self, output_dir: str, deepspeed: str | None = None) -> None:
        self.output_dir, self.deepspeed, self.fsdp = output_dir, deepspeed, None


def test_a_grouped_guard_reads_its_column(shared_decoder: Any, decoder_tokenizer: Any) -> None:
    def two(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{**row, "lang": "ab"[i % 2]} for i, row in enumerate(chat(rows))]

    grouped = fitted(copy.deepcopy(shared_decoder), decoder_tokenizer, two, channels="final", groups="lang", alpha=0.2)
    reward = OODReward(grouped)
    asked, said = rollouts(4, 0, "")
    assert None not in reward(asked, said, lang=["a", "b", "a", "b"], other=[1, 2, 3, 4])
    with pytest.raises(InputError, match="calibrated by 'lang': the training data need that column"):
        reward(asked, said)


def test_options_are_checked_when_it_is_made(guard: OODGuard) -> None:
    for wrong in (
        {"mode": "stop"},
        {"session": "step"},
        {"missing": "zero"},
        {"baseline": 0},
        {"baseline": True},
        {"axis": "prompt"},
    ):
        with pytest.raises(InputError):
            OODReward(guard, **wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="expected one of"):
        alarm_callback(OODReward(guard), "halt")
    with pytest.raises(NotFittedError):
        OODReward(OODGuard(guard.model, guard.tokenizer))
    with pytest.raises(InputError, match="2 prompts and 1 completions"):
        OODReward(guard)([user("a"), user("b")], [assistant("c")])
