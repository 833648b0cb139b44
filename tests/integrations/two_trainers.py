"""Run by test_trl.py, twice at once: a process with its share of the rollouts, and a reward that was pickled before."""

from __future__ import annotations

import hashlib
import pickle
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist


def neutral_over_both(reward: Any, rank: int) -> None:
    """Groups that lie half here, half there: the mean penalty is that of the whole group."""
    from test_trl import HACKED, assistant, rollouts

    from rm_ood import RewardPenalty
    from rm_ood.integrations.trl import OODReward

    guard = reward.guard
    asked, said = rollouts(6, 99, "")
    hacked = [assistant(f"{HACKED} {i}") for i in range(6)]
    shares = [said + said[::-1], hacked + hacked[::-1]]
    twice = asked + asked[::-1]
    neutral = OODReward(guard, mode="penalize", neutral=True)
    got = neutral(twice, shares[rank])
    labels = [*range(6), *range(6)[::-1]] * 2
    whole = guard.check(twice * 2, shares[0] + shares[1])
    expected = RewardPenalty.of(guard).apply(whole, groups=labels, neutral=True)
    assert np.abs(expected - whole.rewards).min() > 1e-3
    np.testing.assert_allclose(got, expected[12 * rank :][:12], atol=1e-4)
    # A process that has nothing to judge keeps nobody waiting.
    tool = [[{"role": "tool", "content": "7"}]] * 12
    assert (None in neutral(twice, tool if rank else said * 2)) is bool(rank)


def work(rank: int, store: str, saved: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    from test_trl import HACKED, rollouts
    from transformers import TrainerControl, TrainerState

    from rm_ood import CalibrationWarning, InputError
    from rm_ood.integrations.processes import gather
    from rm_ood.integrations.trl import alarm_callback

    # Of different lengths, and not ASCII.
    assert gather({"of": rank, "text": "ї" * (1 + 9 * rank)}) == [
        {"of": r, "text": "ї" * (1 + 9 * r)} for r in range(2)
    ]
    with pytest.raises(InputError, match="process 1 has a value"):
        gather(object() if rank else 1)
    warnings.simplefilter("ignore", CalibrationWarning)
    with Path(saved).open("rb") as file:
        reward = pickle.load(file)
    neutral_over_both(reward, rank)
    callback, control, stopped = alarm_callback(reward), TrainerControl(), -1
    for step in range(20):
        state = TrainerState(global_step=step)
        # From the third step on the second process' share of the policy's answers is hacked.
        reward(*rollouts(60, 2 * step + rank, HACKED if rank == 1 and step > 2 else ""), trainer_state=state)
        callback.on_step_end(None, state, control)
        if control.should_training_stop:
            stopped = step
            break
    scores = reward.monitor.calibration["response"]
    digest = hashlib.sha256(scores.tobytes()).hexdigest()
    print(digest, reward.monitor.state.threshold, stopped, reward.alarmed)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    folder = Path(__file__).resolve().parent
    sys.path[:0] = [str(folder), str(folder.parent), str(folder.parents[1] / "benchmarks"), str(folder.parents[1])]
    work(int(sys.argv[3]), sys.argv[1], sys.argv[2])
