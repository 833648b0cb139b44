"""TRL: a guarded reward for GRPO and RLOO, a callback that stops the run on alarm, a guard fitted as RewardTrainer ends.

Written for and tested with TRL 1.16. Nothing here imports TRL: the trainers call what they are given.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rm_ood.client import GuardClient
from rm_ood.decision import Decisions
from rm_ood.errors import CalibrationError, InputError, MismatchError, OODGuardWarning, UnavailableError
from rm_ood.guard import OODGuard
from rm_ood.integrations.judges import ServedGuard, judged_here
from rm_ood.integrations.passes import PassMonitor
from rm_ood.integrations.processes import gather, processes
from rm_ood.integrations.trl_callbacks import alarm_callback, guard_at_end
from rm_ood.penalty import RESPONSE, RewardPenalty, verdict_scores

__all__ = ["OODReward", "alarm_callback", "guard_at_end"]

MODES = ("monitor", "penalize", "abstain")
SESSIONS = ("prompt", "call")
MISSING = ("none", "floor")
# Standard deviations of the reward below its mean that a floor without any penalty lies.
_BELOW = 3.0

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


class OODReward:
    """The reward model with its guard as one of `reward_funcs` of GRPOTrainer and RLOOTrainer.

    - **monitor**: rewards as the reward model gives them; beside another reward function its weight may be 0.
    - **penalize**: out-of-distribution completions lose reward (`RewardPenalty`), inside this function, so that no
      normalisation of the trainer changes the penalty's scale.
    - **abstain**: no reward for flagged completions.

    In every mode a completion without a finite reward, or one that does not end in an assistant's message, has none either.
    What has none is None: no advantage, and no part in its group's mean, as long as every other reward function (one of
    weight 0 too) gives None for it. Beside another function that gives a number, and in trainers that do not mask
    (OnlineDPOTrainer), None counts as 0, and may win over rewards that are below 0: there pass `missing="floor"`.

    Text is read as the guard was fitted, special tokens included. Dialogues are then scored as TRL scores a model; plain text
    is for a guard fitted with `special_tokens=False, append_eos=False`.

    With `client` a served guard scores, and no model is needed here. Where it cannot be reached after every retry, no
    completion of that call has a reward, in every mode, and there is a warning; `outages` such calls in a row are an
    error. What it answers is checked against `guard`, its copy here (see `ServedGuard`).

    A policy's text differs from preference data before any training, so an alarm against those says little. `baseline`
    calibrates the guard (thresholds, penalty and alarm alike, by `guard.calibrate`) on what the initial policy writes.

    TRL does not move a function's model: put it on each process' device. A pickled copy takes the model along and has a
    monitor of its own.

    Args:
        guard: calibrated, on its reward model in eval mode; with `client` without a model.
        mode: see above.
        axis: whose verdict counts: by default the response's, which is what a policy chooses; None: the whole.
        baseline: rows of the initial policy's rollouts, for `guard.calibrate`; or a number of steps whose own rollouts are
            taken, and whose rewards are left as they are; None: the guard's calibration as it is.
        session: what the monitor takes one completion of: `"prompt"`, each prompt once in every pass over the data (the
            trainer's epoch; all is one pass where the trainer tells none, and prompts that come back then are not watched);
            `"call"`, each prompt once in every call, which counts the answers to a prompt that comes back as independent.
        strength, cap: of the penalty, see `RewardPenalty`.
        missing: what has no reward is `"none"`, or `"floor"`: a number below every reward of this call and process, and at
            most the fit rewards' mean less 3 + `cap` standard deviations; whatever another function gives is added to it.
        neutral: give each group its mean penalty back (see `RewardPenalty.apply`), of its completions on all processes, which
            have to call together. Groups of one completion each are an error (in an evaluation with one generation, too).
        monitor: settings of `guard.monitor`; `workers` is the number of processes.
        tools, chat_template_kwargs: as the trainer renders prompts with.
        client: of the served guard. outages: see above; at least 1.
        name: metrics are logged as `rewards/<name>/mean`; the `ood/...` metrics have no name, so one `OODReward` a trainer.

    Attributes:
        guard: as given. monitor: of this process, a `PassMonitor`; None before the first call and while a baseline is taken.

    Raises:
        InputError: an option out of range, an axis that the guard does not judge; with `client` a baseline (calibrate before
            serving).
        MismatchError: a guard without its model, and no client; in a call, the guard was calibrated or fitted anew since this
            was made: penalty and monitor are of the calibration before. Then make a new one; those that calibrate at different
            times want a guard each (`guard.on(model, tokenizer)`).
        NotFittedError, CalibrationError: of `guard.calibrate`, or the guard is not calibrated.
    """

    def __init__(
        self,
        guard: OODGuard,
        *,
        mode: str = "monitor",
        axis: str | None = RESPONSE,
        baseline: Any = None,
        session: str = "prompt",
        strength: float = 1.0,
        cap: float = 3.0,
        missing: str = "none",
        neutral: bool = False,
        monitor: Mapping[str, Any] | None = None,
        tools: Any = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        client: GuardClient | None = None,
        outages: int = 3,
        name: str = "ood_reward",
    ) -> None:
        choices = {"mode": (mode, MODES), "session": (session, SESSIONS), "missing": (missing, MISSING)}
        for name_of, (value, known) in choices.items():
            if value not in known:
                raise InputError(f"{name_of}={value!r}: expected one of {known}")
        steps = baseline if isinstance(baseline, int) else 0
        if isinstance(baseline, bool) or (isinstance(baseline, int) and steps < 1):
            raise InputError(f"baseline={baseline!r}: expected rows, or a number of steps of at least 1")
        if isinstance(outages, bool) or not isinstance(outages, int) or outages < 1:
            raise InputError(f"outages={outages!r}: expected a number of calls of at least 1")
        if client is None:
            guard.scoring()
        elif baseline is not None:
            raise InputError(
                "client: a served guard takes no baseline. Calibrate it on the initial policy's rollouts before it is served"
            )
        if baseline is not None and not steps:
            guard.calibrate(baseline, progress=False)
        self.__name__ = name
        self.guard = guard
        self.mode, self.axis, self.session, self.neutral, self.missing = mode, axis, session, neutral, missing
        self._strength, self._cap = strength, cap
        self._monitor_settings = dict(monitor or {})
        self._beside: dict[str, Any] = {"tools": tools, "chat_template_kwargs": chat_template_kwargs}
        self._served = None if client is None else ServedGuard(client, guard)
        self._outages, self._out = outages, 0
        self._steps_left, self._until = steps, steps
        self._rows: dict[str, dict[str, Any]] = {}
        self.calls = 0
        self.monitor: PassMonitor | None = None
        self._deaf = False
        self._lock = threading.Lock()
        # What cannot be had is said now, not at the first step.
        self._calibration = self._digests()
        self._penalty = self._new_penalty()
        self._new_monitor()

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Any = None,
        *,
        trainer_state: Any = None,
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """Rewards of n completions; None, or the floor, where there is none.

        Args:
            prompts, completions: texts or messages, n of each. completion_ids: not read.
            trainer_state, log_metric, log_extra: TRL's, where it has them.
            columns: further columns of the data; that of the guard's groups is read.
        Raises:
            InputError: texts that cannot be read, or the column of the groups is missing; nothing is scored.
            CalibrationError: at the end of a baseline of steps, with too few prompts in it.
            UnavailableError: the served guard was out of reach `outages` calls in a row.
            EngineError, MismatchError: it refuses, or answers what was not asked, or another guard is served; the guard was
                calibrated anew.
        """
        if len(prompts) != len(completions):
            raise InputError(f"{len(prompts)} prompts and {len(completions)} completions: expected as many of each")
        now = self._begin(trainer_state)
        pairs = [_split(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        rows = [i for i, pair in enumerate(pairs) if pair is not None]
        items = [pair for pair in pairs if pair is not None]
        keys = [_key(prompts[i]) for i in rows]
        rewards: list[float | None] = [None] * len(prompts)
        extra: dict[str, list[Any]] = {name: [None] * len(prompts) for name in _EXTRA}
        metrics: dict[str, float] = {}
        decisions = self._check(items, keys, self._groups(columns, rows), now) if items else None
        if decisions is not None:
            one = decisions if self.axis is None else decisions.axis(self.axis)
            given, metrics = self._judge(decisions, one.is_ood, keys, now)
            scores = verdict_scores(decisions, self.axis)
            columns_of = (scores, one.p_values, one.is_ood.astype(float), decisions.rewards)
            for place, i in enumerate(rows):
                rewards[i] = _finite(given[place])
                for name, values in zip(_EXTRA, columns_of, strict=True):
                    extra[name][i] = _finite(values[place])
        elif self._neutral(now):
            # The other processes wait for what is here of their groups.
            gather({})
        if self._served is not None:
            metrics["ood/unavailable"] = float(bool(items) and decisions is None)
        if rewards:
            metrics["ood/abstain_frac"] = rewards.count(None) / len(rewards)
            metrics["ood/unscored_frac"] = extra["ood_reward"].count(None) / len(rewards)
        if log_metric is not None:
            for name, value in metrics.items():
                if np.isfinite(value):
                    log_metric(name, float(value))
        if log_extra is not None:
            for name, column in extra.items():
                log_extra(name, column)
        return self._floored(rewards) if self.missing == "floor" else rewards

    @property
    def alarmed(self) -> bool:
        """This process' monitor has alarmed (its lifetime alarm)."""
        return self.monitor is not None and self.monitor.state.alarm

    def save_monitor(self, path: str | os.PathLike[str]) -> None:
        """Keep this process' monitor and count of calls in a file, where there is a monitor; `alarm_callback` does it.

        Raises:
            SaveError: the disk refuses.
        """
        with self._lock:
            monitor, calls = self.monitor, self.calls
        if monitor is not None:
            monitor.save(path, calls=calls)

    def resume_monitor(self, path: str | os.PathLike[str]) -> None:
        """Go on from what `save_monitor` kept, where the monitor here has seen less.

        Raises:
            FileNotFoundError, FormatError, IntegrityError: there is no such file, or it is something else.
            MismatchError: the guard's calibration, the settings or the number of processes are others.
        """
        monitor = self._new_monitor()
        calls = monitor.resume(path).get("calls", 0)
        with self._lock:
            # One that has lived on in this process knows what came after the file, an alarm too.
            if self.monitor is None or self.monitor.state.requests < monitor.state.requests:
                self.monitor, self.calls = monitor, calls

    # -- inside

    def _begin(self, trainer_state: Any) -> _Now:
        """Count the call, and end the baseline, or start the monitor, when it is time."""
        with self._lock:
            step = self.calls if trainer_state is None else int(trainer_state.global_step)
            self.calls += 1
            if self._steps_left and step >= self._until:
                self._take_baseline(step)
            if not self._steps_left and self.monitor is None:
                self.monitor = self._new_monitor()
            collecting, number = bool(self._steps_left), self._pass(trainer_state)
            return _Now(self.calls, number, collecting, self.monitor, self._penalty, self._calibration)

    def _take_baseline(self, step: int) -> None:
        if self.calls == 1:
            raise CalibrationError(
                f"baseline={self._until}: the first call is at step {step}, when the initial policy's rollouts are gone. Save "
                "the guard once it has its baseline (reward.guard.save_pretrained), and go on with that guard and no baseline"
            )
        self._same_calibration(self._digests(), self._calibration)
        rows = [row for part in gather(list(self._rows.values())) for row in part]
        try:
            self.guard.calibrate(rows, progress=False)
        except CalibrationError as error:
            raise CalibrationError(
                f"baseline={self._until}: the first steps' rollouts answered {len(rows)} prompts. {error}"
            ) from error
        self._calibration = self._digests()
        self._penalty = self._new_penalty()
        self._rows.clear()
        self._steps_left = 0

    def _digests(self) -> dict[str, str]:
        return self.guard.state.profile(self.guard.config.joined).digests

    def _same_calibration(self, found: Mapping[str, str], own: Mapping[str, str]) -> None:
        if found != own:
            raise MismatchError(
                "the guard was calibrated or fitted anew since this OODReward was made, whose penalty and monitor are of the "
                "calibration before. Make a new OODReward after calibrate(); give rewards that take a baseline at different "
                "times a guard each: guard.on(model, tokenizer)"
            )

    def _new_penalty(self) -> RewardPenalty:
        return RewardPenalty.of(self.guard, axis=self.axis, strength=self._strength, cap=self._cap)

    def _new_monitor(self) -> PassMonitor:
        axes = None if self.axis is None else [self.axis]
        settings = {"workers": processes(), **self._monitor_settings}
        lifetime = {"lifetime": settings.pop("lifetime")} if "lifetime" in settings else {}
        return PassMonitor(partial(self.guard.monitor, axes=axes, **settings), **lifetime)

    def _pass(self, trainer_state: Any) -> int:
        epoch = None if trainer_state is None or self.session == "call" else trainer_state.epoch
        return 0 if epoch is None else int(epoch)

    def _check(
        self, items: list[tuple[Any, Any]], keys: list[str], groups: list[str] | None, now: _Now
    ) -> Decisions | None:
        """Verdicts; None where the served guard is out of reach."""
        if self._served is None:
            decisions = judged_here(self.guard, items, groups, **self._beside)
        else:
            try:
                decisions = self._served.score(items, groups, self._sessions(keys, now), **self._beside).decisions
            except UnavailableError as error:
                self._missed(error)
                return None
            with self._lock:
                self._out = 0
        # While a baseline is collected nothing rests on the calibration, which another thread may be replacing.
        if not now.collecting:
            told = {axis: one.calibration for axis, one in decisions.axes.items()}
            self._same_calibration(told if all(told.values()) else self._digests(), now.calibration)
        else:
            with self._lock:
                self._collect(items, keys, groups, decisions.rewards)
        index = np.unique(keys, return_inverse=True)[1].astype(np.int64)
        return replace(decisions, prompt_index=index)

    def _missed(self, error: UnavailableError) -> None:
        with self._lock:
            self._out += 1
            out = self._out
        if out >= self._outages:
            raise UnavailableError(f"{error} So it was in {out} calls in a row, and nothing is learnt") from error
        warnings.warn(f"no reward for this call's completions: {error}", OODGuardWarning, stacklevel=4)

    def _sessions(self, keys: list[str], now: _Now) -> list[str]:
        return keys if self.session == "prompt" else [f"{now.call} {key}" for key in keys]

    def _neutral(self, now: _Now) -> bool:
        return self.neutral and self.mode == "penalize" and not now.collecting

    def _groups(self, columns: Mapping[str, Any], rows: list[int]) -> list[str] | None:
        name = self.guard.config.group_column
        if name is None:
            return None
        if name not in columns:
            raise InputError(f"the guard is calibrated by {name!r}: the training data need that column")
        return [str(columns[name][i]) for i in rows]

    def _judge(self, decisions: Decisions, flags: Bools, keys: list[str], now: _Now) -> tuple[Floats, dict[str, float]]:
        """Rewards by the mode, NaN for none, and the metrics."""
        raw = given = decisions.rewards
        if self.mode == "penalize" and not now.collecting:
            groups = [hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest() for key in keys]
            given = now.penalty.apply(decisions, groups=groups, neutral=self.neutral, gather=gather)
        elif self.mode == "abstain" and not now.collecting:
            given = np.where(flags, np.nan, raw)
        scores = verdict_scores(decisions, self.axis)
        metrics = {
            "ood/reward_mean": _mean(raw),
            "ood/score_mean": _mean(scores),
            "ood/flag_frac": float(flags.mean()),
            "ood/penalty_mean": _mean(raw - given) if self.mode == "penalize" else 0.0,
            "ood/baseline": float(now.collecting),
        }
        if now.monitor is not None:
            axes = decisions.axes if self.axis is None else {self.axis: decisions.axis(self.axis)}
            state, counted = now.monitor.update(
                {axis: one.ood_scores for axis, one in axes.items()},
                number=now.number,
                sessions=self._sessions(keys, now),
                flags=flags,
            )
            if not counted:
                self._warn_deaf(len(keys))
            metrics["ood/counted_frac"] = counted / len(keys)
            metrics["ood/log10_evidence"] = float(np.log10(np.clip(state.e_value, 1e-300, 1e300)))
            metrics["ood/alarm"] = float(state.alarm)
        return given, metrics

    def _warn_deaf(self, n: int) -> None:
        with self._lock:
            told, self._deaf = self._deaf, True
        if not told:
            warnings.warn(
                f"none of this call's {n} completions counts for the alarm: their prompts were all seen before in this pass over "
                'the data. See ood/counted_frac; session="call" counts each prompt in every call',
                OODGuardWarning,
                stacklevel=4,
            )

    def _floored(self, rewards: list[float | None]) -> list[float | None]:
        state = self.guard.state
        given = [value for value in rewards if value is not None]
        floor = state.reward_mean - (_BELOW + self._cap) * state.reward_sd
        floor = min([floor, *(value - state.reward_sd for value in given)])
        return [floor if value is None else value for value in rewards]

    def _collect(
        self, items: list[tuple[Any, Any]], keys: list[str], groups: list[str] | None, rewards: Floats
    ) -> None:
        for i, (prompt, response) in enumerate(items):
            if np.isfinite(rewards[i]) and keys[i] not in self._rows:
                row = {"prompt": prompt, "response": response, **{k: v for k, v in self._beside.items() if v}}
                self._rows[keys[i]] = row if groups is None else {**row, str(self.guard.config.group_column): groups[i]}

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: value for name, value in self.__dict__.items() if name != "_lock"}
        # A pickled guard leaves its model behind; a pickled reward is nothing without it.
        return {**kept, "model": self.guard.model, "tokenizer": self.guard.tokenizer}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        model, tokenizer = saved.pop("model"), saved.pop("tokenizer")
        self.__dict__.update(saved)
        self.guard = self.guard.on(model, tokenizer)
        self._lock = threading.Lock()


class _Now(NamedTuple):
    """What one call goes by, whatever other threads do meanwhile."""

    call: int
    number: int
    collecting: bool
    monitor: PassMonitor | None
    penalty: RewardPenalty
    calibration: dict[str, str]


_EXTRA = ("ood_score", "ood_p_value", "ood_flag", "ood_reward")


def _split(prompt: Any, completion: Any) -> tuple[Any, Any] | None:
    """(prompt, response) of a rollout: turns before the last, such as tool calls, belong to the prompt; None where the
    last is not the assistant's."""
    if isinstance(completion, str):
        return prompt, completion
    messages = list(completion)
    if not messages or not isinstance(messages[-1], Mapping) or messages[-1].get("role") != "assistant":
        return None
    return [*prompt, *messages[:-1]] if len(messages) > 1 else prompt, messages[-1:]


def _key(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, default=str)


def _finite(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def _mean(values: Floats) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else float("nan")
