"""The same ids in another language: which side is exchanged, and what does not match."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import SHARED, shared_rows

from rm_ood.errors import InputError
from rm_ood.study import conditions, read_pairs
from rm_ood.study.aligned import aligned

CLEAN = [
    {"id": f"q{i}", "prompt": f"question {i}", "chosen": f"yes {i}", "rejected": f"no {i}", "subset": "s", "lang": "en"}
    for i in range(4)
]
SPANISH = [
    {**row, "prompt": f"pregunta {i}", "chosen": f"sí {i}", "rejected": f"que no {i}", "subset": None, "lang": "es"}
    for i, row in enumerate(CLEAN)
]
ROWS = read_pairs(CLEAN, subset="subset")


def file(folder: Path, rows: list[dict[str, Any]], name: str = "other.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_each_side_is_exchanged_and_the_rest_stays(tmp_path: Path) -> None:
    # In another order, and beside the clean language itself.
    found = list(aligned(ROWS, file(tmp_path, [*CLEAN, *SPANISH[::-1]])))
    assert [(name, side) for name, side, _ in found] == [("es", "prompt"), ("es", "response"), ("es", "both")]
    prompt, response, both = (rows for _, _, rows in found)
    assert [(p.prompt, p.chosen, p.rejected) for p in prompt][1] == ("pregunta 1", "yes 1", ("no 1",))
    assert [(p.prompt, p.chosen, p.rejected) for p in response][1] == ("question 1", "sí 1", ("que no 1",))
    assert [(p.prompt, p.chosen, p.rejected) for p in both][1] == ("pregunta 1", "sí 1", ("que no 1",))
    for rows in (prompt, response, both):
        assert [(p.id, p.cluster, p.subset) for p in rows] == [(p.id, p.cluster, p.subset) for p in ROWS]


def test_a_side_that_does_not_differ_is_left_out(tmp_path: Path) -> None:
    prompts = [{**row, "prompt": f"pregunta {row['id']}"} for row in CLEAN]
    for rows in (prompts, [{"id": row["id"], "prompt": row["prompt"]} for row in prompts]):
        path = file(tmp_path, [{name: row[name] for name in row if name != "lang"} for row in rows], "spanish.jsonl")
        assert [(name, side) for name, side, _ in aligned(ROWS, path)] == [("spanish", "prompt")]
        with pytest.raises(InputError, match="nothing of its response side differs"):
            list(aligned(ROWS, path, side="response"))
    with pytest.raises(InputError, match="nothing of it differs"):
        list(aligned(ROWS, file(tmp_path, CLEAN)))


def test_ids_that_do_not_match_are_refused_with_their_number(tmp_path: Path) -> None:
    path = file(tmp_path, SPANISH[1:])
    with pytest.raises(InputError, match=r"other\.jsonl \(es\): 1 of 4 clean rows have no row of their id"):
        list(aligned(ROWS, path))
    found = list(aligned(ROWS, path, common=True))
    assert [[p.id for p in rows] for _, _, rows in found] == [["q1", "q2", "q3"]] * 3
    with pytest.raises(InputError, match="none of its 4 ids is one of the 2 clean rows'"):
        list(
            aligned(
                read_pairs([{**row, "id": f"x{row['id']}"} for row in CLEAN[:2]]), file(tmp_path, SPANISH), common=True
            )
        )
    with pytest.raises(InputError, match="1 of 5 rows repeat an id"):
        list(aligned(ROWS, file(tmp_path, [*SPANISH, SPANISH[0]])))
    with pytest.raises(InputError, match="1 ids stand in several of the 5 clean rows"):
        list(aligned([*ROWS, ROWS[0]], file(tmp_path, SPANISH)))
    nameless = [{name: value for name, value in row.items() if name != "id"} for row in SPANISH]
    with pytest.raises(InputError, match="4 of 4 rows have no id"):
        list(aligned(ROWS, file(tmp_path, nameless)))


def test_specifications_name_file_language_and_side(tmp_path: Path) -> None:
    # A colon in the path is the path's own.
    folder = tmp_path / "a:b"
    folder.mkdir()
    path = file(folder, [*SPANISH, *({**row, "lang": "xx"} for row in SPANISH[1:])])

    def cells(options: str) -> list[tuple[str, str, int]]:
        return [(c.name, c.side, len(c.rows)) for c in conditions(ROWS, [f"aligned={path}{options}"])]

    assert cells(":es:prompt") == [("es", "prompt", 4)]
    assert cells(":common:both") == [("es", "both", 4), ("xx", "both", 3)]
    assert len(cells(":es")) == 3
    with pytest.raises(InputError, match=r"no rows with lang='de'; it has \['es', 'xx'\]"):
        cells(":de")
    with pytest.raises(InputError, match=r"several languages \['es', 'xx'\]"):
        conditions(ROWS, [f"aligned={path}:es:xx"])
    with pytest.raises(InputError, match=r"no file at .*nothing\.jsonl\. Expected aligned=FILE"):
        conditions(ROWS, ["aligned=nothing.jsonl:es"])


@pytest.mark.shared
def test_real_translations_are_matched() -> None:
    def cells(name: str, lang: str | None, other: str, options: str) -> list[tuple[str, str, int]]:
        shared_rows(f"preference/{name}", 1), shared_rows(f"preference/{other}", 1)
        rows = read_pairs(SHARED / "preference" / f"{name}.jsonl.gz", lang=lang)
        spec = f"aligned={SHARED / 'preference' / f'{other}.jsonl.gz'}{options}"
        return [(c.name, c.side, len(c.rows)) for c in conditions(rows, [spec])]

    sides = ("prompt", "response", "both")
    assert cells("truthfulqa_multi", "en", "truthfulqa_multi", ":common") == [
        *(("ca", side, 811) for side in sides),
        *(("es", side, 812) for side in sides),
    ]
    with pytest.raises(InputError, match=r"\(ca\): 1 of 812 clean rows"):
        cells("truthfulqa_multi", "en", "truthfulqa_multi", "")
    assert cells("xcopa", "en", "xcopa", "") == [
        (lang, side, 600) for lang in ("id", "it", "sw", "tr", "zh") for side in sides
    ]
    assert cells("gsm8k_en", None, "mgsm_prompt_shift", ":common") == [
        (lang, "prompt", 216) for lang in ("de", "es", "fr", "zh")
    ]


def test_files_are_told_apart_by_what_stands_before_their_ending(tmp_path: Path) -> None:
    rows = read_pairs([{"id": "a", "prompt": "what is it", "chosen": "a house", "rejected": "a horse"}])
    for language in ("es", "de"):
        row = {"id": "a", "prompt": f"{language} what", "chosen": f"{language} yes", "rejected": f"{language} no"}
        (tmp_path / f"test.{language}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    names = {name for language in ("es", "de") for name, _, _ in aligned(rows, tmp_path / f"test.{language}.jsonl")}
    assert names == {"test.es", "test.de"}


def test_file_without_rows_is_refused_by_name(tmp_path: Path) -> None:
    rows = read_pairs([{"id": "a", "prompt": "what is it", "chosen": "a house", "rejected": "a horse"}])
    (tmp_path / "none.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(InputError, match=r"none\.jsonl: no rows"):
        list(aligned(rows, tmp_path / "none.jsonl"))
