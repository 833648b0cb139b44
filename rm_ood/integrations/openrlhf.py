"""A reward function file for OpenRLHF: `--reward.remote_url` takes this file's path.

```bash
export RM_OOD_REWARD_URL=http://127.0.0.1:8000 RM_OOD_REWARD_TOKENIZER=my-policy   # or RM_OOD_REWARD_GUARD, _MODEL
... --reward.remote_url "$(python -c 'import rm_ood.integrations.openrlhf as m; print(m.__file__)')"
```

All settings: `rm_ood.integrations.rollout_reward.RewardSettings`. Nothing here imports OpenRLHF. Written for OpenRLHF 0.11.2,
whose `SingleTurnAgentExecutor` (`openrlhf/utils/agent.py`) executes the file, calls `reward_func(queries, prompts, labels)`
from threads with lists of length 1, and goes on without a reward where it raises, so that the error is logged here.

Tested against that code as recorded from the wheel, whose package wants DeepSpeed, flash-attention and vLLM for CUDA; the
wheel's own executor was run once by hand on a CPU, with a stand-in for the engine.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import torch

from rm_ood.errors import OODGuardError
from rm_ood.integrations.rollout_reward import EXTRA, RewardSettings, guarded_reward

_log = logging.getLogger("rm_ood.openrlhf")


def reward_func(queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any], **kwargs: Any) -> dict[str, Any]:
    """Rewards of n rollouts.

    Args:
        queries: rendered texts, prompt and response, with special tokens. prompts: what each begins with.
        labels, kwargs: not read.
    Returns:
        `rewards` and `scores`, (n,) float32, both what is trained on; `extra_logs`, (n,) float32 each, always the same.
    Raises:
        OODGuardError: no reward can be given; after it was logged.
    """
    try:
        reward = guarded_reward(RewardSettings.read(os.environ))
        rows = reward(reward.rendered(queries, prompts))
    except OODGuardError as error:
        # OpenRLHF logs it as information only.
        _log.error("no reward: %s", error)
        raise
    columns = {name: torch.tensor([row[name] for row in rows], dtype=torch.float32) for name in ("score", *EXTRA)}
    rewards = columns.pop("score")
    return {"rewards": rewards, "scores": rewards.clone(), "extra_logs": columns}
