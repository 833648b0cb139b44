"""Reward functions for verl: `reward.custom_reward_function.path=pkg://rm_ood.integrations.verl`.

```bash
... reward.custom_reward_function.path=pkg://rm_ood.integrations.verl \\
    +reward.custom_reward_function.reward_kwargs.url=http://127.0.0.1:8000
```

Settings are `rm_ood.integrations.rollout_reward.RewardSettings`, as `reward_kwargs` or as environment variables of the workers.
verl starts `reward.num_workers` processes (8 by default): a `url` lets them share one guard, otherwise each loads its own.

Nothing here imports verl. Written for verl 0.9.1. `compute_score` is for every reward manager; `compute_score_async`
(`reward.custom_reward_function.name`) for those that await: `naive`, `dapo`, `gdpo` and `rate_limited`, not `remote`.

Tested against that code as recorded from the wheel, which pins another transformers; the wheel's own reward managers but
`remote` were run once by hand on a CPU, both functions, with its own configuration.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from rm_ood.errors import InputError
from rm_ood.integrations.rollout_reward import RewardSettings, guarded_reward

# What verl adds where a reward model of its own is enabled.
_OF_VERL = ("reward_router_address", "reward_model_tokenizer")
# Calls wait here to be scored together; they take no time of a core.
_threads = ThreadPoolExecutor(128, thread_name_prefix="rm_ood_verl")


def compute_score(
    data_source: Any,
    solution_str: str,
    ground_truth: Any,
    extra_info: Mapping[str, Any] | None = None,
    *,
    prompt_key: str = "prompt",
    **settings: Any,
) -> dict[str, float]:
    """The guarded reward of one response.

    Args:
        data_source, ground_truth: not read.
        solution_str: the response, without special tokens.
        extra_info: of the data; its entry `prompt_key` is the prompt, a string or messages. verl does not pass the prompt
            otherwise, so the data have to hold it there.
        settings: see `RewardSettings`; before environment variables.
    Returns:
        `score`, and the verdict under the same names every time (`rollout_reward.EXTRA`), all of them floats.
    Raises:
        InputError: no prompt in `extra_info`, an unknown setting, a text that cannot be used.
        UnavailableError, EngineError, MismatchError: of a served guard; verl ends the run.
    """
    given = {name: value for name, value in settings.items() if name not in _OF_VERL}
    prompt = _prompt(extra_info, prompt_key)
    [row] = guarded_reward(RewardSettings.read(os.environ, **given))([(prompt, solution_str)])
    return row


async def compute_score_async(*args: Any, **kwargs: Any) -> dict[str, float]:
    """`compute_score`, awaited: as many samples wait together as verl asks for, and are scored together."""
    return await asyncio.get_running_loop().run_in_executor(_threads, partial(compute_score, *args, **kwargs))


def _prompt(extra_info: Mapping[str, Any] | None, key: str) -> Any:
    names = sorted(map(str, extra_info or {}))
    value: Any = (extra_info or {}).get(key)
    # Columns of Parquet files come as arrays.
    value = value.tolist() if isinstance(value, np.ndarray) else value
    if not isinstance(value, (str, list, tuple)):
        raise InputError(
            f"extra_info[{key!r}]: expected the prompt, a string or messages, got {type(value).__name__}; there is {names}. Put "
            "it there as the data are made, or name its entry: reward_kwargs.prompt_key"
        )
    return value if isinstance(value, str) else [dict(message) for message in value]
