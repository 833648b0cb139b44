"""Two gloo processes fit as one does; what goes wrong in one of them ends both."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import preference_rows
from gang_processes import SETTINGS
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rm_ood import OODGuard
from rm_ood.choice import Choice
from rm_ood.collected import Shard
from rm_ood.errors import InputError, MismatchError, WorkerError
from rm_ood.fitting import FitMoments
from rm_ood.gang import Gang, joined
from rm_ood.preferences import prompt_key

pytestmark = pytest.mark.filterwarnings("ignore::rm_ood.CalibrationWarning")
ROWS = preference_rows(160)


@pytest.fixture(scope="module")
def together(shared_decoder: Any, decoder_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the two processes of gang_processes.py left."""
    folder = tmp_path_factory.mktemp("gang")
    shared_decoder.save_pretrained(folder / "model")
    decoder_tokenizer.save_pretrained(folder / "model")
    script = Path(__file__).with_name("gang_processes.py")
    processes = [
        subprocess.Popen([sys.executable, script, str(rank), folder], stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    # The second one was killed on purpose, at the end.
    assert [process.returncode for process in processes] == [0, -9], errors
    return folder


@pytest.fixture(scope="module")
def model(together: Path) -> tuple[Any, Any]:
    return (
        AutoModelForSequenceClassification.from_pretrained(together / "model", dtype=torch.float64),
        AutoTokenizer.from_pretrained(together / "model"),
    )


def said(folder: Path, name: str) -> list[Any]:
    """What both processes ended a scenario with."""
    return [json.loads((folder / f"{name}-{rank}.json").read_text())["result"] for rank in (0, 1)]


def assert_same_fit(one: OODGuard, other: OODGuard) -> None:
    """Equal up to the order in which sums were added."""
    a, b = one.state, other.state
    assert a.config == b.config
    assert a.record == b.record
    assert (a.fit_keys == b.fit_keys).all()
    assert (a.reward_mean, a.reward_sd) == pytest.approx((b.reward_mean, b.reward_sd), rel=1e-10)
    assert a.table is not None
    assert b.table is not None
    np.testing.assert_allclose(a.table.scores, b.table.scores, rtol=1e-10)
    assert (a.table.lengths == b.table.lengths).all()
    assert a.detectors.keys() == b.detectors.keys()
    for name, detector in a.detectors.items():
        same = b.detectors[name]
        assert detector.shrinkage_ == pytest.approx(same.shrinkage_, rel=1e-10)
        assert detector.class_counts_.tolist() == same.class_counts_.tolist()
        torch.testing.assert_close(detector.means_, same.means_, rtol=1e-10, atol=1e-12)
        # The state is in float32.
        torch.testing.assert_close(detector.whitening_, same.whitening_, rtol=1e-6, atol=1e-6)


def test_two_processes_fit_as_one(together: Path, model: tuple[Any, Any]) -> None:
    alone = OODGuard(*model, **SETTINGS).fit(ROWS, calibration=0.75, progress=False)
    assert_same_fit(OODGuard.from_pretrained(together / "whole", *model), alone)
    first, second = said(together, "whole")
    assert first == second
    decision = alone.check("a question", "an answer")
    assert first["p_value"] == [pytest.approx(decision.p_value, rel=1e-10)]
    assert first["axes"][0]["response"]["ood_score"] == pytest.approx(decision.axes["response"].ood_score, rel=1e-10)


def test_a_process_without_data_takes_part(together: Path, model: tuple[Any, Any]) -> None:
    rows = [row for row in ROWS if prompt_key(row["prompt"]) % 2 == 0]
    assert 60 < len(rows) < 100
    alone = OODGuard(*model, **{**SETTINGS, "alpha": 0.2}).fit(rows, calibration=0.9, progress=False)
    assert_same_fit(OODGuard.from_pretrained(together / "empty", *model), alone)


def test_other_data_to_calibrate_on(together: Path, model: tuple[Any, Any]) -> None:
    other = preference_rows(110, seed=7)
    alone = OODGuard(*model, **SETTINGS).fit(ROWS, calibration=other, progress=False)
    assert_same_fit(OODGuard.from_pretrained(together / "other-data", *model), alone)


@pytest.mark.parametrize(
    ("name", "field"),
    [("settings", "settings"), ("data", "data"), ("model", "reward model"), ("order", "rows")],
)
def test_processes_that_differ_are_refused(together: Path, name: str, field: str) -> None:
    for result in said(together, name):
        assert result.startswith(f"MismatchError: rank 1 has other {field} than rank 0")


def test_without_kept_shards_the_data_are_read_once(together: Path) -> None:
    assert said(together, "once") == [[len(ROWS)]] * 2


def test_who_reads_slowly_is_alive(together: Path) -> None:
    assert said(together, "slow-data") == ["agreed"] * 2


def test_an_error_of_the_first_is_told_to_the_others(together: Path) -> None:
    first, second = said(together, "few")
    assert first.startswith("CalibrationError: alpha=0.001")
    assert second == f"WorkerError: rank 1 stopped: rank 0 failed: {first}"


def test_a_first_process_that_works_longer_than_the_others_wait_is_alive(together: Path) -> None:
    assert said(together, "slow") == ["made", "made"]


def test_a_process_that_fails_stops_the_others_in_the_middle_of_their_data(together: Path) -> None:
    assert said(together, "failing") == [
        "WorkerError: rank 0 stopped: rank 1 failed: OSError: the disk is gone",
        "OSError",
    ]
    # Sixty rows, a fifth of a second each, were to come.
    assert json.loads((together / "failing-0.json").read_text())["seconds"] < 10


def test_a_process_that_dies_is_missed_in_bounded_time(together: Path) -> None:
    ended = json.loads((together / "killed-0.json").read_text())
    assert ended["result"].startswith("WorkerError: rank 0 stopped: rank 1 was not heard of for")
    assert ended["seconds"] < 60


# -- one process that is a gang by itself


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Any]:
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield store
    dist.destroy_process_group()


def test_a_gang_needs_a_process_group() -> None:
    with pytest.raises(InputError, match="start with torchrun"):
        Gang()


def test_a_gang_of_one_takes_the_store_of_the_group(group: Any, shared_decoder: Any, decoder_tokenizer: Any) -> None:
    guards = [OODGuard(shared_decoder, decoder_tokenizer, **SETTINGS) for _ in range(2)]
    with Gang() as gang:
        guards[0].fit(ROWS, calibration=0.75, progress=False, workers=gang)
    guards[1].fit(ROWS, calibration=0.75, progress=False)
    assert_same_fit(*guards)
    for guard in guards:
        guard.detach()


def test_what_is_sent_may_be_of_any_size(group: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gang = Gang()
    monkeypatch.setattr("rm_ood.gang._CHUNK", 7)
    for data in (b"", b"seven..", bytes(range(100))):
        assert gang._broadcast(data) == data
        assert gang._all(data) == [data]


def test_the_choice_of_the_first_is_that_of_all(group: Any) -> None:
    choice = Choice(("final",), 0.9, {"0.5 + 1": 0.9, "0.17": 0.8}, 40)
    gang = Gang()
    assert gang.from_first(lambda: choice, lambda made: ({}, made.to_dict()), Choice.from_saved) is choice
    again = Choice.from_saved({}, json.loads(json.dumps(choice.to_dict(), sort_keys=True)))
    assert again == choice
    assert list(again.candidates) == ["0.5 + 1", "0.17"]


def test_a_collective_that_breaks_off_says_which(group: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(dist, "broadcast", broken)
    with Gang() as gang, pytest.raises(WorkerError, match="rank 0: sending the result broke off"):
        gang.from_first(lambda: 1, lambda _: ({}, {}), lambda *_: 1)


def test_the_reason_of_a_broken_collective_is_the_failure_of_another(
    group: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gang = Gang(store=group)

    def broken(*_: Any, **__: Any) -> None:
        with pytest.raises(ValueError), Gang(store=group):
            raise ValueError("of another process")
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(dist, "all_reduce", broken)
    with pytest.raises(WorkerError, match="rank 0 failed: ValueError: of another process"):
        gang.total(FitMoments(2))


def test_a_store_that_is_gone_is_an_error_of_its_own(group: Any) -> None:
    class Gone:
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError("Broken pipe")

    gang = Gang()
    gang._store = Gone()
    with pytest.raises(WorkerError, match="rank 0 lost the store"):
        gang.beat()
    # The error at hand is not hidden by it.
    with pytest.raises(KeyError), gang:
        raise KeyError("mine")


def test_vectors_of_different_widths_are_refused(group: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gang = Gang()
    shapes = [[["channels", "final", d, 2], ["reward", "", 1, 1]] for d in (4, 5)]
    monkeypatch.setattr(gang, "_meet", lambda _: [json.dumps(s).encode() for s in shapes])
    with pytest.raises(MismatchError, match="different channels or widths"):
        gang.total(FitMoments(2))


def test_processes_that_do_not_find_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(WorkerError, match="did not find each other"), joined():
        pass


def test_every_prompt_is_in_one_shard() -> None:
    keys = [prompt_key(row["prompt"]) for row in ROWS]
    for count in (1, 2, 3, 7):
        shards = [Shard(i, count) for i in range(count)]
        owners = [[s.index for s in shards if s.has(key)] for key in keys]
        assert all(len(found) == 1 for found in owners)
        assert len({found[0] for found in owners}) == count
