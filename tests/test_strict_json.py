"""Row 30 of the input table: what Python's JSON parser lets through is refused, in bounded time."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rm_ood.errors import FormatError
from rm_ood.strict_json import canonical_json, parse_json

plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**18), 10**18) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@given(plain)
def test_plain_values_come_back(value: Any) -> None:
    text = canonical_json(value)
    assert text.isascii()
    again = parse_json(text.encode(), "it", 10**6)
    assert canonical_json(again) == text
    assert parse_json(json.dumps(value, ensure_ascii=False, indent=1).encode(), "it", 10**6) == again


def test_canonical_json_has_one_form() -> None:
    assert canonical_json({"b": [1, 2.0], "a": "é"}) == '{"a":"\\u00e9","b":[1,2.0]}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(float("nan"))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b'{"a": NaN}', "NaN is not JSON"),
        (b"[Infinity]", "Infinity is not JSON"),
        (b"[-Infinity]", "-Infinity is not JSON"),
        (b"1e999", "too large for a float"),
        (b"[-1e999]", "too large for a float"),
        (b'{"a": 1, "b": 2, "a": 3}', "key 'a' appears twice"),
        (b'[{"x": {"k": 1, "k": 1}}]', "key 'k' appears twice"),
        (b"1" * 5000, "an integer of 5000 digits"),
        (b"-" + b"1" * 5000, "an integer of 5001 digits"),
        (b"123456789012345678901", "an integer of 21 digits"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b'"\\ud800"', "surrogates not allowed"),
        (b'{"\\udfff": 1}', "surrogates not allowed"),
        (b'"\xff"', "invalid start byte"),
        (b'"\xed\xa0\x80"', "UnicodeDecodeError"),
        (b"[" * 200_000 + b"]" * 200_000, "RecursionError"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "RecursionError"),
        (b"", "Expecting value"),
        (b"{} {}", "Extra data"),
        (b"{'a': 1}", "JSONDecodeError"),
        (b'"a\x00b"', "control character"),
        (b'{"a": 01}', "JSONDecodeError"),
    ],
    ids=lambda value: value[:20].decode("latin1") if isinstance(value, bytes) else "",
)
def test_row30_what_is_not_strict_json_is_refused(text: bytes, why: str) -> None:
    start = time.process_time()
    with pytest.raises(FormatError, match=f"the settings: not strict JSON .*{why}"):
        parse_json(text, "the settings", 2**20)
    assert time.process_time() - start < 1


def test_row30_size_is_checked_before_parsing() -> None:
    with pytest.raises(FormatError, match="the settings: 11 bytes of JSON, at most 10 are read"):
        parse_json(b'"123456789"', "the settings", 10)
    assert parse_json(b'"12345678"', "the settings", 10) == "12345678"


def test_row30_a_doubled_key_among_many_is_found_in_bounded_time() -> None:
    keys = [str(i) for i in range(60_000)]
    text = "{" + ",".join(f'"{key}":0' for key in [*keys, keys[-1]]) + "}"
    start = time.process_time()
    with pytest.raises(FormatError, match="key '59999' appears twice"):
        parse_json(text.encode(), "it", 2**20)
    assert time.process_time() - start < 1


def test_a_long_key_is_cut_in_the_message() -> None:
    key = "k" * 5000
    with pytest.raises(FormatError) as error:
        parse_json(f'{{"{key}": 1, "{key}": 2}}'.encode(), "it", 2**20)
    assert len(str(error.value)) < 300


def test_twenty_digits_are_still_an_integer() -> None:
    assert parse_json(b"[12345678901234567890, -9223372036854775808]", "it", 99) == [12345678901234567890, -(2**63)]


@given(st.binary(max_size=60))
def test_any_bytes_parse_or_are_refused(data: bytes) -> None:
    try:
        value = parse_json(data, "it", 50)
    except FormatError:
        return
    assert json.loads(data) == value
