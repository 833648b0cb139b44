from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
from conftest import preference_rows

from rm_ood import InputError, OODGuard

pytestmark = [
    pytest.mark.filterwarnings("ignore::rm_ood.CalibrationWarning"),
    pytest.mark.filterwarnings("ignore::rm_ood.TokenisationWarning"),
]
TALK = [
    {"role": "user", "content": "question about the river and the garden"},
    {"role": "assistant", "content": "paper window seven orange quiet"},
    {"role": "user", "content": "and what of the winter bridge"},
]
ANSWER = "letter market doctor simple summer"


@pytest.fixture(scope="module")
def guard(shared_decoder: Any, decoder_tokenizer: Any) -> OODGuard:
    guard = OODGuard(
        copy.deepcopy(shared_decoder),
        decoder_tokenizer,
        alpha=0.1,
        text_format="chat",
        channels="final",
        max_length=256,
    )
    return guard.fit(preference_rows(300), calibration=0.5, progress=False)


def test_every_turn_reads_as_the_dialogue_that_ends_there(guard: OODGuard) -> None:
    turns = guard.turn_scores(TALK, ANSWER)
    assert [(t.turn, t.role) for t in turns] == [(0, "user"), (1, "assistant"), (2, "user"), (3, "assistant")]
    whole = guard.check(TALK, ANSWER).axes["response"].channels["final"]
    assert turns[3].score == pytest.approx(whole.score, rel=1e-4)
    first = guard.check(TALK[:1], TALK[1]["content"]).axes["response"].channels["final"]
    assert turns[1].score == pytest.approx(first.score, rel=1e-4)
    # The last turn's rank is that of the item: same scores, same length.
    assert turns[3].p_value == pytest.approx(guard.check(TALK, ANSWER).axes["response"].channels["final"].p_value)
    for turn in turns:
        assert (turn.p_value is None) == (turn.role == "user")
        assert turn.is_ood == (None if turn.p_value is None else turn.p_value <= 0.1)
    assert json.loads(json.dumps([t.to_dict() for t in turns]))[1]["role"] == "assistant"


def test_another_turn_moves_itself_and_what_follows_only(guard: OODGuard) -> None:
    strange = [TALK[0], {"role": "assistant", "content": "你好世界 " * 12}, TALK[2]]
    plain, off = guard.turn_scores(TALK, ANSWER), guard.turn_scores(strange, ANSWER)
    assert off[0].score == pytest.approx(plain[0].score, rel=1e-4)
    for before, after in zip(plain[1:], off[1:], strict=True):
        assert after.score != pytest.approx(before.score, rel=1e-2)


def test_a_turn_that_was_cut_away_has_no_score(shared_decoder: Any, decoder_tokenizer: Any) -> None:
    guard = OODGuard(
        copy.deepcopy(shared_decoder), decoder_tokenizer, alpha=0.1, text_format="chat", channels="final", max_length=40
    )
    guard.fit(preference_rows(300), calibration=0.5, progress=False)
    long = {"role": "assistant", "content": "river " * 60}
    turns = guard.turn_scores([TALK[0], long, TALK[2]], ANSWER)
    cut = [t for t in turns if np.isnan(t.score)]
    assert cut
    assert all(t.to_dict()["score"] is None for t in cut)
    assert all(t.is_ood is None for t in cut)
    assert np.isfinite(turns[-1].score)


def test_what_has_no_turns_is_refused(guard: OODGuard, minilm: Any, tiny_decoder: Any) -> None:
    plain = OODGuard(*tiny_decoder, alpha=0.2, text_format="plain", channels="final").fit(
        preference_rows(140), calibration=0.6, progress=False
    )
    with pytest.raises(InputError, match=r"turn scores need a chat template.*text_format='plain'"):
        plain.turn_scores("a question", "an answer")
    with pytest.raises(InputError, match="one dialogue: messages and one response"):
        guard.turn_scores([TALK, TALK], [ANSWER, ANSWER])
    model, tokenizer = minilm
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    encoder = OODGuard(model, tokenizer, alpha=0.2, text_format="chat", channels="final").fit(
        preference_rows(140), calibration=0.6, progress=False
    )
    with pytest.raises(InputError, match="turn scores: this head reads one pooled vector per item"):
        encoder.turn_scores(TALK, ANSWER)


def test_a_failed_self_check_is_an_error(guard: OODGuard) -> None:
    from rm_ood import CaptureError

    handle = guard.model.score.register_forward_hook(lambda module, args, output: output + 1)
    try:
        with pytest.raises(CaptureError, match="self-check failed"):
            guard.turn_scores(TALK, ANSWER)
    finally:
        handle.remove()
    assert torch.isfinite(torch.tensor(guard.turn_scores(TALK, ANSWER)[0].score))
