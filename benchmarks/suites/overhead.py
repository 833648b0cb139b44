"""What the guard adds to a forward pass: SmolLM2 as a reward model, guarded and bare alternating in one run, one thread.

Guarded is `guard(**inputs)`: the forward, the pooling of every channel, the distances and the verdicts. CPU time, median
over alternating rounds. `overhead` is the median over the rounds of guarded over bare, minus one, in percent; forwards of
seconds vary by more than the guard takes on a shared machine, so `own_time` says what the guard's own code took of the same
calls (hooks, and all before and after the model's forward), in percent of the model's own time. The model is run as it is,
under LoRA (adapters on every Linear of the body, not merged) and compiled (inductor; bare is the same compiled model called
by itself). Inside compiled code the hooks cannot be told from the rest, so there `own_time` is what runs around the forward.
"""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from harness import Row, alternate, quantile
from train_reward_model import convert_base

from rm_ood import CalibrationWarning, OODGuard

TESTS = ("tests/test_capture.py",)
BATCH, TOKENS, ROUNDS = 8, 32, 31
CHANNELS = ("final", "default")
WAYS = ("eager", "lora", "compile")


def measure() -> Iterator[Row]:
    """Rows for `final` and `default`, eager, with LoRA and compiled: bare, guarded, and the overhead."""
    torch.set_num_threads(1)
    base, tokenizer = convert_base(seed=0)
    # Short texts to fit on: the time of a verdict does not depend on them.
    rows = [
        {"prompt": [{"role": "user", "content": f"number {i}?"}], "chosen": f"yes {i} it is", "rejected": f"no {i + 1}"}
        for i in range(110)
    ]
    for way in WAYS:
        model = _run_as(base, way)
        for channels in CHANNELS:
            torch._dynamo.reset()
            with OODGuard(model, tokenizer, channels=channels, alpha=0.2, batch_size=32) as guard:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", CalibrationWarning)
                    guard.fit(rows, calibration=0.7, progress=False)
                yield from _compare(guard, channels, way)


def _run_as(base: Any, way: str) -> Any:
    """The model as it is, under LoRA, or compiled."""
    if way == "lora":
        from peft import LoraConfig, TaskType, get_peft_model

        adapters = LoraConfig(r=16, target_modules="all-linear", task_type=TaskType.SEQ_CLS)
        return get_peft_model(copy.deepcopy(base), adapters).eval()
    return torch.compile(base, dynamic=True) if way == "compile" else base


def _compare(guard: OODGuard, channels: str, way: str) -> Iterator[Row]:
    inputs, spans = _inputs(guard)

    def guarded() -> Any:
        with torch.inference_mode():
            return guard(**inputs, **spans)

    def bare() -> Any:
        with torch.inference_mode():
            return guard.model(**inputs)

    if not torch.equal(guarded().logits, bare().logits):
        raise RuntimeError("the guarded rewards differ from the bare ones: nothing to compare")
    timings = alternate({"bare": bare, "guarded": guarded}, rounds=ROUNDS, seconds=0)
    pairs = zip(timings["guarded"].samples, timings["bare"].samples, strict=True)
    overhead = sorted(100 * (with_guard / without - 1) for with_guard, without in pairs)
    shape = f"batch={BATCH} tokens={TOKENS} channels={channels}{'' if way == 'eager' else f' way={way}'}"
    for provider, timing in timings.items():
        yield Row(
            suite="overhead",
            op="forward",
            provider=provider,
            shape=shape,
            dtype="float32",
            metric="cpu_time",
            value=1e3 * timing.median,
            low=1e3 * timing.low,
            high=1e3 * timing.high,
            unit="ms",
        )
    own = sorted(_own_share(guard, guarded, way) for _ in range(ROUNDS))
    for metric, values in {"overhead": overhead, "own_time": own}.items():
        yield Row(
            suite="overhead",
            op="forward",
            provider="guarded",
            shape=shape,
            dtype="float32",
            metric=metric,
            value=statistics.median(values),
            low=quantile(values, 0.1),
            high=quantile(values, 0.9),
            unit="%",
        )


def _own_share(guard: OODGuard, guarded: Callable[[], Any], way: str) -> float:
    """Percent of the bare forward that the guard's own code takes, read off one guarded call: its hooks, and all that runs
    before and after the model's forward."""
    clock = time.process_time
    hooks, model = [0.0], [0.0]

    def start(total: list[float]) -> Callable[..., None]:
        return lambda *_: total.append(clock())

    def stop(total: list[float]) -> Callable[..., None]:
        def add(*_: Any) -> None:
            total[0] += clock() - total.pop()

        return add

    # Further hooks on compiled modules would not fire.
    hooked = [] if way == "compile" else [m for m in guard.model.modules() if m._forward_hooks]
    handles = [guard.model.register_forward_pre_hook(start(model)), guard.model.register_forward_hook(stop(model))]
    for module in hooked:
        handles.append(module.register_forward_hook(start(hooks), prepend=True))
        handles.append(module.register_forward_hook(stop(hooks)))
    began = clock()
    guarded()
    total = clock() - began
    for handle in handles:
        handle.remove()
    return 100 * (total - model[0] + hooks[0]) / (model[0] - hooks[0])


def _inputs(guard: OODGuard) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A batch of equal lengths: chat-templated items of `TOKENS` tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, (BATCH, TOKENS), generator=generator)
    ids[:, 0] = guard.tokenizer.bos_token_id
    half = torch.arange(TOKENS) < TOKENS // 2
    spans = {
        "prompt_end": torch.full((BATCH,), TOKENS // 2 - 1),
        "prompt_mask": half.repeat(BATCH, 1),
        "response_mask": ~half.repeat(BATCH, 1),
    }
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, spans
