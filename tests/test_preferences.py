from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rm_ood.dialogue import Dialogue, check_prompt, check_response, parse_dialogue
from rm_ood.errors import InputError
from rm_ood.preferences import CHOSEN, REJECTED, RowReader, hash_fraction, prompt_key, stable_hash
from rm_ood.rows import dataset_length, iter_rows

FIT = RowReader(require_labels=True)
PLAIN = RowReader(require_labels=False)
USER = {"role": "user", "content": "hello"}
ANSWER = {"role": "assistant", "content": "hi"}
SECRET = "the secret text that no error may quote"


def content(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


# -- columns to items


def test_an_explicit_preference_row_gives_one_item_per_response() -> None:
    items = FIT.items({"id": 7, "prompt": "p", "chosen": "good", "rejected": "bad"}, 3)
    assert [(i.prompt, i.response, i.label, i.row_id, i.group, i.where) for i in items] == [
        ("p", "good", CHOSEN, "7", None, "rows[3].chosen"),
        ("p", "bad", REJECTED, "7", None, "rows[3].rejected"),
    ]
    assert FIT.items({"id": None, "prompt": "p", "chosen": "good", "rejected": "bad"}, 3)[0].row_id == "3"


def test_several_rejected_responses_are_several_items() -> None:
    items = FIT.items({"prompt": "p", "chosen": "good", "rejected": ["bad", "worse"]}, 0)
    assert [i.where for i in items] == ["rows[0].chosen", "rows[0].rejected[0]", "rows[0].rejected[1]"]
    assert [i.label for i in items] == [CHOSEN, REJECTED, REJECTED]
    messages = {"prompt": [USER], "chosen": [ANSWER], "rejected": [[content("assistant", "no")], "never"]}
    assert [i.response for i in FIT.items(messages, 0)] == ["hi", "no", "never"]


def test_message_lists_may_stand_for_prompt_and_responses() -> None:
    row = {"prompt": [content("system", "be kind"), USER], "chosen": [ANSWER], "rejected": [content("assistant", "no")]}
    items = FIT.items(row, 0)
    assert items[0].prompt == [content("system", "be kind"), USER]
    assert [i.response for i in items] == ["hi", "no"]


def test_an_implicit_prompt_is_what_the_message_lists_share() -> None:
    items = FIT.items({"chosen": [USER, ANSWER], "rejected": [USER, content("assistant", "no")]}, 0)
    assert items[0].prompt == [USER]
    assert [i.response for i in items] == ["hi", "no"]


def test_an_implicit_string_prompt_ends_with_its_marker_so_that_prompt_and_response_give_the_text_back() -> None:
    chosen = "\n\nHuman: hello\n\nAssistant: hi there"
    rejected = "\n\nHuman: hello\n\nAssistant:  two spaces"
    items = FIT.items({"chosen": chosen, "rejected": rejected}, 0)
    assert [i.response for i in items] == ["hi there", " two spaces"]
    assert [f"{i.prompt}{i.response}" for i in items] == [chosen, rejected]
    assert parse_dialogue(str(items[0].prompt)) == [content("user", "hello")]
    empty = FIT.items({"chosen": chosen, "rejected": "\n\nHuman: hello\n\nAssistant:"}, 0)
    assert [i.response for i in empty] == ["hi there", ""]
    tight = FIT.items({"chosen": chosen, "rejected": "\n\nHuman: hello\n\nAssistant:no"}, 0)
    assert [f"{i.prompt}{i.response}" for i in tight] == [chosen, "\n\nHuman: hello\n\nAssistant:no"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "a", "rejected": "b"}, r"rows\[0\].chosen: no prompt column.*'Assistant:' turn"),
        ({"chosen": [USER, ANSWER], "rejected": "b"}, r"not all of one kind: \['list', 'str'\]"),
        ({"chosen": [USER, ANSWER], "rejected": [content("user", "?"), ANSWER]}, "do not share a dialogue"),
        ({"chosen": [ANSWER], "rejected": [content("assistant", "no")]}, "do not share a dialogue"),
    ],
)
def test_implicit_prompts_that_are_none_are_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        FIT.items(row, 0)


@pytest.mark.parametrize("name", ["completion", "response"])
@pytest.mark.parametrize(("label", "expected"), [(True, CHOSEN), (False, REJECTED), (1, CHOSEN), (0, REJECTED)])
def test_unpaired_rows_take_their_class_from_the_label(name: str, label: Any, expected: int) -> None:
    (item,) = FIT.items({"prompt": "p", name: "r", "label": label}, 0)
    assert (item.label, item.response, item.where) == (expected, "r", f"rows[0].{name}")


def test_unlabelled_rows_are_for_calibration_only() -> None:
    assert PLAIN.items({"prompt": "p", "response": "r"}, 0)[0].label is None
    with pytest.raises(InputError, match=r"rows\[0\]: no label. fit\(\) needs chosen and rejected"):
        FIT.items({"prompt": "p", "response": "r"}, 0)


@pytest.mark.parametrize("label", [-1, 2, "chosen", 0.5])
def test_row13_labels_other_than_true_and_false_are_refused(label: Any) -> None:
    with pytest.raises(InputError, match=r"rows\[0\].label: expected true \(chosen\) or false"):
        FIT.items({"prompt": "p", "response": "r", "label": label}, 0)


def test_a_grouping_column_is_carried_and_must_have_a_value() -> None:
    reader = RowReader(require_labels=False, group_column="source")
    assert reader.items({"prompt": "p", "response": "r", "source": 3}, 0)[0].group == "3"
    for row in ({"prompt": "p", "response": "r"}, {"prompt": "p", "response": "r", "source": None}):
        with pytest.raises(InputError, match=r"rows\[5\]: no value in the grouping column 'source'"):
            reader.items(row, 5)


@pytest.mark.parametrize(
    ("row", "guess"),
    [
        ({"question": "q", "accepted": "a", "rejected": "b"}, "accepted -> chosen, question -> prompt"),
        ({"instruction": "q", "output": "a"}, "instruction -> prompt, output -> response"),
        ({"prompt": "q", "answer": "a"}, "answer -> response"),
    ],
)
def test_row57_renamed_columns_are_listed_with_a_guess(row: dict[str, Any], guess: str) -> None:
    with pytest.raises(InputError, match="Columns found: ") as error:
        FIT.items(row, 2)
    assert f"Did you mean {guess}? Rename the columns." in str(error.value)
    assert all(repr(name) in str(error.value) for name in row)
    assert "rows[2]: needs columns prompt/chosen/rejected with values" in str(error.value)


def test_row57_a_missing_column_without_a_guess_makes_none_up() -> None:
    with pytest.raises(InputError, match=r"prompt/chosen/rejected or prompt/response.*Columns found: \['x'\]\.$"):
        PLAIN.items({"x": 1}, 0)


def test_row58_null_values_are_named() -> None:
    with pytest.raises(InputError, match=r"empty: \['chosen'\]"):
        FIT.items({"prompt": "p", "chosen": None, "rejected": "b"}, 0)


def test_row58_equal_chosen_and_rejected_are_refused() -> None:
    for rejected in ("same", ["other", "same"]):
        with pytest.raises(InputError, match="chosen and rejected are the same text; on_bad='drop'"):
            FIT.items({"prompt": "p", "chosen": "same", "rejected": rejected}, 0)
    assert len(FIT.items({"prompt": "p", "chosen": "a", "rejected": ["b", "b"]}, 0)) == 3


# -- texts


@pytest.mark.parametrize("prompt", ["", " \n\t", [], [content("user", "  ")]])
def test_row42_an_empty_prompt_is_refused_unless_allowed(prompt: Any) -> None:
    with pytest.raises(InputError, match=r"x: (empty|no text in \d messages)\. Pass allow_empty=True"):
        check_prompt(prompt, "x")
    assert check_prompt(prompt, "x", allow_empty=True) == prompt
    row = {"prompt": prompt, "response": "r"}
    assert RowReader(require_labels=False, allow_empty=True).items(row, 0)[0].prompt == prompt


def test_row41_an_empty_response_is_allowed() -> None:
    assert check_response("", "x") == ""
    assert PLAIN.items({"prompt": "p", "response": ""}, 0)[0].response == ""


def test_row45_a_text_past_the_character_limit_is_refused_before_tokenizing() -> None:
    long = "a" * 600_000
    with pytest.raises(InputError, match=r"prompt: 600000 characters; the limit is max_chars=200000") as error:
        check_prompt(long, "prompt")
    assert len(str(error.value)) < 200
    with pytest.raises(InputError, match="600000 characters"):
        check_response(long, "response")
    with pytest.raises(InputError, match=r"prompt\[0\].content: 600000 characters"):
        check_prompt([content("user", long)], "prompt")
    with pytest.raises(InputError, match="600000 characters in 4 messages"):
        check_prompt([content("user", "a" * 150_000)] * 4, "prompt")
    assert check_prompt("a" * 200_000, "prompt")
    reader = RowReader(require_labels=False, max_chars=3)
    with pytest.raises(InputError, match=r"rows\[0\].response: 4 characters; the limit is max_chars=3"):
        reader.items({"prompt": "abc", "response": "abcd"}, 0)


def test_row46_lone_surrogate_is_an_input_error_with_its_position() -> None:
    for check in (check_prompt, check_response):
        with pytest.raises(InputError, match="x: lone surrogate at character 2"):
            check("ab\ud800c", "x")
    with pytest.raises(InputError, match=r"x\[0\].content: lone surrogate at character 0"):
        check_prompt([content("user", "\udfff")], "x")


@given(st.text(alphabet=st.characters(codec="utf-8"), min_size=1).filter(str.strip))
def test_row47_any_unicode_text_is_accepted_as_it_is(text: str) -> None:
    assert check_prompt(text, "x") == text
    assert check_response(text, "x") == text


@pytest.mark.parametrize(
    ("value", "came"),
    [
        (None, "None"), (3, "int"), (b"abc", "bytes of length 3"), (1.5, "float"), (np.array(3), "ndarray"),
        ({"role": "user"}, "dict of length 1"),
    ],
)  # fmt: skip
def test_row48_another_type_is_an_error_with_the_field_path(value: Any, came: str) -> None:
    with pytest.raises(InputError) as error:
        check_response(value, "items[3].response")
    assert str(error.value) == f"items[3].response: expected str, got {came}"
    with pytest.raises(InputError) as error:
        check_prompt(value, "items[3].prompt")
    assert str(error.value) == f"items[3].prompt: expected str or a list of messages, got {came}"


def test_row48_a_list_is_no_response() -> None:
    with pytest.raises(
        InputError, match=r"items\[0\].response\[0\]: expected a message with role and content, got str"
    ):
        check_response(["text"], "items[0].response")
    with pytest.raises(InputError, match="expected one assistant message, got 2; earlier turns belong to prompt"):
        check_response([USER, ANSWER], "items[0].response")
    with pytest.raises(InputError, match="expected one assistant message, got 0"):
        check_response([], "items[0].response")


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"content": "x"}, r"p\[0\].role: expected str, got None"),
        ({"role": "", "content": "x"}, r"p\[0\].role: expected str, got str of length 0"),
        ({"role": 1, "content": "x"}, r"p\[0\].role: expected str, got int"),
        ({"role": "user"}, r"p\[0\].content: expected str or a list of text blocks, got None"),
        ({"role": "user", "content": None}, r"p\[0\].content: expected str or a list of text blocks, got None"),
        ("hello", r"p\[0\]: expected a message with role and content, got str of length 5"),
    ],
)
def test_row49_malformed_messages_are_refused(message: Any, error: str) -> None:
    with pytest.raises(InputError, match=error):
        check_prompt([message], "p")


def test_row49_a_response_message_must_be_the_assistants() -> None:
    with pytest.raises(InputError, match=r"r\[0\].role: expected 'assistant'"):
        check_response([USER], "r")
    assert check_response([ANSWER], "r") == "hi"


def test_fields_of_a_message_are_kept_for_the_template_and_empty_ones_are_not() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    assert check_prompt(({**USER, "tool_calls": [call], "name": None},), "p") == [{**USER, "tool_calls": [call]}]
    # Some templates tell a missing content from an empty one.
    silent = {"role": "assistant", "content": None, "tool_calls": [call]}
    assert check_prompt([USER, silent], "p") == [USER, {"role": "assistant", "tool_calls": [call]}]
    assert check_response([silent], "r") == {"role": "assistant", "tool_calls": [call]}
    with pytest.raises(InputError, match=r"p\[0\]: expected plain JSON values \(TypeError\)"):
        check_prompt([{**USER, "weight": object()}], "p")
    with pytest.raises(InputError, match=r"p\[0\]: \d+ characters; the limit is max_chars=30"):
        check_prompt([{**USER, "name": "n" * 50}], "p", max_chars=30)
    with pytest.raises(InputError, match=r"p\[0\]: lone surrogate"):
        check_prompt([{**USER, "name": "\ud800"}], "p")
    with pytest.raises(InputError, match=r"p: \d+ characters in 2 messages"):
        check_prompt([{**USER, "name": "n" * 20}] * 2, "p", max_chars=50)


# -- typed blocks


@pytest.mark.parametrize("kind", ["text", "input_text", "output_text"])
def test_text_blocks_are_content(kind: str) -> None:
    one = {"role": "user", "content": [{"type": kind, "text": "hello", "image": None}]}
    assert check_prompt([one], "p") == [USER]
    assert check_response([{"role": "assistant", "content": [{"type": kind, "text": "hi"}]}], "r") == "hi"
    two = [{"type": kind, "text": "a"}, {"type": kind, "text": "b"}]
    blocks = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert check_prompt([{"role": "user", "content": two}], "p") == [{"role": "user", "content": blocks}]
    assert check_response([{"role": "assistant", "content": two}], "r") == {"role": "assistant", "content": blocks}
    assert check_prompt([{"role": "user", "content": []}], "p", allow_empty=True) == [content("user", "")]
    assert prompt_key([{"role": "user", "content": blocks}]) == prompt_key("a b")


@pytest.mark.parametrize(
    ("block", "error"),
    [
        (
            {"type": "image_url", "image_url": {"url": "x"}},
            r"p\[0\].content\[1\].type: expected 'text', got 'image_url'",
        ),
        ({"type": "input_audio", "data": "x"}, r"p\[0\].content\[1\].type: expected 'text', got 'input_audio'"),
        ({"type": SECRET, "text": "x"}, r"content\[1\].type: expected 'text', got str of length 39"),
        ({"text": "x"}, r"content\[1\].type: expected 'text', got None"),
        ({"type": "text"}, r"content\[1\].text: expected str, got None"),
        ({"type": "text", "text": "\ud800"}, r"content\[1\].text: lone surrogate"),
        ({"type": "text", "text": "x", "citations": [1]}, r"content\[1\]: \['citations'\] would not be scored"),
        ("x", r"content\[1\]: expected a typed block, got str of length 1"),
    ],
)
def test_other_blocks_are_refused_with_their_place(block: Any, error: str) -> None:
    message = {"role": "user", "content": [{"type": "text", "text": "hello"}, block]}
    with pytest.raises(InputError, match=error) as raised:
        check_prompt([message], "p")
    assert SECRET not in str(raised.value)


# -- tools and template keywords

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def test_rows_with_tools_or_template_keywords_give_dialogues() -> None:
    row = {"prompt": [USER], "chosen": [ANSWER], "rejected": [content("assistant", "no")]}
    items = FIT.items({**row, "tools": [TOOL], "chat_template_kwargs": {"enable_thinking": False, "date": None}}, 0)
    assert [i.prompt for i in items] == [Dialogue([USER], [TOOL], {"enable_thinking": False})] * 2
    for tools in (json.dumps([TOOL]), (TOOL,)):
        assert FIT.items({**row, "tools": tools}, 0)[0].prompt == Dialogue([USER], [TOOL])
    for empty in (None, [], "[]"):
        assert FIT.items({**row, "tools": empty, "chat_template_kwargs": {}}, 0)[0].prompt == [USER]
    string = PLAIN.items({"prompt": "hello", "response": "hi", "tools": [TOOL]}, 0)[0].prompt
    assert string == Dialogue([USER], [TOOL])
    implicit = {"chosen": [USER, ANSWER], "rejected": [USER, content("assistant", "no")], "tools": [TOOL]}
    assert FIT.items(implicit, 0)[0].prompt == Dialogue([USER], [TOOL])


def test_a_dialogue_is_checked_like_its_parts() -> None:
    dialogue = Dialogue([USER], [TOOL], {"enable_thinking": True})
    assert check_prompt(dialogue, "p") == dialogue
    assert check_prompt(Dialogue([USER]), "p") == [USER]
    with pytest.raises(InputError, match=r"p.messages\[0\].role: expected str"):
        check_prompt(Dialogue([{"content": "x"}]), "p")
    with pytest.raises(InputError, match=r"p.tools: expected a list of JSON schemas"):
        check_prompt(Dialogue([USER], [3]), "p")  # type: ignore[list-item]
    assert prompt_key(dialogue) == prompt_key("hello")


@pytest.mark.parametrize(
    ("columns", "error"),
    [
        ({"tools": SECRET}, r"rows\[0\].tools: a string that is not JSON"),
        ({"tools": json.dumps(TOOL)}, r"rows\[0\].tools: expected a list of JSON schemas.*got dict of length 2"),
        ({"tools": [len]}, r"rows\[0\].tools: expected a list of JSON schemas"),
        ({"tools": [{"f": len}]}, r"rows\[0\].tools: expected plain JSON values"),
        ({"tools": [{"f": "x" * 200_000}]}, r"rows\[0\].tools: \d+ characters; the limit"),
        ({"chat_template_kwargs": "x"}, r"rows\[0\].chat_template_kwargs: expected a mapping, got str"),
        ({"chat_template_kwargs": {"f": len}}, r"rows\[0\].chat_template_kwargs: expected plain JSON"),
        ({"chat_template_kwargs": {"tokenize": True}}, r"\['tokenize'\] are the tokenizer's own"),
    ],
)
def test_tools_and_keywords_of_another_kind_are_refused(columns: dict[str, Any], error: str) -> None:
    with pytest.raises(InputError, match=error) as raised:
        PLAIN.items({"prompt": [USER], "response": "hi", **columns}, 0)
    assert SECRET not in str(raised.value)


def test_responses_that_differ_in_a_field_only_are_not_the_same() -> None:
    def answer(name: str) -> list[dict[str, Any]]:
        return [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": name}}]}]

    assert len(FIT.items({"prompt": [USER], "chosen": answer("f"), "rejected": answer("g")}, 0)) == 2
    with pytest.raises(InputError, match="chosen and rejected are the same text"):
        FIT.items({"prompt": [USER], "chosen": answer("f"), "rejected": answer("f")}, 0)


def test_no_error_quotes_the_text() -> None:
    calls: list[Any] = [
        lambda: check_prompt(SECRET, "p", max_chars=3),
        lambda: check_response(SECRET + "\ud800", "r"),
        lambda: check_response([content(SECRET, SECRET)], "r"),
        lambda: check_prompt([SECRET], "p"),
        lambda: FIT.items({"prompt": "p", "chosen": SECRET, "rejected": SECRET}, 0),
        lambda: FIT.items({"prompt": "p", "response": SECRET, "label": SECRET}, 0),
        lambda: FIT.items({"chosen": SECRET, "rejected": SECRET}, 0),
        lambda: list(iter_rows([SECRET])),
    ]
    for call in calls:
        with pytest.raises(InputError) as error:
            call()
        assert SECRET not in str(error.value)


# -- sources

ROWS = [{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "q é 中", "chosen": "c", "rejected": "d"}]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
def test_files_give_their_rows(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"data{suffix}"
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n\n" for row in ROWS).encode()
    if suffix == ".parquet":
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        path.write_bytes(gzip.compress(lines) if suffix.endswith("gz") else lines)
    assert list(iter_rows(path)) == ROWS
    assert list(iter_rows(str(path))) == ROWS
    assert dataset_length(path) is None


def test_row59_an_iterable_without_a_length_is_read_once_and_lazily() -> None:
    taken: list[int] = []

    def source() -> Any:
        for i, row in enumerate(ROWS * 10):
            taken.append(i)
            yield row

    rows = iter_rows(source())
    assert next(rows) == ROWS[0]
    assert taken == [0]
    assert dataset_length(source()) is None
    assert dataset_length(ROWS) == 2


def test_datasets_are_rows_and_their_splits_are_not() -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(ROWS)
    assert list(iter_rows(data)) == ROWS
    assert dataset_length(data) == 2
    assert list(iter_rows(data.to_iterable_dataset())) == ROWS
    with pytest.raises(InputError, match=r"got several splits \['train'\]"):
        next(iter_rows(datasets.DatasetDict({"train": data})))


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ({"prompt": ["a"]}, r"got a mapping of columns or splits.*\['prompt'\]"),
        (3, "expected rows .* or a path, got int"),
        (None, "got NoneType"),
        ([3], r"rows\[0\]: expected a mapping of columns, got int"),
        ([ROWS[0], "x"], r"rows\[1\]: expected a mapping of columns, got str"),
    ],
)
def test_what_is_no_dataset_is_refused(dataset: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        list(iter_rows(dataset))


def test_row23_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no data file at .*none\.jsonl"):
        list(iter_rows(tmp_path / "none.jsonl"))


def test_row24_a_folder_is_no_data_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder"):
        list(iter_rows(tmp_path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"a": "\xff"}', r"data\.jsonl line 2: not UTF-8 \(byte 7 of the line\)"),
        (b'{"a": ', r"data\.jsonl line 2: not JSON"),
        (b"[" * 100_000, r"line 2: not JSON \(RecursionError\)"),
        (b'{"a": ' + b"9" * 5_000 + b"}", r"line 2: not JSON \(ValueError\)"),
    ],
)
def test_row46_a_bad_line_is_named_by_file_and_number(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b"\n")
    with pytest.raises(InputError, match=message):
        list(iter_rows(path))


def test_row25_cut_and_false_archives_are_input_errors(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl.gz"
    whole = gzip.compress("".join(json.dumps({"n": stable_hash(str(i))}) + "\n" for i in range(5_000)).encode())
    for blob in (b"{}\n", whole[: len(whole) // 2], whole[:-4], whole[:100] + b"\xff" * 50 + whole[150:]):
        path.write_bytes(blob)
        with pytest.raises(InputError, match=r"data\.jsonl\.gz( line \d+)?: not (a whole gzip file|JSON|UTF-8)"):
            list(iter_rows(path))
    pytest.importorskip("pyarrow")
    path = tmp_path / "data.parquet"
    path.write_bytes(b"PAR1 no parquet at all")
    with pytest.raises(InputError, match=r"data\.parquet: not a whole Parquet file"):
        list(iter_rows(path))


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"pip install 'rm_ood\[data\]'"):
        list(iter_rows(tmp_path / "data.parquet"))


# -- dialogues, keys and the split


def test_human_assistant_strings_are_read_as_messages() -> None:
    text = "\n\nHuman: hi\nthere\n\nAssistant: hello \n\nHuman:again: Human: no turn"
    assert parse_dialogue(text) == [
        content("user", "hi\nthere"),
        content("assistant", "hello"),
        content("user", "again: Human: no turn"),
    ]
    assert parse_dialogue("Human: hi") == [content("user", "hi")]


@pytest.mark.parametrize("ending", ["\n\nAssistant:", "\n\nAssistant: ", "\n\nAssistant:\n"])
def test_a_prompt_that_asks_for_the_assistants_turn_does_not_hold_it(ending: str) -> None:
    assert parse_dialogue("\n\nHuman: hi" + ending) == [content("user", "hi")]


@pytest.mark.parametrize("text", ["", "hello", "Assistant: hi", "He said Human: hi", "intro\n\nHuman: hi"])
def test_other_strings_are_no_dialogue(text: str) -> None:
    assert parse_dialogue(text) is None


def test_the_prompt_key_sees_the_first_user_turn_normalised() -> None:
    key = prompt_key("Hello  World")
    assert key == prompt_key(" hello\nworld ") == prompt_key("ＨＥＬＬＯ world")
    assert key == prompt_key([content("system", "be kind"), content("user", "Hello World"), ANSWER, USER])
    assert key == prompt_key("\n\nHuman: hello world\n\nAssistant: hi\n\nHuman: more")
    assert key != prompt_key("hello worlds")
    assert prompt_key([content("system", "only")]) == prompt_key("only")
    assert prompt_key([]) == prompt_key("")


def test_hashes_are_the_same_in_every_process() -> None:
    assert stable_hash("prompt", 7) == 6045687670125457724
    code = "from rm_ood.preferences import stable_hash; print(stable_hash('prompt', 7))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(out.stdout) == stable_hash("prompt", 7)


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**64 - 1))
def test_the_split_is_a_seeded_fraction(seed: int, key: int) -> None:
    assert 0 <= hash_fraction(key, seed) <= 1
    assert hash_fraction(key, seed) == hash_fraction(key, seed)


def test_the_split_is_uniform_and_moves_with_the_seed() -> None:
    fractions = np.array([[hash_fraction(stable_hash(str(i)), seed) for i in range(2_000)] for seed in (0, 1)])
    # Five standard deviations of a uniform mean of 2,000, and of a correlation.
    assert np.abs(fractions.mean(1) - 0.5).max() < 5 * 0.289 / 2_000**0.5
    assert abs(np.corrcoef(fractions)[0, 1]) < 5 / 2_000**0.5
