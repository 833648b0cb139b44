"""A server without the reward model: an inference engine gives rewards and vectors, the guard the verdicts.

The engine is asked the canary texts of the guard before the first item, every `probe_s` seconds, and after every failure and
every lost connection: as long as it is not known to answer them as the reward model of the fit did, nothing is scored, and
what was under way meanwhile is not believed. A model that is swapped without any failure or lost connection is found by the
next of these questions only: until then, for up to `probe_s` seconds, its answers are taken for the fitted model's.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from rm_ood.channels import FINAL, REWARD
from rm_ood.decision import Decisions
from rm_ood.dialogue import Response, Text
from rm_ood.embed import Embedded
from rm_ood.errors import EngineError, InputError, MismatchError
from rm_ood.guard import OODGuard
from rm_ood.integrations.engine_check import (
    KINDS,
    canary_items,
    check_canaries,
    engine_kind,
    engine_limit,
    engine_models,
)
from rm_ood.integrations.engines import EngineScorer
from rm_ood.integrations.model_files import ModelFiles
from rm_ood.integrations.read_out import read_head
from rm_ood.serve.engine_refusal import PROBLEMS, engine_refusal, unavailable
from rm_ood.serve.logs import log
from rm_ood.serve.refusal import Refusal
from rm_ood.serve.scorer import StateScorer, Work
from rm_ood.state import ChannelScores
from rm_ood.text import NO_LIMIT, Encoded

# What a head in another dtype may round by, which an engine does not tell.
_COARSE = torch.finfo(torch.bfloat16).eps
# Between two questions whether an engine that was away is back, and between the tries after a lost connection.
_HOLD_S = 1.0


@dataclass(frozen=True)
class EngineSettings:
    """How an engine is asked.

    Attributes:
        url: its address, `http://host:port`.
        kind: `"sglang"`, `"vllm"` (with the plugin), `"vllm-vectors"` (the backbone, without it), or `"auto"`: one of the first
            two, as it says itself.
        model: name that it serves the reward model under; None for its only one.
        key: sent as `Authorization: Bearer ...`; None: no key.
        timeout_s: to connect, for any next part of a reply, and for the whole of it.
        retries: further tries after a lost connection, each once the canary texts are answered as they should be.
        concurrency: requests in flight.
        probe_s: how often the canary texts are asked.
    """

    url: str
    kind: str = "auto"
    model: str | None = None
    key: str | None = field(default=None, repr=False)
    timeout_s: float = 20.0
    retries: int = 2
    concurrency: int = 4
    probe_s: float = 10.0

    def __post_init__(self) -> None:
        if self.kind not in ("auto", *KINDS):
            raise InputError(f"kind={self.kind!r}: expected 'auto' or one of {list(KINDS)}")
        for name, least in (("retries", 0), ("concurrency", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"{name}={value!r}: expected a whole number from {least}")
        for name in (f.name for f in fields(self) if f.name.endswith("_s")):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise InputError(f"{name}={value!r}: expected seconds above 0")


class EngineBackend(StateScorer):
    """A guard without its model, in front of an engine.

    Args:
        guard: calibrated, loaded without a model; its verdict joins `final`, and no other vector.
        files: of the reward model that the engine serves.
        settings: of the engine.
        batch_size: items in one request; None: the guard's own.
        allow_dtype_change: accept an engine that runs the model in another dtype than that of the fit.

    Raises:
        InputError: a guard that an engine cannot serve, or that keeps no canaries. NotFittedError: not fitted or not calibrated.
        MismatchError: another tokenizer or limit, or another reward model behind the address.
        EngineError: it does not answer, or not as documented.
    """

    def __init__(
        self,
        guard: OODGuard,
        files: ModelFiles,
        settings: EngineSettings,
        batch_size: int | None = None,
        *,
        allow_dtype_change: bool = False,
    ) -> None:
        _check_channels(guard)
        super().__init__(guard, guard.state, files.tokenizer, batch_size or guard.config.batch_size)
        self.concurrency = settings.concurrency
        headers = {} if settings.key is None else {"Authorization": f"Bearer {settings.key}"}
        client: dict[str, Any] = {
            "headers": headers,
            "timeout": settings.timeout_s,
            "whole_s": settings.timeout_s,
            "patience": 0.0,
            # A try that the client made anew by itself could be answered by another model.
            "retries": 0,
        }
        kind = settings.kind
        try:
            models = engine_models(settings.url, **{**client, "retries": settings.retries})
        except EngineError:
            if kind == "auto":
                raise
            models = []
        if kind == "auto":
            kind = engine_kind(models)
        options = {**client, "model": settings.model, "batch_size": self.batch_size}
        if guard.config.max_length is None:
            options["max_length"] = files.max_length
        if kind != "vllm" and files.head is not None:
            head = read_head(files.head, guard.state)
            options["head"] = replace(head, eps=max(head.eps, _COARSE)) if allow_dtype_change else head
        self._engine: EngineScorer = KINDS[kind](settings.url, guard, files.tokenizer, **options)
        self._canaries = canary_items(self._engine)
        self._allow = allow_dtype_change
        self._retries = settings.retries
        self._probe_s = settings.probe_s
        self._hold_s = min(_HOLD_S, settings.probe_s)
        self._outage: Refusal | None = None
        # How often the engine may have become another one; whether the canaries were asked since.
        self._doubts, self._in_doubt = 0, False
        # Of these three.
        self._change = threading.Lock()
        # When the canaries were asked last, and whether they were answered as they should be.
        self._asked_at, self._held = -math.inf, False
        self._asking = threading.Lock()
        self._wake, self._closed = threading.Event(), False
        try:
            self._compare()
        except BaseException:
            self.close()
            raise
        self._limit = engine_limit(models, settings.model)
        self._facts: dict[str, Any] = {"kind": kind, "head_checked": "head" in options}
        threading.Thread(target=self._watch, name="rm-ood-engine", daemon=True).start()

    def tell(self) -> None:
        """Log which engine it is, and what is known of it."""
        log("engine", **self._facts, dtype_changed=bool(self._state.overrides))
        own = self._engine.text.max_length
        if self._limit is not None and self._limit < own:
            message = (
                f"the engine takes {self._limit} tokens and the guard {'any number' if own == NO_LIMIT else own}: longer items "
                "come back as scoring_failed. Start the engine with the guard's limit (vLLM: --max-model-len, SGLang: "
                "--context-length)."
            )
            log("engine_limit", level="warning", message=message)

    def _encode(self, items: Sequence[tuple[Text, Response]]) -> list[Encoded]:
        return self._engine.encode(items)

    def score(self, works: Sequence[Work]) -> Decisions:
        """See `Scorer`."""
        lost = False
        for left in range(self._retries, -1, -1):
            doubts = self._doubts
            if self._outage is None or self._serves(again=lost):
                answer = self._answer(works)
                # Any thread may have lost its connection while this answer was under way, which is then another model's.
                if answer is not None and self._doubts == doubts:
                    return self._decide(works, *answer)
                lost = True
                continue
            outage = self._outage or unavailable()
            if not lost or outage.kind != "engine_unavailable":
                # A copy of its own for each batch, since an exception holds the frames that it went through.
                raise replace(outage)
            if left:
                time.sleep(self._hold_s)
        self._wake.set()
        raise replace(self._outage or unavailable())

    def _answer(self, works: Sequence[Work]) -> tuple[ChannelScores, Embedded] | None:
        """What the engine says of a batch; None where the connection was lost. Raises as `score`."""
        try:
            return self._engine.score([work.encoded for work in works], self._state)
        except (EngineError, MismatchError) as error:
            refusal = engine_refusal(error)
            if refusal.kind == "engine_unavailable":
                self._down(refusal, error, in_doubt=True)
                return None
            if refusal.kind in ("engine_failed", "engine_mismatch"):
                # One item may have done it; an engine that still answers the canaries says so.
                if self._serves():
                    raise
                raise replace(self._outage or refusal) from None
            if refusal.kind == "engine_timeout":
                self._wake.set()
            raise refusal from None

    def failure(self) -> Refusal:
        """See `Scorer`."""
        return Refusal(
            502, "engine_failed", "the inference engine failed on every item; the server's log has more", 1.0
        )

    def close(self) -> None:
        """See `Scorer`."""
        self._closed = True
        self._wake.set()
        self._engine.close()

    # -- is it there, and is it the reward model of the fit

    def _watch(self) -> None:
        while not self._closed:
            self._wake.wait(self._probe_s)
            self._wake.clear()
            if not self._closed:
                self._serves()

    def _serves(self, *, again: bool = False) -> bool:
        """Whether the engine answers the canaries as it should; sets the outage, or ends it.

        While an outage lasts it is asked once a second at most, by one thread; the others take the answer of before. After a
        lost connection, and for a further try, it is asked at once, and the others wait for the answer.
        """
        begun = time.monotonic()
        waits = again or self._in_doubt or self._outage is None
        if not waits and begun - self._asked_at < self._hold_s:
            return False
        if not self._asking.acquire(blocking=waits):
            return False
        try:
            # Where another thread asked meanwhile, its answer is as good.
            if self._asked_at <= begun or self._in_doubt:
                self._held = self._ask()
                self._asked_at = time.monotonic()
            return self._held
        finally:
            self._asking.release()

    def _ask(self) -> bool:
        doubts = self._doubts
        try:
            self._compare()
        except Exception as error:  # whatever it is: nothing is scored before it is known to be right again
            refusal = engine_refusal(error)
            if refusal.kind != "engine_busy" and not self._closed:
                self._down(refusal, error)
            return False
        with self._change:
            if self._doubts != doubts:
                # A connection was lost meanwhile: it may be another one by now.
                return False
            before, self._outage, self.problem, self._in_doubt = self._outage, None, None, False
        if before is not None:
            log("engine_back")
        return True

    def _compare(self) -> None:
        overrides = check_canaries(self._engine, self._state, self._canaries, allow_dtype_change=self._allow)
        if overrides != self._state.overrides:
            self._state = replace(self._state, overrides=overrides)

    def _down(self, refusal: Refusal, error: Exception, *, in_doubt: bool = False) -> None:
        with self._change:
            before, self._outage, self._in_doubt = self._outage, refusal, in_doubt
            self.problem = PROBLEMS[refusal.kind]
            self._doubts += refusal.kind in ("engine_unavailable", "engine_mismatch")
        if before is None or before.kind != refusal.kind:
            # A mismatch is told in numbers; other errors name the address.
            told = {"message": str(error)} if isinstance(error, MismatchError) else {}
            log("engine_away", level="error", why=refusal.kind, error=type(error).__name__, **told)


def _check_channels(guard: OODGuard) -> None:
    """Raises InputError for a guard whose verdict needs vectors that no engine gives."""
    joined = guard.state.config.joined
    lacking = [name for name in joined if name not in (FINAL, REWARD)]
    if lacking or FINAL not in joined:
        raise InputError(
            f"this guard's verdict is joined from {list(joined)}, and an engine gives final vectors and rewards only"
            f"{f', not {lacking}' if lacking else ''}. Serve it with --channels final, which is fitted and calibrated in "
            "every guard, or fit one with: rm-ood fit --channels final --axes response"
        )


def load_backend(
    guard: str | Path,
    files: ModelFiles,
    settings: EngineSettings,
    batch_size: int | None,
    *,
    channels: Any = None,
    allow_dtype_change: bool = False,
) -> EngineBackend:
    """A saved guard, loaded without its model, in front of an engine. Raises as `EngineBackend` and `from_pretrained`."""
    loaded = OODGuard.from_pretrained(guard, channels=channels)
    return EngineBackend(loaded, files, settings, batch_size, allow_dtype_change=allow_dtype_change)
