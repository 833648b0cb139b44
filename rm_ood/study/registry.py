"""Shifts by name: one decorated function is one shift, on the sides and at the severities that it declares.

The function sees plain texts; what stands around them (messages, `Human:`/`Assistant:` turns, tools, text blocks) is taken
apart and put together here, so no shift touches a role.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rm_ood.dialogue import Response, Text
from rm_ood.errors import InputError
from rm_ood.preferences import stable_hash
from rm_ood.rewriting import change_prompt, change_response, prompt_texts
from rm_ood.study.pairs import Pair

SIDES = ("prompt", "response", "both")

# (n,) prompts, (n,) responses -> (n,) rewards
Reward = Callable[[Sequence[Text], Sequence[Response]], ArrayLike]


@dataclass(frozen=True)
class ShiftContext:
    """What a shift may use.

    Attributes:
        side: `"prompt"`, `"response"` or `"both"`.
        severity: the number asked for; None for a shift that has none.
        seed: of all randomness; join it with the text (`random_for`), and the same text gets the same change wherever it
            stands.
        words: vocabulary to draw from: the caller's, or the words of the clean rows.
        rows: the clean rows.
        reward: prompts and responses in, (n,) rewards out; None where the caller gave none.
    """

    side: str
    severity: float | None = None
    seed: int = 0
    words: Sequence[str] = ()
    rows: Sequence[Pair] = field(default=(), repr=False)
    reward: Reward | None = None

    @property
    def strength(self) -> float:
        """The severity of a shift that declares severities.

        Raises:
            InputError: none was given.
        """
        if self.severity is None:
            raise InputError("this shift needs a severity: declare severities=(...) in @shift, or ask for one")
        return self.severity

    def random_for(self, text: str) -> random.Random:
        """A random state that depends on the seed and the text alone."""
        return random.Random(stable_hash(text, self.seed))

    def rewards(self, prompts: Sequence[Text], responses: Sequence[Response]) -> NDArray[np.float64]:
        """Rewards, (n,) float64.

        Raises:
            InputError: no reward function, or one that gave another number of rewards or a number that is not finite.
        """
        if self.reward is None:
            raise InputError("this shift asks the reward model: pass reward=")
        values = np.asarray(self.reward(prompts, responses), dtype=np.float64)
        if values.shape != (len(responses),) or not np.isfinite(values).all():
            raise InputError(
                f"reward: expected {len(responses)} finite rewards, got shape {values.shape}"
                f"{'' if np.isfinite(values).all() else ' with NaN or infinity'}"
            )
        return values


TextShift = Callable[[str, ShiftContext], str]
RowShift = Callable[[list[Pair], ShiftContext], list[Pair]]


@dataclass(frozen=True)
class Shift:
    """One registered shift.

    Attributes:
        name: how it is asked for.
        function: text to text, or with `rows` all pairs to all pairs.
        sides: the sides that it can change.
        severities: those of a study, weakest first; empty for a shift without severity.
        highest: largest severity that makes sense; 0 is no change.
        rows: whether the function takes all rows at once.
        needs_reward: whether it asks the reward model.
        paired: whether chosen over rejected still means anything after it.
    """

    name: str
    function: TextShift | RowShift
    sides: tuple[str, ...] = SIDES
    severities: tuple[float, ...] = ()
    highest: float = 1.0
    rows: bool = False
    needs_reward: bool = False
    paired: bool = True

    def __call__(self, rows: Sequence[Pair], context: ShiftContext) -> list[Pair]:
        """The rows shifted; ids, clusters and subsets stay, whatever the function did to them.

        Raises:
            InputError: a side or severity that the shift has not, a function that returned something else, a prompt left
                without text, or rows of which not one changed.
        """
        self.check(context.side, context.severity)
        context = replace(context, rows=rows)
        if self.rows:
            found: list[Pair] = self.function(list(rows), context)  # type: ignore[arg-type, assignment]
            if not isinstance(found, list) or len(found) != len(rows):
                raise InputError(f"shift {self.name!r}: expected {len(rows)} rows in a list back, got {_size(found)}")
        else:
            change = self._text(context)
            found = [map_texts(row, change, context.side) for row in rows]
        kept = [
            replace(new, id=row.id, cluster=row.cluster, subset=row.subset)
            for row, new in zip(rows, found, strict=True)
        ]
        for clean, row in zip(rows, kept, strict=True):
            if prompt_texts(clean.prompt) and not prompt_texts(row.prompt):
                raise InputError(f"shift {self.name!r}: left no text in the prompt of row {row.id!r}")
        if context.severity != 0 and kept == list(rows):
            raise InputError(
                f"shift {self.name!r} ({context.side}, severity {context.severity}): changed none of {len(rows)} rows. "
                "It does not apply to this text, or is too weak for so few rows."
            )
        return kept

    def check(self, side: str, severity: float | None) -> None:
        """Whether the shift has this side and severity.

        Raises:
            InputError: it has not.
        """
        if side not in self.sides:
            raise InputError(f"shift {self.name!r}: side {side!r}: it changes {', '.join(self.sides)}")
        if severity is None and self.severities:
            raise InputError(f"shift {self.name!r}: needs a severity, such as {self.severities[0]}")
        if severity is not None and not self.severities:
            raise InputError(f"shift {self.name!r}: has no severities, got {severity}")
        if severity is not None and not 0 <= severity <= self.highest:
            raise InputError(f"shift {self.name!r}: severity {severity}: expected 0 to {self.highest:g}")

    def _text(self, context: ShiftContext) -> Callable[[str], str]:
        known: dict[str, str] = {}

        def change(text: str) -> str:
            # A text that stands in several rows is changed once, and so alike, whatever the function draws from.
            if text not in known:
                new = self.function(text, context)  # type: ignore[arg-type]
                if not isinstance(new, str):
                    raise InputError(f"shift {self.name!r}: expected a text back, got {type(new).__name__}")
                known[text] = new
            return known[text]

        return change


_SHIFTS: dict[str, Shift] = {}


def shift(
    name: str,
    *,
    sides: Sequence[str] = SIDES,
    severities: Sequence[float] = (),
    highest: float = 1.0,
    rows: bool = False,
    needs_reward: bool = False,
    paired: bool = True,
) -> Callable[[Any], Any]:
    """Register the decorated function as the shift `name`; the arguments are `Shift`'s.

    ```python
    @shift("shouting", severities=(0.5, 1.0))
    def shouting(text: str, context: ShiftContext) -> str:
        rng = context.random_for(text)
        return " ".join(w.upper() if rng.random() < context.strength else w for w in text.split(" "))
    ```

    Raises:
        InputError: a name that is taken or holds a colon or `=`, a side that is none.
    """
    wrong = sorted(set(sides) - set(SIDES))
    if wrong or not sides:
        raise InputError(f"shift {name!r}: sides {wrong}: expected some of {SIDES}")
    if not name or set(name) & set(":="):
        raise InputError(f"shift {name!r}: a name has neither ':' nor '='")

    def register(function: Any) -> Any:
        taken = _SHIFTS.get(name)
        if taken is not None and _source(taken.function) != _source(function):
            raise InputError(f"shift {name!r}: the name is taken, by {_source(taken.function)}")
        _SHIFTS[name] = Shift(
            name, function, tuple(sides), tuple(severities), highest, rows, needs_reward, paired
        )  # fmt: skip
        return function

    return register


def registered_shifts() -> dict[str, Shift]:
    """Every registered shift by name."""
    return dict(_SHIFTS)


def map_texts(row: Pair, change: Callable[[str], str], side: str) -> Pair:
    """The row with every text of a side changed; white space at the ends of a text, and empty texts, stay."""
    prompt = row.prompt if side == "response" else change_prompt(row.prompt, change)
    if side == "prompt":
        return replace(row, prompt=prompt)
    chosen, *rejected = (change_response(response, change) for response in row.responses)
    return replace(row, prompt=prompt, chosen=chosen, rejected=tuple(rejected))


def _source(function: Any) -> str:
    return f"{function.__name__} in {function.__code__.co_filename}"


def _size(value: Any) -> str:
    return f"{type(value).__name__} of {len(value)}" if hasattr(value, "__len__") else type(value).__name__
