"""The detectors of the literature on the guard's own vectors, fitted on the prompts that the guard was fitted on."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from rm_ood.channels import FINAL, GIVEN_PROMPT, Channel
from rm_ood.detectors import Detector
from rm_ood.detectors.baselines import KNearestNeighbours, VectorNorm
from rm_ood.detectors.conditional import ConditionalMahalanobis
from rm_ood.detectors.gaussian import NormalisedMahalanobis, SingleGaussian
from rm_ood.detectors.relative import RelativeMahalanobis
from rm_ood.detectors.subspace import ResidualSubspace
from rm_ood.dialogue import Response, Text
from rm_ood.errors import CalibrationWarning, InputError
from rm_ood.fitting import WINDOW_BATCHES, windows
from rm_ood.guard import OODGuard
from rm_ood.preferences import REJECTED, Item, RowReader, prompt_key
from rm_ood.rows import iter_rows

Fitted = dict[str, tuple[str | tuple[str, ...], Detector]]


def fit_baselines(guard: OODGuard, dataset: Any, *, background: Any = None, progress: bool = True) -> Fitted:
    """Single Gaussian, Mahalanobis++, nearest neighbours, residual subspace and norm on every channel of prompt or response;
    relative Mahalanobis where there is a background; `response given prompt` where the guard has a prompt's vector.

    Args:
        guard: fitted, with its reward model.
        dataset: what the guard was fitted on; rows of prompts that it was not fitted on are left out.
        background: general text for the relative distance: rows with prompt and response, or with `text`, of which the
            first half is taken for the prompt.
        progress: show progress bars on stderr.

    Returns:
        Name -> (channel or channels, detector), as `Scorer` takes them.

    Raises:
        InputError: no row of the fit prompts, or rows that cannot be read.
        CalibrationError, NonFiniteError: vectors that a detector cannot be fitted on.
    """
    state = guard.state
    fitted_on = set(state.fit_keys.tolist())
    reader = RowReader(require_labels=not state.config.one_class, max_chars=state.config.max_chars)
    labels: list[int] = []
    keys: list[int] = []
    items = (item for number, row in enumerate(iter_rows(dataset)) for item in reader.items(row, number))
    fitted = (item for item in items if prompt_key(item.prompt) in fitted_on)
    vectors = _vectors(guard, _noting(fitted, labels, keys), "fit baselines", progress)
    if not labels:
        raise InputError(
            "fit data: none of these rows has a prompt that the guard was fitted on. Pass the data that it was fitted on."
        )
    once = {key: i for i, key in reversed(list(enumerate(keys)))}
    first = torch.tensor(sorted(once.values()))
    others = {} if background is None else _vectors(guard, _background(background), "background", progress)
    found: Fitted = {}
    with warnings.catch_warnings():
        # Few rows for the width: the guard's own fit said so already.
        warnings.simplefilter("ignore", CalibrationWarning)
        for channel, x in vectors.items():
            if Channel.parse(channel).axis == GIVEN_PROMPT:
                # The others judge one vector, not one given another.
                continue
            is_prompt = Channel.parse(channel).axis == "prompt"
            # As in the guard: each prompt counts once, and has no class.
            rows = x[first] if is_prompt else x
            classes = None if is_prompt or state.config.one_class else torch.tensor(labels)
            detectors: dict[str, Any] = {
                "single Gaussian": SingleGaussian(),
                "Mahalanobis++": NormalisedMahalanobis(),
                "nearest neighbours": KNearestNeighbours(),
                # The usual number of components, where there are rows enough for it.
                "residual": ResidualSubspace(None if len(rows) > rows.shape[1] else len(rows) // 2),
                "norm": VectorNorm(),
            }
            if others:
                detectors["relative"] = RelativeMahalanobis(others[channel])
            found |= {f"{name} {channel}": (channel, d.fit(rows, classes)) for name, d in detectors.items()}
        prompts = [name for name in vectors if Channel.parse(name).axis == "prompt"]
        if prompts:
            joint = torch.cat([vectors[prompts[0]], vectors[FINAL]], dim=1)
            conditional = ConditionalMahalanobis(vectors[prompts[0]].shape[1])
            classes = None if state.config.one_class else torch.tensor(labels)
            found["response given prompt"] = ((prompts[0], FINAL), conditional.fit(joint, classes))
    return found


def _noting(items: Iterator[Item], labels: list[int], keys: list[int]) -> Iterator[tuple[Text, Response]]:
    for item in items:
        labels.append(item.label if item.label is not None else REJECTED)
        keys.append(prompt_key(item.prompt))
        yield item.prompt, item.response


def _background(dataset: Any) -> Iterator[tuple[Text, Response]]:
    reader = RowReader(require_labels=False)
    for number, row in enumerate(iter_rows(dataset)):
        if isinstance(row.get("text"), str) and row.get("prompt") is None:
            words = row["text"].split()
            half = len(words) // 2
            if half:
                yield " ".join(words[:half]), " ".join(words[half:])
        else:
            item = reader.items(row, number)[0]
            yield item.prompt, item.response


def _vectors(guard: OODGuard, items: Iterator[tuple[Text, Response]], title: str, progress: bool) -> dict[str, Tensor]:
    """Channel -> (n, H) float32 on the CPU, rows in the order of the items."""
    scoring = guard.scoring()
    parts: dict[str, list[Tensor]] = {}
    with tqdm(desc=title, unit="item", disable=not progress) as bar:
        for window in windows(items, guard.config.batch_size * WINDOW_BATCHES):
            batches = list(scoring.column.batches(scoring.encode(window), scoring.text))
            back = torch.cat([torch.from_numpy(index) for index, _ in batches]).argsort()
            for name in batches[0][1].vectors:
                joined = torch.cat([part.vectors[name].float().cpu() for _, part in batches])
                parts.setdefault(name, []).append(joined[back])
            bar.update(len(window))
    return {name: torch.cat(found) for name, found in parts.items()}
