"""`TrafficMonitor`: does the traffic still look like the calibration data? An alarm that may be watched for ever.

Two alarms by the same bets (`rm_ood.bets`), both tails of the score: a policy that collapses onto one phrase has small
scores, not large ones. The flag rate is watched beside them (`rm_ood.flag_rate`). A request costs a few microseconds among
many, a tenth of a millisecond alone; memory does not grow.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rm_ood.bets import RATIOS, PolyaBets, tie_keys
from rm_ood.conformal import ALL, check_alpha, check_confidence, guaranteed_rank, ranks, scores_digest
from rm_ood.errors import FormatError, InputError, MismatchError
from rm_ood.flag_rate import BudgetBets, default_budget
from rm_ood.monitor_file import MAX_SESSIONS, read_monitor, write_monitor
from rm_ood.monitor_inputs import number, one_column, session_key
from rm_ood.monitor_state import AxisEvidence, Change, MonitorState, Verdicts
from rm_ood.strict_json import canonical_json

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


class TrafficMonitor:
    """Anytime-valid alarms on a stream of OOD scores, exact for a fixed calibration set.

    - **lifetime**: P(ever alarming on clean traffic) <= 1 / `lifetime`.
    - **recurring**: mean time to a false alarm >= `recurring` items, P(one within T items) <= T / `recurring`; it begins
      anew after each alarm.
    - **flag rate**: P(ever alarming while no item's chance of a flag exceeds `budget`) <= 1 / `lifetime`; a time-uniform
      band for the rate.

    "Clean" means that calibration and traffic are exchangeable: independent items from one law. Items of one user, prompt or
    session are not independent; give them a session key, and one of each session is betted on. What breaks the promise
    otherwise: traffic that differs from the calibration data by design, a reward model that was changed, a monitor per
    worker without `workers`. With n calibration scores the evidence is bounded: a small change from the first item on may
    never be found, and a slow drift is absorbed by the first two alarms, but not by the third.

    Several axes: each has evidence in its own history only, and a mean of such evidence promises nothing. The alarm is
    therefore the largest axis at the threshold times their number (twice that for the recurring one), by a union bound.

    Args:
        calibration: (n,) OOD scores of held-out in-distribution inputs, one per prompt, +inf allowed; or axis -> scores.
        lifetime, recurring: see above; larger than 1.
        alpha: level of the flags.
        confidence: of the monitor's own flags; it flags by itself on one axis where n is large enough for `alpha`.
        budget: tolerated flag rate, a fraction in (0, 1). By default alpha; without a confidence, what the rate of flags that
            hold alpha on average stays within for 95 % of calibration sets.
        workers: monitors that run side by side on shares of the traffic; each threshold is multiplied by it, and T counts the
            items of one worker.
        ratios: inflations of the tail rates that are betted on; the smallest is the tolerance.
        session_memory: sessions that are remembered, at most 1,000,000; one that was not seen for so many others counts
            again.
        seed: of the tie-breaks.

    Raises:
        InputError: a setting out of range.
        CalibrationError: fewer than 4 calibration scores, or NaN or -inf among them.

    Reference:
        Choe, Ramdas, "Combining evidence across filtrations", 2024 (arXiv 2402.09698): why axes are not averaged.
    """

    def __init__(
        self,
        calibration: ArrayLike | Mapping[str, ArrayLike],
        *,
        lifetime: float = 100.0,
        recurring: float = 1e6,
        alpha: float = 0.01,
        confidence: float | None = 0.95,
        budget: float | None = None,
        workers: int = 1,
        ratios: Sequence[float] = RATIOS,
        session_memory: int = 65_536,
        seed: int = 0,
    ) -> None:
        alpha, lifetime, recurring = (
            number("alpha", alpha),
            number("lifetime", lifetime),
            number("recurring", recurring),
        )
        confidence = None if confidence is None else number("confidence", confidence)
        budget = None if budget is None else number("budget", budget)
        ratios = tuple(number("ratios", ratio) for ratio in ratios)
        check_alpha(alpha)
        check_confidence(confidence)
        if not (1 < lifetime < np.inf and 1 < recurring < np.inf):
            raise InputError(f"lifetime={lifetime}, recurring={recurring}: expected finite numbers above 1")
        if budget is not None and not 0 < budget < 1:
            raise InputError(f"budget={budget}: expected a fraction in (0, 1)")
        if not ratios or not all(1 < ratio < np.inf for ratio in ratios) or min(ratios) * 0.2 >= 0.9:
            raise InputError(f"ratios={ratios}: expected numbers above 1, the smallest below 4.5")
        whole = {"workers": workers, "session_memory": session_memory}
        if not all(isinstance(count, (int, np.integer)) and count >= 1 for count in whole.values()):
            raise InputError(f"{whole}: expected whole numbers of at least 1")
        if session_memory > MAX_SESSIONS:
            raise InputError(
                f"session_memory={session_memory}: expected at most {MAX_SESSIONS}, so that the state can be saved"
            )
        if not isinstance(seed, (int, np.integer)):
            raise InputError(f"seed={seed!r}: expected a whole number")
        self._settings: dict[str, Any] = {
            "lifetime": lifetime, "recurring": recurring, "alpha": alpha, "confidence": confidence,
            "budget": budget, "workers": int(workers), "ratios": list(ratios), "session_memory": int(session_memory),
            "seed": int(seed),
        }  # fmt: skip
        given = calibration if isinstance(calibration, Mapping) else {ALL: calibration}
        if not given:
            raise InputError("calibration: got no axis")
        self._bets = {
            str(axis): PolyaBets(np.asarray(values), ratios, 2 * int(seed)) for axis, values in sorted(given.items())
        }
        axes = len(self._bets)
        self._lifetime = lifetime * int(workers)
        self._recurring = recurring * int(workers)
        # A union of P(alarm by T) <= T / A over the axes leaves a mean time of A / 2 only.
        self._joined = axes, 1 if axes == 1 else 2 * axes
        n = min(bets.calibration.size for bets in self._bets.values())
        tolerated = default_budget([n], alpha, confidence) if budget is None else budget
        self._flag_bets = BudgetBets(tolerated, ratios, self._lifetime)
        self._own_k = guaranteed_rank(n, alpha, confidence) if axes == 1 else 0
        self._requests = self._counted = self._unscored = self._alarms = 0
        self._alarm_at: int | None = None
        self._last_alarm: int | None = None
        self._alarm_of: Change | None = None
        self._last_alarm_of: Change | None = None
        # Axis -> digest of the calibration that the watched verdicts were made on.
        self._watched: dict[str, str] | None = None
        self._sessions: OrderedDict[int, None] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def calibration(self) -> dict[str, Floats]:
        """Axis -> calibration scores in ascending order; `"all"` where there is one axis without a name."""
        return {axis: bets.calibration for axis, bets in self._bets.items()}

    @property
    def digest(self) -> str:
        """SHA-256 of calibration and settings; monitors with the same one may go on from each other's states."""
        content = {"settings": self._settings, "axes": self._digests()}
        return hashlib.sha256(canonical_json(content).encode()).hexdigest()

    @property
    def state(self) -> MonitorState:
        """Where the monitor stands; `recurring_alarm` is False, since nothing was updated."""
        with self._lock:
            return self._state(False)

    def update(
        self,
        scores: ArrayLike | Mapping[str, ArrayLike],
        *,
        sessions: Sequence[Hashable | None] | None = None,
        flags: ArrayLike | None = None,
    ) -> MonitorState:
        """Take m items in the order they came; how they are cut into updates changes nothing.

        Args:
            scores: one score, (m,) scores, or axis -> (m,); in the unit of the calibration. NaN and infinities count as the
                largest: what cannot be scored is never normal.
            sessions: (m,) keys (strings, numbers or bytes); the first item of a session is betted on, further ones are only
                counted. None: a session of its own.
            flags: (m,) bool, the guard's verdicts; without them the monitor flags by itself where it can.
        Raises:
            InputError: axes other than those of the calibration, or lengths that differ; nothing is counted then.
        """
        given = scores if isinstance(scores, Mapping) else {ALL: scores}
        if set(given) != set(self._bets):
            raise InputError(f"scores of axes {sorted(given)}: this monitor was calibrated on {sorted(self._bets)}")
        table = {axis: one_column(values, axis) for axis, values in given.items()}
        m = next(iter(table.values())).size
        marks = None if flags is None else np.asarray(flags)
        sizes = {axis: values.size for axis, values in table.items()}
        sizes |= {"sessions": m if sessions is None else len(sessions), "flags": m if marks is None else marks.size}
        if len(set(sizes.values())) != 1:
            raise InputError(f"lengths differ: {sizes}")
        if marks is not None and m and marks.dtype != np.bool_:
            raise InputError(f"flags: expected bool, got {marks.dtype}")
        if isinstance(sessions, (str, bytes)):
            raise InputError(f"sessions: expected a list of keys, one per item, got {type(sessions).__name__}")
        keys = None if sessions is None else [session_key(key) for key in sessions]
        with self._lock:
            rows = np.arange(m) if keys is None else self._representatives(keys)
            return self._play(table, rows, None if marks is None else marks.reshape(-1))

    def watch(self, decisions: Verdicts, sessions: Sequence[Hashable | None] | None = None) -> MonitorState:
        """Take a guard's verdicts: the axes' scores, and the flags.

        Args:
            decisions: `Decisions` of the guard that the monitor comes from.
            sessions: as in `update`, one key per item. Without them each prompt of the call is a session: several answers to
                one prompt are not independent. A prompt that comes back in another call counts again. Verdicts on
                vectors or tensors know their prompts where they were made with `prompts=`; otherwise pass keys.
        Raises:
            MismatchError: the guard has been calibrated anew since the verdicts that were watched before.
            InputError: as in `update`, or an axis is missing.
        """
        missing = sorted(set(self._bets) - set(decisions.axes))
        if missing:
            raise InputError(f"decisions on {sorted(decisions.axes)}: this monitor watches {missing} too")
        self._same_calibration(decisions)
        table = {axis: np.asarray(decisions.axes[axis].ood_scores) for axis in self._bets}
        if sessions is None:
            first = np.sort(np.unique(decisions.prompt_index, return_index=True)[1])
            table = {axis: values[first] for axis, values in table.items()}
            return self.update(table, flags=decisions.is_ood[first])
        return self.update(table, sessions=sessions, flags=decisions.is_ood)

    def bind(self, calibrations: Mapping[str, str]) -> Self:
        """Take verdicts of one calibration only: axis -> its digest, `AxisDecisions.calibration`.

        `guard.monitor` does this; otherwise the first verdicts that are watched do.
        """
        self._watched = {axis: calibrations[axis] for axis in self._bets}
        return self

    def _same_calibration(self, decisions: Verdicts) -> None:
        found = {axis: getattr(decisions.axes[axis], "calibration", "") for axis in self._bets}
        if not all(found.values()):
            return
        with self._lock:
            if self._watched is None:
                self._watched = found
            other = sorted(axis for axis in found if found[axis] != self._watched[axis])
        if other:
            raise MismatchError(
                f"verdicts on {other} were made on another calibration than this monitor watches: scores before and after "
                "calibrate() or fit() do not compare. Start a new monitor: guard.monitor()"
            )

    def _representatives(self, keys: list[int | None]) -> NDArray[np.int64]:
        rows = []
        for row, key in enumerate(keys):
            if key is None:
                rows.append(row)
            elif key in self._sessions:
                self._sessions.move_to_end(key)
            else:
                self._sessions[key] = None
                rows.append(row)
                if len(self._sessions) > self._settings["session_memory"]:
                    self._sessions.popitem(last=False)
        return np.array(rows, dtype=np.int64)

    def _play(self, table: Mapping[str, Floats], rows: NDArray[np.int64], flags: Bools | None) -> MonitorState:
        m = next(iter(table.values())).size
        unscored = ~np.logical_and.reduce([np.isfinite(values) for values in table.values()])
        self._requests += m
        self._unscored += int(unscored.sum())
        ever, often = self._joined
        keys = tie_keys(rows.size, self._counted, 2 * self._settings["seed"] + 1)
        fired = np.zeros(rows.size, dtype=bool)
        first: tuple[int, Change] | None = None
        last: tuple[int, Change] | None = None
        for axis, bets in self._bets.items():
            e, recent = bets.advance(table[axis][rows], keys, self._recurring * often, self._lifetime * ever)
            reached = np.flatnonzero(e >= self._lifetime * ever)
            if bets.reached_side is not None and (first is None or reached[0] < first[0]):
                first = int(reached[0]), Change(axis, bets.reached_side)
            at = np.flatnonzero(recent >= self._recurring * often)
            if bets.fired_side is not None and (last is None or at[-1] > last[0]):
                last = int(at[-1]), Change(axis, bets.fired_side)
            fired[at] = True
        if self._alarm_at is None and first is not None:
            self._alarm_at, self._alarm_of = self._counted + first[0] + 1, first[1]
        if last is not None:
            self._alarms += int(fired.sum())
            self._last_alarm, self._last_alarm_of = self._counted + last[0] + 1, last[1]
        self._counted += rows.size
        if flags is None and self._own_k:
            (bets,) = self._bets.values()
            flags = ranks(bets.calibration, table[next(iter(table))]) <= self._own_k
        if flags is not None:
            self._flag_bets.advance(flags[rows])
        return self._state(bool(fired.any()))

    def _state(self, fired: bool) -> MonitorState:
        axes = {
            axis: AxisEvidence(
                e_value=bets.wealth.evidence,
                recurring_value=bets.wealth.recent_evidence,
                higher=bets.wealth.evidence_of(bets.high),
                lower=bets.wealth.evidence_of(bets.low),
            )
            for axis, bets in self._bets.items()
        }
        ever, often = self._joined
        flags = self._flag_bets.state
        return MonitorState(
            requests=self._requests,
            counted=self._counted,
            unscored=self._unscored,
            e_value=max(axis.e_value for axis in axes.values()) / ever,
            threshold=self._lifetime,
            alarm=self._alarm_at is not None,
            alarm_at=self._alarm_at,
            alarm_of=self._alarm_of,
            recurring_value=max(axis.recurring_value for axis in axes.values()) / often,
            recurring_threshold=self._recurring,
            recurring_alarm=fired,
            recurring_alarms=self._alarms,
            last_recurring_at=self._last_alarm,
            last_recurring_of=self._last_alarm_of,
            axes=axes,
            flag_rate=flags if flags.n or self._own_k else None,
        )

    # -- life

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a file, atomically: a crash leaves the old file or the new one.

        The state is that of the moment of writing, after any wait for another saver. One path for each worker: a file holds
        one monitor, the last that was saved.

        Raises:
            SaveError: the disk refuses, or another process has been saving here for a minute.
        """
        write_monitor(Path(path), self.content)

    def content(self) -> dict[str, Any]:
        """What `save` writes: JSON-able, of this moment."""
        with self._lock:
            return self._content()

    @classmethod
    def open(
        cls, path: str | os.PathLike[str] | None, calibration: ArrayLike | Mapping[str, ArrayLike], **settings: Any
    ) -> Self:
        """The monitor saved at `path` (see `load`); a new one if nothing is there, or `path` is None."""
        if path is not None and Path(path).exists():
            return cls.load(path, calibration, **settings)
        return cls(calibration, **settings)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], calibration: ArrayLike | Mapping[str, ArrayLike], **settings: Any
    ) -> Self:
        """The monitor that `save` wrote; it goes on bit for bit as if it had never stopped.

        Args:
            calibration: the same calibration scores.
            **settings: those that must be as they were saved.
        Raises:
            FileNotFoundError: no such file.
            FormatError, IntegrityError: not a monitor's state, or a changed or cut one.
            MismatchError: another calibration, or other settings; names which.
            InputError: a setting that there is not.
        """
        content = read_monitor(Path(path))
        try:
            monitor = cls(calibration, **content["settings"])
            saved = {axis: entry["calibration"] for axis, entry in content["axes"].items()}
        except (KeyError, TypeError, AttributeError, InputError) as error:
            raise FormatError(f"{path}: settings are incomplete or malformed ({error})") from error
        asked = {name: list(value) if name == "ratios" else value for name, value in settings.items()}
        unknown = sorted(set(asked) - set(monitor._settings))
        if unknown:
            raise InputError(f"settings {unknown}: expected some of {sorted(monitor._settings)}")
        if saved != monitor._digests():
            raise MismatchError(
                f"{path}: saved on other calibration scores, axes {sorted(saved)} there and {sorted(monitor._bets)} here. "
                "After calibrate() or fit() start a new monitor"
            )
        other = sorted(name for name, value in asked.items() if monitor._settings[name] != value)
        if other:
            raise MismatchError(f"{path}: saved with other settings: {', '.join(other)}. Start a new monitor for those")
        try:
            monitor._restore(content)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(f"{path}: the state is incomplete or malformed ({error})") from error
        return monitor

    def _content(self) -> dict[str, Any]:
        digests = self._digests()
        return {
            "settings": self._settings,
            "axes": {axis: {"calibration": digests[axis], **bets.to_dict()} for axis, bets in self._bets.items()},
            "flags": self._flag_bets.to_dict(),
            "counts": [self._requests, self._counted, self._unscored, self._alarms],
            "alarm_at": self._alarm_at,
            "alarm_of": self._alarm_of,
            "last_recurring_at": self._last_alarm,
            "last_recurring_of": self._last_alarm_of,
            "watched": self._watched,
            "sessions": list(self._sessions),
        }

    def _restore(self, content: Mapping[str, Any]) -> None:
        for axis, bets in self._bets.items():
            bets.restore(content["axes"][axis])
        self._flag_bets.restore(content["flags"])
        self._requests, self._counted, self._unscored, self._alarms = (int(c) for c in content["counts"])
        self._alarm_at, self._last_alarm = content["alarm_at"], content["last_recurring_at"]
        self._alarm_of, self._last_alarm_of = _change(content["alarm_of"]), _change(content["last_recurring_of"])
        watched = content["watched"]
        self._watched = None if watched is None else {axis: str(watched[axis]) for axis in self._bets}
        self._sessions = OrderedDict.fromkeys(int(key) for key in content["sessions"])

    def _digests(self) -> dict[str, str]:
        return {axis: scores_digest(scores) for axis, scores in self.calibration.items()}

    def __getstate__(self) -> dict[str, Any]:
        # A copy in another process is another monitor: see `workers`.
        with self._lock:
            return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        self.__dict__.update(saved)
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        state = self.state
        return f"TrafficMonitor({list(self._bets)}, {state.counted} items, e_value={state.e_value:.3g}, alarm={state.alarm})"


def _change(saved: Any) -> Change | None:
    return None if saved is None else Change(*map(str, saved))
