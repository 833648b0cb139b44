"""Files of reward pairs: what their place says, and errors that name file and line."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from rm_ood.errors import InputError, NonFiniteError
from rm_ood.study.score_files import ScoreFile, read_pairs_file, score_files


def write(path: Path, text: str = "chosen,rejected\n1,0\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    """The paper's folders, as far as they differ in kind."""
    for name in (
        "rm/set/english_original_scores.csv.gz",
        "rm/set/translation/hindi/hindi_prompt_english_response.csv.gz",
        "rm/set/translation/hindi/english_prompt_hindi_response.csv.gz",
        "rm/set/translation/hindi/hindi_prompt_hindi_response.csv",
        "rm/set/translation/hindi/translated_back_scores.csv.gz",
        "rm/set/word_perturb/10k_subset/trial0/prompt_and_response/05_scores.csv.gz",
        "rm/set/word_perturb/10k_subset/trial0/prompt_and_response/00_scores.csv.gz",
        "rm/set/translation/hindi/others.csv",
        "rm/set/notes.csv",
    ):
        write(tmp_path / name)
    (tmp_path / "rm" / "README.md").write_text("no scores")
    return tmp_path


def test_the_layout_says_condition_side_and_clean_file(layout: Path) -> None:
    clean = layout / "rm/set/english_original_scores.csv.gz"
    words = layout / "rm/set/word_perturb/10k_subset/trial0/prompt_and_response"
    languages = clean.parent / "translation/hindi"
    still = words / "00_scores.csv.gz"
    assert score_files([layout]) == [
        ScoreFile(clean, "english", None, None, clean),
        ScoreFile(languages / "english_prompt_hindi_response.csv.gz", "hindi response", "response", None, clean),
        ScoreFile(languages / "hindi_prompt_english_response.csv.gz", "hindi prompt", "prompt", None, clean),
        ScoreFile(languages / "hindi_prompt_hindi_response.csv", "hindi both", "both", None, clean),
        ScoreFile(languages / "translated_back_scores.csv.gz", "hindi back", "back", None, clean),
        ScoreFile(clean.parent / "notes.csv", "notes"),
        ScoreFile(languages / "others.csv", "others"),
        ScoreFile(still, "word both 0", "both", 0.0, still),
        ScoreFile(words / "05_scores.csv.gz", "word both 0.5", "both", 0.5, still),
    ]


def test_a_shifted_file_alone_brings_its_clean_one(layout: Path) -> None:
    shifted = layout / "rm/set/translation/hindi/translated_back_scores.csv.gz"
    assert [file.condition for file in score_files([shifted, shifted.parent])] == [
        "english", "hindi back", "hindi response", "hindi prompt", "hindi both", "others",
    ]  # fmt: skip


def test_a_clean_file_by_name_is_that_of_all(layout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(layout)
    files = score_files(["rm/set/translation"], "rm/set/notes.csv")
    assert {file.clean for file in files} == {layout / "rm/set/notes.csv"}
    assert [file.is_clean for file in files] == [True] + [False] * 5
    assert {file.condition for file in files} >= {"notes", "hindi back"}
    # However it is spelt, and wherever it stands, it is read once.
    both = score_files(["rm/set/translation/../notes.csv", "rm/set/notes.csv"], layout / "rm" / "set" / "notes.csv")
    assert [file.path for file in both] == [layout / "rm/set/notes.csv"]


def test_what_is_not_there_is_named(layout: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file at .*nowhere"):
        score_files([layout / "nowhere"])
    (layout / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty: no \.csv or \.csv\.gz file in this folder"):
        score_files([layout / "empty"])
    with pytest.raises(InputError, match=r"README\.md: expected a \.csv or \.csv\.gz file"):
        score_files([layout / "rm" / "README.md"])
    with pytest.raises(InputError, match="at least one CSV file"):
        score_files([])
    with pytest.raises(InputError, match="one clean file, got a folder"):
        score_files([layout], layout / "rm")


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_two_columns_are_read_and_others_left(tmp_path: Path, name: str) -> None:
    text = '\ufeffrejected,id, chosen ,note\r\n0.5,1,-1e3,"a, b"\r\n\r\n2,2,3,"two\r\nlines"\r\n'
    chosen, rejected = read_pairs_file(write(tmp_path / name, text))
    np.testing.assert_array_equal(chosen, [-1000.0, 3.0])
    np.testing.assert_array_equal(rejected, [0.5, 2.0])


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("", InputError, r"a\.csv line 1: .*got 0 of chosen among 0 columns"),
        ("a,b\n1,2\n", InputError, r"a\.csv line 1: .*got 0 of chosen among 2 columns"),
        ("chosen,score\n1,2\n", InputError, "got 0 of rejected"),
        ("chosen,rejected,chosen\n1,2,3\n", InputError, "got 2 of chosen"),
        ("chosen,rejected\n", InputError, r"a\.csv: no reward pair below the header"),
        ("chosen,rejected\n1,2\n1,secret\n", InputError, r"a\.csv line 3: rejected is no number$"),
        ("chosen,rejected\n1,2\n1\n", InputError, r"a\.csv line 3: 1 columns, rejected is column 2"),
        ("chosen,rejected\n1,\n", InputError, r"a\.csv line 2: rejected is no number"),
        ("chosen,rejected\n1,2\nnan,2\n", NonFiniteError, r"a\.csv line 3: chosen is nan"),
        ("chosen,rejected\n1,-inf\n", NonFiniteError, r"a\.csv line 2: rejected is -inf"),
        ('chosen,rejected\n1,"' + "x" * 200_000 + '"\n', InputError, r"a\.csv line \d: not CSV"),
    ],
)
def test_errors_name_file_and_line_and_no_text(tmp_path: Path, text: str, error: type, message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        read_pairs_file(write(tmp_path / "a.csv", text))
    assert "secret" not in str(raised.value)


def test_broken_files_are_told(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv.gz", "chosen,rejected\n" + "1,2\n" * 1000)
    whole = path.read_bytes()
    for broken in (whole[:-20], b"chosen,rejected\n1,2\n", whole[:20] + b"\x00\xff" * 10 + whole[40:]):
        path.write_bytes(broken)
        with pytest.raises(InputError, match=r"a\.csv\.gz: not a whole gzip file"):
            read_pairs_file(path)
    (tmp_path / "b.csv").write_bytes(b"chosen,rejected\n1,\xff\n")
    with pytest.raises(InputError, match=r"b\.csv: not UTF-8 \(byte 18\)"):
        read_pairs_file(tmp_path / "b.csv")
    with pytest.raises(FileNotFoundError):
        read_pairs_file(tmp_path / "gone.csv")
