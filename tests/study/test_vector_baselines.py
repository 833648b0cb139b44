"""The literature's detectors are fitted on the guard's own vectors, of the prompts that it was fitted on and no others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import preference_rows

from rm_ood import InputError, OODGuard
from rm_ood.channels import DEFAULT_CHANNELS
from rm_ood.detectors.relative import RelativeMahalanobis
from rm_ood.study.vector_baselines import fit_baselines

KINDS = {"single Gaussian", "Mahalanobis++", "nearest neighbours", "residual", "norm"}


@pytest.fixture(scope="module")
def fitted(minilm_guard: OODGuard) -> dict[str, Any]:
    # Calibration prompts among the rows, and a prompt that stands in two rows.
    rows = [*preference_rows(100), *preference_rows(20, seed=1), preference_rows(1)[0]]
    return dict(fit_baselines(minilm_guard, rows, progress=False))


def vectors(guard: OODGuard, items: list[tuple[Any, Any]], channel: str) -> torch.Tensor:
    scoring = guard.scoring()
    found = torch.empty(len(items), 384)
    for index, _, part in scoring.batches(scoring.encode(items)):
        found[torch.from_numpy(index)] = part.vectors[channel].float()
    return found


def test_every_detector_on_every_channel(fitted: dict[str, Any]) -> None:
    channels = DEFAULT_CHANNELS[:5]
    expected = {f"{kind} {channel}": channel for kind in KINDS for channel in channels}
    assert {name: on for name, (on, _) in fitted.items() if name != "response given prompt"} == expected
    assert fitted["response given prompt"][0] == ("prompt/mean@0.67", "final")


def test_only_prompts_of_the_fit_count_and_each_prompt_once(minilm_guard: OODGuard, fitted: dict[str, Any]) -> None:
    rows = preference_rows(100)
    rows.append(rows[0])
    items = [(row["prompt"], row[which]) for row in rows for which in ("chosen", "rejected")]
    for name, channel, given in (
        ("single Gaussian final", "final", items),
        ("single Gaussian prompt/mean@0.67", "prompt/mean@0.67", items[:200:2]),
    ):
        x = vectors(minilm_guard, given, channel)
        detector = fitted[name][1]
        assert detector.n_samples_ == len(given)
        torch.testing.assert_close(detector.means_[0], x.double().mean(0), rtol=1e-4, atol=1e-5)


def test_a_background_gives_the_relative_distance(minilm_guard: OODGuard) -> None:
    background = [{"text": f"{i} тихий сад біля річки " * 2} for i in range(30)] + [{"prompt": "a b", "response": "c"}]
    found = fit_baselines(minilm_guard, preference_rows(40), background=background, progress=False)
    relative = found["relative final"][1]
    assert isinstance(relative, RelativeMahalanobis)
    assert relative.background_.n_samples_ == 31
    words = str(background[0]["text"]).split()
    x = vectors(minilm_guard, [(" ".join(words[:5]), " ".join(words[5:]))], "final")
    # Nearer to the background than to the fit data.
    assert float(relative.score(x)[0]) > 0


def test_other_data_than_the_guard_s_are_refused(minilm_guard: OODGuard) -> None:
    with pytest.raises(InputError, match="none of these rows has a prompt that the guard was fitted on"):
        fit_baselines(minilm_guard, preference_rows(5, seed=77), progress=False)
