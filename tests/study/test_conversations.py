"""Conversations that are real, clean and of one language."""

from __future__ import annotations

import importlib
import random

import pytest

from rm_ood.errors import InputError
from rm_ood.study.conversations import LANGUAGES, Conversation, conversations, random_replies

# The package has a function of this name.
module = importlib.import_module("rm_ood.study.conversations")


@pytest.mark.parametrize("language", ["en", "es", "it", "pt", "fr", "de", "tr", "uk", "zh"])
def test_conversations_are_clean_and_distinct(language):
    rows = conversations(language)
    assert len(rows) >= 60
    assert all(text and text == " ".join(text.split()) for row in rows for text in row)
    keys = [(row.prompt.casefold(), row.response.casefold()) for row in rows]
    assert len(set(keys)) == len(keys)
    assert all(prompt != response for prompt, response in keys)
    assert rows == conversations(language)


def test_english_is_large_enough_for_the_demo_and_the_caller_may_change_the_list():
    rows = conversations("en")
    assert len({row.prompt.casefold() for row in rows}) > 700
    rows.clear()
    assert conversations("en")


@pytest.mark.parametrize("language", ["es", "it", "fr", "zh"])
def test_other_languages_hold_nothing_of_the_english_corpus(language):
    english = {text.casefold() for row in conversations("en") for text in row}
    assert not any(text.casefold() in english for row in conversations(language) for text in row)


def test_scripts_are_what_the_code_says():
    def share(language, low, high):
        text = "".join(row.response for row in conversations(language) if not row.response.isascii())
        letters = [c for c in text if c.isalpha()]
        return sum(low <= c <= high for c in letters) / len(letters)

    assert share("zh", "\u4e00", "\u9fff") > 0.95
    assert share("uk", "\u0400", "\u04ff") > 0.95


def test_every_language_is_there():
    assert all(conversations(language) for language in LANGUAGES)


def test_an_unknown_language_names_the_known_ones():
    with pytest.raises(InputError, match=r"language='xx': expected one of \['de', 'en'"):
        conversations("xx")


def test_a_missing_package_is_named(monkeypatch):
    module._read.cache_clear()
    monkeypatch.setattr(module, "_PACKAGE", "chatterbot_corpus_that_is_not_there")
    with pytest.raises(InputError, match="pip install 'rm_ood\\[demo\\]'"):
        conversations("en")


def test_yaml_that_is_no_conversation_is_left_out(tmp_path, monkeypatch):
    folder = tmp_path / "english"
    folder.mkdir()
    (folder / "a.yml").write_text(
        "conversations:\n- - one\n  - two\n- - ONE\n  - Two\n- - same\n  - Same\n"
        "- - alone\n- text\n- - ''\n  - x\n- - 3\n  - 4.5\n",
        encoding="utf-8",
    )
    (folder / "b.yml").write_text("categories: [empty]\nconversations:\n", encoding="utf-8")
    module._read.cache_clear()
    monkeypatch.setattr(module, "_data_directory", lambda: tmp_path)
    found = conversations("en")
    module._read.cache_clear()
    assert found == [Conversation("one", "two"), Conversation("3", "4.5")]


def test_a_random_reply_is_never_one_that_the_prompt_got():
    rows = [Conversation("Hi", "a"), Conversation("hi", "B"), Conversation("bye", "b"), Conversation("bye", "c")]
    for seed in range(30):
        replies = random_replies(rows, random.Random(seed))
        assert replies[0] == replies[1] == "c"
        assert replies[2] == replies[3] == "a"


def test_random_replies_need_another_conversation():
    with pytest.raises(InputError, match="2 rows hold no reply from another conversation"):
        random_replies([Conversation("a", "x"), Conversation("b", "X")], random.Random(0))
