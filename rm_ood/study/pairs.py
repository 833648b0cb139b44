"""Preference rows as a study reads them: a prompt, one chosen response, every rejected one, and where the row belongs.

Three layouts: whatever `rm_ood.preferences` reads, and the rows of RM-Bench and RewardBench 2, whose responses are lists.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rm_ood.dialogue import Response, Text, check_prompt, check_response, response_text
from rm_ood.errors import InputError
from rm_ood.preferences import CHOSEN, REJECTED, Item, RowReader, prompt_key
from rm_ood.rows import iter_rows

# Styles of RM-Bench's responses in their order: each writes more, or more formatted, than the one before.
STYLES = ("concise", "detailed", "markdown")


@dataclass(frozen=True)
class Pair:
    """One preference: the chosen response against each rejected one.

    Attributes:
        id: the row's own id, or its number in the source.
        prompt: a string, a message list or a `Dialogue`.
        chosen: the preferred response.
        rejected: the others, at least one.
        cluster: `prompt_key` of the prompt as it was before any shift; rows of one cluster are not independent.
        subset: the row's domain or kind, for tables by subset; None where none was asked for.
    """

    id: str
    prompt: Text
    chosen: Response
    rejected: tuple[Response, ...]
    cluster: int
    subset: str | None = None

    @property
    def responses(self) -> tuple[Response, ...]:
        """The chosen response and then the rejected ones."""
        return (self.chosen, *self.rejected)


def read_pairs(
    dataset: Any,
    *,
    subset: str | None = None,
    layout: str = "auto",
    lang: str | None = None,
    on_bad: str = "error",
    max_chars: int = 200_000,
    allow_empty: bool = False,
    dropped: Counter[str] | None = None,
) -> list[Pair]:
    """Every preference of a dataset, in its order.

    Args:
        dataset: rows in a list, a `datasets.Dataset`, any iterable, or the path of a JSON Lines, JSON or Parquet file.
        subset: column whose value becomes `Pair.subset`. Without it RM-Bench rows carry their domain and difficulty
            (`"chat, hard"`), RewardBench 2 rows their `subset` column, others nothing.
        layout: `"preferences"` (a chosen and one or several rejected responses per row; or one labelled response per row,
            joined by prompt), `"rm-bench"`, `"reward-bench-2"`, or `"auto"`: what the first row looks like.
        lang: keep the rows whose `lang` column has this value; None keeps all.
        on_bad: `"error"`, or `"drop"` to leave out rows that cannot be used.
        max_chars: longest text accepted, in characters.
        allow_empty: accept an empty or white-space prompt.
        dropped: gets the number of rows that were left out under `"rows"`; rows that lack a partner count as well.

    Returns:
        One pair per chosen response. An RM-Bench row gives nine, each style of the chosen against each of the rejected
        response: `easy`, `normal` and `hard` accuracy are the pair accuracies of those subsets.

    Raises:
        InputError: a row that cannot be used (named with its field), an unknown layout, no rows.
    """
    if on_bad not in ("error", "drop"):
        raise InputError(f"on_bad={on_bad!r}: expected 'error' or 'drop'")
    if layout not in ("auto", *_LAYOUTS):
        raise InputError(f"layout={layout!r}: expected 'auto' or one of {sorted(_LAYOUTS)}")
    rows = [(i, row) for i, row in enumerate(iter_rows(dataset)) if lang is None or row.get("lang") == lang]
    if not rows:
        raise InputError(f"dataset: no rows{'' if lang is None else f' with lang={lang!r}'}")
    read = _LAYOUTS[_layout_of(rows[0][1]) if layout == "auto" else layout]
    reader = RowReader(require_labels=True, group_column=subset, max_chars=max_chars, allow_empty=allow_empty)
    bad = _Bad(on_bad == "drop")
    found = list(read(rows, reader, bad))
    if dropped is not None:
        dropped["rows"] += bad.count
    if not found:
        raise InputError(f"dataset: none of {len(rows)} rows can be used; on_bad='error' says why")
    return found


def _layout_of(row: Mapping[str, Any]) -> str:
    listed = isinstance(row.get("chosen"), (list, tuple)) and all(isinstance(text, str) for text in row["chosen"])
    if not listed or not row["chosen"]:
        return "preferences"
    return "reward-bench-2" if "num_correct" in row else "rm-bench"


_Rows = Sequence[tuple[int, Mapping[str, Any]]]


@dataclass
class _Bad:
    """What happens to rows that cannot be used."""

    drop: bool
    count: int = 0

    def refuse(self, error: InputError, rows: int = 1) -> None:
        """Raise, or count."""
        if not self.drop:
            raise error
        self.count += rows


_Layout = Callable[[_Rows, RowReader, _Bad], Iterator[Pair]]


def _preferences(rows: _Rows, reader: RowReader, bad: _Bad) -> Iterator[Pair]:
    loose: dict[str, list[Item]] = {}
    for number, row in rows:
        try:
            items = reader.items(row, number)
        except InputError as error:
            bad.refuse(error)
            continue
        if len(items) > 1:
            yield from _joined(items)
        else:
            # One labelled response a row: its partners stand in other rows of the same prompt.
            loose.setdefault(repr(items[0].prompt), []).extend(items)
    alone = [items for items in loose.values() if len({item.label for item in items}) < 2]
    if alone:
        first = alone[0][0].where
        lonely = InputError(
            f"{first}: its prompt has no response of the other label, as {len(alone)} of {len(loose)} prompts have. "
            "A preference needs a chosen and a rejected response; on_bad='drop' leaves such prompts out."
        )
        bad.refuse(lonely, sum(map(len, alone)))
    for items in loose.values():
        yield from _joined(items)


def _joined(items: Sequence[Item]) -> Iterator[Pair]:
    """A pair for each chosen response, with all rejected ones; none where either is missing."""
    chosen = [item for item in items if item.label == CHOSEN]
    rejected = tuple(item.response for item in items if item.label == REJECTED)
    for item in chosen if rejected else ():
        yield Pair(item.row_id, item.prompt, item.response, rejected, prompt_key(item.prompt), item.group)


def _rm_bench(source: Mapping[str, Any], number: int, reader: RowReader) -> list[Pair]:
    """Nine pairs a row.

    Reference:
        Liu et al., "RM-Bench: Benchmarking Reward Models of Language Models with Subtlety and Style", ICLR 2025: accuracy
        in a 3 x 3 matrix of styles; hard is the mean above the diagonal (chosen in the plainer style), easy below it.
    """
    row = _listed(source, number, reader)
    for name, texts in (("chosen", row.chosen), ("rejected", row.rejected)):
        if len(texts) != len(STYLES):
            raise InputError(
                f"{row.where}.{name}: expected {len(STYLES)} styles ({', '.join(STYLES)}), got {len(texts)} responses"
            )
    subset = reader.group_column
    domain = row.group if subset else _column(source, "domain", row.where)
    pairs = []
    for i, chosen in enumerate(row.chosen):
        for j, rejected in enumerate(row.rejected):
            level = "hard" if i < j else "easy" if i > j else "normal"
            label = domain if subset else f"{domain}, {level}"
            name = f"{row.id}#{STYLES[i]}-{STYLES[j]}"
            pairs.append(Pair(name, row.prompt, chosen, (rejected,), prompt_key(row.prompt), label))
    return pairs


def _reward_bench_2(source: Mapping[str, Any], number: int, reader: RowReader) -> list[Pair]:
    """One pair per correct response, with all incorrect ones.

    Reference:
        Malik et al., "RewardBench 2: Advancing Reward Model Evaluation", 2025: best of four, and a subset `Ties` with many
        correct responses.
    """
    row = _listed(source, number, reader)
    for name, column in (("chosen", "num_correct"), ("rejected", "num_incorrect")):
        stated, found = source.get(column), len(source[name])
        if stated is not None and stated != found:
            raise InputError(f"{row.where}.{column}: says {stated}, but {name} holds {found} responses")
    label = row.group if reader.group_column else _column(source, "subset", row.where)
    key, rejected = prompt_key(row.prompt), tuple(row.rejected)
    return [
        Pair(row.id if len(row.chosen) == 1 else f"{row.id}#{i}", row.prompt, chosen, rejected, key, label)
        for i, chosen in enumerate(row.chosen)
    ]


@dataclass(frozen=True)
class _Listed:
    """A checked row whose chosen and rejected are lists of texts."""

    where: str
    id: str
    prompt: Text
    chosen: list[Response]
    rejected: list[Response]
    group: str | None


def _listed(row: Mapping[str, Any], number: int, reader: RowReader) -> _Listed:
    where = f"rows[{number}]"
    prompt = check_prompt(
        row.get("prompt"), f"{where}.prompt", allow_empty=reader.allow_empty, max_chars=reader.max_chars
    )
    texts: dict[str, list[Response]] = {}
    for name in ("chosen", "rejected"):
        values = row.get(name)
        if not isinstance(values, (list, tuple)) or not values:
            raise InputError(f"{where}.{name}: expected a list of responses, got {type(values).__name__}")
        texts[name] = [
            check_response(value, f"{where}.{name}[{i}]", max_chars=reader.max_chars) for i, value in enumerate(values)
        ]
    if {response_text(text) for text in texts["chosen"]} & {response_text(text) for text in texts["rejected"]}:
        raise InputError(f"{where}: a text is both chosen and rejected; on_bad='drop' leaves such rows out")
    group = None if reader.group_column is None else _column(row, reader.group_column, where)
    row_id = str(row["id"]) if row.get("id") is not None else str(number)
    return _Listed(where, row_id, prompt, texts["chosen"], texts["rejected"], group)


def _column(row: Mapping[str, Any], name: str, where: str) -> str:
    if row.get(name) is None:
        raise InputError(f"{where}.{name}: no value. Columns found: {sorted(map(str, row))[:20]}")
    return str(row[name])


def _by_row(read: Callable[[Mapping[str, Any], int, RowReader], list[Pair]]) -> _Layout:
    def layout(rows: _Rows, reader: RowReader, bad: _Bad) -> Iterator[Pair]:
        for number, row in rows:
            try:
                yield from read(row, number, reader)
            except InputError as error:
                bad.refuse(error)

    return layout


_LAYOUTS: dict[str, _Layout] = {
    "preferences": _preferences,
    "rm-bench": _by_row(_rm_bench),
    "reward-bench-2": _by_row(_reward_bench_2),
}
