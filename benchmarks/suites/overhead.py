"""What the guard adds to a forward pass: SmolLM2 as a reward model, guarded and bare alternating in one run, one thread.

Guarded is `guard(**inputs)`: the forward, the pooling of every channel, the distances and the verdicts. CPU time, median
over alternating rounds; `overhead` is the median over the rounds of guarded over bare, minus one, in percent.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from harness import Row, alternate
from train_reward_model import convert_base

from rm_ood import CalibrationWarning, OODGuard

TESTS = ("tests/test_capture.py",)
BATCH, TOKENS, ROUNDS = 8, 128, 31
CHANNELS = ("final", "default")


def measure() -> Iterator[Row]:
    """Rows for `final` and `default`: bare, guarded, and the overhead."""
    torch.set_num_threads(1)
    model, tokenizer = convert_base(seed=0)
    # Short texts to fit on: the time of a verdict does not depend on them.
    rows = [
        {"prompt": [{"role": "user", "content": f"number {i}?"}], "chosen": f"yes {i} it is", "rejected": f"no {i + 1}"}
        for i in range(110)
    ]
    for channels in CHANNELS:
        with OODGuard(model, tokenizer, channels=channels, alpha=0.2, batch_size=32) as guard:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", CalibrationWarning)
                guard.fit(rows, calibration=0.7, progress=False)
            yield from _compare(guard, channels)


def _compare(guard: OODGuard, channels: str) -> Iterator[Row]:
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
    shape = f"batch={BATCH} tokens={TOKENS} channels={channels}"
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
    yield Row(
        suite="overhead",
        op="forward",
        provider="guarded",
        shape=shape,
        dtype="float32",
        metric="overhead",
        value=statistics.median(overhead),
        low=overhead[1],
        high=overhead[-2],
        unit="%",
    )


def _inputs(guard: OODGuard) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A batch of equal lengths: chat-templated items of `TOKENS` tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, (BATCH, TOKENS), generator=generator)
    half = torch.arange(TOKENS) < TOKENS // 2
    spans = {
        "prompt_end": torch.full((BATCH,), TOKENS // 2 - 1),
        "prompt_mask": half.repeat(BATCH, 1),
        "response_mask": ~half.repeat(BATCH, 1),
    }
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, spans
