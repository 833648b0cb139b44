"""Callbacks of TRL's trainers: one ends the run on the reward's alarm, one fits a guard as RewardTrainer ends."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Protocol

from rm_ood.errors import CalibrationWarning, InputError, OODGuardError, OODGuardWarning, SaveError
from rm_ood.guard import OODGuard
from rm_ood.integrations.passes import PassMonitor
from rm_ood.integrations.processes import gather
from rm_ood.reward_model import eval_mode

ACTIONS = ("stop", "warn")


class Watched(Protocol):
    """What is read of an `OODReward`."""

    __name__: str
    calls: int
    monitor: PassMonitor | None

    @property
    def alarmed(self) -> bool:
        """This process' monitor has alarmed."""

    def save_monitor(self, path: Path) -> None:
        """Keep the monitor in a file."""

    def resume_monitor(self, path: Path) -> None:
        """Go on from there, unless the monitor here has seen as much."""


def alarm_callback(reward: Watched, action: str = "stop") -> Any:
    """A callback that ends training, or warns, at the step at which the reward's monitor alarms on any process.

    All processes stop at the same step: they agree on it by a collective call at each step's end.

    Each checkpoint has the monitors of all processes (`<reward's name>_monitor_<process>.json`), and a run that goes on from
    one goes on with them: its promise is for the whole run. Where that cannot be, as without the file, with another
    calibration or another number of processes, a warning says that the monitor begins anew. The checkpoint is looked for
    where the trainer's arguments say (`resume_from_checkpoint`), else in their `output_dir`. A monitor that lives on in this
    process, and has seen more than the checkpoint's, is kept with its alarm: a run that it stopped, gone on with, stops again
    at its first step. A new `OODReward` has no such past.

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

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Go on with the monitor of the checkpoint that the run goes on from; an alarm is told in each run."""
            self.warned = False
            if not state.global_step:
                return
            files = [folder / _file(reward, args) for folder in _checkpoints(args, state)]
            try:
                reward.resume_monitor(next((file for file in files if file.exists()), files[0]))
            except (FileNotFoundError, OODGuardError) as error:
                # One that has lived on in this process has seen what came before.
                if reward.monitor is None:
                    warnings.warn(
                        f"the run goes on at step {state.global_step}, and its monitor begins anew: {error}",
                        CalibrationWarning,
                        stacklevel=2,
                    )

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Put the monitor beside the checkpoint."""
            try:
                reward.save_monitor(_checkpoints(args, state)[-1] / _file(reward, args))
            except SaveError as error:  # No reason to lose the run.
                warnings.warn(str(error), OODGuardWarning, stacklevel=2)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            """Stop or warn."""
            told = gather((reward.calls > 0, reward.alarmed))
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


def _checkpoints(args: Any, state: Any) -> list[Path]:
    """Folders that may hold the checkpoint of this step; that of this run is the last."""
    own, asked = Path(args.output_dir) / f"checkpoint-{state.global_step}", args.resume_from_checkpoint
    return [Path(asked), own] if isinstance(asked, str) else [own]


def _file(reward: Watched, args: Any) -> str:
    return f"{reward.__name__}_monitor_{args.process_index}.json"


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
        fails, by whatever error, it warns and `guard` is None: the trained model is not lost for it.
    Raises:
        InputError: a setting that there is not or is out of range, at once; as training begins, under FSDP or DeepSpeed,
            where one process does not have the model.
    """
    from transformers import TrainerCallback

    # A misspelt setting is refused before hours of training, not after them.
    OODGuard(None, None, **config)

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

            try:
                # Without the trainer's autocast: that is how the saved model is served.
                model = extract_model_from_parallel(kwargs["model"], keep_fp32_wrapper=False)
                with eval_mode(model, switch=True):
                    guard = OODGuard(model, kwargs["processing_class"], **config)
                    guard.fit(dataset, calibration=calibration, progress=False)
                    guard.save_pretrained(Path(args.output_dir) / folder, overwrite=overwrite)
            except Exception as error:  # Whatever it is, a trainer that raises here has not saved its model.
                warnings.warn(
                    f"training ended, but no guard was saved: {type(error).__name__}: {error}. Save the model, load it and call "
                    "OODGuard(model, tokenizer).fit(dataset)",
                    CalibrationWarning,
                    stacklevel=2,
                )
                return
            self.guard = guard

    return GuardCallback()
