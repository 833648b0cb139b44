"""Each distinct text goes through the reward model once, and never through another model's or guard's scores."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import POISON, preference_rows

from rm_ood import CalibrationWarning, InputError, OODGuard
from rm_ood.detectors.baselines import KNearestNeighbours, VectorNorm
from rm_ood.dialogue import Dialogue
from rm_ood.study.scorer import UNREADABLE, Scorer


def items(n: int, seed: int = 3) -> list[tuple[Any, Any]]:
    return [(row["prompt"], row[which]) for row in preference_rows(n, seed=seed) for which in ("chosen", "rejected")]


def test_a_repeated_text_is_read_once_and_scored_as_by_check(minilm_guard: OODGuard, read: Any) -> None:
    texts = items(20)
    with Scorer(minilm_guard) as scorer:
        scores = scorer.score([*texts, *texts[5:15]])
        rewards = scorer.rewards([p for p, _ in texts], [r for _, r in texts])
        assert scorer.n_distinct == scorer.n_forwarded == len(read) == read.total() == 40
    assert rewards.tolist() == scores.part.rewards[:40].tolist()
    assert scores.part.rewards[40:].tolist() == scores.part.rewards[5:15].tolist()
    read.clear()
    whole = minilm_guard.check([p for p, _ in texts], [r for _, r in texts])
    judged = minilm_guard.state.decide(scores.scored, scores.part)[:40]
    np.testing.assert_allclose(judged.rewards, whole.rewards, atol=1e-6)
    np.testing.assert_allclose(judged.p_values, whole.p_values, atol=1 / 60)
    np.testing.assert_allclose(
        judged.axis("response").channel("final").class_scores,
        whole.axis("response").channel("final").class_scores,
        rtol=1e-4,
    )
    assert judged.reasons == whole.reasons


def test_a_cache_gives_the_same_bits_without_a_forward(minilm_guard: OODGuard, read: Any, tmp_path: Path) -> None:
    baselines = {"norm": ("final", VectorNorm().fit(torch.randn(5, 384)))}
    found = []
    for _ in range(2):
        with Scorer(minilm_guard, cache=tmp_path / "c.sqlite", baselines=baselines) as scorer:
            found.append(scorer.score([*items(10), ("a prompt", "word " * 200), ("a prompt", "")]))
    assert read.total() == 22
    one, two = found
    assert one.scored.scores.tobytes() == two.scored.scores.tobytes()
    assert one.part.rewards.tobytes() == two.part.rewards.tobytes()
    assert one.baselines["norm"].tobytes() == two.baselines["norm"].tobytes()
    assert (one.part.failed, one.part.reasons) == (two.part.failed, two.part.reasons)
    assert one.part.reasons[20:] == [("truncated", "empty_prompt_span"), ("empty_response",)]
    assert one.part.truncated.tolist() == two.part.truncated.tolist() == [False] * 20 + [True, False]


def test_what_changes_a_score_changes_its_key(minilm_guard: OODGuard, read: Any, tmp_path: Path) -> None:
    path, texts = tmp_path / "c.sqlite", items(4)

    def forwarded(guard: OODGuard, **options: Any) -> int:
        with warnings.catch_warnings(), Scorer(guard, cache=path, **options) as scorer:
            warnings.simplefilter("ignore", CalibrationWarning)
            scorer.score(texts)
            return scorer.n_forwarded

    assert forwarded(minilm_guard) == 8
    assert forwarded(minilm_guard) == 0
    # Verdicts may be asked for otherwise: the raw scores are the same.
    state = minilm_guard.state
    minilm_guard._swap(state.with_settings({"alpha": 0.1}))
    assert forwarded(minilm_guard) == 0
    minilm_guard._swap(state)
    # A baseline needs vectors, so its scores are new; another fit of it as well.
    x = torch.randn(30, 384, generator=torch.Generator().manual_seed(0))
    for rows in (x, x[:20]):
        near = KNearestNeighbours(k=2).fit(rows)
        assert forwarded(minilm_guard, baselines={"near": ("final", near)}) == 8
    # Another guard of the same model, and the same guard on a model whose weights moved a little.
    other = OODGuard(minilm_guard.model, minilm_guard.tokenizer, alpha=0.05, max_length=64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        other.fit(preference_rows(110, seed=7), calibration=preference_rows(115, seed=1), progress=False)
    assert forwarded(other) == 8
    other.detach()
    weight = minilm_guard.model.bert.encoder.layer[2].output.dense.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.add_(1e-3)
    assert forwarded(minilm_guard) == 8
    with torch.no_grad():
        weight.copy_(kept)
    assert forwarded(minilm_guard) == 0


def test_an_interrupted_pass_goes_on_in_the_same_batches(minilm_guard: OODGuard, read: Any, tmp_path: Path) -> None:
    texts = items(60)
    with Scorer(minilm_guard) as scorer:
        whole = scorer.score(texts)
    read.clear()
    read.stop_after = 50
    with Scorer(minilm_guard, cache=tmp_path / "c.sqlite") as scorer, pytest.raises(KeyboardInterrupt):
        scorer.score(texts)
    # Four batches of 16 were done.
    assert read.total() == 64
    read.stop_after = None
    with Scorer(minilm_guard, cache=tmp_path / "c.sqlite") as scorer:
        resumed = scorer.score(texts)
        assert scorer.n_forwarded == 120 - 64
    assert set(read.values()) == {1}
    assert resumed.scored.scores.tobytes() == whole.scored.scores.tobytes()


def test_what_cannot_be_scored_is_told(minilm_guard: OODGuard, read: Any) -> None:
    bad: list[tuple[Any, Any]] = [("fine", f"a {POISON} here"), ("fine", "\ud800"), ("fine", "fine"), (3, "fine")]
    with Scorer(minilm_guard, baselines={"norm": ("final", VectorNorm().fit(torch.randn(5, 384)))}) as scorer:
        with pytest.raises(InputError, match=r"rows\[7\]\.chosen: lone surrogate"):
            scorer.score(bad, ["rows[0].chosen", "rows[7].chosen", None, None])
        scores = scorer.score(bad, [None] * 4)
    assert scores.part.failed == ["non_finite", UNREADABLE, None, UNREADABLE]
    decisions = minilm_guard.state.decide(scores.scored, scores.part)
    assert decisions.is_ood[[0, 1, 3]].all()
    assert decisions.reasons[1] == (UNREADABLE,)
    assert np.isnan(scores.part.rewards).tolist() == [True, True, False, True]
    assert np.isinf(scores.baselines["norm"]).tolist() == [True, True, False, True]


def test_baselines_read_the_guard_s_vectors(minilm_guard: OODGuard) -> None:
    texts = items(5)
    scoring = minilm_guard.scoring()
    (index, _, part), = scoring.batches(scoring.encode(texts))  # fmt: skip
    joined = torch.cat([part.vectors["prompt/mean@0.67"], part.vectors["final"]], dim=1)
    baselines = {
        "norm": ("final", VectorNorm().fit(torch.randn(5, 384))),
        "both": (("prompt/mean@0.67", "final"), VectorNorm().fit(torch.randn(5, 768))),
    }
    with Scorer(minilm_guard, baselines=baselines) as scorer:
        scores = scorer.score(texts)
    np.testing.assert_allclose(scores.baselines["norm"][index], -part.vectors["final"].norm(dim=1), rtol=1e-6)
    np.testing.assert_allclose(scores.baselines["both"][index], -joined.norm(dim=1), rtol=1e-6)
    with pytest.raises(
        InputError, match=r"baseline 'deep': this guard takes vectors of .* not of \['response/mean@0\.5'\]"
    ):
        Scorer(minilm_guard, baselines={"deep": ("response/mean@0.5", VectorNorm())})


def test_messages_and_strings_are_other_texts(tiny_decoder: Any) -> None:
    guard = OODGuard(*tiny_decoder, alpha=0.05, max_length=128)
    rows = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in preference_rows(240)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        guard.fit(rows, calibration=0.5, progress=False)
    message = [{"role": "user", "content": "where is the river"}]
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    asked: list[tuple[Any, Any]] = [
        (message, "here"),
        (list(message), "here"),
        (message, {"role": "assistant", "content": "here"}),
        ([{"role": "system", "content": "be brief"}, *message], "here"),
    ]
    with Scorer(guard) as scorer:
        scores = scorer.score(asked, ["rows[0].chosen"] * 4)
        # One text written in two ways is rendered to one key.
        assert (scorer.n_distinct, scorer.n_forwarded) == (3, 2)
        assert scores.part.rewards[0] == scores.part.rewards[1] == scores.part.rewards[2]
        ignored = scorer.score([(Dialogue(message, tools), "here")], [None])
    assert ignored.part.failed == [UNREADABLE]
    assert guard.check([message], ["here"]).rewards[0] == pytest.approx(scores.part.rewards[0], abs=1e-5)


def test_a_guard_s_traffic_does_not_count_what_a_study_reads(minilm_guard: OODGuard) -> None:
    before = copy.copy(minilm_guard._traffic)
    with Scorer(minilm_guard) as scorer:
        scorer.score([("Ж" * 30, "Я" * 30 + str(i)) for i in range(40)])
    assert vars(minilm_guard._traffic) == vars(before)


def test_scores_of_other_settings_are_other_scores() -> None:
    from rm_ood.detectors import ConditionalMahalanobis, KNearestNeighbours, Projected
    from rm_ood.study.scorer import _settings

    assert _settings(KNearestNeighbours(1)) != _settings(KNearestNeighbours(10))
    assert _settings(ConditionalMahalanobis(2)) != _settings(ConditionalMahalanobis(6))
    ones = torch.ones(4)
    assert _settings(Projected(KNearestNeighbours(1), ones)) != _settings(Projected(KNearestNeighbours(2), ones))
    assert _settings(KNearestNeighbours(1)) == _settings(KNearestNeighbours(1))
