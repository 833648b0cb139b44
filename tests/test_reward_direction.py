"""`project_out_reward`: the channel `final` does not see the direction that the reward is read along, whatever the head is."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import preference_rows
from test_readers import ROWS, model_of
from test_ways import lora
from torch import Tensor, nn

from rm_ood import ClassMoments, InputError, MahalanobisDetector, OODGuard
from rm_ood.capture import Capture
from rm_ood.detectors import Projected

pytestmark = [
    pytest.mark.filterwarnings("ignore::rm_ood.CalibrationWarning"),
    # PEFT asks transformers in its old words.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
DATA = preference_rows(160)


def made(model_and_tokenizer: tuple[Any, Any], **options: Any) -> OODGuard:
    settings = {
        "alpha": 0.2,
        "confidence": None,
        "max_length": 64,
        "project_out_reward": True,
        "channels": "final",
        **options,
    }
    return OODGuard(*model_and_tokenizer, **settings).fit(DATA[:120], calibration=0.5, progress=False)


def finals(guard: OODGuard, rows: list[dict[str, Any]] = DATA[120:]) -> Tensor:
    scoring = guard.scoring()
    encoded = scoring.encode([(row["prompt"], row["chosen"]) for row in rows])
    return torch.cat([part.vectors["final"] for _, part in scoring.column.batches(encoded, scoring.text)]).double()


def moved(guard: OODGuard, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of vectors as they are, and three of their standard deviations further along the weight."""
    x, unit = finals(guard), torch.nn.functional.normalize(weight.detach().double(), dim=1)
    along = 3 * (x @ unit.T).std() * unit
    detector = guard.state.detectors["final"]
    return detector.score(x), detector.score(x + along)


@pytest.mark.parametrize("name", ["tiny_decoder", "minilm"])
def test_moving_along_the_rewards_weight_does_not_change_the_score(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model, tokenizer = request.getfixturevalue(name)
    weight = model.get_submodule("classifier" if name == "minilm" else "score").weight
    guard, plain = made((model, tokenizer)), made((model, tokenizer), project_out_reward=False)
    torch.testing.assert_close(
        guard._model_column().capture.reward_direction(), weight.detach().double(), rtol=1e-5, atol=1e-6
    )
    one, two = moved(guard, weight)
    torch.testing.assert_close(two, one, rtol=2e-3, atol=1e-3)
    seen, far = moved(plain, weight)
    assert (far - seen).abs().median() > 2
    # What is left is the distance of the vectors without it.
    fit = finals(guard, DATA[:120])
    ours = MahalanobisDetector.from_moments(ClassMoments(fit.shape[1]).update(fit), shrinkage=0.1, blind_to=weight)
    theirs = Projected(MahalanobisDetector(shrinkage=0.1), weight.detach()).fit(fit)
    torch.testing.assert_close(ours.score(finals(guard)), theirs.score(finals(guard)), rtol=5e-3, atol=0)
    assert "without the direction of the reward" in str(guard.report())
    assert "without the direction" not in str(plain.report())
    guard.save_pretrained(tmp_path / "guard")
    back = OODGuard.from_pretrained(tmp_path / "guard", model, tokenizer)
    assert back.config.project_out_reward
    assert torch.equal(back.state.detectors["final"].score(finals(guard)), one)
    for each in (guard, plain, back):
        each.detach()


def test_other_channels_keep_the_direction(tiny_decoder: Any) -> None:
    with_it = made(tiny_decoder, channels="default").state.detectors
    without = made(tiny_decoder, channels="default", project_out_reward=False).state.detectors
    assert {n for n in with_it if not torch.equal(with_it[n].whitening_, without[n].whitening_)} == {"final"}


@pytest.mark.parametrize("way", ["head", "modules_to_save"])
def test_an_adapter_on_the_head_counts_as_it_runs(way: str, tiny_decoder: Any) -> None:
    model, tokenizer = tiny_decoder
    base = model.score.weight.detach().clone()
    options = {"target_modules": ["q_proj", "score"], "task_type": None} if way == "head" else {}
    wrapped = lora(model, **options)
    guard = made((wrapped, tokenizer))
    direction = guard._model_column().capture.reward_direction()
    x = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        difference = wrapped.get_base_model().score(x)[:, 0].diff()
    torch.testing.assert_close(x.diff(dim=0).double() @ direction[0], difference.double(), rtol=1e-4, atol=1e-5)
    assert torch.cosine_similarity(direction, base.double()).item() < 0.99
    one, two = moved(guard, direction)
    torch.testing.assert_close(two, one, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_large_bias_in_half_precision_does_not_drown_the_weights(dtype: torch.dtype, minilm: Any) -> None:
    model = copy.deepcopy(minilm[0])
    with torch.no_grad():
        model.classifier.bias.fill_(3.0)
    weight = model.to(dtype).classifier.weight.detach().double()
    direction = Capture(model, ("final",)).reward_direction()
    assert float((direction - weight).norm() / weight.norm()) < 0.01


def test_a_head_in_another_dtype_than_the_model(minilm: Any) -> None:
    model = copy.deepcopy(minilm[0]).to(torch.bfloat16)
    model.classifier.float()
    weight = model.classifier.weight.detach().double()
    torch.testing.assert_close(Capture(model, ("final",)).reward_direction(), weight, rtol=1e-5, atol=1e-7)


def test_a_column_of_several_outputs(minilm: Any) -> None:
    model = copy.deepcopy(minilm[0])
    model.classifier = nn.Linear(384, 5)
    capture = Capture(model, ("final",), head="classifier", reward="logits:3")
    torch.testing.assert_close(
        capture.reward_direction()[0], model.classifier.weight[3].detach().double(), rtol=1e-5, atol=1e-6
    )


REFUSED = {"ArmoRM", "QRM", "LDL-Reward", "URM", "GRM", "INF-ORM-backbone-output"}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"2.3-{row.name}")
def test_rewards_of_more_than_one_linear_output_are_refused(row: Any) -> None:
    model = model_of(row)
    capture = Capture(model, (), **row.options)
    if row.name in REFUSED:
        with pytest.raises(InputError, match="project_out_reward: the reward is not one output of a Linear"):
            capture.reward_direction()
        return
    head = model.get_submodule(row.head)
    torch.testing.assert_close(capture.reward_direction()[0], head.weight[0].detach().double(), rtol=1e-5, atol=1e-6)
