"""The detectors of the literature on the guard's own vectors, fitted on the prompts that the guard was fitted on."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
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
from rm_ood.errors import CalibrationWarning, CaptureError, InputError, NonFiniteError, OODGuardError
from rm_ood.fitting import WINDOW_BATCHES, windows
from rm_ood.guard import OODGuard
from rm_ood.preferences import REJECTED, Item, RowReader, prompt_key
from rm_ood.rows import NumberedRows, numbered_rows
from rm_ood.text import Encoded, TextEncoder

# What `dropped` counts under.
FIT_DATA, BACKGROUND = "fit data", "background"
Fitted = dict[str, tuple[str | tuple[str, ...], Detector]]


def fit_baselines(
    guard: OODGuard,
    dataset: Any,
    *,
    background: Any = None,
    dropped: Counter[str] | None = None,
    progress: bool = True,
) -> Fitted:
    """Single Gaussian, Mahalanobis++, nearest neighbours, residual subspace and norm on every channel of prompt or response;
    relative Mahalanobis where there is a background; `response given prompt` where the guard has a prompt's vector.

    Args:
        guard: fitted, with its reward model.
        dataset: what the guard was fitted on; rows of prompts that it was not fitted on are left out.
        background: general text for the relative distance: rows with prompt and response, or with `text`, of which the
            first half is taken for the prompt.
        dropped: gets the number of rows and texts that were left out, under `"fit data"` and `"background"`. As in the fit,
            what cannot be used raises, or is left out where the guard's `on_bad` says so.
        progress: show progress bars on stderr.

    Returns:
        Name -> (channel or channels, detector), as `Scorer` takes them.

    Raises:
        InputError: no row of the fit prompts; rows that cannot be read, under `on_bad="error"`.
        CalibrationError, NonFiniteError: vectors that a detector cannot be fitted on.
    """
    state = guard.state
    fitted_on = set(state.fit_keys.tolist())
    policy = _Policy(state.config.on_bad == "drop", Counter() if dropped is None else dropped)
    fitted = (
        item
        for of_row in policy.items(dataset, state.config.reader(labelled=True), FIT_DATA)
        for item in of_row
        if prompt_key(item.prompt) in fitted_on
    )
    vectors, items = _vectors(guard, fitted, policy, FIT_DATA, progress)
    if not items:
        raise InputError(
            "fit data: none of these rows has a prompt that the guard was fitted on. Pass the data that it was fitted on."
        )
    labels = [REJECTED if item.label is None else item.label for item in items]
    once = {prompt_key(item.prompt): i for i, item in reversed(list(enumerate(items)))}
    first = torch.tensor(sorted(once.values()))
    others: dict[str, Tensor] = {}
    if background is not None:
        plain = replace(state.config.reader(labelled=False), group_column=None)
        general = (of_row[0] for of_row in policy.items(_halved(background), plain, BACKGROUND))
        others, _ = _vectors(guard, general, policy, BACKGROUND, progress)
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


@dataclass(frozen=True)
class _Policy:
    """What happens to rows and texts that cannot be used, as in the fit: raise, or leave out and count."""

    drop: bool
    dropped: Counter[str]

    def refuse(self, error: OODGuardError, what: str) -> None:
        """Raise, or count; vectors that are not the reward's are no fault of the data, and raise always."""
        if not self.drop or isinstance(error, CaptureError):
            raise error
        self.dropped[what] += 1

    def items(self, dataset: Any, reader: RowReader, what: str) -> Iterator[list[Item]]:
        """The items of each usable row."""
        for number, row in numbered_rows(dataset):
            try:
                found = reader.items(row, number)
            except InputError as error:
                self.refuse(error, what)
                continue
            yield found


def _halved(dataset: Any) -> NumberedRows:
    """Rows of which those with a `text` alone became a prompt and a response."""
    return NumberedRows((number, half) for number, row in numbered_rows(dataset) for half in _halves(row))


def _halves(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if not isinstance(row.get("text"), str) or row.get("prompt") is not None:
        return [row]
    words = row["text"].split()
    half = len(words) // 2
    # One word has no halves.
    return [{"prompt": " ".join(words[:half]), "response": " ".join(words[half:])}] if half else []


def _vectors(
    guard: OODGuard, items: Iterator[Item], policy: _Policy, what: str, progress: bool
) -> tuple[dict[str, Tensor], list[Item]]:
    """Channel -> (n, H) float32 on the CPU, and the n items that have them: those that can be read, with finite vectors."""
    scoring = guard.scoring()
    parts: dict[str, list[Tensor]] = {}
    kept: list[Item] = []
    with tqdm(desc=what, unit="item", disable=not progress) as bar:
        for window in windows(items, guard.config.batch_size * WINDOW_BATCHES):
            readable = _readable(window, scoring.text, policy, what)
            batches = list(scoring.column.batches([e for _, e in readable], scoring.text)) if readable else []
            failed: dict[int, str | None] = {
                int(i): f for index, part in batches for i, f in zip(index, part.failed, strict=True)
            }
            good = [i for i in range(len(readable)) if not _failed(readable[i][0], failed[i], policy, what)]
            kept += [readable[i][0] for i in good]
            if good:
                back = torch.cat([torch.from_numpy(index) for index, _ in batches]).argsort()[good]
                for name in batches[0][1].vectors:
                    joined = torch.cat([part.vectors[name].float().cpu() for _, part in batches])
                    parts.setdefault(name, []).append(joined[back])
            bar.update(len(window))
    return {name: torch.cat(found) for name, found in parts.items()}, kept


def _readable(window: list[Item], text: TextEncoder, policy: _Policy, what: str) -> list[tuple[Item, Encoded]]:
    found = []
    for item in window:
        try:
            found.append((item, text.encode(item.prompt, item.response, item.where)))
        except InputError as error:
            policy.refuse(error, what)
    return found


def _failed(item: Item, reason: str | None, policy: _Policy, what: str) -> bool:
    """Whether an item's vectors are no use, where that does not raise."""
    if reason is not None:
        wrong = NonFiniteError(f"{what}: {item.where}: NaN or infinity in its vectors or reward")
        policy.refuse(wrong if reason == "non_finite" else CaptureError(f"{what}: {item.where}: {reason}"), what)
    return reason is not None
