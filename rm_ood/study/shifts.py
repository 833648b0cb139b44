"""Shifted versions of clean rows, from short specifications.

`word noise`, `word noise:response`, `word noise:response:0.5` name a registered shift, on one side or all, at one severity
or at those of a study. `FILE.py:function` takes the function of a file, `aligned=FILE` the same rows in another language,
`translate=MODEL` a Marian model that translates them.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rm_ood.errors import InputError
from rm_ood.preferences import stable_hash
from rm_ood.rewriting import prompt_texts, response_texts, word_perturbation
from rm_ood.rewriting import vocabulary as words_of
from rm_ood.study import builtin, rewarding  # noqa: F401  (they register their shifts)
from rm_ood.study.aligned import aligned
from rm_ood.study.noise import paper_word_perturbation
from rm_ood.study.pairs import Pair
from rm_ood.study.registry import (
    SIDES,
    Reward,
    Shift,
    ShiftContext,
    registered_shifts,
    shift,
)
from rm_ood.study.translate import BACK, translated

__all__ = [
    "SIDES",
    "Condition",
    "Shift",
    "ShiftContext",
    "conditions",
    "paper_word_perturbation",
    "registered_shifts",
    "shift",
    "vocabulary",
    "word_perturbation",
]


@dataclass(frozen=True)
class Condition:
    """One shifted version of the clean rows.

    Attributes:
        name: the family, such as `"word noise"` or `"es"`; the severity is apart.
        side: `"prompt"`, `"response"` or `"both"`: what differs from the clean rows.
        severity: the shift's own measure, larger = further; None where it has none.
        rows: the shifted rows; ids, clusters and subsets are the clean rows'.
        paired: whether chosen over rejected still means anything.
    """

    name: str
    side: str
    severity: float | None
    rows: list[Pair]
    paired: bool = True


# Settings of the call -> the conditions of one specification.
_Source = Callable[[], Iterator[Condition]]


def conditions(
    rows: Sequence[Pair],
    specs: Sequence[str],
    *,
    seed: int = 0,
    words: Sequence[str] | None = None,
    reward: Reward | None = None,
) -> Iterator[Condition]:
    """The shifted versions of `rows`, in the order of `specs`, each made when it is asked for.

    Args:
        rows: the clean rows.
        specs: `NAME[:SIDE][:SEVERITY]` of a registered shift; `FILE.py:FUNCTION[:SIDE][:SEVERITY]` of your own;
            `aligned=FILE[:LANG][:SIDE][:common]`, the rows of equal id in a file, `common` where it lacks some of them;
            `translate=MODEL[,MODEL_BACK][:SIDE]`, by a Marian model's name or folder, `back` being a side of its own. Left
            out, a side, severity or language means each that there is.
        seed: of every shift; the same seed and text give the same change.
        words: vocabulary for noise; None takes the words of the rows.
        reward: prompts and responses in, (n,) rewards out, for the shifts that ask the reward model.

    Raises:
        InputError: at once, a specification that names nothing, or a shift that needs a reward and has none; later, what a
            shift itself refuses.
    """
    if not rows:
        raise InputError("rows: none to shift")
    if isinstance(specs, str):
        raise InputError("specs: expected a list of specifications, got one string")
    drawn = vocabulary(rows) if words is None else words
    context = ShiftContext(SIDES[0], None, seed, drawn, rows, reward)
    sources = [_source(spec, context) for spec in specs]
    return (condition for source in sources for condition in source())


def vocabulary(rows: Sequence[Pair]) -> list[str]:
    """The distinct words of the rows that are letters only, lower case, in a fixed order."""
    texts = (text for row in rows for text in (*prompt_texts(row.prompt), *map_responses(row)))
    return words_of(texts)


def map_responses(row: Pair) -> list[str]:
    """The texts of a row's responses."""
    return [text for response in row.responses for text in response_texts(response)]


def _source(spec: str, context: ShiftContext) -> _Source:
    kind, mark, rest = spec.partition("=")
    if mark and kind.strip() == "aligned":
        return _aligned(spec, rest, context)
    if mark and kind.strip() == "translate":
        return _translated(spec, rest, context)
    return _registered(spec, context)


def _aligned(spec: str, rest: str, context: ShiftContext) -> _Source:
    path, *options = _path_and_options(rest)
    if not Path(path).is_file():
        raise InputError(f"{spec}: no file at {path}. Expected aligned=FILE[:LANG][:SIDE][:common]")
    side = next((option for option in options if option in SIDES), None)
    languages = [option for option in options if option not in (*SIDES, "common")]
    if len(languages) > 1:
        raise InputError(f"{spec}: expected aligned=FILE[:LANG][:SIDE][:common], got several languages {languages}")
    lang, common = languages[0] if languages else None, "common" in options
    return lambda: (
        Condition(name, s, None, shifted)
        for name, s, shifted in aligned(context.rows, path, lang=lang, side=side, common=common)
    )


def _translated(spec: str, rest: str, context: ShiftContext) -> _Source:
    models, *options = _path_and_options(rest)
    model, _, back = models.partition(",")
    wrong = [option for option in options if option not in (*SIDES, BACK)]
    if wrong or len(options) > 1 or not model:
        raise InputError(
            f"{spec}: expected translate=MODEL[,MODEL_BACK][:SIDE], SIDE one of {', '.join((*SIDES, BACK))}"
        )
    return lambda: (
        Condition(name, s, None, shifted)
        for name, s, shifted in translated(context.rows, model, back=back or None, side=options[0] if options else None)
    )


def _path_and_options(text: str) -> list[str]:
    """A path and what follows it after colons; a path may hold colons of its own."""
    parts = text.split(":")
    for end in range(len(parts), 0, -1):
        if Path(":".join(parts[:end])).exists():
            return [":".join(parts[:end]), *filter(None, parts[end:])]
    return [parts[0], *filter(None, parts[1:])]


def _registered(spec: str, context: ShiftContext) -> _Source:
    found, rest = _find(spec)
    side, severity = _side_and_severity(spec, rest)
    if found.needs_reward and context.reward is None:
        raise InputError(f"shift {found.name!r} asks the reward model: pass reward=")
    cells = [
        (s, p)
        for s in (found.sides if side is None else (side,))
        for p in ((found.severities or (None,)) if severity is None else (severity,))
    ]
    for cell in cells:
        found.check(*cell)

    def source() -> Iterator[Condition]:
        for s, p in cells:
            shifted = found(context.rows, ShiftContext(s, p, context.seed, context.words, context.rows, context.reward))
            yield Condition(found.name, s, p, shifted, found.paired)

    return source


def _find(spec: str) -> tuple[Shift, list[str]]:
    """The shift that a specification names, and what comes after its name."""
    path, mark, rest = spec.partition(".py:")
    if mark:
        function, *more = rest.split(":")
        return _from_file(Path(path + ".py"), function), more
    name, *more = spec.split(":")
    known = registered_shifts()
    if name.strip() not in known:
        raise InputError(
            f"shift {name!r}: no such shift. There are: {', '.join(sorted(known))}; or FILE.py:FUNCTION for one of yours, "
            "aligned=FILE for the same rows in another language, translate=MODEL"
        )
    return known[name.strip()], more


def _from_file(path: Path, function: str) -> Shift:
    if not path.is_file():
        raise InputError(f"shift {path}:{function}: no file at {path}")
    # One module a file, so that asking for two of its shifts runs it once.
    name = f"rm_ood_shift_{path.stem}_{stable_hash(str(path.resolve())):x}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise InputError(f"shift {path}:{function}: not a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    found = getattr(sys.modules[name], function, None)
    if not callable(found):
        names = sorted(
            n for n, v in vars(sys.modules[name]).items() if callable(v) and getattr(v, "__module__", "") == name
        )
        raise InputError(f"shift {path}:{function}: no such function. The file has: {', '.join(names) or 'none'}")
    registered = next((s for s in registered_shifts().values() if s.function is found), None)
    return registered or Shift(function, found)


def _side_and_severity(spec: str, rest: list[str]) -> tuple[str | None, float | None]:
    side: str | None = None
    severity: float | None = None
    for part in filter(None, map(str.strip, rest)):
        if part in SIDES and side is None:
            side = part
        elif severity is None:
            try:
                severity = float(part)
            except ValueError as error:
                raise InputError(
                    f"shift {spec!r}: {part!r} is neither a side ({', '.join(SIDES)}) nor a severity"
                ) from error
        else:
            raise InputError(f"shift {spec!r}: expected NAME[:SIDE][:SEVERITY]")
    return side, severity
