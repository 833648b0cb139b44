"""Every error that `rm_ood` raises on purpose, and its warnings.

Messages name the field, what was asked, what came, and the remedy; they never quote the text that was scored.
"""


class OODGuardError(Exception):
    """Base class of every error raised on purpose by `rm_ood`."""


class InputError(OODGuardError, ValueError):
    """A text, row, tensor or option cannot be used as it is."""


class NonFiniteError(InputError):
    """NaN or infinity where a finite number is needed."""


class CalibrationError(OODGuardError, ValueError):
    """Too few or unusable fit or calibration data for the promise that was asked for."""


class NotFittedError(OODGuardError, RuntimeError):
    """The guard or detector has to be fitted or calibrated first."""


class CaptureError(OODGuardError, RuntimeError):
    """The hooks did not see the vector that the reward was read from."""


class WorkerError(OODGuardError, RuntimeError):
    """Another process of a distributed fit failed, or was not heard of any more."""


class EngineError(OODGuardError, RuntimeError):
    """An inference engine, or a served guard, did not answer, or not with what a verdict can be made from."""


class UnavailableError(EngineError):
    """A server could not be reached, was too busy or too slow, or failed, after every retry; another time it may answer.

    Attributes:
        why: `"unreachable"`, `"busy"`, `"timeout"` or `"failed"` (a status from 500).
        retry_after_s: seconds that a busy server asked to wait; None where it named none.
    """

    def __init__(self, message: str, why: str = "failed", retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.why, self.retry_after_s = why, retry_after_s


class FormatError(OODGuardError, ValueError):
    """A saved guard is not in the format that this version reads."""


class IntegrityError(FormatError):
    """A saved guard was changed or cut after it was written."""


class MismatchError(OODGuardError, ValueError):
    """A guard, a reward model and its vectors do not belong together."""


class SaveError(OODGuardError, OSError):
    """A guard could not be written; whatever was there before is untouched."""


class OODGuardWarning(UserWarning):
    """Base class of the warnings of `rm_ood`."""


class CalibrationWarning(OODGuardWarning):
    """The calibration data are few, odd, or do not look like the traffic."""


class TokenisationWarning(OODGuardWarning):
    """Text is tokenised unlike the text that the guard was fitted on, or will be where it is served."""
