"""The reward model: loading it, finding its head and blocks, reading its reward and its read-out position."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rm_ood.errors import InputError, MismatchError
from rm_ood.readers import READ_OUTS, before_first, output_named, reader_of
from rm_ood.wrappers import called_path, is_training, unwrap

_SWITCHING = threading.RLock()


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
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer

    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise InputError(f"dtype={dtype!r}: expected 'auto' or the name of a torch dtype such as 'bfloat16'")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device={device!r}: not usable here ({str(error).splitlines()[0]})") from error
    options = source_options(model_id, trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(model_id, **options)
        tokenizer = AutoTokenizer.from_pretrained(model_id, **options)
        # Some reward models of other authors are registered under AutoModel only.
        classes = getattr(config, "auto_map", None) or {}
        is_bare = "AutoModel" in classes and "AutoModelForSequenceClassification" not in classes
        if is_bare and not trust_remote_code:
            raise InputError(f"{model_id}: {_OWN_CODE}")
        loader = AutoModel if is_bare else AutoModelForSequenceClassification
        model, info = loader.from_pretrained(
            model_id, dtype=dtype, output_loading_info=True, use_safetensors=True, **options
        )
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise InputError(f"{model_id}: {_OWN_CODE}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        # transformers fills such weights at random: rewards would be noise.
        raise InputError(
            f"{model_id}: the checkpoint lacks {len(missing)} weights of {type(model).__name__} (first: {missing[:3]}). "
            "It is not a trained reward model of this class; load it yourself and pass the model to OODGuard."
            + (f" Or {_OWN_CODE}" if classes and not trust_remote_code else "")
        )
    return model.to(device).eval(), tokenizer


def source_options(model_id: str, trust_remote_code: bool) -> dict[str, bool]:
    """Options of every `from_pretrained` of a reward model: nothing of a folder is looked for on the Hub.

    Raises:
        FileNotFoundError: the path of a folder that is not there.
    """
    is_folder = os.path.isdir(model_id)
    if not is_folder and model_id.startswith((".", "/", "~")):
        raise FileNotFoundError(f"no reward model folder at {model_id}")
    return {"trust_remote_code": trust_remote_code, "local_files_only": is_folder}


_OWN_CODE = (
    "its repository ships code of its own, which is run only on your word: read it, then pass trust_remote_code=True "
    "(--trust-remote-code)"
)


def text_config(model: Any) -> Any:
    """The configuration that holds pad token, width and depth."""
    config = unwrap(model).config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def pad_id(model: Any) -> int | None:
    """The pad id that the model's own read-out rule goes by."""
    config = unwrap(model).config
    owner = config if getattr(config, "is_encoder_decoder", False) else text_config(model)
    pad: int | None = owner.pad_token_id
    return pad


def find_head(model: nn.Module, head: str | None = None) -> tuple[str, nn.Module]:
    """Dotted path and module of the reward head: the last Linear that maps to the reward.

    The module is the one that a forward calls: inside an adapter, the adapter's own layer. The path is below the model inside
    its wrappers (compilation, adapters, parallelism).

    Args:
        head: dotted path, where the rule (the reader of the model's class; else the last Linear with
            `out_features == config.num_labels`) is wrong.
    Raises:
        InputError: no such module, or a model with several labels and no choice made; the message lists the Linears.
    """
    inner = unwrap(model)
    path = head or reader_of(model).head or _head_by_rule(inner)
    try:
        called = called_path(inner, path)
        return called, inner.get_submodule(called)
    except AttributeError as error:
        raise InputError(f"head={path!r}: no such module. Candidates: {_linears(inner)}") from error


def _head_by_rule(model: nn.Module) -> str:
    labels = getattr(getattr(model, "config", None), "num_labels", None)
    found = [name for name, module in model.named_modules() if _maps_to(module, labels)]
    # Layers inside an adapter are not called by themselves.
    found = [name for name in found if _maps_to(model.get_submodule(called_path(model, name)), labels)]
    if found:
        return str(found[-1])
    named = [name for name in _VALUE_HEADS if _has_one_output(model, name)]
    if named:
        return named[0]
    generates = hasattr(model, "lm_head")
    raise InputError(
        f"{type(model).__name__} has no Linear with num_labels={labels} outputs, so its reward head is not known. "
        f"Pass head='dotted.path'. Candidates: {_linears(model)}"
        + (
            ". It generates text; where the reward is the logit of one token, pass head='lm_head', reward='logits:<token id>', "
            "read_out='last_token'."
            if generates
            else ""
        )
    )


# Names that reward models outside transformers give their heads.
_VALUE_HEADS = ("v_head.summary", "v_head", "value_head", "score_head", "regression_head", "reward_head", "out_proj")


def _width(module: nn.Module) -> int | None:
    """Outputs of a Linear, of a quantised one, or of an adapter around one."""
    inner = getattr(module, "original_module", module)
    outputs = getattr(inner, "out_features", None)
    return outputs if isinstance(outputs, int) else None


def _maps_to(module: nn.Module, labels: int | None) -> bool:
    return labels is not None and _width(module) == labels


def _has_one_output(model: nn.Module, path: str) -> bool:
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return False
    widths = [width for part in module.modules() if (width := _width(part)) is not None]
    return widths[-1:] == [1]


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
    inner = unwrap(model)
    lists = {name: module for name, module in inner.named_modules() if isinstance(module, nn.ModuleList)}
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
        f"{type(inner).__name__}: no list of num_hidden_layers={depth} blocks; lists: {sizes}. Pass layers='dotted.path', or "
        "channels='final'."
    )


def read_reward(outputs: Any, reward: str, positions: Tensor) -> Tensor:
    """The rewards of a forward pass, (B,), as the model returned them.

    Args:
        reward: `"auto"`, or the output's name (see `output_named`), with `:i` for column i of several.
        positions: (B,) read-out columns, for an output with a value per token, (B, T, k).
    Raises:
        InputError: no such output, or several columns and none chosen.
    """
    name, _, index = reward.partition(":")
    if index and not index.isdecimal():
        raise InputError(f"reward={reward!r}: expected an output's name, with ':<column>' for one of several")
    value = output_named(outputs, name)
    if value.ndim == 3:
        value = value[torch.arange(len(value), device=value.device), positions.to(value.device)]
    if value.ndim == 1 and not int(index or 0):
        return value
    if value.ndim != 2:
        raise InputError(
            f"reward={reward!r}: expected (batch,), (batch, labels) or (batch, tokens, labels) in the model's output, got "
            f"{tuple(value.shape)}"
        )
    if not index and value.shape[1] != 1:
        raise InputError(
            f"the model returns {value.shape[1]} values per item; name the one that is the reward: reward='{name}:0'"
        )
    column = int(index or 0)
    if column >= value.shape[1]:
        raise InputError(f"reward={reward!r}: the model returns {value.shape[1]} values per item")
    return value[:, column]


def is_per_token(outputs: Any, reward: str) -> bool:
    """Whether the named output has a value for every token, (B, T, k)."""
    return output_named(outputs, reward.partition(":")[0]).ndim == 3


def reward_column(reward: str) -> int:
    """Column that `reward` names."""
    return int(reward.partition(":")[2] or 0)


def read_out_positions(
    model: Any, inputs: Mapping[str, Any], rule: str | Callable[[Any, Mapping[str, Any]], Tensor]
) -> Tensor:
    """Column of the token whose vector the head's (B, T, H) input is read at, (B,) int.

    `"auto"` is the rule of the model's own class, `"non_pad"` that of transformers' sequence classifiers: the rightmost token
    whose id is not the pad id of the current config, whatever the attention mask says (so with pad == eos it is the token
    before the final eos). `"last_token"` is the last 1 of the attention mask, `"before_pad"` the token before the first pad
    id, `"first"` column 0.

    Raises:
        InputError: an unknown rule, or a batch without a pad token.
    """
    ids: Tensor = inputs["input_ids"]
    own = reader_of(model).read_out if rule == "auto" else rule
    if not isinstance(own, str):
        return own(model, inputs)
    if own not in READ_OUTS:
        raise InputError(f"read_out={rule!r}: expected 'auto' or one of {READ_OUTS}")
    if own == "first":
        return torch.zeros(ids.shape[0], dtype=torch.long, device=ids.device)
    columns = torch.arange(ids.shape[1], device=ids.device)
    if own == "last_token":
        mask = inputs.get("attention_mask")
        attended: Tensor = torch.ones_like(ids) if mask is None else mask
        return (columns * attended).argmax(-1)
    pad = pad_id(model)
    if pad is None:
        check_padding(model, ids.shape[0])
        return torch.full((ids.shape[0],), ids.shape[1] - 1, dtype=torch.long, device=ids.device)
    if own == "before_pad":
        return before_first(ids, pad)
    return torch.where(ids != pad, columns, 0).argmax(-1)


def has_left_padding(inputs: Mapping[str, Any]) -> bool:
    """Whether some row of a batch starts with padding."""
    mask = inputs.get("attention_mask")
    return mask is not None and not bool(mask[:, 0].all())


def check_left_padding(model: Any, inputs: Mapping[str, Any], pooled: bool, own_rule: Any) -> None:
    """Refuse a left-padded batch whose padding moves the model's own reward.

    Args:
        pooled: the head read one vector per item, so the model chose the position itself.
        own_rule: the read-out rule of its class: pooled vectors of a class that says nothing are an encoder's.
    Raises:
        InputError: absolute positions without `position_ids`, a vector read at position 0, or shifted decoder inputs.
    """
    config, name = text_config(model), type(unwrap(model)).__name__
    if getattr(unwrap(model).config, "is_encoder_decoder", False):
        why = "its decoder reads the inputs shifted by one, so padding on the left stands before the text there too"
    elif pooled and own_rule == "non_pad" and getattr(config, "classifier_pooling", None) != "mean":
        why = "its vector is read at position 0, which is padding then"
    elif config.model_type in _ABSOLUTE_POSITIONS and inputs.get("position_ids") is None:
        why = "its positions are absolute and count the padding; or pass position_ids that start at each row's first token"
    else:
        return
    raise InputError(
        f"left padding changes what {name} itself returns: {why}. Pad on the right (tokenizer.padding_side = 'right')."
    )


# Decoders whose position embedding counts from the row's start; measured in tests/test_families.py.
_ABSOLUTE_POSITIONS = frozenset({"gpt2", "gpt_neo", "gpt_bigcode", "biogpt", "openai-gpt", "ctrl", "codegen"})


def check_padding(model: Any, batch_size: int) -> None:
    """Refuse a batch that the model cannot pad, before its forward.

    Raises:
        InputError: no pad token and more than one row.
    """
    if batch_size > 1 and pad_id(model) is None:
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
    # A wrapper's own mode (DistributedDataParallel starts in training mode) changes nothing.
    inner = unwrap(model)
    if switch:
        with _SWITCHING:
            training = [module for module in inner.modules() if module.training]
            inner.eval()
            try:
                yield
            finally:
                for module in training:
                    module.training = True
        return
    if is_training(inner):
        raise MismatchError(
            "the reward model is in training mode, so dropout would change its vectors. Call model.eval() first, or pass "
            "eval_mode='switch' to have the guard do it and put the mode back."
        )
    yield
