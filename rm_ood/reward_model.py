"""The reward model: loading it, finding its head and blocks, reading its reward and its read-out position."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rm_ood.errors import InputError, MismatchError

_SWITCHING = threading.RLock()
READ_OUTS = ("auto", "non_pad", "last_token", "first")


def load_reward_model(
    model_id: str, *, trust_remote_code: bool = False, dtype: str = "auto", device: str | None = None
) -> tuple[Any, Any]:
    """A reward model and its tokenizer from a folder or the Hub, in eval mode.

    Args:
        model_id: folder or Hub id of a sequence-classification model with its tokenizer.
        trust_remote_code: run code that the repository ships; only ever the caller's choice.
        dtype: `"auto"` (the checkpoint's) or a torch dtype name.
        device: where to put the model; None takes a GPU where there is one.
    Returns:
        (model, tokenizer).
    Raises:
        FileNotFoundError: `model_id` looks like a path and does not exist.
        InputError: the checkpoint has no reward head.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise InputError(f"dtype={dtype!r}: expected 'auto' or the name of a torch dtype such as 'bfloat16'")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device={device!r}: not usable here ({str(error).splitlines()[0]})") from error
    is_folder = os.path.isdir(model_id)
    if not is_folder and model_id.startswith((".", "/", "~")):
        raise FileNotFoundError(f"no reward model folder at {model_id}")
    options = {"trust_remote_code": trust_remote_code, "local_files_only": is_folder}
    tokenizer = AutoTokenizer.from_pretrained(model_id, **options)
    model, info = AutoModelForSequenceClassification.from_pretrained(
        model_id, dtype=dtype, output_loading_info=True, use_safetensors=True, **options
    )
    missing = sorted(info["missing_keys"])
    if missing:
        # transformers fills such weights at random: rewards would be noise.
        raise InputError(
            f"{model_id}: the checkpoint lacks {len(missing)} weights of {type(model).__name__} (first: {missing[:3]}). "
            "It is not a trained reward model of this class; load it yourself and pass the model to OODGuard."
        )
    return model.to(device).eval(), tokenizer


def text_config(model: Any) -> Any:
    """The configuration that holds pad token, width and depth."""
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def find_head(model: nn.Module, head: str | None = None) -> tuple[str, nn.Module]:
    """Dotted path and module of the reward head: the last Linear that maps to the reward.

    Args:
        head: dotted path, where the rule (last `nn.Linear` with `out_features == config.num_labels`) is wrong.
    Raises:
        InputError: no such module, or a model with several labels and no choice made; the message lists the Linears.
    """
    if head is not None:
        modules = dict(model.named_modules())
        if head not in modules:
            raise InputError(f"head={head!r}: no such module. Candidates: {_linears(model)}")
        return head, modules[head]
    labels = getattr(getattr(model, "config", None), "num_labels", None)
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.out_features == labels]
    if labels is None or not found:
        raise InputError(
            f"{type(model).__name__} has no Linear with num_labels={labels} outputs, so its reward head is not known. "
            f"Pass head='dotted.path'. Candidates: {_linears(model)}"
        )
    return found[-1]


def _linears(model: nn.Module) -> list[str]:
    """The last Linears of a model as `path (in -> out)`: where a head usually is."""
    linears = [
        f"{name} ({module.in_features} -> {module.out_features})"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    return linears[-6:]


def find_blocks(model: nn.Module, layers: str | None = None) -> nn.ModuleList:
    """The stack of transformer blocks, whose outputs the intermediate channels read.

    Raises:
        InputError: no list of `config.num_hidden_layers` modules; the message lists the lists there are.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    if layers is not None:
        if layers not in lists:
            raise InputError(f"layers={layers!r}: no such ModuleList. There are: {sorted(lists)}")
        return lists[layers]
    depth = getattr(text_config(model), "num_hidden_layers", None)
    for module in lists.values():
        if len(module) == depth:
            return module
    sizes = {name: len(module) for name, module in lists.items()}
    raise InputError(
        f"{type(model).__name__}: no list of num_hidden_layers={depth} blocks; lists: {sizes}. Pass layers='dotted.path', or "
        "channels='final'."
    )


def read_reward(outputs: Any, reward: str) -> Tensor:
    """The rewards of a forward pass, (B,), as the model returned them.

    Args:
        reward: `"logits"` (one label) or `"logits:i"` (label i of several).
    Raises:
        InputError: no such output, or several labels and none chosen.
    """
    name, _, index = reward.partition(":")
    if name != "logits" or (index and not index.isdecimal()):
        raise InputError(f"reward={reward!r}: expected 'logits' or 'logits:<label index>'")
    logits = getattr(outputs, "logits", None)
    if logits is None or logits.ndim != 2:
        shape = None if logits is None else tuple(logits.shape)
        raise InputError(
            f"reward={reward!r}: expected logits of shape (batch, labels) in the model's output, got {shape}"
        )
    if not index and logits.shape[1] != 1:
        raise InputError(
            f"the model returns {logits.shape[1]} logits per item; name the one that is the reward: reward='logits:0'"
        )
    column = int(index or 0)
    if column >= logits.shape[1]:
        raise InputError(f"reward={reward!r}: the model returns {logits.shape[1]} logits per item")
    rewards: Tensor = logits[:, column]
    return rewards


def reward_column(reward: str) -> int:
    """Label index that `reward` names."""
    return int(reward.partition(":")[2] or 0)


def read_out_positions(model: Any, inputs: dict[str, Any], rule: str) -> Tensor:
    """Column of the token whose vector the head's (B, T, H) input is read at, (B,) int.

    `"auto"` and `"non_pad"` are the rule of transformers' sequence classifiers: the rightmost token whose id is not the
    pad id of the current config, whatever the attention mask says (so with pad == eos it is the token before the final
    eos). `"last_token"` is the last 1 of the attention mask, `"first"` column 0.

    Raises:
        InputError: an unknown rule, or a batch without a pad token.
    """
    ids: Tensor = inputs["input_ids"]
    if rule not in READ_OUTS:
        raise InputError(f"read_out={rule!r}: expected one of {READ_OUTS}")
    if rule == "first":
        return torch.zeros(ids.shape[0], dtype=torch.long, device=ids.device)
    columns = torch.arange(ids.shape[1], device=ids.device)
    if rule == "last_token":
        mask = inputs.get("attention_mask")
        attended: Tensor = torch.ones_like(ids) if mask is None else mask
        return (columns * attended).argmax(-1)
    pad = text_config(model).pad_token_id
    if pad is None:
        check_padding(model, ids.shape[0])
        return torch.full((ids.shape[0],), ids.shape[1] - 1, dtype=torch.long, device=ids.device)
    return torch.where(ids != pad, columns, 0).argmax(-1)


def check_padding(model: Any, batch_size: int) -> None:
    """Refuse a batch that the model cannot pad, before its forward.

    Raises:
        InputError: no pad token and more than one row.
    """
    if batch_size > 1 and text_config(model).pad_token_id is None:
        raise InputError(
            f"the model's config has no pad_token_id, so a batch of {batch_size} cannot be scored. Set "
            "model.config.pad_token_id = tokenizer.pad_token_id (the pad token of its training), or use batch_size=1."
        )


@contextmanager
def eval_mode(model: nn.Module, *, switch: bool) -> Iterator[None]:
    """A pass without dropout: refuse training mode, or end it for the pass and put it back.

    Passes that may switch take turns, so that none puts the mode back while another is in its forward.

    Raises:
        MismatchError: the model is in training mode and `switch` is off.
    """
    if switch:
        with _SWITCHING:
            training = [module for module in model.modules() if module.training]
            model.eval()
            try:
                yield
            finally:
                for module in training:
                    module.training = True
        return
    if any(module.training for module in model.modules()):
        raise MismatchError(
            "the reward model is in training mode, so dropout would change its vectors. Call model.eval() first, or pass "
            "eval_mode='switch' to have the guard do it and put the mode back."
        )
    yield
