"""What a guard beside an engine needs of its reward model's files: tokenizer, limit and head; no weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rm_ood.errors import InputError
from rm_ood.reward_model import source_options
from rm_ood.text import NO_LIMIT

_CHECKPOINTS = ("model.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True)
class ModelFiles:
    """Of one reward model.

    Attributes:
        tokenizer: its fast tokenizer.
        max_length: the smaller of the tokenizer's and the model's own limit in tokens; None where neither is known.
        head: folder of the checkpoint whose head can be read; None: there is no checkpoint here.
    """

    tokenizer: Any
    max_length: int | None
    head: Path | None


def model_files(model_id: str, *, trust_remote_code: bool = False) -> ModelFiles:
    """The files of a reward model in a folder or on the Hub, of which the weights are never fetched.

    Args:
        model_id: a folder with the tokenizer, and better with config.json and the checkpoint; or a Hub id.
        trust_remote_code: run code that the repository ships; only ever the caller's choice.
    Raises:
        FileNotFoundError: no such folder. InputError: no tokenizer there.
    """
    from transformers import AutoConfig, AutoTokenizer

    options = source_options(model_id, trust_remote_code)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_id, **options)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{model_id}: no tokenizer can be loaded from there ({type(error).__name__}). Name the folder or Hub id of the "
            "reward model that the engine serves."
        ) from error
    try:
        config = AutoConfig.from_pretrained(model_id, **options).get_text_config()
        positions = getattr(config, "max_position_embeddings", None)
    except (OSError, ValueError):
        # A folder of the tokenizer alone.
        positions = None
    known = [
        int(n) for n in (tokenizer.model_max_length, positions) if isinstance(n, (int, float)) and 0 < n < NO_LIMIT
    ]
    folder = Path(model_id)
    has_checkpoint = any((folder / name).is_file() for name in _CHECKPOINTS)
    return ModelFiles(tokenizer, min(known, default=None), folder if has_checkpoint else None)
