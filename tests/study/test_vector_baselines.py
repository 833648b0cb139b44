"""The literature's detectors are fitted on the guard's own vectors, of the prompts that it was fitted on and no others."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import POISON, preference_rows

from rm_ood import CalibrationWarning, InputError, NonFiniteError, OODGuard
from rm_ood.channels import DEFAULT_CHANNELS
from rm_ood.detectors.relative import RelativeMahalanobis
from rm_ood.preferences import hash_fraction, prompt_key
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
    channels = [name for name in DEFAULT_CHANNELS[:5] if "/contrast" not in name]
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


def test_what_the_fit_left_out_is_left_out_and_counted(tiny_decoder: Any) -> None:
    rows: list[dict[str, Any]] = preference_rows(120)
    fit = next(row["prompt"] for row in rows[60:] if hash_fraction(prompt_key(row["prompt"]), 0) >= 0.5)
    rows += [{"prompt": "x"}, {"prompt": fit, "chosen": "same", "rejected": "same"}]
    rows += [{"prompt": fit, "chosen": "an answer " * 60, "rejected": "another"}]
    rows += [{"prompt": "", "chosen": f"answer {i}", "rejected": f"another {i}"} for i in range(2)]
    options: dict[str, Any] = {"alpha": 0.1, "confidence": None, "max_length": 64, "on_too_long": "error"}
    guard = OODGuard(*tiny_decoder, on_bad="drop", allow_empty=True, channels="final", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        guard.fit(rows, calibration=0.5, progress=False)
    dropped: Counter[str] = Counter()
    background = [*({"text": f"{i} a quiet garden by the river"} for i in range(20)), {"question": "?"}]
    found = fit_baselines(guard, rows, background=background, dropped=dropped, progress=False)
    assert dropped["fit data"] == guard.state.record["dropped"] == 3
    assert dropped["background"] == 1
    assert found["single Gaussian final"][1].n_samples_ == guard.state.record["fit_items"]
    strict = OODGuard(*tiny_decoder, allow_empty=True, channels="final", **options)
    strict._bind(*tiny_decoder, strict.config, guard.state)
    strict._swap(replace(guard.state, config=strict.config))
    with pytest.raises(InputError, match=r"rows\[120\]: needs columns"):
        fit_baselines(strict, rows, progress=False)
    with pytest.raises(InputError, match=r"rows\[122\]\.chosen"):
        fit_baselines(strict, [*rows[:120], rows[0], rows[0], rows[122]], progress=False)


def test_vectors_that_are_not_finite_are_refused_or_left_out(minilm_guard: OODGuard) -> None:
    rows = preference_rows(40)
    rows[7] = {**rows[7], "chosen": f"a {POISON}"}
    with pytest.raises(NonFiniteError, match=r"fit data: rows\[7\]\.chosen: NaN or infinity"):
        fit_baselines(minilm_guard, rows, progress=False)
    loose, state = copy.copy(minilm_guard), minilm_guard.state
    config = replace(state.config, on_bad="drop")
    loose._bind(minilm_guard.model, minilm_guard.tokenizer, config, replace(state, config=config))
    dropped: Counter[str] = Counter()
    found = fit_baselines(loose, rows, dropped=dropped, progress=False)
    loose.detach()
    assert dropped == {"fit data": 1}
    assert found["single Gaussian final"][1].n_samples_ == 79
