"""Verdicts by Ray actors: rows and schema, errors by id, folders written whole. By every way to ask: test_ray_serve.py."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import preference_rows
from test_same_verdicts import assert_same_row

from rm_ood import OODGuard
from rm_ood.cli import main as rm_ood
from rm_ood.errors import InputError, MismatchError, SaveError, WorkerError
from rm_ood.ray_data import Scorer, _failures, _whole, check_parquet, main, schema, verdicts

# What Ray 2.60 warns of by itself: its data context sets options that it deprecates, and the pipes and sockets of its
# processes are left to the garbage collector.
RAY_WARNINGS = (
    "ignore:.*is deprecated:DeprecationWarning:ray.data.context",
    "ignore::ResourceWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
)
pytestmark = [
    pytest.mark.filterwarnings("ignore::rm_ood.CalibrationWarning"),
    pytest.mark.filterwarnings(*RAY_WARNINGS),
]
ROWS = [{"id": f"row {i}", **row} for i, row in enumerate(preference_rows(24, seed=5))]


@pytest.fixture(scope="module")
def place(shared_decoder: Any, decoder_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a reward model, its guard, and rows."""
    folder = tmp_path_factory.mktemp("ray")
    shared_decoder.save_pretrained(folder / "model")
    decoder_tokenizer.save_pretrained(folder / "model")
    guard = OODGuard(shared_decoder, decoder_tokenizer, alpha=0.2, max_length=128)
    with guard:
        guard.fit(preference_rows(200), calibration=0.7, progress=False)
    guard.save_pretrained(folder / "guard")
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "rows.parquet")
    return folder


def scorer(place: Path, **changes: Any) -> Scorer:
    return Scorer(**{
        "guard": str(place / "guard"), "model": str(place / "model"), "model_options": {}, "id_column": "id", "options": {},
        **changes,
    })  # fmt: skip


def arguments(place: Path, output: Path, *more: str, data: str = "rows.parquet") -> list[str]:
    paths = {"--guard": place / "guard", "--model": place / "model", "--data": place / data, "--output": output}
    return ["check", *(str(part) for pair in paths.items() for part in pair), "--no-progress", *more]


def test_an_actor_gives_the_rows_of_the_command(place: Path, tmp_path: Path) -> None:
    assert rm_ood(arguments(place, tmp_path / "rows.jsonl")) == 0
    expected = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    actor = scorer(place)
    assert actor(pa.Table.from_pylist(ROWS)).to_pylist() == expected
    # Batches without an item, and of items that cannot be scored, have the same columns.
    assert actor(pa.Table.from_pylist(ROWS).slice(0, 0)).schema == schema(actor.guard)
    renamed = pa.Table.from_pylist([{"key": 7, "id": "other", "prompt": "a question", "response": "an answer"}])
    assert scorer(place, id_column="key")(renamed).column("id").to_pylist() == ["7"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": None, "prompt": "a", "response": "b"}, "a row without an id: column 'id' is null"),
        ({"id": "mine", "prompt": "a", "response": None}, r"rows\[id=mine\]: needs columns"),
        ({"id": "mine", "prompt": " ", "response": "b"}, r"rows\[id=mine\].prompt"),
    ],
)
def test_an_error_names_the_row_by_its_id(place: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        scorer(place)(pa.Table.from_pylist([row]))


def test_a_folder_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(FileNotFoundError), _whole(str(target), False, "in.parquet") as folder:
        (Path(folder) / "half" / "written").write_text("")
    assert list(tmp_path.iterdir()) == []
    for content in ("first.parquet", "second.parquet"):
        with _whole(str(target), content == "second.parquet", "in.parquet") as folder:
            (Path(folder) / content).write_text("")
        assert [path.name for path in target.iterdir()] == [content]
    with pytest.raises(SaveError, match="is there already"), _whole(str(target), False, "in.parquet"):
        pass
    with _whole("s3://bucket/out", False, "in.parquet") as folder:
        assert folder == "s3://bucket/out"


def test_an_actor_that_dies_is_told_in_a_line() -> None:
    from ray.exceptions import RayActorError, RayTaskError

    with pytest.raises(WorkerError, match="an actor failed: RayActorError"), _failures():
        raise RayActorError
    account = "Traceback\nrm_ood.errors.MismatchError: another model\n\nThe above exception was ...\nUDF failed"
    with pytest.raises(MismatchError, match="another model"), _failures():
        raise RayTaskError("f", account, RuntimeError())


# -- with a cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    import ray

    ray.init(num_cpus=2, include_dashboard=False, logging_level="warning", log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield ray
    ray.shutdown()


def test_a_pool_gives_the_rows_of_the_command(
    place: Path, cluster: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rm_ood([*arguments(place, tmp_path / "rows.jsonl"), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    expected = {row["id"]: row for row in map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())}
    assert main(arguments(place, tmp_path / "rows", "--json", "--actors", "2", "--batch-size", "5")) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["items"], said["flagged"]) == (summary["items"], summary["flagged"])
    rows = pq.read_table(tmp_path / "rows").to_pylist()
    assert sorted(row["id"] for row in rows) == sorted(expected)
    for row in rows:
        assert_same_row(row, expected[row["id"]])


def test_a_bad_row_ends_the_command_and_leaves_nothing(
    place: Path, cluster: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pq.write_table(pa.Table.from_pylist([*ROWS, {**ROWS[0], "id": "empty", "prompt": ""}]), place / "bad.parquet")
    assert main(arguments(place, tmp_path / "out", data="bad.parquet")) == 1
    assert "rm_ood.ray_data check: rows[id=empty].prompt" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_two_rows_with_one_id_are_refused_before_any_is_scored(
    place: Path, cluster: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{**row, "id": i} for i, row in enumerate(ROWS)]
    pq.write_table(pa.Table.from_pylist([*rows, {**rows[0], "id": 7}]), place / "repeated.parquet")
    assert main(arguments(place, tmp_path / "verdicts", data="repeated.parquet")) == 1
    assert "rows[id=7]: another row has this id" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "option", ["--actors=0", "--actors=-1", "--batch-size=0", "--cpus-per-actor=0", "--gpus-per-actor=-1"]
)
def test_counts_that_are_none_are_an_error_of_usage(
    place: Path, tmp_path: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments(place, tmp_path / "verdicts", option))
    assert ended.value.code == 2
    assert f"argument {option.partition('=')[0]}: expected a" in capsys.readouterr().err


def test_what_is_known_before_an_actor_starts(place: Path, cluster: Any, tmp_path: Path) -> None:
    names = {"guard": str(place / "guard"), "model": str(place / "model")}
    data = cluster.data.from_items(ROWS)
    with pytest.raises(InputError, match=r"no column 'key'.*every row needs an id"):
        verdicts(data, **names, id_column="key")
    with pytest.raises(InputError, match="2 actors of 1 CPUs leave none of the cluster's 2"):
        verdicts(data, **names, actors=2, cpus=1)
    with pytest.raises(FileNotFoundError):
        check_parquet(str(place / "rows.parquet"), str(tmp_path / "out"), guard=str(place / "none"), model="none")


def test_overwriting_deletes_verdicts_alone(tmp_path: Path) -> None:
    data, output = tmp_path / "answers", tmp_path / "out"
    for folder in (data, output):
        folder.mkdir()
        (folder / "part.parquet").write_bytes(b"old")
    with pytest.raises(SaveError, match="holds the data"), _whole(str(data), True, str(data / "part.parquet")):
        pass
    with pytest.raises(SaveError, match="is there already"), _whole(str(output), False, str(data)):
        pass
    with _whole(str(output), True, str(data)) as folder:
        (Path(folder) / "new.parquet").write_bytes(b"new")
    assert [file.name for file in output.iterdir()] == ["new.parquet"]
    (output / "notes.txt").write_text("mine")
    with pytest.raises(SaveError, match="no folder of Parquet files alone"), _whole(str(output), True, str(data)):
        pass
    assert (output / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers", "out"]
