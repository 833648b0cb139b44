from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rm_ood.config import GuardConfig
from rm_ood.detectors import ConditionalMahalanobis, MahalanobisDetector
from rm_ood.errors import InputError


def test_defaults_are_the_designs() -> None:
    config = GuardConfig()
    assert config.axes == ("prompt", "response")
    assert (config.alpha, config.confidence, config.seed, config.batch_size) == (0.01, 0.95, 0, 16)
    assert config.joined == config.channels
    assert config.joined[0] == "final"


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        GuardConfig().alpha = 0.5  # type: ignore[misc]


@given(
    alpha=st.floats(0.001, 0.5),
    confidence=st.none() | st.floats(0.5, 0.99),
    channels=st.sampled_from(["default", "final", ["reward", "final"], ["prompt/mean@-2"]]),
    max_length=st.none() | st.integers(2, 10_000),
    shrinkage=st.just("oas") | st.floats(0, 1),
    groups=st.sampled_from([None, "length", "source"]),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_settings_survive_json(**settings: Any) -> None:
    config = GuardConfig(**settings)
    assert GuardConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_one_axis_may_be_a_string() -> None:
    assert GuardConfig(axes="response").axes == ("response",)  # type: ignore[arg-type]


def test_an_unknown_setting_is_named_beside_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"\['alhpa'\] are not known.*'alpha'"):
        GuardConfig.from_dict({"alhpa": 0.1})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("alpha", 0), ("alpha", 1), ("alpha", float("nan")), ("alpha", "0.1"), ("alpha", None), ("alpha", True),
        ("confidence", 0), ("confidence", 1.0), ("confidence", float("nan")), ("confidence", "high"),
        ("detector", "knn"), ("shrinkage", "ledoit"), ("shrinkage", -0.1), ("shrinkage", 1.1), ("shrinkage", None),
        ("shrinkage", float("nan")), ("floor", -1), ("floor", 2), ("floor", float("inf")), ("floor", "small"),
        ("batch_size", 0), ("batch_size", 1.5), ("batch_size", True), ("max_calibration", -1), ("max_chars", "many"),
        ("max_length", 1), ("max_length", 7.5), ("max_length", "long"), ("seed", 2**63), ("seed", 0.5), ("seed", None),
        ("on_bad", "ignore"), ("eval_mode", "train"), ("on_too_long", "cut"), ("text_format", "xml"),
        ("read_out", "middle"), ("reward", "logits:x"), ("reward", "logits:"), ("reward", None),
        ("prompt_pass", "yes"), ("split_special_tokens", 1), ("append_eos", None), ("allow_empty", "no"),
        ("special_tokens", 0),
        ("one_class", 0), ("groups", 3), ("head", 1), ("layers", ["a"]),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_an_error_that_names_setting_value_and_range(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"{name}=.*expected"):
        GuardConfig(**{name: value})


@pytest.mark.parametrize("axes", [(), ("both",)])
def test_axes_are_checked(axes: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match="axes="):
        GuardConfig(axes=axes)


def test_a_channels_name_says_its_detector() -> None:
    config = GuardConfig()
    assert config.detector_type("response_given_prompt/mean@0.67") is ConditionalMahalanobis
    for name in ("final", "response/readout@0.67", "prompt/prompt_end"):
        assert config.detector_type(name) is MahalanobisDetector


def test_every_choice_is_accepted() -> None:
    for name, values in {
        "on_too_long": ("flag", "truncate", "error"),
        "text_format": ("auto", "chat", "pair", "plain"),
        "read_out": ("auto", "non_pad", "last_token", "first"),
        "reward": ("logits", "logits:0", "logits:12"),
        "shrinkage": (0, 0.5, 1, "oas", "likelihood"),
        "axes": (("response",), ("prompt", "response", "response_given_prompt")),
        "floor": (0, 1),
        "confidence": (None, 0.5),
    }.items():
        for value in values:
            assert getattr(GuardConfig(**{name: value}), name) == value
