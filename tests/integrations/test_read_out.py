"""The reward recomputed from an engine's vector: the tolerance, and heads that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from rm_ood import GuardConfig, InputError, MismatchError
from rm_ood.identity import Identity
from rm_ood.integrations.read_out import RewardHead, read_head

WIDTH = 16


def state(reward: str = "logits", **fingerprint: str) -> Any:
    return SimpleNamespace(
        config=GuardConfig(reward=reward),
        detectors={"final": SimpleNamespace(n_features_in_=WIDTH)},
        identity=Identity(fingerprint),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [7, 4096])
def test_rounding_agrees_and_another_vector_does_not(dtype: torch.dtype, width: int) -> None:
    rng = torch.Generator().manual_seed(0)
    h = torch.randn(256, width, generator=rng).to(dtype)
    torch.manual_seed(0)
    linear = nn.Linear(width, 1).to(dtype)
    with torch.no_grad():
        reward = linear(h)[:, 0]
    head = RewardHead(linear.weight[0].double().detach(), linear.bias.item(), torch.finfo(dtype).eps)
    assert not head.disagrees(h.float(), reward.double()).any()
    # The vector of another item: the check sees it wherever the rewards differ by more than rounding can do.
    moved = head.disagrees(h.float().roll(1, 0), reward.double())
    assert moved.double().mean() > (0.99 if dtype == torch.float32 else 0.5)
    assert head.disagrees(h.float(), torch.full((256,), torch.nan)).all()
    assert head.disagrees(h.float() * torch.nan, reward.double()).all()


def test_the_coarser_dtype_of_head_and_fit_counts() -> None:
    weight = torch.randn(1, WIDTH)
    assert read_head((weight, None), state()).eps == torch.finfo(torch.float32).eps
    assert read_head((weight, None), state(dtype="bfloat16")).eps == torch.finfo(torch.bfloat16).eps
    assert read_head((weight.half(), None), state(dtype="float32")).eps == torch.finfo(torch.float16).eps
    assert read_head((weight, None), state(dtype="load")).eps == torch.finfo(torch.float32).eps


def test_the_row_of_the_reward() -> None:
    weight, bias = torch.arange(3 * WIDTH).reshape(3, WIDTH), [0.0, 2.0, 1.0]
    head = read_head((weight, bias), state("logits:1"))
    assert head.weight.tolist() == list(range(WIDTH, 2 * WIDTH))
    assert head.bias == 2.0


@pytest.mark.parametrize(
    ("head", "error", "message"),
    [
        ((torch.zeros(1, WIDTH),), InputError, r"expected \(weight, bias\) or a checkpoint folder, got 1 values"),
        ((None, None), InputError, "got no weight"),
        ((torch.zeros(1, 9), None), MismatchError, r"weights of 16 columns with row 0 .*, got \(1, 9\)$"),
        ((torch.zeros(1, WIDTH), torch.zeros(2)), MismatchError, r"got \(1, 16\) and 2 biases"),
        ((torch.zeros(0, WIDTH), None), MismatchError, r"got \(0, 16\)"),
        ((torch.zeros(1, 1, WIDTH), None), MismatchError, r"got \(1, 1, 16\)"),
        ((["a"], None), InputError, "head weight: expected numbers"),
    ],
)
def test_heads_that_are_none(head: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        read_head(head, state())


def test_another_head_than_the_fitted_one(shared_decoder: Any, decoder_tokenizer: Any) -> None:
    from rm_ood.fingerprint import fingerprint

    known = fingerprint(shared_decoder, decoder_tokenizer, head=None, read_out="auto", text={})
    fitted = state(**known)
    fitted.detectors["final"].n_features_in_ = 32
    weight = shared_decoder.score.weight
    assert torch.equal(read_head((weight.bfloat16(), 0.0), fitted).weight, weight.detach().bfloat16()[0].double())
    for wrong in ((weight + 1, None), (weight, 1.0)):
        with pytest.raises(MismatchError, match="not the weights of the head that the guard was fitted on"):
            read_head(wrong, fitted)


def test_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds neither model\.safetensors nor"):
        read_head(tmp_path, state())
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"no tensors")
    with pytest.raises(InputError, match=r"not a whole safetensors file\. Copy it again\."):
        read_head(tmp_path, state())
    save_file({"model.score.weight": torch.ones(1, WIDTH), "score.bias": torch.ones(1)}, file)
    with pytest.raises(InputError, match=r"no tensor 'score\.weight'; like it are \['model\.score\.weight'\]"):
        read_head(str(tmp_path), state())
    assert read_head(tmp_path, state(head_path="model.score")).bias == 0.0
    save_file({"score.weight": torch.ones(1, WIDTH), "score.bias": torch.full((1,), 3.0)}, file)
    assert read_head(tmp_path, state()).bias == 3.0
    save_file({"score.weight": torch.ones(1, WIDTH, dtype=torch.int8)}, file)
    with pytest.raises(InputError, match=r"stored as torch\.int8; a quantised head cannot be recomputed"):
        read_head(tmp_path, state())


@pytest.mark.parametrize(
    "index", [[], {}, {"weight_map": {"score.weight": "../other.safetensors"}}, {"weight_map": {"score.weight": 1}}]
)
def test_an_index_that_leads_elsewhere(index: Any, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="no weight_map of file names"):
        read_head(tmp_path, state())


def test_a_shard_that_is_gone(tmp_path: Path) -> None:
    index = {"weight_map": {"score.weight": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"score\.weight cannot be read from .*model-1\.safetensors"):
        read_head(tmp_path, state())
