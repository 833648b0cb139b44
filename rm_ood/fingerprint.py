"""Which reward model is this guard for? Tier 0: configuration, head, tokenizer and template, in milliseconds."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from rm_ood.errors import MismatchError
from rm_ood.reward_model import find_head, text_config

# What changes a vector; padding side is recorded and never compared. The pad id is compared here and recorded below in
# plain sight: whoever has no model needs it to know where an item ends.
_CONFIG_FIELDS = (
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "intermediate_size", "vocab_size", "max_position_embeddings", "rope_parameters", "rope_theta", "rope_scaling",
    "num_labels", "head_dim", "sliding_window", "layer_types", "attention_bias", "mlp_bias",
    "pad_token_id", "classifier_pooling", "hidden_act", "layer_norm_eps", "rms_norm_eps", "tie_word_embeddings",
)  # fmt: skip
_RECORDED_ONLY = frozenset({"padding_side", "commit", "pad_token_id"})


def fingerprint(
    model: nn.Module, tokenizer: Any, *, head: str | None, read_out: str, text: Mapping[str, Any]
) -> dict[str, str]:
    """Field -> value (short ones) or SHA-256 (long ones) of everything tier 0 compares.

    Args:
        text: the settings of the input contract (format, maximum length, ...), JSON-able.
    """
    config = text_config(model)
    path, module = find_head(model, head)
    return {
        "architecture": type(model).__name__,
        "config": _digest({name: getattr(config, name, None) for name in _CONFIG_FIELDS}),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "parameters": str(sum(p.numel() for p in model.parameters())),
        "head_path": path,
        "head_weights": _weights_digest(module),
        "head_sketch": _weights_sketch(module),
        "read_out": read_out,
        **text_fingerprint(tokenizer, text),
        "pad_token_id": str(config.pad_token_id),
        "padding_side": str(tokenizer.padding_side),
        "commit": str(getattr(model.config, "_commit_hash", None)),
    }


def text_fingerprint(tokenizer: Any, text: Mapping[str, Any]) -> dict[str, str]:
    """The fields of `fingerprint` that need no model: tokenizer, template and input contract."""
    return {
        "tokenizer": _bytes_digest(_tokenizer_state(tokenizer)),
        "special_tokens": _digest(tokenizer.special_tokens_map),
        "chat_template": _digest(tokenizer.chat_template),
        "text": _digest(dict(text)),
    }


def same_head(saved: Mapping[str, str], head: nn.Module) -> bool:
    """Whether `head` is the one that was fitted on, up to rounding to another dtype; True where that is not known."""
    sketch = saved.get("head_sketch", "offloaded")
    return sketch == "offloaded" or _same_sketch(sketch, _weights_sketch(head))


def check_fingerprint(saved: Mapping[str, str], found: Mapping[str, str], *, allow_dtype_change: bool) -> list[str]:
    """Fields that differ and were allowed to; every other difference raises.

    Raises:
        MismatchError: naming tier and fields.
    """
    differing = [
        name
        for name in saved
        if name not in _RECORDED_ONLY
        and (
            not _same_sketch(saved[name], found.get(name, ""))
            if name == "head_sketch"
            else saved[name] != found.get(name)
        )
    ]
    allowed = {"dtype"} if allow_dtype_change else set()
    if allow_dtype_change and "dtype" in differing:
        # The head's bytes follow from the dtype; that it is the same head, the sketch tells.
        allowed.add("head_weights")
    wrong = [name for name in differing if name not in allowed]
    if wrong:
        shown = "; ".join(
            f"{name}: guard has {_short(saved[name])}, model has {_short(found.get(name, '-'))}" for name in wrong
        )
        hint = (
            " Another dtype moves the vectors: recalibrate, or pass allow_dtype_change=True."
            if wrong in (["dtype"], _DTYPE)
            else ""
        )
        raise MismatchError(
            f"this guard was fitted on another reward model (fingerprint tier 0): {shown}. "
            f"Load the model and tokenizer that it was fitted on, or fit a new guard.{hint}"
        )
    return differing


_DTYPE = ["dtype", "head_weights"]


def _tokenizer_state(tokenizer: Any) -> bytes:
    """The serialised tokenizer without the truncation and padding that its last call left switched on."""
    text: str = tokenizer.backend_tokenizer.to_str()
    for name in ("truncation", "padding"):
        # Cut as text: parsing the whole vocabulary would take a hundred times as long as hashing it.
        found = re.search(rf'"{name}":\s*', text)
        if found:
            _, end = json.JSONDecoder().raw_decode(text, found.end())
            text = text[: found.start()] + text[end:]
    return text.encode()


def _short(value: str) -> str:
    return value if len(value) < 40 else f"{value[:12]}..."


def _digest(value: Any) -> str:
    return _bytes_digest(json.dumps(value, sort_keys=True, default=str).encode())


def _bytes_digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _weights_digest(module: nn.Module) -> str:
    """SHA-256 over the head's weights; `offloaded` where they are not in memory."""
    sha = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        if parameter.is_meta:
            return "offloaded"
        raw = parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        sha.update(name.encode() + str(tuple(parameter.shape)).encode() + raw.numpy().tobytes())
    return sha.hexdigest()


def _weights_sketch(module: nn.Module) -> str:
    """Eight seeded random projections of the head's weights: tells another head from the same one rounded to a dtype."""
    parameters = [p.detach() for _, p in sorted(module.named_parameters())]
    if any(p.is_meta for p in parameters):
        return "offloaded"
    weights = torch.cat([p.reshape(-1).double().cpu() for p in parameters])
    directions = torch.randn(8, len(weights), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return " ".join(f"{value:.9g}" for value in (directions @ weights).tolist())


def _same_sketch(one: str, other: str) -> bool:
    if "offloaded" in (one, other):
        return one == other
    a, b = ([float(value) for value in sketch.split()] for sketch in (one, other))
    # bfloat16 keeps 8 bits of each weight; another head differs by as much as it is large.
    return len(a) == len(b) and math.dist(a, b) <= 0.02 * math.hypot(*a)
