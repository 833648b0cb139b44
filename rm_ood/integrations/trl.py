"""TRL: a guarded reward for GRPO and RLOO, a callback that stops the run on alarm, a guard fitted as RewardTrainer ends.

Written for and tested with TRL 1.16. Nothing here imports TRL: the trainers call what they are given.
"""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from rm_ood.calibration import LENGTH
from rm_ood.calls import read_call
from rm_ood.decision import Decisions
from rm_ood.errors import CalibrationError, CalibrationWarning, InputError, OODGuardError
from rm_ood.guard import OODGuard
from rm_ood.monitor import TrafficMonitor
from rm_ood.penalty import RESPONSE, RewardPenalty, verdict_scores
from rm_ood.reward_model import eval_mode

MODES = ("monitor", "penalize", "abstain")
SESSIONS = ("prompt", "call")
ACTIONS = ("stop", "warn")

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


class OODReward:
    """The reward model with its guard as one of `reward_funcs` of GRPOTrainer, RLOOTrainer and OnlineDPOTrainer.

    - **monitor**: rewards as the reward model gives them; beside another reward function its weight may be 0.
    - **penalize**: out-of-distribution completions lose reward (`RewardPenalty`), inside this function, so that no
      normalisation of the trainer changes the penalty's scale.
    - **abstain**: None for flagged completions: no advantage, and no part in their group's mean, as long as every other
      reward function (one of weight 0 too) gives None for them; else None counts as 0. So let it be the only one.

    A completion without a finite reward, or one that does not end in an assistant's message, is None in every mode. Text is
    read as the guard was fitted, special tokens included. Dialogues are then scored as TRL scores a model; plain text is for
    a guard fitted with `special_tokens=False, append_eos=False`.

    A policy's text differs from preference data before any training, so an alarm against those says little. `baseline`
    calibrates the guard (thresholds, penalty and alarm alike, by `guard.calibrate`) on what the initial policy writes.

    TRL does not move a function's model: put it on each process' device. A pickled copy takes the model along and has a
    monitor of its own.

    Args:
        guard: calibrated, on its reward model in eval mode.
        mode: see above.
        axis: whose verdict counts: by default the response's, which is what a policy chooses; None: the whole.
        baseline: rows of the initial policy's rollouts, for `guard.calibrate`; or a number of steps whose own rollouts are
            taken, and whose rewards are left as they are; None: the guard's calibration as it is.
        session: what the monitor takes one completion of: `"prompt"`, each prompt once for many steps, so a run that comes
            back to its prompts is watched on its first pass only; `"call"`, each prompt once in every call, which sees all
            of a run but counts the answers to a prompt that comes back as independent.
        strength, cap: of the penalty, see `RewardPenalty`.
        neutral: give each group its mean penalty back (see `RewardPenalty.apply`), of the completions on one process.
        monitor: settings of `guard.monitor`; `workers` is the number of processes.
        tools, chat_template_kwargs: as the trainer renders prompts with.
        name: metrics are logged as `rewards/<name>/mean`; the `ood/...` metrics have no name, so one `OODReward` a trainer.

    Attributes:
        guard: as given. monitor: of this process; None before the first call and while a baseline is taken.

    Raises:
        InputError: an option out of range, an axis that the guard does not judge, a guard without its model.
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
        neutral: bool = False,
        monitor: Mapping[str, Any] | None = None,
        tools: Any = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        name: str = "ood_reward",
    ) -> None:
        if mode not in MODES or session not in SESSIONS:
            raise InputError(f"mode={mode!r}, session={session!r}: expected one of {MODES} and one of {SESSIONS}")
        steps = baseline if isinstance(baseline, int) else 0
        if isinstance(baseline, bool) or (isinstance(baseline, int) and steps < 1):
            raise InputError(f"baseline={baseline!r}: expected rows, or a number of steps of at least 1")
        guard.scoring()
        if baseline is not None and not steps:
            guard.calibrate(baseline, progress=False)
        self.__name__ = name
        self.guard = guard
        self.mode, self.axis, self.session, self.neutral = mode, axis, session, neutral
        self._strength, self._cap = strength, cap
        self._monitor_settings = dict(monitor or {})
        self._tools, self._template_kwargs = tools, chat_template_kwargs
        self._steps_left, self._until = steps, steps
        self._rows: dict[str, dict[str, Any]] = {}
        self.calls = 0
        self.monitor: TrafficMonitor | None = None
        self._lock = threading.Lock()
        # What cannot be had is said now, not at the first step.
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
        """Rewards of n completions; None where there is none.

        Args:
            prompts, completions: texts or messages, n of each. completion_ids: not read.
            trainer_state, log_metric, log_extra: TRL's, where it has them.
            columns: further columns of the data; that of the guard's groups is read.
        Raises:
            InputError: texts that cannot be read, or the column of the groups is missing; nothing is scored.
            CalibrationError: at the end of a baseline of steps, with too few prompts in it.
        """
        if len(prompts) != len(completions):
            raise InputError(f"{len(prompts)} prompts and {len(completions)} completions: expected as many of each")
        self._begin(trainer_state)
        pairs = [_split(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        rows = [i for i, pair in enumerate(pairs) if pair is not None]
        items = [pair for pair in pairs if pair is not None]
        rewards: list[float | None] = [None] * len(prompts)
        extra: dict[str, list[Any]] = {name: [None] * len(prompts) for name in _EXTRA}
        metrics: dict[str, float] = {}
        if items:
            keys = [_key(prompts[i]) for i in rows]
            groups = self._groups(columns, rows)
            decisions = self._check(items, keys, groups)
            flags = decisions.is_ood if self.axis is None else decisions.axis(self.axis).is_ood
            with self._lock:
                collecting = bool(self._steps_left)
                if collecting:
                    self._collect(items, keys, groups, decisions.rewards)
            given, metrics = self._judge(decisions, flags, keys, collecting)
            columns_of = (
                verdict_scores(decisions, self.axis),
                decisions.p_values if self.axis is None else decisions.axis(self.axis).p_values,
                flags.astype(float),
                decisions.rewards,
            )
            for place, i in enumerate(rows):
                rewards[i] = _finite(given[place])
                for name, values in zip(_EXTRA, columns_of, strict=True):
                    extra[name][i] = _finite(values[place])
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
        return rewards

    @property
    def alarmed(self) -> bool:
        """This process' monitor has alarmed (its lifetime alarm)."""
        return self.monitor is not None and self.monitor.state.alarm

    # -- inside

    def _begin(self, trainer_state: Any) -> None:
        """Count the call, and end the baseline, or start the monitor, when it is time."""
        with self._lock:
            step = self.calls if trainer_state is None else int(trainer_state.global_step)
            self.calls += 1
            if self._steps_left and step >= self._until:
                self._take_baseline(step)
            if not self._steps_left and self.monitor is None:
                self.monitor = self._new_monitor()

    def _take_baseline(self, step: int) -> None:
        if self.calls == 1:
            raise CalibrationError(
                f"baseline={self._until}: the first call is at step {step}, when the initial policy's rollouts are gone. Save "
                "the guard once it has its baseline (reward.guard.save_pretrained), and go on with that guard and no baseline"
            )
        rows = [row for part in _gather(list(self._rows.values())) for row in part]
        try:
            self.guard.calibrate(rows, progress=False)
        except CalibrationError as error:
            raise CalibrationError(
                f"baseline={self._until}: the first steps' rollouts answered {len(rows)} prompts. {error}"
            ) from error
        self._penalty = self._new_penalty()
        self._rows.clear()
        self._steps_left = 0

    def _new_penalty(self) -> RewardPenalty:
        return RewardPenalty.of(self.guard, axis=self.axis, strength=self._strength, cap=self._cap)

    def _new_monitor(self) -> TrafficMonitor:
        axes = None if self.axis is None else [self.axis]
        return self.guard.monitor(axes=axes, **{"workers": _processes(), **self._monitor_settings})

    def _check(self, items: list[tuple[Any, Any]], keys: list[str], groups: list[str] | None) -> Decisions:
        # Apart from the guard's own look at its traffic, which would count every answer to a prompt.
        scoring = self.guard.scoring()
        prompts, responses = [prompt for prompt, _ in items], [response for _, response in items]
        call = read_call(
            prompts, responses, self.guard.config, tools=self._tools, template_kwargs=self._template_kwargs
        )
        scored, part = scoring.score(scoring.encode(call.items))
        index = np.unique(keys, return_inverse=True)[1].astype(np.int64)
        return scoring.state.decide(scored, part, groups=groups, prompt_index=index)

    def _groups(self, columns: Mapping[str, Any], rows: list[int]) -> list[str] | None:
        name = self.guard.config.groups
        if name in (None, LENGTH):
            return None
        if name not in columns:
            raise InputError(f"the guard is calibrated by {name!r}: the training data need that column")
        return [str(columns[name][i]) for i in rows]

    def _judge(
        self, decisions: Decisions, flags: Bools, keys: list[str], collecting: bool
    ) -> tuple[Floats, dict[str, float]]:
        """Rewards by the mode, NaN for none, and the metrics."""
        raw = given = decisions.rewards
        if self.mode == "penalize" and not collecting:
            given = self._penalty.apply(decisions, neutral=self.neutral)
        elif self.mode == "abstain" and not collecting:
            given = np.where(flags, np.nan, raw)
        scores = verdict_scores(decisions, self.axis)
        metrics = {
            "ood/reward_mean": _mean(raw),
            "ood/score_mean": _mean(scores),
            "ood/flag_frac": float(flags.mean()),
            "ood/penalty_mean": _mean(raw - given) if self.mode == "penalize" else 0.0,
            "ood/baseline": float(collecting),
        }
        monitor = self.monitor
        if monitor is not None:
            axes = decisions.axes if self.axis is None else {self.axis: decisions.axis(self.axis)}
            state = monitor.update(
                {axis: one.ood_scores for axis, one in axes.items()},
                sessions=keys if self.session == "prompt" else [f"{self.calls} {key}" for key in keys],
                flags=flags,
            )
            metrics["ood/log10_evidence"] = float(np.log10(np.clip(state.e_value, 1e-300, 1e300)))
            metrics["ood/alarm"] = float(state.alarm)
        return given, metrics

    def _collect(
        self, items: list[tuple[Any, Any]], keys: list[str], groups: list[str] | None, rewards: Floats
    ) -> None:
        beside = {"tools": self._tools, "chat_template_kwargs": self._template_kwargs}
        for i, (prompt, response) in enumerate(items):
            if np.isfinite(rewards[i]) and keys[i] not in self._rows:
                row = {"prompt": prompt, "response": response, **{k: v for k, v in beside.items() if v}}
                self._rows[keys[i]] = row if groups is None else {**row, str(self.guard.config.groups): groups[i]}

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: value for name, value in self.__dict__.items() if name != "_lock"}
        # A pickled guard leaves its model behind; a pickled reward is nothing without it.
        return {**kept, "model": self.guard.model, "tokenizer": self.guard.tokenizer}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        model, tokenizer = saved.pop("model"), saved.pop("tokenizer")
        self.__dict__.update(saved)
        self.guard = self.guard.on(model, tokenizer)
        self._lock = threading.Lock()


_EXTRA = ("ood_score", "ood_p_value", "ood_flag", "ood_reward")


def alarm_callback(reward: OODReward, action: str = "stop") -> Any:
    """A callback that ends training, or warns, at the step at which the reward's monitor alarms on any process.

    All processes stop at the same step: they agree on it by a collective call at each step's end.

    Args:
        reward: the one among `reward_funcs`.
        action: `"stop"` (and warn) or `"warn"`.
    Returns:
        A `transformers.TrainerCallback`.
    Raises:
        InputError: another action; in training, a reward that was not called in this process (trainers that call it in
            another one have their monitor there).
    """
    from transformers import TrainerCallback

    if action not in ACTIONS:
        raise InputError(f"action={action!r}: expected one of {ACTIONS}")

    class AlarmCallback(TrainerCallback):  # type: ignore[misc]
        """See `alarm_callback`."""

        warned = False

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            """Stop or warn."""
            told = _gather((reward.calls > 0, reward.alarmed))
            if not any(called for called, _ in told):
                raise InputError(
                    "alarm_callback: the reward was never called in this process. Is it among reward_funcs? A trainer that calls "
                    "it elsewhere, such as AsyncGRPOTrainer, cannot be stopped from here"
                )
            if not any(alarmed for _, alarmed in told):
                return control
            if not self.warned:
                self.warned = True
                here = None if reward.monitor is None else reward.monitor.state.message
                what = "stopped" if action == "stop" else "alarm"
                warnings.warn(
                    f"{what} at step {state.global_step}: {here or 'the monitor of another process alarmed'}",
                    CalibrationWarning,
                    stacklevel=2,
                )
            if action == "stop":
                control.should_training_stop = True
            return control

    return AlarmCallback()


def guard_at_end(
    dataset: Any, *, calibration: Any = 0.3, folder: str = "guard", overwrite: bool = True, **config: Any
) -> Any:
    """A callback for RewardTrainer: fits a guard on the trained model and saves it to `<output_dir>/<folder>`.

    Calibration prompts should not be prompts that the model was trained on: pass the evaluation data. Plain text is read
    without an end token unless `append_eos=True` (as RewardTrainer trains) is passed; a guard for GRPO on plain text wants
    `special_tokens=False` instead (as GRPOTrainer scores). The fit takes the model out of the trainer's mixed precision, and
    runs on the first process: a long one may outlast the time that others wait at their next collective call.

    Args:
        dataset: preference rows before tokenisation, such as the training data.
        calibration: as in `OODGuard.fit`.
        folder, overwrite: where, below the trainer's `output_dir`, and whether another guard there is replaced.
        config: settings of `OODGuard`.
    Returns:
        A `transformers.TrainerCallback`; its attribute `guard` is the fitted guard afterwards. Where the fit or the save
        fails it warns and `guard` is None: the trained model is not lost for it.
    Raises:
        InputError: as training begins, under FSDP or DeepSpeed, where one process does not have the model.
    """
    from transformers import TrainerCallback

    class GuardCallback(TrainerCallback):  # type: ignore[misc]
        """See `guard_at_end`."""

        guard: OODGuard | None = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Refuse what would fail hours later."""
            if getattr(args, "deepspeed", None) or getattr(args, "fsdp", None):
                raise InputError(
                    "guard_at_end: under FSDP or DeepSpeed no process has the whole model. Fit after training: load the saved "
                    "model and call OODGuard(model, tokenizer).fit(dataset)"
                )

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Fit and save."""
            if not state.is_world_process_zero:
                return
            from accelerate.utils import extract_model_from_parallel

            # Without the trainer's autocast: that is how the saved model is served.
            model = extract_model_from_parallel(kwargs["model"], keep_fp32_wrapper=False)
            try:
                with eval_mode(model, switch=True):
                    guard = OODGuard(model, kwargs["processing_class"], **config)
                    guard.fit(dataset, calibration=calibration, progress=False)
                    guard.save_pretrained(Path(args.output_dir) / folder, overwrite=overwrite)
            except OODGuardError as error:
                warnings.warn(f"training ended, but no guard was saved: {error}", CalibrationWarning, stacklevel=2)
                return
            self.guard = guard

    return GuardCallback()


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


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _gather(value: Any) -> list[Any]:
    """One value of each process, on all of them; every process has to call."""
    n = _processes()
    if n == 1:
        return [value]
    found: list[Any] = [None] * n
    dist.all_gather_object(found, value)
    return found
