"""`rm-ood study` without its arguments: from files to a study."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rm_ood.errors import InputError
from rm_ood.guard import OODGuard
from rm_ood.study.pairs import Pair, read_pairs
from rm_ood.study.scorer import Scorer
from rm_ood.study.shifts import conditions, vocabulary
from rm_ood.study.study import Study, run_study
from rm_ood.study.svg import require_matplotlib
from rm_ood.study.vector_baselines import fit_baselines

# Both sides at the paper's severities; a cut, a mismatched and a stuck response; and one that asks for a higher reward.
DEFAULT_SHIFTS = (
    "word noise:prompt",
    "word noise:response",
    "truncation:response:0.5",
    "mismatched:response",
    "repeated token:response:0.5",
    "flattery wrapper:response",
)
WORDS = ("rows", "tokenizer")
# What byte-level and SentencePiece tokenizers put before a token that begins a word.
_WORD_STARTS = ("Ġ", "▁")


@dataclass(frozen=True)
class Plan:
    """What a study reads and how; checked before a reward model is loaded.

    Attributes:
        rows: clean rows. shifts: specifications. words: where word noise draws from. seed: of everything.
        dropped: what was left out as unusable, where the guard's `on_bad` says so.
    """

    rows: list[Pair]
    shifts: tuple[str, ...]
    words: str
    seed: int
    dropped: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(
        cls,
        guard: OODGuard,
        data: Any,
        shifts: Sequence[str] = DEFAULT_SHIFTS,
        *,
        subset: str | None = None,
        limit: int | None = None,
        words: str = "rows",
        seed: int = 0,
    ) -> Plan:
        """Read and check.

        Args:
            guard: the saved guard, for its settings; vectors only is enough.
            data: clean rows (see `read_pairs`).
            shifts: specifications (see `conditions`).
            subset: column for tables by subset; a guard that is calibrated by a column takes that one.
            limit: the first rows only.
            words: `"rows"` or `"tokenizer"`.

        Raises:
            InputError: rows that cannot be read (under the guard's `on_bad="error"`), a specification that names nothing,
                matplotlib is missing.
        """
        require_matplotlib()
        config, column = guard.config, guard.config.group_column
        if column is not None and subset not in (None, column):
            raise InputError(
                f"subset={subset!r}: the guard is calibrated by the column {column!r}, so that is the subset"
            )
        if limit is not None and limit < 1:
            raise InputError(f"limit={limit}: expected at least 1 row")
        dropped: Counter[str] = Counter()
        rows = read_pairs(
            data,
            subset=subset or column,
            on_bad=config.on_bad,
            max_chars=config.max_chars,
            allow_empty=config.allow_empty,
            dropped=dropped,
        )
        plan = cls(rows[:limit], tuple(shifts), words, seed, Counter({"clean rows": dropped["rows"]}))
        conditions(plan.rows, shifts, seed=seed, words=["word"], reward=_no_reward)
        return plan

    def run(
        self,
        guard: OODGuard,
        *,
        cache: Path | None = None,
        fit_data: Any = None,
        background: Any = None,
        progress: bool = True,
        **options: Any,
    ) -> Study:
        """The study, with the guard on its reward model.

        Args:
            cache: file of scores by content. fit_data, background: as of `fit_baselines`; None fits no baselines.
            options: as of `run_study`.
        Raises:
            InputError: a background without fit data; and as `run_study`.
        """
        if background is not None and fit_data is None:
            raise InputError("background: the relative distance is to the fit data as well: pass the fit data too")
        words = words_of(guard.tokenizer) if self.words == "tokenizer" else vocabulary(self.rows)
        baselines, dropped = {}, self.dropped.copy()
        if fit_data is not None:
            baselines = fit_baselines(guard, fit_data, background=background, dropped=dropped, progress=progress)
        with Scorer(guard, cache=cache, baselines=baselines, progress=progress) as scorer:
            shifted = conditions(self.rows, self.shifts, seed=self.seed, words=words, reward=scorer.rewards)
            return run_study(
                guard, self.rows, shifted, scorer=scorer, seed=self.seed, dropped=dropped, progress=progress, **options
            )


def words_of(tokenizer: Any) -> list[str]:
    """Whole lower-case words of a tokenizer's vocabulary, in a fixed order: a source of random words."""
    vocabulary = list(tokenizer.get_vocab())
    starts = tuple(start for start in _WORD_STARTS if any(token.startswith(start) for token in vocabulary))
    whole = [token[1:] for token in vocabulary if token.startswith(starts)] if starts else vocabulary
    words = sorted({word for word in whole if len(word) > 2 and word.isascii() and word.isalpha() and word.islower()})
    if not words:
        raise InputError("the tokenizer's vocabulary holds no whole words: take the words of the rows")
    return words


_no_reward: Callable[..., Any] = lambda prompts, responses: np.zeros(len(responses))  # noqa: E731
