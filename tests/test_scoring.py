"""Raw scores and the verdicts from them are two steps that together are `guard.check`."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from conftest import preference_rows

from rm_ood import MismatchError, NotFittedError, OODGuard

pytestmark = pytest.mark.filterwarnings("ignore::rm_ood.CalibrationWarning")


@pytest.fixture(scope="module")
def guard(shared_decoder: Any, decoder_tokenizer: Any) -> OODGuard:
    guard = OODGuard(copy.deepcopy(shared_decoder), decoder_tokenizer, alpha=0.05, max_length=128)
    return guard.fit(preference_rows(300), calibration=0.5, progress=False)


def test_scores_then_verdicts_are_a_check(guard: OODGuard) -> None:
    items = [(row["prompt"], row["chosen"]) for row in preference_rows(40, seed=3)]
    scoring = guard.scoring()
    scored, part = scoring.score(scoring.encode(items))
    assert part.vectors == {}
    whole = guard.check([p for p, _ in items], [r for _, r in items])
    judged = guard.state.decide(scored, part)
    assert judged.to_dict() == whole.to_dict()
    # Any selection can be judged later, without a forward.
    some = np.array([7, 3, 3, 39])
    parts = type(part)({}, part.rewards[some], part.lengths[some], [None] * 4, [()] * 4, part.truncated[some])
    assert guard.state.decide(scored.take(some), parts).p_values.tolist() == whole.p_values[some].tolist()


def test_batches_come_with_their_vectors(guard: OODGuard) -> None:
    scoring = guard.scoring()
    encoded = scoring.encode([(row["prompt"], row["chosen"]) for row in preference_rows(20, seed=4)])
    seen = []
    for index, scored, part in scoring.batches(encoded):
        assert part.vectors.keys() >= {"final", "response/mean@0.67", "prompt/mean@0.67"}
        assert len(index) == len(scored.scores) == len(part.rewards) <= guard.config.batch_size
        again = guard.state.score(part.vectors, part.rewards)
        assert again.scores.tolist() == scored.scores.tolist()
        seen += index.tolist()
    assert sorted(seen) == list(range(20))


def test_a_guard_without_model_or_fit_has_no_scores(guard: OODGuard, tiny_decoder: Any, tmp_path: Any) -> None:
    with pytest.raises(NotFittedError):
        OODGuard(*tiny_decoder).scoring()
    guard.save_pretrained(tmp_path / "guard")
    with pytest.raises(MismatchError, match="no reward model"):
        OODGuard.from_pretrained(tmp_path / "guard").scoring()
