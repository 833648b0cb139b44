"""Vectors from a vLLM without the plugin, which serves the reward model's backbone; rewards by the reward head, here."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from rm_ood.channels import FINAL
from rm_ood.errors import InputError, MismatchError
from rm_ood.guard import OODGuard
from rm_ood.integrations.engines import EngineReply, EngineScorer, indexed_rows
from rm_ood.integrations.read_out import RewardHead, read_head
from rm_ood.state import FittedState


class VLLMVectorScorer(EngineScorer):
    """Final vectors from vLLM's `/pooling` of an embedding model, rewards from the head of the checkpoint.

    The backbone has to be served with the last token's vector as it is (pooler config `{"seq_pooling_type": "LAST",
    "use_activation": false}`; README.md beside this file). Takes the arguments of `EngineScorer`, and:

    Args:
        head: as of `SGLangScorer`, but needed: vLLM then knows no reward.

    Raises:
        InputError, MismatchError: as `EngineScorer`, no head or one that cannot be read, or another one than was fitted on.
    """

    def __init__(self, url: str, guard: OODGuard, tokenizer: Any, *, head: Any = None, **options: Any) -> None:
        if head is None:
            raise InputError(
                "vLLM gives vectors and no reward here, so the reward head is needed: name the checkpoint's folder, with its "
                "safetensors"
            )
        self._head = head if isinstance(head, RewardHead) else read_head(head, guard.state)
        super().__init__(url, guard, tokenizer, **options)

    def _ask(self, ids: list[list[int]], state: FittedState) -> EngineReply:
        width = state.detectors[FINAL].n_features_in_
        body = {"input": ids, "task": "embed", "use_activation": False, "encoding_format": "float"}
        hidden = indexed_rows(self._post("/pooling", body, ids, width), len(ids), "/pooling", "data")
        if hidden.shape[1] != width:
            raise MismatchError(
                f"/pooling: vectors of {hidden.shape[1]} features, the guard was fitted on {width}: another model is served here"
            )
        with np.errstate(over="ignore"):
            final = torch.from_numpy(hidden.astype(np.float32))
        rewards = (final.double() @ self._head.weight + self._head.bias).numpy()
        return EngineReply(state.score({FINAL: final}, rewards), rewards, np.zeros(len(ids), dtype=bool), final)
