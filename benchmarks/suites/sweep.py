"""The map behind the default channels: every depth, pooling and detector alone, on the development reward models.

    python benchmarks/run.py sweep

Mean AUROC over the development cells of `cells.py`, per side; scores are standardised by length on the calibration prompts.
Writes `sweep.json` and draws `sweep.svg`. Some minutes on a GPU, half an hour on two cores.
"""

from __future__ import annotations

import argparse
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
from suites.detection import ROOT, cell_sets

from rm_ood.channels import SPANS, Channel
from rm_ood.length import LengthStandardiser
from rm_ood.study.detection import auroc

POOLINGS = ("prompt/mean", "response/mean", "prompt/prompt_end", "response/readout")
CHANNELS = ("final", *(f"{pooling}@{depth}" for pooling in POOLINGS for depth in DEPTHS))


def side_means(scores: Scores, column: str) -> dict[str, float]:
    """Side -> mean AUROC of one column of raw scores."""
    span = SPANS.index(Channel.parse(column.split("|")[0]).span)
    raw, lengths = scores.raw[column], scores.lengths[:, span]
    calibration, clean = scores.sets["calibration"], scores.sets["clean"]
    curve = LengthStandardiser.fit(raw[calibration], lengths[calibration], logarithmic=bool((raw > 0).all()))
    z = curve(raw, lengths)
    found: dict[str, list[float]] = {}
    for name, rows in cell_sets(scores).items():
        found.setdefault(name.split("|")[1], []).append(auroc(z[clean], z[rows]))
    return {side: float(np.mean(found[side])) for side in cells.SIDES}


def draw(table: Mapping[str, Mapping[str, Mapping[str, float]]], path: Path) -> None:
    """One heat map a reward model and side: detectors by pooling and depth."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(table),
        len(cells.SIDES),
        figsize=(18, 4.6 * len(table)),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    for row, (model, columns) in zip(axes, table.items(), strict=True):
        detectors = sorted({column.split("|")[1] for column in columns})
        places = [channel for channel in CHANNELS if any(column.startswith(f"{channel}|") for column in columns)]
        for axis, side in zip(row, cells.SIDES, strict=True):
            values = [[columns.get(f"{p}|{d}", {}).get(side, np.nan) for p in places] for d in detectors]
            image = axis.imshow(values, vmin=0.4, vmax=1.0, cmap="viridis", aspect="auto")
            axis.set_title(f"{model}, shifted: {side}")
            axis.set_xticks(range(len(places)), places, rotation=90, fontsize=7)
            axis.set_yticks(range(len(detectors)), detectors, fontsize=7)
    figure.colorbar(image, ax=axes, label="mean AUROC", fraction=0.02)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Score what is not scored yet, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=ROOT.parent / "shared/data", help="folder with preference/*.jsonl.gz"
    )
    parser.add_argument(
        "--work", type=Path, default=ROOT / "benchmarks/.cache", help="reward models and vectors are kept here"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--draw-only", action="store_true", help="draw sweep.json again")
    a = parser.parse_args(argv)
    report = a.output / "sweep.json"
    if not a.draw_only:
        table: dict[str, Any] = {}
        for recipe in cells.REWARD_MODELS["development"]:
            folder = training.trained(recipe, a.data, a.work)
            data = cells.Data(a.data)
            scores = detection_scores.score(recipe, folder, data, "development", a.work, channels=CHANNELS)
            alone = [column for column in scores.raw if column.split("|")[0] in CHANNELS]
            table[folder.name] = {column: side_means(scores, column) for column in alone}
        report.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    draw(json.loads(report.read_text(encoding="utf-8")), a.output / "sweep.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
