"""A real policy and a real reward model in TRL's GRPOTrainer: SmolLM2-135M twice."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import preference_rows
from datasets import Dataset
from transformers import LlamaForCausalLM

from rm_ood import CalibrationWarning, OODGuard
from rm_ood.integrations.trl import OODReward

# TRL 1.16 sets an option that transformers 5.23 renamed.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.smollm2,
    pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning"),
]


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def written(policy: Any, tokenizer: Any, asked: list[Any]) -> list[dict[str, Any]]:
    """An answer of the policy to each prompt, sampled as the trainer does."""
    torch.manual_seed(0)
    texts = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    told = policy.eval().generate(**ids, do_sample=True, max_new_tokens=12, pad_token_id=tokenizer.pad_token_id)
    said = tokenizer.batch_decode(told[:, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    return [{"prompt": prompt, "response": answer} for prompt, answer in zip(asked, said, strict=True)]


def test_grpo_on_smollm2(smollm2: tuple[Any, Any], tmp_path: Path) -> None:
    import trl

    model, tokenizer = smollm2
    model.config._name_or_path = "smollm2"
    fit = [{**row, "prompt": user(row["prompt"])} for row in preference_rows(6)]
    fit = [{**row, **{c: [{"role": "assistant", "content": row[c]}] for c in ("chosen", "rejected")}} for row in fit]
    trusted = [{"prompt": user(row["prompt"]), "response": row["chosen"]} for row in preference_rows(72, seed=1)]
    guard = OODGuard(model, tokenizer, axes=("response",), channels="final", alpha=0.5, confidence=None)
    with warnings.catch_warnings():
        # Few data: the promise is not what is tested here.
        warnings.simplefilter("ignore", CalibrationWarning)
        guard.fit(fit, calibration=trusted, progress=False)
    policy = LlamaForCausalLM(copy.deepcopy(model.config))
    policy.model.load_state_dict(model.model.state_dict())
    policy.lm_head.weight = policy.model.embed_tokens.weight
    own = written(policy, tokenizer, [row["prompt"] for row in trusted])

    def step(rewards: list[Any], processing: list[Any]) -> Any:
        run = trl.GRPOTrainer(
            policy,
            reward_funcs=rewards,
            args=trl.GRPOConfig(
                output_dir=str(tmp_path),
                use_cpu=True,
                bf16=False,
                report_to=[],
                disable_tqdm=True,
                max_steps=1,
                per_device_train_batch_size=8,
                num_generations=8,
                max_completion_length=12,
                logging_steps=1,
                save_strategy="no",
            ),
            train_dataset=Dataset.from_list([{"prompt": user(row["prompt"])} for row in preference_rows(4, seed=2)]),
            processing_class=tokenizer,
            reward_processing_classes=processing,
        )
        run.train()
        entry = run.state.log_history[0]
        assert {"ood/flag_frac", "ood/abstain_frac", "ood/log10_evidence", "ood/alarm"} <= set(entry)
        return run, entry

    run, entry = step([model, OODReward(guard)], [tokenizer, None])
    told = run._logs["rewards"]
    np.testing.assert_allclose(told["smollm2"], told["ood_reward"], rtol=0, atol=1e-3)
    assert entry["ood/abstain_frac"] == 0
    assert any(run._logs["advantages"])
    # What it writes is far from the made-up text that the guard was calibrated on, so it is calibrated on its own.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        reward = OODReward(guard, mode="abstain", baseline=own)
    run, entry = step([reward], [None])
    none = np.isnan(run._logs["rewards"]["ood_reward"])
    assert entry["ood/abstain_frac"] == none.mean()
    # Some: were all of them None, nothing would be learnt, and the advantages would say nothing.
    assert 0 < none.mean() < 1
    assert not np.array(run._logs["advantages"])[none].any()
