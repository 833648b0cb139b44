"""The built-in texts: what others rely on is their number, their form, and that they never change."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from rm_ood.canaries import CANARIES, CODE, EVERYDAY, SCRIPTS
from rm_ood.preferences import check_prompt, check_response


def test_the_canaries_have_not_changed() -> None:
    """Saved guards hold the scores of these very texts: a change here needs another list, not another hash."""
    assert len(CANARIES) == 8
    digest = hashlib.sha256(json.dumps(CANARIES, ensure_ascii=False).encode()).hexdigest()
    assert digest[:16] == "311b1a9b02d7ab17"


def test_canaries_are_short(decoder_tokenizer: Any) -> None:
    lengths = [len(decoder_tokenizer(prompt + response).input_ids) for prompt, response in CANARIES]
    assert max(lengths) <= 40


def test_every_text_can_be_checked_and_stands_once() -> None:
    pairs = [*CANARIES, *EVERYDAY, *CODE, *(pair for talk in SCRIPTS.values() for pair in talk)]
    for prompt, response in pairs:
        assert check_prompt(prompt, "prompt") == prompt
        assert check_response(response, "response") == response
    texts = [text for pair in pairs for text in pair]
    assert len(set(texts)) == len(texts)
    assert len(EVERYDAY) == 40
