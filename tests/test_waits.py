"""A guarded forward reads results from the device twice, after everything was launched; nothing before waits."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from waits import NoHostSync

from rm_ood.capture import Captured
from rm_ood.channels import Channel
from rm_ood.detectors import ContrastedMahalanobis, MahalanobisDetector
from rm_ood.embed import embedded
from rm_ood.hooks import Hook, Request, Slot
from rm_ood.spans import Spans
from rm_ood.state import FittedState


@pytest.fixture
def copies(monkeypatch):
    """Copies to the host, counted."""
    seen = []
    original = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: seen.append(self.shape) or original(self))
    return seen


def test_hooks_do_not_wait():
    hidden = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(0))
    prompt = torch.arange(6).expand(3, 6) < 3
    spans = Spans(prompt_end=torch.full((3,), 2), prompt_mask=prompt, response_mask=~prompt)
    names = ("final", "response/mean@1.0", "prompt/mean@1.0")
    slot = Slot()
    slot.request = Request(torch.tensor([3, 4, 5]), spans)
    hook = Hook(slot, {name: Channel.parse(name) for name in names}, 0, is_head=True)
    with NoHostSync():
        hook(torch.nn.Identity(), (hidden,), hidden[..., :1])
    assert set(slot.request.vectors) == set(names)
    torch.testing.assert_close(slot.request.vectors["prompt/mean@1.0"], hidden[:, :3].mean(1))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8], ids=str)
@pytest.mark.filterwarnings("ignore:indexing with dtype torch.uint8")
def test_masks_wait_for_the_device(dtype):
    x, mask = torch.zeros(3, 2), torch.tensor([True, False, True]).to(dtype)
    with pytest.raises(AssertionError, match="index with a mask waits"), NoHostSync():
        x[mask]
    with pytest.raises(AssertionError, match="index_put_ with a mask waits"), NoHostSync():
        x[mask] = torch.ones(2, 2)
    with NoHostSync():
        # Positions, and one value under a mask, are shapes that the host knows.
        x[:, mask.new_zeros(2, dtype=torch.int64)]
        x[mask.bool()] = 1.0
    assert x[:, 0].tolist() == [1, 0, 1]


def test_what_a_forward_left_behind_is_one_copy(copies):
    vectors = {"final": torch.ones(4, 3), "prompt/mean@0.5": torch.ones(4, 3)}
    vectors["prompt/mean@0.5"][1, 2] = torch.inf
    rewards = torch.tensor([0.5, 1.0, torch.nan, 2.0])
    captured = Captured(vectors, rewards, torch.tensor([False, True, True, True]))
    part = embedded(captured, None, [()] * 4, np.zeros(4, dtype=bool))
    assert len(copies) == 1
    assert part.failed == [None, "non_finite", "non_finite", "read_out_mismatch"]
    assert part.rewards.tolist()[::3] == [0.5, 2.0]


def test_scores_of_all_channels_are_one_copy(copies):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(300, 6, generator=rng) + 1
    detectors = {
        "final": MahalanobisDetector(shrinkage=0.1).fit(x, torch.arange(300) % 2),
        "prompt/mean@0.5": ContrastedMahalanobis(shrinkage=0.1).fit(x).fit_noise(2 * x),
    }
    state = SimpleNamespace(detectors=detectors, reward_mean=0.0, reward_sd=1.0)
    state.score_distances = lambda *a: FittedState.score_distances(state, *a)
    vectors = {"prompt/mean@0.5": x[:5], "final": x[5:10]}
    expected = {name: detectors[name].sq_distances(v).double().numpy() for name, v in vectors.items()}
    copies.clear()
    scored = FittedState.score(state, vectors, np.arange(5.0))
    assert len(copies) == 1
    assert scored.channels == ("final", "prompt/mean@0.5", str(Channel.parse("prompt/mean@0.5").contrast), "reward")
    assert (scored.classes["final"] == expected["final"]).all()
    assert (scored.scores[:, 2] == detectors["prompt/mean@0.5"].contrasted(x[:5])[1].double().numpy()).all()
    assert (scored.scores[:, 0] == expected["final"].min(1)).all()
    assert (scored.scores[:, 1] == expected["prompt/mean@0.5"][:, 0]).all()
    assert FittedState.score(state, {}, np.arange(5.0)).channels == ("reward",)
