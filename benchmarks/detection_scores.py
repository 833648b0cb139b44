"""Raw scores of every detector on every set of the detection benchmark, for one reward model; kept in one file.

All detectors get the same vectors, from one forward per text, and are fitted on the same prompts. Ours are the package's own
classes as the guard uses them; the peers are pytorch-ood's, fitted by `fit_features`.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cells
import numpy as np
import torch
import train_reward_model as training
from numpy.typing import NDArray
from peers import pytorch_ood
from torch import Tensor
from tqdm.auto import tqdm

from rm_ood import CalibrationWarning, MahalanobisDetector, OODGuard
from rm_ood.channels import FINAL, Channel
from rm_ood.detectors import (
    ConditionalMahalanobis,
    ContrastedMahalanobis,
    NormalisedMahalanobis,
    RelativeMahalanobis,
    SingleGaussian,
    VectorNorm,
)
from rm_ood.preferences import hash_fraction, prompt_key
from rm_ood.reward_model import load_reward_model
from rm_ood.rewriting import change_prompt, vocabulary, word_perturbation
from rm_ood.study.builtin import another_prompt  # noqa: F401  (registers the built-in shifts)
from rm_ood.study.planted import EMPTY_RESPONSE, changed, changes
from rm_ood.study.registry import ShiftContext, registered_shifts

DEPTHS = (0.17, 0.33, 0.5, 0.67, 0.83, 1.0)
CHANNELS = (FINAL, *(f"{axis}/mean@{depth}" for depth in DEPTHS for axis in ("prompt", "response")))
CALIBRATION_SHARE, NOISE, N_PLANTED, N_BACKGROUND = 0.3, 0.4, 60, 400
GIVEN = "response_given_prompt/mean@0.67"
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """What a reward model and the detectors say of all items, set after set.

    Attributes:
        raw: "channel|detector" -> (n,) scores. rewards: (n, 2), the judged response's and the other's, NaN for none.
        lengths: (n, 2) tokens in the prompt's and the response's span. sets: name -> rows. about: of the reward model.
    """

    raw: dict[str, Floats]
    rewards: Floats
    lengths: NDArray[np.int64]
    sets: dict[str, slice]
    about: dict[str, Any]

    def save(self, path: Path) -> None:
        """Write one compressed file."""
        ends = [rows.stop for rows in self.sets.values()]
        np.savez_compressed(
            path, names=list(self.raw), raw=np.stack(list(self.raw.values()), 1).astype(np.float32), ends=ends,
            rewards=self.rewards, lengths=self.lengths, sets=list(self.sets), about=json.dumps(self.about),
        )  # fmt: skip

    @classmethod
    def load(cls, path: Path) -> Scores:
        """Read what `save` wrote."""
        with np.load(path) as found:
            starts = [0, *found["ends"][:-1]]
            sets = {str(n): slice(int(a), int(b)) for n, a, b in zip(found["sets"], starts, found["ends"], strict=True)}
            raw = {
                str(name): column.astype(np.float64)
                for name, column in zip(found["names"], found["raw"].T, strict=True)
            }
            return cls(raw, found["rewards"], found["lengths"], sets, json.loads(str(found["about"])))


def noise_of(words: Sequence[str]) -> Callable[[str, str, float], str]:
    """A registered shift of the study on one text, by name."""
    shifts = registered_shifts()

    def noise(kind: str, text: str, severity: float) -> str:
        context = ShiftContext("both", severity, 0, words)
        return str(change_prompt(text, lambda core: shifts[kind].function(core, context)))

    return noise


def all_sets(recipe: training.Recipe, data: cells.Data, half: str) -> tuple[dict[str, list[cells.Item]], list[int]]:
    """Name -> items, and the labels of the fit items."""
    rows = [row for row in training.hh_rows(data.folder) if not training.trains(row, recipe)]
    mine, clean_rows = cells.split(rows, recipe.seed)
    calibrates = [hash_fraction(prompt_key(row["prompt"]), recipe.seed) < CALIBRATION_SHARE for row in mine]
    fit = [row for row, c in zip(mine, calibrates, strict=True) if not c]
    calibration = cells.clean_items([row for row, c in zip(mine, calibrates, strict=True) if c], recipe.seed)
    clean = cells.clean_items(clean_rows, recipe.seed)
    words = vocabulary(row[side] for row in fit for side in ("prompt", "chosen", "rejected"))
    once = list({prompt_key(row["prompt"]): row for row in fit}.values())

    def noisy(text: str) -> str:
        return str(change_prompt(text, lambda core: word_perturbation(core, NOISE, words)))

    sets: dict[str, list[cells.Item]] = {
        "fit": [(row["prompt"], row[side], None) for row in fit for side in ("chosen", "rejected")],
        "noisy copies": [(noisy(row["prompt"]), noisy(row["chosen"]), None) for row in once],
        "background": data.background()[:N_BACKGROUND],
        "calibration": [(p, r, None) for p, r, _ in calibration],
        "clean": list(clean),
    }
    for cell in cells.cells(data, clean, half, noise_of(words)):
        name = f"{cell.family}|{cell.side}|{cell.name}"
        if name in sets:
            raise ValueError(f"two cells are called {name!r}")
        sets[name] = list(cell.items)
    tuning = [(p, r) for p, r, _ in calibration][:N_PLANTED]
    for name, change in changes(tuning).items():
        for side in cells.SIDES if name != EMPTY_RESPONSE else ():
            sides = ("prompt", "response") if side == "both" else (side,)
            moved = [changed(item, i, change, sides, 0) for i, item in enumerate(tuning)]
            sets[f"planted|{side}|{name}"] = [(p, r, None) for p, r in moved]
    return sets, [0, 1] * len(fit)


def score(
    recipe: training.Recipe, folder: Path, data: cells.Data, half: str, *, channels: Sequence[str] = CHANNELS
) -> Scores:
    """Embed every set with the reward model in `folder`, fit every detector, score everything."""
    started = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # bfloat16 is what a decoder is served in, and on a CPU it is twice as fast.
    model, tokenizer = load_reward_model(
        folder, device=device, dtype="bfloat16" if recipe.base == "smollm2" else "auto"
    )
    sets, labels = all_sets(recipe, data, half)
    ends = np.cumsum([len(items) for items in sets.values()])
    rows = {name: slice(int(end) - len(items), int(end)) for (name, items), end in zip(sets.items(), ends, strict=True)}
    items = [item for group in sets.values() for item in group]
    with OODGuard(model, tokenizer, channels=channels, max_length=recipe.max_tokens, batch_size=32) as guard:
        vectors, rewards, lengths = _embed(guard, recipe, [(p, r) for p, r, _ in items])
        pairs = [i for i, item in enumerate(items) if item[2]]
        others = _embed(guard, recipe, [(items[i][0], str(items[i][2])) for i in pairs])[1]
        head = guard._model_column().capture.reward_direction()
    both = np.full((len(items), 2), np.nan)
    both[:, 0] = rewards
    both[pairs, 1] = others
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        raw = _score_all(vectors, rows, sets, torch.tensor(labels), head)
    training_report = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    fitted = both[rows["fit"], 0]
    about = {
        "recipe": training_report["recipe"],
        "accuracy": training_report["heldout_accuracy"],
        "trained_on": training_report["device"],
        "reward": [float(fitted.mean()), float(fitted.std())],
        "texts": len(items) + len(pairs),
        "seconds": round(time.monotonic() - started),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }
    return Scores({name: x.double().cpu().numpy() for name, x in raw.items()}, both, lengths, rows, about)


def _embed(
    guard: OODGuard, recipe: training.Recipe, items: Sequence[tuple[str, str]]
) -> tuple[dict[str, Tensor], Floats, Any]:
    column = guard._model_column()
    text = column.text(training.FORMATS[recipe.base])
    encoded = [text.encode(p, r, f"items[{i}]") for i, (p, r) in enumerate(items)]
    vectors: dict[str, Tensor] = {}
    rewards, lengths = np.empty(len(items)), np.empty((len(items), 2), dtype=np.int64)
    with tqdm(total=len(items), desc=f"embed {recipe.base}-{recipe.seed}", unit="text", file=sys.stderr) as bar:
        for index, part in column.batches(encoded, text):
            if any(part.failed):
                raise SystemExit(f"items that cannot be scored: {set(part.failed)}")
            for name, x in part.vectors.items():
                vectors.setdefault(name, torch.empty(len(items), x.shape[1]))[index] = x.float().cpu()
            rewards[index], lengths[index] = part.rewards, part.lengths
            bar.update(len(index))
    return vectors, rewards, lengths


def _score_all(
    vectors: dict[str, Tensor], rows: dict[str, slice], sets: dict[str, list[cells.Item]], labels: Tensor, head: Tensor
) -> dict[str, Tensor]:
    first = {prompt_key(p): i for i, (p, _, _) in reversed(list(enumerate(sets["fit"])))}
    once = torch.tensor(sorted(first.values()))
    raw: dict[str, Tensor] = {}
    for channel, x in vectors.items():
        # As in the guard: each prompt counts once, and has no class.
        is_prompt = Channel.parse(channel).axis == "prompt"
        fit, y = (x[rows["fit"]][once], None) if is_prompt else (x[rows["fit"]], labels)
        ours: dict[str, Any] = {
            "mahalanobis": MahalanobisDetector().fit(fit, y),
            "single Gaussian": SingleGaussian().fit(fit),
            "mahalanobis++": NormalisedMahalanobis().fit(fit, y),
            "contrast": ContrastedMahalanobis().fit_noise(x[rows["noisy copies"]]).fit(fit, y),
            "relative": RelativeMahalanobis(x[rows["background"]]).fit(fit, y),
            "norm": VectorNorm().fit(fit),
        }
        if channel == FINAL:
            ours["project_out_reward"] = _without_reward(fit, y, head)
        raw |= {f"{channel}|{name}": detector.score(x) for name, detector in ours.items()}
        raw |= {f"{channel}|{name}": scores for name, scores in _peers(fit, y, x, head)}
    joint = torch.cat([vectors["prompt/mean@0.67"], vectors["response/mean@0.67"]], 1)
    raw[f"{GIVEN}|conditional"] = ConditionalMahalanobis().fit(joint[rows["fit"]]).score(joint)
    return raw


def _without_reward(x: Tensor, y: Tensor | None, head: Tensor) -> MahalanobisDetector:
    from rm_ood import ClassMoments

    moments = ClassMoments(x.shape[1], 1 if y is None else 2).update(x, y)
    return MahalanobisDetector.from_moments(moments, blind_to=head)


def _peers(fit: Tensor, y: Tensor | None, x: Tensor, head: Tensor) -> Any:
    """(name, scores) of pytorch-ood's detectors with their defaults, and of kNN with the k that is best in development."""
    ood = pytorch_ood()
    classes = torch.zeros(len(fit), dtype=torch.int64) if y is None else y
    peers = {
        "pytorch-ood Mahalanobis": ood.Mahalanobis(None),
        "pytorch-ood RMD": ood.RMD(None),
        "pytorch-ood kNN (k=50)": ood.KNN(None, k=50),
        "pytorch-ood kNN (k=10)": ood.KNN(None, k=10),
        "pytorch-ood kNN (k=1)": ood.KNN(None, k=1),
        "pytorch-ood ViM": ood.ViM(None, d=64, w=head.float(), b=torch.zeros(1)),
    }
    for name, peer in peers.items():
        peer.fit_features(fit.clone(), classes)
        with torch.no_grad():
            yield name, torch.as_tensor(peer.predict_features(x.clone()))
