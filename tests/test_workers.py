"""Shards of a fit: kept as files, taken again, added up."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from conftest import preference_rows
from test_gang import assert_same_fit

from rm_ood import OODGuard
from rm_ood.collected import Collected
from rm_ood.config import GuardConfig
from rm_ood.dialogue import Dialogue
from rm_ood.distributed import save_shards
from rm_ood.errors import FormatError, InputError, IntegrityError, MismatchError, SaveError
from rm_ood.fit import Fitter
from rm_ood.one_pass import Pass
from rm_ood.preferences import Item
from rm_ood.rows import NumberedRows, data_digest, data_glance, is_one_pass
from rm_ood.workers import ShardFolder, Workers

pytestmark = [
    pytest.mark.filterwarnings("ignore::rm_ood.CalibrationWarning"),
    pytest.mark.filterwarnings("ignore::rm_ood.TokenisationWarning"),
]
SETTINGS = {"alpha": 0.05, "max_length": 128}
ROWS = preference_rows(160)
OTHER = preference_rows(110, seed=7)
# Dialogues of one prompt, and one with tools: what is copied of them has to survive a file.
TOLD = [
    {**row, "prompt": [{"role": "user", "content": row["prompt"]}], "chat_template_kwargs": {"mode": "short"}}
    for row in ROWS[:150]
] + [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in (*ROWS[150:], *ROWS[150:])]


@pytest.fixture(scope="module")
def model(shared_decoder: Any, decoder_tokenizer: Any) -> tuple[Any, Any]:
    return copy.deepcopy(shared_decoder).double(), decoder_tokenizer


def made(model: tuple[Any, Any], **options: Any) -> OODGuard:
    return OODGuard(*model, **{**SETTINGS, **options})


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Shards that went through the model."""
    seen: list[int] = []
    run = Pass.run

    def counted(self: Pass, *arguments: Any, **options: Any) -> Collected:
        seen.append(self.shard.index)
        return run(self, *arguments, **options)

    monkeypatch.setattr(Pass, "run", counted)
    return seen


@pytest.mark.parametrize(
    ("rows", "options"),
    [(ROWS, {}), (TOLD, {"shrinkage": "likelihood", "groups": "length", "confidence": None})],
    ids=["plain", "dialogues in halves"],
)
def test_shards_add_up_from_memory_and_from_files(
    rows: Any, options: Any, model: Any, tmp_path: Path, passes: list[int]
) -> None:
    alone = made(model, **options).fit(rows, calibration=0.75, progress=False)
    assert passes == [0]
    folder = ShardFolder(tmp_path / "shards")
    split = made(model, **options).fit(rows, calibration=0.75, progress=False, workers=Workers(shards=3, folder=folder))
    assert passes == [0, 0, 1, 2]
    assert_same_fit(split, alone)
    assert {path.name for path in folder.path.iterdir()} == {f"fit-0000{i}-of-00003.safetensors" for i in range(3)}
    # One of them is lost.
    (folder.path / "fit-00001-of-00003.safetensors").unlink()
    workers = Workers(shards=3, folder=ShardFolder(folder.path, resume=True))
    again = made(model, **options).fit(rows, calibration=0.75, progress=False, workers=workers)
    assert passes == [0, 0, 1, 2, 1]
    assert_same_fit(again, split)


def test_shards_of_two_stages_are_done_apart_and_merged(model: Any, tmp_path: Path, passes: list[int]) -> None:
    folder = ShardFolder(tmp_path)
    assert save_shards(made(model), ROWS, folder, 2, [1], calibration=OTHER, progress=False) == [
        "fit 1 of 2",
        "calibrate 1 of 2",
    ]
    resumed = ShardFolder(tmp_path, resume=True)
    assert save_shards(made(model), ROWS, resumed, 2, [0, 1], calibration=OTHER, progress=False) == [
        "fit 0 of 2",
        "calibrate 0 of 2",
    ]
    n = len(passes)
    workers = Workers(shards=2, folder=resumed)
    merged = made(model).fit(ROWS, calibration=OTHER, progress=False, workers=workers)
    assert len(passes) == n
    assert_same_fit(merged, made(model).fit(ROWS, calibration=OTHER, progress=False))
    with pytest.raises(InputError, match="the shards are 0 to 1"):
        save_shards(made(model), ROWS, resumed, 2, [2], progress=False)


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        ({"options": {"batch_size": 4}}, "settings"),
        ({"rows": ROWS[1:]}, "data"),
        ({"dtype": torch.float32}, "reward model"),
        ({"calibration": 0.5}, "settings"),
    ],
)
def test_a_shard_of_another_task_is_refused(change: dict[str, Any], fields: str, model: Any, tmp_path: Path) -> None:
    save_shards(made(model), ROWS, ShardFolder(tmp_path), 2, [0], calibration=0.75, progress=False)
    other = (copy.deepcopy(model[0]).to(change.get("dtype", torch.float64)), model[1])
    workers = Workers(shards=2, folder=ShardFolder(tmp_path, resume=True))
    with pytest.raises(MismatchError, match=f"was made with other {fields}: --resume"):
        made(other, **change.get("options", {})).fit(
            change.get("rows", ROWS), calibration=change.get("calibration", 0.75), progress=False, workers=workers
        )


def test_files_that_cannot_be_taken(model: Any, tmp_path: Path) -> None:
    folder = ShardFolder(tmp_path / "shards")
    save_shards(made(model), ROWS, folder, 2, [0], calibration=0.75, progress=False)
    fit = {"calibration": 0.75, "progress": False}
    with pytest.raises(SaveError, match="holds finished fit shards, 1 of 2: pass --resume"):
        made(model).fit(ROWS, **fit, workers=Workers(shards=2, folder=folder))
    resumed = Workers(shards=2, folder=ShardFolder(folder.path, resume=True))
    file = folder.path / "fit-00000-of-00002.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(IntegrityError, match="fit-00000-of-00002"):
        made(model).fit(ROWS, **fit, workers=resumed)
    guard = made(model).fit(ROWS, **fit)
    guard.save_pretrained(tmp_path / "guard")
    file.write_bytes((tmp_path / "guard/ood_guard.safetensors").read_bytes())
    with pytest.raises(MismatchError, match="is no shard of a fit"):
        made(model).fit(ROWS, **fit, workers=resumed)
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match="shard not saved to"):
        made(model).fit(ROWS, **fit, workers=Workers(folder=ShardFolder(tmp_path / "file/shards")))


def test_the_state_of_a_shard_is_checked(model: Any) -> None:
    guard = made(model)
    fitter = Fitter(guard.column, guard.config, 0.75)
    fitter.run(ROWS, labelled=True, progress=False)
    tensors, config = fitter.found.to_saved()
    back = fitter.empty()
    back.load(tensors, config)
    again, same = back.to_saved()
    assert same == config
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    with pytest.raises(FormatError, match="incomplete"):
        fitter.empty().load({**tensors, "kept.rewards": tensors["kept.rewards"][:1]}, config)
    with pytest.raises(FormatError, match=r"moments: expected .*pivot"):
        fitter.empty().load({**tensors, "moments.0.pivot": tensors["moments.0.pivot"][:1]}, config)
    other = fitter.empty()
    other.rows_digest, back.rows_digest = "a", "b"
    with pytest.raises(MismatchError, match="different data"):
        other.merge(back)


def test_shards_of_data_that_can_be_read_once(model: Any) -> None:
    with pytest.raises(InputError, match="3 shards for one process, of data that can be read only once"):
        made(model).fit(iter(ROWS), calibration=0.75, progress=False, workers=Workers(shards=3))
    with pytest.raises(InputError, match="shards=0"):
        Workers(shards=0)
    assert is_one_pass(iter(ROWS))
    assert is_one_pass(NumberedRows(enumerate(ROWS)))
    assert not is_one_pass(ROWS)


def test_what_a_digest_of_data_sees(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(os.urandom(10_000_000))
    first = data_digest(file)
    assert first == data_digest(str(file))
    for place in (-1, 5_000_001):
        with file.open("r+b") as changed:
            changed.seek(place, 2 if place < 0 else 0)
            changed.write(b"?!"[place > 0 :][:1])
        assert data_digest(file) != first
        first = data_digest(file)
    middle = len(ROWS) // 2
    other = [*ROWS[:middle], {**ROWS[middle], "chosen": "something else"}, *ROWS[middle + 1 :]]
    swapped = [ROWS[0], ROWS[2], ROWS[1], *ROWS[3:]]
    dataset = datasets.Dataset.from_list(ROWS)
    seen = [
        ROWS,
        ROWS[:-1],
        ROWS[1:],
        other,
        swapped,
        [{"a": 1}, {"b": 2}],
        [{"a": 1}],
        [],
        NumberedRows(list(enumerate(ROWS))),
    ]
    assert len({data_digest(rows) for rows in seen}) == len(seen)
    assert data_digest(dataset) == data_digest(dataset.to_iterable_dataset()) == data_digest(list(dataset))
    assert data_digest(dataset) != data_digest(dataset.select(range(len(ROWS) - 1)))
    assert data_digest(iter(ROWS)) == data_digest({"train": ROWS}) == data_digest(tmp_path / "none") == ""


def test_what_a_glance_at_data_sees(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"{}\n")
    glances = [data_glance(file)]
    file.write_bytes(b"{}\n{}\n")
    numbered = [NumberedRows(list(enumerate(rows))) for rows in (ROWS, ROWS[::-1])]
    glances += [data_glance(one) for one in (str(file), ROWS, ROWS[:-1], ROWS[::-1], [], *numbered)]
    assert len(set(glances)) == len(glances)
    dataset = datasets.Dataset.from_list(ROWS)
    assert data_glance(dataset) == data_glance(ROWS)
    passes = [iter(ROWS), dataset.to_iterable_dataset(), NumberedRows(enumerate(ROWS)), {"train": ROWS}, tmp_path, 5]
    assert {data_glance(one) for one in passes} == {""}


def test_finished_shards_of_data_that_changed_in_the_middle_are_not_taken(model: Any, tmp_path: Path) -> None:
    folder = ShardFolder(tmp_path, resume=True)
    made(model).fit(ROWS, calibration=0.75, progress=False, workers=Workers(shards=2, folder=folder))
    middle = len(ROWS) // 2
    other = [*ROWS[:middle], {**ROWS[middle], "chosen": "something else"}, *ROWS[middle + 1 :]]
    with pytest.raises(MismatchError, match="other data: --resume"):
        made(model).fit(other, calibration=0.75, progress=False, workers=Workers(shards=2, folder=folder))


def test_unreadable_rows_and_rows_of_other_shards_are_counted_once(model: Any) -> None:
    broken: list[Any] = [*ROWS, {"prompt": "no responses"}, {"prompt": 3, "chosen": "a", "rejected": "b"}]
    alone = made(model, on_bad="drop").fit(broken, calibration=0.75, progress=False)
    split = made(model, on_bad="drop").fit(broken, calibration=0.75, progress=False, workers=Workers(shards=3))
    assert alone.state.record["dropped"] == split.state.record["dropped"] == 2
    assert_same_fit(split, alone)


def test_a_copied_dialogue_keeps_its_tools() -> None:
    class Tokenizer:
        bos_token_id = eos_token_id = 0

    one, other = (Collected(GuardConfig(), Tokenizer()) for _ in range(2))
    dialogue = Dialogue([{"role": "user", "content": "hi"}], [{"name": "f"}], {"mode": "short"})
    item = Item(dialogue, {"role": "assistant", "content": "", "tool_calls": []}, 0, "7", None, "rows[7].chosen")
    one.copies.offer(2**64 - 1, item)
    other.load(*one.to_saved())
    assert list(other.copies.drawn.items()) == list(one.copies.drawn.items())
