"""Detection quality: every detector, ours and peers', on the same vectors of real reward models, under real shifts.

    python benchmarks/run.py detection --half development
    python benchmarks/run.py detection --half sealed

`cells.py` says what is in either half, and was written before the first run: everything is chosen on the development half,
the sealed half is reported. A provider is a detector on some channels; the channels are joined and ranked as the guard joins
and ranks its own (standardised by length on part A of the calibration prompts, maximum, rank in part B), for peers as for
ours. AUROC is against the clean prompts; flagged is the share with p <= alpha at 95 % confidence. The vectors are kept in
`--work`, under the hash of what they were made from: a few minutes a reward model, on two cores too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cells
import detection_scores
import numpy as np
import train_reward_model as training
from detection_scores import DEPTHS, GIVEN, Scores
from numpy.typing import NDArray
from scipy import stats

from rm_ood.calibration import CalibrationTable, split_parts
from rm_ood.channels import AXES, FINAL, Channel, resolve_channels
from rm_ood.conformal import guaranteed_rank
from rm_ood.study.detection import auroc, fpr95_id_positive
from rm_ood.study.rewards import energy_score, max_softmax_score

TESTS = ("tests/detectors", "tests/test_calibration.py")
ROOT = Path(__file__).resolve().parents[2]
ALPHA, CONFIDENCE, DRAWS, SPLITS = 0.05, 0.95, 400, 5
DEFAULT = resolve_channels("default", ("prompt", "response"))
# The vectors that the default scores: what peers get too.
VECTORS = tuple(dict.fromkeys(str(Channel.parse(name).vector) for name in DEFAULT))
MORE = (0.5, 0.67, 0.83)
PEERS = ("Mahalanobis", "RMD", "kNN (k=50)", "kNN (k=10)", "kNN (k=1)", "ViM")
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Provider:
    """One detector on some channels.

    Attributes:
        scores: (n,) combined scores of every item, once per split of the calibration prompts into parts A and B: part A is
            small, and AUROC is the mean over the splits. One where nothing is calibrated.
        p, axis_p: p-values under the first split.
    """

    scores: tuple[Floats, ...]
    p: Floats | None = None
    axis_p: Mapping[str, Floats] | None = None


def contrast(channels: Sequence[str]) -> dict[str, str]:
    """Channel -> column of raw scores, as the guard's default takes it."""
    parsed = {name: Channel.parse(name) for name in channels}
    detectors = {name: "ratio" if c.pooling == "contrast" else "contrast" for name, c in parsed.items()}
    return {name: f"{c.vector}|{'mahalanobis' if name == FINAL else detectors[name]}" for name, c in parsed.items()}


def spans(depths: Sequence[float], poolings: Sequence[str] = ("mean", "contrast")) -> list[str]:
    return [FINAL, *(f"{axis}/{p}@{depth}" for axis in ("prompt", "response") for depth in depths for p in poolings)]


def providers(scores: Scores, seed: int) -> dict[str, Provider]:
    """Name -> provider; ours first, then peers on the default's channels, then everybody on `final`, then the paper's."""
    found = {
        "default": joined(scores, contrast(DEFAULT), seed),
        "auto": joined(scores, contrast(chosen_channels(scores, seed)), seed),
        "no contrast channels": joined(scores, contrast(VECTORS), seed),
        "span means: mahalanobis++": joined(scores, {**contrast(VECTORS), **_all("mahalanobis++", VECTORS[1:])}, seed),
        "span means: mahalanobis": joined(scores, _all("mahalanobis", VECTORS), seed),
    }
    for name in ("single Gaussian", "relative", "norm"):
        found[name] = joined(scores, _all(name, VECTORS), seed)
    for name in PEERS:
        found[f"peer {name}"] = joined(scores, _all(f"pytorch-ood {name}", VECTORS), seed)
        # The strongest of them in development, kNN with k = 1, gains from more depths there (mean of both models).
        found[f"peer {name}, more depths"] = joined(scores, _all(f"pytorch-ood {name}", spans(MORE, ("mean",))), seed)
    found["final"] = joined(scores, _all("mahalanobis", [FINAL]), seed)
    found["final, project_out_reward"] = joined(scores, _all("project_out_reward", [FINAL]), seed)
    for name in PEERS:
        found[f"peer {name}, final"] = joined(scores, _all(f"pytorch-ood {name}", [FINAL]), seed)
    mean, spread = scores.about["reward"]
    found["low reward"] = Provider((-scores.rewards[:, 0],))
    found["odd reward"] = Provider((np.abs(scores.rewards[:, 0] - mean) / spread,))
    # One score a pair, in tables of their own: NaN where an item has no pair.
    paired = np.isfinite(scores.rewards).all(1)
    for name, function in (("energy (pairs)", energy_score), ("max softmax (pairs)", max_softmax_score)):
        values = np.full(len(paired), np.nan)
        values[paired] = function(*scores.rewards[paired].T)
        found[name] = Provider((values,))
    return found


def _all(detector: str, channels: Sequence[str]) -> dict[str, str]:
    return {channel: f"{channel}|{detector}" for channel in channels}


def joined(scores: Scores, columns: Mapping[str, str], seed: int) -> Provider:
    """Channels calibrated and joined as the guard does it."""
    channels = tuple(columns)
    raw = np.stack([scores.raw[column] for column in columns.values()], 1)
    calibration = scores.sets["calibration"]
    n = calibration.stop - calibration.start
    rankings = []
    for split in range(SPLITS):
        part_a = split_parts(np.arange(n, dtype=np.uint64), seed + split)
        table = CalibrationTable(raw[calibration], channels, scores.lengths[calibration], part_a)
        profile = table.profile(channels, alpha=ALPHA, confidence=CONFIDENCE)
        rankings.append(profile.rank(raw, channels, scores.lengths))
    return Provider(tuple(ranking.score for ranking in rankings), rankings[0].p, rankings[0].axis_p)


def chosen_channels(scores: Scores, seed: int) -> list[str]:
    """The span means that see planted shifts of prompts kept apart best: the rule of `rm-ood fit --channels auto`."""
    planted = [rows for name, rows in scores.sets.items() if name.startswith("planted")]
    clean = scores.sets["tuning"]

    def seen(depths: Sequence[float]) -> float:
        found = joined(scores, contrast(spans(depths)), seed).scores
        return float(np.mean([auroc(score[clean], score[rows]) for score in found for rows in planted]))

    return spans(max((d for k in (1, 2, 3) for d in itertools.combinations(DEPTHS, k)), key=seen))


def cell_table(scores: Scores, found: Mapping[str, Provider]) -> list[dict[str, Any]]:
    """One row per cell: AUROC, FPR95 and flagged share of every provider."""
    clean = scores.sets["clean"]
    table = []
    for name, rows in cell_sets(scores).items():
        family, side, label = name.split("|")
        row: dict[str, Any] = {"family": family, "side": side, "name": label, "n": rows.stop - rows.start}
        for provider, p in found.items():
            both = [(_finite(score[clean]), _finite(score[rows])) for score in p.scores]
            known = all(len(b) for _, b in both)
            row[provider] = {
                "auroc": float(np.mean([auroc(a, b) for a, b in both])) if known else None,
                "missed_at_5": float(np.mean([fpr95_id_positive(a, b) for a, b in both])) if known else None,
                "flagged": None if p.p is None else float((p.p[rows] <= ALPHA).mean()),
                **({} if p.axis_p is None else {x: float((v[rows] <= ALPHA).mean()) for x, v in p.axis_p.items()}),
            }
        table.append(row)
    return table


def cell_sets(scores: Scores) -> dict[str, slice]:
    return {n: rows for n, rows in scores.sets.items() if n.split("|")[0] in ("language", "domain", "noise")}


def _finite(values: Floats) -> Floats:
    return values[~np.isnan(values)]


def side_means(scores: Scores, found: Mapping[str, Provider], seed: int) -> dict[str, dict[str, Any]]:
    """Provider -> side -> mean AUROC over the cells with a 95 % interval, and the default's lead over it.

    Intervals are those of the Bayesian bootstrap over sources (Rubin 1981): a clean dialogue, its noised forms and the
    aligned forms of one text get one weight, in all cells at once.
    """
    rng = np.random.default_rng(seed)
    drawn = rng.exponential(size=(1 + DRAWS, scores.sources.max() + 1)).astype(np.float32)
    # The first draw is the sample itself.
    drawn[0] = 1
    by_side: dict[str, list[slice]] = {}
    for name, rows in cell_sets(scores).items():
        by_side.setdefault(name.split("|")[1], []).append(rows)
    values: dict[str, dict[str, Floats]] = {}
    for provider, p in found.items():
        if np.isnan(p.scores[0]).any():
            continue
        values[provider] = {
            side: np.mean([_resampled(scores, s, rows, drawn) for s in p.scores for rows in cells_], axis=0)
            for side, cells_ in by_side.items()
        }
        values[provider]["all"] = np.mean(list(values[provider].values()), axis=0)
    return {
        provider: {
            side: {
                "auroc": float(drawn_[0]),
                "interval": np.quantile(drawn_[1:], [0.025, 0.975]).tolist(),
                "default_lead": np.quantile((values["default"][side] - drawn_)[1:], [0.025, 0.975]).tolist(),
            }
            for side, drawn_ in sides.items()
        }
        for provider, sides in values.items()
    }


def _resampled(scores: Scores, values: Floats, shifted: slice, drawn: NDArray[np.float32]) -> Floats:
    """AUROC of a cell under every draw of the sources' weights, (draws,)."""
    clean = scores.sets["clean"]
    signs = (np.sign(values[shifted][:, None] - values[clean][None, :]) + 1).astype(np.float32) / 2
    w_shifted, w_clean = drawn[:, scores.sources[shifted]], drawn[:, scores.sources[clean]]
    found: Floats = ((w_shifted @ signs) * w_clean).sum(1) / (w_shifted.sum(1) * w_clean.sum(1))
    return found.astype(np.float64)


def false_alarms(scores: Scores, provider: Provider) -> dict[str, Any]:
    """Flags on the clean prompts, and the central 99.9 % of their exact beta-binomial law."""
    if provider.p is None:
        raise ValueError("a provider without calibration")
    clean, calibration = scores.sets["clean"], scores.sets["calibration"]
    n = clean.stop - clean.start
    n_b = int((~split_parts(np.arange(calibration.stop - calibration.start, dtype=np.uint64), 0)).sum())
    k = guaranteed_rank(n_b, ALPHA, CONFIDENCE)
    law = stats.betabinom(n, k, n_b + 1 - k)
    return {
        "flags": int((provider.p[clean] <= ALPHA).sum()), "n": n, "n_calibration": n_b, "rank": k,
        "band": [int(law.ppf(0.0005)), int(law.ppf(0.9995))], "expected": float(law.mean()),
    }  # fmt: skip


def attribution(scores: Scores, found: Mapping[str, Provider], seed: int) -> list[dict[str, Any]]:
    """On aligned data and noise: how often the prompt's, the response's and the response-given-prompt's flag fires."""
    given = joined(scores, {GIVEN: f"{GIVEN}|conditional"}, seed)
    axes = found["default"].axis_p or {}
    table = []
    for name, rows in {"none||clean": scores.sets["clean"], **cell_sets(scores)}.items():
        family, side, label = name.split("|")
        if side in ("prompt", "response") or family == "none":
            flags = {axis: float((p[rows] <= ALPHA).mean()) for axis, p in axes.items()}
            flags["response_given_prompt"] = (
                float((given.p[rows] <= ALPHA).mean()) if given.p is not None else float("nan")
            )
            table.append({"side": side or "none", "name": label, "family": family, **flags})
    return table


def print_report(half: str, results: Mapping[str, Any]) -> None:
    """Markdown of everything a reader of the README sees."""
    for model, result in results.items():
        means, alarms = result["sides"], result["false_alarms"]
        accuracy = result["about"]["accuracy"]
        print(f"\n### {half}: {model}\n")
        print("Reward model's held-out accuracy: " + ", ".join(f"{k} {v['accuracy']:.3f}" for k, v in accuracy.items()))
        print(f"Auto chose {result['auto']}\n")
        print("| provider | prompt | response | both | mean | flagged: prompt | response | both | clean |")
        print("|---" * 9 + "|")
        for provider, sides in means.items():
            flagged = result["flagged"].get(provider)
            cells_ = [
                f"{sides[s]['auroc']:.3f} ({sides[s]['interval'][0]:.3f}-{sides[s]['interval'][1]:.3f})"
                for s in cells.SIDES
            ]
            rates = ["-"] * 4 if flagged is None else [f"{flagged[s]:.3f}" for s in (*cells.SIDES, "clean")]
            print(f"| {provider} | " + " | ".join([*cells_, f"{sides['all']['auroc']:.3f}", *rates]) + " |")
        for provider in ("default", "final", "auto"):
            a = alarms[provider]
            print(
                f"\nfalse alarms, {provider}: {a['flags']} of {a['n']}, expected {a['expected'] * 1:.1f}, band {a['band']}"
            )
        print("\n| shift | default | best peer | final | energy (pairs) | flagged: default | final |")
        print("|---" * 7 + "|")
        for row in result["cells"]:
            peer = max(row[p]["auroc"] for p in row if isinstance(row[p], dict) and p.startswith("peer"))
            values = [row["default"]["auroc"], peer, row["final"]["auroc"], row["energy (pairs)"]["auroc"]]
            values += [row["default"]["flagged"], row["final"]["flagged"]]
            shown = " | ".join("-" if v is None else f"{v:.3f}" for v in values)
            print(f"| {row['side']}: {row['name']} | {shown} |")
        print("\n| shifted | shift | flagged: prompt | response | response given prompt |\n|---|---|---|---|---|")
        for row in result["attribution"]:
            print(f"| {row['side']} | {row['name']} | " + " | ".join(f"{row[a]:.2f}" for a in AXES if a in row) + " |")


def main(argv: Sequence[str] | None = None) -> int:
    """Train or find the reward models, score or find the scores, print the tables and write `detection-HALF.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--half", choices=cells.HALVES, default="sealed")
    parser.add_argument("--base", choices=sorted(training.BASES), help="only the reward models of this base")
    parser.add_argument(
        "--data", type=Path, default=ROOT.parent / "shared/data", help="folder with preference/*.jsonl.gz"
    )
    parser.add_argument(
        "--work", type=Path, default=ROOT / "benchmarks/.cache", help="reward models and vectors are kept here"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results")
    a = parser.parse_args(argv)
    data, results = cells.Data(a.data), {}
    for recipe in cells.REWARD_MODELS[a.half]:
        if a.base not in (None, recipe.base):
            continue
        folder = training.trained(recipe, a.data, a.work)
        results[folder.name] = result(detection_scores.score(recipe, folder, data, a.half, a.work), recipe.seed)
    print_report(a.half, results)
    a.output.mkdir(parents=True, exist_ok=True)
    report = json.dumps({"alpha": ALPHA, "half": a.half, "reward_models": results}, indent=1) + "\n"
    (a.output / f"detection-{a.half}.json").write_text(report, encoding="utf-8")
    return 0


def result(scores: Scores, seed: int) -> dict[str, Any]:
    """Everything about one reward model, JSON-able."""
    found = providers(scores, seed)
    table = cell_table(scores, found)
    calibrated = {name: p for name, p in found.items() if p.p is not None}
    alarms = {name: false_alarms(scores, p) for name, p in calibrated.items()}
    flagged = {
        name: {
            **{s: float(np.mean([row[name]["flagged"] for row in table if row["side"] == s])) for s in cells.SIDES},
            "clean": alarms[name]["flags"] / alarms[name]["n"],
        }
        for name in calibrated
    }
    return {
        "about": scores.about,
        "auto": chosen_channels(scores, seed),
        "sides": side_means(scores, found, seed),
        "flagged": flagged,
        "false_alarms": alarms,
        "attribution": attribution(scores, found, seed),
        "cells": table,
    }


if __name__ == "__main__":
    sys.exit(main())
