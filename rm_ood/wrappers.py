"""What people put around a reward model (compilation, adapters, parallelism, offloading), and the model inside."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rm_ood.errors import InputError

# Parts of a dotted path that a wrapper adds and that say nothing about the model.
_WRAPPER_PARTS = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|module)(?:\.|$)"
)
_ADAPTED = frozenset({"BaseTunerLayer", "AuxiliaryTrainingWrapper"})


def unwrap(model: Any) -> Any:
    """The reward model itself: below `torch.compile`, `DistributedDataParallel` and PEFT."""
    while True:
        if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model


def class_name(model: Any) -> str:
    """Name of the reward model's own class; sharding (FSDP2) derives one from it."""
    cls = type(unwrap(model))
    sharded = any(base.__name__ == "FSDPModule" for base in cls.__mro__)
    return cls.__mro__[2].__name__ if sharded else cls.__name__


def full_tensor(x: Tensor) -> Tensor:
    """A parameter with its shards together, on every rank (a collective call where it is sharded)."""
    # Asked by its method: importing torch.distributed takes longer than all of this package.
    gather = getattr(x, "full_tensor", None)
    return x if gather is None else gather()


def plain_path(path: str) -> str:
    """A module's dotted path below `model` without the parts that wrappers add: the same wrapped and bare."""
    path = _WRAPPER_PARTS.sub("", path).rstrip(".")
    return path.removeprefix("base_model.model.")


def called_path(model: nn.Module, path: str) -> str:
    """The module that a forward calls in place of one inside an adapter: the adapter layer itself.

    PEFT keeps several copies of a module (the original, one per adapter) and calls its wrapper, with adapters on and off.
    """
    parts = path.split(".")
    for end in range(1, len(parts) + 1):
        outer = ".".join(parts[:end])
        if any(base.__name__ in _ADAPTED for base in type(model.get_submodule(outer)).__mro__):
            return outer
    return path


def adapters(model: Any) -> str:
    """Active PEFT adapters as text, `none` without any; cheap enough to ask at every call."""
    while isinstance(inner := getattr(model, "_orig_mod", None) or _parallel(model), nn.Module):
        model = inner
    if not getattr(model, "peft_config", None):
        return "none"
    # Asked of a layer: the model around it is PEFT's, transformers' own, or one that was adapted in place.
    layer = next((m for m in model.modules() if any(base.__name__ in _ADAPTED for base in type(m).__mro__)), None)
    if layer is None or getattr(layer, "disable_adapters", False):
        return "none"
    active: list[str] = layer.active_adapters
    return ",".join(sorted(active)) or "none"


def is_training(model: nn.Module) -> bool:
    """Whether any module is in training mode; ten times as fast as asking `model.modules()`."""
    todo: list[nn.Module | None] = [model]
    while todo:
        module = todo.pop()
        if module is None:
            continue
        if module.training:
            return True
        todo.extend(module._modules.values())
    return False


def _parallel(model: Any) -> Any:
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else None


def input_device(model: Any) -> torch.device:
    """Where the model takes its inputs; for an offloaded model its execution device."""
    device = getattr(getattr(unwrap(model), "_hf_hook", None), "execution_device", None)
    if device is not None:
        return torch.device(device)
    found = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    return torch.device(found)


@contextlib.contextmanager
def in_memory(module: nn.Module, *, recurse: bool = True) -> Iterator[nn.Module]:
    """The module (and the modules in it) with its weights loaded, where accelerate keeps them elsewhere between forwards."""
    if not any(p.is_meta for p in module.parameters(recurse=recurse)):
        yield module
        return
    from accelerate.utils import align_module_device

    with contextlib.ExitStack() as stack:
        for part in module.modules() if recurse else [module]:
            stack.enter_context(align_module_device(part))
        yield module


def refuse_unsupported(model: Any) -> None:
    """Say by name what a guard cannot be put on.

    Raises:
        InputError: `DataParallel`, DeepSpeed ZeRO-3, prompt-learning adapters; names the remedy.
    """
    if isinstance(model, nn.DataParallel):
        raise InputError(
            "torch.nn.DataParallel runs replicas of the model in threads of its own, whose hooks no guard can tell apart. Pass "
            "the inner model (model.module), or use DistributedDataParallel with one guard per process."
        )
    if any(hasattr(p, "ds_id") and p.numel() == 0 for p in model.parameters()):
        raise InputError(
            "DeepSpeed ZeRO-3 partitions the parameters, so the model cannot be identified. Guard the model before "
            "deepspeed.initialize, or load it with ZeRO stage 2 or without DeepSpeed (inference needs no ZeRO)."
        )
    for name, config in (getattr(model, "peft_config", None) or {}).items():
        if getattr(config, "is_prompt_learning", False):
            raise InputError(
                f"the PEFT adapter {name!r} ({type(config).__name__}) puts virtual tokens before the text, so positions of "
                "prompt and response are not those of the input. Guard a LoRA or a full fine-tune instead."
            )
