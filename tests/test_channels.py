from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rm_ood.channels import AXES, DEFAULT_CHANNELS, Channel, resolve_channels
from rm_ood.errors import InputError

LAYERS = st.one_of(st.just("final"), st.floats(0, 1, exclude_min=True, allow_subnormal=False), st.integers(-100, -1))


@pytest.mark.parametrize(
    ("text", "channel"),
    [
        ("final", Channel("response", "final", "readout")),
        ("reward", Channel("response", "final", "reward")),
        ("response/mean@0.67", Channel("response", 0.67, "mean")),
        ("response/readout@-2", Channel("response", -2, "readout")),
        ("prompt/prompt_end", Channel("prompt", "final", "prompt_end")),
        ("prompt/mean@final", Channel("prompt", "final", "mean")),
        ("prompt/mean@1", Channel("prompt", 1.0, "mean")),
        ("prompt/contrast@0.67", Channel("prompt", 0.67, "contrast")),
        ("response_given_prompt/mean@0.67", Channel("response_given_prompt", 0.67, "mean")),
        ("response_given_prompt/readout", Channel("response_given_prompt", "final", "readout")),
    ],
)
def test_parse_reads_axis_pooling_and_layer(text: str, channel: Channel) -> None:
    assert Channel.parse(text) == channel
    assert type(Channel.parse(text).layer) is type(channel.layer)
    assert Channel.parse(channel) is channel


@given(
    st.sampled_from(
        [("prompt", "prompt_end"), ("response", "prompt_end"), (AXES[2], "readout"), *((a, "mean") for a in AXES)]
    ),
    LAYERS,
)
def test_a_channels_text_reads_back_as_the_channel(kind: tuple[str, str], layer: float | int | str) -> None:
    axis, pooling = kind
    channel = Channel(axis, layer, pooling)
    assert Channel.parse(str(channel)) == channel


def test_a_channel_goes_with_a_span_and_reads_the_prompt_or_not() -> None:
    channels = [Channel.parse(f"{axis}/mean") for axis in ("prompt", "response", "response_given_prompt")]
    assert [channel.span for channel in channels] == ["prompt", "response", "response"]
    assert [channel.reads_prompt for channel in channels] == [True, False, True]
    assert Channel.parse("final").span == Channel.parse("reward").span == "response"


def test_a_contrast_is_another_score_of_a_mean() -> None:
    mean, contrast = Channel.parse("prompt/mean@0.67"), Channel.parse("prompt/contrast@0.67")
    assert (mean.contrast, contrast.vector) == (contrast, mean)
    assert (mean.vector, contrast.contrast, Channel.parse("final").vector) == (mean, contrast, Channel.parse("final"))
    assert (contrast.span, contrast.reads_prompt) == ("prompt", True)


@pytest.mark.parametrize("pooling", ["prompt_end", "contrast"])
def test_what_is_of_one_span_alone_is_no_pair(pooling: str) -> None:
    with pytest.raises(InputError, match="takes mean, or readout beside the prompt's end"):
        Channel.parse(f"response_given_prompt/{pooling}@0.67")


def test_other_spellings_of_a_layer_are_one_channel() -> None:
    assert str(Channel.parse("response/readout")) == "final"
    assert str(Channel.parse("response/mean@1")) == str(Channel.parse("response/mean@1.0")) == "response/mean@1.0"
    assert str(Channel.parse("response/mean@0.50")) == "response/mean@0.5"
    assert str(Channel.parse("prompt/mean@final")) == "prompt/mean"
    assert str(Channel.parse("reward")) == "reward"


@pytest.mark.parametrize(
    "text",
    [
        "", "finale", "response", "answer/mean", "response/max", "prompt/readout", "response/mean@0", "response/mean@1.5",
        "response/mean@-0.5", "response/mean@2", "response/mean@nan", "response/mean@inf", "response/mean@deep",
        "response/mean@--1", "response/mean@²",
    ],
)  # fmt: skip
def test_unknown_text_is_refused_with_the_syntax(text: str) -> None:
    with pytest.raises(InputError, match="Write 'final', 'reward' or 'axis/pooling@layer'"):
        Channel.parse(text)


def test_another_type_is_refused() -> None:
    with pytest.raises(InputError, match="expected str or Channel, got int"):
        Channel.parse(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(("layer", "block"), [(1.0, 5), (-1, 5), (-6, 0), (0.67, 3), (0.5, 2), (0.2, 0), (0.99, 5)])
def test_a_fraction_is_the_output_of_block_round_f_times_depth(layer: float | int, block: int) -> None:
    assert Channel("response", layer, "mean").block(6) == block


@pytest.mark.parametrize("layer", [-7, 0.05])
def test_a_layer_that_the_model_lacks_is_refused(layer: float | int) -> None:
    with pytest.raises(InputError, match="no such layer in a model of 6 blocks"):
        Channel("response", layer, "mean").block(6)


def test_the_final_layer_is_no_block() -> None:
    with pytest.raises(InputError, match="read at the head"):
        Channel.parse("final").block(6)


def test_default_channels_follow_the_axes() -> None:
    assert resolve_channels("default", AXES) == DEFAULT_CHANNELS
    assert resolve_channels("default", ("response_given_prompt",)) == ("response_given_prompt/mean@0.67",)
    assert resolve_channels("default", ("prompt", "response")) == DEFAULT_CHANNELS[:5]
    assert resolve_channels("default", ["prompt"]) == ("prompt/mean@0.67", "prompt/contrast@0.67")
    assert resolve_channels("default", ("response",)) == ("final", "response/mean@0.67", "response/contrast@0.67")


def test_listed_channels_come_out_canonical_once_and_final_first() -> None:
    listed = ["response/mean@0.50", Channel.parse("reward"), "response/mean@0.5", "final"]
    assert resolve_channels(listed, AXES) == ("final", "response/mean@0.5", "reward")
    assert resolve_channels("prompt/mean, final", AXES) == ("final", "prompt/mean")
    assert resolve_channels(Channel.parse("prompt/mean"), AXES) == ("prompt/mean",)


@pytest.mark.parametrize(
    ("channels", "axes", "message"),
    [
        ("final", (), r"axes=\(\): expected some of"),
        ("final", ("answer",), "axes="),
        ("final", ("prompt",), "that axes=.'prompt',. leaves out"),
        ([], AXES, "at least one is needed"),
        (["nope"], AXES, "is not known"),
        (3, AXES, "expected names, got int"),
        ([3], AXES, "expected str or Channel, got int"),
        ([Channel("answer", "final", "mean")], AXES, "is not known"),
    ],
)
def test_unusable_choices_are_refused(channels: object, axes: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve_channels(channels, axes)  # type: ignore[arg-type]
