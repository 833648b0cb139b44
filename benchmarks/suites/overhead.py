"""What the guard adds to a forward pass: SmolLM2 as a reward model, guarded and bare alternating in one run, one thread.

Guarded is `guard(**inputs)`: the forward, the pooling of every channel, the distances and the verdicts. CPU time, median
over alternating rounds. `overhead` is the median over the rounds of guarded over bare, minus one, in percent; forwards of
seconds vary by more than the guard takes on a shared machine, so `own_time` says what the guard's own code took of the same
calls (hooks, and all before and after the model's forward), in percent of the model's own time. The model is run as it is,
under LoRA (adapters on every Linear of the body, not merged) and compiled (inductor; bare is the same compiled model called
by itself). Inside compiled code the hooks cannot be told from the rest, so there `own_time` is what runs around the forward.

Before that, on a CPU, the parts alone in percent of a bare forward (`share`): the distance of one vector per item, ours and
pytorch-ood's, with the ratio of the two, and the span means of prompt and response, of MiniLM and SmolLM2.

On a GPU the model has the shape of an 8B Llama with random bfloat16 weights, and the time is wall-clock of a call that is
waited for.
"""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from harness import Row, alternate, quantile, waited
from large_model import large_reward_model
from suites.scoring import scorers, vectors
from train_reward_model import BASES, convert_base

from rm_ood import CalibrationWarning, OODGuard
from rm_ood.channels import Channel
from rm_ood.hooks import span_mean

TESTS = ("tests/test_capture.py",)
BATCH, TOKENS, ROUNDS = 8, 32, 31
CHANNELS = ("final", "default")
WAYS = ("eager", "lora", "compile")
LARGE = ((1, 512), (8, 512))
# Model, batch, tokens.
SHARES = (("minilm", 1, 16), ("minilm", 1, 32), ("minilm", 1, 128), ("smollm2", 1, 32), ("smollm2", 1, 128))


def measure() -> Iterator[Row]:
    """Rows for `final` and `default`: bare, guarded, and the overhead; on a CPU eager, with LoRA and compiled."""
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        yield from _measure_large()
        return
    for name, batch, tokens in SHARES:
        yield from _shares(name, batch, tokens)
    base, tokenizer = convert_base(seed=0)
    for way in WAYS:
        model = _run_as(base, way)
        for channels in CHANNELS:
            torch._dynamo.reset()
            with _fitted(model, tokenizer, channels) as guard:
                yield from _compare(guard, channels, way, BATCH, TOKENS)


def _measure_large() -> Iterator[Row]:
    model, tokenizer = large_reward_model("cuda")
    for channels in CHANNELS:
        with _fitted(model, tokenizer, channels) as guard:
            for batch, tokens in LARGE:
                yield from _compare(guard, channels, "eager", batch, tokens)


def _shares(name: str, batch: int, tokens: int) -> Iterator[Row]:
    model, _ = BASES[name](seed=0)
    model.eval()
    d = model.config.hidden_size
    found = {key: scorer.score for key, scorer in scorers(d, 2, 10 * d).items()}
    scores = {key: score for key, score in found.items() if key.startswith(("rm_ood", "pytorch-ood"))}
    ids = torch.randint(1000, 20000, (batch, tokens), generator=torch.Generator().manual_seed(0))
    hidden, probe, half = torch.randn(batch, tokens, d), vectors(batch, d), torch.arange(tokens) < tokens // 2
    masks, channel = [half.repeat(batch, 1), ~half.repeat(batch, 1)], Channel("response", 0.67, "mean")

    def forward() -> object:
        with torch.inference_mode():
            return model(input_ids=ids, attention_mask=torch.ones_like(ids))

    calls: dict[str, Callable[[], object]] = {key: lambda call=call: call(probe) for key, call in scores.items()}
    calls["span means"] = lambda: [span_mean(hidden, mask, probe, channel) for mask in masks]
    timings = alternate({"forward": forward, **calls}, rounds=15, seconds=0.02)
    peer = next(key for key in scores if key != "rm_ood")
    for provider in calls:
        pairs = zip(timings[provider].samples, timings["forward"].samples, strict=True)
        shares = [100 * part / whole for part, whole in pairs]
        yield Row(
            suite="overhead",
            op="span_means" if provider == "span means" else "score",
            provider="torch" if provider == "span means" else provider,
            shape=f"model={name} batch={batch} tokens={tokens}",
            dtype="float32",
            metric="share",
            value=statistics.median(shares),
            low=quantile(shares, 0.1),
            high=quantile(shares, 0.9),
            unit="%",
            ratio=timings["rm_ood"].times_faster_than(timings[peer]) if provider == "rm_ood" else None,
        )


def _fitted(model: Any, tokenizer: Any, channels: str) -> OODGuard:
    # Short texts to fit on: the time of a verdict does not depend on them.
    rows = [
        {"prompt": [{"role": "user", "content": f"number {i}?"}], "chosen": f"yes {i} it is", "rejected": f"no {i + 1}"}
        for i in range(110)
    ]
    guard = OODGuard(model, tokenizer, channels=channels, alpha=0.2, batch_size=32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        return guard.fit(rows, calibration=0.7, progress=False)


def _run_as(base: Any, way: str) -> Any:
    """The model as it is, under LoRA, or compiled."""
    if way == "lora":
        from peft import LoraConfig, TaskType, get_peft_model

        adapters = LoraConfig(r=16, target_modules="all-linear", task_type=TaskType.SEQ_CLS)
        return get_peft_model(copy.deepcopy(base), adapters).eval()
    return torch.compile(base, dynamic=True) if way == "compile" else base


def _compare(guard: OODGuard, channels: str, way: str, batch: int, tokens: int) -> Iterator[Row]:
    inputs, spans = _inputs(guard, batch, tokens)
    on_gpu = inputs["input_ids"].is_cuda
    clock = waited if on_gpu else time.process_time

    def guarded() -> Any:
        with torch.inference_mode():
            return guard(**inputs, **spans)

    def bare() -> Any:
        with torch.inference_mode():
            return guard.model(**inputs)

    if not torch.equal(guarded().logits, bare().logits):
        raise RuntimeError("the guarded rewards differ from the bare ones: nothing to compare")
    timings = alternate({"bare": bare, "guarded": guarded}, rounds=ROUNDS, seconds=0, clock=clock)
    pairs = zip(timings["guarded"].samples, timings["bare"].samples, strict=True)
    overhead = sorted(100 * (with_guard / without - 1) for with_guard, without in pairs)
    shape = f"batch={batch} tokens={tokens} channels={channels}{'' if way == 'eager' else f' way={way}'}"
    for provider, timing in timings.items():
        yield Row(
            suite="overhead",
            op="forward",
            provider=provider,
            shape=shape,
            dtype=_dtype(guard),
            metric="time" if on_gpu else "cpu_time",
            value=1e3 * timing.median,
            low=1e3 * timing.low,
            high=1e3 * timing.high,
            unit="ms",
        )
    shares = {"overhead": overhead}
    if not on_gpu:
        shares["own_time"] = sorted(_own_share(guard, guarded, way) for _ in range(ROUNDS))
    for metric, values in shares.items():
        yield Row(
            suite="overhead",
            op="forward",
            provider="guarded",
            shape=shape,
            dtype=_dtype(guard),
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


def _inputs(guard: OODGuard, batch: int, tokens: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A batch of equal lengths: chat-templated items of so many tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, (batch, tokens), generator=generator)
    ids[:, 0] = guard.tokenizer.bos_token_id
    half = torch.arange(tokens) < tokens // 2
    spans = {
        "prompt_end": torch.full((batch,), tokens // 2 - 1),
        "prompt_mask": half.repeat(batch, 1),
        "response_mask": ~half.repeat(batch, 1),
    }
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    device = next(guard.model.parameters()).device
    return {name: t.to(device) for name, t in inputs.items()}, {name: t.to(device) for name, t in spans.items()}


def _dtype(guard: OODGuard) -> str:
    return str(next(guard.model.parameters()).dtype).removeprefix("torch.")
