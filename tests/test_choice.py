"""Channels chosen by planted shifts, on a real small model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rm_ood import CalibrationError, InputError, OODGuard
from rm_ood.choice import DEPTHS, choose_channels, fit_choosing, pool
from rm_ood.preferences import prompt_key

pytestmark = pytest.mark.filterwarnings("ignore::rm_ood.CalibrationWarning", "ignore::rm_ood.TokenisationWarning")


def sentences(n: int, seed: int = 0) -> list[dict[str, Any]]:
    from conftest import preference_rows

    return preference_rows(n, seed)


def made(model: Any, tokenizer: Any, **settings: Any) -> OODGuard:
    channels = pool(model, settings.get("axes", ("prompt", "response")))
    return OODGuard(model, tokenizer, **{"channels": channels, "alpha": 0.1, "max_length": 64, **settings})


@pytest.fixture(scope="module")
def chosen(shared_decoder: Any, decoder_tokenizer: Any) -> Any:
    guard = made(shared_decoder, decoder_tokenizer)
    return guard, fit_choosing(guard, sentences(500), calibration=0.4, progress=False)


def test_pool_has_each_block_once_and_no_block_before_the_first(tiny_decoder: Any, minilm: Any) -> None:
    shallow = pool(tiny_decoder[0], ("prompt", "response"))
    n_blocks = tiny_decoder[0].config.num_hidden_layers
    means = [name for name in shallow if name.startswith("prompt/")]
    assert shallow[0] == "final"
    assert len({round(float(name.split("@")[1]) * n_blocks) for name in means}) == len(means)
    assert len(pool(minilm[0], ("response",))) == 1 + len(DEPTHS)
    assert "final" not in pool(minilm[0], ("prompt",))


def test_chosen_guard_is_the_one_with_these_channels_fitted_on_the_other_rows(chosen: Any, tiny_decoder: Any) -> None:
    guard, choice = chosen
    rows = sentences(500)
    assert guard.config.joined == choice.channels
    means = {name for name in choice.channels if "/contrast" not in name}
    assert set(guard.state.detectors) == means
    assert {name.replace("/mean", "/contrast") for name in means - {"final"}} == set(choice.channels) - means
    assert list(choice.candidates.values()) == sorted(choice.candidates.values(), reverse=True)
    assert choice.seen == next(iter(choice.candidates.values())) > 0.5
    # The prompts of the choice were neither fitted nor calibrated on.
    from rm_ood.choice import _others

    kept: dict[int, Any] = {}
    others = [row for _, row in _others(guard, rows, kept)]
    assert len(kept) == choice.n_prompts >= 30
    assert not set(kept) & {prompt_key(row["prompt"]) for row in others}
    again = made(*tiny_decoder, channels=choice.channels).fit(others, calibration=0.4, progress=False)
    prompts, responses = [r["prompt"] for r in rows[:20]], [r["chosen"] for r in rows[:20]]
    np.testing.assert_array_equal(guard.check(prompts, responses).p_values, again.check(prompts, responses).p_values)


def test_choice_is_the_largest_mean_auroc_of_planted_shifts(tiny_decoder: Any) -> None:
    from rm_ood.choice import _planted
    from rm_ood.study.detection import auroc

    model, tokenizer = tiny_decoder
    rows = sentences(260)
    guard = made(model, tokenizer).fit(rows, calibration=0.5, progress=False)
    items = [(row["prompt"], row["chosen"]) for row in sentences(40, seed=5)]
    choice = choose_channels(guard, items)
    name, value = list(choice.candidates.items())[-1]
    depths = name.split(" + ")
    fitted = [c for c in guard.state.channel_names if c != "reward"]
    listed = [c for c in fitted if c == "final" or any(float(c.split("@")[1]) == float(d) for d in depths)]
    guard.keep(listed)

    def scores(group: Any) -> Any:
        decisions = guard.check([p for p, _ in group], [r for _, r in group])
        return np.max([axis.ood_scores for axis in decisions.axes.values()], axis=0)

    clean = scores(items)
    by_hand = [auroc(clean, scores(group)) for group in _planted(items, ("prompt", "response"))]
    assert value == pytest.approx(np.mean(by_hand), abs=1e-3)


def test_choice_is_saved_with_the_guard(chosen: Any, tiny_decoder: Any, tmp_path: Path) -> None:
    guard, choice = chosen
    guard.save_pretrained(tmp_path / "guard")
    back = OODGuard.from_pretrained(tmp_path / "guard", *tiny_decoder)
    assert back.config.joined == choice.channels
    assert back.state.record["choice"] == json.loads(json.dumps(choice.to_dict()))
    assert str(choice.n_prompts) in str(choice)
    assert choice.channels[1] in str(choice)


@pytest.mark.parametrize("source", [list, iter])
def test_too_few_prompts_to_choose_on_are_told_before_the_first_forward(tiny_decoder: Any, source: Any) -> None:
    forwards: list[Any] = []
    tiny_decoder[0].register_forward_pre_hook(lambda *inputs: forwards.append(inputs))
    with pytest.raises(CalibrationError, match="prompts to choose on, at least 30"):
        fit_choosing(made(*tiny_decoder), source(sentences(200)), calibration=0.6, progress=False)
    assert not forwards


def test_what_was_read_to_count_prompts_is_fitted_on_and_unusable_rows_are_dropped(
    chosen: Any, tiny_decoder: Any
) -> None:
    guard = made(*tiny_decoder, on_bad="drop")
    unusable = [{"prompt": "x"}, {"prompt": "", "chosen": "a", "rejected": "b"}]
    choice = fit_choosing(guard, iter([*unusable, *sentences(500)]), calibration=0.4, progress=False)
    assert choice == chosen[1]
    assert guard.state.record["rows"] == 2 + 500 - choice.n_prompts
    assert (guard.state.record["dropped"], chosen[0].state.record["dropped"]) == (2, 0)


def test_an_error_names_the_row_of_the_file(tiny_decoder: Any) -> None:
    # Of the rows before these, some are kept for the choice.
    rows, wrong = sentences(500), {"prompt": "x"}
    long = {"prompt": "question " * 200, "chosen": "an answer", "rejected": "another"}
    with pytest.raises(InputError, match=r"rows\[470\]: needs columns"):
        fit_choosing(made(*tiny_decoder), [*rows[:470], wrong, *rows[470:]], progress=False)
    strict = made(*tiny_decoder, on_too_long="error")
    with pytest.raises(InputError, match=r"rows\[470\]"):
        fit_choosing(strict, [*rows[:470], long, *rows[470:]], progress=False)
    with pytest.raises(InputError, match=r"rows\[100\]: needs columns"):
        fit_choosing(made(*tiny_decoder), rows, calibration=[*rows[:100], wrong], progress=False)


def test_guard_without_span_means_has_nothing_to_choose_from(tiny_decoder: Any) -> None:
    with pytest.raises(InputError, match="this guard has"):
        fit_choosing(made(*tiny_decoder, channels="final"), sentences(10))


def test_keep_refuses_channels_that_were_not_fitted(chosen: Any) -> None:
    with pytest.raises(InputError, match="were not fitted"):
        chosen[0].keep("prompt/prompt_end")
