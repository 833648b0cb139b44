"""Which depths and which scores of the span means to join: the choice of the default channels, on the development half.

    python benchmarks/run.py joins

Every set of up to three depths, by five ways to score a span mean: the distance at length 1, the distance weighed against
noisy copies, their ratio, and either distance beside the ratio; joined with `final` and calibrated as the guard does. Writes
`joins.json`: mean AUROC by side over the development cells, and on planted shifts, which is what `--channels auto` goes by.
From the vectors that `detection --half development` keeps.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cells
import detection_scores
import numpy as np
import train_reward_model as training
from detection_scores import DEPTHS, Scores
from scipy import stats
from suites.detection import ROOT, auroc, cell_sets, joined

from rm_ood.channels import FINAL

# Name -> pooling of the channel -> column of raw scores.
SCORES: Mapping[str, Mapping[str, str]] = {
    "distance": {"mean": "mahalanobis++"},
    "weighed distance": {"mean": "contrast"},
    "ratio": {"contrast": "ratio"},
    "distance, ratio": {"mean": "mahalanobis++", "contrast": "ratio"},
    "weighed distance, ratio": {"mean": "contrast", "contrast": "ratio"},
}


def columns(depths: Sequence[float], scores: Mapping[str, str]) -> dict[str, str]:
    """Channel -> column of raw scores."""
    found = {FINAL: f"{FINAL}|mahalanobis"}
    for axis, depth, (pooling, column) in itertools.product(("prompt", "response"), depths, scores.items()):
        found[f"{axis}/{pooling}@{depth}"] = f"{axis}/mean@{depth}|{column}"
    return found


def row(scores: Scores, seed: int, depths: Sequence[float], kind: str) -> dict[str, Any]:
    """Mean AUROC by side over the cells, their mean, and the mean over planted shifts."""
    found = joined(scores, columns(depths, SCORES[kind]), seed).scores

    def seen(clean: slice, shifted: slice) -> float:
        return float(np.mean([auroc(x[clean], x[shifted]) for x in found]))

    by_side: dict[str, list[float]] = {}
    for name, rows in cell_sets(scores).items():
        by_side.setdefault(name.split("|")[1], []).append(seen(scores.sets["clean"], rows))
    planted = [rows for name, rows in scores.sets.items() if name.startswith("planted")]
    means = {side: float(np.mean(by_side[side])) for side in cells.SIDES}
    return {
        "depths": list(depths),
        "scores": kind,
        **means,
        "mean": float(np.mean(list(means.values()))),
        "planted": float(np.mean([seen(scores.sets["tuning"], rows) for rows in planted])),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Print the best of both reward models and how planted shifts rank the sets of depths; write `joins.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data")
    parser.add_argument("--work", type=Path, default=ROOT / "benchmarks/.cache")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results")
    a = parser.parse_args(argv)
    data, table = cells.Data(a.data), {}
    sets = [depths for k in (1, 2, 3) for depths in itertools.combinations(DEPTHS, k)]
    for recipe in cells.REWARD_MODELS["development"]:
        folder = training.trained(recipe, a.data, a.work)
        scores = detection_scores.score(recipe, folder, data, "development", a.work)
        table[folder.name] = [row(scores, recipe.seed, depths, kind) for depths in sets for kind in SCORES]
    (a.output / "joins.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    both = [(float(np.mean([r["mean"] for r in rows])), rows) for rows in zip(*table.values(), strict=True)]
    print("| depths | scores | mean | " + " | ".join(f"{name}: prompt / response / both" for name in table) + " |")
    print("|---" * (3 + len(table)) + "|")
    for mean, rows in sorted(both, key=lambda item: -item[0])[:15]:
        sides = [" / ".join(f"{r[side]:.3f}" for side in cells.SIDES) for r in rows]
        print(f"| {rows[0]['depths']} | {rows[0]['scores']} | {mean:.4f} | " + " | ".join(sides) + " |")
    for name, rows in table.items():
        of = [r for r in rows if r["scores"] == "weighed distance, ratio"]
        rank = stats.spearmanr([r["planted"] for r in of], [r["mean"] for r in of]).statistic
        print(f"{name}: planted shifts rank the sets of depths as the cells do, Spearman {rank:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
