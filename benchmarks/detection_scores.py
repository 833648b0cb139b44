"""Raw scores of every detector on every set of the detection benchmark, for one reward model.

All detectors get the same vectors, from one forward per text, and are fitted on the same prompts. Ours are the package's own
classes as the guard uses them; the peers are pytorch-ood's, fitted by `fit_features`.
"""

from __future__ import annotations

import hashlib
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
from safetensors import safe_open
from safetensors.torch import save_file
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
        lengths: (n, 2) tokens in the prompt's and the response's span. sets: name -> rows. sources: (n,) the number of what
            an item was made from; noise on a text and the text itself share it. about: of the reward model.
    """

    raw: dict[str, Floats]
    rewards: Floats
    lengths: NDArray[np.int64]
    sets: dict[str, slice]
    sources: NDArray[np.int64]
    about: dict[str, Any]


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
    calibration = cells.clean_items([row for row, c in zip(mine, calibrates, strict=True) if c], recipe.seed)
    clean = cells.clean_items(clean_rows, recipe.seed)
    others = [row for row, c in zip(mine, calibrates, strict=True) if not c]
    # As `rm-ood fit --channels auto` does: what channels are chosen on is neither fitted nor calibrated on.
    tuning = cells.drawn(cells.clean_items(others, recipe.seed), N_PLANTED)
    kept = {prompt_key(item.prompt) for item in tuning}
    fit = [row for row in others if prompt_key(row["prompt"]) not in kept]
    words = vocabulary(row[side] for row in fit for side in ("prompt", "chosen", "rejected"))
    once = list({prompt_key(row["prompt"]): row for row in fit}.values())

    def noisy(text: str) -> str:
        return str(change_prompt(text, lambda core: word_perturbation(core, NOISE, words)))

    sets: dict[str, list[cells.Item]] = {
        "fit": [cells.Item(row["prompt"], row[side]) for row in fit for side in ("chosen", "rejected")],
        "noisy copies": [cells.Item(noisy(row["prompt"]), noisy(row["chosen"])) for row in once],
        "background": data.background()[:N_BACKGROUND],
        "calibration": [item._replace(other=None) for item in calibration],
        "clean": list(clean),
        "tuning": [item._replace(other=None) for item in tuning],
    }
    for cell in cells.cells(data, clean, half, noise_of(words)):
        name = f"{cell.family}|{cell.side}|{cell.name}"
        if name in sets:
            raise ValueError(f"two cells are called {name!r}")
        sets[name] = list(cell.items)
    plain = [(item.prompt, item.response) for item in tuning]
    for name, change in changes(plain).items():
        for side in cells.SIDES if name != EMPTY_RESPONSE else ():
            sides = ("prompt", "response") if side == "both" else (side,)
            moved = [changed(item, i, change, sides, 0) for i, item in enumerate(plain)]
            sets[f"planted|{side}|{name}"] = [cells.Item(str(p), r) for p, r in moved]
    return sets, [0, 1] * len(fit)


def score(
    recipe: training.Recipe,
    folder: Path,
    data: cells.Data,
    half: str,
    work: Path,
    *,
    channels: Sequence[str] = CHANNELS,
) -> Scores:
    """Embed every set with the reward model in `folder`, fit every detector, score everything.

    Embedding takes long and is kept in `work`, in a file that is named by all that it depends on.
    """
    sets, labels = all_sets(recipe, data, half)
    items = [item for group in sets.values() for item in group]
    key = _key(folder, items, channels)
    kept = work / f"vectors-{half}-{folder.name}-{key[:12]}.safetensors"
    if not kept.exists():
        _save(kept, *_embedded(recipe, folder, items, channels))
    with safe_open(kept, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = json.loads(file.metadata()["about"])
    rewards, lengths, head = (tensors.pop(name) for name in ("rewards", "lengths", "head"))
    ends = np.cumsum([len(group) for group in sets.values()])
    rows = {name: slice(int(end) - len(group), int(end)) for (name, group), end in zip(sets.items(), ends, strict=True)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        raw = _score_all(tensors, rows, sets, torch.tensor(labels), head)
    fitted = rewards[rows["fit"], 0]
    about["reward"] = [float(fitted.mean()), float(fitted.std())]
    sources = np.unique([item.source or f"alone {i}" for i, item in enumerate(items)], return_inverse=True)[1]
    return Scores(
        {name: x.double().cpu().numpy() for name, x in raw.items()},
        rewards.numpy(),
        lengths.numpy(),
        rows,
        sources,
        about,
    )


def _key(folder: Path, items: Sequence[cells.Item], channels: Sequence[str]) -> str:
    """SHA-256 of the reward model, of the texts and of the channels."""
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes())
    digest.update(json.dumps([list(channels), [item[:3] for item in items]]).encode())
    return digest.hexdigest()


def _embedded(
    recipe: training.Recipe, folder: Path, items: Sequence[cells.Item], channels: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Vectors by channel with `rewards` (n, 2), `lengths` (n, 2) and the direction of the `head`; and how they were made."""
    started = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # bfloat16 is what a decoder is served in, and on a CPU it is twice as fast.
    model, tokenizer = load_reward_model(
        folder, device=device, dtype="bfloat16" if recipe.base == "smollm2" else "auto"
    )
    with OODGuard(model, tokenizer, channels=channels, max_length=recipe.max_tokens, batch_size=32) as guard:
        vectors, rewards, lengths = _embed(guard, recipe, [(item.prompt, item.response) for item in items])
        pairs = [i for i, item in enumerate(items) if item.other]
        others = _embed(guard, recipe, [(items[i].prompt, str(items[i].other)) for i in pairs])[1]
        head = guard._model_column().capture.reward_direction()
    both = np.full((len(items), 2), np.nan)
    both[:, 0] = rewards
    both[pairs, 1] = others
    training_report = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    about = {
        "recipe": training_report["recipe"],
        "accuracy": training_report["heldout_accuracy"],
        "trained_on": training_report["device"],
        "texts": len(items) + len(pairs),
        "seconds": round(time.monotonic() - started),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }
    return {**vectors, "rewards": torch.tensor(both), "lengths": torch.tensor(lengths), "head": head.cpu()}, about


def _save(path: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file({name: x.contiguous() for name, x in tensors.items()}, part, metadata={"about": json.dumps(about)})
    part.replace(path)


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
    first = {prompt_key(item.prompt): i for i, item in reversed(list(enumerate(sets["fit"])))}
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
            "relative": RelativeMahalanobis(x[rows["background"]]).fit(fit, y),
            "norm": VectorNorm().fit(fit),
        }
        if channel == FINAL:
            ours["project_out_reward"] = _without_reward(fit, y, head)
        raw |= {f"{channel}|{name}": detector.score(x) for name, detector in ours.items()}
        contrasted = ContrastedMahalanobis().fit_noise(x[rows["noisy copies"]]).fit(fit, y)
        weighed, raw[f"{channel}|ratio"] = contrasted.contrasted(x)
        raw[f"{channel}|contrast"] = weighed.min(1).values
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
