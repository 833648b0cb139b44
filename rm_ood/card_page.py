"""The guard card as one self-contained HTML page: no script, nothing loaded, light and dark, fit for printing."""

from __future__ import annotations

from typing import Any

from rm_ood.channels import AXES, Channel
from rm_ood.markup import Markup, Text, bullets, escaped, fact_table, table, whole_page


def page(values: dict[str, Any]) -> str:
    """The page.

    Args:
        values: what `rm_ood.card_values.card_values` gives, as it is after a round trip through JSON.
    """
    name = values["fingerprint"].get("architecture", "vectors")
    sections = [
        ("Data", _data(values)),
        ("Detectors", _detectors(values)),
        ("Calibration and false alarms", _calibration(values["calibration"])),
        ("Score and length", _lengths(values["length_correlation"])),
        ("What it can detect", _detectable(values["detectable"])),
        ("Blind spots", _doctor(values["doctor"])),
        ("Fingerprint of the reward model", _fingerprint(values["fingerprint"])),
    ]
    lead = f'<p class="lead">{escaped(_summary(name, values))}</p>'
    return whole_page(f"Guard card: {name}", "Guard card", lead, sections, _STYLE)


_STYLE = (
    # On a phone a table scrolls by itself, not the page.
    "@media screen and (max-width:40em){table{display:block;overflow-x:auto}svg{max-width:100%;height:auto}"
    ".facts th{white-space:normal}}"
    ".bar{fill:var(--mark)}.edge{stroke:var(--ink)}.alpha{stroke:var(--warn);stroke-dasharray:3 2}"
    ".box{fill:var(--mark);fill-opacity:.35}"
)


def _summary(name: str, values: dict[str, Any]) -> str:
    judged = {Channel.parse(channel).axis for channel in values["channels"]}
    axes = [_words(axis) for axis in AXES if axis in judged]
    watched = f"A guard of the {' and the '.join(axes)} for {name}, by the channels {', '.join(values['channels'])}. "
    cal = values["calibration"]
    if cal is None:
        return f"{watched}It is not calibrated: it gives no verdicts until calibrate() is called."
    sure = "on average" if cal["confidence"] is None else f"with {100 * cal['confidence']:g} % confidence"
    promise = f"Of items like its calibration data it flags at most {100 * cal['alpha']:g} %, {sure}"
    if cal["expected_false_alarm_rate"] is None:
        return f"{watched}{promise}, in each of {len(cal['by_group'])} groups."
    mean, low, high = (100 * x for x in cal["expected_false_alarm_rate"])
    return (
        f"{watched}{promise}; expected are {mean:.2f} % (90 % interval {low:.2f} to {high:.2f} %), from n = {cal['n']} "
        f"calibration prompts, rank k = {cal['k']}."
    )


def _data(values: dict[str, Any]) -> str:
    fit, cal, odds = values["fit"], values["calibration"], values["class_log_odds"]
    classes = ", ".join(f"{n} {name}" for name, n in (fit["classes"] or {}).items())
    if all(d["classes"] == 1 for d in values["detectors"].values()):
        classes = "one class"
    facts: list[tuple[str, Any]] = [
        ("Fit", f"{fit['items']} items of {fit['prompts']} prompts: {classes}"),
        ("Left out", f"{fit['dropped_rows']} rows dropped, {fit['truncated_items']} items truncated"),
    ]
    if fit["duplicate_share"] is not None:
        facts.append(("Repeated items", _percent(fit["duplicate_share"])))
    facts += [
        ("Reward", f"mean {fit['reward_mean']:.3f}, standard deviation {fit['reward_sd']:.3f}"),
        ("Text format", values["text_format"]),
    ]
    if cal is not None:
        facts.append(("Calibration", f"{cal['n']} prompts to rank among, {cal['n_length']} for the length curves"))
    if odds:
        facts.append(
            (
                "class_log_odds",
                f"held-out chosen against rejected, one response a prompt: AUROC {odds['auroc']:.3f}; rank correlation with "
                f"the reward {odds['reward_correlation']:+.2f}",
            )
        )
    return fact_table(facts) + bullets(fit["notes"])


def _detectors(values: dict[str, Any]) -> str:
    relation = values["score_reward_correlation"] or {}
    rows = [
        [
            name,
            Text(d["estimator"] + ("" if d["in_verdict"] else " (reported, not in the verdict)")),
            d["width"],
            d["samples"],
            f"{d['samples_per_feature']:g}",
            f"{d['shrinkage']:.4g} ({d['shrinkage_rule']})",
            f"{d['floor']:g}",
            d["effective_rank"],
            _signed(relation.get(name)),
        ]
        for name, d in values["detectors"].items()
    ]
    head = (
        "channel", Text("estimator"), "width D", "samples n", "n / D", "shrinkage", "floor", "effective rank",
        "correlation with reward",
    )  # fmt: skip
    return table(head, rows, "Score: squared distance to the nearest class; larger is more out of distribution.")


def _calibration(cal: dict[str, Any] | None) -> str:
    if cal is None:
        return "<p>Not calibrated.</p>"
    cells = [*cal["by_length"], *cal["by_group"]]
    top = max([cal["alpha"], *(cell["high"] or 0.0 for cell in cells)])
    head = ("prompts", "flagged", "rate", "95 % interval", Text(""))
    lengths = [
        [f"{b['tokens']} tokens", b["n"], b["flagged"], *_rate(b), _bar(b, cal["alpha"], top)] for b in cal["by_length"]
    ]
    text = table(
        ("response length", *head),
        lengths,
        f"False alarms: each calibration prompt against the others. Dashed: alpha = {100 * cal['alpha']:g} %.",
    )
    if not cal["by_group"]:
        return text
    groups = []
    for g in cal["by_group"]:
        mean, low, high = (100 * x for x in g["expected_false_alarm_rate"])
        expected = f"{mean:.2f} % ({low:.2f} to {high:.2f} %)"
        groups.append([g["group"], g["n"], g["k"], expected, g["flagged"], *_rate(g), _bar(g, cal["alpha"], top)])
    return text + table(
        ("group", "ranked among n", "k", "expected (90 % interval)", *head[1:]),
        groups,
        "By group; groups too small for the promise are ranked together.",
    )


def _lengths(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    rows = [[name, _signed(r["raw"]), _signed(r["standardised"])] for name, r in found["channels"].items()]
    rows += [[f"joined score, {axis} length", "", _signed(r)] for axis, r in found["joined"].items()]
    return (
        f"<p>Rank correlation with the span's length in tokens, over {found['n']} calibration prompts. Within "
        f"{found['chance']:.2f} of 0 is what chance alone gives. The raw scores may depend on length; the verdict rests on the "
        "standardised ones.</p>" + table(("score", "raw", "standardised"), rows, "")
    )


def _detectable(pools: list[dict[str, Any]] | None) -> str:
    if pools is None:
        return ""
    several = len(pools) > 1
    rows = []
    for pool in pools:
        found = "never" if pool["prompts"] is None else f"{pool['prompts']} prompts"
        shifts = [*(i["shift"] for i in pool["item"]), *(b["shift"] for b in pool["batch"])]
        rows.append(
            [
                *([pool["group"]] if several else []),
                pool["n"],
                *("-" if shift is None else f"{shift:.2f}" for shift in shifts),
                "-" if pool["unit"] is None else found,
            ]
        )
    first = pools[0]
    head = [
        *(["group"] if several else []),
        "calibration n",
        *(f"item, {100 * i['power']:.0f} %" for i in first["item"]),
        *(f"batch of {b['prompts']}" for b in first["batch"]),
        f"{first['small_shift']:g} sd found after",
    ]
    strips = "".join(
        f"<p>{escaped(pool['group']) + ': ' if several else ''}{_strip(pool)}</p>" for pool in pools if pool["unit"]
    )
    return (
        "<p>Smallest shift of the joined score that is detected, in standard deviations of that score over the calibration "
        "prompts. Item: one item is flagged with that probability. Batch: a rank-sum test against the calibration scores at "
        f"level {first['batch_level']:g} finds a shift of all its items with probability {first['batch_power']:g}; "
        "&ldquo;never&rdquo;: the calibration set is too small for any number of prompts.</p>"
        + table(head, rows, "")
        + strips
    )


def _doctor(found: dict[str, Any] | None) -> str:
    if found is None:
        return "<p>Not examined. The doctor plants known shifts and says which are caught and which are not.</p>"
    clean = found["clean"]
    axes = [axis for axis in AXES if axis in clean["flagged"]]
    rows = [_planted("nothing", "-", clean["n"], clean["flagged"], axes, None, None)]
    rows += [
        _planted(s["name"], s["side"], s["n"], s["flagged"], axes, s["auroc"], s["caught"]) for s in found["shifts"]
    ]
    head = (
        "planted", Text("side"), "items", "flagged", "95 % interval", *(f"{_words(axis)} axis" for axis in axes), "AUROC",
        "caught",
    )  # fmt: skip
    return (
        f"<p>Caught: {escaped('; '.join(found['caught']) or 'none')}.</p>"
        f"<p><strong>Blind to: {escaped('; '.join(found['blind']) or 'none')}.</strong></p>"
        + bullets(found["notes"])
        + table(head, rows, f"{clean['n']} {found['items']} items at alpha {found['alpha']:g}; {found['rule']}.")
    )


def _planted(
    name: str,
    side: str,
    n: int,
    flagged: dict[str, Any],
    axes: list[str],
    area: float | None,
    caught: bool | None,
) -> list[Any]:
    share = flagged["combined"]
    word = (
        ""
        if caught is None
        else Markup(f'<span class="{"yes" if caught else "no"}">{"yes" if caught else "no"}</span>')
    )
    return [
        name,
        Text(side),
        n,
        _percent(share["share"]),
        f"{100 * share['low']:.0f} to {100 * share['high']:.0f} %",
        *("-" if flagged[axis] is None else _percent(flagged[axis]["share"]) for axis in axes),
        "-" if area is None else f"{area:.2f}",
        word,
    ]


def _fingerprint(fields: dict[str, str]) -> str:
    if not fields:
        return "<p>None: fitted on vectors of unknown origin.</p>"
    # A local folder has no commit, and its field says so in Python's word.
    shown = {name: "not known" if value == "None" else value for name, value in fields.items()}
    return fact_table((name, Markup(f"<code>{escaped(value)}</code>")) for name, value in shown.items())


def _bar(cell: dict[str, Any], alpha: float, top: float) -> str:
    """The rate as a bar with its interval as a line, and alpha; `top` is the right edge."""
    if cell["rate"] is None:
        return ""
    x = [round(140 * value / top, 1) for value in (cell["rate"], cell["low"], cell["high"], alpha)]
    return Markup(
        f'<svg width="142" height="14" role="img" aria-label="{_percent(cell["rate"])}">'
        f'<rect class="bar" y="3" width="{x[0]}" height="8"/><path class="edge" d="M{x[1]} 7H{x[2]}" fill="none"/>'
        f'<path class="alpha" d="M{x[3]} 0V14" fill="none"/></svg>'
    )


def _strip(pool: dict[str, Any]) -> str:
    """Quantiles of the calibration scores on one line, and the threshold."""
    low, high = pool["quantiles"][0], max(pool["threshold"], pool["quantiles"][-1])
    margin = 0.05 * (high - low) or 1.0

    def at(value: float) -> float:
        place: float = (value - low + margin) / (high - low + 2 * margin)
        return round(20 + 480 * place, 1)

    q05, q25, q50, q75, q95 = (at(q) for q in pool["quantiles"])
    limit = at(pool["threshold"])
    return Markup(
        '<svg viewBox="0 0 520 52" width="520" role="img" aria-label="quantiles of the calibration scores">'
        f'<path class="edge" d="M{q05} 16H{q95}M{q50} 8V24" fill="none"/>'
        f'<rect class="box" x="{q25}" y="8" width="{round(q75 - q25, 1)}" height="16"/>'
        f'<path class="alpha" d="M{limit} 2V30" fill="none"/>'
        f'<text x="{limit}" y="44" text-anchor="end">threshold {pool["threshold"]:.2f}</text>'
        f'<text class="soft" x="{q05}" y="44">5, 25, 50, 75, 95 % of n = {pool["n"]} calibration scores</text></svg>'
    )


def _rate(cell: dict[str, Any]) -> list[str]:
    if cell["rate"] is None:
        return ["-", "-"]
    return [_percent(cell["rate"]), f"{100 * cell['low']:.1f} to {100 * cell['high']:.1f} %"]


def _words(axis: str) -> str:
    return axis.replace("_", " ")


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _signed(value: float | None) -> str:
    # Plus 0 turns a rounded -0.00 into +0.00.
    return "-" if value is None else f"{round(value, 2) + 0:+.2f}"
