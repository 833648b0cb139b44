"""The fit's pass over the data: shrinkage by the likelihood between two halves of the prompts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import preference_rows

from rm_ood import ClassMoments, OODGuard
from rm_ood.covariance import likelihood_shrinkage
from rm_ood.fit import Fitter
from rm_ood.fitting import in_other_half
from rm_ood.preferences import hash_fraction, prompt_key
from rm_ood.vectors import unit_rows

pytestmark = pytest.mark.filterwarnings("ignore::rm_ood.CalibrationWarning")


@pytest.fixture(scope="module")
def model(shared_decoder: Any, decoder_tokenizer: Any) -> tuple[Any, Any]:
    return copy.deepcopy(shared_decoder), decoder_tokenizer


def made(model: tuple[Any, Any], **options: Any) -> OODGuard:
    return OODGuard(*model, alpha=0.05, max_length=128, **options)


def halves(guard: OODGuard, rows: list[dict[str, Any]], name: str) -> list[ClassMoments]:
    """Moments of a response channel for each half of the fit prompts, from vectors of their own forward."""
    scoring, kept = guard.scoring(), [ClassMoments(32, 2), ClassMoments(32, 2)]
    fitted = [row for row in rows if hash_fraction(prompt_key(row["prompt"]), 0) >= 0.5]
    for label, side in enumerate(("chosen", "rejected")):
        encoded = scoring.encode([(row["prompt"], row[side]) for row in fitted])
        for index, part in scoring.column.batches(encoded, scoring.text):
            for i, x in zip(index, part.vectors[name], strict=True):
                half = in_other_half(prompt_key(fitted[i]["prompt"]), 0)
                # Span means count at length 1.
                x = x[None].float() if name == "final" else unit_rows(x[None])
                kept[half].update(x, torch.tensor([label]))
    return kept


def test_the_shrinkage_is_the_likeliest_between_halves_of_the_fit_prompts(model: Any, tmp_path: Any) -> None:
    rows = preference_rows(300)
    guard = made(model, shrinkage="likelihood").fit(rows, calibration=0.5, progress=False)
    for name in ("final", "response/mean@0.67"):
        one, two = halves(guard, rows, name)
        expected = likelihood_shrinkage(
            one.within_scatter(), one.n_samples, two.within_scatter(), two.n_samples, n_classes=2
        )
        assert guard.state.detectors[name].shrinkage_ == pytest.approx(max(expected, 1e-4), rel=1e-9)
        assert guard.state.detectors[name].n_samples_ == one.n_samples + two.n_samples
    plain = made(model).fit(rows, calibration=0.5, progress=False)
    for name, detector in guard.state.detectors.items():
        same = plain.state.detectors[name]
        assert detector.shrinkage_ != same.shrinkage_
        assert detector.class_counts_.tolist() == same.class_counts_.tolist()
        torch.testing.assert_close(detector.means_, same.means_)
    assert guard.state.record["class_counts"] == plain.state.record["class_counts"]
    guard.save_pretrained(tmp_path / "guard")
    back = OODGuard.from_pretrained(tmp_path / "guard", *model)
    assert back.config.shrinkage == "likelihood"
    assert back.check("a question", "an answer") == guard.check("a question", "an answer")
    assert "(likelihood, floor 0.0001)" in str(back.report())
    assert "(likelihood)" in back.report().to_html()


@pytest.mark.parametrize("shrinkage", ["oas", 0.1, "likelihood"])
def test_halves_are_kept_only_when_the_likelihood_is_asked_for(model: Any, shrinkage: float | str) -> None:
    guard = made(model, shrinkage=shrinkage)
    fitter = Fitter(guard._model_column(), guard.config, 0.5)
    fitter.run(preference_rows(60), labelled=True, progress=False)
    assert set(fitter.found.moments.other_half) == (
        set(fitter.found.moments.channels) if shrinkage == "likelihood" else set()
    )
    if shrinkage == "likelihood":
        # All responses to a prompt, one chosen and one rejected, are in one half.
        keys = fitter.found.fit_keys.sorted().tolist()
        n = sum(in_other_half(key, 0) for key in keys)
        assert 0 < n < len(keys)
        assert fitter.found.moments.other_half["final"].counts.tolist() == [n, n]
    assert (
        sum(fitter.found.moments.class_counts()) == fitter.found.counts["fit_items"] == 2 * len(fitter.found.fit_keys)
    )


def test_one_class(model: Any) -> None:
    guard = made(model, shrinkage="likelihood", one_class=True)
    guard.fit(preference_rows(300), calibration=0.5, progress=False)
    assert len(guard.state.detectors["final"].classes_) == 1
    assert guard.report().values["detectors"]["final"]["shrinkage_rule"] == "likelihood"
