"""Guarded rewards for trainers that want a number for every answer: what the files for OpenRLHF and verl share.

Those trainers load a reward function by its file's path and call it from many threads, one answer at a time. A guard is
loaded once in a process, whoever asks for it, and waiting calls are scored together.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from rm_ood.client import GuardClient
from rm_ood.decision import Decisions
from rm_ood.errors import InputError, OODGuardWarning
from rm_ood.guard import OODGuard
from rm_ood.integrations.judges import ServedGuard, judged_here
from rm_ood.integrations.together import Together
from rm_ood.monitor import TrafficMonitor
from rm_ood.penalty import RESPONSE, RewardPenalty, verdict_scores
from rm_ood.read_back import ReadBack
from rm_ood.reward_model import load_reward_model

PREFIX = "RM_OOD_REWARD_"
MODES = ("monitor", "penalize")
# Beside the reward, of every answer: what OpenRLHF logs and verl keeps.
EXTRA = (
    "ood_reward", "ood_score", "ood_p_value", "ood_is_ood", "ood_penalty", "ood_unscored", "ood_alarm",
    "ood_log10_evidence",
)  # fmt: skip
_WHOLE = "whole"
# As far below the mean reward as few answers are; the server's own `/get_reward` says the same of what has no reward.
_FLOOR_SDS = 3.0
# Answers in a row of which the alarm counts none: more than most batches have answers to prompts that were just counted.
_DEAF_AFTER = 10_000


@dataclass(frozen=True)
class RewardSettings:
    """Where rewards come from and what becomes of them; each is an environment variable, `RM_OOD_REWARD_URL` and so on.

    Attributes:
        url: of a served guard (`rm-ood serve`); else `guard` and `model` are loaded in this process.
        api_key: of the server.
        guard: folder of the saved guard. Beside `url` a copy that needs no model: for `penalize`, and for answers without a
            reward.
        model: folder or Hub id of the reward model.
        tokenizer: folder or Hub id of the policy's tokenizer, for rollouts that come as rendered text: what its chat template
            and its special tokens add is taken off, and the guard gets messages, or the text alone. None: the reward model's,
            where it is loaded here. A rollout whose prompt it did not write is refused.
        mode: `"monitor"`: rewards as the reward model gives them; `"penalize"`: less `RewardPenalty`.
        axis: whose verdict counts, `"response"` by default; `"whole"` for all axes.
        strength, cap: of the penalty.
        device, dtype, trust_remote_code: as in `load_reward_model`.
        timeout, retries, patience: as in `GuardClient`.
        workers: processes that score with a guard of their own, for the alarm's threshold.

    Raises:
        InputError: a setting out of range, or one that is missing.
    """

    url: str | None = None
    api_key: str | None = field(default=None, repr=False)
    guard: str | None = None
    model: str | None = None
    tokenizer: str | None = None
    mode: str = "monitor"
    axis: str = RESPONSE
    strength: float = 1.0
    cap: float = 3.0
    device: str | None = None
    dtype: str = "auto"
    trust_remote_code: bool = False
    timeout: float = 60.0
    retries: int = 3
    patience: float = 600.0
    workers: int = 1

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise InputError(f"mode={self.mode!r}: expected one of {MODES}")
        if self.url is None and (self.guard is None or self.model is None):
            raise InputError(
                f"no guard to ask: set {PREFIX}URL to a served one, or {PREFIX}GUARD and {PREFIX}MODEL to folders"
            )
        if self.url is not None and self.model is not None:
            raise InputError(f"{PREFIX}URL and {PREFIX}MODEL are both set: either a server scores, or this process")
        if self.url is not None and self.mode == "penalize" and self.guard is None:
            raise InputError(
                f"mode='penalize' needs the thresholds of the served guard: set {PREFIX}GUARD to its folder"
            )

    @classmethod
    def read(cls, environment: Mapping[str, str], **given: Any) -> RewardSettings:
        """Settings from environment variables, and those that are given in their place; None and "" are not given.

        Raises:
            InputError: an unknown setting or variable with the prefix, or a value that is no such number.
        """
        kinds = {one.name: str(one.type) for one in fields(cls)}
        found = {name.removeprefix(PREFIX).lower(): v for name, v in environment.items() if name.startswith(PREFIX)}
        unknown = sorted({*found, *given} - kinds.keys())
        if unknown:
            raise InputError(f"settings {unknown} are not known; the settings are {sorted(kinds)}")
        values = {name: v for source in (found, given) for name, v in source.items() if v is not None and v != ""}
        return cls(**{name: _typed(name, kinds[name], value) for name, value in values.items()})


class GuardedReward:
    """A number for every answer, and the guard's verdict beside it; safe to share between threads.

    An answer that has no finite reward gets the floor: the mean reward of the fit data less three of its standard deviations,
    and less `cap` more with `penalize`, so that a poor answer with the whole penalty is not below it. These trainers know no
    missing reward, and a NaN spoils its whole batch. A server that cannot be reached is an error.

    The alarm counts the first answer to each prompt, of the whole run: answers to one prompt are not independent, and its
    calibration has one of each. So it watches the first pass over the prompts, and is deaf in further ones; there is a warning,
    once, after 10,000 answers in a row that counted nothing. Verdicts and penalties go on.
    """

    def __init__(self, settings: RewardSettings) -> None:
        self.settings = settings
        self._axis = None if settings.axis == _WHOLE else settings.axis
        self._served: ServedGuard | None = None
        self._client: GuardClient | None = None
        self._monitor: TrafficMonitor | None = None
        self._penalty: RewardPenalty | None = None
        self._guard: OODGuard | None = None
        if settings.url is not None:
            self._client = GuardClient(
                settings.url,
                api_key=settings.api_key,
                timeout=settings.timeout,
                retries=settings.retries,
                patience=settings.patience,
            )
        if settings.guard is not None:
            self._guard = self._load(settings.guard)
            self._served = None if self._client is None else ServedGuard(self._client, self._guard)
            self._penalty = RewardPenalty.of(self._guard, axis=self._axis, strength=settings.strength, cap=settings.cap)
            if self._client is None:
                axes = None if self._axis is None else [self._axis]
                self._monitor = self._guard.monitor(axes=axes, workers=settings.workers)
        self._counted, self._uncounted, self._is_deaf = math.nan, 0, False
        self._reader = _reader(settings, self._guard)
        self._together: Together[tuple[Any, str], dict[str, float]] = Together(self._rows)

    def __call__(self, items: Sequence[tuple[Any, str]]) -> list[dict[str, float]]:
        """`score`, the reward to train on, and `EXTRA` of each (prompt, response).

        `ood_reward` is the model's own; what there is not is NaN. The alarm is the server's, or this process' own.

        Raises:
            InputError: a text that cannot be used. UnavailableError: the server is out of reach after every try.
            EngineError, MismatchError: it refuses, answers what was not asked, or serves another guard than the copy.
        """
        return self._together(items)

    def rendered(self, queries: Sequence[str], prompts: Sequence[str]) -> list[tuple[Any, str]]:
        """(prompt, response) of whole rendered rollouts, each with the prompt that it begins with.

        A guard fitted on rendered text (`text_format="plain"`, `special_tokens=False`) gets them as they are.

        Raises:
            InputError: a rollout without its prompt; a prompt that the policy's chat template did not make; no tokenizer; a
                server of which neither a tokenizer nor a copy is here, so that nothing tells what it reads.
        """
        if len(queries) != len(prompts):
            raise InputError(f"{len(queries)} queries and {len(prompts)} prompts: expected as many of each")
        if self._reader is None and (self._guard is None or self._guard.config.text_format != "plain"):
            who = "nothing here tells what the served guard reads"
            if self._guard is not None:
                who = f"this guard reads {self._guard.config.text_format!r}"
            raise InputError(
                f"{who}, and the rollouts come rendered: set {PREFIX}TOKENIZER to the policy's tokenizer, whose template is then "
                f"undone, or {PREFIX}GUARD to a copy of a guard that was fitted on rendered text"
            )
        read: list[tuple[Any, str]] = []
        for i, (query, prompt) in enumerate(zip(queries, prompts, strict=True)):
            if self._reader is not None:
                read.append(self._reader.split(query, prompt, f"queries[{i}]"))
            elif query.startswith(prompt):
                read.append((prompt, query[len(prompt) :]))
            else:
                raise InputError(f"queries[{i}]: it does not begin with its prompt, so the response cannot be told")
        return read

    def close(self) -> None:
        """Close the connections and remove the guard's hooks; a second call does nothing."""
        if self._client is not None:
            self._client.close()
        if self._guard is not None:
            self._guard.detach()

    def _load(self, folder: str) -> OODGuard:
        s = self.settings
        if self._client is not None:
            return OODGuard.from_pretrained(folder)
        model, tokenizer = load_reward_model(
            str(s.model), trust_remote_code=s.trust_remote_code, dtype=s.dtype, device=s.device
        )
        return OODGuard.from_pretrained(folder, model, tokenizer)

    def _rows(self, items: list[tuple[Any, str]]) -> list[dict[str, float]]:
        decisions, alarm, evidence = self._judged(items)
        one = decisions if self._axis is None else decisions.axis(self._axis)
        scores = verdict_scores(decisions, self._axis)
        rewards = decisions.rewards
        scored = np.isfinite(rewards)
        penalty = np.zeros(len(items))
        if self._penalty is not None and self.settings.mode == "penalize":
            penalty = self._penalty(scores)
        given = np.where(scored, rewards - penalty, self._floor(bool(scored.all())))
        columns = {
            "score": given,
            "ood_reward": rewards,
            "ood_score": np.where(np.isfinite(scores), scores, np.nan),
            "ood_p_value": one.p_values,
            "ood_is_ood": one.is_ood,
            "ood_penalty": np.where(scored, penalty, np.nan),
            "ood_unscored": ~scored,
            "ood_alarm": np.full(len(items), alarm),
            "ood_log10_evidence": np.full(len(items), evidence),
        }
        return [{name: float(values[i]) for name, values in columns.items()} for i in range(len(items))]

    def _judged(self, items: list[tuple[Any, str]]) -> tuple[Decisions, float, float]:
        """Verdicts, and where the alarm stands: 0 or 1 and log10 of the evidence, NaN where the server keeps none."""
        if self._client is not None:
            if self._served is not None:
                reply = self._served.score(items)
            else:
                reply = self._client.score([p for p, _ in items], [r for _, r in items])
            told = reply.monitor or {}
            self._heed(_number(told.get("counted")), len(items))
            return reply.decisions, _number(told.get("alarm")), _log10(_number(told.get("e_value")))
        if self._guard is None or self._monitor is None:
            raise InputError("no guard to ask")
        decisions = judged_here(self._guard, items)
        axes = decisions.axes if self._axis is None else {self._axis: decisions.axis(self._axis)}
        flags = decisions.is_ood if self._axis is None else decisions.axis(self._axis).is_ood
        state = self._monitor.update(
            {name: axis.ood_scores for name, axis in axes.items()}, sessions=[str(p) for p, _ in items], flags=flags
        )
        self._heed(state.counted, len(items))
        return decisions, float(state.alarm), _log10(state.e_value)

    def _heed(self, counted: float, items: int) -> None:
        """Tell once that the alarm has gone deaf. `counted`: what its monitor has betted on so far, NaN where there is none."""
        self._uncounted = self._uncounted + items if counted == self._counted else 0
        self._counted = counted
        if self._uncounted >= _DEAF_AFTER and not self._is_deaf:
            self._is_deaf = True
            warnings.warn(
                f"the alarm counted none of the last {self._uncounted} answers, and {counted:.0f} in all: one of each prompt in "
                "a run. It cannot tell any more how the policy changes on prompts that it has seen: watch ood_is_ood, or give "
                "prompts that are new",
                OODGuardWarning,
                stacklevel=2,
            )

    def _floor(self, needless: bool) -> float:
        if needless:
            return math.nan
        if self._guard is None:
            raise InputError(
                f"the served guard gave an answer no reward, and without a copy of it ({PREFIX}GUARD) there is no floor to take"
            )
        lost = self.settings.cap if self.settings.mode == "penalize" else 0.0
        return self._guard.state.reward_mean - (_FLOOR_SDS + lost) * self._guard.state.reward_sd


_loaded: dict[RewardSettings, GuardedReward] = {}
_loading = threading.Lock()


def guarded_reward(settings: RewardSettings) -> GuardedReward:
    """The one of these settings in this process, loaded by the first who asks."""
    with _loading:
        if settings not in _loaded:
            _loaded[settings] = GuardedReward(settings)
        return _loaded[settings]


def _reader(settings: RewardSettings, guard: OODGuard | None) -> ReadBack | None:
    """What reads rendered rollouts for this guard; None where it takes them as they are."""
    config = None if guard is None else guard.config
    if config is not None and config.text_format == "plain" and not config.special_tokens:
        return None
    tokenizer = None if guard is None else guard.tokenizer
    if settings.tokenizer is not None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(settings.tokenizer)
    if tokenizer is None:
        return None
    remedy = f"Set {PREFIX}TOKENIZER to the policy's tokenizer, and have the policy's prompts rendered by its template."
    return ReadBack(tokenizer, "chat" if config is None else config.text_format, remedy)


def _typed(name: str, kind: str, value: Any) -> Any:
    """A value as the setting's type; environment variables are strings."""
    try:
        if kind == "float":
            return float(value)
        if kind == "int":
            return int(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}={value!r}: expected a number") from error
    if kind == "bool" and not isinstance(value, bool):
        if str(value).lower() not in ("true", "false"):
            raise InputError(f"{name}={value!r}: expected true or false")
        return str(value).lower() == "true"
    return value


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (bool, int, float)) else math.nan


def _log10(e_value: float) -> float:
    return float(np.log10(np.clip(e_value, 1e-300, 1e300)))
