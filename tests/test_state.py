"""The fitted state: what it saves it reads back, and nothing else."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from rm_ood import (
    CalibrationTable,
    ClassMoments,
    FormatError,
    GuardConfig,
    InputError,
    MahalanobisDetector,
    MismatchError,
)
from rm_ood.calibration import split_parts
from rm_ood.fingerprint import REQUIRED
from rm_ood.identity import Identity
from rm_ood.state import FittedState

pytestmark = pytest.mark.filterwarnings("ignore::rm_ood.CalibrationWarning")
CHANNELS = ("final", "prompt/mean@0.67")


@pytest.fixture
def state() -> FittedState:
    rng = np.random.default_rng(0)
    detectors = {}
    for name, classes in zip(CHANNELS, (2, 1), strict=True):
        moments = ClassMoments(3, classes)
        moments.update(torch.from_numpy(rng.normal(size=(90, 3))), torch.arange(90) % classes)
        detectors[name] = MahalanobisDetector.from_moments(moments)
    scores = rng.chisquare(3, size=(150, 3))
    table = CalibrationTable(
        scores=scores,
        channels=(*CHANNELS, "reward"),
        lengths=rng.integers(1, 50, size=(150, 2)),
        part_a=split_parts(np.arange(150, dtype=np.uint64), 0),
        groups=tuple("ab"[i % 2] for i in range(150)),
    )
    return FittedState(
        config=GuardConfig(alpha=0.05, channels=CHANNELS, text_format="plain", span_means="raw"),
        detectors=detectors,
        reward_mean=0.5,
        reward_sd=2.0,
        table=table,
        heldout=scores,
        fit_keys=np.array([1, 2, 2**64 - 1], dtype=np.uint64),
        identity=Identity(dict.fromkeys(REQUIRED, "x") | {"dtype": "float32"}),
        record={"fit_items": 90},
    )


def test_saved_state_comes_back_the_same(state: FittedState) -> None:
    back = FittedState.from_saved(*state.to_saved())
    assert back.config == state.config
    assert back.fit_keys.tolist() == state.fit_keys.tolist()
    assert back.table.groups == state.table.groups
    assert back.record == state.record
    x = {name: torch.randn(7, 3) for name in CHANNELS}
    one, two = state.score(x, np.zeros(7)), back.score(x, np.zeros(7))
    assert (one.scores == two.scores).all()
    assert one.channels == two.channels == (*CHANNELS, "reward")
    for key in ("final", "prompt/mean@0.67"):
        assert back.detectors[key].effective_rank_ == state.detectors[key].effective_rank_


def test_precision_of_a_device_is_kept_where_there_is_none(state: FittedState) -> None:
    tensors, config = state.to_saved()
    assert "precision" not in config["detectors"]["final"]
    config["detectors"]["final"]["precision"] = {"mode": "fp16x2", "certificate": 1e-7}
    back = FittedState.from_saved(tensors, config)
    back.score({"final": torch.zeros(2, 3)}, None)
    back.to(torch.device("cpu"))
    assert back.to_saved()[1]["detectors"] == config["detectors"]


def test_state_without_calibration_comes_back(state: FittedState) -> None:
    bare = dataclasses.replace(state, table=None, heldout=None)
    back = FittedState.from_saved(*bare.to_saved())
    assert back.table is None
    assert back.heldout is None


def test_reward_score_is_the_absolute_standardised_reward(state: FittedState) -> None:
    scored = state.score({"final": torch.zeros(3, 3)}, np.array([4.5, -1.5, np.nan]))
    assert scored.scores[:, 1].tolist() == [2.0, 1.0, np.inf]


def test_what_stands_for_a_withheld_reward_is_below_all_that_calibration_saw(state: FittedState) -> None:
    assert state.table is not None
    for farthest in (7.5, 2.0):
        scores = state.table.scores.copy()
        scores[:, 2] = np.linspace(0, farthest, len(scores))
        # Lowest of the rewards with these distances from the mean.
        lowest = state.reward_mean - farthest * state.reward_sd
        known = dataclasses.replace(state, table=dataclasses.replace(state.table, scores=scores))
        assert known.reward_floor == min(lowest, 0.5 - 3 * 2.0)
    assert dataclasses.replace(state, table=None).reward_floor == 0.5 - 3 * 2.0


def test_unknown_channel_is_a_mismatch(state: FittedState) -> None:
    with pytest.raises(MismatchError, match="are not in this guard"):
        state.score({"response/mean": torch.zeros(3, 3)}, None)


def test_none_of_the_joined_channels_is_an_error(state: FittedState) -> None:
    from rm_ood.embed import Embedded

    part = Embedded({}, np.zeros(1), None, [None], [()], np.zeros(1, bool))
    scored = state.score({"final": torch.zeros(1, 3)}, None)
    lone = copy.copy(state)
    object.__setattr__(lone, "config", GuardConfig(alpha=0.05, channels="prompt/mean@0.67"))
    with pytest.raises(InputError, match="none of the guard's channels"):
        lone.decide(scored, part)


DELETE = object()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("settings",), DELETE, "incomplete or malformed"),
        (("settings", "alpha"), 2.0, "alpha=2.0"),
        (("settings", "wings"), 2, "wings"),
        (("channels",), ["final", "no/such"], "not known"),
        (("channels",), ["prompt/mean@0.67"], "'final' and those of the settings"),
        (("reward", "sd"), 0.0, "not usable"),
        (("reward", "mean"), "x", "incomplete or malformed|could not"),
        (("detectors", "final"), DELETE, "incomplete or malformed"),
        (("detectors", "final", "precision"), None, "precision is null"),
        (("detectors", "final", "precision"), "fp16", "expected a mode and a certificate"),
        (("detectors", "final", "precision"), ["fp16", 0.0], "expected a mode and a certificate"),
        (("detectors", "final", "precision"), {"mode": "fp16"}, "expected a mode and a certificate"),
        (
            ("detectors", "final", "precision"),
            {"mode": "int8", "certificate": 0.0},
            "mode='int8': expected one of 'fp16'",
        ),
        (("detectors", "final", "precision"), {"mode": ["fp16"], "certificate": 0.0}, "expected one of 'fp16'"),
        (("detectors", "final", "precision"), {"mode": "fp16", "certificate": "x"}, "certificate='x'"),
        (("detectors", "final", "precision"), {"mode": "fp16", "certificate": -1.0}, "certificate=-1.0"),
        (("group_names",), [], "outside the group names"),
    ],
)
def test_row31_malformed_settings_are_refused(state: FittedState, path: Any, value: Any, message: str) -> None:
    tensors, config = state.to_saved()
    place = config
    for key in path[:-1]:
        place = place[key]
    if value is DELETE:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    with pytest.raises(FormatError, match=message):
        FittedState.from_saved(tensors, config)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (
            "calibration.scores",
            torch.zeros(150, 2, dtype=torch.float64),
            r"calibration.scores: expected torch.float64",
        ),
        ("calibration.scores", torch.zeros(150, 3), r"calibration.scores: expected torch.float64"),
        ("calibration.scores", torch.full((150, 3), torch.nan, dtype=torch.float64), "NaN"),
        (
            "calibration.lengths",
            torch.zeros(3, 2, dtype=torch.int64),
            "calibration.lengths: expected torch.int64",
        ),
        ("calibration.part_a", DELETE, "calibration.part_a is missing"),
        ("calibration.groups", torch.zeros(3, dtype=torch.int64), r"calibration.groups: expected torch.int64 \(150,\)"),
        ("channel.0.whitening", DELETE, "missing"),
        ("channel.0.whitening", -torch.eye(3), "positive diagonal"),
        ("channel.1.means", torch.zeros(1, 4, dtype=torch.float64), "shape"),
        ("fit.prompt_keys", DELETE, "fit.prompt_keys"),
        ("stray", torch.zeros(1), "stray is unknown"),
        ("heldout.scores", torch.zeros(3, 1), "heldout.scores: expected"),
        ("fit.prompt_keys", torch.zeros(3, dtype=torch.int16), "fit.prompt_keys: expected torch.int64"),
    ],
)
def test_row28_malformed_tensors_are_refused(state: FittedState, name: str, tensor: Any, message: str) -> None:
    tensors, config = state.to_saved()
    if tensor is DELETE:
        del tensors[name]
    else:
        tensors[name] = tensor
    with pytest.raises(FormatError, match=message):
        FittedState.from_saved(tensors, config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fingerprint": {"dtype": "float32"}}, "the fingerprint lacks .*'architecture'"),
        ({"fingerprint": {"dtype": 7}}, "something else than texts"),
        ({"weight_names": "abc"}, "weight_names and identity.weights belong together"),
    ],
)
def test_an_identity_that_was_cut_is_refused(state: FittedState, change: dict[str, Any], message: str) -> None:
    tensors, config = state.to_saved()
    with pytest.raises(FormatError, match=message):
        FittedState.from_saved(tensors, {**config, **change})


def test_vectors_of_unknown_origin_have_no_identity(state: FittedState) -> None:
    tensors, config = state.to_saved()
    assert FittedState.from_saved(tensors, {**config, "fingerprint": {}}).identity.fields == {}
