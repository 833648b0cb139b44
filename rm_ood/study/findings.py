"""What the document of a study says: its sentences and its tables, before they become a page or Markdown.

The document is that of `Study.to_dict`; of the fields beyond those of `rm-ood demo`'s report.json, any may be missing or
None, and what rests on them is left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Doc = Mapping[str, Any]
# A fall in accuracy that is called one, and shares of flagged items that are called much and little.
FALL, MUCH, LITTLE = 0.05, 0.5, 0.1
_MINIMUM_PART = 10


@dataclass(frozen=True)
class Cell:
    """A number of a table: a fraction, or a percentage of one; an interval in the same unit."""

    value: float | None
    interval: Sequence[float] | None = None
    percent: bool = False
    signed: bool = False

    def shown(self) -> tuple[str, str]:
        """Text of the value, and of the interval ("" without one)."""
        if self.value is None:
            return "–", ""
        span = "" if self.interval is None else "–".join(self._text(end) for end in self.interval)
        return self._text(self.value) + (" %" if self.percent else ""), span

    def _text(self, value: float) -> str:
        if self.percent:
            return f"{100 * value:.1f}"
        # Plus 0 turns a rounded -0.000 into +0.000.
        return f"{round(value, 3) + 0:{'+' if self.signed else ''}.3f}"


@dataclass(frozen=True)
class Table:
    """Words are str, counts int, measured numbers `Cell`; `words` counts the columns of words from the left."""

    caption: str
    head: tuple[str, ...]
    rows: list[list[Any]]
    groups: tuple[tuple[str, int], ...] = ()
    words: int = 2


def at(value: Any, *path: str) -> Any:
    """What lies at a path of keys; None where any of it is missing."""
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def name_of(row: Doc) -> str:
    """`word noise 0.3`"""
    return str(row["name"]) if at(row, "severity") is None else f"{row['name']} {row['severity']:g}"


def label(row: Doc) -> str:
    """`word noise 0.3, response`"""
    return f"{name_of(row)}, {row['side']}"


def sides(doc: Doc) -> list[str]:
    """Sides that were shifted: prompt, response, both, then any other."""
    found = list(dict.fromkeys(str(row["side"]) for row in doc["shifts"]))
    known = ("prompt", "response", "both")
    return [side for side in known if side in found] + [side for side in found if side not in known]


def flags(doc: Doc) -> dict[str, str]:
    """Flag -> its title: combined, prompt and response, then what else was judged."""
    judged = _keys(doc["shifts"], "flag_rate", list)
    return {name: _axis(name) for name in _known_first(["combined", "prompt", "response", *judged])}


def base(doc: Doc, row: Doc) -> Doc:
    """Numbers of the clean rows that a condition is compared with: those that it has a row for, or all."""
    found: Doc = at(row, "baseline") or doc["id"]
    return found


def clean_lines(doc: Doc, rows: Sequence[Doc]) -> list[tuple[str, Doc]]:
    """`clean`, and `clean rows of es, de` for conditions that have some of them alone."""
    names: list[tuple[list[str], Doc]] = []
    for row in rows:
        if (found := at(row, "baseline")) is not None:
            same = next((listed for listed, known in names if known == found), None)
            if same is None:
                names.append(([name_of(row)], found))
            elif name_of(row) not in same:
                same.append(name_of(row))
    return [("clean", doc["id"]), *((f"clean rows of {', '.join(listed)}", found) for listed, found in names)]


def lines(doc: Doc) -> list[tuple[str, str, Doc]]:
    """Name, side and numbers of the clean rows and of every condition."""
    clean = [(name, "–", found) for name, found in clean_lines(doc, doc["shifts"])]
    return [*clean, *((name_of(row), str(row["side"]), row) for row in doc["shifts"])]


def fall(doc: Doc, row: Doc) -> float | None:
    """By how much accuracy is below that of the clean pairs that the condition is compared with."""
    clean, shifted = at(base(doc, row), "accuracy"), at(row, "accuracy")
    return None if clean is None or shifted is None else clean - shifted


def telling(doc: Doc, rows: Sequence[Doc], limit: int) -> list[Doc]:
    """At most `limit` rows: the sides take turns, each with its largest fall in accuracy (or AUROC) first.

    They come back in the document's order.
    """
    if len(rows) <= limit:
        return list(rows)

    def weight(row: Doc) -> tuple[float, float]:
        lost, seen = fall(doc, row), at(row, "auroc", "combined", "default")
        return (-1.0 if lost is None else lost, -1.0 if seen is None else seen)

    ranked = [sorted((r for r in rows if r["side"] == side), key=weight, reverse=True) for side in sides(doc)]
    turns = [row for place in range(len(rows)) for queue in ranked for row in queue[place : place + 1]]
    kept = {id(row) for row in turns[:limit]}
    return [row for row in rows if id(row) in kept]


def summary(doc: Doc) -> list[str]:
    """Sentences in plain words: the first says how far the reward model can be trusted and whether the flag tells."""
    clean = doc["id"]
    rows = [row for row in doc["shifts"] if fall(doc, row) is not None]
    worse = sorted((row for row in rows if (fall(doc, row) or 0) > FALL), key=lambda row: row["accuracy"])
    start = f"The reward model is right in {_percent(clean['accuracy'])} of {clean['n']} clean pairs"
    if not rows:
        first = f"{start}; under no shift of this study does the preference keep a meaning, so accuracy ends here."
    elif not worse:
        first = f"{start}, and no more than {100 * FALL:g} points worse under any of {len(rows)} shifted conditions."
    else:
        first = (
            f"{start}; under {len(worse)} of {len(rows)} shifted conditions it loses more than {100 * FALL:g} points, down to "
            f"{_percent(worse[0]['accuracy'])} ({label(worse[0])})."
        )
    return [first, *_flag_tells(doc, worse), *_certainty(doc, rows), *_false_alarms(doc), *_parted(doc)]


def _flag_tells(doc: Doc, worse: Sequence[Doc]) -> list[str]:
    rates = [(row, at(row, "flag_rate", "combined")) for row in (worse or doc["shifts"])]
    known = [(row, rate) for row, rate in rates if rate is not None]
    if not known:
        return []
    if len(known) == 1:
        rate = known[0][1]
        return [
            f"There the flag marks {_percent(rate)} of the items{': it gives no warning' if rate < LITTLE else ''}."
        ]
    caught = sum(rate >= MUCH for _, rate in known)
    missed = sorted((pair for pair in known if pair[1] < LITTLE), key=lambda pair: pair[1])
    which = f"these {len(known)}" if worse else f"{len(known)} shifted conditions"
    text = f"The flag marks at least half of the items in {caught} of {which}"
    if not missed:
        return [f"{text}, and at least a tenth in each."]
    names = "; ".join(label(row) for row, _ in missed[:3]) + ("; ..." if len(missed) > 3 else "")
    return [f"{text}, and fewer than a tenth in {len(missed)}: there it gives no warning ({names})."]


def _certainty(doc: Doc, rows: Sequence[Doc]) -> list[str]:
    clean = at(doc, "id", "ece")
    known = [row for row in rows if at(row, "ece") is not None]
    if clean is None:
        return []
    text = f"Its confidence is off by {100 * clean:.1f} points on clean pairs (ECE)"
    if not known:
        return [f"{text}."]
    worst = max(known, key=lambda row: float(row["ece"]))
    return [f"{text} and by up to {100 * worst['ece']:.1f} under shift ({label(worst)})."]


def _false_alarms(doc: Doc) -> list[str]:
    measured = at(doc, "id", "false_alarm_rate")
    if measured is None:
        return []
    sure = at(doc, "confidence")
    promise = f"the promise is at most {100 * doc['alpha']:g} %" + (
        f", with {100 * sure:g} % confidence" if sure else ""
    )
    return [f"Of clean items {_percent(measured)} are flagged; {promise}."]


def _parted(doc: Doc) -> list[str]:
    """Accuracy on flagged against unflagged pairs, pooled over the shifted conditions."""
    parts = {}
    for part in ("flagged", "unflagged"):
        found = [at(row, "selective", part) for row in doc["shifts"]]
        known = [(x["n"], x["accuracy"]) for x in found if at(x, "accuracy") is not None and x["n"]]
        total = sum(n for n, _ in known)
        if total < _MINIMUM_PART:
            return []
        parts[part] = sum(n * accuracy for n, accuracy in known) / total
    return [
        f"Over all shifted pairs the reward model is right in {_percent(parts['unflagged'])} of those that are not flagged "
        f"and in {_percent(parts['flagged'])} of those that are."
    ]


def overview(doc: Doc) -> Table:
    """By shift and side: the reward model's accuracy and calibration beside what the guard sees and flags."""
    rows = doc["shifts"]
    axes = _keys(rows, "auroc", lambda found: [axis for axis, by in found.items() if "default" in by])
    flags = _keys(rows, "flag_rate", list)
    head = ["shift", "side", "n", "accuracy", "ECE", *(_axis(a) for a in axes)]
    head += [
        "clean flagged where 95 % of shifted are caught",
        "shifted let through where 95 % of clean are kept",
        *(_axis(name) for name in flags),
    ]
    body = []
    for name, clean in clean_lines(doc, rows):
        first = [name, "–", clean["n"], *_pair(clean), *[Cell(None)] * (len(axes) + 2)]
        rates = {"combined": at(clean, "false_alarm_rate")} | dict(at(clean, "flag_rate") or {})
        first += [Cell(rates.get(f), at(clean, "intervals", "flag_rate", f), percent=True) for f in flags]
        body.append(first)
    for row in rows:
        line = [name_of(row), str(row["side"]), row["n"], *_pair(row)]
        line += [Cell(at(row, "auroc", a, "default"), at(row, "intervals", "auroc", a, "default")) for a in axes]
        line += [
            Cell(
                at(row, "fpr95", kind, "combined", "default"),
                at(row, "intervals", f"fpr95_{kind}", "combined", "default"),
            )
            for kind in ("ood_positive", "id_positive")
        ]
        line += [Cell(at(row, "flag_rate", f), at(row, "intervals", "flag_rate", f), percent=True) for f in flags]
        body.append(line)
    groups = [
        ("", 3),
        ("reward model", 2),
        ("AUROC against clean", len(axes)),
        ("error rate at 95 % (FPR95), either", 2),
    ]
    groups.append((f"flagged at alpha {100 * doc['alpha']:g} %", len(flags)))
    caption = (
        f"{_small_print(doc)}AUROC .5 is blind. The two FPR95 columns are different "
        "conventions of one name: the first is the share of clean items that are flagged at the threshold that catches "
        "95 % of the shifted; the second is the share of shifted items let through at the threshold that keeps 95 % of the "
        "clean. Either, prompt, response: the guard's joined score and its axes."
    )
    return Table(caption, tuple(head), body, tuple((n, span) for n, span in groups if span))


def detectors(doc: Doc, what: str, caption: str, *path: str) -> Table | None:
    """One number of every detector, by condition; `path` leads to {axis: {detector: number}}."""
    rows = doc["shifts"]
    names = list(
        dict.fromkeys(
            (axis, name)
            for row in rows
            for axis, by in (at(row, *path) or {}).items()
            for name, value in by.items()
            if value is not None
        )
    )
    axes = _known_first(axis for axis, _ in names)
    names.sort(key=lambda pair: axes.index(pair[0]))
    if not names:
        return None
    body = [
        [name_of(row), str(row["side"])]
        + [Cell(at(row, *path, axis, name), at(row, "intervals", what, axis, name)) for axis, name in names]
        for row in rows
    ]
    groups = [("", 2), *((_axis(axis), sum(a == axis for a, _ in names)) for axis in axes)]
    return Table(caption, ("shift", "side", *(name for _, name in names)), body, tuple(groups))


def selective(doc: Doc) -> Table | None:
    """Accuracy and ECE of flagged against unflagged pairs."""
    body = [
        [name, side]
        + [
            cell
            for part in ("unflagged", "flagged")
            for cell in (
                at(row, "selective", part, "n") or 0,
                Cell(at(row, "selective", part, "accuracy")),
                Cell(at(row, "selective", part, "ece")),
            )
        ]
        for name, side, row in lines(doc)
        if at(row, "selective")
    ]
    head = ("shift", "side", *("pairs", "accuracy", "ECE") * 2)
    caption = "The reward model on the pairs that are not flagged and on those that are."
    return Table(caption, head, body, (("", 2), ("not flagged", 3), ("flagged", 3))) if body else None


def attribution(doc: Doc) -> Table | None:
    """Which flag fires on which side: mean over the conditions of a side, and their range."""
    names = [name for name in _keys(doc["shifts"], "flag_rate", list) if name != "combined"]
    body = []
    for side in sides(doc):
        rows = [row for row in doc["shifts"] if row["side"] == side]
        line: list[Any] = [f"{side} shifted", len(rows)]
        for name in names:
            rates = [rate for row in rows if (rate := at(row, "flag_rate", name)) is not None]
            line.append(Cell(sum(rates) / len(rates), (min(rates), max(rates)), percent=True) if rates else Cell(None))
        body.append(line)
    head = ("side", "conditions", *(f"{_axis(name)} flag" for name in names))
    caption = "Share flagged by each axis alone: mean over the conditions of a side, and smallest to largest."
    return Table(caption, head, body, words=1) if body and names else None


def subsets(doc: Doc) -> Table | None:
    """Accuracy, ECE and share flagged by subset of the rows."""
    body = [
        [
            name,
            side,
            str(subset),
            found["n"],
            Cell(at(found, "accuracy")),
            Cell(at(found, "ece")),
            Cell(_flagged(at(found, "flag_rate")), percent=True),
        ]
        for name, side, row in lines(doc)
        for subset, found in (at(row, "subsets") or {}).items()
    ]
    head = ("shift", "side", "subset", "n", "accuracy", "ECE", "flagged")
    return Table("By subset of the rows.", head, body, words=3) if body else None


# Group, name and path of each number of the reward model.
_METRICS = (
    ("", "unscored pairs", "unscored_pairs"), ("", "above all rejected", "accuracy_all"), ("", "ties", "metrics.ties"),
    ("", "confidence", "metrics.confidence"), ("calibration error", "ECE", "metrics.ece"),
    ("calibration error", "equal mass", "metrics.ece_equal_mass"), ("calibration error", "debiased", "metrics.ece_debiased"),
    ("calibration error", "MCE", "metrics.mce"), ("loss", "Brier", "metrics.brier"), ("loss", "NLL", "metrics.nll"),
    ("temperature", "fitted here", "metrics.temperature"),
    ("temperature", "ECE at the clean one", "metrics.ece_at_id_temperature"),
    ("", "reward and length", "metrics.length_reward_correlation"), ("change of reward", "mean", "reward_change.mean"),
    ("change of reward", "raised", "reward_change.raised"),
)  # fmt: skip


def calibration_numbers(doc: Doc) -> Table | None:
    """Every number of the reward model's calibration, and what the shift did to the reward; what no row has is left out."""
    rows = [entry for entry in lines(doc) if at(entry[2], "metrics") or at(entry[2], "reward_change")]
    columns = [
        entry for entry in _METRICS if _tells([at(row, *entry[2].split(".")) for _, _, row in rows], entry[2], rows)
    ]
    if not columns:
        return None
    body = [
        [name, side, *(_number(title, at(row, *path.split("."))) for _, title, path in columns)]
        for name, side, row in rows
    ]
    groups = [("", 2), *((group, len(list(run))) for group, run in itertools.groupby(entry[0] for entry in columns))]
    caption = (
        "ECE: expected calibration error in bins of equal width, of equal mass, and with its bias taken off; MCE: the "
        "largest gap of a bin. Raised: share of rows whose chosen response got a higher reward than when clean."
    )
    return Table(caption, ("shift", "side", *(title for _, title, _ in columns)), body, tuple(groups))


def _tells(values: list[Any], path: str, rows: Sequence[tuple[str, str, Doc]]) -> bool:
    """Whether a column says anything: no pair may be unscored, and one rejected response is all of them."""
    if path == "unscored_pairs":
        return any(values)
    if path == "accuracy_all":
        return values != [at(row, "accuracy") for _, _, row in rows]
    return any(value is not None for value in values)


def _number(title: str, value: Any) -> Any:
    if isinstance(value, int):
        return value
    return Cell(value, percent=title == "raised", signed=title in ("mean", "reward and length"))


def how_made(doc: Doc) -> list[tuple[str, str]]:
    """Facts about the run."""
    cal = at(doc, "calibration")
    found: list[tuple[str, Any]] = [
        ("Reward model", at(doc, "model")),
        ("Channels in the verdict", ", ".join(at(doc, "channels") or [])),
        ("Alpha", f"{100 * doc['alpha']:g} %"),
        ("Calibration", _calibration(cal) if cal else None),
        ("Left out as unusable", left_out(doc)),
        ("Seed", at(doc, "seed")),
        ("Command", at(doc, "command")),
        ("Time", None if at(doc, "seconds") is None else f"{doc['seconds']:,.0f} s"),
        ("Versions", ", ".join(f"{name} {value}" for name, value in (at(doc, "versions") or {}).items())),
    ]
    return [(name, str(fact)) for name, fact in found if fact not in (None, "")]


def left_out(doc: Doc) -> str:
    """`2 of the clean rows, 1 of the fit data`; nothing where every row was used."""
    return ", ".join(f"{n} of the {what}" for what, n in (at(doc, "dropped") or {}).items())


def _calibration(cal: Mapping[str, Any]) -> str:
    text = f"n = {at(cal, 'n')} prompts" + (f", rank k = {cal['k']}" if at(cal, "k") else "")
    expected = at(cal, "expected_false_alarm_rate")
    if expected is not None:
        mean, low, high = (100 * x for x in expected)
        text += f"; expected false-alarm rate {mean:.2f} % (90 % interval {low:.2f} to {high:.2f} %)"
    groups = len(at(cal, "by_group") or [])
    return text + (f"; ranked in {groups} groups" if groups else "")


def _small_print(doc: Doc) -> str:
    known = any(at(found, "intervals", "flag_rate", "combined") for found in (doc["id"], *doc["shifts"]))
    text = "In small print: 95 % intervals, by bootstrap over prompts; that of ECE is for the error without its noise. "
    return text if known else ""


def _pair(found: Doc) -> list[Cell]:
    return [Cell(at(found, key), at(found, "intervals", key)) for key in ("accuracy", "ece")]


def _keys(rows: Sequence[Doc], field: str, names: Any) -> list[str]:
    """Names with a value in a field of any row."""
    return _known_first(
        name for row in rows if at(row, field) for name in names(row[field]) if at(row, field, name) is not None
    )


def _known_first(names: Iterable[str]) -> list[str]:
    """Each name once: combined, prompt, response, then others as they come."""
    found = list(dict.fromkeys(names))
    known = ("combined", "prompt", "response")
    return [name for name in known if name in found] + [name for name in found if name not in known]


def _axis(name: str) -> str:
    return {"combined": "either", "pair": "pair of rewards"}.get(name, name.replace("_", " "))


def _flagged(rate: Any) -> float | None:
    """A share, or that of the joined flag."""
    found: float | None = at(rate, "combined") if isinstance(rate, Mapping) else rate
    return found


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"
