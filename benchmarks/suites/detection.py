"""Detection quality on real preference data and a real decoder: one guard, fitted and run by the command line.

The reward model comes from `benchmarks/train_reward_model.py`; the guard sees only dialogues that it was not trained on,
40 % of which are kept back as clean test data. One guard is fitted with every channel under study; a guard with fewer
channels is the same calibration matrix with fewer columns, so each join is read off the verdict rows exactly.
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rm_ood import OODGuard
from rm_ood.channels import Channel, resolve_channels
from rm_ood.conformal import p_values
from rm_ood.preferences import hash_fraction, prompt_key
from rm_ood.rewriting import word_perturbation
from rm_ood.rows import iter_rows
from rm_ood.study.detection import auroc

ROOT = Path(__file__).resolve().parents[2]
CHANNELS = (
    "final", "prompt/prompt_end", "prompt/mean", "response/mean", "prompt/mean@0.33", "response/mean@0.33",
    "prompt/mean@0.5", "response/mean@0.5", "prompt/mean@0.67", "response/mean@0.67", "prompt/mean@0.83",
    "response/mean@0.83",
)  # fmt: skip
JOINS = {
    "final": ("final",),
    "default": resolve_channels("default", ("prompt", "response")),
    "means@.33": ("prompt/mean@0.33", "response/mean@0.33"),
    "means@.5": ("prompt/mean@0.5", "response/mean@0.5"),
    "means@.67": ("prompt/mean@0.67", "response/mean@0.67"),
    "means@.83": ("prompt/mean@0.83", "response/mean@0.83"),
    "means (final layer)": ("prompt/mean", "response/mean"),
    "final + means@.5": ("final", "prompt/mean@0.5", "response/mean@0.5"),
    "final + means@.33": ("final", "prompt/mean@0.33", "response/mean@0.33"),
    "final + prompt_end + means@.67": ("final", "prompt/prompt_end", "prompt/mean@0.67", "response/mean@0.67"),
    "default + reward": ("final", "reward", "prompt/mean@0.67", "response/mean@0.67"),
    "reward": ("reward",),
}
ALPHA = 0.05
CLEAN_SHARE = 0.4
# Salt of the clean split: neither the reward model's split nor the guard's own.
SALT = 77

Row = dict[str, Any]


@dataclass
class Verdicts:
    """What `rm-ood check` wrote about one set: standardised scores (n,) per channel, rewards, spans of the text."""

    z: dict[str, np.ndarray]
    reward: np.ndarray
    length: np.ndarray
    seconds: float = 0.0
    joined: dict[tuple[str, ...], np.ndarray] = field(default_factory=dict)

    def join(self, channels: tuple[str, ...]) -> np.ndarray:
        """Combined score of a guard that has these channels."""
        return np.max([self.z[name] for name in channels], axis=0)


def main(argv: Sequence[str] | None = None) -> int:
    """Fit, check every set, print the tables as Markdown and write the rows."""
    a = _arguments(argv)
    work = Path(a.work)
    work.mkdir(parents=True, exist_ok=True)
    guard_rows, clean_rows = split(Path(a.model))
    guard_folder = work / "guard"
    if a.refit or not guard_folder.exists():
        command("fit", "--model", a.model, "--data", dump(work / "fit.jsonl.gz", guard_rows), "--output", guard_folder,
                "--overwrite", "--alpha", ALPHA, "--calibration-share", 0.4, "--channels", ",".join(CHANNELS),
                "--max-length", 320, "--dtype", a.dtype)  # fmt: skip
    sets = {"clean": both_sides(clean_rows), **dict(shifted_sets(Path(a.data), clean_rows, a.rows))}
    verdicts = {name: check(a, work, guard_folder, name, rows) for name, rows in sets.items()}
    report(OODGuard.from_pretrained(guard_folder), verdicts, Path(a.output))
    return 0


def split(model: Path) -> tuple[list[Row], list[Row]]:
    """Rows for the guard, and clean rows that nobody has seen; by prompt."""
    rows = [dict(row) for row in iter_rows(model / "heldout.jsonl.gz")]
    clean = [hash_fraction(prompt_key(row["prompt"]), SALT) < CLEAN_SHARE for row in rows]
    return (
        [row for row, c in zip(rows, clean, strict=True) if not c],
        [row for row, c in zip(rows, clean, strict=True) if c],
    )


def both_sides(rows: list[Row]) -> list[Row]:
    return [
        {"id": f"{row['id']}#{side}", "prompt": row["prompt"], "response": row[side]}
        for row in rows
        for side in ("chosen", "rejected")
    ]


def shifted_sets(data: Path, clean: list[Row], limit: int) -> Iterator[tuple[str, list[Row]]]:
    """(name, rows) of every shift; the name begins with the side that is shifted."""

    def rows(name: str, **want: str) -> list[Row]:
        path = data / f"{name}.jsonl.gz"
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            found = [json.loads(line) for line in lines]
        return [row for row in found if all(row.get(k) == v for k, v in want.items())]

    def chosen(found: list[Row]) -> list[Row]:
        step = max(1, len(found) // limit)
        return [{"id": r["id"], "prompt": r["prompt"], "response": r["chosen"]} for r in found[::step][:limit]]

    yield "both: maths (gsm8k)", chosen(rows("preference/gsm8k_en"))
    yield "both: code (humanevalpack)", chosen(rows("preference/humanevalpack"))
    for language in ("de", "es", "fr", "zh"):
        yield (
            f"prompt: maths in {language}, answers in English",
            chosen(rows("preference/mgsm_prompt_shift", lang=language)),
        )
    english = {r["id"]: r for r in rows("preference/truthfulqa_multi", lang="en")}
    for language in ("es", "ca"):
        other = [r for r in rows("preference/truthfulqa_multi", lang=language) if r["id"] in english]
        yield (
            f"prompt: truthfulqa {language}",
            chosen([{**r, "chosen": english[r["id"]]["chosen"]} for r in other]),
        )
        yield (
            f"response: truthfulqa {language}",
            chosen([{**r, "prompt": english[r["id"]]["prompt"]} for r in other]),
        )
        yield f"both: truthfulqa {language}", chosen(other)
    yield "none: truthfulqa en (another domain)", chosen(list(english.values()))
    words = sorted({word for row in clean for word in row["prompt"].split() if word.isalpha()})
    for p in (0.1, 0.5):
        for side in ("prompt", "response"):
            name = "chosen" if side == "response" else "prompt"
            noisy = [{**row, name: noise(row[name], p, words)} for row in clean]
            yield f"{side}: word noise {p}", chosen(noisy)


def noise(text: str, p: float, words: list[str]) -> str:
    """Word noise that leaves the dialogue's turn markers alone."""
    turns = text.split("\n\n")
    return "\n\n".join(
        f"{head}: {word_perturbation(body, p, words)}"
        if sep and head in ("Human", "Assistant")
        else word_perturbation(t, p, words)
        for t in turns
        for head, sep, body in [t.partition(": ")]
    )


def check(a: argparse.Namespace, work: Path, guard: Path, name: str, rows: list[Row]) -> Verdicts:
    """Verdicts of one set, through the command line; kept in `work` and read again next time."""
    stem = "".join(c if c.isalnum() else "-" for c in name)
    out = work / f"{stem}.verdicts.jsonl.gz"
    started = time.monotonic()
    if a.refit or not out.exists():
        command("check", "--guard", guard, "--model", a.model, "--data", dump(work / f"{stem}.jsonl.gz", rows),
                "--output", out, "--dtype", a.dtype)  # fmt: skip
    found = list(iter_rows(out))
    z = {
        channel: np.array([row["axes"][Channel.parse(channel).axis]["channels"][channel]["ood_score"] for row in found])
        for channel in (*CHANNELS, "reward")
    }
    return Verdicts(
        z=z,
        reward=np.array([row["reward"] for row in found]),
        length=np.array([len(row["response"]) for row in rows]),
        seconds=time.monotonic() - started,
    )


def report(guard: OODGuard, verdicts: dict[str, Verdicts], output: Path) -> None:
    """Print the tables and write every figure as one row."""
    state = guard._fitted()
    clean = verdicts["clean"]
    table = []
    calibration = {join: state.profile(c).calibration_scores() for join, c in JOINS.items()}
    for name, found in verdicts.items():
        row: Row = {"set": name, "n": len(found.reward)}
        for join, channels in JOINS.items():
            score = found.join(channels)
            flagged = p_values(calibration[join], score, 0.95) <= ALPHA
            row[f"{join} auroc"] = float("nan") if name == "clean" else auroc(clean.join(channels), score)
            row[f"{join} flagged"] = float(flagged.mean())
        for axis in ("prompt", "response"):
            channels = tuple(n for n in JOINS["default"] if Channel.parse(n).axis == axis)
            ranked = state.profile(channels).calibration_scores()
            row[f"default {axis} flagged"] = float((p_values(ranked, found.join(channels), 0.95) <= ALPHA).mean())
        table.append(row)
    output.mkdir(parents=True, exist_ok=True)
    (output / "detection.json").write_text(
        json.dumps({"alpha": ALPHA, "rows": table, **_false_alarms(state, clean)}, indent=1)
    )
    print_main(table)
    print_joins(table)


def _false_alarms(state: Any, clean: Verdicts) -> dict[str, Any]:
    """False alarms on clean data in all and by quintile of the response's length, per join."""
    edges = np.quantile(clean.length, [0.2, 0.4, 0.6, 0.8])
    quintile = np.searchsorted(edges, clean.length)
    rates = {}
    for join in ("final", "default"):
        flagged = p_values(state.profile(JOINS[join]).calibration_scores(), clean.join(JOINS[join]), 0.95) <= ALPHA
        rates[join] = {
            "all": float(flagged.mean()),
            "flags": int(flagged.sum()),
            "n": len(flagged),
            "n_calibration": state.table.n_b,
            "by_length_quintile": [float(flagged[quintile == q].mean()) for q in range(5)],
        }
        print(f"false alarms, {join}: {rates[join]}")
    return {"false_alarms": rates}


def print_main(table: list[Row]) -> None:
    print("\n| set (shifted side first) | n | final: AUROC | flagged | default: AUROC | flagged | prompt | response |")
    print("|---|---|---|---|---|---|---|---|")
    for row in table:
        cells = [row["final auroc"], row["final flagged"], row["default auroc"], row["default flagged"]]
        cells += [row["default prompt flagged"], row["default response flagged"]]
        print(f"| {row['set']} | {row['n']} | " + " | ".join("-" if np.isnan(c) else f"{c:.3f}" for c in cells) + " |")


def print_joins(table: list[Row]) -> None:
    """Means over the shifted sets, for every join."""
    shifted = [row for row in table if row["set"].split(":")[0] in ("prompt", "response", "both")]
    print("\n| channels | mean AUROC: prompt | response | both | all | mean flagged | clean flagged |")
    print("|---" * 7 + "|")
    for join in JOINS:
        by_side = [
            np.mean([r[f"{join} auroc"] for r in shifted if r["set"].startswith(side)])
            for side in ("prompt", "response", "both")
        ]
        overall = np.mean([r[f"{join} auroc"] for r in shifted])
        flagged = np.mean([r[f"{join} flagged"] for r in shifted])
        clean = table[0][f"{join} flagged"]
        cells = [*by_side, overall, flagged, clean]
        print(f"| {join} | " + " | ".join(f"{c:.3f}" for c in cells) + " |")


def command(*arguments: object) -> None:
    """One `rm-ood` command in this interpreter's environment."""
    subprocess.run([sys.executable, "-m", "rm_ood.cli", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


def dump(path: Path, rows: list[Row]) -> Path:
    with gzip.open(path, "wt", encoding="utf-8") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default=str(ROOT / "benchmarks/.cache/smollm2-rm"), help="folder of train_reward_model.py"
    )
    parser.add_argument("--data", default=str(ROOT.parent / "shared/data"), help="folder with preference/*.jsonl.gz")
    parser.add_argument("--work", default=str(ROOT / "benchmarks/.cache/detection"), help="verdicts are kept here")
    parser.add_argument("--output", default=str(ROOT / "benchmarks/results"), help="where detection.json goes")
    parser.add_argument("--rows", type=int, default=100, help="rows per shift (default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="dtype of the reward model (default: %(default)s)")
    parser.add_argument("--refit", action="store_true", help="do not reuse what lies in --work")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
