"""Which reward model is this guard for? Tier 0: configuration, head, tokenizer, template, in milliseconds; tier 1: samples
of every weight, on one copy to the CPU. (Tier 2, what the model says of known texts, is in `rm_ood.identity`.)
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rm_ood.errors import MismatchError
from rm_ood.reward_model import find_head, pad_id, text_config
from rm_ood.wrappers import adapters, class_name, full_tensor, in_memory, plain_path, unwrap

# What changes a vector; padding side is recorded and never compared. The pad id is compared here and recorded below in
# plain sight: whoever has no model needs it to know where an item ends.
_CONFIG_FIELDS = (
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "intermediate_size", "vocab_size", "max_position_embeddings", "rope_parameters", "rope_theta", "rope_scaling",
    "num_labels", "head_dim", "sliding_window", "layer_types", "attention_bias", "mlp_bias",
    "pad_token_id", "classifier_pooling", "hidden_act", "layer_norm_eps", "rms_norm_eps", "tie_word_embeddings",
)  # fmt: skip
# Kept for the reader of the card. A commit is compared where both sides have one: a local folder has none.
_RECORDED_ONLY = frozenset({"padding_side", "pad_token_id"})
# Without these a guard was never near a model, or its fingerprint was cut.
REQUIRED = frozenset({"architecture", "config", "dtype", "head_weights", "head_path", "read_out", "tokenizer", "text"})
# Fields that hold several settings, as JSON, so that a mismatch can name the one that differs.
_IN_CLEAR = frozenset({"config", "text"})
# Elements of a parameter that tier 1 keeps.
SAMPLES = 64
# Characters of a tokenizer that are hashed at once.
_PIECE = 2**18


def fingerprint(
    model: nn.Module,
    tokenizer: Any,
    *,
    head: str | None,
    read_out: str,
    text: Mapping[str, Any],
    hooks: Mapping[str, str] | None = None,
    switches_mode: bool = False,
) -> dict[str, str]:
    """Field -> value (short ones) or SHA-256 (long ones) of everything tier 0 compares.

    Args:
        text: the settings of the input contract (format, maximum length, ...), JSON-able.
        hooks: channel -> dotted path of the module that it is read at.
        switches_mode: the guard puts the model in eval mode itself, so its mode says nothing.
    """
    inner, config = unwrap(model), text_config(model)
    path, module = find_head(model, head)
    training = any(part.training for part in inner.modules()) and not switches_mode
    with in_memory(module):
        weights = _weights_digest(module)
        sketch = _weights_sketch(module)
    return {
        "architecture": class_name(model),
        "config": _clear({name: getattr(config, name, None) for name in _CONFIG_FIELDS}),
        "dtype": "+".join(dtypes_of(model)),
        "parameters": str(sum(p.numel() for p in inner.parameters())),
        "adapters": adapters(model),
        "training_mode": "train" if training else "eval",
        "head_path": plain_path(path),
        "head_weights": weights,
        "head_sketch": sketch,
        "read_out": read_out,
        **text_fingerprint(tokenizer, text),
        "pad_token_id": str(pad_id(model)),
        "suffix": " ".join(str(i) for i in text.get("suffix", ())),
        "padding_side": str(tokenizer.padding_side),
        "commit": str(getattr(inner.config, "_commit_hash", None)),
        **{f"hook of {channel}": path for channel, path in (hooks or {}).items()},
    }


def text_fingerprint(tokenizer: Any, text: Mapping[str, Any]) -> dict[str, str]:
    """The fields of `fingerprint` that need no model: tokenizer, template and input contract."""
    return {
        "tokenizer": _tokenizer_digest(tokenizer),
        "special_tokens": _digest(tokenizer.special_tokens_map),
        "chat_template": _digest(tokenizer.chat_template),
        "text": _clear(dict(text)),
    }


def same_head(saved: Mapping[str, str], head: nn.Module) -> bool:
    """Whether `head` is the one that was fitted on, up to rounding to another dtype; True where that is not known."""
    sketch = saved.get("head_sketch", "offloaded")
    return sketch == "offloaded" or _same_sketch(sketch, _weights_sketch(head))


def dtypes_of(model: nn.Module) -> list[str]:
    """Names of the dtypes of a model's parameters, sorted: several where it is quantised or mixed."""
    return sorted({str(p.dtype).removeprefix("torch.") for p in unwrap(model).parameters()})


def require_fingerprint(saved: Mapping[str, str]) -> None:
    """Refuse a fingerprint that could match any model.

    Raises:
        MismatchError: fields are missing; names them.
    """
    missing = sorted(REQUIRED - saved.keys())
    if missing:
        raise MismatchError(
            f"this guard does not say which reward model it was fitted on (fingerprint tier 0: no {missing}): use it on vectors "
            "(check_embeddings), or fit a new guard with the model"
        )


def check_fingerprint(saved: Mapping[str, str], found: Mapping[str, str], *, allow: Collection[str] = ()) -> list[str]:
    """Fields that differ and were allowed to; every other difference raises.

    Args:
        allow: fields that may differ; `"dtype"` covers the head's bytes, not another head.
    Raises:
        MismatchError: naming tier and fields.
    """
    differing = [name for name in saved if name not in _RECORDED_ONLY and not _agree(name, saved, found)]
    allowed = set(allow)
    if "dtype" in allowed and "dtype" in differing:
        # The head's bytes follow from the dtype; that it is the same head, the sketch tells.
        allowed.add("head_weights")
    wrong = [name for name in differing if name not in allowed]
    if wrong:
        shown = "; ".join(_told(name, saved[name], found.get(name, "-")) for name in wrong)
        raise MismatchError(
            f"this guard was fitted on another reward model (fingerprint tier 0): {shown}. "
            f"Load the model and tokenizer that it was fitted on, or fit a new guard.{_hint(wrong)}"
        )
    return differing


def _agree(name: str, saved: Mapping[str, str], found: Mapping[str, str]) -> bool:
    if name == "head_sketch":
        return _same_sketch(saved[name], found.get(name, ""))
    if name.startswith("hook of ") and name not in found:
        # A guard may be loaded with fewer channels.
        return True
    if name == "commit" and "None" in (saved[name], found.get(name)):
        return True
    return saved[name] == found.get(name)


def _told(name: str, saved: str, found: str) -> str:
    """A field with both values; of several settings in one field, those that differ."""
    if name in _IN_CLEAR and found != "-":
        one, other = json.loads(saved), json.loads(found)
        parts = [key for key in {**one, **other} if one.get(key) != other.get(key)]
        shown = ", ".join(f"{key} {one.get(key)!r}, not {other.get(key)!r}" for key in parts)
        return f"{name}: guard has {shown}"
    return f"{name}: guard has {_short(saved)}, model has {_short(found)}"


def _hint(wrong: list[str]) -> str:
    if wrong in (["dtype"], ["dtype", "head_weights"]):
        return " Another dtype moves the vectors: recalibrate, or pass allow_dtype_change=True."
    if wrong == ["training_mode"]:
        return " Dropout changes the vectors: call model.eval() first, or fit with eval_mode='switch'."
    return ""


@dataclass(frozen=True)
class WeightSamples:
    """Tier 1: `SAMPLES` evenly spaced elements of every parameter.

    Attributes:
        names: SHA-256 of the parameters' names and shapes, without what wrappers add.
        values: (parameters, SAMPLES) float32; short parameters repeat their elements.
    """

    names: str
    values: Tensor

    @classmethod
    def of(cls, model: nn.Module) -> WeightSamples:
        """Sample a model; offloaded and sharded parameters are brought together one at a time."""
        names, samples = [], []
        with torch.no_grad():
            for name, parameter in _parameters(unwrap(model)):
                whole = full_tensor(parameter.detach())
                names.append(f"{name} {tuple(whole.shape)}")
                flat = whole.reshape(-1)
                at = torch.linspace(
                    0, max(flat.numel() - 1, 0), SAMPLES, dtype=torch.float64, device=flat.device
                ).long()
                samples.append(flat[at].float())
            device = samples[0].device
            values = torch.stack([sample.to(device) for sample in samples]).cpu()
        return cls(_digest(names), values)


def check_weights(
    saved: WeightSamples, found: WeightSamples, dtypes: tuple[str, str], *, allow: Collection[str] = ()
) -> list[str]:
    """`["weights"]` if the weights differ and were allowed to, else nothing.

    Args:
        dtypes: of the fitted model and of this one: where another dtype was allowed, values may differ by the rounding of
            the coarsest of all.
    Raises:
        MismatchError: naming tier and field, and how many parameters differ.
    """
    if saved.names != found.names or saved.values.shape != found.values.shape:
        told = (
            f"{len(saved.values)} parameters in the guard's model, {len(found.values)} in this one, under other names"
        )
    else:
        a, b = saved.values, found.values
        # Bits, not numbers: NaN weights are equal to themselves.
        same = (a == b) | (a.isnan() & b.isnan())
        if dtypes[0] != dtypes[1]:
            # Both may be roundings of one checkpoint.
            same |= (a - b).abs() <= _coarsest(*dtypes) * torch.maximum(a.abs(), b.abs())
        differing = int((~same).any(1).sum())
        if not differing:
            return []
        told = f"{differing} of {len(a)} parameters differ"
    if "weights" in allow:
        return ["weights"]
    raise MismatchError(
        f"this guard was fitted on another reward model (fingerprint tier 1): weights: {told}. Fine-tuned, merged and quantised "
        "models need a guard of their own. Load the weights that it was fitted on, fit a new guard, or pass allow=('weights', "
        "'canaries') and ask guard.recalibrate(sample)."
    )


def _coarsest(*dtypes: str) -> float:
    """Largest spacing (eps) of the floating dtypes named, `float32+bfloat16` naming two."""
    found = [getattr(torch, name, None) for names in dtypes for name in names.split("+")]
    return max((torch.finfo(d).eps for d in found if isinstance(d, torch.dtype) and d.is_floating_point), default=0.0)


def _parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and saved buffers under their plain names, each loaded while it is looked at; tied ones under each name."""
    for prefix, module in model.named_modules():
        buffers = [n for n, b in module.named_buffers(recurse=False) if n not in module._non_persistent_buffers_set]
        own = [name for name, _ in module.named_parameters(recurse=False)] + buffers
        if not own:
            continue
        with in_memory(module, recurse=False):
            for name in own:
                yield plain_path(f"{prefix}.{name}" if prefix else name), getattr(module, name)


def _tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 of the serialised tokenizer without the truncation and padding that its last call left switched on.

    In pieces: a large vocabulary has tens of MiB, and each further copy of it would be on top of what a fit holds.
    """
    text: str = tokenizer.backend_tokenizer.to_str()
    kept = [(0, len(text))]
    for name in ("truncation", "padding"):
        # Cut as text: parsing the whole vocabulary would take a hundred times as long as hashing it.
        setting = re.compile(rf'"{name}":\s*')
        found = next((match for part in kept if (match := setting.search(text, *part))), None)
        if found:
            _, end = json.JSONDecoder().raw_decode(text, found.end())
            kept = [
                piece
                for start, stop in kept
                for piece in (
                    ((start, found.start()), (end, stop)) if start <= found.start() < stop else ((start, stop),)
                )
            ]
    sha = hashlib.sha256()
    for start, stop in kept:
        for at in range(start, stop, _PIECE):
            sha.update(text[at : min(at + _PIECE, stop)].encode())
    return sha.hexdigest()


def _short(value: str) -> str:
    return value if len(value) < 40 else f"{value[:12]}..."


def _clear(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _digest(value: Any) -> str:
    return hashlib.sha256(_clear(value).encode()).hexdigest()


def _weights_digest(module: nn.Module) -> str:
    """SHA-256 over the head's weights; `offloaded` where they are not in memory."""
    sha = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        if parameter.is_meta:
            return "offloaded"
        raw = full_tensor(parameter.detach()).cpu().contiguous().reshape(-1).view(torch.uint8)
        name = plain_path(name)
        sha.update(name.encode() + str(tuple(parameter.shape)).encode() + raw.numpy().tobytes())
    return sha.hexdigest()


def _weights_sketch(module: nn.Module) -> str:
    """Eight seeded random projections of the head's weights: tells another head from the same one rounded to a dtype."""
    parameters = [full_tensor(p.detach()) for _, p in sorted(module.named_parameters())]
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
